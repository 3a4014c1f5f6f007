/* k_video.cu - features of video frames: likeness of neighbours, density peaks, merged means.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/kernels.h"

/* ---- Neighbouring frames ------------------------------------------------------------------------------ */

/* A warp takes a token of two neighbouring frames. */
KVF_KERNEL(256) cosine_kernel(const float *x, int64_t n, int64_t frame, int32_t n_tok, int32_t width, float *out)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
    if (i >= n) return;
    const float *a = x + i / n_tok * frame + i % n_tok * width, *b = a + frame;
    float ab = 0.0f, aa = 0.0f, bb = 0.0f;
    for (int c = static_cast<int>(threadIdx.x & 31); c < width; c += 32) {
        ab += a[c] * b[c];
        aa += a[c] * a[c];
        bb += b[c] * b[c];
    }
    ab = kvf_warp_sum(ab);
    aa = kvf_warp_sum(aa);
    bb = kvf_warp_sum(bb);
    if ((threadIdx.x & 31) == 0) out[i] = aa > 0.0f && bb > 0.0f ? ab / (sqrtf(aa) * sqrtf(bb)) : 0.0f;
}

void kvf_cuda_frame_cosine(const float *x, int32_t n_frame, int32_t n_tok, int32_t width, float *out, cudaStream_t s)
{
    int64_t n = static_cast<int64_t>(n_frame - 1) * n_tok, frame = static_cast<int64_t>(n_tok) * width;
    if (n > 0) KVF_LAUNCH(cosine_kernel, dim3(static_cast<unsigned>((n + 7) / 8)), dim3(256), 0, s, x, n, frame, n_tok, width, out);
}

/* ---- Distances ------------------------------------------------------------------------------------------ */

enum { SIDE = 32 };

/* A block makes 32 x 32 distances from sums of squared differences: no cancellation, so that near rows
 * keep their order. Each of 256 threads has four of them. */
KVF_KERNEL(256) distance_kernel(const float *x, int32_t n, int32_t width, float *out)
{
    KVF_SHARED(float, a, SIDE * (SIDE + 1));
    KVF_SHARED(float, b, SIDE * (SIDE + 1));
    int me = static_cast<int>(threadIdx.x), col = me & 31, row = me >> 5;
    int64_t i0 = static_cast<int64_t>(blockIdx.y) * SIDE, j0 = static_cast<int64_t>(blockIdx.x) * SIDE;
    float d[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    for (int c0 = 0; c0 < width; c0 += SIDE) {
        kvf_sync();
        for (int r = row; r < SIDE; r += 8) {
            bool real = c0 + col < width;
            a[r * (SIDE + 1) + col] = real && i0 + r < n ? x[(i0 + r) * width + c0 + col] : 0.0f;
            b[r * (SIDE + 1) + col] = real && j0 + r < n ? x[(j0 + r) * width + c0 + col] : 0.0f;
        }
        kvf_sync();
        for (int c = 0; c < SIDE; c++)
            for (int k = 0; k < 4; k++) {
                float y = a[(row + 8 * k) * (SIDE + 1) + c] - b[col * (SIDE + 1) + c];
                d[k] += y * y;
            }
    }
    for (int k = 0; k < 4; k++)
        if (i0 + row + 8 * k < n && j0 + col < n) out[(i0 + row + 8 * k) * n + j0 + col] = d[k];
}

void kvf_cuda_distances(const float *x, int32_t n, int32_t width, float *out, cudaStream_t s)
{
    unsigned side = static_cast<unsigned>((n + SIDE - 1) / SIDE);
    KVF_LAUNCH(distance_kernel, dim3(side, side), dim3(256), 0, s, x, n, width, out);
}

/* ---- Density peaks ---------------------------------------------------------------------------------------- */

/* Du et al. 2016, Knowledge-Based Systems 99, eq. 6: rho_i = exp(-mean of the squared distances to the k
 * nearest, over the width as in the token clusterings that use it). A warp takes a row: lane by lane the
 * nearest not yet taken, ties by the lower index; the row itself is left out. */
KVF_KERNEL(256) rho_kernel(const float *d2, int32_t n, int32_t width, int32_t k, float *rho)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
    if (i >= n) return;
    float last = -1.0f, sum = 0.0f;
    int last_at = -1, take = k < n - 1 ? k : n - 1;
    for (int t = 0; t < take; t++) {
        float best = INFINITY;
        int at = n;
        for (int j = static_cast<int>(threadIdx.x & 31); j < n; j += 32) {
            float d = d2[i * n + j];
            bool after = d > last || (d == last && j > last_at);
            if (j != i && after && d < best) {
                best = d;
                at = j;
            }
        }
        for (int m = 16; m; m >>= 1) {
            float other = kvf_shfl_xor(best, m);
            int other_at = kvf_shfl_xor(at, m);
            if (other < best || (other == best && other_at < at)) {
                best = other;
                at = other_at;
            }
        }
        last = best;
        last_at = at;
        sum += best / static_cast<float>(width);
    }
    if ((threadIdx.x & 31) == 0) rho[i] = expf(take > 0 ? -sum / static_cast<float>(take) : 0.0f);
}

/* delta_i: the least distance to a row of higher density (ties: of lower index), for the highest the
 * largest distance of all. */
KVF_KERNEL(256) delta_kernel(const float *d2, const float *rho, int32_t n, float *delta)
{
    int64_t i = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
    if (i >= n) return;
    float least = INFINITY, most = 0.0f, mine = rho[i];
    for (int j = static_cast<int>(threadIdx.x & 31); j < n; j += 32) {
        float d = d2[i * n + j];
        most = fmaxf(most, d);
        if (rho[j] > mine || (rho[j] == mine && j < i)) least = fminf(least, d);
    }
    least = -kvf_warp_max(-least);
    most = kvf_warp_max(most);
    if ((threadIdx.x & 31) == 0) delta[i] = sqrtf(least < INFINITY ? least : most);
}

void kvf_cuda_density(const float *d2, int32_t n, int32_t width, int32_t k, float *rho, float *delta, cudaStream_t s)
{
    dim3 grid(static_cast<unsigned>((n + 7) / 8));
    KVF_LAUNCH(rho_kernel, grid, dim3(256), 0, s, d2, n, width, k, rho);
    KVF_LAUNCH(delta_kernel, grid, dim3(256), 0, s, d2, rho, n, delta);
}

/* ---- Merged means -------------------------------------------------------------------------------------------- */

/* A block takes a group and 128 channels: rows are summed in their order, so the mean is the same each time. */
KVF_KERNEL(128) mean_kernel(const float *x, const int32_t *group, int32_t n, int32_t width, float *out)
{
    int c = static_cast<int>(blockIdx.y * 128 + threadIdx.x), g = static_cast<int>(blockIdx.x), count = 0;
    float sum = 0.0f;
    for (int i = 0; i < n; i++) {
        if (group[i] != g) continue;
        count++;
        if (c < width) sum += x[static_cast<int64_t>(i) * width + c];
    }
    if (c < width) out[static_cast<int64_t>(g) * width + c] = count ? sum / static_cast<float>(count) : 0.0f;
}

void kvf_cuda_merge_mean(const float *x, const int32_t *group, int32_t n, int32_t width, int32_t n_group, float *out, cudaStream_t s)
{
    dim3 grid(static_cast<unsigned>(n_group), static_cast<unsigned>((width + 127) / 128));
    if (n_group > 0) KVF_LAUNCH(mean_kernel, grid, dim3(128), 0, s, x, group, n, width, out);
}
