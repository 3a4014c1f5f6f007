/* vit_ops.h - the tower's own kernels: LayerNorm, activations, attention in both directions.
 *
 * Products with weights go through the backend (backend/backend.h). What a ViT needs besides is here, as
 * one table per instruction set: `vit_ref.c` is the definition, written to be read; vit_tmpl.h is the same for
 * vectors and compiled twice, vit_avx2.c and vit_avx512.c. A kernel works on a part on one thread and never
 * allocates; vit_attn.c splits the work.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_VISION_VIT_OPS_H
#define KVF_VISION_VIT_OPS_H

#include "base/cpu.h"
#include "base/threads.h"

typedef enum kvf_vit_act {
    KVF_VIT_GELU_TANH, /* x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) */
    KVF_VIT_GELU_QUICK, /* x / (1 + exp(-1.702 x)) */
    KVF_VIT_GELU_ERF,  /* x / 2 (1 + erf(x / sqrt 2)) */
    KVF_VIT_SILU       /* x / (1 + exp(-x)) */
} kvf_vit_act;

/* For every frame f and head h, over all n_pos positions, none masked:
 *     p_ij = softmax_j(scale q_i . k_j)     o_i = sum_j p_ij v_j     mass_fj = sum_hi p_ij
 * q, k, v, o: [n_frame][n_pos][n_head][head_dim]; head_dim a multiple of 8. */
typedef struct kvf_vit_attn_args {
    const float *q, *k, *v;
    float *o;       /* none of the others */
    float *mass;    /* [n_frame][n_pos] or NULL */
    int64_t n_frame, n_pos;
    int32_t n_head, head_dim;
    float scale;
} kvf_vit_attn_args;

/* Queries row0..row1 of one head of one frame. */
typedef struct kvf_vit_attn_part {
    const kvf_vit_attn_args *a;
    int64_t frame, row0, row1;
    int32_t head;
    float *mass;   /* [n_pos] out: sum of p over these queries; NULL: not asked for */
    void *scratch; /* attn_scratch() bytes, 64-byte aligned */
} kvf_vit_attn_part;

typedef struct kvf_vit_ops {
    const char *name; /* "avx512" */
    /* out = (x - mean) / sqrt(variance + eps) * weight + bias; out may be x. */
    void (*layernorm)(const float *x, const float *weight, const float *bias, float *out, int64_t width, float eps);
    void (*act)(float *x, int64_t n, kvf_vit_act act); /* in place */
    int64_t attn_rows; /* queries computed together: a good unit of splits */
    size_t (*attn_scratch)(const kvf_vit_attn_args *a);
    void (*attn)(const kvf_vit_attn_part *p);
} kvf_vit_ops;

/* The table of a level (AMX: that of AVX-512). */
const kvf_vit_ops *kvf_vit_ops_pick(kvf_cpu_level level);

extern const kvf_vit_ops kvf_vit_ops_ref, kvf_vit_ops_avx2, kvf_vit_ops_avx512;

/* Attention over the thread pool. Sums are taken in a fixed order: the same bits at every thread count.
 * Errors: NOMEM. */
kvf_status kvf_vit_attn(const kvf_vit_ops *ops, kvf_threads *threads, const kvf_mem *mem, const kvf_vit_attn_args *a,
                        kvf_error *err);

#endif
