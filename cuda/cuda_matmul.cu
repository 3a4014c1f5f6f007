/* cuda_matmul.cu - weights on the device, and which product runs.
 *
 *     exact mode, F32 weights, odd widths    fp32, eight tokens at a time
 *     up to KVF_CUDA_GEMV_MAX tokens         k_gemv.cu, on the quantised blocks
 *     more                                   weights to bf16, cuBLASLt (or k_gemm.cu) with fp32 sums
 *
 * The bf16 form of a matrix is made for each call, or kept while kvf_device_params.bf16_bytes lasts.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda_int.h"

/* ---- Weights --------------------------------------------------------------------------------------- */

static kvf_status upload_rows(kvf_cuda_backend *c, const kvf_cuda_weight *w, size_t file_row, const void *data, kvf_error *err)
{
    int64_t per = static_cast<int64_t>(KVF_CUDA_BOUNCE / file_row);
    if (per < 1) return kvf_fail(err, KVF_ERR_LIMIT, "a weight row of %zu bytes; the most is %zu", file_row, KVF_CUDA_BOUNCE);
    if (per > w->n_out) per = w->n_out;
    void *raw = nullptr;
    KVF_TRY(kvf_cuda_take(c, &raw, static_cast<size_t>(per) * file_row, err));
    kvf_status rc = KVF_OK;
    for (int64_t r = 0; r < w->n_out && rc >= 0; r += per) {
        int64_t n = w->n_out - r < per ? w->n_out - r : per;
        rc = kvf_cuda_upload(c, raw, static_cast<const char *>(data) + static_cast<size_t>(r) * file_row, static_cast<size_t>(n) * file_row, err);
        if (rc >= 0)
            kvf_cuda_repack(w->type, static_cast<const uint8_t *>(raw), const_cast<uint8_t *>(w->data) + static_cast<size_t>(r) * w->row_bytes,
                            n, w->n_in, c->stream);
    }
    kvf_cuda_give(c, raw);
    return rc < 0 ? rc : kvf_cuda_check(c, "laying out weights", err);
}

kvf_status kvf_cuda_op_weight_init(kvf_backend *b, kvf_weight *w, kvf_dtype type, int64_t n_out, int64_t n_in,
                                   const void *data, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    const kvf_dtype_info *info = kvf_dtype_get(static_cast<uint32_t>(type));
    if (!info) return kvf_fail(err, KVF_ERR_UNSUPPORTED, "the CUDA backend has no tensor type %d", static_cast<int>(type));
    if (n_out < 1 || n_in < 1 || n_in % info->block || n_out > INT32_MAX || n_in > INT32_MAX)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "a weight of %lld x %lld elements of type %s", static_cast<long long>(n_out),
                        static_cast<long long>(n_in), info->name);
    void *block, *rows;
    size_t bytes;
    KVF_TRY(kvf_mem_get(b->mem, &block, 1, sizeof(kvf_cuda_weight_box), err));
    kvf_cuda_weight_box *box = static_cast<kvf_cuda_weight_box *>(block);
    box->w = { type, n_out, n_in, kvf_cuda_row_bytes(type, n_in), nullptr };
    if (!kvf_mul_size(box->w.row_bytes, static_cast<size_t>(n_out), &bytes)) bytes = SIZE_MAX;
    kvf_status rc = kvf_cuda_take(c, &rows, bytes, err);
    if (rc >= 0) {
        box->w.data = static_cast<const uint8_t *>(rows);
        rc = upload_rows(c, &box->w, kvf_dtype_row_bytes(static_cast<uint32_t>(type), n_in), data, err);
        if (rc < 0) kvf_cuda_give(c, rows);
    }
    if (rc < 0) {
        kvf_free(b->mem, box);
        return rc;
    }
    w->type = type;
    w->n_out = n_out;
    w->n_in = n_in;
    w->row_bytes = kvf_dtype_row_bytes(static_cast<uint32_t>(type), n_in);
    w->data = box;
    return KVF_OK;
}

void kvf_cuda_op_weight_fini(kvf_backend *b, kvf_weight *w)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    kvf_cuda_weight_box *box = static_cast<kvf_cuda_weight_box *>(const_cast<void *>(w->data));
    if (!box) return;
    if (box->copy) c->bf16_left += static_cast<uint64_t>(box->w.n_out * box->w.n_in) * sizeof(bf16);
    kvf_cuda_give(c, box->copy);
    kvf_cuda_give(c, const_cast<uint8_t *>(box->w.data));
    kvf_free(b->mem, box);
    w->data = nullptr;
}

