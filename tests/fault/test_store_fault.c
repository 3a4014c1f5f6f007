/* test_store_fault.c - the store when things go wrong: killed writers, full disks, files that are damaged,
 * cut, foreign or made by a newer version, folders that cannot be written, memory that runs out.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <lmdb.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "memory/pages.h"
#include "memory/record.h"
#include "tests/fault/faulty.h"
#include "store_rig.h"

static uint8_t *read_file(const char *folder, size_t *n)
{
    char path[128];
    struct stat s;
    snprintf(path, sizeof path, "%s/data.mdb", folder);
    int fd = open(path, O_RDONLY);
    cr_assert(fd >= 0 && fstat(fd, &s) == 0);
    uint8_t *data = malloc((size_t)s.st_size);
    cr_assert_eq(read(fd, data, (size_t)s.st_size), s.st_size);
    close(fd);
    *n = (size_t)s.st_size;
    return data;
}

static void write_file(const char *folder, const uint8_t *data, size_t n)
{
    char path[128];
    snprintf(path, sizeof path, "%s/data.mdb", folder);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    cr_assert(fd >= 0 && write(fd, data, n) == (ssize_t)n);
    close(fd);
}

/* A store with two documents that share a group, a note, tails. */
static void make_store(char dir[64], kvf_token **text, int64_t n)
{
    rig_folder(dir);
    *text = rig_text(n, 1, 0);
    kvf_token *fork = rig_text(3000, 7, 2100);
    for (int64_t i = 0; i < 2048; i++) fork[i] = (*text)[i];
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    rig_ingest(st, "book", *text, n);
    rig_ingest(st, "fork", fork, 3000);
    kvf_store_close_at(st);
    free(fork);
}

/* Open and use in every way; returns how many complaints there were. Any status will do, a crash will not. */
static int use_all(const char *dir, bool write)
{
    kvf_store *st;
    int bad = 0;
    if (rig_open_with(&st, dir, write ? KVF_STORE_WRITE : KVF_STORE_READ, 0, 0, NULL) < 0) {
        cr_assert_null(st);
        cr_assert(err.msg[0] && memchr(err.msg, 0, sizeof err.msg));
        return 1;
    }
    kvf_verify v = { .size = sizeof v };
    kvf_store_info info;
    kvf_store_shape s = rig_shape();
    bad += kvf_store_check(st, &v, &err) < 0 || v.n_bad;
    bad += kvf_store_info_get(st, &info, &err) < 0;
    bad += kvf_store_bind(st, &s, &err) < 0;
    for (int64_t i = 0; i < 3; i++) {
        kvf_document d;
        kvf_status rc = kvf_store_doc_get(st, NULL, i, &d, &err);
        bad += rc < 0 && rc != KVF_ERR_NOT_FOUND;
        kvf_tier *t = NULL;
        kvf_token *tokens = NULL;
        if (rc >= 0 && kvf_store_tier_open(&t, st, d.name, &tokens, &err) >= 0) {
            uint8_t slot[RIG_SLOT];
            const void *p;
            void *tail;
            size_t n;
            bool fits = kvf_store_get_shape(st) && kvf_store_get_shape(st)->slot_bytes == RIG_SLOT;
            for (int64_t b = 0; fits && b < (t->n_token + 127) / 128; b++) bad += t->ops->read(t, 1, b, slot, &err) < 0;
            for (int64_t g = 0; g < (t->n_token + 2047) / 2048; g++) bad += t->ops->digests(t, 1, g, &p, &err) < 0;
            bad += kvf_store_read_tail(t, &tail, &n, &err) < 0;
            kvf_free(&kvf_mem_default, tail);
            kvf_free(&kvf_mem_default, tokens);
        } else {
            bad += rc >= 0;
        }
        kvf_store_tier_close(t);
        kvf_store_doc_free(st, &d);
    }
    if (write && kvf_store_get_shape(st)) {
        kvf_token *text = rig_text(2100, 99, 0);
        int64_t have;
        bool fits = kvf_store_bind(st, &s, &err) >= 0;
        if (fits) bad += rig_write(st, "new", text, 2100, INT64_MAX, &have) < 0;
        bad += kvf_store_doc_remove(st, "fork", &err) < 0;
        bad += kvf_store_doc_remove(st, "book", &err) < 0;
        free(text);
    }
    kvf_store_close_at(st);
    return bad;
}

