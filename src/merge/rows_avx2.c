/* rows_avx2.c - the ops of rows.h with AVX2, FMA and F16C; f16 and bf16 are widened in registers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx2.h"
#include "merge/rows_tmpl.h"

static inline void store_f16_n(kvf_f16 *p, vf x, int64_t n)
{
    kvf_f16 some[VF_LANES];
    vf_store_f16(some, x);
    memcpy(p, some, (size_t)n * sizeof *p);
}

static inline vf load_bf16(const kvf_bf16 *p)
{
    __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
}

static inline vf load_bf16_n(const kvf_bf16 *p, int64_t n)
{
    kvf_bf16 some[VF_LANES] = { 0 };
    memcpy(some, p, (size_t)n * sizeof *p);
    return load_bf16(some);
}

/* To nearest, ties to even; a NaN keeps its upper bits and gets the quiet one. */
static inline void store_bf16(kvf_bf16 *p, vf x)
{
    __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    r = _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    _mm_storeu_si128((__m128i *)(void *)p, h);
}

static inline void store_bf16_n(kvf_bf16 *p, vf x, int64_t n)
{
    kvf_bf16 some[VF_LANES];
    store_bf16(some, x);
    memcpy(p, some, (size_t)n * sizeof *p);
}

#define TYPE float
#define NAME(x) x##_f32
#define LOAD vf_load
#define LOAD_N vf_load_n
#define STORE vf_store
#define STORE_N vf_store_n
#include "merge/rows_typed_tmpl.h"

#define TYPE kvf_f16
#define NAME(x) x##_f16
#define LOAD vf_load_f16
#define LOAD_N vf_load_f16_n
#define STORE vf_store_f16
#define STORE_N store_f16_n
#include "merge/rows_typed_tmpl.h"

#define TYPE kvf_bf16
#define NAME(x) x##_bf16
#define LOAD load_bf16
#define LOAD_N load_bf16_n
#define STORE store_bf16
#define STORE_N store_bf16_n
#include "merge/rows_typed_tmpl.h"

void kvf_rows_init_avx2(kvf_rows *r)
{
    *r = (kvf_rows){ .name = "avx2",
                     .pair = { pair_f32, pair_f16, pair_bf16 },
                     .widen = { widen_f32, widen_f16, widen_bf16 },
                     .narrow = { narrow_f32, narrow_f16, narrow_bf16 },
                     .add = { add_f32, add_f16, add_bf16 },
                     .dot = dot,
                     .dist2 = dist2,
                     .silu = silu,
                     .scan = scan };
}
