/* fold.c - see fold.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/fold.h"

#include <string.h>

#include "merge/inner.h"

/* The choice is made already: attention 1 for the kept, 0 for the others, makes the function choose the same. */
static kvf_status fold(const kvf_merge_env *env, kvf_merge_inner *a, float *const *rows, const uint8_t *keep, kvf_error *err)
{
    size_t bytes = (size_t)a->dim * sizeof(float);
    float *hidden, *out, *attention;
    int64_t n_keep = 0;
    KVF_TRY(kvf_mem_get(env->mem, (void **)(void *)&hidden, (size_t)a->n_row, bytes, err));
    a->hidden = hidden;
    KVF_TRY(kvf_mem_get(env->mem, (void **)(void *)&out, (size_t)a->n_row, bytes, err));
    a->out = out;
    KVF_TRY(kvf_mem_get(env->mem, (void **)(void *)&attention, (size_t)a->n_row, sizeof *attention, err));
    a->attention = attention;
    KVF_TRY(kvf_mem_get(env->mem, (void **)(void *)&a->keep, (size_t)a->n_row, sizeof *a->keep, err));
    for (int64_t i = 0; i < a->n_row; i++) {
        memcpy(hidden + i * a->dim, rows[i], bytes);
        attention[i] = keep[i] ? 1.0f : 0.0f;
        n_keep += keep[i] != 0;
    }
    a->drop = (double)(a->n_row - n_keep) / (double)a->n_row;
    if (n_keep == a->n_row || n_keep == 0) return KVF_OK;
    KVF_TRY(kvf_merge_inner_env(env, a, err));
    if (a->n_out != n_keep)
        return kvf_fail(err, KVF_ERR_INTERNAL, "%lld of %lld tokens folded", (long long)a->n_out, (long long)n_keep);
    for (int64_t i = 0; i < n_keep; i++) memcpy(rows[a->keep[i]], out + i * a->dim, bytes);
    return KVF_OK;
}

kvf_status kvf_fold(kvf_backend *backend, float *const *rows, const uint8_t *keep, int64_t n, int64_t width, kvf_error *err)
{
    kvf_merge_env env = { .mem = backend->mem, .threads = backend->threads };
    kvf_merge_inner a;
    kvf_rows_init(&env.rows, backend->level);
    kvf_merge_inner_init(&a);
    a.type = KVF_MERGE_F32;
    a.n_row = a.n = n;
    a.dim = width;
    a.n_head = 1;
    kvf_status rc = fold(&env, &a, rows, keep, err);
    kvf_free(env.mem, (void *)(uintptr_t)a.hidden);
    kvf_free(env.mem, a.out);
    kvf_free(env.mem, (void *)(uintptr_t)a.attention);
    kvf_free(env.mem, a.keep);
    return rc;
}
