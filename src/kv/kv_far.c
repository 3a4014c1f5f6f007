/* kv_far.c - attention of a sequence with a memory: InfLLM (Xiao et al. 2024, arXiv:2402.04617), with
 * the masks of the paper, not of the published code, which counts keys at the window's edge twice
 * (infllm_lazyllm.md, section 0.1).
 *
 * For the chunk's queries, three disjoint sets of keys, each with its own (o, lse), merged by lse:
 *     window    distances 0..window - 1, rotated copies, true positions
 *     near far  init, and the rest: tokens older than a query's window that are no unit yet
 *     units     those the policy names
 * The last two are read raw, with queries rotated at window - 1. In the list of the near far keys,
 * places rise with positions, so "at least `window` tokens back" is a causal mask with an offset.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "kv/kv_int.h"

kvf_status kvf_list_reserve(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_kv_list *list = &kv->far->list;
    const kvf_mem *mem = kvf_kv_mem(kv);
    list->n = 0;
    list->holes = false;
    if (n <= list->cap) return KVF_OK;
    int64_t cap = n + n / 2 + 8;
    void *slots, *valid, *blocks;
    KVF_TRY(kvf_mem_get(mem, &slots, (size_t)cap, sizeof(int32_t), err));
    kvf_status rc = kvf_mem_get(mem, &valid, (size_t)cap, 2, err);
    if (rc < 0) valid = NULL;
    blocks = NULL;
    if (rc >= 0) rc = kvf_mem_get(mem, &blocks, (size_t)cap, sizeof(int64_t), err);
    if (rc < 0) {
        kvf_free(mem, slots);
        kvf_free(mem, valid);
        return rc;
    }
    kvf_free(mem, list->slots);
    kvf_free(mem, list->valid);
    kvf_free(mem, list->blocks);
    *list = (kvf_kv_list){ .slots = slots, .valid = valid, .blocks = blocks, .cap = cap };
    return KVF_OK;
}

/* Tokens first..end of the sequence to the list; what touches the last entry makes it longer. */
static void list_add(kvf_kv_list *list, int64_t first, int64_t end)
{
    while (first < end) {
        int64_t block = first >> KVF_BLOCK_SHIFT, base = block << KVF_BLOCK_SHIFT;
        int64_t stop = end - base < KVF_BLOCK ? end - base : KVF_BLOCK;
        uint8_t a = (uint8_t)(first - base), b = (uint8_t)stop;
        if (list->n > 0 && list->blocks[list->n - 1] == block && list->valid[2 * list->n - 1] == a) {
            list->valid[2 * list->n - 1] = b;
        } else {
            list->blocks[list->n] = block;
            list->valid[2 * list->n] = a;
            list->valid[2 * list->n + 1] = b;
            list->n++;
        }
        first = base + stop;
    }
}

/* Raw blocks of the list into the pool; sets holes. Unless all entries but the last are whole. */
static kvf_status list_fetch(kvf_kv *kv, int32_t layer, bool count, kvf_error *err)
{
    kvf_far *f = kv->far;
    kvf_kv_list *list = &f->list;
    if (f->tier && f->tier->ops->expect) {
        const int32_t *slots = kvf_layer_slots(kv, layer);
        for (int64_t i = 0; i < list->n; i++)
            if (slots[list->blocks[i]] == NO_SLOT) f->tier->ops->expect(f->tier, layer, &list->blocks[i], 1);
    }
    for (int64_t i = 0; i < list->n; i++) {
        bool missed;
        KVF_TRY(kvf_far_fetch(kv, layer, list->blocks[i], &missed, err));
        if (count) kv->count.n_far_read++;
        if (count && missed) kv->count.n_far_miss++;
        bool whole = list->valid[2 * i] == 0 && (list->valid[2 * i + 1] == KVF_BLOCK || i == list->n - 1);
        if (!whole) list->holes = true;
        list->slots[i] = kvf_layer_slots(kv, layer)[list->blocks[i]];
    }
    return f->tier && kvf_stream_serves(kv) ? kvf_stream_note(kv, layer, list->blocks, list->n, err) : KVF_OK;
}

