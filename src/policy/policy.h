/* policy.h - what a KV-compression method is.
 *
 * A policy DECIDES (which KV blocks attention reads); the KV manager (kv/) and a backend ACT. A
 * policy is therefore plain C on host arrays, and one implementation serves every device. A method
 * is one file ending in one const kvf_policy_ops, named in policy/registry.c;
 * docs/adding-a-policy.md walks through it. A NULL hook passes through.
 *
 * One session calls its policy from one thread, in this order ('?': only if the hook is set):
 *     init?  { select? | retrieve? } per layer, per chunk, or keep? per stage, per step, or evict?   forget?   fini?
 *
 * Positions are places in the text. Blocks are KVF_BLOCK consecutive tokens of one layer.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_POLICY_POLICY_H
#define KVF_POLICY_POLICY_H

#include <stdbool.h>

#include "base/digest.h"
#include "base/error.h"
#include "base/mem.h"
#include "base/option.h"

#define KVF_POLICY_ABI 5u /* raised when an existing member changes */

typedef struct kvf_dims {
    int32_t n_layer, n_head, n_head_kv, head_dim;
} kvf_dims;

/* What a policy is asked before the attention of one layer over one chunk. */
typedef struct kvf_select {
    int32_t layer;
    int64_t n_past;  /* tokens before the chunk */
    int64_t n_tok;   /* tokens of the chunk, the newest n_tok of n_past + n_tok */
    int64_t n_block; /* blocks of past and chunk; the last may be partly filled */
} kvf_select;

/* What a policy with a memory asks of the KV manager (InfLLM, Xiao et al. 2024, arXiv:2402.04617).
 * Constant after init. The past of a chunk is then, per layer:
 *     init    tokens 0..init
 *     units   `unit` tokens each, from init on, as far as they are older than the window
 *     rest    what is older than the window and no unit yet
 *     window  the last `window` tokens of each query (distances 0..window - 1)
 * The window is read at true distances. All else is read at distance window - 1: init, rest, and of the
 * units those that retrieve() names. */
typedef struct kvf_memory {
    int64_t init, window;  /* tokens; init a multiple of unit, may be 0 */
    int32_t unit;          /* 16, 32, 64 or 128 */
    int32_t n_chunk;       /* tokens of a prefill chunk, 16..2048, <= window, divides 2048 */
    int32_t n_set;         /* block sets per layer: 1, or the number of KV heads */
    int64_t n_unit;        /* most units of a set that one query reads */
    kvf_digest coarse, fine; /* of blocks' raw keys, for votes; kind NONE: not kept */
    int32_t n_repr;        /* REPS: representative tokens of a unit; its scores are kept up then */
    char index[48];        /* "": coarse votes by scan; else kind of an external index (kv/index.h) */
    double recall;         /* least share of the exact best units such an index must find, 0..1 */
} kvf_memory;

/* Asked of a policy with a memory before a layer's attention over a chunk, after the window's. */
typedef struct kvf_retrieve {
    int32_t layer, n_set;
    int64_t n_past, n_tok;   /* tokens before the chunk, of the chunk */
    bool reading;            /* the chunk is part of a document being read into a store: no question in it */
    int64_t unit0, n_unit;   /* units unit0..unit0 + n_unit may be chosen; n_unit >= 1 */
    void *lookup;            /* first argument of the two below; valid during the call */
    /* Votes for all units, [rule->per_kv_head ? n_head_kv : 1][n_unit], by the coarse or fine digests. */
    kvf_status (*vote)(void *lookup, bool fine, const kvf_vote_rule *rule, float *vote, kvf_error *err);
    /* The k best units (numbers from 0 for unit0) for the chunk's mean query, summed over heads, from the
     * external index. *n <= k. */
    kvf_status (*nearest)(void *lookup, int64_t k, int64_t *units, int64_t *n, kvf_error *err);
} kvf_retrieve;

/* What a policy that prunes tokens between layers asks for (LazyLLM, Fu et al. 2024, arXiv:2407.14057).
 * Constant after init. The layers are cut into stages; a token that is not kept at the end of a stage is
 * not computed, and not read, in those after it, in this step. What was computed is never computed again:
 * a later step that keeps the token goes on from where it stopped. */
#define KVF_STAGES_MAX 16
typedef struct kvf_scoring {
    int32_t n_row;   /* the newest n_row tokens of what is added to the text give the scores, >= 1; at most a batch */
    int32_t n_layer; /* in the stage's last n_layer layers of global attention (all, if it has fewer), >= 1 */
    bool peak;       /* of a token the head that looks at it most, instead of the mean over heads */
} kvf_scoring;

typedef struct kvf_stages {
    int32_t n;                     /* stages, 2..KVF_STAGES_MAX */
    int32_t first[KVF_STAGES_MAX]; /* their first layers: 0, then rising, < n_layer */
    kvf_scoring score[KVF_STAGES_MAX]; /* what is scored at a stage's end; not of the last stage */
    bool fold[KVF_STAGES_MAX]; /* tokens given as embeddings that the step added and that are not kept at the
                                  stage's end are folded into those that are (HoliTom), and never come back */
    int64_t hold;     /* decode steps that one choice serves; 0: what the text's last addition chose stays */
    const char *park; /* "": waiting hidden states stay in memory; else a folder for those beyond the budget */
} kvf_stages;

