/* cpu_ops.c - assembles the kernel table, see cpu_ops.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/cpu_ops.h"

#include <string.h>

void kvf_cpu_ops_init(kvf_cpu_ops *ops, kvf_cpu_level level, unsigned flags)
{
    memset(ops, 0, sizeof *ops);
    ops->level = level;
    ops->flags = flags;
    kvf_cpu_vec_init_ref(ops);
    kvf_cpu_attn_init_ref(ops);
    kvf_cpu_memory_init_ref(ops);
    kvf_cpu_mm_init(ops);
#if defined(__x86_64__)
    if (level >= KVF_CPU_LEVEL_AVX2) {
        kvf_cpu_vec_init_avx2(ops);
        kvf_cpu_attn_init_avx2(ops);
        kvf_cpu_memory_init_avx2(ops);
        kvf_cpu_mass_init_avx2(ops);
    }
    if (level >= KVF_CPU_LEVEL_AVX512) {
        kvf_cpu_vec_init_avx512(ops);
        kvf_cpu_attn_init_avx512(ops);
        kvf_cpu_memory_init_avx512(ops);
        kvf_cpu_mass_init_avx512(ops);
        kvf_cpu_vote_init_avx512(ops);
        if (flags & KVF_CPU_AVX512_BF16) kvf_cpu_attn_init_avx512_bf16(ops);
    }
    if (level >= KVF_CPU_LEVEL_AMX) kvf_cpu_attn_init_amx(ops);
#endif
}
