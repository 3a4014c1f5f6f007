"""chapters.py - what the report says, chapter by chapter, as blocks for page.py.

The rule that matters most: what was not run is said to be not run, and a figure never stands without its count.

SPDX-License-Identifier: Apache-2.0
"""
import fnmatch
import glob
import json
import os

import chapter_others
import engines as eng
import figures
import others
import plots
import program
import scale
import stats
import tasks
from words import get, of, quantity, score, times, unique, with_spread

HERE = os.path.dirname(os.path.abspath(__file__))
RESULTS = os.path.join(program.ROOT, "bench", "results")
KINDS = (("agnostic", "Without knowing the question (read once, ask often)"),
         ("aware", "Knowing the question while reading (read for this question)"))


# ---- Head ----

def head(rows, about):
    machine, load = about.get("machine", {}), figures.median_load(rows)
    models = figures.models_of(rows)
    busy = figures.is_busy(load[0], machine.get("cores", 1))
    out = [("h", 1, "kvfold beside what people would use instead"),
           ("p", "%s, %s cores, %s GB, %s (%s). Models: %s. Program: commit %s. %d rows, %s to %s." % (
               machine.get("cpu", "?"), machine.get("cores", "?"), machine.get("memory_gb", "?"), machine.get("system", ""),
               machine.get("features", ""), ", ".join("`%s`" % m for m in models),
               ", ".join(unique(r["commit"] for r in rows)), len(rows), min(r["date"] for r in rows).replace("T", " "),
               max(r["date"] for r in rows).replace("T", " ")))]
    if busy:
        out.append(("p", "**The machine was busy** with other work: load %.1f in the middle and %.1f at most on %d cores. "
                    "Absolute times are too long and uneven; ratios are made of pairs that ran in turn, so they hold "
                    "better, with the spread that stands beside. Scores do not depend on it." % (
                        load[0], load[1], machine.get("cores", 1))))
    if about.get("noise"):
        out.append(("p", "**A random model of the test data answered**: scores are noise, this is a test of the plumbing."))
    commands = about.get("commands", [])
    return out + [("more", "Made by `bench/report/run.py`, %d command lines" % len(commands),
                   [("list", ["`%s`" % c for c in commands])])]


def who(rows, about):
    there = figures.names_in(rows)
    lacking = {}
    for why in about.get("lacking", {}).values():
        lacking.update(why)
    out = [("h", 2, "Who takes part"), ("table", ["engine", "what it is", "the question is", "reads, below 8K tokens",
                                                  "reads, from 8K on"], [])]
    for name in eng.NAMES:
        near, far = ("everything",) * 2
        if name in eng.POLICIES:
            near, far = ("`%s`" % p for p in eng.POLICIES[name][1:])
        elif name in eng.RETRIEVAL:
            near, far = ("%d tokens" % (b * eng.RETRIEVAL[name][2]) for b in (eng.NEAR_BUDGET, eng.FAR_BUDGET))
        state = eng.WORDS[name] + ("" if name in there else " - **not run**" +
                                   (": " + lacking[name] if name in lacking else ""))
        out[1][2].append([name, state, "known" if eng.kind(name) == "aware" else "not known", near, far])
    out.append(("p", "All that drop tokens read the same budget, about %d tokens of texts below %d and %d of longer ones, the "
                "retrieved prompt too: a score says how well they choose. Texts of at most %g budgets are left out "
                "of the scores. lazyllm has no budget: it saves computing, not reading." % (
                    eng.NEAR_BUDGET, eng.FAR, eng.FAR_BUDGET, figures.WITHIN)))
    if about.get("llama"):
        out.append(("p", "llama.cpp is that of llama-cpp-python %s. It runs with flash attention, repacked weights and batches "
                    "of 512; its threads sleep while they wait (`OMP_WAIT_POLICY=passive`), since on a shared machine their "
                    "spinning made it some thirty times slower. Its peak memory has some 40 MB of Python and bindings in it.%s" % (
                        about["llama"].rstrip(" |").replace(" | ", ", "), "" if "AMX_INT8 = 1" in about["llama"] or
                        "amx" not in about.get("machine", {}).get("features", "") else
                        " **It does without AMX, which kvfold uses here**: a build with AMX crashed on this kind of machine "
                        "(`bench/results/README.md`).")))
    return out


# ---- Quality ----

