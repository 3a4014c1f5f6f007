/* env.c - the LMDB environment: opened once per process, checked before use, grown while in use.
 *
 * Commits are synchronous (LMDB's default): the writer has a thread of its own and a commit carries 2048
 * tokens, seconds of computing, so a disk flush costs nothing that anybody waits for. Read-ahead is off
 * (MDB_NORDAHEAD, and for reads of the file too): blocks are read at random. Read transactions are
 * not tied to threads (MDB_NOTLS).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "memory/pages.h"
#include "memory/store_int.h"

#if MDB_VERSION_MAJOR != 0 || MDB_VERSION_MINOR != 9
#error "pages.c knows the file format of LMDB 0.9"
#endif

#define MIB ((size_t)1 << 20)
#define MAP_CHOSEN (8192 * MIB) /* address space costs nothing; each move of the map costs readers their pointers */
#define MAP_LEAST (64 * MIB)    /* where address space is limited */
#define READERS 510

static const char *const names[KVF_DB_COUNT + 1] = { "meta", "doc", "note", "chain", "tok", "blk", "rep", "tail", NULL };

/* The environments of this process, by file. The one thing in the library that is written after start:
 * POSIX locks belong to a process, so LMDB must know of its own. */
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static kvf_env *list;

/* ---- Errors ---------------------------------------------------------------------------------- */

/* LMDB turns a write that did not fit into EIO. */
static bool no_room(const kvf_env *e)
{
    struct statvfs v;
    struct rlimit r;
    if (statvfs(e->folder, &v) == 0 && (unsigned long long)v.f_bavail * v.f_frsize < 64 * MIB) return true;
    return getrlimit(RLIMIT_FSIZE, &r) == 0 && r.rlim_cur != RLIM_INFINITY;
}

kvf_status kvf_env_fail(const kvf_env *e, int rc, const char *doing, kvf_error *err)
{
    switch (rc) {
    case ENOMEM: return kvf_fail(err, KVF_ERR_NOMEM, "out of memory while %s store '%s'; free memory", doing, e->folder);
    case EIO:
        if (!no_room(e)) break;
        /* fall through */
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return kvf_fail(err, KVF_ERR_SPACE, "no space left while %s store '%s'; free some or move the store, then do the same again", doing, e->folder);
    case MDB_READERS_FULL:
        return kvf_fail(err, KVF_ERR_LIMIT, "store '%s' has too many readers; close some", e->folder);
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INVALID:
    case MDB_INCOMPATIBLE:
    case MDB_BAD_VALSIZE:
    case MDB_BAD_DBI:
        return kvf_fail(err, KVF_ERR_FORMAT, "store '%s' is damaged (%s, while %s it); restore it from a copy or make a new one", e->folder,
                        mdb_strerror(rc), doing);
    default: break;
    }
    return kvf_fail(err, KVF_ERR_IO, "%s store '%s': %s; check the disk and its permissions", doing, e->folder, mdb_strerror(rc));
}

static kvf_status lost(const kvf_env *e, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_IO, "store '%s' could not be mapped again; close it and open it again", e->folder);
}

/* ---- The file before LMDB sees it ----------------------------------------------------------------- */

