/* kv.c - see kv.h. All layers hold the same tokens, so one block count serves all of them.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "kv/kv_int.h"

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

kvf_status kvf_kv_open_memory(kvf_kv **out, kvf_pool *pool, kvf_dims dims, const kvf_kv_memory_params *p,
                              kvf_error *err)
{
    kvf_kv *kv;
    KVF_TRY(kvf_kv_open(&kv, pool, dims, err));
    kvf_status rc = kvf_far_open(kv, p, err);
    if (rc < 0) {
        kvf_kv_close(kv);
        kv = NULL;
    }
    *out = kv;
    return rc;
}

const kvf_memory *kvf_kv_memory(const kvf_kv *kv) { return kv->far ? &kv->far->m : NULL; }

void kvf_kv_close(kvf_kv *kv)
{
    if (!kv) return;
    kvf_kv_truncate(kv, 0);
    kvf_order_release(kv);
    kvf_evict_release(kv);
    kvf_far_close(kv);
    kvf_free(kvf_kv_mem(kv), kv->mass);
    kvf_free(kvf_kv_mem(kv), kv->prior);
    kvf_free(kvf_kv_mem(kv), kv->noted);
    kvf_free(kvf_kv_mem(kv), kv->mass_row);
    kvf_look_release(kv);
    kvf_free(kvf_kv_mem(kv), kv->peak);
    kvf_free(kvf_kv_mem(kv), kv->chosen_block);
    kvf_free(kvf_kv_mem(kv), kv->slots);
    kvf_free(kvf_kv_mem(kv), kv->use);
    kvf_free(kvf_kv_mem(kv), kv->chosen);
    kvf_free(kvf_kv_mem(kv), kv);
}

/* Room for n blocks per layer in the tables. Tables are replaced together or not at all. */
static kvf_status grow_tables(kvf_kv *kv, int64_t n, kvf_error *err)
{
    if (n <= kv->cap_block) return KVF_OK;
    int64_t cap = kv->cap_block + kv->cap_block / 2;
    if (cap < n) cap = n;
    if (cap < 16) cap = 16;
    const kvf_mem *mem = kvf_kv_mem(kv);
    size_t all = (size_t)cap * (size_t)kv->dims.n_layer;
    void *fresh[5] = { NULL };
    kvf_status rc = kvf_mem_get(mem, &fresh[0], all, sizeof(int32_t), err);
    if (rc >= 0) rc = kvf_mem_get(mem, &fresh[1], (size_t)cap, 1, err);
    if (rc >= 0) rc = kvf_mem_get(mem, &fresh[2], (size_t)cap, sizeof(int32_t), err);
    if (rc >= 0) rc = kvf_mem_get(mem, &fresh[3], (size_t)cap, sizeof(int64_t), err);
    if (rc >= 0 && kv->far) rc = kvf_mem_get(mem, &fresh[4], all, sizeof(int32_t), err);
    if (rc < 0) {
        for (int i = 0; i < 5; i++) kvf_free(mem, fresh[i]);
        return rc;
    }
    size_t row = (size_t)kv->n_block * sizeof(int32_t);
    for (int32_t l = 0; kv->slots && l < kv->dims.n_layer; l++) {
        memcpy((int32_t *)fresh[0] + l * cap, kvf_layer_slots(kv, l), row);
        if (kv->far) memcpy((int32_t *)fresh[4] + l * cap, kvf_layer_turned(kv, l), row);
    }
    kvf_free(mem, kv->slots);
    kvf_free(mem, kv->use);
    kvf_free(mem, kv->chosen);
    kvf_free(mem, kv->chosen_block);
    kv->slots = fresh[0];
    kv->use = fresh[1];
    kv->chosen = fresh[2];
    kv->chosen_block = fresh[3];
    if (kv->far) {
        kvf_free(mem, kv->far->turned);
        kv->far->turned = fresh[4];
    }
    kv->cap_block = cap;
    return KVF_OK;
}

static void share(kvf_pool *pool, int32_t *to, int32_t slot)
{
    if (slot != NO_SLOT) kvf_pool_ref(pool, slot);
    *to = slot;
}

