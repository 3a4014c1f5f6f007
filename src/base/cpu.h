/* cpu.h - what the processor (and the system: register state must be enabled) can run.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_CPU_H
#define KVF_BASE_CPU_H

#include "base/error.h"

typedef enum kvf_cpu_flags {
    KVF_CPU_AVX2 = 1 << 0,        /* AVX2, FMA, F16C, BMI2 */
    KVF_CPU_AVX512 = 1 << 1,      /* F, BW, CD, DQ, VL */
    KVF_CPU_AVX512_VNNI = 1 << 2,
    KVF_CPU_AVX512_BF16 = 1 << 3,
    KVF_CPU_AVX512_VBMI = 1 << 4,
    KVF_CPU_AMX = 1 << 5          /* AMX-TILE, AMX-INT8, AMX-BF16, and the system granted it */
} kvf_cpu_flags;

/* Levels, each including those before it. AVX512 needs VNNI; AMX needs AVX512 with BF16. */
typedef enum kvf_cpu_level {
    KVF_CPU_LEVEL_REF = 0,
    KVF_CPU_LEVEL_AVX2 = 1,
    KVF_CPU_LEVEL_AVX512 = 2,
    KVF_CPU_LEVEL_AMX = 3
} kvf_cpu_level;

/* kvf_cpu_flags of this machine. The first call may ask the system to grant AMX to the process. */
unsigned kvf_cpu_detect(void);

/* Level for a name ("auto" and NULL: the best); UNSUPPORTED if flags lack it, ARG if unknown. */
kvf_status kvf_cpu_level_parse(kvf_cpu_level *out, const char *name, unsigned flags, kvf_error *err);
const char *kvf_cpu_level_name(kvf_cpu_level level);

/* Cores this process may use (affinity and cgroup quota respected), at least 1. */
int32_t kvf_cpu_count(void);

#endif
