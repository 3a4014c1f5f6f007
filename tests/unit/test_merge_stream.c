/* test_merge_stream.c - plans handed out frame by frame against the plan of the whole video, memory that
 * stays bounded, and errors that leave the stream as it was.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/merge_rig.h"

/* All tokens of a stream, put together as one plan would hold them. */
typedef struct whole {
    int64_t n_out, n_source, n_segment, n_frame, n_plan, n_forced,
        first_out; /* first_out: frames pushed before the first plan */
    int64_t row[20000];
    int32_t source[200000];
    float weight[200000];
    kvf_merge_meta meta[20000];
    float *tokens; /* [n_out][dim] */
} whole;

static void append(whole *w, const kvf_merge_plan *p, const kvf_merge_view *view, const float *newline)
{
    kvf_merge_plan_info i = info_of(p);
    cr_assert_eq(i.first_frame, w->n_frame);
    cr_assert(i.n_frame == view->n_frame && i.n_tok == view->n_tok);
    float *got = apply_of(p, view, newline);
    w->tokens = realloc(w->tokens, (size_t)((w->n_out + i.n_out) * view->dim + 1) * 4);
    memcpy(w->tokens + w->n_out * view->dim, got, (size_t)(i.n_out * view->dim) * 4);
    free(got);
    for (int64_t k = 0; k < i.n_out; k++) {
        cr_assert(w->n_out < 19999 && w->n_source + i.row[k + 1] - i.row[k] < 200000);
        w->meta[w->n_out] = i.meta[k];
        w->meta[w->n_out].frame += (int32_t)w->n_frame;
        w->meta[w->n_out].segment += (int32_t)w->n_segment;
        for (int64_t j = i.row[k]; j < i.row[k + 1]; j++, w->n_source++) {
            w->source[w->n_source] = i.source[j] + (int32_t)(w->n_frame * i.n_tok);
            w->weight[w->n_source] = i.weight[j];
        }
        w->row[++w->n_out] = w->n_source;
    }
    w->n_segment += i.n_segment;
    w->n_frame += i.n_frame;
    w->n_forced = i.n_forced;
    w->n_plan++;
}

static whole *stream_all(kvf_ctx *ctx, const char *spec, const kvf_merge_input *in, int64_t hold,
                         const float *newline)
{
    whole *w = calloc(1, sizeof *w);
    kvf_merge *m = merge_of(ctx, spec);
    kvf_merge_stream *s;
    kvf_merge_stream_params p;
    kvf_error err;
    kvf_merge_stream_params_init(&p);
    p.type = in->features.type;
    p.n_tok = in->features.n_tok;
    p.dim = in->features.dim;
    p.grid_w = in->grid_w;
    p.hold = hold;
    cr_assert_eq(kvf_merge_stream_open(&s, m, &p, &err), KVF_OK, "%s: %s", spec, err.msg);
    size_t frame_bytes = (size_t)(p.n_tok * p.dim) * kvf_merge_type_bytes(p.type);
    for (int64_t t = 0; t <= in->features.n_frame; t++) {
        kvf_status rc =
            t < in->features.n_frame
                ? kvf_merge_stream_push(s, (const char *)in->features.data + (size_t)t * frame_bytes,
                                        in->scores ? in->scores + t * p.n_tok : NULL, &err)
                : kvf_merge_stream_finish(s, &err);
        cr_assert_eq(rc, KVF_OK, "%s", rc < 0 ? err.msg : "");
        kvf_merge_plan *plan;
        kvf_merge_view view;
        while ((rc = kvf_merge_stream_next(s, &plan, &view, &err)) == KVF_OK) {
            if (w->n_plan == 0) w->first_out = t + 1;
            append(w, plan, &view, newline);
            kvf_merge_plan_free(plan);
        }
        cr_assert(rc == KVF_DONE && plan == NULL);
    }
    kvf_merge_stream_close(s);
    kvf_merge_close(m);
    return w;
}

