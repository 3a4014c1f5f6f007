/* load.c - finds a tower's tensors in its file, checks their shapes, and that every number is finite.
 *
 * Names are llama.cpp's. Two habits of its converters are met: files of the legacy script call the first
 * product of the feed-forward "down" and the second "up" (told by their shapes), and store what no
 * formula here reads (SigLIP's pooling head, a text tower), which is passed over. Any other tensor that is
 * not read belongs to a model that computes something else, and is an error.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/half.h"
#include "base/hash.h"
#include "vision/tower.h"

typedef struct loader {
    kvf_vision *v;
    kvf_error *err;
    kvf_status rc;  /* first failure; later loads are no-ops */
    int64_t n, cap; /* floats used and there in v->vectors */
    int64_t type_bytes[KVF_DTYPE_LIMIT];
    uint8_t *used;  /* [n_tensor] */
} loader;

static const kvf_gguf_tensor *find(loader *l, const char *name, bool required)
{
    if (l->rc < 0) return NULL;
    const kvf_gguf_tensor *t = kvf_gguf_find_tensor(l->v->gguf, name);
    if (!t && required)
        l->rc = kvf_fail(l->err, KVF_ERR_FORMAT, "tensor '%s' is missing; the file is incomplete or of another model", name);
    if (t) l->used[t - kvf_gguf_tensor_at(l->v->gguf, 0)] = 1;
    return t;
}

static bool is_float(const kvf_gguf_tensor *t)
{
    return t->type == KVF_DTYPE_F32 || t->type == KVF_DTYPE_F16 || t->type == KVF_DTYPE_BF16;
}

/* ---- Finite ----------------------------------------------------------------------------- */

/* 1 if all n floats are finite. Bits are looked at, so that the loop becomes vector code. */
static bool all_finite(const float *x, int64_t n)
{
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (kvf_f32_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
    return bad == 0;
}

typedef struct finite_task {
    const float *x;
    int64_t n, each;
    atomic_bool bad;
} finite_task;

static void finite_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    finite_task *t = arg;
    int64_t at = part * t->each, n = t->n - at < t->each ? t->n - at : t->each;
    if (!all_finite(t->x + at, n)) atomic_store(&t->bad, true);
}

typedef struct finite_rows {
    const kvf_weight *w;
    int32_t *rows;    /* [n] which */
    float *out, *dev; /* [n][n_in] host; on a device also there */
} finite_rows;

/* n rows of a matrix, dequantised by the backend. */
static kvf_status rows_finite(kvf_vision *v, const finite_rows *f, int64_t n, bool *bad, kvf_error *err)
{
    kvf_backend *b = v->env.backend;
    const kvf_weight *w = f->w;
    kvf_embed_args a = { .table = w, .tokens = f->rows, .n_tok = n, .scale = 1, .out = f->dev ? f->dev : f->out };
    KVF_TRY(b->ops->embed(b, &a, err));
    if (f->dev) KVF_TRY(b->ops->download(b, f->out, f->dev, (size_t)(n * w->n_in) * sizeof(float), err));
    finite_task t = { .x = f->out, .n = n * w->n_in, .each = 65536 };
    atomic_init(&t.bad, false);
    kvf_threads_run(v->env.threads, (t.n + t.each - 1) / t.each, finite_part, &t);
    *bad = atomic_load(&t.bad);
    return KVF_OK;
}

/* A weight that is not finite makes every answer NaN: better said when the file is opened. */
static kvf_status check_finite(kvf_vision *v, const kvf_weight *w, const char *name, kvf_error *err)
{
    int64_t n = (1 << 20) / w->n_in;
    if (n < 1) n = 1;
    if (n > w->n_out) n = w->n_out;
    float *out = kvf_alloc_raw(v->env.mem, (size_t)n, (size_t)w->n_in * sizeof(float));
    int32_t *rows = kvf_alloc_raw(v->env.mem, (size_t)n, sizeof *rows);
    kvf_status rc = KVF_OK;
    if (!out || !rows) rc = kvf_fail(err, KVF_ERR_NOMEM, "out of memory: %lld floats to check a tensor refused", (long long)(n * w->n_in));
    void *dev = NULL;
    kvf_backend *b = v->env.backend;
    if (rc >= 0 && v->on_device) rc = b->ops->alloc(b, &dev, (size_t)(n * w->n_in) * sizeof(float), err);
    finite_rows f = { w, rows, out, dev };
    if (!v->on_device) kvf_turn_take(&b->run); /* else it is taken for the whole load */
    for (int64_t first = 0; first < w->n_out && rc >= 0; first += n) {
        int64_t count = w->n_out - first < n ? w->n_out - first : n;
        bool bad = false;
        for (int64_t i = 0; i < count; i++) rows[i] = (int32_t)(first + i);
        rc = rows_finite(v, &f, count, &bad, err);
        if (rc >= 0 && bad)
            rc = kvf_fail(err, KVF_ERR_FORMAT, "tensor '%s' holds a number that is not finite; the file is damaged or was converted wrongly", name);
    }
    if (!v->on_device) kvf_turn_give(&b->run);
    if (dev) b->ops->release(b, dev);
    kvf_free(v->env.mem, out);
    kvf_free(v->env.mem, rows);
    return rc;
}

