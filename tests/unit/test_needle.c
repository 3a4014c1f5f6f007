/* test_needle.c - one key among ten thousand units: does the policy choose the unit that holds what a query
 * asks for, wherever it lies and whatever resembles it (infllm_lazyllm.md, 6.4, group 10)? Digests and votes
 * are the backend's, the choice is the policy's; no model is needed.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"
#include "kv/pool.h"
#include "policy/policy.h"

enum { HEADS = 2, DIM = 64, VARIANTS = 8, MOST = 10000 };

static const kvf_dims dims = { 1, HEADS, 1, DIM };
static kvf_error err;
static kvf_threads *threads;
static kvf_backend *backend;
static kvf_pool *pool;
static kvf_policy *policy;
static kvf_memory m;
static int32_t slot;
static float query[HEADS * DIM], lse[HEADS];
static uint64_t seed = 11;
static const void *rows[MOST + 1]; /* digests of blocks; unit u is block u + 1, behind the first tokens */

static float noise(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(seed >> 32) * 0x1p-31f;
}

static void setup(void)
{
    unsigned flags = kvf_cpu_detect();
    cr_assert_eq(kvf_threads_open(&threads, 1, &kvf_mem_default, &err), KVF_OK);
    kvf_cpu_backend_params p = { .level = flags & KVF_CPU_AVX2 ? KVF_CPU_LEVEL_AVX2 : KVF_CPU_LEVEL_REF, .flags = flags,
                                 .threads = threads, .mem = &kvf_mem_default };
    cr_assert_eq(kvf_cpu_backend_open(&backend, &p, &err), KVF_OK);
    kvf_pool_params pp = { backend, 1, DIM, 1, 0 };
    cr_assert_eq(kvf_pool_open(&pool, &pp, &err), KVF_OK);
    cr_assert_eq(kvf_pool_take(pool, &slot, &err), KVF_OK);
    for (int i = 0; i < DIM; i++) query[i] = query[DIM + i] = 2 * noise();
    for (int h = 0; h < HEADS; h++) lse[h] = logf(4096); /* what is read anyway: 4096 keys that say nothing */
}

static void teardown(void)
{
    kvf_pool_close(pool);
    backend->ops->close(backend);
    kvf_threads_close(threads);
}

TestSuite(needle, .init = setup, .fini = teardown);

/* A block of random keys; key `at` points where the query does, as far as `cosine` says. -1: none. */
static void *make_block(int at, double cosine)
{
    kvf_f16 *keys = kvf_kv_slot(kvf_pool_view(pool), slot);
    double dot = 0, qq = 0, kk = 0;
    memset(keys, 0, kvf_pool_slot_bytes(pool));
    for (int t = 0; t < KVF_BLOCK; t++) {
        float key[DIM];
        for (int i = 0; i < DIM; i++) key[i] = noise();
        if (t == at) { /* the part across the query, then the part along it */
            for (int i = 0; i < DIM; i++) dot += (double)key[i] * (double)query[i], qq += (double)query[i] * (double)query[i];
            for (int i = 0; i < DIM; i++) key[i] -= (float)(dot / qq * (double)query[i]);
            for (int i = 0; i < DIM; i++) kk += (double)key[i] * (double)key[i];
            double along = 4.6 * cosine / sqrt(qq), across = 4.6 * sqrt(1 - cosine * cosine) / sqrt(kk);
            for (int i = 0; i < DIM; i++) key[i] = (float)(across * (double)key[i] + along * (double)query[i]);
        }
        for (int i = 0; i < DIM; i++) keys[t * DIM + i] = kvf_f16_from_f32(key[i]);
    }
    void *out = kvf_alloc(&kvf_mem_default, kvf_digest_bytes(&m.fine), 1);
    kvf_digest_args a = { .kv = kvf_pool_view(pool), .slot = slot, .n_tok = KVF_BLOCK, .digest = &m.fine, .out = out };
    cr_assert_eq(backend->ops->digest(backend, &a, 1, &err), KVF_OK);
    return out;
}

