/* tier.c - reading: blocks copied out, digests read in place.
 *
 * A tier keeps a read transaction open, so that nothing it can see is overwritten, whoever writes. While
 * the map moves (another handle writes and needs more room) that transaction rests; hold() keeps the map
 * where it is. Nothing large is touched through LMDB's map: since Linux 6.18 a page fault maps all of a large folio,
 * 2 MiB for a few bytes, all of it counted as this process's. Blocks are read from the file into the pool. Digests,
 * which every lookup goes through, are mapped by windows of their own, each as large as they are, and shared with
 * other processes; beyond WINDOWS_MAX (1M tokens have 1 GB) they are closed before the next lookup. The pages of
 * LMDB's tree are let go of now and then.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory/store_int.h"

#define ASK_FROM 32768 /* bytes: below, a read's own neighbours are enough */
#define HEAD_MAX (KVF_HEAD_BYTES + KVF_GROUP_BLOCKS * KVF_SUM_BYTES) /* of a value of blocks: head and sums */
#define WINDOWS_MAX ((size_t)192 << 20) /* bytes of digests that stay mapped: of 160K tokens of the 0.5B model */
#define WINDOWS_MOST 4096 /* two areas of the system's table of maps each, which holds 65530 */
#define HANDED_MAX ((size_t)128 << 20) /* bytes of digests that stay resident in LMDB's map, where there are no windows */
#define FOUND_MAX 256 /* values looked up before the pages of LMDB's tree are let go of */

static kvf_status lost(const kvf_store_tier *t, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_IO, "store '%s' could not be mapped again; close it and open it again", t->st->env->folder);
}

/* Hold the map; KVF_OK: the transaction is live. */
static kvf_status enter(kvf_store_tier *t, kvf_error *err)
{
    if (t->n_hold == 0) pthread_rwlock_rdlock(&t->st->env->map);
    if (!t->lost) return KVF_OK;
    if (t->n_hold == 0) pthread_rwlock_unlock(&t->st->env->map);
    return lost(t, err);
}

static void leave(kvf_store_tier *t)
{
    if (t->n_hold == 0) pthread_rwlock_unlock(&t->st->env->map);
}

static void ask_for(const uint8_t *p, size_t n)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = (uintptr_t)p, first = at & ~(page - 1);
    if (n >= ASK_FROM) madvise((void *)(uintptr_t)(p - (at - first)), at - first + n, MADV_WILLNEED);
}

/* Of all pages, which come back as they are used. Caller is inside. */
static void let_go(kvf_store_tier *t)
{
    kvf_mapped_let_go(t->st->env);
    t->n_found = 0;
}

static int64_t group_tokens(const kvf_store_tier *t, int64_t group)
{
    int64_t n = t->base.n_token - group * KVF_GROUP_TOKENS;
    return n < KVF_GROUP_TOKENS ? n : KVF_GROUP_TOKENS;
}

/* A value of a group and layer. Caller is inside. */
static kvf_status value_of(kvf_store_tier *t, kvf_db db, int32_t layer, int64_t group, MDB_val *v, kvf_error *err)
{
    kvf_key key;
    bool found;
    if (layer < 0 || layer >= t->st->meta.shape.n_layer || group < 0 || group >= t->n_group)
        return kvf_fail(err, KVF_ERR_INTERNAL, "layer %d, group %lld are not in the tier", layer, (long long)group);
    kvf_key_layer(&key, t->groups[group], layer);
    KVF_TRY(kvf_db_get(t->st, t->txn, db, &key, v, &found, err));
    if (found) return KVF_OK;
    return kvf_fail(err, KVF_ERR_FORMAT, "store '%s' lacks a part of the document (layer %d, tokens from %lld); check it with --verify",
                    t->st->env->folder, layer, (long long)group * KVF_GROUP_TOKENS);
}

static int64_t n_value(const kvf_store_tier *t) { return t->n_group * t->st->meta.shape.n_layer; }

/* What was handed out is no more: nobody may hold. */
static void close_windows(kvf_store_tier *t)
{
    if (!t->windows.at) return;
    kvf_mapped_close(&t->windows);
    memset(t->digest, 0, (size_t)n_value(t) * sizeof *t->digest);
    t->own_epoch++;
}

/* In another transaction, or another map, values are looked up again. Only the tier's own thread comes here. */
static void forget_places(kvf_store_tier *t)
{
    if (t->place) memset(t->place, 0, (size_t)n_value(t) * sizeof *t->place);
    close_windows(t);
}

