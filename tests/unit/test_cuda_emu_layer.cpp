/* test_cuda_emu_layer.cpp - the emulation layer itself: what it computes, and that it catches a planted
 * missing barrier, race, missing wait of cp.async, access past shared memory, and divergence.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>

#include <vector>

#include "cuda/simt.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" int __asan_address_is_poisoned(void const volatile *p);
#endif

static cudaStream_t stream()
{
    cudaStream_t s;
    cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
    return s;
}

/* Sum of 128 values by way of shared memory; without the barrier warps read what is not yet written. */
KVF_KERNEL(128) sum_kernel(const float *x, float *out, bool barrier)
{
    KVF_SHARED(float, part, 4);
    float s = kvf_warp_sum(x[threadIdx.x]);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    if (barrier) kvf_sync();
    if (threadIdx.x == 0) *out = part[0] + part[1] + part[2] + part[3];
}

static float sum_with(bool barrier, uint64_t seed)
{
    std::vector<float> x(128);
    float out = -1;
    for (int i = 0; i < 128; i++) x[static_cast<size_t>(i)] = static_cast<float>(i);
    cudaStream_t s = stream();
    emu_set_seed(seed);
    const float *in = x.data();
    float *to = &out;
    KVF_LAUNCH(sum_kernel, dim3(1), dim3(128), 0, s, in, to, barrier);
    cr_assert_eq(cudaGetLastError(), cudaSuccess);
    cudaStreamDestroy(s);
    return out;
}

Test(cuda_emu_layer, a_block_sums_through_shared_memory)
{
    for (uint64_t seed = 0; seed < 4; seed++) cr_assert_eq(sum_with(true, seed), 8128.0f);
}

Test(cuda_emu_layer, a_missing_barrier_reads_poison)
{
    cr_assert(isnan(sum_with(false, 0)));
}

/* Each step all threads read their neighbour's value and write their own: a second barrier is needed. */
KVF_KERNEL(128) shift_kernel(int *out, int steps, bool second)
{
    KVF_SHARED(int, v, 128);
    v[threadIdx.x] = static_cast<int>(threadIdx.x);
    kvf_sync();
    for (int i = 0; i < steps; i++) {
        int next = v[(threadIdx.x + 32) % 128];
        if (second) kvf_sync();
        v[threadIdx.x] = next;
        kvf_sync();
    }
    out[threadIdx.x] = v[threadIdx.x];
}

static int wrong_shifts(bool second, uint64_t seed)
{
    int out[128], *to = out, wrong = 0;
    cudaStream_t s = stream();
    emu_set_seed(seed);
    KVF_LAUNCH(shift_kernel, dim3(1), dim3(128), 0, s, to, 8, second);
    cudaStreamDestroy(s);
    for (int i = 0; i < 128; i++) wrong += out[i] != i; /* 8 * 32 = 2 * 128: back where it was */
    return wrong;
}

Test(cuda_emu_layer, a_write_after_read_race_shows_under_a_random_order)
{
    int wrong = 0;
    for (uint64_t seed = 1; seed <= 3; seed++) {
        cr_assert_eq(wrong_shifts(true, seed), 0);
        wrong += wrong_shifts(false, seed);
    }
    cr_assert_gt(wrong, 0);
}

KVF_KERNEL(32) copy_kernel(const f16 *src, float *out, bool wait)
{
    KVF_SHARED(f16, tile, 256);
    kvf_cp_async16(tile + threadIdx.x * 8, src + threadIdx.x * 8, threadIdx.x < 16);
    kvf_cp_commit();
    if (wait) kvf_cp_wait<0>();
    kvf_sync();
    for (unsigned i = threadIdx.x; i < 256; i += 32) out[i] = kvf_f32(tile[i]);
}

Test(cuda_emu_layer, an_asynchronous_copy_arrives_at_its_wait_and_not_before)
{
    std::vector<f16> src(256);
    std::vector<float> out(256);
    for (size_t i = 0; i < 256; i++) src[i] = kvf_f16_of(static_cast<float>(i));
    f16 *aligned = nullptr;
    cr_assert_eq(cudaMalloc(reinterpret_cast<void **>(&aligned), 512), cudaSuccess);
    memcpy(aligned, src.data(), 512);
    cudaStream_t s = stream();
    for (int wait = 0; wait < 2; wait++) {
        const f16 *in = aligned;
        float *to = out.data();
        bool w = wait != 0;
        KVF_LAUNCH(copy_kernel, dim3(1), dim3(32), 0, s, in, to, w);
        for (size_t i = 0; i < 256; i++) {
            if (wait)
                cr_assert_eq(out[i], i < 128 ? static_cast<float>(i) : 0.0f);
            else
                cr_assert(isnan(out[i]));
        }
    }
    cudaFree(aligned);
    cudaStreamDestroy(s);
}

