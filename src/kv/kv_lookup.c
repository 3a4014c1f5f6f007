/* kv_lookup.c - which units a layer reads: the policy is asked, and given the votes of digests or the answer
 * of an external index. An index is held against the exact votes as the text doubles, and refused where it
 * finds less than the policy's recall.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include <string.h>
#include <time.h>

#include "base/half.h"
#include "kv/kv_int.h"

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static kvf_status vote(void *lookup, bool fine, const kvf_vote_rule *rule, float *votes, kvf_error *err)
{
    kvf_lookup *l = lookup;
    kvf_kv *kv = l->kv;
    kvf_far *f = kv->far;
    int32_t layer = l->a->layer;
    if (f->sparse) return kvf_sparse_vote(l, fine, rule, votes, err);
    if (f->reps) fine = false;
    const kvf_digest *digest = fine ? &f->m.fine : &f->m.coarse;
    if (digest->kind == KVF_DIGEST_NONE)
        return kvf_fail(err, KVF_ERR_INTERNAL, "a vote by digests that are not kept");
    int64_t first = l->unit0 * f->m.unit >> KVF_BLOCK_SHIFT;
    int64_t end = ((l->unit0 + l->n_unit) * f->m.unit + KVF_BLOCK - 1) >> KVF_BLOCK_SHIFT;
    if (!fine) KVF_TRY(kvf_digest_coarse(kv, layer, err));
    for (int64_t b = first; b < end; b++) {
        if (fine)
            KVF_TRY(kvf_digest_fine(kv, layer, b, &f->rows[b], err));
        else
            f->rows[b] = f->coarse[layer] + (size_t)b * f->coarse_bytes;
    }
    kvf_vote_args a = { .q = l->a->q_far, .lse = l->lse, .n_q = l->a->n_q, .scale = l->a->scale, .digest = digest,
                        .rows = f->rows, .unit = f->m.unit, .unit0 = l->unit0, .n_unit = l->n_unit, .rule = *rule,
                        .vote = votes };
    return kv->backend->ops->vote(kv->backend, &a, err);
}

/* Vectors of units the index does not have yet. */
static kvf_status fill_index(kvf_lookup *l, kvf_index *ix, kvf_error *err)
{
    kvf_far *f = l->kv->far;
    const kvf_digest *g = &f->m.coarse;
    int32_t d = g->head_dim, n_vec = g->kind == KVF_DIGEST_REPS && g->reps_per_q_head ? g->n_head / g->n_head_kv : 1;
    size_t head = kvf_digest_head_bytes(g);
    void *block;
    KVF_TRY(kvf_digest_coarse(l->kv, l->a->layer, err));
    KVF_TRY(kvf_mem_get(kvf_kv_mem(l->kv), &block, (size_t)ix->dim, sizeof(float), err));
    float *x = block;
    kvf_status rc = KVF_OK;
    while (rc >= 0 && ix->n < l->n_unit) {
        int64_t at = (l->unit0 + ix->n) * f->m.unit, b = at >> KVF_BLOCK_SHIFT;
        int64_t place = (at & (KVF_BLOCK - 1)) / f->m.unit * n_vec * d;
        for (int32_t h = 0; h < g->n_head_kv; h++) {
            const uint8_t *row = f->coarse[l->a->layer] + (size_t)b * f->coarse_bytes + (size_t)h * head;
            for (int32_t i = 0; i < n_vec * d; i++)
                x[h * n_vec * d + i] = g->kind == KVF_DIGEST_REPS
                                           ? ((const float *)(const void *)row)[place + i]
                                           : kvf_f32_from_f16(((const kvf_f16 *)(const void *)row)[place + i]);
        }
        rc = ix->ops->add(ix, x, 1, err);
    }
    kvf_free(kvf_kv_mem(l->kv), x);
    return rc;
}

