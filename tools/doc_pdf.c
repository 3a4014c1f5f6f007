/* doc_pdf.c - the text of PDF files, through poppler-glib.
 *
 * Every page starts with a line "[page N]", so an answer can name the page it is from.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "doc.h"
#include "report.h"
#include "utf8.h"

#ifdef KVFOLD_HAVE_POPPLER

#include <fcntl.h>
#include <unistd.h>

#include <poppler.h>

/* Poppler prints what it finds wrong with a file to stderr, and its C interface cannot stop it.
 * The program is single-threaded here. Returns what quiet_end needs. */
static int quiet_begin(void)
{
    fflush(stderr);
    int saved = dup(STDERR_FILENO);
    int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (saved >= 0 && null >= 0) dup2(null, STDERR_FILENO);
    if (null >= 0) close(null);
    return saved;
}

static void quiet_end(int saved)
{
    if (saved < 0) return;
    dup2(saved, STDERR_FILENO);
    close(saved);
}

/* Typographic ligatures, which no reader types: "fi" for U+FB01. */
static const char *ligature(uint32_t cp)
{
    static const char *const parts[] = { "ff", "fi", "fl", "ffi", "ffl", "st", "st" };
    return cp >= 0xfb00 && cp <= 0xfb06 ? parts[cp - 0xfb00] : NULL;
}

static void add_page_text(buffer *out, const char *text)
{
    size_t n = strlen(text);
    for (size_t i = 0; i < n;) {
        uint32_t cp = 0xfffd;
        int len = utf8_decode(text + i, n - i, &cp);
        const char *lig = ligature(cp);
        if (len <= 0) {
            utf8_add(out, 0xfffd);
            len = 1;
        } else if (lig) {
            buffer_add_text(out, lig);
        } else if (cp == '\f' || cp == '\r') {
            buffer_add_char(out, '\n');
        } else if (cp >= 0x20 || cp == '\n' || cp == '\t') {
            buffer_add(out, text + i, (size_t)len);
        }
        i += (size_t)len;
    }
    buffer_trim_end(out);
}

static void set_title(document *d, PopplerDocument *pdf)
{
    char *title = poppler_document_get_title(pdf);
    if (title && *title) {
        buffer clean = { 0 };
        utf8_add_clean(&clean, title, strlen(title), UTF8_NO_CONTROLS);
        snprintf(d->title, sizeof d->title, "%.*s", 120, buffer_text(&clean));
        buffer_free(&clean);
    }
    g_free(title);
}

/* Returns the number of pages with text; -1: out of memory. */
static int add_pages(document *d, PopplerDocument *pdf)
{
    int n = poppler_document_get_n_pages(pdf), n_text = 0;
    if (n <= 0) return 0;
    d->page_start = calloc((size_t)n, sizeof *d->page_start);
    if (!d->page_start) return -1;
    d->n_pages = n;
    int waiting = 0; /* pages from here on have no text and begin with the next that has */
    for (int i = 0; i < n && !d->text.full && !d->text.failed; i++) {
        PopplerPage *page = poppler_document_get_page(pdf, i);
        char *text = page ? poppler_page_get_text(page) : NULL;
        if (text && text[strspn(text, " \n\t\r\f")]) {
            if (d->text.n) buffer_add_text(&d->text, "\n\n");
            while (waiting <= i) d->page_start[waiting++] = d->text.n;
            buffer_printf(&d->text, "[page %d]\n", i + 1);
            add_page_text(&d->text, text);
            n_text++;
        }
        g_free(text);
        if (page) g_object_unref(page);
    }
    while (waiting < n) d->page_start[waiting++] = d->text.n;
    return n_text;
}

kvf_status doc_read_pdf(document *d, const doc_bytes *in, kvf_error *err)
{
    int saved = quiet_begin();
    GBytes *bytes = g_bytes_new_static(in->v, in->n);
    GError *why = NULL;
    PopplerDocument *pdf = poppler_document_new_from_bytes(bytes, NULL, &why);
    int n_text = 0;
    if (pdf) {
        set_title(d, pdf);
        n_text = add_pages(d, pdf);
        g_object_unref(pdf);
    }
    g_bytes_unref(bytes);
    quiet_end(saved);

    kvf_status rc = KVF_OK;
    if (why && g_error_matches(why, POPPLER_ERROR, POPPLER_ERROR_ENCRYPTED))
        rc = report_fail(err, KVF_ERR_UNSUPPORTED,
                         "'%s' is protected by a password; save a copy without one (qpdf --decrypt).",
                         in->name);
    else if (!pdf)
        rc = report_fail(err, KVF_ERR_FORMAT,
                         "'%s' is a damaged PDF file (%s); copy it again, or repair it "
                         "with qpdf.",
                         in->name, why ? why->message : "unreadable");
    if (why) g_error_free(why);
    if (n_text < 0) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the pages of '%s'.", in->name);
    if (rc == KVF_OK && n_text > 0 && n_text < d->n_pages)
        snprintf(d->note, sizeof d->note, "%lld of %lld pages hold no text (pictures?)",
                 (long long)(d->n_pages - n_text), (long long)d->n_pages);
    return rc;
}

#else

kvf_status doc_read_pdf(document *d, const doc_bytes *in, kvf_error *err)
{
    (void)d;
    return report_fail(err, KVF_ERR_UNSUPPORTED,
                       "'%s' is a PDF, which this build cannot read: install libpoppler-glib-dev and build "
                       "again, or convert it with pdftotext.",
                       in->name);
}

#endif
