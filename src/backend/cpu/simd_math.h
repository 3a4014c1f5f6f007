/* simd_math.h - exp and tanh of a vector; include simd_avx2.h or simd_avx512.h first.
 *
 * The polynomials are minimax fits of 2^f on [-1/2, 1/2] and e^f on [-ln 2 / 2, ln 2 / 2] in
 * relative error (2e-9, so that rounding to f32 decides); 2^0 and e^0 are exactly 1.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_SIMD_MATH_H
#define KVF_BACKEND_CPU_SIMD_MATH_H

/* 2^x for x <= 0; below -80 as at -80. 2^-80 = 8e-25 vanishes in any sum that holds a 1, and
 * stays far from the subnormals, which cost the processor a trap. */
static inline vf vf_exp2_neg(vf x)
{
    x = vf_max(x, vf_set1(-80.0f));
    vf n = vf_round(x), f = vf_sub(x, n);
    vf y = vf_fma(vf_set1(0.000153457999f), f, vf_set1(0.00133999444f));
    y = vf_fma(y, f, vf_set1(0.0096184891f));
    y = vf_fma(y, f, vf_set1(0.0555032874f));
    y = vf_fma(y, f, vf_set1(0.240226469f));
    y = vf_fma(y, f, vf_set1(0.693147206f));
    y = vf_fma(y, f, vf_set1(1.0f));
    return vf_scale2(y, n);
}

/* e^x, x limited to -87..88: 1e-38..2e38, never 0 and never infinite. */
static inline vf vf_exp(vf x)
{
    x = vf_min(vf_max(x, vf_set1(-87.0f)), vf_set1(88.0f));
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
    /* ln 2 in two parts; the high part has few bits, so that n times it is exact */
    vf f = vf_fnma(n, vf_set1(0.693359375f), x);
    f = vf_fnma(n, vf_set1(-2.12194440e-4f), f);
    vf y = vf_fma(vf_set1(0.00138368351f), f, vf_set1(0.00837482405f));
    y = vf_fma(y, f, vf_set1(0.0416682262f));
    y = vf_fma(y, f, vf_set1(0.166664201f));
    y = vf_fma(y, f, vf_set1(0.499999921f));
    y = vf_fma(y, f, vf_set1(1.0f));
    y = vf_fma(y, f, vf_set1(1.0f));
    return vf_scale2(y, n);
}

/* tanh x = 1 - 2 / (1 + e^2x), which cancels near 0: there its series (to 2e-8 at 0.25). */
static inline vf vf_tanh(vf x)
{
    vf one = vf_set1(1.0f), x2 = vf_mul(x, x);
    vf far = vf_sub(one, vf_div(vf_set1(2.0f), vf_add(one, vf_exp(vf_add(x, x)))));
    vf s = vf_fma(vf_set1(0.0218694885f), x2, vf_set1(-0.0539682540f));
    s = vf_fma(s, x2, vf_set1(0.133333333f));
    s = vf_fma(s, x2, vf_set1(-0.333333333f));
    vf near = vf_fma(vf_mul(s, x2), x, x);
    return vf_select(vf_lt(vf_abs(x), vf_set1(0.25f)), near, far);
}

#endif
