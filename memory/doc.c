/* doc.c - documents as chains of groups, and who names a group.
 *
 * refs of a group = documents that end with it + groups that follow it. A document is removed from its end:
 * its last group loses one, at zero it goes and takes one from its parent, and so on to the first group that
 * somebody else needs.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L /* read-write locks */
#include <string.h>

#include "memory/store_int.h"

/* ---- Tables ---------------------------------------------------------------------------------- */

static MDB_val val(const void *bytes, size_t n)
{
    MDB_val v = { .mv_size = n };
    v.mv_data = (void *)(uintptr_t)bytes; /* LMDB does not write to what it is given */
    return v;
}

kvf_status kvf_db_get(const kvf_store *st, MDB_txn *txn, kvf_db db, const kvf_key *key, MDB_val *v, bool *found, kvf_error *err)
{
    MDB_val k = val(key->bytes, key->n);
    *found = false;
    if (!atomic_load(&st->env->has_tables)) return KVF_OK;
    int rc = mdb_get(txn, st->env->db[db], &k, v);
    *found = rc == 0;
    return rc == 0 || rc == MDB_NOTFOUND ? KVF_OK : kvf_env_fail(st->env, rc, "reading", err);
}

kvf_status kvf_db_room(kvf_update *u, kvf_db db, const kvf_key *key, size_t n, void **out, kvf_error *err)
{
    MDB_val k = val(key->bytes, key->n), v = { .mv_size = n };
    u->rc = mdb_put(u->txn, u->st->env->db[db], &k, &v, MDB_RESERVE);
    *out = v.mv_data;
    return u->rc ? kvf_env_fail(u->st->env, u->rc, "writing to", err) : KVF_OK;
}

kvf_status kvf_db_put(kvf_update *u, kvf_db db, const kvf_key *key, const void *bytes, size_t n, kvf_error *err)
{
    void *out;
    KVF_TRY(kvf_db_room(u, db, key, n, &out, err));
    memcpy(out, bytes, n);
    return KVF_OK;
}

kvf_status kvf_db_del(kvf_update *u, kvf_db db, const kvf_key *key, kvf_error *err)
{
    MDB_val k = val(key->bytes, key->n);
    int rc = mdb_del(u->txn, u->st->env->db[db], &k, NULL);
    if (rc == 0 || rc == MDB_NOTFOUND) return KVF_OK;
    u->rc = rc;
    return kvf_env_fail(u->st->env, rc, "writing to", err);
}

/* ---- Records --------------------------------------------------------------------------------- */

kvf_status kvf_doc_read(const kvf_store *st, MDB_txn *txn, const kvf_key *name, kvf_doc_rec *r, bool *found, kvf_error *err)
{
    MDB_val v;
    KVF_TRY(kvf_db_get(st, txn, KVF_DB_DOC, name, &v, found, err));
    return *found ? kvf_doc_get(r, v.mv_data, v.mv_size, name, err) : KVF_OK;
}

kvf_status kvf_chain_read(const kvf_store *st, MDB_txn *txn, kvf_hash group, kvf_chain_rec *r, bool *found, kvf_error *err)
{
    MDB_val v;
    kvf_key key;
    kvf_key_hash(&key, group);
    KVF_TRY(kvf_db_get(st, txn, KVF_DB_CHAIN, &key, &v, found, err));
    return *found ? kvf_chain_get(r, v.mv_data, v.mv_size, group, err) : KVF_OK;
}

static kvf_status broken(const kvf_store *st, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_FORMAT, "store '%s' is damaged: a chain of groups is broken; check it with --verify, remove the document and read it again",
                    st->env->folder);
}

/* Depth falls by one at each step, so a chain cannot turn in a circle. */
static kvf_status walk_chain(const kvf_store *st, MDB_txn *txn, const kvf_doc_rec *doc, kvf_hash *out, kvf_error *err)
{
    kvf_hash at = doc->last;
    int64_t rest = doc->n_token - (doc->n_group - 1) * KVF_GROUP_TOKENS;
    for (int64_t g = doc->n_group - 1; g >= 0; g--) {
        kvf_chain_rec c;
        bool found;
        KVF_TRY(kvf_chain_read(st, txn, at, &c, &found, err));
        if (!found || c.depth != g || c.n_token != rest) return broken(st, err);
        if (out) out[g] = at;
        rest = KVF_GROUP_TOKENS;
        at = c.parent;
    }
    return KVF_OK;
}

kvf_status kvf_doc_groups(const kvf_store *st, MDB_txn *txn, const kvf_doc_rec *doc, kvf_hash **out, kvf_error *err)
{
    void *list;
    *out = NULL;
    /* A made-up length must not ask for memory before its groups were seen. */
    KVF_TRY(walk_chain(st, txn, doc, NULL, err));
    KVF_TRY(kvf_mem_get(&st->mem, &list, (size_t)doc->n_group, sizeof **out, err));
    *out = list;
    return walk_chain(st, txn, doc, *out, err);
}

