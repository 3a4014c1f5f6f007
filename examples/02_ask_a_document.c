/* 02_ask_a_document.c - a question about a text file, answered in the model's chat format.
 *
 * New here: kvf_chat_tokenize, which frames messages the way the model was trained on and keeps
 * the document plain text, whatever it says; and a progress callback.
 *
 *     02_ask_a_document MODEL.gguf FILE.txt "question"
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kvfold/kvfold.h>

/* "document\n\nquestion" in one string; NULL if the file cannot be read. */
static char *read_prompt(const char *path, const char *question)
{
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *text = size < 0 ? NULL : malloc((size_t)size + strlen(question) + 3);
    if (text) {
        size_t n = fread(text, 1, (size_t)size, file);
        snprintf(text + n, strlen(question) + 3, "\n\n%s", question);
    }
    fclose(file);
    return text;
}

/* Reading a long document takes a while: say how far it is. Returning 1 would cancel. */
static int show_progress(void *user, int64_t done, int64_t total)
{
    (void)user;
    fprintf(stderr, "\rread %lld of %lld tokens%s", (long long)done, (long long)total,
            done == total ? "\n" : "");
    return 0;
}

static kvf_status ask(kvf_model *model, const char *text, kvf_error *err)
{
    kvf_chat_message messages[2] = {
        { "system", "Answer the question briefly, from the document only.", (size_t)-1 },
        { "user", text, (size_t)-1 },
    };
    kvf_model_info info = { .size = sizeof info };
    kvf_status rc = kvf_model_get_info(model, &info, err);
    if (rc < 0) return rc;
    /* A model without a chat format of its own gets the messages one after another. */
    const char *tmpl = info.chat_template[0] ? NULL : "none";

    /* Every token stands for at least one byte of text; the frame needs some more. */
    kvf_token_buf tokens = { .cap = (int64_t)strlen(text) + 256 };
    tokens.v = malloc((size_t)tokens.cap * sizeof *tokens.v);
    if (!tokens.v) return KVF_ERR_NOMEM;
    kvf_session_params params;
    kvf_session_params_init(&params);
    params.progress = show_progress;
    kvf_session *session = NULL;
    kvf_chat chat = { .tmpl = tmpl, .messages = messages, .n_messages = 2, .generate = 1 };
    rc = kvf_chat_tokenize(model, &chat, &tokens, err);
    if (rc == KVF_OK) rc = kvf_session_open(&session, model, &params, err);
    if (rc == KVF_OK) rc = kvf_session_sync(session, tokens.v, tokens.n, err);
    for (int i = 0; i < 200 && rc == KVF_OK; i++) {
        kvf_token token;
        const char *bytes;
        size_t n_bytes;
        rc = kvf_session_next(session, &token, err);
        if (rc == KVF_OK && kvf_token_bytes(model, token, &bytes, &n_bytes) == KVF_OK)
            fwrite(bytes, 1, n_bytes, stdout);
        fflush(stdout);
    }
    printf("\n");
    kvf_session_close(session);
    free(tokens.v);
    return rc;
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL.gguf FILE.txt \"question\"\n", argv[0]);
        return 2;
    }
    char *text = read_prompt(argv[2], argv[3]);
    if (!text) {
        fprintf(stderr, "cannot read %s\n", argv[2]);
        return 1;
    }
    kvf_error err = { 0 };
    kvf_ctx *ctx = NULL;
    kvf_model *model = NULL;
    kvf_status rc = kvf_ctx_open(&ctx, NULL, &err);
    if (rc == KVF_OK) rc = kvf_model_open(&model, ctx, argv[1], &err);
    if (rc == KVF_OK) rc = ask(model, text, &err);
    if (rc < 0) fprintf(stderr, "%s: %s\n", kvf_status_name(rc), err.msg);
    kvf_model_close(model);
    kvf_ctx_close(ctx);
    free(text);
    return rc < 0 ? 1 : 0;
}
