/* attn_amx.c - prefill attention on AMX tiles: bf16 products, fp32 sums and softmax.
 *
 * A query column is one (token, query head) pair; all heads of a KV head's group are columns of the
 * same keys. Scores are computed transposed, S^T = K Q^T, so that a vector lane is a column and the
 * softmax needs no sum across lanes; then O^T += V^T P^T, whose right side is again S^T's layout.
 *
 * Precision rule: keys may carry components of 100 and more, which plain bf16 cannot represent
 * finely enough, so q and K are each split into two bf16 (hi + lo) and q.k is taken as
 * hi hi + lo hi + hi lo: about 16 bits. K itself (f16) is exact in the split. P and V are one bf16
 * each; the row sum that divides o is taken over the rounded p, so rounding does not scale o.
 *
 * Work is a pipeline over (key block, group of 32 columns): while the tile unit multiplies K with
 * the queries of one group and V^T with the probabilities of another, the vector unit does the
 * softmax of the group between them. The two are interleaved by hand because one stage is far longer
 * than the processor's reorder window.
 *
 * Holes of the list are closed when keys are converted: below, a key's number counts the keys that are
 * there, and `held` turns it into a place of the list and back. What a query sees is a run in both orders.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>
#include <math.h>

#include "backend/cpu/attn_int.h"

enum {
    COLS = 32,      /* columns of a group: two tiles, so that each K and V tile read is used twice */
    KEYS = 128,     /* keys of a job: O is read and written once per job; 64 is 8% slower at 128 dims */
    SPAN_MAX = 512, /* keys converted at a time: they stay in L2 while all groups pass over them */
    TILE = 512      /* bf16 in a tile of 16 rows of 64 bytes */
};

static const float masked = -1e30f;  /* score of an invisible key: exp2 gives exactly 0 */
static const float seen = -1e29f;    /* a column maximum above this has met a visible key */
static const float headroom = 16.0f; /* the reference moves only when scores pass it by 2^16: p stays
                                        far inside fp32 and bf16, whose precision does not depend on it */

/* One group of columns against KEYS keys, on its way through the pipeline. */
typedef struct job {
    int64_t group;
    int64_t unit;   /* keys [unit * KEYS, (unit + 1) * KEYS) of the converted span */
    kvf_bf16 *prob; /* [2 column tiles][KEYS / 2][16 columns][2]: right-hand tiles of P V */
    bool active;
    bool rescale;  /* O of this group is multiplied by factor before these keys are added */
    float *factor; /* [COLS] */
} job;

typedef struct work {
    const kvf_attn_part *part;
    float *lse;             /* where it goes, or NULL */
    int64_t key0, key1;     /* the part's keys, by number */
    int64_t *held;          /* [entries + 1] keys before each entry of the list; NULL: no holes */
    int32_t dim, steps;     /* head_dim; its tiles of 32, padded */
    int64_t n_col, n_group; /* columns; groups of COLS */
    int64_t heads;          /* query heads per KV head */
    kvf_bf16 *q;            /* [n_group][steps][hi 0, hi 1, lo 0, lo 1] tiles [16 dim pairs][16 columns][2] */
    float *o;               /* [n_group][2 steps][2 column tiles] tiles [16 dims][16 columns] */
    float *neg_m;           /* [n_group * COLS] minus the reference of the scores (log2) */
    float *sum;             /* ... sum of bf16 p */
    float *sum_exact;       /* ... sum of fp32 p, for lse */
    int64_t span;           /* keys converted at a time, whole blocks */
    kvf_bf16 *k;            /* [span / 32][steps][lo 0, lo 1, hi 0, hi 1] tiles [16 keys][32 dims] */
    kvf_bf16 *vt;           /* [span / KEYS][steps][KEYS / 32][2] tiles [16 dims][32 keys] */
    float *s;               /* [2 column tiles][KEYS][16] scores of one job */
    kvf_bf16 *prob[2];
    job jobs[3];
} work;

/* ---- Layout ---------------------------------------------------------------------------- */

static void *take(char *base, size_t *used, size_t bytes)
{
    char *p = base ? base + *used : NULL;
    *used += (bytes + 63u) & ~(size_t)63u;
    return p;
}

static int64_t entries(const kvf_attn_args *a) { return (a->n_key + KVF_BLOCK - 1) / KVF_BLOCK; }

