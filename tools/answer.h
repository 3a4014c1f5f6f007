/* answer.h - read a prompt, write the answer as it comes, measure both.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_ANSWER_H
#define KVFOLD_TOOLS_ANSWER_H

#include <cJSON.h>

#include "engine.h"
#include "prompt.h"

typedef struct answer_request {
    const token_list *prompt;
    int64_t max_tokens;
    bool ignore_eos;  /* the end of the answer does not end it */
    const char *stop; /* end before this text; NULL: none */
    bool trim;        /* leave out white space in front and behind */
    bool stream;      /* write to stdout as it comes */
    const char *expect; /* write nothing, say how likely this answer is; NULL: write */
    bool plain;         /* the prompt is a plain frame */
    double start_s;   /* when the question was asked, clock_s() */
} answer_request;

typedef struct answer {
    buffer text;        /* valid UTF-8 */
    const char *finish; /* "stop", "length", "context", "cancelled", "output" or "expected"; static */
    int64_t n_prompt, n_reused, n_computed, n_generated;
    int64_t n_steps; /* tokens sampled: those generated and the one that ended the answer */
    double ttft_ms, total_ms;
    double prefill_tps, decode_tps; /* 0: nothing to measure */
    /* With expect: natural log of the probability of all its tokens and of the first of them, and how many
     * of them the model would have written itself, given those before. */
    double logprob, logprob_first;
    int64_t n_expected, n_first_choice;
    double read_share;  /* of the prompt's tokens times layers, what was computed; 1 without pruning */
    kvf_stats stats;
} answer;

/* Run it. On failure a->text holds what was generated before. Errors: those of the session; LIMIT
 * with a message for users if the prompt does not fit. */
kvf_status answer_run(answer *a, engine *e, const answer_request *r, kvf_error *err);

/* The line that stands for the answer where one was expected: how likely it was. */
void answer_print_expected(const answer *a);

/* One line on standard error: tokens read, time to first token, speeds, memory. */
void answer_summary(const answer *a);

/* The object of "ask --json"; its array "citations" is empty. */
cJSON *answer_json(const answer *a, const engine *e);

void answer_free(answer *a);

#endif
