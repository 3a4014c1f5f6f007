/* quant.h - quantised weights as the device holds them, taken apart 32 values at a time.
 *
 * A row on the device is the file's row with every block cut in two: the parts that are whole 16-byte
 * words come first, block after block, then what is left of each block. So all loads of quants are aligned
 * 16-byte loads, and no byte more is read than the file has:
 *
 *     type   first part of a block (bytes)          rest of a block
 *     Q4_0   qs (16)                                d (2)
 *     Q4_1   qs (16)                                d, min (4)
 *     Q5_0   qs (16)                                d, qh (6)
 *     Q5_1   qs (16)                                d, min, qh (8)
 *     Q8_0   qs (32)                                d (2)
 *     Q4_K   the block (144)                        -
 *     Q5_K   the block (176)                        -
 *     Q6_K   ql, qh, scales (208)                   d (2)
 *     F32, F16, BF16: as in the file. Rows are padded to 16 bytes.
 *
 * Byte layouts of the blocks: src/backend/cpu/dequant_ref.c. Unit u of a row is the 32 values that one
 * 16-byte word of low bits leads to (Q8_0: two words): two runs of 16, each with its scale and minimum.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_CUDA_QUANT_H
#define KVF_CUDA_QUANT_H

#include "cuda/kernels.h"

struct kvf_cuda_layout {
    int32_t block; /* values; 1: a float type */
    int32_t bytes, head, rest;
    bool rest_first; /* in the file the rest stands before the first part */
};

static inline __attribute__((unused)) kvf_cuda_layout kvf_cuda_layout_of(kvf_dtype type)
{
    switch (type) {
    case KVF_DTYPE_Q4_0: return { 32, 18, 16, 2, true };
    case KVF_DTYPE_Q4_1: return { 32, 20, 16, 4, true };
    case KVF_DTYPE_Q5_0: return { 32, 22, 16, 6, true };
    case KVF_DTYPE_Q5_1: return { 32, 24, 16, 8, true };
    case KVF_DTYPE_Q8_0: return { 32, 34, 32, 2, true };
    case KVF_DTYPE_Q4_K: return { 256, 144, 144, 0, false };
    case KVF_DTYPE_Q5_K: return { 256, 176, 176, 0, false };
    case KVF_DTYPE_Q6_K: return { 256, 210, 208, 2, false };
    case KVF_DTYPE_F32: return { 1, 4, 4, 0, false };
    default: return { 1, 2, 2, 0, false };
    }
}

/* 32 values: q[0..3] are 16 signed bytes at place at[0] of the row, q[4..7] those at at[1]; value = s q - m. */
struct kvf_unit {
    int q[8];
    float s[2], m[2];
    int at[2];
};

KVF_DEV float kvf_half_at(const uint8_t *p) /* 2-byte aligned */
{
    uint16_t u = *reinterpret_cast<const uint16_t *>(p);
    f16 h;
    memcpy(&h, &u, 2);
    return kvf_f32(h);
}

/* Each byte of v (0..127) less n, as signed bytes. */
KVF_DEV int kvf_less(uint32_t v, uint32_t n) { return static_cast<int>(((v | 0x80808080u) - n * 0x01010101u) ^ 0x80808080u); }

/* Bits i .. i + 3 of v to bit 4 of the four bytes of a word. */
KVF_DEV uint32_t kvf_spread_bits(uint32_t v, int i)
{
    uint32_t b = v >> i;
    return (b & 1u) << 4 | (b & 2u) << 11 | (b & 4u) << 18 | (b & 8u) << 25;
}

/* 32 four-bit values of a small block, low halves first, with bit 4 from qh, less `offset`. */
KVF_DEV void kvf_unit_nibbles(kvf_unit *u, const uint8_t *qs, uint32_t qh, uint32_t offset)
{
    kvf_vec4u v = kvf_load16_once(qs);
    const uint32_t w[4] = { v.x, v.y, v.z, v.w };
    KVF_UNROLL
    for (int i = 0; i < 4; i++) {
        u->q[i] = kvf_less((w[i] & 0x0f0f0f0fu) | kvf_spread_bits(qh, 4 * i), offset);
        u->q[4 + i] = kvf_less((w[i] >> 4 & 0x0f0f0f0fu) | kvf_spread_bits(qh, 16 + 4 * i), offset);
    }
}

/* Scale and minimum j (0..7) of a Q4_K or Q5_K header: d, dmin, 12 bytes of 6-bit numbers. */
KVF_DEV void kvf_k_scale(kvf_vec4u h, int j, float d, float dmin, float *s, float *m)
{
    int at = 8 * (j & 3);
    uint32_t a = h.y >> at, b = h.z >> at, c = h.w >> at;
    uint32_t sc = j < 4 ? a & 63u : (c & 15u) | (a >> 6 & 3u) << 4;
    uint32_t mn = j < 4 ? b & 63u : (c >> 4 & 15u) | (b >> 6 & 3u) << 4;
    *s = d * static_cast<float>(sc);
    *m = dmin * static_cast<float>(mn);
}

KVF_DEV float kvf_low_half(uint32_t u)
{
    uint16_t v = static_cast<uint16_t>(u);
    f16 h;
    memcpy(&h, &v, 2);
    return kvf_f32(h);
}