/* Place the arrays in scratch; with base NULL only the size counts. */
static size_t layout(work *w, const kvf_attn_args *a, int64_t n_tok, void *base)
{
    size_t used = 0;
    w->dim = a->head_dim;
    w->steps = (a->head_dim + 31) / 32;
    w->heads = kvf_attn_group(a);
    w->held = a->valid ? take(base, &used, ((size_t)entries(a) + 1) * sizeof *w->held) : NULL;
    w->n_col = n_tok * w->heads;
    w->n_group = (w->n_col + COLS - 1) / COLS;
    size_t cols = (size_t)w->n_group * COLS, width = (size_t)w->steps * 32;
    w->q = take(base, &used, cols * width * 4);
    w->o = take(base, &used, cols * width * 4);
    w->neg_m = take(base, &used, cols * 4);
    w->sum = take(base, &used, cols * 4);
    w->sum_exact = take(base, &used, cols * 4);
    w->span = w->steps <= 4 ? SPAN_MAX : SPAN_MAX / 2;
    w->k = take(base, &used, (size_t)w->span * width * 4);
    w->vt = take(base, &used, (size_t)w->span * width * 2);
    w->s = take(base, &used, KEYS * COLS * 4);
    for (int i = 0; i < 2; i++) w->prob[i] = take(base, &used, KEYS * COLS * 2);
    for (int i = 0; i < 3; i++) w->jobs[i].factor = take(base, &used, COLS * 4);
    return used;
}

/* ---- Holes ----------------------------------------------------------------------------- */

/* Places of entry e that hold keys of the list. */
static kvf_key_range held_of(const kvf_attn_args *a, int64_t e)
{
    kvf_key_range r = kvf_attn_valid(a, e);
    int64_t left = a->n_key - e * KVF_BLOCK;
    if (r.end > left) r.end = left;
    if (r.first > r.end) r.first = r.end;
    return r;
}

/* Number of the first key at place j of the list or after it. */
static int64_t number_of(const work *w, int64_t j)
{
    const kvf_attn_args *a = w->part->a;
    if (!w->held) return j;
    if (j <= 0) return 0;
    if (j >= a->n_key) return w->held[entries(a)];
    int64_t e = j >> KVF_BLOCK_SHIFT, place = j & (KVF_BLOCK - 1);
    kvf_key_range r = held_of(a, e);
    return w->held[e] + (place < r.first ? 0 : place < r.end ? place - r.first : r.end - r.first);
}

/* Place of an existing key. */
static int64_t place_of(const work *w, int64_t key)
{
    const kvf_attn_args *a = w->part->a;
    if (!w->held) return key;
    int64_t e = 0, end = entries(a);
    while (end - e > 1) { /* the last entry with at most `key` keys before it holds the key */
        int64_t mid = e + (end - e) / 2;
        if (w->held[mid] <= key)
            e = mid;
        else
            end = mid;
    }
    return e * KVF_BLOCK + held_of(a, e).first + key - w->held[e];
}

static void count_keys(work *w)
{
    const kvf_attn_args *a = w->part->a;
    int64_t n = 0;
    for (int64_t e = 0; w->held && e < entries(a); e++) {
        kvf_key_range r = held_of(a, e);
        w->held[e] = n;
        n += r.end - r.first;
    }
    if (w->held) w->held[entries(a)] = n;
    w->key0 = number_of(w, w->part->key0);
    w->key1 = number_of(w, w->part->key1);
}

/* Rows of keys first..first + n, n >= 1; the values lie at the same distance from each. Rows of the job
 * past them are a row that exists: convert_* load none of it. */
static void key_rows(const work *w, int64_t first, int64_t n, const kvf_f16 *row[KEYS])
{
    const kvf_attn_args *a = w->part->a;
    int64_t at = place_of(w, first), i = 0;
    for (int64_t e = at >> KVF_BLOCK_SHIFT; i < n; e++) {
        kvf_key_range r = held_of(a, e);
        const kvf_f16 *k = kvf_attn_k(a, w->part->head_kv, e);
        if (e == at >> KVF_BLOCK_SHIFT) r.first = at & (KVF_BLOCK - 1);
        for (int64_t j = r.first; j < r.end && i < n; j++) row[i++] = k + j * w->dim;
    }
    for (; i < KEYS; i++) row[i] = row[0];
}

/* ---- Conversion ------------------------------------------------------------------------ */

