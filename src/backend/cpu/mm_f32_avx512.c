/* mm_f32_avx512.c - f32 products with AVX-512, see mm_f32_tmpl.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <immintrin.h>

#include "backend/cpu/mm.h"

#define KVF_TILE static inline __attribute__((always_inline))
#define VN 16
#define TILE_TOK 6 /* 24 sums, 4 weights, 1 activation of 32 registers */

typedef __m512 vec;

KVF_TILE vec vec_zero(void) { return _mm512_setzero_ps(); }
KVF_TILE vec vec_load(const float *p) { return _mm512_loadu_ps(p); }
KVF_TILE vec vec_load_n(const float *p, int n)
{
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
}
KVF_TILE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
KVF_TILE float vec_sum(vec v) { return _mm512_reduce_add_ps(v); }
KVF_TILE void unpack(kvf_dtype type, const void *src, float *dst, int64_t n)
{
    kvf_dequant_avx512(type, src, dst, n);
}

#include "backend/cpu/mm_f32_tmpl.h"

const kvf_mm_kernel kvf_mm_avx512_f32 = { .name = "avx512_f32",
                                          .x_form = KVF_X_F32,
                                          .row_align = TILE_ROW,
                                          .x_bytes = kvf_f32_x_bytes,
                                          .pack_align = 1,
                                          .pack = kvf_f32_pack,
                                          .scratch_bytes = prefill_scratch,
                                          .run = run_prefill };

const kvf_mm_kernel kvf_mv_avx512_f32 = { .name = "avx512_f32_mv",
                                          .x_form = KVF_X_F32,
                                          .row_align = TILE_ROW,
                                          .x_bytes = kvf_f32_x_bytes,
                                          .pack_align = 1,
                                          .pack = kvf_f32_pack,
                                          .scratch_bytes = decode_scratch,
                                          .run = run_decode };
