/* mm_ref.c - the three matrix products that define the op, see mm.h, and the Q8 activations.
 *
 * One weight row at a time, every token with it; a sum runs over k in order. The other kernels
 * differ from these in the order of fp32 sums and in nothing else.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/mm_q8.h"

#include <string.h>

static size_t round64(size_t n) { return (n + 63u) & ~(size_t)63u; }

/* ---- Q8 activations ------------------------------------------------------------------- */

size_t kvf_q8_row_bytes(int64_t n_in)
{
    size_t n = (size_t)kvf_q8_blocks(n_in);
    return round64(n * KVF_Q8_BLOCK) + 2 * round64(n * 4);
}

kvf_q8_row kvf_q8_row_at(const void *packed, int64_t t, int64_t n_in)
{
    size_t n = (size_t)kvf_q8_blocks(n_in);
    const char *p = (const char *)packed + (size_t)t * kvf_q8_row_bytes(n_in);
    const char *d = p + round64(n * KVF_Q8_BLOCK);
    return (kvf_q8_row){ (const int8_t *)p, (const float *)(const void *)d,
                         (const int32_t *)(const void *)(d + round64(n * 4)) };
}

size_t kvf_q8_x_bytes(int64_t n_tok, int64_t n_in) { return (size_t)n_tok * kvf_q8_row_bytes(n_in); }

/* To nearest, ties to even: at this size the last bit of a float is worth 1. */
static int round_even(float r)
{
    const float big = 12582912.0f; /* 1.5 * 2^23 */
    return (int)(r + big - big);
}

/* One block of n <= 32 values. The maximum is taken on the bits, which order like the absolute
 * values and put NaN above infinity: a NaN activation makes a NaN scale and is seen in y. A
 * scale of 0 (also: too small for a float) or NaN goes with q = 0. */
static void q8_block(const float *x, int64_t n, int8_t *q, float *d, int32_t *sum)
{
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t a = kvf_f32_bits(x[i]) & 0x7fffffffu;
        if (a > top) top = a;
    }
    *d = kvf_f32_from_bits(top) / 127.0f;
    *sum = 0;
    for (int64_t i = 0; i < n; i++) {
        float r = *d > 0.0f ? x[i] / *d : 0.0f;
        if (!(r == r)) r = 0.0f;                             /* inf / inf */
        r = r > 127.0f ? 127.0f : r < -127.0f ? -127.0f : r; /* d was rounded: subnormals pass 127 */
        int v = round_even(r);
        q[i] = (int8_t)v;
        *sum += v;
    }
}

void kvf_q8_pack_ref(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out)
{
    (void)n_tok;
    for (int64_t t = t0; t < t1; t++) {
        char *p = (char *)out + (size_t)t * kvf_q8_row_bytes(n_in);
        memset(p, 0, kvf_q8_row_bytes(n_in));
        kvf_q8_row row = kvf_q8_row_at(out, t, n_in);
        int8_t *q = (int8_t *)row.q; /* ours to write: out is not const */
        float *d = (float *)row.d;
        int32_t *sum = (int32_t *)row.sum;
        for (int64_t b = 0; b < kvf_q8_blocks(n_in); b++) {
            int64_t i = b * KVF_Q8_BLOCK, n = n_in - i < KVF_Q8_BLOCK ? n_in - i : KVF_Q8_BLOCK;
            q8_block(x + t * n_in + i, n, q + i, &d[b], &sum[b]);
        }
    }
}

/* ---- The other forms ------------------------------------------------------------------ */

size_t kvf_f32_x_bytes(int64_t n_tok, int64_t n_in) { return (size_t)(n_tok * n_in) * sizeof(float); }

void kvf_f32_pack(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out)
{
    (void)n_tok;
    memcpy((float *)out + t0 * n_in, x + t0 * n_in, (size_t)((t1 - t0) * n_in) * sizeof *x);
}

static size_t bf16_x_bytes(int64_t n_tok, int64_t n_in) { return (size_t)(n_tok * n_in) * sizeof(kvf_bf16); }

static void bf16_pack(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out)
{
    (void)n_tok;
    kvf_bf16 *o = out;
    for (int64_t i = t0 * n_in; i < t1 * n_in; i++) o[i] = kvf_bf16_from_f32(x[i]);
}

/* ---- Products ------------------------------------------------------------------------- */

static const uint8_t *weight_row(const kvf_weight *w, int64_t r)
{
    return (const uint8_t *)w->data + (size_t)r * w->row_bytes;
}

