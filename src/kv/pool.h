/* pool.h - slots of KV memory: each holds one block (KVF_BLOCK tokens) of one layer.
 *
 * Slots come in slabs that never move, so slot tables stay valid while the pool grows.
 * A slot is reference-counted: sequences that share a prefix share its slots. The pool never holds
 * more bytes than its budget.
 *
 * One thread at a time.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_KV_POOL_H
#define KVF_KV_POOL_H

#include "backend/backend.h"

typedef struct kvf_pool kvf_pool;

typedef struct kvf_pool_params {
    kvf_backend *backend; /* borrowed */
    int32_t n_head_kv, head_dim;
    int64_t max_slots;    /* capacity if memory allows, >= 1 */
    size_t budget_bytes;  /* 0: none beyond max_slots */
} kvf_pool_params;

kvf_status kvf_pool_open(kvf_pool **out, const kvf_pool_params *p, kvf_error *err);
void kvf_pool_close(kvf_pool *pool);

/* A slot with one reference; its content is undefined. Errors: LIMIT (budget or capacity), NOMEM. */
kvf_status kvf_pool_take(kvf_pool *pool, int32_t *slot, kvf_error *err);
void kvf_pool_ref(kvf_pool *pool, int32_t slot);
void kvf_pool_unref(kvf_pool *pool, int32_t slot);
int32_t kvf_pool_refs(const kvf_pool *pool, int32_t slot);

/* LIMIT if fewer than n slots can still be taken within capacity and budget. Allocates nothing. */
kvf_status kvf_pool_can_take(const kvf_pool *pool, int64_t n, kvf_error *err);

kvf_backend *kvf_pool_backend(const kvf_pool *pool);
const kvf_kv_view *kvf_pool_view(const kvf_pool *pool);
int64_t kvf_pool_max(const kvf_pool *pool);  /* slots within capacity and budget */
int64_t kvf_pool_used(const kvf_pool *pool); /* slots */
size_t kvf_pool_slot_bytes(const kvf_pool *pool);

#endif
