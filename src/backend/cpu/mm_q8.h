/* mm_q8.h - what the int8 product kernels share: a weight block as integers, and the Q8 packers.
 *
 * Every quantised type is read as groups of one scale: w = s * u - m with integer u. The
 * reference product, the dequantisation and the tests all take a block apart through this one
 * function, so a byte layout is written down once (dequant_ref.c).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_MM_Q8_H
#define KVF_BACKEND_CPU_MM_Q8_H

#include "backend/cpu/mm.h"

#define KVF_Q8_BLOCK 32 /* activations per scale */

/* Element i of the block is s[i / group] * u[i] - m[i / group]. */
typedef struct kvf_wblock {
    int32_t n, group; /* elements of the block (32 or 256), of a scale (16 or 32) */
    float s[16], m[16];
    int16_t u[256];
} kvf_wblock;

/* Take one block of a quantised type apart. False for a type that is not quantised. */
bool kvf_wblock_unpack(kvf_dtype type, const void *block, kvf_wblock *out);

static inline int64_t kvf_q8_blocks(int64_t n_in) { return (n_in + KVF_Q8_BLOCK - 1) / KVF_Q8_BLOCK; }

/* Members of kvf_mm_kernel for x_form KVF_X_Q8. The three packers write the same bytes. */
size_t kvf_q8_x_bytes(int64_t n_tok, int64_t n_in);
void kvf_q8_pack_ref(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out);
void kvf_q8_pack_avx2(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out);
void kvf_q8_pack_avx512(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out);

/* The same for x_form KVF_X_F32: rows as they are, n_in floats apart. */
size_t kvf_f32_x_bytes(int64_t n_tok, int64_t n_in);
void kvf_f32_pack(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out);

#endif
