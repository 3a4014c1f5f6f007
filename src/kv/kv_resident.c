/* kv_resident.c - which blocks of a sequence with a memory are in the pool, and the rotated copies of its
 * window.
 *
 * A block that the tier holds unchanged may leave the pool at any time: such blocks stand in a list by
 * last use, and the least recently used one makes room (the paper's cache is the same; its frequency
 * rule resets what is selected again, infllm_lazyllm.md 1.7). Blocks used by the call at hand never
 * leave. Rotated copies are a function of the raw block and its position, so they are made again when
 * the sequence is cut back or loaded.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "kv/kv_int.h"

#define OWNER(layer, block) ((int64_t)(layer) << 40 | (block))

/* ---- Opening ----------------------------------------------------------------------------- */

static kvf_status check_memory(const kvf_kv *kv, const kvf_memory *m, kvf_error *err)
{
    kvf_digest g[2] = { m->coarse, m->fine };
    for (int i = 0; i < 2; i++)
        if (!kvf_digest_valid(&g[i]))
            return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                            "keys of %d channels cannot be digested as this policy asks; choose select=mean",
                            kv->dims.head_dim);
    /* A unit may be chosen as soon as it is older than the window; its block must be whole by then. */
    bool votes = m->coarse.kind != KVF_DIGEST_NONE || m->fine.kind != KVF_DIGEST_NONE;
    if (votes && m->window < KVF_BLOCK)
        return kvf_fail(err, KVF_ERR_ARG, "a window of %lld tokens is shorter than a block; use at least %d",
                        (long long)m->window, KVF_BLOCK);
    bool unit_ok = m->unit >= 16 && m->unit <= KVF_BLOCK && (m->unit & (m->unit - 1)) == 0;
    if (!unit_ok || m->init < 0 || m->init % m->unit || m->window < 1 || m->n_set < 1 || m->n_chunk > m->window)
        return kvf_fail(err, KVF_ERR_INTERNAL, "a memory of unit %d, init %lld, window %lld", m->unit,
                        (long long)m->init, (long long)m->window);
    return KVF_OK;
}

kvf_status kvf_far_open(kvf_kv *kv, const kvf_kv_memory_params *p, kvf_error *err)
{
    KVF_TRY(check_memory(kv, &p->memory, err));
    const kvf_mem *mem = kvf_kv_mem(kv);
    void *block;
    size_t n_layer = (size_t)kv->dims.n_layer;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_far), err));
    kvf_far *f = kv->far = block;
    f->m = p->memory;
    f->rope[0] = p->rope[0];
    f->rope[1] = p->rope[1];
    f->index_open = p->index_open;
    f->layer0 = p->layer0;
    f->oldest = f->newest = NO_SLOT;
    f->reps = f->m.coarse.kind == KVF_DIGEST_REPS;
    f->coarse_bytes = kvf_digest_bytes(&f->m.coarse);
    f->fine_bytes = f->reps ? 0 : kvf_digest_bytes(&f->m.fine);
    KVF_TRY(kvf_mem_get(mem, &block, n_layer, sizeof(int32_t), err));
    f->layer_window = block;
    if (p->layer_window) memcpy(f->layer_window, p->layer_window, n_layer * sizeof(int32_t));
    KVF_TRY(kvf_mem_get(mem, &block, n_layer, sizeof *f->coarse, err));
    f->coarse = block;
    KVF_TRY(kvf_mem_get(mem, &block, n_layer, sizeof *f->coarse_gap, err));
    f->coarse_gap = block;
    if (p->sparse) return kvf_sparse_open(kv, err);
    if (!f->m.index[0]) return KVF_OK;
    KVF_TRY(kvf_mem_get(mem, &block, n_layer, sizeof *f->index, err));
    f->index = block;
    if (!f->index_open)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "this build has no index '%s'; use index=flat", f->m.index);
    int32_t heads = f->reps && f->m.coarse.reps_per_q_head ? kv->dims.n_head : kv->dims.n_head_kv;
    for (size_t l = 0; l < n_layer; l++)
        KVF_TRY(f->index_open(&f->index[l], f->m.index, heads * kv->dims.head_dim, mem, err));
    return KVF_OK;
}

static void release_backend(kvf_kv *kv, float *memory)
{
    if (memory) kv->backend->ops->release(kv->backend, memory);
}

