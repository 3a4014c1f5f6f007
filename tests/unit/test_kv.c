/* test_kv.c - KV pool and sequences: budgets, reference counts, copy on write, all or nothing, and
 * attention over selected blocks against attention over a list built by hand.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"
#include "kv/kv.h"

enum { LAYERS = 3, HEADS = 4, HEADS_KV = 2, DIM = 16, WIDTH_KV = HEADS_KV * DIM, WIDTH_Q = HEADS * DIM };

static const kvf_dims dims = { LAYERS, HEADS, HEADS_KV, DIM };
static kvf_threads *threads;
static kvf_backend *backend;
static kvf_error err;

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

TestSuite(kv, .init = setup, .fini = teardown);

static kvf_pool *open_pool(int64_t slots, size_t budget)
{
    kvf_pool *pool;
    kvf_pool_params p = { backend, HEADS_KV, DIM, slots, budget };
    cr_assert_eq(kvf_pool_open(&pool, &p, &err), KVF_OK);
    return pool;
}

static float noise(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*state >> 32) * 0x1p-31f;
}

/* Append n tokens whose k and v are a function of (seed, layer, token). */
static void put(kvf_kv *kv, uint64_t seed, int64_t n)
{
    static float k[600 * WIDTH_KV], v[600 * WIDTH_KV];
    cr_assert_leq(n, 600);
    cr_assert_eq(kvf_kv_reserve(kv, n, &err), KVF_OK, "%s", err.msg);
    for (int32_t l = 0; l < LAYERS; l++) {
        for (int64_t t = 0; t < n; t++) {
            uint64_t s = seed * 1000003 + (uint64_t)l * 7919 + (uint64_t)(kvf_kv_len(kv) + t);
            for (int i = 0; i < WIDTH_KV; i++) {
                k[t * WIDTH_KV + i] = noise(&s);
                v[t * WIDTH_KV + i] = noise(&s);
            }
        }
        cr_assert_eq(kvf_kv_put(kv, l, k, v, n, &err), KVF_OK);
    }
}

static void append(kvf_kv *kv, uint64_t seed, int64_t n)
{
    put(kv, seed, n);
    cr_assert_eq(kvf_kv_commit(kv, n, &err), KVF_OK);
}

/* Attention of one query after the last committed token. */
static void attend(kvf_kv *kv, int32_t layer, kvf_policy *policy, float out[WIDTH_Q])
{
    float q[WIDTH_Q];
    uint64_t s = 99;
    for (int i = 0; i < WIDTH_Q; i++) q[i] = 3 * noise(&s);
    kvf_kv_attend_args a = { .layer = layer, .policy = policy, .q = q, .o = out, .n_tok = 0, .n_q = 0, .scale = 0.25f };
    a.n_q = 1;
    a.n_tok = 0;
    cr_assert_eq(kvf_kv_attend(kv, &a, &err), KVF_OK, "%s", err.msg);
}

Test(kv, pool_respects_its_budget_to_the_slot)
{
    size_t slot = 2 * HEADS_KV * KVF_BLOCK * DIM * 2;
    kvf_pool *pool = open_pool(1000, 5 * slot + slot / 2);
    int32_t id[6];
    for (int i = 0; i < 5; i++) cr_assert_eq(kvf_pool_take(pool, &id[i], &err), KVF_OK);
    cr_assert_eq(kvf_pool_take(pool, &id[5], &err), KVF_ERR_LIMIT);
    cr_assert(strstr(err.msg, "kv_bytes"));
    kvf_pool_unref(pool, id[2]);
    cr_assert_eq(kvf_pool_take(pool, &id[5], &err), KVF_OK);
    cr_assert_eq(id[5], id[2]);
    cr_assert_eq(kvf_pool_used(pool), 5);
    kvf_pool_close(pool);
}

