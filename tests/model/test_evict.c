/* test_evict.c - policies that keep a budget of tokens (SnapKV, KeyDiff) in sessions over a tiny model.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "kvfold/kvfold.h"

static kvf_error err;
static kvf_ctx *ctx;
static kvf_model *m;
static int32_t n_vocab;
static kvf_token text[700];

static void setup(void)
{
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = 2;
    cr_assert_eq(kvf_ctx_open(&ctx, &p, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_model_open(&m, ctx, KVF_TEST_DATA "/tiny/qwen3-deep.gguf", &err), KVF_OK, "%s", err.msg);
    kvf_model_info info = { .size = sizeof info };
    cr_assert_eq(kvf_model_get_info(m, &info, &err), KVF_OK);
    n_vocab = info.n_vocab;
    uint32_t seed = 3;
    for (int i = 0; i < 700; i++) {
        seed = seed * 1664525u + 1013904223u;
        text[i] = (kvf_token)((seed >> 8) % 200);
    }
}

static void teardown(void)
{
    kvf_model_close(m);
    kvf_ctx_close(ctx);
}

TestSuite(evict, .init = setup, .fini = teardown);

static kvf_session *open_with(const char *policy, int64_t n_batch, size_t kv_bytes)
{
    kvf_session *s;
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.policy = policy;
    p.n_batch = n_batch;
    p.kv_bytes = kv_bytes;
    cr_assert_eq(kvf_session_open(&s, m, &p, &err), KVF_OK, "%s: %s", policy, err.msg);
    return s;
}

static kvf_session *open_session(const char *policy) { return open_with(policy, 100, 0); }

static float *logits_of(kvf_session *s)
{
    float *l;
    cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_OK, "%s", err.msg);
    return l;
}

static int64_t blocks_of(const kvf_session *s)
{
    kvf_stats st = { .size = sizeof st };
    cr_assert_eq(kvf_session_stats(s, &st, &err), KVF_OK);
    return st.kv_blocks;
}

static const char *const tight[] = { "snapkv:budget=100,window=16", "keydiff:budget=100,recent=16" };
static const char *const roomy[] = { "snapkv:budget=2000", "keydiff:budget=2000" };

Test(evict, a_budget_that_holds_everything_equals_full_attention_to_the_bit)
{
    for (int p = 0; p < 2; p++) {
        kvf_session *full = open_session("full"), *s = open_session(roomy[p]);
        cr_assert_eq(kvf_session_sync(full, text, 450, &err), KVF_OK);
        cr_assert_eq(kvf_session_sync(s, text, 450, &err), KVF_OK, "%s", err.msg);
        for (int i = 0; i < 5; i++) {
            cr_assert_arr_eq(logits_of(full), logits_of(s), (size_t)n_vocab * sizeof(float));
            cr_assert_eq(kvf_session_append(full, text + 450 + i, 1, &err), KVF_OK);
            cr_assert_eq(kvf_session_append(s, text + 450 + i, 1, &err), KVF_OK);
        }
        kvf_session_close(full);
        kvf_session_close(s);
    }
}

/* SnapKV reads the whole prompt, so the first token is full attention's; afterwards it holds a block a layer. */
Test(evict, memory_falls_to_the_budget_after_the_prompt)
{
    kvf_session *full = open_session("full"), *s = open_session(tight[0]), *d = open_session(tight[1]);
    cr_assert_eq(kvf_session_sync(full, text, 600, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(s, text, 600, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_sync(d, text, 600, &err), KVF_OK, "%s", err.msg);
    cr_assert_arr_eq(logits_of(full), logits_of(s), (size_t)n_vocab * sizeof(float));
    cr_assert_eq(blocks_of(full), 5 * 8);
    cr_assert_eq(blocks_of(s), 8);
    cr_assert_eq(blocks_of(d), 8);
    for (int i = 0; i < 40; i++) {
        cr_assert_eq(kvf_session_append(s, text + 600, 1, &err), KVF_OK);
        cr_assert(isfinite(logits_of(s)[0]));
    }
    cr_assert_leq(blocks_of(s), 2 * 8);
    kvf_session_close(full);
    kvf_session_close(s);
    kvf_session_close(d);
}

/* Another question about the same text: what was evicted is read again, and the result is a fresh session's. */
Test(evict, a_cut_before_what_was_evicted_reads_again)
{
    for (int p = 0; p < 2; p++) {
        kvf_session *s = open_session(tight[p]), *fresh = open_session(tight[p]);
        kvf_token other[500];
        memcpy(other, text, sizeof other);
        other[480] = (other[480] + 1) % 200;
        cr_assert_eq(kvf_session_sync(s, text, 500, &err), KVF_OK);
        for (int i = 0; i < 3; i++) cr_assert_eq(kvf_session_append(s, text, 1, &err), KVF_OK);
        cr_assert_eq(kvf_session_sync(s, other, 500, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(kvf_session_sync(fresh, other, 500, &err), KVF_OK);
        cr_assert_arr_eq(logits_of(s), logits_of(fresh), (size_t)n_vocab * sizeof(float));
        kvf_session_close(s);
        kvf_session_close(fresh);
    }
}

/* The window votes as a whole, wherever a chunk ends. */
Test(evict, who_votes_does_not_hang_on_where_the_chunks_end)
{
    static const int64_t batches[] = { 100, 399, 393, 390 };
    kvf_session *one = open_with("snapkv:budget=100,window=16", 400, 0);
    cr_assert_eq(kvf_session_sync(one, text, 400, &err), KVF_OK);
    cr_assert_eq(kvf_session_append(one, text, 1, &err), KVF_OK);
    for (int i = 0; i < 4; i++) {
        kvf_session *s = open_with("snapkv:budget=100,window=16", batches[i], 0);
        cr_assert_eq(kvf_session_sync(s, text, 400, &err), KVF_OK);
        cr_assert_eq(kvf_session_append(s, text, 1, &err), KVF_OK);
        double worst = 0;
        for (int32_t v = 0; v < n_vocab; v++) worst = fmax(worst, fabs((double)logits_of(one)[v] - logits_of(s)[v]));
        cr_assert_lt(worst, 0.1, "chunks of %lld: %g", (long long)batches[i], worst);
        kvf_session_close(s);
    }
    kvf_session_close(one);
}

static int stop_at_third(void *user, int64_t done, int64_t total)
{
    (void)done;
    (void)total;
    return ++*(int *)user == 3;
}

/* A cancelled prompt is carried on by asking for what comes next, and a scored text is read like a prompt. */
Test(evict, every_way_of_reading_a_text_keeps_to_the_budget)
{
    kvf_session *s = open_session("keydiff:budget=100,recent=16"), *u = open_session("keydiff:budget=100,recent=16");
    cr_assert_eq(kvf_session_sync(s, text, 500, &err), KVF_OK);
    static kvf_score scores[500], dense[500];
    cr_assert_eq(kvf_session_score(u, text, 500, scores, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(blocks_of(u), blocks_of(s));
    double worst = 0; /* the last layer computes more tokens here, and rounds otherwise */
    for (int32_t v = 0; v < n_vocab; v++) worst = fmax(worst, fabs((double)logits_of(s)[v] - logits_of(u)[v]));
    cr_assert_lt(worst, 0.1, "%g", worst);
    kvf_session *full = open_session("full");
    cr_assert_eq(kvf_session_score(full, text, 500, dense, &err), KVF_OK);
    int differ = 0;
    for (int i = 0; i < 500; i++) differ += dense[i].logprob != scores[i].logprob;
    cr_assert_gt(differ, 100, "the perplexity under eviction is the dense one");
    kvf_session_close(s);
    kvf_session_close(u);
    kvf_session_close(full);
    kvf_session_params p;
    kvf_session_params_init(&p);
    int calls = 0;
    p.policy = "keydiff:budget=100,recent=16";
    p.n_batch = 100;
    p.progress = stop_at_third;
    p.user = &calls;
    cr_assert_eq(kvf_session_open(&s, m, &p, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(s, text, 500, &err), KVF_ERR_CANCELLED);
    cr_assert_eq(kvf_session_tokens(s, NULL), 300);
    cr_assert(isfinite(logits_of(s)[0]));
    cr_assert_eq(blocks_of(s), 8);
    kvf_session_close(s);
}

/* What is asked of memory is what an eviction leaves and a chunk more; and what does not fit changes nothing. */
Test(evict, a_budget_of_memory_is_checked_by_what_will_be_held)
{
    enum { BLOCK_BYTES = 32768, LAYERS = 8 };
    kvf_session *s = open_with("keydiff:budget=128", 128, 2 * LAYERS * BLOCK_BYTES);
    cr_assert_eq(kvf_session_sync(s, text, 700, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(blocks_of(s), LAYERS);
    kvf_session_close(s);
    s = open_with("keydiff:budget=128", 128, LAYERS * BLOCK_BYTES);
    cr_assert_eq(kvf_session_sync(s, text, 700, &err), KVF_ERR_LIMIT);
    cr_assert_eq(kvf_session_tokens(s, NULL), 0);
    kvf_session_close(s);

    kvf_token other[600];
    const kvf_token *now;
    memcpy(other, text, sizeof other);
    other[3] = (other[3] + 1) % 200;
    s = open_with("snapkv:budget=100", 128, 4 * LAYERS * BLOCK_BYTES);
    cr_assert_eq(kvf_session_sync(s, text, 500, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_sync(s, other, 600, &err), KVF_ERR_LIMIT, "all of it is read again");
    cr_assert_eq(kvf_session_tokens(s, &now), 500);
    cr_assert_arr_eq(now, text, 500 * sizeof *now);
    cr_assert_eq(kvf_session_append(s, text + 500, 100, &err), KVF_OK, "%s", err.msg);
    kvf_session_close(s);
}

Test(evict, contradictions_are_refused)
{
    static const char *const bad[] = { "snapkv:budget=32,window=32", "snapkv:pool=2", "keydiff:budget=20,recent=20", "snapkv:budget=0" };
    for (int i = 0; i < 4; i++) {
        kvf_session *s;
        kvf_session_params p;
        kvf_session_params_init(&p);
        p.policy = bad[i];
        cr_assert_eq(kvf_session_open(&s, m, &p, &err), KVF_ERR_ARG, "%s", bad[i]);
    }
    kvf_model *g;
    cr_assert_eq(kvf_model_open(&g, ctx, KVF_TEST_DATA "/tiny/gemma3.gguf", &err), KVF_OK);
    kvf_session *s;
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.policy = "keydiff";
    cr_assert_eq(kvf_session_open(&s, g, &p, &err), KVF_ERR_UNSUPPORTED);
    cr_assert_not_null(strstr(err.msg, "sliding"), "%s", err.msg);
    kvf_model_close(g);
}
