/* record.h - the values of the store's tables as bytes: written and read here and nowhere else.
 *
 * Fixed sizes, little-endian, whatever the machine; each record ends in a checksum (XXH3-128) that covers
 * its key too, so that a record moved to another place is found out. Readers take any bytes: a length, a
 * number or a text that cannot be is KVF_ERR_FORMAT, a version from the future KVF_ERR_UNSUPPORTED.
 * The byte tables are in docs/store.md.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MEMORY_RECORD_H
#define KVF_MEMORY_RECORD_H

#include "base/hash.h"
#include "memory/store.h"

#define KVF_META_BYTES 544
#define KVF_DOC_BYTES 96
#define KVF_CHAIN_BYTES 64
#define KVF_HEAD_BYTES 48 /* with LMDB's 16 in front of a large value, what follows is 64-byte aligned */
#define KVF_SUM_BYTES 16
#define KVF_NAME_MAX 400
#define KVF_NOTE_MAX ((size_t)64 << 20)

typedef struct kvf_key {
    uint8_t bytes[KVF_NAME_MAX];
    size_t n;
} kvf_key;

typedef struct kvf_meta_rec {
    uint32_t version, codec;
    int64_t created;
    bool has_shape;
    kvf_store_shape shape;
} kvf_meta_rec;

typedef struct kvf_doc_rec {
    bool complete;
    int64_t created, n_token, n_group;
    kvf_hash last; /* group */
    uint64_t note_bytes;
} kvf_doc_rec;

typedef struct kvf_chain_rec {
    kvf_hash parent; /* zero of the first group */
    int64_t n_token, depth; /* depth: groups before it */
    uint64_t refs;   /* documents that end here + groups that follow */
} kvf_chain_rec;

typedef enum kvf_value_kind { KVF_VALUE_BLOCKS = 1, KVF_VALUE_DIGESTS = 2, KVF_VALUE_TAIL = 3, KVF_VALUE_NOTE = 4 } kvf_value_kind;

/* In front of every large value. */
typedef struct kvf_head {
    kvf_value_kind kind;
    uint32_t codec, layer, n_item, n_token;
    uint64_t item_bytes;
} kvf_head;

/* Keys. Numbers in keys are big-endian, so that the order of keys is the order of numbers. */
void kvf_key_hash(kvf_key *k, kvf_hash h);
void kvf_key_layer(kvf_key *k, kvf_hash h, int32_t layer);
kvf_hash kvf_key_get_hash(const void *bytes); /* the first 16 of a key */
/* ARG: empty, too long, a control character, not UTF-8. */
kvf_status kvf_key_name(kvf_key *k, const char *name, kvf_error *err);
bool kvf_name_valid(const char *name, size_t n);

void kvf_meta_put(uint8_t out[KVF_META_BYTES], const kvf_meta_rec *r);
kvf_status kvf_meta_get(kvf_meta_rec *r, const void *bytes, size_t n, kvf_error *err);
/* NULL, or what no store can have been made for. */
const char *kvf_shape_wrong(const kvf_store_shape *s);
/* Of everything in it: part of every group's name. */
kvf_hash kvf_shape_hash(const kvf_store_shape *s);

void kvf_doc_put(uint8_t out[KVF_DOC_BYTES], const kvf_doc_rec *r, const kvf_key *key);
kvf_status kvf_doc_get(kvf_doc_rec *r, const void *bytes, size_t n, const kvf_key *key, kvf_error *err);
void kvf_chain_put(uint8_t out[KVF_CHAIN_BYTES], const kvf_chain_rec *r, kvf_hash group);
kvf_status kvf_chain_get(kvf_chain_rec *r, const void *bytes, size_t n, kvf_hash group, kvf_error *err);

/* Name of the group of these tokens after `parent`. */
kvf_hash kvf_group_name(kvf_hash parent, kvf_hash shape, const kvf_token *tokens, int64_t n);

/* A large value: head, then (BLOCKS) a checksum of each item, then the items. Offset of item i: */
size_t kvf_value_at(const kvf_head *h, int64_t i);
/* After the items are in place (BLOCKS: their sums too), seal the value at `value`. The checksum of the
 * head covers the key, and the sums (BLOCKS) or the items (others). */
void kvf_head_put(void *value, const kvf_head *h, const kvf_key *key);
/* Head and length against what they must be; the checksum if `deep` (of BLOCKS always, it is short).
 * want->item_bytes 0 and want->n_item 1: any number of bytes. */
kvf_status kvf_head_check(const void *value, size_t n, const kvf_head *want, const kvf_key *key, bool deep, kvf_error *err);
void kvf_sum_put(void *value, int64_t item, kvf_hash sum);
kvf_hash kvf_sum_get(const void *value, int64_t item);

#endif
