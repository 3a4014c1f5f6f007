/* cpu_memory.c - the CPU's ops for far blocks: rotated copies, digests, votes, column sums.
 *
 * A vote goes in three steps, for each KV head: scores of all units with query rows along the lanes
 * (parallel over blocks), shares per row (parallel over columns of lanes), votes per unit. Queries come
 * in batches, so that the scores of a long text stay within tens of megabytes.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_backend_int.h"
#include "backend/cpu/digest_ref.h"

enum { BATCH_LANES = 512 };

/* Blocks of digests one thread scores in a row: long runs come from memory faster (16 instead of 4: 0.8 to 0.7 ms for
 * 120K tokens in a store, 2 threads), of short texts each thread gets some. */
enum { RUN_LEAST = 2, RUN_MOST = 16, RUNS_PER_THREAD = 4 };

typedef kvf_cpu_backend cpu_backend;

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* ---- Rotated copies --------------------------------------------------------------------------- */

typedef struct turn_task {
    cpu_backend *c;
    const kvf_kv_turn_args *a;
    const kvf_kv_gather_args *gather;
    int64_t per; /* tokens of a part */
} turn_task;

static void turn_token(const cpu_backend *c, const kvf_kv_turn_args *a, int64_t i)
{
    int64_t place = a->first + i, d = a->head_dim, plane = KVF_BLOCK * d, v_at = a->n_head_kv * plane;
    const kvf_f16 *src = kvf_kv_slot(a->kv, a->src[place >> KVF_BLOCK_SHIFT]);
    kvf_f16 *dst = kvf_kv_slot(a->kv, a->dst[place >> KVF_BLOCK_SHIFT]);
    float x[1024];
    int32_t step = (int32_t)(1024 / d);
    src += (place & (KVF_BLOCK - 1)) * d;
    dst += (place & (KVF_BLOCK - 1)) * d;
    for (int32_t h0 = 0; h0 < a->n_head_kv; h0 += step) {
        int32_t n = a->n_head_kv - h0 < step ? a->n_head_kv - h0 : step;
        for (int32_t h = 0; h < n; h++)
            for (int64_t j = 0; j < d; j++) x[h * d + j] = kvf_f32_from_f16(src[(h0 + h) * plane + j]);
        c->ops.rope(x, n, a->head_dim, a->n_rot, a->cos_sin + i * a->n_rot, a->kind);
        for (int32_t h = 0; h < n; h++) {
            c->ops.f32_to_f16(x + h * d, dst + (h0 + h) * plane, d);
            memcpy(dst + v_at + (h0 + h) * plane, src + v_at + (h0 + h) * plane, (size_t)d * sizeof *dst);
        }
    }
}

static void turn_part(void *arg, int64_t part, int32_t worker)
{
    const turn_task *t = arg;
    int64_t end = (part + 1) * t->per < t->a->n_tok ? (part + 1) * t->per : t->a->n_tok;
    (void)worker;
    for (int64_t i = part * t->per; i < end; i++) turn_token(t->c, t->a, i);
}

kvf_status kvf_cpu_op_kv_turn(kvf_backend *b, const kvf_kv_turn_args *a, kvf_error *err)
{
    turn_task t = { .c = kvf_cpu_self(b), .a = a, .per = 64 };
    if (a->head_dim > 1024) return kvf_fail(err, KVF_ERR_UNSUPPORTED, "heads of %d channels; the most is 1024", a->head_dim);
    kvf_cpu_run_parts(t.c, (a->n_tok + t.per - 1) / t.per, 4 * a->n_tok * a->n_head_kv * a->head_dim, turn_part, &t);
    return KVF_OK;
}

/* ---- Rows put together ------------------------------------------------------------------------- */