Test(kv, slots_do_not_overlap)
{
    kvf_pool *pool = open_pool(700, 0);
    size_t bytes = kvf_pool_slot_bytes(pool);
    for (int i = 0; i < 700; i++) {
        int32_t s;
        cr_assert_eq(kvf_pool_take(pool, &s, &err), KVF_OK);
        memset(kvf_kv_slot(kvf_pool_view(pool), s), s & 255, bytes);
    }
    for (int32_t s = 0; s < 700; s++) {
        const uint8_t *p = kvf_kv_slot(kvf_pool_view(pool), s);
        cr_assert_eq(p[0], s & 255);
        cr_assert_eq(p[bytes - 1], s & 255);
    }
    kvf_pool_close(pool);
}

Test(kv, reserve_is_all_or_nothing)
{
    kvf_pool *pool = open_pool(LAYERS * 2, 0);
    kvf_kv *kv;
    cr_assert_eq(kvf_kv_open(&kv, pool, dims, &err), KVF_OK);
    append(kv, 1, 100);
    cr_assert_eq(kvf_pool_used(pool), LAYERS);
    cr_assert_eq(kvf_kv_reserve(kv, 200, &err), KVF_ERR_LIMIT);
    cr_assert_eq(kvf_pool_used(pool), LAYERS);
    cr_assert_eq(kvf_kv_len(kv), 100);
    append(kv, 1, 156); /* exactly two blocks */
    cr_assert_eq(kvf_pool_used(pool), 2 * LAYERS);
    kvf_kv_close(kv);
    cr_assert_eq(kvf_pool_used(pool), 0);
    kvf_pool_close(pool);
}

Test(kv, uncommitted_chunk_leaves_no_trace)
{
    kvf_pool *pool = open_pool(100, 0);
    kvf_kv *a, *b;
    cr_assert_eq(kvf_kv_open(&a, pool, dims, &err), KVF_OK);
    cr_assert_eq(kvf_kv_open(&b, pool, dims, &err), KVF_OK);
    append(a, 1, 300);
    append(b, 1, 300);
    put(a, 7, 200); /* cancelled here */
    append(a, 1, 50);
    append(b, 1, 50);
    float oa[WIDTH_Q], ob[WIDTH_Q];
    attend(a, 1, NULL, oa);
    attend(b, 1, NULL, ob);
    cr_assert_eq(memcmp(oa, ob, sizeof oa), 0);
    kvf_kv_close(a);
    kvf_kv_close(b);
    kvf_pool_close(pool);
}

Test(kv, truncate_then_append_equals_fresh)
{
    static const int64_t cuts[] = { 0, 1, 127, 128, 129, 255, 256, 300 };
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        kvf_pool *pool = open_pool(100, 0);
        kvf_kv *a, *b;
        cr_assert_eq(kvf_kv_open(&a, pool, dims, &err), KVF_OK);
        cr_assert_eq(kvf_kv_open(&b, pool, dims, &err), KVF_OK);
        append(a, 1, 300);
        kvf_kv_truncate(a, cuts[i]);
        cr_assert_eq(kvf_kv_len(a), cuts[i]);
        append(a, 2, 200);
        if (cuts[i] > 0) append(b, 1, cuts[i]);
        append(b, 2, 200);
        for (int32_t l = 0; l < LAYERS; l++) {
            float oa[WIDTH_Q], ob[WIDTH_Q];
            attend(a, l, NULL, oa);
            attend(b, l, NULL, ob);
            cr_assert_eq(memcmp(oa, ob, sizeof oa), 0, "cut %lld layer %d", (long long)cuts[i], l);
        }
        kvf_kv_close(a);
        kvf_kv_close(b);
        cr_assert_eq(kvf_pool_used(pool), 0);
        kvf_pool_close(pool);
    }
}

