/* tok_int.h - what tokenizer.c, tok_bpe.c, tok_spm.c and tok_merge.c share; no other file
 * includes it.
 *
 * A token has a raw name (its entry in the file, "\xc4\xa0the" or "\xe2\x96\x81the") and a key:
 * the bytes it stands for (" the"), or the raw name itself if it stands for none (control, unknown
 * and byte tokens). All look-ups go through one hash table over keys, so text is matched as it is,
 * never escaped first. A token that merging may produce is `mergeable`; control tokens never are:
 * text that is not parsed for specials cannot yield one, whatever the vocabulary holds.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_TOK_INT_H
#define KVF_MODEL_TOK_INT_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "model/tokenizer.h"

#define KVF_TOK_MAX_STAGE 4 /* regular expressions applied one after the other */
#define KVF_TOK_MAX_END 16
#define KVF_TOK_NO_PRIO UINT32_MAX /* of a pair that does not merge */

/* A run without any place to cut (4 million letters) is cut here, which bounds scratch memory to
 * 200 MiB. */
#define KVF_TOK_MAX_PIECE ((size_t)1 << 22)

/* tokenizer.ggml.token_type */
enum {
    KVF_TOK_UNDEFINED = 0,
    KVF_TOK_NORMAL = 1,
    KVF_TOK_UNKNOWN = 2,
    KVF_TOK_CONTROL = 3,
    KVF_TOK_USER = 4, /* found in every text before anything else is done to it */
    KVF_TOK_UNUSED = 5,
    KVF_TOK_BYTE = 6
};

typedef struct kvf_tok_slot {
    uint32_t tag; /* upper half of the key's hash */
    int32_t id1;  /* token + 1; 0: empty */
} kvf_tok_slot;

typedef struct kvf_tok_special {
    kvf_str name;
    kvf_token id;
    bool control; /* only where specials are parsed */
} kvf_tok_special;

typedef struct kvf_tok_pair {
    uint32_t left, right;
    uint32_t rank1; /* line of the merge + 1; 0: empty */
} kvf_tok_pair;

/* One pre-tokeniser: regular expressions by the names files give it. */
typedef struct kvf_tok_pre {
    const char *names[8]; /* the first is ours; ends with NULL */
    const char *kind;     /* "bpe/<first name>" */
    const char *stage[KVF_TOK_MAX_STAGE];
    bool ignore_merges; /* a piece that is a token is taken whole, even if merging ends elsewhere */
    bool add_bos;       /* if the file does not say */
} kvf_tok_pre;

/* Part of a piece while it is merged. */
typedef struct kvf_tok_sym {
    uint32_t at;        /* offset of its first byte in the piece */
    kvf_token id;       /* KVF_TOKEN_NONE: no token of its own */
    uint32_t prio;      /* of the pair with the next symbol; the smallest merges first */
    kvf_token join;     /* token of that pair */
    int32_t prev, next; /* long pieces only; -1: none */
} kvf_tok_sym;

/* Memory of one call; sym and heap point to the small arrays until a piece outgrows them. */
typedef struct kvf_tok_scratch {
    const kvf_mem *mem;
    kvf_tok_sym *sym, *sym_buf;
    uint64_t *heap;
    char *text;
    int64_t sym_cap, heap_cap, text_cap;
    pcre2_match_data *match;
    kvf_tok_sym sym_small[65];
} kvf_tok_scratch;

struct kvf_tokenizer {
    const kvf_mem *mem;
    bool spm;
    const kvf_tok_pre *pre; /* of BPE */
    int32_t n_vocab;

    kvf_str *raw;       /* [n_vocab] views into the file */
    uint8_t *type;      /* [n_vocab] */
    uint8_t *mergeable; /* [n_vocab] */
    char *bytes;        /* what the tokens stand for, one after the other */
    uint32_t *at;       /* [n_vocab + 1] token i stands for bytes[at[i]..at[i + 1]) */
    uint32_t max_key;   /* length of the longest mergeable key */

    kvf_tok_slot *slot; /* [slot_mask + 1] */
    uint64_t slot_mask, seed;

