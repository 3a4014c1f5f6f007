/* select.h - the k largest of n numbers, ties to the lowest index, in O(n) whatever the numbers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_SELECT_H
#define KVF_MERGE_SELECT_H

#include <stdint.h>
#include <string.h>

/* A key that orders as v does; -0 as 0. v is not NaN. */
static inline uint64_t kvf_order_key(double v)
{
    uint64_t u;
    v += 0.0;
    memcpy(&u, &v, sizeof u);
    return u >> 63 ? ~u : u | (uint64_t)1 << 63;
}

/* Set picked[i] to 1 for the k largest of key[0..n), the first of equals, to 0 for the others. 0 <= k <= n. */
void kvf_pick_top(const uint64_t *key, int64_t n, int64_t k, uint8_t *picked);

/* Share `total` among units of size[i]: unit i gets floor(total size / sum), and what is left goes one each to
 * the largest remainders, the first of equals. total <= sum, so no unit gets more than its size. room is [n]
 * for keys, picked [n]; out [n] may be size. */
void kvf_share_out(const int64_t *size, int64_t n, int64_t total, int64_t *out, uint64_t *room, uint8_t *picked);

#endif
