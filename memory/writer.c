/* writer.c - a document being written: a queue of two groups and the thread that commits them.
 *
 * A group is one transaction: its blocks, digests, tokens and record, and the document's record that now
 * ends with it. The thread copies from the caller's slots straight into LMDB's pages.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L /* read-write locks */
#include <string.h>
#include <time.h>

#include "memory/store_int.h"

#define QUEUE 2

/* A queued group; its pointers are copied into the writer's own lists. */
typedef struct queued {
    kvf_hash name, parent;
    int64_t group, n_token;
    const void **slots, **digests; /* [n_layer][KVF_GROUP_BLOCKS] each, room for that */
} queued;

struct kvf_writer {
    kvf_store *st;
    kvf_store_tier *tier;
    kvf_store_doc doc;   /* name, tokens: the caller's until close */
    kvf_key key;
    void *note;
    int64_t created;
    bool complete;       /* the record says so already */
    queued queue[QUEUE]; /* queue[i % QUEUE] */
    kvf_hash last;       /* of the groups put */
    int64_t n_put, n_done; /* groups of the document: put; committed */
    int64_t n_seen;      /* groups in the tier */
    kvf_error failure;   /* of the thread; code 0: none */
    bool stop, started;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

static int64_t n_groups(int64_t n_token) { return (n_token + KVF_GROUP_TOKENS - 1) / KVF_GROUP_TOKENS; }

static int64_t tokens_of(const kvf_writer *w, int64_t group)
{
    int64_t n = w->doc.n_token - group * KVF_GROUP_TOKENS;
    return n < KVF_GROUP_TOKENS ? n : KVF_GROUP_TOKENS;
}

/* ---- Inside a transaction ------------------------------------------------------------------------ */

static kvf_status put_value(kvf_update *u, kvf_db db, const kvf_key *key, const kvf_head *h, const void *bytes, kvf_error *err)
{
    void *out;
    size_t n = (size_t)h->item_bytes;
    KVF_TRY(kvf_db_room(u, db, key, KVF_HEAD_BYTES + n, &out, err));
    memcpy((uint8_t *)out + KVF_HEAD_BYTES, bytes, n);
    kvf_head_put(out, h, key);
    return KVF_OK;
}

static int32_t block_tokens(int64_t n_token, int64_t block)
{
    int64_t n = n_token - block * 128;
    return (int32_t)(n < 128 ? n : 128);
}

static kvf_status put_blocks(kvf_update *u, const queued *q, int32_t layer, kvf_error *err)
{
    kvf_key key;
    void *out;
    kvf_head h = kvf_blocks_head(u->st, layer, q->n_token);
    kvf_block_codec codec = kvf_store_codec(u->st);
    kvf_key_layer(&key, q->name, layer);
    KVF_TRY(kvf_db_room(u, KVF_DB_BLK, &key, kvf_value_at(&h, h.n_item), &out, err));
    for (int64_t i = 0; i < h.n_item; i++) {
        uint8_t *to = (uint8_t *)out + kvf_value_at(&h, i);
        kvf_codec_encode(&codec, q->slots[layer * (int64_t)h.n_item + i], block_tokens(q->n_token, i), to);
        kvf_sum_put(out, i, kvf_hash_bytes(to, h.item_bytes, (kvf_hash){ 0, 0 }));
    }
    kvf_head_put(out, &h, &key);
    return KVF_OK;
}

/* Never smaller than a page: LMDB then gives the value pages of its own, where the digests behind its 16
 * bytes and our 48 are 64-byte aligned. */
static kvf_status put_digests(kvf_update *u, const queued *q, int32_t layer, kvf_error *err)
{
    kvf_key key;
    void *out;
    kvf_head h = kvf_digests_head(u->st, layer, q->n_token);
    size_t n = kvf_value_at(&h, h.n_item), room = n < u->st->env->page ? u->st->env->page : n;
    kvf_key_layer(&key, q->name, layer);
    KVF_TRY(kvf_db_room(u, KVF_DB_REP, &key, room, &out, err));
    for (int64_t i = 0; i < h.n_item; i++)
        memcpy((uint8_t *)out + kvf_value_at(&h, i), q->digests[layer * (int64_t)h.n_item + i], h.item_bytes);
    memset((uint8_t *)out + n, 0, room - n);
    kvf_head_put(out, &h, &key);
    return KVF_OK;
}

static kvf_status put_group(kvf_update *u, const kvf_writer *w, const queued *q, kvf_error *err)
{
    kvf_key key;
    kvf_chain_rec c = { .parent = q->parent, .n_token = q->n_token, .depth = q->group };
    uint8_t bytes[KVF_CHAIN_BYTES];
    for (int32_t layer = 0; layer < u->st->meta.shape.n_layer; layer++) {
        KVF_TRY(put_blocks(u, q, layer, err));
        if (u->st->meta.shape.digest_bytes) KVF_TRY(put_digests(u, q, layer, err));
    }
    kvf_key_hash(&key, q->name);
    KVF_TRY(kvf_db_put(u, KVF_DB_TOK, &key, w->doc.tokens + q->group * KVF_GROUP_TOKENS, (size_t)q->n_token * sizeof(kvf_token), err));
    if (q->group > 0) KVF_TRY(kvf_group_ref(u, q->parent, err));
    c.refs = 1; /* the document, which point() moves here */
    kvf_chain_put(bytes, &c, q->name);
    return kvf_db_put(u, KVF_DB_CHAIN, &key, bytes, sizeof bytes, err);
}

/* Let the document end with `last`, n_group groups. has_ref: the group counts the document already. */
static kvf_status point(kvf_update *u, kvf_writer *w, kvf_hash last, int64_t n_group, bool has_ref, bool complete, kvf_error *err)
{
    kvf_doc_rec old, r = { .complete = complete, .created = w->created, .n_group = n_group, .last = last, .note_bytes = w->doc.note_bytes };
    bool found;
    uint8_t bytes[KVF_DOC_BYTES];
    r.n_token = n_group == n_groups(w->doc.n_token) ? w->doc.n_token : n_group * KVF_GROUP_TOKENS;
    KVF_TRY(kvf_doc_read(u->st, u->txn, &w->key, &old, &found, err));
    bool moves = !found || !kvf_hash_same(old.last, last);
    if (moves && !has_ref) KVF_TRY(kvf_group_ref(u, last, err));
    if (found && moves) KVF_TRY(kvf_group_unref(u, old.last, err));
    if (!found && w->doc.note_bytes) {
        kvf_head h = { .kind = KVF_VALUE_NOTE, .n_item = 1, .item_bytes = w->doc.note_bytes };
        KVF_TRY(put_value(u, KVF_DB_NOTE, &w->key, &h, w->note, err));
    }
    if (found) {
        r.created = old.created;
        r.note_bytes = old.note_bytes;
    }
    kvf_doc_put(bytes, &r, &w->key);
    return kvf_db_put(u, KVF_DB_DOC, &w->key, bytes, sizeof bytes, err);
}

typedef struct job {
    kvf_writer *w;
    const queued *q;
    const void *tail;
    size_t tail_bytes;
} job;

static kvf_status write_group(kvf_update *u, void *arg, kvf_error *err)
{
    job *j = arg;
    kvf_chain_rec c;
    bool found;
    KVF_TRY(kvf_chain_read(u->st, u->txn, j->q->name, &c, &found, err));
    if (!found) KVF_TRY(put_group(u, j->w, j->q, err));
    return point(u, j->w, j->q->name, j->q->group + 1, !found, false, err);
}

static kvf_status write_end(kvf_update *u, void *arg, kvf_error *err)
{
    job *j = arg;
    kvf_writer *w = j->w;
    kvf_key key;
    kvf_key_hash(&key, w->last);
    KVF_TRY(point(u, w, w->last, w->n_put, false, true, err));
    if (!j->tail) return KVF_OK;
    kvf_head h = { .kind = KVF_VALUE_TAIL, .n_item = 1, .item_bytes = j->tail_bytes };
    return put_value(u, KVF_DB_TAIL, &key, &h, j->tail, err);
}

/* ---- The thread ------------------------------------------------------------------------------------ */

static void *run(void *arg)
{
    kvf_writer *w = arg;
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (w->n_done == w->n_put && !w->stop && !w->failure.code) pthread_cond_wait(&w->changed, &w->lock);
        if (w->n_done == w->n_put || w->failure.code) break;
        const queued *q = &w->queue[w->n_done % QUEUE];
        pthread_mutex_unlock(&w->lock);
        kvf_error err = { .code = KVF_OK };
        job j = { .w = w, .q = q };
        kvf_status rc = kvf_env_update(w->st, write_group, &j, &err);
        pthread_mutex_lock(&w->lock);
        if (rc < 0) w->failure = err;
        else w->n_done++;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* ---- Opening: how much is there already --------------------------------------------------------------- */

/* Groups of the text that the store has, from the start; w->last becomes the last of them. */
static kvf_status find_groups(kvf_writer *w, MDB_txn *txn, kvf_error *err)
{
    int64_t n = n_groups(w->doc.n_token);
    for (int64_t g = 0; g < n; g++) {
        kvf_chain_rec c;
        bool found;
        kvf_hash name = kvf_group_name(w->last, w->st->shape_hash, w->doc.tokens + g * KVF_GROUP_TOKENS, tokens_of(w, g));
        KVF_TRY(kvf_chain_read(w->st, txn, name, &c, &found, err));
        if (!found) break;
        if (c.depth != g || c.n_token != tokens_of(w, g) || !kvf_hash_same(c.parent, w->last))
            return kvf_fail(err, KVF_ERR_FORMAT, "store '%s' is damaged: a chain of groups is broken; check it with --verify", w->st->env->folder);
        KVF_TRY(kvf_tier_add(w->tier, name, c.n_token, err));
        w->last = name;
        w->n_put = w->n_done = g + 1;
    }
    return KVF_OK;
}

/* May the name be used for this text? Yes if it is free, or if what it names is a beginning of it: all its
 * groups, but for a short one at the end of an unfinished document. */
static kvf_status check_name(kvf_writer *w, MDB_txn *txn, bool *found, kvf_error *err)
{
    kvf_doc_rec d;
    kvf_chain_rec c;
    bool there;
    KVF_TRY(kvf_doc_read(w->st, txn, &w->key, &d, found, err));
    if (!*found) return KVF_OK;
    int64_t at = d.n_group - 1;
    kvf_hash last = d.last;
    bool same = d.n_group <= w->n_put && kvf_hash_same(w->tier->groups[at], last);
    if (!same && !d.complete && d.n_token % KVF_GROUP_TOKENS) {
        KVF_TRY(kvf_chain_read(w->st, txn, last, &c, &there, err));
        same = there && (at == 0 || (at <= w->n_put && kvf_hash_same(w->tier->groups[at - 1], c.parent)));
    } else if (same && d.complete) {
        same = d.n_token == w->doc.n_token;
    }
    w->complete = same && d.complete;
    if (same) return KVF_OK;
    return kvf_fail(err, KVF_ERR_STATE, "store '%s' has another text under the name '%s'; choose another name, or remove that document",
                    w->st->env->folder, w->doc.name);
}

static kvf_status pin(kvf_update *u, void *arg, kvf_error *err)
{
    kvf_writer *w = arg;
    return point(u, w, w->last, w->n_put, false, w->complete, err);
}

static kvf_status look_up(kvf_writer *w, kvf_error *err)
{
    bool found = false;
    pthread_rwlock_rdlock(&w->st->env->map);
    kvf_status rc = find_groups(w, w->tier->txn, err);
    if (rc >= 0) rc = check_name(w, w->tier->txn, &found, err);
    pthread_rwlock_unlock(&w->st->env->map);
    KVF_TRY(rc);
    w->n_seen = w->n_put;
    /* The document names what it shares from now on, so that removing the other one leaves it. */
    return w->n_put > 0 && !w->complete ? kvf_env_update(w->st, pin, w, err) : KVF_OK;
}

static kvf_status make_queue(kvf_writer *w, kvf_error *err)
{
    void *block;
    size_t n = (size_t)w->st->meta.shape.n_layer * KVF_GROUP_BLOCKS;
    for (int i = 0; i < QUEUE; i++) {
        KVF_TRY(kvf_mem_get(&w->st->mem, &block, n, sizeof(void *), err));
        w->queue[i].slots = block;
        KVF_TRY(kvf_mem_get(&w->st->mem, &block, n, sizeof(void *), err));
        w->queue[i].digests = block;
    }
    if (!w->doc.note_bytes) return KVF_OK;
    KVF_TRY(kvf_mem_get(&w->st->mem, &block, w->doc.note_bytes, 1, err));
    w->note = block;
    memcpy(w->note, w->doc.note, w->doc.note_bytes);
    return KVF_OK;
}

static kvf_status open_parts(kvf_writer *w, kvf_error *err)
{
    KVF_TRY(kvf_key_name(&w->key, w->doc.name, err));
    KVF_TRY(make_queue(w, err));
    KVF_TRY(kvf_tier_make(&w->tier, w->st, &w->key, err));
    KVF_TRY(look_up(w, err));
    if (pthread_create(&w->thread, NULL, run, w) != 0)
        return kvf_fail(err, KVF_ERR_NOMEM, "the system refused a thread; free memory or raise the limit of processes");
    w->started = true;
    return KVF_OK;
}

kvf_status kvf_writer_open(kvf_writer **out, kvf_store *st, const kvf_store_doc *doc, int64_t *n_have, kvf_error *err)
{
    void *block;
    *out = NULL;
    *n_have = 0;
    if (doc->n_token < 1) return kvf_fail(err, KVF_ERR_ARG, "a document of no tokens; hand over at least one");
    if (doc->note_bytes > KVF_NOTE_MAX)
        return kvf_fail(err, KVF_ERR_ARG, "the note has %zu bytes, at most %zu; keep it elsewhere", doc->note_bytes, KVF_NOTE_MAX);
    if (st->lock_fd < 0) return kvf_fail(err, KVF_ERR_STATE, "store '%s' is open for reading; open it for writing", st->env->folder);
    if (!atomic_load(&st->has_shape)) return kvf_fail(err, KVF_ERR_INTERNAL, "the store was not bound to a model");
    if (atomic_exchange(&st->writing, true))
        return kvf_fail(err, KVF_ERR_BUSY, "another session writes to store '%s'; wait for it", st->env->folder);
    kvf_status rc = kvf_mem_get(&st->mem, &block, 1, sizeof(kvf_writer), err);
    if (rc < 0) {
        atomic_store(&st->writing, false);
        return rc;
    }
    kvf_writer *w = block;
    w->st = st;
    w->doc = *doc;
    w->created = (int64_t)time(NULL);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, NULL);
    rc = open_parts(w, err);
    if (rc < 0) {
        kvf_writer_close(w);
        return rc;
    }
    *n_have = w->tier->base.n_token;
    *out = w;
    return KVF_OK;
}

kvf_tier *kvf_writer_tier(kvf_writer *w) { return &w->tier->base; }

/* ---- Putting ----------------------------------------------------------------------------------------- */

static kvf_status failed(const kvf_writer *w, kvf_error *err)
{
    if (!w->failure.code) return KVF_OK;
    if (err) *err = w->failure;
    return w->failure.code;
}

kvf_status kvf_writer_put(kvf_writer *w, const kvf_group_data *g, kvf_error *err)
{
    if (g->group != w->n_put || w->n_put >= n_groups(w->doc.n_token) || g->n_token != tokens_of(w, g->group))
        return kvf_fail(err, KVF_ERR_INTERNAL, "group %lld of %lld tokens is not the next of the document", (long long)g->group, (long long)g->n_token);
    size_t n = (size_t)w->st->meta.shape.n_layer * (size_t)kvf_blocks_of(g->n_token);
    bool digests = w->st->meta.shape.digest_bytes != 0;
    if (digests && !g->digests) return kvf_fail(err, KVF_ERR_INTERNAL, "group %lld comes without digests", (long long)g->group);
    pthread_mutex_lock(&w->lock);
    while (w->n_put - w->n_done >= QUEUE && !w->failure.code) pthread_cond_wait(&w->changed, &w->lock);
    kvf_status rc = failed(w, err);
    if (rc >= 0) {
        queued *q = &w->queue[w->n_put % QUEUE];
        q->group = g->group;
        q->n_token = g->n_token;
        q->parent = w->last;
        q->name = kvf_group_name(w->last, w->st->shape_hash, w->doc.tokens + g->group * KVF_GROUP_TOKENS, g->n_token);
        memcpy(q->slots, g->slots, n * sizeof *q->slots);
        if (digests) memcpy(q->digests, g->digests, n * sizeof *q->digests);
        w->last = q->name;
        w->n_put++;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
    return rc;
}

/* Names are computed again rather than kept: the queue's entries are used again before poll sees them. */
static kvf_status extend_tier(kvf_writer *w, int64_t n_done, kvf_error *err)
{
    if (w->n_seen == n_done) return KVF_OK;
    KVF_TRY(kvf_tier_renew(w->tier, err));
    for (; w->n_seen < n_done; w->n_seen++) {
        kvf_hash zero = { 0, 0 }, parent = w->n_seen ? w->tier->groups[w->n_seen - 1] : zero;
        int64_t n = tokens_of(w, w->n_seen);
        KVF_TRY(kvf_tier_add(w->tier, kvf_group_name(parent, w->st->shape_hash, w->doc.tokens + w->n_seen * KVF_GROUP_TOKENS, n), n, err));
    }
    return KVF_OK;
}

kvf_status kvf_writer_poll(kvf_writer *w, bool wait, int64_t *n_group, kvf_error *err)
{
    pthread_mutex_lock(&w->lock);
    while (wait && w->n_done < w->n_put && !w->failure.code) pthread_cond_wait(&w->changed, &w->lock);
    int64_t n = w->n_done;
    kvf_status rc = failed(w, err);
    pthread_mutex_unlock(&w->lock);
    *n_group = n;
    KVF_TRY(extend_tier(w, n, err));
    return rc;
}

kvf_status kvf_writer_finish(kvf_writer *w, const void *tail, size_t tail_bytes, kvf_error *err)
{
    int64_t n;
    KVF_TRY(kvf_writer_poll(w, true, &n, err));
    if (n < n_groups(w->doc.n_token))
        return kvf_fail(err, KVF_ERR_STATE, "%lld of %lld groups are written; write the rest first", (long long)n, (long long)n_groups(w->doc.n_token));
    if (w->complete && !tail) return KVF_OK;
    job j = { .w = w, .tail = tail, .tail_bytes = tail_bytes };
    KVF_TRY(kvf_env_update(w->st, write_end, &j, err));
    w->complete = true;
    return kvf_tier_renew(w->tier, err);
}

void kvf_writer_close(kvf_writer *w)
{
    if (!w) return;
    if (w->started) {
        pthread_mutex_lock(&w->lock);
        w->stop = true;
        pthread_cond_broadcast(&w->changed);
        pthread_mutex_unlock(&w->lock);
        pthread_join(w->thread, NULL);
    }
    if (w->tier) kvf_store_tier_close(&w->tier->base);
    kvf_store *st = w->st;
    for (int i = 0; i < QUEUE; i++) {
        kvf_free(&st->mem, w->queue[i].slots);
        kvf_free(&st->mem, w->queue[i].digests);
    }
    kvf_free(&st->mem, w->note);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
    kvf_free(&st->mem, w);
    atomic_store(&st->writing, false);
}