static int64_t n_unit, per; /* units of all blocks; of a block */

static kvf_status vote(void *lookup, bool fine, const kvf_vote_rule *rule, float *votes, kvf_error *e)
{
    (void)lookup;
    cr_assert(fine, "a question looks at every key");
    kvf_vote_args a = { .q = query, .lse = lse, .n_q = 1, .scale = 0.125f, .digest = &m.fine, .rows = rows,
                        .unit = m.unit, .unit0 = per, .n_unit = n_unit, .rule = *rule, .vote = votes };
    return backend->ops->vote(backend, &a, e);
}

static bool found(int64_t unit)
{
    static uint8_t use[MOST * KVF_BLOCK / 32];
    kvf_retrieve r = { .n_set = 1, .n_past = n_unit * m.unit + 5000, .n_tok = 1, .unit0 = per, .n_unit = n_unit, .vote = vote };
    int64_t n = 0;
    policy->ops->forget(policy, 0);
    cr_assert_eq(policy->ops->retrieve(policy, &r, use, &err), KVF_OK, "%s", err.msg);
    for (int64_t u = 0; u < n_unit; u++) n += use[u] != 0;
    cr_assert_eq(n, m.n_unit);
    return use[unit];
}

/* Share of the depths, every `step`-th, at which the unit is chosen. n_like units hold a key of cosine `like`. */
static double recall(const char *spec, int64_t units, int64_t step, int n_like, double like)
{
    static void *own[MOST];
    void *needle[VARIANTS];
    int64_t hits = 0, n = 0;
    cr_assert_eq(kvf_policy_open(&policy, spec, dims, &kvf_mem_default, &err), KVF_OK, "%s", err.msg);
    policy->ops->memory(policy, &m);
    per = KVF_BLOCK / m.unit;
    n_unit = units * per;
    for (int i = 0; i < VARIANTS; i++) needle[i] = make_block(i * 17, 1);
    for (int64_t u = 0; u < units; u++) {
        bool resembles = n_like && u % (units / n_like) == 3;
        rows[u + 1] = own[u] = make_block(resembles ? (int)(u % KVF_BLOCK) : -1, like);
    }
    rows[0] = own[0];
    for (int64_t u = 0; u < units; u += step, n++) {
        rows[u + 1] = needle[n % VARIANTS];
        hits += found(u * per + n % VARIANTS * 17 / m.unit);
        rows[u + 1] = own[u];
    }
    for (int64_t u = 0; u < units; u++) kvf_free(&kvf_mem_default, own[u]);
    for (int i = 0; i < VARIANTS; i++) kvf_free(&kvf_mem_default, needle[i]);
    kvf_policy_close(policy);
    return (double)hits / (double)n;
}

Test(needle, at_every_depth_of_a_thousand_units)
{
    cr_expect_eq(recall("infllm:block=128,ask=16", 1000, 1, 0, 0), 1);
    cr_expect_eq(recall("infllm", 1000, 1, 0, 0), 1);
    cr_expect_eq(recall("infllm:block=16,topk=16,ask=16", 1000, 3, 0, 0), 1);
    cr_expect_eq(recall("infllm:block=128,ask=16,bits=4", 1000, 5, 0, 0), 1);
}

Test(needle, among_ten_thousand_units) { cr_assert_eq(recall("infllm:block=128,ask=16", MOST, 157, 0, 0), 1); }

/* More that resembles it than there are places. */
Test(needle, among_a_hundred_that_resemble_it)
{
    static const double like[] = { 0.5, 0.7, 0.8, 0.85 };
    for (int i = 0; i < 4; i++) {
        double r = recall("infllm:block=128,ask=16", 1000, 3, 100, like[i]);
        cr_expect_eq(r, 1, "cosine %.2f: %.3f", like[i], r);
    }
}

/* What a mean over a unit cannot see, which is why it is not the default. */
Test(needle, the_mean_of_a_unit_does_not_show_one_key) { cr_assert_lt(recall("infllm:block=128,ask=16,select=mean", 1000, 7, 0, 0), 0.9); }
