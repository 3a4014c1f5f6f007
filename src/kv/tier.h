/* tier.h - where blocks go that do not fit the pool: what the KV manager asks of a store.
 *
 * A tier holds a prefix of a sequence: whole groups of KVF_GROUP_BLOCKS blocks of every layer, and at
 * the end perhaps a shorter group. What it holds never changes. The KV manager copies blocks into slots
 * and reads digests in place.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_KV_TIER_H
#define KVF_KV_TIER_H

#include "base/error.h"

/* A group is 2048 tokens: the unit of commit, of sharing between documents and of the digests' values.
 * A multiple of every chunk length that a store accepts. */
#define KVF_GROUP_BLOCKS 16
#define KVF_GROUP_TOKENS 2048

typedef struct kvf_tier kvf_tier;

typedef struct kvf_tier_ops {
    /* Copy block `block` of `layer` to dst (a slot's bytes), checksum verified. */
    kvf_status (*read)(kvf_tier *t, int32_t layer, int64_t block, void *dst, kvf_error *err);
    /* These blocks will be read soon; start reading them from disk. (optional) */
    void (*expect)(kvf_tier *t, int32_t layer, const int64_t *blocks, int64_t n);
    /* Digests of group `group` of `layer`: [blocks of the group][digest_bytes] in place, checksum
     * verified once. The pointer is valid until epoch() changes, which outside of hold any call may do. */
    kvf_status (*digests)(kvf_tier *t, int32_t layer, int64_t group, const void **out, kvf_error *err);
    uint64_t (*epoch)(kvf_tier *t);
    /* Between the two, pointers of digests() stay valid and epoch() does not change. */
    void (*hold)(kvf_tier *t);
    void (*unhold)(kvf_tier *t);
} kvf_tier_ops;

struct kvf_tier {
    const kvf_tier_ops *ops;
    int64_t n_token;     /* tokens it holds, from the start of the sequence */
    size_t digest_bytes; /* of one block, coarse and fine together; 0: none kept */
};

#endif
