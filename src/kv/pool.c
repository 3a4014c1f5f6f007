/* pool.c - see pool.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "kv/pool.h"

struct kvf_pool {
    kvf_backend *backend;
    kvf_kv_view view;
    void **slab;      /* [cap_slab], also view.slab; the table may move between ops, slabs do not */
    int32_t *refs;    /* [cap] references of each slot */
    int32_t *free;    /* [cap] stack of slots given back */
    int64_t cap_slab, cap_refs, cap_free; /* grow with use: a context of 10^9 tokens costs nothing empty */
    int64_t n_free, n_fresh, n_used; /* n_fresh: slots handed out at least once */
    int64_t max_slots;
};

/* Slabs of about 4 MiB: few allocations for a long text, little waste for a short one. */
static int32_t slab_shift(size_t slot_bytes)
{
    int32_t shift = 0;
    while (shift < 8 && (slot_bytes << (shift + 1)) <= ((size_t)4 << 20)) shift++;
    return shift;
}

kvf_status kvf_pool_open(kvf_pool **out, const kvf_pool_params *p, kvf_error *err)
{
    *out = NULL;
    const kvf_mem *mem = p->backend->mem;
    void *block;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_pool), err));
    kvf_pool *pool = block;
    pool->backend = p->backend;
    size_t slot_bytes = (size_t)2 * (size_t)p->n_head_kv * KVF_BLOCK * (size_t)p->head_dim * 2;
    pool->view.slot_bytes = slot_bytes;
    pool->view.shift = slab_shift(slot_bytes);
    pool->max_slots = p->max_slots < INT32_MAX ? p->max_slots : INT32_MAX;
    if (p->budget_bytes > 0 && (int64_t)(p->budget_bytes / slot_bytes) < pool->max_slots)
        pool->max_slots = (int64_t)(p->budget_bytes / slot_bytes);
    *out = pool;
    return KVF_OK;
}

void kvf_pool_close(kvf_pool *pool)
{
    if (!pool) return;
    const kvf_mem *mem = pool->backend->mem;
    for (int64_t i = 0; pool->slab && i < pool->cap_slab; i++)
        pool->backend->ops->release(pool->backend, pool->slab[i]);
    kvf_free(mem, pool->slab);
    kvf_free(mem, pool->refs);
    kvf_free(mem, pool->free);
    kvf_free(mem, pool);
}

kvf_status kvf_pool_can_take(const kvf_pool *pool, int64_t n, kvf_error *err)
{
    int64_t room = pool->max_slots - pool->n_used;
    if (n <= room) return KVF_OK;
    return kvf_fail(err, KVF_ERR_LIMIT,
                    "the KV cache is full: %lld more blocks of %zu bytes needed, %lld left of %lld; raise kv_bytes "
                    "or shorten the text", (long long)n, pool->view.slot_bytes, (long long)room,
                    (long long)pool->max_slots);
}

/* A slot never used before, in a slab that may have to be made. */
static kvf_status take_fresh(kvf_pool *pool, int32_t *slot, kvf_error *err)
{
    KVF_TRY(kvf_pool_can_take(pool, 1, err));
    int64_t i = pool->n_fresh, slab = i >> pool->view.shift;
    const kvf_mem *mem = pool->backend->mem;
    void *table = pool->slab, *refs = pool->refs, *stack = pool->free;
    kvf_status rc = kvf_reserve(mem, &table, &pool->cap_slab, slab + 1, sizeof(void *), err);
    pool->slab = table;
    pool->view.slab = pool->slab;
    if (rc >= 0) rc = kvf_reserve(mem, &refs, &pool->cap_refs, i + 1, sizeof(int32_t), err);
    pool->refs = refs;
    if (rc >= 0) rc = kvf_reserve(mem, &stack, &pool->cap_free, i + 1, sizeof(int32_t), err);
    pool->free = stack;
    if (rc >= 0 && !pool->slab[slab]) {
        /* The last slab may stick out over the budget: take only what it may hold. */
        int64_t first = slab << pool->view.shift, n = (int64_t)1 << pool->view.shift;
        if (first + n > pool->max_slots) n = pool->max_slots - first;
        rc = pool->backend->ops->alloc(pool->backend, &pool->slab[slab], (size_t)n * pool->view.slot_bytes, err);
    }
    if (rc < 0) return rc;
    *slot = (int32_t)i;
    pool->n_fresh++;
    return KVF_OK;
}

kvf_status kvf_pool_take(kvf_pool *pool, int32_t *slot, kvf_error *err)
{
    if (pool->n_free > 0) {
        *slot = pool->free[--pool->n_free];
    } else {
        KVF_TRY(take_fresh(pool, slot, err));
    }
    pool->refs[*slot] = 1;
    pool->n_used++;
    return KVF_OK;
}

void kvf_pool_ref(kvf_pool *pool, int32_t slot) { pool->refs[slot]++; }

void kvf_pool_unref(kvf_pool *pool, int32_t slot)
{
    if (--pool->refs[slot] > 0) return;
    pool->free[pool->n_free++] = slot;
    pool->n_used--;
}

int32_t kvf_pool_refs(const kvf_pool *pool, int32_t slot) { return pool->refs[slot]; }
kvf_backend *kvf_pool_backend(const kvf_pool *pool) { return pool->backend; }
const kvf_kv_view *kvf_pool_view(const kvf_pool *pool) { return &pool->view; }
int64_t kvf_pool_max(const kvf_pool *pool) { return pool->max_slots; }
int64_t kvf_pool_used(const kvf_pool *pool) { return pool->n_used; }
size_t kvf_pool_slot_bytes(const kvf_pool *pool) { return pool->view.slot_bytes; }
