/* test_cuda_emu_device.c - the second table against plain loops, steps recorded as graphs, and what happens
 * when memory runs out or a kernel fails.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/rig.h"

/* ---- Selection -------------------------------------------------------------------------------------- */

static bool before(const float *x, int32_t a, int32_t b)
{
    bool nan_a = isnan(x[a]), nan_b = isnan(x[b]);
    if (nan_a != nan_b) return nan_b;
    if (!nan_a && x[a] != x[b]) return x[a] > x[b];
    return a < b;
}

Test(cuda_device, the_k_largest_come_in_order_and_ties_go_to_the_lower_index)
{
    const int32_t sizes[] = { 1, 31, 1024, 1025, 5000 };
    rig r;
    rig_open(&r, false);
    for (int i = 0; i < 5; i++) {
        int32_t n = sizes[i], ks[] = { 0, 1, n / 3, n - 1, n, n + 5 };
        uint64_t seed = (uint64_t)i;
        float *x = floats((size_t)n, 1, &seed);
        for (int32_t j = 0; j < n; j++) { /* ties, zeros of both signs, NaN, infinities */
            if (i > 1) x[j] = (float)(int)(x[j] * 20) / 4;
            if (j % 97 == 5) x[j] = NAN;
            if (j % 101 == 7) x[j] = j % 2 ? INFINITY : -INFINITY;
        }
        float *dx = dev_put(&r, x, (size_t)n * sizeof *x);
        int32_t *dids = dev_room(&r, (size_t)(n + 5) * sizeof *dids), *dcount = dev_room(&r, sizeof *dcount);
        for (int j = 0; j < 6; j++) {
            int32_t k = ks[j] < 0 ? 0 : ks[j], want = k < n ? k : n, got = 0;
            seed_order((uint64_t)j % 3);
            OK(r.module->device->topk(r.dev, dx, n, k, dids, dcount, &err));
            int32_t *count = dev_get(&r, dcount, sizeof *count), *ids = dev_get(&r, dids, (size_t)(n + 5) * sizeof *ids);
            cr_assert_eq(*count, want);
            for (int32_t a = 0; a < n; a++) {
                int32_t ahead = 0; /* n is small: rank by counting; +-0 differ by their bits, so look them over */
                for (int32_t b = 0; b < n && ahead < want; b++) ahead += b != a && before(x, b, a) && !(x[a] == 0 && x[b] == 0);
                bool zero = x[a] == 0 && want > 0;
                if (ahead < want && got < want && ids[got] == a) got++;
                else cr_assert(ahead >= want || zero, "n %d k %d: %d is missing", n, k, a);
            }
            cr_assert_eq(got, want);
            drop(count);
            drop(ids);
        }
        drop(x);
        dev_drop(&r, dx);
        dev_drop(&r, dids);
        dev_drop(&r, dcount);
    }
    rig_close(&r);
}

Test(cuda_device, a_keep_set_is_what_its_rule_says_and_rows_follow_it)
{
    enum { N = 3000 };
    rig r;
    rig_open(&r, false);
    for (int order = 0; order < 3; order++) {
        uint64_t seed = 5;
        int32_t want[N], n = 0;
        float *x = floats(N, 1, &seed), *rows = floats(N * 5, 1, &seed);
        for (int32_t i = 0; i < N; i++)
            if (x[i] > 0.6f || i < 4 || i >= N - 7) want[n++] = i;
        float *dx = dev_put(&r, x, N * sizeof *x), *drows = dev_put(&r, rows, N * 5 * sizeof *rows), *dout = dev_poison(&r, N * 5);
        int32_t *dids = dev_room(&r, N * sizeof *dids), *dcount = dev_room(&r, sizeof *dcount);
        seed_order((uint64_t)order);
        OK(r.module->device->keep(r.dev, dx, N, 0.6f, 4, 7, dids, dcount, &err));
        int32_t *count = dev_get(&r, dcount, sizeof *count), *ids = dev_get(&r, dids, N * sizeof *ids);
        cr_assert_eq(*count, n);
        cr_assert_eq(memcmp(ids, want, (size_t)n * sizeof *ids), 0);
        for (int wide = 0; wide < 2; wide++) { /* rows of 20 bytes, and of 80: four of them */
            int64_t each = wide ? 80 : 20, m = wide ? 9 : n;
            OK(r.module->device->gather(r.dev, drows, dids, dout, m, each, &err));
            char *out = dev_get(&r, dout, (size_t)(m * each));
            for (int64_t i = 0; i < m; i++) cr_assert_eq(memcmp(out + i * each, (char *)rows + want[i] * each, (size_t)each), 0);
            drop(out);
        }
        drop(count);
        drop(ids);
        drop(x);
        drop(rows);
        dev_drop(&r, dx);
        dev_drop(&r, drows);
        dev_drop(&r, dout);
        dev_drop(&r, dids);
        dev_drop(&r, dcount);
    }
    rig_close(&r);
}

