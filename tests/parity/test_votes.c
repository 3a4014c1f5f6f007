/* test_votes.c - the ops for far blocks (digest, vote, attn_mass, kv_turn) at every level against their
 * definitions: naive loops here, and the scalar level.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/cpu.h"
#include "base/half.h"

enum { N_BLOCK = 9, MAX_Q = 70, MAX_D = 256 };

static kvf_error err;
static uint64_t rng = 11;

static float noise(void)
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(rng >> 32) * 0x1p-31f;
}

typedef struct world {
    int32_t n_head, n_head_kv, d;
    size_t slot_bytes;
    void *slab;
    kvf_kv_view view;
    int32_t slots[N_BLOCK];
    float *q, *lse;
} world;

/* Keys as Qwen2 has them: some channels have offsets of over a hundred. */
static world make(int32_t n_head, int32_t n_head_kv, int32_t d)
{
    world w = { .n_head = n_head, .n_head_kv = n_head_kv, .d = d };
    w.slot_bytes = (size_t)(2 * n_head_kv * KVF_BLOCK * d) * 2;
    w.slab = malloc(N_BLOCK * w.slot_bytes);
    kvf_f16 *p = w.slab;
    for (size_t i = 0; i < N_BLOCK * w.slot_bytes / 2; i++) {
        size_t c = i % (size_t)d;
        p[i] = kvf_f16_from_f32(2 * noise() + (c % 16 == 3 ? 130.0f : c % 16 == 9 ? -40.0f : 0));
        if (c == 7) p[i] = kvf_f16_from_f32(0.5f); /* a channel that never changes */
    }
    for (int32_t i = 0; i < N_BLOCK; i++) w.slots[i] = (i * 4 + 2) % N_BLOCK;
    w.q = malloc((size_t)(MAX_Q * n_head * d) * sizeof(float));
    w.lse = malloc((size_t)(MAX_Q * n_head) * sizeof(float));
    for (int i = 0; i < MAX_Q * n_head * d; i++) w.q[i] = noise() * (i % d % 16 == 3 ? 0.1f : 1.0f);
    for (int i = 0; i < MAX_Q * n_head; i++) w.lse[i] = 3 * noise() + 2;
    return w;
}

static void view(world *w) { w->view = (kvf_kv_view){ .slab = &w->slab, .shift = 10, .slot_bytes = w->slot_bytes }; }

static void drop(world *w)
{
    free(w->slab);
    free(w->q);
    free(w->lse);
}

static const kvf_f16 *key(const world *w, int32_t block, int32_t head, int32_t t)
{
    const kvf_f16 *slot = (const kvf_f16 *)w->slab + (size_t)w->slots[block] * w->slot_bytes / 2;
    return slot + ((size_t)head * KVF_BLOCK + (size_t)t) * (size_t)w->d;
}

static kvf_threads *threads;

static kvf_backend *open_level(kvf_cpu_level level)
{
    kvf_backend *b;
    unsigned flags = kvf_cpu_detect();
    kvf_cpu_level best;
    cr_assert_eq(kvf_cpu_level_parse(&best, "auto", flags, &err), KVF_OK);
    if (level > best) return NULL;
    if (!threads) cr_assert_eq(kvf_threads_open(&threads, 2, &kvf_mem_default, &err), KVF_OK);
    kvf_cpu_backend_params p = { .level = level, .flags = flags, .threads = threads, .mem = &kvf_mem_default };
    cr_assert_eq(kvf_cpu_backend_open(&b, &p, &err), KVF_OK);
    return b;
}

#define FOR_LEVELS(b)                                                                       \
    for (int level_ = KVF_CPU_LEVEL_REF; level_ <= KVF_CPU_LEVEL_AMX; level_++)             \
        for (kvf_backend *b = open_level((kvf_cpu_level)level_); b; b->ops->close(b), b = NULL)

static void make_digests(kvf_backend *b, const world *w, const kvf_digest *g, uint8_t *out, const void **rows)
{
    size_t bytes = kvf_digest_bytes(g);
    kvf_digest_args a[N_BLOCK];
    for (int32_t i = 0; i < N_BLOCK; i++) {
        a[i] = (kvf_digest_args){ .kv = &w->view, .slot = w->slots[i], .n_tok = KVF_BLOCK, .digest = g, .out = out + (size_t)i * bytes };
        rows[i] = a[i].out;
    }
    cr_assert_eq(b->ops->digest(b, a, N_BLOCK, &err), KVF_OK, "%s", err.msg);
}

