/* test_store_session.c - documents in a store through the public interface, on tiny models: what was
 * saved and loaded goes on to the same bits as what never stopped; interrupted, shared and repeated
 * ingestions; budgets; what must be refused.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <criterion/criterion.h>
#include <lmdb.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvfold/kvfold.h"

static kvf_error err;

#define SPEC "infllm:init=32,window=128,block=32,chunk=64,topk=3,ask=5,exact=32"
enum { N = 5000, QUESTION = 20 }; /* two groups and a part */

typedef struct rig {
    kvf_ctx *ctx;
    kvf_model *m;
    int32_t n_vocab;
    char dir[64];
    kvf_token *text; /* [N + QUESTION] */
} rig;

static rig open_rig(const char *model)
{
    rig r = { .dir = "/tmp/kvf_store_XXXXXX" };
    char path[256];
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = 2;
    cr_assert_eq(kvf_ctx_open(&r.ctx, &p, &err), KVF_OK, "%s", err.msg);
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, model);
    cr_assert_eq(kvf_model_open(&r.m, r.ctx, path, &err), KVF_OK, "%s", err.msg);
    kvf_model_info info = { .size = sizeof info };
    cr_assert_eq(kvf_model_get_info(r.m, &info, &err), KVF_OK);
    r.n_vocab = info.n_vocab;
    cr_assert_not_null(mkdtemp(r.dir));
    r.text = malloc((N + QUESTION) * sizeof *r.text);
    uint32_t seed = 7;
    for (int i = 0; i < N + QUESTION; i++) {
        seed = seed * 1664525u + 1013904223u;
        r.text[i] = (kvf_token)((seed >> 8) % (uint32_t)(r.n_vocab < 200 ? r.n_vocab : 200));
    }
    return r;
}

static void close_rig(rig *r)
{
    char cmd[128];
    kvf_model_close(r->m);
    kvf_ctx_close(r->ctx);
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", r->dir);
    cr_assert_eq(system(cmd), 0);
    free(r->text);
}

static kvf_store *open_store(const rig *r, int mode)
{
    kvf_store *st;
    kvf_store_params p;
    kvf_store_params_init(&p);
    p.mode = mode;
    p.map_bytes = (size_t)1 << 20; /* grows while it is written */
    cr_assert_eq(kvf_store_open(&st, r->ctx, r->dir, &p, &err), KVF_OK, "%s", err.msg);
    return st;
}

static kvf_session *open_session(const rig *r, const char *policy, size_t kv_bytes, int (*progress)(void *, int64_t, int64_t),
                                 void *user)
{
    kvf_session *s;
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.policy = policy;
    p.kv_bytes = kv_bytes;
    p.progress = progress;
    p.user = user;
    p.passages = 1;
    cr_assert_eq(kvf_session_open(&s, r->m, &p, &err), KVF_OK, "%s", err.msg);
    return s;
}

static kvf_status ingest(kvf_session *s, kvf_store *st, const char *name, const kvf_token *tokens, int64_t n)
{
    kvf_ingest in = { .size = sizeof in, .name = name, .tokens = tokens, .n = n, .note = "note", .note_bytes = 4 };
    return kvf_session_ingest(s, st, &in, &err);
}

/* The question, then 40 tokens of answer; logits after it. */
static void ask(const rig *r, kvf_session *s, kvf_token *answer, float *logits)
{
    float *l;
    cr_assert_eq(kvf_session_append(s, r->text + N, QUESTION, &err), KVF_OK, "%s", err.msg);
    for (int i = 0; i < 40; i++) {
        cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_OK, "%s", err.msg);
        int best = 0;
        for (int t = 1; t < r->n_vocab; t++)
            if (l[t] > l[best]) best = t;
        answer[i] = best;
        cr_assert_eq(kvf_session_append(s, &answer[i], 1, &err), KVF_OK, "%s", err.msg);
    }
    cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_OK);
    memcpy(logits, l, (size_t)r->n_vocab * sizeof *l);
}

typedef struct outcome {
    kvf_token answer[40];
    float logits[4096];
} outcome;

static void same(const rig *r, const outcome *a, const outcome *b)
{
    cr_assert_arr_eq(a->answer, b->answer, sizeof a->answer);
    cr_assert_arr_eq(a->logits, b->logits, (size_t)r->n_vocab * sizeof(float));
}

