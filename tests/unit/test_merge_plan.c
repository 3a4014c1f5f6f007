/* test_merge_plan.c - plans of every method: counts, order, weights, positions, and what they say of bad
 * input.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/merge_rig.h"

/* What every plan must be, whoever made it. */
static void check_plan(const kvf_merge_plan *p, const char *what)
{
    kvf_merge_plan_info i = info_of(p);
    int64_t n_kind[3] = { 0 }, next = 0, n_used = 0;
    uint8_t *used = calloc((size_t)(i.n_frame * i.n_tok), 1);
    cr_assert(i.row[0] == 0 && strlen(i.spec) > 0 && strlen(i.scores) > 0, "%s", what);
    for (int64_t k = 0; k < i.n_out; k++) {
        const kvf_merge_meta *m = &i.meta[k];
        cr_assert(m->kind >= 0 && m->kind < 3 && m->segment >= 0 && m->segment < i.n_segment, "%s", what);
        cr_assert(m->frame >= 0 && m->frame < i.n_frame && m->position < i.n_tok, "%s", what);
        int64_t n = i.row[k + 1] - i.row[k];
        cr_assert(m->kind == KVF_MERGE_NEWLINE ? n == 0 && m->position == -1 : n >= 1 && m->position >= 0,
                  "%s", what);
        cr_assert(m->kind != KVF_MERGE_COPIED || (n == 1 && i.weight[i.row[k]] == 1.0f), "%s", what);
        bool center = m->kind == KVF_MERGE_NEWLINE;
        for (int64_t j = i.row[k]; j < i.row[k + 1]; j++) {
            cr_assert(i.source[j] >= 0 && i.source[j] < i.n_frame * i.n_tok && isfinite(i.weight[j]), "%s",
                      what);
            cr_assert(j == i.row[k] || i.source[j] > i.source[j - 1], "%s: sources of %lld", what,
                      (long long)k);
            center |= i.source[j] == m->frame * i.n_tok + m->position;
            used[i.source[j]] = 1;
        }
        cr_assert(center, "%s: token %lld lacks its centre", what, (long long)k);
        n_kind[m->kind]++;
    }
    for (int64_t s = 0; s < i.n_segment; s++) {
        cr_assert(i.segment[s].first == next && i.segment[s].last >= next, "%s: segment %lld", what,
                  (long long)s);
        next = i.segment[s].last + 1;
    }
    for (int64_t k = 0; k < i.n_frame * i.n_tok; k++) n_used += used[k];
    cr_assert(next == i.n_frame && n_used == i.n_used, "%s", what);
    cr_assert(n_kind[0] == i.n_merged && n_kind[1] == i.n_copied && n_kind[2] == i.n_newline, "%s", what);
    free(used);
}

static const char *const methods[] = {
    "holitom:tau=0.6,",
    "holitom:tau=0.6,drift=0.7,",
    "holitom:budget=segment,",
    "holitom:order=grid,newline=row,",
    "holitom:distance=cosine,merge=mean,",
    "holitom:window=3,newline=end,",
    "holitom:tau=0.6,context=0.5,",
    "holitom:context=1,order=grid,newline=row,",
    "fastvid:",
    "visionzip:",
    "evs:",
    "uniform:",
};

enum { N_METHOD = sizeof methods / sizeof *methods };

static bool same_plan(const kvf_merge_plan *a, const kvf_merge_plan *b)
{
    kvf_merge_plan_info x = info_of(a), y = info_of(b);
    return x.n_out == y.n_out && memcmp(x.row, y.row, (size_t)(x.n_out + 1) * sizeof *x.row) == 0 &&
           memcmp(x.source, y.source, (size_t)x.row[x.n_out] * sizeof *x.source) == 0 &&
           memcmp(x.weight, y.weight, (size_t)x.row[x.n_out] * sizeof *x.weight) == 0 &&
           memcmp(x.meta, y.meta, (size_t)x.n_out * sizeof *x.meta) == 0;
}

/* ---- Counts -------------------------------------------------------------------------------------- */

Test(merge_plan, exact_mode_returns_exactly_the_count)
{
    static const int64_t shapes[][3] = { { 1, 1, 1 },    { 1, 9, 3 },   { 2, 1, 5 },   { 7, 4, 8 },
                                         { 12, 25, 16 }, { 23, 16, 7 }, { 3, 49, 20 }, { 40, 6, 4 } };
    static const char *const ratios[] = { "0.000001", "0.01", "0.05", "0.1", "0.15",  "0.25",
                                          "0.29",     "0.5",  "0.75", "0.9", "0.999", "1" };
    kvf_ctx *ctx = ctx_of(NULL, 2);
    rng r = { 21 };
    for (int s = 0; s < 8; s++)
        for (int still = 0; still < 3; still++) {
            int64_t t = shapes[s][0], n = shapes[s][1], d = shapes[s][2];
            float *x = some_video(&r, t, n, d), *scores = some_scores(&r, t * n);
            for (int64_t i = n * d; i < t * n * d && still == 1; i++) x[i] = x[i - n * d]; /* nothing moves */
            for (int64_t i = 0; i < t * n * d && still == 2; i++) x[i] = 0;
            for (int m = 0; m < N_METHOD; m++)
                for (int q = 0; q < 12; q++) {
                    char spec[128];
                    snprintf(spec, sizeof spec, "%sratio=%s", methods[m], ratios[q]);
                    double ratio = strtod(ratios[q], NULL);
                    int64_t want = (int64_t)floor(ratio * (double)(t * n) + 1e-9);
                    if (want < 1) want = 1;
                    kvf_merge_input in = input_of(x, KVF_MERGE_F32, t, n, d);
                    in.scores = (m + q) % 2 ? scores : NULL;
                    kvf_merge_plan *p = plan_of(ctx, spec, &in);
                    kvf_merge_plan_info i = info_of(p);
                    cr_assert_eq(i.n_out - i.n_newline, want,
                                 "%s, %lld x %lld x %lld, still %d: %lld tokens, not %lld", spec,
                                 (long long)t, (long long)n, (long long)d, still,
                                 (long long)(i.n_out - i.n_newline), (long long)want);
                    cr_assert_eq(i.n_asked, want, "%s", spec);
                    check_plan(p, spec);
                    kvf_merge_plan_free(p);
                }
            free(x);
            free(scores);
        }
    kvf_ctx_close(ctx);
}

