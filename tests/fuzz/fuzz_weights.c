/* fuzz_weights.c - any bytes as the file of named weights of a planner (storm:weights=FILE.gguf). The
 * header of .safetensors files is fuzz_arrays'.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvfold/merge.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static kvf_ctx *ctx;
    kvf_error err = { 0 };
    kvf_ctx_params p;
    kvf_mamba *m = NULL;
    char path[64];
    kvf_ctx_params_init(&p);
    p.n_threads = 1;
    if (!ctx && kvf_ctx_open(&ctx, &p, &err) < 0) abort();
    int fd = memfd_create("weights", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    kvf_status rc = kvf_mamba_open_gguf(&m, ctx, path, 1e-5f, &err);
    if (rc < 0 && (m || !err.msg[0])) abort();
    kvf_mamba_close(m);
    close(fd);
    return 0;
}