Test(store_fault, killed_at_any_moment_it_has_whole_groups_and_goes_on, .timeout = 600)
{
#if defined(__SANITIZE_THREAD__)
    cr_skip_test("the thread sanitizer lets no child of a fork start threads");
#endif
    enum { N = 20000 };
    const char *many = getenv("KVF_TEST_KILLS"); /* the slow tests ask for more */
    const int kills = many ? atoi(many) : 40;
    kvf_token *text = rig_text(N, 1, 0);
    uint32_t seed = 12345, whole = 0;
    int n_partial = 0, n_killed = 0;
    for (int k = -1; k < 8 * kills && n_killed < kills; k++) {
        char dir[64];
        rig_folder(dir);
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        pid_t child = fork();
        if (child == 0) {
            kvf_store *st = NULL;
            kvf_store_shape s = rig_shape();
            int64_t have;
            if (rig_open_with(&st, dir, KVF_STORE_CREATE, 1 << 20, 0, NULL) < 0 || kvf_store_bind(st, &s, &err) < 0) _exit(1);
            _exit(rig_write(st, "x", text, N, INT64_MAX, &have) < 0);
        }
        seed = seed * 1664525u + 1013904223u;
        int status;
        /* The first is left alone: how long it takes, for moments all along the way. */
        if (k >= 0) {
            usleep((seed >> 8) % whole);
            kill(child, SIGKILL);
        }
        waitpid(child, &status, 0);
        clock_gettime(CLOCK_MONOTONIC, &to);
        if (k < 0) whole = (uint32_t)((to.tv_sec - from.tv_sec) * 1000000 + (to.tv_nsec - from.tv_nsec) / 1000) + 1;
        n_killed += WIFSIGNALED(status);
        cr_assert(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
        /* On a machine whose load changes: sooner after one that was done before its moment, else later again. */
        if (k >= 0) whole = WIFSIGNALED(status) ? whole + whole / 16 : whole - whole / 8;
        kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
        rig_clean(st);
        kvf_document d;
        if (kvf_store_doc_get(st, "x", 0, &d, &err) == KVF_OK) {
            cr_assert(d.n_tokens == N || d.n_tokens % 2048 == 0);
            n_partial += !d.complete;
            rig_check_doc(st, "x", text, d.n_tokens);
            kvf_store_doc_free(st, &d);
        }
        rig_ingest(st, "x", text, N);
        rig_check_doc(st, "x", text, N);
        rig_clean(st);
        kvf_store_close_at(st);
        rig_remove(dir);
    }
    printf("%d killed, %d in the middle of a document\n", n_killed, n_partial);
    cr_assert(n_killed == kills && n_partial > kills / 8, "%d killed, %d in the middle", n_killed, n_partial);
    free(text);
}

/* Fill `dir`'s disk; then nothing is lost, and with room the same call goes on. */
static void fill_up(const char *dir, void (*make_room)(const char *dir))
{
    enum { N = 100000 };
    kvf_token *text = rig_text(N, 1, 0);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    int64_t have;
    cr_assert_eq(rig_write(st, "x", text, N, INT64_MAX, &have), KVF_ERR_SPACE, "%d %s", err.code, err.msg);
    cr_assert_not_null(strstr(err.msg, "no space"), "%s", err.msg);
    rig_clean(st);
    kvf_document d;
    cr_assert_eq(kvf_store_doc_get(st, "x", 0, &d, &err), KVF_OK);
    cr_assert(d.n_tokens > 0 && d.n_tokens % 2048 == 0 && !d.complete);
    kvf_store_doc_free(st, &d);
    make_room(dir);
    cr_assert_eq(rig_write(st, "x", text, N, INT64_MAX, &have), KVF_OK, "%s", err.msg);
    cr_assert_gt(have, 0);
    rig_check_doc(st, "x", text, N);
    rig_clean(st);
    kvf_store_close_at(st);
    free(text);
}

static void lift_limit(const char *dir)
{
    struct rlimit r;
    (void)dir;
    getrlimit(RLIMIT_FSIZE, &r);
    r.rlim_cur = r.rlim_max;
    setrlimit(RLIMIT_FSIZE, &r);
}

Test(store_fault, a_file_that_may_not_grow_is_a_full_disk)
{
    char dir[64];
    rig_folder(dir);
    struct rlimit r;
    getrlimit(RLIMIT_FSIZE, &r);
    r.rlim_cur = 3 << 20;
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &r), 0);
    fill_up(dir, lift_limit);
    rig_remove(dir);
}

