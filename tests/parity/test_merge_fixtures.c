/* test_merge_fixtures.c - merge.h against arrays from the published code: what each holds, how it was made
 * and with which tolerances it is to be compared says data/vision/README.md.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/merge_rig.h"

#include "merge/dpc.h"
#include "merge/segment.h"
#include "merge/similarity.h"

static double largest(const float *x, int64_t n)
{
    double m = 0;
    for (int64_t i = 0; i < n; i++) m = fabs((double)x[i]) > m ? fabs((double)x[i]) : m;
    return m;
}

static void expect_near(const float *got, const float *want, int64_t n, double tolerance, const char *what)
{
    for (int64_t i = 0; i < n; i++)
        cr_assert(fabs((double)got[i] - (double)want[i]) <= tolerance, "%s: element %lld is %.9g, not %.9g",
                  what, (long long)i, (double)got[i], (double)want[i]);
}

/* ---- The outer merge, end to end ---------------------------------------------------------------- */

typedef struct outer {
    char folder[64];
    npy feat, attn, segments, counts, noise, tokens, meta;
    bool close; /* a decision is within rounding: counts and segments only */
} outer;

static bool load_outer(outer *o, const table *t, int row)
{
    char of_case[64];
    snprintf(of_case, sizeof of_case, "outer/%s", cell(t, row, "case"));
    snprintf(o->folder, sizeof o->folder, "%.40s/%.8s", of_case, cell(t, row, "set"));
    o->feat = npy_in(of_case, "feat");
    o->tokens = npy_in(o->folder, "tokens");
    if (!o->feat.data || !o->tokens.data) return false;
    o->attn = npy_must(of_case, "attn");
    o->segments = npy_must(o->folder, "segments");
    o->counts = npy_must(o->folder, "seg_counts");
    o->noise = npy_must(o->folder, "noise");
    o->meta = npy_must(o->folder, "meta");
    const char *margins[] = { "m_tau", "m_dpc", "m_assign", "m_attn" };
    o->close = false;
    /* The arrays' README asks for 1e-4; distances are summed from differences here, which is good for 1e-6.
     */
    for (int i = 0; i < 4; i++) o->close |= number(t, row, margins[i]) <= 1e-6;
    return true;
}

static void check_segments(const outer *o, const table *t, int row, const kvf_merge_plan_info *i)
{
    cr_assert_eq(i->n_out, (int64_t)number(t, row, "n_out"), "%s: %lld tokens", o->folder,
                 (long long)i->n_out);
    cr_assert_eq(i->total_reduced, (int64_t)number(t, row, "total_reduced"), "%s", o->folder);
    cr_assert(fabs(i->retain_eff - number(t, row, "retain_eff")) < 1e-15, "%s: %.17g", o->folder,
              i->retain_eff);
    cr_assert_eq(i->n_segment, o->segments.shape[0], "%s", o->folder);
    for (int64_t s = 0; s < i->n_segment; s++) {
        const kvf_merge_segment *g = &i->segment[s];
        const int32_t *ends = i32(&o->segments) + 2 * s, *count = i32(&o->counts) + 4 * s;
        int32_t len = g->last - g->first + 1;
        cr_assert(g->first == ends[0] && g->last == ends[1], "%s: segment %lld", o->folder, (long long)s);
        cr_assert(g->static_in == count[0] && g->static_kept == count[1], "%s: segment %lld", o->folder,
                  (long long)s);
        cr_assert(g->dynamic_in == count[2] * len && g->dynamic_kept == count[3] * len, "%s: segment %lld",
                  o->folder, (long long)s);
    }
}

