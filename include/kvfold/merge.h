/* merge.h - many video tokens in, a few out: the merging interface of libkvfold.
 *
 * A vision tower gives N tokens of D numbers for each of T frames. Neighbouring frames repeat each other,
 * and most tokens matter little, so a planner decides which tokens stay, which are averaged and which go.
 * It returns a plan: per output token a short list of (source token, weight). Applying the plan multiplies
 * that sparse matrix with any tensor over the same T x N tokens: the embeddings themselves, DeepStack
 * features, or anything else that must go the same way. No model is needed.
 *
 *     kvf_merge_open(&m, ctx, "holitom:tau=0.8,ratio=0.1", &err);        method and options, checked once
 *     kvf_merge_plan_make(&plan, m, &input, &err);                       features, scores -> plan
 *     kvf_merge_plan_get_info(plan, &info, &err);                        how many tokens, which, why
 *     kvf_merge_plan_apply(plan, &apply, &err);                          plan x tensor -> the caller's buffer
 *     kvf_merge_plan_positions(plan, &positions, &err);                  positions for the language model
 *
 * The rules of kvfold.h hold: handles first, err last, the library never prints or exits, struct sizes are
 * set by _init functions, and a ctx outlives what was made with it, plans included. Numbers are finite: NaN and
 * infinity in what is read are KVF_ERR_ARG, and the message says where. The same input and spec give the same
 * plan at every thread count.
 *
 * A spec is "method:key=value,key=value". Spatial and temporal pooling may stand in front of a method:
 * "pool_space:p=2+holitom:ratio=0.1". kvf_merge_method lists methods, kvf_merge_option their options;
 * docs/merge.md describes what each does and where it differs from its paper.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_MERGE_H
#define KVFOLD_MERGE_H

#include "kvfold/kvfold.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Tensors ---------------------------------------------------------------------------- */

typedef enum kvf_merge_type {
    KVF_MERGE_F32 = 0,
    KVF_MERGE_F16 = 1, /* IEEE binary16, as uint16_t */
    KVF_MERGE_BF16 = 2 /* upper half of binary32, as uint16_t */
} kvf_merge_type;

/* Bytes of one element; 0 for an unknown type. */
KVF_API size_t kvf_merge_type_bytes(kvf_merge_type type);

/* A tensor [n_frame][n_tok][dim] of the caller, read only. The dim elements of a token are contiguous. */
typedef struct kvf_merge_view {
    const void *data;     /* aligned for its type; NULL: absent, where that is allowed */
    kvf_merge_type type;
    int64_t n_frame, n_tok, dim; /* each >= 1; n_frame * n_tok < 2^31 */
    int64_t frame_stride; /* elements from frame to frame; 0: n_tok * tok_stride */
    int64_t tok_stride;   /* elements from token to token; 0: dim */
    uint64_t reserved[2];
} kvf_merge_view;

/* ---- Methods ---------------------------------------------------------------------------- */

typedef struct kvf_merge_method_info {
    size_t size;        /* set by the caller */
    const char *name;   /* "holitom"; strings are static */
    const char *source; /* authors, year, identifier */
    const char *help;   /* one line */
    int32_t streams;    /* 1: kvf_merge_stream_open takes it */
    int32_t reserved32;
    uint64_t reserved[4];
} kvf_merge_method_info;

typedef struct kvf_merge_option_info {
    size_t size;        /* set by the caller */
    const char *name;   /* "tau"; strings are static */
    const char *help;
    const char *words;  /* "official|exact" of a choice, else NULL */
    double def, min, max; /* of a number; of a choice def is the place of its word */
    int32_t is_integer;
    int32_t reserved32;
    uint64_t reserved[4];
} kvf_merge_option_info;

/* The i-th method, and the j-th option of the i-th method, 0 <= i, j. NOT_FOUND past the end. */
KVF_API kvf_status kvf_merge_method(int64_t i, kvf_merge_method_info *info);
KVF_API kvf_status kvf_merge_option(int64_t i, int64_t j, kvf_merge_option_info *info);

/* A method with its options. Read-only after open: share it between threads. ctx must outlive it. */
typedef struct kvf_merge kvf_merge;

