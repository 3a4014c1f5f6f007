/* test_store.c - the store of documents: what is written comes back, is shared, carried on, removed,
 * compacted; the codec; the readers of records; who may open what.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <math.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "base/half.h"
#include "memory/codec.h"
#include "memory/record.h"
#include "memory/store_int.h"
#include "store_rig.h"

Test(store, what_was_written_comes_back_in_another_handle)
{
    static const int64_t lengths[] = { 1, 127, 128, 129, 2047, 2048, 2049, 6000 };
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        char dir[64];
        rig_folder(dir);
        int64_t n = lengths[i];
        kvf_token *text = rig_text(n, 1, 0);
        kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
        rig_ingest(st, "book", text, n);
        rig_check_doc(st, "book", text, n);
        kvf_store_close_at(st);
        st = rig_open(dir, KVF_STORE_READ);
        rig_check_doc(st, "book", text, n);
        rig_clean(st);
        kvf_document d;
        cr_assert_eq(kvf_store_doc_get(st, "book", 0, &d, &err), KVF_OK, "%s", err.msg);
        cr_assert(d.complete && d.n_tokens == n && d.note_bytes == 4 && memcmp(d.note, "note", 4) == 0);
        cr_assert_eq(d.kv_bytes, (size_t)(RIG_LAYERS * ((n + 127) / 128) * RIG_SLOT));
        kvf_store_doc_free(st, &d);
        cr_assert_eq(kvf_store_doc_get(st, NULL, 1, &d, &err), KVF_ERR_NOT_FOUND);
        kvf_store_close_at(st);
        free(text);
        rig_remove(dir);
    }
}

/* KiB of the store's map that count as this process's; -1: the kernel does not say. */
static long mapped_kib(void)
{
    char line[512];
    bool ours = false;
    long rss = -1;
    FILE *f = fopen("/proc/self/smaps", "r");
    while (f && rss < 0 && fgets(line, sizeof line, f)) {
        if (strstr(line, "/data.mdb")) ours = true;
        if (ours) sscanf(line, "Rss: %ld kB", &rss);
    }
    if (f) fclose(f);
    return rss;
}

Test(store, blocks_that_were_read_do_not_stay_mapped)
{
    enum { N = 300000, BLOCKS = N / 128 };
    char dir[64];
    static uint8_t slot[RIG_SLOT];
    kvf_tier *t;
    kvf_token *tokens;
    rig_folder(dir);
    kvf_token *text = rig_text(N, 4, 0);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    rig_ingest(st, "long", text, N);
    kvf_store_close_at(st);
    st = rig_open(dir, KVF_STORE_READ);
    cr_assert_eq(kvf_store_tier_open(&t, st, "long", &tokens, &err), KVF_OK, "%s", err.msg);
    for (int64_t b = 0; b < BLOCKS; b++) {
        for (int32_t l = 0; l < RIG_LAYERS; l++) cr_assert_eq(t->ops->read(t, l, b, slot, &err), KVF_OK, "%s", err.msg);
    }
    long kib = mapped_kib();
    if (kib < 0) cr_skip_test("the kernel does not say what is mapped");
    cr_assert_lt(kib, (long)BLOCKS * RIG_LAYERS * RIG_SLOT / 1024 / 3, "%ld KiB", kib);
    kvf_free(&kvf_mem_default, tokens);
    kvf_store_tier_close(t);
    kvf_store_close_at(st);
    free(text);
    rig_remove(dir);
}

/* Digests of a text that has more than may stay mapped: what is handed out lasts from hold to unhold, and the next
 * hold says by the epoch that it is gone. */
