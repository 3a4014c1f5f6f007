/* test_lazy_memory.c - a chain of InfLLM and LazyLLM over tiny models: equal to InfLLM where nothing is dropped,
 * to LazyLLM where nothing is far, and in between to itself in any order of sessions, cuts and failures.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <criterion/criterion.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kvfold/kvfold.h"
#include "model/timeline.h"
#include "tests/tiny_rig.h"

#define FAR "infllm:init=32,window=128,block=32,chunk=64,topk=3"
#define ALL_NEAR "infllm:init=32,window=4096,block=32,chunk=64,topk=3"
enum { MAX_TOKENS = 1200 };

static kvf_session_params params(const char *policy)
{
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.policy = policy;
    p.n_ctx = 100000;
    return p;
}

static kvf_session *open_session(const rig *r, const char *policy) { return open_with(r, params(policy)); }

static double apart(kvf_session *a, kvf_session *b, int32_t n)
{
    const float *x = logits_of(a), *y = logits_of(b);
    double worst = 0, most = 1;
    for (int32_t i = 0; i < n; i++) {
        cr_assert(isfinite(x[i]) && isfinite(y[i]));
        worst = fmax(worst, fabs((double)x[i] - (double)y[i]));
        most = fmax(most, fabs((double)x[i]));
    }
    return worst / most;
}

static void check_state(kvf_session *s)
{
    kvf_stages plan;
    kvf_lazy_counters c;
    int64_t n = kvf_kv_len(s->kv), waiting = 0;
    s->policy->ops->stages(s->policy, &plan);
    for (int64_t i = 0; i < n; i++) waiting += kvf_lazy_frontier(s->lazy, i) < plan.n;
    kvf_lazy_get_counters(s->lazy, &c);
    cr_assert_eq(c.n_waiting, waiting);
    cr_assert_eq(c.n_done, n - waiting);
}

/* ---- Nothing dropped: InfLLM ---------------------------------------------------------------------------- */

/* limit: 0 where units are whole blocks, so that both read lists of the same shape; long lists are split among
 * threads by their length, which moves roundings. */
