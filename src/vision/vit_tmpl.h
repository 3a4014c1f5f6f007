/* vit_tmpl.h - the tower's kernels, once for every vector width: vit_avx2.c and vit_avx512.c include their
 * backend/cpu/simd_*.h, set TILE_M, then include this file. vit_ref.c defines the ops.
 *
 * Attention is taken transposed: TILE_N vectors of queries lie along the lanes, so that softmax needs no
 * sum across lanes, and a frame is short enough (729 keys in so400m) to hold the scores of one tile of
 * queries against all keys in L2. The softmax is therefore exact in one go, without rescaling, and the
 * sum of each key's column, which tells how much attention a patch received, costs one addition a score.
 *     S [key][query]  = K Q^T        K packed per head, broadcast element by element
 *     O [dim][query]  = V^T P        V likewise
 * Both are one register tile of TILE_M x TILE_N vectors.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "backend/cpu/simd_math.h"
#include "base/unroll.h"
#include "vision/vit_ops.h"

#define TILE_N 3                 /* lane vectors of queries */
#define ROWS (TILE_N * VF_LANES) /* queries of a whole tile */
#define INLINE static inline __attribute__((always_inline))

/* ---- Element-wise ----------------------------------------------------------------------- */

static float sum_of(const float *x, int64_t n)
{
    vf a = vf_zero(), b = a, c = a, d = a; /* four sums hide the latency of an addition */
    int64_t i = 0;
    for (; i + 4 * VF_LANES <= n; i += 4 * VF_LANES) {
        a = vf_add(a, vf_load(x + i));
        b = vf_add(b, vf_load(x + i + VF_LANES));
        c = vf_add(c, vf_load(x + i + 2 * VF_LANES));
        d = vf_add(d, vf_load(x + i + 3 * VF_LANES));
    }
    for (; i < n; i += VF_LANES) a = vf_add(a, n - i >= VF_LANES ? vf_load(x + i) : vf_load_n(x + i, n - i));
    return vf_sum(vf_add(vf_add(a, b), vf_add(c, d)));
}

/* Around the mean, in a second pass: E(x^2) - mean^2 cancels where the mean is large. */
static float squares_around(const float *x, int64_t n, float mean)
{
    vf m = vf_set1(mean), a = vf_zero(), b = a;
    int64_t i = 0;
    for (; i + 2 * VF_LANES <= n; i += 2 * VF_LANES) {
        vf u = vf_sub(vf_load(x + i), m), v = vf_sub(vf_load(x + i + VF_LANES), m);
        a = vf_fma(u, u, a);
        b = vf_fma(v, v, b);
    }
    float tail = 0;
    for (; i < n && n - i >= VF_LANES; i += VF_LANES) {
        vf u = vf_sub(vf_load(x + i), m);
        a = vf_fma(u, u, a);
    }
    for (; i < n; i++) tail += (x[i] - mean) * (x[i] - mean);
    return vf_sum(vf_add(a, b)) + tail;
}

static void layernorm(const float *x, const float *weight, const float *bias, float *out, int64_t width, float eps)
{
    float mean = sum_of(x, width) / (float)width;
    float r = 1.0f / sqrtf(squares_around(x, width, mean) / (float)width + eps);
    vf m = vf_set1(mean), s = vf_set1(r);
    int64_t i = 0;
    for (; i + VF_LANES <= width; i += VF_LANES) {
        vf y = vf_mul(vf_sub(vf_load(x + i), m), s);
        vf_store(out + i, vf_fma(y, vf_load(weight + i), vf_load(bias + i)));
    }
    if (i < width) {
        int64_t n = width - i;
        vf y = vf_mul(vf_sub(vf_load_n(x + i, n), m), s);
        vf_store_n(out + i, vf_fma(y, vf_load_n(weight + i, n), vf_load_n(bias + i, n)), n);
    }
}

/* x / (1 + e^(-c x)): SiLU with c = 1, the quick GELU with c = 1.702. */
INLINE vf swish(vf x, float c)
{
    return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_mul(x, vf_set1(-c)))));
}

/* x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE vf gelu_tanh(vf x)
{
    vf u2 = vf_mul(x, vf_fma(vf_mul(x, x), vf_set1(0.0713548163f), vf_set1(1.59576912f)));
    return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), u2))));
}

/* With z = |x| / sqrt 2, t = 1 / (1 + p z) and erf z = 1 - poly(t) e^(-z^2), to 1.5e-7 (Abramowitz and
 * Stegun, 7.1.26): the tail q = poly(t) e^(-z^2) / 2 is small where x is far from 0, so that x q keeps its
 * digits for negative x, and x - x q for positive. */
