/* kv_digest.c - digests of a sequence's blocks. Lookups by them: kv_lookup.c.
 *
 * Two digests per block: a coarse one, kept in memory, for the chunks of a document that is being read;
 * a fine one for questions and answers, in memory until the tier holds it and read in place from there.
 * Both are functions of the raw keys of a whole block, so a store never has to trust an older run.
 * Representatives (InfLLM as published) are the exception: they depend on the queries that passed, are
 * made when a unit leaves the window, and travel in the tail.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "kv/kv_int.h"

enum { GROUP = KVF_GROUP_BLOCKS };

static size_t row_bytes(const kvf_far *f) { return f->reps ? 0 : f->coarse_bytes + f->fine_bytes; }

size_t kvf_kv_digest_bytes(const kvf_kv *kv) { return kv->far ? row_bytes(kv->far) : 0; }

/* ---- Room ------------------------------------------------------------------------------- */

static kvf_status grow_groups(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    if (n <= f->cap_group) return KVF_OK;
    int64_t cap = n + n / 2 + 8, n_layer = kv->dims.n_layer;
    const kvf_mem *mem = kvf_kv_mem(kv);
    void *fine, *rows;
    KVF_TRY(kvf_mem_get(mem, &fine, (size_t)(cap * n_layer), sizeof(void *), err));
    kvf_status rc = kvf_mem_get(mem, &rows, (size_t)(cap * n_layer), sizeof(void *), err);
    if (rc < 0) {
        kvf_free(mem, fine);
        return rc;
    }
    for (int64_t l = 0; f->fine && l < n_layer; l++) {
        memcpy((uint8_t **)fine + l * cap, f->fine + l * f->cap_group, (size_t)f->cap_group * sizeof(void *));
        memcpy((const uint8_t **)rows + l * cap, f->tier_row + l * f->cap_group, (size_t)f->cap_group * sizeof(void *));
    }
    kvf_free(mem, f->fine);
    kvf_free(mem, f->tier_row);
    f->fine = fine;
    f->tier_row = rows;
    f->cap_group = cap;
    return KVF_OK;
}

/* Coarse digests of n blocks, copied to a new place: what kvf_reserve keeps in hand, half, would be 100 MB at 1M tokens. */
static kvf_status grow_coarse(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    for (int32_t l = 0; f->coarse_bytes > 0 && l < kv->dims.n_layer; l++) {
        void *block;
        KVF_TRY(kvf_mem_get(kvf_kv_mem(kv), &block, (size_t)n, f->coarse_bytes, err));
        if (f->coarse[l]) memcpy(block, f->coarse[l], (size_t)f->cap_digest * f->coarse_bytes);
        kvf_free(kvf_kv_mem(kv), f->coarse[l]);
        f->coarse[l] = block;
    }
    return KVF_OK;
}

/* Tables for the digests of n blocks. */
static kvf_status grow_digests(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    KVF_TRY(grow_groups(kv, (n + GROUP - 1) / GROUP, err));
    if (n <= f->cap_digest) return KVF_OK;
    int64_t want = n + n / 8 + GROUP, cap = f->cap_digest;
    void *rows = f->rows;
    KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &rows, &cap, want, sizeof(void *), err));
    f->rows = rows;
    KVF_TRY(grow_coarse(kv, want, err));
    f->cap_digest = want;
    return KVF_OK;
}

static kvf_status fine_group(kvf_kv *kv, int32_t layer, int64_t group, uint8_t **out, kvf_error *err)
{
    kvf_far *f = kv->far;
    uint8_t **at = &f->fine[layer * f->cap_group + group];
    if (!*at) {
        void *block;
        KVF_TRY(kvf_mem_get(kvf_kv_mem(kv), &block, GROUP, f->fine_bytes, err));
        *at = block;
    }
    *out = *at;
    return KVF_OK;
}

size_t kvf_far_digest_memory(const kvf_kv *kv)
{
    const kvf_far *f = kv->far;
    size_t n = 0;
    if (f->sparse) return kvf_sparse_digest_memory(kv);
    for (int64_t i = 0; f->fine && i < f->cap_group * kv->dims.n_layer; i++) n += f->fine[i] ? GROUP * f->fine_bytes : 0;
    n += (size_t)f->n_digest * f->coarse_bytes * (size_t)kv->dims.n_layer;
    for (int32_t l = 0; f->index && l < kv->dims.n_layer; l++) n += f->index[l] ? f->index[l]->ops->bytes(f->index[l]) : 0;
    return n;
}