/* Unit p of a Q4_K or Q5_K block. */
template <bool FIVE> KVF_DEV void kvf_unit_k(kvf_unit *u, const uint8_t *block, int p)
{
    int j = p >> 1, half = (p & 1) * 16;
    kvf_vec4u h = kvf_load16(block), v = kvf_load16_once(block + (FIVE ? 48 : 16) + 32 * j + half), x = { 0, 0, 0, 0 };
    if (FIVE) x = kvf_load16(block + 16 + half);
    const uint32_t w[4] = { v.x, v.y, v.z, v.w }, high[4] = { x.x, x.y, x.z, x.w };
    float d = kvf_low_half(h.x), dmin = kvf_low_half(h.x >> 16);
    KVF_UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t lo = w[i] & 0x0f0f0f0fu, hi = w[i] >> 4 & 0x0f0f0f0fu;
        if (FIVE) {
            lo |= (high[i] >> (2 * j) & 0x01010101u) << 4;
            hi |= (high[i] >> (2 * j + 1) & 0x01010101u) << 4;
        }
        u->q[i] = static_cast<int>(lo);
        u->q[4 + i] = static_cast<int>(hi);
    }
    kvf_k_scale(h, 2 * j, d, dmin, &u->s[0], &u->m[0]);
    kvf_k_scale(h, 2 * j + 1, d, dmin, &u->s[1], &u->m[1]);
    u->at[0] = 64 * j + half;
    u->at[1] = 64 * j + 32 + half;
}

KVF_DEV void kvf_unit_q6(kvf_unit *u, const uint8_t *block, const uint8_t *rest, int p)
{
    int h = p >> 2, k = p >> 1 & 1, half = (p & 1) * 16;
    kvf_vec4u v = kvf_load16_once(block + 64 * h + 32 * k + half), x = kvf_load16(block + 128 + 32 * h + half);
    const uint32_t w[4] = { v.x, v.y, v.z, v.w }, high[4] = { x.x, x.y, x.z, x.w };
    KVF_UNROLL
    for (int i = 0; i < 4; i++) {
        u->q[i] = kvf_less((w[i] & 0x0f0f0f0fu) | (high[i] >> (2 * k) & 0x03030303u) << 4, 32);
        u->q[4 + i] = kvf_less((w[i] >> 4 & 0x0f0f0f0fu) | (high[i] >> (2 * k + 4) & 0x03030303u) << 4, 32);
    }
    float d = kvf_half_at(rest);
    const int8_t *sc = reinterpret_cast<const int8_t *>(block + 192);
    u->at[0] = 128 * h + 32 * k + half;
    u->at[1] = u->at[0] + 64;
    u->s[0] = d * static_cast<float>(sc[u->at[0] / 16]);
    u->s[1] = d * static_cast<float>(sc[u->at[1] / 16]);
    u->m[0] = u->m[1] = 0.0f;
}

/* Unit i of a row; rest: where the second parts of the row begin. */
template <kvf_dtype TYPE> KVF_DEV void kvf_unit_load(kvf_unit *u, const uint8_t *row, const uint8_t *rest, int i)
{
    if (TYPE == KVF_DTYPE_Q4_K || TYPE == KVF_DTYPE_Q5_K || TYPE == KVF_DTYPE_Q6_K) {
        int b = i >> 3, p = i & 7;
        if (TYPE == KVF_DTYPE_Q4_K) kvf_unit_k<false>(u, row + static_cast<size_t>(b) * 144, p);
        if (TYPE == KVF_DTYPE_Q5_K) kvf_unit_k<true>(u, row + static_cast<size_t>(b) * 176, p);
        if (TYPE == KVF_DTYPE_Q6_K) kvf_unit_q6(u, row + static_cast<size_t>(b) * 208, rest + static_cast<size_t>(b) * 2, p);
        u->at[0] += b * 256;
        u->at[1] += b * 256;
        return;
    }
    u->at[0] = i * 32;
    u->at[1] = i * 32 + 16;
    u->m[0] = 0.0f;
    size_t at = static_cast<size_t>(i);
    if (TYPE == KVF_DTYPE_Q8_0) {
        kvf_vec4u a = kvf_load16_once(row + at * 32), b = kvf_load16_once(row + at * 32 + 16);
        const uint32_t w[8] = { a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w };
        KVF_UNROLL
        for (int k = 0; k < 8; k++) u->q[k] = static_cast<int>(w[k]);
        u->s[0] = kvf_half_at(rest + at * 2);
    } else if (TYPE == KVF_DTYPE_Q4_0) {
        kvf_unit_nibbles(u, row + at * 16, 0, 8);
        u->s[0] = kvf_half_at(rest + at * 2);
    } else if (TYPE == KVF_DTYPE_Q4_1) {
        kvf_unit_nibbles(u, row + at * 16, 0, 0);
        u->s[0] = kvf_half_at(rest + at * 4);
        u->m[0] = -kvf_half_at(rest + at * 4 + 2);
    } else {
        const int step = TYPE == KVF_DTYPE_Q5_0 ? 6 : 8;
        const uint8_t *r = rest + at * static_cast<size_t>(step);
        const uint16_t *qh = reinterpret_cast<const uint16_t *>(r + step - 4);
        kvf_unit_nibbles(u, row + at * 16, qh[0] | static_cast<uint32_t>(qh[1]) << 16, TYPE == KVF_DTYPE_Q5_0 ? 16 : 0);
        u->s[0] = kvf_half_at(r);
        if (TYPE == KVF_DTYPE_Q5_1) u->m[0] = -kvf_half_at(r + 2);
    }
    u->s[1] = u->s[0];
    u->m[1] = u->m[0];
}

/* Where the second parts of a row begin. */
KVF_DEV size_t kvf_rest_at(kvf_dtype type, int64_t n_in)
{
    switch (type) {
    case KVF_DTYPE_Q6_K: return static_cast<size_t>(n_in / 256) * 208;
    case KVF_DTYPE_Q8_0: return static_cast<size_t>(n_in);
    default: return static_cast<size_t>(n_in / 32) * 16;
    }
}

#endif
