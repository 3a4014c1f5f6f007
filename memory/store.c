/* store.c - a handle on a store: opening, what it was made for, what is in it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "memory/store_int.h"

static const kvf_key meta_key = { .bytes = "store", .n = 5 };

static kvf_status sys_fail(kvf_error *err, const char *doing, const char *path)
{
    int e = errno;
    bool full = e == ENOSPC || e == EDQUOT || e == EFBIG;
    return kvf_fail(err, full ? KVF_ERR_SPACE : KVF_ERR_IO, "%s '%s': %s; check the path, its permissions and the disk", doing, path, strerror(e));
}

/* The writer's lock is on a file of its own: LMDB's lock file comes and goes with its readers. */
static kvf_status take_lock(kvf_store *st, const char *path, kvf_error *err)
{
    void *text;
    size_t n = strlen(path) + sizeof "/write.lock";
    KVF_TRY(kvf_mem_get(&st->mem, &text, n, 1, err));
    snprintf(text, n, "%s/write.lock", path);
    st->lock_fd = open(text, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    kvf_status rc = KVF_OK;
    if (st->lock_fd < 0) rc = sys_fail(err, "cannot write to store", path);
    else if (flock(st->lock_fd, LOCK_EX | LOCK_NB) != 0) {
        rc = errno == EWOULDBLOCK ? kvf_fail(err, KVF_ERR_BUSY, "somebody else is writing to store '%s'; wait for it, or open for reading", path)
                                  : sys_fail(err, "cannot lock store", path);
    }
    kvf_free(&st->mem, text);
    return rc;
}

static kvf_status put_meta(kvf_update *u, void *arg, kvf_error *err)
{
    uint8_t bytes[KVF_META_BYTES];
    kvf_meta_put(bytes, arg);
    return kvf_db_put(u, KVF_DB_META, &meta_key, bytes, sizeof bytes, err);
}

/* Take over what the file says, until it has a shape: then nothing changes any more. */
static void adopt(kvf_store *st, const kvf_meta_rec *m)
{
    pthread_mutex_lock(&st->meta_lock);
    if (!atomic_load(&st->has_shape)) {
        st->meta = *m;
        if (m->has_shape) {
            st->shape_hash = kvf_shape_hash(&m->shape);
            atomic_store(&st->has_shape, true);
        }
    }
    pthread_mutex_unlock(&st->meta_lock);
}

static kvf_status read_meta(kvf_store *st, MDB_txn *txn, bool *found, kvf_error *err)
{
    MDB_val v;
    kvf_meta_rec m;
    KVF_TRY(kvf_db_get(st, txn, KVF_DB_META, &meta_key, &v, found, err));
    if (!*found) return KVF_OK;
    KVF_TRY(kvf_meta_get(&m, v.mv_data, v.mv_size, err));
    adopt(st, &m);
    return KVF_OK;
}

kvf_status kvf_store_refresh(kvf_store *st, MDB_txn *txn, kvf_error *err)
{
    bool found;
    if (atomic_load(&st->has_shape)) return KVF_OK;
    return read_meta(st, txn, &found, err);
}

static kvf_status open_parts(kvf_store *st, const char *path, const kvf_store_params *p, kvf_error *err)
{
    struct stat s;
    bool create = p->mode == KVF_STORE_CREATE;
    if (create && mkdir(path, 0777) != 0 && errno != EEXIST) return sys_fail(err, "cannot make store", path);
    char file[4096];
    int n = snprintf(file, sizeof file, "%s/data.mdb", path);
    if (n < 0 || (size_t)n >= sizeof file) return kvf_fail(err, KVF_ERR_ARG, "the path of the store is too long; use a shorter one");
    bool there = stat(file, &s) == 0;
    if (!there && errno != ENOENT && errno != ENOTDIR) return sys_fail(err, "cannot open store", path);
    if (there && !S_ISREG(s.st_mode)) return kvf_fail(err, KVF_ERR_FORMAT, "'%s' is not a file; name another folder", file);
    if ((!there || s.st_size == 0) && !create)
        return kvf_fail(err, KVF_ERR_NOT_FOUND, "there is no store in '%s'; check the path, or read a document into it first", path);
    if (p->mode != KVF_STORE_READ) KVF_TRY(take_lock(st, path, err));
    if (st->lock_fd >= 0) {
        /* What a compaction left that was killed; nobody else can be at one now. */
        n = snprintf(file, sizeof file, "%s/data.mdb.new", path);
        if (n > 0 && (size_t)n < sizeof file) unlink(file);
    }
    KVF_TRY(kvf_env_open(&st->env, path, p, &st->mem, err));
    if (st->lock_fd >= 0 && st->env->rdonly)
        return kvf_fail(err, KVF_ERR_STATE, "store '%s' is open in this process without permission to write; close it, then open it for writing", path);
    bool tables, found = false;
    KVF_TRY(kvf_env_tables(st->env, false, &tables, err));
    MDB_txn *txn;
    if (tables) {
        KVF_TRY(kvf_env_begin(st->env, &txn, err));
        kvf_status rc = read_meta(st, txn, &found, err);
        kvf_env_end(st->env, txn);
        KVF_TRY(rc);
    }
    if (found) return KVF_OK;
    if (!create) return kvf_fail(err, KVF_ERR_NOT_FOUND, "the store in '%s' was never finished being made; read a document into it", path);
    KVF_TRY(kvf_env_tables(st->env, true, &tables, err));
    kvf_meta_rec m = { .version = KVF_STORE_VERSION, .codec = (uint32_t)p->codec, .created = (int64_t)time(NULL) };
    KVF_TRY(kvf_env_update(st, put_meta, &m, err));
    adopt(st, &m);
    return KVF_OK;
}

kvf_status kvf_store_open_at(kvf_store **out, const kvf_mem *mem, const kvf_log *log, const char *path,
                             const kvf_store_params *params, kvf_error *err)
{
    void *block;
    *out = NULL;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_store), err));
    kvf_store *st = block;
    st->mem = *mem;
    if (log) st->log = *log;
    st->mode = params->mode;
    st->lock_fd = -1;
    pthread_mutex_init(&st->lock, NULL);
    pthread_mutex_init(&st->meta_lock, NULL);
    kvf_status rc = open_parts(st, path, params, err);
    if (rc < 0) kvf_store_close_at(st);
    else *out = st;
    return rc;
}

