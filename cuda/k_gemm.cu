/* k_gemm.cu - y [n_tok][n_out] (+)= x [n_tok][n_in] w [n_out][n_in]^T with bf16 factors and fp32 sums.
 *
 * Stands in where cuBLASLt cannot be loaded, and under emulation. A block of four warps makes 64 x 64 of
 * y; each warp 32 x 32. 32 columns of x and w at a time come through three stages of cp.async. n_in is a
 * multiple of 8, so that rows are whole 16-byte chunks; columns past its end are zeros.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/kernels.h"

enum { GEMM_THREADS = 128, TILE_M = 64, TILE_N = 64, TILE_K = 32, STAGES = 3 };

struct gemm_args {
    const bf16 *x, *w;
    float *y;
    int64_t n_tok, n_out, n_in;
    bool add;
};

/* Rows of 64 bytes: two of them are 128, hence the shift. */
KVF_DEV int gemm_at(int row, int chunk) { return row * TILE_K + ((chunk ^ (row >> 1 & 3)) << 3); }

KVF_DEV void load_side(const bf16 *p, int64_t row0, int64_t n_row, int64_t k0, int64_t n_in, bf16 *tile)
{
    for (int i = static_cast<int>(threadIdx.x); i < 64 * (TILE_K / 8); i += GEMM_THREADS) {
        int r = i / (TILE_K / 8), c = i % (TILE_K / 8);
        bool real = row0 + r < n_row && k0 + c * 8 < n_in;
        kvf_cp_async16(tile + gemm_at(r, c), real ? p + (row0 + r) * n_in + k0 + c * 8 : p, real);
    }
}

KVF_KERNEL(GEMM_THREADS) gemm_kernel(gemm_args a)
{
    KVF_SHARED(bf16, tiles, STAGES * 2 * 64 * TILE_K);
    int me = static_cast<int>(threadIdx.x), lane = me & 31, wm = me / 64 * 32, wn = me / 32 % 2 * 32;
    int64_t m0 = static_cast<int64_t>(blockIdx.y) * TILE_M, n0 = static_cast<int64_t>(blockIdx.x) * TILE_N;
    int n_step = static_cast<int>((a.n_in + TILE_K - 1) / TILE_K);
    float c[2][4][4];
    KVF_UNROLL
    for (int m = 0; m < 2; m++)
        KVF_UNROLL
        for (int n = 0; n < 4; n++)
            KVF_UNROLL
            for (int j = 0; j < 4; j++) c[m][n][j] = 0.0f;
    for (int i = 0; i < STAGES - 1; i++) {
        bf16 *to = tiles + i * 2 * 64 * TILE_K;
        if (i < n_step) {
            load_side(a.x, m0, a.n_tok, static_cast<int64_t>(i) * TILE_K, a.n_in, to);
            load_side(a.w, n0, a.n_out, static_cast<int64_t>(i) * TILE_K, a.n_in, to + 64 * TILE_K);
        }
        kvf_cp_commit();
    }
    for (int i = 0; i < n_step; i++) {
        kvf_cp_wait<STAGES - 2>();
        kvf_sync(); /* step i has come for all, and the stage of step i - 1 is read */
        int next = i + STAGES - 1;
        if (next < n_step) {
            bf16 *to = tiles + next % STAGES * 2 * 64 * TILE_K;
            load_side(a.x, m0, a.n_tok, static_cast<int64_t>(next) * TILE_K, a.n_in, to);
            load_side(a.w, n0, a.n_out, static_cast<int64_t>(next) * TILE_K, a.n_in, to + 64 * TILE_K);
        }
        kvf_cp_commit();
        const bf16 *sx = tiles + i % STAGES * 2 * 64 * TILE_K, *sw = sx + 64 * TILE_K;
        KVF_UNROLL
        for (int k = 0; k < TILE_K / 16; k++) {
            uint32_t fa[2][4];
            KVF_UNROLL
            for (int m = 0; m < 2; m++) kvf_ldmatrix4(fa[m], sx + gemm_at(wm + m * 16 + (lane & 15), 2 * k + (lane >> 4)));
            KVF_UNROLL
            for (int n = 0; n < 2; n++) {
                uint32_t fb[4];
                kvf_ldmatrix4(fb, sw + gemm_at(wn + n * 16 + (lane & 7) + (lane >> 4) * 8, 2 * k + (lane >> 3 & 1)));
                KVF_UNROLL
                for (int m = 0; m < 2; m++) {
                    kvf_mma(c[m][2 * n], fa[m], fb, bf16());
                    kvf_mma(c[m][2 * n + 1], fa[m], fb + 2, bf16());
                }
            }
        }
    }
    KVF_UNROLL
    for (int m = 0; m < 2; m++)
        KVF_UNROLL
        for (int n = 0; n < 4; n++)
            KVF_UNROLL
            for (int j = 0; j < 4; j++) {
                int64_t row = m0 + wm + m * 16 + (j >> 1) * 8 + lane / 4, col = n0 + wn + n * 8 + 2 * (lane & 3) + (j & 1);
                if (row >= a.n_tok || col >= a.n_out) continue;
                float *y = a.y + row * a.n_out + col;
                *y = a.add ? *y + c[m][n][j] : c[m][n][j];
            }
}

void kvf_cuda_gemm_bf16(const bf16 *x, const bf16 *w, float *y, int64_t n_tok, int64_t n_out, int64_t n_in, bool add, cudaStream_t s)
{
    gemm_args a = { x, w, y, n_tok, n_out, n_in, add };
    dim3 grid(static_cast<unsigned>((n_out + TILE_N - 1) / TILE_N), static_cast<unsigned>((n_tok + TILE_M - 1) / TILE_M));
    KVF_LAUNCH(gemm_kernel, grid, dim3(GEMM_THREADS), 0, s, a);
}
