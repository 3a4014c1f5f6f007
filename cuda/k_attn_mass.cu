/* k_attn_mass.cu - where attention went: for each key, the sum over the queries of exp(s - lse).
 *
 * A block takes 64 keys and one query head; each of its four warps 16 keys, which are the rows of the
 * product, so that the sum over queries is a sum within the warp. Queries come 32 at a time, as two f16
 * each (k_attn_decode.cu says why).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/attn.h"

enum { MASS_THREADS = 128, MASS_KEYS = 64, MASS_QUERIES = 32 };

template <int DP> KVF_DEV void load_mass_queries(const kvf_cuda_attn &a, int head, int tok0, f16 *sq, float *s_lse, kvf_seen *s_seen)
{
    float scale = kvf_query_scale(a);
    for (int i = static_cast<int>(threadIdx.x); i < MASS_QUERIES * (DP / 8); i += MASS_THREADS) {
        int r = i / (DP / 8), c = i % (DP / 8);
        bool real = tok0 + r < a.n_tok && c * 8 < a.head_dim;
        const float *q = a.q + (static_cast<size_t>(real ? tok0 + r : 0) * a.n_head + head) * a.head_dim + (real ? c * 8 : 0);
        int to = kvf_swizzle<DP>(r, c);
        kvf_query_chunk(q, scale, real, sq + to, sq + MASS_QUERIES * DP + to);
    }
    int i = static_cast<int>(threadIdx.x);
    if (i < MASS_QUERIES) {
        bool real = tok0 + i < a.n_tok;
        float l = real ? a.lse[static_cast<size_t>(tok0 + i) * a.n_head + head] : -INFINITY;
        s_seen[i] = { 0, -1 };
        if (real && l != -INFINITY) s_seen[i] = kvf_seen_by(a, tok0 + i);
        s_lse[i] = l * KVF_LOG2E;
    }
}

template <int DP> KVF_KERNEL_OF(MASS_THREADS, 3) mass_kernel(kvf_cuda_attn a, float *mass)
{
    KVF_SHARED_DYN(f16, sk); /* keys [64][DP], then queries, rounded and rest [2][32][DP] */
    KVF_SHARED(float, s_lse, MASS_QUERIES);
    KVF_SHARED(kvf_seen, s_seen, MASS_QUERIES);
    f16 *sq = sk + MASS_KEYS * DP;
    int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5), group = a.n_head / a.n_head_kv;
    int head = a.head_kv0 * group + static_cast<int>(blockIdx.y), k = static_cast<int>(blockIdx.x) * MASS_KEYS;
    kvf_places p = kvf_places_of(a, k >> KVF_BLOCK_SHIFT);
    kvf_seen all = { 0, a.n_key - 1 };
    kvf_load_tile<DP>(a, head / group, k, MASS_KEYS, all, sk, nullptr, static_cast<int>(threadIdx.x), MASS_THREADS);
    kvf_cp_commit();
    kvf_cp_wait<0>();
    float sum[2] = { 0.0f, 0.0f };
    for (int tok0 = 0; tok0 < a.n_tok; tok0 += MASS_QUERIES) {
        int last = tok0 + MASS_QUERIES < a.n_tok ? tok0 + MASS_QUERIES - 1 : a.n_tok - 1;
        if (kvf_seen_by(a, last).hi < k || kvf_seen_by(a, tok0).lo >= k + MASS_KEYS) continue; /* none sees any */
        kvf_sync(); /* the queries before are read */
        load_mass_queries<DP>(a, head, tok0, sq, s_lse, s_seen);
        kvf_sync();
        float s[MASS_QUERIES / 8][4];
        KVF_UNROLL
        for (int n = 0; n < MASS_QUERIES / 8; n++)
            KVF_UNROLL
            for (int j = 0; j < 4; j++) s[n][j] = 0.0f;
        KVF_UNROLL_BY(4)
        for (int i = 0; i < DP / 16; i++) {
            if (i * 16 >= a.head_dim) break;
            uint32_t fa[4];
            kvf_ldmatrix4(fa, sk + kvf_swizzle<DP>(warp * 16 + (lane & 15), 2 * i + (lane >> 4)));
            KVF_UNROLL
            for (int n = 0; n < MASS_QUERIES / 16; n++) {
                uint32_t high[4], low[4];
                int at = kvf_swizzle<DP>(n * 16 + (lane & 7) + (lane >> 4) * 8, 2 * i + (lane >> 3 & 1));
                kvf_ldmatrix4(low, sq + MASS_QUERIES * DP + at);
                kvf_ldmatrix4(high, sq + at);
                KVF_UNROLL
                for (int j = 0; j < 2; j++) {
                    kvf_mma(s[2 * n + j], fa, low + 2 * j, f16());
                    kvf_mma(s[2 * n + j], fa, high + 2 * j, f16());
                }
            }
        }
        KVF_UNROLL
        for (int n = 0; n < MASS_QUERIES / 8; n++)
            KVF_UNROLL
            for (int j = 0; j < 4; j++) {
                int q = n * 8 + 2 * (lane & 3) + (j & 1), key = k + warp * 16 + lane / 4 + (j >> 1) * 8;
                int place = key & (KVF_BLOCK - 1);
                float x = a.softcap > 0.0f ? tanhf(s[n][j]) * (a.softcap * KVF_LOG2E) : s[n][j];
                bool sees = key >= s_seen[q].lo && key <= s_seen[q].hi && place >= p.v0 && place < p.v1;
                if (sees) sum[j >> 1] += kvf_exp2(x - s_lse[q]);
            }
    }
    int64_t width = static_cast<int64_t>((a.n_key + KVF_BLOCK - 1) / KVF_BLOCK) * KVF_BLOCK;
    KVF_UNROLL
    for (int i = 0; i < 2; i++) {
        sum[i] += kvf_shfl_xor(sum[i], 1);
        sum[i] += kvf_shfl_xor(sum[i], 2);
        if ((lane & 3) == 0) mass[head * width + k + warp * 16 + lane / 4 + i * 8] = sum[i];
    }
}

