/* video_encode.h - frames of a clip to tokens, through a tower or the training-free features.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_VIDEO_ENCODE_H
#define KVFOLD_TOOLS_VIDEO_ENCODE_H

#include "video_source.h"

/* Read o->clip into *t. If t already has features (from a file), only times and thumbnails are taken, and
 * the number of frames must agree. *t is the caller's to free, also after a failure. */
kvf_status video_encode(video_tokens *t, kvf_ctx *ctx, const video_source_options *o, kvf_error *err);

#endif
