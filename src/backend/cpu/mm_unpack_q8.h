/* mm_unpack_q8.h - rows of weight blocks as bytes and scales, for the int8 products.
 *
 * A row's codes come out one byte each in the order of k, and for every block of 32 two numbers:
 *
 *     kind    types                     weight                          pair
 *     SYM     Q4_0 Q5_0 Q8_0            s * (u - off)                   s, not used
 *     MIN     Q4_1 Q5_1 Q4_K Q5_K       s * u - m                       s, m
 *     HALF    Q6_K                      s * v, one s for 16 weights     s of the first 16, of the second
 *
 * u is unsigned, v signed (-32..31). Only AVX2 is used: both int8 kernels include this.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_MM_UNPACK_Q8_H
#define KVF_BACKEND_CPU_MM_UNPACK_Q8_H

#include <immintrin.h>
#include <string.h>

#include "base/dtype.h"

typedef enum q8_kind { Q8_SYM, Q8_MIN, Q8_HALF } q8_kind;

static inline q8_kind q8_kind_of(kvf_dtype type)
{
    if (type == KVF_DTYPE_Q6_K) return Q8_HALF;
    return type == KVF_DTYPE_Q4_0 || type == KVF_DTYPE_Q5_0 || type == KVF_DTYPE_Q8_0 ? Q8_SYM : Q8_MIN;
}

/* off of the SYM types. */
static inline int q8_offset(kvf_dtype type)
{
    return type == KVF_DTYPE_Q4_0 ? 8 : type == KVF_DTYPE_Q5_0 ? 16 : type == KVF_DTYPE_Q8_0 ? 128 : 0;
}

/* Where the codes and pairs of one row go. */
typedef struct q8_row_out {
    uint8_t *code;               /* 32 bytes a block, contiguous */
    float *pair;                 /* first number of block 0; the second is pair_gap floats on */
    int64_t pair_gap, block_gap; /* floats */
} q8_row_out;

static inline void q8_put_pair(const q8_row_out *o, int64_t block, float first, float second)
{
    o->pair[block * o->block_gap] = first;
    o->pair[block * o->block_gap + o->pair_gap] = second;
}

static inline void q8_put_codes(const q8_row_out *o, int64_t block, __m256i v)
{
    _mm256_store_si256((__m256i *)(void *)(o->code + 32 * block), v);
}

static inline float q8_f16(const uint8_t *p)
{
    unsigned short h;
    memcpy(&h, p, sizeof h);
    return _cvtsh_ss(h);
}

static inline __m256i q8_load32(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* 16 bytes to 32 codes: the low halves, then the high ones. */
static inline __m256i q8_nibbles(const uint8_t *p)
{
    __m128i v = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(v, 4), v), _mm256_set1_epi8(15));
}

/* Bit k of the word at p as 16 in byte k. */
static inline __m256i q8_bits(const uint8_t *p)
{
    int bits;
    memcpy(&bits, p, sizeof bits);
    const __m256i pick = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2,
                                          2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), pick), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(16));
}

/* Types of 32 weights a block: n blocks. */
static inline void q8_unpack_32(kvf_dtype type, const uint8_t *src, int64_t n, const q8_row_out *o)
{
    switch (type) {
    case KVF_DTYPE_Q4_0:
        for (int64_t b = 0; b < n; b++, src += 18) {
            q8_put_pair(o, b, q8_f16(src), 0);
            q8_put_codes(o, b, q8_nibbles(src + 2));
        }
        break;
    case KVF_DTYPE_Q4_1:
        for (int64_t b = 0; b < n; b++, src += 20) {
            q8_put_pair(o, b, q8_f16(src), -q8_f16(src + 2));
            q8_put_codes(o, b, q8_nibbles(src + 4));
        }
        break;
    case KVF_DTYPE_Q5_0:
        for (int64_t b = 0; b < n; b++, src += 22) {
            q8_put_pair(o, b, q8_f16(src), 0);
            q8_put_codes(o, b, _mm256_or_si256(q8_nibbles(src + 6), q8_bits(src + 2)));
        }
        break;
    case KVF_DTYPE_Q5_1:
        for (int64_t b = 0; b < n; b++, src += 24) {
            q8_put_pair(o, b, q8_f16(src), -q8_f16(src + 2));
            q8_put_codes(o, b, _mm256_or_si256(q8_nibbles(src + 8), q8_bits(src + 4)));
        }
        break;
    default: /* Q8_0 */
        for (int64_t b = 0; b < n; b++, src += 34) {
            q8_put_pair(o, b, q8_f16(src), 0);
            q8_put_codes(o, b, _mm256_xor_si256(q8_load32(src + 2), _mm256_set1_epi8((char)0x80)));
        }
    }
}

