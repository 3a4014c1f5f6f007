/* forward.c - the transformer, see forward.h. One function per half layer; every line is an op of
 * the backend, so the same file serves every device.
 *
 * The last layer is only computed where its output is read: for a prompt's last token, and not at
 * all in the chunks before (their KV is still needed). That is one layer of n_layer saved.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/forward.h"

#include <math.h>
#include <string.h>

struct kvf_forward {
    const kvf_model *m;
    kvf_backend *be;
    int64_t n_batch;
    int64_t far;      /* distance of far keys; 0: no memory */
    int64_t cap;      /* tokens the buffers hold */
    int64_t n_out;    /* of the last run */
    size_t bytes;

    float *arena;     /* backend memory behind the buffers below */
    float *x;         /* [cap][n_embd] residual stream */
    float *h;         /* [cap][n_embd] normed input, or a half layer's output before its post-norm */
    float *q, *o;     /* [cap][n_head * head_dim] */
    float *k, *v;     /* [cap][n_head_kv * head_dim] */
    float *ff;        /* [cap][n_ff] gated */
    float *q_far;     /* [cap][n_head * head_dim] with a memory: queries for the far keys */
    float *rope[3];   /* [cap][n_rot] angles: global layers, sliding-window layers, far keys */
    int32_t *pos;     /* host, [cap] */
    kvf_token *ids;   /* host, [cap] tokens, 0 where an embedding is given */

    float *logits;    /* backend memory, [logits_cap][n_vocab] */
    int64_t logits_cap;
};

kvf_status kvf_forward_open(kvf_forward **out, const kvf_model *m, int64_t n_batch, int64_t far, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(m->mem, &block, 1, sizeof(kvf_forward), err));
    kvf_forward *f = block;
    f->m = m;
    f->be = m->backend;
    f->n_batch = n_batch;
    f->far = far;
    *out = f;
    return KVF_OK;
}

static void release_buffers(kvf_forward *f)
{
    if (f->arena) f->be->ops->release(f->be, f->arena);
    kvf_free(f->m->mem, f->pos);
    kvf_free(f->m->mem, f->ids);
    f->arena = NULL;
    f->pos = NULL;
    f->ids = NULL;
    f->cap = 0;
    f->bytes = 0;
}

void kvf_forward_close(kvf_forward *f)
{
    if (!f) return;
    release_buffers(f);
    if (f->logits) f->be->ops->release(f->be, f->logits);
    kvf_free(f->m->mem, f);
}

size_t kvf_forward_bytes(const kvf_forward *f)
{
    return f->bytes + (size_t)f->logits_cap * (size_t)f->m->hp.n_vocab * sizeof(float);
}

/* Buffers for n tokens, in one allocation; each starts on a cache line. */
static kvf_status grow_buffers(kvf_forward *f, int64_t n, kvf_error *err)
{
    if (n <= f->cap) return KVF_OK;
    const kvf_hparams *hp = &f->m->hp;
    int64_t q = (int64_t)hp->n_head * hp->head_dim, kv = (int64_t)hp->n_head_kv * hp->head_dim;
    const struct {
        float **at;
        int64_t width;
    } parts[] = { { &f->x, hp->n_embd }, { &f->h, hp->n_embd }, { &f->q, q }, { &f->o, q }, { &f->k, kv }, { &f->v, kv },
                  { &f->ff, hp->n_ff }, { &f->rope[0], hp->n_rot }, { &f->rope[1], hp->n_rot },
                  { &f->rope[2], f->far > 0 ? hp->n_rot : 0 }, { &f->q_far, f->far > 0 ? q : 0 } };
    enum { N = sizeof parts / sizeof *parts };
    int64_t total = 0, offset[N];
    for (int i = 0; i < N; i++) {
        offset[i] = total;
        total += (n * parts[i].width + 15) / 16 * 16;
    }
    f->n_out = 0; /* hidden states of an earlier run go with the old buffers */
    release_buffers(f);
    void *block;
    KVF_TRY(kvf_mem_get(f->m->mem, &block, (size_t)n, sizeof(int32_t), err));
    f->pos = block;
    KVF_TRY(kvf_mem_get(f->m->mem, &block, (size_t)n, sizeof(kvf_token), err));
    f->ids = block;
    KVF_TRY(f->be->ops->alloc(f->be, &block, (size_t)total * sizeof(float), err));
    f->arena = block;
    for (int i = 0; i < N; i++) *parts[i].at = f->arena + offset[i];
    f->cap = n;
    f->bytes = (size_t)total * sizeof(float) + (size_t)n * (sizeof(int32_t) + sizeof(kvf_token));
    return KVF_OK;
}

