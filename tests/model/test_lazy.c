/* test_lazy.c - LazyLLM over tiny models: against the paper's own formulation (tests/data/tiny/lazy.txt, made
 * by scripts/make_lazy_fixtures.py), against dense attention where nothing is dropped, and where it hurts.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvfold/kvfold.h"
#include "model/timeline.h"
#include "tests/tiny_rig.h"

#define PAPER "rows=1,layers=1,heads=mean,pool=1,sink=0,recent=1,hold=1"
#define MAX_TOKENS 600

static kvf_session_params params(const char *policy, int64_t n_batch)
{
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.policy = policy;
    p.n_batch = n_batch;
    return p;
}

static kvf_session *open_session(const rig *r, const char *policy, int64_t n_batch)
{
    return open_with(r, params(policy, n_batch));
}

/* What must hold after any step: each stage's sequence has the tokens that are through it, each once, and a
 * hidden state waits for exactly those that are not through all. */
static void check_state(kvf_session *s)
{
    kvf_stages plan;
    kvf_lazy_counters c;
    int64_t n = kvf_kv_len(s->kv), waiting = 0;
    s->policy->ops->stages(s->policy, &plan);
    for (int64_t i = 0; i < n; i++) {
        int32_t f = kvf_lazy_frontier(s->lazy, i);
        cr_assert(f >= 1 && f <= plan.n, "token %lld has done %d stages", (long long)i, f);
        waiting += f < plan.n;
    }
    kvf_lazy_get_counters(s->lazy, &c);
    cr_assert_eq(c.n_waiting, waiting, "%lld rows wait for %lld tokens", (long long)c.n_waiting, (long long)waiting);
    cr_assert_eq(c.n_done, n - waiting);
}

/* ---- Against the paper's formulation ---------------------------------------------------------------- */

static void check_case_line(kvf_session **s, rig *r, char *line, const char *cpu, kvf_precision precision)
{
    char model[64], policy[256];
    cr_assert_eq(sscanf(line, "case %63s %255s", model, policy), 2);
    kvf_session_close(*s);
    if (r->m) close_rig(r);
    *r = open_rig(model, cpu, precision);
    *s = r->m ? open_session(r, policy, 16) : NULL;
}

/* One step of the file: the same tokens, what was computed, and the logits. Returns the largest gap. */
static double check_step(kvf_session *s, const rig *r, char *line)
{
    kvf_token t[MAX_TOKENS];
    int64_t n = 0, want = 0, before = stats_of(s).n_layer_tokens;
    char *p = line + 5;
    while (*p != ':') {
        t[n++] = (kvf_token)strtol(p, &p, 10);
        while (*p == ' ') p++;
    }
    p++;
    for (int32_t l = 0; l < r->n_layer; l++) want += strtol(p, &p, 10);
    p = strchr(p, ':') + 1;
    int64_t done = strtol(p, &p, 10);
    p = strchr(p, ':') + 1;
    cr_assert_eq(kvf_session_append(s, t, n, &err), KVF_OK, "%s", err.msg);
    float *logits = logits_of(s);
    kvf_stats st = stats_of(s);
    const kvf_token *all;
    cr_assert_eq(st.n_layer_tokens - before, want, "%lld tokens times layers, the paper's way computes %lld",
                 (long long)(st.n_layer_tokens - before), (long long)want);
    cr_assert_eq(kvf_session_tokens(s, &all) - st.n_waiting_tokens, done);
    check_state(s);
    double worst = 0;
    int32_t i = 0;
    for (; *p && *p != '\n'; i++) worst = fmax(worst, fabs(strtod(p, &p) - logits[i]));
    cr_assert_eq(i, 24);
    return worst;
}

static double replay(const char *cpu, kvf_precision precision)
{
    FILE *f = fopen(KVF_TEST_DATA "/tiny/lazy.txt", "r");
    cr_assert_not_null(f);
    rig r = { 0 };
    kvf_session *s = NULL;
    char *line = NULL;
    size_t cap = 0;
    double worst = 0;
    int n_step = 0;
    while (getline(&line, &cap, f) > 0) {
        if (strncmp(line, "case", 4) == 0) {
            check_case_line(&s, &r, line, cpu, precision);
        } else if (s) {
            worst = fmax(worst, check_step(s, &r, line));
            n_step++;
        }
    }
    free(line);
    fclose(f);
    kvf_session_close(s);
    if (r.m) close_rig(&r);
    if (n_step) cr_assert_geq(n_step, 60);
    return worst;
}

