/* video_output.c - see video_output.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "video_output.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "interrupt.h"
#include "npy.h"
#include "report.h"
#include "safetensors.h"

enum { N_TEXTS = 16, N_TENSORS = 6 };

static kvf_status positions(const kvf_merge_plan *plan, bool keep, int32_t planes, int32_t *out,
                            kvf_error *err)
{
    kvf_merge_positions q;
    kvf_merge_positions_init(&q);
    q.mode = keep ? KVF_MERGE_KEEP : KVF_MERGE_COMPACT;
    q.planes = planes;
    q.out = out;
    return kvf_merge_plan_positions(plan, &q, err);
}

/* The newline in the features' type, which the plan is applied in. */
static uint16_t *narrowed(const video_tokens *t)
{
    uint16_t *v = malloc((size_t)t->dim * sizeof *v);
    for (int64_t i = 0; v && i < t->dim; i++)
        v[i] = t->type == KVF_MERGE_F16 ? array_to_f16(t->newline[i]) : array_to_bf16(t->newline[i]);
    return v;
}

kvf_status video_result_make(video_result *r, const kvf_merge_plan *plan, const video_tokens *t,
                             kvf_merge_type type, bool keep, kvf_error *err)
{
    *r = (video_result){
        .plan = plan, .type = type, .dim = t->dim, .keep = keep, .info = { .size = sizeof r->info }
    };
    kvf_status rc = kvf_merge_plan_get_info(plan, &r->info, err);
    if (rc != KVF_OK) return rc;
    if (r->info.n_newline && !t->newline)
        return report_fail(err, KVF_ERR_ARG,
                           "The plan has newlines, and there is no embedding for them: give --newline "
                           "FILE, or newline=none in --merge.");
    size_t n = (size_t)r->info.n_out, width = (size_t)t->dim * kvf_merge_type_bytes(type);
    r->embd = n && width <= SIZE_MAX / n ? malloc(n * width) : NULL;
    r->position = malloc(n * sizeof *r->position);
    r->mrope = malloc(n * 3 * sizeof *r->mrope);
    if (!r->embd || !r->position || !r->mrope)
        rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for %zu tokens.", n);
    kvf_merge_apply a;
    kvf_merge_apply_init(&a);
    a.src = video_tokens_view(t);
    a.newline = t->newline;
    a.dst = r->embd;
    a.dst_type = type;
    uint16_t *narrow = NULL;
    if (rc == KVF_OK && r->info.n_newline && t->type != KVF_MERGE_F32) {
        a.newline = narrow = narrowed(t);
        if (!narrow) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for a newline.");
    }
    if (rc == KVF_OK) rc = kvf_merge_plan_apply(plan, &a, err);
    free(narrow);
    if (rc == KVF_OK) rc = positions(plan, keep, 1, r->position, err);
    if (rc == KVF_OK) rc = positions(plan, keep, 3, r->mrope, err);
    if (rc != KVF_OK) video_result_free(r);
    return rc;
}

void video_result_free(video_result *r)
{
    free(r->embd);
    free(r->position);
    free(r->mrope);
    *r = (video_result){ 0 };
}

/* ---- Writing --------------------------------------------------------------------------- */

/* The metadata: pairs of text, values formatted into one line each. */
typedef struct facts {
    tensor_text v[N_TEXTS];
    char value[N_TEXTS][1088];
    size_t n;
} facts;

__attribute__((format(printf, 3, 4))) static void fact(facts *f, const char *key, const char *format, ...)
{
    if (f->n == N_TEXTS) return;
    va_list args;
    va_start(args, format);
    vsnprintf(f->value[f->n], sizeof f->value[f->n], format, args);
    va_end(args);
    /* The writer only reads them. */
    f->v[f->n] = (tensor_text){ .key = (char *)(uintptr_t)key, .value = f->value[f->n] };
    f->n++;
}

static void list_facts(facts *f, const video_result *r, const video_tokens *t, const char *clip)
{
    const kvf_merge_plan_info *p = &r->info;
    f->n = 0;
    fact(f, "format", "kvfold video 1");
    fact(f, "kvfold", "%s", kvf_version_string());
    if (clip) fact(f, "clip", "%s", clip);
    fact(f, "features", "%s", t->from);
    fact(f, "spec", "%s", p->spec);
    fact(f, "scores", "%s", p->scores);
    fact(f, "frames", "%" PRId64, p->n_frame);
    fact(f, "tokens_per_frame", "%" PRId64, p->n_tok);
    fact(f, "grid_width", "%" PRId64, p->grid_w);
    fact(f, "tokens_in", "%" PRId64, p->n_frame * p->n_tok);
    fact(f, "tokens_out", "%" PRId64, p->n_out);
    fact(f, "merged_copied_newline", "%" PRId64 " %" PRId64 " %" PRId64, p->n_merged, p->n_copied,
         p->n_newline);
    fact(f, "total_reduced", "%" PRId64, p->total_reduced);
    fact(f, "retain_eff", "%.17g", p->retain_eff);
    fact(f, "positions", "%s", r->keep ? "keep" : "compact");
}

