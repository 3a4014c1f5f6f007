/* inner.c - merging image tokens inside the language model.
 *
 * HoliTom, sec. 3.3, as published: of the image span the tokens stay that the last prompt token attends to
 * most (mean over heads); each of the others, in order, is folded into the kept one with the largest cosine
 * as kept = (kept + dropped) / 2. Similarities are those before any merge; later tokens weigh more, since
 * each halves what came before. Here the running mean is kept in f32 and rounded once, and at least one token
 * stays.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/inner.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "merge/select.h"
#include "merge/tile.h"

void kvf_merge_inner_init(kvf_merge_inner *a)
{
    memset(a, 0, sizeof *a);
    a->size = sizeof *a;
    a->drop = 0.5;
}

static int64_t kept_of(int64_t n, double drop)
{
    int64_t keep = (int64_t)nearbyint((1 - drop) * (double)n);
    return n == 0 ? 0 : keep > 1 ? keep : 1;
}

int64_t kvf_merge_inner_count(int64_t n_row, int64_t n, double drop)
{
    if (n < 0 || n_row < n || !(drop >= 0 && drop < 1)) return -1;
    return n_row - n + kept_of(n, drop);
}

typedef struct work {
    const kvf_merge_env *env;
    const kvf_tensor *x; /* [1][n_row][dim] */
    int64_t first, n, n_keep;
    uint64_t *key;
    uint8_t *picked;      /* [n] of the span */
    int32_t *kept, *into; /* [n_keep] rows; [n] place in kept of a dropped row's target, by row of the span */
    float *unit;          /* [n_keep][dim] kept rows of length 1 */
    float *sum;           /* [n_keep][dim] running means */
    float *row;           /* [workers][4][dim] */
} work;

static kvf_status check(const kvf_merge_inner *a, kvf_tensor *x, kvf_error *err)
{
    KVF_TRY(kvf_merge_check_size(a->size, sizeof *a, "kvf_merge_inner", err));
    kvf_merge_view v = { .data = a->hidden, .type = a->type, .n_frame = 1, .n_tok = a->n_row, .dim = a->dim };
    KVF_TRY(kvf_tensor_init(x, &v, "hidden", err));
    if (a->first < 0 || a->n < 0 || a->first > a->n_row - a->n)
        return kvf_fail(err, KVF_ERR_ARG,
                        "the span of %" PRId64 " image tokens from row %" PRId64 " is not within the %" PRId64
                        " rows",
                        a->n, a->first, a->n_row);
    if (!(a->drop >= 0 && a->drop < 1))
        return kvf_fail(err, KVF_ERR_ARG,
                        "drop is %g; give the share of image tokens that goes, 0 <= drop < 1", a->drop);
    if (!a->attention || a->n_head < 1 || a->n_head > 65536)
        return kvf_fail(err, KVF_ERR_ARG,
                        "attention must be [n_head][n_row] with 1 to 65536 heads; n_head is %" PRId64,
                        a->n_head);
    if (!a->out || !a->keep)
        return kvf_fail(err, KVF_ERR_ARG, "out and keep must have room for %" PRId64 " rows",
                        kvf_merge_inner_count(a->n_row, a->n, a->drop));
    int64_t bytes = a->dim * (int64_t)kvf_merge_type_bytes(a->type);
    uintptr_t in = (uintptr_t)a->hidden, out = (uintptr_t)a->out;
    if (in < out + (uintptr_t)(a->n_row * bytes) && out < in + (uintptr_t)(a->n_row * bytes))
        return kvf_fail(err, KVF_ERR_ARG, "out overlaps hidden; give it memory of its own");
    return KVF_OK;
}

static kvf_status pick(const kvf_merge_inner *a, work *w, kvf_error *err)
{
    for (int64_t i = 0; i < w->n; i++) {
        double sum = 0;
        for (int64_t h = 0; h < a->n_head; h++) sum += (double)a->attention[h * a->n_row + a->first + i];
        if (!isfinite(sum))
            return kvf_fail(err, KVF_ERR_ARG, "attention to row %" PRId64 " is NaN or infinite",
                            a->first + i);
        w->key[i] = kvf_order_key((double)(float)(sum / (double)a->n_head));
    }
    kvf_pick_top(w->key, w->n, w->n_keep, w->picked);
    for (int64_t i = 0, k = 0; i < w->n; i++)
        if (w->picked[i]) w->kept[k++] = (int32_t)(a->first + i);
    return KVF_OK;
}

