/* memory_avx2.c - memory_tmpl.h with vectors of 8, and scores of low-bit keys by VPMADDUBSW.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx2.h"

#include "backend/cpu/memory_tmpl.h"
#include "base/unroll.h"

/* ---- Low-bit keys: queries times steps in int8, codes in uint8 ----------------------------------
 * As vote_avx512.c, with products of 16 bits: 4 rows x 16 tokens of them stay in registers, for which each
 * step loads two vectors of codes and one row's bytes in all lanes four times. */

enum { CHUNK = 4, TILES = KVF_DIGEST_GROUP / 16 };

/* Scratch of one call, cut from kvf_score_part.scratch. */
typedef struct bits_mem {
    __m256i *open;         /* [TILES][2][head_dim / 4]: 8 tokens x 4 channels of codes, a byte each */
    float *product;        /* [head_dim][VF_LANES] */
    int32_t *x;            /* [head_dim / 4][n_lane]: four channels of a lane, 8 bits each */
    float *scale, *offset; /* [n_lane] */
    float *lo, *step;      /* [head_dim] */
} bits_mem;

static size_t score_bits_scratch(const kvf_rows *r)
{
    size_t d = (size_t)r->head_dim, n = (size_t)r->n_lane;
    return TILES * 2 * (d / 4) * sizeof(__m256i) + (d * VF_LANES + d / 4 * n + 2 * n + 2 * d) * sizeof(float);
}

static bits_mem cut_scratch(const kvf_score_part *p)
{
    int64_t d = p->rows->head_dim, n = p->rows->n_lane;
    bits_mem m = { .open = p->scratch };
    m.product = (float *)(void *)(m.open + TILES * 2 * (d / 4));
    m.x = (int32_t *)(void *)(m.product + d * VF_LANES);
    m.scale = (float *)(void *)(m.x + d / 4 * n);
    m.offset = m.scale + n;
    m.lo = m.offset + n;
    m.step = m.lo + d;
    return m;
}

/* 8 lanes of a group of KVF_DIGEST_GROUP tokens: q * step = scale * integers of 8 bits, and offset = q . lo.
 * Four partial maxima and sums hide the latency of one chain of them. */
static void quantise_lanes(const kvf_rows *r, int64_t lane, const bits_mem *m)
{
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    int32_t d = r->head_dim;
    int64_t n_lane = r->n_lane; /* a copy, or it would be read again after every store */
    const float *q = r->q + lane, *lo = m->lo, *step = m->step;
    float *product = m->product;
    int32_t *x = m->x + lane;
    vf max[4], sum[4];
    for (int i = 0; i < 4; i++) max[i] = vf_set1(1e-30f), sum[i] = vf_zero();
    for (int32_t c = 0; c < d; c += 4)
        for (int i = 0; i < 4; i++, q += n_lane) {
            vf z = vf_load(q), y = vf_mul(z, vf_set1(step[c + i]));
            vf_store(product + (c + i) * VF_LANES, y);
            max[i] = vf_max(max[i], vf_abs(y));
            sum[i] = vf_fma(z, vf_set1(lo[c + i]), sum[i]);
        }
    vf top = vf_max(vf_max(max[0], max[1]), vf_max(max[2], max[3]));
    vf_store(m->offset + lane, vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
    vf_store(m->scale + lane, vf_mul(top, vf_set1(1.0f / 127.0f)));
    vf inv = vf_div(vf_set1(127.0f), top);
    for (int32_t c = 0; c < d; c += 4, x += n_lane) {
        __m256i y[4];
        for (int i = 0; i < 4; i++) y[i] = _mm256_cvtps_epi32(vf_mul(vf_load(product + (c + i) * VF_LANES), inv));
        /* Packing leaves four lanes of each channel side by side; a lane's four channels must be. */
        __m256i z = _mm256_packs_epi16(_mm256_packs_epi32(y[0], y[1]), _mm256_packs_epi32(y[2], y[3]));
        _mm256_storeu_si256((__m256i *)(void *)x, _mm256_shuffle_epi8(z, order));
    }
}

/* Halves 0 and 1 of 16 tokens: [2][head_dim / 4] vectors of 8 tokens x 4 channels. Shifts of 16 bits bring bits
 * of the neighbour byte, which the mask removes. */
MT_INLINE void open_tile(int bits, const uint8_t *codes, int32_t d, __m256i *out)
{
    int per = 8 / bits;
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    int32_t quads = d / 4;
    for (int32_t row = 0; row < quads / per; row++) {
        for (int half = 0; half < 2; half++) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(codes + row * 64 + half * 32));
            KVF_UNROLL
            for (int i = 0; i < per; i++)
                out[half * quads + row * per + i] = _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(i * bits)), mask);
        }
    }
}

