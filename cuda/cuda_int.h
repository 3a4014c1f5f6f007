/* cuda_int.h - the CUDA backend from inside: one stream, one block of device memory, one ring of pinned
 * memory.
 *
 * Everything runs in the order it was asked for on one stream. So scratch may be given back as soon as the
 * launch that uses it is made: who takes it next comes later on the stream.
 *
 * What an op reads from the host (lists of slots, tokens, positions) goes through the ring: a pinned half
 * that the host writes and a device half of the same layout that kernels read. Outside a step each op sends
 * its part at once; within a step, which is recorded as a graph, one copy ahead of the graph sends all.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_CUDA_CUDA_INT_H
#define KVF_CUDA_CUDA_INT_H

#include "cuda/arena.h"
#include "cuda/kernels.h"

extern "C" {
#include "backend/backend_load.h"
}

struct kvf_cuda_lt; /* cuda_lt.cu: cuBLASLt, opened at its first use */

/* What kvf_weight.data points to, on the host. */
struct kvf_cuda_weight_box {
    kvf_cuda_weight w;
    bf16 *copy; /* [n_out][n_in] for prefill, or NULL */
};

/* Memory that grows to the largest request. */
struct kvf_cuda_scratch {
    void *at;
    size_t bytes;
};

enum kvf_cuda_scratch_kind {
    KVF_CUDA_X,       /* activations as q8 or bf16 */
    KVF_CUDA_GATE,    /* first product of a gated FFN */
    KVF_CUDA_W,       /* a weight matrix as bf16 */
    KVF_CUDA_PART,    /* partial attention, sums of attention, votes */
    KVF_CUDA_FAR,     /* digests on their way */
    KVF_CUDA_SCRATCHES
};

struct kvf_cuda_backend {
    kvf_backend base; /* first: ops get a kvf_backend */
    int device, n_sm;
    char name[128];
    bool f32;
    bool lost; /* a kernel or copy failed: nothing on the device can be trusted */
    cudaStream_t stream;
    cudaStream_t copy_stream;        /* copies beside the ops */
    cudaEvent_t ops_done, copied;

    char *memory;
    kvf_cuda_arena arena;
    uint64_t bf16_left; /* bytes that copies of weights may still take */
    kvf_cuda_scratch scratch[KVF_CUDA_SCRATCHES];

    char *ring, *ring_dev; /* pinned, device */
    size_t ring_bytes, ring_at;

    char *bounce; /* pinned, two halves: large copies in either direction */
    cudaEvent_t bounce_free[2];

    bool recording;     /* between step_begin and step_end, and nothing forced an end */
    size_t record_from; /* where the step's part of the ring begins */
    cudaGraphExec_t exec;

    kvf_cuda_lt *lt;
    bool lt_tried;

    const char *ran_mm, *ran_mv, *ran_attn, *ran_attn_decode, *ran_score, *ran_step;
};

static inline kvf_cuda_backend *kvf_cuda_self(kvf_backend *b) { return reinterpret_cast<kvf_cuda_backend *>(b); }

/* ---- cuda_memory.cu ------------------------------------------------------------------------------- */

#define KVF_CUDA_BOUNCE ((size_t)16 << 20) /* bytes of a half */

kvf_status kvf_cuda_memory_open(kvf_cuda_backend *c, uint64_t bytes, kvf_error *err);
void kvf_cuda_memory_close(kvf_cuda_backend *c);

/* Status of what was launched so far, as far as it is known without waiting. */
kvf_status kvf_cuda_check(kvf_cuda_backend *c, const char *what, kvf_error *err);
kvf_status kvf_cuda_fail(kvf_cuda_backend *c, cudaError_t e, const char *what, kvf_error *err);

kvf_status kvf_cuda_take(kvf_cuda_backend *c, void **out, size_t bytes, kvf_error *err);
void kvf_cuda_give(kvf_cuda_backend *c, void *p);
kvf_status kvf_cuda_need(kvf_cuda_backend *c, kvf_cuda_scratch_kind kind, size_t bytes, void **out, kvf_error *err);

/* A part of the ring: the host's side, to be filled, and where kernels will find it. */
struct kvf_cuda_part {
    char *host;
    const char *dev;
    size_t bytes;
};
kvf_status kvf_cuda_ring_take(kvf_cuda_backend *c, size_t bytes, kvf_cuda_part *out, kvf_error *err);
kvf_status kvf_cuda_ring_send(kvf_cuda_backend *c, const kvf_cuda_part *p, kvf_error *err);

