/* vocab_image.h - small tokenizer vocabularies as GGUF files in memory.
 *
 *     vocab v = { .model = "gpt2", .pre = "qwen2" };
 *     vocab_bytes(&v);                      // the 256 byte tokens, ids 0..255
 *     vocab_add(&v, "ab", 1, 0);            // name, type, score
 *     vocab_merge(&v, "a b");
 *     tokenizer_rig r = rig_open(&v, &mem, &err);
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TEST_VOCAB_IMAGE_H
#define KVF_TEST_VOCAB_IMAGE_H

#include <stdbool.h>
#include <stdio.h>

#include "model/tokenizer.h"
#include "unit/gguf_image.h"

enum { VOCAB_MAX = 1024, NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6 };

typedef struct vocab {
    const char *model, *pre; /* pre NULL: no such key */
    char name[VOCAB_MAX][96];
    uint32_t type[VOCAB_MAX];
    float score[VOCAB_MAX];
    size_t n;
    char merge[VOCAB_MAX][96];
    size_t n_merge;
    struct {
        const char *key;
        uint32_t value;
    } id[6];                         /* "bos_token_id" */
    int add_bos, space_prefix;       /* 0: no key, 1: false, 2: true */
    int n_type_extra, n_score_extra; /* damage: arrays longer or shorter than the names */
    bool no_types, no_scores, no_merges;
} vocab;

/* Append s to a string in a row of 96 bytes, cut to fit. */
static inline void vocab_append(char row[96], const char *s)
{
    size_t at = strlen(row), n = strlen(s);
    if (n > 95 - at) n = 95 - at;
    memmove(row + at, s, n);
    row[at + n] = 0;
}

static inline int vocab_add(vocab *v, const char *name, uint32_t type, float score)
{
    v->name[v->n][0] = 0;
    vocab_append(v->name[v->n], name);
    v->type[v->n] = type;
    v->score[v->n] = score;
    return (int)v->n++;
}

static inline void vocab_merge(vocab *v, const char *line)
{
    v->merge[v->n_merge][0] = 0;
    vocab_append(v->merge[v->n_merge++], line);
}

/* Name of a byte in the alphabet of byte-pair vocabularies. */
static inline void byte_letter(int b, char out[3])
{
    int cp = b;
    if (b <= 32)
        cp = 256 + b;
    else if (b >= 127 && b <= 160)
        cp = 256 + 33 + b - 127;
    else if (b == 173)
        cp = 256 + 67;
    if (cp < 128) {
        out[0] = (char)cp;
        out[1] = 0;
    } else {
        out[0] = (char)(0xC0 | cp >> 6);
        out[1] = (char)(0x80 | (cp & 63));
        out[2] = 0;
    }
}

static inline void vocab_bytes(vocab *v)
{
    for (int b = 0; b < 256; b++) {
        char letter[3], name[8];
        byte_letter(b, letter);
        snprintf(name, sizeof name, "<0x%02X>", (unsigned)b);
        bool spm = strcmp(v->model, "llama") == 0;
        vocab_add(v, spm ? name : letter, spm ? BYTE : NORMAL, 0);
    }
}

static inline image vocab_image(const vocab *v)
{
    int n_kv = 2 + (v->pre != NULL) + !v->no_types + !v->no_scores + !v->no_merges + (v->add_bos > 0) +
               (v->space_prefix > 0);
    for (int i = 0; i < 6; i++) n_kv += v->id[i].key != NULL;
    image g = img_new(0, (uint64_t)n_kv);
    img_kv_str(&g, "tokenizer.ggml.model", v->model);
    if (v->pre) img_kv_str(&g, "tokenizer.ggml.pre", v->pre);
    img_kv_arr(&g, "tokenizer.ggml.tokens", 8, v->n);
    for (size_t i = 0; i < v->n; i++) img_str(&g, v->name[i]);
    size_t n_type = (size_t)((int)v->n + v->n_type_extra), n_score = (size_t)((int)v->n + v->n_score_extra);
    if (!v->no_types) img_kv_arr(&g, "tokenizer.ggml.token_type", 5, n_type);
    for (size_t i = 0; !v->no_types && i < n_type; i++) img_u32(&g, v->type[i]);
    if (!v->no_scores) img_kv_arr(&g, "tokenizer.ggml.scores", 6, n_score);
    for (size_t i = 0; !v->no_scores && i < n_score; i++) img_f32(&g, v->score[i]);
    if (!v->no_merges) img_kv_arr(&g, "tokenizer.ggml.merges", 8, v->n_merge);
    for (size_t i = 0; !v->no_merges && i < v->n_merge; i++) img_str(&g, v->merge[i]);
    if (v->add_bos) img_kv_bool(&g, "tokenizer.ggml.add_bos_token", v->add_bos - 1);
    if (v->space_prefix) img_kv_bool(&g, "tokenizer.ggml.add_space_prefix", v->space_prefix - 1);
    for (int i = 0; i < 6; i++) {
        char key[64];
        snprintf(key, sizeof key, "tokenizer.ggml.%s", v->id[i].key ? v->id[i].key : "");
        if (v->id[i].key) img_kv_u32(&g, key, v->id[i].value);
    }
    return g;
}

typedef struct tokenizer_rig {
    image file;
    kvf_gguf *g;
    kvf_tokenizer *t; /* NULL when rc is a failure */
    kvf_status rc;
} tokenizer_rig;

static inline tokenizer_rig rig_open(const vocab *v, const kvf_mem *mem, kvf_error *err)
{
    tokenizer_rig r = { .file = vocab_image(v) };
    r.rc = kvf_gguf_open_memory(&r.g, r.file.p, r.file.n, mem, err);
    if (r.rc == KVF_OK) r.rc = kvf_tokenizer_open(&r.t, r.g, mem, err);
    return r;
}

static inline void rig_close(tokenizer_rig *r)
{
    kvf_tokenizer_close(r->t);
    kvf_gguf_close(r->g);
    img_free(&r->file);
}

#endif
