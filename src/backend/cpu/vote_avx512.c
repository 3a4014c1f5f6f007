/* vote_avx512.c - scores of BITS digests by VNNI: codes in uint8, queries times steps in int8.
 *
 * Two costs compete: making q * step small integers (once per 64 tokens and row), and the byte products
 * (16 tokens at a time). With one query there are as few rows as heads in a group, so the first would be
 * the larger: up to 8 rows, both token groups of a block share the lanes of a vector. Products keep 8 rows
 * x 32 tokens in registers, enough sums to hide VPDPBUSD's latency at two a cycle; each row's best stays
 * one vector until its unit ends, and eight such are reduced at once.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>
#include <string.h>

#include "backend/cpu/cpu_ops.h"

#define VOTE_INLINE static inline __attribute__((always_inline))

enum { LANES = 16, CHUNK = 8, GROUPS = KVF_DIGEST_BLOCK / KVF_DIGEST_GROUP, TILES = KVF_DIGEST_GROUP / 16 };

/* Scratch of one call, cut from kvf_score_part.scratch. */
typedef struct vote_mem {
    float *lo, *step;      /* [GROUPS][head_dim] */
    float *product;        /* [head_dim][LANES] */
    float *scale, *offset; /* [n_lane] */
    int32_t *x;            /* [head_dim / 4][n_lane]: four channels of a lane, 8 bits each */
    __m512i *open;         /* [TILES][head_dim / 4]: 16 tokens x 4 channels of codes, a byte each */
} vote_mem;

static size_t scratch_floats(size_t d, size_t n_lane)
{
    return 2 * GROUPS * d + d * LANES + 2 * n_lane + d / 4 * n_lane + TILES * (d / 4) * LANES;
}

static size_t score_bits_scratch(const kvf_rows *r)
{
    return scratch_floats((size_t)r->head_dim, (size_t)r->n_lane) * sizeof(float) + 64;
}

/* The parts that are loaded as vectors come first: each is a whole number of cache lines. */
static vote_mem cut_scratch(const kvf_score_part *p)
{
    int64_t d = p->rows->head_dim, n = p->rows->n_lane;
    vote_mem m = { .open = p->scratch };
    m.product = (float *)(void *)(m.open + TILES * (d / 4));
    m.x = (int32_t *)(void *)(m.product + d * LANES);
    m.scale = (float *)(void *)(m.x + d / 4 * n);
    m.offset = m.scale + n;
    m.lo = m.offset + n;
    m.step = m.lo + GROUPS * d;
    return m;
}

/* n halves, a multiple of 8, at any address. */
static void widen(const uint8_t *p, int32_t n, float *out)
{
    for (int32_t i = 0; i < n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + 2 * i))));
}

/* ---- Queries times steps in 8 bits ------------------------------------------------------------ */

/* q, and the parameter v of channel c: of one group in all lanes, or (paired) 8 rows twice, with group 0's
 * parameter in the lower lanes and group 1's, d floats further, in the upper. */
VOTE_INLINE __m512 load_q(bool paired, const float *q)
{
    return paired ? _mm512_broadcast_f32x8(_mm256_loadu_ps(q)) : _mm512_loadu_ps(q);
}

VOTE_INLINE __m512 load_param(bool paired, const float *v, int32_t d)
{
    __m512 x = _mm512_set1_ps(v[0]);
    return paired ? _mm512_mask_mov_ps(x, 0xff00, _mm512_set1_ps(v[d])) : x;
}

/* 16 lanes: q * step = scale * x and q . lo = offset. Four partial maxima and sums, since one chain of
 * them would take four cycles a channel. */
