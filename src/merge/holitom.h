/* holitom.h - HoliTom's outer merge, in pieces that the batch planner (holitom.c) and the stream (stream.c) share.
 *
 * Data flow: similarity -> segmentation (segment.h) -> `kvf_holitom_take` (which positions are static in a segment,
 * with the drift bound: perhaps several segments) -> `kvf_holitom_share` (how many tokens each part keeps) ->
 * `kvf_holitom_emit` (which ones; tokens appended to the plan).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_HOLITOM_H
#define KVF_MERGE_HOLITOM_H

#include "merge/method.h"

enum { KVF_HOLITOM_EXACT, KVF_HOLITOM_OFFICIAL };             /* mode */
enum { KVF_HOLITOM_VIDEO, KVF_HOLITOM_SEGMENT };              /* budget */
enum { KVF_HOLITOM_BY_SEGMENT, KVF_HOLITOM_BY_GRID };         /* order */
enum { KVF_HOLITOM_NO_NEWLINE, KVF_HOLITOM_END, KVF_HOLITOM_ROW }; /* newline */
enum { KVF_HOLITOM_BETA, KVF_HOLITOM_MEAN };                  /* merge */
enum { KVF_HOLITOM_FRAME_MEAN, KVF_HOLITOM_SEGMENT_MEAN };    /* noscore */
enum { KVF_HOLITOM_EUCLID, KVF_HOLITOM_COSINE };              /* distance */

typedef struct kvf_holitom {
    double tau, ratio, beta, drift, context;
    int64_t mode, knn, window, merge, distance, order, newline, budget, noscore;
} kvf_holitom;

extern const kvf_merge_ops kvf_merge_holitom;

/* A segment and its share. */
typedef struct kvf_holitom_part {
    int64_t first, last;
    int64_t n_static;  /* positions */
    int64_t keep;      /* static tokens to be left */
    uint8_t *is_static; /* [n_tok], in kvf_holitom_run.mask */
} kvf_holitom_part;

typedef struct kvf_holitom_run {
    const kvf_merge_job *job;
    const kvf_holitom *opt;
    const float *sim;       /* [n_frame - 1][n_tok] */
    kvf_holitom_part *part; /* [part_cap] */
    int64_t n_part, part_cap;
    uint8_t *mask;          /* [mask_cap], n_tok per part */
    int64_t mask_cap;
    int64_t *keep;          /* [n_frame] dynamic tokens to be left of each frame */
    uint8_t *own;           /* [n_frame][n_tok] static tokens that stay by themselves; NULL: none */
    float *scores;          /* [n_frame][n_tok] where the job has none */
    int64_t noise_at;       /* next unused noise */
    int64_t n_given, n_seen; /* budget=segment, exact: tokens given and frames seen before this job */
    int64_t reduced;        /* sum over parts of n_static (frames - 1) */
    double retain;          /* of the last share */
} kvf_holitom_run;

kvf_status kvf_holitom_init(kvf_holitom_run *r, const kvf_merge_job *job, const float *sim, kvf_error *err);
void kvf_holitom_fini(kvf_holitom_run *r);

/* Take frames first..last, a segment of the segmentation, as one part or, with a drift bound, as several. */
kvf_status kvf_holitom_take(kvf_holitom_run *r, int64_t first, int64_t last, kvf_error *err);

/* Set `keep` of parts from..n_part-1 and of their frames. `last`: nothing comes after them. */
kvf_status kvf_holitom_share(kvf_holitom_run *r, int64_t from, bool last, kvf_error *err);

/* Append the tokens of parts from..n_part-1. */
kvf_status kvf_holitom_emit(kvf_holitom_run *r, int64_t from, kvf_error *err);

/* The newline at the end of the video, if there is one. */
kvf_status kvf_holitom_close(kvf_holitom_run *r, kvf_error *err);

/* Give a row the length sqrt(dim), so that distances / sqrt(dim) are those of unit rows. */
void kvf_holitom_scale(const kvf_rows *rows, float *row, int64_t dim);

/* Clusters of one frame's dynamic tokens, see holitom_context.c; empty with context=0. */
typedef struct kvf_context {
    const kvf_mem *mem;
    int32_t *place;          /* [n_tok] positions that are clustered */
    int32_t *center, *member, *head, *next; /* [n_tok] places: centres, whose each is, lists of members */
    int32_t *cluster;        /* [n_tok] by position of a centre */
    double *score;
    float *x, *dist;
} kvf_context;

enum { KVF_PICK_COPY = 1, KVF_PICK_CENTER = 2 }; /* picked[] of a position */

kvf_status kvf_context_init(kvf_context *c, const kvf_holitom_run *r, kvf_error *err);
void kvf_context_fini(kvf_context *c);

/* Of `keep` dynamic tokens, how many are clusters. */
int64_t kvf_context_share(const kvf_holitom *o, int64_t keep);

/* Cluster the dynamic tokens of frame t that are not picked; picked becomes KVF_PICK_CENTER for the centres. */
kvf_status kvf_context_find(kvf_holitom_run *r, const kvf_holitom_part *p, kvf_context *c, int64_t t, uint8_t *picked,
                            kvf_error *err);

/* The output token of the cluster whose centre is (t, tok). */
kvf_status kvf_context_emit(kvf_holitom_run *r, const kvf_context *c, int64_t part, int64_t t, int64_t tok, kvf_error *err);

/* Parts of one segment [first, last] under the drift bound, see holitom_drift.c. */
kvf_status kvf_holitom_split(kvf_holitom_run *r, int64_t first, int64_t last, kvf_error *err);
kvf_status kvf_holitom_add_part(kvf_holitom_run *r, int64_t first, int64_t last, const uint8_t *is_static, kvf_error *err);

#endif
