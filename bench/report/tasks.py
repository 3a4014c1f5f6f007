"""tasks.py - what is asked: generated contexts, and tasks of the data folder, as cases of one kind.

A case is a text with its questions; contexts.py of bench/longcontext makes and reads them, here they are
only chosen: evenly over each task, so that a smaller number of questions is a sample of the larger.

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
QUICK = ["nq_multidoc", "fairytale_qa", "code_line_owner", "paperqa_mc"]
NEEDLES = ("passkey", "niah_single", "number_string", "niah_multikey", "kv")


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


def generated(g, kind, task, length, sample, n, count):
    """At most n cases of one generated sample."""
    made = contexts.generated(g, kind, task, length, sample, "1", count)
    pairs = [(c, q) for c in made for q in c.questions]
    return [Case(c, q, q.metric) for c, q in evenly(pairs, n)]


def gather(plan, data, count):
    """The cases of a plan, short texts first, the tasks of one length in turn."""
    kind, g = contexts.generator(data)
    blocks = []
    for length in plan.lengths:
        for sample in range(plan.samples):
            for task in plan.tasks:
                if length <= plan.task_to.get(task, 1 << 40):
                    blocks.append(generated(g, kind, task, length, sample, plan.per_context, count))
    for task in plan.data_tasks:
        if has_data(data):
            blocks.append(from_data(data, task, plan.per_task, plan.data_to))
    blocks = [b for b in blocks if b]
    return sorted(blocks, key=lambda b: max(c.n_tokens for c in b))