void kvf_store_close_at(kvf_store *st)
{
    if (!st) return;
    kvf_env_close(st->env);
    if (st->lock_fd >= 0) close(st->lock_fd);
    pthread_mutex_destroy(&st->meta_lock);
    pthread_mutex_destroy(&st->lock);
    kvf_mem mem = st->mem;
    kvf_free(&mem, st);
}

/* ---- What it is for ------------------------------------------------------------------------------ */

const kvf_store_shape *kvf_store_get_shape(const kvf_store *st)
{
    return atomic_load(&st->has_shape) ? &st->meta.shape : NULL;
}

static kvf_status compare(const kvf_store *st, const kvf_store_shape *want, kvf_error *err)
{
    const kvf_store_shape *have = &st->meta.shape;
    if (have->model[0] != want->model[0] || have->model[1] != want->model[1])
        return kvf_fail(err, KVF_ERR_MISMATCH, "store '%s' was made with model '%s', not with '%s'; use that model, or another store", st->env->folder,
                        have->model_name, want->model_name);
    if (strcmp(have->policy, want->policy) != 0)
        return kvf_fail(err, KVF_ERR_MISMATCH, "store '%s' was made with policy '%s', not with '%s'; use that policy, or another store",
                        st->env->folder, have->policy, want->policy);
    if (have->n_layer != want->n_layer || have->n_head_kv != want->n_head_kv || have->head_dim != want->head_dim ||
        have->slot_bytes != want->slot_bytes || have->digest_bytes != want->digest_bytes)
        return kvf_fail(err, KVF_ERR_MISMATCH,
                        "store '%s' was made for %d layers x %d KV heads x %d with %lld bytes of digests a block, not for %d x %d x %d with %lld; use another store",
                        st->env->folder, have->n_layer, have->n_head_kv, have->head_dim, (long long)have->digest_bytes, want->n_layer,
                        want->n_head_kv, want->head_dim, (long long)want->digest_bytes);
    return KVF_OK;
}

static kvf_status bind_locked(kvf_store *st, const kvf_store_shape *shape, kvf_error *err)
{
    if (atomic_load(&st->has_shape)) return compare(st, shape, err);
    MDB_txn *txn;
    bool found;
    KVF_TRY(kvf_env_begin(st->env, &txn, err));
    kvf_status rc = read_meta(st, txn, &found, err);
    kvf_env_end(st->env, txn);
    KVF_TRY(rc);
    if (atomic_load(&st->has_shape)) return compare(st, shape, err);
    if (st->lock_fd < 0) return kvf_fail(err, KVF_ERR_STATE, "store '%s' is empty and open for reading; read a document into it first", st->env->folder);
    pthread_mutex_lock(&st->meta_lock);
    kvf_meta_rec m = st->meta;
    pthread_mutex_unlock(&st->meta_lock);
    m.has_shape = true;
    m.shape = *shape;
    KVF_TRY(kvf_env_update(st, put_meta, &m, err));
    adopt(st, &m);
    return KVF_OK;
}

