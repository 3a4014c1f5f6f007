/* faiss_gate.c - exact search, and an approximate index measured against it.
 *
 * An approximate index trusts that queries look like the vectors. Queries and keys of attention do not
 * (RetrievalAttention, Liu et al. 2024, arXiv:2409.10516), so recall is measured on the vectors and
 * queries at hand before such an index may answer, not taken from a table.
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

static int64_t shared(const int64_t *a, int64_t n_a, const int64_t *b, int64_t n_b)
{
    int64_t n = 0;
    for (int64_t i = 0; i < n_a; i++)
        for (int64_t j = 0; j < n_b; j++) n += a[i] == b[j];
    return n;
}

static kvf_status measure(kvf_index *ix, const kvf_gate *g, int64_t *ids, float *score, double *recall,
                          kvf_error *err)
{
    int64_t hit = 0, all = 0, *exact = ids + g->k;
    for (int64_t i = 0; i < g->n_q; i++) {
        const float *q = g->q + i * ix->dim;
        int64_t found = 0;
        KVF_TRY(ix->ops->search(ix, q, g->k, ids, &found, err));
        int64_t want = kvf_exact_search(g->x, g->n, ix->dim, q, g->k, exact, score);
        hit += shared(ids, found, exact, want);
        all += want;
    }
    *recall = all ? (double)hit / (double)all : 1.0;
    return KVF_OK;
}

kvf_status kvf_index_gate(kvf_index *ix, const kvf_gate *g, const kvf_mem *mem, double *recall, kvf_error *err)
{
    if (g->n != ix->n || g->k < 1 || g->n_q < 1)
        return kvf_fail(err, KVF_ERR_ARG,
                        "an index of %lld vectors measured with %lld vectors, %lld queries, k %lld: the vectors "
                        "must be those it holds, queries and k at least 1",
                        (long long)ix->n, (long long)g->n, (long long)g->n_q, (long long)g->k);
    void *ids = NULL, *score = NULL;
    double got = 0;
    kvf_status st = kvf_mem_get(mem, &ids, (size_t)g->k, 2 * sizeof(int64_t), err);
    if (st == KVF_OK) st = kvf_mem_get(mem, &score, (size_t)g->k, sizeof(float), err);
    if (st == KVF_OK) st = measure(ix, g, ids, score, &got, err);
    kvf_free(mem, ids);
    kvf_free(mem, score);
    KVF_TRY(st);
    if (recall) *recall = got;
    if (got >= g->min_recall) return KVF_OK;
    return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                    "the index finds %.1f %% of the exact %lld best on these vectors, below the %.1f %% asked; "
                    "use an exact kind (Flat) or a larger one",
                    100 * got, (long long)g->k, 100 * g->min_recall);
}