static kvf_cuda_weight_box *box_of(const kvf_weight *w) { return static_cast<kvf_cuda_weight_box *>(const_cast<void *>(w->data)); }

kvf_status kvf_cuda_op_embed(kvf_backend *b, const kvf_embed_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    if (a->n_tok <= 0) return KVF_OK;
    kvf_cuda_part p;
    KVF_TRY(kvf_cuda_ring_take(c, static_cast<size_t>(a->n_tok) * sizeof(int32_t), &p, err));
    for (int64_t i = 0; i < a->n_tok; i++) {
        int32_t id = static_cast<int32_t>(a->tokens[i]);
        memcpy(p.host + static_cast<size_t>(i) * sizeof id, &id, sizeof id);
    }
    KVF_TRY(kvf_cuda_ring_send(c, &p, err));
    kvf_cuda_rows_f32(&box_of(a->table)->w, reinterpret_cast<const int32_t *>(p.dev), a->n_tok, a->scale, a->out, c->stream);
    return kvf_cuda_check(c, "embedding", err);
}

/* ---- Few tokens ---------------------------------------------------------------------------------------- */

static bool is_float(kvf_dtype type) { return type == KVF_DTYPE_F32 || type == KVF_DTYPE_F16 || type == KVF_DTYPE_BF16; }

/* One weight and any number of tokens, eight at a time. q8: x packed for n_tok <= 8, or NULL. */
static void gemv(kvf_cuda_backend *c, const kvf_weight *w, const float *x, const void *q8, int64_t n_tok, kvf_cuda_gemv g)
{
    g.w = box_of(w)->w;
    g.exact = c->f32;
    g.q8 = q8;
    float *y = g.y;
    const float *gate = g.gate;
    for (int64_t t = 0; t < n_tok; t += KVF_CUDA_GEMV_MAX) {
        g.n_tok = n_tok - t < KVF_CUDA_GEMV_MAX ? n_tok - t : KVF_CUDA_GEMV_MAX;
        g.x = x + t * w->n_in;
        g.y = y + t * w->n_out;
        g.gate = gate ? gate + t * w->n_out : nullptr;
        kvf_cuda_gemv_run(&g, c->stream);
    }
    c->ran_mv = c->f32 ? "exact_f32" : is_float(w->type) ? "gemv_f32" : "gemv_dp4a";
}

static kvf_status pack_q8(kvf_cuda_backend *c, const float *x, int64_t n_tok, int64_t n_in, void **q8, kvf_error *err)
{
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_X, kvf_cuda_q8_bytes(n_tok, n_in), q8, err));
    kvf_cuda_q8(x, *q8, n_tok, n_in, c->stream);
    return KVF_OK;
}

/* ---- Many tokens ------------------------------------------------------------------------------------------ */

static bool by_gemm(const kvf_cuda_backend *c, const kvf_weight *w, int64_t n_tok)
{
    return n_tok > KVF_CUDA_GEMV_MAX && !c->f32 && w->type != KVF_DTYPE_F32 && w->n_in % 8 == 0;
}

static kvf_status bf16_rows(kvf_cuda_backend *c, const kvf_weight *w, const bf16 **out, kvf_error *err)
{
    kvf_cuda_weight_box *box = box_of(w);
    size_t bytes = static_cast<size_t>(w->n_out) * static_cast<size_t>(w->n_in) * sizeof(bf16);
    *out = box->copy;
    if (box->copy) return KVF_OK;
    if (w->type == KVF_DTYPE_BF16) { /* rows of whole 16 bytes stand as they are */
        *out = reinterpret_cast<const bf16 *>(box->w.data);
        return KVF_OK;
    }
    void *p = nullptr;
    bool keep = bytes <= c->bf16_left && !c->recording && kvf_cuda_take(c, &p, bytes, nullptr) >= 0;
    if (keep) {
        c->bf16_left -= bytes;
        box->copy = static_cast<bf16 *>(p);
    } else {
        KVF_TRY(kvf_cuda_need(c, KVF_CUDA_W, bytes, &p, err));
    }
    kvf_cuda_rows_bf16(&box->w, 0, w->n_out, static_cast<bf16 *>(p), c->stream);
    *out = static_cast<const bf16 *>(p);
    return KVF_OK;
}

