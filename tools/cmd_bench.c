/* cmd_bench.c - kvfold bench: tokens per second of reading and of writing.
 *
 * "ppN" reads N tokens, "tgN" writes N tokens one after another, "@ dD" does so behind D tokens
 * already read. Tokens are random but the same in every run. Every test is warmed up once and
 * then repeated; what lies in front (-d) is read before the clock starts, and kept between
 * repetitions.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "commands.h"
#include "engine.h"
#include "interrupt.h"
#include "json.h"
#include "models.h"
#include "report.h"

typedef struct bench_options {
    const char *model, *device, *cpu, *precision, *policy;
    arg_ints prompt, gen, depth, threads;
    int64_t reps, batch;
    bool json, no_warmup, yes, verbose;
} bench_options;

#define ROW(field, name, letter, value, type, def, min, max, help)                                           \
    {                                                                                                        \
        name, letter, value, type, offsetof(bench_options, field), def, min, max, NULL, help                 \
    }

static const arg_row bench_rows[] = {
    ROW(model, "--model", 'm', "MODEL", ARG_TEXT, MODELS_DEFAULT, 0, 0,
        "path of a GGUF file, or a known model"),
    ROW(prompt, "--n-prompt", 'p', "N,...", ARG_INTS, "512", 0, 1 << 26, "tokens to read; 0: no such test"),
    ROW(gen, "--n-gen", 'n', "N,...", ARG_INTS, "128", 0, 1 << 26, "tokens to write; 0: no such test"),
    ROW(depth, "--n-depth", 'd', "N,...", ARG_INTS, "0", 0, 1 << 26,
        "tokens already read when the test begins"),
    ROW(threads, "--threads", 't', "N,...", ARG_INTS, "0", 0, 1024, "threads; 0: one per usable core"),
    ROW(reps, "--repetitions", 'r', "N", ARG_INT, "5", 1, 1000, "how often each test is measured"),
    ROW(batch, "--batch", 'b', "N", ARG_INT, "0", 0, 65536, "tokens computed together; 0: the best"),
    ROW(policy, "--policy", 0, "SPEC", ARG_TEXT, "full", 0, 0, "how the cache is compressed"),
    { "--device", 0, "NAME", ARG_CHOICE, offsetof(bench_options, device), "cpu", 0, 0, "cpu|cuda|auto",
      "cpu; cuda; auto: cuda if there is one (kvfold inspect --devices)" },
    { "--cpu", 0, "LEVEL", ARG_CHOICE, offsetof(bench_options, cpu), NULL, 0, 0, "auto|ref|avx2|avx512|amx",
      "highest instruction set to use (default: $KVFOLD_CPU, or auto)" },
    { "--precision", 0, "KIND", ARG_CHOICE, offsetof(bench_options, precision), "auto", 0, 0, "auto|f32",
      "auto or f32" },
    ROW(no_warmup, "--no-warmup", 0, NULL, ARG_FLAG, NULL, 0, 0, "measure the first run too"),
    ROW(json, "--json", 'j', NULL, ARG_FLAG, NULL, 0, 0, "print an array of JSON objects"),
    ROW(yes, "--yes", 'y', NULL, ARG_FLAG, NULL, 0, 0, "fetch a missing known model without asking"),
    ROW(verbose, "--verbose", 'v', NULL, ARG_FLAG, NULL, 0, 0, "say more on standard error"),
    { 0 },
};

static const arg_command bench_command = {
    .name = "bench",
    .synopsis = "[-m MODEL] [-p N] [-n N] [-d N] [-t N] [-r N] [--json]",
    .summary = "measure the speed of reading and writing",
    .details =
        "Lists (-p 512,4096) measure every combination. The figure is tokens per second, mean and standard\n"
        "deviation over the repetitions.",
    .examples = "  kvfold bench\n"
                "  kvfold bench -m model.gguf -p 512,4096 -n 0 -t 1,2 -r 3\n"
                "  kvfold bench -p 0 -n 64 -d 0,4096,16384 --json",
    .max_operands = 0,
};

typedef struct bench_case {
    int64_t n_prompt, n_gen, n_depth;
} bench_case;

typedef struct bench {
    bench_options o;
    engine_options eo; /* of the run at hand */
    engine e;
    kvf_token *tokens; /* [cap] depth, then prompt */
    kvf_token *ends;   /* [n_ends] tokens that would end an answer; never written here */
    int64_t n_ends;
    cJSON *results;
    bool headed; /* the table's head is printed */
} bench;

/* A fixed sequence: xorshift64*, Marsaglia 2003 and Vigna 2016. Ids are taken from the whole
 * vocabulary but its last 256, where models keep control tokens. */
static void fill_tokens(kvf_token *v, int64_t n, int32_t n_vocab, uint64_t seed)
{
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
    int32_t span = n_vocab > 512 ? n_vocab - 256 : n_vocab;
    for (int64_t i = 0; i < n; i++) {
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        v[i] = (kvf_token)((x * 0x2545f4914f6cdd1du >> 33) % (uint64_t)span);
    }
}

