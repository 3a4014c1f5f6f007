#!/usr/bin/env python3
"""Lesson 8: the tokens that kvfold video keeps, read by llama.cpp.

    kvfold video clip.mp4 --mmproj mmproj.gguf -o clip
    08_merged_to_llama_cpp.py MODEL.gguf clip.safetensors "What happens in the video?"

A batch of llama.cpp holds tokens or embeddings. So the prompt is three batches: the words in front, the
video's embeddings (llama_batch.embd) at the positions that follow, the words behind. Needs llama-cpp-python
and numpy. mtmd's own helper cannot be used here: it fixes count and positions to whole images.

SPDX-License-Identifier: Apache-2.0
"""
import ctypes
import json
import struct
import sys

import llama_cpp as L
import numpy as np


def embeddings(path):
    """Tensor "embeddings" of a safetensors file, f32 [M, D]."""
    with open(path, "rb") as f:
        n, = struct.unpack("<Q", f.read(8))
        head = json.loads(f.read(n))
        t = head["embeddings"]
        f.seek(8 + n + t["data_offsets"][0])
        raw = f.read(t["data_offsets"][1] - t["data_offsets"][0])
    kind = {"F32": np.float32, "F16": np.float16}[t["dtype"]]
    return np.ascontiguousarray(np.frombuffer(raw, kind).reshape(t["shape"]), np.float32)


def decode(ctx, at, tokens=None, embd=None, last=False):
    """One batch from position `at` on; returns the position behind it."""
    n = len(tokens) if embd is None else len(embd)
    b = L.llama_batch_init(n, 0 if embd is None else embd.shape[1], 1)
    b.n_tokens = n
    for i in range(n):
        if embd is None:
            b.token[i] = tokens[i]
        b.pos[i], b.n_seq_id[i], b.logits[i] = at + i, 1, last and i == n - 1
        b.seq_id[i][0] = 0
    if embd is not None:
        ctypes.memmove(b.embd, embd.ctypes.data, embd.nbytes)
    if L.llama_decode(ctx, b):
        sys.exit("llama.cpp refuses the batch")
    L.llama_batch_free(b)
    return at + n


def main(path, video, question):
    L.llama_backend_init()
    model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
    vocab, rows = L.llama_model_get_vocab(model), embeddings(video)
    if rows.shape[1] != L.llama_model_n_embd(model):
        sys.exit("the embeddings have %d numbers, the model reads %d" % (rows.shape[1], L.llama_model_n_embd(model)))
    params = L.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(rows) + 1024
    ctx = L.llama_init_from_model(model, params)

    def tokens(text):
        data, out = text.encode(), (L.llama_token * 4096)()
        return list(out[:L.llama_tokenize(vocab, data, len(data), out, 4096, False, True)])

    at = decode(ctx, 0, tokens("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"))
    at = decode(ctx, at, embd=rows)
    at = decode(ctx, at, tokens("\n\n%s<|im_end|>\n<|im_start|>assistant\n" % question), last=True)
    n_vocab, piece = L.llama_vocab_n_tokens(vocab), ctypes.create_string_buffer(256)
    for _ in range(128):
        token = int(np.argmax(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, -1), (n_vocab,))))
        if L.llama_vocab_is_eog(vocab, token):
            break
        n = L.llama_token_to_piece(vocab, token, piece, 256, 0, False)
        sys.stdout.buffer.write(piece.raw[:n])
        at = decode(ctx, at, [token], last=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
