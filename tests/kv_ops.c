/* kv_ops.c - see kv_ops.h. Two models stand beside every sequence.
 *
 * Its twin is a sequence of the same manager that has all the memory there is, no tier and no failures, and
 * is given the same texts in the same chunks: whatever happens to the sequence besides, outputs must be the
 * twin's bit for bit. The other is the formula: for some queries of every chunk, softmax over the keys that
 * InfLLM's masks name (infllm_lazyllm.md, 1.1 to 1.6), every key decided on its own, in double.
 *
 * Tokens are numbers of rows in tables of keys, values and queries, so a text is a list of numbers, and
 * what a sequence should hold is known without asking it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "kv_ops.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"
#include "kv/kv.h"

enum { LAYERS = 2, HEADS = 4, HEADS_KV = 2, DIM = 16, WIDTH_Q = HEADS * DIM, WIDTH_KV = HEADS_KV * DIM };
enum { N_ID = 4096, MAX_TOK = 2600, MAX_CHUNK = 512, MAX_SEQ = 4, MAX_SAVED = 5, MAX_UNIT = MAX_TOK / 16 + 1 };
#define SCALE 0.2f

/* Rotated keys are rounded to f16; computed in float there and in double here, a few differ by a place. */
#define NEAR 3e-4

static const kvf_dims dims = { LAYERS, HEADS, HEADS_KV, DIM };

/* ---- Kinds of sequences ---------------------------------------------------------------------- */

typedef struct shape {
    int64_t init, window;
    int32_t unit, n_set, chunk;
    int64_t most; /* tokens of a text */
    bool digests;
    const char *spec; /* NULL: units by a rule of the test; else this policy chooses */
} shape;

/* Shape 0 has no memory. Windows that are no multiple of anything; a document of two groups; digests. */
static const shape shapes[KV_OPS_SHAPES] = {
    { .chunk = 96, .most = 700 },
    { .init = 32, .window = 130, .unit = 32, .n_set = 1, .chunk = 64, .most = 700, .digests = true },
    { .init = 0, .window = 48, .unit = 16, .n_set = 1, .chunk = 16, .most = 400 },
    { .init = 128, .window = 160, .unit = 128, .n_set = HEADS_KV, .chunk = 128, .most = 900, .digests = true },
    { .chunk = 64, .most = 700, .spec = "infllm:init=32,window=128,block=32,chunk=64,topk=3,exact=32" },
    { .chunk = 64, .most = 700, .spec = "infllm:init=32,window=128,block=32,chunk=64,topk=3,select=paper" },
    { .chunk = 512, .most = MAX_TOK, .spec = "infllm:init=64,window=512,block=64,chunk=512,topk=4,exact=16,sets=kv" },
};

/* ---- The world ------------------------------------------------------------------------------- */

typedef struct saved {
    kvf_tier t; /* first */
    struct world *w;
    size_t slot_bytes;
    int64_t n_block;
    uint8_t *slots, *digests; /* [LAYERS][n_block] */
    void *tail;
    size_t n_tail;
    uint64_t epoch;
    kvf_kv *twin; /* as it was then */
    int32_t *ids; /* [MAX_TOK] */
} saved;

typedef enum chooser { CHOOSE_ALL, CHOOSE_NONE, CHOOSE_SOME, CHOOSE_OTHERS, CHOOSERS } chooser;

typedef struct seq {
    kvf_kv *kv, *twin;
    kvf_policy *own, *twin_own; /* spec's */
    int pool;
    chooser how;
    int32_t *ids; /* [MAX_TOK] */
    int64_t n;
} seq;

/* Stands between a sequence and what chooses, and remembers the choice for the formula. */
typedef struct recorder {
    kvf_policy p; /* first */
    kvf_policy *inner; /* NULL: by rule */
    chooser how;
    uint8_t use[LAYERS][HEADS_KV][MAX_UNIT];
    int64_t unit0[LAYERS], n_unit[LAYERS];
} recorder;

typedef struct world {
    kv_ops_report *report;
    const shape *s;
    kvf_memory m; /* of shapes but the first */
    kvf_threads *threads;
    kvf_backend *backend, *twin_backend;
    kvf_mem mem;
    int64_t alloc_left, read_left; /* -1: none fails */
    bool fired;                    /* one did */
    bool armed_alloc, armed_read;
    int64_t next_alloc, next_read;
    kvf_pool *pools[2], *twin_pool;
    int32_t held[256]; /* slots of pools[0] that others took */
    int64_t n_held;
    seq seqs[MAX_SEQ];
    saved *saved[MAX_SAVED];
    recorder rec, twin_rec;
    int32_t next_id;
    kvf_error err;
    float q[MAX_CHUNK * WIDTH_Q], far[MAX_CHUNK * WIDTH_Q], k[MAX_CHUNK * WIDTH_KV], v[MAX_CHUNK * WIDTH_KV];
    float o[LAYERS][MAX_CHUNK * WIDTH_Q], twin_o[LAYERS][MAX_CHUNK * WIDTH_Q];
} world;

