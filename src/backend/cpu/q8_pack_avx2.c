/* q8_pack_avx2.c - f32 activations to Q8, the same bytes as kvf_q8_pack_ref (mm_ref.c says why).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>
#include <string.h>

#include "backend/cpu/mm_q8.h"

/* Largest of eight non-negative floats by their bits. */
static float top_of(__m256i a)
{
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
}

/* x / d in -127..127, to nearest even; NaN gives 0. */
static __m256i quants(__m256 x, __m256 d)
{
    __m256 r = _mm256_div_ps(x, d);
    __m256 ord = _mm256_cmp_ps(r, r, _CMP_ORD_Q);
    r = _mm256_min_ps(_mm256_max_ps(r, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(127.0f));
    return _mm256_cvtps_epi32(_mm256_and_ps(r, ord));
}

static int32_t sum_of(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    return _mm_cvtsi128_si32(s);
}

static void pack_block(const float *x, int8_t *q, float *d, int32_t *sum)
{
    __m256 v[4];
    __m256i mask = _mm256_set1_epi32(0x7fffffff), top = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v[i]), mask));
    }
    *d = top_of(top) / 127.0f;
    *sum = 0;
    if (!(*d > 0.0f)) {
        memset(q, 0, KVF_Q8_BLOCK);
        return;
    }
    __m256 dv = _mm256_set1_ps(*d);
    __m256i i0 = quants(v[0], dv), i1 = quants(v[1], dv), i2 = quants(v[2], dv), i3 = quants(v[3], dv);
    *sum = sum_of(_mm256_add_epi32(_mm256_add_epi32(i0, i1), _mm256_add_epi32(i2, i3)));
    /* The packs work per 128-bit half: dwords come out as 0 2 4 6 1 3 5 7. */
    __m256i b = _mm256_packs_epi16(_mm256_packs_epi32(i0, i1), _mm256_packs_epi32(i2, i3));
    b = _mm256_permutevar8x32_epi32(b, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)(void *)q, b);
}

void kvf_q8_pack_avx2(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out)
{
    (void)n_tok;
    size_t bytes = kvf_q8_row_bytes(n_in);
    int64_t whole = n_in / KVF_Q8_BLOCK, rest = n_in % KVF_Q8_BLOCK, n = kvf_q8_blocks(n_in);
    for (int64_t t = t0; t < t1; t++) {
        kvf_q8_row row = kvf_q8_row_at(out, t, n_in);
        int8_t *q = (int8_t *)row.q; /* ours to write: out is not const */
        float *d = (float *)row.d;
        int32_t *sum = (int32_t *)row.sum;
        const float *xt = x + t * n_in;
        for (int64_t b = 0; b < whole; b++) pack_block(xt + 32 * b, q + 32 * b, &d[b], &sum[b]);
        if (rest) {
            float last[KVF_Q8_BLOCK] = { 0 };
            memcpy(last, xt + 32 * whole, (size_t)rest * sizeof *last);
            pack_block(last, q + 32 * whole, &d[whole], &sum[whole]);
        }
        /* The padding of the three arrays. */
        char *end = (char *)out + (size_t)t * bytes + bytes;
        memset(q + 32 * n, 0, (size_t)((char *)d - (char *)(q + 32 * n)));
        memset(d + n, 0, (size_t)((char *)sum - (char *)(d + n)));
        memset(sum + n, 0, (size_t)(end - (char *)(sum + n)));
    }
}
