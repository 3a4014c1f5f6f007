/* cuda_device.cu - the second table: selection on the device and features of video frames.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda_int.h"

static kvf_cuda_backend *self(kvf_backend *b) { return kvf_cuda_self(b); }

static kvf_status refuse(kvf_error *err, const char *op) { return kvf_fail(err, KVF_ERR_ARG, "%s: a count is out of range", op); }

static kvf_status op_topk(kvf_backend *b, const float *x, int32_t n, int32_t k, int32_t *ids, int32_t *count, kvf_error *err)
{
    if (n < 0 || k < 0) return refuse(err, "topk");
    kvf_cuda_topk(x, n, k, ids, count, self(b)->stream);
    return kvf_cuda_check(self(b), "the k largest", err);
}

static kvf_status op_keep(kvf_backend *b, const float *x, int32_t n, float cut, int32_t sink, int32_t recent, int32_t *ids,
                          int32_t *count, kvf_error *err)
{
    if (n < 0 || sink < 0 || recent < 0) return refuse(err, "keep");
    kvf_cuda_keep(x, n, cut, sink, recent, ids, count, self(b)->stream);
    return kvf_cuda_check(self(b), "a keep-set", err);
}

static kvf_status op_gather(kvf_backend *b, const void *src, const int32_t *ids, void *out, int64_t n, int64_t row_bytes, kvf_error *err)
{
    if (n < 0 || row_bytes < 4 || row_bytes % 4) return refuse(err, "gather");
    if (n > 0) kvf_cuda_gather(src, ids, out, n, row_bytes, self(b)->stream);
    return kvf_cuda_check(self(b), "gathering rows", err);
}

static kvf_status op_argmax(kvf_backend *b, const float *x, int64_t n_row, int32_t width, int32_t *out, kvf_error *err)
{
    if (n_row < 0 || width < 1) return refuse(err, "argmax");
    if (n_row > 0) kvf_cuda_argmax(x, n_row, width, out, self(b)->stream);
    return kvf_cuda_check(self(b), "argmax", err);
}

static kvf_status op_sample(kvf_backend *b, const float *logits, int32_t width, const kvf_device_sample *p, int32_t *out, kvf_error *err)
{
    if (width < 1 || !(p->temperature > 0.0f) || !(p->u >= 0.0f && p->u < 1.0f)) return refuse(err, "sample");
    kvf_cuda_sample q = { p->temperature, p->top_p, p->min_p, p->top_k, p->u };
    kvf_cuda_sample_row(logits, width, &q, out, self(b)->stream);
    return kvf_cuda_check(self(b), "sampling", err);
}

static kvf_status op_frame_cosine(kvf_backend *b, const float *x, int32_t n_frame, int32_t n_tok, int32_t width, float *out, kvf_error *err)
{
    if (n_frame < 1 || n_tok < 1 || width < 1) return refuse(err, "frame_cosine");
    kvf_cuda_frame_cosine(x, n_frame, n_tok, width, out, self(b)->stream);
    return kvf_cuda_check(self(b), "comparing frames", err);
}

static kvf_status op_density_peaks(kvf_backend *b, const float *x, int32_t n, int32_t width, int32_t k, float *d2, float *rho,
                                   float *delta, kvf_error *err)
{
    if (n < 1 || width < 1 || k < 1 || k > 32) return refuse(err, "density_peaks");
    kvf_cuda_distances(x, n, width, d2, self(b)->stream);
    kvf_cuda_density(d2, n, width, k, rho, delta, self(b)->stream);
    return kvf_cuda_check(self(b), "density peaks", err);
}

static kvf_status op_merge_mean(kvf_backend *b, const float *x, const int32_t *group, int32_t n, int32_t width, int32_t n_group,
                                float *out, kvf_error *err)
{
    if (n < 0 || width < 1 || n_group < 0) return refuse(err, "merge_mean");
    kvf_cuda_merge_mean(x, group, n, width, n_group, out, self(b)->stream);
    return kvf_cuda_check(self(b), "merging tokens", err);
}

const kvf_device_ops kvf_cuda_device_ops = { op_topk, op_keep, op_gather, op_argmax, op_sample, op_frame_cosine, op_density_peaks, op_merge_mean };
