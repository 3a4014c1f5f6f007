/* seq_case.h - one case of attention over blocks on several ranks: made from its seed alone, so that every
 * rank, thread or process, makes the same, and keeps only its own blocks.
 *
 * No assertion here: these functions run in threads and under mpirun, and return a status.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_COMM_SEQ_CASE_H
#define KVF_TESTS_COMM_SEQ_CASE_H

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/half.h"
#include "comm/seq_attn.h"

typedef struct seq_case {
    uint64_t seed;
    int64_t n_key, n_tok, q_first, n_first, n_last, n_top;
    int32_t n_head, n_head_kv, head_dim;
    float softcap;
    bool max_queries;
    bool ties; /* keys of every third block are the same, values are not */
} seq_case;

static inline uint64_t seq_random(uint64_t *s)
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return *s >> 33;
}

static inline float seq_real(uint64_t *s) { return (float)seq_random(s) / 1073741824.0f - 1.0f; }

static inline int64_t seq_up_to(uint64_t *s, int64_t n) { return (int64_t)(seq_random(s) % (uint64_t)(n + 1)); }

/* Shapes of the number `i`: the first few on purpose, the others by chance. */
static inline seq_case seq_case_of(int i)
{
    static const int64_t edge[][6] = { /* n_key, n_tok, q_first, n_first, n_last, n_top */
        { 0, 1, 0, 0, 0, 0 },      { 1, 1, 1, 0, 0, 4 },       { 128, 1, 128, 1, 1, 0 },   { 129, 1, 128, 0, 1, 0 },
        { 700, 5, 695, 1, 1, 2 },  { 1024, 1, 1024, 0, 0, 3 }, { 900, 140, 760, 1, 2, 1 }, { 640, 200, 440, 0, 0, 99 },
        { 130, 130, 0, 1, 1, 9 },  { 1200, 1, 1199, 0, 0, 0 }, { 1290, 3, 1500, 2, 1, 4 }, { 390, 300, 90, 0, 9, 0 },
    };
    enum { EDGES = sizeof edge / sizeof *edge };
    uint64_t s = 977u * (uint64_t)(i + 1);
    seq_case c = { .seed = s + 5, .n_head = 4, .n_head_kv = 2, .head_dim = 64, .max_queries = i % 2 == 0, .ties = i % 3 == 1 };
    if (i % 4 == 1) c.n_head_kv = 4;
    if (i % 4 == 2) c.n_head = 6, c.head_dim = 72;
    if (i % 5 == 3) c.softcap = 20;
    if (i < EDGES) {
        c.n_key = edge[i][0], c.n_tok = edge[i][1], c.q_first = edge[i][2];
        c.n_first = edge[i][3], c.n_last = edge[i][4], c.n_top = edge[i][5];
        return c;
    }
    c.n_key = 1 + seq_up_to(&s, 2200);
    c.n_tok = i % 3 ? 1 : 1 + seq_up_to(&s, 40);
    c.q_first = i % 3 == 2 ? seq_up_to(&s, 3 * c.n_key) : c.n_key > c.n_tok ? c.n_key - c.n_tok : 0;
    c.n_first = seq_up_to(&s, 2);
    c.n_last = 1 + seq_up_to(&s, 2);
    c.n_top = seq_up_to(&s, 6);
    return c;
}

/* K or V of one block and head, [128][head_dim]; NaN past the sequence's end. */
static inline void seq_block(const seq_case *c, int64_t b, int32_t h, bool values, kvf_f16 *out)
{
    uint64_t s = c->seed + 7919u * (uint64_t)(c->ties && !values ? b % 3 : b) + 131u * (uint64_t)h + values;
    for (int i = 0; i < 8; i++) seq_random(&s);
    for (int64_t t = 0; t < KVF_BLOCK; t++)
        for (int32_t d = 0; d < c->head_dim; d++) {
            kvf_f16 x = kvf_f16_from_f32(seq_real(&s));
            out[t * c->head_dim + d] = b * KVF_BLOCK + t < c->n_key ? x : 0x7e00;
        }
}

