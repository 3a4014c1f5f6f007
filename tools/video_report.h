/* video_report.h - a page that shows what a plan kept of a video.
 *
 * One HTML file without references to anything else: a summary, tokens per frame as a chart, and the frames
 * in their segments with what was dropped darkened and what was merged tinted.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_VIDEO_REPORT_H
#define KVFOLD_TOOLS_VIDEO_REPORT_H

#include "video_source.h"

typedef struct video_page {
    const char *title; /* the clip's or the features' name */
    const video_tokens *tokens;
    const kvf_merge_plan_info *plan;
    const int32_t *owner;             /* [n_frame * n_tok], of kvf_merge_plan_owners */
    const kvf_merge_quality *quality; /* NULL: not measured */
} video_page;

/* Frames that are shown, about; of longer videos each segment shows fewer. The chart has all. */
#define VIDEO_PAGE_FRAMES 600

/* Errors: IO, SPACE, NOMEM. */
kvf_status video_report_write(const char *path, const video_page *page, kvf_error *err);

#endif
