/* test_tiny.c - whole models against logits computed elsewhere (tests/data/tiny/README.md).
 *
 * Every architecture and RoPE scaling, on every instruction set this processor has, through the
 * public interface only. Tolerances are on log-probabilities: 1e-3 where weights are multiplied in
 * f32 (the expected logits use the same f16 keys and values), 0.15 at most and 0.02 in the mean
 * where activations are rounded (0.124 and 0.014 are reached).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvfold/kvfold.h"

#define MAX_VOCAB 512
#define MAX_TOKENS 256
#define MAX_POS 8
#define F32_TOLERANCE 1e-3
#define AUTO_TOLERANCE 0.15
#define AUTO_MEAN 0.02

static const char *const models[] = { "llama", "llama-linear", "llama-yarn", "llama-rope-freqs",
                                      "qwen2", "qwen3", "gemma3" };
#define N_MODELS (sizeof models / sizeof models[0])
static const char *const cpus[] = { "ref", "avx2", "avx512", "amx" };
#define N_CPUS (sizeof cpus / sizeof cpus[0])

typedef struct expected {
    kvf_token token[MAX_TOKENS];
    int64_t n_token;
    int64_t pos[MAX_POS];
    int64_t n_pos;
    double logprob[MAX_POS][MAX_VOCAB];
    int64_t n_vocab;
} expected;

static void log_softmax(double *x, int64_t n)
{
    double max = x[0], sum = 0;
    for (int64_t i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int64_t i = 0; i < n; i++) sum += exp(x[i] - max);
    for (int64_t i = 0; i < n; i++) x[i] -= max + log(sum);
}

static char *read_text(const char *path)
{
    FILE *f = fopen(path, "rb");
    cr_assert_not_null(f, "cannot open %s", path);
    fseek(f, 0, SEEK_END);
    long n = ftell(f);
    rewind(f);
    char *text = calloc((size_t)n + 1, 1);
    cr_assert_eq(fread(text, 1, (size_t)n, f), (size_t)n);
    fclose(f);
    return text;
}

static void read_expected(expected *e, const char *model)
{
    char path[512];
    snprintf(path, sizeof path, "%s/tiny/%s.logits.txt", KVF_TEST_DATA, model);
    char *text = read_text(path), *p = text;
    memset(e, 0, sizeof *e);
    for (; *p != '\n'; e->n_token++) {
        cr_assert_lt(e->n_token, MAX_TOKENS);
        e->token[e->n_token] = (kvf_token)strtol(p, &p, 10);
    }
    for (p++; *p; p++, e->n_pos++) {
        cr_assert_lt(e->n_pos, MAX_POS);
        e->pos[e->n_pos] = strtol(p, &p, 10);
        cr_assert_eq(*p++, ':');
        for (e->n_vocab = 0; *p != '\n'; e->n_vocab++) {
            cr_assert_lt(e->n_vocab, MAX_VOCAB);
            e->logprob[e->n_pos][e->n_vocab] = strtod(p, &p);
        }
        log_softmax(e->logprob[e->n_pos], e->n_vocab);
    }
    cr_assert_gt(e->n_pos, 0);
    free(text);
}

/* NULL when this processor lacks the instruction set. */
static kvf_ctx *open_ctx(const char *cpu, kvf_precision precision, int32_t n_threads)
{
    kvf_ctx_params p;
    kvf_ctx *ctx;
    kvf_error err = { 0 };
    kvf_ctx_params_init(&p);
    p.cpu = cpu;
    p.precision = precision;
    p.n_threads = n_threads;
    kvf_status rc = kvf_ctx_open(&ctx, &p, &err);
    if (rc == KVF_ERR_UNSUPPORTED) return NULL;
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    return ctx;
}

static kvf_model *open_model(kvf_ctx *ctx, const char *name)
{
    char path[512];
    kvf_model *m;
    kvf_error err = { 0 };
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, name);
    cr_assert_eq(kvf_model_open(&m, ctx, path, &err), KVF_OK, "%s", err.msg);
    return m;
}

static kvf_session *open_session(kvf_model *m, int64_t n_batch)
{
    kvf_session_params p;
    kvf_session *s;
    kvf_error err = { 0 };
    kvf_session_params_init(&p);
    p.n_batch = n_batch;
    cr_assert_eq(kvf_session_open(&s, m, &p, &err), KVF_OK, "%s", err.msg);
    return s;
}

/* Append up to each expected position in steps of at most `step` tokens; out is the log-probability
 * at every position. */
