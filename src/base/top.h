/* top.h - the k best of n scores, without sorting.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_TOP_H
#define KVF_BASE_TOP_H

#include <stdint.h>

/* Set keep[i] to 1 for the k highest scores among those with keep[i] == 0 on entry, leaving the others as
 * they are. Ties go to the lower index; -0 equals 0; NaN is below everything. k may be any number.
 * O(n), no memory. */
void kvf_top(const float *score, int64_t n, int64_t k, uint8_t *keep);

#endif
