/* encode.c - frames through the tower: patches, layers, scores, projector, pooling.
 *
 * Frames are taken a few at a time so that a weight matrix is unpacked once for all their patches; they
 * meet only there, attention stays within a frame. Between two such parts the turn on the backend is given
 * up, so that a session next to it goes on answering.
 *
 * On a device the same ops run on its arrays; what differs is in encode_device.c.
 *
 * Attention: on AMX the engine's own op, with keys and values as f16 and all keys visible to all queries;
 * below it, and for the layer whose scores are asked for, the f32 kernels of vit_ops.h.
 *
 * Source: Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1, eq. 1-4 (the ViT); Shao et al. 2025,
 * arXiv:2505.21334, section 3.3 (scores: attention received in the last layer, mean over heads and queries).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "vision/encode_int.h"

typedef kvf_vision_call run;

/* ---- Memory ------------------------------------------------------------------------------- */

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static void *take(uint8_t *base, size_t *used, int64_t n, size_t size)
{
    uint8_t *p = base ? base + *used : NULL;
    *used += ((size_t)n * size + 63u) & ~(size_t)63u;
    return p;
}

/* Rows of the feed-forward's middle at once: what the backend unpacks a weight for, in equal runs. It is
 * several times as wide as x, and written, activated and read again while it is in a cache. */
static int64_t ff_rows(const kvf_vision *v, int64_t n)
{
    int64_t most_rows = v->env.backend->ops->batch_hint(v->env.backend), runs = (n + most_rows - 1) / most_rows;
    return (n + runs - 1) / runs;
}

/* Place the arrays of the backend's memory for n frames; with base NULL only the size counts. Sizes cannot overflow:
 * the file's shape is bounded (hparams.c) and n by 1024. */
static size_t place(run *r, const kvf_vision *v, int64_t n, bool proj, uint8_t *base)
{
    const kvf_vision_hparams *hp = &v->hp;
    int64_t rows = n * hp->n_pos, patches = n * hp->n_patch, pixels = 3 * (int64_t)hp->patch_size * hp->patch_size;
    size_t used = 0, f = sizeof(float);
    r->x = take(base, &used, rows * hp->width, f);
    r->h = take(base, &used, rows * hp->width, f);
    r->q = take(base, &used, rows * hp->width, f);
    r->k = take(base, &used, rows * hp->width, f);
    r->val = take(base, &used, rows * hp->width, f);
    r->wide = take(base, &used, most(ff_rows(v, rows) * hp->n_ff, patches * most(pixels, hp->n_mid)), f);
    r->proj = take(base, &used, proj ? patches * hp->n_out : 0, f);
    r->slots = take(base, &used, kvf_vision_slots(v), kvf_vision_slot_bytes(v));
    r->lse = take(base, &used, v->on_device ? (int64_t)hp->n_pos * hp->n_head : 0, f);
    return used;
}

/* And those of the host's. */
static size_t place_host(run *r, const kvf_vision *v, int64_t n, uint8_t *base)
{
    const kvf_vision_hparams *hp = &v->hp;
    int64_t patches = n * hp->n_patch, pixels = 3 * (int64_t)hp->patch_size * hp->patch_size;
    int64_t staging = most(patches * most(pixels, hp->n_out), kvf_vision_slots(v) * KVF_BLOCK);
    size_t used = 0;
    r->mass = take(base, &used, n * hp->n_pos, sizeof(float));
    r->slot_list = take(base, &used, kvf_vision_slots(v), sizeof(int32_t));
    r->staging = take(base, &used, v->on_device ? staging : 0, sizeof(float));
    return used;
}

size_t kvf_vision_work_bytes(const kvf_vision *v, int64_t batch)
{
    run r;
    return place(&r, v, batch, true, NULL) + place_host(&r, v, batch, NULL);
}