static int32_t drawn(rig *r, const float *dx, int32_t n, kvf_device_sample p)
{
    int32_t *out = dev_room(r, sizeof *out), *got;
    OK(r->module->device->sample(r->dev, dx, n, &p, out, &err));
    got = dev_get(r, out, sizeof *got);
    int32_t id = *got;
    drop(got);
    dev_drop(r, out);
    return id;
}

Test(cuda_device, tokens_are_drawn_from_what_the_cuts_leave)
{
    enum { N = 2000 };
    rig r;
    uint64_t seed = 3;
    rig_open(&r, false);
    float *x = floats(N, 3, &seed);
    x[1700] = 9;
    x[40] = 8;
    x[900] = 7.5f;
    x[3] = -INFINITY;
    float *dx = dev_put(&r, x, N * sizeof *x);
    int32_t *dout = dev_room(&r, sizeof *dout), *top;
    OK(r.module->device->argmax(r.dev, dx, 1, N, dout, &err));
    top = dev_get(&r, dout, sizeof *top);
    cr_assert_eq(*top, 1700);
    for (int i = 0; i < 40; i++) {
        float u = (float)i / 40;
        cr_assert_eq(drawn(&r, dx, N, (kvf_device_sample){ 0.8f, 1, 0, 1, u }), 1700);
        int32_t three = drawn(&r, dx, N, (kvf_device_sample){ 1, 1, 0, 3, u }), p = drawn(&r, dx, N, (kvf_device_sample){ 1, 0.9f, 0, 3, u });
        double e[3] = { exp(-1.0), exp(-1.5), 1 }, sum = e[0] + e[1] + e[2]; /* in order of id: 40, 900, 1700 */
        double at = (double)u * sum;
        int32_t want = at < e[0] ? 40 : at < e[0] + e[1] ? 900 : 1700;
        double gap = fmin(fabs(at - e[0]), fabs(at - e[0] - e[1]));
        if (gap > 1e-5) cr_assert_eq(three, want, "u %g: %d, not %d", (double)u, three, want);
        cr_assert(p == 40 || p == 900 || p == 1700);
        cr_assert(drawn(&r, dx, N, (kvf_device_sample){ 1, 0.5f, 0, 3, u }) == 1700); /* 1700 alone has 0.63 */
        int32_t m = drawn(&r, dx, N, (kvf_device_sample){ 1, 1, 0.3f, 0, u });
        cr_assert(m == 1700 || m == 40);
    }
    drop(x);
    drop(top);
    dev_drop(&r, dx);
    dev_drop(&r, dout);
    rig_close(&r);
}

/* ---- Video -------------------------------------------------------------------------------------------- */

