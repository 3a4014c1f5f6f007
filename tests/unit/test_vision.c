/* test_vision.c - towers against independent forward passes, and files that lie.
 *
 * Fixtures (tests/data/vision_tower): random towers with the outputs of scripts/make_mmproj.py, float64 and
 * written from the papers; and of Hugging Face's SiglipVisionModel and CLIPVisionModel, attentions included.
 *
 * Tolerances, relative to the largest value: 5e-6 with f32 products; 3e-2 where products are taken in
 * bf16 or int8 (AUTO), whose unit in the last place is 2^-8 of a value, over two or three layers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* mkstemp */
#include "tests/unit/vision_rig.h"

#include <pthread.h>
#include <unistd.h>

#include "tests/unit/gguf_image.h"

/* What a fixture's forward pass gives. */
typedef struct outputs {
    float *embd, *scores, *patch_scores, *features;
} outputs;

static outputs encode(kvf_vision *v, const float *pixels, int64_t n, int32_t pool)
{
    kvf_vision_info i = rig_info(v);
    int64_t t = kvf_vision_tokens(v, pool, NULL);
    outputs o = { malloc((size_t)(n * t * i.n_out) * 4), malloc((size_t)(n * t) * 4), malloc((size_t)(n * i.n_patch) * 4),
                  malloc((size_t)(n * i.n_patch * i.width) * 4) };
    kvf_vision_batch b;
    kvf_error err;
    kvf_vision_batch_init(&b);
    b.pixels = pixels;
    b.n = n;
    b.pool = pool;
    b.embd = o.embd;
    b.scores = o.scores;
    b.patch_scores = o.patch_scores;
    b.features = o.features;
    kvf_status rc = kvf_vision_encode(v, &b, &err);
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    return o;
}

static void outputs_free(outputs o) { free(o.embd), free(o.scores), free(o.patch_scores), free(o.features); }

static void expect(const char *fixture, const char *what, const char *cpu, const float *got, int64_t n, double most)
{
    char path[512];
    int64_t count;
    snprintf(path, sizeof path, VISION_DATA "%s.%s.npy", fixture, what);
    float *want = rig_npy(path, &count);
    cr_assert_eq(n, count, "%s: %lld numbers, not %lld", path, (long long)n, (long long)count);
    double e = rig_error(got, want, n);
    cr_assert(e <= most, "%s of %s on %s: error %g, at most %g", what, fixture, cpu, e, most);
    free(want);
}

static const char *const levels[] = { "ref", "avx2", "avx512", "amx" };

static void check_fixture(const char *name, kvf_precision precision, double most)
{
    char path[512];
    snprintf(path, sizeof path, VISION_DATA "%s.gguf", name);
    for (size_t l = 0; l < sizeof levels / sizeof *levels; l++) {
        kvf_ctx *ctx = rig_ctx(levels[l], 2, precision);
        if (!ctx) continue;
        kvf_vision *v = rig_open(ctx, path, NULL);
        kvf_vision_info i = rig_info(v);
        float *pixels = rig_pixels(2 * 3 * (int64_t)i.image_size * i.image_size);
        outputs o = encode(v, pixels, 2, KVF_VISION_POOL_NONE);
        int64_t n = 2 * (int64_t)i.n_patch, side;
        expect(name, "features", levels[l], o.features, n * i.width, most);
        expect(name, "embd", levels[l], o.embd, n * i.n_out, most);
        expect(name, "scores", levels[l], o.scores, n, most);
        cr_assert_eq(memcmp(o.scores, o.patch_scores, (size_t)n * 4), 0);
        outputs_free(o);
        o = encode(v, pixels, 2, KVF_VISION_POOL_BILINEAR);
        side = (i.grid + 1) / 2;
        expect(name, "pooled", levels[l], o.embd, 2 * side * side * i.n_out, most);
        outputs_free(o);
        free(pixels);
        kvf_vision_close(v);
        kvf_ctx_close(ctx);
    }
}

Test(vision, siglip_tower_equals_the_float64_pass_on_every_level) { check_fixture("onevision", KVF_PRECISION_F32, 5e-6); }
Test(vision, clip_tower_with_quantised_weights_equals_the_float64_pass) { check_fixture("llava16", KVF_PRECISION_F32, 5e-6); }
Test(vision, heads_of_72_equal_the_float64_pass) { check_fixture("head72", KVF_PRECISION_F32, 5e-6); }

