#!/usr/bin/env python3
# make_vision_oracles.py - what Hugging Face's classes and Pillow compute, as fixtures for the vision tower.
#
#     python3 scripts/make_vision_oracles.py [OUT_DIR]     (needs torch, transformers, Pillow)
#
# Writes into tests/data/vision_tower:
#   hf_siglip.gguf, hf_clip.gguf      random SiglipVisionModel and CLIPVisionModel with a LLaVA projector,
#                                     F16 weights (the models are run with the rounded ones)
#   *.hidden<k>.npy, *.attention<k>.npy  hidden state after layer k; attention received in it, mean over
#                                     heads and queries, as HoliTom takes it; both without the class token
#   *.embd.npy                        the projector's output from layer 2
#   resize_<mode>_<w>x<h>.npy         bytes [S][S][3] after Pillow's bicubic resize, as the processors do it
# The frames are pixels() of make_mmproj.py, the pictures those of tests/unit/test_vision_resize.c.
#
# SPDX-License-Identifier: Apache-2.0
import os
import sys

import numpy as np

import make_mmproj as mm

LAYERS, READ = 3, 2
SHAPES = {
    "hf_siglip": {**mm.SIGLIP, "image": 30, "patch": 5, "width": 48, "heads": 3, "ff": 64, "layers": LAYERS, "mid": 40,
                  "out": 32, "feature": READ, "legacy": False, "newline": None, "pinpoints": None, "types": ["F16"]},
    "hf_clip": {**mm.CLIP, "image": 24, "patch": 6, "width": 48, "heads": 2, "ff": 96, "layers": LAYERS, "mid": 32,
                "out": 48, "feature": None, "legacy": True, "newline": None, "pinpoints": None, "types": ["F16"]},
}
RESIZES = [("onevision", "stretch", w, h) for w, h in
           ((1, 1), (59, 59), (40, 23), (60, 58), (320, 180), (59, 400), (1280, 720))]
RESIZES += [("llava16", "crop", w, h) for w, h in ((100, 75), (75, 101), (33, 32), (20, 10))]
RESIZES += [("llava16", "pad", w, h) for w, h in ((100, 75), (31, 90), (48, 48))]

# ---- Hugging Face -----------------------------------------------------------------------------------


def hf_model(name, s):
    import transformers as tr
    sizes = {"hidden_size": s["width"], "intermediate_size": s["ff"], "num_hidden_layers": s["layers"],
             "num_attention_heads": s["heads"], "image_size": s["image"], "patch_size": s["patch"],
             "layer_norm_eps": s["eps"]}
    if name == "hf_siglip":
        config, kind = tr.SiglipVisionConfig(**sizes, hidden_act="gelu_pytorch_tanh"), tr.SiglipVisionModel
    else:
        config, kind = tr.CLIPVisionConfig(**sizes, hidden_act="quick_gelu"), tr.CLIPVisionModel
    config._attn_implementation = "eager"  # attentions are asked for
    return kind(config).eval()


def randomise(torch, state, seed):
    """Weights with some contrast, rounded to what the file holds."""
    r = np.random.RandomState(seed)
    for key in sorted(state):
        shape = tuple(state[key].shape)
        if "position_ids" in key:
            continue
        x = r.standard_normal(shape).astype(np.float32)
        if key.endswith("bias"):
            x = 0.1 * x
        elif "norm" in key or "layrnorm" in key:
            x = 1 + 0.1 * x
        elif len(shape) > 1 and "position" not in key:
            x = x * (2 if "q_proj" in key or "k_proj" in key else 1) / np.sqrt(np.prod(shape[1:]))
            x = x.astype(np.float16).astype(np.float32)
        elif "position" in key:
            x = 0.5 * x
        state[key] = torch.tensor(x)
    return state


