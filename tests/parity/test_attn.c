/* test_attn.c - attention of every level against attn_ref.c: prefill form, decode form, splits, lists
 * with holes, and the op itself over some of the heads.
 *
 * Slots lie shuffled over several exactly sized slabs, and every place that holds no key is a NaN, in K
 * and V: reading too far shows under ASan, using what was read shows everywhere.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_ops.h"

#define MAX_BLOCKS 8
#define SLAB_SHIFT 1

typedef enum holes { NO_HOLES, RANDOM_HOLES, ONLY_HOLES } holes;

typedef struct shape {
    int64_t n_tok, n_key, q_first, window;
    int32_t group, n_head_kv, head_dim;
    float softcap;
    float logit; /* standard deviation of the scores, about */
    holes holes;
    bool gaps;    /* first key of each query given instead of a window */
    bool places;  /* and where each query stands */
} shape;

typedef struct world {
    kvf_attn_args a;
    kvf_kv_view view;
    void *slab[MAX_BLOCKS];
    int32_t slots[MAX_BLOCKS];
    uint8_t valid[MAX_BLOCKS * 2];
    int32_t first[160], place[160];
    float *q, *o, *lse, *want_o, *want_lse;
    double tol_o, tol_lse;
} world;

static uint64_t rng = 1;

static uint32_t rnd(void)
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(rng >> 33);
}

static float rnd_unit(void) { return (float)rnd() / 1073741824.0f - 1.0f; } /* -1..1 */

static void *get(size_t bytes)
{
    void *p = kvf_alloc_raw(&kvf_mem_default, bytes ? bytes : 1, 1);
    cr_assert_not_null(p);
    return p;
}

/* Entries whole, empty, or a run of eighths; the last may end anywhere, past n_key too. */
static void make_holes(world *w, const shape *s, int32_t n_block)
{
    for (int32_t i = 0; i < n_block; i++) {
        uint8_t *v = w->valid + 2 * i;
        uint32_t x = rnd() % 17, y = rnd() % 17, kind = rnd() % 8;
        v[0] = (uint8_t)(8 * (x < y ? x : y));
        v[1] = (uint8_t)(8 * (x < y ? y : x));
        if (i == n_block - 1) v[1] = (uint8_t)(v[0] + rnd() % (uint32_t)(KVF_BLOCK + 1 - v[0]));
        if (s->holes == NO_HOLES || kind == 0) v[0] = 0, v[1] = KVF_BLOCK;
        if (s->holes == ONLY_HOLES || (s->holes == RANDOM_HOLES && kind == 1)) v[1] = v[0];
    }
}

static bool held(const world *w, int64_t key)
{
    const uint8_t *v = w->valid + key / KVF_BLOCK * 2;
    return key % KVF_BLOCK >= v[0] && key % KVF_BLOCK < v[1];
}

static void fill_kv(world *w, const shape *s)
{
    int32_t n_block = (int32_t)((s->n_key + KVF_BLOCK - 1) / KVF_BLOCK), n_slab = n_block / 2 + 1;
    size_t halves = (size_t)2 * (size_t)s->n_head_kv * KVF_BLOCK * (size_t)s->head_dim;
    cr_assert_leq(n_block, MAX_BLOCKS);
    w->view = (kvf_kv_view){ .slab = w->slab, .shift = SLAB_SHIFT, .slot_bytes = halves * 2 };
    for (int32_t i = 0; i < n_slab; i++) {
        kvf_f16 *p = w->slab[i] = get(w->view.slot_bytes << SLAB_SHIFT);
        for (size_t j = 0; j < halves << SLAB_SHIFT; j++) p[j] = j & 1 ? 0x7e00 : 0xfdff;
    }
    for (int32_t i = 0; i < n_block; i++) w->slots[i] = i;
    for (int32_t i = 0; i < n_block; i++) {
        int32_t j = i + (int32_t)(rnd() % (uint32_t)(2 * n_slab - i)), t = w->slots[i];
        if (j >= n_block) { /* a slot that no block of the list has yet */
            bool taken = false;
            for (int32_t k = 0; k < n_block; k++) taken |= w->slots[k] == j;
            if (!taken) w->slots[i] = j;
            continue;
        }
        w->slots[i] = w->slots[j];
        w->slots[j] = t;
    }
    make_holes(w, s, n_block);
    for (int64_t key = 0; key < s->n_key; key++) {
        if (!held(w, key)) continue;
        kvf_f16 *slot = kvf_kv_slot(&w->view, w->slots[key / KVF_BLOCK]);
        for (int64_t h = 0; h < 2 * s->n_head_kv; h++)
            for (int32_t i = 0; i < s->head_dim; i++)
                slot[(h * KVF_BLOCK + key % KVF_BLOCK) * s->head_dim + i] = kvf_f16_from_f32(rnd_unit());
    }
}

