/* test_mass.c - attn_mass together with attn: whose lse it takes. At every level, the shares of a list
 * sum to the number of queries, those of lists that were merged too; holes (NaN) and heads that were not
 * asked for stay as they are; and what attn itself says about one query (runs) is the same. test_votes.c holds
 * the shares of single keys to the formula.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"

enum { N_BLOCK = 11, KEYS = N_BLOCK * KVF_BLOCK };

typedef struct world {
    kvf_attn_args a;
    kvf_kv_view view;
    void *slab[1];
    int32_t slots[N_BLOCK];
    uint8_t valid[2 * N_BLOCK];
    float *q, *o, *lse, *mass; /* mass [n_head][KEYS] */
} world;

static kvf_error err;
static uint64_t rng = 7;

static uint32_t rnd(void)
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(rng >> 33);
}

static float rnd_unit(void) { return (float)rnd() / 1073741824.0f - 1.0f; } /* -1..1 */

static void *get(size_t bytes)
{
    void *p = kvf_alloc_raw(&kvf_mem_default, bytes, 1);
    cr_assert_not_null(p);
    return p;
}

static bool held(const world *w, int64_t key)
{
    int64_t place = key % KVF_BLOCK;
    return !w->a.valid || (place >= w->valid[key / KVF_BLOCK * 2] && place < w->valid[key / KVF_BLOCK * 2 + 1]);
}

/* All of K and V is NaN but the keys of the list. */
static void fill_kv(world *w)
{
    int64_t d = w->a.head_dim, n_head_kv = w->a.n_head_kv;
    size_t halves = (size_t)(2 * n_head_kv * KVF_BLOCK * d);
    w->view = (kvf_kv_view){ .slab = w->slab, .shift = 10, .slot_bytes = halves * 2 };
    kvf_f16 *all = w->slab[0] = get(N_BLOCK * halves * 2);
    for (size_t i = 0; i < N_BLOCK * halves; i++) all[i] = 0x7e00;
    for (int32_t i = 0; i < N_BLOCK; i++) w->slots[i] = (i * 7 + 3) % N_BLOCK;
    for (int64_t key = 0; key < w->a.n_key; key++) {
        if (!held(w, key)) continue;
        kvf_f16 *slot = kvf_kv_slot(&w->view, w->slots[key / KVF_BLOCK]);
        for (int64_t h = 0; h < 2 * n_head_kv; h++)
            for (int64_t i = 0; i < d; i++) slot[(h * KVF_BLOCK + key % KVF_BLOCK) * d + i] = kvf_f16_from_f32(rnd_unit());
    }
}

/* Case `turn`: decode and prefill, with and without a window, a soft cap and holes. */
static void make(world *w, int turn)
{
    static const int32_t heads[][3] = { { 14, 2, 64 }, { 6, 3, 32 }, { 4, 1, 256 }, { 8, 8, 40 }, { 24, 2, 64 }, { 20, 1, 40 } };
    const int32_t *m = heads[turn % 6];
    memset(w, 0, sizeof *w);
    int64_t n_tok = turn % 3 == 0 ? 1 : turn % 3 == 1 ? 6 : 21, n_key = KEYS - (turn % 5) * 31;
    w->a = (kvf_attn_args){ .n_tok = n_tok, .n_head = m[0], .n_head_kv = m[1], .head_dim = m[2], .scale = 0.5f,
                            .softcap = turn % 4 == 2 ? 4.0f : 0.0f, .kv = &w->view, .slots = w->slots, .n_key = n_key,
                            .q_first = turn % 2 ? n_key - n_tok : n_key + 60, .window = turn % 5 == 3 ? 700 : 0 };
    if (turn % 2) w->a.valid = w->valid;
    for (int i = 0; i < N_BLOCK; i++) {
        w->valid[2 * i] = (uint8_t)(8 * (rnd() % 9));
        w->valid[2 * i + 1] = i % 4 == 2 ? w->valid[2 * i] : (uint8_t)(8 * (8 + rnd() % 9));
    }
    /* The first and the last block have keys, so that each query sees some. */
    w->valid[0] = w->valid[2 * N_BLOCK - 2] = 0;
    size_t rows = (size_t)(n_tok * m[0]), n = rows * (size_t)m[2];
    w->a.q = w->q = get(n * sizeof(float));
    w->a.o = w->o = get(n * sizeof(float));
    w->a.lse = w->lse = get(rows * sizeof(float));
    w->mass = get((size_t)m[0] * KEYS * sizeof(float));
    for (size_t i = 0; i < n; i++) w->q[i] = rnd_unit();
    for (int64_t i = 0; i < m[0] * KEYS; i++) w->mass[i] = 0.0f;
    fill_kv(w);
}