/* Weights of a mean add up to 1; only visionzip's published form adds. */
Test(merge_plan, merged_tokens_are_means)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 22 };
    float *x = some_video(&r, 20, 16, 8);
    const char *specs[] = { "holitom:ratio=0.2,tau=0.5,context=0.4",
                            "holitom:mode=official,ratio=0.1,tau=0.5",
                            "holitom:merge=mean,tau=0.5",
                            "fastvid:ratio=0.2",
                            "visionzip:context=mean,ratio=0.3",
                            "pool_time:k=3",
                            "pool_space:p=3",
                            "pool_time:k=4+pool_space:p=2",
                            "pool_space:p=2+holitom:ratio=0.3" };
    for (int s = 0; s < 9; s++) {
        kvf_merge_input in = input_of(x, KVF_MERGE_F32, 20, 16, 8);
        kvf_merge_plan *p = plan_of(ctx, specs[s], &in);
        kvf_merge_plan_info i = info_of(p);
        check_plan(p, specs[s]);
        cr_assert_gt(i.n_merged, 0, "%s", specs[s]);
        for (int64_t k = 0; k < i.n_out; k++) {
            double sum = 0;
            for (int64_t j = i.row[k]; j < i.row[k + 1]; j++) sum += (double)i.weight[j];
            cr_assert(fabs(sum - 1) < 1e-5, "%s: token %lld weighs %.9g", specs[s], (long long)k, sum);
        }
        kvf_merge_plan_free(p);
    }
    free(x);
    kvf_ctx_close(ctx);
}

Test(merge_plan, the_same_input_gives_the_same_plan_at_every_thread_count)
{
    rng r = { 23 };
    float *x = some_video(&r, 30, 36, 40), *scores = some_scores(&r, 30 * 36);
    for (int m = 0; m < N_METHOD; m++)
        for (int given = 0; given < 2; given++) {
            kvf_merge_plan *first = NULL;
            kvf_ctx *ctx[4] = { ctx_of(NULL, 1), ctx_of(NULL, 1), ctx_of(NULL, 2), ctx_of(NULL, 7) };
            for (int c = 0; c < 4; c++) {
                char spec[128];
                snprintf(spec, sizeof spec, "%sratio=0.15", methods[m]);
                kvf_merge_input in = input_of(x, KVF_MERGE_F32, 30, 36, 40);
                in.scores = given ? scores : NULL;
                kvf_merge_plan *p = plan_of(ctx[c], spec, &in);
                cr_assert(!first || same_plan(first, p), "%s", spec);
                if (!first)
                    first = p;
                else
                    kvf_merge_plan_free(p);
            }
            kvf_merge_plan_free(first);
            for (int c = 0; c < 4; c++) kvf_ctx_close(ctx[c]);
        }
    free(x);
    free(scores);
}

/* ---- Element types ------------------------------------------------------------------------------- */

static void *narrowed(const float *x, int64_t n, kvf_merge_type type, float *back)
{
    uint16_t *h = malloc((size_t)n * 2);
    for (int64_t i = 0; i < n; i++) {
        h[i] = type == KVF_MERGE_F16 ? kvf_f16_from_f32(x[i]) : kvf_bf16_from_f32(x[i]);
        back[i] = type == KVF_MERGE_F16 ? kvf_f32_from_f16(h[i]) : kvf_f32_from_bf16(h[i]);
    }
    return h;
}

/* Half floats give the plan of the same numbers in f32, and its tokens. */
Test(merge_plan, half_floats_are_the_numbers_they_stand_for)
{
    enum { T = 20, N = 25, D = 37 };
    rng r = { 24 };
    float *x = some_video(&r, T, N, D), *back = malloc(T * N * D * 4), *scores = some_scores(&r, T * N);
    for (int c = 0; c < 3; c++)
        for (int type = 1; type < 3; type++) {
            kvf_ctx *ctx = ctx_of(rig_cpus[c], 1);
            if (!ctx) continue;
            void *h = narrowed(x, T * N * D, (kvf_merge_type)type, back);
            for (int m = 0; m < N_METHOD; m++) {
                kvf_merge_input a = input_of(back, KVF_MERGE_F32, T, N, D),
                                b = input_of(h, (kvf_merge_type)type, T, N, D);
                char spec[128];
                snprintf(spec, sizeof spec, "%sratio=0.2", methods[m]);
                a.scores = b.scores = scores;
                kvf_merge_plan *p = plan_of(ctx, spec, &a), *q = plan_of(ctx, spec, &b);
                cr_assert(same_plan(p, q), "%s", spec);
                float newline[D] = { 0 };
                uint16_t newline_h[D] = { 0 };
                float *u = apply_of(p, &a.features, newline), *v = apply_of(q, &b.features, newline_h);
                for (int64_t i = 0; i < info_of(p).n_out * D; i++)
                    cr_assert(fabsf(u[i] - v[i]) < 1e-5f, "%s", spec);
                free(u);
                free(v);
                kvf_merge_plan_free(p);
                kvf_merge_plan_free(q);
            }
            free(h);
            kvf_ctx_close(ctx);
        }
    free(x);
    free(back);
    free(scores);
}

