/* fuzz_gguf.c - any bytes as a GGUF file: the reader, then the tokenizer it may hold.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>
#include <string.h>

#include "model/gguf.h"
#include "model/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint64_t sink;

static void touch(const void *p, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += ((const uint8_t *)p)[i];
    sink += sum;
}

/* Read all that an open file promises to be there. */
static void walk(const kvf_gguf *g)
{
    kvf_error err;
    for (int64_t i = 0; i < kvf_gguf_n_kv(g); i++) {
        const kvf_gguf_kv *kv = kvf_gguf_kv_at(g, i);
        char type[24], value[64], key[128] = { 0 };
        size_t at = 0;
        int64_t n = 0;
        kvf_str s;
        kvf_gguf_describe(kv, type, sizeof type, value, sizeof value);
        touch(type, strlen(type));
        touch(value, strlen(value));
        touch(kv->data, kv->bytes);
        for (; kvf_gguf_next_str(kv, &at, &s); n++) touch(s.p, s.n);
        if (kv->elem == KVF_GGUF_STR && n != kv->count) abort();
        if (kv->key.n >= sizeof key || memchr(kv->key.p, 0, kv->key.n)) continue;
        memcpy(key, kv->key.p, kv->key.n);
        if (kvf_gguf_find(g, key) != kv) abort();
        int64_t v;
        float f;
        bool b;
        if (kvf_gguf_get_int(g, key, -5, 5, &v, &err) == KVF_OK && (v < -5 || v > 5)) abort();
        kvf_gguf_get_float_or(g, key, 0, &f, &err);
        kvf_gguf_get_bool_or(g, key, false, &b, &err);
        kvf_gguf_get_str(g, key, &s, &err);
    }
    for (int64_t i = 0; i < kvf_gguf_n_tensor(g); i++) {
        const kvf_gguf_tensor *t = kvf_gguf_tensor_at(g, i);
        size_t n = kvf_dtype_row_bytes(t->type, t->dim[0]) * (size_t)(t->dim[1] * t->dim[2] * t->dim[3]);
        if (n != t->bytes || n == 0) abort();
        touch(t->data, t->bytes);
    }
}

/* The file's own bytes are the text: they spell its tokens. */
static void tokenise(const kvf_gguf *g, const uint8_t *data, size_t size)
{
    kvf_tokenizer *t;
    kvf_error err;
    if (kvf_tokenizer_open(&t, g, &kvf_mem_default, &err) != KVF_OK) return;
    int32_t n_vocab = kvf_tokenizer_n_vocab(t);
    for (int32_t i = 0; i < n_vocab; i++) {
        const char *p;
        size_t n;
        kvf_tokenizer_bytes(t, i, &p, &n);
        touch(p, n);
        p = kvf_tokenizer_name(t, i, &n);
        touch(p, n);
        kvf_tokenizer_is_end(t, i);
    }
    size_t room = size < 2048 ? size : 2048;
    for (int special = 0; special < 2; special++) {
        kvf_token_list list = { .mem = &kvf_mem_default };
        if (kvf_tokenizer_encode(t, (const char *)data + (size - room), room, special, &list, &err) == KVF_OK) {
            for (int64_t i = 0; i < list.n; i++) {
                if (list.v[i] < 0 || list.v[i] >= n_vocab) abort();
            }
        }
        kvf_free(&kvf_mem_default, list.v);
    }
    touch(kvf_tokenizer_kind(t), strlen(kvf_tokenizer_kind(t)));
    kvf_tokenizer_close(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    kvf_gguf *g;
    kvf_error err;
    if (kvf_gguf_open_memory(&g, data, size, &kvf_mem_default, &err) != KVF_OK) {
        if (!memchr(err.msg, 0, sizeof err.msg)) abort();
        return 0;
    }
    walk(g);
    tokenise(g, data, size);
    kvf_gguf_close(g);
    return 0;
}
