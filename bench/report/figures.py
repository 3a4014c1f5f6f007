"""figures.py - rows to figures: everything the report says, as flat records with value, interval and count.

A figure is a dict with the FIELDS below; figures.csv holds all of them, compare.py and readme.py read nothing else.
`low` and `high` are a 95 % interval of a score, and least and most of a time. The rule that matters most: a figure
that compares two engines is made of questions or rounds that both of them ran.

SPDX-License-Identifier: Apache-2.0
"""
import csv
import datetime
import statistics

import engines as eng
import stats

FIELDS = ["model", "section", "row", "engine", "figure", "value", "low", "high", "n", "better", "unit"]
COSTS = {  # figure: (what is good, unit)
    "first_s": ("low", "s"), "second_s": ("low", "s"), "restart_s": ("low", "s"), "read_tps": ("high", "tokens/s"),
    "write_tps": ("high", "tokens/s"), "peak_bytes": ("low", "bytes"), "disk_bytes": ("low", "bytes"),
    "n_computed": ("low", "tokens"), "n_kept": ("low", "tokens"), "joules": ("low", "J")}
RATIOS = ["first_s", "second_s", "restart_s", "write_tps", "peak_bytes"]
BASES = ["full", "llama.cpp"]
ALL, FAST = "all tasks", "fast30"
# Ours, and what each is held against.
PEERS = ["llama.cpp", "llama.cpp+slot", "rag-bm25", "rag-minilm"]
OURS = {"full": PEERS, "infllm": ["full", "window", "keydiff"] + PEERS, "lazyllm": ["full", "snapkv"] + PEERS}
WITHIN = 1.25  # a text of at most this many budgets is read nearly as a whole by everything: it shows nothing


def figure(model, section, row, engine, name, value, n, better="", unit=""):
    """value: a number, or (value, low, high)."""
    v = value if isinstance(value, tuple) else (value, None, None)
    return {"model": model, "section": section, "row": row, "engine": engine, "figure": name, "value": v[0],
            "low": v[1], "high": v[2], "n": n, "better": better, "unit": unit}


def fresh(rows):
    """(rows of today's settings, the newest of each; what was left out, in words). Of an engine, model and budget the
    newest row that names its settings says which they are; rows that name none count."""
    newest, today = {}, {}
    for r in sorted(rows, key=lambda r: r["date"]):
        if r.get("spec") is not None and r.get("n_tokens"):
            today[(r["model"], r["engine"], r["n_tokens"] < eng.FAR)] = r["spec"]
    gone = {}
    for r in sorted(rows, key=lambda r: r["date"]):
        spec = today.get((r["model"], r["engine"], (r.get("n_tokens") or 0) < eng.FAR))
        if r.get("spec") is not None and r["spec"] != spec:
            gone[r["engine"]] = gone.get(r["engine"], 0) + 1
            continue
        newest[(r["kind"], r["model"], r["engine"], r["id"], r.get("round"), r.get("part"))] = r
    return list(newest.values()), ["%d rows of `%s` left out: measured with other settings than its newest row." % (n, engine)
                                   for engine, n in sorted(gone.items())]


def models_of(rows):
    return list(dict.fromkeys(r["model"] for r in rows))


def names_in(rows):
    there = {r["engine"] for r in rows}
    return [n for n in eng.NAMES if n in there]


def answers_of(rows, model):
    """Answers that show something: about texts that do not fit into the budget."""
    return [r for r in rows if r["kind"] == "answer" and r["model"] == model and "score" in r and
            r["n_tokens"] > WITHIN * eng.budget(r["n_tokens"])]


def pairs(rows, engine, base, field):
    """[(engine's, base's)] of the questions or rounds that both ran."""
    theirs = {(r["id"], r.get("part"), r.get("round")): r[field] for r in rows if r["engine"] == base and r.get(field) is not None}
    return [(r[field], theirs[(r["id"], r.get("part"), r.get("round"))]) for r in rows
            if r["engine"] == engine and r.get(field) is not None and
            (r["id"], r.get("part"), r.get("round")) in theirs]


IN_TURN_S = 45 * 60  # a round at one length, with the slowest engine in it; what is further apart did not run in turn


def moment(row):
    return datetime.datetime.fromisoformat(row["date"]).timestamp()