Test(store, windows_are_closed_when_they_are_many_and_opened_again)
{
    enum { N = 100000, GROUPS = (N + KVF_GROUP_TOKENS - 1) / KVF_GROUP_TOKENS };
    static uint8_t first[GROUPS][RIG_LAYERS][16 * RIG_DIGEST];
    char dir[64];
    kvf_tier *t;
    kvf_token *tokens, *text = rig_text(N, 4, 0);
    rig_folder(dir);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    rig_ingest(st, "long", text, N);
    cr_assert_eq(kvf_store_tier_open(&t, st, "long", &tokens, &err), KVF_OK, "%s", err.msg);
    kvf_store_tier *own = (kvf_store_tier *)t;
    for (int turn = 0; turn < 6; turn++) {
        int32_t layer = turn % RIG_LAYERS;
        const void *at[GROUPS];
        if (turn == 2) own->windows_max = (size_t)10 * 4096;
        uint64_t before = t->ops->epoch(t);
        if (turn > 0 && !own->windows.at) cr_skip_test("the kernel does not say where the file is mapped");
        t->ops->hold(t);
        uint64_t epoch = t->ops->epoch(t);
        cr_assert_eq(epoch != before, turn >= 2, "turn %d", turn);
        for (int64_t g = 0; g < GROUPS; g++) {
            cr_assert_eq(t->ops->digests(t, layer, g, &at[g], &err), KVF_OK, "%s", err.msg);
            cr_assert_eq(t->ops->epoch(t), epoch);
        }
        for (int64_t g = 0; g < GROUPS; g++) {
            int64_t left = N - g * KVF_GROUP_TOKENS, blocks = left < KVF_GROUP_TOKENS ? (left + 127) / 128 : 16;
            if (turn < RIG_LAYERS)
                memcpy(first[g][layer], at[g], (size_t)blocks * RIG_DIGEST);
            else
                cr_assert_eq(memcmp(first[g][layer], at[g], (size_t)blocks * RIG_DIGEST), 0);
        }
        t->ops->unhold(t);
        cr_assert_leq(own->windows.n, (turn < 2 ? turn + 1 : 1) * GROUPS);
    }
    kvf_free(&kvf_mem_default, tokens);
    kvf_store_tier_close(t);
    kvf_store_close_at(st);
    free(text);
    rig_remove(dir);
}

