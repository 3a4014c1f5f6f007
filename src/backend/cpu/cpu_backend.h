/* cpu_backend.h - the CPU as a backend: picks kernels, packs activations, splits work over threads.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_CPU_BACKEND_H
#define KVF_BACKEND_CPU_CPU_BACKEND_H

#include "backend/backend.h"
#include "base/cpu.h"

typedef struct kvf_cpu_backend_params {
    kvf_cpu_level level;
    unsigned flags;       /* kvf_cpu_detect() */
    bool f32;             /* exact mode: KVF_PRECISION_F32 */
    kvf_threads *threads; /* borrowed */
    const kvf_mem *mem;   /* borrowed */
    const kvf_log *log;   /* borrowed */
} kvf_cpu_backend_params;

kvf_status kvf_cpu_backend_open(kvf_backend **out, const kvf_cpu_backend_params *p, kvf_error *err);

#endif
