/* test_mm.c - every matrix-product kernel this machine runs, held to the reference of its x_form,
 * and the references to a sum in double over dequantised weights.
 *
 * A kernel may add in another order and nothing else, so the tolerance is a share of the sum of
 * absolute terms: 1e-5. Random data reach 1e-6; equal weights on equal activations, where every
 * rounding of the reference's long sum errs the same way, 7e-6. An absolute 1e-35 lets AMX, which
 * flushes subnormals, pass on the smallest scales.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include <criterion/criterion.h>

#include <float.h>
#include <math.h>

#include "backend/cpu/mm_q8.h"
#include "base/mem.h"
#include "parity/weights.h"

typedef struct kernel_row {
    const char *id;
    const kvf_mm_kernel *k, *ref;
    unsigned flags; /* all needed */
    bool f32, half, quants;
} kernel_row;

#if defined(__x86_64__)
#define VNNI (KVF_CPU_AVX512 | KVF_CPU_AVX512_VNNI)
static const kernel_row kernels[] = {
    { "mv_avx2_q8", &kvf_mv_avx2_q8, &kvf_mm_ref_q8, KVF_CPU_AVX2, false, false, true },
    { "mv_avx512_q8", &kvf_mv_avx512_q8, &kvf_mm_ref_q8, VNNI, false, false, true },
    { "mm_avx2_q8", &kvf_mm_avx2_q8, &kvf_mm_ref_q8, KVF_CPU_AVX2, false, false, true },
    { "mm_avx512_q8", &kvf_mm_avx512_q8, &kvf_mm_ref_q8, VNNI, false, false, true },
    { "mv_avx2_f32", &kvf_mv_avx2_f32, &kvf_mm_ref_f32, KVF_CPU_AVX2, true, true, true },
    { "mv_avx512_f32", &kvf_mv_avx512_f32, &kvf_mm_ref_f32, KVF_CPU_AVX512, true, true, true },
    { "mm_avx2_f32", &kvf_mm_avx2_f32, &kvf_mm_ref_f32, KVF_CPU_AVX2, true, true, true },
    { "mm_avx512_f32", &kvf_mm_avx512_f32, &kvf_mm_ref_f32, KVF_CPU_AVX512, true, true, true },
    { "mm_amx_bf16", &kvf_mm_amx_bf16, &kvf_mm_ref_bf16, KVF_CPU_AMX, false, true, true },
};
enum { N_KERNELS = sizeof kernels / sizeof *kernels };
#else
static const kernel_row kernels[1];
enum { N_KERNELS = 0 };
#endif

static bool takes(const kernel_row *row, kvf_dtype type)
{
    if (type == KVF_DTYPE_F32) return row->f32;
    if (type == KVF_DTYPE_F16 || type == KVF_DTYPE_BF16) return row->half;
    return row->quants;
}

/* ---- One product ------------------------------------------------------------------------ */

typedef enum x_kind { X_RANDOM, X_ZERO_ROWS, X_EXTREME, X_HIGH, X_LOW, X_HUGE, X_TINY } x_kind;

typedef struct problem {
    kvf_weight w;
    int64_t n_tok, y_stride;
    float *x, *bias, *y0; /* y0: what y holds before */
    float *want, *mass;   /* [n_tok][n_out]: reference, sum of absolute terms */
    guarded weights;
    bool accumulate;
    bool whole; /* run in one part */
    weight_kind wk;
    x_kind xk;
} problem;

static void *get(size_t n, size_t size)
{
    void *p = kvf_alloc(&kvf_mem_default, n, size);
    cr_assert_not_null(p);
    return p;
}

static float test_x(x_kind kind, int64_t t, int64_t k, uint64_t *seed)
{
    float r = test_real(seed);
    switch (kind) {
    case X_ZERO_ROWS: return t % 2 ? r : 0.0f;
    case X_EXTREME: return k % 5 == 4 ? -1.0f : 1.0f; /* q is 127 or -127 everywhere */
    case X_HIGH: return 1.0f;
    case X_LOW: return -1.0f;
    case X_HUGE: return r * 1e30f;
    case X_TINY: return r * 1e-30f;
    default: return k % 37 == 0 ? 20.0f * r : r; /* with outliers, as activations have */
    }
}

