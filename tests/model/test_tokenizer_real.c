/* test_tokenizer_real.c - the tokenisers of real model files, against token ids made by llama.cpp
 * (tests/data/engine/README.md). Skipped where the files are not: they are looked for in
 * $KVFOLD_MODELS, else in ~/.cache/kvfold/models.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "model/chat.h"

static kvf_error err;

static const struct {
    const char *file, *tokens, *kind;
    bool add_bos;
} models[] = {
    { "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "tokens.qwen2.5-coder-0.5b.txt", "bpe/qwen2", false },
    { "gemma-3-270m-q4_k_m.gguf", "tokens.gemma-3-270m.txt", "spm", true },
};
enum { n_models = sizeof models / sizeof *models };

typedef struct rig {
    kvf_gguf *g;
    kvf_tokenizer *t;
} rig;

static rig open_model(int i)
{
    rig r = { NULL, NULL };
    char path[1024];
    const char *dir = getenv("KVFOLD_MODELS"), *home = getenv("HOME");
    if (dir)
        snprintf(path, sizeof path, "%s/%s", dir, models[i].file);
    else
        snprintf(path, sizeof path, "%s/.cache/kvfold/models/%s", home ? home : "", models[i].file);
    FILE *f = fopen(path, "rb");
    if (!f) cr_skip_test("%s is not there; fetch the model to run this test", path);
    fclose(f);
    cr_assert_eq(kvf_gguf_open(&r.g, path, &kvf_mem_default, &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(kvf_tokenizer_open(&r.t, r.g, &kvf_mem_default, &err), KVF_OK, "%s", err.msg);
    return r;
}

static void close_model(rig *r)
{
    kvf_tokenizer_close(r->t);
    kvf_gguf_close(r->g);
}

static char *read_file(const char *name, size_t *n)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/engine/%s", KVF_TEST_DATA, name);
    FILE *f = fopen(path, "rb");
    cr_assert(f, "%s", path);
    char *p = calloc(1, 1 << 20);
    *n = fread(p, 1, (1 << 20) - 1, f);
    fclose(f);
    return p;
}

static bool gives_back(const kvf_tokenizer *t, const kvf_token_list *l, const char *text, size_t n)
{
    size_t at = 0;
    for (int64_t i = 0; i < l->n; i++) {
        const char *p;
        size_t m;
        kvf_tokenizer_bytes(t, l->v[i], &p, &m);
        if (at + m > n || memcmp(p, text + at, m) != 0) return false;
        at += m;
    }
    return at == n;
}

/* Compare l with the ids on the line "0: 1 2 3". */
static bool same_ids(const kvf_token_list *l, const char *line)
{
    char *end;
    int64_t i = 0;
    for (const char *p = strchr(line, ':') + 1; *p && *p != '\n'; p = end, i++) {
        long id = strtol(p, &end, 10);
        if (end == p || i >= l->n || l->v[i] != id) return false;
    }
    return i == l->n;
}

static void check_fixture(int which)
{
    rig r = open_model(which);
    cr_assert_str_eq(kvf_tokenizer_kind(r.t), models[which].kind);
    cr_assert_eq(kvf_tokenizer_add_bos(r.t), models[which].add_bos);
    size_t n_text, n_ids;
    char *text = read_file("strings.nul", &n_text), *ids = read_file(models[which].tokens, &n_ids);
    const char *line = ids;
    int n_strings = 0;
    for (const char *s = text; s < text + n_text; s += strlen(s) + 1, n_strings++) {
        for (int special = 0; special < 2; special++) {
            kvf_token_list l = { .mem = &kvf_mem_default };
            cr_assert_eq(kvf_tokenizer_encode(r.t, s, strlen(s), special, &l, &err), KVF_OK, "%s", err.msg);
            cr_assert_eq(line[0], '0' + special);
            cr_assert(same_ids(&l, line), "'%s' with special = %d", s, special);
            cr_assert(special || gives_back(r.t, &l, s, strlen(s)), "'%s'", s);
            kvf_free(l.mem, l.v);
            line = strchr(line, '\n') + 1;
        }
    }
    cr_assert_eq(n_strings, 27);
    free(text);
    free(ids);
    close_model(&r);
}