typedef struct seq_result {
    float *o, *lse; /* host */
    kvf_seq_report report;
} seq_result;

static inline size_t seq_rows(const seq_case *c) { return (size_t)(c->n_tok * c->n_head); }

/* A rank's memory: slots and digests of its blocks, queries, results. */
typedef struct seq_room {
    void *slab[1], *q, *o, *lse, *rows_bytes;
    const void **rows;
    int32_t *slots;
    kvf_digest digest;
    kvf_kv_view view;
} seq_room;

static inline void seq_release(kvf_backend *be, seq_room *r)
{
    void *dev[] = { r->slab[0], r->q, r->o, r->lse };
    for (size_t i = 0; i < sizeof dev / sizeof *dev; i++)
        if (dev[i]) be->ops->release(be, dev[i]);
    kvf_free(be->mem, r->rows_bytes);
    kvf_free(be->mem, r->rows);
    kvf_free(be->mem, r->slots);
}

static inline kvf_status seq_fill_block(kvf_backend *be, const seq_case *c, seq_room *r, int64_t i, int64_t b, kvf_error *err)
{
    size_t plane = (size_t)KVF_BLOCK * (size_t)c->head_dim;
    void *slot;
    KVF_TRY(kvf_mem_get(be->mem, &slot, r->view.slot_bytes, 1, err));
    for (int32_t h = 0; h < 2 * c->n_head_kv; h++) seq_block(c, b, h % c->n_head_kv, h >= c->n_head_kv, (kvf_f16 *)slot + (size_t)h * plane);
    kvf_status rc = be->ops->upload(be, kvf_kv_slot(&r->view, r->slots[i]), slot, r->view.slot_bytes, err);
    kvf_free(be->mem, slot);
    KVF_TRY(rc);
    int64_t n = c->n_key - b * KVF_BLOCK;
    kvf_digest_args d = { &r->view, r->slots[i], (int32_t)(n < KVF_BLOCK ? n : KVF_BLOCK), &r->digest, (void *)(uintptr_t)r->rows[i] };
    return be->ops->digest(be, &d, 1, err);
}

static inline kvf_status seq_fill(kvf_backend *be, const kvf_comm *comm, const seq_case *c, seq_room *r, kvf_error *err)
{
    int64_t n = kvf_seq_mine(c->n_key, comm->rank, comm->size);
    size_t q_bytes = seq_rows(c) * (size_t)c->head_dim * sizeof(float), lse_bytes = seq_rows(c) * sizeof(float), each;
    void *block;
    r->digest = (kvf_digest){ KVF_DIGEST_MEAN, 0, 16, false, c->n_head, c->n_head_kv, c->head_dim };
    each = kvf_digest_bytes(&r->digest);
    r->view = (kvf_kv_view){ r->slab, 30, (size_t)4 * (size_t)c->n_head_kv * KVF_BLOCK * (size_t)c->head_dim };
    KVF_TRY(kvf_mem_get(be->mem, &r->rows_bytes, (size_t)n, each, err));
    KVF_TRY(kvf_mem_get(be->mem, &block, (size_t)n, sizeof(void *), err));
    r->rows = block;
    KVF_TRY(kvf_mem_get(be->mem, &block, (size_t)n, sizeof(int32_t), err));
    r->slots = block;
    KVF_TRY(be->ops->alloc(be, &r->slab[0], (size_t)(n + 1) * r->view.slot_bytes, err));
    KVF_TRY(be->ops->alloc(be, &r->q, q_bytes, err));
    KVF_TRY(be->ops->alloc(be, &r->o, q_bytes, err));
    KVF_TRY(be->ops->alloc(be, &r->lse, lse_bytes, err));
    for (int64_t i = 0; i < n; i++) {
        r->slots[i] = (int32_t)(n - 1 - i);
        r->rows[i] = (char *)r->rows_bytes + (size_t)i * each;
        KVF_TRY(seq_fill_block(be, c, r, i, comm->rank + i * comm->size, err));
    }
    KVF_TRY(kvf_mem_get(be->mem, &block, q_bytes, 1, err));
    uint64_t s = c->seed + 3;
    for (size_t i = 0; i < q_bytes / sizeof(float); i++) ((float *)block)[i] = 1.5f * seq_real(&s);
    kvf_status rc = be->ops->upload(be, r->q, block, q_bytes, err);
    memset(block, 0xff, q_bytes);
    if (rc >= 0) rc = be->ops->upload(be, r->o, block, q_bytes, err);
    if (rc >= 0) rc = be->ops->upload(be, r->lse, block, lse_bytes, err);
    kvf_free(be->mem, block);
    return rc;
}

