/* timeline.c - see timeline.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include "model/timeline.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "memory/faiss_index.h"

/* Rows of logits computed at once when every position is scored: enough to reuse the weights of
 * the output layer, few enough for a vocabulary of 262144 (32 MiB). */
enum { SCORE_ROWS = 32 };

/* A prompt's last tokens are a chunk of their own in a session with a memory, so that what they ask for
 * is looked up by them and not by what stands before. */
enum { ASKING = 64 };

#define MEMORY_BYTES ((size_t)1 << 30) /* kv_bytes of a session with a memory, at least, unless said otherwise */

double kvf_timeline_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static int64_t layer_blocks(int64_t n_tok) { return (n_tok + KVF_BLOCK - 1) / KVF_BLOCK; }

kvf_status kvf_timeline_open_kv(kvf_session *s, kvf_kv **out, int32_t layer0, int32_t layer1, bool sparse, kvf_error *err)
{
    const kvf_hparams *hp = &s->m->hp;
    kvf_dims dims = kvf_model_dims(s->m);
    dims.n_layer = layer1 - layer0;
    if (!s->policy->ops->memory) return kvf_kv_open(out, s->pool, dims, err);
    void *windows;
    KVF_TRY(kvf_mem_get(s->mem, &windows, (size_t)dims.n_layer, sizeof(int32_t), err));
    for (int32_t l = layer0; l < layer1; l++) ((int32_t *)windows)[l - layer0] = kvf_layer_is_sliding(hp, l) ? hp->window : 0;
    kvf_kv_memory_params p = { .layer_window = windows, .index_open = kvf_faiss_open, .layer0 = layer0, .sparse = sparse };
    s->policy->ops->memory(s->policy, &p.memory);
    for (int i = 0; i < 2; i++) {
        const double *freq = s->m->inv_freq[i] ? s->m->inv_freq[i] : s->m->inv_freq[0];
        p.rope[i] = (kvf_kv_rope){ freq, hp->n_rot, hp->rope_kind, i == 0 ? hp->rope_mscale : 1 };
    }
    kvf_status rc = kvf_kv_open_memory(out, s->pool, dims, &p, err);
    kvf_free(s->mem, windows);
    return rc;
}

/* What one token reads may stay in memory from token to token: the window twice, for its rotated copies; the
 * rest, which is up to a unit longer than a chunk, and blocks in part; units, each in a block of its own. */
static size_t memory_bytes(const kvf_model *model, const kvf_memory *m)
{
    double tokens = 2.0 * (double)m->window + 4.0 * m->n_chunk + (double)m->init;
    tokens += (double)m->n_unit * m->n_set * KVF_BLOCK;
    double bytes = tokens * (double)kvf_model_kv_bytes(model);
    return bytes < (double)MEMORY_BYTES ? MEMORY_BYTES : bytes > 1e15 ? (size_t)1e15 : (size_t)bytes;
}

static kvf_status open_pool(kvf_session *s, const kvf_session_params *p, const kvf_memory *m, kvf_error *err)
{
    const kvf_hparams *hp = &s->m->hp;
    s->kv_bytes = m && p->kv_bytes == 0 ? memory_bytes(s->m, m) : p->kv_bytes;
    int64_t copies = s->policy->ops->stages ? KVF_STAGES_MAX : 0; /* of a layer's keys, put in order */
    kvf_pool_params pp = { .backend = s->m->backend, .n_head_kv = hp->n_head_kv, .head_dim = hp->head_dim,
                           .max_slots = m ? INT32_MAX : layer_blocks(s->n_ctx) * (hp->n_layer + copies),
                           .budget_bytes = s->kv_bytes };
    return kvf_pool_open(&s->pool, &pp, err);
}