def quality_table(found, model, kind, row):
    lines = []
    for name in eng.NAMES:
        f = get(found, model, "quality", row, name, "score")
        if not f or (eng.kind(name) != kind and name != "full"):
            continue
        lines.append([name, score(f), score(get(found, model, "quality", row, name, "share of full")), f["n"],
                      times(get(found, model, "quality", row, name, "first token, times as fast as full")),
                      quantity(get(found, model, "quality", row, name, "n_computed")),
                      quantity(get(found, model, "quality", row, name, "n_kept"))])
    return ("table", ["engine", "score (95 %)", "share of full", "questions", "first token, full / this", "computed",
                      "kept"], lines)


def pair_table(found, model):
    mine = [f for f in of(found, model, "paired") if f["figure"].startswith("score less ")]
    if not mine:
        return []
    lines = []
    for f in mine:
        other = f["figure"].replace("score less ", "")
        wins, losses = (get(found, model, "paired", f["row"], f["engine"], "%s against %s" % (w, other))["value"]
                        for w in ("wins", "losses"))
        sure = "worse" if f["high"] < 0 else "better" if f["low"] > 0 else ""
        lines.append([f["row"], f["engine"], other, "%+.2f (%+.2f to %+.2f)" % (f["value"], f["low"], f["high"]),
                      "%d : %d" % (wins, losses), f["n"], sure])
    return [("h", 3, "Pair by pair"), ("p", "Score of ours less that of the other on the same question, mean and 95 % interval; "
            "\"better\" and \"worse\" where the interval leaves out zero."),
            ("table", ["questions of", "ours", "less", "difference", "wins : losses", "n", ""], lines)]


def by_group(found, model, prefix):
    mine = of(found, model, "quality")
    rows = [r for r in unique(f["row"] for f in mine) if r not in (figures.ALL, figures.FAST) and r.startswith("task ") == prefix]
    names = [n for n in eng.NAMES if any(f["engine"] == n for f in mine)]
    lines = []
    for row in rows:
        n = max(f["n"] for f in mine if f["row"] == row and f["figure"] == "score")
        values = [get(found, model, "quality", row, name, "score") for name in names]
        best = max(f["value"] for f in values if f)
        lines.append([row.replace("task ", ""), n] + [
            "" if not f else ("**%.2f**" if f["value"] >= best - 1e-9 and best > 0 else "%.2f") % f["value"] for f in values])
    return ("table", ["tasks" if not prefix else "task", "n"] + names, lines)


def pareto_points(found, model):
    points = []
    for name in eng.NAMES:
        f = get(found, model, "quality", figures.ALL, name, "score")
        speed = get(found, model, "quality", figures.ALL, name, "first token, times as fast as full")
        if name == "full" and f:
            speed = {"value": 1.0}
        if f and speed:
            points.append((name, speed["value"], f["value"], f["low"], f["high"]))
    return points


def quality(found, model):
    mine = of(found, model, "quality")
    out = [] if mine else [("p", "Question sets: **not run** for `%s`: no data folder, or not begun, or only on texts that "
                            "nearly fit into the budget." % model)]
    if any(f["row"] == figures.ALL for f in mine):
        out += over_all(found, model)
    if any(f["row"] == figures.FAST for f in mine):
        out += [("h", 3, "The set fast30"), ("p", "Picked among what a full cache answers: full attention is near 1.00 by "
                                             "choice, and others can only lose. It shows what is lost, not who is best.")]
        for kind, title in KINDS:
            out += [("p", title + ":"), quality_table(found, model, kind, figures.FAST)]
    return out + pair_table(found, model)


def missing_points(found, model, points):
    there = {p[0] for p in points}
    gone = [n for n in eng.NAMES if n not in there and get(found, model, "quality", figures.ALL, n, "score")]
    return " Not in the picture, since they did not run in turn with full attention: %s." % ", ".join(gone) if gone else ""


def over_all(found, model):
    out = []
    for kind, title in KINDS:
        out += [("h", 3, title), quality_table(found, model, kind, figures.ALL)]
    points = pareto_points(found, model)
    front = stats.pareto([(n, -x, y) for n, x, y, _, _ in points])
    out.append(("svg", [plots.scatter("Score against speed: first question, all tasks", points,
                                      "time to first token: full / this (to the right is faster)", "score", front)]))
    if len(points) > 1:
        out.append(("p", "Nothing else is both faster and better than (Pareto front, bold): **%s**. All engines answered the "
                    "same questions, spread evenly over each task; the bars are 95 %% intervals, and they overlap widely: few "
                    "questions show only large differences.%s" % (", ".join(front), missing_points(found, model, points))))
    return out + [("h", 3, "By kind of task"), by_group(found, model, False), ("p", "Best of the row in bold."),
                  ("h", 3, "By task"), by_group(found, model, True)]


