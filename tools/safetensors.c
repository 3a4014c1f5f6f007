/* safetensors.c - see safetensors.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "safetensors.h"

#include <stdlib.h>
#include <string.h>

#include "buffer.h"
#include "json.h"
#include "report.h"

/* Whole numbers up to here are exact in cJSON's doubles. */
#define EXACT 9007199254740992.0

static const char metadata_key[] = "__metadata__";

static const struct {
    const char *name;
    array_type type;
} dtypes[] = {
    { "BOOL", ARRAY_BOOL }, { "U8", ARRAY_U8 },   { "I8", ARRAY_I8 },     { "U16", ARRAY_U16 },
    { "I16", ARRAY_I16 },   { "U32", ARRAY_U32 }, { "I32", ARRAY_I32 },   { "U64", ARRAY_U64 },
    { "I64", ARRAY_I64 },   { "F16", ARRAY_F16 }, { "BF16", ARRAY_BF16 }, { "F32", ARRAY_F32 },
    { "F64", ARRAY_F64 },
};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

static kvf_status damaged(const char *name, const char *what, kvf_error *err)
{
    return report_fail(err, KVF_ERR_FORMAT, "'%s' is no safetensors file that can be read: %s.", name, what);
}

static char *copy_text(const char *text)
{
    size_t n = strlen(text) + 1;
    char *v = malloc(n);
    if (v) memcpy(v, text, n);
    return v;
}

static bool whole(const cJSON *v, int64_t *out)
{
    if (!cJSON_IsNumber(v) || !(v->valuedouble >= 0 && v->valuedouble <= EXACT)) return false;
    *out = (int64_t)v->valuedouble;
    return (double)*out == v->valuedouble;
}

/* One tensor; begin is relative to the data. */
static kvf_status read_tensor(tensor_entry *t, const char *file, const cJSON *entry, kvf_error *err)
{
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets");
    int64_t begin = 0, end = 0;
    if (!cJSON_IsString(dtype) || !cJSON_IsArray(shape) || !cJSON_IsArray(offsets) ||
        cJSON_GetArraySize(offsets) != 2 || !whole(cJSON_GetArrayItem(offsets, 0), &begin) ||
        !whole(cJSON_GetArrayItem(offsets, 1), &end))
        return damaged(file, "a tensor lacks its dtype, shape or data_offsets", err);
    size_t d = 0;
    while (d < N_DTYPES && strcmp(dtypes[d].name, dtype->valuestring) != 0) d++;
    if (d == N_DTYPES)
        return report_fail(err, KVF_ERR_UNSUPPORTED,
                           "Tensor '%.60s' of '%s' has elements of type '%.12s', which is not read here.",
                           t->name, file, dtype->valuestring);
    t->info.type = dtypes[d].type;
    const cJSON *item = NULL;
    cJSON_ArrayForEach(item, shape)
    {
        if (t->info.n_dim == ARRAY_MAX_DIM)
            return report_fail(err, KVF_ERR_UNSUPPORTED,
                               "Tensor '%.60s' of '%s' has more than %d dimensions.", t->name, file,
                               ARRAY_MAX_DIM);
        if (!whole(item, &t->info.shape[t->info.n_dim++]))
            return damaged(file, "a shape is no list of whole numbers", err);
    }
    if (!array_set_count(&t->info)) return damaged(file, "a shape is larger than any file", err);
    if (end < begin || end - begin != t->info.n * (int64_t)array_type_bytes(t->info.type))
        return damaged(file, "a tensor's shape and its data_offsets disagree", err);
    t->info.at = begin;
    return KVF_OK;
}

static kvf_status read_texts(safetensors *out, const char *file, const cJSON *texts, kvf_error *err)
{
    if (!cJSON_IsObject(texts) || out->texts)
        return damaged(file, "__metadata__ is no object, or there twice", err);
    int n = cJSON_GetArraySize(texts);
    out->texts = calloc((size_t)n + 1, sizeof *out->texts);
    if (!out->texts) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for '%s'.", file);
    const cJSON *item = NULL;
    cJSON_ArrayForEach(item, texts)
    {
        if (!cJSON_IsString(item)) return damaged(file, "__metadata__ holds something else than text", err);
        tensor_text *t = &out->texts[out->n_texts++];
        t->key = copy_text(item->string);
        t->value = copy_text(item->valuestring);
        if (!t->key || !t->value) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for '%s'.", file);
    }
    return KVF_OK;
}