static int64_t list_keys(const kvf_kv_list *list)
{
    return list->n > 0 ? (list->n - 1) * KVF_BLOCK + list->valid[2 * list->n - 1] : 0;
}

kvf_status kvf_far_rows(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    if (n <= f->cap_row) return KVF_OK;
    size_t rows = (size_t)n * (size_t)kv->dims.n_head;
    float **at[3] = { &f->o2, &f->lse, &f->lse2 };
    f->cap_row = 0;
    for (int i = 0; i < 3; i++) {
        if (*at[i]) kv->backend->ops->release(kv->backend, *at[i]);
        *at[i] = NULL;
    }
    for (int i = 0; i < 3; i++) {
        void *block;
        size_t width = i == 0 ? (size_t)kv->dims.head_dim : 1;
        KVF_TRY(kv->backend->ops->alloc(kv->backend, &block, rows * width * sizeof(float), err));
        *at[i] = block;
    }
    f->cap_row = n;
    return KVF_OK;
}

/* ---- Where attention went ------------------------------------------------------------------- */

kvf_status kvf_mass_lse(kvf_kv *kv, int64_t n_q, float **lse, kvf_error *err)
{
    if (n_q > kv->cap_mass_lse) {
        void *block;
        if (kv->mass_lse) kv->backend->ops->release(kv->backend, kv->mass_lse);
        kv->mass_lse = NULL;
        kv->cap_mass_lse = 0;
        KVF_TRY(kv->backend->ops->alloc(kv->backend, &block, (size_t)(n_q * kv->dims.n_head) * sizeof(float), err));
        kv->mass_lse = block;
        kv->cap_mass_lse = n_q;
    }
    *lse = kv->mass_lse;
    return KVF_OK;
}

kvf_status kvf_mass_row(kvf_kv *kv, int64_t n, kvf_error *err)
{
    void *row = kv->mass_row;
    KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &row, &kv->cap_mass_row, n, sizeof(float), err));
    kv->mass_row = row;
    memset(kv->mass_row, 0, (size_t)n * sizeof(float));
    return KVF_OK;
}

kvf_status kvf_mass_of(kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_attn_args *t, kvf_error *err)
{
    KVF_TRY(kvf_mass_row(kv, kvf_blocks_for(t->n_key) * KVF_BLOCK * (a->mass_peak ? t->n_head : 1), err));
    kvf_attn_mass_args m = { .attn = t, .sum_heads = !a->mass_peak, .mass = kv->mass_row };
    return kv->backend->ops->attn_mass(kv->backend, &m, err);
}

void kvf_mass_add(const kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_attn_args *t, int64_t j0, int64_t j1, int64_t base)
{
    int64_t stride = kvf_blocks_for(t->n_key) * KVF_BLOCK;
    for (int64_t h = 0; h < (a->mass_peak ? t->n_head : 1); h++)
        for (int64_t j = j0; j < j1; j++) a->mass[h * a->mass_stride + base + j] += kv->mass_row[h * stride + j];
}

kvf_status kvf_peak_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    int64_t n = kv->order ? kv->order->n : kv->n_key + a->n_tok;
    int32_t n_head = kv->dims.n_head;
    kvf_kv_attend_args by_head = *a;
    void *block = kv->peak;
    KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &block, &kv->cap_peak, n * n_head, sizeof(float), err));
    by_head.mass = kv->peak = block;
    by_head.mass_stride = n;
    memset(kv->peak, 0, (size_t)(n * n_head) * sizeof *kv->peak);
    KVF_TRY(kvf_any_attend(kv, &by_head, err));
    for (int64_t h = 1; h < n_head; h++)
        for (int64_t j = 0; j < n; j++)
            if (kv->peak[h * n + j] > kv->peak[j]) kv->peak[j] = kv->peak[h * n + j];
    for (int64_t j = 0; j < n; j++) a->mass[j] += kv->peak[j];
    return KVF_OK;
}

/* ---- The three parts ------------------------------------------------------------------------- */

/* One attention call of the layer: what differs between its parts. */
typedef struct part {
    kvf_kv *kv;
    const kvf_kv_attend_args *a;
    kvf_attn_args t;     /* the call, for notes after the last merge */
    int64_t first_block; /* of a list without block numbers */
    int64_t skip;        /* leading queries that see nothing of it */
} part;

