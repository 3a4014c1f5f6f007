/* tokenizer.c - the vocabulary of a GGUF file: names, look-ups, special tokens in text.
 *
 * Everything is built once, in a handful of arrays over views into the mapped file: there is no
 * allocation per token. What depends on the kind of vocabulary is in tok_bpe.c and tok_spm.c.
 * Control tokens are found in a text only where it is said to hold them; user-defined ones (runs
 * of newlines in Gemma, <tool_call> in Qwen) always are. The leftmost wins, of those the longest.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/tok_int.h"

#include <string.h>

#define MAX_VOCAB (1 << 24)

/* ---- Bytes, hash, list ------------------------------------------------------------------- */

size_t kvf_tok_utf8(const char *p, size_t n)
{
    const unsigned char *s = (const unsigned char *)p;
    if (n == 0) return 0;
    if (s[0] < 0x80) return 1;
    if (s[0] < 0xC2 || s[0] > 0xF4) return 0;
    size_t len = s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    if (n < len) return 0;
    for (size_t i = 1; i < len; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    /* Overlong forms, surrogates, beyond U+10FFFF. */
    if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF0 && s[1] < 0x90) ||
        (s[0] == 0xF4 && s[1] > 0x8F))
        return 0;
    return len;
}

static uint64_t load_tail(const char *p, size_t n)
{
    if (n >= 4) { /* two loads that overlap; the length is part of the hash */
        uint32_t a, b;
        memcpy(&a, p, 4);
        memcpy(&b, p + n - 4, 4);
        return (uint64_t)b << 32 | a;
    }
    uint64_t w = 0;
    for (size_t i = 0; i < n; i++) w = w << 8 | (unsigned char)p[i];
    return w;
}

uint64_t kvf_tok_hash(uint64_t seed, const char *p, size_t n)
{
    uint64_t h = seed ^ n * 0x9E3779B97F4A7C15u, w;
    for (; n > 8; p += 8, n -= 8) {
        memcpy(&w, p, 8);
        h = (h ^ w) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
    }
    h = (h ^ load_tail(p, n)) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    h *= 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}

kvf_status kvf_token_list_push(kvf_token_list *list, kvf_token token, kvf_error *err)
{
    if (list->n == list->cap) {
        void *v = list->v;
        KVF_TRY(kvf_reserve(list->mem, &v, &list->cap, list->n + 1, sizeof *list->v, err));
        list->v = v;
    }
    list->v[list->n++] = token;
    return KVF_OK;
}

/* ---- Look-ups ---------------------------------------------------------------------------- */

static bool stands_for_bytes(uint8_t type)
{
    return type == KVF_TOK_NORMAL || type == KVF_TOK_USER || type == KVF_TOK_UNUSED ||
           type == KVF_TOK_UNDEFINED;
}

static kvf_str key_of(const kvf_tokenizer *t, kvf_token i)
{
    if (!stands_for_bytes(t->type[i])) return t->raw[i];
    return (kvf_str){ t->bytes + t->at[i], t->at[i + 1] - t->at[i] };
}

static bool same(const kvf_str *a, const char *p, size_t n) { return a->n == n && memcmp(a->p, p, n) == 0; }

kvf_token kvf_tok_lookup(const kvf_tokenizer *t, const char *p, size_t n)
{
    if (n > t->max_key) return KVF_TOKEN_NONE;
    uint64_t h = kvf_tok_hash(t->seed, p, n);
    uint32_t tag = (uint32_t)(h >> 32);
    for (uint64_t i = h & t->slot_mask; t->slot[i].id1; i = (i + 1) & t->slot_mask) {
        if (t->slot[i].tag != tag) continue;
        kvf_token id = t->slot[i].id1 - 1;
        uint32_t at = t->at[id];
        if (t->mergeable[id] && t->at[id + 1] - at == n && memcmp(t->bytes + at, p, n) == 0) return id;
    }
    return KVF_TOKEN_NONE;
}