/* One row of each KV head's K and V. */
static void gather_token(const kvf_kv_gather_args *a, int64_t i)
{
    int64_t d = a->head_dim, plane = KVF_BLOCK * d, v_at = a->n_head_kv * plane, to = a->first + i;
    kvf_f16 *dst = kvf_kv_slot(a->kv, a->dst[to >> KVF_BLOCK_SHIFT]);
    dst += (to & (KVF_BLOCK - 1)) * d;
    for (int64_t h = 0; h < a->n_head_kv; h++) {
        int64_t from = a->from[h * a->from_stride + i];
        const kvf_f16 *src = kvf_kv_slot(a->kv, a->src[from >> KVF_BLOCK_SHIFT]);
        src += (from & (KVF_BLOCK - 1)) * d;
        if (src == dst) continue;
        memcpy(dst + h * plane, src + h * plane, (size_t)d * sizeof *dst);
        memcpy(dst + v_at + h * plane, src + v_at + h * plane, (size_t)d * sizeof *dst);
    }
}

static void gather_part(void *arg, int64_t part, int32_t worker)
{
    const turn_task *t = arg;
    int64_t end = (part + 1) * t->per < t->gather->n ? (part + 1) * t->per : t->gather->n;
    (void)worker;
    for (int64_t i = part * t->per; i < end; i++) gather_token(t->gather, i);
}

kvf_status kvf_cpu_op_kv_gather(kvf_backend *b, const kvf_kv_gather_args *a, kvf_error *err)
{
    (void)err;
    turn_task t = { .c = kvf_cpu_self(b), .gather = a, .per = 256 };
    /* In place the order of the copies matters: one part. */
    if (a->src == a->dst) t.per = a->n > 0 ? a->n : 1;
    kvf_cpu_run_parts(t.c, (a->n + t.per - 1) / t.per, 2 * a->n * a->n_head_kv * a->head_dim, gather_part, &t);
    return KVF_OK;
}

/* ---- Digests ---------------------------------------------------------------------------------- */

static void digest_part(void *arg, int64_t part, int32_t worker)
{
    const kvf_digest_args *all = arg;
    const kvf_digest *g = all[0].digest;
    const kvf_digest_args *a = &all[part / g->n_head_kv];
    int64_t h = part % g->n_head_kv;
    (void)worker;
    g = a->digest;
    const kvf_f16 *k = (const kvf_f16 *)kvf_kv_slot(a->kv, a->slot) + h * KVF_BLOCK * g->head_dim;
    uint8_t *out = (uint8_t *)a->out + (size_t)h * kvf_digest_head_bytes(g);
    kvf_race_read(k, (size_t)(a->n_tok * g->head_dim) * sizeof *k);
    kvf_race_write(out, kvf_digest_head_bytes(g));
    kvf_digest_head(g, k, a->n_tok, out);
}

kvf_status kvf_cpu_op_digest(kvf_backend *b, const kvf_digest_args *a, int64_t n, kvf_error *err)
{
    if (n < 1) return KVF_OK;
    for (int64_t i = 0; i < n; i++)
        if (a[i].digest->kind == KVF_DIGEST_REPS || a[i].digest->kind == KVF_DIGEST_NONE || a[i].n_tok < 1)
            return kvf_fail(err, KVF_ERR_INTERNAL, "a digest of kind %d from %d tokens", (int)a[i].digest->kind, a[i].n_tok);
    int64_t heads = n * a[0].digest->n_head_kv;
    union {
        const kvf_digest_args *in;
        void *arg;
    } u = { .in = a };
    kvf_cpu_run_parts(kvf_cpu_self(b), heads, heads * KVF_BLOCK * a[0].digest->head_dim, digest_part, u.arg);
    return KVF_OK;
}

