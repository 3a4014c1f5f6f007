/* test_cuda_emu_share.c - a sequence whose far blocks are read by the device and, where they lie, by the CPU: the
 * same numbers as with the device alone to a rounding, whatever the share, within the same budgets; and failures on
 * either side.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include "tests/cuda/device_ctx.h"

#include <stdio.h>

#define SPEC "infllm:init=32,window=128,block=32,chunk=64,topk=4,exact=32"
enum { N = 1100, LONG = 2600, QUESTION = 5, ANSWER = 3, TIGHT = 7 };

/* Allocations that can be made to fail. */
static int64_t refuse_from; /* > 0: the so many-th from now and all later ones */

static void *count_alloc(void *user, size_t bytes)
{
    if (refuse_from > 0 && --refuse_from == 0) {
        refuse_from = 1;
        return NULL;
    }
    return kvf_mem_default.alloc(user, bytes);
}

static void count_release(void *user, void *p) { kvf_mem_default.release(user, p); }

typedef struct place {
    kvf_ctx *ctx;
    kvf_model *m;
    kvf_store *st;
    int64_t n_vocab;
    size_t block_bytes;
    char dir[64];
} place;

static kvf_token text_at(int i) { return (kvf_token)(((uint32_t)i * 2654435761u >> 8) % 200u); }

/* A document of n tokens in a store, read on the CPU, which is faster than emulation. */
static void ingest(const char *dir, const char *model_path, const char *spec, int64_t n)
{
    kvf_ctx *ctx;
    kvf_model *m;
    kvf_store *st;
    kvf_session *s;
    kvf_ctx_params cp;
    kvf_store_params sp;
    kvf_session_params p;
    kvf_ctx_params_init(&cp);
    cp.n_threads = 1;
    cp.precision = KVF_PRECISION_F32;
    OK(kvf_ctx_open(&ctx, &cp, &err));
    OK(kvf_model_open(&m, ctx, model_path, &err));
    kvf_store_params_init(&sp);
    sp.mode = KVF_STORE_CREATE;
    OK(kvf_store_open(&st, ctx, dir, &sp, &err));
    kvf_session_params_init(&p);
    p.policy = spec;
    OK(kvf_session_open(&s, m, &p, &err));
    kvf_token *text = room((size_t)n * sizeof *text);
    for (int i = 0; i < n; i++) text[i] = text_at(i);
    kvf_ingest in = { .size = sizeof in, .name = "doc", .tokens = text, .n = n };
    OK(kvf_session_ingest(s, st, &in, &err));
    drop(text);
    kvf_session_close(s);
    kvf_store_close(st);
    kvf_model_close(m);
    kvf_ctx_close(ctx);
}

/* The device with a model and a store that holds the document. */
static place open_place(const char *model, const char *spec, int64_t n)
{
    place p = { .dir = "/tmp/kvf_share_XXXXXX" };
    kvf_mem mem = { count_alloc, count_release, kvf_mem_default.user };
    kvf_model_info info = { .size = sizeof info };
    kvf_store_params sp;
    char path[512];
    const kvf_backend_module *module = device_module();
    cr_assert_not_null(mkdtemp(p.dir));
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, model);
    ingest(p.dir, path, spec, n);
    p.ctx = device_ctx(module, true, 128u << 20, &mem);
    OK(kvf_model_open(&p.m, p.ctx, path, &err));
    OK(kvf_model_get_info(p.m, &info, &err));
    p.n_vocab = info.n_vocab;
    p.block_bytes = (size_t)info.kv_bytes_per_token * KVF_BLOCK;
    kvf_store_params_init(&sp);
    sp.mode = KVF_STORE_READ;
    OK(kvf_store_open(&p.st, p.ctx, p.dir, &sp, &err));
    return p;
}

static void close_place(place *p)
{
    char cmd[128];
    kvf_store_close(p->st);
    kvf_model_close(p->m);
    kvf_ctx_close(p->ctx);
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", p->dir);
    cr_assert_eq(system(cmd), 0);
}

static kvf_session *open_session(const place *p, const char *spec, int64_t blocks, int32_t share)
{
    kvf_session *s;
    kvf_session_params sp;
    kvf_session_params_init(&sp);
    sp.policy = spec;
    sp.kv_bytes = (size_t)blocks * p->block_bytes;
    sp.host_share = share;
    OK(kvf_session_open(&s, p->m, &sp, &err));
    return s;
}

