/* encode_device.c - what of a tower's pass is different where arrays are a device's: vectors, positions, attention and
 * the way back. Products, norms and activations are the backend's ops in encode.c.
 *
 * Attention rounds keys, values and, with many queries, queries and weights to f16. The scores of the last layer are
 * the engine's sums of attention (attn_mass): the share each patch received, with the queries' own lse.
 *
 * Source: as encode.c.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "vision/encode_int.h"

/* ---- Opening ----------------------------------------------------------------------------------- */

static void rebase(const kvf_vision *v, const float **p)
{
    if (*p) *p = v->dev_vectors + (*p - v->vectors);
}

kvf_status kvf_vision_to_device(kvf_vision *v, kvf_error *err)
{
    kvf_backend *b = v->env.backend;
    size_t bytes = (size_t)v->n_vector * sizeof(float);
    void *block;
    KVF_TRY(b->ops->alloc(b, &block, bytes, err));
    v->dev_vectors = block;
    KVF_TRY(b->ops->upload(b, block, v->vectors, bytes, err));
    const float **all[] = { &v->patch_b, &v->class_embd, &v->pos, &v->pre_w, &v->pre_b, &v->post_w, &v->post_b, &v->mm0_b, &v->mm2_b };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) rebase(v, all[i]);
    for (int32_t l = 0; l < v->hp.n_layer; l++) {
        kvf_vision_layer *y = &v->layers[l];
        const float **of[] = { &y->ln1_w, &y->ln1_b, &y->ln2_w, &y->ln2_b, &y->q_b, &y->k_b, &y->v_b, &y->o_b, &y->up_b, &y->down_b };
        for (size_t i = 0; i < sizeof of / sizeof *of; i++) rebase(v, of[i]);
    }
    return KVF_OK;
}

/* ---- Copies ------------------------------------------------------------------------------------ */

kvf_status kvf_vision_send(kvf_vision_call *r, float *to, const float *from, int64_t n)
{
    kvf_backend *b = r->v->env.backend;
    return b->ops->upload(b, to, from, (size_t)n * sizeof *to, r->err);
}

kvf_status kvf_vision_fetch(kvf_vision_call *r, float *to, const float *from, int64_t n)
{
    kvf_backend *b = r->v->env.backend;
    return b->ops->download(b, to, from, (size_t)n * sizeof *to, r->err);
}

static kvf_status move(kvf_vision_call *r, float *to, const float *from, int64_t n)
{
    kvf_backend *b = r->v->env.backend;
    return b->ops->copy(b, to, from, (size_t)n * sizeof *to, r->err);
}

/* ---- The pass ----------------------------------------------------------------------------------- */

kvf_status kvf_vision_dev_positions(kvf_vision_call *r)
{
    const kvf_vision *v = r->v;
    kvf_backend *b = v->env.backend;
    int64_t w = v->hp.width, skip = v->hp.has_class ? 1 : 0, n_pos = v->hp.n_pos, n_patch = v->hp.n_patch;
    for (int64_t f = 0; f < r->n; f++) {
        float *x = r->x + f * n_pos * w;
        if (skip) KVF_TRY(move(r, x, v->class_embd, w));
        KVF_TRY(move(r, x + skip * w, r->q + f * n_patch * w, n_patch * w));
        KVF_TRY(b->ops->add(b, x, v->pos, n_pos * w, r->err));
    }
    return KVF_OK;
}

/* Attention that each position of a frame received, summed over heads and queries. */
static kvf_status received(kvf_vision_call *r, int64_t frame)
{
    const kvf_vision_hparams *hp = &r->v->hp;
    kvf_backend *b = r->v->env.backend;
    int64_t n = kvf_vision_slots(r->v) * KVF_BLOCK;
    void *slab[1] = { r->slots };
    kvf_kv_view view = { .slab = slab, .shift = 30, .slot_bytes = kvf_vision_slot_bytes(r->v) };
    kvf_attn_args a = { .q = r->q + frame * hp->n_pos * hp->width, .lse = r->lse, .n_tok = hp->n_pos, .n_head = hp->n_head,
                        .n_head_kv = hp->n_head, .head_dim = hp->head_dim, .scale = 1 / sqrtf((float)hp->head_dim), .kv = &view,
                        .slots = r->slot_list, .n_key = hp->n_pos, .q_first = hp->n_pos };
    kvf_attn_mass_args m = { .attn = &a, .sum_heads = true, .mass = r->staging };
    memset(r->staging, 0, (size_t)n * sizeof *r->staging);
    KVF_TRY(b->ops->attn_mass(b, &m, r->err));
    memcpy(r->mass + frame * hp->n_pos, r->staging, (size_t)hp->n_pos * sizeof *r->mass);
    return KVF_OK;
}

kvf_status kvf_vision_dev_attend(kvf_vision_call *r, bool scores)
{
    for (int64_t f = 0; f < r->n; f++) {
        KVF_TRY(kvf_vision_attend_frame(r, f, scores ? r->lse : NULL));
        if (scores) KVF_TRY(received(r, f));
    }
    return KVF_OK;
}

kvf_status kvf_vision_dev_patches(kvf_vision_call *r, const float **out)
{
    const kvf_vision_hparams *hp = &r->v->hp;
    int64_t row = hp->width, frame = (int64_t)hp->n_patch * row;
    *out = hp->has_class ? r->h : r->x;
    for (int64_t f = 0; hp->has_class && f < r->n; f++) KVF_TRY(move(r, r->h + f * frame, r->x + (f * hp->n_pos + 1) * row, frame));
    return KVF_OK;
}
