/* bench_attn.c - attention kernels of every level (AVX-512 with and without BF16) on one thread, without the
 * session around them.
 *
 *     bench_attn [--quick]
 *
 * One CSV row per case, best of several. Prefill: the last 128 queries (a session's chunk is
 * larger, its parts are not) over a list of keys; GFLOP/s of the visible scores (4 head_dim each)
 * and the share of the fp32 FMA peak at the level's vector width, measured here. Decode: GB/s of K
 * and V, and the share of a plain streaming read, measured here. Both walk a buffer larger than the
 * caches in slices of 8 MB, the best slice counts: other work on the machine comes and goes.
 * Times are processor time of the thread.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/cpu_ops.h"

typedef struct model {
    const char *name;
    int32_t n_head, n_head_kv, head_dim;
} model;

static const model models[] = { { "qwen2.5-0.5b", 14, 2, 64 },
                                { "qwen2.5-1.5b", 12, 2, 128 },
                                { "gemma3-270m", 4, 1, 256 },
                                { "mha-8x64", 8, 8, 64 } };
enum { N_MODEL = sizeof models / sizeof models[0], PREFILL_TOK = 128 };

#define POOL_BYTES ((size_t)192 << 20)
#define SLICE_BYTES ((size_t)8 << 20)

typedef struct pool {
    void *slab;
    int32_t *slots;
    float *q, *o, *lse;
    double peak[2]; /* GFLOP/s with 8 and 16 lanes */
} pool;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *get(size_t n, size_t size)
{
    void *p = kvf_alloc(&kvf_mem_default, n, size);
    if (p) return p;
    fprintf(stderr, "bench_attn: out of memory (%zu x %zu bytes)\n", n, size);
    exit(1);
}

/* ---- What the machine can do ---------------------------------------------------------- */
enum { PEAK_SUMS = 12, PEAK_STEPS = 2000000 };

__attribute__((target("avx2,fma"))) static float fma_avx2(void)
{
    __m256 sum[PEAK_SUMS], a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
    for (int i = 0; i < PEAK_SUMS; i++) sum[i] = _mm256_set1_ps((float)i);
    for (int j = 0; j < PEAK_STEPS; j++)
        for (int i = 0; i < PEAK_SUMS; i++) sum[i] = _mm256_fmadd_ps(sum[i], a, b);
    for (int i = 1; i < PEAK_SUMS; i++) sum[0] = _mm256_add_ps(sum[0], sum[i]);
    return _mm256_cvtss_f32(sum[0]);
}

__attribute__((target("avx512f"))) static float fma_avx512(void)
{
    __m512 sum[PEAK_SUMS], a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
    for (int i = 0; i < PEAK_SUMS; i++) sum[i] = _mm512_set1_ps((float)i);
    for (int j = 0; j < PEAK_STEPS; j++)
        for (int i = 0; i < PEAK_SUMS; i++) sum[i] = _mm512_fmadd_ps(sum[i], a, b);
    for (int i = 1; i < PEAK_SUMS; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    return _mm512_cvtss_f32(sum[0]);
}

/* Best of five; the sum is returned through *keep so that it is computed. */
static double fma_gflops(float (*f)(void), int lanes, volatile float *keep)
{
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        double t = now();
        *keep = f();
        t = now() - t;
        if (t < best) best = t;
    }
    return 2.0 * lanes * PEAK_SUMS * PEAK_STEPS / best * 1e-9;
}

/* Seconds of a plain read of one slice. */
static double read_slice(const void *p)
{
    const uint64_t *x = p;
    uint64_t s[8] = { 0 };
    double t = now();
    for (size_t j = 0; j < SLICE_BYTES / 64; j++)
        for (size_t k = 0; k < 8; k++) s[k] += x[j * 8 + k];
    t = now() - t;
    volatile uint64_t keep = s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
    (void)keep;
    return t;
}