Test(lazy, every_step_is_what_the_paper_s_caches_compute)
{
    static const char *const cpus[] = { "ref", "avx2", "avx512" };
    for (size_t c = 0; c < sizeof cpus / sizeof *cpus; c++) {
        double worst = replay(cpus[c], KVF_PRECISION_F32);
        cr_assert_lt(worst, 1e-3, "%s: logits %g apart", cpus[c], worst);
    }
}

/* ---- Nothing dropped ---------------------------------------------------------------------------------- */

static void check_exact(const char *model, const char *cpu, const char *policy)
{
    rig r = open_rig(model, cpu, KVF_PRECISION_AUTO);
    if (!r.m) return;
    kvf_token t[300];
    make_tokens(5, t, 300);
    kvf_session *dense = open_session(&r, "full", 64), *lazy = open_session(&r, policy, 64);
    cr_assert_eq(kvf_session_sync(dense, t, 260, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(lazy, t, 260, &err), KVF_OK, "%s", err.msg);
    for (int i = 0; i < 30; i++) {
        cr_assert_arr_eq(logits_of(dense), logits_of(lazy), (size_t)r.n_vocab * sizeof(float), "%s %s step %d", model, cpu, i);
        check_state(lazy);
        int64_t n = i == 10 ? 7 : 1; /* a second prompt in between */
        cr_assert_eq(kvf_session_append(dense, t + 260, n, &err), KVF_OK);
        cr_assert_eq(kvf_session_append(lazy, t + 260, n, &err), KVF_OK);
    }
    kvf_stats st = stats_of(lazy);
    cr_assert_eq(st.n_layer_tokens, st.n_layer_tokens_full);
    cr_assert_eq(st.n_waiting_tokens, 0);
    kvf_session_close(dense);
    kvf_session_close(lazy);
    close_rig(&r);
}

/* With rows=4 the prompt is cut as the dense one is: its last chunk has 4 tokens. */
Test(lazy, keeping_all_equals_dense_attention_to_the_bit)
{
    static const char *const cpus[] = { "ref", "avx2", "avx512", "amx" };
    for (size_t c = 0; c < sizeof cpus / sizeof *cpus; c++) {
        check_exact("qwen3-deep", cpus[c], "lazyllm:preset=exact,hold=1,rows=4");
        check_exact("qwen3-deep", cpus[c], "lazyllm:stages=1/3/7,keep=1/1/1,hold=2,rows=4");
        check_exact("gemma3", cpus[c], "lazyllm:stages=6,keep=1,hold=0,rows=4");
        check_exact("qwen2", cpus[c], "lazyllm:preset=exact,rows=4");
    }
}

Test(lazy, chunk_sizes_change_nothing_on_the_reference)
{
    rig r = open_rig("qwen3-deep", "ref", KVF_PRECISION_AUTO);
    kvf_token t[150];
    make_tokens(9, t, 150);
    kvf_session *one = open_session(&r, "lazyllm:stages=2/5,keep=0.5/0.4,rows=6", 150);
    cr_assert_eq(kvf_session_sync(one, t, 150, &err), KVF_OK);
    static const int64_t batch[] = { 7, 64, 149 };
    for (size_t i = 0; i < 3; i++) {
        kvf_session *s = open_session(&r, "lazyllm:stages=2/5,keep=0.5/0.4,rows=6", batch[i]);
        cr_assert_eq(kvf_session_sync(s, t, 150, &err), KVF_OK);
        double worst = 0;
        for (int32_t v = 0; v < r.n_vocab; v++) worst = fmax(worst, fabs((double)logits_of(one)[v] - logits_of(s)[v]));
        cr_assert_lt(worst, 1e-5, "chunks of %lld: %g", (long long)batch[i], worst);
        cr_assert_eq(stats_of(s).n_layer_tokens, stats_of(one).n_layer_tokens);
        kvf_session_close(s);
    }
    kvf_session_close(one);
    close_rig(&r);
}

/* ---- Sessions ------------------------------------------------------------------------------------------- */

Test(lazy, sessions_in_turn_are_as_each_alone)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    enum { N = 3 };
    kvf_token t[N][100];
    kvf_session *alone[N], *turn[N];
    for (uint32_t i = 0; i < N; i++) {
        make_tokens(20 + i, t[i], 100);
        alone[i] = open_session(&r, "lazyllm:stages=2/5,keep=0.4/0.5,hold=1", 32);
        turn[i] = open_session(&r, "lazyllm:stages=2/5,keep=0.4/0.5,hold=1", 32);
        cr_assert_eq(kvf_session_sync(alone[i], t[i], 80 + 5 * i, &err), KVF_OK);
        for (int k = 0; k < 8; k++) cr_assert_eq(kvf_session_append(alone[i], t[i] + k, 1, &err), KVF_OK);
    }
    for (uint32_t i = 0; i < N; i++) cr_assert_eq(kvf_session_sync(turn[i], t[i], 80 + 5 * i, &err), KVF_OK);
    for (int k = 0; k < 8; k++)
        for (uint32_t i = 0; i < N; i++) cr_assert_eq(kvf_session_append(turn[i], t[i] + k, 1, &err), KVF_OK);
    for (uint32_t i = 0; i < N; i++) {
        cr_assert_arr_eq(logits_of(alone[i]), logits_of(turn[i]), (size_t)r.n_vocab * sizeof(float));
        kvf_session_close(alone[i]);
        kvf_session_close(turn[i]);
    }
    close_rig(&r);
}

