/* bench_merge.c - merging video tokens: how long plan and apply take, and how near memory's speed that is.
 *
 *     bench_merge [--features F.npy] [--scores A.npy] [--out TOKENS.npy] [--meta META.npy] [--spec SPEC]
 *                 [--threads N] [--cpu NAME] [--rounds N] [--noise N.npy] [--stream FRAMES]
 *
 * F is [T][N][D] f32; without it a video is made: 32 x 196 x 3584, a still background with noise, an object
 * that moves, two cuts. Every figure is the best of --rounds (7), element types in turn. One CSV row each:
 *
 *     read         the features' bytes read once, summed: what memory gives; GB/s
 *     similarity   the pass of all planners; read_share is the time of `read` over its own
 *     plan, apply  of the spec (holitom:ratio=0.15,tau=0.8), f32, f16, bf16 in, f32 out
 *     stream       with --stream FRAMES: frames one by one, f16; milliseconds a frame, most bytes held
 *
 * --out and --meta write the f32 result, so that run.py can check it against its own.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/half.h"
#include "base/mem.h"
#include "kvfold/merge.h"

typedef struct options {
    const char *features, *scores, *noise, *out, *meta, *spec, *cpu;
    int threads, rounds;
    int64_t stream;
} options;

typedef struct array {
    float *v;
    int64_t shape[3], n;
} array;

typedef struct meter {
    size_t now, most;
} meter;

static void die(const char *text, const char *more)
{
    fprintf(stderr, "bench_merge: %s%s\n", text, more);
    exit(1);
}

static void must(kvf_status rc, const kvf_error *err)
{
    if (rc < 0) die(err->msg, "");
}

static void *get(size_t n, size_t size)
{
    void *p = kvf_alloc_raw(&kvf_mem_default, n, size);
    if (!p) die("out of memory", "");
    memset(p, 0, n * size); /* pages are there before time is taken */
    return p;
}

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

/* ---- Arrays --------------------------------------------------------------------------------------- */

static array load(const char *path)
{
    array a = { .n = 1 };
    unsigned char head[10];
    char text[1024] = { 0 };
    FILE *f = fopen(path, "rb");
    if (!f || fread(head, 1, 10, f) != 10 || memcmp(head, "\x93NUMPY\1", 7) != 0)
        die("not an npy file: ", path);
    size_t n_head = (size_t)head[8] | (size_t)head[9] << 8;
    if (n_head >= sizeof text || fread(text, 1, n_head, f) != n_head || !strstr(text, "'<f4'"))
        die("not f32: ", path);
    const char *p = strstr(text, "shape': (");
    if (!p) die("no shape: ", path);
    p += 9;
    for (int i = 0; i < 3 && *p != ')'; i++) {
        char *end;
        a.shape[i] = strtoll(p, &end, 10);
        a.n *= a.shape[i];
        for (p = end; *p == ',' || *p == ' '; p++) {
        }
    }
    a.v = get((size_t)a.n, sizeof *a.v);
    if (fread(a.v, sizeof *a.v, (size_t)a.n, f) != (size_t)a.n) die("cut short: ", path);
    fclose(f);
    return a;
}

static void save(const char *path, const void *v, const char *descr, int64_t rows, int64_t cols)
{
    char head[128];
    int n = snprintf(head, sizeof head, "{'descr': '%s', 'fortran_order': False, 'shape': (%lld, %lld), }",
                     descr, (long long)rows, (long long)cols);
    while (n < 117) head[n++] = ' ';
    head[n++] = '\n';
    const unsigned char magic[10] = { 0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, 118, 0 };
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(magic, 1, 10, f) != 10 || fwrite(head, 1, 118, f) != 118 ||
        fwrite(v, 4, (size_t)(rows * cols), f) != (size_t)(rows * cols) || fclose(f))
        die("cannot write ", path);
}

static float unit(uint64_t *s)
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*s >> 32) * 0x1p-31f;
}

static array make(void)
{
    enum { T = 32, N = 196, D = 3584 };
    array a = { get((size_t)T * N * D, 4), { T, N, D }, (int64_t)T * N * D };
    uint64_t s = 42;
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = 0; n < N; n++) {
            bool cut = t == 0 || t == 12 || t == 23,
                 moves = llabs(n % 14 - t % 14) < 3 && llabs(n / 14 - 7) < 3;
            float *x = a.v + (t * N + n) * D;
            for (int64_t d = 0; d < D; d++)
                x[d] = cut || moves ? unit(&s) : 0.95f * x[d - N * D] + 0.3f * unit(&s);
        }
    return a;
}

/* ---- Memory's speed ---------------------------------------------------------------------------------- */

/* Many sums at once, asked for 8 KiB ahead as the pass does: bound by memory. */
static float read_all(const float *x, int64_t n)
{
    float s[128] = { 0 }, all = 0;
    for (int64_t i = 0; i + 128 <= n; i += 128) {
        for (int k = 0; k < 128; k += 16) __builtin_prefetch((const char *)(x + i + k) + 8192, 0, 2);
        for (int k = 0; k < 128; k++) s[k] += x[i + k];
    }
    for (int k = 0; k < 128; k++) all += s[k];
    return all;
}

