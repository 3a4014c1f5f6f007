/* tensor.h - where a merge runs, and the caller's tensors after their shapes were checked.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_TENSOR_H
#define KVF_MERGE_TENSOR_H

#include "base/mem.h"
#include "base/threads.h"
#include "merge/rows.h"

/* What a ctx lends: memory, threads, kernels. Copied; what it points to outlives its users. */
typedef struct kvf_merge_env {
    const kvf_mem *mem;
    kvf_threads *threads; /* NULL: the caller's thread alone */
    kvf_rows rows;
} kvf_merge_env;

/* A checked kvf_merge_view: strides filled in, in bytes. */
typedef struct kvf_tensor {
    const char *data;
    kvf_merge_type type;
    int64_t n_frame, n_tok, dim;
    int64_t frame_bytes, tok_bytes;
} kvf_tensor;

/* Errors: ARG and LIMIT, naming `what` and the field. */
kvf_status kvf_tensor_init(kvf_tensor *x, const kvf_merge_view *v, const char *what, kvf_error *err);

/* A dense tensor. */
kvf_tensor kvf_tensor_of(const void *data, kvf_merge_type type, int64_t n_frame, int64_t n_tok, int64_t dim);

static inline const void *kvf_tensor_row(const kvf_tensor *x, int64_t frame, int64_t tok)
{
    return x->data + frame * x->frame_bytes + tok * x->tok_bytes;
}

/* Token i of all frames, i = frame * n_tok + tok. */
static inline const void *kvf_tensor_token(const kvf_tensor *x, int64_t i)
{
    return kvf_tensor_row(x, i / x->n_tok, i % x->n_tok);
}

/* One number, in f32. */
float kvf_tensor_value(const kvf_tensor *x, int64_t frame, int64_t tok, int64_t i);

/* The ARG error of a value that is NaN or infinite, with its place; KVF_OK if token i has none. */
kvf_status kvf_tensor_finite(const kvf_tensor *x, int64_t i, const char *what, kvf_error *err);

/* n scores, all finite? */
kvf_status kvf_scores_finite(const float *scores, int64_t n, int64_t n_tok, kvf_error *err);

/* A `size` field of the caller must be ours: new fields take the place of reserved ones, so sizes stay. */
kvf_status kvf_merge_check_size(size_t size, size_t ours, const char *what, kvf_error *err);

/* fn(arg, i, worker) for 0 <= i < n, on the threads of env. */
void kvf_merge_run(const kvf_merge_env *env, int64_t n, kvf_task_fn fn, void *arg);

/* Zeroed memory of env; kvf_mem_get with fewer casts. */
#define KVF_GET(env, ptr, n, err) kvf_mem_get((env)->mem, (void **)(void *)(ptr), (size_t)(n), sizeof **(ptr), err)

#endif
