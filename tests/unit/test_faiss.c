/* test_faiss.c - indexes of FAISS against exact search: Flat equals it, approximate kinds find a stated
 * share of it, and what FAISS leaves open (ties, training, NaN, unknown kinds) is as faiss_index.h says.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "memory/faiss_index.h"
#ifdef KVF_HAVE_FAISS
#include <omp.h>
#endif

enum { DIM = 64, K = 16 };

static kvf_error err;

static float noise(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*state >> 32) * 0x1p-31f;
}

static float *room(int64_t n)
{
    float *x = kvf_alloc(&kvf_mem_default, (size_t)n * DIM, sizeof *x);
    cr_assert_not_null(x);
    return x;
}

static void fill(float *x, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n * DIM; i++) x[i] = noise(&seed);
}

/* n vectors around `centres` centres. */
static void fill_clusters(float *x, int64_t n, int64_t centres, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++) {
        uint64_t centre = 1000 + (uint64_t)(i % centres);
        for (int c = 0; c < DIM; c++) x[i * DIM + c] = noise(&centre) + 0.4f * noise(&seed);
    }
}

/* Keys as attention has them: a few channels with an offset that dwarfs the rest. */
static void fill_biased(float *x, int64_t n, uint64_t seed)
{
    fill(x, n, seed);
    for (int64_t i = 0; i < n; i++) {
        x[i * DIM + 5] += 150;
        x[i * DIM + 40] -= 60;
    }
}

static kvf_index *open_kind(const char *kind)
{
    kvf_index *ix = NULL;
    kvf_status st = kvf_faiss_open(&ix, kind, DIM, &kvf_mem_default, &err);
#ifndef KVF_HAVE_FAISS
    if (st == KVF_ERR_UNSUPPORTED) cr_skip_test("built without FAISS");
#endif
    cr_assert_eq(st, KVF_OK, "%s: %s", kind, err.msg);
    return ix;
}

/* Share of the exact K best that kind finds, mean over the queries. */
static double recall(const char *kind, const float *x, int64_t n, const float *q, int64_t n_q)
{
    kvf_index *ix = open_kind(kind);
    int64_t ids[K], want[K], found, hits = 0;
    float score[K];
    cr_assert_eq(ix->ops->add(ix, x, n, &err), KVF_OK, "%s: %s", kind, err.msg);
    for (int64_t t = 0; t < n_q; t++) {
        cr_assert_eq(ix->ops->search(ix, q + t * DIM, K, ids, &found, &err), KVF_OK, "%s: %s", kind, err.msg);
        cr_assert_eq(kvf_exact_search(x, n, DIM, q + t * DIM, K, want, score), K);
        for (int64_t i = 0; i < found; i++)
            for (int64_t j = 0; j < K; j++) hits += ids[i] == want[j];
    }
    ix->ops->close(ix);
    return (double)hits / (double)(n_q * K);
}

Test(faiss_exact, exact_search_orders_by_score_then_number)
{
    float x[6 * 2] = { 1, 0, 3, 0, 2, 0, 3, 0, 0, 0, 2, 0 }, q[2] = { 1, 1 }, score[6];
    int64_t ids[6], want[6] = { 1, 3, 2, 5, 0, 4 };
    for (int64_t k = 1; k <= 6; k++) {
        cr_assert_eq(kvf_exact_search(x, 6, 2, q, k, ids, score), k);
        cr_assert_arr_eq(ids, want, (size_t)k * sizeof *ids);
    }
    cr_assert_eq(kvf_exact_search(x, 0, 2, q, 3, ids, score), 0);
    cr_assert_eq(kvf_exact_search(x, 2, 2, q, 0, ids, score), 0);
}

Test(faiss, a_build_without_it_says_so)
{
    kvf_index *ix = (kvf_index *)&err;
    kvf_status st = kvf_faiss_open(&ix, "Flat", DIM, &kvf_mem_default, &err);
    if (st == KVF_OK) {
        ix->ops->close(ix);
        cr_skip_test("built with FAISS");
    }
    cr_assert_eq(st, KVF_ERR_UNSUPPORTED);
    cr_assert_null(ix);
    cr_assert(strstr(err.msg, "libfaiss-dev"), "%s", err.msg);
}

