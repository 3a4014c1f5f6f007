/* infllm_lookup.c - which units a layer reads: when it looks, whose votes count, and the best of them.
 *
 * A lookup never depends on when memory was grown or what was resident: votes, ties by the lower unit,
 * and the calls since forget() decide alone.
 * Source: Xiao et al. 2024, arXiv:2402.04617, sec. 3.2; the running maximum, the gate and holding a set
 * are ours (docs/methods/README.md).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "policy/infllm_int.h"

#include <math.h>
#include <string.h>

/* Layers take turns: 5 shares no factor with the default hold of 24, so each of 24 consecutive layers
 * looks in a step of its own and no step pays for all of them. */
enum { LAYER_STEP = 5 };

infllm_lookup kvf_infllm_lookup_for(const infllm *s, int64_t n_tok, bool document)
{
    bool reading = document || (n_tok > 1 && n_tok > s->exact), paper = s->select == SELECT_PAPER;
    infllm_lookup l = { 0 };
    l.k = reading ? s->topk : s->ask;
    l.any = l.k > 0 && !(reading && s->reading == READING_NONE);
    l.fine = !reading || (s->reading == READING_FINE && !paper);
    l.nearest = l.any && infllm_has_index(s) && (reading || paper);
    l.keep = !reading;
    l.rule.kind = s->vote == VOTE_GATE ? KVF_VOTE_GATE : s->vote == VOTE_SOFT ? KVF_VOTE_SOFT : KVF_VOTE_LIN;
    l.rule.max_queries = s->agg == AGG_MAX;
    l.rule.per_kv_head = s->sets == SETS_KV;
    l.rule.pool = reading || paper ? (int32_t)s->pool : 1;
    return l;
}

/* ---- the best k ---- */

static bool better(infllm_hit a, infllm_hit b)
{
    return a.vote > b.vote || (a.vote == b.vote && a.unit < b.unit);
}

/* Put x into the heap (worst on top) of n hits whose top is free. */
static void sift(infllm_hit *heap, int64_t n, infllm_hit x)
{
    int64_t at = 0;
    for (;;) {
        int64_t down = 2 * at + 1;
        if (down >= n) break;
        if (down + 1 < n && better(heap[down], heap[down + 1])) down++;
        if (!better(x, heap[down])) break;
        heap[at] = heap[down];
        at = down;
    }
    heap[at] = x;
}