/* Asked at the end of a stage that is not the last. */
typedef struct kvf_keep {
    int32_t stage;      /* that has ended, from 0 */
    int64_t n;          /* tokens in it, >= 1 */
    const int32_t *pos; /* [n] their places in the text, rising; the last is the text's newest */
    const float *score; /* [n] attention probability, mean over the scoring layers, their heads and the scoring
                           queries */
    const uint8_t *embedded; /* [n] the token was given as an embedding; NULL: none was */
    int64_t n_text;     /* tokens of the text */
    int64_t n_before;   /* of which were there before the step */
    int64_t n_row;      /* newest tokens that gave the scores, this time */
} kvf_keep;

/* What a policy that evicts asks for: of each layer's plain sequence only so many tokens stay, for each KV
 * head its own (SnapKV, KeyDiff). What is evicted is gone. Constant after init. */
typedef struct kvf_budget {
    int64_t tokens;   /* kept in every layer; evict() is asked when more are held */
    int32_t n_row;    /* newest queries of a prompt whose attention evict() wants to see; 0: none */
    bool every_chunk; /* asked after every chunk of a prompt, not only after its last */
} kvf_budget;

typedef struct kvf_evict {
    int32_t layer;
    int64_t n;          /* tokens held, the oldest first; more than `keep` */
    int64_t keep;       /* kvf_budget.tokens */
    const float *mass;  /* [n_head][stride]: attention of the newest n_row queries, summed, or NULL */
    int64_t stride;
    int32_t n_row;      /* fewer than asked for in a last layer, where only the last query is computed */
    void *lookup;       /* first argument of keys; valid during the call */
    kvf_status (*keys)(void *lookup, int32_t head_kv, float *keys, kvf_error *err); /* [n][head_dim], as stored */
} kvf_evict;

typedef struct kvf_policy {
    const struct kvf_policy_ops *ops;
    kvf_dims dims; /* the model's; constant */
    void *state;   /* ops->state_size bytes: zeroed, options set */
    const kvf_mem *mem;
} kvf_policy;

typedef struct kvf_policy_ops {
    uint32_t abi;              /* KVF_POLICY_ABI; the registry refuses any other value */
    const char *name;          /* as in the spec "window:window=4096" */
    const char *source;        /* the paper: authors, year, identifier; or "" */
    const char *help;          /* one line */
    const kvf_option *options; /* name, default, range, help; ends with {0}; NULL: none */
    size_t state_size;         /* bytes */

    kvf_status (*init)(kvf_policy *p, kvf_error *err); /* if it fails, fini is not called */
    void (*fini)(kvf_policy *p);

    /* Set use[b] to 1 for the blocks attention reads, to 0 for the others. use is [s->n_block], the
     * caller's, unset on entry. Blocks that hold tokens of the chunk are read in any case.
     * (optional: every block) */
    kvf_status (*select)(kvf_policy *p, const kvf_select *s, uint8_t *use, kvf_error *err);

    /* Fill *m: keys are stored raw and far blocks are retrieved. (optional: no memory) */
    void (*memory)(const kvf_policy *p, kvf_memory *m);

    /* Set use[set][u] (set < n_set, u < n_unit) to 1 for the units attention reads, to 0 for the others.
     * use is unset on entry. (with memory: required) */
    kvf_status (*retrieve)(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *err);

    /* Whatever was remembered from earlier calls about tokens n and later, and all votes, is void: the
     * sequence was cut, loaded or a document ended. (optional) */
    void (*forget)(kvf_policy *p, int64_t n);

    /* Name of what is computed: two specs with the same identity give the same keys and values while a
     * document is read. (with memory: required) */
    void (*identity)(const kvf_policy *p, char *out, size_t cap);

    /* Fill *s: tokens are pruned between layers. (optional: every token goes through every layer) */
    void (*stages)(const kvf_policy *p, kvf_stages *s);

    /* Set keep[i] to 1 for the tokens that go on to the next stage, to 0 for the others. keep is [k->n],
     * unset on entry; the newest token goes on in any case. (with stages: required) */
    kvf_status (*keep)(kvf_policy *p, const kvf_keep *k, uint8_t *keep, kvf_error *err);

    /* Fill *b: tokens are evicted. (optional: none is; not together with memory or stages) */
    void (*budget)(const kvf_policy *p, kvf_budget *b);

    /* Write the places to keep, stay [n_head_kv][e->keep], each row rising. (with budget: required) */
    kvf_status (*evict)(kvf_policy *p, const kvf_evict *e, int32_t *stay, kvf_error *err);

    /* Write the spec with every option spelled out. (optional: name and options) */
    void (*print)(const kvf_policy *p, char *out, size_t cap);
} kvf_policy_ops;

/* Open the policy `spec` names, "name" or "name:key=value,...", or several joined by '+' (chain.c). On failure *out is NULL: NOT_FOUND
 * (no such name; the message lists those there are), ARG (bad option), NOMEM. Close takes NULL. */
kvf_status kvf_policy_open(kvf_policy **out, const char *spec, kvf_dims dims, const kvf_mem *mem, kvf_error *err);
void kvf_policy_close(kvf_policy *p);

/* chain.c, for kvf_policy_open: does the spec name more than one policy? Then open it; ARG also if members decide
 * the same, or cannot go together. */
bool kvf_policy_is_chain(const char *spec);
kvf_status kvf_policy_open_chain(kvf_policy **out, const char *spec, kvf_dims dims, const kvf_mem *mem, kvf_error *err);

/* The spec with every option spelled out, cut to cap. */
void kvf_policy_print(const kvf_policy *p, char *out, size_t cap);

/* i-th registered policy, NULL past the end. */
const kvf_policy_ops *kvf_policy_at(int64_t i);

#endif
