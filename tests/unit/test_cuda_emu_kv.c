/* test_cuda_emu_kv.c - norms, RoPE, sums, merges, and keys into, between and within slots, against the CPU's
 * reference: bits where the op promises bits, else fp32 rounding.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/rig.h"

/* Download n floats and compare them. */
static void same(rig *r, const float *dev, const float *want, size_t n, double tol, const char *what)
{
    float *got = dev_get(r, dev, n * sizeof *got);
    double off = distance(got, want, n);
    cr_assert_leq(off, tol, "%s: off by %g", what, off);
    drop(got);
}

Test(cuda_kv, norms_of_any_width_and_stride_equal_the_reference)
{
    const int64_t widths[] = { 1, 31, 64, 128, 1024, 1025, 4096 };
    rig r;
    rig_open(&r, false);
    for (size_t i = 0; i < 7; i++) {
        uint64_t seed = i;
        int64_t w = widths[i], rows = 1 + (int64_t)i * 3 % 11, step = w + (int64_t)(i % 3);
        size_t n = (size_t)(rows * step);
        float *x = floats(n, 5.0f, &seed), *weight = floats((size_t)w, 1.0f, &seed), *out = room(n * sizeof *out);
        if (i == 2) memset(x, 0, n * sizeof *x);
        memcpy(out, x, n * sizeof *out);
        float *dx = dev_put(&r, x, n * sizeof *x), *dw = dev_put(&r, weight, (size_t)w * sizeof *weight);
        float *dout = i % 2 ? dx : dev_put(&r, x, n * sizeof *x);
        kvf_rmsnorm_args c = { .x = x, .weight = i == 1 ? NULL : weight, .out = out, .n_row = rows, .width = w, .x_stride = step, .out_stride = step, .eps = 1e-6f };
        kvf_rmsnorm_args d = c;
        d.x = dx;
        d.weight = i == 1 ? NULL : dw;
        d.out = dout;
        OK(r.cpu->ops->rmsnorm(r.cpu, &c, &err));
        OK(r.dev->ops->rmsnorm(r.dev, &d, &err));
        same(&r, dout, out, n, 2e-5, "norm");
        drop(x);
        drop(weight);
        drop(out);
        if (dout != dx) dev_drop(&r, dout);
        dev_drop(&r, dx);
        dev_drop(&r, dw);
    }
    rig_close(&r);
}

Test(cuda_kv, angles_and_rotation_equal_the_reference)
{
    rig r;
    rig_open(&r, false);
    for (int kind = 0; kind < 2; kind++) {
        enum { TOK = 5, HEADS = 3, D = 96, ROT = 64 };
        uint64_t seed = 4;
        int32_t pos[TOK] = { 0, 1, 77, 131072, 1000003 };
        double freq[ROT / 2];
        for (int j = 0; j < ROT / 2; j++) freq[j] = pow(1e6, -2.0 * j / ROT);
        float table[TOK * ROT], *x = floats(TOK * HEADS * D, 2.0f, &seed), *dt = dev_poison(&r, TOK * ROT);
        kvf_rope_table_args c = { pos, freq, TOK, ROT, 1.25f, table }, d = { pos, freq, TOK, ROT, 1.25f, dt };
        OK(r.cpu->ops->rope_table(r.cpu, &c, &err));
        OK(r.dev->ops->rope_table(r.dev, &d, &err));
        same(&r, dt, table, TOK * ROT, 2e-7, "angles");
        float *dx = dev_put(&r, x, TOK * HEADS * D * sizeof *x);
        kvf_rope_args ca = { x, TOK, HEADS, D, ROT, table, (kvf_rope_kind)kind }, da = { dx, TOK, HEADS, D, ROT, dt, (kvf_rope_kind)kind };
        OK(r.cpu->ops->rope(r.cpu, &ca, &err));
        OK(r.dev->ops->rope(r.dev, &da, &err));
        same(&r, dx, x, TOK * HEADS * D, 2e-6, "rotation");
        drop(x);
        dev_drop(&r, dx);
        dev_drop(&r, dt);
    }
    rig_close(&r);
}

