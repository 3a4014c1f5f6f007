/* cmd_rm.c - kvfold rm and kvfold compact: take documents out of a store, and give their space back.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "args.h"
#include "commands.h"
#include "json.h"
#include "report.h"
#include "store.h"

typedef struct store_options {
    const char *store;
    bool json, quiet;
} store_options;

static const arg_row store_rows[] = {
    { "--store", 's', "DIR", ARG_TEXT, offsetof(store_options, store), NULL, 0, 0, NULL, "folder of the store" },
    { "--json", 'j', NULL, ARG_FLAG, offsetof(store_options, json), NULL, 0, 0, NULL, "print a JSON object" },
    { "--quiet", 0, NULL, ARG_FLAG, offsetof(store_options, quiet), NULL, 0, 0, NULL, "no notes" },
    { 0 },
};

static const arg_command rm_command = {
    .name = "rm",
    .synopsis = "--store DIR NAME [NAME...]",
    .summary = "remove documents from a store",
    .details = "What no other document shares is freed inside the store's file, for the next ingestion;\n"
               "kvfold compact gives it back to the disk.",
    .examples = "  kvfold rm --store books policy.pdf.gz",
    .max_operands = 1000,
};

static const arg_command compact_command = {
    .name = "compact",
    .synopsis = "--store DIR",
    .summary = "give the space of removed documents back to the disk",
    .details = "The file is rewritten; it needs as much room again while that runs. Nobody else may use the\n"
               "store meanwhile.",
    .examples = "  kvfold compact --store books --json",
    .operand = "Name the store with --store.",
    .max_operands = 0,
};

/* ctx may be open after a failure, the store not. */
static kvf_status open_to_write(const store_options *o, kvf_ctx **ctx, kvf_store **st, kvf_error *err)
{
    if (!o->store) return report_fail(err, KVF_ERR_ARG, "--store DIR is missing: the folder of the store.");
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = 1;
    kvf_status rc = kvf_ctx_open(ctx, &p, err);
    return rc == KVF_OK ? store_open(st, *ctx, o->store, KVF_STORE_WRITE, NULL, err) : rc;
}

static kvf_status rm_run(const store_options *o, const arg_texts *names, kvf_store *st, kvf_error *err)
{
    /* All names are looked up first: a typing error removes nothing. */
    for (size_t i = 0; i < names->n; i++) {
        kvf_document doc;
        kvf_status rc = store_choose(st, names->v[i], &doc, err);
        if (rc == KVF_OK) kvf_document_free(st, &doc);
        if (rc != KVF_OK && rc != KVF_ERR_STATE) return rc; /* STATE: unfinished ones go, too */
    }
    for (size_t i = 0; i < names->n; i++) {
        kvf_status rc = kvf_store_remove(st, names->v[i], err);
        if (rc != KVF_OK) return rc;
        if (!o->quiet && !o->json) report_note("'%s' is removed", names->v[i]);
    }
    if (!o->json) return KVF_OK;
    kvf_store_info info = { .size = sizeof info };
    cJSON *root = cJSON_CreateObject();
    cJSON *list = json_array(root, "removed");
    for (size_t i = 0; i < names->n; i++) json_text(list, NULL, names->v[i], (size_t)-1);
    if (kvf_store_get_info(st, &info, NULL) == KVF_OK) {
        json_int(root, "n_documents", info.n_documents);
        json_int(root, "file_bytes", (int64_t)info.file_bytes);
        json_int(root, "free_bytes", (int64_t)info.free_bytes);
    }
    return json_print(root) ? KVF_OK : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

static kvf_status compact_run(const store_options *o, kvf_store *st, kvf_error *err)
{
    kvf_store_info before = { .size = sizeof before }, after = { .size = sizeof after };
    kvf_status rc = kvf_store_get_info(st, &before, err);
    if (rc == KVF_OK) rc = kvf_store_compact(st, err);
    if (rc == KVF_OK) rc = kvf_store_get_info(st, &after, err);
    if (rc != KVF_OK) return rc;
    char a[32], b[32];
    if (!o->json) {
        printf("%s before, %s now\n", report_bytes(a, (double)before.file_bytes),
               report_bytes(b, (double)after.file_bytes));
        return KVF_OK;
    }
    cJSON *root = cJSON_CreateObject();
    json_int(root, "bytes_before", (int64_t)before.file_bytes);
    json_int(root, "bytes_after", (int64_t)after.file_bytes);
    return json_print(root) ? KVF_OK : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

static int run(const arg_command *command, int argc, char **argv)
{
    store_options o = { 0 };
    arg_group groups[] = { { "Options", store_rows, &o }, { NULL, NULL, NULL } };
    arg_texts names = { 0 };
    arg_result parsed = args_parse(command, groups, argc, argv, &names);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;

    kvf_error err = { 0 };
    kvf_ctx *ctx = NULL;
    kvf_store *st = NULL;
    kvf_status rc = KVF_OK;
    if (command == &rm_command && !names.n)
        rc = report_fail(&err, KVF_ERR_ARG, "Name the documents to remove; kvfold inspect DIR lists them.");
    if (rc == KVF_OK) rc = open_to_write(&o, &ctx, &st, &err);
    if (rc == KVF_OK) rc = command == &rm_command ? rm_run(&o, &names, st, &err) : compact_run(&o, st, &err);
    int code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    kvf_store_close(st);
    kvf_ctx_close(ctx);
    args_free(groups, &names);
    return code;
}

int cmd_rm(int argc, char **argv) { return run(&rm_command, argc, argv); }
int cmd_compact(int argc, char **argv) { return run(&compact_command, argc, argv); }