Test(kv, fork_shares_blocks_and_never_sees_the_other)
{
    kvf_pool *pool = open_pool(100, 0);
    kvf_kv *a, *b, *plain;
    cr_assert_eq(kvf_kv_open(&a, pool, dims, &err), KVF_OK);
    append(a, 1, 300);
    int64_t before = kvf_pool_used(pool);
    cr_assert_eq(kvf_kv_fork(&b, a, &err), KVF_OK);
    cr_assert_eq(kvf_pool_used(pool), before);
    append(a, 2, 20);
    append(b, 3, 20);
    cr_assert_eq(kvf_pool_used(pool), before + LAYERS); /* one copied tail a layer */
    cr_assert_eq(kvf_kv_open(&plain, pool, dims, &err), KVF_OK);
    append(plain, 1, 300);
    append(plain, 3, 20);
    kvf_kv_close(a);
    for (int32_t l = 0; l < LAYERS; l++) {
        float ob[WIDTH_Q], op[WIDTH_Q];
        attend(b, l, NULL, ob);
        attend(plain, l, NULL, op);
        cr_assert_eq(memcmp(ob, op, sizeof ob), 0);
    }
    kvf_kv_close(b);
    kvf_kv_close(plain);
    cr_assert_eq(kvf_pool_used(pool), 0);
    kvf_pool_close(pool);
}

Test(kv, fork_of_a_fork_survives_its_parents)
{
    kvf_pool *pool = open_pool(100, 0);
    kvf_kv *a, *b, *c;
    cr_assert_eq(kvf_kv_open(&a, pool, dims, &err), KVF_OK);
    append(a, 1, 130);
    cr_assert_eq(kvf_kv_fork(&b, a, &err), KVF_OK);
    cr_assert_eq(kvf_kv_fork(&c, b, &err), KVF_OK);
    float before[WIDTH_Q], after[WIDTH_Q];
    attend(c, 0, NULL, before);
    append(b, 5, 1);
    kvf_kv_close(a);
    kvf_kv_close(b);
    attend(c, 0, NULL, after);
    cr_assert_eq(memcmp(before, after, sizeof before), 0);
    kvf_kv_close(c);
    cr_assert_eq(kvf_pool_used(pool), 0);
    kvf_pool_close(pool);
}

Test(kv, window_policy_that_keeps_all_equals_full_bit_for_bit)
{
    kvf_pool *pool = open_pool(100, 0);
    kvf_kv *kv;
    kvf_policy *p;
    cr_assert_eq(kvf_kv_open(&kv, pool, dims, &err), KVF_OK);
    cr_assert_eq(kvf_policy_open(&p, "window:sink=0,window=100000", dims, &kvf_mem_default, &err), KVF_OK);
    append(kv, 1, 600);
    float full[WIDTH_Q], kept[WIDTH_Q];
    attend(kv, 2, NULL, full);
    attend(kv, 2, p, kept);
    cr_assert_eq(memcmp(full, kept, sizeof full), 0);
    kvf_policy_close(p);
    kvf_kv_close(kv);
    kvf_pool_close(pool);
}

/* Blocks 0 (sink) and 3, 4 (window of 100 before token 600) of 5: the same attention by the formula. */
Test(kv, window_policy_reads_sinks_and_window_only)
{
    kvf_pool *pool = open_pool(100, 0);
    kvf_kv *kv;
    kvf_policy *p;
    cr_assert_eq(kvf_kv_open(&kv, pool, dims, &err), KVF_OK);
    cr_assert_eq(kvf_policy_open(&p, "window:sink=4,window=100", dims, &kvf_mem_default, &err), KVF_OK);
    append(kv, 1, 600);
    float out[WIDTH_Q];
    attend(kv, 1, p, out);
    float q[WIDTH_Q];
    uint64_t s = 99;
    for (int i = 0; i < WIDTH_Q; i++) q[i] = 3 * noise(&s);
    for (int h = 0; h < HEADS; h++) {
        double sum = 0, want[DIM] = { 0 };
        for (int64_t t = 0; t < 600; t++) {
            if (t >= 128 && t < 384) continue; /* blocks 1, 2: 600 - 100 = 500 lies in block 3 */
            uint64_t st = 1 * 1000003 + 1 * 7919 + (uint64_t)t;
            float k[WIDTH_KV], v[WIDTH_KV];
            for (int i = 0; i < WIDTH_KV; i++) {
                k[i] = kvf_f32_from_f16(kvf_f16_from_f32(noise(&st)));
                v[i] = kvf_f32_from_f16(kvf_f16_from_f32(noise(&st)));
            }
            int g = h / (HEADS / HEADS_KV);
            double dot = 0;
            for (int i = 0; i < DIM; i++) dot += (double)q[h * DIM + i] * k[g * DIM + i];
            double e = exp(0.25 * dot);
            sum += e;
            for (int i = 0; i < DIM; i++) want[i] += e * v[g * DIM + i];
        }
        for (int i = 0; i < DIM; i++) cr_assert_float_eq(out[h * DIM + i], want[i] / sum, 1e-5);
    }
    int64_t read, seen;
    kvf_kv_counters c;
    kvf_kv_get_counters(kv, &c);
    read = c.n_block_read;
    seen = c.n_block_seen;
    cr_assert_eq(seen, 5);
    cr_assert_eq(read, 3);
    kvf_policy_close(p);
    kvf_kv_close(kv);
    kvf_pool_close(pool);
}

