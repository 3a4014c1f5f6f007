/* test_fixture_logprobs.c - real models agree with llama.cpp, position by position.
 *
 * tests/data/engine/logprobs.MODEL.TEXT.txt was made by llama.cpp from the same files. Both engines
 * round differently, so the bounds are statistical: mean negative log-likelihood within 1 %, mean
 * difference of the top-1 log-probability under 0.1 nats, the same top-1 token at 94 % of positions.
 * llama.cpp rounds activations to 8 bits: exact_nll.txt has what it gives without, and a fixture that
 * is itself off by r is allowed 1 % + r. Against the exact value the bound is 1 % for every form of
 * our arithmetic, and 0.1 % for F32.
 * Skipped when the model files are not there (scripts/fetch_model.py).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvfold/kvfold.h"

#define MAX_TOKENS 512

/* The scalar reference does a hundredth of the work per second. */
#define REFERENCE_TOKENS 6

typedef struct expected {
    kvf_token token;
    double next_logprob;
    kvf_token top[5];
    double top_logprob[5];
} expected;

typedef struct fixture {
    const char *model, *file, *text;
} fixture;

static const fixture fixtures[] = {
    { "qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "prose" },
    { "qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "code" },
    { "gemma-3-270m", "gemma-3-270m-q4_k_m.gguf", "prose" },
    { "gemma-3-270m", "gemma-3-270m-q4_k_m.gguf", "code" },
};

/* Returns false if the model file is nowhere. */
static bool find_model(char *out, size_t cap, const char *file)
{
    const char *dir = getenv("KVFOLD_MODELS"), *home = getenv("HOME");
    if (dir && *dir)
        snprintf(out, cap, "%s/%s", dir, file);
    else
        snprintf(out, cap, "%s/.cache/kvfold/models/%s", home ? home : "", file);
    FILE *f = fopen(out, "rb");
    if (f) fclose(f);
    return f != NULL;
}

static int64_t read_expected(const fixture *x, expected *out, double *mean_nll)
{
    char path[512], line[1024];
    snprintf(path, sizeof path, KVF_TEST_DATA "/engine/logprobs.%s.%s.txt", x->model, x->text);
    FILE *f = fopen(path, "r");
    cr_assert(f, "%s", path);
    int64_t n = 0;
    while (fgets(line, sizeof line, f)) {
        if (line[0] == '#') {
            int n_over;
            sscanf(line, "# mean_nll %lf over %d", mean_nll, &n_over);
            continue;
        }
        cr_assert_lt(n, MAX_TOKENS);
        expected *e = &out[n++];
        int64_t pos;
        int used = 0;
        cr_assert_eq(sscanf(line, "%" SCNd64 " %" SCNd32 " %lf%n", &pos, &e->token, &e->next_logprob, &used),
                     3);
        char *p = line + used;
        for (int k = 0; k < 5; k++) {
            int step = 0;
            cr_assert_eq(sscanf(p, " %" SCNd32 ":%lf%n", &e->top[k], &e->top_logprob[k], &step), 2);
            p += step;
        }
    }
    fclose(f);
    return n;
}

static char *read_text(const char *name, size_t *n)
{
    char path[512];
    snprintf(path, sizeof path, KVF_TEST_DATA "/engine/%s.txt", name);
    FILE *f = fopen(path, "rb");
    cr_assert(f, "%s", path);
    char *text = malloc(65536);
    cr_assert(text);
    *n = fread(text, 1, 65536, f);
    fclose(f);
    return text;
}

static double read_exact(const fixture *x)
{
    char line[256], model[64], text[16];
    FILE *f = fopen(KVF_TEST_DATA "/engine/exact_nll.txt", "r");
    cr_assert(f);
    double nll = 0, v;
    while (fgets(line, sizeof line, f))
        if (sscanf(line, "%63s %15s %lf", model, text, &v) == 3 && !strcmp(model, x->model) && !strcmp(text, x->text)) nll = v;
    fclose(f);
    cr_assert_gt(nll, 0);
    return nll;
}

/* Scores 1..n-1 against the fixture's positions 0..n-2. */
static void compare(const fixture *x, const char *how, bool f32, const kvf_score *scores, const expected *want, int64_t n)
{
    double nll = 0, want_nll = 0, diff = 0, exact = read_exact(x);
    int64_t same = 0, m = n - 1;
    for (int64_t i = 0; i < m; i++) {
        const kvf_score *s = &scores[i + 1];
        nll -= (double)s->logprob / (double)m;
        want_nll -= want[i].next_logprob / (double)m;
        diff += fabs((double)s->top_logprob[0] - want[i].top_logprob[0]) / (double)m;
        same += s->top[0] == want[i].top[0];
    }
    double rel = fabs(nll / want_nll - 1), own = fabs(want_nll / exact - 1), off = fabs(nll / exact - 1);
    double share = (double)same / (double)m;
    printf("%-20s %-6s %-12s n %3" PRId64 "  mean nll %.4f, expected %.4f (%+.2f%%), exact %.4f (%+.2f%%)  top-1 differs by %.4f, same %.1f%%\n",
           x->model, x->text, how, m, nll, want_nll, (nll / want_nll - 1) * 100, exact, (nll / exact - 1) * 100, diff, share * 100);
    cr_expect_lt(rel, own > 0.01 ? 0.01 + own : 0.01, "%s %s %s: mean negative log-likelihood is %.2f%% off", x->model, x->text, how, rel * 100);
    cr_expect_lt(off, f32 ? 0.001 : 0.01, "%s %s %s: %.2f%% off the exact value", x->model, x->text, how, off * 100);
    cr_expect_lt(diff, 0.1, "%s %s %s: top-1 log-probabilities differ by %.3f", x->model, x->text, how, diff);
    cr_expect_geq(share, 0.94, "%s %s %s: same top-1 token at %.1f%%", x->model, x->text, how, share * 100);
}

/* Score the first `most` tokens of the fixture's text; n gets how many those are. Returns false if
 * this processor has no such instruction set. */
static bool score_text(const fixture *x, const char *path, const kvf_ctx_params *p, int64_t most,
                       kvf_score *scores, const expected *want, int64_t *n, char how[32])
{
    static kvf_token tokens[MAX_TOKENS];
    kvf_error err = { 0 };
    kvf_ctx *ctx = NULL;
    kvf_status rc = kvf_ctx_open(&ctx, p, &err);
    if (rc == KVF_ERR_UNSUPPORTED) return false;
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    kvf_model *model = NULL;
    cr_assert_eq(kvf_model_open(&model, ctx, path, &err), KVF_OK, "%s", err.msg);
    size_t n_bytes;
    char *text = read_text(x->text, &n_bytes);
    kvf_token_buf buf = { .v = tokens, .cap = MAX_TOKENS };
    rc = kvf_tokenize(model, text, n_bytes, KVF_TOKENIZE_SPECIAL | KVF_TOKENIZE_BOS, &buf, &err);
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    cr_assert_eq(buf.n, *n);
    for (int64_t i = 0; i < buf.n; i++) cr_assert_eq(tokens[i], want[i].token, "token %" PRId64, i);
    if (*n > most) *n = most;
    kvf_session *s = NULL;
    cr_assert_eq(kvf_session_open(&s, model, NULL, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_score(s, tokens, *n, scores, &err), KVF_OK, "%s", err.msg);
    snprintf(how, 32, "%s %s", kvf_ctx_cpu(ctx), p->precision == KVF_PRECISION_F32 ? "f32" : "auto");
    free(text);
    kvf_session_close(s);
    kvf_model_close(model);
    kvf_ctx_close(ctx);
    return true;
}

static void check(const fixture *x, const char *path, const char *cpu, kvf_precision precision, int64_t most)
{
    static expected want[MAX_TOKENS];
    static kvf_score scores[MAX_TOKENS];
    double mean = 0;
    int64_t n = read_expected(x, want, &mean);
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.cpu = cpu;
    p.precision = precision;
    char how[32];
    if (score_text(x, path, &p, most, scores, want, &n, how)) compare(x, how, precision == KVF_PRECISION_F32, scores, want, n);
}

static void check_all(const char *cpu, kvf_precision precision, int64_t most)
{
    int n_found = 0;
    for (size_t i = 0; i < sizeof fixtures / sizeof *fixtures; i++) {
        char path[1024];
        if (!find_model(path, sizeof path, fixtures[i].file)) continue;
        n_found++;
        check(&fixtures[i], path, cpu, precision, most);
    }
    if (!n_found) cr_skip("the model files are not there: scripts/fetch_model.py fetches them");
}

Test(fixture_logprobs, amx_agrees_with_llama_cpp) { check_all("amx", KVF_PRECISION_AUTO, MAX_TOKENS); }
Test(fixture_logprobs, avx512_agrees_with_llama_cpp) { check_all("avx512", KVF_PRECISION_AUTO, MAX_TOKENS); }
Test(fixture_logprobs, avx2_agrees_with_llama_cpp) { check_all("avx2", KVF_PRECISION_AUTO, MAX_TOKENS); }
Test(fixture_logprobs, f32_agrees_with_llama_cpp) { check_all(NULL, KVF_PRECISION_F32, MAX_TOKENS); }

/* Same weights, same order of magnitude of rounding: single precision against the readable
 * reference, for as many tokens as the reference's speed allows. */
Test(fixture_logprobs, f32_agrees_with_the_reference)
{
    static expected want[MAX_TOKENS];
    static kvf_score simd[MAX_TOKENS], ref[MAX_TOKENS];
    int n_found = 0;
    for (size_t i = 0; i < sizeof fixtures / sizeof *fixtures; i += 2) {
        char path[1024], how[32];
        double mean, worst = 0;
        if (!find_model(path, sizeof path, fixtures[i].file)) continue;
        n_found++;
        int64_t n = read_expected(&fixtures[i], want, &mean), n_ref = n;
        kvf_ctx_params p;
        kvf_ctx_params_init(&p);
        p.precision = KVF_PRECISION_F32;
        cr_assert(score_text(&fixtures[i], path, &p, REFERENCE_TOKENS, simd, want, &n, how));
        p.cpu = "ref";
        cr_assert(score_text(&fixtures[i], path, &p, REFERENCE_TOKENS, ref, want, &n_ref, how));
        for (int64_t k = 1; k < n; k++) {
            double d = fabs((double)simd[k].top_logprob[0] - (double)ref[k].top_logprob[0]);
            double e = fabs((double)simd[k].logprob - (double)ref[k].logprob);
            worst = fmax(worst, fmax(d, e));
        }
        printf("%-20s f32 and reference differ by %.6f at most\n", fixtures[i].model, worst);
        cr_expect_lt(worst, 1e-3, "%s: f32 and reference differ by %g", fixtures[i].model, worst);
    }
    if (!n_found) cr_skip("the model files are not there: scripts/fetch_model.py fetches them");
}
