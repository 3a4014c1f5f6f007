/* inspect_store.c - see inspect_store.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "inspect_store.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "json.h"
#include "progress.h"
#include "report.h"
#include "store.h"
#include "utf8.h"

static const char *codec_name(int32_t codec) { return codec == KVF_CODEC_INT8 ? "int8" : "f16"; }

static void time_text(char out[32], int64_t seconds)
{
    time_t t = (time_t)seconds;
    struct tm tm;
    out[0] = '\0';
    if (localtime_r(&t, &tm)) strftime(out, 32, "%Y-%m-%d %H:%M", &tm);
}

/* ---- For people -------------------------------------------------------------------------- */

static void print_documents(kvf_store *st)
{
    kvf_document doc = { .size = sizeof doc };
    char n[32], bytes[32], when[32];
    for (int64_t i = 0; kvf_store_document(st, i, &doc, NULL) == KVF_OK; i++) {
        if (!i) printf("\n%12s  %8s  %-16s  %-10s  %s\n", "tokens", "own", "stored", "state", "document");
        time_text(when, doc.created);
        buffer name = { 0 };
        utf8_add_clean(&name, doc.name, strlen(doc.name), UTF8_NO_CONTROLS);
        printf("%12s  %8s  %-16s  %-10s  %s\n", report_count(n, doc.n_tokens),
               report_bytes(bytes, (double)doc.kv_bytes), when, doc.complete ? "complete" : "unfinished",
               buffer_text(&name));
        buffer_free(&name);
        kvf_document_free(st, &doc);
        doc.size = sizeof doc;
    }
}

static void print_store(kvf_store *st, const kvf_store_info *info)
{
    char a[32], b[32];
    if (!info->n_documents) {
        printf("empty\n");
    } else {
        printf("%-14s%s\n", "model", info->model[0] ? info->model : "-");
        printf("%-14s%016" PRIx64 "%016" PRIx64 "\n", "fingerprint", info->fingerprint[0], info->fingerprint[1]);
        printf("%-14s%s\n", "policy", info->policy);
        printf("%-14s%s, %d layers, %d key/value heads, dimension %d\n", "kept as", codec_name(info->codec),
               info->n_layer, info->n_head_kv, info->head_dim);
        printf("%-14s%s", "documents", report_count(a, info->n_documents));
        if (info->n_unfinished) printf(", of which %s unfinished", report_count(b, info->n_unfinished));
        printf("\n%-14s%s in %s blocks\n", "tokens", report_count(a, info->n_tokens), report_count(b, info->n_blocks));
        printf("%-14s%s\n", "keys+values", report_bytes(a, (double)info->kv_bytes));
        printf("%-14s%s\n", "index", report_bytes(a, (double)info->index_bytes));
    }
    printf("%-14s%s\n", "on disk", report_bytes(a, (double)info->file_bytes));
    if (info->free_bytes)
        printf("%-14s%s, kvfold compact gives it back\n", "of that free", report_bytes(a, (double)info->free_bytes));
    print_documents(st);
}

/* ---- For scripts ------------------------------------------------------------------------- */

static cJSON *store_json(kvf_store *st, const kvf_store_info *info)
{
    cJSON *o = cJSON_CreateObject();
    char hex[40];
    snprintf(hex, sizeof hex, "%016" PRIx64 "%016" PRIx64, info->fingerprint[0], info->fingerprint[1]);
    json_int(o, "version", info->version);
    json_text(o, "codec", codec_name(info->codec), (size_t)-1);
    json_text(o, "model", info->model, (size_t)-1);
    json_text(o, "fingerprint", hex, (size_t)-1);
    json_text(o, "policy", info->policy, (size_t)-1);
    json_int(o, "n_documents", info->n_documents);
    json_int(o, "n_unfinished", info->n_unfinished);
    json_int(o, "n_tokens", info->n_tokens);
    json_int(o, "n_blocks", info->n_blocks);
    json_int(o, "kv_bytes", (int64_t)info->kv_bytes);
    json_int(o, "index_bytes", (int64_t)info->index_bytes);
    json_int(o, "file_bytes", (int64_t)info->file_bytes);
    json_int(o, "free_bytes", (int64_t)info->free_bytes);
    cJSON *list = json_array(o, "documents");
    kvf_document doc = { .size = sizeof doc };
    for (int64_t i = 0; kvf_store_document(st, i, &doc, NULL) == KVF_OK; i++) {
        cJSON *d = json_object(list, NULL);
        json_text(d, "name", doc.name, (size_t)-1);
        json_int(d, "n_tokens", doc.n_tokens);
        json_bool(d, "complete", doc.complete != 0);
        json_int(d, "kv_bytes", (int64_t)doc.kv_bytes);
        json_int(d, "created", doc.created);
        kvf_document_free(st, &doc);
        doc.size = sizeof doc;
    }
    return o;
}

/* ---- Checking ---------------------------------------------------------------------------- */

static int on_progress(void *user, int64_t done, int64_t total)
{
    progress_update(user, done, total);
    return 0;
}

/* Returns the exit code; adds to `o` or prints. */
static int verify_store(kvf_store *st, cJSON *o, bool quiet)
{
    progress bar;
    kvf_error err = { 0 };
    kvf_verify v = { .size = sizeof v, .progress = on_progress, .user = &bar };
    char n[32], bad[32];
    progress_start(&bar, "Checking", quiet);
    bar.unit = "groups";
    kvf_status rc = kvf_store_verify(st, &v, &err);
    progress_clear(&bar);
    if (rc != KVF_OK) return report_status(&err);
    if (o) {
        cJSON *check = json_object(o, "verify");
        json_int(check, "n_checked", v.n_checked);
        json_int(check, "n_bad", v.n_bad);
        json_text(check, "first_bad", v.first_bad, (size_t)-1);
    } else if (!v.n_bad) {
        printf("\nverified: all %s values are as they were written\n", report_count(n, v.n_checked));
    }
    if (v.n_bad)
        report_error("The store is damaged: %s of %s values are bad, the first: %s. Remove that document with kvfold "
                     "rm and ingest it again.",
                     report_count(bad, v.n_bad), report_count(n, v.n_checked), v.first_bad);
    return v.n_bad ? EXIT_USAGE : EXIT_OK;
}

int inspect_store(const char *path, bool verify, bool json, bool quiet)
{
    kvf_error err = { 0 };
    kvf_ctx *ctx = NULL;
    kvf_store *st = NULL;
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = 1;
    kvf_store_info info = { .size = sizeof info };
    kvf_status rc = kvf_ctx_open(&ctx, &p, &err);
    if (rc == KVF_OK) rc = store_open(&st, ctx, path, KVF_STORE_READ, NULL, &err);
    if (rc == KVF_OK) rc = kvf_store_get_info(st, &info, &err);
    int code = EXIT_OK;
    if (rc != KVF_OK) {
        code = report_status(&err);
    } else {
        cJSON *o = json ? store_json(st, &info) : NULL;
        if (!json) print_store(st, &info);
        if (verify) code = verify_store(st, o, quiet);
        if (json && !json_print(o)) code = EXIT_FAILED;
    }
    kvf_store_close(st);
    kvf_ctx_close(ctx);
    return code;
}