Test(vision, fast_products_stay_close_to_the_float64_pass)
{
    check_fixture("onevision", KVF_PRECISION_AUTO, 3e-2);
    check_fixture("llava16", KVF_PRECISION_AUTO, 3e-2);
    check_fixture("head72", KVF_PRECISION_AUTO, 3e-2);
}

/* ---- Hugging Face ------------------------------------------------------------------------- */

/* Hidden states after each layer and the mean attention received, of the library's own classes. */
static void check_hugging_face(const char *name, bool class_token)
{
    char path[512];
    snprintf(path, sizeof path, VISION_DATA "%s.gguf", name);
    kvf_ctx *ctx = rig_ctx(NULL, 2, KVF_PRECISION_F32);
    for (int32_t layer = 1; layer <= 3; layer++) {
        kvf_vision_params p;
        kvf_vision_params_init(&p);
        p.feature_layer = layer;
        kvf_vision *v = rig_open(ctx, path, &p);
        kvf_vision_info i = rig_info(v);
        cr_assert_eq(i.feature_layer, layer);
        cr_assert_eq(i.has_class_token, (int32_t)class_token);
        float *pixels = rig_pixels(2 * 3 * (int64_t)i.image_size * i.image_size);
        outputs o = encode(v, pixels, 2, KVF_VISION_POOL_NONE);
        char what[64];
        snprintf(what, sizeof what, "hidden%d", layer);
        expect(name, what, "auto", o.features, 2 * (int64_t)i.n_patch * i.width, 5e-6);
        snprintf(what, sizeof what, "attention%d", layer);
        expect(name, what, "auto", o.scores, 2 * (int64_t)i.n_patch, 5e-6);
        if (layer == 2) expect(name, "embd", "auto", o.embd, 2 * (int64_t)i.n_patch * i.n_out, 5e-6);
        outputs_free(o);
        free(pixels);
        kvf_vision_close(v);
    }
    kvf_ctx_close(ctx);
}

Test(vision, siglip_equals_hugging_face_layer_by_layer) { check_hugging_face("hf_siglip", false); }
Test(vision, clip_equals_hugging_face_layer_by_layer) { check_hugging_face("hf_clip", true); }

/* ---- What a file says ---------------------------------------------------------------------- */

Test(vision, info_describes_the_file)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_AUTO);
    kvf_vision *v = rig_open(ctx, VISION_DATA "onevision.gguf", NULL);
    kvf_vision_info i = rig_info(v);
    cr_assert_str_eq(i.name, "kvfold random onevision");
    cr_assert_str_eq(i.family, "siglip");
    cr_assert_str_eq(i.projector, "mlp");
    cr_assert_str_eq(i.activation, "gelu_tanh");
    cr_assert_str_eq(i.quantization, "F16");
    cr_assert(i.image_size == 59 && i.patch_size == 8 && i.grid == 7 && i.n_patch == 49);
    cr_assert(i.width == 64 && i.n_ff == 96 && i.n_head == 4 && i.head_dim == 16);
    cr_assert(i.n_layer == 3 && i.feature_layer == 2 && i.n_out == 64 && i.has_newline == 1 && i.has_class_token == 0);
    cr_assert(i.mean[0] == 0.5f && i.std[2] == 0.5f && i.resize == KVF_VISION_RESIZE_STRETCH);
    cr_assert(i.n_pinpoint == 3 && i.pinpoints[1] == 118 && i.n_params > 0 && i.work_bytes > 0);
    cr_assert_not_null(kvf_vision_newline(v));
    kvf_vision_close(v);
    v = rig_open(ctx, VISION_DATA "llava16.gguf", NULL);
    i = rig_info(v);
    cr_assert_str_eq(i.family, "clip");
    cr_assert_str_eq(i.activation, "gelu_quick");
    cr_assert_eq(i.feature_layer, 2, "all there are, for want of a key");
    cr_assert(i.resize == KVF_VISION_RESIZE_CROP && i.n_ff == 128);
    kvf_vision_close(v);
    v = rig_open(ctx, VISION_DATA "head72.gguf", NULL);
    cr_assert_null(kvf_vision_newline(v));
    cr_assert_eq(rig_info(v).head_dim, 72);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

