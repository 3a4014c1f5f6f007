/* apply.c - a plan times a tensor.
 *
 * Tasks are runs of output tokens; each sums into a row of its own that stays in the first-level cache, so
 * the pass is bound by reading the sources. A row of one source with weight 1 is copied without rounding when
 * the types agree.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <string.h>

#include "merge/plan.h"

enum { TASK_ROWS = 8, GATHER = 64 };

typedef struct task {
    const kvf_merge_plan *p;
    const kvf_tensor *x;
    const void *newline;
    char *dst;
    kvf_merge_type dst_type;
    int64_t dst_bytes; /* from row to row */
    float *sum;        /* [workers][dim] */
} task;

static void sum_sources(const task *t, int64_t i, float *sum)
{
    const kvf_merge_plan *p = t->p;
    memset(sum, 0, (size_t)t->x->dim * sizeof *sum);
    for (int64_t k = p->row[i]; k < p->row[i + 1]; k += GATHER) {
        const void *src[GATHER];
        int64_t n = p->row[i + 1] - k < GATHER ? p->row[i + 1] - k : GATHER;
        for (int64_t j = 0; j < n; j++) src[j] = kvf_tensor_token(t->x, p->source[k + j]);
        p->env.rows.add[t->x->type](sum, src, p->weight + k, n, t->x->dim);
    }
}

static void one_row(const task *t, int64_t i, float *sum)
{
    const kvf_merge_plan *p = t->p;
    const kvf_tensor *x = t->x;
    void *dst = t->dst + i * t->dst_bytes;
    int64_t k = p->row[i];
    bool one = p->row[i + 1] - k == 1 && p->weight[k] == 1.0f;
    const void *src = p->meta[i].kind == KVF_MERGE_NEWLINE ? t->newline
                      : one                                ? kvf_tensor_token(x, p->source[k])
                                                           : NULL;
    if (src && t->dst_type == x->type) {
        memcpy(dst, src, (size_t)x->dim * kvf_merge_type_bytes(x->type));
        return;
    }
    float *to = t->dst_type == KVF_MERGE_F32 ? dst : sum;
    if (src)
        p->env.rows.widen[x->type](to, src, x->dim);
    else
        sum_sources(t, i, to);
    if (to == sum) p->env.rows.narrow[t->dst_type](dst, sum, x->dim);
}

static void do_rows(void *arg, int64_t at, int32_t worker)
{
    const task *t = arg;
    int64_t end = (at + 1) * TASK_ROWS < t->p->n_out ? (at + 1) * TASK_ROWS : t->p->n_out;
    for (int64_t i = at * TASK_ROWS; i < end; i++) one_row(t, i, t->sum + (int64_t)worker * t->x->dim);
}

static kvf_status run(task *t, kvf_error *err)
{
    const kvf_merge_env *env = &t->p->env;
    int64_t n_worker = env->threads ? kvf_threads_count(env->threads) : 1;
    KVF_TRY(KVF_GET(env, &t->sum, n_worker * t->x->dim, err));
    kvf_merge_run(env, (t->p->n_out + TASK_ROWS - 1) / TASK_ROWS, do_rows, t);
    kvf_free(env->mem, t->sum);
    return KVF_OK;
}

kvf_status kvf_plan_apply_f32(const kvf_merge_plan *p, const kvf_tensor *x, float *dst, kvf_error *err)
{
    task t = { .p = p,
               .x = x,
               .dst = (char *)dst,
               .dst_type = KVF_MERGE_F32,
               .dst_bytes = x->dim * (int64_t)sizeof *dst };
    return run(&t, err);
}

void kvf_merge_apply_init(kvf_merge_apply *a)
{
    memset(a, 0, sizeof *a);
    a->size = sizeof *a;
}

/* The two tensors may not share memory: rows are written while later ones are still to be read. */
static bool overlaps(const kvf_tensor *x, const char *dst, int64_t n_row, int64_t dst_bytes,
                     int64_t row_bytes)
{
    const char *src_end = (const char *)kvf_tensor_row(x, x->n_frame - 1, x->n_tok - 1) +
                          x->dim * (int64_t)kvf_merge_type_bytes(x->type);
    const char *dst_end = dst + (n_row - 1) * dst_bytes + row_bytes;
    return n_row > 0 && (uintptr_t)dst < (uintptr_t)src_end && (uintptr_t)x->data < (uintptr_t)dst_end;
}

static kvf_status check(const kvf_merge_plan *p, const kvf_merge_apply *a, const kvf_tensor *x,
                        kvf_error *err)
{
    int64_t bytes = (int64_t)kvf_merge_type_bytes(a->dst_type);
    if (x->n_frame != p->n_frame || x->n_tok != p->n_tok)
        return kvf_fail(err, KVF_ERR_ARG,
                        "src has %" PRId64 " frames of %" PRId64 " tokens, the plan was made for %" PRId64
                        " of %" PRId64,
                        x->n_frame, x->n_tok, p->n_frame, p->n_tok);
    if (bytes == 0)
        return kvf_fail(err, KVF_ERR_ARG, "dst_type is %d; use KVF_MERGE_F32, F16 or BF16", (int)a->dst_type);
    if (!a->dst) return kvf_fail(err, KVF_ERR_ARG, "dst is NULL; give room for %" PRId64 " rows", p->n_out);
    if ((uintptr_t)a->dst % (uintptr_t)bytes)
        return kvf_fail(err, KVF_ERR_ARG, "dst is not aligned to its elements");
    if (a->dst_stride != 0 && (a->dst_stride < x->dim || a->dst_stride > INT64_MAX / 8 / (p->n_out + 1)))
        return kvf_fail(err, KVF_ERR_ARG, "dst_stride is %" PRId64 "; rows have %" PRId64 " elements",
                        a->dst_stride, x->dim);
    if (p->n_kind[KVF_MERGE_NEWLINE] > 0 && !a->newline)
        return kvf_fail(err, KVF_ERR_ARG,
                        "the plan holds %" PRId64
                        " newlines and newline is NULL; give the embedding, or plan with newline=none",
                        p->n_kind[KVF_MERGE_NEWLINE]);
    return KVF_OK;
}

kvf_status kvf_merge_plan_apply(const kvf_merge_plan *p, const kvf_merge_apply *a, kvf_error *err)
{
    if (!p || !a) return kvf_fail(err, KVF_ERR_ARG, "the plan or its arguments are NULL");
    KVF_TRY(kvf_merge_check_size(a->size, sizeof *a, "kvf_merge_apply", err));
    kvf_tensor x;
    KVF_TRY(kvf_tensor_init(&x, &a->src, "src", err));
    KVF_TRY(check(p, a, &x, err));
    int64_t bytes = (int64_t)kvf_merge_type_bytes(a->dst_type);
    int64_t dst_bytes = (a->dst_stride ? a->dst_stride : x.dim) * bytes;
    if (overlaps(&x, a->dst, p->n_out, dst_bytes, x.dim * bytes))
        return kvf_fail(err, KVF_ERR_ARG, "dst overlaps src; give it memory of its own");
    task t = {
        .p = p, .x = &x, .newline = a->newline, .dst = a->dst, .dst_type = a->dst_type, .dst_bytes = dst_bytes
    };
    return run(&t, err);
}
