/* vec_tmpl.h - the element-wise ops, once for every vector width: vec_avx2.c and vec_avx512.c
 * include their simd_*.h first, then this file. vec_ref.c defines the ops.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "backend/cpu/cpu_ops.h"
#include "backend/cpu/simd_math.h"

static void rmsnorm(const float *x, const float *weight, float *out, int64_t width, float eps)
{
    vf s0 = vf_zero(), s1 = s0, s2 = s0, s3 = s0; /* four sums hide the latency of an fma */
    int64_t i = 0;
    for (; i + 4 * VF_LANES <= width; i += 4 * VF_LANES) {
        vf a = vf_load(x + i), b = vf_load(x + i + VF_LANES);
        vf c = vf_load(x + i + 2 * VF_LANES), d = vf_load(x + i + 3 * VF_LANES);
        s0 = vf_fma(a, a, s0);
        s1 = vf_fma(b, b, s1);
        s2 = vf_fma(c, c, s2);
        s3 = vf_fma(d, d, s3);
    }
    for (; i < width; i += VF_LANES) {
        vf a = width - i >= VF_LANES ? vf_load(x + i) : vf_load_n(x + i, width - i);
        s0 = vf_fma(a, a, s0);
    }
    float sum = vf_sum(vf_add(vf_add(s0, s1), vf_add(s2, s3)));
    vf r = vf_set1(1.0f / sqrtf(sum / (float)width + eps));
    for (i = 0; i + VF_LANES <= width; i += VF_LANES) {
        vf y = vf_mul(vf_load(x + i), r);
        vf_store(out + i, weight ? vf_mul(y, vf_load(weight + i)) : y);
    }
    if (i < width) {
        vf y = vf_mul(vf_load_n(x + i, width - i), r);
        if (weight) y = vf_mul(y, vf_load_n(weight + i, width - i));
        vf_store_n(out + i, y, width - i);
    }
}

static void rope_neox(float *x, int64_t half, const float *cos, const float *sin)
{
    int64_t j = 0;
    for (; j + VF_LANES <= half; j += VF_LANES) {
        vf a = vf_load(x + j), b = vf_load(x + half + j), c = vf_load(cos + j), s = vf_load(sin + j);
        vf_store(x + j, vf_fnma(b, s, vf_mul(a, c)));
        vf_store(x + half + j, vf_fma(b, c, vf_mul(a, s)));
    }
    if (j < half) {
        int64_t n = half - j;
        vf a = vf_load_n(x + j, n), b = vf_load_n(x + half + j, n);
        vf c = vf_load_n(cos + j, n), s = vf_load_n(sin + j, n);
        vf_store_n(x + j, vf_fnma(b, s, vf_mul(a, c)), n);
        vf_store_n(x + half + j, vf_fma(b, c, vf_mul(a, s)), n);
    }
}

static void rope_interleaved(float *x, int64_t half, const float *cos, const float *sin)
{
    int64_t j = 0;
    for (; j + VF_LANES / 2 <= half; j += VF_LANES / 2) {
        vf v = vf_load(x + 2 * j);
        vf s = vf_mul(vf_swap_lanes(v), vf_load_twice(sin + j));
        vf_store(x + 2 * j, vf_fmaddsub(v, vf_load_twice(cos + j), s));
    }
    for (; j < half; j++) {
        float a = x[2 * j], b = x[2 * j + 1];
        x[2 * j] = a * cos[j] - b * sin[j];
        x[2 * j + 1] = a * sin[j] + b * cos[j];
    }
}

static void rope(float *x, int32_t n_head, int32_t head_dim, int32_t n_rot, const float *cos_sin,
                 kvf_rope_kind kind)
{
    int64_t half = n_rot / 2;
    for (int32_t h = 0; h < n_head; h++, x += head_dim) {
        if (kind == KVF_ROPE_NEOX)
            rope_neox(x, half, cos_sin, cos_sin + half);
        else
            rope_interleaved(x, half, cos_sin, cos_sin + half);
    }
}

static void f32_to_f16(const float *x, kvf_f16 *out, int64_t n)
{
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store_f16(out + i, vf_load(x + i));
    if (i < n) {
        kvf_f16 tail[VF_LANES];
        vf_store_f16(tail, vf_load_n(x + i, n - i));
        memcpy(out + i, tail, (size_t)(n - i) * sizeof *out);
    }
}

/* x / (1 + e^-x) */
static inline vf silu(vf x)
{
    vf e = vf_exp(vf_sub(vf_zero(), x));
    return vf_div(x, vf_add(vf_set1(1.0f), e));
}

/* x / 2 (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
static inline vf gelu_tanh(vf x)
{
    vf u2 = vf_mul(x, vf_fma(vf_mul(x, x), vf_set1(0.0713548163f), vf_set1(1.59576912f)));
    return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), u2))));
}

static void glu(float *gate, const float *up, int64_t n, kvf_act act)
{
    int64_t i = 0;
    if (act == KVF_ACT_SILU)
        for (; i + VF_LANES <= n; i += VF_LANES)
            vf_store(gate + i, vf_mul(silu(vf_load(gate + i)), vf_load(up + i)));
    else
        for (; i + VF_LANES <= n; i += VF_LANES)
            vf_store(gate + i, vf_mul(gelu_tanh(vf_load(gate + i)), vf_load(up + i)));
    if (i < n) {
        vf g = vf_load_n(gate + i, n - i);
        g = act == KVF_ACT_SILU ? silu(g) : gelu_tanh(g);
        vf_store_n(gate + i, vf_mul(g, vf_load_n(up + i, n - i)), n - i);
    }
}

static void add(float *x, const float *y, int64_t n)
{
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store(x + i, vf_add(vf_load(x + i), vf_load(y + i)));
    for (; i < n; i++) x[i] += y[i];
}

static void scale(float *x, float s, int64_t n)
{
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store(x + i, vf_mul(vf_load(x + i), vf_set1(s)));
    for (; i < n; i++) x[i] *= s;
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
    vf u = vf_set1((float)(w / sum)), u2 = vf_set1((float)(w2 / sum));
    int64_t i = 0, n = head_dim;
    for (; i + VF_LANES <= n; i += VF_LANES)
        vf_store(o + i, vf_fma(vf_load(o + i), u, vf_mul(vf_load(o2 + i), u2)));
    if (i < n) {
        vf y = vf_fma(vf_load_n(o + i, n - i), u, vf_mul(vf_load_n(o2 + i, n - i), u2));
        vf_store_n(o + i, y, n - i);
    }
    *lse = (float)(max + log(sum));
}

static void vec_init(kvf_cpu_ops *ops)
{
    ops->rmsnorm = rmsnorm;
    ops->rope = rope;
    ops->f32_to_f16 = f32_to_f16;
    ops->glu = glu;
    ops->add = add;
    ops->scale = scale;
    ops->lse_merge = lse_merge;
}