static void check_exact(const char *model, const char *cpu, const char *far, const char *lazy, double limit)
{
    rig r = open_rig(model, cpu, KVF_PRECISION_F32);
    if (!r.m) return;
    char spec[256];
    kvf_token t[MAX_TOKENS];
    make_tokens(5, t, MAX_TOKENS);
    snprintf(spec, sizeof spec, "%s+%s", far, lazy);
    kvf_session *a = open_session(&r, far), *b = open_session(&r, spec);
    cr_assert_eq(kvf_session_sync(a, t, 420, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_sync(b, t, 420, &err), KVF_OK, "%s: %s", spec, err.msg);
    for (int i = 0; i < 8; i++) {
        double gap = apart(a, b, r.n_vocab);
        cr_assert_leq(gap, limit, "%s %s %s: step %d, %g apart", model, cpu, spec, i, gap);
        check_state(b);
        int64_t n = i == 3 ? 150 : i == 5 ? 9 : 1; /* more prompts in between */
        cr_assert_eq(kvf_session_append(a, t + 700, n, &err), KVF_OK);
        cr_assert_eq(kvf_session_append(b, t + 700, n, &err), KVF_OK);
    }
    kvf_stats st = stats_of(b);
    cr_assert_eq(st.n_layer_tokens, st.n_layer_tokens_full);
    cr_assert_gt(st.n_lookups, 0);
    kvf_session_close(a);
    kvf_session_close(b);
    close_rig(&r);
}

#define WHOLE "infllm:init=128,window=128,chunk=64,topk=1"

Test(lazy_memory, keeping_all_equals_infllm_to_the_bit_on_the_reference)
{
    check_exact("qwen3-deep", "ref", WHOLE, "lazyllm:preset=exact", 0);
    check_exact("qwen3-deep", "ref", WHOLE ",sets=kv,select=sub", "lazyllm:stages=1/3/7,keep=1/1/1,hold=2", 0);
    check_exact("qwen3-deep", "ref", WHOLE ",select=paper", "lazyllm:stages=4,keep=1", 0);
    check_exact("gemma3", "ref", WHOLE, "lazyllm:stages=6,keep=1,hold=1", 0);
    check_exact("qwen2", "ref", "infllm:init=0,window=128,block=16,chunk=64,topk=5,select=bounds", "lazyllm:preset=exact,hold=1", 1e-5);
}

Test(lazy_memory, keeping_all_is_infllm_on_every_instruction_set)
{
    static const char *const cpus[] = { "avx2", "avx512", "amx" };
    for (size_t c = 0; c < sizeof cpus / sizeof *cpus; c++) {
        check_exact("qwen3-deep", cpus[c], FAR, "lazyllm:stages=2/5,keep=1/1,hold=1", 5e-5);
        check_exact("gemma3", cpus[c], FAR, "lazyllm:stages=6,keep=1", 5e-5);
    }
}

/* ---- Nothing far: LazyLLM ---------------------------------------------------------------------------------- */

/* The chain rounds a key to f16 before it turns it, LazyLLM after: logits are near, the tokens kept the same. */
Test(lazy_memory, a_window_over_everything_is_lazyllm)
{
    static const char *const lazy[] = { "lazyllm:stages=2/5,keep=0.5/0.4", "lazyllm:stages=3,keep=0.3,hold=1,rows=1,layers=1,heads=mean,pool=1" };
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_F32);
    kvf_token t[MAX_TOKENS];
    make_tokens(9, t, MAX_TOKENS);
    for (int i = 0; i < 2; i++) {
        char spec[256];
        snprintf(spec, sizeof spec, "%s+%s", ALL_NEAR, lazy[i]);
        kvf_session *a = open_session(&r, lazy[i]), *b = open_session(&r, spec);
        cr_assert_eq(kvf_session_sync(a, t, 500, &err), KVF_OK);
        cr_assert_eq(kvf_session_sync(b, t, 500, &err), KVF_OK, "%s", err.msg);
        for (int k = 0; k < 10; k++) {
            double gap = apart(a, b, r.n_vocab);
            cr_assert_lt(gap, 0.02, "%s: step %d, %g apart", spec, k, gap);
            cr_assert_eq(stats_of(a).n_layer_tokens, stats_of(b).n_layer_tokens, "%s: step %d", spec, k);
            cr_assert_eq(kvf_session_append(a, t + 500, k == 5 ? 60 : 1, &err), KVF_OK);
            cr_assert_eq(kvf_session_append(b, t + 500, k == 5 ? 60 : 1, &err), KVF_OK);
        }
        cr_assert_gt(stats_of(b).n_waiting_tokens, 0);
        cr_assert_eq(stats_of(b).n_lookups, 0);
        kvf_session_close(a);
        kvf_session_close(b);
    }
    close_rig(&r);
}

/* ---- Sessions ------------------------------------------------------------------------------------------------ */

Test(lazy_memory, sessions_in_turn_are_as_each_alone)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_F32);
    enum { N = 3 };
    kvf_token t[N][500];
    kvf_session *alone[N], *turn[N];
    for (uint32_t i = 0; i < N; i++) {
        make_tokens(20 + i, t[i], 500);
        alone[i] = open_session(&r, FAR "+lazyllm:stages=2/5,keep=0.4/0.5,hold=1");
        turn[i] = open_session(&r, FAR "+lazyllm:stages=2/5,keep=0.4/0.5,hold=1");
        cr_assert_eq(kvf_session_sync(alone[i], t[i], 400 + 20 * i, &err), KVF_OK);
        for (int k = 0; k < 8; k++) cr_assert_eq(kvf_session_append(alone[i], t[i] + k, 1, &err), KVF_OK);
    }
    for (uint32_t i = 0; i < N; i++) cr_assert_eq(kvf_session_sync(turn[i], t[i], 400 + 20 * i, &err), KVF_OK);
    for (int k = 0; k < 8; k++)
        for (uint32_t i = 0; i < N; i++) cr_assert_eq(kvf_session_append(turn[i], t[i] + k, 1, &err), KVF_OK);
    for (uint32_t i = 0; i < N; i++) {
        cr_assert_arr_eq(logits_of(alone[i]), logits_of(turn[i]), (size_t)r.n_vocab * sizeof(float));
        kvf_session_close(alone[i]);
        kvf_session_close(turn[i]);
    }
    close_rig(&r);
}