/* Small whole numbers: sums are exact in any order, so ids must agree one by one, ties included. */
Test(faiss, flat_equals_exact_search_with_its_ties)
{
    for (int64_t n = 0; n < 400; n = n * 3 + 1) {
        float *x = room(n + 1), q[DIM], score[400];
        int64_t ids[400], want[400];
        uint64_t seed = (uint64_t)n + 7;
        for (int64_t i = 0; i < n * DIM; i++) x[i] = (float)(int)(2 * noise(&seed));
        kvf_index *ix = open_kind("Flat");
        cr_assert_eq(ix->ops->add(ix, x, n / 2, &err), KVF_OK);
        cr_assert_eq(ix->ops->add(ix, x + n / 2 * DIM, n - n / 2, &err), KVF_OK);
        cr_assert_eq(ix->n, n);
        for (int t = 0; t < 20; t++) {
            for (int c = 0; c < DIM; c++) q[c] = (float)(int)(2 * noise(&seed));
            for (int64_t k = 0; k <= n + 1; k = 2 * k + 1) {
                int64_t found = -1;
                cr_assert_eq(ix->ops->search(ix, q, k, ids, &found, &err), KVF_OK, "%s", err.msg);
                cr_assert_eq(found, kvf_exact_search(x, n, DIM, q, k, want, score));
                if (found) cr_assert_arr_eq(ids, want, (size_t)found * sizeof *ids, "n %d k %d", (int)n, (int)k);
            }
        }
        ix->ops->close(ix);
        kvf_free(&kvf_mem_default, x);
    }
}

Test(faiss, equal_vectors_come_in_the_order_of_adding)
{
    float *x = room(100);
    for (int i = 0; i < 100; i++) x[i * DIM] = 2;
    kvf_index *ix = open_kind("Flat");
    cr_assert_eq(ix->ops->add(ix, x, 100, &err), KVF_OK);
    int64_t ids[K], n;
    cr_assert_eq(ix->ops->search(ix, x, 8, ids, &n, &err), KVF_OK);
    cr_assert_eq(n, 8);
    for (int i = 0; i < 8; i++) cr_assert_eq(ids[i], i);
    ix->ops->close(ix);
    kvf_free(&kvf_mem_default, x);
}

Test(faiss, approximate_kinds_find_the_stated_share)
{
    enum { N = 4000, N_Q = 40 };
    /* Bounds under what these seeds give; clustered, biased (inner product with offsets of 150). HNSW gets
     * 0.25 there: its graph links vectors to their own best, and all of those are the few longest. */
    static const struct { const char *kind; double clusters, biased; } bound[] = {
        { "SQfp16", 0.99, 0.90 }, { "HNSW32", 0.80, 0.10 }, { "IVF64+Flat", 0.80, 0.30 },
        { "PQ32x4fs", 0.40, 0.40 }, { "SQ8", 0.95, 0.90 },
    };
    float *x = room(N), *q = room(N_Q);
    for (size_t i = 0; i < sizeof bound / sizeof bound[0]; i++) {
        fill_clusters(x, N, 50, 3);
        fill_clusters(q, N_Q, 50, 4);
        double clusters = recall(bound[i].kind, x, N, q, N_Q);
        fill_biased(x, N, 5);
        fill(q, N_Q, 6);
        double biased = recall(bound[i].kind, x, N, q, N_Q);
        cr_expect_geq(clusters, bound[i].clusters, "%s: %f", bound[i].kind, clusters);
        cr_expect_geq(biased, bound[i].biased, "%s: %f", bound[i].kind, biased);
    }
    kvf_free(&kvf_mem_default, x);
    kvf_free(&kvf_mem_default, q);
}

