/* buffer.h - a growable run of bytes: documents, answers, JSON.
 *
 * Rule: a failed allocation is remembered in `failed` and every later call does nothing, so a
 * long chain of appends is checked once, at its end, with buffer_status().
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_BUFFER_H
#define KVFOLD_TOOLS_BUFFER_H

#include <stdbool.h>
#include <stddef.h>

#include <kvfold/kvfold.h>

typedef struct buffer {
    char *v; /* [n], then a NUL once anything was added; owned */
    size_t n, cap;
    size_t max;  /* most bytes it may hold; 0: no limit */
    bool failed; /* out of memory */
    bool full;   /* max was reached and something was left out */
} buffer;

void buffer_add(buffer *b, const void *bytes, size_t n);
void buffer_add_text(buffer *b, const char *text);
void buffer_add_char(buffer *b, char c);
void buffer_printf(buffer *b, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Keep the first n bytes. */
void buffer_cut(buffer *b, size_t n);

/* Drop white space at the end. */
void buffer_trim_end(buffer *b);

/* The text, never NULL. */
const char *buffer_text(const buffer *b);

/* OK, NOMEM or LIMIT (max reached); `what` is named in the message. */
kvf_status buffer_status(const buffer *b, const char *what, kvf_error *err);

/* Append what is left of a file descriptor. Errors: IO, NOMEM, LIMIT. */
kvf_status buffer_read(buffer *b, int fd, const char *name, kvf_error *err);

/* Append a file's bytes; "-" is standard input. Directories are refused. */
kvf_status buffer_read_file(buffer *b, const char *path, kvf_error *err);

/* Free the bytes; the buffer is empty and usable again. */
void buffer_free(buffer *b);

#endif
