/* doc.c - find out what a document is, and have it read. See doc.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "doc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "report.h"
#include "utf8.h"

typedef enum doc_format { DOC_TEXT, DOC_MARKDOWN, DOC_HTML, DOC_PDF } doc_format;

static bool ends_with(const char *name, const char *ext)
{
    size_t n = strlen(name), m = strlen(ext);
    return n >= m && strcasecmp(name + n - m, ext) == 0;
}

static bool starts(const doc_bytes *in, const void *magic, size_t n)
{
    return in->n >= n && memcmp(in->v, magic, n) == 0;
}

/* First tag of a page, after a byte order mark, white space and an XML declaration. */
static bool looks_like_html(const doc_bytes *in)
{
    const char *p = in->v, *end = in->v + (in->n < 4096 ? in->n : 4096);
    if (starts(in, "\xef\xbb\xbf", 3)) p += 3;
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    if (end - p > 5 && memcmp(p, "<?xml", 5) == 0) {
        const char *close = memchr(p, '>', (size_t)(end - p));
        p = close ? close + 1 : end;
        while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    }
    static const char *const tags[] = { "<!doctype html", "<html", "<head", "<body" };
    for (size_t i = 0; i < sizeof tags / sizeof *tags; i++) {
        size_t n = strlen(tags[i]);
        if ((size_t)(end - p) >= n && strncasecmp(p, tags[i], n) == 0) return true;
    }
    return false;
}

/* A known format that is not for reading as text, by its first bytes. */
static const char *foreign_format(const doc_bytes *in, const char **cure)
{
    static const struct {
        const char *magic;
        size_t n;
        const char *what, *cure;
    } known[] = {
        { "PK\003\004", 4, "a ZIP container (a Word, OpenDocument or e-book file?)",
          "save it as PDF, HTML or text" },
        { "\xd0\xcf\x11\xe0", 4, "an old Microsoft Office file", "save it as PDF, HTML or text" },
        { "{\\rtf", 5, "an RTF file", "save it as PDF, HTML or text" },
        { "%!PS", 4, "a PostScript file", "convert it with ps2pdf" },
        { "GGUF", 4, "a model, not a document", "name it with -m" },
        { "\xfd"
          "7zXZ",
          5, "xz-compressed", "unpack it first, or: xz -dc FILE | kvfold ask -d - ..." },
        { "BZh", 3, "bzip2-compressed", "unpack it first, or: bzip2 -dc FILE | kvfold ask -d - ..." },
        { "\x28\xb5\x2f\xfd", 4, "zstd-compressed",
          "unpack it first, or: zstd -dc FILE | kvfold ask -d - ..." },
        { "\x7f"
          "ELF",
          4, "a program", "give a text" },
        { "\x89PNG", 4, "a picture", "run text recognition (OCR) on it first" },
        { "\xff\xd8\xff", 3, "a picture", "run text recognition (OCR) on it first" },
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!starts(in, known[i].magic, known[i].n)) continue;
        *cure = known[i].cure;
        return known[i].what;
    }
    return NULL;
}

static doc_format detect(const doc_bytes *in, const char *name)
{
    if (starts(in, "%PDF-", 5)) return DOC_PDF;
    /* Mail gateways and some printers put a few lines in front; readers accept 1024 bytes. */
    if (ends_with(name, ".pdf")) {
        size_t n = in->n < 1024 ? in->n : 1024;
        for (size_t i = 0; i + 5 <= n; i++)
            if (memcmp(in->v + i, "%PDF-", 5) == 0) return DOC_PDF;
    }
    if (ends_with(name, ".html") || ends_with(name, ".htm") || ends_with(name, ".xhtml")) return DOC_HTML;
    if (ends_with(name, ".md") || ends_with(name, ".markdown")) return DOC_MARKDOWN;
    return looks_like_html(in) ? DOC_HTML : DOC_TEXT;
}

