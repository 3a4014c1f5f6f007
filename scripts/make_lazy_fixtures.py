#!/usr/bin/env python3
# make_lazy_fixtures.py - what LazyLLM computes on two tiny models, step by step.
#
# The paper's formulation, literally (Fu et al., arXiv:2407.14057, sec. 3): every layer has its KV cache and an
# Aux Cache with the layer's output of every token it computed; at each layer the tokens still in the step that
# have no KV there are computed from the Aux Cache of the layer before. Float64, keys and values as f16; written
# apart from src/model/lazy.c, which keeps one hidden state a token instead.
#
#     python3 scripts/make_lazy_fixtures.py [OUT_DIR]
#
# Writes tests/data/tiny/lazy.txt. For each case a line "case MODEL POLICY", then one line a step:
# "step TOKENS : tokens computed in each layer : tokens through all layers : logits of the last token".
#
# SPDX-License-Identifier: Apache-2.0
import math
import os
import sys

import numpy as np

import make_tiny_models as tiny

N_LOGIT = 24  # of the vocabulary's beginning

# model, options, new tokens of each step: a prompt, one-token steps, a second prompt
CASES = [
    ("qwen3-deep", dict(stages=[3, 5], keep=[0.5, 0.5], sink=0, recent=1, rows=1, layers=1, heads="mean", pool=1, hold=1), [40] + 12 * [1]),
    ("qwen3-deep", dict(stages=[2, 4, 7], keep=[0.6, 0.5, 0.4], sink=0, recent=1, rows=1, layers=1, heads="mean", pool=1, hold=1), [57] + 8 * [1] + [9] + 4 * [1]),
    ("qwen3-deep", dict(stages=[3], keep=[0.2], sink=2, recent=3, rows=4, layers=2, heads="max", pool=3, hold=0), [60] + 5 * [1] + [7] + 5 * [1]),
    ("qwen3-deep", dict(stages=[1, 6], keep=[0.3, 0.9], sink=4, recent=8, rows=8, layers=9, heads="max", pool=5, hold=3), [50] + 10 * [1]),
    ("gemma3", dict(stages=[6], keep=[0.4], sink=0, recent=1, rows=1, layers=1, heads="mean", pool=1, hold=1), [70] + 10 * [1]),
    ("gemma3", dict(stages=[6], keep=[0.5], sink=3, recent=4, rows=2, layers=2, heads="mean", pool=1, hold=0), [45] + 4 * [1] + [20] + 4 * [1]),
]