Test(merge_plan, instruction_sets_agree)
{
    rng r = { 25 };
    float *x = some_video(&r, 24, 36, 100), *scores = some_scores(&r, 24 * 36);
    for (int m = 0; m < N_METHOD; m++) {
        float *want = NULL;
        for (int c = 0; c < 3; c++) {
            kvf_ctx *ctx = ctx_of(rig_cpus[c], 1);
            if (!ctx) continue;
            char spec[128];
            float newline[100] = { 0 };
            snprintf(spec, sizeof spec, "%sratio=0.2", methods[m]);
            kvf_merge_input in = input_of(x, KVF_MERGE_F32, 24, 36, 100);
            in.scores = scores;
            kvf_merge_plan *p = plan_of(ctx, spec, &in);
            cr_assert_str_eq(info_of(p).cpu, rig_cpus[c]);
            float *got = apply_of(p, &in.features, newline);
            for (int64_t i = 0; i < info_of(p).n_out * 100 && want; i++)
                cr_assert(fabsf(got[i] - want[i]) < 1e-5f, "%s on %s", spec, rig_cpus[c]);
            if (want)
                free(got);
            else
                want = got;
            kvf_merge_plan_free(p);
            kvf_ctx_close(ctx);
        }
        free(want);
    }
    free(x);
    free(scores);
}

/* ---- Applying ------------------------------------------------------------------------------------- */

/* By the definition, in double, from strided sources into strided rows of every type. */
Test(merge_plan, apply_is_the_weighted_sum)
{
    enum { T = 9, N = 12, D = 21, TOK = 24, FRAME = N * TOK + 5, OUT = 23 };
    kvf_ctx *ctx = ctx_of(NULL, 2);
    rng r = { 26 };
    float *x = some_video(&r, T, N, D), *wide = calloc(T * FRAME, 4), newline[D];
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = 0; n < N; n++) memcpy(wide + t * FRAME + n * TOK, x + (t * N + n) * D, D * 4);
    for (int i = 0; i < D; i++) newline[i] = (float)i / 3;
    kvf_merge_input in = input_of(wide, KVF_MERGE_F32, T, N, D), dense = input_of(x, KVF_MERGE_F32, T, N, D);
    in.features.frame_stride = FRAME;
    in.features.tok_stride = TOK;
    kvf_merge_plan *p = plan_of(ctx, "holitom:tau=0.3,ratio=0.3,newline=end", &in);
    kvf_merge_plan *q = plan_of(ctx, "holitom:tau=0.3,ratio=0.3,newline=end", &dense);
    kvf_merge_plan_info i = info_of(p);
    cr_assert(same_plan(p, q));
    cr_assert(i.n_merged > 0 && i.n_copied > 0);
    for (int type = 0; type < 3; type++) {
        kvf_merge_apply a;
        kvf_error err;
        kvf_merge_apply_init(&a);
        a.src = in.features;
        a.newline = newline;
        a.dst_type = (kvf_merge_type)type;
        a.dst_stride = OUT;
        char *dst = malloc((size_t)i.n_out * OUT * 4);
        memset(dst, 0x5a, (size_t)i.n_out * OUT * 4);
        a.dst = dst;
        cr_assert_eq(kvf_merge_plan_apply(p, &a, &err), KVF_OK, "%s", err.msg);
        for (int64_t k = 0; k < i.n_out; k++)
            for (int64_t d = 0; d < OUT; d++) {
                double want = d < D && i.meta[k].kind == KVF_MERGE_NEWLINE ? (double)newline[d] : 0;
                for (int64_t j = i.row[k]; j < i.row[k + 1] && d < D; j++)
                    want += (double)i.weight[j] * (double)x[i.source[j] * D + d];
                const char *at = dst + (k * OUT + d) * (type ? 2 : 4);
                if (d >= D) { /* between rows nothing is written */
                    cr_assert_eq(*at, 0x5a);
                    continue;
                }
                float f;
                uint16_t h;
                memcpy(&f, at, 4);
                memcpy(&h, at, 2);
                double got =
                    type == 0 ? (double)f : (double)(type == 1 ? kvf_f32_from_f16(h) : kvf_f32_from_bf16(h));
                double tolerance = type == 0 ? 1e-6 : type == 1 ? 1e-3 : 8e-3;
                cr_assert(fabs(got - want) <= tolerance * fmax(1, fabs(want)), "type %d, token %lld", type,
                          (long long)k);
            }
        free(dst);
    }
    kvf_merge_plan_free(p);
    kvf_merge_plan_free(q);
    free(x);
    free(wide);
    kvf_ctx_close(ctx);
}