static void part_run(const kvf_cpu_ops *ops, bool decode, kvf_attn_part part)
{
    const kvf_attn_args *a = part.a;
    int64_t n_tok = part.tok1 - part.tok0;
    part.scratch = get(decode ? ops->attn_decode_scratch_bytes(a, n_tok) : ops->attn_scratch_bytes(a, n_tok));
    (decode ? ops->attn_decode : ops->attn)(&part);
    kvf_free(&kvf_mem_default, part.scratch);
}

/* The whole op in parts of `tile` tokens. */
static void run(const kvf_cpu_ops *ops, bool decode, const kvf_attn_args *a, int64_t tile)
{
    for (int32_t h = 0; h < a->n_head_kv; h++)
        for (int64_t t = 0; t < a->n_tok; t += tile)
            part_run(ops, decode,
                     (kvf_attn_part){ .a = a,
                                      .head_kv = h,
                                      .tok0 = t,
                                      .key0 = 0,
                                      .key1 = a->n_key,
                                      .tok1 = t + tile < a->n_tok ? t + tile : a->n_tok });
}

/* Inputs, and the reference's results. */
static void make(world *w, const shape *s)
{
    memset(w, 0, sizeof *w);
    int32_t n_head = s->group * s->n_head_kv;
    size_t rows = (size_t)s->n_tok * (size_t)n_head, n = rows * (size_t)s->head_dim;
    fill_kv(w, s);
    w->q = get(n * sizeof(float));
    w->o = get(n * sizeof(float));
    w->want_o = get(n * sizeof(float));
    w->lse = get(rows * sizeof(float));
    w->want_lse = get(rows * sizeof(float));
    for (size_t i = 0; i < n; i++) w->q[i] = rnd_unit() * 3.0f;
    float scale = s->logit / sqrtf((float)s->head_dim);
    w->a = (kvf_attn_args){ .q = w->q,
                            .o = w->want_o,
                            .lse = w->want_lse,
                            .n_tok = s->n_tok,
                            .n_head = n_head,
                            .n_head_kv = s->n_head_kv,
                            .head_dim = s->head_dim,
                            .scale = scale,
                            .softcap = s->softcap,
                            .kv = &w->view,
                            .slots = w->slots,
                            .n_key = s->n_key,
                            .q_first = s->q_first,
                            .window = s->window,
                            .valid = s->holes == NO_HOLES ? NULL : w->valid };
    if (s->gaps) {
        int64_t at = 0;
        for (int64_t i = 0; i < s->n_tok; i++) { /* some see nothing, some the same as the one before */
            if (rnd() % 3) at += rnd() % (uint32_t)(2 + 2 * s->n_key / s->n_tok);
            w->first[i] = (int32_t)at;
        }
        w->a.first = w->first;
        w->a.window = 0;
    }
    if (s->places) {
        int64_t at = s->q_first / 3;
        for (int64_t i = 0; i < s->n_tok; i++, at++) {
            if (rnd() % 2) at += rnd() % (uint32_t)(2 + 2 * s->n_key / s->n_tok);
            w->place[i] = (int32_t)at;
        }
        w->a.place = w->place;
    }
    kvf_cpu_ops ref;
    kvf_cpu_ops_init(&ref, KVF_CPU_LEVEL_REF, 0);
    run(&ref, false, &w->a, 7);
    w->a.o = w->o;
    w->a.lse = w->lse;
}

static void drop(world *w)
{
    for (int i = 0; i < MAX_BLOCKS; i++) kvf_free(&kvf_mem_default, w->slab[i]);
    kvf_free(&kvf_mem_default, w->q);
    kvf_free(&kvf_mem_default, w->o);
    kvf_free(&kvf_mem_default, w->lse);
    kvf_free(&kvf_mem_default, w->want_o);
    kvf_free(&kvf_mem_default, w->want_lse);
}