static kvf_status take_memory(run *r, int64_t n, bool pooled)
{
    kvf_vision *v = r->v;
    kvf_backend *b = v->env.backend;
    bool proj = pooled || v->on_device;
    size_t host = place_host(r, v, n, NULL), rest = place(r, v, n, proj, NULL), here = host + (v->on_device ? 0 : rest);
    r->block = kvf_alloc_raw(v->env.mem, here, 1);
    if (!r->block)
        return kvf_fail(r->err, KVF_ERR_NOMEM, "out of memory: %zu bytes refused; set kvf_vision_params.batch to fewer frames than %lld",
                        here, (long long)n);
    place_host(r, v, n, r->block);
    uint8_t *base = r->block + host;
    if (v->on_device) {
        void *block;
        kvf_turn_take(&b->run);
        kvf_status rc = b->ops->alloc(b, &block, rest, r->err);
        kvf_turn_give(&b->run);
        KVF_TRY(rc);
        base = r->dev_block = block;
    }
    place(r, v, n, proj, base);
    for (int64_t i = 0; i < kvf_vision_slots(v); i++) r->slot_list[i] = (int32_t)i;
    return KVF_OK;
}

static void give_memory(run *r)
{
    kvf_backend *b = r->v->env.backend;
    if (r->dev_block) {
        kvf_turn_take(&b->run);
        b->ops->release(b, r->dev_block);
        kvf_turn_give(&b->run);
    }
    kvf_free(r->v->env.mem, r->block);
}

/* ---- Parallel loops ----------------------------------------------------------------------- */

typedef struct rows_task {
    const kvf_vision *v;
    const float *in, *weight, *bias;
    float *out;
    int64_t n_row, each, width;
    kvf_vit_act act;
    int32_t pool;
} rows_task;

static int64_t rows_end(const rows_task *t, int64_t part)
{
    return (part + 1) * t->each < t->n_row ? (part + 1) * t->each : t->n_row;
}

static void for_rows(rows_task *t, kvf_task_fn fn)
{
    kvf_threads_run(t->v->env.threads, (t->n_row + t->each - 1) / t->each, fn, t);
}

static void norm_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    for (int64_t i = part * t->each; i < rows_end(t, part); i++)
        t->v->ops->layernorm(t->in + i * t->width, t->weight, t->bias, t->out + i * t->width, t->width, t->v->hp.eps);
}

static kvf_status norm(run *r, const float *in, const float *weight, const float *bias, float *out, int64_t n_row)
{
    kvf_vision *v = r->v;
    kvf_backend *b = v->env.backend;
    kvf_layernorm_args a = { .x = in, .weight = weight, .bias = bias, .out = out, .n_row = n_row, .width = v->hp.width, .eps = v->hp.eps };
    if (v->on_device) return b->ops->layernorm(b, &a, r->err);
    rows_task t = { .v = v, .in = in, .weight = weight, .bias = bias, .out = out, .n_row = n_row, .each = 16, .width = v->hp.width };
    for_rows(&t, norm_part);
    return KVF_OK;
}

static void act_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    int64_t at = part * t->each;
    t->v->ops->act(t->out + at, rows_end(t, part) - at, t->act);
}

static kvf_status activate(run *r, float *x, int64_t n, kvf_vit_act act)
{
    static const kvf_act of[] = { [KVF_VIT_GELU_TANH] = KVF_ACT_GELU_TANH, [KVF_VIT_GELU_QUICK] = KVF_ACT_GELU_QUICK,
                                  [KVF_VIT_GELU_ERF] = KVF_ACT_GELU_ERF, [KVF_VIT_SILU] = KVF_ACT_SILU };
    kvf_vision *v = r->v;
    kvf_backend *b = v->env.backend;
    if (v->on_device) return b->ops->act(b, x, n, of[act], r->err);
    rows_task t = { .v = v, .out = x, .n_row = n, .each = 16384, .act = act };
    for_rows(&t, act_part);
    return KVF_OK;
}