static void enlarge(const char *dir) { cr_assert_eq(mount("none", dir, "tmpfs", MS_REMOUNT, "size=64m"), 0); }

Test(store_fault, a_full_disk_is_said_and_survived)
{
    char dir[64];
    rig_folder(dir);
    if (mount("none", dir, "tmpfs", 0, "size=4m") != 0) {
        rig_remove(dir);
        cr_skip_test("mounting is not permitted here");
    }
    fill_up(dir, enlarge);
    umount2(dir, MNT_DETACH);
    rig_remove(dir);
}

Test(store_fault, a_read_only_folder_is_read)
{
    char dir[64], path[128];
    kvf_token *text;
    make_store(dir, &text, 5000);
    bool mounted = geteuid() == 0 && mount(dir, dir, NULL, MS_BIND, NULL) == 0 &&
                   mount("none", dir, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL) == 0;
    if (!mounted && geteuid() == 0) {
        umount2(dir, MNT_DETACH);
        rig_remove(dir);
        cr_skip_test("root may write everywhere, and mounting is not permitted here");
    }
    snprintf(path, sizeof path, "%s/data.mdb", dir);
    if (!mounted) {
        chmod(path, 0444);
        chmod(dir, 0555);
    }
    kvf_store *st = rig_open(dir, KVF_STORE_READ), *two;
    rig_check_doc(st, "book", text, 5000);
    rig_clean(st);
    kvf_status rc = rig_open_with(&two, dir, KVF_STORE_WRITE, 0, 0, NULL);
    cr_assert(rc == KVF_ERR_IO || rc == KVF_ERR_STATE, "%d", rc);
    kvf_store_close_at(st);
    if (mounted) umount2(dir, MNT_DETACH);
    else chmod(dir, 0755);
    rig_remove(dir);
    free(text);
}

/* Each byte of each page that holds keys, and many of the values, one at a time: what can be found is found
 * (some bytes mean nothing: what lies between entries, the older of the two heads), nothing crashes, and
 * what reads without complaint reads the truth. */
Test(store_fault, a_flipped_byte_anywhere_is_found_or_means_nothing, .timeout = 120)
{
    char dir[64];
    kvf_token *text;
    make_store(dir, &text, 2300);
    kvf_store *st = rig_open(dir, KVF_STORE_WRITE);
    cr_assert_eq(kvf_store_rewrite(st, &err), KVF_OK); /* no pages that nobody reads */
    kvf_store_close_at(st);
    size_t n;
    uint8_t *file = read_file(dir, &n);
    int n_found = 0, n_all = 0;
    uint32_t seed = 99;
    for (size_t at = 0; at < n;) {
        size_t page = at / 4096;
        bool keys = page >= 2 && (file[page * 4096 + 10] & 3) && memcmp(file + page * 4096, &page, 8) == 0;
        size_t lower = file[page * 4096 + 12] | (size_t)file[page * 4096 + 13] << 8, upper = file[page * 4096 + 14] | (size_t)file[page * 4096 + 15] << 8;
        if (keys && at % 4096 >= lower && at % 4096 < upper) at = page * 4096 + upper; /* room between entries */
        if (page < 2 && at % 4096 >= KVF_PAGES_HEAD) {
            at = (page + 1) * 4096;
            continue;
        }
        uint8_t flip = (uint8_t)(1u << (seed >> 20) % 8);
        file[at] ^= flip;
        write_file(dir, file, n);
        bool found = use_all(dir, n_all % 4 == 3) > 0;
        n_found += found;
        if (!found && n_all % 4 != 3) {
            st = rig_open(dir, KVF_STORE_READ);
            rig_check_doc(st, "book", text, 2300);
            kvf_store_close_at(st);
        }
        file[at] ^= flip;
        n_all++;
        seed = seed * 1664525u + 1013904223u;
        at += 1 + (seed >> 8) % (page < 2 || keys ? 29 : 3989);
    }
    printf("%d of %d flips were found\n", n_found, n_all);
    cr_assert_gt(n_found, n_all / 2, "%d of %d", n_found, n_all);
    free(file);
    free(text);
    rig_remove(dir);
}

