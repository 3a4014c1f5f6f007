/* test_holitom.c - HoliTom's merge inside the model: dense where nothing goes, else what the stand-alone function
 * (kvfold/merge.h) makes of the hidden states between two layers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvfold/kvfold.h"
#include "kvfold/merge.h"
#include "model/timeline.h"

enum { N = 190, FIRST = 20, VISUAL = 140, MORE = 30 };

static kvf_error err;

typedef struct rig {
    kvf_ctx *ctx;
    kvf_model *m;
    int32_t n_vocab, n_embd, n_layer;
    kvf_token text[N + MORE]; /* FIRST tokens, VISUAL places, the question, MORE */
    float *rows;              /* [VISUAL][n_embd] */
} rig;

static rig open_rig(const char *model, const char *cpu)
{
    rig r = { 0 };
    char path[512];
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = 2;
    p.cpu = cpu;
    cr_assert_eq(kvf_ctx_open(&r.ctx, &p, &err), KVF_OK, "%s", err.msg);
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, model);
    cr_assert_eq(kvf_model_open(&r.m, r.ctx, path, &err), KVF_OK, "%s", err.msg);
    r.n_vocab = r.m->hp.n_vocab;
    r.n_embd = r.m->hp.n_embd;
    r.n_layer = r.m->hp.n_layer;
    for (int i = 0; i < N + MORE; i++) r.text[i] = i >= FIRST && i < FIRST + VISUAL ? KVF_TOKEN_EMBEDDING : (i * 37 + i / 7) % 200;
    r.rows = calloc((size_t)VISUAL * (size_t)r.n_embd, sizeof *r.rows);
    uint32_t seed = 9;
    for (int i = 0; i < VISUAL * r.n_embd; i++) {
        seed = seed * 1664525u + 1013904223u;
        r.rows[i] = (float)(int32_t)seed * 0x1p-31f * 0.7f;
    }
    return r;
}

static void close_rig(rig *r)
{
    free(r->rows);
    kvf_model_close(r->m);
    kvf_ctx_close(r->ctx);
}

static kvf_session *open_session(const rig *r, const char *policy, int64_t n_batch)
{
    kvf_session *s;
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.policy = policy;
    p.n_batch = n_batch;
    cr_assert_eq(kvf_session_open(&s, r->m, &p, &err), KVF_OK, "%s: %s", policy, err.msg);
    cr_assert_eq(kvf_session_set_embeddings(s, r->rows, VISUAL, r->n_embd, &err), KVF_OK, "%s", err.msg);
    return s;
}

static const float *logits_of(kvf_session *s)
{
    float *l;
    cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_OK, "%s", err.msg);
    return l;
}

static int64_t layer_tokens(const kvf_session *s, int32_t layer)
{
    int64_t n = -1;
    cr_assert_eq(kvf_session_layer_tokens(s, layer, &n, &err), KVF_OK, "%s", err.msg);
    return n;
}

