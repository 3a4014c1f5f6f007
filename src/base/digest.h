/* digest.h - what is kept of a block's raw keys so that a later query can be scored against them
 * without reading the keys: the shape of it, shared by policies (which choose), the KV manager (which
 * keeps them) and backends (which write and read them).
 *
 * A digest covers one block (KVF_DIGEST_BLOCK tokens) of one layer, all KV heads, in one run of
 * bytes: KV head after KV head, and within a head:
 *
 *   BITS    a low-bit copy of every key. Per group of KVF_DIGEST_GROUP tokens: f16 lo[head_dim],
 *           f16 step[head_dim], then the codes, n bits each: key ~ lo + code * step.
 *           Order of codes: kvf_digest_code_at. Score of a unit: max over its tokens of q . key~.
 *   MEAN    f16 mean[KVF_DIGEST_BLOCK / sub][head_dim]: the mean key of every `sub` tokens.
 *           Score of a unit: max over its means of q . mean.
 *   BOUNDS  f16 min[KVF_DIGEST_BLOCK / sub][head_dim], then max the same (Quest, Tang et al. 2024,
 *           arXiv:2406.10774). Score: max over the unit's subs of sum_c max(q_c min_c, q_c max_c).
 *   REPS    f32 [KVF_DIGEST_BLOCK / sub][n_vec][head_dim], n_vec = reps_per_q_head ? query heads of
 *           the KV head : 1: a mean of representative keys, written from outside (InfLLM). Score of a
 *           unit: q . rep.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_DIGEST_H
#define KVF_BASE_DIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KVF_DIGEST_BLOCK 128 /* tokens, as KVF_BLOCK of backend/backend.h */
#define KVF_DIGEST_GROUP 64  /* tokens that share lo and step */

typedef enum kvf_digest_kind {
    KVF_DIGEST_NONE = 0,
    KVF_DIGEST_BITS = 1,
    KVF_DIGEST_MEAN = 2,
    KVF_DIGEST_BOUNDS = 3,
    KVF_DIGEST_REPS = 4
} kvf_digest_kind;

typedef struct kvf_digest {
    kvf_digest_kind kind;
    int32_t bits;            /* BITS: 1, 2 or 4 */
    int32_t sub;             /* MEAN, BOUNDS, REPS: tokens of one vector, a power of two, 4..128 */
    bool reps_per_q_head;    /* REPS */
    int32_t n_head, n_head_kv, head_dim; /* head_dim a multiple of 8 */
} kvf_digest;

/* Bytes of one block's digest of one KV head; a multiple of 64 is not promised. */
static inline size_t kvf_digest_head_bytes(const kvf_digest *g)
{
    size_t d = (size_t)g->head_dim, block = KVF_DIGEST_BLOCK;
    switch (g->kind) {
    case KVF_DIGEST_BITS:
        return block / KVF_DIGEST_GROUP * (4 * d + KVF_DIGEST_GROUP * d * (size_t)g->bits / 8);
    case KVF_DIGEST_MEAN: return block / (size_t)g->sub * d * 2;
    case KVF_DIGEST_BOUNDS: return block / (size_t)g->sub * d * 4;
    case KVF_DIGEST_REPS:
        return block / (size_t)g->sub * d * 4 * (size_t)(g->reps_per_q_head ? g->n_head / g->n_head_kv : 1);
    case KVF_DIGEST_NONE: break;
    }
    return 0;
}

static inline size_t kvf_digest_bytes(const kvf_digest *g)
{
    return g->kind == KVF_DIGEST_NONE ? 0 : kvf_digest_head_bytes(g) * (size_t)g->n_head_kv;
}

/* Where the code of token t (0..63 of its group) and channel c lies within the group's codes: byte
 * *at, first bit *bit. One 64-byte row holds 16 tokens x 4 channels x (8 / bits) channel quads: byte
 * (t % 16) * 4 + c % 4 of row (t / 16) * rows + (c / 4) / per, per = 8 / bits, rows = rows of 16
 * tokens = ceil(head_dim / 4 / per); the quad (c / 4) % per within the byte, low bits first. So one
 * vector load, shifts and a mask give 16 tokens x 4 channels of bytes, as VPDPBUSD wants them.
 * head_dim is padded with zero codes to whole rows when head_dim * bits is no multiple of 32; a
 * head_dim that would need padding is refused for BITS (kvf_digest_valid). */
static inline void kvf_digest_code_at(const kvf_digest *g, int32_t t, int32_t c, size_t *at, int32_t *bit)
{
    int32_t per = 8 / g->bits, rows = g->head_dim / 4 / per, quad = c / 4;
    *at = (size_t)((t / 16 * rows + quad / per) * 64 + t % 16 * 4 + c % 4);
    *bit = quad % per * g->bits;
}

static inline bool kvf_digest_valid(const kvf_digest *g)
{
    if (g->kind == KVF_DIGEST_NONE) return true;
    bool pow2 = g->sub > 0 && (g->sub & (g->sub - 1)) == 0;
    if (g->n_head < 1 || g->n_head_kv < 1 || g->n_head % g->n_head_kv || g->head_dim < 8 || g->head_dim % 8)
        return false;
    switch (g->kind) {
    case KVF_DIGEST_BITS:
        return (g->bits == 1 || g->bits == 2 || g->bits == 4) && g->head_dim % (32 / g->bits) == 0;
    case KVF_DIGEST_MEAN:
    case KVF_DIGEST_BOUNDS:
    case KVF_DIGEST_REPS: return pow2 && g->sub >= 4 && g->sub <= KVF_DIGEST_BLOCK;
    case KVF_DIGEST_NONE: break;
    }
    return false;
}

/* ---- Votes ------------------------------------------------------------------------------ */

/* How the scores s (scaled by 1 / sqrt(d) or the model's scale) of one query and head become a vote. */
typedef enum kvf_vote_kind {
    KVF_VOTE_LIN = 0, /* s itself */
    KVF_VOTE_SOFT = 1, /* exp(s_j) / sum_j exp(s_j) over the units */
    KVF_VOTE_GATE = 2 /* exp(s_j) / (exp(lse) + sum_j exp(s_j)), lse of what that head reads anyway */
} kvf_vote_kind;

typedef struct kvf_vote_rule {
    kvf_vote_kind kind;
    bool max_queries;  /* over the chunk's queries: maximum, else mean */
    bool per_kv_head;  /* one vote per KV head (its query heads summed), else one for all heads */
    int32_t pool;      /* >= 1: average this many consecutive queries (and their lse) to one first */
} kvf_vote_rule;

#endif
