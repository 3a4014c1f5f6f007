/* cuda_backend.cu - the op table of a CUDA device, and the module's one exported function.
 *
 * Ops only launch; what they hand to the host (downloads, votes, digests, sums of attention) waits. Errors
 * of the device are sticky: after one every op answers KVF_ERR_STATE, nothing is computed on a wrong number.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda_int.h"

#include <stdio.h>

#include <new>

static kvf_cuda_backend *self(kvf_backend *b) { return kvf_cuda_self(b); }

/* ---- Memory ----------------------------------------------------------------------------------------- */

static kvf_status op_alloc(kvf_backend *b, void **out, size_t bytes, kvf_error *err) { return kvf_cuda_take(self(b), out, bytes, err); }

static void op_release(kvf_backend *b, void *ptr) { kvf_cuda_give(self(b), ptr); }

static kvf_status op_upload(kvf_backend *b, void *dst, const void *src, size_t bytes, kvf_error *err)
{
    return kvf_cuda_upload(self(b), dst, src, bytes, err);
}

static kvf_status op_download(kvf_backend *b, void *dst, const void *src, size_t bytes, kvf_error *err)
{
    return kvf_cuda_download(self(b), dst, src, bytes, err);
}

static kvf_status op_copy(kvf_backend *b, void *dst, const void *src, size_t bytes, kvf_error *err)
{
    kvf_cuda_backend *c = self(b);
    if (bytes == 0) return KVF_OK;
    KVF_TRY(kvf_cuda_check(c, "a copy", err));
    cudaError_t e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, c->stream);
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, "a copy", err);
}

static kvf_status op_sync(kvf_backend *b, kvf_error *err) { return kvf_cuda_wait(self(b), err); }

/* ---- Element by element -------------------------------------------------------------------------------- */

static kvf_status op_rmsnorm(kvf_backend *b, const kvf_rmsnorm_args *a, kvf_error *err)
{
    if (a->n_row > 0) kvf_cuda_rmsnorm(a, self(b)->stream);
    return kvf_cuda_check(self(b), "a norm", err);
}

static kvf_status op_rope_table(kvf_backend *b, const kvf_rope_table_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = self(b);
    if (a->n_tok <= 0) return KVF_OK;
    size_t freq = static_cast<size_t>(a->n_rot / 2) * sizeof(double), pos = static_cast<size_t>(a->n_tok) * sizeof(int32_t);
    kvf_cuda_part p;
    KVF_TRY(kvf_cuda_ring_take(c, freq + pos, &p, err));
    memcpy(p.host, a->inv_freq, freq);
    memcpy(p.host + freq, a->pos, pos);
    KVF_TRY(kvf_cuda_ring_send(c, &p, err));
    kvf_cuda_rope_table(reinterpret_cast<const int32_t *>(p.dev + freq), reinterpret_cast<const double *>(p.dev), a, c->stream);
    return kvf_cuda_check(c, "RoPE angles", err);
}

static kvf_status op_rope(kvf_backend *b, const kvf_rope_args *a, kvf_error *err)
{
    if (a->n_tok > 0 && a->n_rot > 0) kvf_cuda_rope(a, self(b)->stream);
    return kvf_cuda_check(self(b), "RoPE", err);
}

static kvf_status op_lse_merge(kvf_backend *b, const kvf_lse_merge_args *a, kvf_error *err)
{
    if (a->n_row > 0) kvf_cuda_lse_merge(a, self(b)->stream);
    return kvf_cuda_check(self(b), "a merge of attention", err);
}

static kvf_status op_add(kvf_backend *b, float *x, const float *y, int64_t n, kvf_error *err)
{
    if (n > 0) kvf_cuda_add(x, y, n, self(b)->stream);
    return kvf_cuda_check(self(b), "a sum", err);
}