static void run_outer(kvf_ctx *ctx, const outer *o, const table *t, int row)
{
    int64_t n_frame = o->feat.shape[0], n_tok = o->feat.shape[1], dim = o->feat.shape[2];
    bool grid = number(t, row, "grid") != 0;
    char spec[300];
    snprintf(spec, sizeof spec, "holitom:mode=official,tau=%s,ratio=%s,beta=%s,knn=%s,window=%s,merge=%s,%s",
             cell(t, row, "tau"), cell(t, row, "ratio"), cell(t, row, "beta"), cell(t, row, "K"),
             cell(t, row, "max_window"), number(t, row, "no_beta") != 0 ? "mean" : "beta",
             grid ? "order=grid,newline=row" : "order=segment,newline=end");
    kvf_merge_input in = input_of(f32(&o->feat), KVF_MERGE_F32, n_frame, n_tok, dim);
    in.scores = f32(&o->attn);
    in.noise = f32(&o->noise);
    in.n_noise = o->noise.n;
    kvf_merge_plan *p = plan_of(ctx, spec, &in);
    kvf_merge_plan_info i = info_of(p);
    check_segments(o, t, row, &i);
    if (!o->close) {
        for (int64_t k = 0; k < i.n_out; k++)
            cr_assert_arr_eq(&i.meta[k], i32(&o->meta) + 4 * k, sizeof *i.meta, "%s: token %lld", o->folder,
                             (long long)k);
        float *newline = malloc((size_t)dim * sizeof *newline);
        for (int64_t d = 0; d < dim; d++) newline[d] = (float)((double)d * 0.01 - 100);
        float *got = apply_of(p, &in.features, newline);
        double scale = largest(f32(&o->feat), o->feat.n);
        expect_near(got, f32(&o->tokens), o->tokens.n, 1e-5 * (scale > 1 ? scale : 1), o->folder);
        free(got);
        free(newline);
    }
    kvf_merge_plan_free(p);
}

Test(merge_fixtures, outer_merge_is_the_published_one)
{
    table *t = table_load("outer/manifest.tsv");
    int n_run = 0, n_exact = 0;
    for (int c = 0; c < 3; c++) {
        kvf_ctx *ctx = ctx_of(rig_cpus[c], 1);
        if (!ctx) continue;
        n_run = n_exact = 0;
        for (int row = 1; row < t->n_row; row++) {
            outer o;
            if (!load_outer(&o, t, row)) continue;
            run_outer(ctx, &o, t, row);
            n_run++;
            n_exact += !o.close;
        }
        kvf_ctx_close(ctx);
    }
    cr_log_info("%d of %d settings, %d of them token for token", n_run, t->n_row - 1, n_exact);
    cr_assert_geq(n_run, 33);
    if (getenv("KVFOLD_FIXTURES")) cr_assert_eq(n_run, 45);
}

Test(merge_fixtures, similarity_is_the_published_one)
{
    table *t = table_load("outer/manifest.tsv");
    kvf_merge_env env = { .mem = &kvf_mem_default };
    for (int row = 1; row < t->n_row; row++) {
        char folder[64];
        snprintf(folder, sizeof folder, "outer/%s", cell(t, row, "case"));
        npy feat = npy_in(folder, "feat"), want = npy_in(folder, "feature_sim");
        if (!feat.data || !want.data || want.n == 0) continue;
        float *sim = malloc((size_t)want.n * sizeof *sim);
        double *norm = malloc((size_t)(feat.shape[0] * feat.shape[1]) * sizeof *norm);
        for (int level = 0; level < 3; level++) {
            if (kvf_cpu_level_parse(&(kvf_cpu_level){ 0 }, rig_cpus[level], kvf_cpu_detect(), NULL) < 0)
                continue;
            kvf_rows_init(&env.rows, (kvf_cpu_level)level);
            kvf_tensor x =
                kvf_tensor_of(f32(&feat), KVF_MERGE_F32, feat.shape[0], feat.shape[1], feat.shape[2]);
            cr_assert_eq(kvf_similarity(&env, &x, sim, norm, NULL), KVF_OK);
            expect_near(sim, f32(&want), want.n, 1e-6, folder);
        }
        free(sim);
        free(norm);
    }
}

/* ---- Segmentation -------------------------------------------------------------------------------- */

static int64_t segment_all(const float *sim, int64_t t, int64_t n, int64_t window, double tau, int32_t *out,
                           int64_t *gain)
{
    kvf_segmenter s;
    cr_assert_eq(kvf_segmenter_init(&s, &kvf_mem_default, n, window, tau, NULL), KVF_OK);
    for (int64_t i = 0; i < t; i++)
        cr_assert_eq(kvf_segmenter_add(&s, i ? sim + (i - 1) * n : NULL, NULL), KVF_OK);
    int64_t count = kvf_segmenter_trace(&s, t - 1, out);
    *gain = s.best[t - 1];
    kvf_segmenter_fini(&s);
    return count;
}

