/* tower.h - a vision model in memory: shape, where each weight lies, the functions behind vision.h.
 *
 * A SigLIP or CLIP tower is a pre-norm transformer over patches:
 *     x = conv(pixels) + bias, [class token first], + position      then LayerNorm if pre_ln
 *     per layer: x += out(attention(ln1 x)); x += down(act(up(ln2 x)))
 *     [x = post_ln x]; class token dropped; mm.2(gelu(mm.0 x))
 * Weights stay in the mapped file, vectors are widened to f32 in one block. On a device, weights and
 * vectors are copies there.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_VISION_TOWER_H
#define KVF_VISION_TOWER_H

#include <kvfold/vision.h>
#include <pthread.h>
#include <stdatomic.h>

#include "backend/backend.h"
#include "model/gguf.h"
#include "vision/vit_ops.h"

/* What a tower runs on; all borrowed, from the ctx. */
typedef struct kvf_vision_env {
    kvf_backend *backend;
    kvf_threads *threads;
    const kvf_mem *mem;
    kvf_cpu_level level;
} kvf_vision_env;

typedef struct kvf_vision_hparams {
    int32_t image_size, patch_size, grid;
    int32_t n_patch; /* grid^2 */
    int32_t n_pos;   /* n_patch and the class token */
    int32_t width, n_head, head_dim, n_ff, n_layer, feature_layer;
    int32_t n_mid, n_out; /* projector: width of mm.0's output; of the whole */
    float eps;
    float mean[3], std[3];
    bool has_class;
    kvf_vit_act act, projector_act;
    int32_t batch;
} kvf_vision_hparams;

typedef struct kvf_vision_layer {
    const float *ln1_w, *ln1_b, *ln2_w, *ln2_b;
    const float *q_b, *k_b, *v_b, *o_b, *up_b, *down_b; /* NULL: none */
    kvf_weight q, k, v, o, up, down;
} kvf_vision_layer;

struct kvf_vision {
    kvf_vision_env env;
    const kvf_vit_ops *ops;
    kvf_gguf *gguf;
    kvf_vision_hparams hp;
    kvf_vision_layer *layers; /* [n_layer] */
    kvf_weight patch;         /* [width][3 * patch_size^2], columns in the order channel, row, column */
    kvf_weight mm0, mm2;      /* mm2.data NULL: a linear projector */
    const float *patch_b, *class_embd, *pos, *pre_w, *pre_b, *post_w, *post_b, *mm0_b, *mm2_b, *newline;
    float *vectors;           /* host, behind all of the above; on a device behind newline only, */
    float *dev_vectors;       /* and this, of the backend, behind the others */
    int64_t n_vector;         /* floats */
    bool on_device;           /* the backend's memory is not the host's */
    int32_t *pinpoints;       /* [n_pinpoint][2] */
    int32_t n_pinpoint;
    int64_t n_params;
    kvf_dtype main_type;
    uint64_t fingerprint[2];
    char name[128];
    atomic_int cancel;
    pthread_mutex_t lock;     /* of stats */
    kvf_vision_stats stats;
};

/* params checked by the caller. Errors as kvf_vision_open. */
kvf_status kvf_vision_load(kvf_vision **out, const kvf_vision_env *env, const char *path, const kvf_vision_params *params,
                           kvf_error *err);
void kvf_vision_unload(kvf_vision *v);

/* Shape from the metadata, checked; what follows from tensors (has_class, n_pos, n_mid, n_out) is not set. */
kvf_status kvf_vision_hparams_read(kvf_vision *v, const kvf_vision_params *params, kvf_error *err);
/* Tensors found, their shapes checked, weights handed to the backend, every number finite. */
kvf_status kvf_vision_tensors_load(kvf_vision *v, kvf_error *err);

/* b's fields are checked by the caller. */
kvf_status kvf_vision_run(kvf_vision *v, const kvf_vision_batch *b, kvf_error *err);
/* Bytes kvf_vision_run takes for `batch` frames at once, all outputs asked for, pooled. */
size_t kvf_vision_work_bytes(const kvf_vision *v, int64_t batch);

/* Frames are checked by the caller. */
kvf_status kvf_vision_resize_frames(kvf_vision *v, const kvf_vision_frame *frames, int64_t n, int32_t mode, float *pixels,
                                    kvf_error *err);

/* ---- pool.c ---- */

/* Tokens along a side after pooling a grid; 0 if there is no such pooling or nothing is left. */
int32_t kvf_vision_pool_side(int32_t pool, int32_t grid);
/* in [grid][grid][width] to out [side][side][width]; pool is not NONE. */
void kvf_vision_pool_grid(int32_t pool, const float *in, int32_t grid, int64_t width, float *out);

double kvf_vision_now_ms(void);

#endif