kvf_status kvf_cpu_op_reps(kvf_backend *b, const kvf_reps_args *a, kvf_error *err)
{
    const kvf_digest *g = a->digest;
    (void)b;
    if (g->kind != KVF_DIGEST_REPS || g->head_dim > 256 || a->r < 1)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "representatives of heads of %d channels; the most is 256", g->head_dim);
    int32_t group = g->n_head / g->n_head_kv;
    for (int32_t h = 0; h < g->n_head_kv; h++) {
        const kvf_f16 *k = (const kvf_f16 *)kvf_kv_slot(a->kv, a->slot) + h * KVF_BLOCK * g->head_dim;
        void *out = (uint8_t *)a->out + (size_t)h * kvf_digest_head_bytes(g);
        kvf_race_read(k, (size_t)(KVF_BLOCK * g->head_dim) * sizeof *k);
        kvf_race_read(a->score + h * group * KVF_BLOCK, (size_t)(group * KVF_BLOCK) * sizeof *a->score);
        kvf_race_write(out, kvf_digest_head_bytes(g));
        kvf_reps_head(g, k, a->score + h * group * KVF_BLOCK, a->r, out);
    }
    return KVF_OK;
}

/* ---- Rows ------------------------------------------------------------------------------------- */

static int32_t pad_of(int32_t group)
{
    int32_t pad = 1;
    while (pad < group) pad *= 2;
    return pad;
}

static kvf_rows rows_for(int64_t n_q, int32_t n_head, int32_t n_head_kv, int32_t head_dim)
{
    kvf_rows r = { .n_q = n_q, .group = n_head / n_head_kv, .head_dim = head_dim };
    r.pad = pad_of(r.group);
    int64_t width = r.pad > KVF_ROW_LANES ? r.pad : KVF_ROW_LANES;
    r.n_lane = (n_q * r.pad + width - 1) / width * width;
    return r;
}

/* out [head_dim][n_lane] of one KV head from q [n_q][n_head][head_dim], times scale. */
static void lay_rows(const kvf_rows *r, const float *q, int64_t n_head, int64_t head_kv, float scale, float *out)
{
    memset(out, 0, (size_t)(r->n_lane * r->head_dim) * sizeof *out);
    for (int64_t i = 0; i < r->n_q; i++)
        for (int32_t g = 0; g < r->group; g++) {
            const float *row = q + (i * n_head + head_kv * r->group + g) * r->head_dim;
            for (int32_t c = 0; c < r->head_dim; c++) out[c * r->n_lane + i * r->pad + g] = row[c] * scale;
        }
}

/* ---- Votes ------------------------------------------------------------------------------------ */

typedef struct vote_task {
    cpu_backend *c;
    const kvf_vote_args *a;
    kvf_rows rows;    /* of the batch; without q, which each KV head has its own of */
    float *q;         /* [n_head_kv][head_dim][n_lane] */
    float *lse;       /* [n_head_kv][n_lane] */
    float *s;         /* [n_head_kv][n_unit][n_lane] */
    int64_t block0, n_block, per_part, n_part; /* blocks; runs of per_part of them */
    void (*score)(const kvf_score_part *p);
} vote_task;

static int64_t per_block(const kvf_vote_args *a) { return KVF_BLOCK / a->unit; }

/* Digests of a store come from memory, through pages that no hardware fetches ahead of: each KV head's part of a
 * block asks for that of the next block. */
static void fetch_ahead(const char *p, size_t n)
{
#if defined(__GNUC__)
    for (size_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 2);
#else
    (void)p, (void)n;
#endif
}

static void score_block(const vote_task *t, int64_t b, int32_t head, void *scratch)
{
    const kvf_vote_args *a = t->a;
    kvf_rows rows = t->rows;
    rows.q = t->q + (int64_t)head * rows.head_dim * rows.n_lane;
    size_t head_bytes = kvf_digest_head_bytes(a->digest), at = (size_t)head * head_bytes;
    int64_t u0 = b * per_block(a), u1 = u0 + per_block(a);
    if (b + 1 < t->block0 + t->n_block) fetch_ahead((const char *)a->rows[b + 1] + at, head_bytes);
    if (u0 < a->unit0) u0 = a->unit0;
    if (u1 > a->unit0 + a->n_unit) u1 = a->unit0 + a->n_unit;
    kvf_score_part p = { .rows = &rows, .digest = a->digest, .row = (const uint8_t *)a->rows[b] + at, .unit = a->unit,
                         .unit0 = (int32_t)(u0 - b * per_block(a)), .unit1 = (int32_t)(u1 - b * per_block(a)),
                         .s = t->s + (head * a->n_unit + u0 - a->unit0) * rows.n_lane, .scratch = scratch };
    kvf_race_read(rows.q, (size_t)(rows.head_dim * rows.n_lane) * sizeof *rows.q);
    kvf_race_read(p.row, head_bytes);
    kvf_race_write(p.s, (size_t)((u1 - u0) * rows.n_lane) * sizeof *p.s);
    t->score(&p);
}