def to_tower(s, state, projector):
    t, part = mm.Tower(s), {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj", "up": "fc1", "down": "fc2"}
    w = {k.replace("vision_model.", ""): v.numpy().astype(np.float64) for k, v in state.items()}
    t.put("patch", "v.patch_embd.weight", w["embeddings.patch_embedding.weight"], "F16")
    if s["clip"]:
        t.put("class", "v.class_embd", w["embeddings.class_embedding"], "F32")
        t.put("pre_w", "v.pre_ln.weight", w["pre_layrnorm.weight"], "F32")
        t.put("pre_b", "v.pre_ln.bias", w["pre_layrnorm.bias"], "F32")
    else:
        t.put("patch_b", "v.patch_embd.bias", w["embeddings.patch_embedding.bias"], "F32")
    t.put("pos", "v.position_embd.weight", w["embeddings.position_embedding.weight"], "F32")
    for i in range(s["layers"]):
        a, b = "encoder.layers.%d." % i, "v.blk.%d." % i
        for n in ("1", "2"):
            t.put("ln%s_w%d" % (n, i), b + "ln%s.weight" % n, w[a + "layer_norm%s.weight" % n], "F32")
            t.put("ln%s_b%d" % (n, i), b + "ln%s.bias" % n, w[a + "layer_norm%s.bias" % n], "F32")
        for ours, theirs in mm.names(s):
            src = a + ("mlp." if ours in ("up", "down") else "self_attn.") + part[ours]
            t.put(ours + str(i), b + theirs + ".weight", w[src + ".weight"], "F16")
            t.put(ours + "_b" + str(i), b + theirs + ".bias", w[src + ".bias"], "F32")
    for key, theirs in (("linear_1", "mm.0"), ("linear_2", "mm.2")):
        t.put(key, theirs + ".weight", projector[key + ".weight"].numpy().astype(np.float64), "F16")
        t.put(key + "_b", theirs + ".bias", projector[key + ".bias"].numpy().astype(np.float64), "F32")
    return t


def hugging_face(folder):
    import torch
    torch.set_num_threads(1)
    for seed, (name, s) in enumerate(SHAPES.items()):
        model = hf_model(name, s)
        state = randomise(torch, model.state_dict(), 40 + seed)
        model.load_state_dict(state)
        r = randomise(torch, {"linear_1.weight": torch.zeros(s["mid"], s["width"]), "linear_1.bias": torch.zeros(s["mid"]),
                              "linear_2.weight": torch.zeros(s["out"], s["mid"]), "linear_2.bias": torch.zeros(s["out"])},
                      60 + seed)
        to_tower(s, state, r).write(os.path.join(folder, name + ".gguf"), "kvfold random " + name)
        x = torch.tensor(mm.pixels(mm.N_FRAMES, s["image"]))
        with torch.no_grad():
            model = model.double()  # the yardstick's own rounding stays out of the comparison
            out = model(x, output_hidden_states=True, output_attentions=True)
            for k in range(1, LAYERS + 1):
                # After the last layer some versions hand out the normalised state: run its layer instead.
                hidden, score = out.hidden_states[k], out.attentions[k - 1].mean(dim=(1, 2))
                if k == LAYERS:
                    hidden = last_layer(model, out.hidden_states[k - 1])
                save(folder, "%s.hidden%d" % (name, k), hidden[:, s["clip"]:])
                save(folder, "%s.attention%d" % (name, k), score[:, s["clip"]:])
            h = out.hidden_states[READ][:, s["clip"]:]
            r = {k: v.double() for k, v in r.items()}
            h = torch.nn.functional.gelu(h @ r["linear_1.weight"].T + r["linear_1.bias"])
            save(folder, name + ".embd", h @ r["linear_2.weight"].T + r["linear_2.bias"])


def last_layer(model, hidden):
    inner = getattr(model, "vision_model", model)
    kind, layer = type(inner).__name__, inner.encoder.layers[-1]
    out = layer(hidden, None) if "Siglip" in kind else layer(hidden, None, None)
    return out[0] if isinstance(out, tuple) else out


def save(folder, name, x):
    np.save(os.path.join(folder, name + ".npy"), x.numpy().astype(np.float32))


# ---- Pillow -------------------------------------------------------------------------------------------


def picture(w, h):
    x, out = 2463534242, np.empty((h, w, 3), np.uint8)
    for row in range(h):
        for col in range(w):
            for c in range(3):
                x ^= (x << 13) & 0xffffffff
                x ^= x >> 17
                x ^= (x << 5) & 0xffffffff
                v = col * (c + 1) * 255 // (w * 3) + (90 if (row // 5 + col // 7) % 2 else 0) + (x >> 26)
                out[row, col, c] = min(v, 255)
    return out


def resized(s, mode, image):
    from PIL import Image
    side, (w, h) = s["image"], image.size
    if mode == "pad":
        square = Image.new("RGB", (max(w, h),) * 2, tuple(int(m * 255) for m in s["mean"]))
        square.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
        image, mode = square, "stretch"
    if mode == "stretch":
        return np.asarray(image.resize((side, side), Image.BICUBIC))
    nw, nh = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    x = np.asarray(image.resize((nw, nh), Image.BICUBIC))
    top, left = (nh - side) // 2, (nw - side) // 2
    return x[top:top + side, left:left + side]


def processors_agree(s, mode, image, want):
    """The models' own processors give these bytes (up to the rounding of their normalisation)."""
    import transformers as tr
    if mode == "pad":
        return  # LLaVA's own code pads before it calls the processor
    if mode == "stretch":
        p = tr.SiglipImageProcessor(size={"height": s["image"], "width": s["image"]}, resample=3,
                                    image_mean=s["mean"], image_std=s["std"])
    else:
        p = tr.CLIPImageProcessor(size={"shortest_edge": s["image"]}, resample=3, crop_size=s["image"],
                                  image_mean=s["mean"], image_std=s["std"])
    got = p(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0].transpose(1, 2, 0)
    back = (got * np.array(s["std"]) + np.array(s["mean"])) * 255
    error = np.abs(back - want).max()
    assert error < 1e-3, "the processor's %s differs by %g" % (mode, error)


def pillow(folder):
    from PIL import Image
    for model, mode, w, h in RESIZES:
        s, image = mm.PRESETS[model], Image.fromarray(picture(w, h))
        want = resized(s, mode, image)
        processors_agree(s, mode, image, want)
        np.save(os.path.join(folder, "resize_%s_%dx%d.npy" % (mode, w, h)), want)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "..", "tests", "data", "vision_tower")
    os.makedirs(folder, exist_ok=True)
    pillow(folder)
    hugging_face(folder)


if __name__ == "__main__":
    main()