/* Best of 8 of each of 4 rows. */
static inline __m128i best_of_rows(const __m256i *t)
{
    __m256i a = _mm256_max_epi32(_mm256_unpacklo_epi32(t[0], t[1]), _mm256_unpackhi_epi32(t[0], t[1]));
    __m256i b = _mm256_max_epi32(_mm256_unpacklo_epi32(t[2], t[3]), _mm256_unpackhi_epi32(t[2], t[3]));
    __m256i c = _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    return _mm_max_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
}

/* n rows (x: the first's, the next beside it) with n_tile tiles of codes. Sums of 16 bits hold the products of
 * `calm` quads; once: of all there are. */
MT_INLINE __m128i rows_best(int n, bool once, const __m256i *open, int32_t n_tile, int32_t quads, int calm, const int32_t *x,
                            int64_t stride)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i top[CHUNK];
    for (int i = 0; i < CHUNK; i++) top[i] = i < n ? _mm256_set1_epi32(INT32_MIN) : _mm256_setzero_si256();
    for (int32_t t = 0; t < n_tile; t++) {
        const __m256i *a = open + t * 2 * quads, *b = a + quads;
        const int32_t *y = x;
        __m256i sum[2][CHUNK];
        KVF_UNROLL
        for (int i = 0; i < n; i++) sum[0][i] = sum[1][i] = _mm256_setzero_si256();
        for (int32_t j = 0; j < quads;) {
            __m256i part[2][CHUNK];
            int32_t end = once || quads - j < calm ? quads : j + calm;
            KVF_UNROLL
            for (int i = 0; i < n; i++) part[0][i] = part[1][i] = _mm256_setzero_si256();
            /* gcc 12 copies every sum once a turn */
#pragma GCC unroll 4
            for (; j < end; j++, y += stride) {
                __m256i c = _mm256_load_si256(a + j), c2 = _mm256_load_si256(b + j);
                KVF_UNROLL
                for (int i = 0; i < n; i++) {
                    __m256i row = _mm256_set1_epi32(y[i]);
                    part[0][i] = _mm256_add_epi16(part[0][i], _mm256_maddubs_epi16(c, row));
                    part[1][i] = _mm256_add_epi16(part[1][i], _mm256_maddubs_epi16(c2, row));
                }
            }
            KVF_UNROLL
            for (int i = 0; i < n; i++) {
                __m256i u = _mm256_madd_epi16(part[0][i], ones), v = _mm256_madd_epi16(part[1][i], ones);
                sum[0][i] = once ? u : _mm256_add_epi32(sum[0][i], u);
                sum[1][i] = once ? v : _mm256_add_epi32(sum[1][i], v);
            }
        }
        KVF_UNROLL
        for (int i = 0; i < n; i++) top[i] = _mm256_max_epi32(top[i], _mm256_max_epi32(sum[0][i], sum[1][i]));
    }
    return best_of_rows(top);
}