/* Sum of |x| (|s u| + |m|) per row and token: what rounding errors are a share of. */
static void mass_of(problem *p)
{
    int64_t n = p->w.n_in;
    float *w = get((size_t)n, sizeof *w);
    kvf_wblock b;
    for (int64_t r = 0; r < p->w.n_out; r++) {
        const char *row = (const char *)p->w.data + (size_t)r * p->w.row_bytes;
        kvf_dequant_ref(p->w.type, row, w, n);
        for (int64_t k = 0; k < n; k++) w[k] = fabsf(w[k]);
        const char *block = row;
        if (kvf_dtype_get(p->w.type)->block > 1)
            for (int64_t k = 0; k < n; k += b.n, block += kvf_dtype_get(p->w.type)->bytes) {
                kvf_wblock_unpack(p->w.type, block, &b);
                for (int i = 0; i < b.n; i++)
                    w[k + i] = fabsf(b.s[i / b.group] * (float)b.u[i]) + fabsf(b.m[i / b.group]);
            }
        for (int64_t t = 0; t < p->n_tok; t++) {
            double sum = 0.0;
            for (int64_t k = 0; k < n; k++) sum += fabs((double)p->x[t * n + k] * (double)w[k]);
            p->mass[t * p->w.n_out + r] = (float)(sum < FLT_MAX ? sum : FLT_MAX);
        }
    }
    kvf_free(&kvf_mem_default, w);
}

static void give_bias(problem *p, uint64_t *seed)
{
    p->bias = get((size_t)p->w.n_out, sizeof *p->bias);
    for (int64_t r = 0; r < p->w.n_out; r++) p->bias[r] = test_real(seed);
}

static problem make(kvf_dtype type, const int64_t *shape, weight_kind wk, x_kind xk, uint64_t *seed)
{
    int64_t n_out = shape[0], n_in = shape[1], n_tok = shape[2];
    problem p = { .w = { type, n_out, n_in, kvf_dtype_row_bytes(type, n_in), NULL },
                  .n_tok = n_tok,
                  .y_stride = n_out + (int64_t)(test_rng(seed) % 5),
                  .wk = wk,
                  .xk = xk };
    p.weights = guarded_alloc((size_t)n_out * p.w.row_bytes, kvf_dtype_get(type)->block == 1 ? 4 : 2);
    p.w.data = p.weights.data;
    test_weights(type, p.weights.data, n_out * n_in, wk, seed);
    p.x = get((size_t)(n_tok * n_in), sizeof *p.x);
    p.y0 = get((size_t)(n_tok * p.y_stride), sizeof *p.y0);
    p.want = get((size_t)(n_tok * n_out), sizeof *p.want);
    p.mass = get((size_t)(n_tok * n_out), sizeof *p.mass);
    for (int64_t i = 0; i < n_tok * n_in; i++) p.x[i] = test_x(xk, i / n_in, i % n_in, seed);
    for (int64_t i = 0; i < n_tok * p.y_stride; i++) p.y0[i] = test_real(seed);
    if (test_rng(seed) & 64) give_bias(&p, seed);
    p.accumulate = test_rng(seed) & 64;
    mass_of(&p);
    return p;
}

static void drop(problem *p)
{
    guarded_free(p->weights);
    float *all[] = { p->x, p->bias, p->y0, p->want, p->mass };
    for (int i = 0; i < 5; i++) kvf_free(&kvf_mem_default, all[i]);
}