Test(cuda_kv, stored_and_turned_keys_are_the_reference_s_bits)
{
    const struct { int64_t first, n; int32_t heads, d, rot; } s[] = {
        { 0, 1, 1, 64, 64 }, { 127, 2, 2, 64, 32 }, { 100, 300, 2, 128, 128 }, { 255, 130, 1, 8, 8 }, { 5, 60, 3, 96, 64 },
    };
    rig r;
    rig_open(&r, false);
    for (size_t i = 0; i < sizeof s / sizeof *s; i++) {
        uint64_t seed = i + 1;
        int32_t blocks = (int32_t)((s[i].first + s[i].n + KVF_BLOCK - 1) / KVF_BLOCK);
        size_t n = (size_t)(s[i].n * s[i].heads * s[i].d), rows = (size_t)(s[i].n * s[i].rot);
        rig_kv kv;
        seed_order(i % 3);
        kv_open(&r, &kv, 2 * blocks, s[i].heads, s[i].d, &seed);
        float *k = floats(n, 4.0f, &seed), *v = floats(n, 70000.0f, &seed), *turn = floats(rows, 1.0f, &seed);
        float *dk = dev_put(&r, k, n * sizeof *k), *dv = dev_put(&r, v, n * sizeof *v), *dturn = dev_put(&r, turn, rows * sizeof *turn);
        kvf_kv_put_args c = { k, v, s[i].n, s[i].heads, s[i].d, &kv.cpu, kv.cpu_slots, s[i].first };
        kvf_kv_put_args d = { dk, dv, s[i].n, s[i].heads, s[i].d, &kv.dev, kv.dev_slots, s[i].first };
        OK(r.cpu->ops->kv_put(r.cpu, &c, &err));
        OK(r.dev->ops->kv_put(r.dev, &d, &err));
        for (int kind = 0; kind < 2; kind++) {
            kvf_kv_turn_args ct = { &kv.cpu, kv.cpu_slots, kv.cpu_slots + blocks, s[i].first, s[i].n, s[i].heads, s[i].d, s[i].rot, turn, (kvf_rope_kind)kind };
            kvf_kv_turn_args dt = { &kv.dev, kv.dev_slots, kv.dev_slots + blocks, s[i].first, s[i].n, s[i].heads, s[i].d, s[i].rot, dturn, (kvf_rope_kind)kind };
            OK(r.cpu->ops->kv_turn(r.cpu, &ct, &err));
            OK(r.dev->ops->kv_turn(r.dev, &dt, &err));
            for (int32_t b = 0; b < 2 * blocks; b++) cr_assert(kv_same(&r, &kv, b), "case %zu block %d", i, b);
        }
        drop(k);
        drop(v);
        drop(turn);
        dev_drop(&r, dk);
        dev_drop(&r, dv);
        dev_drop(&r, dturn);
        kv_close(&r, &kv);
    }
    rig_close(&r);
}

Test(cuda_kv, gathered_keys_are_the_reference_s_bits_in_place_too)
{
    rig r;
    rig_open(&r, false);
    for (int place = 0; place < 3; place++) {
        enum { KEYS = 700, HEADS = 2, D = 64 };
        uint64_t seed = 17;
        rig_kv kv;
        int32_t from[2 * KEYS], n = 0, stride = place == 2 ? KEYS : 0;
        kv_open(&r, &kv, 12, HEADS, D, &seed);
        kv_fill(&r, &kv, 6 * KVF_BLOCK, &seed);
        for (int32_t i = 100; i < KEYS; i++)
            if (next_random(&seed) % 3 == 0) from[n++] = i;
        for (int32_t i = 0; i < n; i++) from[KEYS + i] = 100 + i; /* of the other head */
        kvf_kv_gather_args c = { &kv.cpu, kv.cpu_slots, kv.cpu_slots + (place ? 0 : 6), from, stride, 100, n, HEADS, D };
        kvf_kv_gather_args d = { &kv.dev, kv.dev_slots, kv.dev_slots + (place ? 0 : 6), from, stride, 100, n, HEADS, D };
        OK(r.cpu->ops->kv_gather(r.cpu, &c, &err));
        OK(r.dev->ops->kv_gather(r.dev, &d, &err));
        for (int32_t b = 0; b < 12; b++) cr_assert(kv_same(&r, &kv, b), "in place %d, block %d", place, b);
        kv_close(&r, &kv);
    }
    rig_close(&r);
}