kvf_status kvf_kv_fork(kvf_kv **out, const kvf_kv *kv, kvf_error *err)
{
    *out = NULL;
    kvf_kv *f;
    if (kv->far && kv->far->sparse) return kvf_fail(err, KVF_ERR_INTERNAL, "a sparse sequence cannot be forked");
    KVF_TRY(kvf_kv_open(&f, kv->pool, kv->dims, err));
    int64_t n = kvf_blocks_for(kv->n_key);
    kvf_status rc = kv->far ? kvf_far_fork(f, kv, err) : KVF_OK;
    if (rc >= 0) rc = grow_tables(f, n, err);
    if (rc < 0) {
        kvf_kv_close(f);
        return rc;
    }
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        for (int64_t b = 0; b < n; b++) {
            share(kv->pool, &kvf_layer_slots(f, l)[b], kvf_layer_slots(kv, l)[b]);
            if (kv->far) share(kv->pool, &kvf_layer_turned(f, l)[b], kvf_layer_turned(kv, l)[b]);
        }
    }
    f->n_block = n;
    f->n_key = kv->n_key;
    f->n_gone = kv->n_gone;
    f->gone_at = kv->gone_at;
    *out = f;
    return KVF_OK;
}

int64_t kvf_kv_len(const kvf_kv *kv) { return kv->n_key + kv->n_gone; }
int64_t kvf_kv_held(const kvf_kv *kv) { return kv->n_key; }

/* Give back the slots of blocks n and later. */
static void drop_blocks(kvf_kv *kv, int64_t n)
{
    for (int64_t b = n; b < kv->n_block; b++) {
        if (kv->far) {
            kvf_far_drop_block(kv, b);
            continue;
        }
        for (int32_t l = 0; l < kv->dims.n_layer; l++) kvf_pool_unref(kv->pool, kvf_layer_slots(kv, l)[b]);
    }
    if (kv->n_block > n) kv->n_block = n;
}

void kvf_kv_drop_places(kvf_kv *kv, int64_t n)
{
    drop_blocks(kv, kvf_blocks_for(n));
    if (n < kv->n_key) kv->n_key = n;
}

void kvf_kv_truncate(kvf_kv *kv, int64_t n)
{
    if (kv->stay_done) memset(kv->stay_done, 0, (size_t)kv->dims.n_layer);
    if (kv->n_gone > 0 && n < kv->gone_at) {
        n = 0;
        kv->n_gone = 0;
    }
    n -= kv->n_gone;
    drop_blocks(kv, kvf_blocks_for(n));
    if (n < kv->n_key) {
        kv->n_key = n;
        if (kv->far && kv->far->sparse)
            kvf_sparse_cut(kv, n);
        else if (kv->far)
            kvf_far_digest_cut(kv, n);
    }
}

static kvf_status take(kvf_kv *kv, int32_t *slot, kvf_error *err)
{
    return kv->far ? kvf_far_take(kv, slot, err) : kvf_pool_take(kv->pool, slot, err);
}

/* A slot that another sequence also holds is copied before it is written. */
static kvf_status unshare(kvf_kv *kv, int32_t *slot, kvf_error *err)
{
    if (*slot == NO_SLOT || kvf_pool_refs(kv->pool, *slot) == 1) return KVF_OK;
    int32_t fresh;
    KVF_TRY(take(kv, &fresh, err));
    const kvf_kv_view *view = kvf_pool_view(kv->pool);
    kvf_status rc = kv->backend->ops->copy(kv->backend, kvf_kv_slot(view, fresh), kvf_kv_slot(view, *slot),
                                           view->slot_bytes, err);
    kvf_pool_unref(kv->pool, rc < 0 ? fresh : *slot);
    if (rc >= 0) *slot = fresh;
    return rc;
}

/* The partly filled last block. */
static kvf_status unshare_tail(kvf_kv *kv, kvf_error *err)
{
    if ((kv->n_key & (KVF_BLOCK - 1)) == 0) return KVF_OK;
    int64_t b = kv->n_key >> KVF_BLOCK_SHIFT;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        int32_t *slot = &kvf_layer_slots(kv, l)[b];
        if (kv->far) kvf_far_lru_remove(kv, *slot);
        KVF_TRY(unshare(kv, slot, err));
        if (kv->far) KVF_TRY(unshare(kv, &kvf_layer_turned(kv, l)[b], err));
    }
    return KVF_OK;
}