/* The chunk's mean query in the index's shape: summed over the query heads that share a vector. */
static kvf_status index_query(kvf_lookup *l, const kvf_index *ix, float **out, kvf_error *err)
{
    const kvf_dims *dims = &l->kv->dims;
    int64_t width = (int64_t)dims->n_head * dims->head_dim, n = l->a->n_q;
    int32_t share = (int32_t)(width / ix->dim), d = dims->head_dim;
    void *q, *x;
    KVF_TRY(kvf_mem_get(kvf_kv_mem(l->kv), &q, (size_t)(n * width), sizeof(float), err));
    kvf_status rc = kvf_mem_get(kvf_kv_mem(l->kv), &x, (size_t)ix->dim, sizeof(float), err);
    if (rc >= 0) {
        rc = l->kv->backend->ops->download(l->kv->backend, q, l->a->q_far, (size_t)(n * width) * sizeof(float), err);
        *out = x;
        for (int64_t i = 0; rc >= 0 && i < n; i++)
            for (int64_t j = 0; j < width; j++)
                (*out)[j / d / share * d + j % d] += ((const float *)q)[i * width + j] / (float)n;
    }
    kvf_free(kvf_kv_mem(l->kv), q);
    return rc;
}

/* How many of the exact k best did the index find? Summed over layers; told after the last. */
static kvf_status check_index(kvf_lookup *l, const int64_t *units, int64_t n, int64_t k, kvf_error *err)
{
    kvf_far *f = l->kv->far;
    void *block = f->vote;
    KVF_TRY(kvf_reserve(kvf_kv_mem(l->kv), &block, &f->cap_vote, l->n_unit, sizeof(float), err));
    f->vote = block;
    kvf_vote_rule rule = { .kind = KVF_VOTE_LIN, .pool = 1 };
    KVF_TRY(vote(l, false, &rule, f->vote, err));
    for (int64_t i = 0; i < n; i++) { /* found: fewer than k units are better */
        int64_t better = 0;
        for (int64_t u = 0; u < l->n_unit; u++) better += f->vote[u] > f->vote[units[i]];
        f->n_found += better < k;
    }
    f->n_sought += k < l->n_unit ? k : l->n_unit;
    int32_t last = l->kv->dims.n_layer - 1;
    while (last > 0 && f->layer_window[last] > 0) last--;
    if (l->a->layer != last) return KVF_OK;
    double recall = (double)f->n_found / (double)f->n_sought;
    f->checked = l->n_unit;
    f->n_found = f->n_sought = 0;
    if (recall >= f->m.recall) return KVF_OK;
    return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                    "index '%s' finds %.0f %% of the best blocks, less than recall=%.2f asks; use index=flat", f->m.index,
                    100 * recall, f->m.recall);
}

static kvf_status nearest(void *lookup, int64_t k, int64_t *units, int64_t *n, kvf_error *err)
{
    kvf_lookup *l = lookup;
    kvf_far *f = l->kv->far;
    kvf_index *ix = f->index ? f->index[l->a->layer] : NULL;
    if (!ix) return kvf_fail(err, KVF_ERR_INTERNAL, "a search without an index");
    KVF_TRY(fill_index(l, ix, err));
    float *q = NULL;
    kvf_status rc = index_query(l, ix, &q, err);
    if (rc >= 0) rc = ix->ops->search(ix, q, k, units, n, err);
    if (rc >= 0 && l->n_unit >= 2 * f->checked) rc = check_index(l, units, *n, k, err);
    kvf_free(kvf_kv_mem(l->kv), q);
    return rc;
}

kvf_status kvf_far_lookup(kvf_lookup *l, kvf_error *err)
{
    kvf_kv *kv = l->kv;
    kvf_far *f = kv->far;
    kvf_policy *p = l->a->policy;
    void *use = f->use;
    KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &use, &f->cap_use, l->n_unit * f->m.n_set, 1, err));
    f->use = use;
    memset(f->use, 0, (size_t)(l->n_unit * f->m.n_set));
    if (!p || !p->ops->retrieve) return KVF_OK;
    kvf_retrieve r = { .layer = f->layer0 + l->a->layer, .n_set = f->m.n_set, .n_past = l->n_past, .n_tok = l->a->n_tok,
                       .reading = l->a->reading, .unit0 = l->unit0, .n_unit = l->n_unit, .lookup = l, .vote = vote,
                       .nearest = nearest };
    double start = now_ms();
    if (f->tier) f->tier->ops->hold(f->tier);
    kvf_status rc = p->ops->retrieve(p, &r, f->use, err);
    if (f->tier) f->tier->ops->unhold(f->tier);
    kv->count.n_lookup++;
    kv->count.lookup_ms += now_ms() - start;
    return rc;
}
