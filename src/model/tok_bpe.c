/* tok_bpe.c - byte-pair encoding over bytes, as GPT-2 introduced it.
 *
 * Text is cut into pieces by the regular expressions the model was trained with; inside a piece,
 * bytes merge in the order of the merge list. The rule that matters: every byte has a token, so
 * every input has an encoding. Bytes that are not UTF-8 are pieces of their own, because the
 * expressions are only defined on text.
 * The expressions are those of the published tokenizer.json files; Unicode classes are PCRE2's.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/tok_int.h"

#include <stdio.h>
#include <string.h>

#define CONTRACTIONS "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define TAIL " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define UPPER "\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}"
#define LOWER "\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}"

static const kvf_tok_pre pres[] = {
    { .names = { "qwen2", "deepseek-r1-qwen" },
      .kind = "bpe/qwen2",
      .stage = { CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|" TAIL } },
    { .names = { "llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral" },
      .kind = "bpe/llama-bpe",
      .stage = { CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|" TAIL },
      .ignore_merges = true,
      .add_bos = true },
    { .names = { "smaug-bpe" },
      .kind = "bpe/smaug-bpe",
      .stage = { CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|" TAIL } },
    { .names = { "tekken" },
      .kind = "bpe/tekken",
      .stage = { "[^\\r\\n\\p{L}\\p{N}]?[" UPPER "]*[" LOWER "]+|[^\\r\\n\\p{L}\\p{N}]?[" UPPER "]+[" LOWER
                 "]*"
                 "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+" },
      .ignore_merges = true,
      .add_bos = true },
    { .names = { "smollm" }, .kind = "bpe/smollm", .stage = { "\\p{N}", GPT2 } },
    { .names = { "gpt-2" }, .kind = "bpe/gpt-2", .stage = { GPT2 } },
    /* What files made before the key existed are read as. */
    { .names = { "default" },
      .kind = "bpe/default",
      .stage = { "[\\p{P}\\$\\+<=>\\^~\\|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]" } },
};
enum { n_pre = sizeof pres / sizeof *pres };

static bool str_is(const kvf_str *s, const char *name)
{
    return s->n == strlen(name) && memcmp(s->p, name, s->n) == 0;
}

static const kvf_tok_pre *find_pre(const kvf_str *name)
{
    for (int i = 0; i < n_pre; i++)
        for (int j = 0; pres[i].names[j]; j++)
            if (str_is(name, pres[i].names[j])) return &pres[i];
    return NULL;
}

/* The byte alphabet: printable Latin-1 bytes are written as themselves, the others as the code
 * points from 256 on, in order. */
static void alphabet(int16_t byte_of[324])
{
    int next = 256;
    for (int cp = 0; cp < 324; cp++) byte_of[cp] = -1;
    for (int b = 0; b < 256; b++) {
        bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        byte_of[printable ? b : next++] = (int16_t)b;
    }
}

kvf_status kvf_tok_bpe_pre(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err)
{
    kvf_str name;
    KVF_TRY(kvf_gguf_get_str_or_null(g, "tokenizer.ggml.pre", &name, err));
    if (!name.p) name = (kvf_str){ "default", 7 };
    t->pre = find_pre(&name);
    alphabet(t->byte_of);
    if (t->pre) return KVF_OK;
    char known[256] = "";
    size_t at = 0;
    for (int i = 0; i < n_pre; i++) {
        int w = snprintf(known + at, sizeof known - at, "%s%s", i ? ", " : "", pres[i].names[0]);
        if (w < 0 || (size_t)w >= sizeof known - at) break;
        at += (size_t)w;
    }
    return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                    "tokenizer.ggml.pre '%.*s' is not known; this build has %s: use a model with one of them",
                    name.n > 64 ? 64 : (int)name.n, name.p, known);
}

