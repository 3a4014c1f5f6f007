/* snapkv.c - after a prompt, each KV head keeps the tokens that the prompt's end looks at.
 *
 * Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469, sec. 4: the
 * attention of the last `window` queries, summed, max-pooled over `pool` neighbours, votes for the tokens
 * before them; the best stay, and the window itself. A yardstick: it reads everything, and saves memory and
 * reading of keys while the answer is written.
 * Differs from the paper: heads of a KV group vote together (its models had none); in the last layer the
 * window's last query alone votes, because the others are not computed there.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "base/top.h"
#include "policy/policy.h"

typedef struct snapkv {
    int64_t budget, window, pool;
    float *vote, *pooled; /* [cap] */
    uint8_t *keep;
    int64_t cap, cap_pooled, cap_keep;
} snapkv;

static kvf_status snapkv_init(kvf_policy *p, kvf_error *err)
{
    const snapkv *s = p->state;
    if (s->pool % 2 == 0) return kvf_fail(err, KVF_ERR_ARG, "snapkv: pool is %lld; use an odd number", (long long)s->pool);
    if (s->window >= s->budget)
        return kvf_fail(err, KVF_ERR_ARG, "snapkv: the window of %lld tokens fills the budget of %lld; raise budget",
                        (long long)s->window, (long long)s->budget);
    return KVF_OK;
}

static void snapkv_fini(kvf_policy *p)
{
    snapkv *s = p->state;
    kvf_free(p->mem, s->vote);
    kvf_free(p->mem, s->pooled);
    kvf_free(p->mem, s->keep);
}

static void snapkv_budget(const kvf_policy *p, kvf_budget *b)
{
    const snapkv *s = p->state;
    *b = (kvf_budget){ .tokens = s->budget, .n_row = (int32_t)s->window };
}

static kvf_status reserve(kvf_policy *p, snapkv *s, int64_t n, kvf_error *err)
{
    void *block = s->vote;
    KVF_TRY(kvf_reserve(p->mem, &block, &s->cap, n, sizeof(float), err));
    s->vote = block;
    block = s->pooled;
    KVF_TRY(kvf_reserve(p->mem, &block, &s->cap_pooled, n, sizeof(float), err));
    s->pooled = block;
    block = s->keep;
    KVF_TRY(kvf_reserve(p->mem, &block, &s->cap_keep, n, 1, err));
    s->keep = block;
    return KVF_OK;
}

static void max_pool(const float *in, int64_t n, int64_t half, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        float best = in[i];
        for (int64_t j = i - half > 0 ? i - half : 0; j <= i + half && j < n; j++) best = in[j] > best ? in[j] : best;
        out[i] = best;
    }
}

static kvf_status snapkv_evict(kvf_policy *p, const kvf_evict *e, int32_t *stay, kvf_error *err)
{
    snapkv *s = p->state;
    int32_t group = p->dims.n_head / p->dims.n_head_kv;
    KVF_TRY(reserve(p, s, e->n, err));
    for (int32_t h = 0; h < p->dims.n_head_kv; h++) {
        memset(s->vote, 0, (size_t)e->n * sizeof *s->vote);
        for (int32_t g = h * group; g < (h + 1) * group; g++)
            for (int64_t i = 0; i < e->n; i++) s->vote[i] += e->mass[g * e->stride + i];
        int64_t old = e->n - s->window; /* places before the window */
        max_pool(s->vote, old, s->pool / 2, s->pooled);
        for (int64_t i = 0; i < e->n; i++) s->keep[i] = i >= old;
        kvf_top(s->pooled, old, e->keep - s->window, s->keep);
        for (int64_t i = 0, n = 0; i < e->n; i++)
            if (s->keep[i]) stay[h * e->keep + n++] = (int32_t)i;
    }
    return KVF_OK;
}

static const kvf_option snapkv_options[] = {
    KVF_OPT_I64(snapkv, budget, 1024, 8, 1 << 30, "tokens that stay in every layer"),
    KVF_OPT_I64(snapkv, window, 32, 1, 512, "newest tokens, which vote and stay"),
    KVF_OPT_I64(snapkv, pool, 7, 1, 255, "neighbours over which votes are max-pooled, odd"),
    { 0 },
};

const kvf_policy_ops kvf_policy_snapkv = {
    .abi = KVF_POLICY_ABI, .name = "snapkv", .source = "Li et al. 2024, arXiv:2404.14469",
    .help = "after a prompt keeps what its end looks at (SnapKV)",
    .options = snapkv_options, .state_size = sizeof(snapkv), .init = snapkv_init, .fini = snapkv_fini,
    .budget = snapkv_budget, .evict = snapkv_evict,
};
