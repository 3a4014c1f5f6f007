/* k_gemv.cu - a matrix times up to eight vectors, bound by reading the matrix once.
 *
 * A warp computes one row for all tokens; its lanes take units of 32 weights (quant.h), so that a warp
 * reads 512 bytes of a row at a time. Quantised weights meet activations quantised per 32 (form Q8 of
 * src/backend/cpu/mm.h): integer dot products inside a group, fp32 outside. Float weights and the exact
 * mode multiply in fp32.
 *
 * Q8 activations of a call, [n_tok] runs each: int8 q [n_in], float d [n_in / 32], int16 sum [n_in / 16].
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/quant.h"

enum { GEMV_WARPS = 4 };

struct q8_view {
    const int8_t *q;
    const float *d;
    const int16_t *sum;
};

struct q8_out {
    int8_t *q;
    float *d;
    int16_t *sum;
};

static size_t q8_d_at(int64_t n_tok, int64_t n_in) { return (static_cast<size_t>(n_tok * n_in) + 255) / 256 * 256; }
static size_t q8_sum_at(int64_t n_tok, int64_t n_in)
{
    return q8_d_at(n_tok, n_in) + (static_cast<size_t>(n_tok * (n_in / 32)) * 4 + 255) / 256 * 256;
}

size_t kvf_cuda_q8_bytes(int64_t n_tok, int64_t n_in)
{
    return q8_sum_at(n_tok, n_in) + static_cast<size_t>(n_tok * (n_in / 16)) * 2;
}

/* A warp takes 32 values. The maximum is taken on the bits, which put NaN above infinity: a NaN makes a NaN
 * scale and is seen in y. A scale of 0 or NaN goes with q = 0. */
KVF_KERNEL(128) q8_kernel(const float *x, q8_out o, int64_t n_group)
{
    int lane = static_cast<int>(threadIdx.x & 31);
    int64_t g = static_cast<int64_t>(blockIdx.x) * 4 + (threadIdx.x >> 5);
    if (g >= n_group) return;
    float v = x[g * 32 + lane];
    int top = static_cast<int>(kvf_bits(v) & 0x7fffffffu);
    for (int m = 16; m; m >>= 1) {
        int other = kvf_shfl_xor(top, m);
        top = other > top ? other : top;
    }
    float d = kvf_float(static_cast<uint32_t>(top)) / 127.0f, r = d > 0.0f ? v / d : 0.0f;
    if (!(r == r)) r = 0.0f;
    r = r > 127.0f ? 127.0f : r < -127.0f ? -127.0f : r;
    int q = static_cast<int>(rintf(r)), sum = q;
    for (int m = 8; m; m >>= 1) sum += kvf_shfl_xor(sum, m);
    o.q[g * 32 + lane] = static_cast<int8_t>(q);
    if (lane == 0) o.d[g] = d;
    if ((lane & 15) == 0) o.sum[g * 2 + lane / 16] = static_cast<int16_t>(sum);
}

void kvf_cuda_q8(const float *x, void *q8, int64_t n_tok, int64_t n_in, cudaStream_t s)
{
    char *p = static_cast<char *>(q8);
    q8_out o = { reinterpret_cast<int8_t *>(p), reinterpret_cast<float *>(p + q8_d_at(n_tok, n_in)),
                 reinterpret_cast<int16_t *>(p + q8_sum_at(n_tok, n_in)) };
    int64_t n_group = n_tok * n_in / 32;
    KVF_LAUNCH(q8_kernel, dim3(static_cast<unsigned>((n_group + 3) / 4)), dim3(128), 0, s, x, o, n_group);
}

/* ---- Where a sum goes ------------------------------------------------------------------------------ */

struct gemv_end {
    const float *bias, *gate;
    float *y;
    int64_t n_out;
    kvf_act act;
    bool accumulate;
};

KVF_DEV float act_of(float x, kvf_act act)
{
    if (act == KVF_ACT_SILU) return x / (1.0f + expf(-x));
    return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * (x + 0.044715f * x * x * x)));
}

KVF_DEV void finish(const gemv_end &e, int64_t tok, int64_t row, float sum)
{
    int64_t at = tok * e.n_out + row;
    if (e.bias) sum += e.bias[row];
    if (e.gate) sum *= act_of(e.gate[at], e.act);
    e.y[at] = e.accumulate ? e.y[at] + sum : sum;
}

/* ---- Quantised weights ------------------------------------------------------------------------------ */

KVF_DEV int dot16(const int *q, const int8_t *x)
{
    kvf_vec4u v = kvf_load16(x);
    int sum = kvf_dp4a(q[0], static_cast<int>(v.x), 0);
    sum = kvf_dp4a(q[1], static_cast<int>(v.y), sum);
    sum = kvf_dp4a(q[2], static_cast<int>(v.z), sum);
    return kvf_dp4a(q[3], static_cast<int>(v.w), sum);
}