static kvf_status gemm(kvf_cuda_backend *c, const kvf_weight *w, const bf16 *x, int64_t n_tok, float *y, bool add, kvf_error *err)
{
    const bf16 *rows;
    KVF_TRY(bf16_rows(c, w, &rows, err));
    if (!c->lt_tried && !c->recording) {
        c->lt_tried = true;
        c->lt = kvf_cuda_lt_open(c);
    }
    c->ran_mm = "cublaslt_bf16";
    if (c->lt && kvf_cuda_lt_gemm(c->lt, x, rows, y, n_tok, w->n_out, w->n_in, add, c->stream)) return KVF_OK;
    c->ran_mm = "mma_bf16";
    kvf_cuda_gemm_bf16(x, rows, y, n_tok, w->n_out, w->n_in, add, c->stream);
    return KVF_OK;
}

static kvf_status pack_bf16(kvf_cuda_backend *c, const float *x, int64_t n, void **out, kvf_error *err)
{
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_X, static_cast<size_t>(n) * sizeof(bf16), out, err));
    kvf_cuda_to_bf16(x, static_cast<bf16 *>(*out), n, c->stream);
    return KVF_OK;
}

/* ---- The ops ------------------------------------------------------------------------------------------------ */

/* Activations in the forms that the weights of a call ask for: q8 up to eight tokens, bf16 for more. Both
 * never: the number of tokens decides. */
static kvf_status pack_for(kvf_cuda_backend *c, const float *x, int64_t n_tok, const kvf_weight *const *w, int32_t n_w,
                           void **packed, kvf_error *err)
{
    *packed = nullptr;
    for (int32_t j = 0; j < n_w && !*packed; j++) {
        if (by_gemm(c, w[j], n_tok))
            KVF_TRY(pack_bf16(c, x, n_tok * w[j]->n_in, packed, err));
        else if (n_tok <= KVF_CUDA_GEMV_MAX && !c->f32 && !is_float(w[j]->type))
            KVF_TRY(pack_q8(c, x, n_tok, w[j]->n_in, packed, err));
    }
    return KVF_OK;
}

kvf_status kvf_cuda_op_matmul(kvf_backend *b, const kvf_matmul_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    if (a->n_tok <= 0) return KVF_OK;
    void *packed;
    KVF_TRY(pack_for(c, a->x, a->n_tok, a->w, a->n_w, &packed, err));
    for (int32_t j = 0; j < a->n_w; j++) {
        const kvf_weight *w = a->w[j];
        if (!by_gemm(c, w, a->n_tok)) {
            kvf_cuda_gemv g = {};
            g.bias = a->bias[j];
            g.y = a->y[j];
            g.accumulate = a->accumulate;
            gemv(c, w, a->x, packed, a->n_tok, g);
            continue;
        }
        /* The bias goes in first, so that the product only ever adds. */
        if (a->bias[j]) kvf_cuda_bias_rows(a->y[j], a->bias[j], a->n_tok, w->n_out, a->accumulate, c->stream);
        KVF_TRY(gemm(c, w, static_cast<const bf16 *>(packed), a->n_tok, a->y[j], a->accumulate || a->bias[j], err));
    }
    return kvf_cuda_check(c, "a matrix product", err);
}

kvf_status kvf_cuda_op_matmul_glu(kvf_backend *b, const kvf_matmul_glu_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    if (a->n_tok <= 0) return KVF_OK;
    const kvf_weight *w[2] = { a->gate, a->up };
    void *packed, *gate;
    KVF_TRY(pack_for(c, a->x, a->n_tok, w, 2, &packed, err));
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_GATE, static_cast<size_t>(a->n_tok * a->gate->n_out) * sizeof(float), &gate, err));
    const bf16 *x = static_cast<const bf16 *>(packed);
    bool g0 = by_gemm(c, w[0], a->n_tok), g1 = by_gemm(c, w[1], a->n_tok);
    kvf_cuda_gemv g = {};
    g.y = static_cast<float *>(gate);
    if (g0)
        KVF_TRY(gemm(c, w[0], x, a->n_tok, g.y, false, err));
    else
        gemv(c, w[0], a->x, packed, a->n_tok, g);
    g.y = a->y;
    g.gate = static_cast<float *>(gate);
    g.act = a->act;
    if (!g1) {
        gemv(c, w[1], a->x, packed, a->n_tok, g);
        return kvf_cuda_check(c, "a gated product", err);
    }
    KVF_TRY(gemm(c, w[1], x, a->n_tok, a->y, false, err));
    kvf_cuda_glu(a->y, static_cast<float *>(gate), a->n_tok * a->gate->n_out, a->act, c->stream);
    return kvf_cuda_check(c, "a gated product", err);
}
