/* cpu_ops.h - the CPU kernels: one table, scalar reference first, overridden level by level.
 *
 * A kernel here is single-threaded and works on a part of its op; cpu_backend.c packs, splits
 * and hands parts to the thread pool. `*_ref.c` defines an op; AVX2, AVX-512 and AMX versions
 * are held to it by tests/parity. A member that a level does not override stays the level's
 * below. Kernels never allocate: scratch comes with the call, 64-byte aligned.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_CPU_OPS_H
#define KVF_BACKEND_CPU_CPU_OPS_H

#include "backend/backend.h"
#include "base/cpu.h"
#include "base/half.h"

/* ---- Matrix product -------------------------------------------------------------------
 * y[t][r] (+)= sum_k x[t][k] w[r][k] + bias[r]. Activations are first packed into the kernel's
 * own form (int8 blocks, bf16 tiles, or plain f32), once for all threads and all weights. */
typedef struct kvf_mm_part {
    const kvf_weight *w;
    const void *x;      /* packed by pack, all n_tok rows */
    int64_t n_tok;
    int64_t row0, row1; /* output rows of this part; row0 a multiple of kernel->row_align */
    const float *bias;  /* [n_out] or NULL */
    float *y;           /* y[t * y_stride + r] */
    int64_t y_stride;
    bool accumulate;
    void *scratch;      /* scratch_bytes() of this kernel */
} kvf_mm_part;

typedef struct kvf_mm_kernel {
    const char *name;  /* "avx512_vnni": appears in kvf_stats.kernels */
    int32_t x_form;    /* kernels with equal x_form share packed activations */
    int32_t row_align; /* granularity of row splits */
    size_t (*x_bytes)(int64_t n_tok, int64_t n_in);
    /* Pack rows t0..t1 of x [n_tok][n_in] f32; t0 a multiple of pack_align. */
    int32_t pack_align;
    void (*pack)(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out);
    size_t (*scratch_bytes)(kvf_dtype type, int64_t n_tok, int64_t n_in);
    void (*run)(const kvf_mm_part *p);
} kvf_mm_kernel;

/* ---- Attention ------------------------------------------------------------------------ */
typedef struct kvf_attn_part {
    const kvf_attn_args *a;
    int32_t head_kv;      /* this KV head and its group of query heads */
    int64_t tok0, tok1;   /* queries of this part */
    int64_t key0, key1;   /* prefill: 0, n_key. Decode: a run of whole blocks (split-KV) */
    float *o;             /* NULL: write a->o and a->lse. Else partial results of this split:
                             o [tok1 - tok0][group][head_dim], lse [tok1 - tok0][group] */
    float *lse;
    void *scratch;        /* attn_scratch_bytes() */
} kvf_attn_part;

/* ---- Memory ------------------------------------------------------------------------------
 * Query rows lie along the lanes: row i * pad + g is query i, head g of the KV head's group; `pad` is the
 * group rounded up to a power of two, and n_lane = queries * pad rounded up to KVF_ROW_LANES. Rows
 * between group and pad, and those past the last query, are zero; what comes of them is not read. */
#define KVF_ROW_LANES 16

typedef struct kvf_rows {
    int64_t n_q, n_lane;
    int32_t group, pad, head_dim;
    const float *q; /* [head_dim][n_lane], times the attention's scale */
} kvf_rows;

/* Rows that are a query head's of the chunk of a power of two lanes from lane i on; none: <= 0. Rows that fill up
 * a group are at its end. */
static inline int64_t kvf_rows_real(const kvf_rows *r, int64_t i, int64_t chunk)
{
    int64_t n = r->n_q * r->pad - i;
    if (r->pad >= chunk && r->group - i % r->pad < n) n = r->group - i % r->pad;
    return n < chunk ? n : chunk;
}

/* Scores of one block's digest for one KV head: s[u * n_lane + lane] for units unit0 <= u < unit1 of the
 * block (`unit` tokens each), as base/digest.h defines them. */
typedef struct kvf_score_part {
    const kvf_rows *rows;
    const kvf_digest *digest;
    const void *row; /* this KV head's digest of the block */
    int32_t unit, unit0, unit1;
    float *s; /* of unit unit0 */
    void *scratch;
} kvf_score_part;

/* Column sums of one block for one KV head's rows (kvf_attn_mass_args). */
typedef struct kvf_mass_part {
    const kvf_rows *rows;
    const float *lse;       /* [n_lane]; rows that count nothing: +inf */
    const kvf_f16 *k;       /* [KVF_BLOCK][head_dim] */
    int32_t key0, key1;     /* places of the block that hold keys */
    int64_t base;           /* place of the block's first key in the list */
    int64_t q_first, window;
    float softcap;
    float *sum;             /* [KVF_BLOCK][pad, at least KVF_ROW_LANES]: added to at row % that width */
    void *scratch;
} kvf_mass_part;

