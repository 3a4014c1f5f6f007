/* 01_first_tokens.c - open a model, read a prompt, write some tokens.
 *
 * The whole life of the four objects: kvf_ctx (threads), kvf_model (weights), kvf_session (one
 * text), kvf_error (what went wrong).
 *
 *     01_first_tokens MODEL.gguf ["prompt"]
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include <kvfold/kvfold.h>

/* Tokens are pieces of text; print the bytes of one. */
static void print_token(const kvf_model *model, kvf_token token)
{
    const char *bytes;
    size_t n;
    if (kvf_token_bytes(model, token, &bytes, &n) == KVF_OK) fwrite(bytes, 1, n, stdout);
    fflush(stdout);
}

static kvf_status write_tokens(kvf_session *session, const kvf_model *model, int n_max, kvf_error *err)
{
    for (int i = 0; i < n_max; i++) {
        kvf_token token;
        kvf_status rc = kvf_session_next(session, &token, err);
        if (rc != KVF_OK) return rc; /* KVF_DONE at the end of the text, or a failure */
        print_token(model, token);
    }
    return KVF_OK;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL.gguf [\"prompt\"]\n", argv[0]);
        return 2;
    }
    const char *prompt = argc > 2 ? argv[2] : "The three primary colours are";

    kvf_error err;
    kvf_ctx *ctx = NULL;
    kvf_model *model = NULL;
    kvf_session *session = NULL;
    kvf_token tokens[512];
    kvf_token_buf buf = { .v = tokens, .cap = 512 };

    /* Each call returns a status; a negative one is a failure and err says why. NULL parameters
     * stand for defaults: one thread per core, the model's own context length, greedy. */
    kvf_status rc = kvf_ctx_open(&ctx, NULL, &err);
    if (rc == KVF_OK) rc = kvf_model_open(&model, ctx, argv[1], &err);
    if (rc == KVF_OK) rc = kvf_session_open(&session, model, NULL, &err);
    if (rc == KVF_OK)
        rc = kvf_tokenize(model, prompt, strlen(prompt), KVF_TOKENIZE_BOS, &buf, &err);
    if (rc == KVF_OK) rc = kvf_session_append(session, buf.v, buf.n, &err);
    if (rc == KVF_OK) {
        printf("%s", prompt);
        rc = write_tokens(session, model, 32, &err);
        printf("\n");
    }
    if (rc < 0) fprintf(stderr, "%s: %s\n", kvf_status_name(rc), err.msg);

    /* Closing takes NULL, so one path serves success and every failure. */
    kvf_session_close(session);
    kvf_model_close(model);
    kvf_ctx_close(ctx);
    return rc < 0 ? 1 : 0;
}