/* Token named `name` among those whose key hashes as key does. */
static kvf_token find_keyed(const kvf_tokenizer *t, const kvf_str *key, const char *name, size_t n)
{
    uint64_t h = kvf_tok_hash(t->seed, key->p, key->n);
    for (uint64_t i = h & t->slot_mask; t->slot[i].id1; i = (i + 1) & t->slot_mask)
        if (t->slot[i].tag == (uint32_t)(h >> 32) && same(&t->raw[t->slot[i].id1 - 1], name, n))
            return t->slot[i].id1 - 1;
    return KVF_TOKEN_NONE;
}

static bool decode(const kvf_tokenizer *t, uint8_t type, const kvf_str *raw, char *out, size_t *n)
{
    if (t->spm) return kvf_tok_spm_decode(raw, out, n);
    if (type != KVF_TOK_USER) return kvf_tok_bpe_decode(t, raw, out, n);
    /* User-defined names are text already; merging knows them only where that is the same. */
    bool good = kvf_tok_bpe_decode(t, raw, out, n) && same(raw, out, *n);
    *n = raw->n;
    memcpy(out, raw->p, raw->n);
    return good;
}

kvf_token kvf_tokenizer_find(const kvf_tokenizer *t, const char *name, size_t n)
{
    char buf[512];
    kvf_str raw = { name, n }, key = { buf, 0 };
    if (n == 0) return KVF_TOKEN_NONE;
    kvf_token id = find_keyed(t, &raw, name, n); /* control and user-defined tokens */
    if (id >= 0) return id;
    if (n <= sizeof buf) {
        decode(t, KVF_TOK_NORMAL, &raw, buf, &key.n);
        return find_keyed(t, &key, name, n);
    }
    for (id = 0; id < t->n_vocab; id++)
        if (same(&t->raw[id], name, n)) return id;
    return KVF_TOKEN_NONE;
}

int32_t kvf_tokenizer_n_vocab(const kvf_tokenizer *t) { return t->n_vocab; }
const char *kvf_tokenizer_kind(const kvf_tokenizer *t) { return t->spm ? "spm" : t->pre->kind; }
kvf_token kvf_tokenizer_bos(const kvf_tokenizer *t) { return t->bos; }
kvf_token kvf_tokenizer_eos(const kvf_tokenizer *t) { return t->eos; }
bool kvf_tokenizer_add_bos(const kvf_tokenizer *t) { return t->add_bos; }
bool kvf_tokenizer_space_prefix(const kvf_tokenizer *t) { return t->space_prefix; }

bool kvf_tokenizer_is_end(const kvf_tokenizer *t, kvf_token token)
{
    for (int32_t i = 0; i < t->n_end; i++)
        if (t->end[i] == token) return true;
    return false;
}

const char *kvf_tokenizer_name(const kvf_tokenizer *t, kvf_token token, size_t *n)
{
    bool known = token >= 0 && token < t->n_vocab;
    *n = known ? t->raw[token].n : 0;
    return known ? t->raw[token].p : NULL;
}

void kvf_tokenizer_bytes(const kvf_tokenizer *t, kvf_token token, const char **bytes, size_t *n)
{
    bool known = token >= 0 && token < t->n_vocab;
    *bytes = known ? t->bytes + t->at[token] : "";
    *n = known ? t->at[token + 1] - t->at[token] : 0;
}

/* ---- Open: arrays ------------------------------------------------------------------------ */

static kvf_status fail_array(const char *key, const char *want, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_FORMAT, "%s must be %s; convert the model again", key, want);
}

static kvf_status read_names(kvf_tokenizer *t, const kvf_gguf *g, uint64_t *total, kvf_error *err)
{
    static const char key[] = "tokenizer.ggml.tokens";
    const kvf_gguf_kv *kv = kvf_gguf_find(g, key);
    if (!kv || kv->type != KVF_GGUF_ARR || kv->elem != KVF_GGUF_STR || kv->count < 1 || kv->count > MAX_VOCAB)
        return fail_array(key, "an array of 1 to 16777216 strings", err);
    t->n_vocab = (int32_t)kv->count;
    size_t n = (size_t)t->n_vocab, at = 0;
    void *p;
    KVF_TRY(kvf_mem_get(t->mem, &p, n, sizeof *t->raw, err));
    t->raw = p;
    KVF_TRY(kvf_mem_get(t->mem, &p, n, 1, err));
    t->type = p;
    KVF_TRY(kvf_mem_get(t->mem, &p, n, 1, err));
    t->mergeable = p;
    KVF_TRY(kvf_mem_get(t->mem, &p, n + 1, sizeof *t->at, err));
    t->at = p;
    for (size_t i = 0; i < n && kvf_gguf_next_str(kv, &at, &t->raw[i]); i++) *total += t->raw[i].n;
    if (*total > INT32_MAX) return fail_array(key, "of less than 2 GiB", err);
    return KVF_OK;
}

