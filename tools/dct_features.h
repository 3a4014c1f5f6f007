/* dct_features.h - token features of frames without a vision tower.
 *
 * They measure redundancy, nothing else: how much of a video a planner can take away. No language model
 * understands them.
 *
 * A frame is cut as SigLIP-so400m cuts it: 384 x 384 pixels, 27 x 27 patches of 14, at the end pooled to
 * 14 x 14 tokens. A patch is described by its 15 lowest DCT coefficients of luma and 6 of each chroma; beside
 * them stand the mean of the 3 x 3 patches around it and the mean of the frame (a little of what attention
 * would bring in). Each of the 81 numbers is scaled to mean 0 and variance 1 over the clip, the frame's
 * to 0.7, and a random two-layer perceptron with a fixed seed makes 64 of them. A clip of one frame, or one
 * that never changes, has constants where the frame's mean stands.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_DCT_FEATURES_H
#define KVFOLD_TOOLS_DCT_FEATURES_H

#include "preprocess.h"

#define DCT_SIZE 384 /* pixels along a side */
#define DCT_PATCH 14 /* pixels along a side of a patch */
#define DCT_GRID 27  /* patches along a side; 6 pixels are left over, as in SigLIP */
#define DCT_PATCHES (DCT_GRID * DCT_GRID)
#define DCT_COEFFICIENTS 27 /* of a patch */
#define DCT_DIM 64          /* of a token */

typedef struct dct_features {
    float *coefficients; /* [n][DCT_PATCHES][DCT_COEFFICIENTS]; owned */
    int64_t n, cap;      /* frames */
    struct dct_maker *maker; /* of a clip that is read twice; owned */
} dct_features;

/* Add a frame: rgb [DCT_SIZE][DCT_SIZE][3]. Errors: NOMEM. */
kvf_status dct_features_add(dct_features *d, const uint8_t *rgb, kvf_error *err);

/* Features of all frames before pooling, out [n][DCT_PATCHES][DCT_DIM]. n >= 1. Errors: NOMEM. */
kvf_status dct_features_make(const dct_features *d, float *out, kvf_error *err);

/* The same for clips that are read twice, in memory of one frame: measure every frame, ready, then frame by frame
 * out [DCT_PATCHES][DCT_DIM], to the bits of dct_features_make. Errors: NOMEM. */
kvf_status dct_features_measure(dct_features *d, const uint8_t *rgb, kvf_error *err);
void dct_features_ready(dct_features *d); /* after at least one frame */
void dct_features_frame(dct_features *d, const uint8_t *rgb, float *out);

void dct_features_free(dct_features *d);

#endif
