/* test_merge_rows.c - kernels of src/merge/rows.h at every level against rows_ref.c.
 *
 * Arrays end exactly where the op may read or write, so ASan sees one element too far; sizes walk over every
 * remainder of the vector widths. Sums of n products in f32 lanes: n / 16 roundings of 6e-8, 1e-5 is ample
 * for n <= 1200 of values up to 1.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/merge_rig.h"

#include "merge/rows.h"

static const int64_t sizes[] = { 1,  2,  3,  7,  8,  9,   15,  16,  17,  31,  32,  33,
                                 47, 48, 63, 64, 65, 127, 128, 130, 255, 511, 1200 };

enum { N_SIZE = sizeof sizes / sizeof *sizes };

static int levels(kvf_rows r[3])
{
    int n = 0;
    for (int i = 0; i < 3; i++) {
        kvf_cpu_level level;
        if (kvf_cpu_level_parse(&level, rig_cpus[i], kvf_cpu_detect(), NULL) == KVF_OK)
            kvf_rows_init(&r[n++], level);
    }
    return n;
}

/* n random elements of a type, exactly as many bytes as they take. */
static void *some(rng *r, kvf_merge_type type, int64_t n)
{
    char *p = malloc((size_t)n * kvf_merge_type_bytes(type));
    for (int64_t i = 0; i < n; i++) {
        float v = rnd_sign(r);
        uint16_t h = type == KVF_MERGE_F16 ? kvf_f16_from_f32(v) : kvf_bf16_from_f32(v);
        if (type == KVF_MERGE_F32)
            memcpy(p + 4 * i, &v, 4);
        else
            memcpy(p + 2 * i, &h, 2);
    }
    return p;
}

static void near(double got, double want, double tolerance, const char *what, int64_t n)
{
    cr_assert(fabs(got - want) <= tolerance, "%s, n = %lld: %.9g, not %.9g", what, (long long)n, got, want);
}

Test(merge_rows, pair_agrees_with_the_reference)
{
    kvf_rows row[3];
    rng r = { 1 };
    int n_level = levels(row);
    for (int type = 0; type < KVF_MERGE_N_TYPE; type++)
        for (int s = 0; s < N_SIZE; s++) {
            int64_t n = sizes[s];
            void *a = some(&r, (kvf_merge_type)type, n), *b = some(&r, (kvf_merge_type)type, n);
            double want[2], got[2];
            row[0].pair[type](a, b, n, want);
            for (int i = 1; i < n_level; i++) {
                row[i].pair[type](a, b, n, got);
                near(got[0], want[0], 1e-5 * sqrt((double)n), "dot", n);
                near(got[1], want[1], 1e-5 * sqrt((double)n), "square", n);
            }
            free(a);
            free(b);
        }
}

Test(merge_rows, pair_shows_what_is_not_finite)
{
    kvf_rows row[3];
    int n_level = levels(row);
    const float bad[] = { NAN, INFINITY, -INFINITY };
    for (int i = 0; i < n_level; i++)
        for (int64_t n = 1; n < 70; n += 4)
            for (int k = 0; k < 3; k++) {
                float x[70] = { 0 }, zero[70] = { 0 };
                double out[2];
                x[(n * 7) % n] = bad[k];
                row[i].pair[KVF_MERGE_F32](zero, x, n, out);
                cr_assert_not(isfinite(out[1]), "%s, n = %lld", row[i].name, (long long)n);
            }
}

