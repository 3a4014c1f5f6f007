/* test_memory.c - a sequence with a memory (kv_far.c) against a naive transcription of InfLLM with the
 * paper's masks (infllm_lazyllm.md, 1.6), against dense attention where they must be equal, and against
 * itself with its blocks in a tier instead of the pool.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"
#include "kv/kv.h"

enum { LAYERS = 2, DIM = 32, MAX_TOK = 1200, MAX_HEAD = 8 };

/* Rotated keys are rounded to f16: computed in float here and in double there, a few differ by a place. */
#define ROTATED 3e-4

static kvf_threads *threads;
static kvf_backend *backend;
static kvf_error err;
static double inv_freq[DIM / 2];

static void setup(void)
{
    cr_assert_eq(kvf_threads_open(&threads, 2, &kvf_mem_default, &err), KVF_OK);
    kvf_cpu_backend_params p = { .level = KVF_CPU_LEVEL_REF, .threads = threads, .mem = &kvf_mem_default };
    cr_assert_eq(kvf_cpu_backend_open(&backend, &p, &err), KVF_OK);
}

static void teardown(void)
{
    backend->ops->close(backend);
    kvf_threads_close(threads);
}

TestSuite(memory, .init = setup, .fini = teardown);

static float noise(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*state >> 32) * 0x1p-31f;
}

/* ---- A policy that names units by a rule the reference knows ------------------------------------ */

typedef enum choice { CHOOSE_NONE, CHOOSE_ALL, CHOOSE_SOME } choice;

typedef struct chooser {
    kvf_policy p; /* first */
    kvf_memory m;
    choice how;
    bool votes; /* ask for votes too, so that digests are read */
} chooser;

static bool chosen(choice how, int32_t layer, int64_t n_past, int32_t set, int64_t unit)
{
    uint64_t s = (uint64_t)(layer * 977 + n_past * 131 + set * 31 + unit) * 0x9e3779b97f4a7c15u;
    return how == CHOOSE_ALL || (how == CHOOSE_SOME && (s >> 40) % 3 == 0);
}

static void chooser_memory(const kvf_policy *p, kvf_memory *m) { *m = ((const chooser *)(const void *)p)->m; }

static kvf_status chooser_retrieve(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *e)
{
    const chooser *c = (const chooser *)(const void *)p;
    if (c->votes) {
        static float votes[MAX_HEAD * MAX_TOK / 16];
        kvf_vote_rule rule = { .kind = KVF_VOTE_GATE, .max_queries = true, .pool = 1 };
        for (int fine = 0; fine < 2; fine++) {
            KVF_TRY(r->vote(r->lookup, fine != 0, &rule, votes, e));
            double sum = 0;
            for (int64_t u = 0; u < r->n_unit; u++) {
                cr_assert(isfinite(votes[u]));
                cr_assert_geq(votes[u], 0);
                sum += (double)votes[u];
            }
            cr_assert_gt(sum, 0);
        }
    }
    for (int32_t s = 0; s < r->n_set; s++)
        for (int64_t u = 0; u < r->n_unit; u++)
            use[s * r->n_unit + u] = chosen(c->how, r->layer, r->n_past, s, r->unit0 + u);
    return KVF_OK;
}

static const kvf_policy_ops chooser_ops = { .abi = KVF_POLICY_ABI, .name = "chooser", .memory = chooser_memory,
                                            .retrieve = chooser_retrieve };

/* ---- One run: everything that goes in, and what comes out ---------------------------------------- */

typedef struct run {
    kvf_dims dims;
    kvf_memory m;
    choice how;
    bool votes, rotate;
    int64_t n, step;
    float *q, *k, *v;     /* [LAYERS][n][heads][DIM] */
    float *o;             /* as q */
    int64_t *chunk_start; /* [n] first token of the token's chunk */
} run;

static int64_t width_q(const run *r) { return (int64_t)r->dims.n_head * DIM; }
static int64_t width_kv(const run *r) { return (int64_t)r->dims.n_head_kv * DIM; }

