/* forward.h - runs a chunk of tokens through the layers.
 *
 * Owns the activations of one chunk: about (2 n_embd + 2 n_head head_dim + n_ff + ...) floats a
 * token. KV goes to the KV manager; what attention reads is the policy's choice.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_FORWARD_H
#define KVF_MODEL_FORWARD_H

#include "kv/kv.h"
#include "model/model.h"

typedef struct kvf_forward kvf_forward;

/* n_batch: most tokens of a chunk. far: distance at which a memory reads far keys (its window - 1), 0
 * without one. Activations are allocated for the largest chunk seen. */
kvf_status kvf_forward_open(kvf_forward **out, const kvf_model *m, int64_t n_batch, int64_t far, kvf_error *err);
void kvf_forward_close(kvf_forward *f);
size_t kvf_forward_bytes(const kvf_forward *f);

typedef struct kvf_chunk {
    const kvf_token *tokens; /* [n_tok], each < n_vocab; below 0 where embd has a row */
    const float *const *embd; /* [n_tok] embeddings [n_embd], host, NULL for a token's own; or NULL */
    int64_t n_tok;           /* 1..n_batch */
    int64_t n_out;           /* hidden states wanted, of the last n_out tokens; 0: only KV */
    bool evict;              /* the policy evicts after this chunk */
    bool reading;            /* a document is being read into a store (kv.h) */
} kvf_chunk;

/* Compute the chunk after the kv's committed tokens and commit it. On failure kv is unchanged.
 * Errors: LIMIT, NOMEM. */
kvf_status kvf_forward_run(kvf_forward *f, kvf_kv *kv, kvf_policy *policy, const kvf_chunk *c, kvf_error *err);

/* Some of the layers over some tokens of a text (LazyLLM): stage by stage, a token's hidden state waits
 * outside between them. */
typedef struct kvf_part {
    kvf_kv *kv;              /* of these layers alone: its layer 0 is layer0 */
    kvf_policy *policy;      /* asked by a kv with a memory */
    int32_t layer0, layer1;  /* layers layer0 <= l < layer1 */
    const kvf_token *tokens; /* [n_tok] if layer0 is 0, else NULL; embd as in kvf_chunk */
    const float *const *embd;
    const int32_t *pos;      /* [n_tok] positions in the text, rising */
    float *const *row;       /* [n_tok] each [n_embd], host: hidden states, read unless layer0 is 0 and written
                                unless layer1 is the last; may be NULL if neither */
    int64_t n_tok, n_out;    /* n_out as in kvf_chunk; only read if layer1 is the last layer's end */
    int32_t mass_layer;      /* if mass is set: from this layer on, those of global attention add theirs to it */
    float *mass;             /* as in kvf_kv_attend_args, or NULL */
    int64_t n_mass;
    bool mass_peak, mass_unread; /* as in kvf_kv_attend_args */
} kvf_part;

/* Compute and commit the tokens to p->kv, which kvf_kv_arrange may have been told an order of. On failure
 * kv has its length from before, and the rows are unchanged unless the device failed. Errors: LIMIT, NOMEM. */
kvf_status kvf_forward_part(kvf_forward *f, const kvf_part *p, kvf_error *err);

/* Logits of the last run: rows first..first + n of its n_out, into logits [n][n_vocab] (host). */
kvf_status kvf_forward_logits(kvf_forward *f, int64_t first, int64_t n, float *logits, kvf_error *err);

#endif
