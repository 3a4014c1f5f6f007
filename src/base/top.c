/* top.c - see top.h. The k-th highest score is found digit by digit, eleven bits at a time, in the order
 * of the floats' bits; then one pass marks what lies above it and the first of its equals.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/top.h"

#include <string.h>

enum { DIGIT = 11, BINS = 1 << DIGIT, PASSES = 3 };

/* Rises with the score; 0 only for NaN. */
static uint32_t key_of(float x)
{
    if (x != x) return 0;
    if (x == 0) x = 0; /* -0 */
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

void kvf_top(const float *score, int64_t n, int64_t k, uint8_t *keep)
{
    if (k <= 0) return;
    uint32_t prefix = 0, mask = 0;
    int64_t left = k; /* of the keys that begin with prefix, how many are wanted */
    for (int pass = 0; pass < PASSES; pass++) {
        int shift = 32 - DIGIT * (pass + 1) > 0 ? 32 - DIGIT * (pass + 1) : 0;
        uint32_t digit = pass < PASSES - 1 ? BINS - 1 : (1u << (32 - DIGIT * (PASSES - 1))) - 1;
        int64_t count[BINS] = { 0 };
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = key_of(score[i]);
            if (!keep[i] && (key & mask) == prefix) count[key >> shift & digit]++;
        }
        int64_t bin = digit;
        for (; bin > 0 && count[bin] < left; bin--) left -= count[bin];
        prefix |= (uint32_t)bin << shift;
        mask |= digit << shift;
    }
    for (int64_t i = 0; i < n; i++) {
        if (keep[i]) continue;
        uint32_t key = key_of(score[i]);
        if (key > prefix || (key == prefix && left-- > 0)) keep[i] = 1;
    }
}
