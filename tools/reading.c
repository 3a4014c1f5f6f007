/* reading.c - see reading.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "reading.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cJSON.h>

#include "interrupt.h"
#include "report.h"
#include "store.h"

const char *reading_system(const char *given, bool with_documents)
{
    if (given) return given;
    return with_documents ? "You are a helpful assistant. Answer from the given text only."
                          : "You are a helpful assistant.";
}

static kvf_status no_memory(kvf_error *err)
{
    return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the documents.");
}

/* Where the body begins: after the tokens of the head, and after a blank that frame or tokenizer put in
 * front of it. */
static void locate_body(reading *r, const engine *e, char first_char)
{
    size_t at = 0;
    for (int64_t i = 0; i < r->prefix.n; i++) {
        const char *bytes = NULL;
        size_t n = 0;
        if (kvf_token_bytes(e->model, r->prefix.v[i], &bytes, &n) != KVF_OK) n = 0;
        if (i >= r->parts.head.n && n) {
            at += bytes[0] == ' ' && first_char != ' ';
            break;
        }
        at += n;
    }
    r->note.first_token = r->parts.head.n;
    r->note.first_byte = at;
}

kvf_status reading_make(reading *r, const engine *e, const reading_input *in, kvf_error *err)
{
    memset(r, 0, sizeof *r);
    buffer body = { 0 };
    size_t n = in->paths->n, *first = calloc(n ? n : 1, sizeof *first);
    kvf_status rc = first ? KVF_OK : no_memory(err);
    if (rc == KVF_OK) rc = prompt_documents(&body, in->docs, n, first, err);
    if (rc == KVF_OK) rc = note_make(&r->note, in->docs, in->paths, first, err);
    free(first);
    if (rc == KVF_OK) {
        const char *system = reading_system(in->system, true);
        r->note.digest = note_digest(buffer_text(&body), body.n);
        r->note.system = strdup(system);
        if (in->tmpl) r->note.tmpl = strdup(in->tmpl);
        if (!r->note.system || (in->tmpl && !r->note.tmpl)) rc = no_memory(err);
        if (rc == KVF_OK) rc = prompt_parts_open(&r->parts, e, in->tmpl, system, err);
    }
    if (rc == KVF_OK) rc = prompt_prefix(&r->prefix, e, &r->parts, buffer_text(&body), body.n, err);
    if (rc == KVF_OK) locate_body(r, e, buffer_text(&body)[0]);
    buffer_free(&body);
    if (rc != KVF_OK) reading_close(r);
    return rc;
}

/* ---- Into a store ------------------------------------------------------------------------ */

/* Is `doc` the document that n describes, or an earlier state of the same file? */
static bool is_same(const kvf_document *doc, const note *n)
{
    note there;
    if (note_parse(&there, doc->note, doc->note_bytes, NULL) != KVF_OK) return false;
    bool same = there.digest == n->digest;
    if (!same && there.n_sources == n->n_sources) {
        same = true;
        for (size_t i = 0; i < n->n_sources; i++)
            same = same && strcmp(there.sources[i].path, n->sources[i].path) == 0;
    }
    note_free(&there);
    return same;
}

kvf_status reading_name(char *out, size_t cap, kvf_store *st, const char *wanted, const note *n, kvf_error *err)
{
    for (int i = 1; i < 1000; i++) {
        if (i == 1)
            snprintf(out, cap, "%s", wanted);
        else
            snprintf(out, cap, "%s (%d)", wanted, i);
        kvf_document doc = { .size = sizeof doc };
        kvf_status rc = kvf_store_find(st, out, &doc, err);
        if (rc == KVF_ERR_NOT_FOUND) return KVF_OK;
        if (rc != KVF_OK) return rc;
        bool same = is_same(&doc, n);
        kvf_document_free(st, &doc);
        if (same) return KVF_OK;
    }
    return report_fail(err, KVF_ERR_ARG, "There are a thousand documents called '%.100s'; choose a --name.", wanted);
}

