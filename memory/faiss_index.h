/* faiss_index.h - FAISS behind kv/index.h: Johnson, Douze and Jegou 2017, arXiv:1702.08734.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MEMORY_FAISS_INDEX_H
#define KVF_MEMORY_FAISS_INDEX_H

#include "kv/index.h"

/* Open an empty index. kind is FAISS's factory string with '+' for ',' ("Flat", "SQfp16", "HNSW32",
 * "IVF64+Flat", "PQ32x4fs"; at most 100 characters, numbers at most 65536), dim 1..65536. Inner product.
 *
 * Kinds that have to be trained (IVF, PQ, SQ8) collect vectors until there are
 * max(1024, 39 x centroids) of them, which FAISS wants as a minimum, and are searched exactly until
 * then. IVF reads a quarter of its lists, HNSW keeps 128 candidates: FAISS's own 1 and 16 are for
 * data whose queries look like its vectors, and attention's do not.
 *
 * Vectors and queries that hold NaN or infinity are KVF_ERR_ARG. A failure inside add leaves an index
 * that answers KVF_ERR_STATE until it is reset. FAISS's memory is its own, not kvf_mem's; bytes()
 * estimates it. One thread at a time; FAISS's parallel loops run on the calling thread alone.
 *
 * Errors: ARG (a kind that FAISS does not know, with its sentence; one that ranks by another measure),
 * NOMEM, UNSUPPORTED (built without FAISS, or its module cannot be loaded). */
kvf_status kvf_faiss_open(kvf_index **out, const char *kind, int32_t dim, const kvf_mem *mem, kvf_error *err);

/* The same inside the module libkvfold_faiss, which faiss_load.c opens. The number rises when kv/index.h,
 * kvf_mem or kvf_error changes. */
#define KVF_FAISS_MODULE_OPEN "kvf_faiss_module_open_1"
KVF_API kvf_status kvf_faiss_module_open_1(kvf_index **out, const char *kind, int32_t dim, const kvf_mem *mem,
                                           kvf_error *err);

/* Exact search (faiss_exact.c): the k rows of x [n][dim] with the largest inner product with q, best first, ties by the lower
 * number; their count, min(k, n), is returned. ids and score: [k]. n * k steps at worst. */
int64_t kvf_exact_search(const float *x, int64_t n, int32_t dim, const float *q, int64_t k, int64_t *ids,
                         float *score);

#endif
