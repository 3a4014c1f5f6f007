/* dequant_tmpl.h - the SIMD dequantisation, once for AVX2 and AVX-512.
 *
 * The including file defines put16(dst, bytes, s, m): 16 signed bytes to dst[i] = s * byte - m, in
 * that order of operations, and from_half(dst, src, bf16): 16 numbers of 2 bytes to f32.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/unpack_avx2.h"

KVF_INLINE void put32(float *dst, __m256i v, float s, float m)
{
    put16(dst, _mm256_castsi256_si128(v), s, m);
    put16(dst + 16, _mm256_extracti128_si256(v, 1), s, m);
}

KVF_INLINE void blocks32(kvf_dtype type, const uint8_t *p, float *dst, int64_t n)
{
    const bool min = type == KVF_DTYPE_Q4_1 || type == KVF_DTYPE_Q5_1;
    const __m256i offset = _mm256_set1_epi8((char)(type == KVF_DTYPE_Q8_0 ? 0 : kvf_offset_of(type)));
    for (int64_t i = 0; i < n; i += 32, p += kvf_block_bytes(type)) {
        __m256i v = _mm256_sub_epi8(kvf_unpack32(type, p), offset);
        put32(dst + i, v, kvf_f16_at(p), min ? -kvf_f16_at(p + 2) : 0.0f);
    }
}

KVF_INLINE void blocks_k(kvf_dtype type, const uint8_t *p, float *dst, int64_t n)
{
    for (int64_t i = 0; i < n; i += 256, p += kvf_block_bytes(type)) {
        uint8_t scale[16];
        _mm_storeu_si128((__m128i *)(void *)scale, kvf_k_scales(p));
        float d = kvf_f16_at(p), dmin = kvf_f16_at(p + 2);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            put32(dst + i + 32 * j, kvf_unpack256(type, p, j), d * (float)scale[j],
                  dmin * (float)scale[j + 8]);
    }
}

static void blocks_q6(const uint8_t *p, float *dst, int64_t n)
{
    for (int64_t i = 0; i < n; i += 256, p += kvf_block_bytes(KVF_DTYPE_Q6_K)) {
        int8_t scale[16];
        memcpy(scale, p + 192, sizeof scale);
        float d = kvf_f16_at(p + 208);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            __m256i v = _mm256_sub_epi8(kvf_unpack256(KVF_DTYPE_Q6_K, p, j), _mm256_set1_epi8(32));
            put16(dst + i + 32 * j, _mm256_castsi256_si128(v), d * (float)scale[2 * j], 0.0f);
            put16(dst + i + 32 * j + 16, _mm256_extracti128_si256(v, 1), d * (float)scale[2 * j + 1], 0.0f);
        }
    }
}

static void halves(kvf_dtype type, const uint8_t *p, float *dst, int64_t n)
{
    const bool bf16 = type == KVF_DTYPE_BF16;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) from_half(dst + i, p + 2 * i, bf16);
    if (i < n) kvf_dequant_ref(type, p + 2 * i, dst + i, n - i);
}

static void dequant(kvf_dtype type, const void *src, float *dst, int64_t n)
{
    switch (type) {
    case KVF_DTYPE_F16:
    case KVF_DTYPE_BF16: halves(type, src, dst, n); break;
    case KVF_DTYPE_Q4_0: blocks32(KVF_DTYPE_Q4_0, src, dst, n); break;
    case KVF_DTYPE_Q4_1: blocks32(KVF_DTYPE_Q4_1, src, dst, n); break;
    case KVF_DTYPE_Q5_0: blocks32(KVF_DTYPE_Q5_0, src, dst, n); break;
    case KVF_DTYPE_Q5_1: blocks32(KVF_DTYPE_Q5_1, src, dst, n); break;
    case KVF_DTYPE_Q8_0: blocks32(KVF_DTYPE_Q8_0, src, dst, n); break;
    case KVF_DTYPE_Q4_K: blocks_k(KVF_DTYPE_Q4_K, src, dst, n); break;
    case KVF_DTYPE_Q5_K: blocks_k(KVF_DTYPE_Q5_K, src, dst, n); break;
    case KVF_DTYPE_Q6_K: blocks_q6(src, dst, n); break;
    default: kvf_dequant_ref(type, src, dst, n); break;
    }
}