static void run_open(run *r, uint64_t seed)
{
    size_t nq = (size_t)(LAYERS * r->n * width_q(r)), nk = (size_t)(LAYERS * r->n * width_kv(r));
    r->q = malloc(nq * sizeof(float));
    r->o = malloc(nq * sizeof(float));
    r->k = malloc(nk * sizeof(float));
    r->v = malloc(nk * sizeof(float));
    r->chunk_start = malloc((size_t)r->n * sizeof(int64_t));
    for (size_t i = 0; i < nq; i++) r->q[i] = 2 * noise(&seed);
    for (size_t i = 0; i < nk; i++) {
        r->k[i] = kvf_f32_from_f16(kvf_f16_from_f32(2 * noise(&seed)));
        r->v[i] = kvf_f32_from_f16(kvf_f16_from_f32(noise(&seed)));
    }
    for (int i = 0; i < DIM / 2; i++) inv_freq[i] = r->rotate ? pow(1000.0, -2.0 * i / DIM) : 0.0;
}

static void run_close(run *r)
{
    free(r->q);
    free(r->o);
    free(r->k);
    free(r->v);
    free(r->chunk_start);
}

static void rotate(const float *x, double pos, double *out)
{
    for (int i = 0; i < DIM / 2; i++) {
        double c = cos(pos * inv_freq[i]), s = sin(pos * inv_freq[i]);
        out[i] = x[i] * c - x[i + DIM / 2] * s;
        out[i + DIM / 2] = x[i] * s + x[i + DIM / 2] * c;
    }
}

static void rotate_f32(float *x, int64_t n_row, int64_t pos)
{
    for (int64_t r = 0; r < n_row; r++) {
        double out[DIM];
        rotate(x + r * DIM, (double)pos, out);
        for (int i = 0; i < DIM; i++) x[r * DIM + i] = (float)out[i];
    }
}

/* Append tokens first..end of the run in chunks of r->step; outputs to r->o. */
static void feed(run *r, kvf_kv *kv, chooser *c, int64_t first, int64_t end)
{
    float *q = malloc((size_t)(r->step * width_q(r)) * sizeof(float)), *far = malloc((size_t)(r->step * width_q(r)) * sizeof(float));
    for (int64_t at = first; at < end; at += r->step) {
        int64_t n = end - at < r->step ? end - at : r->step;
        cr_assert_eq(kvf_kv_reserve(kv, n, &err), KVF_OK, "%s", err.msg);
        for (int32_t l = 0; l < LAYERS; l++) {
            cr_assert_eq(kvf_kv_put(kv, l, r->k + (l * r->n + at) * width_kv(r), r->v + (l * r->n + at) * width_kv(r), n, &err), KVF_OK);
            memcpy(q, r->q + (l * r->n + at) * width_q(r), (size_t)(n * width_q(r)) * sizeof(float));
            memcpy(far, q, (size_t)(n * width_q(r)) * sizeof(float));
            for (int64_t i = 0; i < n; i++) {
                rotate_f32(q + i * width_q(r), r->dims.n_head, at + i);
                rotate_f32(far + i * width_q(r), r->dims.n_head, r->m.window - 1);
            }
            kvf_kv_attend_args a = { .layer = l, .policy = &c->p, .q = q, .q_far = far,
                                     .o = r->o + (l * r->n + at) * width_q(r), .n_tok = n, .n_q = n, .scale = 0.2f };
            cr_assert_eq(kvf_kv_attend(kv, &a, &err), KVF_OK, "%s", err.msg);
        }
        for (int64_t i = 0; i < n; i++) r->chunk_start[at + i] = at;
        cr_assert_eq(kvf_kv_commit(kv, n, &err), KVF_OK, "%s", err.msg);
    }
    free(q);
    free(far);
}

static kvf_kv *open_kv(const run *r, kvf_pool *pool)
{
    kvf_kv *kv;
    kvf_kv_memory_params p = { .memory = r->m };
    for (int i = 0; i < 2; i++) p.rope[i] = (kvf_kv_rope){ inv_freq, DIM, KVF_ROPE_NEOX, 1 };
    cr_assert_eq(kvf_kv_open_memory(&kv, pool, r->dims, &p, &err), KVF_OK, "%s", err.msg);
    return kv;
}

static kvf_pool *open_pool(const run *r, int64_t slots)
{
    kvf_pool *pool;
    kvf_pool_params p = { backend, r->dims.n_head_kv, DIM, slots, 0 };
    cr_assert_eq(kvf_pool_open(&pool, &p, &err), KVF_OK);
    return pool;
}

static chooser make_chooser(const run *r)
{
    return (chooser){ .p = { .ops = &chooser_ops, .dims = r->dims }, .m = r->m, .how = r->how, .votes = r->votes };
}

