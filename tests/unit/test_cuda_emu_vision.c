/* test_cuda_emu_vision.c - a vision tower on the CUDA backend beside the CPU's reference in f32: features,
 * embeddings, pooled ones and scores; its two ops against their definition in double; and too little memory.
 *
 * Errors are relative to the largest value. Attention rounds keys, values, queries and weights to f16, over two or
 * three layers; without exact mode products are bf16 or int8 besides.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/device_ctx.h"

#include <kvfold/vision.h>
#include <stdio.h>

#include "vision/vit_ops.h"

enum { FRAMES = 2 };
static const char *const towers[] = { "onevision", "llava16", "head72" };

typedef struct outputs {
    float *embd, *scores, *patch_scores, *features;
    size_t n_embd, n_scores, n_patch, n_features;
} outputs;

static outputs encode(kvf_vision *v, const float *pixels, int32_t pool)
{
    kvf_vision_info i = { .size = sizeof i };
    OK(kvf_vision_get_info(v, &i, &err));
    size_t t = (size_t)kvf_vision_tokens(v, pool, NULL) * FRAMES, patches = (size_t)i.n_patch * FRAMES;
    outputs o = { .n_embd = t * (size_t)i.n_out, .n_scores = t, .n_patch = patches, .n_features = patches * (size_t)i.width };
    o.embd = room(o.n_embd * sizeof(float));
    o.scores = room(o.n_scores * sizeof(float));
    o.patch_scores = room(o.n_patch * sizeof(float));
    o.features = room(o.n_features * sizeof(float));
    kvf_vision_batch b;
    kvf_vision_batch_init(&b);
    b.pixels = pixels;
    b.n = FRAMES;
    b.pool = pool;
    b.embd = o.embd;
    b.scores = o.scores;
    b.patch_scores = o.patch_scores;
    b.features = o.features;
    OK(kvf_vision_encode(v, &b, &err));
    return o;
}

static void outputs_free(const outputs *o)
{
    drop(o->embd);
    drop(o->scores);
    drop(o->patch_scores);
    drop(o->features);
}

static void near(const char *tower, const char *what, const float *got, const float *want, size_t n, double most)
{
    double top = 1e-30;
    for (size_t i = 0; i < n; i++) top = fmax(top, fabs((double)want[i]));
    double off = distance(got, want, n) / top;
    cr_assert_leq(off, most, "%s: %s is off by %g, at most %g", tower, what, off, most);
}

static kvf_vision *open_tower(kvf_ctx *ctx, const char *name, int32_t batch)
{
    char path[512];
    kvf_vision *v;
    kvf_vision_params p;
    kvf_vision_params_init(&p);
    p.batch = batch;
    snprintf(path, sizeof path, "%s/vision_tower/%s.gguf", KVF_TEST_DATA, name);
    OK(kvf_vision_open(&v, ctx, path, &p, &err));
    return v;
}

static void compare(const char *name, bool f32, double most)
{
    kvf_ctx *cpu = device_ctx(NULL, true, 0, NULL), *dev = device_ctx(device_module(), f32, 64u << 20, NULL);
    kvf_vision *a = open_tower(cpu, name, 1), *b = open_tower(dev, name, f32 ? 1 : 2);
    kvf_vision_info i = { .size = sizeof i };
    uint64_t seed = 11;
    OK(kvf_vision_get_info(a, &i, &err));
    float *pixels = floats((size_t)(FRAMES * 3 * i.image_size * i.image_size), 2.0f, &seed);
    for (int k = 0; k < (f32 ? 1 : 2); k++) { /* pooling is the CPU's: once is enough */
        int32_t pool = k == 0 ? KVF_VISION_POOL_NONE : KVF_VISION_POOL_BILINEAR;
        outputs want = encode(a, pixels, pool), got = encode(b, pixels, pool);
        near(name, "features", got.features, want.features, want.n_features, most);
        near(name, "embd", got.embd, want.embd, want.n_embd, most);
        near(name, "scores", got.scores, want.scores, want.n_scores, most);
        near(name, "patch_scores", got.patch_scores, want.patch_scores, want.n_patch, most);
        outputs_free(&want);
        outputs_free(&got);
    }
    kvf_vision_stats s = { .size = sizeof s };
    OK(kvf_vision_get_stats(b, &s, &err));
    cr_assert(strstr(s.kernels, "vit=cuda") && strstr(s.kernels, "attn"), "%s", s.kernels);
    drop(pixels);
    kvf_vision_close(a);
    kvf_vision_close(b);
    kvf_ctx_close(cpu);
    kvf_ctx_close(dev);
}

Test(cuda_vision, a_tower_in_exact_mode_is_the_cpu_s_to_an_f16_rounding)
{
    for (size_t t = 0; t < sizeof towers / sizeof *towers; t++) compare(towers[t], true, 5e-3);
}

Test(cuda_vision, a_tower_with_fast_products_stays_close)
{
    compare(towers[0], false, 3e-2);
}

