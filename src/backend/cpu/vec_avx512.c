/* vec_avx512.c - the element-wise ops of vec_tmpl.h for AVX-512.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx512.h"

#include "backend/cpu/vec_tmpl.h"

void kvf_cpu_vec_init_avx512(kvf_cpu_ops *ops) { vec_init(ops); }
