/* backend.h - what a device must be able to do: one table of ops, one argument struct per op.
 *
 * The forward pass (model/forward.c) and the KV manager (kv/) speak to a device only through this
 * table. Pointers inside argument structs are memory of that backend (alloc), except where
 * "host" is said. Ops may be asynchronous; sync waits. The CPU backend runs them at once.
 *
 * Layouts, outermost dimension first:
 *     activations   [n_tok][width] f32
 *     q, o          [n_tok][n_head][head_dim] f32
 *     k, v (new)    [n_tok][n_head_kv][head_dim] f32
 *     KV slot       K [n_head_kv][KVF_BLOCK][head_dim] f16, then V the same: one block of one layer
 *     weights       [n_out][n_in], rows of whole quantised blocks, as in the file
 *
 * One backend serves all sessions of a ctx; ops of different sessions must not overlap in time, so
 * a session holds `run` during a chunk.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_BACKEND_H
#define KVF_BACKEND_BACKEND_H

#include <stdbool.h>

#include "base/cpu.h"
#include "base/digest.h"
#include "base/dtype.h"
#include "base/error.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/threads.h"
#include "base/turn.h"

#define KVF_BACKEND_ABI 6u /* raised when an existing member changes */

/* Tokens of a KV block: a pool slot, a store value, an index row (docs/ARCHITECTURE.md). */
#define KVF_BLOCK 128
#define KVF_ATTN_RUN 16 /* keys of one of kvf_attn_args.runs */
#define KVF_BLOCK_SHIFT 7

/* A weight matrix as the backend holds it. `data` is the file's bytes for the CPU (mapped, not
 * copied), a device copy elsewhere. */
typedef struct kvf_weight {
    kvf_dtype type;
    int64_t n_out, n_in; /* rows, columns; a vector has n_out = 1 */
    size_t row_bytes;
    const void *data;
} kvf_weight;

/* Slots of KV memory: slot i starts at slab[i >> shift] + (i & mask) * slot_bytes. Slabs never
 * move; the table of them may, between ops. */
typedef struct kvf_kv_view {
    void *const *slab;
    int32_t shift;
    size_t slot_bytes; /* 2 * n_head_kv * KVF_BLOCK * head_dim * 2 */
} kvf_kv_view;

static inline void *kvf_kv_slot(const kvf_kv_view *v, int32_t slot)
{
    int32_t mask = (int32_t)((1u << v->shift) - 1u);
    return (char *)v->slab[slot >> v->shift] + (size_t)(slot & mask) * v->slot_bytes;
}

typedef struct kvf_embed_args {
    const kvf_weight *table;  /* [n_vocab][width] */
    const kvf_token *tokens;  /* host, [n_tok], each < n_vocab */
    int64_t n_tok;
    float scale;              /* multiplies every element; 1 for most models */
    float *out;               /* [n_tok][width] */
} kvf_embed_args;

typedef struct kvf_rmsnorm_args {
    const float *x;      /* [n_row][width], rows x_stride floats apart */
    const float *weight; /* [width] or NULL for 1 */
    float *out;          /* may be x; rows out_stride apart */
    int64_t n_row, width, x_stride, out_stride;
    float eps;
} kvf_rmsnorm_args;

#define KVF_MATMUL_MAX 3 /* q, k and v share their input */

/* y[j] = x w[j]^T + bias[j], or += with accumulate. Weights of one call share n_in and x, so that x
 * is packed once. */
typedef struct kvf_matmul_args {
    const float *x;  /* [n_tok][n_in] */
    int64_t n_tok;
    int32_t n_w;     /* 1..KVF_MATMUL_MAX */
    const kvf_weight *w[KVF_MATMUL_MAX];
    const float *bias[KVF_MATMUL_MAX]; /* [n_out] or NULL */
    float *y[KVF_MATMUL_MAX];          /* [n_tok][n_out] */
    bool accumulate;
} kvf_matmul_args;

