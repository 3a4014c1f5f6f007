/* mv_avx2.c - decode: a few tokens times quantised weights, straight on the blocks, AVX2.
 *
 * The unit is 32 weights in one register: vpmaddubsw and vpmaddwd to eight int32 lanes, then one
 * fma with the block's scale; nothing is summed across lanes before the end of a row. 16-bit sums
 * of two products must not saturate:
 *   - 4 to 6-bit quants as unsigned bytes: at most 2 * 63 * 127. The offset that made them unsigned is
 *     taken back like a minimum; of Q6_K, with two scales a block, in integers: -offset * (sum of the
 *     lane's four activations), computed once per call.
 *   - Q8_0: |w| times (x with the sign of w): at most 2 * 128 * 127 = 32512.
 * Scales of eight blocks are converted at once and multiplied by the activations'. Minima meet the
 * activations' block sums, one fma per eight blocks.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/unpack_avx2.h"

#define MAX_ROWS 4
#define MAX_TOK 2     /* of one pass: 2 rows x 2 tokens leave registers for the unpacking */
#define PREFETCH 2048 /* bytes ahead in each of four streams; 1 to 4 KB measure the same */

/* One token: q and d as packed; corr: [n_in / 4] to add to the lanes, of Q6_K only; sum: -d * sum of a block,
 * [n_in / 32] and zeros to a multiple of 8. */
typedef struct act {
    const int8_t *q;
    const int32_t *corr;
    const float *d, *sum;
} act;

typedef struct place {
    int64_t row, step; /* rows row, row + step, ... */
    int64_t t;
} place;

/* ---- Preparing activations ------------------------------------------------------------ */

static int64_t round64(int64_t n) { return (n + 63) & ~(int64_t)63; }

static size_t act_bytes(int64_t n_in)
{
    return (size_t)round64(n_in) + (size_t)round64(kvf_q8_blocks(n_in) * (int64_t)sizeof(float));
}

static size_t scratch_bytes(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type;
    return (size_t)n_tok * act_bytes(n_in);
}

/* The scratch of a token: corr, sum. */
static act prepare(kvf_dtype type, const kvf_mm_part *p, int64_t t)
{
    int64_t n_in = p->w->n_in, n = kvf_q8_blocks(n_in);
    int32_t *corr = (int32_t *)(void *)((char *)p->scratch + (size_t)t * act_bytes(n_in));
    float *sum = (float *)(void *)((char *)corr + round64(n_in));
    kvf_q8_row row = kvf_q8_row_at(p->x, t, n_in);
    for (int64_t b = 0; b < round64(4 * n) / 4; b++) sum[b] = b < n ? -row.d[b] * (float)row.sum[b] : 0.0f;
    __m256i off = _mm256_set1_epi8((char)kvf_offset_of(type)), minus = _mm256_set1_epi16(-1);
    for (int64_t k = 0; k < n_in && type == KVF_DTYPE_Q6_K; k += 32) {
        __m256i q = _mm256_load_si256((const __m256i *)(const void *)(row.q + k));
        __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(off, q), minus);
        _mm256_store_si256((__m256i *)(void *)(corr + k / 4), s);
    }
    return (act){ row.q, corr, row.d, sum };
}

/* ---- Blocks --------------------------------------------------------------------------- */

/* f16 numbers of n <= 8 blocks, `stride` bytes apart. */
KVF_INLINE __m256 scales_of(const uint8_t *p, int stride, int n)
{
    uint64_t v[2] = { 0 };
    v[0] = n >= 4 ? kvf_four_scales(p, stride, 4) : kvf_four_scales(p, stride, n);
    if (n == 8)
        v[1] = kvf_four_scales(p + 4 * stride, stride, 4);
    else if (n > 4)
        v[1] = kvf_four_scales(p + 4 * stride, stride, n - 4);
    return _mm256_cvtph_ps(_mm_set_epi64x((long long)v[1], (long long)v[0]));
}

/* Eight lanes, each the sum of four products of the 32 quants u with activations k ... */
KVF_INLINE __m256i dot32(kvf_dtype type, __m256i u, const act *x, int64_t k)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i q = _mm256_load_si256((const __m256i *)(const void *)(x->q + k));
    if (type == KVF_DTYPE_Q8_0)
        return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(q, u)), ones);
    __m256i dot = _mm256_madd_epi16(_mm256_maddubs_epi16(u, q), ones);
    if (type != KVF_DTYPE_Q6_K) return dot;
    return _mm256_add_epi32(dot, _mm256_load_si256((const __m256i *)(const void *)(x->corr + k / 4)));
}

/* Eight blocks (256 weights) of one row of a 32-element type, or n at the end of the row. */
KVF_INLINE void eight_blocks(kvf_dtype type, int n_tok, const uint8_t *b, int n, const act *x, int64_t k,
                             __m256 *sum)
{
    const bool min = type == KVF_DTYPE_Q4_1 || type == KVF_DTYPE_Q5_1;
    const int bytes = kvf_block_bytes(type), off = type == KVF_DTYPE_Q8_0 ? 0 : kvf_offset_of(type);
    float scale[MAX_TOK][8];
    __m256 s = scales_of(b, bytes, n),
           m = min ? scales_of(b + 2, bytes, n) : _mm256_mul_ps(s, _mm256_set1_ps((float)-off));
    for (int line = 0; line < 8 * bytes; line += 64)
        _mm_prefetch((const char *)b + PREFETCH + line, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int t = 0; t < n_tok; t++) {
        _mm256_storeu_ps(scale[t], _mm256_mul_ps(s, _mm256_load_ps(x[t].d + k / 32)));
        if (min || off) sum[t] = _mm256_fnmadd_ps(m, _mm256_load_ps(x[t].sum + k / 32), sum[t]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        __m256i u = kvf_unpack32(type, b + i * bytes);
#pragma GCC unroll 2
        for (int t = 0; t < n_tok; t++)
            sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot32(type, u, &x[t], k + 32 * i)),
                                     _mm256_broadcast_ss(&scale[t][i]), sum[t]);
    }
}

