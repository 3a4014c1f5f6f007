/* load.c - finds a model's tensors in its file, checks their shapes, hands them to the backend.
 *
 * Matrices stay where they are in the mapped file. Norms and biases are small: they are widened to
 * f32 in one block of backend memory.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "base/half.h"
#include "base/hash.h"
#include "model/model.h"

typedef struct loader {
    kvf_model *m;
    kvf_error *err;
    kvf_status rc;   /* first failure; later loads are no-ops */
    float *host;     /* vectors, filled here, uploaded at the end */
    int64_t n, cap;  /* floats used and there */
    int64_t type_bytes[KVF_DTYPE_LIMIT];
    uint8_t *used;   /* [n_tensor] */
} loader;

static const kvf_gguf_tensor *find(loader *l, const char *name, bool required)
{
    if (l->rc < 0) return NULL;
    const kvf_gguf_tensor *t = kvf_gguf_find_tensor(l->m->gguf, name);
    if (!t && required)
        l->rc = kvf_fail(l->err, KVF_ERR_FORMAT, "tensor '%s' is missing; the file is incomplete or of another architecture", name);
    if (t) l->used[t - kvf_gguf_tensor_at(l->m->gguf, 0)] = 1;
    return t;
}

static bool ends_with(kvf_str s, const char *end)
{
    size_t n = strlen(end);
    return s.n >= n && memcmp(s.p + s.n - n, end, n) == 0;
}

/* A tensor that no formula of ours reads belongs to a model that computes something else: better no
 * answer than a wrong one. RoPE tables are the exception: rope_freqs is read elsewhere, and old
 * files carry tables that follow from the metadata. */
static kvf_status check_all_used(const loader *l)
{
    for (int64_t i = 0; i < kvf_gguf_n_tensor(l->m->gguf); i++) {
        kvf_str name = kvf_gguf_tensor_at(l->m->gguf, i)->name;
        if (l->used[i] || ends_with(name, "rope_freqs.weight") || ends_with(name, "rot_embd.weight")) continue;
        return kvf_fail(l->err, KVF_ERR_UNSUPPORTED,
                        "tensor '%.*s' is not part of %s as this build knows it; the model would compute something else",
                        name.n > 96 ? 96 : (int)name.n, name.p, l->m->hp.arch_name);
    }
    return KVF_OK;
}

/* A matrix [n_out][n_in]. */
static void load_matrix(loader *l, kvf_weight *w, const char *name, int64_t n_out, int64_t n_in)
{
    const kvf_gguf_tensor *t = find(l, name, true);
    if (!t) return;
    if (t->n_dim != 2 || t->dim[0] != n_in || t->dim[1] != n_out) {
        l->rc = kvf_fail(l->err, KVF_ERR_FORMAT, "tensor '%s' is [%lld, %lld]; the metadata asks for [%lld, %lld]", name,
                         (long long)t->dim[0], (long long)t->dim[1], (long long)n_in, (long long)n_out);
        return;
    }
    l->type_bytes[t->type] += (int64_t)t->bytes;
    l->rc = l->m->backend->ops->weight_init(l->m->backend, w, t->type, n_out, n_in, t->data, l->err);
}

static void widen(float *out, const kvf_gguf_tensor *t, int64_t n)
{
    const uint8_t *p = t->data;
    for (int64_t i = 0; i < n; i++) {
        if (t->type == KVF_DTYPE_F32) {
            memcpy(out + i, p + i * 4, 4);
        } else {
            uint16_t h;
            memcpy(&h, p + i * 2, 2);
            out[i] = t->type == KVF_DTYPE_F16 ? kvf_f32_from_f16(h) : kvf_f32_from_bf16(h);
        }
    }
}

/* A vector [n] of any float type, appended to the host block; *out is where it will be after the
 * upload of the whole block. */
static void load_vector(loader *l, const float **out, const char *name, int64_t n, bool required)
{
    *out = NULL;
    const kvf_gguf_tensor *t = find(l, name, required);
    if (!t) return;
    if (t->n_dim != 1 || t->dim[0] != n ||
        (t->type != KVF_DTYPE_F32 && t->type != KVF_DTYPE_F16 && t->type != KVF_DTYPE_BF16)) {
        l->rc = kvf_fail(l->err, KVF_ERR_FORMAT, "tensor '%s' must be a vector of %lld floats", name, (long long)n);
        return;
    }
    if (l->n + n > l->cap) {
        l->rc = kvf_fail(l->err, KVF_ERR_INTERNAL, "tensor '%s' does not fit the block of vectors", name);
        return;
    }
    widen(l->host + l->n, t, n);
    *out = l->m->vectors + l->n;
    l->n += (n + 15) / 16 * 16; /* whole cache lines */
}

static void layer_vector(loader *l, const float **out, int32_t layer, const char *what, int64_t n, bool required)
{
    char name[96];
    snprintf(name, sizeof name, "blk.%d.%s", layer, what);
    load_vector(l, out, name, n, required);
}