void kvf_far_close(kvf_kv *kv)
{
    release_backend(kv, kv->mass_lse);
    kvf_far *f = kv->far;
    if (!f) return;
    const kvf_mem *mem = kvf_kv_mem(kv);
    kvf_sparse_close(kv);
    kvf_far_digest_close(kv);
    kvf_share_close(kv);
    kvf_stream_close(kv);
    release_backend(kv, f->cos_sin[0]);
    release_backend(kv, f->cos_sin[1]);
    release_backend(kv, f->o2);
    release_backend(kv, f->lse);
    release_backend(kv, f->lse2);
    void *own[] = { f->layer_window, f->turned, f->older, f->newer, f->owner, f->tick, f->early, f->list.slots,
                    f->list.valid, f->list.blocks, f->use, f->vote, f->landing };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) kvf_free(mem, own[i]);
    kvf_free(mem, f);
    kv->far = NULL;
}

kvf_status kvf_far_fork(kvf_kv *to, const kvf_kv *from, kvf_error *err)
{
    const kvf_far *f = from->far;
    kvf_kv_memory_params p = { .memory = f->m, .rope = { f->rope[0], f->rope[1] },
                               .layer_window = f->layer_window, .index_open = f->index_open, .layer0 = f->layer0 };
    KVF_TRY(kvf_far_open(to, &p, err));
    to->far->tier = f->tier;
    to->far->n_tier = f->n_tier;
    to->far->epoch = f->epoch;
    KVF_TRY(kvf_kv_share(to, kvf_share_percent(from), err));
    return kvf_far_digest_fork(to, from, err);
}

/* ---- Least recently used ----------------------------------------------------------------- */

static bool in_list(const kvf_far *f, int32_t slot) { return slot >= 0 && slot < f->cap_lru && f->owner[slot] >= 0; }

static void unlink_slot(kvf_far *f, int32_t slot)
{
    int32_t a = f->older[slot], b = f->newer[slot];
    if (a == NO_SLOT)
        f->oldest = b;
    else
        f->newer[a] = b;
    if (b == NO_SLOT)
        f->newest = a;
    else
        f->older[b] = a;
    f->owner[slot] = -1;
}

void kvf_far_lru_remove(kvf_kv *kv, int32_t slot)
{
    if (!in_list(kv->far, slot)) return;
    kv->far->early[slot] = 0;
    unlink_slot(kv->far, slot);
}

static kvf_status grow_lru(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    if (n <= f->cap_lru) return KVF_OK;
    const kvf_mem *mem = kvf_kv_mem(kv);
    void *older = f->older, *newer = f->newer, *owner = f->owner, *tick = f->tick, *early = f->early;
    int64_t cap = f->cap_lru, was = f->cap_lru, want = n < 256 ? 256 : n + n / 2;
    kvf_status rc = kvf_reserve(mem, &older, &cap, want, sizeof(int32_t), err);
    f->older = older;
    cap = was;
    if (rc >= 0) rc = kvf_reserve(mem, &newer, &cap, want, sizeof(int32_t), err);
    f->newer = newer;
    cap = was;
    if (rc >= 0) rc = kvf_reserve(mem, &owner, &cap, want, sizeof(int64_t), err);
    f->owner = owner;
    cap = was;
    if (rc >= 0) rc = kvf_reserve(mem, &tick, &cap, want, sizeof(int64_t), err);
    f->tick = tick;
    cap = was;
    if (rc >= 0) rc = kvf_reserve(mem, &early, &cap, want, 1, err);
    f->early = early;
    if (rc < 0) return rc;
    for (int64_t i = was; i < want; i++) f->owner[i] = -1;
    f->cap_lru = want;
    return KVF_OK;
}

/* Newest in the list. */
static kvf_status use_slot(kvf_kv *kv, int32_t slot, int64_t owner, kvf_error *err)
{
    kvf_far *f = kv->far;
    KVF_TRY(grow_lru(kv, (int64_t)slot + 1, err));
    if (in_list(f, slot)) unlink_slot(f, slot);
    f->owner[slot] = owner;
    f->tick[slot] = f->now;
    f->newer[slot] = NO_SLOT;
    f->older[slot] = f->newest;
    if (f->newest == NO_SLOT)
        f->oldest = slot;
    else
        f->newer[f->newest] = slot;
    f->newest = slot;
    return KVF_OK;
}

