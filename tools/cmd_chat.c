/* cmd_chat.c - kvfold chat: a conversation, about documents if there are any.
 *
 * The whole conversation is framed anew for every turn; kvf_session_sync finds that all but the
 * last turn is in the cache and computes only what is new.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "answer.h"
#include "commands.h"
#include "interrupt.h"
#include "json.h"
#include "report.h"
#include "utf8.h"

typedef struct chat_options {
    arg_texts documents;
    const char *tmpl, *system;
    bool json;
} chat_options;

static const arg_row chat_rows[] = {
    { "--document", 'd', "FILE", ARG_TEXTS, offsetof(chat_options, documents), NULL, 0, 0, NULL,
      "text, Markdown, HTML or PDF to talk about; may be given again" },
    { "--json", 'j', NULL, ARG_FLAG, offsetof(chat_options, json), NULL, 0, 0, NULL,
      "one JSON object per answer" },
    { "--system", 0, "TEXT", ARG_TEXT, offsetof(chat_options, system), NULL, 0, 0, NULL,
      "instructions to the model instead of the usual ones" },
    { "--template", 0, "NAME", ARG_CHOICE, offsetof(chat_options, tmpl), NULL, 0, 0,
      "chatml|llama3|gemma|mistral|none|plain",
      "chat frame: chatml, llama3, gemma, mistral, none, plain (default: the model's)" },
    { 0 },
};

static const arg_command chat_command = {
    .name = "chat",
    .synopsis = "[-m MODEL] [-d FILE...] [options]",
    .summary = "talk with a model, about documents if you like",
    .details =
        "One line is one message. /help lists the commands; /exit or the end of input ends. Ctrl-C stops\n"
        "an answer. Input may be a pipe: every line is answered.",
    .examples = "  kvfold chat -d manual.pdf\n"
                "  kvfold chat -m qwen2.5-coder-1.5b --temp 0.7 --seed 1\n"
                "  printf 'Hello\\nAnd in French?\\n' | kvfold chat",
    .max_operands = 0,
};

typedef struct turn {
    char *text; /* owned */
    bool user;
} turn;

typedef struct chat {
    chat_options o;
    engine_options eo;
    sampling_options so;
    engine e;
    buffer body; /* documents, in front of the first message */
    turn *turns; /* [n_turns] */
    size_t n_turns;
    answer last; /* for /stats */
    bool has_last, interactive;
} chat;

static kvf_status no_memory(kvf_error *err)
{
    return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the conversation.");
}

static void drop_turns(chat *c, size_t keep)
{
    while (c->n_turns > keep) free(c->turns[--c->n_turns].text);
}

static kvf_status add_turn(chat *c, bool user, const char *text, size_t n, kvf_error *err)
{
    turn *grown = realloc(c->turns, (c->n_turns + 1) * sizeof *grown);
    if (!grown) return no_memory(err);
    c->turns = grown;
    buffer b = { 0 };
    /* The documents are part of the first message, as in kvfold ask. */
    if (!c->n_turns && c->body.n) {
        buffer_add(&b, c->body.v, c->body.n);
        buffer_add_text(&b, "\n\n");
    }
    utf8_add_clean(&b, text, n, UTF8_KEEP);
    buffer_trim_end(&b);
    if (!b.v) buffer_add_char(&b, ' ');
    if (b.failed) {
        buffer_free(&b);
        return no_memory(err);
    }
    c->turns[c->n_turns++] = (turn){ .text = b.v, .user = user };
    return KVF_OK;
}

static kvf_status frame(const chat *c, token_list *prompt, kvf_error *err)
{
    kvf_chat_message *msgs = calloc(c->n_turns + 1, sizeof *msgs);
    if (!msgs) return no_memory(err);
    const char *usual = c->body.n ? "You are a helpful assistant. Answer from the given text only."
                                  : "You are a helpful assistant.";
    msgs[0] = (kvf_chat_message){ "system", c->o.system ? c->o.system : usual, (size_t)-1 };
    for (size_t i = 0; i < c->n_turns; i++)
        msgs[i + 1] =
            (kvf_chat_message){ c->turns[i].user ? "user" : "assistant", c->turns[i].text, (size_t)-1 };
    kvf_status rc = prompt_frame(prompt, &c->e, c->o.tmpl, msgs, (int64_t)c->n_turns + 1, err);
    free(msgs);
    return rc;
}

