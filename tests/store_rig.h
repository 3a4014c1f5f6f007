/* store_rig.h - small stores for tests: a folder, a shape, blocks whose content follows from their place.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_STORE_RIG_H
#define KVF_TESTS_STORE_RIG_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* mkdtemp, usleep */
#endif
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "memory/store.h"

enum { RIG_LAYERS = 2, RIG_DIM = 8, RIG_SLOT = 4 * 128 * RIG_DIM, RIG_DIGEST = 80 };

static kvf_error err;

static inline kvf_store_shape rig_shape(void)
{
    kvf_store_shape s = { .model = { 11, 22 }, .n_layer = RIG_LAYERS, .n_head_kv = 1, .head_dim = RIG_DIM,
                          .slot_bytes = RIG_SLOT, .digest_bytes = RIG_DIGEST };
    snprintf(s.model_name, sizeof s.model_name, "tiny");
    snprintf(s.policy, sizeof s.policy, "infllm:window=256");
    return s;
}

static inline void rig_folder(char out[64])
{
    snprintf(out, 64, "/tmp/kvf_store_XXXXXX");
    cr_assert_not_null(mkdtemp(out));
}

static inline void rig_remove(const char *folder)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", folder);
    cr_assert_eq(system(cmd), 0);
}

/* Token i of text `seed`, which differs from text 0 from token `fork` on. */
static inline kvf_token rig_token(int64_t i, uint32_t seed, int64_t fork)
{
    uint32_t x = (uint32_t)i * 2654435761u + (i < fork ? 0u : seed * 40503u);
    return (kvf_token)((x ^ x >> 15) % 1000);
}

static inline kvf_token *rig_text(int64_t n, uint32_t seed, int64_t fork)
{
    kvf_token *t = malloc((size_t)n * sizeof *t);
    for (int64_t i = 0; i < n; i++) t[i] = rig_token(i, seed, fork);
    return t;
}

/* What block `block` of `layer` of a text holds: finite f16 numbers that depend on its tokens. Tokens it
 * lacks are zero. */
static inline void rig_slot(const kvf_token *text, int64_t n, int32_t layer, int64_t block, uint16_t *out)
{
    memset(out, 0, RIG_SLOT);
    for (int64_t t = 0; t < 128 && block * 128 + t < n; t++) {
        for (int64_t e = 0; e < RIG_DIM; e++) {
            uint32_t x = (uint32_t)(text[block * 128 + t] * 31 + block * 7 + layer * 13 + e) * 2654435761u;
            out[t * RIG_DIM + e] = (uint16_t)(0x3000u + (x >> 20) % 0x1000u);
            out[(128 + t) * RIG_DIM + e] = (uint16_t)(0xb000u + (x >> 10) % 0x1000u);
        }
    }
}

static inline void rig_digest(int32_t layer, int64_t block, uint8_t *out)
{
    for (int i = 0; i < RIG_DIGEST; i++) out[i] = (uint8_t)(layer * 101 + block * 3 + i);
}

typedef struct rig_group {
    const void *slots[RIG_LAYERS * 16], *digests[RIG_LAYERS * 16];
    uint16_t slot[RIG_LAYERS * 16][RIG_SLOT / 2];
    uint8_t digest[RIG_LAYERS * 16][RIG_DIGEST];
} rig_group;

/* Group g of a text; room is the caller's and must live until it is committed. */
static inline kvf_group_data rig_make(rig_group *room, const kvf_token *text, int64_t n, int64_t g)
{
    kvf_group_data d = { .group = g, .n_token = n - g * 2048 < 2048 ? n - g * 2048 : 2048, .slots = room->slots, .digests = room->digests };
    int64_t blocks = (d.n_token + 127) / 128;
    for (int32_t l = 0; l < RIG_LAYERS; l++) {
        for (int64_t b = 0; b < blocks; b++) {
            int64_t i = l * blocks + b;
            rig_slot(text, n, l, g * 16 + b, room->slot[i]);
            rig_digest(l, g * 16 + b, room->digest[i]);
            room->slots[i] = room->slot[i];
            room->digests[i] = room->digest[i];
        }
    }
    return d;
}

static inline kvf_status rig_open_with(kvf_store **st, const char *folder, int mode, size_t map_bytes, int codec, const kvf_mem *mem)
{
    kvf_store_params p = { .size = sizeof p, .mode = mode, .map_bytes = map_bytes, .codec = codec };
    return kvf_store_open_at(st, mem ? mem : &kvf_mem_default, NULL, folder, &p, &err);
}

