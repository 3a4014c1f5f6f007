/* prompt.c - see prompt.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "prompt.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"
#include "store.h"
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

/* ---- Frames in parts ---------------------------------------------------------------------- */

static kvf_status list_join(token_list *out, const token_list *a, const token_list *b, const token_list *c,
                            kvf_error *err)
{
    token_list joined = { 0 };
    kvf_status rc = list_resize(&joined, a->n + b->n + (c ? c->n : 0), err);
    if (rc != KVF_OK) return rc;
    const token_list *const parts[] = { a, b, c };
    for (int i = 0; i < 3; i++) {
        if (!parts[i] || !parts[i]->n) continue;
        memcpy(joined.v + joined.n, parts[i]->v, (size_t)parts[i]->n * sizeof *joined.v);
        joined.n += parts[i]->n;
    }
    token_list_free(out);
    *out = joined;
    return KVF_OK;
}

static bool starts_with_blank(const engine *e, kvf_token token)
{
    const char *bytes = NULL;
    size_t n = 0;
    return kvf_token_bytes(e->model, token, &bytes, &n) == KVF_OK && n && bytes[0] == ' ';
}

kvf_status prompt_answer(token_list *out, const engine *e, bool plain, const char *text, kvf_error *err)
{
    kvf_status rc = prompt_tokenize(out, e->model, text, strlen(text), 0, err);
    if (rc != KVF_OK || !plain || !out->n || starts_with_blank(e, out->v[0])) return rc;
    buffer with = { 0 };
    buffer_printf(&with, " %s", text);
    rc = buffer_status(&with, "the answer", err);
    if (rc == KVF_OK) rc = prompt_tokenize(out, e->model, buffer_text(&with), with.n, 0, err);
    buffer_free(&with);
    return rc;
}

/* Two messages that share no token show what of a frame is the frame's: what they have in common. */
kvf_status prompt_parts_open(prompt_parts *out, const engine *e, const char *tmpl, const char *system,
                             kvf_error *err)
{
    memset(out, 0, sizeof *out);
    kvf_chat_message a[] = { { "system", system, (size_t)-1 }, { "user", "a", 1 } };
    kvf_chat_message b[] = { { "system", system, (size_t)-1 }, { "user", "1", 1 } };
    token_list x = { 0 }, y = { 0 }, alone = { 0 }, none = { 0 };
    kvf_status rc = prompt_frame(&x, e, tmpl, a, 2, err);
    if (rc == KVF_OK) rc = prompt_frame(&y, e, tmpl, b, 2, err);
    if (rc == KVF_OK) rc = prompt_tokenize(&alone, e->model, "a", 1, 0, err);
    if (rc == KVF_OK) {
        int64_t n = x.n < y.n ? x.n : y.n, head = 0, tail = 0;
        while (head < n && x.v[head] == y.v[head]) head++;
        while (tail < n - head && x.v[x.n - 1 - tail] == y.v[y.n - 1 - tail]) tail++;
        out->blank = head < x.n && alone.n && starts_with_blank(e, x.v[head]) && !starts_with_blank(e, alone.v[0]);
        const token_list first = { x.v, head }, last = { x.v + x.n - tail, tail };
        rc = list_join(&out->head, &first, &none, NULL, err);
        if (rc == KVF_OK) rc = list_join(&out->tail, &last, &none, NULL, err);
    }
    token_list_free(&x);
    token_list_free(&y);
    token_list_free(&alone);
    if (rc != KVF_OK) prompt_parts_close(out);
    return rc;
}

void prompt_parts_close(prompt_parts *p)
{
    token_list_free(&p->head);
    token_list_free(&p->tail);
}

