/* kv.c - see kv.h. All layers hold the same tokens, so one block count serves all of them.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "kv/kv.h"

#include <string.h>

struct kvf_kv {
    kvf_pool *pool;
    kvf_backend *backend;
    kvf_dims dims;
    int64_t n_key;    /* committed tokens */
    int64_t n_block;  /* slots per layer, committed and reserved */
    int64_t cap_block;
    int32_t *slots;   /* [n_layer][cap_block] */
    uint8_t *use;     /* [cap_block] the policy's answer */
    int32_t *chosen;  /* [cap_block] slots of the blocks it chose */
    int64_t n_block_read, n_block_seen;
};

static int64_t blocks_for(int64_t n_tok) { return (n_tok + KVF_BLOCK - 1) >> KVF_BLOCK_SHIFT; }

static int32_t *layer_slots(const kvf_kv *kv, int32_t layer) { return kv->slots + layer * kv->cap_block; }

static const kvf_mem *mem_of(const kvf_kv *kv) { return kv->backend->mem; }

kvf_status kvf_kv_open(kvf_kv **out, kvf_pool *pool, kvf_dims dims, kvf_error *err)
{
    *out = NULL;
    kvf_backend *backend = kvf_pool_backend(pool);
    void *block;
    KVF_TRY(kvf_mem_get(backend->mem, &block, 1, sizeof(kvf_kv), err));
    kvf_kv *kv = block;
    kv->pool = pool;
    kv->backend = backend;
    kv->dims = dims;
    *out = kv;
    return KVF_OK;
}

void kvf_kv_close(kvf_kv *kv)
{
    if (!kv) return;
    kvf_kv_truncate(kv, 0);
    kvf_free(mem_of(kv), kv->slots);
    kvf_free(mem_of(kv), kv->use);
    kvf_free(mem_of(kv), kv->chosen);
    kvf_free(mem_of(kv), kv);
}

/* Room for n blocks per layer in the tables. Tables are replaced together or not at all. */
static kvf_status grow_tables(kvf_kv *kv, int64_t n, kvf_error *err)
{
    if (n <= kv->cap_block) return KVF_OK;
    int64_t cap = kv->cap_block + kv->cap_block / 2;
    if (cap < n) cap = n;
    if (cap < 16) cap = 16;
    const kvf_mem *mem = mem_of(kv);
    void *slots = NULL, *use = NULL, *chosen = NULL;
    kvf_status rc = kvf_mem_get(mem, &slots, (size_t)cap * (size_t)kv->dims.n_layer, sizeof(int32_t), err);
    if (rc >= 0) rc = kvf_mem_get(mem, &use, (size_t)cap, 1, err);
    if (rc >= 0) rc = kvf_mem_get(mem, &chosen, (size_t)cap, sizeof(int32_t), err);
    if (rc < 0) {
        kvf_free(mem, slots);
        kvf_free(mem, use);
        return rc;
    }
    for (int32_t l = 0; kv->slots && l < kv->dims.n_layer; l++)
        memcpy((int32_t *)slots + l * cap, layer_slots(kv, l), (size_t)kv->n_block * sizeof(int32_t));
    kvf_free(mem, kv->slots);
    kvf_free(mem, kv->use);
    kvf_free(mem, kv->chosen);
    kv->slots = slots;
    kv->use = use;
    kv->chosen = chosen;
    kv->cap_block = cap;
    return KVF_OK;
}

kvf_status kvf_kv_fork(kvf_kv **out, const kvf_kv *kv, kvf_error *err)
{
    *out = NULL;
    kvf_kv *f;
    KVF_TRY(kvf_kv_open(&f, kv->pool, kv->dims, err));
    int64_t n = blocks_for(kv->n_key);
    kvf_status rc = grow_tables(f, n, err);
    if (rc < 0) {
        kvf_kv_close(f);
        return rc;
    }
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        for (int64_t b = 0; b < n; b++) {
            int32_t slot = layer_slots(kv, l)[b];
            kvf_pool_ref(kv->pool, slot);
            layer_slots(f, l)[b] = slot;
        }
    }
    f->n_block = n;
    f->n_key = kv->n_key;
    *out = f;
    return KVF_OK;
}

int64_t kvf_kv_len(const kvf_kv *kv) { return kv->n_key; }

/* Give back the slots of blocks n and later. */
static void drop_blocks(kvf_kv *kv, int64_t n)
{
    for (int32_t l = 0; kv->n_block > n && l < kv->dims.n_layer; l++)
        for (int64_t b = n; b < kv->n_block; b++) kvf_pool_unref(kv->pool, layer_slots(kv, l)[b]);
    if (kv->n_block > n) kv->n_block = n;
}

void kvf_kv_truncate(kvf_kv *kv, int64_t n)
{
    drop_blocks(kv, blocks_for(n));
    if (n < kv->n_key) kv->n_key = n;
}

