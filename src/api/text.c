/* text.c - tokenizer and chat functions of kvfold.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "model/model.h"

/* Hand list to a caller's [cap] array and free it. */
static kvf_status give(kvf_token_list *list, kvf_status rc, kvf_token *tokens, int64_t cap, int64_t *n, kvf_error *err)
{
    if (rc >= 0) {
        *n = list->n;
        if (list->n > cap)
            rc = kvf_fail(err, KVF_ERR_LIMIT, "the text has %lld tokens, the array holds %lld", (long long)list->n, (long long)cap);
        else if (list->n > 0)
            memcpy(tokens, list->v, (size_t)list->n * sizeof *tokens);
    }
    kvf_free(list->mem, list->v);
    return rc;
}

kvf_status kvf_tokenize(const kvf_model *m, const char *text, size_t n_bytes, int flags, kvf_token *tokens,
                        int64_t cap, int64_t *n, kvf_error *err)
{
    if (n) *n = 0;
    if (!m || !n || (!text && n_bytes > 0) || cap < 0 || (!tokens && cap > 0))
        return kvf_fail(err, KVF_ERR_ARG, "model, text and n must not be NULL, tokens only with cap 0");
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
    return give(&list, rc, tokens, cap, n, err);
}

kvf_status kvf_chat_tokenize(const kvf_model *m, const char *tmpl, const kvf_chat_message *msgs, int64_t n_msgs,
                             int generate, kvf_token *tokens, int64_t cap, int64_t *n, kvf_error *err)
{
    if (n) *n = 0;
    if (!m || !n || !msgs || n_msgs < 1 || cap < 0 || (!tokens && cap > 0))
        return kvf_fail(err, KVF_ERR_ARG, "model, msgs and n must not be NULL, tokens only with cap 0");
    const kvf_chat_template *c = tmpl ? kvf_chat_find(tmpl) : m->chat;
    if (!c && tmpl)
        return kvf_fail(err, KVF_ERR_NOT_FOUND, "no chat template is called '%.64s'; there are: chatml, llama3, gemma, mistral, none", tmpl);
    if (!c)
        return kvf_fail(err, KVF_ERR_NOT_FOUND,
                        "the model file names no known chat template; choose one of chatml, llama3, gemma, mistral, none");
    for (int64_t i = 0; i < n_msgs; i++)
        if (!msgs[i].role || !msgs[i].content)
            return kvf_fail(err, KVF_ERR_ARG, "message %lld has no %s", (long long)i, msgs[i].role ? "content" : "role");
    kvf_token_list list = { .mem = m->mem };
    kvf_status rc = kvf_chat_encode(c, m->tokenizer, msgs, n_msgs, generate != 0, &list, err);
    return give(&list, rc, tokens, cap, n, err);
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
