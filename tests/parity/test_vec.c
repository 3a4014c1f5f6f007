/* test_vec.c - element-wise ops of every level against vec_ref.c.
 *
 * Arrays end exactly where the op may write, so ASan sees one element too far; sizes walk over
 * every remainder of the vector widths.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_ops.h"

enum { MAX = 1200 };

static uint64_t rng = 7;

static uint32_t rnd(void)
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(rng >> 32);
}

static float rnd_unit(void) { return (float)(rnd() >> 7) / 16777216.0f - 1.0f; } /* -1..1 */

/* n random floats of magnitude up to size. */
static float *some(int64_t n, float size)
{
    float *p = kvf_alloc(&kvf_mem_default, (size_t)n, sizeof *p);
    cr_assert_not_null(p);
    for (int64_t i = 0; i < n; i++) p[i] = rnd_unit() * size;
    return p;
}

static float *copy(const float *x, int64_t n)
{
    float *p = some(n, 1.0f);
    memcpy(p, x, (size_t)n * sizeof *p);
    return p;
}

static void drop(void *p) { kvf_free(&kvf_mem_default, p); }

static void expect_near(const float *got, const float *want, int64_t n, double rel, double abs,
                        const char *what)
{
    for (int64_t i = 0; i < n; i++) {
        if (got[i] == want[i]) continue;
        double d = fabs((double)got[i] - (double)want[i]);
        cr_assert(d <= abs + rel * fabs((double)want[i]), "%s: element %lld of %lld is %.9g, reference %.9g",
                  what, (long long)i, (long long)n, (double)got[i], (double)want[i]);
    }
}

static int levels(kvf_cpu_ops ops[4])
{
    unsigned flags = kvf_cpu_detect();
    kvf_cpu_level best = KVF_CPU_LEVEL_REF;
    cr_assert_eq(kvf_cpu_level_parse(&best, "auto", flags, NULL), KVF_OK);
    for (int i = 0; i <= (int)best; i++) kvf_cpu_ops_init(&ops[i], (kvf_cpu_level)i, flags);
    return (int)best + 1;
}

static int64_t size_at(int i) { return i < 70 ? i + 1 : i < 72 ? 896 + i - 70 : MAX - i; }

Test(vec, rmsnorm_equals_the_reference)
{
    kvf_cpu_ops ops[4];
    for (int l = 1, n_level = levels(ops); l < n_level; l++)
        for (int i = 0; i < 76; i++) {
            int64_t n = size_at(i);
            float *x = some(n, i % 3 == 2 ? 1e4f : 3.0f), *w = some(n, 2.0f), *got = some(n, 1),
                  *want = some(n, 1);
            if (i % 5 == 4) memset(x, 0, (size_t)n * sizeof *x); /* eps keeps zeros finite */
            const float *weight = i % 4 == 3 ? NULL : w;
            ops[0].rmsnorm(x, weight, want, n, 1e-6f);
            ops[l].rmsnorm(x, weight, got, n, 1e-6f);
            expect_near(got, want, n, 2e-6, 0.0, "rmsnorm");
            ops[l].rmsnorm(x, weight, x, n, 1e-6f);
            expect_near(x, got, n, 0.0, 0.0, "rmsnorm in place");
            drop(x), drop(w), drop(got), drop(want);
        }
}

