/* tensor.c - see tensor.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/tensor.h"

#include <inttypes.h>
#include <math.h>

#include "base/half.h"

size_t kvf_merge_type_bytes(kvf_merge_type type)
{
    switch (type) {
    case KVF_MERGE_F32: return 4;
    case KVF_MERGE_F16:
    case KVF_MERGE_BF16: return 2;
    }
    return 0;
}

/* The last byte must have an address: frames * frame_stride elements fit in 62 bits. */
static bool spans_fit(const kvf_merge_view *v, int64_t frame_stride)
{
    int64_t all;
    return !__builtin_mul_overflow(v->n_frame, frame_stride, &all) && all < INT64_MAX / 4;
}

kvf_status kvf_tensor_init(kvf_tensor *x, const kvf_merge_view *v, const char *what, kvf_error *err)
{
    if (!v->data)
        return kvf_fail(err, KVF_ERR_ARG, "%s.data is NULL; give a tensor [n_frame][n_tok][dim]", what);
    int64_t bytes = (int64_t)kvf_merge_type_bytes(v->type), tok_stride = v->tok_stride,
            frame_stride = v->frame_stride;
    if (bytes == 0)
        return kvf_fail(err, KVF_ERR_ARG, "%s.type is %d; use KVF_MERGE_F32, F16 or BF16", what,
                        (int)v->type);
    if ((uintptr_t)v->data % (uintptr_t)bytes)
        return kvf_fail(err, KVF_ERR_ARG, "%s.data is not aligned to its elements of %" PRId64 " bytes", what,
                        bytes);
    if (v->n_frame < 1 || v->n_tok < 1 || v->dim < 1)
        return kvf_fail(err, KVF_ERR_ARG,
                        "%s has the shape [%" PRId64 "][%" PRId64 "][%" PRId64
                        "]; every side must be 1 or more",
                        what, v->n_frame, v->n_tok, v->dim);
    if (v->n_frame > INT32_MAX / v->n_tok)
        return kvf_fail(err, KVF_ERR_LIMIT,
                        "%s has %" PRId64 " frames of %" PRId64
                        " tokens; at most 2^31 - 1 tokens in all: cut the video",
                        what, v->n_frame, v->n_tok);
    if (tok_stride == 0) tok_stride = v->dim;
    int64_t dense = 0;
    bool fits = !__builtin_mul_overflow(v->n_tok, tok_stride, &dense);
    if (frame_stride == 0) frame_stride = dense;
    if (!fits || tok_stride < v->dim || frame_stride < (v->n_tok - 1) * tok_stride + v->dim ||
        !spans_fit(v, frame_stride))
        return kvf_fail(err, KVF_ERR_ARG,
                        "%s: frame_stride %" PRId64 " and tok_stride %" PRId64 " do not fit %" PRId64
                        " tokens of %" PRId64 " elements; leave them 0 for a dense tensor",
                        what, v->frame_stride, v->tok_stride, v->n_tok, v->dim);
    *x = (kvf_tensor){ v->data,           v->type, v->n_frame, v->n_tok, v->dim, frame_stride * bytes,
                       tok_stride * bytes };
    return KVF_OK;
}

kvf_tensor kvf_tensor_of(const void *data, kvf_merge_type type, int64_t n_frame, int64_t n_tok, int64_t dim)
{
    int64_t row = dim * (int64_t)kvf_merge_type_bytes(type);
    return (kvf_tensor){ data, type, n_frame, n_tok, dim, n_tok * row, row };
}

float kvf_tensor_value(const kvf_tensor *x, int64_t frame, int64_t tok, int64_t i)
{
    const void *row = kvf_tensor_row(x, frame, tok);
    if (x->type == KVF_MERGE_F32) return ((const float *)row)[i];
    uint16_t bits = ((const uint16_t *)row)[i];
    return x->type == KVF_MERGE_F16 ? kvf_f32_from_f16(bits) : kvf_f32_from_bf16(bits);
}

kvf_status kvf_tensor_finite(const kvf_tensor *x, int64_t i, const char *what, kvf_error *err)
{
    int64_t frame = i / x->n_tok, tok = i % x->n_tok;
    for (int64_t d = 0; d < x->dim; d++) {
        float v = kvf_tensor_value(x, frame, tok, d);
        if (isfinite(v)) continue;
        return kvf_fail(err, KVF_ERR_ARG,
                        "%s: frame %" PRId64 ", token %" PRId64 ", element %" PRId64
                        " is %s; the values must be finite",
                        what, frame, tok, d, isnan(v) ? "NaN" : "infinite");
    }
    return KVF_OK;
}

kvf_status kvf_scores_finite(const float *scores, int64_t n, int64_t n_tok, kvf_error *err)
{
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(scores[i]))
            return kvf_fail(err, KVF_ERR_ARG,
                            "scores: frame %" PRId64 ", token %" PRId64 " is %s; the values must be finite",
                            i / n_tok, i % n_tok, isnan(scores[i]) ? "NaN" : "infinite");
    return KVF_OK;
}

kvf_status kvf_merge_check_size(size_t size, size_t ours, const char *what, kvf_error *err)
{
    if (size == ours) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG,
                    "%s.size is %zu, this library's is %zu; call the _init function, or link the library the "
                    "header belongs to",
                    what, size, ours);
}

void kvf_merge_run(const kvf_merge_env *env, int64_t n, kvf_task_fn fn, void *arg)
{
    if (env->threads && n > 1) {
        kvf_threads_run(env->threads, n, fn, arg);
        return;
    }
    for (int64_t i = 0; i < n; i++) fn(arg, i, 0);
}
