/* similarity.h - how much every token is like the one before it, in one pass over the data.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_SIMILARITY_H
#define KVF_MERGE_SIMILARITY_H

#include "merge/tensor.h"

/* Cosine from a sum of products and the lengths; lengths under 1e-12 count as that, so a token of zeros is
 * like nothing [HoliTom, sec. 3.1; the published code]. */
float kvf_cosine(double dot, double norm_a, double norm_b);

/* sim[t][n] = cosine of (t, n) and (t + 1, n), [n_frame - 1][n_tok]; norm[t][n] = |x|, [n_frame][n_tok]; both
 * the caller's. Every row is read from memory once: frames are walked block of positions by block, so that
 * the row before is still in the cache. Errors: ARG (NaN, infinity), NOMEM. */
kvf_status kvf_similarity(const kvf_merge_env *env, const kvf_tensor *x, float *sim, double *norm, kvf_error *err);

/* The last frame of x against the one before it: sim [n_tok], norm [n_tok] of the last; prev_norm [n_tok] of the one
 * before, NULL if there is none: sim is left alone then. */
kvf_status kvf_similarity_frame(const kvf_merge_env *env, const kvf_tensor *x, float *sim, double *norm,
                                const double *prev_norm, kvf_error *err);

#endif