static void expect_same(kvf_ctx *ctx, const char *spec, const kvf_merge_input *in, const whole *w,
                        const float *newline)
{
    kvf_merge_plan *p = plan_of(ctx, spec, in);
    kvf_merge_plan_info i = info_of(p);
    cr_assert_eq(w->n_out, i.n_out, "%s: %lld tokens, not %lld", spec, (long long)w->n_out,
                 (long long)i.n_out);
    cr_assert_eq(w->n_segment, i.n_segment, "%s", spec);
    cr_assert_eq(w->n_frame, i.n_frame);
    cr_assert_arr_eq(w->meta, i.meta, (size_t)i.n_out * sizeof *i.meta, "%s", spec);
    cr_assert_arr_eq(w->row, i.row, (size_t)(i.n_out + 1) * sizeof *i.row, "%s", spec);
    cr_assert_arr_eq(w->source, i.source, (size_t)w->n_source * 4, "%s", spec);
    cr_assert_arr_eq(w->weight, i.weight, (size_t)w->n_source * 4, "%s", spec);
    float *got = apply_of(p, &in->features, newline);
    cr_assert_arr_eq(w->tokens, got, (size_t)(i.n_out * in->features.dim) * 4, "%s", spec);
    free(got);
    kvf_merge_plan_free(p);
}

static void drop(whole *w)
{
    free(w->tokens);
    free(w);
}

Test(merge_stream, a_stream_gives_the_plan_of_the_whole)
{
    enum { T = 70, N = 9, D = 12 };
    const char *specs[] = {
        "holitom:budget=segment,ratio=0.2,tau=0.6",
        "holitom:budget=segment,ratio=0.2,tau=0.6,mode=official",
        "holitom:budget=segment,ratio=0.9,tau=0.3",
        "holitom:budget=segment,ratio=0.15,tau=0.6,order=grid,newline=row",
        "holitom:budget=segment,ratio=0.15,tau=0.6,newline=end",
        "holitom:budget=segment,ratio=0.004,tau=0.6",
        "holitom:budget=segment,ratio=0.2,tau=0.6,window=4",
        "holitom:budget=segment,ratio=0.2,window=1",
        "holitom:budget=segment,ratio=0.2,tau=0.4,drift=0.6",
        "holitom:budget=segment,ratio=0.2,tau=0.6,noscore=segment",
    };
    kvf_ctx *ctx = ctx_of(NULL, 2);
    rng r = { 41 };
    float newline[D] = { 0 };
    for (int round = 0; round < 4; round++) {
        float *x = some_video(&r, T, N, D), *scores = some_scores(&r, T * N);
        for (int k = 0; k < 10; k++) {
            kvf_merge_input in = input_of(x, KVF_MERGE_F32, round == 3 ? 1 : T - round, N, D);
            in.scores = round % 2 ? scores : NULL;
            whole *w = stream_all(ctx, specs[k], &in, 64, newline);
            cr_assert_eq(w->n_forced, 0);
            expect_same(ctx, specs[k], &in, w, newline);
            if (round == 0)
                cr_assert(w->n_plan > 3 && w->first_out < T / 2, "%s: nothing came early", specs[k]);
            drop(w);
        }
        free(x);
        free(scores);
    }
    kvf_ctx_close(ctx);
}

Test(merge_stream, pooling_and_sampling_stream)
{
    enum { T = 23, N = 16, D = 5 };
    const char *specs[] = { "pool_time:k=4", "pool_space:p=2", "sample_time:s=3",
                            "pool_time:k=2+sample_time:s=2", "visionzip:mode=official,ratio=0.3" };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 42 };
    float *x = some_video(&r, T, N, D);
    for (int k = 0; k < 5; k++) {
        kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, D);
        whole *w = stream_all(ctx, specs[k], &in, 8, NULL);
        expect_same(ctx, specs[k], &in, w, NULL);
        cr_assert_gt(w->n_plan, 4);
        drop(w);
    }
    free(x);
    kvf_ctx_close(ctx);
}

Test(merge_stream, half_floats_stream)
{
    enum { T = 30, N = 9, D = 16 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 43 };
    float *x = some_video(&r, T, N, D);
    uint16_t h[T * N * D];
    for (int i = 0; i < T * N * D; i++) h[i] = kvf_f16_from_f32(x[i]);
    kvf_merge_input in = input_of(h, KVF_MERGE_F16, T, N, D);
    whole *w = stream_all(ctx, "holitom:budget=segment,tau=0.6,ratio=0.2", &in, 32, NULL);
    expect_same(ctx, "holitom:budget=segment,tau=0.6,ratio=0.2", &in, w, NULL);
    drop(w);
    free(x);
    kvf_ctx_close(ctx);
}

/* ---- Bounded memory ------------------------------------------------------------------------------- */

typedef struct meter {
    size_t now, most;
} meter;