/* Any order of appending, cutting back and single steps: nothing is computed twice, nothing is lost. */
Test(lazy, no_token_is_computed_twice_in_a_layer_whatever_happens)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    static const char *const policies[] = { ("lazyllm:stages=2/4/6,keep=0.5/0.5/0.5," PAPER),
                                            "lazyllm:stages=3,keep=0.3,rows=1,recent=2,hold=2", "lazyllm:stages=1/7,keep=0.3/0.3,rows=2,pool=3,recent=2,hold=1" };
    for (size_t p = 0; p < 3; p++) {
        kvf_session *s = open_session(&r, policies[p], 24);
        kvf_token t[MAX_TOKENS];
        uint32_t seed = 77 + (uint32_t)p;
        make_tokens(seed, t, MAX_TOKENS);
        int64_t n = 0, cut_off = 0;
        for (int step = 0; step < 60; step++) {
            seed = seed * 1664525u + 1013904223u;
            uint32_t what = (seed >> 16) % 8;
            if (what == 0 && n > 20) { /* another end: what the cut tokens had computed is lost */
                int64_t keep = n - 1 - (int64_t)((seed >> 20) % 15);
                for (int64_t i = keep; i < n; i++) cut_off += kvf_lazy_frontier(s->lazy, i) > 0;
                kvf_token other[MAX_TOKENS];
                memcpy(other, t, sizeof other);
                for (int64_t i = keep; i < MAX_TOKENS; i++) t[i] = other[i] = (other[i] + 1) % 200;
                n = keep + 3;
                cr_assert_eq(kvf_session_sync(s, other, n, &err), KVF_OK, "%s", err.msg);
            } else {
                int64_t more = what < 5 ? 1 : 1 + (int64_t)((seed >> 20) % 30);
                if (n + more > MAX_TOKENS) break;
                cr_assert_eq(kvf_session_append(s, t + n, more, &err), KVF_OK, "%s", err.msg);
                n += more;
            }
            check_state(s);
            float *l = logits_of(s);
            for (int32_t v = 0; v < r.n_vocab; v++) cr_assert(isfinite(l[v]));
        }
        cr_assert_leq(stats_of(s).n_layer_tokens, (n + cut_off) * r.n_layer);
        cr_assert_gt(stats_of(s).n_revived_tokens, 0, "%s: nothing came back, so this tests nothing", policies[p]);
        kvf_session_close(s);
    }
    close_rig(&r);
}

