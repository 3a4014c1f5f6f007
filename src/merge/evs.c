/* evs.c - efficient video sampling: the tokens that differ most from the one before them in time.
 *
 * Bagrov et al. 2025, EVS, arXiv:2510.14624, as vLLM runs it: every token of the first frame, and of the
 * others those with the largest 1 - cosine to the same position one frame earlier, max(N, floor(ratio T N))
 * in all; equal ones in the order of the video. mode=exact keeps floor(ratio T N): where that is less than a
 * frame, tokens of the first frame at equal distances.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "merge/method.h"
#include "merge/select.h"
#include "merge/similarity.h"

typedef struct evs {
    double ratio;
    int64_t mode;
} evs;

static const kvf_option options[] = {
    KVF_OPT_F64(evs, ratio, 0.1, 1e-6, 1, "share of the tokens that is kept"),
    KVF_OPT_CHOICE(evs, mode, 0, "exact|official", "the count asked for, or at least the whole first frame"),
    { 0 },
};

static kvf_status append(kvf_merge_job *job, const uint8_t *picked, kvf_error *err)
{
    int64_t n_tok = job->x->n_tok;
    for (int64_t t = 0; t < job->x->n_frame; t++) {
        int64_t before = job->plan->n_out;
        for (int64_t n = 0; n < n_tok; n++)
            if (picked[t * n_tok + n]) KVF_TRY(kvf_plan_copy(job->plan, t, t, n, err));
        kvf_merge_segment s = { (int32_t)t, (int32_t)t,     0,
                                0,          (int32_t)n_tok, (int32_t)(job->plan->n_out - before) };
        KVF_TRY(kvf_plan_segment(job->plan, s, err));
    }
    return KVF_OK;
}

static void pick(const kvf_merge_job *job, const float *sim, int64_t n_keep, uint64_t *key, uint8_t *picked)
{
    int64_t n_tok = job->x->n_tok, n = (job->x->n_frame - 1) * n_tok,
            n_first = n_keep < n_tok ? n_keep : n_tok;
    memset(picked, 0, (size_t)n_tok);
    for (int64_t i = 0; i < n_first; i++) picked[(2 * i + 1) * n_tok / (2 * n_first)] = 1;
    for (int64_t i = 0; i < n; i++) key[i] = kvf_order_key((double)(1.0f - sim[i]));
    kvf_pick_top(key, n, n_keep - n_first, picked + n_tok);
}

static kvf_status plan(kvf_merge_job *job, kvf_error *err)
{
    const evs *o = job->state;
    const kvf_merge_env *env = job->env;
    int64_t n_tok = job->x->n_tok, n = job->x->n_frame * n_tok, n_keep = kvf_merge_count(o->ratio, n);
    if (o->mode == 1 && n_keep < n_tok) n_keep = n_tok;
    float *sim = NULL;
    double *norm = NULL;
    uint64_t *key = NULL;
    uint8_t *picked = NULL;
    double start = kvf_merge_now_ms();
    kvf_status rc = KVF_GET(env, &sim, n - n_tok, err);
    if (rc >= 0) rc = KVF_GET(env, &norm, n, err);
    if (rc >= 0) rc = KVF_GET(env, &key, n, err);
    if (rc >= 0) rc = KVF_GET(env, &picked, n, err);
    if (rc >= 0) rc = kvf_similarity(env, job->x, sim, norm, err);
    job->plan->similarity_ms = kvf_merge_now_ms() - start;
    if (rc >= 0) {
        pick(job, sim, n_keep, key, picked);
        rc = append(job, picked, err);
    }
    job->plan->n_asked = n_keep;
    kvf_free(env->mem, picked);
    kvf_free(env->mem, key);
    kvf_free(env->mem, norm);
    kvf_free(env->mem, sim);
    return rc;
}

const kvf_merge_ops kvf_merge_evs = {
    .name = "evs",
    .source = "Bagrov et al. 2025, EVS, arXiv:2510.14624",
    .help = "keeps the tokens that differ most from the frame before",
    .options = options,
    .state_size = sizeof(evs),
    .plan = plan,
};
