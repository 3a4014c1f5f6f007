/* dtype.h - the element types of weights, as GGUF stores them.
 *
 * A type is a block of `block` consecutive elements of one row in `bytes` bytes. Byte layouts are
 * those of the GGUF format; backend/cpu/dequant_ref.c spells each out. Rows are whole blocks.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_DTYPE_H
#define KVF_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>

/* Values are the type numbers of the GGUF file format. */
typedef enum kvf_dtype {
    KVF_DTYPE_F32 = 0,
    KVF_DTYPE_F16 = 1,
    KVF_DTYPE_Q4_0 = 2,
    KVF_DTYPE_Q4_1 = 3,
    KVF_DTYPE_Q5_0 = 6,
    KVF_DTYPE_Q5_1 = 7,
    KVF_DTYPE_Q8_0 = 8,
    KVF_DTYPE_Q4_K = 12,
    KVF_DTYPE_Q5_K = 13,
    KVF_DTYPE_Q6_K = 14,
    KVF_DTYPE_BF16 = 30,
    KVF_DTYPE_LIMIT = 31 /* one past the largest */
} kvf_dtype;

typedef struct kvf_dtype_info {
    const char *name; /* "Q4_K" */
    int32_t block;    /* elements */
    int32_t bytes;    /* of a block */
} kvf_dtype_info;

/* NULL for a type this build does not know. */
const kvf_dtype_info *kvf_dtype_get(uint32_t type);

/* Bytes of n elements; n must be a multiple of the block. */
static inline size_t kvf_dtype_row_bytes(uint32_t type, int64_t n)
{
    const kvf_dtype_info *t = kvf_dtype_get(type);
    return (size_t)(n / t->block) * (size_t)t->bytes;
}

#endif