static int by_place(const void *a, const void *b)
{
    const tensor_entry *x = a, *y = b;
    if (x->info.at != y->info.at) return x->info.at < y->info.at ? -1 : 1;
    if (x->info.n != y->info.n) return x->info.n < y->info.n ? -1 : 1; /* empty ones first */
    return strcmp(x->name, y->name);
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const tensor_entry *const *)a)->name, (*(const tensor_entry *const *)b)->name);
}

/* A name that is there twice means two things. */
static kvf_status check_names(const safetensors *s, const char *file, kvf_error *err)
{
    const tensor_entry **list = malloc((s->n_tensors + 1) * sizeof *list);
    if (!list) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for '%s'.", file);
    for (size_t i = 0; i < s->n_tensors; i++) list[i] = &s->tensors[i];
    qsort(list, s->n_tensors, sizeof *list, by_name);
    bool twice = false;
    for (size_t i = 1; i < s->n_tensors; i++) twice = twice || strcmp(list[i]->name, list[i - 1]->name) == 0;
    free(list);
    return twice ? damaged(file, "a tensor's name is there twice", err) : KVF_OK;
}

/* The data is filled from its first byte to the file's last, and offsets become places in the file. */
static kvf_status check_places(safetensors *s, const char *file, int64_t at, int64_t file_bytes,
                               kvf_error *err)
{
    qsort(s->tensors, s->n_tensors, sizeof *s->tensors, by_place);
    int64_t next = 0;
    for (size_t i = 0; i < s->n_tensors; i++) {
        array_info *a = &s->tensors[i].info;
        if (a->at != next) return damaged(file, "its tensors overlap, or there is a hole between them", err);
        next += a->n * (int64_t)array_type_bytes(a->type); /* each at most EXACT: see whole() */
        a->at += at;
    }
    if (next > file_bytes - at)
        return report_fail(err, KVF_ERR_FORMAT,
                           "'%s' is cut off: its tensors need %lld bytes, and %lld are there. Copy it again.",
                           file, (long long)next, (long long)(file_bytes - at));
    return next < file_bytes - at ? damaged(file, "there is more in it than its tensors", err) : KVF_OK;
}

static kvf_status read_header(safetensors *out, const char *file, const cJSON *root, kvf_error *err)
{
    int n = cJSON_GetArraySize(root);
    out->tensors = calloc((size_t)n + 1, sizeof *out->tensors);
    if (!out->tensors) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for '%s'.", file);
    const cJSON *entry = NULL;
    cJSON_ArrayForEach(entry, root)
    {
        kvf_status rc;
        if (strcmp(entry->string, metadata_key) == 0) {
            rc = read_texts(out, file, entry, err);
        } else {
            tensor_entry *t = &out->tensors[out->n_tensors++];
            t->name = copy_text(entry->string);
            rc = t->name ? read_tensor(t, file, entry, err)
                         : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for '%s'.", file);
        }
        if (rc != KVF_OK) return rc;
    }
    return check_names(out, file, err);
}

kvf_status safetensors_parse(safetensors *out, const char *name, const void *bytes, size_t n,
                             int64_t file_bytes, kvf_error *err)
{
    const unsigned char *v = bytes;
    *out = (safetensors){ 0 };
    if (n < 8) return damaged(name, "it is too short", err);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | v[i];
    if (length < 2 || length > SAFETENSORS_MAX_HEADER)
        return damaged(name, "it does not begin like one", err);
    if (length > n - 8) return damaged(name, "its header is cut off", err);
    const char *end = NULL;
    cJSON *root = cJSON_ParseWithLengthOpts((const char *)v + 8, (size_t)length, &end, 0);
    kvf_status rc = KVF_OK;
    if (!cJSON_IsObject(root)) rc = damaged(name, "its header is no JSON object", err);
    for (const char *p = end; rc == KVF_OK && p < (const char *)v + 8 + length; p++)
        if (*p != ' ' && *p != '\n' && *p != '\t' && *p != '\r')
            rc = damaged(name, "there is more behind its header", err);
    if (rc == KVF_OK) rc = read_header(out, name, root, err);
    if (rc == KVF_OK) rc = check_places(out, name, 8 + (int64_t)length, file_bytes, err);
    cJSON_Delete(root);
    if (rc != KVF_OK) safetensors_free(out);
    return rc;
}

