/* k_attn_decode.cu - attention of few query rows (16 of a KV head at most) over long lists: split-KV.
 *
 * A block takes one KV head and one run of keys; its four warps take tiles of 16 keys in turn, each with
 * its own stages of cp.async and its own running softmax, so that no barrier stands in the loop. All
 * query rows of the KV head share a tile (one m16 of mma.sync, filled or not: reading the keys is what
 * takes the time). Queries and weights go into the products as a sum of two f16 each, which leaves about
 * 22 bits of them. The runs are merged by lse in a second kernel, in a fixed order.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/attn.h"

enum { DECODE_THREADS = 128, DECODE_WARPS = 4, TILE = 16 };

struct split_f16 {
    uint32_t high, low;
};

/* Two weights as f16 pairs: rounded, and what the rounding left. */
KVF_DEV split_f16 split_pair(float x, float y)
{
    f16 xh = kvf_f16_of(x), yh = kvf_f16_of(y);
    return { kvf_pack(xh, yh), kvf_pack(kvf_f16_of(x - kvf_f32(xh)), kvf_f16_of(y - kvf_f32(yh))) };
}

template <int DP> struct decode_state {
    float o[DP / 8][4];
    float max[2], sum[2];
};

/* One tile of a warp: 16 rows by 16 keys. */
template <int DP>
KVF_DEV void decode_tile(const kvf_cuda_attn &a, decode_state<DP> &r, const kvf_seen *seen, const f16 *sq, const f16 *sk, int k)
{
    int lane = static_cast<int>(threadIdx.x & 31);
    const f16 *sv = sk + TILE * DP;
    float s[2][4] = { { 0, 0, 0, 0 }, { 0, 0, 0, 0 } };
    KVF_UNROLL
    for (int i = 0; i < DP / 16; i++) {
        if (i * 16 >= a.head_dim) break;
        uint32_t high[4], low[4], fb[4];
        int q_at = kvf_swizzle<DP>(lane & 15, 2 * i + (lane >> 4));
        kvf_ldmatrix4(high, sq + q_at);
        kvf_ldmatrix4(low, sq + 16 * DP + q_at);
        kvf_ldmatrix4(fb, sk + kvf_swizzle<DP>((lane & 7) + (lane >> 4) * 8, 2 * i + (lane >> 3 & 1)));
        KVF_UNROLL
        for (int n = 0; n < 2; n++) {
            kvf_mma(s[n], low, fb + 2 * n, f16());
            kvf_mma(s[n], high, fb + 2 * n, f16());
        }
    }
    kvf_places p = kvf_places_of(a, k >> KVF_BLOCK_SHIFT);
    KVF_UNROLL
    for (int i = 0; i < 2; i++) {
        float max = r.max[i];
        KVF_UNROLL
        for (int n = 0; n < 2; n++)
            KVF_UNROLL
            for (int j = 2 * i; j < 2 * i + 2; j++) {
                int c = k + n * 8 + 2 * (lane & 3) + (j & 1), place = c & (KVF_BLOCK - 1);
                bool sees = c >= seen[i].lo && c <= seen[i].hi && place >= p.v0 && place < p.v1;
                float x = a.softcap > 0.0f ? tanhf(s[n][j]) * (a.softcap * KVF_LOG2E) : s[n][j];
                s[n][j] = sees ? x : -INFINITY;
                max = fmaxf(max, s[n][j]);
            }
        max = fmaxf(max, kvf_shfl_xor(max, 1));
        max = fmaxf(max, kvf_shfl_xor(max, 2));
        float base = max == -INFINITY ? 0.0f : max, old = kvf_exp2(r.max[i] - base), sum = 0.0f;
        r.max[i] = max;
        KVF_UNROLL
        for (int n = 0; n < 2; n++)
            KVF_UNROLL
            for (int j = 2 * i; j < 2 * i + 2; j++) sum += s[n][j] = kvf_exp2(s[n][j] - base);
        r.sum[i] = r.sum[i] * old + sum;
        KVF_UNROLL
        for (int n = 0; n < DP / 8; n++) {
            r.o[n][2 * i] *= old;
            r.o[n][2 * i + 1] *= old;
        }
    }
    uint32_t high[4], low[4];
    KVF_UNROLL
    for (int i = 0; i < 4; i++) {
        split_f16 w = split_pair(s[i >> 1][2 * (i & 1)], s[i >> 1][2 * (i & 1) + 1]);
        high[i] = w.high;
        low[i] = w.low;
    }
    KVF_UNROLL
    for (int n = 0; n < DP / 16; n++) {
        if (n * 16 >= a.head_dim) break;
        uint32_t fb[4];
        kvf_ldmatrix4_trans(fb, sv + kvf_swizzle<DP>(lane & 15, 2 * n + (lane >> 4)));
        KVF_UNROLL
        for (int i = 0; i < 2; i++) {
            kvf_mma(r.o[2 * n + i], low, fb + 2 * i, f16());
            kvf_mma(r.o[2 * n + i], high, fb + 2 * i, f16());
        }
    }
}

