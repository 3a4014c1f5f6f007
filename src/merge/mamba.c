/* mamba.c - STORM's temporal layers: x + mixer(LayerNorm(x)) over all tokens of a video, one long sequence.
 *
 * Gu and Dao 2023, Mamba, arXiv:2312.00752, alg. 2, per direction; Jiang et al. 2025, STORM,
 * arXiv:2503.04130, sec. 3.2 scans both ways. STORM does not say how the two are combined: here they share
 * the projections in and out, and are summed before the gate, as in Zhu et al. 2024, Vision Mamba,
 * arXiv:2401.09417.
 *
 *     x, z = in_proj norm(tokens);  u = silu(conv x);  dt, B, C = x_proj u;  dt = softplus(dt_w dt + dt_b)
 *     h = exp(dt A) h + dt B u;  y = C h + D u;  out = out_proj (y silu(z))
 *
 * The sequence is walked in chunks of 64 tokens, so that only x, z and y are held for all of it. One
 * direction carries its state (the last d_conv - 1 inputs, h) over chunks and, without a backward branch,
 * over calls.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/mamba.h"

#include <math.h>
#include <string.h>

#include "merge/tile.h"

enum { CHUNK = 64, SCAN_CHANNELS = 64, MAX_SIDE = 1 << 20 };

/* State of one direction of one layer. */
typedef struct branch_state {
    float *conv; /* [d_conv - 1][E], oldest first */
    float *h;    /* [S][E] */
} branch_state;

struct kvf_mamba {
    kvf_merge_env env;
    kvf_mamba_params p;
    kvf_mamba_layer *layer; /* [n_layer] */
    bool backward;
    branch_state *state; /* [n_layer] forward, where calls carry on; else zeroed room takes its place */
    float **a;           /* [2 n_layer][S][E] = -exp(a_log), transposed; NULL where there is no branch */
    float *memory;       /* what the states point into */
    float *weights;      /* owned; NULL: the caller's */
};

void kvf_mamba_params_init(kvf_mamba_params *p)
{
    memset(p, 0, sizeof *p);
    p->size = sizeof *p;
    p->d_conv = 4;
    p->norm_eps = 1e-5f;
}

/* ---- Opening --------------------------------------------------------------------------------- */

static bool branch_whole(const kvf_mamba_branch *b)
{
    return b->conv_w && b->x_proj && b->dt_w && b->dt_b && b->a_log && b->d;
}

static kvf_status check(const kvf_mamba_params *p, kvf_error *err)
{
    KVF_TRY(kvf_merge_check_size(p->size, sizeof *p, "kvf_mamba_params", err));
    if (!p->layers || p->n_layer < 1 || p->n_layer > 1024)
        return kvf_fail(err, KVF_ERR_ARG, "layers must be 1 to 1024 layers; n_layer is %lld",
                        (long long)p->n_layer);
    if (p->d_model < 1 || p->d_model > MAX_SIDE || p->d_inner < 1 || p->d_inner > MAX_SIDE ||
        p->d_state < 1 || p->d_state > 256 || p->dt_rank < 1 || p->dt_rank > MAX_SIDE || p->d_conv < 1 ||
        p->d_conv > 16)
        return kvf_fail(err, KVF_ERR_ARG,
                        "d_model %d, d_inner %d, d_state %d, dt_rank %d, d_conv %d: each must be 1 or more, "
                        "d_state at most 256, d_conv 16, the others 2^20",
                        (int)p->d_model, (int)p->d_inner, (int)p->d_state, (int)p->dt_rank, (int)p->d_conv);
    if (!(p->norm_eps > 0 && p->norm_eps < 1))
        return kvf_fail(err, KVF_ERR_ARG, "norm_eps is %g; it must be above 0 and below 1",
                        (double)p->norm_eps);
    for (int64_t i = 0; i < p->n_layer; i++) {
        const kvf_mamba_layer *l = &p->layers[i];
        if (!l->in_proj || !l->out_proj || !branch_whole(&l->forward))
            return kvf_fail(
                err, KVF_ERR_ARG,
                "layer %lld lacks a weight: in_proj, out_proj and all of forward but conv_b are needed",
                (long long)i);
        if (!l->backward.conv_w != !p->layers[0].backward.conv_w)
            return kvf_fail(err, KVF_ERR_ARG, "layer %lld %s a backward branch, layer 0 does not agree",
                            (long long)i, l->backward.conv_w ? "has" : "lacks");
        if (l->backward.conv_w && !branch_whole(&l->backward))
            return kvf_fail(err, KVF_ERR_ARG, "layer %lld: the backward branch lacks a weight", (long long)i);
    }
    return KVF_OK;
}

