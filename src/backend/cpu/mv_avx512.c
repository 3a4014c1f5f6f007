/* mv_avx512.c - decode: a few tokens times quantised weights, straight on the blocks, VNNI.
 *
 * Bound by reading the weights, so the point is few instructions per byte of them. The unit is a
 * step: 64 weights as unsigned bytes in one register, one vpdpbusd per token, lanes to fp32,
 * one fma with the vector of scales. Nothing is summed across lanes before the end of a row.
 *   - u = w + offset makes signed quants unsigned; the dot product then starts from
 *     -offset * (sum of the lane's four activations), computed once per call: exact.
 *   - scales of a type's group of blocks are made in bulk (scale times activation scale), and
 *     one permute per step and token spreads them over the lanes.
 *   - minima meet the activations' block sums: one fma per 16 blocks, into the same lanes.
 * Rows are taken four at a time (two with several tokens), which share activation loads.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/unpack_avx2.h"

#define MAX_ROWS 4
#define MAX_TOK 4     /* of one pass: 2 rows x 4 tokens = 8 accumulators and 8 scales */
#define PREFETCH 2048 /* bytes ahead in each of four streams; 1 to 4 KB measure the same */

/* Activations of one token as the steps want them. `f` per 512 elements of a 32-block type:
 * d[16], -d*sum[16]; per 256 of Q4_K and Q5_K: d[8], -d*sum[8]; of Q6_K: d of each 16. */
typedef struct act {
    const int8_t *q;
    const int32_t *corr;
    const float *f;
} act;

typedef struct place {
    int64_t row, step; /* rows row, row + step, ... */
    int64_t t;
} place;

/* ---- Preparing activations ------------------------------------------------------------ */

static int64_t round64(int64_t n) { return (n + 63) & ~(int64_t)63; }

static size_t act_bytes(int64_t n_in)
{
    return (size_t)(2 * round64(n_in) + (n_in + 511) / 512 * 32 * (int64_t)sizeof(float));
}

static size_t scratch_bytes(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type;
    return (size_t)n_tok * act_bytes(n_in);
}

static void prepare_scales(kvf_dtype type, const kvf_q8_row *row, int64_t n_in, float *f)
{
    int64_t n = kvf_q8_blocks(n_in);
    int per = type >= KVF_DTYPE_Q4_K ? 8 : 16; /* activation blocks per group of scales */
    for (int64_t b = 0; b < n; b += per, f += type >= KVF_DTYPE_Q4_K ? 16 : 32) {
        for (int j = 0; j < per; j++) {
            float d = b + j < n ? row->d[b + j] : 0.0f;
            float sum = b + j < n ? (float)row->sum[b + j] : 0.0f;
            if (type == KVF_DTYPE_Q6_K) {
                f[2 * j] = f[2 * j + 1] = d;
            } else {
                f[j] = d;
                f[per + j] = -d * sum;
            }
        }
    }
}

/* Q4_K and Q5_K: a register of qs holds groups (2g, 2g + 2) in its low halves of bytes and
 * (2g + 1, 2g + 3) in the high ones, so the activations are put in that order. */
static void prepare_order(const int8_t *q, int64_t n_in, int8_t *out)
{
    static const int order[8] = { 0, 2, 1, 3, 4, 6, 5, 7 };
    for (int64_t k = 0; k < n_in; k += 256)
        for (int j = 0; j < 8; j++) memcpy(out + k + 32 * j, q + k + 32 * order[j], 32);
}

/* The scratch of a token: q in our order (Q4_K, Q5_K), corr, f. */
static act prepare(kvf_dtype type, const kvf_mm_part *p, int64_t t)
{
    int64_t n_in = p->w->n_in;
    int8_t *q = (int8_t *)p->scratch + (size_t)t * act_bytes(n_in);
    int32_t *corr = (int32_t *)(void *)(q + round64(n_in));
    float *f = (float *)(void *)(q + 2 * round64(n_in));
    kvf_q8_row row = kvf_q8_row_at(p->x, t, n_in);
    prepare_scales(type, &row, n_in, f);
    if (type == KVF_DTYPE_Q4_K || type == KVF_DTYPE_Q5_K) {
        prepare_order(row.q, n_in, q);
        return (act){ q, corr, f };
    }
    __m512i off = _mm512_set1_epi8((char)kvf_offset_of(type)), zero = _mm512_setzero_si512();
    for (int64_t k = 0; k < n_in; k += 64) {
        __m512i s = _mm512_dpbusd_epi32(zero, off, _mm512_load_si512(row.q + k));
        _mm512_store_si512(corr + k / 4, _mm512_sub_epi32(zero, s));
    }
    return (act){ row.q, corr, f };
}