static void score_part(void *arg, int64_t part, int32_t worker)
{
    const vote_task *t = arg;
    int64_t first = t->block0 + part * t->per_part, last = t->block0 + t->n_block - 1;
    void *scratch = kvf_cpu_work_of(t->c, worker);
    for (int64_t b = first; b < first + t->per_part && b <= last; b++)
        for (int32_t h = 0; h < t->a->digest->n_head_kv; h++) score_block(t, b, h, scratch);
}

/* s of one column of lanes becomes shares. */
static void share_part(void *arg, int64_t part, int32_t worker)
{
    const vote_task *t = arg;
    int64_t columns = t->rows.n_lane / KVF_ROW_LANES, head = part / columns, lane = part % columns * KVF_ROW_LANES;
    int64_t n = t->a->n_unit, stride = t->rows.n_lane;
    const float *lse = t->lse + head * stride + lane;
    (void)worker;
    float *s = t->s + head * n * stride + lane;
    for (int64_t i = 0; i < n; i++) kvf_race_write(s + i * stride, KVF_ROW_LANES * sizeof *s);
    kvf_race_read(lse, KVF_ROW_LANES * sizeof *lse);
    t->c->ops.share_columns(s, n, stride, t->a->rule.kind == KVF_VOTE_GATE ? lse : NULL);
}

/* Join the queries of one unit and KV head: joined [width], lane g of every pad is head g. */
static void join_queries(const vote_task *t, const float *s, float *joined, int64_t width)
{
    const kvf_rows *r = &t->rows;
    bool max = t->a->rule.max_queries;
    for (int64_t l = 0; l < width; l++) joined[l] = max ? -INFINITY : 0;
    for (int64_t i = 0; i < r->n_lane; i += width) {
        int64_t n = r->n_q * r->pad - i < width ? r->n_q * r->pad - i : width;
        for (int64_t l = 0; l < n; l++) joined[l] = max ? (s[i + l] > joined[l] ? s[i + l] : joined[l]) : joined[l] + s[i + l];
    }
    for (int64_t l = r->pad; l < width; l++) {
        float *to = &joined[l % r->pad];
        *to = max ? (joined[l] > *to ? joined[l] : *to) : *to + joined[l];
    }
}

enum { UNITS_PER_PART = 256 };

/* Votes of one batch of queries, joined per head into best [n_head_kv][n_unit][pad]. */
typedef struct join_task {
    const vote_task *t;
    float *best;
    bool first;
} join_task;

static void join_part(void *arg, int64_t part, int32_t worker)
{
    const join_task *j = arg;
    const vote_task *t = j->t;
    const kvf_rows *r = &t->rows;
    int64_t parts = (t->a->n_unit + UNITS_PER_PART - 1) / UNITS_PER_PART, head = part / parts, u = part % parts * UNITS_PER_PART;
    int64_t end = u + UNITS_PER_PART < t->a->n_unit ? u + UNITS_PER_PART : t->a->n_unit;
    int64_t width = r->pad > KVF_ROW_LANES ? r->pad : KVF_ROW_LANES;
    float joined[1024];
    (void)worker;
    for (; u < end; u++) {
        float *best = j->best + (head * t->a->n_unit + u) * r->pad;
        const float *s = t->s + (head * t->a->n_unit + u) * r->n_lane;
        if (r->n_q == 1) /* as in decode: nothing to join */
            memcpy(joined, s, (size_t)r->group * sizeof *s);
        else
            join_queries(t, s, joined, width);
        for (int32_t g = 0; g < r->group; g++) {
            if (j->first)
                best[g] = joined[g];
            else if (t->a->rule.max_queries)
                best[g] = joined[g] > best[g] ? joined[g] : best[g];
            else
                best[g] += joined[g];
        }
    }
}