/* One message and its answer. If it fails, the conversation is as before. */
static kvf_status say(chat *c, const char *text, kvf_error *err)
{
    double start = clock_s();
    size_t before = c->n_turns;
    token_list prompt = { 0 };
    if (c->has_last) answer_free(&c->last);
    c->has_last = false;
    kvf_status rc = add_turn(c, true, text, strlen(text), err);
    if (rc == KVF_OK) rc = frame(c, &prompt, err);
    if (rc == KVF_OK) {
        answer_request r = {
            .prompt = &prompt, .max_tokens = c->so.max_tokens, .ignore_eos = c->so.ignore_eos, .start_s = start, .trim = true
        };
        r.stop = prompt_is_plain(&c->e, c->o.tmpl) ? "\n\n" : NULL;
        r.stream = !c->o.json;
        rc = answer_run(&c->last, &c->e, &r, err);
        c->has_last = true;
    }
    if (rc == KVF_OK) rc = add_turn(c, false, buffer_text(&c->last.text), c->last.text.n, err);
    if (rc == KVF_OK && c->o.json && !json_print(answer_json(&c->last, &c->e))) rc = no_memory(err);
    if (rc != KVF_OK) drop_turns(c, before);
    token_list_free(&prompt);
    return rc;
}

/* Returns false when the conversation shall end. */
static bool slash_command(chat *c, const char *line)
{
    static const char *const names[] = { "/exit", "/quit", "/reset", "/stats", "/help" };
    if (strcmp(line, "/exit") == 0 || strcmp(line, "/quit") == 0) return false;
    if (strcmp(line, "/reset") == 0) {
        drop_turns(c, 0);
        report_note("the conversation starts anew%s", c->body.n ? "; the documents stay" : "");
    } else if (strcmp(line, "/stats") == 0) {
        if (c->has_last)
            answer_summary(&c->last);
        else
            report_note("nothing has been answered yet");
    } else if (strcmp(line, "/help") == 0) {
        fputs("/reset  forget the conversation, keep the documents\n"
              "/stats  what the last answer took\n"
              "/exit   end (so does Ctrl-D)\n"
              "Ctrl-C stops an answer. A message that begins with // is sent with one / less.\n",
              stderr);
    } else {
        const char *close = args_closest(line, names, sizeof names / sizeof *names);
        report_note("no command '%.40s'; %s%s%s", line, close ? "did you mean " : "see /help",
                    close ? close : "", close ? "?" : "");
    }
    return true;
}

static kvf_status on_error(chat *c, kvf_status rc, kvf_error *err)
{
    if (!c->interactive || (rc != KVF_ERR_CANCELLED && rc != KVF_ERR_LIMIT)) return rc;
    if (rc == KVF_ERR_CANCELLED)
        report_note("stopped; the message was taken back");
    else
        report_note("%s%s", err->msg, c->n_turns ? " /reset starts anew." : "");
    return KVF_OK;
}

static kvf_status converse(chat *c, kvf_error *err)
{
    char *line = NULL;
    size_t cap = 0;
    kvf_status rc = KVF_OK;
    while (rc == KVF_OK && !ferror(stdout)) {
        if (c->interactive) {
            interrupt_attach(NULL);
            interrupt_clear();
            fputs("> ", stderr);
            fflush(stderr);
        }
        ssize_t n = getline(&line, &cap, stdin);
        if (n < 0) break;
        while (n > 0 && strchr(" \t\r\n", line[n - 1])) line[--n] = '\0';
        char *text = line + strspn(line, " \t");
        if (!*text) continue;
        if (text[0] == '/' && text[1] != '/') {
            if (!slash_command(c, text)) break;
            continue;
        }
        rc = say(c, text[0] == '/' ? text + 1 : text, err);
        if (rc != KVF_OK)
            rc = on_error(c, rc, err);
        else if (c->eo.verbose)
            answer_summary(&c->last);
    }
    free(line);
    return rc;
}

