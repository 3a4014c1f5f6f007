/* cuda_memory.cu - device memory, the ring, copies, and steps that are recorded as graphs.
 *
 * All device memory is one cudaMalloc, taken when the backend is opened: a budget is then kept to the byte,
 * and running out is an error of this library and not of the driver in the middle of a step.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda_int.h"

#if defined(__SANITIZE_ADDRESS__) && !defined(__CUDACC__)
#define HIDE(p, n) emu_guard(p, n, true)
#define SHOW(p, n) emu_guard(p, n, false)
#else
#define HIDE(p, n) ((void)0)
#define SHOW(p, n) ((void)0)
#endif

enum { RING_BYTES = 1 << 20 };

kvf_status kvf_cuda_fail(kvf_cuda_backend *c, cudaError_t e, const char *what, kvf_error *err)
{
    if (e != cudaErrorMemoryAllocation) c->lost = true;
    return kvf_fail(err, e == cudaErrorMemoryAllocation ? KVF_ERR_NOMEM : KVF_ERR_INTERNAL,
                    "CUDA: %s: %s (%s); close the model and open it again, or use the CPU", what, cudaGetErrorName(e),
                    cudaGetErrorString(e));
}

kvf_status kvf_cuda_check(kvf_cuda_backend *c, const char *what, kvf_error *err)
{
    if (c->lost) return kvf_fail(err, KVF_ERR_STATE, "CUDA: %s after an earlier failure; close the model and open it again", what);
    cudaError_t e = cudaGetLastError();
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, what, err);
}

/* ---- The arena ---------------------------------------------------------------------------------------- */

kvf_status kvf_cuda_take(kvf_cuda_backend *c, void **out, size_t bytes, kvf_error *err)
{
    size_t at;
    *out = nullptr;
    if (!c->arena.take(bytes, &at))
        return kvf_fail(err, KVF_ERR_NOMEM,
                        "out of device memory: %zu bytes refused, %zu of %zu in use; lower the context or the batch, or "
                        "give the device more",
                        bytes, c->arena.used(), c->arena.total());
    *out = c->memory + at;
    SHOW(*out, bytes);
    return KVF_OK;
}

void kvf_cuda_give(kvf_cuda_backend *c, void *p)
{
    if (!p) return;
    size_t bytes = c->arena.give(static_cast<size_t>(static_cast<char *>(p) - c->memory));
    HIDE(p, bytes);
    (void)bytes;
}

kvf_status kvf_cuda_need(kvf_cuda_backend *c, kvf_cuda_scratch_kind kind, size_t bytes, void **out, kvf_error *err)
{
    kvf_cuda_scratch *s = &c->scratch[kind];
    if (s->bytes < bytes) {
        kvf_cuda_give(c, s->at);
        *s = { nullptr, 0 };
        KVF_TRY(kvf_cuda_take(c, &s->at, bytes, err));
        s->bytes = bytes;
    }
    *out = s->at;
    return KVF_OK;
}

/* Nine tenths of what is free: the rest is for the context, for cuBLASLt's kernels and for the desktop. */
static kvf_status arena_bytes(kvf_cuda_backend *c, uint64_t asked, size_t *bytes, kvf_error *err)
{
    size_t free_bytes = 0, total = 0;
    cudaError_t e = cudaMemGetInfo(&free_bytes, &total);
    if (e != cudaSuccess) return kvf_cuda_fail(c, e, "asking for free memory", err);
    *bytes = free_bytes / 10 * 9;
    if (asked == 0) return KVF_OK;
    if (asked > free_bytes)
        return kvf_fail(err, KVF_ERR_NOMEM, "%llu bytes of device memory asked for, %zu of %zu are free; ask for less",
                        static_cast<unsigned long long>(asked), free_bytes, total);
    *bytes = static_cast<size_t>(asked);
    return KVF_OK;
}

