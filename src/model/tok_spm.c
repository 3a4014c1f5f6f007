/* tok_spm.c - SentencePiece merging by score, as in llama-2, Mistral and Gemma files.
 *
 * Characters merge wherever the two together are a token, the highest score first. A space is
 * U+2581 in the names; here names are turned into text once, at open, and text is matched as it
 * is. Characters without a token become their bytes' tokens <0x00>..<0xFF>.
 * The algorithm knows no words: a run of text is one piece. But no merge can cross a place where
 * the two bytes around it are neighbours in no token, and in practice that is before nearly every
 * space, so runs are cut there (`joins`) and the result stays exactly the same.
 * [Kudo and Richardson 2018, SentencePiece, arXiv:1808.06226, "BPE" model type]
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/tok_int.h"

#include <string.h>

#define SPACE "\xe2\x96\x81" /* U+2581 */

static size_t copy_spaced(char *out, const char *p, size_t n)
{
    size_t m = 0;
    for (size_t i = 0; i < n;) {
        if (n - i >= 3 && memcmp(p + i, SPACE, 3) == 0) {
            out[m++] = ' ';
            i += 3;
        } else {
            out[m++] = p[i++];
        }
    }
    return m;
}

/* False for a name with a real blank: such a token is found as user-defined text only. */
bool kvf_tok_spm_decode(const kvf_str *raw, char *out, size_t *n)
{
    *n = copy_spaced(out, raw->p, raw->n);
    return !memchr(raw->p, ' ', raw->n);
}

/* ---- Open ------------------------------------------------------------------------------- */

/* Order of the floats as order of integers, reversed; NaN (a hostile file) comes last. */
static uint32_t prio_of(float score)
{
    uint32_t u;
    if (!(score == score)) return KVF_TOK_NO_PRIO - 1;
    score += 0.0f; /* -0 and +0 are equal scores */
    memcpy(&u, &score, sizeof u);
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return ~u < KVF_TOK_NO_PRIO - 1 ? ~u : KVF_TOK_NO_PRIO - 1;
}

static void find_byte_tokens(kvf_tokenizer *t)
{
    static const char digit[] = "0123456789ABCDEF";
    for (int b = 0; b < 256; b++) {
        char name[6] = { '<', '0', 'x', digit[b >> 4], digit[b & 15], '>' }, c = (char)b;
        t->byte_token[b] = kvf_tokenizer_find(t, name, sizeof name);
        if (t->byte_token[b] < 0) t->byte_token[b] = kvf_tok_lookup(t, &c, 1);
    }
}

kvf_status kvf_tok_spm_open(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err)
{
    const kvf_gguf_kv *kv = kvf_gguf_find(g, "tokenizer.ggml.scores");
    if (!kv || kv->type != KVF_GGUF_ARR || kv->elem != KVF_GGUF_F32 || kv->count != t->n_vocab)
        return kvf_fail(
            err, KVF_ERR_FORMAT,
            "tokenizer.ggml.scores must be %d f32, one per token, but is %s; convert the model again",
            t->n_vocab, kv ? "not" : "missing");
    KVF_TRY(kvf_gguf_get_bool_or(g, "tokenizer.ggml.add_space_prefix", true, &t->space_prefix, err));
    void *p;
    KVF_TRY(kvf_mem_get(t->mem, &p, (size_t)t->n_vocab, sizeof *t->prio, err));
    t->prio = p;
    for (int32_t i = 0; i < t->n_vocab; i++) {
        float score;
        memcpy(&score, kv->data + (size_t)i * sizeof score, sizeof score);
        t->prio[i] = prio_of(score);
        if (!t->mergeable[i]) continue;
        const char *key = t->bytes + t->at[i];
        for (size_t k = 1; k < t->at[i + 1] - t->at[i]; k++) {
            uint32_t bit = (uint32_t)(unsigned char)key[k - 1] << 8 | (unsigned char)key[k];
            t->joins[bit >> 5] |= 1u << (bit & 31);
        }
    }
    find_byte_tokens(t);
    return KVF_OK;
}

/* ---- Encode ----------------------------------------------------------------------------- */

