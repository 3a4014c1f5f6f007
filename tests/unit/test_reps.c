/* test_reps.c - InfLLM as published: representatives and scores of a sequence against the dense attention
 * matrix, and the votes made with them against every query head on its own.
 *
 * With every unit read, a sequence with a memory is dense attention, whose far keys are at one distance where
 * there are positions; so one matrix in double gives all of it (infllm_lazyllm.md, 6.4, groups 4, 5 and 9).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"
#include "kv/kv.h"
#include "memory/faiss_index.h"

enum { LAYERS = 2, HEADS = 4, HEADS_KV = 2, GROUP = HEADS / HEADS_KV, DIM = 32, N = 620 };
enum { INIT = 32, WINDOW = 128, UNIT = 32, CHUNK = 64, REPR = 3, TOPK = 5, MAX_UNIT = N / UNIT };
#define SCALE 0.2f

static const kvf_dims dims = { LAYERS, HEADS, HEADS_KV, DIM };
static double inv_freq[DIM / 2]; /* zeros: no positions */
static float q[LAYERS][N][HEADS][DIM], k[LAYERS][N][HEADS_KV][DIM], v[LAYERS][N][HEADS_KV][DIM];
static float o[N * HEADS * DIM];
static double mass[LAYERS][HEADS][N]; /* attention a key got from the queries whose window it was in */
static kvf_error err;

static float noise(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*state >> 32) * 0x1p-31f;
}