Test(cuda_kv, merges_and_sums_equal_the_reference)
{
    enum { ROWS = 37, D = 72 };
    rig r;
    rig_open(&r, false);
    for (uint64_t order = 0; order < 3; order++) {
        uint64_t seed = 2 + order;
        seed_order(order);
        float *o = floats(ROWS * D, 1, &seed), *o2 = floats(ROWS * D, 1, &seed), *lse = floats(ROWS, 30, &seed), *lse2 = floats(ROWS, 30, &seed);
        for (int i = 0; i < ROWS; i++) { /* a part with lse -inf may hold anything */
            if (i % 5 == 0 || i == 30) lse[i] = -INFINITY;
            if (i % 7 == 0) lse2[i] = -INFINITY;
            if (i == 3) lse[i] = lse2[i] = 300;
            for (int c = 0; c < D; c++) {
                if (lse[i] == -INFINITY && lse2[i] > -INFINITY) o[i * D + c] = NAN;
                if (lse2[i] == -INFINITY) o2[i * D + c] = NAN;
            }
        }
        float *dev[4] = { dev_put(&r, o, ROWS * D * sizeof *o), dev_put(&r, lse, ROWS * sizeof *o), dev_put(&r, o2, ROWS * D * sizeof *o), dev_put(&r, lse2, ROWS * sizeof *o) };
        kvf_lse_merge_args c = { o, lse, o2, lse2, ROWS, D }, d = { dev[0], dev[1], dev[2], dev[3], ROWS, D };
        OK(r.cpu->ops->lse_merge(r.cpu, &c, &err));
        OK(r.dev->ops->lse_merge(r.dev, &d, &err));
        same(&r, dev[0], o, ROWS * D, 2e-6, "merged o");
        same(&r, dev[1], lse, ROWS, 4e-5, "merged lse");
        float *x = floats(ROWS * D, 3, &seed), *y = floats(ROWS * D, 3, &seed);
        float *dx = dev_put(&r, x, ROWS * D * sizeof *x), *dy = dev_put(&r, y, ROWS * D * sizeof *y);
        OK(r.cpu->ops->add(r.cpu, x, y, ROWS * D, &err));
        OK(r.dev->ops->add(r.dev, dx, dy, ROWS * D, &err));
        same(&r, dx, x, ROWS * D, 0, "sum");
        for (int i = 0; i < 4; i++) dev_drop(&r, dev[i]);
        dev_drop(&r, dx);
        dev_drop(&r, dy);
        drop(o);
        drop(o2);
        drop(lse);
        drop(lse2);
        drop(x);
        drop(y);
    }
    rig_close(&r);
}

Test(cuda_kv, copies_of_every_size_come_back)
{
    rig r;
    rig_open(&r, false);
    const size_t sizes[] = { 0, 1, 63, 4096, (16u << 20) + 5, 33u << 20 };
    for (size_t i = 0; i < 6; i++) {
        uint8_t *x = room(sizes[i]);
        for (size_t k = 0; k < sizes[i]; k++) x[k] = (uint8_t)(k * 7 + k / 251);
        void *a = dev_put(&r, x, sizes[i]);
        if (i < 4) {
            void *b = dev_room(&r, sizes[i]);
            OK(r.dev->ops->copy(r.dev, b, a, sizes[i], &err));
            dev_drop(&r, a);
            a = b;
        }
        uint8_t *y = dev_get(&r, a, sizes[i]);
        cr_assert_eq(memcmp(x, y, sizes[i]), 0, "%zu bytes", sizes[i]);
        drop(x);
        drop(y);
        dev_drop(&r, a);
    }
    rig_close(&r);
}
