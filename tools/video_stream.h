/* video_stream.h - a video planned while it comes in: frames are held until their segment is final, merged tokens go
 * to a file at once, so memory does not grow with the clip's length but for 40 bytes per token that is kept.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_VIDEO_STREAM_H
#define KVFOLD_TOOLS_VIDEO_STREAM_H

#include "storm.h"
#include "video_output.h"

typedef struct video_stream_options {
    const kvf_merge *merge;
    storm *layers;       /* before the planner; must not look at the whole video */
    const char *out;     /* tokens are kept beside it until they are written; NULL: no file */
    kvf_merge_type type; /* of the tokens written */
    bool keep;           /* positions of the whole video */
    bool owners;         /* for a page */
    int64_t hold;        /* most frames that wait */
} video_stream_options;

typedef struct video_stream video_stream;

/* Errors: NOMEM, IO (no file beside out), UNSUPPORTED (layers of both directions). */
kvf_status video_stream_open(video_stream **out, const video_stream_options *o, kvf_error *err);
void video_stream_close(video_stream *s);

/* A video_token_sink. Errors: those of kvf_merge_stream_open and _push, of storm_check, IO, SPACE, NOMEM. */
kvf_status video_stream_push(void *user, video_tokens *t, const void *frame, const float *scores, kvf_error *err);

/* No more frames: fill *r as video_result_make does, for all plans together. Its arrays are s's. */
kvf_status video_stream_finish(video_stream *s, video_tokens *t, video_result *r, kvf_error *err);

/* [n_frame * n_tok] of all plans, as kvf_merge_plan_owners; with options.owners. */
const int32_t *video_stream_owners(const video_stream *s);

#endif