/* Between hold and unhold the map stays, and so does what was handed out. */
static void follow_map(kvf_store_tier *t)
{
    if (t->n_hold > 0) return;
    if (t->windows.mapped > t->windows_max || t->windows.n > WINDOWS_MOST) close_windows(t);
    uint64_t epoch = atomic_load(&t->st->env->epoch);
    if (t->env_epoch != epoch) forget_places(t);
    t->env_epoch = epoch;
}

/* A value of blocks, where it was found before while transaction and map are the same: looking it up goes through
 * pages of LMDB's tree. Caller is inside. */
static kvf_status blocks_of(kvf_store_tier *t, int32_t layer, int64_t group, MDB_val *v, kvf_error *err)
{
    int64_t n_layer = t->st->meta.shape.n_layer;
    follow_map(t);
    bool known = layer >= 0 && layer < n_layer && group >= 0 && group < t->n_group;
    MDB_val *at = known ? &t->place[group * n_layer + layer] : NULL;
    if (at && at->mv_data) {
        *v = *at;
        return KVF_OK;
    }
    if (++t->n_found >= FOUND_MAX) let_go(t);
    KVF_TRY(value_of(t, KVF_DB_BLK, layer, group, v, err));
    if (at) *at = *v;
    return KVF_OK;
}

static kvf_status read_block(kvf_store_tier *t, int32_t layer, int64_t block, void *dst, kvf_error *err)
{
    MDB_val v;
    kvf_key key;
    int64_t group = block / KVF_GROUP_BLOCKS, i = block % KVF_GROUP_BLOCKS;
    KVF_TRY(blocks_of(t, layer, group, &v, err));
    kvf_head h = kvf_blocks_head(t->st, layer, group_tokens(t, group));
    if (i >= h.n_item) return kvf_fail(err, KVF_ERR_INTERNAL, "block %lld is not in the tier", (long long)block);
    kvf_key_layer(&key, t->groups[group], layer);
    uint8_t head[HEAD_MAX];
    size_t n_head = kvf_value_at(&h, 0);
    if (n_head > sizeof head) return kvf_fail(err, KVF_ERR_INTERNAL, "a group of %lld blocks", (long long)h.n_item);
    KVF_TRY(kvf_mapped_read(t->st->env, v.mv_data, v.mv_size < n_head ? v.mv_size : n_head, head, err));
    KVF_TRY(kvf_head_check(head, v.mv_size, &h, &key, false, err));
    const uint8_t *from = (const uint8_t *)v.mv_data + kvf_value_at(&h, i);
    kvf_block_codec codec = kvf_store_codec(t->st);
    void *raw = dst;
    if (codec.codec != KVF_CODEC_F16) {
        raw = t->raw;
        KVF_TRY(kvf_reserve(&t->st->mem, &raw, &t->cap_raw, (int64_t)h.item_bytes, 1, err));
        t->raw = raw;
    }
    KVF_TRY(kvf_mapped_read(t->st->env, from, h.item_bytes, raw, err));
    if (!kvf_hash_same(kvf_hash_bytes(raw, h.item_bytes, (kvf_hash){ 0, 0 }), kvf_sum_get(head, i)))
        return kvf_fail(err, KVF_ERR_FORMAT,
                        "store '%s' is damaged: block %lld of layer %d has a wrong checksum; remove the document and "
                        "read it again",
                        t->st->env->folder, (long long)block, layer);
    if (codec.codec != KVF_CODEC_F16) kvf_codec_decode(&codec, raw, dst);
    return KVF_OK;
}

static kvf_status tier_read(kvf_tier *base, int32_t layer, int64_t block, void *dst, kvf_error *err)
{
    kvf_store_tier *t = (kvf_store_tier *)base;
    KVF_TRY(enter(t, err));
    kvf_status rc = read_block(t, layer, block, dst, err);
    leave(t);
    return rc;
}

static void tier_expect(kvf_tier *base, int32_t layer, const int64_t *blocks, int64_t n)
{
    kvf_store_tier *t = (kvf_store_tier *)base;
    if (enter(t, NULL) < 0) return;
    for (int64_t k = 0; k < n; k++) {
        MDB_val v;
        int64_t group = blocks[k] / KVF_GROUP_BLOCKS, i = blocks[k] % KVF_GROUP_BLOCKS;
        if (blocks_of(t, layer, group, &v, NULL) < 0) continue;
        kvf_head h = kvf_blocks_head(t->st, layer, group_tokens(t, group));
        if (i < 0 || i >= h.n_item || v.mv_size < kvf_value_at(&h, h.n_item)) continue;
        ask_for((const uint8_t *)v.mv_data + kvf_value_at(&h, i), h.item_bytes);
    }
    leave(t);
}