static double inv_freq[DIM / 2], turn[MAX_TOK][DIM]; /* cos, sin of every position */
static float *rows_q, *rows_k, *rows_v; /* [LAYERS][N_ID][WIDTH] */

static float noise(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*state >> 32) * 0x1p-31f;
}

static bool make_rows(void)
{
    if (rows_v) return true;
    uint64_t s = 17;
    rows_q = malloc(sizeof(float) * LAYERS * N_ID * WIDTH_Q);
    rows_k = malloc(sizeof(float) * LAYERS * N_ID * WIDTH_KV);
    rows_v = malloc(sizeof(float) * LAYERS * N_ID * WIDTH_KV);
    if (!rows_q || !rows_k || !rows_v) return false;
    for (int i = 0; i < LAYERS * N_ID * WIDTH_Q; i++) rows_q[i] = 2 * noise(&s);
    for (int i = 0; i < LAYERS * N_ID * WIDTH_KV; i++) {
        rows_k[i] = kvf_f32_from_f16(kvf_f16_from_f32(2 * noise(&s)));
        rows_v[i] = kvf_f32_from_f16(kvf_f16_from_f32(noise(&s)));
    }
    for (int i = 0; i < DIM / 2; i++) {
        inv_freq[i] = pow(1000.0, -2.0 * i / DIM);
        for (int t = 0; t < MAX_TOK; t++) {
            turn[t][i] = cos(t * inv_freq[i]);
            turn[t][i + DIM / 2] = sin(t * inv_freq[i]);
        }
    }
    return true;
}

static const float *row_of(const float *rows, int64_t width, int32_t layer, int32_t id)
{
    return rows + (layer * N_ID + id) * width;
}

static bool say(world *w, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    if (!w->report->why[0]) vsnprintf(w->report->why, sizeof w->report->why, format, ap);
    va_end(ap);
    return false;
}

#define CHECK(condition, ...)                                                                                     \
    do {                                                                                                          \
        if (!(condition)) return say(w, __VA_ARGS__);                                                             \
    } while (0)

static void *failing_alloc(void *user, size_t bytes)
{
    world *w = user;
    if (w->alloc_left == 0) {
        w->fired = true;
        return NULL;
    }
    if (w->alloc_left > 0) w->alloc_left--;
    return malloc(bytes);
}

static void plain_release(void *user, void *ptr)
{
    (void)user;
    free(ptr);
}

/* ---- The tier -------------------------------------------------------------------------------- */

static kvf_status tier_fails(world *w, kvf_error *err)
{
    if (w->read_left > 0) w->read_left--;
    if (w->read_left != 0) return KVF_OK;
    w->fired = true;
    return kvf_fail(err, KVF_ERR_IO, "the tier fails");
}

static kvf_status tier_read(kvf_tier *t, int32_t layer, int64_t block, void *dst, kvf_error *err)
{
    saved *s = (saved *)(void *)t;
    KVF_TRY(tier_fails(s->w, err));
    if (block < 0 || block >= s->n_block) return kvf_fail(err, KVF_ERR_INTERNAL, "no such block");
    memcpy(dst, s->slots + (size_t)(layer * s->n_block + block) * s->slot_bytes, s->slot_bytes);
    s->w->report->fetched++;
    return KVF_OK;
}

static kvf_status tier_digests(kvf_tier *t, int32_t layer, int64_t group, const void **out, kvf_error *err)
{
    saved *s = (saved *)(void *)t;
    KVF_TRY(tier_fails(s->w, err));
    *out = s->digests + (size_t)(layer * s->n_block + group * KVF_GROUP_BLOCKS) * t->digest_bytes;
    return KVF_OK;
}

static uint64_t tier_epoch(kvf_tier *t) { return ((saved *)(void *)t)->epoch; }
static void tier_hold(kvf_tier *t) { (void)t; }

static const kvf_tier_ops tier_ops = { .read = tier_read, .digests = tier_digests, .epoch = tier_epoch,
                                       .hold = tier_hold, .unhold = tier_hold };

static size_t digest_room(const saved *s) { return (size_t)(LAYERS * s->n_block) * s->t.digest_bytes + 1; }

/* The mapped file moves: pointers to digests are void, and what lay there is something else. */
static bool move_map(world *w, saved *s)
{
    uint8_t *fresh = malloc(digest_room(s));
    CHECK(fresh, "no memory for the test");
    memcpy(fresh, s->digests, digest_room(s));
    memset(s->digests, 0xa5, digest_room(s));
    free(s->digests);
    s->digests = fresh;
    s->epoch++;
    return true;
}

static void saved_close(saved *s)
{
    if (!s) return;
    kvf_kv_close(s->twin);
    free(s->slots);
    free(s->digests);
    free(s->tail);
    free(s->ids);
    free(s);
}

/* ---- Who chooses ------------------------------------------------------------------------------- */

static bool chosen(chooser how, int32_t layer, int64_t n_past, int32_t set, int64_t unit)
{
    uint64_t x = (uint64_t)(layer * 977 + n_past * 131 + set * 31 + unit + 1) * 0x9e3779b97f4a7c15u;
    if (how == CHOOSE_ALL || how == CHOOSE_NONE) return how == CHOOSE_ALL;
    return (x >> 40) % (how == CHOOSE_SOME ? 3 : 5) == 0;
}