/* How far a chunk, the context and the policy agree. */
static kvf_status set_limits(kvf_session *s, const kvf_session_params *p, const kvf_memory *m, kvf_error *err)
{
    s->n_ctx = p->n_ctx > 0 ? p->n_ctx : m ? INT32_MAX : s->m->hp.n_ctx_train;
    s->n_batch = p->n_batch > 0 ? p->n_batch : m ? m->n_chunk : s->m->backend->ops->batch_hint(s->m->backend);
    if (m && s->n_batch > m->window)
        return kvf_fail(err, KVF_ERR_ARG, "n_batch is %lld, more than the policy's window of %lld tokens; use its chunk",
                        (long long)s->n_batch, (long long)m->window);
    if (!m && s->n_ctx > s->m->hp.n_ctx_train)
        kvf_log_write(s->m->backend->log, KVF_LOG_WARN, "context of %lld tokens; the model was trained for %lld",
                      (long long)s->n_ctx, (long long)s->m->hp.n_ctx_train);
    return KVF_OK;
}

/* What kvf_session_stats tells must open the same policy again. */
static kvf_status check_spec(const kvf_policy *policy, kvf_error *err)
{
    char text[sizeof((kvf_stats *)0)->policy + 1];
    kvf_policy_print(policy, text, sizeof text);
    if (strlen(text) < sizeof text - 1) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "the policy's options take more than %zu characters spelled out; write fewer digits or "
                                      "a shorter folder", sizeof text - 2);
}

static kvf_status open_parts(kvf_session *s, const kvf_session_params *p, kvf_error *err)
{
    const kvf_hparams *hp = &s->m->hp;
    int32_t layer1 = hp->n_layer;
    void *block;
    KVF_TRY(kvf_policy_open(&s->policy, p->policy ? p->policy : "full", kvf_model_dims(s->m), s->mem, err));
    KVF_TRY(check_spec(s->policy, err));
    kvf_memory memory = { 0 }, *m = NULL;
    if (s->policy->ops->memory) {
        s->policy->ops->memory(s->policy, &memory);
        m = &memory;
    }
    KVF_TRY(set_limits(s, p, m, err));
    KVF_TRY(open_pool(s, p, m, err));
    if (s->policy->ops->stages) {
        kvf_stages plan;
        s->policy->ops->stages(s->policy, &plan);
        layer1 = plan.first[1];
    }
    if (s->policy->ops->budget && hp->window > 0)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "policy %s evicts tokens, and this model has layers with sliding windows, which evict their own; use "
                        "another policy",
                        s->policy->ops->name);
    KVF_TRY(kvf_timeline_open_kv(s, &s->kv, 0, layer1, false, err));
    KVF_TRY(kvf_kv_share(s->kv, p->host_share, err));
    KVF_TRY(kvf_forward_open(&s->forward, s->m, s->n_batch, m ? m->window - 1 : 0, err));
    if (s->policy->ops->stages) KVF_TRY(kvf_lazy_open(&s->lazy, s, err));
    KVF_TRY(kvf_sampler_open(&s->sampler, &p->sampling, hp->n_vocab, s->mem, err));
    KVF_TRY(kvf_mem_get(s->mem, &block, (size_t)hp->n_vocab, sizeof(float), err));
    s->logits = block;
    return KVF_OK;
}

kvf_status kvf_timeline_open(kvf_session **out, kvf_model *m, const kvf_session_params *p, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(m->mem, &block, 1, sizeof(kvf_session), err));
    kvf_session *s = block;
    s->m = m;
    s->mem = m->mem;
    s->progress = p->progress;
    s->user = p->user;
    s->passages = p->passages != 0;
    atomic_init(&s->cancel, 0);
    kvf_status rc = open_parts(s, p, err);
    if (rc < 0) {
        kvf_timeline_close(s);
        return rc;
    }
    *out = s;
    return KVF_OK;
}

