/* rows_tmpl.h - the ops that do not depend on the element type, once for every vector width: rows_avx2.c
 * and rows_avx512.c include their simd_*.h first, then this file. rows_ref.c defines the ops.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_math.h"
#include "merge/rows.h"

/* Up to VF_LANES elements; what is past them reads as 0. */
static inline vf load_some(const float *p, int64_t n) { return n >= VF_LANES ? vf_load(p) : vf_load_n(p, n); }

enum { PREFETCH_BYTES = 8192 };

/* Rows of `a` a pass: with 32 registers sixteen sums fit, with 16 eight; loads stay behind the arithmetic. */
enum { TILE = VF_LANES == 16 ? 4 : 2 };

static void dot(const float *const a[4], const float *const b[4], int64_t n, float out[16])
{
    for (int r = 0; r < 4; r += TILE) {
        vf s[4 * TILE];
        for (int i = 0; i < 4 * TILE; i++) s[i] = vf_zero();
        for (int64_t k = 0; k < n; k += VF_LANES) {
            vf w[4];
            for (int j = 0; j < 4; j++) w[j] = load_some(b[j] + k, n - k);
            for (int i = 0; i < TILE; i++) {
                vf x = load_some(a[r + i] + k, n - k);
                for (int j = 0; j < 4; j++) s[4 * i + j] = vf_fma(x, w[j], s[4 * i + j]);
            }
        }
        for (int i = 0; i < 4 * TILE; i++) out[4 * r + i] = vf_sum(s[i]);
    }
}

/* Differences, not |a|^2 + |b|^2 - 2 a b: tokens of one flat area are nearly equal, and that form cancels. */
static void dist2(const float *const a[4], const float *const b[4], int64_t n, float out[16])
{
    for (int r = 0; r < 4; r += TILE) {
        vf s[4 * TILE];
        for (int i = 0; i < 4 * TILE; i++) s[i] = vf_zero();
        for (int64_t k = 0; k < n; k += VF_LANES) {
            vf w[4];
            for (int j = 0; j < 4; j++) w[j] = load_some(b[j] + k, n - k);
            for (int i = 0; i < TILE; i++) {
                vf x = load_some(a[r + i] + k, n - k);
                for (int j = 0; j < 4; j++) {
                    vf d = vf_sub(x, w[j]);
                    s[4 * i + j] = vf_fma(d, d, s[4 * i + j]);
                }
            }
        }
        for (int i = 0; i < 4 * TILE; i++) out[4 * r + i] = vf_sum(s[i]);
    }
}

static void silu(float *x, int64_t n)
{
    vf one = vf_set1(1.0f);
    for (int64_t i = 0; i < n; i += VF_LANES) {
        vf v = load_some(x + i, n - i);
        v = vf_div(v, vf_add(one, vf_exp(vf_sub(vf_zero(), v))));
        if (n - i >= VF_LANES)
            vf_store(x + i, v);
        else
            vf_store_n(x + i, v, n - i);
    }
}

/* One vector of channels through all tokens: its state stays in the first-level cache. */
static void scan_lanes(const kvf_scan_args *s, int64_t e, int64_t n)
{
    vf d = load_some(s->d + e, n);
    for (int64_t t = 0; t < s->n_tok; t++) {
        const float *b = s->bc + t * s->bc_stride, *c = b + s->n_state;
        vf u = load_some(s->u + t * s->stride + e, n), dt = load_some(s->dt + t * s->stride + e, n);
        vf in = vf_mul(dt, u), y = vf_mul(d, u);
        for (int64_t k = 0; k < s->n_state; k++) {
            int64_t at = k * s->a_stride + e;
            vf h = vf_mul(vf_exp(vf_mul(dt, load_some(s->a + at, n))), load_some(s->h + at, n));
            h = vf_fma(in, vf_set1(b[k]), h);
            y = vf_fma(vf_set1(c[k]), h, y);
            if (n >= VF_LANES)
                vf_store(s->h + at, h);
            else
                vf_store_n(s->h + at, h, n);
        }
        float *to = s->y + t * s->stride + e;
        y = vf_add(y, load_some(to, n));
        if (n >= VF_LANES)
            vf_store(to, y);
        else
            vf_store_n(to, y, n);
    }
}

static void scan(const kvf_scan_args *s)
{
    for (int64_t e = 0; e < s->n_channel; e += VF_LANES) scan_lanes(s, e, s->n_channel - e);
}