/* Logits after a question and each of ANSWER tokens. */
static float *ask(kvf_session *s, const place *p)
{
    kvf_token text[QUESTION + ANSWER];
    float *logits, *all = room((size_t)((ANSWER + 1) * p->n_vocab) * sizeof *all);
    for (int i = 0; i < QUESTION + ANSWER; i++) text[i] = text_at(5 * i + 11);
    OK(kvf_session_append(s, text, QUESTION, &err));
    for (int i = 0; i <= ANSWER; i++) {
        OK(kvf_session_logits(s, &logits, &err));
        memcpy(all + i * p->n_vocab, logits, (size_t)p->n_vocab * sizeof *all);
        if (i < ANSWER) OK(kvf_session_append(s, text + QUESTION + i, 1, &err));
    }
    return all;
}

static float *load_and_ask(const place *p, const char *spec, int32_t share, kvf_stats *stats)
{
    kvf_session *s = open_session(p, spec, TIGHT, share);
    *stats = (kvf_stats){ .size = sizeof *stats };
    OK(kvf_session_load(s, p->st, "doc", &err));
    float *x = ask(s, p);
    OK(kvf_session_stats(s, stats, &err));
    cr_assert_leq(stats->kv_bytes, (size_t)TIGHT * p->block_bytes, "the pool is over its budget");
    kvf_session_close(s);
    return x;
}

/* No split: the device alone. Every other: to a rounding the same, and the same blocks read. */
static void every_share(const char *model, const char *spec, int64_t length, int n_share)
{
    static const int32_t shares[] = { 100, 50, 13, 0, 81, 1 };
    kvf_stats alone, stats;
    place p = open_place(model, spec, length);
    float *want = load_and_ask(&p, spec, 0, &alone);
    size_t n = (size_t)((ANSWER + 1) * p.n_vocab);
    cr_assert(alone.n_blocks_shared == 0 && alone.n_block_misses > 0);
    for (int i = 0; i < n_share; i++) {
        float *got = load_and_ask(&p, spec, shares[i], &stats);
        double off = distance(got, want, n);
        cr_assert_leq(off, shares[i] ? 1e-3 : 0.0, "%s %s: %d %% on the host, %g away", model, spec, shares[i], off);
        cr_assert_eq(stats.n_block_reads, alone.n_block_reads, "share %d: other blocks were chosen", shares[i]);
        if (shares[i] == 100) {
            cr_assert_gt(stats.n_blocks_shared, 0u);
            cr_assert_eq(stats.n_block_misses, 0, "nothing is left to come");
            cr_assert_lt(stats.moved_bytes, alone.moved_bytes, "as much was moved as without");
        }
        if (shares[i] == 50) cr_assert(stats.n_blocks_shared > 0 && stats.n_block_misses > 0);
        drop(got);
    }
    drop(want);
    close_place(&p);
}

Test(cuda_share, every_share_gives_the_device_s_numbers) { every_share("qwen2", SPEC, N, 6); }
Test(cuda_share, kv_heads_with_sets_of_their_own_are_shared_too) { every_share("qwen2", SPEC ",sets=kv", N, 2); }
Test(cuda_share, layers_that_slide_are_left_alone) { every_share("gemma3", SPEC, N, 1); }

/* All blocks are wanted, and frames hold fewer: the host takes them in turns. */
Test(cuda_share, more_blocks_than_frames_come_in_turns)
{
    const char *spec = "infllm:init=128,window=128,block=128,chunk=64,topk=18";
    kvf_stats roomy, tight;
    place p = open_place("qwen2", spec, LONG);
    kvf_session *s = open_session(&p, spec, 64, 100);
    roomy = (kvf_stats){ .size = sizeof roomy };
    OK(kvf_session_load(s, p.st, "doc", &err));
    float *want = ask(s, &p);
    OK(kvf_session_stats(s, &roomy, &err));
    kvf_session_close(s);
    float *got = load_and_ask(&p, spec, 100, &tight);
    cr_assert_leq(distance(got, want, (size_t)((ANSWER + 1) * p.n_vocab)), 1e-3);
    cr_assert_gt(roomy.n_blocks_shared, 0u);
    cr_assert_eq(tight.n_blocks_shared, roomy.n_blocks_shared);
    cr_assert_lt(tight.n_blocks_host, roomy.n_blocks_host, "every block kept its frame");
    drop(want);
    drop(got);
    close_place(&p);
}

Test(cuda_share, a_share_is_checked_and_without_effect_without_a_memory)
{
    kvf_session *s;
    kvf_session_params sp;
    place p = open_place("qwen2", SPEC, 300);
    kvf_session_params_init(&sp);
    sp.host_share = 101;
    cr_assert_eq(kvf_session_open(&s, p.m, &sp, &err), KVF_ERR_ARG);
    sp.host_share = -1;
    cr_assert_eq(kvf_session_open(&s, p.m, &sp, &err), KVF_ERR_ARG);
    kvf_session *plain = open_session(&p, "full", 64, 0);
    s = open_session(&p, "full", 64, 50);
    float *x = ask(s, &p), *y = ask(plain, &p);
    cr_assert_eq(distance(x, y, (size_t)((ANSWER + 1) * p.n_vocab)), 0.0);
    drop(x);
    drop(y);
    kvf_session_close(s);
    kvf_session_close(plain);
    close_place(&p);
}

