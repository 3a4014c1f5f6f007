#!/usr/bin/env python3
# make_mmproj.py - random vision towers with projectors, as llama.cpp's converters name things.
#
#     python3 scripts/make_mmproj.py fixtures [OUT_DIR]     tests/data/vision_tower: models and what they compute
#     python3 scripts/make_mmproj.py model PRESET OUT.gguf [--set key=value ...] [--type F16]
#     python3 scripts/make_mmproj.py compare           llama.cpp's mtmd against this pass (needs llama-cpp-python)
#
# `fixtures` writes <name>.gguf with <name>.embd.npy, .pooled.npy, .features.npy, .scores.npy: the forward
# pass in this file, float64 on the dequantised weights, written from the papers and not from src/, so that
# the two can disagree. The frames are pixels() below, which tests repeat in C. Output is the same on every
# machine (frozen random generator, no time, no paths).
#
# `model` writes one file of a preset's shape: onevision, llava16, so400m (full size: 27 layers, 810 MB as
# F16), clip-l (full size). --set changes the shape: --set layers=2 --set image=56.
#
# SPDX-License-Identifier: Apache-2.0
import math
import os
import struct
import sys

import numpy as np

from make_tiny_models import TYPES, gguf_str, gguf_value

SIGLIP = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "eps": 1e-6, "act": "gelu_tanh", "clip": False}
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711], "eps": 1e-5,
        "act": "gelu_quick", "clip": True}

# image, patch, width, heads, ff, layers: the ViT; mid, out: the projector. feature: the key's value, or None.
# legacy: names as llama.cpp's legacy script writes them. newline: the tensor's name.
PRESETS = {
    "onevision": {**SIGLIP, "image": 59, "patch": 8, "width": 64, "heads": 4, "ff": 96, "layers": 3, "mid": 96, "out": 64,
                  "feature": 2, "legacy": False, "newline": "v.image_newline",
                  "pinpoints": [59, 118, 118, 59, 118, 118], "types": ["F16"]},
    "llava16": {**CLIP, "image": 32, "patch": 8, "width": 64, "heads": 2, "ff": 128, "layers": 2, "mid": 64, "out": 96,
                "feature": None, "legacy": True, "newline": "model.image_newline",
                "pinpoints": [32, 64, 64, 32, 64, 64], "types": ["Q8_0", "F16", "Q4_0", "BF16"]},
    "head72": {**SIGLIP, "image": 20, "patch": 4, "width": 144, "heads": 2, "ff": 64, "layers": 1, "mid": 48, "out": 40,
               "feature": 1, "legacy": False, "newline": None, "pinpoints": None, "types": ["F32", "F16"]},
    "so400m": {**SIGLIP, "image": 384, "patch": 14, "width": 1152, "heads": 16, "ff": 4304, "layers": 27, "mid": 3584,
               "out": 3584, "feature": 26, "legacy": False, "newline": "v.image_newline", "pinpoints": None, "types": ["F16"]},
    "clip-l": {**CLIP, "image": 336, "patch": 14, "width": 1024, "heads": 16, "ff": 4096, "layers": 23, "mid": 4096,
               "out": 4096, "feature": None, "legacy": False, "newline": "v.image_newline", "pinpoints": None, "types": ["F16"]},
}
FIXTURES = ["onevision", "llava16", "head72"]
N_FRAMES = 2

# ---- Tensors ------------------------------------------------------------------------------------


def encode(x, kind):
    """Array -> (dims fastest first, type, bytes) and the array as the file holds it."""
    _, block, quantise, dequantise = TYPES[kind]
    body = np.ascontiguousarray(quantise(np.asarray(x, np.float64).reshape(-1, block)))
    return (list(x.shape[::-1]), kind, body.tobytes()), dequantise(body).reshape(x.shape)


def names(shape):
    """Tensor names of a layer: (ours, the file's)."""
    up, down = ("ffn_down", "ffn_up") if shape["legacy"] else ("ffn_up", "ffn_down")
    return [("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_out"), ("up", up), ("down", down)]


def meta_of(s, name):
    meta = {"general.architecture": "clip", "general.name": name, "clip.has_vision_encoder": True,
            "clip.projector_type": "mlp", "clip.use_gelu": s["act"] == "gelu_tanh", "clip.use_silu": s["act"] == "silu",
            "clip.vision.image_size": s["image"], "clip.vision.patch_size": s["patch"],
            "clip.vision.embedding_length": s["width"], "clip.vision.feed_forward_length": s["ff"],
            "clip.vision.attention.head_count": s["heads"], "clip.vision.block_count": s["layers"],
            "clip.vision.projection_dim": 0, "clip.vision.attention.layer_norm_epsilon": s["eps"],
            "clip.vision.image_mean": s["mean"], "clip.vision.image_std": s["std"]}
    if s["legacy"]:
        meta["clip.has_text_encoder"] = False
        meta["clip.has_llava_projector"] = True
    if s["feature"] is not None:
        meta["clip.vision.feature_layer"] = [s["feature"]]
    if s["pinpoints"]:
        meta["clip.vision.image_grid_pinpoints"] = s["pinpoints"]
        meta["clip.vision.mm_patch_merge_type"] = "spatial_unpad"
    return meta


