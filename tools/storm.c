/* storm.c - see storm.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "storm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"
#include "safetensors.h"

enum { PATH_BYTES = 4096, MOST_TENSORS = 18 * 1024 };

/* ---- The spec ----------------------------------------------------------------------------- */

/* A '+' before a letter starts the next method. */
static size_t stage_length(const char *spec)
{
    size_t n = 0;
    while (spec[n] && !(spec[n] == '+' && spec[n + 1] >= 'a' && spec[n + 1] <= 'z')) n++;
    return n;
}

static kvf_status parse_eps(const char *text, size_t n, float *eps, kvf_error *err)
{
    char copy[32], *end = copy;
    if (n && n < sizeof copy) {
        memcpy(copy, text, n);
        copy[n] = 0;
        double v = strtod(copy, &end);
        *eps = (float)v;
        if (end == copy + n && v > 0 && v < 1) return KVF_OK;
    }
    return report_fail(err, KVF_ERR_ARG, "storm: eps is '%.*s'; it is a number above 0 and below 1.", n > 24 ? 24 : (int)n, text);
}

static kvf_status parse(const char *text, size_t n, char path[PATH_BYTES], float *eps, kvf_error *err)
{
    path[0] = 0;
    while (n) {
        const char *comma = memchr(text, ',', n);
        size_t len = comma ? (size_t)(comma - text) : n;
        if (len > 8 && memcmp(text, "weights=", 8) == 0 && len - 8 < PATH_BYTES) {
            memcpy(path, text + 8, len - 8);
            path[len - 8] = 0;
        } else if (len > 4 && memcmp(text, "eps=", 4) == 0) {
            kvf_status rc = parse_eps(text + 4, len - 4, eps, err);
            if (rc != KVF_OK) return rc;
        } else {
            return report_fail(err, KVF_ERR_ARG,
                               "storm has no option '%.*s'; there are weights=FILE (a name without ',' and '+') and "
                               "eps=NUMBER.",
                               len > 64 ? 64 : (int)len, text);
        }
        n -= comma ? len + 1 : len;
        text += comma ? len + 1 : len;
    }
    if (path[0]) return KVF_OK;
    return report_fail(err, KVF_ERR_ARG,
                       "storm needs weights=FILE, .safetensors or .gguf; STORM's own weights are not published.");
}

/* ---- Weights ------------------------------------------------------------------------------ */

static kvf_status read_tensor(const array_file *f, const tensor_entry *e, kvf_mamba_tensor *t, float **data,
                              kvf_error *err)
{
    char shape[128];
    const array_info *a = &e->info;
    if (a->type != ARRAY_F32 && a->type != ARRAY_F16 && a->type != ARRAY_BF16)
        return report_fail(err, KVF_ERR_UNSUPPORTED, "'%s': tensor '%.64s' is %s; weights are f32, f16 or bf16.",
                           f->path, e->name, array_describe(shape, a));
    if (a->n_dim < 1 || a->n_dim > 4 || a->n < 1)
        return report_fail(err, KVF_ERR_FORMAT, "'%s': tensor '%.64s' is %s; a weight has 1 to 4 dimensions and is not empty.",
                           f->path, e->name, array_describe(shape, a));
    *t = (kvf_mamba_tensor){ .name = e->name, .n_dim = (int32_t)a->n_dim };
    for (int i = 0; i < a->n_dim; i++) t->shape[i] = a->shape[i];
    *data = (size_t)a->n <= SIZE_MAX / sizeof **data ? malloc((size_t)a->n * sizeof **data) : NULL;
    t->data = *data;
    if (!*data) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for '%s'.", f->path);
    return array_read_f32(f, a, 0, a->n, *data, err);
}