static array_type array_type_of(kvf_merge_type t)
{
    return t == KVF_MERGE_F16 ? ARRAY_F16 : t == KVF_MERGE_BF16 ? ARRAY_BF16 : ARRAY_F32;
}

typedef struct part {
    const char *name;
    array_info info;
    const void *data;
} part;

static kvf_status write_parts(const char *path, const part *parts, size_t n, facts *f, kvf_error *err)
{
    tensor_entry entries[N_TENSORS];
    for (size_t i = 0; i < n; i++)
        entries[i] = (tensor_entry){ .name = (char *)(uintptr_t)parts[i].name, .info = parts[i].info };
    safetensors s = { .tensors = entries, .n_tensors = n, .texts = f->v, .n_texts = f->n };
    outfile o;
    kvf_status rc = safetensors_begin(&o, path, &s, err);
    if (rc != KVF_OK) return rc;
    interrupt_remove(o.partial);
    for (size_t i = 0; i < n; i++)
        outfile_write(&o, parts[i].data, (size_t)parts[i].info.n * array_type_bytes(parts[i].info.type));
    rc = outfile_commit(&o, err);
    interrupt_remove(NULL);
    return rc;
}

static kvf_status write_npy(const char *path, const array_info *info, const void *data, kvf_error *err)
{
    outfile o;
    kvf_status rc = npy_begin(&o, path, info, err);
    if (rc != KVF_OK) return rc;
    interrupt_remove(o.partial);
    outfile_write(&o, data, (size_t)info->n * array_type_bytes(info->type));
    rc = outfile_commit(&o, err);
    interrupt_remove(NULL);
    return rc;
}

/* NumPy has no bfloat16: those go out as float. */
static kvf_status write_tokens(const char *path, const video_result *r, const array_info *info,
                               kvf_error *err)
{
    if (r->type != KVF_MERGE_BF16) return write_npy(path, info, r->embd, err);
    array_info wide = *info;
    wide.type = ARRAY_F32;
    float *v = malloc((size_t)info->n * sizeof *v);
    if (!v) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory to write '%s'.", path);
    const uint16_t *from = r->embd;
    for (int64_t i = 0; i < info->n; i++) v[i] = array_bf16(from[i]);
    kvf_status rc = write_npy(path, &wide, v, err);
    free(v);
    return rc;
}

static array_info shaped(array_type type, int64_t rows, int64_t columns)
{
    array_info a = { .type = type, .n_dim = columns ? 2 : 1, .shape = { rows, columns } };
    array_set_count(&a); /* what is in memory can be counted */
    return a;
}

kvf_status video_result_write(const video_result *r, const video_tokens *t, const char *out, const char *clip,
                              kvf_error *err)
{
    const kvf_merge_plan_info *p = &r->info;
    float *time = t->time ? malloc((size_t)t->n_frame * sizeof *time) : NULL;
    facts *f = malloc(sizeof *f);
    buffer path = { 0 };
    kvf_status rc = f && (time || !t->time)
                        ? KVF_OK
                        : report_fail(err, KVF_ERR_NOMEM, "Not enough memory to write '%s'.", out);
    for (int64_t i = 0; time && i < t->n_frame; i++) time[i] = (float)t->time[i];
    part parts[N_TENSORS] = {
        { "embeddings", shaped(array_type_of(r->type), p->n_out, r->dim), r->embd },
        { "position", shaped(ARRAY_I32, p->n_out, 0), r->position },
        { "mrope", shaped(ARRAY_I32, 3, p->n_out), r->mrope },
        { "meta", shaped(ARRAY_I32, p->n_out, 4), p->meta },
        { "segments", shaped(ARRAY_I32, p->n_segment, 6), p->segment },
        { "time", shaped(ARRAY_F32, t->n_frame, 0), time },
    };
    if (rc == KVF_OK) {
        list_facts(f, r, t, clip);
        buffer_printf(&path, "%s.safetensors", out);
        rc = write_parts(buffer_text(&path), parts, time ? 6 : 5, f, err);
    }
    if (rc == KVF_OK) {
        buffer_cut(&path, 0);
        buffer_printf(&path, "%s.tokens.npy", out);
        rc = write_tokens(buffer_text(&path), r, &parts[0].info, err);
    }
    if (rc == KVF_OK) {
        buffer_cut(&path, 0);
        buffer_printf(&path, "%s.meta.npy", out);
        rc = write_npy(buffer_text(&path), &parts[3].info, p->meta, err);
    }
    buffer_free(&path);
    free(time);
    free(f);
    return rc;
}