/* The least recently used block of this sequence leaves. false: none may. */
static bool evict(kvf_kv *kv)
{
    kvf_far *f = kv->far;
    for (int32_t slot = f->oldest; slot != NO_SLOT; slot = f->newer[slot]) {
        if (f->tick[slot] == f->now) return false; /* and so are all newer ones */
        if (kvf_pool_refs(kv->pool, slot) > 1) continue;
        int64_t owner = f->owner[slot];
        f->early[slot] = 0;
        unlink_slot(f, slot);
        kvf_layer_slots(kv, (int32_t)(owner >> 40))[owner & (((int64_t)1 << 40) - 1)] = NO_SLOT;
        kvf_pool_unref(kv->pool, slot);
        return true;
    }
    return false;
}

kvf_status kvf_far_take(kvf_kv *kv, int32_t *slot, kvf_error *err)
{
    if (kvf_pool_can_take(kv->pool, 1, NULL) < 0) evict(kv);
    kvf_status rc = kvf_pool_take(kv->pool, slot, err);
    /* The device has less than the pool may take: then the pool is as large as it is. */
    return rc == KVF_ERR_NOMEM && evict(kv) ? kvf_pool_take(kv->pool, slot, err) : rc;
}

kvf_status kvf_far_can_take(const kvf_kv *kv, int64_t n, kvf_error *err)
{
    const kvf_far *f = kv->far;
    int64_t more = 0;
    if (kvf_pool_can_take(kv->pool, n, NULL) >= 0) return KVF_OK;
    for (int32_t slot = f->oldest; slot != NO_SLOT && more < n; slot = f->newer[slot])
        if (f->tick[slot] != f->now && kvf_pool_refs(kv->pool, slot) == 1) more++;
    return kvf_pool_can_take(kv->pool, n - more, err);
}

static bool clean(const kvf_far *f, int64_t block)
{
    return f->tier && block < kvf_blocks_for(f->n_tier);
}

/* A device's slot is written by a copy of its own, which goes on while the next block is read. */
static kvf_status read_tier(kvf_kv *kv, int32_t layer, int64_t block, void *slot, kvf_error *err)
{
    kvf_far *f = kv->far;
    kvf_backend *be = kv->backend;
    if (be->ops->host_memory) return f->tier->ops->read(f->tier, layer, block, slot, err);
    if (kvf_stream_serves(kv)) {
        KVF_TRY(kvf_stream_bring(kv, layer, block, slot, err));
        return kvf_stream_settle(kv, err);
    }
    size_t bytes = kvf_pool_slot_bytes(kv->pool);
    if (!f->landing) KVF_TRY(kvf_mem_get(be->mem, &f->landing, bytes, 1, err));
    KVF_TRY(f->tier->ops->read(f->tier, layer, block, f->landing, err));
    return be->ops->upload(be, slot, f->landing, bytes, err);
}

kvf_status kvf_far_fetch(kvf_kv *kv, int32_t layer, int64_t block, bool *missed, kvf_error *err)
{
    kvf_far *f = kv->far;
    int32_t *slot = &kvf_layer_slots(kv, layer)[block];
    if (missed) *missed = *slot == NO_SLOT;
    if (missed && in_list(f, *slot) && f->early[*slot]) {
        f->early[*slot] = 0;
        kv->count.n_far_early++;
    }
    if (*slot == NO_SLOT) {
        if (!clean(f, block))
            return kvf_fail(err, KVF_ERR_INTERNAL, "block %lld of layer %d is nowhere", (long long)block, layer);
        int32_t fresh;
        KVF_TRY(kvf_far_take(kv, &fresh, err));
        void *dst = kvf_kv_slot(kvf_pool_view(kv->pool), fresh);
        kvf_status rc = read_tier(kv, layer, block, dst, err);
        if (rc < 0) {
            kvf_pool_unref(kv->pool, fresh);
            return rc;
        }
        *slot = fresh;
        kv->count.n_moved++;
    }
    return clean(f, block) ? use_slot(kv, *slot, OWNER(layer, block), err) : KVF_OK;
}