Test(faiss, untrained_kinds_search_exactly_until_there_is_enough)
{
    enum { ENOUGH = 39 * 64, N = ENOUGH + 500 };
    float *x = room(N), q[DIM], score[K];
    int64_t ids[K], want[K], n;
    fill(x, N, 11);
    kvf_index *ix = open_kind("IVF64+Flat");
    for (int64_t have = 0; have < ENOUGH - 1; have += 415) {
        int64_t step = have + 415 < ENOUGH ? 415 : ENOUGH - 1 - have;
        cr_assert_eq(ix->ops->add(ix, x + have * DIM, step, &err), KVF_OK, "%s", err.msg);
    }
    cr_assert_eq(ix->n, ENOUGH - 1);
    fill(q, 1, 12);
    cr_assert_eq(ix->ops->search(ix, q, K, ids, &n, &err), KVF_OK);
    cr_assert_eq(kvf_exact_search(x, ENOUGH - 1, DIM, q, K, want, score), n);
    cr_assert_arr_eq(ids, want, sizeof ids);
    size_t collected = ix->ops->bytes(ix);
    cr_assert_geq(collected, (size_t)(ENOUGH - 1) * DIM * 4);

    /* The one that is missing trains it; every vector keeps its number. */
    cr_assert_eq(ix->ops->add(ix, x + (ENOUGH - 1) * DIM, N - ENOUGH + 1, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(ix->n, N);
    int hits = 0;
    for (int64_t i = 0; i < N; i += 97) {
        float far[DIM];
        for (int c = 0; c < DIM; c++) far[c] = x[i * DIM + c];
        cr_assert_eq(ix->ops->search(ix, far, 1, ids, &n, &err), KVF_OK);
        cr_assert_eq(n, 1);
        hits += ids[0] == i;
    }
    cr_assert_geq(hits, (N / 97) * 8 / 10, "%d", hits);
    ix->ops->close(ix);
    kvf_free(&kvf_mem_default, x);
}

Test(faiss, reset_forgets_the_vectors)
{
    static const char *const kinds[] = { "Flat", "HNSW16", "SQ8", "PQ32x4fs" };
    enum { N = 1500 };
    float *x = room(N), q[DIM];
    int64_t ids[K], n;
    fill(x, N, 21);
    fill(q, 1, 22);
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        kvf_index *ix = open_kind(kinds[i]);
        for (int round = 0; round < 2; round++) {
            int64_t many = round ? 10 : N;
            cr_assert_eq(ix->ops->add(ix, x, many, &err), KVF_OK, "%s: %s", kinds[i], err.msg);
            cr_assert_eq(ix->ops->search(ix, q, K, ids, &n, &err), KVF_OK, "%s", err.msg);
            cr_assert_eq(n, many < K ? many : K, "%s: %d", kinds[i], (int)n);
            for (int64_t j = 0; j < n; j++) cr_assert(ids[j] >= 0 && ids[j] < many);
            cr_assert_eq(ix->ops->reset(ix, &err), KVF_OK, "%s", err.msg);
            cr_assert_eq(ix->n, 0);
            cr_assert_eq(ix->ops->search(ix, q, K, ids, &n, &err), KVF_OK);
            cr_assert_eq(n, 0);
        }
        ix->ops->close(ix);
    }
    kvf_free(&kvf_mem_default, x);
}

Test(faiss, unknown_kinds_are_arguments_with_its_sentence)
{
    static const char *const bad[] = { "", "Flatt", "nonsense", "IVF+Flat", "PQ7x4fs", "IVF99999999999999999999+Flat",
                                       "HNSW70000", "LSH", "+", "Flat,", "PQ33" };
    kvf_index *ix = open_kind("Flat");
    ix->ops->close(ix);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ix = (kvf_index *)&err;
        memset(&err, 0, sizeof err);
        cr_expect_eq(kvf_faiss_open(&ix, bad[i], DIM, &kvf_mem_default, &err), KVF_ERR_ARG, "'%s'", bad[i]);
        cr_expect_null(ix, "'%s'", bad[i]);
        cr_expect(strlen(err.msg) > 20, "'%s': '%s'", bad[i], err.msg);
        cr_expect_null(strstr(err.msg, ".cpp"), "%s", err.msg);
    }
    cr_expect_eq(kvf_faiss_open(&ix, "Flat", 0, &kvf_mem_default, &err), KVF_ERR_ARG);
    cr_expect_eq(kvf_faiss_open(&ix, "Flat", -3, &kvf_mem_default, NULL), KVF_ERR_ARG);
    char longest[300];
    memset(longest, 'F', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    cr_expect_eq(kvf_faiss_open(&ix, longest, DIM, &kvf_mem_default, &err), KVF_ERR_ARG);
}

Test(faiss, what_is_not_a_number_is_refused_and_changes_nothing)
{
    float *x = room(3), q[DIM] = { 0 };
    int64_t ids[4], n = 7;
    kvf_index *ix = open_kind("Flat");
    fill(x, 3, 31);
    cr_assert_eq(ix->ops->add(ix, x, 3, &err), KVF_OK);
    static const float bad[] = { NAN, INFINITY, -INFINITY };
    for (int i = 0; i < 3; i++) {
        x[DIM + 9] = bad[i];
        cr_assert_eq(ix->ops->add(ix, x, 3, &err), KVF_ERR_ARG);
        cr_assert(strstr(err.msg, "vector 1"), "%s", err.msg);
        cr_assert_eq(ix->n, 3);
        q[63] = bad[i];
        cr_assert_eq(ix->ops->search(ix, q, 2, ids, &n, &err), KVF_ERR_ARG);
        cr_assert_eq(n, 0);
    }
    q[63] = 1;
    cr_assert_eq(ix->ops->search(ix, q, -1, ids, &n, &err), KVF_ERR_ARG);
    cr_assert_eq(ix->ops->add(ix, x, -1, &err), KVF_ERR_ARG);
    cr_assert_eq(ix->ops->search(ix, q, 4, ids, &n, &err), KVF_OK);
    cr_assert_eq(n, 3);
    ix->ops->close(ix);
    kvf_free(&kvf_mem_default, x);
}

#ifdef KVF_HAVE_FAISS
Test(faiss, the_hosts_openmp_setting_stays)
{
    float *x = room(2000);
    int64_t ids[K], n;
    fill(x, 2000, 41);
    omp_set_num_threads(3);
    kvf_index *ix = open_kind("IVF8+Flat");
    cr_assert_eq(ix->ops->add(ix, x, 2000, &err), KVF_OK);
    cr_assert_eq(ix->ops->search(ix, x, K, ids, &n, &err), KVF_OK);
    cr_assert_eq(omp_get_max_threads(), 3);
    ix->ops->close(ix);
    kvf_free(&kvf_mem_default, x);
}
#endif

/* ---- Allocation failures -------------------------------------------------------------------- */

typedef struct budget { int left; } budget;

static void *get(void *user, size_t bytes)
{
    budget *b = user;
    return b->left-- > 0 ? malloc(bytes) : NULL;
}

static void put_back(void *user, void *ptr)
{
    (void)user;
    free(ptr);
}

Test(faiss, refused_memory_is_a_status)
{
    float *x = room(1100);
    int64_t ids[K], n;
    fill(x, 1100, 61);
    kvf_index *probe = open_kind("Flat");
    probe->ops->close(probe);
    int ok = 0;
    for (int left = 0; left < 12 && !ok; left++) {
        budget b = { left };
        kvf_mem mem = { get, put_back, &b };
        kvf_index *ix = NULL;
        kvf_status st = kvf_faiss_open(&ix, "SQ8", DIM, &mem, &err);
        if (st == KVF_OK) st = ix->ops->add(ix, x, 600, &err);
        if (st == KVF_OK) st = ix->ops->search(ix, x, K, ids, &n, &err);
        if (st == KVF_OK) st = ix->ops->add(ix, x + 600 * DIM, 500, &err);
        if (st == KVF_OK) st = ix->ops->search(ix, x, K, ids, &n, &err);
        cr_assert(st == KVF_OK || st == KVF_ERR_NOMEM, "left %d: %s", left, err.msg);
        ok = st == KVF_OK;
        if (ix) ix->ops->close(ix);
    }
    cr_assert(ok);
    kvf_free(&kvf_mem_default, x);
}
