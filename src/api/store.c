/* store.c - store functions of kvfold.h: check arguments, call memory/.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "api/ctx.h"
#include "memory/store.h"

#define PATH_BYTES 4000

void kvf_store_params_init(kvf_store_params *p)
{
    memset(p, 0, sizeof *p);
    p->size = sizeof *p;
}

static kvf_status check(const kvf_store *st, const void *arg, const char *name, kvf_error *err)
{
    if (st && arg) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", st ? name : "store");
}

kvf_status kvf_store_open(kvf_store **out, kvf_ctx *ctx, const char *path, const kvf_store_params *params, kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!ctx) return kvf_fail(err, KVF_ERR_ARG, "ctx is NULL");
    if (!path || !*path) return kvf_fail(err, KVF_ERR_ARG, "the path of the store is %s; name a folder", path ? "empty" : "NULL");
    if (strlen(path) > PATH_BYTES) return kvf_fail(err, KVF_ERR_ARG, "the path of the store is longer than %d bytes; use a shorter one", PATH_BYTES);
    kvf_store_params p;
    kvf_store_params_init(&p);
    if (params) {
        KVF_TRY(kvf_check_size(params->size, sizeof p, "kvf_store_params", err));
        memcpy(&p, params, params->size);
    }
    if (p.mode < KVF_STORE_READ || p.mode > KVF_STORE_CREATE)
        return kvf_fail(err, KVF_ERR_ARG, "mode is %d; use KVF_STORE_READ, KVF_STORE_WRITE or KVF_STORE_CREATE", p.mode);
    if (p.codec < KVF_CODEC_F16 || p.codec > KVF_CODEC_INT8)
        return kvf_fail(err, KVF_ERR_ARG, "codec is %d; use KVF_CODEC_F16 or KVF_CODEC_INT8", p.codec);
    if (p.map_bytes > SIZE_MAX / 4) return kvf_fail(err, KVF_ERR_ARG, "map_bytes is %zu, more than there are addresses; use 0", p.map_bytes);
    return kvf_store_open_at(out, &ctx->mem, &ctx->log, path, &p, err);
}

void kvf_store_close(kvf_store *st) { kvf_store_close_at(st); }

kvf_status kvf_store_get_info(kvf_store *st, kvf_store_info *info, kvf_error *err)
{
    kvf_store_info all;
    KVF_TRY(check(st, info, "info", err));
    KVF_TRY(kvf_check_size(info->size, sizeof all, "kvf_store_info", err));
    KVF_TRY(kvf_store_info_get(st, &all, err));
    all.size = info->size;
    memcpy(info, &all, info->size);
    return KVF_OK;
}

/* The fields that own memory come in every version of the struct, so a short one loses none. */
static kvf_status get_document(kvf_store *st, const char *name, int64_t i, kvf_document *doc, kvf_error *err)
{
    kvf_document all;
    KVF_TRY(check(st, doc, "doc", err));
    KVF_TRY(kvf_check_size(doc->size, sizeof all, "kvf_document", err));
    if (doc->size < offsetof(kvf_document, reserved)) return kvf_fail(err, KVF_ERR_ARG, "kvf_document.size is %zu; set it to sizeof", doc->size);
    size_t size = doc->size;
    memset(doc, 0, size);
    doc->size = size;
    KVF_TRY(kvf_store_doc_get(st, name, i, &all, err));
    all.size = size;
    memcpy(doc, &all, size);
    return KVF_OK;
}

kvf_status kvf_store_document(kvf_store *st, int64_t i, kvf_document *doc, kvf_error *err)
{
    if (i < 0) return kvf_fail(err, KVF_ERR_ARG, "document %lld; count from 0", (long long)i);
    return get_document(st, NULL, i, doc, err);
}

kvf_status kvf_store_find(kvf_store *st, const char *name, kvf_document *doc, kvf_error *err)
{
    KVF_TRY(check(st, name, "name", err));
    return get_document(st, name, 0, doc, err);
}

void kvf_document_free(kvf_store *st, kvf_document *doc)
{
    if (st && doc) kvf_store_doc_free(st, doc);
}

kvf_status kvf_store_remove(kvf_store *st, const char *name, kvf_error *err)
{
    KVF_TRY(check(st, name, "name", err));
    return kvf_store_doc_remove(st, name, err);
}

kvf_status kvf_store_compact(kvf_store *st, kvf_error *err)
{
    KVF_TRY(check(st, st, "store", err));
    return kvf_store_rewrite(st, err);
}

kvf_status kvf_store_verify(kvf_store *st, kvf_verify *v, kvf_error *err)
{
    KVF_TRY(check(st, v, "v", err));
    if (v->size < offsetof(kvf_verify, reserved)) return kvf_fail(err, KVF_ERR_ARG, "kvf_verify.size is %zu; set it to sizeof", v->size);
    KVF_TRY(kvf_check_size(v->size, sizeof *v, "kvf_verify", err));
    return kvf_store_check(st, v, err);
}