kvf_status kvf_far_send_for(kvf_kv *kv, int32_t layer, const int64_t *blocks, int64_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    int32_t *slots = kvf_layer_slots(kv, layer);
    for (int64_t i = 0; i < n; i++)
        if (blocks[i] < kv->n_block && clean(f, blocks[i]) && slots[blocks[i]] != NO_SLOT)
            KVF_TRY(use_slot(kv, slots[blocks[i]], OWNER(layer, blocks[i]), err));
    for (int64_t i = 0; i < n; i++) {
        int64_t b = blocks[i];
        int32_t fresh;
        if (b >= kv->n_block || !clean(f, b) || slots[b] != NO_SLOT) continue;
        if (kvf_pool_can_take(kv->pool, 1, NULL) < 0 && !evict(kv)) return KVF_OK;
        if (kvf_far_take(kv, &fresh, NULL) < 0) return KVF_OK; /* whoever needs it will say so */
        kvf_status rc = kvf_stream_bring(kv, layer, b, kvf_kv_slot(kvf_pool_view(kv->pool), fresh), err);
        if (rc >= 0) rc = use_slot(kv, fresh, OWNER(layer, b), err);
        if (rc < 0) {
            kvf_stream_settle(kv, NULL); /* before another uses the slot */
            kvf_pool_unref(kv->pool, fresh);
            return rc;
        }
        slots[b] = fresh;
        f->early[fresh] = 1;
        kv->count.n_far_ahead++;
        kv->count.n_moved++;
    }
    return KVF_OK;
}

void kvf_far_release_clean(kvf_kv *kv, int64_t from, int64_t to)
{
    for (int64_t b = from; b < to; b++) {
        for (int32_t l = 0; l < kv->dims.n_layer; l++) {
            int32_t slot = kvf_layer_slots(kv, l)[b];
            /* Without room for the list the block just stays. */
            if (slot != NO_SLOT && !in_list(kv->far, slot)) use_slot(kv, slot, OWNER(l, b), NULL);
        }
    }
}

void kvf_far_drop_block(kvf_kv *kv, int64_t block)
{
    kvf_stream_settle(kv, NULL); /* whoever gets the slots next writes them after the copies */
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        int32_t *raw = &kvf_layer_slots(kv, l)[block], *turned = &kvf_layer_turned(kv, l)[block];
        kvf_far_lru_remove(kv, *raw);
        if (*raw != NO_SLOT) kvf_pool_unref(kv->pool, *raw);
        if (*turned != NO_SLOT) kvf_pool_unref(kv->pool, *turned);
        *raw = *turned = NO_SLOT;
    }
}

/* ---- The window -------------------------------------------------------------------------- */

void kvf_far_drop_window(kvf_kv *kv)
{
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        int32_t *turned = kvf_layer_turned(kv, l);
        int64_t first = kvf_window_first(kv->far, l, kv->n_key) >> KVF_BLOCK_SHIFT;
        for (int64_t b = first - 1; b >= 0 && turned[b] != NO_SLOT; b--) {
            kvf_pool_unref(kv->pool, turned[b]);
            turned[b] = NO_SLOT;
        }
    }
}

/* Angles of positions first..first + n, or of n given ones, into cos_sin of both kinds of layers. */
static kvf_status make_angles(kvf_kv *kv, int64_t first, const int32_t *given, int64_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    if (n > f->cap_angle) {
        for (int i = 0; i < 2; i++) {
            release_backend(kv, f->cos_sin[i]);
            f->cos_sin[i] = NULL;
        }
        f->cap_angle = 0;
        for (int i = 0; i < 2; i++) {
            void *block;
            size_t width = (size_t)(f->rope[i].n_rot > 0 ? f->rope[i].n_rot : 2);
            KVF_TRY(kv->backend->ops->alloc(kv->backend, &block, (size_t)n * width * sizeof(float), err));
            f->cos_sin[i] = block;
        }
        f->cap_angle = n;
    }
    enum { STEP = 1024 };
    int32_t pos[STEP];
    for (int64_t at = 0; at < n; at += STEP) {
        int64_t m = n - at < STEP ? n - at : STEP;
        for (int64_t i = 0; i < m; i++) pos[i] = given ? given[at + i] : (int32_t)(first + at + i);
        for (int i = 0; i < 2; i++) {
            const kvf_kv_rope *r = &f->rope[i];
            if (r->n_rot == 0) continue;
            kvf_rope_table_args a = { .pos = pos, .inv_freq = r->inv_freq, .n_tok = m, .n_rot = r->n_rot,
                                      .mscale = r->mscale, .cos_sin = f->cos_sin[i] + at * r->n_rot };
            KVF_TRY(kv->backend->ops->rope_table(kv->backend, &a, err));
        }
    }
    return KVF_OK;
}