static kvf_status op_layernorm(kvf_backend *b, const kvf_layernorm_args *a, kvf_error *err)
{
    if (a->n_row > 0) kvf_cuda_layernorm(a, self(b)->stream);
    return kvf_cuda_check(self(b), "a layer norm", err);
}

static kvf_status op_act(kvf_backend *b, float *x, int64_t n, kvf_act act, kvf_error *err)
{
    if (n > 0) kvf_cuda_act(x, n, act, self(b)->stream);
    return kvf_cuda_check(self(b), "an activation", err);
}

/* ---- The table ------------------------------------------------------------------------------------------- */

/* Large enough that a product is bound by arithmetic and not by dequantising its weights: with 512 tokens
 * that would be 11 % of a layer on 8B shapes (docs/cuda.md, estimated). */
static int64_t op_batch_hint(kvf_backend *) { return 1024; }

static void op_kernels(kvf_backend *b, char *out, size_t cap)
{
    kvf_cuda_backend *c = self(b);
    const char *const what[] = { "mm", "mv", "attn", "attn_decode", "score", "step" };
    const char *const ran[] = { c->ran_mm, c->ran_mv, c->ran_attn, c->ran_attn_decode, c->ran_score, c->ran_step };
    size_t at = 0;
    out[0] = 0;
    for (size_t i = 0; i < sizeof ran / sizeof *ran; i++) {
        if (!ran[i]) continue;
        int n = snprintf(out + at, cap - at, "%s%s=%s", at ? " " : "", what[i], ran[i]);
        if (n < 0 || static_cast<size_t>(n) >= cap - at) return;
        at += static_cast<size_t>(n);
    }
}

static void op_describe(kvf_backend *b, char *out, size_t cap) { snprintf(out, cap, "%s", self(b)->name); }

static void op_close(kvf_backend *b)
{
    kvf_cuda_backend *c = self(b);
    if (c->stream) {
        kvf_cuda_flush(c, nullptr);
        cudaStreamSynchronize(c->stream);
    }
    if (c->copy_stream) cudaStreamSynchronize(c->copy_stream);
    if (c->lt) kvf_cuda_lt_close(c, c->lt);
    kvf_cuda_memory_close(c);
    if (c->stream) cudaStreamDestroy(c->stream);
    kvf_turn_fini(&b->run);
    delete c;
}

static kvf_backend_ops make_table()
{
    kvf_backend_ops t = {};
    t.abi = KVF_BACKEND_ABI;
    t.name = "cuda";
    t.close = op_close;
    t.alloc = op_alloc;
    t.release = op_release;
    t.upload = op_upload;
    t.download = op_download;
    t.copy = op_copy;
    t.sync = op_sync;
    t.weight_init = kvf_cuda_op_weight_init;
    t.weight_fini = kvf_cuda_op_weight_fini;
    t.embed = kvf_cuda_op_embed;
    t.rmsnorm = op_rmsnorm;
    t.matmul = kvf_cuda_op_matmul;
    t.matmul_glu = kvf_cuda_op_matmul_glu;
    t.rope_table = op_rope_table;
    t.rope = op_rope;
    t.kv_put = kvf_cuda_op_kv_put;
    t.kv_turn = kvf_cuda_op_kv_turn;
    t.kv_gather = kvf_cuda_op_kv_gather;
    t.attn = kvf_cuda_op_attn;
    t.attn_mass = kvf_cuda_op_attn_mass;
    t.digest = kvf_cuda_op_digest;
    t.reps = kvf_cuda_op_reps;
    t.vote = kvf_cuda_op_vote;
    t.lse_merge = op_lse_merge;
    t.add = op_add;
    t.batch_hint = op_batch_hint;
    t.kernels = op_kernels;
    t.describe = op_describe;
    t.host_alloc = kvf_cuda_op_host_alloc;
    t.host_release = kvf_cuda_op_host_release;
    t.fetch = kvf_cuda_op_fetch;
    t.fetch_wait = kvf_cuda_op_fetch_wait;
    t.step_begin = kvf_cuda_step_begin;
    t.step_end = kvf_cuda_step_end;
    t.layernorm = op_layernorm;
    t.act = op_act;
    return t;
}

