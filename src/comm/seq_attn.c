/* seq_attn.c - see seq_attn.h.
 *
 * An error on one rank alone (out of memory, a device that fails) leaves the others waiting for it: the caller
 * closes its communicator then, which frees them.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "comm/seq_attn.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/top.h"

/* What ranks tell of their best blocks. */
typedef struct scored {
    float score;   /* -inf: no block */
    int32_t rank;
    int64_t block; /* of the sequence */
} scored;

struct kvf_seq {
    kvf_comm *comm;
    kvf_backend *be;
    const kvf_mem *mem;

    /* Host, by own blocks. */
    float *vote;
    uint8_t *keep;
    int32_t *list;
    int64_t cap_vote, cap_keep, cap_list;
    int32_t *place; /* host, by queries */
    int64_t cap_place;
    scored *best, *all; /* host, [n_top], [size][n_top] */
    int64_t cap_best, cap_all;

    void *staging;        /* host, for results that a host communicator carries */
    int64_t cap_staging;
    char *mine, *gathered; /* backend memory: (o, lse) of this rank, of all */
    size_t mine_bytes, gathered_bytes;
};

kvf_status kvf_seq_open(kvf_seq **out, kvf_comm *comm, kvf_backend *backend, kvf_error *err)
{
    void *block;
    *out = NULL;
    KVF_TRY(kvf_mem_get(backend->mem, &block, 1, sizeof(kvf_seq), err));
    kvf_seq *s = block;
    s->comm = comm;
    s->be = backend;
    s->mem = backend->mem;
    *out = s;
    return KVF_OK;
}

void kvf_seq_close(kvf_seq *s)
{
    if (!s) return;
    void *own[] = { s->vote, s->keep, s->list, s->place, s->best, s->all, s->staging };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) kvf_free(s->mem, own[i]);
    if (s->mine) s->be->ops->release(s->be, s->mine);
    if (s->gathered) s->be->ops->release(s->be, s->gathered);
    kvf_free(s->mem, s);
}

static int64_t blocks_for(int64_t n_key) { return (n_key + KVF_BLOCK - 1) >> KVF_BLOCK_SHIFT; }

int64_t kvf_seq_mine(int64_t n_key, int32_t rank, int32_t size)
{
    int64_t n = blocks_for(n_key);
    return n > rank ? (n - rank - 1) / size + 1 : 0;
}

/* ---- Which blocks ------------------------------------------------------------------------- */

/* One call: own blocks i0 <= i < i1 are candidates, the others are always read. */
typedef struct call {
    kvf_seq *s;
    const kvf_seq_args *a;
    kvf_seq_report report;
    int64_t n_mine, i0, i1;
} call;

/* Ranks of one process may share a backend, so it is free while this one waits. */
static kvf_status gather(call *c, const void *mine, void *all, size_t bytes, kvf_error *err)
{
    kvf_seq *s = c->s;
    c->report.n_gather++;
    c->report.sent_bytes += bytes;
    kvf_turn_give(&s->be->run);
    kvf_status rc = s->comm->ops->allgather(s->comm, mine, all, bytes, err);
    kvf_turn_take(&s->be->run);
    return rc;
}

static kvf_status need(kvf_seq *s, char **at, size_t *have, size_t bytes, kvf_error *err)
{
    if (bytes <= *have) return KVF_OK;
    if (*at) s->be->ops->release(s->be, *at);
    *at = NULL;
    *have = 0;
    void *block;
    KVF_TRY(s->be->ops->alloc(s->be, &block, bytes, err));
    *at = block;
    *have = bytes;
    return KVF_OK;
}

/* Host memory of all ranks, through the device where the communicator knows only that. */
static kvf_status gather_host(call *c, const void *mine, void *all, size_t bytes, kvf_error *err)
{
    kvf_seq *s = c->s;
    const kvf_backend_ops *ops = s->be->ops;
    if (!s->comm->device) return gather(c, mine, all, bytes, err);
    size_t total;
    if (!kvf_mul_size(bytes, (size_t)s->comm->size, &total)) return kvf_fail(err, KVF_ERR_NOMEM, "too many scores to exchange");
    KVF_TRY(need(s, &s->mine, &s->mine_bytes, bytes, err));
    KVF_TRY(need(s, &s->gathered, &s->gathered_bytes, total, err));
    KVF_TRY(ops->upload(s->be, s->mine, mine, bytes, err));
    KVF_TRY(gather(c, s->mine, s->gathered, bytes, err));
    return ops->download(s->be, all, s->gathered, total, err);
}