static kvf_status record_units(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *err)
{
    recorder *c = (recorder *)(void *)p;
    if (r->n_unit > MAX_UNIT) return kvf_fail(err, KVF_ERR_INTERNAL, "more units than tokens");
    if (c->inner) {
        KVF_TRY(c->inner->ops->retrieve(c->inner, r, use, err));
    } else {
        for (int32_t s = 0; s < r->n_set; s++)
            for (int64_t u = 0; u < r->n_unit; u++)
                use[s * r->n_unit + u] = chosen(c->how, r->layer, r->n_past, s, r->unit0 + u);
    }
    c->unit0[r->layer] = r->unit0;
    c->n_unit[r->layer] = r->n_unit;
    for (int32_t s = 0; s < r->n_set; s++) memcpy(c->use[r->layer][s], use + s * r->n_unit, (size_t)r->n_unit);
    return KVF_OK;
}

static kvf_status record_blocks(kvf_policy *p, const kvf_select *s, uint8_t *use, kvf_error *err)
{
    recorder *c = (recorder *)(void *)p;
    (void)err;
    for (int64_t b = 0; b < s->n_block; b++) use[b] = chosen(c->how, s->layer, s->n_past, 0, b);
    memcpy(c->use[s->layer][0], use, (size_t)s->n_block);
    c->n_unit[s->layer] = s->n_block;
    return KVF_OK;
}

static const kvf_policy_ops unit_ops = { .abi = KVF_POLICY_ABI, .name = "recorder", .retrieve = record_units };
static const kvf_policy_ops block_ops = { .abi = KVF_POLICY_ABI, .name = "recorder", .select = record_blocks };

/* Before a chunk of a sequence or its twin. */
static void aim(world *w, recorder *c, kvf_policy *own, chooser how)
{
    c->p.ops = w->s->unit || w->s->spec ? &unit_ops : &block_ops;
    c->p.dims = dims;
    c->inner = own;
    c->how = how;
    memset(c->n_unit, 0, sizeof c->n_unit);
}

static void forget(seq *s)
{
    if (s->own) s->own->ops->forget(s->own, kvf_kv_len(s->kv));
    if (s->twin_own) s->twin_own->ops->forget(s->twin_own, kvf_kv_len(s->twin));
}

/* ---- The formula -------------------------------------------------------------------------------- */

static void rotate(const float *x, int64_t pos, double *out)
{
    for (int i = 0; i < DIM / 2; i++) {
        double c = turn[pos][i], s = turn[pos][i + DIM / 2];
        out[i] = (double)x[i] * c - (double)x[i + DIM / 2] * s;
        out[i + DIM / 2] = (double)x[i] * s + (double)x[i + DIM / 2] * c;
    }
}

static int64_t far_at(const world *w) { return w->m.window ? w->m.window - 1 : 0; }

/* How the query at `pos`, of a chunk with `past` tokens before it, reads key j: 0 not, 1 near, 2 far. */
static int sees(const world *w, int32_t layer, int32_t head_kv, int64_t pos, int64_t past, int64_t j)
{
    const recorder *c = &w->rec;
    if (w->m.window == 0) {
        int64_t b = j >> KVF_BLOCK_SHIFT;
        return b >= past >> KVF_BLOCK_SHIFT || c->use[layer][0][b];
    }
    int64_t end = w->m.init;
    while (past - end - w->m.unit >= w->m.window) end += w->m.unit;
    if (pos - j < w->m.window) return 1;
    if (j < w->m.init || j >= end) return 2;
    int64_t u = j / w->m.unit - c->unit0[layer];
    return u >= 0 && u < c->n_unit[layer] && c->use[layer][w->m.n_set > 1 ? head_kv : 0][u] ? 2 : 0;
}

static void formula(const world *w, const seq *s, int32_t layer, int32_t head, int64_t pos, int64_t past, double *o)
{
    int32_t kvh = head / (HEADS / HEADS_KV);
    const float *q = row_of(rows_q, WIDTH_Q, layer, s->ids[pos]) + head * DIM;
    double near[DIM], far[DIM], sum = 0, max = -INFINITY;
    static double score[MAX_TOK];
    rotate(q, w->m.window ? pos : 0, near);
    rotate(q, far_at(w), far);
    for (int64_t j = 0; j <= pos; j++) {
        int how = sees(w, layer, kvh, pos, past, j);
        const float *k = row_of(rows_k, WIDTH_KV, layer, s->ids[j]) + kvh * DIM;
        double turned[DIM], dot = 0;
        score[j] = -INFINITY;
        if (how == 0) continue;
        rotate(k, how == 1 && w->m.window ? j : 0, turned);
        for (int i = 0; i < DIM; i++)
            dot += (how == 1 ? near[i] : far[i]) * (double)kvf_f32_from_f16(kvf_f16_from_f32((float)turned[i]));
        score[j] = dot * (double)SCALE;
        if (score[j] > max) max = score[j];
    }
    memset(o, 0, DIM * sizeof *o);
    for (int64_t j = 0; j <= pos; j++) {
        double p = exp(score[j] - max);
        const float *v = row_of(rows_v, WIDTH_KV, layer, s->ids[j]) + kvh * DIM;
        sum += p;
        for (int i = 0; i < DIM; i++) o[i] += p * (double)v[i];
    }
    for (int i = 0; i < DIM; i++) o[i] /= sum;
}

