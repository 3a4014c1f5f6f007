/* emu.h - kernels on the CPU: the device half of the emulation layer.
 *
 * The same .cu files that nvcc compiles are compiled by g++ with this header. The blocks of a grid run
 * one after another; the threads of a block are fibers, which switch only where they wait for each other:
 * at __syncthreads and at everything that a warp does together (shuffles, ballots, __syncwarp, ldmatrix,
 * mma). So there is no data race in the sense of C++, and a missing barrier shows as wrong numbers:
 *
 *   - with a seed (emu_set_seed) the next fiber is drawn at random, one warp for a while before all others,
 *     and fibers also give way before they arrive: a warp gets as far ahead as the barriers let it;
 *   - shared memory is filled with NaN at the start of a block; each array is a heap block of its own,
 *     with a guarded tail, so ASan (or, without it, the guard) sees an access past its end;
 *   - cp.async copies at the wait_group that waits for it: without the wait NaN is read. With a seed every
 *     other copy comes at once: one into a tile that others still read shows too;
 *   - a barrier that some threads never reach, lanes of a warp that meet in different operations, and a
 *     warp operation after a lane has returned end the launch with an error that says so.
 *
 * What it does not show: races between blocks, the memory model (a __syncwarp that is missing before an
 * operation of the whole warp), speed. Fragment layouts of mma and
 * ldmatrix are those of the PTX ISA, sections "Matrix Fragments for mma.m16n8k16" and "ldmatrix".
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_CUDA_EMU_EMU_H
#define KVF_CUDA_EMU_EMU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>

extern "C" {
/* Order of fibers: 0 in turn, else a random one by this seed, the same every time. */
void emu_set_seed(uint64_t seed);
/* What went wrong in the last failed launch; empty when none did. Clears it. */
const char *emu_take_fault(void);
}

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

struct emu_thread { /* what threadIdx and the like read: set at every switch */
    dim3 thread, block, n_thread, n_block;
    int lane;
};
extern emu_thread emu_here;

#define threadIdx (emu_here.thread)
#define blockIdx (emu_here.block)
#define blockDim (emu_here.n_thread)
#define gridDim (emu_here.n_block)

/* What a warp does together. Each lane leaves its words in `in`, the last one runs the operation, which
 * leaves words in `out`. */
struct emu_warp {
    uint32_t in[32][10], out[32][4];
    const void *at[32];
};
typedef void (*emu_warp_fn)(emu_warp *w, int arg);
emu_warp *emu_my_warp();
void emu_meet(emu_warp_fn fn, int arg);

void emu_block_barrier();
void *emu_shared(const void *key, size_t bytes);
void *emu_shared_dynamic();
void emu_cp_async(void *dst, const void *src, unsigned bytes, unsigned valid);
void emu_cp_commit();
void emu_cp_wait(unsigned pending);

/* Run (or, during a capture, note down) a grid. */
void emu_launch(const char *kernel, dim3 grid, dim3 block, size_t shared, void *stream, std::function<void()> body);

#define KVF_KERNEL(threads) static void
#define KVF_KERNEL_OF(threads, blocks) static void
#define KVF_DEV static inline
#define KVF_UNROLL
#define KVF_UNROLL_BY(n)
#define KVF_SHARED(type, name, n)      \
    static const char name##_key = 0; \
    type *name = static_cast<type *>(emu_shared(&name##_key, sizeof(type) * (n)))
#define KVF_SHARED_DYN(type, name) type *name = static_cast<type *>(emu_shared_dynamic())
#define KVF_LAUNCH(kernel, grid, block, shared, stream, ...) \
    emu_launch(#kernel, grid, block, shared, stream, [=] { kernel(__VA_ARGS__); })
#define __restrict__

/* ---- Numbers ---------------------------------------------------------------------------------- */

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};
extern const float *emu_f16_value; /* [65536] */
uint16_t emu_f16_bits(float x);

static inline float kvf_f32(f16 x) { return emu_f16_value[x.bits]; }
static inline float kvf_f32(bf16 x)
{
    uint32_t u = static_cast<uint32_t>(x.bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline f16 kvf_f16_of(float x) { return f16{ emu_f16_bits(x) }; }
static inline bf16 kvf_bf16_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{ static_cast<uint16_t>(u >> 16 | 0x40u) };
    return bf16{ static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16) };
}
static inline uint32_t kvf_pack(f16 lo, f16 hi) { return lo.bits | static_cast<uint32_t>(hi.bits) << 16; }
static inline uint32_t kvf_pack(bf16 lo, bf16 hi) { return lo.bits | static_cast<uint32_t>(hi.bits) << 16; }
static inline uint32_t kvf_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
static inline float kvf_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}
/* Sums and products that no compiler fuses: this layer is compiled with -ffp-contract=off. */
static inline double kvf_add_rn(double a, double b) { return a + b; }
static inline double kvf_mul_rn(double a, double b) { return a * b; }
static inline float kvf_add_rn(float a, float b) { return a + b; }
static inline float kvf_mul_rn(float a, float b) { return a * b; }

static inline float kvf_exp2(float x)
{
    float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

static inline int kvf_dp4a(int a, int b, int c)
{
    uint32_t x = static_cast<uint32_t>(a), y = static_cast<uint32_t>(b);
    for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(x >> i) * static_cast<int8_t>(y >> i);
    return c;
}

/* ---- Threads together ------------------------------------------------------------------------- */

static inline void kvf_sync() { emu_block_barrier(); }
void kvf_sync_warp();
uint32_t emu_shuffle_xor(uint32_t v, int mask);
uint32_t emu_shuffle(uint32_t v, int lane);
uint32_t kvf_ballot(bool v);
static inline float kvf_shfl_xor(float v, int mask) { return kvf_float(emu_shuffle_xor(kvf_bits(v), mask)); }
static inline int kvf_shfl_xor(int v, int mask)
{
    return static_cast<int>(emu_shuffle_xor(static_cast<uint32_t>(v), mask));
}
static inline float kvf_shfl(float v, int lane) { return kvf_float(emu_shuffle(kvf_bits(v), lane)); }
static inline int kvf_shfl(int v, int lane) { return static_cast<int>(emu_shuffle(static_cast<uint32_t>(v), lane)); }

/* Fibers do not interrupt each other, so a plain sum is atomic. */
static inline int kvf_atomic_add(int *p, int v)
{
    int old = *p;
    *p = old + v;
    return old;
}
static inline int kvf_atomic_min(int *p, int v)
{
    int old = *p;
    *p = v < old ? v : old;
    return old;
}
static inline int kvf_atomic_max(int *p, int v)
{
    int old = *p;
    *p = v > old ? v : old;
    return old;
}
static inline int kvf_popc(uint32_t v) { return __builtin_popcount(v); }

void kvf_mma(float *c, const uint32_t *a, const uint32_t *b, f16);
void kvf_mma(float *c, const uint32_t *a, const uint32_t *b, bf16);
void kvf_ldmatrix4(uint32_t *r, const void *row);
void kvf_ldmatrix4_trans(uint32_t *r, const void *row);

static inline void kvf_cp_async16(void *dst, const void *src, bool valid) { emu_cp_async(dst, src, 16, valid ? 16 : 0); }
static inline void kvf_cp_commit() { emu_cp_commit(); }
template <int PENDING> static inline void kvf_cp_wait() { emu_cp_wait(PENDING); }

#endif