/* Errors: NOT_FOUND (no such method; lists those there are), ARG (an option, by name and range; a method
 * that cannot stand in front of another), NOMEM. */
KVF_API kvf_status kvf_merge_open(kvf_merge **out, kvf_ctx *ctx, const char *spec, kvf_error *err);
KVF_API void kvf_merge_close(kvf_merge *m);

/* The spec with every option spelled out; valid while m is open. */
KVF_API const char *kvf_merge_spec(const kvf_merge *m);

/* ---- Plan -------------------------------------------------------------------------------- */

typedef struct kvf_merge_input {
    size_t size;             /* set by kvf_merge_input_init */
    kvf_merge_view features; /* tokens as the language model would read them */
    const float *scores;     /* [n_frame][n_tok] how much the vision tower attends to each token; NULL: the
                                distance to the mean of its frame (or segment) stands in, and the plan's
                                info says so */
    kvf_merge_view keys;     /* visionzip: what tokens are compared by, other dim allowed; absent: features */
    int64_t grid_w;          /* tokens in a row of the frame's grid, divides n_tok; 0: sqrt(n_tok) where that is
                                whole, else one row. Newlines, pool_space and positions use it. */
    const float *noise;      /* holitom, mode=official: [n_noise] numbers in [0,1) that break ties of the
                                density, for each segment that clusters one per static token; NULL: zeros */
    int64_t n_noise;
    uint64_t reserved[8];
} kvf_merge_input;

KVF_API void kvf_merge_input_init(kvf_merge_input *in);

typedef struct kvf_merge_plan kvf_merge_plan; /* read-only: share it between threads */

/* Decide. Reads features once for most methods, once more the tokens that are averaged. Work memory is
 * O(T N + M) numbers, plus one segment's means. Blocking; uses the threads of the ctx.
 * Errors: ARG (shape, stride, NaN or infinity with its place, noise too short, grid), LIMIT (2^31 tokens),
 * NOMEM. */
KVF_API kvf_status kvf_merge_plan_make(kvf_merge_plan **out, const kvf_merge *m, const kvf_merge_input *in,
                                       kvf_error *err);
KVF_API void kvf_merge_plan_free(kvf_merge_plan *p);

typedef enum kvf_merge_kind {
    KVF_MERGE_MERGED = 0, /* weighted mean of its sources */
    KVF_MERGE_COPIED = 1, /* one source, weight 1 */
    KVF_MERGE_NEWLINE = 2 /* no source: the model's newline embedding */
} kvf_merge_kind;

/* Where an output token stands. Rows of [n_out][4] int32: the array can be stored as it is. */
typedef struct kvf_merge_meta {
    int32_t segment;
    int32_t kind;     /* kvf_merge_kind */
    int32_t frame;    /* of the centre; of a static token the segment's first frame */
    int32_t position; /* of the centre in the frame, 0..n_tok-1; -1: newline */
} kvf_merge_meta; /* comes in arrays and never changes */

typedef struct kvf_merge_segment {
    int32_t first, last;              /* frames, inclusive */
    int32_t static_in, static_kept;   /* positions that do not change over the segment; tokens left of them */
    int32_t dynamic_in, dynamic_kept; /* tokens of the other positions, all frames */
} kvf_merge_segment; /* comes in arrays and never changes */

