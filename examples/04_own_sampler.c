/* 04_own_sampler.c - choose the next token yourself.
 *
 * kvf_session_logits gives a score for every token of the vocabulary; what you append next is your
 * business. This sampler writes text without a given letter: the best-scored token that does not
 * contain it wins.
 *
 *     04_own_sampler MODEL.gguf [LETTER] ["prompt"]
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <kvfold/kvfold.h>

/* Would the token put the letter, small or capital, into the text? Tokens without text (control
 * tokens) are not wanted either. */
static int is_forbidden(const kvf_model *model, kvf_token token, char letter)
{
    const char *bytes;
    size_t n;
    if (kvf_token_bytes(model, token, &bytes, &n) != KVF_OK || n == 0) return 1;
    return memchr(bytes, letter, n) || memchr(bytes, letter ^ 0x20, n);
}

static kvf_token pick(const kvf_model *model, const float *logits, int32_t n_vocab, char letter)
{
    kvf_token best = KVF_TOKEN_NONE;
    float best_score = -INFINITY;
    for (kvf_token t = 0; t < n_vocab; t++) {
        if (logits[t] <= best_score || is_forbidden(model, t, letter)) continue;
        best = t;
        best_score = logits[t];
    }
    return best;
}

static kvf_status write_without(kvf_session *session, const kvf_model *model, char letter, kvf_error *err)
{
    kvf_model_info info = { .size = sizeof info };
    kvf_status rc = kvf_model_get_info(model, &info, err);
    for (int i = 0; i < 40 && rc == KVF_OK; i++) {
        float *logits;
        rc = kvf_session_logits(session, &logits, err);
        if (rc < 0) break;
        kvf_token token = pick(model, logits, info.n_vocab, letter);
        if (token == KVF_TOKEN_NONE || kvf_token_is_end(model, token)) break;
        const char *bytes;
        size_t n;
        rc = kvf_token_bytes(model, token, &bytes, &n);
        if (rc == KVF_OK) fwrite(bytes, 1, n, stdout);
        fflush(stdout);
        if (rc == KVF_OK) rc = kvf_session_append(session, &token, 1, err);
    }
    return rc;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL.gguf [LETTER] [\"prompt\"]\n", argv[0]);
        return 2;
    }
    char letter = argc > 2 ? argv[2][0] : 'e';
    const char *prompt = argc > 3 ? argv[3] : "A short story about a dog:";
    kvf_error err = { 0 };
    kvf_ctx *ctx = NULL;
    kvf_model *model = NULL;
    kvf_session *session = NULL;
    kvf_token tokens[512];
    kvf_token_buf buf = { .v = tokens, .cap = 512 };
    kvf_status rc = kvf_ctx_open(&ctx, NULL, &err);
    if (rc == KVF_OK) rc = kvf_model_open(&model, ctx, argv[1], &err);
    if (rc == KVF_OK) rc = kvf_session_open(&session, model, NULL, &err);
    if (rc == KVF_OK)
        rc = kvf_tokenize(model, prompt, strlen(prompt), KVF_TOKENIZE_BOS, &buf, &err);
    if (rc == KVF_OK) rc = kvf_session_append(session, buf.v, buf.n, &err);
    if (rc == KVF_OK) rc = write_without(session, model, letter, &err);
    printf("\n");
    if (rc < 0) fprintf(stderr, "%s: %s\n", kvf_status_name(rc), err.msg);
    kvf_session_close(session);
    kvf_model_close(model);
    kvf_ctx_close(ctx);
    return rc < 0 ? 1 : 0;
}