static void layer_matrix(loader *l, kvf_weight *w, int32_t layer, const char *what, int64_t n_out, int64_t n_in)
{
    char name[96];
    snprintf(name, sizeof name, "blk.%d.%s", layer, what);
    load_matrix(l, w, name, n_out, n_in);
}

static void load_layer(loader *l, int32_t i)
{
    const kvf_hparams *hp = &l->m->hp;
    kvf_layer *y = &l->m->layers[i];
    int64_t d = hp->head_dim, n_q = hp->n_head * d, n_kv = hp->n_head_kv * d;
    bool gemma = hp->arch == KVF_ARCH_GEMMA3, qk_norm = gemma || hp->arch == KVF_ARCH_QWEN3;
    bool qkv_bias = hp->arch == KVF_ARCH_QWEN2;
    layer_vector(l, &y->attn_norm, i, "attn_norm.weight", hp->n_embd, true);
    layer_vector(l, &y->ffn_norm, i, "ffn_norm.weight", hp->n_embd, true);
    layer_vector(l, &y->q_norm, i, "attn_q_norm.weight", d, qk_norm);
    layer_vector(l, &y->k_norm, i, "attn_k_norm.weight", d, qk_norm);
    layer_vector(l, &y->post_attn_norm, i, "post_attention_norm.weight", hp->n_embd, gemma);
    layer_vector(l, &y->post_ffn_norm, i, "post_ffw_norm.weight", hp->n_embd, gemma);
    layer_vector(l, &y->q_bias, i, "attn_q.bias", n_q, qkv_bias);
    layer_vector(l, &y->k_bias, i, "attn_k.bias", n_kv, qkv_bias);
    layer_vector(l, &y->v_bias, i, "attn_v.bias", n_kv, qkv_bias);
    layer_vector(l, &y->o_bias, i, "attn_output.bias", hp->n_embd, false);
    layer_matrix(l, &y->q, i, "attn_q.weight", n_q, hp->n_embd);
    layer_matrix(l, &y->k, i, "attn_k.weight", n_kv, hp->n_embd);
    layer_matrix(l, &y->v, i, "attn_v.weight", n_kv, hp->n_embd);
    layer_matrix(l, &y->o, i, "attn_output.weight", hp->n_embd, n_q);
    layer_matrix(l, &y->gate, i, "ffn_gate.weight", hp->n_ff, hp->n_embd);
    layer_matrix(l, &y->up, i, "ffn_up.weight", hp->n_ff, hp->n_embd);
    layer_matrix(l, &y->down, i, "ffn_down.weight", hp->n_embd, hp->n_ff);
}

static kvf_status load_tensors(loader *l)
{
    kvf_model *m = l->m;
    const kvf_hparams *hp = &m->hp;
    load_matrix(l, &m->embed, "token_embd.weight", hp->n_vocab, hp->n_embd);
    load_vector(l, &m->output_norm, "output_norm.weight", hp->n_embd, true);
    if (find(l, "output.weight", false)) load_matrix(l, &m->output, "output.weight", hp->n_vocab, hp->n_embd);
    else m->output = m->embed; /* tied */
    for (int32_t i = 0; i < hp->n_layer && l->rc >= 0; i++) load_layer(l, i);
    KVF_TRY(l->rc);
    return check_all_used(l);
}

/* Floats of all vectors, an upper bound: ten a layer, the widest of each kind. */
static int64_t vector_floats(const kvf_hparams *hp)
{
    int64_t d = hp->head_dim, per = 5 * ((int64_t)hp->n_embd + 16) + 2 * (d + 16) + (hp->n_head + 2 * (int64_t)hp->n_head_kv) * d + 48;
    return per * hp->n_layer + hp->n_embd + 16;
}

static kvf_status check_vectors_fit(const kvf_model *m, kvf_error *err)
{
    /* The metadata may claim any width; but matrices are as wide as the vectors and must be in the
     * file, at 4 bits an element or more, so no file has vectors of more floats than it has bytes. */
    if ((uint64_t)vector_floats(&m->hp) > kvf_gguf_file_bytes(m->gguf))
        return kvf_fail(err, KVF_ERR_FORMAT, "the metadata describes a larger model than the file of %zu bytes can hold",
                        kvf_gguf_file_bytes(m->gguf));
    return KVF_OK;
}

/* Of the metadata, the tensor directory and 64 bytes from the start, middle and end of every
 * tensor: tells any two models apart without reading all weights, but does not prove that every
 * byte is the same. */
