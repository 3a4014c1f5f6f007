/* verify.c - read everything and check it.
 *
 * Every value of every table is either what a group or a document must have, or it is bad: a crash leaves
 * whole groups, so there is nothing that may lie about without an owner. Order: groups first, with the count
 * of who names each, then documents, then what hangs on groups.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L /* read-write locks */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "memory/store_int.h"

typedef struct group_seen {
    kvf_hash name;
    kvf_chain_rec rec;
    uint64_t refs; /* found */
} group_seen;

typedef struct check {
    kvf_store *st;
    MDB_txn *txn;
    kvf_verify *v;
    group_seen *groups; /* [n], in the order of their keys */
    int64_t n, cap, n_done, at;
} check;

typedef kvf_status (*check_fn)(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err);

static void bad(check *c, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void bad(check *c, const char *format, ...)
{
    if (c->v->n_bad++) return;
    va_list ap;
    va_start(ap, format);
    vsnprintf(c->v->first_bad, sizeof c->v->first_bad, format, ap);
    va_end(ap);
}

static void hex(char out[33], kvf_hash h)
{
    snprintf(out, 33, "%016llx%016llx", (unsigned long long)h.hi, (unsigned long long)h.lo);
}

static kvf_status each(check *c, kvf_db db, check_fn fn, kvf_error *err)
{
    MDB_cursor *cursor;
    MDB_val k, v;
    int rc = mdb_cursor_open(c->txn, c->st->env->db[db], &cursor);
    if (rc) return kvf_env_fail(c->st->env, rc, "checking", err);
    kvf_status status = KVF_OK;
    while (status >= 0 && (rc = mdb_cursor_get(cursor, &k, &v, MDB_NEXT)) == 0) {
        c->v->n_checked++;
        status = fn(c, &k, &v, err);
    }
    mdb_cursor_close(cursor);
    if (status >= 0 && rc != MDB_NOTFOUND) return kvf_env_fail(c->st->env, rc, "checking", err);
    return status;
}

static int order(kvf_hash a, kvf_hash b)
{
    if (a.hi != b.hi) return a.hi < b.hi ? -1 : 1;
    return (a.lo > b.lo) - (a.lo < b.lo);
}

static group_seen *find(const check *c, kvf_hash name)
{
    int64_t lo = 0, hi = c->n;
    while (lo < hi) {
        int64_t mid = lo + (hi - lo) / 2;
        int o = order(c->groups[mid].name, name);
        if (o == 0) return &c->groups[mid];
        if (o < 0) lo = mid + 1;
        else hi = mid;
    }
    return NULL;
}

/* ---- Tables ------------------------------------------------------------------------------------- */

static kvf_status check_meta(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err)
{
    kvf_meta_rec m;
    (void)err;
    if (k->mv_size != 5 || memcmp(k->mv_data, "store", 5) != 0 || kvf_meta_get(&m, v->mv_data, v->mv_size, NULL) < 0)
        bad(c, "the head of the store");
    return KVF_OK;
}

static kvf_status check_chain(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err)
{
    void *groups = c->groups;
    group_seen g = { .name = { 0, 0 } };
    if (k->mv_size != 16) {
        bad(c, "a key of %zu bytes among the groups", k->mv_size);
        return KVF_OK;
    }
    g.name = kvf_key_get_hash(k->mv_data);
    if (kvf_chain_get(&g.rec, v->mv_data, v->mv_size, g.name, NULL) < 0) {
        char name[33];
        hex(name, g.name);
        bad(c, "the record of group %s", name);
        return KVF_OK;
    }
    kvf_status rc = kvf_reserve(&c->st->mem, &groups, &c->cap, c->n + 1, sizeof *c->groups, err);
    c->groups = groups;
    KVF_TRY(rc);
    c->groups[c->n++] = g;
    return KVF_OK;
}

static void check_parents(check *c)
{
    for (int64_t i = 0; i < c->n; i++) {
        const kvf_chain_rec *r = &c->groups[i].rec;
        group_seen *parent = r->depth ? find(c, r->parent) : NULL;
        if (parent) parent->refs++;
        if (r->depth && (!parent || parent->rec.depth != r->depth - 1 || parent->rec.n_token != KVF_GROUP_TOKENS))
            bad(c, "a group at token %lld has no group before it", (long long)(r->depth * KVF_GROUP_TOKENS));
    }
}

static kvf_status check_doc(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err)
{
    kvf_doc_rec r;
    kvf_key key = { .n = k->mv_size };
    (void)err;
    if (k->mv_size <= sizeof key.bytes) memcpy(key.bytes, k->mv_data, k->mv_size);
    else key.n = 0;
    if (kvf_doc_get(&r, v->mv_data, v->mv_size, &key, NULL) < 0) {
        bad(c, "the record of document '%.*s'", (int)key.n, (const char *)key.bytes);
        return KVF_OK;
    }
    group_seen *last = find(c, r.last);
    if (last) last->refs++;
    if (!last || last->rec.depth != r.n_group - 1 || last->rec.n_token != r.n_token - last->rec.depth * KVF_GROUP_TOKENS)
        bad(c, "document '%.*s' ends with a group that is not there", (int)key.n, (const char *)key.bytes);
    if (r.note_bytes) {
        MDB_val note;
        bool found;
        kvf_head h = { .kind = KVF_VALUE_NOTE, .n_item = 1, .item_bytes = r.note_bytes };
        if (kvf_db_get(c->st, c->txn, KVF_DB_NOTE, &key, &note, &found, NULL) < 0 || !found ||
            kvf_head_check(note.mv_data, note.mv_size, &h, &key, true, NULL) < 0)
            bad(c, "the note of document '%.*s'", (int)key.n, (const char *)key.bytes);
    }
    return KVF_OK;
}

static kvf_status check_note(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err)
{
    kvf_doc_rec r;
    bool found = false;
    kvf_key key = { .n = k->mv_size };
    (void)v;
    (void)err;
    if (k->mv_size <= sizeof key.bytes) {
        memcpy(key.bytes, k->mv_data, k->mv_size);
        if (kvf_doc_read(c->st, c->txn, &key, &r, &found, NULL) < 0) return KVF_OK; /* counted with the document */
    }
    if (!found || r.note_bytes == 0) bad(c, "a note that belongs to no document");
    return KVF_OK;
}

static kvf_status check_tok(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err)
{
    const group_seen *g = k->mv_size == 16 ? find(c, kvf_key_get_hash(k->mv_data)) : NULL;
    if (!g || v->mv_size != (size_t)g->rec.n_token * sizeof(kvf_token)) {
        bad(c, "tokens that belong to no group");
        return KVF_OK;
    }
    /* A small value lies in the file at any even address. */
    void *copy;
    KVF_TRY(kvf_mem_get(&c->st->mem, &copy, v->mv_size, 1, err));
    memcpy(copy, v->mv_data, v->mv_size);
    kvf_hash name = kvf_group_name(g->rec.parent, c->st->shape_hash, copy, g->rec.n_token);
    kvf_free(&c->st->mem, copy);
    if (!kvf_hash_same(name, g->name)) bad(c, "the tokens from %lld of a document", (long long)(g->rec.depth * KVF_GROUP_TOKENS));
    return KVF_OK;
}

static kvf_status check_tail(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err)
{
    kvf_head h = { .kind = KVF_VALUE_TAIL, .n_item = 1 };
    kvf_key key;
    (void)err;
    const group_seen *g = k->mv_size == 16 ? find(c, kvf_key_get_hash(k->mv_data)) : NULL;
    if (g) kvf_key_hash(&key, g->name);
    if (!g || kvf_head_check(v->mv_data, v->mv_size, &h, &key, true, NULL) < 0) bad(c, "the state at the end of a document");
    return KVF_OK;
}

/* Group and layer of a key; NULL: nobody's. */
static const group_seen *owner(const check *c, const MDB_val *k, kvf_key *key, int32_t *layer)
{
    if (k->mv_size != 18) return NULL;
    const uint8_t *p = k->mv_data;
    *layer = p[16] << 8 | p[17];
    if (*layer >= c->st->meta.shape.n_layer) return NULL;
    const group_seen *g = find(c, kvf_key_get_hash(p));
    if (g) kvf_key_layer(key, g->name, *layer);
    return g;
}

static kvf_status progress(check *c, int32_t layer, kvf_error *err)
{
    if (layer != c->st->meta.shape.n_layer - 1) return KVF_OK;
    c->n_done++;
    if (c->v->progress && c->v->progress(c->v->user, c->n_done < c->n ? c->n_done : c->n, c->n))
        return kvf_fail(err, KVF_ERR_CANCELLED, "checking store '%s' was cancelled", c->st->env->folder);
    return KVF_OK;
}

static kvf_status check_blk(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err)
{
    kvf_key key;
    int32_t layer = 0;
    const group_seen *g = owner(c, k, &key, &layer);
    if (!g) {
        bad(c, "blocks that belong to no group");
        return KVF_OK;
    }
    kvf_head h = kvf_blocks_head(c->st, layer, g->rec.n_token);
    int64_t first = g->rec.depth * KVF_GROUP_TOKENS;
    if (kvf_head_check(v->mv_data, v->mv_size, &h, &key, true, NULL) < 0) {
        bad(c, "the blocks of layer %d from token %lld", layer, (long long)first);
    } else {
        for (int64_t i = 0; i < h.n_item; i++) {
            const uint8_t *p = (const uint8_t *)v->mv_data + kvf_value_at(&h, i);
            if (!kvf_hash_same(kvf_hash_bytes(p, h.item_bytes, (kvf_hash){ 0, 0 }), kvf_sum_get(v->mv_data, i)))
                bad(c, "the block of layer %d at token %lld", layer, (long long)(first + i * 128));
        }
    }
    return progress(c, layer, err);
}

static kvf_status check_rep(check *c, const MDB_val *k, const MDB_val *v, kvf_error *err)
{
    kvf_key key;
    int32_t layer = 0;
    (void)err;
    const group_seen *g = c->st->meta.shape.digest_bytes ? owner(c, k, &key, &layer) : NULL;
    if (!g) {
        bad(c, "digests that belong to no group");
        return KVF_OK;
    }
    kvf_head h = kvf_digests_head(c->st, layer, g->rec.n_token);
    if (kvf_head_check(v->mv_data, v->mv_size, &h, &key, true, NULL) < 0)
        bad(c, "the digests of layer %d from token %lld", layer, (long long)(g->rec.depth * KVF_GROUP_TOKENS));
    return KVF_OK;
}

/* ---- What must be there -------------------------------------------------------------------------- */

static kvf_status present(check *c, kvf_db db, const kvf_key *key, const char *what, kvf_error *err)
{
    MDB_val v;
    bool found;
    KVF_TRY(kvf_db_get(c->st, c->txn, db, key, &v, &found, err));
    if (!found) bad(c, "%s of a group are not there", what);
    return KVF_OK;
}

static kvf_status check_groups(check *c, kvf_error *err)
{
    kvf_key key;
    for (int64_t i = 0; i < c->n; i++) {
        const group_seen *g = &c->groups[i];
        if (g->refs != g->rec.refs)
            bad(c, "a group is named %llu times, its record says %llu", (unsigned long long)g->refs, (unsigned long long)g->rec.refs);
        kvf_key_hash(&key, g->name);
        KVF_TRY(present(c, KVF_DB_TOK, &key, "the tokens", err));
        for (int32_t layer = 0; layer < c->st->meta.shape.n_layer; layer++) {
            kvf_key_layer(&key, g->name, layer);
            KVF_TRY(present(c, KVF_DB_BLK, &key, "blocks", err));
            if (c->st->meta.shape.digest_bytes) KVF_TRY(present(c, KVF_DB_REP, &key, "digests", err));
        }
    }
    return KVF_OK;
}

static kvf_status check_all(check *c, kvf_error *err)
{
    KVF_TRY(kvf_store_refresh(c->st, c->txn, err));
    KVF_TRY(each(c, KVF_DB_META, check_meta, err));
    KVF_TRY(each(c, KVF_DB_CHAIN, check_chain, err));
    if (c->n && !kvf_store_get_shape(c->st)) {
        bad(c, "groups in a store that was made for no model");
        return KVF_OK;
    }
    check_parents(c);
    KVF_TRY(each(c, KVF_DB_DOC, check_doc, err));
    KVF_TRY(each(c, KVF_DB_NOTE, check_note, err));
    KVF_TRY(each(c, KVF_DB_TOK, check_tok, err));
    KVF_TRY(each(c, KVF_DB_TAIL, check_tail, err));
    KVF_TRY(each(c, KVF_DB_REP, check_rep, err));
    KVF_TRY(each(c, KVF_DB_BLK, check_blk, err));
    return check_groups(c, err);
}

kvf_status kvf_store_check(kvf_store *st, kvf_verify *v, kvf_error *err)
{
    check c = { .st = st, .v = v };
    v->n_checked = v->n_bad = 0;
    memset(v->first_bad, 0, sizeof v->first_bad);
    KVF_TRY(kvf_env_begin(st->env, &c.txn, err));
    kvf_status rc = check_all(&c, err);
    kvf_env_end(st->env, c.txn);
    kvf_free(&st->mem, c.groups);
    return rc;
}
