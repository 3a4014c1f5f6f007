/* vit_ref.c - the tower's kernels as they are defined, in double precision; see vit_ops.h.
 *
 * LayerNorm: Ba et al. 2016, arXiv:1607.06450, eq. 3. GELU: Hendrycks and Gimpel, arXiv:1606.08415,
 * section 2. Attention: Vaswani et al., arXiv:1706.03762, section 3.2.1, without a mask.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stddef.h>

#include "vision/vit_ops.h"

static void layernorm(const float *x, const float *weight, const float *bias, float *out, int64_t width, float eps)
{
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < width; i++) mean += (double)x[i];
    mean /= (double)width;
    for (int64_t i = 0; i < width; i++) variance += ((double)x[i] - mean) * ((double)x[i] - mean);
    double r = 1 / sqrt(variance / (double)width + (double)eps);
    for (int64_t i = 0; i < width; i++)
        out[i] = (float)(((double)x[i] - mean) * r * (double)weight[i] + (double)bias[i]);
}

static double act_of(double x, kvf_vit_act act)
{
    switch (act) {
    case KVF_VIT_GELU_TANH: return x / 2 * (1 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
    case KVF_VIT_GELU_QUICK: return x / (1 + exp(-1.702 * x));
    case KVF_VIT_GELU_ERF: return x / 2 * (1 + erf(x * 0.70710678118654752));
    default: return x / (1 + exp(-x));
    }
}

static void act_ref(float *x, int64_t n, kvf_vit_act act)
{
    for (int64_t i = 0; i < n; i++) x[i] = (float)act_of((double)x[i], act);
}

static size_t attn_scratch(const kvf_vit_attn_args *a) { return (size_t)a->n_pos * sizeof(double); }

static double dot(const float *x, const float *y, int32_t n)
{
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (double)x[i] * (double)y[i];
    return sum;
}

static void attn(const kvf_vit_attn_part *p)
{
    const kvf_vit_attn_args *a = p->a;
    int64_t d = a->head_dim, stride = a->n_head * d, at = p->frame * a->n_pos * stride + p->head * d;
    double *s = p->scratch;
    for (int64_t j = 0; p->mass && j < a->n_pos; j++) p->mass[j] = 0;
    for (int64_t i = p->row0; i < p->row1; i++) {
        double max = -INFINITY, sum = 0;
        for (int64_t j = 0; j < a->n_pos; j++) {
            s[j] = (double)a->scale * dot(a->q + at + i * stride, a->k + at + j * stride, a->head_dim);
            if (s[j] > max) max = s[j];
        }
        for (int64_t j = 0; j < a->n_pos; j++) sum += s[j] = exp(s[j] - max);
        for (int64_t j = 0; p->mass && j < a->n_pos; j++) p->mass[j] += (float)(s[j] / sum);
        for (int64_t c = 0; c < d; c++) {
            double o = 0;
            for (int64_t j = 0; j < a->n_pos; j++) o += s[j] * (double)a->v[at + j * stride + c];
            a->o[at + i * stride + c] = (float)(o / sum);
        }
    }
}

const kvf_vit_ops kvf_vit_ops_ref = { .name = "ref", .layernorm = layernorm, .act = act_ref, .attn_rows = 16,
                                      .attn_scratch = attn_scratch, .attn = attn };
