#!/usr/bin/env python3
"""bench_cuda_table.py - one JSON file and one table from what bench_cuda and cuda_peers measured in a run.

    bench_cuda_table.py RUN_DIR RESULTS_DIR

Reads kernels.json and, if there, peers.json, models.json and device.csv of RUN_DIR; writes <device>.json and <device>.md.

SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import re
import sys


def load(path):
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        return None


def share(row, run):
    if row["bytes"] and run["copy_bytes_s"]:
        return f"{row['bytes'] / row['us'] / 1e3:.0f} GB/s", f"{100e6 * row['bytes'] / row['us'] / run['copy_bytes_s']:.0f} % of copy"
    if row["flop"] and run["product_flop_s"]:
        return f"{row['flop'] / row['us'] / 1e6:.0f} TFLOP/s", f"{100e6 * row['flop'] / row['us'] / run['product_flop_s']:.0f} % of product"
    return "", ""


def main():
    if len(sys.argv) != 3:
        print(__doc__.split("\n\n")[1].strip(), file=sys.stderr)
        return 2
    run_dir, out_dir = sys.argv[1:]
    run, peers = load(os.path.join(run_dir, "kernels.json")), load(os.path.join(run_dir, "peers.json"))
    models = load(os.path.join(run_dir, "models.json"))
    if not run:
        print(f"bench_cuda_table: there is no kernels.json in '{run_dir}'; run bench_cuda first", file=sys.stderr)
        return 1
    device = ""
    if os.path.exists(os.path.join(run_dir, "device.csv")):
        device = open(os.path.join(run_dir, "device.csv")).read().strip()
    best = {}
    for p in (peers or {"rows": []})["rows"]:
        if p["name"] not in best or p["us"] < best[p["name"]]["us"]:
            best[p["name"]] = p
    lines = [f"# {run['device']}", "", "Written by `scripts/gpu_check.sh`. Ratio: best peer's time over ours, of the same run.", ""]
    if device:
        lines += ["```", device, "```", ""]
    lines += ["| what | time | rate | share | best peer | ratio |", "|---|---|---|---|---|---|"]
    for row in run["rows"]:
        rate, part = share(row, run)
        p = best.get(row["name"])
        peer = f"{p['peer']} {p['us']:.1f} us" if p else ""
        ratio = f"{p['us'] / row['us']:.2f}" if p else ""
        lines.append(f"| {row['name']} | {row['us']:.1f} us | {rate} | {part} | {peer} | {ratio} |")
    ours = {row["name"] for row in run["rows"]}
    lines += [f"| {name} | | | | {p['peer']} {p['us']:.1f} us | |" for name, p in best.items() if name not in ours]
    if peers:
        lines += ["", f"Peers: torch {peers['torch']}."]
        lines += [f"Left out: {x['peer']}, {x['name']}: {x['why']}" for x in peers["left_out"]]
    if models:
        lines += ["", "| model | what | value | goal |", "|---|---|---|---|"]
        lines += [f"| {r['model']} | {r['name']} | {r['value']:.4g} {r['unit']} | {r['goal']} |" for r in models["rows"]]
        lines += [""] + [f"Left out: {r['model']}, {r['name']}: {r['why']}" for r in models["left_out"]]
    os.makedirs(out_dir, exist_ok=True)
    stem = os.path.join(out_dir, re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-") or "device")
    with open(stem + ".json", "w") as f:
        json.dump({"kernels": run, "peers": peers, "models": models, "device": device}, f, indent=1)
    with open(stem + ".md", "w") as f:
        f.write("\n".join(lines) + "\n")
    print(f"{stem}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
