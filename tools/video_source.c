/* video_source.c - see video_source.h; tokens from files, and what all sources share.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "video_source.h"

#include <stdio.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "npy.h"
#include "report.h"
#include "safetensors.h"
#include "video_encode.h"

/* ---- Arrays from .npy or .safetensors --------------------------------------------------- */

typedef struct source_file {
    array_file file;
    array_info info; /* of the tensor that was asked for */
    safetensors tensors;
} source_file;

static void source_close(source_file *s)
{
    array_file_close(&s->file);
    safetensors_free(&s->tensors);
}

static bool is_npy(const char *path)
{
    char head[6] = { 0 };
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(head, 1, sizeof head, f) : 0;
    if (f) fclose(f);
    return n == sizeof head && memcmp(head, "\x93NUMPY", sizeof head) == 0;
}

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* The array `name` of a safetensors file, or its only one with n_dim dimensions; a .npy file has one anyway.
 */
static kvf_status source_open(source_file *s, const char *path, const char *name, int n_dim, kvf_error *err)
{
    *s = (source_file){ .file = { .fd = -1 } };
    if (is_npy(path) || !ends_with(path, ".safetensors")) return npy_open(&s->file, &s->info, path, err);
    kvf_status rc = safetensors_open(&s->file, &s->tensors, path, err);
    if (rc != KVF_OK) return rc;
    const array_info *found = safetensors_find(&s->tensors, name);
    int n = 0;
    for (size_t i = 0; i < s->tensors.n_tensors && !found; i++)
        n += s->tensors.tensors[i].info.n_dim == n_dim;
    for (size_t i = 0; i < s->tensors.n_tensors && !found; i++)
        if (n == 1 && s->tensors.tensors[i].info.n_dim == n_dim) found = &s->tensors.tensors[i].info;
    if (found) {
        s->info = *found;
        return KVF_OK;
    }
    source_close(s);
    return report_fail(err, KVF_ERR_ARG, "'%s' has no tensor '%s', and not exactly one with %d dimensions.",
                       path, name, n_dim);
}

static kvf_status no_memory(const char *what, kvf_error *err)
{
    return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for %s.", what);
}

/* The file of features, its shape checked; *t gets it. */
static kvf_status open_features(source_file *s, video_tokens *t, const char *path, kvf_error *err)
{
    char shape[128];
    kvf_status rc = source_open(s, path, "features", 3, err);
    if (rc != KVF_OK) return rc;
    const array_info *a = &s->info;
    if (a->n_dim != 3 || a->n == 0)
        rc = report_fail(
            err, KVF_ERR_ARG,
            "'%s' is %s; features are [frames, tokens of a frame, numbers of a token], at least one each.",
            path, array_describe(shape, a));
    else if (a->shape[0] > INT32_MAX / a->shape[1])
        rc = report_fail(err, KVF_ERR_LIMIT, "'%s' is %s: more than 2^31 tokens.", path,
                         array_describe(shape, a));
    if (rc != KVF_OK) {
        source_close(s);
        return rc;
    }
    t->type = a->type == ARRAY_F16    ? KVF_MERGE_F16
              : a->type == ARRAY_BF16 ? KVF_MERGE_BF16
                                      : KVF_MERGE_F32;
    t->n_frame = a->shape[0];
    t->n_tok = a->shape[1];
    t->dim = a->shape[2];
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    snprintf(t->from, sizeof t->from, "%.100s, %s", name, array_type_name(a->type));
    return KVF_OK;
}

/* Elements [first, first + n): of 16 bits as they are, everything else as float. */
static kvf_status read_elements(const source_file *s, const video_tokens *t, int64_t first, int64_t n, void *out,
                                kvf_error *err)
{
    return t->type == KVF_MERGE_F32 ? array_read_f32(&s->file, &s->info, first, n, out, err)
                                    : array_read_raw(&s->file, &s->info, first, n, out, err);
}

