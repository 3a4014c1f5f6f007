/* record.c - see record.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L /* strnlen */
#include "memory/record.h"

#include <string.h>

#include "backend/backend.h"

#define MAGIC_STORE 0x31534b46564b0a0dull /* bytes 0d 0a 'K' 'V' 'F' 'K' 'S' '1': text mode transfers show */
#define MAGIC_DOC 0x4456464bu             /* KVFD */
#define MAGIC_CHAIN 0x4356464bu           /* KVFC */
#define MAGIC_VALUE 0x5656464bu           /* KVFV */
#define DIGEST_MAX ((int64_t)1 << 24)     /* bytes of a block's digests: 16 stay far below LMDB's 4 GiB */
#define SLOT_MAX ((int64_t)1 << 27)

static void put(uint8_t **at, uint64_t v, int n)
{
    for (int i = 0; i < n; i++) *(*at)++ = (uint8_t)(v >> 8 * i);
}

static uint64_t get(const uint8_t **at, int n)
{
    uint64_t v = 0;
    for (int i = 0; i < n; i++) v |= (uint64_t)*(*at)++ << 8 * i;
    return v;
}

static void put_hash(uint8_t **at, kvf_hash h)
{
    put(at, h.lo, 8);
    put(at, h.hi, 8);
}

static kvf_hash get_hash(const uint8_t **at)
{
    uint64_t lo = get(at, 8);
    return (kvf_hash){ lo, get(at, 8) };
}

static bool same(kvf_hash a, kvf_hash b) { return a.lo == b.lo && a.hi == b.hi; }

static kvf_hash sum_of(const void *bytes, size_t n, const void *key, size_t n_key)
{
    return kvf_hash_bytes(bytes, n, kvf_hash_bytes(key, n_key, (kvf_hash){ 0, 0 }));
}

static kvf_status damaged(kvf_error *err, const char *what)
{
    return kvf_fail(err, KVF_ERR_FORMAT, "the store is damaged: %s; check it with --verify, remove the document and read it again", what);
}

/* ---- Keys --------------------------------------------------------------------------------- */

void kvf_key_hash(kvf_key *k, kvf_hash h)
{
    for (int i = 0; i < 8; i++) k->bytes[i] = (uint8_t)(h.hi >> (56 - 8 * i));
    for (int i = 0; i < 8; i++) k->bytes[8 + i] = (uint8_t)(h.lo >> (56 - 8 * i));
    k->n = 16;
}

void kvf_key_layer(kvf_key *k, kvf_hash h, int32_t layer)
{
    kvf_key_hash(k, h);
    k->bytes[16] = (uint8_t)(layer >> 8);
    k->bytes[17] = (uint8_t)layer;
    k->n = 18;
}

kvf_hash kvf_key_get_hash(const void *bytes)
{
    const uint8_t *p = bytes;
    kvf_hash h = { 0, 0 };
    for (int i = 0; i < 8; i++) h.hi = h.hi << 8 | p[i];
    for (int i = 8; i < 16; i++) h.lo = h.lo << 8 | p[i];
    return h;
}