/* ---- Steps ---------------------------------------------------------------------------- */

/* 16 bytes of nibbles of each of two blocks to 64 bytes, in the order of elements. */
KVF_INLINE __m512i nibbles(const uint8_t *qs0, const uint8_t *qs1, bool pair)
{
    const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4);
    __m512i v = _mm512_broadcast_i32x4(kvf_load16(qs0));
    if (pair) v = _mm512_mask_broadcast_i32x4(v, 0xff00, kvf_load16(qs1));
    return _mm512_and_si512(_mm512_srlv_epi32(v, shift), _mm512_set1_epi8(15));
}

/* Two neighbouring blocks of 32 as unsigned bytes; with !pair the second half is unused (its
 * scale and activations are zero) and its block is not read. */
KVF_INLINE __m512i step32(kvf_dtype type, const uint8_t *b, bool pair)
{
    if (type == KVF_DTYPE_Q4_0) return nibbles(b + 2, b + 20, pair);
    if (type == KVF_DTYPE_Q4_1) return nibbles(b + 4, b + 24, pair);
    if (type == KVF_DTYPE_Q8_0) {
        __m512i v = _mm512_castsi256_si512(kvf_load32(b + 2));
        if (pair) v = _mm512_inserti64x4(v, kvf_load32(b + 36), 1);
        return _mm512_xor_si512(v, _mm512_set1_epi8(-128));
    }
    int head = type == KVF_DTYPE_Q5_0 ? 2 : 4, bytes = head + 20;
    __m512i v = nibbles(b + head + 4, b + bytes + head + 4, pair);
    uint64_t high = kvf_u32_at(b + head);
    if (pair) high |= (uint64_t)kvf_u32_at(b + bytes + head) << 32;
    return _mm512_mask_add_epi8(v, high, v, _mm512_set1_epi8(16));
}

/* f16 numbers of n <= 16 blocks, `stride` bytes apart. */
KVF_INLINE __m512 scales_of(const uint8_t *p, int stride, int n)
{
    uint64_t v[4] = { 0 };
    if (n == 16) {
        for (int i = 0; i < 4; i++) v[i] = kvf_four_scales(p + 4 * i * stride, stride, 4);
    } else {
        for (int i = 0; 4 * i < n; i++)
            v[i] = n - 4 * i >= 4 ? kvf_four_scales(p + 4 * i * stride, stride, 4)
                                  : kvf_four_scales(p + 4 * i * stride, stride, n - 4 * i);
    }
    return _mm512_cvtph_ps(
        _mm256_set_epi64x((long long)v[3], (long long)v[2], (long long)v[1], (long long)v[0]));
}

/* One step of rows x tokens; lane i takes element idx[i] of its scales. */
KVF_INLINE void multiply(__m512i u, const act *x, int64_t k, bool corr, int n_tok, const __m512 *scale,
                         __m512i idx, __m512 *sum)
{
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) {
        __m512i dot = corr ? _mm512_load_si512(x[t].corr + k / 4) : _mm512_setzero_si512();
        dot = _mm512_dpbusd_epi32(dot, u, _mm512_load_si512(x[t].q + k));
        sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(idx, scale[t]), sum[t]);
    }
}

/* ---- Rows of 32-element blocks -------------------------------------------------------- */

