/* ctx.h - what a kvf_ctx holds. Only src/api includes it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_API_CTX_H
#define KVF_API_CTX_H

#include "backend/backend.h"
#include "base/cpu.h"

struct kvf_ctx {
    kvf_mem mem;
    kvf_log log;
    kvf_threads *threads;
    kvf_backend *backend;
    kvf_backend *host; /* the CPU's beside a device; NULL where that is `backend` */
    kvf_cpu_level level;
};

/* A size field the caller set. Smaller than ours: an older header, whose fields come first in ours.
 * Larger: a newer header than this library, ARG. Then copy `size` bytes, not sizeof. */
kvf_status kvf_check_size(size_t size, size_t ours, const char *what, kvf_error *err);

#endif