static kvf_status norm(kvf_forward *f, const float *x, const float *weight, float *out, int64_t n, int64_t width,
                       kvf_error *err)
{
    kvf_rmsnorm_args a = { .x = x, .weight = weight, .out = out, .n_row = n, .width = width, .x_stride = width,
                           .out_stride = width, .eps = f->m->hp.norm_eps };
    return f->be->ops->rmsnorm(f->be, &a, err);
}

/* y = x w^T (+ bias), or y += with accumulate. */
static kvf_status project(kvf_forward *f, const float *x, const kvf_weight *w, const float *bias, float *y, int64_t n,
                          bool accumulate, kvf_error *err)
{
    kvf_matmul_args a = { .x = x, .n_tok = n, .n_w = 1, .w = { w }, .bias = { bias }, .y = { y }, .accumulate = accumulate };
    return f->be->ops->matmul(f->be, &a, err);
}

/* angles: row of the first token. */
static kvf_status rotate(kvf_forward *f, float *x, int32_t n_head, int64_t n, const float *angles, kvf_error *err)
{
    const kvf_hparams *hp = &f->m->hp;
    kvf_rope_args a = { .x = x, .n_tok = n, .n_head = n_head, .head_dim = hp->head_dim, .n_rot = hp->n_rot,
                        .cos_sin = angles, .kind = hp->rope_kind };
    return f->be->ops->rope(f->be, &a, err);
}

/* q, k, v of the normed input; keys of all n tokens, queries of the last n_q. */
static kvf_status project_qkv(kvf_forward *f, const kvf_layer *y, int64_t n, int64_t n_q, kvf_error *err)
{
    const kvf_hparams *hp = &f->m->hp;
    kvf_matmul_args a = { .x = f->h, .n_tok = n, .n_w = 2, .w = { &y->k, &y->v, &y->q },
                          .bias = { y->k_bias, y->v_bias, y->q_bias }, .y = { f->k, f->v, f->q } };
    if (n_q == n) a.n_w = 3;
    KVF_TRY(f->be->ops->matmul(f->be, &a, err));
    if (n_q == n || n_q == 0) return KVF_OK;
    return project(f, f->h + (n - n_q) * hp->n_embd, &y->q, y->q_bias, f->q, n_q, false, err);
}

/* x += post_norm(y): with a post-norm the product goes to h first. */
static kvf_status project_residual(kvf_forward *f, const float *in, const kvf_weight *w, const float *bias,
                                   const float *post_norm, float *x, int64_t n, kvf_error *err)
{
    if (!post_norm) return project(f, in, w, bias, x, n, true, err);
    int64_t width = f->m->hp.n_embd;
    KVF_TRY(project(f, in, w, bias, f->h, n, false, err));
    KVF_TRY(norm(f, f->h, post_norm, f->h, n, width, err));
    return f->be->ops->add(f->be, x, f->h, n * width, err);
}

/* What attention of a layer needs beside the activations. */
typedef struct layer_call {
    kvf_kv *kv;
    kvf_policy *policy;
    int32_t l, kv_l; /* layer of the model; of kv */
    int64_t n, n_q;  /* tokens of the chunk; the last n_q of them go on */
    bool reading, evict;
    float *mass;
    int64_t n_mass;
    bool mass_peak, mass_unread;
} layer_call;

/* Queries of the last n_q tokens, rotated at their places and, for far keys, at the memory's distance. */
static kvf_status rotate_queries(kvf_forward *f, const layer_call *c, bool sliding, kvf_error *err)
{
    const kvf_hparams *hp = &f->m->hp;
    if (f->far > 0 && !sliding) {
        size_t bytes = (size_t)(c->n_q * hp->n_head * hp->head_dim) * sizeof(float);
        KVF_TRY(f->be->ops->copy(f->be, f->q_far, f->q, bytes, err));
        KVF_TRY(rotate(f, f->q_far, hp->n_head, c->n_q, f->rope[2], err));
    }
    return rotate(f, f->q, hp->n_head, c->n_q, f->rope[sliding] + (c->n - c->n_q) * hp->n_rot, err);
}

