/* test_vision_resize.c - frames are resized as Pillow does, byte for byte, and normalised.
 *
 * Fixtures: scripts/make_vision_oracles.py resized the pictures below with Pillow, and checked that the
 * models' own processors (SiglipImageProcessor, CLIPImageProcessor) give the same bytes.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/vision_rig.h"

/* A picture with smooth parts, edges and noise; the same in the script. */
static uint8_t *picture(int32_t w, int32_t h, int64_t stride)
{
    uint8_t *p = malloc((size_t)(stride * h));
    uint32_t x = 2463534242u;
    memset(p, 0xaa, (size_t)(stride * h));
    for (int32_t row = 0; row < h; row++)
        for (int32_t col = 0; col < w; col++)
            for (int32_t c = 0; c < 3; c++) {
                x ^= x << 13;
                x ^= x >> 17;
                x ^= x << 5;
                int32_t v = col * (c + 1) * 255 / (w * 3) + ((row / 5 + col / 7) % 2 ? 90 : 0) + (int32_t)(x >> 26);
                p[row * stride + col * 3 + c] = (uint8_t)(v > 255 ? 255 : v);
            }
    return p;
}

typedef struct oracle {
    const char *model, *mode;
    int32_t width, height, resize;
} oracle;

static const oracle oracles[] = {
    { "onevision", "stretch", 1, 1, KVF_VISION_RESIZE_STRETCH },
    { "onevision", "stretch", 59, 59, KVF_VISION_RESIZE_STRETCH },
    { "onevision", "stretch", 40, 23, KVF_VISION_RESIZE_STRETCH },
    { "onevision", "stretch", 60, 58, KVF_VISION_RESIZE_MODEL },
    { "onevision", "stretch", 320, 180, KVF_VISION_RESIZE_MODEL },
    { "onevision", "stretch", 59, 400, KVF_VISION_RESIZE_STRETCH },
    { "onevision", "stretch", 1280, 720, KVF_VISION_RESIZE_STRETCH },
    { "llava16", "crop", 100, 75, KVF_VISION_RESIZE_MODEL },
    { "llava16", "crop", 75, 101, KVF_VISION_RESIZE_CROP },
    { "llava16", "crop", 33, 32, KVF_VISION_RESIZE_CROP },
    { "llava16", "crop", 20, 10, KVF_VISION_RESIZE_CROP },
    { "llava16", "pad", 100, 75, KVF_VISION_RESIZE_PAD },
    { "llava16", "pad", 31, 90, KVF_VISION_RESIZE_PAD },
    { "llava16", "pad", 48, 48, KVF_VISION_RESIZE_PAD },
};

static float *prepared(kvf_vision *v, int32_t w, int32_t h, int64_t stride, int32_t mode)
{
    int32_t s = rig_info(v).image_size;
    float *out = malloc((size_t)(3 * s * s) * 4);
    uint8_t *rgb = picture(w, h, stride ? stride : 3 * (int64_t)w);
    kvf_vision_frame f = { rgb, w, h, stride };
    kvf_error err;
    kvf_status rc = kvf_vision_prepare(v, &f, 1, mode, out, &err);
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    free(rgb);
    return out;
}