typedef struct kvf_cpu_ops {
    kvf_cpu_level level;
    unsigned flags;

    /* Pure choice: which kernel multiplies this type with this many tokens. f32: exact mode. */
    const kvf_mm_kernel *(*mm_pick)(const struct kvf_cpu_ops *ops, kvf_dtype type, int64_t n_tok, bool f32);

    /* Row of n elements of a type to f32; n a multiple of the type's block. */
    void (*dequant)(kvf_dtype type, const void *src, float *dst, int64_t n);

    void (*rmsnorm)(const float *x, const float *weight, float *out, int64_t width, float eps);
    /* cos_sin: [n_rot / 2] cos then [n_rot / 2] sin, mscale applied; x: [n_head][head_dim] */
    void (*rope)(float *x, int32_t n_head, int32_t head_dim, int32_t n_rot, const float *cos_sin, kvf_rope_kind kind);
    void (*f32_to_f16)(const float *x, kvf_f16 *out, int64_t n);
    void (*glu)(float *gate, const float *up, int64_t n, kvf_act act);
    void (*add)(float *x, const float *y, int64_t n);
    void (*scale)(float *x, float s, int64_t n);
    void (*lse_merge)(float *o, float *lse, const float *o2, const float *lse2, int32_t head_dim); /* one row */

    /* Prefill form (many queries) and decode form (few queries, all heads of a group at once). */
    const char *attn_name, *attn_decode_name; /* for kvf_stats.kernels */
    int64_t attn_decode_max;                  /* n_tok up to which the decode form is used */
    int64_t (*attn_tile)(const kvf_attn_args *a); /* queries per prefill part: a good tok1 - tok0 */
    size_t (*attn_scratch_bytes)(const kvf_attn_args *a, int64_t n_tok);
    void (*attn)(const kvf_attn_part *p);
    size_t (*attn_decode_scratch_bytes)(const kvf_attn_args *a, int64_t n_tok);
    void (*attn_decode)(const kvf_attn_part *p);

    const char *score_name;
    void (*score)(const kvf_score_part *p);
    size_t (*score_scratch_bytes)(const kvf_rows *rows);
    /* The same two for BITS, where a level has a kernel of its own for them; NULL: the two above. */
    void (*score_bits)(const kvf_score_part *p);
    size_t (*score_bits_scratch_bytes)(const kvf_rows *rows);
    void (*mass)(const kvf_mass_part *p); /* scratch: [KVF_BLOCK][head_dim] floats */
    /* KVF_ROW_LANES columns of n floats, rows stride apart: s = exp(s) / (sum of exp(s) + exp(gate)), gate
     * [KVF_ROW_LANES]; NULL: without. */
    void (*share_columns)(float *s, int64_t n, int64_t stride, const float *gate);
} kvf_cpu_ops;

/* Fill the table for a level; flags as detected (decides VNNI, BF16, VBMI variants). */
void kvf_cpu_ops_init(kvf_cpu_ops *ops, kvf_cpu_level level, unsigned flags);

/* Per file family: each sets the members it has. attn: attention; vec: element-wise; mm: product. */
void kvf_cpu_vec_init_ref(kvf_cpu_ops *ops);
void kvf_cpu_vec_init_avx2(kvf_cpu_ops *ops);
void kvf_cpu_vec_init_avx512(kvf_cpu_ops *ops);
void kvf_cpu_attn_init_ref(kvf_cpu_ops *ops);
void kvf_cpu_attn_init_avx2(kvf_cpu_ops *ops);
void kvf_cpu_attn_init_avx512(kvf_cpu_ops *ops);
void kvf_cpu_attn_init_avx512_bf16(kvf_cpu_ops *ops); /* prefill only */
void kvf_cpu_attn_init_amx(kvf_cpu_ops *ops);
void kvf_cpu_memory_init_ref(kvf_cpu_ops *ops);
void kvf_cpu_memory_init_avx2(kvf_cpu_ops *ops);
void kvf_cpu_memory_init_avx512(kvf_cpu_ops *ops);
void kvf_cpu_mass_init_avx2(kvf_cpu_ops *ops);
void kvf_cpu_mass_init_avx512(kvf_cpu_ops *ops);
void kvf_cpu_vote_init_avx512(kvf_cpu_ops *ops);
void kvf_cpu_score_ref(const kvf_score_part *p);
void kvf_cpu_mm_init(kvf_cpu_ops *ops); /* sets mm_pick and dequant by ops->level and flags */

#endif
