"""others.py - what the other benches measured, as figures of the same report.

Reads bench/results/<bench>/*.csv and *.jsonl of all machines; `here` says which are of the report's kind. A figure's
section is the file it comes from, so that figures.csv names the source of each. The rule that matters most: rows of
settings that are no longer there are left out, and rows of earlier defaults carry the name of what they were, by
bench/results/notes.json; the note stands beside the table.

SPDX-License-Identifier: Apache-2.0
"""
import csv
import fnmatch
import functools
import glob
import json
import os
import re

import figures
import program
import stats

RESULTS = os.path.join(program.ROOT, "bench", "results")
# what: (what is good, unit where the file names none)
GOOD = {"read": "high", "read, to be asked": "high", "first": "low", "decode step": "low", "store on disk": "low",
        "peak memory, reading": "low", "peak memory, asking": "low", "lookup share": "low",
        "facts answered": "high"}
CASES = {"pp512": ("reading 512 tokens", "high", "tokens/s"), "pp4096": ("reading 4096 tokens", "high", "tokens/s"),
         "tg0": ("writing at the start", "high", "tokens/s"),
         "tg4096": ("writing after 4096 tokens", "high", "tokens/s"),
         "first": ("process start to first token, 30-token prompt", "low", "s"), "memory": ("peak memory with 4096 tokens", "low", "bytes"),
         "read32k": ("reading 32768 tokens", "high", "tokens/s")}
VARIANTS = {"ours": "infllm", "old": "infllm-before", "ours-t": "infllm, 960 tokens", "paper": "infllm-paper", "paper-t": "infllm-paper, 960 tokens",
            "window": "window", "full": "full"}

# What ran a row, by the first of these that it has.
NAMED_BY = ("variant", "engine", "planner", "method", "policy")


class Source:
    """One file: where it is from, and its figures."""

    def __init__(self, path, rows):
        def of(*names):
            found = [r[n] for r in rows for n in names if r.get(n)]
            return list(dict.fromkeys(found))
        self.name = os.path.relpath(path, RESULTS).replace(os.sep, "/")
        self.bench = self.name.split("/")[0]
        self.commits, self.machines = of("commit", "tree"), of("machine")
        self.newest = max(of("date"), default="")
        self.commands, self.dates = of("command"), sorted(d[:10] for d in of("date"))
        self.loads = sorted(float(v) for v in of("load_before", "load"))
        self.threads, self.head, self.notes, self.figures = of("threads"), "", [], []
        self.here = True


def notes():
    with open(os.path.join(RESULTS, "notes.json"), encoding="ascii") as file:
        return json.load(file)


def notes_of(name):
    """What a reader of that file must know."""
    return [n["why"] for n in notes() if fnmatch.fnmatchcase(name, n["file"]) and not n.get("left_out")]


def renamed(rows, engine_of, note):
    """Rows of what was the default once, under the name of what it was: "called" of the note."""
    called = {VARIANTS.get(k, k): v for k, v in note["called"].items()}

    def one(r):
        name = VARIANTS.get(engine_of(r), engine_of(r))
        return dict(r, **{next(f for f in NAMED_BY if r.get(f)): called[name]}) if name in called else r
    return [one(r) for r in rows]


def without_stale(name, rows, engine_of):
    """(rows, notes): those that notes.json leaves out are gone; a note says how many."""
    said = []
    for note in [n for n in notes() if fnmatch.fnmatchcase(name, n["file"])]:
        if note.get("called"):
            rows, before = renamed(rows, engine_of, note), rows
            said += [note["why"]] if rows != before else []
            continue
        if not note.get("left_out"):
            said.append(note["why"])
            continue
        gone = [r for r in rows if engine_of(r) in note["names"] and
                ("commits" not in note or r.get("commit") in note["commits"])]
        if gone:
            ids = {id(r) for r in gone}
            rows = [r for r in rows if id(r) not in ids]
            said.append("%d rows of %s left out: %s." % (len(gone), ", ".join(sorted({"`%s`" % engine_of(r) for r in gone})),
                                                         note["why"]))
    return rows, said


def name_of(path):
    """A file as notes.json names it: its folder and itself."""
    return "/".join(os.path.abspath(path).split(os.sep)[-2:])


# ---- Readers: rows of a file to figures ----

