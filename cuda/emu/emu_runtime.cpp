/* emu_runtime.cpp - see emu_runtime.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/emu/emu_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <functional>
#include <vector>

#include "cuda/emu/emu.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(void const volatile *p, size_t n);
extern "C" void __asan_unpoison_memory_region(void const volatile *p, size_t n);
#endif

bool emu_has_fault();
void emu_run(const char *kernel, dim3 grid, dim3 block, size_t shared, const std::function<void()> &body);

struct emu_graph {
    std::vector<std::function<void()>> nodes;
};
struct emu_stream {
    emu_graph *capture = nullptr;
    bool late = false; /* runs at a wait */
    std::deque<std::function<void()>> queue; /* of a late one */
    uint64_t n_submitted = 0;

    /* Run all work up to the n-th that was ever submitted. */
    void catch_up(uint64_t n)
    {
        while (!queue.empty() && n_submitted - queue.size() < n) {
            std::function<void()> work = std::move(queue.front());
            queue.pop_front();
            work();
        }
    }
};

struct emu_event {
    emu_stream *stream = nullptr;
    uint64_t upto = 0;
};

namespace {
int64_t fail_in = 0;
uint64_t memory = 1ull << 30, n_launch = 0, n_graph = 0;

bool refuse()
{
    return fail_in > 0 && --fail_in == 0;
}

void submit(cudaStream_t s, std::function<void()> work)
{
    if (s && s->late) {
        s->queue.push_back(std::move(work));
        s->n_submitted++;
    } else if (s && s->capture)
        s->capture->nodes.push_back(std::move(work));
    else
        work();
}

cudaError_t state() { return emu_has_fault() ? cudaErrorLaunchFailure : cudaSuccess; }
} // namespace

void emu_guard(const void *p, size_t bytes, bool hidden)
{
#if defined(__SANITIZE_ADDRESS__)
    if (hidden)
        __asan_poison_memory_region(p, bytes);
    else
        __asan_unpoison_memory_region(p, bytes);
#else
    (void)p, (void)bytes, (void)hidden;
#endif
}

void emu_launch(const char *kernel, dim3 grid, dim3 block, size_t shared, void *stream, std::function<void()> body)
{
    submit(static_cast<cudaStream_t>(stream), [=] {
        n_launch++;
        if (!emu_has_fault()) emu_run(kernel, grid, block, shared, body);
    });
}

extern "C" void emu_fail_malloc(int64_t n) { fail_in = n; }
extern "C" void emu_set_memory(uint64_t bytes) { memory = bytes; }
extern "C" uint64_t emu_launches(void) { return n_launch; }
extern "C" uint64_t emu_graph_launches(void) { return n_graph; }

const char *cudaGetErrorName(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    }
    return "cudaErrorUnknown";
}

const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaErrorLaunchFailure ? "an emulated kernel failed: emu_take_fault says how" : cudaGetErrorName(e);
}

cudaError_t cudaGetLastError() { return state(); }

cudaError_t cudaGetDeviceCount(int *n)
{
    *n = 1;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device)
{
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulation");
    p->major = 8;
    p->multiProcessorCount = 4; /* so that small tests split as large ones do */
    p->totalGlobalMem = memory;
    p->sharedMemPerBlockOptin = 99 * 1024;
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int)
{
    *value = what == cudaDevAttrMultiProcessorCount ? 4 : 99 * 1024;
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *free_bytes = *total = memory;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    *p = nullptr;
    if (refuse() || bytes > memory) return cudaErrorMemoryAllocation;
    *p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *p)
{
    free(p);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned)
{
    *p = nullptr;
    if (refuse()) return cudaErrorMemoryAllocation;
    *p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind, cudaStream_t s)
{
    submit(s, [=] {
        if (bytes) memmove(dst, src, bytes);
    });
    return state();
}

cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t s)
{
    submit(s, [=] {
        if (bytes) memset(dst, value, bytes);
    });
    return state();
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned)
{
    *s = new emu_stream;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int)
{
    *s = new emu_stream;
    (*s)->late = true;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    s->catch_up(s->n_submitted);
    delete s;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    if (s) s->catch_up(s->n_submitted);
    return s && s->capture ? cudaErrorStreamCaptureInvalidated : state();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned)
{
    *e = new emu_event;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    delete e;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    e->stream = s;
    e->upto = s->n_submitted;
    return state();
}

cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    if (e->stream) e->stream->catch_up(e->upto);
    return state();
}

/* A late stream takes the wait into its queue: the others are never behind it. */
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned)
{
    if (s->capture) return cudaErrorStreamCaptureInvalidated;
    return s->late ? state() : cudaEventSynchronize(e);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode)
{
    if (s->capture) return cudaErrorInvalidValue;
    s->capture = new emu_graph;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph)
{
    *graph = s->capture;
    s->capture = nullptr;
    return *graph ? state() : cudaErrorInvalidValue;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    *exec = new emu_graph(*graph);
    return cudaSuccess;
}

/* As on a device, an update needs the same nodes; here: as many. */
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph, cudaGraphExecUpdateResultInfo *info)
{
    bool same = exec->nodes.size() == graph->nodes.size();
    info->result = same ? cudaGraphExecUpdateSuccess : cudaGraphExecUpdateError;
    if (!same) return cudaErrorInvalidValue;
    exec->nodes = graph->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t)
{
    n_graph++;
    for (const auto &node : exec->nodes) node();
    return state();
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}
