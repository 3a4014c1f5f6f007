/* attn.h - what the attention kernels share: query rows, visibility, tiles in shared memory.
 *
 * A KV head's query rows are packed: row r of a call is token r / group, head r % group of the group, so
 * that all heads of a group share the keys and values that are loaded.
 *
 * Tiles in shared memory are rows of DP = 64, 128 or 256 halves; head_dim is padded with zeros to DP.
 * The 16-byte chunk c of row r lies at chunk c ^ (r & 7): eight rows of a chunk then hit all banks, which
 * ldmatrix needs.
 *
 * What no query of a tile sees (holes, keys past the end) is never loaded: zeros stand there instead, since
 * a weight of 0 times NaN would be NaN.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_CUDA_ATTN_H
#define KVF_CUDA_ATTN_H

#include "cuda/kernels.h"

template <int DP> KVF_DEV int kvf_swizzle(int row, int chunk) { return row * DP + ((chunk ^ (row & 7)) << 3); }

/* Keys lo <= j <= hi of the list are those that a token sees, holes apart. Both rise with the token. */
struct kvf_seen {
    int lo, hi;
};

KVF_DEV kvf_seen kvf_seen_by(const kvf_cuda_attn &a, int tok)
{
    int64_t last = a.place ? a.place[tok] : a.q_first + tok, lo = a.window > 0 ? last - a.window + 1 : 0;
    if (a.first && a.first[tok] > lo) lo = a.first[tok];
    kvf_seen s;
    s.hi = static_cast<int>(last < a.n_key ? last : a.n_key - 1);
    s.lo = static_cast<int>(lo < 0 ? 0 : lo > a.n_key ? a.n_key : lo);
    return s;
}

/* Places v0 <= place < v1 of an entry hold keys. */
struct kvf_places {
    int v0, v1;
};

KVF_DEV kvf_places kvf_places_of(const kvf_cuda_attn &a, int entry)
{
    kvf_places p = { 0, KVF_BLOCK };
    if (a.valid) {
        p.v0 = a.valid[2 * entry];
        p.v1 = a.valid[2 * entry + 1];
    }
    return p;
}

/* The first tile of n keys at or after k (in steps) that is not all hole; >= end: none. */
KVF_DEV int kvf_next_tile(const kvf_cuda_attn &a, int k, int end, int n, int step)
{
    if (!a.valid) return k;
    for (; k < end; k += step) {
        kvf_places p = kvf_places_of(a, k >> KVF_BLOCK_SHIFT);
        int at = k & (KVF_BLOCK - 1);
        if (p.v0 < p.v1 && p.v0 < at + n && p.v1 > at) break;
    }
    return k;
}

/* Keys (v: values) k .. k + n of KV head h to a tile, by `threads` threads of which this is number `me`;
 * keys outside `seen` and holes become zeros. */
template <int DP>
KVF_DEV void kvf_load_tile(const kvf_cuda_attn &a, int h, int k, int n, kvf_seen seen, f16 *tile_k, f16 *tile_v, int me, int threads)
{
    const int chunks = DP / 8;
    int e = k >> KVF_BLOCK_SHIFT, at = k & (KVF_BLOCK - 1), d = a.head_dim;
    kvf_places p = kvf_places_of(a, e);
    const f16 *key = a.slot[e] + static_cast<size_t>(h) * KVF_BLOCK * d;
    const f16 *value = key + static_cast<size_t>(a.n_head_kv) * KVF_BLOCK * d;
    KVF_UNROLL_BY(2) /* registers hold the sums */
    for (int i = me; i < n * chunks; i += threads) {
        int r = i / chunks, c = i % chunks, place = at + r;
        bool real = place >= p.v0 && place < p.v1 && k + r >= seen.lo && k + r <= seen.hi && c * 8 < d;
        size_t from = real ? static_cast<size_t>(place) * d + c * 8 : 0;
        int to = kvf_swizzle<DP>(r, c);
        kvf_cp_async16(tile_k + to, key + from, real);
        if (tile_v) kvf_cp_async16(tile_v + to, value + from, real);
    }
}

/* Into the range of f16; NaN stays NaN. */
KVF_DEV float kvf_clamp_f16(float x) { return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x; }

/* Eight channels of a query times scale to f16, and, with `low`, what that rounding left out. */
KVF_DEV void kvf_query_chunk(const float *q, float scale, bool real, f16 *high, f16 *low)
{
    kvf_vec4u h = { 0, 0, 0, 0 }, l = { 0, 0, 0, 0 };
    if (real) {
        kvf_vec4u a = kvf_load16(q), b = kvf_load16(q + 4);
        const uint32_t w[8] = { a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w };
        uint32_t ph[4], pl[4];
        KVF_UNROLL
        for (int i = 0; i < 4; i++) {
            float x = kvf_clamp_f16(kvf_float(w[2 * i]) * scale), y = kvf_clamp_f16(kvf_float(w[2 * i + 1]) * scale);
            f16 xh = kvf_f16_of(x), yh = kvf_f16_of(y);
            ph[i] = kvf_pack(xh, yh);
            pl[i] = kvf_pack(kvf_f16_of(x - kvf_f32(xh)), kvf_f16_of(y - kvf_f32(yh)));
        }
        h = { ph[0], ph[1], ph[2], ph[3] };
        l = { pl[0], pl[1], pl[2], pl[3] };
    }
    kvf_store16(high, h);
    if (low) kvf_store16(low, l);
}

/* Scores leave the product in units of log 2: exp2 is one instruction. A cap is tanh of them first. */
KVF_DEV float kvf_query_scale(const kvf_cuda_attn &a) { return a.softcap > 0.0f ? a.scale / a.softcap : a.scale * KVF_LOG2E; }

/* Where row (tok, head) of split z goes. */
KVF_DEV size_t kvf_out_row(const kvf_cuda_attn &a, int tok, int head, int z)
{
    return (static_cast<size_t>(a.n_split > 1 ? z : 0) * a.n_tok + tok) * a.n_head + head;
}

#endif