kvf_status prompt_prefix(token_list *out, const engine *e, const prompt_parts *p, const char *body, size_t n,
                         kvf_error *err)
{
    buffer text = { 0 };
    token_list own = { 0 };
    if (p->blank) buffer_add_char(&text, ' ');
    buffer_add(&text, body, n);
    kvf_status rc = buffer_status(&text, "the documents", err);
    if (rc == KVF_OK) rc = prompt_tokenize(&own, e->model, buffer_text(&text), text.n, 0, err);
    if (rc == KVF_OK) rc = list_join(out, &p->head, &own, NULL, err);
    token_list_free(&own);
    buffer_free(&text);
    return rc;
}

kvf_status prompt_complete(token_list *out, const engine *e, const prompt_parts *p, const token_list *prefix,
                           const char *question, kvf_error *err)
{
    buffer text = { 0 };
    token_list own = { 0 };
    buffer_add_text(&text, "\n\n");
    utf8_add_clean(&text, question, strlen(question), UTF8_KEEP);
    buffer_trim_end(&text);
    kvf_status rc = buffer_status(&text, "the prompt", err);
    if (rc == KVF_OK) rc = prompt_tokenize(&own, e->model, buffer_text(&text), text.n, 0, err);
    if (rc == KVF_OK) {
        /* Some tokenizers put a blank in front of every text; this one goes on where another ended. */
        const char *bytes = NULL;
        size_t len = 0;
        bool drop = own.n > 1 && kvf_token_bytes(e->model, own.v[0], &bytes, &len) == KVF_OK && len == 1 &&
                    bytes[0] == ' ';
        const token_list rest = { own.v + drop, own.n - drop };
        rc = list_join(out, prefix, &rest, &p->tail, err);
    }
    token_list_free(&own);
    buffer_free(&text);
    return rc;
}

kvf_status prompt_documents(buffer *out, const document *docs, size_t n, size_t *first, kvf_error *err)
{
    for (size_t i = 0; i < n; i++) {
        if (i) buffer_add_text(out, "\n\n");
        if (n > 1) buffer_printf(out, "Document %zu: %s\n\n", i + 1, docs[i].title);
        if (first) first[i] = out->n;
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
        "%s fit%s%s%s. About the first %.2g%% could be read: give a part of the text%s; or let --policy " STORE_POLICY
        " read it into a store.",
        about ? "about " : "", report_count(a, n), report_count(b, e->n_ctx),
        longer ? " as --ctx says (the model can do " : ", all that this model was trained for",
        longer ? report_count(c, e->info.n_ctx_train) : "", longer ? ")" : "",
        (double)e->n_ctx * 97.0 / (double)(n ? n : 1), /* 3 % for the frame and the answer */
        longer ? ", or raise --ctx" : ", or use a model with a longer context");
}

kvf_status prompt_estimate(const engine *e, const char *text, size_t n, int64_t *n_about, kvf_error *err)
{
    size_t sample = n < SAMPLE_BYTES ? n : SAMPLE_BYTES;
    while (sample < n && sample && ((unsigned char)text[sample] & 0xc0) == 0x80) sample--;
    *n_about = 0;
    if (!sample) return KVF_OK;
    kvf_token_buf counted = { 0 };
    kvf_status rc = kvf_tokenize(e->model, text, sample, 0, &counted, err);
    if (rc != KVF_OK && rc != KVF_ERR_LIMIT) return rc;
    *n_about = (int64_t)((double)counted.n * ((double)n / (double)sample));
    return KVF_OK;
}

kvf_status prompt_check_text(const engine *e, const char *text, size_t n, kvf_error *err)
{
    if (n <= SAMPLE_BYTES) return KVF_OK;
    int64_t n_about = 0;
    kvf_status rc = prompt_estimate(e, text, n, &n_about, err);
    if (rc != KVF_OK) return rc;
    return n_about < e->n_ctx ? KVF_OK : too_long(e, n_about, true, err);
}

kvf_status prompt_check(const engine *e, int64_t n, kvf_error *err)
{
    return n <= e->n_ctx - MIN_ANSWER ? KVF_OK : too_long(e, n, false, err);
}