/* ---- The naive transcription ---------------------------------------------------------------------- */

/* o of one query and head, every key decided on its own. */
static void naive(const run *r, int32_t layer, int64_t pos, int32_t head, bool dense, double *o)
{
    int32_t kvh = head / (r->dims.n_head / r->dims.n_head_kv);
    const float *q = r->q + (layer * r->n + pos) * width_q(r) + head * DIM;
    double here[DIM], far[DIM], max = -INFINITY, sum = 0, s[MAX_TOK];
    int64_t past = r->chunk_start[pos], end = r->m.init;
    /* 1.1: units are sealed while the remainder keeps a whole window */
    while (past - end - r->m.unit >= r->m.window) end += r->m.unit;
    rotate(q, (double)pos, here);
    rotate(q, (double)(r->m.window - 1), far);
    for (int64_t j = 0; j <= pos; j++) {
        const float *k = r->k + (layer * r->n + j) * width_kv(r) + kvh * DIM;
        bool local = dense || pos - j < r->m.window, seen = local || j < r->m.init || j >= end;
        int64_t unit = j / r->m.unit;
        if (!seen) seen = chosen(r->how, layer, past, r->m.n_set > 1 ? kvh : 0, unit);
        double kr[DIM], dot = 0;
        rotate(k, (double)j, kr);
        for (int i = 0; i < DIM; i++) {
            float rounded = kvf_f32_from_f16(kvf_f16_from_f32((float)kr[i]));
            dot += local ? here[i] * (double)rounded : far[i] * (double)k[i];
        }
        s[j] = seen ? dot * 0.2 : -INFINITY;
        if (s[j] > max) max = s[j];
    }
    for (int i = 0; i < DIM; i++) o[i] = 0;
    for (int64_t j = 0; j <= pos; j++) {
        double p = exp(s[j] - max);
        sum += p;
        for (int i = 0; i < DIM; i++) o[i] += p * (double)r->v[(layer * r->n + j) * width_kv(r) + kvh * DIM + i];
    }
    for (int i = 0; i < DIM; i++) o[i] /= sum;
}

static double worst(const run *r, bool dense)
{
    double bad = 0;
    for (int32_t l = 0; l < LAYERS; l++)
        for (int64_t t = 0; t < r->n; t++)
            for (int32_t h = 0; h < r->dims.n_head; h++) {
                double o[DIM];
                naive(r, l, t, h, dense, o);
                for (int i = 0; i < DIM; i++) {
                    double d = fabs(o[i] - (double)r->o[(l * r->n + t) * width_q(r) + h * DIM + i]);
                    if (!(d <= bad)) bad = d;
                }
            }
    return bad;
}

static kvf_memory memory_of(int64_t init, int64_t window, int32_t unit, int32_t n_set, kvf_dims dims)
{
    kvf_memory m = { .init = init, .window = window, .unit = unit, .n_set = n_set, .n_chunk = window < 16 ? (int32_t)window : 16 };
    if (window < KVF_BLOCK) return m; /* too short for votes */
    m.coarse = (kvf_digest){ .kind = KVF_DIGEST_MEAN, .sub = unit, .n_head = dims.n_head, .n_head_kv = dims.n_head_kv, .head_dim = DIM };
    m.fine = m.coarse;
    m.fine.kind = KVF_DIGEST_BITS;
    m.fine.bits = 2;
    return m;
}

static const int32_t groups[][2] = { { 2, 2 }, { 4, 2 }, { 8, 1 } };

static void check(run r, bool dense, double tolerance)
{
    run_open(&r, (uint64_t)(r.n * 7 + r.step));
    kvf_pool *pool = open_pool(&r, 4096);
    kvf_kv *kv = open_kv(&r, pool);
    chooser c = make_chooser(&r);
    feed(&r, kv, &c, 0, r.n);
    double bad = worst(&r, dense);
    cr_assert_leq(bad, tolerance, "n %lld step %lld init %lld window %lld unit %d heads %d/%d: %g", (long long)r.n,
                  (long long)r.step, (long long)r.m.init, (long long)r.m.window, r.m.unit, r.dims.n_head,
                  r.dims.n_head_kv, bad);
    kvf_kv_close(kv);
    cr_assert_eq(kvf_pool_used(pool), 0);
    kvf_pool_close(pool);
    run_close(&r);
}

