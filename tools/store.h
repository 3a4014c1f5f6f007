/* store.h - what the commands share about stores: opening, choosing a document, temporary folders.
 *
 * Rule: a temporary store never outlives the program, however that ends (interrupt.h); only a kill
 * that no program sees can leave one.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_STORE_H
#define KVFOLD_TOOLS_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kvfold/kvfold.h>

/* The policy that has a memory; what a new store is made for unless --policy says otherwise. */
#define STORE_POLICY "infllm"

/* Open the store in `path`. codec: "f16" or "int8", of a store that is made. */
kvf_status store_open(kvf_store **out, kvf_ctx *ctx, const char *path, kvf_store_mode mode, const char *codec,
                      kvf_error *err);

/* The document called `name`, or, if NULL, the only one there is. Errors: NOT_FOUND (lists the names),
 * ARG (several, and none named; lists them), STATE (not read to its end). kvf_document_free *doc. */
kvf_status store_choose(kvf_store *st, const char *name, kvf_document *doc, kvf_error *err);

/* Bytes that the files of a folder take on disk. */
int64_t store_disk_bytes(const char *folder);

/* Make an empty folder under $TMPDIR or /tmp that goes when the program ends. Errors: IO, LIMIT (n_bytes
 * are not free there). */
kvf_status store_temporary(char *path, size_t cap, int64_t n_bytes, kvf_error *err);

/* Tell that its files are there now, so that a signal can remove them. */
void store_temporary_files(const char *path);

/* Remove folder and files. */
void store_temporary_remove(const char *path);

#endif