/* A byte of the value of a key, in every table: found by verify, refused by what reads it. */
Test(store_fault, a_flipped_byte_in_any_table_is_found)
{
    static const char *const tables[] = { "meta", "doc", "note", "chain", "tok", "blk", "rep", "tail" };
    char dir[64];
    kvf_token *text;
    make_store(dir, &text, 2300);
    size_t n;
    uint8_t *file = read_file(dir, &n);
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        for (int where = 0; where < 3; where++) {
            write_file(dir, file, n);
            MDB_env *env;
            MDB_txn *txn;
            MDB_dbi db;
            MDB_cursor *c;
            MDB_val k, v;
            cr_assert_eq(mdb_env_create(&env), 0);
            mdb_env_set_maxdbs(env, 8);
            cr_assert_eq(mdb_env_open(env, dir, 0, 0666), 0);
            cr_assert_eq(mdb_txn_begin(env, NULL, 0, &txn), 0);
            cr_assert_eq(mdb_dbi_open(txn, tables[i], 0, &db), 0);
            cr_assert_eq(mdb_cursor_open(txn, db, &c), 0);
            cr_assert_eq(mdb_cursor_get(c, &k, &v, MDB_FIRST), 0);
            uint8_t *copy = malloc(v.mv_size);
            memcpy(copy, v.mv_data, v.mv_size);
            size_t at = where == 0 ? 0 : where == 1 ? v.mv_size / 3 : v.mv_size - 1;
            if (i == 6 && where == 2) at = 48 + RIG_DIGEST * 2 - 1; /* the last of digests; then padding */
            copy[at] ^= 0x10;
            v.mv_data = copy;
            char key[64];
            memcpy(key, k.mv_data, k.mv_size);
            k.mv_data = key;
            cr_assert_eq(mdb_put(txn, db, &k, &v, 0), 0);
            free(copy);
            mdb_cursor_close(c);
            cr_assert_eq(mdb_txn_commit(txn), 0);
            mdb_env_close(env);
            kvf_store *st;
            if (rig_open_with(&st, dir, KVF_STORE_READ, 0, 0, NULL) >= 0) {
                cr_assert_neq(i, 0, "the head was read");
                cr_assert_gt(rig_bad(st), 0, "table %s, byte %zu", tables[i], at);
                kvf_store_close_at(st);
            }
            cr_assert_gt(use_all(dir, false), 0);
            use_all(dir, true);
        }
    }
    free(file);
    free(text);
    rig_remove(dir);
}

Test(store_fault, a_file_cut_anywhere_is_refused)
{
    char dir[64];
    kvf_token *text;
    make_store(dir, &text, 5000);
    size_t n;
    uint8_t *file = read_file(dir, &n);
    for (size_t cut = 0; cut < n; cut += cut < 9000 ? 97 : 4096 * 3 + 5) {
        write_file(dir, file, cut);
        kvf_store *st;
        kvf_status rc = rig_open_with(&st, dir, KVF_STORE_READ, 0, 0, NULL);
        cr_assert(rc == KVF_ERR_FORMAT || (cut == 0 && rc == KVF_ERR_NOT_FOUND), "%zu of %zu bytes: %d %s", cut, n, rc, rc < 0 ? err.msg : "");
    }
    free(file);
    free(text);
    rig_remove(dir);
}

