/* prompt.h - from documents and questions to tokens.
 *
 * The documents come first and the question last, so that every further question on the same
 * documents finds their keys and values in the cache. Models with a chat template get their frame
 * from the library, which never reads control tokens in a document; models without one get plain
 * text that ends in "Answer:".
 *
 * Rule: documents and question are tokenised apart, so that a prompt begins with the same tokens
 * whatever is asked. A stored document depends on it.
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

/* What a frame puts in front of the user's words and behind them. */
typedef struct prompt_parts {
    token_list head, tail;
    bool blank; /* the frame has a blank between head and words */
} prompt_parts;

/* Take the frame apart: with a system message, one user message, and the assistant's turn open. */
kvf_status prompt_parts_open(prompt_parts *out, const engine *e, const char *tmpl, const char *system,
                             kvf_error *err);
void prompt_parts_close(prompt_parts *p);

/* Head and documents: what every prompt about them begins with. */
kvf_status prompt_prefix(token_list *out, const engine *e, const prompt_parts *p, const char *body, size_t n,
                         kvf_error *err);

/* prefix, an empty line, the question, the tail. */
kvf_status prompt_complete(token_list *out, const engine *e, const prompt_parts *p, const token_list *prefix,
                           const char *question, kvf_error *err);

/* An answer as it would be written after a prompt: plain frames end in "Answer:", and a blank follows. */
kvf_status prompt_answer(token_list *out, const engine *e, bool plain, const char *text, kvf_error *err);

/* The documents' text as it stands in front of the question; several get a title each. first, if not
 * NULL, is [n]: set to the byte where each one's own text begins. */
kvf_status prompt_documents(buffer *out, const document *docs, size_t n, size_t *first, kvf_error *err);

/* About how many tokens a text has, without tokenising all of a long one: a text of 100 MB is
 * answered at once. */
kvf_status prompt_estimate(const engine *e, const char *text, size_t n, int64_t *n_about, kvf_error *err);

/* LIMIT if by that estimate the text cannot fit the context. OK says nothing yet: see prompt_check. */
kvf_status prompt_check_text(const engine *e, const char *text, size_t n, kvf_error *err);

/* LIMIT if n tokens leave no room for an answer. The message has the count, what fits, and what to
 * do. */
kvf_status prompt_check(const engine *e, int64_t n, kvf_error *err);

void token_list_free(token_list *t);

#endif