/* Slots of one more block in every layer. */
static kvf_status add_block(kvf_kv *kv, kvf_error *err)
{
    int64_t b = kv->n_block;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        kvf_layer_slots(kv, l)[b] = NO_SLOT;
        if (kv->far) kvf_layer_turned(kv, l)[b] = NO_SLOT;
    }
    kvf_status rc = KVF_OK;
    int32_t l = 0;
    for (; rc >= 0 && l < kv->dims.n_layer; l++) {
        rc = take(kv, &kvf_layer_slots(kv, l)[b], err);
        if (rc >= 0 && kv->far) {
            rc = take(kv, &kvf_layer_turned(kv, l)[b], err);
            if (rc < 0) kvf_pool_unref(kv->pool, kvf_layer_slots(kv, l)[b]);
        }
    }
    if (rc >= 0) {
        kv->n_block = b + 1;
        return rc;
    }
    for (l -= 2; l >= 0; l--) {
        kvf_pool_unref(kv->pool, kvf_layer_slots(kv, l)[b]);
        if (kv->far) kvf_pool_unref(kv->pool, kvf_layer_turned(kv, l)[b]);
    }
    return rc;
}

kvf_status kvf_kv_can_hold(const kvf_kv *kv, const kvf_kv_plan *p, kvf_error *err)
{
    bool again = kv->n_gone > 0 && p->kept < kv->gone_at; /* a cut into what was evicted leaves nothing */
    int64_t held = again ? 0 : kv->n_key, keys = again ? p->n : p->n - kv->n_gone;
    int64_t most = (held > p->budget ? held : p->budget) + p->chunk;
    if (p->budget > 0 && keys > most) keys = most;
    int64_t have = kvf_blocks_for(kv->n_key), want = kvf_blocks_for(keys);
    if (want <= have) return KVF_OK;
    if (!kv->far) return kvf_pool_can_take(kv->pool, (want - have) * kv->dims.n_layer, err);
    if (kv->far->tier) return KVF_OK; /* told block by block: what the tier holds makes room */
    int64_t window = kvf_blocks_for(kv->far->m.window + kv->far->m.n_chunk) + 1;
    int64_t turned = want - have < window ? want - have : window;
    return kvf_far_can_take(kv, (want - have + turned) * kv->dims.n_layer, err);
}

kvf_status kvf_kv_reserve(kvf_kv *kv, int64_t n_tok, kvf_error *err)
{
    int64_t committed = kvf_blocks_for(kv->n_key), want = kvf_blocks_for(kv->n_key + n_tok);
    drop_blocks(kv, committed);
    KVF_TRY(grow_tables(kv, want, err));
    if (kv->far)
        KVF_TRY(kvf_far_prepare(kv, n_tok, err));
    else
        KVF_TRY(kvf_pool_can_take(kv->pool, (want - committed) * kv->dims.n_layer, err));
    KVF_TRY(unshare_tail(kv, err));
    for (int64_t b = committed; b < want; b++) {
        kvf_status rc = add_block(kv, err);
        if (rc >= 0) continue;
        drop_blocks(kv, committed);
        return rc;
    }
    return KVF_OK;
}

kvf_status kvf_kv_put(kvf_kv *kv, int32_t layer, const float *k, const float *v, int64_t n_tok, kvf_error *err)
{
    kvf_kv_put_args a = { .k = k, .v = v, .n_tok = n_tok, .n_head_kv = kv->dims.n_head_kv,
                          .head_dim = kv->dims.head_dim, .kv = kvf_pool_view(kv->pool),
                          .slots = kvf_layer_slots(kv, layer), .first = kv->n_key };
    KVF_TRY(kv->backend->ops->kv_put(kv->backend, &a, err));
    if (!kv->far) return KVF_OK;
    const kvf_far *f = kv->far;
    int sliding = f->layer_window[layer] > 0;
    kvf_kv_turn_args t = { .kv = a.kv, .src = a.slots, .dst = kvf_layer_turned(kv, layer), .first = a.first,
                           .n_tok = n_tok, .n_head_kv = a.n_head_kv, .head_dim = a.head_dim,
                           .n_rot = f->rope[sliding].n_rot, .cos_sin = f->cos_sin[sliding],
                           .kind = f->rope[sliding].kind };
    return kv->backend->ops->kv_turn(kv->backend, &t, err);
}

