#!/usr/bin/env python3
# make_tiny_models.py - random models of every architecture, a few hundred KB each, with logits.
#
# Writes tests/data/tiny/<model>.gguf and <model>.logits.txt. The logits come from the forward pass
# in this file: float64, on the dequantised weights, written from the papers and not from src/, so
# that the two can disagree. The files are committed; run this only to change them. Output is the
# same on every machine (frozen random generator, no time, no paths).
#
#     python3 scripts/make_tiny_models.py [OUT_DIR]
#     python3 scripts/make_tiny_models.py --compare [OUT_DIR]   (needs llama-cpp-python)
#
# SPDX-License-Identifier: Apache-2.0
import os
import struct
import sys
import tempfile

import numpy as np

N_EMBD = 256  # one block of the K types
N_TOKENS = 150  # past the edge of a 128-token KV block, past every window
POSITIONS = [0, 17, 63, 127, 128, 149]  # whose logits are kept

# ---- Tensor types: number, quantise rows to bytes, bytes back to rows -----------------------


def f16(x):
    return x.astype(np.float16)


def f16_bytes(x):
    return f16(x).view(np.uint8).reshape(*x.shape, 2)


def get_f16(b):
    return np.ascontiguousarray(b).view(np.float16).astype(np.float64)


def nibbles(q):  # [n][32] -> [n][16]: element i low, element i + 16 high
    return (q[:, :16] | (q[:, 16:] << 4)).astype(np.uint8)


def unnibble(b):
    return np.concatenate([b & 15, b >> 4], axis=1).astype(np.float64)


def high_bits(q):  # bit 4 of 32 elements as one little-endian u32
    bits = ((q >> 4) & 1).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    return bits.sum(axis=1, dtype=np.uint32).view(np.uint8).reshape(-1, 4)


def unhigh(b):
    u = np.ascontiguousarray(b).view(np.uint32)
    return ((u >> np.arange(32, dtype=np.uint32)) & 1).astype(np.float64) * 16


def symmetric(x, levels, low):  # scale from the largest magnitude
    d = f16(np.abs(x).max(axis=1, keepdims=True) / levels).astype(np.float64)
    d[d == 0] = 1
    return d, np.clip(np.rint(x / d), -low, levels).astype(np.int32)


def affine(x, levels):
    m = f16(x.min(axis=1, keepdims=True)).astype(np.float64)
    d = f16((x.max(axis=1, keepdims=True) - m) / levels).astype(np.float64)
    d[d == 0] = 1
    return d, m, np.clip(np.rint((x - m) / d), 0, levels).astype(np.int32)


def q4_0(x):
    d, q = symmetric(x, 7, 8)
    return np.concatenate([f16_bytes(d)[:, 0], nibbles(q + 8)], axis=1)


def q4_1(x):
    d, m, q = affine(x, 15)
    return np.concatenate([f16_bytes(d)[:, 0], f16_bytes(m)[:, 0], nibbles(q)], axis=1)


def q5_0(x):
    d, q = symmetric(x, 15, 16)
    q = q + 16
    return np.concatenate([f16_bytes(d)[:, 0], high_bits(q), nibbles(q & 15)], axis=1)


def q5_1(x):
    d, m, q = affine(x, 31)
    return np.concatenate([f16_bytes(d)[:, 0], f16_bytes(m)[:, 0], high_bits(q), nibbles(q & 15)], axis=1)


def q8_0(x):
    d, q = symmetric(x, 127, 127)
    return np.concatenate([f16_bytes(d)[:, 0], q.astype(np.int8).view(np.uint8)], axis=1)