Test(store_fault, what_is_no_store_is_refused)
{
    char dir[64], cmd[256];
    rig_folder(dir);
    uint8_t junk[20000];
    uint32_t seed = 5;
    for (int k = 0; k < 50; k++) {
        for (size_t i = 0; i < sizeof junk; i++) {
            seed = seed * 1664525u + 1013904223u;
            junk[i] = (uint8_t)(seed >> 24);
        }
        write_file(dir, junk, sizeof junk);
        kvf_store *st;
        cr_assert_eq(rig_open_with(&st, dir, k % 3, 0, 0, NULL), KVF_ERR_FORMAT);
    }
    /* Another program's LMDB file. */
    snprintf(cmd, sizeof cmd, "rm -f %s/*", dir);
    cr_assert_eq(system(cmd), 0);
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi db;
    MDB_val k = { 1, "k" }, v = { 1, "v" };
    cr_assert_eq(mdb_env_create(&env), 0);
    cr_assert_eq(mdb_env_open(env, dir, 0, 0666), 0);
    cr_assert_eq(mdb_txn_begin(env, NULL, 0, &txn), 0);
    cr_assert_eq(mdb_dbi_open(txn, NULL, 0, &db), 0);
    cr_assert_eq(mdb_put(txn, db, &k, &v, 0), 0);
    cr_assert_eq(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
    kvf_store *st;
    for (int mode = 0; mode < 3; mode++) cr_assert_eq(rig_open_with(&st, dir, mode, 0, 0, NULL), KVF_ERR_FORMAT, "%s", err.msg);
    rig_remove(dir);
}

Test(store_fault, a_newer_version_is_said)
{
    char dir[64];
    rig_folder(dir);
    kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
    kvf_store_close_at(st);
    uint8_t rec[KVF_META_BYTES];
    kvf_store_shape s = rig_shape();
    kvf_meta_rec m = { .version = KVF_STORE_VERSION + 1, .has_shape = true, .shape = s };
    kvf_meta_put(rec, &m);
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi db;
    MDB_val k = { 5, "store" }, v = { sizeof rec, rec };
    cr_assert_eq(mdb_env_create(&env), 0);
    mdb_env_set_maxdbs(env, 8);
    cr_assert_eq(mdb_env_open(env, dir, 0, 0666), 0);
    cr_assert_eq(mdb_txn_begin(env, NULL, 0, &txn), 0);
    cr_assert_eq(mdb_dbi_open(txn, "meta", 0, &db), 0);
    cr_assert_eq(mdb_put(txn, db, &k, &v, 0), 0);
    cr_assert_eq(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
    cr_assert_eq(rig_open_with(&st, dir, KVF_STORE_READ, 0, 0, NULL), KVF_ERR_UNSUPPORTED, "%s", err.msg);
    cr_assert_not_null(strstr(err.msg, "version 2"), "%s", err.msg);
    rig_remove(dir);
}

static kvf_status run_all(const char *dir, const kvf_mem *mem, const kvf_token *text, int64_t n)
{
    kvf_store *st = NULL;
    kvf_store_shape s = rig_shape();
    kvf_document d = { 0 };
    kvf_verify v = { .size = sizeof v };
    kvf_tier *t = NULL;
    kvf_token *tokens = NULL;
    void *tail = NULL;
    size_t n_tail;
    const void *p;
    int64_t have;
    kvf_status rc = rig_open_with(&st, dir, KVF_STORE_CREATE, 0, 0, mem);
    if (rc >= 0) rc = kvf_store_bind(st, &s, &err);
    if (rc >= 0) rc = rig_write(st, "x", text, n, INT64_MAX, &have);
    if (rc >= 0) rc = kvf_store_doc_get(st, "x", 0, &d, &err);
    if (rc >= 0) rc = kvf_store_tier_open(&t, st, "x", &tokens, &err);
    if (rc >= 0) rc = t->ops->digests(t, 0, 0, &p, &err);
    if (rc >= 0) rc = kvf_store_read_tail(t, &tail, &n_tail, &err);
    if (st) kvf_store_doc_free(st, &d);
    kvf_free(mem, tail);
    kvf_free(mem, tokens);
    kvf_store_tier_close(t);
    if (rc >= 0) rc = kvf_store_check(st, &v, &err);
    if (rc >= 0) rc = kvf_store_rewrite(st, &err);
    if (rc >= 0) rc = kvf_store_doc_remove(st, "x", &err);
    kvf_store_close_at(st);
    return rc;
}

Test(store_fault, every_allocation_may_fail)
{
    char dir[64];
    rig_folder(dir);
    kvf_token *text = rig_text(5000, 1, 0);
    faulty f = { 0 };
    kvf_mem mem = { faulty_alloc, faulty_release, &f };
    long k = 1;
    for (;; k++) {
        atomic_store(&f.n_alloc, 0);
        atomic_store(&f.fail_at, k);
        kvf_status rc = run_all(dir, &mem, text, 5000);
        cr_assert_eq(atomic_load(&f.n_live), 0, "allocation %ld leaks", k);
        if (atomic_load(&f.n_alloc) < k) {
            cr_assert_eq(rc, KVF_OK, "%s", err.msg);
            break;
        }
        cr_assert_eq(rc, KVF_ERR_NOMEM, "allocation %ld: %d", k, rc);
        kvf_store *st = rig_open(dir, KVF_STORE_CREATE);
        rig_clean(st);
        kvf_store_close_at(st);
        cr_assert_lt(k, 500);
    }
    printf("%ld allocations\n", k);
    cr_assert_gt(k, 10);
    free(text);
    rig_remove(dir);
}
