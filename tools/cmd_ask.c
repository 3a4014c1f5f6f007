/* cmd_ask.c - kvfold ask: answer questions about documents.
 *
 * All questions of one call share the documents' keys and values: the second and later ones only
 * read themselves.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answer.h"
#include "commands.h"
#include "interrupt.h"
#include "json.h"
#include "report.h"
#include "utf8.h"

typedef struct ask_options {
    arg_texts documents, questions;
    const char *question_file, *tmpl, *system;
    bool raw, no_stream, json;
} ask_options;

#define ROW(field, name, letter, value, type, help)                                                          \
    {                                                                                                        \
        name, letter, value, type, offsetof(ask_options, field), NULL, 0, 0, NULL, help                      \
    }

static const arg_row ask_rows[] = {
    ROW(documents, "--document", 'd', "FILE", ARG_TEXTS,
        "text, Markdown, HTML or PDF, also gzip-compressed; - is standard input; may be given again"),
    ROW(questions, "--question", 'q', "TEXT", ARG_TEXTS, "a question; may be given again"),
    ROW(question_file, "--questions", 0, "FILE", ARG_TEXT, "questions, one per line; - is standard input"),
    ROW(json, "--json", 'j', NULL, ARG_FLAG, "one JSON object per question"),
    ROW(no_stream, "--no-stream", 0, NULL, ARG_FLAG, "print the answer when it is complete"),
    ROW(raw, "--raw", 0, NULL, ARG_FLAG,
        "the question (or standard input) is the whole prompt: no frame, control tokens are read"),
    ROW(system, "--system", 0, "TEXT", ARG_TEXT, "instructions to the model instead of the usual ones"),
    { "--template", 0, "NAME", ARG_CHOICE, offsetof(ask_options, tmpl), NULL, 0, 0,
      "chatml|llama3|gemma|mistral|none|plain",
      "chat frame: chatml, llama3, gemma, mistral, none, plain "
      "(default: the model's)" },
    { 0 },
};

static const arg_command ask_command = {
    .name = "ask",
    .synopsis = "[-m MODEL] -d FILE [-d FILE...] [options] \"question\"",
    .summary = "answer questions about documents",
    .details = "The answer goes to standard output; a line with what it took goes to standard error.\n"
               "Without a question, and at a terminal, questions are asked for until an empty line.",
    .examples = "  kvfold ask -d contract.pdf \"When can the tenant give notice?\"\n"
                "  kvfold ask -d a.txt -d b.html -q \"What do they agree on?\" -q \"And where not?\"\n"
                "  man bash | kvfold ask -d - \"What does 'set -e' do?\" --json\n"
                "  kvfold ask -d policy.txt.gz --questions questions.txt --json > answers.jsonl",
    .operand = "The question is one argument: put it in quotes, and -d before each document.",
    .max_operands = 1,
};

/* Everything the command holds; zeroed, then freed in one place. */
typedef struct ask {
    ask_options o;
    engine_options eo;
    sampling_options so;
    engine e;
    document *docs; /* [n_docs] */
    size_t n_docs;
    buffer body;  /* the documents as they stand in the prompt */
    buffer asked; /* text of --questions, cut into lines */
} ask;

static const char *system_text(const ask *a)
{
    if (a->o.system) return a->o.system;
    return a->n_docs ? "You are a helpful assistant. Answer from the given text only."
                     : "You are a helpful assistant.";
}

/* ---- Input ------------------------------------------------------------------------------ */

static kvf_status open_documents(ask *a, kvf_error *err)
{
    size_t n = a->o.documents.n;
    a->docs = calloc(n ? n : 1, sizeof *a->docs);
    if (!a->docs) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the documents.");
    bool used_stdin = false;
    for (size_t i = 0; i < n; i++) {
        const char *path = a->o.documents.v[i];
        bool is_stdin = strcmp(path, "-") == 0;
        if (is_stdin && used_stdin)
            return report_fail(err, KVF_ERR_ARG, "Standard input (-) can be one document only.");
        used_stdin = used_stdin || is_stdin;
        kvf_status rc = doc_open(&a->docs[i], path, err);
        if (rc != KVF_OK) return rc;
        a->n_docs = i + 1;
        if (a->docs[i].note[0] && !a->eo.quiet) report_note("%s: %s", path, a->docs[i].note);
    }
    return prompt_documents(&a->body, a->docs, a->n_docs, err);
}