/* Make the copy of one block that has none. first: position of row 0 of cos_sin. */
static kvf_status turn_block(kvf_kv *kv, int32_t layer, int64_t block, int64_t first, kvf_error *err)
{
    kvf_far *f = kv->far;
    int32_t *turned = kvf_layer_turned(kv, layer);
    KVF_TRY(kvf_far_fetch(kv, layer, block, NULL, err));
    KVF_TRY(kvf_far_take(kv, &turned[block], err));
    int64_t at = block << KVF_BLOCK_SHIFT, n = kv->n_key - at < KVF_BLOCK ? kv->n_key - at : KVF_BLOCK;
    const kvf_kv_rope *r = &f->rope[f->layer_window[layer] > 0];
    kvf_kv_turn_args a = { .kv = kvf_pool_view(kv->pool), .src = kvf_layer_slots(kv, layer), .dst = turned,
                           .first = at, .n_tok = n, .n_head_kv = kv->dims.n_head_kv,
                           .head_dim = kv->dims.head_dim, .n_rot = r->n_rot,
                           .cos_sin = f->cos_sin[f->layer_window[layer] > 0] + (at - first) * r->n_rot,
                           .kind = r->kind };
    kvf_status rc = kv->backend->ops->kv_turn(kv->backend, &a, err);
    if (rc >= 0) return rc;
    kvf_pool_unref(kv->pool, turned[block]);
    turned[block] = NO_SLOT;
    return rc;
}

/* Copies that a query at n_key needs and that are not there: after a cut or a load. */
static kvf_status restore_window(kvf_kv *kv, kvf_error *err)
{
    int64_t first = -1, end = kvf_blocks_for(kv->n_key);
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        int64_t b = kvf_window_first(kv->far, l, kv->n_key) >> KVF_BLOCK_SHIFT;
        for (; b < end && (first < 0 || b < first); b++)
            if (kvf_layer_turned(kv, l)[b] == NO_SLOT) first = b;
    }
    if (first < 0) return KVF_OK;
    KVF_TRY(make_angles(kv, first << KVF_BLOCK_SHIFT, NULL, kv->n_key - (first << KVF_BLOCK_SHIFT), err));
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        int64_t b = kvf_window_first(kv->far, l, kv->n_key) >> KVF_BLOCK_SHIFT;
        kv->far->now++; /* raw blocks of the layers before may make room */
        for (; b < end; b++)
            if (kvf_layer_turned(kv, l)[b] == NO_SLOT)
                KVF_TRY(turn_block(kv, l, b, first << KVF_BLOCK_SHIFT, err));
    }
    return KVF_OK;
}

kvf_status kvf_far_prepare(kvf_kv *kv, int64_t n_tok, kvf_error *err)
{
    kvf_far *f = kv->far;
    f->now++;
    if (f->sparse) {
        KVF_TRY(kvf_sparse_prepare(kv, n_tok, err));
        return make_angles(kv, 0, f->sparse->pos + kv->n_key, n_tok, err);
    }
    kvf_far_score_drop(kv);
    KVF_TRY(kvf_stream_settle(kv, err));
    KVF_TRY(restore_window(kv, err));
    if (kv->n_key & (KVF_BLOCK - 1)) {
        /* The last block will be written: it must be here, and is no longer what the tier has. */
        int64_t tail = kv->n_key >> KVF_BLOCK_SHIFT;
        for (int32_t l = 0; l < kv->dims.n_layer; l++) KVF_TRY(kvf_far_fetch(kv, l, tail, NULL, err));
        if (f->n_tier > tail << KVF_BLOCK_SHIFT) {
            f->n_tier = tail << KVF_BLOCK_SHIFT;
            for (int32_t l = 0; l < kv->dims.n_layer; l++) kvf_far_lru_remove(kv, kvf_layer_slots(kv, l)[tail]);
        }
    }
    f->now++; /* what restoring used may make room */
    return make_angles(kv, kv->n_key, NULL, n_tok, err);
}
