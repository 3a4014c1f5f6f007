/* video_decode.h - frames of a video file as RGB, through FFmpeg's libraries.
 *
 * The file is read twice: once for the times of its frames, which costs no decoding, and once for the
 * frames that were chosen; between far-apart ones it jumps from key frame to key frame.
 *
 * Rule: a clip is somebody else's data. It is read through one file descriptor of ours; whatever is in
 * it, no other file and no address is opened, no frame of more than VIDEO_MAX_PIXELS is made, and what
 * cannot be decoded is counted and said, not shown as if it were right.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_VIDEO_DECODE_H
#define KVFOLD_TOOLS_VIDEO_DECODE_H

#include <stdbool.h>
#include <stdint.h>

#include "buffer.h"
#include "frame_choice.h"

#define VIDEO_MAX_PIXELS ((int64_t)8192 * 8192) /* twice an 8K picture; 200 MB as RGB */

typedef struct video video;

typedef struct video_info {
    char container[64], codec[64]; /* "mov,mp4,m4a,3gp,3g2,mj2", "h264" */
    int width, height;             /* as shown: after the rotation that the file asks for */
    int rotation;                  /* degrees clockwise: 0, 90, 180, 270 */
    int64_t n_frames;              /* in the file */
    double seconds;                /* from the first frame to the end of the last */
    double seconds_said; /* as the file's head says; 0: it does not. More than `seconds`: cut off? */
    double fps;          /* mean; 0: one frame */
    bool damaged;        /* reading stopped before the file's end, at something unreadable */
} video_info;

typedef struct video_frame {
    int64_t number;     /* among the clip's frames, in the order they are shown */
    double time;        /* seconds from the clip's first frame */
    const uint8_t *rgb; /* [height] rows of [width][3], stride bytes apart; valid during the call */
    int width, height;  /* may differ from frame to frame */
    int64_t stride;
    bool damaged; /* the decoder patched it up */
} video_frame;

/* What video_read met. */
typedef struct video_outcome {
    int64_t n_frames;  /* handed out */
    int64_t n_missing; /* chosen, but nothing was there to decode */
    int64_t n_damaged; /* handed out patched up */
} video_outcome;

/* Receives frames in order; a status other than KVF_OK ends reading and is returned. */
typedef kvf_status (*video_sink)(void *user, const video_frame *frame, kvf_error *err);

/* True if this build reads video. */
bool video_built_in(void);

/* "FFmpeg libavcodec 59.37.100", or "". */
const char *video_library(void);

/* Open and list the frames. threads: of the decoder. Errors: UNSUPPORTED (a build without FFmpeg, a codec it
 * lacks), IO, ARG (no regular file), FORMAT (not a video, sound only, nothing in it), LIMIT (too large a
 * picture, too many frames), NOMEM. */
kvf_status video_open(video **out, const char *path, int threads, kvf_error *err);
void video_close(video *v);

const video_info *video_get_info(const video *v);

/* Choose frames; *n is their count. Errors: those of frame_choose. */
kvf_status video_choose(video *v, const frame_request *q, int64_t *n, kvf_error *err);

/* Decode the chosen frames. Errors: FORMAT (none could be decoded), LIMIT (a picture too large), NOMEM, and
 * what the sink returns. *outcome is filled in every case. */
kvf_status video_read(video *v, video_sink sink, void *user, video_outcome *outcome, kvf_error *err);

/* Append a JPEG of the frame to out, at most max_side pixels wide and high. False: no memory or no encoder
 * in this build. */
bool video_jpeg(buffer *out, const video_frame *frame, int max_side);

#endif
