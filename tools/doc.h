/* doc.h - documents: a file of some format becomes one UTF-8 text.
 *
 * doc.c finds the format from the first bytes, then from the name; one doc_<format>.c reads each.
 * Rule: a document is somebody else's data. Whatever its bytes are, the answer is a text or an
 * error with a sentence; a reader never trusts a length and never produces more than doc_limit.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_DOC_H
#define KVFOLD_TOOLS_DOC_H

#include "buffer.h"

/* Most bytes of a file, and of the text in it. No context holds a tenth of this; it stops a
 * compressed file of a few KB from unpacking to all memory. */
#define DOC_LIMIT ((size_t)512 << 20)

typedef struct document {
    char title[128];  /* the document's own title, or the file's name */
    const char *kind; /* "text", "markdown", "html" or "pdf"; static */
    buffer text;      /* valid UTF-8, lines end with \n, no white space at the end, not empty */
    int64_t n_pages;  /* of a PDF; 0: the format has no pages */
    size_t *page_start; /* [n_pages] byte of text where page i + 1 begins; a page without text begins with
                           the one after it. NULL if n_pages is 0; owned */
    bool lines;         /* lines of text are lines of the file, so a passage can be named by them */
    char note[160];   /* what had to be repaired, one sentence; "" if nothing */
} document;

/* Read a file; "-" is standard input. On failure *out is empty and err says what to do.
 * Errors: IO, ARG (a directory), FORMAT (empty, binary, damaged), UNSUPPORTED (a format that this
 * build does not read), LIMIT (longer than DOC_LIMIT), NOMEM. */
kvf_status doc_open(document *out, const char *path, kvf_error *err);

/* The same for bytes in memory; `name` gives the title and the extension. limit 0: DOC_LIMIT. */
kvf_status doc_from_bytes(document *out, const char *name, const void *bytes, size_t n, size_t limit,
                          kvf_error *err);

void doc_close(document *d);

/* ---- Readers: doc->text.max is set; they append to doc->text and may set title, note, pages. */

typedef struct doc_bytes {
    const char *name; /* for messages */
    const char *v;    /* [n] */
    size_t n;
} doc_bytes;

kvf_status doc_read_text(document *d, const doc_bytes *in, kvf_error *err);
kvf_status doc_read_html(document *d, const doc_bytes *in, kvf_error *err);
kvf_status doc_read_pdf(document *d, const doc_bytes *in, kvf_error *err);

/* Unpack gzip data (all members) into out; out->max limits it. */
kvf_status doc_gunzip(buffer *out, const doc_bytes *in, kvf_error *err);

#endif
