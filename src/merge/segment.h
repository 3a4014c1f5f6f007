/* segment.h - the best partition of frames into segments, found while the frames come in.
 *
 * Token n is static on frames s..e when sim[t][n] > tau for every t in s..e-1. A segment's gain is the tokens
 * that go when each static one is kept once: g(s, e) = (static on s..e) (e - s). The partition into segments of
 * at most `window` frames with the largest total gain comes from the recurrence over its last frame
 *
 *     best(i) = max( best(i - 1), max over L = 2..window of best(i - L) + g(i - L + 1, i) )
 *
 * where a tie goes to the frame alone, then to the shorter segment [HoliTom, sec. 3.1; the published code].
 * Instead of a tensor of T T N truth values the state is run[n], the first frame from which token n has been
 * static, and how many tokens have which: a frame costs O(N + min(T, window)).
 *
 * Frames count from the last commit on: kvf_segmenter_commit forgets what is settled.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_SEGMENT_H
#define KVF_MERGE_SEGMENT_H

#include "base/mem.h"

typedef struct kvf_segmenter {
    const kvf_mem *mem;
    int64_t n_tok, window;
    float tau;
    int64_t n_frame; /* so far */
    int64_t cap;     /* frames the arrays hold */
    int32_t *run;    /* [n_tok] */
    int64_t *n_run;  /* [cap] tokens whose run starts at a frame */
    int64_t *best;   /* [cap] gain of the best partition of frames 0..i */
    int32_t *start;  /* [cap] first frame of its last segment */
    uint8_t *mark;   /* [cap] scratch */
} kvf_segmenter;

kvf_status kvf_segmenter_init(kvf_segmenter *s, const kvf_mem *mem, int64_t n_tok, int64_t window, double tau,
                              kvf_error *err);
void kvf_segmenter_fini(kvf_segmenter *s);

/* The next frame; sim [n_tok] is its similarity to the one before, ignored for frame 0. Errors: NOMEM (as
 * before the call), LIMIT. */
kvf_status kvf_segmenter_add(kvf_segmenter *s, const float *sim, kvf_error *err);

/* Write the segments of frames 0..last as pairs of first and last frame into out [2 * frames]; returns how many. */
int64_t kvf_segmenter_trace(const kvf_segmenter *s, int64_t last, int32_t *out);

/* The last frame of the longest beginning that is settled: every partition still possible, whatever comes, has a
 * segment end there, and at least one frame follows it. -1: none. O(min(T, window)). */
int64_t kvf_segmenter_settled(kvf_segmenter *s);

/* Forget frames 0..last, 0 <= last < n_frame - 1; `last` must be settled, or the segmenter fed anew. */
void kvf_segmenter_commit(kvf_segmenter *s, int64_t last);

/* Forget every frame. */
void kvf_segmenter_reset(kvf_segmenter *s);

#endif