static kvf_status read_digests(kvf_store_tier *t, int32_t layer, int64_t group, const void **out, kvf_error *err)
{
    MDB_val v;
    kvf_key key;
    if (t->base.digest_bytes == 0) return kvf_fail(err, KVF_ERR_INTERNAL, "the store has no digests");
    follow_map(t);
    int64_t i = group * t->st->meta.shape.n_layer + layer;
    bool known = layer >= 0 && layer < t->st->meta.shape.n_layer && group >= 0 && group < t->n_group;
    if (known && t->digest[i]) {
        *out = t->digest[i] + KVF_HEAD_BYTES;
        return KVF_OK;
    }
    if (++t->n_found >= FOUND_MAX) let_go(t);
    KVF_TRY(value_of(t, KVF_DB_REP, layer, group, &v, err));
    kvf_head h = kvf_digests_head(t->st, layer, group_tokens(t, group));
    kvf_key_layer(&key, t->groups[group], layer);
    if (!t->seen[i]) ask_for(v.mv_data, v.mv_size);
    const uint8_t *at = kvf_mapped_window(t->st->env, &t->windows, v.mv_data, v.mv_size);
    if (!at) {
        at = v.mv_data;
        t->handed += v.mv_size;
    }
    if (!t->seen[i]) {
        KVF_TRY(kvf_head_check(at, v.mv_size, &h, &key, true, err));
        /* As the writer laid it: a value of its own page behind 16 bytes of LMDB's. */
        if (((uintptr_t)at + KVF_HEAD_BYTES) % 64) return kvf_fail(err, KVF_ERR_FORMAT, "the store is damaged: digests are misplaced; remove the document and read it again");
        t->seen[i] = 1;
    }
    if (at != v.mv_data) t->digest[i] = at;
    *out = at + KVF_HEAD_BYTES;
    return KVF_OK;
}

static kvf_status tier_digests(kvf_tier *base, int32_t layer, int64_t group, const void **out, kvf_error *err)
{
    kvf_store_tier *t = (kvf_store_tier *)base;
    *out = NULL;
    KVF_TRY(enter(t, err));
    kvf_status rc = read_digests(t, layer, group, out, err);
    leave(t);
    return rc;
}

static uint64_t tier_epoch(kvf_tier *base)
{
    const kvf_store_tier *t = (const kvf_store_tier *)base;
    return atomic_load(&t->st->env->epoch) + t->own_epoch;
}

static void tier_hold(kvf_tier *base)
{
    kvf_store_tier *t = (kvf_store_tier *)base;
    if (t->n_hold == 0) pthread_rwlock_rdlock(&t->st->env->map);
    follow_map(t);
    t->n_hold++;
}

static void tier_unhold(kvf_tier *base)
{
    kvf_store_tier *t = (kvf_store_tier *)base;
    if (--t->n_hold > 0) return;
    if (t->handed > HANDED_MAX) { /* asked for again, they are counted again */
        let_go(t);
        t->handed = 0;
        t->own_epoch++;
    }
    pthread_rwlock_unlock(&t->st->env->map);
}

static const kvf_tier_ops ops = { .read = tier_read, .expect = tier_expect, .digests = tier_digests,
                                  .epoch = tier_epoch, .hold = tier_hold, .unhold = tier_unhold };

/* ---- Life ---------------------------------------------------------------------------------------- */

kvf_status kvf_tier_make(kvf_store_tier **out, kvf_store *st, const kvf_key *name, kvf_error *err)
{
    void *block;
    *out = NULL;
    KVF_TRY(kvf_mem_get(&st->mem, &block, 1, sizeof(kvf_store_tier), err));
    kvf_store_tier *t = block;
    t->base.ops = &ops;
    t->base.digest_bytes = (size_t)st->meta.shape.digest_bytes;
    t->st = st;
    t->windows_max = WINDOWS_MAX;
    t->name = *name;
    kvf_status rc = kvf_env_begin(st->env, &t->txn, err);
    if (rc < 0) {
        kvf_free(&st->mem, t);
        return rc;
    }
    pthread_mutex_lock(&st->env->tiers_lock);
    t->next = st->env->tiers;
    if (t->next) t->next->prev = t;
    st->env->tiers = t;
    pthread_mutex_unlock(&st->env->tiers_lock);
    pthread_rwlock_unlock(&st->env->map);
    *out = t;
    return KVF_OK;
}