static void wipe(world *w)
{
    size_t rows = (size_t)w->a.n_tok * (size_t)w->a.n_head;
    memset(w->o, 0xff, rows * (size_t)w->a.head_dim * sizeof(float));
    memset(w->lse, 0xff, rows * sizeof(float));
}

/* Largest distance to the reference, NaN counting as infinite; -inf must meet -inf. */
static double distance(const float *got, const float *want, size_t n)
{
    double worst = 0.0;
    for (size_t i = 0; i < n; i++) {
        if (got[i] == want[i]) continue;
        double d = fabs((double)got[i] - (double)want[i]);
        if (!(d <= worst)) worst = isfinite(d) ? d : INFINITY;
    }
    return worst;
}

/* f32 kernels: rounding of a score is 1e-6 of its size and a relative error of p; |v| <= 1. The AMX prefill
 * multiplies in bf16 (8 bits), with fp32 sums. That of AVX-512 with BF16 has lse and scores of f32; whatever they are,
 * o is off by 2^-9 of v and, since p is off by 2^-9 and divided by its own sum, 2^-9 of v - o: 6e-3. */
static void check(const world *w, const kvf_cpu_ops *ops, bool decode, const shape *s, const char *what)
{
    size_t rows = (size_t)w->a.n_tok * (size_t)w->a.n_head, n = rows * (size_t)w->a.head_dim;
    const char *name = decode ? ops->attn_decode_name : ops->attn_name;
    bool amx = strcmp(name, "amx_bf16") == 0, pv = strcmp(name, "avx512_bf16") == 0;
    double rounding = amx ? 1e-2 : 2e-6, tol = rounding * (1.0 + 4.0 * (double)s->logit) + (pv ? 6e-3 : 0.0);
    double d_o = distance(w->o, w->want_o, n), d_lse = distance(w->lse, w->want_lse, rows);
    if (tol > 2.0) tol = 2.0; /* one winner may become another: still an average of values */
    cr_assert(d_o <= tol && d_lse <= rounding * (4.0 + 8.0 * (double)s->logit),
              "%s %s: o off by %g (%g), lse by %g; n_tok %lld n_key %lld q_first %lld window %lld group %d "
              "kv %d d %d "
              "softcap %g logit %g holes %d",
              name, what, d_o, tol, d_lse, (long long)s->n_tok, (long long)s->n_key,
              (long long)s->q_first, (long long)s->window, s->group, s->n_head_kv, s->head_dim,
              (double)s->softcap, (double)s->logit, (int)s->holes);
}

/* What this processor runs: every level, and AVX-512 without BF16 too. Ends with name NULL. */
typedef struct cpu {
    const char *name;
    kvf_cpu_level level;
    unsigned flags;
} cpu;

static const cpu *cpus(void)
{
    static cpu all[6];
    unsigned flags = kvf_cpu_detect(), bf16 = KVF_CPU_AVX512_BF16;
    kvf_cpu_level best = KVF_CPU_LEVEL_REF;
    cr_assert_eq(kvf_cpu_level_parse(&best, "auto", flags, NULL), KVF_OK);
    int n = 0;
    for (kvf_cpu_level level = KVF_CPU_LEVEL_REF; level <= best; level++) {
        all[n++] = (cpu){ kvf_cpu_level_name(level), level, flags };
        if (level == KVF_CPU_LEVEL_AVX512 && flags & bf16)
            all[n++] = (cpu){ "avx512 without bf16", level, flags & ~bf16 };
    }
    return all;
}

/* Both forms of every kernel on one shape. */
static void try_shape(const shape *s)
{
    world w;
    make(&w, s);
    for (const cpu *c = cpus(); c->name; c++) {
        kvf_cpu_ops ops;
        kvf_cpu_ops_init(&ops, c->level, c->flags);
        wipe(&w);
        run(&ops, false, &w.a, ops.attn_tile(&w.a));
        check(&w, &ops, false, s, "prefill");
        wipe(&w);
        run(&ops, true, &w.a, ops.attn_decode_max);
        check(&w, &ops, true, s, "decode");
    }
    drop(&w);
}

