/* store_int.h - what the files of this folder share: the environment, the handle, transactions.
 *
 * LMDB forbids a process to open one file twice, so handles on the same folder share one kvf_env.
 * Locks, in the order they are taken: kvf_store.lock, env list, kvf_env.map (readers: every transaction;
 * the writing side: moving the map), kvf_env.tiers_lock, kvf_store.meta_lock.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MEMORY_STORE_INT_H
#define KVF_MEMORY_STORE_INT_H

#include <lmdb.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "memory/codec.h"
#include "memory/record.h"
#include "memory/store.h"

typedef enum kvf_db {
    KVF_DB_META, KVF_DB_DOC, KVF_DB_NOTE, KVF_DB_CHAIN, KVF_DB_TOK, KVF_DB_BLK, KVF_DB_REP, KVF_DB_TAIL, KVF_DB_COUNT
} kvf_db;

typedef struct kvf_store_tier kvf_store_tier;

/* One LMDB environment of this process. Lives in malloc's memory: it may outlive the ctx that opened it. */
typedef struct kvf_env {
    struct kvf_env *next;
    int32_t n_user;     /* guarded by the list's lock */
    pid_t pid;          /* a child of fork must not use it */
    dev_t dev;
    ino_t ino;
    char *folder, *file; /* file = folder/data.mdb */
    MDB_env *mdb;       /* NULL: lost (a failed growth or compaction) */
    uint8_t *map_at;    /* the file's map, or NULL: not known; moves under `map` held for writing */
    size_t map_bytes;
    MDB_dbi db[KVF_DB_COUNT];
    bool rdonly, nolock;
    atomic_bool has_tables;
    int use_fd;         /* flock shared while open; exclusive while compacting; -1: could not be made */
    pthread_rwlock_t map;
    pthread_mutex_t tiers_lock;
    kvf_store_tier *tiers;
    atomic_uint_fast64_t epoch;
    size_t page;
} kvf_env;

struct kvf_store {
    kvf_mem mem;
    kvf_log log;
    kvf_env *env;
    int mode, lock_fd;  /* the writer's lock; -1 when reading */
    pthread_mutex_t lock;      /* one bind at a time */
    pthread_mutex_t meta_lock; /* meta, shape_hash until has_shape; innermost */
    atomic_bool has_shape; /* once true, meta and shape_hash stay */
    atomic_bool writing;   /* a kvf_writer is open */
    kvf_meta_rec meta;
    kvf_hash shape_hash;
};

/* A write transaction under way. A failed LMDB call leaves its code in rc: MDB_MAP_FULL is tried again. */
typedef struct kvf_update {
    kvf_store *st;
    MDB_txn *txn;
    int rc;
} kvf_update;
typedef kvf_status (*kvf_update_fn)(kvf_update *u, void *arg, kvf_error *err);

/* ---- env.c ---- */
kvf_status kvf_env_open(kvf_env **out, const char *folder, const kvf_store_params *p, const kvf_mem *mem, kvf_error *err);
void kvf_env_close(kvf_env *e);
/* Opens the tables, or with create makes them. *there false: there are none. */
kvf_status kvf_env_tables(kvf_env *e, bool create, bool *there, kvf_error *err);
/* Take the map's lock, begin a read transaction. end gives back both. */
kvf_status kvf_env_begin(kvf_env *e, MDB_txn **out, kvf_error *err);
void kvf_env_end(kvf_env *e, MDB_txn *txn);
/* fn in a write transaction, committed; again from the start, with a larger map, when the map is full. */
kvf_status kvf_env_update(kvf_store *st, kvf_update_fn fn, void *arg, kvf_error *err);
/* What an LMDB or system code means for the user. */
kvf_status kvf_env_fail(const kvf_env *e, int rc, const char *doing, kvf_error *err);
/* No tier may be open. */
kvf_status kvf_env_compact(kvf_env *e, kvf_error *err);
/* Bytes of the file. */
size_t kvf_env_file_bytes(const kvf_env *e);

/* mapped.c: find the map after it was made or moved; let go of all its pages, which come back as they are used
 * (holding the map). */
void kvf_mapped_find(kvf_env *e);
void kvf_mapped_let_go(const kvf_env *e);
/* n bytes of the map at p, by a read of the file where its map is known: no page of it becomes this process's. */
kvf_status kvf_mapped_read(const kvf_env *e, const uint8_t *p, size_t n, void *dst, kvf_error *err);
/* A second map of the file, of which only some parts are there, read only. */
typedef struct kvf_windows {
    void *at;      /* NULL: none yet */
    size_t bytes;
    uint8_t *base; /* of the file */
    size_t mapped; /* bytes that are there */
    int32_t n;     /* in so many parts */
} kvf_windows;
/* n bytes of LMDB's map at p, in w: where they are until kvf_mapped_close. NULL: the file's map is not known, or the
 * system has no room. */