kvf_status kvf_tier_add(kvf_store_tier *t, kvf_hash group, int64_t n_token, kvf_error *err)
{
    void *groups = t->groups, *seen = t->seen, *place = t->place, *digest = (void *)t->digest;
    kvf_status rc = kvf_reserve(&t->st->mem, &groups, &t->cap_group, t->n_group + 1, sizeof *t->groups, err);
    t->groups = groups;
    int64_t n = (t->n_group + 1) * t->st->meta.shape.n_layer;
    if (rc >= 0) rc = kvf_reserve(&t->st->mem, &seen, &t->cap_seen, n, 1, err);
    t->seen = seen;
    if (rc >= 0) rc = kvf_reserve(&t->st->mem, &place, &t->cap_place, n, sizeof *t->place, err);
    t->place = place;
    if (rc >= 0) rc = kvf_reserve(&t->st->mem, &digest, &t->cap_digest, n, sizeof *t->digest, err);
    t->digest = digest;
    KVF_TRY(rc);
    t->groups[t->n_group++] = group;
    t->base.n_token += n_token;
    return KVF_OK;
}

kvf_status kvf_tier_renew(kvf_store_tier *t, kvf_error *err)
{
    KVF_TRY(enter(t, err));
    forget_places(t);
    mdb_txn_reset(t->txn);
    int rc = mdb_txn_renew(t->txn);
    t->lost = rc != 0;
    leave(t);
    return rc ? kvf_env_fail(t->st->env, rc, "reading", err) : KVF_OK;
}

void kvf_store_tier_close(kvf_tier *base)
{
    if (!base) return;
    kvf_store_tier *t = (kvf_store_tier *)base;
    kvf_env *e = t->st->env;
    while (t->n_hold > 0) tier_unhold(base);
    close_windows(t);
    pthread_rwlock_rdlock(&e->map);
    pthread_mutex_lock(&e->tiers_lock);
    if (t->prev) t->prev->next = t->next;
    else e->tiers = t->next;
    if (t->next) t->next->prev = t->prev;
    pthread_mutex_unlock(&e->tiers_lock);
    if (t->txn) mdb_txn_abort(t->txn);
    pthread_rwlock_unlock(&e->map);
    kvf_free(&t->st->mem, t->groups);
    kvf_free(&t->st->mem, t->seen);
    kvf_free(&t->st->mem, t->place);
    kvf_free(&t->st->mem, (void *)t->digest);
    kvf_free(&t->st->mem, t->raw);
    kvf_free(&t->st->mem, t);
}

void kvf_tiers_reset(kvf_env *e)
{
    for (kvf_store_tier *t = e->tiers; t; t = t->next) {
        if (t->txn && !t->lost) mdb_txn_reset(t->txn);
    }
}

/* Without an environment (growing failed) the transactions went with it: LMDB frees a resting one only
 * through abort, and abort of one whose environment is gone would touch it. They are given up. */
void kvf_tiers_renew(kvf_env *e)
{
    for (kvf_store_tier *t = e->tiers; t; t = t->next) {
        if (!e->mdb) {
            t->txn = NULL;
            t->lost = true;
        } else if (!t->lost && mdb_txn_renew(t->txn) != 0) {
            t->lost = true;
        }
    }
}

bool kvf_tiers_busy(kvf_env *e, const kvf_key *name)
{
    bool busy = false;
    pthread_mutex_lock(&e->tiers_lock);
    for (kvf_store_tier *t = e->tiers; t && !busy; t = t->next) {
        busy = !name || (t->name.n == name->n && memcmp(t->name.bytes, name->bytes, name->n) == 0);
    }
    pthread_mutex_unlock(&e->tiers_lock);
    return busy;
}

/* ---- A document as a tier ----------------------------------------------------------------------- */

static kvf_status add_group(kvf_store_tier *t, kvf_hash parent, kvf_hash group, kvf_token *tokens, int64_t n, kvf_error *err)
{
    MDB_val v;
    kvf_key key;
    bool found;
    kvf_key_hash(&key, group);
    KVF_TRY(kvf_db_get(t->st, t->txn, KVF_DB_TOK, &key, &v, &found, err));
    if (!found || v.mv_size != (size_t)n * sizeof *tokens) return kvf_fail(err, KVF_ERR_FORMAT, "the store is damaged: tokens of a group; check it with --verify, remove the document and read it again");
    memcpy(tokens, v.mv_data, v.mv_size);
    if (!kvf_hash_same(kvf_group_name(parent, t->st->shape_hash, tokens, n), group))
        return kvf_fail(err, KVF_ERR_FORMAT, "the store is damaged: the tokens of a group are not its own; remove the document and read it again");
    return kvf_tier_add(t, group, n, err);
}

