/* quality.c - how much of the input the output still tells: a measure that needs no model.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "merge/plan.h"
#include "merge/similarity.h"
#include "merge/tile.h"

typedef struct work {
    const kvf_merge_env *env;
    const kvf_tensor *x;
    int64_t n, n_out;
    float *out;      /* [n_out][dim] without newlines */
    float *out_norm; /* [n_out] */
    int32_t *place;  /* [n_out of the plan] row in out; -1: newline */
    int32_t *owner;  /* [n] */
    float *near;     /* [n] distance to the nearest output */
    float *square;   /* [n] |x - nearest|^2 */
    float *own;      /* [n] distance to the owner; -1: dropped */
    float *row;      /* [workers][4][dim] */
} work;

static float distance(double dot, double a, double b)
{
    if (a == 0 && b == 0) return 0;
    float c = kvf_cosine(dot, a, b);
    return c > 1 ? 0 : 1 - c;
}

/* Four tokens against all outputs. */
static void four_tokens(void *arg, int64_t at, int32_t worker)
{
    work *w = arg;
    const kvf_rows *rows = &w->env->rows;
    int64_t dim = w->x->dim, first = 4 * at, n = w->n - first < 4 ? w->n - first : 4;
    float *row = w->row + 4 * (int64_t)worker * dim;
    double sum[4][2];
    for (int64_t r = 0; r < n; r++) {
        rows->widen[w->x->type](row + r * dim, kvf_tensor_token(w->x, first + r), dim);
        rows->pair[KVF_MERGE_F32](row + r * dim, row + r * dim, dim, sum[r]);
        w->near[first + r] = 2;
        w->square[first + r] = INFINITY;
        w->own[first + r] = -1;
    }
    for (int64_t j = 0; j < w->n_out; j += 4) {
        float out[4][4];
        kvf_row_set a = { row, n, dim }, b = { w->out + j * dim, w->n_out - j < 4 ? w->n_out - j : 4, dim };
        kvf_tile(rows->dot, a, b, dim, out[0], 4);
        for (int64_t r = 0; r < n; r++)
            for (int64_t c = 0; c < b.n; c++) {
                int64_t i = first + r;
                double on = (double)w->out_norm[j + c], d2 = sum[r][1] + on * on - 2 * (double)out[r][c];
                float d = distance((double)out[r][c], sqrt(sum[r][1]), on), s = d2 > 0 ? (float)d2 : 0.0f;
                w->near[i] = d < w->near[i] ? d : w->near[i];
                w->square[i] = s < w->square[i] ? s : w->square[i];
                if (w->owner[i] >= 0 && w->place[w->owner[i]] == j + c) w->own[i] = d;
            }
    }
}

/* The 95th percentile: the value that 95 of 100 do not pass. Bisection over the bits of non-negative floats.
 */
static double percentile95(const float *v, int64_t n)
{
    int64_t want = (19 * n + 19) / 20;
    uint32_t lo = 0, hi = 0x40000001u; /* just over 2 */
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        float cut;
        int64_t count = 0;
        memcpy(&cut, &mid, sizeof cut);
        for (int64_t i = 0; i < n; i++) count += v[i] <= cut;
        if (count >= want)
            hi = mid;
        else
            lo = mid + 1;
    }
    float cut;
    memcpy(&cut, &lo, sizeof cut);
    return (double)cut;
}

/* sum |x - mean|^2 over all tokens. */
static kvf_status spread(const work *w, double *out, kvf_error *err)
{
    double *mean, sum = 0;
    int64_t dim = w->x->dim;
    KVF_TRY(KVF_GET(w->env, &mean, dim, err));
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = 0; i < w->n; i++) {
            w->env->rows.widen[w->x->type](w->row, kvf_tensor_token(w->x, i), dim);
            for (int64_t d = 0; d < dim; d++) {
                double v = (double)w->row[d];
                if (pass == 0)
                    mean[d] += v / (double)w->n;
                else
                    sum += (v - mean[d]) * (v - mean[d]);
            }
        }
    kvf_free(w->env->mem, mean);
    *out = sum;
    return KVF_OK;
}

