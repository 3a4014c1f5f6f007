#!/usr/bin/env python3
# make_seeds.py OUT_DIR - small valid inputs for the fuzzers: OUT_DIR/<fuzzer>/<seed>.
#
# Python 3 standard library only; the same bytes every time.
#
# SPDX-License-Identifier: Apache-2.0
import gzip
import os
import struct
import sys


def save(root, fuzzer, name, data):
    os.makedirs(os.path.join(root, fuzzer), exist_ok=True)
    with open(os.path.join(root, fuzzer, name), "wb") as f:
        f.write(data)


# ---- GGUF ---------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
CODE = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q",
        F64: "<d"}
TYPE_BYTES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144),
              13: (256, 176), 14: (256, 210), 30: (1, 2)}


def text(s):
    b = s.encode()
    return struct.pack("<Q", len(b)) + b


def value(kind, v):
    if kind == STR:
        return text(v)
    if isinstance(kind, tuple):
        return struct.pack("<IQ", kind[1], len(v)) + b"".join(value(kind[1], e) for e in v)
    return struct.pack(CODE[kind], v)


def gguf(meta, tensors):
    """meta: (key, kind or (ARR, kind), value); tensors: (name, dims, type)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, kind, v in meta:
        head += text(key) + struct.pack("<I", ARR if isinstance(kind, tuple) else kind) + value(kind, v)
    data = b""
    for name, dims, kind in tensors:
        n = 1
        for d in dims:
            n *= d
        block, size = TYPE_BYTES[kind]
        head += text(name) + struct.pack("<I%dQIQ" % len(dims), len(dims), *dims, kind, len(data))
        body = weights(kind, n // block * size)
        data += body + b"\0" * (-len(body) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def weights(kind, n):
    """Small finite numbers in any layout that starts its blocks with f16 scales."""
    if kind == 0:
        return struct.pack("<f", 0.5) * (n // 4)
    if kind in (1, 30):
        return struct.pack("<H", 0x3000 if kind == 1 else 0x3e00) * (n // 2)
    unit = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 12: 144, 13: 176, 14: 210}[kind]
    block = bytearray((i * 37 + 11) & 255 for i in range(unit))
    heads = {2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 12: [0, 2], 13: [0, 2], 14: [208]}[kind]
    for h in heads:
        block[h:h + 2] = struct.pack("<H", 0x1400)
    return bytes(block) * (n // unit)


def every_kind():
    meta = [("k%d" % k, k, 1.5 if k in (F32, F64) else 1) for k in CODE]
    meta += [("s", STR, "llama"), ("strs", (ARR, STR), ["", "a", "bc"]), ("ints", (ARR, I32), [1, -2, 3]),
             ("none", (ARR, F64), []), ("general.alignment", U32, 32)]
    return gguf(meta, [("t%d" % t, [256, 2], t) for t in TYPE_BYTES])


def spm_meta(extra):
    tokens = ["<unk>", "<s>", "</s>"] + extra + ["<0x%02X>" % b for b in range(256)]
    tokens += ["\u2581", "t", "h", "e", "th", "the", "\u2581the", "\u2581t"]
    n = len(tokens)
    kinds = [2, 3, 3] + [3] * len(extra) + [6] * 256 + [1] * 8
    return [("tokenizer.ggml.model", STR, "llama"), ("tokenizer.ggml.tokens", (ARR, STR), tokens),
            ("tokenizer.ggml.scores", (ARR, F32), [-float(i) for i in range(n)]),
            ("tokenizer.ggml.token_type", (ARR, I32), kinds), ("tokenizer.ggml.bos_token_id", U32, 1),
            ("tokenizer.ggml.eos_token_id", U32, 2), ("tokenizer.ggml.unknown_token_id", U32, 0),
            ("tokenizer.ggml.add_bos_token", BOOL, 1), ("tokenizer.ggml.add_space_prefix", BOOL, 1)], n


def bpe_meta(pre, special, template):
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    letters = [chr(b if b in plain else next(spare)) for b in range(256)]
    merges = [("t", "h"), ("th", "e"), ("\u0120", "t"), ("\u0120", "the"), ("i", "n")]
    tokens = letters + [a + b for a, b in merges] + special
    return [("tokenizer.ggml.model", STR, "gpt2"), ("tokenizer.ggml.pre", STR, pre),
            ("tokenizer.ggml.tokens", (ARR, STR), tokens),
            ("tokenizer.ggml.token_type", (ARR, I32), [1] * (256 + len(merges)) + [3] * len(special)),
            ("tokenizer.ggml.merges", (ARR, STR), [a + " " + b for a, b in merges]),
            ("tokenizer.ggml.bos_token_id", U32, len(tokens) - len(special)),
            ("tokenizer.ggml.eos_token_id", U32, len(tokens) - 1),
            ("tokenizer.chat_template", STR, template)], len(tokens)


def model(arch, vocab, extra=(), layers=1, types=(8, 2, 6, 1)):
    """One complete model: width 32, two heads of 32, one KV head."""
    meta, n_vocab = vocab
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": layers, "feed_forward_length": 32,
             "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32,
             "attention.value_length": 32, "rope.dimension_count": 32}
    head = [("general.architecture", STR, arch)] + [(arch + "." + k, U32, v) for k, v in sizes.items()]
    head += [(arch + ".attention.layer_norm_rms_epsilon", F32, 1e-5)] + [(arch + "." + k, t, v) for k, t, v in extra]
    tensors = [("token_embd.weight", [32, n_vocab], types[0]), ("output_norm.weight", [32], 0)]
    turn = 0
    for i in range(layers):
        b = "blk.%d." % i
        for name, dims in [("attn_q", [32, 64]), ("attn_k", [32, 32]), ("attn_v", [32, 32]), ("attn_output", [64, 32]),
                           ("ffn_gate", [32, 32]), ("ffn_up", [32, 32]), ("ffn_down", [32, 32])]:
            tensors.append((b + name + ".weight", dims, types[turn % len(types)]))
            turn += 1
        vectors = [("attn_norm.weight", 32), ("ffn_norm.weight", 32)]
        if arch in ("qwen3", "gemma3"):
            vectors += [("attn_q_norm.weight", 32), ("attn_k_norm.weight", 32)]
        if arch == "gemma3":
            vectors += [("post_attention_norm.weight", 32), ("post_ffw_norm.weight", 32)]
        if arch == "qwen2":
            vectors += [("attn_q.bias", 64), ("attn_k.bias", 32), ("attn_v.bias", 32)]
        tensors += [(b + name, [n], 0) for name, n in vectors]
    return gguf(head + meta, tensors)


def models():
    chatml = "{{ '<|im_start|>' + role + content + '<|im_end|>' }}"
    qwen = bpe_meta("qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], chatml)
    yarn = [("rope.scaling.type", STR, "yarn"), ("rope.scaling.factor", F32, 4.0),
            ("rope.scaling.original_context_length", U32, 32)]
    gemma = [("attention.sliding_window", U32, 2), ("rope.freq_base", F32, 1e6)]
    yield "llama", model("llama", spm_meta([]), yarn)
    yield "qwen2", model("qwen2", qwen, types=(7, 3, 8, 30))
    yield "qwen3", model("qwen3", qwen, types=(2, 0, 7, 8))
    yield "gemma3", model("gemma3", spm_meta(["<start_of_turn>", "<end_of_turn>"]), gemma, layers=2)


def gguf_seeds(root):
    save(root, "gguf", "kinds", every_kind())
    save(root, "gguf", "empty", gguf([], []))
    save(root, "gguf", "spm", gguf(spm_meta([])[0], []))
    save(root, "gguf", "llama_bpe", gguf(bpe_meta("llama-bpe", ["<|begin_of_text|>", "<|eot_id|>"], "")[0], []))
    for name, data in models():
        save(root, "gguf", name, data)
        save(root, "model", name, data)


def mmproj(clip, types=(1, 8, 0, 30), legacy=False):
    """A tower of one layer, 32 wide, over 2 x 2 patches, with its projector."""
    w, ff, out = 32, 64, 8
    meta = [("general.architecture", STR, "clip"), ("clip.projector_type", STR, "mlp"),
            ("clip.has_vision_encoder", BOOL, 1), ("clip.use_gelu", BOOL, not clip),
            ("clip.vision.image_size", U32, 9), ("clip.vision.patch_size", U32, 4),
            ("clip.vision.embedding_length", U32, w), ("clip.vision.attention.head_count", U32, 2),
            ("clip.vision.block_count", U32, 1), ("clip.vision.feed_forward_length", U32, ff),
            ("clip.vision.attention.layer_norm_epsilon", F32, 1e-5), ("clip.vision.feature_layer", (ARR, I32), [1]),
            ("clip.vision.image_mean", (ARR, F32), [0.5] * 3), ("clip.vision.image_std", (ARR, F32), [0.5] * 3),
            ("clip.vision.image_grid_pinpoints", (ARR, I32), [9, 18])]
    tensors = [("v.patch_embd.weight", [4, 4, 3, w], 1), ("v.position_embd.weight", [w, 4 + clip], 0),
               ("model.image_newline", [out], 0)]
    tensors += [("v.class_embd", [w], 0), ("v.pre_ln.weight", [w], 0), ("v.pre_ln.bias", [w], 0)] if clip else \
        [("v.patch_embd.bias", [w], 0)]
    for n in ("ln1", "ln2"):
        tensors += [("v.blk.0.%s.%s" % (n, p), [w], 0) for p in ("weight", "bias")]
    for i, n in enumerate(("attn_q", "attn_k", "attn_v", "attn_out")):
        tensors += [("v.blk.0.%s.weight" % n, [w, w], types[i]), ("v.blk.0.%s.bias" % n, [w], 0)]
    up, down = ("ffn_down", "ffn_up") if legacy else ("ffn_up", "ffn_down")
    tensors += [("v.blk.0.%s.weight" % up, [w, ff], types[0]), ("v.blk.0.%s.weight" % down, [ff, w], types[1]),
                ("mm.0.weight", [w, ff], types[2]), ("mm.0.bias", [ff], 0), ("mm.2.weight", [ff, out], types[3])]
    return gguf(meta, tensors)


def vision_seeds(root):
    save(root, "vision", "siglip", mmproj(0))
    save(root, "vision", "clip", mmproj(1, types=(8, 2, 1, 0), legacy=True))
    save(root, "vision", "text", dict(models())["llama"])


# ---- Documents: the first byte chooses the reader, as in fuzz_document.c --------------------

def document_seeds(root):
    page = ("<!DOCTYPE html><html><head><title>T &amp; t</title><style>p{}</style></head><body><h1>One</h1>"
            "<p>a <b>b</b><br>c<ul><li>x<li><p>y<ol><li>1</ol></ul><pre>\n p\n</pre><table><tr><td>1<td>2</table>"
            "<script>var s='</p>';</script>&eacute;&#x20ac;</body></html>").encode()
    plain = "One line\r\nb\bbo\bold caf\u00e9 \u20ac \U0001f600\n\fpage\n".encode()
    save(root, "document", "text", b"\0" + plain)
    save(root, "document", "latin1", b"\0caf\xe9 na\xefve")
    save(root, "document", "utf16", b"\0" + "\ufeffone \U0001f600".encode("utf-16-le"))
    save(root, "document", "html", b"\1" + page)
    save(root, "document", "markdown", b"\2# One\n\n- two\n")
    save(root, "document", "gzip", b"\3" + gzip.compress(page, mtime=0))
    save(root, "document", "detected", b"\4" + page)


# ---- Arrays: the first byte chooses the reader (fuzz_arrays.c) -----------------------------

def array_seeds(root):
    for i, (descr, shape, n) in enumerate([("<f4", "(2, 3)", 24), ("|u1", "(5,)", 5), (">f8", "()", 8), ("<i8", "(0, 7)", 0)]):
        head = "{'descr': '%s', 'fortran_order': False, 'shape': %s, }" % (descr, shape)
        head += " " * (-(10 + len(head) + 1) % 64) + "\n"
        save(root, "arrays", "npy%d" % i, b"\0\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head.encode() + b"\1" * n)
    tensors = '{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]}}'
    for i, (json, n) in enumerate([(tensors, 14), ("{}", 0)]):
        save(root, "arrays", "safetensors%d" % i, b"\1" + struct.pack("<Q", len(json)) + json.encode() + b"\1" * n)


# ---- Sequences: a kind, then operations of three bytes (kv_ops.h) ---------------------------

def kv_seeds(root):
    read = bytes([0, 0, 200]) * 5
    for kind in range(7):
        save(root, "kv", "save%d" % kind, bytes([kind]) + read + bytes([5, 0, 0, 8, 0, 255, 6, 0, 250, 1, 0, 5, 3, 0, 0, 2, 0, 120])
             + read[:6] + bytes([10, 1, 9, 0, 1, 30, 7, 0, 255, 11, 0, 3, 0, 0, 60, 15, 0, 0, 1, 0, 3]))


# ---- Named weights: one layer of STORM, forward, and both directions -----------------------

def weight_seeds(root):
    d, e, st, r, k = 8, 16, 4, 2, 4
    for name, suffixes in (("forward", [""]), ("both", ["", "_b"])):
        t = [("norm.weight", [d]), ("norm.bias", [d]), ("mixer.in_proj.weight", [d, 2 * e]), ("mixer.out_proj.weight", [e, d])]
        for b in suffixes:
            t += [("mixer.conv1d%s.weight" % b, [k, e]), ("mixer.conv1d%s.bias" % b, [e]), ("mixer.x_proj%s.weight" % b, [e, r + 2 * st]),
                  ("mixer.dt_proj%s.weight" % b, [r, e]), ("mixer.dt_proj%s.bias" % b, [e]), ("mixer.A%s_log" % b, [st, e]),
                  ("mixer.D%s" % b, [e])]
        save(root, "weights", name, gguf([], [("layers.0." + n, dims, 0) for n, dims in t]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_seeds.py OUT_DIR")
    array_seeds(sys.argv[1])
    gguf_seeds(sys.argv[1])
    vision_seeds(sys.argv[1])
    document_seeds(sys.argv[1])
    kv_seeds(sys.argv[1])
    weight_seeds(sys.argv[1])
