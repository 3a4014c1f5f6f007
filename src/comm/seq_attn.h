/* seq_attn.h - attention over one sequence whose blocks lie on several ranks.
 *
 * Block b of the sequence is rank b mod size's, so that the best blocks of any query are spread as well. All
 * ranks have the queries; keys and values never move. Each rank scores its own blocks, the best of all are
 * found by one all-gather of (score, block), each rank attends to those of them that it has, and one all-gather of
 * (o, lse) brings every rank what all merge, in the order of ranks: the same bits everywhere, and what one
 * rank with all blocks would compute, to the rounding of fp32.
 *
 * Decode is n_tok = 1; a chunk of a prefill votes as one ("pass-Q"). Attention over disjoint keys
 * merges exactly by log-sum-exp: Shyam et al. 2024, Tree Attention, arXiv:2408.04093, section 4, with one gather
 * in place of its reductions, since a result is so small that the number of messages rules.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_COMM_SEQ_ATTN_H
#define KVF_COMM_SEQ_ATTN_H

#include "comm/comm.h"

typedef struct kvf_seq kvf_seq;

/* Both borrowed. One thread at a time. With comm->device the backend is the one that comm was opened with. */
kvf_status kvf_seq_open(kvf_seq **out, kvf_comm *comm, kvf_backend *backend, kvf_error *err);
void kvf_seq_close(kvf_seq *s);

/* All but kv, slots, rows and o must be the same on every rank. */
typedef struct kvf_seq_args {
    const float *q;        /* [n_tok][n_head][head_dim], backend memory */
    float *o;              /* the same shape, not q */
    float *lse;            /* [n_tok][n_head], backend memory */
    int64_t n_tok;         /* >= 1 */
    int32_t n_head, n_head_kv, head_dim;
    float scale, softcap;  /* as in kvf_attn_args */
    int64_t n_key;         /* keys of the sequence, on all ranks; >= 0 */
    int64_t q_first;       /* place of query 0 in the order of keys, >= 0: query i sees keys 0..q_first + i */
    const kvf_kv_view *kv;
    const int32_t *slots;  /* host, [kvf_seq_mine(n_key)]: entry i is block rank + i * size */

    int64_t n_first, n_last; /* this many leading and trailing blocks are always read */
    int64_t n_top;           /* and so many of the others, by score (ties: the earlier block); all of them if they
                                are no more. >= 0 */
    const kvf_digest *digest; /* only if some are left out */
    const void *const *rows;  /* host, as slots: digests; not looked at for blocks that are always read */
    bool max_queries;         /* votes of the chunk's queries: the maximum, else the mean */
} kvf_seq_args;

typedef struct kvf_seq_report {
    int64_t n_block, n_read;  /* of this rank */
    int64_t n_gather;         /* collectives */
    size_t sent_bytes;        /* of this rank */
} kvf_seq_report;

/* Blocks of a sequence of n_key keys that rank `rank` of `size` has. */
int64_t kvf_seq_mine(int64_t n_key, int32_t rank, int32_t size);

/* A collective call. The caller holds backend->run, which is given to others while this rank waits for the
 * other ranks: ranks of one process may share a backend. report may be NULL.
 * Errors: ARG, UNSUPPORTED, NOMEM, and those of the backend and the communicator. */
kvf_status kvf_seq_attend(kvf_seq *s, const kvf_seq_args *a, kvf_seq_report *report, kvf_error *err);

#endif