static kvf_status outputs(const kvf_merge_plan *p, work *w, kvf_error *err)
{
    size_t n;
    if (!kvf_mul_size((size_t)p->n_out, (size_t)w->x->dim, &n)) n = SIZE_MAX;
    float *all;
    KVF_TRY(kvf_mem_get(w->env->mem, (void **)&all, n, sizeof *all, err));
    w->out = all;
    for (int64_t i = 0; i < p->n_out; i++) {
        w->place[i] = -1;
        if (p->meta[i].kind == KVF_MERGE_NEWLINE) continue;
        float *row = all + w->n_out * w->x->dim;
        double sum[2];
        for (int64_t k = p->row[i]; k < p->row[i + 1]; k++) {
            const void *src = kvf_tensor_token(w->x, p->source[k]);
            w->env->rows.add[w->x->type](row, &src, &p->weight[k], 1, w->x->dim);
        }
        w->env->rows.pair[KVF_MERGE_F32](row, row, w->x->dim, sum);
        w->out_norm[w->n_out] = (float)sqrt(sum[1]);
        w->place[i] = (int32_t)w->n_out++;
    }
    return KVF_OK;
}

static kvf_status run(const kvf_merge_plan *p, work *w, kvf_merge_quality *q, kvf_error *err)
{
    const kvf_merge_env *env = w->env;
    int64_t n_worker = env->threads ? kvf_threads_count(env->threads) : 1, n_owned = 0;
    double near = 0, square = 0, own = 0, all = 0;
    KVF_TRY(KVF_GET(env, &w->out_norm, p->n_out, err));
    KVF_TRY(KVF_GET(env, &w->place, p->n_out, err));
    KVF_TRY(KVF_GET(env, &w->owner, w->n, err));
    KVF_TRY(KVF_GET(env, &w->near, 3 * w->n, err));
    KVF_TRY(KVF_GET(env, &w->row, 4 * n_worker * w->x->dim, err));
    w->square = w->near + w->n;
    w->own = w->square + w->n;
    for (int64_t i = 0; i < w->n; i++) KVF_TRY(kvf_tensor_finite(w->x, i, "features", err));
    KVF_TRY(kvf_merge_plan_owners(p, w->owner, err));
    KVF_TRY(outputs(p, w, err));
    KVF_TRY(spread(w, &all, err));
    kvf_merge_run(env, (w->n + 3) / 4, four_tokens, w);
    for (int64_t i = 0; i < w->n; i++) {
        near += (double)w->near[i];
        square += (double)w->square[i];
        if (w->own[i] < 0) continue;
        own += (double)w->own[i];
        n_owned++;
    }
    q->nearest_mean = near / (double)w->n;
    q->nearest_p95 = percentile95(w->near, w->n);
    q->owner_mean = n_owned > 0 ? own / (double)n_owned : 0;
    q->owner_share = (double)n_owned / (double)w->n;
    q->squared_error = all > 0 ? square / all : 0;
    return KVF_OK;
}

kvf_status kvf_merge_plan_quality(const kvf_merge_plan *p, const kvf_merge_view *features,
                                  kvf_merge_quality *q, kvf_error *err)
{
    kvf_tensor x;
    if (!p || !features || !q) return kvf_fail(err, KVF_ERR_ARG, "the plan, features or q is NULL");
    KVF_TRY(kvf_merge_check_size(q->size, sizeof *q, "kvf_merge_quality", err));
    KVF_TRY(kvf_tensor_init(&x, features, "features", err));
    if (x.n_frame != p->n_frame || x.n_tok != p->n_tok)
        return kvf_fail(err, KVF_ERR_ARG,
                        "features have %lld frames of %lld tokens, the plan was made for %lld of %lld",
                        (long long)x.n_frame, (long long)x.n_tok, (long long)p->n_frame, (long long)p->n_tok);
    work w = { .env = &p->env, .x = &x, .n = x.n_frame * x.n_tok };
    kvf_status rc = run(p, &w, q, err);
    void *all[] = { w.out, w.out_norm, w.place, w.owner, w.near, w.row };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kvf_free(p->env.mem, all[i]);
    return rc;
}