MT_INLINE __m128i any_rows_best(int64_t n, bool once, const __m256i *open, int32_t n_tile, int32_t quads, int calm,
                                const int32_t *x, int64_t stride)
{
    switch (n) {
    case 1: return rows_best(1, once, open, n_tile, quads, calm, x, stride);
    case 2: return rows_best(2, once, open, n_tile, quads, calm, x, stride);
    case 3: return rows_best(3, once, open, n_tile, quads, calm, x, stride);
    default: return rows_best(4, once, open, n_tile, quads, calm, x, stride);
    }
}

static __m128i rows_best_of(int64_t n, const __m256i *open, int32_t n_tile, int32_t quads, int calm, const int32_t *x,
                            int64_t stride)
{
    if (quads <= calm) return any_rows_best(n, true, open, n_tile, quads, calm, x, stride);
    return any_rows_best(n, false, open, n_tile, quads, calm, x, stride);
}

/* Scores of one unit's share of a group into s [n_lane]; first: nothing is there yet. */
static void score_run(const kvf_score_part *p, const bits_mem *m, int32_t tile, int32_t n_tile, bool first)
{
    const kvf_rows *r = p->rows;
    int32_t quads = r->head_dim / 4, bits = p->digest->bits, u = tile * 16 / p->unit;
    int calm = bits == 1 ? 128 : bits == 2 ? 42 : 8;
    float *s = p->s + (u - p->unit0) * r->n_lane;
    const __m256i *open = m->open + tile % TILES * 2 * quads;
    for (int64_t i = 0; i < r->n_lane; i += CHUNK) {
        int64_t n = kvf_rows_real(r, i, CHUNK);
        if (n <= 0) {
            _mm_storeu_ps(s + i, _mm_setzero_ps());
            continue;
        }
        __m128 best = _mm_cvtepi32_ps(rows_best_of(n, open, n_tile, quads, calm, m->x + i, r->n_lane));
        __m128 y = _mm_fmadd_ps(best, _mm_loadu_ps(m->scale + i), _mm_loadu_ps(m->offset + i));
        _mm_storeu_ps(s + i, first ? y : _mm_max_ps(y, _mm_loadu_ps(s + i)));
    }
}

static void score_bits(const kvf_score_part *p)
{
    const kvf_rows *r = p->rows;
    int32_t d = r->head_dim, bits = p->digest->bits, run = p->unit / 16 < TILES ? p->unit / 16 : TILES;
    size_t tile_bytes = (size_t)(16 * d * bits / 8), group_bytes = 4 * (size_t)d + TILES * tile_bytes;
    bits_mem m = cut_scratch(p);
    for (int32_t g = 0; g < KVF_DIGEST_BLOCK / KVF_DIGEST_GROUP; g++) {
        const uint8_t *at = (const uint8_t *)p->row + (size_t)g * group_bytes;
        int32_t first = g * TILES, end = first + TILES;
        if (p->unit1 * p->unit <= first * 16 || p->unit0 * p->unit >= end * 16) continue;
        widen(at, 2 * (size_t)d, m.lo);
        for (int64_t lane = 0; lane < r->n_q * r->pad; lane += VF_LANES) quantise_lanes(r, lane, &m);
        for (int32_t t = 0; t < TILES; t++) {
            const uint8_t *codes = at + 4 * (size_t)d + (size_t)t * tile_bytes;
            __m256i *open = m.open + t * 2 * (d / 4);
            if (bits == 2)
                open_tile(2, codes, d, open);
            else if (bits == 1)
                open_tile(1, codes, d, open);
            else
                open_tile(4, codes, d, open);
        }
        for (int32_t t = first; t < end; t += run) {
            int32_t u = t * 16 / p->unit;
            if (u < p->unit0 || u >= p->unit1) continue;
            score_run(p, &m, t, run, t * 16 % p->unit == 0);
        }
    }
}

void kvf_cpu_memory_init_avx2(kvf_cpu_ops *ops)
{
    memory_init(ops, "avx2");
    ops->score_bits = score_bits;
    ops->score_bits_scratch_bytes = score_bits_scratch;
}