Test(merge_rows, conversions_are_bit_for_bit)
{
    kvf_rows row[3];
    rng r = { 2 };
    int n_level = levels(row);
    const float edge[] = { 0.0f,           -0.0f,    1.0f,      65504.0f,      65519.9f,        65520.0f,
                           1e30f,          -1e30f,   6e-8f,     3e-8f,         2.9e-8f,         1.0009765f,
                           1.00048828125f, INFINITY, -INFINITY, 3.3895314e38f, 1.17549435e-38f, 1e-45f };
    for (int type = 0; type < KVF_MERGE_N_TYPE; type++)
        for (int s = 0; s < N_SIZE; s++) {
            int64_t n = sizes[s];
            float *x = malloc((size_t)n * 4), *back = malloc((size_t)n * 4),
                  *want_back = malloc((size_t)n * 4);
            size_t bytes = (size_t)n * kvf_merge_type_bytes((kvf_merge_type)type);
            void *want = malloc(bytes), *got = malloc(bytes);
            for (int64_t i = 0; i < n; i++)
                x[i] = rnd(&r) % 3 ? rnd_sign(&r) * ldexpf(1, (int)(rnd(&r) % 40) - 24) : edge[rnd(&r) % 18];
            row[0].narrow[type](want, x, n);
            row[0].widen[type](want_back, want, n);
            for (int i = 1; i < n_level; i++) {
                row[i].narrow[type](got, x, n);
                cr_assert_arr_eq(got, want, bytes, "%s, type %d, n = %lld", row[i].name, type, (long long)n);
                row[i].widen[type](back, got, n);
                cr_assert_arr_eq(back, want_back, (size_t)n * 4, "%s, type %d, n = %lld", row[i].name, type,
                                 (long long)n);
            }
            free(x);
            free(back);
            free(want_back);
            free(want);
            free(got);
        }
    float nan[17];
    kvf_bf16 out[17];
    for (int i = 0; i < 17; i++) nan[i] = i % 2 ? NAN : -NAN;
    for (int i = 0; i < n_level; i++) {
        row[i].narrow[KVF_MERGE_BF16](out, nan, 17);
        for (int k = 0; k < 17; k++)
            cr_assert(isnan(kvf_f32_from_bf16(out[k])), "%s loses a NaN", row[i].name);
    }
}

Test(merge_rows, weighted_sums_agree_with_the_reference)
{
    kvf_rows row[3];
    rng r = { 3 };
    int n_level = levels(row);
    for (int type = 0; type < KVF_MERGE_N_TYPE; type++)
        for (int s = 0; s < N_SIZE; s++)
            for (int64_t n_src = 1; n_src <= 11; n_src++) {
                int64_t n = sizes[s];
                const void *src[11];
                float w[11], *start = some(&r, KVF_MERGE_F32, n), *want = malloc((size_t)n * 4),
                             *got = malloc((size_t)n * 4);
                for (int64_t k = 0; k < n_src; k++)
                    src[k] = some(&r, (kvf_merge_type)type, n), w[k] = rnd_sign(&r);
                memcpy(want, start, (size_t)n * 4);
                row[0].add[type](want, src, w, n_src, n);
                for (int i = 1; i < n_level; i++) {
                    memcpy(got, start, (size_t)n * 4);
                    row[i].add[type](got, src, w, n_src, n);
                    for (int64_t k = 0; k < n; k++) near((double)got[k], (double)want[k], 3e-6, "add", n);
                }
                for (int64_t k = 0; k < n_src; k++) free((void *)(uintptr_t)src[k]);
                free(start);
                free(want);
                free(got);
            }
}

Test(merge_rows, tiles_agree_with_the_reference)
{
    kvf_rows row[3];
    rng r = { 4 };
    int n_level = levels(row);
    for (int s = 0; s < N_SIZE; s++) {
        int64_t n = sizes[s];
        float *x[8], want[16], got[16];
        for (int k = 0; k < 8; k++) x[k] = some(&r, KVF_MERGE_F32, n);
        const float *const a[4] = { x[0], x[1], x[2], x[3] }, *const b[4] = { x[4], x[5], x[6], x[7] };
        for (int i = 1; i < n_level; i++)
            for (int op = 0; op < 2; op++) {
                (op ? row[0].dist2 : row[0].dot)(a, b, n, want);
                (op ? row[i].dist2 : row[i].dot)(a, b, n, got);
                for (int k = 0; k < 16; k++)
                    near((double)got[k], (double)want[k], 2e-5 * sqrt((double)n), op ? "dist2" : "dot", n);
            }
        for (int k = 0; k < 8; k++) free(x[k]);
    }
}

