/* park.h - rows of floats that wait: hidden states of tokens between two stages of the layers.
 *
 * Rows come in slabs that never move; a slab whose rows are all given back is freed. Beyond a budget slabs
 * are files without a name, mapped, in a folder that the caller chose; without one there is an error.
 *
 * One thread at a time.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_PARK_H
#define KVF_MODEL_PARK_H

#include "base/error.h"
#include "base/mem.h"

typedef struct kvf_park kvf_park;

/* width: floats of a row. folder: for slabs beyond the budget; copied, "" or NULL: none. */
kvf_status kvf_park_open(kvf_park **out, const kvf_mem *mem, int64_t width, const char *folder, kvf_error *err);
void kvf_park_close(kvf_park *p);

/* A row, its content undefined. room: bytes that may still be taken in memory. Errors: LIMIT (no room and
 * no folder), IO (the folder cannot hold it), NOMEM. */
kvf_status kvf_park_take(kvf_park *p, size_t room, int32_t *row, kvf_error *err);
void kvf_park_give(kvf_park *p, int32_t row);
float *kvf_park_row(const kvf_park *p, int32_t row);

size_t kvf_park_bytes(const kvf_park *p);      /* in memory */
size_t kvf_park_file_bytes(const kvf_park *p); /* in files */
int64_t kvf_park_rows(const kvf_park *p);      /* taken */

#endif
