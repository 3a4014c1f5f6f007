/* test_embeddings.c - embeddings in the place of tokens: those of the tokens themselves must give the tokens'
 * own bits, whatever the policy.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvfold/kvfold.h"
#include "model/timeline.h"

enum { N = 300, FROM = 40, TO = 190 };

static kvf_error err;

typedef struct rig {
    kvf_ctx *ctx;
    kvf_model *m;
    int32_t n_vocab, n_embd;
    kvf_token text[N], mixed[N];
    float *rows; /* of the tokens FROM..TO */
} rig;

static rig open_rig(const char *model)
{
    rig r = { 0 };
    char path[512];
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = 2;
    cr_assert_eq(kvf_ctx_open(&r.ctx, &p, &err), KVF_OK, "%s", err.msg);
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, model);
    cr_assert_eq(kvf_model_open(&r.m, r.ctx, path, &err), KVF_OK, "%s", err.msg);
    r.n_vocab = r.m->hp.n_vocab;
    r.n_embd = r.m->hp.n_embd;
    for (int i = 0; i < N; i++) {
        r.text[i] = (i * 37 + i / 7) % 200;
        r.mixed[i] = i >= FROM && i < TO && i % 5 ? KVF_TOKEN_EMBEDDING : r.text[i]; /* text between them, too */
    }
    r.rows = calloc((size_t)(TO - FROM) * (size_t)r.n_embd, sizeof *r.rows);
    int64_t k = 0;
    for (int i = 0; i < N; i++) {
        if (r.mixed[i] != KVF_TOKEN_EMBEDDING) continue;
        kvf_embed_args e = { .table = &r.m->embed, .tokens = &r.text[i], .n_tok = 1, .scale = r.m->hp.embed_scale, .out = r.rows + k++ * r.n_embd };
        cr_assert_eq(r.m->backend->ops->embed(r.m->backend, &e, &err), KVF_OK);
    }
    return r;
}

static void close_rig(rig *r)
{
    free(r->rows);
    kvf_model_close(r->m);
    kvf_ctx_close(r->ctx);
}

static kvf_session *open_session(const rig *r, const char *policy)
{
    kvf_session *s;
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.policy = policy;
    p.n_batch = 64;
    p.sampling.repeat_penalty = 1.2f;
    p.sampling.repeat_last_n = -1;
    cr_assert_eq(kvf_session_open(&s, r->m, &p, &err), KVF_OK, "%s", err.msg);
    return s;
}

static const float *logits_of(kvf_session *s)
{
    float *l;
    cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_OK, "%s", err.msg);
    return l;
}

static int64_t n_places(const rig *r)
{
    int64_t n = 0;
    for (int i = 0; i < N; i++) n += r->mixed[i] == KVF_TOKEN_EMBEDDING;
    return n;
}

static void check_policy(rig *r, const char *policy)
{
    kvf_session *a = open_session(r, policy), *b = open_session(r, policy);
    cr_assert_eq(kvf_session_set_embeddings(b, r->rows, n_places(r), r->n_embd, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_sync(a, r->text, 200, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_sync(b, r->mixed, 200, &err), KVF_OK, "%s", err.msg);
    cr_assert_arr_eq(logits_of(a), logits_of(b), (size_t)r->n_vocab * sizeof(float), "%s", policy);
    /* Another question behind the same embeddings finds them in the cache. */
    r->text[195] = r->mixed[195] = (r->text[195] + 1) % 200;
    cr_assert_eq(kvf_session_sync(a, r->text, 260, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(b, r->mixed, 260, &err), KVF_OK);
    cr_assert_arr_eq(logits_of(a), logits_of(b), (size_t)r->n_vocab * sizeof(float), "%s, second", policy);
    kvf_stats sa = { .size = sizeof sa }, sb = { .size = sizeof sb };
    kvf_session_stats(a, &sa, NULL);
    kvf_session_stats(b, &sb, NULL);
    cr_assert_eq(sa.n_reused_tokens, sb.n_reused_tokens);
    cr_assert_eq(sa.n_computed_tokens, sb.n_computed_tokens);
    /* A cut in the middle of them, and single steps. */
    cr_assert_eq(kvf_session_sync(a, r->text, 100, &err), KVF_OK);
    cr_assert_eq(kvf_session_sync(b, r->mixed, 100, &err), KVF_OK);
    for (int i = 100; i < 110; i++) {
        cr_assert_eq(kvf_session_append(a, r->text + i, 1, &err), KVF_OK);
        cr_assert_eq(kvf_session_append(b, r->mixed + i, 1, &err), KVF_OK, "%s", err.msg);
        cr_assert_arr_eq(logits_of(a), logits_of(b), (size_t)r->n_vocab * sizeof(float));
    }
    kvf_token out;
    cr_assert_geq(kvf_session_next(b, &out, &err), KVF_OK, "%s", err.msg); /* with a penalty on what came before */
    kvf_session_close(a);
    kvf_session_close(b);
}

Test(embeddings, those_of_the_tokens_give_the_tokens_bits)
{
    static const char *const models[] = { "qwen2", "gemma3", "qwen3-deep" };
    for (int i = 0; i < 3; i++) {
        rig r = open_rig(models[i]);
        check_policy(&r, "full");
        check_policy(&r, i == 1 ? "lazyllm:stages=6,keep=0.5,hold=1" : "lazyllm:keep=0.5,stages=1,hold=1");
        check_policy(&r, "infllm:init=16,window=128,block=16,topk=2,chunk=64");
        close_rig(&r);
    }
}

Test(embeddings, misuse_is_refused)
{
    rig r = open_rig("qwen2");
    kvf_session *s = open_session(&r, NULL);
    kvf_score scores[2];
    cr_assert_eq(kvf_session_sync(s, r.mixed, 100, &err), KVF_ERR_ARG);
    cr_assert_not_null(strstr(err.msg, "kvf_session_set_embeddings"), "%s", err.msg);
    cr_assert_eq(kvf_session_set_embeddings(s, r.rows, 10, r.n_embd + 1, &err), KVF_ERR_ARG);
    cr_assert_not_null(strstr(err.msg, "projector"), "%s", err.msg);
    cr_assert_eq(kvf_session_set_embeddings(s, NULL, 10, r.n_embd, &err), KVF_ERR_ARG);
    r.rows[5] = NAN;
    cr_assert_eq(kvf_session_set_embeddings(s, r.rows, 10, r.n_embd, &err), KVF_ERR_ARG);
    cr_assert_not_null(strstr(err.msg, "not finite"), "%s", err.msg);
    r.rows[5] = 0;
    cr_assert_eq(kvf_session_set_embeddings(s, r.rows, 3, r.n_embd, &err), KVF_OK);
    const kvf_token four[] = { 1, KVF_TOKEN_EMBEDDING, KVF_TOKEN_EMBEDDING, KVF_TOKEN_EMBEDDING, KVF_TOKEN_EMBEDDING };
    cr_assert_eq(kvf_session_sync(s, four, 4, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_session_append(s, four + 4, 1, &err), KVF_ERR_ARG, "there are three rows");
    cr_assert_eq(kvf_session_tokens(s, NULL), 4);
    cr_assert_eq(kvf_session_score(s, four + 3, 1, scores, &err), KVF_ERR_ARG);
    const kvf_token odd[] = { 1, -3 };
    cr_assert_eq(kvf_session_sync(s, odd, 2, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_session_set_embeddings(s, NULL, 0, 0, &err), KVF_OK);
    cr_assert_eq(kvf_session_tokens(s, NULL), 0);
    kvf_session_close(s);
    close_rig(&r);
}