/* ---- Orders -------------------------------------------------------------------------------------- */

/* Token numbers come in a shuffled order; the sequence with an order of them must answer as one that holds
 * the chosen tokens in the text's order. Token t's keys are those of place t of put(). */
static void put_token(kvf_kv *kv, uint64_t seed, int64_t token)
{
    float k[WIDTH_KV], v[WIDTH_KV];
    cr_assert_eq(kvf_kv_reserve(kv, 1, &err), KVF_OK, "%s", err.msg);
    for (int32_t l = 0; l < LAYERS; l++) {
        uint64_t s = seed * 1000003 + (uint64_t)l * 7919 + (uint64_t)token;
        for (int i = 0; i < WIDTH_KV; i++) {
            k[i] = noise(&s);
            v[i] = noise(&s);
        }
        cr_assert_eq(kvf_kv_put(kv, l, k, v, 1, &err), KVF_OK);
    }
    cr_assert_eq(kvf_kv_commit(kv, 1, &err), KVF_OK);
}

enum { TOKENS = 300 };

static void shuffle(int32_t *a, int32_t n, uint64_t seed)
{
    for (int32_t i = 0; i < n; i++) a[i] = i;
    for (int32_t i = n - 1; i > 0; i--) {
        int32_t j = (int32_t)((noise(&seed) + 1) * 0.5f * (float)i), t = a[i];
        a[i] = a[j];
        a[j] = t;
    }
}

Test(kv, keys_in_an_order_are_attended_as_if_they_lay_so)
{
    kvf_pool *pool = open_pool(200, 0);
    kvf_kv *mixed, *sorted;
    int32_t came[TOKENS], place[TOKENS], order[TOKENS], at[1];
    cr_assert_eq(kvf_kv_open(&mixed, pool, dims, &err), KVF_OK);
    cr_assert_eq(kvf_kv_open(&sorted, pool, dims, &err), KVF_OK);
    shuffle(came, TOKENS, 17);
    for (int32_t i = 0; i < TOKENS; i++) {
        place[came[i]] = i;
        put_token(mixed, 4, came[i]);
    }
    int32_t n = 0;
    for (int32_t t = 0; t < TOKENS; t += 1 + t % 3) {
        order[n++] = place[t];
        put_token(sorted, 4, t);
    }
    float got[WIDTH_Q], want[WIDTH_Q], mass[TOKENS] = { 0 };
    float q[WIDTH_Q];
    uint64_t s = 99;
    for (int i = 0; i < WIDTH_Q; i++) q[i] = 3 * noise(&s);
    for (int32_t upto = 1; upto <= n; upto += 37) { /* a query in the middle sees what stands before it */
        at[0] = upto - 1;
        kvf_kv_order o = { .places = order, .n = n, .at = at, .n_at = 1 };
        kvf_kv_attend_args a = { .layer = 2, .q = q, .o = got, .n_tok = 1, .n_q = 1, .scale = 0.25f };
        kvf_kv_arrange(mixed, &o);
        cr_assert_eq(kvf_kv_attend(mixed, &a, &err), KVF_OK, "%s", err.msg);
        kvf_kv *part;
        cr_assert_eq(kvf_kv_fork(&part, sorted, &err), KVF_OK);
        kvf_kv_truncate(part, upto);
        attend(part, 2, NULL, want);
        cr_assert_arr_eq(got, want, sizeof got, "%d of %d keys", upto, n);
        kvf_kv_close(part);
        if (upto + 37 <= n) continue;
        a.mass = mass;
        a.n_mass = 1;
        cr_assert_eq(kvf_kv_attend(mixed, &a, &err), KVF_OK);
        double sum = 0;
        for (int i = 0; i < n; i++) sum += i <= at[0] ? mass[i] : 0;
        cr_assert_float_eq(sum, HEADS, 1e-3, "attention of %d heads sums to %g", HEADS, sum);
    }
    kvf_kv_arrange(mixed, NULL);
    kvf_kv_close(mixed);
    kvf_kv_close(sorted);
    cr_assert_eq(kvf_pool_used(pool), 0);
    kvf_pool_close(pool);
}

