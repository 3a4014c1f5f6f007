/* kernels.h - every kernel as the host sees it: one function that launches it on a stream.
 *
 * Pointers are device memory unless "host" is said; widths, heads and counts were checked by the caller.
 * Nothing here waits, allocates or fails by itself: what a launch reports is fetched by the caller with
 * cudaGetLastError. A function with a scratch pointer says how much of it is used.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_CUDA_KERNELS_H
#define KVF_CUDA_KERNELS_H

#include "cuda/simt.h"

extern "C" {
#include "backend/backend.h"
}

/* ---- k_vec.cu: one element or one row at a time ------------------------------------------------ */
void kvf_cuda_rmsnorm(const kvf_rmsnorm_args *a, cudaStream_t s);
void kvf_cuda_layernorm(const kvf_layernorm_args *a, cudaStream_t s);
void kvf_cuda_act(float *x, int64_t n, kvf_act act, cudaStream_t s); /* x = act(x) */
void kvf_cuda_add(float *x, const float *y, int64_t n, cudaStream_t s);
void kvf_cuda_glu(float *gate_up, const float *gate, int64_t n, kvf_act act, cudaStream_t s); /* up *= act(gate) */
void kvf_cuda_bias_rows(float *y, const float *bias, int64_t n_row, int64_t width, bool add, cudaStream_t s);
void kvf_cuda_to_bf16(const float *x, bf16 *out, int64_t n, cudaStream_t s);
void kvf_cuda_lse_merge(const kvf_lse_merge_args *a, cudaStream_t s);

/* ---- k_rope.cu: angles, rotation, and the way into and between slots ---------------------------- */
/* cos_sin as rope_table's; pos [n_tok] and inv_freq [n_rot / 2] in device memory. */
void kvf_cuda_rope_table(const int32_t *pos, const double *inv_freq, const kvf_rope_table_args *a, cudaStream_t s);
void kvf_cuda_rope(const kvf_rope_args *a, cudaStream_t s);

/* slot[e]: where the slot of entry e of a list lies. */
struct kvf_cuda_put {
    const float *k, *v;
    f16 *const *slot; /* of the entries from first / KVF_BLOCK on */
    int64_t n_tok;
    int32_t first; /* place in slot[0]'s block */
    int32_t n_head_kv, head_dim;
};
void kvf_cuda_kv_put(const kvf_cuda_put *a, cudaStream_t s);

struct kvf_cuda_turn {
    const f16 *const *src;
    f16 *const *dst;
    const float *cos_sin;
    int64_t n_tok;
    int32_t first, n_head_kv, head_dim, n_rot;
    kvf_rope_kind kind;
};
void kvf_cuda_kv_turn(const kvf_cuda_turn *a, cudaStream_t s);

/* Places from[i] of a list (all heads, K then V) to rows [n][2 * n_head_kv][head_dim], and rows to places
 * first .. first + n of a list. In two steps, since source and target may be the same slots. */
struct kvf_cuda_places {
    f16 *const *slot;
    const int32_t *from; /* head h: from[h * from_stride + i]; NULL: first + i */
    int64_t from_stride;
    f16 *rows;
    int64_t n;
    int32_t first, n_head_kv, head_dim;
};
void kvf_cuda_kv_pick(const kvf_cuda_places *a, cudaStream_t s);
void kvf_cuda_kv_place(const kvf_cuda_places *a, cudaStream_t s);

/* ---- k_weights.cu: weights as the device holds them (layout: quant.h) ---------------------------- */
struct kvf_cuda_weight {
    kvf_dtype type;
    int64_t n_out, n_in;
    size_t row_bytes; /* on the device */
    const uint8_t *data;
};
size_t kvf_cuda_row_bytes(kvf_dtype type, int64_t n_in);
/* Rows of the file's bytes to rows of the device's. */
void kvf_cuda_repack(kvf_dtype type, const uint8_t *file_rows, uint8_t *rows, int64_t n_row, int64_t n_in, cudaStream_t s);
/* Rows of a matrix to [n_row][n_in]: those of ids (device, may be NULL: row0..), times scale. */
void kvf_cuda_rows_f32(const kvf_cuda_weight *w, const int32_t *ids, int64_t n_row, float scale, float *out, cudaStream_t s);
void kvf_cuda_rows_bf16(const kvf_cuda_weight *w, int64_t row0, int64_t n_row, bf16 *out, cudaStream_t s);