/* Two rows that differ in the last bits: |a|^2 + |b|^2 - 2 a b would lose it all. */
Test(merge_rows, distances_of_near_rows_are_exact)
{
    kvf_rows row[3];
    int n_level = levels(row);
    for (int i = 0; i < n_level; i++) {
        float x[100], y[100], out[16];
        for (int k = 0; k < 100; k++) x[k] = 1000.0f + (float)k, y[k] = x[k] + 0.0078125f;
        const float *const a[4] = { x, y, x, y }, *const b[4] = { y, x, y, x };
        row[i].dist2(a, b, 100, out);
        near((double)out[0], 100 * 0.0078125 * 0.0078125, 1e-8, "dist2", 100);
        cr_assert_eq(out[1], 0.0f);
    }
}

Test(merge_rows, silu_agrees_with_the_reference)
{
    kvf_rows row[3];
    rng r = { 5 };
    int n_level = levels(row);
    for (int s = 0; s < N_SIZE; s++) {
        int64_t n = sizes[s];
        float *x = malloc((size_t)n * 4), *want = malloc((size_t)n * 4), *got = malloc((size_t)n * 4);
        for (int64_t i = 0; i < n; i++) x[i] = rnd_sign(&r) * (i % 5 ? 8.0f : 200.0f);
        memcpy(want, x, (size_t)n * 4);
        row[0].silu(want, n);
        for (int i = 1; i < n_level; i++) {
            memcpy(got, x, (size_t)n * 4);
            row[i].silu(got, n);
            for (int64_t k = 0; k < n; k++)
                near((double)got[k], (double)want[k], 1e-6 + 1e-6 * fabs((double)want[k]), "silu", n);
        }
        free(x);
        free(want);
        free(got);
    }
}

Test(merge_rows, scan_agrees_with_the_reference)
{
    kvf_rows row[3];
    rng r = { 6 };
    int n_level = levels(row);
    for (int64_t e = 1; e <= 67; e += e < 18 ? 1 : 16)
        for (int64_t s = 1; s <= 16; s += 5) {
            int64_t n = 9, width = 2 * s + 3;
            float *u = some(&r, KVF_MERGE_F32, n * e), *dt = some(&r, KVF_MERGE_F32, n * e),
                  *bc = some(&r, KVF_MERGE_F32, n * width);
            float *a = some(&r, KVF_MERGE_F32, s * e), *d = some(&r, KVF_MERGE_F32, e);
            float *h[3], *y[3];
            for (int64_t k = 0; k < n * e; k++) dt[k] = fabsf(dt[k]);
            for (int64_t k = 0; k < s * e; k++) a[k] = -fabsf(a[k]) * 4 - 0.01f;
            for (int i = 0; i < n_level; i++) {
                h[i] = calloc((size_t)(s * e), 4);
                y[i] = calloc((size_t)(n * e), 4);
                kvf_scan_args args = { .n_tok = n,
                                       .n_channel = e,
                                       .stride = e,
                                       .u = u,
                                       .dt = dt,
                                       .bc = bc + 3,
                                       .bc_stride = width,
                                       .n_state = s,
                                       .a = a,
                                       .a_stride = e,
                                       .d = d,
                                       .h = h[i],
                                       .y = y[i] };
                row[i].scan(&args);
                for (int64_t k = 0; k < n * e; k++) near((double)y[i][k], (double)y[0][k], 1e-5, "y", e);
                for (int64_t k = 0; k < s * e; k++) near((double)h[i][k], (double)h[0][k], 1e-5, "h", e);
            }
            for (int i = 0; i < n_level; i++) {
                free(h[i]);
                free(y[i]);
            }
            free(u);
            free(dt);
            free(bc);
            free(a);
            free(d);
        }
}