VOTE_INLINE void quantise_lanes(bool paired, const kvf_rows *r, const float *lo, const float *step, int64_t lane,
                                const vote_mem *m)
{
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    int32_t d = r->head_dim;
    int64_t n_lane = r->n_lane; /* a copy, or it would be read again after every store */
    const float *q = r->q + lane;
    float *product = m->product;
    int32_t *x = m->x + lane;
    __m512 max[4], sum[4];
    for (int i = 0; i < 4; i++) max[i] = _mm512_set1_ps(1e-30f), sum[i] = _mm512_setzero_ps();
    for (int32_t c = 0; c < d; c += 4)
        for (int i = 0; i < 4; i++) {
            __m512 z = load_q(paired, q), y = _mm512_mul_ps(z, load_param(paired, step + c + i, d));
            q += n_lane;
            _mm512_store_ps(product + (c + i) * LANES, y);
            max[i] = _mm512_range_ps(max[i], y, 0x0b); /* the larger absolute value */
            sum[i] = _mm512_fmadd_ps(z, load_param(paired, lo + c + i, d), sum[i]);
        }
    __m512 top = _mm512_max_ps(_mm512_max_ps(max[0], max[1]), _mm512_max_ps(max[2], max[3]));
    _mm512_storeu_ps(m->offset + lane, _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
    _mm512_storeu_ps(m->scale + lane, _mm512_mul_ps(top, _mm512_set1_ps(1.0f / 127.0f)));
    __m512 inv = _mm512_div_ps(_mm512_set1_ps(127.0f), top);
    for (int32_t c = 0; c < d; c += 4, x += n_lane) {
        __m512i y[4];
        for (int i = 0; i < 4; i++)
            y[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(product + (c + i) * LANES), inv));
        /* Packing leaves four lanes of each channel side by side; a lane's four channels must be. */
        __m512i z = _mm512_packs_epi16(_mm512_packs_epi32(y[0], y[1]), _mm512_packs_epi32(y[2], y[3]));
        _mm512_storeu_si512(x, _mm512_shuffle_epi8(z, order));
    }
}

/* ---- Codes -------------------------------------------------------------------------------------- */

/* 16 tokens x head_dim channels of codes to bytes. Shifts of 16 bits bring bits of the neighbour byte,
 * which the mask removes. */