Test(cuda_device, frames_density_peaks_and_means_equal_plain_loops)
{
    enum { F = 3, T = 37, W = 70, N = F * T, K = 5, GROUPS = 9 };
    rig r;
    uint64_t seed = 8;
    rig_open(&r, false);
    float *x = floats(N * W, 1, &seed), *dx;
    memset(x + 4 * W, 0, W * sizeof *x);                            /* no direction */
    memcpy(x + 50 * W, x + 20 * W, W * sizeof *x);                  /* no distance */
    dx = dev_put(&r, x, N * W * sizeof *x);
    float *dcos = dev_poison(&r, (F - 1) * T), *dd2 = dev_poison(&r, N * N), *drho = dev_poison(&r, N), *ddelta = dev_poison(&r, N), *dmean = dev_poison(&r, GROUPS * W);
    int32_t group[N];
    for (int i = 0; i < N; i++) group[i] = (int32_t)(next_random(&seed) % GROUPS) - (i % 10 == 0 ? GROUPS : 0);
    for (int i = 0; i < N; i++)
        if (group[i] == 7) group[i] = 6; /* an empty group */
    int32_t *dgroup = dev_put(&r, group, sizeof group);
    OK(r.module->device->frame_cosine(r.dev, dx, F, T, W, dcos, &err));
    OK(r.module->device->density_peaks(r.dev, dx, N, W, K, dd2, drho, ddelta, &err));
    OK(r.module->device->merge_mean(r.dev, dx, dgroup, N, W, GROUPS, dmean, &err));
    float *cosine = dev_get(&r, dcos, (F - 1) * T * 4), *d2 = dev_get(&r, dd2, N * N * 4), *rho = dev_get(&r, drho, N * 4), *delta = dev_get(&r, ddelta, N * 4), *mean = dev_get(&r, dmean, GROUPS * W * 4);
    for (int i = 0; i < (F - 1) * T; i++) {
        double ab = 0, aa = 0, bb = 0;
        for (int c = 0; c < W; c++) {
            double a = (double)x[i * W + c], b = (double)x[(i + T) * W + c];
            ab += a * b, aa += a * a, bb += b * b;
        }
        cr_assert_float_eq((double)cosine[i], aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0.0, 1e-6);
    }
    for (int i = 0; i < N; i++) {
        double near[K], worst = 0, least = INFINITY, sum = 0;
        for (int k = 0; k < K; k++) near[k] = INFINITY;
        for (int j = 0; j < N; j++) {
            double d = 0;
            for (int c = 0; c < W; c++) d += pow((double)x[i * W + c] - (double)x[j * W + c], 2);
            cr_assert_float_eq((double)d2[i * N + j], d, 1e-5 * (d + 1));
            worst = fmax(worst, d);
            if (rho[j] > rho[i] || (rho[j] == rho[i] && j < i)) least = fmin(least, d);
            for (int k = 0; k < K && j != i; k++)
                if (d < near[k]) {
                    double t = near[k];
                    near[k] = d;
                    d = t;
                }
        }
        for (int k = 0; k < K; k++) sum += near[k] / W;
        cr_assert_float_eq((double)rho[i], exp(-sum / K), 1e-5);
        cr_assert_float_eq((double)delta[i], sqrt(isfinite(least) ? least : worst), 1e-4);
    }
    for (int g = 0; g < GROUPS; g++)
        for (int c = 0; c < W; c++) {
            double sum = 0;
            int n = 0;
            for (int i = 0; i < N; i++)
                if (group[i] == g) sum += (double)x[i * W + c], n++;
            cr_assert_float_eq((double)mean[g * W + c], n ? sum / n : 0.0, 1e-6);
        }
    void *dev[] = { dx, dcos, dd2, drho, ddelta, dmean, dgroup }, *host[] = { x, cosine, d2, rho, delta, mean };
    for (int i = 0; i < 7; i++) dev_drop(&r, dev[i]);
    for (int i = 0; i < 6; i++) drop(host[i]);
    rig_close(&r);
}

/* ---- Steps ---------------------------------------------------------------------------------------------- */

enum { D = 64, HEADS = 4, KV = 2, STEPS = 4 };

typedef struct step_state {
    rig_kv kv;
    float *q, *k, *v, *o, *lse, *table;
} step_state;

