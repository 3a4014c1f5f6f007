/* 07_ingest_and_ask.c - read a document once into a store, ask it after a restart, and say where the
 * answer was read from.
 *
 * The first run reads; later runs find the document there and only ask. A document may be far longer
 * than what the model was trained for: the policy "infllm" keeps a memory of it and reads what a question
 * needs.
 *
 *     07_ingest_and_ask MODEL.gguf STORE-FOLDER DOCUMENT.txt QUESTION
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kvfold/kvfold.h>

static kvf_error err;

static int failed(kvf_status rc)
{
    if (rc < 0) fprintf(stderr, "%s: %s\n", kvf_status_name(err.code), err.msg);
    return rc < 0;
}

static char *read_file(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    char *text = malloc(1 << 20);
    *n = f && text ? fread(text, 1, 1 << 20, f) : 0;
    if (f) fclose(f);
    return text;
}

static int64_t tokenize(kvf_model *m, const char *text, size_t n, kvf_token *out, int64_t cap)
{
    kvf_token_buf buf = { .v = out, .cap = cap };
    return failed(kvf_tokenize(m, text, n, 0, &buf, &err)) ? -1 : buf.n;
}

static void print_passages(kvf_session *s, kvf_model *m, int64_t n_doc)
{
    kvf_passage p[3];
    int64_t n;
    const kvf_token *tokens;
    if (failed(kvf_session_passages(s, 0, n_doc, p, 3, &n, &err))) return;
    kvf_session_tokens(s, &tokens);
    for (int64_t i = 0; i < n; i++) {
        printf("\n[%.0f %%] ", 100 * (double)p[i].share);
        for (int64_t t = p[i].first; t < p[i].first + p[i].n; t++) {
            const char *bytes;
            size_t len;
            if (kvf_token_bytes(m, tokens[t], &bytes, &len) == KVF_OK) fwrite(bytes, 1, len, stdout);
        }
    }
    putchar('\n');
}

/* Document in, question, at most 40 tokens of answer, passages. */
static int ask(kvf_session *s, kvf_model *m, kvf_store *store, char **argv)
{
    enum { MOST = 1 << 20 };
    size_t n_text;
    char *text = read_file(argv[3], &n_text);
    kvf_token *tokens = malloc((MOST + 16) * sizeof *tokens), token;
    int64_t n_doc = text && tokens ? tokenize(m, text, n_text, tokens, MOST + 16) : -1, n_question = 0;
    kvf_ingest in = { .size = sizeof in, .name = argv[3], .tokens = tokens, .n = n_doc };
    int bad = n_doc < 1 || failed(kvf_session_ingest(s, store, &in, &err));
    if (!bad) n_question = tokenize(m, argv[4], strlen(argv[4]), tokens, MOST + 16);
    bad = bad || n_question < 1 || failed(kvf_session_append(s, tokens, n_question, &err));
    for (int i = 0; !bad && i < 40; i++) {
        const char *bytes;
        size_t len;
        kvf_status rc = kvf_session_next(s, &token, &err);
        if (rc == KVF_DONE) break;
        bad = failed(rc) || failed(kvf_token_bytes(m, token, &bytes, &len));
        if (!bad) fwrite(bytes, 1, len, stdout);
    }
    if (!bad) print_passages(s, m, n_doc);
    free(text);
    free(tokens);
    return bad;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: %s MODEL.gguf STORE-FOLDER DOCUMENT.txt QUESTION\n", argv[0]);
        return 2;
    }
    kvf_ctx *ctx = NULL;
    kvf_model *model = NULL;
    kvf_store *store = NULL;
    kvf_session *session = NULL;
    kvf_store_params sp;
    kvf_store_params_init(&sp);
    sp.mode = KVF_STORE_CREATE;
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.policy = "infllm";
    p.passages = 1;
    int bad = failed(kvf_ctx_open(&ctx, NULL, &err)) || failed(kvf_model_open(&model, ctx, argv[1], &err)) ||
              failed(kvf_store_open(&store, ctx, argv[2], &sp, &err)) ||
              failed(kvf_session_open(&session, model, &p, &err)) || ask(session, model, store, argv);
    kvf_session_close(session);
    kvf_store_close(store);
    kvf_model_close(model);
    kvf_ctx_close(ctx);
    return bad;
}
