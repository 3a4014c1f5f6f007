/* score.c - what stands in for attention scores, and how many tokens a ratio leaves.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "merge/method.h"
#include "merge/similarity.h"

int64_t kvf_merge_floor(double ratio, int64_t n)
{
    int64_t count = (int64_t)floor(ratio * (double)n * (1 + 4 * DBL_EPSILON));
    return count > n ? n : count;
}

int64_t kvf_merge_count(double ratio, int64_t n)
{
    int64_t count = kvf_merge_floor(ratio, n);
    return count > 1 ? count : 1;
}

typedef struct task {
    const kvf_merge_env *env;
    const kvf_merge_stand_in *s;
    const kvf_tensor *x;
    float *mean; /* [frames][dim] */
    float *row;  /* [workers][dim] */
} task;

enum { GATHER = 64 };

static void frame_mean(void *arg, int64_t i, int32_t worker)
{
    const task *t = arg;
    const kvf_tensor *x = t->x;
    (void)worker;
    float w[GATHER], *mean = t->mean + i * x->dim;
    for (int64_t n = 0; n < GATHER; n++) w[n] = 1.0f / (float)x->n_tok;
    memset(mean, 0, (size_t)x->dim * sizeof *mean);
    for (int64_t n = 0; n < x->n_tok; n += GATHER) {
        const void *src[GATHER];
        int64_t m = x->n_tok - n < GATHER ? x->n_tok - n : GATHER;
        for (int64_t j = 0; j < m; j++) src[j] = kvf_tensor_row(x, t->s->first + i, n + j);
        t->env->rows.add[x->type](mean, src, w, m, x->dim);
    }
}

static double length(const task *t, const float *row)
{
    double out[2];
    t->env->rows.pair[KVF_MERGE_F32](row, row, t->x->dim, out);
    return sqrt(out[1]);
}

static void frame_scores(void *arg, int64_t i, int32_t worker)
{
    const task *t = arg;
    const kvf_tensor *x = t->x;
    const float *mean = t->mean + (t->s->whole ? 0 : i * x->dim);
    float *row = t->row + (int64_t)worker * x->dim;
    double norm = length(t, mean), out[2];
    for (int64_t n = 0; n < x->n_tok; n++) {
        if (t->s->skip && t->s->skip[n]) continue;
        const void *cur = kvf_tensor_row(x, t->s->first + i, n);
        if (x->type != KVF_MERGE_F32) {
            t->env->rows.widen[x->type](row, cur, x->dim);
            cur = row;
        }
        t->env->rows.pair[KVF_MERGE_F32](mean, cur, x->dim, out);
        float score = 1.0f - kvf_cosine(out[0], norm, sqrt(out[1]));
        t->s->out[i * x->n_tok + n] = isfinite(score) ? score : 1.0f; /* squares past the range of f32 */
    }
}

kvf_status kvf_merge_substitute(const kvf_merge_env *env, const kvf_merge_stand_in *s, kvf_error *err)
{
    int64_t n = s->last - s->first + 1, dim = s->x->dim,
            n_worker = env->threads ? kvf_threads_count(env->threads) : 1;
    task t = { .env = env, .s = s, .x = s->x };
    kvf_status rc = KVF_GET(env, &t.mean, n * dim, err);
    if (rc >= 0) rc = KVF_GET(env, &t.row, n_worker * dim, err);
    if (rc >= 0) {
        kvf_merge_run(env, n, frame_mean, &t);
        for (int64_t i = 1; i < n && s->whole; i++)
            for (int64_t d = 0; d < dim; d++) t.mean[d] += t.mean[i * dim + d];
        kvf_merge_run(env, n, frame_scores, &t); /* the length of the mean does not matter */
    }
    kvf_free(env->mem, t.mean);
    kvf_free(env->mem, t.row);
    return rc;
}
