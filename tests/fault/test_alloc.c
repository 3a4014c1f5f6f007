/* test_alloc.c - allocation k fails, for k = 1, 2, ... until everything succeeds: every public call
 * must return NOMEM, leave nothing behind, and work afterwards.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <criterion/criterion.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kvfold/kvfold.h"
#include "tests/fault/faulty.h"

static kvf_status run_all(faulty *f, const char *path, const char *policy)
{
    kvf_ctx *ctx = NULL;
    kvf_model *m = NULL;
    kvf_session *s = NULL;
    kvf_error err;
    kvf_ctx_params cp;
    kvf_ctx_params_init(&cp);
    cp.n_threads = 2;
    cp.alloc = faulty_alloc;
    cp.release = faulty_release;
    cp.user = f;
    kvf_status rc = kvf_ctx_open(&ctx, &cp, &err);
    if (rc >= 0) rc = kvf_model_open(&m, ctx, path, &err);
    kvf_token t[300], out;
    kvf_token_buf buf = { .v = t, .cap = 300 };
    if (rc >= 0) rc = kvf_tokenize(m, "hello world, 12 times", 21, KVF_TOKENIZE_BOS | KVF_TOKENIZE_SPECIAL, &buf, &err);
    kvf_chat_message msg = { "user", "a question", (size_t)-1 };
    kvf_chat chat = { .tmpl = "none", .messages = &msg, .n_messages = 1, .generate = 1 };
    if (rc >= 0) rc = kvf_chat_tokenize(m, &chat, &buf, &err);
    kvf_session_params sp;
    kvf_session_params_init(&sp);
    sp.n_ctx = 400;
    sp.n_batch = 100;
    sp.policy = policy;
    sp.sampling.temperature = 1;
    if (rc >= 0) rc = kvf_session_open(&s, m, &sp, &err);
    for (int i = 0; i < 300; i++) t[i] = (kvf_token)(i * 7 % 100);
    if (rc >= 0) rc = kvf_session_sync(s, t, 250, &err);
    kvf_score scores[20];
    if (rc >= 0) rc = kvf_session_score(s, t, 20, scores, &err);
    if (rc >= 0) rc = kvf_session_append(s, t, 20, &err);
    if (rc >= 0) rc = kvf_session_next(s, &out, &err);
    if (rc >= 0) rc = kvf_session_next(s, &out, &err);
    if (rc >= 0) rc = kvf_session_sync(s, t, 100, &err);
    if (rc == KVF_ERR_NOMEM && s) {
        /* The session still works once memory is back. */
        atomic_store(&f->fail_at, 0);
        cr_assert_eq(kvf_session_sync(s, t, 120, &err), KVF_OK, "%s", err.msg);
        cr_assert_geq(kvf_session_next(s, &out, &err), KVF_OK);
    }
    kvf_session_close(s);
    kvf_model_close(m);
    kvf_ctx_close(ctx);
    return rc;
}

/* What may fail without the call failing: PCRE2 runs its patterns without its just-in-time
 * compiler when that gets no memory, a few allocations a pattern. */
enum { OPTIONAL_MAX = 12 };

/* A chunk that fails half-way gives its slots back: with a context of exactly its size, the same
 * call succeeds as soon as memory is there. */
Test(alloc, a_failed_chunk_can_be_read_again)
{
    kvf_error err;
    for (long k = 1; k < 40; k++) {
        faulty f = { 0 };
        kvf_ctx *ctx;
        kvf_model *m;
        kvf_session *s;
        kvf_ctx_params cp;
        kvf_ctx_params_init(&cp);
        cp.alloc = faulty_alloc;
        cp.release = faulty_release;
        cp.user = &f;
        cr_assert_eq(kvf_ctx_open(&ctx, &cp, &err), KVF_OK);
        cr_assert_eq(kvf_model_open(&m, ctx, KVF_TEST_DATA "/tiny/qwen2.gguf", &err), KVF_OK);
        kvf_session_params sp;
        kvf_session_params_init(&sp);
        sp.n_ctx = 128;
        cr_assert_eq(kvf_session_open(&s, m, &sp, &err), KVF_OK);
        kvf_token t[128];
        for (int i = 0; i < 128; i++) t[i] = i;
        atomic_store(&f.fail_at, atomic_load(&f.n_alloc) + k);
        kvf_status rc = kvf_session_sync(s, t, 128, &err);
        cr_assert(rc == KVF_OK || rc == KVF_ERR_NOMEM);
        cr_assert_eq(kvf_session_sync(s, t, 128, &err), KVF_OK, "allocation %ld: %s", k, err.msg);
        kvf_session_close(s);
        kvf_model_close(m);
        kvf_ctx_close(ctx);
        cr_assert_eq(atomic_load(&f.n_live), 0);
    }
}

static void fail_each(const char *path, const char *policy)
{
    long k = 1, n_optional = 0;
    for (; k < 5000; k++) {
        faulty f = { 0 };
        atomic_store(&f.fail_at, k);
        kvf_status rc = run_all(&f, path, policy);
        cr_assert_eq(atomic_load(&f.n_live), 0, "allocation %ld: %ld blocks leak", k, atomic_load(&f.n_live));
        if (rc >= 0 && atomic_load(&f.n_alloc) < k) break; /* it never came that far */
        if (rc >= 0) n_optional++;
        else cr_assert_eq(rc, KVF_ERR_NOMEM, "allocation %ld: %s", k, kvf_status_name(rc));
    }
    cr_assert_leq(n_optional, OPTIONAL_MAX, "%ld allocations failed unnoticed", n_optional);
    cr_assert_gt(k, 20);
    cr_assert_lt(k, 5000);
}

