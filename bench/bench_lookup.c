/* bench_lookup.c - the op `vote`: what choosing far blocks costs, by kind of digest and length of text.
 *
 *     bench_lookup [--quick] [THREADS]
 *
 * One CSV row per case, best of several, whole op by the wall clock. One layer of a Qwen2.5 0.5B shape
 * (14 heads, 2 of KV, 64 channels), units of 32 tokens. Forms: `decode` is one query, `question` 30.
 * gmacs counts each product of a query's channel with a key's (or a vector's) once; `share` is that of
 * the level's peak on THREADS threads, measured here: byte products for BITS, f32 FMA for the others.
 * AVX2 has no VNNI: its byte peak is VPMADDUBSW with the additions that keep 16-bit sums.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"

enum { N_HEAD = 14, N_HEAD_KV = 2, HEAD_DIM = 64, UNIT = 32, UNITS = KVF_BLOCK / UNIT, QUESTION = 30 };
enum { SUMS = 12, STEPS = 1000000 };

typedef struct bench_case {
    const char *name;
    kvf_digest digest;
    int32_t pool;
} bench_case;

static const bench_case cases[] = {
    { "bits1", { .kind = KVF_DIGEST_BITS, .bits = 1 }, 1 },
    { "bits2", { .kind = KVF_DIGEST_BITS, .bits = 2 }, 1 },
    { "bits4", { .kind = KVF_DIGEST_BITS, .bits = 4 }, 1 },
    { "mean32", { .kind = KVF_DIGEST_MEAN, .sub = 32 }, 1 },
    { "mean32_pool64", { .kind = KVF_DIGEST_MEAN, .sub = 32 }, 64 },
    { "bounds32", { .kind = KVF_DIGEST_BOUNDS, .sub = 32 }, 1 },
    { "reps32", { .kind = KVF_DIGEST_REPS, .sub = 32 }, 1 },
};
enum { N_CASE = sizeof cases / sizeof cases[0] };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *get(size_t n, size_t size)
{
    void *p = kvf_alloc(&kvf_mem_default, n, size);
    if (p) return p;
    fprintf(stderr, "bench_lookup: out of memory (%zu x %zu bytes)\n", n, size);
    exit(1);
}

static uint32_t rng = 1;

static float rnd(void)
{
    rng = rng * 1664525u + 1013904223u;
    return (float)(rng >> 8) / 8388608.0f - 1.0f; /* -1..1 */
}

/* ---- What one core can do: products of 10^9 a second ------------------------------------------ */

__attribute__((target("avx2,fma"))) static int fma_avx2(void)
{
    __m256 sum[SUMS], a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
    for (int i = 0; i < SUMS; i++) sum[i] = _mm256_set1_ps((float)i);
    for (int j = 0; j < STEPS; j++)
        for (int i = 0; i < SUMS; i++) sum[i] = _mm256_fmadd_ps(sum[i], a, b);
    for (int i = 1; i < SUMS; i++) sum[0] = _mm256_add_ps(sum[0], sum[i]);
    return (int)_mm256_cvtss_f32(sum[0]);
}

__attribute__((target("avx512f"))) static int fma_avx512(void)
{
    __m512 sum[SUMS], a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_ps((float)i);
    for (int j = 0; j < STEPS; j++)
        for (int i = 0; i < SUMS; i++) sum[i] = _mm512_fmadd_ps(sum[i], a, b);
    for (int i = 1; i < SUMS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    return (int)_mm512_cvtss_f32(sum[0]);
}

/* The operand differs in every step, or the product would be taken out of the loop. */
__attribute__((target("avx2"))) static int bytes_avx2(void)
{
    __m256i sum[SUMS], a = _mm256_set1_epi8(1), one = _mm256_set1_epi8(1);
    for (int i = 0; i < SUMS; i++) sum[i] = _mm256_set1_epi16((short)i);
    for (int j = 0; j < STEPS; j++) {
        a = _mm256_xor_si256(a, one);
        for (int i = 0; i < SUMS; i++) sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(a, sum[i]));
    }
    for (int i = 1; i < SUMS; i++) sum[0] = _mm256_add_epi16(sum[0], sum[i]);
    return _mm_cvtsi128_si32(_mm256_castsi256_si128(sum[0]));
}

