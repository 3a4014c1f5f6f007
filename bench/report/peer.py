#!/usr/bin/env python3
"""peer.py - llama.cpp answers questions about a text, through llama-cpp-python, as a process of its own.

Reads one JSON object from standard input: {model, threads, text, questions, system, max_tokens, ignore_eos,
slot, going_on}, prints one. The frame is that of kvfold (ChatML, text, blank line, question). Two ways to a second question
are measured: what the process still holds (prompt cache), and, with `slot`, the state after the text saved to
that file and restored. {restore: true}: a fresh process begins with the file, as after a restart.

Times are by this process's clock and leave out the start of Python; `load_s` is the model's loading.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import resource
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "vs_llamacpp"))


def frame(system, text):
    return "<|im_start|>system\n%s<|im_end|>\n<|im_start|>user\n" % system, text, "<|im_end|>\n<|im_start|>assistant\n"


class Peer:
    def __init__(self, order):
        import llama_runner
        self.api, self.order = llama_runner.api, order
        begin = time.perf_counter()
        args = argparse.Namespace(model=order["model"], threads=order["threads"], fa=1, repack=1, ubatch=512)
        self.engine = llama_runner.Engine(args, order["n_ctx"])
        self.load_s = time.perf_counter() - begin
        chain = self.api.llama_sampler_chain_init(self.api.llama_sampler_chain_default_params())
        self.api.llama_sampler_chain_add(chain, self.api.llama_sampler_init_greedy())
        self.sampler = chain
        self.memory = self.api.llama_get_memory(self.engine.context)

    def tokenize(self, text, special):
        data = text.encode()
        room = (self.api.llama_token * (len(data) + 16))()
        n = self.api.llama_tokenize(self.engine.vocab, data, len(data), room, len(data) + 16, False, special)
        return list(room[:n])

    def read(self, tokens):
        for i in range(0, len(tokens), 512):
            self.engine.decode(tokens[i:i + 512])
        self.api.llama_synchronize(self.engine.context)

    def piece(self, token):
        import ctypes
        room = ctypes.create_string_buffer(256)
        n = self.api.llama_token_to_piece(self.engine.vocab, token, room, 256, 0, False)
        return room.raw[:max(0, n)]

    def write(self, begin):
        """(seconds to the first token since begin, all tokens, seconds of writing, text)."""
        out, first_s, limit = [], 0.0, self.order["max_tokens"]
        while len(out) < limit:
            token = self.api.llama_sampler_sample(self.sampler, self.engine.context, -1)
            if not out:
                first_s = time.perf_counter() - begin
            if self.api.llama_vocab_is_eog(self.engine.vocab, token) and not self.order.get("ignore_eos"):
                break
            out.append(token)
            if len(out) < limit:
                self.engine.decode([token])
        if not first_s:
            first_s = time.perf_counter() - begin
        return first_s, out, time.perf_counter() - begin - first_s

    def answer(self, question, begin):
        tokens = self.tokenize("\n\n" + question, False) + self.tail
        self.read(tokens)
        first_s, out, write_s = self.write(begin)
        text = b"".join(self.piece(t) for t in out).decode("utf-8", "replace")
        return {"question": question, "answer": text, "first_s": first_s, "write_s": write_s, "n_generated": len(out),
                "n_question": len(tokens)}

    def state(self, path, n):
        """Saves (n tokens) or restores (n None) what has been read; seconds."""
        begin = time.perf_counter()
        if n is not None:
            array = (self.api.llama_token * len(n))(*n)
            if not self.api.llama_state_save_file(self.engine.context, path.encode(), array, len(n)):
                sys.exit("peer.py: the state was not saved")
            return time.perf_counter() - begin, 0
        import ctypes
        room, got = (self.api.llama_token * self.order["n_ctx"])(), ctypes.c_size_t(0)
        if not self.api.llama_state_load_file(self.engine.context, path.encode(), room, len(room), ctypes.byref(got)):
            sys.exit("peer.py: the state was not restored")
        return time.perf_counter() - begin, got.value

    def likelihood(self):
        """Mean negative log-likelihood of the tokens of going_on, one by one after the text."""
        import ctypes
        import numpy
        self.read(self.tokenize(self.order["text"], True))
        tokens, sum_nll = self.tokenize(self.order["going_on"], True), 0.0
        for token in tokens:
            at = self.api.llama_get_logits_ith(self.engine.context, -1)
            logits = numpy.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (self.engine.n_vocab,))
            logits = logits.astype(numpy.float64)
            top = logits.max()
            sum_nll += top + numpy.log(numpy.exp(logits - top).sum()) - logits[token]
            self.engine.decode([token])
        return {"nll": float(sum_nll) / len(tokens), "n_scored": len(tokens)}

    def run(self):
        order, out = self.order, {"load_s": self.load_s}
        head, text, tail = frame(order["system"], order.get("text", ""))
        self.tail = self.tokenize(tail, True)
        if order.get("going_on"):
            out.update(self.likelihood())
        elif order.get("restore"):
            begin = time.perf_counter()
            out["restore_s"], out["n_text"] = self.state(order["slot"], None)
            out["answers"] = [self.answer(q, begin) for q in order["questions"][:1]]
        else:
            out.update(self.dense(head, text))
        out["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return out

    def dense(self, head, text):
        order, answers = self.order, []
        begin = time.perf_counter()
        tokens = self.tokenize(head, True) + self.tokenize(text, False)
        self.read(tokens)
        out, read_s = {"n_text": len(tokens)}, time.perf_counter() - begin
        saved_s = 0.0
        if order.get("slot"):
            saved_s, _ = self.state(order["slot"], tokens)
            out["save_s"], out["slot_bytes"] = saved_s, os.stat(order["slot"]).st_size
        for i, question in enumerate(order["questions"]):
            if i:
                begin = time.perf_counter()
                self.api.llama_memory_seq_rm(self.memory, -1, len(tokens), -1)
                saved_s = 0.0
            answers.append(self.answer(question, begin + saved_s))
        out["answers"], out["read_s"] = answers, read_s
        if order.get("slot"):
            begin = time.perf_counter()
            self.engine.clear()
            out["restore_s"], _ = self.state(order["slot"], None)
            out["slot_answer"] = self.answer(order["questions"][-1], begin)
        return out


def main():
    order = json.load(sys.stdin)
    print(json.dumps(Peer(order).run()))


if __name__ == "__main__":
    main()
