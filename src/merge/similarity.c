/* similarity.c - see similarity.h. The pass is bound by memory: 90 MB for 32 frames of 196 tokens of 3584
 * numbers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/similarity.h"

#include <math.h>

/* Two blocks of rows, this frame's and the one before, stay in half a second-level cache. */
enum { BLOCK_BYTES = 256 * 1024 };

typedef struct pass {
    const kvf_merge_env *env;
    const kvf_tensor *x;
    kvf_rows ref; /* for rows whose squares leave the range of f32 */
    float *sim;
    double *norm;
    int64_t block; /* positions per task */
    int64_t first; /* frame to begin with; the one before it gives prev_norm */
    const double *prev_norm;
    int64_t *bad; /* [tasks] lowest frame and token of a value that is not finite, or -1 */
} pass;

float kvf_cosine(double dot, double norm_a, double norm_b)
{
    double a = norm_a > 1e-12 ? norm_a : 1e-12, b = norm_b > 1e-12 ? norm_b : 1e-12;
    return (float)(dot / a / b);
}

/* The sums of a row with the one before. A row of finite values whose sums overflow f32 is summed again in
 * double. False: a value is not finite. */
static bool pair_of(const pass *p, const void *prev, const void *cur, double out[2])
{
    const kvf_tensor *x = p->x;
    p->env->rows.pair[x->type](prev, cur, x->dim, out);
    if (isfinite(out[0]) && isfinite(out[1])) return true;
    p->ref.pair[x->type](prev, cur, x->dim, out);
    return isfinite(out[0]) && isfinite(out[1]);
}

/* Positions lo..hi-1 of frame t. False and *bad: the first that is not finite. */
static bool do_frame(const pass *p, int64_t t, int64_t lo, int64_t hi, int64_t *bad)
{
    const kvf_tensor *x = p->x;
    const double *before = t > p->first ? p->norm + (t - p->first - 1) * x->n_tok : p->prev_norm;
    double *norm = p->norm + (t - p->first) * x->n_tok;
    float *sim =
        p->sim + (before == p->prev_norm ? 0 : t - p->first - 1) * x->n_tok; /* unused where before is NULL */
    for (int64_t n = lo; n < hi; n++) {
        const void *cur = kvf_tensor_row(x, t, n);
        double out[2];
        if (!pair_of(p, before ? kvf_tensor_row(x, t - 1, n) : cur, cur, out)) {
            *bad = t * x->n_tok + n;
            return false;
        }
        norm[n] = sqrt(out[1]);
        if (before) sim[n] = kvf_cosine(out[0], before[n], norm[n]);
    }
    return true;
}

static void do_block(void *arg, int64_t i, int32_t worker)
{
    pass *p = arg;
    (void)worker;
    int64_t lo = i * p->block, hi = lo + p->block < p->x->n_tok ? lo + p->block : p->x->n_tok;
    p->bad[i] = -1;
    for (int64_t t = p->first; t < p->x->n_frame; t++)
        if (!do_frame(p, t, lo, hi, &p->bad[i])) return;
}

static kvf_status run_pass(pass *p, kvf_error *err)
{
    const kvf_tensor *x = p->x;
    int64_t row = x->dim * (int64_t)kvf_merge_type_bytes(x->type);
    p->block = BLOCK_BYTES / row > 1 ? BLOCK_BYTES / row : 1;
    if (p->block > x->n_tok) p->block = x->n_tok;
    int64_t n_task = (x->n_tok + p->block - 1) / p->block, first_bad = -1;
    kvf_rows_init_ref(&p->ref);
    KVF_TRY(KVF_GET(p->env, &p->bad, n_task, err));
    kvf_merge_run(p->env, n_task, do_block, p);
    for (int64_t i = 0; i < n_task; i++)
        if (p->bad[i] >= 0 && (first_bad < 0 || p->bad[i] < first_bad)) first_bad = p->bad[i];
    kvf_free(p->env->mem, p->bad);
    if (first_bad < 0) return KVF_OK;
    return kvf_tensor_finite(x, first_bad, "features", err);
}

kvf_status kvf_similarity(const kvf_merge_env *env, const kvf_tensor *x, float *sim, double *norm,
                          kvf_error *err)
{
    pass p = { .env = env, .x = x, .sim = sim, .norm = norm };
    return run_pass(&p, err);
}

kvf_status kvf_similarity_frame(const kvf_merge_env *env, const kvf_tensor *x, float *sim, double *norm,
                                const double *prev_norm, kvf_error *err)
{
    pass p = {
        .env = env, .x = x, .sim = sim, .norm = norm, .first = x->n_frame - 1, .prev_norm = prev_norm
    };
    return run_pass(&p, err);
}