/* The digest's idea of key t of a head, channel c. */
static double decoded(const kvf_digest *g, const uint8_t *row, int32_t head, int32_t t, int32_t c)
{
    size_t d = (size_t)g->head_dim, group = 4 * d + 64 * d * (size_t)g->bits / 8, at;
    int32_t bit;
    const uint8_t *p = row + (size_t)head * kvf_digest_head_bytes(g) + (size_t)(t / 64) * group;
    kvf_f16 lo, step;
    memcpy(&lo, p + 2 * c, 2);
    memcpy(&step, p + 2 * (d + (size_t)c), 2);
    kvf_digest_code_at(g, t % 64, c, &at, &bit);
    return (double)kvf_f32_from_f16(lo) + (p[4 * d + at] >> bit & ((1 << g->bits) - 1)) * (double)kvf_f32_from_f16(step);
}

static double vector_at(const kvf_digest *g, const uint8_t *row, int32_t head, int32_t i)
{
    kvf_f16 x;
    memcpy(&x, row + (size_t)head * kvf_digest_head_bytes(g) + 2 * (size_t)i, 2);
    return (double)kvf_f32_from_f16(x);
}

static double naive_score(const world *w, const kvf_digest *g, const uint8_t *row, const float *q, int32_t head, int32_t unit, int32_t u)
{
    double best = -INFINITY;
    int32_t step = g->kind == KVF_DIGEST_BITS ? 1 : g->sub, d = w->d, n = KVF_BLOCK / (g->kind == KVF_DIGEST_BITS ? 1 : g->sub);
    for (int32_t t = u * unit; t < (u + 1) * unit; t += step) {
        double s = 0;
        for (int32_t c = 0; c < d; c++) {
            if (g->kind == KVF_DIGEST_BITS) {
                s += (double)q[c] * decoded(g, row, head, t, c);
            } else if (g->kind == KVF_DIGEST_MEAN) {
                s += (double)q[c] * vector_at(g, row, head, t / step * d + c);
            } else {
                double a = (double)q[c] * vector_at(g, row, head, t / step * d + c), b = (double)q[c] * vector_at(g, row, head, (n + t / step) * d + c);
                s += a > b ? a : b;
            }
        }
        if (s > best) best = s;
    }
    return best;
}

typedef struct vote_case {
    kvf_digest g;
    int32_t unit;
    int64_t unit0, n_unit, n_q;
    kvf_vote_rule rule;
} vote_case;

static void naive_vote(const world *w, const vote_case *v, const void *const *rows, double *out)
{
    int64_t pool = v->rule.pool, n = (v->n_q + pool - 1) / pool;
    int32_t group = w->n_head / w->n_head_kv, sets = v->rule.per_kv_head ? w->n_head_kv : 1;
    double *s = malloc((size_t)v->n_unit * sizeof *s), *best = malloc((size_t)v->n_unit * sizeof *best);
    memset(out, 0, (size_t)(sets * v->n_unit) * sizeof *out);
    for (int32_t h = 0; h < w->n_head; h++) {
        for (int64_t u = 0; u < v->n_unit; u++) best[u] = v->rule.max_queries ? -INFINITY : 0;
        for (int64_t i = 0; i < n; i++) {
            float q[MAX_D] = { 0 };
            double lse = 0, sum, max;
            int64_t m = v->n_q - i * pool < pool ? v->n_q - i * pool : pool;
            for (int64_t k = 0; k < m; k++) {
                for (int32_t c = 0; c < w->d; c++) q[c] += w->q[((i * pool + k) * w->n_head + h) * w->d + c] / (float)m;
                lse += (double)w->lse[(i * pool + k) * w->n_head + h] / (double)m;
            }
            max = v->rule.kind == KVF_VOTE_GATE ? lse : -INFINITY;
            for (int64_t u = 0; u < v->n_unit; u++) {
                int64_t at = (v->unit0 + u) * v->unit;
                s[u] = 0.125 * naive_score(w, &v->g, rows[at / KVF_BLOCK], q, h / group, v->unit, (int32_t)(at % KVF_BLOCK / v->unit));
                if (s[u] > max) max = s[u];
            }
            sum = v->rule.kind == KVF_VOTE_GATE ? exp(lse - max) : 0;
            for (int64_t u = 0; u < v->n_unit; u++) sum += exp(s[u] - max);
            for (int64_t u = 0; u < v->n_unit; u++) {
                double x = v->rule.kind == KVF_VOTE_LIN ? s[u] : exp(s[u] - max) / sum;
                best[u] = v->rule.max_queries ? fmax(best[u], x) : best[u] + x / (double)n;
            }
        }
        for (int64_t u = 0; u < v->n_unit; u++) out[(sets > 1 ? h / group : 0) * v->n_unit + u] += best[u];
    }
    free(s);
    free(best);
}

