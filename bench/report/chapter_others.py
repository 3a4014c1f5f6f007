"""chapter_others.py - the report's chapter of what the other benches measured: a table for each of their files.

The rule that matters most: each table says which file, commit, machine and how many, so that every figure of README.md
and docs/ can be followed to its rows.

SPDX-License-Identifier: Apache-2.0
"""
import plots
from words import score, unique, with_unit

TITLES = {"vs_llamacpp": "Speed beside llama.cpp", "speed_long": "Long documents in a store",
          "longcontext": "Answers from long texts", "lazyllm": "Pruning tokens between layers",
          "attn": "Prefill attention, single kernels", "mm": "Products with weights, single kernels",
          "index": "Finding blocks: votes beside FAISS", "merge": "Merging a video's tokens",
          "video": "What planners leave of a video"}
# Which field goes down and which across; the rest stand in the cells.
SHAPES = {"vs_llamacpp": (("row",), ("engine", "figure")), "speed_long": (("engine", "figure"), ("row",)),
          "longcontext": (("row", "engine"), ("figure",)), "lazyllm": (("row", "engine"), ("figure",)),
          "attn": (("row", "engine"), ("figure",)), "mm": (("row", "engine"), ("figure",)),
          "index": (("row", "engine"), ("figure",)), "merge": (("row", "engine"), ("figure",)),
          "video": (("row", "engine"), ("figure",))}


def cell(f):
    if not f:
        return ""
    if f["figure"] in ("score", "score less dense"):
        return score(f) if f["figure"] == "score" else "%+.2f (%+.2f to %+.2f)" % (f["value"], f["low"], f["high"])
    return with_unit(f)


def count(found):
    ns = sorted({f["n"] for f in found})
    return "%d" % ns[0] if len(ns) == 1 else "%d to %d" % (ns[0], ns[-1])


def title_of(key):
    """A column's name: its figure, or its engine where the figure is the value itself; lengths short."""
    text = key[-1] if key[-1] != "value" else key[0]
    return plots.size(int(text)) if text.isdigit() else text


def head_of(fields, across):
    names = {"row": "of", "engine": "what", "figure": "figure"}
    return [names[f] for f in fields] + [title_of(key) for key in across]


def table(found, bench):
    down, over = SHAPES[bench]
    lines, across = {}, unique(tuple(f[k] for k in over) for f in found)
    for f in found:
        lines.setdefault(tuple(f[k] for k in down), {})[tuple(f[k] for k in over)] = f
    rows = [list(key) + [cell(cells.get(k)) for k in across] + [count(cells.values())] for key, cells in lines.items()]
    return ("table", head_of(down, across) + ["n"], rows)


def where_from(source):
    counts = sorted({str(n) for n in source.threads})
    threads = ", %s thread%s" % (" or ".join(counts), "" if counts == ["1"] else "s") if counts else ""
    words = ["`bench/results/%s`" % source.name, ", ".join(source.machines) + threads if source.machines else "",
             "commit %s" % ", ".join(source.commits) if source.commits else "", ", ".join(sorted(set(source.dates)))]
    if source.loads:
        words.append("load %.1f to %.1f before a run" % (source.loads[0], source.loads[-1]))
    text = "; ".join(w for w in words if w) + "."
    if source.head:
        text += " %s." % source.head
    return " ".join([text] + source.notes + ["`%s`" % c for c in source.commands[:3]])


def of_source(source):
    out = [("p", where_from(source))]
    for model in unique(f["model"] for f in source.figures):
        if model:
            out.append(("p", "`%s`:" % model))
        out.append(table([f for f in source.figures if f["model"] == model], source.bench))
    return out


def chapter(sources):
    if not sources:
        return [("p", "**None** in `bench/results/`.")]
    out = [("p", "Runs of the other benches, each by its own command, on the machine, at the hour and at the commit that are named; "
            "not all are of this report's machine: compare within a table, not between tables. A cell is the median with least and most; of a score "
            "the mean with its 95 % interval; n: how many values a cell is made of. A ratio is of pairs in turn, three at "
            "least. README.md takes its figures from here and from the chapters above.")]
    for bench, title in TITLES.items():
        mine = [s for s in sources if s.bench == bench]
        if mine:
            out.append(("h", 3, title))
        for source in mine:
            out += of_source(source)
    return out