void kvf_tok_spm_pair(const kvf_tokenizer *t, const char *piece, kvf_tok_sym *left, const kvf_tok_sym *right,
                      uint32_t end)
{
    (void)right;
    left->prio = KVF_TOK_NO_PRIO;
    if (end - left->at > t->max_key) return;
    left->join = kvf_tok_lookup(t, piece + left->at, end - left->at);
    if (left->join >= 0) left->prio = t->prio[left->join];
}

static kvf_status emit(const kvf_tokenizer *t, const char *p, const kvf_tok_sym *sym, kvf_token_list *list,
                       kvf_error *err)
{
    if (sym[0].id >= 0) return kvf_token_list_push(list, sym[0].id, err);
    for (uint32_t i = sym[0].at; i < sym[1].at; i++) {
        kvf_token id = t->byte_token[(unsigned char)p[i]];
        if (id < 0) id = t->unk;
        if (id >= 0) KVF_TRY(kvf_token_list_push(list, id, err));
    }
    return KVF_OK;
}

static size_t char_len(const char *p, size_t n)
{
    size_t len = (unsigned char)p[0] < 0x80 ? 1 : kvf_tok_utf8(p, n);
    return len ? len : 1; /* a byte that is not UTF-8 is a character of its own */
}

/* Encode the leading characters of p up to the first place nothing merges across; *used bytes. */
static kvf_status encode_piece(const kvf_tokenizer *t, kvf_tok_scratch *s, const kvf_str *text, size_t *used,
                               kvf_token_list *list, kvf_error *err)
{
    const char *p = text->p;
    size_t limit = text->n < KVF_TOK_MAX_PIECE ? text->n : KVF_TOK_MAX_PIECE, end = 0, n = 0;
    for (bool joined = true; joined && end < limit; n++) {
        end += char_len(p + end, text->n - end);
        if (end >= limit) continue;
        uint32_t bit = (uint32_t)(unsigned char)p[end - 1] << 8 | (unsigned char)p[end];
        joined = t->joins[bit >> 5] >> (bit & 31) & 1;
    }
    *used = end;
    KVF_TRY(kvf_tok_room(s, n, err));
    kvf_tok_sym *sym = s->sym;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        size_t len = char_len(p + at, text->n - at);
        sym[i].at = (uint32_t)at;
        sym[i].id = kvf_tok_lookup(t, p + at, len);
        sym[i].prio = KVF_TOK_NO_PRIO;
        at += len;
    }
    sym[n].at = (uint32_t)at;
    if (n > 1) KVF_TRY(kvf_tok_merge(t, s, p, &n, err));
    for (size_t i = 0; i < n; i++) KVF_TRY(emit(t, p, &sym[i], list, err));
    return KVF_OK;
}

/* The text with the space in front and U+2581 as the space it means, in s->text. */
static kvf_status normalise(kvf_tok_scratch *s, kvf_str *text, bool prefix, kvf_error *err)
{
    void *buf = s->text;
    KVF_TRY(kvf_reserve(s->mem, &buf, &s->text_cap, (int64_t)text->n + 1, 1, err));
    s->text = buf;
    if (prefix) s->text[0] = ' ';
    size_t n = copy_spaced(s->text + prefix, text->p, text->n);
    *text = (kvf_str){ s->text, n + prefix };
    return KVF_OK;
}

static bool has_space_sign(const char *p, size_t n)
{
    for (const char *end = p + n; (p = memchr(p, 0xE2, (size_t)(end - p))) != NULL; p++)
        if (end - p >= 3 && memcmp(p, SPACE, 3) == 0) return true;
    return false;
}

kvf_status kvf_tok_spm_encode(const kvf_tokenizer *t, kvf_tok_scratch *s, const kvf_str *text, bool prefix,
                              kvf_token_list *list, kvf_error *err)
{
    kvf_str rest = *text;
    prefix = prefix && t->space_prefix;
    if (prefix || has_space_sign(rest.p, rest.n)) KVF_TRY(normalise(s, &rest, prefix, err));
    while (rest.n > 0) {
        size_t used;
        KVF_TRY(encode_piece(t, s, &rest, &used, list, err));
        rest.p += used;
        rest.n -= used;
    }
    return KVF_OK;
}