void kvf_timeline_close(kvf_session *s)
{
    if (!s) return;
    kvf_sampler_close(s->sampler);
    kvf_forward_close(s->forward);
    kvf_lazy_close(s->lazy);
    kvf_kv_close(s->kv);
    kvf_store_tier_close(s->tier);
    kvf_pool_close(s->pool);
    kvf_policy_close(s->policy);
    kvf_free(s->mem, s->tokens);
    kvf_free(s->mem, s->embd);
    kvf_free(s->mem, s->chunk_embd);
    kvf_free(s->mem, s->logits);
    kvf_free(s->mem, s->score_rows);
    kvf_free(s->mem, s);
}

/* What the policy evicts by; zeros where it does not. */
static kvf_budget budget_of(const kvf_session *s)
{
    kvf_budget b = { 0 };
    if (s->policy->ops->budget) s->policy->ops->budget(s->policy, &b);
    return b;
}

/* Would a timeline of n tokens fit, of which the first `kept` stay? Nothing is changed. */
static kvf_status check_room(const kvf_session *s, int64_t kept, int64_t n, kvf_error *err)
{
    if (n > s->n_ctx)
        return kvf_fail(err, KVF_ERR_LIMIT, "%lld tokens do not fit the context of %lld; shorten the text or raise n_ctx",
                        (long long)n, (long long)s->n_ctx);
    kvf_budget b = budget_of(s);
    kvf_kv_plan p = { .kept = kept, .n = n, .budget = b.every_chunk ? b.tokens : 0, .chunk = s->n_batch };
    return kvf_kv_can_hold(s->kv, &p, err);
}

kvf_status kvf_timeline_check_tokens(const kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err)
{
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= s->m->hp.n_vocab)
            return kvf_fail(err, KVF_ERR_ARG, "token %lld is %d; the vocabulary has 0 to %d", (long long)i, tokens[i],
                            s->m->hp.n_vocab - 1);
    return KVF_OK;
}

static int64_t count_embeddings(const kvf_token *tokens, int64_t n)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) found += tokens[i] == KVF_TOKEN_EMBEDDING;
    return found;
}

/* The same where embeddings may stand among the tokens, `before` of them on the timeline already. */
static kvf_status check_mixed(const kvf_session *s, const kvf_token *tokens, int64_t n, int64_t before, kvf_error *err)
{
    for (int64_t i = 0, from = 0; i <= n; i++) {
        if (i < n && tokens[i] != KVF_TOKEN_EMBEDDING) continue;
        KVF_TRY(kvf_timeline_check_tokens(s, tokens + from, i - from, err));
        from = i + 1;
    }
    int64_t asked = before + count_embeddings(tokens, n);
    if (asked <= s->n_embd_row) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "%lld places want an embedding and %lld are there; hand them to kvf_session_set_embeddings first",
                    (long long)asked, (long long)s->n_embd_row);
}

kvf_status kvf_timeline_set_embeddings(kvf_session *s, const float *rows, int64_t n, kvf_error *err)
{
    int64_t width = s->m->hp.n_embd;
    void *copy = NULL, *list = s->chunk_embd;
    for (int64_t i = 0; i < n * width; i++)
        if (!isfinite(rows[i]))
            return kvf_fail(err, KVF_ERR_ARG, "number %lld of embedding %lld is not finite", (long long)(i % width), (long long)(i / width));
    if (n > 0) KVF_TRY(kvf_mem_get(s->mem, &copy, (size_t)n, (size_t)width * sizeof(float), err));
    kvf_status rc = list ? KVF_OK : kvf_mem_get(s->mem, &list, (size_t)s->n_batch, sizeof(float *), err);
    if (rc < 0) {
        kvf_free(s->mem, copy);
        return rc;
    }
    s->chunk_embd = list;
    if (n > 0) memcpy(copy, rows, (size_t)(n * width) * sizeof *rows);
    kvf_timeline_empty(s);
    kvf_free(s->mem, s->embd);
    s->embd = copy;
    s->n_embd_row = n;
    return KVF_OK;
}