/* UTF-8 as RFC 3629 has it: no overlong forms, no surrogates, nothing past U+10FFFF. */
bool kvf_name_valid(const char *name, size_t n)
{
    const uint8_t *p = (const uint8_t *)name, *end = p + n;
    if (n < 1 || n > KVF_NAME_MAX) return false;
    while (p < end) {
        uint32_t c = *p++;
        int more = c < 0x80 ? 0 : (c & 0xe0) == 0xc0 ? 1 : (c & 0xf0) == 0xe0 ? 2 : (c & 0xf8) == 0xf0 ? 3 : -1;
        if (more < 0 || end - p < more) return false;
        c &= more ? 0x3fu >> more : 0x7fu;
        for (int i = 0; i < more; i++, p++) {
            if ((*p & 0xc0) != 0x80) return false;
            c = c << 6 | (*p & 0x3fu);
        }
        static const uint32_t least[] = { 0, 0x80, 0x800, 0x10000 };
        if (c < least[more] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return false;
        if (c < 0x20 || (c >= 0x7f && c < 0xa0)) return false;
    }
    return true;
}

kvf_status kvf_key_name(kvf_key *k, const char *name, kvf_error *err)
{
    size_t n = name ? strnlen(name, KVF_NAME_MAX + 1) : 0;
    if (!name || !kvf_name_valid(name, n))
        return kvf_fail(err, KVF_ERR_ARG, "a document's name is 1 to %d bytes of UTF-8 without control characters; choose another",
                        KVF_NAME_MAX);
    memcpy(k->bytes, name, n);
    k->n = n;
    return KVF_OK;
}

/* ---- meta ---------------------------------------------------------------------------------- */

static const uint8_t meta_key[] = "store";

static void put_text(uint8_t **at, const char *text, size_t cap)
{
    memset(*at, 0, cap);
    memcpy(*at, text, strnlen(text, cap - 1));
    *at += cap;
}

static void put_shape(uint8_t **at, const kvf_store_shape *s)
{
    put(at, s->model[0], 8);
    put(at, s->model[1], 8);
    put(at, (uint32_t)s->n_layer, 4);
    put(at, (uint32_t)s->n_head_kv, 4);
    put(at, (uint32_t)s->head_dim, 4);
    put(at, 0, 4);
    put(at, (uint64_t)s->slot_bytes, 8);
    put(at, (uint64_t)s->digest_bytes, 8);
    put_text(at, s->policy, sizeof s->policy);
}

kvf_hash kvf_shape_hash(const kvf_store_shape *s)
{
    uint8_t b[48 + sizeof s->policy], *at = b;
    put_shape(&at, s);
    return kvf_hash_bytes(b, sizeof b, (kvf_hash){ 0, 0 });
}

const char *kvf_shape_wrong(const kvf_store_shape *s)
{
    if (s->n_layer < 1 || s->n_layer > 0xffff) return "number of layers";
    if (s->n_head_kv < 1 || s->n_head_kv > 4096) return "number of KV heads";
    if (s->head_dim < 1 || s->head_dim > 4096) return "dimension of a head";
    if (s->slot_bytes != (int64_t)s->n_head_kv * KVF_BLOCK * s->head_dim * 4 || s->slot_bytes > SLOT_MAX) return "bytes of a block";
    if (s->digest_bytes < 0 || s->digest_bytes > DIGEST_MAX) return "bytes of a block's digests";
    if (!memchr(s->model_name, 0, sizeof s->model_name)) return "name of the model";
    if (!memchr(s->policy, 0, sizeof s->policy)) return "policy";
    return NULL;
}

void kvf_meta_put(uint8_t out[KVF_META_BYTES], const kvf_meta_rec *r)
{
    uint8_t *at = out;
    memset(out, 0, KVF_META_BYTES);
    put(&at, MAGIC_STORE, 8);
    put(&at, r->version, 4);
    put(&at, r->codec, 4);
    put(&at, (uint64_t)r->created, 8);
    put(&at, r->has_shape, 4);
    put(&at, 0, 4);
    if (r->has_shape) {
        put_shape(&at, &r->shape);
        put_text(&at, r->shape.model_name, sizeof r->shape.model_name);
    }
    at = out + KVF_META_BYTES - 16;
    put_hash(&at, sum_of(out, KVF_META_BYTES - 16, meta_key, sizeof meta_key));
}

kvf_status kvf_meta_get(kvf_meta_rec *r, const void *bytes, size_t n, kvf_error *err)
{
    const uint8_t *at = bytes, *sum = at + KVF_META_BYTES - 16;
    memset(r, 0, sizeof *r);
    if (n < 16 || get(&at, 8) != MAGIC_STORE) return kvf_fail(err, KVF_ERR_FORMAT, "this is an LMDB file, but not a store of kvfold; name another folder");
    r->version = (uint32_t)get(&at, 4);
    if (r->version > KVF_STORE_VERSION)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "the store has version %u, this build reads up to %d; use a newer kvfold", r->version,
                        KVF_STORE_VERSION);
    if (r->version < 1 || n != KVF_META_BYTES) return damaged(err, "the head of the store");
    if (!same(get_hash(&sum), sum_of(bytes, KVF_META_BYTES - 16, meta_key, sizeof meta_key)))
        return damaged(err, "the checksum of the head of the store is wrong");
    r->codec = (uint32_t)get(&at, 4);
    r->created = (int64_t)get(&at, 8);
    r->has_shape = get(&at, 4) != 0;
    at += 4;
    if (r->codec > KVF_CODEC_INT8) return kvf_fail(err, KVF_ERR_UNSUPPORTED, "the store's codec is %u, unknown to this build; use a newer kvfold", r->codec);
    if (!r->has_shape) return KVF_OK;
    kvf_store_shape *s = &r->shape;
    s->model[0] = get(&at, 8);
    s->model[1] = get(&at, 8);
    s->n_layer = (int32_t)get(&at, 4);
    s->n_head_kv = (int32_t)get(&at, 4);
    s->head_dim = (int32_t)get(&at, 4);
    at += 4;
    s->slot_bytes = (int64_t)get(&at, 8);
    s->digest_bytes = (int64_t)get(&at, 8);
    memcpy(s->policy, at, sizeof s->policy);
    memcpy(s->model_name, at + sizeof s->policy, sizeof s->model_name);
    const char *wrong = kvf_shape_wrong(s);
    if (wrong) return damaged(err, wrong);
    return KVF_OK;
}

