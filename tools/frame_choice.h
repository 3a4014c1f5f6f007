/* frame_choice.h - which frames of a clip are looked at.
 *
 * Rule: the choice is made from the list of all frames' times, before anything is decoded, so it is the
 * same whether the clip's own frame count and duration are right, wrong or missing.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_FRAME_CHOICE_H
#define KVFOLD_TOOLS_FRAME_CHOICE_H

#include <stdint.h>

#include <kvfold/kvfold.h>

/* Most frames a choice may have: two hours at 9 frames a second; 196 tokens of each are 12 million. */
#define FRAME_CHOICE_MAX 65536

typedef struct frame_request {
    int64_t frames;    /* spread evenly, first and last included; 0: by fps */
    double fps;        /* frames per second of the clip; used if frames is 0 */
    double start, end; /* seconds from the clip's first frame; end 0: to its end. Frames at `end` are out */
} frame_request;

/* Choose among n frames shown at time[0..n), ascending seconds, time[0] being 0. out [cap] gets their
 * numbers, ascending and each once; *n_out their count.
 *   frames: number first + floor(i * (count - 1) / (frames - 1)), as numpy.linspace cut to integers, which
 *           LLaVA-OneVision uses; all of them if there are not more.
 *   fps:    the frame on the screen at start + k / fps, for k = 0, 1, ...; each once.
 * Errors: ARG (a range that holds no frame, no number), LIMIT (more than cap). */
kvf_status frame_choose(const double *time, int64_t n, const frame_request *q, int64_t *out, int64_t cap,
                        int64_t *n_out, kvf_error *err);

#endif