void kvf_far_digest_close(kvf_kv *kv)
{
    kvf_far *f = kv->far;
    const kvf_mem *mem = kvf_kv_mem(kv);
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        if (f->coarse) kvf_free(mem, f->coarse[l]);
        if (f->index && f->index[l]) f->index[l]->ops->close(f->index[l]);
    }
    for (int64_t i = 0; f->fine && i < f->cap_group * kv->dims.n_layer; i++) kvf_free(mem, f->fine[i]);
    kvf_free(mem, f->fine);
    kvf_free(mem, f->tier_row);
    kvf_free(mem, f->rows);
    kvf_free(mem, f->coarse);
    kvf_free(mem, f->coarse_gap);
    kvf_free(mem, f->index);
    kvf_free(mem, f->score);
}

/* ---- Making them -------------------------------------------------------------------------- */

/* Digests of one block in all layers. */
static kvf_status digest_block(kvf_kv *kv, int64_t block, kvf_digest_args *args, kvf_error *err)
{
    kvf_far *f = kv->far;
    int64_t n = 0;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        kvf_digest_args a = { .kv = kvf_pool_view(kv->pool), .slot = kvf_layer_slots(kv, l)[block], .n_tok = KVF_BLOCK };
        if (f->coarse_bytes > 0) {
            a.digest = &f->m.coarse;
            a.out = f->coarse[l] + (size_t)block * f->coarse_bytes;
            args[n++] = a;
        }
        if (f->fine_bytes > 0) {
            uint8_t *group;
            KVF_TRY(fine_group(kv, l, block / GROUP, &group, err));
            a.digest = &f->m.fine;
            a.out = group + (size_t)(block % GROUP) * f->fine_bytes;
            args[n++] = a;
        }
    }
    return n > 0 ? kv->backend->ops->digest(kv->backend, args, n, err) : KVF_OK;
}

kvf_status kvf_far_digest(kvf_kv *kv, kvf_error *err)
{
    kvf_far *f = kv->far;
    int64_t whole = kv->n_key >> KVF_BLOCK_SHIFT;
    KVF_TRY(grow_digests(kv, whole, err));
    void *args;
    if (whole == f->n_digest) return KVF_OK;
    if (f->reps) {
        f->n_digest = whole;
        return KVF_OK;
    }
    KVF_TRY(kvf_mem_get(kvf_kv_mem(kv), &args, 2 * (size_t)kv->dims.n_layer, sizeof(kvf_digest_args), err));
    kvf_status rc = KVF_OK;
    for (; rc >= 0 && f->n_digest < whole; f->n_digest += rc >= 0) rc = digest_block(kv, f->n_digest, args, err);
    kvf_free(kvf_kv_mem(kv), args);
    return rc;
}

void kvf_far_digest_cut(kvf_kv *kv, int64_t n_tok)
{
    kvf_far *f = kv->far;
    int64_t whole = n_tok >> KVF_BLOCK_SHIFT, units = (kvf_units_end(&f->m, n_tok) - f->m.init) / f->m.unit;
    if (f->n_tier > n_tok) f->n_tier = n_tok;
    if (f->n_digest > whole) f->n_digest = whole;
    if (f->n_row_tier > whole) f->n_row_tier = whole;
    if (f->n_sealed > units) f->n_sealed = units;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        if (f->coarse_gap[l] > whole) f->coarse_gap[l] = whole;
        if (f->index && f->index[l] && f->index[l]->n > units) f->index[l]->ops->reset(f->index[l], NULL);
    }
    if (f->checked > units) f->checked = 0;
    int64_t keep = n_tok > f->score0 ? n_tok - f->score0 : 0;
    if (keep == 0) f->score0 = units == 0 ? 0 : (f->m.init + units * f->m.unit) >> KVF_BLOCK_SHIFT << KVF_BLOCK_SHIFT;
    for (int64_t r = 0; f->score && r < kv->dims.n_layer * kv->dims.n_head; r++)
        for (int64_t i = keep; i < f->cap_score; i++) f->score[r * f->cap_score + i] = 0;
    kvf_far_score_drop(kv);
}

/* ---- Tier -------------------------------------------------------------------------------- */