/* ---- k_gemv.cu: up to eight tokens, straight from the quantised blocks --------------------------- */
#define KVF_CUDA_GEMV_MAX 8
/* x [n_tok][n_in] as int8 (arithmetic: mm.h of the CPU backend, form Q8); n_in a multiple of 32. */
size_t kvf_cuda_q8_bytes(int64_t n_tok, int64_t n_in);
void kvf_cuda_q8(const float *x, void *q8, int64_t n_tok, int64_t n_in, cudaStream_t s);
struct kvf_cuda_gemv {
    kvf_cuda_weight w;
    const float *x;    /* used by float weights and in exact mode */
    const void *q8;    /* else */
    int64_t n_tok;     /* 1..KVF_CUDA_GEMV_MAX */
    const float *bias; /* [n_out] or NULL */
    const float *gate; /* [n_tok][n_out] or NULL: the result is multiplied by act(gate) */
    kvf_act act;
    bool accumulate, exact;
    float *y; /* [n_tok][n_out] */
};
void kvf_cuda_gemv_run(const kvf_cuda_gemv *a, cudaStream_t s);

/* ---- k_gemm.cu: y [n_tok][n_out] (+)= x [n_tok][n_in] w [n_out][n_in]^T, bf16 in, fp32 sums ------- */
void kvf_cuda_gemm_bf16(const bf16 *x, const bf16 *w, float *y, int64_t n_tok, int64_t n_out, int64_t n_in, bool add,
                        cudaStream_t s);

/* ---- k_attn_*.cu --------------------------------------------------------------------------------- */
struct kvf_cuda_attn {
    const float *q;
    float *o, *lse;         /* lse may be NULL */
    int32_t n_tok, n_head, n_head_kv, head_dim;
    int32_t head_kv0, n_kv; /* KV heads to compute */
    float scale, softcap;
    const f16 *const *slot; /* [entries] */
    const uint8_t *valid;   /* [entries][2] or NULL */
    int32_t n_key;
    int64_t q_first, window;
    const int32_t *place;   /* [n_tok] or NULL */
    const int32_t *first;   /* [n_tok] or NULL */
    int32_t n_split;        /* runs of keys that are computed apart and merged */
    int32_t split_keys;     /* keys of a run, a multiple of KVF_BLOCK */
    int32_t key0;           /* the first run's first key: earlier ones no query sees; a multiple of KVF_BLOCK */
    float *part_o;          /* n_split > 1: [n_split][n_tok][n_head][head_dim] */
    float *part_lse;        /* and [n_split][n_tok][n_head] */
};
#define KVF_CUDA_HEAD_MAX 256
#define KVF_CUDA_DECODE_ROWS 16 /* query rows of a KV head that the decode kernel takes */
/* Once for each device, before the first launch: leave to use more than 48 KiB of shared memory. */
cudaError_t kvf_cuda_prefill_setup(void);
cudaError_t kvf_cuda_decode_setup(void);
cudaError_t kvf_cuda_mass_setup(void);
void kvf_cuda_attn_prefill(const kvf_cuda_attn *a, cudaStream_t s);
void kvf_cuda_attn_decode(const kvf_cuda_attn *a, cudaStream_t s);
void kvf_cuda_attn_join(const kvf_cuda_attn *a, cudaStream_t s); /* the runs, by lse */
/* mass [n_head][entries * 128] = sums of this call (not added to what is there); lse is an input. */
void kvf_cuda_attn_mass(const kvf_cuda_attn *a, float *mass, cudaStream_t s);
/* out [n] = sum over heads h0..h1 of mass [n_head][n]. */
void kvf_cuda_sum_heads(const float *mass, float *out, int32_t h0, int32_t h1, int64_t n, cudaStream_t s);

