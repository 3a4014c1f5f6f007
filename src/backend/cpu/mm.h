/* mm.h - the matrix-product kernels and how one is chosen.
 *
 * Weights stay in the file's quantised form; a kernel unpacks the few rows it works on into its
 * scratch (they fit L2) and multiplies them with all tokens of the chunk. With 1-8 tokens the
 * product is bound by reading the weights, and `mv` kernels work straight on the blocks.
 *
 * Arithmetic of each x_form, the definition that tests hold every level to:
 *   F32   weights dequantised to f32, fp32 products and sums
 *   Q8    x quantised per 32 elements of a row: d = max|x| / 127 (f32), q = round(x / d) to nearest
 *         even, integer dot products per block of the weight's own scale, then fp32. A weight block
 *         is w = s * u - m with integer u. Equal at every level up to the order of fp32 sums.
 *   BF16  x and dequantised w rounded to bf16, fp32 sums (BF16_TILES: in the order of AMX tiles)
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_MM_H
#define KVF_BACKEND_CPU_MM_H

#include "backend/cpu/cpu_ops.h"

/* Forms of packed activations: the same number means the same bytes. */
enum { KVF_X_F32 = 0, KVF_X_Q8 = 1, KVF_X_BF16 = 2, KVF_X_BF16_TILES = 3 };

/* Packed Q8 activations. Token t: q at x + t * q8_row_bytes, [n_in] int8, then [n_in / 32] f32
 * scales d, then [n_in / 32] int32 sums of q; each array starts 64-byte aligned. n_in is padded
 * with zeros to whole blocks of 32. */
typedef struct kvf_q8_row {
    const int8_t *q;
    const float *d;
    const int32_t *sum;
} kvf_q8_row;
size_t kvf_q8_row_bytes(int64_t n_in);
kvf_q8_row kvf_q8_row_at(const void *packed, int64_t t, int64_t n_in);

/* Up to this many tokens the mv (decode) kernels run; above, the mm (prefill) kernels. */
#define KVF_MV_MAX_TOK 8

/* mm_*: prefill; mv_*: decode. Levels: ref runs everywhere. */
extern const kvf_mm_kernel kvf_mm_ref_f32, kvf_mm_ref_q8, kvf_mm_ref_bf16; /* definitions */
extern const kvf_mm_kernel kvf_mm_avx2_f32, kvf_mm_avx512_f32;  /* exact mode; F32, F16, BF16 weights */
extern const kvf_mm_kernel kvf_mm_avx2_q8, kvf_mm_avx512_q8;    /* int8, block scales */
extern const kvf_mm_kernel kvf_mm_amx_bf16;
extern const kvf_mm_kernel kvf_mv_avx2_q8, kvf_mv_avx512_q8;    /* decode on the quantised blocks */
extern const kvf_mm_kernel kvf_mv_avx2_f32, kvf_mv_avx512_f32;  /* decode, exact mode and float weights */

void kvf_dequant_ref(kvf_dtype type, const void *src, float *dst, int64_t n);
void kvf_dequant_avx2(kvf_dtype type, const void *src, float *dst, int64_t n);
void kvf_dequant_avx512(kvf_dtype type, const void *src, float *dst, int64_t n);

#endif