Test(vision, pooling_leaves_the_tokens_it_says)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_AUTO);
    kvf_vision *v = rig_open(ctx, VISION_DATA "onevision.gguf", NULL);
    int32_t side;
    cr_assert_eq(kvf_vision_tokens(v, KVF_VISION_POOL_NONE, &side), 49);
    cr_assert_eq(kvf_vision_tokens(v, KVF_VISION_POOL_BILINEAR, &side), 16);
    cr_assert_eq(side, 4);
    cr_assert_eq(kvf_vision_tokens(v, KVF_VISION_POOL_AVERAGE, NULL), 9);
    cr_assert_eq(kvf_vision_tokens(v, KVF_VISION_POOL_MAX, NULL), 9);
    cr_assert_eq(kvf_vision_tokens(v, 4, &side), 0);
    cr_assert_eq(kvf_vision_tokens(v, -1, NULL), 0);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

Test(vision, average_and_max_pooling_are_windows_of_two_by_two)
{
    kvf_ctx *ctx = rig_ctx(NULL, 2, KVF_PRECISION_F32);
    kvf_vision *v = rig_open(ctx, VISION_DATA "onevision.gguf", NULL);
    float *pixels = rig_pixels(3 * 59 * 59);
    outputs all = encode(v, pixels, 1, KVF_VISION_POOL_NONE), mean = encode(v, pixels, 1, KVF_VISION_POOL_AVERAGE);
    outputs max = encode(v, pixels, 1, KVF_VISION_POOL_MAX);
    for (int y = 0; y < 3; y++)
        for (int x = 0; x < 3; x++)
            for (int c = 0; c < 65; c++) { /* 64 channels, then the score */
                float four[4];
                for (int k = 0; k < 4; k++) {
                    int at = (2 * y + k / 2) * 7 + 2 * x + k % 2;
                    four[k] = c < 64 ? all.embd[at * 64 + c] : all.scores[at];
                }
                float m = c < 64 ? mean.embd[(y * 3 + x) * 64 + c] : mean.scores[y * 3 + x];
                float t = c < 64 ? max.embd[(y * 3 + x) * 64 + c] : max.scores[y * 3 + x];
                cr_assert_float_eq(m, (four[0] + four[1] + four[2] + four[3]) / 4, 1e-5f);
                cr_assert_eq(t, fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3])));
            }
    cr_assert_eq(memcmp(all.patch_scores, max.patch_scores, 49 * 4), 0, "patch_scores are not pooled");
    outputs_free(all), outputs_free(mean), outputs_free(max);
    free(pixels);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

/* ---- Calls ---------------------------------------------------------------------------------- */

Test(vision, results_do_not_depend_on_threads_batch_or_which_outputs_are_asked_for)
{
    enum { FRAMES = 5 };
    float *pixels = rig_pixels(FRAMES * 3 * 32 * 32);
    outputs first = { 0 };
    for (int k = 0; k < 3; k++) {
        kvf_ctx *ctx = rig_ctx(NULL, k + 1, KVF_PRECISION_F32);
        kvf_vision_params p;
        kvf_vision_params_init(&p);
        p.batch = k == 2 ? 2 : 5;
        kvf_vision *v = rig_open(ctx, VISION_DATA "llava16.gguf", &p);
        kvf_vision_info i = rig_info(v);
        outputs o = encode(v, pixels, FRAMES, KVF_VISION_POOL_NONE);
        if (k == 0) first = o;
        else {
            cr_assert_leq(rig_error(o.embd, first.embd, FRAMES * i.n_patch * (int64_t)i.n_out), 1e-6);
            cr_assert_leq(rig_error(o.scores, first.scores, FRAMES * (int64_t)i.n_patch), 1e-6);
        }
        float *only = malloc((size_t)(FRAMES * i.n_patch * i.n_out) * 4);
        kvf_vision_batch b;
        kvf_vision_batch_init(&b);
        b.pixels = pixels;
        b.n = FRAMES;
        b.embd = only;
        cr_assert_eq(kvf_vision_encode(v, &b, NULL), KVF_OK);
        cr_assert_eq(memcmp(only, o.embd, (size_t)(FRAMES * i.n_patch * i.n_out) * 4), 0, "the same bits without scores");
        b.embd = NULL;
        b.scores = only;
        cr_assert_eq(kvf_vision_encode(v, &b, NULL), KVF_OK);
        cr_assert_eq(memcmp(only, o.scores, (size_t)(FRAMES * i.n_patch) * 4), 0);
        free(only);
        if (k) outputs_free(o);
        kvf_vision_close(v);
        kvf_ctx_close(ctx);
    }
    outputs_free(first);
    free(pixels);
}

