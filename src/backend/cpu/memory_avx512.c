/* memory_avx512.c - memory_tmpl.h with vectors of 16.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx512.h"

#include "backend/cpu/memory_tmpl.h"

void kvf_cpu_memory_init_avx512(kvf_cpu_ops *ops) { memory_init(ops, "avx512_vnni"); }
