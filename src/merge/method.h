/* method.h - what a merging method is: a table of options and one function that appends tokens to a plan.
 *
 * A method is one file ending in one const kvf_merge_ops, named in registry.c.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_METHOD_H
#define KVF_MERGE_METHOD_H

#include "base/option.h"
#include "merge/plan.h"

/* One video to be planned; everything checked. */
typedef struct kvf_merge_job {
    const kvf_merge_env *env;
    const kvf_tensor *x;     /* features */
    const kvf_tensor *keys;  /* NULL: absent */
    const float *scores;     /* [n_frame][n_tok], finite; NULL: none */
    const float *noise;      /* [n_noise]; NULL: zeros */
    int64_t n_noise, grid_w;
    const void *state;       /* the method's options */
    kvf_merge_plan *plan;    /* empty; the method appends */
} kvf_merge_job;

typedef struct kvf_merge_ops {
    const char *name, *source, *help;
    const kvf_option *options;
    size_t state_size;
    bool shapes_only; /* looks at no feature: may stand in front of another method */
    bool online;      /* holitom: its stream finds segments itself */
    kvf_status (*check)(const void *state, kvf_error *err); /* (optional) options that contradict each other */
    kvf_status (*plan)(kvf_merge_job *job, kvf_error *err);
    int64_t (*chunk)(const void *state); /* (optional: cannot stream) frames that are planned at a time */
} kvf_merge_ops;

enum { KVF_MERGE_MAX_STAGE = 4 };

struct kvf_merge {
    kvf_merge_env env;
    int64_t n_stage;
    const kvf_merge_ops *ops[KVF_MERGE_MAX_STAGE];
    void *state[KVF_MERGE_MAX_STAGE];
    char *spec;
};

/* kvf_merge_open with what it needs of a ctx. */
kvf_status kvf_merge_open_env(kvf_merge **out, const kvf_merge_env *env, const char *spec, kvf_error *err);

/* Columns of the grid: the caller's, or sqrt(n_tok) if that is whole, else n_tok. Errors: ARG (does not divide). */
kvf_status kvf_merge_grid(int64_t *out, int64_t grid_w, int64_t n_tok, kvf_error *err);

/* Tokens that a ratio leaves of n: floor(ratio n), of `count` at least 1. A product that misses a whole number by less than
 * its rounding counts as that: 0.29 of 100 is 29. */
int64_t kvf_merge_floor(double ratio, int64_t n);
int64_t kvf_merge_count(double ratio, int64_t n);

/* Where scores are missing: 1 - cosine of each token of frames first..last with the mean of its frame, or, whole,
 * of all these frames, in the manner of VidCom2 and UniComp, which need no attention. */
typedef struct kvf_merge_stand_in {
    const kvf_tensor *x;
    int64_t first, last;
    bool whole;
    const uint8_t *skip; /* [n_tok] positions whose scores nobody asks for; NULL: none */
    float *out;          /* [last - first + 1][n_tok] */
} kvf_merge_stand_in;

/* Errors: NOMEM. */
kvf_status kvf_merge_substitute(const kvf_merge_env *env, const kvf_merge_stand_in *s, kvf_error *err);

#endif