kvf_status kvf_far_digest_loaded(kvf_kv *kv, kvf_error *err)
{
    kvf_far *f = kv->far;
    int64_t whole = kv->n_key >> KVF_BLOCK_SHIFT;
    KVF_TRY(grow_digests(kv, whole, err));
    f->n_digest = f->n_row_tier = whole;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) f->coarse_gap[l] = f->reps ? 0 : whole;
    for (int64_t i = 0; i < f->cap_group * kv->dims.n_layer; i++) f->tier_row[i] = NULL;
    f->n_sealed = 0; /* representatives come with the tail */
    f->score0 = 0;
    return KVF_OK;
}

bool kvf_far_digests_in_tier(const kvf_kv *kv)
{
    const kvf_far *f = kv->far;
    if (f->n_row_tier > 0 && f->fine_bytes > 0 && !f->reps) return true;
    for (int32_t l = 0; l < kv->dims.n_layer; l++)
        if (f->coarse_gap[l] > 0 && f->coarse_bytes > 0) return true;
    return false;
}

/* Fine digests of whole groups that the tier has are read from there. */
void kvf_far_digest_release(kvf_kv *kv)
{
    kvf_far *f = kv->far;
    if (f->reps || !f->tier || f->tier->digest_bytes == 0) return;
    int64_t groups = f->n_tier / KVF_GROUP_TOKENS;
    if (groups * GROUP > f->n_digest) groups = f->n_digest / GROUP;
    if (groups * GROUP <= f->n_row_tier) return;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        for (int64_t g = f->n_row_tier / GROUP; g < groups; g++) {
            kvf_free(kvf_kv_mem(kv), f->fine[l * f->cap_group + g]);
            f->fine[l * f->cap_group + g] = NULL;
        }
    }
    f->n_row_tier = groups * GROUP;
}

void kvf_far_digest_forget(kvf_kv *kv)
{
    kvf_far *f = kv->far;
    for (int64_t i = 0; i < f->cap_group * kv->dims.n_layer; i++) f->tier_row[i] = NULL;
    f->epoch = f->tier ? f->tier->ops->epoch(f->tier) : 0;
}

/* The tier's digests of a block, coarse then fine, until the tier is no longer held. */
static kvf_status tier_digest(kvf_kv *kv, int32_t layer, int64_t block, const uint8_t **out, kvf_error *err)
{
    kvf_far *f = kv->far;
    if (f->tier->ops->epoch(f->tier) != f->epoch) kvf_far_digest_forget(kv);
    const uint8_t **at = &f->tier_row[layer * f->cap_group + block / GROUP];
    if (!*at) {
        const void *rows;
        KVF_TRY(f->tier->ops->digests(f->tier, layer, block / GROUP, &rows, err));
        *at = rows;
    }
    *out = *at + (size_t)(block % GROUP) * row_bytes(f);
    return KVF_OK;
}

kvf_status kvf_digest_coarse(kvf_kv *kv, int32_t layer, kvf_error *err)
{
    kvf_far *f = kv->far;
    for (int64_t b = 0; b < f->coarse_gap[layer]; b++) {
        const uint8_t *row;
        KVF_TRY(tier_digest(kv, layer, b, &row, err));
        memcpy(f->coarse[layer] + (size_t)b * f->coarse_bytes, row, f->coarse_bytes);
    }
    f->coarse_gap[layer] = 0;
    return KVF_OK;
}

kvf_status kvf_digest_fine(kvf_kv *kv, int32_t layer, int64_t block, const void **out, kvf_error *err)
{
    kvf_far *f = kv->far;
    if (block >= f->n_row_tier) {
        *out = f->fine[layer * f->cap_group + block / GROUP] + (size_t)(block % GROUP) * f->fine_bytes;
        return KVF_OK;
    }
    const uint8_t *row;
    KVF_TRY(tier_digest(kv, layer, block, &row, err));
    *out = row + f->coarse_bytes;
    return KVF_OK;
}

