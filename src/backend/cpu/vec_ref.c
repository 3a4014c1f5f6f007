/* vec_ref.c - the element-wise ops and norms, scalar: the definition of each.
 *
 * Sums and transcendental functions are in double, so that a difference at another level is that
 * level's own rounding.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_ops.h"

/* out = x / sqrt(mean(x^2) + eps) * weight; weight may be NULL, out may be x. */
static void rmsnorm(const float *x, const float *weight, float *out, int64_t width, float eps)
{
    double sum = 0.0;
    for (int64_t i = 0; i < width; i++) sum += (double)x[i] * (double)x[i];
    float r = (float)(1.0 / sqrt(sum / (double)width + (double)eps));
    for (int64_t i = 0; i < width; i++) out[i] = x[i] * r * (weight ? weight[i] : 1.0f);
}

static void rope(float *x, int32_t n_head, int32_t head_dim, int32_t n_rot, const float *cos_sin,
                 kvf_rope_kind kind)
{
    int32_t half = n_rot / 2;
    for (int32_t h = 0; h < n_head; h++, x += head_dim) {
        for (int32_t j = 0; j < half; j++) {
            int32_t i0 = kind == KVF_ROPE_NEOX ? j : 2 * j;
            int32_t i1 = kind == KVF_ROPE_NEOX ? j + half : 2 * j + 1;
            float c = cos_sin[j], s = cos_sin[half + j], a = x[i0], b = x[i1];
            x[i0] = a * c - b * s;
            x[i1] = a * s + b * c;
        }
    }
}

static void f32_to_f16(const float *x, kvf_f16 *out, int64_t n)
{
    for (int64_t i = 0; i < n; i++) out[i] = kvf_f16_from_f32(x[i]);
}

static double silu(double x) { return x / (1.0 + exp(-x)); }

static double gelu_tanh(double x)
{
    const double sqrt_2_over_pi = 0.79788456080286535588;
    return 0.5 * x * (1.0 + tanh(sqrt_2_over_pi * (x + 0.044715 * x * x * x)));
}

static void glu(float *gate, const float *up, int64_t n, kvf_act act)
{
    for (int64_t i = 0; i < n; i++) {
        double g = (double)gate[i];
        gate[i] = (float)(act == KVF_ACT_SILU ? silu(g) : gelu_tanh(g)) * up[i];
    }
}

static void add(float *x, const float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

static void scale(float *x, float s, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] *= s;
}

static void lse_merge(float *o, float *lse, const float *o2, const float *lse2, int32_t head_dim)
{
    if (*lse2 == -INFINITY) return;
    if (*lse == -INFINITY) {
        memcpy(o, o2, (size_t)head_dim * sizeof *o);
        *lse = *lse2;
        return;
    }
    double max = fmax((double)*lse, (double)*lse2);
    double w = exp((double)*lse - max), w2 = exp((double)*lse2 - max), sum = w + w2;
    for (int32_t i = 0; i < head_dim; i++) o[i] = (float)(((double)o[i] * w + (double)o2[i] * w2) / sum);
    *lse = (float)(max + log(sum));
}

void kvf_cpu_vec_init_ref(kvf_cpu_ops *ops)
{
    ops->rmsnorm = rmsnorm;
    ops->rope = rope;
    ops->f32_to_f16 = f32_to_f16;
    ops->glu = glu;
    ops->add = add;
    ops->scale = scale;
    ops->lse_merge = lse_merge;
}
