/* storm.h - STORM's temporal layers in front of a planner: "storm:weights=FILE,eps=1e-5+pool_time:k=4".
 *
 * Weights are the user's, .safetensors or .gguf, named as kvfold/merge.h says; STORM's own are not published.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_STORM_H
#define KVFOLD_TOOLS_STORM_H

#include "video_source.h"

typedef struct storm {
    kvf_mamba *layers; /* NULL: the spec names no storm */
    kvf_mamba_info info;
    const char *rest; /* what is left of the spec for kvf_merge_open; lives as long as that */
} storm;

/* What stands for the planner if nothing follows, as in STORM's training. */
#define STORM_PLANNER "pool_time:k=4"

/* Read the weights that `spec` names, if it begins with storm. Errors: ARG (an option), those of safetensors.h and
 * kvf_mamba_open_tensors. On failure *s is empty. */
kvf_status storm_open(storm *s, kvf_ctx *ctx, const char *spec, kvf_error *err);
void storm_close(storm *s);

/* Set t->storm to a line about the layers. Errors: ARG (layers of another width than the tokens). */
kvf_status storm_check(const storm *s, video_tokens *t, kvf_error *err);

/* Run all tokens through the layers; they are f32 then. Nothing without layers. Errors: those, NOMEM. */
kvf_status storm_run(storm *s, video_tokens *t, kvf_error *err);

#endif