/* Another tensor goes the same way: applied to the numbers of the tokens, a copied one gives its own. */
Test(merge_plan, a_plan_moves_other_tensors)
{
    enum { T = 10, N = 16 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 27 };
    float *x = some_video(&r, T, N, 8), number_of[T * N];
    for (int i = 0; i < T * N; i++) number_of[i] = (float)i;
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, 8);
    kvf_merge_plan *p = plan_of(ctx, "evs:ratio=0.4", &in);
    kvf_merge_view v = { .data = number_of, .n_frame = T, .n_tok = N, .dim = 1 };
    float *got = apply_of(p, &v, NULL);
    kvf_merge_plan_info i = info_of(p);
    int32_t owner[T * N];
    cr_assert_eq(kvf_merge_plan_owners(p, owner, NULL), KVF_OK);
    for (int64_t k = 0; k < i.n_out; k++) {
        cr_assert_eq(got[k], (float)i.source[k]);
        cr_assert_eq(owner[i.source[k]], k);
    }
    int64_t n_dropped = 0;
    for (int k = 0; k < T * N; k++) n_dropped += owner[k] < 0;
    cr_assert_eq(n_dropped, T * N - i.n_out);
    free(got);
    free(x);
    kvf_merge_plan_free(p);
    kvf_ctx_close(ctx);
}

/* ---- Order and positions --------------------------------------------------------------------------- */

Test(merge_plan, grid_order_is_raster_order)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 28 };
    float *x = some_video(&r, 18, 20, 12);
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, 18, 20, 12);
    in.grid_w = 5;
    kvf_merge_plan *p = plan_of(ctx, "holitom:ratio=0.3,tau=0.5,order=grid,newline=row", &in);
    kvf_merge_plan_info i = info_of(p);
    int64_t last = -1;
    for (int64_t k = 0; k < i.n_out; k++) {
        if (i.meta[k].kind == KVF_MERGE_NEWLINE) {
            cr_assert(k > 0 && i.meta[k - 1].kind != KVF_MERGE_NEWLINE &&
                      i.meta[k].frame == i.meta[k - 1].frame);
            bool ends = k + 1 == i.n_out || i.meta[k + 1].frame > i.meta[k].frame ||
                        i.meta[k + 1].position / 5 > i.meta[k - 1].position / 5;
            cr_assert(ends, "a newline within a row");
            continue;
        }
        int64_t at = (int64_t)i.meta[k].frame * 20 + i.meta[k].position;
        cr_assert_gt(at, last);
        last = at;
    }
    kvf_merge_plan_free(p);
    free(x);
    kvf_ctx_close(ctx);
}

Test(merge_plan, positions_keep_or_count)
{
    enum { T = 6, N = 12, W = 4 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 29 };
    float *x = some_video(&r, T, N, 6);
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, 6);
    in.grid_w = W;
    kvf_merge_plan *p = plan_of(ctx, "holitom:ratio=0.4,tau=0.5,order=grid,newline=row", &in);
    kvf_merge_plan_info i = info_of(p);
    int32_t *out = malloc((size_t)i.n_out * 16);
    kvf_merge_positions q;
    kvf_merge_positions_init(&q);
    q.out = out;
    q.base = 7;
    cr_assert_eq(kvf_merge_plan_positions(p, &q, NULL), KVF_OK);
    for (int64_t k = 0; k < i.n_out; k++) cr_assert_eq(out[k], 7 + k);
    cr_assert_eq(q.next, 7 + i.n_out);
    q.mode = KVF_MERGE_KEEP;
    q.planes = 4;
    q.frame_step = 3;
    q.first_frame = 100;
    cr_assert_eq(kvf_merge_plan_positions(p, &q, NULL), KVF_OK);
    int32_t most = 0;
    for (int64_t k = 0; k < i.n_out; k++) {
        const kvf_merge_meta *m = &i.meta[k], *prev = k ? m - 1 : m;
        bool newline = m->kind == KVF_MERGE_NEWLINE;
        cr_assert_eq(out[k], 7 + (100 + m->frame) * 3);
        cr_assert_eq(out[i.n_out + k], 7 + (newline ? prev : m)->position / W);
        cr_assert_eq(out[2 * i.n_out + k], 7 + (newline ? W : m->position % W));
        cr_assert_eq(out[3 * i.n_out + k], 0);
        for (int j = 0; j < 3; j++) most = out[j * i.n_out + k] > most ? out[j * i.n_out + k] : most;
    }
    cr_assert_eq(q.next, most + 1);
    q.planes = 1;
    cr_assert_eq(kvf_merge_plan_positions(p, &q, NULL), KVF_OK);
    for (int64_t k = 0; k < i.n_out; k++)
        if (i.meta[k].position >= 0)
            cr_assert_eq(out[k], 7 + (100 + i.meta[k].frame) * N + i.meta[k].position);
    q.first_frame = INT64_MAX / 2;
    cr_assert_eq(kvf_merge_plan_positions(p, &q, NULL), KVF_ERR_ARG);
    q.first_frame = 0;
    q.planes = 2;
    cr_assert_eq(kvf_merge_plan_positions(p, &q, NULL), KVF_ERR_ARG);
    free(out);
    free(x);
    kvf_merge_plan_free(p);
    kvf_ctx_close(ctx);
}

/* ---- Methods --------------------------------------------------------------------------------------- */

/* Slowly turning tokens: neighbours alike, ends not. Unbounded, all is one segment; bounded, none spans more
 * than its tokens allow. */
