/* test_cuda_emu_attn.c - attention of the CUDA kernels against the CPU's reference in double: few queries
 * (split-KV) and many, page edges, windows, holes, first keys, heads of every padded size, groups of 1 to 8,
 * KV heads of a subset, soft caps, and the sums of attention.
 *
 * Prefill rounds queries and weights to f16: half a unit in the 11th bit of each, so 1e-3 of the values'
 * size and as much of the scores. Few queries go in as two f16 and stay near fp32.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/rig.h"

typedef struct shape {
    int64_t n_tok, n_key, q_first, window;
    int32_t group, n_head_kv, head_dim;
    float softcap;
    bool holes, gaps, subset, mass, places;
    int32_t ties; /* so many queries in a row stand at one place, and see from one key on; 0: one */
} shape;

static void compare(rig *r, const kvf_attn_args *c, const kvf_attn_args *d, const shape *s)
{
    size_t rows = (size_t)(s->n_tok * c->n_head), n = rows * (size_t)s->head_dim;
    bool few = s->n_tok * s->group <= 16;
    double tol = few ? 5e-6 : 1e-3;
    OK(r->cpu->ops->attn(r->cpu, c, &err));
    OK(r->dev->ops->attn(r->dev, d, &err));
    float *o = dev_get(r, d->o, n * sizeof *o), *lse = dev_get(r, d->lse, rows * sizeof *lse);
    double d_o = distance(o, c->o, n), d_lse = distance(lse, c->lse, rows);
    cr_assert(d_o <= tol && d_lse <= 2 * tol,
              "o off by %g, lse by %g: n_tok %lld n_key %lld q_first %lld window %lld group %d kv %d d %d cap %g holes %d gaps %d",
              d_o, d_lse, (long long)s->n_tok, (long long)s->n_key, (long long)s->q_first, (long long)s->window, s->group,
              s->n_head_kv, s->head_dim, (double)s->softcap, s->holes, s->gaps);
    drop(o);
    drop(lse);
}

static void compare_mass(rig *r, const kvf_attn_args *c, const kvf_attn_args *d, const shape *s)
{
    size_t width = (size_t)((s->n_key + KVF_BLOCK - 1) / KVF_BLOCK * KVF_BLOCK);
    for (int sum = 0; sum < 2; sum++) {
        size_t n = width * (size_t)(sum ? 1 : c->n_head);
        float *want = room(n * sizeof *want), *got = room(n * sizeof *got);
        for (size_t i = 0; i < n; i++) want[i] = got[i] = 0.25f;
        kvf_attn_mass_args cm = { c, sum, want }, dm = { d, sum, got };
        OK(r->cpu->ops->attn_mass(r->cpu, &cm, &err));
        OK(r->dev->ops->attn_mass(r->dev, &dm, &err));
        double off = distance(got, want, n);
        cr_assert(off <= 1e-4 * (1 + (double)s->n_tok / 16), "mass off by %g, sum %d, n_tok %lld n_key %lld group %d d %d", off, sum,
                  (long long)s->n_tok, (long long)s->n_key, s->group, s->head_dim);
        drop(want);
        drop(got);
    }
}

static void try_shape(rig *r, const shape *s, uint64_t *seed)
{
    rig_kv kv;
    int32_t n_block = (int32_t)((s->n_key + KVF_BLOCK - 1) / KVF_BLOCK), n_head = s->group * s->n_head_kv, first[256], place[256];
    size_t rows = (size_t)(s->n_tok * n_head), n = rows * (size_t)s->head_dim;
    kv_open(r, &kv, n_block, s->n_head_kv, s->head_dim, seed);
    if (s->holes) kv_holes(&kv, seed);
    kv_fill(r, &kv, s->n_key, seed);
    float *q = floats(n, 3.0f, seed), *o = room(n * sizeof *o), *lse = room(rows * sizeof *lse);
    memset(o, 0xff, n * sizeof *o);
    memset(lse, 0xff, rows * sizeof *lse);
    kvf_attn_args c = { .q = q, .o = o, .lse = lse, .n_tok = s->n_tok, .n_head = n_head, .n_head_kv = s->n_head_kv,
                        .head_dim = s->head_dim, .scale = 2.0f / sqrtf((float)s->head_dim), .softcap = s->softcap,
                        .kv = &kv.cpu, .slots = kv.cpu_slots, .n_key = s->n_key, .q_first = s->q_first, .window = s->window,
                        .valid = s->holes ? kv.valid : NULL };
    if (s->gaps) {
        int64_t at = 0;
        for (int64_t i = 0; i < s->n_tok; i++) {
            if (s->ties < 2 || i % s->ties == 0) at += (int64_t)(next_random(seed) % (uint64_t)(2 + s->n_key / s->n_tok));
            first[i] = (int32_t)at;
        }
        c.first = first;
        c.window = 0;
    }
    if (s->places) { /* some tokens were left out: queries stand at places with gaps */
        for (int64_t i = 0; i < s->n_tok; i++)
            place[i] = s->ties > 1 && i % s->ties ? place[i - 1] : (int32_t)(s->q_first + i * 3 + (int64_t)(next_random(seed) % 3));
        c.place = place;
        c.q_first = 0;
    }
    kvf_attn_args d = c;
    d.q = dev_put(r, q, n * sizeof *q);
    d.o = dev_put(r, o, n * sizeof *o);
    d.lse = dev_put(r, lse, rows * sizeof *lse);
    d.kv = &kv.dev;
    d.slots = kv.dev_slots;
    compare(r, &c, &d, s);
    if (s->mass) {
        OK(r->dev->ops->upload(r->dev, d.lse, lse, rows * sizeof *lse, &err));
        compare_mass(r, &c, &d, s);
    }
    if (s->subset) { /* the other heads' rows keep what the whole call wrote */
        c.head_kv0 = d.head_kv0 = 1;
        c.head_kv1 = d.head_kv1 = 2;
        compare(r, &c, &d, s);
        if (s->mass) compare_mass(r, &c, &d, s);
    }
    dev_drop(r, (void *)d.q);
    dev_drop(r, d.o);
    dev_drop(r, d.lse);
    drop(q);
    drop(o);
    drop(lse);
    kv_close(r, &kv);
}

