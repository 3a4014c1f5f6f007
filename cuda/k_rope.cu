/* k_rope.cu - angles, rotation, and how keys and values get into slots, between them, and out.
 *
 * A slot is one block of one layer: K [n_head_kv][KVF_BLOCK][head_dim] f16, then V the same.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/kernels.h"

struct table_args {
    const int32_t *pos;
    const double *inv_freq;
    float *cos_sin;
    int64_t n_tok;
    int32_t half;
    float mscale;
};

/* In double: at position 10^6 a float angle is off by 0.03 radians. */
KVF_KERNEL(128) table_kernel(table_args a)
{
    for (int64_t i = kvf_first(); i < a.n_tok * a.half; i += kvf_stride()) {
        int64_t t = i / a.half, j = i % a.half;
        double angle = static_cast<double>(a.pos[t]) * a.inv_freq[j];
        float *row = a.cos_sin + t * 2 * a.half;
        row[j] = static_cast<float>(cos(angle)) * a.mscale;
        row[a.half + j] = static_cast<float>(sin(angle)) * a.mscale;
    }
}

void kvf_cuda_rope_table(const int32_t *pos, const double *inv_freq, const kvf_rope_table_args *a, cudaStream_t s)
{
    table_args t = { pos, inv_freq, a->cos_sin, a->n_tok, a->n_rot / 2, a->mscale };
    KVF_LAUNCH(table_kernel, dim3(kvf_blocks(a->n_tok * t.half, 128, 65536)), dim3(128), 0, s, t);
}

KVF_DEV void pair_of(int j, int half, kvf_rope_kind kind, int *i0, int *i1)
{
    *i0 = kind == KVF_ROPE_NEOX ? j : 2 * j;
    *i1 = kind == KVF_ROPE_NEOX ? j + half : 2 * j + 1;
}

KVF_KERNEL(256) rope_kernel(kvf_rope_args a)
{
    int half = a.n_rot / 2;
    int64_t per_tok = static_cast<int64_t>(a.n_head) * half;
    for (int64_t i = kvf_first(); i < a.n_tok * per_tok; i += kvf_stride()) {
        int64_t t = i / per_tok;
        int j = static_cast<int>(i % half), i0, i1;
        pair_of(j, half, a.kind, &i0, &i1);
        float *x = a.x + (t * a.n_head + i % per_tok / half) * a.head_dim;
        float c = a.cos_sin[t * a.n_rot + j], s = a.cos_sin[t * a.n_rot + half + j], u = x[i0], v = x[i1];
        x[i0] = u * c - v * s;
        x[i1] = u * s + v * c;
    }
}

void kvf_cuda_rope(const kvf_rope_args *a, cudaStream_t s)
{
    kvf_rope_args r = *a;
    int64_t n = a->n_tok * a->n_head * (a->n_rot / 2);
    KVF_LAUNCH(rope_kernel, dim3(kvf_blocks(n, 256, 65536)), dim3(256), 0, s, r);
}

/* ---- Into slots ------------------------------------------------------------------------------------ */

KVF_DEV int64_t plane_of(int32_t head_dim) { return static_cast<int64_t>(KVF_BLOCK) * head_dim; }

KVF_KERNEL(256) put_kernel(kvf_cuda_put a)
{
    int64_t row = static_cast<int64_t>(a.n_head_kv) * a.head_dim, plane = plane_of(a.head_dim);
    for (int64_t i = kvf_first(); i < a.n_tok * row; i += kvf_stride()) {
        int64_t t = i / row, place = a.first + t, h = i % row / a.head_dim, c = i % a.head_dim;
        f16 *to = a.slot[place >> KVF_BLOCK_SHIFT] + h * plane + (place & (KVF_BLOCK - 1)) * a.head_dim + c;
        to[0] = kvf_f16_of(a.k[i]);
        to[a.n_head_kv * plane] = kvf_f16_of(a.v[i]);
    }
}

void kvf_cuda_kv_put(const kvf_cuda_put *a, cudaStream_t s)
{
    kvf_cuda_put p = *a;
    int64_t n = a->n_tok * a->n_head_kv * a->head_dim;
    KVF_LAUNCH(put_kernel, dim3(kvf_blocks(n, 256, 65536)), dim3(256), 0, s, p);
}