bool kvf_tok_bpe_decode(const kvf_tokenizer *t, const kvf_str *raw, char *out, size_t *n)
{
    bool good = true;
    size_t m = 0;
    for (size_t i = 0; i < raw->n;) {
        unsigned char c = (unsigned char)raw->p[i];
        unsigned cp = c;
        size_t len = 1;
        if (c >= 0xC2 && c <= 0xC5 && i + 1 < raw->n) {
            cp = (c & 0x1Fu) << 6 | ((unsigned char)raw->p[i + 1] & 0x3Fu);
            len = 2;
        } else if (c >= 0x80) {
            cp = 324;
        }
        if (cp < 324 && t->byte_of[cp] >= 0) {
            out[m++] = (char)t->byte_of[cp];
        } else {
            good = false;
            memcpy(out + m, raw->p + i, len);
            m += len;
        }
        i += len;
    }
    *n = m;
    return good;
}

/* ---- Open ------------------------------------------------------------------------------- */

static uint64_t pair_hash(uint64_t seed, uint32_t left, uint32_t right)
{
    uint64_t h = (seed ^ ((uint64_t)left << 32 | right)) * 0x9E3779B97F4A7C15u;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    return h ^ h >> 32;
}

static void add_merge(kvf_tokenizer *t, uint32_t left, uint32_t right, kvf_token join, uint32_t rank)
{
    uint64_t i = pair_hash(t->seed, left, right) & t->pair_mask;
    for (; t->pair[i].rank1; i = (i + 1) & t->pair_mask)
        if (t->pair[i].left == left && t->pair[i].right == right) return; /* the first one counts */
    t->pair[i] = (kvf_tok_pair){ left, right, rank + 1 };
    t->pair_join[rank] = join;
}

/* A line is "left right" in raw names. One that has no blank, or whose parts or result are not in
 * the vocabulary, can never apply and is skipped. */
static kvf_status read_merges(kvf_tokenizer *t, const kvf_gguf_kv *kv, kvf_error *err)
{
    void *p;
    char *buf; /* a useful line is two names; raw names are at most twice their bytes */
    size_t cap = 4 * (size_t)t->max_key + 2;
    KVF_TRY(kvf_mem_get(t->mem, &p, cap, 1, err));
    buf = p;
    kvf_str s;
    size_t at = 0;
    for (uint32_t rank = 0; kvf_gguf_next_str(kv, &at, &s); rank++) {
        const char *blank = s.n > 1 && s.n <= cap ? memchr(s.p + 1, ' ', s.n - 1) : NULL;
        if (!blank) continue;
        kvf_str l = { s.p, (size_t)(blank - s.p) }, r = { blank + 1, s.n - l.n - 1 };
        size_t nl, nr;
        if (!kvf_tok_bpe_decode(t, &l, buf, &nl) || !kvf_tok_bpe_decode(t, &r, buf + nl, &nr)) continue;
        kvf_token left = kvf_tok_lookup(t, buf, nl), right = kvf_tok_lookup(t, buf + nl, nr);
        if (left < 0 || right < 0) continue;
        kvf_token join = kvf_tok_lookup(t, buf, nl + nr);
        if (join >= 0) add_merge(t, (uint32_t)left, (uint32_t)right, join, rank);
    }
    kvf_free(t->mem, buf);
    return KVF_OK;
}

static void *pcre_alloc(PCRE2_SIZE n, void *user)
{
    return kvf_alloc_raw(((kvf_tokenizer *)user)->mem, n, 1);
}
static void pcre_release(void *p, void *user) { kvf_free(((kvf_tokenizer *)user)->mem, p); }