typedef enum kvf_rope_kind {
    KVF_ROPE_NEOX = 0,       /* pairs (i, i + n_rot / 2): qwen2, qwen3, gemma3 */
    KVF_ROPE_INTERLEAVED = 1 /* pairs (2i, 2i + 1): llama in GGUF, whose rows are permuted for it */
} kvf_rope_kind;

/* Angles of a chunk, made once and used by every layer: row t is [n_rot / 2] cos(pos[t] * inv_freq[j])
 * and then [n_rot / 2] sin, both times mscale. */
typedef struct kvf_rope_table_args {
    const int32_t *pos;     /* host, [n_tok], position in the text; RoPE tables end far below 2^31 */
    const double *inv_freq; /* host, [n_rot / 2], scaling already applied */
    int64_t n_tok;
    int32_t n_rot;
    float mscale;           /* YaRN's attention factor; 1 for most */
    float *cos_sin;         /* [n_tok][n_rot] */
} kvf_rope_table_args;

/* Rotate x in place: pair j of every head of token t turns by the angle of row t. */
typedef struct kvf_rope_args {
    float *x;               /* [n_tok][n_head][head_dim] */
    int64_t n_tok;
    int32_t n_head, head_dim, n_rot; /* n_rot <= head_dim, even; the rest stays */
    const float *cos_sin;   /* [n_tok][n_rot], from rope_table */
    kvf_rope_kind kind;
} kvf_rope_args;

/* Write new keys and values as f16 into slots: token i goes to place (first + i) of the list. */
typedef struct kvf_kv_put_args {
    const float *k, *v;    /* [n_tok][n_head_kv][head_dim] */
    int64_t n_tok;
    int32_t n_head_kv, head_dim;
    const kvf_kv_view *kv;
    const int32_t *slots;  /* host, [(first + n_tok + KVF_BLOCK - 1) / KVF_BLOCK] */
    int64_t first;
} kvf_kv_put_args;

/* Rotated copies of raw keys: place first..first + n_tok of list dst gets the key of the same place of
 * list src, turned (in f32, from its f16 value) by the angle of row i and rounded to f16, and the value
 * unchanged. Each element depends on its own place only, so a copy made later is the same bits. */
typedef struct kvf_kv_turn_args {
    const kvf_kv_view *kv;
    const int32_t *src, *dst; /* host, [(first + n_tok + KVF_BLOCK - 1) / KVF_BLOCK] both */
    int64_t first, n_tok;
    int32_t n_head_kv, head_dim, n_rot;
    const float *cos_sin;     /* [n_tok][n_rot], from rope_table */
    kvf_rope_kind kind;
} kvf_kv_turn_args;

/* Copy keys and values between lists of slots: place first + i of list dst gets what stands at place
 * from[i] of list src. The lists may be the same if from rises and from[i] >= first + i. */
typedef struct kvf_kv_gather_args {
    const kvf_kv_view *kv;
    const int32_t *src, *dst; /* host; as long as the places ask for */
    const int32_t *from;      /* host, [n], or with from_stride [n_head_kv][from_stride]: of each KV head */
    int64_t from_stride;
    int64_t first, n;
    int32_t n_head_kv, head_dim;
} kvf_kv_gather_args;

/* Causal attention over a list of slots. Key j of the list (slot j / KVF_BLOCK, place j % KVF_BLOCK)
 * is visible to query i if j <= q_first + i and, with window > 0, j > q_first + i - window. A query
 * that sees no key gets o = 0, lse = -inf.
 *     s_j = cap(scale * q . k_j),  cap(s) = softcap > 0 ? softcap * tanh(s / softcap) : s
 *     lse = log sum_j exp(s_j),    o = sum_j exp(s_j - lse) v_j
 * Partial results over disjoint key lists merge by lse (lse_merge). fp32 accumulation.
 * A list may have holes: with `valid`, entry e of the list has keys only at places
 * valid[2e] <= place < valid[2e + 1] (0 <= first <= end <= KVF_BLOCK, both multiples of 8 unless end is
 * that of the last entry); what lies in a hole is never read as a number: it may be NaN. */
