/* kv_share.c - far blocks that stay on the host: the CPU attends to them where they lie, in frames of pinned memory
 * (kv_stream.c), while the device attends to the rest; the two results are merged by log-sum-exp.
 *
 * Off unless asked for: whether a copy or the host's arithmetic is cheaper depends on the machine, and no device
 * has measured it yet. Only for steps of a few queries, since the host's part grows with them and a copy does not.
 * Numbers then differ from those of the device alone by roundings, and depend on what was in the pool.
 *
 * Source: the merge is that of Dao 2023, arXiv:2307.08691, section 3.1; the split is ours.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "kv/kv_int.h"

enum { MOST_QUERIES = 8 };

struct kvf_share {
    int32_t percent;
    kvf_kv_list left;        /* the blocks of a list that stay */
    float *q, *o, *lse;      /* memory of the host's backend, MOST_QUERIES rows */
    float *o2, *lse2;        /* of one batch */
    void **frame;            /* [cap_batch] of the batch, a slab each */
    int32_t *seq;            /* [cap_batch] 0, 1, ... */
    int64_t cap_frame, cap_seq;
    bool has_q, any;         /* of the call: q is here; o and lse hold something */
};

static void release(kvf_kv *kv, kvf_share *s)
{
    kvf_backend *host = kv->backend->host;
    const kvf_mem *mem = kvf_kv_mem(kv);
    float *rows[] = { s->q, s->o, s->lse, s->o2, s->lse2 };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i]) host->ops->release(host, rows[i]);
    void *own[] = { s->left.slots, s->left.valid, s->left.blocks, s->frame, s->seq, s };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) kvf_free(mem, own[i]);
}

void kvf_share_close(kvf_kv *kv)
{
    if (kv->far->share) release(kv, kv->far->share);
    kv->far->share = NULL;
}

int32_t kvf_share_percent(const kvf_kv *kv) { return kv->far && kv->far->share ? kv->far->share->percent : 0; }

static kvf_status open_rows(kvf_kv *kv, kvf_share *s, kvf_error *err)
{
    kvf_backend *host = kv->backend->host;
    size_t rows = (size_t)MOST_QUERIES * (size_t)kv->dims.n_head, wide = rows * (size_t)kv->dims.head_dim;
    float **at[] = { &s->q, &s->o, &s->o2, &s->lse, &s->lse2 };
    for (int i = 0; i < 5; i++) {
        void *block;
        KVF_TRY(host->ops->alloc(host, &block, (i < 3 ? wide : rows) * sizeof(float), err));
        *at[i] = block;
    }
    return KVF_OK;
}

kvf_status kvf_kv_share(kvf_kv *kv, int32_t percent, kvf_error *err)
{
    if (percent < 0 || percent > 100) return kvf_fail(err, KVF_ERR_ARG, "host_share is %d; use 0 to 100 percent", percent);
    if (!kv->far || kv->far->sparse || !kv->backend->host || !kvf_stream_serves(kv)) return KVF_OK;
    if (percent == 0) kvf_share_close(kv);
    if (percent > 0 && !kv->far->share) {
        void *block;
        KVF_TRY(kvf_mem_get(kvf_kv_mem(kv), &block, 1, sizeof(kvf_share), err));
        kvf_status rc = open_rows(kv, block, err);
        if (rc < 0) {
            release(kv, block);
            return rc;
        }
        kv->far->share = block;
    }
    if (percent > 0) kv->far->share->percent = percent;
    return KVF_OK;
}

bool kvf_share_serves(const kvf_kv *kv, const kvf_kv_attend_args *a)
{
    return kv->far->share && kv->far->tier && !kv->track && !a->mass && a->n_q <= MOST_QUERIES;
}

void kvf_share_begin(kvf_kv *kv)
{
    kvf_share *s = kv->far->share;
    s->has_q = s->any = false;
    s->left.n = 0;
}

/* ---- Which blocks stay ----------------------------------------------------------------------------- */

static kvf_status reserve_left(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_kv_list *l = &kv->far->share->left;
    const kvf_mem *mem = kvf_kv_mem(kv);
    void *valid = l->valid, *blocks = l->blocks;
    int64_t cap = l->cap;
    kvf_status rc = kvf_reserve(mem, &valid, &cap, n, 2, err);
    l->valid = valid;
    cap = l->cap;
    if (rc >= 0) rc = kvf_reserve(mem, &blocks, &cap, n, sizeof(int64_t), err);
    l->blocks = blocks;
    if (rc >= 0) l->cap = cap;
    return rc;
}

static void move_entry(kvf_kv_list *to, const kvf_kv_list *from, int64_t i)
{
    to->blocks[to->n] = from->blocks[i];
    to->valid[2 * to->n] = from->valid[2 * i];
    to->valid[2 * to->n + 1] = from->valid[2 * i + 1];
    to->n++;
}