static void run(kvf_session *s, const expected *e, int64_t step, double (*out)[MAX_VOCAB])
{
    kvf_error err = { 0 };
    int64_t at = 0;
    for (int64_t i = 0; i < e->n_pos; i++) {
        while (at <= e->pos[i]) {
            int64_t n = e->pos[i] + 1 - at < step ? e->pos[i] + 1 - at : step;
            cr_assert_eq(kvf_session_append(s, e->token + at, n, &err), KVF_OK, "%s", err.msg);
            at += n;
        }
        float *logits;
        cr_assert_eq(kvf_session_logits(s, &logits, &err), KVF_OK, "%s", err.msg);
        for (int64_t t = 0; t < e->n_vocab; t++) out[i][t] = (double)logits[t];
        log_softmax(out[i], e->n_vocab);
    }
}

typedef struct difference {
    double max, mean;
} difference;

static difference compare(const double (*a)[MAX_VOCAB], const double (*b)[MAX_VOCAB], const expected *e)
{
    difference d = { 0, 0 };
    for (int64_t i = 0; i < e->n_pos; i++) {
        for (int64_t t = 0; t < e->n_vocab; t++) {
            double x = fabs(a[i][t] - b[i][t]);
            if (!(x <= d.max)) d.max = x; /* takes a NaN, too */
            d.mean += x / (double)(e->n_pos * e->n_vocab);
        }
    }
    return d;
}

static expected want;
static double got[MAX_POS][MAX_VOCAB], other[MAX_POS][MAX_VOCAB];

/* step > pos: each stretch between expected positions is one prefill; 1: every token is decoded. */
static void check_all(kvf_precision precision, int64_t step, double max, double mean)
{
    int ran = 0;
    for (size_t c = 0; c < N_CPUS; c++) {
        kvf_ctx *ctx = open_ctx(cpus[c], precision, 2);
        if (!ctx) continue;
        for (size_t i = 0; i < N_MODELS; i++) {
            read_expected(&want, models[i]);
            kvf_model *m = open_model(ctx, models[i]);
            kvf_session *s = open_session(m, 0);
            run(s, &want, step, got);
            difference d = compare((const double(*)[MAX_VOCAB])got, (const double(*)[MAX_VOCAB])want.logprob, &want);
            cr_expect(d.max < max && d.mean < mean, "%s on %s, %lld at a time: max %g, mean %g", models[i], cpus[c],
                      (long long)step, d.max, d.mean);
            kvf_session_close(s);
            kvf_model_close(m);
        }
        kvf_ctx_close(ctx);
        ran++;
    }
    cr_assert_gt(ran, 0);
}

Test(tiny, every_architecture_is_described_as_its_file_says)
{
    static const struct {
        const char *arch, *tokenizer, *chat;
        int32_t head_dim, window;
    } is[N_MODELS] = {
        { "llama", "spm", "mistral", 32, 0 },  { "llama", "spm", "mistral", 32, 0 },
        { "llama", "spm", "mistral", 32, 0 },  { "llama", "bpe/llama-bpe", "llama3", 32, 0 },
        { "qwen2", "bpe/qwen2", "chatml", 64, 0 }, { "qwen3", "bpe/qwen2", "chatml", 32, 0 },
        { "gemma3", "spm", "gemma", 32, 24 },
    };
    kvf_ctx *ctx = open_ctx(NULL, KVF_PRECISION_AUTO, 1);
    for (size_t i = 0; i < N_MODELS; i++) {
        read_expected(&want, models[i]);
        kvf_model *m = open_model(ctx, models[i]);
        kvf_model_info info = { .size = sizeof info };
        cr_assert_eq(kvf_model_get_info(m, &info, NULL), KVF_OK);
        cr_expect_str_eq(info.arch, is[i].arch);
        cr_expect_str_eq(info.tokenizer, is[i].tokenizer, "%s: %s", models[i], info.tokenizer);
        cr_expect_str_eq(info.chat_template, is[i].chat, "%s: %s", models[i], info.chat_template);
        cr_expect_eq(info.head_dim, is[i].head_dim);
        cr_expect_eq(info.window, is[i].window);
        cr_expect_eq(info.n_vocab, want.n_vocab);
        cr_expect_eq(info.n_embd, 256);
        kvf_model_close(m);
    }
    kvf_ctx_close(ctx);
}

Test(tiny, f32_prefill_gives_the_expected_logits)
{
    check_all(KVF_PRECISION_F32, MAX_TOKENS, F32_TOLERANCE, F32_TOLERANCE);
}