typedef struct kvf_attn_args {
    const float *q;
    float *o;              /* [n_tok][n_head][head_dim], not q */
    float *lse;            /* [n_tok][n_head] or NULL */
    int64_t n_tok;
    int32_t n_head, n_head_kv, head_dim; /* n_head a multiple of n_head_kv */
    float scale, softcap;
    const kvf_kv_view *kv;
    const int32_t *slots;  /* host, [(n_key + KVF_BLOCK - 1) / KVF_BLOCK] */
    int64_t n_key;         /* keys in the list, holes included, >= 0 */
    int64_t q_first;       /* place of query 0 in the order of keys; >= 0, may be >= n_key */
    int64_t window;        /* 0: none */
    const uint8_t *valid;  /* host, [entries][2], or NULL: no holes */
    int32_t head_kv0, head_kv1; /* only KV heads head_kv0 <= h < head_kv1 and their query heads are
                                   computed and written; both 0: all */
    const int32_t *place;  /* host, [n_tok] never falling, or NULL: query i stands at place[i], not q_first + i */
    const int32_t *first;  /* host, [n_tok] never falling, or NULL: query i sees keys j >= first[i] only; then
                              window is 0 (a window of positions over a list that has gaps in them) */
    float *runs;           /* NULL, or where the query looked: host, [n_head][entries * KVF_BLOCK / KVF_ATTN_RUN], the
                              sums of exp(s_j - lse) over runs of KVF_ATTN_RUN places. Only where the backend has
                              attn_runs, of one query (n_tok is 1), with lse */
} kvf_attn_args;

/* Where attention went: with s_ij and the visibility of attn, and lse [n_tok][n_head] an INPUT (of the
 * whole attention of that query and head, other lists included),
 *     mass[h][j] += sum_i exp(s_ij - lse_ih)     over the queries i that see key j
 * or summed over the heads into mass[j] with sum_heads. Holes and unseen keys get nothing; a query whose
 * lse is -inf adds nothing. attn->place and first must be NULL. Column scores of InfLLM (section 3.2), LazyLLM's
 * and SnapKV's importance, citations. */
typedef struct kvf_attn_mass_args {
    const kvf_attn_args *attn; /* o is not used */
    bool sum_heads;
    float *mass;               /* host, [n_head or 1][128 * entries of the list] */
} kvf_attn_mass_args;

/* Write the digest (base/digest.h) of one slot's raw keys, all KV heads. n_tok: tokens the slot holds;
 * fewer than KVF_BLOCK: the last key is repeated. Not for REPS. out: host, kvf_digest_bytes(). */
typedef struct kvf_digest_args {
    const kvf_kv_view *kv;
    int32_t slot, n_tok;
    const kvf_digest *digest;
    void *out;
} kvf_digest_args;

/* Representatives (REPS) of the units of a slot: for each vector, the mean of the raw keys of the r
 * tokens with the highest score among the `sub` tokens of the unit (ties: the earlier token). score:
 * host, [n_head][KVF_BLOCK] f32, per query head; without reps_per_q_head the group's scores are summed
 * first. out: host, kvf_digest_bytes(). */
typedef struct kvf_reps_args {
    const kvf_kv_view *kv;
    int32_t slot, r;
    const kvf_digest *digest;
    const float *score;
    void *out;
} kvf_reps_args;

/* Votes of a chunk's queries for units (runs of `unit` tokens, 16..KVF_BLOCK, a power of two; unit u
 * is tokens u * unit.. of the sequence). For query i, head h, unit u: s = scale * score of the digest;
 * then rule.kind turns it into a vote, the chunk's queries are joined (max or mean), and heads summed:
 *     vote[set][u - unit0],   set: 0, or the KV head with rule.per_kv_head
 * Scores are those of base/digest.h; sums in fp32 or better. */