/* Every so many of the blocks that would have to come: which ones depends on the list alone. */
kvf_status kvf_share_split(kvf_kv *kv, int32_t layer, kvf_error *err)
{
    kvf_share *s = kv->far->share;
    kvf_kv_list *list = &kv->far->list;
    const int32_t *slots = kvf_layer_slots(kv, layer);
    int64_t n = list->n, missing = 0;
    s->left.n = 0;
    KVF_TRY(reserve_left(kv, n, err));
    list->n = 0;
    for (int64_t i = 0; i < n; i++) {
        bool here = slots[list->blocks[i]] != NO_SLOT;
        int64_t before = missing * s->percent / 100;
        missing += !here;
        move_entry(!here && missing * s->percent / 100 > before ? &s->left : list, list, i);
    }
    kv->count.n_far_read += s->left.n;
    kv->count.n_far_shared += s->left.n;
    return KVF_OK;
}

/* ---- The host's part ------------------------------------------------------------------------------- */

bool kvf_share_left(const kvf_kv *kv) { return kv->far->share->left.n > 0; }

/* Before the device's part is launched: a download waits for what is on its way. */
kvf_status kvf_share_take_queries(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    kvf_share *s = kv->far->share;
    size_t rows = (size_t)a->n_q * (size_t)kv->dims.n_head, wide = rows * (size_t)kv->dims.head_dim;
    if (s->has_q) return KVF_OK;
    KVF_TRY(kv->backend->ops->download(kv->backend, s->q, a->q_far, wide * sizeof(float), err));
    memset(s->o, 0, wide * sizeof(float));
    for (size_t i = 0; i < rows; i++) s->lse[i] = -INFINITY;
    s->has_q = true;
    return KVF_OK;
}

/* Frames for entries from `first` on, as many as can be had together. */
static kvf_status hold_batch(kvf_kv *kv, int32_t layer, int64_t first, int64_t *n, kvf_error *err)
{
    kvf_share *s = kv->far->share;
    const kvf_mem *mem = kvf_kv_mem(kv);
    void *frame = s->frame, *seq = s->seq;
    int64_t most = s->left.n - first;
    kvf_status rc = kvf_reserve(mem, &frame, &s->cap_frame, most, sizeof(void *), err);
    s->frame = frame;
    if (rc >= 0) rc = kvf_reserve(mem, &seq, &s->cap_seq, most, sizeof(int32_t), err);
    s->seq = seq;
    KVF_TRY(rc);
    for (*n = 0; *n < most; ++*n) {
        KVF_TRY(kvf_stream_hold(kv, layer, s->left.blocks[first + *n], &s->frame[*n], err));
        if (!s->frame[*n]) break;
        s->seq[*n] = (int32_t)*n;
    }
    if (*n > 0) return KVF_OK;
    return kvf_fail(err, KVF_ERR_INTERNAL, "not one frame of host memory is free");
}

static kvf_status attend_batch(kvf_kv *kv, const kvf_kv_attend_args *a, int32_t set, int64_t first, int64_t n, kvf_error *err)
{
    kvf_share *s = kv->far->share;
    kvf_backend *host = kv->backend->host;
    kvf_kv_view view = { .slab = s->frame, .shift = 0, .slot_bytes = kvf_pool_slot_bytes(kv->pool) };
    int64_t rows = a->n_q * kv->dims.n_head;
    kvf_attn_args t = { .q = s->q, .o = s->o2, .lse = s->lse2, .n_tok = a->n_q, .n_head = kv->dims.n_head,
                        .n_head_kv = kv->dims.n_head_kv, .head_dim = kv->dims.head_dim, .scale = a->scale, .softcap = a->softcap,
                        .kv = &view, .slots = s->seq, .n_key = (n - 1) * KVF_BLOCK + s->left.valid[2 * (first + n) - 1],
                        .q_first = n * KVF_BLOCK, .valid = s->left.valid + 2 * first };
    if (kv->far->m.n_set > 1) {
        t.head_kv0 = set;
        t.head_kv1 = set + 1;
    }
    for (int64_t i = 0; i < rows; i++) s->lse2[i] = -INFINITY; /* of heads that are not computed */
    KVF_TRY(host->ops->attn(host, &t, err));
    kvf_lse_merge_args m = { .o = s->o, .lse = s->lse, .o2 = s->o2, .lse2 = s->lse2, .n_row = rows, .head_dim = kv->dims.head_dim };
    return host->ops->lse_merge(host, &m, err);
}

kvf_status kvf_share_attend(kvf_kv *kv, const kvf_kv_attend_args *a, int32_t set, kvf_error *err)
{
    kvf_share *s = kv->far->share;
    kvf_status rc = KVF_OK;
    for (int64_t first = 0, n = 0; first < s->left.n && rc >= 0; first += n) {
        rc = hold_batch(kv, a->layer, first, &n, err);
        if (rc >= 0) rc = attend_batch(kv, a, set, first, n, err);
        kvf_stream_let_go(kv);
        s->any = true;
    }
    return rc;
}

kvf_status kvf_share_hand_over(kvf_kv *kv, const kvf_kv_attend_args *a, bool *any, kvf_error *err)
{
    kvf_share *s = kv->far->share;
    kvf_backend *be = kv->backend;
    size_t rows = (size_t)a->n_q * (size_t)kv->dims.n_head;
    *any = s->any;
    if (!s->any) return KVF_OK;
    KVF_TRY(be->ops->upload(be, kv->far->o2, s->o, rows * (size_t)kv->dims.head_dim * sizeof(float), err));
    return be->ops->upload(be, kv->far->lse2, s->lse, rows * sizeof(float), err);
}