static void *meter_alloc(void *user, size_t bytes)
{
    meter *m = user;
    size_t *p = malloc(bytes + 16);
    if (!p) return NULL;
    *p = bytes;
    m->now += bytes;
    if (m->now > m->most) m->most = m->now;
    return p + 2;
}

static void meter_release(void *user, void *ptr)
{
    size_t *p = (size_t *)ptr - 2;
    ((meter *)user)->now -= *p;
    free(p);
}

/* Nothing ever moves: no cut, no end in sight. The window forces one every `hold` frames, memory stays that
 * of 2 * hold frames, and the counts are exact all the same. */
Test(merge_stream, a_still_video_stays_within_hold)
{
    enum { N = 16, D = 32, HOLD = 8, T = 2000 };
    meter m = { 0 };
    kvf_ctx *ctx;
    kvf_ctx_params cp;
    kvf_ctx_params_init(&cp);
    cp.n_threads = 1;
    cp.alloc = meter_alloc;
    cp.release = meter_release;
    cp.user = &m;
    cr_assert_eq(kvf_ctx_open(&ctx, &cp, NULL), KVF_OK);
    size_t idle = m.now;
    kvf_merge *method = merge_of(ctx, "holitom:ratio=0.1,tau=0.5");
    kvf_merge_stream *s;
    kvf_merge_stream_params p;
    kvf_error err;
    kvf_merge_stream_params_init(&p);
    p.n_tok = N;
    p.dim = D;
    p.hold = HOLD;
    cr_assert_eq(kvf_merge_stream_open(&s, method, &p, &err), KVF_OK);
    rng r = { 44 };
    float frame[N * D];
    for (int i = 0; i < N * D; i++) frame[i] = rnd_sign(&r);
    int64_t n_frame = 0, n_out = 0, n_forced = 0;
    for (int t = 0; t <= T; t++) {
        frame[t % (N * D)] += 0.01f;
        cr_assert_eq(t < T ? kvf_merge_stream_push(s, frame, NULL, &err) : kvf_merge_stream_finish(s, &err),
                     KVF_OK, "%s", err.msg);
        kvf_merge_plan *plan;
        kvf_merge_view view;
        while (kvf_merge_stream_next(s, &plan, &view, &err) == KVF_OK) {
            kvf_merge_plan_info i = info_of(plan);
            cr_assert_leq(i.n_frame, HOLD);
            n_frame += i.n_frame;
            n_out += i.n_out;
            n_forced = i.n_forced;
            kvf_merge_plan_free(plan);
        }
    }
    cr_assert_eq(n_frame, T);
    cr_assert_eq(n_out, T * N / 10);
    cr_assert_geq(n_forced, T / HOLD - 2);
    size_t frames = 2 * HOLD * N * D * 4;
    cr_assert_lt(m.most - idle, frames + frames / 2 + 65536, "%zu bytes at most, %zu of frames",
                 m.most - idle, frames);
    kvf_merge_stream_close(s);
    kvf_merge_close(method);
    kvf_ctx_close(ctx);
    cr_assert_eq(m.now, 0u);
}

/* ---- Errors ----------------------------------------------------------------------------------------- */

Test(merge_stream, errors_leave_the_stream_as_it_was)
{
    enum { T = 40, N = 9, D = 8 };
    const char *spec = "holitom:budget=segment,ratio=0.2,tau=0.6";
    kvf_ctx *ctx = ctx_of(NULL, 1);
    rng r = { 45 };
    float *x = some_video(&r, T, N, D), bad[N * D], scores[N];
    kvf_merge_input in = input_of(x, KVF_MERGE_F32, T, N, D);
    kvf_merge *m = merge_of(ctx, spec);
    kvf_merge_stream *s;
    kvf_merge_stream_params p;
    kvf_error err;
    kvf_merge_stream_params_init(&p);
    p.n_tok = N;
    p.dim = D;
    cr_assert_eq(kvf_merge_stream_open(&s, m, &p, &err), KVF_OK);
    for (int i = 0; i < N; i++) scores[i] = 1;
    whole *w = calloc(1, sizeof *w);
    for (int t = 0; t <= T; t++) {
        memcpy(bad, x, sizeof bad);
        bad[t % (N * D)] = NAN;
        cr_assert_eq(kvf_merge_stream_push(s, bad, NULL, &err), KVF_ERR_ARG);
        if (t > 0) cr_assert_eq(kvf_merge_stream_push(s, x, scores, &err), KVF_ERR_ARG);
        cr_assert_eq(kvf_merge_stream_push(s, NULL, NULL, &err), KVF_ERR_ARG);
        cr_assert_eq(t < T ? kvf_merge_stream_push(s, x + t * N * D, NULL, &err)
                           : kvf_merge_stream_finish(s, &err),
                     KVF_OK);
        kvf_merge_plan *plan;
        kvf_merge_view view;
        while (kvf_merge_stream_next(s, &plan, &view, &err) == KVF_OK) {
            append(w, plan, &view, NULL);
            kvf_merge_plan_free(plan);
        }
    }
    expect_same(ctx, spec, &in, w, NULL);
    cr_assert_eq(kvf_merge_stream_push(s, x, NULL, &err), KVF_ERR_STATE);
    cr_assert_eq(kvf_merge_stream_finish(s, &err), KVF_OK);
    kvf_merge_stream_close(s);
    kvf_merge_stream_close(NULL);
    kvf_merge_close(m);
    drop(w);
    free(x);
    kvf_ctx_close(ctx);
}

