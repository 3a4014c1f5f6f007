/* test_video.c - frames of clips: the right ones, from every container, and clear errors from what is none.
 *
 * The clips of tests/data/video say in their pixels which frame they are, so "the right frame" is read from
 * the picture itself.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dct_features.h"
#include "npy.h"
#include "video_decode.h"

#define DATA KVF_TEST_DATA "/video/"

/* ---- Choice -------------------------------------------------------------------------------- */

static int64_t choose(int64_t n, double fps, frame_request q, int64_t *out, kvf_status want)
{
    double *time = malloc((size_t)n * sizeof *time);
    for (int64_t i = 0; i < n; i++) time[i] = (double)i / fps;
    int64_t n_out = 0;
    kvf_error err = { 0 };
    cr_assert_eq(frame_choose(time, n, &q, out, 64, &n_out, &err), want, "%s", err.msg);
    free(time);
    return n_out;
}

Test(frame_choice, even_spacing_is_that_of_linspace_cut_to_integers)
{
    int64_t v[64];
    static const int64_t want[] = {
        0, 4, 8, 13, 17, 22, 26, 31, 35, 40
    }; /* numpy.linspace(0, 40, 10).astype(int) */
    cr_assert_eq(choose(41, 25, (frame_request){ .frames = 10 }, v, KVF_OK), 10);
    cr_assert_arr_eq(v, want, sizeof want);
    cr_assert_eq(choose(41, 25, (frame_request){ .frames = 1 }, v, KVF_OK), 1);
    cr_assert_eq(v[0], 0);
    cr_assert_eq(choose(5, 25, (frame_request){ .frames = 32 }, v, KVF_OK), 5);
    for (int64_t i = 0; i < 5; i++) cr_assert_eq(v[i], i);
    cr_assert_eq(choose(1, 25, (frame_request){ .frames = 7 }, v, KVF_OK), 1);
}

Test(frame_choice, a_range_holds_its_start_and_not_its_end)
{
    int64_t v[64];
    cr_assert_eq(choose(100, 10, (frame_request){ .frames = 64, .start = 2, .end = 3 }, v, KVF_OK), 10);
    cr_assert(v[0] == 20 && v[9] == 29);
    cr_assert_eq(choose(100, 10, (frame_request){ .frames = 2, .start = 9.85 }, v, KVF_OK), 1);
    cr_assert_eq(v[0], 99);
    choose(100, 10, (frame_request){ .frames = 2, .start = 9.95 }, v, KVF_ERR_ARG);
    choose(100, 10, (frame_request){ .frames = 2, .start = 3, .end = 3 }, v, KVF_ERR_ARG);
    choose(100, 10, (frame_request){ .frames = 2, .start = -1 }, v, KVF_ERR_ARG);
    choose(100, 10, (frame_request){ .frames = 2, .start = NAN }, v, KVF_ERR_ARG);
    choose(100, 10, (frame_request){ .frames = 0 }, v, KVF_ERR_ARG);
    choose(100, 10, (frame_request){ .frames = 65 }, v, KVF_ERR_LIMIT);
    choose(100, 10, (frame_request){ .fps = 10 }, v, KVF_ERR_LIMIT);
}

Test(frame_choice, a_rate_takes_the_frame_on_the_screen_and_each_once)
{
    int64_t v[64];
    cr_assert_eq(choose(100, 25, (frame_request){ .fps = 5 }, v, KVF_OK), 20);
    for (int64_t i = 0; i < 20; i++) cr_assert_eq(v[i], i * 5);
    cr_assert_eq(choose(30, 30, (frame_request){ .fps = 4 }, v, KVF_OK), 4);
    cr_assert(v[0] == 0 && v[1] == 7 && v[2] == 15 && v[3] == 22);
    cr_assert_eq(choose(20, 10, (frame_request){ .fps = 1000 }, v, KVF_OK), 20);
    cr_assert_eq(choose(20, 10, (frame_request){ .fps = 0.01 }, v, KVF_OK), 1);
    cr_assert_eq(choose(20, 10, (frame_request){ .fps = 2, .start = 1 }, v, KVF_OK), 2);
    cr_assert(v[0] == 10 && v[1] == 15);
    /* Times as they come from a damaged file: far apart, all alike. */
    double wild[] = { 0, 1e12, 1e12, 9e18 };
    int64_t n = 0;
    frame_request q = { .fps = 1000 };
    cr_assert_eq(frame_choose(wild, 4, &q, v, 64, &n, NULL), KVF_OK);
    cr_assert_leq(n, 4);
}