/* Any order of appending, cutting back and single steps: nothing is computed twice, nothing is lost, and a text
 * that was cut away leaves nothing behind. */
Test(lazy_memory, no_token_is_computed_twice_in_a_layer_whatever_happens)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_F32);
    static const char *const policies[] = { FAR "+lazyllm:stages=2/4/6,keep=0.5/0.5/0.5,rows=1,pool=1,sink=0,recent=1,hold=1",
                                            FAR ",select=paper+lazyllm:stages=3,keep=0.3,rows=1,recent=2,hold=2",
                                            FAR ",sets=kv+lazyllm:stages=1/7,keep=0.3/0.3,rows=2,pool=3,recent=2,hold=1" };
    for (size_t p = 0; p < 3; p++) {
        kvf_session *s = open_session(&r, policies[p]);
        kvf_token t[MAX_TOKENS];
        uint32_t seed = 177 + (uint32_t)p;
        make_tokens(seed, t, MAX_TOKENS);
        int64_t n = 300, lost = 0;
        cr_assert_eq(kvf_session_sync(s, t, n, &err), KVF_OK, "%s", err.msg);
        for (int step = 0; step < 40; step++) {
            seed = seed * 1664525u + 1013904223u;
            uint32_t what = (seed >> 16) % 8;
            if (what == 0) { /* another end */
                int64_t keep = n - 1 - (int64_t)((seed >> 20) % 140);
                lost += n - keep;
                for (int64_t i = keep; i < MAX_TOKENS; i++) t[i] = (t[i] + 1) % 200;
                n = keep + 3;
                cr_assert_eq(kvf_session_sync(s, t, n, &err), KVF_OK, "%s", err.msg);
            } else {
                int64_t more = what < 5 ? 1 : 1 + (int64_t)((seed >> 20) % 90);
                if (n + more > MAX_TOKENS) break;
                cr_assert_eq(kvf_session_append(s, t + n, more, &err), KVF_OK, "%s", err.msg);
                n += more;
            }
            check_state(s);
            float *l = logits_of(s);
            for (int32_t v = 0; v < r.n_vocab; v++) cr_assert(isfinite(l[v]));
        }
        cr_assert_leq(stats_of(s).n_layer_tokens, (n + lost) * r.n_layer);
        cr_assert_gt(stats_of(s).n_revived_tokens, 0, "%s: nothing came back, so this tests nothing", policies[p]);
        kvf_session *fresh = open_session(&r, policies[p]); /* read again from nothing, as by a new session */
        t[0] = (t[0] + 1) % 200;
        cr_assert_eq(kvf_session_sync(s, t, n, &err), KVF_OK);
        cr_assert_eq(kvf_session_sync(fresh, t, n, &err), KVF_OK);
        cr_assert_arr_eq(logits_of(s), logits_of(fresh), (size_t)r.n_vocab * sizeof(float), "%s", policies[p]);
        kvf_session_close(fresh);
        kvf_session_close(s);
    }
    close_rig(&r);
}

/* ---- Stopped, and short of room -------------------------------------------------------------------------------- */

static int stop_at(void *user, int64_t done, int64_t total)
{
    (void)done;
    (void)total;
    return --*(int *)user == 0;
}

Test(lazy_memory, a_prompt_stopped_in_any_stage_leaves_no_trace)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_F32);
    kvf_token t[700];
    make_tokens(51, t, 700);
    int left = 0, n_stop = 0;
    kvf_session_params p = params(FAR "+lazyllm:stages=2/5,keep=0.6/0.6,hold=1");
    kvf_session *plain = open_with(&r, p);
    cr_assert_eq(kvf_session_sync(plain, t, 400, &err), KVF_OK);
    p.progress = stop_at;
    p.user = &left;
    for (int k = 1; k < 40; k += 2) {
        kvf_session *s = open_with(&r, p);
        left = k;
        if (kvf_session_sync(s, t, 400, &err) == KVF_OK) {
            kvf_session_close(s);
            break;
        }
        n_stop++;
        cr_assert_eq(kvf_session_tokens(s, NULL), 0);
        cr_assert_eq(stats_of(s).kv_blocks, 0, "%lld blocks", (long long)stats_of(s).kv_blocks);
        cr_assert_eq(stats_of(s).n_waiting_tokens, 0);
        left = 0;
        cr_assert_eq(kvf_session_sync(s, t, 400, &err), KVF_OK, "%s", err.msg);
        cr_assert_arr_eq(logits_of(plain), logits_of(s), (size_t)r.n_vocab * sizeof(float));
        left = k; /* and a second question, in any stage */
        kvf_status rc = kvf_session_append(s, t + 400, 200, &err);
        left = 0;
        if (rc != KVF_OK) cr_assert_eq(kvf_session_tokens(s, NULL), 400);
        check_state(s);
        kvf_session_close(s);
    }
    cr_assert_geq(n_stop, 6);
    kvf_session_close(plain);
    close_rig(&r);
}