/* 16 x 16 dwords in place: m[i] lane j becomes m[j] lane i. */
static inline void transpose(__m512i m[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(m[i], m[i + 1]), b = _mm512_unpackhi_epi32(m[i], m[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(m[i + 2], m[i + 3]), d = _mm512_unpackhi_epi32(m[i + 2], m[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(t[j], t[j + 4], 0x88),
                b = _mm512_shuffle_i32x4(t[j], t[j + 4], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(t[j + 8], t[j + 12], 0xdd);
        m[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        m[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        m[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        m[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* 32 floats as bf16, low lanes first. */
static inline __m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

static inline __m512 bf16_low(__m512i x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16));
}

static inline __m512 bf16_high(__m512i x)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16));
}

/* x = hi + lo to 16 bits. */
static inline __m512i split_bf16(__m512 x0, __m512 x1, __m512i *lo)
{
    __m512i hi = to_bf16(x0, x1);
    *lo = to_bf16(_mm512_sub_ps(x0, bf16_low(hi)), _mm512_sub_ps(x1, bf16_high(hi)));
    return hi;
}

/* Lanes that exist of the 16 starting at element `at` of n. */
static inline __mmask16 tail16(int64_t at, int64_t n)
{
    int64_t left = n - at;
    return (__mmask16)(left >= 16 ? 0xffffu : left <= 0 ? 0u : (1u << left) - 1u);
}

static inline __m512 load_f16(__mmask16 lanes, const kvf_f16 *x)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x));
}

/* q of a column tile, scaled, split and paired along dims: tiles hi (dst) and lo (dst + 2 TILE). */
static void pack_q_tile(const work *w, int64_t col, int32_t step, float scale, kvf_bf16 *dst)
{
    const kvf_attn_args *a = w->part->a;
    __m512i hi[16], lo[16];
    __mmask16 m0 = tail16(step * 32, w->dim), m1 = tail16(step * 32 + 16, w->dim);
    __m512 factor = _mm512_set1_ps(scale);
    for (int i = 0; i < 16; i++) {
        hi[i] = lo[i] = _mm512_setzero_si512();
        if (col + i >= w->n_col) continue;
        int64_t tok = w->part->tok0 + (col + i) / w->heads, head = (col + i) % w->heads;
        const float *q = a->q + (tok * a->n_head + w->part->head_kv * w->heads + head) * w->dim + step * 32;
        hi[i] = split_bf16(_mm512_mul_ps(_mm512_maskz_loadu_ps(m0, q), factor),
                           _mm512_mul_ps(_mm512_maskz_loadu_ps(m1, q + (m1 ? 16 : 0)), factor), &lo[i]);
    }
    transpose(hi);
    transpose(lo);
    for (int i = 0; i < 16; i++) {
        _mm512_store_si512(dst + i * 32, hi[i]);
        _mm512_store_si512(dst + 2 * TILE + i * 32, lo[i]);
    }
}

static void pack_queries(work *w)
{
    const kvf_attn_args *a = w->part->a;
    /* Scores in units of log2 so that exp2 serves; with a soft cap, in units of the cap. */
    float scale = a->softcap > 0 ? a->scale / a->softcap : a->scale * 1.44269504088896341f;
    for (int64_t g = 0; g < w->n_group; g++)
        for (int32_t step = 0; step < w->steps; step++)
            for (int c = 0; c < 2; c++)
                pack_q_tile(w, g * COLS + c * 16, step, scale, w->q + ((g * w->steps + step) * 4 + c) * TILE);
    memset(w->o, 0, (size_t)(w->n_group * COLS * w->steps * 32) * sizeof *w->o);
    for (int64_t i = 0; i < w->n_group * COLS; i++) w->neg_m[i] = w->sum[i] = w->sum_exact[i] = 0.0f;
}

/* Keys of a job; from n_row on there are none, and they become zero. */
static void convert_k(const work *w, const kvf_f16 *const *k, int64_t n_row, kvf_bf16 *dst)
{
    for (int64_t j = 0; j < KEYS; j++) {
        kvf_bf16 *row = dst + (j >> 5) * w->steps * 4 * TILE + ((j >> 4) & 1) * TILE + (j & 15) * 32;
        for (int32_t step = 0; step < w->steps; step++) {
            __mmask16 m0 = tail16(step * 32, w->dim), m1 = tail16(step * 32 + 16, w->dim);
            const kvf_f16 *x = k[j] + step * 32;
            __m512i hi = _mm512_setzero_si512(), lo = hi;
            if (j < n_row) hi = split_bf16(load_f16(m0, x), load_f16(m1, x + (m1 ? 16 : 0)), &lo);
            _mm512_store_si512(row + (int64_t)step * 4 * TILE, lo);
            _mm512_store_si512(row + (int64_t)step * 4 * TILE + 2 * TILE, hi);
        }
    }
}

/* Two vectors as bf16 pairs: lane i holds low[i], high[i]. */
static inline __m512i pair_bf16(__m512 low, __m512 high)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, to_bf16(low, high));
}

/* V^T in tiles of [16 dims][32 keys]: pairs of key rows, then a transposition of dwords. */
static void convert_v(const work *w, const kvf_f16 *const *k, int64_t n_row, kvf_bf16 *vt)
{
    int64_t to_v = (int64_t)w->part->a->n_head_kv * KVF_BLOCK * w->dim;
    for (int32_t t = 0; t < w->steps * 2; t++) {
        __mmask16 lanes = tail16(t * 16, w->dim);
        int64_t at = to_v + (lanes ? t * 16 : 0);
        for (int64_t c = 0; c < KEYS / 32; c++) {
            kvf_bf16 *dst = vt + (((t >> 1) * (KEYS / 32) + c) * 2 + (t & 1)) * TILE;
            __m512i m[16];
            for (int64_t i = 0; i < 16; i++) {
                int64_t j = c * 32 + i * 2;
                m[i] = pair_bf16(load_f16(j < n_row ? lanes : 0, k[j] + at),
                                 load_f16(j + 1 < n_row ? lanes : 0, k[j + 1] + at));
            }
            transpose(m);
            for (int i = 0; i < 16; i++) _mm512_store_si512(dst + i * 32, m[i]);
        }
    }
}

/* ---- Tiles ----------------------------------------------------------------------------- */
/* Registers: 0-3 sums, 4-5 left (A), 6-7 right (B); all 16 rows of 64 bytes. */

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t col_bytes[16];
    uint8_t rows[16];
} tile_config;

