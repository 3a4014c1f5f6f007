/* preprocess.h - a picture as a model's image processor hands it to the tower.
 *
 * Resizing is that of Pillow, which the processors of SigLIP and CLIP use: separable, widened by the scale
 * when shrinking (antialiased), rows first, in fixed point with 22 bits and rounded to bytes after each
 * pass, so pixels come out the same to the last bit.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_PREPROCESS_H
#define KVFOLD_TOOLS_PREPROCESS_H

#include <stdbool.h>
#include <stdint.h>

#include <kvfold/kvfold.h>

typedef enum preprocess_filter { PREPROCESS_BICUBIC, PREPROCESS_BILINEAR } preprocess_filter;

typedef enum preprocess_fit {
    PREPROCESS_STRETCH, /* both sides to the size: SigLIP, LLaVA-OneVision's video path */
    PREPROCESS_CROP     /* the shorter side to the size, the middle of the longer: CLIP */
} preprocess_fit;

typedef struct preprocess_spec {
    int size; /* of the square, 1..4096 */
    preprocess_filter filter;
    preprocess_fit fit;
    float mean[3], std[3]; /* of values in 0..1 */
} preprocess_spec;

/* A known processor by its model's name, "siglip" or "clip"; false: unknown. size 0: the model's own. */
bool preprocess_named(preprocess_spec *out, const char *name, int size);

/* One output sample: `n` inputs from `first` on with these weights of 2^22. */
typedef struct preprocess_taps {
    int32_t *first, *n;  /* [out] */
    int32_t *weight;     /* [out][width] */
    int width, from, to; /* for this size of input and output */
} preprocess_taps;

/* Tables and scratch, reused while pictures keep their size. Zeroed: empty. */
typedef struct preprocessor {
    preprocess_taps across, down;
    uint8_t *rows; /* the picture, resized across; owned */
    size_t rows_cap;
} preprocessor;

typedef struct preprocess_picture {
    const uint8_t *rgb; /* [height] rows of [width][3], stride bytes apart */
    int width, height;  /* 1..65536 */
    int64_t stride;
} preprocess_picture;

/* Resize to out [size][size][3] bytes. Errors: ARG (a size), NOMEM. */
kvf_status preprocess_resize(preprocessor *p, const preprocess_spec *spec, const preprocess_picture *in,
                             uint8_t *out, kvf_error *err);

/* (value / 255 - mean) / std of rgb [size][size][3] into out [3][size][size]. */
void preprocess_normalise(const preprocess_spec *spec, const uint8_t *rgb, float *out);

void preprocess_free(preprocessor *p);

#endif