static const char *const specs[] = { SPEC, SPEC ",select=mean", SPEC ",select=paper", SPEC ",sets=kv,block=16,topk=9,ask=9",
                                     SPEC ",reading=none,select=bounds" };

Test(store_session, loaded_goes_on_as_if_it_had_never_stopped)
{
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        static const char *const models[] = { "qwen2", "llama", "gemma3", "qwen3", "llama-yarn" };
        rig r = open_rig(models[i]);
        kvf_model_info info = { .size = sizeof info };
        cr_assert_eq(kvf_model_get_info(r.m, &info, &err), KVF_OK);
        size_t budget = info.kv_bytes_per_token * 128 * 14; /* 14 blocks: hardly more than the window */
        outcome a, b, c, d;
        kvf_store *st = open_store(&r, KVF_STORE_CREATE);
        kvf_session *s = open_session(&r, specs[i], 0, NULL, NULL);
        cr_assert_eq(ingest(s, st, "doc", r.text, N), KVF_OK, "%s: %s", specs[i], err.msg);
        ask(&r, s, a.answer, a.logits); /* straight on */
        kvf_session_close(s);
        kvf_store_close(st);

        st = open_store(&r, KVF_STORE_READ);
        s = open_session(&r, specs[i], 0, NULL, NULL);
        cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_OK, "%s: %s", specs[i], err.msg);
        cr_assert_eq(kvf_session_tokens(s, NULL), N);
        ask(&r, s, b.answer, b.logits);
        cr_assert_eq(kvf_session_sync(s, r.text, N, &err), KVF_OK); /* back to the text, and again */
        cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_OK);
        ask(&r, s, c.answer, c.logits);
        kvf_session_close(s);
        s = open_session(&r, specs[i], budget, NULL, NULL);
        cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_OK, "%s", err.msg);
        ask(&r, s, d.answer, d.logits);
        kvf_stats stats = { .size = sizeof stats };
        cr_assert_eq(kvf_session_stats(s, &stats, &err), KVF_OK);
        cr_assert_leq(stats.kv_bytes, budget);
        size_t slot = (size_t)info.kv_bytes_per_token * 128 / (size_t)info.n_layer;
        cr_assert(0 < stats.n_block_misses && stats.n_block_misses <= stats.n_block_reads);
        cr_assert_eq(stats.moved_bytes % slot, 0);
        cr_assert_geq(stats.moved_bytes / slot, (uint64_t)stats.n_block_misses, "misses that moved nothing");
        kvf_session_close(s);
        kvf_store_close(st);
        same(&r, &a, &b);
        same(&r, &a, &c);
        same(&r, &a, &d);
        close_rig(&r);
    }
}

/* A text within the window: every key is read at its true distance, so the answer is that of full
 * attention but for one more rounding of keys to f16. */
Test(store_session, a_text_within_the_window_is_answered_as_by_full_attention)
{
    static const char *const models[] = { "qwen2", "llama", "gemma3", "qwen3", "llama-yarn", "llama-linear", "llama-rope-freqs" };
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        rig r = open_rig(models[i]);
        float *l, *want = malloc((size_t)r.n_vocab * sizeof *want);
        for (int full = 1; full >= 0; full--) {
            kvf_session *s = open_session(&r, full ? "full" : "infllm:window=256,chunk=64", 0, NULL, NULL);
            cr_assert_eq(kvf_session_sync(s, r.text, 250, &err), KVF_OK, "%s", err.msg);
            cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_OK);
            if (full) memcpy(want, l, (size_t)r.n_vocab * sizeof *want);
            float most = 0;
            for (int t = 0; t < r.n_vocab; t++) most = l[t] - want[t] > most ? l[t] - want[t] : want[t] - l[t] > most ? want[t] - l[t] : most;
            cr_assert_leq(most, 0.05f, "%s: %g", models[i], (double)most);
            kvf_session_close(s);
        }
        free(want);
        close_rig(&r);
    }
}

typedef struct stopper {
    int64_t at;
} stopper;

static int stop_at(void *user, int64_t done, int64_t total)
{
    (void)total;
    return done >= ((stopper *)user)->at;
}

