/* memory_ref.c - scores of digests and column sums of attention as their formulas, in double: the
 * definition that the other levels are held to.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_ops.h"

static float f16_at(const void *p, size_t i)
{
    kvf_f16 x;
    memcpy(&x, (const uint8_t *)p + 2 * i, 2);
    return kvf_f32_from_f16(x);
}

static double q_at(const kvf_rows *r, int64_t lane, int32_t c) { return (double)r->q[c * r->n_lane + lane]; }

static double token_score(const kvf_score_part *p, int64_t lane, int32_t t)
{
    const kvf_digest *g = p->digest;
    int32_t d = g->head_dim;
    size_t group = 4 * (size_t)d + (size_t)KVF_DIGEST_GROUP * (size_t)d * (size_t)g->bits / 8;
    const uint8_t *at = (const uint8_t *)p->row + (size_t)(t / KVF_DIGEST_GROUP) * group;
    double s = 0;
    for (int32_t c = 0; c < d; c++) {
        size_t byte;
        int32_t bit;
        kvf_digest_code_at(g, t % KVF_DIGEST_GROUP, c, &byte, &bit);
        int32_t code = at[4 * (size_t)d + byte] >> bit & ((1 << g->bits) - 1);
        s += q_at(p->rows, lane, c) * ((double)f16_at(at, (size_t)c) + code * (double)f16_at(at, (size_t)(d + c)));
    }
    return s;
}

static double vector_score(const kvf_score_part *p, int64_t lane, int32_t i)
{
    const kvf_digest *g = p->digest;
    int32_t d = g->head_dim, n = KVF_DIGEST_BLOCK / g->sub;
    double s = 0;
    for (int32_t c = 0; c < d; c++) {
        double q = q_at(p->rows, lane, c);
        if (g->kind == KVF_DIGEST_MEAN) {
            s += q * (double)f16_at(p->row, (size_t)(i * d + c));
        } else if (g->kind == KVF_DIGEST_BOUNDS) {
            double lo = q * (double)f16_at(p->row, (size_t)(i * d + c)), hi = q * (double)f16_at(p->row, (size_t)((n + i) * d + c));
            s += lo > hi ? lo : hi;
        } else {
            int32_t n_vec = g->reps_per_q_head ? p->rows->group : 1, v = (int32_t)(lane % p->rows->pad);
            float x;
            memcpy(&x, (const uint8_t *)p->row + 4 * (size_t)((i * n_vec + (v < n_vec ? v : 0)) * d + c), 4);
            s += q * (double)x;
        }
    }
    return s;
}

void kvf_cpu_score_ref(const kvf_score_part *p)
{
    bool bits = p->digest->kind == KVF_DIGEST_BITS;
    int32_t n = bits ? p->unit : p->unit / p->digest->sub;
    for (int32_t u = p->unit0; u < p->unit1; u++) {
        for (int64_t lane = 0; lane < p->rows->n_lane; lane++) {
            double best = -INFINITY;
            for (int32_t i = u * n; i < (u + 1) * n; i++) {
                double s = bits ? token_score(p, lane, i) : vector_score(p, lane, i);
                if (s > best) best = s;
            }
            p->s[(u - p->unit0) * p->rows->n_lane + lane] = (float)best;
        }
    }
}

static size_t score_scratch(const kvf_rows *rows)
{
    (void)rows;
    return 0;
}

static void mass(const kvf_mass_part *p)
{
    const kvf_rows *r = p->rows;
    int64_t width = r->pad <= KVF_ROW_LANES ? KVF_ROW_LANES : r->pad;
    for (int32_t j = p->key0; j < p->key1; j++) {
        for (int64_t lane = 0; lane < r->n_lane; lane++) {
            int64_t last = p->q_first + lane / r->pad, place = p->base + j;
            if (p->lse[lane] == INFINITY || place > last || (p->window > 0 && place <= last - p->window)) continue;
            double s = 0;
            for (int32_t c = 0; c < r->head_dim; c++) s += q_at(r, lane, c) * (double)f16_at(p->k, (size_t)(j * r->head_dim + c));
            if (p->softcap > 0) s = (double)p->softcap * tanh(s / (double)p->softcap);
            p->sum[j * width + lane % width] += (float)exp(s - (double)p->lse[lane]);
        }
    }
}

static void share_columns(float *s, int64_t n, int64_t stride, const float *gate)
{
    for (int l = 0; l < KVF_ROW_LANES; l++, s++) {
        double top = gate && gate[l] > -1e30f ? (double)gate[l] : -1e30;
        for (int64_t i = 0; i < n; i++)
            if ((double)s[i * stride] > top) top = (double)s[i * stride];
        double sum = gate ? exp((double)gate[l] - top) : 0;
        for (int64_t i = 0; i < n; i++) {
            double e = exp((double)s[i * stride] - top);
            sum += e;
            s[i * stride] = (float)e;
        }
        for (int64_t i = 0; i < n; i++) s[i * stride] *= (float)(1 / sum);
    }
}

void kvf_cpu_memory_init_ref(kvf_cpu_ops *ops)
{
    ops->score_name = "ref";
    ops->score = kvf_cpu_score_ref;
    ops->score_scratch_bytes = score_scratch;
    ops->mass = mass;
    ops->share_columns = share_columns;
}
