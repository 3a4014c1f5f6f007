/* simd_avx512.h - one vector of 16 floats for the *_tmpl.h kernels; simd_avx2.h has the same
 * names for 8. Only for files compiled with the AVX-512 flags.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_SIMD_AVX512_H
#define KVF_BACKEND_CPU_SIMD_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "base/half.h"

#define VF_LANES 16

typedef __m512 vf;    /* floats */
typedef __m512i vi;   /* int32 */
typedef __mmask16 vm; /* one truth value per lane */

static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf vf_set1(float x) { return _mm512_set1_ps(x); }
static inline vf vf_zero(void) { return _mm512_setzero_ps(); }
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }   /* a b + c */
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - a b */
static inline float vf_sum(vf x) { return _mm512_reduce_add_ps(x); }

/* To the nearest integer, ties to even. */
static inline vf vf_round(vf x)
{
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* y 2^n, n an integer in -126..127. */
static inline vf vf_scale2(vf y, vf n) { return _mm512_scalef_ps(y, n); }

/* The first n of a vector, 0 < n <= VF_LANES; the rest reads as 0 and is not touched. */
static inline __mmask16 vf_first(int64_t n) { return (__mmask16)((1u << n) - 1u); }
static inline vf vf_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(vf_first(n), p); }
static inline void vf_store_n(float *p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, vf_first(n), x); }

static inline vf vf_load_f16(const kvf_f16 *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline vf vf_load_f16_n(const kvf_f16 *p, int64_t n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(vf_first(n), p));
}
static inline void vf_store_f16(kvf_f16 *p, vf x)
{
    __m256i h = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)(void *)p, h);
}

static inline vm vf_lt(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline vf vf_select(vm m, vf a, vf b) { return _mm512_mask_blend_ps(m, b, a); } /* m ? a : b */
static inline vf vf_abs(vf x) { return _mm512_abs_ps(x); }

static inline vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
static inline vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
/* lo <= x < hi */
static inline vm vi_within(vi x, vi lo, vi hi)
{
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(lo, x), x, hi);
}

/* p[0] p[1] p[0] p[1] ... */
static inline vf vf_set1_pair(const float *p)
{
    int64_t two;
    memcpy(&two, p, sizeof two);
    return _mm512_castsi512_ps(_mm512_set1_epi64(two));
}

/* Sums of neighbours: of every 4 lanes, a0+a1 a2+a3 b0+b1 b2+b3. */
static inline vf vf_pair_sums(vf a, vf b)
{
    return vf_add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

static inline vf vf_swap_pairs(vf x) { return _mm512_permute_ps(x, 0x4e); } /* 2 3 0 1 */
static inline vf vf_swap_lanes(vf x) { return _mm512_permute_ps(x, 0xb1); } /* 1 0 3 2 */
/* Even lanes a b - c, odd lanes a b + c. */
static inline vf vf_fmaddsub(vf a, vf b, vf c) { return _mm512_fmaddsub_ps(a, b, c); }

/* p[0] p[0] p[1] p[1] ...: reads VF_LANES / 2 floats. */
static inline vf vf_load_twice(const float *p)
{
    const __m512i at = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(at, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}

/* 8 halves to 8 floats: the unit in which values are packed at both levels. */
static inline void vf_widen8(float *out, const kvf_f16 *p)
{
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

#endif