Test(memory, without_positions_and_with_all_units_it_is_dense_attention)
{
    enum { W = 64, INIT = 32, UNIT = 16 };
    const int64_t lengths[] = { 1, W - 1, W, W + 1, INIT + W + UNIT - 1, INIT + W + UNIT, INIT + W + UNIT + 1, 600 };
    const int64_t steps[] = { 1, 7, 16, 64 };
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (size_t j = 0; j < sizeof steps / sizeof *steps; j++)
            for (size_t g = 0; g < 3; g++) {
                if (lengths[i] == 600 && g != j % 3) continue; /* each group size somewhere */
                kvf_dims dims = { LAYERS, groups[g][0], groups[g][1], DIM };
                check((run){ .dims = dims, .m = memory_of(INIT, W, UNIT, 1, dims), .how = CHOOSE_ALL,
                             .n = lengths[i], .step = steps[j] }, true, 1e-5);
            }
}

Test(memory, it_is_the_naive_transcription)
{
    const struct { int64_t init, window; int32_t unit; int64_t n, step; } cases[] = {
        { 128, 128, 128, 700, 64 }, { 128, 256, 64, 900, 128 }, { 0, 48, 16, 300, 16 }, { 16, 50, 16, 300, 13 },
        { 48, 130, 16, 420, 32 }, { 64, 128, 32, 500, 96 }, { 128, 65, 128, 600, 1 }, { 0, 1, 16, 200, 1 },
    };
    const choice how[] = { CHOOSE_SOME, CHOOSE_NONE, CHOOSE_ALL };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int h = 0; h < 3; h++) {
            if (h > 0 && cases[i].n > 430) continue;
            size_t g = i % 3;
            kvf_dims dims = { LAYERS, groups[g][0], groups[g][1], DIM };
            int32_t sets = i % 2 ? dims.n_head_kv : 1;
            check((run){ .dims = dims, .m = memory_of(cases[i].init, cases[i].window, cases[i].unit, sets, dims),
                         .how = how[h], .n = cases[i].n, .step = cases[i].step, .rotate = true,
                         .votes = cases[i].window >= KVF_BLOCK }, false, ROTATED);
        }
}

Test(memory, a_text_shorter_than_the_window_is_dense_with_positions_too)
{
    kvf_dims dims = { LAYERS, 4, 2, DIM };
    check((run){ .dims = dims, .m = memory_of(128, 400, 64, 1, dims), .how = CHOOSE_NONE, .n = 400, .step = 64,
                 .rotate = true }, true, ROTATED);
}

/* ---- Tier ------------------------------------------------------------------------------------------ */

typedef struct ram_tier {
    kvf_tier t; /* first */
    size_t slot_bytes;
    int64_t n_block;
    uint8_t *slots, *digests; /* [LAYERS][n_block] */
    int64_t n_read;
    uint64_t epoch;
} ram_tier;

static kvf_status ram_read(kvf_tier *t, int32_t layer, int64_t block, void *dst, kvf_error *e)
{
    ram_tier *r = (ram_tier *)(void *)t;
    (void)e;
    cr_assert_lt(block, r->n_block);
    memcpy(dst, r->slots + (size_t)(layer * r->n_block + block) * r->slot_bytes, r->slot_bytes);
    r->n_read++;
    return KVF_OK;
}

static kvf_status ram_digests(kvf_tier *t, int32_t layer, int64_t group, const void **out, kvf_error *e)
{
    ram_tier *r = (ram_tier *)(void *)t;
    (void)e;
    *out = r->digests + (size_t)(layer * r->n_block + group * KVF_GROUP_BLOCKS) * t->digest_bytes;
    return KVF_OK;
}

static uint64_t ram_epoch(kvf_tier *t) { return ((ram_tier *)(void *)t)->epoch; }
static void ram_hold(kvf_tier *t) { (void)t; }

static const kvf_tier_ops ram_ops = { .read = ram_read, .digests = ram_digests, .epoch = ram_epoch, .hold = ram_hold,
                                      .unhold = ram_hold };