kvf_status kvf_cuda_memory_open(kvf_cuda_backend *c, uint64_t bytes, kvf_error *err)
{
    size_t all = 0;
    KVF_TRY(arena_bytes(c, bytes, &all, err));
    void *p = nullptr;
    cudaError_t e = cudaMalloc(&p, all);
    c->memory = static_cast<char *>(p);
    if (e != cudaSuccess) return kvf_cuda_fail(c, e, "taking the device memory asked for", err);
    c->arena.reset(all);
    HIDE(c->memory, all);
    e = cudaHostAlloc(&p, RING_BYTES, cudaHostAllocDefault);
    c->ring = static_cast<char *>(p);
    if (e == cudaSuccess) {
        e = cudaHostAlloc(&p, 2 * KVF_CUDA_BOUNCE, cudaHostAllocDefault);
        c->bounce = static_cast<char *>(p);
    }
    for (int i = 0; i < 2 && e == cudaSuccess; i++) e = cudaEventCreateWithFlags(&c->bounce_free[i], cudaEventDisableTiming);
    if (e == cudaSuccess) e = cudaEventCreateWithFlags(&c->ops_done, cudaEventDisableTiming);
    if (e == cudaSuccess) e = cudaEventCreateWithFlags(&c->copied, cudaEventDisableTiming);
    if (e == cudaSuccess) e = cudaStreamCreateWithPriority(&c->copy_stream, cudaStreamNonBlocking, 0);
    if (e != cudaSuccess) return kvf_cuda_fail(c, e, "taking pinned memory", err);
    KVF_TRY(kvf_cuda_take(c, &p, RING_BYTES, err));
    c->ring_dev = static_cast<char *>(p);
    c->ring_bytes = RING_BYTES;
    return KVF_OK;
}

void kvf_cuda_memory_close(kvf_cuda_backend *c)
{
    if (c->exec) cudaGraphExecDestroy(c->exec);
    for (cudaEvent_t &e : c->bounce_free)
        if (e) cudaEventDestroy(e);
    if (c->copy_stream) cudaStreamDestroy(c->copy_stream);
    if (c->ops_done) cudaEventDestroy(c->ops_done);
    if (c->copied) cudaEventDestroy(c->copied);
    if (c->bounce) cudaFreeHost(c->bounce);
    if (c->ring) cudaFreeHost(c->ring);
    if (c->memory) {
        SHOW(c->memory, c->arena.total());
        cudaFree(c->memory);
    }
}

/* ---- The ring ------------------------------------------------------------------------------------------ */

static kvf_status ring_grow(kvf_cuda_backend *c, size_t bytes, kvf_error *err)
{
    size_t want = c->ring_bytes;
    while (want < 2 * bytes) want *= 2;
    void *host = nullptr, *dev = nullptr;
    KVF_TRY(kvf_cuda_take(c, &dev, want, err));
    cudaError_t e = cudaHostAlloc(&host, want, cudaHostAllocDefault);
    if (e != cudaSuccess) {
        kvf_cuda_give(c, dev);
        return kvf_cuda_fail(c, e, "taking pinned memory for lists", err);
    }
    cudaFreeHost(c->ring);
    kvf_cuda_give(c, c->ring_dev);
    c->ring = static_cast<char *>(host);
    c->ring_dev = static_cast<char *>(dev);
    c->ring_bytes = want;
    return KVF_OK;
}

kvf_status kvf_cuda_ring_take(kvf_cuda_backend *c, size_t bytes, kvf_cuda_part *out, kvf_error *err)
{
    bytes = (bytes + 63) / 64 * 64;
    if (c->ring_at + bytes > c->ring_bytes) {
        KVF_TRY(kvf_cuda_wait(c, err)); /* what lies in the ring has been read */
        c->ring_at = 0;
        if (bytes > c->ring_bytes / 2) KVF_TRY(ring_grow(c, bytes, err));
    }
    *out = { c->ring + c->ring_at, c->ring_dev + c->ring_at, bytes };
    c->ring_at += bytes;
    return KVF_OK;
}

kvf_status kvf_cuda_ring_send(kvf_cuda_backend *c, const kvf_cuda_part *p, kvf_error *err)
{
    if (c->recording || p->bytes == 0) return KVF_OK; /* a step sends its part at once */
    char *to = c->ring_dev + (p->host - c->ring);
    cudaError_t e = cudaMemcpyAsync(to, p->host, p->bytes, cudaMemcpyHostToDevice, c->stream);
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, "sending a list", err);
}

/* ---- Steps ----------------------------------------------------------------------------------------------- */