def peer(found, model):
    f = get(found, model, "peer", figures.ALL, "full", "score")
    if not f:
        return []
    o = get(found, model, "peer", figures.ALL, "llama.cpp", "score")
    same = get(found, model, "peer", figures.ALL, "full", "same words as llama.cpp")
    fast = get(found, model, "peer", figures.ALL, "full", "first token, times as fast as llama.cpp")
    text = "Same questions, everything read: kvfold scores %s, llama.cpp %s (n = %d); %.0f %% of the answers are the same to " \
           "the letter." % (score(f), score(o), f["n"], 100 * same["value"])
    if fast:
        text += " kvfold's first token is there %s as fast, median over the questions." % times(fast)
    return [("h", 3, "Full attention beside llama.cpp"), ("p", text)]


def likelihood(found, model):
    mine = of(found, model, "likelihood")
    if not mine:
        return [("h", 3, "Likelihood"), ("p", "**Not run.**")]
    out = [("h", 3, "Likelihood of how a text goes on"),
           ("p", "Mean negative log-likelihood in nats a token of what follows a real "
           "text, which is read first, like a prompt without a question: what a policy drops then is gone. Lower is better; "
           "above full: the mean over the same texts with its 95 % interval, and \"worse\" where that leaves out zero, from 8 texts on. The "
           "next words depend mostly on the last ones, so a small difference here can still be a lost fact. Retrieval has no "
           "question to search by and is not here; llama.cpp reads the shorter texts only, so its count is lower.")]
    lines = []
    for row in unique(f["row"] for f in mine):
        for name in [n for n in eng.NAMES if get(found, model, "likelihood", row, n, "nll")]:
            f, more = (get(found, model, "likelihood", row, name, w) for w in ("nll", "nll above full"))
            sure = "" if name == "full" or more["n"] < stats.MIN_QUESTIONS else (
                "worse" if more["low"] > 0 else "better" if more["high"] < 0 else "")
            above = "%+.3f (%+.3f to %+.3f)" % tuple(more[k] for k in ("value", "low", "high"))
            lines.append([row, name, "%.3f" % f["value"], above if name != "full" else "", f["n"], sure])
    return out + [("table", ["texts", "engine", "nll", "above full (95 %)", "n", ""], lines)]


def needles(found, model):
    mine = of(found, model, "needle")
    if not mine:
        return [("h", 3, "Needles"), ("p", "**Not run**, or only in texts that nearly fit into the budget.")]
    out = [("h", 3, "Needles: one fact in a long text"), ("p", "Share found, by place of the fact (down) and length (across). "
           "The question stands after the text.")]
    cells = {}
    for f in mine:
        if " at " in f["row"]:
            what, _, depth = f["row"].rpartition(" at ")
            task, length = what.split(" ")
            cells.setdefault(task, {}).setdefault(f["engine"], {})[(float(depth), int(length))] = (f["value"], f["n"])
    for task, engines in cells.items():
        every = [c for e in engines.values() for c in e]
        lengths, depths = sorted({c[1] for c in every}), sorted({c[0] for c in every})
        out.append(("svg", [plots.heat("%s: %s" % (name, task), engines[name], lengths, depths)
                            for name in eng.NAMES if name in engines]))
        rows = []
        for name in [n for n in eng.NAMES if n in engines]:
            line = [get(found, model, "needle", "%s %d" % (task, n), name, "score") for n in lengths]
            rows.append([name] + ["" if not f else "%.2f (n %d)" % (f["value"], f["n"]) for f in line])
        out.append(("table", [task] + [plots.size(n) for n in lengths], rows))
    return out


# ---- Cost ----

COLUMNS = [("first_s", "first question"), ("second_s", "second question"), ("restart_s", "after a restart"),
           ("read_tps", "read tokens/s"), ("write_tps", "write tokens/s"), ("peak_bytes", "peak memory"),
           ("disk_bytes", "on disk"), ("n_computed", "computed"), ("n_kept", "kept")]