KVF_KERNEL(32) past_kernel(int at)
{
    KVF_SHARED(int, v, 32);
    v[threadIdx.x] = 0;
    kvf_sync();
#if defined(__SANITIZE_ADDRESS__)
    if (threadIdx.x == 0 && at == 32 && !__asan_address_is_poisoned(&v[at])) v[0] = 1; /* ASan would end the test */
    if (threadIdx.x == 0 && at < 32) v[at] = 1;
#else
    if (threadIdx.x == 0) *static_cast<volatile int *>(&v[at]) = 1;
#endif
}

Test(cuda_emu_layer, a_write_past_shared_memory_is_caught)
{
    cudaStream_t s = stream();
    KVF_LAUNCH(past_kernel, dim3(1), dim3(32), 0, s, 31);
    cr_assert_eq(cudaGetLastError(), cudaSuccess);
    KVF_LAUNCH(past_kernel, dim3(1), dim3(32), 0, s, 32);
#if !defined(__SANITIZE_ADDRESS__)
    cr_assert_eq(cudaGetLastError(), cudaErrorLaunchFailure);
    cr_assert(strstr(emu_take_fault(), "past the end"));
#endif
    cudaStreamDestroy(s);
}

KVF_KERNEL(64) diverging_kernel(int *out, int how)
{
    if (how == 0 && threadIdx.x < 16) kvf_sync_warp();
    if (how == 1 && threadIdx.x < 16) return;
    int v = how == 2 && threadIdx.x % 2 ? static_cast<int>(kvf_ballot(true)) : kvf_shfl_xor(1, 1);
    out[threadIdx.x] = v;
}

Test(cuda_emu_layer, divergence_in_a_warp_is_an_error_that_says_so)
{
    int out[64], *to = out;
    cudaStream_t s = stream();
    for (int how = 0; how < 3; how++) {
        KVF_LAUNCH(diverging_kernel, dim3(2), dim3(64), 0, s, to, how);
        cr_assert_eq(cudaStreamSynchronize(s), cudaErrorLaunchFailure, "%d", how);
        cr_assert(strstr(emu_take_fault(), "diverging_kernel"));
        cr_assert_eq(cudaStreamSynchronize(s), cudaSuccess);
    }
    cudaStreamDestroy(s);
}

/* c = a b of 16x16 by 16x8 through ldmatrix and mma, against sums in double. */
KVF_KERNEL(32) product_kernel(const f16 *a, const f16 *b, float *c)
{
    KVF_SHARED(f16, sa, 256);
    KVF_SHARED(f16, sb, 256);
    unsigned l = threadIdx.x;
    for (unsigned i = l; i < 256; i += 32) {
        sa[i] = a[i];
        sb[i] = b[i]; /* [k][n], n = 16 */
    }
    kvf_sync();
    uint32_t fa[4], fb[4];
    float lo[4] = { 0 }, hi[4] = { 0 };
    kvf_ldmatrix4(fa, sa + (l & 15) * 16 + (l >> 4) * 8);
    kvf_ldmatrix4_trans(fb, sb + (l & 15) * 16 + (l >> 4) * 8);
    kvf_mma(lo, fa, fb, f16());
    kvf_mma(hi, fa, fb + 2, f16());
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = l / 4 + (i >> 1) * 8, col = l % 4 * 2 + (i & 1);
        c[row * 16 + col] = lo[i];
        c[row * 16 + col + 8] = hi[i];
    }
}

Test(cuda_emu_layer, mma_multiplies_what_ldmatrix_loads)
{
    f16 a[256], b[256], *pa = a, *pb = b;
    float c[256], *pc = c;
    for (int i = 0; i < 256; i++) {
        a[i] = kvf_f16_of(static_cast<float>(i * 7 % 23 - 11));
        b[i] = kvf_f16_of(static_cast<float>(i * 5 % 19 - 9));
    }
    cudaStream_t s = stream();
    KVF_LAUNCH(product_kernel, dim3(1), dim3(32), 0, s, pa, pb, pc);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            double want = 0;
            for (int k = 0; k < 16; k++) want += static_cast<double>(kvf_f32(a[i * 16 + k])) * static_cast<double>(kvf_f32(b[k * 16 + j]));
            cr_assert_eq(static_cast<double>(c[i * 16 + j]), want);
        }
    cudaStreamDestroy(s);
}

Test(cuda_emu_layer, a_capture_runs_at_its_launch_and_not_before)
{
    std::vector<float> x(128, 1.0f);
    float out = -1, *to = &out;
    const float *in = x.data();
    cudaStream_t s = stream();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cr_assert_eq(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    KVF_LAUNCH(sum_kernel, dim3(1), dim3(128), 0, s, in, to, true);
    cr_assert_eq(cudaStreamEndCapture(s, &graph), cudaSuccess);
    cr_assert_eq(out, -1.0f);
    cr_assert_eq(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    cr_assert_eq(cudaGraphLaunch(exec, s), cudaSuccess);
    cr_assert_eq(out, 128.0f);
    x[0] = 2;
    cr_assert_eq(cudaGraphLaunch(exec, s), cudaSuccess);
    cr_assert_eq(out, 129.0f);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(s);
}
