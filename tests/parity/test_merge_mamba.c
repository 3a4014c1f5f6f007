/* test_merge_mamba.c - selective scans and STORM layers against a float64 recurrence (data/vision/mamba),
 * chunks against one pass, both directions.
 *
 * Tolerance 2e-5 relative to the largest value: sums of up to 48 products in f32, exp to 1e-7 and 256 steps.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/merge_rig.h"

#include "merge/rows.h"

static void expect_near(const float *got, const npy *want, const char *what)
{
    double scale = 1;
    for (int64_t i = 0; i < want->n; i++) scale = fmax(scale, fabs((double)((float *)want->data)[i]));
    for (int64_t i = 0; i < want->n; i++) {
        double w = (double)((float *)want->data)[i];
        cr_assert(fabs((double)got[i] - w) <= 2e-5 * scale, "%s: element %lld is %.9g, not %.9g", what,
                  (long long)i, (double)got[i], w);
    }
}

static void run_scan(const char *folder, kvf_cpu_level level)
{
    npy u = npy_must(folder, "u"), dt = npy_must(folder, "dt"), a = npy_must(folder, "A"),
        b = npy_must(folder, "B");
    npy c = npy_must(folder, "C"), d = npy_must(folder, "D"), y = npy_must(folder, "y"),
        last = npy_must(folder, "h_last");
    int64_t n = u.shape[0], e = u.shape[1], s = a.shape[1];
    float *at = calloc((size_t)(e * s), 4), *h = calloc((size_t)(e * s), 4),
          *back = calloc((size_t)(e * s), 4);
    float *bc = calloc((size_t)(2 * n * s), 4), *got = calloc((size_t)(n * e), 4);
    for (int64_t i = 0; i < e; i++)
        for (int64_t k = 0; k < s; k++) at[k * e + i] = f32(&a)[i * s + k];
    for (int64_t t = 0; t < n; t++) {
        memcpy(bc + 2 * t * s, f32(&b) + t * s, (size_t)s * 4);
        memcpy(bc + 2 * t * s + s, f32(&c) + t * s, (size_t)s * 4);
    }
    kvf_rows rows;
    kvf_rows_init(&rows, level);
    kvf_scan_args args = { .n_tok = n,
                           .n_channel = e,
                           .stride = e,
                           .u = f32(&u),
                           .dt = f32(&dt),
                           .bc = bc,
                           .bc_stride = 2 * s,
                           .n_state = s,
                           .a = at,
                           .a_stride = e,
                           .d = f32(&d),
                           .h = h,
                           .y = got };
    rows.scan(&args);
    expect_near(got, &y, folder);
    for (int64_t i = 0; i < e; i++)
        for (int64_t k = 0; k < s; k++) back[i * s + k] = h[k * e + i];
    expect_near(back, &last, folder);
    free(at);
    free(h);
    free(back);
    free(bc);
    free(got);
}

Test(merge_mamba, scans_follow_the_recurrence)
{
    for (int i = 0; i < 3; i++) {
        kvf_cpu_level level;
        if (kvf_cpu_level_parse(&level, rig_cpus[i], kvf_cpu_detect(), NULL) < 0) continue;
        run_scan("mamba/scan_small", level);
        run_scan("mamba/scan_long", level);
        run_scan("mamba/scan_extreme", level);
    }
}

/* ---- Layers ------------------------------------------------------------------------------------ */

static const float *weight(int layer, const char *name)
{
    char folder[40];
    snprintf(folder, sizeof folder, "mamba/block/layer%d", layer);
    npy a = npy_must(folder, name);
    return f32(&a);
}

static kvf_mamba_branch branch(int layer, const char *prefix)
{
    const char *names[] = { "conv_w", "conv_b", "x_proj", "dt_w", "dt_b", "A_log", "D" };
    const float *p[7];
    for (int i = 0; i < 7; i++) {
        char name[32];
        snprintf(name, sizeof name, "%s%s", prefix, names[i]);
        p[i] = weight(layer, name);
    }
    return (kvf_mamba_branch){ p[0], p[1], p[2], p[3], p[4], p[5], p[6] };
}

typedef struct stack {
    kvf_mamba_layer layer[2];
    kvf_mamba_params p;
} stack;