static kvf_status take_a(kvf_mamba *m, int64_t i, const kvf_mamba_branch *b, kvf_error *err)
{
    int64_t e = m->p.d_inner, s = m->p.d_state;
    if (!b->conv_w) return KVF_OK;
    KVF_TRY(KVF_GET(&m->env, &m->a[i], e * s, err));
    for (int64_t c = 0; c < e; c++)
        for (int64_t k = 0; k < s; k++) {
            float v = -expf(b->a_log[c * s + k]);
            if (!isfinite(v))
                return kvf_fail(err, KVF_ERR_ARG,
                                "layer %lld: a_log of channel %lld is not finite or too large",
                                (long long)(i / 2), (long long)c);
            m->a[i][k * e + c] = v;
        }
    return KVF_OK;
}

static kvf_status open_parts(kvf_mamba *m, const kvf_mamba_params *p, kvf_error *err)
{
    int64_t conv = (int64_t)(p->d_conv - 1) * p->d_inner, h = (int64_t)p->d_state * p->d_inner;
    m->p = *p;
    m->backward = p->layers[0].backward.conv_w != NULL;
    KVF_TRY(KVF_GET(&m->env, &m->layer, p->n_layer, err));
    KVF_TRY(KVF_GET(&m->env, &m->state, p->n_layer, err));
    KVF_TRY(KVF_GET(&m->env, &m->a, 2 * p->n_layer, err));
    KVF_TRY(KVF_GET(&m->env, &m->memory, p->n_layer * (conv + h), err));
    memcpy(m->layer, p->layers, (size_t)p->n_layer * sizeof *m->layer);
    m->p.layers = m->layer;
    for (int64_t i = 0; i < p->n_layer; i++) {
        m->state[i].conv = m->memory + i * (conv + h);
        m->state[i].h = m->state[i].conv + conv;
        KVF_TRY(take_a(m, 2 * i, &p->layers[i].forward, err));
        KVF_TRY(take_a(m, 2 * i + 1, &p->layers[i].backward, err));
    }
    return KVF_OK;
}

kvf_status kvf_mamba_open_env(kvf_mamba **out, const kvf_merge_env *env, const kvf_mamba_params *p,
                              kvf_error *err)
{
    if (!out || !p) return kvf_fail(err, KVF_ERR_ARG, "out or the parameters are NULL");
    *out = NULL;
    KVF_TRY(check(p, err));
    kvf_mamba *m;
    KVF_TRY(KVF_GET(env, &m, 1, err));
    m->env = *env;
    kvf_status rc = open_parts(m, p, err);
    if (rc < 0) {
        kvf_mamba_close(m);
        return rc;
    }
    *out = m;
    return KVF_OK;
}

void kvf_mamba_close(kvf_mamba *m)
{
    if (!m) return;
    const kvf_mem *mem = m->env.mem;
    for (int64_t i = 0; m->a && i < 2 * m->p.n_layer; i++) kvf_free(mem, m->a[i]);
    kvf_free(mem, m->a);
    kvf_free(mem, m->layer);
    kvf_free(mem, m->state);
    kvf_free(mem, m->memory);
    kvf_free(mem, m->weights);
    kvf_free(mem, m);
}

void kvf_mamba_own(kvf_mamba *m, float *weights) { m->weights = weights; }

kvf_status kvf_mamba_get_info(const kvf_mamba *m, kvf_mamba_info *info, kvf_error *err)
{
    if (!m || !info) return kvf_fail(err, KVF_ERR_ARG, "the layers or info are NULL");
    KVF_TRY(kvf_merge_check_size(info->size, sizeof *info, "kvf_mamba_info", err));
    *info = (kvf_mamba_info){ .size = sizeof *info,
                              .n_layer = m->p.n_layer,
                              .d_model = m->p.d_model,
                              .d_inner = m->p.d_inner,
                              .d_state = m->p.d_state,
                              .dt_rank = m->p.dt_rank,
                              .d_conv = m->p.d_conv,
                              .backward = m->backward,
                              .norm_eps = m->p.norm_eps };
    return KVF_OK;
}

