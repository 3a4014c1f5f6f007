/* vision.h - pictures in, embeddings out: the vision tower and projector of a LLaVA-type model.
 *
 * A video model is two files: a language model, and an "mmproj" file that turns frames into vectors of
 * the language model's width. This header opens the second: a ViT (SigLIP or CLIP) and its projector, in
 * the GGUF form llama.cpp's converter writes (LLaVA-1.5, LLaVA-1.6, LLaVA-OneVision, SigLIP-so400m). It
 * also returns what no other runtime hands out: how much attention each patch received in the last
 * layer, by which HoliTom ranks tokens (arXiv:2505.21334, section 3.3).
 *
 *     frames RGB8 --kvf_vision_prepare--> pixels [n][3][S][S] --kvf_vision_encode--> embd [n][T][D_out]
 *
 * S is image_size, a frame has grid * grid patches in raster order, T is that number or, pooled,
 * ceil(grid / 2)^2 (LLaVA-OneVision's video path: 27 x 27 -> 14 x 14).
 *
 * The rules of kvfold.h hold here: error last, *out NULL after a failure, files untrusted, `size` first
 * in every struct and set by its _init function. All arrays are row-major f32, the caller's.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_VISION_H
#define KVFOLD_VISION_H

#include <kvfold/kvfold.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- The model -------------------------------------------------------------------------- */

/* Weights, read-only. Share it between threads; concurrent calls take turns on the ctx's threads. A ctx
 * must outlive it. */
typedef struct kvf_vision kvf_vision;

/* How the projector's GELU is computed. Published models were trained with the exact one; llama.cpp
 * computes the tanh form, whose values differ by up to 5e-4. */
typedef enum kvf_vision_gelu { KVF_VISION_GELU_ERF = 0, KVF_VISION_GELU_TANH = 1 } kvf_vision_gelu;

/* Activation of the layers. Files made from SigLIP by llama.cpp's legacy script say "quick" where the
 * model was trained with the tanh GELU; what a file says is what llama.cpp computes. */
typedef enum kvf_vision_activation {
    KVF_VISION_ACT_FILE = 0,
    KVF_VISION_ACT_GELU_TANH = 1,
    KVF_VISION_ACT_GELU_QUICK = 2, /* x sigmoid(1.702 x): CLIP of OpenAI */
    KVF_VISION_ACT_GELU_ERF = 3,
    KVF_VISION_ACT_SILU = 4
} kvf_vision_activation;

typedef struct kvf_vision_params {
    size_t size;             /* sizeof *this; set by kvf_vision_params_init */
    int32_t feature_layer;   /* layers to compute, 1..n_layer; 0: the file's clip.vision.feature_layer, or
                                all: converters leave out the layer that LLaVA does not read */
    int32_t projector_gelu;  /* kvf_vision_gelu                                    default ERF */
    int32_t batch;           /* frames computed at once, 1..1024; 0: chosen. Results do not depend on it
                                beyond rounding; memory grows with it (kvf_vision_info.work_bytes). */
    int32_t activation;      /* kvf_vision_activation: FILE, or what the file gets wrong  default FILE */
    uint64_t reserved[8];
} kvf_vision_params;

KVF_API void kvf_vision_params_init(kvf_vision_params *p);

/* Open an mmproj GGUF v3 file. It is mapped, not copied, and must not change while open. Every length,
 * shape, type and key is checked; weights that are not finite are refused. params may be NULL.
 * Errors: ARG (params), IO, FORMAT (names the key or tensor), UNSUPPORTED (a text model, another
 * architecture, projector or tensor type: named), NOMEM. Blocking: reads the file once to check it. */
KVF_API kvf_status kvf_vision_open(kvf_vision **out, kvf_ctx *ctx, const char *path, const kvf_vision_params *params,
                                   kvf_error *err);
KVF_API void kvf_vision_close(kvf_vision *v);