Test(vec, rope_equals_the_reference)
{
    static const int32_t dims[][2] = { { 64, 64 }, { 128, 128 }, { 256, 256 }, { 96, 96 },
                                       { 80, 32 }, { 128, 64 },  { 80, 80 },   { 8, 8 },
                                       { 10, 6 },  { 64, 2 },    { 64, 0 } };
    kvf_cpu_ops ops[4];
    for (int l = 1, n_level = levels(ops); l < n_level; l++)
        for (int i = 0; i < 44; i++) {
            int32_t d = dims[i / 4][0], rot = dims[i / 4][1], n_head = 1 + i % 4 * 2;
            kvf_rope_kind kind = i % 2 ? KVF_ROPE_NEOX : KVF_ROPE_INTERLEAVED;
            float *x = some((int64_t)d * n_head, 5.0f), *want = copy(x, (int64_t)d * n_head),
                  *cs = some(rot, 1.0f);
            for (int32_t j = 0; j < rot / 2; j++) {
                float angle = cs[j] * 100.0f;
                cs[j] = cosf(angle), cs[rot / 2 + j] = sinf(angle);
            }
            ops[0].rope(want, n_head, d, rot, cs, kind);
            ops[l].rope(x, n_head, d, rot, cs, kind);
            expect_near(x, want, (int64_t)d * n_head, 0.0, 2e-6, "rope");
            drop(x), drop(want), drop(cs);
        }
}

Test(vec, f16_is_the_reference_bit_for_bit)
{
    kvf_cpu_ops ops[4];
    int n_level = levels(ops);
    for (int i = 0; i < 400; i++) {
        int64_t n = size_at(i % 76);
        float *x = some(n, 1.0f);
        kvf_f16 got[MAX], want[MAX];
        for (int64_t j = 0; j < n; j++) {
            uint32_t bits = rnd(), kind = rnd() % 4;
            if (kind == 0)
                x[j] = kvf_f32_from_f16((kvf_f16)bits) + 0x1p-26f; /* next to a value or a half */
            else if (kind == 1)
                x[j] = kvf_f32_from_bits((bits & 0x87ffffffu) | 0x38000000u); /* f16 range */
            else if (kind == 2)
                x[j] = kvf_f32_from_bits(kvf_f32_bits(kvf_f32_from_f16((kvf_f16)bits)) | 0x1000u); /* ties */
            else
                x[j] = kvf_f32_from_bits(bits);
            if (isnan(x[j])) x[j] = 65519.0f + (float)(bits & 3u); /* the edge of infinity */
        }
        ops[0].f32_to_f16(x, want, n);
        for (int l = 1; l < n_level; l++) {
            memset(got, 0x55, sizeof got);
            ops[l].f32_to_f16(x, got, n);
            for (int64_t j = 0; j < n; j++)
                cr_assert_eq(got[j], want[j], "%.9g became %04x, reference %04x", (double)x[j], got[j],
                             want[j]);
            cr_assert(n == MAX || got[n] == 0x5555, "wrote past the end");
        }
        drop(x);
    }
}

Test(vec, glu_equals_the_reference_at_every_magnitude)
{
    static const float sizes[] = { 1e-6f, 1e-2f, 1.0f, 8.0f, 100.0f, 1e4f, 1e15f };
    kvf_cpu_ops ops[4];
    for (int l = 1, n_level = levels(ops); l < n_level; l++)
        for (int i = 0; i < 76 * 14; i++) {
            int64_t n = size_at(i % 76);
            kvf_act act = i / 76 % 2 ? KVF_ACT_SILU : KVF_ACT_GELU_TANH;
            float *x = some(n, sizes[i / 152]), *up = some(n, 2.0f), *want = copy(x, n);
            ops[0].glu(want, up, n, act);
            ops[l].glu(x, up, n, act);
            expect_near(x, want, n, 3e-6, 1e-7, "glu");
            drop(x), drop(up), drop(want);
        }
}

Test(vec, add_and_scale_are_exact)
{
    kvf_cpu_ops ops[4];
    for (int l = 1, n_level = levels(ops); l < n_level; l++)
        for (int i = 0; i < 76; i++) {
            int64_t n = size_at(i);
            float *x = some(n, 3.0f), *y = some(n, 1e-3f), *want = copy(x, n);
            ops[0].add(want, y, n);
            ops[l].add(x, y, n);
            expect_near(x, want, n, 0.0, 0.0, "add");
            ops[0].scale(want, 0.37f, n);
            ops[l].scale(x, 0.37f, n);
            expect_near(x, want, n, 0.0, 0.0, "scale");
            drop(x), drop(y), drop(want);
        }
}

