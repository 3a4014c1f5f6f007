/* keydiff.c - keys like all others go first.
 *
 * Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
 * Resource-Constrained Environments, arXiv:2504.15364: the anchor of a KV head is the mean of its normalised
 * keys; a key's score is minus its cosine similarity to the anchor; the lowest scores are evicted whenever a
 * chunk of the prompt has filled the cache beyond its budget. No query is asked. A yardstick: it bounds memory
 * while a text is read.
 * Differs from the paper: the newest `recent` tokens always stay.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "base/top.h"
#include "policy/policy.h"

typedef struct keydiff {
    int64_t budget, recent;
    float *keys, *score; /* [cap_keys], [cap_score] */
    uint8_t *keep;
    int64_t cap_keys, cap_score, cap_keep;
} keydiff;

static kvf_status keydiff_init(kvf_policy *p, kvf_error *err)
{
    const keydiff *s = p->state;
    if (s->recent >= s->budget)
        return kvf_fail(err, KVF_ERR_ARG, "keydiff: the %lld recent tokens fill the budget of %lld; raise budget",
                        (long long)s->recent, (long long)s->budget);
    return KVF_OK;
}

static void keydiff_fini(kvf_policy *p)
{
    keydiff *s = p->state;
    kvf_free(p->mem, s->keys);
    kvf_free(p->mem, s->score);
    kvf_free(p->mem, s->keep);
}

static void keydiff_budget(const kvf_policy *p, kvf_budget *b)
{
    *b = (kvf_budget){ .tokens = ((const keydiff *)p->state)->budget, .every_chunk = true };
}

static kvf_status reserve(kvf_policy *p, keydiff *s, int64_t n, kvf_error *err)
{
    void *block = s->keys;
    KVF_TRY(kvf_reserve(p->mem, &block, &s->cap_keys, n * p->dims.head_dim, sizeof(float), err));
    s->keys = block;
    block = s->score;
    KVF_TRY(kvf_reserve(p->mem, &block, &s->cap_score, n, sizeof(float), err));
    s->score = block;
    block = s->keep;
    KVF_TRY(kvf_reserve(p->mem, &block, &s->cap_keep, n, 1, err));
    s->keep = block;
    return KVF_OK;
}

/* score[i] = -cos(key i, mean of the normalised keys); the anchor's own length changes no order. */
static void score_keys(keydiff *s, int64_t n, int32_t d)
{
    double anchor[1024] = { 0 };
    for (int64_t i = 0; i < n; i++) {
        float *k = s->keys + i * d;
        double square = 0;
        for (int32_t c = 0; c < d; c++) square += (double)k[c] * (double)k[c];
        float scale = square > 0 ? (float)(1 / sqrt(square)) : 0;
        for (int32_t c = 0; c < d; c++) anchor[c] += (double)(k[c] *= scale);
    }
    for (int64_t i = 0; i < n; i++) {
        double dot = 0;
        for (int32_t c = 0; c < d; c++) dot += (double)s->keys[i * d + c] * anchor[c];
        s->score[i] = (float)-dot;
    }
}

static kvf_status keydiff_evict(kvf_policy *p, const kvf_evict *e, int32_t *stay, kvf_error *err)
{
    keydiff *s = p->state;
    if (p->dims.head_dim > 1024)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "keydiff: heads of %d channels; the most is 1024", p->dims.head_dim);
    KVF_TRY(reserve(p, s, e->n, err));
    for (int32_t h = 0; h < p->dims.n_head_kv; h++) {
        KVF_TRY(e->keys(e->lookup, h, s->keys, err));
        score_keys(s, e->n, p->dims.head_dim);
        for (int64_t i = 0; i < e->n; i++) s->keep[i] = i >= e->n - s->recent;
        kvf_top(s->score, e->n, e->keep - s->recent, s->keep);
        for (int64_t i = 0, n = 0; i < e->n; i++)
            if (s->keep[i]) stay[h * e->keep + n++] = (int32_t)i;
    }
    return KVF_OK;
}

static const kvf_option keydiff_options[] = {
    KVF_OPT_I64(keydiff, budget, 1024, 8, 1 << 30, "tokens that stay in every layer"),
    KVF_OPT_I64(keydiff, recent, 32, 1, 1 << 20, "newest tokens, which stay"),
    { 0 },
};

const kvf_policy_ops kvf_policy_keydiff = {
    .abi = KVF_POLICY_ABI, .name = "keydiff", .source = "Park et al. 2025, arXiv:2504.15364",
    .help = "evicts keys that are like all others, chunk by chunk (KeyDiff)",
    .options = keydiff_options, .state_size = sizeof(keydiff), .init = keydiff_init, .fini = keydiff_fini,
    .budget = keydiff_budget, .evict = keydiff_evict,
};