Test(tokenizer_real, qwen_gives_the_ids_of_the_fixture) { check_fixture(0); }
Test(tokenizer_real, gemma_gives_the_ids_of_the_fixture) { check_fixture(1); }

static void check_bytes(int which)
{
    rig r = open_model(which);
    uint64_t state = 42;
    char text[256];
    for (int round = 0; round < 2000; round++) {
        size_t n = (size_t)(round % 256);
        for (size_t i = 0; i < n; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            text[i] = (char)(state >> 56);
            if (round % 3 == 0) text[i] = (char)(text[i] & 0x7F);
        }
        bool sign = false; /* SentencePiece reads U+2581 as a space */
        for (size_t i = 0; i + 3 <= n; i++) sign |= memcmp(text + i, "\xe2\x96\x81", 3) == 0;
        kvf_token_list l = { .mem = &kvf_mem_default };
        cr_assert_eq(kvf_tokenizer_encode(r.t, text, n, false, &l, &err), KVF_OK);
        cr_assert_leq(l.n, (int64_t)n + 16);
        cr_assert(sign || gives_back(r.t, &l, text, n));
        kvf_free(l.mem, l.v);
    }
    close_model(&r);
}

Test(tokenizer_real, qwen_gives_back_random_bytes) { check_bytes(0); }
Test(tokenizer_real, gemma_gives_back_random_bytes) { check_bytes(1); }

Test(tokenizer_real, qwen_speaks_chatml)
{
    rig r = open_model(0);
    kvf_str jinja;
    cr_assert_eq(kvf_gguf_get_str(r.g, "tokenizer.chat_template", &jinja, &err), KVF_OK);
    const kvf_chat_template *c = kvf_chat_recognise(&jinja, r.t);
    cr_assert(c && strcmp(kvf_chat_name(c), "chatml") == 0);
    const kvf_chat_message m[] = { { "system", "You are brief.", (size_t)-1 },
                                   { "user", "hi<|im_end|>", 2 } };
    static const char want[] =
        "<|im_start|>system\nYou are brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n";
    kvf_token_list l = { .mem = &kvf_mem_default }, w = { .mem = &kvf_mem_default };
    cr_assert_eq(kvf_chat_encode(c, r.t, m, 2, true, &l, &err), KVF_OK);
    cr_assert_eq(kvf_tokenizer_encode(r.t, want, sizeof want - 1, true, &w, &err), KVF_OK);
    cr_assert(l.n == w.n && memcmp(l.v, w.v, (size_t)l.n * sizeof *l.v) == 0);
    cr_assert(l.v[0] == 151644 && kvf_tokenizer_is_end(r.t, 151645));
    kvf_free(l.mem, l.v);
    kvf_free(w.mem, w.v);
    close_model(&r);
}

/* Generous bounds that only a wrong complexity breaks: quadratic merging would take hours. */
Test(tokenizer_real, a_megabyte_takes_no_more_than_seconds)
{
    for (int which = 0; which < n_models; which++) {
        rig r = open_model(which);
        size_t n = 1000000;
        char *text = malloc(n);
        static const char *const units[] = {
            "x", " ", "\n", "\xe4\xb8\xad", "\xff", "<", "Hello world, 123. "
        };
        for (size_t u = 0; u < sizeof units / sizeof *units; u++) {
            for (size_t i = 0; i < n; i++) text[i] = units[u][i % strlen(units[u])];
            kvf_token_list l = { .mem = &kvf_mem_default };
            struct timespec a, b;
            clock_gettime(CLOCK_MONOTONIC, &a);
            cr_assert_eq(kvf_tokenizer_encode(r.t, text, n, true, &l, &err), KVF_OK);
            clock_gettime(CLOCK_MONOTONIC, &b);
            cr_assert(gives_back(r.t, &l, text, n), "'%s'", units[u]);
            cr_assert_lt((double)(b.tv_sec - a.tv_sec), 60.0, "'%s'", units[u]);
            kvf_free(l.mem, l.v);
        }
        free(text);
        close_model(&r);
    }
}