static const int64_t n_toks[] = { 1, 2, 5, 8, 9, 33, 130 }, n_keys[] = { 1, 127, 128, 129, 700 };
static const int64_t windows[] = { 0, 1, 5, 128, 300 };
static const int32_t groups[] = { 7, 1, 6, 2, 3 }, dims[] = { 64, 128, 8, 96, 80, 256, 72 };

Test(attn, every_level_equals_the_reference)
{
    unsigned turn = 0;
    for (size_t t = 0; t < 7; t++)
        for (size_t k = 0; k < 5; k++)
            for (size_t i = 0; i < 5; i++, turn++) {
                shape s = { .n_tok = n_toks[t],
                            .n_key = n_keys[k],
                            .window = windows[i],
                            .logit = 2.0f,
                            .group = groups[turn % 5],
                            .head_dim = dims[turn % 7],
                            .n_head_kv = 1 + (turn % 4 == 0),
                            .softcap = turn % 3 == 1 ? 30.0f : 0.0f };
                int64_t end = s.n_key - s.n_tok;
                s.q_first = turn % 4 == 3 ? s.n_key + 40 : turn % 4 == 2 ? s.n_key - s.n_tok / 2 : end;
                if (s.q_first < 0) s.q_first = 0;
                if (s.n_tok * s.n_key > 20000) s.group = s.n_head_kv = 1, s.head_dim = 64;
                try_shape(&s);
            }
}

Test(attn, holes_are_not_read_at_any_level)
{
    unsigned turn = 0;
    for (size_t t = 0; t < 7; t++)
        for (size_t k = 0; k < 5; k++)
            for (size_t i = 0; i < 5; i++, turn++) {
                shape s = { .n_tok = n_toks[t],
                            .n_key = i == 2 ? 1000 : n_keys[k],
                            .window = windows[(t + k + i) % 5],
                            .logit = 2.0f,
                            .group = groups[(turn + k) % 5],
                            .head_dim = dims[(turn + t) % 7],
                            .n_head_kv = 1 + (turn % 4 == 1),
                            .softcap = turn % 3 == 1 ? 30.0f : 0.0f,
                            .holes = turn % 16 == 7 ? ONLY_HOLES : RANDOM_HOLES };
                s.q_first = turn % 3 == 0 ? s.n_key + 40 : turn % 3 == 1 ? s.n_key / 3 : s.n_key - s.n_tok;
                if (s.q_first < 0) s.q_first = 0;
                if (s.n_tok * s.n_key > 12000) s.group = s.n_head_kv = 1, s.head_dim = turn % 2 ? 64 : 40;
                try_shape(&s);
            }
}

Test(attn, places_and_first_keys_of_each_query_are_kept_at_every_level)
{
    unsigned turn = 0;
    for (size_t t = 0; t < 7; t++)
        for (size_t k = 0; k < 5; k++, turn++) {
            shape s = { .n_tok = n_toks[t],
                        .n_key = turn % 5 == 2 ? 1000 : n_keys[k],
                        .logit = 2.0f,
                        .group = groups[(turn + k) % 5],
                        .head_dim = dims[(turn + t) % 7],
                        .n_head_kv = 1 + (turn % 4 == 1),
                        .softcap = turn % 3 == 1 ? 30.0f : 0.0f,
                        .holes = turn % 4 == 3 ? RANDOM_HOLES : NO_HOLES,
                        .window = windows[(t + k) % 5],
                        .gaps = turn % 3 != 2,
                        .places = turn % 3 > 0 };
            s.q_first = turn % 3 == 0 ? s.n_key + 40 : s.n_key - s.n_tok;
            if (s.q_first < 0) s.q_first = 0;
            if (s.n_tok * s.n_key > 20000) s.group = s.n_head_kv = 1, s.head_dim = turn % 2 ? 64 : 40;
            try_shape(&s);
        }
}

