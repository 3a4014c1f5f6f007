/* dpc.h - density peaks among the k nearest: which tokens stand for their kind.
 *
 * d(i, j) = |xi - xj| / sqrt(dim); density rho_i = exp(-mean of the k smallest d(i, .)^2); delta_i = the
 * smallest distance to a denser token, of the densest one the largest distance there is. The centres are the
 * tokens with the largest delta rho; every other token joins its nearest centre [Du et al. 2016, DPC-KNN;
 * HoliTom, sec. 3.2].
 *
 * OFFICIAL is what the published code does: a token is its own first neighbour, and noise of up to 1e-6 breaks
 * ties between densities (and decides where all densities are below that). EXACT leaves the token itself out,
 * takes distances in units of the mean neighbour's, so that the density neither vanishes nor saturates with
 * the scale of the features, and breaks ties by index.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_DPC_H
#define KVF_MERGE_DPC_H

#include "merge/tensor.h"

enum { KVF_DPC_MAX_K = 64 };

typedef struct kvf_dpc {
    const float *x;     /* [n][dim], finite */
    int64_t n, dim;
    int64_t n_center;   /* 1..n */
    int64_t k;          /* nearest neighbours, 1..KVF_DPC_MAX_K */
    bool exact;
    const float *noise; /* [n] in [0,1); NULL: zeros. Not with exact. */
    int32_t *center;    /* out [n_center] ascending */
    int32_t *member;    /* out [n] place in center of the one a token belongs to; a centre belongs to itself */
    float *dist;        /* [n][n] out: d */
    double *score;      /* [n] out: delta rho */
} kvf_dpc;

/* O(n^2 dim). Errors: NOMEM. */
kvf_status kvf_dpc_run(const kvf_merge_env *env, kvf_dpc *a, kvf_error *err);

/* Each token's nearest of n_center given centres: fills member from dist and center. */
void kvf_dpc_join(kvf_dpc *a);

/* d of all pairs into dist [n][n]. */
void kvf_dpc_distances(const kvf_merge_env *env, const float *x, int64_t n, int64_t dim, float *dist);

#endif