/* Everything kv holds, as a store would keep it. */
static void save(ram_tier *r, kvf_kv *kv, kvf_pool *pool)
{
    int64_t n = (kvf_kv_len(kv) + KVF_BLOCK - 1) / KVF_BLOCK;
    *r = (ram_tier){ .t = { &ram_ops, kvf_kv_len(kv), kvf_kv_digest_bytes(kv) }, .n_block = n,
                     .slot_bytes = kvf_pool_slot_bytes(pool) };
    r->slots = malloc((size_t)(LAYERS * n) * r->slot_bytes);
    r->digests = malloc((size_t)(LAYERS * n) * r->t.digest_bytes + 1);
    for (int64_t g = 0; g * KVF_GROUP_BLOCKS < n; g++) {
        const void *slots[LAYERS * KVF_GROUP_BLOCKS];
        int64_t first = g * KVF_GROUP_BLOCKS, blocks = n - first < KVF_GROUP_BLOCKS ? n - first : KVF_GROUP_BLOCKS;
        uint8_t *digests = malloc((size_t)(LAYERS * blocks) * r->t.digest_bytes + 1);
        cr_assert_eq(kvf_kv_export(kv, g, slots, NULL, digests, &err), KVF_OK, "%s", err.msg);
        for (int32_t l = 0; l < LAYERS; l++)
            for (int64_t b = 0; b < blocks; b++) {
                memcpy(r->slots + (size_t)(l * n + first + b) * r->slot_bytes, slots[l * blocks + b], r->slot_bytes);
                memcpy(r->digests + (size_t)(l * n + first + b) * r->t.digest_bytes,
                       digests + (size_t)(l * blocks + b) * r->t.digest_bytes, r->t.digest_bytes);
            }
        free(digests);
    }
}

static void same_bits(const run *a, const run *b, int64_t first)
{
    for (int32_t l = 0; l < LAYERS; l++)
        cr_assert_arr_eq(a->o + (l * a->n + first) * width_q(a), b->o + (l * b->n + first) * width_q(b),
                         (size_t)((a->n - first) * width_q(a)) * sizeof(float));
}

Test(memory, where_a_block_lies_changes_no_bit)
{
    enum { N = 1000, CUT = 700 };
    kvf_dims dims = { LAYERS, 4, 2, DIM };
    run r = { .dims = dims, .m = memory_of(128, 200, 32, 1, dims), .how = CHOOSE_SOME, .votes = true, .n = N, .step = 50,
              .rotate = true };
    run_open(&r, 99);
    kvf_pool *pool = open_pool(&r, 4096);
    kvf_kv *kv = open_kv(&r, pool);
    chooser c = make_chooser(&r);
    ram_tier tier;
    feed(&r, kv, &c, 0, CUT);
    save(&tier, kv, pool);
    feed(&r, kv, &c, CUT, N);
    const int64_t slots[] = { 4096, 40, 22 };
    for (int i = 0; i < 3; i++) {
        run s = r;
        run_open(&s, 99);
        kvf_pool *small = open_pool(&s, slots[i]);
        kvf_kv *again = open_kv(&s, small);
        cr_assert_eq(kvf_kv_load(again, &tier.t, CUT, &err), KVF_OK, "%s", err.msg);
        tier.n_read = 0;
        feed(&s, again, &c, CUT, N);
        cr_assert_gt(tier.n_read, 0);
        same_bits(&r, &s, CUT);
        /* A second question: back to the stored text, and the same bits again. */
        kvf_kv_truncate(again, CUT);
        memset(s.o, 0, (size_t)(LAYERS * N * width_q(&s)) * sizeof(float));
        feed(&s, again, &c, CUT, N);
        same_bits(&r, &s, CUT);
        kvf_kv_close(again);
        cr_assert_eq(kvf_pool_used(small), 0);
        kvf_pool_close(small);
        run_close(&s);
    }
    free(tier.slots);
    free(tier.digests);
    kvf_kv_close(kv);
    kvf_pool_close(pool);
    run_close(&r);
}

