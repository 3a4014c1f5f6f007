/* mm_f32_avx2.c - f32 products with AVX2 and FMA, see mm_f32_tmpl.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>

#include "backend/cpu/mm.h"

#define KVF_TILE static inline __attribute__((always_inline))
#define VN 8
#define TILE_TOK 2 /* 8 sums, 4 weights, 1 activation of 16 registers; 8 sums hide the FMA's 4 cycles */

typedef __m256 vec;

KVF_TILE vec vec_zero(void) { return _mm256_setzero_ps(); }
KVF_TILE vec vec_load(const float *p) { return _mm256_loadu_ps(p); }
KVF_TILE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }

KVF_TILE vec vec_load_n(const float *p, int n)
{
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}

KVF_TILE float vec_sum(vec v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

KVF_TILE void unpack(kvf_dtype type, const void *src, float *dst, int64_t n)
{
    kvf_dequant_avx2(type, src, dst, n);
}

#include "backend/cpu/mm_f32_tmpl.h"

const kvf_mm_kernel kvf_mm_avx2_f32 = { .name = "avx2_f32",
                                        .x_form = KVF_X_F32,
                                        .row_align = TILE_ROW,
                                        .x_bytes = kvf_f32_x_bytes,
                                        .pack_align = 1,
                                        .pack = kvf_f32_pack,
                                        .scratch_bytes = prefill_scratch,
                                        .run = run_prefill };

const kvf_mm_kernel kvf_mv_avx2_f32 = { .name = "avx2_f32_mv",
                                        .x_form = KVF_X_F32,
                                        .row_align = TILE_ROW,
                                        .x_bytes = kvf_f32_x_bytes,
                                        .pack_align = 1,
                                        .pack = kvf_f32_pack,
                                        .scratch_bytes = decode_scratch,
                                        .run = run_decode };