Test(vision, scores_of_a_frame_sum_to_one_less_the_class_token)
{
    kvf_ctx *ctx = rig_ctx(NULL, 2, KVF_PRECISION_AUTO);
    for (int k = 0; k < 2; k++) {
        kvf_vision *v = rig_open(ctx, k ? VISION_DATA "llava16.gguf" : VISION_DATA "onevision.gguf", NULL);
        kvf_vision_info i = rig_info(v);
        float *pixels = rig_pixels(3 * (int64_t)i.image_size * i.image_size);
        outputs o = encode(v, pixels, 1, KVF_VISION_POOL_NONE);
        double sum = 0;
        for (int32_t j = 0; j < i.n_patch; j++) sum += (double)o.scores[j];
        if (k) cr_assert(sum < 0.999 && sum > 0.5, "%g", sum);
        else cr_assert_float_eq(sum, 1.0, 1e-4);
        outputs_free(o);
        free(pixels);
        kvf_vision_close(v);
    }
    kvf_ctx_close(ctx);
}

static int stop_at(void *user, int64_t done, int64_t total)
{
    int64_t *seen = user;
    cr_assert_eq(total, 6); /* 3 parts of 2 layers */
    cr_assert_eq(done, seen[0] + 1);
    seen[0] = done;
    return done == seen[1];
}

Test(vision, progress_counts_layers_and_cancels)
{
    kvf_ctx *ctx = rig_ctx(NULL, 2, KVF_PRECISION_AUTO);
    kvf_vision_params p;
    kvf_vision_params_init(&p);
    p.batch = 2;
    kvf_vision *v = rig_open(ctx, VISION_DATA "onevision.gguf", &p);
    float *pixels = rig_pixels(5 * 3 * 59 * 59), *scores = malloc(5 * 49 * 4);
    kvf_error err;
    for (int64_t stop = 0; stop <= 6; stop++) {
        int64_t seen[2] = { 0, stop };
        kvf_vision_batch b;
        kvf_vision_batch_init(&b);
        b.pixels = pixels;
        b.n = 5;
        b.scores = scores;
        b.progress = stop_at;
        b.user = seen;
        cr_assert_eq(kvf_vision_encode(v, &b, &err), stop ? KVF_ERR_CANCELLED : KVF_OK);
        cr_assert_eq(seen[0], stop ? stop : 6);
    }
    kvf_vision_cancel(v);
    kvf_vision_cancel(v);
    kvf_vision_batch b;
    kvf_vision_batch_init(&b);
    b.pixels = pixels;
    b.n = 1;
    b.scores = scores;
    cr_assert_eq(kvf_vision_encode(v, &b, &err), KVF_ERR_CANCELLED, "a request stops the next call");
    cr_assert_eq(kvf_vision_encode(v, &b, &err), KVF_OK, "and that one only");
    kvf_vision_stats s = { .size = sizeof s };
    cr_assert_eq(kvf_vision_get_stats(v, &s, NULL), KVF_OK);
    cr_assert_eq(s.n_frames, 6);
    cr_assert(s.encode_ms > 0 && s.matmul_ms > 0 && strstr(s.kernels, "vit="), "%s", s.kernels);
    free(pixels), free(scores);
    kvf_vision_close(v);
    kvf_vision_cancel(NULL);
    kvf_ctx_close(ctx);
}