static int hex(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; }

/* "<0x1F>" is 31, anything else -1. */
static int byte_name(const kvf_str *s)
{
    if (s->n != 6 || memcmp(s->p, "<0x", 3) != 0 || s->p[5] != '>') return -1;
    int hi = hex(s->p[3]), lo = hex(s->p[4]);
    return hi < 0 || lo < 0 ? -1 : hi * 16 + lo;
}

static kvf_status read_types(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err)
{
    static const char key[] = "tokenizer.ggml.token_type";
    const kvf_gguf_kv *kv = kvf_gguf_find(g, key);
    if (!kv) { /* old files; only SentencePiece needs the byte tokens told apart */
        for (int32_t i = 0; i < t->n_vocab; i++)
            t->type[i] = t->spm && byte_name(&t->raw[i]) >= 0 ? KVF_TOK_BYTE : KVF_TOK_NORMAL;
        return KVF_OK;
    }
    if (kv->type != KVF_GGUF_ARR || (kv->elem != KVF_GGUF_I32 && kv->elem != KVF_GGUF_U32) ||
        kv->count != t->n_vocab)
        return fail_array(key, "one 32-bit integer per token", err);
    for (int32_t i = 0; i < t->n_vocab; i++) {
        uint32_t v;
        memcpy(&v, kv->data + (size_t)i * sizeof v, sizeof v);
        if (v > KVF_TOK_BYTE)
            return kvf_fail(err, KVF_ERR_FORMAT, "%s of token %d is %u, not 0..6; the file is damaged", key,
                            i, v);
        t->type[i] = (uint8_t)v;
    }
    return KVF_OK;
}

/* Names that end a turn or a text, then names that only mark a turn: control tokens, whatever the
 * file says of them, so that no message is ever parsed for one. "</s>" must be one already: in
 * Gemma's vocabulary it is an HTML tag. */
static void mark_turns(kvf_tokenizer *t)
{
    static const char *const names[] = {
        "<|im_end|>",    "<|eot_id|>",      "<|eom_id|>",          "<|endoftext|>",
        "<end_of_turn>", "<|end|>",         "<|end_of_text|>",     "</s>",
        "<|im_start|>",  "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>",
        "[INST]",        "[/INST]"
    };
    enum { n_end_names = 8, n_names = sizeof names / sizeof *names };
    for (int32_t i = 0; i < t->n_vocab; i++) {
        const kvf_str *name = &t->raw[i];
        if (name->n < 4 || name->n > 19 || (name->p[0] != '<' && name->p[0] != '[')) continue;
        for (int k = 0; k < n_names; k++) {
            if (!same(name, names[k], strlen(names[k]))) continue;
            if (k == n_end_names - 1 && t->type[i] != KVF_TOK_CONTROL) continue;
            t->type[i] = KVF_TOK_CONTROL;
            if (k < n_end_names && t->n_end < KVF_TOK_MAX_END - 3) t->end[t->n_end++] = i;
        }
    }
}

static kvf_status read_ids(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err)
{
    static const char *const keys[] = { "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                                        "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.eot_token_id",
                                        "tokenizer.ggml.eom_token_id" };
    int64_t id[5];
    for (int i = 0; i < 5; i++)
        KVF_TRY(kvf_gguf_get_int_or(g, keys[i], 0, t->n_vocab - 1, KVF_TOKEN_NONE, &id[i], err));
    t->bos = (kvf_token)id[0];
    t->eos = (kvf_token)id[1];
    t->unk = (kvf_token)id[2];
    mark_turns(t);
    for (int i = 1; i < 5; i++)
        if (i != 2 && id[i] >= 0 && !kvf_tokenizer_is_end(t, (kvf_token)id[i]))
            t->end[t->n_end++] = (kvf_token)id[i];
    KVF_TRY(kvf_gguf_get_bool_or(g, "tokenizer.ggml.add_bos_token", t->spm || t->pre->add_bos, &t->add_bos, err));
    if (t->bos == KVF_TOKEN_NONE) t->add_bos = false; /* a rule about a token the file does not name */
    return KVF_OK;
}