static kvf_status check_head(const kvf_env *e, kvf_error *err)
{
    uint64_t txn;
    size_t page;
    uint8_t *head = kvf_alloc(&kvf_mem_default, 65536, 1);
    if (!head) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: 65536 bytes; free memory");
    int fd = open(e->file, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? pread(fd, head, 65536, 0) : -1;
    kvf_status rc = n < 0 ? kvf_env_fail(e, errno, "reading", err) : kvf_pages_head(head, (size_t)n, &txn, &page, err);
    if (fd >= 0) close(fd);
    kvf_free(&kvf_mem_default, head);
    return rc;
}

typedef struct mapped_file {
    void *map;
    size_t bytes;
    int fd;
} mapped_file;

static bool file_read(void *ctx, uint64_t at, void *out, size_t n)
{
    const mapped_file *f = ctx;
    ssize_t got;
    do got = pread(f->fd, out, n, (off_t)at);
    while (got < 0 && errno == EINTR);
    return got == (ssize_t)n;
}

static void file_rest(void *ctx)
{
    const mapped_file *f = ctx;
    madvise(f->map, f->bytes, MADV_DONTNEED);
}

static kvf_status check_file(mapped_file *f, uint64_t txn, const kvf_mem *mem, bool *current, kvf_error *err)
{
    const kvf_pages_io io = { file_read, file_rest, f };
    return kvf_pages_check(f->map, f->bytes, &io, txn, names, mem, current, err);
}

/* All pages with keys, as a read transaction sees them. */
static kvf_status check_pages(kvf_env *e, const kvf_mem *mem, kvf_error *err)
{
    bool current = false;
    for (int i = 0; i < 100 && !current; i++) {
        MDB_txn *txn;
        KVF_TRY(kvf_env_begin(e, &txn, err));
        struct stat s;
        mapped_file f = { .map = MAP_FAILED, .fd = open(e->file, O_RDONLY | O_CLOEXEC) };
        if (f.fd >= 0 && fstat(f.fd, &s) == 0 && s.st_size > 0) {
            f.bytes = (size_t)s.st_size;
            f.map = mmap(NULL, f.bytes, PROT_READ, MAP_SHARED, f.fd, 0);
        }
        kvf_status rc = f.map == MAP_FAILED ? kvf_env_fail(e, errno, "reading", err)
                                            : check_file(&f, mdb_txn_id(txn), mem, &current, err);
        if (f.map != MAP_FAILED) munmap(f.map, f.bytes);
        if (f.fd >= 0) close(f.fd);
        kvf_env_end(e, txn);
        KVF_TRY(rc);
    }
    if (current) return KVF_OK;
    return kvf_fail(err, KVF_ERR_BUSY, "store '%s' changes faster than it can be checked; try again", e->folder);
}

size_t kvf_env_file_bytes(const kvf_env *e)
{
    struct stat s;
    return stat(e->file, &s) == 0 ? (size_t)s.st_size : 0;
}

/* ---- Opening ------------------------------------------------------------------------------------- */

static int open_mdb(kvf_env *e, unsigned flags, size_t map_bytes)
{
    MDB_env *mdb;
    int rc = mdb_env_create(&mdb);
    if (rc) return rc;
    rc = mdb_env_set_maxdbs(mdb, KVF_DB_COUNT);
    if (!rc) rc = mdb_env_set_maxreaders(mdb, READERS);
    if (!rc) rc = mdb_env_set_mapsize(mdb, (map_bytes + MIB - 1) / MIB * MIB);
    if (!rc) rc = mdb_env_open(mdb, e->folder, flags | MDB_NOTLS | MDB_NORDAHEAD, 0666);
    if (rc) {
        mdb_env_close(mdb);
        return rc;
    }
#ifdef POSIX_FADV_RANDOM
    int fd;
    if (mdb_env_get_fd(mdb, &fd) == 0) (void)posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
#endif
    e->mdb = mdb;
    e->rdonly = (flags & MDB_RDONLY) != 0;
    e->nolock = (flags & MDB_NOLOCK) != 0;
    kvf_mapped_find(e);
    return 0;
}

/* Writable if the folder lets us, since a writing handle may come to share it. */
static kvf_status open_any(kvf_env *e, const kvf_store_params *p, kvf_error *err)
{
    size_t file = kvf_env_file_bytes(e), map = p->map_bytes ? p->map_bytes : MAP_CHOSEN;
    if (!p->map_bytes && map < 2 * file) map = 2 * file;
    int rc = open_mdb(e, 0, map);
    if (rc == ENOMEM && !p->map_bytes) rc = open_mdb(e, 0, file + MAP_LEAST);
    if ((rc == EACCES || rc == EROFS || rc == EPERM) && p->mode == KVF_STORE_READ) {
        rc = open_mdb(e, MDB_RDONLY, map);
        if (rc == EACCES || rc == EROFS || rc == EPERM || rc == ENOENT) rc = open_mdb(e, MDB_RDONLY | MDB_NOLOCK, map);
        if (rc == ENOMEM && !p->map_bytes) rc = open_mdb(e, MDB_RDONLY | MDB_NOLOCK, file + MAP_LEAST);
    }
    if (rc) return kvf_env_fail(e, rc, "opening", err);
    MDB_stat s;
    mdb_env_stat(e->mdb, &s);
    e->page = s.ms_psize;
    int dead;
    if (!e->rdonly) mdb_reader_check(e->mdb, &dead);
    return KVF_OK;
}

static char *join(const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    char *out = kvf_alloc(&kvf_mem_default, n + m + 2, 1);
    if (!out) return NULL;
    memcpy(out, a, n);
    out[n] = '/';
    memcpy(out + n + 1, b, m + 1);
    return out;
}

/* "open.lock" is held shared by every process that has the store open, so that compact knows. */
static kvf_status lock_use(kvf_env *e, kvf_error *err)
{
    char *path = join(e->folder, "open.lock");
    if (!path) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: a path; free memory");
    e->use_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (e->use_fd < 0) e->use_fd = open(path, O_RDONLY | O_CLOEXEC);
    kvf_free(&kvf_mem_default, path);
    if (e->use_fd >= 0 && flock(e->use_fd, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return kvf_fail(err, KVF_ERR_BUSY, "store '%s' is being compacted; try again when that is done", e->folder);
    return KVF_OK;
}

static void env_free(kvf_env *e)
{
    if (e->mdb) mdb_env_close(e->mdb);
    if (e->use_fd >= 0) close(e->use_fd);
    pthread_rwlock_destroy(&e->map);
    pthread_mutex_destroy(&e->tiers_lock);
    kvf_free(&kvf_mem_default, e->folder);
    kvf_free(&kvf_mem_default, e->file);
    kvf_free(&kvf_mem_default, e);
}

static kvf_status open_fresh(kvf_env *e, const kvf_store_params *p, const kvf_mem *mem, kvf_error *err)
{
    bool empty = kvf_env_file_bytes(e) == 0;
    if (!e->folder || !e->file) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: a path; free memory");
    KVF_TRY(lock_use(e, err));
    if (!empty) KVF_TRY(check_head(e, err));
    KVF_TRY(open_any(e, p, err));
    KVF_TRY(check_pages(e, mem, err));
    struct stat s;
    if (stat(e->file, &s) != 0) return kvf_env_fail(e, errno, "opening", err);
    e->dev = s.st_dev;
    e->ino = s.st_ino;
    return KVF_OK;
}

kvf_status kvf_env_open(kvf_env **out, const char *folder, const kvf_store_params *p, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    kvf_env *e = kvf_alloc(&kvf_mem_default, 1, sizeof *e);
    if (!e) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: %zu bytes; free memory", sizeof *e);
    e->n_user = 1;
    e->pid = getpid();
    e->use_fd = -1;
    e->folder = join(folder, "");
    e->file = join(folder, "data.mdb");
    pthread_rwlock_init(&e->map, NULL);
    pthread_mutex_init(&e->tiers_lock, NULL);
    pthread_mutex_lock(&list_lock);
    struct stat s;
    bool there = e->file && stat(e->file, &s) == 0;
    kvf_env *old = list;
    while (there && old && !(old->dev == s.st_dev && old->ino == s.st_ino && old->pid == e->pid)) old = old->next;
    kvf_status rc = KVF_OK;
    if (there && old) {
        old->n_user++;
        env_free(e);
        e = old;
    } else {
        rc = open_fresh(e, p, mem, err);
        if (rc >= 0) {
            e->next = list;
            list = e;
        } else {
            env_free(e);
        }
    }
    pthread_mutex_unlock(&list_lock);
    if (rc >= 0) *out = e;
    return rc;
}

void kvf_env_close(kvf_env *e)
{
    if (!e) return;
    pthread_mutex_lock(&list_lock);
    if (--e->n_user == 0) {
        kvf_env **at = &list;
        while (*at != e) at = &(*at)->next;
        *at = e->next;
        env_free(e);
    }
    pthread_mutex_unlock(&list_lock);
}

/* The map's lock is held. LMDB opens tables in one transaction at a time. */
static int open_tables(kvf_env *e, bool create)
{
    MDB_txn *txn = NULL;
    if (atomic_load(&e->has_tables)) return 0;
    if (!e->mdb) return EINVAL;
    int rc = mdb_txn_begin(e->mdb, NULL, create ? 0 : MDB_RDONLY, &txn);
    for (int i = 0; i < KVF_DB_COUNT && !rc; i++) rc = mdb_dbi_open(txn, names[i], create ? MDB_CREATE : 0, &e->db[i]);
    if (!rc) rc = mdb_txn_commit(txn);
    else if (txn) mdb_txn_abort(txn);
    if (!rc) atomic_store(&e->has_tables, true);
    return rc;
}

kvf_status kvf_env_tables(kvf_env *e, bool create, bool *there, kvf_error *err)
{
    pthread_rwlock_rdlock(&e->map);
    pthread_mutex_lock(&e->tiers_lock);
    int rc = open_tables(e, create);
    pthread_mutex_unlock(&e->tiers_lock);
    pthread_rwlock_unlock(&e->map);
    *there = rc == 0;
    if (rc == 0 || rc == MDB_NOTFOUND) return KVF_OK;
    return kvf_env_fail(e, rc, create ? "making" : "opening", err);
}

/* ---- Transactions -------------------------------------------------------------------------------- */

/* Another process has made the map larger (bytes 0), or this one must. */
static kvf_status move_map(kvf_env *e, size_t bytes, kvf_error *err)
{
    pthread_rwlock_wrlock(&e->map);
    kvf_tiers_reset(e);
    int rc = e->mdb ? mdb_env_set_mapsize(e->mdb, bytes) : 0;
    atomic_fetch_add(&e->epoch, 1);
    if (rc && e->mdb) {
        /* Nothing is mapped any more. */
        mdb_env_close(e->mdb);
        e->mdb = NULL;
    }
    kvf_mapped_find(e);
    kvf_tiers_renew(e);
    bool gone = !e->mdb;
    pthread_rwlock_unlock(&e->map);
    if (rc) return kvf_env_fail(e, rc, "enlarging", err);
    return gone ? lost(e, err) : KVF_OK;
}

kvf_status kvf_env_begin(kvf_env *e, MDB_txn **out, kvf_error *err)
{
    for (;;) {
        pthread_rwlock_rdlock(&e->map);
        int rc = e->mdb ? mdb_txn_begin(e->mdb, NULL, MDB_RDONLY, out) : EINVAL;
        if (rc == 0) return KVF_OK;
        bool gone = !e->mdb;
        pthread_rwlock_unlock(&e->map);
        if (gone) return lost(e, err);
        if (rc != MDB_MAP_RESIZED) return kvf_env_fail(e, rc, "reading", err);
        KVF_TRY(move_map(e, 0, err));
    }
}

void kvf_env_end(kvf_env *e, MDB_txn *txn)
{
    mdb_txn_abort(txn);
    pthread_rwlock_unlock(&e->map);
}

static kvf_status grow(kvf_env *e, kvf_error *err)
{
    MDB_envinfo info;
    if (!e->mdb) return lost(e, err);
    mdb_env_info(e->mdb, &info);
    size_t old = info.me_mapsize, more = old < MAP_CHOSEN ? old : MAP_CHOSEN;
    if (old > SIZE_MAX / 2) return kvf_fail(err, KVF_ERR_SPACE, "store '%s' is as large as it can be", e->folder);
    return move_map(e, (old + more + MIB - 1) / MIB * MIB, err);
}

kvf_status kvf_env_update(kvf_store *st, kvf_update_fn fn, void *arg, kvf_error *err)
{
    kvf_env *e = st->env;
    if (st->lock_fd < 0) return kvf_fail(err, KVF_ERR_STATE, "store '%s' is open for reading; open it for writing", e->folder);
    for (;;) {
        kvf_update u = { .st = st };
        pthread_rwlock_rdlock(&e->map);
        bool gone = !e->mdb;
        u.rc = gone ? EINVAL : mdb_txn_begin(e->mdb, NULL, 0, &u.txn);
        kvf_status rc = u.rc ? kvf_env_fail(e, u.rc, "writing to", err) : fn(&u, arg, err);
        if (rc >= 0) {
            u.rc = mdb_txn_commit(u.txn);
            if (u.rc) rc = kvf_env_fail(e, u.rc, "writing to", err);
        } else if (u.txn) {
            mdb_txn_abort(u.txn);
        }
        pthread_rwlock_unlock(&e->map);
        if (gone) return lost(e, err);
        if (rc >= 0 || (u.rc != MDB_MAP_FULL && u.rc != MDB_MAP_RESIZED)) return rc;
        KVF_TRY(u.rc == MDB_MAP_FULL ? grow(e, err) : move_map(e, 0, err));
    }
}

/* ---- Compaction ---------------------------------------------------------------------------------- */

static kvf_status copy_to(kvf_env *e, const char *path, kvf_error *err)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return kvf_env_fail(e, errno, "compacting", err);
    int rc = mdb_env_copyfd2(e->mdb, fd, MDB_CP_COMPACT);
    if (!rc && fsync(fd) != 0) rc = errno;
    close(fd);
    if (rc) unlink(path);
    return rc ? kvf_env_fail(e, rc, "compacting", err) : KVF_OK;
}

/* The new file in the old one's place; all under the map's lock and the exclusive use lock. */
static kvf_status swap(kvf_env *e, const char *path, kvf_error *err)
{
    KVF_TRY(copy_to(e, path, err));
    kvf_store_params p = { .mode = KVF_STORE_WRITE };
    if (rename(path, e->file) != 0) {
        int rc = errno;
        unlink(path);
        return kvf_env_fail(e, rc, "compacting", err);
    }
    int dir = open(e->folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir >= 0) {
        fsync(dir);
        close(dir);
    }
    mdb_env_close(e->mdb);
    e->mdb = NULL;
    atomic_store(&e->has_tables, false);
    KVF_TRY(open_any(e, &p, err));
    int rc = open_tables(e, false);
    return rc ? kvf_env_fail(e, rc, "compacting", err) : KVF_OK;
}

kvf_status kvf_env_compact(kvf_env *e, kvf_error *err)
{
    char *path = join(e->folder, "data.mdb.new");
    if (!path) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: a path; free memory");
    pthread_mutex_lock(&list_lock);
    pthread_rwlock_wrlock(&e->map);
    kvf_status rc = KVF_OK;
    if (!e->mdb) rc = lost(e, err);
    else if (e->use_fd < 0 || flock(e->use_fd, LOCK_EX | LOCK_NB) != 0)
        rc = kvf_fail(err, KVF_ERR_BUSY, "another process has store '%s' open; close it there, then compact", e->folder);
    else if (e->tiers) /* opened since the caller looked */
        rc = kvf_fail(err, KVF_ERR_BUSY, "a document of store '%s' is in use; close its sessions, then compact", e->folder);
    if (rc >= 0) rc = swap(e, path, err);
    if (e->use_fd >= 0) flock(e->use_fd, LOCK_SH | LOCK_NB);
    struct stat s;
    if (rc >= 0 && stat(e->file, &s) == 0) {
        e->dev = s.st_dev;
        e->ino = s.st_ino;
    }
    atomic_fetch_add(&e->epoch, 1);
    pthread_rwlock_unlock(&e->map);
    pthread_mutex_unlock(&list_lock);
    kvf_free(&kvf_mem_default, path);
    return rc;
}
