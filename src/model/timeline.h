/* timeline.h - one session: the tokens, what of them is computed, and what comes next.
 *
 * The timeline is a list of tokens; the KV holds its first `kvf_kv_len` of them. A token that
 * next() sampled is put on the list at once and computed only when the token after it is asked
 * for, so that the last token of an answer costs nothing and the first is shown a step earlier.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_TIMELINE_H
#define KVF_MODEL_TIMELINE_H

#include <stdatomic.h>

#include "memory/store.h"
#include "model/forward.h"
#include "model/lazy.h"
#include "model/sampler.h"

struct kvf_session {
    kvf_model *m;
    const kvf_mem *mem;
    kvf_pool *pool;
    kvf_kv *kv;
    kvf_policy *policy;
    kvf_lazy *lazy;    /* the policy prunes tokens between layers; kv is then the first stage's. NULL: it does not */
    kvf_forward *forward;
    kvf_sampler *sampler;
    int64_t n_ctx, n_batch;
    size_t kv_bytes;   /* budget of keys, values and what waits; 0: none */
    kvf_tier *tier;    /* of the stored document the timeline began with; NULL: none */
    bool passages;     /* note where answers look */
    int (*progress)(void *user, int64_t done, int64_t total);
    void *user;
    atomic_int cancel;

    kvf_token *tokens; /* [n_token] the timeline */
    int64_t n_token, cap_token;
    float *embd;       /* [n_embd_row][n_embd] of the places KVF_TOKEN_EMBEDDING, NULL: none */
    int64_t n_embd_row;
    const float **chunk_embd; /* [n_batch] of a chunk */
    float *logits;     /* [n_vocab] after the last token, if has_logits */
    bool has_logits;
    float *score_rows; /* [SCORE_ROWS][n_vocab], made by the first score() */

    int64_t n_prompt, n_reused, n_computed, n_generated;
    int64_t n_run; /* tokens through the first layer */
    double prefill_ms, decode_ms;
};

/* params checked by the caller except where noted in kvfold.h; n_ctx and n_batch resolved here. */
kvf_status kvf_timeline_open(kvf_session **out, kvf_model *m, const kvf_session_params *p, kvf_error *err);
void kvf_timeline_close(kvf_session *s);

/* As the functions of kvfold.h with the same last word; arguments are checked there. */
kvf_status kvf_timeline_sync(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err);
kvf_status kvf_timeline_append(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err);
kvf_status kvf_timeline_next(kvf_session *s, kvf_token *out, kvf_error *err);
kvf_status kvf_timeline_logits(kvf_session *s, kvf_error *err); /* then s->logits is valid */
kvf_status kvf_timeline_set_embeddings(kvf_session *s, const float *rows, int64_t n, kvf_error *err);
kvf_status kvf_timeline_score(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_score *scores, kvf_error *err);

/* The session's kind of contents, for kvf_store_bind. STATE if its policy has no memory. */
kvf_status kvf_timeline_shape(const kvf_session *s, kvf_store_shape *out, kvf_error *err);
kvf_status kvf_timeline_ingest(kvf_session *s, kvf_store *st, const kvf_ingest *in, kvf_error *err);
kvf_status kvf_timeline_load(kvf_session *s, kvf_store *st, const char *name, kvf_error *err);
kvf_status kvf_timeline_passages(kvf_session *s, int64_t first, int64_t end, kvf_passage *out, int64_t cap,
                                 int64_t *n, kvf_error *err);

/* For ingest.c and lazy.c: what timeline.c shares. */
/* A sequence of layers layer0 <= l < layer1 as the session's policy wants it: plain, with a memory, or sparse. */
kvf_status kvf_timeline_open_kv(kvf_session *s, kvf_kv **out, int32_t layer0, int32_t layer1, bool sparse, kvf_error *err);
/* Tokens of the next chunk when `left` are to be computed. */
int64_t kvf_timeline_chunk(const kvf_session *s, int64_t left);
kvf_status kvf_timeline_check_tokens(const kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err);
/* Rows of the n <= n_batch tokens at the places pos[i], NULL: at + i; NULL if there are no embeddings. */
const float *const *kvf_timeline_rows(kvf_session *s, const int32_t *pos, int64_t at, int64_t n);
kvf_status kvf_timeline_run(kvf_session *s, const kvf_chunk *c, float *logits, kvf_error *err);
kvf_status kvf_timeline_check_cancel(kvf_session *s, kvf_error *err);
kvf_status kvf_timeline_report(kvf_session *s, int64_t done, int64_t total, kvf_error *err);
void kvf_timeline_cut(kvf_session *s, int64_t n);   /* KV and policy forget all but n tokens */
void kvf_timeline_empty(kvf_session *s);            /* no tokens, no tier */
double kvf_timeline_ms(void);

/* Log-probability of `token` and the five best, from one row of logits. */
void kvf_score_row(const float *logits, int32_t n_vocab, kvf_token token, kvf_score *out);

#endif