__attribute__((target("avx512f,avx512vnni"))) static int bytes_avx512(void)
{
    __m512i sum[SUMS], a = _mm512_set1_epi32(0x01010101), b = _mm512_set1_epi32(0x02030405);
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_epi32(i);
    for (int j = 0; j < STEPS; j++)
        for (int i = 0; i < SUMS; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
    for (int i = 1; i < SUMS; i++) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
    return _mm_cvtsi128_si32(_mm512_castsi512_si128(sum[0]));
}

static double peak_gmacs(int (*f)(void), int per_step)
{
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        double t = now();
        volatile int keep = f();
        (void)keep;
        t = now() - t;
        if (t < best) best = t;
    }
    return (double)per_step * SUMS * STEPS / best * 1e-9;
}

/* Products of f32 and of bytes at a level; 0: not measured. */
static void peaks(kvf_cpu_level level, double out[2])
{
    out[0] = out[1] = 0;
    if (level == KVF_CPU_LEVEL_AVX2) out[0] = peak_gmacs(fma_avx2, 8), out[1] = peak_gmacs(bytes_avx2, 32);
    if (level >= KVF_CPU_LEVEL_AVX512) out[0] = peak_gmacs(fma_avx512, 16), out[1] = peak_gmacs(bytes_avx512, 64);
}

/* ---- Cases ---------------------------------------------------------------------------------------- */

static kvf_digest shape(const bench_case *c)
{
    kvf_digest g = c->digest;
    g.n_head = N_HEAD, g.n_head_kv = N_HEAD_KV, g.head_dim = HEAD_DIM;
    return g;
}

/* Digests of n_block blocks: 64 different ones, made by the op, each copied to a place of its own, so
 * that a long text comes from memory as it would. REPS are written from outside. */
static void fill(kvf_backend *b, const kvf_digest *g, uint8_t *out, int64_t n_block)
{
    size_t bytes = kvf_digest_bytes(g), keys = (size_t)N_HEAD_KV * KVF_BLOCK * HEAD_DIM;
    void *slab = get(2 * keys, sizeof(kvf_f16));
    void *const table[1] = { slab };
    kvf_kv_view view = { .slab = table, .slot_bytes = 4 * keys };
    kvf_f16 *k = slab;
    for (int64_t i = 0; i < n_block && i < 64; i++) {
        uint8_t *to = out + (size_t)i * bytes;
        for (size_t j = 0; j < keys; j++) k[j] = kvf_f16_from_f32(rnd() * 4);
        for (size_t j = 0; g->kind == KVF_DIGEST_REPS && j < bytes / 4; j++) ((float *)(void *)to)[j] = rnd();
        if (g->kind == KVF_DIGEST_REPS) continue;
        kvf_digest_args a = { .kv = &view, .n_tok = KVF_BLOCK, .digest = g, .out = to };
        if (b->ops->digest(b, &a, 1, NULL) != KVF_OK) exit(1);
    }
    for (int64_t i = 64; i < n_block; i++) memcpy(out + (size_t)i * bytes, out + (size_t)(i % 64) * bytes, bytes);
    kvf_free(&kvf_mem_default, slab);
}

static double vectors_of_block(const kvf_digest *g)
{
    if (g->kind == KVF_DIGEST_BITS) return KVF_BLOCK;
    return (double)KVF_BLOCK / g->sub * (g->kind == KVF_DIGEST_BOUNDS ? 2 : 1);
}

static double best_time(kvf_backend *b, const kvf_vote_args *a)
{
    double best = 1e9, spent = 0;
    for (int i = 0; i < 50 && (i < 3 || spent < 0.3); i++) {
        double t = now();
        if (b->ops->vote(b, a, NULL) != KVF_OK) exit(1);
        t = now() - t;
        spent += t;
        if (t < best) best = t;
    }
    return best;
}

