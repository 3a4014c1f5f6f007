/* kv.h - the KV manager: one sequence's keys and values, block by block, layer by layer.
 *
 * The forward pass speaks to it in three steps per layer and chunk:
 *     kvf_kv_reserve   before layer 0: slots for the chunk in every layer, or nothing at all
 *     kvf_kv_put       new k and v of a layer go to its slots
 *     kvf_kv_attend    the policy says which blocks are read; the backend reads them
 * and kvf_kv_commit makes the chunk part of the sequence. A chunk that is not committed (cancel,
 * failure) leaves no trace. Keys are stored rotated, at the token's position in the text.
 *
 * Sequences that fork share blocks by reference; the partly filled last block is copied when one
 * of them writes to it (copy on write), so a sequence never sees another's tokens.
 *
 * One thread at a time per pool.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_KV_KV_H
#define KVF_KV_KV_H

#include "kv/pool.h"
#include "policy/policy.h"

typedef struct kvf_kv kvf_kv;

/* pool is borrowed and must outlive the sequence. Errors: NOMEM. */
kvf_status kvf_kv_open(kvf_kv **out, kvf_pool *pool, kvf_dims dims, kvf_error *err);
void kvf_kv_close(kvf_kv *kv);

/* A second sequence with the same committed tokens, sharing blocks. Errors: NOMEM. */
kvf_status kvf_kv_fork(kvf_kv **out, const kvf_kv *kv, kvf_error *err);

int64_t kvf_kv_len(const kvf_kv *kv); /* committed tokens */

/* Slots for n_tok tokens after the committed ones, in all layers. On failure nothing changed.
 * Errors: LIMIT, NOMEM. */
kvf_status kvf_kv_reserve(kvf_kv *kv, int64_t n_tok, kvf_error *err);

/* k, v: [n_tok][n_head_kv][head_dim] f32, k rotated; after reserve. */
kvf_status kvf_kv_put(kvf_kv *kv, int32_t layer, const float *k, const float *v, int64_t n_tok, kvf_error *err);

/* Attention of the last n_q of the chunk's n_tok tokens over what the policy selects. policy may
 * be NULL (all blocks). window > 0: the model's own sliding window of this layer. */
typedef struct kvf_kv_attend_args {
    int32_t layer;
    kvf_policy *policy;
    const float *q; /* [n_q][n_head][head_dim], rotated */
    float *o;       /* [n_q][n_head][head_dim] */
    int64_t n_tok, n_q;
    float scale, softcap;
    int64_t window;
} kvf_kv_attend_args;
kvf_status kvf_kv_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err);

void kvf_kv_commit(kvf_kv *kv, int64_t n_tok);

/* Forget all but the first n tokens, 0 <= n <= len; slots past them are given back. Also drops
 * what was reserved and not committed. */
void kvf_kv_truncate(kvf_kv *kv, int64_t n);

/* Blocks read and blocks there were, summed over calls of attend: the policy's real saving. */
void kvf_kv_counters(const kvf_kv *kv, int64_t *n_block_read, int64_t *n_block_seen);

#endif