static kvf_status compile_stages(kvf_tokenizer *t, kvf_error *err)
{
    static const char out_of_memory[] = "out of memory while compiling the pre-tokeniser; free memory";
    t->pcre_mem = pcre2_general_context_create(pcre_alloc, pcre_release, t);
    if (!t->pcre_mem) return kvf_fail(err, KVF_ERR_NOMEM, "%s", out_of_memory);
    pcre2_compile_context *cc = pcre2_compile_context_create(t->pcre_mem);
    t->pcre_limits = pcre2_match_context_create(t->pcre_mem);
    kvf_status rc = KVF_OK;
    if (!cc || !t->pcre_limits) rc = kvf_fail(err, KVF_ERR_NOMEM, "%s", out_of_memory);
    for (int i = 0; rc == KVF_OK && i < KVF_TOK_MAX_STAGE && t->pre->stage[i]; i++) {
        int code;
        size_t at;
        t->stage[i] = pcre2_compile((PCRE2_SPTR)t->pre->stage[i], PCRE2_ZERO_TERMINATED,
                                    PCRE2_UTF | PCRE2_UCP, &code, &at, cc);
        if (!t->stage[i]) {
            rc = code == PCRE2_ERROR_HEAP_FAILED
                     ? kvf_fail(err, KVF_ERR_NOMEM, "%s", out_of_memory)
                     : kvf_fail(err, KVF_ERR_INTERNAL,
                                "PCRE2 error %d at byte %zu of pre-tokeniser '%s'; is the "
                                "system's PCRE2 built with Unicode?",
                                code, at, t->pre->names[0]);
            break;
        }
        /* Refused where memory may not be made executable; interpreting gives the same result. */
        t->stage_jit[i] = pcre2_jit_compile(t->stage[i], PCRE2_JIT_COMPLETE) == 0;
        t->n_stage = i + 1;
    }
    pcre2_compile_context_free(cc);
    /* The expressions cannot run away: each step of each match consumes text. */
    if (rc == KVF_OK) pcre2_set_match_limit(t->pcre_limits, UINT32_MAX);
    return rc;
}

kvf_status kvf_tok_bpe_open(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err)
{
    const kvf_gguf_kv *kv = kvf_gguf_find(g, "tokenizer.ggml.merges");
    if (!kv || kv->type != KVF_GGUF_ARR || kv->elem != KVF_GGUF_STR)
        return kvf_fail(err, KVF_ERR_FORMAT, "tokenizer.ggml.merges is %s; convert the model again",
                        kv ? "not an array of strings" : "missing");
    if (kv->count > 1 << 26)
        return kvf_fail(err, KVF_ERR_FORMAT,
                        "tokenizer.ggml.merges has %lld lines, at most %d; the file is damaged",
                        (long long)kv->count, 1 << 26);
    uint64_t n_slot = 16;
    while (n_slot < (uint64_t)kv->count * 8 / 5) n_slot *= 2;
    void *p;
    KVF_TRY(kvf_mem_get(t->mem, &p, n_slot, sizeof *t->pair, err));
    t->pair = p;
    t->pair_mask = n_slot - 1;
    KVF_TRY(kvf_mem_get(t->mem, &p, (size_t)kv->count, sizeof *t->pair_join, err));
    t->pair_join = p;
    for (int b = 0; b < 256; b++) {
        char c = (char)b;
        t->byte_token[b] = kvf_tok_lookup(t, &c, 1);
    }
    KVF_TRY(read_merges(t, kv, err));
    return compile_stages(t, err);
}

void kvf_tok_bpe_close(kvf_tokenizer *t)
{
    for (int i = 0; i < KVF_TOK_MAX_STAGE; i++) pcre2_code_free(t->stage[i]);
    pcre2_match_context_free(t->pcre_limits);
    pcre2_general_context_free(t->pcre_mem);
    kvf_free(t->mem, t->pair);
    kvf_free(t->mem, t->pair_join);
}

/* ---- Encode ----------------------------------------------------------------------------- */

void kvf_tok_bpe_pair(const kvf_tokenizer *t, const char *piece, kvf_tok_sym *left, const kvf_tok_sym *right,
                      uint32_t end)
{
    (void)piece;
    (void)end;
    left->prio = KVF_TOK_NO_PRIO;
    if (left->id < 0 || right->id < 0) return;
    uint32_t l = (uint32_t)left->id, r = (uint32_t)right->id;
    for (uint64_t i = pair_hash(t->seed, l, r) & t->pair_mask; t->pair[i].rank1; i = (i + 1) & t->pair_mask) {
        if (t->pair[i].left != l || t->pair[i].right != r) continue;
        left->prio = t->pair[i].rank1 - 1;
        left->join = t->pair_join[left->prio];
        return;
    }
}

typedef struct bpe_run {
    const kvf_tokenizer *t;
    kvf_tok_scratch *s;
    kvf_token_list *list;
    kvf_error *err;
} bpe_run;

