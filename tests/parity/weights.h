/* weights.h - weight bytes and guarded memory for the parity tests.
 *
 * Any bits are valid quants, so a block is random bits with an f16 scale put in. Buffers end at an
 * unreadable page: a kernel that reads past a row's last byte is killed, in every build.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_PARITY_WEIGHTS_H
#define KVF_TESTS_PARITY_WEIGHTS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "base/dtype.h"
#include "base/half.h"

static const kvf_dtype test_types[] = {
    KVF_DTYPE_F32,  KVF_DTYPE_F16,  KVF_DTYPE_BF16, KVF_DTYPE_Q4_0, KVF_DTYPE_Q4_1, KVF_DTYPE_Q5_0,
    KVF_DTYPE_Q5_1, KVF_DTYPE_Q8_0, KVF_DTYPE_Q4_K, KVF_DTYPE_Q5_K, KVF_DTYPE_Q6_K,
};
enum { N_TEST_TYPES = sizeof test_types / sizeof *test_types };

typedef enum weight_kind {
    W_RANDOM, /* scales near 1e-2 of either sign */
    W_ZERO,   /* zero scales under random quants */
    W_LOW,    /* every quant the smallest of its range */
    W_HIGH,   /* every quant the largest */
    W_TINY,   /* f16 subnormal scales */
    W_HUGE    /* the largest f16 scales */
} weight_kind;

static inline uint64_t test_rng(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s;
}

/* In -1 .. 1. */
static inline float test_real(uint64_t *s) { return (float)(int32_t)(test_rng(s) >> 32) * 0x1p-31f; }

typedef struct guarded {
    void *data; /* `bytes` up to the unreadable page, rounded up to `align` */
    void *map;
    size_t map_bytes;
} guarded;

static inline guarded guarded_alloc(size_t bytes, size_t align)
{
    size_t page = 4096, used = (bytes + align - 1) / align * align,
           room = (used + page - 1) / page * page + page;
    guarded g = { .map_bytes = room + page };
    g.map = mmap(NULL, g.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect((char *)g.map + room, page, PROT_NONE) != 0) return (guarded){ 0 };
    g.data = (char *)g.map + room - used;
    return g;
}

static inline void guarded_free(guarded g) { munmap(g.map, g.map_bytes); }

static inline kvf_f16 test_scale(weight_kind kind, uint64_t *seed)
{
    float r = test_real(seed);
    kvf_f16 sign = r < 0.0f ? 0x8000 : 0;
    switch (kind) {
    case W_ZERO: return sign;
    case W_TINY: return (kvf_f16)(sign | (1 + (test_rng(seed) & 31)));
    case W_HUGE: return sign | 0x7bff;
    default: return kvf_f16_from_f32(r * 0.02f);
    }
}

static inline void test_float_weights(kvf_dtype type, uint8_t *p, int64_t n, weight_kind kind, uint64_t *seed)
{
    for (int64_t i = 0; i < n; i++) {
        float v = kind == W_ZERO ? 0.0f
                                 : test_real(seed) * (kind == W_TINY   ? 1e-6f
                                                      : kind == W_HUGE ? 6e4f
                                                                       : 0.2f);
        kvf_f16 half = type == KVF_DTYPE_F16 ? kvf_f16_from_f32(v) : kvf_bf16_from_f32(v);
        if (type == KVF_DTYPE_F32)
            memcpy(p + 4 * i, &v, 4);
        else
            memcpy(p + 2 * i, &half, 2);
    }
}

static inline void test_weights(kvf_dtype type, uint8_t *p, int64_t n, weight_kind kind, uint64_t *seed)
{
    if (kvf_dtype_get(type)->block == 1) {
        test_float_weights(type, p, n, kind, seed);
        return;
    }
    size_t bytes = kvf_dtype_row_bytes(type, n), block = (size_t)kvf_dtype_get(type)->bytes;
    uint8_t low = type == KVF_DTYPE_Q8_0 ? 0x80 : 0x00, high = type == KVF_DTYPE_Q8_0 ? 0x7f : 0xff;
    for (size_t i = 0; i < bytes; i++)
        p[i] = kind == W_LOW ? low : kind == W_HIGH ? high : (uint8_t)(test_rng(seed) >> 40);
    bool min =
        type == KVF_DTYPE_Q4_1 || type == KVF_DTYPE_Q5_1 || type == KVF_DTYPE_Q4_K || type == KVF_DTYPE_Q5_K;
    for (size_t i = 0; i < bytes; i += block) {
        kvf_f16 d = test_scale(kind, seed), m = test_scale(kind, seed);
        memcpy(p + i + (type == KVF_DTYPE_Q6_K ? 208 : 0), &d, 2);
        if (min) memcpy(p + i + 2, &m, 2);
        if (type == KVF_DTYPE_Q6_K && kind == W_LOW) memset(p + i + 192, 0x80, 16); /* scales -128 */
        if (type == KVF_DTYPE_Q4_K || type == KVF_DTYPE_Q5_K)
            if (kind == W_LOW) memset(p + i + 4, 0xff, 12);
    }
}

#endif
