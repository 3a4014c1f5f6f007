/* test_vote.c - scores of BITS digests: the byte kernels of every level against the formula in double.
 *
 * What is stored is exact; a kernel's own error is that of the query in 8 bits. It is held to 1 % of the
 * spread of a row's scores over tokens. Scratch is exactly as large as asked for, and scores end where
 * the kernel may write, so that ASan sees one element too far.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_ops.h"

static uint64_t rng = 5;

static float noise(void) /* -1..1 */
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(rng >> 32) * 0x1p-31f;
}

static void *get(size_t n, size_t size)
{
    void *p = kvf_alloc(&kvf_mem_default, n, size);
    cr_assert_not_null(p);
    return p;
}

static void drop(void *p) { kvf_free(&kvf_mem_default, p); }

typedef struct score_case {
    kvf_digest g;
    kvf_rows rows;
    float *q;
    uint8_t *row;
} score_case;

/* Rows that are nobody's hold zeros, as kvf_rows says. Every 16th channel has the offset of a Qwen2 key
 * bias; channel 5 never changes; with `flat` none does. */
static score_case make(int32_t bits, int32_t d, int32_t group, int64_t n_q, bool flat)
{
    score_case c = { .g = { .kind = KVF_DIGEST_BITS, .bits = bits, .n_head = group, .n_head_kv = 1, .head_dim = d },
                     .rows = { .n_q = n_q, .group = group, .pad = 1, .head_dim = d } };
    while (c.rows.pad < group) c.rows.pad *= 2;
    int64_t width = c.rows.pad > KVF_ROW_LANES ? c.rows.pad : KVF_ROW_LANES;
    c.rows.n_lane = (n_q * c.rows.pad + width - 1) / width * width;
    cr_assert(kvf_digest_valid(&c.g));
    c.q = get((size_t)(d * c.rows.n_lane), sizeof *c.q);
    for (int64_t l = 0; l < n_q * c.rows.pad; l++)
        for (int32_t k = 0; l % c.rows.pad < group && k < d; k++) c.q[k * c.rows.n_lane + l] = noise() * (k % 16 == 3 ? 0.05f : 1.0f);
    c.rows.q = c.q;
    size_t bytes = kvf_digest_head_bytes(&c.g), part = bytes / 2;
    c.row = get(bytes, 1);
    for (size_t i = 0; i < bytes; i++) c.row[i] = (uint8_t)(int32_t)(noise() * 127.0f);
    for (int32_t half = 0; half < 2; half++)
        for (int32_t k = 0; k < d; k++) {
            kvf_f16 lo = kvf_f16_from_f32(k % 16 == 3 ? 150.0f : noise()), step = kvf_f16_from_f32(flat || k == 5 ? 0.0f : 0.3f + 0.2f * noise());
            memcpy(c.row + (size_t)half * part + 2 * (size_t)k, &lo, 2);
            memcpy(c.row + (size_t)half * part + 2 * (size_t)(d + k), &step, 2);
        }
    return c;
}

static void unmake(score_case *c)
{
    drop(c->q);
    drop(c->row);
}

/* Scores of units u0..u1; the caller frees. */
static float *run(const kvf_cpu_ops *ops, const score_case *c, int32_t unit, int32_t u0, int32_t u1)
{
    bool own = ops->score_bits;
    float *s = get((size_t)((u1 - u0) * c->rows.n_lane), sizeof *s);
    void *scratch = get(own ? ops->score_bits_scratch_bytes(&c->rows) : ops->score_scratch_bytes(&c->rows), 1);
    kvf_score_part p = { .rows = &c->rows, .digest = &c->g, .row = c->row, .unit = unit, .unit0 = u0, .unit1 = u1, .s = s, .scratch = scratch };
    (own ? ops->score_bits : ops->score)(&p);
    drop(scratch);
    return s;
}

/* Token t's score for a lane, from the layout in base/digest.h and nothing else. */
static double token(const score_case *c, int64_t lane, int32_t t)
{
    const kvf_digest *g = &c->g;
    const uint8_t *at = c->row + kvf_digest_head_bytes(g) / 2 * (size_t)(t / KVF_DIGEST_GROUP);
    double s = 0;
    for (int32_t k = 0; k < g->head_dim; k++) {
        kvf_f16 lo, step;
        size_t byte;
        int32_t bit;
        memcpy(&lo, at + 2 * k, 2);
        memcpy(&step, at + 2 * (g->head_dim + k), 2);
        kvf_digest_code_at(g, t % KVF_DIGEST_GROUP, k, &byte, &bit);
        int32_t code = at[4 * (size_t)g->head_dim + byte] >> bit & ((1 << g->bits) - 1);
        s += (double)c->q[k * c->rows.n_lane + lane] * ((double)kvf_f32_from_f16(lo) + code * (double)kvf_f32_from_f16(step));
    }
    return s;
}

