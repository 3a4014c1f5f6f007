/* attn_ref.c - attention as its formula (kvf_attn_args, backend/backend.h), in double: the
 * definition that the other levels are held to.
 *
 * One query row at a time: all scores, their log-sum-exp, then the weighted sum of values. Holes and
 * keys that a query does not see are never read, so slots may hold anything there.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "backend/cpu/attn_int.h"

static bool hole(const kvf_attn_args *a, int64_t j)
{
    kvf_key_range r = kvf_attn_valid(a, j >> KVF_BLOCK_SHIFT);
    int64_t place = j & (KVF_BLOCK - 1);
    return place < r.first || place >= r.end;
}

static double score(const kvf_attn_args *a, const float *q, const kvf_f16 *k)
{
    double dot = 0.0;
    for (int32_t i = 0; i < a->head_dim; i++) dot += (double)q[i] * (double)kvf_f32_from_f16(k[i]);
    double s = dot * (double)a->scale, cap = (double)a->softcap;
    return cap > 0.0 ? cap * tanh(s / cap) : s;
}

/* s_j of the keys of r into s[0..], and log sum_j exp(s_j). */
static double scores(const kvf_attn_part *p, const float *q, kvf_key_range r, double *s)
{
    double max = -INFINITY, sum = 0.0;
    int64_t n = r.end - r.first;
    for (int64_t i = 0; i < n; i++) {
        int64_t j = r.first + i;
        s[i] = -INFINITY;
        if (hole(p->a, j)) continue;
        const kvf_f16 *k = kvf_attn_k(p->a, p->head_kv, j >> KVF_BLOCK_SHIFT);
        s[i] = score(p->a, q, k + (j & (KVF_BLOCK - 1)) * p->a->head_dim);
        if (s[i] > max) max = s[i];
    }
    for (int64_t i = 0; i < n && max > -INFINITY; i++) sum += exp(s[i] - max);
    return sum > 0.0 ? max + log(sum) : -INFINITY;
}

static void attn_row(const kvf_attn_part *p, int64_t tok, int32_t g)
{
    const kvf_attn_args *a = p->a;
    kvf_key_range r = kvf_attn_visible(p, tok);
    float *o = kvf_attn_o(p, tok, g), *lse_out = kvf_attn_lse(p, tok, g);
    double *acc = p->scratch, *s = acc + a->head_dim;
    double lse = r.first < r.end ? scores(p, kvf_attn_q(p, tok, g), r, s) : -INFINITY;
    if (lse == -INFINITY) {
        memset(o, 0, (size_t)a->head_dim * sizeof *o);
        if (lse_out) *lse_out = -INFINITY;
        return;
    }
    for (int32_t i = 0; i < a->head_dim; i++) acc[i] = 0.0;
    for (int64_t j = r.first; j < r.end; j++) {
        if (hole(a, j)) continue;
        const kvf_f16 *v = kvf_attn_v(a, p->head_kv, j >> KVF_BLOCK_SHIFT);
        v += (j & (KVF_BLOCK - 1)) * a->head_dim;
        double w = exp(s[j - r.first] - lse);
        for (int32_t i = 0; i < a->head_dim; i++) acc[i] += w * (double)kvf_f32_from_f16(v[i]);
        if (a->runs) kvf_attn_runs(a, p->head_kv, g)[j / KVF_ATTN_RUN] += (float)w;
    }
    for (int32_t i = 0; i < a->head_dim; i++) o[i] = (float)acc[i];
    if (lse_out) *lse_out = (float)lse;
}

static void attn_ref(const kvf_attn_part *p)
{
    int32_t group = kvf_attn_group(p->a);
    for (int64_t tok = p->tok0; tok < p->tok1; tok++)
        for (int32_t g = 0; g < group; g++) attn_row(p, tok, g);
}

static int64_t attn_tile(const kvf_attn_args *a)
{
    (void)a;
    return 16; /* nothing is shared between queries: any split is as good */
}

/* One row's accumulator and scores. */
static size_t attn_scratch(const kvf_attn_args *a, int64_t n_tok)
{
    (void)n_tok;
    return ((size_t)a->head_dim + (size_t)a->n_key) * sizeof(double);
}

void kvf_cpu_attn_init_ref(kvf_cpu_ops *ops)
{
    ops->attn_name = "ref";
    ops->attn_decode_name = "ref";
    ops->attn_decode_max = 8;
    ops->attn_tile = attn_tile;
    ops->attn_scratch_bytes = attn_scratch;
    ops->attn = attn_ref;
    ops->attn_decode_scratch_bytes = attn_scratch;
    ops->attn_decode = attn_ref;
}
