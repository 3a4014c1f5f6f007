#!/usr/bin/env python3
"""llama_runner.py - what llama.cpp does on one case, through the bindings of llama-cpp-python.

Run by run.py in a process of its own, with an interpreter that has llama-cpp-python. Prints one
JSON array of objects like those of `kvfold bench --json`. A case with a depth reads the depth
first, which is also a prefill measurement and is reported as one.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import ctypes
import json
import statistics
import sys
import time

import llama_cpp.llama_cpp as api


def fail(text):
    sys.exit("llama_runner.py: " + text)


class Engine:
    def __init__(self, args, n_ctx):
        # Silence: the log goes to stderr line by line and costs time.
        self.log = api.llama_log_callback(lambda level, text, user: None)
        api.llama_log_set(self.log, ctypes.c_void_p(0))
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = bool(args.repack)
        self.model = api.llama_model_load_from_file(args.model.encode(), params)
        if not self.model:
            fail("cannot load " + args.model)
        context = api.llama_context_default_params()
        context.n_ctx = n_ctx
        context.n_batch = max(args.ubatch, 2048)
        context.n_ubatch = args.ubatch
        context.n_threads = context.n_threads_batch = args.threads
        context.flash_attn_type = 1 if args.fa else 0
        context.type_k = context.type_v = 1  # GGML_TYPE_F16
        context.offload_kqv = False
        self.context = api.llama_init_from_model(self.model, context)
        if not self.context:
            fail("cannot make a context of %d tokens" % n_ctx)
        self.vocab = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)
        self.args = args

    def decode(self, tokens):
        array = (api.llama_token * len(tokens))(*tokens)
        rc = api.llama_decode(self.context, api.llama_batch_get_one(array, len(tokens)))
        if rc:
            fail("llama_decode returned %d" % rc)

    def read(self, n):
        """Seconds to prefill n tokens in physical batches of ubatch."""
        state, tokens = 1, []
        for _ in range(n):
            state = (state * 1103515245 + 12345) & 0x7fffffff
            tokens.append(state % min(self.n_vocab, 30000))
        begin = time.perf_counter()
        for i in range(0, n, self.args.ubatch):
            self.decode(tokens[i:i + self.args.ubatch])
        api.llama_synchronize(self.context)
        return time.perf_counter() - begin

    def write(self, n):
        """Seconds to decode n tokens one by one."""
        begin = time.perf_counter()
        for i in range(n):
            self.decode([(i * 7919 + 13) % min(self.n_vocab, 30000)])
            api.llama_synchronize(self.context)
        return time.perf_counter() - begin

    def clear(self):
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def greedy(self):
        logits = api.llama_get_logits_ith(self.context, -1)
        return max(range(self.n_vocab), key=lambda i: logits[i])


def row(args, test, n_prompt, n_gen, seconds):
    rates = [(n_prompt or n_gen) / s for s in seconds]
    return {
        "test": test, "n_prompt": n_prompt, "n_gen": n_gen, "n_depth": args.depth if n_gen else 0,
        "threads": args.threads, "avg_ts": statistics.mean(rates),
        "stddev_ts": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "best_ts": max(rates), "fa": args.fa, "repack": args.repack,
    }


def first_token(args):
    begin = time.perf_counter()
    engine = Engine(args, args.first_token + 8)
    engine.read(args.first_token)
    engine.greedy()
    return [{"test": "first", "n_prompt": args.first_token, "seconds": time.perf_counter() - begin}]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-p", "--prompt", type=int, default=0)
    parser.add_argument("-n", "--gen", type=int, default=0)
    parser.add_argument("-d", "--depth", type=int, default=0)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repetitions", type=int, default=1)
    parser.add_argument("-ub", "--ubatch", type=int, default=512)
    parser.add_argument("--fa", type=int, default=1)
    parser.add_argument("--repack", type=int, default=1)
    parser.add_argument("--first-token", type=int, default=0)
    parser.add_argument("--nothing", action="store_true", help="load the library and stop: its memory")
    args = parser.parse_args()
    if args.nothing:
        api.llama_backend_init()
        print("[]")
        return
    if args.first_token:
        print(json.dumps(first_token(args)))
        return
    engine = Engine(args, max(args.prompt, args.depth + args.gen) + 64)
    engine.read(min(64, max(args.prompt, args.depth, 1)))  # warm up: page in, size buffers
    engine.write(2)
    reading, writing = [], []
    for _ in range(args.repetitions):
        if args.prompt:
            engine.clear()
            reading.append(engine.read(args.prompt))
        if args.gen:
            engine.clear()
            if args.depth:
                seconds = engine.read(args.depth)
                if args.depth == args.prompt or not args.prompt:
                    reading.append(seconds)
            writing.append(engine.write(args.gen))
    rows = []
    if reading:
        n = args.prompt or args.depth
        rows.append(row(args, "pp%d" % n, n, 0, reading))
    if writing:
        rows.append(row(args, "tg%d@d%d" % (args.gen, args.depth), 0, args.gen, writing))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