/* Pooled queries i0..i0 + n of the call, laid out per KV head, and their lse. */
static void lay_batch(vote_task *t, int64_t i0, float *pooled, float *pooled_lse)
{
    const kvf_vote_args *a = t->a;
    const kvf_digest *g = a->digest;
    int64_t width = (int64_t)g->n_head * g->head_dim, pool = a->rule.pool;
    kvf_rows *r = &t->rows;
    for (int64_t i = 0; i < r->n_q; i++) {
        int64_t first = (i0 + i) * pool, n = a->n_q - first < pool ? a->n_q - first : pool;
        for (int64_t j = 0; j < width; j++) {
            float sum = 0;
            for (int64_t k = 0; k < n; k++) sum += a->q[(first + k) * width + j];
            pooled[i * width + j] = sum / (float)n;
        }
        for (int32_t h = 0; h < g->n_head; h++) {
            float sum = 0;
            for (int64_t k = 0; a->lse && k < n; k++) sum += a->lse[(first + k) * g->n_head + h];
            pooled_lse[i * g->n_head + h] = a->lse ? sum / (float)n : -INFINITY;
        }
    }
    for (int32_t h = 0; h < g->n_head_kv; h++) {
        lay_rows(r, pooled, g->n_head, h, a->scale, t->q + h * g->head_dim * r->n_lane);
        for (int64_t l = 0; l < r->n_lane; l++) {
            int64_t i = l / r->pad, x = l % r->pad;
            bool real = i < r->n_q && x < r->group;
            t->lse[h * r->n_lane + l] = real ? pooled_lse[i * g->n_head + h * r->group + x] : 0;
        }
    }
}

static kvf_status check_vote(const kvf_vote_args *a, kvf_error *err)
{
    const kvf_digest *g = a->digest;
    bool ok = kvf_digest_valid(g) && g->kind != KVF_DIGEST_NONE && a->n_q >= 1 && a->n_unit >= 1 && a->rule.pool >= 1 &&
              a->unit >= 16 && a->unit <= KVF_BLOCK && (a->unit & (a->unit - 1)) == 0 && g->n_head / g->n_head_kv <= 1024 &&
              (g->kind == KVF_DIGEST_BITS || g->sub <= a->unit);
    if (ok) return KVF_OK;
    return kvf_fail(err, KVF_ERR_INTERNAL, "a vote of %lld queries for %lld units of %d tokens", (long long)a->n_q,
                    (long long)a->n_unit, a->unit);
}

static void sum_heads(const vote_task *t, const float *best, int64_t n_q)
{
    const kvf_vote_args *a = t->a;
    const kvf_rows *r = &t->rows;
    float share = a->rule.max_queries ? 1.0f : 1.0f / (float)n_q;
    int32_t sets = a->rule.per_kv_head ? a->digest->n_head_kv : 1;
    memset(a->vote, 0, (size_t)(sets * a->n_unit) * sizeof *a->vote);
    for (int32_t h = 0; h < a->digest->n_head_kv; h++) {
        float *vote = a->vote + (sets > 1 ? h * a->n_unit : 0);
        for (int64_t u = 0; u < a->n_unit; u++)
            for (int32_t g = 0; g < r->group; g++) vote[u] += best[(h * a->n_unit + u) * r->pad + g] * share;
    }
}