/* First, last and one in between of the chunk just read, a head each. */
static bool check_formula(world *w, const seq *s, int64_t past, int64_t n)
{
    for (int i = 0; i < 3; i++) {
        int64_t t = i == 0 ? 0 : i == 1 ? n - 1 : (past * 7 + n) % n;
        int32_t layer = (int32_t)((past + i) % LAYERS), head = (int32_t)((past / 3 + i) % HEADS);
        double want[DIM];
        formula(w, s, layer, head, past + t, past, want);
        for (int c = 0; c < DIM; c++) {
            double d = fabs(want[c] - (double)w->o[layer][t * WIDTH_Q + head * DIM + c]);
            CHECK(d <= NEAR, "token %lld of a chunk at %lld, layer %d head %d: off by %g", (long long)t,
                  (long long)past, layer, head, d);
            if (d > w->report->worst) w->report->worst = d;
        }
    }
    return true;
}

/* ---- One chunk ----------------------------------------------------------------------------------- */

static void gather(world *w, const seq *s, int32_t layer, int64_t at, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        int32_t id = s->ids[at + i];
        memcpy(w->k + i * WIDTH_KV, row_of(rows_k, WIDTH_KV, layer, id), WIDTH_KV * sizeof(float));
        memcpy(w->v + i * WIDTH_KV, row_of(rows_v, WIDTH_KV, layer, id), WIDTH_KV * sizeof(float));
        for (int32_t h = 0; h < HEADS; h++) {
            const float *q = row_of(rows_q, WIDTH_Q, layer, id) + h * DIM;
            double near[DIM], far[DIM];
            rotate(q, w->m.window ? at + i : 0, near);
            rotate(q, far_at(w), far);
            for (int c = 0; c < DIM; c++) {
                w->q[i * WIDTH_Q + h * DIM + c] = (float)near[c];
                w->far[i * WIDTH_Q + h * DIM + c] = (float)far[c];
            }
        }
    }
}

/* Tokens at..at + n of s through layers 0..layers of a sequence; committed if those are all. */
static kvf_status read_chunk(world *w, const seq *s, kvf_kv *kv, recorder *c, int64_t n, int32_t layers,
                             float (*o)[MAX_CHUNK * WIDTH_Q])
{
    int64_t at = kvf_kv_len(kv);
    KVF_TRY(kvf_kv_reserve(kv, n, &w->err));
    for (int32_t l = 0; l < layers; l++) {
        gather(w, s, l, at, n);
        KVF_TRY(kvf_kv_put(kv, l, w->k, w->v, n, &w->err));
        kvf_kv_attend_args a = { .layer = l, .policy = &c->p, .q = w->q, .q_far = w->far, .o = o[l], .n_tok = n,
                                 .n_q = n, .scale = SCALE };
        KVF_TRY(kvf_kv_attend(kv, &a, &w->err));
    }
    return layers == LAYERS ? kvf_kv_commit(kv, n, &w->err) : KVF_OK;
}

/* ---- Failures ------------------------------------------------------------------------------------ */

static void arm(world *w)
{
    w->fired = false;
    w->alloc_left = w->armed_alloc ? w->next_alloc : -1;
    w->read_left = w->armed_read ? w->next_read : -1;
    w->armed_alloc = w->armed_read = false;
}

static void disarm(world *w) { w->alloc_left = w->read_left = -1; }

static void relieve(world *w)
{
    while (w->n_held > 0) kvf_pool_unref(w->pools[0], w->held[--w->n_held]);
}

/* A call failed: was there a reason? */
static bool expected(world *w, kvf_status rc)
{
    bool room = rc == KVF_ERR_LIMIT, memory = rc == KVF_ERR_NOMEM && w->fired, tier = rc == KVF_ERR_IO && w->fired;
    CHECK(room || memory || tier, "an error without a reason: %d, %s", (int)rc, w->err.msg);
    w->report->no_room += room;
    w->report->no_memory += memory;
    w->report->no_tier += tier;
    return true;
}