Test(vision, wrong_arguments_are_named)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_AUTO);
    kvf_vision *v = rig_open(ctx, VISION_DATA "onevision.gguf", NULL), *w;
    float *pixels = rig_pixels(3 * 59 * 59), out[49];
    kvf_error err;
    kvf_vision_batch b;
    kvf_vision_batch_init(&b);
    b.pixels = pixels;
    b.n = 1;
    cr_assert_eq(kvf_vision_encode(v, &b, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "output"), "%s", err.msg);
    b.scores = out;
    b.n = 0;
    cr_assert_eq(kvf_vision_encode(v, &b, &err), KVF_ERR_ARG);
    b.n = 1;
    b.pool = 9;
    cr_assert_eq(kvf_vision_encode(v, &b, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "pool"), "%s", err.msg);
    b.pool = 0;
    b.size = 4;
    cr_assert_eq(kvf_vision_encode(v, &b, &err), KVF_ERR_ARG);
    b.size = sizeof b;
    const float bad[] = { NAN, INFINITY, -INFINITY };
    for (int i = 0; i < 3; i++) {
        pixels[59 * 59 * 3 - 1] = bad[i];
        cr_assert_eq(kvf_vision_encode(v, &b, &err), KVF_ERR_ARG);
        cr_assert(strstr(err.msg, "pixel"), "%s", err.msg);
    }
    b.pixels = NULL;
    cr_assert_eq(kvf_vision_encode(v, &b, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_vision_encode(NULL, &b, NULL), KVF_ERR_ARG);
    kvf_vision_params p;
    kvf_vision_params_init(&p);
    p.feature_layer = 4;
    cr_assert_eq(kvf_vision_open(&w, ctx, VISION_DATA "onevision.gguf", &p, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "feature_layer"), "%s", err.msg);
    cr_assert_null(w);
    kvf_vision_params_init(&p);
    p.batch = 1025;
    cr_assert_eq(kvf_vision_open(&w, ctx, VISION_DATA "onevision.gguf", &p, &err), KVF_ERR_ARG);
    kvf_vision_params_init(&p);
    p.activation = 5;
    cr_assert_eq(kvf_vision_open(&w, ctx, VISION_DATA "onevision.gguf", &p, &err), KVF_ERR_ARG);
    kvf_vision_params_init(&p);
    p.projector_gelu = -1;
    cr_assert_eq(kvf_vision_open(&w, ctx, VISION_DATA "onevision.gguf", &p, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_vision_open(&w, ctx, NULL, NULL, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_vision_open(&w, NULL, "x", NULL, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_vision_open(&w, ctx, "/nonexistent/mmproj.gguf", NULL, &err), KVF_ERR_IO);
    kvf_vision_info i = { .size = 0 };
    cr_assert_eq(kvf_vision_get_info(v, &i, NULL), KVF_ERR_ARG);
    kvf_vision_close(NULL);
    free(pixels);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

typedef struct caller {
    kvf_vision *v;
    const float *pixels;
    const outputs *want;
    int failed;
} caller;

static void *call(void *arg)
{
    caller *c = arg;
    for (int k = 0; k < 5; k++) {
        outputs o = encode(c->v, c->pixels, 2, KVF_VISION_POOL_NONE);
        if (memcmp(o.embd, c->want->embd, 2 * 49 * 64 * 4) != 0) c->failed = 1;
        outputs_free(o);
    }
    return NULL;
}

Test(vision, a_tower_is_shared_between_threads)
{
    kvf_ctx *ctx = rig_ctx(NULL, 2, KVF_PRECISION_AUTO);
    kvf_vision *v = rig_open(ctx, VISION_DATA "onevision.gguf", NULL);
    float *pixels = rig_pixels(2 * 3 * 59 * 59);
    outputs want = encode(v, pixels, 2, KVF_VISION_POOL_NONE);
    caller c[3];
    pthread_t t[3];
    for (int i = 0; i < 3; i++) {
        c[i] = (caller){ v, pixels, &want, 0 };
        cr_assert_eq(pthread_create(&t[i], NULL, call, &c[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(t[i], NULL);
        cr_assert_eq(c[i].failed, 0);
    }
    outputs_free(want);
    free(pixels);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

Test(vision, activation_and_gelu_can_be_overruled)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_F32);
    float *pixels = rig_pixels(3 * 32 * 32);
    kvf_vision_params p;
    kvf_vision_params_init(&p);
    kvf_vision *v = rig_open(ctx, VISION_DATA "llava16.gguf", NULL);
    kvf_vision_info i = rig_info(v);
    outputs plain = encode(v, pixels, 1, 0);
    kvf_vision_close(v);
    p.projector_gelu = KVF_VISION_GELU_TANH;
    v = rig_open(ctx, VISION_DATA "llava16.gguf", &p);
    outputs tanh_out = encode(v, pixels, 1, 0);
    kvf_vision_close(v);
    double e = rig_error(tanh_out.embd, plain.embd, i.n_patch * (int64_t)i.n_out);
    cr_assert(e > 1e-6 && e < 2e-3, "%g", e);
    cr_assert_eq(memcmp(tanh_out.features, plain.features, (size_t)(i.n_patch * i.width) * 4), 0);
    p.projector_gelu = KVF_VISION_GELU_ERF;
    p.activation = KVF_VISION_ACT_SILU;
    v = rig_open(ctx, VISION_DATA "llava16.gguf", &p);
    cr_assert_str_eq(rig_info(v).activation, "silu");
    outputs silu = encode(v, pixels, 1, 0);
    cr_assert_gt(rig_error(silu.features, plain.features, i.n_patch * (int64_t)i.width), 1e-2);
    outputs_free(plain), outputs_free(tanh_out), outputs_free(silu);
    kvf_vision_close(v);
    free(pixels);
    kvf_ctx_close(ctx);
}

/* ---- Files that lie -------------------------------------------------------------------------- */

/* A small tower, valid unless told otherwise. */
typedef struct lie {
    const char *arch, *projector;
    uint32_t image, patch, width, heads, layers, ff;
    float eps, std;
    int32_t feature;    /* 0: no key */
    const char *drop;   /* tensor left out */
    const char *bend;   /* tensor whose first dimension is one more */
    const char *nan;    /* tensor that holds a NaN */
    const char *extra;  /* tensor nobody knows */
    bool no_vision, both_acts, cut;
} lie;

static const lie truth = { .arch = "clip", .projector = "mlp", .image = 9, .patch = 4, .width = 16, .heads = 2, .layers = 2, .ff = 24,
                           .eps = 1e-5f, .std = 0.5f };

typedef struct tensor {
    char name[48];
    uint32_t n_dim;
    uint64_t dim[4];
} tensor;

static int tensors_of(const lie *l, tensor *t)
{
    enum { W = 16, FF = 24 };
    int n = 0;
#define ADD(N, ...) (t[n] = (tensor){ N, __VA_ARGS__ }, n++)
    ADD("v.patch_embd.weight", 4, { 4, 4, 3, W });
    ADD("v.patch_embd.bias", 1, { W });
    ADD("v.position_embd.weight", 2, { W, 4 });
    for (int i = 0; i < 2; i++) {
        static const char *const vec[] = { "ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "attn_q.bias" };
        static const char *const mat[] = { "attn_q", "attn_k", "attn_v", "attn_out" };
        for (int k = 0; k < 5; k++, n++) {
            t[n] = (tensor){ .n_dim = 1, .dim = { W } };
            snprintf(t[n].name, sizeof t[n].name, "v.blk.%d.%s", i, vec[k]);
        }
        for (int k = 0; k < 4; k++, n++) {
            t[n] = (tensor){ .n_dim = 2, .dim = { W, W } };
            snprintf(t[n].name, sizeof t[n].name, "v.blk.%d.%s.weight", i, mat[k]);
        }
        t[n] = (tensor){ .n_dim = 2, .dim = { W, FF } };
        snprintf(t[n++].name, sizeof t[n].name, "v.blk.%d.ffn_up.weight", i);
        t[n] = (tensor){ .n_dim = 2, .dim = { FF, W } };
        snprintf(t[n++].name, sizeof t[n].name, "v.blk.%d.ffn_down.weight", i);
    }
    ADD("mm.0.weight", 2, { W, 8 });
    ADD("mm.0.bias", 1, { 8 });
    ADD("mm.2.weight", 2, { 8, 12 });
    ADD("mm.2.bias", 1, { 12 });
    if (l->extra) {
        t[n] = (tensor){ .n_dim = 1, .dim = { 4 } };
        snprintf(t[n++].name, sizeof t[n].name, "%s", l->extra);
    }
#undef ADD
    int kept = 0;
    for (int i = 0; i < n; i++) {
        if (l->drop && strcmp(t[i].name, l->drop) == 0) continue;
        t[kept] = t[i];
        if (l->bend && strcmp(t[i].name, l->bend) == 0) t[kept].dim[0]++;
        kept++;
    }
    return kept;
}

static uint64_t numbers(const tensor *t)
{
    uint64_t n = 1;
    for (uint32_t i = 0; i < t->n_dim; i++) n *= t->dim[i];
    return n;
}

static image build(const lie *l)
{
    tensor t[64];
    int n = tensors_of(l, t);
    image g = img_new((uint64_t)n, (uint64_t)(15 + (l->feature != 0)));
    img_kv_str(&g, "general.architecture", l->arch);
    img_kv_str(&g, "clip.projector_type", l->projector);
    img_kv_bool(&g, "clip.has_vision_encoder", !l->no_vision);
    img_kv_bool(&g, "clip.use_gelu", true);
    img_kv_bool(&g, "clip.use_silu", l->both_acts);
    img_kv_u32(&g, "clip.vision.image_size", l->image);
    img_kv_u32(&g, "clip.vision.patch_size", l->patch);
    img_kv_u32(&g, "clip.vision.embedding_length", l->width);
    img_kv_u32(&g, "clip.vision.attention.head_count", l->heads);
    img_kv_u32(&g, "clip.vision.block_count", l->layers);
    img_kv_u32(&g, "clip.vision.feed_forward_length", l->ff);
    img_kv_f32(&g, "clip.vision.attention.layer_norm_epsilon", l->eps);
    for (int k = 0; k < 3; k++) {
        static const char *const keys[] = { "clip.vision.image_mean", "clip.vision.image_std", "clip.vision.image_grid_pinpoints" };
        img_kv_arr(&g, keys[k], k == 2 ? 5 : 6, k == 2 ? 2 : 3); /* i32, f32 */
        for (int i = 0; i < 3 && k < 2; i++) img_f32(&g, k ? l->std : 0.5f);
        if (k == 2) img_u32(&g, 9), img_u32(&g, 18);
    }
    if (l->feature) {
        img_kv_arr(&g, "clip.vision.feature_layer", 5, 1);
        img_u32(&g, (uint32_t)l->feature);
    }
    uint64_t at = 0;
    for (int i = 0; i < n; i++) {
        img_tensor(&g, t[i].name, t[i].n_dim, t[i].dim, 0, at);
        at += (numbers(&t[i]) * 4 + 31) / 32 * 32;
    }
    while (g.n % 32) img_u8(&g, 0);
    for (int i = 0; i < n; i++) {
        bool bad = l->nan && strcmp(t[i].name, l->nan) == 0;
        for (uint64_t k = 0; k < numbers(&t[i]); k++) img_f32(&g, bad && k == numbers(&t[i]) - 1 ? NAN : 0.25f - 0.01f * (float)(k % 50));
        while (g.n % 32) img_u8(&g, 0);
    }
    if (l->cut) g.n -= 64;
    return g;
}

static kvf_status open_lie(kvf_ctx *ctx, const lie *l, kvf_vision **out, kvf_error *err)
{
    image g = build(l);
    char path[] = "/tmp/kvfold-vision-XXXXXX";
    int fd = mkstemp(path);
    cr_assert_geq(fd, 0);
    cr_assert_eq(write(fd, g.p, g.n), (ssize_t)g.n);
    close(fd);
    kvf_status rc = kvf_vision_open(out, ctx, path, NULL, err);
    unlink(path);
    img_free(&g);
    return rc;
}

static void refused(kvf_ctx *ctx, lie l, kvf_status want, const char *word)
{
    kvf_vision *v = NULL;
    kvf_error err = { .code = KVF_OK };
    kvf_status rc = open_lie(ctx, &l, &v, &err);
    cr_assert_eq(rc, want, "%s: %s", kvf_status_name(rc), err.msg);
    cr_assert_null(v);
    cr_assert_eq(err.code, want);
    cr_assert(strstr(err.msg, word), "'%s' does not say '%s'", err.msg, word);
}

Test(vision, the_small_tower_itself_is_accepted)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_AUTO);
    kvf_vision *v;
    kvf_error err;
    kvf_status rc = open_lie(ctx, &truth, &v, &err);
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    float *pixels = rig_pixels(3 * 9 * 9);
    outputs o = encode(v, pixels, 1, KVF_VISION_POOL_AVERAGE);
    for (int i = 0; i < 12; i++) cr_assert(isfinite(o.embd[i]));
    outputs_free(o);
    free(pixels);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

Test(vision, every_required_tensor_is_missed_by_name_and_every_shape_checked)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_AUTO);
    tensor t[64];
    int n = tensors_of(&truth, t);
    for (int i = 0; i < n; i++) {
        bool optional = strstr(t[i].name, "attn_q.bias") || strstr(t[i].name, "patch_embd.bias") || strstr(t[i].name, "mm.0.bias") ||
                        strstr(t[i].name, "mm.2.bias");
        lie l = truth;
        l.drop = t[i].name;
        kvf_vision *v;
        kvf_error err;
        if (strcmp(t[i].name, "mm.2.weight") == 0) refused(ctx, l, KVF_ERR_UNSUPPORTED, "mm.2.bias"); /* a linear projector has none */
        else if (!optional) refused(ctx, l, KVF_ERR_FORMAT, t[i].name);
        else {
            cr_assert_eq(open_lie(ctx, &l, &v, &err), KVF_OK, "%s", err.msg);
            kvf_vision_close(v);
        }
        l = truth;
        l.bend = t[i].name;
        refused(ctx, l, KVF_ERR_FORMAT, "tensor");
        l = truth;
        l.nan = t[i].name;
        refused(ctx, l, KVF_ERR_FORMAT, t[i].name);
    }
    kvf_ctx_close(ctx);
}

Test(vision, metadata_that_lies_is_refused_by_name)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_AUTO);
    lie l = truth;
#define LIE(FIELD, VALUE, STATUS, WORD) (l = truth, l.FIELD = (VALUE), refused(ctx, l, STATUS, WORD))
    LIE(layers, 0, KVF_ERR_FORMAT, "block_count");
    LIE(layers, 3, KVF_ERR_FORMAT, "v.blk.2.");
    LIE(layers, 1, KVF_ERR_UNSUPPORTED, "v.blk.1.");
    LIE(layers, 400, KVF_ERR_FORMAT, "larger model");
    LIE(layers, 0xffffffffu, KVF_ERR_FORMAT, "block_count");
    LIE(image, 0, KVF_ERR_FORMAT, "image_size");
    LIE(image, 0x7fffffffu, KVF_ERR_FORMAT, "image_size");
    LIE(image, 16000, KVF_ERR_UNSUPPORTED, "patches");
    LIE(image, 1000, KVF_ERR_FORMAT, "larger model");
    LIE(image, 20, KVF_ERR_FORMAT, "v.position_embd.weight");
    LIE(patch, 0, KVF_ERR_FORMAT, "patch_size");
    LIE(patch, 10, KVF_ERR_FORMAT, "patch_size");
    LIE(patch, 3, KVF_ERR_FORMAT, "v.patch_embd.weight");
    LIE(width, 0, KVF_ERR_FORMAT, "embedding_length");
    LIE(width, 16384, KVF_ERR_UNSUPPORTED, "heads");
    LIE(width, 32, KVF_ERR_FORMAT, "tensor");
    LIE(heads, 0, KVF_ERR_FORMAT, "head_count");
    LIE(heads, 3, KVF_ERR_UNSUPPORTED, "heads");
    LIE(heads, 4, KVF_ERR_UNSUPPORTED, "multiple of 8");
    LIE(ff, 40, KVF_ERR_FORMAT, "ffn");
    LIE(ff, 0x7fffffffu, KVF_ERR_FORMAT, "feed_forward_length");
    LIE(eps, NAN, KVF_ERR_FORMAT, "layer_norm_epsilon");
    LIE(eps, -1, KVF_ERR_FORMAT, "layer_norm_epsilon");
    LIE(std, 0, KVF_ERR_FORMAT, "image_std");
    LIE(std, INFINITY, KVF_ERR_FORMAT, "image_std");
    LIE(feature, 3, KVF_ERR_FORMAT, "feature_layer");
    LIE(feature, -1, KVF_ERR_FORMAT, "feature_layer");
    LIE(arch, "qwen2", KVF_ERR_UNSUPPORTED, "qwen2");
    LIE(projector, "resampler", KVF_ERR_UNSUPPORTED, "resampler");
    LIE(no_vision, true, KVF_ERR_UNSUPPORTED, "vision encoder");
    LIE(both_acts, true, KVF_ERR_FORMAT, "use_silu");
    LIE(extra, "v.blk.0.attn_q_norm.weight", KVF_ERR_UNSUPPORTED, "attn_q_norm");
    LIE(extra, "mm.1.weight", KVF_ERR_UNSUPPORTED, "mm.1.weight");
    LIE(cut, true, KVF_ERR_FORMAT, "");
#undef LIE
    l = truth;
    l.extra = "v.head.probe";
    kvf_vision *v;
    kvf_error err;
    cr_assert_eq(open_lie(ctx, &l, &v, &err), KVF_OK, "SigLIP's pooling head is passed over: %s", err.msg);
    kvf_vision_close(v);
    l = truth;
    l.ff = 0; /* old files */
    cr_assert_eq(open_lie(ctx, &l, &v, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(rig_info(v).n_ff, 24);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

Test(vision, a_language_model_is_not_an_mmproj)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_AUTO);
    kvf_vision *v;
    kvf_model *m;
    kvf_error err;
    cr_assert_eq(kvf_vision_open(&v, ctx, KVF_TEST_DATA "/tiny/qwen2.gguf", NULL, &err), KVF_ERR_UNSUPPORTED);
    cr_assert(strstr(err.msg, "'qwen2' model") && strstr(err.msg, "mmproj"), "%s", err.msg);
    cr_assert_lt(kvf_model_open(&m, ctx, VISION_DATA "onevision.gguf", &err), 0);
    kvf_ctx_close(ctx);
}
