/* pool.c - 2-D pooling of tower features, as LLaVA-OneVision (bilinear) and LLaVA-Video (average, max) do it
 * between the projector and the language model.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "merge/inner.h"
#include "merge/method.h"

typedef struct work {
    const kvf_merge_env *env;
    const kvf_tensor *x;
    int64_t grid_w, grid_h, out_w, out_h;
    int32_t kind;
    kvf_merge_type dst_type;
    char *dst;
    float *row; /* [workers][2 dim] */
} work;

void kvf_merge_pool_init(kvf_merge_pool *a)
{
    memset(a, 0, sizeof *a);
    a->size = sizeof *a;
}

/* Output i of n_out takes (1 - *w) of input *at and *w of the next: source i reads at (i + 0.5) n / n_out -
 * 0.5. */
static int64_t tap(int64_t i, int64_t n, int64_t n_out, float *w)
{
    double at = ((double)i + 0.5) * (double)n / (double)n_out - 0.5;
    if (at < 0) at = 0;
    int64_t lo = (int64_t)at;
    *w = lo + 1 < n ? (float)(at - (double)lo) : 0.0f;
    return lo;
}

static void bilinear(const work *w, int64_t t, int64_t y, int64_t x, float *out)
{
    float wy, wx;
    int64_t y0 = tap(y, w->grid_h, w->out_h, &wy), x0 = tap(x, w->grid_w, w->out_w, &wx);
    int64_t y1 = wy > 0 ? y0 + 1 : y0, x1 = wx > 0 ? x0 + 1 : x0;
    const void *src[4] = { kvf_tensor_row(w->x, t, y0 * w->grid_w + x0),
                           kvf_tensor_row(w->x, t, y0 * w->grid_w + x1),
                           kvf_tensor_row(w->x, t, y1 * w->grid_w + x0),
                           kvf_tensor_row(w->x, t, y1 * w->grid_w + x1) };
    float weight[4] = { (1 - wy) * (1 - wx), (1 - wy) * wx, wy * (1 - wx), wy * wx };
    memset(out, 0, (size_t)w->x->dim * sizeof *out);
    w->env->rows.add[w->x->type](out, src, weight, 4, w->x->dim);
}

static void average(const work *w, int64_t t, int64_t y, int64_t x, float *out)
{
    int64_t at = 2 * y * w->grid_w + 2 * x;
    const void *src[4] = { kvf_tensor_row(w->x, t, at), kvf_tensor_row(w->x, t, at + 1),
                           kvf_tensor_row(w->x, t, at + w->grid_w),
                           kvf_tensor_row(w->x, t, at + w->grid_w + 1) };
    const float weight[4] = { 0.25f, 0.25f, 0.25f, 0.25f };
    memset(out, 0, (size_t)w->x->dim * sizeof *out);
    w->env->rows.add[w->x->type](out, src, weight, 4, w->x->dim);
}

static void largest(const work *w, int64_t t, int64_t y, int64_t x, float *out, float *room)
{
    int64_t at = 2 * y * w->grid_w + 2 * x, from[4] = { at, at + 1, at + w->grid_w, at + w->grid_w + 1 };
    w->env->rows.widen[w->x->type](out, kvf_tensor_row(w->x, t, from[0]), w->x->dim);
    for (int i = 1; i < 4; i++) {
        w->env->rows.widen[w->x->type](room, kvf_tensor_row(w->x, t, from[i]), w->x->dim);
        for (int64_t d = 0; d < w->x->dim; d++) out[d] = room[d] > out[d] ? room[d] : out[d];
    }
}

/* One row of one frame's output grid. */
static void do_row(void *arg, int64_t i, int32_t worker)
{
    const work *w = arg;
    int64_t t = i / w->out_h, y = i % w->out_h, dim = w->x->dim;
    float *row = w->row + 2 * (int64_t)worker * dim;
    char *dst = w->dst + i * w->out_w * dim * (int64_t)kvf_merge_type_bytes(w->dst_type);
    for (int64_t x = 0; x < w->out_w; x++, dst += dim * (int64_t)kvf_merge_type_bytes(w->dst_type)) {
        float *to = w->dst_type == KVF_MERGE_F32 ? (float *)(void *)dst : row;
        if (w->kind == KVF_MERGE_BILINEAR)
            bilinear(w, t, y, x, to);
        else if (w->kind == KVF_MERGE_AVERAGE)
            average(w, t, y, x, to);
        else
            largest(w, t, y, x, to, row + dim);
        if (to == row) w->env->rows.narrow[w->dst_type](dst, row, dim);
    }
}

static kvf_status check(kvf_merge_pool *a, kvf_tensor *x, kvf_error *err)
{
    KVF_TRY(kvf_merge_check_size(a->size, sizeof *a, "kvf_merge_pool", err));
    /* To ask for the shape of the output no data is needed. */
    kvf_merge_view v = a->src;
    static const uint64_t nothing = 0;
    if (!a->dst && !v.data) v.data = &nothing;
    KVF_TRY(kvf_tensor_init(x, &v, "src", err));
    int64_t w = a->grid_w;
    if (w == 0) {
        w = (int64_t)(sqrt((double)x->n_tok) + 0.5);
        if (w * w != x->n_tok)
            return kvf_fail(err, KVF_ERR_ARG, "%" PRId64 " tokens are not a square; set grid_w", x->n_tok);
    }
    KVF_TRY(kvf_merge_grid(&w, w, x->n_tok, err));
    int64_t h = x->n_tok / w;
    if (a->kind < KVF_MERGE_BILINEAR || a->kind > KVF_MERGE_MAX)
        return kvf_fail(err, KVF_ERR_ARG, "kind is %d; use KVF_MERGE_BILINEAR, AVERAGE or MAX", (int)a->kind);
    if (kvf_merge_type_bytes(a->dst_type) == 0)
        return kvf_fail(err, KVF_ERR_ARG, "dst_type is %d; use KVF_MERGE_F32, F16 or BF16", (int)a->dst_type);
    a->out_w = a->kind == KVF_MERGE_BILINEAR ? (w + 1) / 2 : w / 2;
    a->out_h = a->kind == KVF_MERGE_BILINEAR ? (h + 1) / 2 : h / 2;
    if (a->out_w < 1 || a->out_h < 1)
        return kvf_fail(err, KVF_ERR_ARG,
                        "a grid of %" PRId64 " x %" PRId64 " is too small for 2 x 2 pooling", h, w);
    return KVF_OK;
}

kvf_status kvf_merge_pool_env(const kvf_merge_env *env, kvf_merge_pool *a, kvf_error *err)
{
    kvf_tensor x;
    if (!a) return kvf_fail(err, KVF_ERR_ARG, "the arguments are NULL");
    KVF_TRY(check(a, &x, err));
    if (!a->dst) return KVF_OK;
    int64_t w_in = a->grid_w ? a->grid_w : (int64_t)(sqrt((double)x.n_tok) + 0.5);
    work w = { .env = env,
               .x = &x,
               .grid_w = w_in,
               .grid_h = x.n_tok / w_in,
               .out_w = a->out_w,
               .out_h = a->out_h,
               .kind = a->kind,
               .dst_type = a->dst_type,
               .dst = a->dst };
    int64_t n_worker = env->threads ? kvf_threads_count(env->threads) : 1;
    KVF_TRY(KVF_GET(env, &w.row, 2 * n_worker * x.dim, err));
    kvf_merge_run(env, x.n_frame * w.out_h, do_row, &w);
    kvf_free(env->mem, w.row);
    return KVF_OK;
}
