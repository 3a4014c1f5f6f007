/* mem.c - see mem.h. Alignment is made by hand in front of each block, so that any allocator
 * with malloc's contract will do.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

static void *default_alloc(void *user, size_t bytes)
{
    (void)user;
    return malloc(bytes);
}

static void default_release(void *user, void *ptr)
{
    (void)user;
    free(ptr);
}

const kvf_mem kvf_mem_default = { default_alloc, default_release, NULL };

/* The pointer the allocator returned sits in the eight bytes before the aligned block. */
void *kvf_alloc_raw(const kvf_mem *mem, size_t n, size_t size)
{
    size_t bytes;
    if (!kvf_mul_size(n, size, &bytes) || bytes > SIZE_MAX - 2 * KVF_MEM_ALIGN) return NULL;
    char *raw = mem->alloc(mem->user, bytes + KVF_MEM_ALIGN + sizeof(void *));
    if (!raw) return NULL;
    uintptr_t at = ((uintptr_t)raw + sizeof(void *) + KVF_MEM_ALIGN - 1) & ~(uintptr_t)(KVF_MEM_ALIGN - 1);
    char *aligned = raw + (at - (uintptr_t)raw);
    memcpy(aligned - sizeof(void *), &raw, sizeof(void *));
    return aligned;
}

void *kvf_alloc(const kvf_mem *mem, size_t n, size_t size)
{
    void *p = kvf_alloc_raw(mem, n, size);
    if (p) memset(p, 0, n * size);
    return p;
}

kvf_status kvf_mem_get(const kvf_mem *mem, void **out, size_t n, size_t size, kvf_error *err)
{
    *out = kvf_alloc(mem, n, size);
    if (*out) return KVF_OK;
    return kvf_fail(err, KVF_ERR_NOMEM,
                    "out of memory: %zu x %zu bytes refused; free memory or lower the context", n, size);
}

void kvf_free(const kvf_mem *mem, void *ptr)
{
    if (!ptr) return;
    void *raw;
    memcpy(&raw, (char *)ptr - sizeof(void *), sizeof(void *));
    mem->release(mem->user, raw);
}

kvf_status kvf_reserve(const kvf_mem *mem, void **buf, int64_t *cap, int64_t n, size_t size,
                       kvf_error *err)
{
    if (n <= *cap) return KVF_OK;
    int64_t want = *cap + *cap / 2;
    if (want < n) want = n;
    if (want < 16) want = 16;
    void *fresh;
    KVF_TRY(kvf_mem_get(mem, &fresh, (size_t)want, size, err));
    if (*buf) memcpy(fresh, *buf, (size_t)*cap * size);
    kvf_free(mem, *buf);
    *buf = fresh;
    *cap = want;
    return KVF_OK;
}
