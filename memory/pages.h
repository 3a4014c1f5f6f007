/* pages.h - is this LMDB file sound? Looked at before LMDB is let near it.
 *
 * LMDB trusts its file: a wrong page number or offset makes it read past the map, run in a circle or abort.
 * So every page that holds keys is checked when a store is opened: bounds, order of keys, depth, counts, and
 * that every page is used once, by one tree or the list of free pages. Values are not read (theirs are
 * checksums of our own), so this costs about 1/5000 of the file.
 *
 * Source of the format: LMDB 0.9 (data version 1), 64-bit, little-endian.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MEMORY_PAGES_H
#define KVF_MEMORY_PAGES_H

#include "base/mem.h"

#define KVF_PAGES_HEAD 152 /* bytes of a page that describe the file */

/* The two heads: bytes of the file's start, up to 65536. *txn: the last commit. *page: bytes of a page.
 * Errors: FORMAT. Must be called first: mdb_env_open divides by what stands there. */
kvf_status kvf_pages_head(const uint8_t *file, size_t bytes, uint64_t *txn, size_t *page, kvf_error *err);

/* Of a file that is mapped: touching a page of the map may bring 2 MiB of it, so heads of large values are read
 * (n bytes at `at`, false: they cannot be), and `rest` lets go of the map after some pages of trees. */
typedef struct kvf_pages_io {
    bool (*read)(void *ctx, uint64_t at, void *out, size_t n);
    void (*rest)(void *ctx);
    void *ctx;
} kvf_pages_io;

/* Everything that commit `txn` can reach. *current false: the file has moved on, nothing was checked.
 * io: NULL for a file in memory. names: the trees there may be, ends with NULL. Errors: FORMAT, NOMEM. */
kvf_status kvf_pages_check(const uint8_t *file, size_t bytes, const kvf_pages_io *io, uint64_t txn,
                           const char *const *names, const kvf_mem *mem, bool *current, kvf_error *err);

#endif