Test(merge_plan, drift_is_bounded_on_request)
{
    enum { T = 32, N = 9, D = 16 };
    float *x = calloc(T * N * D, 4);
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            double angle = 0.3 * t;
            x[(t * N + n) * D + n] = (float)cos(angle);
            x[(t * N + n) * D + n + 5] = (float)sin(angle);
        }
    kvf_ctx *ctx = ctx_of(NULL, 1);
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, D);
    kvf_merge_plan *p = plan_of(ctx, "holitom:tau=0.9,ratio=0.2", &in),
                   *q = plan_of(ctx, "holitom:tau=0.9,drift=0.8,ratio=0.2", &in);
    cr_assert_eq(info_of(p).n_segment, 1);
    kvf_merge_plan_info i = info_of(q);
    cr_assert_gt(i.n_segment, 10); /* cos 0.6 = 0.83, cos 0.9 = 0.62: three frames each */
    cr_assert_lt(i.n_segment, 13);
    for (int64_t s = 0; s < i.n_segment; s++) cr_assert(i.segment[s].last - i.segment[s].first <= 2);
    kvf_merge_quality a = { .size = sizeof a }, b = a;
    cr_assert_eq(kvf_merge_plan_quality(p, &in.features, &a, NULL), KVF_OK);
    cr_assert_eq(kvf_merge_plan_quality(q, &in.features, &b, NULL), KVF_OK);
    cr_assert_lt(b.owner_mean, a.owner_mean);
    kvf_merge_plan_free(p);
    kvf_merge_plan_free(q);
    free(x);
    kvf_ctx_close(ctx);
}

/* Everything kept tells everything; what a plan drops shows. */
Test(merge_plan, quality_of_all_tokens_is_perfect)
{
    kvf_ctx *ctx = ctx_of(NULL, 2);
    rng r = { 30 };
    float *x = some_video(&r, 10, 9, 16);
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, 10, 9, 16);
    kvf_merge_plan *p = plan_of(ctx, "uniform:ratio=1", &in), *q = plan_of(ctx, "uniform:ratio=0.1", &in);
    kvf_merge_quality a = { .size = sizeof a }, b = a;
    cr_assert_eq(kvf_merge_plan_quality(p, &in.features, &a, NULL), KVF_OK);
    cr_assert_eq(kvf_merge_plan_quality(q, &in.features, &b, NULL), KVF_OK);
    cr_assert(a.nearest_mean < 1e-6 && a.nearest_p95 < 1e-6 && a.owner_share == 1 && a.squared_error < 1e-6);
    cr_assert(b.nearest_mean > 0.05 && b.nearest_p95 > b.nearest_mean && fabs(b.owner_share - 0.1) < 1e-12 &&
              b.squared_error > 0.05);
    kvf_merge_plan_free(p);
    kvf_merge_plan_free(q);
    free(x);
    kvf_ctx_close(ctx);
}

Test(merge_plan, missing_scores_are_replaced_and_reported)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 31 };
    float *x = some_video(&r, 8, 9, 16), *scores = some_scores(&r, 72);
    for (int i = 0; i < 9; i++) x[9 * 16 + i] = rnd_sign(&r); /* something moves in frame 1 */
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, 8, 9, 16);
    kvf_merge_plan *p = plan_of(ctx, "holitom:tau=0.99,ratio=0.3", &in);
    cr_assert_str_eq(info_of(p).scores, "distance to the frame's mean");
    kvf_merge_plan_free(p);
    p = plan_of(ctx, "holitom:tau=0.99,ratio=0.3,noscore=segment", &in);
    cr_assert_str_eq(info_of(p).scores, "distance to the segment's mean");
    kvf_merge_plan_free(p);
    in.scores = scores;
    p = plan_of(ctx, "holitom:tau=0.99,ratio=0.3", &in);
    cr_assert_str_eq(info_of(p).scores, "given");
    kvf_merge_plan_free(p);
    p = plan_of(ctx, "evs:ratio=0.3", &in);
    cr_assert_str_eq(info_of(p).scores, "none");
    kvf_merge_plan_free(p);
    free(x);
    free(scores);
    kvf_ctx_close(ctx);
}

/* Numbers at the ends of f32 neither overflow nor vanish. */
Test(merge_plan, extreme_magnitudes_are_compared)
{
    enum { T = 6, N = 4, D = 40 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 32 };
    float *x = some_video(&r, T, N, D);
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, D);
    kvf_merge_plan *want = plan_of(ctx, "evs:ratio=0.5", &in);
    const float scales[] = { 1e30f, 1e37f, 1e-6f };
    for (int s = 0; s < 3; s++) {
        float y[T * N * D];
        for (int i = 0; i < T * N * D; i++) y[i] = x[i] * scales[s];
        in.features.data = y;
        kvf_merge_plan *p = plan_of(ctx, "evs:ratio=0.5", &in);
        cr_assert(same_plan(p, want), "scale %g", (double)scales[s]);
        kvf_merge_plan_free(p);
        p = plan_of(ctx, "holitom:ratio=0.3,tau=0.5", &in);
        check_plan(p, "extreme");
        kvf_merge_plan_free(p);
    }
    kvf_merge_plan_free(want);
    free(x);
    kvf_ctx_close(ctx);
}

/* ---- Specs ------------------------------------------------------------------------------------------ */

static kvf_status try_spec(kvf_ctx *ctx, const char *spec, kvf_error *err)
{
    kvf_merge *m;
    kvf_status rc = kvf_merge_open(&m, ctx, spec, err);
    cr_assert(rc == KVF_OK || m == NULL);
    kvf_merge_close(m);
    return rc;
}

