/* video_output.h - what kvfold video leaves on disk.
 *
 * OUT.safetensors  embeddings [M, D], position [M] i32, mrope [3, M] i32 (planes t, y, x), meta [M, 4] i32
 *                  (segment, kind, frame, position), segments [S, 6] i32, time [T] f32 seconds if there is a
 *                  clip; and how they were made as metadata
 * OUT.tokens.npy   the embeddings again, [M, D]
 * OUT.meta.npy     meta again, [M, 4]
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_VIDEO_OUTPUT_H
#define KVFOLD_TOOLS_VIDEO_OUTPUT_H

#include <stdio.h>

#include "video_source.h"

typedef struct video_result {
    kvf_merge_plan_info info;
    void *embd;  /* [n_out][dim] of type; owned */
    FILE *spool; /* the same as a file, where embd is NULL; its owner's */
    kvf_merge_type type;
    int64_t dim;
    int32_t *position; /* [n_out]; owned */
    int32_t *mrope;    /* [3][n_out]; owned */
    bool keep;         /* positions are those of the whole video */
} video_result;

/* Apply the plan and compute positions. Errors: ARG (newlines without an embedding), NOMEM. */
kvf_status video_result_make(video_result *r, const kvf_merge_plan *plan, const video_tokens *t,
                             kvf_merge_type type, bool keep, kvf_error *err);
/* The newline of t in the type that plans are applied in; the caller's to free. Errors: ARG (there is none), NOMEM. */
kvf_status video_newline(void **out, const video_tokens *t, kvf_merge_type type, kvf_error *err);

void video_result_free(video_result *r);

/* Write the three files; `clip` is named in the metadata, or NULL. Each appears whole or not at all. Errors:
 * IO, SPACE, NOMEM. */
kvf_status video_result_write(const video_result *r, const video_tokens *t, const char *out, const char *clip,
                              kvf_error *err);

#endif