static kvf_status fill(kvf_store_tier *t, kvf_token **tokens, kvf_error *err)
{
    kvf_doc_rec doc;
    bool found;
    void *list;
    KVF_TRY(kvf_doc_read(t->st, t->txn, &t->name, &doc, &found, err));
    if (!found) return kvf_fail(err, KVF_ERR_NOT_FOUND, "store '%s' has no document '%.*s'", t->st->env->folder, (int)t->name.n, (const char *)t->name.bytes);
    kvf_hash *groups = NULL;
    KVF_TRY(kvf_doc_groups(t->st, t->txn, &doc, &groups, err));
    kvf_status rc = kvf_mem_get(&t->st->mem, &list, (size_t)doc.n_token, sizeof **tokens, err);
    if (rc >= 0) *tokens = list;
    kvf_hash parent = { 0, 0 };
    for (int64_t g = 0; g < doc.n_group && rc >= 0; g++) {
        int64_t first = g * KVF_GROUP_TOKENS, n = doc.n_token - first;
        rc = add_group(t, parent, groups[g], *tokens + first, n < KVF_GROUP_TOKENS ? n : KVF_GROUP_TOKENS, err);
        parent = groups[g];
    }
    kvf_free(&t->st->mem, groups);
    return rc;
}

/* All values of blocks at once: later each would bring pages of LMDB's tree back. What is missing is noticed when it is
 * read. */
static void find_all(kvf_store_tier *t)
{
    MDB_val v;
    for (int64_t g = 0; g < t->n_group; g++)
        for (int32_t l = 0; l < t->st->meta.shape.n_layer; l++) (void)blocks_of(t, l, g, &v, NULL);
    let_go(t);
}

kvf_status kvf_store_tier_open(kvf_tier **out, kvf_store *st, const char *name, kvf_token **tokens, kvf_error *err)
{
    kvf_key key;
    kvf_store_tier *t;
    *out = NULL;
    *tokens = NULL;
    KVF_TRY(kvf_key_name(&key, name, err));
    MDB_txn *txn;
    KVF_TRY(kvf_env_begin(st->env, &txn, err));
    kvf_status rc = kvf_store_refresh(st, txn, err);
    kvf_env_end(st->env, txn);
    KVF_TRY(rc);
    KVF_TRY(kvf_tier_make(&t, st, &key, err));
    rc = enter(t, err);
    if (rc >= 0) {
        rc = fill(t, tokens, err);
        if (rc >= 0) find_all(t);
        leave(t);
    }
    if (rc < 0) {
        kvf_free(&st->mem, *tokens);
        *tokens = NULL;
        kvf_store_tier_close(&t->base);
        return rc;
    }
    *out = &t->base;
    return KVF_OK;
}

static kvf_status copy_tail(kvf_store_tier *t, void **out, size_t *n, kvf_error *err)
{
    MDB_val v;
    kvf_key key;
    bool found;
    void *copy;
    if (t->n_group == 0) return KVF_OK;
    kvf_key_hash(&key, t->groups[t->n_group - 1]);
    KVF_TRY(kvf_db_get(t->st, t->txn, KVF_DB_TAIL, &key, &v, &found, err));
    if (!found) return KVF_OK;
    kvf_head h = { .kind = KVF_VALUE_TAIL, .n_item = 1 };
    KVF_TRY(kvf_head_check(v.mv_data, v.mv_size, &h, &key, true, err));
    KVF_TRY(kvf_mem_get(&t->st->mem, &copy, v.mv_size - KVF_HEAD_BYTES, 1, err));
    memcpy(copy, (const uint8_t *)v.mv_data + KVF_HEAD_BYTES, v.mv_size - KVF_HEAD_BYTES);
    *out = copy;
    *n = v.mv_size - KVF_HEAD_BYTES;
    return KVF_OK;
}

kvf_status kvf_store_read_tail(kvf_tier *base, void **out, size_t *n, kvf_error *err)
{
    kvf_store_tier *t = (kvf_store_tier *)base;
    *out = NULL;
    *n = 0;
    KVF_TRY(enter(t, err));
    kvf_status rc = copy_tail(t, out, n, err);
    leave(t);
    return rc;
}