/* Scores of own candidates into s->vote. */
static kvf_status score(call *c, kvf_error *err)
{
    kvf_seq *s = c->s;
    const kvf_seq_args *a = c->a;
    int64_t n = c->i1 - c->i0;
    void *vote = s->vote;
    KVF_TRY(kvf_reserve(s->mem, &vote, &s->cap_vote, n, sizeof *s->vote, err));
    s->vote = vote;
    if (n == 0) return KVF_OK;
    kvf_vote_args v = { .q = a->q, .n_q = a->n_tok, .scale = a->scale, .digest = a->digest, .rows = a->rows + c->i0,
                        .unit = KVF_BLOCK, .n_unit = n,
                        .rule = { .kind = KVF_VOTE_LIN, .max_queries = a->max_queries, .pool = 1 }, .vote = s->vote };
    return s->be->ops->vote(s->be, &v, err);
}

/* Higher scores first, then earlier blocks. */
static int better(const void *x, const void *y)
{
    const scored *a = x, *b = y;
    if (a->score != b->score) return a->score > b->score ? -1 : 1;
    return (a->block > b->block) - (a->block < b->block);
}

/* The best n_top of own candidates, best first; what is missing has no block. */
static void list_best(call *c)
{
    kvf_seq *s = c->s;
    int64_t n = c->i1 - c->i0, at = 0, n_top = c->a->n_top;
    uint8_t *keep = n > 0 ? s->keep + c->i0 : NULL;
    kvf_top(s->vote, n, n_top, keep);
    for (int64_t i = 0; i < n; i++) {
        if (!keep[i]) continue;
        float x = isnan(s->vote[i]) ? -INFINITY : s->vote[i];
        s->best[at++] = (scored){ x, s->comm->rank, s->comm->rank + (c->i0 + i) * s->comm->size };
    }
    if (n > 0) memset(keep, 0, (size_t)n); /* a rank without blocks has no list */
    qsort(s->best, (size_t)at, sizeof *s->best, better);
    for (; at < n_top; at++) s->best[at] = (scored){ -INFINITY, s->comm->rank, INT64_MAX };
}

/* keep: own blocks among the best n_top of all. The same on every rank: all have the same list. */
static kvf_status choose_top(call *c, kvf_error *err)
{
    kvf_seq *s = c->s;
    int64_t k = c->a->n_top, n = k * s->comm->size;
    void *best = s->best, *all = s->all;
    KVF_TRY(score(c, err));
    KVF_TRY(kvf_reserve(s->mem, &best, &s->cap_best, k, sizeof *s->best, err));
    s->best = best;
    KVF_TRY(kvf_reserve(s->mem, &all, &s->cap_all, n, sizeof *s->all, err));
    s->all = all;
    if (k == 0) return KVF_OK;
    list_best(c);
    KVF_TRY(gather_host(c, s->best, s->all, (size_t)k * sizeof *s->best, err));
    qsort(s->all, (size_t)n, sizeof *s->all, better);
    for (int64_t i = 0; i < k; i++) {
        int64_t mine = s->all[i].block / s->comm->size;
        if (s->all[i].rank != s->comm->rank || s->all[i].block == INT64_MAX) continue;
        if (mine < c->i0 || mine >= c->i1) return kvf_fail(err, KVF_ERR_INTERNAL, "a block that is not here was chosen");
        s->keep[mine] = 1;
    }
    return KVF_OK;
}

/* First own block at or after block b of the sequence. */
static int64_t first_mine(const kvf_comm *comm, int64_t b) { return b > comm->rank ? (b - comm->rank - 1) / comm->size + 1 : 0; }