static inline kvf_store *rig_open(const char *folder, int mode)
{
    kvf_store *st;
    kvf_store_shape s = rig_shape();
    cr_assert_eq(rig_open_with(&st, folder, mode, 0, 0, NULL), KVF_OK, "%s", err.msg);
    if (mode != KVF_STORE_READ) cr_assert_eq(kvf_store_bind(st, &s, &err), KVF_OK, "%s", err.msg);
    return st;
}

/* Write groups of a text until `until` of them are there; finish if that is all. Returns a status; *have
 * is what writer_open said. */
static inline kvf_status rig_write(kvf_store *st, const char *name, const kvf_token *text, int64_t n, int64_t until, int64_t *have)
{
    kvf_writer *w;
    kvf_store_doc d = { .name = name, .tokens = text, .n_token = n, .note = "note", .note_bytes = 4 };
    kvf_status rc = kvf_writer_open(&w, st, &d, have, &err);
    if (rc < 0) return rc;
    int64_t groups = (n + 2047) / 2048, first = (*have + 2047) / 2048, done;
    rig_group *room = malloc(3 * sizeof *room);
    for (int64_t g = first; g < until && g < groups && rc >= 0; g++) {
        kvf_group_data data = rig_make(&room[g % 3], text, n, g);
        rc = kvf_writer_put(w, &data, &err);
    }
    if (rc >= 0) rc = kvf_writer_poll(w, true, &done, &err);
    if (rc >= 0 && until >= groups) rc = kvf_writer_finish(w, "tail", 5, &err);
    kvf_writer_close(w);
    free(room);
    return rc;
}

static inline void rig_ingest(kvf_store *st, const char *name, const kvf_token *text, int64_t n)
{
    int64_t have;
    cr_assert_eq(rig_write(st, name, text, n, INT64_MAX, &have), KVF_OK, "%s", err.msg);
}

/* Everything a tier says about its first n tokens of text is so. */
static inline void rig_check_tier(kvf_tier *t, const kvf_token *text, int64_t n_text)
{
    uint16_t want[RIG_SLOT / 2], got[RIG_SLOT / 2];
    uint8_t digest[RIG_DIGEST];
    int64_t blocks = (t->n_token + 127) / 128;
    for (int32_t l = 0; l < RIG_LAYERS; l++) {
        for (int64_t b = 0; b < blocks; b++) {
            rig_slot(text, n_text, l, b, want);
            cr_assert_eq(t->ops->read(t, l, b, got, &err), KVF_OK, "%s", err.msg);
            cr_assert_arr_eq(got, want, RIG_SLOT, "layer %d block %lld", l, (long long)b);
            const void *p;
            cr_assert_eq(t->ops->digests(t, l, b / 16, &p, &err), KVF_OK, "%s", err.msg);
            cr_assert_eq((uintptr_t)p % 64, 0);
            rig_digest(l, b, digest);
            cr_assert_arr_eq((const uint8_t *)p + (b % 16) * RIG_DIGEST, digest, RIG_DIGEST);
        }
    }
}

static inline void rig_check_doc(kvf_store *st, const char *name, const kvf_token *text, int64_t n)
{
    kvf_tier *t;
    kvf_token *tokens;
    void *tail;
    size_t n_tail;
    cr_assert_eq(kvf_store_tier_open(&t, st, name, &tokens, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(t->n_token, n);
    cr_assert_arr_eq(tokens, text, (size_t)n * sizeof *text);
    rig_check_tier(t, text, n);
    cr_assert_eq(kvf_store_read_tail(t, &tail, &n_tail, &err), KVF_OK);
    if (n_tail) cr_assert_str_eq(tail, "tail");
    kvf_free(&kvf_mem_default, tail);
    kvf_free(&kvf_mem_default, tokens);
    kvf_store_tier_close(t);
}

static inline int64_t rig_bad(kvf_store *st)
{
    kvf_verify v = { .size = sizeof v };
    cr_assert_eq(kvf_store_check(st, &v, &err), KVF_OK, "%s", err.msg);
    return v.n_bad;
}

static inline void rig_clean(kvf_store *st)
{
    kvf_verify v = { .size = sizeof v };
    cr_assert_eq(kvf_store_check(st, &v, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(v.n_bad, 0, "%s", v.first_bad);
}

#endif