/* Read the tokens that stand at s->ids[s->n..] in both sequences. *done: there was room. */
static bool advance(world *w, seq *s, int64_t n, bool *done)
{
    *done = false;
    for (int attempt = 0; attempt < 3 && !*done; attempt++) {
        if (attempt == 0) arm(w);
        aim(w, &w->rec, s->own, s->how);
        kvf_status rc = read_chunk(w, s, s->kv, &w->rec, n, LAYERS, w->o);
        disarm(w);
        *done = rc >= 0;
        if (*done) continue;
        if (!expected(w, rc)) return false;
        CHECK(kvf_kv_len(s->kv) == s->n, "a failed chunk left %lld tokens", (long long)kvf_kv_len(s->kv));
        forget(s);
        relieve(w);
    }
    if (!*done) return true;
    aim(w, &w->twin_rec, s->twin_own, s->how);
    kvf_status rc = read_chunk(w, s, s->twin, &w->twin_rec, n, LAYERS, w->twin_o);
    CHECK(rc >= 0, "the twin: %s", w->err.msg);
    for (int32_t l = 0; l < LAYERS; l++)
        for (int64_t i = 0; i < n * WIDTH_Q; i++)
            CHECK(memcmp(&w->o[l][i], &w->twin_o[l][i], sizeof(float)) == 0,
                  "token %lld of %lld at %lld, layer %d: %.9g, the twin has %.9g", (long long)(i / WIDTH_Q),
                  (long long)n, (long long)s->n, l, (double)w->o[l][i], (double)w->twin_o[l][i]);
    w->report->compared += LAYERS * n * WIDTH_Q;
    int64_t past = s->n;
    s->n += n;
    return check_formula(w, s, past, n);
}

static bool op_chunk(world *w, seq *s, int64_t n)
{
    bool done;
    if (s->n + n > w->s->most) return true;
    for (int64_t i = 0; i < n; i++) s->ids[s->n + i] = w->next_id++ % N_ID;
    if (!advance(w, s, n, &done)) return false;
    w->report->done[KV_OP_CHUNK] += done;
    return true;
}

static bool op_decode(world *w, seq *s, int64_t n)
{
    for (int64_t i = 0; i < n && s->n < w->s->most; i++) {
        bool done;
        s->ids[s->n] = w->next_id++ % N_ID;
        if (!advance(w, s, 1, &done)) return false;
        w->report->done[KV_OP_DECODE] += done;
        if (!done) break;
    }
    return true;
}

static bool op_cancel(world *w, seq *s, int64_t n, int32_t layers)
{
    if (s->n + n > w->s->most) return true;
    for (int64_t i = 0; i < n; i++) s->ids[s->n + i] = w->next_id++ % N_ID;
    arm(w);
    aim(w, &w->rec, s->own, s->how);
    kvf_status rc = read_chunk(w, s, s->kv, &w->rec, n, layers, w->o);
    disarm(w);
    if (rc < 0 && !expected(w, rc)) return false;
    CHECK(kvf_kv_len(s->kv) == s->n, "a cancelled chunk left tokens");
    forget(s);
    w->report->done[KV_OP_CANCEL]++;
    return true;
}

/* ---- Sequences ----------------------------------------------------------------------------------- */

static kvf_status open_one(world *w, kvf_kv **out, kvf_pool *pool)
{
    kvf_kv_memory_params p = { .memory = w->m };
    for (int i = 0; i < 2; i++) p.rope[i] = (kvf_kv_rope){ inv_freq, DIM, KVF_ROPE_NEOX, 1 };
    return w->m.window ? kvf_kv_open_memory(out, pool, dims, &p, &w->err) : kvf_kv_open(out, pool, dims, &w->err);
}

static bool open_policies(world *w, seq *s)
{
    if (!w->s->spec) return true;
    kvf_status rc = kvf_policy_open(&s->own, w->s->spec, dims, &kvf_mem_default, &w->err);
    if (rc >= 0) rc = kvf_policy_open(&s->twin_own, w->s->spec, dims, &kvf_mem_default, &w->err);
    CHECK(rc >= 0, "%s", w->err.msg);
    return true;
}

static void seq_close(seq *s)
{
    kvf_kv_close(s->kv);
    kvf_kv_close(s->twin);
    kvf_policy_close(s->own);
    kvf_policy_close(s->twin_own);
    free(s->ids);
    *s = (seq){ 0 };
}

static bool op_fork(world *w, seq *from)
{
    seq *s = NULL;
    for (int i = 0; i < MAX_SEQ; i++)
        if (!w->seqs[i].kv) s = &w->seqs[i];
    if (!s) return true;
    kvf_kv *kv;
    arm(w);
    kvf_status rc = kvf_kv_fork(&kv, from->kv, &w->err);
    disarm(w);
    if (rc < 0) {
        CHECK(!kv, "a failed fork left a sequence");
        return expected(w, rc);
    }
    *s = (seq){ .kv = kv, .pool = from->pool, .how = from->how, .n = from->n, .ids = malloc(MAX_TOK * sizeof *s->ids) };
    CHECK(s->ids, "no memory for the test");
    memcpy(s->ids, from->ids, (size_t)from->n * sizeof *s->ids);
    CHECK(kvf_kv_fork(&s->twin, from->twin, &w->err) >= 0, "%s", w->err.msg);
    w->report->done[KV_OP_FORK]++;
    return open_policies(w, s);
}

static bool op_cut(world *w, seq *s, int64_t n)
{
    kvf_kv_truncate(s->kv, n);
    kvf_kv_truncate(s->twin, n);
    s->n = n;
    forget(s);
    w->report->done[KV_OP_CUT]++;
    return true;
}

/* ---- Saving and loading ---------------------------------------------------------------------------- */

/* Group g of the twin, which has everything, into the tier. The sequence gives the same bytes or says that
 * some of them are not in memory. */