static double best_read(const array *a, int rounds)
{
    double best = INFINITY;
    float sink = 0;
    for (int i = 0; i < rounds; i++) {
        double t = now_ms();
        sink += read_all(a->v, a->n);
        t = now_ms() - t;
        best = t < best ? t : best;
    }
    return isnan(sink) ? 0 : best; /* the sum is used: it is not left out */
}

/* ---- Plan and apply ------------------------------------------------------------------------------------ */

static const char *const types[] = { "f32", "f16", "bf16" };

typedef struct times {
    double similarity, plan, apply, both;
} times;

static times run_once(const kvf_merge *m, const kvf_merge_input *in, float *dst, kvf_merge_plan **keep)
{
    kvf_error err;
    kvf_merge_plan *p;
    kvf_merge_plan_info info = { .size = sizeof info };
    kvf_merge_apply a;
    double t0 = now_ms();
    must(kvf_merge_plan_make(&p, m, in, &err), &err);
    double t1 = now_ms();
    kvf_merge_apply_init(&a);
    a.src = in->features;
    a.dst = dst;
    static const float newline[65536];
    a.newline = newline;
    must(kvf_merge_plan_apply(p, &a, &err), &err);
    double t2 = now_ms();
    must(kvf_merge_plan_get_info(p, &info, &err), &err);
    if (keep)
        *keep = p;
    else
        kvf_merge_plan_free(p);
    return (times){ info.similarity_ms, t1 - t0, t2 - t1, t2 - t0 };
}

static void smaller(times *best, times t)
{
    best->similarity = fmin(best->similarity, t.similarity);
    best->plan = fmin(best->plan, t.plan);
    best->apply = fmin(best->apply, t.apply);
    best->both = fmin(best->both, t.both);
}

static void *narrowed(const array *a, int type)
{
    if (type == KVF_MERGE_F32) return a->v;
    uint16_t *h = get((size_t)a->n, 2);
    for (int64_t i = 0; i < a->n; i++)
        h[i] = type == KVF_MERGE_F16 ? kvf_f16_from_f32(a->v[i]) : kvf_bf16_from_f32(a->v[i]);
    return h;
}

static void bench_plans(kvf_ctx *ctx, const options *o, const array *a, const array *scores,
                        const array *noise)
{
    kvf_error err;
    kvf_merge *m;
    must(kvf_merge_open(&m, ctx, o->spec, &err), &err);
    times best[3];
    kvf_merge_input in[3];
    float *dst = get((size_t)a->n, 4);
    for (int type = 0; type < 3; type++) {
        best[type] = (times){ INFINITY, INFINITY, INFINITY, INFINITY };
        kvf_merge_input_init(&in[type]);
        in[type].features = (kvf_merge_view){ .data = narrowed(a, type),
                                              .type = (kvf_merge_type)type,
                                              .n_frame = a->shape[0],
                                              .n_tok = a->shape[1],
                                              .dim = a->shape[2] };
        in[type].scores = scores->v;
        in[type].noise = noise->v;
        in[type].n_noise = noise->v ? noise->n : 0;
    }
    double read = best_read(a, o->rounds);
    for (int i = 0; i < o->rounds; i++)
        for (int type = 0; type < 3; type++) smaller(&best[type], run_once(m, &in[type], dst, NULL));
    read = fmin(read, best_read(a, o->rounds));
    printf("what,type,ms,gb_per_s,read_share\n");
    printf("read,f32,%.2f,%.2f,1\n", read, 4e-6 * (double)a->n / read);
    for (int type = 0; type < 3; type++) {
        double gb = (type ? 2e-6 : 4e-6) * (double)a->n, same = type ? read / 2 : read;
        printf("similarity,%s,%.2f,%.2f,%.2f\n", types[type], best[type].similarity,
               gb / best[type].similarity, same / best[type].similarity);
        printf("plan,%s,%.2f,,\napply,%s,%.2f,,\nplan+apply,%s,%.2f,,\n", types[type], best[type].plan,
               types[type], best[type].apply, types[type], best[type].both);
    }
    kvf_merge_plan *p;
    kvf_merge_plan_info info = { .size = sizeof info };
    run_once(m, &in[0], dst, &p);
    must(kvf_merge_plan_get_info(p, &info, &err), &err);
    fprintf(stderr, "%s on %s: %lld of %lld tokens, %lld segments, %lld reduced, scores %s\n", info.spec,
            info.cpu, (long long)info.n_out, (long long)(info.n_frame * info.n_tok),
            (long long)info.n_segment, (long long)info.total_reduced, info.scores);
    if (o->out) save(o->out, dst, "<f4", info.n_out, a->shape[2]);
    if (o->meta) save(o->meta, info.meta, "<i4", info.n_out, 4);
    kvf_merge_plan_free(p);
    kvf_merge_close(m);
    for (int type = 1; type < 3; type++)
        kvf_free(&kvf_mem_default, (void *)(uintptr_t)in[type].features.data);
    kvf_free(&kvf_mem_default, dst);
}