Test(lazy, a_text_cut_to_nothing_and_read_again_is_read_alike)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    kvf_token t[200], u[200];
    make_tokens(3, t, 200);
    make_tokens(4, u, 200);
    kvf_session *s = open_session(&r, "lazyllm:hold=1", 64);
    cr_assert_eq(kvf_session_sync(s, t, 200, &err), KVF_OK);
    float *first = malloc((size_t)r.n_vocab * sizeof *first);
    memcpy(first, logits_of(s), (size_t)r.n_vocab * sizeof *first);
    cr_assert_eq(kvf_session_sync(s, u, 150, &err), KVF_OK);
    for (int i = 0; i < 5; i++) cr_assert_eq(kvf_session_append(s, t, 1, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(s, t, 200, &err), KVF_OK);
    cr_assert_arr_eq(first, logits_of(s), (size_t)r.n_vocab * sizeof *first);
    free(first);
    kvf_session_close(s);
    close_rig(&r);
}

Test(lazy, scores_of_tokens_are_those_of_single_steps)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    kvf_token t[100];
    make_tokens(13, t, 100);
    kvf_session *s = open_session(&r, "lazyllm:keep=0.3,stages=3,hold=1", 32), *u = open_session(&r, "lazyllm:keep=0.3,stages=3,hold=1", 32);
    kvf_score scores[10], one;
    cr_assert_eq(kvf_session_sync(s, t, 80, &err), KVF_OK);
    cr_assert_eq(kvf_session_score(s, t + 80, 10, scores, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_sync(u, t, 80, &err), KVF_OK);
    for (int i = 0; i < 10; i++) {
        kvf_score_row(logits_of(u), r.n_vocab, t[80 + i], &one);
        cr_assert_float_eq(one.logprob, scores[i].logprob, 0);
        cr_assert_eq(kvf_session_append(u, t + 80 + i, 1, &err), KVF_OK);
    }
    cr_assert_arr_eq(logits_of(s), logits_of(u), (size_t)r.n_vocab * sizeof(float));
    kvf_session_close(s);
    kvf_session_close(u);
    close_rig(&r);
}

/* ---- Edges ------------------------------------------------------------------------------------------------ */

Test(lazy, short_prompts_and_tiny_shares_work)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    static const char *const policies[] = { "lazyllm", ("lazyllm:" PAPER),
                                            ("lazyllm:stages=1/2/3/4/5/6/7,keep=0.01/0.01/0.01/0.01/0.01/0.01/0.01," PAPER),
                                            "lazyllm:stages=4,keep=0.000001,sink=0,recent=1,rows=1,hold=1", "lazyllm:rows=512,recent=1000" };
    kvf_token t[64];
    make_tokens(31, t, 64);
    for (size_t p = 0; p < sizeof policies / sizeof *policies; p++) {
        static const int64_t lengths[] = { 1, 2, 3, 33, 64 };
        for (size_t i = 0; i < 5; i++) {
            kvf_session *s = open_session(&r, policies[p], 16);
            cr_assert_eq(kvf_session_sync(s, t, lengths[i], &err), KVF_OK, "%s", err.msg);
            for (int k = 0; k < 4; k++) {
                cr_assert(isfinite(logits_of(s)[0]));
                check_state(s);
                cr_assert_eq(kvf_session_append(s, t, 1, &err), KVF_OK);
            }
            kvf_session_close(s);
        }
    }
    close_rig(&r);
}

/* A policy that keeps the newest token alone, and from some step on everything. */
static int64_t keep_all_from;

static kvf_status keep_as_told(kvf_policy *p, const kvf_keep *k, uint8_t *keep, kvf_error *e)
{
    (void)p;
    (void)e;
    for (int64_t i = 0; i < k->n; i++) keep[i] = k->n_text >= keep_all_from;
    return KVF_OK;
}