static void drop(world *w)
{
    kvf_free(&kvf_mem_default, w->slab[0]);
    kvf_free(&kvf_mem_default, w->q);
    kvf_free(&kvf_mem_default, w->o);
    kvf_free(&kvf_mem_default, w->lse);
    kvf_free(&kvf_mem_default, w->mass);
}

static kvf_backend *open_level(kvf_cpu_level level, kvf_threads *threads)
{
    kvf_backend *b;
    kvf_cpu_backend_params p = { .level = level, .flags = kvf_cpu_detect(), .threads = threads, .mem = &kvf_mem_default };
    cr_assert_eq(kvf_cpu_backend_open(&b, &p, &err), KVF_OK);
    return b;
}

/* fn on every case at every level of this machine, on three threads. */
static void each(void (*fn)(kvf_backend *b, world *w, bool bf16))
{
    kvf_threads *threads;
    kvf_cpu_level best;
    cr_assert_eq(kvf_cpu_level_parse(&best, "auto", kvf_cpu_detect(), &err), KVF_OK);
    cr_assert_eq(kvf_threads_open(&threads, 3, &kvf_mem_default, &err), KVF_OK);
    for (kvf_cpu_level level = KVF_CPU_LEVEL_REF; level <= best; level++) {
        kvf_backend *b = open_level(level, threads);
        for (int turn = 0; turn < 20; turn++) {
            world w;
            make(&w, turn);
            fn(b, &w, level >= KVF_CPU_LEVEL_AMX);
            drop(&w);
        }
        b->ops->close(b);
    }
    kvf_threads_close(threads);
}

static void add_mass(kvf_backend *b, world *w, bool sum_heads)
{
    kvf_attn_mass_args m = { .attn = &w->a, .sum_heads = sum_heads, .mass = w->mass };
    cr_assert_eq(b->ops->attn_mass(b, &m, &err), KVF_OK, "%s", err.msg);
}

static void attend(kvf_backend *b, world *w) { cr_assert_eq(b->ops->attn(b, &w->a, &err), KVF_OK, "%s", err.msg); }

/* Each row of mass sums to what it should; a hole got nothing. Queries that see no key count nothing. */
static void check_sums(const world *w, int64_t n_row, double heads, bool bf16)
{
    for (int64_t h = 0; h < n_row; h++) {
        double sum = 0.0, want = 0.0, tol = bf16 ? 1e-2 : 2e-4;
        for (int64_t j = 0; j < w->a.n_key; j++) {
            sum += (double)w->mass[h * KEYS + j];
            if (!held(w, j)) cr_assert(w->mass[h * KEYS + j] == 0.0f);
        }
        for (int64_t i = 0; i < w->a.n_tok; i++) want += w->lse[i * w->a.n_head + h] > -INFINITY ? heads : 0.0;
        cr_assert_gt(want, 0.0);
        cr_assert(fabs(sum - want) <= tol * want, "row %d sums to %g, not %g (n_tok %d, head_dim %d)", (int)h, sum, want,
                  (int)w->a.n_tok, w->a.head_dim);
    }
}

static void sums_per_head(kvf_backend *b, world *w, bool bf16)
{
    attend(b, w);
    add_mass(b, w, false);
    check_sums(w, w->a.n_head, 1.0, bf16);
}

Test(mass, shares_of_a_list_sum_to_the_number_of_queries) { each(sums_per_head); }

