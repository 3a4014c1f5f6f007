/* test_vit.c - the tower's kernels of every level against vit_ref.c.
 *
 * Tolerances: f32 sums of n terms against double ones. LayerNorm 2e-6 of the largest value, activations
 * 4e-7 and 1e-6 of the value (their erf is good to 1.5e-7); attention 1e-5 of the largest value, and more where scores are so large that their own rounding (one part
 * in 2^24 of the score) shows in the exponent.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "vision/vit_ops.h"

static uint64_t state;

static float uniform(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(state >> 32) / 2147483648.0f;
}

static float *noise(int64_t n, float scale)
{
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = scale * uniform();
    return x;
}

/* Levels this processor runs, ref last. */
static int levels(const kvf_vit_ops *out[3])
{
    int n = 0;
#if defined(__x86_64__)
    unsigned flags = kvf_cpu_detect();
    if ((flags & KVF_CPU_AVX512) && (flags & KVF_CPU_AVX512_VNNI)) out[n++] = &kvf_vit_ops_avx512;
    if (flags & KVF_CPU_AVX2) out[n++] = &kvf_vit_ops_avx2;
#endif
    out[n++] = &kvf_vit_ops_ref;
    return n;
}

static double error(const float *x, const float *want, int64_t n)
{
    double worst = 0, top = 1e-30;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)x[i] - (double)want[i]);
        if (!(d <= worst)) worst = d;
        if (fabs((double)want[i]) > top) top = fabs((double)want[i]);
    }
    return worst / top;
}

Test(vit, layernorm_of_every_level_is_the_reference)
{
    const kvf_vit_ops *ops[3];
    const int64_t widths[] = { 1, 3, 8, 15, 16, 17, 31, 64, 72, 100, 1152, 1153, 4304 };
    const float shift[] = { 0, 100, -3e4f };
    for (int l = 0, n = levels(ops); l < n; l++) {
        for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
            for (int s = 0; s < 3; s++) {
                int64_t w = widths[i];
                state = 1 + i;
                float *x = noise(w, 5), *g = noise(w, 1), *b = noise(w, 1), *got = noise(w, 9), *want = noise(w, 9);
                for (int64_t j = 0; j < w; j++) x[j] += shift[s];
                kvf_vit_ops_ref.layernorm(x, g, b, want, w, 1e-6f);
                ops[l]->layernorm(x, g, b, got, w, 1e-6f);
                /* The mean is rounded to f32: at 3e4 that is 2e-3 of an input whose spread is 3. */
                double most = s == 0 ? 2e-6 : s == 1 ? 2e-5 : 5e-3;
                if (w > 1) cr_assert_leq(error(got, want, w), most, "%s, %lld wide, shift %g: %g", ops[l]->name, (long long)w, (double)shift[s], error(got, want, w));
                ops[l]->layernorm(x, g, b, x, w, 1e-6f);
                cr_assert_eq(memcmp(x, got, (size_t)w * sizeof *x), 0, "%s: in place", ops[l]->name);
                free(x), free(g), free(b), free(got), free(want);
            }
        }
    }
}

Test(vit, layernorm_of_a_constant_is_its_bias)
{
    const kvf_vit_ops *ops[3];
    for (int l = 0, n = levels(ops); l < n; l++) {
        float x[37], g[37], b[37];
        for (int i = 0; i < 37; i++) x[i] = 4, g[i] = 2, b[i] = (float)i;
        ops[l]->layernorm(x, g, b, x, 37, 1e-5f);
        for (int i = 0; i < 37; i++) cr_assert_float_eq(x[i], (float)i, 1e-5f);
    }
}

Test(vit, activations_of_every_level_are_the_reference)
{
    const kvf_vit_ops *ops[3];
    const kvf_vit_act acts[] = { KVF_VIT_GELU_TANH, KVF_VIT_GELU_QUICK, KVF_VIT_GELU_ERF, KVF_VIT_SILU };
    enum { N = 20011 };
    for (int l = 0, n = levels(ops); l < n; l++) {
        for (int a = 0; a < 4; a++) {
            float *x = malloc(N * sizeof *x), *want = malloc(N * sizeof *want);
            for (int i = 0; i < N; i++) x[i] = want[i] = (float)(i - N / 2) * 1e-3f;
            x[0] = want[0] = -1e4f;
            x[1] = want[1] = 1e4f;
            x[2] = want[2] = -0.0f;
            ops[l]->act(x, N, acts[a]);
            kvf_vit_ops_ref.act(want, N, acts[a]);
            for (int i = 0; i < N; i++) {
                double most = 4e-7 + 1e-6 * fabs((double)want[i]);
                cr_assert(fabs((double)x[i] - (double)want[i]) <= most, "%s, act %d: %g, not %g", ops[l]->name, a, (double)x[i], (double)want[i]);
            }
            for (int k = 0; k < 40; k++) { /* short arrays; what follows stays */
                float y[64], z[64];
                for (int i = 0; i < 64; i++) y[i] = z[i] = 0.1f * (float)i - 3;
                ops[l]->act(y, k, acts[a]);
                for (int i = k; i < 64; i++) cr_assert_eq(y[i], z[i]);
            }
            free(x), free(want);
        }
    }
}

