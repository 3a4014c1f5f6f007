/* dequant_avx2.c - weights to f32, the same bits as kvf_dequant_ref.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/unpack_avx2.h"

KVF_INLINE void put8(float *dst, __m128i bytes, __m256 s, __m256 m)
{
    __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    _mm256_storeu_ps(dst, _mm256_sub_ps(_mm256_mul_ps(s, v), m));
}

KVF_INLINE void put16(float *dst, __m128i bytes, float s, float m)
{
    __m256 sv = _mm256_set1_ps(s), mv = _mm256_set1_ps(m);
    put8(dst, bytes, sv, mv);
    put8(dst + 8, _mm_srli_si128(bytes, 8), sv, mv);
}

KVF_INLINE void from_half(float *dst, const uint8_t *src, bool bf16)
{
    for (int i = 0; i < 16; i += 8) {
        __m128i h = kvf_load16(src + 2 * i);
        __m256 v =
            bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h);
        _mm256_storeu_ps(dst + i, v);
    }
}

#include "backend/cpu/dequant_tmpl.h"

void kvf_dequant_avx2(kvf_dtype type, const void *src, float *dst, int64_t n) { dequant(type, src, dst, n); }