/* The four warps' results of each row to one, and out. so [4][16][DP], sml [4][16][2]. */
template <int DP> KVF_DEV void join_warps(const kvf_cuda_attn &a, int h, const float *so, const float *sml)
{
    int group = a.n_head / a.n_head_kv, n_row = a.n_tok * group, z = static_cast<int>(blockIdx.x);
    float *out = a.n_split > 1 ? a.part_o : a.o, *lse = a.n_split > 1 ? a.part_lse : a.lse;
    for (int i = static_cast<int>(threadIdx.x); i < n_row * a.head_dim; i += DECODE_THREADS) {
        int row = i / a.head_dim, c = i % a.head_dim;
        float max = -INFINITY, sum = 0.0f, o = 0.0f;
        for (int w = 0; w < DECODE_WARPS; w++) max = fmaxf(max, sml[(w * 16 + row) * 2]);
        for (int w = 0; w < DECODE_WARPS; w++) {
            float m = sml[(w * 16 + row) * 2];
            if (m == -INFINITY) continue;
            float f = kvf_exp2(m - max);
            sum += sml[(w * 16 + row) * 2 + 1] * f;
            o += so[(w * 16 + row) * DP + c] * f;
        }
        size_t at = kvf_out_row(a, row / group, h * group + row % group, z);
        out[at * a.head_dim + c] = sum == 0.0f ? 0.0f : o / sum;
        if (lse && c == 0) lse[at] = sum == 0.0f ? -INFINITY : (max + log2f(sum)) * KVF_LN2;
    }
}

template <int DP, int STAGES> KVF_KERNEL_OF(DECODE_THREADS, 2) decode_kernel(kvf_cuda_attn a)
{
    KVF_SHARED_DYN(f16, sq); /* queries, rounded and rest [2][16][DP]; then [warp][stage][keys, values][16][DP] */
    KVF_SHARED(float, sml, DECODE_WARPS * 16 * 2);
    f16 *tiles = sq + 2 * 16 * DP;
    int me = static_cast<int>(threadIdx.x), lane = me & 31, warp = me / 32;
    int h = a.head_kv0 + static_cast<int>(blockIdx.y), group = a.n_head / a.n_head_kv, n_row = a.n_tok * group;
    f16 *mine = tiles + warp * STAGES * 2 * TILE * DP;
    kvf_seen any = { kvf_seen_by(a, 0).lo, kvf_seen_by(a, a.n_tok - 1).hi }, seen[2];
    int begin = a.key0 + static_cast<int>(blockIdx.x) * a.split_keys, end = begin + a.split_keys;
    if (any.lo > begin) begin = any.lo / TILE * TILE;
    if (any.hi + 1 < end) end = any.hi + 1;

    const int step = DECODE_WARPS * TILE;
    int ahead = kvf_next_tile(a, begin + warp * TILE, end, TILE, step), k = ahead;
    KVF_UNROLL
    for (int i = 0; i < STAGES - 1; i++) {
        if (ahead < end) {
            kvf_load_tile<DP>(a, h, ahead, TILE, any, mine + i * 2 * TILE * DP, mine + (i * 2 + 1) * TILE * DP, lane, 32);
            ahead = kvf_next_tile(a, ahead + step, end, TILE, step);
        }
        kvf_cp_commit();
    }

    float scale = kvf_query_scale(a);
    for (int i = me; i < 16 * (DP / 8); i += DECODE_THREADS) {
        int row = i / (DP / 8), c = i % (DP / 8);
        bool real = row < n_row && c * 8 < a.head_dim;
        int tok = real ? row / group : 0, head = h * group + (real ? row % group : 0);
        const float *q = a.q + (static_cast<size_t>(tok) * a.n_head + head) * a.head_dim + (real ? c * 8 : 0);
        int to = kvf_swizzle<DP>(row, c);
        kvf_query_chunk(q, scale, real, sq + to, sq + 16 * DP + to);
    }
    decode_state<DP> r;
    KVF_UNROLL
    for (int i = 0; i < 2; i++) {
        int row = lane / 4 + i * 8;
        seen[i] = { 0, -1 };
        if (row < n_row) seen[i] = kvf_seen_by(a, row / group);
        r.max[i] = -INFINITY;
        r.sum[i] = 0.0f;
    }
    KVF_UNROLL
    for (int n = 0; n < DP / 8; n++)
        KVF_UNROLL
        for (int j = 0; j < 4; j++) r.o[n][j] = 0.0f;
    kvf_sync();

    for (int at = 0; k < end; at = at + 1 == STAGES ? 0 : at + 1) {
        int free_stage = at == 0 ? STAGES - 1 : at - 1;
        if (ahead < end) {
            f16 *to = mine + free_stage * 2 * TILE * DP;
            kvf_load_tile<DP>(a, h, ahead, TILE, any, to, to + TILE * DP, lane, 32);
            ahead = kvf_next_tile(a, ahead + step, end, TILE, step);
        }
        kvf_cp_commit();
        kvf_cp_wait<STAGES - 1>();
        kvf_sync_warp();
        decode_tile<DP>(a, r, seen, sq, mine + at * 2 * TILE * DP, k);
        kvf_sync_warp(); /* the stage is free */
        k = kvf_next_tile(a, k + step, end, TILE, step);
    }

    kvf_sync(); /* the tiles are read: their place takes the results */
    float *so = reinterpret_cast<float *>(tiles);
    KVF_UNROLL
    for (int i = 0; i < 2; i++) {
        int row = warp * 16 + lane / 4 + i * 8;
        float sum = r.sum[i];
        sum += kvf_shfl_xor(sum, 1);
        sum += kvf_shfl_xor(sum, 2);
        if ((lane & 3) == 0) {
            sml[row * 2] = r.max[i];
            sml[row * 2 + 1] = sum;
        }
        KVF_UNROLL
        for (int n = 0; n < DP / 8; n++) {
            so[row * DP + n * 8 + 2 * (lane & 3)] = r.o[n][2 * i];
            so[row * DP + n * 8 + 2 * (lane & 3) + 1] = r.o[n][2 * i + 1];
        }
    }
    kvf_sync();
    join_warps<DP>(a, h, so, sml);
}

