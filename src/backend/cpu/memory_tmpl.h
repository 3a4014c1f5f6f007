/* memory_tmpl.h - scores of digests and column sums of attention, once for every vector width:
 * memory_avx2.c and memory_avx512.c include their simd_*.h and this file. memory_ref.c defines the ops.
 *
 * Query rows lie along the lanes, so keys are broadcast element by element, as in attn_tmpl.h.
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

/* The part that differs: best integer dot product of tokens t0..t1 (multiples of 16) of a group, for
 * every lane: best [n_lane]. */
static void best_codes(const kvf_score_part *p, const uint8_t *codes, int32_t t0, int32_t t1, const int32_t *x, int32_t *best);

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

static void score(const kvf_score_part *p)
{
    if (p->digest->kind == KVF_DIGEST_BITS)
        score_bits(p);
    else if (p->digest->kind == KVF_DIGEST_REPS && p->digest->reps_per_q_head)
        kvf_cpu_score_ref(p); /* only for comparison with the paper */
    else
        score_vectors(p);
}

/* Vectors of bounds, the widest case of digests of vectors; rows of low-bit keys; unpacked codes. */
static size_t score_scratch(const kvf_rows *r)
{
    size_t d = (size_t)r->head_dim, n = (size_t)r->n_lane;
    size_t vectors = 2 * KVF_DIGEST_BLOCK / 4 * d, bits = 2 * d + 3 * n + d / 4 * n + 16 * d / 4 + 64 + 16 * n;
    return (vectors > bits ? vectors : bits) * sizeof(float) + 256;
}

/* ---- Column sums ---------------------------------------------------------------------------------- */

/* One vector of rows with all keys of the block. first_q: query of its first lane (rows / pad). */
static void mass_lanes(const kvf_mass_part *p, int64_t lane, const float *k)
{
    const kvf_rows *r = p->rows;
    int64_t width = r->pad <= KVF_ROW_LANES ? KVF_ROW_LANES : r->pad;
    int64_t q0 = p->q_first + lane / r->pad, q1 = p->q_first + (lane + VF_LANES - 1) / r->pad;
    if (p->base + p->key0 > q1 || (p->window > 0 && p->base + p->key1 - 1 <= q0 - p->window)) return;
    vf lse = vf_load(p->lse + lane);
    for (int32_t j = p->key0; j < p->key1; j++) {
        int64_t place = p->base + j;
        vf s[1];
        if (place > q1 || (p->window > 0 && place <= q0 - p->window)) continue;
        dots(1, false, r->q + lane, r->n_lane, k + j * r->head_dim, NULL, r->head_dim, s);
        if (p->softcap > 0) s[0] = vf_mul(vf_set1(p->softcap), vf_tanh(vf_mul(s[0], vf_set1(1.0f / p->softcap))));
        vf e = vf_exp(vf_sub(s[0], lse));
        float *sum = p->sum + j * width + lane % width, mask[VF_LANES];
        for (int l = 0; l < VF_LANES; l++) {
            int64_t last = p->q_first + (lane + l) / r->pad;
            bool seen = place <= last && (p->window <= 0 || place > last - p->window) && p->lse[lane + l] < 1e30f;
            mask[l] = seen ? 1.0f : 0.0f;
        }
        vf_store(sum, vf_fma(e, vf_load(mask), vf_load(sum)));
    }
}

static void mass(const kvf_mass_part *p)
{
    float *k = p->scratch;
    int32_t d = p->rows->head_dim;
    widen(p->k + p->key0 * d, (size_t)((p->key1 - p->key0) * d), k + p->key0 * d);
    for (int64_t lane = 0; lane < p->rows->n_lane; lane += VF_LANES) mass_lanes(p, lane, k);
}

static void exp_columns(float *s, int64_t n, int64_t stride, const float *max, float *sum)
{
    for (int l = 0; l < KVF_ROW_LANES; l += VF_LANES) {
        vf m = vf_load(max + l), total = vf_zero();
        for (int64_t i = 0; i < n; i++) {
            vf e = vf_exp(vf_sub(vf_load(s + i * stride + l), m));
            total = vf_add(total, e);
            vf_store(s + i * stride + l, e);
        }
        vf_store(sum + l, total);
    }
}

static void memory_init(kvf_cpu_ops *ops, const char *name)
{
    ops->score_name = name;
    ops->score = score;
    ops->score_scratch_bytes = score_scratch;
    ops->mass = mass;
    ops->exp_columns = exp_columns;
}