/* ---- Decoding ------------------------------------------------------------------------------ */

#define WITH_VIDEO()                                                                                         \
    if (!video_built_in()) cr_skip_test("this build decodes no video")

typedef struct seen {
    int64_t n, code[256], number[256];
    double time[256];
    int width, height, stop_after;
    int64_t damaged;
} seen;

/* The number in the top rows, upright or turned by 270 degrees clockwise. */
static int64_t read_code(const video_frame *f)
{
    int64_t code = 0;
    for (int bit = 0; bit < 7; bit++) {
        int x = bit * 16 + 8, y = 8;
        bool turned = f->height > f->width;
        const uint8_t *p = turned ? f->rgb + (f->height - 1 - x) * f->stride + (int64_t)y * 3
                                  : f->rgb + y * f->stride + (int64_t)x * 3;
        code |= (int64_t)(p[0] > 128) << bit;
    }
    return code;
}

static kvf_status look(void *user, const video_frame *f, kvf_error *err)
{
    (void)err;
    seen *s = user;
    s->width = f->width;
    s->height = f->height;
    s->code[s->n] = read_code(f);
    s->time[s->n] = f->time;
    s->damaged += f->damaged;
    s->number[s->n++] = f->number;
    return s->stop_after && s->n == s->stop_after ? KVF_ERR_CANCELLED : KVF_OK;
}

