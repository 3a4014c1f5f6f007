/* ingest.c - documents into a store and out of it: kvf_session_ingest, _load, _passages.
 *
 * Reading goes chunk by chunk; whenever 2048 tokens (a group) are complete, their slots and digests go
 * to the store's writer, which copies and commits them in its own thread. What is committed may leave the
 * pool. Chunks begin at multiples of the policy's chunk length, so the same text is computed in the same
 * pieces whether it is read at one go, after an interruption, or behind a beginning that the store had.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "model/timeline.h"

kvf_status kvf_timeline_shape(const kvf_session *s, kvf_store_shape *out, kvf_error *err)
{
    const kvf_hparams *hp = &s->m->hp;
    if (s->lazy)
        return kvf_fail(err, KVF_ERR_STATE, "the policy prunes tokens between layers, and which ones hangs on the question, so "
                                            "nothing can be stored; open the session with policy infllm alone");
    if (!kvf_kv_memory(s->kv))
        return kvf_fail(err, KVF_ERR_STATE, "the policy '%s' keeps no memory of far blocks, so nothing can be stored; "
                                            "open the session with policy infllm", s->policy->ops->name);
    *out = (kvf_store_shape){ .model = { s->m->fingerprint[0], s->m->fingerprint[1] }, .n_layer = hp->n_layer,
                              .n_head_kv = hp->n_head_kv, .head_dim = hp->head_dim,
                              .slot_bytes = (int64_t)kvf_pool_slot_bytes(s->pool),
                              .digest_bytes = (int64_t)kvf_kv_digest_bytes(s->kv) };
    snprintf(out->model_name, sizeof out->model_name, "%s", s->m->name);
    s->policy->ops->identity(s->policy, out->policy, sizeof out->policy);
    return KVF_OK;
}

void kvf_timeline_empty(kvf_session *s)
{
    kvf_timeline_cut(s, 0);
    if (kvf_kv_memory(s->kv)) kvf_kv_set_tier(s->kv, NULL, NULL);
    kvf_store_tier_close(s->tier);
    s->tier = NULL;
    s->n_token = 0;
    s->has_logits = false;
    kvf_kv_track(s->kv, false);
}

/* ---- Loading ----------------------------------------------------------------------------- */

static kvf_status set_tokens(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err)
{
    if (n > s->n_ctx)
        return kvf_fail(err, KVF_ERR_LIMIT, "%lld tokens do not fit the context of %lld; raise n_ctx", (long long)n,
                        (long long)s->n_ctx);
    void *list = s->tokens;
    KVF_TRY(kvf_reserve(s->mem, &list, &s->cap_token, n, sizeof(kvf_token), err));
    s->tokens = list;
    memcpy(s->tokens, tokens, (size_t)n * sizeof *tokens);
    s->n_token = n;
    return KVF_OK;
}

static kvf_status load_tail(kvf_session *s, kvf_error *err)
{
    void *tail = NULL;
    size_t n = 0;
    KVF_TRY(kvf_store_read_tail(s->tier, &tail, &n, err));
    kvf_status rc = kvf_kv_tail_load(s->kv, tail, n, err);
    kvf_free(s->mem, tail);
    return rc;
}

static kvf_status check_complete(kvf_store *st, const char *name, kvf_error *err)
{
    kvf_document doc = { .size = sizeof doc };
    KVF_TRY(kvf_store_find(st, name, &doc, err));
    int complete = doc.complete;
    kvf_document_free(st, &doc);
    if (complete) return KVF_OK;
    return kvf_fail(err, KVF_ERR_STATE, "'%s' was not read to its end; ingest it again, it goes on where it stopped", name);
}