def groups_of(rows, *fields):
    out = {}
    for r in rows:
        out.setdefault(tuple(r.get(f) for f in fields), []).append(r)
    return out


def speed_long(name, rows):
    return [figures.figure(model, name, tokens, policy, what, stats.spread([float(r["value"]) for r in some]), len(some),
                           GOOD.get(what, ""), unit)
            for (model, policy, what, tokens, unit), some in groups_of(rows, "model", "policy", "what", "tokens", "unit").items()]


def vs_llamacpp(name, rows):
    out = []
    for r in rows:
        case, better, unit = CASES.get(r["case"], (r["case"], "high", ""))
        mine, theirs = ([float(v) for v in r[k].split()] for k in ("kvfold_all", "llama_all"))
        for engine, values in (("kvfold", mine), ("llama.cpp", theirs)):
            out.append(figures.figure(r["model"], name, case, engine, "value", stats.spread(values), len(values), better, unit))
        ratio = stats.ratio(list(zip(mine, theirs)))
        if ratio:
            out.append(figures.figure(r["model"], name, case, "kvfold", "kvfold / llama.cpp", ratio[:3], ratio[3], better, "x"))
    return out


def spread_of(rows, field, scale=1.0):
    return stats.spread([r[field] * scale for r in rows if r.get(field)])


def longcontext(name, rows):
    out = []
    for r in rows:
        r["what"] = r["set"] or r["task"]
    likely, rows = [r for r in rows if "logprob" in r], [r for r in rows if "score" in r]
    for (model, what, length, variant), some in groups_of(likely, "model", "what", "length", "variant").items():
        for title, field in (("log-probability of the answer", "logprob"), ("of its first token", "logprob_first")):
            out.append(figures.figure(model, name, "%s %s" % (what, length or "set"), VARIANTS.get(variant, variant), title,
                                      stats.mean_interval([r[field] for r in some]), len(some), "high"))
    for (model, what, length, variant), some in groups_of(rows, "model", "what", "length", "variant").items():
        def add(figure, value, n, better, unit=""):
            out.append(figures.figure(model, name, "%s %s" % (what, length or "set"), VARIANTS.get(variant, variant), figure,
                                      value, n, better, unit))
        add("score", stats.mean_interval([r["score"] for r in some]), len(some), "high")
        for title, field, scale, better, unit in (("first token", "ttft_ms", 1e-3, "low", "s"),
                                                  ("writing", "decode_tps", 1, "high", "tokens/s")):
            value = spread_of(some, field, scale)
            if value:
                add(title, value, sum(1 for r in some if r.get(field)), better, unit)
    return out


def lazyllm(name, rows):
    out = []
    for (model, group), of_group in groups_of(rows, "model", "group").items():
        base = {r["id"]: r for r in of_group if r["variant"] == "dense"}
        for (variant,), some in groups_of(of_group, "variant").items():
            def add(figure, value, n, better, unit=""):
                if value:
                    out.append(figures.figure(model, name, group, variant, figure, value, n, better, unit))
            both = [(r, base[r["id"]]) for r in some if r["id"] in base]
            add("score", stats.mean_interval([r["score"] for r in some]), len(some), "high")
            add("tokens computed, average layer", stats.spread([100 * r["read_share"] for r in some]), len(some), "low", "%")
            if variant == "dense" or not both:
                continue
            add("score less dense", stats.mean_interval([r["score"] - b["score"] for r, b in both]), len(both), "high")
            for title, field in (("first token, times as fast", "ttft_ms"), ("whole answer, times as fast", "total_ms")):
                ratio = stats.ratio([(b[field], r[field]) for r, b in both])
                add(title, ratio and ratio[:3], ratio and ratio[3], "high", "x")
    return out


def merge(name, rows):
    out = []
    for r in rows:
        for figure, field, better, unit in (("time", "ms", "low", "ms"), ("features read", "gb_per_s", "high", "GB/s"),
                                            ("NumPy / this", "numpy_over_it", "high", "x")):
            if r.get(field) and not (r["what"] == "numpy" and field != "ms"):
                out.append(figures.figure("", name, r["type"], r["what"], figure, float(r[field]), 3, better, unit))
    return out


