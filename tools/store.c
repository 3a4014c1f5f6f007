/* store.c - see store.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "store.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "args.h"
#include "buffer.h"
#include "interrupt.h"
#include "report.h"

kvf_status store_open(kvf_store **out, kvf_ctx *ctx, const char *path, kvf_store_mode mode, const char *codec,
                      kvf_error *err)
{
    kvf_store_params p;
    kvf_store_params_init(&p);
    p.mode = (int32_t)mode;
    p.codec = codec && strcmp(codec, "int8") == 0 ? KVF_CODEC_INT8 : KVF_CODEC_F16;
    return kvf_store_open(out, ctx, path, &p, err);
}

/* ---- Choosing --------------------------------------------------------------------------- */

enum { MAX_LISTED = 12 };

/* Names of the first documents, for a message. Returns how many there are. */
static int64_t list_names(kvf_store *st, buffer *out, char closest[128], const char *wanted)
{
    kvf_document doc = { .size = sizeof doc };
    int64_t n = 0;
    for (; kvf_store_document(st, n, &doc, NULL) == KVF_OK; n++) {
        const char *const names[] = { doc.name };
        if (n < MAX_LISTED) buffer_printf(out, "%s'%.60s'", n ? ", " : "", doc.name);
        if (wanted && !closest[0] && args_closest(wanted, names, 1))
            snprintf(closest, 128, "%.120s", doc.name);
        kvf_document_free(st, &doc);
    }
    if (n > MAX_LISTED) buffer_printf(out, " and %lld more", (long long)(n - MAX_LISTED));
    return n;
}

static kvf_status choose_failed(kvf_store *st, const char *name, kvf_error *err)
{
    buffer names = { 0 };
    char closest[128] = "";
    int64_t n = list_names(st, &names, closest, name);
    kvf_status rc;
    if (!n)
        rc = report_fail(err, KVF_ERR_NOT_FOUND, "The store is empty; kvfold ingest puts documents in.");
    else if (!name)
        rc = report_fail(err, KVF_ERR_ARG, "The store has %lld documents: name one with -d: %.300s.",
                         (long long)n, buffer_text(&names));
    else if (closest[0])
        rc = report_fail(err, KVF_ERR_NOT_FOUND, "The store has no document '%.100s'; did you mean '%s'?", name,
                         closest);
    else
        rc = report_fail(err, KVF_ERR_NOT_FOUND, "The store has no document '%.100s'; it has %.300s.", name,
                         buffer_text(&names));
    buffer_free(&names);
    return rc;
}

kvf_status store_choose(kvf_store *st, const char *name, kvf_document *doc, kvf_error *err)
{
    *doc = (kvf_document){ .size = sizeof *doc };
    kvf_status rc;
    if (name) {
        rc = kvf_store_find(st, name, doc, err);
    } else {
        rc = kvf_store_document(st, 0, doc, err);
        kvf_document second = { .size = sizeof second };
        if (rc == KVF_OK && kvf_store_document(st, 1, &second, NULL) == KVF_OK) {
            kvf_document_free(st, &second);
            kvf_document_free(st, doc);
            return choose_failed(st, NULL, err);
        }
    }
    if (rc == KVF_ERR_NOT_FOUND) return choose_failed(st, name, err);
    if (rc != KVF_OK || doc->complete) return rc;
    char n[32];
    rc = report_fail(err, KVF_ERR_STATE,
                     "'%.100s' is not read to its end, only %s tokens of it are there; run the same kvfold "
                     "ingest again, it goes on from there.",
                     doc->name, report_count(n, doc->n_tokens));
    kvf_document_free(st, doc);
    return rc;
}

/* ---- Folders ---------------------------------------------------------------------------- */

/* Calls each with the path of every file in the folder. */
static void each_file(const char *folder, void (*each)(void *user, const char *path), void *user)
{
    DIR *dir = opendir(folder);
    const struct dirent *entry;
    char path[4096];
    while (dir && (entry = readdir(dir)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        int n = snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (n > 0 && n < (int)sizeof path) each(user, path);
    }
    if (dir) closedir(dir);
}

static void add_bytes(void *user, const char *path)
{
    struct stat st;
    /* Blocks, not length: the file may have holes. */
    if (stat(path, &st) == 0 && S_ISREG(st.st_mode)) *(int64_t *)user += (int64_t)st.st_blocks * 512;
}

int64_t store_disk_bytes(const char *folder)
{
    int64_t n = 0;
    each_file(folder, add_bytes, &n);
    return n;
}

kvf_status store_temporary(char *path, size_t cap, int64_t n_bytes, kvf_error *err)
{
    const char *base = getenv("TMPDIR");
    if (!base || !*base) base = "/tmp";
    int n = snprintf(path, cap, "%s/kvfold-XXXXXX", base);
    if (n < 0 || (size_t)n >= cap || !mkdtemp(path)) {
        path[0] = '\0';
        return report_fail(err, KVF_ERR_IO, "Cannot make a folder in '%.200s' for a temporary store: %s; set TMPDIR "
                           "to a folder that can be written to.", base, strerror(errno));
    }
    interrupt_remove(path);
    struct statvfs fs;
    if (statvfs(path, &fs) == 0 && (double)fs.f_bavail * (double)fs.f_frsize < (double)n_bytes) {
        char need[32], have[32];
        double room = (double)fs.f_bavail * (double)fs.f_frsize;
        store_temporary_remove(path);
        path[0] = '\0';
        return report_fail(err, KVF_ERR_LIMIT,
                           "The text is too long for the context, and a temporary store of it takes about %s, of "
                           "which '%.200s' has %s; set TMPDIR to a folder with more room, or give a part of the text.",
                           report_bytes(need, (double)n_bytes), base, report_bytes(have, room));
    }
    return KVF_OK;
}

static void register_file(void *user, const char *path)
{
    (void)user;
    interrupt_remove(path);
}

static void remove_file(void *user, const char *path)
{
    (void)user;
    unlink(path);
}

void store_temporary_files(const char *path) { each_file(path, register_file, NULL); }

void store_temporary_remove(const char *path)
{
    if (!path[0]) return;
    each_file(path, remove_file, NULL);
    rmdir(path);
    interrupt_remove(NULL);
}
