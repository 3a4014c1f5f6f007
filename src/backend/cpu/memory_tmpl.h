/* memory_tmpl.h - scores of digests that are vectors (means, bounds, representatives), once for every
 * vector width: memory_avx2.c and memory_avx512.c include their simd_*.h and this file. memory_ref.c
 * defines the ops. Low-bit keys: memory_avx2.c and vote_avx512.c; column sums: mass_tmpl.h.
 *
 * Query rows lie along the lanes, so vectors are broadcast element by element, as in attn_tmpl.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_ops.h"
#include "backend/cpu/simd_math.h"

#define MT_INLINE static inline __attribute__((always_inline))

static inline float f16_value(const void *p, size_t i)
{
    kvf_f16 x;
    memcpy(&x, (const uint8_t *)p + 2 * i, 2);
    return kvf_f32_from_f16(x);
}

/* n halves to floats; p need not be aligned. */
static void widen(const void *p, size_t n, float *out)
{
    size_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store(out + i, vf_load_f16((const kvf_f16 *)p + i));
    for (; i < n; i++) out[i] = f16_value(p, i);
}

/* Dot products of nv lane vectors of rows with k [d]; with hi, of each product the larger of two. */
MT_INLINE void dots(int nv, bool bounds, const float *q, int64_t n_lane, const float *k, const float *hi, int32_t d, vf *sum)
{
    for (int v = 0; v < nv; v++) sum[v] = vf_zero();
    for (int32_t c = 0; c < d; c++, q += n_lane) {
        vf x = vf_set1(k[c]), y = bounds ? vf_set1(hi[c]) : x;
        for (int v = 0; v < nv; v++) {
            vf z = vf_load(q + v * VF_LANES);
            sum[v] = bounds ? vf_add(sum[v], vf_max(vf_mul(z, x), vf_mul(z, y))) : vf_fma(z, x, sum[v]);
        }
    }
}

/* Best of the unit's vectors for lanes lane.. of nv vectors. */
MT_INLINE void unit_best(int nv, bool bounds, const kvf_score_part *p, const float *k, int64_t lane, int32_t u)
{
    const kvf_rows *r = p->rows;
    int32_t n = p->unit / p->digest->sub, d = r->head_dim, all = KVF_DIGEST_BLOCK / p->digest->sub;
    vf best[4], sum[4];
    for (int v = 0; v < nv; v++) best[v] = vf_set1(-INFINITY);
    for (int32_t i = u * n; i < (u + 1) * n; i++) {
        dots(nv, bounds, r->q + lane, r->n_lane, k + i * d, bounds ? k + (all + i) * d : NULL, d, sum);
        for (int v = 0; v < nv; v++) best[v] = vf_max(best[v], sum[v]);
    }
    for (int v = 0; v < nv; v++) vf_store(p->s + (u - p->unit0) * r->n_lane + lane + v * VF_LANES, best[v]);
}

static void score_vectors(const kvf_score_part *p)
{
    const kvf_rows *r = p->rows;
    bool bounds = p->digest->kind == KVF_DIGEST_BOUNDS;
    const float *k = p->scratch;
    size_t n = (size_t)(KVF_DIGEST_BLOCK / p->digest->sub * r->head_dim) * (bounds ? 2 : 1);
    if (p->digest->kind == KVF_DIGEST_REPS)
        memcpy(p->scratch, p->row, n * sizeof(float));
    else
        widen(p->row, n, p->scratch);
    for (int32_t u = p->unit0; u < p->unit1; u++) {
        int64_t lane = 0;
        for (; lane + 4 * VF_LANES <= r->n_lane; lane += 4 * VF_LANES) {
            if (bounds)
                unit_best(4, true, p, k, lane, u);
            else
                unit_best(4, false, p, k, lane, u);
        }
        for (; lane < r->n_lane; lane += VF_LANES) {
            if (bounds)
                unit_best(1, true, p, k, lane, u);
            else
                unit_best(1, false, p, k, lane, u);
        }
    }
}

static void score(const kvf_score_part *p)
{
    if (p->digest->kind == KVF_DIGEST_REPS && p->digest->reps_per_q_head)
        kvf_cpu_score_ref(p); /* only for comparison with the paper */
    else
        score_vectors(p);
}

/* Vectors of bounds are the widest case. */
static size_t score_scratch(const kvf_rows *r)
{
    return (size_t)(2 * KVF_DIGEST_BLOCK / 4) * (size_t)r->head_dim * sizeof(float) + 64;
}

static void share_columns(float *s, int64_t n, int64_t stride, const float *gate)
{
    vf low = vf_set1(-1e30f);
    for (int l = 0; l < KVF_ROW_LANES; l += VF_LANES, s += VF_LANES) {
        vf top = gate ? vf_max(vf_load(gate + l), low) : low, sum = vf_zero();
        for (int64_t i = 0; i < n; i++) top = vf_max(vf_load(s + i * stride), top); /* in this order NaN loses */
        if (gate) sum = vf_exp(vf_sub(vf_load(gate + l), top));
        for (int64_t i = 0; i < n; i++) {
            vf e = vf_exp(vf_sub(vf_load(s + i * stride), top));
            sum = vf_add(sum, e);
            vf_store(s + i * stride, e);
        }
        vf share = vf_div(vf_set1(1.0f), sum);
        for (int64_t i = 0; i < n; i++) vf_store(s + i * stride, vf_mul(vf_load(s + i * stride), share));
    }
}

static void memory_init(kvf_cpu_ops *ops, const char *name)
{
    ops->score_name = name;
    ops->score = score;
    ops->score_scratch_bytes = score_scratch;
    ops->share_columns = share_columns;
}
