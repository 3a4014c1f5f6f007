/* kv_sparse_digest.c - digests and votes of a sequence that holds some tokens of a text only.
 *
 * A digest is of a block of the text, 128 positions, as everywhere; where a token is not there its place takes
 * the key of a neighbour within its unit, so that best-of and mean stay what they are. It is made when
 * a vote asks for it and tokens of the block have come or gone since. Units without a token never win.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "kv/kv_int.h"

size_t kvf_sparse_digest_memory(const kvf_kv *kv)
{
    const kvf_far *f = kv->far;
    return (size_t)f->sparse->cap_digest * (f->coarse_bytes + f->fine_bytes + 1) * (size_t)kv->dims.n_layer;
}

/* Place of the token at a position, or NO_SLOT. */
static int32_t place_at(const kvf_sparse *sp, int64_t pos) { return pos < sp->cap_place ? sp->place[pos] : NO_SLOT; }

static bool block_is_empty(const kvf_sparse *sp, int64_t block)
{
    for (int64_t i = 0; i < KVF_BLOCK; i++)
        if (place_at(sp, (block << KVF_BLOCK_SHIFT) + i) != NO_SLOT) return false;
    return true;
}

static bool unit_is_empty(const kvf_sparse *sp, int64_t unit, int32_t size)
{
    for (int64_t i = 0; i < size; i++)
        if (place_at(sp, unit * size + i) != NO_SLOT) return false;
    return true;
}

/* Whose key stands at each of the block's positions: the token's, else that of the one before it in the unit,
 * else after it; in a unit without any, of anybody in the block. The block is not empty. */
static void fill_holes(const kvf_sparse *sp, int64_t block, int32_t unit, int32_t *from)
{
    int64_t first = block << KVF_BLOCK_SHIFT;
    int32_t any = NO_SLOT;
    for (int64_t i = 0; i < KVF_BLOCK && any == NO_SLOT; i++) any = place_at(sp, first + i);
    for (int32_t u = 0; u < KVF_BLOCK; u += unit) {
        int32_t last = NO_SLOT;
        for (int32_t i = u; i < u + unit && last == NO_SLOT; i++) last = place_at(sp, first + i);
        if (last == NO_SLOT) last = any;
        for (int32_t i = u; i < u + unit; i++) {
            int32_t own = place_at(sp, first + i);
            if (own != NO_SLOT) last = own;
            from[i] = last;
        }
    }
}

/* Mean attention per query seen; a hole must not be chosen. */
static kvf_status make_reps(kvf_kv *kv, int32_t layer, int64_t block, uint8_t *out, kvf_error *err)
{
    kvf_far *f = kv->far;
    const kvf_sparse *sp = f->sparse;
    int32_t n_head = kv->dims.n_head;
    void *score;
    KVF_TRY(kvf_mem_get(kvf_kv_mem(kv), &score, (size_t)n_head * KVF_BLOCK, sizeof(float), err));
    for (int64_t i = 0; i < KVF_BLOCK; i++) {
        int32_t place = place_at(sp, (block << KVF_BLOCK_SHIFT) + i);
        float seen = place == NO_SLOT ? 0 : sp->seen[layer * sp->cap_score + place];
        for (int32_t h = 0; h < n_head; h++) {
            float sum = place == NO_SLOT ? -1 : sp->score[(layer * n_head + h) * sp->cap_score + place];
            ((float *)score)[h * KVF_BLOCK + i] = seen > 0 ? sum / seen : sum;
        }
    }
    kvf_reps_args a = { .kv = kvf_pool_view(kv->pool), .slot = sp->block.slots[0], .r = f->m.n_repr, .digest = &f->m.coarse,
                        .score = score, .out = out };
    kvf_status rc = kv->backend->ops->reps(kv->backend, &a, err);
    kvf_free(kvf_kv_mem(kv), score);
    return rc;
}