static kvf_status choose(call *c, kvf_error *err)
{
    kvf_seq *s = c->s;
    const kvf_seq_args *a = c->a;
    int64_t n = blocks_for(a->n_key), head = a->n_first < n ? a->n_first : n, tail = a->n_last < n - head ? a->n_last : n - head;
    bool some = n - head - tail > a->n_top;
    void *keep = s->keep;
    c->n_mine = kvf_seq_mine(a->n_key, s->comm->rank, s->comm->size);
    c->i0 = first_mine(s->comm, head);
    c->i1 = first_mine(s->comm, n - tail);
    if (c->i1 > c->n_mine) c->i1 = c->n_mine;
    if (c->i0 > c->i1) c->i0 = c->i1;
    KVF_TRY(kvf_reserve(s->mem, &keep, &s->cap_keep, c->n_mine, 1, err));
    s->keep = keep;
    for (int64_t i = 0; i < c->n_mine; i++) s->keep[i] = !some || i < c->i0 || i >= c->i1;
    if (!some) return KVF_OK;
    if (!a->digest || a->digest->kind == KVF_DIGEST_NONE || (c->i1 > c->i0 && !a->rows))
        return kvf_fail(err, KVF_ERR_ARG, "%lld of %lld blocks are to be chosen, and there are no digests to choose by",
                        (long long)a->n_top, (long long)(n - head - tail));
    return choose_top(c, err);
}

/* ---- Attention ------------------------------------------------------------------------------ */

/* Places of the queries in the list of chosen own blocks: query i stands at the last key it sees, -1 if it
 * sees none. *rows: the first query that sees one. */
static kvf_status find_places(call *c, const int64_t *block, int64_t n, int64_t *first, kvf_error *err)
{
    kvf_seq *s = c->s;
    const kvf_seq_args *a = c->a;
    void *place = s->place;
    KVF_TRY(kvf_reserve(s->mem, &place, &s->cap_place, a->n_tok, sizeof *s->place, err));
    s->place = place;
    int64_t e = 0;
    *first = a->n_tok;
    for (int64_t i = 0; i < a->n_tok; i++) {
        int64_t p = a->q_first + i, b = p >> KVF_BLOCK_SHIFT;
        while (e < n && block[e] < b) e++;
        int64_t seen = e * KVF_BLOCK + (e < n && block[e] == b ? (p & (KVF_BLOCK - 1)) + 1 : 0);
        s->place[i] = (int32_t)(seen - 1);
        if (seen > 0 && *first == a->n_tok) *first = i;
    }
    return KVF_OK;
}

/* o and lse of the chosen own blocks. */
static kvf_status attend_own(call *c, float *o, float *lse, kvf_error *err)
{
    kvf_seq *s = c->s;
    const kvf_seq_args *a = c->a;
    int64_t n = 0, n_all = blocks_for(a->n_key), first = 0, width = (int64_t)a->n_head * a->head_dim;
    void *list = s->list, *ids;
    KVF_TRY(kvf_reserve(s->mem, &list, &s->cap_list, c->n_mine, sizeof *s->list, err));
    s->list = list;
    KVF_TRY(kvf_mem_get(s->mem, &ids, (size_t)c->n_mine, sizeof(int64_t), err));
    int64_t *block = ids;
    for (int64_t i = 0; i < c->n_mine; i++) {
        if (!s->keep[i]) continue;
        block[n] = s->comm->rank + i * s->comm->size;
        s->list[n++] = a->slots[i];
    }
    c->report.n_block = c->n_mine;
    c->report.n_read = n;
    int64_t n_key = n * KVF_BLOCK;
    if (n > 0 && block[n - 1] == n_all - 1) n_key -= n_all * KVF_BLOCK - a->n_key; /* the last block of all may be shorter */
    kvf_status rc = find_places(c, block, n, &first, err);
    kvf_free(s->mem, ids);
    KVF_TRY(rc);
    kvf_attn_args t = { .q = a->q, .o = o, .lse = lse, .n_tok = first, .n_head = a->n_head, .n_head_kv = a->n_head_kv,
                        .head_dim = a->head_dim, .scale = a->scale, .softcap = a->softcap, .kv = a->kv, .slots = s->list };
    if (first > 0) KVF_TRY(s->be->ops->attn(s->be, &t, err)); /* over no keys: o = 0, lse = -inf */
    if (first == a->n_tok) return KVF_OK;
    t.q += first * width;
    t.o += first * width;
    t.lse += first * a->n_head;
    t.n_tok = a->n_tok - first;
    t.n_key = n_key;
    if (a->q_first >= a->n_key - 1)
        t.q_first = n_key; /* all see all */
    else
        t.place = s->place + first;
    return s->be->ops->attn(s->be, &t, err);
}

