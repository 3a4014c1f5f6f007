/* doc_text.c - plain text and Markdown.
 *
 * Markdown is kept as it is: language models read its marks. UTF-8 is expected, UTF-16 known by
 * its byte order mark; text that is not UTF-8 is taken as Windows-1252, and the note says so.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "doc.h"
#include "report.h"
#include "utf8.h"

/* Bytes looked at to tell a text from a program. */
#define SAMPLE 65536

/* A text has no NUL anywhere near its beginning and hardly any control characters; 1 in 20 lets
 * terminal logs with colours and man pages with backspaces pass. */
static bool is_binary(const char *p, size_t n)
{
    if (n > SAMPLE) n = SAMPLE;
    size_t n_control = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)p[i];
        if (c == 0) return true;
        if ((c < 0x20 && !(c >= '\b' && c <= '\r') && c != 0x1b) || c == 0x7f) n_control++;
    }
    return n_control * 20 > n;
}

/* Line ends become \n, a page break a line end; other control characters go. x BS x, the bold of
 * old printers, becomes x. The text only gets shorter. */
static void tidy(buffer *b, size_t from)
{
    size_t w = from;
    for (size_t r = from; r < b->n; r++) {
        unsigned char c = (unsigned char)b->v[r];
        if (c == '\r') {
            if (r + 1 < b->n && b->v[r + 1] == '\n') continue;
            c = '\n';
        } else if (c == '\f') {
            c = '\n';
        } else if (c == '\b') {
            while (w > from && ((unsigned char)b->v[w - 1] & 0xc0) == 0x80) w--;
            if (w > from) w--;
            continue;
        } else if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7f) {
            continue;
        }
        b->v[w++] = (char)c;
    }
    buffer_cut(b, w);
}

kvf_status doc_read_text(document *d, const doc_bytes *in, kvf_error *err)
{
    const char *p = in->v;
    size_t n = in->n, from = d->text.n;
    if (n >= 4 && (memcmp(p, "\xff\xfe\0\0", 4) == 0 || memcmp(p, "\0\0\xfe\xff", 4) == 0))
        return report_fail(err, KVF_ERR_UNSUPPORTED,
                           "'%s' is UTF-32 text; convert it: iconv -f UTF-32 -t UTF-8.", in->name);
    if (n >= 2 && (memcmp(p, "\xff\xfe", 2) == 0 || memcmp(p, "\xfe\xff", 2) == 0)) {
        utf8_add_utf16(&d->text, p + 2, n - 2, p[0] == (char)0xfe);
        snprintf(d->note, sizeof d->note, "read as UTF-16");
    } else {
        if (n >= 3 && memcmp(p, "\xef\xbb\xbf", 3) == 0) {
            p += 3;
            n -= 3;
        }
        if (is_binary(p, n))
            return report_fail(
                err, KVF_ERR_FORMAT,
                "'%s' is a binary file, not a document; kvfold reads text, Markdown, HTML and PDF.",
                in->name);
        size_t n_multi, n_bad;
        utf8_survey(p, n, &n_multi, &n_bad);
        if (n_bad > n_multi) {
            utf8_add_latin1(&d->text, p, n);
            snprintf(d->note, sizeof d->note, "not UTF-8: read as Windows-1252 (Latin-1)");
        } else {
            utf8_add_clean(&d->text, p, n, UTF8_KEEP);
            if (n_bad)
                snprintf(d->note, sizeof d->note, "%zu bytes that are not UTF-8 were replaced by U+FFFD",
                         n_bad);
        }
    }
    if (d->text.v) tidy(&d->text, from);
    return KVF_OK;
}