/* ---- Matrices and vectors ----------------------------------------------------------------- */

static void take_matrix(loader *l, kvf_weight *w, const kvf_gguf_tensor *t, const char *name, int64_t n_out, int64_t n_in)
{
    kvf_vision *v = l->v;
    l->type_bytes[t->type] += (int64_t)t->bytes;
    l->rc = v->env.backend->ops->weight_init(v->env.backend, w, t->type, n_out, n_in, t->data, l->err);
    if (l->rc >= 0) l->rc = check_finite(v, w, name, l->err);
}

/* A matrix [n_out][n_in]; n_out 0: any. */
static void matrix(loader *l, kvf_weight *w, const char *name, int64_t n_out, int64_t n_in, bool required)
{
    const kvf_gguf_tensor *t = find(l, name, required);
    if (!t) return;
    if (t->n_dim != 2 || t->dim[0] != n_in || (n_out ? t->dim[1] != n_out : t->dim[1] > 131072)) {
        l->rc = kvf_fail(l->err, KVF_ERR_FORMAT, "tensor '%s' is [%lld, %lld]; the model asks for [%lld, %lld]", name,
                         (long long)t->dim[0], (long long)t->dim[1], (long long)n_in, (long long)n_out);
        return;
    }
    take_matrix(l, w, t, name, t->dim[1], n_in);
}

static void widen(float *out, const kvf_gguf_tensor *t, int64_t n)
{
    const uint8_t *p = t->data;
    for (int64_t i = 0; i < n; i++) {
        uint16_t h;
        if (t->type == KVF_DTYPE_F32) {
            memcpy(out + i, p + i * 4, 4);
        } else {
            memcpy(&h, p + i * 2, 2);
            out[i] = t->type == KVF_DTYPE_F16 ? kvf_f32_from_f16(h) : kvf_f32_from_bf16(h);
        }
    }
}

/* n floats in any number of dimensions, the first of which is dim0. */
static void vector(loader *l, const float **out, const char *name, int64_t dim0, int64_t n, bool required)
{
    *out = NULL;
    const kvf_gguf_tensor *t = find(l, name, required);
    if (!t) return;
    if (t->dim[0] != dim0 || t->dim[0] * t->dim[1] * t->dim[2] * t->dim[3] != n || !is_float(t)) {
        l->rc = kvf_fail(l->err, KVF_ERR_FORMAT, "tensor '%s' must hold %lld floats in rows of %lld; it is [%lld, %lld] of type %s", name,
                         (long long)n, (long long)dim0, (long long)t->dim[0], (long long)t->dim[1],
                         kvf_dtype_get((uint32_t)t->type)->name);
        return;
    }
    if (l->n + n > l->cap) {
        l->rc = kvf_fail(l->err, KVF_ERR_INTERNAL, "tensor '%s' does not fit the block of vectors", name);
        return;
    }
    widen(l->v->vectors + l->n, t, n);
    if (!all_finite(l->v->vectors + l->n, n)) {
        l->rc = kvf_fail(l->err, KVF_ERR_FORMAT, "tensor '%s' holds a number that is not finite; the file is damaged or was converted wrongly", name);
        return;
    }
    *out = l->v->vectors + l->n;
    l->n += (n + 15) / 16 * 16; /* whole cache lines */
}

static void layer_vector(loader *l, const float **out, int32_t i, const char *what, int64_t n, bool required)
{
    char name[96];
    snprintf(name, sizeof name, "v.blk.%d.%s", i, what);
    vector(l, out, name, n, n, required);
}

static void layer_matrix(loader *l, kvf_weight *w, int32_t i, const char *what, int64_t n_out, int64_t n_in)
{
    char name[96];
    snprintf(name, sizeof name, "v.blk.%d.%s", i, what);
    matrix(l, w, name, n_out, n_in, true);
}

/* ---- The model ---------------------------------------------------------------------------- */

/* The legacy script exchanged the names of the feed-forward's halves: the first reads the width. */
static bool names_swapped(loader *l, int32_t i)
{
    char name[96];
    snprintf(name, sizeof name, "v.blk.%d.ffn_down.weight", i);
    const kvf_gguf_tensor *t = find(l, name, true);
    return t && t->dim[0] == l->v->hp.width;
}