void kvf_mamba_reset(kvf_mamba *m)
{
    int64_t n = (int64_t)(m->p.d_conv - 1 + m->p.d_state) * m->p.d_inner;
    memset(m->memory, 0, (size_t)(m->p.n_layer * n) * sizeof *m->memory);
}

kvf_status kvf_mamba_get_state(const kvf_mamba *m, int64_t layer, float *conv, float *ssm, kvf_error *err)
{
    if (!m || layer < 0 || layer >= m->p.n_layer)
        return kvf_fail(err, KVF_ERR_ARG, "there is no layer %lld", (long long)layer);
    if (m->backward) return kvf_fail(err, KVF_ERR_STATE, "layers with backward branches carry no state");
    int64_t e = m->p.d_inner, s = m->p.d_state;
    if (conv) memcpy(conv, m->state[layer].conv, (size_t)((m->p.d_conv - 1) * e) * sizeof *conv);
    for (int64_t c = 0; ssm && c < e; c++)
        for (int64_t k = 0; k < s; k++) ssm[c * s + k] = m->state[layer].h[k * e + c];
    return KVF_OK;
}

/* ---- Products -------------------------------------------------------------------------------- */

/* out[i][j] = x[i] . w[j]: n rows of dim numbers by n_out rows; rows of out `stride` apart. */
typedef struct product {
    const kvf_rows *rows;
    const float *x, *w;
    float *out;
    int64_t n, n_out, dim, x_stride, stride;
} product;

/* Four rows of w against all of x. */
static void product_rows(void *arg, int64_t at, int32_t worker)
{
    const product *p = arg;
    (void)worker;
    int64_t j = 4 * at;
    kvf_row_set x = { p->x, p->n, p->x_stride },
                w = { p->w + j * p->dim, p->n_out - j < 4 ? p->n_out - j : 4, p->dim };
    kvf_tile(p->rows->dot, x, w, p->dim, p->out + j, p->stride);
}

static void multiply(const kvf_mamba *m, product p)
{
    p.rows = &m->env.rows;
    kvf_merge_run(&m->env, (p.n_out + 3) / 4, product_rows, &p);
}

/* ---- One direction over one chunk ---------------------------------------------------------------- */

/* Arrays of a run: those of the whole sequence, then those of a chunk. */
typedef struct room {
    float *xz;   /* [n][2E] */
    float *y;    /* [n][E] */
    float *norm; /* [CHUNK][d_model] */
    float *in;   /* [d_conv - 1 + CHUNK][E] inputs of a chunk in the order of the scan, after the last ones */
    float *u, *dt, *scan; /* [CHUNK][E] */
    float *dbc;           /* [CHUNK][R + 2S] */
    float *conv, *h;      /* state of a direction that does not carry it on */
    float *out;           /* [CHUNK][d_model] */
} room;

typedef struct scan_task {
    const kvf_rows *rows;
    kvf_scan_args a;
} scan_task;

static void scan_block(void *arg, int64_t i, int32_t worker)
{
    const scan_task *t = arg;
    (void)worker;
    kvf_scan_args a = t->a;
    int64_t from = i * SCAN_CHANNELS, left = t->a.n_channel - from;
    a.n_channel = left < SCAN_CHANNELS ? left : SCAN_CHANNELS;
    a.u += from;
    a.dt += from;
    a.a += from;
    a.d += from;
    a.h += from;
    a.y += from;
    t->rows->scan(&a);
}

static float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

static void convolve(const kvf_mamba *m, const kvf_mamba_branch *b, const room *w, int64_t n)
{
    int64_t e = m->p.d_inner, k = m->p.d_conv;
    for (int64_t t = 0; t < n; t++)
        for (int64_t c = 0; c < e; c++) {
            float sum = b->conv_b ? b->conv_b[c] : 0.0f;
            for (int64_t j = 0; j < k; j++) sum += b->conv_w[c * k + j] * w->in[(t + j) * e + c];
            w->u[t * e + c] = sum;
        }
    m->env.rows.silu(w->u, n * e);
}