Test(cuda_vision, norms_and_activations_equal_their_definition)
{
    static const kvf_vit_act acts[] = { KVF_VIT_SILU, KVF_VIT_GELU_TANH, KVF_VIT_GELU_QUICK, KVF_VIT_GELU_ERF };
    static const int64_t widths[] = { 1, 31, 72, 1152, 4097 };
    rig r;
    rig_open(&r, false);
    cr_assert(r.dev->ops->layernorm && r.dev->ops->act);
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        uint64_t seed = i + 1;
        int64_t w = widths[i], rows = 1 + (int64_t)i * 5;
        size_t n = (size_t)(w * rows);
        seed_order(i % 3);
        float *x = floats(n, 3.0f, &seed), *weight = floats((size_t)w, 1.0f, &seed), *bias = floats((size_t)w, 1.0f, &seed), *want = room(n * sizeof *want);
        for (size_t k = 0; i % 2 && k < n; k++) x[k] += 1000.0f; /* a mean far from 0 */
        for (int64_t k = 0; k < rows; k++) kvf_vit_ops_ref.layernorm(x + k * w, weight, bias, want + k * w, w, 1e-6f);
        float *dx = dev_put(&r, x, n * sizeof *x), *dw = dev_put(&r, weight, (size_t)w * sizeof *weight), *db = dev_put(&r, bias, (size_t)w * sizeof *bias);
        float *out = i % 2 ? dx : dev_poison(&r, n);
        kvf_layernorm_args a = { dx, dw, db, out, rows, w, 1e-6f };
        OK(r.dev->ops->layernorm(r.dev, &a, &err));
        float *got = dev_get(&r, out, n * sizeof *got);
        if (w > 1) cr_assert_leq(distance(got, want, n), i % 2 ? 2e-3 : 3e-6, "norm of %lld: off by %g", (long long)w, distance(got, want, n));
        drop(got);
        for (int k = 0; k < 4; k++) {
            float edge[8] = { 0, -0.0f, -12, 12, -90, 90, 1e-6f, -1e-6f };
            for (size_t e = 0; e < n; e++) x[e] = e < 8 ? edge[e] : real(&seed) * 8;
            memcpy(want, x, n * sizeof *x);
            kvf_vit_ops_ref.act(want, (int64_t)n, acts[k]);
            OK(r.dev->ops->upload(r.dev, dx, x, n * sizeof *x, &err));
            static const kvf_act of[] = { KVF_ACT_SILU, KVF_ACT_GELU_TANH, KVF_ACT_GELU_QUICK, KVF_ACT_GELU_ERF };
            OK(r.dev->ops->act(r.dev, dx, (int64_t)n, of[k], &err));
            got = dev_get(&r, dx, n * sizeof *got);
            cr_assert_leq(distance(got, want, n), 3e-6, "activation %d of %zu numbers: off by %g", k, n, distance(got, want, n));
            drop(got);
        }
        if (out != dx) dev_drop(&r, out);
        dev_drop(&r, dx);
        dev_drop(&r, dw);
        dev_drop(&r, db);
        drop(x);
        drop(weight);
        drop(bias);
        drop(want);
    }
    rig_close(&r);
}

enum { MOST_PIECES = 128 };

/* Take the device's memory, in pieces, but `left` bytes or so. */
static int fill(kvf_backend *b, size_t left, void **piece)
{
    int n = 0;
    for (size_t size = 16u << 20; size >= 4096; size /= 2) {
        for (;;) {
            uint64_t used, total;
            device_module()->memory(b, &used, &total);
            if (n == MOST_PIECES || total - used < left + size || b->ops->alloc(b, &piece[n], size, NULL) < 0) break;
            n++;
        }
    }
    return n;
}

/* The tower next to a full device: an error that says so, then all is as before. */
Test(cuda_vision, a_full_device_is_an_error_with_a_sentence)
{
    kvf_ctx *ctx = device_ctx(device_module(), true, 64u << 20, NULL);
    kvf_vision *v = open_tower(ctx, "onevision", 1), *second;
    kvf_vision_info i = { .size = sizeof i };
    uint64_t seed = 3;
    void *piece[MOST_PIECES];
    char path[512];
    OK(kvf_vision_get_info(v, &i, &err));
    float *pixels = floats((size_t)(FRAMES * 3 * i.image_size * i.image_size), 2.0f, &seed);
    outputs want = encode(v, pixels, KVF_VISION_POOL_NONE);
    snprintf(path, sizeof path, "%s/vision_tower/onevision.gguf", KVF_TEST_DATA);
    int refused = 0;
    for (size_t left = 1u << 14; left <= 8u << 20; left *= 8) { /* what the device still has */
        int n = fill(ctx->backend, left, piece);
        kvf_vision_batch b;
        kvf_vision_batch_init(&b);
        b.pixels = pixels;
        b.n = 1;
        b.embd = want.embd;
        kvf_status rc = kvf_vision_encode(v, &b, &err);
        cr_assert(rc == KVF_OK || (rc == KVF_ERR_NOMEM && err.msg[0]), "%zu bytes left: %d %s", left, (int)rc, err.msg);
        refused += rc != KVF_OK;
        rc = kvf_vision_open(&second, ctx, path, NULL, &err);
        cr_assert(rc == KVF_OK || rc == KVF_ERR_NOMEM, "%zu bytes left: %d %s", left, (int)rc, err.msg);
        if (rc == KVF_OK) kvf_vision_close(second);
        while (n > 0) ctx->backend->ops->release(ctx->backend, piece[--n]);
    }
    cr_assert(0 < refused && refused < 4, "%d of 4 refused", refused);
    outputs again = encode(v, pixels, KVF_VISION_POOL_NONE);
    cr_assert_eq(distance(again.features, want.features, want.n_features), 0.0);
    outputs_free(&want);
    outputs_free(&again);
    drop(pixels);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}