typedef struct kvf_merge_plan_info {
    size_t size;              /* set by the caller */
    int64_t n_frame, n_tok;   /* of the input */
    int64_t grid_w;
    int64_t first_frame;      /* of a stream's plan: number of its frame 0 in the stream; else 0 */
    int64_t n_out;            /* output tokens, newlines included */
    const int64_t *row;       /* [n_out + 1] sources of output i are row[i] <= k < row[i + 1] */
    const int32_t *source;    /* [row[n_out]] frame * n_tok + position, ascending per output token */
    const float *weight;      /* [row[n_out]] */
    const kvf_merge_meta *meta; /* [n_out]; frames count from 0 in this plan's input */
    const kvf_merge_segment *segment; /* [n_segment], contiguous, from frame 0 to n_frame - 1 */
    int64_t n_segment;
    int64_t n_merged, n_copied, n_newline; /* output tokens by kind */
    int64_t n_used;           /* input tokens with a weight somewhere; the others are dropped */
    int64_t n_asked;          /* tokens the ratio asks for; n_out - n_newline equals it with mode=exact */
    int64_t total_reduced;    /* holitom: tokens that merging equal positions alone takes away */
    double retain_eff;        /* holitom: share of the remaining ones that is kept */
    const char *spec;         /* of the method; belongs to the plan like the arrays */
    const char *scores;       /* "given", "none" (not used) or what stood in for them; static */
    const char *cpu;          /* kernels that ran: "ref", "avx2" or "avx512"; static */
    double similarity_ms, plan_ms; /* time of the similarity pass, and of all */
    int64_t n_forced;         /* of a stream: commits so far that the window forced; else 0 */
    uint64_t reserved[8];
} kvf_merge_plan_info;

/* Fill *info; its pointers live as long as the plan. Errors: ARG (size). */
KVF_API kvf_status kvf_merge_plan_get_info(const kvf_merge_plan *p, kvf_merge_plan_info *info, kvf_error *err);

typedef struct kvf_merge_apply {
    size_t size;           /* set by kvf_merge_apply_init */
    kvf_merge_view src;    /* n_frame and n_tok of the plan, any dim, any type */
    const void *newline;   /* [dim] of src.type; needed if the plan holds newlines */
    void *dst;             /* [n_out][dim], the caller's; must not overlap src */
    kvf_merge_type dst_type; /* default F32 */
    int64_t dst_stride;    /* elements from row to row; 0: dim */
    uint64_t reserved[4];
} kvf_merge_apply;

KVF_API void kvf_merge_apply_init(kvf_merge_apply *a);

/* dst[i] = sum over k of weight[k] * src[source[k]], summed in f32, rounded once. A row of one source with
 * weight 1 is a copy. Errors: ARG (shape, stride, missing newline), NOMEM. */
KVF_API kvf_status kvf_merge_plan_apply(const kvf_merge_plan *p, const kvf_merge_apply *a, kvf_error *err);

/* The output token that holds each input token with the largest weight (the first of equals), -1 if it is
 * dropped. owner is [n_frame * n_tok], the caller's. */
KVF_API kvf_status kvf_merge_plan_owners(const kvf_merge_plan *p, int32_t *owner, kvf_error *err);

/* How much of the input the output still tells. Distances are 1 - cosine, 0..2; tokens of length 0 are as
 * far as 1 from every other one and 0 from each other. */
typedef struct kvf_merge_quality {
    size_t size;           /* set by the caller */
    double nearest_mean;   /* of each input token to the nearest output token */
    double nearest_p95;    /* 95th percentile of that */
    double owner_mean;     /* of each input token that is not dropped to its owner; 0 if there is none */
    double owner_share;    /* input tokens that are not dropped, 0..1 */
    double squared_error;  /* sum |x - nearest|^2 / sum |x - mean|^2, nearest by Euclidean distance */
    uint64_t reserved[4];
} kvf_merge_quality;

/* Compare features with what the plan makes of them. O(T N M D): seconds for long videos. Errors: as
 * kvf_merge_plan_apply, and ARG for NaN and infinity. */
KVF_API kvf_status kvf_merge_plan_quality(const kvf_merge_plan *p, const kvf_merge_view *features,
                                          kvf_merge_quality *q, kvf_error *err);

/* ---- Positions --------------------------------------------------------------------------- */

typedef enum kvf_merge_position_mode {
    KVF_MERGE_COMPACT = 0, /* base, base + 1, ...: as if the video had so many tokens */
    KVF_MERGE_KEEP = 1     /* where the centre stood in the whole video */
} kvf_merge_position_mode;

