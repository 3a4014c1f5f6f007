/* cmd_tokenize.c - kvfold tokenize: the tokens of a text.
 *
 * The bytes are taken as they are: no document reader, no repair. By default control tokens
 * written in the text are text, and no BOS is added.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "commands.h"
#include "prompt.h"
#include "report.h"
#include "utf8.h"

typedef struct tokenize_options {
    bool json, special, bos, count;
} tokenize_options;

#define FLAG(field, name, letter, help)                                                                      \
    {                                                                                                        \
        name, letter, NULL, ARG_FLAG, offsetof(tokenize_options, field), NULL, 0, 0, NULL, help              \
    }

static const arg_row tokenize_rows[] = {
    FLAG(json, "--json", 'j', "print an array of token ids"),
    FLAG(count, "--count", 0, "print only how many tokens there are"),
    FLAG(special, "--special", 0, "read control tokens in the text, \"<|im_end|>\", as such"),
    FLAG(bos, "--bos", 0, "begin with BOS if the model's rule says so"),
    { 0 },
};

static const arg_command tokenize_command = {
    .name = "tokenize",
    .synopsis = "[-m MODEL] [--json] [--special] [--bos] [FILE | -]",
    .summary = "show the tokens of a text",
    .details =
        "Reads a file, or standard input when there is none or it is -. Prints a line per token: id, tab,\n"
        "the token's text with \\n, \\t, \\\\ and \\xHH escapes.",
    .examples = "  echo -n \"Hello, world\" | kvfold tokenize\n"
                "  kvfold tokenize -m model.gguf --json --special prompt.txt\n"
                "  kvfold tokenize --count book.txt",
    .operand = "One file at a time.",
    .max_operands = 1,
};

/* Printable form of a token: one line whatever is in it. */
static void print_piece(const kvf_model *m, kvf_token token)
{
    const char *p = NULL;
    size_t n = 0;
    if (kvf_token_bytes(m, token, &p, &n) != KVF_OK || n == 0) p = kvf_token_name(m, token, &n);
    for (size_t i = 0; p && i < n;) {
        uint32_t cp = 0;
        int len = utf8_decode(p + i, n - i, &cp);
        if (p[i] == '\n')
            fputs("\\n", stdout);
        else if (p[i] == '\t')
            fputs("\\t", stdout);
        else if (p[i] == '\\')
            fputs("\\\\", stdout);
        else if (len > 0 && cp >= 0x20 && (cp < 0x7f || cp > 0x9f))
            fwrite(p + i, 1, (size_t)len, stdout);
        else {
            printf("\\x%02x", (unsigned)(unsigned char)p[i]);
            len = 1;
        }
        i += (size_t)len;
    }
}

static void print_tokens(const kvf_model *m, const token_list *t, const tokenize_options *o)
{
    if (o->count) {
        printf(o->json ? "{\"n_tokens\":%" PRId64 "}\n" : "%" PRId64 "\n", t->n);
        return;
    }
    if (o->json) putchar('[');
    for (int64_t i = 0; i < t->n && !ferror(stdout); i++) {
        printf(o->json ? "%s%" PRId32 : "%s%" PRId32 "\t", o->json && i ? ", " : "", t->v[i]);
        if (o->json) continue;
        print_piece(m, t->v[i]);
        putchar('\n');
    }
    if (o->json) fputs("]\n", stdout);
}

static kvf_status tokenize_run(const tokenize_options *o, const engine_options *eo, const char *path,
                               kvf_error *err)
{
    engine e;
    buffer text = { .max = DOC_LIMIT };
    token_list tokens = { 0 };
    kvf_status rc = buffer_read_file(&text, path, err);
    if (rc != KVF_OK) {
        buffer_free(&text);
        return rc;
    }
    rc = engine_open(&e, eo, err);
    int flags = (o->special ? KVF_TOKENIZE_SPECIAL : 0) | (o->bos ? KVF_TOKENIZE_BOS : 0);
    if (rc == KVF_OK) rc = prompt_tokenize(&tokens, e.model, buffer_text(&text), text.n, flags, err);
    if (rc == KVF_OK) print_tokens(e.model, &tokens, o);
    token_list_free(&tokens);
    buffer_free(&text);
    engine_close(&e);
    return rc;
}

int cmd_tokenize(int argc, char **argv)
{
    tokenize_options o = { 0 };
    engine_options eo = { 0 };
    arg_group groups[] = { { "Options", tokenize_rows, &o },
                           { "Model", engine_model_rows, &eo },
                           { NULL, NULL, NULL } };
    arg_texts operands = { 0 };
    arg_result parsed = args_parse(&tokenize_command, groups, argc, argv, &operands);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;
    kvf_error err = { 0 };
    kvf_status rc = tokenize_run(&o, &eo, operands.n ? operands.v[0] : "-", &err);
    int code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    args_free(groups, &operands);
    return code;
}
