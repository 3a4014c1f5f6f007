/* video_encode.c - see video_encode.h.
 *
 * Frames go through one by one: only what the tower computes at once is held as pixels, so a clip's length
 * costs its tokens and nothing else.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "video_encode.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kvfold/vision.h>

#include "dct_features.h"
#include "report.h"

/* Frames handed to the tower together: enough to share the reading of weights among them. */
#define TOWER_FRAMES 4
/* Pixels of the long side of a thumbnail. */
#define THUMBNAIL 240
/* Frames when nobody says how many. */
#define DEFAULT_FRAMES 32

typedef struct encoder {
    video_tokens *t;
    kvf_ctx *ctx;
    const video_source_options *o;
    int64_t n; /* frames to come */
    progress bar;
    int32_t pass; /* of a stream of training-free features: 0 measures their scale, 1 makes them */
    /* training-free features */
    preprocess_spec spec;
    preprocessor resize;
    uint8_t *square; /* [spec.size]^2 RGB */
    dct_features dct;
    /* tower */
    kvf_vision *tower;
    kvf_vision_info info;
    int32_t pool;
    float *pixels; /* [TOWER_FRAMES][3][S][S] */
    float *embd, *attention; /* [TOWER_FRAMES][n_tok][dim], [TOWER_FRAMES][n_tok]: what a stream computes at once */
    int64_t n_waiting, n_encoded;
} encoder;

static kvf_status no_memory(const encoder *e, kvf_error *err)
{
    return report_fail(err, KVF_ERR_NOMEM,
                       "Not enough memory for the tokens of %lld frames; ask for fewer with --frames.",
                       (long long)e->n);
}

/* a * b * c elements of float; NULL also if that overflows. */
static float *get_floats(int64_t a, int64_t b, int64_t c)
{
    if (a < 1 || b < 1 || c < 1 || a > INT64_MAX / b || a * b > INT64_MAX / 8 / c) return NULL;
    return malloc((size_t)(a * b * c) * sizeof(float));
}

/* ---- The tower --------------------------------------------------------------------------- */

static int32_t pool_named(const char *name, const kvf_vision_info *info)
{
    if (strcmp(name, "none") == 0) return KVF_VISION_POOL_NONE;
    if (strcmp(name, "bilinear") == 0) return KVF_VISION_POOL_BILINEAR;
    if (strcmp(name, "average") == 0) return KVF_VISION_POOL_AVERAGE;
    if (strcmp(name, "max") == 0) return KVF_VISION_POOL_MAX;
    /* auto: LLaVA-OneVision, a SigLIP with a newline embedding, pools its frames. */
    return strcmp(info->family, "siglip") == 0 && info->has_newline ? KVF_VISION_POOL_BILINEAR
                                                                    : KVF_VISION_POOL_NONE;
}

/* What a cropping processor leaves of a picture. */
static void set_shown(encoder *e, double width, double height)
{
    if (e->info.resize != KVF_VISION_RESIZE_CROP) return;
    double side = width < height ? width : height;
    double share[4] = { (1 - side / width) / 2, (1 - side / height) / 2, side / width, side / height };
    memcpy(e->t->shown, share, sizeof share);
}