static kvf_status encode_piece(const bpe_run *r, const char *p, size_t n)
{
    const kvf_tokenizer *t = r->t;
    if (t->pre->ignore_merges && n > 1) {
        kvf_token whole = kvf_tok_lookup(t, p, n);
        if (whole >= 0) return kvf_token_list_push(r->list, whole, r->err);
    }
    KVF_TRY(kvf_tok_room(r->s, n, r->err));
    kvf_tok_sym *sym = r->s->sym;
    for (size_t i = 0; i < n; i++) {
        sym[i].at = (uint32_t)i;
        sym[i].id = t->byte_token[(unsigned char)p[i]];
        sym[i].prio = KVF_TOK_NO_PRIO;
    }
    sym[n].at = (uint32_t)n;
    if (n > 1) KVF_TRY(kvf_tok_merge(t, r->s, p, &n, r->err));
    for (size_t i = 0; i < n; i++) {
        kvf_token id = sym[i].id >= 0 ? sym[i].id : t->unk;
        if (id >= 0) KVF_TRY(kvf_token_list_push(r->list, id, r->err));
    }
    return KVF_OK;
}

static kvf_status match_next(const bpe_run *r, const char *p, size_t n, size_t at, int stage)
{
    const kvf_tokenizer *t = r->t;
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;
    if (t->stage_jit[stage])
        rc = pcre2_jit_match(t->stage[stage], (PCRE2_SPTR)p, n, at, 0, r->s->match, t->pcre_limits);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(t->stage[stage], (PCRE2_SPTR)p, n, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                         r->s->match, t->pcre_limits);
    if (rc >= 0) return KVF_OK;
    if (rc == PCRE2_ERROR_NOMATCH) return KVF_DONE;
    if (rc == PCRE2_ERROR_NOMEMORY || rc == PCRE2_ERROR_HEAPLIMIT)
        return kvf_fail(r->err, KVF_ERR_NOMEM, "out of memory while splitting %zu bytes of text; free memory",
                        n);
    return kvf_fail(r->err, KVF_ERR_INTERNAL, "PCRE2 error %d while splitting %zu bytes of text", rc, n);
}

/* Cut p at the matches of the expression; what lies between matches is a piece too. */
static kvf_status split(const bpe_run *r, const char *p, size_t n, int stage)
{
    if (stage == r->t->n_stage) {
        for (size_t at = 0, len; at < n; at += len) {
            len = n - at < KVF_TOK_MAX_PIECE ? n - at : KVF_TOK_MAX_PIECE;
            KVF_TRY(encode_piece(r, p + at, len));
        }
        return KVF_OK;
    }
    size_t at = 0, done = 0;
    while (at < n) {
        kvf_status rc = match_next(r, p, n, at, stage);
        if (rc < 0) return rc;
        if (rc == KVF_DONE) break;
        const PCRE2_SIZE *v = pcre2_get_ovector_pointer(r->s->match);
        size_t from = v[0], to = v[1]; /* the next stage overwrites them */
        if (to <= from) break;
        if (from > done) KVF_TRY(split(r, p + done, from - done, stage + 1));
        KVF_TRY(split(r, p + from, to - from, stage + 1));
        at = done = to;
    }
    return done < n ? split(r, p + done, n - done, stage + 1) : KVF_OK;
}

static size_t valid_prefix(const char *p, size_t n)
{
    size_t i = 0, len;
    while (i < n) {
        uint64_t w;
        if (n - i >= sizeof w) {
            memcpy(&w, p + i, sizeof w);
            if (!(w & 0x8080808080808080u)) {
                i += sizeof w;
                continue;
            }
        }
        if (!(len = kvf_tok_utf8(p + i, n - i))) break;
        i += len;
    }
    return i;
}

kvf_status kvf_tok_bpe_encode(const kvf_tokenizer *t, kvf_tok_scratch *s, const kvf_str *text,
                              kvf_token_list *list, kvf_error *err)
{
    bpe_run r = { t, s, list, err };
    if (!s->match) s->match = pcre2_match_data_create(1, t->pcre_mem);
    if (!s->match) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory before splitting text; free memory");
    for (size_t i = 0; i < text->n;) {
        size_t len = valid_prefix(text->p + i, text->n - i);
        if (len > 0) KVF_TRY(split(&r, text->p + i, len, 0));
        i += len;
        if (i < text->n) KVF_TRY(encode_piece(&r, text->p + i++, 1));
    }
    return KVF_OK;
}