typedef struct kvf_merge_positions {
    size_t size;    /* set by kvf_merge_positions_init */
    int32_t mode;   /* kvf_merge_position_mode (default COMPACT) */
    int32_t planes; /* 1: one number per token; 3: t, y, x (M-RoPE); 4: t, y, x, 0 (default 1) */
    int32_t base;   /* position of the first video token, >= 0 */
    int32_t frame_step; /* KEEP, 3 and 4 planes: positions from frame to frame, >= 1 (default 1) */
    int64_t first_frame; /* KEEP: frames before frame 0 of this plan, >= 0 (default 0) */
    int32_t *out;   /* [planes][n_out], the caller's */
    int32_t next;   /* out: where text goes on */
    int32_t reserved32;
    uint64_t reserved[4];
} kvf_merge_positions;

KVF_API void kvf_merge_positions_init(kvf_merge_positions *q);

/* COMPACT: every plane counts base + i (the 4th stays 0). KEEP, one plane: base + frame * n_tok + position;
 * a newline takes the place after the token before it. KEEP, t y x: base + frame * frame_step, base + row,
 * base + column; a newline stands right of its row. KEEP needs order=grid to ascend in the planes.
 * Errors: ARG (mode, planes, base, a position past 2^31). */
KVF_API kvf_status kvf_merge_plan_positions(const kvf_merge_plan *p, kvf_merge_positions *q, kvf_error *err);

/* ---- Streams ------------------------------------------------------------------------------ */

/* Frames one by one, plans as soon as they are final, memory bounded by `hold` frames. A segment is final
 * at a cut, when every way the segmentation can go on shares its end, or when `hold` frames are waiting
 * (then the best end so far is taken, and n_forced counts it). Without forced commits segments are those of
 * kvf_merge_plan_make. The budget is per segment: budget=segment gives the same plans in one piece.
 * One thread at a time. */
typedef struct kvf_merge_stream kvf_merge_stream;

typedef struct kvf_merge_stream_params {
    size_t size;         /* set by kvf_merge_stream_params_init */
    kvf_merge_type type; /* of the frames (default F32) */
    int64_t n_tok, dim;  /* of every frame */
    int64_t grid_w;      /* as in kvf_merge_input */
    int64_t hold;        /* most frames kept, 2..65536 (default 64) */
    uint64_t reserved[8];
} kvf_merge_stream_params;

KVF_API void kvf_merge_stream_params_init(kvf_merge_stream_params *p);

/* m must outlive the stream. Memory: up to 2 * hold frames, less while segments are short.
 * Errors: ARG, UNSUPPORTED (the method needs the whole video), NOMEM. */
KVF_API kvf_status kvf_merge_stream_open(kvf_merge_stream **out, const kvf_merge *m,
                                         const kvf_merge_stream_params *p, kvf_error *err);
KVF_API void kvf_merge_stream_close(kvf_merge_stream *s);

/* Add one frame: [n_tok][dim] contiguous, copied; scores [n_tok] or NULL, the same for all frames.
 * Errors: ARG (NaN, scores that come and go), STATE (finished; or plans wait that must be taken first),
 * NOMEM. After an error the frame is not in the stream. */
KVF_API kvf_status kvf_merge_stream_push(kvf_merge_stream *s, const void *frame, const float *scores,
                                         kvf_error *err);

/* No more frames: what is left becomes final. Takes a second call as a no-op. */
KVF_API kvf_status kvf_merge_stream_finish(kvf_merge_stream *s, kvf_error *err);

/* The next final piece, in order: *out is its plan, the caller's (kvf_merge_plan_free); *view its frames,
 * the stream's, valid until the next call on s: apply the plan to it. KVF_DONE: nothing is final yet, or,
 * after finish, nothing is left; *out is NULL then. Errors: NOMEM (the same call again carries on). */
KVF_API kvf_status kvf_merge_stream_next(kvf_merge_stream *s, kvf_merge_plan **out, kvf_merge_view *view,
                                         kvf_error *err);

/* ---- Merging inside the language model ------------------------------------------------------ */

/* HoliTom's inner merge, at the input of a layer: of the n image tokens first..first+n-1 keep those that
 * the last prompt token attends to most, fold each of the others into the most similar kept one. */