static kvf_status matmul(run *r, const kvf_matmul_args *a)
{
    double start = kvf_vision_now_ms();
    kvf_backend *b = r->v->env.backend;
    kvf_status rc = b->ops->matmul(b, a, r->err);
    r->t.matmul_ms += kvf_vision_now_ms() - start;
    return rc;
}

/* ---- Patches ------------------------------------------------------------------------------ */

/* A row of patches: their pixels in the order of the kernel's columns (channel, row, column). */
static void pixels_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    const kvf_vision_hparams *hp = &t->v->hp;
    int64_t p = hp->patch_size, s = hp->image_size, g = hp->grid, frame = part / g, row = part % g;
    float *out = t->out + part * g * t->width;
    for (int64_t col = 0; col < g; col++)
        for (int64_t c = 0; c < 3; c++)
            for (int64_t y = 0; y < p; y++, out += p)
                memcpy(out, t->in + ((frame * 3 + c) * s + row * p + y) * s + col * p, (size_t)p * sizeof *out);
}

/* x = patches (class token first) + positions. */
static void positions_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    const kvf_vision_hparams *hp = &t->v->hp;
    int64_t w = hp->width, skip = hp->has_class ? 1 : 0;
    for (int64_t i = part * t->each; i < rows_end(t, part); i++) {
        int64_t frame = i / hp->n_pos, at = i % hp->n_pos;
        const float *in = at < skip ? t->v->class_embd : t->in + (frame * hp->n_patch + at - skip) * w;
        for (int64_t c = 0; c < w; c++) t->out[i * w + c] = in[c] + t->v->pos[at * w + c];
    }
}

static kvf_status embed_patches(run *r)
{
    kvf_vision *v = r->v;
    const kvf_vision_hparams *hp = &v->hp;
    int64_t s = hp->image_size, n_in = 3 * (int64_t)hp->patch_size * hp->patch_size;
    rows_task cut = { .v = v, .in = r->b->pixels + r->frame * 3 * s * s, .out = v->on_device ? r->staging : r->wide, .n_row = r->n * hp->grid, .each = 1,
                      .width = n_in };
    for_rows(&cut, pixels_part);
    if (v->on_device) KVF_TRY(kvf_vision_send(r, r->wide, r->staging, r->n * hp->n_patch * n_in));
    kvf_matmul_args m = { .x = r->wide, .n_tok = r->n * hp->n_patch, .n_w = 1, .w = { &v->patch }, .bias = { v->patch_b }, .y = { r->q } };
    KVF_TRY(matmul(r, &m));
    rows_task add = { .v = v, .in = r->q, .out = r->x, .n_row = r->n * hp->n_pos, .each = 16 };
    if (v->on_device)
        KVF_TRY(kvf_vision_dev_positions(r));
    else
        for_rows(&add, positions_part);
    return v->pre_w ? norm(r, r->x, v->pre_w, v->pre_b, r->x, add.n_row) : KVF_OK;
}

/* ---- Layers ------------------------------------------------------------------------------- */

kvf_status kvf_vision_attend_frame(run *r, int64_t frame, float *lse)
{
    kvf_vision *v = r->v;
    const kvf_vision_hparams *hp = &v->hp;
    kvf_backend *b = v->env.backend;
    int64_t at = frame * hp->n_pos * hp->width;
    void *slab[1] = { r->slots };
    kvf_kv_view view = { .slab = slab, .shift = 30, .slot_bytes = kvf_vision_slot_bytes(v) };
    kvf_kv_put_args put = { .k = r->k + at, .v = r->val + at, .n_tok = hp->n_pos, .n_head_kv = hp->n_head, .head_dim = hp->head_dim,
                            .kv = &view, .slots = r->slot_list };
    KVF_TRY(b->ops->kv_put(b, &put, r->err));
    kvf_attn_args a = { .q = r->q + at, .o = r->h + at, .lse = lse, .n_tok = hp->n_pos, .n_head = hp->n_head, .n_head_kv = hp->n_head,
                        .head_dim = hp->head_dim, .scale = 1 / sqrtf((float)hp->head_dim), .kv = &view,
                        .slots = r->slot_list, .n_key = hp->n_pos, .q_first = hp->n_pos };
    return b->ops->attn(b, &a, r->err);
}

