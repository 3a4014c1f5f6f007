/* test_session.c - sessions over tiny models: prefix reuse, cancel, limits, forked threads, and the
 * equalities that must hold to the bit.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "kvfold/kvfold.h"

static kvf_error err;

typedef struct rig {
    kvf_ctx *ctx;
    kvf_model *m;
    int32_t n_vocab;
} rig;

static rig open_rig(const char *cpu, int32_t threads)
{
    rig r = { 0 };
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.cpu = cpu;
    p.n_threads = threads;
    cr_assert_eq(kvf_ctx_open(&r.ctx, &p, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_model_open(&r.m, r.ctx, KVF_TEST_DATA "/tiny/qwen2.gguf", &err), KVF_OK, "%s", err.msg);
    kvf_model_info info = { .size = sizeof info };
    cr_assert_eq(kvf_model_get_info(r.m, &info, &err), KVF_OK);
    r.n_vocab = info.n_vocab;
    return r;
}

static void close_rig(rig *r)
{
    kvf_model_close(r->m);
    kvf_ctx_close(r->ctx);
}

static kvf_session *open_session(const rig *r, int64_t n_ctx, int64_t n_batch, const char *policy)
{
    kvf_session *s;
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.n_ctx = n_ctx;
    p.n_batch = n_batch;
    p.policy = policy;
    cr_assert_eq(kvf_session_open(&s, r->m, &p, &err), KVF_OK, "%s", err.msg);
    return s;
}

static void make_tokens(const rig *r, uint32_t seed, kvf_token *t, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        t[i] = (kvf_token)((seed >> 8) % (uint32_t)(r->n_vocab < 200 ? r->n_vocab : 200));
    }
}

static float *logits_of(kvf_session *s)
{
    float *l;
    cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_OK, "%s", err.msg);
    return l;
}

static double worst_gap(const float *a, const float *b, int32_t n)
{
    double worst = 0;
    for (int32_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)a[i] - b[i]));
    return worst;
}

static kvf_stats stats_of(const kvf_session *s)
{
    kvf_stats st = { .size = sizeof st };
    cr_assert_eq(kvf_session_stats(s, &st, &err), KVF_OK);
    return st;
}

Test(session, second_question_reads_only_what_differs)
{
    rig r = open_rig(NULL, 2);
    kvf_token t[400], u[400];
    make_tokens(&r, 1, t, 400);
    memcpy(u, t, sizeof u);
    u[350] = (t[350] + 1) % 200;
    kvf_session *s = open_session(&r, 2048, 64, NULL), *fresh = open_session(&r, 2048, 64, NULL);
    cr_assert_eq(kvf_session_sync(s, t, 400, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(stats_of(s).n_computed_tokens, 400);
    cr_assert_eq(kvf_session_sync(s, u, 400, &err), KVF_OK);
    cr_assert_eq(stats_of(s).n_computed_tokens, 450);
    cr_assert_eq(stats_of(s).n_reused_tokens, 350);
    cr_assert_eq(kvf_session_sync(fresh, u, 400, &err), KVF_OK);
    cr_assert_lt(worst_gap(logits_of(s), logits_of(fresh), r.n_vocab), 0.05);
    /* The same again costs nothing; a prefix of it costs its last token. */
    cr_assert_eq(kvf_session_sync(s, u, 400, &err), KVF_OK);
    cr_assert_eq(stats_of(s).n_computed_tokens, 450);
    cr_assert_eq(kvf_session_sync(s, u, 200, &err), KVF_OK);
    cr_assert_eq(stats_of(s).n_computed_tokens, 451);
    const kvf_token *now;
    cr_assert_eq(kvf_session_tokens(s, &now), 200);
    cr_assert_eq(memcmp(now, u, 200 * sizeof *u), 0);
    kvf_session_close(s);
    kvf_session_close(fresh);
    close_rig(&r);
}