/* ---- Streams ---------------------------------------------------------------------------------------------
 */

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

static kvf_ctx *open_ctx(const options *o, meter *m)
{
    kvf_ctx *ctx;
    kvf_error err;
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = o->threads;
    p.cpu = o->cpu;
    if (m) {
        p.alloc = meter_alloc;
        p.release = meter_release;
        p.user = m;
    }
    must(kvf_ctx_open(&ctx, &p, &err), &err);
    return ctx;
}

/* The video's frames over and over, forwards and backwards, in f16. */
static void bench_stream(const options *o, const array *a)
{
    meter m = { 0 };
    kvf_error err;
    kvf_ctx *ctx = open_ctx(o, &m);
    kvf_merge *method;
    kvf_merge_stream *s;
    kvf_merge_stream_params p;
    int64_t n_tok = a->shape[1], dim = a->shape[2], n_out = 0, n_plan = 0, n_forced = 0;
    uint16_t *h = narrowed(a, KVF_MERGE_F16);
    float *dst = NULL;
    double spent = 0;
    must(kvf_merge_open(&method, ctx, o->spec, &err), &err);
    kvf_merge_stream_params_init(&p);
    p.type = KVF_MERGE_F16;
    p.n_tok = n_tok;
    p.dim = dim;
    must(kvf_merge_stream_open(&s, method, &p, &err), &err);
    dst = get((size_t)(p.hold * n_tok * dim), 4);
    double start = now_ms();
    for (int64_t t = 0; t <= o->stream; t++) {
        int64_t at = t % (2 * a->shape[0] - 2);
        if (at >= a->shape[0]) at = 2 * a->shape[0] - 2 - at;
        must(t < o->stream ? kvf_merge_stream_push(s, h + at * n_tok * dim, NULL, &err)
                           : kvf_merge_stream_finish(s, &err),
             &err);
        kvf_merge_plan *plan;
        kvf_merge_apply apply;
        kvf_merge_plan_info info = { .size = sizeof info };
        kvf_merge_apply_init(&apply);
        apply.dst = dst;
        while (kvf_merge_stream_next(s, &plan, &apply.src, &err) == KVF_OK) {
            must(kvf_merge_plan_apply(plan, &apply, &err), &err);
            must(kvf_merge_plan_get_info(plan, &info, &err), &err);
            n_out += info.n_out;
            n_forced = info.n_forced;
            n_plan++;
            kvf_merge_plan_free(plan);
        }
    }
    spent = now_ms() - start;
    printf("what,frames,ms_per_frame,tokens,plans,forced,most_mb\nstream,%lld,%.3f,%lld,%lld,%lld,%.1f\n",
           (long long)o->stream, spent / (double)o->stream, (long long)n_out, (long long)n_plan,
           (long long)n_forced, (double)m.most / 1e6);
    kvf_merge_stream_close(s);
    kvf_merge_close(method);
    kvf_ctx_close(ctx);
    kvf_free(&kvf_mem_default, h);
    kvf_free(&kvf_mem_default, dst);
}

int main(int argc, char **argv)
{
    options o = { .spec = "holitom:ratio=0.15,tau=0.8", .threads = 1, .rounds = 7 };
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *k = argv[i], *v = argv[i + 1];
        if (!strcmp(k, "--features"))
            o.features = v;
        else if (!strcmp(k, "--scores"))
            o.scores = v;
        else if (!strcmp(k, "--noise"))
            o.noise = v;
        else if (!strcmp(k, "--out"))
            o.out = v;
        else if (!strcmp(k, "--meta"))
            o.meta = v;
        else if (!strcmp(k, "--spec"))
            o.spec = v;
        else if (!strcmp(k, "--cpu"))
            o.cpu = v;
        else if (!strcmp(k, "--threads"))
            o.threads = atoi(v);
        else if (!strcmp(k, "--rounds"))
            o.rounds = atoi(v);
        else if (!strcmp(k, "--stream"))
            o.stream = atoll(v);
        else
            die("unknown option ", k);
    }
    array a = o.features ? load(o.features) : make(), scores = { 0 }, noise = { 0 };
    if (a.n < 1 || a.shape[2] < 1 || a.shape[2] > 65536) die("features must be [T][N][D]", "");
    if (o.scores) scores = load(o.scores);
    if (o.scores && scores.n != a.shape[0] * a.shape[1]) die("scores must be [T][N]", "");
    if (o.noise) noise = load(o.noise);
    if (o.stream > 0) {
        bench_stream(&o, &a);
    } else {
        kvf_ctx *ctx = open_ctx(&o, NULL);
        bench_plans(ctx, &o, &a, &scores, &noise);
        kvf_ctx_close(ctx);
    }
    kvf_free(&kvf_mem_default, a.v);
    kvf_free(&kvf_mem_default, scores.v);
    kvf_free(&kvf_mem_default, noise.v);
    return 0;
}
