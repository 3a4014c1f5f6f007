/* policy.h - what a KV-compression method is.
 *
 * A policy DECIDES (which KV blocks attention reads); the KV manager (kv/) and a backend ACT. A
 * policy is therefore plain C on host arrays, and one implementation serves every device. A method
 * is one file ending in one const kvf_policy_ops, named in policy/registry.c;
 * docs/adding-a-policy.md walks through it. A NULL hook passes through.
 *
 * One session calls its policy from one thread, in this order ('?': only if the hook is set):
 *     init?  { select? } per layer, per chunk   fini?
 *
 * Positions are places in the text. Blocks are KVF_BLOCK consecutive tokens of one layer.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_POLICY_POLICY_H
#define KVF_POLICY_POLICY_H

#include <stdbool.h>

#include "base/error.h"
#include "base/mem.h"
#include "base/option.h"

#define KVF_POLICY_ABI 1u /* raised when an existing member changes */

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
} kvf_policy_ops;

/* Open the policy `spec` names, "name" or "name:key=value,...". On failure *out is NULL: NOT_FOUND
 * (no such name; the message lists those there are), ARG (bad option), NOMEM. Close takes NULL. */
kvf_status kvf_policy_open(kvf_policy **out, const char *spec, kvf_dims dims, const kvf_mem *mem, kvf_error *err);
void kvf_policy_close(kvf_policy *p);

/* The spec with every option spelled out, cut to cap. */
void kvf_policy_print(const kvf_policy *p, char *out, size_t cap);

/* i-th registered policy, NULL past the end. */
const kvf_policy_ops *kvf_policy_at(int64_t i);

#endif