static void make_stack(stack *s, int n_layer, bool both)
{
    memset(s, 0, sizeof *s);
    for (int i = 0; i < n_layer; i++) {
        s->layer[i] = (kvf_mamba_layer){ .norm_w = weight(i, "ln_w"),
                                         .norm_b = weight(i, "ln_b"),
                                         .in_proj = weight(i, "in_proj"),
                                         .out_proj = weight(i, "out_proj"),
                                         .forward = branch(i, "") };
        if (both) s->layer[i].backward = branch(i, "b_");
    }
    kvf_mamba_params_init(&s->p);
    s->p.layers = s->layer;
    s->p.n_layer = n_layer;
    s->p.d_model = 24;
    s->p.d_inner = 48;
    s->p.d_state = 16;
    s->p.dt_rank = 2;
}

static kvf_mamba *open_stack(kvf_ctx *ctx, int n_layer, bool both)
{
    stack s;
    kvf_mamba *m;
    kvf_error err;
    make_stack(&s, n_layer, both);
    cr_assert_eq(kvf_mamba_open(&m, ctx, &s.p, &err), KVF_OK, "%s", err.msg);
    return m;
}

static float *run_stack(kvf_mamba *m, const npy *x, int64_t chunk)
{
    float *out = malloc((size_t)x->n * 4);
    int64_t n = x->shape[0], d = x->shape[1];
    kvf_error err;
    memcpy(out, x->data, (size_t)x->n * 4);
    for (int64_t t = 0; t < n; t += chunk)
        cr_assert_eq(kvf_mamba_run(m, out + t * d, n - t < chunk ? n - t : chunk, &err), KVF_OK, "%s",
                     err.msg);
    return out;
}

Test(merge_mamba, stacks_follow_the_recurrence)
{
    npy x = npy_must("mamba/block", "x");
    for (int c = 0; c < 3; c++)
        for (int both = 0; both < 2; both++) {
            kvf_ctx *ctx = ctx_of(rig_cpus[c], 2);
            if (!ctx) continue;
            npy want = npy_must("mamba/block", both ? "storm_bidir_out" : "storm_uni_out");
            kvf_mamba *m = open_stack(ctx, 2, both != 0);
            float *got = run_stack(m, &x, x.shape[0]);
            expect_near(got, &want, both ? "both directions" : "one direction");
            free(got);
            kvf_mamba_close(m);
            kvf_ctx_close(ctx);
        }
}

/* Layer 0 without its norm, as the fixtures of a single mixer and of the carried state are. */
static kvf_mamba *open_mixer(kvf_ctx *ctx, bool both)
{
    stack s;
    kvf_mamba *m;
    kvf_error err;
    make_stack(&s, 1, both);
    s.layer[0].norm_w = s.layer[0].norm_b = NULL;
    cr_assert_eq(kvf_mamba_open(&m, ctx, &s.p, &err), KVF_OK, "%s", err.msg);
    return m;
}

Test(merge_mamba, a_mixer_follows_the_recurrence)
{
    npy x = npy_must("mamba/block", "x");
    kvf_ctx *ctx = ctx_of(NULL, 1);
    for (int both = 0; both < 2; both++) {
        npy want = npy_must("mamba/block", both ? "bidir_out" : "uni_out");
        kvf_mamba *m = open_mixer(ctx, both != 0);
        float *got = run_stack(m, &x, x.shape[0]);
        for (int64_t i = 0; i < x.n; i++) got[i] -= f32(&x)[i];
        expect_near(got, &want, both ? "both directions" : "one direction");
        free(got);
        kvf_mamba_close(m);
    }
    kvf_ctx_close(ctx);
}

