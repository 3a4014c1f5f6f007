#!/usr/bin/env python3
"""run.py - how much real clips repeat themselves, and what each planner loses by leaving it out.

    run.py [--data DIR] [--kvfold PROGRAM] [--frames 32] [--out STEM] [--clips NAME,...]

DIR (or $KVFOLD_DATA) holds clips, or a folder `video` with clips; without one this prints SKIP. Features are the
program's training-free ones, made once a clip; scores there are none, so planners that want some take their
documented substitute. Rows named "spread scores" are given scores that look at nothing and spread over space and
time (a low-discrepancy sequence): what they gain over the substitute is what the choice of scores is worth here. Per clip, planner and share kept: how many tokens are left, and how far the input is from
them:

  mean, p95   1 - cosine of each input token with the nearest token left
  rel. L2     sum |x - nearest|^2 / sum |x - mean|^2, by Euclidean distance

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import csv
import json
import os
import re
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "longcontext"))
import program  # noqa: E402
from program import say  # noqa: E402

SHARES = [0.10, 0.20, 0.25]
TAUS = [0.65, 0.8, 0.9]
# name, spec with %g for the share
PLANNERS = [
    ("holitom", "holitom:ratio=%g"),
    ("holitom, noscore=segment", "holitom:noscore=segment,ratio=%g"),
    ("holitom, drift=0.8", "holitom:drift=0.8,ratio=%g"),
    ("holitom, tau=0.65", "holitom:tau=0.65,ratio=%g"),
    ("holitom, merge=mean", "holitom:merge=mean,ratio=%g"),
    ("holitom, mode=official", "holitom:mode=official,ratio=%g"),
    ("holitom, spread scores", "holitom:ratio=%g"),
    ("fastvid", "fastvid:ratio=%g"),
    ("visionzip", "visionzip:ratio=%g"),
    ("visionzip, context=mean", "visionzip:context=mean,ratio=%g"),
    ("visionzip, spread scores", "visionzip:ratio=%g"),
    ("evs", "evs:ratio=%g"),
    ("uniform", "uniform:ratio=%g"),
]
# Those that have no share: what comes closest.
FIXED = {0.10: [("pool_time, k=10", "pool_time:k=10"), ("sample_time, s=10", "sample_time:s=10")],
         0.20: [("pool_time, k=5", "pool_time:k=5"), ("sample_time, s=5", "sample_time:s=5")],
         0.25: [("pool_time, k=4", "pool_time:k=4"), ("pool_space, p=2", "pool_space:p=2"),
                ("sample_time, s=4", "sample_time:s=4")]}
FIELDS = ["date", "machine", "commit", "clip", "frames", "planner", "spec", "share", "tokens_in", "tokens_out", "segments",
          "mean", "p95", "rel_l2", "owner_mean", "owner_share", "plan_ms", "command"]


def call(kvfold, *args):
    r = subprocess.run([kvfold, "video", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if r.returncode:
        sys.exit("run.py: kvfold video %s: %s" % (" ".join(args), r.stderr.decode().strip()))
    return json.loads(r.stdout) if r.stdout.startswith(b"{") else None


def as_frames(path, n_frame):
    """The [T * N, D] array of a plan that keeps everything, as [T, N, D]: another header, the same data."""
    with open(path, "rb") as f:
        data = f.read()
    n, = struct.unpack_from("<H", data, 8)
    rows, dim = (int(v) for v in re.search(rb"\((\d+), (\d+)\)", data[10:10 + n]).groups())
    head = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d, %d), }" % (n_frame, rows // n_frame, dim)
    head += " " * (-(11 + len(head)) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + data[10 + n:])
    return path


def spread_scores(path, n_frame, side):
    """A low-discrepancy sequence over column, row and frame (steps are powers of 1 / 1.2207)."""
    values = [(x * 0.8191725134 + y * 0.6710436067 + t * 0.5497004779) % 1
              for t in range(n_frame) for y in range(side) for x in range(side)]
    head = "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }" % (n_frame, side * side)
    head += " " * (-(11 + len(head)) % 64) + "\n"
    with open(path, "wb") as f:
        f.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + struct.pack("<%df" % len(values), *values))
    return path


def find_clips(folder, only):
    inner = os.path.join(folder, "video")
    folder = inner if os.path.isdir(inner) else folder
    names = sorted(n for n in os.listdir(folder) if n.endswith((".mp4", ".mkv", ".webm", ".avi")))
    return [os.path.join(folder, n) for n in names if not only or n in only or os.path.splitext(n)[0] in only]


def measure(args, clips):
    head = {"date": program.today(), "machine": program.cpu_name(), "commit": program.commit(),
            "command": program.command_line(sys.argv)}
    rows, found = [], []
    with tempfile.TemporaryDirectory(prefix="kvfold-bench-") as scratch:
        for clip in clips:
            name, out = os.path.basename(clip), os.path.join(scratch, "all")
            say(name)
            r = call(args.kvfold, clip, "--features-from", "dctctx", "--frames", str(args.frames), "--merge", "uniform:ratio=1",
                     "-o", out, "--json")
            features = as_frames(out + ".tokens.npy", r["features"]["n_frames"])
            scores = spread_scores(os.path.join(scratch, "s.npy"), r["features"]["n_frames"], r["features"]["grid_width"])
            base = dict(head, clip=name, frames=r["features"]["n_frames"])
            for tau in TAUS:
                p = call(args.kvfold, "--features", features, "--merge", "holitom:tau=%g" % tau, "--json")["plan"]
                single = sum(s["first"] == s["last"] for s in p["segments"])
                found.append({"clip": name, "tau": tau, "reduced": p["total_reduced"] / p["n_in"], "segments": p["n_segments"],
                              "single": single, "frames": base["frames"], "seconds": r["clip"]["seconds"]})
            for share in SHARES:
                for planner, spec in [(n, s % share) for n, s in PLANNERS] + FIXED[share]:
                    more = ["--scores", scores] if "spread" in planner else []
                    q = call(args.kvfold, "--features", features, "--merge", spec, "--quality", "--json", *more)
                    p, e = q["plan"], q["quality"]
                    rows.append(dict(base, planner=planner, spec=spec, share=share, tokens_in=p["n_in"], tokens_out=p["n_out"],
                                     segments=p["n_segments"], mean=round(e["nearest_mean"], 5), p95=round(e["nearest_p95"], 5),
                                     rel_l2=round(e["squared_error"], 5), owner_mean=round(e["owner_mean"], 5),
                                     owner_share=round(e["owner_share"], 5), plan_ms=round(p["plan_ms"], 3)))
    return rows, found


def average(values):
    return sum(values) / len(values)


def redundancy_table(found):
    lines = ["## Redundancy that HoliTom's segmentation finds", "",
             "Share of the tokens that goes when each position that stands still is kept once a segment; in brackets segments,",
             "of them of one frame.", "",
             "| clip | s | frames | " + " | ".join("tau %g" % t for t in TAUS) + " |", "|---|---|---|" + "---|" * len(TAUS)]
    for clip in dict.fromkeys(f["clip"] for f in found):
        mine = {f["tau"]: f for f in found if f["clip"] == clip}
        first = mine[TAUS[0]]
        cells = ["%.1f %% (%d, %d)" % (100 * mine[t]["reduced"], mine[t]["segments"], mine[t]["single"]) for t in TAUS]
        lines.append("| %s | %.1f | %d | %s |" % (clip, first["seconds"], first["frames"], " | ".join(cells)))
    mean = ["%.1f %%" % (100 * average([f["reduced"] for f in found if f["tau"] == t])) for t in TAUS]
    return lines + ["| **mean** | | | " + " | ".join(mean) + " |", ""]


def planner_table(rows, share):
    mine = [r for r in rows if r["share"] == share]
    names = list(dict.fromkeys(r["planner"] for r in mine))
    exact = {n: all(r["tokens_out"] == int(share * r["tokens_in"] + 1e-9) for r in mine if r["planner"] == n) for n in names}

    def of(name, key):
        return average([r[key] for r in mine if r["planner"] == name])

    lines = ["## %g %% reduction" % (100 - 100 * share), "",
             "| planner | kept | exact | mean | p95 | rel. L2 | best of the clips | plan ms |", "|---|---|---|---|---|---|---|---|"]
    best = {}
    for clip in {r["clip"] for r in mine}:
        winner = min((r for r in mine if r["clip"] == clip and exact[r["planner"]]), key=lambda r: r["mean"])
        best[winner["planner"]] = best.get(winner["planner"], 0) + 1
    for name in sorted(names, key=lambda n: of(n, "mean")):
        kept = 100 * average([r["tokens_out"] / r["tokens_in"] for r in mine if r["planner"] == name])
        lines.append("| %s | %.1f %% | %s | %.4f | %.4f | %.4f | %s | %.2f |" % (
            name, kept, "yes" if exact[name] else "no", of(name, "mean"), of(name, "p95"), of(name, "rel_l2"),
            best.get(name, ""), of(name, "plan_ms")))
    return lines + [""]


def clip_table(rows, share):
    mine = [r for r in rows if r["share"] == share]
    names = ["holitom", "holitom, spread scores", "fastvid", "visionzip", "evs", "uniform"]
    lines = ["## Clip by clip, %g %% reduction" % (100 - 100 * share), "", "Mean distance to the nearest token left.", "",
             "| clip | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for clip in dict.fromkeys(r["clip"] for r in mine):
        value = {r["planner"]: r["mean"] for r in mine if r["clip"] == clip}
        low = min(value[n] for n in names)
        cells = [("**%.4f**" if value[n] == low else "%.4f") % value[n] for n in names]
        lines.append("| %s | %s |" % (clip, " | ".join(cells)))
    return lines + [""]


def write(args, rows, found):
    stem = args.out
    with open(stem + ".csv", "w", newline="", encoding="ascii") as f:
        w = csv.DictWriter(f, FIELDS, lineterminator="\n")
        w.writeheader()
        w.writerows(rows)
    clips = len({r["clip"] for r in rows})
    lines = ["# What planners leave of real clips", "",
             "%s, commit %s; %d clips, training-free features (dctctx), no attention scores; distances are 1 - cosine." % (
                 rows[0]["machine"], rows[0]["commit"], clips), "", "    " + rows[0]["command"], ""]
    lines += redundancy_table(found)
    lines += ["Mean over the clips of what follows: how far an input token is from the nearest token left (mean and 95th",
              "percentile of 1 - cosine), and the squared error relative to the variance. `exact`: the count is the one asked for,",
              "on every clip; `best of the clips`: clips on which no other exact planner has a smaller mean.", ""]
    for share in SHARES:
        lines += planner_table(rows, share)
    lines += clip_table(rows, SHARES[0])
    with open(stem + ".md", "w", encoding="ascii") as f:
        f.write("\n".join(lines).rstrip() + "\n")
    say(stem + ".md")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", default=os.environ.get("KVFOLD_DATA"))
    p.add_argument("--kvfold", default=os.path.join(HERE, "..", "..", "build", "tools", "kvfold"))
    p.add_argument("--frames", type=int, default=32)
    p.add_argument("--clips", default="")
    p.add_argument("--out", default=os.path.join(HERE, "..", "results", "video", "%s-%s" % (program.today(), program.cpu_slug())))
    args = p.parse_args()
    clips = find_clips(args.data, [c for c in args.clips.split(",") if c]) if args.data and os.path.isdir(args.data) else []
    if not clips:
        print("SKIP: no clips; give --data DIR or set KVFOLD_DATA")
        return
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    write(args, *measure(args, clips))


if __name__ == "__main__":
    main()
