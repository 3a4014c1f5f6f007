/* prompt.h - from documents and questions to tokens.
 *
 * The documents come first and the question last, so that every further question on the same
 * documents finds their keys and values in the cache. Models with a chat template get their frame
 * from the library, which never reads control tokens in a document; models without one get plain
 * text that ends in "Answer:".
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_PROMPT_H
#define KVFOLD_TOOLS_PROMPT_H

#include "doc.h"
#include "engine.h"

typedef struct token_list {
    kvf_token *v; /* [n]; owned */
    int64_t n;
} token_list;

/* Tokens of a text. flags: kvf_tokenize_flags. Replaces what the list held. */
kvf_status prompt_tokenize(token_list *out, const kvf_model *m, const char *text, size_t n, int flags,
                           kvf_error *err);

/* Tokens of a conversation that the assistant shall continue. tmpl as in kvf_chat_tokenize, or
 * "plain"; NULL: the model's, or plain if it has none. Plain frames leave the system message out. */
kvf_status prompt_frame(token_list *out, const engine *e, const char *tmpl, const kvf_chat_message *msgs,
                        int64_t n_msgs, kvf_error *err);

/* True if prompt_frame would use plain text: answers then end at a blank line. */
bool prompt_is_plain(const engine *e, const char *tmpl);

/* The documents' text as it stands in front of the question; several get a title each. */
kvf_status prompt_documents(buffer *out, const document *docs, size_t n, kvf_error *err);

/* LIMIT if the text cannot fit the context, found without tokenising all of it: a text of 100 MB
 * is answered at once. OK says nothing yet: see prompt_check. */
kvf_status prompt_check_text(const engine *e, const char *text, size_t n, kvf_error *err);

/* LIMIT if n tokens leave no room for an answer. The message has the count, what fits, and what to
 * do. */
kvf_status prompt_check(const engine *e, int64_t n, kvf_error *err);

void token_list_free(token_list *t);

#endif