kvf_status kvf_timeline_load(kvf_session *s, kvf_store *st, const char *name, kvf_error *err)
{
    kvf_store_shape shape;
    KVF_TRY(kvf_timeline_shape(s, &shape, err));
    if (kvf_store_get_shape(st)) KVF_TRY(kvf_store_bind(st, &shape, err));
    KVF_TRY(check_complete(st, name, err));
    kvf_tier *tier;
    kvf_token *tokens;
    KVF_TRY(kvf_store_tier_open(&tier, st, name, &tokens, err));
    kvf_timeline_empty(s);
    s->tier = tier;
    kvf_status rc = kvf_timeline_check_tokens(s, tokens, tier->n_token, err);
    if (rc >= 0) rc = set_tokens(s, tokens, tier->n_token, err);
    if (rc >= 0) rc = kvf_kv_load(s->kv, tier, tier->n_token, err);
    if (rc >= 0) rc = load_tail(s, err);
    kvf_free(s->mem, tokens);
    if (rc < 0) kvf_timeline_empty(s);
    return rc;
}

/* ---- Reading ----------------------------------------------------------------------------- */

enum { IN_FLIGHT = 3 }; /* groups whose buffers the writer may still read */

typedef struct reading {
    kvf_session *s;
    kvf_writer *writer;
    kvf_tier *tier;
    int64_t n, n_have;       /* tokens of the document; in the store when it began */
    bool rebuild;            /* representatives have to be made again */
    bool computed;           /* something was */
    int64_t n_put;           /* groups handed over, counted from the document's start */
    int64_t n_done;          /* groups the writer no longer reads */
    void *slots[IN_FLIGHT], *digests[IN_FLIGHT], *rows[IN_FLIGHT]; /* rows: where each block's digests lie */
    void *staging[IN_FLIGHT]; /* slots of a device, on the host */
} reading;

/* What the writer has committed may leave the pool. */
static kvf_status follow(reading *r, bool wait, kvf_error *err)
{
    int64_t done;
    KVF_TRY(kvf_writer_poll(r->writer, wait, &done, err));
    if (done > r->n_done) r->n_done = done;
    return kvf_kv_set_tier(r->s->kv, r->tier, err);
}

static kvf_status get_buffers(reading *r, kvf_error *err)
{
    const kvf_hparams *hp = &r->s->m->hp;
    size_t blocks = (size_t)hp->n_layer * KVF_GROUP_BLOCKS, row = kvf_kv_digest_bytes(r->s->kv);
    for (int i = 0; i < IN_FLIGHT; i++) {
        KVF_TRY(kvf_mem_get(r->s->mem, &r->slots[i], blocks, sizeof(void *), err));
        if (!r->s->m->backend->ops->host_memory)
            KVF_TRY(kvf_mem_get(r->s->mem, &r->staging[i], blocks, kvf_pool_slot_bytes(r->s->pool), err));
        if (row > 0) KVF_TRY(kvf_mem_get(r->s->mem, &r->digests[i], blocks, row, err));
        if (row > 0) KVF_TRY(kvf_mem_get(r->s->mem, &r->rows[i], blocks, sizeof(void *), err));
    }
    return KVF_OK;
}

/* Groups that are complete go to the writer; at the document's end the last one as it is. */
static kvf_status put_groups(reading *r, kvf_error *err)
{
    int64_t len = kvf_kv_len(r->s->kv);
    while (r->n_put * KVF_GROUP_TOKENS < len) {
        int64_t n = len - r->n_put * KVF_GROUP_TOKENS;
        if (n < KVF_GROUP_TOKENS && len < r->n) break;
        if (n > KVF_GROUP_TOKENS) n = KVF_GROUP_TOKENS;
        if (r->n_put - r->n_done >= IN_FLIGHT) KVF_TRY(follow(r, true, err));
        int i = (int)(r->n_put % IN_FLIGHT);
        KVF_TRY(kvf_kv_export(r->s->kv, r->n_put, r->slots[i], r->staging[i], r->digests[i], err));
        size_t row = kvf_kv_digest_bytes(r->s->kv), n_row = (size_t)(r->s->m->hp.n_layer * ((n + KVF_BLOCK - 1) / KVF_BLOCK));
        const void **rows = r->rows[i];
        for (size_t k = 0; rows && k < n_row; k++) rows[k] = (const char *)r->digests[i] + k * row;
        kvf_group_data g = { .group = r->n_put, .n_token = n, .slots = r->slots[i], .digests = rows };
        KVF_TRY(kvf_writer_put(r->writer, &g, err));
        r->n_put++;
    }
    return follow(r, false, err);
}

