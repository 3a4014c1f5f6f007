/* prompt.c - see prompt.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "prompt.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"
#include "utf8.h"

/* A text longer than this is sampled before it is tokenised whole; a second's work. */
#define SAMPLE_BYTES ((size_t)4 << 20)

/* Shortest room for an answer that is worth reading a document for. */
#define MIN_ANSWER 8

void token_list_free(token_list *t)
{
    free(t->v);
    *t = (token_list){ 0 };
}

static kvf_status list_resize(token_list *t, int64_t cap, kvf_error *err)
{
    token_list_free(t);
    if (cap < 16) cap = 16;
    if ((uint64_t)cap < SIZE_MAX / sizeof *t->v) t->v = malloc((size_t)cap * sizeof *t->v);
    if (!t->v) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for %lld tokens.", (long long)cap);
    return KVF_OK;
}

kvf_status prompt_tokenize(token_list *out, const kvf_model *m, const char *text, size_t n, int flags,
                           kvf_error *err)
{
    /* Most texts have under a token for two bytes; else the first call tells the size. */
    int64_t cap = (int64_t)(n / 2) + 64;
    for (;;) {
        kvf_status rc = list_resize(out, cap, err);
        if (rc != KVF_OK) return rc;
        kvf_token_buf buf = { .v = out->v, .cap = cap };
        rc = kvf_tokenize(m, text, n, flags, &buf, err);
        if (rc != KVF_ERR_LIMIT || buf.n <= cap) {
            out->n = rc == KVF_OK ? buf.n : 0;
            return rc;
        }
        cap = buf.n;
    }
}

bool prompt_is_plain(const engine *e, const char *tmpl)
{
    return tmpl ? strcmp(tmpl, "plain") == 0 : !e->info.chat_template || !e->info.chat_template[0];
}

static size_t message_bytes(const kvf_chat_message *m)
{
    return m->n_bytes == (size_t)-1 ? strlen(m->content) : m->n_bytes;
}

static kvf_status frame_plain(token_list *out, const engine *e, const kvf_chat_message *msgs, int64_t n_msgs,
                              kvf_error *err)
{
    buffer text = { 0 };
    for (int64_t i = 0; i < n_msgs; i++) {
        if (strcmp(msgs[i].role, "system") == 0) continue;
        bool user = strcmp(msgs[i].role, "user") == 0;
        if (!user) buffer_add_char(&text, ' ');
        buffer_add(&text, msgs[i].content, message_bytes(&msgs[i]));
        buffer_add_text(&text, user ? "\nAnswer:" : "\n\n");
    }
    kvf_status rc = buffer_status(&text, "the prompt", err);
    if (rc == KVF_OK) rc = prompt_tokenize(out, e->model, buffer_text(&text), text.n, KVF_TOKENIZE_BOS, err);
    buffer_free(&text);
    return rc;
}

kvf_status prompt_frame(token_list *out, const engine *e, const char *tmpl, const kvf_chat_message *msgs,
                        int64_t n_msgs, kvf_error *err)
{
    if (prompt_is_plain(e, tmpl)) return frame_plain(out, e, msgs, n_msgs, err);
    size_t bytes = 0;
    for (int64_t i = 0; i < n_msgs; i++) bytes += message_bytes(&msgs[i]);
    int64_t cap = (int64_t)(bytes / 2) + 256;
    kvf_chat chat = { .tmpl = tmpl, .messages = msgs, .n_messages = n_msgs, .generate = 1 };
    for (;;) {
        kvf_status rc = list_resize(out, cap, err);
        if (rc != KVF_OK) return rc;
        kvf_token_buf buf = { .v = out->v, .cap = cap };
        rc = kvf_chat_tokenize(e->model, &chat, &buf, err);
        if (rc != KVF_ERR_LIMIT || buf.n <= cap) {
            out->n = rc == KVF_OK ? buf.n : 0;
            return rc;
        }
        cap = buf.n;
    }
}

kvf_status prompt_documents(buffer *out, const document *docs, size_t n, kvf_error *err)
{
    for (size_t i = 0; i < n; i++) {
        if (i) buffer_add_text(out, "\n\n");
        if (n > 1) buffer_printf(out, "Document %zu: %s\n\n", i + 1, docs[i].title);
        buffer_add(out, docs[i].text.v, docs[i].text.n);
    }
    return buffer_status(out, "the documents", err);
}

/* What to do about a text of n tokens; `about` if n is an estimate. */
static kvf_status too_long(const engine *e, int64_t n, bool about, kvf_error *err)
{
    char a[32], b[32], c[32];
    bool longer = e->n_ctx < e->info.n_ctx_train;
    return report_fail(
        err, KVF_ERR_LIMIT,
        "The text is too long for the context: documents, question and frame have %s%s tokens, and "
        "%s fit%s%s%s. About the first %.2g%% could be read: give a part of the text%s.",
        about ? "about " : "", report_count(a, n), report_count(b, e->n_ctx),
        longer ? " as --ctx says (the model can do " : ", all that this model was trained for",
        longer ? report_count(c, e->info.n_ctx_train) : "", longer ? ")" : "",
        (double)e->n_ctx * 97.0 / (double)(n ? n : 1), /* 3 % for the frame and the answer */
        longer ? ", or raise --ctx" : ", or use a model with a longer context");
}

kvf_status prompt_check_text(const engine *e, const char *text, size_t n, kvf_error *err)
{
    if (n <= SAMPLE_BYTES) return KVF_OK;
    size_t sample = SAMPLE_BYTES;
    while (sample && ((unsigned char)text[sample] & 0xc0) == 0x80) sample--;
    kvf_token_buf counted = { 0 };
    kvf_status rc = kvf_tokenize(e->model, text, sample, 0, &counted, err);
    if (rc != KVF_OK && rc != KVF_ERR_LIMIT) return rc;
    if (counted.n < e->n_ctx) return KVF_OK;
    return too_long(e, (int64_t)((double)counted.n * ((double)n / (double)sample)), true, err);
}

kvf_status prompt_check(const engine *e, int64_t n, kvf_error *err)
{
    return n + MIN_ANSWER <= e->n_ctx ? KVF_OK : too_long(e, n, false, err);
}