static kvf_status open_tower(encoder *e, kvf_ctx *ctx, kvf_error *err)
{
    kvf_vision_params p;
    kvf_vision_params_init(&p);
    kvf_status rc = kvf_vision_open(&e->tower, ctx, e->o->mmproj, &p, err);
    e->info.size = sizeof e->info;
    if (rc == KVF_OK) rc = kvf_vision_get_info(e->tower, &e->info, err);
    if (rc != KVF_OK) return rc;
    video_tokens *t = e->t;
    int32_t side = 0;
    e->pool = pool_named(e->o->pool, &e->info);
    t->n_tok = kvf_vision_tokens(e->tower, e->pool, &side);
    t->dim = e->info.n_out;
    if (e->o->width && e->o->width != t->dim)
        return report_fail(err, KVF_ERR_ARG,
                           "The tower in '%s' gives tokens of %lld numbers, and the model takes %lld; its projector "
                           "belongs to another model.", e->o->mmproj, (long long)t->dim, (long long)e->o->width);
    if (!t->grid_w) t->grid_w = side;
    if (t->n_tok < 1)
        return report_fail(err, KVF_ERR_ARG, "--pool %s leaves no token of this tower's grid.", e->o->pool);
    snprintf(t->from, sizeof t->from, "%.60s (%s), layer %d of %d",
             *e->info.name ? e->info.name : "vision tower", e->info.family, e->info.feature_layer,
             e->info.n_layer);
    int64_t pixels = (int64_t)e->info.image_size * e->info.image_size * 3;
    int64_t held = e->o->sink ? TOWER_FRAMES : e->n;
    float **embd = e->o->sink ? &e->embd : (float **)&t->data, **scores = e->o->sink ? &e->attention : &t->scores;
    *embd = get_floats(held, t->n_tok, t->dim);
    *scores = get_floats(held, t->n_tok, 1);
    t->newline = e->info.has_newline ? get_floats(t->dim, 1, 1) : NULL;
    e->pixels = get_floats(TOWER_FRAMES, pixels, 1);
    if (!*embd || !*scores || !e->pixels || (e->info.has_newline && !t->newline))
        return no_memory(e, err);
    if (t->newline) memcpy(t->newline, kvf_vision_newline(e->tower), (size_t)t->dim * sizeof *t->newline);
    progress_start(&e->bar, "Encoding", e->o->quiet);
    e->bar.unit = "layers";
    return KVF_OK;
}

static int on_layer(void *user, int64_t done, int64_t total)
{
    encoder *e = user;
    int64_t layers = e->info.feature_layer, part = total > 0 ? e->n_waiting * layers * done / total : 0;
    progress_update(&e->bar, e->n_encoded * layers + part, e->n * layers);
    return 0;
}

static kvf_status encode_waiting(encoder *e, kvf_error *err)
{
    if (!e->n_waiting) return KVF_OK;
    double begin = clock_s();
    video_tokens *t = e->t;
    kvf_vision_batch b;
    kvf_vision_batch_init(&b);
    b.pixels = e->pixels;
    b.n = e->n_waiting;
    b.pool = e->pool;
    b.embd = e->o->sink ? e->embd : (float *)t->data + e->n_encoded * t->n_tok * t->dim;
    b.scores = e->o->sink ? e->attention : t->scores + e->n_encoded * t->n_tok;
    b.progress = on_layer;
    b.user = e;
    kvf_status rc = kvf_vision_encode(e->tower, &b, err);
    if (rc != KVF_OK) return rc;
    t->encode_s += clock_s() - begin;
    for (int64_t i = 0; e->o->sink && i < e->n_waiting && rc == KVF_OK; i++)
        rc = video_source_send(t, e->o, e->embd + i * t->n_tok * t->dim, e->attention + i * t->n_tok, err);
    e->n_encoded += e->n_waiting;
    e->n_waiting = 0;
    return rc;
}

static kvf_status to_tower(encoder *e, const video_frame *f, kvf_error *err)
{
    double begin = clock_s();
    int64_t pixels = (int64_t)e->info.image_size * e->info.image_size * 3;
    kvf_vision_frame frame = { .rgb = f->rgb, .width = f->width, .height = f->height, .stride = f->stride };
    kvf_status rc = kvf_vision_prepare(e->tower, &frame, 1, KVF_VISION_RESIZE_MODEL,
                                       e->pixels + e->n_waiting * pixels, err);
    if (rc != KVF_OK) return rc;
    e->t->encode_s += clock_s() - begin;
    return ++e->n_waiting == TOWER_FRAMES ? encode_waiting(e, err) : KVF_OK;
}

static kvf_status on_frame(void *user, const video_frame *f, kvf_error *err);

/* ---- Training-free features ---------------------------------------------------------------- */

static kvf_status open_dct(encoder *e, kvf_error *err)
{
    preprocess_named(&e->spec, "siglip", DCT_SIZE);
    e->square = malloc((size_t)DCT_SIZE * DCT_SIZE * 3);
    snprintf(e->t->from, sizeof e->t->from, "dctctx: training-free, to measure redundancy only");
    progress_start(&e->bar, e->o->sink ? "Measuring" : "Reading", e->o->quiet);
    e->bar.unit = "frames";
    return e->square ? KVF_OK : no_memory(e, err);
}