Test(vec, lse_merge_equals_the_reference_and_skips_empty_parts)
{
    static const float lses[] = { 0.0f, -1.5f, 3.0f, 1e4f, -1e4f, 90.0f, -INFINITY };
    static const int32_t dims[] = { 64, 128, 8, 80, 256 };
    kvf_cpu_ops ops[4];
    for (int l = 0, n_level = levels(ops); l < n_level; l++)
        for (int i = 0; i < 49 * 5; i++) {
            int32_t d = dims[i % 5];
            float *o = some(d, 2.0f), *o2 = some(d, 2.0f), *want = copy(o, d);
            float lse = lses[i / 5 % 7], lse2 = lses[i / 35], want_lse = lse;
            if (lse == -INFINITY) memset(o, 0, (size_t)d * sizeof *o), memset(want, 0, (size_t)d * sizeof *o);
            ops[0].lse_merge(want, &want_lse, o2, &lse2, d);
            ops[l].lse_merge(o, &lse, o2, &lse2, d);
            expect_near(o, want, d, 1e-6, 1e-6, "o");
            expect_near(&lse, &want_lse, 1, 1e-6, 1e-6, "lse");
            if (lses[i / 35] == -INFINITY)
                cr_assert(lse == lses[i / 5 % 7]);
            else if (lses[i / 5 % 7] == -INFINITY)
                cr_assert(lse == lse2 && memcmp(o, o2, (size_t)d * sizeof *o) == 0);
            drop(o), drop(o2), drop(want);
        }
}

/* The definition itself, on numbers one can check by hand. */
Test(vec, reference_gives_known_values)
{
    kvf_cpu_ops ops;
    kvf_cpu_ops_init(&ops, KVF_CPU_LEVEL_REF, 0);
    float x[4] = { 3.0f, -4.0f, 0.0f, 0.0f }, w[4] = { 2.0f, 1.0f, 1.0f, 1.0f }, out[4];
    ops.rmsnorm(x, w, out, 4, 0.0f); /* rms 2.5 */
    cr_assert_float_eq(out[0], 2.4f, 1e-6f);
    cr_assert_float_eq(out[1], -1.6f, 1e-6f);
    float r[4] = { 1.0f, 2.0f, 3.0f, 4.0f }, s[4] = { 1.0f, 2.0f, 3.0f, 4.0f },
          quarter[4] = { 0.0f, 1.0f, 1.0f, 0.0f };
    ops.rope(r, 1, 4, 4, quarter, KVF_ROPE_NEOX); /* pair (0, 2) by 90 degrees, pair (1, 3) by 0 */
    cr_assert(r[0] == -3.0f && r[2] == 1.0f && r[1] == 2.0f && r[3] == 4.0f);
    ops.rope(s, 1, 4, 4, quarter, KVF_ROPE_INTERLEAVED);
    cr_assert(s[0] == -2.0f && s[1] == 1.0f && s[2] == 3.0f && s[3] == 4.0f);
    float g[2] = { 1.0f, 1.0f }, up[2] = { 1.0f, 2.0f };
    ops.glu(g, up, 1, KVF_ACT_SILU);
    ops.glu(g + 1, up + 1, 1, KVF_ACT_GELU_TANH);
    cr_assert_float_eq(g[0], 0.731058579f, 1e-6f);
    cr_assert_float_eq(g[1], 2.0f * 0.841191991f, 1e-6f);
    float o = 1.0f, o2 = 3.0f, lse = logf(1.0f), lse2 = logf(3.0f);
    ops.lse_merge(&o, &lse, &o2, &lse2, 1); /* weights 1/4 and 3/4 */
    cr_assert_float_eq(o, 2.5f, 1e-6f);
    cr_assert_float_eq(lse, logf(4.0f), 1e-6f);
}
