/* kv_evict.c - a plain sequence that keeps a budget of tokens, each KV head its own.
 *
 * The policy says after an attention (which it may want to see) or at the chunk's end which places of a layer
 * stay; kvf_kv_evict then moves them together. Positions in the text go on counting what is gone
 * (kvf_kv_len), so new tokens are rotated as if all were there; a key's place says only what came before it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "kv/kv_int.h"

void kvf_evict_release(kvf_kv *kv)
{
    kvf_free(kvf_kv_mem(kv), kv->stay);
    kvf_free(kvf_kv_mem(kv), kv->stay_done);
    kvf_free(kvf_kv_mem(kv), kv->stay_slot);
    kvf_free(kvf_kv_mem(kv), kv->head_mass);
    kv->stay = NULL;
    kv->stay_done = NULL;
    kv->stay_slot = NULL;
    kv->head_mass = NULL;
    kv->cap_stay = kv->cap_head_mass = 0;
}

/* Keys of one head, read block by block through the host. */
typedef struct key_reader {
    kvf_kv *kv;
    int32_t layer;
    int64_t n;
} key_reader;

static kvf_status read_keys(void *lookup, int32_t head_kv, float *keys, kvf_error *err)
{
    const key_reader *r = lookup;
    kvf_kv *kv = r->kv;
    const kvf_kv_view *view = kvf_pool_view(kv->pool);
    int64_t d = kv->dims.head_dim, plane = KVF_BLOCK * d;
    for (int64_t b = 0; b * KVF_BLOCK < r->n; b++) {
        int64_t n = r->n - b * KVF_BLOCK < KVF_BLOCK ? r->n - b * KVF_BLOCK : KVF_BLOCK;
        const kvf_f16 *slot = kvf_kv_slot(view, kvf_layer_slots(kv, r->layer)[b]);
        KVF_TRY(kv->backend->ops->download(kv->backend, kv->stay_slot, slot + head_kv * plane, (size_t)(n * d) * sizeof *slot, err));
        for (int64_t i = 0; i < n * d; i++) keys[b * plane + i] = kvf_f32_from_f16(kv->stay_slot[i]);
    }
    return KVF_OK;
}

static kvf_status reserve_stay(kvf_kv *kv, int64_t keep, kvf_error *err)
{
    const kvf_mem *mem = kvf_kv_mem(kv);
    int64_t all = kv->dims.n_layer * kv->dims.n_head_kv * keep;
    void *block = kv->stay;
    KVF_TRY(kvf_reserve(mem, &block, &kv->cap_stay, all, sizeof(int32_t), err));
    kv->stay = block;
    if (!kv->stay_done) {
        KVF_TRY(kvf_mem_get(mem, &block, (size_t)kv->dims.n_layer, 1, err));
        kv->stay_done = block;
    }
    if (!kv->stay_slot) {
        KVF_TRY(kvf_mem_get(mem, &block, (size_t)KVF_BLOCK * (size_t)kv->dims.head_dim, sizeof(kvf_f16), err));
        kv->stay_slot = block;
    }
    return KVF_OK;
}

/* Ask about a layer that holds n tokens. mass: [n_head][stride] or NULL. */
static kvf_status ask(kvf_kv *kv, kvf_policy *p, kvf_evict *e, kvf_error *err)
{
    key_reader r = { kv, e->layer, e->n };
    KVF_TRY(reserve_stay(kv, e->keep, err));
    e->lookup = &r;
    e->keys = read_keys;
    KVF_TRY(p->ops->evict(p, e, kv->stay + (int64_t)e->layer * kv->dims.n_head_kv * e->keep, err));
    kv->stay_done[e->layer] = 1;
    return KVF_OK;
}

kvf_status kvf_evict_ask(kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_attn_args *t, kvf_error *err)
{
    kvf_budget b = { 0 };
    a->policy->ops->budget(a->policy, &b);
    if (b.n_row == 0 || t->n_key <= b.tokens) return KVF_OK;
    int64_t n = a->n_q < b.n_row ? a->n_q : b.n_row, stride = kvf_blocks_for(t->n_key) * KVF_BLOCK;
    void *mass = kv->head_mass;
    KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &mass, &kv->cap_head_mass, stride * t->n_head, sizeof(float), err));
    kv->head_mass = mass;
    memset(kv->head_mass, 0, (size_t)(stride * t->n_head) * sizeof(float));
    kvf_attn_args some = *t;
    some.q += (a->n_q - n) * t->n_head * t->head_dim;
    some.lse += (a->n_q - n) * t->n_head;
    some.q_first += a->n_q - n;
    some.n_tok = n;
    kvf_attn_mass_args m = { .attn = &some, .mass = kv->head_mass };
    KVF_TRY(kv->backend->ops->attn_mass(kv->backend, &m, err));
    kvf_evict e = { .layer = a->layer, .n = t->n_key, .keep = b.tokens, .mass = kv->head_mass, .stride = stride, .n_row = (int32_t)n };
    return ask(kv, a->policy, &e, err);
}

kvf_status kvf_kv_evict(kvf_kv *kv, kvf_policy *p, kvf_error *err)
{
    kvf_budget b = { 0 };
    p->ops->budget(p, &b);
    if (kv->n_key <= b.tokens) return KVF_OK;
    KVF_TRY(reserve_stay(kv, b.tokens, err));
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        kvf_evict e = { .layer = l, .n = kv->n_key, .keep = b.tokens };
        if (!kv->stay_done[l] && b.n_row == 0) KVF_TRY(ask(kv, p, &e, err));
        if (!kv->stay_done[l]) return kvf_fail(err, KVF_ERR_INTERNAL, "layer %d was not asked what it keeps", l);
    }
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        const int32_t *slots = kvf_layer_slots(kv, l);
        kvf_kv_gather_args g = { .kv = kvf_pool_view(kv->pool), .src = slots, .dst = slots, .n = b.tokens,
                                 .from = kv->stay + (int64_t)l * kv->dims.n_head_kv * b.tokens, .from_stride = b.tokens,
                                 .n_head_kv = kv->dims.n_head_kv, .head_dim = kv->dims.head_dim };
        KVF_TRY(kv->backend->ops->kv_gather(kv->backend, &g, err));
        kv->stay_done[l] = 0;
    }
    int64_t text = kv->n_key + kv->n_gone;
    kvf_kv_drop_places(kv, b.tokens);
    kv->n_gone = text - b.tokens;
    kv->gone_at = text;
    return KVF_OK;
}