static kvf_status read_documents(chat *c, kvf_error *err)
{
    size_t n = c->o.documents.n, n_open = 0;
    document *docs = calloc(n ? n : 1, sizeof *docs);
    if (!docs) return no_memory(err);
    kvf_status rc = KVF_OK;
    while (n_open < n && rc == KVF_OK) {
        const char *path = c->o.documents.v[n_open];
        if (strcmp(path, "-") == 0)
            rc = report_fail(err, KVF_ERR_ARG,
                             "Standard input is the conversation; give the document as a file.");
        else
            rc = doc_open(&docs[n_open], path, err);
        if (rc == KVF_OK && docs[n_open].note[0] && !c->eo.quiet)
            report_note("%s: %s", path, docs[n_open].note);
        n_open++;
    }
    if (rc == KVF_OK) rc = prompt_documents(&c->body, docs, n, NULL, err);
    for (size_t i = 0; i < n_open; i++) doc_close(&docs[i]);
    free(docs);
    return rc;
}

/* Read the documents before the first message is typed, so that its answer comes at once. */
static kvf_status read_ahead(chat *c, kvf_error *err)
{
    if (!c->body.n || !c->interactive) return KVF_OK;
    token_list prompt = { 0 };
    kvf_status rc = add_turn(c, true, "", 0, err);
    if (rc == KVF_OK) rc = frame(c, &prompt, err);
    drop_turns(c, 0);
    if (rc == KVF_OK) rc = prompt_check(&c->e, prompt.n, err);
    if (rc == KVF_OK) {
        progress_start(&c->e.bar, "Reading", c->eo.quiet);
        progress_update(&c->e.bar, 0, prompt.n);
        rc = kvf_session_sync(c->e.session, prompt.v, prompt.n, err);
        progress_clear(&c->e.bar);
    }
    token_list_free(&prompt);
    return rc;
}

static kvf_status chat_run(chat *c, kvf_error *err)
{
    c->interactive = report_is_terminal(stdin);
    kvf_status rc = read_documents(c, err);
    if (rc == KVF_OK) rc = engine_open(&c->e, &c->eo, err);
    if (rc == KVF_OK) rc = engine_open_session(&c->e, &c->eo, &c->so, err);
    if (rc == KVF_OK) rc = prompt_check_text(&c->e, buffer_text(&c->body), c->body.n, err);
    if (rc == KVF_OK && c->interactive && !c->eo.quiet)
        report_note("%s, %lld tokens of context; /help for help",
                    c->e.info.name[0] ? c->e.info.name : c->eo.model, (long long)c->e.n_ctx);
    if (rc == KVF_OK) rc = read_ahead(c, err);
    if (rc == KVF_OK) rc = converse(c, err);
    return rc;
}

int cmd_chat(int argc, char **argv)
{
    chat c;
    memset(&c, 0, sizeof c);
    arg_group groups[] = { { "Options", chat_rows, &c.o },
                           { "Sampling", engine_sampling_rows, &c.so },
                           { "Model", engine_model_rows, &c.eo },
                           { "Memory", engine_session_rows, &c.eo },
                           { NULL, NULL, NULL } };
    arg_texts operands = { 0 };
    arg_result parsed = args_parse(&chat_command, groups, argc, argv, &operands);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;

    kvf_error err = { 0 };
    kvf_status rc = chat_run(&c, &err);
    int code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    engine_close(&c.e);
    drop_turns(&c, 0);
    free(c.turns);
    if (c.has_last) answer_free(&c.last);
    buffer_free(&c.body);
    args_free(groups, &operands);
    return code;
}