static void fingerprint(kvf_model *m)
{
    kvf_hash h = { 0 };
    for (int64_t i = 0; i < kvf_gguf_n_kv(m->gguf); i++) {
        const kvf_gguf_kv *kv = kvf_gguf_kv_at(m->gguf, i);
        h = kvf_hash_bytes(kv->key.p, kv->key.n, h);
        h = kvf_hash_bytes(kv->data, kv->bytes, h);
    }
    for (int64_t i = 0; i < kvf_gguf_n_tensor(m->gguf); i++) {
        const kvf_gguf_tensor *t = kvf_gguf_tensor_at(m->gguf, i);
        int64_t shape[5] = { t->type, t->dim[0], t->dim[1], t->dim[2], t->dim[3] };
        size_t n = t->bytes < 64 ? t->bytes : 64;
        h = kvf_hash_bytes(t->name.p, t->name.n, h);
        h = kvf_hash_bytes(shape, sizeof shape, h);
        h = kvf_hash_bytes(t->data, n, h);
        h = kvf_hash_bytes((const char *)t->data + (t->bytes - n) / 2, n, h);
        h = kvf_hash_bytes((const char *)t->data + (t->bytes - n), n, h);
        m->n_params += t->dim[0] * t->dim[1] * t->dim[2] * t->dim[3];
    }
    m->fingerprint[0] = h.lo;
    m->fingerprint[1] = h.hi;
}

static kvf_status load_weights(kvf_model *m, kvf_error *err)
{
    KVF_TRY(check_vectors_fit(m, err));
    loader l = { .m = m, .err = err, .cap = vector_floats(&m->hp) };
    void *block;
    KVF_TRY(kvf_mem_get(m->mem, &block, (size_t)m->hp.n_layer, sizeof(kvf_layer), err));
    m->layers = block;
    KVF_TRY(m->backend->ops->alloc(m->backend, &block, (size_t)l.cap * sizeof(float), err));
    m->vectors = block;
    KVF_TRY(kvf_mem_get(m->mem, &block, (size_t)l.cap, sizeof(float), err));
    l.host = block;
    kvf_status rc = kvf_mem_get(m->mem, &block, (size_t)kvf_gguf_n_tensor(m->gguf), 1, err);
    l.used = block;
    if (rc >= 0) rc = load_tensors(&l);
    if (rc >= 0) rc = m->backend->ops->upload(m->backend, m->vectors, l.host, (size_t)l.n * sizeof(float), err);
    kvf_free(m->mem, l.host);
    kvf_free(m->mem, l.used);
    m->main_type = KVF_DTYPE_F32;
    for (int t = 0; t < KVF_DTYPE_LIMIT; t++)
        if (l.type_bytes[t] > l.type_bytes[m->main_type]) m->main_type = (kvf_dtype)t;
    return rc;
}

static kvf_status load_text(kvf_model *m, kvf_error *err)
{
    KVF_TRY(kvf_tokenizer_open(&m->tokenizer, m->gguf, m->mem, err));
    kvf_str jinja, name;
    KVF_TRY(kvf_gguf_get_str_or_null(m->gguf, "tokenizer.chat_template", &jinja, err));
    m->chat = kvf_chat_recognise(jinja.p ? &jinja : NULL, m->tokenizer);
    KVF_TRY(kvf_gguf_get_str_or_null(m->gguf, "general.name", &name, err));
    if (name.p) snprintf(m->name, sizeof m->name, "%.*s", name.n > 127 ? 127 : (int)name.n, name.p);
    return KVF_OK;
}

static kvf_status load(kvf_model *m, const char *path, kvf_error *err)
{
    KVF_TRY(kvf_gguf_open(&m->gguf, path, m->mem, err));
    KVF_TRY(load_text(m, err));
    KVF_TRY(kvf_hparams_read(&m->hp, m->inv_freq, m->gguf, kvf_tokenizer_n_vocab(m->tokenizer), m->mem, err));
    KVF_TRY(load_weights(m, err));
    fingerprint(m);
    return kvf_display_open(&m->display, m->gguf, m->mem, err);
}

kvf_status kvf_model_load(kvf_model **out, kvf_backend *backend, const char *path, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(backend->mem, &block, 1, sizeof(kvf_model), err));
    kvf_model *m = block;
    m->mem = backend->mem;
    m->backend = backend;
    kvf_status rc = load(m, path, err);
    if (rc < 0) {
        kvf_error_prefix(err, "%s: ", path);
        kvf_model_unload(m);
        return rc;
    }
    *out = m;
    return KVF_OK;
}

static void unload_layer(kvf_model *m, kvf_layer *y)
{
    kvf_weight *w[] = { &y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down };
    for (size_t i = 0; i < sizeof w / sizeof *w; i++)
        if (w[i]->data) m->backend->ops->weight_fini(m->backend, w[i]);
}

void kvf_model_unload(kvf_model *m)
{
    if (!m) return;
    if (m->backend->ops->weight_fini) {
        for (int32_t i = 0; m->layers && i < m->hp.n_layer; i++) unload_layer(m, &m->layers[i]);
        if (m->output.data && m->output.data != m->embed.data) m->backend->ops->weight_fini(m->backend, &m->output);
        if (m->embed.data) m->backend->ops->weight_fini(m->backend, &m->embed);
    }
    if (m->vectors) m->backend->ops->release(m->backend, m->vectors);
    kvf_free(m->mem, m->inv_freq[0]);
    kvf_free(m->mem, m->inv_freq[1]);
    kvf_free(m->mem, m->layers);
    kvf_display_close(m->display);
    kvf_tokenizer_close(m->tokenizer);
    kvf_gguf_close(m->gguf);
    kvf_free(m->mem, m);
}
