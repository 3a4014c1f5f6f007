/* kv_track.c - where the last query of a call looked, per run of tokens: what an answer cites. The calls of one
 * query say so themselves where the backend can (kvf_attn_args.runs), each by its own lse, and are put together
 * when the last is merged; of more queries, or elsewhere, the lists are gone through once more.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "kv/kv_int.h"

enum { RUNS = KVF_BLOCK / KVF_TRACK_TOKENS };

/* Runs of the entries of a list, to the sums. */
static kvf_status add_runs(kvf_kv *kv, const int64_t *blocks, int64_t first_block, int64_t n_entry, const float *runs,
                           float **sums, int64_t *cap, kvf_error *err)
{
    for (int64_t e = 0; e < n_entry; e++) {
        int64_t run = (blocks ? blocks[e] : first_block + e) * RUNS;
        void *grown = *sums;
        KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &grown, cap, run + RUNS, sizeof(float), err));
        *sums = grown;
        if (run + RUNS > kv->n_mass) kv->n_mass = run + RUNS;
        for (int i = 0; i < RUNS; i++) (*sums)[run + i] += runs[e * RUNS + i];
    }
    return KVF_OK;
}

/* ---- Once more over the list ------------------------------------------------------------------- */

/* Attention of query `row` over the list, added to *sums. */
static kvf_status note_row(kvf_kv *kv, const kvf_kv_note *n, int64_t row, float **sums, int64_t *cap, kvf_error *err)
{
    kvf_attn_args one = *n->attn;
    one.q += row * one.n_head * one.head_dim;
    one.lse += row * one.n_head;
    one.q_first += row;
    one.n_tok = 1;
    KVF_TRY(kvf_mass_row(kv, n->n_entry * KVF_BLOCK, err));
    kvf_attn_mass_args a = { .attn = &one, .sum_heads = true, .mass = kv->mass_row };
    KVF_TRY(kv->backend->ops->attn_mass(kv->backend, &a, err));
    float *runs = kv->mass_row; /* sums of a run go where its first key was, or before */
    for (int64_t r = 0; r < n->n_entry * RUNS; r++) {
        float sum = 0;
        for (int i = 0; i < KVF_TRACK_TOKENS; i++) sum += kv->mass_row[r * KVF_TRACK_TOKENS + i];
        runs[r] = sum;
    }
    return add_runs(kv, n->blocks, n->first_block, n->n_entry, runs, sums, cap, err);
}

kvf_status kvf_kv_note_mass(kvf_kv *kv, const kvf_kv_note *n, kvf_error *err)
{
    int64_t rows = n->attn->n_tok;
    KVF_TRY(note_row(kv, n, rows - 1, &kv->mass, &kv->cap_mass, err));
    return rows > 1 && kv->n_last == 0 ? note_row(kv, n, 0, &kv->prior, &kv->cap_prior, err) : KVF_OK;
}

/* ---- By the calls themselves --------------------------------------------------------------------- */

void kvf_look_begin(kvf_kv *kv, int64_t n_q, bool track)
{
    kvf_look *l = &kv->look;
    l->on = track && n_q == 1 && kv->backend->ops->attn_runs;
    l->n_call = l->n_run = l->n_block = 0;
}

static kvf_status look_reserve(kvf_kv *kv, int64_t n_entry, kvf_error *err)
{
    kvf_look *l = &kv->look;
    const kvf_mem *mem = kvf_kv_mem(kv);
    int64_t n_head = kv->dims.n_head;
    void *call = l->call, *runs = l->runs, *block = l->block, *lse = l->lse;
    kvf_status rc = kvf_reserve(mem, &call, &l->cap_call, l->n_call + 1, sizeof *l->call, err);
    l->call = call;
    if (rc >= 0) rc = kvf_reserve(mem, &runs, &l->cap_run, l->n_run + n_entry * RUNS * n_head, sizeof(float), err);
    l->runs = runs;
    if (rc >= 0) rc = kvf_reserve(mem, &block, &l->cap_block, l->n_block + n_entry, sizeof(int64_t), err);
    l->block = block;
    if (rc >= 0) rc = kvf_reserve(mem, &lse, &l->cap_lse, (l->n_call + 2) * n_head, sizeof(float), err); /* and the final */
    l->lse = lse;
    return rc;
}

