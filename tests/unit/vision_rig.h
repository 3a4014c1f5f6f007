/* vision_rig.h - what the tests of the vision tower share: a ctx of a level, frames, arrays of fixtures.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_UNIT_VISION_RIG_H
#define KVF_TESTS_UNIT_VISION_RIG_H

#include <criterion/criterion.h>
#include <kvfold/vision.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VISION_DATA KVF_TEST_DATA "/vision_tower/"

/* Numbers in -2..2 from xorshift32, exact in f32: the frames of scripts/make_mmproj.py. */
static inline float *rig_pixels(int64_t n)
{
    float *out = malloc((size_t)n * sizeof *out);
    uint32_t x = 2463534242u;
    for (int64_t i = 0; i < n; i++) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        out[i] = (float)(x >> 8) / 4194304.0f - 2.0f;
    }
    return out;
}

/* The numbers of an .npy file of little-endian f32 or bytes (as floats); *n is their count. Fixtures are
 * ours, so anything else fails the test. */
static inline float *rig_npy(const char *path, int64_t *n)
{
    FILE *f = fopen(path, "rb");
    cr_assert_not_null(f, "%s", path);
    char head[10], text[1024];
    cr_assert_eq(fread(head, 1, 10, f), 10u);
    size_t len = (size_t)(uint8_t)head[8] + ((size_t)(uint8_t)head[9] << 8);
    cr_assert_lt(len, sizeof text);
    cr_assert_eq(fread(text, 1, len, f), len);
    text[len] = 0;
    bool bytes = strstr(text, "'|u1'") != NULL;
    cr_assert(bytes || strstr(text, "'<f4'"), "%s: %s", path, text);
    cr_assert_null(strstr(text, "'fortran_order': True"));
    *n = 1;
    const char *p = strchr(text, '(') + 1;
    for (char *end; *p != ')'; p = *end == ',' ? end + 1 : end) {
        long v = strtol(p, &end, 10);
        if (end == p) break;
        *n *= v;
    }
    float *out = malloc((size_t)*n * sizeof *out + 1);
    for (int64_t i = 0; i < *n; i++) {
        if (bytes) out[i] = (float)fgetc(f);
        else cr_assert_eq(fread(out + i, 4, 1, f), 1u);
    }
    fclose(f);
    return out;
}

/* NULL if this processor does not have the level. */
static inline kvf_ctx *rig_ctx(const char *cpu, int32_t n_threads, kvf_precision precision)
{
    kvf_ctx_params p;
    kvf_error err;
    kvf_ctx *ctx = NULL;
    kvf_ctx_params_init(&p);
    p.cpu = cpu;
    p.n_threads = n_threads;
    p.precision = precision;
    kvf_status rc = kvf_ctx_open(&ctx, &p, &err);
    if (rc == KVF_ERR_UNSUPPORTED) return NULL;
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    return ctx;
}

static inline kvf_vision *rig_open(kvf_ctx *ctx, const char *path, const kvf_vision_params *p)
{
    kvf_error err;
    kvf_vision *v;
    kvf_status rc = kvf_vision_open(&v, ctx, path, p, &err);
    cr_assert_eq(rc, KVF_OK, "%s", err.msg);
    return v;
}

static inline kvf_vision_info rig_info(const kvf_vision *v)
{
    kvf_vision_info i = { .size = sizeof i };
    cr_assert_eq(kvf_vision_get_info(v, &i, NULL), KVF_OK);
    return i;
}

/* Largest difference of two arrays over the largest magnitude of the second. */
static inline double rig_error(const float *x, const float *want, int64_t n)
{
    double worst = 0, top = 1e-30;
    for (int64_t i = 0; i < n; i++) {
        double d = fabs((double)x[i] - (double)want[i]);
        if (!(d <= worst)) worst = d; /* NaN stays */
        if (fabs((double)want[i]) > top) top = fabs((double)want[i]);
    }
    return worst / top;
}

#endif
