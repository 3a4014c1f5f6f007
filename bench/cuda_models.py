#!/usr/bin/env python3
"""cuda_models.py - whole models on a device: tokens a second, time to a first token, agreement with the CPU, streaming.

    cuda_models.py [--json FILE] [--quick] [--device NAME] [--model FILE]... KVFOLD

KVFOLD is the program. For every model: writing 128 tokens, reading 512, reading 131072 with all of it attended to and
with block memory (as far as the model's context goes), and, of 10 prompts, how many give the same 64 greedy tokens as
the CPU, and how far off its likelihoods of a text are (tolerances of tests/model/test_fixture_logprobs.c). With a store, a question with a pool of a quarter of the text: hit rate, blocks sent for in time, and the same
with half and all of the missing blocks read by the CPU. A figure that cannot be measured is left out with its reason.
Exit code 77 where no model is there, 1 where a figure failed.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

MEMORY = "infllm"
SMALL = ("qwen2.5-coder-0.5b", "gemma-3-270m")
PROMPTS = ("The capital of France is", "def quicksort(items):", "Once upon a time there was", "int main(int argc, char **argv)",
           "The three laws of thermodynamics are", "SELECT name FROM users WHERE", "In the year 1969, people first",
           "To make bread you need", "import numpy as np\n", "The difference between a list and a tuple is")


def cached(name):
    """The file of a known model, if it was fetched."""
    folder = os.path.expanduser("~/.cache/kvfold/models")
    found = [f for f in (os.listdir(folder) if os.path.isdir(folder) else []) if f.startswith(name) and f.endswith(".gguf")]
    return os.path.join(folder, found[0]) if found else None


class Run:
    def __init__(self, program, device, quick):
        self.program, self.device, self.quick = program, device, quick
        self.rows, self.failed = [], []

    def call(self, *args):
        done = subprocess.run([self.program, *args], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}")
        return done.stdout

    def measure(self, model, name, unit, goal, fn):
        try:
            value = fn()
        except (RuntimeError, KeyError, ValueError) as e:
            self.failed.append({"model": model, "name": name, "why": str(e)})
            print(f"{name:52} left out: {e}")
            return None
        row = {"model": os.path.basename(model), "name": name, "unit": unit, "goal": goal, **value}
        self.rows.append(row)
        print(f"{name:52} {row['value']:12.3f} {unit:12} goal: {goal}")
        return row

    def bench(self, model, prompt, gen, policy="full"):
        r = json.loads(self.call("bench", "-m", model, "--device", self.device, "-p", str(prompt), "-n", str(gen), "-r",
                                 "1" if prompt > 4096 or self.quick else "5", "--policy", policy, "--json"))[0]
        return {"value": r["avg_ts"], "stddev": r["stddev_ts"], "kernels": r["kernels"]}

    def first_token(self, model, n, policy):
        r = self.bench(model, n, 0, policy)
        return {"value": n / r["value"], "kernels": r["kernels"]}

    def answer(self, model, device, prompt):
        out = json.loads(self.call("ask", "-m", model, "--device", device, "--raw", "-n", "64", "--ignore-eos", "--temp", "0",
                                   "--json", prompt))
        return out["answer"]

    def agreement(self, model):
        same = [self.answer(model, "cpu", p) == self.answer(model, self.device, p) for p in PROMPTS]
        return {"value": float(sum(same)), "of": len(PROMPTS), "same": same}

    def scores(self, model, device):
        """Of every position of a text: the log-probability of what comes next, and the likeliest token with its own."""
        text = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "data", "engine", "prose.txt")
        lines = [x.split() for x in self.call("perplexity", "-m", model, "--device", device, "--positions", text).splitlines()]
        found = [(float(x[2]), *x[3].split(":")) for x in lines if len(x) == 8 and x[0].isdigit() and ":" in x[3]]
        if not found:
            raise ValueError("no position was scored")
        return [(own, token, float(p)) for own, token, p in found]

    def likelihood(self, model):
        a, b = self.scores(model, "cpu"), self.scores(model, self.device)
        if len(a) != len(b):
            raise ValueError(f"{len(b)} positions, {len(a)} on the CPU")
        nll = [-sum(x[0] for x in s) / len(s) for s in (a, b)]
        return {"value": 100 * abs(nll[1] / nll[0] - 1), "same_top": sum(x[1] == y[1] for x, y in zip(a, b)) / len(a),
                "top_off": sum(abs(x[2] - y[2]) for x, y in zip(a, b)) / len(a)}

    def question(self, model, store, memory, share):
        out = json.loads(self.call("ask", "-m", model, "--device", self.device, "--store", store, "--memory", str(memory),
                                   "--host-share", str(share), "--citations", "0", "-n", "32", "--json", "What is this about?"))
        s = out["stats"]
        return {"value": s["decode_tps"], "hit_rate": s["block_hit_rate"], "moved_bytes": s["block_moved_bytes"],
                "shared": s["n_blocks_shared"], "early": s["n_blocks_early"], "misses": s["n_block_misses"], "ttft_ms": s["ttft_ms"]}


def stream(run, model, folder, info, n):
    """A text of n tokens or so in a store, asked with a pool of a quarter of it (of few layers, a half)."""
    text, store = os.path.join(folder, "text.txt"), os.path.join(folder, "store")
    with open(text, "w") as f:
        for i in range(n // 14):
            f.write(f"Line {i}: the {i * 7919 % 1009}th box holds {i * 104729 % 997} red and {i * 31 % 89} blue stones.\n")
    run.call("ingest", "-m", model, "--device", run.device, "--store", store, "-d", text, "--quiet")
    # A layer's units may lie in as many blocks: of few layers a quarter does not hold them.
    word, part = ("quarter", 4) if info["n_layer"] >= 8 else ("half", 2)
    memory = n * info["kv_bytes_per_token"] // part
    for share in (0, 50, 100):
        goal = "more than with share 0, or it stays off" if share else ""
        row = run.measure(model, f"store, pool of a {word}, host share {share} %", "tokens/s", goal,
                          lambda share=share: run.question(model, store, memory, share))
        if row:
            print(f"    hit rate {row['hit_rate']:.3f}, {row['moved_bytes'] / 1e6:.0f} MB moved, {row['shared']} shared, "
                  f"{row['early']} early, {row['misses']} missed")
        if row and share == 0 and row["early"] + row["misses"] > 0:
            early = {"value": row["early"] / (row["early"] + row["misses"])}
            run.measure(model, "of what would be missed, sent for in time", "share", "0.8", lambda: early)


def one_model(run, model):
    info = json.loads(run.call("inspect", model, "--json"))
    trained = info["n_ctx_train"]
    long = min(4096 if run.quick else 131072, trained)
    print(f"\n{os.path.basename(model)}")
    run.measure(model, "write 128 tokens", "tokens/s", "300 (8B Q4_K_M)", lambda: run.bench(model, 0, 128))
    run.measure(model, "read 512 tokens", "tokens/s", "", lambda: run.bench(model, 512, 0))
    dense = run.measure(model, f"first token after {long}, all of it", "s", "", lambda: run.first_token(model, long, "full"))
    block = run.measure(model, f"first token after {long}, block memory", "s", "0.5 x all of it", lambda: run.first_token(model, long, MEMORY))
    if dense and block:
        run.measure(model, "block memory over all of it", "x", "0.5", lambda: {"value": block["value"] / dense["value"]})
    run.measure(model, "same 64 greedy tokens as the CPU", "of 10", "9", lambda: run.agreement(model))
    row = run.measure(model, "likelihood of a text, off the CPU's", "%", "1", lambda: run.likelihood(model))
    if row:
        print(f"    same likeliest token at {100 * row['same_top']:.1f} % (goal 94), its log-probability off by {row['top_off']:.4f} "
              "(goal 0.1)")
    with tempfile.TemporaryDirectory() as folder:
        try:
            stream(run, model, folder, info, 32768)
        except RuntimeError as e:
            run.failed.append({"model": model, "name": "store", "why": str(e)})
            print(f"{'store':52} left out: {e}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json")
    p.add_argument("--quick", action="store_true", help="short texts, one repetition")
    p.add_argument("--device", default="cuda")
    p.add_argument("--model", action="append", default=[])
    p.add_argument("program")
    a = p.parse_args()
    models = a.model or [f for f in (cached(n) for n in SMALL) if f]
    if not models:
        print("cuda_models: no model is there; give --model FILE.gguf, or fetch one: scripts/fetch_model.py qwen2.5-coder-0.5b --yes", file=sys.stderr)
        return 77
    run = Run(a.program, a.device, a.quick)
    for model in models:
        try:
            one_model(run, model)
        except (RuntimeError, KeyError, ValueError) as e:
            run.failed.append({"model": model, "name": "all", "why": str(e)})
            print(f"cuda_models: {model}: {e}", file=sys.stderr)
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"device": a.device, "rows": run.rows, "left_out": run.failed}, f, indent=1)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
