/* q8_pack_avx512.c - f32 activations to Q8, the same bytes as kvf_q8_pack_ref (mm_ref.c says why).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>
#include <string.h>

#include "backend/cpu/mm_q8.h"

/* x / d in -127..127, to nearest even; NaN gives 0. */
static __m512i quants(__m512 x, __m512 d)
{
    __m512 r = _mm512_div_ps(x, d);
    __mmask16 ord = _mm512_cmp_ps_mask(r, r, _CMP_ORD_Q);
    r = _mm512_min_ps(_mm512_max_ps(r, _mm512_set1_ps(-127.0f)), _mm512_set1_ps(127.0f));
    return _mm512_maskz_cvtps_epi32(ord, r);
}

static void pack_block(__m512 v0, __m512 v1, int8_t *q, float *d, int32_t *sum)
{
    __m512i mask = _mm512_set1_epi32(0x7fffffff);
    __m512i a0 = _mm512_and_si512(_mm512_castps_si512(v0), mask);
    __m512i a1 = _mm512_and_si512(_mm512_castps_si512(v1), mask);
    int32_t top = _mm512_reduce_max_epi32(_mm512_max_epi32(a0, a1));
    *d = kvf_f32_from_bits((uint32_t)top) / 127.0f;
    *sum = 0;
    __m128i *o = (__m128i *)(void *)q;
    if (!(*d > 0.0f)) {
        memset(q, 0, KVF_Q8_BLOCK);
        return;
    }
    __m512 dv = _mm512_set1_ps(*d);
    __m512i i0 = quants(v0, dv), i1 = quants(v1, dv);
    *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(i0, i1));
    _mm_storeu_si128(o, _mm512_cvtepi32_epi8(i0));
    _mm_storeu_si128(o + 1, _mm512_cvtepi32_epi8(i1));
}

void kvf_q8_pack_avx512(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out)
{
    (void)n_tok;
    size_t bytes = kvf_q8_row_bytes(n_in);
    int64_t n = kvf_q8_blocks(n_in);
    for (int64_t t = t0; t < t1; t++) {
        kvf_q8_row row = kvf_q8_row_at(out, t, n_in);
        int8_t *q = (int8_t *)row.q; /* ours to write: out is not const */
        float *d = (float *)row.d;
        int32_t *sum = (int32_t *)row.sum;
        const float *xt = x + t * n_in;
        for (int64_t b = 0; b < n; b++) {
            int64_t left = n_in - 32 * b;
            uint32_t mask = left < 32 ? (1u << left) - 1u : 0xffffffffu;
            __m512 v0 = _mm512_maskz_loadu_ps((__mmask16)mask, xt + 32 * b);
            __m512 v1 = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), xt + 32 * b + 16);
            pack_block(v0, v1, q + 32 * b, &d[b], &sum[b]);
        }
        /* The padding of the three arrays. */
        char *end = (char *)out + (size_t)t * bytes + bytes;
        memset(q + 32 * n, 0, (size_t)((char *)d - (char *)(q + 32 * n)));
        memset(d + n, 0, (size_t)((char *)sum - (char *)(d + n)));
        memset(sum + n, 0, (size_t)(end - (char *)(sum + n)));
    }
}