Test(store_session, an_interrupted_ingestion_goes_on_and_ends_the_same)
{
    rig r = open_rig("qwen2");
    outcome a, b;
    kvf_store *st = open_store(&r, KVF_STORE_CREATE);
    kvf_session *s = open_session(&r, SPEC, 0, NULL, NULL);
    cr_assert_eq(ingest(s, st, "whole", r.text, N), KVF_OK, "%s", err.msg);
    ask(&r, s, a.answer, a.logits);
    kvf_session_close(s);
    kvf_store_close(st);
    const int64_t stops[] = { 64, 2048, 2112, 4096, 4990 };
    for (size_t i = 0; i < sizeof stops / sizeof *stops; i++) {
        rig q = open_rig("qwen2");
        stopper stop = { stops[i] };
        st = open_store(&q, KVF_STORE_CREATE);
        s = open_session(&q, SPEC, 0, stop_at, &stop);
        cr_assert_eq(ingest(s, st, "doc", q.text, N), KVF_ERR_CANCELLED);
        cr_assert_eq(kvf_session_load(s, st, "doc", &err), stops[i] < 2048 ? KVF_ERR_NOT_FOUND : KVF_ERR_STATE, "%s", err.msg);
        kvf_session_close(s);
        kvf_store_close(st);
        st = open_store(&q, KVF_STORE_WRITE);
        s = open_session(&q, SPEC, 0, NULL, NULL);
        cr_assert_eq(ingest(s, st, "doc", q.text, N), KVF_OK, "%s", err.msg);
        kvf_stats stats = { .size = sizeof stats };
        kvf_session_stats(s, &stats, &err);
        cr_assert_eq(stats.n_reused_tokens, stops[i] / 2048 * 2048);
        cr_assert_eq(stats.n_computed_tokens, N - stops[i] / 2048 * 2048);
        ask(&q, s, b.answer, b.logits);
        same(&r, &a, &b);
        kvf_session_close(s);
        kvf_store_close(st);
        close_rig(&q);
    }
    close_rig(&r);
}

Test(store_session, what_begins_alike_is_read_once)
{
    rig r = open_rig("llama");
    kvf_store *st = open_store(&r, KVF_STORE_CREATE);
    kvf_session *s = open_session(&r, SPEC, 0, NULL, NULL);
    kvf_stats stats = { .size = sizeof stats };
    outcome a, b;
    cr_assert_eq(ingest(s, st, "one", r.text, N), KVF_OK, "%s", err.msg);
    kvf_session_stats_reset(s);
    cr_assert_eq(ingest(s, st, "one", r.text, N), KVF_OK, "%s", err.msg); /* again: nothing to do */
    kvf_session_stats(s, &stats, &err);
    cr_assert_eq(stats.n_computed_tokens, 0);
    kvf_token *other = malloc(N * sizeof *other);
    memcpy(other, r.text, N * sizeof *other);
    other[3000] ^= 1;
    kvf_session_stats_reset(s);
    cr_assert_eq(ingest(s, st, "two", other, N), KVF_OK, "%s", err.msg);
    kvf_session_stats(s, &stats, &err);
    cr_assert_eq(stats.n_reused_tokens, 2048);
    ask(&r, s, a.answer, a.logits);
    cr_assert_eq(ingest(s, st, "one", other, N), KVF_ERR_STATE, "a name that means another text");
    kvf_store_info info = { .size = sizeof info };
    cr_assert_eq(kvf_store_get_info(st, &info, &err), KVF_OK);
    cr_assert_eq(info.n_documents, 2);
    cr_assert_eq(info.n_tokens, 2 * N - 2048);
    cr_assert_eq(kvf_store_remove(st, "one", &err), KVF_OK, "%s", err.msg);
    kvf_session_close(s);
    s = open_session(&r, SPEC, 0, NULL, NULL);
    cr_assert_eq(kvf_session_load(s, st, "two", &err), KVF_OK, "%s", err.msg);
    ask(&r, s, b.answer, b.logits);
    same(&r, &a, &b);
    kvf_session_close(s);
    kvf_store_close(st);
    free(other);
    close_rig(&r);
}

