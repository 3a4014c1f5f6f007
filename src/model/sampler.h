/* sampler.h - picks the next token from logits.
 *
 * Order of the steps, as in llama.cpp's default chain without its optional members: repetition
 * penalty, top-k, top-p, min-p, temperature, draw. temperature = 0 takes the best token after the
 * penalty. Ties go to the smaller token id, so a run is reproducible.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_SAMPLER_H
#define KVF_MODEL_SAMPLER_H

#include "base/mem.h"

typedef struct kvf_sampler kvf_sampler;

/* The defaults of kvf_session_params. */
void kvf_sampling_default(kvf_sampling *s);

/* Errors: ARG (names the field and its range). */
kvf_status kvf_sampling_check(const kvf_sampling *s, kvf_error *err);

kvf_status kvf_sampler_open(kvf_sampler **out, const kvf_sampling *s, int32_t n_vocab, const kvf_mem *mem, kvf_error *err);
void kvf_sampler_close(kvf_sampler *s);
/* Also restarts the random sequence. s must be valid (kvf_sampling_check). */
void kvf_sampler_set(kvf_sampler *s, const kvf_sampling *params);

/* logits [n_vocab]; history [n_history] tokens before, for the penalty. Returns the token;
 * logits are unchanged. A NaN logit counts as -inf. */
kvf_token kvf_sampler_pick(kvf_sampler *s, const float *logits, const kvf_token *history, int64_t n_history);

#endif