static part begin_part(kvf_kv *kv, const kvf_kv_attend_args *a)
{
    part p = { .kv = kv, .a = a };
    p.t = (kvf_attn_args){ .n_head = kv->dims.n_head, .n_head_kv = kv->dims.n_head_kv, .head_dim = kv->dims.head_dim,
                           .scale = a->scale, .softcap = a->softcap, .kv = kvf_pool_view(kv->pool), .n_tok = a->n_q,
                           .q = a->q, .o = a->o, .lse = kv->far->lse };
    return p;
}

static kvf_status attend_window(part *p, kvf_error *err)
{
    kvf_kv *kv = p->kv;
    const kvf_kv_attend_args *a = p->a;
    int64_t first = kvf_window_first(kv->far, a->layer, kv->n_key + a->n_tok - a->n_q), end = kv->n_key + a->n_tok;
    p->first_block = first >> KVF_BLOCK_SHIFT;
    int64_t base = p->first_block << KVF_BLOCK_SHIFT;
    p->t.slots = kvf_layer_turned(kv, a->layer) + p->first_block;
    p->t.n_key = end - base;
    p->t.q_first = p->t.n_key - a->n_q;
    p->t.window = a->window > 0 ? a->window : kv->far->m.window;
    return kvf_look_attn(kv, &p->t, NULL, p->first_block, err);
}

/* The list is set and fetched: the call reads it, into o2. */
static void aim_at_list(part *p)
{
    kvf_kv *kv = p->kv;
    kvf_far *f = kv->far;
    int64_t width = (int64_t)kv->dims.n_head * kv->dims.head_dim, n = p->a->n_q - p->skip;
    p->t.q = p->a->q_far + p->skip * width;
    p->t.o = f->o2;
    p->t.lse = f->lse2;
    p->t.n_tok = n;
    p->t.window = 0;
    p->t.slots = f->list.slots;
    p->t.n_key = list_keys(&f->list);
    p->t.valid = f->list.holes ? f->list.valid : NULL;
}

static kvf_status attend_list(part *p, kvf_error *err)
{
    aim_at_list(p);
    return kvf_look_attn(p->kv, &p->t, p->kv->far->list.blocks, 0, err);
}

static kvf_status merge(part *p, kvf_error *err)
{
    kvf_kv *kv = p->kv;
    int64_t row = p->skip * kv->dims.n_head;
    kvf_lse_merge_args m = { .o = p->a->o + row * kv->dims.head_dim, .lse = kv->far->lse + row, .o2 = kv->far->o2,
                             .lse2 = kv->far->lse2, .n_row = (p->a->n_q - p->skip) * kv->dims.n_head,
                             .head_dim = kv->dims.head_dim };
    return kv->backend->ops->lse_merge(kv->backend, &m, err);
}

/* Init and rest. *ran: there were such keys. */
static kvf_status near_list(part *p, bool *ran, kvf_error *err)
{
    kvf_kv *kv = p->kv;
    const kvf_memory *m = &kv->far->m;
    int64_t first_q = kv->n_key + p->a->n_tok - p->a->n_q, last_q = kv->n_key + p->a->n_tok - 1;
    int64_t rest = kvf_units_end(m, kv->n_key), end = last_q - m->window + 1;
    *ran = end > 0;
    if (!*ran) return KVF_OK;
    KVF_TRY(kvf_list_reserve(kv, kvf_blocks_for(m->init) + ((end - rest) >> KVF_BLOCK_SHIFT) + 3, err));
    kvf_kv_list *list = &kv->far->list;
    int64_t place;
    if (rest == m->init) { /* one run of tokens, places are positions */
        list_add(list, 0, end);
        place = rest;
    } else {
        list_add(list, 0, m->init);
        int64_t before = list->n > 0 && rest < end && list->blocks[list->n - 1] == rest >> KVF_BLOCK_SHIFT &&
                                 list->valid[2 * list->n - 1] == (rest & (KVF_BLOCK - 1))
                             ? list->n - 1
                             : list->n;
        list_add(list, rest, end);
        place = before * KVF_BLOCK + (rest & (KVF_BLOCK - 1));
    }
    p->skip = first_q < m->window ? m->window - first_q : 0;
    p->t.q_first = place + (first_q + p->skip - m->window - rest);
    return list_fetch(kv, p->a->layer, false, err);
}