Test(merge_plan, wrong_specs_say_what_is_wrong)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    kvf_error err;
    cr_assert_eq(try_spec(ctx, "tome", &err), KVF_ERR_NOT_FOUND);
    cr_assert(strstr(err.msg, "holitom") && strstr(err.msg, "pool_space"));
    cr_assert_eq(try_spec(ctx, "", &err), KVF_ERR_NOT_FOUND);
    cr_assert_eq(try_spec(ctx, NULL, &err), KVF_ERR_ARG);
    const char *bad[] = { "holitom:ratio=0",
                          "holitom:ratio=-0.1",
                          "holitom:ratio=1.5",
                          "holitom:ratio=nan",
                          "holitom:tau=2",
                          "holitom:knn=0",
                          "holitom:knn=65",
                          "holitom:mode=official,context=0.5",
                          "holitom:mode=fast",
                          "holitom:newline=row",
                          "holitom:ratio",
                          "holitom:ratio=0.1,",
                          "pool_time:k=0",
                          "evs:q=0.5",
                          "holitom:ratio=0.1+evs:ratio=0.5",
                          "evs+uniform",
                          "pool_time+pool_time+pool_time+pool_time+pool_time" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        err.msg[0] = 0;
        cr_assert_eq(try_spec(ctx, bad[i], &err), KVF_ERR_ARG, "%s", bad[i]);
        cr_assert_gt(strlen(err.msg), 20, "%s", bad[i]);
    }
    cr_assert_eq(kvf_merge_open(NULL, ctx, "evs", &err), KVF_ERR_ARG);
    cr_assert_eq(try_spec(NULL, "evs", &err), KVF_ERR_ARG);
    kvf_ctx_close(ctx);
}

/* A printed spec opens the same method; listings name every method and option, and the options' words. */
Test(merge_plan, listings_and_specs_agree)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    int64_t n = 0;
    for (kvf_merge_method_info m = { .size = sizeof m }; kvf_merge_method(n, &m) == KVF_OK; n++) {
        kvf_merge *a = merge_of(ctx, m.name), *b = merge_of(ctx, kvf_merge_spec(a));
        cr_assert_str_eq(kvf_merge_spec(a), kvf_merge_spec(b));
        cr_assert(strlen(m.help) > 10 && m.source);
        kvf_merge_option_info o = { .size = sizeof o };
        int64_t k = 0;
        for (; kvf_merge_option(n, k, &o) == KVF_OK; k++) {
            cr_assert(strstr(kvf_merge_spec(a), o.name) && strlen(o.help) > 5);
            cr_assert(o.words ? strchr(o.words, '|') != NULL : o.min <= o.def && o.def <= o.max, "%s %s",
                      m.name, o.name);
        }
        cr_assert_gt(k, 0);
        cr_assert_eq(kvf_merge_option(n, k + 5, &o), KVF_ERR_NOT_FOUND);
        kvf_merge_close(a);
        kvf_merge_close(b);
    }
    cr_assert_eq(n, 8);
    kvf_merge_method_info m = { .size = 3 };
    cr_assert_eq(kvf_merge_method(0, &m), KVF_ERR_ARG);
    kvf_ctx_close(ctx);
}

/* ---- Bad input -------------------------------------------------------------------------------------- */

static kvf_status try_input(kvf_ctx *ctx, const char *spec, const kvf_merge_input *in, kvf_error *err)
{
    kvf_merge *m = merge_of(ctx, spec);
    kvf_merge_plan *p;
    kvf_status rc = kvf_merge_plan_make(&p, m, in, err);
    cr_assert(rc == KVF_OK || p == NULL);
    kvf_merge_plan_free(p);
    kvf_merge_close(m);
    return rc;
}

Test(merge_plan, what_is_not_finite_is_found)
{
    enum { T = 5, N = 9, D = 70 };
    kvf_ctx *ctx = ctx_of(NULL, 2);
    rng r = { 33 };
    kvf_error err;
    float *x = some_video(&r, T, N, D), *scores = some_scores(&r, T * N);
    const char *specs[] = { "holitom", "holitom:mode=official", "evs", "visionzip", "fastvid" };
    const float bad[] = { NAN, INFINITY, -INFINITY };
    const int at[] = { 0, 69, 2 * N * D + 3 * D + 17, T * N * D - 1 };
    for (int s = 0; s < 5; s++)
        for (int b = 0; b < 3; b++)
            for (int k = 0; k < 4; k++)
                for (int type = 0; type < 3; type++) {
                    float *y = malloc(T * N * D * 4), *back = malloc(T * N * D * 4);
                    memcpy(y, x, T * N * D * 4);
                    y[at[k]] = bad[b];
                    void *h = type ? narrowed(y, T * N * D, (kvf_merge_type)type, back) : NULL;
                    kvf_merge_input in = input_of(type ? h : (void *)y, (kvf_merge_type)type, T, N, D);
                    cr_assert_eq(try_input(ctx, specs[s], &in, &err), KVF_ERR_ARG, "%s", specs[s]);
                    char place[64];
                    snprintf(place, sizeof place, "frame %d, token %d, element %d", at[k] / (N * D),
                             at[k] / D % N, at[k] % D);
                    cr_assert(strstr(err.msg, place) && strstr(err.msg, b ? "infinite" : "NaN"), "%s",
                              err.msg);
                    free(h);
                    free(y);
                    free(back);
                }
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, D);
    scores[20] = NAN;
    in.scores = scores;
    cr_assert_eq(try_input(ctx, "holitom", &in, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "scores: frame 2, token 2"), "%s", err.msg);
    free(x);
    free(scores);
    kvf_ctx_close(ctx);
}

