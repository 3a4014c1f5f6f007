/* k_attn_prefill.cu - attention of many query rows over a list of slots, by mma.sync.
 *
 * A block of four warps takes 64 * MT packed query rows of one KV head; each warp MT tiles of 16 rows, so
 * that a key fragment is used MT times. Keys and values come BN at a time through two stages of cp.async,
 * and the softmax runs along with them (Dao 2023, FlashAttention-2, arXiv:2307.08691, section 3.1). Sums
 * in fp32; queries and weights are rounded to f16 for the products.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/attn.h"

enum { PREFILL_THREADS = 128 };

template <int DP, int MT> struct rows_state {
    float o[MT][DP / 8][4];
    float max[MT][2], sum[MT][2];
};

/* Packed row r of the call, or -1 past the end. */
struct packed_row {
    int tok, head;
};

KVF_DEV packed_row row_at(const kvf_cuda_attn &a, int h, int r)
{
    int group = a.n_head / a.n_head_kv;
    packed_row p = { -1, 0 };
    if (r < a.n_tok * group) p = { r / group, h * group + r % group };
    return p;
}

template <int DP, int MT> KVF_DEV void load_queries(const kvf_cuda_attn &a, int h, int row0, f16 *sq)
{
    const int chunks = DP / 8;
    float scale = kvf_query_scale(a);
    for (int i = static_cast<int>(threadIdx.x); i < 64 * MT * chunks; i += PREFILL_THREADS) {
        int r = i / chunks, c = i % chunks;
        packed_row p = row_at(a, h, row0 + r);
        bool real = p.tok >= 0 && c * 8 < a.head_dim;
        const float *q = a.q + (static_cast<size_t>(real ? p.tok : 0) * a.n_head + p.head) * a.head_dim + (real ? c * 8 : 0);
        kvf_query_chunk(q, scale, real, sq + kvf_swizzle<DP>(r, c), nullptr);
    }
}