static const kvf_backend_ops cuda_table = make_table();

/* ---- Opening ----------------------------------------------------------------------------------------------- */

static kvf_status set_up(kvf_cuda_backend *c, const kvf_device_params *p, kvf_error *err)
{
    cudaDeviceProp prop;
    cudaError_t e = cudaSetDevice(p->device);
    if (e == cudaSuccess) e = cudaGetDeviceProperties(&prop, p->device);
    if (e != cudaSuccess) return kvf_cuda_fail(c, e, "opening the device", err);
    snprintf(c->name, sizeof c->name, "%.100s", prop.name);
    if (prop.major < 8)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "device '%s' has compute capability %d.%d; the kernels need 8.0; use the CPU", c->name,
                        prop.major, prop.minor);
    c->n_sm = prop.multiProcessorCount;
    e = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    if (e == cudaSuccess) e = kvf_cuda_prefill_setup();
    if (e == cudaSuccess) e = kvf_cuda_decode_setup();
    if (e == cudaSuccess) e = kvf_cuda_mass_setup();
    if (e == cudaSuccess) e = kvf_cuda_vote_setup();
    if (e != cudaSuccess) return kvf_cuda_fail(c, e, "preparing kernels", err);
    return kvf_cuda_memory_open(c, p->memory_bytes, err);
}

static kvf_status open_device(kvf_backend **out, const kvf_device_params *p, kvf_error *err)
{
    *out = nullptr;
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || p->device < 0 || p->device >= n)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "there is no CUDA device %d (%s, %d found); use the CPU", p->device,
                        cudaGetErrorName(e), n);
    kvf_cuda_backend *c = new (std::nothrow) kvf_cuda_backend();
    if (!c) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: the CUDA backend was refused");
    c->base.ops = &cuda_table;
    c->base.mem = p->mem;
    c->base.log = p->log;
    c->device = p->device;
    c->f32 = p->f32;
    c->bf16_left = p->bf16_bytes;
    kvf_turn_init(&c->base.run);
    kvf_status rc = set_up(c, p, err);
    if (rc < 0) {
        op_close(&c->base);
        return rc;
    }
    *out = &c->base;
    return KVF_OK;
}

/* ---- The module ---------------------------------------------------------------------------------------------- */

static int32_t probe(char *out, size_t cap)
{
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess || n < 1) {
        snprintf(out, cap, "no CUDA device: %s (%s)", cudaGetErrorName(e == cudaSuccess ? cudaErrorNoDevice : e), cudaGetErrorString(e));
        return 0;
    }
    size_t at = 0;
    for (int i = 0; i < n && at < cap; i++) {
        cudaDeviceProp p;
        if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
        int w = snprintf(out + at, cap - at, "%s%d: %s, compute %d.%d, %zu MiB", at ? "; " : "", i, p.name, p.major, p.minor,
                         p.totalGlobalMem >> 20);
        if (w < 0) break;
        at += static_cast<size_t>(w);
    }
    return n;
}

static void memory_in_use(kvf_backend *b, uint64_t *used, uint64_t *total)
{
    *used = self(b)->arena.used();
    *total = self(b)->arena.total();
}

static void *stream_of(kvf_backend *b) { return self(b)->stream; }

static const kvf_backend_module cuda_module = { KVF_BACKEND_ABI, "cuda", probe, open_device, &kvf_cuda_device_ops,
                                                memory_in_use, stream_of };

#ifdef __CUDACC__
extern "C" KVF_API const kvf_backend_module *kvf_backend_module_2(void) { return &cuda_module; }
#else
extern "C" const kvf_backend_module *kvf_cuda_emu_module(void) { return &cuda_module; }
#endif