    kvf_tok_special *special; /* [n_special] control, unknown and user-defined, by name */
    int32_t n_special;
    int32_t special_at[257]; /* special[special_at[b]..special_at[b + 1]) start with byte b */

    kvf_token bos, eos, unk;
    kvf_token end[KVF_TOK_MAX_END];
    int32_t n_end;
    bool add_bos;
    kvf_token byte_token[256];

    /* BPE */
    int16_t byte_of[324]; /* code point of the byte alphabet to byte, or -1 */
    pcre2_general_context *pcre_mem;
    pcre2_match_context *pcre_limits;
    pcre2_code *stage[KVF_TOK_MAX_STAGE];
    bool stage_jit[KVF_TOK_MAX_STAGE];
    int32_t n_stage;
    kvf_tok_pair *pair;   /* [pair_mask + 1] */
    kvf_token *pair_join; /* [n_merge] token each merge makes */
    uint64_t pair_mask;

    /* SentencePiece */
    uint32_t *prio;       /* [n_vocab] from the scores; a higher score is a smaller number */
    uint32_t joins[2048]; /* bit 256 a + b: byte b follows byte a somewhere in a mergeable token */
    bool space_prefix;
};

/* Hash of n bytes; the upper half is the tag, the lower half the place. */
uint64_t kvf_tok_hash(uint64_t seed, const char *p, size_t n);
/* The mergeable token that stands for exactly these bytes, or KVF_TOKEN_NONE. */
kvf_token kvf_tok_lookup(const kvf_tokenizer *t, const char *p, size_t n);
/* Length of the well-formed UTF-8 character at p, 0 if there is none. */
size_t kvf_tok_utf8(const char *p, size_t n);

/* Room for n symbols and a closing one. */
kvf_status kvf_tok_room(kvf_tok_scratch *s, size_t n, kvf_error *err);

/* Sets left->prio and left->join from the pair left, right; right ends at byte `end` of piece. */
typedef void (*kvf_tok_pair_fn)(const kvf_tokenizer *t, const char *piece, kvf_tok_sym *left,
                                const kvf_tok_sym *right, uint32_t end);

/* Merge s->sym[0..*n) until no pair merges: the smallest prio first, the leftmost of equals.
 * sym[*n].at is the length of the piece. *n becomes the count left. O(n log n). */
kvf_status kvf_tok_merge(const kvf_tokenizer *t, kvf_tok_scratch *s, const char *piece, size_t *n,
                         kvf_error *err);

/* tok_bpe.c. decode: bytes of a raw name to out (at most raw->n), false if it is not of the byte
 * alphabet. open is called with the hash table in place. */
kvf_status kvf_tok_bpe_pre(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err);
bool kvf_tok_bpe_decode(const kvf_tokenizer *t, const kvf_str *raw, char *out, size_t *n);
kvf_status kvf_tok_bpe_open(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err);
void kvf_tok_bpe_close(kvf_tokenizer *t);
void kvf_tok_bpe_pair(const kvf_tokenizer *t, const char *piece, kvf_tok_sym *left, const kvf_tok_sym *right,
                      uint32_t end);
kvf_status kvf_tok_bpe_encode(const kvf_tokenizer *t, kvf_tok_scratch *s, const kvf_str *text,
                              kvf_token_list *list, kvf_error *err);

/* tok_spm.c. prefix: the text starts where a space is put in front, if the file wants one. */
bool kvf_tok_spm_decode(const kvf_str *raw, char *out, size_t *n);
kvf_status kvf_tok_spm_open(kvf_tokenizer *t, const kvf_gguf *g, kvf_error *err);
void kvf_tok_spm_pair(const kvf_tokenizer *t, const char *piece, kvf_tok_sym *left, const kvf_tok_sym *right,
                      uint32_t end);
kvf_status kvf_tok_spm_encode(const kvf_tokenizer *t, kvf_tok_scratch *s, const kvf_str *text, bool prefix,
                              kvf_token_list *list, kvf_error *err);

#endif
