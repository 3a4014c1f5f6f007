#!/usr/bin/env python3
"""run.py - does the answer survive the compression? End to end, with the program users run.

    run.py [--model NAME] [--lengths 4096,16384] [--tasks kv,...] [--variant NAME[=SPEC[@INGEST]]]...
           [--sets fast30,...] [--data DIR] [--samples N] [--plan | --report]

Tasks    passkey, number_string, niah_single, niah_multikey, kv; facts (a pass key, a number string and six
         codes in one book: eight questions of one reading); and passkey_first, kv_first, where the question
         also stands before the context. contexts.py makes them.
Sets     subsets of the data folder (--data or $KVFOLD_DATA); without it they are skipped, and the facts
         of the generated tasks are hidden in manuals of this machine or in made-up text.
Variant  a policy. Built in: full, window, paper, ours, and window-t, paper-t, ours-t, the same with a
         tight budget, for texts that a usual window would swallow. SPEC is what --policy takes,
         INGEST (default SPEC) what the store is read with: variants with equal INGEST share a reading. INGEST/int8
         keeps keys and values at 8 bits: small=infllm@infllm/int8.

Below --stored-from tokens a text is read and asked by one process; above, policies with a memory read it
into a store once, and the questions are asked of the store by processes of their own. Full attention and
`window` stop at the length the model was trained for.

What     --what answers (the default) asks; likelihood scores the right answer instead (kvfold ask --expect): what
         it was worth to the model, where one answer more or less is luck. answers,likelihood does both.

Every answer is a line of OUT.jsonl as soon as it is there; what has an answer there is not run again, so
a stopped run goes on. OUT.md has the tables. --plan counts tokens to read without reading them.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile

import contexts
import program
import report
from program import say

TIGHT = "init=64,window=512,chunk=256"  # 960 tokens with 384 in units
VARIANTS = {
    "full": "full",
    "window": "infllm:window=4096,topk=0,reading=none",
    "paper": "infllm:select=paper",
    "ours": "infllm",
    "window-t": "infllm:%s,topk=0,reading=none" % TIGHT,
    "paper-t": "infllm:%s,block=64,topk=6,select=paper" % TIGHT,
    "ours-t": "infllm:%s,block=32,topk=12" % TIGHT,
}
DEFAULT_VARIANTS = ["full", "window", "paper", "ours"]
SETS = ["fast30", "shared_prefix", "mid", "long32k", "beyond_window"]


class Variant:
    def __init__(self, text):
        self.name, _, rest = text.partition("=")
        spec, _, ingest = rest.partition("@")
        self.spec = spec or VARIANTS.get(self.name)
        if not self.spec:
            sys.exit("run.py: unknown variant '%s'; built in are %s, or NAME=SPEC" % (text, ", ".join(VARIANTS)))
        self.ingest = ingest or self.spec
        self.has_memory = self.spec.split(":")[0] == "infllm"


class Results:
    """OUT.jsonl: what is there, and what comes."""

    def __init__(self, path):
        self.path, self.rows = path, []
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.rows = [json.loads(line) for line in file if line.strip()]
        self.done = {self.key(r) for r in self.rows if "error" not in r}

    @staticmethod
    def key(row):
        return (row["model"], row["spec"], row["ingest"], row["stored"], row["id"], row.get("asked", "answers"))

    def add(self, rows):
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for r in rows:
                file.write(json.dumps(r, ensure_ascii=True) + "\n")
        self.rows += rows
        self.done |= {self.key(r) for r in rows if "error" not in r}


# ---- One context, one variant -----------------------------------------------------------

class Bench:
    def __init__(self, args, kvfold, results):
        self.args, self.kvfold, self.results = args, kvfold, results
        self.trained = kvfold.info["n_ctx_train"]
        self.head = {"model": os.path.basename(kvfold.model).replace(".gguf", ""), "commit": program.commit(),
                     "machine": program.cpu_name(), "threads": kvfold.threads,
                     "command": program.command_line(sys.argv)}
        self.store, self.reading_s = None, {}

    def stored(self, context, variant):
        n = context.length or context.n_tokens
        return variant.has_memory and not context.raw and n >= self.args.stored_from

    def fits(self, context, variant):
        return variant.has_memory or (context.length or context.n_tokens + 64) <= self.trained

    def row(self, context, variant, question, what, **more):
        if what != "answers":
            more["asked"] = what
        return dict(self.head, date=datetime.datetime.now().isoformat(timespec="seconds"), id=question.ident,
                    task=context.task, set=context.subset, length=context.length,
                    depth=question.depth if question.depth is None else round(question.depth, 3),
                    variant=variant.name, spec=variant.spec, ingest=variant.ingest,
                    stored=self.stored(context, variant), **more)

    def missing(self, context, variant, what=None):
        return [q for q in context.questions for w in ([what] if what else self.args.what)
                if self.results.key(self.row(context, variant, q, w)) not in self.results.done]

    def enter_store(self, context, variant):
        """The context read into the store of its group and variant; what begins alike is read once."""
        if self.store is None or self.store[1:] != (context.group, variant.ingest):
            self.leave_store()
            need = (context.length or context.n_tokens) * self.kvfold.info["kv_bytes_per_token"] * 1.3
            self.store = (tempfile.mkdtemp(prefix="longcontext-", dir=self.args.scratch), context.group, variant.ingest)
            if shutil.disk_usage(self.store[0]).free < need:
                raise program.Failure("%.1f GB are not free in %s (--scratch)" % (need / 1e9, self.store[0]))
        key = (context.ident, variant.ingest)
        if key not in self.reading_s:
            said, _ = self.kvfold.ingest(self.store[0], context.ident, context.text, variant.ingest)
            document = said["documents"][0]
            self.reading_s[key] = (document["seconds"], document["n_computed_tokens"])
        return self.reading_s[key]

    def leave_store(self):
        if self.store:
            shutil.rmtree(self.store[0], ignore_errors=True)
        self.store, self.reading_s = None, {}

    def ask(self, context, variant, questions, max_tokens, expected):
        texts = [q.text for q in questions]
        if context.raw:
            return self.kvfold.go_on(context.text, variant.spec, max_tokens, expected), {}
        if not self.stored(context, variant):
            return self.kvfold.ask(context.text, texts, variant.spec, max_tokens, expected), {}
        seconds, n = self.enter_store(context, variant)
        answers = self.kvfold.ask_stored(self.store[0], context.ident, texts, variant.spec, max_tokens, expected)
        return answers, {"read_s": round(seconds, 3), "n_read": n}

    def run(self, context, variant):
        for what in self.args.what:
            self.run_one(context, variant, what)

    def run_one(self, context, variant, what):
        """Ask what has no answer yet; questions with the same room for an answer in one call."""
        todo = self.missing(context, variant, what)
        rooms = {q.max_tokens for q in todo}
        if what == "likelihood" and rooms:  # nothing is written: one call for all
            rooms = {max(rooms)}
        for room in sorted(rooms):
            asked = [q for q in todo if what == "likelihood" or q.max_tokens == room]
            expected = [q.answers[0] for q in asked] if what == "likelihood" else []
            try:
                answers, reading = self.ask(context, variant, asked, room, expected)
                make = self.likelihood_row if expected else self.answer_row
                rows = [make(context, variant, q, a, reading) for q, a in zip(asked, answers)]
                said = "%.2f" % (sum(r["logprob" if expected else "score"] for r in rows) / len(rows))
            except program.Failure as failure:
                rows = [self.row(context, variant, q, what, error=str(failure)) for q in asked]
                said = str(failure)
            self.results.add(rows)
            say("  %-10s %s: %s" % (variant.name, context.ident, said))

    def likelihood_row(self, context, variant, question, answer, reading):
        e = answer["expected"]
        return self.row(context, variant, question, "likelihood", logprob=round(e["logprob"], 4),
                        logprob_first=round(e["logprob_first"], 4), n_expected=e["n_tokens"],
                        n_first_choice=e["n_first_choice"], n_tokens=answer["stats"]["n_prompt_tokens"],
                        policy=answer["stats"]["policy"], **reading)

    def answer_row(self, context, variant, question, answer, reading):
        stats = answer["stats"]
        found = [i + 1 for i, c in enumerate(answer.get("citations") or [])
                 if any(a in c.get("excerpt", "") for a in question.answers)]
        return self.row(context, variant, question, "answers", prediction=answer["answer"],
                        score=round(question.score(answer["answer"]), 4), n_tokens=stats["n_prompt_tokens"],
                        ttft_ms=round(stats["ttft_ms"], 1), decode_tps=round(stats["decode_tps"], 2),
                        cited=found[0] if found else 0, policy=stats["policy"], **reading)


# ---- All of them --------------------------------------------------------------------------

def gather(args, kvfold):
    """Contexts, lazily: short ones first, so that a long run is useful early."""
    kind, g = contexts.generator(args.data)
    for length in args.lengths:
        for sample in range(args.samples):
            for task in args.tasks:
                if task.endswith("_first") and length > args.first_to:
                    continue
                yield contexts.generated(g, kind, task, length, sample, args.seed, kvfold.count, args.depths)
    for name in args.sets:
        for context in contexts.question_set(args.data, name):
            yield [context]


def plan(args, bench, variants):
    """Tokens to read, roughly: what begins alike in a store is counted once."""
    bench.kvfold.count = contexts.gen.est_tokens
    table = {}
    for group in gather(args, bench.kvfold):
        for variant in variants:
            todo = [c for c in group if bench.fits(c, variant) and bench.missing(c, variant)]
            if not todo:
                continue
            n = sum(c.length or c.n_tokens for c in todo)
            if bench.stored(todo[0], variant) and len(todo) > 1 and "kv" not in todo[0].task:
                n -= sum(int(c.length * c.questions[0].depth) for c in todo[:-1])
            where = (todo[0].subset or "%dK" % (todo[0].length // 1024), variant.name)
            old = table.get(where, (0, 0))
            table[where] = (old[0] + int(n), old[1] + sum(len(bench.missing(c, variant)) for c in todo))
    for (where, name), (tokens, questions) in table.items():
        print("%-14s %-10s %10d tokens to read, %4d questions; about %.0f minutes at %d tokens/s" % (
            where, name, tokens, questions, tokens / args.speed / 60 + questions / 60, args.speed))
    print("all: %.1f hours" % (sum(t / args.speed + q for t, q in table.values()) / 3600))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nSPDX")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text):
        return [w for w in text.split(",") if w]

    def sizes(text):
        unit = {"K": 1 << 10, "M": 1 << 20}
        return sorted(int(float(w.rstrip("KM")) * unit.get(w[-1], 1)) for w in words(text.upper()))
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="name or path (%(default)s)")
    parser.add_argument("--lengths", type=sizes, default=[4096, 16384], help="tokens, as 4K,16K,1M (4K,16K)")
    parser.add_argument("--tasks", type=words, default=[t for t in contexts.TASKS if t != "facts"],
                        help="(all but facts)")
    parser.add_argument("--depths", type=lambda t: [float(w) for w in words(t)], help="of single facts, 0..1")
    parser.add_argument("--samples", type=int, default=2, help="contexts of a kind (%(default)s)")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--first-to", type=int, default=65536, help="longest text for *_first: one reading a question")
    parser.add_argument("--variant", action="append", default=[], help="may be given again; default: "
                        + ", ".join(DEFAULT_VARIANTS))
    parser.add_argument("--what", type=words, default=["answers"], help="answers, likelihood or both (answers)")
    parser.add_argument("--sets", type=words, default=[], help="of " + ",".join(SETS))
    parser.add_argument("--data", default=os.environ.get("KVFOLD_DATA"), help="the data folder ($KVFOLD_DATA)")
    parser.add_argument("--stored-from", type=int, default=16384, help="tokens (%(default)s); 0: always a store")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", help="as kvfold's --memory")
    parser.add_argument("--kvfold", help="the program (build/tools/kvfold)")
    parser.add_argument("--scratch", help="folder for temporary stores ($TMPDIR)")
    parser.add_argument("--out", default=os.path.join(program.ROOT, "bench", "results", "longcontext", "%s-%s" % (
        program.today(), program.cpu_slug())), help="without .jsonl and .md")
    parser.add_argument("--plan", action="store_true", help="say what there is to do")
    parser.add_argument("--speed", type=int, default=1300, help="of reading, for --plan (%(default)s tokens/s)")
    parser.add_argument("--report", action="store_true", help="write the tables of what is there")
    args = parser.parse_args()
    for task in args.tasks:
        if task not in contexts.TASKS:
            parser.error("unknown task '%s'; there are %s" % (task, ", ".join(contexts.TASKS)))
    if not args.what or set(args.what) - {"answers", "likelihood"}:
        parser.error("--what takes answers, likelihood or both")
    return args


def main():
    args = parse()
    if args.data and not os.path.isdir(os.path.join(args.data, "data")):
        sys.exit("run.py: there is no data folder in %s" % args.data)
    if args.sets and not args.data:
        say("SKIP %s: there is no data folder; name it with --data or $KVFOLD_DATA" % ", ".join(args.sets))
        args.sets = []
    results = Results(args.out + ".jsonl")
    if not args.report:
        kvfold = program.Kvfold(program.find_program(args.kvfold), program.find_model(args.model), args.threads,
                                args.memory)
        variants = [Variant(v) for v in args.variant or DEFAULT_VARIANTS]
        order = [v.ingest for v in variants]
        variants.sort(key=lambda v: order.index(v.ingest))  # those that share a store in turn
        bench = Bench(args, kvfold, results)
        if args.plan:
            plan(args, bench, variants)
            return
        try:
            for group in gather(args, kvfold):
                for variant in variants:
                    for context in group:
                        if bench.fits(context, variant) and bench.missing(context, variant):
                            bench.run(context, variant)
        finally:
            bench.leave_store()
    text = report.tables(results.rows)
    with open(args.out + ".md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)
    say("written to %s.md and .jsonl" % os.path.relpath(args.out))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