/* Attention half of a layer over the chunk's n tokens; the residual of the last n_q is updated. */
static kvf_status attention(kvf_forward *f, const layer_call *c, kvf_error *err)
{
    const kvf_hparams *hp = &f->m->hp;
    const kvf_layer *y = &f->m->layers[c->l];
    int64_t n = c->n, n_q = c->n_q;
    bool sliding = kvf_layer_is_sliding(hp, c->l);
    KVF_TRY(norm(f, f->x, y->attn_norm, f->h, n, hp->n_embd, err));
    KVF_TRY(project_qkv(f, y, n, n_q, err));
    if (y->q_norm && n_q > 0) KVF_TRY(norm(f, f->q, y->q_norm, f->q, n_q * hp->n_head, hp->head_dim, err));
    if (y->k_norm) KVF_TRY(norm(f, f->k, y->k_norm, f->k, n * hp->n_head_kv, hp->head_dim, err));
    if (f->far == 0) KVF_TRY(rotate(f, f->k, hp->n_head_kv, n, f->rope[sliding], err));
    KVF_TRY(kvf_kv_put(c->kv, c->kv_l, f->k, f->v, n, err));
    if (n_q == 0) return KVF_OK;
    KVF_TRY(rotate_queries(f, c, sliding, err));
    kvf_kv_attend_args a = { .layer = c->kv_l, .policy = c->policy, .q = f->q, .q_far = f->q_far, .o = f->o,
                             .n_tok = n, .n_q = n_q, .scale = hp->attn_scale, .softcap = hp->attn_softcap,
                             .window = sliding ? hp->window : 0, .reading = c->reading, .mass = c->mass,
                             .n_mass = c->n_mass, .mass_peak = c->mass_peak, .mass_unread = c->mass_unread,
                             .evict = c->evict };
    KVF_TRY(kvf_kv_attend(c->kv, &a, err));
    return project_residual(f, f->o, &y->o, y->o_bias, y->post_attn_norm, f->x + (n - n_q) * hp->n_embd, n_q, err);
}

/* FFN half of layer l for the last n_q of n tokens. */
static kvf_status feed_forward(kvf_forward *f, int32_t l, int64_t n, int64_t n_q, kvf_error *err)
{
    const kvf_hparams *hp = &f->m->hp;
    const kvf_layer *y = &f->m->layers[l];
    float *x = f->x + (n - n_q) * hp->n_embd;
    KVF_TRY(norm(f, x, y->ffn_norm, f->h, n_q, hp->n_embd, err));
    kvf_matmul_glu_args g = { .x = f->h, .n_tok = n_q, .gate = &y->gate, .up = &y->up, .y = f->ff, .act = hp->act };
    KVF_TRY(f->be->ops->matmul_glu(f->be, &g, err));
    return project_residual(f, f->ff, &y->down, NULL, y->post_ffn_norm, x, n_q, err);
}

/* RoPE angles of n tokens at f->pos. */
static kvf_status make_angles(kvf_forward *f, int64_t n, kvf_error *err)
{
    const kvf_hparams *hp = &f->m->hp;
    for (int i = 0; i < (hp->window > 0 ? 2 : 1); i++) {
        kvf_rope_table_args r = { .pos = f->pos, .inv_freq = f->m->inv_freq[i], .n_tok = n, .n_rot = hp->n_rot,
                                  .mscale = i == 0 ? hp->rope_mscale : 1, .cos_sin = f->rope[i] };
        KVF_TRY(f->be->ops->rope_table(f->be, &r, err));
    }
    return KVF_OK;
}

/* Angles of the queries for far keys; f->pos is used up. */
static kvf_status make_far_angles(kvf_forward *f, int64_t n, kvf_error *err)
{
    const kvf_hparams *hp = &f->m->hp;
    if (f->far == 0) return KVF_OK;
    for (int64_t i = 0; i < n; i++) f->pos[i] = (int32_t)f->far;
    kvf_rope_table_args r = { .pos = f->pos, .inv_freq = f->m->inv_freq[0], .n_tok = n, .n_rot = hp->n_rot,
                              .mscale = hp->rope_mscale * hp->rope_mscale, /* raw keys carry no YaRN factor */
                              .cos_sin = f->rope[2] };
    return f->be->ops->rope_table(f->be, &r, err);
}