static void try_all(const shape *s, size_t n, uint64_t order)
{
    rig r;
    uint64_t seed = 7 + order;
    rig_open(&r, false);
    seed_order(order);
    for (size_t i = 0; i < n; i++) try_shape(&r, &s[i], &seed);
    rig_close(&r);
}

Test(cuda_attn, few_queries_equal_the_reference_at_every_edge)
{
    const shape s[] = {
        { .n_tok = 1, .n_key = 1, .q_first = 0, .group = 1, .n_head_kv = 1, .head_dim = 64 },
        { .n_tok = 1, .n_key = 127, .q_first = 126, .group = 4, .n_head_kv = 2, .head_dim = 128 },
        { .n_tok = 1, .n_key = 129, .q_first = 128, .group = 7, .n_head_kv = 2, .head_dim = 64 },
        { .n_tok = 1, .n_key = 1500, .q_first = 1499, .group = 8, .n_head_kv = 2, .head_dim = 128, .subset = true, .mass = true },
        { .n_tok = 2, .n_key = 1030, .q_first = 1028, .group = 8, .n_head_kv = 1, .head_dim = 256 },
        { .n_tok = 8, .n_key = 700, .q_first = 692, .group = 2, .n_head_kv = 1, .head_dim = 64, .window = 300 },
        { .n_tok = 3, .n_key = 600, .q_first = 640, .group = 2, .n_head_kv = 1, .head_dim = 96, .softcap = 30 },
        { .n_tok = 2, .n_key = 900, .q_first = 300, .group = 1, .n_head_kv = 2, .head_dim = 80, .holes = true, .subset = true, .mass = true },
        { .n_tok = 4, .n_key = 512, .q_first = 508, .group = 4, .n_head_kv = 1, .head_dim = 8, .gaps = true },
        { .n_tok = 5, .n_key = 256, .q_first = 251, .group = 3, .n_head_kv = 1, .head_dim = 72, .window = 5 },
        { .n_tok = 4, .n_key = 600, .q_first = 590, .group = 2, .n_head_kv = 1, .head_dim = 64, .places = true, .window = 300 },
    };
    try_all(s, sizeof s / sizeof *s, 0);
}

Test(cuda_attn, many_queries_equal_the_reference_at_every_edge)
{
    const shape s[] = {
        { .n_tok = 33, .n_key = 33, .q_first = 0, .group = 1, .n_head_kv = 1, .head_dim = 64, .mass = true },
        { .n_tok = 70, .n_key = 300, .q_first = 230, .group = 4, .n_head_kv = 2, .head_dim = 64, .subset = true },
        { .n_tok = 40, .n_key = 129, .q_first = 89, .group = 7, .n_head_kv = 1, .head_dim = 128 },
        { .n_tok = 17, .n_key = 260, .q_first = 243, .group = 2, .n_head_kv = 1, .head_dim = 256 },
        { .n_tok = 20, .n_key = 200, .q_first = 180, .group = 2, .n_head_kv = 1, .head_dim = 256, .softcap = 20 },
        { .n_tok = 66, .n_key = 400, .q_first = 450, .group = 1, .n_head_kv = 1, .head_dim = 128, .softcap = 30, .window = 200 },
        { .n_tok = 50, .n_key = 520, .q_first = 470, .group = 2, .n_head_kv = 1, .head_dim = 96, .holes = true, .mass = true },
        { .n_tok = 140, .n_key = 900, .q_first = 760, .group = 1, .n_head_kv = 1, .head_dim = 64, .holes = true },
        { .n_tok = 130, .n_key = 2000, .q_first = 1990, .group = 1, .n_head_kv = 1, .head_dim = 64, .holes = true },
        { .n_tok = 30, .n_key = 640, .q_first = 100, .group = 3, .n_head_kv = 1, .head_dim = 40, .holes = true, .window = 128 },
        { .n_tok = 36, .n_key = 300, .q_first = 264, .group = 8, .n_head_kv = 1, .head_dim = 64, .gaps = true },
        { .n_tok = 60, .n_key = 400, .q_first = 150, .group = 2, .n_head_kv = 1, .head_dim = 64, .places = true },
        { .n_tok = 60, .n_key = 400, .q_first = 250, .group = 1, .n_head_kv = 1, .head_dim = 64, .places = true, .gaps = true },
    };
    try_all(s, sizeof s / sizeof *s, 0);
}

