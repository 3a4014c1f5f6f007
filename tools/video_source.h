/* video_source.h - where the tokens of kvfold video come from: a vision tower, the training-free features,
 * or files; and what goes with them: scores, times and thumbnails of the frames.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_VIDEO_SOURCE_H
#define KVFOLD_TOOLS_VIDEO_SOURCE_H

#include <stdbool.h>
#include <stdint.h>

#include <kvfold/merge.h>

#include "progress.h"
#include "video_decode.h"

struct video_tokens;

/* Takes frame after frame of a stream: [n_tok][dim] of t->type, scores [n_tok] or NULL, valid during the call. t
 * is whole but for data: shape, newline, times so far. */
typedef kvf_status (*video_token_sink)(void *user, struct video_tokens *t, const void *frame, const float *scores,
                                       kvf_error *err);

typedef struct video_source_options {
    const char *clip;     /* a video; NULL: features only */
    const char *mmproj;   /* or */
    const char *from;     /* "dctctx", or */
    const char *features; /* .npy or .safetensors [T][N][D] */
    const char *scores;   /* [T][N]; NULL: the tower's, or none */
    const char *newline;  /* [D]; NULL: the tower's, or none */
    const char *pool;     /* "auto", "none", "bilinear", "average", "max" */
    int64_t frames;       /* 0: not said */
    double fps;           /* 0: not said */
    double start, end;
    int64_t grid; /* tokens in a row; 0: square */
    int64_t width; /* the tokens' that a model takes; 0: any */
    bool thumbnails, quiet;
    video_token_sink sink; /* frames go there one by one, and none is held; NULL: all are held */
    void *user;
} video_source_options;

/* Zeroed: empty. */
typedef struct video_tokens {
    void *data; /* [n_frame][n_tok][dim] of type; owned */
    kvf_merge_type type;
    int64_t n_frame, n_tok, dim, grid_w; /* grid_w 0: square */
    float *scores;                       /* [n_frame][n_tok], or NULL; owned */
    float *newline;                      /* [dim], or NULL; owned */
    char from[160];                      /* "SigLIP-so400m, layer 26 of 27", one line for people */
    char storm[160];                     /* layers that ran over the tokens; "": none */
    int64_t n_sent;                      /* frames that went to the sink */
    bool is_clip;                        /* the next four are set */
    video_info clip;
    video_outcome outcome;
    double *time;      /* [n_frame] seconds; owned */
    int64_t *number;   /* [n_frame] in the clip; owned */
    buffer *thumbnail; /* [n_frame] JPEG, empty: none; NULL: none at all; owned */
    double shown[4];   /* left, top, width, height of what the tokens cover, as shares of the picture */
    double decode_s, encode_s;
} video_tokens;

/* Read, encode. Errors: ARG (options that do not fit together, shapes that do not), those of video_decode.h,
 * npy.h, safetensors.h and kvfold/vision.h. On failure *out is empty. */
kvf_status video_source_read(video_tokens *out, kvf_ctx *ctx, const video_source_options *o, kvf_error *err);

void video_tokens_free(video_tokens *t);

/* Before the first frame of a stream: n_frame (expected), n_tok, dim and type are set; grid, scores and newline of
 * the options are read and checked. Errors: as above. */
kvf_status video_source_begin(video_tokens *t, const video_source_options *o, kvf_error *err);

/* Hand one frame to the sink; tower: the scores of a tower, where none come from a file. */
kvf_status video_source_send(video_tokens *t, const video_source_options *o, const void *frame, const float *tower,
                             kvf_error *err);

/* n elements of `type` as float. */
void video_tokens_widen(float *out, const void *data, kvf_merge_type type, int64_t n);

/* Say on stderr what is missing of the clip. frames: as many as were asked for, 0: not said. */
void video_tokens_note(const video_tokens *t, int64_t frames);

/* The whole as a view. */
kvf_merge_view video_tokens_view(const video_tokens *t);

#endif