Test(attn, first_keys_that_make_a_window_give_the_window_s_bits)
{
    for (const cpu *c = cpus(); c->name; c++) {
        for (int form = 0; form < 2; form++) {
            shape s = { .n_tok = form ? 4 : 100, .n_key = 700, .q_first = 600, .window = 77, .group = 3, .n_head_kv = 2, .head_dim = 64, .logit = 2 };
            world w;
            kvf_cpu_ops ops;
            make(&w, &s);
            kvf_cpu_ops_init(&ops, c->level, c->flags);
            run(&ops, form, &w.a, form ? ops.attn_decode_max : ops.attn_tile(&w.a));
            size_t n = (size_t)s.n_tok * 6 * 64;
            memcpy(w.want_o, w.o, n * sizeof(float));
            for (int32_t i = 0; i < s.n_tok; i++) w.first[i] = 600 + i - 76;
            w.a.first = w.first;
            w.a.window = 0;
            wipe(&w);
            run(&ops, form, &w.a, form ? ops.attn_decode_max : ops.attn_tile(&w.a));
            cr_assert_arr_eq(w.o, w.want_o, n * sizeof(float), "%s", c->name);
            drop(&w);
        }
    }
}

/* The backend makes parts of 16 tokens or more, by the number of threads. */
Test(attn, parts_of_a_prefill_do_not_change_its_bits)
{
    for (int i = 0; i < 8; i++) {
        shape s = { .n_tok = 150,
                    .n_key = 619 + i,
                    .q_first = i % 2 ? 900 : 470 + i,
                    .window = i % 3 ? 0 : 101,
                    .group = groups[i % 5],
                    .n_head_kv = 1,
                    .head_dim = i % 2 ? 64 : 72,
                    .logit = 2,
                    .softcap = i % 4 == 3 ? 30.0f : 0.0f,
                    .holes = i > 3 ? RANDOM_HOLES : NO_HOLES };
        world w;
        make(&w, &s);
        for (const cpu *c = cpus(); c->name; c++) {
            kvf_cpu_ops ops;
            kvf_cpu_ops_init(&ops, c->level, c->flags);
            size_t rows = (size_t)s.n_tok * (size_t)s.group, n = rows * (size_t)s.head_dim;
            run(&ops, false, &w.a, 160);
            memcpy(w.want_o, w.o, n * sizeof(float));
            memcpy(w.want_lse, w.lse, rows * sizeof(float));
            for (int64_t tile = 16; tile < 96; tile += 32) {
                wipe(&w);
                run(&ops, false, &w.a, tile);
                cr_assert_arr_eq(w.o, w.want_o, n * sizeof(float), "%s, parts of %d", c->name, (int)tile);
                cr_assert_arr_eq(w.lse, w.want_lse, rows * sizeof(float), "%s, parts of %d", c->name, (int)tile);
            }
        }
        drop(&w);
    }
}

Test(attn, only_holes_give_zero_and_minus_infinity)
{
    shape s = { .n_tok = 9, .n_key = 500, .q_first = 600, .group = 7, .n_head_kv = 2, .head_dim = 64, .logit = 1, .holes = ONLY_HOLES };
    world w;
    make(&w, &s);
    for (int i = 0; i < 9 * 14; i++) cr_assert(w.want_lse[i] == -INFINITY);
    for (int i = 0; i < 9 * 14 * 64; i++) cr_assert(w.want_o[i] == 0.0f);
    drop(&w);
    try_shape(&s);
}

Test(attn, long_prefill_of_the_real_models)
{
    const shape s[] = { { .n_tok = 130,
                          .n_key = 700,
                          .q_first = 570,
                          .group = 7,
                          .n_head_kv = 1,
                          .head_dim = 64,
                          .logit = 2 },
                        { .n_tok = 70,
                          .n_key = 300,
                          .q_first = 230,
                          .group = 6,
                          .n_head_kv = 1,
                          .head_dim = 128,
                          .logit = 2 },
                        { .n_tok = 50,
                          .n_key = 600,
                          .q_first = 550,
                          .window = 512,
                          .group = 4,
                          .n_head_kv = 1,
                          .head_dim = 256,
                          .logit = 2 } };
    for (size_t i = 0; i < 3; i++) try_shape(&s[i]);
}

Test(attn, huge_and_equal_logits_stay_finite)
{
    for (int32_t i = 0; i < 14; i++) {
        shape s = { .n_tok = 1 + i % 3 * 4,
                    .n_key = 300,
                    .q_first = i % 2 ? 290 : 400,
                    .group = groups[i % 5],
                    .n_head_kv = 1,
                    .head_dim = dims[i % 7],
                    .logit = i % 2 ? 1e4f : 0.0f,
                    .softcap = i % 4 > 1 ? 30.0f : 0.0f };
        try_shape(&s);
    }
}