static kvf_status open_safetensors(kvf_mamba **out, kvf_ctx *ctx, const char *path, float eps, kvf_error *err)
{
    array_file f;
    safetensors s;
    kvf_status rc = safetensors_open(&f, &s, path, err);
    if (rc != KVF_OK) return rc;
    size_t n = s.n_tensors;
    kvf_mamba_tensor *t = NULL;
    float **data = NULL;
    if (n < 1 || n > MOST_TENSORS) {
        rc = report_fail(err, KVF_ERR_FORMAT, "'%s' has %zu tensors; Mamba layers have 9 to 18 each.", path, n);
    } else {
        t = calloc(n, sizeof *t);
        data = calloc(n, sizeof *data);
        if (!t || !data) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for '%s'.", path);
    }
    for (size_t i = 0; i < n && rc == KVF_OK; i++) rc = read_tensor(&f, &s.tensors[i], &t[i], &data[i], err);
    if (rc == KVF_OK) rc = kvf_mamba_open_tensors(out, ctx, t, (int64_t)n, eps, err);
    for (size_t i = 0; data && i < n; i++) free(data[i]);
    free(data);
    free(t);
    safetensors_free(&s);
    array_file_close(&f);
    return rc;
}

static bool is_gguf(const char *path)
{
    char head[4] = { 0 };
    FILE *f = fopen(path, "rb");
    size_t n = f ? fread(head, 1, sizeof head, f) : 0;
    if (f) fclose(f);
    return n == sizeof head && memcmp(head, "GGUF", 4) == 0;
}

kvf_status storm_open(storm *s, kvf_ctx *ctx, const char *spec, kvf_error *err)
{
    *s = (storm){ .rest = spec, .info = { .size = sizeof s->info } };
    size_t n = stage_length(spec);
    if (strncmp(spec, "storm", 5) != 0 || (n > 5 && spec[5] != ':')) return KVF_OK;
    char *path = malloc(PATH_BYTES);
    float eps = 0;
    if (!path) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for a file name.");
    size_t skip = n > 5 ? 6 : 5;
    kvf_status rc = parse(spec + skip, n - skip, path, &eps, err);
    if (rc == KVF_OK)
        rc = is_gguf(path) ? kvf_mamba_open_gguf(&s->layers, ctx, path, eps, err)
                           : open_safetensors(&s->layers, ctx, path, eps, err);
    if (rc == KVF_OK) rc = kvf_mamba_get_info(s->layers, &s->info, err);
    free(path);
    s->rest = spec[n] ? spec + n + 1 : STORM_PLANNER;
    if (rc != KVF_OK) storm_close(s);
    return rc;
}

void storm_close(storm *s)
{
    kvf_mamba_close(s->layers);
    *s = (storm){ 0 };
}

/* ---- Tokens ------------------------------------------------------------------------------- */

kvf_status storm_check(const storm *s, video_tokens *t, kvf_error *err)
{
    if (!s->layers) return KVF_OK;
    if (s->info.d_model != t->dim)
        return report_fail(err, KVF_ERR_ARG, "storm: the layers are %d wide and the tokens have %lld numbers.",
                           (int)s->info.d_model, (long long)t->dim);
    snprintf(t->storm, sizeof t->storm, "%lld Mamba layers, %d wide, %d inner, %d states, %s", (long long)s->info.n_layer,
             (int)s->info.d_model, (int)s->info.d_inner, (int)s->info.d_state,
             s->info.backward ? "both directions" : "one direction");
    return KVF_OK;
}

kvf_status storm_run(storm *s, video_tokens *t, kvf_error *err)
{
    kvf_status rc = storm_check(s, t, err);
    if (rc != KVF_OK || !s->layers) return rc;
    int64_t n = t->n_frame * t->n_tok * t->dim;
    if (t->type != KVF_MERGE_F32) {
        float *wide = (size_t)n <= SIZE_MAX / sizeof *wide ? malloc((size_t)n * sizeof *wide) : NULL;
        if (!wide) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the tokens in f32.");
        video_tokens_widen(wide, t->data, t->type, n);
        free(t->data);
        t->data = wide;
        t->type = KVF_MERGE_F32;
    }
    return kvf_mamba_run(s->layers, t->data, t->n_frame * t->n_tok, err);
}
