/* memory_avx2.c - memory_tmpl.h with vectors of 8, and scores of low-bit keys by VPMADDUBSW.
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

/* ---- Low-bit keys: queries times steps in int8, codes in uint8 ---------------------------------- */

/* For a group of KVF_DIGEST_GROUP tokens: x = q * step = scale * integers of 8 bits, and offset = q . lo,
 * for every lane. Four channels of a lane are one int32, as the byte products want them. */
typedef struct bits_rows {
    int32_t *x;            /* [head_dim / 4][n_lane] */
    float *scale, *offset; /* [n_lane] */
} bits_rows;

static void quantise_rows(const kvf_rows *r, const float *lo, const float *step, const bits_rows *out)
{
    for (int64_t lane = 0; lane < r->n_lane; lane += VF_LANES) {
        const float *q = r->q + lane;
        vf max = vf_set1(1e-30f), offset = vf_zero();
        for (int32_t c = 0; c < r->head_dim; c++) {
            vf z = vf_load(q + c * r->n_lane);
            max = vf_max(max, vf_abs(vf_mul(z, vf_set1(step[c]))));
            offset = vf_fma(z, vf_set1(lo[c]), offset);
        }
        vf_store(out->offset + lane, offset);
        vf_store(out->scale + lane, vf_div(max, vf_set1(127.0f)));
        vf inv = vf_div(vf_set1(127.0f), max);
        for (int32_t c = 0; c < r->head_dim; c += 4) {
            vf y[4];
            for (int i = 0; i < 4; i++)
                y[i] = vf_mul(vf_mul(vf_load(q + (c + i) * r->n_lane), vf_set1(step[c + i])), inv);
            vi_store(out->x + c / 4 * r->n_lane + lane, vi_pack_bytes(y[0], y[1], y[2], y[3]));
        }
    }
}

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

/* Best integer dot product of tokens t0..t1 (multiples of 16) of a group, for every lane: best [n_lane]. */
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

static void score_bits(const kvf_score_part *p)
{
    const kvf_rows *r = p->rows;
    const kvf_digest *g = p->digest;
    int32_t d = g->head_dim;
    size_t group_bytes = 4 * (size_t)d + (size_t)KVF_DIGEST_GROUP * (size_t)d * (size_t)g->bits / 8;
    float *lo = p->scratch, *step = lo + d, *scale = step + d, *offset = scale + r->n_lane;
    int32_t *best = (int32_t *)(void *)(offset + r->n_lane), *x = best + r->n_lane;
    bits_rows rows = { x, scale, offset };
    for (int32_t gr = 0; gr < KVF_DIGEST_BLOCK / KVF_DIGEST_GROUP; gr++) {
        const uint8_t *at = (const uint8_t *)p->row + (size_t)gr * group_bytes;
        int32_t first = gr * KVF_DIGEST_GROUP, end = first + KVF_DIGEST_GROUP;
        if (p->unit1 * p->unit <= first || p->unit0 * p->unit >= end) continue;
        widen(at, 2 * (size_t)d, lo);
        quantise_rows(r, lo, step, &rows);
        int32_t run = p->unit < KVF_DIGEST_GROUP ? p->unit : KVF_DIGEST_GROUP;
        for (int32_t t = first; t < end; t += run) {
            int32_t u = t / p->unit;
            if (u < p->unit0 || u >= p->unit1) continue;
            best_codes(p, at + 4 * (size_t)d, t - first, t - first + run, x, best);
            float *s = p->s + (u - p->unit0) * r->n_lane;
            bool more = t % p->unit != 0; /* the unit's first group was before */
            for (int64_t lane = 0; lane < r->n_lane; lane += VF_LANES) {
                vf y = vf_fma(vf_load(scale + lane), vi_to_vf(vi_load(best + lane)), vf_load(offset + lane));
                vf_store(s + lane, more ? vf_max(vf_load(s + lane), y) : y);
            }
        }
    }
}

/* lo, step, scale, offset, best, x, unpacked codes, bests. */
static size_t score_bits_scratch(const kvf_rows *r)
{
    size_t d = (size_t)r->head_dim, n = (size_t)r->n_lane;
    return (2 * d + 3 * n + d / 4 * n + 16 * d / 4 + 64 + 16 * n) * sizeof(float) + 256;
}

void kvf_cpu_memory_init_avx2(kvf_cpu_ops *ops)
{
    memory_init(ops, "avx2");
    ops->score_bits = score_bits;
    ops->score_bits_scratch_bytes = score_bits_scratch;
}
