/* test_cuda_emu_policy.c - policies that give sparse and merged sequences, on the CUDA backend beside the CPU's
 * reference: as many tokens stay in every layer, and logits are near, which they are not where others stay.
 *
 * f32 on both sides, and chunks so short that attention is near f32 too: a rounding to f16 could tip a choice between
 * two tokens, and then logits tell nothing.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/device_ctx.h"

#include <stdio.h>

enum { PROMPT = 208, SHORT = 104, FIRST = 8, VISUAL = 80, STEPS = 2, MAX_LAYERS = 16 };
#define NEAR 2e-3

typedef struct outcome {
    float *logits; /* [STEPS + 1][n_vocab] */
    int64_t n_vocab, held[MAX_LAYERS];
    int32_t n_layer;
    kvf_stats stats;
} outcome;

static float *visual_rows(int32_t width)
{
    uint64_t seed = 9;
    return floats((size_t)(VISUAL * width), 0.7f, &seed);
}

static outcome run(const kvf_backend_module *module, const char *model, const char *policy, bool video)
{
    outcome o = { .stats = { .size = sizeof o.stats } };
    char path[512];
    kvf_ctx *ctx = device_ctx(module, true, 256u << 20, NULL);
    kvf_model *m;
    kvf_session *s;
    kvf_session_params p;
    kvf_model_info info = { .size = sizeof info };
    kvf_token text[PROMPT + STEPS];
    int64_t n = strstr(policy, "infllm") ? PROMPT : SHORT;
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, model);
    OK(kvf_model_open(&m, ctx, path, &err));
    OK(kvf_model_get_info(m, &info, &err));
    kvf_session_params_init(&p);
    p.policy = policy;
    p.n_batch = 8;
    OK(kvf_session_open(&s, m, &p, &err));
    float *rows = visual_rows(info.n_embd);
    if (video) OK(kvf_session_set_embeddings(s, rows, VISUAL, info.n_embd, &err));
    for (int i = 0; i < PROMPT + STEPS; i++) {
        text[i] = (kvf_token)(((uint32_t)i * 2654435761u >> 8) % 200u);
        if (video && i >= FIRST && i < FIRST + VISUAL) text[i] = KVF_TOKEN_EMBEDDING;
    }
    o.n_vocab = info.n_vocab;
    o.n_layer = info.n_layer;
    o.logits = room((size_t)((STEPS + 1) * o.n_vocab) * sizeof *o.logits);
    OK(kvf_session_append(s, text, n, &err));
    for (int i = 0; i <= STEPS; i++) {
        float *logits;
        OK(kvf_session_logits(s, &logits, &err));
        memcpy(o.logits + i * o.n_vocab, logits, (size_t)o.n_vocab * sizeof *logits);
        if (i < STEPS) OK(kvf_session_append(s, text + n + i, 1, &err));
    }
    for (int32_t l = 0; l < o.n_layer; l++) OK(kvf_session_layer_tokens(s, l, &o.held[l], &err));
    OK(kvf_session_stats(s, &o.stats, &err));
    drop(rows);
    kvf_session_close(s);
    kvf_model_close(m);
    kvf_ctx_close(ctx);
    return o;
}

static void compare(const char *model, const char *policy, bool video)
{
    const kvf_backend_module *module = device_module();
    outcome cpu = run(NULL, model, policy, video), dev = run(module, model, policy, video);
    cr_assert_str_eq(dev.stats.backend, "cuda");
    for (int32_t l = 0; l < cpu.n_layer; l++)
        cr_assert_eq(dev.held[l], cpu.held[l], "%s %s: layer %d holds %lld tokens, %lld on the CPU", model, policy, l,
                     (long long)dev.held[l], (long long)cpu.held[l]);
    cr_assert_lt(cpu.held[cpu.n_layer - 1], cpu.held[0], "%s %s: nothing was dropped", model, policy);
    cr_assert_eq(dev.stats.n_lookups, cpu.stats.n_lookups);
    cr_assert_eq(cpu.stats.n_lookups > 0, strstr(policy, "infllm") != NULL, "%s: %lld lookups", policy, (long long)cpu.stats.n_lookups);
    double off = distance(dev.logits, cpu.logits, (size_t)((STEPS + 1) * cpu.n_vocab));
    cr_assert_lt(off, NEAR, "%s %s: %g from the CPU's logits", model, policy, off);
    drop(cpu.logits);
    drop(dev.logits);
}

Test(cuda_policy, lazyllm_keeps_the_same_tokens_as_on_the_cpu) { compare("qwen3-deep", "lazyllm:stages=2/5,keep=0.5/0.4", false); }

Test(cuda_policy, a_sparse_sequence_with_a_memory_is_that_of_the_cpu)
{
    compare("qwen3-deep", "infllm:init=32,window=128,block=32,chunk=64,topk=3+lazyllm:stages=2/5,keep=0.5/0.4", false);
}

Test(cuda_policy, so_it_is_in_a_model_with_sliding_layers)
{
    compare("gemma3", "infllm:init=32,window=128,block=32,chunk=64,topk=3,select=paper+lazyllm:stages=6,keep=0.5", false);
}

Test(cuda_policy, a_video_merged_inside_the_model_is_that_of_the_cpu) { compare("qwen3-deep", "holitom:layer=3,drop=0.5", true); }