static kvf_status export_rows(kvf_kv *kv, int64_t first, int64_t end, uint8_t *to, kvf_error *err)
{
    kvf_far *f = kv->far;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        KVF_TRY(kvf_digest_coarse(kv, l, err));
        for (int64_t b = first; b < end; b++, to += row_bytes(f)) {
            memset(to, 0, row_bytes(f));
            if (b >= f->n_digest) continue; /* the partly filled last block */
            const void *fine;
            if (f->coarse_bytes > 0) memcpy(to, f->coarse[l] + (size_t)b * f->coarse_bytes, f->coarse_bytes);
            if (f->fine_bytes == 0) continue;
            KVF_TRY(kvf_digest_fine(kv, l, b, &fine, err));
            memcpy(to + f->coarse_bytes, fine, f->fine_bytes);
        }
    }
    return KVF_OK;
}

kvf_status kvf_far_digest_export(kvf_kv *kv, int64_t first, int64_t end, void *out, kvf_error *err)
{
    kvf_tier *t = kv->far->tier;
    if (row_bytes(kv->far) == 0) return KVF_OK;
    if (t) t->ops->hold(t);
    kvf_status rc = export_rows(kv, first, end, out, err);
    if (t) t->ops->unhold(t);
    return rc;
}

kvf_status kvf_far_digest_fork(kvf_kv *to, const kvf_kv *from, kvf_error *err)
{
    kvf_far *t = to->far;
    const kvf_far *f = from->far;
    KVF_TRY(grow_digests(to, f->n_digest, err));
    for (int32_t l = 0; l < from->dims.n_layer; l++) {
        if (f->coarse_bytes > 0 && f->n_digest > 0)
            memcpy(t->coarse[l], f->coarse[l], (size_t)f->n_digest * f->coarse_bytes);
        t->coarse_gap[l] = f->coarse_gap[l];
        for (int64_t g = 0; f->fine_bytes > 0 && g * GROUP < f->n_digest; g++) {
            const uint8_t *have = f->fine[l * f->cap_group + g];
            uint8_t *group;
            if (!have) continue;
            KVF_TRY(fine_group(to, l, g, &group, err));
            memcpy(group, have, GROUP * f->fine_bytes);
        }
    }
    t->n_digest = f->n_digest;
    t->n_row_tier = f->n_row_tier;
    t->n_sealed = f->n_sealed;
    if (!f->score) return KVF_OK;
    void *block;
    KVF_TRY(kvf_mem_get(kvf_kv_mem(to), &block, (size_t)(2 * f->cap_score * from->dims.n_layer * from->dims.n_head),
                        sizeof(float), err));
    t->score = block;
    memcpy(t->score, f->score, (size_t)(f->cap_score * from->dims.n_layer * from->dims.n_head) * sizeof(float));
    t->score0 = f->score0;
    t->cap_score = f->cap_score;
    return KVF_OK;
}

/* ---- Representatives ------------------------------------------------------------------------ */

static int64_t score_rows(const kvf_kv *kv) { return kv->dims.n_layer * kv->dims.n_head; }

/* What the reserved chunk adds to the scores: behind them, theirs with kvf_far_seal, or nobody's. */
static float *fresh_scores(const kvf_kv *kv) { return kv->far->score + score_rows(kv) * kv->far->cap_score; }

void kvf_far_score_drop(kvf_kv *kv)
{
    kvf_far *f = kv->far;
    if (f->score && f->fresh) memset(fresh_scores(kv), 0, (size_t)(score_rows(kv) * f->cap_score) * sizeof *f->score);
    f->fresh = false;
}

static void accept_scores(kvf_kv *kv)
{
    const float *add = fresh_scores(kv);
    for (int64_t i = 0; i < score_rows(kv) * kv->far->cap_score; i++) kv->far->score[i] += add[i];
    kvf_far_score_drop(kv);
}

kvf_status kvf_far_score(kvf_kv *kv, int32_t layer, const float *mass, int64_t first_block, int64_t n_entry,
                         kvf_error *err)
{
    kvf_far *f = kv->far;
    int64_t first = first_block << KVF_BLOCK_SHIFT, end = first + n_entry * KVF_BLOCK;
    int64_t n_row = score_rows(kv);
    if (end - f->score0 > f->cap_score) {
        int64_t cap = end - f->score0 + 4 * KVF_BLOCK;
        void *block;
        KVF_TRY(kvf_mem_get(kvf_kv_mem(kv), &block, (size_t)(2 * cap * n_row), sizeof(float), err));
        for (int64_t r = 0; f->score && r < 2 * n_row; r++)
            memcpy((float *)block + r * cap, f->score + r * f->cap_score, (size_t)f->cap_score * sizeof(float));
        kvf_free(kvf_kv_mem(kv), f->score);
        f->score = block;
        f->cap_score = cap;
    }
    f->fresh = true;
    for (int32_t h = 0; h < kv->dims.n_head; h++) {
        float *to = fresh_scores(kv) + (layer * kv->dims.n_head + h) * f->cap_score;
        const float *add = mass + h * (end - first);
        for (int64_t t = first > f->score0 ? first : f->score0; t < end; t++) to[t - f->score0] += add[t - first];
    }
    return KVF_OK;
}

