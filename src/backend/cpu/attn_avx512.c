/* attn_avx512.c - attention of attn_tmpl.h and attn_decode_tmpl.h for AVX-512.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx512.h"

#define TILE_M 8       /* 8 x 3 sums, 3 vectors of b, 1 broadcast: 28 of 32 registers */
#define KEYS 16        /* sums of keys_dot: twice the 8 that fma latency needs */
#define PV_PAIR_ROWS 8 /* rows up to which two vectors of sums per row fit */

#include "backend/cpu/attn_tmpl.h"

#include "backend/cpu/attn_decode_tmpl.h"

void kvf_cpu_attn_init_avx512(kvf_cpu_ops *ops) { attn_init(ops, "avx512"); }
