/* simd_avx2.h - one vector of 8 floats for the *_tmpl.h kernels; simd_avx512.h has the same names
 * for 16. Only for files compiled with the AVX2, FMA and F16C flags.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_SIMD_AVX2_H
#define KVF_BACKEND_CPU_SIMD_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "base/half.h"

#define VF_LANES 8

typedef __m256 vf;  /* floats */
typedef __m256i vi; /* int32 */
typedef __m256 vm;  /* one truth value per lane: all bits or none */

static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf vf_set1(float x) { return _mm256_set1_ps(x); }
static inline vf vf_zero(void) { return _mm256_setzero_ps(); }
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }   /* a b + c */
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); } /* c - a b */

static inline float vf_sum(vf x)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* To the nearest integer, ties to even. */
static inline vf vf_round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* y 2^n, n an integer in -126..127. */
static inline vf vf_scale2(vf y, vf n)
{
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
}

/* The first n of a vector, 0 < n <= VF_LANES; the rest reads as 0 and is not touched. */
static inline __m256i vf_first(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf vf_load_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, vf_first(n)); }
static inline void vf_store_n(float *p, vf x, int64_t n) { _mm256_maskstore_ps(p, vf_first(n), x); }

static inline vf vf_load_f16(const kvf_f16 *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static inline vf vf_load_f16_n(const kvf_f16 *p, int64_t n)
{
    kvf_f16 some[VF_LANES] = { 0 };
    memcpy(some, p, (size_t)n * sizeof *p);
    return vf_load_f16(some);
}
static inline void vf_store_f16(kvf_f16 *p, vf x)
{
    __m128i h = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(void *)p, h);
}

static inline vm vf_lt(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
static inline vf vf_select(vm m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); } /* m ? a : b */
static inline vf vf_abs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

static inline vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
static inline vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
static inline vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
/* lo <= x < hi */
static inline vm vi_within(vi x, vi lo, vi hi)
{
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(lo, x), _mm256_cmpgt_epi32(hi, x)));
}

/* p[0] p[1] p[0] p[1] ... */
static inline vf vf_set1_pair(const float *p)
{
    int64_t two;
    memcpy(&two, p, sizeof two);
    return _mm256_castsi256_ps(_mm256_set1_epi64x(two));
}

/* Sums of neighbours: of every 4 lanes, a0+a1 a2+a3 b0+b1 b2+b3. */
static inline vf vf_pair_sums(vf a, vf b)
{
    return vf_add(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

static inline vf vf_swap_pairs(vf x) { return _mm256_permute_ps(x, 0x4e); } /* 2 3 0 1 */
static inline vf vf_swap_lanes(vf x) { return _mm256_permute_ps(x, 0xb1); } /* 1 0 3 2 */
/* Even lanes a b - c, odd lanes a b + c. */
static inline vf vf_fmaddsub(vf a, vf b, vf c) { return _mm256_fmaddsub_ps(a, b, c); }

/* p[0] p[0] p[1] p[1] ...: reads VF_LANES / 2 floats. */
static inline vf vf_load_twice(const float *p)
{
    const __m256i at = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), at);
}

/* 8 halves to 8 floats: the unit in which values are packed at both levels. */
static inline void vf_widen8(float *out, const kvf_f16 *p)
{
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

#endif