Test(store, documents_that_begin_alike_share_groups)
{
    char dir[64];
    rig_folder(dir);
    enum { N = 7000 };
    kvf_token *a = rig_text(N, 0, 0), *b = rig_text(N, 5, 4200);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    kvf_store_info one, two;
    rig_ingest(st, "a", a, N);
    cr_assert_eq(kvf_store_info_get(st, &one, &err), KVF_OK);
    int64_t have;
    cr_assert_eq(rig_write(st, "b", b, N, INT64_MAX, &have), KVF_OK, "%s", err.msg);
    cr_assert_eq(have, 4096); /* whole groups before token 4200 */
    cr_assert_eq(kvf_store_info_get(st, &two, &err), KVF_OK);
    cr_assert_eq(two.n_tokens, one.n_tokens + N - 4096);
    cr_assert_eq(two.n_documents, 2);
    rig_check_doc(st, "a", a, N);
    rig_check_doc(st, "b", b, N);
    rig_clean(st);
    /* Removing one leaves the other whole. */
    cr_assert_eq(kvf_store_doc_remove(st, "a", &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_store_doc_remove(st, "a", &err), KVF_ERR_NOT_FOUND);
    rig_clean(st);
    rig_check_doc(st, "b", b, N);
    cr_assert_eq(kvf_store_doc_remove(st, "b", &err), KVF_OK);
    rig_clean(st);
    cr_assert_eq(kvf_store_info_get(st, &one, &err), KVF_OK);
    cr_assert(one.n_tokens == 0 && one.n_documents == 0 && one.free_bytes > 0);
    kvf_store_close_at(st);
    free(a);
    free(b);
    rig_remove(dir);
}

Test(store, reading_stopped_at_any_group_is_carried_on)
{
    enum { N = 9000 };
    kvf_token *text = rig_text(N, 3, 0);
    for (int64_t stop = 0; stop <= 5; stop++) {
        char dir[64];
        rig_folder(dir);
        kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
        int64_t have;
        cr_assert_eq(rig_write(st, "x", text, N, stop, &have), KVF_OK, "%s", err.msg);
        kvf_store_close_at(st);
        st = rig_open(dir, KVF_STORE_WRITE);
        rig_clean(st);
        kvf_document d;
        kvf_status rc = kvf_store_doc_get(st, "x", 0, &d, &err);
        cr_assert_eq(rc, stop ? KVF_OK : KVF_ERR_NOT_FOUND);
        if (stop) cr_assert(d.complete == (stop == 5) && d.n_tokens == (stop < 5 ? stop * 2048 : N));
        if (stop) rig_check_doc(st, "x", text, d.n_tokens);
        kvf_store_doc_free(st, &d);
        cr_assert_eq(rig_write(st, "x", text, N, INT64_MAX, &have), KVF_OK, "%s", err.msg);
        cr_assert_eq(have, stop < 5 ? stop * 2048 : N);
        rig_check_doc(st, "x", text, N);
        rig_clean(st);
        kvf_store_close_at(st);
        rig_remove(dir);
    }
    free(text);
}

Test(store, the_same_document_twice_is_there_already_and_a_name_stands_for_one_text)
{
    char dir[64];
    rig_folder(dir);
    enum { N = 3000 };
    kvf_token *a = rig_text(2 * N, 0, 0), *b = rig_text(N, 9, 0), *c = rig_text(N, 9, 2500);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    int64_t have;
    rig_ingest(st, "a", a, N);
    cr_assert_eq(rig_write(st, "a", a, N, INT64_MAX, &have), KVF_OK);
    cr_assert_eq(have, N);
    /* Under another name: nothing to compute, the state at the end comes along. */
    cr_assert_eq(rig_write(st, "again", a, N, 0, &have), KVF_OK);
    cr_assert_eq(have, N);
    cr_assert_eq(rig_write(st, "a", b, N, INT64_MAX, &have), KVF_ERR_STATE);
    cr_assert_not_null(strstr(err.msg, "another name"), "%s", err.msg);
    cr_assert_eq(rig_write(st, "a", a, 2 * N, INT64_MAX, &have), KVF_ERR_STATE); /* complete, and longer */
    cr_assert_eq(rig_write(st, "a", c, N, INT64_MAX, &have), KVF_ERR_STATE); /* same first group */
    rig_clean(st);
    /* An unfinished one whose last short group differs is carried on from the groups they share. */
    kvf_writer *w;
    kvf_store_doc d = { .name = "u", .tokens = c, .n_token = N };
    cr_assert_eq(kvf_writer_open(&w, st, &d, &have, &err), KVF_OK, "%s", err.msg);
    rig_group *room = malloc(sizeof *room);
    kvf_group_data g = rig_make(room, c, N, 1);
    cr_assert_eq(kvf_writer_put(w, &g, &err), KVF_OK, "%s", err.msg);
    kvf_writer_close(w);
    cr_assert_eq(rig_write(st, "u", a, 2 * N, INT64_MAX, &have), KVF_OK, "%s", err.msg);
    rig_check_doc(st, "u", a, 2 * N);
    rig_clean(st);
    free(room);
    kvf_store_close_at(st);
    free(a);
    free(b);
    free(c);
    rig_remove(dir);
}

Test(store, compaction_gives_the_space_back)
{
    char dir[64];
    rig_folder(dir);
    enum { N = 30000 };
    kvf_token *a = rig_text(N, 1, 0), *b = rig_text(5000, 2, 0);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE), *reader = rig_open(dir, KVF_STORE_READ);
    rig_ingest(st, "a", a, N);
    rig_ingest(st, "b", b, 5000);
    cr_assert_eq(kvf_store_doc_remove(st, "a", &err), KVF_OK);
    kvf_store_info before, after;
    cr_assert_eq(kvf_store_info_get(st, &before, &err), KVF_OK);
    kvf_tier *t;
    kvf_token *tokens;
    cr_assert_eq(kvf_store_tier_open(&t, reader, "b", &tokens, &err), KVF_OK);
    cr_assert_eq(kvf_store_rewrite(st, &err), KVF_ERR_BUSY);
    cr_assert_eq(kvf_store_doc_remove(st, "b", &err), KVF_ERR_BUSY);
    kvf_free(&kvf_mem_default, tokens);
    kvf_store_tier_close(t);
    cr_assert_eq(kvf_store_rewrite(reader, &err), KVF_ERR_STATE);
    cr_assert_eq(kvf_store_rewrite(st, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_store_info_get(st, &after, &err), KVF_OK);
    cr_assert_lt(after.file_bytes, before.file_bytes / 3);
    cr_assert_eq(after.free_bytes, 0);
    rig_clean(st);
    rig_check_doc(reader, "b", b, 5000);
    rig_ingest(st, "a", a, N);
    rig_check_doc(reader, "a", a, N);
    kvf_store_close_at(st);
    kvf_store_close_at(reader);
    st = rig_open(dir, KVF_STORE_READ);
    rig_check_doc(st, "b", b, 5000);
    rig_clean(st);
    kvf_store_close_at(st);
    free(a);
    free(b);
    rig_remove(dir);
}

Test(store, the_map_grows_while_documents_are_read)
{
    char dir[64];
    rig_folder(dir);
    enum { N = 40000 };
    kvf_token *a = rig_text(3000, 1, 0), *b = rig_text(N, 2, 0);
    kvf_store *st, *reader;
    kvf_store_shape s = rig_shape();
    cr_assert_eq(rig_open_with(&st, dir, KVF_STORE_CREATE, 1 << 20, 0, NULL), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_store_bind(st, &s, &err), KVF_OK);
    rig_ingest(st, "a", a, 3000);
    reader = rig_open(dir, KVF_STORE_READ);
    kvf_tier *t;
    kvf_token *tokens;
    const void *p, *q;
    cr_assert_eq(kvf_store_tier_open(&t, reader, "a", &tokens, &err), KVF_OK);
    cr_assert_eq(t->ops->digests(t, 0, 0, &p, &err), KVF_OK);
    uint64_t epoch = t->ops->epoch(t);
    rig_ingest(st, "b", b, N);
    cr_assert_neq(t->ops->epoch(t), epoch);
    t->ops->hold(t);
    cr_assert_eq(t->ops->digests(t, 0, 0, &q, &err), KVF_OK);
    rig_check_tier(t, a, 3000);
    t->ops->unhold(t);
    rig_check_doc(reader, "b", b, N);
    rig_clean(st);
    kvf_free(&kvf_mem_default, tokens);
    kvf_store_tier_close(t);
    kvf_store_close_at(reader);
    kvf_store_close_at(st);
    free(a);
    free(b);
    rig_remove(dir);
}

typedef struct reading {
    kvf_tier *t;
    const kvf_token *text;
    int64_t n;
} reading;

static void *read_on(void *arg)
{
    reading *r = arg;
    for (int i = 0; i < 6; i++) {
        r->t->ops->hold(r->t);
        rig_check_tier(r->t, r->text, r->n);
        r->t->ops->unhold(r->t);
    }
    return NULL;
}

Test(store, threads_read_while_another_writes_and_the_map_grows)
{
    char dir[64];
    rig_folder(dir);
    enum { N = 20000 };
    kvf_token *a = rig_text(3000, 1, 0), *b = rig_text(N, 2, 0);
    kvf_store *st;
    kvf_store_shape s = rig_shape();
    cr_assert_eq(rig_open_with(&st, dir, KVF_STORE_CREATE, 1 << 20, 0, NULL), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_store_bind(st, &s, &err), KVF_OK);
    rig_ingest(st, "a", a, 3000);
    pthread_t thread[2];
    reading r[2];
    kvf_token *tokens[2];
    for (int i = 0; i < 2; i++) {
        r[i] = (reading){ .text = a, .n = 3000 };
        cr_assert_eq(kvf_store_tier_open(&r[i].t, st, "a", &tokens[i], &err), KVF_OK);
        cr_assert_eq(pthread_create(&thread[i], NULL, read_on, &r[i]), 0);
    }
    rig_ingest(st, "b", b, N);
    for (int i = 0; i < 2; i++) {
        pthread_join(thread[i], NULL);
        kvf_free(&kvf_mem_default, tokens[i]);
        kvf_store_tier_close(r[i].t);
    }
    rig_check_doc(st, "b", b, N);
    rig_clean(st);
    kvf_store_close_at(st);
    free(a);
    free(b);
    rig_remove(dir);
}

Test(store, a_writers_tier_serves_what_is_committed)
{
    char dir[64];
    rig_folder(dir);
    enum { N = 5000 };
    kvf_token *text = rig_text(N, 1, 0);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    kvf_writer *w, *other;
    kvf_store_doc d = { .name = "x", .tokens = text, .n_token = N };
    int64_t have, done;
    cr_assert_eq(kvf_writer_open(&w, st, &d, &have, &err), KVF_OK);
    cr_assert_eq(kvf_writer_open(&other, st, &d, &have, &err), KVF_ERR_BUSY);
    kvf_tier *t = kvf_writer_tier(w);
    cr_assert_eq(t->n_token, 0);
    rig_group *room = malloc(sizeof *room);
    for (int64_t g = 0; g < 3; g++) {
        kvf_group_data data = rig_make(room, text, N, g);
        cr_assert_eq(kvf_writer_finish(w, NULL, 0, &err), KVF_ERR_STATE);
        cr_assert_eq(kvf_writer_put(w, &data, &err), KVF_OK);
        cr_assert_eq(kvf_writer_put(w, &data, &err), KVF_ERR_INTERNAL); /* not the next */
        cr_assert_eq(kvf_writer_poll(w, true, &done, &err), KVF_OK);
        cr_assert_eq(done, g + 1);
        cr_assert_eq(t->n_token, g < 2 ? (g + 1) * 2048 : N);
        rig_check_tier(t, text, N);
    }
    cr_assert_eq(kvf_store_doc_remove(st, "x", &err), KVF_ERR_BUSY);
    cr_assert_eq(kvf_writer_finish(w, NULL, 0, &err), KVF_OK, "%s", err.msg);
    kvf_writer_close(w);
    rig_check_doc(st, "x", text, N);
    free(room);
    kvf_store_close_at(st);
    free(text);
    rig_remove(dir);
}

Test(store, one_writer_at_a_time_and_any_number_of_readers)
{
    char dir[64];
    rig_folder(dir);
    kvf_token *text = rig_text(3000, 1, 0);
    kvf_store *reader, *writer, *second;
    cr_assert_eq(rig_open_with(&reader, dir, KVF_STORE_READ, 0, 0, NULL), KVF_ERR_NOT_FOUND);
    cr_assert_eq(rig_open_with(&writer, dir, KVF_STORE_WRITE, 0, 0, NULL), KVF_ERR_NOT_FOUND);
    writer = rig_open(dir, KVF_STORE_CREATE);
    reader = rig_open(dir, KVF_STORE_READ);
    cr_assert_eq(rig_open_with(&second, dir, KVF_STORE_WRITE, 0, 0, NULL), KVF_ERR_BUSY);
    cr_assert_null(second);
    rig_ingest(writer, "a", text, 3000);
    rig_check_doc(reader, "a", text, 3000); /* opened before there was a document */
    cr_assert_not_null(kvf_store_get_shape(reader));
    int64_t have;
    cr_assert_eq(rig_write(reader, "b", text, 3000, 1, &have), KVF_ERR_STATE);
    cr_assert_eq(kvf_store_doc_remove(reader, "a", &err), KVF_ERR_STATE);
    kvf_store_close_at(writer);
    cr_assert_eq(rig_open_with(&second, dir, KVF_STORE_WRITE, 0, 0, NULL), KVF_OK, "%s", err.msg);
    kvf_store_close_at(reader);
    rig_check_doc(second, "a", text, 3000);
    kvf_store_close_at(second);
    free(text);
    rig_remove(dir);
}

/* The maps of before the fork stay in the child, with the same file behind them. */
Test(store, a_child_reads_beside_the_maps_it_inherited)
{
    enum { N = 5000 };
    char dir[64], other[64];
    rig_folder(dir);
    rig_folder(other);
    kvf_token *a = rig_text(N, 1, 0);
    kvf_store *above = rig_open(other, KVF_STORE_CREATE), *st = rig_open(dir, KVF_STORE_CREATE);
    rig_ingest(st, "a", a, N);
    kvf_store_close_at(above); /* room for the child's map before or after ours, as the system likes */
    pid_t child = fork();
    if (child == 0) {
        kvf_store_params p = { .size = sizeof p };
        kvf_store *own;
        kvf_tier *t;
        kvf_token *tokens;
        if (kvf_store_open_at(&own, &kvf_mem_default, NULL, dir, &p, &err) < 0) _exit(2);
        if (kvf_store_tier_open(&t, own, "a", &tokens, &err) < 0) _exit(3);
        for (int64_t k = 0; k < N / 128; k++) {
            uint16_t got[RIG_SLOT / 2], want[RIG_SLOT / 2];
            rig_slot(a, N, 1, k, want);
            if (t->ops->read(t, 1, k, got, &err) < 0 || memcmp(got, want, sizeof got) != 0) _exit(4);
        }
        _exit(0);
    }
    int status = 0;
    cr_assert_eq(waitpid(child, &status, 0), child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child says %d", WEXITSTATUS(status));
    rig_check_doc(st, "a", a, N);
    kvf_store_close_at(st);
    free(a);
    rig_remove(dir);
    rig_remove(other);
}

Test(store, another_process_reads_while_this_one_writes)
{
    char dir[64];
    rig_folder(dir);
    enum { N = 12000 };
    kvf_token *a = rig_text(3000, 1, 0), *b = rig_text(N, 2, 0);
    kvf_store *st;
    kvf_store_shape s = rig_shape();
    cr_assert_eq(rig_open_with(&st, dir, KVF_STORE_CREATE, 1 << 20, 0, NULL), KVF_OK);
    cr_assert_eq(kvf_store_bind(st, &s, &err), KVF_OK);
    rig_ingest(st, "a", a, 3000);
    kvf_store_close_at(st);
    int ready[2];
    cr_assert_eq(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        kvf_store_params p = { .size = sizeof p, .map_bytes = 1 << 20 };
        if (kvf_store_open_at(&st, &kvf_mem_default, NULL, dir, &p, &err) < 0) _exit(2);
        kvf_tier *t;
        kvf_token *tokens;
        if (kvf_store_tier_open(&t, st, "a", &tokens, &err) < 0 || write(ready[1], "x", 1) != 1) _exit(3);
        int whole = 0;
        for (int i = 0; i < 400 && !whole; i++) {
            uint16_t got[RIG_SLOT / 2], want[RIG_SLOT / 2];
            for (int64_t k = 0; k < 23; k++) {
                rig_slot(a, 3000, 1, k, want);
                if (t->ops->read(t, 1, k, got, &err) < 0 || memcmp(got, want, sizeof got) != 0) _exit(4);
            }
            kvf_document d;
            kvf_status rc = kvf_store_doc_get(st, "b", 0, &d, &err);
            if (rc < 0 && rc != KVF_ERR_NOT_FOUND) _exit(5);
            if (rc >= 0 && d.n_tokens % 2048 && d.n_tokens != N) _exit(6);
            whole = rc >= 0 && d.complete;
            kvf_store_doc_free(st, &d);
            usleep(5000);
        }
        kvf_verify v = { .size = sizeof v };
        if (!whole || kvf_store_check(st, &v, &err) < 0 || v.n_bad) _exit(7);
        kvf_free(&kvf_mem_default, tokens);
        kvf_store_tier_close(t);
        kvf_store_close_at(st);
        free(a);
        free(b);
        _exit(0);
    }
    char c;
    cr_assert_eq(read(ready[0], &c, 1), 1);
    st = rig_open(dir, KVF_STORE_WRITE);
    rig_ingest(st, "b", b, N);
    cr_assert_eq(kvf_store_rewrite(st, &err), KVF_ERR_BUSY, "the child has it open");
    int status;
    waitpid(child, &status, 0);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child: %d", status);
    cr_assert_eq(kvf_store_rewrite(st, &err), KVF_OK, "%s", err.msg);
    kvf_store_close_at(st);
    free(a);
    free(b);
    rig_remove(dir);
}

Test(store, another_model_or_policy_is_refused_by_name)
{
    char dir[64];
    rig_folder(dir);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    kvf_store_shape s = rig_shape(), t = s;
    cr_assert_eq(kvf_store_bind(st, &s, &err), KVF_OK);
    t.model[1]++;
    snprintf(t.model_name, sizeof t.model_name, "other");
    cr_assert_eq(kvf_store_bind(st, &t, &err), KVF_ERR_MISMATCH);
    cr_assert(strstr(err.msg, "'tiny'") && strstr(err.msg, "'other'"), "%s", err.msg);
    t = s;
    snprintf(t.policy, sizeof t.policy, "infllm:window=512");
    cr_assert_eq(kvf_store_bind(st, &t, &err), KVF_ERR_MISMATCH);
    cr_assert(strstr(err.msg, "window=256") && strstr(err.msg, "window=512"), "%s", err.msg);
    t = s;
    t.digest_bytes += 2;
    cr_assert_eq(kvf_store_bind(st, &t, &err), KVF_ERR_MISMATCH);
    t = s;
    t.slot_bytes++;
    cr_assert_eq(kvf_store_bind(st, &t, &err), KVF_ERR_UNSUPPORTED);
    kvf_store_close_at(st);
    rig_remove(dir);
}

Test(store, names_are_utf8_without_control_characters)
{
    static const char *const good[] = { "a", "book.pdf", "\xc3\xa4\xe2\x82\xac\xf0\x9f\x98\x80", "a b/c'\"" };
    static const char *const bad[] = { "", "a\nb", "\x7f", "\xc2\x85", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xff", "\xe2\x82" };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) cr_assert(kvf_name_valid(good[i], strlen(good[i])), "%zu", i);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) cr_assert_not(kvf_name_valid(bad[i], strlen(bad[i])), "%zu", i);
    char text[402];
    memset(text, 'x', sizeof text);
    cr_assert(kvf_name_valid(text, 400));
    cr_assert_not(kvf_name_valid(text, 401));
    kvf_key k;
    text[401] = 0;
    cr_assert_eq(kvf_key_name(&k, text, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_key_name(&k, NULL, &err), KVF_ERR_ARG);
}

Test(store, int8_keeps_each_number_within_half_a_step)
{
    enum { H = 2, D = 64, ELEMS = 2 * H * 128 * D };
    kvf_block_codec c = { KVF_CODEC_INT8, H, D };
    uint16_t *in = malloc(ELEMS * 2), *out = malloc(ELEMS * 2);
    uint8_t *bytes = malloc(kvf_codec_bytes(&c));
    cr_assert_eq(kvf_codec_bytes(&c), (size_t)(H * (2 * 128 * D + 4 * D + 4 * 128)));
    uint32_t seed = 1;
    double error = 0, power = 0;
    for (int i = 0; i < ELEMS; i++) {
        float sum = -6;
        for (int k = 0; k < 12; k++) {
            seed = seed * 1664525u + 1013904223u;
            sum += (float)(seed >> 8) / 16777216.0f;
        }
        /* Keys have channels far larger than others. */
        in[i] = kvf_f16_from_f32(sum * (i < ELEMS / 2 && i % D == 3 ? 40.0f : 1.0f));
    }
    kvf_codec_encode(&c, in, 128, bytes);
    kvf_codec_decode(&c, bytes, out);
    for (int i = 0; i < ELEMS; i++) {
        int half = i / (ELEMS / 2), head = i / (128 * D) % H, t = i / D % 128, e = i % D;
        float top = 0, x = kvf_f32_from_f16(in[i]), y = kvf_f32_from_f16(out[i]);
        for (int j = 0; j < (half ? D : 128); j++) {
            float v = fabsf(kvf_f32_from_f16(in[half * (ELEMS / 2) + (head * 128 + (half ? t : j)) * D + (half ? j : e)]));
            top = v > top ? v : top;
        }
        cr_assert_leq(fabsf(x - y), top / 127 * 0.5f * 1.001f + fabsf(x) * 0x1p-11f);
        error += (double)(x - y) * (x - y);
        power += (double)x * x;
    }
    printf("int8: relative error %.5f\n", sqrt(error / power));
    cr_assert_lt(sqrt(error / power), 0.01);
    /* Hostile numbers and short blocks: finite, and what is absent is zero. */
    for (int i = 0; i < ELEMS; i++) in[i] = (uint16_t)((uint32_t)i * 40503u);
    kvf_codec_encode(&c, in, 5, bytes);
    kvf_codec_decode(&c, bytes, out);
    for (int i = 0; i < ELEMS; i++) {
        float y = kvf_f32_from_f16(out[i]);
        cr_assert(isfinite(y) && (i / D % 128 < 5 || y == 0));
    }
    memset(bytes, 0xff, kvf_codec_bytes(&c));
    kvf_codec_decode(&c, bytes, out);
    memset(bytes, 0x7e, kvf_codec_bytes(&c));
    kvf_codec_decode(&c, bytes, out);
    for (int i = 0; i < ELEMS; i++) cr_assert(isfinite(kvf_f32_from_f16(out[i])));
    free(in);
    free(out);
    free(bytes);
}

Test(store, an_int8_store_is_half_and_close)
{
    char dir[64];
    rig_folder(dir);
    enum { N = 3000 };
    kvf_token *text = rig_text(N, 1, 0);
    kvf_store *st;
    kvf_store_shape s = rig_shape();
    cr_assert_eq(rig_open_with(&st, dir, KVF_STORE_CREATE, 0, KVF_CODEC_INT8, NULL), KVF_OK);
    cr_assert_eq(kvf_store_bind(st, &s, &err), KVF_OK);
    rig_ingest(st, "a", text, N);
    kvf_store_close_at(st);
    st = rig_open(dir, KVF_STORE_WRITE); /* asks for f16: the store keeps its own */
    rig_clean(st);
    kvf_store_info info;
    cr_assert_eq(kvf_store_info_get(st, &info, &err), KVF_OK);
    cr_assert(info.codec == KVF_CODEC_INT8);
    cr_assert_lt(info.kv_bytes, (size_t)info.n_blocks * RIG_SLOT);
    kvf_tier *t;
    kvf_token *tokens;
    cr_assert_eq(kvf_store_tier_open(&t, st, "a", &tokens, &err), KVF_OK);
    uint16_t want[RIG_SLOT / 2], got[RIG_SLOT / 2];
    for (int64_t b = 0; b < 24; b++) {
        rig_slot(text, N, 1, b, want);
        cr_assert_eq(t->ops->read(t, 1, b, got, &err), KVF_OK);
        for (int i = 0; i < RIG_SLOT / 2; i++) cr_assert_float_eq(kvf_f32_from_f16(got[i]), kvf_f32_from_f16(want[i]), 0.01);
    }
    kvf_free(&kvf_mem_default, tokens);
    kvf_store_tier_close(t);
    kvf_store_close_at(st);
    free(text);
    rig_remove(dir);
}

Test(store, two_ingestions_of_a_text_leave_the_same_contents)
{
    enum { N = 6500 };
    kvf_token *text = rig_text(N, 4, 0);
    char one[64], two[64];
    rig_folder(one);
    rig_folder(two);
    kvf_store *a = rig_open(one, KVF_STORE_CREATE), *b = rig_open(two, KVF_STORE_CREATE);
    int64_t have;
    rig_ingest(a, "x", text, N);
    for (int64_t g = 1; g <= 4; g++) cr_assert_eq(rig_write(b, "x", text, N, g, &have), KVF_OK);
    kvf_store_info i, j;
    cr_assert_eq(kvf_store_info_get(a, &i, &err), KVF_OK);
    cr_assert_eq(kvf_store_info_get(b, &j, &err), KVF_OK);
    cr_assert(i.n_tokens == j.n_tokens && i.n_blocks == j.n_blocks && i.n_documents == j.n_documents && !j.n_unfinished);
    rig_check_doc(a, "x", text, N);
    rig_check_doc(b, "x", text, N);
    kvf_store_close_at(a);
    kvf_store_close_at(b);
    rig_remove(one);
    rig_remove(two);
    free(text);
}
