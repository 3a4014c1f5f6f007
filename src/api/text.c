/* text.c - tokenizer and chat functions of kvfold.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "model/model.h"

/* Hand list to the caller's buffer and free it. */
static kvf_status give(kvf_token_list *list, kvf_status rc, kvf_token_buf *out, kvf_error *err)
{
    if (rc >= 0) {
        out->n = list->n;
        if (list->n > out->cap)
            rc = kvf_fail(err, KVF_ERR_LIMIT, "the text has %lld tokens, the buffer holds %lld", (long long)list->n,
                          (long long)out->cap);
        else if (list->n > 0)
            memcpy(out->v, list->v, (size_t)list->n * sizeof *out->v);
    }
    kvf_free(list->mem, list->v);
    return rc;
}

static kvf_status check_buf(kvf_token_buf *out, kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    out->n = 0;
    if (out->cap < 0 || (!out->v && out->cap > 0))
        return kvf_fail(err, KVF_ERR_ARG, "out has no array of %lld tokens; give one, or cap 0 to count", (long long)out->cap);
    return KVF_OK;
}

kvf_status kvf_tokenize(const kvf_model *m, const char *text, size_t n_bytes, int flags, kvf_token_buf *out,
                        kvf_error *err)
{
    KVF_TRY(check_buf(out, err));
    if (!m || (!text && n_bytes > 0)) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", m ? "text" : "model");
    if (flags & ~(KVF_TOKENIZE_SPECIAL | KVF_TOKENIZE_BOS))
        return kvf_fail(err, KVF_ERR_ARG, "flags is %d; use KVF_TOKENIZE_SPECIAL and KVF_TOKENIZE_BOS", flags);
    kvf_token_list list = { .mem = m->mem };
    kvf_status rc = KVF_OK;
    if ((flags & KVF_TOKENIZE_BOS) && kvf_tokenizer_add_bos(m->tokenizer)) {
        void *block;
        rc = kvf_mem_get(m->mem, &block, 1, sizeof(kvf_token), err);
        if (rc < 0) return rc;
        list.v = block;
        list.cap = 1;
        list.v[list.n++] = kvf_tokenizer_bos(m->tokenizer);
    }
    if (n_bytes > 0) rc = kvf_tokenizer_encode(m->tokenizer, text, n_bytes, flags & KVF_TOKENIZE_SPECIAL, &list, err);
    return give(&list, rc, out, err);
}

kvf_status kvf_chat_tokenize(const kvf_model *m, const kvf_chat *chat, kvf_token_buf *out, kvf_error *err)
{
    KVF_TRY(check_buf(out, err));
    if (!m || !chat) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", m ? "chat" : "model");
    if (!chat->messages || chat->n_messages < 1) return kvf_fail(err, KVF_ERR_ARG, "the chat has no messages");
    const kvf_chat_template *c = chat->tmpl ? kvf_chat_find(chat->tmpl) : m->chat;
    if (!c && chat->tmpl)
        return kvf_fail(err, KVF_ERR_NOT_FOUND,
                        "no chat template is called '%.64s'; there are: chatml, llama3, gemma, mistral, none", chat->tmpl);
    if (!c)
        return kvf_fail(err, KVF_ERR_NOT_FOUND,
                        "the model file names no known chat template; choose one of chatml, llama3, gemma, mistral, none");
    for (int64_t i = 0; i < chat->n_messages; i++)
        if (!chat->messages[i].role || !chat->messages[i].content)
            return kvf_fail(err, KVF_ERR_ARG, "message %lld has no %s", (long long)i,
                            chat->messages[i].role ? "content" : "role");
    kvf_token_list list = { .mem = m->mem };
    kvf_status rc = kvf_chat_encode(c, m->tokenizer, chat->messages, chat->n_messages, chat->generate != 0, &list, err);
    return give(&list, rc, out, err);
}

kvf_status kvf_token_bytes(const kvf_model *m, kvf_token token, const char **bytes, size_t *n)
{
    if (!m || !bytes || !n || token < 0 || token >= m->hp.n_vocab) return KVF_ERR_ARG;
    kvf_tokenizer_bytes(m->tokenizer, token, bytes, n);
    return KVF_OK;
}

const char *kvf_token_name(const kvf_model *m, kvf_token token, size_t *n)
{
    if (!m || !n || token < 0 || token >= m->hp.n_vocab) return NULL;
    return kvf_tokenizer_name(m->tokenizer, token, n);
}

int kvf_token_is_end(const kvf_model *m, kvf_token token)
{
    return m && token >= 0 && token < m->hp.n_vocab && kvf_tokenizer_is_end(m->tokenizer, token);
}