static void tiles_open(void)
{
    _Alignas(64) tile_config c = { .palette = 1 };
    for (int i = 0; i < 8; i++) {
        c.col_bytes[i] = 64;
        c.rows[i] = 16;
    }
    _tile_loadconfig(&c);
}

#define PRODUCTS()                                                                                           \
    do {                                                                                                     \
        _tile_dpbf16ps(0, 4, 6);                                                                             \
        _tile_dpbf16ps(1, 4, 7);                                                                             \
        _tile_dpbf16ps(2, 5, 6);                                                                             \
        _tile_dpbf16ps(3, 5, 7);                                                                             \
    } while (0)

static inline void scores_begin(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* One third of 32 keys x 32 columns over 32 dims. In this order (lo K hi q, hi K hi q, hi K lo q) each
 * tile is loaded once. */
static inline void scores_step(const kvf_bf16 *k, const kvf_bf16 *q, int third)
{
    if (third == 0) {
        _tile_loadd(4, k, 64);
        _tile_loadd(6, q, 64);
        _tile_loadd(7, q + TILE, 64);
        _tile_loadd(5, k + TILE, 64);
    } else if (third == 1) {
        _tile_loadd(4, k + 2 * TILE, 64);
        _tile_loadd(5, k + 3 * TILE, 64);
    } else {
        _tile_loadd(6, q + 2 * TILE, 64);
        _tile_loadd(7, q + 3 * TILE, 64);
    }
    PRODUCTS();
}

static inline void scores_end(float *s)
{
    _tile_stored(0, s, 64);
    _tile_stored(1, s + KEYS * 16, 64);
    _tile_stored(2, s + 256, 64);
    _tile_stored(3, s + KEYS * 16 + 256, 64);
}

static inline void values_begin(const float *o)
{
    _tile_loadd(0, o, 64);
    _tile_loadd(1, o + 256, 64);
    _tile_loadd(2, o + 512, 64);
    _tile_loadd(3, o + 768, 64);
}

/* 32 dims x 32 columns over 32 keys. */
static inline void values_step(const kvf_bf16 *vt, const kvf_bf16 *prob)
{
    _tile_loadd(4, vt, 64);
    _tile_loadd(6, prob, 64);
    _tile_loadd(7, prob + KEYS * 16, 64);
    _tile_loadd(5, vt + TILE, 64);
    PRODUCTS();
}

static inline void values_end(float *o)
{
    _tile_stored(0, o, 64);
    _tile_stored(1, o + 256, 64);
    _tile_stored(2, o + 512, 64);
    _tile_stored(3, o + 768, 64);
}

/* ---- Softmax --------------------------------------------------------------------------- */

/* Powers of two by splitting x = n + f, 0 <= f < 1: 2^f from a polynomial (relative error 3e-06), then
 * scalef, which floors x itself. The bf16 of p is taken by truncation: the polynomial lies in [1, 2],
 * where half a unit of bf16 is 2^-8, so adding 2^-8 to its constant rounds to nearest for free. */
static const float pow2_c[5] = { 1.00000262f, 0.693003833f, 0.241442755f, 0.0520114638f, 0.0135341678f };

/* The softmax of one job, done a few pairs of keys at a time between tile instructions. */
typedef struct softmax {
    const float *s;
    kvf_bf16 *prob;
    bool exact; /* lse is wanted: sum the fp32 p too */
    __m512 neg_m[2], sum[2], sum_exact[2];
    int64_t done; /* key pairs */
} softmax;

/* 2^f as c0 + f * pow2_slope(f) */
static inline __m512 pow2_slope(__m512 f)
{
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(pow2_c[4]), _mm512_set1_ps(pow2_c[3]));
    p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(pow2_c[2]));
    return _mm512_fmadd_ps(f, p, _mm512_set1_ps(pow2_c[1]));
}

