/* plan.h - a plan while it is made: output tokens are appended in order, each with its sources.
 *
 * kvf_merge_plan is the result and the builder in one; planners see only the functions here. Sources of a token
 * are appended in ascending order of their index.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_PLAN_H
#define KVF_MERGE_PLAN_H

#include "merge/tensor.h"

struct kvf_merge_plan {
    kvf_merge_env env;
    int64_t n_frame, n_tok, grid_w, first_frame;
    int64_t *row;         /* [row_cap] */
    int32_t *source;
    float *weight;
    kvf_merge_meta *meta;
    kvf_merge_segment *segment;
    int64_t n_out, n_source, n_segment;
    int64_t row_cap, source_cap, weight_cap, meta_cap, segment_cap;
    int64_t n_kind[3], n_used, n_asked, total_reduced, n_forced;
    double retain_eff, similarity_ms, plan_ms;
    const char *scores;   /* static */
    char *spec;
};

/* An empty plan over n_frame frames of n_tok tokens. */
kvf_status kvf_plan_new(kvf_merge_plan **out, const kvf_merge_env *env, int64_t n_frame, int64_t n_tok, int64_t grid_w,
                        kvf_error *err);

/* The next output token. */
kvf_status kvf_plan_token(kvf_merge_plan *p, kvf_merge_meta meta, kvf_error *err);
/* A source of the last output token. */
kvf_status kvf_plan_source(kvf_merge_plan *p, int64_t source, double weight, kvf_error *err);
/* An output token that copies one input token. */
kvf_status kvf_plan_copy(kvf_merge_plan *p, int64_t segment, int64_t frame, int64_t tok, kvf_error *err);
kvf_status kvf_plan_segment(kvf_merge_plan *p, kvf_merge_segment segment, kvf_error *err);

/* Count kinds and used inputs. Call once, when all tokens are there. */
kvf_status kvf_plan_finish(kvf_merge_plan *p, kvf_error *err);

/* *out = what `second` does to the output tokens of `first`, both finished; first's tokens are second's inputs in
 * their order (no newlines). Centres go back to first's centres. */
kvf_status kvf_plan_chain(kvf_merge_plan **out, const kvf_merge_plan *first, const kvf_merge_plan *second,
                          kvf_error *err);

/* Milliseconds of a steady clock. */
double kvf_merge_now_ms(void);

/* dst [n_out][dim] = the plan applied to a checked tensor of its shape; the plan has no newlines. */
kvf_status kvf_plan_apply_f32(const kvf_merge_plan *p, const kvf_tensor *x, float *dst, kvf_error *err);

#endif
