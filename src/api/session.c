/* session.c - session functions of kvfold.h: check arguments, call the timeline.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "api/ctx.h"
#include "model/timeline.h"

void kvf_session_params_init(kvf_session_params *p)
{
    memset(p, 0, sizeof *p);
    p->size = sizeof *p;
    kvf_sampling_default(&p->sampling);
}

kvf_status kvf_session_open(kvf_session **out, kvf_model *m, const kvf_session_params *params, kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!m) return kvf_fail(err, KVF_ERR_ARG, "model is NULL");
    kvf_session_params p;
    kvf_session_params_init(&p);
    if (params) {
        KVF_TRY(kvf_check_size(params->size, sizeof p, "kvf_session_params", err));
        memcpy(&p, params, params->size);
    }
    if (p.n_ctx < 0 || p.n_ctx > INT32_MAX)
        return kvf_fail(err, KVF_ERR_ARG, "n_ctx is %lld; use 1 to %d, or 0 for the model's", (long long)p.n_ctx, INT32_MAX);
    if (p.n_batch < 0 || p.n_batch > 65536)
        return kvf_fail(err, KVF_ERR_ARG, "n_batch is %lld; use 1 to 65536, or 0 for the backend's choice", (long long)p.n_batch);
    if (p.host_share < 0 || p.host_share > 100)
        return kvf_fail(err, KVF_ERR_ARG, "host_share is %d; use 0 to 100 percent", p.host_share);
    KVF_TRY(kvf_sampling_check(&p.sampling, err));
    return kvf_timeline_open(out, m, &p, err);
}

void kvf_session_close(kvf_session *s) { kvf_timeline_close(s); }

static kvf_status check(const kvf_session *s, const void *arg, const char *name, kvf_error *err)
{
    if (s && arg) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", s ? name : "session");
}

static kvf_status check_count(int64_t n, kvf_error *err)
{
    if (n >= 1) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "%lld tokens; hand over at least one", (long long)n);
}

kvf_status kvf_session_sync(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err)
{
    KVF_TRY(check(s, tokens, "tokens", err));
    KVF_TRY(check_count(n, err));
    return kvf_timeline_sync(s, tokens, n, err);
}

kvf_status kvf_session_append(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err)
{
    KVF_TRY(check(s, tokens, "tokens", err));
    KVF_TRY(check_count(n, err));
    return kvf_timeline_append(s, tokens, n, err);
}

kvf_status kvf_session_set_embeddings(kvf_session *s, const float *rows, int64_t n, int64_t width, kvf_error *err)
{
    KVF_TRY(check(s, n == 0 ? (const void *)s : rows, "rows", err));
    if (n < 0 || n > INT32_MAX) return kvf_fail(err, KVF_ERR_ARG, "%lld embeddings; use 0 to %d", (long long)n, INT32_MAX);
    if (n > 0 && width != s->m->hp.n_embd)
        return kvf_fail(err, KVF_ERR_ARG,
                        "embeddings of %lld numbers for a model of width %d; the projector belongs to another model", (long long)width,
                        s->m->hp.n_embd);
    return kvf_timeline_set_embeddings(s, rows, n, err);
}

kvf_status kvf_session_next(kvf_session *s, kvf_token *out, kvf_error *err)
{
    KVF_TRY(check(s, out, "out", err));
    return kvf_timeline_next(s, out, err);
}

kvf_status kvf_session_logits(kvf_session *s, float **logits, kvf_error *err)
{
    KVF_TRY(check(s, logits, "logits", err));
    *logits = NULL;
    KVF_TRY(kvf_timeline_logits(s, err));
    *logits = s->logits;
    return KVF_OK;
}

kvf_status kvf_session_score(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_score *scores, kvf_error *err)
{
    KVF_TRY(check(s, tokens, "tokens", err));
    KVF_TRY(check(s, scores, "scores", err));
    KVF_TRY(check_count(n, err));
    return kvf_timeline_score(s, tokens, n, scores, err);
}

kvf_status kvf_session_set_sampling(kvf_session *s, const kvf_sampling *sampling, kvf_error *err)
{
    KVF_TRY(check(s, sampling, "sampling", err));
    KVF_TRY(kvf_sampling_check(sampling, err));
    kvf_sampler_set(s->sampler, sampling);
    return KVF_OK;
}

int64_t kvf_session_tokens(const kvf_session *s, const kvf_token **tokens)
{
    if (tokens) *tokens = s ? s->tokens : NULL;
    return s ? s->n_token : 0;
}

void kvf_session_cancel(kvf_session *s)
{
    if (s) atomic_store(&s->cancel, 1);
}

kvf_status kvf_session_stats(const kvf_session *s, kvf_stats *stats, kvf_error *err)
{
    KVF_TRY(check(s, stats, "stats", err));
    KVF_TRY(kvf_check_size(stats->size, sizeof *stats, "kvf_stats", err));
    kvf_backend *b = s->m->backend;
    int64_t blocks = kvf_pool_used(s->pool);
    kvf_stats all = { .size = stats->size, .n_prompt_tokens = s->n_prompt, .n_reused_tokens = s->n_reused,
                          .n_computed_tokens = s->n_computed, .n_generated_tokens = s->n_generated,
                          .prefill_ms = s->prefill_ms, .decode_ms = s->decode_ms, .kv_blocks = blocks,
                          .kv_bytes = (size_t)blocks * kvf_pool_slot_bytes(s->pool),
                          .work_bytes = kvf_forward_bytes(s->forward) };
    kvf_kv_counters c;
    kvf_kv_get_counters(s->kv, &c);
    all.n_lookups = c.n_lookup;
    all.lookup_ms = c.lookup_ms;
    all.n_block_reads = c.n_far_read;
    all.n_block_misses = c.n_far_miss;
    all.n_blocks_ahead = c.n_far_ahead;
    all.n_blocks_early = c.n_far_early;
    all.n_blocks_host = c.n_far_host;
    all.n_blocks_shared = (uint64_t)c.n_far_shared;
    all.moved_bytes = (uint64_t)c.n_moved * kvf_pool_slot_bytes(s->pool);
    all.index_bytes = c.digest_bytes;
    all.n_layer_tokens = all.n_layer_tokens_full = s->n_run * s->m->hp.n_layer;
    if (s->lazy) {
        kvf_lazy_counters z;
        kvf_lazy_get_counters(s->lazy, &z);
        all.n_layer_tokens = z.n_layer_token;
        all.n_revived_tokens = z.n_revived;
        all.n_waiting_tokens = z.n_waiting;
        all.waiting_bytes = z.park_bytes + z.park_file_bytes;
        all.work_bytes += z.park_bytes;
    }
    snprintf(all.backend, sizeof all.backend, "%s", b->ops->name);
    b->ops->describe(b, all.cpu, sizeof all.cpu);
    b->ops->kernels(b, all.kernels, sizeof all.kernels);
    kvf_policy_print(s->policy, all.policy, sizeof all.policy);
    memcpy(stats, &all, stats->size);
    return KVF_OK;
}

void kvf_session_stats_reset(kvf_session *s)
{
    if (!s) return;
    s->n_prompt = s->n_reused = s->n_computed = s->n_generated = 0;
    s->prefill_ms = s->decode_ms = 0;
    s->n_run = 0;
    kvf_kv_reset_counters(s->kv);
    if (s->lazy) kvf_lazy_reset_counters(s->lazy);
}

kvf_status kvf_session_layer_tokens(const kvf_session *s, int32_t layer, int64_t *n, kvf_error *err)
{
    KVF_TRY(check(s, n, "n", err));
    *n = 0;
    if (layer < 0 || layer >= s->m->hp.n_layer)
        return kvf_fail(err, KVF_ERR_ARG, "layer %d; the model has 0 to %d", layer, s->m->hp.n_layer - 1);
    *n = s->lazy ? kvf_lazy_held(s->lazy, layer) : kvf_kv_held(s->kv);
    return KVF_OK;
}

kvf_status kvf_session_ingest(kvf_session *s, kvf_store *st, const kvf_ingest *in, kvf_error *err)
{
    KVF_TRY(check(s, st, "store", err));
    KVF_TRY(check(s, in, "in", err));
    kvf_ingest i = { .size = sizeof i };
    KVF_TRY(kvf_check_size(in->size, sizeof i, "kvf_ingest", err));
    memcpy(&i, in, in->size);
    KVF_TRY(check(s, i.name, "name", err));
    KVF_TRY(check(s, i.tokens, "tokens", err));
    KVF_TRY(check_count(i.n, err));
    if (i.note_bytes > 0) KVF_TRY(check(s, i.note, "note", err));
    return kvf_timeline_ingest(s, st, &i, err);
}

kvf_status kvf_session_load(kvf_session *s, kvf_store *st, const char *name, kvf_error *err)
{
    KVF_TRY(check(s, st, "store", err));
    KVF_TRY(check(s, name, "name", err));
    return kvf_timeline_load(s, st, name, err);
}

kvf_status kvf_session_passages(kvf_session *s, int64_t first, int64_t end, kvf_passage *out, int64_t cap, int64_t *n,
                                kvf_error *err)
{
    KVF_TRY(check(s, n, "n", err));
    *n = 0;
    if (cap > 0) KVF_TRY(check(s, out, "out", err));
    if (first < 0 || end < first || end > s->n_token || cap < 0)
        return kvf_fail(err, KVF_ERR_ARG, "tokens %lld to %lld of a timeline of %lld", (long long)first, (long long)end,
                        (long long)s->n_token);
    return kvf_timeline_passages(s, first, end, out, cap, n, err);
}

const char *kvf_policy_name(int64_t i, const char **help)
{
    const kvf_policy_ops *p = kvf_policy_at(i);
    if (help) *help = p ? p->help : NULL;
    return p ? p->name : NULL;
}