/* Questions of a file: its lines that are not empty. */
static kvf_status read_questions(ask *a, kvf_error *err)
{
    buffer bytes = { .max = (size_t)16 << 20 };
    kvf_status rc = buffer_read_file(&bytes, a->o.question_file, err);
    if (rc == KVF_OK) utf8_add_clean(&a->asked, buffer_text(&bytes), bytes.n, UTF8_KEEP);
    buffer_free(&bytes);
    if (rc == KVF_OK) rc = buffer_status(&a->asked, a->o.question_file, err);
    if (rc != KVF_OK || !a->asked.n) return rc;
    for (char *line = strtok(a->asked.v, "\r\n"); line; line = strtok(NULL, "\r\n")) {
        if (!line[strspn(line, " \t")]) continue;
        const char **v = realloc(a->o.questions.v, (a->o.questions.n + 1) * sizeof *v);
        if (!v) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the questions.");
        a->o.questions.v = v;
        v[a->o.questions.n++] = line;
    }
    return KVF_OK;
}

static kvf_status check_options(const ask *a, const arg_texts *operands, kvf_error *err)
{
    bool question_is_stdin = operands->n && strcmp(operands->v[0], "-") == 0;
    size_t n_stdin = question_is_stdin || (a->o.question_file && strcmp(a->o.question_file, "-") == 0);
    for (size_t i = 0; i < a->o.documents.n; i++) n_stdin += strcmp(a->o.documents.v[i], "-") == 0;
    if (n_stdin > 1) return report_fail(err, KVF_ERR_ARG, "Standard input (-) can be read once only.");
    if (a->o.raw && a->o.documents.n)
        return report_fail(err, KVF_ERR_ARG,
                           "--raw takes the whole prompt from the question; put the document in "
                           "it instead of -d.");
    if (operands->n && !operands->v[0][strspn(operands->v[0], " \t\r\n")])
        return report_fail(err, KVF_ERR_ARG, "The question is empty.");
    return KVF_OK;
}

/* ---- Asking ----------------------------------------------------------------------------- */

static kvf_status build_prompt(ask *a, const char *question, token_list *prompt, kvf_error *err)
{
    if (a->o.raw) {
        kvf_status rc = prompt_check_text(&a->e, question, strlen(question), err);
        if (rc != KVF_OK) return rc;
        return prompt_tokenize(prompt, a->e.model, question, strlen(question),
                               KVF_TOKENIZE_BOS | KVF_TOKENIZE_SPECIAL, err);
    }
    buffer user = { 0 };
    buffer_add(&user, buffer_text(&a->body), a->body.n);
    if (a->body.n) buffer_add_text(&user, "\n\n");
    utf8_add_clean(&user, question, strlen(question), UTF8_KEEP);
    buffer_trim_end(&user);
    kvf_status rc = buffer_status(&user, "the prompt", err);
    if (rc == KVF_OK) {
        kvf_chat_message msgs[] = { { "system", system_text(a), (size_t)-1 },
                                    { "user", buffer_text(&user), user.n } };
        rc = prompt_frame(prompt, &a->e, a->o.tmpl, msgs, 2, err);
    }
    buffer_free(&user);
    return rc;
}