/* The formula of kvf_attn_args once more, with visibility decided key by key. */
static void formula(const world *w, int64_t tok, int32_t head, double *o, double *lse)
{
    const kvf_attn_args *a = &w->a;
    int64_t d = a->head_dim, q_at = a->place ? a->place[tok] : a->q_first + tok, plane = KVF_BLOCK * d;
    int64_t head_kv = head / (a->n_head / a->n_head_kv);
    double sum = 0.0;
    for (int64_t i = 0; i < d; i++) o[i] = 0.0;
    for (int64_t j = 0; j < a->n_key; j++) {
        if (!held(w, j) || j > q_at || (a->window > 0 && j <= q_at - a->window)) continue;
        if (a->first && j < a->first[tok]) continue;
        const kvf_f16 *slot = kvf_kv_slot(a->kv, a->slots[j / KVF_BLOCK]);
        const kvf_f16 *k = slot + head_kv * plane + j % KVF_BLOCK * d, *v = k + a->n_head_kv * plane;
        double s = 0.0;
        for (int64_t i = 0; i < d; i++)
            s += (double)a->q[(tok * a->n_head + head) * d + i] * (double)kvf_f32_from_f16(k[i]);
        s *= (double)a->scale;
        double e = exp(a->softcap > 0.0f ? (double)a->softcap * tanh(s / (double)a->softcap) : s);
        sum += e;
        for (int64_t i = 0; i < d; i++) o[i] += e * (double)kvf_f32_from_f16(v[i]);
    }
    for (int64_t i = 0; i < d && sum > 0.0; i++) o[i] /= sum;
    *lse = sum > 0.0 ? log(sum) : -INFINITY;
}

Test(attn, reference_is_the_formula)
{
    for (int i = 0; i < 36; i++) {
        shape s = { .n_tok = 6,
                    .gaps = i >= 24,
                    .places = i >= 18,
                    .n_key = 140,
                    .holes = i < 12 ? NO_HOLES : RANDOM_HOLES,
                    .q_first = 130 + i % 3 * 8,
                    .window = i % 4 * 3,
                    .group = 3,
                    .n_head_kv = 2,
                    .head_dim = 16,
                    .softcap = i % 2 ? 2.0f : 0.0f,
                    .logit = 2 };
        world w;
        make(&w, &s);
        for (int64_t tok = 0; tok < 6; tok++)
            for (int32_t head = 0; head < 6; head++) {
                double o[16], lse;
                int64_t row = tok * 6 + head;
                formula(&w, tok, head, o, &lse);
                cr_assert(w.want_lse[row] == (float)lse || fabs((double)w.want_lse[row] - lse) < 1e-5);
                for (int64_t c = 0; c < 16; c++)
                    cr_assert_float_eq((double)w.want_o[row * 16 + c], o[c], 1e-6, "case %d token %d", i,
                                       (int)tok);
            }
        drop(&w);
    }
}

Test(attn, query_without_keys_gives_zero_and_minus_infinity)
{
    shape none = {
        .n_tok = 9, .n_key = 0, .q_first = 0, .group = 7, .n_head_kv = 2, .head_dim = 64, .logit = 1
    };
    shape far = { .n_tok = 9,
                  .n_key = 200,
                  .q_first = 197,
                  .window = 4,
                  .group = 3,
                  .n_head_kv = 1,
                  .head_dim = 64,
                  .logit = 1 }; /* from the 8th query on the window is past the list */
    world w;
    make(&w, &none);
    for (int i = 0; i < 9 * 14; i++) cr_assert(w.want_lse[i] == -INFINITY);
    for (int i = 0; i < 9 * 14 * 64; i++) cr_assert(w.want_o[i] == 0.0f);
    drop(&w);
    make(&w, &far);
    cr_assert(isfinite(w.want_lse[0]) && w.want_lse[8 * 3] == -INFINITY);
    drop(&w);
    try_shape(&none);
    try_shape(&far);
    far.n_tok = 1, far.q_first = 600;
    try_shape(&far);
}