/* Units set[u] of the policy's answer. share: some stay on the host. *ran: there is one for the device. */
static kvf_status unit_list(part *p, const kvf_lookup *l, const uint8_t *set, bool share, bool *ran, kvf_error *err)
{
    kvf_kv *kv = p->kv;
    const kvf_memory *m = &kv->far->m;
    int64_t n = 0;
    for (int64_t u = 0; u < l->n_unit; u++) n += set[u] != 0;
    *ran = n > 0;
    KVF_TRY(kvf_list_reserve(kv, n, err));
    for (int64_t u = 0; u < l->n_unit; u++)
        if (set[u]) list_add(&kv->far->list, (l->unit0 + u) * m->unit, (l->unit0 + u + 1) * m->unit);
    if (share) {
        KVF_TRY(kvf_share_split(kv, p->a->layer, err));
        if (kvf_share_left(kv)) KVF_TRY(kvf_share_take_queries(kv, p->a, err));
        *ran = kv->far->list.n > 0;
    }
    if (!*ran) return KVF_OK;
    KVF_TRY(list_fetch(kv, p->a->layer, true, err));
    p->t.q_first = kv->far->list.n * KVF_BLOCK;
    return KVF_OK;
}

static kvf_status note(part *p, const int64_t *blocks, int64_t n_entry, kvf_error *err)
{
    kvf_attn_args t = p->t;
    t.lse = p->kv->far->lse + p->skip * p->kv->dims.n_head;
    kvf_kv_note n = { &t, blocks, p->first_block, n_entry };
    return kvf_kv_note_mass(p->kv, &n, err);
}

/* One set's units, to o2; with one set all heads share it. *any: there were some. */
static kvf_status attend_set(part *p, const kvf_lookup *l, int32_t set, bool share, bool *any, kvf_error *err)
{
    kvf_kv *kv = p->kv;
    kvf_far *f = kv->far;
    bool ran;
    KVF_TRY(unit_list(p, l, f->use + set * l->n_unit, share, &ran, err));
    if (!ran) f->list.n = 0; /* o = 0, lse = -inf for these heads */
    *any = *any || ran;
    if (ran || f->m.n_set > 1) KVF_TRY(attend_list(p, err));
    return share && kvf_share_left(kv) ? kvf_share_attend(kv, p->a, set, err) : KVF_OK;
}

/* Units of every set. notes: nothing is computed but where the last query looked. */
static kvf_status attend_units(kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_lookup *l, bool notes, kvf_error *err)
{
    kvf_far *f = kv->far;
    part p = begin_part(kv, a);
    bool any = false, share = !notes && kvf_share_serves(kv, a);
    if (share) kvf_share_begin(kv);
    for (int32_t s = 0; s < f->m.n_set; s++) {
        bool ran;
        if (f->m.n_set > 1) {
            p.t.head_kv0 = s;
            p.t.head_kv1 = s + 1;
        }
        if (!notes) {
            KVF_TRY(attend_set(&p, l, s, share, &any, err));
            continue;
        }
        KVF_TRY(unit_list(&p, l, f->use + s * l->n_unit, false, &ran, err));
        if (!ran) continue;
        aim_at_list(&p);
        KVF_TRY(note(&p, f->list.blocks, f->list.n, err));
    }
    if (any) KVF_TRY(merge(&p, err));
    if (!share) return KVF_OK;
    KVF_TRY(kvf_share_hand_over(kv, a, &any, err));
    return any ? merge(&p, err) : KVF_OK;
}

/* Column sums of the window for the scores of representatives. */
static kvf_status score_window(part *window, kvf_error *err)
{
    kvf_kv *kv = window->kv;
    int64_t n_entry = kvf_blocks_for(window->t.n_key);
    KVF_TRY(kvf_mass_row(kv, n_entry * KVF_BLOCK * kv->dims.n_head, err));
    kvf_attn_mass_args a = { .attn = &window->t, .mass = kv->mass_row };
    KVF_TRY(kv->backend->ops->attn_mass(kv->backend, &a, err));
    return kvf_far_score(kv, window->a->layer, kv->mass_row, window->first_block, n_entry, err);
}