Test(store_session, passages_name_where_the_answer_looked)
{
    rig r = open_rig("qwen2");
    kvf_store *st = open_store(&r, KVF_STORE_CREATE);
    kvf_session *s = open_session(&r, SPEC, 0, NULL, NULL);
    outcome a;
    cr_assert_eq(ingest(s, st, "doc", r.text, N), KVF_OK, "%s", err.msg);
    ask(&r, s, a.answer, a.logits);
    kvf_passage p[8], all[64];
    int64_t n, m;
    cr_assert_eq(kvf_session_passages(s, 0, N, p, 8, &n, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_passages(s, 0, N, all, 64, &m, &err), KVF_OK);
    cr_assert_eq(n, 8);
    float sum = 0;
    for (int64_t i = 0; i < m; i++) {
        sum += all[i].share;
        cr_assert(all[i].first >= 0 && all[i].n > 0 && all[i].n <= 128 && all[i].first + all[i].n <= N);
        cr_assert(all[i].peak >= all[i].first && all[i].peak < all[i].first + all[i].n);
        if (i > 0) cr_assert_geq(all[i - 1].share, all[i].share);
        if (i < n) cr_assert_eq(all[i].first, p[i].first);
    }
    cr_assert_float_eq(sum, 1, 1e-3);
    kvf_session_close(s);
    kvf_store_close(st);
    close_rig(&r);
}

Test(store_session, what_does_not_fit_is_refused_with_a_reason)
{
    rig r = open_rig("qwen2"), q = open_rig("llama");
    kvf_store *st = open_store(&r, KVF_STORE_CREATE);
    kvf_session *s = open_session(&r, "full", 0, NULL, NULL);
    cr_assert_eq(ingest(s, st, "doc", r.text, N), KVF_ERR_STATE);
    kvf_session_close(s);
    s = open_session(&r, SPEC, 0, NULL, NULL);
    cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_ERR_NOT_FOUND);
    cr_assert_eq(ingest(s, st, "doc", r.text, 3000), KVF_OK, "%s", err.msg);
    cr_assert_eq(ingest(s, st, "", r.text, N), KVF_ERR_ARG);
    kvf_token bad = r.n_vocab;
    cr_assert_eq(ingest(s, st, "bad", &bad, 1), KVF_ERR_ARG);
    kvf_session_close(s);
    s = open_session(&r, "infllm:init=32,window=256,block=32,chunk=64", 0, NULL, NULL);
    cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_ERR_MISMATCH, "another window");
    kvf_session_close(s);
    s = open_session(&r, SPEC ",decay=0.5,hold=2,ask=7", 0, NULL, NULL); /* how it is asked may differ */
    cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_OK, "%s", err.msg);
    kvf_session_close(s);
    s = open_session(&r, SPEC ",topk=7", 0, NULL, NULL); /* how it was read may not */
    cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_ERR_MISMATCH);
    kvf_session_close(s);
    memcpy(q.dir, r.dir, sizeof q.dir);
    kvf_store_close(st);
    st = open_store(&q, KVF_STORE_WRITE);
    s = open_session(&q, SPEC, 0, NULL, NULL);
    cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_ERR_MISMATCH);
    cr_assert_not_null(strstr(err.msg, "model"));
    cr_assert_eq(ingest(s, st, "x", q.text, N), KVF_ERR_MISMATCH);
    kvf_session_close(s);
    kvf_store_close(st);
    close_rig(&r);
    close_rig(&q);
}

/* All records of a store that is closed, but for the two that hold the time of day ("meta", "doc"). */
typedef struct records {
    unsigned char *v;
    size_t n, cap, n_record;
} records;

static void add_bytes(records *r, const void *v, size_t n)
{
    if (r->n + n > r->cap) {
        r->cap = 2 * (r->n + n);
        r->v = realloc(r->v, r->cap);
        cr_assert_not_null(r->v);
    }
    memcpy(r->v + r->n, v, n);
    r->n += n;
}

