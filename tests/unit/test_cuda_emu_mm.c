/* test_cuda_emu_mm.c - weights and products of the CUDA kernels: every type, few tokens against the CPU's
 * reference (the same integers, other order of fp32 sums), many against bf16 products summed in double.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include "tests/cuda/rig.h"

#include "backend/cpu/mm.h"
#include "tests/parity/weights.h"

typedef struct matrix {
    kvf_weight cpu, dev;
    uint8_t *bytes;
    float *values; /* [n_out][n_in] */
} matrix;

static void matrix_open(rig *r, matrix *m, kvf_dtype type, int64_t n_out, int64_t n_in, weight_kind kind, uint64_t *seed)
{
    size_t row = kvf_dtype_row_bytes((uint32_t)type, n_in);
    m->bytes = room((size_t)n_out * row);
    m->values = room((size_t)(n_out * n_in) * sizeof(float));
    for (int64_t i = 0; i < n_out; i++) {
        test_weights(type, m->bytes + (size_t)i * row, n_in, kind, seed);
        kvf_dequant_ref(type, m->bytes + (size_t)i * row, m->values + i * n_in, n_in);
    }
    OK(r->cpu->ops->weight_init(r->cpu, &m->cpu, type, n_out, n_in, m->bytes, &err));
    OK(r->dev->ops->weight_init(r->dev, &m->dev, type, n_out, n_in, m->bytes, &err));
}

static void matrix_close(rig *r, matrix *m)
{
    r->dev->ops->weight_fini(r->dev, &m->dev);
    drop(m->bytes);
    drop(m->values);
}

Test(cuda_mm, rows_of_every_type_are_the_reference_s_bits)
{
    rig r;
    uint64_t seed = 1;
    rig_open(&r, false);
    for (int t = 0; t < N_TEST_TYPES; t++) {
        for (weight_kind kind = W_RANDOM; kind <= W_HUGE; kind++) {
            enum { ROWS = 5, WIDTH = 512 };
            kvf_token ids[4] = { 4, 0, 4, 2 };
            matrix m;
            matrix_open(&r, &m, test_types[t], ROWS, WIDTH, kind, &seed);
            float *out = dev_poison(&r, 4 * WIDTH);
            kvf_embed_args a = { .table = &m.dev, .tokens = ids, .n_tok = 4, .scale = 1, .out = out };
            OK(r.dev->ops->embed(r.dev, &a, &err));
            float *got = dev_get(&r, out, 4 * WIDTH * sizeof(float));
            for (int i = 0; i < 4; i++)
                for (int c = 0; c < WIDTH; c++)
                    cr_assert_eq(got[i * WIDTH + c], m.values[ids[i] * WIDTH + c], "type %d kind %d row %d column %d: %g, not %g",
                                 (int)test_types[t], (int)kind, i, c, (double)got[i * WIDTH + c], (double)m.values[ids[i] * WIDTH + c]);
            drop(got);
            dev_drop(&r, out);
            matrix_close(&r, &m);
        }
    }
    rig_close(&r);
}

/* What the op means, in double: in bf16 for many tokens; and the size of what was summed. */
static double expected(const matrix *m, const float *x, int64_t row, bool bf16, double *size)
{
    double sum = 0;
    *size = 0;
    for (int64_t k = 0; k < m->cpu.n_in; k++) {
        float w = m->values[row * m->cpu.n_in + k], v = x[k];
        if (bf16) w = kvf_f32_from_bf16(kvf_bf16_from_f32(w)), v = kvf_f32_from_bf16(kvf_bf16_from_f32(v));
        sum += (double)w * (double)v;
        *size += fabs((double)w * (double)v);
    }
    return sum;
}