static inline void softmax_until(softmax *z, int64_t pair)
{
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    const __m512 c0 = _mm512_set1_ps(pow2_c[0]), c0_round = _mm512_set1_ps(pow2_c[0] + 0x1p-8f);
    for (; z->done < pair; z->done++) {
        for (int c = 0; c < 2; c++) {
            const float *s = z->s + c * KEYS * 16 + z->done * 32;
            __m512 x0 = _mm512_add_ps(_mm512_load_ps(s), z->neg_m[c]), f0 = _mm512_reduce_ps(x0, 1);
            __m512 x1 = _mm512_add_ps(_mm512_load_ps(s + 16), z->neg_m[c]), f1 = _mm512_reduce_ps(x1, 1);
            __m512 h0 = pow2_slope(f0), h1 = pow2_slope(f1);
            __m512i p0 = _mm512_castps_si512(_mm512_scalef_ps(_mm512_fmadd_ps(f0, h0, c0_round), x0));
            __m512i p1 = _mm512_castps_si512(_mm512_scalef_ps(_mm512_fmadd_ps(f1, h1, c0_round), x1));
            __m512i p = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(p0, 16), p1);
            _mm512_store_si512(z->prob + c * KEYS * 16 + z->done * 32, p);
            z->sum[c] = _mm512_dpbf16_ps(z->sum[c], (__m512bh)p, (__m512bh)ones);
            if (!z->exact) continue;
            z->sum_exact[c] =
                _mm512_add_ps(z->sum_exact[c], _mm512_scalef_ps(_mm512_fmadd_ps(f0, h0, c0), x0));
            z->sum_exact[c] =
                _mm512_add_ps(z->sum_exact[c], _mm512_scalef_ps(_mm512_fmadd_ps(f1, h1, c0), x1));
        }
    }
}

/* cap(s) in units of log2, from scores in units of the cap. */
static void apply_softcap(const work *w)
{
    float cap = w->part->a->softcap * 1.44269504088896341f;
    for (int64_t i = 0; i < KEYS * COLS; i++) w->s[i] = cap * tanhf(w->s[i]);
}

/* Hide the keys of the job, which starts at key `base`, that a column may not see. */
static void apply_mask(const work *w, int64_t group, int64_t base)
{
    const kvf_attn_args *a = w->part->a;
    _Alignas(64) int32_t first[COLS], last[COLS];
    for (int64_t i = 0; i < COLS; i++) {
        int64_t col = group * COLS + i < w->n_col ? group * COLS + i : w->n_col - 1;
        int64_t tok = w->part->tok0 + col / w->heads, at = a->place ? a->place[tok] : a->q_first + tok;
        int64_t end = number_of(w, at + 1), hi = (end < w->key1 ? end : w->key1) - 1 - base;
        int64_t lo = a->window > 0 ? number_of(w, at - a->window + 1) - base : 0;
        if (a->first) lo = number_of(w, a->first[tok]) - base;
        last[i] = hi < -1 ? -1 : hi > KEYS ? KEYS : (int32_t)hi;
        first[i] = lo < 0 ? 0 : lo > KEYS ? KEYS : (int32_t)lo;
    }
    for (int c = 0; c < 2; c++) {
        __m512i lo = _mm512_load_si512(first + c * 16), hi = _mm512_load_si512(last + c * 16);
        for (int j = 0; j < KEYS; j++) {
            float *s = w->s + (c * KEYS + j) * 16;
            __m512i key = _mm512_set1_epi32(j);
            __mmask16 hide = _mm512_cmplt_epi32_mask(key, lo) | _mm512_cmpgt_epi32_mask(key, hi);
            _mm512_mask_store_ps(s, hide, _mm512_set1_ps(masked));
        }
    }
}

/* Move the reference of the columns in `move` to their maximum in this job; sums and (through the
 * job's factor) O follow. A column's first visible keys come here, and scores that outgrow the
 * headroom. The reference is a whole number, so the factor is an exact power of two. */