static kvf_status read_chunks(reading *r, kvf_error *err)
{
    kvf_session *s = r->s;
    while (kvf_kv_len(s->kv) < r->n) {
        KVF_TRY(kvf_timeline_check_cancel(s, err));
        int64_t at = kvf_kv_len(s->kv), n = r->n - at < s->n_batch ? r->n - at : s->n_batch;
        kvf_chunk c = { .tokens = s->tokens + at, .n_tok = n, .reading = true };
        KVF_TRY(kvf_timeline_run(s, &c, NULL, err));
        s->n_computed += n;
        KVF_TRY(put_groups(r, err));
        KVF_TRY(kvf_timeline_report(s, at + n, r->n, err));
    }
    return follow(r, true, err);
}

static kvf_status finish(reading *r, kvf_error *err)
{
    size_t n = kvf_kv_tail_bytes(r->s->kv);
    void *tail = NULL;
    if (n > 0 && r->computed) {
        KVF_TRY(kvf_mem_get(r->s->mem, &tail, n, 1, err));
        kvf_kv_tail_save(r->s->kv, tail);
    }
    kvf_status rc = kvf_writer_finish(r->writer, tail, tail ? n : 0, err);
    kvf_free(r->s->mem, tail);
    return rc;
}

/* Read what the store does not have. */
static kvf_status read_document(reading *r, const kvf_ingest *in, kvf_error *err)
{
    kvf_session *s = r->s;
    KVF_TRY(get_buffers(r, err));
    kvf_timeline_empty(s);
    int64_t start = r->rebuild ? 0 : r->n_have;
    r->computed = true;
    r->n_put = r->n_done = (r->n_have + (r->n_have == r->n ? KVF_GROUP_TOKENS - 1 : 0)) / KVF_GROUP_TOKENS;
    s->n_reused += start;
    KVF_TRY(set_tokens(s, in->tokens, in->n, err));
    KVF_TRY(kvf_kv_load(s->kv, r->tier, start, err));
    double begin = kvf_timeline_ms();
    kvf_status rc = read_chunks(r, err);
    s->prefill_ms += kvf_timeline_ms() - begin;
    return rc;
}

/* Representatives depend on all queries that passed: unless the store has them with the document's end,
 * everything is computed again, and only the groups that are missing are written. */
static kvf_status needs_tail(reading *r, kvf_error *err)
{
    void *tail = NULL;
    size_t n = 0;
    if (kvf_kv_tail_bytes(r->s->kv) == 0) return KVF_OK;
    if (r->n_have == r->n) KVF_TRY(kvf_store_read_tail(r->tier, &tail, &n, err));
    kvf_free(r->s->mem, tail);
    r->rebuild = n == 0;
    return KVF_OK;
}

static kvf_status check_ingest(kvf_session *s, const kvf_ingest *in, kvf_error *err)
{
    KVF_TRY(kvf_timeline_check_tokens(s, in->tokens, in->n, err));
    if (in->n > s->n_ctx)
        return kvf_fail(err, KVF_ERR_LIMIT, "%lld tokens do not fit the context of %lld; raise n_ctx", (long long)in->n,
                        (long long)s->n_ctx);
    if (KVF_GROUP_TOKENS % s->n_batch == 0) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "n_batch is %lld; a store takes chunks that divide %d", (long long)s->n_batch,
                    KVF_GROUP_TOKENS);
}