static kvf_status embed(kvf_forward *f, const kvf_token *tokens, const float *const *embd, int64_t n, kvf_error *err)
{
    int64_t width = f->m->hp.n_embd;
    for (int64_t i = 0; embd && i < n; i++) f->ids[i] = embd[i] ? 0 : tokens[i];
    kvf_embed_args e = { .table = &f->m->embed, .tokens = embd ? f->ids : tokens, .n_tok = n, .scale = f->m->hp.embed_scale,
                         .out = f->x };
    KVF_TRY(f->be->ops->embed(f->be, &e, err));
    for (int64_t i = 0; embd && i < n; i++)
        if (embd[i]) KVF_TRY(f->be->ops->upload(f->be, f->x + i * width, embd[i], (size_t)width * sizeof(float), err));
    return KVF_OK;
}

/* Token embeddings and the chunk's RoPE angles. */
static kvf_status begin(kvf_forward *f, const kvf_chunk *c, int64_t n_past, kvf_error *err)
{
    for (int64_t i = 0; i < c->n_tok; i++) f->pos[i] = (int32_t)(n_past + i);
    KVF_TRY(make_angles(f, c->n_tok, err));
    KVF_TRY(make_far_angles(f, c->n_tok, err));
    return embed(f, c->tokens, c->embd, c->n_tok, err);
}

static kvf_status run_layers(kvf_forward *f, kvf_kv *kv, kvf_policy *policy, const kvf_chunk *c, kvf_error *err)
{
    int64_t n = c->n_tok;
    KVF_TRY(kvf_kv_reserve(kv, n, err));
    KVF_TRY(begin(f, c, kvf_kv_len(kv), err));
    int32_t last = f->m->hp.n_layer - 1;
    for (int32_t l = 0; l <= last; l++) {
        int64_t n_q = l < last ? n : c->n_out;
        layer_call a = { .kv = kv, .policy = policy, .l = l, .kv_l = l, .n = n, .n_q = n_q, .reading = c->reading,
                         .evict = c->evict };
        KVF_TRY(attention(f, &a, err));
        if (n_q > 0) KVF_TRY(feed_forward(f, l, n, n_q, err));
    }
    return KVF_OK;
}

/* The wanted rows to the front of x, where logits() finds them. */
static kvf_status keep_rows(kvf_forward *f, int64_t n, int64_t n_out, kvf_error *err)
{
    int64_t width = f->m->hp.n_embd;
    for (int64_t i = 0; n_out < n && i < n_out; i++)
        KVF_TRY(f->be->ops->copy(f->be, f->x + i * width, f->x + (n - n_out + i) * width, (size_t)width * sizeof(float), err));
    f->n_out = n_out;
    return KVF_OK;
}

kvf_status kvf_forward_run(kvf_forward *f, kvf_kv *kv, kvf_policy *policy, const kvf_chunk *c, kvf_error *err)
{
    if (c->n_tok < 1 || c->n_tok > f->n_batch || c->n_out < 0 || c->n_out > c->n_tok)
        return kvf_fail(err, KVF_ERR_INTERNAL, "a chunk of %lld tokens in a batch of %lld", (long long)c->n_tok,
                        (long long)f->n_batch);
    int64_t n_past = kvf_kv_len(kv), n = c->n_tok;
    if (n_past + n > INT32_MAX)
        return kvf_fail(err, KVF_ERR_LIMIT, "positions end at %d tokens; shorten the text", INT32_MAX);
    KVF_TRY(grow_buffers(f, n, err));
    f->n_out = 0;
    kvf_status rc = run_layers(f, kv, policy, c, err);
    if (rc >= 0) rc = kvf_kv_commit(kv, n, err);
    if (rc >= 0 && c->evict) rc = kvf_kv_evict(kv, policy, err);
    if (rc < 0) {
        kvf_kv_truncate(kv, n_past); /* give back what was reserved */
        return rc;
    }
    return keep_rows(f, n, c->n_out, err);
}