/* One direction of a layer. */
typedef struct direction {
    int64_t layer;
    bool back;
    branch_state st;
} direction;

/* n tokens from `from` on, or backwards from it, through one direction; adds to y. */
static void branch_chunk(const kvf_mamba *m, const direction *go, const room *w, int64_t from, int64_t n)
{
    int64_t i = go->layer;
    bool back = go->back;
    branch_state st = go->st;
    const kvf_mamba_branch *b = back ? &m->layer[i].backward : &m->layer[i].forward;
    int64_t e = m->p.d_inner, s = m->p.d_state, r = m->p.dt_rank, tail = m->p.d_conv - 1,
            step = back ? -1 : 1;
    int64_t width = r + 2 * s;
    memcpy(w->in, st.conv, (size_t)(tail * e) * sizeof *w->in);
    for (int64_t t = 0; t < n; t++)
        memcpy(w->in + (tail + t) * e, w->xz + (from + step * t) * 2 * e, (size_t)e * sizeof *w->in);
    memcpy(st.conv, w->in + n * e, (size_t)(tail * e) * sizeof *w->in);
    convolve(m, b, w, n);
    multiply(m, (product){ .x = w->u,
                           .w = b->x_proj,
                           .out = w->dbc,
                           .n = n,
                           .n_out = width,
                           .dim = e,
                           .x_stride = e,
                           .stride = width });
    multiply(m, (product){ .x = w->dbc,
                           .w = b->dt_w,
                           .out = w->dt,
                           .n = n,
                           .n_out = e,
                           .dim = r,
                           .x_stride = width,
                           .stride = e });
    for (int64_t t = 0; t < n; t++)
        for (int64_t c = 0; c < e; c++) w->dt[t * e + c] = softplus(w->dt[t * e + c] + b->dt_b[c]);
    memset(w->scan, 0, (size_t)(n * e) * sizeof *w->scan);
    scan_task task = { &m->env.rows,
                       { .n_tok = n,
                         .n_channel = e,
                         .stride = e,
                         .u = w->u,
                         .dt = w->dt,
                         .bc = w->dbc + r,
                         .bc_stride = width,
                         .n_state = s,
                         .a = m->a[2 * i + back],
                         .a_stride = e,
                         .d = b->d,
                         .h = st.h,
                         .y = w->scan } };
    kvf_merge_run(&m->env, (e + SCAN_CHANNELS - 1) / SCAN_CHANNELS, scan_block, &task);
    for (int64_t t = 0; t < n; t++) {
        float *y = w->y + (from + step * t) * e;
        for (int64_t c = 0; c < e; c++) y[c] += w->scan[t * e + c];
    }
}

static void run_branch(const kvf_mamba *m, int64_t i, bool back, const room *w, int64_t n)
{
    direction go = { i, back, m->state[i] };
    if (m->backward) { /* every call is a sequence of its own */
        go.st = (branch_state){ w->conv, w->h };
        memset(w->conv, 0, (size_t)((m->p.d_conv - 1) * m->p.d_inner) * sizeof *w->conv);
        memset(w->h, 0, (size_t)(m->p.d_state * m->p.d_inner) * sizeof *w->h);
    }
    for (int64_t t = 0; t < n; t += CHUNK) {
        int64_t len = n - t < CHUNK ? n - t : CHUNK;
        branch_chunk(m, &go, w, back ? n - 1 - t : t, len);
    }
}

/* ---- Layers ---------------------------------------------------------------------------------- */

static void layer_norm(const kvf_mamba *m, const kvf_mamba_layer *l, const float *x, float *out, int64_t n)
{
    int64_t d = m->p.d_model;
    for (int64_t t = 0; t < n; t++, x += d, out += d) {
        double mean = 0, var = 0;
        for (int64_t i = 0; i < d; i++) mean += (double)x[i];
        mean /= (double)d;
        for (int64_t i = 0; i < d; i++) var += ((double)x[i] - mean) * ((double)x[i] - mean);
        double scale = 1 / sqrt(var / (double)d + (double)m->p.norm_eps);
        for (int64_t i = 0; i < d; i++)
            out[i] =
                (float)(((double)x[i] - mean) * scale) * l->norm_w[i] + (l->norm_b ? l->norm_b[i] : 0.0f);
    }
}

