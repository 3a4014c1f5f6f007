/* npy.c - see npy.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "npy.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"

static const char magic[] = "\x93NUMPY";

typedef struct parser {
    const char *name; /* of the file */
    const char *p, *end;
} parser;

static kvf_status damaged(const parser *s, const char *what, kvf_error *err)
{
    return report_fail(err, KVF_ERR_FORMAT,
                       "'%s' is no .npy file that can be read: %s. Save it again with numpy.save.", s->name,
                       what);
}

static void skip_blanks(parser *s)
{
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\n' || *s->p == '\t' || *s->p == '\r')) s->p++;
}

static bool take(parser *s, char c)
{
    skip_blanks(s);
    if (s->p >= s->end || *s->p != c) return false;
    s->p++;
    return true;
}

static bool take_word(parser *s, const char *word)
{
    size_t n = strlen(word);
    skip_blanks(s);
    if ((size_t)(s->end - s->p) < n || memcmp(s->p, word, n) != 0) return false;
    s->p += n;
    return true;
}

/* 'text' or "text", without escapes; false also if it is longer than cap - 1. */
static bool take_string(parser *s, char *out, size_t cap)
{
    skip_blanks(s);
    if (s->p >= s->end || (*s->p != '\'' && *s->p != '"')) return false;
    char quote = *s->p++;
    size_t n = 0;
    while (s->p < s->end && *s->p != quote) {
        if (n + 1 >= cap || *s->p == '\\') return false;
        out[n++] = *s->p++;
    }
    if (s->p >= s->end) return false;
    s->p++;
    out[n] = '\0';
    return true;
}

/* "<f4", "|u1", ">i8", "=f2". */
static bool set_type(array_info *a, const char *descr)
{
    static const struct {
        const char *code;
        array_type type;
    } codes[] = {
        { "b1", ARRAY_BOOL }, { "u1", ARRAY_U8 },  { "i1", ARRAY_I8 },  { "u2", ARRAY_U16 },
        { "i2", ARRAY_I16 },  { "u4", ARRAY_U32 }, { "i4", ARRAY_I32 }, { "u8", ARRAY_U64 },
        { "i8", ARRAY_I64 },  { "f2", ARRAY_F16 }, { "f4", ARRAY_F32 }, { "f8", ARRAY_F64 },
    };
    const char *code = strchr("<>|=", descr[0]) && descr[0] ? descr + 1 : descr;
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (strcmp(code, codes[i].code) == 0) {
            a->type = codes[i].type;
            a->swapped = descr[0] == '>' && array_type_bytes(a->type) > 1;
            return true;
        }
    return false;
}

static kvf_status take_shape(parser *s, array_info *a, kvf_error *err)
{
    if (!take(s, '(')) return damaged(s, "its shape is no tuple", err);
    a->n_dim = 0;
    while (!take(s, ')')) {
        skip_blanks(s);
        int64_t v = 0;
        const char *first = s->p;
        for (; s->p < s->end && *s->p >= '0' && *s->p <= '9'; s->p++) {
            if (v > (INT64_MAX - 9) / 10) return damaged(s, "its shape is larger than any file", err);
            v = v * 10 + (*s->p - '0');
        }
        if (s->p == first) return damaged(s, "its shape holds something else than whole numbers", err);
        if (s->p < s->end && *s->p == 'L') s->p++; /* a long integer of Python 2 */
        if (a->n_dim == ARRAY_MAX_DIM)
            return report_fail(err, KVF_ERR_UNSUPPORTED, "'%s' has more than %d dimensions.", s->name,
                               ARRAY_MAX_DIM);
        a->shape[a->n_dim++] = v;
        if (take(s, ',')) continue;
        if (!take(s, ')')) return damaged(s, "its shape has no end", err);
        break;
    }
    return KVF_OK;
}

/* {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), } in any order. */
static kvf_status take_dictionary(parser *s, array_info *a, kvf_error *err)
{
    char descr[16] = "", key[32];
    int seen = 0;
    bool fortran = false;
    if (!take(s, '{')) return damaged(s, "its header is no dictionary", err);
    while (!take(s, '}')) {
        if (!take_string(s, key, sizeof key) || !take(s, ':'))
            return damaged(s, "its header has no keys", err);
        kvf_status rc = KVF_OK;
        int bit = 0;
        if (strcmp(key, "descr") == 0) {
            bit = 1;
            if (!take_string(s, descr, sizeof descr))
                return report_fail(
                    err, KVF_ERR_UNSUPPORTED,
                    "'%s' holds records or objects; save the numbers alone, as an array of float32.",
                    s->name);
        } else if (strcmp(key, "fortran_order") == 0) {
            bit = 2;
            fortran = take_word(s, "True");
            if (!fortran && !take_word(s, "False"))
                return damaged(s, "fortran_order is neither True nor False", err);
        } else if (strcmp(key, "shape") == 0) {
            bit = 4;
            rc = take_shape(s, a, err);
        } else {
            return damaged(s, "its header has a key that the format does not know", err);
        }
        if (rc != KVF_OK) return rc;
        if (seen & bit) return damaged(s, "its header says something twice", err);
        seen |= bit;
        if (take(s, ',')) continue;
        if (!take(s, '}')) return damaged(s, "its header has no end", err);
        break;
    }
    skip_blanks(s);
    if (seen != 7 || s->p != s->end) return damaged(s, "its header is incomplete or has more behind it", err);
    if (!set_type(a, descr))
        return report_fail(err, KVF_ERR_UNSUPPORTED,
                           "'%s' holds elements of type '%.8s', which is not read here; save it as float32.",
                           s->name, descr);
    if (fortran && a->n_dim > 1)
        return report_fail(err, KVF_ERR_UNSUPPORTED,
                           "'%s' is stored column by column; save numpy.ascontiguousarray(x) instead.",
                           s->name);
    return KVF_OK;
}