const float *const *kvf_timeline_rows(kvf_session *s, const int32_t *pos, int64_t at, int64_t n)
{
    if (s->n_embd_row == 0) return NULL;
    int64_t row = 0, seen = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t place = pos ? pos[i] : at + i;
        for (; seen < place; seen++) row += s->tokens[seen] == KVF_TOKEN_EMBEDDING;
        s->chunk_embd[i] = s->tokens[place] == KVF_TOKEN_EMBEDDING ? s->embd + row * s->m->hp.n_embd : NULL;
    }
    return s->chunk_embd;
}

void kvf_timeline_cut(kvf_session *s, int64_t n)
{
    if (s->lazy)
        kvf_lazy_cut(s, n);
    else
        kvf_kv_truncate(s->kv, n);
    if (s->policy->ops->forget) s->policy->ops->forget(s->policy, n);
}

/* A step of decoding is one graph where the backend records steps. */
static kvf_status run_chunk(kvf_session *s, const kvf_chunk *c, float *logits, kvf_error *err)
{
    kvf_backend *be = s->m->backend;
    bool step = c->n_tok == 1 && be->ops->step_begin;
    if (step) KVF_TRY(be->ops->step_begin(be, err));
    kvf_status rc = kvf_forward_run(s->forward, s->kv, s->policy, c, err);
    if (rc >= 0 && logits) rc = kvf_forward_logits(s->forward, 0, 1, logits, err);
    kvf_status end = step ? be->ops->step_end(be, rc < 0 ? NULL : err) : KVF_OK;
    return rc < 0 ? rc : end;
}

/* Compute one chunk, alone on the backend. */
kvf_status kvf_timeline_run(kvf_session *s, const kvf_chunk *c, float *logits, kvf_error *err)
{
    kvf_turn_take(&s->m->backend->run);
    kvf_status rc = run_chunk(s, c, logits, err);
    kvf_turn_give(&s->m->backend->run);
    if (rc >= 0) s->n_run += c->n_tok;
    if (rc < 0 && s->policy->ops->forget) s->policy->ops->forget(s->policy, kvf_kv_len(s->kv));
    return rc;
}

kvf_status kvf_timeline_check_cancel(kvf_session *s, kvf_error *err)
{
    if (!atomic_exchange(&s->cancel, 0)) return KVF_OK;
    return kvf_fail(err, KVF_ERR_CANCELLED, "cancelled after %lld tokens", (long long)kvf_kv_len(s->kv));
}

kvf_status kvf_timeline_report(kvf_session *s, int64_t done, int64_t total, kvf_error *err)
{
    if (s->progress && s->progress(s->user, done, total))
        return kvf_fail(err, KVF_ERR_CANCELLED, "cancelled after %lld tokens", (long long)kvf_kv_len(s->kv));
    return KVF_OK;
}

/* Newest tokens of a prompt that the policy wants to see in one chunk. */
static int64_t last_rows(const kvf_session *s)
{
    kvf_budget b = budget_of(s);
    return b.n_row < s->n_batch ? b.n_row : s->n_batch;
}

int64_t kvf_timeline_chunk(const kvf_session *s, int64_t left)
{
    if (left > s->n_batch) {
        int64_t rest = left - s->n_batch, voters = last_rows(s);
        return rest < voters ? left - voters : s->n_batch; /* the end is not cut through */
    }
    if (kvf_kv_memory(s->kv) && left > ASKING) return left - ASKING;
    return left;
}

/* Does the policy evict after a chunk of a prompt, the last or not? */
static bool evicts(const kvf_session *s, bool last)
{
    return s->policy->ops->budget && (last || budget_of(s).every_chunk);
}

/* Run every token of the timeline that the KV does not hold; then s->logits are those after the
 * last. tell: report progress. */
