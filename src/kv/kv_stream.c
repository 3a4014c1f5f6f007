/* kv_stream.c - blocks on their way from a tier to a device: through frames of pinned host memory, by copies that
 * run beside the kernels, and ahead of their use.
 *
 * A layer reads mostly the blocks that it read a step before. So when a layer's attention is launched, those of
 * the next layer that have left the pool are sent for: the copies run under this layer's feed-forward part.
 * What was sent for and is not asked for costs a copy; it changes no result. Blocks that the next layer is
 * expected to read never make room for others of it.
 *
 * A frame keeps its block until another one needs the frame, first in, first out: a block that comes again comes
 * without the store. Frames take as much memory as the pool may, and 1 GiB at most; where the host
 * refuses more, they stay as few as they are.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "kv/kv_int.h"

#define FRAME_BYTES ((size_t)1 << 30)
#define SLAB_BYTES ((size_t)4 << 20) /* pinning is slow by the call */

/* Blocks a layer read last. */
typedef struct wanted {
    int64_t *blocks;
    int64_t n, cap;
} wanted;

struct kvf_stream {
    void **slab;         /* pinned, per_slab frames each */
    int64_t n_slab, cap_slab, per_slab;
    int64_t n_frame, max_frame, next; /* next: the frame that is given out next once all are there */
    int64_t *owner;      /* [n_frame] layer * cap_block + block, -1: none */
    uint64_t *sent;      /* [n_frame] number of the last copy from it */
    uint64_t *held;      /* [n_frame] == hold: the host reads it */
    uint64_t hold;
    int64_t cap_owner, cap_sent, cap_held;
    uint64_t n_sent, n_done; /* copies begun; those known to have ended */
    int32_t *frame;      /* [n_layer][cap_block] */
    int64_t cap_block;
    bool open;           /* copies were begun that ops do not wait for yet */
    wanted *want;        /* [n_layer] */
};

bool kvf_stream_serves(const kvf_kv *kv) { return kv->backend->ops->fetch != NULL; }

void kvf_stream_close(kvf_kv *kv)
{
    kvf_stream *s = kv->far->stream;
    if (!s) return;
    const kvf_mem *mem = kvf_kv_mem(kv);
    kv->backend->ops->sync(kv->backend, NULL); /* nothing reads the frames any more */
    for (int64_t i = 0; i < s->n_slab; i++) kv->backend->ops->host_release(kv->backend, s->slab[i]);
    for (int32_t l = 0; s->want && l < kv->dims.n_layer; l++) kvf_free(mem, s->want[l].blocks);
    void *own[] = { s->slab, s->owner, s->sent, s->held, s->frame, s->want };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) kvf_free(mem, own[i]);
    kvf_free(mem, s);
    kv->far->stream = NULL;
}

void kvf_stream_forget(kvf_kv *kv)
{
    kvf_stream *s = kv->far ? kv->far->stream : NULL;
    if (!s) return;
    for (int64_t i = 0; i < s->n_frame; i++) s->owner[i] = -1;
    for (int64_t i = 0; i < s->cap_block * kv->dims.n_layer; i++) s->frame[i] = NO_SLOT;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) s->want[l].n = 0;
}

static kvf_status open_stream(kvf_kv *kv, kvf_error *err)
{
    const kvf_mem *mem = kvf_kv_mem(kv);
    size_t slot = kvf_pool_slot_bytes(kv->pool);
    void *block, *want;
    if (kv->far->stream) return KVF_OK;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_stream), err));
    kvf_status rc = kvf_mem_get(mem, &want, (size_t)kv->dims.n_layer, sizeof(wanted), err);
    if (rc < 0) {
        kvf_free(mem, block);
        return rc;
    }
    kvf_stream *s = kv->far->stream = block;
    s->want = want;
    s->hold = 1;
    s->per_slab = SLAB_BYTES > slot ? (int64_t)(SLAB_BYTES / slot) : 1;
    s->max_frame = FRAME_BYTES > slot ? (int64_t)(FRAME_BYTES / slot) : 1;
    if (s->max_frame > kvf_pool_max(kv->pool)) s->max_frame = kvf_pool_max(kv->pool);
    if (s->per_slab > s->max_frame) s->per_slab = s->max_frame;
    return KVF_OK;
}