static void open_tile(int32_t bits, const uint8_t *codes, int32_t d, __m512i *out)
{
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    for (int32_t row = 0; row < d * bits / 32; row++, codes += 64, out += 8 / bits) {
        __m512i x = _mm512_loadu_si512(codes), y = x;
        out[0] = _mm512_and_si512(x, mask);
        if (bits == 4) {
            out[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
        } else if (bits == 2) {
            out[1] = _mm512_and_si512(_mm512_srli_epi16(x, 2), mask);
            out[2] = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
            out[3] = _mm512_and_si512(_mm512_srli_epi16(x, 6), mask);
        } else {
            for (int i = 1; i < 8; i++) {
                y = _mm512_srli_epi16(y, 1);
                out[i] = _mm512_and_si512(y, mask);
            }
        }
    }
}

/* Eight rows' best of 16 to one vector. */
VOTE_INLINE __m256i best_of_rows(const __m512i *t)
{
    __m512i a[4], b[2];
    for (int i = 0; i < 4; i++)
        a[i] = _mm512_max_epi32(_mm512_unpacklo_epi32(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_epi32(t[2 * i], t[2 * i + 1]));
    for (int i = 0; i < 2; i++)
        b[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
    __m512i c = _mm512_max_epi32(_mm512_shuffle_i32x4(b[0], b[1], 0x44), _mm512_shuffle_i32x4(b[0], b[1], 0xee));
    c = _mm512_max_epi32(c, _mm512_shuffle_i32x4(c, c, 0xb1));
    return _mm512_castsi512_si256(_mm512_shuffle_i32x4(c, c, 0x08));
}

/* n <= 8 rows (x: the first's, the next beside it) with n_tile tiles of codes. */
VOTE_INLINE __m256i rows_best(int n, const __m512i *open, int32_t n_tile, int32_t quads, const int32_t *x, int64_t stride)
{
    __m512i top[CHUNK], s[CHUNK], s2[CHUNK];
    for (int i = 0; i < CHUNK; i++) top[i] = i < n ? _mm512_set1_epi32(INT32_MIN) : _mm512_setzero_si512();
    for (int32_t t = 0; t < n_tile; t += 2) {
        const __m512i *a = open + t * quads, *b = t + 1 < n_tile ? a + quads : a; /* a lone tile counts twice */
        const int32_t *y = x;
        for (int i = 0; i < n; i++) s[i] = s2[i] = _mm512_setzero_si512();
        /* gcc 12 copies every sum once a turn */
#pragma GCC unroll 4
        for (int32_t j = 0; j < quads; j++, y += stride) {
            __m512i c = _mm512_load_si512(a + j), c2 = _mm512_load_si512(b + j);
            for (int i = 0; i < n; i++) {
                __m512i row = _mm512_set1_epi32(y[i]);
                s[i] = _mm512_dpbusd_epi32(s[i], c, row);
                s2[i] = _mm512_dpbusd_epi32(s2[i], c2, row);
            }
        }
        for (int i = 0; i < n; i++) top[i] = _mm512_max_epi32(top[i], _mm512_max_epi32(s[i], s2[i]));
    }
    return best_of_rows(top);
}

static __m256i rows_best_of(int64_t n, const __m512i *open, int32_t n_tile, int32_t quads, const int32_t *x, int64_t stride)
{
    switch (n) {
    case 1: return rows_best(1, open, n_tile, quads, x, stride);
    case 2: return rows_best(2, open, n_tile, quads, x, stride);
    case 3: return rows_best(3, open, n_tile, quads, x, stride);
    case 4: return rows_best(4, open, n_tile, quads, x, stride);
    case 5: return rows_best(5, open, n_tile, quads, x, stride);
    case 6: return rows_best(6, open, n_tile, quads, x, stride);
    case 7: return rows_best(7, open, n_tile, quads, x, stride);
    default: return rows_best(8, open, n_tile, quads, x, stride);
    }
}

/* Scores of one unit's share of a group into s [n_lane]; first: nothing is there yet. `at`: where the
 * group's rows begin among the lanes of scale, offset and x. */
static void score_run(const kvf_score_part *p, const vote_mem *m, int64_t at, int32_t tile, int32_t n_tile, bool first)
{
    const kvf_rows *r = p->rows;
    int32_t quads = r->head_dim / 4, u = tile * 16 / p->unit;
    float *s = p->s + (u - p->unit0) * r->n_lane;
    const __m512i *open = m->open + tile % TILES * quads;
    for (int64_t i = 0; i < r->n_lane; i += CHUNK) {
        int64_t n = kvf_rows_real(r, i, CHUNK);
        if (n <= 0) {
            _mm256_storeu_ps(s + i, _mm256_setzero_ps());
            continue;
        }
        __m256 best = _mm256_cvtepi32_ps(rows_best_of(n, open, n_tile, quads, m->x + at + i, r->n_lane));
        __m256 y = _mm256_fmadd_ps(best, _mm256_loadu_ps(m->scale + at + i), _mm256_loadu_ps(m->offset + at + i));
        _mm256_storeu_ps(s + i, first ? y : _mm256_max_ps(y, _mm256_loadu_ps(s + i)));
    }
}

static void score_bits(const kvf_score_part *p)
{
    const kvf_rows *r = p->rows;
    int32_t d = r->head_dim, bits = p->digest->bits, quads = d / 4;
    size_t tile_bytes = (size_t)(16 * d * bits / 8), group_bytes = 4 * (size_t)d + TILES * tile_bytes;
    bool paired = r->n_q * r->pad <= CHUNK;
    vote_mem m = cut_scratch(p);
    const uint8_t *row = p->row;
    for (int32_t g = 0; g < GROUPS; g++) {
        widen(row + (size_t)g * group_bytes, d, m.lo + g * d);
        widen(row + (size_t)g * group_bytes + 2 * (size_t)d, d, m.step + g * d);
    }
    if (paired) quantise_lanes(true, r, m.lo, m.step, 0, &m);
    for (int32_t g = 0; g < GROUPS; g++) {
        int32_t first = g * TILES, end = first + TILES, run = p->unit / 16 < TILES ? p->unit / 16 : TILES;
        if (p->unit1 * p->unit <= first * 16 || p->unit0 * p->unit >= end * 16) continue;
        for (int64_t lane = 0; !paired && lane < r->n_lane; lane += LANES)
            quantise_lanes(false, r, m.lo + g * d, m.step + g * d, lane, &m);
        for (int32_t t = 0; t < TILES; t++)
            open_tile(bits, row + (size_t)g * group_bytes + 4 * (size_t)d + (size_t)t * tile_bytes, d, m.open + t * quads);
        for (int32_t t = first; t < end; t += run) {
            int32_t u = t * 16 / p->unit;
            if (u < p->unit0 || u >= p->unit1) continue;
            score_run(p, &m, paired ? g * CHUNK : 0, t, run, t * 16 % p->unit == 0);
        }
    }
}

void kvf_cpu_vote_init_avx512(kvf_cpu_ops *ops)
{
    ops->score_bits = score_bits;
    ops->score_bits_scratch_bytes = score_bits_scratch;
}
