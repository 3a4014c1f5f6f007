/* cmd_ask.c - kvfold ask: answer questions about documents.
 *
 * The documents are files, read now, or one that kvfold ingest put into a store. All questions of one
 * call share their keys and values: the second and later ones only read themselves. Files that do not
 * fit the model's context go through a temporary store, as if they had been ingested.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answer.h"
#include "ask_video.h"
#include "commands.h"
#include "interrupt.h"
#include "json.h"
#include "reading.h"
#include "report.h"
#include "store.h"
#include "utf8.h"

typedef struct ask_options {
    arg_texts documents, questions, expected;
    const char *question_file, *tmpl, *system, *store;
    const char *video, *mmproj, *merge;
    int64_t citations, frames;
    bool raw, no_stream, json;
} ask_options;

#define ASK_MERGE "holitom:ratio=0.25" /* of a video */

#define ROW(field, name, letter, value, type, help)                                                          \
    {                                                                                                        \
        name, letter, value, type, offsetof(ask_options, field), NULL, 0, 0, NULL, help                      \
    }

static const arg_row ask_rows[] = {
    ROW(documents, "--document", 'd', "FILE", ARG_TEXTS,
        "text, Markdown, HTML or PDF, also gzip-compressed; - is standard input; may be given again. With --store: "
        "the name of a document in it"),
    ROW(store, "--store", 0, "DIR", ARG_TEXT, "ask a document that kvfold ingest has read"),
    ROW(video, "--video", 0, "CLIP", ARG_TEXT, "ask about a video, with --mmproj; any file that FFmpeg reads"),
    ROW(mmproj, "--mmproj", 0, "FILE", ARG_TEXT, "GGUF file of the model's vision tower and projector"),
    { "--frames", 0, "N", ARG_INT, offsetof(ask_options, frames), "32", 1, 100000, NULL, "frames of the video, evenly spread" },
    ROW(merge, "--merge", 0, "SPEC", ARG_TEXT,
        "which of the video's tokens are read (kvfold video --list-planners), or none: all of them (default: "
        ASK_MERGE ")"),
    ROW(questions, "--question", 'q', "TEXT", ARG_TEXTS, "a question; may be given again"),
    ROW(question_file, "--questions", 0, "FILE", ARG_TEXT, "questions, one per line; - is standard input"),
    ROW(expected, "--expect", 0, "TEXT", ARG_TEXTS,
        "write nothing: say how likely this answer is, its first token and all of it; one for each question, an operand "
        "first. One question about a long text is read with lazyllm, several with full: name a --policy to compare"),
    ROW(json, "--json", 'j', NULL, ARG_FLAG, "one JSON object per question"),
    { "--citations", 0, "N", ARG_INT, offsetof(ask_options, citations), "3", 0, 16, NULL,
      "show at most N passages that the answer was read from" },
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
    .synopsis = "[-m MODEL] -d FILE... | --store DIR | --video CLIP --mmproj FILE [options] \"question\"",
    .summary = "answer questions about documents",
    .details = "The answer goes to standard output; a line with what it took goes to standard error.\n"
               "Without a question, and at a terminal, questions are asked for until an empty line. After the\n"
               "answer come the passages that got most attention while it was written, and their share of it.",
    .examples = "  kvfold ask -d contract.pdf \"When can the tenant give notice?\"\n"
                "  kvfold ask -d a.txt -d b.html -q \"What do they agree on?\" -q \"And where not?\"\n"
                "  kvfold ask --store books \"Who may upload a package?\"\n"
                "  kvfold ask --store books -q \"Who wrote it?\" --expect \"Jane Austen\"\n"
                "  man bash | kvfold ask -d - \"What does 'set -e' do?\" --json\n"
                "  kvfold ask -m llava-ov.gguf --mmproj mmproj.gguf --video clip.mp4 \"What happens?\"\n"
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
    reading r;    /* with documents: what the prompt begins with */
    size_t n_asked; /* questions so far: which of --expect is next */
    buffer asked; /* text of --questions, cut into lines */
} ask;

static bool has_documents(const ask *a) { return a->n_docs || a->o.store; }
static bool has_prefix(const ask *a) { return has_documents(a) || a->o.video; }

/* ---- Input ------------------------------------------------------------------------------ */

