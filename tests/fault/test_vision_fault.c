/* test_vision_fault.c - allocation k fails, for k = 1, 2, ... until everything succeeds: every call on a
 * vision tower must return NOMEM, leave nothing behind, and work afterwards.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <kvfold/vision.h>
#include <string.h>

#include "tests/fault/faulty.h"

enum { SIDE = 59, TOKENS = 16, OUT = 64 };

static float pixels[3 * 3 * SIDE * SIDE], embd[3 * TOKENS * OUT], scores[3 * TOKENS];
static uint8_t rgb[3 * 40 * 30];

static kvf_status use(kvf_vision *v, kvf_error *err)
{
    kvf_vision_frame f[3] = { { rgb, 40, 30, 0 }, { rgb, 30, 40, 0 }, { rgb, 8, 8, 0 } };
    kvf_vision_batch b;
    kvf_vision_batch_init(&b);
    b.pixels = pixels;
    b.n = 3;
    b.pool = KVF_VISION_POOL_BILINEAR;
    b.embd = embd;
    b.scores = scores;
    kvf_status rc = kvf_vision_prepare(v, f, 3, KVF_VISION_RESIZE_PAD, pixels, err);
    return rc >= 0 ? kvf_vision_encode(v, &b, err) : rc;
}

static kvf_status run_all(faulty *f, const char *cpu)
{
    kvf_ctx *ctx = NULL;
    kvf_vision *v = NULL;
    kvf_error err;
    kvf_ctx_params cp;
    kvf_ctx_params_init(&cp);
    cp.n_threads = 2;
    cp.cpu = cpu;
    cp.alloc = faulty_alloc;
    cp.release = faulty_release;
    cp.user = f;
    kvf_status rc = kvf_ctx_open(&ctx, &cp, &err);
    kvf_vision_params p;
    kvf_vision_params_init(&p);
    p.batch = 2;
    if (rc >= 0) {
        rc = kvf_vision_open(&v, ctx, KVF_TEST_DATA "/vision_tower/onevision.gguf", &p, &err);
        cr_assert_eq(rc < 0, v == NULL);
    }
    if (rc >= 0) rc = use(v, &err);
    if (rc == KVF_ERR_NOMEM && v) { /* once memory is back, it works */
        atomic_store(&f->fail_at, 0);
        cr_assert_eq(use(v, &err), KVF_OK, "%s", err.msg);
    }
    if (rc < 0) cr_assert_eq(err.code, rc == KVF_ERR_NOMEM && v ? err.code : rc);
    kvf_vision_close(v);
    kvf_ctx_close(ctx);
    return rc;
}

static void fail_each(const char *cpu)
{
    long k = 1;
    for (; k < 5000; k++) {
        faulty f = { 0 };
        atomic_store(&f.fail_at, k);
        kvf_status rc = run_all(&f, cpu);
        cr_assert_eq(atomic_load(&f.n_live), 0, "allocation %ld: %ld blocks leak", k, atomic_load(&f.n_live));
        if (rc >= 0) {
            cr_assert_lt(atomic_load(&f.n_alloc), k, "allocation %ld failed unnoticed", k);
            break;
        }
        cr_assert_eq(rc, KVF_ERR_NOMEM, "allocation %ld: %s", k, kvf_status_name(rc));
    }
    cr_assert_gt(k, 30);
    cr_assert_lt(k, 5000);
}

Test(vision_fault, every_failure_is_reported_and_nothing_leaks) { fail_each("ref"); }
Test(vision_fault, every_failure_is_reported_on_the_fastest_level_too) { fail_each(NULL); }
