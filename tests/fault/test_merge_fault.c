/* test_merge_fault.c - allocation k fails, for k = 1, 2, ... until everything succeeds: every call of merge.h
 * must return NOMEM, leave nothing behind, and work afterwards.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/merge_rig.h"

#include "tests/fault/faulty.h"

enum { T = 12, N = 9, D = 8 };

static float video[T * N * D];

static kvf_status plan_and_apply(kvf_ctx *ctx, const char *spec, kvf_error *err)
{
    kvf_merge *m = NULL;
    kvf_merge_plan *p = NULL;
    kvf_merge_input in = input_of(video, KVF_MERGE_F32, T, N, D);
    float out[T * N * D];
    int32_t owner[T * N];
    kvf_merge_apply a;
    kvf_merge_apply_init(&a);
    a.src = in.features;
    a.dst = out;
    kvf_merge_quality q = { .size = sizeof q };
    kvf_status rc = kvf_merge_open(&m, ctx, spec, err);
    if (rc >= 0) rc = kvf_merge_plan_make(&p, m, &in, err);
    if (rc >= 0) rc = kvf_merge_plan_apply(p, &a, err);
    if (rc >= 0) rc = kvf_merge_plan_owners(p, owner, err);
    if (rc >= 0) rc = kvf_merge_plan_quality(p, &in.features, &q, err);
    kvf_merge_plan_free(p);
    kvf_merge_close(m);
    return rc;
}

/* Every call is made again where it failed, once memory is back: no frame is lost, none comes twice. */
static kvf_status stream(kvf_ctx *ctx, faulty *f, kvf_error *err)
{
    kvf_merge *m = NULL;
    kvf_merge_stream *s = NULL;
    kvf_merge_stream_params p;
    kvf_merge_stream_params_init(&p);
    p.n_tok = N;
    p.dim = D;
    p.hold = 4;
    kvf_status rc = kvf_merge_open(&m, ctx, "holitom:ratio=0.3,tau=0.5", err), failed = KVF_OK;
    if (rc >= 0) rc = kvf_merge_stream_open(&s, m, &p, err);
    int64_t n_frame = 0, n_out = 0;
    for (int t = 0; t <= T && rc >= 0; t++) {
        kvf_status got =
            t < T ? kvf_merge_stream_push(s, video + t * N * D, NULL, err) : kvf_merge_stream_finish(s, err);
        if (got == KVF_ERR_NOMEM) {
            failed = got;
            atomic_store(&f->fail_at, 0);
            t--;
            continue;
        }
        cr_assert_eq(got, KVF_OK, "%s", err->msg);
        for (;;) {
            kvf_merge_plan *plan;
            kvf_merge_view view;
            got = kvf_merge_stream_next(s, &plan, &view, err);
            if (got == KVF_DONE) break;
            if (got == KVF_ERR_NOMEM) {
                failed = got;
                atomic_store(&f->fail_at, 0);
                continue;
            }
            cr_assert_eq(got, KVF_OK, "%s", err->msg);
            n_frame += view.n_frame;
            n_out += info_of(plan).n_out;
            kvf_merge_plan_free(plan);
        }
    }
    if (rc >= 0)
        cr_assert(n_frame == T && n_out == (int64_t)(0.3 * T * N), "%lld frames, %lld tokens",
                  (long long)n_frame, (long long)n_out);
    kvf_merge_stream_close(s);
    kvf_merge_close(m);
    return rc < 0 ? rc : failed;
}

static kvf_status rest(kvf_ctx *ctx, kvf_error *err)
{
    float out[T * N * D], attn[N], zero[64] = { 0 };
    int32_t keep[N];
    kvf_merge_inner a;
    kvf_merge_inner_init(&a);
    for (int i = 0; i < N; i++) attn[i] = (float)i;
    a.hidden = video;
    a.n_row = a.n = N;
    a.dim = D;
    a.attention = attn;
    a.n_head = 1;
    a.out = out;
    a.keep = keep;
    kvf_status rc = kvf_merge_inner_run(ctx, &a, err);
    kvf_merge_pool p;
    kvf_merge_pool_init(&p);
    p.src = (kvf_merge_view){ .data = video, .n_frame = T, .n_tok = N, .dim = D };
    p.dst = out;
    if (rc >= 0) rc = kvf_merge_pool_run(ctx, &p, err);
    kvf_mamba_branch b = { zero, NULL, zero, zero, zero, zero, zero };
    kvf_mamba_layer layer = { NULL, NULL, zero, zero, b, b };
    kvf_mamba_params mp;
    kvf_mamba_params_init(&mp);
    mp.layers = &layer;
    mp.n_layer = 1;
    mp.d_model = D;
    mp.d_inner = mp.d_state = mp.dt_rank = 2;
    kvf_mamba *m = NULL;
    memcpy(out, video, sizeof out);
    if (rc >= 0) rc = kvf_mamba_open(&m, ctx, &mp, err);
    if (rc >= 0) rc = kvf_mamba_run(m, out, T * N, err);
    kvf_mamba_close(m);
    return rc;
}

static const char *const specs[] = { "holitom:ratio=0.3,tau=0.5,drift=0.2,context=0.5",
                                     "holitom:ratio=0.95,tau=-1",
                                     "fastvid:ratio=0.3",
                                     "visionzip:ratio=0.3",
                                     "evs",
                                     "uniform",
                                     "pool_time+pool_space:p=3+holitom:ratio=0.5",
                                     "pool_space+sample_time" };

static kvf_status run_one(kvf_ctx *ctx, int which, faulty *f, kvf_error *err)
{
    return which < 8    ? plan_and_apply(ctx, specs[which], err)
           : which == 8 ? stream(ctx, f, err)
                        : rest(ctx, err);
}

Test(merge_fault, every_failed_allocation_is_reported_and_leaves_nothing)
{
    rng r = { 51 };
    float *x = some_video(&r, T, N, D);
    memcpy(video, x, sizeof video);
    free(x);
    for (int which = 0; which < 10; which++) {
        long k = 1, n_failed = 0;
        for (;; k++) {
            faulty f = { 0 };
            kvf_ctx *ctx;
            kvf_ctx_params cp;
            kvf_error err;
            kvf_ctx_params_init(&cp);
            cp.n_threads = 2;
            cp.alloc = faulty_alloc;
            cp.release = faulty_release;
            cp.user = &f;
            cr_assert_eq(kvf_ctx_open(&ctx, &cp, NULL), KVF_OK);
            long before = atomic_load(&f.n_live);
            atomic_store(&f.fail_at, atomic_load(&f.n_alloc) + k);
            kvf_status rc = run_one(ctx, which, &f, &err);
            cr_assert(rc == KVF_OK || rc == KVF_ERR_NOMEM, "%d, allocation %ld: %s", which, k, err.msg);
            cr_assert_eq(atomic_load(&f.n_live), before, "%d, allocation %ld leaks", which, k);
            atomic_store(&f.fail_at, 0);
            cr_assert_eq(run_one(ctx, which, &f, &err), KVF_OK, "%s", err.msg);
            kvf_ctx_close(ctx);
            cr_assert_eq(atomic_load(&f.n_live), 0);
            if (rc == KVF_OK) break;
            n_failed++;
        }
        cr_assert(n_failed > 3 && k == n_failed + 1, "%d", which);
    }
}