static kvf_status run_part(kvf_forward *f, const kvf_part *p, kvf_error *err)
{
    int64_t n = p->n_tok, width = f->m->hp.n_embd;
    size_t row_bytes = (size_t)width * sizeof(float);
    int32_t end = f->m->hp.n_layer;
    KVF_TRY(kvf_kv_reserve(p->kv, n, err));
    memcpy(f->pos, p->pos, (size_t)n * sizeof *f->pos);
    KVF_TRY(make_angles(f, n, err));
    KVF_TRY(make_far_angles(f, n, err));
    if (p->layer0 == 0) KVF_TRY(embed(f, p->tokens, p->embd, n, err));
    for (int64_t i = 0; p->layer0 > 0 && i < n; i++)
        KVF_TRY(f->be->ops->upload(f->be, f->x + i * width, p->row[i], row_bytes, err));
    for (int32_t l = p->layer0; l < p->layer1; l++) {
        int64_t n_q = l < end - 1 ? n : p->n_out;
        layer_call a = { .kv = p->kv, .policy = p->policy, .l = l, .kv_l = l - p->layer0, .n = n, .n_q = n_q };
        if (p->mass && l >= p->mass_layer && !kvf_layer_is_sliding(&f->m->hp, l)) {
            a.mass = p->mass;
            a.n_mass = p->n_mass;
            a.mass_peak = p->mass_peak;
            a.mass_unread = p->mass_unread;
        }
        KVF_TRY(attention(f, &a, err));
        if (n_q > 0) KVF_TRY(feed_forward(f, l, n, n_q, err));
    }
    KVF_TRY(kvf_kv_commit(p->kv, n, err));
    for (int64_t i = 0; p->layer1 < end && i < n; i++)
        KVF_TRY(f->be->ops->download(f->be, p->row[i], f->x + i * width, row_bytes, err));
    return KVF_OK;
}

kvf_status kvf_forward_part(kvf_forward *f, const kvf_part *p, kvf_error *err)
{
    int64_t n_past = kvf_kv_len(p->kv);
    if (p->n_tok < 1 || p->n_tok > f->n_batch || p->n_out < 0 || p->n_out > p->n_tok)
        return kvf_fail(err, KVF_ERR_INTERNAL, "a part of %lld tokens in a batch of %lld", (long long)p->n_tok,
                        (long long)f->n_batch);
    KVF_TRY(grow_buffers(f, p->n_tok, err));
    f->n_out = 0;
    kvf_status rc = run_part(f, p, err);
    if (rc < 0) {
        kvf_kv_truncate(p->kv, n_past);
        return rc;
    }
    return p->layer1 == f->m->hp.n_layer ? keep_rows(f, p->n_tok, p->n_out, err) : KVF_OK;
}

kvf_status kvf_forward_logits(kvf_forward *f, int64_t first, int64_t n, float *logits, kvf_error *err)
{
    const kvf_hparams *hp = &f->m->hp;
    if (first < 0 || n < 1 || first + n > f->n_out)
        return kvf_fail(err, KVF_ERR_INTERNAL, "logits %lld..%lld of %lld", (long long)first, (long long)(first + n),
                        (long long)f->n_out);
    if (n > f->logits_cap) {
        if (f->logits) f->be->ops->release(f->be, f->logits);
        f->logits = NULL;
        f->logits_cap = 0;
        size_t elements;
        if (!kvf_mul_size((size_t)n, (size_t)hp->n_vocab, &elements)) elements = SIZE_MAX / 8;
        void *block;
        KVF_TRY(f->be->ops->alloc(f->be, &block, elements * sizeof(float), err));
        f->logits = block;
        f->logits_cap = n;
    }
    KVF_TRY(norm(f, f->x + first * hp->n_embd, f->m->output_norm, f->h, n, hp->n_embd, err));
    KVF_TRY(project(f, f->h, &f->m->output, NULL, f->logits, n, false, err));
    KVF_TRY(f->be->ops->download(f->be, logits, f->logits, (size_t)n * (size_t)hp->n_vocab * sizeof(float), err));
    for (int64_t i = 0; hp->final_softcap > 0 && i < n * hp->n_vocab; i++)
        logits[i] = hp->final_softcap * tanhf(logits[i] / hp->final_softcap);
    return KVF_OK;
}