static void put(const kvf_mm_part *p, int64_t t, int64_t r, float v)
{
    float *y = &p->y[t * p->y_stride + r];
    if (p->bias) v += p->bias[r];
    *y = p->accumulate ? *y + v : v;
}

static size_t row_scratch(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type, (void)n_tok;
    return (size_t)n_in * sizeof(float);
}

static void run_f32(const kvf_mm_part *p)
{
    int64_t n = p->w->n_in;
    float *w = p->scratch;
    for (int64_t r = p->row0; r < p->row1; r++) {
        kvf_dequant_ref(p->w->type, weight_row(p->w, r), w, n);
        for (int64_t t = 0; t < p->n_tok; t++) {
            const float *x = (const float *)p->x + t * n;
            float sum = 0.0f;
            for (int64_t k = 0; k < n; k++) sum += x[k] * w[k];
            put(p, t, r, sum);
        }
    }
}

static void run_bf16(const kvf_mm_part *p)
{
    int64_t n = p->w->n_in;
    float *w = p->scratch;
    for (int64_t r = p->row0; r < p->row1; r++) {
        kvf_dequant_ref(p->w->type, weight_row(p->w, r), w, n);
        for (int64_t k = 0; k < n; k++) w[k] = kvf_f32_from_bf16(kvf_bf16_from_f32(w[k]));
        for (int64_t t = 0; t < p->n_tok; t++) {
            const kvf_bf16 *x = (const kvf_bf16 *)p->x + t * n;
            float sum = 0.0f;
            for (int64_t k = 0; k < n; k++) sum += kvf_f32_from_bf16(x[k]) * w[k];
            put(p, t, r, sum);
        }
    }
}

static size_t sums_scratch(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type, (void)n_in;
    return (size_t)n_tok * sizeof(float);
}

/* One weight block with one token: groups of one scale, integers inside, fp32 outside. */
static float q8_dot(const kvf_wblock *b, const int8_t *q, const float *d)
{
    float sum = 0.0f;
    for (int g = 0; g < b->n / b->group; g++) {
        int32_t dot = 0, qsum = 0;
        for (int i = g * b->group; i < (g + 1) * b->group; i++) {
            dot += b->u[i] * q[i];
            qsum += q[i];
        }
        sum += d[g * b->group / KVF_Q8_BLOCK] * (b->s[g] * (float)dot - b->m[g] * (float)qsum);
    }
    return sum;
}

static void run_q8(const kvf_mm_part *p)
{
    int64_t n = p->w->n_in;
    size_t bytes = (size_t)kvf_dtype_get(p->w->type)->bytes;
    float *sum = p->scratch;
    kvf_wblock b;
    for (int64_t r = p->row0; r < p->row1; r++) {
        const uint8_t *w = weight_row(p->w, r);
        for (int64_t t = 0; t < p->n_tok; t++) sum[t] = 0.0f;
        for (int64_t k = 0; k < n; k += b.n, w += bytes) {
            if (!kvf_wblock_unpack(p->w->type, w, &b)) return;
            for (int64_t t = 0; t < p->n_tok; t++) {
                kvf_q8_row x = kvf_q8_row_at(p->x, t, n);
                sum[t] += q8_dot(&b, x.q + k, x.d + k / KVF_Q8_BLOCK);
            }
        }
        for (int64_t t = 0; t < p->n_tok; t++) put(p, t, r, sum[t]);
    }
}

const kvf_mm_kernel kvf_mm_ref_f32 = { .name = "ref_f32",
                                       .x_form = KVF_X_F32,
                                       .row_align = 1,
                                       .x_bytes = kvf_f32_x_bytes,
                                       .pack_align = 1,
                                       .pack = kvf_f32_pack,
                                       .scratch_bytes = row_scratch,
                                       .run = run_f32 };

const kvf_mm_kernel kvf_mm_ref_q8 = { .name = "ref_q8",
                                      .x_form = KVF_X_Q8,
                                      .row_align = 1,
                                      .x_bytes = kvf_q8_x_bytes,
                                      .pack_align = 1,
                                      .pack = kvf_q8_pack_ref,
                                      .scratch_bytes = sums_scratch,
                                      .run = run_q8 };

const kvf_mm_kernel kvf_mm_ref_bf16 = { .name = "ref_bf16",
                                        .x_form = KVF_X_BF16,
                                        .row_align = 1,
                                        .x_bytes = bf16_x_bytes,
                                        .pack_align = 1,
                                        .pack = bf16_pack,
                                        .scratch_bytes = row_scratch,
                                        .run = run_bf16 };