KVF_INLINE void rows32(kvf_dtype type, int n_row, int n_tok, const uint8_t *const *w, int64_t n_in,
                       const act *x, __m512 (*sum)[MAX_TOK])
{
    const bool min = type == KVF_DTYPE_Q4_1 || type == KVF_DTYPE_Q5_1;
    const int bytes = kvf_block_bytes(type);
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    for (int64_t g = 0; g < n_in / 32; g += 16) {
        int n = n_in / 32 - g < 16 ? (int)(n_in / 32 - g) : 16;
        __m512 scale[MAX_ROWS][MAX_TOK];
#pragma GCC unroll 4
        for (int r = 0; r < n_row; r++) {
            const uint8_t *b = w[r] + g * bytes;
            __m512 s = scales_of(b, bytes, n), m = min ? scales_of(b + 2, bytes, n) : s;
#pragma GCC unroll 4
            for (int t = 0; t < n_tok; t++) {
                scale[r][t] = _mm512_mul_ps(s, _mm512_load_ps(x[t].f + 2 * g));
                if (min) sum[r][t] = _mm512_fnmadd_ps(m, _mm512_load_ps(x[t].f + 2 * g + 16), sum[r][t]);
            }
        }
        __m512i idx = first;
        int64_t k = 32 * g;
        for (int i = 0; i < n; i += 2, k += 64) {
#pragma GCC unroll 4
            for (int r = 0; r < n_row; r++) {
                const uint8_t *b = w[r] + (g + i) * bytes;
                _mm_prefetch((const char *)b + PREFETCH, _MM_HINT_T0);
                __m512i u = i + 1 < n ? step32(type, b, true) : step32(type, b, false);
                multiply(u, x, k, !min, n_tok, scale[r], idx, sum[r]);
            }
            idx = _mm512_add_epi32(idx, _mm512_set1_epi32(2));
        }
    }
}

/* ---- Rows of 256-element blocks ------------------------------------------------------- */

/* Scales and minima of Q4_K and Q5_K (dequant_ref.c has the layout): d sc[8], dmin mn[8]. */
KVF_INLINE __m512 k_scales(const uint8_t *b)
{
    __m512i both = _mm512_cvtepu8_epi32(kvf_k_scales(b));
    __m128 d = _mm_cvtph_ps(_mm_cvtsi32_si128((int)kvf_u32_at(b)));
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(both), _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(d)));
}

/* Step i of a block: groups (0, 2), (1, 3), (4, 6), (5, 7), as prepare_order has the activations. */
KVF_INLINE __m512i step_k(kvf_dtype type, const uint8_t *b, int i)
{
    const uint8_t *qs = b + (type == KVF_DTYPE_Q4_K ? 16 : 48) + 64 * (i / 2);
    __m512i v = _mm512_loadu_si512(qs);
    if (i & 1) v = _mm512_srli_epi16(v, 4);
    v = _mm512_and_si512(v, _mm512_set1_epi8(15));
    if (type == KVF_DTYPE_Q4_K) return v;
    char bit = (char)(1 << (4 * (i / 2) + (i & 1))), bit2 = (char)(bit << 2);
    __m512i bits = _mm512_inserti64x4(_mm512_set1_epi8(bit), _mm256_set1_epi8(bit2), 1);
    __mmask64 high = _mm512_test_epi8_mask(_mm512_broadcast_i64x4(kvf_load32(b + 16)), bits);
    return _mm512_mask_add_epi8(v, high, v, _mm512_set1_epi8(16));
}

/* Step i of a Q6_K block: elements 64 i .. 64 i + 63. */
KVF_INLINE __m512i step_q6(const uint8_t *b, int i)
{
    __m512i low = _mm512_loadu_si512(b + 64 * (i / 2)), mask = _mm512_set1_epi8(0x30);
    __m512i high = _mm512_broadcast_i64x4(kvf_load32(b + 128 + 32 * (i / 2)));
    if (i & 1) {
        low = _mm512_srli_epi16(low, 4);
        high = _mm512_srlv_epi32(high, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2));
    } else {
        high = _mm512_sllv_epi32(high, _mm512_setr_epi32(4, 4, 4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2));
    }
    low = _mm512_and_si512(low, _mm512_set1_epi8(15));
    return _mm512_ternarylogic_epi32(high, mask, low, 0xea); /* (high & mask) | low */
}

