/* test_dequant.c - weights to f32: the reference against blocks written field by field, the SIMD
 * versions against the reference, bit for bit.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include <criterion/criterion.h>

#include "backend/cpu/mm_q8.h"
#include "parity/weights.h"

/* ---- Blocks from known quants: an encoder written apart from the reader ----------------- */

typedef struct fields {
    int q[256]; /* unsigned, of the type's bits */
    int sc[16], mn[8];
    float d, m;
} fields;

static void put_f16(uint8_t *p, float v)
{
    kvf_f16 h = kvf_f16_from_f32(v);
    p[0] = (uint8_t)h;
    p[1] = (uint8_t)(h >> 8);
}

static void or_bits(uint8_t *p, int bit, int value) { *p = (uint8_t)(*p | value << bit); }

static void encode32(kvf_dtype type, const fields *f, uint8_t *b)
{
    bool min = type == KVF_DTYPE_Q4_1 || type == KVF_DTYPE_Q5_1;
    bool five = type == KVF_DTYPE_Q5_0 || type == KVF_DTYPE_Q5_1;
    int qh = min ? 4 : 2, qs = qh + (five ? 4 : 0);
    put_f16(b, f->d);
    if (min) put_f16(b + 2, f->m);
    for (int i = 0; i < 32; i++) {
        if (type == KVF_DTYPE_Q8_0) {
            b[2 + i] = (uint8_t)f->q[i];
        } else {
            or_bits(&b[qs + i % 16], i < 16 ? 0 : 4, f->q[i] & 15);
            if (five) or_bits(&b[qh + i / 8], i % 8, f->q[i] >> 4);
        }
    }
}

static void encode_k(kvf_dtype type, const fields *f, uint8_t *b)
{
    put_f16(b, f->d);
    put_f16(b + 2, f->m);
    for (int j = 0; j < 8; j++) {
        uint8_t *p = b + 4;
        if (j < 4) {
            or_bits(&p[j], 0, f->sc[j]);
            or_bits(&p[4 + j], 0, f->mn[j]);
        } else {
            or_bits(&p[j - 4], 6, f->sc[j] >> 4);
            or_bits(&p[j], 6, f->mn[j] >> 4);
            or_bits(&p[j + 4], 0, f->sc[j] & 15);
            or_bits(&p[j + 4], 4, f->mn[j] & 15);
        }
    }
    int qs = type == KVF_DTYPE_Q5_K ? 48 : 16;
    for (int i = 0; i < 256; i++) {
        int j = i / 32;
        or_bits(&b[qs + 32 * (j / 2) + i % 32], 4 * (j % 2), f->q[i] & 15);
        if (type == KVF_DTYPE_Q5_K) or_bits(&b[16 + i % 32], j, f->q[i] >> 4);
    }
}

static void encode_q6(const fields *f, uint8_t *b)
{
    put_f16(b + 208, f->d);
    for (int j = 0; j < 16; j++) b[192 + j] = (uint8_t)f->sc[j];
    for (int i = 0; i < 256; i++) {
        int half = i / 128, run = i % 128 / 32;
        or_bits(&b[64 * half + i % 64], run < 2 ? 0 : 4, f->q[i] & 15);
        or_bits(&b[128 + 32 * half + i % 32], 2 * run, f->q[i] >> 4);
    }
}

static float expected(kvf_dtype type, const fields *f, int i)
{
    switch (type) {
    case KVF_DTYPE_Q4_0: return f->d * (float)(f->q[i] - 8);
    case KVF_DTYPE_Q5_0: return f->d * (float)(f->q[i] - 16);
    case KVF_DTYPE_Q8_0: return f->d * (float)(int8_t)f->q[i];
    case KVF_DTYPE_Q4_1:
    case KVF_DTYPE_Q5_1: return f->d * (float)f->q[i] + f->m;
    case KVF_DTYPE_Q6_K: return f->d * (float)f->sc[i / 16] * (float)(f->q[i] - 32);
    default: return f->d * (float)f->sc[i / 32] * (float)f->q[i] - f->m * (float)f->mn[i / 32];
    }
}

static int bits_of(kvf_dtype type)
{
    if (type == KVF_DTYPE_Q8_0) return 8;
    if (type == KVF_DTYPE_Q6_K) return 6;
    return type == KVF_DTYPE_Q5_0 || type == KVF_DTYPE_Q5_1 || type == KVF_DTYPE_Q5_K ? 5 : 4;
}