/* y of a kernel, packed in two pieces and run in up to three parts, as the thread pool would. */
static float *run(const kvf_mm_kernel *k, const problem *p, uint64_t *seed)
{
    int64_t n_out = p->w.n_out, n_in = p->w.n_in, cut = p->n_tok / 2 / k->pack_align * k->pack_align;
    guarded x = guarded_alloc(k->x_bytes(p->n_tok, n_in), 64);
    guarded scratch = guarded_alloc(k->scratch_bytes(p->w.type, p->n_tok, n_in) + 1, 64);
    memset(x.data, 0xa5, k->x_bytes(p->n_tok, n_in));
    memset(scratch.data, 0xa5, k->scratch_bytes(p->w.type, p->n_tok, n_in));
    float *y = get((size_t)(p->n_tok * p->y_stride), sizeof *y);
    memcpy(y, p->y0, (size_t)(p->n_tok * p->y_stride) * sizeof *y);
    for (int64_t i = 0; i < p->n_tok * p->y_stride; i++) /* what is not to be read is not read */
        if (!p->accumulate && i % p->y_stride < n_out) y[i] = NAN;
    k->pack(p->x, p->n_tok, n_in, cut, p->n_tok, x.data);
    if (cut) k->pack(p->x, p->n_tok, n_in, 0, cut, x.data);
    for (int64_t row = 0; row < n_out;) {
        int64_t steps = 1 + (int64_t)(test_rng(seed) % 3) * n_out / 2 / k->row_align;
        int64_t next = row + steps * k->row_align;
        if (next > n_out || p->whole) next = n_out;
        kvf_mm_part part = { &p->w,   x.data, p->n_tok,    row,           next,
                             p->bias, y,      p->y_stride, p->accumulate, scratch.data };
        k->run(&part);
        row = next;
    }
    guarded_free(x);
    guarded_free(scratch);
    return y;
}

static void check(const char *id, const problem *p, const float *y, float share)
{
    for (int64_t t = 0; t < p->n_tok; t++) {
        for (int64_t r = 0; r < p->y_stride; r++) {
            float got = y[t * p->y_stride + r], before = p->y0[t * p->y_stride + r];
            if (r >= p->w.n_out) {
                cr_assert_eq(got, before, "%s wrote past n_out", id);
                continue;
            }
            double want = p->want[t * p->w.n_out + r], mass = p->mass[t * p->w.n_out + r];
            if (p->bias) mass += fabs((double)p->bias[r]);
            if (p->accumulate) mass += fabs((double)before);
            double err = fabs((double)got - want);
            cr_assert(err <= (double)share * mass + 1e-35,
                      "%s %s [%lld x %lld] token %lld of %lld, row %lld, weights %d, x %d: %g, not %g (%.2g "
                      "of mass)",
                      id, kvf_dtype_get(p->w.type)->name, (long long)p->w.n_out, (long long)p->w.n_in,
                      (long long)t, (long long)p->n_tok, (long long)r, (int)p->wk, (int)p->xk, (double)got,
                      want, err / mass);
        }
    }
}

/* All kernels that take the problem's type; a reference is computed once for those it defines. */
static void compare(problem *p, uint64_t *seed)
{
    unsigned flags = kvf_cpu_detect();
    const kvf_mm_kernel *ref = NULL;
    for (int i = 0; i < N_KERNELS; i++) {
        const kernel_row *row = &kernels[i];
        bool half_only = p->w.n_in % 32 != 0 && row->ref == &kvf_mm_ref_bf16;
        if (!takes(row, p->w.type) || (flags & row->flags) != row->flags || half_only) continue;
        int32_t form = row->k->x_form == KVF_X_BF16_TILES ? KVF_X_BF16 : row->k->x_form; /* same arithmetic, other order */
        cr_assert_eq(form, row->ref->x_form);
        if (row->ref != ref) {
            ref = row->ref;
            float *y = run(ref, p, seed);
            for (int64_t t = 0; t < p->n_tok; t++)
                memcpy(p->want + t * p->w.n_out, y + t * p->y_stride, (size_t)p->w.n_out * sizeof *y);
            kvf_free(&kvf_mem_default, y);
        }
        float *y = run(row->k, p, seed);
        check(row->id, p, y, 1e-5f);
        kvf_free(&kvf_mem_default, y);
    }
}

/* ---- Tests ------------------------------------------------------------------------------ */

/* For a type whose block is 256, n_in is rounded up to whole blocks. */
static void one(kvf_dtype type, int64_t n_out, int64_t n_in, int64_t n_tok, weight_kind wk, x_kind xk,
                uint64_t *seed)
{
    int64_t block = kvf_dtype_get(type)->block;
    const int64_t shape[] = { n_out, (n_in + block - 1) / block * block, n_tok };
    problem p = make(type, shape, wk, xk, seed);
    compare(&p, seed);
    drop(&p);
}