/* s = q k^T of a warp's rows and a tile of keys. */
template <int DP, int MT, int BN>
KVF_DEV void scores(const f16 *sq, const f16 *sk, int d, int warp_row, int lane, float (*s)[BN / 8][4])
{
    KVF_UNROLL
    for (int m = 0; m < MT; m++)
        KVF_UNROLL
        for (int n = 0; n < BN / 8; n++)
            KVF_UNROLL
            for (int j = 0; j < 4; j++) s[m][n][j] = 0.0f;
    KVF_UNROLL_BY(MT == 1 ? 4 : 2) /* addresses of more steps would not fit the registers */
    for (int k = 0; k < DP / 16; k++) {
        if (k * 16 >= d) break;
        uint32_t fa[MT][4];
        KVF_UNROLL
        for (int m = 0; m < MT; m++)
            kvf_ldmatrix4(fa[m], sq + kvf_swizzle<DP>(warp_row + m * 16 + (lane & 15), 2 * k + (lane >> 4)));
        KVF_UNROLL
        for (int n = 0; n < BN / 16; n++) {
            uint32_t fb[4];
            kvf_ldmatrix4(fb, sk + kvf_swizzle<DP>(n * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
            KVF_UNROLL
            for (int m = 0; m < MT; m++) {
                kvf_mma(s[m][2 * n], fa[m], fb, f16());
                kvf_mma(s[m][2 * n + 1], fa[m], fb + 2, f16());
            }
        }
    }
}

/* Scores that a row does not see become -inf. What a row sees is computed here and not kept: registers
 * are short, and few tiles of a long list come here. */
template <int MT, int BN>
KVF_DEV void mask(const kvf_cuda_attn &a, float (*s)[BN / 8][4], int h, int row, int k, kvf_places p, int lane)
{
    int at = k & (KVF_BLOCK - 1);
    KVF_UNROLL
    for (int m = 0; m < MT; m++)
        KVF_UNROLL
        for (int i = 0; i < 2; i++) {
            packed_row r = row_at(a, h, row + m * 16 + i * 8 + lane / 4);
            kvf_seen v = { 0, -1 };
            if (r.tok >= 0) v = kvf_seen_by(a, r.tok);
            KVF_UNROLL
            for (int n = 0; n < BN / 8; n++)
                KVF_UNROLL
                for (int j = 0; j < 2; j++) {
                    int c = n * 8 + 2 * (lane & 3) + j;
                    if (k + c < v.lo || k + c > v.hi || at + c < p.v0 || at + c >= p.v1) s[m][n][2 * i + j] = -INFINITY;
                }
        }
}

/* One step of the running softmax of m-tile `m`: s becomes weights, o and sum are brought to the new maximum. */
template <int DP, int MT, int BN> KVF_DEV void softmax_step(rows_state<DP, MT> &r, float (*s)[4], int m)
{
    KVF_UNROLL
    for (int i = 0; i < 2; i++) {
        float max = r.max[m][i];
        KVF_UNROLL
        for (int n = 0; n < BN / 8; n++) max = fmaxf(max, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
        max = fmaxf(max, kvf_shfl_xor(max, 1));
        max = fmaxf(max, kvf_shfl_xor(max, 2));
        float base = max == -INFINITY ? 0.0f : max, old = kvf_exp2(r.max[m][i] - base), sum = 0.0f;
        r.max[m][i] = max;
        KVF_UNROLL
        for (int n = 0; n < BN / 8; n++) {
            s[n][2 * i] = kvf_exp2(s[n][2 * i] - base);
            s[n][2 * i + 1] = kvf_exp2(s[n][2 * i + 1] - base);
            sum += s[n][2 * i] + s[n][2 * i + 1];
        }
        r.sum[m][i] = r.sum[m][i] * old + sum;
        KVF_UNROLL
        for (int n = 0; n < DP / 8; n++) {
            r.o[m][n][2 * i] *= old;
            r.o[m][n][2 * i + 1] *= old;
        }
    }
}

/* o += weights times values; the weights go from sums of the first product to factors of the second as they are. */
template <int DP, int MT, int BN>
KVF_DEV void weigh(rows_state<DP, MT> &r, const float (*s)[BN / 8][4], const f16 *sv, int d, int lane)
{
    KVF_UNROLL
    for (int k = 0; k < BN / 16; k++) {
        uint32_t fa[MT][4];
        KVF_UNROLL
        for (int m = 0; m < MT; m++)
            KVF_UNROLL
            for (int i = 0; i < 4; i++) {
                const float *x = &s[m][2 * k + (i >> 1)][2 * (i & 1)];
                fa[m][i] = kvf_pack(kvf_f16_of(x[0]), kvf_f16_of(x[1]));
            }
        KVF_UNROLL
        for (int n = 0; n < DP / 16; n++) {
            if (n * 16 >= d) break;
            uint32_t fb[4];
            kvf_ldmatrix4_trans(fb, sv + kvf_swizzle<DP>(k * 16 + (lane & 15), 2 * n + (lane >> 4)));
            KVF_UNROLL
            for (int m = 0; m < MT; m++) {
                kvf_mma(r.o[m][2 * n], fa[m], fb, f16());
                kvf_mma(r.o[m][2 * n + 1], fa[m], fb + 2, f16());
            }
        }
    }
}

template <int DP, int MT> KVF_DEV void write_rows(const kvf_cuda_attn &a, rows_state<DP, MT> &r, int h, int row, int lane)
{
    int z = static_cast<int>(blockIdx.z);
    float *out = a.n_split > 1 ? a.part_o : a.o, *lse = a.n_split > 1 ? a.part_lse : a.lse;
    KVF_UNROLL
    for (int m = 0; m < MT; m++)
        KVF_UNROLL
        for (int i = 0; i < 2; i++) {
            float sum = r.sum[m][i];
            sum += kvf_shfl_xor(sum, 1);
            sum += kvf_shfl_xor(sum, 2);
            packed_row p = row_at(a, h, row + m * 16 + i * 8 + lane / 4);
            if (p.tok < 0) continue;
            float inv = sum > 0.0f ? 1.0f / sum : sum == 0.0f ? 0.0f : sum; /* NaN stays */
            size_t at = kvf_out_row(a, p.tok, p.head, z);
            KVF_UNROLL
            for (int n = 0; n < DP / 8; n++) {
                int c = n * 8 + 2 * (lane & 3);
                if (c >= a.head_dim) break;
                out[at * a.head_dim + c] = r.o[m][n][2 * i] * inv;
                out[at * a.head_dim + c + 1] = r.o[m][n][2 * i + 1] * inv;
            }
            if (lse && (lane & 3) == 0) lse[at] = sum == 0.0f ? -INFINITY : (r.max[m][i] + log2f(sum)) * KVF_LN2;
        }
}

template <int DP, int MT, int BN, bool CAP> KVF_KERNEL(PREFILL_THREADS) prefill_kernel(kvf_cuda_attn a)
{
    const int rows = 64 * MT;
    KVF_SHARED_DYN(f16, sq);
    f16 *stage = sq + rows * DP; /* [2][keys, values][BN][DP] */
    int me = static_cast<int>(threadIdx.x), lane = me & 31, warp_row = me / 32 * 16 * MT;
    int h = a.head_kv0 + static_cast<int>(blockIdx.y), group = a.n_head / a.n_head_kv, n_row = a.n_tok * group;
    /* Late rows see most keys: they go first, so that the short blocks fill the end. */
    int row0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * rows, row1 = row0 + rows < n_row ? row0 + rows : n_row;
    kvf_seen first = kvf_seen_by(a, row0 / group), last = kvf_seen_by(a, (row1 - 1) / group), any = { first.lo, last.hi };
    KVF_SHARED(kvf_seen, every, 1); /* keys that all rows see; not in registers, which are short */
    if (me == 0) every[0] = { last.lo, row1 == row0 + rows ? first.hi : -1 };
    load_queries<DP, MT>(a, h, row0, sq);

    rows_state<DP, MT> r;
    KVF_UNROLL
    for (int m = 0; m < MT; m++) {
        KVF_UNROLL
        for (int i = 0; i < 2; i++) {
            r.max[m][i] = -INFINITY;
            r.sum[m][i] = 0.0f;
        }
        KVF_UNROLL
        for (int n = 0; n < DP / 8; n++)
            KVF_UNROLL
            for (int j = 0; j < 4; j++) r.o[m][n][j] = 0.0f;
    }

    int begin = a.key0 + static_cast<int>(blockIdx.z) * a.split_keys, end = begin + a.split_keys;
    if (any.lo > begin) begin = any.lo / BN * BN;
    if (any.hi + 1 < end) end = any.hi + 1;
    int k = kvf_next_tile(a, begin, end, BN, BN), at = 0;
    if (k < end) kvf_load_tile<DP>(a, h, k, BN, any, stage, stage + BN * DP, me, PREFILL_THREADS);
    kvf_cp_commit();
    while (k < end) {
        int next = kvf_next_tile(a, k + BN, end, BN, BN);
        f16 *mine = stage + at * 2 * BN * DP, *other = stage + (1 - at) * 2 * BN * DP;
        if (next < end) kvf_load_tile<DP>(a, h, next, BN, any, other, other + BN * DP, me, PREFILL_THREADS);
        kvf_cp_commit();
        kvf_cp_wait<1>();
        kvf_sync();
        float s[MT][BN / 8][4];
        scores<DP, MT, BN>(sq, mine, a.head_dim, warp_row, lane, s);
        if (CAP) {
            KVF_UNROLL
            for (int m = 0; m < MT; m++)
                KVF_UNROLL
                for (int n = 0; n < BN / 8; n++)
                    KVF_UNROLL
                    for (int j = 0; j < 4; j++) s[m][n][j] = tanhf(s[m][n][j]) * (a.softcap * KVF_LOG2E);
        }
        kvf_places p = kvf_places_of(a, k >> KVF_BLOCK_SHIFT);
        int place = k & (KVF_BLOCK - 1);
        bool all = k >= every[0].lo && k + BN - 1 <= every[0].hi && place >= p.v0 && place + BN <= p.v1;
        if (!all) mask<MT, BN>(a, s, h, row0 + warp_row, k, p, lane);
        KVF_UNROLL
        for (int m = 0; m < MT; m++) softmax_step<DP, MT, BN>(r, s[m], m);
        weigh<DP, MT, BN>(r, s, mine + BN * DP, a.head_dim, lane);
        kvf_sync();
        k = next;
        at = 1 - at;
    }
    write_rows<DP, MT>(a, r, h, row0 + warp_row, lane);
}

/* Rows of a block and keys of a tile by head size: what fits 99 KiB of shared memory and the registers,
 * of which the tanh of capped scores needs more. */
template <int DP, bool CAP> struct prefill_shape {
    static const int MT = DP == 256 ? 1 : 2, BN = DP == 256 || CAP ? 32 : 64;
    static const size_t BYTES = (64 * MT + 4 * BN) * DP * sizeof(f16);
};

template <int DP, bool CAP> static cudaError_t allow()
{
    typedef prefill_shape<DP, CAP> shape;
    return cudaFuncSetAttribute(prefill_kernel<DP, shape::MT, shape::BN, CAP>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shape::BYTES));
}

cudaError_t kvf_cuda_prefill_setup(void)
{
    cudaError_t e[] = { allow<64, false>(), allow<128, false>(), allow<256, false>(),
                        allow<64, true>(), allow<128, true>(), allow<256, true>() };
    for (cudaError_t x : e)
        if (x != cudaSuccess) return x;
    return cudaSuccess;
}

template <int DP, bool CAP> static void prefill(const kvf_cuda_attn *p, cudaStream_t s)
{
    typedef prefill_shape<DP, CAP> shape;
    kvf_cuda_attn a = *p;
    int rows = a.n_tok * (a.n_head / a.n_head_kv), per = 64 * shape::MT;
    dim3 grid(static_cast<unsigned>((rows + per - 1) / per), static_cast<unsigned>(a.n_kv), static_cast<unsigned>(a.n_split));
    KVF_LAUNCH((prefill_kernel<DP, shape::MT, shape::BN, CAP>), grid, dim3(PREFILL_THREADS), shape::BYTES, s, a);
}

template <bool CAP> static void prefill_of(const kvf_cuda_attn *a, cudaStream_t s)
{
    if (a->head_dim <= 64)
        prefill<64, CAP>(a, s);
    else if (a->head_dim <= 128)
        prefill<128, CAP>(a, s);
    else
        prefill<256, CAP>(a, s);
}

void kvf_cuda_attn_prefill(const kvf_cuda_attn *a, cudaStream_t s)
{
    if (a->softcap > 0.0f)
        prefill_of<true>(a, s);
    else
        prefill_of<false>(a, s);
}