kvf_status safetensors_open(array_file *f, safetensors *out, const char *path, kvf_error *err)
{
    *out = (safetensors){ 0 };
    kvf_status rc = array_file_open(f, path, err);
    if (rc != KVF_OK) return rc;
    unsigned char head[8] = { 0 };
    uint64_t length = 0;
    char *text = NULL;
    rc =
        f->bytes >= 8 ? array_file_read(f, 0, head, sizeof head, err) : damaged(path, "it is too short", err);
    for (int i = 7; i >= 0; i--) length = length << 8 | head[i];
    /* What is longer than the file or the limit is refused by the parser, which then gets the 8 bytes alone.
     */
    size_t n = 8;
    if (rc == KVF_OK && length <= SAFETENSORS_MAX_HEADER && (int64_t)length <= f->bytes - 8)
        n += (size_t)length;
    if (rc == KVF_OK) text = malloc(n);
    if (rc == KVF_OK && !text) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory to open '%s'.", path);
    if (rc == KVF_OK) rc = array_file_read(f, 0, text, n, err);
    if (rc == KVF_OK) rc = safetensors_parse(out, path, text, n, f->bytes, err);
    free(text);
    if (rc != KVF_OK) array_file_close(f);
    return rc;
}

const array_info *safetensors_find(const safetensors *s, const char *name)
{
    for (size_t i = 0; i < s->n_tensors; i++)
        if (strcmp(s->tensors[i].name, name) == 0) return &s->tensors[i].info;
    return NULL;
}

void safetensors_free(safetensors *s)
{
    for (size_t i = 0; i < s->n_tensors; i++) free(s->tensors[i].name);
    for (size_t i = 0; i < s->n_texts; i++) {
        free(s->texts[i].key);
        free(s->texts[i].value);
    }
    free(s->tensors);
    free(s->texts);
    *s = (safetensors){ 0 };
}

/* ---- Writing --------------------------------------------------------------------------- */

static const char *dtype_of(array_type t)
{
    for (size_t i = 0; i < N_DTYPES; i++)
        if (dtypes[i].type == t) return dtypes[i].name;
    return "";
}

static char *header_text(const safetensors *s)
{
    cJSON *root = cJSON_CreateObject();
    cJSON *texts = s->n_texts ? json_object(root, metadata_key) : NULL;
    for (size_t i = 0; i < s->n_texts; i++) json_text(texts, s->texts[i].key, s->texts[i].value, (size_t)-1);
    int64_t at = 0;
    for (size_t i = 0; i < s->n_tensors; i++) {
        array_info a = s->tensors[i].info;
        if (!array_set_count(&a)) a.n = 0;
        cJSON *t = json_object(root, s->tensors[i].name);
        json_text(t, "dtype", dtype_of(a.type), (size_t)-1);
        cJSON *shape = json_array(t, "shape");
        for (int k = 0; k < a.n_dim; k++) json_int(shape, NULL, a.shape[k]);
        cJSON *offsets = json_array(t, "data_offsets");
        json_int(offsets, NULL, at);
        at += a.n * (int64_t)array_type_bytes(a.type);
        json_int(offsets, NULL, at);
    }
    char *text = root ? cJSON_PrintUnformatted(root) : NULL;
    cJSON_Delete(root);
    return text;
}

kvf_status safetensors_begin(outfile *o, const char *path, const safetensors *s, kvf_error *err)
{
    *o = (outfile){ 0 };
    char *text = header_text(s);
    if (!text) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory to write '%s'.", path);
    /* Blanks after the header bring the data to a multiple of 8, as the format's own writer does. */
    size_t n = strlen(text), length = (n + 7) / 8 * 8;
    unsigned char head[8];
    for (int i = 0; i < 8; i++) head[i] = (unsigned char)((uint64_t)length >> (8 * i));
    kvf_status rc = outfile_open(o, path, err);
    if (rc == KVF_OK) {
        outfile_write(o, head, sizeof head);
        outfile_write(o, text, n);
        outfile_write(o, "        ", length - n);
    }
    cJSON_free(text);
    return rc;
}
