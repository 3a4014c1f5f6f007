/* cpu_attn.c - the attention op cut into parts: prefill by queries and KV heads, decode by runs of
 * keys and KV heads, whose partial results are merged by lse in a fixed order.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "backend/cpu/attn_int.h"
#include "backend/cpu/cpu_backend_int.h"

typedef kvf_cpu_backend cpu_backend;

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

typedef struct attn_task {
    cpu_backend *c;
    const kvf_attn_args *a;
    int64_t tile, n_tile;                  /* prefill: queries per part */
    int32_t head0, n_head_kv;              /* KV heads to compute */
    int64_t key0, n_split, keys_per_split; /* decode */
    float *o, *lse;                        /* decode: [n_head_kv][n_split][n_tok][group]([head_dim]) */
} attn_task;

static attn_task attn_task_for(cpu_backend *c, const kvf_attn_args *a)
{
    attn_task t = { .c = c, .a = a, .n_head_kv = a->n_head_kv };
    if (a->head_kv1 > 0) {
        t.head0 = a->head_kv0;
        t.n_head_kv = a->head_kv1 - a->head_kv0;
    }
    return t;
}

/* What a part reads and writes, for ThreadSanitizer: its kernel is not watched. */
static void attn_part_ranges(const kvf_attn_part *p)
{
#ifdef KVF_TSAN
    const kvf_attn_args *a = p->a;
    int32_t group = kvf_attn_group(a);
    size_t row = (size_t)a->head_dim * sizeof(float);
    for (int64_t t = p->tok0; t < p->tok1; t++) {
        kvf_race_read(kvf_attn_q(p, t, 0), (size_t)group * row);
        kvf_race_write(kvf_attn_o(p, t, 0), (size_t)group * row);
        if (kvf_attn_lse(p, t, 0)) kvf_race_write(kvf_attn_lse(p, t, 0), (size_t)group * sizeof(float));
    }
    size_t tokens = (size_t)(p->tok1 - p->tok0);
    if (a->place) kvf_race_read(a->place + p->tok0, tokens * sizeof *a->place);
    if (a->first) kvf_race_read(a->first + p->tok0, tokens * sizeof *a->first);
    int64_t first = kvf_attn_visible(p, p->tok0).first, end = kvf_attn_visible(p, p->tok1 - 1).end;
    for (int64_t b = first / KVF_BLOCK; b * KVF_BLOCK < end; b++) {
        kvf_key_range in = kvf_attn_valid(a, b);
        if (in.first < first - b * KVF_BLOCK) in.first = first - b * KVF_BLOCK;
        if (in.end > end - b * KVF_BLOCK) in.end = end - b * KVF_BLOCK;
        if (in.first >= in.end) continue;
        in.first = in.first / 16 * 16; /* kernels read whole tiles, of at most 16 keys */
        in.end = (in.end + 15) / 16 * 16;
        size_t bytes = (size_t)(in.end - in.first) * (size_t)a->head_dim * sizeof(kvf_f16);
        kvf_race_read(kvf_attn_k(a, p->head_kv, b) + in.first * a->head_dim, bytes);
        kvf_race_read(kvf_attn_v(a, p->head_kv, b) + in.first * a->head_dim, bytes);
    }
    for (int32_t g = 0; a->runs && g < group; g++)
        kvf_race_write(kvf_attn_runs(a, p->head_kv, g) + p->key0 / KVF_ATTN_RUN,
                       (size_t)((p->key1 - p->key0 + KVF_BLOCK - 1) / KVF_BLOCK * KVF_BLOCK_RUNS) * sizeof(float));
#else
    (void)p;
#endif
}

static void attn_part_prefill(void *arg, int64_t part, int32_t worker)
{
    const attn_task *t = arg;
    /* Late queries see more keys: start with them, so that the short parts fill the gaps at the end. */
    int64_t tile = t->n_tile - 1 - part / t->n_head_kv, tok1 = (tile + 1) * t->tile;
    kvf_attn_part p = { .a = t->a, .head_kv = (int32_t)(t->head0 + part % t->n_head_kv), .tok0 = tile * t->tile,
                        .tok1 = tok1 < t->a->n_tok ? tok1 : t->a->n_tok, .key0 = 0, .key1 = t->a->n_key,
                        .scratch = kvf_cpu_work_of(t->c, worker) };
    attn_part_ranges(&p);
    t->c->ops.attn(&p);
}

static void attn_part_decode(void *arg, int64_t part, int32_t worker)
{
    const attn_task *t = arg;
    const kvf_attn_args *a = t->a;
    int64_t split = part % t->n_split, head = part / t->n_split, rows = a->n_tok * (a->n_head / a->n_head_kv);
    int64_t key0 = t->key0 + split * t->keys_per_split, key1 = key0 + t->keys_per_split;
    kvf_attn_part p = { .a = a, .head_kv = (int32_t)(t->head0 + head), .tok0 = 0, .tok1 = a->n_tok, .key0 = key0,
                        .key1 = key1 < a->n_key ? key1 : a->n_key, .scratch = kvf_cpu_work_of(t->c, worker) };
    if (t->n_split > 1) {
        p.o = t->o + part * rows * a->head_dim;
        p.lse = t->lse + part * rows;
    }
    attn_part_ranges(&p);
    t->c->ops.attn_decode(&p);
}