kvf_status kvf_store_bind(kvf_store *st, const kvf_store_shape *shape, kvf_error *err)
{
    const char *wrong = kvf_shape_wrong(shape);
    if (wrong) return kvf_fail(err, KVF_ERR_UNSUPPORTED, "a store cannot hold this model: %s", wrong);
    pthread_mutex_lock(&st->lock);
    kvf_status rc = bind_locked(st, shape, err);
    pthread_mutex_unlock(&st->lock);
    return rc;
}

/* ---- What is in it ----------------------------------------------------------------------------------- */

static kvf_status count(kvf_store *st, MDB_txn *txn, kvf_db db, kvf_store_info *info, kvf_error *err)
{
    MDB_cursor *c;
    MDB_val k, v;
    int rc = mdb_cursor_open(txn, st->env->db[db], &c);
    if (rc) return kvf_env_fail(st->env, rc, "reading", err);
    kvf_status status = KVF_OK;
    while (status >= 0 && (rc = mdb_cursor_get(c, &k, &v, MDB_NEXT)) == 0) {
        if (db == KVF_DB_DOC) {
            kvf_doc_rec r;
            kvf_key key = { .n = k.mv_size };
            if (k.mv_size <= sizeof key.bytes) memcpy(key.bytes, k.mv_data, k.mv_size);
            else key.n = 0;
            status = kvf_doc_get(&r, v.mv_data, v.mv_size, &key, err);
            info->n_documents++;
            info->n_unfinished += status >= 0 && !r.complete;
        } else {
            kvf_chain_rec r;
            status = kvf_chain_get(&r, v.mv_data, v.mv_size, k.mv_size == 16 ? kvf_key_get_hash(k.mv_data) : (kvf_hash){ 0, 0 }, err);
            info->n_tokens += status >= 0 ? r.n_token : 0;
            info->n_blocks += status >= 0 ? kvf_blocks_of(r.n_token) * st->meta.shape.n_layer : 0;
        }
    }
    mdb_cursor_close(c);
    if (status >= 0 && rc != MDB_NOTFOUND) return kvf_env_fail(st->env, rc, "reading", err);
    return status;
}

/* Pages on the list of free ones. LMDB's table 0 is that list: numbers, their count first. */
static size_t free_bytes(const kvf_env *e, MDB_txn *txn)
{
    MDB_cursor *c;
    MDB_val k, v;
    size_t n = 0;
    if (mdb_cursor_open(txn, 0, &c)) return 0;
    while (mdb_cursor_get(c, &k, &v, MDB_NEXT) == 0) {
        size_t pages = 0;
        if (v.mv_size >= sizeof pages) memcpy(&pages, v.mv_data, sizeof pages);
        n += pages;
    }
    mdb_cursor_close(c);
    return n * e->page;
}

kvf_status kvf_store_info_get(kvf_store *st, kvf_store_info *info, kvf_error *err)
{
    MDB_txn *txn;
    memset(info, 0, sizeof *info);
    info->size = sizeof *info;
    KVF_TRY(kvf_env_begin(st->env, &txn, err));
    kvf_status rc = kvf_store_refresh(st, txn, err);
    if (rc >= 0) rc = count(st, txn, KVF_DB_DOC, info, err);
    if (rc >= 0) rc = count(st, txn, KVF_DB_CHAIN, info, err);
    info->free_bytes = free_bytes(st->env, txn);
    info->file_bytes = kvf_env_file_bytes(st->env);
    kvf_env_end(st->env, txn);
    KVF_TRY(rc);
    const kvf_store_shape *s = kvf_store_get_shape(st);
    info->version = (int32_t)st->meta.version;
    info->codec = (int32_t)st->meta.codec;
    info->model = s ? s->model_name : "";
    info->policy = s ? s->policy : "";
    if (!s) return KVF_OK;
    kvf_block_codec codec = kvf_store_codec(st);
    info->fingerprint[0] = s->model[0];
    info->fingerprint[1] = s->model[1];
    info->n_layer = s->n_layer;
    info->n_head_kv = s->n_head_kv;
    info->head_dim = s->head_dim;
    info->kv_bytes = (size_t)info->n_blocks * kvf_codec_bytes(&codec);
    info->index_bytes = (size_t)info->n_blocks * (size_t)s->digest_bytes;
    return KVF_OK;
}

kvf_status kvf_store_rewrite(kvf_store *st, kvf_error *err)
{
    if (st->lock_fd < 0) return kvf_fail(err, KVF_ERR_STATE, "store '%s' is open for reading; open it for writing", st->env->folder);
    if (atomic_load(&st->writing) || kvf_tiers_busy(st->env, NULL))
        return kvf_fail(err, KVF_ERR_BUSY, "a session uses store '%s'; close it, then compact", st->env->folder);
    return kvf_env_compact(st->env, err);
}
