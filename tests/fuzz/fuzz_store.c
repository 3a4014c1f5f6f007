/* fuzz_store.c - any bytes as the records of a store, as its pages, and as the damage done to a small one.
 *
 * The first byte chooses. Damage comes as triples (place, place, value): LMDB's own head must be right before
 * anything else is looked at, so bytes that are a whole file would rarely get further.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory/codec.h"
#include "memory/pages.h"
#include "memory/record.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { LAYERS = 2, DIM = 8, SLOT = 4 * 128 * DIM, DIGEST = 80, N = 2300 };

static char folder[] = "/tmp/kvf_fuzz_XXXXXX", file[64];
static uint8_t *seed;
static size_t n_seed;

static void must(bool ok)
{
    if (!ok) abort();
}

static void remove_folder(void)
{
    static const char *const names[] = { "data.mdb", "lock.mdb", "open.lock", "write.lock", "data.mdb.new" };
    char path[64];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        unlink(path);
    }
    rmdir(folder);
}

static kvf_status open_store(kvf_store **st, int mode)
{
    kvf_error err;
    kvf_store_params p = { .size = sizeof p, .mode = mode, .map_bytes = 1 << 20 };
    return kvf_store_open_at(st, &kvf_mem_default, NULL, folder, &p, &err);
}

static kvf_status ingest(kvf_store *st, const char *name, const kvf_token *text)
{
    static uint8_t slot[SLOT], digest[DIGEST];
    const void *slots[LAYERS * 16], *digests[LAYERS * 16];
    kvf_store_doc d = { .name = name, .tokens = text, .n_token = N, .note = "note", .note_bytes = 4 };
    kvf_writer *w;
    kvf_error err;
    int64_t have;
    for (int i = 0; i < LAYERS * 16; i++) {
        slots[i] = slot;
        digests[i] = digest;
    }
    kvf_status rc = kvf_writer_open(&w, st, &d, &have, &err);
    if (rc < 0) return rc;
    for (int64_t g = have / 2048; g < 2 && rc >= 0 && have < N; g++) {
        kvf_group_data data = { .group = g, .n_token = g ? N - 2048 : 2048, .slots = slots, .digests = digests };
        rc = kvf_writer_put(w, &data, &err);
    }
    if (rc >= 0) rc = kvf_writer_finish(w, "tail", 5, &err);
    kvf_writer_close(w);
    return rc;
}

static void make_seed(void)
{
    kvf_store *st;
    kvf_error err;
    static kvf_token text[N];
    kvf_store_shape s = { .model = { 1, 2 }, .n_layer = LAYERS, .n_head_kv = 1, .head_dim = DIM, .slot_bytes = SLOT, .digest_bytes = DIGEST };
    must(mkdtemp(folder) != NULL);
    atexit(remove_folder);
    snprintf(file, sizeof file, "%s/data.mdb", folder);
    must(open_store(&st, KVF_STORE_CREATE) == KVF_OK && kvf_store_bind(st, &s, &err) == KVF_OK);
    must(ingest(st, "a", text) == KVF_OK);
    text[N - 1] = 1;
    must(ingest(st, "b", text) == KVF_OK);
    must(kvf_store_rewrite(st, &err) == KVF_OK);
    kvf_store_close_at(st);
    struct stat info;
    int fd = open(file, O_RDONLY);
    must(fd >= 0 && fstat(fd, &info) == 0);
    n_seed = (size_t)info.st_size;
    seed = malloc(n_seed);
    must(seed && read(fd, seed, n_seed) == (ssize_t)n_seed);
    close(fd);
}

static void records(const uint8_t *data, size_t size)
{
    kvf_meta_rec meta;
    kvf_doc_rec doc;
    kvf_chain_rec chain;
    kvf_error err;
    kvf_key key = { .n = size < 20 ? size : 20 };
    memcpy(key.bytes, data, key.n);
    kvf_meta_get(&meta, data, size, &err);
    kvf_doc_get(&doc, data, size, &key, &err);
    kvf_chain_get(&chain, data, size, (kvf_hash){ 0, 0 }, &err);
    kvf_name_valid((const char *)data, size);
    for (int kind = 1; kind <= 4; kind++) {
        kvf_head want = { .kind = (kvf_value_kind)kind, .n_item = kind == 1 ? 3 : 1, .n_token = 300, .item_bytes = kind < 3 ? 16 : 0 };
        if (kvf_head_check(data, size, &want, &key, true, &err) == KVF_OK) must(size >= kvf_value_at(&want, kind < 3 ? want.n_item : 0));
    }
    kvf_block_codec c = { KVF_CODEC_INT8, 1, DIM };
    if (size < kvf_codec_bytes(&c)) return;
    uint16_t slot[SLOT / 2];
    kvf_codec_decode(&c, data, slot);
}

static void pages(const uint8_t *data, size_t size)
{
    static const char *const names[] = { "a", "b", NULL };
    uint64_t txn;
    size_t page;
    bool current;
    kvf_error err;
    if (kvf_pages_head(data, size, &txn, &page, &err) == KVF_OK) kvf_pages_check(data, size, NULL, txn, names, &kvf_mem_default, &current, &err);
}

/* What survives the look at its pages must be safe in LMDB's hands, reading and writing. */
static void damaged(const uint8_t *data, size_t size, bool write_too)
{
    uint8_t *copy = malloc(n_seed);
    kvf_store *st;
    kvf_error err;
    memcpy(copy, seed, n_seed);
    for (size_t i = 0; i + 4 <= size; i += 4) copy[((size_t)data[i] | (size_t)data[i + 1] << 8 | (size_t)data[i + 2] << 16) % n_seed] = data[i + 3];
    int fd = open(file, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    must(fd >= 0 && write(fd, copy, n_seed) == (ssize_t)n_seed);
    close(fd);
    free(copy);
    if (open_store(&st, write_too ? KVF_STORE_WRITE : KVF_STORE_READ) < 0) return;
    kvf_verify v = { .size = sizeof v };
    kvf_store_info info;
    kvf_store_check(st, &v, &err);
    kvf_store_info_get(st, &info, &err);
    for (int64_t i = 0; i < 2; i++) {
        kvf_document d;
        kvf_tier *t;
        kvf_token *tokens;
        if (kvf_store_doc_get(st, NULL, i, &d, &err) < 0) continue;
        if (kvf_store_tier_open(&t, st, d.name, &tokens, &err) == KVF_OK) {
            const void *p;
            t->ops->digests(t, 0, 0, &p, &err);
            kvf_free(&kvf_mem_default, tokens);
            kvf_store_tier_close(t);
        }
        kvf_store_doc_free(st, &d);
    }
    const kvf_store_shape *s = kvf_store_get_shape(st);
    if (write_too && s && s->n_layer == LAYERS && s->slot_bytes == SLOT && s->digest_bytes == DIGEST) {
        static kvf_token text[N];
        for (int i = 0; i < N; i++) text[i] = 5;
        kvf_store_doc_remove(st, "b", &err);
        ingest(st, "c", text);
    }
    kvf_store_close_at(st);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!seed) make_seed();
    if (size < 1) return 0;
    switch (data[0] % 4) {
    case 0: records(data + 1, size - 1); break;
    case 1: pages(data + 1, size - 1); break;
    default: damaged(data + 1, size - 1, data[0] % 4 == 3); break;
    }
    return 0;
}
