"""readme_blocks.py - the blocks of README.md, from figures.csv alone.

A block is a function of (figures, folder of the report) to Markdown. The rule that matters most: what is better than
something else has that beside it, and how many pairs or questions it rests on.

SPDX-License-Identifier: Apache-2.0
"""
import engines as eng
import figures
import others
import plots
import words

SHOWN = ["full", "lazyllm", "infllm", "window", "snapkv", "keydiff", "rag-bm25", "rag-minilm", "llama.cpp",
         "llama.cpp+slot"]
NAMES = {"score": "score", "nll": "likelihood", "first_s": "first question", "second_s": "second question", "restart_s": "after a restart",
         "write_tps": "writing", "peak_bytes": "memory", "disk_bytes": "disk"}


def table(head, rows):
    return ["| %s |" % " | ".join(head), "|" + "---|" * len(head)] + ["| %s |" % " | ".join(str(c) for c in r) for r in rows]


def short(model):
    """qwen2.5-coder-0.5b-instruct-q4_k_m: 0.5B."""
    return next((w.upper() for w in model.split("-") if w.endswith("b") and w[0].isdigit()), model)


# ---- Of the report's own rows ----

def quality_cells(found, model, name):
    score = words.get(found, model, "quality", figures.ALL, name, "score")
    share = words.get(found, model, "quality", figures.ALL, name, "share of full")
    return [words.score(score), "%.0f %%" % (100 * share["value"]) if share else ""]


def cost_cells(found, model, name, row):
    return [words.quantity(words.get(found, model, "cost", row, name, c))
            for c in ("first_s", "second_s", "restart_s", "peak_bytes", "disk_bytes")]


def costs_row(found, model):
    """The longest text that most engines were timed on, with at least three rounds."""
    rows = {}
    for f in words.of(found, model, "cost"):
        if f["figure"] == "first_s" and f["n"] >= 3 and f["engine"] in SHOWN:
            rows.setdefault(f["row"], set()).add(f["engine"])
    most = max((len(v) for v in rows.values()), default=0)
    return max((r for r, v in rows.items() if len(v) == most), key=int, default=None)


