/* reading.h - documents as a prompt begins with them, and how they get into a session: read there and
 * then, read into a store, or loaded from one.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_READING_H
#define KVFOLD_TOOLS_READING_H

#include "cite.h"
#include "engine.h"
#include "note.h"
#include "prompt.h"

typedef struct reading {
    note note;
    prompt_parts parts;  /* the frame */
    token_list prefix;   /* head and body: what every prompt begins with */
    cite_text text;      /* made when the first answer is cited */
    bool has_text;
    char *name;          /* in the store; owned */
    kvf_store *store;    /* that the session reads from; NULL: none. Closed after the session */
    char temporary[512]; /* folder that goes with the reading; "": none */
} reading;

/* The system message of a prompt: `given`, or the usual one for prompts with or without documents. */
const char *reading_system(const char *given, bool with_documents);

typedef struct reading_input {
    const document *docs; /* [paths->n] */
    const arg_texts *paths;
    const char *tmpl, *system; /* as the options say; may be NULL */
} reading_input;

/* Tokenise documents in their frame. */
kvf_status reading_make(reading *r, const engine *e, const reading_input *in, kvf_error *err);

typedef struct reading_result {
    bool there;          /* nothing was left to do */
    int64_t n_before;    /* tokens that an earlier call under this name had read */
    int64_t n_computed;
    double seconds;
} reading_result;

/* Read it into a store under `name`; it is the session's timeline then. After CANCELLED a
 * note says what is kept. */
kvf_status reading_ingest(reading *r, engine *e, kvf_store *st, const char *name, reading_result *result,
                          kvf_error *err);

/* Name of a document in a store: `wanted`, or "wanted (2)" and so on if that is another file's. */
kvf_status reading_name(char *out, size_t cap, kvf_store *st, const char *wanted, const note *n, kvf_error *err);

/* Load the document of a store (NULL: the only one). r->store is open, the session too. */
kvf_status reading_load(reading *r, engine *e, const char *name, kvf_error *err);

/* Ready for another question: the session holds the stored document and nothing else, so that an answer
 * does not depend on what was asked before. Computes nothing; nothing to do without a store. */
kvf_status reading_again(reading *r, engine *e, kvf_error *err);

/* Cite the last answer: at most cap citations. cite_free them. */
size_t reading_cite(reading *r, engine *e, citation *out, size_t cap);

/* Free all; closes the store, so the session must be closed. */
void reading_close(reading *r);

#endif