/* ---- Cases ---------------------------------------------------------------------------- */
static kvf_attn_args args(const pool *p, const model *m, const kvf_kv_view *view, int64_t n_tok,
                          int64_t n_key)
{
    return (kvf_attn_args){ .q = p->q,
                            .o = p->o,
                            .lse = p->lse,
                            .n_tok = n_tok,
                            .n_head = m->n_head,
                            .n_head_kv = m->n_head_kv,
                            .head_dim = m->head_dim,
                            .scale = 0.1f,
                            .kv = view,
                            .slots = p->slots,
                            .n_key = n_key,
                            .q_first = n_key - n_tok };
}

static double run_prefill(const kvf_cpu_ops *ops, const kvf_attn_args *a)
{
    int64_t tile = ops->attn_tile(a);
    void *scratch = get(ops->attn_scratch_bytes(a, tile), 1);
    double t = now();
    for (int64_t tok = 0; tok < a->n_tok; tok += tile)
        for (int32_t h = 0; h < a->n_head_kv; h++)
            ops->attn(&(kvf_attn_part){ .a = a,
                                        .head_kv = h,
                                        .tok0 = tok,
                                        .key1 = a->n_key,
                                        .scratch = scratch,
                                        .tok1 = tok + tile < a->n_tok ? tok + tile : a->n_tok });
    t = now() - t;
    kvf_free(&kvf_mem_default, scratch);
    return t;
}

/* One query block over all keys, every KV head one part, as with few threads. */
static double run_decode(const kvf_cpu_ops *ops, const kvf_attn_args *a)
{
    void *scratch = get(ops->attn_decode_scratch_bytes(a, a->n_tok), 1);
    double t = now();
    for (int32_t h = 0; h < a->n_head_kv; h++)
        ops->attn_decode(
            &(kvf_attn_part){ .a = a, .head_kv = h, .tok1 = a->n_tok, .key1 = a->n_key, .scratch = scratch });
    t = now() - t;
    kvf_free(&kvf_mem_default, scratch);
    return t;
}

/* The best of the pool's even slices, and into *read that of a plain read of the odd ones, in turn
 * so that both meet the same machine. n_key becomes that of a slice. */
static double best_decode(const kvf_cpu_ops *ops, const pool *p, kvf_attn_args *a, double *read)
{
    double best = 1e9;
    const int32_t *slots = a->slots;
    int64_t n_block = (int64_t)(SLICE_BYTES / a->kv->slot_bytes);
    a->n_key = n_block * KVF_BLOCK;
    a->q_first = a->n_key;
    *read = 1e9;
    for (int64_t i = 0; i < (int64_t)(POOL_BYTES / SLICE_BYTES); i += 2) {
        a->slots = slots + i * n_block;
        double t = run_decode(ops, a);
        if (t < best) best = t;
        t = read_slice((const char *)p->slab + (size_t)(i + 1) * SLICE_BYTES);
        if (t < *read) *read = t;
    }
    return best;
}

static double best_prefill(const kvf_cpu_ops *ops, const kvf_attn_args *a)
{
    double best = 1e9;
    for (int i = 0; i < 4; i++) {
        double t = run_prefill(ops, a);
        if (t < best) best = t;
    }
    return best;
}

static void bench(const pool *p, const kvf_cpu_ops *ops, const model *m, int64_t n_tok, int64_t n_key)
{
    size_t slot_bytes = (size_t)2 * (size_t)m->n_head_kv * KVF_BLOCK * (size_t)m->head_dim * 2;
    void *slab[1] = { p->slab };
    kvf_kv_view view = { .slab = slab, .shift = 30, .slot_bytes = slot_bytes };
    bool decode = n_tok <= ops->attn_decode_max;
    kvf_attn_args a = args(p, m, &view, n_tok, n_key);
    double read = 0.0, best = decode ? best_decode(ops, p, &a, &read) : best_prefill(ops, &a);
    double hidden = decode ? 0.0 : (double)(n_tok - 1) / 2; /* keys that a query does not see, mean */
    double flops = 4.0 * (double)n_tok * ((double)a.n_key - hidden) * m->n_head * m->head_dim;
    double gflops = flops / best * 1e-9, peak = p->peak[ops->level >= KVF_CPU_LEVEL_AVX512];
    double gbs = (double)a.n_key / KVF_BLOCK * (double)slot_bytes / best * 1e-9;
    printf("%s,%s,%s,%s,%lld,%lld,%.1f,%.2f,%.2f,%.2f\n", decode ? "decode" : "prefill",
           kvf_cpu_level_name(ops->level), decode ? ops->attn_decode_name : ops->attn_name, m->name,
           (long long)n_tok, (long long)a.n_key, gflops, peak > 0.0 ? gflops / peak : 0.0, gbs,
           read > 0.0 ? gbs * read / ((double)SLICE_BYTES * 1e-9) : 0.0);
    fflush(stdout);
}