/* Representatives of one unit of one layer, made with the block's other units and copied alone. */
static kvf_status seal_unit(kvf_kv *kv, int32_t layer, int64_t unit, float *score, uint8_t *made, kvf_error *err)
{
    kvf_far *f = kv->far;
    int64_t at = f->m.init + unit * f->m.unit, block = at >> KVF_BLOCK_SHIFT, base = block << KVF_BLOCK_SHIFT;
    for (int32_t h = 0; h < kv->dims.n_head; h++) {
        int64_t row = (layer * kv->dims.n_head + h) * f->cap_score;
        const float *from = f->score + row, *add = fresh_scores(kv) + row;
        for (int64_t i = 0; i < KVF_BLOCK; i++) {
            int64_t j = base + i - f->score0;
            score[h * KVF_BLOCK + i] = j >= 0 && j < f->cap_score ? from[j] + add[j] : 0;
        }
    }
    KVF_TRY(kvf_far_fetch(kv, layer, block, NULL, err));
    kvf_reps_args a = { .kv = kvf_pool_view(kv->pool), .slot = kvf_layer_slots(kv, layer)[block], .r = f->m.n_repr,
                        .digest = &f->m.coarse, .score = score, .out = made };
    KVF_TRY(kv->backend->ops->reps(kv->backend, &a, err));
    size_t head = kvf_digest_head_bytes(&f->m.coarse), one = head / (size_t)(KVF_BLOCK / f->m.unit);
    size_t place = (size_t)((at - base) / f->m.unit) * one;
    for (int32_t h = 0; h < kv->dims.n_head_kv; h++)
        memcpy(f->coarse[layer] + (size_t)block * f->coarse_bytes + (size_t)h * head + place,
               made + (size_t)h * head + place, one);
    return KVF_OK;
}

static void slide_scores(kvf_kv *kv, int64_t to)
{
    kvf_far *f = kv->far;
    int64_t by = to - f->score0;
    if (by <= 0) return;
    for (int64_t r = 0; r < kv->dims.n_layer * kv->dims.n_head; r++) {
        float *row = f->score + r * f->cap_score;
        int64_t keep = f->cap_score > by ? f->cap_score - by : 0;
        memmove(row, row + by, (size_t)keep * sizeof *row);
        memset(row + keep, 0, (size_t)(f->cap_score - keep) * sizeof *row);
    }
    f->score0 = to;
}

static kvf_status seal_units(kvf_kv *kv, int64_t units, kvf_error *err)
{
    kvf_far *f = kv->far;
    const kvf_mem *mem = kvf_kv_mem(kv);
    void *score, *made;
    KVF_TRY(kvf_mem_get(mem, &score, (size_t)kv->dims.n_head * KVF_BLOCK, sizeof(float), err));
    kvf_status rc = kvf_mem_get(mem, &made, 1, f->coarse_bytes, err);
    if (rc < 0) made = NULL;
    for (int64_t u = f->n_sealed; rc >= 0 && u < units; u++)
        for (int32_t l = 0; rc >= 0 && l < kv->dims.n_layer; l++)
            if (f->layer_window[l] == 0) rc = seal_unit(kv, l, u, score, made, err);
    kvf_free(mem, score);
    kvf_free(mem, made);
    return rc;
}

kvf_status kvf_far_seal(kvf_kv *kv, kvf_error *err)
{
    kvf_far *f = kv->far;
    int64_t units = (kvf_units_end(&f->m, kv->n_key) - f->m.init) / f->m.unit;
    if (!f->reps || !f->score) return KVF_OK;
    if (units > f->n_sealed) KVF_TRY(seal_units(kv, units, err));
    accept_scores(kv);
    if (units <= f->n_sealed) return KVF_OK;
    f->n_sealed = units;
    slide_scores(kv, (f->m.init + units * f->m.unit) >> KVF_BLOCK_SHIFT << KVF_BLOCK_SHIFT);
    return KVF_OK;
}