static kvf_status compute(kvf_session *s, bool tell, kvf_error *err)
{
    int64_t first = kvf_kv_len(s->kv), total = s->n_token - first;
    if (s->lazy && first < s->n_token) return kvf_lazy_step(s, tell, err);
    while (kvf_kv_len(s->kv) < s->n_token) {
        KVF_TRY(kvf_timeline_check_cancel(s, err));
        int64_t at = kvf_kv_len(s->kv), left = s->n_token - at, n = kvf_timeline_chunk(s, left);
        kvf_chunk c = { .tokens = s->tokens + at, .embd = kvf_timeline_rows(s, NULL, at, n), .n_tok = n, .n_out = n == left,
                        .evict = (tell || total > 1) && evicts(s, n == left) };
        if (s->passages && tell) kvf_kv_track(s->kv, n == left); /* from a prompt's last token on */
        KVF_TRY(kvf_timeline_run(s, &c, n == left ? s->logits : NULL, err));
        s->has_logits = n == left;
        if (tell) KVF_TRY(kvf_timeline_report(s, at + n - first, total, err));
    }
    return KVF_OK;
}

/* After a failure the timeline is what was computed, but never less than the n tokens it had. */
static void settle(kvf_session *s, int64_t n)
{
    int64_t keep = kvf_kv_len(s->kv) > n ? kvf_kv_len(s->kv) : n;
    if (keep < s->n_token) {
        s->n_token = keep;
        s->has_logits = false;
    }
}

kvf_status kvf_timeline_logits(kvf_session *s, kvf_error *err)
{
    if (s->n_token == 0)
        return kvf_fail(err, KVF_ERR_STATE, "the timeline is empty; hand tokens to kvf_session_sync first");
    if (s->has_logits) return KVF_OK;
    if (kvf_kv_len(s->kv) == s->n_token) kvf_timeline_cut(s, s->n_token - 1); /* its logits were not kept */
    double start = kvf_timeline_ms();
    kvf_status rc = compute(s, false, err);
    s->decode_ms += kvf_timeline_ms() - start;
    return rc;
}

/* n_keep: tokens that stay on the timeline should it fail. */
static kvf_status prefill(kvf_session *s, int64_t n_keep, kvf_error *err)
{
    double start = kvf_timeline_ms();
    int64_t before = kvf_kv_len(s->kv);
    kvf_status rc = compute(s, true, err);
    s->prefill_ms += kvf_timeline_ms() - start;
    s->n_computed += kvf_kv_len(s->kv) - before;
    if (rc < 0) settle(s, n_keep);
    return rc;
}

/* Room for n tokens on the list. *tokens may point into it (the session's own tokens, cut short and
 * handed back): then it is moved along. */
static kvf_status reserve_tokens(kvf_session *s, const kvf_token **tokens, int64_t n, kvf_error *err)
{
    uintptr_t at = (uintptr_t)*tokens, list = (uintptr_t)s->tokens;
    bool own = s->tokens && at >= list && at < list + (size_t)s->cap_token * sizeof **tokens;
    void *grown = s->tokens;
    KVF_TRY(kvf_reserve(s->mem, &grown, &s->cap_token, n, sizeof(kvf_token), err));
    s->tokens = grown;
    if (own) *tokens = s->tokens + (at - list) / sizeof **tokens;
    return KVF_OK;
}

kvf_status kvf_timeline_sync(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err)
{
    KVF_TRY(check_mixed(s, tokens, n, 0, err));
    int64_t same = 0, both = n < s->n_token ? n : s->n_token;
    while (same < both && s->tokens[same] == tokens[same]) same++;
    KVF_TRY(check_room(s, same < n ? same : n - 1, n, err));
    KVF_TRY(reserve_tokens(s, &tokens, n, err));
    s->n_prompt += n;
    if (same == n && n == s->n_token && s->has_logits) {
        s->n_reused += n;
        return KVF_OK;
    }
    int64_t keep = same < kvf_kv_len(s->kv) ? same : kvf_kv_len(s->kv);
    if (keep == n) keep = n - 1; /* the logits after the last token are wanted */
    if (keep < kvf_kv_len(s->kv)) kvf_timeline_cut(s, keep);
    keep = kvf_kv_len(s->kv); /* nothing, if what came before was evicted meanwhile */
    memmove(s->tokens, tokens, (size_t)n * sizeof *tokens);
    s->n_token = n;
    s->has_logits = false;
    s->n_reused += keep;
    return prefill(s, keep, err);
}

