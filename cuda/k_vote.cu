/* k_vote.cu - votes of queries for units of far tokens, by the digests of their blocks (base/digest.h).
 *
 * In steps, for a batch of queries: scores of all units for every query row, shares per row, votes per
 * unit. Sums run in a fixed order, so a vote is the same in every run. A block of threads scores one unit
 * for one KV head: it lays 32 vectors of the digest out in shared memory as fp32, a lane takes a vector, and
 * the warps take the query rows in turn.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/kernels.h"

enum { VOTE_THREADS = 128, LANES = 32 };

/* ---- Pooled queries -------------------------------------------------------------------------------- */

struct pool_args {
    const float *q, *lse;
    float *out, *out_lse;
    int64_t n_q, i0;
    int32_t n, pool, n_head, head_dim;
    float scale;
};

KVF_KERNEL(256) pool_kernel(pool_args a)
{
    int64_t width = static_cast<int64_t>(a.n_head) * a.head_dim;
    for (int64_t i = kvf_first(); i < a.n * width; i += kvf_stride()) {
        int64_t first = (a.i0 + i / width) * a.pool, n = a.n_q - first < a.pool ? a.n_q - first : a.pool;
        float sum = 0.0f;
        for (int64_t k = 0; k < n; k++) sum += a.q[(first + k) * width + i % width];
        a.out[i] = sum / static_cast<float>(n) * a.scale;
        if (i % a.head_dim) continue;
        int64_t h = i % width / a.head_dim;
        sum = 0.0f;
        for (int64_t k = 0; a.lse && k < n; k++) sum += a.lse[(first + k) * a.n_head + h];
        a.out_lse[i / a.head_dim] = a.lse ? sum / static_cast<float>(n) : -INFINITY;
    }
}

void kvf_cuda_vote_pool(const kvf_vote_args *a, int64_t i0, int32_t n, float *q, float *lse, cudaStream_t s)
{
    pool_args p = { a->q, a->lse, q, lse, a->n_q, i0, n, a->rule.pool, a->digest->n_head, a->digest->head_dim, a->scale };
    int64_t work = static_cast<int64_t>(n) * a->digest->n_head * a->digest->head_dim;
    KVF_LAUNCH(pool_kernel, dim3(kvf_blocks(work, 256, 65536)), dim3(256), 0, s, p);
}

/* ---- Scores ------------------------------------------------------------------------------------------- */

KVF_DEV float half_at(const uint8_t *p)
{
    f16 h;
    memcpy(&h, p, 2);
    return kvf_f32(h);
}

KVF_DEV float key_of_bits(const kvf_digest &g, const uint8_t *row, int t, int c)
{
    int d = g.head_dim, per = 8 / g.bits, rows = d / 4 / per, quad = c / 4, k = t % KVF_DIGEST_GROUP;
    const uint8_t *at = row + static_cast<size_t>(t / KVF_DIGEST_GROUP) * (4 * d + KVF_DIGEST_GROUP * d * g.bits / 8);
    uint32_t byte = at[4 * d + (k / 16 * rows + quad / per) * 64 + k % 16 * 4 + c % 4];
    uint32_t code = byte >> (quad % per * g.bits) & ((1u << g.bits) - 1u);
    return half_at(at + 2 * c) + static_cast<float>(code) * half_at(at + 2 * (d + c));
}

/* Vectors i0 .. i0 + n of a head's digest to tile [32][d + 1]; high: the upper bounds of BOUNDS. */
KVF_DEV void lay_vectors(const kvf_digest &g, const uint8_t *row, int i0, int n, int v, float *tile, float *high)
{
    int d = g.head_dim, all = g.kind == KVF_DIGEST_BOUNDS ? KVF_DIGEST_BLOCK / g.sub : 0, n_vec = g.reps_per_q_head ? g.n_head / g.n_head_kv : 1;
    for (int j = static_cast<int>(threadIdx.x); j < n * d; j += VOTE_THREADS) {
        int i = j / d, c = j % d, to = i * (d + 1) + c;
        if (g.kind == KVF_DIGEST_BITS) {
            tile[to] = key_of_bits(g, row, i0 + i, c);
        } else if (g.kind == KVF_DIGEST_REPS) {
            memcpy(&tile[to], row + 4 * ((static_cast<size_t>(i0 + i) * n_vec + v) * d + c), 4);
        } else {
            tile[to] = half_at(row + 2 * (static_cast<size_t>(i0 + i) * d + c));
            if (g.kind == KVF_DIGEST_BOUNDS) high[to] = half_at(row + 2 * (static_cast<size_t>(all + i0 + i) * d + c));
        }
    }
}

KVF_DEV float dot(const kvf_digest &g, const float *q, const float *key, const float *high)
{
    float s = 0.0f;
    if (g.kind == KVF_DIGEST_BOUNDS)
        for (int c = 0; c < g.head_dim; c++) s += fmaxf(q[c] * key[c], q[c] * high[c]);
    else
        for (int c = 0; c < g.head_dim; c++) s += q[c] * key[c];
    return s;
}