static void check_vote(kvf_backend *b, const world *w, const vote_case *v, double tolerance)
{
    uint8_t *digests = malloc(N_BLOCK * kvf_digest_bytes(&v->g));
    const void *rows[N_BLOCK];
    int32_t sets = v->rule.per_kv_head ? w->n_head_kv : 1;
    float *got = malloc((size_t)(sets * v->n_unit) * sizeof *got);
    double *want = malloc((size_t)(sets * v->n_unit) * sizeof *want), spread = 0, mean = 0;
    make_digests(b, w, &v->g, digests, rows);
    kvf_vote_args a = { .q = w->q, .lse = w->lse, .n_q = v->n_q, .scale = 0.125f, .digest = &v->g, .rows = rows, .unit = v->unit,
                        .unit0 = v->unit0, .n_unit = v->n_unit, .rule = v->rule, .vote = got };
    cr_assert_eq(b->ops->vote(b, &a, &err), KVF_OK, "%s", err.msg);
    naive_vote(w, v, rows, want);
    for (int64_t i = 0; i < sets * v->n_unit; i++) mean += want[i] / (double)(sets * v->n_unit);
    for (int64_t i = 0; i < sets * v->n_unit; i++) spread = fmax(spread, fabs(want[i] - mean));
    for (int64_t i = 0; i < sets * v->n_unit; i++)
        cr_assert(fabs((double)got[i] - want[i]) <= tolerance * spread + 1e-6,
                  "kind %d bits %d sub %d unit %d rule %d max %d sets %d pool %d q %lld: unit %lld is %g, not %g (spread %g)", (int)v->g.kind,
                  v->g.bits, v->g.sub, v->unit, (int)v->rule.kind, v->rule.max_queries, sets, v->rule.pool, (long long)v->n_q,
                  (long long)i, (double)got[i], want[i], spread);
    free(digests);
    free(got);
    free(want);
}

Test(votes, every_kind_of_digest_and_rule_is_its_formula)
{
    static const int32_t shapes[][3] = { { 14, 2, 64 }, { 4, 4, 32 }, { 6, 1, 128 }, { 24, 1, 96 }, { 2, 1, 256 } };
    static const kvf_digest kinds[] = { { .kind = KVF_DIGEST_BITS, .bits = 1 }, { .kind = KVF_DIGEST_BITS, .bits = 2 },
                                        { .kind = KVF_DIGEST_BITS, .bits = 4 }, { .kind = KVF_DIGEST_MEAN, .sub = 8 },
                                        { .kind = KVF_DIGEST_MEAN, .sub = 16 }, { .kind = KVF_DIGEST_BOUNDS, .sub = 4 } };
    FOR_LEVELS(b)
    {
        int turn = 0;
        for (size_t s = 0; s < 5; s++) {
            world w = make(shapes[s][0], shapes[s][1], shapes[s][2]);
            view(&w);
            for (size_t k = 0; k < 6; k++, turn++) {
                vote_case v = { .g = kinds[k], .unit = 16 << turn % 4, .n_q = turn % 3 == 0 ? 1 : turn % 3 == 1 ? 5 : 40 };
                v.g.n_head = w.n_head;
                v.g.n_head_kv = w.n_head_kv;
                v.g.head_dim = w.d;
                v.unit0 = turn % 5;
                v.n_unit = N_BLOCK * KVF_BLOCK / v.unit - v.unit0 - turn % 2;
                v.rule = (kvf_vote_rule){ (kvf_vote_kind)(turn % 3), turn % 2, turn % 4 == 1, turn % 4 == 3 ? 8 : 1 };
                bool bits = v.g.kind == KVF_DIGEST_BITS && level_ > KVF_CPU_LEVEL_REF; /* queries in 8 bits */
                check_vote(b, &w, &v, bits ? 0.04 : 2e-4);
            }
            drop(&w);
        }
    }
}

Test(votes, more_queries_than_a_batch_and_a_head_that_looks_at_nothing_else)
{
    FOR_LEVELS(b)
    {
        world w = make(14, 2, 64);
        view(&w);
        for (int i = 0; i < 14; i++) w.lse[i] = -INFINITY;
        vote_case v = { .g = { .kind = KVF_DIGEST_MEAN, .sub = 32, .n_head = 14, .n_head_kv = 2, .head_dim = 64 }, .unit = 32,
                        .unit0 = 4, .n_unit = 32, .n_q = 70, .rule = { KVF_VOTE_GATE, true, false, 1 } };
        check_vote(b, &w, &v, 2e-4);
        drop(&w);
    }
}