/* ---- Open: bytes, hash table, special tokens ------------------------------------------------ */

static kvf_status build_bytes(kvf_tokenizer *t, uint64_t total, kvf_error *err)
{
    t->bytes = kvf_alloc_raw(t->mem, total + 1, 1); /* names never grow when decoded */
    if (!t->bytes)
        return kvf_fail(err, KVF_ERR_NOMEM,
                        "out of memory: %llu bytes for the vocabulary refused; free memory",
                        (unsigned long long)total);
    uint32_t at = 0;
    for (int32_t i = 0; i < t->n_vocab; i++) {
        t->at[i] = at;
        int byte = t->type[i] == KVF_TOK_BYTE ? byte_name(&t->raw[i]) : -1;
        size_t n = 0;
        if (byte >= 0) {
            t->bytes[at] = (char)byte;
            n = 1;
        } else if (stands_for_bytes(t->type[i])) {
            t->mergeable[i] = decode(t, t->type[i], &t->raw[i], t->bytes + at, &n) && n > 0;
            if (t->mergeable[i] && n > t->max_key) t->max_key = (uint32_t)n;
        }
        at += (uint32_t)n;
    }
    t->at[t->n_vocab] = at;
    return KVF_OK;
}

/* Of tokens with the same name, the first is the one that is found. */
static kvf_status build_hash(kvf_tokenizer *t, kvf_error *err)
{
    uint64_t n_slot = 16;
    while (n_slot < (uint64_t)t->n_vocab * 8 / 5) n_slot *= 2;
    void *p;
    KVF_TRY(kvf_mem_get(t->mem, &p, n_slot, sizeof *t->slot, err));
    t->slot = p;
    t->slot_mask = n_slot - 1;
    /* Where the block lies differs from run to run, so no file can be made whose keys all collide.
     * Only the places in the tables depend on it, never a result. */
    t->seed = (uint64_t)(uintptr_t)p * 0x9E3779B97F4A7C15u;
    for (int32_t i = 0; i < t->n_vocab; i++) {
        kvf_str key = key_of(t, i);
        if (key.n == 0) continue;
        uint64_t h = kvf_tok_hash(t->seed, key.p, key.n);
        kvf_tok_slot fresh = { (uint32_t)(h >> 32), i + 1 };
        for (h &= t->slot_mask; t->slot[h].id1; h = (h + 1) & t->slot_mask)
            if (t->slot[h].tag == fresh.tag &&
                same(&t->raw[i], t->raw[t->slot[h].id1 - 1].p, t->raw[t->slot[h].id1 - 1].n))
                break;
        if (!t->slot[h].id1) t->slot[h] = fresh;
    }
    return KVF_OK;
}

static bool is_special(const kvf_tokenizer *t, int32_t i)
{
    uint8_t type = t->type[i];
    return t->raw[i].n > 0 && (type == KVF_TOK_CONTROL || type == KVF_TOK_UNKNOWN || type == KVF_TOK_USER);
}

static bool before(const kvf_tok_special *a, const kvf_tok_special *b)
{
    size_t n = a->name.n < b->name.n ? a->name.n : b->name.n;
    int c = memcmp(a->name.p, b->name.p, n);
    if (c != 0) return c < 0;
    return a->name.n != b->name.n ? a->name.n < b->name.n : a->id < b->id;
}

static void sift(kvf_tok_special *v, int32_t i, int32_t n)
{
    kvf_tok_special x = v[i];
    for (int32_t c = 2 * i + 1; c < n; c = 2 * i + 1) {
        if (c + 1 < n && before(&v[c], &v[c + 1])) c++;
        if (!before(&x, &v[c])) break;
        v[i] = v[c];
        i = c;
    }
    v[i] = x;
}