/* Dropped rows, four at a time: the kept one that is most similar, the first of equals. */
static void find_targets(void *arg, int64_t at, int32_t worker)
{
    work *w = arg;
    int64_t dim = w->x->dim, n = 0, of[4];
    float *rows = w->row + 4 * (int64_t)worker * dim, best[4];
    for (int64_t i = 4 * at; i < w->n && i < 4 * at + 4; i++) {
        if (w->picked[i]) continue;
        w->env->rows.widen[w->x->type](rows + n * dim, kvf_tensor_row(w->x, 0, w->first + i), dim);
        best[n] = -INFINITY;
        of[n++] = i;
    }
    for (int64_t j = 0; j < w->n_keep && n > 0; j += 4) {
        float out[4][4];
        kvf_row_set a = { rows, n, dim },
                    b = { w->unit + j * dim, w->n_keep - j < 4 ? w->n_keep - j : 4, dim };
        kvf_tile(w->env->rows.dot, a, b, dim, out[0], 4);
        for (int64_t r = 0; r < n; r++)
            for (int64_t c = 0; c < b.n; c++)
                if (out[r][c] > best[r]) best[r] = out[r][c], w->into[of[r]] = (int32_t)(j + c);
    }
}

static void set_units(work *w)
{
    const kvf_rows *rows = &w->env->rows;
    int64_t dim = w->x->dim;
    for (int64_t k = 0; k < w->n_keep; k++) {
        float *row = w->sum + k * dim, *unit = w->unit + k * dim;
        double sum[2];
        rows->widen[w->x->type](row, kvf_tensor_row(w->x, 0, w->kept[k]), dim);
        rows->pair[KVF_MERGE_F32](row, row, dim, sum);
        float scale = sum[1] > 0 && isfinite(sum[1]) ? (float)(1 / sqrt(sum[1])) : 0.0f;
        for (int64_t d = 0; d < dim; d++) unit[d] = row[d] * scale;
    }
}

static void fold(work *w)
{
    int64_t dim = w->x->dim;
    for (int64_t i = 0; i < w->n; i++) {
        if (w->picked[i]) continue;
        float *to = w->sum + w->into[i] * dim;
        w->env->rows.widen[w->x->type](w->row, kvf_tensor_row(w->x, 0, w->first + i), dim);
        for (int64_t d = 0; d < dim; d++) to[d] = 0.5f * (to[d] + w->row[d]);
    }
}

static void write_out(kvf_merge_inner *a, const work *w)
{
    int64_t row_bytes = w->x->tok_bytes, at = 0, k = 0;
    for (int64_t i = 0; i < a->n_row; i++) {
        bool inside = i >= a->first && i < a->first + a->n;
        if (inside && !w->picked[i - a->first]) continue;
        char *to = (char *)a->out + at * row_bytes;
        if (inside)
            w->env->rows.narrow[a->type](to, w->sum + k++ * a->dim, a->dim);
        else
            memcpy(to, kvf_tensor_row(w->x, 0, i), (size_t)row_bytes);
        a->keep[at++] = (int32_t)i;
    }
    a->n_out = at;
}

static kvf_status run(kvf_merge_inner *a, work *w, kvf_error *err)
{
    const kvf_merge_env *env = w->env;
    int64_t n_worker = env->threads ? kvf_threads_count(env->threads) : 1;
    KVF_TRY(KVF_GET(env, &w->key, w->n, err));
    KVF_TRY(KVF_GET(env, &w->picked, w->n, err));
    KVF_TRY(KVF_GET(env, &w->kept, w->n_keep + w->n, err));
    KVF_TRY(KVF_GET(env, &w->unit, w->n_keep * a->dim, err));
    KVF_TRY(KVF_GET(env, &w->sum, w->n_keep * a->dim, err));
    KVF_TRY(KVF_GET(env, &w->row, 4 * n_worker * a->dim, err));
    w->into = w->kept + w->n_keep;
    KVF_TRY(pick(a, w, err));
    for (int64_t i = 0; i < w->n; i++) KVF_TRY(kvf_tensor_finite(w->x, a->first + i, "hidden", err));
    set_units(w);
    kvf_merge_run(env, (w->n + 3) / 4, find_targets, w);
    fold(w);
    write_out(a, w);
    return KVF_OK;
}

kvf_status kvf_merge_inner_env(const kvf_merge_env *env, kvf_merge_inner *a, kvf_error *err)
{
    kvf_tensor x;
    if (!a) return kvf_fail(err, KVF_ERR_ARG, "the arguments are NULL");
    KVF_TRY(check(a, &x, err));
    work w = { .env = env, .x = &x, .first = a->first, .n = a->n, .n_keep = kept_of(a->n, a->drop) };
    kvf_status rc = run(a, &w, err);
    void *all[] = { w.key, w.picked, w.kept, w.unit, w.sum, w.row };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kvf_free(env->mem, all[i]);
    return rc;
}