static void run_layer(const kvf_mamba *m, int64_t i, const room *w, float *x, int64_t n)
{
    const kvf_mamba_layer *l = &m->layer[i];
    int64_t d = m->p.d_model, e = m->p.d_inner;
    for (int64_t t = 0; t < n; t += CHUNK) {
        int64_t len = n - t < CHUNK ? n - t : CHUNK;
        if (l->norm_w) layer_norm(m, l, x + t * d, w->norm, len);
        multiply(m, (product){ .x = l->norm_w ? w->norm : x + t * d,
                               .w = l->in_proj,
                               .out = w->xz + t * 2 * e,
                               .n = len,
                               .n_out = 2 * e,
                               .dim = d,
                               .x_stride = d,
                               .stride = 2 * e });
    }
    memset(w->y, 0, (size_t)(n * e) * sizeof *w->y);
    run_branch(m, i, false, w, n);
    if (m->backward) run_branch(m, i, true, w, n);
    for (int64_t t = 0; t < n; t++) {
        float *z = w->xz + t * 2 * e + e, *y = w->y + t * e;
        m->env.rows.silu(z, e);
        for (int64_t c = 0; c < e; c++) y[c] *= z[c];
    }
    for (int64_t t = 0; t < n; t += CHUNK) {
        int64_t len = n - t < CHUNK ? n - t : CHUNK;
        multiply(m, (product){ .x = w->y + t * e,
                               .w = l->out_proj,
                               .out = w->out,
                               .n = len,
                               .n_out = d,
                               .dim = e,
                               .x_stride = e,
                               .stride = d });
        for (int64_t k = 0; k < len * d; k++) x[t * d + k] += w->out[k];
    }
}

static kvf_status room_init(room *w, const kvf_mamba *m, int64_t n, kvf_error *err)
{
    int64_t e = m->p.d_inner, s = m->p.d_state, tail = m->p.d_conv - 1, len = n < CHUNK ? n : CHUNK;
    size_t all;
    if (!kvf_mul_size((size_t)n, (size_t)e, &all) || all > SIZE_MAX / 16)
        return kvf_fail(err, KVF_ERR_NOMEM,
                        "%lld tokens of %lld channels pass any memory; run them in chunks", (long long)n,
                        (long long)e);
    KVF_TRY(KVF_GET(&m->env, &w->xz, 2 * n * e, err));
    KVF_TRY(KVF_GET(&m->env, &w->y, n * e, err));
    KVF_TRY(KVF_GET(&m->env, &w->norm, 2 * len * m->p.d_model, err));
    KVF_TRY(KVF_GET(&m->env, &w->in, (tail + len) * e, err));
    KVF_TRY(KVF_GET(&m->env, &w->u, 3 * len * e, err));
    KVF_TRY(KVF_GET(&m->env, &w->dbc, len * (m->p.dt_rank + 2 * s), err));
    KVF_TRY(KVF_GET(&m->env, &w->conv, (tail + s) * e, err));
    w->dt = w->u + len * e;
    w->scan = w->dt + len * e;
    w->h = w->conv + tail * e;
    w->out = w->norm + len * m->p.d_model;
    return KVF_OK;
}

kvf_status kvf_mamba_run(kvf_mamba *m, float *x, int64_t n, kvf_error *err)
{
    if (!m || !x || n < 1 || n > INT32_MAX)
        return kvf_fail(err, KVF_ERR_ARG, "x must be [n][d_model] with 1 <= n < 2^31; n is %lld",
                        (long long)n);
    for (int64_t i = 0; i < n * m->p.d_model; i++)
        if (!isfinite(x[i]))
            return kvf_fail(err, KVF_ERR_ARG, "token %lld, element %lld is %s; the values must be finite",
                            (long long)(i / m->p.d_model), (long long)(i % m->p.d_model),
                            isnan(x[i]) ? "NaN" : "infinite");
    room w = { 0 };
    kvf_status rc = room_init(&w, m, n, err);
    for (int64_t i = 0; i < m->p.n_layer && rc >= 0; i++) run_layer(m, i, &w, x, n);
    float *all[] = { w.xz, w.y, w.norm, w.in, w.u, w.dbc, w.conv };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kvf_free(m->env.mem, all[i]);
    return rc;
}
