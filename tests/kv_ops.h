/* kv_ops.h - any bytes as operations on the KV manager, checked against two models of it: for
 * tests/unit/test_kv_ops.c, which draws the bytes, and tests/fuzz/fuzz_kv.c, which is given them.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_KV_OPS_H
#define KVF_TESTS_KV_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum kv_op {
    KV_OP_CHUNK,  /* read a chunk of tokens */
    KV_OP_DECODE, /* a few tokens one by one */
    KV_OP_CUT,
    KV_OP_FORK,
    KV_OP_CLOSE,
    KV_OP_SAVE,   /* everything to a tier, which the sequence reads from now on */
    KV_OP_LOAD,   /* back to what a tier holds, or the beginning of it */
    KV_OP_MOVE,   /* the same in a new sequence of another pool: another budget */
    KV_OP_SQUEEZE, /* others take slots of the pool: blocks of tiers are dropped */
    KV_OP_RELIEVE,
    KV_OP_NO_MEMORY, /* an allocation of the next operation fails */
    KV_OP_NO_TIER,   /* a read of the next operation fails */
    KV_OP_POLICY, /* another policy from now on */
    KV_OP_CANCEL, /* a chunk that is not committed */
    KV_OP_DETACH, /* no tier any more, if all is in the pool */
    KV_OP_MAP,    /* the tier's memory moves */
    KV_OP_COUNT
} kv_op;

enum { KV_OPS_SHAPES = 7 }; /* first byte: kind of sequence, see kv_ops.c */

typedef struct kv_ops_report {
    int64_t done[KV_OP_COUNT];           /* operations that took place */
    int64_t no_memory, no_tier, no_room; /* failures that were reported as such and left no trace */
    int64_t fetched;                     /* blocks that came from a tier */
    int64_t compared;                    /* outputs, each bit for bit with the twin */
    double worst;                        /* largest difference from the formula, over sampled outputs */
    char why[240];                       /* of false */
} kv_ops_report;

/* Run the operations (three bytes each). false: a promise of kv.h is broken, and report->why says
 * which. report is added to. */
bool kv_ops_run(const uint8_t *data, size_t size, kv_ops_report *report);

#endif
