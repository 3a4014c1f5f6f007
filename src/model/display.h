/* display.h - text of a model's metadata and tensor directory, for people. Made when the model is
 * opened, so that reading it needs no lock.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_DISPLAY_H
#define KVF_MODEL_DISPLAY_H

#include "model/gguf.h"

typedef struct kvf_display_row {
    char name[96], type[32], value[160]; /* cut to fit */
    size_t bytes;
} kvf_display_row;

typedef struct kvf_display {
    const kvf_mem *mem;
    int64_t n_meta, n_tensor;
    kvf_display_row *rows; /* [n_meta + n_tensor] */
} kvf_display;

kvf_status kvf_display_open(kvf_display **out, const kvf_gguf *g, const kvf_mem *mem, kvf_error *err);
void kvf_display_close(kvf_display *d);

#endif
