/* select.c - see select.h. The k-th largest is found byte by byte from the top: eight counts of 256.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/select.h"

void kvf_pick_top(const uint64_t *key, int64_t n, int64_t k, uint8_t *picked)
{
    if (k >= n || k <= 0) {
        if (n > 0) memset(picked, k > 0, (size_t)n);
        return;
    }
    uint64_t cut = 0, known = 0; /* the k-th largest, as far as its bits are known */
    int64_t left = k;            /* to be taken among the keys that begin as the cut does */
    for (int shift = 56; shift >= 0; shift -= 8) {
        int64_t count[256] = { 0 };
        for (int64_t i = 0; i < n; i++)
            if ((key[i] & known) == cut) count[key[i] >> shift & 255]++;
        int b = 255;
        while (count[b] < left) left -= count[b--];
        cut |= (uint64_t)b << shift;
        known |= (uint64_t)255 << shift;
    }
    for (int64_t i = 0; i < n; i++) {
        picked[i] = key[i] > cut || (key[i] == cut && left > 0);
        left -= key[i] == cut && left > 0;
    }
}

void kvf_share_out(const int64_t *size, int64_t n, int64_t total, int64_t *out, uint64_t *room,
                   uint8_t *picked)
{
    int64_t sum = 0, given = 0;
    for (int64_t i = 0; i < n; i++) sum += size[i];
    if (total > sum) total = sum;
    for (int64_t i = 0; i < n; i++) {
        /* sizes and totals are under 2^31, the product fits */
        int64_t whole = sum > 0 ? size[i] * total / sum : 0;
        room[i] = sum > 0 ? (uint64_t)(size[i] * total % sum) : 0;
        out[i] = whole;
        given += whole;
    }
    kvf_pick_top(room, n, total - given, picked);
    for (int64_t i = 0; i < n; i++) out[i] += picked[i];
}