/* ---- k_digest.cu, k_vote.cu ----------------------------------------------------------------------- */
struct kvf_cuda_digest_item {
    const f16 *slot;
    int32_t n_tok;
};
void kvf_cuda_digest(const kvf_digest *g, const kvf_cuda_digest_item *items, int64_t n, uint8_t *out, cudaStream_t s);
void kvf_cuda_reps(const kvf_digest *g, const f16 *slot, const float *score, int32_t r, uint8_t *out, cudaStream_t s);

struct kvf_cuda_vote {
    kvf_digest g;
    const uint8_t *const *rows; /* device: digest of block b - block0 */
    int32_t unit, n_unit;
    int32_t skip;               /* units of rows[0] before the first that is voted on */
    int32_t n_q;                /* pooled queries of this batch */
    const float *q;             /* [n_q][n_head][head_dim], scaled */
    const float *lse;           /* [n_q][n_head] */
    kvf_vote_rule rule;
    float *s;                   /* scratch [n_q * n_head][n_unit] */
    float *best;                /* [n_head][n_unit] joined so far */
    bool first;                 /* batch */
};
size_t kvf_cuda_vote_shared(const kvf_digest *g);
cudaError_t kvf_cuda_vote_setup(void);
/* Queries i0 .. of q [n_all][n_head][head_dim], averaged `pool` at a time and scaled. */
void kvf_cuda_vote_pool(const kvf_vote_args *a, int64_t i0, int32_t n, float *q, float *lse, cudaStream_t s);
void kvf_cuda_vote_batch(const kvf_cuda_vote *a, cudaStream_t s);
/* vote [sets][n_unit] = share * best summed over the heads of each set. */
void kvf_cuda_vote_sum(const kvf_cuda_vote *a, float share, float *vote, cudaStream_t s);

/* ---- k_select.cu ---------------------------------------------------------------------------------- */
/* ids of the k largest of x [n] (ties: the lower index), ascending; *n_out of them: k, or n. NaN is last. */
void kvf_cuda_topk(const float *x, int32_t n, int32_t k, int32_t *ids, int32_t *n_out, cudaStream_t s);
/* ids of x [n] > cut or within the first `sink` or the last `recent`, ascending, and their number. */
void kvf_cuda_keep(const float *x, int32_t n, float cut, int32_t sink, int32_t recent, int32_t *ids, int32_t *n_out,
                   cudaStream_t s);
void kvf_cuda_gather(const void *src, const int32_t *ids, void *out, int64_t n, int64_t row_bytes, cudaStream_t s);
void kvf_cuda_argmax(const float *x, int64_t n_row, int32_t width, int32_t *out, cudaStream_t s);
struct kvf_cuda_sample {
    float temperature, top_p, min_p; /* temperature > 0; top_p 1 and min_p 0: off */
    int32_t top_k;                   /* 0: off */
    float u;                         /* 0 <= u < 1, the caller's random number */
};
void kvf_cuda_sample_row(const float *logits, int32_t width, const kvf_cuda_sample *p, int32_t *out, cudaStream_t s);

/* ---- k_video.cu ----------------------------------------------------------------------------------- */
/* out [n_frame - 1][n_tok]: cosine of the features x [n_frame][n_tok][width] of neighbouring frames. */
void kvf_cuda_frame_cosine(const float *x, int32_t n_frame, int32_t n_tok, int32_t width, float *out, cudaStream_t s);
/* out [n][n]: squared distances of the rows of x [n][width]. */
void kvf_cuda_distances(const float *x, int32_t n, int32_t width, float *out, cudaStream_t s);
/* Density peaks by k nearest neighbours: rho and delta [n] of the distances d2 [n][n]; k <= 32. */
void kvf_cuda_density(const float *d2, int32_t n, int32_t width, int32_t k, float *rho, float *delta, cudaStream_t s);
/* out [n_group][width]: means of the rows of x [n][width] by group [n]; rows with group < 0 are left out. */
void kvf_cuda_merge_mean(const float *x, const int32_t *group, int32_t n, int32_t width, int32_t n_group, float *out,
                         cudaStream_t s);

#endif