Test(attn, lse_may_be_left_out)
{
    shape s = {
        .n_tok = 5, .n_key = 140, .q_first = 135, .group = 2, .n_head_kv = 1, .head_dim = 64, .logit = 1
    };
    world w;
    make(&w, &s);
    for (const cpu *c = cpus(); c->name; c++) {
        kvf_cpu_ops ops;
        kvf_cpu_ops_init(&ops, c->level, c->flags);
        for (int decode = 0; decode < 2; decode++) {
            wipe(&w);
            memcpy(w.lse, w.want_lse, 10 * sizeof(float));
            w.a.lse = NULL;
            run(&ops, decode, &w.a, 5);
            check(&w, &ops, decode, &s, "without lse");
        }
    }
    drop(&w);
}

/* Splits at random block ends, some empty, merged in order. */
static void merge_splits(world *w, const kvf_cpu_ops *ops, int n_split)
{
    const kvf_attn_args *a = &w->a;
    int64_t group = a->n_head / a->n_head_kv, n_block = (a->n_key + KVF_BLOCK - 1) / KVF_BLOCK;
    int64_t rows = a->n_tok * group;
    float *o = get((size_t)(rows * a->head_dim) * sizeof *o), *lse = get((size_t)rows * sizeof *lse);
    for (int64_t i = 0; i < a->n_tok * a->n_head; i++) w->lse[i] = -INFINITY;
    for (int32_t h = 0; h < a->n_head_kv; h++) {
        int64_t b0 = 0;
        for (int i = 0; i < n_split; i++) {
            int64_t b1 = i == n_split - 1 ? n_block : b0 + rnd() % (n_block - b0 + 1);
            int64_t key1 = b1 * KVF_BLOCK < a->n_key ? b1 * KVF_BLOCK : a->n_key;
            part_run(ops, true,
                     (kvf_attn_part){ .a = a,
                                      .head_kv = h,
                                      .tok0 = 0,
                                      .tok1 = a->n_tok,
                                      .key0 = b0 * KVF_BLOCK,
                                      .key1 = key1,
                                      .o = o,
                                      .lse = lse });
            for (int64_t r = 0; r < rows; r++) {
                int64_t row = r / group * a->n_head + h * group + r % group;
                ops->lse_merge(w->o + row * a->head_dim, w->lse + row, o + r * a->head_dim, lse + r,
                               a->head_dim);
            }
            b0 = b1;
        }
    }
    kvf_free(&kvf_mem_default, o);
    kvf_free(&kvf_mem_default, lse);
}

Test(attn, merged_splits_equal_the_whole)
{
    for (int i = 0; i < 16; i++) {
        shape s = { .n_tok = 1 + i % 8,
                    .holes = i % 4 == 3 ? RANDOM_HOLES : NO_HOLES,
                    .n_key = 200 + i * 40,
                    .q_first = 200 + i * 40 - (1 + i % 8),
                    .group = groups[i % 5],
                    .n_head_kv = 2,
                    .head_dim = dims[i % 7],
                    .logit = 3,
                    .window = i % 3 ? 0 : 100 };
        world w;
        make(&w, &s);
        for (const cpu *c = cpus(); c->name; c++) {
            kvf_cpu_ops ops;
            kvf_cpu_ops_init(&ops, c->level, c->flags);
            wipe(&w);
            merge_splits(&w, &ops, 1 + i % 8);
            check(&w, &ops, true, &s, "splits");
        }
        drop(&w);
    }
}

/* The op on `threads`, for KV heads h0..h1; what it did not write is NaN (0xff bytes). */
static void run_op(world *w, const cpu *c, bool f32, kvf_threads *threads, int32_t h0, int32_t h1)
{
    kvf_error err;
    kvf_backend *b;
    kvf_cpu_backend_params p = { .level = c->level,
                                 .flags = c->flags,
                                 .f32 = f32,
                                 .threads = threads,
                                 .mem = &kvf_mem_default };
    cr_assert_eq(kvf_cpu_backend_open(&b, &p, &err), KVF_OK);
    wipe(w);
    w->a.head_kv0 = h0;
    w->a.head_kv1 = h1;
    cr_assert_eq(b->ops->attn(b, &w->a, &err), KVF_OK);
    b->ops->close(b);
}