/* Tokens of `name` in the store; complete may be NULL. */
static int64_t tokens_there(kvf_store *st, const char *name, bool *complete)
{
    kvf_document doc = { .size = sizeof doc };
    if (complete) *complete = false;
    if (kvf_store_find(st, name, &doc, NULL) != KVF_OK) return 0;
    int64_t n = doc.n_tokens;
    if (complete) *complete = doc.complete != 0;
    kvf_document_free(st, &doc);
    return n;
}

static void say_what_is_kept(kvf_store *st, const char *name, int64_t total)
{
    char a[32], b[32];
    int64_t kept = tokens_there(st, name, NULL);
    report_note("'%s': %s of %s tokens are kept; the same command goes on from there", name, report_count(a, kept),
                report_count(b, total));
}

kvf_status reading_ingest(reading *r, engine *e, kvf_store *st, const char *name, reading_result *result,
                          kvf_error *err)
{
    memset(result, 0, sizeof *result);
    char *text = NULL;
    kvf_status rc = note_print(&r->note, &text, err);
    if (rc != KVF_OK) return rc;
    bool complete = false;
    result->n_before = tokens_there(st, name, &complete);
    kvf_ingest in = { .size = sizeof in, .name = name, .tokens = r->prefix.v, .n = r->prefix.n,
                      .note = text, .note_bytes = strlen(text) };
    double start = clock_s();
    kvf_session_stats_reset(e->session);
    progress_start(&e->bar, "Reading", e->quiet);
    interrupt_attach(e->session);
    rc = kvf_session_ingest(e->session, st, &in, err);
    progress_clear(&e->bar);
    cJSON_free(text);
    kvf_stats s = { .size = sizeof s };
    if (kvf_session_stats(e->session, &s, NULL) == KVF_OK) result->n_computed = s.n_computed_tokens;
    result->seconds = clock_s() - start;
    result->there = rc == KVF_OK && complete;
    free(r->name);
    r->name = rc == KVF_OK ? strdup(name) : NULL;
    if (rc == KVF_ERR_CANCELLED && !r->temporary[0] && !e->quiet) say_what_is_kept(st, name, r->prefix.n);
    return rc;
}

/* ---- From a store ------------------------------------------------------------------------ */

kvf_status reading_load(reading *r, engine *e, const char *name, kvf_error *err)
{
    kvf_document doc;
    kvf_status rc = store_choose(r->store, name, &doc, err);
    if (rc != KVF_OK) return rc;
    rc = note_parse(&r->note, doc.note, doc.note_bytes, err);
    if (rc == KVF_OK) r->name = strdup(doc.name);
    if (rc == KVF_OK) rc = r->name ? kvf_session_load(e->session, r->store, r->name, err) : no_memory(err);
    kvf_document_free(r->store, &doc);
    if (rc != KVF_OK) return rc;
    const kvf_token *tokens = NULL;
    int64_t n = kvf_session_tokens(e->session, &tokens);
    r->prefix.v = n > 0 ? malloc((size_t)n * sizeof *r->prefix.v) : NULL;
    if (!r->prefix.v) return no_memory(err);
    memcpy(r->prefix.v, tokens, (size_t)n * sizeof *r->prefix.v);
    r->prefix.n = n;
    return prompt_parts_open(&r->parts, e, r->note.tmpl, r->note.system, err);
}

kvf_status reading_again(reading *r, engine *e, kvf_error *err)
{
    const kvf_token *tokens = NULL;
    if (!r->name || !r->store || kvf_session_tokens(e->session, &tokens) == r->prefix.n) return KVF_OK;
    return kvf_session_load(e->session, r->store, r->name, err);
}

size_t reading_cite(reading *r, engine *e, citation *out, size_t cap)
{
    if (!cap || !r->prefix.n) return 0;
    if (!r->has_text && cite_text_open(&r->text, e, &r->note, &r->prefix, NULL) != KVF_OK) return 0;
    r->has_text = true;
    return cite_gather(out, cap, e, &r->note, &r->text);
}

void reading_close(reading *r)
{
    note_free(&r->note);
    prompt_parts_close(&r->parts);
    token_list_free(&r->prefix);
    cite_text_close(&r->text);
    free(r->name);
    kvf_store_close(r->store);
    store_temporary_remove(r->temporary);
    memset(r, 0, sizeof *r);
}