static double dot(const float *a, const float *b)
{
    double sum = 0;
    for (int i = 0; i < DIM; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

static void with_positions(void)
{
    for (int i = 0; i < DIM / 2; i++) inv_freq[i] = pow(1000.0, -2.0 * i / DIM);
}

static void rotate(const float *x, int64_t pos, float *out)
{
    for (int i = 0; i < DIM / 2; i++) {
        double c = cos((double)pos * inv_freq[i]), s = sin((double)pos * inv_freq[i]);
        out[i] = (float)((double)x[i] * c - (double)x[i + DIM / 2] * s);
        out[i + DIM / 2] = (float)((double)x[i] * s + (double)x[i + DIM / 2] * c);
    }
}

static float q_here[LAYERS][N][HEADS][DIM], q_far[LAYERS][N][HEADS][DIM], k_here[LAYERS][N][HEADS_KV][DIM];

/* Queries and keys at their places, keys as f16 holds them, and queries at the far keys' distance. */
static void rotate_all(void)
{
    for (int l = 0; l < LAYERS; l++)
        for (int64_t t = 0; t < N; t++) {
            for (int h = 0; h < HEADS; h++) rotate(q[l][t][h], t, q_here[l][t][h]), rotate(q[l][t][h], WINDOW - 1, q_far[l][t][h]);
            for (int h = 0; h < HEADS_KV; h++) {
                rotate(k[l][t][h], t, k_here[l][t][h]);
                for (int i = 0; i < DIM; i++) k_here[l][t][h][i] = kvf_f32_from_f16(kvf_f16_from_f32(k_here[l][t][h][i]));
            }
        }
}

static void make(void)
{
    uint64_t s = 3;
    for (int l = 0; l < LAYERS; l++)
        for (int t = 0; t < N; t++) {
            for (int i = 0; i < HEADS * DIM; i++) (&q[l][t][0][0])[i] = 2 * noise(&s);
            for (int i = 0; i < HEADS_KV * DIM; i++) {
                (&k[l][t][0][0])[i] = kvf_f32_from_f16(kvf_f16_from_f32(2 * noise(&s)));
                (&v[l][t][0][0])[i] = kvf_f32_from_f16(kvf_f16_from_f32(noise(&s)));
            }
        }
    rotate_all();
}

/* Column sums of the dense matrix over the window. */
static void make_mass(int64_t n)
{
    memset(mass, 0, sizeof mass);
    for (int l = 0; l < LAYERS; l++)
        for (int h = 0; h < HEADS; h++)
            for (int64_t i = 0; i < n; i++) {
                static double p[N];
                double sum = 0;
                for (int64_t j = 0; j <= i; j++) {
                    double near = dot(q_here[l][i][h], k_here[l][j][h / GROUP]), far = dot(q_far[l][i][h], k[l][j][h / GROUP]);
                    sum += p[j] = exp((double)SCALE * (i - j < WINDOW ? near : far));
                }
                for (int64_t j = i - WINDOW + 1 < 0 ? 0 : i - WINDOW + 1; j <= i; j++) mass[l][h][j] += p[j] / sum;
            }
}

/* ---- The sequence ---------------------------------------------------------------------------------- */

typedef struct checker {
    kvf_policy p; /* first */
    bool index;
    int64_t n_vote, n_near;
} checker;

typedef struct rig {
    kvf_threads *threads;
    kvf_backend *backend;
    kvf_pool *pool;
    kvf_kv *kv;
    kvf_memory m;
    checker c;
} rig;

static const float *vote_rep; /* [MAX_UNIT][HEADS][DIM] of the layer being asked; NULL: votes are not checked */
static int64_t vote_at;

/* Votes by the folded representatives against every query head with the vector it uses. */
static void check_votes(checker *c, const kvf_retrieve *r)
{
    float votes[MAX_UNIT];
    kvf_vote_rule rule = { .kind = KVF_VOTE_LIN, .pool = 1 };
    cr_assert_eq(r->vote(r->lookup, true, &rule, votes, &err), KVF_OK, "%s", err.msg);
    double want[MAX_UNIT];
    for (int64_t u = 0; u < r->n_unit; u++) {
        want[u] = 0;
        for (int64_t t = 0; t < r->n_tok; t++)
            for (int h = 0; h < HEADS; h++)
                want[u] += (double)SCALE * dot(q[r->layer][vote_at + t][h], vote_rep + (u * HEADS + h) * DIM) / (double)r->n_tok;
        cr_assert_float_eq(votes[u], want[u], 1e-4, "unit %lld: %g, %g", (long long)u, (double)votes[u], want[u]);
    }
    c->n_vote++;
    if (!c->index) return;
    int64_t near[TOPK], n;
    cr_assert_eq(r->nearest(r->lookup, TOPK, near, &n, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(n, r->n_unit < TOPK ? r->n_unit : TOPK);
    for (int64_t i = 0; i < n; i++) {
        int64_t better = 0;
        for (int64_t u = 0; u < r->n_unit; u++) better += want[u] > want[near[i]] + 1e-6;
        cr_assert_lt(better, TOPK, "unit %lld is none of the best", (long long)near[i]);
        c->n_near++;
    }
}

static kvf_status read_all(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *e)
{
    (void)e;
    if (vote_rep && r->layer == 0) check_votes((checker *)(void *)p, r);
    memset(use, 1, (size_t)(r->n_set * r->n_unit));
    return KVF_OK;
}

static const kvf_policy_ops all_ops = { .abi = KVF_POLICY_ABI, .name = "all", .retrieve = read_all };

static kvf_cpu_level level = KVF_CPU_LEVEL_REF;
static double recall = 0.99;

static rig open_rig(bool per_q_head, const char *index)
{
    rig r = { .c = { .p = { .ops = &all_ops, .dims = dims }, .index = index != NULL } };
    cr_assert_eq(kvf_threads_open(&r.threads, 1, &kvf_mem_default, &err), KVF_OK);
    kvf_cpu_backend_params b = { .level = level, .flags = kvf_cpu_detect(), .threads = r.threads, .mem = &kvf_mem_default };
    cr_assert_eq(kvf_cpu_backend_open(&r.backend, &b, &err), KVF_OK);
    kvf_pool_params pool = { r.backend, HEADS_KV, DIM, 4096, 0 };
    cr_assert_eq(kvf_pool_open(&r.pool, &pool, &err), KVF_OK);
    r.m = (kvf_memory){ .init = INIT, .window = WINDOW, .unit = UNIT, .n_chunk = CHUNK, .n_set = 1, .n_repr = REPR };
    r.m.coarse = (kvf_digest){ .kind = KVF_DIGEST_REPS, .sub = UNIT, .reps_per_q_head = per_q_head, .n_head = HEADS,
                               .n_head_kv = HEADS_KV, .head_dim = DIM };
    r.m.fine = r.m.coarse;
    r.m.recall = recall;
    if (index) memcpy(r.m.index, index, strlen(index) + 1);
    kvf_kv_memory_params p = { .memory = r.m, .index_open = index ? kvf_faiss_open : NULL };
    for (int i = 0; i < 2; i++) p.rope[i] = (kvf_kv_rope){ inv_freq, DIM, KVF_ROPE_NEOX, 1 };
    kvf_status rc = kvf_kv_open_memory(&r.kv, r.pool, dims, &p, &err);
#if !defined(KVF_HAVE_FAISS)
    if (rc == KVF_ERR_UNSUPPORTED && index) cr_skip_test("built without FAISS");
#endif
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    return r;
}

static void close_rig(rig *r)
{
    kvf_kv_close(r->kv);
    kvf_pool_close(r->pool);
    r->backend->ops->close(r->backend);
    kvf_threads_close(r->threads);
}

/* n tokens, which are those from `from` on; nothing is added if attention fails. */
static kvf_status add(rig *r, int64_t from, int64_t n)
{
    cr_assert_eq(kvf_kv_reserve(r->kv, n, &err), KVF_OK, "%s", err.msg);
    for (int32_t l = 0; l < LAYERS; l++) {
        cr_assert_eq(kvf_kv_put(r->kv, l, k[l][from][0], v[l][from][0], n, &err), KVF_OK);
        kvf_kv_attend_args a = { .layer = l, .policy = &r->c.p, .q = q_here[l][from][0], .q_far = q_far[l][from][0], .o = o,
                                 .n_tok = n, .n_q = n, .scale = SCALE };
        KVF_TRY(kvf_kv_attend(r->kv, &a, &err));
    }
    return kvf_kv_commit(r->kv, n, &err);
}

static void feed(rig *r, int64_t end, int64_t step)
{
    for (int64_t at = kvf_kv_len(r->kv), n; at < end; at += n) {
        n = end - at < step ? end - at : step;
        vote_at = at;
        cr_assert_eq(add(r, at, n), KVF_OK, "%s", err.msg);
    }
}

/* ---- What the sequence keeps, from its tail --------------------------------------------------------- */

typedef struct tail {
    uint8_t *bytes;
    int64_t n_key, n_sealed, n_block, score0, n_score;
} tail;

static tail tail_of(rig *r)
{
    tail t = { .bytes = malloc(kvf_kv_tail_bytes(r->kv)) };
    int64_t head[6];
    kvf_kv_tail_save(r->kv, t.bytes);
    memcpy(head, t.bytes, sizeof head);
    t.n_key = head[1], t.n_sealed = head[2], t.n_block = head[3], t.score0 = head[4], t.n_score = head[5];
    return t;
}

/* Vector of a unit that query head h is scored with. */
static const float *rep_at(const rig *r, const tail *t, int32_t layer, int64_t unit, int32_t h)
{
    size_t head = kvf_digest_head_bytes(&r->m.coarse), block = head * HEADS_KV;
    int64_t at = INIT + unit * UNIT, n_vec = r->m.coarse.reps_per_q_head ? GROUP : 1;
    const uint8_t *row = t->bytes + 48 + ((size_t)(layer * t->n_block) + (size_t)(at / KVF_BLOCK)) * block + (size_t)(h / GROUP) * head;
    return (const float *)(const void *)row + (at % KVF_BLOCK / UNIT * n_vec + (n_vec > 1 ? h % GROUP : 0)) * DIM;
}

/* Mean of the unit's REPR keys with most attention, from the matrix. false: two are too near to tell. */
static bool expected_rep(bool per_q_head, int32_t layer, int64_t unit, int32_t h, double *out)
{
    double score[UNIT];
    bool used[UNIT] = { false }, clear = true;
    for (int i = 0; i < UNIT; i++) {
        int64_t t = INIT + unit * UNIT + i;
        score[i] = per_q_head ? mass[layer][h][t] : 0;
        for (int g = 0; !per_q_head && g < GROUP; g++) score[i] += mass[layer][h / GROUP * GROUP + g][t];
    }
    memset(out, 0, DIM * sizeof *out);
    for (int n = 0; n <= REPR; n++) {
        static double last;
        int best = -1;
        for (int i = 0; i < UNIT; i++)
            if (!used[i] && (best < 0 || score[i] > score[best])) best = i;
        if (n == REPR) clear = last - score[best] > 1e-5 * last;
        last = score[best];
        used[best] = true;
        for (int c = 0; n < REPR && c < DIM; c++) out[c] += (double)k[layer][INIT + unit * UNIT + best][h / GROUP][c] / REPR;
    }
    return clear;
}

static void check_reps(bool per_q_head, int64_t step)
{
    make();
    make_mass(N);
    rig r = open_rig(per_q_head, NULL);
    feed(&r, N, step);
    tail t = tail_of(&r);
    int64_t n = 0, units = (N - INIT - WINDOW) / UNIT;
    cr_assert_eq(t.n_sealed, units);
    for (int32_t l = 0; l < LAYERS; l++)
        for (int64_t u = 0; u < units; u++)
            for (int32_t h = 0; h < HEADS; h++) {
                double want[DIM];
                if (!expected_rep(per_q_head, l, u, h, want)) continue;
                n++;
                for (int c = 0; c < DIM; c++)
                    cr_assert_float_eq(rep_at(&r, &t, l, u, h)[c], want[c], 1e-5, "layer %d unit %lld head %d", l, (long long)u, h);
            }
    cr_assert_gt(n, LAYERS * units * HEADS * 9 / 10, "too few could be told");
    /* Scores still kept are the column sums of the window, no more and no less. */
    const uint8_t *at = t.bytes + 48 + (size_t)(LAYERS * t.n_block) * kvf_digest_bytes(&r.m.coarse);
    cr_assert_gt(t.n_score, WINDOW - 1);
    for (int i = 0; i < LAYERS * HEADS; i++)
        for (int64_t j = 0; j < t.n_score; j++) {
            float got;
            memcpy(&got, at + ((size_t)(i * t.n_score + j)) * sizeof got, sizeof got);
            cr_assert_float_eq(got, (&mass[0][0][0])[i * N + t.score0 + j], 1e-4, "row %d token %lld", i, (long long)(t.score0 + j));
        }
    free(t.bytes);
    close_rig(&r);
}

Test(reps, per_kv_head_they_are_those_of_the_dense_matrix) { check_reps(false, CHUNK); }
Test(reps, per_query_head_they_are_those_of_the_dense_matrix) { check_reps(true, CHUNK); }
Test(reps, odd_chunks_and_single_tokens_seal_the_same_ones)
{
    check_reps(false, 37);
    check_reps(false, 1);
}

Test(reps, with_positions_too)
{
    with_positions();
    check_reps(false, CHUNK);
    check_reps(true, 37);
}

static void check_folded(bool per_q_head, bool index)
{
    static float rep[MAX_UNIT][HEADS][DIM];
    make();
    rig r = open_rig(per_q_head, index ? "Flat" : NULL);
    feed(&r, 560, CHUNK);
    const int64_t steps[] = { 1, 20, 1, 38 };
    for (int i = 0; i < 4; i++) {
        tail t = tail_of(&r);
        for (int64_t u = 0; u < t.n_sealed; u++)
            for (int32_t h = 0; h < HEADS; h++) memcpy(rep[u][h], rep_at(&r, &t, 0, u, h), sizeof rep[u][h]);
        free(t.bytes);
        vote_rep = &rep[0][0][0];
        feed(&r, kvf_kv_len(r.kv) + steps[i], steps[i]);
        vote_rep = NULL;
    }
    cr_assert_eq(r.c.n_vote, 4);
    if (index) cr_assert_eq(r.c.n_near, 4 * TOPK);
    close_rig(&r);
}

Test(reps, folded_votes_are_those_of_every_query_head) { check_folded(false, false); }
Test(reps, votes_per_query_head_too) { check_folded(true, false); }
Test(reps, an_index_names_the_units_of_the_scan) { check_folded(false, true); }
Test(reps, an_index_of_vectors_per_query_head_too) { check_folded(true, true); }

/* An index of a bit a unit, once there are enough units to train it. */
enum { ENOUGH = 1100 };

static kvf_status nearest_of_many(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *e)
{
    (void)p;
    int64_t near[TOPK], n;
    memset(use, 0, (size_t)(r->n_set * r->n_unit));
    return r->n_unit < ENOUGH ? KVF_OK : r->nearest(r->lookup, TOPK, near, &n, e);
}

static const kvf_policy_ops near_ops = { .abi = KVF_POLICY_ABI, .name = "near", .retrieve = nearest_of_many };

/* Reads until the index is asked. */
static kvf_status ask_index(const char *kind, double least)
{
    make();
    if (kvf_cpu_detect() & KVF_CPU_AVX2) level = KVF_CPU_LEVEL_AVX2; /* 35,000 tokens */
    recall = least;
    rig r = open_rig(false, kind);
    r.c.p.ops = &near_ops;
    kvf_status rc = KVF_OK;
    for (int64_t at = 0; rc >= 0 && at < INIT + WINDOW + (ENOUGH + 4) * UNIT; at += CHUNK) rc = add(&r, at % (N - CHUNK), CHUNK);
    close_rig(&r);
    return rc;
}

Test(reps, an_index_that_finds_too_little_refuses_to_serve)
{
    cr_assert_eq(ask_index("PQ1x1", 0.9), KVF_ERR_UNSUPPORTED);
    cr_assert(strstr(err.msg, "index 'PQ1x1' finds") && strstr(err.msg, "index=flat"), "%s", err.msg);
    cr_assert_eq(ask_index("PQ1x1", 0), KVF_OK, "%s", err.msg);
}
