/* holitom_share.c - how many tokens each part of a segment keeps.
 *
 * OFFICIAL: one share `re` = min(ratio / (what merging equal positions leaves / all), 1) of everything;
 * static tokens of a segment rounded half to even, dynamic ones of a frame rounded up, so that the count is
 * near the one asked for [the published code]. EXACT: floor(ratio T N) tokens, divided over segments' static
 * tokens and frames' dynamic ones by largest remainder. Where merging equal positions leaves less than that
 * (a still video), the static tokens that changed most since the frame before stay by themselves.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "merge/holitom.h"
#include "merge/select.h"

/* Frames and tokens of parts from..n_part-1, and what merging equal positions leaves of them. */
static void count(const kvf_holitom_run *r, int64_t from, int64_t *n_frame, int64_t *n_left)
{
    int64_t n_tok = r->job->x->n_tok;
    *n_frame = *n_left = 0;
    for (int64_t i = from; i < r->n_part; i++) {
        int64_t len = r->part[i].last - r->part[i].first + 1;
        *n_frame += len;
        *n_left += r->part[i].n_static + (n_tok - r->part[i].n_static) * len;
    }
}

/* The tokens that the ratio asks for of n_frame more frames. Counted from the start, so that a stream's pieces add
 * up to what the whole would get. */
static int64_t asked(kvf_holitom_run *r, int64_t n_frame, bool last)
{
    int64_t n_all = (r->n_seen + n_frame) * r->job->x->n_tok;
    int64_t total =
        (last ? kvf_merge_count(r->opt->ratio, n_all) : kvf_merge_floor(r->opt->ratio, n_all)) - r->n_given;
    r->n_seen += n_frame;
    r->n_given += total;
    return total;
}

static void share_official(kvf_holitom_run *r, int64_t from, bool last)
{
    int64_t n_tok = r->job->x->n_tok, n_frame, n_left;
    count(r, from, &n_frame, &n_left);
    asked(r, n_frame, last);
    double share = r->opt->ratio / ((double)n_left / (double)(n_frame * n_tok));
    r->retain = share < 1 ? share : 1;
    for (int64_t i = from; i < r->n_part; i++) {
        kvf_holitom_part *p = &r->part[i];
        p->keep = (int64_t)nearbyint((double)p->n_static * r->retain);
        for (int64_t t = p->first; t <= p->last; t++)
            r->keep[t] = (int64_t)ceil((double)(n_tok - p->n_static) * r->retain);
    }
}

/* Units in the order of the output: a segment's static tokens, then its frames. */
static kvf_status share_units(kvf_holitom_run *r, int64_t from, int64_t n_frame, int64_t total,
                              kvf_error *err)
{
    const kvf_merge_env *env = r->job->env;
    int64_t n = n_frame + r->n_part - from, at = 0, n_tok = r->job->x->n_tok, *size;
    KVF_TRY(KVF_GET(env, &size, 2 * n + (n + 7) / 8, err));
    for (int64_t i = from; i < r->n_part; i++) {
        const kvf_holitom_part *p = &r->part[i];
        size[at++] = p->n_static;
        for (int64_t t = p->first; t <= p->last; t++) size[at++] = n_tok - p->n_static;
    }
    kvf_share_out(size, n, total, size, (uint64_t *)(size + n), (uint8_t *)(size + 2 * n));
    at = 0;
    for (int64_t i = from; i < r->n_part; i++) {
        r->part[i].keep = size[at++];
        for (int64_t t = r->part[i].first; t <= r->part[i].last; t++) r->keep[t] = size[at++];
    }
    kvf_free(env->mem, size);
    return KVF_OK;
}

/* Everything is kept, and n tokens more: static ones of later frames that are least like the frame before. */
static kvf_status keep_own(kvf_holitom_run *r, int64_t from, int64_t n, kvf_error *err)
{
    const kvf_merge_env *env = r->job->env;
    int64_t n_tok = r->job->x->n_tok, lo = r->part[from].first, hi = r->part[r->n_part - 1].last;
    int64_t n_all = (hi - lo + 1) * n_tok;
    uint64_t *key;
    if (!r->own) KVF_TRY(KVF_GET(env, &r->own, r->job->x->n_frame * n_tok, err));
    KVF_TRY(KVF_GET(env, &key, n_all, err));
    for (int64_t i = from; i < r->n_part; i++) {
        const kvf_holitom_part *p = &r->part[i];
        for (int64_t t = p->first + 1; t <= p->last; t++)
            for (int64_t k = 0; k < n_tok; k++)
                if (p->is_static[k])
                    key[(t - lo) * n_tok + k] = kvf_order_key(-(double)r->sim[(t - 1) * n_tok + k]);
    }
    kvf_pick_top(key, n_all, n, r->own + lo * n_tok); /* keys of finite numbers are not 0, the others' are */
    kvf_free(env->mem, key);
    return KVF_OK;
}

static kvf_status share_exact(kvf_holitom_run *r, int64_t from, bool last, kvf_error *err)
{
    int64_t n_frame, n_left;
    count(r, from, &n_frame, &n_left);
    int64_t total = asked(r, n_frame, last);
    r->retain = total < n_left ? (double)total / (double)n_left : 1;
    KVF_TRY(share_units(r, from, n_frame, total < n_left ? total : n_left, err));
    return total > n_left ? keep_own(r, from, total - n_left, err) : KVF_OK;
}

kvf_status kvf_holitom_share(kvf_holitom_run *r, int64_t from, bool last, kvf_error *err)
{
    if (r->opt->mode == KVF_HOLITOM_EXACT) return share_exact(r, from, last, err);
    share_official(r, from, last);
    return KVF_OK;
}
