/* note.c - see note.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "note.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cJSON.h>

#include "json.h"
#include "report.h"

static kvf_status no_memory(kvf_error *err)
{
    return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the description of the documents.");
}

/* The file wherever the program is started later; "-" and names that cannot be resolved stay. */
static char *absolute(const char *path)
{
    char *whole = strcmp(path, "-") ? realpath(path, NULL) : NULL;
    return whole ? whole : strdup(path);
}

uint64_t note_digest(const char *text, size_t n)
{
    uint64_t h = 14695981039346656037u; /* FNV-1a */
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)text[i]) * 1099511628211u;
    return h;
}

kvf_status note_make(note *out, const document *docs, const arg_texts *paths, const size_t *first, kvf_error *err)
{
    memset(out, 0, sizeof *out);
    out->sources = calloc(paths->n ? paths->n : 1, sizeof *out->sources);
    if (!out->sources) return no_memory(err);
    for (size_t i = 0; i < paths->n; i++) {
        const document *d = &docs[i];
        note_source *s = &out->sources[out->n_sources++];
        *s = (note_source){ .title = strdup(d->title), .path = absolute(paths->v[i]), .kind = strdup(d->kind),
                            .first = first[i], .n = d->text.n, .lines = d->lines, .n_pages = d->n_pages };
        size_t bytes = (size_t)d->n_pages * sizeof *s->page_start;
        if (bytes && (s->page_start = malloc(bytes)) != NULL) memcpy(s->page_start, d->page_start, bytes);
        if (s->title && s->path && s->kind && (s->page_start || !bytes)) continue;
        note_free(out);
        return no_memory(err);
    }
    return KVF_OK;
}

kvf_status note_print(const note *n, char **text, kvf_error *err)
{
    cJSON *o = cJSON_CreateObject();
    char hex[24];
    snprintf(hex, sizeof hex, "%016" PRIx64, n->digest);
    json_int(o, "format", NOTE_FORMAT);
    if (n->tmpl) json_text(o, "template", n->tmpl, (size_t)-1);
    json_text(o, "system", n->system ? n->system : "", (size_t)-1);
    json_int(o, "first_token", n->first_token);
    json_int(o, "first_byte", (int64_t)n->first_byte);
    json_text(o, "digest", hex, (size_t)-1);
    cJSON *list = json_array(o, "sources");
    for (size_t i = 0; i < n->n_sources; i++) {
        const note_source *s = &n->sources[i];
        cJSON *item = json_object(list, NULL);
        json_text(item, "title", s->title, (size_t)-1);
        json_text(item, "path", s->path, (size_t)-1);
        json_text(item, "kind", s->kind, (size_t)-1);
        json_int(item, "first_byte", (int64_t)s->first);
        json_int(item, "n_bytes", (int64_t)s->n);
        if (s->lines) json_bool(item, "lines", true);
        cJSON *pages = s->n_pages ? json_array(item, "pages") : NULL;
        for (int64_t p = 0; p < s->n_pages; p++) json_int(pages, NULL, (int64_t)s->page_start[p]);
    }
    *text = o ? cJSON_PrintUnformatted(o) : NULL;
    cJSON_Delete(o);
    return *text ? KVF_OK : no_memory(err);
}

/* ---- Reading ---------------------------------------------------------------------------- */

/* A whole number 0..2^53 of member `name`; -1 if it is none. */
static int64_t get_int(const cJSON *o, const char *name)
{
    const cJSON *v = name ? cJSON_GetObjectItemCaseSensitive(o, name) : o;
    if (!cJSON_IsNumber(v) || !(v->valuedouble >= 0) || v->valuedouble > 9007199254740992.0) return -1;
    return (int64_t)v->valuedouble;
}

/* A copy of the text; NULL if there is none. */
static char *get_text(const cJSON *o, const char *name)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(o, name);
    return cJSON_IsString(v) && v->valuestring ? strdup(v->valuestring) : NULL;
}

static bool parse_source(note_source *s, const cJSON *o)
{
    int64_t first = get_int(o, "first_byte"), n = get_int(o, "n_bytes");
    s->title = get_text(o, "title");
    s->path = get_text(o, "path");
    s->kind = get_text(o, "kind");
    if (!s->title || !s->path || !s->kind || first < 0 || n < 0) return false;
    s->first = (size_t)first;
    s->n = (size_t)n;
    s->lines = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(o, "lines"));
    const cJSON *pages = cJSON_GetObjectItemCaseSensitive(o, "pages"), *page;
    int n_pages = cJSON_IsArray(pages) ? cJSON_GetArraySize(pages) : 0;
    if (!n_pages) return true;
    s->page_start = calloc((size_t)n_pages, sizeof *s->page_start);
    if (!s->page_start) return false;
    cJSON_ArrayForEach(page, pages)
    {
        int64_t at = get_int(page, NULL);
        size_t before = s->n_pages ? s->page_start[s->n_pages - 1] : 0;
        if (at < 0 || (size_t)at < before || (size_t)at > s->n) return false;
        s->page_start[s->n_pages++] = (size_t)at;
    }
    return true;
}

static bool parse(note *out, const cJSON *o)
{
    int64_t token = get_int(o, "first_token"), byte = get_int(o, "first_byte");
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(o, "sources"), *item;
    char *hex = get_text(o, "digest");
    if (hex) out->digest = strtoull(hex, NULL, 16);
    free(hex);
    out->tmpl = get_text(o, "template");
    out->system = get_text(o, "system");
    if (!out->system || token < 0 || byte < 0 || !cJSON_IsArray(list)) return false;
    out->first_token = token;
    out->first_byte = (size_t)byte;
    out->sources = calloc((size_t)cJSON_GetArraySize(list) + 1, sizeof *out->sources);
    if (!out->sources) return false;
    cJSON_ArrayForEach(item, list)
        if (!parse_source(&out->sources[out->n_sources++], item)) return false;
    return out->n_sources > 0;
}

kvf_status note_parse(note *out, const void *text, size_t n_bytes, kvf_error *err)
{
    memset(out, 0, sizeof *out);
    cJSON *o = n_bytes ? cJSON_ParseWithLength(text, n_bytes) : NULL;
    int64_t format = o ? get_int(o, "format") : -1;
    kvf_status rc = KVF_OK;
    if (format > NOTE_FORMAT)
        rc = report_fail(err, KVF_ERR_UNSUPPORTED,
                         "The document was stored by a newer kvfold (note format %lld); use that one.",
                         (long long)format);
    else if (format < 1 || !parse(out, o))
        rc = report_fail(err, KVF_ERR_FORMAT,
                         "The document's description in the store is not one of kvfold ingest; remove the document "
                         "(kvfold rm) and ingest it again.");
    cJSON_Delete(o);
    if (rc != KVF_OK) note_free(out);
    return rc;
}

void note_free(note *n)
{
    for (size_t i = 0; i < n->n_sources; i++) {
        free(n->sources[i].title);
        free(n->sources[i].path);
        free(n->sources[i].kind);
        free(n->sources[i].page_start);
    }
    free(n->sources);
    free(n->tmpl);
    free(n->system);
    memset(n, 0, sizeof *n);
}