static seen read_clip(const char *path, frame_request q)
{
    video *v;
    kvf_error err = { 0 };
    seen s = { 0 };
    int64_t n = 0;
    video_outcome o;
    cr_assert_eq(video_open(&v, path, 2, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(video_choose(v, &q, &n, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(video_read(v, look, &s, &o, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(o.n_frames, s.n);
    cr_assert_eq(o.n_missing, n - s.n);
    video_close(v);
    return s;
}

Test(video, the_frames_chosen_are_the_frames_shown_in_every_container)
{
    WITH_VIDEO();
    static const struct {
        const char *path;
        int64_t n;
    } clips[] = { { DATA "numbers.mp4", 120 },
                  { DATA "numbers.mkv", 120 },
                  { DATA "numbers.avi", 40 },
                  { DATA "numbers.h264", 40 } };
    static const int64_t counts[] = { 1, 2, 3, 5, 40, 119, 200 };
    for (size_t c = 0; c < sizeof clips / sizeof *clips; c++)
        for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
            seen s = read_clip(clips[c].path, (frame_request){ .frames = counts[k] });
            cr_assert_eq(s.n, counts[k] < clips[c].n ? counts[k] : clips[c].n, "%s: %lld", clips[c].path,
                         (long long)s.n);
            for (int64_t i = 0; i < s.n; i++) {
                int64_t want = s.n > 1 ? i * (clips[c].n - 1) / (s.n - 1) : 0;
                cr_assert_eq(s.number[i], want);
                cr_assert_eq(s.code[i], want, "%s: frame %lld shows %lld", clips[c].path, (long long)want,
                             (long long)s.code[i]);
                cr_assert_float_eq(s.time[i], (double)want / 20, 2e-3);
            }
        }
}

Test(video, ranges_and_rates_choose_by_time)
{
    WITH_VIDEO();
    seen s = read_clip(DATA "numbers.mp4", (frame_request){ .fps = 4, .start = 4, .end = 5 });
    cr_assert_eq(s.n, 4);
    for (int64_t i = 0; i < 4; i++) cr_assert_eq(s.code[i], 80 + i * 5);
    s = read_clip(DATA "numbers.mkv",
                  (frame_request){ .frames = 3, .start = 5.5 }); /* far behind the first key frame */
    cr_assert(s.n == 3 && s.code[0] == 110 && s.code[2] == 119);
}

Test(video, what_the_file_says_of_itself_is_told)
{
    WITH_VIDEO();
    video *v;
    cr_assert_eq(video_open(&v, DATA "numbers.mp4", 1, NULL), KVF_OK);
    const video_info *i = video_get_info(v);
    cr_assert(i->width == 112 && i->height == 64 && i->n_frames == 120 && i->rotation == 0 && !i->damaged);
    cr_assert_float_eq(i->fps, 20, 1e-3);
    cr_assert_float_eq(i->seconds, 6, 1e-2);
    cr_assert_str_eq(i->codec, "h264");
    video_close(v);
    video_close(NULL);
}

Test(video, a_turned_clip_is_turned_upright)
{
    WITH_VIDEO();
    seen s = read_clip(DATA "turned.mp4", (frame_request){ .frames = 4 });
    cr_assert(s.width == 64 && s.height == 112);
    cr_assert_eq(s.n, 4);
    for (int64_t i = 0; i < 4; i++) cr_assert_eq(s.code[i], i);
}

Test(video, a_clip_can_be_read_again_and_reading_can_be_stopped)
{
    WITH_VIDEO();
    video *v;
    int64_t n;
    video_outcome o;
    seen a = { .stop_after = 2 }, b = { 0 };
    frame_request q = { .frames = 6 };
    cr_assert_eq(video_open(&v, DATA "numbers.mp4", 1, NULL), KVF_OK);
    cr_assert_eq(video_choose(v, &q, &n, NULL), KVF_OK);
    cr_assert_eq(video_read(v, look, &a, &o, NULL), KVF_ERR_CANCELLED);
    cr_assert_eq(a.n, 2);
    cr_assert_eq(video_read(v, look, &b, &o, NULL), KVF_OK);
    cr_assert_eq(b.n, 6);
    for (int64_t i = 0; i < 6; i++) cr_assert_eq(b.code[i], i * 119 / 5);
    video_close(v);
}

/* ---- Damage -------------------------------------------------------------------------------- */

static char *slurp(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    char *v = malloc(65536);
    cr_assert(f && v);
    *n = fread(v, 1, 65536, f);
    fclose(f);
    return v;
}

/* Open and read; the status, with its sentence checked. */
static kvf_status attempt(const char *bytes, size_t n, seen *s)
{
    char path[64];
    snprintf(path, sizeof path, "/tmp/kvfold-video-%d", (int)getpid());
    FILE *f = fopen(path, "wb");
    cr_assert(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
    video *v = NULL;
    kvf_error err = { 0 };
    int64_t k = 0;
    frame_request q = { .frames = 20 };
    video_outcome o = { 0 };
    *s = (seen){ 0 };
    kvf_status rc = video_open(&v, path, 1, &err);
    if (rc == KVF_OK) rc = video_choose(v, &q, &k, &err);
    if (rc == KVF_OK) rc = video_read(v, look, s, &o, &err);
    if (rc == KVF_OK) cr_assert(s->n > 0 && o.n_missing == k - s->n);
    if (rc != KVF_OK) cr_assert_gt(strlen(err.msg), 15);
    video_close(v);
    unlink(path);
    return rc;
}

Test(video, what_is_no_video_is_refused_with_a_sentence)
{
    WITH_VIDEO();
    seen s;
    char noise[4096];
    uint32_t x = 1;
    for (size_t i = 0; i < sizeof noise; i++) noise[i] = (char)((x = x * 1664525u + 1013904223u) >> 24);
    cr_expect_eq(attempt(noise, sizeof noise, &s), KVF_ERR_FORMAT);
    cr_expect_eq(attempt("", 0, &s), KVF_ERR_FORMAT);
    static const char text[] =
        "A letter is no clip, and a program that shows letters as pictures is not asked.\n";
    cr_expect_eq(attempt(text, sizeof text - 1, &s), KVF_ERR_FORMAT);
    static const char hls[] =
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n";
    cr_expect_eq(attempt(hls, sizeof hls - 1, &s), KVF_ERR_UNSUPPORTED);
    static const char list[] = "ffconcat version 1.0\nfile /etc/passwd\n";
    cr_expect_eq(attempt(list, sizeof list - 1, &s), KVF_ERR_UNSUPPORTED);
    video *v;
    kvf_error err = { 0 };
    cr_expect_eq(video_open(&v, DATA "sound.mka", 1, &err), KVF_ERR_FORMAT);
    cr_expect(strstr(err.msg, "sound"));
    cr_expect_eq(video_open(&v, "/nonexistent.mp4", 1, &err), KVF_ERR_IO);
    cr_expect_eq(video_open(&v, "/tmp", 1, &err), KVF_ERR_ARG);
    cr_expect_null(v);
}

Test(video, every_truncation_is_frames_or_an_error)
{
    WITH_VIDEO();
    static const char *const clips[] = { DATA "numbers.mp4", DATA "numbers.mkv", DATA "numbers.avi",
                                         DATA "numbers.h264" };
    for (size_t c = 0; c < 4; c++) {
        size_t n;
        char *v = slurp(clips[c], &n);
        seen s;
        int64_t n_read = 0;
        for (size_t cut = 1; cut < n; cut += 97) {
            kvf_status rc = attempt(v, cut, &s);
            cr_assert(rc == KVF_OK || rc == KVF_ERR_FORMAT, "%s cut at %zu: %d", clips[c], cut, rc);
            n_read += rc == KVF_OK;
            /* What comes before the cut is whole. */
            for (int64_t i = 0; rc == KVF_OK && i + 2 < s.n; i++) cr_assert_eq(s.code[i], s.number[i]);
        }
        cr_assert_gt(n_read, 5, "%s: nothing was read from a part", clips[c]);
        free(v);
    }
}

Test(video, flipped_bytes_never_crash)
{
    WITH_VIDEO();
    static const char *const clips[] = { DATA "numbers.mp4", DATA "numbers.mkv", DATA "numbers.avi",
                                         DATA "numbers.h264" };
    uint32_t x = 7;
    for (size_t c = 0; c < 4; c++) {
        size_t n;
        char *v = slurp(clips[c], &n), *w = malloc(n);
        for (int round = 0; round < 40; round++) {
            memcpy(w, v, n);
            for (int k = 0; k <= round % 8; k++) {
                x = x * 1664525u + 1013904223u;
                size_t at = (round % 2 ? x % n : x % 600) % n;
                w[at] = (char)(w[at] ^ (1 << (x >> 29)));
            }
            seen s;
            attempt(w, n, &s);
        }
        free(v);
        free(w);
    }
}

/* ---- Pictures ------------------------------------------------------------------------------ */

static uint8_t *picture(int w, int h, int64_t stride)
{
    uint8_t *v = calloc(1, (size_t)(stride * h));
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++) {
            uint8_t *p = v + y * stride + (int64_t)x * 3;
            p[0] = (uint8_t)(x * 37 % 256);
            p[1] = (uint8_t)((x * y * 11 + y) % 256);
            p[2] = (x / 3 + y / 2) % 2 ? 255 : 0;
        }
    return v;
}

Test(preprocess, resizing_equals_pillow_to_the_bit)
{
    static const struct {
        const char *name;
        int w, h;
        preprocess_filter filter;
        preprocess_fit fit;
    } cases[] = {
        { "stretch_bicubic_50x31_24", 50, 31, PREPROCESS_BICUBIC, PREPROCESS_STRETCH },
        { "stretch_bicubic_11x7_24", 11, 7, PREPROCESS_BICUBIC, PREPROCESS_STRETCH },
        { "stretch_bilinear_50x31_24", 50, 31, PREPROCESS_BILINEAR, PREPROCESS_STRETCH },
        { "crop_bicubic_61x40_24", 61, 40, PREPROCESS_BICUBIC, PREPROCESS_CROP },
        { "crop_bicubic_24x33_24", 24, 33, PREPROCESS_BICUBIC, PREPROCESS_CROP },
        { "stretch_bicubic_24x90_24", 24, 90, PREPROCESS_BICUBIC, PREPROCESS_STRETCH },
    };
    preprocessor p = { 0 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[256];
        snprintf(path, sizeof path, DATA "resized_%s.npy", cases[i].name);
        array_file f;
        array_info a;
        kvf_error err = { 0 };
        uint8_t want[24 * 24 * 3], got[24 * 24 * 3];
        cr_assert_eq(npy_open(&f, &a, path, &err), KVF_OK, "%s", err.msg);
        cr_assert_eq(array_read_raw(&f, &a, 0, (int64_t)sizeof want, want, &err), KVF_OK);
        array_file_close(&f);
        int64_t stride = cases[i].w * 3 + 5;
        uint8_t *rgb = picture(cases[i].w, cases[i].h, stride);
        preprocess_spec spec = { .size = 24, .filter = cases[i].filter, .fit = cases[i].fit };
        preprocess_picture in = { rgb, cases[i].w, cases[i].h, stride };
        cr_assert_eq(preprocess_resize(&p, &spec, &in, got, &err), KVF_OK, "%s", err.msg);
        cr_assert_arr_eq(got, want, sizeof want, "%s", cases[i].name);
        free(rgb);
    }
    preprocess_free(&p);
}

Test(preprocess, pixels_are_normalised_plane_by_plane)
{
    preprocess_spec s;
    uint8_t rgb[12] = { 0, 127, 255, 255, 0, 127, 10, 20, 30, 40, 50, 60 };
    float out[12];
    cr_assert(preprocess_named(&s, "clip", 2));
    cr_assert(!preprocess_named(&s, "nonsense", 2));
    preprocess_normalise(&s, rgb, out);
    for (int c = 0; c < 3; c++)
        for (int i = 0; i < 4; i++) {
            double want = (rgb[i * 3 + c] / 255.0 - (double)s.mean[c]) / (double)s.std[c];
            cr_assert_float_eq((double)out[c * 4 + i], want, 1e-5);
        }
    preprocessor p = { 0 };
    preprocess_picture bad = { rgb, 0, 2, 6 };
    cr_assert_eq(preprocess_resize(&p, &s, &bad, rgb, NULL), KVF_ERR_ARG);
    preprocess_free(&p);
}

Test(dct_features, still_frames_are_alike_and_a_cut_shows)
{
    enum { N = DCT_SIZE * DCT_SIZE * 3 };
    uint8_t *a = malloc(N), *b = malloc(N);
    uint32_t x = 3;
    for (int i = 0; i < N; i++) {
        int px = i / 3 % DCT_SIZE, py = i / 3 / DCT_SIZE;
        a[i] = (uint8_t)((px * 3 + py * 2 + i % 3 * 40 + px / 40 * 50) % 256);
        x = x * 1664525u + 1013904223u;
        b[i] = (uint8_t)((px * 7 + py / 30 * 60 + i % 3 * 90 + (int)(x >> 27)) % 256);
    }
    dct_features d = { 0 };
    const uint8_t *const frames[] = { a, a, b, b };
    for (int t = 0; t < 4; t++) cr_assert_eq(dct_features_add(&d, frames[t], NULL), KVF_OK);
    const size_t per_frame = (size_t)DCT_PATCHES * DCT_DIM;
    float *f = malloc(4 * per_frame * sizeof *f), *again = malloc(4 * per_frame * sizeof *f);
    cr_assert_eq(dct_features_make(&d, f, NULL), KVF_OK);
    cr_assert_eq(dct_features_make(&d, again, NULL), KVF_OK);
    cr_assert_arr_eq(f, again, 4 * per_frame * sizeof *f);
    cr_assert_arr_eq(f, f + per_frame, per_frame * sizeof *f, "equal frames differ");
    double mean = 0;
    for (size_t i = 0; i < DCT_PATCHES; i++) {
        double dot = 0, na = 0, nb = 0;
        for (size_t k = 0; k < DCT_DIM; k++) {
            double u = (double)f[per_frame + i * DCT_DIM + k], v = (double)f[2 * per_frame + i * DCT_DIM + k];
            cr_assert(isfinite(u) && isfinite(v));
            dot += u * v;
            na += u * u;
            nb += v * v;
        }
        mean += dot / sqrt(na * nb) / DCT_PATCHES;
    }
    cr_assert_lt(mean, 0.3, "mean cosine across a cut: %g", mean);
    /* One frame alone, and a frame without anything in it, are numbers too. */
    d.n = 1;
    cr_assert_eq(dct_features_make(&d, f, NULL), KVF_OK);
    for (size_t i = 0; i < per_frame; i++) cr_assert(isfinite(f[i]));
    d.n = 0;
    memset(a, 0, N);
    cr_assert_eq(dct_features_add(&d, a, NULL), KVF_OK);
    cr_assert_eq(dct_features_make(&d, f, NULL), KVF_OK);
    for (size_t i = 0; i < per_frame; i++) cr_assert(isfinite(f[i]));
    dct_features_free(&d);
    free(a);
    free(b);
    free(f);
    free(again);
}