/* Two weights of one call: y = x w0^T + bias, y1 = x w1^T without; then accumulated once more. */
static void try_product(rig *r, kvf_dtype type0, kvf_dtype type1, int64_t n_tok, int64_t n_out, int64_t n_in, bool f32, uint64_t *seed)
{
    matrix m[2];
    matrix_open(r, &m[0], type0, n_out, n_in, W_RANDOM, seed);
    matrix_open(r, &m[1], type1, n_out + 3, n_in, W_RANDOM, seed);
    float *x = floats((size_t)(n_tok * n_in), 2.0f, seed), *bias = floats((size_t)n_out, 1.0f, seed), *y[2], *dy[2];
    for (int j = 0; j < 2; j++) {
        size_t n = (size_t)(n_tok * m[j].cpu.n_out);
        y[j] = room(n * sizeof(float));
        dy[j] = dev_poison(r, n);
    }
    float *dx = dev_put(r, x, (size_t)(n_tok * n_in) * sizeof(float)), *dbias = dev_put(r, bias, (size_t)n_out * sizeof(float));
    kvf_matmul_args c = { .x = x, .n_tok = n_tok, .n_w = 2, .w = { &m[0].cpu, &m[1].cpu }, .bias = { bias }, .y = { y[0], y[1] } };
    kvf_matmul_args d = { .x = dx, .n_tok = n_tok, .n_w = 2, .w = { &m[0].dev, &m[1].dev }, .bias = { dbias }, .y = { dy[0], dy[1] } };
    for (int pass = 0; pass < 2; pass++) {
        c.accumulate = d.accumulate = pass > 0;
        OK(r->cpu->ops->matmul(r->cpu, &c, &err));
        OK(r->dev->ops->matmul(r->dev, &d, &err));
    }
    for (int j = 0; j < 2; j++) {
        kvf_dtype type = j ? type1 : type0;
        bool bf16 = n_tok > 8 && !f32 && type != KVF_DTYPE_F32 && n_in % 8 == 0;
        float *got = dev_get(r, dy[j], (size_t)(n_tok * m[j].cpu.n_out) * sizeof(float));
        for (int64_t t = 0; t < n_tok; t++)
            for (int64_t i = 0; i < m[j].cpu.n_out; i++) {
                int64_t at = t * m[j].cpu.n_out + i;
                double size, want = expected(&m[j], x + t * n_in, i, bf16, &size);
                want = bf16 ? 2 * (want + (j ? 0 : (double)bias[i])) : (double)y[j][at];
                cr_assert(fabs((double)got[at] - want) <= 1e-6 * (size + 4), "type %d: %g, not %g; tokens %lld of %lld x %lld, f32 %d", (int)type,
                          (double)got[at], want, (long long)n_tok, (long long)n_out, (long long)n_in, f32);
            }
        drop(got);
        drop(y[j]);
        dev_drop(r, dy[j]);
        matrix_close(r, &m[j]);
    }
    dev_drop(r, dx);
    dev_drop(r, dbias);
    drop(x);
    drop(bias);
}

Test(cuda_mm, products_of_every_type_equal_the_reference)
{
    const int64_t n_tok[] = { 1, 3, 8, 9, 70 };
    for (int f32 = 0; f32 < 2; f32++) {
        rig r;
        uint64_t seed = 3;
        rig_open(&r, f32);
        for (int t = 0; t < N_TEST_TYPES; t++)
            for (int i = 0; i < 5; i++)
                if (!f32 || i == 1 || i == 3)
                    try_product(&r, test_types[t], test_types[(t + 4) % N_TEST_TYPES], n_tok[i], i < 4 ? 5 + t : 67, i == 2 ? 1536 : 512, f32, &seed);
        rig_close(&r);
    }
}

Test(cuda_mm, float_rows_of_any_width_are_multiplied)
{
    const kvf_dtype types[] = { KVF_DTYPE_F32, KVF_DTYPE_F16, KVF_DTYPE_BF16 };
    rig r;
    uint64_t seed = 5;
    rig_open(&r, false);
    for (int t = 0; t < 3; t++)
        for (int64_t n_in = 1; n_in < 300; n_in = n_in * 3 + 2) {
            try_product(&r, types[t], types[(t + 1) % 3], 2, 6, n_in, false, &seed);
            if (t != 1) try_product(&r, types[t], types[t], 11, 6, n_in, false, &seed);
        }
    rig_close(&r);
}