kvf_status kvf_timeline_ingest(kvf_session *s, kvf_store *st, const kvf_ingest *in, kvf_error *err)
{
    kvf_store_shape shape;
    KVF_TRY(kvf_timeline_shape(s, &shape, err));
    KVF_TRY(check_ingest(s, in, err));
    KVF_TRY(kvf_store_bind(st, &shape, err));
    kvf_store_doc doc = { .name = in->name, .tokens = in->tokens, .n_token = in->n, .note = in->note,
                          .note_bytes = in->note_bytes };
    reading r = { .s = s, .n = in->n };
    KVF_TRY(kvf_writer_open(&r.writer, st, &doc, &r.n_have, err));
    r.tier = kvf_writer_tier(r.writer);
    s->n_prompt += in->n;
    kvf_status rc = needs_tail(&r, err);
    if (rc >= 0 && (r.n_have < in->n || r.rebuild))
        rc = read_document(&r, in, err);
    else if (rc >= 0)
        s->n_reused += in->n;
    if (rc >= 0) rc = finish(&r, err);
    /* The writer reads slots until it is closed, and its tier ends with it. */
    int64_t done;
    kvf_writer_poll(r.writer, true, &done, NULL);
    kvf_timeline_empty(s);
    kvf_writer_close(r.writer);
    for (int i = 0; i < IN_FLIGHT; i++) {
        kvf_free(s->mem, r.slots[i]);
        kvf_free(s->mem, r.staging[i]);
        kvf_free(s->mem, r.digests[i]);
        kvf_free(s->mem, r.rows[i]);
    }
    return rc < 0 ? rc : kvf_timeline_load(s, st, in->name, err);
}

/* ---- Passages ----------------------------------------------------------------------------- */

/* Attention of runs first..end, and the strongest of them. */
static double run_sum(const float *mass, int64_t first, int64_t end, int64_t *peak)
{
    double sum = 0;
    *peak = first;
    for (int64_t i = first; i < end; i++) {
        sum += (double)mass[i];
        if (mass[i] > mass[*peak]) *peak = i;
    }
    return sum;
}

kvf_status kvf_timeline_passages(kvf_session *s, int64_t first, int64_t end, kvf_passage *out, int64_t cap,
                                 int64_t *n, kvf_error *err)
{
    enum { RUN = KVF_TRACK_TOKENS, RUNS = KVF_BLOCK / RUN };
    *n = 0;
    if (!s->passages)
        return kvf_fail(err, KVF_ERR_STATE, "this session does not note where answers look; open it with passages = 1");
    int64_t n_run, run0 = (first + RUN - 1) / RUN, run1 = (end + RUN - 1) / RUN, peak;
    const float *mass;
    KVF_TRY(s->lazy ? kvf_lazy_tracked(s->lazy, &mass, &n_run, err) : kvf_kv_tracked(s->kv, &mass, &n_run, err));
    if (run1 > n_run) run1 = n_run;
    if (!mass || run0 >= run1) return KVF_OK;
    double all = run_sum(mass, run0, run1, &peak);
    if (!(all > 0)) return KVF_OK;
    for (int64_t b = run0 / RUNS; b * RUNS < run1; b++) {
        int64_t r0 = b * RUNS > run0 ? b * RUNS : run0, r1 = (b + 1) * RUNS < run1 ? (b + 1) * RUNS : run1;
        double sum = run_sum(mass, r0, r1, &peak);
        int64_t stop = r1 * RUN < end ? r1 * RUN : end;
        kvf_passage p = { .first = r0 * RUN, .n = stop - r0 * RUN, .peak = peak * RUN + RUN / 2,
                          .share = (float)(sum / all) };
        if (p.peak >= stop) p.peak = stop - 1;
        int64_t at = *n < cap ? (*n)++ : cap;
        if (at == cap && (cap == 0 || !(p.share > out[--at].share))) continue;
        for (; at > 0 && p.share > out[at - 1].share; at--) out[at] = out[at - 1];
        out[at] = p;
    }
    return KVF_OK;
}
