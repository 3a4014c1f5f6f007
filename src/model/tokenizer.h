/* tokenizer.h - text to tokens and back, from the vocabulary in a GGUF file.
 *
 * Kinds: byte-pair encoding over bytes ("gpt2" in the file) with the pre-tokeniser named by
 * tokenizer.ggml.pre (table in tok_bpe.c: qwen2, llama-bpe, ...); SentencePiece-style merging by score
 * ("llama" in the file: llama-2, mistral, gemma). Anything else is UNSUPPORTED by name.
 * Read-only after open: any number of threads may tokenise.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_TOKENIZER_H
#define KVF_MODEL_TOKENIZER_H

#include "model/gguf.h"

typedef struct kvf_tokenizer kvf_tokenizer;

/* g must outlive the tokenizer. Errors: FORMAT, UNSUPPORTED, NOMEM. */
kvf_status kvf_tokenizer_open(kvf_tokenizer **out, const kvf_gguf *g, const kvf_mem *mem, kvf_error *err);
void kvf_tokenizer_close(kvf_tokenizer *t);

int32_t kvf_tokenizer_n_vocab(const kvf_tokenizer *t);
const char *kvf_tokenizer_kind(const kvf_tokenizer *t); /* "bpe/qwen2", "spm" */
kvf_token kvf_tokenizer_bos(const kvf_tokenizer *t);    /* KVF_TOKEN_NONE if there is none */
kvf_token kvf_tokenizer_eos(const kvf_tokenizer *t);
bool kvf_tokenizer_add_bos(const kvf_tokenizer *t);
bool kvf_tokenizer_space_prefix(const kvf_tokenizer *t); /* a space is put in front of text (llama-2) */
bool kvf_tokenizer_is_end(const kvf_tokenizer *t, kvf_token token); /* eos, eot, eom, <end_of_turn>... */

/* Token of exactly this vocabulary entry ("<|im_end|>"), or KVF_TOKEN_NONE. */
kvf_token kvf_tokenizer_find(const kvf_tokenizer *t, const char *name, size_t n);
const char *kvf_tokenizer_name(const kvf_tokenizer *t, kvf_token token, size_t *n);
void kvf_tokenizer_bytes(const kvf_tokenizer *t, kvf_token token, const char **bytes, size_t *n);

/* Tokens are appended here; grows. */
typedef struct kvf_token_list {
    const kvf_mem *mem;
    kvf_token *v;
    int64_t n, cap;
} kvf_token_list;

/* Append the tokens of text to list, at most n + 16. special: control tokens written in the text
 * are parsed. No BOS is added. Any bytes are valid text. On failure list may hold a part. Errors:
 * NOMEM, INTERNAL. */
kvf_status kvf_tokenizer_encode(const kvf_tokenizer *t, const char *text, size_t n, bool special,
                                kvf_token_list *list, kvf_error *err);

typedef struct kvf_text_part {
    const char *p;
    size_t n;
    bool special;
} kvf_text_part;

/* The same of one text given in parts: control tokens are parsed in the special parts only and
 * never across parts; otherwise the text is tokenised as if it were written in one piece. */
kvf_status kvf_tokenizer_encode_parts(const kvf_tokenizer *t, const kvf_text_part *parts, int64_t n_parts,
                                      kvf_token_list *list, kvf_error *err);
/* Append one token. Errors: NOMEM. */
kvf_status kvf_token_list_push(kvf_token_list *list, kvf_token token, kvf_error *err);

#endif