def k_affine(x, levels):
    """d, dmin, 6-bit scales and minima of 8 sub-blocks, and the quants [n][8][32]."""
    s = x.reshape(-1, 8, 32)
    low = np.minimum(s.min(axis=2), 0)
    step = (s.max(axis=2) - low) / levels
    d = f16(step.max(axis=1, keepdims=True) / 63).astype(np.float64)
    dmin = f16(-low.min(axis=1, keepdims=True) / 63).astype(np.float64)
    sc = np.clip(np.rint(step / d), 1, 63).astype(np.int32)
    mn = np.clip(np.rint(-low / np.where(dmin == 0, 1, dmin)), 0, 63).astype(np.int32)
    q = np.rint((s + (dmin * mn)[:, :, None]) / (d * sc)[:, :, None])
    packed = np.zeros((len(s), 12), np.int32)
    packed[:, 0:4] = sc[:, :4] | ((sc[:, 4:] >> 4) << 6)
    packed[:, 4:8] = mn[:, :4] | ((mn[:, 4:] >> 4) << 6)
    packed[:, 8:12] = (sc[:, 4:] & 15) | ((mn[:, 4:] & 15) << 4)
    head = np.concatenate([f16_bytes(d)[:, 0], f16_bytes(dmin)[:, 0], packed.astype(np.uint8)], axis=1)
    return head, np.clip(q, 0, levels).astype(np.int32)


def k_scales(b):
    p = b[:, 4:16].astype(np.int32)
    sc = np.concatenate([p[:, :4] & 63, (p[:, 8:] & 15) | ((p[:, :4] >> 6) << 4)], axis=1)
    mn = np.concatenate([p[:, 4:8] & 63, (p[:, 8:] >> 4) | ((p[:, 4:8] >> 6) << 4)], axis=1)
    return get_f16(b[:, :2]) * sc, get_f16(b[:, 2:4]) * mn