typedef struct kvf_vision_info {
    size_t size;             /* set by the caller to sizeof *this before the call */
    const char *name;        /* general.name, or ""; strings live as long as the model */
    const char *family;      /* "siglip" or "clip" (has a class token) */
    const char *projector;   /* "mlp": two products with a GELU between; "linear": one product */
    const char *activation;  /* of the layers: "gelu_tanh", "gelu_quick", "gelu_erf" or "silu" */
    const char *quantization; /* type that holds most bytes of the matrices, "F16" */
    int64_t n_params, file_bytes;
    int32_t image_size;      /* S: pixels along a side of a prepared frame */
    int32_t patch_size;      /* pixels along a side of a patch */
    int32_t grid;            /* patches along a side: image_size / patch_size */
    int32_t n_patch;         /* grid * grid, class token not counted */
    int32_t width, n_ff, n_head, head_dim;
    int32_t n_layer;         /* layers in the file */
    int32_t feature_layer;   /* layers that are computed: features and scores are of the last of them */
    int32_t n_out;           /* D_out: the language model's embedding width */
    int32_t has_class_token; /* 1: a class token takes part in attention; it is never in the output */
    int32_t has_newline;     /* 1: kvf_vision_newline() is there */
    float mean[3], std[3];   /* of RGB values in 0..1 */
    int32_t resize;          /* kvf_vision_resize of the model's processor */
    int32_t n_pinpoint;      /* resolutions for tiled pictures (LLaVA-1.6, LLaVA-OneVision) */
    const int32_t *pinpoints; /* [n_pinpoint][2] as in the file, pixels; NULL if there are none */
    size_t work_bytes;       /* memory one kvf_vision_encode call takes */
    uint64_t fingerprint[2]; /* of metadata, tensor directory and samples of the weights */
    uint64_t reserved[8];
} kvf_vision_info;

/* Fill *info. Errors: ARG (size). */
KVF_API kvf_status kvf_vision_get_info(const kvf_vision *v, kvf_vision_info *info, kvf_error *err);

/* The embedding that ends a picture's rows or a video, [n_out] f32, valid while v is open; NULL if the
 * model has none. */
KVF_API const float *kvf_vision_newline(const kvf_vision *v);

/* ---- Frames ----------------------------------------------------------------------------- */

/* How a frame becomes square. */
typedef enum kvf_vision_resize {
    KVF_VISION_RESIZE_MODEL = 0,   /* as the model's processor: STRETCH for siglip, CROP for clip */
    KVF_VISION_RESIZE_STRETCH = 1, /* both sides to S: SigLIP, LLaVA-OneVision video */
    KVF_VISION_RESIZE_CROP = 2,    /* the shorter side to S, the middle of the longer: CLIP */
    KVF_VISION_RESIZE_PAD = 3      /* a square of the mean colour around it, then to S: LLaVA-1.5 "pad" */
} kvf_vision_resize;

typedef struct kvf_vision_frame {
    const uint8_t *rgb;     /* [height] rows of [width][3] bytes R G B, the caller's */
    int32_t width, height;  /* pixels, 1..65536 each */
    int64_t stride;         /* bytes from row to row, >= 3 * width; 0: 3 * width */
} kvf_vision_frame; /* comes in arrays and never changes */

/* Resize n frames (bicubic with antialiasing, a = -0.5, in the 8-bit fixed-point arithmetic of Pillow,
 * which the models' processors use) and normalise them: pixel = (value / 255 - mean) / std, into
 * pixels [n][3][S][S]. mode is a kvf_vision_resize. Thread-safe, blocking.
 * Errors: ARG (a frame's pointer or size, mode), NOMEM. */
KVF_API kvf_status kvf_vision_prepare(kvf_vision *v, const kvf_vision_frame *frames, int64_t n, int32_t mode,
                                      float *pixels, kvf_error *err);

/* ---- Embeddings ------------------------------------------------------------------------- */

