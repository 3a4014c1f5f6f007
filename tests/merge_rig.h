/* merge_rig.h - what the tests of merge.h share: arrays from .npy files, tables, a ctx, random numbers.
 *
 * Fixtures lie in data/vision; those too large for the repository are looked for in the folder that the environment
 * variable KVFOLD_FIXTURES names, and their tests are left out without it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_MERGE_RIG_H
#define KVF_TESTS_MERGE_RIG_H

#include <criterion/criterion.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "kvfold/merge.h"

/* ---- Files ------------------------------------------------------------------------------------- */

typedef struct npy {
    int64_t n, n_dim, shape[4];
    char kind;    /* 'f', 'i', 'u' */
    int64_t size; /* bytes of an element */
    void *data;   /* NULL: there is no such file */
} npy;

/* Every test is a process of its own: what it loads it keeps, and the leak checker finds it here. */
static void *rig_kept[4096];
static int rig_n_kept;

static inline void *rig_keep(void *p)
{
    cr_assert(p && rig_n_kept < 4096);
    return rig_kept[rig_n_kept++] = p;
}

static inline FILE *rig_open(const char *name)
{
    char path[600];
    snprintf(path, sizeof path, "%s/vision/%s", KVF_TEST_DATA, name);
    FILE *f = fopen(path, "rb");
    const char *more = getenv("KVFOLD_FIXTURES");
    if (f || !more) return f;
    snprintf(path, sizeof path, "%s/%s", more, name);
    return fopen(path, "rb");
}

/* Version 1, little-endian, C order: what the fixtures are. */
static inline npy npy_load(const char *name)
{
    npy a = { .n = 1 };
    FILE *f = rig_open(name);
    if (!f) return a;
    unsigned char head[10];
    cr_assert_eq(fread(head, 1, 10, f), 10u, "%s", name);
    size_t n_head = (size_t)head[8] | (size_t)head[9] << 8;
    char text[512] = { 0 };
    cr_assert(n_head < sizeof text && fread(text, 1, n_head, f) == n_head, "%s", name);
    const char *descr = strstr(text, "descr': '"), *shape = strstr(text, "shape': (");
    cr_assert(descr && shape && !strstr(text, "True"), "%s: %s", name, text);
    a.kind = descr[10];
    a.size = descr[11] - '0';
    for (const char *p = shape + 9; *p && *p != ')';) {
        char *end;
        int64_t v = strtoll(p, &end, 10);
        if (end == p) {
            p++;
            continue;
        }
        a.shape[a.n_dim++] = v;
        a.n *= v;
        p = end;
    }
    a.data = rig_keep(malloc((size_t)(a.n * a.size) + 1));
    cr_assert_eq(fread(a.data, (size_t)a.size, (size_t)a.n, f), (size_t)a.n, "%s", name);
    fclose(f);
    return a;
}

static inline npy npy_in(const char *folder, const char *name)
{
    char path[300];
    snprintf(path, sizeof path, "%s/%s.npy", folder, name);
    return npy_load(path);
}

static inline npy npy_must(const char *folder, const char *name)
{
    npy a = npy_in(folder, name);
    cr_assert_not_null(a.data, "there is no %s/%s.npy", folder, name);
    return a;
}

static inline float *f32(const npy *a)
{
    cr_assert(a->kind == 'f' && a->size == 4);
    return a->data;
}

static inline int32_t *i32(const npy *a)
{
    cr_assert(a->kind == 'i' && a->size == 4);
    return a->data;
}

/* ---- Tables: tab-separated, a line of names first ------------------------------------------------ */

typedef struct table {
    char text[16384];
    char *cell[100][24];
    int n_row, n_col;
} table;

static inline table *table_load(const char *name)
{
    table *t = rig_keep(calloc(1, sizeof *t));
    FILE *f = rig_open(name);
    cr_assert_not_null(f, "there is no %s", name);
    size_t n = fread(t->text, 1, sizeof t->text - 1, f);
    fclose(f);
    t->text[n] = 0;
    char *line = t->text;
    while (line && *line) {
        char *next = strchr(line, '\n');
        if (next) *next++ = 0;
        int c = 0;
        for (char *p = line; p; c++) {
            cr_assert(c < 24 && t->n_row < 100);
            t->cell[t->n_row][c] = p;
            p = strchr(p, '\t');
            if (p) *p++ = 0;
        }
        t->n_col = c;
        t->n_row++;
        line = next;
    }
    return t;
}