def in_turn(rows, engine, base, field):
    """pairs() of times: only of rows that were measured near each other."""
    when = {(r["engine"], r["id"], r.get("part"), r.get("round")): moment(r) for r in rows if r["engine"] in (engine, base)}
    near = [r for r in rows if r["engine"] == engine and abs(
        moment(r) - when.get((base, r["id"], r.get("part"), r.get("round")), 0)) <= IN_TURN_S]
    return pairs(near + [r for r in rows if r["engine"] == base], engine, base, field)


# ---- Quality ----

def common(rows, names):
    """The rows of the questions that all of `names` answered: their scores can stand in one column."""
    ids = [{r["id"] for r in rows if r["engine"] == n} for n in names]
    both = set.intersection(*ids) if ids else set()
    return [r for r in rows if r["id"] in both and r["engine"] in names]


def scopes_of(mine):
    """(row, answers of the engines that answered all of its questions). fast30 stands alone: it was picked among what
    full attention answers, so it shows losses only."""
    sample, fast = ([r for r in mine if r["part"] == part] for part in ("tasks", "fast"))
    by_task = [(t, [r for r in sample if r["task"] == t]) for t in sorted({r["task"] for r in sample})]
    sample = common(sample, names_in(sample))
    return [(ALL, sample)] + [(g, [r for r in sample if r["group"] == g]) for g in sorted({r["group"] for r in sample})] + [
        ("task " + t, common(some, names_in(some))) for t, some in by_task] + [
        (FAST, common(fast, names_in(fast)))]


def quality(model, rows):
    """Scores over all tasks, by group and by task, and of fast30 (needles have their own grid)."""
    mine, out = [r for r in answers_of(rows, model) if not r["engine"].startswith("llama.cpp")], []
    for row, some in scopes_of(mine):
        names = names_in(some)
        for name in names:
            scores = [r["score"] for r in some if r["engine"] == name]
            if not scores:
                continue
            out.append(figure(model, "quality", row, name, "score", stats.mean_interval(scores), len(scores), "high"))
            both = pairs(some, name, "full", "score")
            share = stats.share_interval(both) if name != "full" else None
            if share:
                out.append(figure(model, "quality", row, name, "share of full", share, len(both), "high"))
            speed = stats.ratio([(b, a) for a, b in in_turn(some, name, "full", "first_s")])
            if speed and name != "full":
                out.append(figure(model, "quality", row, name, "first token, times as fast as full", speed[:3], speed[3],
                                  "high", "x"))
            first = stats.spread([r["first_s"] for r in some if r["engine"] == name])
            out.append(figure(model, "quality", row, name, "first_s", first, len(scores), "low", "s"))
            for field in ("n_computed", "n_kept"):
                out.append(figure(model, "quality", row, name, field,
                                  stats.mean([r[field] for r in some if r["engine"] == name]), len(scores), "low", "tokens"))
    return out


def paired(model, rows):
    """Differences of scores, question by question: what a comparison of two engines rests on."""
    mine, out = answers_of(rows, model), []
    for row, some in scopes_of([r for r in mine if not r["engine"].startswith("llama.cpp")]):
        for name, others in OURS.items():
            for other in others:
                both = pairs(some, name, other, "score")
                if row.startswith("task ") or len(both) < stats.MIN_QUESTIONS:
                    continue
                out.append(figure(model, "paired", row, name, "score less %s" % other,
                                  stats.mean_interval([a - b for a, b in both]), len(both)))
                for what, n in (("wins", sum(a > b for a, b in both)), ("losses", sum(a < b for a, b in both))):
                    out.append(figure(model, "paired", row, name, "%s against %s" % (what, other), n, len(both)))
    return out


