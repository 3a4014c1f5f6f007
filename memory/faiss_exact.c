/* faiss_exact.c - exact search: what an index answers with until it is trained, and what its recall is
 * measured against.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "memory/faiss_index.h"

int64_t kvf_exact_search(const float *x, int64_t n, int32_t dim, const float *q, int64_t k, int64_t *ids,
                         float *score)
{
    int64_t found = 0;
    if (k <= 0) return 0;
    for (int64_t i = 0; i < n; i++) {
        const float *row = x + i * dim;
        float s = 0;
        for (int32_t c = 0; c < dim; c++) s += q[c] * row[c];
        if (found == k && !(s > score[k - 1])) continue; /* an equal that comes later loses */
        int64_t at = found < k ? found++ : k - 1;
        for (; at > 0 && s > score[at - 1]; at--) {
            score[at] = score[at - 1];
            ids[at] = ids[at - 1];
        }
        score[at] = s;
        ids[at] = i;
    }
    return found;
}