Test(cuda_mm, gated_products_equal_the_reference)
{
    const int64_t n_tok[] = { 1, 8, 12 };
    rig r;
    uint64_t seed = 9;
    rig_open(&r, false);
    for (int act = 0; act < 2; act++)
        for (int i = 0; i < 3; i++) {
            enum { OUT = 33, IN = 256 };
            int64_t n = n_tok[i];
            matrix m[2];
            matrix_open(&r, &m[0], KVF_DTYPE_Q4_K, OUT, IN, W_RANDOM, &seed);
            matrix_open(&r, &m[1], KVF_DTYPE_Q6_K, OUT, IN, W_RANDOM, &seed);
            float *x = floats((size_t)n * IN, 1.0f, &seed), *y = room((size_t)n * OUT * sizeof *y);
            float *dx = dev_put(&r, x, (size_t)n * IN * sizeof *x), *dy = dev_poison(&r, (size_t)n * OUT);
            kvf_matmul_glu_args c = { .x = x, .n_tok = n, .gate = &m[0].cpu, .up = &m[1].cpu, .y = y, .act = (kvf_act)act };
            kvf_matmul_glu_args d = { .x = dx, .n_tok = n, .gate = &m[0].dev, .up = &m[1].dev, .y = dy, .act = (kvf_act)act };
            OK(r.cpu->ops->matmul_glu(r.cpu, &c, &err));
            OK(r.dev->ops->matmul_glu(r.dev, &d, &err));
            float *got = dev_get(&r, dy, (size_t)n * OUT * sizeof *y);
            /* many tokens: bf16 here, int8 there; both are within a hundredth of the largest value */
            double top = 0;
            for (int64_t k = 0; k < n * OUT; k++) top = fmax(top, fabs((double)y[k]));
            double off = distance(got, y, (size_t)n * OUT);
            cr_assert_leq(off, (n > 8 ? 2e-2 : 2e-5) * (top + 1), "act %d, %lld tokens: off by %g of %g", act, (long long)n, off, top);
            drop(got);
            drop(x);
            drop(y);
            dev_drop(&r, dx);
            dev_drop(&r, dy);
            matrix_close(&r, &m[0]);
            matrix_close(&r, &m[1]);
        }
    rig_close(&r);
}

Test(cuda_mm, a_nan_activation_is_seen_in_the_product)
{
    rig r;
    uint64_t seed = 11;
    matrix m;
    rig_open(&r, false);
    matrix_open(&r, &m, KVF_DTYPE_Q8_0, 4, 64, W_RANDOM, &seed);
    float *x = floats(64, 1.0f, &seed);
    x[40] = NAN;
    float *dx = dev_put(&r, x, 64 * sizeof *x), *dy = dev_poison(&r, 4);
    kvf_matmul_args d = { .x = dx, .n_tok = 1, .n_w = 1, .w = { &m.dev }, .y = { dy } };
    OK(r.dev->ops->matmul(r.dev, &d, &err));
    float *got = dev_get(&r, dy, 4 * sizeof *got);
    for (int i = 0; i < 4; i++) cr_assert(isnan(got[i]));
    drop(got);
    drop(x);
    matrix_close(&r, &m);
    dev_drop(&r, dx);
    dev_drop(&r, dy);
    rig_close(&r);
}

#ifdef KVF_TEST_CUDA_EMU
Test(cuda_mm, copies_of_weights_stay_within_their_budget)
{
    rig r;
    uint64_t seed = 13;
    rig_open(&r, false);
    kvf_backend *dev = r.dev;
    kvf_device_params p = { .memory_bytes = 64u << 20, .bf16_bytes = 40 * 256 * 2, .mem = &kvf_mem_default };
    OK(r.module->open(&r.dev, &p, &err));
    uint64_t used[3], total;
    matrix m[2];
    for (int i = 0; i < 2; i++) matrix_open(&r, &m[i], KVF_DTYPE_Q4_K, 40, 256, W_RANDOM, &seed);
    float *x = floats(9 * 256, 1.0f, &seed), *dx = dev_put(&r, x, 9 * 256 * sizeof *x), *dy = dev_poison(&r, 9 * 40), *y[3];
    for (int i = 0; i < 3; i++) {
        kvf_matmul_args d = { .x = dx, .n_tok = 9, .n_w = 1, .w = { &m[i / 2].dev }, .y = { dy } };
        OK(r.dev->ops->matmul(r.dev, &d, &err));
        y[i] = dev_get(&r, dy, 9 * 40 * sizeof(float));
        r.module->memory(r.dev, &used[i], &total);
    }
    cr_assert_eq(used[1], used[0]); /* kept: nothing new */
    cr_assert_eq(memcmp(y[0], y[1], 9 * 40 * sizeof(float)), 0);
    cr_assert_eq(used[2], used[1] + 40 * 256 * 2); /* no budget left: scratch */
    for (int i = 0; i < 3; i++) drop(y[i]);
    for (int i = 0; i < 2; i++) matrix_close(&r, &m[i]);
    drop(x);
    dev_drop(&r, dx);
    dev_drop(&r, dy);
    dev->ops->close(dev);
    rig_close(&r);
}

Test(cuda_mm, the_order_of_threads_does_not_matter)
{
    rig r;
    rig_open(&r, false);
    for (uint64_t order = 1; order <= 3; order++) {
        uint64_t seed = order;
        seed_order(order);
        try_product(&r, KVF_DTYPE_Q4_K, KVF_DTYPE_Q6_K, 1, 6, 512, false, &seed);
        try_product(&r, KVF_DTYPE_Q5_K, KVF_DTYPE_Q8_0, 20, 70, 256, false, &seed);
    }
    rig_close(&r);
}
#endif