/* ---- doc and chain --------------------------------------------------------------------------- */

void kvf_doc_put(uint8_t out[KVF_DOC_BYTES], const kvf_doc_rec *r, const kvf_key *key)
{
    uint8_t *at = out;
    memset(out, 0, KVF_DOC_BYTES);
    put(&at, MAGIC_DOC, 4);
    put(&at, KVF_STORE_VERSION, 2);
    put(&at, r->complete, 2);
    put(&at, (uint64_t)r->created, 8);
    put(&at, (uint64_t)r->n_token, 8);
    put(&at, (uint64_t)r->n_group, 8);
    put_hash(&at, r->last);
    put(&at, r->note_bytes, 8);
    at = out + KVF_DOC_BYTES - 16;
    put_hash(&at, sum_of(out, KVF_DOC_BYTES - 16, key->bytes, key->n));
}

kvf_status kvf_doc_get(kvf_doc_rec *r, const void *bytes, size_t n, const kvf_key *key, kvf_error *err)
{
    const uint8_t *at = bytes, *sum = at + KVF_DOC_BYTES - 16;
    memset(r, 0, sizeof *r);
    if (!kvf_name_valid((const char *)key->bytes, key->n)) return damaged(err, "the name of a document");
    if (n != KVF_DOC_BYTES || get(&at, 4) != MAGIC_DOC || get(&at, 2) != KVF_STORE_VERSION) return damaged(err, "the record of a document");
    if (!same(get_hash(&sum), sum_of(bytes, KVF_DOC_BYTES - 16, key->bytes, key->n)))
        return damaged(err, "the checksum of a document's record is wrong");
    uint64_t complete = get(&at, 2);
    r->complete = complete != 0;
    r->created = (int64_t)get(&at, 8);
    r->n_token = (int64_t)get(&at, 8);
    r->n_group = (int64_t)get(&at, 8);
    r->last = get_hash(&at);
    r->note_bytes = get(&at, 8);
    bool fits = r->n_token >= 1 && r->n_token < INT64_MAX - KVF_GROUP_TOKENS &&
                r->n_group == (r->n_token + KVF_GROUP_TOKENS - 1) / KVF_GROUP_TOKENS;
    if (complete > 1 || !fits || r->note_bytes > KVF_NOTE_MAX) return damaged(err, "the numbers of a document's record");
    return KVF_OK;
}

void kvf_chain_put(uint8_t out[KVF_CHAIN_BYTES], const kvf_chain_rec *r, kvf_hash group)
{
    uint8_t *at = out;
    kvf_key key;
    kvf_key_hash(&key, group);
    memset(out, 0, KVF_CHAIN_BYTES);
    put(&at, MAGIC_CHAIN, 4);
    put(&at, KVF_STORE_VERSION, 2);
    put(&at, (uint64_t)r->n_token, 2);
    put(&at, (uint64_t)r->depth, 8);
    put(&at, r->refs, 8);
    put_hash(&at, r->parent);
    at = out + KVF_CHAIN_BYTES - 16;
    put_hash(&at, sum_of(out, KVF_CHAIN_BYTES - 16, key.bytes, key.n));
}

kvf_status kvf_chain_get(kvf_chain_rec *r, const void *bytes, size_t n, kvf_hash group, kvf_error *err)
{
    const uint8_t *at = bytes, *sum = at + KVF_CHAIN_BYTES - 16;
    kvf_key key;
    kvf_key_hash(&key, group);
    memset(r, 0, sizeof *r);
    if (n != KVF_CHAIN_BYTES || get(&at, 4) != MAGIC_CHAIN || get(&at, 2) != KVF_STORE_VERSION) return damaged(err, "the record of a group");
    if (!same(get_hash(&sum), sum_of(bytes, KVF_CHAIN_BYTES - 16, key.bytes, key.n)))
        return damaged(err, "the checksum of a group's record is wrong");
    r->n_token = (int64_t)get(&at, 2);
    r->depth = (int64_t)get(&at, 8);
    r->refs = get(&at, 8);
    r->parent = get_hash(&at);
    bool first = r->parent.lo == 0 && r->parent.hi == 0;
    if (r->n_token < 1 || r->n_token > KVF_GROUP_TOKENS || r->depth < 0 || r->depth > INT64_MAX / KVF_GROUP_TOKENS - 1 ||
        first != (r->depth == 0) || r->refs < 1)
        return damaged(err, "the numbers of a group's record");
    return KVF_OK;
}