Test(lazy_memory, too_small_a_budget_is_an_error_that_names_the_cure)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_F32);
    kvf_token t[900];
    make_tokens(61, t, 900);
    kvf_session_params p = params(FAR "+lazyllm:stages=4,keep=0.5");
    kvf_session *plain = open_with(&r, p);
    cr_assert_eq(kvf_session_sync(plain, t, 900, &err), KVF_OK);
    size_t needed = stats_of(plain).kv_bytes;
    int n_refused = 0;
    for (int i = 1; i <= 16; i++) {
        p.kv_bytes = needed * (size_t)i / 8;
        kvf_session *s = open_with(&r, p);
        kvf_status rc = kvf_session_sync(s, t, 900, &err);
        if (rc == KVF_OK) {
            cr_assert_arr_eq(logits_of(plain), logits_of(s), (size_t)r.n_vocab * sizeof(float));
            cr_assert_leq(stats_of(s).kv_bytes, p.kv_bytes);
        } else {
            n_refused++;
            cr_assert_eq(rc, KVF_ERR_LIMIT);
            cr_assert(strstr(err.msg, "raise") || strstr(err.msg, "park"), "%s", err.msg);
            cr_assert_eq(kvf_session_tokens(s, NULL), 0);
            cr_assert_eq(stats_of(s).kv_blocks, 0);
        }
        kvf_session_close(s);
    }
    cr_assert(n_refused >= 3 && n_refused < 16, "%d", n_refused);
    kvf_session_close(plain);
    close_rig(&r);
}

/* The folder's file system takes no more than some bytes of a file: as a full disk, an error and no trace. */
static void fill_park(const char *policy)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_F32);
    kvf_token t[900];
    make_tokens(71, t, 900);
    kvf_session_params p = params(policy);
    kvf_session *plain = open_with(&r, p);
    cr_assert_eq(kvf_session_sync(plain, t, 200, &err), KVF_OK);
    for (int k = 0; k < 2; k++) cr_assert_eq(kvf_session_append(plain, t, 1, &err), KVF_OK);
    float *before = malloc((size_t)r.n_vocab * sizeof *before);
    memcpy(before, logits_of(plain), (size_t)r.n_vocab * sizeof *before);
    size_t needed = stats_of(plain).kv_bytes;
    kvf_session_close(plain);

    signal(SIGXFSZ, SIG_IGN);
    struct rlimit was, full = { 4096, RLIM_INFINITY };
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &was), 0);
    full.rlim_max = was.rlim_max;
    p.kv_bytes = needed * 6;
    kvf_session *s = open_with(&r, p);
    cr_assert_eq(kvf_session_sync(s, t, 200, &err), KVF_OK, "%s", err.msg);
    for (int k = 0; k < 2; k++) cr_assert_eq(kvf_session_append(s, t, 1, &err), KVF_OK, "%s", err.msg);
    kvf_stats st = stats_of(s);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &full), 0);
    kvf_status rc = KVF_OK;
    int64_t n = kvf_session_tokens(s, NULL), held = n;
    for (int i = 0; i < 40 && rc == KVF_OK; i++) { /* until memory is used up and the folder is wanted */
        held = n;
        rc = kvf_session_append(s, t + 200, 600, &err);
        n = kvf_session_tokens(s, NULL);
    }
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &was), 0);
    cr_assert_eq(rc, KVF_ERR_IO, "%d: %s", rc, err.msg);
    cr_assert(strstr(err.msg, "/tmp") && strstr(err.msg, "make room"), "%s", err.msg);
    cr_assert_eq(kvf_session_tokens(s, NULL), held);
    check_state(s);
    if (held == 202) {
        cr_assert_arr_eq(before, logits_of(s), (size_t)r.n_vocab * sizeof *before);
        cr_assert_eq(stats_of(s).n_waiting_tokens, st.n_waiting_tokens);
    }
    cr_assert_eq(kvf_session_append(s, t + 200, 30, &err), KVF_OK, "%s", err.msg); /* room again */
    kvf_session_close(s);
    free(before);
    close_rig(&r);
}