class Tower:
    """Weights by our names, as the file holds them, and the file's tensors."""

    def __init__(self, shape):
        self.s, self.w, self.tensors, self.turn = shape, {}, {}, 0

    def put(self, ours, theirs, x, kind):
        self.tensors[theirs], self.w[ours] = encode(np.asarray(x), kind)

    def matrix(self, ours, theirs, x, kind=None):
        """kind None: the next of the shape's types whose blocks fit, F16 if none does."""
        for _ in self.s["types"]:
            if kind is None:
                kind, self.turn = self.s["types"][self.turn % len(self.s["types"])], self.turn + 1
                kind = None if x.shape[-1] % TYPES[kind][1] else kind
        kind = kind or "F16"
        self.put(ours, theirs, x, kind)

    def write(self, path, name):
        """As write_gguf of make_tiny_models.py, but tensor by tensor: full-size towers are large."""
        meta = meta_of(self.s, name)
        head, at = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(meta)), 0
        for key, v in meta.items():
            kind, body = gguf_value(v)
            head += gguf_str(key) + struct.pack("<I", kind) + body
        for tensor, (dims, kind, body) in self.tensors.items():
            head += gguf_str(tensor) + struct.pack("<I%dQIQ" % len(dims), len(dims), *dims, TYPES[kind][0], at)
            at += len(body) + -len(body) % 32
        with open(path, "wb") as f:
            f.write(head + b"\0" * (-len(head) % 32))
            for _, _, body in self.tensors.values():
                f.write(body + b"\0" * (-len(body) % 32))


