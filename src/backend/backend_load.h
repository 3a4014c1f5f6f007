/* backend_load.h - backends that come as modules: what a module exports, and how one is opened.
 *
 * A module (libkvfold_cuda.so) lies beside the library and is opened at run time, so that nothing links
 * a driver that most machines lack. It exports one function, KVF_BACKEND_MODULE_ENTRY, whose name changes
 * when this header does: a module of another release is refused and not misread.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_BACKEND_LOAD_H
#define KVF_BACKEND_BACKEND_LOAD_H

#include "backend/backend.h"

typedef struct kvf_device_params {
    int32_t device;        /* 0 .. count - 1 */
    uint64_t memory_bytes; /* most device memory to take, all at once; 0: nine tenths of what is free */
    uint64_t bf16_bytes;   /* of it, for bf16 copies of quantised weights, which make prefill faster */
    bool f32;              /* exact mode: KVF_PRECISION_F32 */
    const kvf_mem *mem;    /* borrowed; host memory */
    const kvf_log *log;    /* borrowed */
} kvf_device_params;

/* Ops beside kvf_backend_ops: selection on the device and the features of video frames. All pointers are
 * memory of the backend unless "host" is said; all are asynchronous like the others. */
typedef struct kvf_device_sample {
    float temperature, top_p, min_p; /* temperature > 0; top_p 1, min_p 0: off */
    int32_t top_k;                   /* 0: off */
    float u;                         /* 0 <= u < 1: the caller's random number */
} kvf_device_sample;

typedef struct kvf_device_ops {
    /* ids [k] of the k largest of x [n], ascending; ties go to the lower index, NaN is smallest.
     * count [1]: min(k, n). */
    kvf_status (*topk)(kvf_backend *b, const float *x, int32_t n, int32_t k, int32_t *ids, int32_t *count, kvf_error *err);
    /* ids [n] of the elements of x that are > cut, among the first `sink` or among the last `recent`,
     * ascending; count [1]. */
    kvf_status (*keep)(kvf_backend *b, const float *x, int32_t n, float cut, int32_t sink, int32_t recent, int32_t *ids,
                       int32_t *count, kvf_error *err);
    /* out [n][row_bytes]: rows ids[i] of src; row_bytes a multiple of 4. */
    kvf_status (*gather)(kvf_backend *b, const void *src, const int32_t *ids, void *out, int64_t n, int64_t row_bytes,
                         kvf_error *err);
    /* out [n_row]: place of the largest of each row of x [n_row][width], ties: the lower. */
    kvf_status (*argmax)(kvf_backend *b, const float *x, int64_t n_row, int32_t width, int32_t *out, kvf_error *err);
    /* out [1]: a token drawn from softmax(logits / temperature) with the cuts of model/sampler.c. */
    kvf_status (*sample)(kvf_backend *b, const float *logits, int32_t width, const kvf_device_sample *p, int32_t *out,
                         kvf_error *err);
    /* out [n_frame - 1][n_tok]: cosine of the features x [n_frame][n_tok][width] of neighbouring frames. */
    kvf_status (*frame_cosine)(kvf_backend *b, const float *x, int32_t n_frame, int32_t n_tok, int32_t width, float *out,
                               kvf_error *err);
    /* Density peaks of the rows of x [n][width] by k <= 32 nearest neighbours (Du et al. 2016, DPC-KNN):
     * rho [n], delta [n]; d2 [n][n] is scratch and holds the squared distances after. */
    kvf_status (*density_peaks)(kvf_backend *b, const float *x, int32_t n, int32_t width, int32_t k, float *d2, float *rho,
                                float *delta, kvf_error *err);
    /* out [n_group][width]: means of the rows of x [n][width] whose group [n] is that; group < 0: left out. */
    kvf_status (*merge_mean)(kvf_backend *b, const float *x, const int32_t *group, int32_t n, int32_t width, int32_t n_group,
                             float *out, kvf_error *err);
} kvf_device_ops;

typedef struct kvf_backend_module {
    uint32_t backend_abi; /* KVF_BACKEND_ABI; another is refused */
    const char *name;     /* "cuda" */
    /* Devices there are; 0 with the reason in one line at `out` (cut to cap), else their names. */
    int32_t (*probe)(char *out, size_t cap);
    kvf_status (*open)(kvf_backend **out, const kvf_device_params *p, kvf_error *err);
    const kvf_device_ops *device;
    /* Bytes of the backend's memory in use and in all. */
    void (*memory)(kvf_backend *b, uint64_t *used, uint64_t *total);
    /* The stream that all ops go to, a cudaStream_t: for a communicator (comm/comm.h). */
    void *(*stream)(kvf_backend *b);
} kvf_backend_module;

#define KVF_BACKEND_MODULE_ENTRY "kvf_backend_module_2"
typedef const kvf_backend_module *(*kvf_backend_module_fn)(void);

/* Load the module `name` ("cuda": libkvfold_cuda.so) from `folder`, or with NULL from beside the object that
 * holds this function, then from where the loader looks. It stays loaded. On failure *out is NULL and err
 * says what to install: UNSUPPORTED (no driver, no module, a module of another release, no device). */
kvf_status kvf_backend_load(const kvf_backend_module **out, const char *name, const char *folder, kvf_error *err);

/* One line for `kvfold inspect --devices`: the devices of module `name`, or why there are none. Returns
 * their number. */
int32_t kvf_backend_probe(const char *name, const char *folder, char *out, size_t cap);

#endif