Test(lazy_memory, a_full_park_folder_is_an_error_and_the_session_as_before)
{
    fill_park("lazyllm:stages=2,keep=0.3,park=/tmp");
    fill_park(FAR "+lazyllm:stages=2,keep=0.3,park=/tmp");
}

/* ---- Refused ------------------------------------------------------------------------------------------------------ */

/* Spelled out with every other option it is longer than kvf_stats has room for. */
#define LONGEST                                                                                                   \
    "infllm:init=1048576,window=16777216,topk=1048576,repr=128,hold=256,exact=2048,pool=2048"            \
    ",vote=soft,select=bounds,decay=0.12345678901234567,floor=123456.1234567890123,recall=0.12345678901234567" \
    "+lazyllm:stages=1/2/3/4/5/6/7,keep=0.91234/0.81234/0.71234/0.61234/0.51234/0.4/.3,sink=100000,recent=100000" \
    ",park=/tmp/././././././././././././././././././././"

Test(lazy_memory, contradictions_are_refused_with_a_sentence)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_F32);
    static const struct {
        const char *policy, *word;
        kvf_status rc;
    } bad[] = { { LONGEST, "spelled out", KVF_ERR_ARG },
                { FAR "+" FAR, "decide the same", KVF_ERR_ARG },
                { "lazyllm+lazyllm:preset=fast", "decide the same", KVF_ERR_ARG },
                { "lazyllm+snapkv", "snapkv", KVF_ERR_ARG },
                { "infllm+window", "window", KVF_ERR_ARG },
                { "full+lazyllm", "full", KVF_ERR_ARG },
                { FAR ",select=mean,index=HNSW32+Flat+lazyllm", "index=flat", KVF_ERR_ARG },
                { "infllm+lazyllm:keep=2", "keep", KVF_ERR_ARG },
                { "infllm+nobody", "infllm+nobody", KVF_ERR_NOT_FOUND },
                { "nobody+lazyllm", "nobody", KVF_ERR_NOT_FOUND } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_session_params p = params(bad[i].policy);
        kvf_session *s;
        cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), bad[i].rc, "%s: %s", bad[i].policy, err.msg);
        cr_assert_not_null(strstr(err.msg, bad[i].word), "%s: %s", bad[i].policy, err.msg);
    }
    close_rig(&r);
}

Test(lazy_memory, what_hangs_on_a_question_is_not_stored)
{
    rig r = open_rig("qwen3-deep", NULL, KVF_PRECISION_F32);
    char dir[] = "/tmp/kvf_lazy_XXXXXX", file[64];
    cr_assert_not_null(mkdtemp(dir));
    kvf_store_params sp;
    kvf_store *st;
    kvf_store_params_init(&sp);
    sp.mode = KVF_STORE_CREATE;
    cr_assert_eq(kvf_store_open(&st, r.ctx, dir, &sp, &err), KVF_OK, "%s", err.msg);
    kvf_session *s = open_session(&r, FAR "+lazyllm");
    kvf_token t[300];
    make_tokens(81, t, 300);
    kvf_ingest in = { .size = sizeof in, .name = "doc", .tokens = t, .n = 300 };
    cr_assert_eq(kvf_session_ingest(s, st, &in, &err), KVF_ERR_STATE);
    cr_assert_not_null(strstr(err.msg, "question"), "%s", err.msg);
    cr_assert_eq(kvf_session_load(s, st, "doc", &err), KVF_ERR_STATE);
    kvf_session_close(s);
    kvf_store_close(st);
    close_rig(&r);
    static const char *const names[] = { "data.mdb", "lock.mdb", "open.lock", "write.lock" };
    for (size_t i = 0; i < 4; i++) {
        snprintf(file, sizeof file, "%s/%s", dir, names[i]);
        unlink(file);
    }
    rmdir(dir);
}