/* ---- Merge of the runs ---------------------------------------------------------------------------------- */

/* A warp takes the row of a token and head. */
KVF_KERNEL(128) join_kernel(kvf_cuda_attn a)
{
    int group = a.n_head / a.n_head_kv, heads = a.n_kv * group, lane = static_cast<int>(threadIdx.x & 31);
    int i = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32);
    if (i >= a.n_tok * heads) return;
    int head = a.head_kv0 * group + i % heads;
    size_t at = static_cast<size_t>(i / heads) * a.n_head + head, step = static_cast<size_t>(a.n_tok) * a.n_head;
    float max = -INFINITY, sum = 0.0f;
    for (int z = lane; z < a.n_split; z += 32) max = fmaxf(max, a.part_lse[z * step + at]);
    max = kvf_warp_max(max);
    for (int z = lane; z < a.n_split && max > -INFINITY; z += 32) sum += expf(a.part_lse[z * step + at] - max);
    sum = kvf_warp_sum(sum);
    for (int c = lane; c < a.head_dim; c += 32) {
        float o = 0.0f;
        for (int z = 0; z < a.n_split && max > -INFINITY; z++) {
            float l = a.part_lse[z * step + at];
            if (l > -INFINITY) o += a.part_o[(z * step + at) * a.head_dim + c] * expf(l - max);
        }
        a.o[at * a.head_dim + c] = sum == 0.0f ? 0.0f : o / sum;
    }
    if (a.lse && lane == 0) a.lse[at] = sum == 0.0f ? -INFINITY : max + logf(sum);
}

void kvf_cuda_attn_join(const kvf_cuda_attn *p, cudaStream_t s)
{
    kvf_cuda_attn a = *p;
    int n = a.n_tok * a.n_kv * (a.n_head / a.n_head_kv);
    KVF_LAUNCH(join_kernel, dim3(static_cast<unsigned>((n + 3) / 4)), dim3(128), 0, s, a);
}

/* ---- Launch ------------------------------------------------------------------------------------------------ */

/* Stages by head size: 64 KiB of tiles, so that two blocks fit where there are 227 KiB and one where 99. */
template <int DP> struct decode_shape {
    static const int STAGES = 256 / DP;
    static const size_t BYTES = (2 * 16 + DECODE_WARPS * STAGES * 2 * TILE) * DP * sizeof(f16);
};

template <int DP> static cudaError_t allow()
{
    return cudaFuncSetAttribute(decode_kernel<DP, decode_shape<DP>::STAGES>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(decode_shape<DP>::BYTES));
}

cudaError_t kvf_cuda_decode_setup(void)
{
    cudaError_t e = allow<64>();
    if (e == cudaSuccess) e = allow<128>();
    return e == cudaSuccess ? allow<256>() : e;
}

template <int DP> static void decode(const kvf_cuda_attn *p, cudaStream_t s)
{
    kvf_cuda_attn a = *p;
    dim3 grid(static_cast<unsigned>(a.n_split), static_cast<unsigned>(a.n_kv));
    KVF_LAUNCH((decode_kernel<DP, decode_shape<DP>::STAGES>), grid, dim3(DECODE_THREADS), decode_shape<DP>::BYTES, s, a);
}

void kvf_cuda_attn_decode(const kvf_cuda_attn *a, cudaStream_t s)
{
    if (a->head_dim <= 64)
        decode<64>(a, s);
    else if (a->head_dim <= 128)
        decode<128>(a, s);
    else
        decode<256>(a, s);
}