/* Sums of one head over a split's keys, from shares of the split to shares of all. */
static void scale_runs(const attn_task *t, float *runs, int64_t split, float lse, float all)
{
    int64_t first = t->key0 + split * t->keys_per_split, end = first + t->keys_per_split;
    float share = lse > -INFINITY ? expf(lse - all) : 0.0f;
    if (end > t->a->n_key) end = t->a->n_key;
    for (int64_t i = first / KVF_ATTN_RUN; i < (end + KVF_ATTN_RUN - 1) / KVF_ATTN_RUN; i++) runs[i] *= share;
}

/* Join the splits of every (KV head, token, query head) row into a->o and a->lse. */
static void merge_splits(const attn_task *t)
{
    const kvf_attn_args *a = t->a;
    int64_t group = a->n_head / a->n_head_kv, rows = a->n_tok * group, d = a->head_dim;
    for (int64_t h = 0; h < t->n_head_kv; h++) {
        float *o = t->o + h * t->n_split * rows * d, *lse = t->lse + h * t->n_split * rows;
        for (int64_t r = 0; r < rows; r++) {
            float own = lse[r]; /* of split 0, which takes the others in */
            for (int64_t s = 1; s < t->n_split; s++)
                t->c->ops.lse_merge(o + r * d, lse + r, o + (s * rows + r) * d, lse + s * rows + r, a->head_dim);
            int64_t row = (r / group) * a->n_head + (t->head0 + h) * group + r % group;
            memcpy(a->o + row * d, o + r * d, (size_t)d * sizeof(float));
            if (a->lse) a->lse[row] = lse[r];
            float *runs = a->runs ? kvf_attn_runs(a, (int32_t)(t->head0 + h), r) : NULL;
            for (int64_t s = 0; runs && s < t->n_split; s++)
                scale_runs(t, runs, s, s == 0 ? own : lse[s * rows + r], lse[r]);
        }
    }
}

static kvf_status attn_decode(cpu_backend *c, const kvf_attn_args *a, kvf_error *err)
{
    attn_task t = attn_task_for(c, a);
    float *runs = a->runs ? kvf_attn_runs(a, t.head0, 0) : NULL;
    if (runs) memset(runs, 0, (size_t)(kvf_attn_runs(a, t.head0 + t.n_head_kv, 0) - runs) * sizeof *runs);
    /* Keys before the first query's window are not even looked at. */
    int64_t q_first = a->place ? a->place[0] : a->q_first;
    if (a->window > 0 && q_first - a->window + 1 > 0) t.key0 = (q_first - a->window + 1) / KVF_BLOCK * KVF_BLOCK;
    if (a->first) t.key0 = a->first[0] / KVF_BLOCK * KVF_BLOCK;
    if (t.key0 > a->n_key) t.key0 = a->n_key / KVF_BLOCK * KVF_BLOCK;
    int64_t n_block = (a->n_key - t.key0 + KVF_BLOCK - 1) / KVF_BLOCK;
    /* At least two blocks a split (20 us), at most two splits a thread over all heads. */
    int64_t most = n_block / 2, want = (2 * c->n_threads + t.n_head_kv - 1) / t.n_head_kv;
    t.n_split = want < most ? want : most;
    if (t.n_split < 1) t.n_split = 1;
    int64_t blocks = n_block > 0 ? (n_block + t.n_split - 1) / t.n_split : 1;
    t.keys_per_split = blocks * KVF_BLOCK;
    if (n_block > 0) t.n_split = (n_block + blocks - 1) / blocks; /* no empty split at the end */
    size_t rows = (size_t)(t.n_split * a->n_tok * a->n_head);
    if (t.n_split > 1) {
        size_t o_bytes = round_up(rows * (size_t)a->head_dim * sizeof(float), 64);
        KVF_TRY(kvf_cpu_grow_scratch(c, &c->partial, &c->partial_cap, o_bytes + rows * sizeof(float), err));
        t.o = (float *)(void *)c->partial;
        t.lse = (float *)(void *)(c->partial + o_bytes);
    }
    KVF_TRY(kvf_cpu_grow_work(c, c->ops.attn_decode_scratch_bytes(a, a->n_tok), err));
    kvf_cpu_run_parts(c, t.n_head_kv * t.n_split, a->n_tok * a->n_head * a->head_dim * n_block * KVF_BLOCK,
                      attn_part_decode, &t);
    if (t.n_split > 1) merge_splits(&t);
    return KVF_OK;
}

kvf_status kvf_cpu_op_attn(kvf_backend *b, const kvf_attn_args *a, kvf_error *err)
{
    cpu_backend *c = kvf_cpu_self(b);
    if (a->n_tok <= 0) return KVF_OK;
    if (a->runs && (a->n_tok != 1 || !a->lse))
        return kvf_fail(err, KVF_ERR_INTERNAL, "sums of runs of %lld queries", (long long)a->n_tok);
    if (a->n_tok <= c->ops.attn_decode_max) {
        c->ran_attn_decode = c->ops.attn_decode_name;
        return attn_decode(c, a, err);
    }
    c->ran_attn = c->ops.attn_name;
    attn_task t = attn_task_for(c, a);
    t.tile = c->ops.attn_tile(a);
    int64_t even = (a->n_tok * t.n_head_kv + c->n_threads - 1) / c->n_threads;
    if (even < t.tile) t.tile = even < 16 ? 16 : (even + 15) / 16 * 16; /* a part for every thread */
    t.n_tile = (a->n_tok + t.tile - 1) / t.tile;
    int64_t most = t.tile < a->n_tok ? t.tile : a->n_tok;
    KVF_TRY(kvf_cpu_grow_work(c, c->ops.attn_scratch_bytes(a, most), err));
    kvf_threads_run(c->threads, t.n_tile * t.n_head_kv, attn_part_prefill, &t);
    return KVF_OK;
}