static void load_layer(loader *l, int32_t i)
{
    kvf_vision_hparams *hp = &l->v->hp;
    kvf_vision_layer *y = &l->v->layers[i];
    int64_t w = hp->width;
    bool swapped = names_swapped(l, i);
    layer_vector(l, &y->ln1_w, i, "ln1.weight", w, true);
    layer_vector(l, &y->ln1_b, i, "ln1.bias", w, true);
    layer_vector(l, &y->ln2_w, i, "ln2.weight", w, true);
    layer_vector(l, &y->ln2_b, i, "ln2.bias", w, true);
    layer_matrix(l, &y->q, i, "attn_q.weight", w, w);
    layer_matrix(l, &y->k, i, "attn_k.weight", w, w);
    layer_matrix(l, &y->v, i, "attn_v.weight", w, w);
    layer_matrix(l, &y->o, i, "attn_out.weight", w, w);
    layer_vector(l, &y->q_b, i, "attn_q.bias", w, false);
    layer_vector(l, &y->k_b, i, "attn_k.bias", w, false);
    layer_vector(l, &y->v_b, i, "attn_v.bias", w, false);
    layer_vector(l, &y->o_b, i, "attn_out.bias", w, false);
    layer_matrix(l, &y->up, i, swapped ? "ffn_down.weight" : "ffn_up.weight", hp->n_ff, w);
    layer_matrix(l, &y->down, i, swapped ? "ffn_up.weight" : "ffn_down.weight", w, hp->n_ff);
    layer_vector(l, &y->up_b, i, swapped ? "ffn_down.bias" : "ffn_up.bias", hp->n_ff, false);
    layer_vector(l, &y->down_b, i, swapped ? "ffn_up.bias" : "ffn_down.bias", w, false);
}

/* The convolution's kernel [width][3][patch][patch] is a matrix over the pixels of a patch. */
static void load_patch(loader *l)
{
    kvf_vision_hparams *hp = &l->v->hp;
    const char *name = "v.patch_embd.weight";
    const kvf_gguf_tensor *t = find(l, name, true);
    if (!t) return;
    int64_t p = hp->patch_size, n_in = 3 * p * p;
    bool fits = t->n_dim == 4 && t->dim[0] == p && t->dim[1] == p && t->dim[2] == 3 && t->dim[3] == hp->width;
    if (!fits || !is_float(t)) {
        l->rc = kvf_fail(l->err, KVF_ERR_FORMAT, "tensor '%s' must be floats [%d, %d, 3, %d]; it is [%lld, %lld, %lld, %lld] of type %s", name,
                         hp->patch_size, hp->patch_size, hp->width, (long long)t->dim[0], (long long)t->dim[1],
                         (long long)t->dim[2], (long long)t->dim[3], kvf_dtype_get((uint32_t)t->type)->name);
        return;
    }
    take_matrix(l, &l->v->patch, t, name, hp->width, n_in);
}

static void load_projector(loader *l)
{
    kvf_vision *v = l->v;
    matrix(l, &v->mm0, "mm.0.weight", 0, v->hp.width, true);
    if (l->rc < 0) return;
    v->hp.n_mid = v->hp.n_out = (int32_t)v->mm0.n_out;
    vector(l, &v->mm0_b, "mm.0.bias", v->hp.n_mid, v->hp.n_mid, false);
    matrix(l, &v->mm2, "mm.2.weight", 0, v->hp.n_mid, false);
    if (l->rc < 0) return;
    if (v->mm2.data) {
        v->hp.n_out = (int32_t)v->mm2.n_out;
        vector(l, &v->mm2_b, "mm.2.bias", v->hp.n_out, v->hp.n_out, false);
    }
    bool old = kvf_gguf_find_tensor(v->gguf, "model.image_newline") != NULL;
    vector(l, &v->newline, old ? "model.image_newline" : "v.image_newline", v->hp.n_out, v->hp.n_out, false);
}

static bool starts_with(kvf_str s, const char *p) { return s.n >= strlen(p) && memcmp(s.p, p, strlen(p)) == 0; }

static kvf_status check_all_used(const loader *l)
{
    static const char *const passed[] = { "v.head.", "t.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias" };
    for (int64_t i = 0; i < kvf_gguf_n_tensor(l->v->gguf); i++) {
        kvf_str name = kvf_gguf_tensor_at(l->v->gguf, i)->name;
        bool known = l->used[i];
        for (size_t j = 0; j < sizeof passed / sizeof *passed; j++) known = known || starts_with(name, passed[j]);
        if (!known)
            return kvf_fail(l->err, KVF_ERR_UNSUPPORTED,
                            "tensor '%.*s' is not part of a LLaVA-type tower as this build knows it; the model would compute something else",
                            name.n > 96 ? 96 : (int)name.n, name.p);
    }
    return KVF_OK;
}

