/* tile.h - all pairs of two sets of rows, four by four.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_TILE_H
#define KVF_MERGE_TILE_H

#include "merge/rows.h"

typedef void (*kvf_tile_fn)(const float *const a[4], const float *const b[4], int64_t n, float out[16]);

/* Rows of dim numbers, `stride` apart. */
typedef struct kvf_row_set {
    const float *row;
    int64_t n, stride;
} kvf_row_set;

/* out[i * out_stride + j] = fn of row i of a and row j of b; past an end the last row stands in, and is dropped. */
static inline void kvf_tile(kvf_tile_fn fn, kvf_row_set a, kvf_row_set b, int64_t dim, float *out, int64_t out_stride)
{
    for (int64_t j = 0; j < b.n; j += 4)
        for (int64_t i = 0; i < a.n; i += 4) {
            const float *x[4], *y[4];
            float tile[16];
            for (int64_t k = 0; k < 4; k++) {
                x[k] = a.row + (i + k < a.n ? i + k : a.n - 1) * a.stride;
                y[k] = b.row + (j + k < b.n ? j + k : b.n - 1) * b.stride;
            }
            fn(x, y, dim, tile);
            for (int64_t r = 0; r < 4 && i + r < a.n; r++)
                for (int64_t c = 0; c < 4 && j + c < b.n; c++) out[(i + r) * out_stride + j + c] = tile[4 * r + c];
        }
}

#endif