/* The table of frames follows the tables of slots. */
static kvf_status grow_table(kvf_kv *kv, kvf_error *err)
{
    kvf_stream *s = kv->far->stream;
    const kvf_mem *mem = kvf_kv_mem(kv);
    int64_t was = s->cap_block, now = kv->cap_block;
    void *block;
    if (now <= was) return KVF_OK;
    KVF_TRY(kvf_mem_get(mem, &block, (size_t)(now * kv->dims.n_layer), sizeof(int32_t), err));
    kvf_free(mem, s->frame);
    s->frame = block;
    s->cap_block = now;
    for (int64_t i = 0; i < now * kv->dims.n_layer; i++) s->frame[i] = NO_SLOT;
    for (int64_t i = 0; i < s->n_frame; i++) {
        if (s->owner[i] < 0) continue;
        s->owner[i] = s->owner[i] / was * now + s->owner[i] % was;
        s->frame[s->owner[i]] = (int32_t)i;
    }
    return KVF_OK;
}

static kvf_status add_slab(kvf_kv *kv, kvf_error *err)
{
    kvf_stream *s = kv->far->stream;
    const kvf_mem *mem = kvf_kv_mem(kv);
    int64_t n = s->n_frame + s->per_slab < s->max_frame ? s->per_slab : s->max_frame - s->n_frame;
    void *slab = s->slab, *owner = s->owner, *sent = s->sent, *held = s->held;
    kvf_status rc = kvf_reserve(mem, &slab, &s->cap_slab, s->n_slab + 1, sizeof(void *), err);
    s->slab = slab;
    if (rc >= 0) rc = kvf_reserve(mem, &owner, &s->cap_owner, s->n_frame + n, sizeof(int64_t), err);
    s->owner = owner;
    if (rc >= 0) rc = kvf_reserve(mem, &sent, &s->cap_sent, s->n_frame + n, sizeof(uint64_t), err);
    s->sent = sent;
    if (rc >= 0) rc = kvf_reserve(mem, &held, &s->cap_held, s->n_frame + n, sizeof(uint64_t), err);
    s->held = held;
    if (rc >= 0)
        rc = kv->backend->ops->host_alloc(kv->backend, &s->slab[s->n_slab], (size_t)n * kvf_pool_slot_bytes(kv->pool), err);
    if (rc < 0) return rc;
    for (int64_t i = s->n_frame; i < s->n_frame + n; i++) s->owner[i] = -1;
    s->next = s->n_frame;
    s->n_frame += n;
    s->n_slab++;
    return KVF_OK;
}

static char *frame_at(const kvf_kv *kv, int64_t i)
{
    const kvf_stream *s = kv->far->stream;
    return (char *)s->slab[i / s->per_slab] + (size_t)(i % s->per_slab) * kvf_pool_slot_bytes(kv->pool);
}

/* A frame that no copy reads; -1: the host reads them all. */
static kvf_status take_frame(kvf_kv *kv, int64_t *out, kvf_error *err)
{
    kvf_stream *s = kv->far->stream;
    if (s->next == s->n_frame && s->n_frame < s->max_frame && add_slab(kv, err) < 0) {
        if (s->n_frame == 0) return KVF_ERR_NOMEM; /* err is filled */
        s->max_frame = s->n_frame;
    }
    int64_t i = -1;
    for (int64_t tried = 0; tried < s->n_frame && i < 0; tried++) {
        if (s->next == s->n_frame) s->next = 0;
        if (s->held[s->next] != s->hold) i = s->next;
        s->next++;
    }
    *out = i;
    if (i < 0) return KVF_OK;
    if (s->sent[i] > s->n_done) {
        KVF_TRY(kv->backend->ops->sync(kv->backend, err));
        s->n_done = s->n_sent;
    }
    if (s->owner[i] >= 0) s->frame[s->owner[i]] = NO_SLOT;
    s->owner[i] = -1;
    return KVF_OK;
}