kvf_status kvf_cuda_step_begin(kvf_backend *b, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    KVF_TRY(kvf_cuda_flush(c, err));
    KVF_TRY(kvf_cuda_check(c, "a step", err));
    if (c->ring_at > c->ring_bytes / 2) { /* room for a step's lists */
        KVF_TRY(kvf_cuda_wait(c, err));
        c->ring_at = 0;
    }
    cudaError_t e = cudaStreamBeginCapture(c->stream, cudaStreamCaptureModeThreadLocal);
    if (e != cudaSuccess) return kvf_cuda_fail(c, e, "recording a step", err);
    c->recording = true;
    c->record_from = c->ring_at;
    return KVF_OK;
}

/* The same nodes as the step before, as a rule: then the graph that is there gets the new arguments. */
static cudaError_t launch_graph(kvf_cuda_backend *c, cudaGraph_t graph)
{
    cudaGraphExecUpdateResultInfo info;
    if (c->exec && cudaGraphExecUpdate(c->exec, graph, &info) != cudaSuccess) {
        cudaGetLastError(); /* a refused update leaves no damage */
        cudaGraphExecDestroy(c->exec);
        c->exec = nullptr;
    }
    cudaError_t e = c->exec ? cudaSuccess : cudaGraphInstantiate(&c->exec, graph, 0);
    return e == cudaSuccess ? cudaGraphLaunch(c->exec, c->stream) : e;
}

kvf_status kvf_cuda_flush(kvf_cuda_backend *c, kvf_error *err)
{
    if (!c->recording) return KVF_OK;
    c->recording = false;
    cudaGraph_t graph = nullptr;
    cudaError_t e = cudaStreamEndCapture(c->stream, &graph);
    size_t bytes = c->ring_at - c->record_from;
    if (e == cudaSuccess && bytes > 0)
        e = cudaMemcpyAsync(c->ring_dev + c->record_from, c->ring + c->record_from, bytes, cudaMemcpyHostToDevice, c->stream);
    if (e == cudaSuccess) e = launch_graph(c, graph);
    c->ran_step = "graph";
    if (graph) cudaGraphDestroy(graph);
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, "running a recorded step", err);
}

kvf_status kvf_cuda_step_end(kvf_backend *b, kvf_error *err) { return kvf_cuda_flush(kvf_cuda_self(b), err); }

kvf_status kvf_cuda_wait(kvf_cuda_backend *c, kvf_error *err)
{
    KVF_TRY(kvf_cuda_flush(c, err));
    if (c->lost) return kvf_cuda_check(c, "waiting", err);
    cudaError_t e = cudaStreamSynchronize(c->stream);
    if (e == cudaSuccess) e = cudaStreamSynchronize(c->copy_stream);
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, "a kernel", err);
}

/* ---- Copies ----------------------------------------------------------------------------------------------- */

/* A half of the bounce buffer that the device no longer reads. */
static kvf_status half_of(kvf_cuda_backend *c, int i, char **out, kvf_error *err)
{
    *out = c->bounce + static_cast<size_t>(i) * KVF_CUDA_BOUNCE;
    cudaError_t e = cudaEventSynchronize(c->bounce_free[i]);
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, "waiting for a copy", err);
}

static kvf_status send_half(kvf_cuda_backend *c, int i, void *dst, size_t bytes, kvf_error *err)
{
    cudaError_t e = cudaMemcpyAsync(dst, c->bounce + static_cast<size_t>(i) * KVF_CUDA_BOUNCE, bytes, cudaMemcpyHostToDevice, c->stream);
    if (e == cudaSuccess) e = cudaEventRecord(c->bounce_free[i], c->stream);
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, "a copy to the device", err);
}

kvf_status kvf_cuda_upload(kvf_cuda_backend *c, void *dst, const void *src, size_t bytes, kvf_error *err)
{
    KVF_TRY(kvf_cuda_flush(c, err));
    KVF_TRY(kvf_cuda_check(c, "a copy to the device", err));
    for (size_t at = 0, i = 0; at < bytes; at += KVF_CUDA_BOUNCE, i ^= 1) {
        size_t n = bytes - at < KVF_CUDA_BOUNCE ? bytes - at : KVF_CUDA_BOUNCE;
        char *half;
        KVF_TRY(half_of(c, static_cast<int>(i), &half, err));
        memcpy(half, static_cast<const char *>(src) + at, n);
        KVF_TRY(send_half(c, static_cast<int>(i), static_cast<char *>(dst) + at, n, err));
    }
    return KVF_OK;
}

