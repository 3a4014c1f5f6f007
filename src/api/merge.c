/* merge.c - the functions of merge.h that take a context; the others are in src/merge.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "api/ctx.h"
#include "merge/mamba.h"
#include "merge/method.h"
#include "merge/inner.h"
#include "vision/mamba_gguf.h"

/* What a ctx lends to src/merge. */
static kvf_status lend(kvf_merge_env *env, kvf_ctx *ctx, kvf_error *err)
{
    if (!ctx) return kvf_fail(err, KVF_ERR_ARG, "ctx is NULL; open one with kvf_ctx_open");
    *env = (kvf_merge_env){ .mem = &ctx->mem, .threads = ctx->threads };
    kvf_rows_init(&env->rows, ctx->level);
    return KVF_OK;
}

kvf_status kvf_merge_open(kvf_merge **out, kvf_ctx *ctx, const char *spec, kvf_error *err)
{
    kvf_merge_env env;
    if (out) *out = NULL;
    KVF_TRY(lend(&env, ctx, err));
    return kvf_merge_open_env(out, &env, spec, err);
}

kvf_status kvf_merge_inner_run(kvf_ctx *ctx, kvf_merge_inner *a, kvf_error *err)
{
    kvf_merge_env env;
    KVF_TRY(lend(&env, ctx, err));
    return kvf_merge_inner_env(&env, a, err);
}

kvf_status kvf_merge_pool_run(kvf_ctx *ctx, kvf_merge_pool *a, kvf_error *err)
{
    kvf_merge_env env;
    KVF_TRY(lend(&env, ctx, err));
    return kvf_merge_pool_env(&env, a, err);
}

kvf_status kvf_mamba_open(kvf_mamba **out, kvf_ctx *ctx, const kvf_mamba_params *p, kvf_error *err)
{
    kvf_merge_env env;
    if (out) *out = NULL;
    KVF_TRY(lend(&env, ctx, err));
    return kvf_mamba_open_env(out, &env, p, err);
}

kvf_status kvf_mamba_open_tensors(kvf_mamba **out, kvf_ctx *ctx, const kvf_mamba_tensor *t, int64_t n,
                                  float norm_eps, kvf_error *err)
{
    kvf_merge_env env;
    if (out) *out = NULL;
    KVF_TRY(lend(&env, ctx, err));
    return kvf_mamba_open_named(out, &env, t, n, norm_eps, err);
}

kvf_status kvf_mamba_open_gguf(kvf_mamba **out, kvf_ctx *ctx, const char *path, float norm_eps, kvf_error *err)
{
    kvf_mamba_file f;
    if (!out || !ctx || !path) return kvf_fail(err, KVF_ERR_ARG, "out, ctx or path is NULL");
    *out = NULL;
    kvf_status rc = kvf_mamba_file_read(&f, &ctx->mem, path, err);
    if (rc >= 0) rc = kvf_mamba_open_tensors(out, ctx, f.t, f.n, norm_eps, err);
    kvf_mamba_file_free(&f, &ctx->mem);
    return rc;
}
