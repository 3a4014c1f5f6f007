/* test_cuda_emu_far.c - digests and representatives are the CPU's bytes; votes are its numbers, for every
 * kind of digest, unit and rule.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/rig.h"

enum { HEADS_KV = 2, BLOCKS = 5 };

static const kvf_digest shapes[] = {
    { KVF_DIGEST_BITS, 1, 0, false, 4, HEADS_KV, 64 },  { KVF_DIGEST_BITS, 2, 0, false, 2, HEADS_KV, 128 },
    { KVF_DIGEST_BITS, 4, 0, false, 14, HEADS_KV, 64 }, { KVF_DIGEST_BITS, 4, 0, false, 2, HEADS_KV, 40 },
    { KVF_DIGEST_MEAN, 0, 4, false, 4, HEADS_KV, 64 },  { KVF_DIGEST_MEAN, 0, 16, false, 2, HEADS_KV, 256 },
    { KVF_DIGEST_BOUNDS, 0, 16, false, 8, HEADS_KV, 64 }, { KVF_DIGEST_BOUNDS, 0, 4, false, 2, HEADS_KV, 72 },
    { KVF_DIGEST_REPS, 0, 16, false, 6, HEADS_KV, 64 }, { KVF_DIGEST_REPS, 0, 16, true, 6, HEADS_KV, 64 },
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

/* Digests (or, of REPS, representatives) of all blocks, made on both sides and compared byte by byte. */
static void make_rows(rig *r, const kvf_digest *g, rig_kv *kv, uint8_t **cpu, uint64_t *seed)
{
    size_t bytes = kvf_digest_bytes(g);
    uint8_t *dev[BLOCKS];
    kvf_digest_args c[BLOCKS], d[BLOCKS];
    float *score = floats((size_t)g->n_head * KVF_BLOCK, 1, seed);
    for (int i = 0; i < g->n_head * KVF_BLOCK; i += 3) score[i] = 0.5f; /* ties */
    for (int b = 0; b < BLOCKS; b++) {
        int32_t n = b == 1 ? 1 : b == 2 ? 77 : KVF_BLOCK;
        cpu[b] = room(bytes);
        dev[b] = room(bytes);
        memset(dev[b], 0xee, bytes);
        c[b] = (kvf_digest_args){ &kv->cpu, kv->cpu_slots[b], n, g, cpu[b] };
        d[b] = (kvf_digest_args){ &kv->dev, kv->dev_slots[b], n, g, dev[b] };
        if (g->kind != KVF_DIGEST_REPS) continue;
        kvf_reps_args cr = { &kv->cpu, kv->cpu_slots[b], 1 + b * 5, g, score, cpu[b] }, dr = { &kv->dev, kv->dev_slots[b], 1 + b * 5, g, score, dev[b] };
        OK(r->cpu->ops->reps(r->cpu, &cr, &err));
        OK(r->dev->ops->reps(r->dev, &dr, &err));
    }
    if (g->kind != KVF_DIGEST_REPS) {
        OK(r->cpu->ops->digest(r->cpu, c, BLOCKS, &err));
        OK(r->dev->ops->digest(r->dev, d, BLOCKS, &err));
    }
    for (int b = 0; b < BLOCKS; b++) {
        cr_assert_eq(memcmp(cpu[b], dev[b], bytes), 0, "kind %d bits %d sub %d d %d: block %d differs", (int)g->kind, g->bits, g->sub, g->head_dim, b);
        drop(dev[b]);
    }
    drop(score);
}