/* A partly filled last block that another sequence also holds is copied before it is written. */
static kvf_status unshare_tail(kvf_kv *kv, kvf_error *err)
{
    if ((kv->n_key & (KVF_BLOCK - 1)) == 0) return KVF_OK;
    int64_t b = kv->n_key >> KVF_BLOCK_SHIFT;
    const kvf_kv_view *view = kvf_pool_view(kv->pool);
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        int32_t *slot = &layer_slots(kv, l)[b], fresh;
        if (kvf_pool_refs(kv->pool, *slot) == 1) continue;
        KVF_TRY(kvf_pool_take(kv->pool, &fresh, err));
        kvf_status rc = kv->backend->ops->copy(kv->backend, kvf_kv_slot(view, fresh), kvf_kv_slot(view, *slot),
                                               view->slot_bytes, err);
        if (rc < 0) {
            kvf_pool_unref(kv->pool, fresh);
            return rc;
        }
        kvf_pool_unref(kv->pool, *slot);
        *slot = fresh;
    }
    return KVF_OK;
}

kvf_status kvf_kv_reserve(kvf_kv *kv, int64_t n_tok, kvf_error *err)
{
    int64_t committed = blocks_for(kv->n_key), want = blocks_for(kv->n_key + n_tok);
    drop_blocks(kv, committed);
    KVF_TRY(kvf_pool_can_take(kv->pool, (want - committed) * kv->dims.n_layer, err));
    KVF_TRY(grow_tables(kv, want, err));
    KVF_TRY(unshare_tail(kv, err));
    for (int64_t b = committed; b < want; b++) {
        for (int32_t l = 0; l < kv->dims.n_layer; l++) {
            kvf_status rc = kvf_pool_take(kv->pool, &layer_slots(kv, l)[b], err);
            if (rc >= 0) continue;
            while (l-- > 0) kvf_pool_unref(kv->pool, layer_slots(kv, l)[b]);
            drop_blocks(kv, committed);
            return rc;
        }
        kv->n_block = b + 1;
    }
    return KVF_OK;
}

kvf_status kvf_kv_put(kvf_kv *kv, int32_t layer, const float *k, const float *v, int64_t n_tok, kvf_error *err)
{
    kvf_kv_put_args a = { .k = k, .v = v, .n_tok = n_tok, .n_head_kv = kv->dims.n_head_kv,
                          .head_dim = kv->dims.head_dim, .kv = kvf_pool_view(kv->pool),
                          .slots = layer_slots(kv, layer), .first = kv->n_key };
    return kv->backend->ops->kv_put(kv->backend, &a, err);
}

/* Ask the policy and list the chosen slots in order. *n_key: keys they hold, the chunk's included.
 * Blocks of the chunk itself are always in, which keeps "key j is visible to query i if
 * j <= q_first + i" right in the shortened list. */
static kvf_status choose(kvf_kv *kv, const kvf_kv_attend_args *a, const int32_t **slots, int64_t *n_key,
                         kvf_error *err)
{
    int64_t all = kv->n_key + a->n_tok, n_block = blocks_for(all), first_new = kv->n_key >> KVF_BLOCK_SHIFT;
    const int32_t *from = layer_slots(kv, a->layer);
    kv->n_block_seen += n_block;
    *slots = from;
    *n_key = all;
    if (!a->policy || !a->policy->ops->select) {
        kv->n_block_read += n_block;
        return KVF_OK;
    }
    kvf_select s = { a->layer, kv->n_key, a->n_tok, n_block };
    KVF_TRY(a->policy->ops->select(a->policy, &s, kv->use, err));
    int64_t n = 0;
    for (int64_t b = 0; b < n_block; b++)
        if (kv->use[b] || b >= first_new) kv->chosen[n++] = from[b];
    kv->n_block_read += n;
    *slots = kv->chosen;
    *n_key = all - (n_block - n) * KVF_BLOCK; /* only whole blocks are left out */
    return KVF_OK;
}

kvf_status kvf_kv_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    kvf_kv_attend_args layer = *a;
    /* In a shortened list places are not positions, so the layer's own window cannot be applied
     * there; a sliding-window layer reads little anyway and keeps its own rule. */
    if (a->window > 0) layer.policy = NULL;
    const int32_t *slots;
    int64_t n_key;
    KVF_TRY(choose(kv, &layer, &slots, &n_key, err));
    kvf_attn_args t = { .q = a->q, .o = a->o, .n_tok = a->n_q, .n_head = kv->dims.n_head,
                        .n_head_kv = kv->dims.n_head_kv, .head_dim = kv->dims.head_dim, .scale = a->scale,
                        .softcap = a->softcap, .kv = kvf_pool_view(kv->pool), .slots = slots, .n_key = n_key,
                        .q_first = n_key - a->n_q, .window = a->window };
    return kv->backend->ops->attn(kv->backend, &t, err);
}

void kvf_kv_commit(kvf_kv *kv, int64_t n_tok) { kv->n_key += n_tok; }

void kvf_kv_counters(const kvf_kv *kv, int64_t *n_block_read, int64_t *n_block_seen)
{
    *n_block_read = kv->n_block_read;
    *n_block_seen = kv->n_block_seen;
}