static void add_table(records *r, MDB_txn *txn, const char *name)
{
    MDB_dbi table;
    MDB_cursor *c;
    MDB_val key, value;
    cr_assert_eq(mdb_dbi_open(txn, name, 0, &table), 0, "%s", name);
    cr_assert_eq(mdb_cursor_open(txn, table, &c), 0);
    for (; mdb_cursor_get(c, &key, &value, MDB_NEXT) == 0; r->n_record++) {
        size_t sizes[] = { key.mv_size, value.mv_size };
        add_bytes(r, sizes, sizeof sizes);
        add_bytes(r, key.mv_data, key.mv_size);
        add_bytes(r, value.mv_data, value.mv_size);
    }
    mdb_cursor_close(c);
}

static records all_records(const char *folder)
{
    static const char *const tables[] = { "note", "chain", "tok", "blk", "rep", "tail" };
    records r = { 0 };
    MDB_env *env;
    MDB_txn *txn;
    cr_assert_eq(mdb_env_create(&env), 0);
    cr_assert_eq(mdb_env_set_maxdbs(env, 16), 0);
    cr_assert_eq(mdb_env_open(env, folder, MDB_RDONLY | MDB_NOLOCK, 0), 0);
    cr_assert_eq(mdb_txn_begin(env, NULL, MDB_RDONLY, &txn), 0);
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) add_table(&r, txn, tables[i]);
    mdb_txn_abort(txn);
    mdb_env_close(env);
    return r;
}

/* kill -9 anywhere: the next run finds whole groups, and ends with the same document, byte for byte. */
Test(store_session, killed_at_any_moment_it_resumes, .timeout = 600)
{
#if defined(__SANITIZE_THREAD__)
    cr_skip_test("the thread sanitizer lets no child of a fork start threads");
#endif
    rig r = open_rig("qwen2");
    outcome a, b;
    kvf_store *st = open_store(&r, KVF_STORE_CREATE);
    kvf_session *s = open_session(&r, SPEC, 0, NULL, NULL);
    cr_assert_eq(ingest(s, st, "doc", r.text, N), KVF_OK, "%s", err.msg);
    ask(&r, s, a.answer, a.logits);
    kvf_session_close(s);
    kvf_store_close(st);
    records whole = all_records(r.dir);
    cr_assert_gt(whole.n_record, 3 * 4 + 2, "three groups, of each chain, tokens, blocks and digests");
    close_rig(&r); /* no threads when it forks */
    const char *many = getenv("KVF_TEST_KILLS"); /* three kills a round; the slow tests ask for more */
    int rounds = many ? (atoi(many) + 2) / 3 : 8;
    for (int i = 0; i < rounds; i++) {
        rig q = { .dir = "/tmp/kvf_store_XXXXXX" };
        cr_assert_not_null(mkdtemp(q.dir));
        for (int round = 0; round < 3; round++) {
            pid_t child = fork();
            cr_assert_geq(child, 0);
            if (child == 0) {
                rig c = open_rig("qwen2");
                rmdir(c.dir);
                memcpy(c.dir, q.dir, sizeof c.dir);
                kvf_store *cs = open_store(&c, KVF_STORE_CREATE);
                ingest(open_session(&c, SPEC, 0, NULL, NULL), cs, "doc", c.text, N);
                _exit(0);
            }
            usleep((useconds_t)(20000 + i % 8 * 37000 + i / 8 * 4700 + round * 11000));
            kill(child, SIGKILL);
            int status;
            waitpid(child, &status, 0);
        }
        r = open_rig("qwen2");
        rmdir(r.dir);
        memcpy(r.dir, q.dir, sizeof r.dir);
        st = open_store(&r, KVF_STORE_CREATE);
        kvf_verify v = { .size = sizeof v };
        cr_assert_eq(kvf_store_verify(st, &v, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(v.n_bad, 0, "%s", v.first_bad);
        s = open_session(&r, SPEC, 0, NULL, NULL);
        cr_assert_eq(ingest(s, st, "doc", r.text, N), KVF_OK, "%s", err.msg);
        ask(&r, s, b.answer, b.logits);
        same(&r, &a, &b);
        cr_assert_eq(kvf_store_verify(st, &v, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(v.n_bad, 0, "%s", v.first_bad);
        kvf_session_close(s);
        kvf_store_close(st);
        records again = all_records(r.dir);
        cr_assert_eq(again.n, whole.n);
        cr_assert(memcmp(again.v, whole.v, whole.n) == 0, "kept other bytes after kills");
        free(again.v);
        close_rig(&r);
    }
    free(whole.v);
}
