/* store.h - documents that have been read, kept on disk: their tokens, keys, values and digests, in one
 * LMDB environment. docs/store.md describes the format; all LMDB calls are in this folder.
 *
 * A document is a chain of groups (kv/tier.h: 2048 tokens, the last may be shorter). A group's name is a
 * hash of the one before it and of its tokens, so documents that begin alike share groups, and reading a
 * document again finds all of them: resuming, sharing and "there already" are one lookup. A group is
 * written in one transaction: after a crash there are whole groups and nothing else.
 *
 * What is read from the file is untrusted: every length is checked against the shape before use, every
 * payload against its checksum.
 *
 * One writer at a time, in all processes (a second is refused with BUSY), any number of readers. A
 * store handle may be used by several threads; a tier and a writer belong to one thread each.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MEMORY_STORE_H
#define KVF_MEMORY_STORE_H

#include "base/log.h"
#include "base/mem.h"
#include "kv/tier.h"
#include "kvfold/kvfold.h"

#define KVF_STORE_VERSION 1

/* What the contents were made with and for. Written by the first ingestion, compared ever after. */
typedef struct kvf_store_shape {
    uint64_t model[2];     /* fingerprint */
    char model_name[128];
    char policy[256];      /* identity of the policy: the options that decide what is computed */
    int32_t n_layer, n_head_kv, head_dim;
    int64_t slot_bytes;    /* of a block as the pool holds it: K then V, f16 */
    int64_t digest_bytes;  /* of a block's digests; 0: none */
} kvf_store_shape;

/* path is a folder; params as kvfold.h, checked by the caller. Errors: IO, FORMAT, UNSUPPORTED (newer
 * version), NOT_FOUND (no store there), BUSY, SPACE, NOMEM. */
kvf_status kvf_store_open_at(kvf_store **out, const kvf_mem *mem, const kvf_log *log, const char *path,
                             const kvf_store_params *params, kvf_error *err);

/* Compare with the store's shape, or, in an empty store open for writing, make it the store's. MISMATCH
 * names what differs: "this store was made with model X". */
kvf_status kvf_store_bind(kvf_store *st, const kvf_store_shape *shape, kvf_error *err);

/* NULL while the store is empty. */
const kvf_store_shape *kvf_store_get_shape(const kvf_store *st);

/* Tiers and writers of it must be closed. Takes NULL. */
void kvf_store_close_at(kvf_store *st);

/* ---- Documents and upkeep: what the functions of kvfold.h call, arguments checked ------------------ */

kvf_status kvf_store_info_get(kvf_store *st, kvf_store_info *info, kvf_error *err);
/* The document of that name, or with name NULL the i-th. */
kvf_status kvf_store_doc_get(kvf_store *st, const char *name, int64_t i, kvf_document *doc, kvf_error *err);
void kvf_store_doc_free(kvf_store *st, kvf_document *doc);
kvf_status kvf_store_doc_remove(kvf_store *st, const char *name, kvf_error *err);
kvf_status kvf_store_rewrite(kvf_store *st, kvf_error *err);
kvf_status kvf_store_check(kvf_store *st, kvf_verify *v, kvf_error *err);

/* ---- Reading ---------------------------------------------------------------------------- */

/* A tier over a document (complete or not), and its tokens: *tokens [tier->n_token], allocated from
 * mem of the store, the caller's (kvf_free). Close the tier before the store. */
kvf_status kvf_store_tier_open(kvf_tier **out, kvf_store *st, const char *name, kvf_token **tokens, kvf_error *err);
void kvf_store_tier_close(kvf_tier *t);

/* State saved with the document's end (kvf_writer_finish), *n = 0 if none; allocated as above. It belongs
 * to the text: another document of the same tokens has it too. Works on a writer's tier. */
kvf_status kvf_store_read_tail(kvf_tier *t, void **out, size_t *n, kvf_error *err);

/* ---- Writing ---------------------------------------------------------------------------- */

typedef struct kvf_writer kvf_writer;

typedef struct kvf_store_doc {
    const char *name;  /* 1..400 bytes UTF-8, no control characters */
    const kvf_token *tokens; /* [n_token] all of the document's; borrowed until the writer is closed */
    int64_t n_token;
    const void *note;  /* the caller's, opaque; copied */
    size_t note_bytes; /* <= 64 MiB */
} kvf_store_doc;

/* Begin a document. *n_have: tokens of it whose groups are in the store already, whole groups only,
 * unless all of the document is there (then n_token, and finish completes it at once). If the name is
 * taken by another text: STATE, says so and what to do (choose a name, or remove). A name taken by an
 * unfinished ingestion of the same beginning is carried on. Starts the writing thread.
 * The tier serves the groups that are committed; its n_token follows them (call poll). */
kvf_status kvf_writer_open(kvf_writer **out, kvf_store *st, const kvf_store_doc *doc, int64_t *n_have,
                           kvf_error *err);
kvf_tier *kvf_writer_tier(kvf_writer *w);

/* One group's data; must stay valid and unchanged until poll() reports the group. */
typedef struct kvf_group_data {
    int64_t group;    /* the next in order */
    int64_t n_token;  /* 2048, or the rest at the document's end (any number) */
    const void *const *slots;   /* [n_layer][n_block] slots, n_block = ceil(n_token / 128); copied */
    const void *const *digests; /* [n_layer][n_block] digest_bytes each; NULL if none; copied */
} kvf_group_data;

/* Queue a group; the lists of pointers may go at once. Waits while two are under way, so not between
 * hold() and unhold() of a tier. A failure of an earlier group comes back here (SPACE:
 * the disk is full; IO). */
kvf_status kvf_writer_put(kvf_writer *w, const kvf_group_data *g, kvf_error *err);

/* Groups whose data is committed and no longer needed, counted from the document's start (those that were
 * there before included); wait: until all queued ones are. Not between hold() and unhold() of a tier. */
kvf_status kvf_writer_poll(kvf_writer *w, bool wait, int64_t *n_group, kvf_error *err);

/* After the last group: the document is complete and on the disk. tail may be NULL: one that is there stays. */
kvf_status kvf_writer_finish(kvf_writer *w, const void *tail, size_t tail_bytes, kvf_error *err);

/* Waits for what is queued. Without finish the document stays, unfinished; the same call resumes it. */
void kvf_writer_close(kvf_writer *w);

#endif