/* Write n tokens; all n must have gone through the layers when the clock stops. */
static kvf_status write_tokens(bench *b, int64_t n, double *seconds, kvf_error *err)
{
    float *logits = NULL;
    kvf_status rc = kvf_session_logits(b->e.session, &logits, err);
    if (rc != KVF_OK) return rc;
    double start = clock_s();
    for (int64_t i = 0; i < n; i++) {
        for (int64_t k = 0; k < b->n_ends; k++) logits[b->ends[k]] = -INFINITY;
        kvf_token token;
        rc = kvf_session_next(b->e.session, &token, err);
        if (rc < 0) return rc;
        if (rc == KVF_DONE)
            return report_fail(err, KVF_ERR_INTERNAL, "Generation ended at a token that was ruled out.");
        rc = kvf_session_logits(b->e.session, &logits, err);
        if (rc != KVF_OK) return rc;
    }
    *seconds = clock_s() - start;
    return KVF_OK;
}

/* One repetition. The depth tokens are the same each time and stay in the cache; the prompt's
 * first token differs, so that nothing of the last repetition is reused. */
static kvf_status run_once(bench *b, const bench_case *c, uint64_t rep, double *seconds, kvf_error *err)
{
    kvf_session *s = b->e.session;
    int32_t n_vocab = b->e.info.n_vocab;
    fill_tokens(b->tokens, c->n_depth, n_vocab, 1);
    int64_t before = c->n_depth;
    kvf_status rc = KVF_OK;
    if (c->n_gen && !before) b->tokens[before++] = b->e.info.bos >= 0 ? b->e.info.bos : 0;
    if (before) rc = kvf_session_sync(s, b->tokens, before, err);
    if (rc != KVF_OK) return rc;
    if (c->n_gen) return write_tokens(b, c->n_gen, seconds, err);

    kvf_token *prompt = b->tokens + c->n_depth;
    fill_tokens(prompt, c->n_prompt, n_vocab, 2 + rep);
    prompt[0] = (kvf_token)((int64_t)(rep + 1) % n_vocab);
    double start = clock_s();
    if (before)
        rc = kvf_session_append(s, prompt, c->n_prompt, err);
    else
        rc = kvf_session_sync(s, prompt, c->n_prompt, err);
    *seconds = clock_s() - start;
    return rc;
}

static void case_name(char out[64], const bench_case *c)
{
    int n =
        c->n_gen ? snprintf(out, 64, "tg%" PRId64, c->n_gen) : snprintf(out, 64, "pp%" PRId64, c->n_prompt);
    if (c->n_depth) snprintf(out + n, 64 - (size_t)n, " @ d%" PRId64, c->n_depth);
}

static void report_case(bench *b, const bench_case *c, double avg, double dev)
{
    char name[64];
    case_name(name, c);
    int32_t threads = kvf_ctx_threads(b->e.ctx);
    kvf_stats stats = { .size = sizeof stats };
    kvf_session_stats(b->e.session, &stats, NULL);
    const char *model = b->e.info.name && b->e.info.name[0] ? b->e.info.name : b->o.model;
    if (!b->o.json) {
        if (!b->headed) {
            printf("model: %s, %s\n\n", model, b->e.info.quantization);
            printf("%-8s %7s  %-20s %18s\n", "cpu", "threads", "test", "tokens/s");
            b->headed = true;
        }
        printf("%-8s %7d  %-20s %9.2f +- %6.2f\n", stats.cpu, threads, name, avg, dev);
        fflush(stdout);
        if (b->o.verbose) report_note("kernels %s", stats.kernels);
        return;
    }
    cJSON *o = json_object(b->results, NULL);
    json_text(o, "test", name, (size_t)-1);
    json_int(o, "n_prompt", c->n_prompt);
    json_int(o, "n_gen", c->n_gen);
    json_int(o, "n_depth", c->n_depth);
    json_int(o, "threads", threads);
    json_real(o, "avg_ts", avg);
    json_real(o, "stddev_ts", dev);
    json_text(o, "model", model, (size_t)-1);
    json_text(o, "quantization", b->e.info.quantization, (size_t)-1);
    json_int(o, "repetitions", b->o.reps);
    json_text(o, "backend", stats.backend, (size_t)-1);
    json_text(o, "cpu", stats.cpu, (size_t)-1);
    json_text(o, "kernels", stats.kernels, (size_t)-1);
    json_text(o, "policy", stats.policy, (size_t)-1);
    json_int(o, "peak_rss_bytes", engine_peak_rss());
}

static kvf_status run_case(bench *b, const bench_case *c, kvf_error *err)
{
    double sum = 0, squares = 0, seconds = 1;
    int64_t n = c->n_gen ? c->n_gen : c->n_prompt;
    kvf_status rc = KVF_OK;
    bench_case warm = *c;
    /* Warming up touches the weights and the depth tokens; a short run does. */
    if (warm.n_gen > 4) warm.n_gen = 4;
    interrupt_attach(b->e.session);
    if (!b->o.no_warmup) rc = run_once(b, &warm, 0, &seconds, err);
    for (int64_t r = 0; r < b->o.reps && rc == KVF_OK; r++) {
        rc = run_once(b, c, (uint64_t)r + 1, &seconds, err);
        double ts = (double)n / (seconds > 1e-9 ? seconds : 1e-9);
        sum += ts;
        squares += ts * ts;
    }
    if (rc != KVF_OK) return rc;
    double k = (double)b->o.reps, avg = sum / k;
    double var = k > 1 ? (squares - k * avg * avg) / (k - 1) : 0;
    report_case(b, c, avg, var > 0 ? sqrt(var) : 0);
    return KVF_OK;
}