def index(name, rows):
    columns = (("bytes a key", "bytes_per_key", "low", ""), ("one query", "one_query_ms", "low", "ms"),
               ("30 queries", "30_queries_ms", "low", "ms"), ("recall of 16, a head", "recall16_head", "high", ""),
               ("recall of 16, one set", "recall16_set", "high", ""), ("build", "build_s", "low", "s"))
    return [figures.figure("", name, "%s, %s tokens" % (r["keys"], r["tokens"]), r["method"], figure, float(r[field]), 10, better,
                           unit) for r in rows for figure, field, better, unit in columns if r.get(field)]


def video(name, rows):
    out = []
    for (planner, share), some in groups_of(rows, "planner", "share").items():
        for figure, field, better, unit in (("distance", "mean", "low", ""), ("distance, 95th percentile", "p95", "low", ""),
                                            ("relative L2", "rel_l2", "low", ""), ("planning", "plan_ms", "low", "ms")):
            values = [float(r[field]) for r in some if r.get(field)]
            if values:
                value = stats.spread(values) if unit else stats.mean_interval(values)
                out.append(figures.figure("", name, "%g %% kept" % (100 * float(share)), planner, figure, value, len(values),
                                          better, unit))
    return out


def kernels(name, rows):
    """tree: a commit, or it and + where the kernels after it are meant."""
    return [figures.figure(model, name, "%s, %s keys" % (what, keys) if keys else what, kernel, "after" if tree.endswith("+") else "before",
                           stats.spread([float(r["value"]) for r in some]), len(some), "high", some[0]["unit"])
            for (model, what, keys, kernel, tree), some in groups_of(rows, "model", "what", "keys", "kernel", "tree").items()]


READERS = {"speed_long": speed_long, "vs_llamacpp": vs_llamacpp, "longcontext": longcontext, "lazyllm": lazyllm,
           "attn": kernels, "mm": kernels, "merge": merge, "index": index, "video": video}


# ---- Files ----

def rows_of(path):
    """(rows, the comment that begins the file)."""
    with open(path, newline="", encoding="utf-8") as file:
        if path.endswith(".jsonl"):
            return [json.loads(line) for line in file if line.strip()], ""
        head = file.readline()
        if not head.startswith("#"):
            file.seek(0)
            head = ""
        return list(csv.DictReader(file)), head.lstrip("# ").strip()


def engine_of(row):
    return next((row[f] for f in NAMED_BY if row.get(f)), "")


def slug_of(about):
    """The name that results of the report's machine carry."""
    cpu = about.get("machine", {}).get("cpu")
    return program.cpu_slug(cpu) if cpu else program.cpu_slug()


@functools.lru_cache(maxsize=None)
def machine_of(name):
    """The machine that a file of results, or a figure's section, is from: its rows say so, or its name, which has that of a
    report in bench/results."""
    path = os.path.join(RESULTS, name)
    rows = rows_of(path)[0] if os.path.isfile(path) else []
    if rows and rows[0].get("machine"):
        return program.cpu_slug(rows[0]["machine"])
    slugs = [d for d in os.listdir(RESULTS) if os.path.exists(os.path.join(RESULTS, d, "about.json"))]
    # The longest first: one name may be the beginning of another.
    return next((s for s in sorted(slugs, key=len, reverse=True) if re.search(r"-%s(\W|$)" % re.escape(s), os.path.basename(name))), "")


def sources(about):
    """[Source], bench by bench, newest last; files that nothing reads are no source."""
    slug, out = slug_of(about), []
    for bench, reader in READERS.items():
        paths = [p for p in glob.glob(os.path.join(RESULTS, bench, "*")) if p.endswith((".csv", ".jsonl"))]
        # Beside a table of figures, lines are the answers that it counts.
        paths = [p for p in paths if not (p.endswith(".jsonl") and p[:-len("jsonl")] + "csv" in paths)]
        for path in sorted(paths):
            rows, head = rows_of(path)
            source = Source(path, rows)
            rows, source.notes = without_stale(source.name, rows, engine_of)
            source.head, source.figures, source.here = head, reader(source.name, rows), machine_of(source.name) == slug
            if source.figures:
                out.append(source)
    benches = list(READERS)
    return sorted(out, key=lambda s: (benches.index(s.bench), s.newest, s.name))


def is_other(figure):
    """Is it of another bench's file?"""
    return "/" in figure["section"]
