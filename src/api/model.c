/* model.c - model functions of kvfold.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "api/ctx.h"
#include "model/model.h"

kvf_status kvf_model_open(kvf_model **out, kvf_ctx *ctx, const char *path, kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!ctx || !path) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", ctx ? "path" : "ctx");
    return kvf_model_load(out, ctx->backend, path, err);
}

void kvf_model_close(kvf_model *m) { kvf_model_unload(m); }

kvf_status kvf_model_get_info(const kvf_model *m, kvf_model_info *info, kvf_error *err)
{
    if (!m || !info) return kvf_fail(err, KVF_ERR_ARG, "%s is NULL", m ? "info" : "model");
    KVF_TRY(kvf_check_size(info->size, sizeof *info, "kvf_model_info", err));
    const kvf_hparams *hp = &m->hp;
    kvf_model_info all = {
        .size = info->size, .arch = hp->arch_name, .name = m->name,
        .quantization = kvf_dtype_get((uint32_t)m->main_type)->name, .tokenizer = kvf_tokenizer_kind(m->tokenizer),
        .chat_template = m->chat ? kvf_chat_name(m->chat) : "", .n_params = m->n_params,
        .file_bytes = (int64_t)kvf_gguf_file_bytes(m->gguf), .n_ctx_train = hp->n_ctx_train, .n_vocab = hp->n_vocab,
        .n_layer = hp->n_layer, .n_embd = hp->n_embd, .n_ff = hp->n_ff, .n_head = hp->n_head,
        .n_head_kv = hp->n_head_kv, .head_dim = hp->head_dim, .window = hp->window,
        .kv_bytes_per_token = kvf_model_kv_bytes(m), .bos = kvf_tokenizer_bos(m->tokenizer),
        .eos = kvf_tokenizer_eos(m->tokenizer), .add_bos = kvf_tokenizer_add_bos(m->tokenizer),
        .fingerprint = { m->fingerprint[0], m->fingerprint[1] },
    };
    memcpy(info, &all, info->size);
    return KVF_OK;
}

static kvf_status entry(const kvf_display *d, int64_t first, int64_t n, int64_t i, kvf_model_entry *out)
{
    if (i < 0 || i >= n) return KVF_ERR_NOT_FOUND;
    const kvf_display_row *r = &d->rows[first + i];
    *out = (kvf_model_entry){ .name = r->name, .type = r->type, .value = r->value, .bytes = r->bytes };
    return KVF_OK;
}

kvf_status kvf_model_meta(const kvf_model *m, int64_t i, kvf_model_entry *out)
{
    if (!m || !out) return KVF_ERR_ARG;
    return entry(m->display, 0, m->display->n_meta, i, out);
}

kvf_status kvf_model_tensor(const kvf_model *m, int64_t i, kvf_model_entry *out)
{
    if (!m || !out) return KVF_ERR_ARG;
    return entry(m->display, m->display->n_meta, m->display->n_tensor, i, out);
}