/* Which keys did the last query look at? With the final lse, once more over each list: where the calls themselves
 * did not say. */
static kvf_status note_all(part *window, part *near, bool has_near, const kvf_lookup *l, kvf_error *err)
{
    kvf_kv *kv = window->kv;
    KVF_TRY(note(window, NULL, kvf_blocks_for(window->t.n_key), err));
    if (has_near) {
        bool ran;
        KVF_TRY(near_list(near, &ran, err));
        aim_at_list(near);
        KVF_TRY(note(near, kv->far->list.blocks, kv->far->list.n, err));
    }
    return l->n_unit > 0 ? attend_units(kv, window->a, l, true, err) : KVF_OK;
}

/* Attention of the newest n_mass queries over one list, whose key 0 stands at `base` of the text. */
static kvf_status add_list_mass(const part *p, int64_t base, kvf_error *err)
{
    kvf_kv *kv = p->kv;
    const kvf_kv_attend_args *a = p->a;
    kvf_attn_args t = p->t;
    int64_t n = a->n_mass < t.n_tok ? a->n_mass : t.n_tok, from = t.n_tok - n;
    t.q += from * t.n_head * t.head_dim;
    t.lse = kv->far->lse + (a->n_q - n) * t.n_head;
    t.q_first += from;
    t.n_tok = n;
    KVF_TRY(kvf_mass_of(kv, a, &t, err));
    kvf_mass_add(kv, a, &t, 0, t.n_key, base);
    return KVF_OK;
}

/* Window, and every key before it at the far distance: those of units that were not chosen too. */
static kvf_status add_mass(part *window, part *all, kvf_error *err)
{
    kvf_kv *kv = window->kv;
    const kvf_memory *m = &kv->far->m;
    int64_t first_q = kv->n_key + window->a->n_tok - window->a->n_q, end = kv->n_key + window->a->n_tok - m->window;
    KVF_TRY(add_list_mass(window, window->first_block << KVF_BLOCK_SHIFT, err));
    if (end <= 0) return KVF_OK;
    KVF_TRY(kvf_list_reserve(kv, (end >> KVF_BLOCK_SHIFT) + 2, err));
    list_add(&kv->far->list, 0, end);
    all->skip = first_q < m->window ? m->window - first_q : 0;
    all->t.q_first = first_q + all->skip - m->window;
    KVF_TRY(list_fetch(kv, window->a->layer, false, err));
    aim_at_list(all);
    return add_list_mass(all, 0, err);
}

kvf_status kvf_far_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    kvf_far *f = kv->far;
    f->now++;
    KVF_TRY(kvf_stream_settle(kv, err));
    if (a->window == 0) kvf_stream_unnote(kv, a->layer);
    KVF_TRY(kvf_far_rows(kv, a->n_q, err));
    part window = begin_part(kv, a), near = window;
    kvf_look_begin(kv, a->n_q, kv->track);
    KVF_TRY(attend_window(&window, err));
    kvf_lookup l = { .kv = kv, .a = a, .lse = f->lse, .unit0 = f->m.init / f->m.unit, .n_past = kv->n_key };
    bool has_near = false;
    if (a->window == 0) {
        KVF_TRY(near_list(&near, &has_near, err));
        if (has_near) {
            KVF_TRY(attend_list(&near, err));
            KVF_TRY(merge(&near, err));
        }
        l.n_unit = (kvf_units_end(&f->m, kv->n_key) - f->m.init) / f->m.unit;
        if (l.n_unit > 0) {
            KVF_TRY(kvf_far_lookup(&l, err));
            KVF_TRY(attend_units(kv, a, &l, false, err));
        }
    }
    if (f->reps && a->window == 0) KVF_TRY(score_window(&window, err));
    if (a->mass) KVF_TRY(add_mass(&window, &near, err));
    if (kv->track) KVF_TRY(kv->look.on ? kvf_look_end(kv, f->lse, err) : note_all(&window, &near, has_near, &l, err));
    return a->window == 0 ? kvf_stream_ahead(kv, a->layer, err) : KVF_OK;
}
