/* digest_ref.h - digests of one KV head's keys; see digest_ref.c.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_DIGEST_REF_H
#define KVF_BACKEND_CPU_DIGEST_REF_H

#include "base/digest.h"
#include "base/half.h"

/* k: [KVF_DIGEST_BLOCK][head_dim], of which n_tok >= 1 tokens are there. out: kvf_digest_head_bytes(). */
void kvf_digest_head(const kvf_digest *g, const kvf_f16 *k, int32_t n_tok, void *out);

/* score: [group][KVF_DIGEST_BLOCK]. */
void kvf_reps_head(const kvf_digest *g, const kvf_f16 *k, const float *score, int32_t r, float *out);

#endif
