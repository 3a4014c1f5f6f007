/* chat.h - chat frames: ChatML, Llama-3, Gemma, Mistral.
 *
 * A template is a small table of text pieces around roles and contents, not a Jinja program: the
 * file's Jinja text is only matched for the markers that identify a known frame. Pieces are
 * tokenised with control tokens parsed, contents without.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_CHAT_H
#define KVF_MODEL_CHAT_H

#include "model/tokenizer.h"

typedef struct kvf_chat_template kvf_chat_template;

/* The template recognised from tokenizer.chat_template (jinja: NULL if the file has none), or NULL. */
const kvf_chat_template *kvf_chat_recognise(const kvf_str *jinja, const kvf_tokenizer *t);
/* By name: "chatml", "llama3", "gemma", "mistral", "none"; NULL if unknown. */
const kvf_chat_template *kvf_chat_find(const char *name);
const char *kvf_chat_name(const kvf_chat_template *c);
/* i-th name, NULL past the end. */
const char *kvf_chat_name_at(int32_t i);

/* Append the framed conversation. Adds BOS where the frame or the model's rule wants it. Gemma and
 * Mistral have no system role: a system message is put in front of the first user message. Errors:
 * ARG (unknown role), NOMEM. */
kvf_status kvf_chat_encode(const kvf_chat_template *c, const kvf_tokenizer *t, const kvf_chat_message *msgs,
                           int64_t n_msgs, bool generate, kvf_token_list *list, kvf_error *err);

#endif
