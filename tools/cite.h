/* cite.h - from tokens that an answer was read from to a page or lines, and an excerpt.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_CITE_H
#define KVFOLD_TOOLS_CITE_H

#include <cJSON.h>

#include "engine.h"
#include "note.h"
#include "prompt.h"

#define CITE_EXCERPT 160 /* bytes of an excerpt, about */

/* Where bytes of a body are. */
typedef struct cite_place {
    const note_source *source; /* NULL: in none, as between two documents */
    int64_t page;              /* from 1; 0: no pages */
    int64_t first_line, last_line; /* from 1; 0: no lines */
    size_t from, to;           /* bytes of the body an excerpt may come from: the page, or the source */
} cite_place;

/* Place of body[from..to), whose most telling byte is peak: from <= peak < to. */
void cite_find(cite_place *out, const note *about, const char *body, size_t n, size_t from, size_t peak, size_t to);

/* Append the sentence around text[peak], with neighbours while they fit in about `width` bytes, on one
 * line, without control characters; "..." where it is cut. */
void cite_excerpt(buffer *out, const char *text, size_t n, size_t peak, size_t width);

typedef struct citation {
    cite_place place;
    int64_t first_token, n_tokens; /* of the timeline */
    float share;
    buffer excerpt;
} citation;

/* A document as its tokens say it. */
typedef struct cite_text {
    buffer body;
    size_t *start; /* [n_tokens + 1] byte of body where token first_token + i begins; owned */
    int64_t first_token, n_tokens;
} cite_text;

kvf_status cite_text_open(cite_text *out, const engine *e, const note *about, const token_list *prefix,
                          kvf_error *err);
void cite_text_close(cite_text *t);

/* The passages that the last answer was read from, best first; passages of one page that touch are one.
 * out is [cap]; returns how many. cite_free each. */
size_t cite_gather(citation *out, size_t cap, engine *e, const note *about, const cite_text *text);

/* "[1] policy.pdf, page 57: ..." on standard output. */
void cite_print(const citation *c, size_t n);
void cite_json(cJSON *list, const citation *c, size_t n);
void cite_free(citation *c, size_t n);

#endif
