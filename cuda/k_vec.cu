/* k_vec.cu - norms, element-wise ops, and the merge of partial attention.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/kernels.h"

/* ---- RMS norm --------------------------------------------------------------------------------- */

struct norm_args {
    const float *x, *weight;
    float *out;
    int64_t n_row, width, x_stride, out_stride;
    float eps;
};

/* One warp a row: heads, and anything else that 32 lanes read in a few steps. */
KVF_KERNEL(256) norm_warp_kernel(norm_args a)
{
    int64_t r = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (r >= a.n_row) return;
    const float *x = a.x + r * a.x_stride;
    float *out = a.out + r * a.out_stride, sum = 0.0f;
    for (int64_t i = lane; i < a.width; i += 32) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(kvf_warp_sum(sum) / static_cast<float>(a.width) + a.eps);
    for (int64_t i = lane; i < a.width; i += 32) out[i] = x[i] * scale * (a.weight ? a.weight[i] : 1.0f);
}

KVF_KERNEL(512) norm_block_kernel(norm_args a)
{
    KVF_SHARED(float, part, 16);
    const float *x = a.x + blockIdx.x * a.x_stride;
    float *out = a.out + blockIdx.x * a.out_stride, sum = 0.0f;
    for (int64_t i = threadIdx.x; i < a.width; i += 512) sum += x[i] * x[i];
    sum = kvf_warp_sum(sum);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = sum;
    kvf_sync();
    sum = kvf_warp_sum(part[threadIdx.x & 15]) * 0.5f; /* each of the 16 counted twice */
    float scale = 1.0f / sqrtf(sum / static_cast<float>(a.width) + a.eps);
    for (int64_t i = threadIdx.x; i < a.width; i += 512) out[i] = x[i] * scale * (a.weight ? a.weight[i] : 1.0f);
}

void kvf_cuda_rmsnorm(const kvf_rmsnorm_args *a, cudaStream_t s)
{
    norm_args n = { a->x, a->weight, a->out, a->n_row, a->width, a->x_stride, a->out_stride, a->eps };
    if (a->width <= 1024)
        KVF_LAUNCH(norm_warp_kernel, dim3(static_cast<unsigned>((a->n_row + 7) / 8)), dim3(256), 0, s, n);
    else
        KVF_LAUNCH(norm_block_kernel, dim3(static_cast<unsigned>(a->n_row)), dim3(512), 0, s, n);
}

/* ---- Layer norm --------------------------------------------------------------------------------- */

/* One warp a row. The variance is taken around the mean, in a second pass: E(x^2) - mean^2 cancels where the mean is
 * large. `out` may be x: a lane writes only what it alone reads. */
KVF_KERNEL(256) layernorm_kernel(kvf_layernorm_args a)
{
    int64_t r = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (r >= a.n_row) return;
    const float *x = a.x + r * a.width;
    float *out = a.out + r * a.width, sum = 0.0f, squares = 0.0f;
    for (int64_t i = lane; i < a.width; i += 32) sum += x[i];
    float mean = kvf_warp_sum(sum) / static_cast<float>(a.width);
    for (int64_t i = lane; i < a.width; i += 32) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(kvf_warp_sum(squares) / static_cast<float>(a.width) + a.eps);
    for (int64_t i = lane; i < a.width; i += 32) out[i] = (x[i] - mean) * scale * a.weight[i] + a.bias[i];
}

void kvf_cuda_layernorm(const kvf_layernorm_args *a, cudaStream_t s)
{
    kvf_layernorm_args n = *a;
    KVF_LAUNCH(layernorm_kernel, dim3(static_cast<unsigned>((a->n_row + 7) / 8)), dim3(256), 0, s, n);
}

/* ---- Element by element ------------------------------------------------------------------------- */

KVF_KERNEL(256) add_kernel(float *x, const float *y, int64_t n)
{
    for (int64_t i = kvf_first(); i < n; i += kvf_stride()) x[i] += y[i];
}

void kvf_cuda_add(float *x, const float *y, int64_t n, cudaStream_t s)
{
    KVF_LAUNCH(add_kernel, dim3(kvf_blocks(n, 1024, 65536)), dim3(256), 0, s, x, y, n);
}