typedef struct kvf_vote_args {
    const float *q;           /* [n_q][n_head][head_dim], rotated as the far keys are read */
    const float *lse;         /* [n_q][n_head] of what is read anyway; only for GATE (-inf: nothing) */
    int64_t n_q;
    float scale;
    const kvf_digest *digest;
    const void *const *rows;  /* host, rows[b]: digest of block b of the sequence; those of the units */
    int32_t unit;
    int64_t unit0, n_unit;
    kvf_vote_rule rule;
    float *vote;              /* host, [sets][n_unit] */
} kvf_vote_args;

/* (o, lse) <- merge of (o, lse) and (o2, lse2); a part with lse = -inf is skipped. */
typedef struct kvf_lse_merge_args {
    float *o, *lse;              /* [n_row][head_dim], [n_row] */
    const float *o2, *lse2;
    int64_t n_row;
    int32_t head_dim;
} kvf_lse_merge_args;

typedef enum kvf_act {
    KVF_ACT_SILU = 0,
    KVF_ACT_GELU_TANH = 1,
    KVF_ACT_GELU_QUICK = 2, /* x / (1 + exp(-1.702 x)); this one and the next by op act only */
    KVF_ACT_GELU_ERF = 3    /* x / 2 (1 + erf(x / sqrt 2)) */
} kvf_act;

/* y = act(x gate^T) * (x up^T), element by element: the first half of a gated FFN. One op, so that
 * the two products need not go through memory: they are five times as wide as x. */
typedef struct kvf_matmul_glu_args {
    const float *x; /* [n_tok][n_in] */
    int64_t n_tok;
    const kvf_weight *gate, *up; /* [n_out][n_in] both */
    float *y;       /* [n_tok][n_out] */
    kvf_act act;
} kvf_matmul_glu_args;

/* out = (x - mean) / sqrt(variance + eps) * weight + bias, row by row (Ba et al. 2016, arXiv:1607.06450, eq. 3). */
typedef struct kvf_layernorm_args {
    const float *x;             /* [n_row][width] */
    const float *weight, *bias; /* [width] */
    float *out;                 /* may be x */
    int64_t n_row, width;
    float eps;
} kvf_layernorm_args;

typedef struct kvf_backend kvf_backend;