static inline const char *cell(const table *t, int row, const char *name)
{
    for (int c = 0; c < t->n_col; c++)
        if (strcmp(t->cell[0][c], name) == 0) return t->cell[row][c];
    cr_assert_fail("the table has no column %s", name);
    return "";
}

static inline double number(const table *t, int row, const char *name) { return strtod(cell(t, row, name), NULL); }

/* ---- Contexts and plans ------------------------------------------------------------------------- */

static inline kvf_ctx *ctx_of(const char *cpu, int32_t n_threads)
{
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.cpu = cpu;
    p.n_threads = n_threads;
    kvf_ctx *ctx = NULL;
    kvf_error err;
    return kvf_ctx_open(&ctx, &p, &err) == KVF_OK ? ctx : NULL;
}

static inline kvf_merge *merge_of(kvf_ctx *ctx, const char *spec)
{
    kvf_merge *m;
    kvf_error err;
    cr_assert_eq(kvf_merge_open(&m, ctx, spec, &err), KVF_OK, "%s: %s", spec, err.msg);
    return m;
}

static inline kvf_merge_input input_of(const void *x, kvf_merge_type type, int64_t t, int64_t n, int64_t d)
{
    kvf_merge_input in;
    kvf_merge_input_init(&in);
    in.features = (kvf_merge_view){ .data = x, .type = type, .n_frame = t, .n_tok = n, .dim = d };
    return in;
}

static inline kvf_merge_plan *plan_of(kvf_ctx *ctx, const char *spec, const kvf_merge_input *in)
{
    kvf_merge *m = merge_of(ctx, spec);
    kvf_merge_plan *p;
    kvf_error err;
    kvf_status rc = kvf_merge_plan_make(&p, m, in, &err);
    cr_assert_eq(rc, KVF_OK, "%s: %s", spec, rc < 0 ? err.msg : "");
    kvf_merge_close(m);
    return p;
}

static inline kvf_merge_plan_info info_of(const kvf_merge_plan *p)
{
    kvf_merge_plan_info i = { .size = sizeof i };
    cr_assert_eq(kvf_merge_plan_get_info(p, &i, NULL), KVF_OK);
    return i;
}

/* [n_out][dim] f32, malloc'ed. */
static inline float *apply_of(const kvf_merge_plan *p, const kvf_merge_view *x, const void *newline)
{
    kvf_merge_apply a;
    kvf_error err;
    kvf_merge_apply_init(&a);
    a.src = *x;
    a.newline = newline;
    a.dst = malloc((size_t)(info_of(p).n_out * x->dim) * sizeof(float) + 1);
    kvf_status rc = kvf_merge_plan_apply(p, &a, &err);
    cr_assert_eq(rc, KVF_OK, "%s", rc < 0 ? err.msg : "");
    return a.dst;
}

/* The instruction sets to be compared, those the machine has. */
static const char *const rig_cpus[] = { "ref", "avx2", "avx512" };

/* ---- Random numbers ------------------------------------------------------------------------------- */

typedef struct rng {
    uint64_t s;
} rng;

static inline uint32_t rnd(rng *r)
{
    r->s = r->s * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(r->s >> 32);
}

static inline float rnd_unit(rng *r) { return (float)(rnd(r) >> 8) * 0x1p-24f; }  /* 0..1 */
static inline float rnd_sign(rng *r) { return 2 * rnd_unit(r) - 1; }              /* -1..1 */

/* A video whose tokens mostly stay the same, with cuts and a region that moves. */
static inline float *some_video(rng *r, int64_t t, int64_t n, int64_t d)
{
    float *x = calloc((size_t)(t * n * d), sizeof *x);
    for (int64_t f = 0; f < t; f++)
        for (int64_t k = 0; k < n; k++) {
            bool fresh = f == 0 || rnd(r) % 100 < 12 || f % 11 == 10;
            for (int64_t i = 0; i < d; i++) {
                int64_t at = (f * n + k) * d + i;
                x[at] = fresh || at < n * d ? rnd_sign(r) : x[at - n * d] + 0.15f * rnd_sign(r);
            }
        }
    return x;
}

static inline float *some_scores(rng *r, int64_t n)
{
    float *a = malloc((size_t)n * sizeof *a);
    for (int64_t i = 0; i < n; i++) a[i] = rnd_unit(r);
    return a;
}

#endif