KVF_DEV float act_of(float x, kvf_act act)
{
    if (act == KVF_ACT_SILU) return x / (1.0f + expf(-x));
    if (act == KVF_ACT_GELU_QUICK) return x / (1.0f + expf(-1.702f * x));
    if (act == KVF_ACT_GELU_ERF) return 0.5f * x * erfcf(-0.70710678118654752440f * x); /* keeps its digits below 0 */
    return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
}

KVF_KERNEL(256) act_kernel(float *x, int64_t n, kvf_act act)
{
    for (int64_t i = kvf_first(); i < n; i += kvf_stride()) x[i] = act_of(x[i], act);
}

void kvf_cuda_act(float *x, int64_t n, kvf_act act, cudaStream_t s)
{
    KVF_LAUNCH(act_kernel, dim3(kvf_blocks(n, 1024, 65536)), dim3(256), 0, s, x, n, act);
}

KVF_KERNEL(256) glu_kernel(float *up, const float *gate, int64_t n, kvf_act act)
{
    for (int64_t i = kvf_first(); i < n; i += kvf_stride()) up[i] *= act_of(gate[i], act);
}

void kvf_cuda_glu(float *up, const float *gate, int64_t n, kvf_act act, cudaStream_t s)
{
    KVF_LAUNCH(glu_kernel, dim3(kvf_blocks(n, 1024, 65536)), dim3(256), 0, s, up, gate, n, act);
}

KVF_KERNEL(256) bias_kernel(float *y, const float *bias, int64_t n, int64_t width, bool add)
{
    for (int64_t i = kvf_first(); i < n; i += kvf_stride()) y[i] = (add ? y[i] : 0.0f) + bias[i % width];
}

void kvf_cuda_bias_rows(float *y, const float *bias, int64_t n_row, int64_t width, bool add, cudaStream_t s)
{
    int64_t n = n_row * width;
    KVF_LAUNCH(bias_kernel, dim3(kvf_blocks(n, 1024, 65536)), dim3(256), 0, s, y, bias, n, width, add);
}

KVF_KERNEL(256) to_bf16_kernel(const float *x, bf16 *out, int64_t n)
{
    for (int64_t i = kvf_first(); i < n; i += kvf_stride()) out[i] = kvf_bf16_of(x[i]);
}

void kvf_cuda_to_bf16(const float *x, bf16 *out, int64_t n, cudaStream_t s)
{
    KVF_LAUNCH(to_bf16_kernel, dim3(kvf_blocks(n, 1024, 65536)), dim3(256), 0, s, x, out, n);
}

/* ---- Merge of two partial attentions -------------------------------------------------------------- */

/* One warp a row. A part with lse = -inf is left out: it may hold anything. */
KVF_KERNEL(256) lse_merge_kernel(kvf_lse_merge_args a)
{
    int64_t r = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
    int lane = static_cast<int>(threadIdx.x & 31);
    if (r >= a.n_row) return;
    float l1 = a.lse[r], l2 = a.lse2[r];
    kvf_sync_warp(); /* all lanes have read lse before one writes it */
    if (l2 == -INFINITY) return;
    float *o = a.o + r * a.head_dim;
    const float *o2 = a.o2 + r * a.head_dim;
    float max = fmaxf(l1, l2), w1 = l1 == -INFINITY ? 0.0f : expf(l1 - max), w2 = expf(l2 - max), sum = w1 + w2;
    for (int i = lane; i < a.head_dim; i += 32)
        o[i] = (w1 == 0.0f && l1 == -INFINITY) ? o2[i] : (o[i] * w1 + o2[i] * w2) / sum;
    if (lane == 0) a.lse[r] = l1 == -INFINITY ? l2 : max + logf(sum);
}

void kvf_cuda_lse_merge(const kvf_lse_merge_args *a, cudaStream_t s)
{
    kvf_lse_merge_args m = *a;
    KVF_LAUNCH(lse_merge_kernel, dim3(static_cast<unsigned>((a->n_row + 7) / 8)), dim3(256), 0, s, m);
}
