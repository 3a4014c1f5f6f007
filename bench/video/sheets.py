#!/usr/bin/env python3
"""sheets.py - contact sheets: which tokens of a clip each planner keeps.

    sheets.py [--kvfold PROGRAM] [--out FOLDER]

A sheet is a PNG: a row a planner, a column a frame; what is left out is dark, what is kept is clear, merged tokens are
blue. The clips are made here out of arithmetic (a square over a picture that stands still and changes once; a camera
that moves slowly over a field of blocks), so a sheet may be committed. Needs the program ffmpeg.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "longcontext"))
import program  # noqa: E402

WIDE, HIGH, N_FRAME, FPS = 112, 112, 48, 8
SHOWN, GAP = 12, 4
PLANNERS = [("holitom", "holitom:ratio=0.1"), ("uniform", "uniform:ratio=0.1"), ("visionzip", "visionzip:ratio=0.1"),
            ("evs", "evs:ratio=0.1")]


# ---- Clips ----

def still(n, x, y):
    """A picture that stands still, another one from the middle on; a square walks over it."""
    left = 4 + n % (N_FRAME // 2) * 4
    if left <= x < left + 18 and 60 <= y < 78:
        return 250, 220, 60
    if n < N_FRAME // 2:
        return 40 + x, 60 + y, 120
    return 220 - y, 90, 60 + (x * y) % 64


def pan(n, x, y):
    """Blocks under a camera that moves to the right and stops."""
    x += min(n, 32) * 3
    shade = 60 + 150 * (math.sin((x // 24) * 12.9898 + (y // 24) * 78.233) * 43758.5453 % 1.0)
    return int(shade), int(shade * 0.8), int(255 - shade)


CLIPS = {"still": still, "pan": pan}


def frames_of(pixel):
    return [bytes(c for y in range(HIGH) for x in range(WIDE) for c in pixel(n, x, y)) for n in range(N_FRAME)]


def write_clip(path, frames):
    size = "%dx%d" % (WIDE, HIGH)
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(FPS), "-i", "-",
                    "-c:v", "ffv1", "-pix_fmt", "bgr0", path], input=b"".join(frames), check=True)


# ---- Plans ----

def kept(kvfold, clip, spec, folder):
    """(JSON of the plan, frame -> place -> kind: 0 merged, 1 copied)."""
    out = os.path.join(folder, "plan")
    r = subprocess.run([kvfold, "video", clip, "--features-from", "dctctx", "--frames", str(SHOWN), "--merge", spec, "-o", out,
                        "--json", "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if r.returncode:
        raise program.Failure("kvfold video: %s" % r.stderr.decode().strip())
    with open(out + ".meta.npy", "rb") as file:
        data = file.read()
    head, = struct.unpack_from("<H", data, 8)
    places = {}
    for segment, kind, frame, place in struct.iter_unpack("<4i", data[10 + head:]):
        del segment
        if place >= 0:
            places.setdefault(frame, {})[place] = kind
    return json.loads(r.stdout), places


# ---- Pictures ----

def shade(frame, places, side):
    """The frame, rows of RGB: tokens that are gone dark, merged ones blue."""
    rows = []
    for y in range(HIGH):
        row = bytearray(frame[3 * WIDE * y:3 * WIDE * (y + 1)])
        for x in range(WIDE):
            kind = places.get((y * side // HIGH) * side + x * side // WIDE)
            if kind is None:
                row[3 * x:3 * x + 3] = bytes(v // 5 for v in row[3 * x:3 * x + 3])
            elif kind == 0:
                row[3 * x:3 * x + 3] = bytes((row[3 * x] // 2 + 20, row[3 * x + 1] // 2 + 60, row[3 * x + 2] // 2 + 115))
        rows.append(bytes(row))
    return rows


def png(path, rows, wide):
    """8-bit RGB with 32 levels a colour: the clips have few, and the file stays small."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    raw = b"".join(b"\0" + bytes(v & 0xf8 for v in row) for row in rows)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", wide, len(rows), 8, 2, 0, 0, 0)) +
                   chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b""))


def sheet(pictures):
    """[[rows of RGB]] of planners and frames, set beside and below each other on white."""
    out, white = [], b"\xff" * 3 * GAP
    for line in pictures:
        out += [white.join(picture[y] for picture in line) for y in range(HIGH)]
        out += [b"\xff" * len(out[-1])] * GAP
    return out[:-GAP]


def make(kvfold, name, folder):
    """One sheet and what it says: {clip, frames, tokens, rows: [{planner, spec, kept, of}]}."""
    frames = frames_of(CLIPS[name])
    with tempfile.TemporaryDirectory() as scratch:
        clip = os.path.join(scratch, name + ".mkv")
        write_clip(clip, frames)
        plans = [(title, spec) + kept(kvfold, clip, spec, scratch) for title, spec in PLANNERS]
    times = plans[0][2]["clip"]["times"]
    side = plans[0][2]["features"]["grid_width"]
    shown = [frames[min(N_FRAME - 1, round(t * FPS))] for t in times]
    plain = [[f[3 * WIDE * y:3 * WIDE * (y + 1)] for y in range(HIGH)] for f in shown]
    lines = [plain] + [[shade(f, places.get(i, {}), side) for i, f in enumerate(shown)] for _, _, _, places in plans]
    rows = sheet(lines)
    png(os.path.join(folder, "sheet-%s.png" % name), rows, len(rows[0]) // 3)
    return {"clip": name, "frames": len(times), "rows": [{"planner": title, "spec": plan["plan"]["spec"], "kept": plan["plan"]["n_out"],
                                                         "merged": plan["plan"]["n_merged"], "of": plan["plan"]["n_in"]}
                                                        for title, _, plan, _ in plans]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nSPDX")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvfold", help="the program (build/tools/kvfold)")
    parser.add_argument("--out", default=os.path.join(program.ROOT, "bench", "results", "video"))
    args = parser.parse_args()
    kvfold = program.find_program(args.kvfold)
    said = {"commit": program.commit(), "sheets": [make(kvfold, name, args.out) for name in CLIPS]}
    with open(os.path.join(args.out, "sheets.json"), "w", encoding="ascii") as file:
        json.dump(said, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    try:
        main()
    except program.Failure as failure:
        sys.exit("sheets.py: %s" % failure)