kvf_hash kvf_group_name(kvf_hash parent, kvf_hash shape, const kvf_token *tokens, int64_t n)
{
    uint8_t b[56], *at = b;
    put_hash(&at, parent);
    put_hash(&at, shape);
    put_hash(&at, kvf_hash_bytes(tokens, (size_t)n * sizeof *tokens, (kvf_hash){ 0, 0 }));
    put(&at, (uint64_t)n, 8);
    return kvf_hash_bytes(b, sizeof b, (kvf_hash){ 0, 0 });
}

/* ---- Large values --------------------------------------------------------------------------- */

static size_t sums_bytes(const kvf_head *h) { return h->kind == KVF_VALUE_BLOCKS ? (size_t)h->n_item * KVF_SUM_BYTES : 0; }

size_t kvf_value_at(const kvf_head *h, int64_t i)
{
    return KVF_HEAD_BYTES + sums_bytes(h) + (size_t)i * (size_t)h->item_bytes;
}

static kvf_hash head_sum(const uint8_t *value, const kvf_head *h, const kvf_key *key)
{
    size_t n = h->kind == KVF_VALUE_BLOCKS ? sums_bytes(h) : (size_t)h->n_item * (size_t)h->item_bytes;
    return kvf_hash_bytes(value + KVF_HEAD_BYTES, n, sum_of(value, KVF_HEAD_BYTES - 16, key->bytes, key->n));
}

void kvf_head_put(void *value, const kvf_head *h, const kvf_key *key)
{
    uint8_t *at = value;
    put(&at, MAGIC_VALUE, 4);
    put(&at, KVF_STORE_VERSION, 2);
    put(&at, h->kind, 1);
    put(&at, h->codec, 1);
    put(&at, h->layer, 4);
    put(&at, h->n_item, 4);
    put(&at, h->n_token, 4);
    put(&at, 0, 4);
    put(&at, h->item_bytes, 8);
    put_hash(&at, head_sum(value, h, key));
}

kvf_status kvf_head_check(const void *value, size_t n, const kvf_head *want, const kvf_key *key, bool deep, kvf_error *err)
{
    const uint8_t *at = value;
    if (n < KVF_HEAD_BYTES || get(&at, 4) != MAGIC_VALUE || get(&at, 2) != KVF_STORE_VERSION)
        return damaged(err, "the head of a value");
    kvf_head h = { .kind = (kvf_value_kind)get(&at, 1) };
    h.codec = (uint32_t)get(&at, 1);
    h.layer = (uint32_t)get(&at, 4);
    h.n_item = (uint32_t)get(&at, 4);
    h.n_token = (uint32_t)get(&at, 4);
    at += 4;
    h.item_bytes = get(&at, 8);
    bool any = want->item_bytes == 0 && want->n_item == 1;
    size_t bytes = n - KVF_HEAD_BYTES;
    if (h.kind != want->kind || h.codec != want->codec || h.layer != want->layer || h.n_item != want->n_item ||
        h.n_token != want->n_token || (any ? h.item_bytes != bytes : h.item_bytes != want->item_bytes))
        return damaged(err, "the head of a value does not fit its place");
    /* Digests may be padded at the end (tier.c), nothing else is. */
    size_t least = any ? n : kvf_value_at(want, want->n_item);
    if (n < least || (n > least && h.kind != KVF_VALUE_DIGESTS)) return damaged(err, "the length of a value");
    if ((deep || h.kind == KVF_VALUE_BLOCKS) && !same(get_hash(&at), head_sum(value, &h, key)))
        return damaged(err, "the checksum of a value is wrong");
    for (size_t i = least; deep && i < n; i++) {
        if (((const uint8_t *)value)[i]) return damaged(err, "the padding of a value");
    }
    return KVF_OK;
}

void kvf_sum_put(void *value, int64_t item, kvf_hash sum)
{
    uint8_t *at = (uint8_t *)value + KVF_HEAD_BYTES + (size_t)item * KVF_SUM_BYTES;
    put_hash(&at, sum);
}

kvf_hash kvf_sum_get(const void *value, int64_t item)
{
    const uint8_t *at = (const uint8_t *)value + KVF_HEAD_BYTES + (size_t)item * KVF_SUM_BYTES;
    return get_hash(&at);
}