Test(tiny, f32_decode_gives_the_expected_logits)
{
    check_all(KVF_PRECISION_F32, 1, F32_TOLERANCE, F32_TOLERANCE);
}

Test(tiny, auto_prefill_stays_near_the_expected_logits)
{
    check_all(KVF_PRECISION_AUTO, MAX_TOKENS, AUTO_TOLERANCE, AUTO_MEAN);
}

Test(tiny, auto_decode_stays_near_the_expected_logits)
{
    check_all(KVF_PRECISION_AUTO, 1, AUTO_TOLERANCE, AUTO_MEAN);
}

Test(tiny, odd_chunks_equal_one_by_one)
{
    static const int64_t steps[] = { 2, 3, 7, 13, 31, 65, 129 };
    kvf_ctx *ctx = open_ctx(NULL, KVF_PRECISION_F32, 2);
    for (size_t i = 0; i < N_MODELS; i++) {
        read_expected(&want, models[i]);
        kvf_model *m = open_model(ctx, models[i]);
        kvf_session *s = open_session(m, 0);
        run(s, &want, 1, got);
        kvf_session_close(s);
        for (size_t k = 0; k < sizeof steps / sizeof steps[0]; k++) {
            /* The session cuts one append into chunks of n_batch; the test cuts into appends. */
            s = open_session(m, k % 2 ? steps[k] : 0);
            run(s, &want, k % 2 ? MAX_TOKENS : steps[k], other);
            difference d = compare((const double(*)[MAX_VOCAB])got, (const double(*)[MAX_VOCAB])other, &want);
            cr_expect(d.max < F32_TOLERANCE, "%s in chunks of %lld: %g", models[i], (long long)steps[k], d.max);
            kvf_session_close(s);
        }
        kvf_model_close(m);
    }
    kvf_ctx_close(ctx);
}

Test(tiny, sync_after_a_changed_tail_equals_a_fresh_session)
{
    kvf_ctx *ctx = open_ctx(NULL, KVF_PRECISION_F32, 2);
    for (size_t i = 0; i < N_MODELS; i++) {
        read_expected(&want, models[i]);
        kvf_model *m = open_model(ctx, models[i]);
        kvf_session *s = open_session(m, 0);
        kvf_error err = { 0 };
        kvf_token wrong[MAX_TOKENS];
        memcpy(wrong, want.token, sizeof wrong);
        for (int64_t t = 77; t < want.n_token; t++) wrong[t] = want.token[want.n_token - t];
        cr_assert_eq(kvf_session_sync(s, wrong, want.n_token, &err), KVF_OK, "%s", err.msg);
        int64_t last = want.n_pos - 1;
        cr_assert_eq(kvf_session_sync(s, want.token, want.pos[last] + 1, &err), KVF_OK, "%s", err.msg);
        float *logits;
        cr_assert_eq(kvf_session_logits(s, &logits, &err), KVF_OK, "%s", err.msg);
        for (int64_t t = 0; t < want.n_vocab; t++) got[0][t] = (double)logits[t];
        log_softmax(got[0], want.n_vocab);
        double max = 0;
        for (int64_t t = 0; t < want.n_vocab; t++) max = fmax(max, fabs(got[0][t] - want.logprob[last][t]));
        cr_expect(max < F32_TOLERANCE, "%s: %g", models[i], max);
        kvf_stats stats = { .size = sizeof stats };
        cr_assert_eq(kvf_session_stats(s, &stats, NULL), KVF_OK);
        cr_expect_geq(stats.n_reused_tokens, 77, "%s reused %lld", models[i], (long long)stats.n_reused_tokens);
        kvf_session_close(s);
        kvf_model_close(m);
    }
    kvf_ctx_close(ctx);
}

Test(tiny, result_does_not_depend_on_threads)
{
    for (size_t i = 0; i < N_MODELS; i++) {
        read_expected(&want, models[i]);
        for (int32_t threads = 1; threads <= 3; threads += 2) {
            kvf_ctx *ctx = open_ctx(NULL, KVF_PRECISION_F32, threads);
            kvf_model *m = open_model(ctx, models[i]);
            kvf_session *s = open_session(m, 0);
            run(s, &want, MAX_TOKENS, threads == 1 ? got : other);
            kvf_session_close(s);
            kvf_model_close(m);
            kvf_ctx_close(ctx);
        }
        difference d = compare((const double(*)[MAX_VOCAB])got, (const double(*)[MAX_VOCAB])other, &want);
        cr_expect(d.max < 1e-4, "%s: %g", models[i], d.max);
    }
}
