/* file_map.h - a whole file, read-only, mapped into memory.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_FILE_MAP_H
#define KVF_BASE_FILE_MAP_H

#include "base/error.h"

typedef struct kvf_file_map {
    const uint8_t *data; /* [bytes]; NULL for an empty file */
    size_t bytes;
} kvf_file_map;

/* Regular files only. Errors: IO (names the path and the system's reason). */
kvf_status kvf_file_map_open(kvf_file_map *out, const char *path, kvf_error *err);
void kvf_file_map_close(kvf_file_map *m);

#endif
