/* attn_int.h - what the attention kernels of every level share: which keys a query sees, where
 * a block's rows lie, where a result goes; and how their register tiles are spelt.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_ATTN_INT_H
#define KVF_BACKEND_CPU_ATTN_INT_H

#include <string.h>

#include "backend/cpu/cpu_ops.h"
#include "base/unroll.h"

#define KVF_INLINE static inline __attribute__((always_inline))

/* Keys first <= j < end of the list; empty if first >= end. */
typedef struct kvf_key_range {
    int64_t first, end;
} kvf_key_range;

/* The keys of key0..key1 that query `tok` (place in the call) sees. Both ends rise with tok. */
static inline kvf_key_range kvf_attn_visible(const kvf_attn_part *p, int64_t tok)
{
    const kvf_attn_args *a = p->a;
    int64_t last = a->place ? a->place[tok] : a->q_first + tok;
    kvf_key_range r = { p->key0, p->key1 < a->n_key ? p->key1 : a->n_key };
    if (last < r.end) r.end = last + 1;
    if (a->window > 0 && last - a->window + 1 > r.first) r.first = last - a->window + 1;
    if (a->first && a->first[tok] > r.first) r.first = a->first[tok];
    return r;
}

/* The places of block b of the list that are no hole; first <= end. The list's end (n_key) cuts none. */
static inline kvf_key_range kvf_attn_valid(const kvf_attn_args *a, int64_t b)
{
    kvf_key_range r = { 0, KVF_BLOCK };
    if (!a->valid) return r;
    r.first = a->valid[2 * b];
    r.end = a->valid[2 * b + 1] > r.first ? a->valid[2 * b + 1] : r.first;
    return r;
}

static inline int32_t kvf_attn_group(const kvf_attn_args *a) { return a->n_head / a->n_head_kv; }

/* [KVF_BLOCK][head_dim] keys of block b of the list; the values follow n_head_kv heads later. */
static inline const kvf_f16 *kvf_attn_k(const kvf_attn_args *a, int32_t head_kv, int64_t b)
{
    const kvf_f16 *slot = kvf_kv_slot(a->kv, a->slots[b]);
    return slot + (size_t)head_kv * KVF_BLOCK * (size_t)a->head_dim;
}

static inline const kvf_f16 *kvf_attn_v(const kvf_attn_args *a, int32_t head_kv, int64_t b)
{
    return kvf_attn_k(a, head_kv, b) + (size_t)a->n_head_kv * KVF_BLOCK * (size_t)a->head_dim;
}

/* Query row of head g of the group, [head_dim]. */
static inline const float *kvf_attn_q(const kvf_attn_part *p, int64_t tok, int32_t g)
{
    const kvf_attn_args *a = p->a;
    int64_t head = (int64_t)p->head_kv * kvf_attn_group(a) + g;
    return a->q + (tok * a->n_head + head) * a->head_dim;
}

/* Where o and lse (NULL: not asked for) of that row go: the call's arrays, or this split's. */
static inline float *kvf_attn_o(const kvf_attn_part *p, int64_t tok, int32_t g)
{
    const kvf_attn_args *a = p->a;
    int64_t group = kvf_attn_group(a);
    if (p->o) return p->o + ((tok - p->tok0) * group + g) * a->head_dim;
    return a->o + (tok * a->n_head + p->head_kv * group + g) * a->head_dim;
}

static inline float *kvf_attn_lse(const kvf_attn_part *p, int64_t tok, int32_t g)
{
    const kvf_attn_args *a = p->a;
    int64_t group = kvf_attn_group(a);
    if (p->o) return p->lse + (tok - p->tok0) * group + g;
    return a->lse ? a->lse + tok * a->n_head + p->head_kv * group + g : NULL;
}

enum { KVF_BLOCK_RUNS = KVF_BLOCK / KVF_ATTN_RUN };

/* Sums of head g of the group (kvf_attn_args.runs), of the whole list; a split fills those of its keys, by its
 * own lse. */
static inline float *kvf_attn_runs(const kvf_attn_args *a, int32_t head_kv, int64_t g)
{
    int64_t entries = (a->n_key + KVF_BLOCK - 1) / KVF_BLOCK;
    return a->runs + (head_kv * kvf_attn_group(a) + g) * entries * KVF_BLOCK_RUNS;
}

#endif