Test(merge_fixtures, segmentation_is_the_published_one)
{
    npy index = npy_must("dp", "index"), sims = npy_must("dp", "sims"), segments = npy_must("dp", "segments");
    for (int64_t i = 0; i < index.shape[0]; i++) {
        const int32_t *c = i32(&index) + 9 * i;
        int32_t out[2 * 1024];
        int64_t gain, n = segment_all(f32(&sims) + c[3], c[0], c[1], c[2], c[8] / 100.0, out, &gain);
        cr_assert_eq(n, c[6], "case %lld", (long long)i);
        cr_assert_eq(gain, c[7], "case %lld", (long long)i);
        cr_assert_arr_eq(out, i32(&segments) + 2 * c[5], (size_t)n * 8, "case %lld", (long long)i);
    }
}

Test(merge_fixtures, segmentation_of_600_frames_is_the_published_one)
{
    npy sim = npy_must("dp_large", "sim");
    table *t = table_load("dp_large/totals.tsv");
    for (int row = 1; row < t->n_row; row++) {
        char name[32];
        snprintf(name, sizeof name, "segments_w%s", cell(t, row, "w"));
        npy want = npy_must("dp_large", name);
        int32_t out[2 * 600];
        int64_t gain, n = segment_all(f32(&sim), 600, 49, (int64_t)number(t, row, "w"), number(t, row, "tau"),
                                      out, &gain);
        cr_assert_eq(n, want.shape[0]);
        cr_assert_eq(gain, (int64_t)number(t, row, "total_reduced"));
        cr_assert_arr_eq(out, i32(&want), (size_t)n * 8);
    }
}

/* ---- Clusters ------------------------------------------------------------------------------------- */

/* Rows by ascending centre: beta centre + (1 - beta) mean of members, or the mean of all. */
static void merge_rows(const kvf_dpc *a, double beta, bool mean, float *out)
{
    for (int64_t c = 0; c < a->n_center; c++)
        for (int64_t d = 0; d < a->dim; d++) {
            double sum = 0, n = 0, center = (double)a->x[a->center[c] * a->dim + d];
            for (int64_t i = 0; i < a->n; i++) {
                if (a->member[i] != c || i == a->center[c]) continue;
                sum += (double)a->x[i * a->dim + d];
                n++;
            }
            out[c * a->dim + d] = (float)(n == 0 ? center
                                          : mean ? (sum + center) / (n + 1)
                                                 : beta * center + (1 - beta) * sum / n);
        }
}

static void run_dpc(const kvf_merge_env *env, const table *t, int row)
{
    char folder[32];
    snprintf(folder, sizeof folder, "dpc/c%s", cell(t, row, "case"));
    npy x = npy_must(folder, "x"), noise = npy_must(folder, "noise"),
        want = npy_must(folder, "centers_by_score");
    npy beta = npy_must(folder, "merged_beta06"), mean = npy_must(folder, "merged_mean"),
        dist = npy_in(folder, "dist");
    int64_t n = x.shape[0], c = want.n;
    kvf_dpc a = { .x = f32(&x),
                  .n = n,
                  .dim = x.shape[1],
                  .n_center = c,
                  .k = (int64_t)number(t, row, "K"),
                  .noise = f32(&noise) };
    a.center = calloc((size_t)c, sizeof *a.center);
    a.member = calloc((size_t)n, sizeof *a.member);
    a.dist = calloc((size_t)(n * n), sizeof *a.dist);
    a.score = calloc((size_t)n, sizeof *a.score);
    cr_assert_eq(kvf_dpc_run(env, &a, NULL), KVF_OK);
    if (dist.data) expect_near(a.dist, f32(&dist), n * n, 2e-3, folder);
    float *out = malloc((size_t)(c * a.dim) * sizeof *out);
    if (strcmp(cell(t, row, "case"), "3") == 0) {
        /* One centre, chosen by rounding: some centre it must be. */
        bool found = false;
        for (int64_t i = 0; i < n && !found; i++) {
            a.center[0] = (int32_t)i;
            kvf_dpc_join(&a);
            merge_rows(&a, 0.6, false, out);
            found = true;
            for (int64_t d = 0; d < a.dim; d++) found &= fabsf(out[d] - f32(&beta)[d]) < 1e-5f;
        }
        cr_assert(found, "no centre gives the published token");
    } else {
        /* Descending scores give the published order, ascending indices the published rows. */
        for (int64_t i = 0; i + 1 < c; i++)
            cr_assert_geq(a.score[i32(&want)[i]], a.score[i32(&want)[i + 1]] * (1 - 1e-6), "%s", folder);
        for (int64_t i = 0; i < c; i++) {
            bool found = false;
            for (int64_t j = 0; j < c; j++) found |= a.center[j] == i32(&want)[i];
            cr_assert(found, "%s: token %d is no centre", folder, i32(&want)[i]);
        }
        double scale = largest(f32(&x), x.n);
        merge_rows(&a, 0.6, false, out);
        expect_near(out, f32(&beta), beta.n, 1e-5 * (scale > 1 ? scale : 1), folder);
        merge_rows(&a, 0, true, out);
        expect_near(out, f32(&mean), mean.n, 1e-5 * (scale > 1 ? scale : 1), folder);
    }
    free(out);
    free(a.center);
    free(a.member);
    free(a.dist);
    free(a.score);
}