/* Rows of the heads h0..h1 agree with the reference, the others were not written. */
static void check_heads(world *w, const cpu *c, const shape *s, int32_t h0, int32_t h1)
{
    int64_t d = s->head_dim, n_head = w->a.n_head;
    kvf_cpu_ops ops;
    kvf_cpu_ops_init(&ops, c->level, c->flags);
    for (int64_t row = 0; row < s->n_tok * n_head; row++) {
        int64_t head = row % n_head / s->group;
        if (head >= h0 && head < h1) continue;
        for (int64_t i = 0; i < d; i++) cr_assert(isnan(w->o[row * d + i]), "head %d written", (int)head);
        cr_assert(isnan(w->lse[row]));
        memcpy(w->o + row * d, w->want_o + row * d, (size_t)d * sizeof(float));
        w->lse[row] = w->want_lse[row];
    }
    check(w, &ops, s->n_tok <= ops.attn_decode_max, s, "heads");
}

Test(attn, the_op_computes_the_heads_it_was_asked_for)
{
    kvf_threads *threads;
    cr_assert_eq(kvf_threads_open(&threads, 3, &kvf_mem_default, NULL), KVF_OK);
    for (int i = 0; i < 24; i++) {
        shape s = { .n_tok = i % 3 == 0 ? 1 : i % 3 == 1 ? 5 : 70,
                    .n_key = 150 + i * 31,
                    .q_first = i % 4 == 1 ? 900 : 80 + i * 31,
                    .group = groups[i % 5],
                    .n_head_kv = 1 + i % 4,
                    .head_dim = i % 2 ? 64 : 32,
                    .window = i % 5 == 1 ? 130 : 0,
                    .logit = 2,
                    .holes = i % 2 ? RANDOM_HOLES : NO_HOLES };
        world w;
        make(&w, &s);
        for (const cpu *c = cpus(); c->name; c++) {
            run_op(&w, c, false, threads, 0, 0);
            check_heads(&w, c, &s, 0, s.n_head_kv);
            for (int32_t h0 = 0; h0 < s.n_head_kv; h0++) {
                int32_t h1 = h0 + 1 + (int32_t)(rnd() % (uint32_t)(s.n_head_kv - h0));
                run_op(&w, c, false, threads, h0, h1);
                check_heads(&w, c, &s, h0, h1);
            }
        }
        drop(&w);
    }
    kvf_threads_close(threads);
}

Test(attn, exact_mode_does_not_round_to_bf16)
{
    kvf_threads *threads;
    cr_assert_eq(kvf_threads_open(&threads, 3, &kvf_mem_default, NULL), KVF_OK);
    shape s = {
        .n_tok = 70, .n_key = 300, .q_first = 230, .group = 6, .n_head_kv = 2, .head_dim = 64, .logit = 2
    };
    world w;
    make(&w, &s);
    for (const cpu *c = cpus(); c->name; c++) {
        if (c->level >= KVF_CPU_LEVEL_AMX) continue; /* a ctx of exact mode runs on the level below */
        cpu f32 = { c->name, c->level, c->flags & ~(unsigned)KVF_CPU_AVX512_BF16 };
        run_op(&w, c, true, threads, 0, 0);
        check_heads(&w, &f32, &s, 0, 2);
    }
    drop(&w);
    kvf_threads_close(threads);
}

/* Kernels that round p divide by the sum of what they rounded: equal values come out as they are. */
Test(attn, rounding_does_not_scale_the_output)
{
    shape s = {
        .n_tok = 70, .n_key = 300, .q_first = 230, .group = 6, .n_head_kv = 1, .head_dim = 64, .logit = 2
    };
    world w;
    make(&w, &s);
    for (int64_t key = 0; key < s.n_key; key++) {
        kvf_f16 *slot = kvf_kv_slot(&w.view, w.slots[key / KVF_BLOCK]);
        for (int64_t i = 0; i < 64; i++) slot[(KVF_BLOCK + key % KVF_BLOCK) * 64 + i] = kvf_f16_from_f32(0.5f);
    }
    for (const cpu *c = cpus(); c->name; c++) {
        kvf_cpu_ops ops;
        kvf_cpu_ops_init(&ops, c->level, c->flags);
        wipe(&w);
        run(&ops, false, &w.a, ops.attn_tile(&w.a));
        for (int64_t i = 0; i < 70 * 6 * 64; i++)
            cr_assert_float_eq((double)w.o[i], 0.5, 2e-6, "%s: %g", c->name, (double)w.o[i]);
    }
    drop(&w);
}
