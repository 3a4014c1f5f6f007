#!/usr/bin/env python3
"""cuda_peers.py - attention of PyTorch (and FlashInfer, where its wheel is) on the shapes of bench_cuda.

    cuda_peers.py [--json FILE] [--quick]

Every backend of scaled_dot_product_attention, FlexAttention with a block mask, and FlashInfer, each on random
bf16 inputs, warmed up (cuDNN and Triton compile in their first call), median of single calls between events.
A peer that a shape or a machine lacks is left out with its reason. Exit code 77 without PyTorch or a device.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import statistics
import sys

# name, queries, keys, query heads, KV heads, head size, causal (at the end of the keys)
SHAPES = [
    ("decode 1 x 6272 causal, 32/8 heads of 128", 1, 6272, 32, 8, 128, False),
    ("decode 1 x 32768 causal, 32/8 heads of 128", 1, 32768, 32, 8, 128, False),
    ("decode 1 x 131072 causal, 32/8 heads of 128", 1, 131072, 32, 8, 128, False),
    ("decode 1 x 32768 causal, 14/2 heads of 64", 1, 32768, 14, 2, 64, False),
    ("prefill 512 x 6272 causal, 32/8 heads of 128", 512, 6272, 32, 8, 128, True),
    ("prefill 512 x 6272, 32/8 heads of 128", 512, 6272, 32, 8, 128, False),
    ("prefill 2048 x 2048 causal, 32/8 heads of 128", 2048, 2048, 32, 8, 128, True),
    ("prefill 4096 x 32768 causal, 32/8 heads of 128", 4096, 32768, 32, 8, 128, True),
    ("prefill 512 x 6272 causal, 14/2 heads of 64", 512, 6272, 14, 2, 64, True),
    ("prefill 512 x 6272 causal, 8/4 heads of 256", 512, 6272, 8, 4, 256, True),
    # A layer's attention to a text of 128K: times the layers, what a first token costs at least (cuda_models.py).
    ("prefill 131072 x 131072 causal, 32/8 heads of 128", 131072, 131072, 32, 8, 128, True),
]


def timed(torch, call, repeat):
    """Median microseconds of one call."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def sdpa_calls(torch, q, k, v, causal):
    """Peers of scaled_dot_product_attention: name, call."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    mask = None
    if causal and q.shape[2] != k.shape[2]:
        from torch.nn.attention.bias import causal_lower_right
        mask = causal_lower_right(q.shape[2], k.shape[2])
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        def call(backend=backend):
            with sdpa_kernel(backend):
                return sdpa(q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True)
        yield "torch " + backend.name.lower(), call


def flex_call(torch, q, k, v, causal):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    compiled = torch.compile(flex_attention)
    shift = k.shape[2] - q.shape[2]
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: j <= i + shift, None, None, q.shape[2], k.shape[2])
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def flashinfer_call(q, k, v, causal):
    import flashinfer
    nhd = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    if q.shape[2] == 1:
        return lambda: flashinfer.single_decode_with_kv_cache(nhd[0][0], nhd[1], nhd[2], use_tensor_cores=True)
    return lambda: flashinfer.single_prefill_with_kv_cache(*nhd, causal=causal)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--json")
    ap.add_argument("--quick", action="store_true")
    args = ap.parse_args()
    try:
        import torch
    except ImportError:
        print("cuda_peers: there is no PyTorch", file=sys.stderr)
        return 77
    if not torch.cuda.is_available():
        print("cuda_peers: there is no CUDA device", file=sys.stderr)
        return 77
    rows, left_out = [], []
    for name, nq, nk, hq, hkv, d, causal in SHAPES:
        if args.quick and nk > 40000:
            continue
        make = lambda h, n: torch.randn(1, h, n, d, device="cuda", dtype=torch.bfloat16)
        q, k, v = make(hq, nq), make(hkv, nk), make(hkv, nk)
        peers = list(sdpa_calls(torch, q, k, v, causal))
        others = (("torch flex_attention", lambda: flex_call(torch, q, k, v, causal)),
                  ("flashinfer", lambda: flashinfer_call(q, k, v, causal)))
        for peer, build in others if nq <= 32768 else ():  # a block mask of 128K x 128K fills the device
            try:
                peers.append((peer, build()))
            except Exception as e:  # a missing wheel, an old version
                left_out.append({"name": name, "peer": peer, "why": str(e).split("\n")[0][:200]})
        for peer, call in peers:
            try:
                us = timed(torch, call, 5 if nq > 32768 else 10 if args.quick else 50)
            except Exception as e:  # a shape it does not take
                left_out.append({"name": name, "peer": peer, "why": str(e).split("\n")[0][:200]})
                continue
            rows.append({"name": name, "peer": peer, "us": us})
            print(f"{name:48} {peer:28} {us:10.2f} us", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"torch": torch.__version__, "rows": rows, "left_out": left_out}, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