Test(kv, compact_keeps_exactly_the_named_places)
{
    kvf_pool *pool = open_pool(200, 0);
    for (int round = 0; round < 12; round++) {
        kvf_kv *kv, *fresh;
        int32_t keep[TOKENS], n = 0;
        cr_assert_eq(kvf_kv_open(&kv, pool, dims, &err), KVF_OK);
        cr_assert_eq(kvf_kv_open(&fresh, pool, dims, &err), KVF_OK);
        for (int32_t t = 0; t < TOKENS; t++) {
            put_token(kv, 8, t);
            if (round > 0 && (t * 7 + round) % (round + 1) == 0 && t < 280 - round * 10) continue;
            keep[n++] = t;
            put_token(fresh, 8, t);
        }
        cr_assert_eq(kvf_kv_compact(kv, keep, n, &err), KVF_OK);
        cr_assert_eq(kvf_kv_len(kv), n);
        for (int32_t t = 400; t < 405; t++) { /* and it goes on from there */
            put_token(kv, 8, t);
            put_token(fresh, 8, t);
        }
        for (int32_t l = 0; l < LAYERS; l++) {
            float a[WIDTH_Q], b[WIDTH_Q];
            attend(kv, l, NULL, a);
            attend(fresh, l, NULL, b);
            cr_assert_arr_eq(a, b, sizeof a);
        }
        kvf_kv_close(kv);
        kvf_kv_close(fresh);
    }
    cr_assert_eq(kvf_pool_used(pool), 0);
    kvf_pool_close(pool);
}

/* ---- Budgets --------------------------------------------------------------------------------------- */

enum { KEPT = 70 };

static void budget_of(const kvf_policy *p, kvf_budget *b)
{
    (void)p;
    *b = (kvf_budget){ .tokens = KEPT };
}

/* Head h keeps every (2 + h)-th place, the rest from the end; the keys it is shown are the stored ones. */
static kvf_status keep_some(kvf_policy *p, const kvf_evict *e, int32_t *stay, kvf_error *er)
{
    (void)p;
    static float keys[400 * DIM];
    for (int32_t h = 0; h < HEADS_KV; h++) {
        int64_t n_every = 30;
        for (int64_t i = 0; i < n_every; i++) stay[h * KEPT + i] = (int32_t)(i * (2 + h));
        for (int64_t i = n_every; i < KEPT; i++) stay[h * KEPT + i] = (int32_t)(e->n - KEPT + i);
        if (e->keys(e->lookup, h, keys, er) < 0) return KVF_ERR_INTERNAL;
        uint64_t s = 6 * 1000003 + (uint64_t)e->layer * 7919 + 11;
        float k = 0;
        for (int i = 0; i <= h * DIM; i++) {
            k = noise(&s);
            if (i < h * DIM) noise(&s); /* its value */
        }
        if (keys[11 * DIM] != kvf_f32_from_f16(kvf_f16_from_f32(k))) return KVF_ERR_INTERNAL;
    }
    return KVF_OK;
}

