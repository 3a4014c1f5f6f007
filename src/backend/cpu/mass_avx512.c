/* mass_avx512.c - column sums of mass_tmpl.h for AVX-512.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx512.h"

#define TILE_M 8 /* 8 x 3 sums, 3 vectors of rows, 1 broadcast: 28 of 32 registers */

#include "backend/cpu/mass_tmpl.h"

void kvf_cpu_mass_init_avx512(kvf_cpu_ops *ops) { ops->mass = mass; }