Test(mm, every_kernel_agrees_with_its_reference_on_every_shape)
{
    static const int64_t outs[] = { 1, 3, 31, 32, 33, 161 }, ins[] = { 32, 256, 896, 2048 };
    static const int64_t toks[] = { 1, 2, 3, 7, 8, 9, 33, 64 };
    uint64_t seed = 0x2545f4914f6cdd1du;
    for (int t = 0; t < N_TEST_TYPES; t++) {
        for (int i = 0; i < 4; i++) {
            if (ins[i] == 32 && kvf_dtype_get(test_types[t])->block == 256) continue;
            for (int o = 0; o < 6; o++)
                for (int n = 0; n < 8; n++)
                    if (outs[o] * ins[i] * toks[n] <= 1 << 18) /* the references are slow */
                        one(test_types[t], outs[o], ins[i], toks[n], W_RANDOM, X_RANDOM, &seed);
        }
    }
}

Test(mm, large_shapes_agree_too)
{
    uint64_t seed = 0x853c49e6748fea9bu;
    for (int t = 0; t < N_TEST_TYPES; t++) {
        one(test_types[t], 100, 896, 64, W_RANDOM, X_RANDOM, &seed);
        one(test_types[t], 33, 2304, 9, W_RANDOM, X_RANDOM, &seed);
        one(test_types[t], 33, 4864, 1, W_RANDOM, X_RANDOM, &seed);
    }
}

Test(mm, float_weights_take_any_width)
{
    uint64_t seed = 0xda942042e4dd58b5u;
    for (int t = 0; t < 3; t++)
        for (int64_t n_in = 1; n_in < 80; n_in += 3)
            one(test_types[t], 5, n_in, 1 + n_in % 9, W_RANDOM, X_RANDOM, &seed);
}

/* The widest quants against the widest activations: 16-bit sums would saturate here. */
Test(mm, extreme_quants_do_not_saturate)
{
    uint64_t seed = 0x5851f42d4c957f2du;
    for (int t = 0; t < N_TEST_TYPES; t++)
        for (int w = W_LOW; w <= W_HIGH; w++)
            for (int64_t n_tok = 1; n_tok <= 16; n_tok += 5)
                for (int x = X_EXTREME; x <= X_LOW; x++)
                    one(test_types[t], 33, x == X_EXTREME ? 896 : 256, n_tok, (weight_kind)w, (x_kind)x,
                        &seed);
}

/* More rows, tokens and k than any kernel takes at once, in one part, with all that can be added to. */
Test(mm, all_loops_go_round_at_once)
{
    static const int64_t shape[] = { 161, 2304, 17 };
    uint64_t seed = 0xd1342543de82ef95u;
    for (int t = 0; t < N_TEST_TYPES; t++) {
        for (int i = 0; i < 4; i++) {
            problem p = make(test_types[t], shape, W_RANDOM, X_RANDOM, &seed);
            kvf_free(&kvf_mem_default, p.bias);
            p.bias = NULL;
            if (i & 1) give_bias(&p, &seed);
            p.accumulate = i & 2;
            p.whole = true;
            compare(&p, &seed);
            drop(&p);
        }
    }
}

Test(mm, zero_huge_and_subnormal_numbers_agree)
{
    static const weight_kind wk[] = { W_ZERO, W_TINY, W_RANDOM, W_HUGE, W_TINY, W_RANDOM };
    static const x_kind xk[] = { X_RANDOM, X_RANDOM, X_ZERO_ROWS, X_TINY, X_HUGE, X_HUGE };
    uint64_t seed = 0x14057b7ef767814fu;
    for (int t = 0; t < N_TEST_TYPES; t++)
        for (int i = 0; i < 6; i++)
            for (int64_t n_tok = 1; n_tok <= 13; n_tok += 6)
                one(test_types[t], 17, 544, n_tok, wk[i], xk[i], &seed);
}