/* One head over the tokens named, in double. */
static void attend_by_hand(uint64_t seed, int32_t layer, int32_t head, const int32_t *tokens, int n, double out[DIM])
{
    float q[WIDTH_Q];
    uint64_t s = 99;
    double sum = 0;
    for (int i = 0; i < WIDTH_Q; i++) q[i] = 3 * noise(&s);
    memset(out, 0, DIM * sizeof *out);
    for (int t = 0; t < n; t++) {
        float k[WIDTH_KV], v[WIDTH_KV];
        uint64_t at = seed * 1000003 + (uint64_t)layer * 7919 + (uint64_t)tokens[t];
        for (int i = 0; i < WIDTH_KV; i++) {
            k[i] = noise(&at);
            v[i] = noise(&at);
        }
        int32_t hk = head / (HEADS / HEADS_KV) * DIM;
        double x = 0;
        for (int i = 0; i < DIM; i++) x += (double)q[head * DIM + i] * (double)kvf_f32_from_f16(kvf_f16_from_f32(k[hk + i]));
        double e = exp(0.25 * x);
        sum += e;
        for (int i = 0; i < DIM; i++) out[i] += e * (double)kvf_f32_from_f16(kvf_f16_from_f32(v[hk + i]));
    }
    for (int i = 0; i < DIM; i++) out[i] /= sum;
}

Test(kv, each_head_keeps_its_own_tokens_and_places_count_on)
{
    static const kvf_policy_ops ops = { .abi = KVF_POLICY_ABI, .name = "some", .budget = budget_of, .evict = keep_some };
    kvf_policy policy = { .ops = &ops, .dims = dims };
    kvf_pool *pool = open_pool(100, 0);
    kvf_kv *kv;
    cr_assert_eq(kvf_kv_open(&kv, pool, dims, &err), KVF_OK);
    append(kv, 6, 60);
    cr_assert_eq(kvf_kv_evict(kv, &policy, &err), KVF_OK);
    cr_assert_eq(kvf_kv_len(kv), 60, "less than the budget: nothing goes");
    append(kv, 6, 240);
    cr_assert_eq(kvf_pool_used(pool), 3 * LAYERS);
    cr_assert_eq(kvf_kv_evict(kv, &policy, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_kv_len(kv), 300);
    cr_assert_eq(kvf_pool_used(pool), LAYERS);
    append(kv, 6, 5); /* tokens 300.. of the text */
    for (int32_t l = 0; l < LAYERS; l++) {
        float got[WIDTH_Q];
        attend(kv, l, NULL, got);
        for (int32_t head = 0; head < HEADS; head++) {
            int32_t tokens[KEPT + 5], h = head / (HEADS / HEADS_KV);
            for (int i = 0; i < KEPT; i++) tokens[i] = i < 30 ? i * (2 + h) : 300 - KEPT + i;
            for (int i = 0; i < 5; i++) tokens[KEPT + i] = 300 + i;
            double want[DIM];
            attend_by_hand(6, l, head, tokens, KEPT + 5, want);
            for (int i = 0; i < DIM; i++) cr_assert_float_eq((double)got[head * DIM + i], want[i], 1e-5, "layer %d head %d", l, head);
        }
    }
    kvf_kv_truncate(kv, 302);
    cr_assert_eq(kvf_kv_len(kv), 302);
    kvf_kv_truncate(kv, 299); /* before what was evicted: nothing is left to go on from */
    cr_assert_eq(kvf_kv_len(kv), 0);
    append(kv, 6, 10);
    cr_assert_eq(kvf_kv_len(kv), 10);
    kvf_kv_close(kv);
    cr_assert_eq(kvf_pool_used(pool), 0);
    kvf_pool_close(pool);
}