static void sums_of_heads(kvf_backend *b, world *w, bool bf16)
{
    attend(b, w);
    add_mass(b, w, true);
    check_sums(w, 1, w->a.n_head, bf16);
    for (int64_t j = KEYS; j < w->a.n_head * KEYS; j++) cr_assert(w->mass[j] == 0.0f);
}

Test(mass, summed_over_heads_it_counts_each_head) { each(sums_of_heads); }

/* The list cut in two at a block: lse merged, then the mass of either part against it. */
static void sums_of_parts(kvf_backend *b, world *w, bool bf16)
{
    enum { CUT = 4 * KVF_BLOCK };
    const kvf_attn_args whole = w->a;
    size_t rows = (size_t)(whole.n_tok * whole.n_head);
    float *o2 = get(rows * (size_t)whole.head_dim * sizeof(float)), *lse2 = get(rows * sizeof(float));
    kvf_attn_args first = whole, second = whole;
    first.n_key = CUT;
    second.o = o2;
    second.lse = lse2;
    second.slots += 4;
    second.valid = whole.valid ? whole.valid + 8 : NULL;
    second.n_key -= CUT;
    second.q_first -= CUT;
    w->a = first;
    attend(b, w);
    w->a = second;
    attend(b, w);
    kvf_lse_merge_args merge = { .o = w->o, .lse = w->lse, .o2 = o2, .lse2 = lse2, .n_row = (int64_t)rows, .head_dim = whole.head_dim };
    cr_assert_eq(b->ops->lse_merge(b, &merge, &err), KVF_OK);
    float *mass = get((size_t)(whole.n_head * KEYS) * sizeof(float));
    for (int part = 0; part < 2; part++) {
        int64_t from = part ? CUT : 0, width = part ? KEYS - CUT : CUT;
        kvf_attn_args *a = part ? &second : &first;
        a->lse = w->lse;
        memset(mass, 0, (size_t)(whole.n_head * KEYS) * sizeof(float));
        kvf_attn_mass_args m = { .attn = a, .mass = mass };
        cr_assert_eq(b->ops->attn_mass(b, &m, &err), KVF_OK);
        int64_t stride = (a->n_key + KVF_BLOCK - 1) / KVF_BLOCK * KVF_BLOCK;
        for (int64_t h = 0; h < whole.n_head; h++)
            for (int64_t j = 0; j < width && j < a->n_key; j++) w->mass[h * KEYS + from + j] = mass[h * stride + j];
    }
    w->a = whole;
    check_sums(w, whole.n_head, 1.0, bf16);
    kvf_free(&kvf_mem_default, mass);
    kvf_free(&kvf_mem_default, o2);
    kvf_free(&kvf_mem_default, lse2);
}

Test(mass, shares_of_merged_lists_sum_to_the_number_of_queries) { each(sums_of_parts); }

enum { RUN = KVF_ATTN_RUN, RUNS = KEYS / RUN };

/* A call before that left NaN wherever this one keeps what it knows of a block, holes too. */
static void spoil_scratch(kvf_backend *b, world *w)
{
    kvf_attn_args a = w->a;
    size_t n = (size_t)(a.n_head * a.head_dim);
    float *q = get(n * sizeof(float));
    for (size_t i = 0; i < n; i++) q[i] = NAN;
    a.q = q;
    a.valid = NULL;
    a.window = 0;
    a.q_first = a.n_key;
    cr_assert_eq(b->ops->attn(b, &a, &err), KVF_OK, "%s", err.msg);
    kvf_free(&kvf_mem_default, q);
}

