"""tasks.py - what is asked: generated contexts, and tasks of the data folder, as cases of one kind.

A case is one question about one text; contexts.py of bench/longcontext makes and reads them, here they are only
chosen, evenly over each task.

SPDX-License-Identifier: Apache-2.0
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "longcontext"))
import contexts  # noqa: E402

KINDS = {"multi-document": ["hotpot_multidoc", "nq_multidoc", "squad_multi", "fairytale_multi"],
         "single document": ["fairytale_qa", "qasper_qa", "nq_longdoc"],
         "multiple choice": ["quality_mc", "paperqa_mc", "quality_multi_mc"],
         "retrieval": ["litm_kv75", "longeval_lines", "longeval_topics"],
         "summary, meetings": ["squality_summ", "qmsum_query"],
         "code": ["code_find_func", "code_line_owner", "code_next_line"],
         "likelihood": ["lm_nll"]}


class Case:
    """One question about one text. The text may be shared: group and ident say by whom."""

    def __init__(self, context, question, metric):
        self.context, self.question, self.metric = context, question, metric
        self.set, self.task, self.length = context.subset, context.task, context.length

    @property
    def n_tokens(self):
        return self.length or self.context.n_tokens


def kind_of(task):
    return next((k for k, names in KINDS.items() if task in names), "generated")


def evenly(items, n):
    """n of the items, spread over all of them, in order."""
    if len(items) <= n:
        return list(items)
    return [items[int((i + 0.5) * len(items) / n)] for i in range(n)]


def has_data(data):
    return bool(data) and os.path.isdir(os.path.join(data, "data"))


def data_rows(data, task, longest):
    path = os.path.join(data, "data", task + ".jsonl.xz")
    if not os.path.exists(path):
        return []
    return [r for r in contexts.score.read_jsonl([path]) if r["n_tokens"] <= longest]


def from_data(data, task, n, longest):
    """n cases of a task, none longer than `longest` tokens."""
    out = []
    for r in evenly(data_rows(data, task, longest), n):
        context = contexts.Context(r.get("context_id") or r["id"], r["context"], [], task, None)
        context.subset, context.raw, context.n_tokens = "data", bool(r.get("raw")), r["n_tokens"]
        question = contexts.Question(r["id"], r["question"], r["answers"], r.get("depth"), r["metric"],
                                     max(1, r["max_new_tokens"]))
        context.questions.append(question)
        out.append(Case(context, question, r["metric"]))
    return out


def cut_from_books(data, n, count, n_tokens=4096, n_after=256):
    """n pieces of the books, evenly spread, of about n_tokens, and what they go on with; count(text) -> tokens."""
    kind, books = contexts.find_books(data)
    text, out = "\n\n".join(t for _, t in sorted(books)), []
    n_chars, n_more = int(n_tokens * 4.2), int(n_after * 4.2)
    for i in range(n):
        begin = text.find(" ", int((i + 0.5) / n * (len(text) - n_chars - n_more - 400))) + 1
        cut = text.find(" ", begin + n_chars)
        piece = text[begin:cut]
        out.append(("%s-%02d" % (kind, i), piece, text[cut:text.find(" ", cut + n_more)], count(piece)))
    return out


def likelihoods(data, longest, n_cut, count):
    """[(ident, text, what it goes on with, tokens)], short ones first: lm_nll of the data folder, and pieces of books."""
    rows = data_rows(data, "lm_nll", longest) if has_data(data) else []
    found = [(r["id"], r["context"], r["answers"][0], r["n_tokens"]) for r in rows] + cut_from_books(data, n_cut, count)
    return sorted(found, key=lambda f: f[3])
