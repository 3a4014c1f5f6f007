/* vision.c - functions of vision.h: check arguments, call the tower.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "api/ctx.h"
#include "vision/tower.h"

void kvf_vision_params_init(kvf_vision_params *p)
{
    memset(p, 0, sizeof *p);
    p->size = sizeof *p;
}

static kvf_status check_params(const kvf_vision_params *p, kvf_error *err)
{
    if (p->feature_layer < 0) return kvf_fail(err, KVF_ERR_ARG, "feature_layer is %d; use 1 to n_layer, or 0 for the file's", p->feature_layer);
    if (p->projector_gelu != KVF_VISION_GELU_ERF && p->projector_gelu != KVF_VISION_GELU_TANH)
        return kvf_fail(err, KVF_ERR_ARG, "projector_gelu is %d; use a kvf_vision_gelu", p->projector_gelu);
    if (p->activation < KVF_VISION_ACT_FILE || p->activation > KVF_VISION_ACT_SILU)
        return kvf_fail(err, KVF_ERR_ARG, "activation is %d; use a kvf_vision_activation", p->activation);
    if (p->batch < 0 || p->batch > 1024) return kvf_fail(err, KVF_ERR_ARG, "batch is %d; use 1 to 1024 frames, or 0 for the library's choice", p->batch);
    return KVF_OK;
}

kvf_status kvf_vision_open(kvf_vision **out, kvf_ctx *ctx, const char *path, const kvf_vision_params *params, kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!ctx || !path) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", ctx ? "path" : "ctx");
    kvf_vision_params p;
    kvf_vision_params_init(&p);
    if (params) {
        KVF_TRY(kvf_check_size(params->size, sizeof p, "kvf_vision_params", err));
        memcpy(&p, params, params->size);
    }
    KVF_TRY(check_params(&p, err));
    kvf_vision_env env = { .backend = ctx->backend, .threads = ctx->threads, .mem = &ctx->mem, .level = ctx->level };
    return kvf_vision_load(out, &env, path, &p, err);
}

void kvf_vision_close(kvf_vision *v) { kvf_vision_unload(v); }

kvf_status kvf_vision_get_info(const kvf_vision *v, kvf_vision_info *info, kvf_error *err)
{
    static const char *const acts[] = { [KVF_VIT_GELU_TANH] = "gelu_tanh", [KVF_VIT_GELU_QUICK] = "gelu_quick",
                                        [KVF_VIT_GELU_ERF] = "gelu_erf", [KVF_VIT_SILU] = "silu" };
    if (!v || !info) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", v ? "info" : "model");
    KVF_TRY(kvf_check_size(info->size, sizeof *info, "kvf_vision_info", err));
    const kvf_vision_hparams *hp = &v->hp;
    kvf_vision_info all = {
        .size = info->size, .name = v->name, .family = hp->has_class ? "clip" : "siglip",
        .projector = v->mm2.data ? "mlp" : "linear", .activation = acts[hp->act],
        .quantization = kvf_dtype_get((uint32_t)v->main_type)->name, .n_params = v->n_params,
        .file_bytes = (int64_t)kvf_gguf_file_bytes(v->gguf), .image_size = hp->image_size, .patch_size = hp->patch_size,
        .grid = hp->grid, .n_patch = hp->n_patch, .width = hp->width, .n_ff = hp->n_ff, .n_head = hp->n_head,
        .head_dim = hp->head_dim, .n_layer = hp->n_layer, .feature_layer = hp->feature_layer, .n_out = hp->n_out,
        .has_class_token = hp->has_class, .has_newline = v->newline != NULL,
        .resize = hp->has_class ? KVF_VISION_RESIZE_CROP : KVF_VISION_RESIZE_STRETCH, .n_pinpoint = v->n_pinpoint,
        .pinpoints = v->pinpoints, .work_bytes = kvf_vision_work_bytes(v, hp->batch),
        .fingerprint = { v->fingerprint[0], v->fingerprint[1] },
    };
    memcpy(all.mean, hp->mean, sizeof all.mean);
    memcpy(all.std, hp->std, sizeof all.std);
    memcpy(info, &all, info->size);
    return KVF_OK;
}

const float *kvf_vision_newline(const kvf_vision *v) { return v ? v->newline : NULL; }

static kvf_status check_frame(const kvf_vision_frame *f, int64_t i, kvf_error *err)
{
    if (!f->rgb) return kvf_fail(err, KVF_ERR_ARG, "frame %lld: rgb is NULL", (long long)i);
    if (f->width < 1 || f->height < 1 || f->width > 65536 || f->height > 65536)
        return kvf_fail(err, KVF_ERR_ARG, "frame %lld is %d x %d pixels; use 1 to 65536 a side", (long long)i, f->width, f->height);
    if (f->stride && f->stride < 3 * (int64_t)f->width)
        return kvf_fail(err, KVF_ERR_ARG, "frame %lld: a row of %d pixels takes %lld bytes, stride is %lld", (long long)i, f->width,
                        3 * (long long)f->width, (long long)f->stride);
    return KVF_OK;
}

kvf_status kvf_vision_prepare(kvf_vision *v, const kvf_vision_frame *frames, int64_t n, int32_t mode, float *pixels, kvf_error *err)
{
    if (!v || !frames || !pixels) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", !v ? "model" : frames ? "pixels" : "frames");
    if (n < 1) return kvf_fail(err, KVF_ERR_ARG, "n is %lld frames; give at least one", (long long)n);
    if (mode < KVF_VISION_RESIZE_MODEL || mode > KVF_VISION_RESIZE_PAD)
        return kvf_fail(err, KVF_ERR_ARG, "resize mode is %d; use a kvf_vision_resize", mode);
    for (int64_t i = 0; i < n; i++) KVF_TRY(check_frame(&frames[i], i, err));
    return kvf_vision_resize_frames(v, frames, n, mode, pixels, err);
}

int64_t kvf_vision_tokens(const kvf_vision *v, int32_t pool, int32_t *side)
{
    int32_t n = v ? kvf_vision_pool_side(pool, v->hp.grid) : 0;
    if (side) *side = n;
    return (int64_t)n * n;
}

void kvf_vision_batch_init(kvf_vision_batch *b)
{
    memset(b, 0, sizeof *b);
    b->size = sizeof *b;
}

kvf_status kvf_vision_encode(kvf_vision *v, const kvf_vision_batch *batch, kvf_error *err)
{
    if (!v || !batch) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", v ? "batch" : "model");
    kvf_vision_batch b;
    kvf_vision_batch_init(&b);
    KVF_TRY(kvf_check_size(batch->size, sizeof b, "kvf_vision_batch", err));
    memcpy(&b, batch, batch->size);
    if (!b.pixels) return kvf_fail(err, KVF_ERR_ARG, "pixels is NULL");
    if (b.n < 1 || b.n > INT32_MAX) return kvf_fail(err, KVF_ERR_ARG, "n is %lld frames; use 1 to %d", (long long)b.n, INT32_MAX);
    if (!b.embd && !b.scores && !b.patch_scores && !b.features)
        return kvf_fail(err, KVF_ERR_ARG, "no output is asked for; set embd, scores, patch_scores or features");
    if (kvf_vision_tokens(v, b.pool, NULL) < 1)
        return kvf_fail(err, KVF_ERR_ARG, "pool is %d; use a kvf_vision_pool that leaves tokens of a grid of %d", b.pool, v->hp.grid);
    return kvf_vision_run(v, &b, err);
}

void kvf_vision_cancel(kvf_vision *v)
{
    if (v) atomic_store(&v->cancel, 1);
}

kvf_status kvf_vision_get_stats(kvf_vision *v, kvf_vision_stats *stats, kvf_error *err)
{
    if (!v || !stats) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", v ? "stats" : "model");
    KVF_TRY(kvf_check_size(stats->size, sizeof *stats, "kvf_vision_stats", err));
    kvf_vision_stats all;
    pthread_mutex_lock(&v->lock);
    all = v->stats;
    pthread_mutex_unlock(&v->lock);
    all.size = stats->size;
    v->env.backend->ops->kernels(v->env.backend, all.kernels, sizeof all.kernels);
    size_t at = strlen(all.kernels);
    snprintf(all.kernels + at, sizeof all.kernels - at, "%svit=%s", at ? " " : "", v->on_device ? v->env.backend->ops->name : v->ops->name);
    memcpy(stats, &all, stats->size);
    return KVF_OK;
}