static kvf_status print_json(const ask *a, const answer *ans, const char *question, kvf_error *err)
{
    cJSON *o = answer_json(ans, &a->e);
    json_text(o, "question", a->o.raw ? "" : question, (size_t)-1);
    cJSON *docs = json_array(o, "documents");
    for (size_t i = 0; i < a->n_docs; i++) {
        cJSON *d = json_object(docs, NULL);
        json_text(d, "title", a->docs[i].title, (size_t)-1);
        json_text(d, "kind", a->docs[i].kind, (size_t)-1);
        json_int(d, "bytes", (int64_t)a->docs[i].text.n);
        if (a->docs[i].n_pages) json_int(d, "pages", a->docs[i].n_pages);
    }
    return json_print(o) ? KVF_OK : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

static kvf_status ask_one(ask *a, const char *question, kvf_error *err)
{
    double start = clock_s();
    token_list prompt = { 0 };
    answer ans;
    memset(&ans, 0, sizeof ans);
    kvf_status rc = build_prompt(a, question, &prompt, err);
    if (rc == KVF_OK) {
        answer_request r = { .prompt = &prompt, .max_tokens = a->so.max_tokens, .ignore_eos = a->so.ignore_eos,
                             .start_s = start };
        r.trim = !a->o.raw;
        r.stop = !a->o.raw && prompt_is_plain(&a->e, a->o.tmpl) ? "\n\n" : NULL;
        r.stream = !a->o.json && !a->o.no_stream;
        rc = answer_run(&ans, &a->e, &r, err);
        if (rc == KVF_OK && a->o.json) rc = print_json(a, &ans, question, err);
        if (rc == KVF_OK && !a->o.json && a->o.no_stream) {
            fwrite(buffer_text(&ans.text), 1, ans.text.n, stdout);
            putchar('\n');
        }
        fflush(stdout);
        if (rc == KVF_OK && !a->o.json && !a->eo.quiet) answer_summary(&ans);
        if (rc == KVF_OK && a->eo.verbose)
            report_note("backend %s, cpu %s, kernels %s, policy %s", ans.stats.backend, ans.stats.cpu,
                        ans.stats.kernels, ans.stats.policy);
    }
    answer_free(&ans);
    token_list_free(&prompt);
    return rc;
}

static kvf_status ask_all(ask *a, kvf_error *err)
{
    bool many = a->o.questions.n > 1 && !a->o.json;
    for (size_t i = 0; i < a->o.questions.n; i++) {
        if (many) printf("%s> %s\n", i ? "\n" : "", a->o.questions.v[i]);
        kvf_status rc = ask_one(a, a->o.questions.v[i], err);
        if (rc != KVF_OK || ferror(stdout)) return rc;
    }
    return KVF_OK;
}

/* At the terminal: until an empty line or the end of input. Ctrl-C stops an answer; at the prompt
 * it ends the program. An error in one question does not end the rest. */
static kvf_status ask_interactive(ask *a, kvf_error *err)
{
    char *line = NULL;
    size_t cap = 0;
    kvf_status rc = KVF_OK;
    for (;;) {
        interrupt_attach(NULL);
        interrupt_clear();
        fputs("> ", stderr);
        fflush(stderr);
        if (getline(&line, &cap, stdin) < 0 || !line[strspn(line, " \t\r\n")]) break;
        rc = ask_one(a, line, err);
        if (rc == KVF_OK) continue;
        if (rc != KVF_ERR_CANCELLED && rc != KVF_ERR_LIMIT) break;
        report_status(err);
        rc = KVF_OK;
    }
    free(line);
    return rc;
}

/* Where the questions come from: the argument, -q, --questions, standard input for --raw. */
static kvf_status gather_questions(ask *a, const arg_texts *operands, kvf_error *err)
{
    bool from_stdin = (operands->n && strcmp(operands->v[0], "-") == 0) ||
                      (a->o.raw && !operands->n && !a->o.questions.n && !a->o.question_file);
    if (a->o.question_file) return read_questions(a, err);
    if (!from_stdin) return KVF_OK;
    a->asked.max = DOC_LIMIT;
    kvf_status rc = buffer_read(&a->asked, STDIN_FILENO, "standard input", err);
    if (rc != KVF_OK) return rc;
    if (!a->o.raw) buffer_trim_end(&a->asked);
    if (!a->asked.n)
        return report_fail(err, KVF_ERR_ARG, "Standard input is empty: there is no question in it.");
    if (memchr(a->asked.v, '\0', a->asked.n))
        return report_fail(err, KVF_ERR_FORMAT, "Standard input is binary data, not a question.");
    return KVF_OK;
}

static kvf_status ask_run(ask *a, const arg_texts *operands, kvf_error *err)
{
    kvf_status rc = check_options(a, operands, err);
    if (rc == KVF_OK) rc = gather_questions(a, operands, err);
    if (rc == KVF_OK) rc = open_documents(a, err);
    if (rc != KVF_OK) return rc;

    const char *single = operands->n ? operands->v[0] : NULL;
    if ((single && strcmp(single, "-") == 0) || (a->o.raw && !single && !a->o.questions.n && a->asked.n))
        single = a->asked.v;
    bool interactive = !single && !a->o.questions.n;
    if (interactive && !report_is_terminal(stdin))
        return report_fail(err, KVF_ERR_ARG,
                           "There is no question; give it as the last argument, in quotes.");
    rc = engine_open(&a->e, &a->eo, err);
    if (rc == KVF_OK) rc = engine_open_session(&a->e, &a->eo, &a->so, err);
    if (rc == KVF_OK) rc = prompt_check_text(&a->e, buffer_text(&a->body), a->body.n, err);
    if (rc == KVF_OK && single) rc = ask_one(a, single, err);
    if (rc == KVF_OK && a->o.questions.n) rc = ask_all(a, err);
    if (rc == KVF_OK && interactive) rc = ask_interactive(a, err);
    return rc;
}

int cmd_ask(int argc, char **argv)
{
    ask a;
    memset(&a, 0, sizeof a);
    arg_group groups[] = { { "Options", ask_rows, &a.o },
                           { "Sampling", engine_sampling_rows, &a.so },
                           { "Model", engine_model_rows, &a.eo },
                           { "Memory", engine_session_rows, &a.eo },
                           { NULL, NULL, NULL } };
    arg_texts operands = { 0 };
    arg_result parsed = args_parse(&ask_command, groups, argc, argv, &operands);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;

    kvf_error err = { 0 };
    kvf_status rc = ask_run(&a, &operands, &err);
    int code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    engine_close(&a.e);
    for (size_t i = 0; i < a.n_docs; i++) doc_close(&a.docs[i]);
    free(a.docs);
    buffer_free(&a.body);
    buffer_free(&a.asked);
    args_free(groups, &operands);
    return code;
}