def same_as_llama(model, rows):
    """Does our full attention answer as llama.cpp does? Over all texts, short ones too."""
    mine = [r for r in rows if r["kind"] == "answer" and r["model"] == model and "score" in r]
    both, out = pairs(mine, "full", "llama.cpp", "score"), []
    if both:
        out.append(figure(model, "peer", ALL, "full", "score", stats.mean_interval([a for a, _ in both]), len(both), "high"))
        out.append(figure(model, "peer", ALL, "llama.cpp", "score", stats.mean_interval([b for _, b in both]), len(both),
                          "high"))
        texts = pairs(mine, "full", "llama.cpp", "prediction")
        out.append(figure(model, "peer", ALL, "full", "same words as llama.cpp",
                          stats.mean([float(a.strip() == b.strip()) for a, b in texts]), len(texts), "high"))
        speed = stats.ratio([(b, a) for a, b in in_turn(mine, "full", "llama.cpp", "first_s")])
        if speed:
            out.append(figure(model, "peer", ALL, "full", "first token, times as fast as llama.cpp", speed[:3], speed[3],
                              "high", "x"))
    return out


def needle_grid(model, rows):
    mine, out = [r for r in answers_of(rows, model) if r["part"] == "needles"], []
    for task in sorted({r["task"] for r in mine}):
        for name in names_in(mine):
            some = [r for r in mine if r["task"] == task and r["engine"] == name]
            for length in sorted({r["length"] for r in some}):
                for depth in sorted({r["depth"] for r in some if r["length"] == length}):
                    cell = [r["score"] for r in some if r["length"] == length and r["depth"] == depth]
                    out.append(figure(model, "needle", "%s %d at %g" % (task, length, depth), name, "score",
                                      stats.mean(cell), len(cell), "high"))
                all_depths = [r["score"] for r in some if r["length"] == length]
                out.append(figure(model, "needle", "%s %d" % (task, length), name, "score",
                                  stats.mean_interval(all_depths), len(all_depths), "high"))
    return out


def likelihood(model, rows):
    """Negative log-likelihood, and how much higher than full attention's on the same texts: of texts below and from FAR
    tokens apart, since the budget changes there."""
    mine = [r for r in rows if r["kind"] == "likelihood" and r["model"] == model and "nll" in r and
            r["n_tokens"] > WITHIN * eng.budget(r["n_tokens"])]
    out = []
    for row, some in ((ALL, mine), ("below 8K", [r for r in mine if r["n_tokens"] < eng.FAR]),
                      ("from 8K on", [r for r in mine if r["n_tokens"] >= eng.FAR])):
        for name in names_in(some):
            both = pairs(some, name, "full", "nll")
            if both:
                out.append(figure(model, "likelihood", row, name, "nll", stats.mean_interval([a for a, _ in both]), len(both),
                                  "low", "nats"))
                out.append(figure(model, "likelihood", row, name, "nll above full",
                                  stats.mean_interval([a - b for a, b in both]), len(both), "low", "nats"))
    return out


# ---- Cost ----

def costs_of(rows, model):
    return [r for r in rows if r["kind"] == "cost" and r["model"] == model and "error" not in r]


def cost(model, rows):
    mine, out = costs_of(rows, model), []
    for n_tokens in sorted({r["n_tokens"] for r in mine}):
        at = [r for r in mine if r["n_tokens"] == n_tokens]
        for name in names_in(at):
            some = [r for r in at if r["engine"] == name]
            for field, (better, unit) in COSTS.items():
                values = [r[field] for r in some if r.get(field) is not None]
                if values:
                    out.append(figure(model, "cost", str(n_tokens), name, field, stats.spread(values), len(values), better,
                                      unit))
            for base in BASES:
                if base != name:
                    out += cost_ratios(model, at, n_tokens, name, base)
    return out


def cost_ratios(model, at, n_tokens, name, base):
    """engine / base of the same round; nothing from fewer than three rounds."""
    out = []
    for field in RATIOS:
        found = stats.ratio(in_turn(at, name, base, field))
        if found:
            out.append(figure(model, "ratio", str(n_tokens), name, "%s / %s" % (field, base), found[:3], found[3],
                              COSTS[field][0], "x"))
    return out


def cost_points(rows, model, engine, field):
    """[(tokens, median, least, most)]."""
    mine, out = [r for r in costs_of(rows, model) if r["engine"] == engine and r.get(field)], []
    for n in sorted({r["n_tokens"] for r in mine}):
        out.append((n,) + stats.spread([r[field] for r in mine if r["n_tokens"] == n]))
    return out


READERS = {"first_s": ("low", "s"), "slowest_s": ("low", "s"), "all_tps": ("high", "tokens/s"), "rss_bytes": ("low", "bytes"),
           "pss_bytes": ("low", "bytes"), "all_pss_bytes": ("low", "bytes"), "same": ("high", ""), "correct": ("high", "")}


