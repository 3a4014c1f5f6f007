/* positions.c - where merged tokens stand for the language model.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <string.h>

#include "merge/plan.h"

void kvf_merge_positions_init(kvf_merge_positions *q)
{
    memset(q, 0, sizeof *q);
    q->size = sizeof *q;
    q->planes = 1;
    q->frame_step = 1;
}

static kvf_status check(const kvf_merge_plan *p, const kvf_merge_positions *q, kvf_error *err)
{
    KVF_TRY(kvf_merge_check_size(q->size, sizeof *q, "kvf_merge_positions", err));
    if (q->mode != KVF_MERGE_COMPACT && q->mode != KVF_MERGE_KEEP)
        return kvf_fail(err, KVF_ERR_ARG, "mode is %d; use KVF_MERGE_COMPACT or KVF_MERGE_KEEP",
                        (int)q->mode);
    if (q->planes != 1 && q->planes != 3 && q->planes != 4)
        return kvf_fail(err, KVF_ERR_ARG, "planes is %d; use 1, 3 or 4", (int)q->planes);
    if (q->base < 0 || q->frame_step < 1 || q->first_frame < 0)
        return kvf_fail(err, KVF_ERR_ARG,
                        "base %d, frame_step %d, first_frame %" PRId64
                        ": base and first_frame must be 0 or more, frame_step 1 or more",
                        (int)q->base, (int)q->frame_step, q->first_frame);
    if (!q->out)
        return kvf_fail(err, KVF_ERR_ARG, "out is NULL; give room for %d x %" PRId64 " numbers",
                        (int)q->planes, p->n_out);
    /* The largest position there can be, one past it included. */
    int64_t frames, most, tokens;
    bool fits = !__builtin_add_overflow(q->first_frame, p->n_frame, &frames) &&
                !__builtin_mul_overflow(frames, q->planes == 1 ? p->n_tok : (int64_t)q->frame_step, &most) &&
                !__builtin_add_overflow(most, p->n_tok + 1 + q->base, &most);
    tokens = p->n_out + q->base;
    if (q->mode == KVF_MERGE_COMPACT ? tokens > INT32_MAX : !fits || most > INT32_MAX)
        return kvf_fail(err, KVF_ERR_ARG,
                        "positions pass 2^31; use KVF_MERGE_COMPACT or a smaller frame_step");
    return KVF_OK;
}

/* t, y, x of token i; a newline stands right of the last token of its row. */
static void place(const kvf_merge_plan *p, int64_t i, int64_t *t, int64_t *y, int64_t *x)
{
    int64_t at = p->meta[i].position;
    *t = p->meta[i].frame;
    if (at >= 0) {
        *y = at / p->grid_w;
        *x = at % p->grid_w;
        return;
    }
    bool row = i > 0 && p->meta[i - 1].position >= 0 && p->meta[i - 1].frame == p->meta[i].frame;
    *y = row ? p->meta[i - 1].position / p->grid_w : p->n_tok / p->grid_w - 1;
    *x = p->grid_w;
}

static void keep(const kvf_merge_plan *p, kvf_merge_positions *q)
{
    int64_t n = p->n_out, next = q->base;
    for (int64_t i = 0; i < n; i++) {
        int64_t t, y, x;
        place(p, i, &t, &y, &x);
        t += q->first_frame;
        if (q->planes == 1) {
            int64_t at = q->base + t * p->n_tok + y * p->grid_w + x;
            q->out[i] = (int32_t)at;
            next = at + 1 > next ? at + 1 : next;
            continue;
        }
        int64_t v[4] = { q->base + t * q->frame_step, q->base + y, q->base + x, 0 };
        for (int64_t k = 0; k < q->planes; k++) q->out[k * n + i] = (int32_t)v[k];
        for (int64_t k = 0; k < 3; k++) next = v[k] + 1 > next ? v[k] + 1 : next;
    }
    q->next = (int32_t)next;
}

kvf_status kvf_merge_plan_positions(const kvf_merge_plan *p, kvf_merge_positions *q, kvf_error *err)
{
    if (!p || !q) return kvf_fail(err, KVF_ERR_ARG, "the plan or its arguments are NULL");
    KVF_TRY(check(p, q, err));
    if (q->mode == KVF_MERGE_KEEP) {
        keep(p, q);
        return KVF_OK;
    }
    for (int64_t k = 0; k < q->planes; k++)
        for (int64_t i = 0; i < p->n_out; i++) q->out[k * p->n_out + i] = k < 3 ? (int32_t)(q->base + i) : 0;
    q->next = (int32_t)(q->base + p->n_out);
    return KVF_OK;
}