/* The patches of the frame in e->square, pooled to its tokens. */
static kvf_status send_dct(encoder *e, kvf_error *err)
{
    kvf_merge_pool pool;
    kvf_merge_pool_init(&pool);
    pool.src = (kvf_merge_view){ .data = e->pixels, .n_frame = 1, .n_tok = DCT_PATCHES, .dim = DCT_DIM };
    pool.grid_w = DCT_GRID;
    pool.kind = KVF_MERGE_BILINEAR;
    pool.dst = e->embd;
    dct_features_frame(&e->dct, e->square, e->pixels);
    kvf_status rc = kvf_merge_pool_run(e->ctx, &pool, err);
    return rc == KVF_OK ? video_source_send(e->t, e->o, e->embd, NULL, err) : rc;
}

static kvf_status to_dct(encoder *e, const video_frame *f, kvf_error *err)
{
    preprocess_picture in = { f->rgb, f->width, f->height, f->stride };
    double begin = clock_s();
    kvf_status rc = preprocess_resize(&e->resize, &e->spec, &in, e->square, err);
    if (rc == KVF_OK && e->pass) rc = send_dct(e, err);
    if (rc == KVF_OK && !e->pass && e->o->sink) rc = dct_features_measure(&e->dct, e->square, err);
    if (rc == KVF_OK && !e->o->sink) rc = dct_features_add(&e->dct, e->square, err);
    e->t->encode_s += clock_s() - begin;
    progress_update(&e->bar, e->pass ? e->t->n_sent : e->dct.n, e->n);
    return rc;
}

/* The first pass of a stream is done: the clip is read again, and frames go out. */
static kvf_status again_dct(encoder *e, video *clip, video_outcome *outcome, kvf_error *err)
{
    video_tokens *t = e->t;
    int64_t side = (DCT_GRID + 1) / 2;
    t->n_tok = side * side;
    t->dim = DCT_DIM;
    if (!t->grid_w) t->grid_w = side;
    e->pixels = get_floats(DCT_PATCHES, DCT_DIM, 1);
    e->embd = get_floats(t->n_tok, DCT_DIM, 1);
    if (!e->pixels || !e->embd) return no_memory(e, err);
    dct_features_ready(&e->dct);
    kvf_status rc = video_source_begin(t, e->o, err);
    if (rc != KVF_OK) return rc;
    e->pass = 1;
    t->outcome.n_frames = 0;
    progress_clear(&e->bar);
    progress_start(&e->bar, "Merging", e->o->quiet);
    e->bar.unit = "frames";
    return video_read(clip, on_frame, e, outcome, err);
}

/* All patches, then pooled to the tokens. */
static kvf_status finish_dct(encoder *e, kvf_ctx *ctx, kvf_error *err)
{
    video_tokens *t = e->t;
    double begin = clock_s();
    float *patches = get_floats(t->n_frame, DCT_PATCHES, DCT_DIM);
    kvf_status rc = patches ? dct_features_make(&e->dct, patches, err) : no_memory(e, err);
    kvf_merge_pool pool;
    kvf_merge_pool_init(&pool);
    pool.src =
        (kvf_merge_view){ .data = patches, .n_frame = t->n_frame, .n_tok = DCT_PATCHES, .dim = DCT_DIM };
    pool.grid_w = DCT_GRID;
    pool.kind = KVF_MERGE_BILINEAR;
    if (rc == KVF_OK) rc = kvf_merge_pool_run(ctx, &pool, err); /* asks for the shape */
    t->n_tok = pool.out_h * pool.out_w;
    t->dim = DCT_DIM;
    if (!t->grid_w) t->grid_w = pool.out_w;
    if (rc == KVF_OK) pool.dst = t->data = get_floats(t->n_frame, t->n_tok, t->dim);
    if (rc == KVF_OK && !t->data) rc = no_memory(e, err);
    if (rc == KVF_OK) rc = kvf_merge_pool_run(ctx, &pool, err);
    free(patches);
    t->encode_s += clock_s() - begin;
    return rc;
}

/* ---- The clip ------------------------------------------------------------------------------ */