static kvf_status attend(run *r, bool scores)
{
    kvf_vision *v = r->v;
    const kvf_vision_hparams *hp = &v->hp;
    double start = kvf_vision_now_ms();
    kvf_status rc = KVF_OK;
    if (v->on_device) {
        rc = kvf_vision_dev_attend(r, scores);
    } else if (v->env.level >= KVF_CPU_LEVEL_AMX && !scores) {
        for (int64_t f = 0; f < r->n && rc >= 0; f++) rc = kvf_vision_attend_frame(r, f, NULL);
    } else {
        kvf_vit_attn_args a = { .q = r->q, .k = r->k, .v = r->val, .o = r->h, .mass = scores ? r->mass : NULL, .n_frame = r->n,
                                .n_pos = hp->n_pos, .n_head = hp->n_head, .head_dim = hp->head_dim,
                                .scale = 1 / sqrtf((float)hp->head_dim) };
        rc = kvf_vit_attn(v->ops, v->env.threads, v->env.mem, &a, r->err);
    }
    double *ms = scores ? &r->t.scores_ms : &r->t.attn_ms;
    *ms += kvf_vision_now_ms() - start;
    return rc;
}

static kvf_status feed_forward(run *r, const kvf_vision_layer *y, int64_t n_row)
{
    kvf_vision *v = r->v;
    int64_t each = ff_rows(v, n_row), w = v->hp.width;
    for (int64_t row = 0; row < n_row; row += each) {
        int64_t n = n_row - row < each ? n_row - row : each;
        kvf_matmul_args up = { .x = r->h + row * w, .n_tok = n, .n_w = 1, .w = { &y->up }, .bias = { y->up_b }, .y = { r->wide } };
        KVF_TRY(matmul(r, &up));
        KVF_TRY(activate(r, r->wide, n * v->hp.n_ff, v->hp.act));
        kvf_matmul_args down = { .x = r->wide, .n_tok = n, .n_w = 1, .w = { &y->down }, .bias = { y->down_b },
                                 .y = { r->x + row * w }, .accumulate = true };
        KVF_TRY(matmul(r, &down));
    }
    return KVF_OK;
}

static kvf_status layer(run *r, const kvf_vision_layer *y, bool scores)
{
    kvf_vision *v = r->v;
    int64_t n = r->n * v->hp.n_pos;
    KVF_TRY(norm(r, r->x, y->ln1_w, y->ln1_b, r->h, n));
    kvf_matmul_args qkv = { .x = r->h, .n_tok = n, .n_w = 3, .w = { &y->q, &y->k, &y->v }, .bias = { y->q_b, y->k_b, y->v_b },
                            .y = { r->q, r->k, r->val } };
    KVF_TRY(matmul(r, &qkv));
    KVF_TRY(attend(r, scores));
    kvf_matmul_args out = { .x = r->h, .n_tok = n, .n_w = 1, .w = { &y->o }, .bias = { y->o_b }, .y = { r->x }, .accumulate = true };
    KVF_TRY(matmul(r, &out));
    KVF_TRY(norm(r, r->x, y->ln2_w, y->ln2_b, r->h, n));
    return feed_forward(r, y, n);
}

static kvf_status check_cancel(run *r)
{
    bool stop = atomic_exchange(&r->v->cancel, 0) != 0;
    if (!stop && r->b->progress && r->done > 0) stop = r->b->progress(r->b->user, r->done, r->total) != 0;
    if (!stop) return KVF_OK;
    return kvf_fail(r->err, KVF_ERR_CANCELLED, "cancelled after %lld of %lld layers", (long long)r->done, (long long)r->total);
}