Test(vision_resize, equals_pillow_byte_for_byte)
{
    kvf_ctx *ctx = rig_ctx(NULL, 2, KVF_PRECISION_AUTO);
    for (size_t k = 0; k < sizeof oracles / sizeof *oracles; k++) {
        const oracle *o = &oracles[k];
        char path[512];
        snprintf(path, sizeof path, VISION_DATA "%s.gguf", o->model);
        kvf_vision *v = rig_open(ctx, path, NULL);
        kvf_vision_info i = rig_info(v);
        int64_t n;
        snprintf(path, sizeof path, VISION_DATA "resize_%s_%dx%d.npy", o->mode, o->width, o->height);
        float *want = rig_npy(path, &n), *got = prepared(v, o->width, o->height, 0, o->resize);
        int32_t s = i.image_size;
        cr_assert_eq(n, 3 * (int64_t)s * s);
        for (int64_t at = 0; at < n; at++) {
            int64_t c = at % 3, place = at / 3;
            float expected = ((float)((double)want[at] * (1.0 / 255)) - i.mean[c]) / i.std[c];
            float real = got[c * s * s + place];
            cr_assert(fabsf(real - expected) <= 1e-6f, "%s: pixel (%lld, %lld), channel %lld: %g, not %g", path, (long long)(place % s),
                      (long long)(place / s), (long long)c, (double)real, (double)expected);
        }
        free(want), free(got);
        kvf_vision_close(v);
    }
    kvf_ctx_close(ctx);
}

Test(vision_resize, stride_and_batches_do_not_matter)
{
    kvf_ctx *ctx = rig_ctx(NULL, 3, KVF_PRECISION_AUTO);
    kvf_vision *v = rig_open(ctx, VISION_DATA "onevision.gguf", NULL);
    enum { N = 3 * 59 * 59 };
    float *a = prepared(v, 90, 70, 0, 0), *b = prepared(v, 90, 70, 301, 0), *two = malloc(2 * N * 4);
    cr_assert_eq(memcmp(a, b, N * 4), 0);
    uint8_t *p = picture(90, 70, 270), *q = picture(33, 100, 99);
    kvf_vision_frame f[2] = { { q, 33, 100, 0 }, { p, 90, 70, 270 } };
    cr_assert_eq(kvf_vision_prepare(v, f, 2, 0, two, NULL), KVF_OK);
    cr_assert_eq(memcmp(two + N, a, N * 4), 0);
    free(a), free(b), free(two), free(p), free(q);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

Test(vision_resize, very_long_and_thin_frames_work)
{
    kvf_ctx *ctx = rig_ctx(NULL, 2, KVF_PRECISION_AUTO);
    kvf_vision *v = rig_open(ctx, VISION_DATA "llava16.gguf", NULL);
    float mean = 0;
    for (int mode = 1; mode <= 2; mode++) { /* a square around 65536 x 1 would be 12 GiB: not here */
        float *out = prepared(v, 65536, 1, 0, mode);
        for (int i = 0; i < 3 * 32 * 32; i++) mean += out[i];
        cr_assert(isfinite(mean));
        free(out);
        out = prepared(v, 1, 3000, 0, mode);
        free(out);
    }
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}

Test(vision_resize, wrong_frames_are_named)
{
    kvf_ctx *ctx = rig_ctx(NULL, 1, KVF_PRECISION_AUTO);
    kvf_vision *v = rig_open(ctx, VISION_DATA "llava16.gguf", NULL);
    uint8_t rgb[300] = { 0 };
    static float out[2 * 3 * 32 * 32];
    kvf_error err;
    const kvf_vision_frame good = { rgb, 10, 10, 0 };
    const kvf_vision_frame bad[] = { { NULL, 10, 10, 0 }, { rgb, 0, 10, 0 },      { rgb, 10, -1, 0 },
                                     { rgb, 10, 10, 29 }, { rgb, 65537, 1, 0 }, { rgb, 10, 10, -30 } };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_vision_frame f[2] = { good, bad[i] };
        cr_assert_eq(kvf_vision_prepare(v, f, 2, 0, out, &err), KVF_ERR_ARG);
        cr_assert(strstr(err.msg, "frame 1"), "%s", err.msg);
    }
    cr_assert_eq(kvf_vision_prepare(v, &good, 0, 0, out, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_vision_prepare(v, &good, 1, 4, out, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_vision_prepare(v, NULL, 1, 0, out, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_vision_prepare(v, &good, 1, 0, NULL, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_vision_prepare(NULL, &good, 1, 0, out, &err), KVF_ERR_ARG);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
}