/* ref_f32 and ref_q8 against a sum in double: of x, and of the activations as packed. */
Test(mm, references_are_sums_over_dequantised_weights)
{
    static const int64_t shape[] = { 7, 768, 5 };
    uint64_t seed = 0xb5ad4eceda1ce2a9u;
    for (int t = 0; t < N_TEST_TYPES; t++) {
        problem p = make(test_types[t], shape, W_RANDOM, X_RANDOM, &seed);
        p.accumulate = false;
        for (int form = KVF_X_F32; form <= KVF_X_Q8; form++) {
            const kvf_mm_kernel *ref = form == KVF_X_F32 ? &kvf_mm_ref_f32 : &kvf_mm_ref_q8;
            if (form == KVF_X_Q8 && kvf_dtype_get(p.w.type)->block == 1) continue;
            void *packed = get(ref->x_bytes(5, 768), 1);
            ref->pack(p.x, 5, 768, 0, 5, packed);
            for (int64_t i = 0; i < 35; i++) {
                float w[768];
                int64_t tok = i / 7, r = i % 7;
                kvf_dequant_ref(p.w.type, (const char *)p.w.data + (size_t)r * p.w.row_bytes, w, 768);
                kvf_q8_row row = kvf_q8_row_at(packed, tok, 768);
                double sum = p.bias ? (double)p.bias[r] : 0.0;
                for (int k = 0; k < 768; k++)
                    sum += (double)w[k] * (form == KVF_X_F32 ? (double)p.x[tok * 768 + k]
                                                             : (double)row.d[k / 32] * (double)row.q[k]);
                p.want[i] = (float)sum;
            }
            float *y = run(ref, &p, &seed);
            check(ref->name, &p, y, 2e-6f);
            kvf_free(&kvf_mem_default, y);
            kvf_free(&kvf_mem_default, packed);
        }
        drop(&p);
    }
}

typedef void pack_fn(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out);

static void compare_pack(pack_fn *fn, const char *name)
{
    static const int64_t widths[] = { 1, 31, 32, 33, 50, 64, 96, 896, 2048 };
    uint64_t seed = 0x94d049bb133111ebu;
    for (int i = 0; i < 9; i++) {
        for (int kind = 0; kind < 9; kind++) {
            int64_t n = widths[i], n_tok = 3;
            guarded gx = guarded_alloc((size_t)(n_tok * n) * sizeof(float), 4);
            float *x = gx.data;
            static const float amount[] = { 1.0f, 1e30f, 1e-38f, 1e-42f, 3e-44f, 0.0f, 1.0f, 1.0f, 1.0f };
            for (int64_t j = 0; j < n_tok * n; j++) {
                x[j] = amount[kind] * test_real(&seed);
                if (kind == 6) x[j] = (float)((int)(test_rng(&seed) % 255) - 127) * 0.5f; /* ties */
                if (kind == 7 && j % 61 == 5) x[j] = INFINITY;
                if (kind == 8 && j % 61 == 5) x[j] = NAN;
            }
            size_t bytes = kvf_q8_x_bytes(n_tok, n);
            char *want = get(bytes, 1);
            guarded got = guarded_alloc(bytes, 64);
            memset(got.data, 0x5a, bytes);
            kvf_q8_pack_ref(x, n_tok, n, 0, n_tok, want);
            fn(x, n_tok, n, 0, 1, got.data);
            fn(x, n_tok, n, 1, n_tok, got.data);
            cr_assert_arr_eq(got.data, want, bytes, "%s width %lld kind %d", name, (long long)n, kind);
            kvf_free(&kvf_mem_default, want);
            guarded_free(got);
            guarded_free(gx);
        }
    }
}

#if defined(__x86_64__)
Test(mm, q8_activations_are_the_same_bytes_at_every_level)
{
    if (kvf_cpu_detect() & KVF_CPU_AVX2) compare_pack(kvf_q8_pack_avx2, "avx2");
    if (kvf_cpu_detect() & KVF_CPU_AVX512) compare_pack(kvf_q8_pack_avx512, "avx512");
}
#endif

Test(mm, q8_rounds_to_even_and_keeps_the_scale)
{
    float x[32] = { 127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -126.5f, 126.49f };
    void *packed = get(kvf_q8_x_bytes(1, 32), 1);
    kvf_q8_pack_ref(x, 1, 32, 0, 1, packed);
    kvf_q8_row row = kvf_q8_row_at(packed, 0, 32);
    static const int8_t want[8] = { 127, 0, 2, 2, 0, -2, -126, 126 };
    cr_assert_eq(row.d[0], 1.0f);
    cr_assert_arr_eq(row.q, want, 8);
    cr_assert_eq(row.sum[0], 127 + 2 + 2 - 2 - 126 + 126);
    cr_assert_eq((uintptr_t)row.d % 64, 0);
    cr_assert_eq((uintptr_t)row.sum % 64, 0);
    kvf_free(&kvf_mem_default, packed);
}