/* Pooling of the grid after the projector. */
typedef enum kvf_vision_pool {
    KVF_VISION_POOL_NONE = 0,     /* T = grid^2 */
    KVF_VISION_POOL_BILINEAR = 1, /* T = ceil(grid / 2)^2, corners not aligned, no antialiasing: LLaVA-OneVision */
    KVF_VISION_POOL_AVERAGE = 2,  /* T = floor(grid / 2)^2, 2 x 2, stride 2: LLaVA-Video */
    KVF_VISION_POOL_MAX = 3       /* T = floor(grid / 2)^2 */
} kvf_vision_pool;

/* Tokens a frame becomes with a pooling; *side, if given, is their number along a side. 0 for a pooling
 * that does not exist or leaves nothing. */
KVF_API int64_t kvf_vision_tokens(const kvf_vision *v, int32_t pool, int32_t *side);

typedef struct kvf_vision_batch {
    size_t size;          /* sizeof *this; set by kvf_vision_batch_init */
    const float *pixels;  /* [n][3][S][S], normalised: finite */
    int64_t n;            /* frames, >= 1 */
    int32_t pool;         /* kvf_vision_pool                                       default NONE */
    int32_t reserved32;
    float *embd;          /* out [n][T][n_out], or NULL: the projector does not run */
    float *scores;        /* out [n][T], or NULL: attention each patch received in the last computed layer,
                             mean over heads and over all queries (a class token's too), pooled as embd;
                             without pooling a frame's scores sum to 1, less what a class token received */
    float *patch_scores;  /* out [n][grid^2], or NULL: scores before pooling */
    float *features;      /* out [n][grid^2][width], or NULL: what the projector reads */
    /* Called after every layer of every part of the batch, with layers done and to do. A return other
     * than 0 cancels. May be NULL. Must not call into this model or a session of its ctx. */
    int (*progress)(void *user, int64_t done, int64_t total);
    void *user;
    uint64_t reserved[8];
} kvf_vision_batch;

KVF_API void kvf_vision_batch_init(kvf_vision_batch *b);

/* Run the tower, the projector and the pooling over b->n frames. At least one output must be given.
 * Deterministic: the same frames, ctx and batch give the same bits. Thread-safe, blocking.
 * Errors: ARG (a field; a pixel that is not finite), NOMEM, CANCELLED, FORMAT (an output is not finite:
 * the weights overflow). Outputs are unspecified after an error. O(n T (width^2 + T width)) per layer.
 * [Zhai et al. 2023, arXiv:2303.15343; Radford et al. 2021, arXiv:2103.00020; Liu et al. 2024,
 * arXiv:2310.03744, section 3.2; Li et al. 2024, arXiv:2408.03326, section 3] */
KVF_API kvf_status kvf_vision_encode(kvf_vision *v, const kvf_vision_batch *b, kvf_error *err);

/* Ask a kvf_vision_encode call that runs on v to stop; it returns CANCELLED after the layer at hand. A
 * request that comes while none runs stops the next one. Any thread; async-signal-safe. */
KVF_API void kvf_vision_cancel(kvf_vision *v);

typedef struct kvf_vision_stats {
    size_t size;        /* set by the caller to sizeof *this */
    int64_t n_frames;   /* encoded since open */
    double prepare_ms;  /* inside kvf_vision_prepare */
    double encode_ms;   /* inside kvf_vision_encode, of which: */
    double matmul_ms;   /* products with weights */
    double attn_ms;     /* attention */
    double scores_ms;   /* attention again where its rows are needed */
    double project_ms;  /* projector and pooling, products included */
    char kernels[256];  /* what really ran on this ctx: "mm=amx_bf16 vattn=avx512" */
    uint64_t reserved[8];
} kvf_vision_stats;

/* Fill *stats with sums over all calls on v. Errors: ARG (size). */
KVF_API kvf_status kvf_vision_get_stats(kvf_vision *v, kvf_vision_stats *stats, kvf_error *err);

#ifdef __cplusplus
}
#endif
#endif