static void check(const kvf_cpu_ops *ops, const score_case *c, int32_t unit, int32_t u0, int32_t u1)
{
    float *got = run(ops, c, unit, u0, u1);
    for (int64_t l = 0; l < c->rows.n_q * c->rows.pad; l++) {
        if (l % c->rows.pad >= c->rows.group) continue;
        double s[KVF_DIGEST_BLOCK], low = INFINITY, high = -INFINITY;
        for (int32_t t = 0; t < KVF_DIGEST_BLOCK; t++) {
            s[t] = token(c, l, t);
            low = fmin(low, s[t]), high = fmax(high, s[t]);
        }
        for (int32_t u = u0; u < u1; u++) {
            double want = -INFINITY, is = (double)got[(u - u0) * c->rows.n_lane + l];
            for (int32_t t = u * unit; t < (u + 1) * unit; t++) want = fmax(want, s[t]);
            cr_assert(fabs(is - want) <= 0.01 * (high - low) + 1e-4,
                      "%s bits %d d %d group %d queries %d unit %d: lane %d unit %d is %g, not %g (spread %g)", kvf_cpu_level_name(ops->level),
                      c->g.bits, c->g.head_dim, c->rows.group, (int)c->rows.n_q, unit, (int)l, u, is, want, high - low);
        }
    }
    drop(got);
}

static int levels(kvf_cpu_ops ops[4])
{
    unsigned flags = kvf_cpu_detect();
    kvf_cpu_level best = KVF_CPU_LEVEL_REF;
    cr_assert_eq(kvf_cpu_level_parse(&best, "auto", flags, NULL), KVF_OK);
    for (int i = 0; i <= (int)best; i++) kvf_cpu_ops_init(&ops[i], (kvf_cpu_level)i, flags);
    return (int)best + 1;
}

Test(vote, bits_are_within_one_percent_of_the_formula_for_every_shape)
{
    static const int32_t groups[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17 }, queries[] = { 1, 2, 3, 9 };
    kvf_cpu_ops ops[4];
    for (int l = 0, n = levels(ops); l < n; l++) {
        int turn = 0;
        for (int32_t bits = 1; bits <= 4; bits *= 2)
            for (int g = 0; g < 11; g++)
                for (int i = 0; i < 4; i++, turn++) {
                    static const int32_t dims[] = { 32, 64, 96, 128, 256 };
                    score_case c = make(bits, dims[turn % 5], groups[g], queries[i], false);
                    int32_t unit = 16 << turn % 4;
                    check(&ops[l], &c, unit, 0, KVF_DIGEST_BLOCK / unit);
                    unmake(&c);
                }
    }
}

Test(vote, a_part_of_a_block_is_that_part_of_the_whole)
{
    kvf_cpu_ops ops[4];
    for (int l = 0, n = levels(ops); l < n; l++)
        for (int64_t n_q = 1; n_q <= 3; n_q += 2) {
            score_case c = make(2, 64, 7, n_q, false);
            for (int32_t unit = 16; unit <= 64; unit *= 2) {
                int32_t all = KVF_DIGEST_BLOCK / unit;
                float *whole = run(&ops[l], &c, unit, 0, all);
                for (int32_t u0 = 0; u0 < all; u0++)
                    for (int32_t u1 = u0 + 1; u1 <= all; u1++) {
                        float *part = run(&ops[l], &c, unit, u0, u1);
                        for (int64_t j = 0; j < (u1 - u0) * c.rows.n_lane; j++)
                            if (j % c.rows.n_lane < n_q * 8 && j % 8 < 7) cr_assert_eq(part[j], whole[u0 * c.rows.n_lane + j]);
                        drop(part);
                    }
                drop(whole);
            }
            unmake(&c);
        }
}

Test(vote, keys_that_never_change_and_queries_of_zeros_score_their_offset)
{
    kvf_cpu_ops ops[4];
    for (int l = 0, n = levels(ops); l < n; l++)
        for (int64_t n_q = 1; n_q <= 4; n_q += 3) {
            score_case c = make(2, 64, 7, n_q, true);
            check(&ops[l], &c, 32, 0, 4);
            memset(c.q, 0, (size_t)(64 * c.rows.n_lane) * sizeof *c.q);
            float *s = run(&ops[l], &c, 128, 0, 1);
            for (int64_t i = 0; i < n_q * 8; i++) cr_assert(i % 8 == 7 || s[i] == 0.0f);
            drop(s);
            unmake(&c);
        }
}

Test(vote, equal_tokens_tie_exactly)
{
    kvf_cpu_ops ops[4];
    for (int l = 0, n = levels(ops); l < n; l++) {
        score_case c = make(2, 64, 7, 2, false);
        size_t part = kvf_digest_head_bytes(&c.g) / 2;
        memset(c.row + 4 * 64, 0xe4, part - 4 * 64); /* every token has codes 0 1 2 3 */
        memcpy(c.row + part, c.row, part);
        float *s = run(&ops[l], &c, 16, 0, 8);
        for (int64_t i = 0; i < 8 * c.rows.n_lane; i++)
            if (i % 8 < 7) cr_assert_eq(s[i], s[i % c.rows.n_lane]);
        drop(s);
        unmake(&c);
    }
}
