/* attn_avx2.c - attention of attn_tmpl.h and attn_decode_tmpl.h for AVX2.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx2.h"

#define TILE_M 4       /* 4 x 3 sums, 3 vectors of b, 1 broadcast: all 16 registers */
#define KEYS 8         /* sums of keys_dot: the 8 that fma latency needs */
#define PV_PAIR_ROWS 6 /* rows up to which two vectors of sums per row fit */

#include "backend/cpu/attn_tmpl.h"

#include "backend/cpu/attn_decode_tmpl.h"

void kvf_cpu_attn_init_avx2(kvf_cpu_ops *ops) { attn_init(ops, "avx2"); }
