/* cmd_ingest.c - kvfold ingest: read documents into a store, once, so that they can be asked about at once.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "commands.h"
#include "interrupt.h"
#include "json.h"
#include "reading.h"
#include "report.h"
#include "store.h"
#include "utf8.h"

typedef struct ingest_options {
    arg_texts documents;
    const char *store, *name, *tmpl, *system, *codec;
    bool together, json;
} ingest_options;

#define ROW(field, name, letter, value, type, help)                                                          \
    {                                                                                                        \
        name, letter, value, type, offsetof(ingest_options, field), NULL, 0, 0, NULL, help                   \
    }

static const arg_row ingest_rows[] = {
    ROW(store, "--store", 's', "DIR", ARG_TEXT, "folder of the store; made if it is not there"),
    ROW(documents, "--document", 'd', "FILE", ARG_TEXTS,
        "text, Markdown, HTML or PDF, also gzip-compressed; - is standard input; may be given again"),
    ROW(name, "--name", 0, "NAME", ARG_TEXT, "what the document is called in the store (default: the file's name)"),
    ROW(together, "--together", 0, NULL, ARG_FLAG, "all files become one document"),
    ROW(json, "--json", 'j', NULL, ARG_FLAG, "print a JSON object when done"),
    ROW(system, "--system", 0, "TEXT", ARG_TEXT, "instructions to the model instead of the usual ones"),
    { "--template", 0, "NAME", ARG_CHOICE, offsetof(ingest_options, tmpl), NULL, 0, 0,
      "chatml|llama3|gemma|mistral|none|plain",
      "chat frame: chatml, llama3, gemma, mistral, none, plain (default: the model's)" },
    { "--codec", 0, "KIND", ARG_CHOICE, offsetof(ingest_options, codec), "f16", 0, 0, "f16|int8",
      "how a new store keeps keys and values: f16, exactly; int8, in half the space" },
    { 0 },
};

static const arg_command ingest_command = {
    .name = "ingest",
    .synopsis = "[-m MODEL] --store DIR -d FILE [-d FILE...] [options]",
    .summary = "read documents into a store, to be asked about at once",
    .details = "A document of any length is read at a constant cost per token and within --memory. Ctrl-C keeps\n"
               "what is there; the same command goes on. A document that is there already is not read again.",
    .examples = "  kvfold ingest --store books -d policy.pdf.gz\n"
                "  kvfold ask --store books \"Who may upload a package?\"\n"
                "  kvfold ingest --store books --together --name laws -d a.html -d b.html",
    .operand = "Put -d before each document.",
    .max_operands = 0,
};

typedef struct ingest {
    ingest_options o;
    engine_options eo;
    engine e;
    kvf_store *store;
    char policy[256];
    document *docs; /* [n_docs] */
    size_t n_docs;
    cJSON *results;
} ingest;

static kvf_status open_documents(ingest *g, kvf_error *err)
{
    const arg_texts *paths = &g->o.documents;
    g->docs = calloc(paths->n, sizeof *g->docs);
    if (!g->docs) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the documents.");
    size_t n_stdin = 0;
    for (size_t i = 0; i < paths->n; i++) {
        n_stdin += strcmp(paths->v[i], "-") == 0;
        if (n_stdin > 1) return report_fail(err, KVF_ERR_ARG, "Standard input (-) can be one document only.");
        kvf_status rc = doc_open(&g->docs[i], paths->v[i], err);
        if (rc != KVF_OK) return rc;
        g->n_docs = i + 1;
        if (g->docs[i].note[0] && !g->eo.quiet) report_note("%s: %s", paths->v[i], g->docs[i].note);
    }
    return KVF_OK;
}

static kvf_status check_options(const ingest *g, kvf_error *err)
{
    if (!g->o.store) return report_fail(err, KVF_ERR_ARG, "--store DIR is missing: the folder to read into.");
    if (!g->o.documents.n)
        return report_fail(err, KVF_ERR_ARG, "There is no document; name one with -d FILE.");
    if (g->o.name && g->o.documents.n > 1 && !g->o.together)
        return report_fail(err, KVF_ERR_ARG,
                           "--name names one document, and there are %zu; ingest them one by one, or --together.",
                           g->o.documents.n);
    if (g->o.name && !g->o.name[0]) return report_fail(err, KVF_ERR_ARG, "--name is empty.");
    if (g->eo.policy && !engine_can_store(g->eo.policy))
        return report_fail(err, KVF_ERR_ARG, "--policy %.60s keeps nothing in a store; leave it out, or take %s.",
                           g->eo.policy, STORE_POLICY);
    return KVF_OK;
}

/* The store, and a session that can write to it. A store keeps the policy that it was made with. */
static kvf_status open_store(ingest *g, kvf_error *err)
{
    kvf_status rc = store_open(&g->store, g->e.ctx, g->o.store, KVF_STORE_CREATE, g->o.codec, err);
    if (rc != KVF_OK) return rc;
    kvf_store_info info = { .size = sizeof info };
    rc = kvf_store_get_info(g->store, &info, err);
    if (rc != KVF_OK) return rc;
    if (!g->eo.policy) {
        snprintf(g->policy, sizeof g->policy, "%s", info.policy && info.policy[0] ? info.policy : STORE_POLICY);
        g->eo.policy = g->policy;
    }
    g->e.folder = g->o.store;
    return engine_open_session(&g->e, &g->eo, NULL, err);
}