static void check_dense(const rig *r, const char *policy, const kvf_token *text)
{
    kvf_session *a = open_session(r, "full", 64), *b = open_session(r, policy, 64);
    cr_assert_eq(kvf_session_sync(a, text, N, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_sync(b, text, N, &err), KVF_OK, "%s", err.msg);
    for (int i = 0; i < 6; i++) {
        cr_assert_arr_eq(logits_of(a), logits_of(b), (size_t)r->n_vocab * sizeof(float), "%s, step %d", policy, i);
        cr_assert_eq(kvf_session_append(a, text + N, 1, &err), KVF_OK);
        cr_assert_eq(kvf_session_append(b, text + N, 1, &err), KVF_OK);
    }
    for (int32_t l = 0; l < r->n_layer; l++) cr_assert_eq(layer_tokens(b, l), layer_tokens(a, l));
    kvf_session_close(a);
    kvf_session_close(b);
}

Test(holitom, nothing_dropped_is_dense_attention_to_the_bit)
{
    static const char *const models[] = { "qwen3-deep", "qwen2", "gemma3" };
    static const char *const policies[] = { "holitom:layer=3,drop=0", "holitom:layer=1,drop=0", "holitom:layer=6,drop=0" };
    kvf_token plain[N + MORE];
    for (int i = 0; i < N + MORE; i++) plain[i] = (i * 31) % 190;
    for (int i = 0; i < 3; i++) {
        rig r = open_rig(models[i], NULL);
        check_dense(&r, policies[i], r.text);
        if (i == 0) check_dense(&r, "holitom:layer=3,drop=0.9", plain); /* and where there is no video */
        close_rig(&r);
    }
}

/* ---- The same by hand ---------------------------------------------------------------------------------- */

/* Layers 0..K over everything, the published function on what comes out, then the rest of the layers over what
 * it kept, at the places it had. */
static void by_hand(const rig *r, int32_t layer, double drop, float *logits, int64_t *n_left)
{
    kvf_pool *pool;
    kvf_kv *kv[2];
    kvf_forward *f;
    kvf_dims dims = kvf_model_dims(r->m);
    kvf_pool_params pp = { .backend = r->m->backend, .n_head_kv = dims.n_head_kv, .head_dim = dims.head_dim, .max_slots = 256 };
    cr_assert_eq(kvf_pool_open(&pool, &pp, &err), KVF_OK);
    dims.n_layer = layer;
    cr_assert_eq(kvf_kv_open(&kv[0], pool, dims, &err), KVF_OK);
    dims.n_layer = r->n_layer - layer;
    cr_assert_eq(kvf_kv_open(&kv[1], pool, dims, &err), KVF_OK);
    cr_assert_eq(kvf_forward_open(&f, r->m, N, 0, &err), KVF_OK);

    size_t width = (size_t)r->n_embd;
    float *x = calloc(2 * N * width, sizeof *x), *rows[N], mass[N + 128] = { 0 };
    const float *embd[N];
    int32_t pos[N];
    for (int i = 0; i < N; i++) {
        rows[i] = x + (size_t)i * width;
        embd[i] = r->text[i] == KVF_TOKEN_EMBEDDING ? r->rows + (size_t)(i - FIRST) * width : NULL;
        pos[i] = i;
    }
    kvf_part p = { .kv = kv[0], .layer0 = 0, .layer1 = layer, .tokens = r->text, .embd = embd, .pos = pos, .row = rows, .n_tok = N,
                   .n_out = N, .mass_layer = layer - 1, .mass = mass, .n_mass = 1 };
    cr_assert_eq(kvf_forward_part(f, &p, &err), KVF_OK, "%s", err.msg);

    kvf_merge_inner a;
    kvf_merge_inner_init(&a);
    int32_t keep[N];
    a.hidden = x;
    a.n_row = N;
    a.dim = r->n_embd;
    a.first = FIRST;
    a.n = VISUAL;
    a.attention = mass;
    a.n_head = 1;
    a.drop = drop;
    a.out = x + N * width;
    a.keep = keep;
    cr_assert_eq(kvf_merge_inner_run(r->ctx, &a, &err), KVF_OK, "%s", err.msg);
    for (int64_t i = 0; i < a.n_out; i++) rows[i] = (float *)a.out + (size_t)i * width;
    kvf_part q = { .kv = kv[1], .layer0 = layer, .layer1 = r->n_layer, .pos = keep, .row = rows, .n_tok = a.n_out, .n_out = 1, .mass_layer = -1 };
    cr_assert_eq(kvf_forward_part(f, &q, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_forward_logits(f, 0, 1, logits, &err), KVF_OK);
    *n_left = a.n_out;
    free(x);
    kvf_forward_close(f);
    kvf_kv_close(kv[0]);
    kvf_kv_close(kv[1]);
    kvf_pool_close(pool);
}

Test(holitom, the_prompt_goes_on_as_the_published_function_says)
{
    static const struct {
        const char *policy;
        int32_t layer;
        double drop;
    } cases[] = { { "holitom:layer=3,drop=0.5", 3, 0.5 }, { "holitom:layer=5,drop=0.9", 5, 0.9 }, { "holitom:layer=1,drop=0.25", 1, 0.25 },
                  { "holitom:layer=7,drop=0.999", 7, 0.999 } };
    static const char *const cpus[] = { "ref", NULL };
    for (int c = 0; c < 2; c++) {
        rig r = open_rig("qwen3-deep", cpus[c]);
        float *want = calloc((size_t)r.n_vocab, sizeof *want), *dense = calloc((size_t)r.n_vocab, sizeof *want);
        int64_t n_left;
        by_hand(&r, 4, 0, dense, &n_left);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            kvf_session *s = open_session(&r, cases[i].policy, N);
            cr_assert_eq(kvf_session_sync(s, r.text, N, &err), KVF_OK, "%s", err.msg);
            by_hand(&r, cases[i].layer, cases[i].drop, want, &n_left);
            cr_assert_arr_eq(want, logits_of(s), (size_t)r.n_vocab * sizeof *want, "%s", cases[i].policy);
            cr_assert_neq(memcmp(want, dense, (size_t)r.n_vocab * sizeof *want), 0);
            for (int32_t l = 0; l < r.n_layer; l++) cr_assert_eq(layer_tokens(s, l), l < cases[i].layer ? N : n_left, "layer %d", l);
            kvf_stats st = { .size = sizeof st };
            cr_assert_eq(kvf_session_stats(s, &st, &err), KVF_OK);
            cr_assert_eq(st.n_layer_tokens, N * cases[i].layer + n_left * (r.n_layer - cases[i].layer));
            cr_assert_eq(st.n_waiting_tokens, 0);
            kvf_session_close(s);
        }
        free(want);
        free(dense);
        close_rig(&r);
    }
}

/* ---- Conversations and chains ------------------------------------------------------------------------------ */

Test(holitom, later_questions_read_what_the_first_left)
{
    static const char *const policies[] = { "holitom:layer=3,drop=0.6", "holitom:layer=3,drop=0.6+lazyllm:stages=2/5,keep=0.8/0.7,hold=1",
                                            "lazyllm:stages=4,keep=0.5+holitom:layer=2",
                                            "infllm:init=16,window=128,block=16,chunk=64,topk=2+holitom:layer=4,drop=0.7",
                                            "holitom:layer=4+infllm:init=16,window=128,block=16,chunk=64,topk=2+lazyllm:stages=6,keep=0.5" };
    rig r = open_rig("qwen3-deep", NULL);
    for (size_t i = 0; i < sizeof policies / sizeof *policies; i++) {
        kvf_session *a = open_session(&r, policies[i], 64), *b = open_session(&r, policies[i], 64);
        cr_assert_eq(kvf_session_sync(a, r.text, N, &err), KVF_OK, "%s: %s", policies[i], err.msg);
        int64_t before = layer_tokens(a, 7);
        cr_assert_lt(before, N);
        for (int k = 0; k < 3; k++) cr_assert_eq(kvf_session_append(a, r.text + N, 1, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(kvf_session_append(a, r.text + N, MORE, &err), KVF_OK, "%s: %s", policies[i], err.msg);
        cr_assert(isfinite(logits_of(a)[0]));
        cr_assert_geq(layer_tokens(a, 7), before);
        cr_assert_lt(layer_tokens(a, 7), N + 3 + MORE);
        kvf_token other[N];
        memcpy(other, r.text, sizeof other);
        other[0] = 77;
        cr_assert_eq(kvf_session_sync(a, other, N, &err), KVF_OK); /* another text from its first token on: all anew */
        cr_assert_eq(kvf_session_sync(b, other, N, &err), KVF_OK);
        cr_assert_arr_eq(logits_of(a), logits_of(b), (size_t)r.n_vocab * sizeof(float), "%s", policies[i]);
        kvf_session_close(a);
        kvf_session_close(b);
    }
    close_rig(&r);
}

Test(holitom, contradictions_are_refused_with_a_sentence)
{
    static const char *const bad[] = { "holitom:layer=0", "holitom:layer=8", "holitom:drop=1", "holitom:drop=-1", "holitom+holitom",
                                       "holitom:layer=4+lazyllm:stages=4,keep=0.5", "holitom+keydiff" };
    rig r = open_rig("qwen3-deep", NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_session_params p;
        kvf_session *s;
        kvf_session_params_init(&p);
        p.policy = bad[i];
        cr_assert_eq(kvf_session_open(&s, r.m, &p, &err), KVF_ERR_ARG, "%s was taken", bad[i]);
        cr_assert_gt(strlen(err.msg), 20, "%s", err.msg);
    }
    close_rig(&r);
}
