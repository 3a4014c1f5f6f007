/* bench_mm.c - speed of every matrix-product kernel this machine can run, one thread, CSV.
 *
 * Weights are many copies of one matrix in a buffer larger than the caches, used in turn, as a
 * model's layers are. Decode is bound by reading them, so its rows also say which share of a plain
 * streaming read of the same buffer they reach. Best of many short runs.
 *
 *     bench_mm [--quick] [--kernel NAME] [--type NAME] [--buffer MiB]
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/mm.h"

typedef struct bench_kernel {
    const kvf_mm_kernel *k;
    unsigned flags; /* all needed */
    bool decode, floats, quants;
} bench_kernel;

static const bench_kernel kernels[] = {
#if defined(__x86_64__)
    { &kvf_mv_avx2_q8, KVF_CPU_AVX2, true, false, true },
    { &kvf_mv_avx512_q8, KVF_CPU_AVX512 | KVF_CPU_AVX512_VNNI, true, false, true },
    { &kvf_mv_avx2_f32, KVF_CPU_AVX2, true, true, true },
    { &kvf_mv_avx512_f32, KVF_CPU_AVX512, true, true, true },
    { &kvf_mm_avx2_q8, KVF_CPU_AVX2, false, false, true },
    { &kvf_mm_avx512_q8, KVF_CPU_AVX512 | KVF_CPU_AVX512_VNNI, false, false, true },
    { &kvf_mm_amx_bf16, KVF_CPU_AMX, false, true, true },
    { &kvf_mm_avx2_f32, KVF_CPU_AVX2, false, true, true },
    { &kvf_mm_avx512_f32, KVF_CPU_AVX512, false, true, true },
#endif
    { &kvf_mm_ref_q8, 0, false, false, true },
};

/* Matrices of the models we name: Qwen2.5 0.5B (first four) and 1.5B. */
static const int64_t shapes[][2] = { { 896, 896 },   { 4864, 896 },  { 896, 4864 }, { 151936, 896 },
                                     { 1536, 1536 }, { 8960, 1536 }, { 1536, 8960 } };

static const kvf_dtype quick_types[] = { KVF_DTYPE_Q5_0, KVF_DTYPE_Q8_0, KVF_DTYPE_Q4_K, KVF_DTYPE_Q6_K };

#define PORTION ((size_t)8 << 20) /* bytes of weights per timed run: short, to find a quiet moment */

typedef struct bench {
    bool quick;
    const char *kernel, *type;
    unsigned flags;
    uint8_t *buffer;
    size_t bytes;
    double read_gbs, seconds; /* seconds: per row */
} bench;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t rng(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

/* Any bytes are valid quants; f16 fields get small numbers so that results stay finite. */
static void fill(kvf_dtype type, uint8_t *p, size_t bytes)
{
    uint64_t seed = 88172645463325252u;
    size_t block = (size_t)kvf_dtype_get(type)->bytes;
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        uint64_t v = rng(&seed);
        memcpy(p + i, &v, 8);
    }
    if (type == KVF_DTYPE_F32 || type == KVF_DTYPE_F16 || type == KVF_DTYPE_BF16) {
        for (size_t i = 1; i < bytes; i += 2) p[i] = (uint8_t)((p[i] & 0x83) | 0x38);
        return;
    }
    for (size_t i = 0; i + block <= bytes; i += block) {
        uint8_t *d = p + i + (type == KVF_DTYPE_Q6_K ? 208 : 0);
        d[1] = (uint8_t)(0x20 | (d[1] & 3));
        bool two = type == KVF_DTYPE_Q4_1 || type == KVF_DTYPE_Q5_1 || type == KVF_DTYPE_Q4_K ||
                   type == KVF_DTYPE_Q5_K;
        if (two) d[3] = (uint8_t)(0x20 | (d[3] & 3));
    }
}

/* Read p .. p + bytes in four streams at once with prefetch, which is faster here than one stream.
 * Eight sums, so that the loop waits for memory and not for an add. */
static uint64_t read_all(const uint8_t *p, size_t bytes)
{
    uint64_t s[8] = { 0 }, sum = 0;
    size_t quarter = bytes / 4 / 64 * 64;
    for (size_t i = 0; i < quarter; i += 64) {
        for (size_t stream = 0; stream < 4; stream++) {
            const uint8_t *at = p + stream * quarter + i;
            uint64_t v[8];
            __builtin_prefetch(at + 2048);
            memcpy(v, at, 64);
            for (int j = 0; j < 8; j++) s[j] += v[j];
        }
    }
    for (int j = 0; j < 8; j++) sum += s[j];
    return sum;
}

/* A plain read, in the same portions as decode. */
static double read_speed(const uint8_t *p, size_t bytes, double seconds)
{
    double best = 1e9, end = now() + seconds;
    size_t portion = bytes < PORTION ? bytes : PORTION, at = 0;
    volatile uint64_t sink = 0;
    for (int rep = 0; rep < 8 || now() < end; rep++) {
        double t = now();
        sink += read_all(p + at, portion);
        t = now() - t;
        if (t < best) best = t;
        at = at + 2 * portion <= bytes ? at + portion : 0;
    }
    (void)sink; /* written only: keeps the reads */
    return (double)portion / best * 1e-9;
}