static void bench_models(const pool *p, const kvf_cpu_ops *ops, bool quick, bool decode)
{
    for (int m = 0; m < (quick ? 2 : N_MODEL); m++) {
        bench(p, ops, &models[m], PREFILL_TOK, 4096);
        if (!quick) bench(p, ops, &models[m], PREFILL_TOK, 16384);
        if (decode) bench(p, ops, &models[m], 1, 0);
        if (decode && !quick) bench(p, ops, &models[m], 4, 0);
    }
}

static void pool_open(pool *p, unsigned flags)
{
    size_t n = (size_t)PREFILL_TOK * 14 * 256, n_half = POOL_BYTES / 2;
    volatile float keep;
    p->slab = get(POOL_BYTES, 1);
    kvf_f16 *h = p->slab;
    uint32_t x = 1;
    for (size_t i = 0; i < n_half; i++) {
        x = x * 1664525u + 1013904223u;
        h[i] = (kvf_f16)((x >> 16 & 0x83ff) | 0x3400); /* 0.25..0.5, either sign */
    }
    p->slots = get(65536, sizeof *p->slots);
    for (int32_t i = 0; i < 65536; i++) p->slots[i] = i;
    p->q = get(n, sizeof(float));
    p->o = get(n, sizeof(float));
    p->lse = get(n, sizeof(float));
    for (size_t i = 0; i < n; i++) p->q[i] = (float)(i * 2654435761u % 1000) * 1e-3f - 0.5f;
    if (flags & KVF_CPU_AVX2) p->peak[0] = fma_gflops(fma_avx2, 8, &keep);
    if (flags & KVF_CPU_AVX512) p->peak[1] = fma_gflops(fma_avx512, 16, &keep);
    (void)keep;
}

static void pool_close(pool *p)
{
    kvf_free(&kvf_mem_default, p->slab);
    kvf_free(&kvf_mem_default, p->slots);
    kvf_free(&kvf_mem_default, p->q);
    kvf_free(&kvf_mem_default, p->o);
    kvf_free(&kvf_mem_default, p->lse);
}

int main(int argc, char **argv)
{
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    if (argc > 2 || (argc == 2 && !quick)) {
        fprintf(stderr, "usage: bench_attn [--quick]\n");
        return 2;
    }
    unsigned flags = kvf_cpu_detect();
    kvf_cpu_level best = KVF_CPU_LEVEL_REF;
    kvf_cpu_level_parse(&best, "auto", flags, NULL);
    pool p = { 0 };
    pool_open(&p, flags);
    printf("# fp32 FMA peak of one thread: %.0f GFLOP/s (8 lanes), %.0f (16 lanes)\n", p.peak[0], p.peak[1]);
    printf("form,level,kernel,model,n_tok,n_key,gflops,share_of_peak,gbs,share_of_read\n");
    for (int level = (int)best; level >= KVF_CPU_LEVEL_AVX2; level--) {
        kvf_cpu_ops ops;
        kvf_cpu_ops_init(&ops, (kvf_cpu_level)level, flags);
        bench_models(&p, &ops, quick, true);
        if (level != KVF_CPU_LEVEL_AVX512 || !(flags & KVF_CPU_AVX512_BF16)) continue;
        kvf_cpu_ops_init(&ops, KVF_CPU_LEVEL_AVX512, flags & ~(unsigned)KVF_CPU_AVX512_BF16);
        bench_models(&p, &ops, quick, false); /* decode is the same */
    }
    pool_close(&p);
    return 0;
}