Test(merge_fixtures, density_peaks_are_the_published_ones)
{
    table *t = table_load("dpc/manifest.tsv");
    kvf_merge_env env = { .mem = &kvf_mem_default };
    for (int level = 0; level < 3; level++) {
        if (kvf_cpu_level_parse(&(kvf_cpu_level){ 0 }, rig_cpus[level], kvf_cpu_detect(), NULL) < 0) continue;
        kvf_rows_init(&env.rows, (kvf_cpu_level)level);
        for (int row = 1; row < t->n_row; row++) run_dpc(&env, t, row);
    }
    cr_assert_eq(t->n_row, 11);
}

/* ---- Pooling, inner merge, VisionZip, EVS -------------------------------------------------------------- */

Test(merge_fixtures, pooling_is_the_published_one)
{
    const char *kinds[] = { "bilinear", "average", "max" }, *sides[] = { "27", "14" };
    kvf_ctx *ctx = ctx_of(NULL, 2);
    for (int k = 0; k < 3; k++)
        for (int s = 0; s < 2; s++) {
            char in[16], out[32];
            snprintf(in, sizeof in, "in%s", sides[s]);
            snprintf(out, sizeof out, "%s%s", kinds[k], sides[s]);
            npy x = npy_must("pool", in), want = npy_must("pool", out);
            kvf_merge_pool a;
            kvf_error err;
            kvf_merge_pool_init(&a);
            a.src = (kvf_merge_view){
                .data = f32(&x), .n_frame = x.shape[0], .n_tok = x.shape[1], .dim = x.shape[2]
            };
            a.kind = k;
            cr_assert_eq(kvf_merge_pool_run(ctx, &a, &err), KVF_OK, "%s", err.msg);
            cr_assert_eq(a.out_h * a.out_w, want.shape[1], "%s", out);
            float *got = malloc((size_t)want.n * sizeof *got);
            a.dst = got;
            cr_assert_eq(kvf_merge_pool_run(ctx, &a, &err), KVF_OK, "%s", err.msg);
            expect_near(got, f32(&want), want.n, k == 2 ? 0 : 1e-5, out);
            free(got);
        }
    kvf_ctx_close(ctx);
}