static kvf_status on_frame(void *user, const video_frame *f, kvf_error *err)
{
    encoder *e = user;
    video_tokens *t = e->t;
    int64_t i = t->outcome.n_frames++;
    t->time[i] = f->time;
    t->number[i] = f->number;
    if (i == 0) set_shown(e, f->width, f->height);
    if (t->thumbnail && !t->thumbnail[i].n) video_jpeg(&t->thumbnail[i], f, THUMBNAIL); /* without one the frame is drawn grey */
    return e->o->mmproj ? to_tower(e, f, err) : e->o->from ? to_dct(e, f, err) : KVF_OK;
}

/* Features from a file belong to frames: as many as are asked for, or as there are. */
static kvf_status choose(encoder *e, video *clip, kvf_error *err)
{
    const video_source_options *o = e->o;
    frame_request q = { .frames = o->frames, .fps = o->fps, .start = o->start, .end = o->end };
    bool open = !q.frames && !(q.fps > 0);
    if (open) q.frames = o->features ? e->t->n_frame : DEFAULT_FRAMES;
    kvf_status rc = video_choose(clip, &q, &e->n, err);
    if (rc == KVF_OK && o->features && e->n != e->t->n_frame)
        rc = report_fail(err, KVF_ERR_ARG,
                         "'%s' holds features of %lld frames, and %lld of the clip are chosen; choose as "
                         "they were chosen then.",
                         o->features, (long long)e->t->n_frame, (long long)e->n);
    return rc;
}

static kvf_status read_clip(encoder *e, kvf_ctx *ctx, video *clip, kvf_error *err)
{
    video_tokens *t = e->t;
    t->is_clip = true;
    t->clip = *video_get_info(clip);
    kvf_status rc = choose(e, clip, err);
    if (rc != KVF_OK) return rc;
    t->time = malloc((size_t)e->n * sizeof *t->time);
    t->number = malloc((size_t)e->n * sizeof *t->number);
    t->thumbnail = e->o->thumbnails ? calloc((size_t)e->n, sizeof *t->thumbnail) : NULL;
    if (!t->time || !t->number || (e->o->thumbnails && !t->thumbnail)) return no_memory(e, err);
    int64_t held = t->n_frame; /* of features from a file */
    t->n_frame = e->n;         /* as many thumbnails are to be freed if reading fails */
    if (e->o->mmproj) rc = open_tower(e, ctx, err);
    if (rc == KVF_OK && e->o->mmproj && e->o->sink) rc = video_source_begin(t, e->o, err);
    if (e->o->from) rc = open_dct(e, err);
    if (rc != KVF_OK) return rc;
    double begin = clock_s();
    video_outcome outcome;
    rc = video_read(clip, on_frame, e, &outcome, err);
    if (rc == KVF_OK && e->o->mmproj) rc = encode_waiting(e, err);
    if (rc == KVF_OK && e->o->from && e->o->sink) rc = again_dct(e, clip, &outcome, err);
    t->outcome = outcome;
    t->decode_s = clock_s() - begin - t->encode_s;
    if (rc != KVF_OK) return rc;
    if (e->o->features && outcome.n_frames != held)
        return report_fail(err, KVF_ERR_FORMAT,
                           "%lld frames of '%s' can be decoded, and '%s' has features of %lld.",
                           (long long)outcome.n_frames, e->o->clip, e->o->features, (long long)held);
    t->n_frame = outcome.n_frames;
    return e->o->from && !e->o->sink ? finish_dct(e, ctx, err) : KVF_OK;
}

kvf_status video_encode(video_tokens *t, kvf_ctx *ctx, const video_source_options *o, kvf_error *err)
{
    encoder e = { .t = t, .o = o, .ctx = ctx };
    video *clip = NULL;
    kvf_status rc = video_open(&clip, o->clip, kvf_ctx_threads(ctx), err);
    if (rc == KVF_OK) rc = read_clip(&e, ctx, clip, err);
    progress_clear(&e.bar);
    video_close(clip);
    kvf_vision_close(e.tower);
    preprocess_free(&e.resize);
    dct_features_free(&e.dct);
    free(e.square);
    free(e.pixels);
    free(e.embd);
    free(e.attention);
    return rc;
}
