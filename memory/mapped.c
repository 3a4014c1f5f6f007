/* mapped.c - where LMDB has mapped the file, pages of it let go of, and bytes of it read or mapped beside that map.
 *
 * LMDB does not say where its map is, and the library must not advise the kernel about a range it only
 * guesses: a rounding too far would throw away somebody else's memory. The kernel's own list of maps says it.
 * Without that list, or where a second map looks the same (the inode number of another file system; a child's of
 * before a fork), blocks and digests come from LMDB's map and nothing of it is let go of: only the figure for
 * resident memory is larger.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory/store_int.h"

/* A line of the list: "from-to perms offset device inode path". */
static bool line_is(const char *line, ino_t ino, size_t bytes, uint8_t **at)
{
    unsigned long from, to, offset, inode;
    char perms[8], device[32];
    if (sscanf(line, "%lx-%lx %7s %lx %31s %lu", &from, &to, perms, &offset, device, &inode) != 6) return false;
    if (inode != (unsigned long)ino || offset != 0 || to - from != bytes || perms[1] == 'w' || perms[3] != 's') return false;
    *at = (uint8_t *)(uintptr_t)from;
    return true;
}

void kvf_mapped_find(kvf_env *e)
{
    MDB_envinfo info;
    char line[512];
    bool whole = true; /* the last read began at the beginning of a line */
    struct stat s;
    int fd;
    e->map_at = NULL;
    e->map_bytes = 0;
    if (!e->mdb || mdb_env_info(e->mdb, &info) || mdb_env_get_fd(e->mdb, &fd) || fstat(fd, &s)) return;
    FILE *f = fopen("/proc/self/maps", "re");
    int n = 0;
    while (f && fgets(line, sizeof line, f)) {
        n += whole && line_is(line, s.st_ino, info.me_mapsize, &e->map_at);
        whole = strchr(line, '\n') != NULL;
    }
    if (f) fclose(f);
    if (n == 1)
        e->map_bytes = info.me_mapsize;
    else
        e->map_at = NULL;
    /* A huge page would count its 2 MiB as this process's for a few bytes of it. */
    if (e->map_at) madvise(e->map_at, e->map_bytes, MADV_NOHUGEPAGE);
}

/* The file and the place in it of n bytes of the map at p; false: not known. */
static bool in_file(const kvf_env *e, const uint8_t *p, size_t n, int *fd, off_t *at)
{
    if (!e->mdb || !e->map_at || p < e->map_at || n > e->map_bytes) return false;
    *at = p - e->map_at;
    return (size_t)*at <= e->map_bytes - n && mdb_env_get_fd(e->mdb, fd) == 0;
}

kvf_status kvf_mapped_read(const kvf_env *e, const uint8_t *p, size_t n, void *dst, kvf_error *err)
{
    int fd;
    off_t at;
    if (!in_file(e, p, n, &fd, &at)) {
        memcpy(dst, p, n);
        return KVF_OK;
    }
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(fd, (uint8_t *)dst + done, n - done, at + (off_t)done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0)
            return kvf_fail(err, KVF_ERR_IO, "store '%s' cannot be read: %s; check the disk", e->folder, strerror(errno));
        if (got == 0)
            return kvf_fail(err, KVF_ERR_FORMAT,
                            "store '%s' is damaged: its file is cut off; remove the store and read the documents again",
                            e->folder);
        done += (size_t)got;
    }
    return KVF_OK;
}

#define FOLIO ((size_t)2 << 20) /* the largest that the page cache has */

/* Addresses for the whole file, none of it there: each window lies as the file does within a large folio, which is what
 * lets processors keep one translation for several of its pages. */
static bool reserve(const kvf_env *e, int fd, kvf_windows *w)
{
    struct stat s;
    if (w->at) return true;
    /* Not for the whole map, which has room to grow: addresses may be limited. */
    if (fstat(fd, &s) || s.st_size < 1 || (uint64_t)s.st_size > e->map_bytes) return false;
    size_t bytes = ((size_t)s.st_size + FOLIO - 1) / FOLIO * FOLIO + FOLIO;
    void *at = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return false;
    *w = (kvf_windows){ .at = at, .bytes = bytes };
    w->base = (uint8_t *)(((uintptr_t)at + FOLIO - 1) & ~(uintptr_t)(FOLIO - 1));
    return true;
}

const uint8_t *kvf_mapped_window(const kvf_env *e, kvf_windows *w, const uint8_t *p, size_t n)
{
    int fd;
    off_t at;
    if (!in_file(e, p, n, &fd, &at) || !reserve(e, fd, w)) return NULL;
    long page = sysconf(_SC_PAGESIZE); /* the system's: LMDB's may be smaller */
    size_t before = (size_t)at & ((size_t)page - 1), from = (size_t)at - before;
    int flags = MAP_SHARED | MAP_FIXED;
#ifdef MAP_POPULATE
    flags |= MAP_POPULATE; /* all of it will be read: no fault by fault */
#endif
    if (from + before + n > w->bytes - (size_t)(w->base - (uint8_t *)w->at)) return NULL;
    if (mmap(w->base + from, before + n, PROT_READ, flags, fd, (off_t)from) == MAP_FAILED) return NULL;
    w->mapped += before + n;
    w->n++;
    return w->base + at;
}

void kvf_mapped_close(kvf_windows *w)
{
    if (w->at) munmap(w->at, w->bytes);
    *w = (kvf_windows){ 0 };
}

void kvf_mapped_let_go(const kvf_env *e)
{
    if (e->mdb && e->map_at) madvise(e->map_at, e->map_bytes, MADV_DONTNEED);
}