def costs(rows, found, model):
    mine = of(found, model, "cost")
    if not mine:
        return [("p", "**Not run.**")]
    out = [("p", "Time to the first token: of the first question about a text (reading included), of a second one in the same "
            "process, and of a question in a new process (loading included; what a store, a saved state or an index kept is "
            "used). Medians with least and most over the rounds; the rounds went through all engines in turn.")]
    columns = COLUMNS + ([("joules", "energy, J")] if any(f["figure"] == "joules" for f in mine) else [])
    for row in sorted(unique(f["row"] for f in mine), key=int):
        lines = []
        for name in [n for n in eng.NAMES if get(found, model, "cost", row, n, "first_s")]:
            first = get(found, model, "cost", row, name, "first_s")
            lines.append([name, first["n"]] + [with_spread(get(found, model, "cost", row, name, c)) for c, _ in columns])
        out += [("h", 3, "%s tokens" % plots.size(int(row))),
                ("table", ["engine", "rounds"] + [title for _, title in columns], lines)]
    if len(columns) == len(COLUMNS):
        out.append(("p", "Energy: not measured; the machine does not tell (no readable RAPL counter)."))
    return out + ratio_table(found, model) + cost_pictures(rows, model)


def ratio_table(found, model):
    mine = of(found, model, "ratio")
    if not mine:
        return [("h", 3, "Ratios"), ("p", "None: a ratio needs %d rounds that both engines ran." % stats.MIN_PAIRS)]
    lines = []
    for row in sorted(unique(f["row"] for f in mine), key=int):
        for name in [n for n in eng.NAMES if any(f["engine"] == n and f["row"] == row for f in mine)]:
            line = [plots.size(int(row)), name]
            for base in figures.BASES:
                line += [times(get(found, model, "ratio", row, name, "%s / %s" % (c, base)))
                         for c in ("first_s", "second_s", "restart_s")]
            lines.append(line)
    return [("h", 3, "Ratios, pair by pair"), ("p", "Engine / base, median and range over at least %d rounds; below 1 is faster "
            "than the base. Empty: fewer pairs." % stats.MIN_PAIRS),
            ("table", ["tokens", "engine", "first / full", "second / full", "restart / full", "first / llama.cpp",
                       "second / llama.cpp", "restart / llama.cpp"], lines)]


def cost_pictures(rows, model):
    mine = figures.costs_of(rows, model)
    out = []
    for field, title, label in (("first_s", "First question", "s to first token"), ("second_s", "Second question", "s"),
                                ("restart_s", "After a restart", "s"), ("write_tps", "Writing", "tokens/s"),
                                ("peak_bytes", "Peak memory", "bytes"), ("disk_bytes", "On disk", "bytes")):
        series = {n: figures.cost_points(rows, model, n, field) for n in figures.names_in(mine)}
        series = {n: p for n, p in series.items() if len(p) > 1}
        out.append(plots.lines(title, series, "tokens of the text", label))
    return [("svg", [p for p in out if p])]


# ---- Where kvfold is worse, video, method ----

def reasons():
    with open(os.path.join(HERE, "reasons.json"), encoding="ascii") as file:
        return json.load(file)


def reason_for(f, other, known):
    key = "%s/%s/%s/%s/%s" % (f["section"], f["row"], f["figure"], f["engine"], other["engine"])
    return next((r["why"] for r in known if fnmatch.fnmatchcase(key, r["row"])), "**no reason written yet** (`%s`)" % key)


def worse(found):
    known, groups = reasons(), {}
    for f, o in figures.worse(found):
        if f["section"] == "needle" and " at " in f["row"]:
            continue
        key = (f["model"], f["engine"], o["engine"], f["section"], f["figure"], reason_for(f, o, known))
        groups.setdefault(key, []).append((f, o))
    lines = []
    for (model, ours, theirs, section, name, why), pairs in groups.items():
        shown = ["%s: %s, %s has %s" % (f["row"] if section != "cost" else plots.size(int(f["row"])),
                                        quantity(f) if section == "cost" else score(f), o["engine"],
                                        quantity(o) if section == "cost" else score(o)) for f, o in pairs[:3]]
        lines.append([ours, theirs, name, "; ".join(shown) + (" ..." if len(pairs) > 3 else ""), why, short(model)])
    if not lines:
        return [("p", "Nothing beyond noise in this run.")]
    return [("p", "Every figure of full, infllm and lazyllm in which an alternative is ahead beyond noise (scores: pair by pair, "
             "of at least %d questions; costs: least to most apart, of at least %d rounds)." % (
                 stats.MIN_QUESTIONS, stats.MIN_PAIRS)),
            ("table", ["ours", "better", "figure", "where", "reason, and what is done", "model"], lines)]


def short(model):
    return next((w for w in model.split("-") if w.endswith("b") and w[0].isdigit()), model)