template <kvf_dtype TYPE, int NC>
KVF_KERNEL_OF(32 * GEMV_WARPS, 6) gemv_q8_kernel(kvf_cuda_weight w, q8_view x, int n_tok, gemv_end end)
{
    const bool has_min = TYPE == KVF_DTYPE_Q4_1 || TYPE == KVF_DTYPE_Q5_1 || TYPE == KVF_DTYPE_Q4_K || TYPE == KVF_DTYPE_Q5_K;
    int lane = static_cast<int>(threadIdx.x & 31);
    int64_t r = static_cast<int64_t>(blockIdx.x) * GEMV_WARPS + (threadIdx.x >> 5);
    if (r >= w.n_out) return;
    const uint8_t *row = w.data + static_cast<size_t>(r) * w.row_bytes, *rest = row + kvf_rest_at(TYPE, w.n_in);
    int n_unit = static_cast<int>(w.n_in / 32);
    float sum[NC];
    KVF_UNROLL
    for (int c = 0; c < NC; c++) sum[c] = 0.0f;
    KVF_UNROLL_BY(NC == 1 ? 4 : 1) /* loads in flight; with more tokens registers run out */
    for (int i = lane; i < n_unit; i += 32) {
        kvf_unit u;
        kvf_unit_load<TYPE>(&u, row, rest, i);
        KVF_UNROLL
        for (int c = 0; c < NC; c++) {
            if (c >= n_tok) break;
            const int8_t *q = x.q + c * w.n_in;
            const float *d = x.d + static_cast<int64_t>(c) * n_unit;
            KVF_UNROLL
            for (int h = 0; h < 2; h++) {
                float v = u.s[h] * static_cast<float>(dot16(u.q + 4 * h, q + u.at[h]));
                if (has_min) v -= u.m[h] * static_cast<float>(x.sum[2 * static_cast<int64_t>(c) * n_unit + u.at[h] / 16]);
                sum[c] += d[u.at[h] / 32] * v;
            }
        }
    }
    KVF_UNROLL
    for (int c = 0; c < NC; c++) {
        float v = kvf_warp_sum(sum[c]);
        if (lane == 0 && c < n_tok) finish(end, c, r, v);
    }
}

template <kvf_dtype TYPE>
KVF_KERNEL_OF(32 * GEMV_WARPS, 6) gemv_exact_kernel(kvf_cuda_weight w, const float *x, int n_tok, gemv_end end)
{
    int lane = static_cast<int>(threadIdx.x & 31);
    int64_t r = static_cast<int64_t>(blockIdx.x) * GEMV_WARPS + (threadIdx.x >> 5);
    if (r >= w.n_out) return;
    const uint8_t *row = w.data + static_cast<size_t>(r) * w.row_bytes, *rest = row + kvf_rest_at(TYPE, w.n_in);
    int n_unit = static_cast<int>(w.n_in / 32);
    for (int c = 0; c < n_tok; c++) {
        float sum = 0.0f;
        for (int i = lane; i < n_unit; i += 32) {
            kvf_unit u;
            kvf_unit_load<TYPE>(&u, row, rest, i);
            const float *xc = x + c * w.n_in;
            KVF_UNROLL
            for (int k = 0; k < 32; k++) {
                float q = static_cast<float>(static_cast<int8_t>(static_cast<uint32_t>(u.q[k / 4]) >> (8 * (k % 4))));
                sum += (u.s[k / 16] * q - u.m[k / 16]) * xc[u.at[k / 16] + k % 16];
            }
        }
        sum = kvf_warp_sum(sum);
        if (lane == 0) finish(end, c, r, sum);
    }
}

/* ---- Float weights ------------------------------------------------------------------------------------ */

KVF_DEV void load8(const float *p, float *v)
{
    kvf_vec4u a = kvf_load16_once(p), b = kvf_load16_once(p + 4);
    const uint32_t w[8] = { a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w };
    KVF_UNROLL
    for (int i = 0; i < 8; i++) v[i] = kvf_float(w[i]);
}
template <class T> KVF_DEV void load8_halves(const T *p, float *v)
{
    kvf_vec4u a = kvf_load16_once(p);
    T t[8];
    memcpy(t, &a, 16);
    KVF_UNROLL
    for (int i = 0; i < 8; i++) v[i] = kvf_f32(t[i]);
}
KVF_DEV void load8(const f16 *p, float *v) { load8_halves(p, v); }
KVF_DEV void load8(const bf16 *p, float *v) { load8_halves(p, v); }
KVF_DEV float as_f32(float x) { return x; }
KVF_DEV float as_f32(f16 x) { return kvf_f32(x); }
KVF_DEV float as_f32(bf16 x) { return kvf_f32(x); }

