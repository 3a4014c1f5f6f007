/* ctx.c - version and context functions of kvfold.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "api/ctx.h"

#include <string.h>

#include "backend/backend_load.h"
#include "backend/cpu/cpu_backend.h"

#define STR2(x) #x
#define STR(x) STR2(x)

int kvf_version(void) { return KVF_VERSION_NUMBER; }

const char *kvf_version_string(void)
{
    return STR(KVF_VERSION_MAJOR) "." STR(KVF_VERSION_MINOR) "." STR(KVF_VERSION_PATCH);
}

kvf_status kvf_check_size(size_t size, size_t ours, const char *what, kvf_error *err)
{
    if (size > sizeof(size_t) && size <= ours) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG,
                    "%s.size is %zu, this library's is %zu; call the _init function, or link the library the header belongs to",
                    what, size, ours);
}

void kvf_ctx_params_init(kvf_ctx_params *p)
{
    memset(p, 0, sizeof *p);
    p->size = sizeof *p;
}

/* The device asked for. *out stays NULL if it is the CPU. */
static kvf_status open_device(kvf_backend **out, const kvf_ctx *ctx, const kvf_ctx_params *p, kvf_error *err)
{
    *out = NULL;
    if (!p->device || strcmp(p->device, "cpu") == 0) return KVF_OK;
    bool any = strcmp(p->device, "auto") == 0;
    const kvf_backend_module *m = NULL;
    kvf_error why = { 0 };
    kvf_device_params dp = { .f32 = p->precision == KVF_PRECISION_F32, .mem = &ctx->mem, .log = &ctx->log };
    kvf_status rc = kvf_backend_load(&m, any ? "cuda" : p->device, NULL, &why);
    if (rc >= 0) rc = m->open(out, &dp, &why);
    if (rc >= 0) return KVF_OK;
    *out = NULL;
    if (!any) return kvf_fail(err, rc, "%s", why.msg);
    kvf_log_write(&ctx->log, KVF_LOG_INFO, "computing on the CPU: %s", why.msg);
    return KVF_OK;
}

int32_t kvf_devices(const char *kind, char *out, size_t cap)
{
    if (!kind || !out || cap == 0) return 0;
    return kvf_backend_probe(kind, NULL, out, cap);
}

static kvf_status open_parts(kvf_ctx *ctx, const kvf_ctx_params *p, kvf_error *err)
{
    unsigned flags = kvf_cpu_detect();
    KVF_TRY(kvf_cpu_level_parse(&ctx->level, p->cpu, flags, err));
    /* Attention on AMX rounds probabilities to bf16: exact mode runs on the level below. */
    if (p->precision == KVF_PRECISION_F32 && ctx->level == KVF_CPU_LEVEL_AMX) ctx->level = KVF_CPU_LEVEL_AVX512;
    KVF_TRY(kvf_threads_open(&ctx->threads, p->n_threads > 0 ? p->n_threads : kvf_cpu_count(), &ctx->mem, err));
    KVF_TRY(open_device(&ctx->backend, ctx, p, err));
    kvf_cpu_backend_params bp = { .level = ctx->level, .flags = flags, .f32 = p->precision == KVF_PRECISION_F32,
                                  .threads = ctx->threads, .mem = &ctx->mem, .log = &ctx->log };
    KVF_TRY(kvf_cpu_backend_open(ctx->backend ? &ctx->host : &ctx->backend, &bp, err));
    ctx->backend->host = ctx->host;
    ctx->backend->threads = ctx->threads;
    ctx->backend->level = ctx->level;
    return KVF_OK;
}

kvf_status kvf_ctx_open(kvf_ctx **out, const kvf_ctx_params *params, kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    if (params) {
        KVF_TRY(kvf_check_size(params->size, sizeof p, "kvf_ctx_params", err));
        memcpy(&p, params, params->size);
    }
    if (p.n_threads < 0 || p.n_threads > 1024)
        return kvf_fail(err, KVF_ERR_ARG, "n_threads is %d; use 1 to 1024, or 0 for one per core", p.n_threads);
    if (p.precision != KVF_PRECISION_AUTO && p.precision != KVF_PRECISION_F32)
        return kvf_fail(err, KVF_ERR_ARG, "precision is %d; use KVF_PRECISION_AUTO or KVF_PRECISION_F32", (int)p.precision);
    if (!p.alloc != !p.release) return kvf_fail(err, KVF_ERR_ARG, "alloc and release must be given together");
    kvf_mem mem = kvf_mem_default;
    if (p.alloc) mem = (kvf_mem){ p.alloc, p.release, p.user };
    void *block;
    KVF_TRY(kvf_mem_get(&mem, &block, 1, sizeof(kvf_ctx), err));
    kvf_ctx *ctx = block;
    ctx->mem = mem;
    ctx->log = (kvf_log){ p.log, p.user };
    kvf_status rc = open_parts(ctx, &p, err);
    if (rc < 0) {
        kvf_ctx_close(ctx);
        return rc;
    }
    *out = ctx;
    return KVF_OK;
}

void kvf_ctx_close(kvf_ctx *ctx)
{
    if (!ctx) return;
    if (ctx->backend) ctx->backend->ops->close(ctx->backend);
    if (ctx->host) ctx->host->ops->close(ctx->host);
    kvf_threads_close(ctx->threads);
    kvf_mem mem = ctx->mem; /* it lives inside what it frees */
    kvf_free(&mem, ctx);
}

int32_t kvf_ctx_threads(const kvf_ctx *ctx) { return kvf_threads_count(ctx->threads); }

const char *kvf_ctx_cpu(const kvf_ctx *ctx) { return kvf_cpu_level_name(ctx->level); }
