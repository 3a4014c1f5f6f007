/* fuzz_model.c - any bytes as a model: opened and run through the public interface.
 *
 * The seeds are complete models of a few KB, so that damage reaches shapes, weights (NaN, infinite
 * and denormal scales) and the forward pass.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* memfd_create */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvfold/kvfold.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void describe(const kvf_model *m)
{
    kvf_model_info info = { .size = sizeof info };
    kvf_model_entry e;
    if (kvf_model_get_info(m, &info, NULL) != KVF_OK) abort();
    for (int64_t i = 0; kvf_model_meta(m, i, &e) == KVF_OK; i++) {
        if (!e.name || !e.type || !e.value) abort();
    }
    for (int64_t i = 0; kvf_model_tensor(m, i, &e) == KVF_OK; i++) {
        if (!e.name || !e.type || !e.value) abort();
    }
}

static void generate(kvf_model *m)
{
    kvf_session_params p;
    kvf_session *s;
    kvf_error err;
    kvf_token token[16];
    static const kvf_chat_message hello = { "user", "hi <|im_end|>", (size_t)-1 };
    kvf_session_params_init(&p);
    p.n_ctx = 32;
    p.sampling.temperature = 0.7f;
    kvf_chat chat = { .messages = &hello, .n_messages = 1, .generate = 1 };
    kvf_token_buf buf = { .v = token, .cap = 16 };
    if (kvf_chat_tokenize(m, &chat, &buf, &err) != KVF_OK) buf.n = 1, token[0] = 0;
    if (kvf_session_open(&s, m, &p, &err) != KVF_OK) return;
    if (kvf_session_append(s, token, buf.n, &err) == KVF_OK) {
        for (int i = 0; i < 3 && kvf_session_next(s, token, &err) == KVF_OK; i++) {
            const char *bytes;
            size_t len;
            if (kvf_token_bytes(m, token[0], &bytes, &len) != KVF_OK) abort();
        }
    }
    kvf_session_close(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static kvf_ctx *ctx;
    kvf_error err;
    if (!ctx) {
        kvf_ctx_params p;
        kvf_ctx_params_init(&p);
        p.n_threads = 1;
        if (kvf_ctx_open(&ctx, &p, &err) != KVF_OK) abort();
    }
    int fd = memfd_create("model", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    kvf_model *m;
    if (kvf_model_open(&m, ctx, path, &err) == KVF_OK) {
        describe(m);
        generate(m);
        kvf_model_close(m);
    }
    close(fd);
    return 0;
}
