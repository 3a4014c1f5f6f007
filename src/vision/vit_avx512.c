/* vit_avx512.c - the tower's kernels of vit_tmpl.h for AVX-512.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx512.h"

#define TILE_M 8 /* with three lane vectors: 24 sums in 32 registers */
#include "vision/vit_tmpl.h"

const kvf_vit_ops kvf_vit_ops_avx512 = { .name = "avx512", .layernorm = layernorm, .act = act_run, .attn_rows = ROWS,
                                      .attn_scratch = attn_scratch, .attn = attn_run };
