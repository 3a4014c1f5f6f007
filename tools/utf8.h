/* utf8.h - Unicode text from bytes that may be anything.
 *
 * Tokens are byte strings, so a character may arrive in parts: utf8_stream holds an incomplete
 * one back until the rest comes. What leaves these functions is valid UTF-8 (RFC 3629): no
 * overlong forms, no surrogates; a wrong byte becomes U+FFFD.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_UTF8_H
#define KVFOLD_TOOLS_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "buffer.h"

typedef enum utf8_flags {
    UTF8_KEEP = 0,
    UTF8_NO_CONTROLS = 1 /* drop escape sequences' raw material: C0 but \n \t, DEL, C1, and the
                            marks that reorder text on a screen */
} utf8_flags;

/* Length 1..4 of the character at p and its code point; 0 if p[0] starts none; -1 if the n bytes
 * are the beginning of one. n >= 1. cp may be NULL. */
int utf8_decode(const char *p, size_t n, uint32_t *cp);

/* Append a code point; surrogates and values past U+10FFFF become U+FFFD. */
void utf8_add(buffer *out, uint32_t cp);

/* Append bytes as valid UTF-8; returns how many wrong bytes were replaced. */
size_t utf8_add_clean(buffer *out, const char *p, size_t n, int flags);

/* Append Windows-1252 (a superset of Latin-1) and UTF-16 text. */
void utf8_add_latin1(buffer *out, const char *p, size_t n);
void utf8_add_utf16(buffer *out, const char *p, size_t n, bool big_endian);

/* Count characters of two bytes and more, and bytes that belong to none. */
void utf8_survey(const char *p, size_t n, size_t *n_multi, size_t *n_bad);

typedef struct utf8_stream {
    char held[4]; /* start of a character not yet complete */
    size_t n_held;
    int flags; /* utf8_flags */
} utf8_stream;

/* Append what is complete; the rest waits. */
void utf8_stream_push(utf8_stream *s, buffer *out, const char *p, size_t n);

/* The text ends: what still waits becomes U+FFFD. */
void utf8_stream_end(utf8_stream *s, buffer *out);

#endif