Test(memory, a_cut_anywhere_and_a_fork_go_on_like_the_first_time)
{
    enum { N = 640 };
    kvf_dims dims = { LAYERS, 4, 2, DIM };
    run r = { .dims = dims, .m = memory_of(64, 128, 64, 2, dims), .how = CHOOSE_SOME, .n = N, .step = 1, .rotate = true };
    run_open(&r, 5);
    kvf_pool *pool = open_pool(&r, 4096);
    kvf_kv *kv = open_kv(&r, pool);
    chooser c = make_chooser(&r);
    feed(&r, kv, &c, 0, N);
    const int64_t cuts[] = { 639, 512, 511, 300, 129, 128, 65, 1, 0 };
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        run s = r;
        run_open(&s, 5);
        kvf_kv *f;
        cr_assert_eq(kvf_kv_fork(&f, kv, &err), KVF_OK);
        kvf_kv_truncate(f, cuts[i]);
        feed(&s, f, &c, cuts[i], N);
        same_bits(&r, &s, cuts[i]);
        kvf_kv_close(f);
        run_close(&s);
    }
    kvf_kv_close(kv);
    cr_assert_eq(kvf_pool_used(pool), 0);
    kvf_pool_close(pool);
    run_close(&r);
}

Test(memory, noted_attention_is_all_of_the_last_query)
{
    enum { N = 500 };
    kvf_dims dims = { LAYERS, 4, 2, DIM };
    run r = { .dims = dims, .m = memory_of(64, 140, 32, 1, dims), .how = CHOOSE_SOME, .n = N, .step = 20, .rotate = true };
    run_open(&r, 3);
    kvf_pool *pool = open_pool(&r, 4096);
    kvf_kv *kv = open_kv(&r, pool);
    chooser c = make_chooser(&r);
    feed(&r, kv, &c, 0, N - 3);
    kvf_kv_track(kv, true);
    r.step = 1;
    feed(&r, kv, &c, N - 3, N);
    int64_t n;
    const float *mass;
    double sum = 0;
    cr_assert_eq(kvf_kv_tracked(kv, &mass, &n, &err), KVF_OK);
    cr_assert_not_null(mass);
    for (int64_t i = 0; i < n; i++) sum += (double)mass[i];
    cr_assert_float_eq(sum, LAYERS * dims.n_head, 1e-3); /* one probability mass per layer and head */
    kvf_kv_close(kv);
    kvf_pool_close(pool);
    run_close(&r);
}

/* What the calls of attention say themselves and what a second look over their lists finds: the same. */
static void two_ways_to_note(int32_t n_set, int64_t n_prompt, float *mass, int64_t *n)
{
    enum { N = 500 };
    kvf_dims dims = { LAYERS, 4, 2, DIM };
    kvf_memory m = memory_of(64, 140, 32, n_set, dims);
    run r = { .dims = dims, .m = m, .how = CHOOSE_SOME, .n = N, .step = 20, .rotate = true };
    run_open(&r, 3);
    kvf_pool *pool = open_pool(&r, 4096);
    kvf_kv *kv = open_kv(&r, pool);
    chooser c = make_chooser(&r);
    feed(&r, kv, &c, 0, N - 5 - n_prompt);
    kvf_kv_track(kv, true);
    feed(&r, kv, &c, N - 5 - n_prompt, N - 5); /* its first query is taken off */
    r.step = 1;
    feed(&r, kv, &c, N - 5, N);
    const float *noted;
    cr_assert_eq(kvf_kv_tracked(kv, &noted, n, &err), KVF_OK);
    cr_assert(*n > 0 && *n <= N / KVF_TRACK_TOKENS + KVF_BLOCK);
    memcpy(mass, noted, (size_t)*n * sizeof *mass);
    kvf_kv_close(kv);
    kvf_pool_close(pool);
    run_close(&r);
}

Test(memory, calls_say_themselves_where_a_query_looked)
{
    static float by_calls[1024], again[1024];
    const kvf_backend_ops *own = backend->ops;
    kvf_backend_ops without = *own;
    without.attn_runs = false;
    for (int turn = 0; turn < 4; turn++) {
        int64_t n, n_again;
        two_ways_to_note(1 + turn % 2, turn < 2 ? 0 : 7, by_calls, &n);
        backend->ops = &without;
        two_ways_to_note(1 + turn % 2, turn < 2 ? 0 : 7, again, &n_again);
        backend->ops = own;
        cr_assert_eq(n, n_again);
        double most = 0;
        for (int64_t i = 0; i < n; i++) {
            cr_assert_float_eq(by_calls[i], again[i], 1e-5 + 1e-4 * (double)again[i], "sets %d, run %d: %g, not %g",
                               1 + turn % 2, (int)i, (double)by_calls[i], (double)again[i]);
            if ((double)again[i] > most) most = (double)again[i];
        }
        cr_assert_gt(most, 0.1);
    }
}