/* Tokens of one run that all came back, far blocks all of whose keys are older than any query: equal places. */
Test(cuda_attn, queries_at_equal_places_equal_the_reference)
{
    const shape s[] = {
        { .n_tok = 4, .n_key = 300, .q_first = 290, .group = 2, .n_head_kv = 1, .head_dim = 64, .places = true, .ties = 2 },
        { .n_tok = 8, .n_key = 700, .q_first = 140, .group = 2, .n_head_kv = 2, .head_dim = 128, .places = true, .ties = 8, .subset = true },
        { .n_tok = 5, .n_key = 300, .q_first = 100, .group = 3, .n_head_kv = 1, .head_dim = 72, .places = true, .gaps = true, .ties = 3 },
        { .n_tok = 3, .n_key = 260, .q_first = 900, .group = 4, .n_head_kv = 1, .head_dim = 64, .places = true, .ties = 3, .holes = true },
        { .n_tok = 40, .n_key = 300, .q_first = 120, .group = 2, .n_head_kv = 1, .head_dim = 64, .places = true, .ties = 40 },
        { .n_tok = 70, .n_key = 400, .q_first = 127, .group = 2, .n_head_kv = 1, .head_dim = 64, .places = true, .ties = 7, .window = 100 },
        { .n_tok = 48, .n_key = 400, .q_first = 200, .group = 4, .n_head_kv = 1, .head_dim = 128, .places = true, .gaps = true, .ties = 16 },
        { .n_tok = 33, .n_key = 500, .q_first = 0, .group = 1, .n_head_kv = 2, .head_dim = 80, .places = true, .ties = 5, .holes = true },
        { .n_tok = 64, .n_key = 2900, .q_first = 1400, .group = 1, .n_head_kv = 1, .head_dim = 64, .places = true, .ties = 64 },
    };
    try_all(s, sizeof s / sizeof *s, 0);
    try_all(s, 5, 3);
}

Test(cuda_attn, long_lists_are_split_and_merged)
{
    const shape s[] = {
        { .n_tok = 9, .n_key = 2900, .q_first = 2891, .group = 2, .n_head_kv = 1, .head_dim = 64 },
        { .n_tok = 1, .n_key = 3000, .q_first = 2999, .group = 4, .n_head_kv = 1, .head_dim = 64, .holes = true },
        { .n_tok = 1, .n_key = 3000, .q_first = 2999, .group = 1, .n_head_kv = 1, .head_dim = 64, .window = 1000 },
    };
    try_all(s, sizeof s / sizeof *s, 0);
}

Test(cuda_attn, rows_that_see_no_key_are_zero_with_lse_minus_infinity)
{
    const shape s[] = {
        { .n_tok = 2, .n_key = 0, .q_first = 0, .group = 2, .n_head_kv = 1, .head_dim = 64 },
        { .n_tok = 40, .n_key = 0, .q_first = 0, .group = 1, .n_head_kv = 1, .head_dim = 128 },
        { .n_tok = 4, .n_key = 100, .q_first = 4000, .window = 10, .group = 2, .n_head_kv = 1, .head_dim = 64 },
        { .n_tok = 40, .n_key = 100, .q_first = 90, .window = 5, .group = 1, .n_head_kv = 1, .head_dim = 64 },
    };
    try_all(s, sizeof s / sizeof *s, 0);
}

#ifdef KVF_TEST_CUDA_EMU
Test(cuda_attn, the_order_of_threads_does_not_matter)
{
    const shape s[] = {
        { .n_tok = 1, .n_key = 700, .q_first = 699, .group = 4, .n_head_kv = 1, .head_dim = 64, .holes = true, .mass = true },
        { .n_tok = 2, .n_key = 400, .q_first = 398, .group = 4, .n_head_kv = 1, .head_dim = 256 },
        { .n_tok = 40, .n_key = 300, .q_first = 260, .group = 2, .n_head_kv = 1, .head_dim = 128, .mass = true },
        { .n_tok = 20, .n_key = 150, .q_first = 130, .group = 2, .n_head_kv = 1, .head_dim = 256 },
    };
    for (uint64_t order = 1; order <= 3; order++) try_all(s, sizeof s / sizeof *s, order);
}
#endif
