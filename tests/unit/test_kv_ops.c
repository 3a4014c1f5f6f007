/* test_kv_ops.c - random operations on sequences (append, cut, fork, save, drop, reload, other budgets, other
 * policies, failures) against a twin that has everything in memory and against the formula: kv_ops.c.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <stdlib.h>

#include "kv_ops.h"

enum { OPS = 160 };

static uint64_t rng;

static uint8_t next_byte(void)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint8_t)(rng >> 32);
}

/* Reading comes more often than the rest, or texts would never grow. */
static void draw(uint8_t *data, int shape, uint64_t seed)
{
    static const uint8_t often[] = { KV_OP_CHUNK, KV_OP_CHUNK, KV_OP_CHUNK, KV_OP_DECODE };
    rng = seed * 0x9e3779b97f4a7c15u + 1;
    data[0] = (uint8_t)shape;
    for (int i = 0; i < OPS; i++) {
        uint8_t which = next_byte();
        data[1 + 3 * i] = which < 110 ? often[which % 4] : next_byte() % KV_OP_COUNT;
        data[2 + 3 * i] = next_byte();
        data[3 + 3 * i] = next_byte();
    }
}

static void run(int shape, int runs, kv_ops_report *r)
{
    uint8_t data[1 + 3 * OPS];
    for (int i = 0; i < runs; i++) {
        draw(data, shape, (uint64_t)(shape * 1000 + i));
        cr_assert(kv_ops_run(data, sizeof data, r), "run %d: %s", i, r->why);
    }
}

/* Every kind of operation took place and every kind of failure was met, or nothing was tested. */
static void check(int shape, int runs)
{
    kv_ops_report r = { 0 };
    run(shape, runs, &r);
    for (int op = 0; op < KV_OP_COUNT; op++) cr_expect_gt(r.done[op], 0, "operation %d never took place", op);
    cr_expect_gt(r.no_memory, 0);
    cr_expect_gt(r.no_tier, 0);
    cr_expect_gt(r.no_room, 0);
    cr_expect_gt(r.fetched, 100);
    cr_expect_gt(r.compared, 300000);
}

Test(kv_ops, a_plain_sequence_is_its_twin_whatever_happens)
{
    kv_ops_report r = { 0 };
    run(0, 30, &r);
    cr_assert_gt(r.no_memory, 0);
    cr_assert_gt(r.compared, 300000);
    cr_assert_gt(r.done[KV_OP_FORK], 0);
}

Test(kv_ops, a_memory_with_digests_is_its_twin_whatever_happens) { check(1, 30); }
Test(kv_ops, small_units_and_no_first_tokens) { check(2, 80); }
Test(kv_ops, a_set_of_units_per_kv_head) { check(3, 30); }
Test(kv_ops, the_policy_chooses_alike_wherever_blocks_lie) { check(4, 30); }
Test(kv_ops, published_representatives_survive_all_of_it) { check(5, 30); }
Test(kv_ops, documents_of_two_groups) { check(6, 8); }