static kvf_status make_digest(kvf_kv *kv, int32_t layer, int64_t block, kvf_error *err)
{
    kvf_far *f = kv->far;
    kvf_sparse *sp = f->sparse;
    int32_t from[KVF_BLOCK];
    fill_holes(sp, block, f->m.unit, from);
    KVF_TRY(kvf_kv_gather_into(kv, &sp->block, kvf_layer_slots(kv, layer), from, KVF_BLOCK, err));
    uint8_t *out = sp->digest[layer] + (size_t)block * (f->coarse_bytes + f->fine_bytes);
    if (f->reps) return make_reps(kv, layer, block, out, err);
    kvf_digest_args args[2];
    int64_t n = 0;
    kvf_digest_args a = { .kv = kvf_pool_view(kv->pool), .slot = sp->block.slots[0], .n_tok = KVF_BLOCK };
    if (f->coarse_bytes > 0) {
        a.digest = &f->m.coarse;
        a.out = out;
        args[n++] = a;
    }
    if (f->fine_bytes > 0) {
        a.digest = &f->m.fine;
        a.out = out + f->coarse_bytes;
        args[n++] = a;
    }
    return n > 0 ? kv->backend->ops->digest(kv->backend, args, n, err) : KVF_OK;
}

/* The digests of the units' blocks that hold tokens, one after another in f->rows. Representatives of a block
 * of which some units are still in a window are made again until all of them have left it. */
static kvf_status list_rows(const kvf_lookup *l, bool fine, int64_t *n, kvf_error *err)
{
    kvf_kv *kv = l->kv;
    kvf_far *f = kv->far;
    kvf_sparse *sp = f->sparse;
    int32_t layer = l->a->layer;
    int64_t first = l->unit0 * f->m.unit >> KVF_BLOCK_SHIFT, past = (l->unit0 + l->n_unit) * f->m.unit, end = kvf_blocks_for(past);
    *n = 0;
    for (int64_t b = first; b < end; b++) {
        if (block_is_empty(sp, b)) continue;
        if (!sp->made[layer][b]) {
            KVF_TRY(make_digest(kv, layer, b, err));
            sp->made[layer][b] = !f->reps || (b + 1) << KVF_BLOCK_SHIFT <= past;
        }
        f->rows[(*n)++] = sp->digest[layer] + (size_t)b * (f->coarse_bytes + f->fine_bytes) + (fine ? f->coarse_bytes : 0);
    }
    return KVF_OK;
}

/* Votes of the blocks that are there, put back where the units stand. */
static void spread(const kvf_lookup *l, const float *got, int64_t n_got, int32_t n_set, float *votes)
{
    const kvf_far *f = l->kv->far;
    int64_t at = 0;
    for (int64_t i = 0; i < l->n_unit; i++) {
        int64_t u = l->unit0 + i;
        bool voted = !block_is_empty(f->sparse, u * f->m.unit >> KVF_BLOCK_SHIFT), any = voted && !unit_is_empty(f->sparse, u, f->m.unit);
        for (int32_t s = 0; s < n_set; s++) votes[s * l->n_unit + i] = any ? got[s * n_got + at] : -INFINITY;
        at += voted;
    }
}

kvf_status kvf_sparse_vote(kvf_lookup *l, bool fine, const kvf_vote_rule *rule, float *votes, kvf_error *err)
{
    kvf_kv *kv = l->kv;
    kvf_far *f = kv->far;
    kvf_sparse *sp = f->sparse;
    if (f->reps) fine = false;
    const kvf_digest *digest = fine ? &f->m.fine : &f->m.coarse;
    if (digest->kind == KVF_DIGEST_NONE) return kvf_fail(err, KVF_ERR_INTERNAL, "a vote by digests that are not kept");
    int32_t per = KVF_BLOCK / f->m.unit, n_set = rule->per_kv_head ? kv->dims.n_head_kv : 1;
    int64_t first = l->unit0 / per, last = (l->unit0 + l->n_unit - 1) / per, n_block, n_got = 0, lead = 0;
    KVF_TRY(list_rows(l, fine, &n_block, err));
    if (n_block > 0) {
        if (!block_is_empty(sp, first)) lead = l->unit0 % per;
        n_got = n_block * per - lead;
        if (!block_is_empty(sp, last)) n_got -= per - 1 - (l->unit0 + l->n_unit - 1) % per;
        void *got = sp->vote;
        KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &got, &sp->cap_vote, n_got * n_set, sizeof(float), err));
        sp->vote = got;
        kvf_vote_args a = { .q = l->a->q_far, .lse = l->lse, .n_q = l->a->n_q, .scale = l->a->scale, .digest = digest,
                            .rows = f->rows, .unit = f->m.unit, .unit0 = lead, .n_unit = n_got, .rule = *rule, .vote = sp->vote };
        KVF_TRY(kv->backend->ops->vote(kv->backend, &a, err));
    }
    spread(l, sp->vote, n_got, n_set, votes);
    return KVF_OK;
}