static void bench(kvf_backend *b, const bench_case *c, int64_t n_block, const double *peak)
{
    kvf_digest g = shape(c);
    size_t bytes = kvf_digest_bytes(&g);
    uint8_t *data = get((size_t)n_block, bytes);
    const void **rows = get((size_t)n_block, sizeof *rows);
    float *q = get((size_t)QUESTION * N_HEAD * HEAD_DIM, sizeof *q), *lse = get((size_t)QUESTION * N_HEAD, sizeof *lse);
    float *vote = get((size_t)(n_block * UNITS), sizeof *vote);
    for (int64_t i = 0; i < n_block; i++) rows[i] = data + (size_t)i * bytes;
    for (int i = 0; i < QUESTION * N_HEAD * HEAD_DIM; i++) q[i] = rnd();
    fill(b, &g, data, n_block);
    for (int form = 0; form < 2; form++) {
        kvf_vote_args a = { .q = q, .lse = lse, .n_q = form ? QUESTION : 1, .scale = 0.125f, .digest = &g, .rows = rows,
                            .unit = UNIT, .n_unit = n_block * UNITS, .vote = vote,
                            .rule = { .kind = KVF_VOTE_GATE, .max_queries = true, .pool = c->pool } };
        double t = best_time(b, &a), n_q = (double)((a.n_q + c->pool - 1) / c->pool);
        double gmacs = n_q * N_HEAD * HEAD_DIM * vectors_of_block(&g) * (double)n_block / t * 1e-9;
        double most = peak[g.kind == KVF_DIGEST_BITS];
        char level[32];
        b->ops->describe(b, level, sizeof level);
        printf("%s,%s,%s,%lld,%.3f,%.1f,%.2f,%.2f\n", level, c->name, form ? "question" : "decode",
               (long long)(n_block * KVF_BLOCK), t * 1e3, gmacs, most > 0 ? gmacs / most : 0.0,
               (double)bytes * (double)n_block / t * 1e-9);
        fflush(stdout);
    }
    kvf_free(&kvf_mem_default, data);
    kvf_free(&kvf_mem_default, (void *)rows);
    kvf_free(&kvf_mem_default, q);
    kvf_free(&kvf_mem_default, lse);
    kvf_free(&kvf_mem_default, vote);
}

static void bench_level(kvf_cpu_level level, unsigned flags, kvf_threads *threads, bool quick)
{
    static const int64_t blocks[] = { 128, 1024, 8192 };
    kvf_log log = { 0 };
    kvf_cpu_backend_params p = { .level = level, .flags = flags, .threads = threads, .mem = &kvf_mem_default, .log = &log };
    kvf_backend *b;
    double peak[2];
    if (kvf_cpu_backend_open(&b, &p, NULL) != KVF_OK) exit(1);
    peaks(level, peak);
    printf("# %s, one thread: %.0f Gmac/s f32, %.0f Gmac/s bytes\n", kvf_cpu_level_name(level), peak[0], peak[1]);
    for (int i = 0; i < 2; i++) peak[i] *= kvf_threads_count(threads);
    for (int c = 0; c < N_CASE; c++)
        for (int i = 0; i < (quick ? 2 : 3); i++) bench(b, &cases[c], blocks[i], peak);
    b->ops->close(b);
}

int main(int argc, char **argv)
{
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    char *end = NULL;
    const char *number = argc > 1 + quick ? argv[1 + quick] : NULL;
    long n = number ? strtol(number, &end, 10) : kvf_cpu_count();
    if (argc > 2 + quick || (number && (end == number || *end)) || n < 1 || n > 1024) {
        fprintf(stderr, "usage: bench_lookup [--quick] [THREADS]\n");
        return 2;
    }
    unsigned flags = kvf_cpu_detect();
    kvf_cpu_level best = KVF_CPU_LEVEL_REF;
    kvf_cpu_level_parse(&best, "auto", flags, NULL);
    kvf_threads *threads;
    if (kvf_threads_open(&threads, (int32_t)n, &kvf_mem_default, NULL) != KVF_OK) return 1;
    printf("level,digest,form,n_tok,ms,gmacs,share_of_peak,digest_gbs\n");
    for (int level = (int)best; level >= KVF_CPU_LEVEL_AVX2; level--) {
        if (level == KVF_CPU_LEVEL_AMX) continue; /* the same kernels as AVX-512 */
        bench_level((kvf_cpu_level)level, flags, threads, quick);
    }
    kvf_threads_close(threads);
    return 0;
}