Test(lazy, everything_can_come_back_at_once)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    kvf_token t[200];
    make_tokens(41, t, 200);
    kvf_session *s = open_session(&r, "lazyllm:stages=2/5,keep=0.5/0.5,hold=1", 64);
    kvf_policy_ops ops = *s->policy->ops;
    ops.keep = keep_as_told;
    const kvf_policy_ops *old = s->policy->ops;
    s->policy->ops = &ops;
    keep_all_from = 182;
    cr_assert_eq(kvf_session_sync(s, t, 180, &err), KVF_OK);
    kvf_stats st = stats_of(s);
    cr_assert_eq(st.n_layer_tokens, 180 * 2 + 6);
    cr_assert_eq(st.n_waiting_tokens, 179);
    cr_assert_eq(kvf_session_append(s, t, 1, &err), KVF_OK);
    cr_assert_eq(stats_of(s).n_waiting_tokens, 179);
    cr_assert_eq(kvf_session_append(s, t, 1, &err), KVF_OK);
    st = stats_of(s);
    cr_assert_eq(st.n_waiting_tokens, 0);
    cr_assert_eq(st.n_layer_tokens, 182 * 8);
    check_state(s);
    s->policy->ops = old;
    kvf_session_close(s);
    close_rig(&r);
}

/* ---- Stopped, and short of room ------------------------------------------------------------------------------ */

static int stop_at(void *user, int64_t done, int64_t total)
{
    (void)done;
    (void)total;
    return --*(int *)user == 0;
}

Test(lazy, a_prompt_stopped_in_any_stage_leaves_no_trace)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    kvf_token t[200];
    make_tokens(51, t, 200);
    int left = 0;
    kvf_session_params p = params("lazyllm:stages=2/5,keep=0.6/0.6,hold=1", 32);
    kvf_session *plain = open_with(&r, p);
    cr_assert_eq(kvf_session_sync(plain, t, 120, &err), KVF_OK);
    p.progress = stop_at;
    p.user = &left;
    int n_stop = 0;
    for (int k = 1; k < 40; k++) {
        kvf_session *s = open_with(&r, p);
        left = k;
        kvf_status rc = kvf_session_sync(s, t, 120, &err);
        if (rc == KVF_OK) {
            kvf_session_close(s);
            break;
        }
        n_stop++;
        cr_assert_eq(rc, KVF_ERR_CANCELLED);
        cr_assert_eq(kvf_session_tokens(s, NULL), 0);
        cr_assert_eq(stats_of(s).kv_blocks, 0);
        cr_assert_eq(stats_of(s).n_waiting_tokens, 0);
        cr_assert_eq(stats_of(s).n_layer_tokens, 0, "%lld of nothing", (long long)stats_of(s).n_layer_tokens);
        left = 0;
        cr_assert_eq(kvf_session_sync(s, t, 120, &err), KVF_OK, "%s", err.msg);
        cr_assert_arr_eq(logits_of(plain), logits_of(s), (size_t)r.n_vocab * sizeof(float));
        /* And a second question stopped in any stage leaves the first as it was. */
        left = k;
        rc = kvf_session_append(s, t + 120, 60, &err);
        left = 0;
        if (rc != KVF_OK) cr_assert_eq(kvf_session_tokens(s, NULL), 120);
        check_state(s);
        kvf_session_close(s);
    }
    cr_assert_geq(n_stop, 6);
    kvf_session_close(plain);
    close_rig(&r);
}