Test(alloc, every_failure_is_reported_and_nothing_leaks_bpe) { fail_each(KVF_TEST_DATA "/tiny/qwen2.gguf", "window:window=64"); }
Test(alloc, every_failure_is_reported_and_nothing_leaks_spm) { fail_each(KVF_TEST_DATA "/tiny/gemma3.gguf", "window:window=64"); }
Test(alloc, every_failure_is_reported_and_nothing_leaks_lazy)
{
    fail_each(KVF_TEST_DATA "/tiny/qwen2.gguf", "lazyllm:stages=1,keep=0.3,rows=2,hold=1");
}
Test(alloc, every_failure_is_reported_and_nothing_leaks_chain)
{
    fail_each(KVF_TEST_DATA "/tiny/qwen2.gguf", "infllm:init=0,window=128,block=32,chunk=64,topk=1+lazyllm:stages=1,keep=0.3,rows=2,hold=1");
}
Test(alloc, every_failure_is_reported_and_nothing_leaks_evict)
{
    fail_each(KVF_TEST_DATA "/tiny/qwen2.gguf", "snapkv:budget=40,window=8");
    fail_each(KVF_TEST_DATA "/tiny/qwen2.gguf", "keydiff:budget=40,recent=8");
}

/* A document into a store, out of it again, a question and its passages. */
static kvf_status run_store(faulty *f, const char *dir, const char *policy)
{
    kvf_error err;
    kvf_ctx *ctx = NULL;
    kvf_model *m = NULL;
    kvf_store *st = NULL;
    kvf_session *s = NULL;
    kvf_ctx_params cp;
    kvf_ctx_params_init(&cp);
    cp.alloc = faulty_alloc;
    cp.release = faulty_release;
    cp.user = f;
    cp.n_threads = 1;
    kvf_status rc = kvf_ctx_open(&ctx, &cp, &err);
    if (rc >= 0) rc = kvf_model_open(&m, ctx, KVF_TEST_DATA "/tiny/llama-linear.gguf", &err);
    kvf_store_params tp;
    kvf_store_params_init(&tp);
    tp.mode = KVF_STORE_CREATE;
    if (rc >= 0) rc = kvf_store_open(&st, ctx, dir, &tp, &err);
    kvf_session_params sp;
    kvf_session_params_init(&sp);
    sp.policy = policy;
    sp.passages = 1;
    if (rc >= 0) rc = kvf_session_open(&s, m, &sp, &err);
    kvf_token t[700], out;
    for (int i = 0; i < 700; i++) t[i] = (kvf_token)(i * 7 % 100);
    kvf_ingest in = { .size = sizeof in, .name = "doc", .tokens = t, .n = 600 };
    if (rc >= 0) rc = kvf_session_ingest(s, st, &in, &err);
    if (rc >= 0) rc = kvf_session_load(s, st, "doc", &err);
    if (rc >= 0) rc = kvf_session_append(s, t + 600, 20, &err);
    for (int i = 0; rc >= 0 && i < 3; i++) rc = kvf_session_next(s, &out, &err);
    kvf_passage p[3];
    int64_t n;
    if (rc >= 0) rc = kvf_session_passages(s, 0, 600, p, 3, &n, &err);
    if (rc == KVF_ERR_NOMEM && s) { /* and then it goes on */
        atomic_store(&f->fail_at, 0);
        cr_assert_eq(kvf_session_ingest(s, st, &in, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(kvf_session_append(s, t + 600, 20, &err), KVF_OK, "%s", err.msg);
        cr_assert_geq(kvf_session_next(s, &out, &err), KVF_OK);
    }
    kvf_session_close(s);
    kvf_store_close(st);
    kvf_model_close(m);
    kvf_ctx_close(ctx);
    return rc;
}

static void fail_each_of_store(const char *policy)
{
    long k = 1, n_optional = 0;
    for (; k < 5000; k++) {
        char dir[] = "/tmp/kvf_alloc_XXXXXX", file[64];
        static const char *const names[] = { "data.mdb", "lock.mdb", "open.lock", "write.lock" };
        faulty f = { 0 };
        cr_assert_not_null(mkdtemp(dir));
        atomic_store(&f.fail_at, k);
        kvf_status rc = run_store(&f, dir, policy);
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            snprintf(file, sizeof file, "%s/%s", dir, names[i]);
            unlink(file);
        }
        cr_assert_eq(rmdir(dir), 0);
        cr_assert_eq(atomic_load(&f.n_live), 0, "allocation %ld: %ld blocks leak", k, atomic_load(&f.n_live));
        if (rc >= 0 && atomic_load(&f.n_alloc) < k) break;
        if (rc >= 0) n_optional++;
        else cr_assert_eq(rc, KVF_ERR_NOMEM, "allocation %ld: %s", k, kvf_status_name(rc));
    }
    cr_assert_leq(n_optional, OPTIONAL_MAX, "%ld allocations failed unnoticed", n_optional);
    cr_assert_gt(k, 60);
    cr_assert_lt(k, 5000);
}

#define SPEC "infllm:init=32,window=128,block=32,chunk=64,topk=3"
Test(alloc, every_failure_around_a_store_is_reported) { fail_each_of_store(SPEC); }
Test(alloc, every_failure_around_a_store_is_reported_paper) { fail_each_of_store(SPEC ",select=paper"); }