kvf_status kvf_look_attn(kvf_kv *kv, kvf_attn_args *t, const int64_t *blocks, int64_t first_block, kvf_error *err)
{
    kvf_look *l = &kv->look;
    const kvf_backend_ops *ops = kv->backend->ops;
    int64_t n = kvf_blocks_for(t->n_key);
    if (!l->on || n == 0) return ops->attn(kv->backend, t, err);
    KVF_TRY(look_reserve(kv, n, err));
    t->runs = l->runs + l->n_run;
    kvf_status rc = ops->attn(kv->backend, t, err);
    t->runs = NULL; /* it moves with the next call */
    if (rc < 0) return rc;
    float *lse = l->lse + l->n_call * kv->dims.n_head;
    KVF_TRY(ops->download(kv->backend, lse, t->lse, (size_t)kv->dims.n_head * sizeof *lse, err));
    int32_t group = kv->dims.n_head / kv->dims.n_head_kv, all = t->head_kv1 == 0;
    l->call[l->n_call++] = (kvf_look_call){ .run = l->n_run, .block = l->n_block, .n_entry = n,
                                            .head0 = all ? 0 : t->head_kv0 * group,
                                            .head1 = all ? kv->dims.n_head : t->head_kv1 * group };
    for (int64_t e = 0; e < n; e++) l->block[l->n_block++] = blocks ? blocks[e] : first_block + e;
    l->n_run += n * RUNS * kv->dims.n_head;
    return KVF_OK;
}

kvf_status kvf_look_end(kvf_kv *kv, const float *lse, kvf_error *err)
{
    kvf_look *l = &kv->look;
    int64_t n_head = kv->dims.n_head;
    float *all = l->lse + l->n_call * n_head;
    if (l->n_call == 0) return KVF_OK;
    KVF_TRY(kv->backend->ops->download(kv->backend, all, lse, (size_t)n_head * sizeof *all, err));
    for (const kvf_look_call *c = l->call; c < l->call + l->n_call; c++) {
        int64_t n = c->n_entry * RUNS;
        KVF_TRY(kvf_mass_row(kv, n, err));
        for (int64_t h = c->head0; h < c->head1; h++) {
            const float *runs = l->runs + c->run + h * n;
            float own = l->lse[(c - l->call) * n_head + h], share = own > -INFINITY ? expf(own - all[h]) : 0;
            for (int64_t i = 0; i < n; i++) kv->mass_row[i] += share * runs[i];
        }
        KVF_TRY(add_runs(kv, l->block + c->block, 0, c->n_entry, kv->mass_row, &kv->mass, &kv->cap_mass, err));
    }
    return KVF_OK;
}

void kvf_look_release(kvf_kv *kv)
{
    void *own[] = { kv->look.call, kv->look.runs, kv->look.block, kv->look.lse };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) kvf_free(kvf_kv_mem(kv), own[i]);
}

/* ---- What was noted ------------------------------------------------------------------------------ */

void kvf_kv_track(kvf_kv *kv, bool on)
{
    kv->track = on;
    kv->n_mass = kv->n_last = 0;
    if (kv->mass) memset(kv->mass, 0, (size_t)kv->cap_mass * sizeof *kv->mass);
    if (kv->prior) memset(kv->prior, 0, (size_t)kv->cap_prior * sizeof *kv->prior);
}

kvf_status kvf_kv_tracked(kvf_kv *kv, const float **mass, int64_t *n, kvf_error *err)
{
    *mass = NULL;
    *n = kv->n_last > 0 ? kv->n_mass : 0;
    if (*n == 0) return KVF_OK;
    void *out = kv->noted;
    KVF_TRY(kvf_reserve(kvf_kv_mem(kv), &out, &kv->cap_noted, *n, sizeof(float), err));
    kv->noted = out;
    for (int64_t i = 0; i < *n; i++) {
        float x = i < kv->cap_mass ? kv->mass[i] / (float)kv->n_last : 0, before = i < kv->cap_prior ? kv->prior[i] : 0;
        kv->noted[i] = x > before ? x - before : 0;
    }
    *mass = kv->noted;
    return KVF_OK;
}