static kvf_status read_features(video_tokens *t, const video_source_options *o, kvf_error *err)
{
    source_file s;
    kvf_status rc = open_features(&s, t, o->features, err);
    if (rc != KVF_OK) return rc;
    size_t width = kvf_merge_type_bytes(t->type);
    if (!o->sink) { /* a stream reads frame by frame, when everything else is there */
        t->data = (size_t)s.info.n <= SIZE_MAX / width ? malloc((size_t)s.info.n * width) : NULL;
        rc = t->data ? read_elements(&s, t, 0, s.info.n, t->data, err) : no_memory(o->features, err);
    }
    source_close(&s);
    return rc;
}

static kvf_status send_features(video_tokens *t, const video_source_options *o, kvf_error *err)
{
    source_file s;
    kvf_status rc = video_source_begin(t, o, err);
    if (rc == KVF_OK) rc = open_features(&s, t, o->features, err);
    if (rc != KVF_OK) return rc;
    int64_t n = t->n_tok * t->dim;
    void *frame = malloc((size_t)n * kvf_merge_type_bytes(t->type));
    progress bar;
    progress_start(&bar, "Merging", o->quiet);
    bar.unit = "frames";
    if (!frame) rc = no_memory("a frame", err);
    for (int64_t i = 0; i < t->n_frame && rc == KVF_OK; i++) {
        rc = read_elements(&s, t, i * n, n, frame, err);
        if (rc == KVF_OK) rc = video_source_send(t, o, frame, NULL, err);
        progress_update(&bar, i + 1, t->n_frame);
    }
    progress_clear(&bar);
    free(frame);
    source_close(&s);
    return rc;
}

/* An array that must have the n elements of shape [d0][d1] (d1 0: of [d0]), as float. */
static kvf_status read_floats(float **out, const char *path, const char *name, const int64_t shape[2],
                              kvf_error *err)
{
    source_file s;
    char have[128];
    int n_dim = shape[1] ? 2 : 1;
    kvf_status rc = source_open(&s, path, name, n_dim, err);
    if (rc != KVF_OK) return rc;
    const array_info *a = &s.info;
    bool fits = a->n_dim == n_dim && a->shape[0] == shape[0] && (n_dim == 1 || a->shape[1] == shape[1]);
    if (!fits && n_dim == 2)
        rc = report_fail(err, KVF_ERR_ARG, "'%s' is %s; %s for these features are [%lld, %lld].", path,
                         array_describe(have, a), name, (long long)shape[0], (long long)shape[1]);
    else if (!fits)
        rc = report_fail(err, KVF_ERR_ARG, "'%s' is %s; a %s for these features is [%lld].", path,
                         array_describe(have, a), name, (long long)shape[0]);
    float *v = rc == KVF_OK ? malloc((size_t)a->n * sizeof *v) : NULL;
    if (rc == KVF_OK && !v) rc = no_memory(path, err);
    if (rc == KVF_OK) rc = array_read_f32(&s.file, a, 0, a->n, v, err);
    source_close(&s);
    if (rc != KVF_OK) {
        free(v);
        return rc;
    }
    free(*out);
    *out = v;
    return KVF_OK;
}

/* ---- All together ----------------------------------------------------------------------- */

static kvf_status check(const video_source_options *o, kvf_error *err)
{
    int n = (o->mmproj != NULL) + (o->from != NULL) + (o->features != NULL);
    if (n == 0 && o->clip)
        return report_fail(err, KVF_ERR_ARG,
                           "Say where tokens come from: --mmproj FILE (a vision tower), --features FILE "
                           "(computed elsewhere), or --features-from dctctx (to measure redundancy only).");
    if (n == 0) return report_fail(err, KVF_ERR_ARG, "Name a clip, or give --features.");
    if (n > 1)
        return report_fail(err, KVF_ERR_ARG,
                           "--mmproj, --features and --features-from exclude each other: tokens come from "
                           "one place.");
    if (!o->clip && !o->features)
        return report_fail(err, KVF_ERR_ARG, "There is no clip; name a video file.");
    if (o->frames && o->fps > 0)
        return report_fail(err, KVF_ERR_ARG,
                           "Give --frames or --fps: a number of frames or how many a second.");
    if (!o->clip && (o->frames || o->fps > 0 || o->start > 0 || o->end > 0))
        return report_fail(err, KVF_ERR_ARG,
                           "--frames, --fps, --start and --end choose frames of a clip; there is none.");
    return KVF_OK;
}