/* Copies between pageable host memory and the device, complete on return to the host's side. Both end a
 * recording. scatter/gather: piece i is from[i] (to[i]), `bytes` each, one after another on the device. */
kvf_status kvf_cuda_upload(kvf_cuda_backend *c, void *dst, const void *src, size_t bytes, kvf_error *err);
kvf_status kvf_cuda_upload_pieces(kvf_cuda_backend *c, void *dst, const void *const *from, int64_t n, size_t bytes, kvf_error *err);
kvf_status kvf_cuda_download(kvf_cuda_backend *c, void *dst, const void *src, size_t bytes, kvf_error *err);

kvf_status kvf_cuda_flush(kvf_cuda_backend *c, kvf_error *err); /* run what was recorded */
kvf_status kvf_cuda_wait(kvf_cuda_backend *c, kvf_error *err);  /* flush, then all is done */
kvf_status kvf_cuda_op_host_alloc(kvf_backend *b, void **out, size_t bytes, kvf_error *err);
void kvf_cuda_op_host_release(kvf_backend *b, void *ptr);
kvf_status kvf_cuda_op_fetch(kvf_backend *b, void *dst, const void *src, size_t bytes, kvf_error *err);
kvf_status kvf_cuda_op_fetch_wait(kvf_backend *b, kvf_error *err);
kvf_status kvf_cuda_step_begin(kvf_backend *b, kvf_error *err);
kvf_status kvf_cuda_step_end(kvf_backend *b, kvf_error *err);

/* ---- cuda_matmul.cu ------------------------------------------------------------------------------- */
kvf_status kvf_cuda_op_weight_init(kvf_backend *b, kvf_weight *w, kvf_dtype type, int64_t n_out, int64_t n_in,
                                   const void *data, kvf_error *err);
void kvf_cuda_op_weight_fini(kvf_backend *b, kvf_weight *w);
kvf_status kvf_cuda_op_embed(kvf_backend *b, const kvf_embed_args *a, kvf_error *err);
kvf_status kvf_cuda_op_matmul(kvf_backend *b, const kvf_matmul_args *a, kvf_error *err);
kvf_status kvf_cuda_op_matmul_glu(kvf_backend *b, const kvf_matmul_glu_args *a, kvf_error *err);

/* cuda_lt.cu. open returns NULL where cuBLASLt cannot be loaded; run is false where it has no kernel. */
kvf_cuda_lt *kvf_cuda_lt_open(kvf_cuda_backend *c);
void kvf_cuda_lt_close(kvf_cuda_backend *c, kvf_cuda_lt *lt);
bool kvf_cuda_lt_gemm(kvf_cuda_lt *lt, const bf16 *x, const bf16 *w, float *y, int64_t n_tok, int64_t n_out, int64_t n_in,
                      bool add, cudaStream_t s);

/* ---- cuda_attn.cu --------------------------------------------------------------------------------- */
/* How a call is cut into runs of keys; a pure function of shape and device. */
struct kvf_cuda_plan {
    bool decode;
    int32_t n_split, split_keys, key0;
};
kvf_cuda_plan kvf_cuda_attn_plan(const kvf_attn_args *a, int32_t n_kv, int32_t n_sm);
kvf_status kvf_cuda_op_attn(kvf_backend *b, const kvf_attn_args *a, kvf_error *err);
kvf_status kvf_cuda_op_attn_mass(kvf_backend *b, const kvf_attn_mass_args *m, kvf_error *err);
kvf_status kvf_cuda_op_kv_put(kvf_backend *b, const kvf_kv_put_args *a, kvf_error *err);
kvf_status kvf_cuda_op_kv_turn(kvf_backend *b, const kvf_kv_turn_args *a, kvf_error *err);
kvf_status kvf_cuda_op_kv_gather(kvf_backend *b, const kvf_kv_gather_args *a, kvf_error *err);

/* ---- cuda_far.cu ---------------------------------------------------------------------------------- */
kvf_status kvf_cuda_op_digest(kvf_backend *b, const kvf_digest_args *a, int64_t n, kvf_error *err);
kvf_status kvf_cuda_op_reps(kvf_backend *b, const kvf_reps_args *a, kvf_error *err);
kvf_status kvf_cuda_op_vote(kvf_backend *b, const kvf_vote_args *a, kvf_error *err);

/* ---- cuda_device.cu: the second table -------------------------------------------------------------- */
extern const kvf_device_ops kvf_cuda_device_ops;

#endif