def random_tower(s, seed):
    t, r = Tower(s), np.random.RandomState(seed)
    w, n_in, n = s["width"], 3 * s["patch"] ** 2, (s["image"] // s["patch"]) ** 2 + s["clip"]

    def normal(*dims, gain=1.0):
        return (r.standard_normal(dims).astype(np.float32) * np.float32(gain)).astype(np.float64)

    t.put("patch", "v.patch_embd.weight", normal(w, 3, s["patch"], s["patch"], gain=1 / math.sqrt(n_in)), "F16")
    if not s["clip"]:
        t.put("patch_b", "v.patch_embd.bias", normal(w, gain=0.1), "F32")
    else:
        t.put("class", "v.class_embd", normal(w), "F32")
        t.put("pre_w", "v.pre_ln.weight", 1 + normal(w, gain=0.1), "F32")
        t.put("pre_b", "v.pre_ln.bias", normal(w, gain=0.1), "F32")
    t.put("pos", "v.position_embd.weight", normal(n, w, gain=0.5), "F32")
    for i in range(s["layers"]):
        b = "v.blk.%d." % i
        for ln in ("ln1", "ln2"):
            t.put("%s_w%d" % (ln, i), b + ln + ".weight", 1 + normal(w, gain=0.1), "F32")
            t.put("%s_b%d" % (ln, i), b + ln + ".bias", normal(w, gain=0.1), "F32")
        for ours, theirs in names(s):
            n_out, n_from = (s["ff"], w) if ours == "up" else (w, s["ff"]) if ours == "down" else (w, w)
            gain = 2.0 if ours in "qk" else 1.0  # attention with some contrast
            t.matrix(ours + str(i), b + theirs + ".weight", normal(n_out, n_from, gain=gain / math.sqrt(n_from)))
            t.put(ours + "_b" + str(i), b + theirs + ".bias", normal(n_out, gain=0.1), "F32")
    t.matrix("mm0", "mm.0.weight", normal(s["mid"], w, gain=1 / math.sqrt(w)))
    t.put("mm0_b", "mm.0.bias", normal(s["mid"], gain=0.1), "F32")
    t.matrix("mm2", "mm.2.weight", normal(s["out"], s["mid"], gain=1 / math.sqrt(s["mid"])))
    t.put("mm2_b", "mm.2.bias", normal(s["out"], gain=0.1), "F32")
    if s["newline"]:
        t.put("newline", s["newline"], normal(s["out"]), "F32")
    return t


# ---- The forward pass, float64 --------------------------------------------------------------------


def pixels(n, side):
    """Frames [n][3][side][side] in -2..2: xorshift32, the same numbers as in tests/unit/vision_rig.h."""
    x, out = 2463534242, np.empty(n * 3 * side * side)
    for i in range(out.size):
        x ^= (x << 13) & 0xffffffff
        x ^= x >> 17
        x ^= (x << 5) & 0xffffffff
        out[i] = (x >> 8) / 2.0 ** 22 - 2.0
    return out.reshape(n, 3, side, side)


def layernorm(x, w, b, eps):
    m = x.mean(axis=-1, keepdims=True)
    return (x - m) / np.sqrt(((x - m) ** 2).mean(axis=-1, keepdims=True) + eps) * w + b


def gelu_erf(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


ACT = {
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    "gelu_quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu_erf": gelu_erf,
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def attention(s, q, k, v):
    """One frame: [positions][width] each. Returns the output and the mean attention each position got."""
    n, d = q.shape[0], s["width"] // s["heads"]
    q, k, v = (a.reshape(n, s["heads"], d).transpose(1, 0, 2) for a in (q, k, v))
    e = q @ k.transpose(0, 2, 1) / math.sqrt(d)
    e = np.exp(e - e.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return (p @ v).transpose(1, 0, 2).reshape(n, -1), p.mean(axis=(0, 1))


def forward(t, frames, projector=gelu_erf):
    """features [n][patches][width], embd [n][patches][out], scores [n][patches]."""
    s, w, g = t.s, t.w, t.s["image"] // t.s["patch"]
    feature = s["feature"] if s["feature"] is not None else s["layers"]
    out = []
    for x in frames:
        x = x[:, :g * s["patch"], :g * s["patch"]].reshape(3, g, s["patch"], g, s["patch"])
        x = x.transpose(1, 3, 0, 2, 4).reshape(g * g, -1) @ w["patch"].reshape(s["width"], -1).T
        if "class_last" in w:  # as llama.cpp puts it since its towers share one graph
            x = np.concatenate([x, w["class"][None]])
        elif s["clip"]:
            x = np.concatenate([w["class"][None], x])
        else:
            x = x + w["patch_b"]
        x = x + w["pos"]
        if s["clip"]:
            x = layernorm(x, w["pre_w"], w["pre_b"], s["eps"])
        for i in range(feature):
            def lin(name, a):
                return a @ w[name + str(i)].T + w["%s_b%d" % (name, i)]
            h = layernorm(x, w["ln1_w%d" % i], w["ln1_b%d" % i], s["eps"])
            o, score = attention(s, lin("q", h), lin("k", h), lin("v", h))
            x = x + lin("o", o)
            h = layernorm(x, w["ln2_w%d" % i], w["ln2_b%d" % i], s["eps"])
            x = x + lin("down", ACT[s["act"]](lin("up", h)))
        x, score = x[s["clip"]:], score[s["clip"]:]
        out.append((x, projector(x @ w["mm0"].T + w["mm0_b"]) @ w["mm2"].T + w["mm2_b"], score))
    return [np.stack(a) for a in zip(*out)]


def pool_bilinear(x, g):
    """[n][g * g][c] -> [n][side * side][c], side = ceil(g / 2), corners not aligned."""
    side = (g + 1) // 2
    at = np.maximum((np.arange(side) + 0.5) * g / side - 0.5, 0)
    low = at.astype(int)
    m = np.zeros((side, g))
    for i in range(side):
        m[i, low[i]] += 1 - (at[i] - low[i])
        m[i, min(low[i] + 1, g - 1)] += at[i] - low[i]
    x = x.reshape(len(x), g, g, -1)
    return np.einsum("ya,xb,nabc->nyxc", m, m, x).reshape(len(x), side * side, -1)


# ---- llama.cpp ------------------------------------------------------------------------------------


def mtmd_embd(path, text_path, image):
    """What llama.cpp computes for one picture [side][side][3] of bytes: [patches][out]."""
    import ctypes
    import llama_cpp
    from llama_cpp import mtmd_cpp as m
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *a: None)
    mtmd_embd.keep = quiet
    m.mtmd_log_set(quiet, None)
    m.mtmd_helper_log_set(quiet, None)
    llama_cpp.llama_log_set(quiet, None)
    p = llama_cpp.llama_model_default_params()
    p.use_extra_bufts = False
    text = llama_cpp.llama_model_load_from_file(text_path.encode(), p)
    cp = m.mtmd_context_params_default()
    cp.use_gpu, cp.n_threads, cp.warmup, cp.flash_attn_type = False, 1, False, 0
    ctx = m.mtmd_init_from_file(path.encode(), text, cp)
    data = np.ascontiguousarray(image).reshape(-1)
    bitmap = m.mtmd_bitmap_init(image.shape[1], image.shape[0], data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    chunks, prompt = m.mtmd_input_chunks_init(), m.mtmd_input_text()
    prompt.text, prompt.add_special, prompt.parse_special = m.mtmd_default_marker(), False, True
    prompt.text_len = len(prompt.text)
    assert m.mtmd_tokenize(ctx, chunks, ctypes.byref(prompt), (m.mtmd_bitmap_p_ctypes * 1)(bitmap), 1) == 0
    for i in range(m.mtmd_input_chunks_size(chunks)):
        chunk = m.mtmd_input_chunks_get(chunks, i)
        if m.mtmd_input_chunk_get_type(chunk) == 1:  # an image
            n = m.mtmd_input_chunk_get_n_tokens(chunk)
            assert m.mtmd_encode_chunk(ctx, chunk) == 0
            out = np.ctypeslib.as_array(m.mtmd_get_output_embd(ctx), (n, llama_cpp.llama_model_n_embd(text))).copy()
    m.mtmd_input_chunks_free(chunks)
    m.mtmd_bitmap_free(bitmap)
    m.mtmd_free(ctx)
    llama_cpp.llama_model_free(text)
    return out.astype(np.float64)


def error(x, want):
    return np.abs(x - want).max() / np.abs(want).max()


def compare(folder):
    """One frame of bytes at the tower's own size, so that nothing is resized; random weights as F32 and as they
    are. CLIP twice: as published, and as llama.cpp computes it (docs/vision.md)."""
    import tempfile
    text = os.path.join(folder, "tiny", "qwen2.gguf")
    for seed, name in enumerate(FIXTURES):
        s = {**PRESETS[name], "out": 256, "pinpoints": None}
        image = np.random.RandomState(3).randint(0, 256, (s["image"], s["image"], 3)).astype(np.uint8)
        x = ((image / 255.0 - np.array(s["mean"])) / np.array(s["std"])).transpose(2, 0, 1)[None]
        for types in (["F32"], s["types"]):
            t = random_tower({**s, "types": types}, 200 + seed)
            with tempfile.NamedTemporaryFile(suffix=".gguf") as f:
                t.write(f.name, name)
                theirs = mtmd_embd(f.name, text, image)
            ours = forward(t, x, ACT["gelu_tanh"])[1][0]
            print("%-10s %-20s mtmd against float64: %.2e of the largest value" % (name, ",".join(types), error(theirs, ours)))
            if s["clip"]:
                t.s, t.w["class_last"] = {**t.s, "feature": t.s["layers"] - 1}, True
                print("%-31s class token last, one layer fewer: %.2e" % ("", error(theirs, forward(t, x, ACT["gelu_tanh"])[1][0])))


# ---- Commands ---------------------------------------------------------------------------------------


def write_fixtures(folder):
    os.makedirs(folder, exist_ok=True)
    for seed, name in enumerate(FIXTURES):
        t = random_tower(PRESETS[name], 100 + seed)
        t.write(os.path.join(folder, name + ".gguf"), "kvfold random " + name)
        frames = pixels(N_FRAMES, t.s["image"]).astype(np.float32).astype(np.float64)
        features, embd, scores = forward(t, frames)
        pooled = pool_bilinear(embd, t.s["image"] // t.s["patch"])
        for what, x in (("features", features), ("embd", embd), ("scores", scores), ("pooled", pooled)):
            np.save(os.path.join(folder, "%s.%s.npy" % (name, what)), x.astype(np.float32))


def write_model(args):
    if len(args) < 2 or args[0] not in PRESETS:
        sys.exit("make_mmproj.py: model PRESET OUT.gguf [--set key=value] [--type TYPE]; presets: " + " ".join(PRESETS))
    s, rest = dict(PRESETS[args[0]]), args[2:]
    while len(rest) >= 2:
        if rest[0] == "--type":
            s["types"] = rest[1].split(",")
        else:
            key, value = rest[1].split("=")
            s[key] = float(value) if isinstance(s[key], float) else value if isinstance(s[key], str) else int(value)
        rest = rest[2:]
    if s["feature"] is not None and s["feature"] > s["layers"]:
        s["feature"] = s["layers"]
    random_tower(s, 7).write(args[1], "kvfold random " + args[0])


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.argv[1:2] == ["fixtures"]:
        write_fixtures(sys.argv[2] if len(sys.argv) > 2 else os.path.join(here, "..", "tests", "data", "vision_tower"))
    elif sys.argv[1:2] == ["model"]:
        write_model(sys.argv[2:])
    elif sys.argv[1:2] == ["compare"]:
        compare(os.path.join(here, "..", "tests", "data"))
    else:
        sys.exit("make_mmproj.py: fixtures [OUT_DIR] | model PRESET OUT.gguf [--set key=value] [--type TYPE] | compare")


if __name__ == "__main__":
    main()
