/* tiny_rig.h - a tiny model of tests/data/tiny, sessions on it, and what they say: for tests of policies that
 * run whole models.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TEST_TINY_RIG_H
#define KVF_TEST_TINY_RIG_H

#include <criterion/criterion.h>
#include <stdio.h>

#include "kvfold/kvfold.h"

static kvf_error err;

typedef struct rig {
    kvf_ctx *ctx;
    kvf_model *m;
    int32_t n_vocab, n_layer;
} rig;

static rig open_rig(const char *model, const char *cpu, kvf_precision precision)
{
    rig r = { 0 };
    char path[512];
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.cpu = cpu;
    p.n_threads = 2;
    p.precision = precision;
    kvf_status rc = kvf_ctx_open(&r.ctx, &p, &err);
    if (rc == KVF_ERR_UNSUPPORTED) return r;
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, model);
    cr_assert_eq(kvf_model_open(&r.m, r.ctx, path, &err), KVF_OK, "%s", err.msg);
    kvf_model_info info = { .size = sizeof info };
    cr_assert_eq(kvf_model_get_info(r.m, &info, &err), KVF_OK);
    r.n_vocab = info.n_vocab;
    r.n_layer = info.n_layer;
    return r;
}

static void close_rig(rig *r)
{
    kvf_model_close(r->m);
    kvf_ctx_close(r->ctx);
}

static kvf_session *open_with(const rig *r, kvf_session_params p)
{
    kvf_session *s;
    cr_assert_eq(kvf_session_open(&s, r->m, &p, &err), KVF_OK, "%s: %s", p.policy, err.msg);
    return s;
}

static void make_tokens(uint32_t seed, kvf_token *t, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        t[i] = (kvf_token)((seed >> 8) % 200);
    }
}

static float *logits_of(kvf_session *s)
{
    float *l;
    cr_assert_eq(kvf_session_logits(s, &l, &err), KVF_OK, "%s", err.msg);
    return l;
}

static kvf_stats stats_of(const kvf_session *s)
{
    kvf_stats st = { .size = sizeof st };
    cr_assert_eq(kvf_session_stats(s, &st, &err), KVF_OK);
    return st;
}

#endif
