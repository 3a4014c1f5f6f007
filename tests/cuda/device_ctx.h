/* device_ctx.h - a ctx that computes on the device (emulated or real), or on the CPU's reference to compare with.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_CUDA_DEVICE_CTX_H
#define KVF_TESTS_CUDA_DEVICE_CTX_H

#include "tests/cuda/rig.h"

#include "api/ctx.h"

/* The module under test; without a device the test ends as skipped. */
static inline const kvf_backend_module *device_module(void)
{
    const kvf_backend_module *m = rig_module();
    if (m) return m;
    cr_assert(!getenv("KVFOLD_REQUIRE_CUDA"), "%s", err.msg);
    cr_skip_test("%s", err.msg);
    return NULL;
}

/* module NULL: the CPU's reference. mem NULL: malloc. */
static inline kvf_ctx *device_ctx(const kvf_backend_module *module, bool f32, uint64_t bytes, const kvf_mem *mem)
{
    kvf_ctx_params p;
    kvf_ctx *ctx;
    kvf_ctx_params_init(&p);
    p.cpu = "ref";
    p.n_threads = 1;
    p.precision = f32 ? KVF_PRECISION_F32 : KVF_PRECISION_AUTO;
    if (mem) {
        p.alloc = mem->alloc;
        p.release = mem->release;
        p.user = mem->user;
    }
    OK(kvf_ctx_open(&ctx, &p, &err));
    if (!module) return ctx;
    ctx->host = ctx->backend;
    kvf_device_params dp = { .memory_bytes = bytes, .f32 = f32, .mem = &ctx->mem, .log = &ctx->log };
    OK(module->open(&ctx->backend, &dp, &err));
    ctx->backend->host = ctx->host;
    ctx->backend->threads = ctx->threads;
    ctx->backend->level = ctx->level;
    return ctx;
}

#endif