/* ---- All combinations --------------------------------------------------------------------- */

static kvf_status default_ints(arg_ints *list, int64_t value, kvf_error *err)
{
    if (list->n) return KVF_OK;
    list->v = malloc(sizeof *list->v);
    if (!list->v) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the options.");
    list->v[0] = value;
    list->n = 1;
    return KVF_OK;
}

static int64_t largest(const arg_ints *list)
{
    int64_t max = 0;
    for (size_t i = 0; i < list->n; i++)
        if (list->v[i] > max) max = list->v[i];
    return max;
}

static kvf_status find_ends(bench *b, kvf_error *err)
{
    free(b->ends);
    b->n_ends = 0;
    b->ends = malloc((size_t)b->e.info.n_vocab * sizeof *b->ends);
    if (!b->ends) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the vocabulary.");
    for (kvf_token t = 0; t < b->e.info.n_vocab; t++)
        if (kvf_token_is_end(b->e.model, t)) b->ends[b->n_ends++] = t;
    return KVF_OK;
}

/* All tests at one number of threads. */
static kvf_status run_threads(bench *b, int64_t threads, kvf_error *err)
{
    int64_t longest = largest(&b->o.depth) + 1;
    int64_t body = largest(&b->o.prompt) > largest(&b->o.gen) ? largest(&b->o.prompt) : largest(&b->o.gen);
    b->eo = (engine_options){ .model = b->o.model,
                              .device = b->o.device,
                              .cpu = b->o.cpu,
                              .precision = b->o.precision,
                              .policy = b->o.policy,
                              .threads = threads,
                              .batch = b->o.batch,
                              .ctx = longest + body,
                              .yes = b->o.yes,
                              .verbose = b->o.verbose,
                              .quiet = !b->o.verbose };
    kvf_status rc = engine_open(&b->e, &b->eo, err);
    if (rc == KVF_OK) rc = find_ends(b, err);
    if (rc == KVF_OK) rc = engine_open_session(&b->e, &b->eo, NULL, err);
    free(b->tokens);
    b->tokens = malloc((size_t)(longest + body) * sizeof *b->tokens);
    if (rc == KVF_OK && !b->tokens) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the tokens.");
    /* Depth is the outer loop: what lies in front is read once for both tests. */
    for (size_t d = 0; d < b->o.depth.n && rc == KVF_OK; d++) {
        int64_t depth = b->o.depth.v[d];
        for (size_t i = 0; i < b->o.prompt.n && rc == KVF_OK; i++)
            if (b->o.prompt.v[i]) rc = run_case(b, &(bench_case){ b->o.prompt.v[i], 0, depth }, err);
        for (size_t i = 0; i < b->o.gen.n && rc == KVF_OK; i++)
            if (b->o.gen.v[i]) rc = run_case(b, &(bench_case){ 0, b->o.gen.v[i], depth }, err);
    }
    engine_close(&b->e);
    return rc;
}

static kvf_status bench_run(bench *b, kvf_error *err)
{
    kvf_status rc = default_ints(&b->o.prompt, 512, err);
    if (rc == KVF_OK) rc = default_ints(&b->o.gen, 128, err);
    if (rc == KVF_OK) rc = default_ints(&b->o.depth, 0, err);
    if (rc == KVF_OK) rc = default_ints(&b->o.threads, 0, err);
    if (rc == KVF_OK && !largest(&b->o.prompt) && !largest(&b->o.gen))
        rc = report_fail(err, KVF_ERR_ARG, "-p 0 and -n 0 leave nothing to measure.");
    if (rc != KVF_OK) return rc;
    if (b->o.json) b->results = cJSON_CreateArray();
    for (size_t i = 0; i < b->o.threads.n && rc == KVF_OK; i++) rc = run_threads(b, b->o.threads.v[i], err);
    if (b->o.json && b->results && rc == KVF_OK) {
        cJSON *results = b->results;
        b->results = NULL;
        if (!json_print(results))
            rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
    }
    return rc;
}

int cmd_bench(int argc, char **argv)
{
    bench b;
    memset(&b, 0, sizeof b);
    arg_group groups[] = { { "Options", bench_rows, &b.o }, { NULL, NULL, NULL } };
    arg_texts operands = { 0 };
    arg_result parsed = args_parse(&bench_command, groups, argc, argv, &operands);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;
    kvf_error err = { 0 };
    kvf_status rc = bench_run(&b, &err);
    int code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    engine_close(&b.e);
    cJSON_Delete(b.results);
    free(b.tokens);
    free(b.ends);
    args_free(groups, &operands);
    return code;
}