static bool save_group(world *w, const seq *s, saved *t, int64_t g)
{
    const void *slots[LAYERS * KVF_GROUP_BLOCKS], *own[LAYERS * KVF_GROUP_BLOCKS];
    int64_t first = g * KVF_GROUP_BLOCKS, blocks = t->n_block - first;
    if (blocks > KVF_GROUP_BLOCKS) blocks = KVF_GROUP_BLOCKS;
    size_t row = t->t.digest_bytes, all = (size_t)(LAYERS * blocks) * row + 1;
    uint8_t *digests = calloc(2, all);
    CHECK(digests, "no memory for the test");
    kvf_status rc = kvf_kv_export(s->twin, g, slots, NULL, digests, &w->err);
    kvf_status mine = kvf_kv_export(s->kv, g, own, NULL, digests + all, &w->err);
    bool alike = mine < 0 || memcmp(digests, digests + all, all) == 0;
    for (int64_t i = 0; i < LAYERS * blocks && rc >= 0; i++) {
        /* of a block that is not full only the tokens it has */
        int64_t b = first + i % blocks, n = s->n - b * KVF_BLOCK < KVF_BLOCK ? s->n - b * KVF_BLOCK : KVF_BLOCK;
        for (int64_t h = 0; h < 2 * HEADS_KV && mine >= 0; h++)
            alike = alike && memcmp((const uint16_t *)slots[i] + h * KVF_BLOCK * DIM,
                                    (const uint16_t *)own[i] + h * KVF_BLOCK * DIM, (size_t)(n * DIM) * 2) == 0;
        int64_t to = i / blocks * t->n_block + b;
        memcpy(t->slots + (size_t)to * t->slot_bytes, slots[i], t->slot_bytes);
        memcpy(t->digests + (size_t)to * row, digests + (size_t)i * row, row);
    }
    free(digests);
    CHECK(rc >= 0, "%s", w->err.msg);
    CHECK(mine >= 0 || strstr(w->err.msg, "not in memory"), "%s", w->err.msg);
    CHECK(alike, "group %lld of a sequence is not its twin's", (long long)g);
    return true;
}

static bool save_tail(world *w, const seq *s, saved *t)
{
    t->n_tail = kvf_kv_tail_bytes(s->kv);
    CHECK(t->n_tail == kvf_kv_tail_bytes(s->twin), "tails of two sizes");
    void *twin = malloc(t->n_tail + 1);
    t->tail = malloc(t->n_tail + 1);
    bool same = false;
    if (twin && t->tail) {
        if (t->n_tail) kvf_kv_tail_save(s->kv, t->tail);
        if (t->n_tail) kvf_kv_tail_save(s->twin, twin);
        same = memcmp(t->tail, twin, t->n_tail) == 0;
    }
    free(twin);
    CHECK(same, "the tail of a sequence is not its twin's");
    return true;
}

static bool op_save(world *w, seq *s)
{
    int at = 0;
    while (at < MAX_SAVED && w->saved[at]) at++;
    if (at == MAX_SAVED || s->n == 0 || !w->m.window) return true;
    saved *t = calloc(1, sizeof *t);
    CHECK(t, "no memory for the test");
    w->saved[at] = t;
    t->t = (kvf_tier){ &tier_ops, s->n, kvf_kv_digest_bytes(s->kv) };
    t->w = w;
    t->slot_bytes = kvf_pool_slot_bytes(w->twin_pool);
    t->n_block = (s->n + KVF_BLOCK - 1) / KVF_BLOCK;
    t->slots = malloc((size_t)(LAYERS * t->n_block) * t->slot_bytes);
    t->digests = calloc(1, digest_room(t));
    t->ids = malloc(MAX_TOK * sizeof *t->ids);
    CHECK(t->slots && t->digests && t->ids, "no memory for the test");
    memcpy(t->ids, s->ids, (size_t)s->n * sizeof *t->ids);
    for (int64_t g = 0; g * KVF_GROUP_BLOCKS < t->n_block; g++)
        if (!save_group(w, s, t, g)) return false;
    if (!save_tail(w, s, t)) return false;
    CHECK(kvf_kv_fork(&t->twin, s->twin, &w->err) >= 0, "%s", w->err.msg);
    arm(w);
    kvf_status rc = kvf_kv_set_tier(s->kv, &t->t, &w->err);
    disarm(w);
    CHECK(rc >= 0, "%s", w->err.msg);
    w->report->done[KV_OP_SAVE]++;
    return true;
}

/* Representatives are known at the end of what was saved only. */
static int64_t load_length(const world *w, const saved *t, int64_t share)
{
    return kvf_kv_tail_bytes(t->twin) > 0 || share > 200 || !w->m.window ? t->t.n_token : t->t.n_token * share / 256;
}

static kvf_status load_into(world *w, kvf_kv *kv, saved *t, int64_t n)
{
    KVF_TRY(kvf_kv_load(kv, &t->t, n, &w->err));
    return t->n_tail ? kvf_kv_tail_load(kv, t->tail, t->n_tail, &w->err) : KVF_OK;
}

