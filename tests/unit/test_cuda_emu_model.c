/* test_cuda_emu_model.c - whole models on the CUDA backend against logits computed elsewhere
 * (tests/data/tiny/README.md): every architecture, prefill and decode, decode as recorded steps too.
 *
 * Tolerances on log-probabilities are those of tests/model/test_tiny.c, but for exact mode with many tokens,
 * where attention rounds queries and weights to f16.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/rig.h"

#include <stdio.h>

#include "api/ctx.h"

#define MAX_VOCAB 512
#define MAX_TOKENS 256
#define MAX_POS 8

static const char *const models[] = { "llama", "llama-linear", "llama-yarn", "llama-rope-freqs", "qwen2", "qwen3", "gemma3" };
enum { N_MODELS = sizeof models / sizeof *models };

typedef struct expected {
    kvf_token token[MAX_TOKENS];
    int64_t n_token, n_pos, n_vocab;
    int64_t pos[MAX_POS];
    double logprob[MAX_POS][MAX_VOCAB];
} expected;

static void log_softmax(double *x, int64_t n)
{
    double max = x[0], sum = 0;
    for (int64_t i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int64_t i = 0; i < n; i++) sum += exp(x[i] - max);
    for (int64_t i = 0; i < n; i++) x[i] -= max + log(sum);
}

/* A line of tokens, then for some positions "pos: logits". */
static void read_expected(expected *e, const char *model)
{
    static char text[1 << 20];
    char path[512], *p = text;
    snprintf(path, sizeof path, "%s/tiny/%s.logits.txt", KVF_TEST_DATA, model);
    FILE *f = fopen(path, "rb");
    cr_assert_not_null(f, "cannot open %s", path);
    text[fread(text, 1, sizeof text - 1, f)] = 0;
    fclose(f);
    memset(e, 0, sizeof *e);
    for (; *p != '\n' && e->n_token < MAX_TOKENS; e->n_token++) e->token[e->n_token] = (kvf_token)strtol(p, &p, 10);
    for (p++; *p && e->n_pos < MAX_POS; p++, e->n_pos++) {
        e->pos[e->n_pos] = strtol(p, &p, 10);
        cr_assert_eq(*p++, ':');
        for (e->n_vocab = 0; *p != '\n' && e->n_vocab < MAX_VOCAB; e->n_vocab++) e->logprob[e->n_pos][e->n_vocab] = strtod(p, &p);
        log_softmax(e->logprob[e->n_pos], e->n_vocab);
    }
    cr_assert_gt(e->n_pos, 0);
}

/* A ctx whose backend is the device's. */
static kvf_ctx *open_ctx(const kvf_backend_module *m, bool f32)
{
    kvf_ctx_params p;
    kvf_ctx *ctx;
    kvf_ctx_params_init(&p);
    p.cpu = "ref";
    p.n_threads = 1;
    OK(kvf_ctx_open(&ctx, &p, &err));
    ctx->backend->ops->close(ctx->backend);
    kvf_device_params dp = { .memory_bytes = 256u << 20, .f32 = f32, .mem = &ctx->mem, .log = &ctx->log };
    OK(m->open(&ctx->backend, &dp, &err));
    return ctx;
}

/* Emulated, a token takes tens of milliseconds: fewer models and positions then. */
#ifdef KVF_TEST_CUDA_EMU
enum { EVERY = 4, POSITIONS = 5 };
#else
enum { EVERY = 1, POSITIONS = MAX_POS };
#endif

typedef struct run_how {
    bool f32, launch; /* launch: no recorded steps */
    int first;
    int64_t step;
    double max, mean;
} run_how;

static void run_model(kvf_ctx *ctx, const char *name, const run_how *how)
{
    static expected e;
    char path[512];
    kvf_model *m;
    kvf_session *s;
    kvf_session_params p;
    double worst = 0, mean = 0, x[MAX_VOCAB];
    int64_t at = 0;
    read_expected(&e, name);
    if (e.n_pos > POSITIONS) e.n_pos = POSITIONS;
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, name);
    OK(kvf_model_open(&m, ctx, path, &err));
    kvf_session_params_init(&p);
    OK(kvf_session_open(&s, m, &p, &err));
    for (int64_t i = 0; i < e.n_pos; i++) {
        while (at <= e.pos[i]) {
            int64_t n = e.pos[i] + 1 - at < how->step ? e.pos[i] + 1 - at : how->step;
            OK(kvf_session_append(s, e.token + at, n, &err));
            at += n;
        }
        float *logits;
        OK(kvf_session_logits(s, &logits, &err));
        for (int64_t t = 0; t < e.n_vocab; t++) x[t] = (double)logits[t];
        log_softmax(x, e.n_vocab);
        for (int64_t t = 0; t < e.n_vocab; t++) {
            double off = fabs(x[t] - e.logprob[i][t]);
            if (!(off <= worst)) worst = off;
            mean += off / (double)(e.n_pos * e.n_vocab);
        }
    }
    cr_expect(worst < how->max && mean < how->mean, "%s, f32 %d, %lld at a time: max %g, mean %g", name, how->f32, (long long)how->step, worst, mean);
    kvf_session_close(s);
    kvf_model_close(m);
}