static void push(infllm_hit *heap, int64_t n, infllm_hit x)
{
    int64_t at = n;
    for (; at > 0 && better(heap[(at - 1) / 2], x); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = x;
}

int64_t kvf_infllm_top(const float *vote, int64_t n, int64_t k, double floor, infllm_hit *hits)
{
    int64_t n_hit = 0;
    for (int64_t u = 0; u < n; u++) {
        infllm_hit x = { vote[u], u };
        if (floor > 0 && (double)x.vote < floor) continue;
        if (n_hit < k)
            push(hits, n_hit++, x);
        else if (k > 0 && better(x, hits[0]))
            sift(hits, k, x);
    }
    for (int64_t left = n_hit; left > 1; left--) { /* the worst of those left goes to their end */
        infllm_hit worst = hits[0];
        sift(hits, left - 1, hits[left - 1]);
        hits[left - 1] = worst;
    }
    return n_hit;
}

/* ---- state ---- */

static void drop(infllm_layer *l)
{
    l->n_unit = 0;
    l->chosen = false;
}

void kvf_infllm_forget(kvf_policy *p, int64_t n)
{
    (void)n; /* votes of later tokens are in every running maximum, so nothing of it survives a cut */
    infllm *s = p->state;
    for (int32_t i = 0; i < s->n_layer; i++) drop(&s->layers[i]);
}

/* All memory that one lookup needs, before anything is changed. */
static kvf_status reserve(kvf_policy *p, infllm_layer *l, int64_t n_unit, int64_t k, kvf_error *err)
{
    infllm *s = p->state;
    void *vote = s->fresh, *hits = s->hits, *near = s->near, *pick = l->pick;
    kvf_status rc = kvf_reserve(p->mem, &vote, &s->fresh_cap, s->n_set * n_unit, sizeof *s->fresh, err);
    s->fresh = vote;
    if (rc >= 0) rc = kvf_reserve(p->mem, &hits, &s->hits_cap, k, sizeof *s->hits, err);
    s->hits = hits;
    if (rc >= 0) rc = kvf_reserve(p->mem, &near, &s->near_cap, k, sizeof *s->near, err);
    s->near = near;
    if (rc >= 0) rc = kvf_reserve(p->mem, &pick, &l->pick_cap, s->n_set * (1 + k), sizeof *l->pick, err);
    l->pick = pick;
    return rc;
}

/* Votes that are no number lose. In decode the earlier votes count on, decay times less per token; only
 * positive ones: a logit below zero would grow by it. */
static void merge_votes(infllm *s, const infllm_layer *l, const kvf_retrieve *r, bool go_on)
{
    int64_t n = s->n_set * r->n_unit, age = r->n_past + r->n_tok - 1 - l->last;
    for (int64_t i = 0; i < n; i++)
        if (isnan(s->fresh[i])) s->fresh[i] = -INFINITY;
    if (!go_on || r->n_tok > 1 || l->n_unit == 0 || age <= 0) return;
    double share = 1;
    while (age-- > 0 && share > 1e-30) share *= s->decay;
    int64_t from = r->unit0 > l->unit0 ? r->unit0 : l->unit0, end = l->unit0 + l->n_unit;
    if (end > r->unit0 + r->n_unit) end = r->unit0 + r->n_unit;
    for (int32_t set = 0; set < s->n_set; set++) {
        const float *old = l->vote + set * l->n_unit;
        float *now = s->fresh + set * r->n_unit;
        for (int64_t u = from; u < end; u++) {
            float was = (float)(share * (double)old[u - l->unit0]);
            if (was > now[u - r->unit0]) now[u - r->unit0] = was > 0 ? was : now[u - r->unit0];
        }
    }
}

/* The merged votes become the layer's, and its old memory the next scratch. */
static void keep_votes(infllm *s, infllm_layer *l, const kvf_retrieve *r)
{
    float *old = l->vote;
    int64_t cap = l->vote_cap;
    l->vote = s->fresh, l->vote_cap = s->fresh_cap;
    s->fresh = old, s->fresh_cap = cap;
    l->unit0 = r->unit0;
    l->n_unit = r->n_unit;
    l->last = r->n_past + r->n_tok - 1;
}

/* ---- retrieve ---- */

/* The earlier set stays between two turns of the layer; what it names is looked up by absolute number,
 * since the range of units grows. */
static bool held(const infllm *s, const infllm_layer *l, const kvf_retrieve *r, uint8_t *use)
{
    if (r->n_tok != 1 || !l->chosen || (r->n_past + (int64_t)r->layer * LAYER_STEP) % s->hold == 0)
        return false;
    for (int32_t set = 0; set < s->n_set; set++) {
        const int64_t *pick = l->pick + set * (1 + s->ask);
        for (int64_t i = 1; i <= pick[0]; i++) {
            int64_t u = pick[i] - r->unit0;
            if (u >= 0 && u < r->n_unit) use[set * r->n_unit + u] = 1;
        }
    }
    return true;
}

/* Hits, best first, each followed by its neighbours when asked for, until k units are named. */
static void name_units(const infllm *s, int64_t n_hit, int64_t k, const kvf_retrieve *r, uint8_t *use,
                       int64_t *pick)
{
    static const int64_t around[3] = { 0, -1, 1 };
    int64_t n = 0;
    for (int64_t i = 0; i < n_hit && n < k; i++) {
        for (int j = 0; j < (s->neighbours ? 3 : 1) && n < k; j++) {
            int64_t u = s->hits[i].unit + around[j];
            if (u < 0 || u >= r->n_unit || use[u]) continue;
            use[u] = 1;
            pick[1 + n++] = r->unit0 + u;
        }
    }
    pick[0] = n;
}

static kvf_status nearest(infllm *s, const kvf_retrieve *r, int64_t k, int64_t *n_hit, kvf_error *err)
{
    KVF_TRY(r->nearest(r->lookup, k, s->near, n_hit, err));
    for (int64_t i = 0; i < *n_hit; i++) s->hits[i] = (infllm_hit){ 0, s->near[i] };
    return KVF_OK;
}

kvf_status kvf_infllm_retrieve(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *err)
{
    infllm *s = p->state;
    infllm_layer *l = &s->layers[r->layer];
    infllm_lookup how = kvf_infllm_lookup_for(s, r->n_tok, r->reading);
    bool all = how.any && r->n_unit <= how.k;
    memset(use, all, (size_t)(s->n_set * r->n_unit));
    if (all || !how.any) {
        drop(l);
        return KVF_OK;
    }
    if (how.keep && held(s, l, r, use)) return KVF_OK;
    KVF_TRY(reserve(p, l, r->n_unit, how.k, err));
    int64_t n_hit = 0;
    if (how.nearest) {
        KVF_TRY(nearest(s, r, how.k, &n_hit, err));
    } else {
        KVF_TRY(r->vote(r->lookup, how.fine, &how.rule, s->fresh, err));
        merge_votes(s, l, r, how.keep);
    }
    for (int32_t set = 0; set < s->n_set; set++) {
        if (!how.nearest)
            n_hit = kvf_infllm_top(s->fresh + set * r->n_unit, r->n_unit, how.k, s->floor, s->hits);
        name_units(s, n_hit, how.k, r, use + set * r->n_unit, l->pick + set * (1 + how.k));
    }
    l->n_unit = 0;
    l->chosen = how.keep;
    if (how.keep && !how.nearest && s->decay > 0) keep_votes(s, l, r);
    return KVF_OK;
}