/* Sorted by name; by heap, since qsort may take memory behind our back. */
static kvf_status build_specials(kvf_tokenizer *t, kvf_error *err)
{
    for (int32_t i = 0; i < t->n_vocab; i++) t->n_special += is_special(t, i);
    void *p;
    KVF_TRY(kvf_mem_get(t->mem, &p, (size_t)t->n_special, sizeof *t->special, err));
    t->special = p;
    int32_t n = 0;
    for (int32_t i = 0; i < t->n_vocab; i++)
        if (is_special(t, i)) t->special[n++] = (kvf_tok_special){ t->raw[i], i, t->type[i] != KVF_TOK_USER };
    for (int32_t i = n / 2; i-- > 0;) sift(t->special, i, n);
    while (n > 1) {
        kvf_tok_special top = t->special[0];
        t->special[0] = t->special[--n];
        t->special[n] = top;
        sift(t->special, 0, n);
    }
    for (int32_t i = 0; i < t->n_special; i++)
        t->special_at[(unsigned char)t->special[i].name.p[0] + 1] = i + 1;
    for (int b = 0; b < 256; b++)
        if (t->special_at[b + 1] < t->special_at[b]) t->special_at[b + 1] = t->special_at[b];
    return KVF_OK;
}

static kvf_status build(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err)
{
    kvf_str model;
    uint64_t total = 0;
    KVF_TRY(kvf_gguf_get_str(g, "tokenizer.ggml.model", &model, err));
    t->spm = same(&model, "llama", 5);
    if (!t->spm && !same(&model, "gpt2", 4))
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "tokenizer.ggml.model '%.*s' is not known; this build has gpt2 (byte-pair) and llama "
                        "(SentencePiece): use a model with one of them",
                        model.n > 64 ? 64 : (int)model.n, model.p);
    if (!t->spm) KVF_TRY(kvf_tok_bpe_pre(t, g, err));
    KVF_TRY(read_names(t, g, &total, err));
    KVF_TRY(read_types(t, g, err));
    KVF_TRY(read_ids(t, g, err)); /* settles which tokens are control tokens */
    KVF_TRY(build_bytes(t, total, err));
    KVF_TRY(build_hash(t, err));
    KVF_TRY(build_specials(t, err));
    return t->spm ? kvf_tok_spm_open(t, g, err) : kvf_tok_bpe_open(t, g, err);
}

kvf_status kvf_tokenizer_open(kvf_tokenizer **out, const kvf_gguf *g, const kvf_mem *mem, kvf_error *err)
{
    void *p;
    *out = NULL;
    KVF_TRY(kvf_mem_get(mem, &p, 1, sizeof(kvf_tokenizer), err));
    kvf_tokenizer *t = p;
    t->mem = mem;
    kvf_status rc = build(t, g, err);
    if (rc != KVF_OK) {
        kvf_tokenizer_close(t);
        return rc;
    }
    *out = t;
    return KVF_OK;
}

void kvf_tokenizer_close(kvf_tokenizer *t)
{
    if (!t) return;
    kvf_tok_bpe_close(t);
    kvf_free(t->mem, t->raw);
    kvf_free(t->mem, t->type);
    kvf_free(t->mem, t->mergeable);
    kvf_free(t->mem, t->bytes);
    kvf_free(t->mem, t->at);
    kvf_free(t->mem, t->slot);
    kvf_free(t->mem, t->special);
    kvf_free(t->mem, t->prio);
    kvf_free(t->mem, t);
}

/* ---- Encode ------------------------------------------------------------------------------ */

/* The longest special token p starts with; it has *len bytes. The candidates are one range of the
 * sorted names, narrowed byte by byte. */
static kvf_token match_special(const kvf_tokenizer *t, const kvf_text_part *part, size_t at, size_t *len)
{
    const char *p = part->p + at;
    int32_t lo = t->special_at[(unsigned char)p[0]], hi = t->special_at[(unsigned char)p[0] + 1];
    kvf_token best = KVF_TOKEN_NONE;
    for (size_t depth = 1; lo < hi; depth++) {
        for (; lo < hi && t->special[lo].name.n == depth; lo++) {
            if ((t->special[lo].control && !part->special) || (best >= 0 && *len == depth)) continue;
            best = t->special[lo].id;
            *len = depth;
        }
        if (at + depth >= part->n) break;
        unsigned char c = (unsigned char)p[depth];
        int32_t from = lo, to = hi;
        for (int32_t end = hi; from < end;) {
            int32_t mid = from + (end - from) / 2;
            if ((unsigned char)t->special[mid].name.p[depth] < c)
                from = mid + 1;
            else
                end = mid;
        }
        for (int32_t start = from; start < to;) {
            int32_t mid = start + (to - start) / 2;
            if ((unsigned char)t->special[mid].name.p[depth] <= c)
                start = mid + 1;
            else
                to = mid;
        }
        lo = from;
        hi = to;
    }
    return best;
}