typedef struct kvf_merge_inner {
    size_t size;           /* set by kvf_merge_inner_init */
    const void *hidden;    /* [n_row][dim] hidden states of one sequence */
    kvf_merge_type type;   /* of hidden and out (default F32) */
    int64_t n_row, dim;
    int64_t first, n;      /* the span of image tokens */
    const float *attention; /* [n_head][n_row] attention of the last prompt token in the layer before */
    int64_t n_head;        /* >= 1; heads are averaged */
    double drop;           /* share of the span that goes, 0 <= drop < 1 (default 0.5) */
    void *out;             /* [n_out][dim], the caller's; must not overlap hidden */
    int32_t *keep;         /* [n_out] rows kept, ascending: they keep these positions; the caller's */
    int64_t n_out;         /* out: kvf_merge_inner_count(n_row, n, drop) */
    uint64_t reserved[4];
} kvf_merge_inner;

KVF_API void kvf_merge_inner_init(kvf_merge_inner *a);

/* n_row - n + max(1, (1 - drop) * n rounded half to even); -1 if n_row < n or drop is out of range. */
KVF_API int64_t kvf_merge_inner_count(int64_t n_row, int64_t n, double drop);
KVF_API kvf_status kvf_merge_inner_run(kvf_ctx *ctx, kvf_merge_inner *a, kvf_error *err);

/* ---- Pooling of tower features --------------------------------------------------------------- */

typedef enum kvf_merge_pool_kind {
    KVF_MERGE_BILINEAR = 0, /* to ceil(side / 2), corners not aligned, no antialiasing (LLaVA-OneVision) */
    KVF_MERGE_AVERAGE = 1,  /* 2 x 2, an odd last row and column is left out (LLaVA-Video) */
    KVF_MERGE_MAX = 2       /* 2 x 2, as AVERAGE */
} kvf_merge_pool_kind;

typedef struct kvf_merge_pool {
    size_t size;            /* set by kvf_merge_pool_init */
    kvf_merge_view src;     /* n_tok = a whole number of rows of grid_w tokens */
    int64_t grid_w;         /* 0: sqrt(n_tok), which must then be whole */
    int32_t kind;           /* kvf_merge_pool_kind */
    kvf_merge_type dst_type; /* default F32 */
    void *dst;              /* [n_frame][out_h * out_w][dim], the caller's; must not overlap src */
    int64_t out_h, out_w;   /* out */
    uint64_t reserved[4];
} kvf_merge_pool;

KVF_API void kvf_merge_pool_init(kvf_merge_pool *a);

/* With dst NULL only out_h and out_w are set. Scores are pooled the same way, with dim 1. */
KVF_API kvf_status kvf_merge_pool_run(kvf_ctx *ctx, kvf_merge_pool *a, kvf_error *err);

/* ---- STORM's temporal layers -------------------------------------------------------------------- */

/* One direction of a selective scan (Mamba-1), f32, row-major; E = d_inner, S = d_state, R = dt_rank,
 * K = d_conv. Pointers are the caller's and must outlive the handle. */
typedef struct kvf_mamba_branch {
    const float *conv_w;  /* [E][K], tap K-1 is the current input; NULL: there is no such branch */
    const float *conv_b;  /* [E]; NULL: zeros */
    const float *x_proj;  /* [R + 2S][E]: dt, B, C */
    const float *dt_w;    /* [E][R] */
    const float *dt_b;    /* [E] */
    const float *a_log;   /* [E][S]: A = -exp(a_log) */
    const float *d;       /* [E] */
} kvf_mamba_branch; /* comes in arrays and never changes */

/* x + mixer(norm(x)). */
typedef struct kvf_mamba_layer {
    const float *norm_w, *norm_b; /* [d_model] LayerNorm; norm_b NULL: zeros; norm_w NULL: none */
    const float *in_proj;         /* [2E][d_model]: rows of x, then rows of the gate z */
    const float *out_proj;        /* [d_model][E] */
    kvf_mamba_branch forward, backward; /* backward runs over the reversed sequence; both share in_proj and
                                           out_proj and are summed before the gate */
} kvf_mamba_layer; /* comes in arrays and never changes */