Test(votes, digests_are_the_same_bytes_on_every_processor)
{
    static const kvf_digest kinds[] = { { .kind = KVF_DIGEST_BITS, .bits = 2 }, { .kind = KVF_DIGEST_MEAN, .sub = 32 }, { .kind = KVF_DIGEST_BOUNDS, .sub = 8 } };
    world w = make(14, 2, 64);
    view(&w);
    for (size_t k = 0; k < 3; k++) {
        kvf_digest g = kinds[k];
        g.n_head = 14, g.n_head_kv = 2, g.head_dim = 64;
        uint8_t *first = NULL, *now = malloc(N_BLOCK * kvf_digest_bytes(&g));
        const void *rows[N_BLOCK];
        FOR_LEVELS(b)
        {
            make_digests(b, &w, &g, now, rows);
            if (!first) {
                first = malloc(N_BLOCK * kvf_digest_bytes(&g));
                memcpy(first, now, N_BLOCK * kvf_digest_bytes(&g));
            }
            cr_assert_arr_eq(first, now, N_BLOCK * kvf_digest_bytes(&g));
        }
        free(first);
        free(now);
    }
    drop(&w);
}

Test(votes, two_bits_rank_keys_as_the_keys_themselves_do)
{
    world w = make(14, 2, 64);
    view(&w);
    kvf_backend *b = open_level(KVF_CPU_LEVEL_REF);
    kvf_digest g = { .kind = KVF_DIGEST_BITS, .bits = 2, .n_head = 14, .n_head_kv = 2, .head_dim = 64 };
    uint8_t *digests = malloc(N_BLOCK * kvf_digest_bytes(&g));
    const void *rows[N_BLOCK];
    make_digests(b, &w, &g, digests, rows);
    int right = 0, all = 0;
    for (int32_t h = 0; h < 14; h++) {
        double best = -INFINITY, near = -INFINITY;
        int32_t at = 0, near_at = 0;
        for (int32_t t = 0; t < N_BLOCK * KVF_BLOCK; t++) {
            double s = 0, a = 0;
            for (int32_t c = 0; c < 64; c++) {
                s += (double)w.q[h * 64 + c] * (double)kvf_f32_from_f16(key(&w, t / KVF_BLOCK, h / 7, t % KVF_BLOCK)[c]);
                a += (double)w.q[h * 64 + c] * decoded(&g, rows[t / KVF_BLOCK], h / 7, t % KVF_BLOCK, c);
            }
            if (s > best) best = s, at = t;
            if (a > near) near = a, near_at = t;
        }
        double s = 0;
        for (int32_t c = 0; c < 64; c++) s += (double)w.q[h * 64 + c] * (double)kvf_f32_from_f16(key(&w, near_at / KVF_BLOCK, h / 7, near_at % KVF_BLOCK)[c]);
        right += at == near_at || s > best - 3.0;
        all++;
    }
    cr_assert_geq(right, all - 2);
    b->ops->close(b);
    free(digests);
    drop(&w);
}

