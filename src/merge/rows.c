/* rows.c - picks the kernels, see rows.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/rows.h"

void kvf_rows_init(kvf_rows *r, kvf_cpu_level level)
{
    kvf_rows_init_ref(r);
#if defined(__x86_64__)
    if (level >= KVF_CPU_LEVEL_AVX2) kvf_rows_init_avx2(r);
    if (level >= KVF_CPU_LEVEL_AVX512) kvf_rows_init_avx512(r);
#else
    (void)level;
#endif
}