kvf_head kvf_blocks_head(const kvf_store *st, int32_t layer, int64_t n_token)
{
    kvf_block_codec c = kvf_store_codec(st);
    return (kvf_head){ .kind = KVF_VALUE_BLOCKS, .codec = c.codec, .layer = (uint32_t)layer, .n_token = (uint32_t)n_token,
                       .n_item = (uint32_t)kvf_blocks_of(n_token), .item_bytes = kvf_codec_bytes(&c) };
}

kvf_head kvf_digests_head(const kvf_store *st, int32_t layer, int64_t n_token)
{
    return (kvf_head){ .kind = KVF_VALUE_DIGESTS, .layer = (uint32_t)layer, .n_token = (uint32_t)n_token,
                       .n_item = (uint32_t)kvf_blocks_of(n_token), .item_bytes = (uint64_t)st->meta.shape.digest_bytes };
}

kvf_block_codec kvf_store_codec(const kvf_store *st)
{
    return (kvf_block_codec){ st->meta.codec, st->meta.shape.n_head_kv, st->meta.shape.head_dim };
}

/* ---- References ------------------------------------------------------------------------------ */

static kvf_status put_refs(kvf_update *u, kvf_hash group, const kvf_chain_rec *c, kvf_error *err)
{
    uint8_t bytes[KVF_CHAIN_BYTES];
    kvf_key key;
    kvf_key_hash(&key, group);
    kvf_chain_put(bytes, c, group);
    return kvf_db_put(u, KVF_DB_CHAIN, &key, bytes, sizeof bytes, err);
}

kvf_status kvf_group_ref(kvf_update *u, kvf_hash group, kvf_error *err)
{
    kvf_chain_rec c;
    bool found;
    KVF_TRY(kvf_chain_read(u->st, u->txn, group, &c, &found, err));
    if (!found) return broken(u->st, err);
    c.refs++;
    return put_refs(u, group, &c, err);
}

static kvf_status delete_group(kvf_update *u, kvf_hash group, kvf_error *err)
{
    kvf_key key;
    kvf_key_hash(&key, group);
    KVF_TRY(kvf_db_del(u, KVF_DB_CHAIN, &key, err));
    KVF_TRY(kvf_db_del(u, KVF_DB_TOK, &key, err));
    KVF_TRY(kvf_db_del(u, KVF_DB_TAIL, &key, err));
    for (int32_t layer = 0; layer < u->st->meta.shape.n_layer; layer++) {
        kvf_key_layer(&key, group, layer);
        KVF_TRY(kvf_db_del(u, KVF_DB_BLK, &key, err));
        KVF_TRY(kvf_db_del(u, KVF_DB_REP, &key, err));
    }
    return KVF_OK;
}

kvf_status kvf_group_unref(kvf_update *u, kvf_hash group, kvf_error *err)
{
    for (int64_t depth = -1;;) {
        kvf_chain_rec c;
        bool found;
        KVF_TRY(kvf_chain_read(u->st, u->txn, group, &c, &found, err));
        if (!found || (depth >= 0 && c.depth != depth - 1)) return broken(u->st, err);
        if (c.refs > 1) {
            c.refs--;
            return put_refs(u, group, &c, err);
        }
        KVF_TRY(delete_group(u, group, err));
        if (c.depth == 0) return KVF_OK;
        group = c.parent;
        depth = c.depth;
    }
}

/* ---- Removing, listing -------------------------------------------------------------------------- */

/* A document whose record or chain is damaged must still be removable: then only its name goes, and its
 * groups stay behind (verify counts them). */
static kvf_status remove_doc(kvf_update *u, void *arg, kvf_error *err)
{
    const kvf_key *key = arg;
    kvf_doc_rec doc;
    bool found;
    KVF_TRY(kvf_doc_read(u->st, u->txn, key, &doc, &found, err));
    if (!found) return kvf_fail(err, KVF_ERR_NOT_FOUND, "store '%s' has no document '%.*s'", u->st->env->folder, (int)key->n, (const char *)key->bytes);
    KVF_TRY(kvf_db_del(u, KVF_DB_NOTE, key, err));
    KVF_TRY(kvf_db_del(u, KVF_DB_DOC, key, err));
    return kvf_group_unref(u, doc.last, err);
}

static kvf_status remove_name(kvf_update *u, void *arg, kvf_error *err)
{
    KVF_TRY(kvf_db_del(u, KVF_DB_NOTE, arg, err));
    return kvf_db_del(u, KVF_DB_DOC, arg, err);
}

kvf_status kvf_store_doc_remove(kvf_store *st, const char *name, kvf_error *err)
{
    kvf_key key;
    KVF_TRY(kvf_key_name(&key, name, err));
    if (st->lock_fd < 0) return kvf_fail(err, KVF_ERR_STATE, "store '%s' is open for reading; open it for writing", st->env->folder);
    if (kvf_tiers_busy(st->env, &key))
        return kvf_fail(err, KVF_ERR_BUSY, "document '%s' is being read or written; close its sessions first", name);
    kvf_status rc = kvf_env_update(st, remove_doc, &key, err);
    if (rc != KVF_ERR_FORMAT) return rc;
    kvf_log_write(&st->log, KVF_LOG_WARN, "document '%s' is damaged: its name is removed, groups may stay behind", name);
    return kvf_env_update(st, remove_name, &key, err);
}