Test(votes, mass_is_the_share_of_every_key)
{
    static const int32_t shapes[][3] = { { 14, 2, 64 }, { 4, 4, 32 }, { 16, 1, 40 }, { 24, 1, 64 } };
    FOR_LEVELS(b)
    {
        for (int turn = 0; turn < 12; turn++) {
            world w = make(shapes[turn % 4][0], shapes[turn % 4][1], shapes[turn % 4][2]);
            view(&w);
            int64_t n_q = turn % 3 == 0 ? 1 : 37, n_key = N_BLOCK * KVF_BLOCK - 30, rows = turn % 2 ? w.n_head : 1;
            uint8_t valid[2 * N_BLOCK];
            for (int i = 0; i < N_BLOCK; i++) valid[2 * i] = (uint8_t)(i % 3 * 16), valid[2 * i + 1] = (uint8_t)(i == 4 ? 32 : 128);
            kvf_attn_args t = { .q = w.q, .lse = w.lse, .n_tok = n_q, .n_head = w.n_head, .n_head_kv = w.n_head_kv, .head_dim = w.d,
                                .scale = 0.125f, .softcap = turn == 5 ? 20 : 0, .kv = &w.view, .slots = w.slots, .n_key = n_key,
                                .q_first = n_key - n_q - 50, .window = turn % 4 == 1 ? 200 : 0, .valid = turn % 4 == 2 ? valid : NULL };
            for (int i = 0; i < MAX_Q * w.n_head; i++) w.lse[i] = 60; /* keys have large offsets: keep exp small */
            w.lse[0] = -INFINITY;
            size_t n = (size_t)(rows * N_BLOCK * KVF_BLOCK);
            float *got = calloc(n, sizeof *got);
            double *want = calloc(n, sizeof *want);
            kvf_attn_mass_args a = { .attn = &t, .sum_heads = rows == 1, .mass = got };
            cr_assert_eq(b->ops->attn_mass(b, &a, &err), KVF_OK, "%s", err.msg);
            for (int64_t i = 0; i < n_q; i++)
                for (int32_t h = 0; h < w.n_head; h++)
                    for (int64_t j = 0; j < n_key; j++) {
                        int64_t last = t.q_first + i, e = j / KVF_BLOCK, p = j % KVF_BLOCK;
                        if (j > last || (t.window && j <= last - t.window)) continue;
                        if (t.valid && (p < valid[2 * e] || p >= valid[2 * e + 1])) continue;
                        if (i * w.n_head + h == 0) continue;
                        double s = 0;
                        const kvf_f16 *k = key(&w, (int32_t)e, h / (w.n_head / w.n_head_kv), (int32_t)p);
                        for (int32_t c = 0; c < w.d; c++) s += 0.125 * (double)w.q[(i * w.n_head + h) * w.d + c] * (double)kvf_f32_from_f16(k[c]);
                        if (t.softcap > 0) s = (double)t.softcap * tanh(s / (double)t.softcap);
                        want[(rows > 1 ? h : 0) * N_BLOCK * KVF_BLOCK + j] += exp(s - 60);
                    }
            for (size_t i = 0; i < n; i++)
                cr_assert(fabs((double)got[i] - want[i]) <= 2e-4 * want[i] + 1e-35, "level %d turn %d key %zu: %g, not %g", level_, turn, i, (double)got[i], want[i]);
            free(got);
            free(want);
            drop(&w);
        }
    }
}

Test(votes, a_rotated_copy_made_in_pieces_is_the_same_bits)
{
    FOR_LEVELS(b)
    {
        world w = make(4, 2, 64);
        view(&w);
        static float angles[300 * 64];
        for (int i = 0; i < 300; i++)
            for (int c = 0; c < 32; c++) {
                angles[i * 64 + c] = cosf((float)i * 0.01f * (float)(c + 1));
                angles[i * 64 + 32 + c] = sinf((float)i * 0.01f * (float)(c + 1));
            }
        const int32_t src[3] = { 0, 1, 2 }, whole[3] = { 3, 4, 5 }, pieces[3] = { 6, 7, 8 };
        kvf_kv_turn_args a = { .kv = &w.view, .src = src, .dst = whole, .first = 20, .n_tok = 300, .n_head_kv = 2, .head_dim = 64,
                               .n_rot = 64, .cos_sin = angles, .kind = KVF_ROPE_NEOX };
        cr_assert_eq(b->ops->kv_turn(b, &a, &err), KVF_OK);
        a.dst = pieces;
        for (int64_t i = 0; i < 300; i += a.n_tok) {
            a.first = 20 + i;
            a.n_tok = 300 - i < 77 ? 300 - i : 77;
            a.cos_sin = angles + i * 64;
            cr_assert_eq(b->ops->kv_turn(b, &a, &err), KVF_OK);
        }
        for (int64_t j = 20; j < 320; j++)
            for (int h = 0; h < 4; h++) { /* two heads of keys, two of values */
                const kvf_f16 *x = (const kvf_f16 *)kvf_kv_slot(&w.view, whole[j / 128]) + (h * 128 + j % 128) * 64;
                const kvf_f16 *y = (const kvf_f16 *)kvf_kv_slot(&w.view, pieces[j / 128]) + (h * 128 + j % 128) * 64;
                const kvf_f16 *raw = (const kvf_f16 *)kvf_kv_slot(&w.view, src[j / 128]) + (h * 128 + j % 128) * 64;
                cr_assert_arr_eq(x, y, 128);
                if (h >= 2) cr_assert_arr_eq(x, raw, 128);
                for (int c = 0; h < 2 && c < 32; c++) {
                    const float *t = angles + (j - 20) * 64;
                    float k = kvf_f32_from_f16(raw[c]), l = kvf_f32_from_f16(raw[c + 32]), want = k * t[c] - l * t[c + 32];
                    cr_assert_float_eq(kvf_f32_from_f16(x[c]), want, 1e-3f * (fabsf(k) + fabsf(l)));
                }
            }
        drop(&w);
    }
}
