/* test_cuda_emu_store.c - a memory and a store on the CUDA backend: what is read, saved and loaded again goes
 * on to the bits of what never stopped, whatever fits the pool; and to the CPU's logits.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include "tests/cuda/rig.h"

#include <stdio.h>

#include "api/ctx.h"

#define SPEC "infllm:init=32,window=128,block=32,chunk=64,topk=4,exact=32"
enum { N = 1200, QUESTION = 6, ANSWER = 6, MAX_VOCAB = 512 };

typedef struct place {
    kvf_ctx *ctx;
    kvf_model *m;
    kvf_store *st;
    int64_t n_vocab;
    size_t block_bytes, slot_bytes; /* of all layers; of one */
} place;

static kvf_token text_at(int i) { return (kvf_token)(((uint32_t)i * 2654435761u >> 8) % 200u); }

/* module NULL: the CPU. */
static place open_place(const kvf_backend_module *module, const char *model, const char *dir)
{
    place p = { 0 };
    char path[512];
    kvf_ctx_params cp;
    kvf_store_params sp;
    kvf_ctx_params_init(&cp);
    cp.cpu = "ref";
    cp.n_threads = 1;
    cp.precision = KVF_PRECISION_F32;
    OK(kvf_ctx_open(&p.ctx, &cp, &err));
    if (module) {
        p.ctx->backend->ops->close(p.ctx->backend);
        kvf_device_params dp = { .memory_bytes = 256u << 20, .f32 = true, .mem = &p.ctx->mem, .log = &p.ctx->log };
        OK(module->open(&p.ctx->backend, &dp, &err));
    }
    snprintf(path, sizeof path, "%s/tiny/%s.gguf", KVF_TEST_DATA, model);
    OK(kvf_model_open(&p.m, p.ctx, path, &err));
    kvf_model_info info = { .size = sizeof info };
    OK(kvf_model_get_info(p.m, &info, &err));
    p.n_vocab = info.n_vocab;
    p.block_bytes = info.kv_bytes_per_token * KVF_BLOCK;
    p.slot_bytes = p.block_bytes / (size_t)info.n_layer;
    kvf_store_params_init(&sp);
    sp.mode = KVF_STORE_CREATE;
    OK(kvf_store_open(&p.st, p.ctx, dir, &sp, &err));
    return p;
}

static void close_place(place *p)
{
    kvf_store_close(p->st);
    kvf_model_close(p->m);
    kvf_ctx_close(p->ctx);
}

static kvf_session *open_session(const place *p, int64_t blocks)
{
    kvf_session *s;
    kvf_session_params sp;
    kvf_session_params_init(&sp);
    sp.policy = SPEC;
    sp.kv_bytes = (size_t)blocks * p->block_bytes;
    OK(kvf_session_open(&s, p->m, &sp, &err));
    return s;
}

static void ingest(kvf_session *s, const place *p)
{
    kvf_token text[N];
    for (int i = 0; i < N; i++) text[i] = text_at(i);
    kvf_ingest in = { .size = sizeof in, .name = "doc", .tokens = text, .n = N };
    OK(kvf_session_ingest(s, p->st, &in, &err));
}

/* Logits after a question and ANSWER tokens. */
static float *ask(kvf_session *s, int64_t n_vocab)
{
    kvf_token text[QUESTION + ANSWER];
    float *logits, *all = room((size_t)((ANSWER + 1) * n_vocab) * sizeof *all);
    for (int i = 0; i < QUESTION + ANSWER; i++) text[i] = text_at(5 * i + 11);
    OK(kvf_session_append(s, text, QUESTION, &err));
    for (int i = 0; i <= ANSWER; i++) {
        OK(kvf_session_logits(s, &logits, &err));
        memcpy(all + i * n_vocab, logits, (size_t)n_vocab * sizeof *all);
        if (i < ANSWER) OK(kvf_session_append(s, text + QUESTION + i, 1, &err));
    }
    return all;
}

/* From a document just read; *misses of the question. */
static float *read_and_ask(place *p, int64_t blocks, int64_t *misses)
{
    kvf_session *s = open_session(p, blocks);
    kvf_stats stats = { .size = sizeof stats };
    ingest(s, p);
    float *x = ask(s, p->n_vocab);
    OK(kvf_session_stats(s, &stats, &err));
    *misses = stats.n_block_misses;
    kvf_session_close(s);
    return x;
}

