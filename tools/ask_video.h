/* ask_video.h - a clip in front of the question: frames through a vision tower, merged, as embeddings that the
 * prompt has places for.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_ASK_VIDEO_H
#define KVFOLD_TOOLS_ASK_VIDEO_H

#include "prompt.h"

typedef struct ask_video_options {
    const char *clip, *mmproj;
    const char *merge; /* planner and options, or "none": every token */
    int64_t frames;
    const char *tmpl, *system; /* as the options say; may be NULL */
    bool quiet;
} ask_video_options;

/* Decode, encode and merge; open the session and hand it the embeddings. prefix is then what every prompt
 * about the clip begins with: the frame's head and a place for each embedding. parts is opened.
 * Errors: those of video_source.h and kvfold/merge.h, ARG (the tower is not the model's). */
kvf_status ask_video_open(token_list *prefix, prompt_parts *parts, engine *e, const engine_options *eo,
                          const sampling_options *so, const ask_video_options *o, kvf_error *err);

#endif