/* Put tokens at the end of the list without computing them. */
static kvf_status extend(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err)
{
    KVF_TRY(check_mixed(s, tokens, n, s->n_embd_row > 0 ? count_embeddings(s->tokens, s->n_token) : 0, err));
    KVF_TRY(check_room(s, s->n_token, s->n_token + n, err));
    KVF_TRY(reserve_tokens(s, &tokens, s->n_token + n, err));
    memmove(s->tokens + s->n_token, tokens, (size_t)n * sizeof *tokens);
    s->n_token += n;
    s->has_logits = false;
    return KVF_OK;
}

kvf_status kvf_timeline_append(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err)
{
    int64_t n_keep = s->n_token;
    bool had = s->has_logits;
    KVF_TRY(extend(s, tokens, n, err));
    s->n_prompt += n;
    kvf_status rc = prefill(s, n_keep, err);
    if (rc < 0 && s->n_token == n_keep) s->has_logits = had; /* nothing was computed to its end, so they are still there */
    return rc;
}

kvf_status kvf_timeline_next(kvf_session *s, kvf_token *out, kvf_error *err)
{
    *out = KVF_TOKEN_NONE;
    KVF_TRY(kvf_timeline_check_cancel(s, err));
    KVF_TRY(kvf_timeline_logits(s, err));
    double start = kvf_timeline_ms();
    kvf_token token = kvf_sampler_pick(s->sampler, s->logits, s->tokens, s->n_token);
    s->decode_ms += kvf_timeline_ms() - start;
    if (!isfinite(s->logits[token]))
        return kvf_fail(err, KVF_ERR_FORMAT, "the model computes no finite score for any token; its file is damaged");
    if (kvf_tokenizer_is_end(s->m->tokenizer, token)) {
        *out = token;
        return KVF_DONE;
    }
    KVF_TRY(extend(s, &token, 1, err));
    s->n_generated++;
    *out = token;
    return KVF_OK;
}

void kvf_score_row(const float *logits, int32_t n_vocab, kvf_token token, kvf_score *out)
{
    enum { TOP = 5 };
    int32_t n = 0;
    float max = -INFINITY;
    for (int32_t i = 0; i < n_vocab; i++) {
        float x = logits[i];
        if (x > max) max = x;
        if (n == TOP && !(x > out->top_logprob[TOP - 1])) continue;
        int32_t at = n < TOP ? n++ : TOP - 1;
        for (; at > 0 && x > out->top_logprob[at - 1]; at--) {
            out->top_logprob[at] = out->top_logprob[at - 1];
            out->top[at] = out->top[at - 1];
        }
        out->top_logprob[at] = x;
        out->top[at] = i;
    }
    double sum = 0;
    for (int32_t i = 0; i < n_vocab; i++)
        if (logits[i] > max - 30) sum += expf(logits[i] - max); /* 10^5 terms under e^-30 change nothing */
    float lse = max + (float)log(sum);
    out->logprob = logits[token] - lse;
    for (int32_t i = 0; i < TOP; i++) {
        if (i >= n) out->top[i] = KVF_TOKEN_NONE;
        out->top_logprob[i] = i < n ? out->top_logprob[i] - lse : -INFINITY;
    }
}

