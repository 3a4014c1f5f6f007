/* dpc.c - see dpc.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/dpc.h"

#include <math.h>

#include "merge/select.h"
#include "merge/tile.h"

typedef struct dist_task {
    const kvf_rows *rows;
    const float *x;
    int64_t n, dim;
    float *dist;
} dist_task;

/* Rows of a strip: 16 of 3584 numbers stay in the second-level cache while all others pass by. */
enum { STRIP = 16 };

/* A strip against all rows from its own on; the matrix is symmetric, and no two tasks write the same place.
 */
static void dist_strip(void *arg, int64_t task, int32_t worker)
{
    const dist_task *t = arg;
    (void)worker;
    int64_t first = task * STRIP, n = t->n - first < STRIP ? t->n - first : STRIP;
    float scale = 1.0f / (float)t->dim;
    for (int64_t j = first; j < t->n; j += 4) {
        float part[STRIP][4];
        int64_t n_j = t->n - j < 4 ? t->n - j : 4;
        kvf_row_set a = { t->x + first * t->dim, n, t->dim }, b = { t->x + j * t->dim, n_j, t->dim };
        kvf_tile(t->rows->dist2, a, b, t->dim, part[0], 4);
        for (int64_t r = 0; r < n; r++)
            for (int64_t c = 0; c < n_j; c++) {
                float d = first + r == j + c ? 0.0f : sqrtf(part[r][c] * scale);
                t->dist[(first + r) * t->n + j + c] = d;
                if (j + c >= first + STRIP) t->dist[(j + c) * t->n + first + r] = d;
            }
    }
}

void kvf_dpc_distances(const kvf_merge_env *env, const float *x, int64_t n, int64_t dim, float *dist)
{
    dist_task t = { &env->rows, x, n, dim, dist };
    kvf_merge_run(env, (n + STRIP - 1) / STRIP, dist_strip, &t);
}

/* Mean of the k smallest squares of row i. */
static double near_mean(const kvf_dpc *a, int64_t i, int64_t k)
{
    float near[KVF_DPC_MAX_K];
    int64_t n_near = 0;
    const float *d = a->dist + i * a->n;
    for (int64_t j = 0; j < a->n; j++) {
        if (a->exact && j == i) continue;
        if (n_near == k && d[j] >= near[k - 1]) continue;
        int64_t at = n_near < k ? n_near++ : k - 1;
        for (; at > 0 && near[at - 1] > d[j]; at--) near[at] = near[at - 1];
        near[at] = d[j];
    }
    double sum = 0;
    for (int64_t j = 0; j < n_near; j++) sum += (double)near[j] * (double)near[j];
    return n_near > 0 ? sum / (double)n_near : 0;
}

static void densities(const kvf_dpc *a, double *rho)
{
    int64_t k = a->k < a->n_center ? a->k : a->n_center;
    if (a->exact) k = a->k < a->n - 1 ? a->k : a->n - 1;
    double all = 0;
    for (int64_t i = 0; i < a->n; i++) all += rho[i] = near_mean(a, i, k);
    double unit = a->exact && all > 0 ? (double)a->n / all : 1;
    for (int64_t i = 0; i < a->n; i++) {
        rho[i] = exp(-rho[i] * unit);
        if (!a->exact) rho[i] = (double)((float)rho[i] + (a->noise ? a->noise[i] : 0.0f) * 1e-6f);
    }
}

static void scores(const kvf_dpc *a, const double *rho)
{
    float far = 0;
    for (int64_t i = 0; i < a->n * a->n; i++) far = a->dist[i] > far ? a->dist[i] : far;
    for (int64_t i = 0; i < a->n; i++) {
        const float *d = a->dist + i * a->n;
        float delta = far;
        for (int64_t j = 0; j < a->n; j++) {
            bool denser = rho[j] > rho[i] || (a->exact && j < i && rho[j] == rho[i]);
            if (denser && d[j] < delta) delta = d[j];
        }
        a->score[i] = (double)delta * rho[i];
    }
}

void kvf_dpc_join(kvf_dpc *a)
{
    for (int64_t i = 0; i < a->n; i++) {
        const float *d = a->dist + i * a->n;
        int64_t best = 0;
        for (int64_t c = 1; c < a->n_center; c++)
            if (d[a->center[c]] < d[a->center[best]]) best = c;
        a->member[i] = (int32_t)best;
    }
    for (int64_t c = 0; c < a->n_center; c++) a->member[a->center[c]] = (int32_t)c;
}

kvf_status kvf_dpc_run(const kvf_merge_env *env, kvf_dpc *a, kvf_error *err)
{
    double *rho;
    KVF_TRY(KVF_GET(env, &rho, 2 * a->n + (a->n + 7) / 8, err));
    uint64_t *key = (uint64_t *)(void *)(rho + a->n);
    uint8_t *picked = (uint8_t *)(key + a->n);
    kvf_dpc_distances(env, a->x, a->n, a->dim, a->dist);
    densities(a, rho);
    scores(a, rho);
    for (int64_t i = 0; i < a->n; i++) key[i] = kvf_order_key(a->score[i]);
    kvf_pick_top(key, a->n, a->n_center, picked);
    for (int64_t i = 0, c = 0; i < a->n; i++)
        if (picked[i]) a->center[c++] = (int32_t)i;
    kvf_dpc_join(a);
    kvf_free(env->mem, rho);
    return KVF_OK;
}
