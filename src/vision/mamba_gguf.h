/* mamba_gguf.h - the tensors of a GGUF file in f32, for kvf_mamba_open_gguf.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_VISION_MAMBA_GGUF_H
#define KVF_VISION_MAMBA_GGUF_H

#include "base/mem.h"
#include "kvfold/merge.h"

typedef struct kvf_mamba_file {
    kvf_mamba_tensor *t; /* [n] */
    char *name;          /* what the names of t point into */
    int64_t n;
} kvf_mamba_file;

/* Read all tensors. Free in every case. Errors: those of gguf.h; FORMAT (a count or name that Mamba layers do
 * not have), UNSUPPORTED (not f32, f16 or bf16). */
kvf_status kvf_mamba_file_read(kvf_mamba_file *f, const kvf_mem *mem, const char *path, kvf_error *err);
void kvf_mamba_file_free(kvf_mamba_file *f, const kvf_mem *mem);

#endif