/* The frame of a block, read from the tier if none has it. */
static kvf_status find_frame(kvf_kv *kv, int32_t layer, int64_t block, int64_t *out, kvf_error *err)
{
    KVF_TRY(open_stream(kv, err));
    KVF_TRY(grow_table(kv, err));
    kvf_far *f = kv->far;
    kvf_stream *s = f->stream;
    int64_t at = layer * s->cap_block + block;
    *out = s->frame[at];
    if (*out != NO_SLOT) {
        kv->count.n_far_host++;
        return KVF_OK;
    }
    KVF_TRY(take_frame(kv, out, err));
    if (*out < 0) return KVF_OK;
    KVF_TRY(f->tier->ops->read(f->tier, layer, block, frame_at(kv, *out), err));
    s->owner[*out] = at;
    s->frame[at] = (int32_t)*out;
    return KVF_OK;
}

kvf_status kvf_stream_hold(kvf_kv *kv, int32_t layer, int64_t block, void **frame, kvf_error *err)
{
    int64_t i;
    *frame = NULL;
    KVF_TRY(find_frame(kv, layer, block, &i, err));
    if (i < 0) return KVF_OK;
    kv->far->stream->held[i] = kv->far->stream->hold;
    *frame = frame_at(kv, i);
    return KVF_OK;
}

void kvf_stream_let_go(kvf_kv *kv)
{
    if (kv->far->stream) kv->far->stream->hold++;
}

kvf_status kvf_stream_bring(kvf_kv *kv, int32_t layer, int64_t block, void *slot, kvf_error *err)
{
    int64_t i;
    KVF_TRY(find_frame(kv, layer, block, &i, err));
    kvf_stream *s = kv->far->stream;
    KVF_TRY(kv->backend->ops->fetch(kv->backend, slot, frame_at(kv, i), kvf_pool_slot_bytes(kv->pool), err));
    s->sent[i] = ++s->n_sent;
    s->open = true;
    return KVF_OK;
}

kvf_status kvf_stream_settle(kvf_kv *kv, kvf_error *err)
{
    kvf_stream *s = kv->far->stream;
    if (!s || !s->open) return KVF_OK;
    s->open = false;
    return kv->backend->ops->fetch_wait(kv->backend, err);
}

kvf_status kvf_stream_note(kvf_kv *kv, int32_t layer, const int64_t *blocks, int64_t n, kvf_error *err)
{
    KVF_TRY(open_stream(kv, err));
    wanted *w = &kv->far->stream->want[layer];
    void *list = w->blocks;
    KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &list, &w->cap, w->n + n, sizeof(int64_t), err));
    w->blocks = list;
    for (int64_t i = 0; i < n; i++) w->blocks[w->n++] = blocks[i];
    return KVF_OK;
}

void kvf_stream_unnote(kvf_kv *kv, int32_t layer)
{
    if (kv->far->stream) kv->far->stream->want[layer].n = 0;
}

kvf_status kvf_stream_ahead(kvf_kv *kv, int32_t layer, kvf_error *err)
{
    kvf_far *f = kv->far;
    int32_t next = layer;
    if (!f->stream || !f->tier) return KVF_OK;
    do
        next = next + 1 < kv->dims.n_layer ? next + 1 : 0;
    while (f->layer_window[next] > 0 && next != layer);
    const wanted *w = &f->stream->want[next];
    f->now++; /* this layer's blocks may make room: its attention is launched, and copies come after it */
    return next == layer || w->n == 0 ? KVF_OK : kvf_far_send_for(kv, next, w->blocks, w->n, err);
}