kvf_status kvf_cuda_upload_pieces(kvf_cuda_backend *c, void *dst, const void *const *from, int64_t n, size_t bytes, kvf_error *err)
{
    KVF_TRY(kvf_cuda_flush(c, err));
    KVF_TRY(kvf_cuda_check(c, "a copy to the device", err));
    if (bytes > KVF_CUDA_BOUNCE) return kvf_fail(err, KVF_ERR_LIMIT, "pieces of %zu bytes; the most is %zu", bytes, KVF_CUDA_BOUNCE);
    int64_t per = static_cast<int64_t>(KVF_CUDA_BOUNCE / bytes);
    int i = 0;
    for (int64_t k = 0; k < n; k += per, i ^= 1) {
        int64_t m = n - k < per ? n - k : per;
        char *half;
        KVF_TRY(half_of(c, i, &half, err));
        for (int64_t j = 0; j < m; j++) memcpy(half + static_cast<size_t>(j) * bytes, from[k + j], bytes);
        KVF_TRY(send_half(c, i, static_cast<char *>(dst) + static_cast<size_t>(k) * bytes, static_cast<size_t>(m) * bytes, err));
    }
    return KVF_OK;
}

kvf_status kvf_cuda_download(kvf_cuda_backend *c, void *dst, const void *src, size_t bytes, kvf_error *err)
{
    KVF_TRY(kvf_cuda_flush(c, err));
    KVF_TRY(kvf_cuda_check(c, "a copy from the device", err));
    for (size_t at = 0; at < bytes; at += KVF_CUDA_BOUNCE) {
        size_t n = bytes - at < KVF_CUDA_BOUNCE ? bytes - at : KVF_CUDA_BOUNCE;
        char *half;
        KVF_TRY(half_of(c, 0, &half, err));
        cudaError_t e = cudaMemcpyAsync(half, static_cast<const char *>(src) + at, n, cudaMemcpyDeviceToHost, c->stream);
        if (e != cudaSuccess) return kvf_cuda_fail(c, e, "a copy from the device", err);
        KVF_TRY(kvf_cuda_wait(c, err));
        memcpy(static_cast<char *>(dst) + at, half, n);
    }
    return KVF_OK;
}

/* ---- Copies beside the ops ---------------------------------------------------------------------------------- */

kvf_status kvf_cuda_op_host_alloc(kvf_backend *b, void **out, size_t bytes, kvf_error *err)
{
    cudaError_t e = cudaHostAlloc(out, bytes, cudaHostAllocDefault);
    if (e == cudaSuccess) return KVF_OK;
    *out = nullptr;
    cudaGetLastError(); /* a refusal leaves no damage */
    return e == cudaErrorMemoryAllocation
               ? kvf_fail(err, KVF_ERR_NOMEM, "out of pinned host memory: %zu bytes refused; lower kv_bytes", bytes)
               : kvf_cuda_fail(kvf_cuda_self(b), e, "taking pinned memory", err);
}

void kvf_cuda_op_host_release(kvf_backend *, void *ptr)
{
    if (ptr) cudaFreeHost(ptr);
}

/* Both end a recording: a graph must not wait for what is not in it. */
kvf_status kvf_cuda_op_fetch(kvf_backend *b, void *dst, const void *src, size_t bytes, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    KVF_TRY(kvf_cuda_flush(c, err));
    KVF_TRY(kvf_cuda_check(c, "a copy to the device", err));
    cudaError_t e = cudaEventRecord(c->ops_done, c->stream);
    if (e == cudaSuccess) e = cudaStreamWaitEvent(c->copy_stream, c->ops_done, 0);
    if (e == cudaSuccess) e = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, c->copy_stream);
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, "a copy to the device", err);
}

kvf_status kvf_cuda_op_fetch_wait(kvf_backend *b, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    KVF_TRY(kvf_cuda_flush(c, err));
    KVF_TRY(kvf_cuda_check(c, "waiting for copies", err));
    cudaError_t e = cudaEventRecord(c->copied, c->copy_stream);
    if (e == cudaSuccess) e = cudaStreamWaitEvent(c->stream, c->copied, 0);
    return e == cudaSuccess ? KVF_OK : kvf_cuda_fail(c, e, "waiting for copies", err);
}
