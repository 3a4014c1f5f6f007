/* kv_order.c - attention of a plain sequence in an order of the caller's: over some of its keys, put in
 * the text's order, and how much of it each key got.
 *
 * A sequence that holds a part of a text in the order in which the tokens came (LazyLLM's upper layers,
 * Fu et al. 2024, arXiv:2407.14057) cannot be masked by places. So the keys a step may see are copied
 * into slots of their own, sorted by position, and each query says where among them it stands; then "key j
 * is visible to query i if it stands before it" is right again. One layer's worth of slots is enough.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "kv/kv_int.h"

void kvf_kv_arrange(kvf_kv *kv, const kvf_kv_order *order) { kv->order = order; }

void kvf_gathered_release(kvf_kv *kv, kvf_kv_gathered *g)
{
    for (int64_t i = 0; i < g->n; i++) kvf_pool_unref(kv->pool, g->slots[i]);
    kvf_free(kvf_kv_mem(kv), g->slots);
    *g = (kvf_kv_gathered){ 0 };
}

void kvf_order_release(kvf_kv *kv) { kvf_gathered_release(kv, &kv->gathered); }

kvf_status kvf_gathered_reserve(kvf_kv *kv, kvf_kv_gathered *to, int64_t n, kvf_error *err)
{
    int64_t want = kvf_blocks_for(n);
    void *list = to->slots;
    KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &list, &to->cap, want, sizeof(int32_t), err));
    to->slots = list;
    while (to->n > want) kvf_pool_unref(kv->pool, to->slots[--to->n]);
    while (to->n < want) {
        KVF_TRY(kvf_pool_take(kv->pool, &to->slots[to->n], err));
        to->n++;
    }
    return KVF_OK;
}

kvf_status kvf_kv_gather_into(kvf_kv *kv, kvf_kv_gathered *to, const int32_t *src, const int32_t *places, int64_t n,
                              kvf_error *err)
{
    KVF_TRY(kvf_gathered_reserve(kv, to, n, err));
    kvf_kv_gather_args g = { .kv = kvf_pool_view(kv->pool), .src = src, .dst = to->slots, .from = places, .n = n,
                             .n_head_kv = kv->dims.n_head_kv, .head_dim = kv->dims.head_dim };
    return kv->backend->ops->kv_gather(kv->backend, &g, err);
}

/* Attention that queries q0..q0 + n gave, which stand one after another. */
static kvf_status add_run(kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_attn_args *t, int64_t q0, int64_t n,
                          kvf_error *err)
{
    kvf_attn_args some = *t;
    some.q += q0 * t->n_head * t->head_dim;
    some.lse += q0 * t->n_head;
    some.q_first = t->place ? t->place[q0] : t->q_first + q0;
    some.n_tok = n;
    some.place = NULL;
    KVF_TRY(kvf_mass_of(kv, a, &some, err));
    kvf_mass_add(kv, a, &some, 0, t->n_key, 0);
    return KVF_OK;
}

static kvf_status add_mass(kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_attn_args *t, kvf_error *err)
{
    for (int64_t q = a->n_q - a->n_mass; q < a->n_q;) {
        int64_t n = 1;
        while (q + n < a->n_q && (!t->place || t->place[q + n] == t->place[q] + n)) n++;
        KVF_TRY(add_run(kv, a, t, q, n, err));
        q += n;
    }
    return KVF_OK;
}

kvf_status kvf_order_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    const kvf_kv_order none = { .n = kv->n_key + a->n_tok }, *o = kv->order ? kv->order : &none;
    kvf_attn_args t = kvf_plain_call(kv, a);
    t.slots = kvf_layer_slots(kv, a->layer);
    t.n_key = o->n;
    t.q_first = o->n - a->n_q;
    if (o->at) t.place = o->at + (o->n_at - a->n_q);
    if (o->places) {
        KVF_TRY(kvf_kv_gather_into(kv, &kv->gathered, t.slots, o->places, o->n, err));
        t.slots = kv->gathered.slots;
    }
    if (a->window > 0 && o->first) {
        t.first = o->first + (o->n_at - a->n_q);
        t.window = 0;
    }
    if (a->mass || kv->track) KVF_TRY(kvf_mass_lse(kv, a->n_q, &t.lse, err));
    kv->count.n_block_seen += kvf_blocks_for(kv->n_key + a->n_tok);
    kv->count.n_block_read += kvf_blocks_for(o->n);
    kvf_look_begin(kv, a->n_q, kv->track && !kv->order);
    KVF_TRY(kvf_look_attn(kv, &t, NULL, 0, err));
    if (a->mass) KVF_TRY(add_mass(kv, a, &t, err));
    if (!kv->track || kv->order) return KVF_OK;
    if (kv->look.on) return kvf_look_end(kv, t.lse, err);
    kvf_kv_note note = { &t, NULL, 0, kvf_blocks_for(t.n_key) }; /* places are the text's */
    return kvf_kv_note_mass(kv, &note, err);
}

static kvf_status move_places(kvf_kv *kv, const int32_t *slots, const int32_t *places, int64_t first, int64_t n, kvf_error *err)
{
    kvf_kv_gather_args g = { .kv = kvf_pool_view(kv->pool), .src = slots, .dst = slots, .from = places + first,
                             .first = first, .n = n - first, .n_head_kv = kv->dims.n_head_kv, .head_dim = kv->dims.head_dim };
    return kv->backend->ops->kv_gather(kv->backend, &g, err);
}

kvf_status kvf_kv_compact(kvf_kv *kv, const int32_t *places, int64_t n, kvf_error *err)
{
    int64_t same = 0;
    while (same < n && places[same] == same) same++;
    for (int32_t l = 0; same < n && l < kv->dims.n_layer; l++) {
        KVF_TRY(move_places(kv, kvf_layer_slots(kv, l), places, same, n, err));
        if (kv->far) KVF_TRY(move_places(kv, kvf_layer_turned(kv, l), places, same, n, err));
    }
    if (kv->far) kvf_sparse_compact(kv, places, n);
    kvf_kv_truncate(kv, n);
    return KVF_OK;
}