/* Scales and mins of a Q4_K or Q5_K block: 6 bits each, the upper two of 4..7 apart. */
static inline void q8_k_pairs(const uint8_t *src, const q8_row_out *o)
{
    uint32_t s[3], u[4];
    memcpy(s, src + 4, sizeof s);
    u[0] = s[0] & 0x3f3f3f3fu;
    u[1] = (s[2] & 0x0f0f0f0fu) | ((s[0] >> 2) & 0x30303030u);
    u[2] = s[1] & 0x3f3f3f3fu;
    u[3] = ((s[2] >> 4) & 0x0f0f0f0fu) | ((s[1] >> 2) & 0x30303030u);
    _Alignas(32) float v[16];
    __m128i all = _mm_loadu_si128((const __m128i *)(const void *)u);
    __m256 scale = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all));
    __m256 min = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)));
    _mm256_store_ps(v, _mm256_mul_ps(scale, _mm256_set1_ps(q8_f16(src))));
    _mm256_store_ps(v + 8, _mm256_mul_ps(min, _mm256_set1_ps(q8_f16(src + 2))));
    for (int j = 0; j < 8; j++) q8_put_pair(o, j, v[j], v[j + 8]);
}

/* One block of 256: codes of blocks 0..7 of o. */
static inline void q8_unpack_q4_k(const uint8_t *src, const q8_row_out *o)
{
    const __m256i low = _mm256_set1_epi8(15);
    q8_k_pairs(src, o);
    for (int j = 0; j < 4; j++) {
        __m256i q = q8_load32(src + 16 + 32 * j);
        q8_put_codes(o, 2 * j, _mm256_and_si256(q, low));
        q8_put_codes(o, 2 * j + 1, _mm256_and_si256(_mm256_srli_epi16(q, 4), low));
    }
}

static inline void q8_unpack_q5_k(const uint8_t *src, const q8_row_out *o)
{
    const __m256i low = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(16), one = _mm256_set1_epi8(1);
    q8_k_pairs(src, o);
    __m256i h = q8_load32(src + 16);
    for (int j = 0; j < 8; j++) {
        __m256i q = q8_load32(src + 48 + 32 * (j / 2));
        if (j & 1) q = _mm256_srli_epi16(q, 4);
        __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(h, one), one);
        q8_put_codes(o, j, _mm256_or_si256(_mm256_and_si256(q, low), _mm256_and_si256(set, bit)));
        h = _mm256_srli_epi16(h, 1);
    }
}

static inline void q8_unpack_q6_k(const uint8_t *src, const q8_row_out *o)
{
    const __m256i low = _mm256_set1_epi8(15), top = _mm256_set1_epi8(0x30), mid = _mm256_set1_epi8(32);
    float d = q8_f16(src + 208);
    for (int j = 0; j < 8; j++) {
        int half = j / 4, g = j % 4;
        const int8_t *scale = (const int8_t *)src + 192 + 2 * j;
        q8_put_pair(o, j, d * (float)scale[0], d * (float)scale[1]);
        __m256i q = q8_load32(src + 64 * half + 32 * (g & 1)), h = q8_load32(src + 128 + 32 * half);
        if (g >= 2) q = _mm256_srli_epi16(q, 4);
        h = g == 0   ? _mm256_slli_epi16(h, 4)
            : g == 1 ? _mm256_slli_epi16(h, 2)
            : g == 2 ? h
                     : _mm256_srli_epi16(h, 2);
        q = _mm256_or_si256(_mm256_and_si256(q, low), _mm256_and_si256(h, top));
        q8_put_codes(o, j, _mm256_sub_epi8(q, mid));
    }
}

/* Blocks block .. block + n of a row; for the K types block is a multiple of 8 and n is 8. */
static inline void q8_unpack(kvf_dtype type, const uint8_t *row, int64_t block, int64_t n,
                             const q8_row_out *o)
{
    switch (type) {
    case KVF_DTYPE_Q4_K: q8_unpack_q4_k(row + block / 8 * 144, o); break;
    case KVF_DTYPE_Q5_K: q8_unpack_q5_k(row + block / 8 * 176, o); break;
    case KVF_DTYPE_Q6_K: q8_unpack_q6_k(row + block / 8 * 210, o); break;
    default: q8_unpack_32(type, row + (size_t)block * (size_t)kvf_dtype_get(type)->bytes, n, o);
    }
}

#endif