/* One block of Q4_K or Q5_K. */
KVF_INLINE void block_k(kvf_dtype type, int n_tok, const uint8_t *b, const act *x, int64_t k, __m256 *sum)
{
    float scale[MAX_TOK][8];
    __m128i bytes = kvf_k_scales(b);
    __m256 s = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    __m256 m = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
    s = _mm256_mul_ps(s, _mm256_set1_ps(kvf_f16_at(b)));
    m = _mm256_mul_ps(m, _mm256_set1_ps(kvf_f16_at(b + 2)));
#pragma GCC unroll 2
    for (int t = 0; t < n_tok; t++) {
        _mm256_storeu_ps(scale[t], _mm256_mul_ps(s, _mm256_load_ps(x[t].d + k / 32)));
        sum[t] = _mm256_fmadd_ps(m, _mm256_load_ps(x[t].sum + k / 32), sum[t]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        __m256i u = kvf_unpack256(type, b, j);
#pragma GCC unroll 2
        for (int t = 0; t < n_tok; t++)
            sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot32(type, u, &x[t], k + 32 * j)),
                                     _mm256_broadcast_ss(&scale[t][j]), sum[t]);
    }
}

/* One block of Q6_K: a scale covers 16 weights, half of a register. */
KVF_INLINE void block_q6(int n_tok, const uint8_t *b, const act *x, int64_t k, __m256 *sum)
{
    __m256 d = _mm256_set1_ps(kvf_f16_at(b + 208));
    __m128i bytes = kvf_load16(b + 192);
    __m256 s[2];
    s[0] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), d);
    s[1] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))), d);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        const int i = 2 * (j % 4);
        __m256i u = kvf_unpack256(KVF_DTYPE_Q6_K, b, j);
        __m256 two =
            _mm256_permutevar8x32_ps(s[j / 4], _mm256_setr_epi32(i, i, i, i, i + 1, i + 1, i + 1, i + 1));
#pragma GCC unroll 2
        for (int t = 0; t < n_tok; t++) {
            __m256 dx = _mm256_mul_ps(two, _mm256_broadcast_ss(x[t].d + k / 32 + j));
            sum[t] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot32(KVF_DTYPE_Q6_K, u, &x[t], k + 32 * j)), dx, sum[t]);
        }
    }
}

/* ---- The kernel ----------------------------------------------------------------------- */

KVF_INLINE void store(const kvf_mm_part *p, int64_t t, int64_t r, __m256 sum)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    float v = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s))), *y = &p->y[t * p->y_stride + r];
    if (p->bias) v += p->bias[r];
    *y = p->accumulate ? *y + v : v;
}

/* 256 columns of one row. */
KVF_INLINE void columns(kvf_dtype type, int n_tok, const uint8_t *w, int64_t n_in, const act *x, int64_t k,
                        __m256 *sum)
{
    const int bytes = kvf_block_bytes(type);
    if (type < KVF_DTYPE_Q4_K) {
        const uint8_t *b = w + k / 32 * bytes;
        if (n_in - k >= 256)
            eight_blocks(type, n_tok, b, 8, x, k, sum);
        else
            eight_blocks(type, n_tok, b, (int)((n_in - k) / 32), x, k, sum);
        return;
    }
    const uint8_t *b = w + k / 256 * bytes;
    for (int line = 0; line < bytes; line += 64) _mm_prefetch((const char *)b + PREFETCH + line, _MM_HINT_T0);
    if (type == KVF_DTYPE_Q6_K)
        block_q6(n_tok, b, x, k, sum);
    else
        block_k(type, n_tok, b, x, k, sum);
}

/* The rows of a place with n_tok tokens. Rows past the part repeat its last one. */
KVF_INLINE void rows(kvf_dtype type, int n_row, int n_tok, const kvf_mm_part *p, const act *x,
                     const place *at)
{
    const uint8_t *w[MAX_ROWS];
    __m256 sum[MAX_ROWS][MAX_TOK];
#pragma GCC unroll 4
    for (int r = 0; r < n_row; r++) {
        int64_t row = at->row + r * at->step < p->row1 ? at->row + r * at->step : p->row1 - 1;
        w[r] = (const uint8_t *)p->w->data + (size_t)row * p->w->row_bytes;
#pragma GCC unroll 2
        for (int i = 0; i < n_tok; i++) sum[r][i] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < p->w->n_in; k += 256) {
#pragma GCC unroll 4
        for (int r = 0; r < n_row; r++) columns(type, n_tok, w[r], p->w->n_in, x, k, sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < n_row; r++) {
        int64_t row = at->row + r * at->step;
#pragma GCC unroll 2
        for (int i = 0; i < n_tok; i++)
            if (row < p->row1) store(p, at->t + i, row, sum[r][i]);
    }
}

#include "backend/cpu/mv_q8_tmpl.h"

const kvf_mm_kernel kvf_mv_avx2_q8 = { .name = "avx2_int8_mv",
                                       .x_form = KVF_X_Q8,
                                       .row_align = MAX_ROWS,
                                       .x_bytes = kvf_q8_x_bytes,
                                       .pack_align = 1,
                                       .pack = kvf_q8_pack_avx2,
                                       .scratch_bytes = scratch_bytes,
                                       .run = run };