/* s, whose sequence is in place, is what t held first. */
static bool settle_load(world *w, seq *s, saved *t, int64_t n)
{
    kvf_kv_close(s->twin);
    s->twin = NULL;
    CHECK(kvf_kv_fork(&s->twin, t->twin, &w->err) >= 0, "%s", w->err.msg);
    kvf_kv_truncate(s->twin, n);
    memcpy(s->ids, t->ids, (size_t)n * sizeof *s->ids);
    s->n = n;
    forget(s);
    return true;
}

/* A load that failed leaves nothing that can be used: it is emptied, as a session does. */
static bool op_load(world *w, seq *s, saved *t, int64_t share)
{
    int64_t n = load_length(w, t, share);
    arm(w);
    kvf_status rc = load_into(w, s->kv, t, n);
    disarm(w);
    if (rc < 0) {
        if (!expected(w, rc)) return false;
        kvf_kv_truncate(s->kv, 0);
        CHECK(kvf_kv_set_tier(s->kv, NULL, &w->err) >= 0, "%s", w->err.msg);
        kvf_kv_truncate(s->twin, 0);
        s->n = 0;
        forget(s);
        return true;
    }
    w->report->done[KV_OP_LOAD]++;
    return settle_load(w, s, t, n);
}

static bool op_move(world *w, seq *s, saved *t, int64_t share)
{
    int64_t n = load_length(w, t, share);
    kvf_kv *kv = NULL;
    arm(w);
    kvf_status rc = open_one(w, &kv, w->pools[!s->pool]);
    if (rc >= 0) rc = load_into(w, kv, t, n);
    disarm(w);
    if (rc < 0) {
        kvf_kv_close(kv);
        return expected(w, rc);
    }
    kvf_kv_close(s->kv);
    s->kv = kv;
    s->pool = !s->pool;
    w->report->done[KV_OP_MOVE]++;
    return settle_load(w, s, t, n);
}

static bool op_detach(world *w, seq *s)
{
    if (!w->m.window) return true;
    kvf_status rc = kvf_kv_set_tier(s->kv, NULL, &w->err);
    CHECK(rc >= 0 || rc == KVF_ERR_STATE, "%s", w->err.msg);
    w->report->done[KV_OP_DETACH] += rc >= 0;
    return true;
}

static void op_squeeze(world *w, int64_t n)
{
    for (; n > 0 && w->n_held < (int64_t)(sizeof w->held / sizeof *w->held); n--) {
        if (kvf_pool_take(w->pools[0], &w->held[w->n_held], NULL) < 0) break;
        w->n_held++;
    }
    w->report->done[KV_OP_SQUEEZE]++;
}

/* ---- The run --------------------------------------------------------------------------------------- */

static bool open_pools(world *w)
{
    const int64_t slots[] = { w->s->chunk > 128 ? 300 : 120, w->s->chunk > 128 ? 120 : 48 };
    w->mem = (kvf_mem){ failing_alloc, plain_release, w };
    CHECK(kvf_threads_open(&w->threads, 1, &kvf_mem_default, &w->err) >= 0, "%s", w->err.msg);
    unsigned flags = kvf_cpu_detect();
    kvf_cpu_backend_params p = { .level = flags & KVF_CPU_AVX2 ? KVF_CPU_LEVEL_AVX2 : KVF_CPU_LEVEL_REF, .flags = flags,
                                 .threads = w->threads, .mem = &w->mem };
    CHECK(kvf_cpu_backend_open(&w->backend, &p, &w->err) >= 0, "%s", w->err.msg);
    p.mem = &kvf_mem_default;
    CHECK(kvf_cpu_backend_open(&w->twin_backend, &p, &w->err) >= 0, "%s", w->err.msg);
    for (int i = 0; i < 2; i++) {
        kvf_pool_params pool = { w->backend, HEADS_KV, DIM, slots[i], 0 };
        CHECK(kvf_pool_open(&w->pools[i], &pool, &w->err) >= 0, "%s", w->err.msg);
    }
    kvf_pool_params pool = { w->twin_backend, HEADS_KV, DIM, 1 << 20, 0 };
    CHECK(kvf_pool_open(&w->twin_pool, &pool, &w->err) >= 0, "%s", w->err.msg);
    return true;
}

static kvf_digest digest_of(kvf_digest_kind kind, int32_t sub, int32_t bits)
{
    return (kvf_digest){ .kind = kind, .sub = sub, .bits = bits, .n_head = HEADS, .n_head_kv = HEADS_KV, .head_dim = DIM };
}

static bool open_first(world *w)
{
    seq *s = &w->seqs[0];
    const shape *h = w->s;
    if (h->unit) w->m = (kvf_memory){ .init = h->init, .window = h->window, .unit = h->unit, .n_chunk = 16, .n_set = h->n_set };
    if (h->digests) {
        w->m.coarse = digest_of(KVF_DIGEST_MEAN, h->unit, 0);
        w->m.fine = digest_of(KVF_DIGEST_BITS, h->unit, 2);
    }
    s->ids = malloc(MAX_TOK * sizeof *s->ids);
    CHECK(s->ids, "no memory for the test");
    if (!open_policies(w, s)) return false;
    if (s->own) s->own->ops->memory(s->own, &w->m);
    CHECK(open_one(w, &s->kv, w->pools[0]) >= 0, "%s", w->err.msg);
    CHECK(open_one(w, &s->twin, w->twin_pool) >= 0, "%s", w->err.msg);
    return true;
}