static void set_title(document *d, const char *name)
{
    const char *base = strrchr(name, '/');
    base = base && base[1] ? base + 1 : name;
    if (strcmp(name, "-") == 0) base = "standard input";
    buffer clean = { 0 };
    utf8_add_clean(&clean, base, strlen(base), UTF8_NO_CONTROLS);
    snprintf(d->title, sizeof d->title, "%.*s", 120, buffer_text(&clean));
    buffer_free(&clean);
}

/* No white space at the end; no line feeds but one before a paragraph is lost. */
static kvf_status finish(document *d, const doc_bytes *in, kvf_error *err)
{
    kvf_status rc = buffer_status(&d->text, in->name, err);
    if (rc != KVF_OK) return rc;
    buffer_trim_end(&d->text);
    for (int64_t i = 0; i < d->n_pages; i++)
        if (d->page_start[i] > d->text.n) d->page_start[i] = d->text.n;
    if (d->text.n) return KVF_OK;
    if (strcmp(d->kind, "pdf") == 0)
        return report_fail(err, KVF_ERR_FORMAT,
                           "'%s' holds no text, only pictures of its %lld pages; run text recognition on it "
                           "first (ocrmypdf).",
                           in->name, (long long)d->n_pages);
    return report_fail(err, KVF_ERR_FORMAT, "'%s' is empty: there is no text to read in it.", in->name);
}

static kvf_status read_plain(document *d, const doc_bytes *in, const char *name, kvf_error *err)
{
    const char *cure = "";
    const char *what = foreign_format(in, &cure);
    if (what)
        return report_fail(err, KVF_ERR_UNSUPPORTED, "'%s' is %s, which is not read directly; %s.", in->name,
                           what, cure);
    kvf_status rc = KVF_OK;
    switch (detect(in, name)) {
    case DOC_PDF:
        d->kind = "pdf";
        rc = doc_read_pdf(d, in, err);
        break;
    case DOC_HTML:
        d->kind = "html";
        rc = doc_read_html(d, in, err);
        break;
    case DOC_MARKDOWN:
        d->kind = "markdown";
        d->lines = true;
        rc = doc_read_text(d, in, err);
        break;
    case DOC_TEXT:
        d->kind = "text";
        d->lines = true;
        rc = doc_read_text(d, in, err);
        break;
    }
    return rc == KVF_OK ? finish(d, in, err) : rc;
}

kvf_status doc_from_bytes(document *out, const char *name, const void *bytes, size_t n, size_t limit,
                          kvf_error *err)
{
    memset(out, 0, sizeof *out);
    out->kind = "text";
    out->text.max = limit ? limit : DOC_LIMIT;
    set_title(out, name);
    doc_bytes in = { .name = strcmp(name, "-") ? name : "standard input", .v = bytes, .n = n };
    if (!n) in.v = "";

    kvf_status rc;
    if (starts(&in, "\x1f\x8b", 2)) {
        buffer plain = { .max = out->text.max };
        char inner[4096];
        size_t len = strlen(name);
        if (ends_with(name, ".gz")) len -= 3;
        snprintf(inner, sizeof inner, "%.*s", len < 4000 ? (int)len : 4000, name);
        rc = doc_gunzip(&plain, &in, err);
        in.v = buffer_text(&plain);
        in.n = plain.n;
        if (rc == KVF_OK) rc = read_plain(out, &in, inner, err);
        buffer_free(&plain);
    } else {
        rc = read_plain(out, &in, name, err);
    }
    if (rc != KVF_OK) doc_close(out);
    return rc;
}

kvf_status doc_open(document *out, const char *path, kvf_error *err)
{
    memset(out, 0, sizeof *out);
    buffer bytes = { .max = DOC_LIMIT };
    kvf_status rc = buffer_read_file(&bytes, path, err);
    if (rc == KVF_OK) rc = doc_from_bytes(out, path, bytes.v, bytes.n, DOC_LIMIT, err);
    buffer_free(&bytes);
    return rc;
}

void doc_close(document *d)
{
    buffer_free(&d->text);
    free(d->page_start);
    memset(d, 0, sizeof *d);
}