/* Block: unit x, KV head y. s[row][unit] = the largest score of the unit's vectors. */
KVF_KERNEL(VOTE_THREADS) score_kernel(kvf_cuda_vote a, size_t head_bytes)
{
    KVF_SHARED_DYN(float, tile); /* [32][d + 1], twice for BOUNDS */
    const kvf_digest &g = a.g;
    int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5), d = g.head_dim;
    int u = static_cast<int>(blockIdx.x), h = static_cast<int>(blockIdx.y), at = u + a.skip, per = KVF_BLOCK / a.unit;
    int group = g.n_head / g.n_head_kv, n_vec = g.kind == KVF_DIGEST_REPS && g.reps_per_q_head ? group : 1;
    const uint8_t *row = a.rows[at / per] + static_cast<size_t>(h) * head_bytes;
    int count = g.kind == KVF_DIGEST_BITS ? a.unit : a.unit / g.sub, first = at % per * count;
    float *high = tile + LANES * (d + 1);
    for (int v = 0; v < n_vec; v++) {
        for (int i0 = 0; i0 < count; i0 += LANES) {
            int n = count - i0 < LANES ? count - i0 : LANES, own = n_vec > 1 ? 1 : group;
            kvf_sync();
            lay_vectors(g, row, first + i0, n, v, tile, high);
            kvf_sync();
            for (int r = warp; r < a.n_q * own; r += VOTE_THREADS / 32) {
                int64_t out = static_cast<int64_t>(r / own) * g.n_head + h * group + (n_vec > 1 ? v : r % own);
                const float *q = a.q + out * d;
                float best = lane < n ? dot(g, q, tile + lane * (d + 1), high + lane * (d + 1)) : -INFINITY;
                best = kvf_warp_max(best);
                float *to = a.s + out * a.n_unit + u;
                if (lane == 0) *to = i0 == 0 ? best : fmaxf(best, *to);
            }
        }
    }
}

/* ---- Shares --------------------------------------------------------------------------------------------- */

KVF_DEV float block_join(float v, bool max, float *part)
{
    v = max ? kvf_warp_max(v) : kvf_warp_sum(v);
    kvf_sync(); /* the values before are read */
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    kvf_sync();
    float r = part[0];
    for (int i = 1; i < 8; i++) r = max ? fmaxf(r, part[i]) : r + part[i];
    return r;
}

/* A block takes a row: s becomes exp(s - max) / (sum + gate). */
KVF_KERNEL(256) share_kernel(kvf_cuda_vote a)
{
    KVF_SHARED(float, part, 8);
    float *s = a.s + static_cast<int64_t>(blockIdx.x) * a.n_unit, lse = a.lse[blockIdx.x];
    bool gate = a.rule.kind == KVF_VOTE_GATE;
    float max = gate && lse > -1e30f ? lse : -1e30f, sum = 0.0f;
    for (int u = static_cast<int>(threadIdx.x); u < a.n_unit; u += 256) max = fmaxf(max, s[u]);
    max = block_join(max, true, part);
    for (int u = static_cast<int>(threadIdx.x); u < a.n_unit; u += 256) sum += s[u] = expf(s[u] - max);
    sum = block_join(sum, false, part);
    if (gate) sum += expf(lse - max);
    sum = 1.0f / sum;
    for (int u = static_cast<int>(threadIdx.x); u < a.n_unit; u += 256) s[u] *= sum;
}

/* ---- Votes ------------------------------------------------------------------------------------------------ */

KVF_KERNEL(256) join_kernel(kvf_cuda_vote a)
{
    int64_t n = static_cast<int64_t>(a.g.n_head) * a.n_unit;
    for (int64_t i = kvf_first(); i < n; i += kvf_stride()) {
        float v = a.rule.max_queries ? -INFINITY : 0.0f;
        if (!a.first) v = a.best[i];
        for (int32_t k = 0; k < a.n_q; k++) {
            float x = a.s[k * n + i];
            v = a.rule.max_queries ? (x > v ? x : v) : v + x;
        }
        a.best[i] = v;
    }
}

size_t kvf_cuda_vote_shared(const kvf_digest *g)
{
    return static_cast<size_t>(g->kind == KVF_DIGEST_BOUNDS ? 2 : 1) * LANES * (static_cast<size_t>(g->head_dim) + 1) * sizeof(float);
}

cudaError_t kvf_cuda_vote_setup(void)
{
    return cudaFuncSetAttribute(score_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 2 * LANES * (KVF_CUDA_HEAD_MAX + 1) * 4);
}

void kvf_cuda_vote_batch(const kvf_cuda_vote *p, cudaStream_t s)
{
    kvf_cuda_vote a = *p;
    size_t head_bytes = kvf_digest_head_bytes(&a.g);
    dim3 grid(static_cast<unsigned>(a.n_unit), static_cast<unsigned>(a.g.n_head_kv));
    KVF_LAUNCH(score_kernel, grid, dim3(VOTE_THREADS), kvf_cuda_vote_shared(&a.g), s, a, head_bytes);
    if (a.rule.kind != KVF_VOTE_LIN)
        KVF_LAUNCH(share_kernel, dim3(static_cast<unsigned>(a.n_q * a.g.n_head)), dim3(256), 0, s, a);
    KVF_LAUNCH(join_kernel, dim3(kvf_blocks(static_cast<int64_t>(a.g.n_head) * a.n_unit, 256, 65536)), dim3(256), 0, s, a);
}

KVF_KERNEL(256) sum_kernel(kvf_cuda_vote a, float share, float *vote)
{
    int32_t heads = a.rule.per_kv_head ? a.g.n_head / a.g.n_head_kv : a.g.n_head, sets = a.g.n_head / heads;
    for (int64_t i = kvf_first(); i < static_cast<int64_t>(sets) * a.n_unit; i += kvf_stride()) {
        int64_t set = i / a.n_unit, u = i % a.n_unit;
        float v = 0.0f;
        for (int32_t h = 0; h < heads; h++) v += a.best[(set * heads + h) * a.n_unit + u] * share;
        vote[i] = v;
    }
}

void kvf_cuda_vote_sum(const kvf_cuda_vote *p, float share, float *vote, cudaStream_t s)
{
    kvf_cuda_vote a = *p;
    KVF_LAUNCH(sum_kernel, dim3(kvf_blocks(static_cast<int64_t>(a.g.n_head_kv) * a.n_unit, 256, 65536)), dim3(256), 0, s, a, share, vote);
}
