/* window.c - attention sinks and a sliding window.
 *
 * Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453, sec. 3:
 * the first few tokens and the most recent ones are read, what lies between is not.
 * Differs from the paper: whole blocks are chosen, so up to KVF_BLOCK - 1 tokens more than asked are
 * read at either end; and tokens keep their positions in the text instead of their places in the
 * cache, so the text may not be longer than the model's context.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "policy/policy.h"

enum { BLOCK = 128 }; /* KVF_BLOCK of the KV manager, which a policy does not include */

typedef struct window {
    int64_t sink;   /* leading tokens always read */
    int64_t window; /* most recent tokens always read */
} window;

/* One set serves the whole chunk, so it starts where the window of the chunk's first token does. */
static kvf_status window_select(kvf_policy *p, const kvf_select *s, uint8_t *use, kvf_error *err)
{
    (void)err;
    const window *w = p->state;
    int64_t first = s->n_past - w->window + 1, n_sink = (w->sink + BLOCK - 1) / BLOCK;
    if (first < 0) first = 0;
    for (int64_t b = 0; b < s->n_block; b++) use[b] = b < n_sink || (b + 1) * BLOCK > first;
    return KVF_OK;
}

static const kvf_option window_options[] = {
    KVF_OPT_I64(window, sink, 128, 0, 1 << 20, "leading tokens always read"),
    KVF_OPT_I64(window, window, 4096, 1, 1 << 30, "most recent tokens always read"),
    { 0 },
};

const kvf_policy_ops kvf_policy_window = {
    .abi = KVF_POLICY_ABI, .name = "window", .source = "Xiao et al. 2023, arXiv:2309.17453",
    .help = "first tokens and most recent tokens only (StreamingLLM)",
    .options = window_options, .state_size = sizeof(window), .select = window_select,
};