template <int DP> static size_t mass_bytes() { return (MASS_KEYS + 2 * MASS_QUERIES) * DP * sizeof(f16); }

cudaError_t kvf_cuda_mass_setup(void)
{
    return cudaFuncSetAttribute(mass_kernel<256>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(mass_bytes<256>()));
}

template <int DP> static void run_mass(const kvf_cuda_attn *p, float *mass, cudaStream_t s)
{
    kvf_cuda_attn a = *p;
    int tiles = (a.n_key + KVF_BLOCK - 1) / KVF_BLOCK * (KVF_BLOCK / MASS_KEYS);
    dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.n_kv * (a.n_head / a.n_head_kv)));
    KVF_LAUNCH(mass_kernel<DP>, grid, dim3(MASS_THREADS), mass_bytes<DP>(), s, a, mass);
}

void kvf_cuda_attn_mass(const kvf_cuda_attn *a, float *mass, cudaStream_t s)
{
    if (a->head_dim <= 64)
        run_mass<64>(a, mass, s);
    else if (a->head_dim <= 128)
        run_mass<128>(a, mass, s);
    else
        run_mass<256>(a, mass, s);
}

KVF_KERNEL(256) sum_heads_kernel(const float *mass, float *out, int32_t h0, int32_t h1, int64_t n)
{
    for (int64_t i = kvf_first(); i < n; i += kvf_stride()) {
        float sum = 0.0f;
        for (int32_t h = h0; h < h1; h++) sum += mass[h * n + i];
        out[i] = sum;
    }
}

void kvf_cuda_sum_heads(const float *mass, float *out, int32_t h0, int32_t h1, int64_t n, cudaStream_t s)
{
    KVF_LAUNCH(sum_heads_kernel, dim3(kvf_blocks(n, 256, 65536)), dim3(256), 0, s, mass, out, h0, h1, n);
}