static void move_reference(work *w, job *j, int c, __mmask16 move, __m512 top)
{
    int64_t at = j->group * COLS + c * 16;
    __m512 old = _mm512_load_ps(w->neg_m + at);
    __m512 m = _mm512_mask_sub_ps(old, move, _mm512_setzero_ps(), _mm512_roundscale_ps(top, 0));
    _mm512_store_ps(w->neg_m + at, m);
    /* An empty sum may move by any amount; its factor must stay finite. */
    __m512 factor =
        _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_min_ps(_mm512_sub_ps(m, old), _mm512_setzero_ps()));
    _mm512_store_ps(w->sum + at, _mm512_mul_ps(_mm512_load_ps(w->sum + at), factor));
    _mm512_store_ps(w->sum_exact + at, _mm512_mul_ps(_mm512_load_ps(w->sum_exact + at), factor));
    _mm512_store_ps(j->factor + c * 16, factor);
}

/* Bring the finished scores of a job into the form softmax_until wants. */
static void settle(work *w, job *j, bool cut, int64_t base)
{
    if (w->part->a->softcap > 0) apply_softcap(w);
    if (cut) apply_mask(w, j->group, base);
    __m512 top[2];
    __mmask16 move[2];
    for (int c = 0; c < 2; c++) {
        const float *s = w->s + c * KEYS * 16;
        __m512 t[4];
        for (int i = 0; i < 4; i++) t[i] = _mm512_load_ps(s + i * 16);
        for (int k = 4; k < KEYS; k += 4)
            for (int i = 0; i < 4; i++) t[i] = _mm512_max_ps(t[i], _mm512_load_ps(s + (k + i) * 16));
        top[c] = _mm512_max_ps(_mm512_max_ps(t[0], t[1]), _mm512_max_ps(t[2], t[3]));
        __mmask16 fresh = _mm512_cmp_ps_mask(_mm512_load_ps(w->sum + j->group * COLS + c * 16),
                                             _mm512_setzero_ps(), _CMP_EQ_OQ);
        __m512 above = _mm512_add_ps(top[c], _mm512_load_ps(w->neg_m + j->group * COLS + c * 16));
        move[c] = _mm512_cmp_ps_mask(above, _mm512_set1_ps(headroom), _CMP_GT_OQ) |
                  (fresh & _mm512_cmp_ps_mask(top[c], _mm512_set1_ps(seen), _CMP_GT_OQ));
    }
    j->rescale = (move[0] | move[1]) != 0;
    if (j->rescale)
        for (int c = 0; c < 2; c++) move_reference(w, j, c, move[c], top[c]);
}

/* ---- Pipeline -------------------------------------------------------------------------- */

static void rescale_o(const work *w, const job *j)
{
    float *o = w->o + j->group * COLS * w->steps * 32;
    for (int64_t t = 0; t < w->steps * 4; t++) {
        __m512 factor = _mm512_load_ps(j->factor + (t & 1) * 16);
        for (int i = 0; i < 16; i++) {
            float *x = o + t * 256 + i * 16;
            _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), factor));
        }
    }
}

/* S of next, softmax of cur, O of prev; any may be inactive. 32 keys at a time: their softmax is
 * done before the next job's scores take its place. */
static void stage(work *w, const job *next, const job *cur, const job *prev)
{
    const int32_t steps = w->steps;
    const kvf_bf16 *k = w->k + next->unit * (KEYS / 32) * steps * 4 * TILE,
                   *q = w->q + next->group * steps * 4 * TILE;
    const kvf_bf16 *vt = w->vt + prev->unit * steps * (KEYS / 32) * 2 * TILE;
    float *o = w->o + prev->group * steps * 4 * 256;
    softmax z = { .s = w->s, .prob = cur->prob, .exact = w->lse != NULL, .done = cur->active ? 0 : KEYS };
    for (int c = 0; c < 2; c++) {
        z.neg_m[c] = _mm512_load_ps(w->neg_m + cur->group * COLS + c * 16);
        z.sum[c] = z.sum_exact[c] = _mm512_setzero_ps();
    }
    if (prev->active && prev->rescale) rescale_o(w, prev);
    int32_t pass = prev->active ? 0 : steps;
    for (int32_t row = 0; row < KEYS / 32; row++, k += (int64_t)steps * 4 * TILE) {
        int32_t pass_end = ((row + 1) * steps + KEYS / 32 - 1) / (KEYS / 32);
        int32_t units =
            (pass_end > pass ? pass_end - pass : 0) * (KEYS / 32) + (next->active ? steps * 3 : 0);
        int32_t pace = units > 0 ? (16 * 256 + units - 1) / units : 0, clock = row * 16 * 256;
        for (; pass < pass_end; pass++, o += 4 * 256) {
            values_begin(o);
            for (int32_t c = 0; c < KEYS / 32; c++, vt += 2 * TILE) {
                values_step(vt, prev->prob + c * TILE);
                softmax_until(&z, (clock += pace) >> 8);
            }
            values_end(o);
        }
        if (next->active) {
            scores_begin();
            for (int32_t step = 0; step < steps; step++)
                for (int third = 0; third < 3; third++) {
                    scores_step(k + (int64_t)step * 4 * TILE, q + (int64_t)step * 4 * TILE, third);
                    softmax_until(&z, (clock += pace) >> 8);
                }
        }
        softmax_until(&z, row * 16 + 16);
        if (next->active) scores_end(w->s + row * 512);
    }
    if (!cur->active) return;
    for (int c = 0; c < 2; c++) {
        int64_t at = cur->group * COLS + c * 16;
        _mm512_store_ps(w->sum + at, _mm512_add_ps(_mm512_load_ps(w->sum + at), z.sum[c]));
        _mm512_store_ps(w->sum_exact + at, _mm512_add_ps(_mm512_load_ps(w->sum_exact + at), z.sum_exact[c]));
    }
}

