/* kv.h - the KV manager: one sequence's keys and values, block by block, layer by layer.
 *
 * The forward pass speaks to it in three steps per layer and chunk:
 *     kvf_kv_reserve   before layer 0: slots for the chunk in every layer, or nothing at all
 *     kvf_kv_put       new k and v of a layer go to its slots
 *     kvf_kv_attend    the policy says which blocks are read; the backend reads them
 * and kvf_kv_commit makes the chunk part of the sequence. A chunk that is not committed (cancel,
 * failure) leaves no trace.
 *
 * Two kinds of sequence. A plain one stores keys rotated, at the token's position in the text. One
 * with a memory (kvf_memory, policy/policy.h: InfLLM) stores them raw; the window has rotated copies
 * beside them. Its blocks may live in a tier (tier.h): then the pool is a cache of them, and what a
 * step needs is fetched. Whether a block was in the pool or in the tier changes no bit of a result.
 *
 * Sequences that fork share blocks by reference; the partly filled last block is copied when one
 * of them writes to it (copy on write), so a sequence never sees another's tokens.
 *
 * One thread at a time per pool.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_KV_KV_H
#define KVF_KV_KV_H

#include "kv/index.h"
#include "kv/pool.h"
#include "kv/tier.h"
#include "policy/policy.h"

typedef struct kvf_kv kvf_kv;

/* pool is borrowed and must outlive the sequence. Errors: NOMEM. */
kvf_status kvf_kv_open(kvf_kv **out, kvf_pool *pool, kvf_dims dims, kvf_error *err);
void kvf_kv_close(kvf_kv *kv);

typedef struct kvf_kv_rope {
    const double *inv_freq; /* [n_rot / 2], borrowed, outlives the sequence */
    int32_t n_rot;
    kvf_rope_kind kind;
    float mscale;
} kvf_kv_rope;

typedef struct kvf_kv_memory_params {
    kvf_memory memory;
    kvf_kv_rope rope[2];         /* of global layers, of sliding-window layers */
    const int32_t *layer_window; /* [n_layer] the model's own window, 0: global; copied; NULL: all global */
    kvf_index_open_fn index_open; /* for memory.index; may be NULL if that is "" */
    int32_t layer0;               /* what the policy knows as layer layer0 + l is the sequence's layer l */
    bool sparse;                  /* it holds some tokens of a text only, each with its position: every chunk is
                                     arranged (kvf_kv_arrange), and there is no tier, no index and no fork */
} kvf_kv_memory_params;

/* A sequence with a memory. Errors: ARG (the shape: head_dim against the digests), NOMEM. */
kvf_status kvf_kv_open_memory(kvf_kv **out, kvf_pool *pool, kvf_dims dims, const kvf_kv_memory_params *p,
                              kvf_error *err);

/* NULL for a plain sequence. */
const kvf_memory *kvf_kv_memory(const kvf_kv *kv);

/* A second sequence with the same committed tokens, sharing blocks (and the tier). Errors: NOMEM. */
kvf_status kvf_kv_fork(kvf_kv **out, const kvf_kv *kv, kvf_error *err);

int64_t kvf_kv_len(const kvf_kv *kv);  /* committed tokens, evicted ones too */
int64_t kvf_kv_held(const kvf_kv *kv); /* without those */

/* LIMIT if n tokens in all could not be held, after a cut to the first `kept`. budget > 0: they come in chunks
 * of `chunk`, and after each the sequence falls to that many keys. Nothing is changed. */
typedef struct kvf_kv_plan {
    int64_t kept, n, budget, chunk;
} kvf_kv_plan;
kvf_status kvf_kv_can_hold(const kvf_kv *kv, const kvf_kv_plan *p, kvf_error *err);

/* Slots for n_tok tokens after the committed ones, in all layers. On failure nothing changed.
 * Errors: LIMIT, NOMEM; with a tier also IO, FORMAT. */
kvf_status kvf_kv_reserve(kvf_kv *kv, int64_t n_tok, kvf_error *err);

/* k, v: [n_tok][n_head_kv][head_dim] f32, k rotated, or raw in a sequence with a memory; after reserve. */
kvf_status kvf_kv_put(kvf_kv *kv, int32_t layer, const float *k, const float *v, int64_t n_tok, kvf_error *err);

/* Attention of the last n_q of the chunk's n_tok tokens over what the policy selects. policy may
 * be NULL (all blocks; with a memory: no far units). window > 0: the model's own sliding window of this
 * layer. */
typedef struct kvf_kv_attend_args {
    int32_t layer;
    kvf_policy *policy;
    const float *q;     /* [n_q][n_head][head_dim], rotated */
    const float *q_far; /* the same, rotated at memory.window - 1; only with a memory */
    float *o;           /* [n_q][n_head][head_dim] */
    int64_t n_tok, n_q;
    float scale, softcap;
    int64_t window;
    bool reading;       /* a document is being read; no query of the chunk is a question's */
    float *mass;        /* host, or NULL: += attention of the last n_mass queries per key, summed over queries
                           and heads; [keys of the order], else [kvf_kv_len + n_tok]. Not with a window of
                           the layer's own; with a memory not while what is read is tracked */
    int64_t n_mass;
    bool mass_peak;     /* of each key what the head gave that looks at it most, instead of the sum over heads */
    int64_t mass_stride; /* set by kvf_kv_attend */
    bool mass_unread;   /* sparse: mass also of far keys that were not read, as if they had been; a sequence with
                           a memory of the whole text always gives that */
    bool evict;         /* the policy evicts after this chunk and may see the attention */
} kvf_kv_attend_args;
kvf_status kvf_kv_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err);

/* Evict what the policy (with budget) does not keep of the committed tokens, if they are more than it keeps. A
 * plain sequence that shares no block. On failure nothing is evicted, unless the device failed. Errors: NOMEM. */