/* ---- Turned copies ----------------------------------------------------------------------------------- */

/* Threads of channel pairs; the channels past n_rot go in pairs too and stay. Products are not fused: the
 * copy must be the same bits whenever it is made. */
KVF_KERNEL(256) turn_kernel(kvf_cuda_turn a)
{
    int half = a.n_rot / 2, pairs = a.head_dim / 2;
    int64_t per_tok = static_cast<int64_t>(a.n_head_kv) * pairs, plane = plane_of(a.head_dim);
    for (int64_t i = kvf_first(); i < a.n_tok * per_tok; i += kvf_stride()) {
        int64_t t = i / per_tok, place = a.first + t, h = i % per_tok / pairs;
        int j = static_cast<int>(i % pairs), i0 = 2 * j, i1 = 2 * j + 1;
        int64_t at = h * plane + (place & (KVF_BLOCK - 1)) * a.head_dim, v_at = at + a.n_head_kv * plane;
        const f16 *src = a.src[place >> KVF_BLOCK_SHIFT];
        f16 *dst = a.dst[place >> KVF_BLOCK_SHIFT];
        dst[v_at + i0] = src[v_at + i0];
        dst[v_at + i1] = src[v_at + i1];
        if (j < half) pair_of(j, half, a.kind, &i0, &i1);
        float u = kvf_f32(src[at + i0]), v = kvf_f32(src[at + i1]), x = u, y = v;
        if (j < half) {
            float c = a.cos_sin[t * a.n_rot + j], s = a.cos_sin[t * a.n_rot + half + j];
            x = kvf_add_rn(kvf_mul_rn(u, c), -kvf_mul_rn(v, s));
            y = kvf_add_rn(kvf_mul_rn(u, s), kvf_mul_rn(v, c));
        }
        dst[at + i0] = kvf_f16_of(x);
        dst[at + i1] = kvf_f16_of(y);
    }
}

void kvf_cuda_kv_turn(const kvf_cuda_turn *a, cudaStream_t s)
{
    kvf_cuda_turn t = *a;
    int64_t n = a->n_tok * a->n_head_kv * (a->head_dim / 2);
    KVF_LAUNCH(turn_kernel, dim3(kvf_blocks(n, 256, 65536)), dim3(256), 0, s, t);
}

/* ---- Places ------------------------------------------------------------------------------------------- */

/* 16 bytes a thread; head_dim is a multiple of 8. to_rows: from places to rows, else back. */
KVF_KERNEL_OF(256, 4) places_kernel(kvf_cuda_places a, bool to_rows)
{
    int64_t chunks = a.head_dim / 8, row = 2 * a.n_head_kv * chunks, plane = plane_of(a.head_dim);
    for (int64_t i = kvf_first(); i < a.n * row; i += kvf_stride()) {
        int64_t h = i % row / chunks, k = h % a.n_head_kv; /* K of all heads, then V */
        int64_t place = a.from ? a.from[k * a.from_stride + i / row] : a.first + i / row;
        f16 *at = a.slot[place >> KVF_BLOCK_SHIFT] + h * plane + (place & (KVF_BLOCK - 1)) * a.head_dim + i % chunks * 8;
        if (to_rows)
            kvf_store16(a.rows + i * 8, kvf_load16(at));
        else
            kvf_store16(at, kvf_load16(a.rows + i * 8));
    }
}

static void move_places(const kvf_cuda_places *a, bool to_rows, cudaStream_t s)
{
    kvf_cuda_places p = *a;
    int64_t n = a->n * 2 * a->n_head_kv * (a->head_dim / 8);
    KVF_LAUNCH(places_kernel, dim3(kvf_blocks(n, 256, 65536)), dim3(256), 0, s, p, to_rows);
}

void kvf_cuda_kv_pick(const kvf_cuda_places *a, cudaStream_t s) { move_places(a, true, s); }
void kvf_cuda_kv_place(const kvf_cuda_places *a, cudaStream_t s) { move_places(a, false, s); }