/* ---- Tail: header, representatives of the sealed blocks, scores ------------------------------- */

typedef struct tail_head {
    uint64_t magic;
    int64_t n_key, n_sealed, n_block, score0, n_score;
} tail_head;
#define TAIL_MAGIC UINT64_C(0x317370657266766b) /* "kvfreps1" */

static tail_head tail_of(const kvf_kv *kv)
{
    const kvf_far *f = kv->far;
    int64_t end = f->m.init + f->n_sealed * f->m.unit;
    return (tail_head){ TAIL_MAGIC, kv->n_key, f->n_sealed, f->n_sealed > 0 ? kvf_blocks_for(end) : 0, f->score0,
                        kv->n_key > f->score0 ? kv->n_key - f->score0 : 0 };
}

static size_t tail_size(const kvf_kv *kv, const tail_head *h)
{
    return sizeof *h + (size_t)kv->dims.n_layer * ((size_t)h->n_block * kv->far->coarse_bytes +
                                                   (size_t)kv->dims.n_head * (size_t)h->n_score * sizeof(float));
}

size_t kvf_kv_tail_bytes(const kvf_kv *kv)
{
    if (!kv->far || !kv->far->reps) return 0;
    tail_head h = tail_of(kv);
    return tail_size(kv, &h);
}

void kvf_kv_tail_save(const kvf_kv *kv, void *out)
{
    const kvf_far *f = kv->far;
    tail_head h = tail_of(kv);
    uint8_t *to = out;
    memcpy(to, &h, sizeof h);
    to += sizeof h;
    for (int32_t l = 0; l < kv->dims.n_layer; l++, to += (size_t)h.n_block * f->coarse_bytes)
        if (h.n_block > 0) memcpy(to, f->coarse[l], (size_t)h.n_block * f->coarse_bytes);
    for (int64_t r = 0; r < kv->dims.n_layer * kv->dims.n_head; r++, to += (size_t)h.n_score * sizeof(float)) {
        memset(to, 0, (size_t)h.n_score * sizeof(float));
        if (f->score) memcpy(to, f->score + r * f->cap_score, (size_t)h.n_score * sizeof(float));
    }
}

kvf_status kvf_kv_tail_load(kvf_kv *kv, const void *data, size_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    if (!f || !f->reps) return KVF_OK;
    tail_head h, want;
    if (n >= sizeof h) memcpy(&h, data, sizeof h);
    int64_t units = (kvf_units_end(&f->m, kv->n_key) - f->m.init) / f->m.unit;
    int64_t score0 = (f->m.init + units * f->m.unit) >> KVF_BLOCK_SHIFT << KVF_BLOCK_SHIFT;
    if (units == 0) score0 = 0;
    want = (tail_head){ TAIL_MAGIC, kv->n_key, units, units > 0 ? kvf_blocks_for(f->m.init + units * f->m.unit) : 0, score0,
                        kv->n_key - score0 };
    if (n < sizeof h || memcmp(&h, &want, sizeof h) != 0 || n != tail_size(kv, &h))
        return kvf_fail(err, KVF_ERR_FORMAT, "the stored representatives do not belong to this document; ingest it again");
    const uint8_t *from = (const uint8_t *)data + sizeof h;
    for (int32_t l = 0; l < kv->dims.n_layer; l++, from += (size_t)h.n_block * f->coarse_bytes)
        if (h.n_block > 0) memcpy(f->coarse[l], from, (size_t)h.n_block * f->coarse_bytes);
    int64_t rows = kv->dims.n_layer * kv->dims.n_head;
    void *block;
    KVF_TRY(kvf_mem_get(kvf_kv_mem(kv), &block, (size_t)(2 * rows * (h.n_score + KVF_BLOCK)), sizeof(float), err));
    kvf_free(kvf_kv_mem(kv), f->score);
    f->score = block;
    f->fresh = false;
    f->cap_score = h.n_score + KVF_BLOCK;
    f->score0 = h.score0;
    f->n_sealed = h.n_sealed;
    for (int64_t r = 0; r < rows; r++, from += (size_t)h.n_score * sizeof(float))
        memcpy(f->score + r * f->cap_score, from, (size_t)h.n_score * sizeof(float));
    return KVF_OK;
}