kvf_status kvf_kv_evict(kvf_kv *kv, kvf_policy *policy, kvf_error *err);

/* What the chunk's attention reads, and in which order, until the next call: for a sequence, plain or sparse,
 * that holds some tokens of a text only, in the order in which they came (LazyLLM). */
typedef struct kvf_kv_order {
    const int32_t *places; /* [n] places of the sequence, the reserved chunk's included, in the text's
                              order; NULL: all of them as they stand */
    int64_t n;
    const int32_t *at;     /* [n_at] where in that order the chunk's tokens stand, rising; the last n_q of them
                              are the queries. NULL: the queries stand at its end */
    int64_t n_at;
    const int32_t *first;  /* [n_at] first key of that order within a sliding-window layer's window; NULL: the
                              order has no gaps, the window counts places */
    const int32_t *pos;    /* [n] positions in the text, rising; only and always for a sparse sequence, which
                              also wants `at` and makes its windows of them */
    bool back;             /* sparse: the chunk's tokens come back, an earlier step passed them over */
} kvf_kv_order;

/* NULL: as without. The order and its arrays are borrowed until the next call, fork or close. */
void kvf_kv_arrange(kvf_kv *kv, const kvf_kv_order *order);

/* Forget all but the committed tokens at these n places, rising, and move them together; a plain or sparse
 * sequence that shares no block. After an error (the device's) nothing is certain: truncate to 0. */
kvf_status kvf_kv_compact(kvf_kv *kv, const int32_t *places, int64_t n, kvf_error *err);

/* Errors (with a memory): NOMEM, IO; the chunk is then not part of the sequence. */
kvf_status kvf_kv_commit(kvf_kv *kv, int64_t n_tok, kvf_error *err);

/* Forget all but the first n tokens, 0 <= n <= len; slots past them are given back. Also drops
 * what was reserved and not committed. If tokens before n were evicted with others after it there, all are
 * forgotten: ask kvf_kv_len. */
void kvf_kv_truncate(kvf_kv *kv, int64_t n);

/* ---- Tier ------------------------------------------------------------------------------- */

/* Make the sequence the first n tokens of the tier (n <= tier->n_token), forgetting what it had. The
 * tier is borrowed until kvf_kv_set_tier or close. Nothing is read yet. Errors: NOMEM. */
kvf_status kvf_kv_load(kvf_kv *kv, kvf_tier *tier, int64_t n, kvf_error *err);

/* The tier holds more by now, or is another one with the same contents; NULL: none any more (fails with
 * STATE if blocks or digests are only there). */
kvf_status kvf_kv_set_tier(kvf_kv *kv, kvf_tier *tier, kvf_error *err);

/* Bytes of a block's digests as a tier keeps them. 0: none. */
size_t kvf_kv_digest_bytes(const kvf_kv *kv);

/* A whole group (tier.h) or the sequence's end, for a tier: slots [n_layer][blocks] and digests
 * [n_layer][blocks][digest_bytes], copied into `digests` (blocks = ceil(n_tok / KVF_BLOCK), n_tok as
 * many as there are). The slots stay as they are until the tier holds them. staging: host memory for the
 * slots of a whole group, to which those of a device are copied; NULL where the host reads them itself. */
kvf_status kvf_kv_export(kvf_kv *kv, int64_t group, const void **slots, void *staging, void *digests, kvf_error *err);

/* What a tier cannot rebuild (representatives and their scores): *n bytes, 0 for most policies. */
size_t kvf_kv_tail_bytes(const kvf_kv *kv);
void kvf_kv_tail_save(const kvf_kv *kv, void *out);
kvf_status kvf_kv_tail_load(kvf_kv *kv, const void *data, size_t n, kvf_error *err); /* FORMAT */

/* From now on the host's backend attends to `percent` of the far blocks that a step of few queries reads and the pool
 * does not have, where they lie in host memory; 0: none (as at first). Without effect where there is no device, no
 * backend of the host beside it or no memory, and while mass is asked for or noted. Errors: ARG, NOMEM. */
kvf_status kvf_kv_share(kvf_kv *kv, int32_t percent, kvf_error *err);

/* ---- What happened ----------------------------------------------------------------------- */

typedef struct kvf_kv_counters {
    int64_t n_block_read, n_block_seen; /* over calls of attend: the policy's real saving */
    int64_t n_lookup;
    double lookup_ms;
    int64_t n_far_read, n_far_miss;     /* far blocks read; fetched from the tier for it */
    int64_t n_far_ahead, n_far_early;   /* blocks sent for before they were asked for; read then */
    int64_t n_far_host;                 /* blocks that came from a frame of host memory, not from the tier */
    int64_t n_far_shared;               /* read by the host's backend instead (kvf_kv_share) */
    int64_t n_moved;                    /* blocks that came into the pool, whoever asked for them */
    size_t digest_bytes;                /* in memory */
} kvf_kv_counters;
void kvf_kv_get_counters(const kvf_kv *kv, kvf_kv_counters *out);
void kvf_kv_reset_counters(kvf_kv *kv);

/* Note where the last query of each chunk looks from now on (on), or stop; forgets what was noted. */
void kvf_kv_track(kvf_kv *kv, bool on);
/* Attention noted per run of KVF_TRACK_TOKENS tokens from token 0; *n runs, NULL if none. Mean over the
 * noted queries, less what the first query of the first chunk gave when that had more than one: heads
 * that look at the text's first or latest tokens whatever is asked say nothing about an answer. */
#define KVF_TRACK_TOKENS KVF_ATTN_RUN
kvf_status kvf_kv_tracked(kvf_kv *kv, const float **mass, int64_t *n, kvf_error *err);

#endif