kvf_status kvf_cpu_op_vote(kvf_backend *b, const kvf_vote_args *a, kvf_error *err)
{
    KVF_TRY(check_vote(a, err));
    cpu_backend *c = kvf_cpu_self(b);
    const kvf_digest *g = a->digest;
    int64_t n_q = (a->n_q + a->rule.pool - 1) / a->rule.pool, batch = BATCH_LANES / pad_of(g->n_head / g->n_head_kv);
    if (batch < 1) batch = 1;
    if (batch > n_q) batch = n_q;
    kvf_rows most = rows_for(batch, g->n_head, g->n_head_kv, g->head_dim);
    size_t heads = (size_t)g->n_head_kv, lanes = (size_t)most.n_lane, units = (size_t)a->n_unit;
    size_t n[6] = { heads * (size_t)g->head_dim * lanes, heads * lanes, heads * units * lanes,
                    heads * units * (size_t)most.pad, (size_t)(batch * g->n_head) * (size_t)g->head_dim,
                    (size_t)(batch * g->n_head) };
    size_t total = 0, at[6];
    for (int i = 0; i < 6; i++) at[i] = total, total += round_up(n[i], 16);
    KVF_TRY(kvf_cpu_grow_scratch(c, &c->partial, &c->partial_cap, total * sizeof(float), err));
    bool bits = g->kind == KVF_DIGEST_BITS && c->ops.score_bits;
    KVF_TRY(kvf_cpu_grow_work(c, bits ? c->ops.score_bits_scratch_bytes(&most) : c->ops.score_scratch_bytes(&most), err));
    float *base = (float *)(void *)c->partial;
    vote_task t = { .c = c, .a = a, .q = base + at[0], .lse = base + at[1], .s = base + at[2],
                    .score = bits ? c->ops.score_bits : c->ops.score };
    t.block0 = a->unit0 / per_block(a);
    t.n_block = (a->unit0 + a->n_unit - 1) / per_block(a) + 1 - t.block0;
    t.per_part = t.n_block / (RUNS_PER_THREAD * c->n_threads);
    if (t.per_part < RUN_LEAST) t.per_part = RUN_LEAST;
    if (t.per_part > RUN_MOST) t.per_part = RUN_MOST;
    t.n_part = (t.n_block + t.per_part - 1) / t.per_part;
    c->ran_score = c->ops.score_name;
    for (int64_t i = 0; i < n_q; i += batch) {
        t.rows = rows_for(n_q - i < batch ? n_q - i : batch, g->n_head, g->n_head_kv, g->head_dim);
        lay_batch(&t, i, base + at[4], base + at[5]);
        int64_t work = t.n_block * KVF_BLOCK * t.rows.n_lane;
        kvf_cpu_run_parts(c, t.n_part, work, score_part, &t);
        if (a->rule.kind != KVF_VOTE_LIN)
            kvf_cpu_run_parts(c, g->n_head_kv * (t.rows.n_lane / KVF_ROW_LANES), a->n_unit * t.rows.n_lane, share_part, &t);
        join_task j = { &t, base + at[3], i == 0 };
        kvf_cpu_run_parts(c, g->n_head_kv * ((a->n_unit + UNITS_PER_PART - 1) / UNITS_PER_PART), a->n_unit * t.rows.n_lane,
                          join_part, &j);
    }
    sum_heads(&t, base + at[3], n_q);
    return KVF_OK;
}

/* ---- Where attention went ----------------------------------------------------------------------- */

typedef struct mass_task {
    cpu_backend *c;
    const kvf_attn_mass_args *m;
    kvf_rows rows;
    int32_t head0, n_head_kv;
    const float *q, *lse; /* [n_head_kv][head_dim][n_lane], [n_head_kv][n_lane] */
    int64_t n_entry;
} mass_task;

static int64_t rows_width(const kvf_rows *r) { return r->pad > KVF_ROW_LANES ? r->pad : KVF_ROW_LANES; }