static void compare_votes(rig *r, const kvf_digest *g, const void *const *rows, kvf_vote_rule rule, int64_t n_q, int32_t unit, uint64_t *seed)
{
    int64_t unit0 = unit < KVF_BLOCK ? 3 : 1, n_unit = BLOCKS * (KVF_BLOCK / unit) - unit0 - 1, sets = rule.per_kv_head ? HEADS_KV : 1;
    size_t n = (size_t)(n_q * g->n_head);
    float *q = floats(n * (size_t)g->head_dim, 1, seed), *lse = floats(n, 2, seed);
    lse[0] = rule.pool == 1 ? -INFINITY : 0;
    float *dq = dev_put(r, q, n * (size_t)g->head_dim * sizeof *q), *dlse = dev_put(r, lse, n * sizeof *lse);
    float *want = room((size_t)(sets * n_unit) * sizeof *want), *got = room((size_t)(sets * n_unit) * sizeof *got);
    kvf_vote_args c = { .q = q, .lse = lse, .n_q = n_q, .scale = 0.2f, .digest = g, .rows = rows, .unit = unit, .unit0 = unit0, .n_unit = n_unit, .rule = rule, .vote = want };
    kvf_vote_args d = c;
    d.q = dq;
    d.lse = dlse;
    d.vote = got;
    OK(r->cpu->ops->vote(r->cpu, &c, &err));
    OK(r->dev->ops->vote(r->dev, &d, &err));
    double size = 1;
    for (int64_t i = 0; i < sets * n_unit; i++) size = fmax(size, fabs((double)want[i]));
    double off = distance(got, want, (size_t)(sets * n_unit));
    cr_assert_leq(off, 3e-5 * size, "kind %d bits %d unit %d rule %d max %d pool %d n_q %lld: off by %g of %g", (int)g->kind, g->bits, unit, (int)rule.kind,
                  rule.max_queries, rule.pool, (long long)n_q, off, size);
    drop(q);
    drop(lse);
    drop(want);
    drop(got);
    dev_drop(r, dq);
    dev_drop(r, dlse);
}

Test(cuda_far, digests_are_the_reference_s_bytes_and_votes_its_numbers)
{
    rig r;
    uint64_t seed = 21;
    unsigned turn = 0;
    rig_open(&r, false);
    for (int i = 0; i < SHAPES; i++) {
        const kvf_digest *g = &shapes[i];
        rig_kv kv;
        uint8_t *rows[BLOCKS];
        const void *units[BLOCKS];
        kv_open(&r, &kv, BLOCKS, HEADS_KV, g->head_dim, &seed);
        kv_fill(&r, &kv, BLOCKS * KVF_BLOCK, &seed);
        make_rows(&r, g, &kv, rows, &seed);
        for (int b = 0; b < BLOCKS; b++) units[b] = rows[b];
        for (int kind = 0; kind < 3; kind++, turn++) {
            kvf_vote_rule rule = { .kind = (kvf_vote_kind)kind, .max_queries = turn & 1, .per_kv_head = turn & 2, .pool = turn % 3 == 2 ? 3 : 1 };
            compare_votes(&r, g, units, rule, turn % 4 == 0 ? 1 : 5, turn % 3 == 0 ? 16 : turn % 3 == 1 ? 128 : 32, &seed);
        }
        for (int b = 0; b < BLOCKS; b++) drop(rows[b]);
        kv_close(&r, &kv);
    }
    rig_close(&r);
}

#ifdef KVF_TEST_CUDA_EMU
Test(cuda_far, the_order_of_threads_does_not_matter)
{
    rig r;
    rig_open(&r, false);
    for (uint64_t order = 1; order <= 3; order++) {
        const kvf_digest *g = &shapes[order == 1 ? 3 : order == 2 ? 7 : 9];
        uint64_t seed = order;
        rig_kv kv;
        uint8_t *rows[BLOCKS];
        const void *units[BLOCKS];
        seed_order(order);
        kv_open(&r, &kv, BLOCKS, HEADS_KV, g->head_dim, &seed);
        kv_fill(&r, &kv, BLOCKS * KVF_BLOCK, &seed);
        make_rows(&r, g, &kv, rows, &seed);
        for (int b = 0; b < BLOCKS; b++) units[b] = rows[b];
        compare_votes(&r, g, units, (kvf_vote_rule){ .kind = KVF_VOTE_GATE, .pool = 1 }, 3, 64, &seed);
        for (int b = 0; b < BLOCKS; b++) drop(rows[b]);
        kv_close(&r, &kv);
    }
    rig_close(&r);
}
#endif

Test(cuda_far, what_makes_no_digest_is_refused)
{
    rig r;
    rig_open(&r, false);
    kvf_digest none = { 0 };
    kvf_digest_args a = { .n_tok = 1, .digest = &none };
    cr_assert_lt(r.dev->ops->digest(r.dev, &a, 1, &err), 0);
    kvf_vote_args v = { .n_q = 1, .digest = &shapes[0], .unit = 24, .n_unit = 1, .rule = { .pool = 1 } };
    cr_assert_lt(r.dev->ops->vote(r.dev, &v, &err), 0);
    rig_close(&r);
}