/* Which groups see keys of a job [base, end), not empty, and which of them all KEYS: ranges, because visibility
 * comes and goes with the token. */
typedef struct sight {
    int64_t any0, any1, all0, all1;
} sight;

/* How many of the part's tokens have a number of at most `key` in `of`, which rises. */
static int64_t up_to(const work *w, const int32_t *of, int64_t key)
{
    int64_t lo = 0, hi = w->part->tok1 - w->part->tok0;
    of += w->part->tok0;
    while (lo < hi) {
        int64_t mid = (lo + hi) / 2;
        if (of[mid] <= key)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static sight sight_of(const work *w, int64_t base, int64_t end)
{
    const kvf_attn_args *a = w->part->a;
    int64_t n_tok = w->part->tok1 - w->part->tok0, first = a->q_first + w->part->tok0;
    int64_t from = place_of(w, base), to = place_of(w, end - 1);
    int64_t any0 = from > first ? from - first : 0, all0 = to > first ? to - first : 0; /* causal */
    int64_t any1 = n_tok, all1 = n_tok;
    if (a->place) {
        any0 = up_to(w, a->place, from - 1);
        all0 = up_to(w, a->place, to - 1);
        if (a->window > 0) {
            any1 = up_to(w, a->place, to + a->window - 1);
            all1 = up_to(w, a->place, from + a->window - 1);
        }
    } else if (a->window > 0) {
        if (any1 > to + a->window - first) any1 = to + a->window - first;
        if (all1 > from + a->window - first) all1 = from + a->window - first;
    }
    if (a->first) {
        any1 = up_to(w, a->first, to);
        all1 = up_to(w, a->first, from);
    }
    sight s = { any0 * w->heads / COLS, (any1 * w->heads + COLS - 1) / COLS,
                (all0 * w->heads + COLS - 1) / COLS, 0 };
    if (any0 >= any1) s.any1 = s.any0 = 0;
    s.all1 = all1 >= n_tok ? w->n_group : all1 <= 0 ? 0 : all1 * w->heads / COLS;
    if (end - base < KEYS) s.all1 = 0;
    return s;
}

static void advance(work *w, int64_t turn)
{
    stage(w, &w->jobs[turn % 3], &w->jobs[(turn + 2) % 3], &w->jobs[(turn + 1) % 3]);
}

/* Keys [base, end), converted once, against all groups that see them. A group goes over all the keys
 * before the next does, so that its q and O stay in L1 while K and V stream from L2. */
static void attend_span(work *w, int64_t base, int64_t end)
{
    const int64_t width = w->steps * 32;
    sight see[SPAN_MAX / KEYS];
    int64_t n_unit = (end - base + KEYS - 1) / KEYS, g0 = w->n_group, g1 = 0, turn = 0;
    for (int64_t u = 0; u < n_unit; u++) {
        int64_t at = base + u * KEYS;
        see[u] = sight_of(w, at, at + KEYS < end ? at + KEYS : end);
        if (see[u].any0 >= see[u].any1) continue;
        if (see[u].any0 < g0) g0 = see[u].any0;
        if (see[u].any1 > g1) g1 = see[u].any1;
    }
    if (g0 >= g1) return;
    for (int64_t at = base; at < end; at += KEYS) {
        const kvf_f16 *row[KEYS];
        int64_t n = end - at < KEYS ? end - at : KEYS;
        key_rows(w, at, n, row);
        convert_k(w, row, n, w->k + (at - base) * width * 2);
        convert_v(w, row, n, w->vt + (at - base) * width);
    }
    for (int i = 0; i < 3; i++) w->jobs[i] = (job){ .prob = w->prob[0], .factor = w->jobs[i].factor };
    for (int64_t g = g0; g < g1; g++)
        for (int64_t u = 0; u < n_unit; u++) {
            if (g < see[u].any0 || g >= see[u].any1) continue;
            job *next = &w->jobs[turn % 3];
            *next = (job){
                .group = g, .unit = u, .prob = w->prob[turn & 1], .active = true, .factor = next->factor
            };
            advance(w, turn++);
            settle(w, next, g < see[u].all0 || g >= see[u].all1, base + u * KEYS);
        }
    for (int i = 0; i < 2; i++) {
        w->jobs[turn % 3].active = false;
        advance(w, turn++);
    }
}

/* ---- Results --------------------------------------------------------------------------- */

/* Columns [col, col + 16) of O^T divided by their sums, back to rows. */
static void write_tile(const work *w, int64_t col, int32_t t)
{
    const kvf_attn_part *p = w->part;
    const float *src = w->o + (((col / COLS) * w->steps * 2 + t) * 2 + (col % COLS) / 16) * 256;
    __m512 sum = _mm512_load_ps(w->sum + col);
    __mmask16 some = _mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ),
              lanes = tail16(t * 16, w->dim);
    __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), sum);
    __m512i m[16];
    for (int i = 0; i < 16; i++)
        m[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(src + i * 16), inverse));
    transpose(m);
    for (int64_t i = 0; i < 16 && col + i < w->n_col; i++) {
        int64_t tok = (col + i) / w->heads, h = (col + i) % w->heads;
        int64_t row = p->o ? col + i : (p->tok0 + tok) * p->a->n_head + p->head_kv * w->heads + h;
        _mm512_mask_storeu_ps((p->o ? p->o : p->a->o) + row * w->dim + t * 16, lanes,
                              _mm512_castsi512_ps(m[i]));
    }
}