static kvf_stats asked; /* of load_and_ask */

static float *load_and_ask(place *p, int64_t blocks)
{
    kvf_session *s = open_session(p, blocks);
    asked = (kvf_stats){ .size = sizeof asked };
    OK(kvf_session_load(s, p->st, "doc", &err));
    float *x = ask(s, p->n_vocab);
    OK(kvf_session_stats(s, &asked, &err));
    cr_assert_leq(asked.kv_bytes, (size_t)blocks * p->block_bytes);
    kvf_session_close(s);
    return x;
}

static void make_dir(char *dir)
{
    strcpy(dir, "/tmp/kvf_store_XXXXXX");
    cr_assert_not_null(mkdtemp(dir));
}

static void remove_dir(const char *dir)
{
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -rf '%s'", dir);
    cr_assert_eq(system(cmd), 0);
}

static const kvf_backend_module *device(void)
{
    const kvf_backend_module *m = rig_module();
    if (m) return m;
    cr_assert(!getenv("KVFOLD_REQUIRE_CUDA"), "%s", err.msg);
    cr_skip_test("%s", err.msg);
    return NULL;
}

#ifdef KVF_TEST_CUDA_EMU
/* A host without pinned memory is an error of that step; the session goes on when there is some. */
static void refuse_pinned(place *p, const float *want)
{
    kvf_token first = text_at(11);
    kvf_session *s = open_session(p, 64);
    OK(kvf_session_load(s, p->st, "doc", &err));
    emu_fail_malloc(1);
    cr_assert_eq(kvf_session_append(s, &first, 1, &err), KVF_ERR_NOMEM);
    emu_fail_malloc(0);
    float *x = ask(s, p->n_vocab);
    cr_assert_eq(memcmp(x, want, (size_t)((ANSWER + 1) * p->n_vocab) * sizeof *x), 0, "after a refusal");
    drop(x);
    kvf_session_close(s);
}
#endif

static void compare(const char *model, int64_t blocks)
{
    const kvf_backend_module *module = device();
    char dev_dir[64], cpu_dir[64];
    int64_t misses, none;
    make_dir(dev_dir);
    make_dir(cpu_dir);
    place dev = open_place(module, model, dev_dir), cpu = open_place(NULL, model, cpu_dir);
    size_t n = (size_t)((ANSWER + 1) * dev.n_vocab), bytes = n * sizeof(float);
    float *first = read_and_ask(&dev, 16, &misses), *again = load_and_ask(&dev, blocks);
    int64_t ahead = asked.n_blocks_ahead, early = asked.n_blocks_early, host = asked.n_blocks_host, missed = asked.n_block_misses;
    cr_assert_geq(asked.moved_bytes, (uint64_t)(ahead + missed) * dev.slot_bytes, "%s: moved %llu bytes for %lld blocks", model,
                  (unsigned long long)asked.moved_bytes, (long long)(ahead + missed));
    float *roomy = load_and_ask(&dev, 64);
#ifdef KVF_TEST_CUDA_EMU
    refuse_pinned(&dev, first);
#endif
    float *want = read_and_ask(&cpu, 64, &none);
    cr_assert_gt(misses, 0, "%s: nothing was fetched", model);
    cr_assert(0 < early && early <= ahead && host > 0, "%s: %lld ahead, %lld early, %lld from the host", model, (long long)ahead,
              (long long)early, (long long)host);
    cr_assert_eq(memcmp(first, again, bytes), 0, "%s: loaded is not what was read", model);
    cr_assert_eq(memcmp(first, roomy, bytes), 0, "%s: the pool's size changes the result", model);
    double off = distance(first, want, n);
    cr_assert_lt(off, 0.05, "%s: %g from the CPU's logits", model, off);
    close_place(&dev);
    /* The device's store, read on the CPU: the same keys and values, to a rounding each. */
    place other = open_place(NULL, model, dev_dir);
    float *crossed = load_and_ask(&other, 64);
    off = distance(crossed, want, n);
    cr_assert_lt(off, 0.05, "%s: on the CPU %g from its own logits", model, off);
    float *own[] = { first, again, roomy, want, crossed };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) drop(own[i]);
    close_place(&other);
    close_place(&cpu);
    remove_dir(dev_dir);
    remove_dir(cpu_dir);
}

Test(cuda_store, a_document_of_the_device_is_the_same_after_a_reload_and_near_the_cpu_s) { compare("qwen2", 7); }