/* Ask the policy and list the chosen slots in order. *n_key: keys they hold, the chunk's included.
 * Blocks of the chunk itself are always in, which keeps "key j is visible to query i if
 * j <= q_first + i" right in the shortened list. */
static kvf_status choose(kvf_kv *kv, const kvf_kv_attend_args *a, const int32_t **slots, int64_t *n_key,
                         kvf_error *err)
{
    int64_t all = kv->n_key + a->n_tok, n_block = kvf_blocks_for(all), first_new = kv->n_key >> KVF_BLOCK_SHIFT;
    const int32_t *from = kvf_layer_slots(kv, a->layer);
    kv->count.n_block_seen += n_block;
    *slots = from;
    *n_key = all;
    if (!a->policy || !a->policy->ops->select) {
        kv->count.n_block_read += n_block;
        return KVF_OK;
    }
    kvf_select s = { a->layer, kv->n_key, a->n_tok, n_block };
    KVF_TRY(a->policy->ops->select(a->policy, &s, kv->use, err));
    int64_t n = 0;
    for (int64_t b = 0; b < n_block; b++)
        if (kv->use[b] || b >= first_new) {
            kv->chosen_block[n] = b;
            kv->chosen[n++] = from[b];
        }
    kv->count.n_block_read += n;
    *slots = kv->chosen;
    *n_key = all - (n_block - n) * KVF_BLOCK; /* only whole blocks are left out */
    return KVF_OK;
}

kvf_attn_args kvf_plain_call(const kvf_kv *kv, const kvf_kv_attend_args *a)
{
    return (kvf_attn_args){ .q = a->q, .o = a->o, .n_tok = a->n_q, .n_head = kv->dims.n_head,
                            .n_head_kv = kv->dims.n_head_kv, .head_dim = kv->dims.head_dim, .scale = a->scale,
                            .softcap = a->softcap, .kv = kvf_pool_view(kv->pool), .window = a->window };
}

static kvf_status attend_plain(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    kvf_kv_attend_args layer = *a;
    /* In a shortened list places are not positions, so the layer's own window cannot be applied
     * there; a sliding-window layer reads little anyway and keeps its own rule. */
    if (a->window > 0) layer.policy = NULL;
    const int32_t *slots;
    int64_t n_key;
    KVF_TRY(choose(kv, &layer, &slots, &n_key, err));
    kvf_attn_args t = kvf_plain_call(kv, a);
    t.slots = slots;
    t.n_key = n_key;
    t.q_first = n_key - a->n_q;
    bool evict = a->evict && a->policy && a->policy->ops->evict, track = kv->track && kv->n_gone == 0;
    if (!track && !evict) return kv->backend->ops->attn(kv->backend, &t, err);
    KVF_TRY(kvf_mass_lse(kv, a->n_q, &t.lse, err));
    const int64_t *blocks = slots == kv->chosen ? kv->chosen_block : NULL;
    kvf_look_begin(kv, a->n_q, track); /* not after an eviction: places are not the text's any more */
    KVF_TRY(kvf_look_attn(kv, &t, blocks, 0, err));
    if (evict) KVF_TRY(kvf_evict_ask(kv, a, &t, err));
    if (!track) return KVF_OK;
    if (kv->look.on) return kvf_look_end(kv, t.lse, err);
    kvf_kv_note note = { &t, blocks, 0, kvf_blocks_for(n_key) };
    return kvf_kv_note_mass(kv, &note, err);
}

kvf_status kvf_any_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    if (kv->far) return kv->far->sparse ? kvf_sparse_attend(kv, a, err) : kvf_far_attend(kv, a, err);
    return kv->order || a->mass ? kvf_order_attend(kv, a, err) : attend_plain(kv, a, err);
}

kvf_status kvf_kv_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    return a->mass && a->mass_peak ? kvf_peak_attend(kv, a, err) : kvf_any_attend(kv, a, err);
}

kvf_status kvf_kv_commit(kvf_kv *kv, int64_t n_tok, kvf_error *err)
{
    kv->n_key += n_tok;
    kv->n_last += kv->track && kv->n_gone == 0;
    if (!kv->far) return KVF_OK;
    if (kv->far->sparse) {
        kvf_sparse_commit(kv, n_tok);
        return KVF_OK;
    }
    kvf_status rc = kvf_far_digest(kv, err);
    if (rc >= 0) rc = kvf_far_seal(kv, err);
    if (rc < 0) {
        kv->n_key -= n_tok;
        kvf_far_digest_cut(kv, kv->n_key);
        return rc;
    }
    kvf_far_drop_window(kv);
    return KVF_OK;
}