KVF_INLINE __m512i step_scales(kvf_dtype type, int i)
{
    if (type == KVF_DTYPE_Q6_K)
        return _mm512_add_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                _mm512_set1_epi32(4 * i));
    int g = 4 * (i / 2) + (i & 1);
    return _mm512_setr_epi32(g, g, g, g, g, g, g, g, g + 2, g + 2, g + 2, g + 2, g + 2, g + 2, g + 2, g + 2);
}

KVF_INLINE void block_k(kvf_dtype type, int n_tok, const uint8_t *b, const act *x, int64_t k, __m512 *sum)
{
    const bool q6 = type == KVF_DTYPE_Q6_K;
    __m512 s, scale[MAX_TOK];
    if (q6) {
        uint16_t d;
        memcpy(&d, b + 208, sizeof d);
        __m512 dv = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(d)));
        s = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(kvf_load16(b + 192))), dv);
    } else {
        s = k_scales(b);
    }
#pragma GCC unroll 4
    for (int t = 0; t < n_tok; t++) {
        scale[t] = _mm512_mul_ps(s, _mm512_load_ps(x[t].f + k / 16));
        if (!q6) sum[t] = _mm512_mask_add_ps(sum[t], 0xff00, sum[t], scale[t]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i u = q6 ? step_q6(b, i) : step_k(type, b, i);
        multiply(u, x, k + 64 * i, q6, n_tok, scale, step_scales(type, i), sum);
    }
}

KVF_INLINE void rows256(kvf_dtype type, int n_row, int n_tok, const uint8_t *const *w, int64_t n_in,
                        const act *x, __m512 (*sum)[MAX_TOK])
{
    const int bytes = kvf_block_bytes(type);
    for (int64_t k = 0; k < n_in; k += 256) {
#pragma GCC unroll 4
        for (int r = 0; r < n_row; r++) {
            const uint8_t *b = w[r] + k / 256 * bytes;
            for (int line = 0; line < bytes; line += 64)
                _mm_prefetch((const char *)b + PREFETCH + line, _MM_HINT_T0);
            block_k(type, n_tok, b, x, k, sum[r]);
        }
    }
}

/* ---- The kernel ----------------------------------------------------------------------- */

KVF_INLINE void store(const kvf_mm_part *p, int64_t t, int64_t r, __m512 sum)
{
    float v = _mm512_reduce_add_ps(sum), *y = &p->y[t * p->y_stride + r];
    if (p->bias) v += p->bias[r];
    *y = p->accumulate ? *y + v : v;
}

/* The rows of a place with n_tok tokens. Rows past the part repeat its last one. */
KVF_INLINE void rows(kvf_dtype type, int n_row, int n_tok, const kvf_mm_part *p, const act *x,
                     const place *at)
{
    const uint8_t *w[MAX_ROWS];
    __m512 sum[MAX_ROWS][MAX_TOK];
#pragma GCC unroll 4
    for (int r = 0; r < n_row; r++) {
        int64_t row = at->row + r * at->step < p->row1 ? at->row + r * at->step : p->row1 - 1;
        w[r] = (const uint8_t *)p->w->data + (size_t)row * p->w->row_bytes;
#pragma GCC unroll 4
        for (int i = 0; i < n_tok; i++) sum[r][i] = _mm512_setzero_ps();
    }
    if (type >= KVF_DTYPE_Q4_K)
        rows256(type, n_row, n_tok, w, p->w->n_in, x, sum);
    else
        rows32(type, n_row, n_tok, w, p->w->n_in, x, sum);
#pragma GCC unroll 4
    for (int r = 0; r < n_row; r++) {
        int64_t row = at->row + r * at->step;
#pragma GCC unroll 4
        for (int i = 0; i < n_tok; i++)
            if (row < p->row1) store(p, at->t + i, row, sum[r][i]);
    }
}

#include "backend/cpu/mv_q8_tmpl.h"

const kvf_mm_kernel kvf_mv_avx512_q8 = { .name = "avx512_vnni_mv",
                                         .x_form = KVF_X_Q8,
                                         .row_align = MAX_ROWS,
                                         .x_bytes = kvf_q8_x_bytes,
                                         .pack_align = 1,
                                         .pack = kvf_q8_pack_avx512,
                                         .scratch_bytes = scratch_bytes,
                                         .run = run };