static bool one(world *w, const uint8_t *x)
{
    int64_t n_seq = 0, n_saved = 0, chunk = w->s->chunk;
    while (n_seq < MAX_SEQ && w->seqs[n_seq].kv) n_seq++; /* kept in front */
    while (n_saved < MAX_SAVED && w->saved[n_saved]) n_saved++;
    seq *s = &w->seqs[x[1] % n_seq];
    saved *t = n_saved ? w->saved[(x[1] >> 2) % n_saved] : NULL;
    kv_op op = (kv_op)(x[0] % KV_OP_COUNT);
    switch (op) {
    case KV_OP_CHUNK: return op_chunk(w, s, x[2] > 127 ? chunk : 1 + x[2] * chunk / 128);
    case KV_OP_DECODE: return op_decode(w, s, 1 + x[2] % 6);
    case KV_OP_CUT: return op_cut(w, s, x[2] & 1 ? s->n * x[2] / 255 : s->n * x[2] / 255 / KVF_BLOCK * KVF_BLOCK);
    case KV_OP_FORK: return op_fork(w, s);
    case KV_OP_SAVE: return op_save(w, s);
    case KV_OP_LOAD: return !t || op_load(w, s, t, x[2]);
    case KV_OP_MOVE: return !t || op_move(w, s, t, x[2]);
    case KV_OP_CANCEL: return op_cancel(w, s, 1 + x[2] * chunk / 256, x[2] % LAYERS);
    case KV_OP_DETACH: return op_detach(w, s);
    case KV_OP_CLOSE:
        if (n_seq == 1) return true;
        seq_close(s);
        *s = w->seqs[n_seq - 1];
        w->seqs[n_seq - 1] = (seq){ 0 };
        break;
    case KV_OP_SQUEEZE: op_squeeze(w, x[2]); return true;
    case KV_OP_RELIEVE: relieve(w); break;
    case KV_OP_NO_MEMORY: w->armed_alloc = true, w->next_alloc = x[2] % 60; break;
    case KV_OP_NO_TIER: w->armed_read = true, w->next_read = 1 + x[2] % 12; break;
    case KV_OP_POLICY: s->how = (chooser)(x[2] % CHOOSERS), forget(s); break;
    case KV_OP_MAP:
        if (t && !move_map(w, t)) return false;
        break;
    case KV_OP_COUNT: break;
    }
    w->report->done[op]++;
    return true;
}

static bool consistent(world *w)
{
    for (int i = 0; i < MAX_SEQ; i++) {
        const seq *s = &w->seqs[i];
        if (!s->kv) continue;
        CHECK(kvf_kv_len(s->kv) == s->n && kvf_kv_len(s->twin) == s->n, "a sequence of %lld tokens has %lld, its twin %lld",
              (long long)s->n, (long long)kvf_kv_len(s->kv), (long long)kvf_kv_len(s->twin));
    }
    for (int i = 0; i < 2; i++)
        CHECK(kvf_pool_used(w->pools[i]) <= kvf_pool_max(w->pools[i]), "a pool beyond its budget");
    return true;
}

static bool finish(world *w, bool ok)
{
    for (int i = 0; i < MAX_SEQ; i++) seq_close(&w->seqs[i]);
    for (int i = 0; i < MAX_SAVED; i++) saved_close(w->saved[i]);
    if (w->pools[0]) relieve(w);
    kvf_pool *pools[] = { w->pools[0], w->pools[1], w->twin_pool };
    for (int i = 0; i < 3; i++) {
        if (ok && pools[i] && kvf_pool_used(pools[i]) != 0) ok = say(w, "slots were not given back");
        kvf_pool_close(pools[i]);
    }
    if (w->backend) w->backend->ops->close(w->backend);
    if (w->twin_backend) w->twin_backend->ops->close(w->twin_backend);
    kvf_threads_close(w->threads);
    free(w);
    return ok;
}

bool kv_ops_run(const uint8_t *data, size_t size, kv_ops_report *report)
{
    if (size < 1 || !make_rows()) return size < 1;
    world *w = calloc(1, sizeof *w);
    if (!w) return false;
    w->report = report;
    w->s = &shapes[data[0] % KV_OPS_SHAPES];
    disarm(w);
    bool ok = open_pools(w) && open_first(w);
    for (size_t i = 1; ok && i + 3 <= size; i += 3) {
        char before[sizeof report->why];
        ok = one(w, data + i) && consistent(w);
        if (ok) continue;
        memcpy(before, report->why, sizeof before);
        snprintf(report->why, sizeof report->why, "shape %d, operation %zu (%d %d %d): %.180s", data[0] % KV_OPS_SHAPES,
                 (i - 1) / 3, data[i] % KV_OP_COUNT, data[i + 1], data[i + 2], before);
    }
    return finish(w, ok);
}