/* ---- Outputs ------------------------------------------------------------------------------ */

static bool finite(const float *x, int64_t n)
{
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= !(fabsf(x[i]) < INFINITY);
    return bad == 0;
}

static kvf_status check_output(const float *x, int64_t n, kvf_error *err)
{
    if (finite(x, n)) return KVF_OK;
    return kvf_fail(err, KVF_ERR_FORMAT, "the tower's output is not finite: its weights overflow; the file is damaged, or needs a ctx with KVF_PRECISION_F32");
}

static void scores_out(const run *r)
{
    const kvf_vision_hparams *hp = &r->v->hp;
    int32_t side = kvf_vision_pool_side(r->b->pool, hp->grid);
    int64_t skip = hp->has_class ? 1 : 0;
    float share = 1.0f / ((float)hp->n_head * (float)hp->n_pos);
    for (int64_t f = 0; f < r->n; f++) {
        float *from = r->mass + f * hp->n_pos + skip;
        for (int64_t i = 0; i < hp->n_patch; i++) from[i] *= share;
        if (r->b->patch_scores)
            memcpy(r->b->patch_scores + (r->frame + f) * hp->n_patch, from, (size_t)hp->n_patch * sizeof *from);
        if (!r->b->scores) continue;
        float *out = r->b->scores + (r->frame + f) * side * side;
        if (r->b->pool == KVF_VISION_POOL_NONE) memcpy(out, from, (size_t)hp->n_patch * sizeof *from);
        else kvf_vision_pool_grid(r->b->pool, from, hp->grid, 1, out);
    }
}

static void pool_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    int64_t n_patch = t->v->hp.n_patch, side = kvf_vision_pool_side(t->pool, t->v->hp.grid);
    kvf_vision_pool_grid(t->pool, t->in + part * n_patch * t->width, t->v->hp.grid, t->width, t->out + part * side * side * t->width);
}

/* Patches [n][n_patch][width] without the class token, read by the projector. */
static const float *patches_of(const run *r)
{
    const kvf_vision_hparams *hp = &r->v->hp;
    int64_t row = hp->width, frame = (int64_t)hp->n_patch * row;
    if (!hp->has_class) return r->x;
    for (int64_t f = 0; f < r->n; f++)
        memcpy(r->h + f * frame, r->x + (f * hp->n_pos + 1) * row, (size_t)frame * sizeof(float));
    return r->h;
}

static kvf_status project(run *r, const float *patches)
{
    kvf_vision *v = r->v;
    const kvf_vision_hparams *hp = &v->hp;
    int64_t n = r->n * hp->n_patch, side = kvf_vision_pool_side(r->b->pool, hp->grid);
    bool pooled = r->b->pool != KVF_VISION_POOL_NONE;
    double start = kvf_vision_now_ms();
    float *embd = r->b->embd + r->frame * side * side * hp->n_out, *full = pooled || v->on_device ? r->proj : embd;
    kvf_matmul_args first = { .x = patches, .n_tok = n, .n_w = 1, .w = { &v->mm0 }, .bias = { v->mm0_b }, .y = { v->mm2.data ? r->wide : full } };
    KVF_TRY(matmul(r, &first));
    if (v->mm2.data) {
        KVF_TRY(activate(r, r->wide, n * hp->n_mid, hp->projector_act));
        kvf_matmul_args second = { .x = r->wide, .n_tok = n, .n_w = 1, .w = { &v->mm2 }, .bias = { v->mm2_b }, .y = { full } };
        KVF_TRY(matmul(r, &second));
    }
    if (v->on_device) {
        float *host = pooled ? r->staging : embd;
        KVF_TRY(kvf_vision_fetch(r, host, full, n * hp->n_out));
        full = host;
    }
    if (pooled) {
        rows_task t = { .v = v, .in = full, .out = embd, .n_row = r->n, .each = 1, .width = hp->n_out, .pool = r->b->pool };
        for_rows(&t, pool_part);
    }
    r->t.project_ms += kvf_vision_now_ms() - start;
    return check_output(embd, r->n * side * side * hp->n_out, r->err);
}