typedef struct encoder {
    const kvf_tokenizer *t;
    kvf_tok_scratch s;
    kvf_token_list *list;
    kvf_error *err;
    bool prefix; /* a space goes in front of the next run, if the file wants one */
} encoder;

static kvf_status flush(encoder *e, const char *p, size_t n)
{
    kvf_str text = { p, n };
    if (n == 0) return KVF_OK;
    bool prefix = e->prefix;
    e->prefix = false;
    if (e->t->spm) return kvf_tok_spm_encode(e->t, &e->s, &text, prefix, e->list, e->err);
    return kvf_tok_bpe_encode(e->t, &e->s, &text, e->list, e->err);
}

/* text: the parts, one after the other. */
static kvf_status encode_joined(encoder *e, const char *text, const kvf_text_part *parts, int64_t n_parts)
{
    const kvf_tokenizer *t = e->t;
    const char *run = text; /* of the bytes not yet turned into tokens */
    for (int64_t k = 0; k < n_parts; k++) {
        const kvf_text_part part = { text, parts[k].n, parts[k].special };
        for (size_t at = 0; at < part.n;) {
            size_t len = 0;
            unsigned char c = (unsigned char)text[at];
            kvf_token id = KVF_TOKEN_NONE;
            if (t->special_at[c] < t->special_at[c + 1]) id = match_special(t, &part, at, &len);
            if (id < 0) {
                at++;
                continue;
            }
            KVF_TRY(flush(e, run, (size_t)(text + at - run)));
            KVF_TRY(kvf_token_list_push(e->list, id, e->err));
            at += len;
            run = text + at;
            /* After a token of one byte a space could break the bound of n + 16 tokens. */
            e->prefix = len > 1;
        }
        text += part.n;
    }
    return flush(e, run, (size_t)(text - run));
}

static void scratch_free(kvf_tok_scratch *s)
{
    pcre2_match_data_free(s->match);
    kvf_free(s->mem, s->sym_buf);
    kvf_free(s->mem, s->heap);
    kvf_free(s->mem, s->text);
}

kvf_status kvf_tokenizer_encode_parts(const kvf_tokenizer *t, const kvf_text_part *parts, int64_t n_parts,
                                      kvf_token_list *list, kvf_error *err)
{
    encoder e = { .t = t, .s = { .mem = t->mem }, .list = list, .err = err, .prefix = true };
    char *joined = NULL;
    size_t total = 0;
    for (int64_t i = 0; i < n_parts; i++)
        if (__builtin_add_overflow(total, parts[i].n, &total) || total > PTRDIFF_MAX)
            return kvf_fail(err, KVF_ERR_NOMEM, "the text is longer than memory; pass a shorter one");
    if (n_parts > 1) {
        joined = kvf_alloc_raw(t->mem, total, 1);
        if (!joined)
            return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: %zu bytes of text refused; free memory",
                            total);
        for (size_t i = 0, at = 0; i < (size_t)n_parts; at += parts[i++].n)
            if (parts[i].n > 0) memcpy(joined + at, parts[i].p, parts[i].n);
    }
    kvf_status rc = KVF_OK;
    if (total > 0) rc = encode_joined(&e, joined ? joined : parts[0].p, parts, n_parts);
    scratch_free(&e.s);
    kvf_free(t->mem, joined);
    return rc;
}

kvf_status kvf_tokenizer_encode(const kvf_tokenizer *t, const char *text, size_t n, bool special,
                                kvf_token_list *list, kvf_error *err)
{
    kvf_text_part part = { text, n, special };
    return kvf_tokenizer_encode_parts(t, &part, 1, list, err);
}