def report(found, folder):
    found = [f for f in found if not others.is_other(f)]
    out = ["", "From the report `%s/report.md`, which has all figures, their spread and what was not run:" % folder]
    load = words.get(found, "", "run", "all", "", "load of the machine")
    threads = words.get(found, "", "run", "all", "", "threads")
    if load and (not threads or figures.is_busy(load["value"], threads["value"])):
        out += ["", "**Measured at a load of %.1f (median; %.1f at most), other work included: seconds are longer than on an idle "
                "machine, and not by the same factor for all engines; the report has ratios of pairs that ran in turn, at most %d minutes apart.**" % (
                    load["value"], load["high"], figures.IN_TURN_S // 60)]
    elif load:
        out += ["", "Little else ran beside (load %.1f in the middle, %.1f at most, on %d threads). Ratios in the report are of pairs "
                "that ran in turn, at most %d minutes apart." % (load["value"], load["high"], threads["value"], figures.IN_TURN_S // 60)]
    for model in words.unique(f["model"] for f in found):
        row = costs_row(found, model)
        n = max([f["n"] for f in words.of(found, model, "quality") if f["row"] == figures.ALL and
                 f["figure"] == "score"], default=0)
        if row is None and not n:
            continue
        names = [name for name in SHOWN if words.get(found, model, "quality", figures.ALL, name, "score") or
                 (row and words.get(found, model, "cost", row, name, "first_s"))]
        out += ["", "`%s`; scores of %s; times to the first token, memory and disk for a text of %s tokens." % (
            model, "%d questions on texts over the budget" % n if n else "no questions", plots.size(int(row)) if row else "-"), ""]
        out += table(["engine", "score (95 %)", "of full", "first question", "second", "after a restart", "peak memory", "on disk"],
                     [[name + ("" if eng.kind(name) == "agnostic" else " (knows the question)")] + quality_cells(found, model, name) +
                      (cost_cells(found, model, name, row) if row else [""] * 5) for name in names])
    return "\n".join(out + behind(found) + [""])


def behind(found):
    """Where ours is behind, in one paragraph; the report has figures and reasons."""
    groups = {}
    for f, o in figures.worse(found):
        groups.setdefault(f["engine"], {}).setdefault(o["engine"], set()).add(NAMES[f["figure"]])
    if not groups:
        return []
    said = ["`%s` behind %s" % (ours, ", ".join("%s (%s)" % (other, ", ".join(sorted(what))) for other, what in theirs.items()))
            for ours, theirs in groups.items()]
    return ["", "Behind beyond noise somewhere, with figures and reasons in the report: %s." % "; ".join(said)]


# ---- Of the other benches ----

def of_bench(found, bench, machine=None):
    """(model, row, engine, figure) -> figure, of one machine or of all; of several files that of most values counts, then
    the newest: figures.csv has newer files of a bench behind older ones."""
    out = {}
    for f in sorted((f for f in found if f["section"].startswith(bench + "/")), key=lambda f: f["n"]):
        if machine is None or others.machine_of(f["section"]) == machine:
            out[(f["model"], f["row"], f["engine"], f["figure"])] = f
    return out


def machines(found, bench, folder):
    """Those that the bench ran on, the report's own first."""
    seen = words.unique(others.machine_of(f["section"]) for f in found if f["section"].startswith(bench + "/"))
    return sorted(seen, key=lambda m: m != folder.rstrip("/").split("/")[-1])


def from_bench(first, bench):
    """The sentence before a table."""
    return [first, "(`bench/results/%s/`; the report has files, commits, machine and spread):" % bench, ""]


def store(found, folder):
    columns = (("read", "reading"), ("store on disk", "store on disk"), ("peak memory, reading", "peak memory, reading"),
               ("first", "new process to first token"), ("decode step", "writing, a token"), ("facts answered", "facts found"))
    out = []
    for machine in machines(found, "speed_long", folder):
        mine = of_bench(found, "speed_long", machine)
        for model in words.unique(k[0] for k in mine):
            for engine in words.unique(k[2] for k in mine):
                for row in sorted({k[1] for k in mine if k[0] == model and k[2] == engine}, key=int):
                    cells = [mine.get((model, row, engine, c)) for c, _ in columns]
                    if not cells[0]:
                        cells[0] = mine.get((model, row, engine, "read, to be asked"))
                    if any(cells):
                        out.append([machine, short(model), "`%s`" % engine, plots.size(int(row))] + [
                            "%s, n %d" % (words.with_unit(c), c["n"]) if c else "" for c in cells])
    return "\n".join(from_bench("What a store costs", "speed_long") +
                     table(["machine", "model", "policy", "tokens"] + [t for _, t in columns], out))


def finds(found, folder):
    """Scores hang little on the machine (one question of 43 moved between two), so the files of all count."""
    mine, rows = of_bench(found, "longcontext"), []
    for model, row in words.unique((k[0], k[1]) for k in mine if k[3] == "score"):
        task, _, length = row.rpartition(" ")
        for extra in ("", ", 960 tokens"):
            engines = ["infllm" + extra, "infllm-before" + extra, "infllm-paper" + extra, "window", "full"]
            cells = [mine.get((model, row, e, "score")) for e in engines]
            if cells[0] or cells[1]:
                rows.append((model, length, task, extra, ["%.2f" % c["value"] if c else "" for c in cells] +
                             [(cells[0] or cells[1])["n"]]))
    rows.sort(key=lambda r: (r[0], -1 if r[1] == "set" else int(r[1]), r[2]))
    lines = [[short(model), task.replace("_", " ") + extra, "" if length == "set" else plots.size(int(length))] + cells
             for model, length, task, extra, cells in rows]
    return "\n".join(from_bench("Share of questions answered; few a row, so read them as rough. before: the default until "
                                "2026-12, a window of 4,096 and 16 units of 128 (of 960 tokens: 512 and 6 of 64)", "longcontext") +
                     table(["model", "task", "tokens", "infllm", "before", "published", "window", "full attention", "questions"],
                           lines))


def pruning(found, folder):
    rows, names = [], {"balanced": "`lazyllm`", "fast": "`lazyllm:preset=fast`", "paper": "as published"}
    for machine in machines(found, "lazyllm", folder):
        mine = of_bench(found, "lazyllm", machine)
        for model in words.unique(k[0] for k in mine):
            for engine, title in names.items():
                cells = [mine.get((model, "multi", engine, c)) for c in (
                    "score", "score less dense", "first token, times as fast", "whole answer, times as fast",
                    "tokens computed, average layer")]
                if all(cells):
                    score, less, first, whole, computed = cells
                    dense = words.get(found, model, score["section"], "multi", "dense", "score")
                    rows.append([machine, short(model), title, "%.2f (%.2f)" % (score["value"], dense["value"]),
                                 "%+.2f (%+.2f to %+.2f)" % (less["value"], less["low"], less["high"]), words.times(first),
                                 words.times(whole), "%.0f %%" % computed["value"], less["n"]])
    return "\n".join(from_bench("Multi-document questions, pairs in turn with full attention", "lazyllm") +
                     table(["machine", "model", "policy", "score (dense)", "less dense (95 %)", "first token", "whole answer",
                            "computed", "pairs"], rows))


def speed(found, folder):
    rows = []
    for machine in machines(found, "vs_llamacpp", folder):
        mine = of_bench(found, "vs_llamacpp", machine)
        for (model, row, engine, figure), f in mine.items():
            pair = mine.get((model, row, "kvfold", "kvfold / llama.cpp"))
            if engine == "kvfold" and figure == "value" and pair:
                theirs = mine[(model, row, "llama.cpp", "value")]
                rows.append([machine, short(model) + ", " + row, words.with_unit(dict(f, low=None)),
                             words.with_unit(dict(theirs, low=None)), words.times(pair), pair["n"]])
    return "\n".join(from_bench("4-bit models on two cores, medians of pairs run in turn on the same file and threads",
                                "vs_llamacpp") +
                     table(["machine", "Qwen2.5-Coder", "kvfold", "llama.cpp", "kvfold / llama.cpp", "pairs"], rows))


BLOCKS = {"store": store, "finds": finds, "pruning": pruning, "report": report, "speed": speed}
