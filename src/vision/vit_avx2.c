/* vit_avx2.c - the tower's kernels of vit_tmpl.h for AVX2.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx2.h"

#define TILE_M 4 /* with three lane vectors: 12 sums in 16 registers */
#include "vision/vit_tmpl.h"

const kvf_vit_ops kvf_vit_ops_avx2 = { .name = "avx2", .layernorm = layernorm, .act = act_run, .attn_rows = ROWS,
                                    .attn_scratch = attn_scratch, .attn = attn_run };