static const char *base_name(const char *path)
{
    if (strcmp(path, "-") == 0) return "standard input";
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static void say_result(ingest *g, const char *name, int64_t n_tokens, const reading_result *r)
{
    char n[32], old[32], disk[32];
    double rate = r->seconds > 0 ? (double)r->n_computed / r->seconds : 0;
    const char *status = r->there ? "already there" : r->n_before ? "continued" : "read";
    if (g->results) {
        cJSON *o = json_object(g->results, NULL);
        json_text(o, "name", name, (size_t)-1);
        json_text(o, "status", status, (size_t)-1);
        json_int(o, "n_tokens", n_tokens);
        json_int(o, "n_computed_tokens", r->there ? 0 : r->n_computed);
        json_real(o, "seconds", r->seconds);
        json_real(o, "tokens_per_s", rate);
    }
    if (g->eo.quiet) return;
    report_bytes(disk, (double)store_disk_bytes(g->o.store));
    if (r->there)
        report_note("'%s' is already there (%s tokens)", name, report_count(n, n_tokens));
    else if (r->n_computed < n_tokens)
        report_note("'%s': read %s tokens at %.0f/s, %s were there; the store has %s", name,
                    report_count(n, r->n_computed), rate, report_count(old, n_tokens - r->n_computed), disk);
    else
        report_note("'%s': read %s tokens at %.0f/s; the store has %s", name, report_count(n, n_tokens), rate, disk);
}

/* n documents from `first` on become one. */
static kvf_status ingest_one(ingest *g, size_t first, size_t n, kvf_error *err)
{
    arg_texts paths = { g->o.documents.v + first, n };
    reading_input in = { .docs = g->docs + first, .paths = &paths, .tmpl = g->o.tmpl, .system = g->o.system };
    reading r;
    reading_result result;
    char name[512], clean_name[512];
    kvf_status rc = reading_make(&r, &g->e, &in, err);
    if (rc != KVF_OK) return rc;
    buffer clean = { 0 };
    const char *wanted = g->o.name ? g->o.name : base_name(paths.v[0]);
    utf8_add_clean(&clean, wanted, strlen(wanted), UTF8_NO_CONTROLS);
    snprintf(clean_name, sizeof clean_name, "%.380s", buffer_text(&clean));
    buffer_free(&clean);
    if (g->o.name)
        snprintf(name, sizeof name, "%s", g->o.name);
    else
        rc = reading_name(name, sizeof name, g->store, clean_name, &r.note, err);
    if (rc == KVF_OK) rc = reading_ingest(&r, &g->e, g->store, name, &result, err);
    if (rc == KVF_OK) say_result(g, name, r.prefix.n, &result);
    reading_close(&r);
    return rc;
}

static kvf_status ingest_run(ingest *g, kvf_error *err)
{
    kvf_status rc = check_options(g, err);
    if (rc == KVF_OK) rc = open_documents(g, err);
    if (rc == KVF_OK) rc = engine_open(&g->e, &g->eo, err);
    if (rc == KVF_OK) rc = open_store(g, err);
    if (rc != KVF_OK) return rc;
    cJSON *root = g->o.json ? cJSON_CreateObject() : NULL;
    g->results = root ? json_array(root, "documents") : NULL;
    if (g->o.together) {
        rc = ingest_one(g, 0, g->n_docs, err);
    } else {
        for (size_t i = 0; i < g->n_docs && rc == KVF_OK; i++) rc = ingest_one(g, i, 1, err);
    }
    if (rc != KVF_OK || !g->o.json) {
        cJSON_Delete(root);
        return rc;
    }
    kvf_store_info info = { .size = sizeof info };
    json_text(root, "store", g->o.store, (size_t)-1);
    if (kvf_store_get_info(g->store, &info, NULL) == KVF_OK) {
        json_text(root, "policy", info.policy, (size_t)-1);
        json_int(root, "n_tokens", info.n_tokens);
        json_int(root, "kv_bytes", (int64_t)info.kv_bytes);
        json_int(root, "index_bytes", (int64_t)info.index_bytes);
        json_int(root, "file_bytes", (int64_t)info.file_bytes);
    }
    json_int(root, "peak_rss_bytes", engine_peak_rss());
    return json_print(root) ? KVF_OK : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

int cmd_ingest(int argc, char **argv)
{
    ingest g;
    memset(&g, 0, sizeof g);
    arg_group groups[] = { { "Options", ingest_rows, &g.o },
                           { "Model", engine_model_rows, &g.eo },
                           { "Memory", engine_session_rows, &g.eo },
                           { NULL, NULL, NULL } };
    arg_texts operands = { 0 };
    arg_result parsed = args_parse(&ingest_command, groups, argc, argv, &operands);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;

    kvf_error err = { 0 };
    kvf_status rc = ingest_run(&g, &err);
    int code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    engine_close_session(&g.e);
    kvf_store_close(g.store);
    engine_close(&g.e);
    for (size_t i = 0; i < g.n_docs; i++) doc_close(&g.docs[i]);
    free(g.docs);
    args_free(groups, &operands);
    return code;
}