kvf_status video_source_begin(video_tokens *t, const video_source_options *o, kvf_error *err)
{
    kvf_status rc = KVF_OK;
    if (t->n_frame && o->grid && t->n_tok % o->grid)
        rc = report_fail(err, KVF_ERR_ARG, "--grid %lld does not divide the %lld tokens of a frame.",
                         (long long)o->grid, (long long)t->n_tok);
    if (rc == KVF_OK && o->scores)
        rc = read_floats(&t->scores, o->scores, "scores", (int64_t[2]){ t->n_frame, t->n_tok }, err);
    if (rc == KVF_OK && o->newline)
        rc = read_floats(&t->newline, o->newline, "newline", (int64_t[2]){ t->dim, 0 }, err);
    return rc;
}

kvf_status video_source_send(video_tokens *t, const video_source_options *o, const void *frame, const float *tower,
                             kvf_error *err)
{
    const float *scores = t->scores ? t->scores + t->n_sent * t->n_tok : tower;
    kvf_status rc = o->sink(o->user, t, frame, scores, err);
    if (rc == KVF_OK) t->n_sent++;
    return rc;
}

kvf_status video_source_read(video_tokens *out, kvf_ctx *ctx, const video_source_options *o, kvf_error *err)
{
    *out = (video_tokens){ .grid_w = o->grid, .shown = { 0, 0, 1, 1 } };
    kvf_status rc = check(o, err);
    if (rc == KVF_OK && o->features) rc = read_features(out, o, err);
    if (rc == KVF_OK && o->clip) rc = video_encode(out, ctx, o, err);
    if (rc == KVF_OK && !o->sink) rc = video_source_begin(out, o, err);
    if (rc == KVF_OK && o->sink && o->features) rc = send_features(out, o, err);
    if (rc == KVF_OK && o->sink && o->scores && out->n_sent != out->n_frame)
        rc = report_fail(err, KVF_ERR_FORMAT,
                         "%lld frames can be decoded, and '%s' has scores of more.", (long long)out->n_sent, o->scores);
    if (rc != KVF_OK) video_tokens_free(out);
    return rc;
}

void video_tokens_widen(float *out, const void *data, kvf_merge_type type, int64_t n)
{
    const uint16_t *half = data;
    if (type == KVF_MERGE_F32)
        memcpy(out, data, (size_t)n * sizeof *out);
    else
        for (int64_t i = 0; i < n; i++) out[i] = type == KVF_MERGE_F16 ? array_f16(half[i]) : array_bf16(half[i]);
}

void video_tokens_free(video_tokens *t)
{
    for (int64_t i = 0; t->thumbnail && i < t->n_frame; i++) buffer_free(&t->thumbnail[i]);
    free(t->thumbnail);
    free(t->data);
    free(t->scores);
    free(t->newline);
    free(t->time);
    free(t->number);
    *t = (video_tokens){ 0 };
}

void video_tokens_note(const video_tokens *t, int64_t frames)
{
    /* Sound may go on a little after the last picture. */
    double said = t->clip.seconds_said, shown = t->clip.seconds;
    if (t->is_clip && t->clip.damaged)
        report_note("the clip is cut off or damaged; what can be read is used");
    else if (t->is_clip && said > shown * 1.1 + 1)
        report_note("the clip says it lasts %.1f s, and its pictures end after %.1f s; is it whole?", said,
                    shown);
    if (t->outcome.n_missing)
        report_note("%" PRId64 " of the chosen frames cannot be decoded; %" PRId64 " are left",
                    t->outcome.n_missing, t->outcome.n_frames);
    if (t->outcome.n_damaged)
        report_note("%" PRId64 " frames are damaged and were patched up by the decoder",
                    t->outcome.n_damaged);
    if (t->is_clip && frames > t->n_frame && !t->outcome.n_missing)
        report_note("the clip has no more than %" PRId64 " frames there; all of them are used", t->n_frame);
}

kvf_merge_view video_tokens_view(const video_tokens *t)
{
    return (kvf_merge_view){
        .data = t->data, .type = t->type, .n_frame = t->n_frame, .n_tok = t->n_tok, .dim = t->dim
    };
}