def q4_k(x):
    head, q = k_affine(x, 15)
    q = q.reshape(-1, 4, 2, 32)
    return np.concatenate([head, (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(-1, 128).astype(np.uint8)], axis=1)


def q5_k(x):
    head, q = k_affine(x, 31)
    high = ((q >> 4) << np.arange(8)[None, :, None]).sum(axis=1)
    q = (q & 15).reshape(-1, 4, 2, 32)
    low = (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([head, high.astype(np.uint8), low.astype(np.uint8)], axis=1)


def k_low(b):
    b = b.reshape(-1, 4, 1, 32)
    return np.concatenate([b & 15, b >> 4], axis=2).reshape(-1, 8, 32).astype(np.float64)


def un_q4_k(b):
    sc, mn = k_scales(b)
    return (k_low(b[:, 16:]) * sc[:, :, None] - mn[:, :, None]).reshape(-1, 256)


def un_q5_k(b):
    sc, mn = k_scales(b)
    high = (b[:, 16:48, None].transpose(0, 2, 1) >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return ((k_low(b[:, 48:]) + 16.0 * high) * sc[:, :, None] - mn[:, :, None]).reshape(-1, 256)


def q6_k(x):
    s = x.reshape(-1, 16, 16)
    step = np.abs(s).max(axis=2) / 31
    d = f16(step.max(axis=1, keepdims=True) / 127).astype(np.float64)
    sc = np.clip(np.rint(step / d), 1, 127)
    # Negative scales are legal: give every third sub-block one.
    sc[:, ::3] *= -1
    q = np.clip(np.rint(s / (d * sc)[:, :, None]), -32, 31).astype(np.int32) + 32
    q = q.reshape(-1, 2, 4, 32)  # half, quarter, element
    low = np.stack([(q[:, :, 0] & 15) | ((q[:, :, 2] & 15) << 4), (q[:, :, 1] & 15) | ((q[:, :, 3] & 15) << 4)], axis=2)
    high = sum((q[:, :, i] >> 4) << (2 * i) for i in range(4))
    return np.concatenate([low.reshape(-1, 128).astype(np.uint8), high.reshape(-1, 64).astype(np.uint8),
                           sc.astype(np.int8).view(np.uint8), f16_bytes(d)[:, 0]], axis=1)


def un_q6_k(b):
    low = b[:, :128].reshape(-1, 2, 2, 32).astype(np.int32)
    high = b[:, 128:192].reshape(-1, 2, 32).astype(np.int32)
    low4 = [low[:, :, 0] & 15, low[:, :, 1] & 15, low[:, :, 0] >> 4, low[:, :, 1] >> 4]
    q = np.stack([low4[i] | (((high >> (2 * i)) & 3) << 4) for i in range(4)], axis=2) - 32
    sc = np.ascontiguousarray(b[:, 192:208]).view(np.int8) * get_f16(b[:, 208:])
    return (q.reshape(-1, 16, 16) * sc[:, :, None]).reshape(-1, 256)


def bf16(x):
    u = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7fff + ((u >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8).reshape(-1, 2)


# name: (number, elements of a block, quantise [n][block] -> [n][bytes], dequantise)
TYPES = {
    "F32": (0, 1, lambda x: x.astype(np.float32).view(np.uint8).reshape(-1, 4),
            lambda b: np.ascontiguousarray(b).view(np.float32).astype(np.float64)),
    "F16": (1, 1, lambda x: f16_bytes(x)[:, 0], get_f16),
    "Q4_0": (2, 32, q4_0, lambda b: get_f16(b[:, :2]) * (unnibble(b[:, 2:]) - 8)),
    "Q4_1": (3, 32, q4_1, lambda b: get_f16(b[:, :2]) * unnibble(b[:, 4:]) + get_f16(b[:, 2:4])),
    "Q5_0": (6, 32, q5_0, lambda b: get_f16(b[:, :2]) * (unnibble(b[:, 6:]) + unhigh(b[:, 2:6]) - 16)),
    "Q5_1": (7, 32, q5_1, lambda b: get_f16(b[:, :2]) * (unnibble(b[:, 8:]) + unhigh(b[:, 4:8])) + get_f16(b[:, 2:4])),
    "Q8_0": (8, 32, q8_0, lambda b: get_f16(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view(np.int8)),
    "Q4_K": (12, 256, q4_k, un_q4_k),
    "Q5_K": (13, 256, q5_k, un_q5_k),
    "Q6_K": (14, 256, q6_k, un_q6_k),
    "BF16": (30, 1, bf16, lambda b: (np.ascontiguousarray(b).view(np.uint16).astype(np.uint32) << 16)
             .view(np.float32).astype(np.float64)),
}

# ---- GGUF -----------------------------------------------------------------------------------


def gguf_str(s):
    b = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(b)) + b


def gguf_value(v):
    """Type number and bytes: bool, int (u32), float (f32), str, list of int (i32), float or str."""
    if isinstance(v, bool):
        return 7, struct.pack("<B", v)
    if isinstance(v, int):
        return 4, struct.pack("<I", v)
    if isinstance(v, float):
        return 6, struct.pack("<f", v)
    if isinstance(v, str):
        return 8, gguf_str(v)
    kind, code = {int: (5, "<i"), float: (6, "<f"), str: (8, None)}[type(v[0])]
    body = b"".join(gguf_str(e) if code is None else struct.pack(code, e) for e in v)
    return 9, struct.pack("<IQ", kind, len(v)) + body


def write_gguf(path, meta, tensors):
    """tensors: name -> (dims fastest first, type name, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, v in meta.items():
        kind, body = gguf_value(v)
        head += gguf_str(key) + struct.pack("<I", kind) + body
    offset, data = 0, b""
    for name, (dims, kind, body) in tensors.items():
        head += gguf_str(name) + struct.pack("<I", len(dims)) + struct.pack("<%dQ" % len(dims), *dims)
        head += struct.pack("<IQ", TYPES[kind][0], len(data))
        data += body + b"\0" * (-len(body) % 32)
    with open(path, "wb") as f:
        f.write(head + b"\0" * (-len(head) % 32) + data)


# ---- Vocabularies ---------------------------------------------------------------------------

TEXT = """the contract between the owner and the tenant of the house is for one year and then goes on
from month to month until one of them ends it in writing. the tenant pays the rent on the first day
of the month; when the rent is late the owner may ask for interest. for(int i = 0; i < n; i++) sum += a[i];"""


def train_merges(words, n):
    """Byte-pair merges of the most frequent pair, ties to the smaller pair."""
    words, merges = [list(w) for w in words], []
    while len(merges) < n:
        count = {}
        for w in words:
            for pair in zip(w, w[1:]):
                count[pair] = count.get(pair, 0) + 1
        best = min(count, key=lambda p: (-count[p], p))
        merges.append(best)
        for w in words:
            i = 0
            while i + 1 < len(w):
                if (w[i], w[i + 1]) == best:
                    w[i:i + 2] = [w[i] + w[i + 1]]
                i += 1
    return merges


def byte_letters():
    """The printable stand-ins of the 256 bytes in byte-level BPE vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return {b: chr(b if b in plain else next(spare)) for b in range(256)}


def bpe_vocab(pre, n_merges, special, template):
    letter = byte_letters()
    words = TEXT.replace(" ", "\0 ").replace("\n", "\0\n").split("\0")
    merges = train_merges([[letter[b] for b in w.encode()] for w in words], n_merges)
    tokens = [letter[b] for b in sorted(letter, key=lambda b: letter[b])]
    tokens += [a + b for a, b in merges] + special
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - len(special)) + [3] * len(special),
        "tokenizer.ggml.merges": [a + " " + b for a, b in merges],
        "tokenizer.ggml.bos_token_id": tokens.index(special[0]),
        "tokenizer.ggml.eos_token_id": tokens.index(special[-1]),
        "tokenizer.ggml.add_bos_token": pre == "llama-bpe", "tokenizer.chat_template": template,
    }


def spm_vocab(special, unk, bos, eos, space_prefix, n_merges, template):
    text = TEXT.replace("\n", " ").replace(" ", "\0\u2581").split("\0")
    merges = [a + b for a, b in train_merges(text, n_merges)]
    chars = sorted(set("".join(text)) - set(merges))
    tokens = special + ["<0x%02X>" % b for b in range(256)] + merges + chars
    n = len(special) + 256
    kinds = [2 if t == unk else 3 for t in special] + [6] * 256 + [1] * (len(tokens) - n)
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * n + [-float(i) for i in range(len(tokens) - n)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": special.index(bos), "tokenizer.ggml.eos_token_id": special.index(eos),
        "tokenizer.ggml.unknown_token_id": special.index(unk), "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": space_prefix, "tokenizer.chat_template": template,
    }


CHATML = "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'}}{% endfor %}"
LLAMA3 = ("{% for m in messages %}{{'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content']"
          " + '<|eot_id|>'}}{% endfor %}")
GEMMA = "{% for m in messages %}{{'<start_of_turn>' + m['role'] + '\\n' + m['content'] + '<end_of_turn>\\n'}}{% endfor %}"
MISTRAL = "{% for m in messages %}{{'[INST] ' + m['content'] + ' [/INST]'}}{% endfor %}"


def vocab(kind):
    if kind == "qwen":
        return bpe_vocab("qwen2", 70, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML)
    if kind == "llama3":
        return bpe_vocab("llama-bpe", 50, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                           "<|eot_id|>"], LLAMA3)
    if kind == "gemma":
        return spm_vocab(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], "<unk>", "<bos>",
                         "<eos>", False, 60, GEMMA)
    return spm_vocab(["<unk>", "<s>", "</s>"], "<unk>", "<s>", "</s>", True, 50, MISTRAL)