/* (o, lse) of all ranks, one after another, into s->gathered. */
static kvf_status gather_results(call *c, size_t bytes, kvf_error *err)
{
    kvf_seq *s = c->s;
    const kvf_backend_ops *ops = s->be->ops;
    size_t size = (size_t)s->comm->size, total;
    if (!kvf_mul_size(bytes, size + 1, &total) || total > INT64_MAX) return kvf_fail(err, KVF_ERR_NOMEM, "too many results to exchange");
    KVF_TRY(need(s, &s->gathered, &s->gathered_bytes, bytes * size, err));
    if (s->comm->device) return gather(c, s->mine, s->gathered, bytes, err);
    void *staging = s->staging;
    KVF_TRY(kvf_reserve(s->mem, &staging, &s->cap_staging, (int64_t)total, 1, err));
    s->staging = staging;
    char *all = (char *)staging + bytes;
    KVF_TRY(ops->download(s->be, staging, s->mine, bytes, err));
    KVF_TRY(gather(c, staging, all, bytes, err));
    return ops->upload(s->be, s->gathered, all, bytes * size, err);
}

static kvf_status merge(call *c, size_t bytes, size_t o_bytes, kvf_error *err)
{
    kvf_seq *s = c->s;
    const kvf_seq_args *a = c->a;
    const kvf_backend_ops *ops = s->be->ops;
    int64_t n_row = a->n_tok * a->n_head;
    KVF_TRY(ops->copy(s->be, a->o, s->gathered, o_bytes, err));
    KVF_TRY(ops->copy(s->be, a->lse, s->gathered + o_bytes, (size_t)n_row * sizeof(float), err));
    for (int32_t r = 1; r < s->comm->size; r++) {
        const char *at = s->gathered + (size_t)r * bytes;
        kvf_lse_merge_args m = { .o = a->o, .lse = a->lse, .o2 = (const float *)(const void *)at,
                                 .lse2 = (const float *)(const void *)(at + o_bytes), .n_row = n_row, .head_dim = a->head_dim };
        KVF_TRY(ops->lse_merge(s->be, &m, err));
    }
    return KVF_OK;
}

static kvf_status check(const kvf_seq_args *a, kvf_error *err)
{
    bool ok = a->n_tok >= 1 && a->n_tok <= INT32_MAX && a->n_head_kv >= 1 && a->n_head >= 1 && a->n_head % a->n_head_kv == 0 &&
              a->head_dim >= 8 && a->n_key >= 0 && a->n_key <= INT32_MAX && a->q_first >= 0 && a->q_first <= INT32_MAX &&
              a->n_first >= 0 && a->n_last >= 0 && a->n_top >= 0 && a->q && a->o && a->lse && a->o != a->q;
    if (ok) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "attention of %lld queries at %lld over %lld keys on several ranks: a count is out of range",
                    (long long)a->n_tok, (long long)a->q_first, (long long)a->n_key);
}

kvf_status kvf_seq_attend(kvf_seq *s, const kvf_seq_args *a, kvf_seq_report *report, kvf_error *err)
{
    KVF_TRY(check(a, err));
    call c = { .s = s, .a = a };
    size_t rows = (size_t)a->n_tok * (size_t)a->n_head, row = (size_t)a->head_dim * sizeof(float), o_bytes, bytes;
    if (!kvf_mul_size(rows, row, &o_bytes) || __builtin_add_overflow(o_bytes, rows * sizeof(float), &bytes) || bytes > SIZE_MAX - 63)
        return kvf_fail(err, KVF_ERR_NOMEM, "too many queries at once");
    bytes = (bytes + 63) / 64 * 64; /* parts start on a line */
    o_bytes = rows * row;
    KVF_TRY(choose(&c, err));
    KVF_TRY(need(s, &s->mine, &s->mine_bytes, bytes, err));
    KVF_TRY(attend_own(&c, (float *)(void *)s->mine, (float *)(void *)(s->mine + o_bytes), err));
    KVF_TRY(gather_results(&c, bytes, err));
    KVF_TRY(merge(&c, bytes, o_bytes, err));
    if (report) *report = c.report;
    return KVF_OK;
}
