/* encode_int.h - one call of kvf_vision_encode from inside: encode.c on the CPU, encode_device.c where the arrays
 * are a device's.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_VISION_ENCODE_INT_H
#define KVF_VISION_ENCODE_INT_H

#include "vision/tower.h"

typedef struct kvf_vision_call {
    kvf_vision *v;
    const kvf_vision_batch *b;
    kvf_error *err;
    int64_t frame, n;      /* the part: frames frame..frame + n of b */
    int64_t done, total;   /* layers, of all parts */
    uint8_t *block;        /* host memory behind mass, slot_list, and without a device the rest */
    uint8_t *dev_block;    /* memory of the backend behind the rest; NULL: the host's */
    float *x;              /* [rows][width]; rows are positions of all the part's frames */
    float *h;              /* [rows][width] normalised x, then attention's output */
    float *q, *k, *val;    /* [rows][width] */
    float *wide;           /* [ff_rows][n_ff], or patches of pixels, or the projector's middle */
    float *proj;           /* [patches][n_out] before pooling */
    float *mass;           /* host, [n][n_pos] */
    uint8_t *slots;        /* keys and values of one frame as blocks of f16, for the engine's attention */
    int32_t *slot_list;    /* host */
    float *lse;            /* device only: [n_pos][n_head] */
    float *staging;        /* host, device only: pixels of patches, or what is pooled, or columns of attention */
    kvf_vision_stats t;    /* times of this call */
} kvf_vision_call;

static inline int64_t kvf_vision_slots(const kvf_vision *v) { return (v->hp.n_pos + KVF_BLOCK - 1) / KVF_BLOCK; }
static inline size_t kvf_vision_slot_bytes(const kvf_vision *v) { return (size_t)v->hp.width * KVF_BLOCK * 2 * sizeof(uint16_t); }

/* One frame's attention by the engine's op: its keys and values become blocks of f16, every one of them visible to
 * every query: the first query's place is past the last key. lse may be NULL. */
kvf_status kvf_vision_attend_frame(kvf_vision_call *r, int64_t frame, float *lse);

/* ---- encode_device.c ---- */

/* The vectors move to the device; all but the newline, which is handed out. */
kvf_status kvf_vision_to_device(kvf_vision *v, kvf_error *err);
/* x = patches (class token first) + positions, from r->q. */
kvf_status kvf_vision_dev_positions(kvf_vision_call *r);
/* Attention of all frames; with scores also mass. */
kvf_status kvf_vision_dev_attend(kvf_vision_call *r, bool scores);
/* Patches [n][n_patch][width] without the class token. */
kvf_status kvf_vision_dev_patches(kvf_vision_call *r, const float **out);
/* Host memory to the device, and back. */
kvf_status kvf_vision_send(kvf_vision_call *r, float *to, const float *from, int64_t n);
kvf_status kvf_vision_fetch(kvf_vision_call *r, float *to, const float *from, int64_t n);

#endif
