/* park.c - see park.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* O_TMPFILE */
#include "model/park.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLAB_ROWS = 512, WORDS = SLAB_ROWS / 64 };

typedef struct slab {
    float *data; /* NULL: none */
    bool file;
    int32_t n_used;
    uint64_t used[WORDS];
} slab;

struct kvf_park {
    const kvf_mem *mem;
    size_t row_bytes, slab_bytes; /* slab_bytes: whole pages */
    slab *slabs;
    int64_t n_slab, cap_slab, hint; /* hint: a slab that may have room */
    int64_t n_row;
    size_t bytes, file_bytes;
    char folder[256];
};

/* A file that is gone as soon as nobody has it open. */
static int open_nameless(const char *folder)
{
    int fd = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return fd;
    char path[300];
    int n = snprintf(path, sizeof path, "%s/kvfold-XXXXXX", folder);
    if (n < 0 || (size_t)n >= sizeof path) return -1;
    fd = mkostemp(path, O_CLOEXEC);
    if (fd >= 0) unlink(path);
    return fd;
}

static kvf_status open_file(const char *folder, int *fd, kvf_error *err)
{
    *fd = open_nameless(folder);
    return *fd >= 0 ? KVF_OK
                    : kvf_fail(err, KVF_ERR_IO, "%s: %s; name a folder for waiting hidden states that can be written",
                               folder, strerror(errno));
}

kvf_status kvf_park_open(kvf_park **out, const kvf_mem *mem, int64_t width, const char *folder, kvf_error *err)
{
    *out = NULL;
    void *block;
    size_t n = folder ? strlen(folder) : 0, page = (size_t)sysconf(_SC_PAGESIZE);
    if (n >= sizeof ((kvf_park *)0)->folder)
        return kvf_fail(err, KVF_ERR_ARG, "the folder for waiting hidden states has a name of %zu characters; use a shorter one", n);
    if (n) { /* not after an hour of reading */
        int fd;
        KVF_TRY(open_file(folder, &fd, err));
        close(fd);
    }
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_park), err));
    kvf_park *p = block;
    p->mem = mem;
    p->row_bytes = (size_t)width * sizeof(float);
    p->slab_bytes = (p->row_bytes * SLAB_ROWS + page - 1) / page * page;
    if (n) memcpy(p->folder, folder, n);
    *out = p;
    return KVF_OK;
}

static void free_slab(kvf_park *p, slab *s)
{
    if (!s->data) return;
    if (s->file) {
        munmap(s->data, p->slab_bytes);
        p->file_bytes -= p->slab_bytes;
    } else {
        kvf_free(p->mem, s->data);
        p->bytes -= p->slab_bytes;
    }
    *s = (slab){ 0 };
}

void kvf_park_close(kvf_park *p)
{
    if (!p) return;
    for (int64_t i = 0; i < p->n_slab; i++) free_slab(p, &p->slabs[i]);
    kvf_free(p->mem, p->slabs);
    kvf_free(p->mem, p);
}

static kvf_status map_file(kvf_park *p, slab *s, kvf_error *err)
{
    int fd;
    KVF_TRY(open_file(p->folder, &fd, err));
    int rc = posix_fallocate(fd, 0, (off_t)p->slab_bytes); /* a full disk shows here, not as a signal later */
    void *data = rc ? MAP_FAILED : mmap(NULL, p->slab_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int why = rc ? rc : errno;
    close(fd);
    if (data == MAP_FAILED)
        return kvf_fail(err, KVF_ERR_IO, "%s cannot hold %zu more bytes of waiting hidden states: %s; make room or name another folder",
                        p->folder, p->slab_bytes, strerror(why));
    s->data = data;
    s->file = true;
    p->file_bytes += p->slab_bytes;
    return KVF_OK;
}

static kvf_status make_slab(kvf_park *p, slab *s, size_t room, kvf_error *err)
{
    if (room >= p->slab_bytes) {
        s->data = kvf_alloc_raw(p->mem, p->slab_bytes, 1);
        if (!s->data) return kvf_fail(err, KVF_ERR_NOMEM, "no memory for %zu bytes of hidden states", p->slab_bytes);
        p->bytes += p->slab_bytes;
        return KVF_OK;
    }
    if (p->folder[0]) return map_file(p, s, err);
    return kvf_fail(err, KVF_ERR_LIMIT,
                    "the hidden states of %lld waiting tokens do not fit the memory budget; raise it, or name a folder "
                    "for them with the policy's option park",
                    (long long)p->n_row + 1);
}

/* A slab with a free row: the hint, any other, or a new one. */
static kvf_status find_slab(kvf_park *p, size_t room, kvf_error *err)
{
    int64_t empty = -1;
    if (p->hint < p->n_slab && p->slabs[p->hint].data && p->slabs[p->hint].n_used < SLAB_ROWS) return KVF_OK;
    for (int64_t i = 0; i < p->n_slab; i++) {
        if (!p->slabs[i].data) empty = i;
        if (!p->slabs[i].data || p->slabs[i].n_used == SLAB_ROWS) continue;
        p->hint = i;
        return KVF_OK;
    }
    if (empty < 0) {
        void *grown = p->slabs;
        KVF_TRY(kvf_reserve(p->mem, &grown, &p->cap_slab, p->n_slab + 1, sizeof(slab), err));
        p->slabs = grown;
        empty = p->n_slab++;
        p->slabs[empty] = (slab){ 0 };
    }
    KVF_TRY(make_slab(p, &p->slabs[empty], room, err));
    p->hint = empty;
    return KVF_OK;
}

kvf_status kvf_park_take(kvf_park *p, size_t room, int32_t *row, kvf_error *err)
{
    KVF_TRY(find_slab(p, room, err));
    slab *s = &p->slabs[p->hint];
    int32_t w = 0;
    while (s->used[w] == UINT64_MAX) w++;
    int32_t bit = __builtin_ctzll(~s->used[w]);
    s->used[w] |= (uint64_t)1 << bit;
    s->n_used++;
    p->n_row++;
    *row = (int32_t)(p->hint * SLAB_ROWS) + w * 64 + bit;
    return KVF_OK;
}

void kvf_park_give(kvf_park *p, int32_t row)
{
    slab *s = &p->slabs[row / SLAB_ROWS];
    s->used[row % SLAB_ROWS / 64] &= ~((uint64_t)1 << (row % 64));
    p->n_row--;
    if (--s->n_used == 0) free_slab(p, s);
}

float *kvf_park_row(const kvf_park *p, int32_t row)
{
    const slab *s = &p->slabs[row / SLAB_ROWS];
    return (float *)(void *)((char *)s->data + (size_t)(row % SLAB_ROWS) * p->row_bytes);
}

size_t kvf_park_bytes(const kvf_park *p) { return p->bytes; }
size_t kvf_park_file_bytes(const kvf_park *p) { return p->file_bytes; }
int64_t kvf_park_rows(const kvf_park *p) { return p->n_row; }