const uint8_t *kvf_mapped_window(const kvf_env *e, kvf_windows *w, const uint8_t *p, size_t n);
void kvf_mapped_close(kvf_windows *w); /* all of it */

/* ---- doc.c ---- */
/* *found false and KVF_OK: not there. */
kvf_status kvf_db_get(const kvf_store *st, MDB_txn *txn, kvf_db db, const kvf_key *key, MDB_val *v, bool *found, kvf_error *err);
kvf_status kvf_db_put(kvf_update *u, kvf_db db, const kvf_key *key, const void *bytes, size_t n, kvf_error *err);
/* Room for n bytes, to be filled before the next call. */
kvf_status kvf_db_room(kvf_update *u, kvf_db db, const kvf_key *key, size_t n, void **out, kvf_error *err);
kvf_status kvf_db_del(kvf_update *u, kvf_db db, const kvf_key *key, kvf_error *err);
kvf_status kvf_doc_read(const kvf_store *st, MDB_txn *txn, const kvf_key *name, kvf_doc_rec *r, bool *found, kvf_error *err);
kvf_status kvf_chain_read(const kvf_store *st, MDB_txn *txn, kvf_hash group, kvf_chain_rec *r, bool *found, kvf_error *err);
/* Names of all groups of a document, first to last; *out from the store's memory, the caller's. */
kvf_status kvf_doc_groups(const kvf_store *st, MDB_txn *txn, const kvf_doc_rec *doc, kvf_hash **out, kvf_error *err);
/* One user less of a group; without any it goes, and its parent has one less. */
kvf_status kvf_group_unref(kvf_update *u, kvf_hash group, kvf_error *err);
kvf_status kvf_group_ref(kvf_update *u, kvf_hash group, kvf_error *err);
kvf_head kvf_blocks_head(const kvf_store *st, int32_t layer, int64_t n_token);
kvf_head kvf_digests_head(const kvf_store *st, int32_t layer, int64_t n_token);
kvf_block_codec kvf_store_codec(const kvf_store *st);
static inline int64_t kvf_blocks_of(int64_t n_token) { return (n_token + 127) / 128; }
static inline bool kvf_hash_same(kvf_hash a, kvf_hash b) { return a.lo == b.lo && a.hi == b.hi; }

/* ---- store.c ---- */
/* The shape, if another process has written it since. */
kvf_status kvf_store_refresh(kvf_store *st, MDB_txn *txn, kvf_error *err);

/* ---- tier.c ---- */
struct kvf_store_tier {
    kvf_tier base; /* first: a kvf_tier * is a kvf_store_tier * */
    kvf_store *st;
    kvf_store_tier *prev, *next;
    MDB_txn *txn;     /* live but while the map moves: nothing it can see is overwritten */
    bool lost;        /* the transaction could not be renewed */
    kvf_key name;
    kvf_hash *groups; /* [n_group] */
    int64_t n_group, cap_group, cap_seen;
    uint8_t *seen;    /* [n_group * n_layer] digests verified */
    int32_t n_hold;
    void *raw;        /* [cap_raw] a block as it is stored */
    int64_t cap_raw;
    kvf_windows windows; /* digests handed out; closed before the next lookup when larger than windows_max bytes */
    size_t windows_max;
    const uint8_t **digest; /* [n_group * n_layer] where, NULL: not there */
    int64_t cap_digest;
    uint64_t own_epoch;  /* raised when they are closed */
    size_t handed;       /* bytes of digests handed out in LMDB's map, for want of a window, since it was let go of */
    int32_t n_found;     /* values looked up since then */
    MDB_val *place;   /* [n_group * n_layer] where they are, in this transaction and map; mv_data NULL: not known */
    int64_t cap_place;
    uint64_t env_epoch; /* the map's then */
};
/* An empty tier of this name; add groups to it in order. */
kvf_status kvf_tier_make(kvf_store_tier **out, kvf_store *st, const kvf_key *name, kvf_error *err);
kvf_status kvf_tier_add(kvf_store_tier *t, kvf_hash group, int64_t n_token, kvf_error *err);
/* See what has been committed since. */
kvf_status kvf_tier_renew(kvf_store_tier *t, kvf_error *err);
/* Called while the map's lock is held for writing. */
void kvf_tiers_reset(kvf_env *e);
void kvf_tiers_renew(kvf_env *e);
/* Does a tier of this environment read the document? name NULL: any. */
bool kvf_tiers_busy(kvf_env *e, const kvf_key *name);

#endif