INLINE vf gelu_erf(vf x)
{
    vf z = vf_mul(vf_abs(x), vf_set1(0.707106781f));
    vf t = vf_div(vf_set1(1.0f), vf_fma(z, vf_set1(0.3275911f), vf_set1(1.0f)));
    vf y = vf_fma(vf_set1(1.061405429f), t, vf_set1(-1.453152027f));
    y = vf_fma(y, t, vf_set1(1.421413741f));
    y = vf_fma(y, t, vf_set1(-0.284496736f));
    y = vf_fma(y, t, vf_set1(0.254829592f));
    vf e = vf_exp(vf_sub(vf_zero(), vf_mul(z, z)));
    vf tail = vf_mul(vf_mul(x, vf_set1(0.5f)), vf_mul(vf_mul(y, t), e));
    return vf_select(vf_lt(x, vf_zero()), tail, vf_sub(x, tail));
}

INLINE vf act_vector(vf x, kvf_vit_act act)
{
    switch (act) {
    case KVF_VIT_GELU_TANH: return gelu_tanh(x);
    case KVF_VIT_GELU_QUICK: return swish(x, 1.702f);
    case KVF_VIT_GELU_ERF: return gelu_erf(x);
    default: return swish(x, 1.0f);
    }
}

INLINE void act_loop(float *x, int64_t n, kvf_vit_act act)
{
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store(x + i, act_vector(vf_load(x + i), act));
    if (i < n) vf_store_n(x + i, act_vector(vf_load_n(x + i, n - i), act), n - i);
}

static void act_run(float *x, int64_t n, kvf_vit_act act)
{
    switch (act) { /* one loop each, without a choice inside */
    case KVF_VIT_GELU_TANH: act_loop(x, n, KVF_VIT_GELU_TANH); break;
    case KVF_VIT_GELU_QUICK: act_loop(x, n, KVF_VIT_GELU_QUICK); break;
    case KVF_VIT_GELU_ERF: act_loop(x, n, KVF_VIT_GELU_ERF); break;
    default: act_loop(x, n, KVF_VIT_SILU); break;
    }
}

/* ---- Attention -------------------------------------------------------------------------- */

typedef struct attn_work {
    const kvf_vit_attn_part *p;
    int64_t n_key, d;  /* keys; head_dim */
    int64_t padded;    /* keys in whole tiles */
    float *k;          /* [padded][d], rows past n_key are 0 */
    float *v;          /* [n_key][d] */
    float *q, *o;      /* [d][queries of the tile] */
    float *s;          /* [padded][queries of the tile] */
    float *column;     /* [n_key][VF_LANES] sums of p, lane by lane; NULL: not asked for */
} attn_work;

static float *take(char *base, size_t *used, int64_t n)
{
    char *p = base ? base + *used : NULL;
    *used += ((size_t)n * sizeof(float) + 63u) & ~(size_t)63u;
    return (float *)(void *)p;
}

/* Place the arrays in scratch; with base NULL only the size counts. */
static size_t place(attn_work *w, const kvf_vit_attn_args *a, void *base)
{
    size_t used = 0;
    w->n_key = a->n_pos;
    w->d = a->head_dim;
    w->padded = (a->n_pos + TILE_M - 1) / TILE_M * TILE_M;
    w->k = take(base, &used, w->padded * w->d);
    w->v = take(base, &used, w->n_key * w->d);
    w->q = take(base, &used, w->d * ROWS);
    w->o = take(base, &used, w->d * ROWS);
    w->s = take(base, &used, w->padded * ROWS);
    w->column = a->mass ? take(base, &used, w->n_key * VF_LANES) : NULL;
    return used;
}

static size_t attn_scratch(const kvf_vit_attn_args *a)
{
    attn_work w;
    return place(&w, a, NULL);
}

/* c [TILE_M][nv * VF_LANES] = sum_k a(i, k) b[k][..], a(i, k) = a[i * a_row + k * a_col]. */
INLINE void tile(int nv, const float *a, int64_t a_row, int64_t a_col, const float *b, float *c, int64_t n_k)
{
    vf sum[TILE_M][TILE_N];
    int64_t width = nv * VF_LANES;
    KVF_UNROLL
    for (int i = 0; i < TILE_M; i++) {
        KVF_UNROLL
        for (int j = 0; j < nv; j++) sum[i][j] = vf_zero();
    }
    for (int64_t k = 0; k < n_k; k++) {
        vf x[TILE_N];
        KVF_UNROLL
        for (int j = 0; j < nv; j++) x[j] = vf_load(b + k * width + j * VF_LANES);
        KVF_UNROLL
        for (int i = 0; i < TILE_M; i++) {
            vf y = vf_set1(a[i * a_row + k * a_col]);
            KVF_UNROLL
            for (int j = 0; j < nv; j++) sum[i][j] = vf_fma(y, x[j], sum[i][j]);
        }
    }
    KVF_UNROLL
    for (int i = 0; i < TILE_M; i++) {
        KVF_UNROLL
        for (int j = 0; j < nv; j++) vf_store(c + i * width + j * VF_LANES, sum[i][j]);
    }
}