Test(dequant, reference_reads_the_fields_of_every_quantised_type)
{
    uint64_t seed = 0x1234567890abcdefu;
    for (int t = 3; t < N_TEST_TYPES; t++) {
        kvf_dtype type = test_types[t];
        int n = kvf_dtype_get(type)->block;
        for (int rep = 0; rep < 200; rep++) {
            fields f = { .d = 0.0625f * (float)(1 + rep), .m = -0.375f * (float)rep };
            for (int i = 0; i < n; i++) f.q[i] = (int)(test_rng(&seed) >> 20 & ((1u << bits_of(type)) - 1u));
            for (int j = 0; j < 16; j++)
                f.sc[j] = type == KVF_DTYPE_Q6_K ? (int8_t)(test_rng(&seed) >> 9)
                                                 : (int)(test_rng(&seed) >> 9 & 63);
            for (int j = 0; j < 8; j++) f.mn[j] = (int)(test_rng(&seed) >> 30 & 63);
            uint8_t b[256] = { 0 };
            if (type == KVF_DTYPE_Q6_K)
                encode_q6(&f, b);
            else if (n == 256)
                encode_k(type, &f, b);
            else
                encode32(type, &f, b);
            float w[256];
            kvf_dequant_ref(type, b, w, n);
            for (int i = 0; i < n; i++)
                cr_assert_eq(w[i], expected(type, &f, i), "%s element %d: %g, not %g",
                             kvf_dtype_get(type)->name, i, (double)w[i], (double)expected(type, &f, i));
        }
    }
}

Test(dequant, reference_reads_float_types)
{
    const uint8_t f16[] = { 0x00, 0x3c, 0x00, 0xc0, 0x01, 0x00, 0xff, 0x7b },
                  bf16[] = { 0x80, 0x3f, 0x00, 0xc0 };
    float w[4];
    kvf_dequant_ref(KVF_DTYPE_F16, f16, w, 4);
    cr_assert(w[0] == 1.0f && w[1] == -2.0f && w[2] == 0x1p-24f && w[3] == 65504.0f);
    kvf_dequant_ref(KVF_DTYPE_BF16, bf16, w, 2);
    cr_assert(w[0] == 1.0f && w[1] == -2.0f);
    const float f32[] = { 3.5f, -1e30f };
    kvf_dequant_ref(KVF_DTYPE_F32, f32, w, 2);
    cr_assert(w[0] == 3.5f && w[1] == -1e30f);
}

/* ---- SIMD ------------------------------------------------------------------------------- */

typedef void dequant_fn(kvf_dtype type, const void *src, float *dst, int64_t n);

static void compare(dequant_fn *fn, const char *name)
{
    static const int64_t sizes[] = { 1, 7, 15, 16, 17, 32, 64, 256, 896, 2048 };
    uint64_t seed = 0x9e3779b97f4a7c15u;
    for (int t = 0; t < N_TEST_TYPES; t++) {
        kvf_dtype type = test_types[t];
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            int64_t n = sizes[s];
            if (n % kvf_dtype_get(type)->block) continue;
            guarded w = guarded_alloc(kvf_dtype_row_bytes(type, n), 2), out = guarded_alloc((size_t)n * 4, 4);
            float want[2048];
            for (int kind = W_RANDOM; kind <= W_HUGE; kind++) {
                for (int rep = 0; rep < 20; rep++) {
                    test_weights(type, w.data, n, (weight_kind)kind, &seed);
                    kvf_dequant_ref(type, w.data, want, n);
                    fn(type, w.data, out.data, n);
                    cr_assert_arr_eq(out.data, want, (size_t)n * 4, "%s %s n=%lld kind %d", name,
                                     kvf_dtype_get(type)->name, (long long)n, kind);
                }
            }
            guarded_free(w);
            guarded_free(out);
        }
    }
}

#if defined(__x86_64__)
Test(dequant, avx2_has_the_bits_of_the_reference)
{
    if (!(kvf_cpu_detect() & KVF_CPU_AVX2)) cr_skip_test("no AVX2 on this machine");
    compare(kvf_dequant_avx2, "avx2");
}

Test(dequant, avx512_has_the_bits_of_the_reference)
{
    if (!(kvf_cpu_detect() & KVF_CPU_AVX512)) cr_skip_test("no AVX-512 on this machine");
    compare(kvf_dequant_avx512, "avx512");
}
#endif
