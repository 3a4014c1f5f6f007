/* infllm_int.h - what infllm.c (options, layouts, identity) and infllm_lookup.c (which units) share.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_POLICY_INFLLM_INT_H
#define KVF_POLICY_INFLLM_INT_H

#include "policy/policy.h"

/* Places of the words in the option rows. AUTO is gone after init. */
enum { SELECT_BITS, SELECT_MEAN, SELECT_SUB, SELECT_BOUNDS, SELECT_PAPER };
enum { VOTE_AUTO, VOTE_GATE, VOTE_SOFT, VOTE_LIN };
enum { AGG_AUTO, AGG_MAX, AGG_MEAN };
enum { READING_AUTO, READING_MEAN, READING_NONE, READING_FINE };
enum { SETS_SHARED, SETS_KV };
enum { REPS_GROUP, REPS_HEAD };

typedef struct infllm_hit {
    float vote;
    int64_t unit; /* from 0 for unit0 */
} infllm_hit;

typedef struct infllm_layer {
    /* Running maximum of the fine votes, for decode. A unit's absolute number is its place + unit0. */
    float *vote;                     /* [n_set][n_unit]; owned */
    int64_t vote_cap, unit0, n_unit; /* n_unit 0: none */
    int64_t last;                    /* place in the text of the newest token that voted */
    int64_t *pick;                   /* [n_set][1 + ask]: how many, then the units, absolute numbers; owned */
    int64_t pick_cap;
    bool chosen; /* pick may stand for the decode steps to come */
} infllm_layer;

typedef struct infllm {
    /* options */
    int64_t init, window, block, topk, ask, repr, chunk, select, bits, sub, vote, agg, hold, sets, exact,
        reading, pool, neighbours, reps;
    double decay, floor, recall;
    char index[KVF_OPTION_TEXT_BYTES];

    int32_t n_layer, n_set;
    infllm_layer *layers; /* [n_layer]; owned */
    float *fresh;         /* [n_set][n_unit] votes of the lookup under way; owned */
    infllm_hit *hits;     /* [topk or ask, the larger]; owned */
    int64_t *near;        /* [topk or ask, the larger]; owned */
    int64_t fresh_cap, hits_cap, near_cap;
} infllm;

/* How a chunk of n_tok tokens chooses; document: it is read into a store. */
typedef struct infllm_lookup {
    bool any;     /* false: no unit is read */
    int64_t k;    /* most units */
    bool fine;    /* which digest votes */
    bool nearest; /* the external index answers instead of a vote */
    bool keep;    /* a decode step may go on from it: it was made as decode steps make theirs */
    kvf_vote_rule rule;
} infllm_lookup;

static inline bool infllm_has_index(const infllm *s)
{
    return s->index[0] != 'f' || s->index[1] != 'l' || s->index[2] != 'a' || s->index[3] != 't' ||
           s->index[4];
}

/* document: kvf_retrieve.reading. The rule of a document's chunk does not depend on its length, so that
 * its last, shorter one is what identity() says too. */
infllm_lookup kvf_infllm_lookup_for(const infllm *s, int64_t n_tok, bool document);

/* The k units with the highest votes, best first, ties by the lower number, none below floor (0: no
 * floor); hits is [k]. Returns how many. O(n + k log k) when votes come in random order. */
int64_t kvf_infllm_top(const float *vote, int64_t n, int64_t k, double floor, infllm_hit *hits);

kvf_status kvf_infllm_retrieve(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *err);
void kvf_infllm_forget(kvf_policy *p, int64_t n);

#endif
