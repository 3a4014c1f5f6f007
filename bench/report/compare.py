#!/usr/bin/env python3
"""compare.py - two reports, before and after: what moved beyond noise?

    compare.py OLD NEW [--least 0.05] [--cost-least 0.1]

OLD and NEW are figures.csv or the folders that hold it. A figure moved when both intervals are apart (scores: 95 %, of
at least eight questions; costs: least to most, of at least three rounds, on both sides) and the value changed by more
than --least, costs by more than --cost-least. Ratios within a run are compared rather than seconds between runs where both reports have
them: a machine has good and bad hours.

Exit code: 0 nothing got worse, 1 something did, 2 unusable input.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import os
import sys

import figures
import stats

KEY = ("model", "section", "row", "engine", "figure")


def load(path):
    path = os.path.join(path, "figures.csv") if os.path.isdir(path) else path
    try:
        return figures.read_csv(path)
    except (OSError, KeyError, ValueError) as error:
        print("compare.py: %s: %s" % (path, error), file=sys.stderr)
        sys.exit(2)


def is_time(f):
    return f["section"] in ("cost", "ratio") or f["unit"] in ("s", "x")


def comparable(old, new, relative):
    """relative: engines and rows that have ratios in both; their times are then judged by these."""
    if not new["better"] or old["low"] is None or new["low"] is None:
        return False
    if min(old["n"], new["n"]) < (stats.MIN_PAIRS if is_time(new) else stats.MIN_QUESTIONS):
        return False
    seconds = new["section"] == "cost" and new["unit"] in ("s", "tokens/s")
    return not (seconds and (new["model"], new["row"], new["engine"], new["figure"]) in relative)


def in_both(old, new):
    """(model, row, engine, figure) whose ratio to another engine stands in both reports."""
    def of(found):
        return {(f["model"], f["row"], f["engine"], f["figure"].split(" / ")[0]) for f in found if f["section"] == "ratio"}
    return of(old) & of(new)


def moved(old, new, least, cost_least):
    """[(direction, old figure, new figure)] and how many were compared."""
    before, relative = {tuple(f[k] for k in KEY): f for f in old}, in_both(old, new)
    out, n = [], 0
    for f in new:
        o = before.get(tuple(f[k] for k in KEY))
        if not o or not comparable(o, f, relative):
            continue
        n += 1
        interval = [tuple(g[k] for k in ("value", "low", "high")) for g in (o, f)]
        way = stats.moved(interval[0], interval[1], f["better"], cost_least if is_time(f) else least)
        if way:
            out.append((way, o, f))
    return out, n


def words(f):
    return "%s (%s to %s, n %d)" % tuple([figures.number(f[k]) for k in ("value", "low", "high")] + [f["n"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nSPDX")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--least", type=float, default=0.05, help="share by which a score must change (%(default)s)")
    parser.add_argument("--cost-least", type=float, default=0.1, help="and a cost (%(default)s)")
    args = parser.parse_args()
    found, n = moved(load(args.old), load(args.new), args.least, args.cost_least)
    if not n:
        print("compare.py: the reports have no figure in common that can be compared", file=sys.stderr)
        sys.exit(2)
    for way in ("worse", "better"):
        for direction, o, f in found:
            if direction == way:
                print("%s: %s: %s -> %s" % (way, ", ".join(f[k] for k in KEY), words(o), words(f)))
    bad = sum(way == "worse" for way, _, _ in found)
    print("%d figures compared: %d worse, %d better, the rest within noise" % (n, bad, len(found) - bad))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