static void write_results(const work *w)
{
    const kvf_attn_part *p = w->part;
    for (int64_t col = 0; col < w->n_col; col += 16)
        for (int32_t t = 0; t * 16 < w->dim; t++) write_tile(w, col, t);
    for (int64_t col = 0; w->lse && col < w->n_col; col++) {
        int64_t tok = col / w->heads, h = col % w->heads;
        int64_t row = p->o ? col : (p->tok0 + tok) * p->a->n_head + p->head_kv * w->heads + h;
        float sum = w->sum_exact[col];
        double bits = (double)log2f(sum) - (double)w->neg_m[col];
        w->lse[row] = sum > 0 ? (float)(0.693147180559945309 * bits) : -INFINITY;
    }
}

static void attn(const kvf_attn_part *p)
{
    work w = { .part = p, .lse = p->o ? p->lse : p->a->lse };
    layout(&w, p->a, p->tok1 - p->tok0, p->scratch);
    count_keys(&w);
    tiles_open();
    pack_queries(&w);
    for (int64_t base = w.key0; base < w.key1; base += w.span)
        attend_span(&w, base, base + w.span < w.key1 ? base + w.span : w.key1);
    _tile_release();
    write_results(&w);
}

static size_t scratch_bytes(const kvf_attn_args *a, int64_t n_tok)
{
    work w;
    return layout(&w, a, n_tok, NULL);
}

/* Queries whose packed form and sums (8 bytes per padded dim and column) take at most about 1 MiB,
 * half the L2 of the processors that have AMX, in equal parts. With 96 instead of 288 tokens (head_dim
 * 64, group 7) converting K and V per part costs 10% more. */
static int64_t tile_tokens(const kvf_attn_args *a)
{
    int64_t width = (a->head_dim + 31) / 32 * 32, cols = (1 << 20) / (8 * width);
    int64_t most = cols / kvf_attn_group(a);
    if (most < 16) most = 16;
    int64_t n_part = (a->n_tok + most - 1) / most, even = n_part > 0 ? (a->n_tok + n_part - 1) / n_part : 1;
    return (even + 15) / 16 * 16;
}

void kvf_cpu_attn_init_amx(kvf_cpu_ops *ops)
{
    ops->attn_name = "amx_bf16";
    ops->attn_tile = tile_tokens;
    ops->attn_scratch_bytes = scratch_bytes;
    ops->attn = attn;
}