/* Scores of one lane vector of queries to 2^(s - max); returns 1 / sum. */
INLINE vf softmax(float *s, int64_t n, int64_t width)
{
    vf max = vf_load(s), max2 = max;
    int64_t j = 1;
    for (; j + 2 <= n; j += 2) {
        max = vf_max(max, vf_load(s + j * width));
        max2 = vf_max(max2, vf_load(s + (j + 1) * width));
    }
    if (j < n) max = vf_max(max, vf_load(s + j * width));
    max = vf_max(max, max2);
    vf sum = vf_zero();
    for (j = 0; j < n; j++) {
        vf e = vf_exp2_neg(vf_sub(vf_load(s + j * width), max));
        vf_store(s + j * width, e);
        sum = vf_add(sum, e);
    }
    return vf_div(vf_set1(1.0f), sum);
}

/* Queries row..row + n of the tile, n <= nv * VF_LANES; lanes past n are zero and counted nowhere. */
INLINE void attn_tile(const attn_work *w, int nv, int64_t row, int64_t n)
{
    const kvf_vit_attn_args *a = w->p->a;
    int64_t width = nv * VF_LANES, stride = a->n_head * w->d;
    int64_t at = (w->p->frame * a->n_pos + row) * stride + w->p->head * w->d;
    float unit = a->scale * 1.44269504f; /* softmax in base 2 */
    _Alignas(64) float inverse[ROWS];
    for (int64_t c = 0; c < w->d; c++) {
        float *q = w->q + c * width;
        for (int64_t i = 0; i < width; i++) q[i] = i < n ? a->q[at + i * stride + c] * unit : 0.0f;
    }
    for (int64_t j = 0; j < w->padded; j += TILE_M) tile(nv, w->k + j * w->d, w->d, 1, w->q, w->s + j * width, w->d);
    for (int j = 0; j < nv; j++) vf_store(inverse + j * VF_LANES, softmax(w->s + j * VF_LANES, w->n_key, width));
    for (int64_t i = n; i < width; i++) inverse[i] = 0.0f;
    if (w->column) {
        for (int64_t j = 0; j < w->n_key; j++) {
            vf sum = vf_load(w->column + j * VF_LANES);
            KVF_UNROLL
            for (int v = 0; v < nv; v++)
                sum = vf_fma(vf_load(w->s + j * width + v * VF_LANES), vf_load(inverse + v * VF_LANES), sum);
            vf_store(w->column + j * VF_LANES, sum);
        }
    }
    for (int64_t c = 0; c < w->d; c += TILE_M) tile(nv, w->v + c, 1, w->d, w->s, w->o + c * width, w->n_key);
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < w->d; c++) a->o[at + i * stride + c] = w->o[c * width + i] * inverse[i];
}

static void pack_keys(const attn_work *w)
{
    const kvf_vit_attn_args *a = w->p->a;
    int64_t stride = a->n_head * w->d, at = w->p->frame * a->n_pos * stride + w->p->head * w->d;
    for (int64_t j = 0; j < w->n_key; j++) {
        memcpy(w->k + j * w->d, a->k + at + j * stride, (size_t)w->d * sizeof(float));
        memcpy(w->v + j * w->d, a->v + at + j * stride, (size_t)w->d * sizeof(float));
    }
    memset(w->k + w->n_key * w->d, 0, (size_t)((w->padded - w->n_key) * w->d) * sizeof(float));
}

static void attn_run(const kvf_vit_attn_part *p)
{
    attn_work w = { .p = p };
    place(&w, p->a, p->scratch);
    pack_keys(&w);
    if (w.column) memset(w.column, 0, (size_t)(w.n_key * VF_LANES) * sizeof(float));
    for (int64_t row = p->row0; row < p->row1; row += ROWS) {
        int64_t n = p->row1 - row;
        if (n > 2 * VF_LANES)
            attn_tile(&w, 3, row, n < ROWS ? n : ROWS);
        else if (n > VF_LANES)
            attn_tile(&w, 2, row, n);
        else
            attn_tile(&w, 1, row, n);
    }
    for (int64_t j = 0; p->mass && j < w.n_key; j++) p->mass[j] = vf_sum(vf_load(w.column + j * VF_LANES));
}