typedef struct shape {
    int64_t n_frame, n_pos;
    int32_t n_head, head_dim;
    float size; /* of q and k: scores grow with its square */
} shape;

static void run(const kvf_vit_ops *ops, int32_t n_threads, kvf_vit_attn_args a)
{
    kvf_threads *t;
    kvf_error err;
    cr_assert_eq(kvf_threads_open(&t, n_threads, &kvf_mem_default, &err), KVF_OK);
    cr_assert_eq(kvf_vit_attn(ops, t, &kvf_mem_default, &a, &err), KVF_OK, "%s", err.msg);
    kvf_threads_close(t);
}

static void check_attn(const kvf_vit_ops *ops, shape s, double most)
{
    int64_t n = s.n_frame * s.n_pos * s.n_head * s.head_dim, n_mass = s.n_frame * s.n_pos;
    state = 7;
    float *q = noise(n, s.size), *k = noise(n, s.size), *v = noise(n, 2), *want = noise(n, 1), *got = noise(n, 1);
    float *mass = noise(n_mass, 1), *mass_want = noise(n_mass, 1);
    kvf_vit_attn_args a = { q, k, v, want, mass_want, s.n_frame, s.n_pos, s.n_head, s.head_dim, 1 / sqrtf((float)s.head_dim) };
    run(&kvf_vit_ops_ref, 1, a);
    a.o = got;
    a.mass = mass;
    run(ops, 3, a);
    double e = error(got, want, n), em = error(mass, mass_want, n_mass);
    cr_assert(e <= most && em <= most, "%s, %lld x %lld, %d heads of %d, size %g: o %g, mass %g", ops->name, (long long)s.n_frame,
              (long long)s.n_pos, s.n_head, s.head_dim, (double)s.size, e, em);
    for (int64_t f = 0; f < s.n_frame; f++) { /* what is given is received */
        double sum = 0;
        for (int64_t j = 0; j < s.n_pos; j++) sum += (double)mass[f * s.n_pos + j];
        cr_assert_float_eq(sum, (double)(s.n_pos * s.n_head), 1e-5 * (double)(s.n_pos * s.n_head));
    }
    float *plain = noise(n, 1);
    a.o = plain;
    a.mass = NULL;
    run(ops, 1, a);
    cr_assert_eq(memcmp(plain, got, (size_t)n * sizeof *got), 0, "%s: the same bits without mass and on one thread", ops->name);
    free(q), free(k), free(v), free(want), free(got), free(mass), free(mass_want), free(plain);
}

Test(vit, attention_of_every_level_is_the_reference)
{
    const kvf_vit_ops *ops[3];
    const shape shapes[] = {
        { 1, 1, 1, 8, 1 },    { 1, 2, 3, 16, 1 },   { 2, 7, 2, 64, 1 },   { 1, 16, 2, 72, 1 },  { 1, 17, 1, 72, 1 },
        { 1, 47, 1, 80, 1 },  { 1, 48, 1, 80, 1 },  { 1, 49, 2, 80, 1 },  { 3, 50, 1, 24, 1 },  { 1, 97, 1, 128, 1 },
        { 2, 144, 2, 40, 1 }, { 1, 257, 2, 64, 1 }, { 1, 300, 1, 256, 1 }, { 1, 577, 1, 64, 2 }, { 1, 729, 1, 72, 2 },
    };
    for (int l = 0, n = levels(ops); l < n; l++)
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) check_attn(ops[l], shapes[i], 1e-5);
}

Test(vit, attention_with_huge_scores_stays_finite_and_close)
{
    const kvf_vit_ops *ops[3];
    for (int l = 0, n = levels(ops); l < n; l++) {
        check_attn(ops[l], (shape){ 1, 100, 2, 64, 30 }, 1e-3);  /* scores of several thousand */
        check_attn(ops[l], (shape){ 1, 65, 1, 72, 0 }, 1e-5);    /* all equal */
    }
}

Test(vit, attention_to_one_key_copies_its_value)
{
    const kvf_vit_ops *ops[3];
    for (int l = 0, n = levels(ops); l < n; l++) {
        enum { P = 60, D = 16 };
        static float q[P * D], k[P * D], v[P * D], o[P * D], mass[P];
        for (int i = 0; i < P * D; i++) {
            q[i] = 10;
            k[i] = i / D == 41 ? 10 : -10;
            v[i] = (float)i;
        }
        run(ops[l], 2, (kvf_vit_attn_args){ q, k, v, o, mass, 1, P, 1, D, 0.25f });
        for (int i = 0; i < P * D; i++) cr_assert_float_eq(o[i], v[41 * D + i % D], 1e-3f);
        for (int j = 0; j < P; j++) cr_assert_float_eq(mass[j], j == 41 ? P : 0, 1e-4f);
    }
}
