/* mass_tmpl.h - column sums of attention (kvf_mass_part), once for every vector width: mass_avx2.c and
 * mass_avx512.c include their simd_*.h, set TILE_M, then include this file. memory_ref.c defines the op.
 *
 * Query rows lie along the lanes, as in attn_tmpl.h, and scores are the same register tile: TILE_M keys,
 * broadcast element by element, times TILE_N vectors of rows. The rows of a strip are copied together
 * first: in the call's layout the channels of a row lie a power of two apart, on the same few lines of
 * the L1 cache. Keys are widened a tile at a time, which costs 2 % of the products with whole strips.
 * Only keys that some row of the strip sees are read.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "backend/cpu/attn_int.h"
#include "backend/cpu/simd_math.h"

#define TILE_N 3                  /* lane vectors of a strip */
#define STRIP (TILE_N * VF_LANES) /* scratch: q [head_dim][STRIP] and k [TILE_M][head_dim], of KVF_BLOCK rows */

/* Keys fetched ahead: one query has little to compute meanwhile (0.45 to 0.39 ms for 6000 keys of two
 * heads of 64; 32 and 64 are no better). */
enum { AHEAD = 16 };

/* Rows of one strip against one block. */
typedef struct strip {
    const kvf_mass_part *p;
    int64_t lane; /* first row */
    float *q, *k;
    float lse[STRIP];
    int32_t lo[STRIP], hi[STRIP]; /* keys of the block that a row sees: lo <= key < hi */
    int32_t key0, key1;           /* and those that any row does */
} strip;

/* Places of the block that row `lane` sees. */
static void row_sees(strip *t, int64_t i)
{
    const kvf_mass_part *p = t->p;
    int64_t last = p->q_first + (t->lane + i) / p->rows->pad - p->base, lo = p->key0, hi = p->key1;
    if (last + 1 < hi) hi = last + 1;
    if (p->window > 0 && last - p->window + 1 > lo) lo = last - p->window + 1;
    bool none = lo >= hi || !(p->lse[t->lane + i] < INFINITY);
    t->lse[i] = none ? 0.0f : p->lse[t->lane + i];
    t->lo[i] = none ? 0 : (int32_t)lo;
    t->hi[i] = none ? 0 : (int32_t)hi;
    if (none) return;
    if (t->lo[i] < t->key0) t->key0 = t->lo[i];
    if (t->hi[i] > t->key1) t->key1 = t->hi[i];
}

static void strip_load(strip *t, int nv)
{
    const kvf_rows *r = t->p->rows;
    t->key0 = KVF_BLOCK;
    t->key1 = 0;
    for (int64_t i = 0; i < nv * VF_LANES; i++) row_sees(t, i);
    if (t->key0 >= t->key1) return;
    for (int64_t c = 0; c < r->head_dim; c++)
        for (int64_t i = 0; i < nv * VF_LANES; i += VF_LANES)
            vf_store(t->q + c * nv * VF_LANES + i, vf_load(r->q + c * r->n_lane + t->lane + i));
}

/* Widen keys j..j + TILE_M; past the last seen key it is repeated. */
static void keys_load(const strip *t, int32_t j)
{
    int64_t d = t->p->rows->head_dim;
    for (int32_t i = 0; i < TILE_M; i++) {
        const kvf_f16 *k = t->p->k + (j + i < t->key1 ? j + i : t->key1 - 1) * d;
        const kvf_f16 *ahead = t->p->k + (j + i + AHEAD < KVF_BLOCK ? j + i + AHEAD : KVF_BLOCK - 1) * d;
        for (int64_t c = 0; c < d; c += 32) _mm_prefetch((const char *)(ahead + c), _MM_HINT_T0);
        for (int64_t c = 0; c < d; c += 8) vf_widen8(t->k + i * d + c, k + c);
    }
}

KVF_INLINE void tile_scores(const strip *t, int nv, vf sum[TILE_M][TILE_N])
{
    int64_t d = t->p->rows->head_dim;
    const float *q = t->q;
    KVF_UNROLL
    for (int i = 0; i < TILE_M; i++) {
        KVF_UNROLL
        for (int v = 0; v < nv; v++) sum[i][v] = vf_zero();
    }
    for (int64_t c = 0; c < d; c++, q += nv * VF_LANES) {
        vf x[TILE_N];
        KVF_UNROLL
        for (int v = 0; v < nv; v++) x[v] = vf_load(q + v * VF_LANES);
        KVF_UNROLL
        for (int i = 0; i < TILE_M; i++) {
            vf y = vf_set1(t->k[i * d + c]);
            KVF_UNROLL
            for (int v = 0; v < nv; v++) sum[i][v] = vf_fma(y, x[v], sum[i][v]);
        }
    }
}

/* Add the shares of keys j..j + TILE_M to the block's sums. */
KVF_INLINE void tile_add(const strip *t, int nv, int32_t j, vf s[TILE_M][TILE_N])
{
    const kvf_mass_part *p = t->p;
    int64_t width = p->rows->pad > KVF_ROW_LANES ? p->rows->pad : KVF_ROW_LANES;
    vf cap = vf_set1(p->softcap), inverse = vf_set1(p->softcap > 0.0f ? 1.0f / p->softcap : 0.0f);
    for (int i = 0; i < TILE_M && j + i < t->key1; i++) {
        for (int v = 0; v < nv; v++) {
            float *sum = p->sum + (j + i) * width + (t->lane + v * VF_LANES) % width;
            vf x = p->softcap > 0.0f ? vf_mul(cap, vf_tanh(vf_mul(s[i][v], inverse))) : s[i][v];
            vf e = vf_exp(vf_sub(x, vf_load(t->lse + v * VF_LANES)));
            vm sees = vi_within(vi_set1(j + i), vi_load(t->lo + v * VF_LANES), vi_load(t->hi + v * VF_LANES));
            vf_store(sum, vf_add(vf_load(sum), vf_select(sees, e, vf_zero())));
        }
    }
}

KVF_INLINE void strip_run(strip *t, int nv)
{
    strip_load(t, nv);
    for (int32_t j = t->key0; j < t->key1; j += TILE_M) {
        vf s[TILE_M][TILE_N];
        keys_load(t, j);
        tile_scores(t, nv, s);
        tile_add(t, nv, j, s);
    }
}

static void mass(const kvf_mass_part *p)
{
    int64_t n = p->rows->n_q * p->rows->pad; /* rows; the lanes after them are filling */
    float *scratch = p->scratch;
    strip t = { .p = p, .q = scratch, .k = scratch + STRIP * p->rows->head_dim };
    for (; t.lane < n; t.lane += STRIP) {
        int64_t left = n - t.lane;
        if (left > 2 * VF_LANES)
            strip_run(&t, 3);
        else if (left > VF_LANES)
            strip_run(&t, 2);
        else
            strip_run(&t, 1);
    }
}
