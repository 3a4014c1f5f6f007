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

kvf_status video_newline(void **out, const video_tokens *t, kvf_merge_type type, kvf_error *err)
{
    *out = NULL;
    if (!t->newline)
        return report_fail(err, KVF_ERR_ARG,
                           "The plan has newlines, and there is no embedding for them: give --newline "
                           "FILE, or newline=none in --merge.");
    float *v = malloc((size_t)t->dim * sizeof *v); /* two bytes an element fit, too */
    if (!v) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for a newline.");
    uint16_t *half = (uint16_t *)(void *)v;
    for (int64_t i = 0; i < t->dim; i++) {
        if (type == KVF_MERGE_F32)
            v[i] = t->newline[i];
        else
            half[i] = type == KVF_MERGE_F16 ? array_to_f16(t->newline[i]) : array_to_bf16(t->newline[i]);
    }
    *out = v;
    return KVF_OK;
}

kvf_status video_result_make(video_result *r, const kvf_merge_plan *plan, const video_tokens *t,
                             kvf_merge_type type, bool keep, kvf_error *err)
{
    *r = (video_result){ .type = type, .dim = t->dim, .keep = keep, .info = { .size = sizeof r->info } };
    kvf_status rc = kvf_merge_plan_get_info(plan, &r->info, err);
    void *newline = NULL;
    if (rc == KVF_OK && r->info.n_newline) rc = video_newline(&newline, t, t->type, err);
    if (rc != KVF_OK) return rc;
    size_t n = (size_t)r->info.n_out, width = (size_t)t->dim * kvf_merge_type_bytes(type);
    r->embd = n && width <= SIZE_MAX / n ? malloc(n * width) : NULL;
    r->position = malloc(n * sizeof *r->position);
    r->mrope = malloc(n * 3 * sizeof *r->mrope);
    if (!r->embd || !r->position || !r->mrope)
        rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for %zu tokens.", n);
    kvf_merge_apply a;
    kvf_merge_apply_init(&a);
    a.src = video_tokens_view(t);
    a.newline = newline;
    a.dst = r->embd;
    a.dst_type = type;
    if (rc == KVF_OK) rc = kvf_merge_plan_apply(plan, &a, err);
    free(newline);
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
    if (t->storm[0]) fact(f, "storm", "%s", t->storm);
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
    FILE *spool; /* instead of data */
} part;

/* Numbers that are copied from a spool at a time. */
enum { PIECE = 1 << 16 };

/* The elements to o, bf16 as float if `wide`. Errors: IO, NOMEM; those of writing come with the commit. */
static kvf_status write_data(outfile *o, const part *p, bool wide, kvf_error *err)
{
    size_t bytes = array_type_bytes(p->info.type);
    if (!p->spool && !wide) {
        outfile_write(o, p->data, (size_t)p->info.n * bytes);
        return KVF_OK;
    }
    float *v = malloc(PIECE * sizeof *v);
    char *raw = malloc(PIECE * sizeof *v);
    kvf_status rc = v && raw ? KVF_OK : report_fail(err, KVF_ERR_NOMEM, "Not enough memory to write '%s'.", o->path);
    if (p->spool) rewind(p->spool);
    for (int64_t i = 0; i < p->info.n && rc == KVF_OK; i += PIECE) {
        size_t n = p->info.n - i < PIECE ? (size_t)(p->info.n - i) : PIECE;
        if (!p->spool)
            memcpy(raw, (const char *)p->data + (size_t)i * bytes, n * bytes);
        else if (fread(raw, bytes, n, p->spool) != n)
            rc = report_fail(err, KVF_ERR_IO, "Tokens kept for '%s' cannot be read back.", o->path);
        if (wide) video_tokens_widen(v, raw, KVF_MERGE_BF16, (int64_t)n);
        if (rc == KVF_OK) outfile_write(o, wide ? (void *)v : raw, n * (wide ? sizeof *v : bytes));
    }
    free(v);
    free(raw);
    return rc;
}

/* Write, put in its place. */
static kvf_status write_all(outfile *o, const part *parts, size_t n, bool wide, kvf_error *err)
{
    kvf_status rc = KVF_OK;
    interrupt_remove(o->partial);
    for (size_t i = 0; i < n && rc == KVF_OK; i++) rc = write_data(o, &parts[i], wide, err);
    if (rc == KVF_OK)
        rc = outfile_commit(o, err);
    else
        outfile_drop(o);
    interrupt_remove(NULL);
    return rc;
}

static kvf_status write_parts(const char *path, const part *parts, size_t n, facts *f, kvf_error *err)
{
    tensor_entry entries[N_TENSORS];
    for (size_t i = 0; i < n; i++)
        entries[i] = (tensor_entry){ .name = (char *)(uintptr_t)parts[i].name, .info = parts[i].info };
    safetensors s = { .tensors = entries, .n_tensors = n, .texts = f->v, .n_texts = f->n };
    outfile o;
    kvf_status rc = safetensors_begin(&o, path, &s, err);
    return rc == KVF_OK ? write_all(&o, parts, n, false, err) : rc;
}

/* NumPy has no bfloat16: those go out as float. */
static kvf_status write_npy(const char *path, const part *p, kvf_error *err)
{
    outfile o;
    array_info info = p->info;
    bool wide = info.type == ARRAY_BF16;
    if (wide) info.type = ARRAY_F32;
    kvf_status rc = npy_begin(&o, path, &info, err);
    return rc == KVF_OK ? write_all(&o, p, 1, wide, err) : rc;
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
        { "embeddings", shaped(array_type_of(r->type), p->n_out, r->dim), r->embd, r->spool },
        { "position", shaped(ARRAY_I32, p->n_out, 0), r->position, NULL },
        { "mrope", shaped(ARRAY_I32, 3, p->n_out), r->mrope, NULL },
        { "meta", shaped(ARRAY_I32, p->n_out, 4), p->meta, NULL },
        { "segments", shaped(ARRAY_I32, p->n_segment, 6), p->segment, NULL },
        { "time", shaped(ARRAY_F32, t->n_frame, 0), time, NULL },
    };
    if (rc == KVF_OK) {
        list_facts(f, r, t, clip);
        buffer_printf(&path, "%s.safetensors", out);
        rc = write_parts(buffer_text(&path), parts, time ? 6 : 5, f, err);
    }
    if (rc == KVF_OK) {
        buffer_cut(&path, 0);
        buffer_printf(&path, "%s.tokens.npy", out);
        rc = write_npy(buffer_text(&path), &parts[0], err);
    }
    if (rc == KVF_OK) {
        buffer_cut(&path, 0);
        buffer_printf(&path, "%s.meta.npy", out);
        rc = write_npy(buffer_text(&path), &parts[3], err);
    }
    buffer_free(&path);
    free(time);
    free(f);
    return rc;
}
