/* index.h - a nearest-vector index of another library behind the KV manager: inner product, one per
 * layer, vectors numbered in the order they were added.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_KV_INDEX_H
#define KVF_KV_INDEX_H

#include "base/error.h"
#include "base/mem.h"

typedef struct kvf_index kvf_index;

typedef struct kvf_index_ops {
    kvf_status (*add)(kvf_index *ix, const float *x, int64_t n, kvf_error *err); /* x [n][dim] */
    kvf_status (*reset)(kvf_index *ix, kvf_error *err);                          /* forget all vectors */
    /* The k best by inner product, best first, ties by the lower number; *n found (<= k). */
    kvf_status (*search)(kvf_index *ix, const float *q, int64_t k, int64_t *ids, int64_t *n, kvf_error *err);
    size_t (*bytes)(const kvf_index *ix);
    void (*close)(kvf_index *ix);
} kvf_index_ops;

struct kvf_index {
    const kvf_index_ops *ops;
    int64_t n; /* vectors it holds */
    int32_t dim;
};

/* How one is opened. kind: a factory string, '+' for the comma ("IVF64+Flat"). */
typedef kvf_status (*kvf_index_open_fn)(kvf_index **out, const char *kind, int32_t dim, const kvf_mem *mem,
                                        kvf_error *err);

#endif