Test(merge_plan, shapes_that_do_not_fit_are_refused)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    kvf_error err;
    float x[64] = { 0 };
    const kvf_merge_view bad[] = {
        { .data = NULL, .n_frame = 2, .n_tok = 4, .dim = 8 },
        { .data = x, .n_frame = 0, .n_tok = 4, .dim = 8 },
        { .data = x, .n_frame = 2, .n_tok = -1, .dim = 8 },
        { .data = x, .n_frame = 2, .n_tok = 4, .dim = 0 },
        { .data = x, .type = (kvf_merge_type)7, .n_frame = 2, .n_tok = 4, .dim = 8 },
        { .data = (char *)x + 1, .n_frame = 2, .n_tok = 4, .dim = 4 },
        { .data = x, .n_frame = 2, .n_tok = 4, .dim = 8, .tok_stride = 7 },
        { .data = x, .n_frame = 2, .n_tok = 4, .dim = 8, .frame_stride = 31 },
        { .data = x, .n_frame = 2, .n_tok = 4, .dim = 8, .tok_stride = -8 },
        { .data = x, .n_frame = 2, .n_tok = 4, .dim = INT64_MAX / 2 },
        { .data = x, .n_frame = 2, .n_tok = 4, .dim = 8, .frame_stride = INT64_MAX / 2 },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_merge_input in;
        kvf_merge_input_init(&in);
        in.features = bad[i];
        cr_assert_eq(try_input(ctx, "evs", &in, &err), KVF_ERR_ARG, "view %d", (int)i);
    }
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, (int64_t)1 << 31, 1, 1);
    cr_assert_eq(try_input(ctx, "evs", &in, &err), KVF_ERR_LIMIT);
    in = input_of(x, KVF_MERGE_F32, 2, 4, 8);
    in.grid_w = 3;
    cr_assert_eq(try_input(ctx, "evs", &in, &err), KVF_ERR_ARG);
    in.grid_w = -1;
    cr_assert_eq(try_input(ctx, "evs", &in, &err), KVF_ERR_ARG);
    in = input_of(x, KVF_MERGE_F32, 2, 4, 8);
    in.keys = (kvf_merge_view){ .data = x, .n_frame = 2, .n_tok = 3, .dim = 8 };
    cr_assert_eq(try_input(ctx, "visionzip", &in, &err), KVF_ERR_ARG);
    in = input_of(x, KVF_MERGE_F32, 2, 4, 8);
    in.n_noise = 5;
    cr_assert_eq(try_input(ctx, "holitom", &in, &err), KVF_ERR_ARG);
    in.size--;
    cr_assert_eq(try_input(ctx, "evs", &in, &err), KVF_ERR_ARG);
    kvf_ctx_close(ctx);
}

Test(merge_plan, noise_that_runs_out_is_refused)
{
    enum { T = 4, N = 9, D = 8 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    kvf_error err;
    rng r = { 34 };
    float x[T * N * D], noise[8] = { 0 };
    for (int i = 0; i < N * D; i++)
        for (int t = 0; t < T; t++) x[t * N * D + i] = i ? x[i] : rnd_sign(&r);
    for (int i = 0; i < T * N * D; i++) x[i] = i < N * D ? rnd_sign(&r) : x[i - N * D];
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, D);
    in.noise = noise;
    in.n_noise = 8;
    cr_assert_eq(try_input(ctx, "holitom:mode=official,ratio=0.1", &in, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "noise"));
    kvf_ctx_close(ctx);
}

Test(merge_plan, apply_refuses_what_does_not_fit)
{
    enum { T = 4, N = 4, D = 8 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 35 };
    float *x = some_video(&r, T, N, D), out[T * N * D];
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, D);
    kvf_merge_plan *p = plan_of(ctx, "holitom:ratio=0.5,newline=end", &in);
    kvf_merge_apply a, good;
    kvf_error err;
    kvf_merge_apply_init(&good);
    good.src = in.features;
    good.dst = out;
    good.newline = x;
    cr_assert_eq(kvf_merge_plan_apply(p, &good, &err), KVF_OK);
    for (int i = 0; i < 8; i++) {
        a = good;
        switch (i) {
        case 0: a.newline = NULL; break;
        case 1: a.dst = NULL; break;
        case 2: a.dst = x + 3; break; /* overlaps */
        case 3: a.src.n_frame = 3; break;
        case 4: a.src.n_tok = 5; break;
        case 5: a.dst_stride = D - 1; break;
        case 6: a.dst_type = (kvf_merge_type)9; break;
        default: a.size = 8; break;
        }
        cr_assert_eq(kvf_merge_plan_apply(p, &a, &err), KVF_ERR_ARG, "case %d", i);
    }
    kvf_merge_quality q = { .size = sizeof q };
    kvf_merge_view v = in.features;
    v.n_frame = 2;
    cr_assert_eq(kvf_merge_plan_quality(p, &v, &q, &err), KVF_ERR_ARG);
    kvf_merge_plan_free(p);
    kvf_merge_plan_free(NULL);
    free(x);
    kvf_ctx_close(ctx);
}