/* One decoding step as a layer makes it: angles, rotation, a key stored, attention over all so far. */
static void step(rig *r, step_state *s, int32_t pos)
{
    double freq[D / 2];
    for (int j = 0; j < D / 2; j++) freq[j] = pow(1e4, -2.0 * j / D);
    kvf_rope_table_args t = { &pos, freq, 1, D, 1, s->table };
    kvf_rope_args rq = { s->q, 1, HEADS, D, D, s->table, KVF_ROPE_NEOX };
    kvf_kv_put_args put = { s->k, s->v, 1, KV, D, &s->kv.dev, s->kv.dev_slots, pos };
    kvf_attn_args a = { .q = s->q, .o = s->o, .lse = s->lse, .n_tok = 1, .n_head = HEADS, .n_head_kv = KV, .head_dim = D, .scale = 0.1f,
                        .kv = &s->kv.dev, .slots = s->kv.dev_slots, .n_key = pos + 1, .q_first = pos };
    OK(r->dev->ops->rope_table(r->dev, &t, &err));
    OK(r->dev->ops->rope(r->dev, &rq, &err));
    OK(r->dev->ops->kv_put(r->dev, &put, &err));
    OK(r->dev->ops->attn(r->dev, &a, &err));
}

/* The same steps op by op, as graphs, and as graphs that a download cuts in two. */
Test(cuda_device, a_recorded_step_computes_what_its_ops_do)
{
    rig r;
    rig_open(&r, false);
    float *want[STEPS] = { 0 };
    for (int how = 0; how < 3; how++) {
        uint64_t seed = 77;
        step_state s;
        kv_open(&r, &s.kv, 6, KV, D, &seed);
        kv_fill(&r, &s.kv, 600, &seed);
        float *x = floats(HEADS * D, 1, &seed);
        s.q = dev_put(&r, x, HEADS * D * sizeof *x);
        s.k = dev_put(&r, x, KV * D * sizeof *x);
        s.v = dev_put(&r, x + D, KV * D * sizeof *x);
        s.o = dev_poison(&r, HEADS * D);
        s.lse = dev_poison(&r, HEADS);
        s.table = dev_poison(&r, D);
        for (int i = 0; i < STEPS; i++) {
            if (how) OK(r.dev->ops->step_begin(r.dev, &err));
            step(&r, &s, 600 + i * 3);
            if (how == 2) drop(dev_get(&r, s.lse, HEADS * sizeof(float)));
            if (how == 2) step(&r, &s, 601 + i * 3);
            if (how) OK(r.dev->ops->step_end(r.dev, &err));
            if (how == 0) step(&r, &s, 601 + i * 3);
            if (how == 1) {
                OK(r.dev->ops->step_begin(r.dev, &err));
                step(&r, &s, 601 + i * 3);
                OK(r.dev->ops->step_end(r.dev, &err));
            }
            float *o = dev_get(&r, s.o, HEADS * D * sizeof *o);
            if (how == 0)
                want[i] = o;
            else
                cr_assert_eq(memcmp(o, want[i], HEADS * D * sizeof *o), 0, "how %d, step %d", how, i);
            if (how) drop(o);
        }
        void *dev[] = { s.q, s.k, s.v, s.o, s.lse, s.table };
        for (int i = 0; i < 6; i++) dev_drop(&r, dev[i]);
        drop(x);
        kv_close(&r, &s.kv);
    }
#ifdef KVF_TEST_CUDA_EMU
    cr_assert_eq(emu_graph_launches(), 3 * STEPS);
#endif
    for (int i = 0; i < STEPS; i++) drop(want[i]);
    rig_close(&r);
}

/* ---- Memory ----------------------------------------------------------------------------------------------- */