static void measure(const bench *b, const bench_kernel *bk, kvf_dtype type, const int64_t *shape,
                    int64_t n_tok)
{
    const kvf_mm_kernel *k = bk->k;
    int64_t n_out = shape[0], n_in = shape[1];
    kvf_weight w = {
        .type = type, .n_out = n_out, .n_in = n_in, .row_bytes = kvf_dtype_row_bytes(type, n_in)
    };
    size_t bytes = (size_t)n_out * w.row_bytes, copies = b->bytes / bytes;
    if (copies == 0) return;
    float *x = kvf_alloc(&kvf_mem_default, (size_t)(n_tok * n_in), sizeof *x);
    float *y = kvf_alloc(&kvf_mem_default, (size_t)(n_tok * n_out), sizeof *y);
    void *packed = kvf_alloc(&kvf_mem_default, k->x_bytes(n_tok, n_in), 1);
    void *scratch = kvf_alloc(&kvf_mem_default, k->scratch_bytes(type, n_tok, n_in), 1);
    if (!x || !y || !packed || !scratch) exit(1);
    for (int64_t i = 0; i < n_tok * n_in; i++) x[i] = (float)((i * 7919) % 2001 - 1000) * 1e-3f;

    /* Decode: a portion of the copies is one run. Prefill: one copy. */
    double ops = 2.0 * (double)n_out * (double)n_in * (double)n_tok, best = 1e9, end = now() + b->seconds;
    size_t n = bk->decode ? 1 + PORTION / bytes : 1, c = 0;
    for (int rep = 0; rep < 2 || now() < end; rep++) {
        double t = now();
        for (size_t i = 0; i < n; i++, c++) {
            w.data = b->buffer + c % copies * bytes;
            k->pack(x, n_tok, n_in, 0, n_tok, packed);
            kvf_mm_part p = { &w, packed, n_tok, 0, n_out, NULL, y, n_out, false, scratch };
            k->run(&p);
        }
        t = now() - t;
        if (t / (double)n < best) best = t / (double)n;
    }
    double gbs = (double)bytes / best * 1e-9;
    printf("%s,%s,%lld,%lld,%lld,%.1f,%.2f,", k->name, kvf_dtype_get(type)->name, (long long)n_out,
           (long long)n_in, (long long)n_tok, ops / best * 1e-9, gbs);
    if (bk->decode)
        printf("%.2f\n", gbs / b->read_gbs);
    else
        printf("\n");
    fflush(stdout);
    kvf_free(&kvf_mem_default, x);
    kvf_free(&kvf_mem_default, y);
    kvf_free(&kvf_mem_default, packed);
    kvf_free(&kvf_mem_default, scratch);
}

static void bench_one(const bench *b, const bench_kernel *bk, kvf_dtype type)
{
    static const int64_t decode_tok[] = { 1, 2, 4, 8 }, prefill_tok[] = { 64, 512 };
    size_t n_shape = b->quick ? 3 : sizeof shapes / sizeof *shapes;
    for (size_t s = 0; s < n_shape; s++) {
        if (kvf_dtype_get(type)->block == 256 && shapes[s][1] % 256) continue;
        if (bk->decode) {
            for (int i = 0; i < (b->quick ? 1 : 4); i++) measure(b, bk, type, shapes[s], decode_tok[i]);
        } else if (shapes[s][0] <= 10000) { /* the vocabulary is multiplied with one token only */
            for (int i = b->quick ? 1 : 0; i < 2; i++) measure(b, bk, type, shapes[s], prefill_tok[i]);
        }
    }
    /* 4864 is 19 blocks of 256, 896 is none: K types need the other model's shapes. */
    if (b->quick && kvf_dtype_get(type)->block == 256) measure(b, bk, type, shapes[5], bk->decode ? 1 : 512);
}

static void bench_type(bench *b, kvf_dtype type)
{
    if (!kvf_dtype_get(type) || (b->type && strcmp(b->type, kvf_dtype_get(type)->name) != 0)) return;
    bool is_float = kvf_dtype_get(type)->block == 1;
    fill(type, b->buffer, b->bytes);
    b->read_gbs = read_speed(b->buffer, b->bytes, b->seconds);
    printf("read,,,,,,%.2f,1.00\n", b->read_gbs);
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        const bench_kernel *bk = &kernels[i];
        if ((bk->flags & b->flags) != bk->flags || !(is_float ? bk->floats : bk->quants)) continue;
        if (b->kernel ? strcmp(b->kernel, bk->k->name) != 0 : bk->flags == 0) continue;
        bench_one(b, bk, type);
    }
}

int main(int argc, char **argv)
{
    bench b = { .flags = kvf_cpu_detect(), .bytes = (size_t)256 << 20, .seconds = 0.5 };
    for (int i = 1; i < argc; i++) {
        bool more = i + 1 < argc;
        if (strcmp(argv[i], "--quick") == 0) {
            b.quick = true;
            b.seconds = 0.1;
        } else if (strcmp(argv[i], "--kernel") == 0 && more) {
            b.kernel = argv[++i];
        } else if (strcmp(argv[i], "--type") == 0 && more) {
            b.type = argv[++i];
        } else if (strcmp(argv[i], "--buffer") == 0 && more) {
            b.bytes = (size_t)strtoul(argv[++i], NULL, 10) << 20;
        } else {
            fprintf(stderr, "usage: bench_mm [--quick] [--kernel NAME] [--type NAME] [--buffer MiB]\n");
            return 2;
        }
    }
    b.buffer = kvf_alloc_raw(&kvf_mem_default, b.bytes, 1);
    if (!b.buffer) {
        fprintf(stderr, "bench_mm: no memory for the weights; try a smaller --buffer\n");
        return 1;
    }
    printf("kernel,type,n_out,n_in,n_tok,gops,weight_gbs,share_of_read\n");
    if (b.quick && !b.type)
        for (size_t i = 0; i < sizeof quick_types / sizeof *quick_types; i++) bench_type(&b, quick_types[i]);
    else
        for (uint32_t t = 0; t < KVF_DTYPE_LIMIT; t++) bench_type(&b, (kvf_dtype)t);
    kvf_free(&kvf_mem_default, b.buffer);
    return 0;
}
