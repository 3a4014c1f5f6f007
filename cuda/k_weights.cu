/* k_weights.cu - weights on their way: from the file's rows to the device's, and from those to numbers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/quant.h"

size_t kvf_cuda_row_bytes(kvf_dtype type, int64_t n_in)
{
    kvf_cuda_layout l = kvf_cuda_layout_of(type);
    size_t bytes = static_cast<size_t>(n_in / l.block) * static_cast<size_t>(l.bytes);
    return (bytes + 15) / 16 * 16;
}

/* Two bytes a thread: every part of every block is a whole number of them. */
KVF_KERNEL(256) repack_kernel(const uint16_t *in, uint16_t *out, kvf_cuda_layout l, int64_t n_row, int64_t n_block,
                              int64_t out_row)
{
    int64_t per = l.bytes / 2, head = l.head / 2, rest = l.rest / 2, row = n_block * per;
    for (int64_t i = kvf_first(); i < n_row * row; i += kvf_stride()) {
        int64_t r = i / row, b = i % row / per, k = i % per;
        int64_t in_head = l.rest_first ? k - rest : k;      /* place in the first part, if 0 <= in_head < head */
        int64_t in_rest = l.rest_first ? k : k - head;
        int64_t to = in_head >= 0 && in_head < head ? b * head + in_head : n_block * head + b * rest + in_rest;
        out[r * out_row + to] = in[i];
    }
}

void kvf_cuda_repack(kvf_dtype type, const uint8_t *file_rows, uint8_t *rows, int64_t n_row, int64_t n_in, cudaStream_t s)
{
    kvf_cuda_layout l = kvf_cuda_layout_of(type);
    int64_t n_block = n_in / l.block, out_row = static_cast<int64_t>(kvf_cuda_row_bytes(type, n_in)) / 2;
    const uint16_t *in = reinterpret_cast<const uint16_t *>(file_rows);
    uint16_t *out = reinterpret_cast<uint16_t *>(rows);
    unsigned grid = kvf_blocks(n_row * n_block * l.bytes / 2, 256 * 8, 65536);
    KVF_LAUNCH(repack_kernel, dim3(grid), dim3(256), 0, s, in, out, l, n_row, n_block, out_row);
}

/* ---- Rows as numbers ----------------------------------------------------------------------------- */

KVF_DEV void put(float *out, float x) { *out = x; }
KVF_DEV void put(bf16 *out, float x) { *out = kvf_bf16_of(x); }

/* A thread takes a unit. Products are not fused with the difference, as in the CPU's reference. */
template <kvf_dtype TYPE, class OUT>
KVF_KERNEL(256) quant_rows_kernel(kvf_cuda_weight w, const int32_t *ids, int64_t row0, int64_t n_row, float scale, OUT *out)
{
    int64_t n_unit = w.n_in / 32;
    size_t rest = kvf_rest_at(TYPE, w.n_in);
    for (int64_t i = kvf_first(); i < n_row * n_unit; i += kvf_stride()) {
        int64_t r = i / n_unit;
        const uint8_t *row = w.data + static_cast<size_t>(ids ? ids[r] : row0 + r) * w.row_bytes;
        kvf_unit u;
        kvf_unit_load<TYPE>(&u, row, row + rest, static_cast<int>(i % n_unit));
        OUT *to = out + r * w.n_in;
        KVF_UNROLL
        for (int k = 0; k < 32; k++) {
            float q = static_cast<float>(static_cast<int8_t>(static_cast<uint32_t>(u.q[k / 4]) >> (8 * (k % 4))));
            float x = kvf_add_rn(kvf_mul_rn(u.s[k / 16], q), -u.m[k / 16]);
            put(to + u.at[k / 16] + k % 16, x * scale);
        }
    }
}

KVF_DEV float float_at(const uint8_t *row, kvf_dtype type, int64_t i)
{
    if (type == KVF_DTYPE_F32) return reinterpret_cast<const float *>(row)[i];
    if (type == KVF_DTYPE_F16) return kvf_f32(reinterpret_cast<const f16 *>(row)[i]);
    return kvf_f32(reinterpret_cast<const bf16 *>(row)[i]);
}

template <class OUT>
KVF_KERNEL(256) float_rows_kernel(kvf_cuda_weight w, const int32_t *ids, int64_t row0, int64_t n_row, float scale, OUT *out)
{
    for (int64_t i = kvf_first(); i < n_row * w.n_in; i += kvf_stride()) {
        int64_t r = i / w.n_in;
        const uint8_t *row = w.data + static_cast<size_t>(ids ? ids[r] : row0 + r) * w.row_bytes;
        put(out + i, float_at(row, w.type, i % w.n_in) * scale);
    }
}

template <kvf_dtype TYPE, class OUT>
static void quant_rows(const kvf_cuda_weight *w, const int32_t *ids, int64_t row0, int64_t n_row, float scale, OUT *out, cudaStream_t s)
{
    kvf_cuda_weight m = *w;
    unsigned grid = kvf_blocks(n_row * (w->n_in / 32), 256, 1 << 20);
    KVF_LAUNCH((quant_rows_kernel<TYPE, OUT>), dim3(grid), dim3(256), 0, s, m, ids, row0, n_row, scale, out);
}

template <class OUT>
static void rows(const kvf_cuda_weight *w, const int32_t *ids, int64_t row0, int64_t n_row, float scale, OUT *out, cudaStream_t s)
{
    switch (w->type) {
    case KVF_DTYPE_Q4_0: return quant_rows<KVF_DTYPE_Q4_0>(w, ids, row0, n_row, scale, out, s);
    case KVF_DTYPE_Q4_1: return quant_rows<KVF_DTYPE_Q4_1>(w, ids, row0, n_row, scale, out, s);
    case KVF_DTYPE_Q5_0: return quant_rows<KVF_DTYPE_Q5_0>(w, ids, row0, n_row, scale, out, s);
    case KVF_DTYPE_Q5_1: return quant_rows<KVF_DTYPE_Q5_1>(w, ids, row0, n_row, scale, out, s);
    case KVF_DTYPE_Q8_0: return quant_rows<KVF_DTYPE_Q8_0>(w, ids, row0, n_row, scale, out, s);
    case KVF_DTYPE_Q4_K: return quant_rows<KVF_DTYPE_Q4_K>(w, ids, row0, n_row, scale, out, s);
    case KVF_DTYPE_Q5_K: return quant_rows<KVF_DTYPE_Q5_K>(w, ids, row0, n_row, scale, out, s);
    case KVF_DTYPE_Q6_K: return quant_rows<KVF_DTYPE_Q6_K>(w, ids, row0, n_row, scale, out, s);
    default: break;
    }
    kvf_cuda_weight m = *w;
    unsigned grid = kvf_blocks(n_row * w->n_in, 256 * 4, 1 << 20);
    KVF_LAUNCH(float_rows_kernel<OUT>, dim3(grid), dim3(256), 0, s, m, ids, row0, n_row, scale, out);
}

void kvf_cuda_rows_f32(const kvf_cuda_weight *w, const int32_t *ids, int64_t n_row, float scale, float *out, cudaStream_t s)
{
    rows(w, ids, 0, n_row, scale, out, s);
}

void kvf_cuda_rows_bf16(const kvf_cuda_weight *w, int64_t row0, int64_t n_row, bf16 *out, cudaStream_t s)
{
    rows(w, nullptr, row0, n_row, 1.0f, out, s);
}
