/* dequant_avx512.c - weights to f32, the same bits as kvf_dequant_ref.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/unpack_avx2.h"

KVF_INLINE void put16(float *dst, __m128i bytes, float s, float m)
{
    __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    _mm512_storeu_ps(dst, _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(s), v), _mm512_set1_ps(m)));
}

KVF_INLINE void from_half(float *dst, const uint8_t *src, bool bf16)
{
    __m256i h = kvf_load32(src);
    __m512 v =
        bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
    _mm512_storeu_ps(dst, v);
}

#include "backend/cpu/dequant_tmpl.h"

void kvf_dequant_avx512(kvf_dtype type, const void *src, float *dst, int64_t n)
{
    dequant(type, src, dst, n);
}