Test(cuda_device, memory_keeps_to_its_budget_and_is_whole_again_when_all_is_given_back)
{
    enum { MOST = 200 };
    rig r;
    rig_open(&r, false);
    void *p[MOST];
    uint64_t seed = 1, used0, used, total;
    r.module->memory(r.dev, &used0, &total);
    cr_assert_eq(total, 64u << 20);
    for (int round = 0; round < 3; round++) {
        int n = 0;
        while (n < MOST && r.dev->ops->alloc(r.dev, &p[n], (size_t)(next_random(&seed) % (1u << 20)), &err) >= 0) {
            cr_assert_eq((uintptr_t)p[n] % 64, 0);
            n++;
        }
        cr_assert_lt(n, MOST);
        cr_assert_eq(err.code, KVF_ERR_NOMEM);
        r.module->memory(r.dev, &used, &total);
        cr_assert_leq(used, total);
        for (int i = 0; i < n; i++) { /* in no order */
            int j = (int)(next_random(&seed) % (uint64_t)(n - i));
            dev_drop(&r, p[j]);
            p[j] = p[n - i - 1];
        }
        r.module->memory(r.dev, &used, &total);
        cr_assert_eq(used, used0);
    }
    void *all;
    OK(r.dev->ops->alloc(r.dev, &all, (size_t)(total - used0), &err)); /* one piece again */
    cr_assert_eq(r.dev->ops->alloc(r.dev, &p[0], SIZE_MAX, &err), KVF_ERR_NOMEM);
    dev_drop(&r, all);
    rig_close(&r);
}

#ifdef KVF_TEST_CUDA_EMU
Test(cuda_device, a_refused_allocation_while_opening_leaves_nothing_behind)
{
    const kvf_backend_module *m = rig_module();
    kvf_device_params p = { .memory_bytes = 8u << 20, .mem = &kvf_mem_default };
    kvf_backend *b;
    for (int64_t n = 1; n < 10; n++) {
        emu_fail_malloc(n);
        kvf_status rc = m->open(&b, &p, &err);
        emu_fail_malloc(0);
        if (rc >= 0) {
            cr_assert_gt(n, 3);
            b->ops->close(b);
            return;
        }
        cr_assert_eq(rc, KVF_ERR_NOMEM);
        cr_assert_null(b);
    }
    cr_assert_fail("it never opened");
}

Test(cuda_device, more_memory_than_the_device_has_is_refused)
{
    const kvf_backend_module *m = rig_module();
    kvf_device_params p = { .memory_bytes = 2ull << 30, .mem = &kvf_mem_default };
    kvf_backend *b;
    cr_assert_eq(m->open(&b, &p, &err), KVF_ERR_NOMEM);
    cr_assert_null(b);
    p.device = 1;
    cr_assert_eq(m->open(&b, &p, &err), KVF_ERR_UNSUPPORTED);
}
#endif

Test(cuda_device, lists_longer_than_the_ring_are_sent_all_the_same)
{
    enum { TOK = 400000 };
    rig r;
    rig_open(&r, false);
    uint64_t seed = 6;
    kvf_weight w;
    float *table = floats(16, 1, &seed);
    kvf_token *ids = room(TOK * sizeof *ids);
    for (int i = 0; i < TOK; i++) ids[i] = (kvf_token)(next_random(&seed) % 16);
    OK(r.dev->ops->weight_init(r.dev, &w, KVF_DTYPE_F32, 16, 1, table, &err));
    float *out = dev_poison(&r, TOK);
    kvf_embed_args a = { .table = &w, .tokens = ids, .n_tok = TOK, .scale = 2, .out = out };
    for (int i = 0; i < 3; i++) OK(r.dev->ops->embed(r.dev, &a, &err));
    float *got = dev_get(&r, out, TOK * sizeof *got);
    for (int i = 0; i < TOK; i++) cr_assert_eq(got[i], 2 * table[ids[i]]);
    drop(got);
    drop(ids);
    drop(table);
    dev_drop(&r, out);
    r.dev->ops->weight_fini(r.dev, &w);
    rig_close(&r);
}

Test(cuda_device, what_ran_is_reported)
{
    rig r;
    char text[128];
    rig_open(&r, false);
    r.dev->ops->kernels(r.dev, text, sizeof text);
    cr_assert_str_empty(text);
    r.dev->ops->describe(r.dev, text, sizeof text);
    cr_assert_gt(strlen(text), 0);
    cr_assert_gt(r.dev->ops->batch_hint(r.dev), 0);
    rig_close(&r);
}
