/* simt.h - device code in one spelling for two compilers: nvcc, and g++ with the emulation layer.
 *
 * Kernels use these names and plain C++; nothing else of CUDA appears in a k_*.cu file, so that each of
 * them also runs on the CPU (emu/emu.h says what that shows). Blocks are whole warps. Matrix products go
 * through mma.sync m16n8k16 (sm_80 and later), loads of tiles through cp.async.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_CUDA_SIMT_H
#define KVF_CUDA_SIMT_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KVF_KERNEL(threads) static __global__ void __launch_bounds__(threads)
/* With at least `blocks` of them on a multiprocessor: what the compiler may spend in registers. */
#define KVF_KERNEL_OF(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define KVF_DEV static __device__ __forceinline__
#define KVF_UNROLL _Pragma("unroll")
#define KVF_PRAGMA(text) _Pragma(#text)
#define KVF_UNROLL_BY(n) KVF_PRAGMA(unroll(n))
#define KVF_SHARED(type, name, n) __shared__ __align__(16) type name[n]
#define KVF_SHARED_DYN(type, name)                          \
    extern __shared__ __align__(128) unsigned char kvf_dynamic[]; \
    type *name = reinterpret_cast<type *>(kvf_dynamic)
#define KVF_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)

typedef __half f16;
typedef __nv_bfloat16 bf16;

KVF_DEV float kvf_f32(f16 x) { return __half2float(x); }
KVF_DEV float kvf_f32(bf16 x) { return __bfloat162float(x); }
KVF_DEV f16 kvf_f16_of(float x) { return __float2half_rn(x); }
KVF_DEV bf16 kvf_bf16_of(float x) { return __float2bfloat16_rn(x); }
KVF_DEV uint32_t kvf_pack(f16 lo, f16 hi) { return __half_as_ushort(lo) | static_cast<uint32_t>(__half_as_ushort(hi)) << 16; }
KVF_DEV uint32_t kvf_pack(bf16 lo, bf16 hi)
{
    return __bfloat16_as_ushort(lo) | static_cast<uint32_t>(__bfloat16_as_ushort(hi)) << 16;
}
KVF_DEV uint32_t kvf_bits(float x) { return __float_as_uint(x); }
KVF_DEV float kvf_float(uint32_t u) { return __uint_as_float(u); }
/* Never fused into a multiply-add. */
KVF_DEV double kvf_add_rn(double a, double b) { return __dadd_rn(a, b); }
KVF_DEV double kvf_mul_rn(double a, double b) { return __dmul_rn(a, b); }
KVF_DEV float kvf_add_rn(float a, float b) { return __fadd_rn(a, b); }
KVF_DEV float kvf_mul_rn(float a, float b) { return __fmul_rn(a, b); }
KVF_DEV int kvf_dp4a(int a, int b, int c) { return __dp4a(a, b, c); }
/* 2^x by the special function unit: relative error 2^-22, results below 2^-126 are 0. */
KVF_DEV float kvf_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}

KVF_DEV void kvf_sync() { __syncthreads(); }
KVF_DEV void kvf_sync_warp() { __syncwarp(); }
KVF_DEV float kvf_shfl_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
KVF_DEV int kvf_shfl_xor(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
KVF_DEV float kvf_shfl(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
KVF_DEV int kvf_shfl(int v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
KVF_DEV uint32_t kvf_ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
KVF_DEV int kvf_atomic_add(int *p, int v) { return atomicAdd(p, v); }
KVF_DEV int kvf_atomic_min(int *p, int v) { return atomicMin(p, v); }
KVF_DEV int kvf_atomic_max(int *p, int v) { return atomicMax(p, v); }
KVF_DEV int kvf_popc(uint32_t v) { return __popc(v); }

/* c [16][8] += a [16][16] b [16][8], fp32. Fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16". */
KVF_DEV void kvf_mma(float *c, const uint32_t *a, const uint32_t *b, f16)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KVF_DEV void kvf_mma(float *c, const uint32_t *a, const uint32_t *b, bf16)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* Four 8x8 matrices of 16-bit values; `row`: lane l gives row l % 8 of matrix l / 8, in shared memory. */
KVF_DEV void kvf_ldmatrix4(uint32_t *r, const void *row)
{
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
KVF_DEV void kvf_ldmatrix4_trans(uint32_t *r, const void *row)
{
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
/* 16 bytes to shared memory; zeros if not valid (src must be an address all the same). */
KVF_DEV void kvf_cp_async16(void *dst, const void *src, bool valid)
{
    unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(dst));
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(at), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
KVF_DEV void kvf_cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> KVF_DEV void kvf_cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

#else
#include "cuda/emu/emu.h"
#include "cuda/emu/emu_runtime.h"
#endif

#define KVF_LOG2E 1.44269504088896340736f
#define KVF_LN2 0.69314718055994530942f

KVF_DEV float kvf_warp_sum(float v)
{
    for (int m = 16; m; m >>= 1) v += kvf_shfl_xor(v, m);
    return v;
}
KVF_DEV float kvf_warp_max(float v)
{
    for (int m = 16; m; m >>= 1) v = fmaxf(v, kvf_shfl_xor(v, m));
    return v;
}

struct kvf_vec4u { /* 16 bytes in one load */
    uint32_t x, y, z, w;
};
#ifdef __CUDACC__
KVF_DEV kvf_vec4u kvf_load16(const void *p)
{
    uint4 v = *static_cast<const uint4 *>(p);
    return { v.x, v.y, v.z, v.w };
}
/* Read once: weights need no place in L1. */
KVF_DEV kvf_vec4u kvf_load16_once(const void *p)
{
    uint4 v = __ldcs(static_cast<const uint4 *>(p));
    return { v.x, v.y, v.z, v.w };
}
KVF_DEV void kvf_store16(void *p, kvf_vec4u v) { *static_cast<uint4 *>(p) = make_uint4(v.x, v.y, v.z, v.w); }
#else
void emu_check_align(const void *p, unsigned bytes);
static inline kvf_vec4u kvf_load16(const void *p)
{
    emu_check_align(p, 16);
    kvf_vec4u v;
    memcpy(&v, p, 16);
    return v;
}
static inline kvf_vec4u kvf_load16_once(const void *p) { return kvf_load16(p); }
static inline void kvf_store16(void *p, kvf_vec4u v)
{
    emu_check_align(p, 16);
    memcpy(p, &v, 16);
}
#endif

/* Grids of flat work: a thread takes every kvf_stride()-th element. */
KVF_DEV int64_t kvf_first() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
KVF_DEV int64_t kvf_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
static inline unsigned kvf_blocks(int64_t n, int64_t per, int64_t most)
{
    int64_t b = (n + per - 1) / per;
    return static_cast<unsigned>(b < 1 ? 1 : b > most ? most : b);
}

#endif