Test(merge_fixtures, inner_merge_is_the_published_one)
{
    table *t = table_load("inner/manifest.tsv");
    for (int c = 0; c < 3; c++) {
        kvf_ctx *ctx = ctx_of(rig_cpus[c], 2);
        for (int row = 1; ctx && row < t->n_row; row++) {
            char folder[32];
            snprintf(folder, sizeof folder, "inner/c%s", cell(t, row, "case"));
            npy x = npy_must(folder, "hidden"), attn = npy_must(folder, "attn_last"),
                want = npy_must(folder, "hidden_out");
            npy keep = npy_must(folder, "keep_pos");
            kvf_merge_inner a;
            kvf_error err;
            kvf_merge_inner_init(&a);
            a.hidden = f32(&x);
            a.n_row = x.shape[0];
            a.dim = x.shape[1];
            a.first = (int64_t)number(t, row, "img_start");
            a.n = (int64_t)number(t, row, "img_len");
            a.attention = f32(&attn);
            a.n_head = attn.shape[0];
            a.drop = number(t, row, "R");
            cr_assert_eq(kvf_merge_inner_count(a.n_row, a.n, a.drop), want.shape[0], "%s", folder);
            float *out = malloc((size_t)want.n * sizeof *out);
            int32_t *pos = malloc((size_t)want.shape[0] * sizeof *pos);
            a.out = out;
            a.keep = pos;
            cr_assert_eq(kvf_merge_inner_run(ctx, &a, &err), KVF_OK, "%s: %s", folder, err.msg);
            cr_assert_eq(a.n_out, want.shape[0]);
            cr_assert_arr_eq(pos, i32(&keep), (size_t)a.n_out * sizeof *pos, "%s", folder);
            expect_near(out, f32(&want), want.n, 1e-5, folder);
            free(out);
            free(pos);
        }
        kvf_ctx_close(ctx);
    }
    cr_assert_eq(t->n_row, 8);
}

Test(merge_fixtures, visionzip_is_the_published_one)
{
    npy x = npy_must("visionzip", "feat"), keys = npy_must("visionzip", "metric"),
        attn = npy_must("visionzip", "attn");
    for (int c = 0; c < 3; c++)
        for (int budget = 10; budget <= 20; budget += 10) {
            kvf_ctx *ctx = ctx_of(rig_cpus[c], 1);
            if (!ctx) continue;
            char name[32], spec[100];
            snprintf(name, sizeof name, "tokens_%d", budget);
            snprintf(spec, sizeof spec, "visionzip:mode=official,newline=end,ratio=%.15f",
                     budget / 49.0 + 1e-9);
            npy want = npy_must("visionzip", name);
            kvf_merge_input in = input_of(f32(&x), KVF_MERGE_F32, 4, 49, 32);
            in.keys = (kvf_merge_view){ .data = f32(&keys), .n_frame = 4, .n_tok = 49, .dim = 16 };
            in.scores = f32(&attn);
            kvf_merge_plan *p = plan_of(ctx, spec, &in);
            cr_assert_eq(info_of(p).n_out, want.shape[0]);
            float newline[32];
            for (int i = 0; i < 32; i++) newline[i] = 7;
            float *got = apply_of(p, &in.features, newline);
            expect_near(got, f32(&want), want.n, 1e-5, name);
            free(got);
            kvf_merge_plan_free(p);
            kvf_ctx_close(ctx);
        }
}

Test(merge_fixtures, evs_is_the_published_one)
{
    for (int c = 0; c < 15; c++) {
        kvf_ctx *ctx = ctx_of(rig_cpus[c % 3], 1);
        if (!ctx) continue;
        char folder[16], name[32], text[64] = "", spec[64];
        snprintf(folder, sizeof folder, "evs/c%d", c / 3);
        snprintf(name, sizeof name, "%s/q.txt", folder);
        FILE *f = rig_open(name);
        cr_assert_not_null(f, "%s", name);
        size_t n_text = fread(text, 1, sizeof text - 1, f);
        fclose(f);
        char *end;
        double q = strtod(text, &end);
        int64_t n_kept = strtoll(end, NULL, 10), n = 0;
        cr_assert(n_text > 0 && n_kept > 0);
        snprintf(spec, sizeof spec, "evs:mode=official,ratio=%.6f", 1 - q);
        npy x = npy_must(folder, "feat"), mask = npy_must(folder, "mask");
        kvf_merge_input in = input_of(f32(&x), KVF_MERGE_F32, x.shape[0], x.shape[1], x.shape[2]);
        kvf_merge_plan *p = plan_of(ctx, spec, &in);
        kvf_merge_plan_info i = info_of(p);
        cr_assert_eq(i.n_out, n_kept, "%s", folder);
        for (int64_t k = 0; k < mask.n; k++) {
            if (!((const uint8_t *)mask.data)[k]) continue;
            cr_assert_eq(i.source[n], k, "%s: token %lld", folder, (long long)n);
            n++;
        }
        cr_assert_eq(n, n_kept);
        kvf_merge_plan_free(p);
        kvf_ctx_close(ctx);
    }
}