Test(mm, a_nan_activation_is_seen_in_the_result)
{
    uint64_t seed = 0xd6e8feb86659fd93u;
    static const int64_t shape[] = { 4, 256, 1 };
    problem p = make(KVF_DTYPE_Q4_K, shape, W_RANDOM, X_RANDOM, &seed);
    p.x[77] = NAN;
    float *y = run(&kvf_mm_ref_q8, &p, &seed);
    for (int r = 0; r < 4; r++) cr_assert(isnan(y[r]));
    kvf_free(&kvf_mem_default, y);
    drop(&p);
}

/* ---- The choice: a pure function, testable for every level on any machine --------------- */

#if defined(__x86_64__)
Test(mm, pick_follows_level_type_and_tokens)
{
    static const struct {
        kvf_cpu_level level;
        kvf_dtype type;
        int64_t n_tok;
        bool f32;
        const kvf_mm_kernel *want;
    } cases[] = {
        { KVF_CPU_LEVEL_REF, KVF_DTYPE_Q4_K, 1, false, &kvf_mm_ref_q8 },
        { KVF_CPU_LEVEL_REF, KVF_DTYPE_Q4_K, 512, true, &kvf_mm_ref_f32 },
        { KVF_CPU_LEVEL_REF, KVF_DTYPE_F16, 512, false, &kvf_mm_ref_f32 },
        { KVF_CPU_LEVEL_AVX2, KVF_DTYPE_Q5_0, KVF_MV_MAX_TOK, false, &kvf_mv_avx2_q8 },
        { KVF_CPU_LEVEL_AVX2, KVF_DTYPE_Q5_0, KVF_MV_MAX_TOK + 1, false, &kvf_mm_avx2_q8 },
        { KVF_CPU_LEVEL_AVX2, KVF_DTYPE_F32, 1, false, &kvf_mv_avx2_f32 },
        { KVF_CPU_LEVEL_AVX2, KVF_DTYPE_BF16, 64, false, &kvf_mm_avx2_f32 },
        { KVF_CPU_LEVEL_AVX512, KVF_DTYPE_Q6_K, 1, false, &kvf_mv_avx512_q8 },
        { KVF_CPU_LEVEL_AVX512, KVF_DTYPE_Q6_K, 9, false, &kvf_mm_avx512_q8 },
        { KVF_CPU_LEVEL_AVX512, KVF_DTYPE_Q6_K, 9, true, &kvf_mm_avx512_f32 },
        { KVF_CPU_LEVEL_AVX512, KVF_DTYPE_Q6_K, 8, true, &kvf_mv_avx512_f32 },
        { KVF_CPU_LEVEL_AMX, KVF_DTYPE_Q8_0, 8, false, &kvf_mv_avx512_q8 },
        { KVF_CPU_LEVEL_AMX, KVF_DTYPE_Q8_0, 9, false, &kvf_mm_amx_bf16 },
        { KVF_CPU_LEVEL_AMX, KVF_DTYPE_BF16, 9, false, &kvf_mm_amx_bf16 },
        { KVF_CPU_LEVEL_AMX, KVF_DTYPE_BF16, 8, false, &kvf_mv_avx512_f32 },
        { KVF_CPU_LEVEL_AMX, KVF_DTYPE_F32, 512, false, &kvf_mm_avx512_f32 },
        { KVF_CPU_LEVEL_AMX, KVF_DTYPE_Q8_0, 512, true, &kvf_mm_avx512_f32 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvf_cpu_ops ops = { .level = cases[i].level };
        kvf_cpu_mm_init(&ops);
        cr_assert_eq(ops.mm_pick(&ops, cases[i].type, cases[i].n_tok, cases[i].f32), cases[i].want,
                     "case %zu", i);
        cr_assert_not_null(ops.dequant);
    }
}
#endif