# ---- Models ---------------------------------------------------------------------------------

# Matrices take these in turn, wide types where matrices are small: keys and values of two layers.
NARROW = ["Q4_K", "Q5_0", "Q6_K", "Q4_0", "Q5_K", "Q4_1", "Q5_1"]
WIDE = ["F32", "Q8_0", "F16", "BF16"]

# arch, vocab, layers, heads, kv heads, head_dim, n_ff, wide types too, extra metadata
MODELS = {
    "llama": ("llama", "llama", 2, 8, 2, 32, 96, True, {}),
    "llama-linear": ("llama", "llama", 2, 4, 1, 32, 32, False,
                     {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.freq_base": 10000.0}),
    "llama-yarn": ("llama", "llama", 2, 4, 1, 32, 32, False,
                   {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.freq_base": 10000.0,
                    "rope.scaling.original_context_length": 64}),
    "llama-rope-freqs": ("llama", "llama3", 2, 4, 2, 32, 96, False, {"rope.freq_base": 500000.0}),
    "qwen2": ("qwen2", "qwen", 2, 4, 1, 64, 96, True, {"rope.freq_base": 1000000.0}),
    "qwen3": ("qwen3", "qwen", 2, 4, 2, 32, 96, True, {"rope.freq_base": 1000000.0}),
    "gemma3": ("gemma3", "gemma", 7, 2, 1, 32, 64, True,
               {"rope.freq_base": 1000000.0, "attention.sliding_window": 24, "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0}),
}
MODELS["qwen3-deep"] = ("qwen3", "qwen", 8, 4, 2, 32, 32, True, {"rope.freq_base": 1000000.0})
TIED = ["llama-linear", "llama-yarn", "llama-rope-freqs", "gemma3"]


class Model:
    """Metadata, tensors as bytes, and the same tensors dequantised in w."""

    def __init__(self, name, seed):
        self.arch, kind, self.n_layer, self.n_head, self.n_kv, self.hd, self.n_ff, wide, extra = MODELS[name]
        self.random = np.random.RandomState(seed)
        self.meta = {"general.architecture": self.arch, "general.name": "kvfold tiny " + name, **self.hparams(extra),
                     **vocab(kind)}
        self.n_vocab = len(self.meta["tokenizer.ggml.tokens"])
        self.tensors, self.w, self.turn, self.wide = {}, {}, 0, list(WIDE) if wide else []
        self.make(name)

    def hparams(self, extra):
        keys = {"context_length": 1024, "embedding_length": N_EMBD, "block_count": self.n_layer,
                "feed_forward_length": self.n_ff, "attention.head_count": self.n_head,
                "attention.head_count_kv": self.n_kv, "attention.layer_norm_rms_epsilon": 1e-5}
        if self.hd * self.n_head != N_EMBD or self.arch in ("qwen3", "gemma3"):
            keys.update({"attention.key_length": self.hd, "attention.value_length": self.hd,
                         "rope.dimension_count": self.hd})
        return {self.arch + "." + k: v for k, v in {**keys, **extra}.items()}

    def put(self, name, dims, x, kind):
        number, block, quantise, dequantise = TYPES[kind]
        body = np.ascontiguousarray(quantise(np.asarray(x, np.float64).reshape(-1, block)))
        self.tensors[name] = (dims, kind, body.tobytes())
        self.w[name] = dequantise(body).reshape(dims[::-1])

    def matrix(self, name, n_in, n_out, gain, kind=None):
        if kind is None and self.wide and n_out == self.n_kv * self.hd:
            kind = self.wide.pop(0)
        while kind is None:
            kind, self.turn = NARROW[self.turn % len(NARROW)], self.turn + 1
            if n_in % TYPES[kind][1]:
                kind = None
        x = self.random.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)
        self.put(name + ".weight", [n_in, n_out], x, kind)

    def vector(self, name, n, mean, spread):
        self.put(name, [n], mean + spread * self.random.standard_normal(n), "F32")

    def make(self, name):
        q, kv, gemma = self.n_head * self.hd, self.n_kv * self.hd, self.arch == "gemma3"
        # Small embeddings and a large last norm: the layers, not the last token, make the logits.
        tied, embd = name in TIED, 0.4 if gemma else 4.0
        self.matrix("token_embd", N_EMBD, self.n_vocab, embd, "Q6_K" if tied else "Q5_K")
        self.vector("output_norm.weight", N_EMBD, 0.4 / embd if tied else 1.3, 0.05)
        if not tied:
            self.matrix("output", N_EMBD, self.n_vocab, 0.3, "Q6_K")
        if name == "llama-rope-freqs":
            self.put("rope_freqs.weight", [self.hd // 2], np.linspace(1.0, 8.0, self.hd // 2), "F32")
        for i in range(self.n_layer):
            b = "blk.%d." % i
            self.vector(b + "attn_norm.weight", N_EMBD, 1.0, 0.1)
            self.matrix(b + "attn_q", N_EMBD, q, 1.4)
            self.matrix(b + "attn_k", N_EMBD, kv, 1.4)
            self.matrix(b + "attn_v", N_EMBD, kv, 1.0)
            self.matrix(b + "attn_output", q, N_EMBD, 1.5)
            if self.arch == "qwen2":
                for s, n in (("q", q), ("k", kv), ("v", kv)):
                    self.vector(b + "attn_%s.bias" % s, n, 0.0, 0.5)
            if self.arch in ("qwen3", "gemma3"):
                self.vector(b + "attn_q_norm.weight", self.hd, 1.4, 0.2)
                self.vector(b + "attn_k_norm.weight", self.hd, 1.4, 0.2)
            if gemma:
                self.vector(b + "post_attention_norm.weight", N_EMBD, 0.8, 0.1)
                self.vector(b + "post_ffw_norm.weight", N_EMBD, 0.8, 0.1)
            self.vector(b + "ffn_norm.weight", N_EMBD, 1.0, 0.1)
            self.matrix(b + "ffn_gate", N_EMBD, self.n_ff, 1.5)
            self.matrix(b + "ffn_up", N_EMBD, self.n_ff, 1.2)
            self.matrix(b + "ffn_down", self.n_ff, N_EMBD, 1.2)

    def tokens(self):
        """bos if the model wants one, then ordinary tokens."""
        normal = [i for i, t in enumerate(self.meta["tokenizer.ggml.token_type"]) if t in (1, 6)]
        out = [int(t) for t in np.random.RandomState(7).choice(normal, N_TOKENS)]
        if self.meta["tokenizer.ggml.add_bos_token"]:
            out[0] = self.meta["tokenizer.ggml.bos_token_id"]
        return out


# ---- Forward pass ---------------------------------------------------------------------------


def rope_angles(m, layer, n):
    """[n][hd/2] angles, and the factor on cos and sin."""
    key = lambda k, d: m.meta.get(m.arch + ".rope." + k, d)
    local = m.arch == "gemma3" and (layer + 1) % 6 != 0
    base, half = 10000.0 if local else key("freq_base", 10000.0), m.hd // 2
    i = np.arange(half)
    freq = base ** (-i / half)
    if "rope_freqs.weight" in m.w:
        freq = freq / m.w["rope_freqs.weight"]
    kind, s, magnitude = key("scaling.type", "none"), key("scaling.factor", 1.0), 1.0
    if kind == "linear" and not local:
        freq = freq / s
    if kind == "yarn":  # [Peng et al. 2023, YaRN, sec. 3.2-3.4], beta 32 and 1
        dim = lambda turns: m.hd * np.log(key("scaling.original_context_length", 0) / (turns * 2 * np.pi)) / (2 * np.log(base))
        lo, hi = max(0.0, np.floor(dim(32))), min(m.hd - 1.0, np.ceil(dim(1)))
        keep = 1 - np.clip((i - lo) / max(0.001, hi - lo), 0, 1)
        freq = freq / s * (1 - keep) + freq * keep
        magnitude = 1 + 0.1 * np.log(s)
    return np.arange(n)[:, None] * freq[None, :], magnitude


def rope(m, x, angles, magnitude):  # x: [n][heads][hd]
    half = m.hd // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if m.arch == "llama" else (x[..., :half], x[..., half:])
    c, s = (magnitude * f(angles)[:, None, :] for f in (np.cos, np.sin))
    out = np.empty_like(x)
    if m.arch == "llama":
        out[..., 0::2], out[..., 1::2] = a * c - b * s, a * s + b * c
    else:
        out[..., :half], out[..., half:] = a * c - b * s, a * s + b * c
    return out


def attention(m, x, layer, kv_type):
    n, w, b = len(x), m.w, "blk.%d.attn_" % layer
    q, k, v = (x @ w[b + s + ".weight"].T + w.get(b + s + ".bias", 0.0) for s in "qkv")
    q, k, v = q.reshape(n, m.n_head, m.hd), k.reshape(n, m.n_kv, m.hd), v.reshape(n, m.n_kv, m.hd)
    if b + "q_norm.weight" in w:
        q, k = norm(m, q, w[b + "q_norm.weight"]), norm(m, k, w[b + "k_norm.weight"])
    angles = rope_angles(m, layer, n)
    q, k = rope(m, q, *angles), rope(m, k, *angles)
    k, v = (t.astype(kv_type).astype(np.float64) for t in (k, v))
    k, v = (np.repeat(t, m.n_head // m.n_kv, axis=1) for t in (k, v))
    score = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(m.hd)
    back = np.arange(n)[:, None] - np.arange(n)[None, :]
    hidden = back < 0
    if m.arch == "gemma3" and (layer + 1) % 6 != 0:
        hidden = hidden | (back >= m.meta["gemma3.attention.sliding_window"])
    score = np.where(hidden[None], -np.inf, score)
    p = np.exp(score - score.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    return np.einsum("hij,jhd->ihd", p, v).reshape(n, -1) @ w[b + "output.weight"].T


def norm(m, x, weight):
    eps = np.float32(m.meta[m.arch + ".attention.layer_norm_rms_epsilon"]).astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def forward(m, tokens, kv_type):
    """Logits [n][n_vocab] with keys and values kept as kv_type."""
    w, gemma = m.w, m.arch == "gemma3"
    h = w["token_embd.weight"][tokens] * (np.sqrt(N_EMBD) if gemma else 1.0)
    for i in range(m.n_layer):
        b = "blk.%d." % i
        o = attention(m, norm(m, h, w[b + "attn_norm.weight"]), i, kv_type)
        h = h + (norm(m, o, w[b + "post_attention_norm.weight"]) if gemma else o)
        x = norm(m, h, w[b + "ffn_norm.weight"])
        g, u = x @ w[b + "ffn_gate.weight"].T, x @ w[b + "ffn_up.weight"].T
        act = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g ** 3))) if gemma else g / (1 + np.exp(-g))
        f = (act * u) @ w[b + "ffn_down.weight"].T
        h = h + (norm(m, f, w[b + "post_ffw_norm.weight"]) if gemma else f)
    return norm(m, h, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# ---- Main -----------------------------------------------------------------------------------


def compare(path, tokens, ours):
    """Largest and mean difference in log-probability from llama.cpp, f32 KV cache. It rounds
    activations to 8 bits where weights are quantised, so the same weights in F32 come closer."""
    import llama_cpp

    def params(make=llama_cpp.llama_cpp.llama_model_default_params):
        p = make()
        p.use_extra_bufts = False  # plain kernels: the repacked ones need what not every machine grants
        return p

    llama_cpp.llama_cpp.llama_model_default_params = params
    llm = llama_cpp.Llama(path, n_ctx=512, n_batch=512, n_ubatch=512, n_threads=1, logits_all=True, verbose=False,
                          type_k=0, type_v=0, flash_attn=False)
    llm.eval(tokens)
    theirs = np.array(llm.scores[:len(tokens)], np.float64)
    d = np.abs(log_softmax(theirs) - log_softmax(ours))
    return d.max(), d.mean(), (theirs.argmax(1) == ours.argmax(1)).mean()


def main(argv):
    check = "--compare" in argv
    rest = [a for a in argv[1:] if a != "--compare"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    out = rest[0] if rest else os.path.join(root, "tests", "data", "tiny")
    for seed, name in enumerate(MODELS):
        m = Model(name, 1000 + seed)
        tokens = m.tokens()
        logits = forward(m, tokens, np.float64 if check else np.float16)
        path = os.path.join(out, name + ".gguf")
        if check:
            print("%-18s max %.4f mean %.5f same top-1 %.3f" % (name, *compare(path, tokens, logits)))
            wide = {k: (t[0], "F32", m.w[k].astype(np.float32).tobytes()) for k, t in m.tensors.items()}
            with tempfile.NamedTemporaryFile(suffix=".gguf") as f:
                write_gguf(f.name, m.meta, wide)
                print("%-18s max %.4f mean %.5f same top-1 %.3f" % ("  in F32", *compare(f.name, tokens, logits)))
            continue
        write_gguf(path, m.meta, m.tensors)
        with open(os.path.join(out, name + ".logits.txt"), "w") as f:
            f.write(" ".join(map(str, tokens)) + "\n")
            for p in POSITIONS:
                f.write("%d: %s\n" % (p, " ".join("%.6g" % v for v in logits[p])))
        print("%-18s %8d bytes, %d tokens, logits std %.2f, top-1 p %.2f, types %s" % (
            name, os.path.getsize(path), m.n_vocab, logits.std(), np.exp(log_softmax(logits)).max(1).mean(),
            " ".join(sorted({t[1] for t in m.tensors.values()}))))


if __name__ == "__main__":
    main(sys.argv)