Test(merge_mamba, the_state_carries_over_chunks)
{
    npy x = npy_must("mamba/block", "x"), conv = npy_must("mamba/block", "stream_conv_state_end");
    npy ssm = npy_must("mamba/block", "stream_ssm_state_end"), want = npy_must("mamba/block", "uni_out");
    kvf_ctx *ctx = ctx_of(NULL, 2);
    kvf_mamba *m = open_mixer(ctx, false);
    for (int64_t chunk = 1; chunk <= 128; chunk = chunk * 3 + 1) {
        float c[3 * 48], s[48 * 16];
        kvf_mamba_reset(m);
        float *got = run_stack(m, &x, chunk);
        for (int64_t i = 0; i < x.n; i++) got[i] -= f32(&x)[i];
        expect_near(got, &want, "chunks");
        cr_assert_eq(kvf_mamba_get_state(m, 0, c, s, NULL), KVF_OK);
        expect_near(c, &conv, "inputs carried");
        expect_near(s, &ssm, "state carried");
        free(got);
    }
    kvf_mamba_close(m);
    kvf_ctx_close(ctx);
}

/* 128 tokens pass the 64 that are walked at a time, 32 do not; the backward scan starts at the end of either.
 */
Test(merge_mamba, both_directions_do_not_depend_on_what_was_before)
{
    npy x = npy_must("mamba/block", "x"), want = npy_must("mamba/block", "storm_bidir_out");
    kvf_ctx *ctx = ctx_of(NULL, 2);
    kvf_mamba *m = open_stack(ctx, 2, true);
    kvf_error err;
    for (int round = 0; round < 3; round++) {
        float *got = run_stack(m, &x, x.shape[0]);
        expect_near(got, &want, "a call of its own");
        free(got);
        npy part = x;
        part.shape[0] = 32;
        part.n = 32 * 24;
        free(run_stack(m, &part, 32));
    }
    cr_assert_eq(kvf_mamba_get_state(m, 0, NULL, NULL, &err), KVF_ERR_STATE);
    kvf_mamba_close(m);
    kvf_ctx_close(ctx);
}

/* STORM compresses after its layers: the same planners, over 8 frames of 4 x 4 tokens. */
Test(merge_mamba, pooling_and_sampling_after_the_layers)
{
    const char *specs[] = { "pool_time:k=4", "sample_time:s=2", "pool_space:p=2",
                            "pool_time:k=4+sample_time:s=2" };
    const char *names[] = { "tpool4", "tsample2", "spool2x2", "tpool4_tsample2" };
    kvf_ctx *ctx = ctx_of(NULL, 2);
    for (int both = 0; both < 2; both++)
        for (int i = 0; i < 4; i++) {
            char name[64];
            snprintf(name, sizeof name, "storm_%s_%s", both ? "bidir" : "uni", names[i]);
            npy x = npy_must("mamba/block", both ? "storm_bidir_out" : "storm_uni_out"),
                want = npy_must("mamba/block", name);
            kvf_merge_input in = input_of(f32(&x), KVF_MERGE_F32, 8, 16, 24);
            kvf_merge_plan *p = plan_of(ctx, specs[i], &in);
            cr_assert_eq(info_of(p).n_out * 24, want.n, "%s", name);
            float *got = apply_of(p, &in.features, NULL);
            expect_near(got, &want, name);
            free(got);
            kvf_merge_plan_free(p);
        }
    kvf_ctx_close(ctx);
}

Test(merge_mamba, wrong_shapes_are_named)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    kvf_error err;
    kvf_mamba *m;
    stack s;
    make_stack(&s, 2, true);
    s.layer[1].backward.conv_w = NULL;
    cr_assert_eq(kvf_mamba_open(&m, ctx, &s.p, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "layer 1") && m == NULL);
    make_stack(&s, 1, false);
    s.layer[0].forward.x_proj = NULL;
    cr_assert_eq(kvf_mamba_open(&m, ctx, &s.p, &err), KVF_ERR_ARG);
    make_stack(&s, 1, false);
    s.p.d_state = 0;
    cr_assert_eq(kvf_mamba_open(&m, ctx, &s.p, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "d_state"));
    make_stack(&s, 1, false);
    cr_assert_eq(kvf_mamba_open(&m, ctx, &s.p, &err), KVF_OK);
    float x[48] = { 0 };
    x[30] = NAN;
    cr_assert_eq(kvf_mamba_run(m, x, 2, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "token 1, element 6"));
    cr_assert_eq(kvf_mamba_run(m, x, 0, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_mamba_get_state(m, 1, NULL, NULL, &err), KVF_ERR_ARG);
    kvf_mamba_close(m);
    kvf_ctx_close(ctx);
}