/* Sums of runs of one query beside o and lse, which stay the same bits: all heads, or those of KV heads h0..h1. */
static void runs_of(kvf_backend *b, world *w, int32_t h0, int32_t h1)
{
    size_t n = (size_t)(w->a.n_head * w->a.head_dim), n_head = (size_t)w->a.n_head;
    float *o = get(n * sizeof(float)), *lse = get(n_head * sizeof(float)), *runs = get(n_head * RUNS * sizeof(float));
    int64_t entries = (w->a.n_key + KVF_BLOCK - 1) / KVF_BLOCK, width = entries * (KVF_BLOCK / RUN);
    int32_t group = w->a.n_head / w->a.n_head_kv;
    w->a.head_kv0 = h0;
    w->a.head_kv1 = h1;
    for (size_t i = 0; i < n; i++) w->o[i] = 0.25f;
    for (size_t i = 0; i < n_head; i++) w->lse[i] = 0.25f;
    for (size_t i = 0; i < n_head * RUNS; i++) runs[i] = 0.25f;
    attend(b, w);
    memcpy(o, w->o, n * sizeof(float));
    memcpy(lse, w->lse, n_head * sizeof(float));
    w->a.runs = runs;
    spoil_scratch(b, w);
    attend(b, w);
    w->a.runs = NULL;
    cr_assert_eq(memcmp(o, w->o, n * sizeof(float)), 0);
    cr_assert_eq(memcmp(lse, w->lse, n_head * sizeof(float)), 0);
    memset(w->mass, 0, n_head * KEYS * sizeof(float));
    add_mass(b, w, false);
    for (int32_t h = 0; h < w->a.n_head; h++) {
        bool asked = h1 == 0 || (h / group >= h0 && h / group < h1);
        for (int64_t r = 0; r < width; r++) {
            double want = 0;
            for (int64_t j = r * RUN; j < (r + 1) * RUN; j++) want += (double)w->mass[h * entries * KVF_BLOCK + j];
            float got = runs[h * width + r];
            if (asked)
                cr_assert(fabs((double)got - want) <= 1e-6 + 1e-3 * want, "head %d run %d: %g, not %g", (int)h, (int)r,
                          (double)got, want);
            else
                cr_assert(got == 0.25f);
        }
    }
    kvf_free(&kvf_mem_default, o);
    kvf_free(&kvf_mem_default, lse);
    kvf_free(&kvf_mem_default, runs);
}

static void runs_of_one_query(kvf_backend *b, world *w, bool bf16)
{
    (void)bf16;
    float runs[1];
    cr_assert(b->ops->attn_runs);
    if (w->a.n_tok > 1) {
        w->a.runs = runs;
        cr_assert_eq(b->ops->attn(b, &w->a, &err), KVF_ERR_INTERNAL);
        w->a.runs = NULL;
    }
    w->a.n_tok = 1;
    runs_of(b, w, 0, 0);
    runs_of(b, w, w->a.n_head_kv / 2, w->a.n_head_kv / 2 + (w->a.n_head_kv + 3) / 4);
    w->a.n_key = 3 * KVF_BLOCK - 5; /* too short to split */
    w->a.q_first = w->a.n_key - 1;
    w->a.window = 0;
    runs_of(b, w, 0, 0);
    w->a.q_first = 20; /* the later blocks are not seen */
    runs_of(b, w, 0, 0);
}

Test(mass, one_query_says_where_it_looked) { each(runs_of_one_query); }

/* Only the heads asked for get anything, and that is what they get with all heads. */
static void some_heads(kvf_backend *b, world *w, bool bf16)
{
    (void)bf16;
    int32_t group = w->a.n_head / w->a.n_head_kv, h0 = w->a.n_head_kv / 2, h1 = h0 + (w->a.n_head_kv + 3) / 4;
    attend(b, w);
    add_mass(b, w, false);
    size_t n = (size_t)(w->a.n_head * KEYS);
    float *all = get(n * sizeof(float));
    memcpy(all, w->mass, n * sizeof(float));
    for (size_t i = 0; i < n; i++) w->mass[i] = 0.25f;
    w->a.head_kv0 = h0;
    w->a.head_kv1 = h1;
    add_mass(b, w, false);
    for (int32_t h = 0; h < w->a.n_head; h++) {
        bool asked = h / group >= h0 && h / group < h1;
        for (int64_t j = 0; j < KEYS; j++) {
            float got = w->mass[h * KEYS + j], want = asked ? 0.25f + all[h * KEYS + j] : 0.25f;
            cr_assert(asked ? fabsf(got - want) <= 1e-6f * want : got == want, "head %d key %d: %g, not %g", h, (int)j, (double)got, (double)want);
        }
    }
    kvf_free(&kvf_mem_default, all);
}

Test(mass, only_the_heads_asked_for_are_added_to) { each(some_heads); }