static void mass_part(void *arg, int64_t part, int32_t worker)
{
    const mass_task *t = arg;
    const kvf_attn_args *a = t->m->attn;
    int64_t width = rows_width(&t->rows), left = a->n_key - part * KVF_BLOCK;
    float *sum = kvf_cpu_work_of(t->c, worker);
    kvf_mass_part p = { .rows = &t->rows, .key0 = 0, .key1 = left < KVF_BLOCK ? (int32_t)left : KVF_BLOCK,
                        .base = part * KVF_BLOCK, .q_first = a->q_first, .window = a->window, .softcap = a->softcap,
                        .sum = sum, .scratch = sum + KVF_BLOCK * width };
    if (a->valid) {
        p.key0 = a->valid[2 * part];
        if (a->valid[2 * part + 1] < p.key1) p.key1 = a->valid[2 * part + 1];
    }
    if (p.key0 >= p.key1) return;
    for (int32_t h = 0; h < t->n_head_kv; h++) {
        kvf_rows rows = t->rows;
        int64_t head = t->head0 + h;
        rows.q = t->q + h * rows.head_dim * rows.n_lane;
        p.rows = &rows;
        p.lse = t->lse + h * rows.n_lane;
        p.k = (const kvf_f16 *)kvf_kv_slot(a->kv, a->slots[part]) + head * KVF_BLOCK * rows.head_dim;
        memset(sum, 0, (size_t)(KVF_BLOCK * width) * sizeof *sum);
        kvf_race_read(rows.q, (size_t)(rows.head_dim * rows.n_lane) * sizeof *rows.q);
        kvf_race_read(p.lse, (size_t)rows.n_lane * sizeof *p.lse);
        kvf_race_read(p.k + p.key0 * rows.head_dim, (size_t)((p.key1 - p.key0) * rows.head_dim) * sizeof *p.k);
        t->c->ops.mass(&p);
        int64_t stride = t->m->sum_heads ? 0 : t->n_entry * KVF_BLOCK;
        float *to = t->m->mass + head * rows.group * stride + part * KVF_BLOCK;
        for (int32_t j = p.key0; j < p.key1; j++)
            for (int32_t g = 0; g < rows.group; g++)
                for (int64_t l = g; l < width; l += rows.pad) to[g * stride + j] += sum[j * width + l];
    }
}

kvf_status kvf_cpu_op_attn_mass(kvf_backend *b, const kvf_attn_mass_args *m, kvf_error *err)
{
    const kvf_attn_args *a = m->attn;
    mass_task t = { .c = kvf_cpu_self(b), .m = m, .n_head_kv = a->n_head_kv };
    if (a->head_kv1 > 0) {
        t.head0 = a->head_kv0;
        t.n_head_kv = a->head_kv1 - a->head_kv0;
    }
    if (a->n_tok < 1 || a->n_key < 1) return KVF_OK;
    t.rows = rows_for(a->n_tok, a->n_head, a->n_head_kv, a->head_dim);
    t.n_entry = (a->n_key + KVF_BLOCK - 1) / KVF_BLOCK;
    size_t heads = (size_t)t.n_head_kv, lanes = (size_t)t.rows.n_lane, width = (size_t)rows_width(&t.rows);
    KVF_TRY(kvf_cpu_grow_scratch(t.c, &t.c->partial, &t.c->partial_cap, heads * lanes * ((size_t)a->head_dim + 1) * sizeof(float), err));
    KVF_TRY(kvf_cpu_grow_work(t.c, KVF_BLOCK * (width + (size_t)a->head_dim) * sizeof(float), err));
    float *q = (float *)(void *)t.c->partial, *lse = q + heads * lanes * (size_t)a->head_dim;
    t.q = q;
    t.lse = lse;
    for (int32_t h = 0; h < t.n_head_kv; h++) {
        lay_rows(&t.rows, a->q, a->n_head, t.head0 + h, a->scale, q + h * a->head_dim * t.rows.n_lane);
        for (int64_t l = 0; l < t.rows.n_lane; l++) {
            int64_t i = l / t.rows.pad, g = l % t.rows.pad;
            float x = i < a->n_tok && g < t.rows.group ? a->lse[i * a->n_head + (t.head0 + h) * t.rows.group + g] : INFINITY;
            lse[h * t.rows.n_lane + l] = x > -INFINITY ? x : INFINITY;
        }
    }
    kvf_cpu_run_parts(t.c, t.n_entry, a->n_key * a->head_dim * t.rows.n_lane, mass_part, &t);
    return KVF_OK;
}