Test(merge_plan, inner_merge_and_pooling_refuse_what_does_not_fit)
{
    enum { L = 12, D = 8 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 36 };
    float *x = some_video(&r, 1, L, D), *attn = some_scores(&r, 2 * L), out[L * D];
    int32_t keep[L];
    kvf_merge_inner a, good;
    kvf_error err;
    kvf_merge_inner_init(&good);
    good.hidden = x;
    good.n_row = L;
    good.dim = D;
    good.first = 2;
    good.n = 6;
    good.attention = attn;
    good.n_head = 2;
    good.out = out;
    good.keep = keep;
    cr_assert_eq(kvf_merge_inner_run(ctx, &good, &err), KVF_OK);
    cr_assert(good.n_out == 9 && keep[0] == 0 && keep[8] == 11);
    for (int i = 0; i < 8; i++) {
        a = good;
        switch (i) {
        case 0: a.first = 7; break;
        case 1: a.drop = 1; break;
        case 2: a.drop = NAN; break;
        case 3: a.n_head = 0; break;
        case 4: a.attention = NULL; break;
        case 5: a.out = x + 1; break;
        case 6: a.n = -1; break;
        default: a.keep = NULL; break;
        }
        cr_assert_eq(kvf_merge_inner_run(ctx, &a, &err), KVF_ERR_ARG, "case %d", i);
    }
    attn[L + 3] = INFINITY;
    cr_assert_eq(kvf_merge_inner_run(ctx, &good, &err), KVF_ERR_ARG);
    attn[L + 3] = 0;
    x[5 * D] = NAN;
    cr_assert_eq(kvf_merge_inner_run(ctx, &good, &err), KVF_ERR_ARG);
    x[5 * D] = 0;
    good.n = 1; /* of one token one stays */
    cr_assert_eq(kvf_merge_inner_run(ctx, &good, &err), KVF_OK);
    cr_assert_eq(good.n_out, L);
    good.n = 0;
    cr_assert_eq(kvf_merge_inner_run(ctx, &good, &err), KVF_OK);
    cr_assert_arr_eq(out, x, sizeof out);
    kvf_merge_pool pool;
    kvf_merge_pool_init(&pool);
    pool.src = (kvf_merge_view){ .data = x, .n_frame = 1, .n_tok = L, .dim = D };
    cr_assert_eq(kvf_merge_pool_run(ctx, &pool, &err), KVF_ERR_ARG); /* 12 is no square */
    pool.grid_w = 4;
    pool.src.data = NULL;
    cr_assert_eq(kvf_merge_pool_run(ctx, &pool, &err), KVF_OK);
    cr_assert(pool.out_h == 2 && pool.out_w == 2);
    pool.kind = 3;
    cr_assert_eq(kvf_merge_pool_run(ctx, &pool, &err), KVF_ERR_ARG);
    pool.kind = KVF_MERGE_AVERAGE;
    pool.grid_w = 12;
    cr_assert_eq(kvf_merge_pool_run(ctx, &pool, &err), KVF_ERR_ARG); /* one row */
    free(x);
    free(attn);
    kvf_ctx_close(ctx);
}

/* Half floats in, half floats out: what f32 gives, rounded once. */
Test(merge_plan, inner_merge_and_pooling_take_half_floats)
{
    enum { L = 36, D = 19 };
    kvf_ctx *ctx = ctx_of(NULL, 2);
    rng r = { 37 };
    float *x = some_video(&r, 1, L, D), *attn = some_scores(&r, L), back[L * D], want[L * D];
    for (int type = 1; type < 3; type++) {
        uint16_t *h = narrowed(x, L * D, (kvf_merge_type)type, back), out[L * D];
        int32_t keep[L], keep_h[L];
        kvf_error err;
        kvf_merge_inner a;
        kvf_merge_inner_init(&a);
        a = (kvf_merge_inner){ .size = a.size,
                               .hidden = back,
                               .n_row = L,
                               .dim = D,
                               .first = 4,
                               .n = 24,
                               .attention = attn,
                               .n_head = 1,
                               .drop = 0.5,
                               .out = want,
                               .keep = keep };
        cr_assert_eq(kvf_merge_inner_run(ctx, &a, &err), KVF_OK);
        a.hidden = h;
        a.type = (kvf_merge_type)type;
        a.out = out;
        a.keep = keep_h;
        cr_assert_eq(kvf_merge_inner_run(ctx, &a, &err), KVF_OK);
        cr_assert_arr_eq(keep, keep_h, (size_t)a.n_out * 4);
        for (int64_t i = 0; i < a.n_out * D; i++)
            cr_assert_eq(out[i], type == 1 ? kvf_f16_from_f32(want[i]) : kvf_bf16_from_f32(want[i]));
        for (int kind = 0; kind < 3; kind++) {
            kvf_merge_pool p;
            kvf_merge_pool_init(&p);
            p.src = (kvf_merge_view){ .data = back, .n_frame = 1, .n_tok = L, .dim = D };
            p.kind = kind;
            p.dst = want;
            cr_assert_eq(kvf_merge_pool_run(ctx, &p, &err), KVF_OK);
            p.src.data = h;
            p.src.type = p.dst_type = (kvf_merge_type)type;
            p.dst = out;
            cr_assert_eq(kvf_merge_pool_run(ctx, &p, &err), KVF_OK);
            for (int64_t i = 0; i < p.out_h * p.out_w * D; i++)
                cr_assert_eq(out[i], type == 1 ? kvf_f16_from_f32(want[i]) : kvf_bf16_from_f32(want[i]));
        }
        free(h);
    }
    free(x);
    free(attn);
    kvf_ctx_close(ctx);
}