/* ---- Tier ------------------------------------------------------------------------------- */

kvf_status kvf_kv_load(kvf_kv *kv, kvf_tier *tier, int64_t n, kvf_error *err)
{
    kvf_kv_truncate(kv, 0);
    kvf_stream_forget(kv);
    if (!kv->far || n > tier->n_token)
        return kvf_fail(err, KVF_ERR_INTERNAL, "a tier of %lld tokens cannot give %lld", (long long)tier->n_token,
                        (long long)n);
    KVF_TRY(grow_tables(kv, kvf_blocks_for(n), err));
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        for (int64_t b = 0; b < kvf_blocks_for(n); b++) {
            kvf_layer_slots(kv, l)[b] = NO_SLOT;
            kvf_layer_turned(kv, l)[b] = NO_SLOT;
        }
    }
    kv->far->tier = tier;
    kv->far->n_tier = n;
    kv->far->epoch = tier->ops->epoch(tier);
    kv->n_block = kvf_blocks_for(n);
    kv->n_key = n;
    return kvf_far_digest_loaded(kv, err);
}

kvf_status kvf_kv_set_tier(kvf_kv *kv, kvf_tier *tier, kvf_error *err)
{
    kvf_far *f = kv->far;
    int64_t before = f->n_tier;
    if (!tier) {
        for (int64_t i = 0; i < kv->n_block * kv->dims.n_layer; i++)
            if (kvf_layer_slots(kv, (int32_t)(i / kv->n_block))[i % kv->n_block] == NO_SLOT)
                return kvf_fail(err, KVF_ERR_STATE, "blocks of this sequence are only in its store");
        if (kvf_far_digests_in_tier(kv))
            return kvf_fail(err, KVF_ERR_STATE, "digests of this sequence are only in its store");
        for (int64_t i = 0; i < kv->n_block * kv->dims.n_layer; i++) /* nobody could bring them back */
            kvf_far_lru_remove(kv, kvf_layer_slots(kv, (int32_t)(i / kv->n_block))[i % kv->n_block]);
        f->n_tier = 0;
        kvf_stream_forget(kv);
    } else {
        f->n_tier = tier->n_token < kv->n_key ? tier->n_token : kv->n_key;
    }
    f->tier = tier;
    kvf_far_digest_forget(kv);
    if (f->n_tier > before) kvf_far_release_clean(kv, before >> KVF_BLOCK_SHIFT, kvf_blocks_for(f->n_tier));
    kvf_far_digest_release(kv);
    return KVF_OK;
}

kvf_status kvf_kv_export(kvf_kv *kv, int64_t group, const void **slots, void *staging, void *digests, kvf_error *err)
{
    int64_t first = group * KVF_GROUP_BLOCKS, end = first + KVF_GROUP_BLOCKS, at = 0;
    if (end > kvf_blocks_for(kv->n_key)) end = kvf_blocks_for(kv->n_key);
    const kvf_kv_view *view = kvf_pool_view(kv->pool);
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        for (int64_t b = first; b < end; b++, at++) {
            int32_t slot = kvf_layer_slots(kv, l)[b];
            if (slot == NO_SLOT)
                return kvf_fail(err, KVF_ERR_INTERNAL, "block %lld is not in memory", (long long)b);
            slots[at] = kvf_kv_slot(view, slot);
            if (!staging) continue;
            char *copy = (char *)staging + (size_t)at * view->slot_bytes;
            KVF_TRY(kv->backend->ops->download(kv->backend, copy, slots[at], view->slot_bytes, err));
            slots[at] = copy;
        }
    }
    return kvf_far_digest_export(kv, first, end, digests, err);
}

/* ---- What happened ----------------------------------------------------------------------- */

void kvf_kv_get_counters(const kvf_kv *kv, kvf_kv_counters *out)
{
    *out = kv->count;
    if (kv->far) out->digest_bytes = kvf_far_digest_memory(kv);
}

void kvf_kv_reset_counters(kvf_kv *kv) { kv->count = (kvf_kv_counters){ 0 }; }
