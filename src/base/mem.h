/* mem.h - every byte the library owns comes through here.
 *
 * Blocks are 64-byte aligned (one cache line, one AVX-512 register) and zeroed on request.
 * Counts and element sizes are multiplied with an overflow check, so a hostile file can ask for
 * any product and gets KVF_ERR_NOMEM. The allocator is the ctx's; tests inject failures there.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_MEM_H
#define KVF_BASE_MEM_H

#include <stdbool.h>

#include "base/error.h"

#define KVF_MEM_ALIGN 64u

typedef struct kvf_mem {
    void *(*alloc)(void *user, size_t bytes);
    void (*release)(void *user, void *ptr);
    void *user;
} kvf_mem;

/* malloc and free. */
extern const kvf_mem kvf_mem_default;

/* n * size bytes, 64-byte aligned, zeroed. n = 0 gives a valid block. NULL on overflow or
 * failure; kvf_mem_get also fills err with KVF_ERR_NOMEM. */
void *kvf_alloc(const kvf_mem *mem, size_t n, size_t size);
kvf_status kvf_mem_get(const kvf_mem *mem, void **out, size_t n, size_t size, kvf_error *err);

/* The same without zeroing, for large scratch. */
void *kvf_alloc_raw(const kvf_mem *mem, size_t n, size_t size);

/* Takes NULL. */
void kvf_free(const kvf_mem *mem, void *ptr);

/* Make *buf hold at least n elements, keeping its content; *cap counts elements and grows by
 * half at least. On failure *buf is unchanged. New elements are zero. */
kvf_status kvf_reserve(const kvf_mem *mem, void **buf, int64_t *cap, int64_t n, size_t size,
                       kvf_error *err);

/* *out = a * b, or false if it does not fit. */
static inline bool kvf_mul_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}

#endif