kvf_status npy_parse(array_info *out, const char *name, const void *bytes, size_t n, int64_t file_bytes,
                     kvf_error *err)
{
    const unsigned char *v = bytes;
    parser s = { .name = name };
    *out = (array_info){ 0 };
    if (n < 10 || memcmp(v, magic, 6) != 0) return damaged(&s, "it does not begin like one", err);
    if (v[6] < 1 || v[6] > 3) return damaged(&s, "its version is unknown", err);
    size_t head = v[6] == 1 ? 10 : 12;
    if (n < head) return damaged(&s, "its header is cut off", err);
    size_t length = (size_t)v[8] | (size_t)v[9] << 8;
    if (head == 12) length |= (size_t)v[10] << 16 | (size_t)v[11] << 24;
    if (length > NPY_MAX_HEADER) return damaged(&s, "its header is longer than any that NumPy writes", err);
    if (length > n - head) return damaged(&s, "its header is cut off", err);
    s.p = (const char *)v + head;
    s.end = s.p + length;
    array_info a = { 0 };
    kvf_status rc = take_dictionary(&s, &a, err);
    if (rc != KVF_OK) return rc;
    a.at = (int64_t)(head + length);
    if (!array_set_count(&a)) return damaged(&s, "its shape is larger than any file", err);
    int64_t data = a.n * (int64_t)array_type_bytes(a.type);
    char shape[128];
    if (a.at > file_bytes || data > file_bytes - a.at)
        return report_fail(err, KVF_ERR_FORMAT,
                           "'%s' is cut off: %s needs %lld bytes, and %lld are there. Copy it again.", name,
                           array_describe(shape, &a), (long long)data,
                           (long long)(a.at > file_bytes ? 0 : file_bytes - a.at));
    *out = a;
    return KVF_OK;
}

kvf_status npy_open(array_file *f, array_info *out, const char *path, kvf_error *err)
{
    *out = (array_info){ 0 };
    kvf_status rc = array_file_open(f, path, err);
    if (rc != KVF_OK) return rc;
    size_t n = f->bytes < NPY_MAX_HEADER + 12 ? (size_t)f->bytes : NPY_MAX_HEADER + 12;
    char *head = malloc(n + 1);
    if (!head) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory to open '%s'.", path);
    if (rc == KVF_OK) rc = array_file_read(f, 0, head, n, err);
    if (rc == KVF_OK) rc = npy_parse(out, path, head, n, f->bytes, err);
    free(head);
    if (rc != KVF_OK) array_file_close(f);
    return rc;
}

/* ---- Writing --------------------------------------------------------------------------- */

static const char *descr_of(array_type t)
{
    static const char *const codes[ARRAY_N_TYPES] = {
        [ARRAY_BOOL] = "|b1", [ARRAY_U8] = "|u1",  [ARRAY_I8] = "|i1",  [ARRAY_U16] = "<u2",
        [ARRAY_I16] = "<i2",  [ARRAY_U32] = "<u4", [ARRAY_I32] = "<i4", [ARRAY_U64] = "<u8",
        [ARRAY_I64] = "<i8",  [ARRAY_F16] = "<f2", [ARRAY_F32] = "<f4", [ARRAY_F64] = "<f8",
    };
    return codes[t];
}

kvf_status npy_begin(outfile *o, const char *path, const array_info *info, kvf_error *err)
{
    *o = (outfile){ 0 };
    if (!descr_of(info->type))
        return report_fail(err, KVF_ERR_UNSUPPORTED, "NumPy has no %s; '%s' is not written.",
                           array_type_name(info->type), path);
    char head[512];
    int n =
        snprintf(head + 10, 384, "{'descr': '%s', 'fortran_order': False, 'shape': (", descr_of(info->type));
    for (int i = 0; i < info->n_dim; i++)
        n += snprintf(head + 10 + n, 384 - (size_t)n, "%s%" PRId64, i ? ", " : "", info->shape[i]);
    n += snprintf(head + 10 + n, 384 - (size_t)n, "%s), }", info->n_dim == 1 ? "," : "");
    size_t length = (size_t)n, total = (10 + length + 1 + 63) / 64 * 64;
    memset(head + 10 + length, ' ', total - 10 - length);
    head[total - 1] = '\n';
    memcpy(head, magic, 6);
    head[6] = 1;
    head[7] = 0;
    head[8] = (char)((total - 10) & 255);
    head[9] = (char)((total - 10) >> 8);
    kvf_status rc = outfile_open(o, path, err);
    if (rc == KVF_OK) outfile_write(o, head, total);
    return rc;
}

kvf_status npy_write(const char *path, const array_info *info, const void *data, kvf_error *err)
{
    array_info a = *info;
    if (!array_set_count(&a))
        return report_fail(err, KVF_ERR_ARG, "'%s' would be larger than any file.", path);
    outfile o;
    kvf_status rc = npy_begin(&o, path, &a, err);
    if (rc != KVF_OK) return rc;
    outfile_write(&o, data, (size_t)a.n * array_type_bytes(a.type));
    return outfile_commit(&o, err);
}
