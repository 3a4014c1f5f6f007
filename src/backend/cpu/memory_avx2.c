/* memory_avx2.c - memory_tmpl.h with vectors of 8, and byte products by VPMADDUBSW.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx2.h"

static inline void vi_store(int32_t *p, __m256i x) { _mm256_storeu_si256((__m256i *)(void *)p, x); }
static inline vf vi_to_vf(__m256i x) { return _mm256_cvtepi32_ps(x); }

/* Lane by lane, four numbers in -127..127 to the bytes of an int32. */
static inline __m256i vi_pack_bytes(vf a, vf b, vf c, vf d)
{
    const __m256i low = _mm256_set1_epi32(255);
    __m256i x = _mm256_and_si256(_mm256_cvtps_epi32(a), low);
    x = _mm256_or_si256(x, _mm256_slli_epi32(_mm256_and_si256(_mm256_cvtps_epi32(b), low), 8));
    x = _mm256_or_si256(x, _mm256_slli_epi32(_mm256_and_si256(_mm256_cvtps_epi32(c), low), 16));
    return _mm256_or_si256(x, _mm256_slli_epi32(_mm256_cvtps_epi32(d), 24));
}

#include "backend/cpu/memory_tmpl.h"

/* Halves 0 and 1 of 16 tokens: [2][head_dim / 4] vectors of 8 tokens x 4 channels. */
MT_INLINE void unpack_codes(int bits, const uint8_t *codes, int32_t d, __m256i *out)
{
    int per = 8 / bits;
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    int32_t quads = d / 4;
    for (int32_t row = 0; row < quads / per; row++) {
        for (int half = 0; half < 2; half++) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(codes + row * 64 + half * 32));
            for (int i = 0; i < per; i++)
                out[half * quads + row * per + i] = _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(i * bits)), mask);
        }
    }
}

/* n rows with 8 tokens. Sums of 16 bits hold `calm` products of two codes and two query bytes. */
MT_INLINE void rows_codes(int n, const __m256i *codes, int32_t quads, int calm, const int32_t *x, int64_t n_lane, __m256i *top)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[4];
    for (int i = 0; i < n; i++) sum[i] = _mm256_setzero_si256();
    for (int32_t j = 0; j < quads;) {
        __m256i part[4];
        int32_t end = j + calm < quads ? j + calm : quads;
        for (int i = 0; i < n; i++) part[i] = _mm256_setzero_si256();
        for (; j < end; j++, x += n_lane)
            for (int i = 0; i < n; i++)
                part[i] = _mm256_add_epi16(part[i], _mm256_maddubs_epi16(codes[j], _mm256_set1_epi32(x[i])));
        for (int i = 0; i < n; i++) sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(part[i], ones));
    }
    for (int i = 0; i < n; i++) top[i] = _mm256_max_epi32(top[i], sum[i]);
}

static int32_t best_of(__m256i x)
{
    __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1));
    return _mm_cvtsi128_si32(y);
}

static void best_codes(const kvf_score_part *p, const uint8_t *codes, int32_t t0, int32_t t1, const int32_t *x, int32_t *best)
{
    const kvf_rows *r = p->rows;
    int32_t d = r->head_dim, quads = d / 4, bits = p->digest->bits;
    int calm = bits == 1 ? 128 : bits == 2 ? 42 : 8;
    size_t tile = (size_t)(16 * d) * (size_t)bits / 8;
    __m256i *open = (__m256i *)(void *)(((uintptr_t)(x + quads * r->n_lane) + 63) & ~(uintptr_t)63), *top = open + 2 * quads;
    int64_t n_row = r->n_q * r->pad;
    for (int64_t i = 0; i < n_row; i++) top[i] = _mm256_set1_epi32(INT32_MIN);
    for (int32_t t = t0; t < t1; t += 16) {
        const uint8_t *at = codes + (size_t)(t / 16) * tile;
        if (bits == 2)
            unpack_codes(2, at, d, open);
        else if (bits == 1)
            unpack_codes(1, at, d, open);
        else
            unpack_codes(4, at, d, open);
        for (int half = 0; half < 2; half++) {
            int64_t i = 0;
            for (; i + 4 <= n_row; i += 4) rows_codes(4, open + half * quads, quads, calm, x + i, r->n_lane, top + i);
            for (; i < n_row; i++) rows_codes(1, open + half * quads, quads, calm, x + i, r->n_lane, top + i);
        }
    }
    memset(best, 0, (size_t)r->n_lane * sizeof *best);
    for (int64_t i = 0; i < n_row; i++)
        if (i % r->pad < r->group) best[i] = best_of(top[i]);
}

void kvf_cpu_memory_init_avx2(kvf_cpu_ops *ops) { memory_init(ops, "avx2"); }