def readers(model, rows):
    """Several processes that ask one store at the same time; a row of the figures is "tokens x processes"."""
    mine, out = [r for r in rows if r["kind"] == "readers" and r["model"] == model and "error" not in r], []
    for key in sorted({(r["n_tokens"], r["n_readers"]) for r in mine}):
        some = [r for r in mine if (r["n_tokens"], r["n_readers"]) == key]
        for field, (better, unit) in READERS.items():
            values = [r[field] for r in some if r.get(field) is not None]
            if values:
                out.append(figure(model, "readers", "%d x %d" % key, some[0]["engine"], field, stats.spread(values), len(values),
                                  better, unit))
    return out


def is_busy(load, threads):
    """Was there other work beside the engine's own threads?"""
    return load > threads + 0.5


def everything(rows):
    loads = stats.spread([r["load"] for r in rows])
    out = [figure("", "run", "all", "", "load of the machine", loads, len(rows))] if loads else []
    threads = stats.spread([r["threads"] for r in rows if r.get("threads")])
    out += [figure("", "run", "all", "", "threads", threads, len(rows))] if threads else []
    for model in models_of(rows):
        for make in (quality, paired, same_as_llama, needle_grid, likelihood, cost, readers):
            out += make(model, rows)
    return out


# ---- Where kvfold is worse than something else ----

def worse(found):
    """[(figure of ours, figure of the other)] where the other is ahead beyond noise."""
    index = {(f["model"], f["section"], f["row"], f["engine"], f["figure"]): f for f in found}
    return worse_scores(found, index) + worse_likelihoods(found, index) + worse_costs(found, index)


def worse_likelihoods(found, index):
    above = [f for f in found if f["section"] == "likelihood" and f["figure"] == "nll above full" and f["engine"] in OURS]
    return [tuple(index[(f["model"], "likelihood", f["row"], e, "nll")] for e in (f["engine"], "full"))
            for f in above if f["engine"] != "full" and f["low"] > 0 and f["n"] >= stats.MIN_QUESTIONS]


def worse_scores(found, index):
    out = []
    for f in found:
        if f["section"] == "paired" and f["low"] is not None and f["high"] < 0:
            other = f["figure"].replace("score less ", "")
            out.append(tuple(index[(f["model"], "quality", f["row"], e, "score")] for e in (f["engine"], other)))
    for f in found:
        if f["section"] != "needle" or f["low"] is None or f["n"] < stats.MIN_QUESTIONS:
            continue
        for other in OURS.get(f["engine"], []):
            o = index.get((f["model"], "needle", f["row"], other, f["figure"]))
            if o and o["low"] is not None and is_apart(o, f) == "worse":
                out.append((f, o))
    return out


def worse_costs(found, index):
    out = []
    for f in found:
        if f["section"] != "cost" or f["figure"] not in RATIOS + ["disk_bytes"] or f["n"] < stats.MIN_PAIRS:
            continue
        for other in OURS.get(f["engine"], []):
            o = index.get((f["model"], "cost", f["row"], other, f["figure"]))
            if o and o["n"] >= stats.MIN_PAIRS and is_apart(o, f) == "worse":
                out.append((f, o))
    return out


def is_apart(old, new):
    """'better', 'worse' or None, of new against old."""
    return stats.moved(*(tuple(f[k] for k in ("value", "low", "high")) for f in (old, new)), new["better"])


# ---- Files ----

def number(value):
    return "" if value is None else "%.6g" % value


def write_csv(path, found):
    with open(path, "w", newline="", encoding="ascii") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for f in found:
            writer.writerow([number(f[k]) if k in ("value", "low", "high") else f[k] for k in FIELDS])


def read_csv(path):
    with open(path, newline="", encoding="ascii") as file:
        out = list(csv.DictReader(file))
    for f in out:
        for k in ("value", "low", "high"):
            f[k] = float(f[k]) if f[k] else None
        f["n"] = int(f["n"])
    return out


def median_load(rows):
    loads = [r["load"] for r in rows]
    return (statistics.median(loads), max(loads)) if loads else (0.0, 0.0)