typedef struct kvf_backend_ops {
    uint32_t abi;     /* KVF_BACKEND_ABI */
    const char *name; /* "cpu" */
    bool host_memory; /* what alloc gives the host may read and write itself */
    bool attn_runs;   /* attn fills kvf_attn_args.runs */

    void (*close)(kvf_backend *b);

    /* Memory. alloc returns 64-byte aligned device memory, not zeroed. */
    kvf_status (*alloc)(kvf_backend *b, void **out, size_t bytes, kvf_error *err);
    void (*release)(kvf_backend *b, void *ptr);
    kvf_status (*upload)(kvf_backend *b, void *dst, const void *src_host, size_t bytes, kvf_error *err);
    kvf_status (*download)(kvf_backend *b, void *dst_host, const void *src, size_t bytes, kvf_error *err);
    kvf_status (*copy)(kvf_backend *b, void *dst, const void *src, size_t bytes, kvf_error *err);
    kvf_status (*sync)(kvf_backend *b, kvf_error *err);

    /* Make `w` ready for matmul and embed; data is the file's bytes and outlives w (CPU: used in
     * place). UNSUPPORTED names the type. */
    kvf_status (*weight_init)(kvf_backend *b, kvf_weight *w, kvf_dtype type, int64_t n_out, int64_t n_in,
                              const void *data, kvf_error *err);
    void (*weight_fini)(kvf_backend *b, kvf_weight *w); /* (optional: nothing to free) */

    kvf_status (*embed)(kvf_backend *b, const kvf_embed_args *a, kvf_error *err);
    kvf_status (*rmsnorm)(kvf_backend *b, const kvf_rmsnorm_args *a, kvf_error *err);
    kvf_status (*matmul)(kvf_backend *b, const kvf_matmul_args *a, kvf_error *err);
    kvf_status (*matmul_glu)(kvf_backend *b, const kvf_matmul_glu_args *a, kvf_error *err);
    kvf_status (*rope_table)(kvf_backend *b, const kvf_rope_table_args *a, kvf_error *err);
    kvf_status (*rope)(kvf_backend *b, const kvf_rope_args *a, kvf_error *err);
    kvf_status (*kv_put)(kvf_backend *b, const kvf_kv_put_args *a, kvf_error *err);
    kvf_status (*kv_turn)(kvf_backend *b, const kvf_kv_turn_args *a, kvf_error *err);
    kvf_status (*kv_gather)(kvf_backend *b, const kvf_kv_gather_args *a, kvf_error *err);
    kvf_status (*attn)(kvf_backend *b, const kvf_attn_args *a, kvf_error *err);
    kvf_status (*attn_mass)(kvf_backend *b, const kvf_attn_mass_args *a, kvf_error *err);
    kvf_status (*digest)(kvf_backend *b, const kvf_digest_args *a, int64_t n, kvf_error *err); /* a[n] */
    kvf_status (*reps)(kvf_backend *b, const kvf_reps_args *a, kvf_error *err);
    kvf_status (*vote)(kvf_backend *b, const kvf_vote_args *a, kvf_error *err);
    kvf_status (*lse_merge)(kvf_backend *b, const kvf_lse_merge_args *a, kvf_error *err);
    kvf_status (*add)(kvf_backend *b, float *x, const float *y, int64_t n, kvf_error *err); /* x += y */

    int64_t (*batch_hint)(kvf_backend *b); /* good prefill chunk, tokens */
    /* What has run so far, "mm=amx_bf16 mv=avx512_q8 attn=amx_bf16": written to out, cut to cap. */
    void (*kernels)(kvf_backend *b, char *out, size_t cap);
    void (*describe)(kvf_backend *b, char *out, size_t cap); /* the device in a word: "avx512" */

    /* (optional, all or none) Copies from host memory that run beside the ops: fetch begins one when all ops so
     * far are done, src being memory of host_alloc (pinned), unchanged until a sync; ops after fetch_wait
     * come after all copies so far. */
    kvf_status (*host_alloc)(kvf_backend *b, void **out, size_t bytes, kvf_error *err);
    void (*host_release)(kvf_backend *b, void *ptr);
    kvf_status (*fetch)(kvf_backend *b, void *dst, const void *src, size_t bytes, kvf_error *err);
    kvf_status (*fetch_wait)(kvf_backend *b, kvf_error *err);

    /* (optional, both or none) Around a step of decoding: what is launched between is recorded and runs as one
     * graph at step_end, or earlier where an op has to hand numbers to the host. A failed op between them does
     * not spare step_end. */
    kvf_status (*step_begin)(kvf_backend *b, kvf_error *err);
    kvf_status (*step_end)(kvf_backend *b, kvf_error *err);

    /* (optional, both or none) What a vision tower needs beside the rest. A backend without them, whose memory is not
     * the host's, cannot run one. */
    kvf_status (*layernorm)(kvf_backend *b, const kvf_layernorm_args *a, kvf_error *err);
    kvf_status (*act)(kvf_backend *b, float *x, int64_t n, kvf_act act, kvf_error *err); /* x = act(x) */
} kvf_backend_ops;

struct kvf_backend {
    const kvf_backend_ops *ops;
    const kvf_mem *mem;
    const kvf_log *log;
    kvf_turn run; /* held by a session while it computes a chunk */
    kvf_threads *threads; /* of the ctx, for work on the host; NULL: none */
    kvf_cpu_level level;  /* the host's */
    kvf_backend *host;    /* of the ctx, for ops on host memory beside a device; NULL: none, or this one is it */
};

#endif