static kvf_status load_all(loader *l)
{
    kvf_vision *v = l->v;
    kvf_vision_hparams *hp = &v->hp;
    hp->has_class = kvf_gguf_find_tensor(v->gguf, "v.class_embd") != NULL;
    hp->n_pos = hp->n_patch + hp->has_class;
    load_patch(l);
    vector(l, &v->patch_b, "v.patch_embd.bias", hp->width, hp->width, false);
    vector(l, &v->class_embd, "v.class_embd", hp->width, hp->width, false);
    vector(l, &v->pos, "v.position_embd.weight", hp->width, (int64_t)hp->n_pos * hp->width, true);
    vector(l, &v->pre_w, "v.pre_ln.weight", hp->width, hp->width, false);
    vector(l, &v->pre_b, "v.pre_ln.bias", hp->width, hp->width, v->pre_w != NULL);
    vector(l, &v->post_w, "v.post_ln.weight", hp->width, hp->width, false);
    vector(l, &v->post_b, "v.post_ln.bias", hp->width, hp->width, v->post_w != NULL);
    for (int32_t i = 0; i < hp->n_layer && l->rc >= 0; i++) load_layer(l, i);
    load_projector(l);
    KVF_TRY(l->rc);
    return check_all_used(l);
}

/* n_ff is a key that old files lack or set to 0; the tensors know. */
static kvf_status find_n_ff(kvf_vision *v, kvf_error *err)
{
    const kvf_gguf_tensor *t = kvf_gguf_find_tensor(v->gguf, "v.blk.0.ffn_down.weight");
    if (v->hp.n_ff > 0 || !t) return KVF_OK;
    int64_t n = t->dim[0] == v->hp.width ? t->dim[1] : t->dim[0];
    if (n > 131072) return kvf_fail(err, KVF_ERR_FORMAT, "tensor 'v.blk.0.ffn_down.weight' is far too wide; the file is damaged");
    v->hp.n_ff = (int32_t)n;
    return KVF_OK;
}

/* Floats of all vectors, an upper bound; or an error if the file cannot hold such a model. */
static kvf_status vector_floats(const kvf_vision *v, int64_t *out, kvf_error *err)
{
    const kvf_vision_hparams *hp = &v->hp;
    int64_t w = hp->width + 16, n = ((int64_t)hp->n_patch + 1) * hp->width + 16 + 6 * w;
    n += hp->n_layer * (9 * w + hp->n_ff + 16);
    const kvf_gguf_tensor *t0 = kvf_gguf_find_tensor(v->gguf, "mm.0.weight"), *t2 = kvf_gguf_find_tensor(v->gguf, "mm.2.weight");
    int64_t mid = t0 ? t0->dim[1] : 0, last = t2 ? t2->dim[1] : mid;
    /* Position embeddings and matrices are as wide and must be in the file, at 4 bits a number or more. */
    if ((uint64_t)n > 2 * (uint64_t)kvf_gguf_file_bytes(v->gguf) + 4096)
        return kvf_fail(err, KVF_ERR_FORMAT, "the metadata describes a larger model than the file of %zu bytes can hold", kvf_gguf_file_bytes(v->gguf));
    *out = n + (mid < 131072 ? mid : 131072) + 2 * (last < 131072 ? last : 131072) + 48;
    return KVF_OK;
}

kvf_status kvf_vision_tensors_load(kvf_vision *v, kvf_error *err)
{
    loader l = { .v = v, .err = err };
    void *block;
    KVF_TRY(find_n_ff(v, err));
    KVF_TRY(vector_floats(v, &l.cap, err));
    KVF_TRY(kvf_mem_get(v->env.mem, &block, (size_t)v->hp.n_layer, sizeof(kvf_vision_layer), err));
    v->layers = block;
    KVF_TRY(kvf_mem_get(v->env.mem, &block, (size_t)l.cap, sizeof(float), err));
    v->vectors = block;
    KVF_TRY(kvf_mem_get(v->env.mem, &block, (size_t)kvf_gguf_n_tensor(v->gguf), 1, err));
    l.used = block;
    kvf_status rc = load_all(&l);
    kvf_free(v->env.mem, l.used);
    v->n_vector = l.n;
    for (int t = 0; t < KVF_DTYPE_LIMIT; t++)
        if (l.type_bytes[t] > l.type_bytes[v->main_type]) v->main_type = (kvf_dtype)t;
    return rc;
}
