/* unpack_avx2.h - 32 quants of a weight block as 32 bytes, for the AVX2 and AVX-512 files.
 *
 * Quants come out unsigned, u = w + kvf_offset_of(type) (Q8_0: signed, as stored). Layouts are in
 * dequant_ref.c. `type` is a constant at every call, so that each use is a few instructions.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_UNPACK_AVX2_H
#define KVF_BACKEND_CPU_UNPACK_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "backend/cpu/mm_q8.h"

#define KVF_INLINE static inline __attribute__((always_inline))

KVF_INLINE uint32_t kvf_u32_at(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

KVF_INLINE uint64_t kvf_f16_bits(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

KVF_INLINE float kvf_f16_at(const uint8_t *p)
{
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128((int)kvf_f16_bits(p))));
}

KVF_INLINE __m128i kvf_load16(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)(const void *)p); }
KVF_INLINE __m256i kvf_load32(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* What makes signed quants unsigned. */
KVF_INLINE int kvf_offset_of(kvf_dtype type)
{
    return type == KVF_DTYPE_Q4_0   ? 8
           : type == KVF_DTYPE_Q5_0 ? 16
           : type == KVF_DTYPE_Q8_0 ? 128
           : type == KVF_DTYPE_Q6_K ? 32
                                    : 0;
}

/* Bytes of a block, as constants the compiler sees. */
KVF_INLINE int kvf_block_bytes(kvf_dtype type)
{
    switch (type) {
    case KVF_DTYPE_Q4_0: return 18;
    case KVF_DTYPE_Q4_1: return 20;
    case KVF_DTYPE_Q5_0: return 22;
    case KVF_DTYPE_Q5_1: return 24;
    case KVF_DTYPE_Q8_0: return 34;
    case KVF_DTYPE_Q4_K: return 144;
    case KVF_DTYPE_Q5_K: return 176;
    default: return 210; /* Q6_K */
    }
}

/* Byte i: 16 if bit i of the mask is set. */
KVF_INLINE __m256i kvf_bit4_of(uint32_t mask)
{
    const __m256i byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2,
                                          2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201u);
    __m256i v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)mask), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(16));
}

/* A block of a 32-element type. */
KVF_INLINE __m256i kvf_unpack32(kvf_dtype type, const uint8_t *b)
{
    if (type == KVF_DTYPE_Q8_0) return kvf_load32(b + 2);
    bool min = type == KVF_DTYPE_Q4_1 || type == KVF_DTYPE_Q5_1;
    bool five = type == KVF_DTYPE_Q5_0 || type == KVF_DTYPE_Q5_1;
    int head = min ? 4 : 2; /* f16 d, and f16 min */
    __m128i q = kvf_load16(b + head + (five ? 4 : 0));
    __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(q), _mm_srli_epi16(q, 4), 1);
    v = _mm256_and_si256(v, _mm256_set1_epi8(15));
    return five ? _mm256_or_si256(v, kvf_bit4_of(kvf_u32_at(b + head))) : v;
}

/* Elements 32 j .. 32 j + 31 of a 256-element type. */
KVF_INLINE __m256i kvf_unpack256(kvf_dtype type, const uint8_t *b, int j)
{
    const __m256i low = _mm256_set1_epi8(15);
    if (type == KVF_DTYPE_Q6_K) {
        int half = j / 4, run = j % 4;
        __m256i v = kvf_load32(b + 64 * half + 32 * (run & 1)), h = kvf_load32(b + 128 + 32 * half);
        if (run >= 2) v = _mm256_srli_epi16(v, 4);
        h = run == 0   ? _mm256_slli_epi16(h, 4)
            : run == 1 ? _mm256_slli_epi16(h, 2)
            : run == 3 ? _mm256_srli_epi16(h, 2)
                       : h;
        return _mm256_or_si256(_mm256_and_si256(v, low), _mm256_and_si256(h, _mm256_set1_epi8(0x30)));
    }
    __m256i v = kvf_load32(b + (type == KVF_DTYPE_Q4_K ? 16 : 48) + 32 * (j / 2));
    if (j & 1) v = _mm256_srli_epi16(v, 4);
    v = _mm256_and_si256(v, low);
    if (type == KVF_DTYPE_Q4_K) return v;
    __m256i bit = _mm256_set1_epi8((char)(1u << j));
    __m256i high = _mm256_cmpeq_epi8(_mm256_and_si256(kvf_load32(b + 16), bit), bit);
    return _mm256_or_si256(v, _mm256_and_si256(high, _mm256_set1_epi8(16)));
}

/* Q4_K and Q5_K: eight 6-bit scales in the low half, eight minima in the high half, as bytes. */
KVF_INLINE __m128i kvf_k_scales(const uint8_t *b)
{
    uint32_t s0 = kvf_u32_at(b + 4), s1 = kvf_u32_at(b + 8), s2 = kvf_u32_at(b + 12);
    uint32_t sc = (s2 & 0x0f0f0f0f) | (s0 >> 2 & 0x30303030);
    uint32_t mn = (s2 >> 4 & 0x0f0f0f0f) | (s1 >> 2 & 0x30303030);
    uint64_t scales = (s0 & 0x3f3f3f3f) | (uint64_t)sc << 32, minima = (s1 & 0x3f3f3f3f) | (uint64_t)mn << 32;
    return _mm_set_epi64x((long long)minima, (long long)scales);
}

/* f16 numbers of four blocks, `stride` bytes apart; past n the last one again, which then meets
 * an activation scale of zero. Plain loads and shifts: cheaper than a gather or inserts, which
 * compete with the arithmetic for ports. */
KVF_INLINE uint64_t kvf_four_scales(const uint8_t *p, int stride, int n)
{
    int b = n > 1 ? stride : 0, c = n > 2 ? 2 * stride : b, d = n > 3 ? 3 * stride : c;
    return kvf_f16_bits(p) | kvf_f16_bits(p + b) << 16 | kvf_f16_bits(p + c) << 32 |
           kvf_f16_bits(p + d) << 48;
}

#endif
