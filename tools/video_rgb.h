/* video_rgb.h - a decoded picture as upright RGB. Only for builds with FFmpeg's libraries.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_VIDEO_RGB_H
#define KVFOLD_TOOLS_VIDEO_RGB_H

#include <libavutil/frame.h>
#include <libswscale/swscale.h>

#include "video_decode.h"

/* Scaler and pixels, reused from frame to frame. Zeroed: empty. */
typedef struct video_rgb {
    struct SwsContext *scaler;
    int colours, full_range; /* what the scaler was told */
    uint8_t *flat, *turned;  /* owned */
    size_t flat_cap, turned_cap;
} video_rgb;

/* Set rgb, width, height and stride of *out; the pixels are r's, valid until the next call. rotation:
 * degrees clockwise, a multiple of 90. Errors: NOMEM; UNSUPPORTED (a pixel format without conversion). */
kvf_status video_rgb_convert(video_rgb *r, const AVFrame *frame, int rotation, video_frame *out,
                             kvf_error *err);

void video_rgb_free(video_rgb *r);

#endif