/* Bytes of keys and values of the groups that only this document has. */
static kvf_status own_bytes(const kvf_store *st, MDB_txn *txn, const kvf_doc_rec *doc, size_t *out, kvf_error *err)
{
    kvf_block_codec codec = kvf_store_codec(st);
    size_t item = kvf_codec_bytes(&codec) * (size_t)st->meta.shape.n_layer;
    kvf_hash at = doc->last;
    *out = 0;
    for (int64_t g = doc->n_group - 1; g >= 0; g--) {
        kvf_chain_rec c;
        bool found;
        KVF_TRY(kvf_chain_read(st, txn, at, &c, &found, err));
        if (!found || c.depth != g) return broken(st, err);
        if (c.refs > 1) break;
        *out += item * (size_t)kvf_blocks_of(c.n_token);
        at = c.parent;
    }
    return KVF_OK;
}

static kvf_status read_note(const kvf_store *st, MDB_txn *txn, const kvf_key *key, const kvf_doc_rec *r, kvf_document *doc, kvf_error *err)
{
    MDB_val v;
    bool found;
    void *copy;
    if (r->note_bytes == 0) return KVF_OK;
    KVF_TRY(kvf_db_get(st, txn, KVF_DB_NOTE, key, &v, &found, err));
    if (!found) return broken(st, err);
    kvf_head h = { .kind = KVF_VALUE_NOTE, .n_item = 1, .item_bytes = r->note_bytes };
    KVF_TRY(kvf_head_check(v.mv_data, v.mv_size, &h, key, true, err));
    KVF_TRY(kvf_mem_get(&st->mem, &copy, r->note_bytes, 1, err));
    memcpy(copy, (const uint8_t *)v.mv_data + KVF_HEAD_BYTES, r->note_bytes);
    doc->note = copy;
    doc->note_bytes = r->note_bytes;
    return KVF_OK;
}

static kvf_status describe(const kvf_store *st, MDB_txn *txn, const kvf_key *key, kvf_document *doc, kvf_error *err)
{
    kvf_doc_rec r;
    bool found;
    void *copy;
    KVF_TRY(kvf_doc_read(st, txn, key, &r, &found, err));
    if (!found) return kvf_fail(err, KVF_ERR_NOT_FOUND, "store '%s' has no document '%.*s'", st->env->folder, (int)key->n, (const char *)key->bytes);
    KVF_TRY(own_bytes(st, txn, &r, &doc->kv_bytes, err));
    KVF_TRY(kvf_mem_get(&st->mem, &copy, key->n + 1, 1, err));
    memcpy(copy, key->bytes, key->n);
    doc->name = copy;
    doc->n_tokens = r.n_token;
    doc->created = r.created;
    doc->complete = r.complete;
    return read_note(st, txn, key, &r, doc, err);
}

static kvf_status nth_name(const kvf_store *st, MDB_txn *txn, int64_t i, kvf_key *key, kvf_error *err)
{
    MDB_cursor *c;
    MDB_val k, v;
    int rc = atomic_load(&st->env->has_tables) ? mdb_cursor_open(txn, st->env->db[KVF_DB_DOC], &c) : MDB_NOTFOUND;
    if (!rc) {
        rc = mdb_cursor_get(c, &k, &v, MDB_FIRST);
        for (int64_t at = 0; at < i && !rc; at++) rc = mdb_cursor_get(c, &k, &v, MDB_NEXT);
        mdb_cursor_close(c);
    }
    if (rc == MDB_NOTFOUND) return kvf_fail(err, KVF_ERR_NOT_FOUND, "store '%s' has no document %lld", st->env->folder, (long long)i);
    if (rc) return kvf_env_fail(st->env, rc, "reading", err);
    if (k.mv_size > sizeof key->bytes) return broken(st, err);
    memcpy(key->bytes, k.mv_data, k.mv_size);
    key->n = k.mv_size;
    return KVF_OK;
}

kvf_status kvf_store_doc_get(kvf_store *st, const char *name, int64_t i, kvf_document *doc, kvf_error *err)
{
    kvf_key key;
    MDB_txn *txn;
    memset(doc, 0, sizeof *doc);
    doc->size = sizeof *doc;
    if (name) KVF_TRY(kvf_key_name(&key, name, err));
    KVF_TRY(kvf_env_begin(st->env, &txn, err));
    kvf_status rc = kvf_store_refresh(st, txn, err);
    if (rc >= 0 && !name) rc = nth_name(st, txn, i, &key, err);
    if (rc >= 0) rc = describe(st, txn, &key, doc, err);
    kvf_env_end(st->env, txn);
    if (rc < 0) kvf_store_doc_free(st, doc);
    return rc;
}

void kvf_store_doc_free(kvf_store *st, kvf_document *doc)
{
    kvf_free(&st->mem, (void *)(uintptr_t)doc->name);
    kvf_free(&st->mem, (void *)(uintptr_t)doc->note);
    doc->name = NULL;
    doc->note = NULL;
    doc->note_bytes = 0;
}