static kvf_status open_documents(ask *a, kvf_error *err)
{
    if (a->o.store) return KVF_OK;
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
    return KVF_OK;
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
    for (size_t i = 0; !a->o.store && i < a->o.documents.n; i++) n_stdin += strcmp(a->o.documents.v[i], "-") == 0;
    if (n_stdin > 1) return report_fail(err, KVF_ERR_ARG, "Standard input (-) can be read once only.");
    if (a->o.store && (a->o.raw || a->o.tmpl || a->o.system))
        return report_fail(err, KVF_ERR_ARG,
                           "%s does not go with --store: a stored document keeps the frame that it was ingested with.",
                           a->o.raw ? "--raw" : a->o.tmpl ? "--template" : "--system");
    if (a->o.store && a->o.documents.n > 1)
        return report_fail(err, KVF_ERR_ARG,
                           "One document of a store at a time; kvfold ingest --together makes one of several.");
    if (a->o.raw && a->o.documents.n)
        return report_fail(err, KVF_ERR_ARG,
                           "--raw takes the whole prompt from the question; put the document in "
                           "it instead of -d.");
    if (!a->o.video != !a->o.mmproj)
        return report_fail(err, KVF_ERR_ARG, "--video and --mmproj go together: the clip, and the tower that looks at it.");
    if (a->o.merge && !a->o.video)
        return report_fail(err, KVF_ERR_ARG, "--merge chooses among the tokens of a video; give --video and --mmproj, or leave it out.");
    if (a->o.video && (a->o.raw || a->o.store || a->o.documents.n))
        return report_fail(err, KVF_ERR_ARG, "A video is asked alone: leave out %s.",
                           a->o.raw ? "--raw" : a->o.store ? "--store" : "-d");
    if (a->o.video && a->eo.policy && engine_can_store(a->eo.policy))
        return report_fail(err, KVF_ERR_ARG, "--policy %s keeps text in a store; a video needs another, as lazyllm.", a->eo.policy);
    if (a->o.expected.n && a->o.video)
        return report_fail(err, KVF_ERR_ARG, "--expect needs a text: answers about a video are written, not scored.");
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
    if (has_prefix(a)) return prompt_complete(prompt, &a->e, &a->r.parts, &a->r.prefix, question, err);
    buffer user = { 0 };
    utf8_add_clean(&user, question, strlen(question), UTF8_KEEP);
    buffer_trim_end(&user);
    kvf_status rc = buffer_status(&user, "the prompt", err);
    if (rc == KVF_OK) {
        kvf_chat_message msgs[] = { { "system", reading_system(a->o.system, false), (size_t)-1 },
                                    { "user", buffer_text(&user), user.n } };
        rc = prompt_frame(prompt, &a->e, a->o.tmpl, msgs, 2, err);
    }
    buffer_free(&user);
    return rc;
}