static void run_all(run_how how)
{
    const kvf_backend_module *module = rig_module();
    if (!module) {
        cr_assert(!getenv("KVFOLD_REQUIRE_CUDA"), "%s", err.msg);
        cr_skip_test("%s", err.msg);
    }
    kvf_ctx *ctx = open_ctx(module, how.f32);
    kvf_backend_ops launches = *ctx->backend->ops;
    if (how.launch) {
        launches.step_begin = NULL;
        launches.step_end = NULL;
        ctx->backend->ops = &launches;
    }
    for (int i = EVERY > 1 ? how.first : 0; i < N_MODELS; i += EVERY) run_model(ctx, models[i], &how);
    kvf_ctx_close(ctx);
}

Test(cuda_model, f32_decode_gives_the_expected_logits)
{
    run_all((run_how){ .f32 = true, .launch = true, .first = 2, .step = 1, .max = 1e-3, .mean = 1e-3 });
}

Test(cuda_model, recorded_steps_give_the_expected_logits)
{
    run_all((run_how){ .f32 = true, .step = 1, .max = 1e-3, .mean = 1e-3 });
}

Test(cuda_model, f32_prefill_gives_the_expected_logits)
{
    run_all((run_how){ .f32 = true, .step = MAX_TOKENS, .max = 2e-2, .mean = 2e-3 });
}

Test(cuda_model, prefill_and_decode_stay_near_the_expected_logits)
{
    run_all((run_how){ .first = 1, .step = MAX_TOKENS, .max = 0.15, .mean = 0.02 });
    run_all((run_how){ .first = 3, .step = 3, .max = 0.15, .mean = 0.02 });
}

/* ---- Recorded steps --------------------------------------------------------------------------------- */

enum { PROMPT = 8, STEPS = 3 };

/* Logits after each of STEPS tokens, one at a time, behind a prompt; *kernels: what ran. */
static float *decode(kvf_ctx *ctx, const char *name, const char *policy, int64_t *n_vocab, char *kernels, size_t cap)
{
    static expected e;
    char path[512];
    kvf_model *m;
    kvf_session *s;
    kvf_session_params p;
    read_expected(&e, name);
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, name);
    OK(kvf_model_open(&m, ctx, path, &err));
    kvf_session_params_init(&p);
    p.policy = policy;
    OK(kvf_session_open(&s, m, &p, &err));
    *n_vocab = e.n_vocab;
    float *all = room((size_t)(STEPS * e.n_vocab) * sizeof *all), *logits;
    OK(kvf_session_append(s, e.token, PROMPT, &err));
    for (int i = 0; i < STEPS; i++) {
        OK(kvf_session_append(s, e.token + PROMPT + i, 1, &err));
        OK(kvf_session_logits(s, &logits, &err));
        memcpy(all + i * e.n_vocab, logits, (size_t)e.n_vocab * sizeof *logits);
    }
    ctx->backend->ops->kernels(ctx->backend, kernels, cap);
    kvf_session_close(s);
    kvf_model_close(m);
    return all;
}

Test(cuda_model, recorded_steps_are_bit_for_bit_the_same_as_launches)
{
    const kvf_backend_module *module = rig_module();
    if (!module) cr_skip_test("%s", err.msg);
    static const char *const policies[] = { "full", "window:sink=4,window=128", "infllm" };
    for (int i = 0; i < N_MODELS; i += EVERY > 1 ? 3 : 1) {
        for (int k = 0; k < 3; k++) {
            float *got[2];
            int64_t n = 0;
            char ran[256];
            for (int launch = 0; launch < 2; launch++) {
                kvf_ctx *ctx = open_ctx(module, false);
                kvf_backend_ops launches = *ctx->backend->ops;
                launches.step_begin = NULL;
                launches.step_end = NULL;
                if (launch) ctx->backend->ops = &launches;
                got[launch] = decode(ctx, models[i], policies[k], &n, ran, sizeof ran);
                cr_assert_eq(strstr(ran, "step=graph") != NULL, !launch, "%s", ran);
                kvf_ctx_close(ctx);
            }
            cr_assert_eq(memcmp(got[0], got[1], (size_t)(STEPS * n) * sizeof(float)), 0, "%s, policy %s", models[i], policies[k]);
            drop(got[0]);
            drop(got[1]);
        }
    }
}
