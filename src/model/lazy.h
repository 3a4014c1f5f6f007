/* lazy.h - a session whose policy prunes tokens between layers (kvf_stages, policy/policy.h).
 *
 * Fu et al., LazyLLM, arXiv:2407.14057, in its frontier form: because the sets of tokens that the stages
 * see are nested and nothing is computed twice, one number a token says all: the stages done. A token
 * with some but not all of them done waits with one hidden state (park.h), the output of the last stage
 * done; the paper's Aux Cache keeps one for every layer.
 *
 * The prompt is read stage by stage: stage 0 for all of it, then, with the scores of its last tokens, the
 * next stage for those that were kept, and so on. So the scores are those of the real question, which a
 * reading chunk by chunk does not know yet.
 *
 * At a boundary that folds (HoliTom), what is not kept of a video just read goes into what is, and is gone.
 *
 * The session's own sequence (s->kv) is stage 0, and its length the text's; each later stage has a sequence of
 * its own, plain or sparse, in the order in which tokens came to it. docs/lazyllm.md has the whole.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_LAZY_H
#define KVF_MODEL_LAZY_H

#include "kv/kv.h"
#include "model/park.h"

struct kvf_session;
typedef struct kvf_lazy kvf_lazy;

/* s->m, pool, policy, kv (layers of stage 0), forward and n_batch are set. Errors: ARG (a stage of a model
 * with sliding windows has no layer of global attention, which scores need), NOMEM. */
kvf_status kvf_lazy_open(kvf_lazy **out, struct kvf_session *s, kvf_error *err);
void kvf_lazy_close(kvf_lazy *z);

/* One step: compute the tokens of the timeline that stage 0 does not hold, through all stages; then s->logits
 * are those after the last. tell: report progress. On failure the session is as before the step. */
kvf_status kvf_lazy_step(struct kvf_session *s, bool tell, kvf_error *err);

/* Forget all but the text's first n tokens. */
void kvf_lazy_cut(struct kvf_session *s, int64_t n);

/* Where answers looked since the last prompt's end, as kvf_kv_tracked: in the last stage, from a prompt's last
 * token on. The layers before it look at everything, and at the text's ends most. */
kvf_status kvf_lazy_tracked(kvf_lazy *z, const float **mass, int64_t *n, kvf_error *err);

typedef struct kvf_lazy_counters {
    int64_t n_layer_token; /* tokens times layers computed since the last reset */
    int64_t n_revived;     /* of the tokens a step computed, those that an earlier step had passed over */
    int64_t n_done;        /* tokens of the text through all layers, now */
    int64_t n_waiting;     /* tokens with a hidden state, now */
    size_t park_bytes, park_file_bytes;
} kvf_lazy_counters;
void kvf_lazy_get_counters(const kvf_lazy *z, kvf_lazy_counters *out);
void kvf_lazy_reset_counters(kvf_lazy *z);

/* Tokens that a layer of the model holds. */
int64_t kvf_lazy_held(const kvf_lazy *z, int32_t layer);

/* Stages done of the text's token i: for tests. */
int32_t kvf_lazy_frontier(const kvf_lazy *z, int64_t i);

#endif