typedef struct kvf_mamba_params {
    size_t size;              /* set by kvf_mamba_params_init */
    const kvf_mamba_layer *layers; /* [n_layer], copied; all with a backward branch, or none */
    int64_t n_layer;          /* 1..1024 */
    int32_t d_model, d_inner, d_state, dt_rank; /* d_state 1..256 */
    int32_t d_conv;           /* 1..16 (default 4) */
    float norm_eps;           /* default 1e-5 */
    uint64_t reserved[4];
} kvf_mamba_params;

KVF_API void kvf_mamba_params_init(kvf_mamba_params *p);

typedef struct kvf_mamba kvf_mamba; /* layers and, without backward branches, a state; one thread at a time */

/* Errors: ARG (a missing pointer, a dimension), NOMEM. ctx must outlive it. */
KVF_API kvf_status kvf_mamba_open(kvf_mamba **out, kvf_ctx *ctx, const kvf_mamba_params *p, kvf_error *err);
KVF_API void kvf_mamba_close(kvf_mamba *m);

/* A weight by name, as a file holds it. */
typedef struct kvf_mamba_tensor {
    const char *name;
    const float *data; /* row-major */
    int32_t n_dim;     /* 1..4 */
    int64_t shape[4];  /* slowest first */
} kvf_mamba_tensor; /* comes in arrays and never changes */

/* The same from named weights, which are copied. Names are those of Mamba's modules behind one common prefix
 * (any, or none): layers.I.norm.weight, .norm.bias, .mixer.in_proj.weight, .out_proj.weight, .conv1d.weight
 * ([E][1][K] or [E][K]), .conv1d.bias, .x_proj.weight, .dt_proj.weight, .dt_proj.bias, .A_log, .D; the backward
 * direction adds conv1d_b, x_proj_b, dt_proj_b, A_b_log, D_b, as Vision Mamba calls them (arXiv:2401.09417).
 * Both norms and biases of conv1d may be absent. Dimensions are taken from the shapes. norm_eps 0: 1e-5.
 * Errors: FORMAT (an unknown, missing or repeated name, a shape, NaN or infinity; each with the tensor), ARG,
 * NOMEM. */
KVF_API kvf_status kvf_mamba_open_tensors(kvf_mamba **out, kvf_ctx *ctx, const kvf_mamba_tensor *t, int64_t n,
                                          float norm_eps, kvf_error *err);

/* The same from a GGUF file of such tensors in f32, f16 or bf16; metadata is not looked at.
 * Errors: those; IO, UNSUPPORTED (another element type). */
KVF_API kvf_status kvf_mamba_open_gguf(kvf_mamba **out, kvf_ctx *ctx, const char *path, float norm_eps, kvf_error *err);

typedef struct kvf_mamba_info {
    size_t size;      /* set by the caller */
    int64_t n_layer;
    int32_t d_model, d_inner, d_state, dt_rank, d_conv;
    int32_t backward; /* 1: there are backward branches */
    float norm_eps;
    int32_t reserved32;
    uint64_t reserved[4];
} kvf_mamba_info;

/* Fill *info. Errors: ARG (size). */
KVF_API kvf_status kvf_mamba_get_info(const kvf_mamba *m, kvf_mamba_info *info, kvf_error *err);

/* Run n tokens x [n][d_model] f32 through all layers, in place: row y * W + x of frame after frame. Without
 * backward branches the state carries on from call to call, so chunks give what one call gives; with them
 * every call is a sequence of its own. Errors: ARG (n < 1, NaN or infinity), NOMEM (x and state are as
 * before). */
KVF_API kvf_status kvf_mamba_run(kvf_mamba *m, float *x, int64_t n, kvf_error *err);

/* Forget the state. */
KVF_API void kvf_mamba_reset(kvf_mamba *m);

/* The state of a layer: conv [d_conv - 1][E] the last inputs, oldest first; ssm [E][S]. The caller's
 * buffers, either may be NULL. Errors: ARG (layer), STATE (layers have backward branches). */
KVF_API kvf_status kvf_mamba_get_state(const kvf_mamba *m, int64_t layer, float *conv, float *ssm, kvf_error *err);

#ifdef __cplusplus
}
#endif
#endif