class Lazy:
    def __init__(self, m, o):
        self.m, self.o, self.n, self.since = m, o, 0, 0
        self.kv = [{} for _ in range(m.n_layer)]   # token -> (key, value), each [n_kv][hd]
        self.aux = [{} for _ in range(m.n_layer)]  # token -> output of the layer
        self.text, self.level = [], {}

    def sliding(self, layer):
        return self.m.arch == "gemma3" and (layer + 1) % 6 != 0

    def layer(self, l, rows, todo, live, n_row):
        """Compute `todo` in layer l over the tokens in `live`; the last n_row tokens' attention to each, by heads."""
        m, b = self.m, "blk.%d." % l
        x = np.stack([rows[i] for i in todo])
        h = tiny.norm(m, x, m.w[b + "attn_norm.weight"])
        q, k, v = (h @ m.w[b + "attn_%s.weight" % s].T + m.w.get(b + "attn_%s.bias" % s, 0.0) for s in "qkv")
        q, k, v = q.reshape(-1, m.n_head, m.hd), k.reshape(-1, m.n_kv, m.hd), v.reshape(-1, m.n_kv, m.hd)
        if b + "attn_q_norm.weight" in m.w:
            q, k = tiny.norm(m, q, m.w[b + "attn_q_norm.weight"]), tiny.norm(m, k, m.w[b + "attn_k_norm.weight"])
        angles, magnitude = tiny.rope_angles(m, l, max(todo) + 1)
        q, k = tiny.rope(m, q, angles[todo], magnitude), tiny.rope(m, k, angles[todo], magnitude)
        for t, i in enumerate(todo):
            assert i not in self.kv[l], "a token was computed twice"
            self.kv[l][i] = (k[t].astype(np.float16).astype(float), v[t].astype(np.float16).astype(float))
        keys = np.repeat(np.stack([self.kv[l][j][0] for j in live]), m.n_head // m.n_kv, axis=1)
        values = np.repeat(np.stack([self.kv[l][j][1] for j in live]), m.n_head // m.n_kv, axis=1)
        back = np.array(todo)[:, None] - np.array(live)[None, :]
        hidden = back < 0
        if self.sliding(l):
            hidden = hidden | (back >= m.meta["gemma3.attention.sliding_window"])
        s = np.where(hidden[None], -np.inf, np.einsum("ihd,jhd->hij", q, keys) / math.sqrt(m.hd))
        p = np.exp(s - s.max(axis=2, keepdims=True))
        p /= p.sum(axis=2, keepdims=True)
        o = np.einsum("hij,jhd->ihd", p, values).reshape(len(todo), -1) @ m.w[b + "attn_output.weight"].T
        gemma = m.arch == "gemma3"
        x = x + (tiny.norm(m, o, m.w[b + "post_attention_norm.weight"]) if gemma else o)
        h = tiny.norm(m, x, m.w[b + "ffn_norm.weight"])
        g, u = h @ m.w[b + "ffn_gate.weight"].T, h @ m.w[b + "ffn_up.weight"].T
        act = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g ** 3))) if gemma else g / (1 + np.exp(-g))
        f = (act * u) @ m.w[b + "ffn_down.weight"].T
        x = x + (tiny.norm(m, f, m.w[b + "post_ffw_norm.weight"]) if gemma else f)
        for t, i in enumerate(todo):
            self.aux[l][i] = x[t]
        asking = [t for t, i in enumerate(todo) if i >= self.n - n_row]
        said = p[:, asking, :].sum(axis=1) / n_row
        return said.max(axis=0) if self.o["heads"] == "max" else said.mean(axis=0)

    def choose(self, stage, live, score, n_row):
        o, n = self.o, len(live)
        recent = max(o["recent"], n_row)
        keep = {i for i in live if i == live[-1] or i < o["sink"] or i >= self.n - recent}
        half = o["pool"] // 2
        pooled = [np.mean(score[max(0, t - half):t + half + 1]) for t in range(n)]
        rest = sorted((t for t in range(n) if live[t] not in keep), key=lambda t: (-pooled[t], t))
        keep |= {live[t] for t in rest[:max(0, math.ceil(o["keep"][stage] * n) - len(keep))]}
        return [i for i in live if i in keep]

    def step(self, tokens):
        m, o = self.m, self.o
        before, first, bounds = self.n, self.n == 0, o["stages"] + [m.n_layer]
        self.n += len(tokens)
        self.text += tokens
        fresh = list(range(before, self.n))
        n_row = min(len(fresh), o["rows"])
        decode = len(fresh) == 1 and not first
        again = not decode or (o["hold"] > 0 and self.since + 1 >= o["hold"])
        embed = m.w["token_embd.weight"] * (math.sqrt(tiny.N_EMBD) if m.arch == "gemma3" else 1.0)
        live, stage, count, scores = list(range(self.n)), 0, [], []
        for i in range(self.n):
            if again:
                self.level[i] = 1
            elif i >= before:
                self.level[i] = len(bounds)
        for l in range(m.n_layer):
            if l == bounds[stage]:
                if again:
                    live = self.choose(stage, live, np.mean(scores[-o["layers"]:], axis=0), n_row)
                    for i in live:
                        self.level[i] = stage + 2
                else:
                    live = [i for i in live if self.level[i] > stage + 1]
                stage, scores = stage + 1, []
            todo = [i for i in live if i not in self.kv[l]]
            rows = {i: embed[self.text[i]] if l == 0 else self.aux[l - 1][i] for i in todo}
            got = self.layer(l, rows, todo, live, n_row)
            if not self.sliding(l):
                scores.append(got)
            count.append(len(todo))
        self.since = 0 if again else self.since + 1
        last = self.aux[m.n_layer - 1][self.n - 1]
        logits = tiny.norm(m, last, m.w["output_norm.weight"]) @ m.w.get("output.weight", m.w["token_embd.weight"]).T
        return count, len(self.kv[m.n_layer - 1]), logits


def main(argv):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    out = argv[1] if len(argv) > 1 else os.path.join(root, "tests", "data", "tiny")
    names = list(tiny.MODELS)
    with open(os.path.join(out, "lazy.txt"), "w") as f:
        for model, o, steps in CASES:
            m = tiny.Model(model, 1000 + names.index(model))
            tokens = m.tokens()
            z, at = Lazy(m, o), 0
            spec = ",".join("%s=%s" % (k, "/".join("%g" % x for x in v) if isinstance(v, list) else v) for k, v in o.items())
            f.write("case %s lazyllm:%s\n" % (model, spec))
            for n in steps:
                count, done, logits = z.step(tokens[at:at + n])
                f.write("step %s : %s : %d : %s\n" % (" ".join(map(str, tokens[at:at + n])), " ".join(map(str, count)), done,
                                                      " ".join("%.6g" % x for x in logits[:N_LOGIT])))
                at += n
            print(model, spec, "computed in the last step", count, "of", at, "through all layers", done)


if __name__ == "__main__":
    main(sys.argv)