Test(lazy, too_small_a_budget_is_an_error_and_a_folder_helps)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    kvf_token t[600];
    make_tokens(61, t, 600);
    kvf_session *plain = open_session(&r, "lazyllm:stages=2,keep=0.2", 128);
    cr_assert_eq(kvf_session_sync(plain, t, 600, &err), KVF_OK);
    size_t needed = stats_of(plain).kv_bytes;
    kvf_session_params p = params("lazyllm:stages=2,keep=0.2", 128);
    p.kv_bytes = needed + needed / 4;
    kvf_session *s = open_with(&r, p);
    cr_assert_eq(kvf_session_sync(s, t, 600, &err), KVF_ERR_LIMIT);
    cr_assert_not_null(strstr(err.msg, "park"), "%s", err.msg);
    cr_assert_eq(kvf_session_tokens(s, NULL), 0);
    kvf_session_close(s);
    p.policy = "lazyllm:stages=2,keep=0.2,park=/tmp";
    s = open_with(&r, p);
    cr_assert_eq(kvf_session_sync(s, t, 600, &err), KVF_OK, "%s", err.msg);
    cr_assert_arr_eq(logits_of(plain), logits_of(s), (size_t)r.n_vocab * sizeof(float));
    cr_assert_gt(stats_of(s).waiting_bytes, 0);
    cr_assert_leq(stats_of(s).kv_bytes, p.kv_bytes);
    kvf_session_close(s);
    p.policy = "lazyllm:stages=2,keep=0.2,park=/no/such/folder";
    cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_ERR_IO, "before anything is read");
    cr_assert_null(s);
    cr_assert_not_null(strstr(err.msg, "/no/such/folder: No such file"), "%s", err.msg);
    p.policy = "lazyllm:stages=2,keep=0.2,park=/dev/null";
    cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_ERR_IO);
    cr_assert_not_null(strstr(err.msg, "/dev/null: Not a directory"), "%s", err.msg);
    kvf_session_close(plain);
    close_rig(&r);
}

Test(lazy, contradictions_are_refused_with_a_sentence)
{
    rig r = open_rig("gemma3", NULL, KVF_PRECISION_AUTO);
    static const struct {
        const char *policy, *word;
    } bad[] = { { "lazyllm:stages=3", "keep" },          { "lazyllm:stages=6,keep=0", "above 0" },
                { "lazyllm:stages=6,keep=1.5", "at most 1" }, { "lazyllm:stages=7,keep=0.5", "7 layers" },
                { "lazyllm:stages=6/5,keep=0.5/0.5", "rise" }, { "lazyllm:stages=6/,keep=0.5", "stages" },
                { "lazyllm:stages=6,keep=0.5/0.5", "one share" }, { "lazyllm:stages=6,keep=a", "keep" },
                { "lazyllm:stages=6,keep=0.5,pool=2", "odd" }, { "lazyllm:stages=3,keep=0.5", "global attention" },
                { "lazyllm:stages=0,keep=0.5", "layer 0" } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_session_params p = params(bad[i].policy, 0);
        kvf_session *s;
        cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_ERR_ARG, "%s was taken", bad[i].policy);
        cr_assert_not_null(strstr(err.msg, bad[i].word), "%s: %s", bad[i].policy, err.msg);
    }
    close_rig(&r);
}

/* Passages come from the last stage: what was pruned before it cannot have been read from. */
Test(lazy, passages_are_where_the_last_stage_looked)
{
    static const char *const policies[] = { "lazyllm:stages=2/5,keep=0.4/0.4", "lazyllm:stages=2/5,keep=0.4/0.4,hold=1" };
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_AUTO);
    kvf_token t[400];
    make_tokens(71, t, 400);
    for (int p = 0; p < 2; p++) {
        kvf_session_params sp = params(policies[p], 64);
        sp.passages = 1;
        kvf_session *s = open_with(&r, sp);
        kvf_passage found[8];
        int64_t n = -1;
        cr_assert_eq(kvf_session_passages(s, 0, 0, found, 8, &n, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(n, 0);
        for (int round = 0; round < 2; round++) { /* the second prompt's answer has passages of its own */
            cr_assert_eq(kvf_session_append(s, t + 200 * round, 200, &err), KVF_OK);
            for (int i = 0; i < 3; i++) cr_assert_eq(kvf_session_append(s, t, 1, &err), KVF_OK);
            int64_t end = kvf_session_tokens(s, NULL) - 40;
            cr_assert_eq(kvf_session_passages(s, 16, end, found, 8, &n, &err), KVF_OK, "%s", err.msg);
            cr_assert_gt(n, 0);
            double sum = 0;
            for (int64_t i = 0; i < n; i++) {
                cr_assert(found[i].first >= 16 && found[i].first + found[i].n <= end);
                cr_assert(i == 0 || found[i].share <= found[i - 1].share);
                sum += (double)found[i].share;
            }
            cr_assert(sum > 0 && sum < 1.001, "shares sum to %g", sum);
        }
        kvf_session_close(s);
    }
    close_rig(&r);
}