/* Score tokens at..at + n of the timeline from the hidden states of the chunk before at. */
static kvf_status score_chunk(kvf_session *s, int64_t at, int64_t n, kvf_score *scores, kvf_error *err)
{
    int32_t n_vocab = s->m->hp.n_vocab;
    for (int64_t i = 0; i < n; i += SCORE_ROWS) {
        int64_t rows = n - i < SCORE_ROWS ? n - i : SCORE_ROWS;
        kvf_turn_take(&s->m->backend->run);
        kvf_status rc = kvf_forward_logits(s->forward, i, rows, s->score_rows, err);
        kvf_turn_give(&s->m->backend->run);
        KVF_TRY(rc);
        for (int64_t r = 0; r < rows; r++) {
            const float *row = s->score_rows + r * n_vocab;
            if (at + i + r < s->n_token) {
                kvf_score_row(row, n_vocab, s->tokens[at + i + r], &scores[i + r]);
            } else {
                memcpy(s->logits, row, (size_t)n_vocab * sizeof *row);
                s->has_logits = true;
            }
        }
    }
    return KVF_OK;
}

/* With tokens pruned each prediction is a step of its own: what is kept hangs on the newest token. With a memory
 * too, after a beginning: a chunk chooses its blocks by all its queries, so its first tokens would be predicted
 * from blocks that its last ones asked for. From an empty timeline a text is scored as documents are read. */
static kvf_status score_steps(kvf_session *s, int64_t first, int64_t n, kvf_score *scores, kvf_error *err)
{
    for (int64_t i = 0; i < n; i++) {
        s->n_token = first + i + 1;
        s->has_logits = false;
        if (i + 1 == n) break; /* what follows the last token is computed when it is asked for */
        KVF_TRY(compute(s, false, err));
        kvf_score_row(s->logits, s->m->hp.n_vocab, s->tokens[first + i + 1], &scores[i + 1]);
        KVF_TRY(kvf_timeline_report(s, i + 1, n, err));
    }
    return KVF_OK;
}

/* Every chunk's hidden states are wanted here, and the token each predicts is the next one. */
static kvf_status score_all(kvf_session *s, int64_t first, kvf_score *scores, kvf_error *err)
{
    int64_t total = s->n_token - first;
    while (kvf_kv_len(s->kv) < s->n_token) {
        KVF_TRY(kvf_timeline_check_cancel(s, err));
        int64_t at = kvf_kv_len(s->kv), left = s->n_token - at, n = left < s->n_batch ? left : s->n_batch;
        kvf_chunk c = { .tokens = s->tokens + at, .embd = kvf_timeline_rows(s, NULL, at, n), .n_tok = n, .n_out = n,
                        .evict = evicts(s, n == left) };
        KVF_TRY(kvf_timeline_run(s, &c, NULL, err));
        KVF_TRY(score_chunk(s, at + 1, n, scores + (at + 1 - first), err));
        KVF_TRY(kvf_timeline_report(s, at + n - first, total, err));
    }
    return KVF_OK;
}

kvf_status kvf_timeline_score(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_score *scores, kvf_error *err)
{
    void *block = s->score_rows;
    if (!block) KVF_TRY(kvf_mem_get(s->mem, &block, SCORE_ROWS * (size_t)s->m->hp.n_vocab, sizeof(float), err));
    s->score_rows = block;
    KVF_TRY(kvf_timeline_check_tokens(s, tokens, n, err));
    KVF_TRY(check_room(s, s->n_token, s->n_token + n, err));
    memset(&scores[0], 0, sizeof scores[0]);
    if (s->n_token > 0) {
        KVF_TRY(kvf_timeline_logits(s, err));
        kvf_score_row(s->logits, s->m->hp.n_vocab, tokens[0], &scores[0]);
    }
    int64_t first = s->n_token;
    KVF_TRY(extend(s, tokens, n, err));
    s->n_prompt += n;
    double start = kvf_timeline_ms();
    bool steps = s->lazy || (first > 0 && s->policy->ops->memory);
    kvf_status rc = steps ? score_steps(s, first, n, scores, err) : score_all(s, first, scores, err);
    s->prefill_ms += kvf_timeline_ms() - start;
    s->n_computed += kvf_kv_len(s->kv) - first;
    if (rc < 0) settle(s, first);
    return rc;
}