static inline kvf_status seq_attend(kvf_comm *comm, kvf_backend *be, const seq_case *c, seq_room *r, seq_result *out, kvf_error *err)
{
    kvf_seq *s;
    KVF_TRY(seq_fill(be, comm, c, r, err));
    KVF_TRY(kvf_seq_open(&s, comm, be, err));
    kvf_seq_args a = { .q = r->q, .o = r->o, .lse = r->lse, .n_tok = c->n_tok, .n_head = c->n_head, .n_head_kv = c->n_head_kv,
                       .head_dim = c->head_dim, .scale = 0.25f, .softcap = c->softcap, .n_key = c->n_key, .q_first = c->q_first,
                       .kv = &r->view, .slots = r->slots, .n_first = c->n_first, .n_last = c->n_last, .n_top = c->n_top,
                       .digest = &r->digest, .rows = r->rows, .max_queries = c->max_queries };
    kvf_status rc = kvf_seq_attend(s, &a, &out->report, err);
    kvf_seq_close(s);
    KVF_TRY(rc);
    KVF_TRY(be->ops->download(be, out->o, r->o, seq_rows(c) * (size_t)c->head_dim * sizeof(float), err));
    return be->ops->download(be, out->lse, r->lse, seq_rows(c) * sizeof(float), err);
}

/* One rank's part of a case; o and lse of the result are the caller's. */
static inline kvf_status seq_run(kvf_comm *comm, kvf_backend *be, const seq_case *c, seq_result *out, kvf_error *err)
{
    seq_room r;
    memset(&r, 0, sizeof r);
    kvf_turn_take(&be->run);
    kvf_status rc = seq_attend(comm, be, c, &r, out, err);
    seq_release(be, &r);
    kvf_turn_give(&be->run);
    return rc;
}

static inline kvf_status seq_result_open(seq_result *r, const seq_case *c, kvf_error *err)
{
    void *o, *lse;
    KVF_TRY(kvf_mem_get(&kvf_mem_default, &o, seq_rows(c) * (size_t)c->head_dim, sizeof(float), err));
    KVF_TRY(kvf_mem_get(&kvf_mem_default, &lse, seq_rows(c), sizeof(float), err));
    *r = (seq_result){ .o = o, .lse = lse };
    return KVF_OK;
}

static inline void seq_result_close(seq_result *r)
{
    kvf_free(&kvf_mem_default, r->o);
    kvf_free(&kvf_mem_default, r->lse);
}

/* Largest distance of two results; -inf must meet -inf, NaN is infinitely far. */
static inline double seq_distance(const seq_case *c, const seq_result *a, const seq_result *b)
{
    double worst = 0;
    size_t n = seq_rows(c) * (size_t)c->head_dim;
    for (size_t i = 0; i < n + seq_rows(c); i++) {
        float x = i < n ? a->o[i] : a->lse[i - n], y = i < n ? b->o[i] : b->lse[i - n];
        if (x == y) continue;
        double d = fabs((double)x - (double)y);
        if (!(d <= worst)) worst = isfinite(d) ? d : (double)INFINITY;
    }
    return worst;
}

/* The bits of two results are the same. */
static inline bool seq_same(const seq_case *c, const seq_result *a, const seq_result *b)
{
    return memcmp(a->o, b->o, seq_rows(c) * (size_t)c->head_dim * sizeof(float)) == 0 &&
           memcmp(a->lse, b->lse, seq_rows(c) * sizeof(float)) == 0;
}

#endif