template <class T> KVF_KERNEL_OF(32 * GEMV_WARPS, 6) gemv_float_kernel(kvf_cuda_weight w, const float *x, int n_tok, gemv_end end)
{
    int lane = static_cast<int>(threadIdx.x & 31);
    int64_t r = static_cast<int64_t>(blockIdx.x) * GEMV_WARPS + (threadIdx.x >> 5), n = w.n_in;
    if (r >= w.n_out) return;
    const T *row = reinterpret_cast<const T *>(w.data + static_cast<size_t>(r) * w.row_bytes);
    float sum[KVF_CUDA_GEMV_MAX];
    KVF_UNROLL
    for (int c = 0; c < KVF_CUDA_GEMV_MAX; c++) sum[c] = 0.0f;
    for (int64_t i = lane * 8; i < n; i += 256) {
        float v[8];
        if (i + 8 <= n) {
            load8(row + i, v);
        } else {
            KVF_UNROLL
            for (int k = 0; k < 8; k++) v[k] = i + k < n ? as_f32(row[i + k]) : 0.0f;
        }
        KVF_UNROLL
        for (int c = 0; c < KVF_CUDA_GEMV_MAX; c++) {
            if (c >= n_tok) break;
            KVF_UNROLL
            for (int k = 0; k < 8; k++)
                if (i + k < n) sum[c] += v[k] * x[c * n + i + k];
        }
    }
    KVF_UNROLL
    for (int c = 0; c < KVF_CUDA_GEMV_MAX; c++) {
        float v = kvf_warp_sum(sum[c]);
        if (lane == 0 && c < n_tok) finish(end, c, r, v);
    }
}

/* ---- Launch -------------------------------------------------------------------------------------------- */

template <kvf_dtype TYPE> static void quantised(const kvf_cuda_gemv *a, q8_view v, gemv_end end, dim3 grid, cudaStream_t s)
{
    kvf_cuda_weight w = a->w;
    int n_tok = static_cast<int>(a->n_tok);
    const float *x = a->x;
    dim3 block(32 * GEMV_WARPS);
    if (a->exact)
        KVF_LAUNCH(gemv_exact_kernel<TYPE>, grid, block, 0, s, w, x, n_tok, end);
    else if (n_tok == 1)
        KVF_LAUNCH((gemv_q8_kernel<TYPE, 1>), grid, block, 0, s, w, v, n_tok, end);
    else if (n_tok <= 4)
        KVF_LAUNCH((gemv_q8_kernel<TYPE, 4>), grid, block, 0, s, w, v, n_tok, end);
    else
        KVF_LAUNCH((gemv_q8_kernel<TYPE, 8>), grid, block, 0, s, w, v, n_tok, end);
}

void kvf_cuda_gemv_run(const kvf_cuda_gemv *a, cudaStream_t s)
{
    const char *p = static_cast<const char *>(a->q8);
    q8_view v = { nullptr, nullptr, nullptr };
    if (p)
        v = { reinterpret_cast<const int8_t *>(p), reinterpret_cast<const float *>(p + q8_d_at(a->n_tok, a->w.n_in)),
              reinterpret_cast<const int16_t *>(p + q8_sum_at(a->n_tok, a->w.n_in)) };
    gemv_end end = { a->bias, a->gate, a->y, a->w.n_out, a->act, a->accumulate };
    dim3 grid(static_cast<unsigned>((a->w.n_out + GEMV_WARPS - 1) / GEMV_WARPS)), block(32 * GEMV_WARPS);
    kvf_cuda_weight w = a->w;
    int n_tok = static_cast<int>(a->n_tok);
    const float *x = a->x;
    switch (a->w.type) {
    case KVF_DTYPE_Q4_0: return quantised<KVF_DTYPE_Q4_0>(a, v, end, grid, s);
    case KVF_DTYPE_Q4_1: return quantised<KVF_DTYPE_Q4_1>(a, v, end, grid, s);
    case KVF_DTYPE_Q5_0: return quantised<KVF_DTYPE_Q5_0>(a, v, end, grid, s);
    case KVF_DTYPE_Q5_1: return quantised<KVF_DTYPE_Q5_1>(a, v, end, grid, s);
    case KVF_DTYPE_Q8_0: return quantised<KVF_DTYPE_Q8_0>(a, v, end, grid, s);
    case KVF_DTYPE_Q4_K: return quantised<KVF_DTYPE_Q4_K>(a, v, end, grid, s);
    case KVF_DTYPE_Q5_K: return quantised<KVF_DTYPE_Q5_K>(a, v, end, grid, s);
    case KVF_DTYPE_Q6_K: return quantised<KVF_DTYPE_Q6_K>(a, v, end, grid, s);
    case KVF_DTYPE_F32: KVF_LAUNCH(gemv_float_kernel<float>, grid, block, 0, s, w, x, n_tok, end); return;
    case KVF_DTYPE_F16: KVF_LAUNCH(gemv_float_kernel<f16>, grid, block, 0, s, w, x, n_tok, end); return;
    default: KVF_LAUNCH(gemv_float_kernel<bf16>, grid, block, 0, s, w, x, n_tok, end); return;
    }
}