/* Each allocation of a step in turn is refused, on the host; the step fails with a sentence, and the next one that
 * gets its memory gives the numbers of a session that never failed. */
Test(cuda_share, refused_memory_is_an_error_of_that_step_only)
{
    kvf_stats stats;
    place p = open_place("qwen2", SPEC, N);
    float *want = load_and_ask(&p, SPEC, 100, &stats);
    size_t bytes = (size_t)((ANSWER + 1) * p.n_vocab) * sizeof *want;
    kvf_token first[QUESTION];
    int failed = 0;
    for (int i = 0; i < QUESTION; i++) first[i] = text_at(5 * i + 11);
    for (int64_t at = 1; at < 400; at += 1 + at) {
        kvf_session *s = open_session(&p, SPEC, TIGHT, 100);
        OK(kvf_session_load(s, p.st, "doc", &err));
        refuse_from = at;
        kvf_status rc = kvf_session_append(s, first, QUESTION, &err);
        refuse_from = 0;
        cr_assert(rc == KVF_OK || rc == KVF_ERR_NOMEM, "allocation %lld: %d %s", (long long)at, (int)rc, err.msg);
        failed += rc != KVF_OK;
        int64_t have = kvf_session_tokens(s, NULL);
        if (rc != KVF_OK) {
            cr_assert_eq(have, N, "a failed step left %lld tokens", (long long)(have - N));
            float *x = ask(s, &p);
            cr_assert_leq(distance(x, want, bytes / sizeof *x), 1e-3, "after allocation %lld", (long long)at);
            drop(x);
        }
        kvf_session_close(s);
    }
    cr_assert_gt(failed, 2);
    drop(want);
    close_place(&p);
}

/* And each of opening one, the rows of the host's part among them. */
Test(cuda_share, a_session_that_gets_no_memory_is_not_opened)
{
    place p = open_place("qwen2", SPEC, 300);
    kvf_session_params sp;
    kvf_status rc = KVF_ERR_NOMEM;
    int failed = 0;
    kvf_session_params_init(&sp);
    sp.policy = SPEC;
    sp.host_share = 100;
    for (int64_t at = 1; at < 1000 && rc != KVF_OK; at++) {
        kvf_session *s;
        refuse_from = at;
        rc = kvf_session_open(&s, p.m, &sp, &err);
        refuse_from = 0;
        cr_assert(rc == KVF_OK || rc == KVF_ERR_NOMEM, "allocation %lld: %d %s", (long long)at, (int)rc, err.msg);
        failed += rc != KVF_OK;
        if (rc == KVF_OK) kvf_session_close(s);
    }
    cr_assert(rc == KVF_OK && failed > 5, "%d refused", failed);
    close_place(&p);
}

#ifdef KVF_TEST_CUDA_EMU
/* No pinned memory at all: an error. A device with less than the pool may take: a smaller pool, the same numbers. */
Test(cuda_share, a_device_or_a_host_with_less_memory_is_an_error_or_a_smaller_pool)
{
    kvf_stats stats;
    place p = open_place("qwen2", SPEC, N);
    float *want = load_and_ask(&p, SPEC, 100, &stats);
    kvf_session *s = open_session(&p, SPEC, TIGHT, 100);
    kvf_token first = text_at(11);
    OK(kvf_session_load(s, p.st, "doc", &err));
    emu_fail_malloc(1);
    cr_assert_eq(kvf_session_append(s, &first, 1, &err), KVF_ERR_NOMEM);
    emu_fail_malloc(0);
    float *x = ask(s, &p);
    cr_assert_leq(distance(x, want, (size_t)((ANSWER + 1) * p.n_vocab)), 1e-3);
    drop(x);
    kvf_session_close(s);

    uint64_t used, total;
    void *hog;
    device_module()->memory(p.ctx->backend, &used, &total);
    s = open_session(&p, SPEC, 4096, 60);
    OK(kvf_session_load(s, p.st, "doc", &err));
    size_t take = (size_t)(total - used) - 24 * p.block_bytes - ((size_t)8 << 20);
    OK(p.ctx->backend->ops->alloc(p.ctx->backend, &hog, take, &err));
    x = ask(s, &p);
    cr_assert_leq(distance(x, want, (size_t)((ANSWER + 1) * p.n_vocab)), 1e-3, "with a small device");
    p.ctx->backend->ops->release(p.ctx->backend, hog);
    drop(x);
    kvf_session_close(s);
    drop(want);
    close_place(&p);
}
#endif
