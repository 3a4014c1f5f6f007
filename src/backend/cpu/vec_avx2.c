/* vec_avx2.c - the element-wise ops of vec_tmpl.h for AVX2.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx2.h"

#include "backend/cpu/vec_tmpl.h"

void kvf_cpu_vec_init_avx2(kvf_cpu_ops *ops) { vec_init(ops); }