/* Who never takes a plan is told so before memory runs over; taking them lets the stream go on. */
Test(merge_stream, plans_must_be_taken)
{
    enum { N = 4, D = 8, HOLD = 4 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    kvf_merge *m = merge_of(ctx, "holitom:ratio=0.5");
    kvf_merge_stream *s;
    kvf_merge_stream_params p;
    kvf_error err;
    rng r = { 46 };
    kvf_merge_stream_params_init(&p);
    p.n_tok = N;
    p.dim = D;
    p.hold = HOLD;
    cr_assert_eq(kvf_merge_stream_open(&s, m, &p, &err), KVF_OK);
    int64_t pushed = 0, n_frame = 0;
    kvf_status rc = KVF_OK;
    float frame[N * D];
    for (; pushed < 100; pushed++) {
        for (int i = 0; i < N * D; i++) frame[i] = rnd_sign(&r);
        rc = kvf_merge_stream_push(s, frame, NULL, &err);
        if (rc < 0) break;
    }
    cr_assert_eq(rc, KVF_ERR_STATE);
    cr_assert(strstr(err.msg, "kvf_merge_stream_next"));
    cr_assert_leq(pushed, 2 * HOLD);
    for (int round = 0; round < 2; round++) {
        kvf_merge_plan *plan;
        kvf_merge_view view;
        while (kvf_merge_stream_next(s, &plan, &view, &err) == KVF_OK) {
            n_frame += view.n_frame;
            kvf_merge_plan_free(plan);
        }
        if (round == 0) cr_assert_eq(kvf_merge_stream_push(s, frame, NULL, &err), KVF_OK);
        if (round == 0) cr_assert_eq(kvf_merge_stream_finish(s, &err), KVF_OK);
    }
    cr_assert_eq(n_frame, pushed + 1);
    kvf_merge_stream_close(s);
    kvf_merge_close(m);
    kvf_ctx_close(ctx);
}

Test(merge_stream, what_cannot_stream_says_so)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    kvf_merge_stream *s;
    kvf_merge_stream_params p, good;
    kvf_error err;
    kvf_merge_stream_params_init(&good);
    good.n_tok = 4;
    good.dim = 4;
    const char *whole_video[] = { "evs", "uniform", "fastvid", "visionzip", "pool_space+holitom" };
    for (int i = 0; i < 5; i++) {
        kvf_merge *m = merge_of(ctx, whole_video[i]);
        cr_assert_eq(kvf_merge_stream_open(&s, m, &good, &err), KVF_ERR_UNSUPPORTED, "%s", whole_video[i]);
        cr_assert(s == NULL && strstr(err.msg, "kvf_merge_plan_make"));
        kvf_merge_close(m);
    }
    kvf_merge *m = merge_of(ctx, "pool_time:k=100");
    cr_assert_eq(kvf_merge_stream_open(&s, m, &good, &err), KVF_ERR_ARG);
    for (int i = 0; i < 5; i++) {
        p = good;
        switch (i) {
        case 0: p.n_tok = 0; break;
        case 1: p.hold = 1; break;
        case 2: p.dim = -1; break;
        case 3: p.size = 1; break;
        default: p.grid_w = 3; break;
        }
        cr_assert_eq(kvf_merge_stream_open(&s, m, &p, &err), KVF_ERR_ARG, "case %d", i);
    }
    kvf_merge_close(m);
    kvf_ctx_close(ctx);
}