def video(slug):
    folder = os.path.join(RESULTS, "video")
    paths = sorted(glob.glob(os.path.join(folder, "*-%s.md" % slug)))
    if not paths:
        return [("p", "**Not run.** `bench/video/run.py` makes the tables.")] + contact_sheets(folder)
    with open(paths[-1], encoding="utf-8") as file:
        sections = file.read().split("\n## ")
    name = os.path.basename(paths[-1])
    out = [("p", "From `bench/results/video/%s` (its own run, training-free features); how to read it is in `bench/video`. No "
            "language model takes part, so this says what is dropped and not what is missed. %s" % (
                name, " ".join(others.notes_of("video/" + name.replace(".md", ".csv")))))]
    for text in sections[1:]:
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.split("\n") if line.startswith("|")]
        if lines:
            words = " ".join(line for line in text.split("\n")[1:] if line and not line.startswith("|"))
            out += [("h", 3, text.split("\n")[0])] + ([("p", words)] if words else []) + [("table", lines[0], lines[2:])]
    return out + contact_sheets(folder)


def contact_sheets(folder):
    path = os.path.join(folder, "sheets.json")
    if not os.path.exists(path):
        return []
    with open(path, encoding="ascii") as file:
        said = json.load(file)
    out = [("h", 3, "Contact sheets"), ("p", "Clips made by `bench/video/sheets.py` out of arithmetic, %d frames of each at commit "
                                        "%s. First row: the frames; then a row a planner. Dark: left out; clear: kept; blue: "
                                        "merged with what stands still there." % (said["sheets"][0]["frames"], said["commit"]))]
    for sheet in said["sheets"]:
        rows = "; ".join("`%s` keeps %d of %d (%d merged)" % (r["planner"], r["kept"], r["of"], r["merged"])
                         for r in sheet["rows"])
        out.append(("png", os.path.join(folder, "sheet-%s.png" % sheet["clip"]),
                    "Clip `%s`, from above: %s." % (sheet["clip"], rows)))
    return out


def method():
    return [("list", [
        "Scores are means over questions with 95 % percentile bootstrap intervals (1,000 draws, fixed seed); \"share of full\" is "
        "the sum of scores over the sum of full attention's on the same questions, drawn by question.",
        "Engines answer each question in turn, in an order that moves on by one; all in a table answered the same questions.",
        "Times are medians with least and most; a ratio is the median of the ratios of pairs that ran in turn, which is: "
        "in one round, at most %d minutes apart; it is not printed from fewer than %d pairs." % (
            figures.IN_TURN_S // 60, stats.MIN_PAIRS),
        "Greedy answers; metrics of the data folder's `score.py`. Time to first token leaves out loading the model, but for "
        "\"after a restart\"; that of retrieval has cutting, ranking and reading of the passages in it.",
        "What moved between two reports: `bench/report/compare.py OLD NEW`."])]


def not_run(rows, found, about):
    out = []
    for model in figures.models_of(rows):
        lengths = sorted({r["n_tokens"] for r in figures.costs_of(rows, model)})
        done = {f["row"][5:] for f in of(found, model, "quality") if f["row"].startswith("task ")}
        want = sorted(t for names in tasks.KINDS.values() for t in names if t != "lm_nll")
        out.append("`%s`: costs at %s tokens; tasks without an answer here: %s." % (
            short(model), ", ".join(plots.size(n) for n in lengths) or "no length",
            ", ".join(t for t in want if t not in done) or "none"))
    for model, why in about.get("lacking", {}).items():
        out += ["`%s`, %s: %s." % (short(model), name, text) for name, text in why.items()]
    out += about.get("left_out", [])
    failed = [r for r in rows if "error" in r]
    out += ["Failed: %s on %s: %s" % (r["engine"], r["id"], r["error"]) for r in failed[:20]]
    out.append("Contracts as a task of their own (the data folder has none), needles beyond the lengths shown, more than one seed, "
               "a GPU.")
    return [("list", out)]


def all_of(rows, found, about, sources):
    out = head(rows, about) + who(rows, about)
    for model in figures.models_of(rows):
        out += [("h", 2, "Quality, %s" % model)] + quality(found, model) + peer(found, model) + needles(found, model) +\
            likelihood(found, model)
        out += [("h", 2, "Cost, %s" % model)] + costs(rows, found, model)
        out += [("h", 2, "Scale, %s" % model)] + scale.chapter(rows, found, model, sources)
    out += [("h", 2, "Where kvfold is worse")] + worse(found)
    out += [("h", 2, "Other measurements")] + chapter_others.chapter(sources)
    out += [("h", 2, "Video")] + video(others.slug_of(about)) + [("h", 2, "How it was measured")] + method()
    return out + [("h", 2, "What was not run")] + not_run(rows, found, about)