static kvf_status print_json(const ask *a, const answer *ans, const char *question, const citation *c, size_t n,
                             kvf_error *err)
{
    cJSON *o = answer_json(ans, &a->e);
    json_text(o, "question", a->o.raw ? "" : question, (size_t)-1);
    cite_json(cJSON_GetObjectItemCaseSensitive(o, "citations"), c, n);
    cJSON *docs = json_array(o, "documents");
    for (size_t i = 0; i < a->r.note.n_sources; i++) {
        const note_source *s = &a->r.note.sources[i];
        cJSON *d = json_object(docs, NULL);
        json_text(d, "title", s->title, (size_t)-1);
        json_text(d, "kind", s->kind, (size_t)-1);
        json_int(d, "bytes", (int64_t)s->n);
        if (s->n_pages) json_int(d, "pages", s->n_pages);
    }
    return json_print(o) ? KVF_OK : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

/* Tokens that the layers hold, a line for each run of layers with as many. */
static void note_layers(const ask *a)
{
    int64_t n = 0, run = -1;
    for (int32_t l = 0, first = 0; l <= a->e.info.n_layer; l++) {
        if (l < a->e.info.n_layer && kvf_session_layer_tokens(a->e.session, l, &n, NULL) != KVF_OK) return;
        if (l < a->e.info.n_layer && n == run) continue;
        char text[32];
        if (l > 0) report_note("layers %d to %d hold %s tokens", first, l - 1, report_count(text, run));
        first = l;
        run = n;
    }
}

/* Everything after the answer itself, which may be on the screen already. */
static kvf_status show(ask *a, const answer *ans, const char *question, kvf_error *err)
{
    citation c[16];
    size_t n = reading_cite(&a->r, &a->e, c, (size_t)a->o.citations);
    kvf_status rc = KVF_OK;
    if (a->o.json) {
        rc = print_json(a, ans, question, c, n, err);
    } else {
        if (ans->n_expected) {
            answer_print_expected(ans);
        } else if (a->o.no_stream) {
            fwrite(buffer_text(&ans->text), 1, ans->text.n, stdout);
            putchar('\n');
        }
        cite_print(c, n);
        fflush(stdout);
        if (!a->eo.quiet) answer_summary(ans);
    }
    cite_free(c, n);
    if (rc == KVF_OK && a->eo.verbose) {
        report_note("backend %s, cpu %s, kernels %s, policy %s", ans->stats.backend, ans->stats.cpu,
                    ans->stats.kernels, ans->stats.policy);
        note_layers(a);
    }
    return rc;
}

static kvf_status ask_one(ask *a, const char *question, kvf_error *err)
{
    double start = clock_s();
    token_list prompt = { 0 };
    answer ans;
    memset(&ans, 0, sizeof ans);
    kvf_status rc = build_prompt(a, question, &prompt, err);
    if (rc == KVF_OK) rc = reading_again(&a->r, &a->e, err);
    if (rc == KVF_OK) {
        answer_request r = { .prompt = &prompt, .max_tokens = a->so.max_tokens, .ignore_eos = a->so.ignore_eos,
                             .start_s = start };
        r.trim = !a->o.raw;
        r.plain = !a->o.raw && prompt_is_plain(&a->e, a->o.store ? a->r.note.tmpl : a->o.tmpl);
        r.stop = r.plain ? "\n\n" : NULL;
        r.expect = a->n_asked < a->o.expected.n ? a->o.expected.v[a->n_asked] : NULL;
        r.stream = !a->o.json && !a->o.no_stream && !r.expect;
        a->n_asked++;
        rc = answer_run(&ans, &a->e, &r, err);
        if (rc == KVF_OK) rc = show(a, &ans, question, err);
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

/* Tokens from which on one question on one text is read with PRUNE_POLICY. */
enum { PRUNE_FROM = 1024 };

/* ---- Reading ---------------------------------------------------------------------------- */

/* Tokens that the longest question takes; at the terminal nobody knows yet. */
static int64_t question_tokens(const ask *a, const char *single)
{
    size_t longest = single ? strlen(single) : a->o.questions.n ? 0 : 512;
    for (size_t i = 0; i < a->o.questions.n; i++) {
        size_t n = strlen(a->o.questions.v[i]);
        if (n > longest) longest = n;
    }
    return (int64_t)(longest / 3) + 8 + a->r.parts.tail.n;
}

/* A policy with a memory, by itself where none is named, takes what is beyond the context. */
static bool needs_store(const ask *a, int64_t n, int64_t n_question)
{
    if (a->eo.policy && !engine_can_store(a->eo.policy)) return false;
    if (a->eo.policy) {
        double memory = a->eo.memory ? (double)a->eo.memory : 1073741824.0;
        return (double)n * (double)a->e.info.kv_bytes_per_token > memory / 2; /* the rest is for the work */
    }
    if (a->eo.ctx) return n + n_question > a->eo.ctx;
    return n + n_question + a->so.max_tokens > a->e.info.n_ctx_train;
}

static kvf_status read_through_store(ask *a, kvf_error *err)
{
    reading *r = &a->r;
    /* Keys and values, and a tenth more for what finds them again. */
    double bytes = (double)r->prefix.n * (double)a->e.info.kv_bytes_per_token * 1.1;
    char n[32], fit[32];
    kvf_status rc = store_temporary(r->temporary, sizeof r->temporary, (int64_t)bytes, err);
    if (rc != KVF_OK) return rc;
    if (!a->eo.quiet)
        report_note("%s tokens are more than the %s of the context: reading through a temporary store in %s (kvfold "
                    "ingest would keep it)",
                    report_count(n, r->prefix.n), report_count(fit, a->eo.ctx ? a->eo.ctx : a->e.info.n_ctx_train),
                    r->temporary);
    engine_options eo = a->eo;
    if (!eo.policy) eo.policy = STORE_POLICY;
    eo.ctx = 0; /* it said when to take a store */
    reading_result result;
    rc = store_open(&r->store, a->e.ctx, r->temporary, KVF_STORE_CREATE, NULL, err);
    if (rc == KVF_OK) store_temporary_files(r->temporary);
    if (rc == KVF_OK) rc = engine_open_session(&a->e, &eo, &a->so, err);
    a->e.folder = r->temporary;
    if (rc == KVF_OK) rc = reading_ingest(r, &a->e, r->store, "document", &result, err);
    a->e.folder = NULL;
    return rc;
}

/* A single question, and a text long enough to gain by it: what the answer does not need is left out of the
 * deeper layers, unless a policy was named. A model too small for that is read in full. */
static kvf_status open_for_files(ask *a, const char *single, kvf_error *err)
{
    bool one = single ? a->o.questions.n == 0 : a->o.questions.n == 1;
    engine_options eo = a->eo;
    if (!eo.policy && one && a->r.prefix.n >= PRUNE_FROM) {
        eo.policy = PRUNE_POLICY;
        kvf_status rc = engine_open_session(&a->e, &eo, &a->so, err);
        if (rc != KVF_ERR_ARG) return rc;
    }
    return engine_open_session(&a->e, &a->eo, &a->so, err);
}

static kvf_status read_files(ask *a, const char *single, kvf_error *err)
{
    reading_input in = { .docs = a->docs, .paths = &a->o.documents, .tmpl = a->o.tmpl, .system = a->o.system };
    bool forced = a->eo.policy && !engine_has_memory(a->eo.policy);
    a->e.n_ctx = a->eo.ctx ? a->eo.ctx : a->e.info.n_ctx_train;
    kvf_status rc = KVF_OK;
    for (size_t i = 0; i < a->n_docs && forced && rc == KVF_OK; i++)
        rc = prompt_check_text(&a->e, buffer_text(&a->docs[i].text), a->docs[i].text.n, err);
    if (rc == KVF_OK) rc = reading_make(&a->r, &a->e, &in, err);
    if (rc != KVF_OK) return rc;
    if (needs_store(a, a->r.prefix.n, question_tokens(a, single))) return read_through_store(a, err);
    return open_for_files(a, single, err);
}

static kvf_status open_stored(ask *a, kvf_error *err)
{
    kvf_status rc = store_open(&a->r.store, a->e.ctx, a->o.store, KVF_STORE_READ, NULL, err);
    kvf_store_info info = { .size = sizeof info };
    if (rc == KVF_OK) rc = kvf_store_get_info(a->r.store, &info, err);
    if (rc != KVF_OK) return rc;
    engine_options eo = a->eo;
    if (!eo.policy) eo.policy = info.policy && info.policy[0] ? info.policy : STORE_POLICY;
    rc = engine_open_session(&a->e, &eo, &a->so, err);
    const char *name = a->o.documents.n ? a->o.documents.v[0] : NULL;
    return rc == KVF_OK ? reading_load(&a->r, &a->e, name, err) : rc;
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
    size_t n_questions = a->o.questions.n + (single != NULL);
    if (a->o.expected.n && a->o.expected.n != n_questions)
        return report_fail(err, KVF_ERR_ARG, "Questions: %zu; answers of --expect: %zu. Give one for each question.",
                           n_questions, a->o.expected.n);
    for (size_t i = 0; i < a->o.expected.n; i++)
        if (!a->o.expected.v[i][0]) return report_fail(err, KVF_ERR_ARG, "An answer of --expect is empty.");
    if (interactive && !report_is_terminal(stdin))
        return report_fail(err, KVF_ERR_ARG,
                           "There is no question; give it as the last argument, in quotes.");
    a->eo.passages = a->o.citations > 0 && has_documents(a);
    rc = engine_open(&a->e, &a->eo, err);
    if (rc != KVF_OK) return rc;
    ask_video_options v = { .clip = a->o.video, .mmproj = a->o.mmproj, .merge = a->o.merge ? a->o.merge : ASK_MERGE,
                            .frames = a->o.frames,
                            .tmpl = a->o.tmpl, .system = a->o.system, .quiet = a->eo.quiet };
    if (a->o.store)
        rc = open_stored(a, err);
    else if (a->o.video)
        rc = ask_video_open(&a->r.prefix, &a->r.parts, &a->e, &a->eo, &a->so, &v, err);
    else
        rc = a->n_docs ? read_files(a, single, err) : engine_open_session(&a->e, &a->eo, &a->so, err);
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
    engine_close_session(&a.e);
    reading_close(&a.r);
    engine_close(&a.e);
    for (size_t i = 0; i < a.n_docs; i++) doc_close(&a.docs[i]);
    free(a.docs);
    buffer_free(&a.asked);
    args_free(groups, &operands);
    return code;
}
