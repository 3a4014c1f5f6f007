/* rows_ref.c - the definition of every op of rows.h, in scalar C; double sums, rounded once.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "base/half.h"
#include "merge/rows.h"

static float get(const void *row, kvf_merge_type type, int64_t i)
{
    if (type == KVF_MERGE_F32) return ((const float *)row)[i];
    uint16_t bits = ((const uint16_t *)row)[i];
    return type == KVF_MERGE_F16 ? kvf_f32_from_f16(bits) : kvf_f32_from_bf16(bits);
}

static void pair(const void *prev, const void *cur, kvf_merge_type type, int64_t n, double out[2])
{
    out[0] = out[1] = 0;
    for (int64_t i = 0; i < n; i++) {
        double a = (double)get(prev, type, i), b = (double)get(cur, type, i);
        out[0] += a * b;
        out[1] += b * b;
    }
}

static void widen(float *dst, const void *src, kvf_merge_type type, int64_t n)
{
    for (int64_t i = 0; i < n; i++) dst[i] = get(src, type, i);
}

static void narrow(void *dst, const float *src, kvf_merge_type type, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        if (type == KVF_MERGE_F32)
            ((float *)dst)[i] = src[i];
        else
            ((uint16_t *)dst)[i] = type == KVF_MERGE_F16 ? kvf_f16_from_f32(src[i]) : kvf_bf16_from_f32(src[i]);
    }
}

static void add(float *acc, const void *const *src, const float *w, kvf_merge_type type, int64_t n_src, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        double s = (double)acc[i];
        for (int64_t k = 0; k < n_src; k++) s += (double)w[k] * (double)get(src[k], type, i);
        acc[i] = (float)s;
    }
}

#define OF_TYPE(suffix, type)                                                                              \
    static void pair_##suffix(const void *p, const void *c, int64_t n, double out[2]) { pair(p, c, type, n, out); } \
    static void widen_##suffix(float *dst, const void *src, int64_t n) { widen(dst, src, type, n); }       \
    static void narrow_##suffix(void *dst, const float *src, int64_t n) { narrow(dst, src, type, n); }     \
    static void add_##suffix(float *acc, const void *const *src, const float *w, int64_t n_src, int64_t n) \
    {                                                                                                      \
        add(acc, src, w, type, n_src, n);                                                                  \
    }
OF_TYPE(f32, KVF_MERGE_F32)
OF_TYPE(f16, KVF_MERGE_F16)
OF_TYPE(bf16, KVF_MERGE_BF16)

static void dot(const float *const a[4], const float *const b[4], int64_t n, float out[16])
{
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            double s = 0;
            for (int64_t k = 0; k < n; k++) s += (double)a[i][k] * (double)b[j][k];
            out[4 * i + j] = (float)s;
        }
}

static void dist2(const float *const a[4], const float *const b[4], int64_t n, float out[16])
{
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            double s = 0;
            for (int64_t k = 0; k < n; k++) {
                double d = (double)a[i][k] - (double)b[j][k];
                s += d * d;
            }
            out[4 * i + j] = (float)s;
        }
}

static void silu(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = (float)((double)x[i] / (1 + exp(-(double)x[i])));
}

static void scan(const kvf_scan_args *s)
{
    for (int64_t t = 0; t < s->n_tok; t++) {
        const float *b = s->bc + t * s->bc_stride, *c = b + s->n_state;
        for (int64_t e = 0; e < s->n_channel; e++) {
            double u = (double)s->u[t * s->stride + e], dt = (double)s->dt[t * s->stride + e];
            double sum = (double)s->d[e] * u;
            for (int64_t k = 0; k < s->n_state; k++) {
                float *h = s->h + k * s->a_stride + e;
                *h = (float)(exp(dt * (double)s->a[k * s->a_stride + e]) * (double)*h + dt * (double)b[k] * u);
                sum += (double)c[k] * (double)*h;
            }
            s->y[t * s->stride + e] += (float)sum;
        }
    }
}

void kvf_rows_init_ref(kvf_rows *r)
{
    *r = (kvf_rows){ .name = "ref",
                     .pair = { pair_f32, pair_f16, pair_bf16 },
                     .widen = { widen_f32, widen_f16, widen_bf16 },
                     .narrow = { narrow_f32, narrow_f16, narrow_bf16 },
                     .add = { add_f32, add_f16, add_bf16 },
                     .dot = dot,
                     .dist2 = dist2,
                     .silu = silu,
                     .scan = scan };
}
