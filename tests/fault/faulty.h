/* faulty.h - an allocator whose k-th allocation fails, and which counts what is not given back.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_FAULT_FAULTY_H
#define KVF_TESTS_FAULT_FAULTY_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

typedef struct faulty {
    atomic_long fail_at; /* the allocation that fails; 0: none */
    atomic_long n_alloc, n_live;
} faulty;

static void *faulty_alloc(void *user, size_t bytes)
{
    faulty *f = user;
    if (atomic_fetch_add(&f->n_alloc, 1) + 1 == atomic_load(&f->fail_at)) return NULL;
    void *p = malloc(bytes);
    if (p) atomic_fetch_add(&f->n_live, 1);
    return p;
}

static void faulty_release(void *user, void *ptr)
{
    faulty *f = user;
    atomic_fetch_sub(&f->n_live, 1);
    free(ptr);
}

#endif
