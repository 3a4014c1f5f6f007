/* note.h - what is written down beside a stored document: its sources, their pages, its frame.
 *
 * The store keeps it as it is and hands it back (kvf_document.note); it is JSON. With it a passage,
 * which is a run of tokens, becomes a page or lines of a file. A store may come from anywhere, so a
 * note is read like any other foreign file.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_NOTE_H
#define KVFOLD_TOOLS_NOTE_H

#include <stdint.h>

#include "args.h"
#include "doc.h"

#define NOTE_FORMAT 1

typedef struct note_source {
    char *title, *path; /* never NULL; owned. path as given, or absolute where the system could tell */
    char *kind;         /* as document.kind; owned */
    size_t first, n;    /* bytes of the body that are its text */
    size_t *page_start; /* [n_pages] bytes of its text, ascending; owned */
    int64_t n_pages;    /* 0: no pages */
    bool lines;         /* can be named by lines */
} note_source;

typedef struct note {
    note_source *sources; /* [n_sources]; owned */
    size_t n_sources;
    char *tmpl;           /* as --template; NULL: the model's; owned */
    char *system;         /* the system message; owned */
    int64_t first_token;  /* of the document's tokens, the one where the body begins */
    size_t first_byte;    /* of the tokens' bytes, where the body begins */
    uint64_t digest;      /* of the body: tells two documents of one name apart */
} note;

/* Describe docs, which stand at first[i] of the body. The place of the body among the tokens is filled in
 * later. Errors: NOMEM. */
kvf_status note_make(note *out, const document *docs, const arg_texts *paths, const size_t *first, kvf_error *err);

/* Digest of a body. */
uint64_t note_digest(const char *text, size_t n);

/* To JSON, *text is to be freed with cJSON_free; and back. Errors: NOMEM; FORMAT (not a note, or of a newer
 * version). */
kvf_status note_print(const note *n, char **text, kvf_error *err);
kvf_status note_parse(note *out, const void *text, size_t n_bytes, kvf_error *err);

void note_free(note *n);

#endif
