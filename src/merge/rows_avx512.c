/* rows_avx512.c - the ops of rows.h with AVX-512; f16 and bf16 are widened in registers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx512.h"
#include "merge/rows_tmpl.h"

static inline void store_f16_n(kvf_f16 *p, vf x, int64_t n)
{
    __m256i h = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(p, vf_first(n), h);
}

static inline vf bf16_lanes(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline vf load_bf16(const kvf_bf16 *p)
{
    return bf16_lanes(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline vf load_bf16_n(const kvf_bf16 *p, int64_t n)
{
    return bf16_lanes(_mm256_maskz_loadu_epi16(vf_first(n), p));
}

/* To nearest, ties to even; a NaN keeps its upper bits and gets the quiet one. */
static inline __m256i round_bf16(vf x)
{
    __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __m512i nan = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan));
}
static inline void store_bf16(kvf_bf16 *p, vf x) { _mm256_storeu_si256((__m256i *)(void *)p, round_bf16(x)); }
static inline void store_bf16_n(kvf_bf16 *p, vf x, int64_t n)
{
    _mm256_mask_storeu_epi16(p, vf_first(n), round_bf16(x));
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

void kvf_rows_init_avx512(kvf_rows *r)
{
    *r = (kvf_rows){ .name = "avx512",
                     .pair = { pair_f32, pair_f16, pair_bf16 },
                     .widen = { widen_f32, widen_f16, widen_bf16 },
                     .narrow = { narrow_f32, narrow_f16, narrow_bf16 },
                     .add = { add_f32, add_f16, add_bf16 },
                     .dot = dot,
                     .dist2 = dist2,
                     .silu = silu,
                     .scan = scan };
}
