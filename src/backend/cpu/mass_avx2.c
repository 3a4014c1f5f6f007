/* mass_avx2.c - column sums of mass_tmpl.h for AVX2.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx2.h"

#define TILE_M 4 /* 4 x 3 sums, 3 vectors of rows, 1 broadcast: all 16 registers */

#include "backend/cpu/mass_tmpl.h"

void kvf_cpu_mass_init_avx2(kvf_cpu_ops *ops) { ops->mass = mass; }