Test(session, chunk_size_and_threads_do_not_change_the_result_on_the_reference)
{
    kvf_token t[150];
    float *want = NULL;
    static const struct {
        int32_t threads;
        int64_t batch;
    } runs[] = { { 1, 150 }, { 1, 32 }, { 3, 150 }, { 4, 64 }, { 2, 17 } };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        rig r = open_rig("ref", runs[i].threads);
        make_tokens(&r, 5, t, 150);
        kvf_session *s = open_session(&r, 512, runs[i].batch, "full");
        cr_assert_eq(kvf_session_sync(s, t, 150, &err), KVF_OK, "%s", err.msg);
        float *l = logits_of(s);
        if (!want) {
            want = malloc((size_t)r.n_vocab * sizeof *want);
            memcpy(want, l, (size_t)r.n_vocab * sizeof *want);
        }
        cr_assert_lt(worst_gap(l, want, r.n_vocab), 2e-3, "run %zu", i);
        kvf_session_close(s);
        close_rig(&r);
    }
    free(want);
}

Test(session, window_policy_with_room_for_all_equals_full_to_the_bit)
{
    rig r = open_rig(NULL, 2);
    kvf_token t[500];
    make_tokens(&r, 9, t, 500);
    kvf_session *a = open_session(&r, 1024, 128, "full"), *b = open_session(&r, 1024, 128, "window:window=4096"),
                *c = open_session(&r, 1024, 128, "window:sink=0,window=1");
    cr_assert_eq(kvf_session_sync(a, t, 500, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(b, t, 500, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(c, t, 500, &err), KVF_OK);
    cr_assert_eq(memcmp(logits_of(a), logits_of(b), (size_t)r.n_vocab * sizeof(float)), 0);
    cr_assert_gt(worst_gap(logits_of(a), logits_of(c), r.n_vocab), 1e-3); /* the policy is really asked */
    kvf_session_close(a);
    kvf_session_close(b);
    kvf_session_close(c);
    close_rig(&r);
}

Test(session, score_agrees_with_logits_one_by_one)
{
    rig r = open_rig(NULL, 2);
    kvf_token t[90];
    kvf_score sc[90];
    make_tokens(&r, 3, t, 90);
    kvf_session *s = open_session(&r, 256, 32, NULL), *one = open_session(&r, 256, 32, NULL);
    cr_assert_eq(kvf_session_score(s, t, 40, sc, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_score(s, t + 40, 50, sc + 40, &err), KVF_OK);
    cr_assert_eq(sc[0].logprob, 0.0f);
    cr_assert_eq(kvf_session_append(one, t, 1, &err), KVF_OK);
    for (int i = 1; i < 90; i++) {
        float *l = logits_of(one);
        double max = l[0], sum = 0;
        for (int32_t v = 0; v < r.n_vocab; v++) max = fmax(max, l[v]);
        for (int32_t v = 0; v < r.n_vocab; v++) sum += exp(l[v] - max);
        cr_assert_float_eq(sc[i].logprob, l[t[i]] - max - log(sum), 0.05, "token %d", i);
        cr_assert_geq(sc[i].top_logprob[0], sc[i].logprob);
        for (int k = 1; k < 5; k++) cr_assert_leq(sc[i].top_logprob[k], sc[i].top_logprob[k - 1]);
        cr_assert_eq(kvf_session_append(one, t + i, 1, &err), KVF_OK);
    }
    cr_assert_lt(worst_gap(logits_of(s), logits_of(one), r.n_vocab), 0.05);
    kvf_session_close(s);
    kvf_session_close(one);
    close_rig(&r);
}

Test(session, what_follows_does_not_change_the_scores_of_what_is_before)
{
    static const char *const policies[] = { "infllm:init=32,window=128,block=32,chunk=64,topk=2", "lazyllm:hold=0",
                                            "infllm:init=32,window=128,block=32,chunk=64,topk=2+lazyllm" };
    rig r = open_rig(NULL, 2);
    kvf_token t[2120];
    kvf_score few[40], many[120];
    make_tokens(&r, 5, t, 2120);
    for (size_t k = 0; k < sizeof policies / sizeof *policies; k++) {
        kvf_session *a = open_session(&r, 4096, 128, policies[k]), *b = open_session(&r, 4096, 128, policies[k]);
        cr_assert_eq(kvf_session_append(a, t, 2000, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(kvf_session_append(b, t, 2000, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(kvf_session_score(a, t + 2000, 40, few, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(kvf_session_score(b, t + 2000, 120, many, &err), KVF_OK, "%s", err.msg);
        for (int i = 0; i < 40; i++) cr_assert_eq(few[i].logprob, many[i].logprob, "%s: token %d", policies[k], i);
        kvf_session_close(a);
        kvf_session_close(b);
    }
    close_rig(&r);
}

Test(session, generation_continues_the_timeline_and_reuses_it)
{
    /* On the reference a token's arithmetic does not depend on the chunk it comes in. */
    rig r = open_rig("ref", 2);
    kvf_token t[60], got[20];
    make_tokens(&r, 11, t, 60);
    kvf_session *s = open_session(&r, 256, 32, NULL);
    cr_assert_eq(kvf_session_sync(s, t, 60, &err), KVF_OK);
    int n = 0;
    while (n < 20 && kvf_session_next(s, &got[n], &err) == KVF_OK) n++;
    const kvf_token *now;
    cr_assert_eq(kvf_session_tokens(s, &now), 60 + n);
    cr_assert_eq(memcmp(now + 60, got, (size_t)n * sizeof *got), 0);
    int64_t computed = stats_of(s).n_computed_tokens;
    cr_assert_leq(computed, 60 + n);
    /* Greedy again from the same prompt gives the same text. */
    cr_assert_eq(kvf_session_sync(s, t, 60, &err), KVF_OK);
    for (int i = 0; i < n; i++) {
        kvf_token x;
        cr_assert_eq(kvf_session_next(s, &x, &err), KVF_OK);
        cr_assert_eq(x, got[i]);
    }
    kvf_session_close(s);
    close_rig(&r);
}

Test(session, limits_leave_the_timeline_as_it_was)
{
    rig r = open_rig(NULL, 1);
    kvf_token t[300], x;
    make_tokens(&r, 2, t, 300);
    kvf_session *s = open_session(&r, 100, 32, NULL);
    cr_assert_eq(kvf_session_next(s, &x, &err), KVF_ERR_STATE);
    float *l;
    cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_ERR_STATE);
    cr_assert_eq(kvf_session_sync(s, t, 80, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(s, t, 101, &err), KVF_ERR_LIMIT);
    cr_assert(strstr(err.msg, "101") && strstr(err.msg, "100"));
    cr_assert_eq(kvf_session_append(s, t, 21, &err), KVF_ERR_LIMIT);
    cr_assert_eq(kvf_session_tokens(s, NULL), 80);
    cr_assert_eq(kvf_session_append(s, t, 20, &err), KVF_OK);
    cr_assert_eq(kvf_session_next(s, &x, &err), KVF_ERR_LIMIT);
    x = r.n_vocab;
    cr_assert_eq(kvf_session_sync(s, &x, 1, &err), KVF_ERR_ARG);
    x = -1;
    cr_assert_eq(kvf_session_append(s, &x, 1, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_session_sync(s, t, 0, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_session_tokens(s, NULL), 100);
    kvf_session_close(s);
    close_rig(&r);
}

Test(session, kv_budget_is_a_limit_before_anything_changes)
{
    rig r = open_rig(NULL, 1);
    kvf_model_info info = { .size = sizeof info };
    cr_assert_eq(kvf_model_get_info(r.m, &info, &err), KVF_OK);
    kvf_token t[300];
    make_tokens(&r, 2, t, 300);
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.n_ctx = 1000;
    p.kv_bytes = info.kv_bytes_per_token * 256; /* two blocks of every layer */
    kvf_session *s;
    cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(s, t, 256, &err), KVF_OK, "%s", err.msg);
    cr_assert_leq(stats_of(s).kv_bytes, p.kv_bytes);
    cr_assert_eq(kvf_session_sync(s, t, 257, &err), KVF_ERR_LIMIT);
    cr_assert_eq(kvf_session_tokens(s, NULL), 256);
    kvf_session_close(s);
    close_rig(&r);
}

static int stop_at_second(void *user, int64_t done, int64_t total)
{
    int *calls = user;
    (void)total;
    return ++*calls == 2 && done > 0;
}

Test(session, cancel_keeps_a_prefix_and_the_same_call_carries_on)
{
    rig r = open_rig(NULL, 2);
    kvf_token t[200];
    make_tokens(&r, 4, t, 200);
    int calls = 0;
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.n_ctx = 512;
    p.n_batch = 32;
    p.progress = stop_at_second;
    p.user = &calls;
    kvf_session *s, *fresh = open_session(&r, 512, 32, NULL);
    cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(s, t, 200, &err), KVF_ERR_CANCELLED);
    const kvf_token *now;
    cr_assert_eq(kvf_session_tokens(s, &now), 64);
    cr_assert_eq(memcmp(now, t, 64 * sizeof *t), 0);
    kvf_session_cancel(s);
    cr_assert_eq(kvf_session_sync(s, t, 200, &err), KVF_ERR_CANCELLED);
    cr_assert_eq(kvf_session_tokens(s, NULL), 64);
    cr_assert_eq(kvf_session_sync(s, t, 200, &err), KVF_OK);
    cr_assert_eq(stats_of(s).n_computed_tokens, 200);
    cr_assert_eq(kvf_session_sync(fresh, t, 200, &err), KVF_OK);
    cr_assert_eq(memcmp(logits_of(s), logits_of(fresh), (size_t)r.n_vocab * sizeof(float)), 0);
    kvf_session_close(s);
    kvf_session_close(fresh);
    close_rig(&r);
}

Test(session, cancelled_append_keeps_what_was_there_and_tells_how_much_came)
{
    rig r = open_rig(NULL, 2);
    kvf_token t[200], x;
    make_tokens(&r, 4, t, 200);
    kvf_session *s = open_session(&r, 512, 32, NULL);
    cr_assert_eq(kvf_session_sync(s, t, 50, &err), KVF_OK);
    cr_assert_eq(kvf_session_next(s, &x, &err), KVF_OK);
    cr_assert_eq(kvf_session_tokens(s, NULL), 51);
    kvf_session_cancel(s);
    cr_assert_eq(kvf_session_append(s, t, 5, &err), KVF_ERR_CANCELLED);
    const kvf_token *now;
    cr_assert_eq(kvf_session_tokens(s, &now), 51); /* the token next() returned is still there */
    cr_assert_eq(now[50], x);
    cr_assert_eq(kvf_session_append(s, t, 5, &err), KVF_OK);
    cr_assert_eq(kvf_session_tokens(s, NULL), 56);
    kvf_session_close(s);
    close_rig(&r);
}

Test(session, its_own_tokens_may_be_handed_back)
{
    rig r = open_rig(NULL, 1);
    kvf_token t[60];
    make_tokens(&r, 8, t, 60);
    kvf_session *s = open_session(&r, 4096, 32, NULL);
    cr_assert_eq(kvf_session_sync(s, t, 60, &err), KVF_OK);
    for (int64_t n = 60; n < 1000; n *= 2) { /* grows the list under its own feet */
        const kvf_token *own;
        cr_assert_eq(kvf_session_tokens(s, &own), n);
        cr_assert_eq(kvf_session_append(s, own, n, &err), KVF_OK);
    }
    const kvf_token *own;
    int64_t n = kvf_session_tokens(s, &own);
    for (int64_t i = 0; i < n; i++) cr_assert_eq(own[i], t[i % 60]);
    cr_assert_eq(kvf_session_sync(s, own, 60, &err), KVF_OK);
    cr_assert_eq(kvf_session_tokens(s, NULL), 60);
    kvf_session_close(s);
    close_rig(&r);
}

Test(session, an_empty_session_of_a_huge_context_is_cheap)
{
    rig r = open_rig(NULL, 1);
    kvf_session *s[50];
    for (int i = 0; i < 50; i++) s[i] = open_session(&r, INT32_MAX, 0, NULL); /* 16 MB of slab table at most each, untouched */
    cr_assert_eq(stats_of(s[0]).kv_bytes, 0);
    for (int i = 0; i < 50; i++) kvf_session_close(s[i]);
    close_rig(&r);
}

typedef struct job {
    const rig *r;
    uint32_t seed;
    float *logits;
} job;

static void *run_job(void *arg)
{
    job *j = arg;
    kvf_token t[120];
    kvf_error e;
    make_tokens(j->r, j->seed, t, 120);
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.n_batch = 16;
    kvf_session *s;
    if (kvf_session_open(&s, j->r->m, &p, &e) != KVF_OK) return NULL;
    float *l;
    if (kvf_session_sync(s, t, 120, &e) == KVF_OK && kvf_session_logits(s, &l, &e) == KVF_OK)
        memcpy(j->logits, l, (size_t)j->r->n_vocab * sizeof *l);
    kvf_session_close(s);
    return NULL;
}

Test(session, sessions_of_one_model_run_in_several_threads)
{
    rig r = open_rig(NULL, 2);
    enum { N = 4 };
    job parallel[N], alone;
    pthread_t thread[N];
    for (int i = 0; i < N; i++) {
        parallel[i] = (job){ &r, (uint32_t)i, calloc((size_t)r.n_vocab, sizeof(float)) };
        cr_assert_eq(pthread_create(&thread[i], NULL, run_job, &parallel[i]), 0);
    }
    for (int i = 0; i < N; i++) pthread_join(thread[i], NULL);
    alone.r = &r;
    alone.logits = calloc((size_t)r.n_vocab, sizeof(float));
    for (int i = 0; i < N; i++) {
        alone.seed = (uint32_t)i;
        run_job(&alone);
        cr_assert_eq(memcmp(alone.logits, parallel[i].logits, (size_t)r.n_vocab * sizeof(float)), 0);
        free(parallel[i].logits);
    }
    free(alone.logits);
    close_rig(&r);
}

Test(session, null_and_wrong_sizes_are_refused)
{
    rig r = open_rig(NULL, 1);
    kvf_session *s;
    kvf_session_params p;
    kvf_session_params_init(&p);
    cr_assert_eq(kvf_session_open(&s, NULL, &p, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_session_open(NULL, r.m, &p, &err), KVF_ERR_ARG);
    p.size = 4;
    cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_ERR_ARG);
    cr_assert_null(s);
    kvf_session_params_init(&p);
    p.n_batch = -1;
    cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_ERR_ARG);
    kvf_session_params_init(&p);
    p.policy = "nonsense";
    cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_ERR_NOT_FOUND);
    kvf_session_params_init(&p);
    p.sampling.temperature = -2;
    cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_ERR_ARG);
    kvf_token t = 1;
    cr_assert_eq(kvf_session_sync(NULL, &t, 1, &err), KVF_ERR_ARG);
    kvf_session_close(NULL);
    kvf_session_cancel(NULL);
    kvf_model_close(NULL);
    kvf_ctx_close(NULL);
    cr_assert_eq(kvf_session_open(&s, r.m, NULL, NULL), KVF_OK);
    cr_assert_eq(kvf_session_sync(s, NULL, 1, NULL), KVF_ERR_ARG);
    kvf_session_close(s);
    close_rig(&r);
}
