/* 03_reuse_a_prefix.c - the second question does not read the document again.
 *
 * kvf_session_sync makes the session equal a list of tokens. What it holds already, from the
 * start up to the first difference, is kept; only the rest is computed. So put what stays (the
 * document) first and what changes (the question) last. The statistics prove it.
 *
 *     03_reuse_a_prefix MODEL.gguf
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include <kvfold/kvfold.h>

enum { CAP = 4096 };

/* A small document; the lesson is the same at 100 pages. */
static const char document[] =
    "House rules. 1. The front door is locked from ten in the evening to six in the morning. "
    "2. Bicycles belong in the shed behind the house. 3. Laundry may hang in the attic for two "
    "days. 4. Who finds a lamp broken tells the caretaker, Mrs. Novak, on the ground floor. "
    "5. Glass and paper are collected on the first Tuesday of a month.\n\n";

static kvf_status ask(kvf_session *session, const kvf_model *model, const char *question, kvf_error *err)
{
    char text[1024];
    snprintf(text, sizeof text, "%sQuestion: %s\nAnswer:", document, question);
    kvf_token tokens[CAP];
    kvf_token_buf buf = { .v = tokens, .cap = CAP };
    kvf_status rc = kvf_tokenize(model, text, strlen(text), KVF_TOKENIZE_BOS, &buf, err);
    if (rc < 0) return rc;

    kvf_session_stats_reset(session);
    rc = kvf_session_sync(session, buf.v, buf.n, err);
    if (rc < 0) return rc;
    printf("Q: %s\nA:", question);
    for (int i = 0; i < 24 && rc == KVF_OK; i++) {
        kvf_token token;
        const char *bytes;
        size_t n_bytes;
        rc = kvf_session_next(session, &token, err);
        if (rc != KVF_OK || kvf_token_bytes(model, token, &bytes, &n_bytes) != KVF_OK) break;
        if (memchr(bytes, '\n', n_bytes)) break; /* one line is the answer */
        fwrite(bytes, 1, n_bytes, stdout);
    }

    kvf_stats stats = { .size = sizeof stats };
    if (rc >= 0) rc = kvf_session_stats(session, &stats, err);
    if (rc >= 0)
        printf("\n   %lld tokens: %lld were there, %lld computed in %.0f ms\n\n",
               (long long)stats.n_prompt_tokens, (long long)stats.n_reused_tokens,
               (long long)stats.n_computed_tokens, stats.prefill_ms);
    return rc;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }
    kvf_error err = { 0 };
    kvf_ctx *ctx = NULL;
    kvf_model *model = NULL;
    kvf_session *session = NULL;
    kvf_stats stats = { .size = sizeof stats };
    kvf_status rc = kvf_ctx_open(&ctx, NULL, &err);
    if (rc == KVF_OK) rc = kvf_model_open(&model, ctx, argv[1], &err);
    if (rc == KVF_OK) rc = kvf_session_open(&session, model, NULL, &err);
    if (rc == KVF_OK) rc = ask(session, model, "When is the front door locked?", &err);
    if (rc >= 0) rc = ask(session, model, "Whom do I tell about a broken lamp?", &err);
    if (rc >= 0) rc = kvf_session_stats(session, &stats, &err);
    if (rc < 0) fprintf(stderr, "%s: %s\n", kvf_status_name(rc), err.msg);
    kvf_session_close(session);
    kvf_model_close(model);
    kvf_ctx_close(ctx);
    /* The promise of this lesson, checked: the document was there when the second question came. */
    return rc >= 0 && stats.n_reused_tokens > stats.n_computed_tokens ? 0 : 1;
}
