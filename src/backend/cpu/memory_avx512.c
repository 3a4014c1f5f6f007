/* memory_avx512.c - memory_tmpl.h with vectors of 16, and byte products by VNNI.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx512.h"

static inline void vi_store(int32_t *p, __m512i x) { _mm512_storeu_si512(p, x); }
static inline vf vi_to_vf(__m512i x) { return _mm512_cvtepi32_ps(x); }

/* Lane by lane, four numbers in -127..127 to the bytes of an int32. */
static inline __m512i vi_pack_bytes(vf a, vf b, vf c, vf d)
{
    const __m512i low = _mm512_set1_epi32(255);
    __m512i x = _mm512_and_si512(_mm512_cvtps_epi32(a), low);
    x = _mm512_or_si512(x, _mm512_slli_epi32(_mm512_and_si512(_mm512_cvtps_epi32(b), low), 8));
    x = _mm512_or_si512(x, _mm512_slli_epi32(_mm512_and_si512(_mm512_cvtps_epi32(c), low), 16));
    return _mm512_or_si512(x, _mm512_slli_epi32(_mm512_cvtps_epi32(d), 24));
}

#include "backend/cpu/memory_tmpl.h"

/* 16 tokens x head_dim channels of codes to bytes: [head_dim / 4] vectors of 16 tokens x 4 channels. */
MT_INLINE void unpack_codes(int bits, const uint8_t *codes, int32_t d, __m512i *out)
{
    int per = 8 / bits;
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    for (int32_t row = 0; row < d / 4 / per; row++) {
        __m512i x = _mm512_loadu_si512(codes + row * 64);
        for (int i = 0; i < per; i++)
            _mm512_storeu_si512(out++, _mm512_and_si512(_mm512_srl_epi16(x, _mm_cvtsi32_si128(i * bits)), mask));
    }
}

/* n rows, lanes lane..lane + n, with 16 tokens; the best of each lane's 16 partial bests goes on. */
MT_INLINE void rows_codes(int n, const __m512i *codes, int32_t quads, const int32_t *x, int64_t n_lane, __m512i *top)
{
    __m512i sum[8];
    for (int i = 0; i < n; i++) sum[i] = _mm512_setzero_si512();
    for (int32_t j = 0; j < quads; j++, x += n_lane) {
        __m512i c = _mm512_loadu_si512(codes + j);
        for (int i = 0; i < n; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], c, _mm512_set1_epi32(x[i]));
    }
    for (int i = 0; i < n; i++) top[i] = _mm512_max_epi32(top[i], sum[i]);
}

static void best_codes(const kvf_score_part *p, const uint8_t *codes, int32_t t0, int32_t t1, const int32_t *x, int32_t *best)
{
    const kvf_rows *r = p->rows;
    int32_t d = r->head_dim, quads = d / 4, bits = p->digest->bits;
    size_t tile = (size_t)(16 * d) * (size_t)bits / 8;
    __m512i *open = (__m512i *)(void *)(((uintptr_t)(x + quads * r->n_lane) + 63) & ~(uintptr_t)63), *top = open + quads;
    int64_t n_row = r->n_q * r->pad;
    for (int64_t i = 0; i < n_row; i++) top[i] = _mm512_set1_epi32(INT32_MIN);
    for (int32_t t = t0; t < t1; t += 16) {
        const uint8_t *at = codes + (size_t)(t / 16) * tile;
        if (bits == 2)
            unpack_codes(2, at, d, open);
        else if (bits == 1)
            unpack_codes(1, at, d, open);
        else
            unpack_codes(4, at, d, open);
        if (r->group == 7) { /* 7 query heads a KV head: the eighth row of each query is nobody's */
            for (int64_t i = 0; i < n_row; i += 8) rows_codes(7, open, quads, x + i, r->n_lane, top + i);
            continue;
        }
        int64_t i = 0;
        for (; i + 8 <= n_row; i += 8) rows_codes(8, open, quads, x + i, r->n_lane, top + i);
        for (; i + 2 <= n_row; i += 2) rows_codes(2, open, quads, x + i, r->n_lane, top + i);
        for (; i < n_row; i++) rows_codes(1, open, quads, x + i, r->n_lane, top + i);
    }
    memset(best, 0, (size_t)r->n_lane * sizeof *best);
    for (int64_t i = 0; i < n_row; i++)
        if (i % r->pad < r->group) best[i] = _mm512_reduce_max_epi32(top[i]);
}

void kvf_cpu_memory_init_avx512(kvf_cpu_ops *ops) { memory_init(ops, "avx512_vnni"); }