/* ---- A call ------------------------------------------------------------------------------- */

static kvf_status run_part(run *r)
{
    kvf_vision *v = r->v;
    const kvf_vision_hparams *hp = &v->hp;
    bool scores = r->b->scores || r->b->patch_scores;
    KVF_TRY(embed_patches(r));
    for (int32_t i = 0; i < hp->feature_layer; i++) {
        KVF_TRY(layer(r, &v->layers[i], scores && i == hp->feature_layer - 1));
        r->done++;
        KVF_TRY(check_cancel(r));
    }
    if (scores) {
        KVF_TRY(check_output(r->mass, r->n * hp->n_pos, r->err));
        scores_out(r);
    }
    if (!r->b->embd && !r->b->features) return KVF_OK;
    if (v->post_w) KVF_TRY(norm(r, r->x, v->post_w, v->post_b, r->x, r->n * hp->n_pos));
    const float *patches;
    if (v->on_device)
        KVF_TRY(kvf_vision_dev_patches(r, &patches));
    else
        patches = patches_of(r);
    int64_t n = r->n * hp->n_patch * hp->width;
    if (r->b->features) {
        float *out = r->b->features + r->frame * hp->n_patch * hp->width;
        if (v->on_device)
            KVF_TRY(kvf_vision_fetch(r, out, patches, n));
        else
            memcpy(out, patches, (size_t)n * sizeof(float));
        KVF_TRY(check_output(out, n, r->err));
    }
    return r->b->embd ? project(r, patches) : KVF_OK;
}

static kvf_status check_pixels(const kvf_vision *v, const kvf_vision_batch *b, kvf_error *err)
{
    int64_t n = 3 * (int64_t)v->hp.image_size * v->hp.image_size;
    for (int64_t f = 0; f < b->n; f++) {
        if (!finite(b->pixels + f * n, n))
            return kvf_fail(err, KVF_ERR_ARG, "frame %lld of the batch holds a pixel that is not finite", (long long)f);
    }
    return KVF_OK;
}

static void add_stats(run *r, int64_t n, double ms)
{
    kvf_vision_stats *s = &r->v->stats;
    pthread_mutex_lock(&r->v->lock);
    s->n_frames += n;
    s->encode_ms += ms;
    s->matmul_ms += r->t.matmul_ms;
    s->attn_ms += r->t.attn_ms;
    s->scores_ms += r->t.scores_ms;
    s->project_ms += r->t.project_ms;
    pthread_mutex_unlock(&r->v->lock);
}

kvf_status kvf_vision_run(kvf_vision *v, const kvf_vision_batch *b, kvf_error *err)
{
    int64_t step = v->hp.batch < b->n ? v->hp.batch : b->n, n_part = (b->n + step - 1) / step;
    double start = kvf_vision_now_ms();
    run r = { .v = v, .b = b, .err = err, .total = n_part * v->hp.feature_layer };
    KVF_TRY(check_pixels(v, b, err));
    KVF_TRY(check_cancel(&r));
    bool pooled = b->embd && b->pool != KVF_VISION_POOL_NONE;
    kvf_status rc = take_memory(&r, step, pooled);
    for (; r.frame < b->n && rc >= 0; r.frame += r.n) {
        r.n = b->n - r.frame < step ? b->n - r.frame : step;
        kvf_turn_take(&v->env.backend->run);
        rc = run_part(&r);
        kvf_turn_give(&v->env.backend->run);
    }
    give_memory(&r);
    add_stats(&r, rc >= 0 ? b->n : 0, kvf_vision_now_ms() - start);
    return rc;
}
