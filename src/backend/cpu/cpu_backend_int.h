/* cpu_backend_int.h - the CPU backend from inside: shared by cpu_backend.c (table, element-wise ops,
 * products) and cpu_memory.c (digests, votes, where attention went).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_CPU_BACKEND_INT_H
#define KVF_BACKEND_CPU_CPU_BACKEND_INT_H

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_ops.h"
#include "base/race.h"

typedef struct kvf_cpu_backend {
    kvf_backend base;
    kvf_cpu_ops ops;
    bool f32;
    kvf_threads *threads;
    int32_t n_threads;

    uint8_t *packed[KVF_MATMUL_MAX]; /* activations in up to three forms */
    int64_t packed_cap[KVF_MATMUL_MAX];
    uint8_t *work; /* [n_threads][work_bytes] kernel scratch */
    int64_t work_bytes, work_cap;
    uint8_t *partial; /* split-KV results, scores of a vote */
    int64_t partial_cap;

    /* What really ran, for kernels(), which any thread may call while others compute. */
    _Atomic(const char *) ran_mm, ran_mv, ran_attn, ran_attn_decode, ran_score;
} kvf_cpu_backend;

static inline kvf_cpu_backend *kvf_cpu_self(kvf_backend *b) { return (kvf_cpu_backend *)b; }

/* Scratch without keeping its content: free first, so that the peak is the larger of the two. */
kvf_status kvf_cpu_grow_scratch(kvf_cpu_backend *c, uint8_t **buf, int64_t *cap, size_t bytes, kvf_error *err);
/* Per-worker scratch of `bytes` each. */
kvf_status kvf_cpu_grow_work(kvf_cpu_backend *c, size_t bytes, kvf_error *err);
static inline void *kvf_cpu_work_of(kvf_cpu_backend *c, int32_t worker)
{
    uint8_t *work = c->work + (size_t)worker * (size_t)c->work_bytes;
    kvf_race_write(work, (size_t)c->work_bytes);
    return work;
}
/* Run fn over n parts; on the calling thread when `elements` of work are few. */
void kvf_cpu_run_parts(kvf_cpu_backend *c, int64_t n, int64_t elements, kvf_task_fn fn, void *arg);

/* ---- cpu_attn.c ---- */
kvf_status kvf_cpu_op_attn(kvf_backend *b, const kvf_attn_args *a, kvf_error *err);

/* ---- cpu_memory.c ---- */
kvf_status kvf_cpu_op_kv_turn(kvf_backend *b, const kvf_kv_turn_args *a, kvf_error *err);
kvf_status kvf_cpu_op_kv_gather(kvf_backend *b, const kvf_kv_gather_args *a, kvf_error *err);
kvf_status kvf_cpu_op_attn_mass(kvf_backend *b, const kvf_attn_mass_args *a, kvf_error *err);
kvf_status kvf_cpu_op_digest(kvf_backend *b, const kvf_digest_args *a, int64_t n, kvf_error *err);
kvf_status kvf_cpu_op_reps(kvf_backend *b, const kvf_reps_args *a, kvf_error *err);
kvf_status kvf_cpu_op_vote(kvf_backend *b, const kvf_vote_args *a, kvf_error *err);

#endif
