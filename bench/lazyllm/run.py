#!/usr/bin/env python3
"""run.py - one question, one text: what does pruning tokens win, and what does it lose?

    run.py [--model NAME] [--groups multi,single,...] [--variant NAME=SPEC]... [--samples N]
           [--data DIR] [--out PATH] [--report]

Every question is a process of its own that reads its text and answers; dense and pruned answers to one
question stand in turn, so that a noisy minute hits all of them. Quality needs the data folder (--data or
$KVFOLD_DATA): SKIP without it.

Groups   multi    multi-document questions (hotpot_multidoc, nq_multidoc, squad_multi)
         single   questions on one document (qasper_qa, nq_longdoc, fairytale_qa)
         shots    many examples or items before the question (longeval_lines, litm_kv75, code_line_owner)
         summary  summaries and meetings (squality_summ, qmsum_query)
         lenN     multi-document questions of about N thousand tokens: len2, len4, len8, len16,
                  len32
         factsN   one planted fact in a text of about N thousand tokens: facts16, facts32
Variant  a --policy; "dense" (full) is always there. --sweep adds boundary x keep.

Answers are lines of OUT.jsonl as they come; a stopped run goes on. OUT.md has the tables, OUT.png score
against speed (needs matplotlib).

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import datetime
import json
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "longcontext"))
import contexts  # noqa: E402
import program  # noqa: E402
from program import say  # noqa: E402

GROUPS = {"multi": ["hotpot_multidoc", "nq_multidoc", "squad_multi"],
          "single": ["qasper_qa", "nq_longdoc", "fairytale_qa"],
          "shots": ["longeval_lines", "litm_kv75", "code_line_owner"],
          "summary": ["squality_summ", "qmsum_query"]}
LENGTHS = {"len2": (1400, 3000), "len4": (3000, 6000), "len8": (6000, 10500), "len16": (13500, 19000),
           "len32": (26000, 34000)}
FACTS = {"facts16": (13500, 19000), "facts32": (26000, 34000)}
FACT_TASKS = ("syn_niah_single", "syn_niah_multikey", "syn_passkey", "syn_passkey_book", "syn_number_string", "syn_update")
LENGTH_TASKS = ["hotpot_multidoc", "nq_multidoc", "squad_multi", "fairytale_multi"]
VARIANTS = {"dense": "full", "balanced": "lazyllm", "fast": "lazyllm:preset=fast",
            "paper": "lazyllm:rows=1,layers=1,heads=mean,pool=1,sink=0,recent=1,hold=1",
            "random": "lazyllm:by=random,rows=1,pool=1", "snapkv": "snapkv", "keydiff": "keydiff",
            "streaming": "window:sink=4,window=1020", "infllm": "infllm",
            "chain": "infllm+lazyllm", "chain-fast": "infllm+lazyllm:preset=fast"}
SWEEP = [("s%g-k%g" % (stage, keep), "lazyllm:stages=%g,keep=%g" % (stage, keep))
         for stage in (0.25, 0.35, 0.5) for keep in (0.1, 0.2, 0.4, 0.6)]


def rows_of(args, group):
    """Samples of a group, spread over its tasks, in a fixed order."""
    tasks = LENGTH_TASKS if group in LENGTHS else ["synthetic"] if group in FACTS else GROUPS[group]
    low, high = LENGTHS.get(group) or FACTS.get(group) or (0, args.longest)
    found = []
    for task in tasks:
        path = os.path.join(args.data, "data", task + ".jsonl.xz")
        rows = [r for r in contexts.score.read_jsonl([path]) if low <= r["n_tokens"] <= high
                and (group not in FACTS or r["task"] in FACT_TASKS)]
        step = max(1, len(rows) * len(tasks) / args.samples)
        found += [rows[int(i * step)] for i in range(min(len(rows), -(-args.samples // len(tasks)))) if int(i * step) < len(rows)]
    return found


def ask(kvfold, row, spec):
    room = max(1, row["max_new_tokens"])
    got = kvfold.ask(row["context"], [row["question"]], spec, room)[0]
    question = contexts.Question(row["id"], row["question"], row["answers"], row.get("depth"), row["metric"], room)
    s = got["stats"]
    return {"prediction": got["answer"], "score": round(question.score(got["answer"]), 4),
            "n_tokens": s["n_prompt_tokens"], "ttft_ms": round(s["ttft_ms"], 1), "total_ms": round(s["total_ms"], 1),
            "n_generated": s["n_generated_tokens"], "read_share": round(s.get("read_share", 1), 4),
            "n_waiting": s.get("n_waiting_tokens", 0), "n_revived": s.get("n_revived_tokens", 0)}


def mean(values):
    return sum(values) / len(values) if values else float("nan")


def ratios(rows, base, field):
    return [base[r["id"]][field] / r[field] for r in rows if r["id"] in base and r[field] > 0]


def table(results):
    """Per group: score, and the medians of the ratios dense / variant of the same question."""
    out = []
    for model in sorted({r["model"] for r in results}):
        for group in [g for g in list(GROUPS) + list(LENGTHS) + list(FACTS) if any(r["group"] == g for r in results)]:
            mine = [r for r in results if r["model"] == model and r["group"] == group]
            base = {r["id"]: r for r in mine if r["variant"] == "dense"}
            if not base:
                continue
            tokens = sorted(r["n_tokens"] for r in base.values())
            out += ["", "## %s, %s: %d questions, %d to %d tokens" % (model, group, len(base), tokens[0], tokens[-1]), "",
                    "| variant | score | less dense | first token x | whole answer x | of the tokens, average layer | "
                    "never through all layers | n |", "|---|---|---|---|---|---|---|---|"]
            names = list(dict.fromkeys(r["variant"] for r in mine))
            for name in names:
                some = [r for r in mine if r["variant"] == name and r["id"] in base]
                paired = mean([base[r["id"]]["score"] for r in some])
                first, whole = ratios(some, base, "ttft_ms"), ratios(some, base, "total_ms")
                shown = ("%.2f" % statistics.median(first), "%.2f" % statistics.median(whole)) if len(some) >= 3 else ("", "")
                out.append("| %s | %.3f | %+.3f | %s | %s | %.0f %% | %.0f %% | %d |" % (
                    name, mean([r["score"] for r in some]), mean([r["score"] for r in some]) - paired, shown[0], shown[1],
                    100 * mean([r["read_share"] for r in some]), 100 * mean([r["n_waiting"] / r["n_tokens"] for r in some]),
                    len(some)))
    return out


def picture(results, path):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        say("no picture: matplotlib is not there")
        return
    groups = [g for g in list(GROUPS) + list(LENGTHS) + list(FACTS) if any(r["group"] == g for r in results)]
    fig, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 4), squeeze=False)
    for ax, group in zip(axes[0], groups):
        mine = [r for r in results if r["group"] == group]
        base = {r["id"]: r for r in mine if r["variant"] == "dense"}
        for name in dict.fromkeys(r["variant"] for r in mine):
            some = [r for r in mine if r["variant"] == name and r["id"] in base]
            if len(some) < 3:
                continue
            x, y = statistics.median(ratios(some, base, "ttft_ms")), mean([r["score"] for r in some])
            ax.scatter([x], [y], s=28)
            ax.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        ax.set_xlabel("time to first token: dense / variant")
        ax.set_ylabel("score")
        ax.set_title("%s (%d questions)" % (group, len(base)), fontsize=10)
        ax.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nSPDX")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="name or path (%(default)s)")
    parser.add_argument("--groups", default="multi", help="(%(default)s)")
    parser.add_argument("--variant", action="append", default=[], help="NAME or NAME=SPEC; default: %s" % ", ".join(VARIANTS))
    parser.add_argument("--sweep", action="store_true", help="also boundary x keep")
    parser.add_argument("--samples", type=int, default=24, help="questions of a group (%(default)s)")
    parser.add_argument("--longest", type=int, default=17000, help="tokens (%(default)s)")
    parser.add_argument("--data", default=os.environ.get("KVFOLD_DATA"), help="the data folder ($KVFOLD_DATA)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kvfold", help="the program (build/tools/kvfold)")
    parser.add_argument("--out", default=os.path.join(program.ROOT, "bench", "results", "lazyllm", "%s-%s" % (
        program.today(), program.cpu_slug())), help="without .jsonl, .md and .png")
    parser.add_argument("--report", action="store_true", help="write the tables of what is there")
    return parser.parse_args()


def main():
    args = parse()
    if not args.report and not (args.data and os.path.isdir(os.path.join(args.data, "data"))):
        say("SKIP: there is no data folder; name it with --data or $KVFOLD_DATA")
        return
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    results = []
    if os.path.exists(args.out + ".jsonl"):
        with open(args.out + ".jsonl", encoding="utf-8") as file:
            results = [json.loads(line) for line in file if line.strip()]
    if not args.report:
        kvfold = program.Kvfold(program.find_program(args.kvfold), program.find_model(args.model), args.threads)
        model = os.path.basename(kvfold.model).replace(".gguf", "")
        named = [v.split("=", 1) if "=" in v else [v, VARIANTS[v]] for v in args.variant or VARIANTS]
        named = [["dense", "full"]] + [v for v in named if v[0] != "dense"] + (SWEEP if args.sweep else [])
        done = {(r["model"], r["group"], r["id"], r["variant"], r["spec"]) for r in results}
        for group in args.groups.split(","):
            for row in rows_of(args, group):
                for name, spec in named:
                    if (model, group, row["id"], name, spec) in done:
                        continue
                    got = dict({"model": model, "group": group, "id": row["id"], "variant": name, "spec": spec,
                                "task": row["task"], "date": datetime.datetime.now().isoformat(timespec="seconds"),
                                "machine": program.cpu_name(), "threads": args.threads, "commit": program.commit()},
                               **ask(kvfold, row, spec))
                    results.append(got)
                    with open(args.out + ".jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps(got) + "\n")
                say("%s %s: %s" % (group, row["id"], " ".join("%.2f" % r["score"] for r in results if r["id"] == row["id"])))
    text = ["# Pruning tokens between layers: score and speed", "",
            "%s, %d threads. Ratios are dense / variant of the same question, run in turn; medians over questions, none "
            "from fewer than 3 pairs." % (results[0]["machine"], results[0]["threads"]), "",
            "    %s" % program.command_line(sys.argv)] + table(results)
    with open(args.out + ".md", "w", encoding="utf-8") as file:
        file.write("\n".join(text) + "\n")
    print("\n".join(text))
    picture(results, args.out + ".png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
