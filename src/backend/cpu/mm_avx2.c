/* mm_avx2.c - prefill product with AVX2: int8 activations, weights as bytes.
 *
 * A panel of 16 weight rows is unpacked once, four k of 8 rows to a register, and multiplied with
 * all tokens, two at a time. vpmaddubsw adds two products of an unsigned and a signed byte in 16
 * bits and saturates, so how many of them may be added before widening depends on the type:
 *
 *     4-bit codes     15 * 127 * 2 *  8 = 30480    a whole block
 *     5-bit codes     31 * 127 * 2 *  4 = 31496    half a block
 *     Q6_K, signed    32 * 127 * 2 *  4 = 32512    half a block: that of its scale
 *     Q8_0, signed   128 * 127 * 2 *  1 = 32512    one
 *
 * Signed weights are multiplied as |w| with the activation under w's sign.
 *
 *     panel      [n_block][8 quads][2][8 rows][4 k] bytes, then [n_block][2][16 rows] f32 pairs
 *                (mm_unpack_q8.h)
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/mm_q8.h"
#include "backend/cpu/mm_unpack_q8.h"

enum {
    PANEL_ROWS = 16,
    BLOCK_CODES = 32 * PANEL_ROWS, /* bytes of a block of the panel */
    BLOCK_PAIRS = 2 * PANEL_ROWS,  /* floats */
    TOK = 2,                       /* tokens of the largest kernel */
    STEP = 8,                      /* blocks unpacked at a time: 256 weights of a row */
    PANELS_MAX = 8,
    PANELS_BYTES = 128 * 1024 /* half the L2 of a small core */
};

/* What differs between types in the product. */
typedef struct form {
    q8_kind kind;
    int quads; /* added in 16 bits */
    bool is_signed;
} form;

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Unpacking ------------------------------------------------------------------------ */

typedef struct panel {
    uint8_t *code;
    float *pair;
} panel;

static size_t panel_bytes(int64_t n_block)
{
    return (size_t)n_block * (BLOCK_CODES + BLOCK_PAIRS * sizeof(float));
}

static panel panel_at(void *mem, int64_t n_block)
{
    uint8_t *code = mem;
    return (panel){ code, (float *)(void *)(code + n_block * BLOCK_CODES) };
}

/* One block of 8 rows of codes, 256 bytes apart: quad q to out + 64 q. */
static void interleave(const uint8_t *rows, __m256i flip, uint8_t *out)
{
    for (int c = 0; c < 2; c++, out += 256) { /* lanes: rows 0..3 and 4..7, four quads each */
        __m256 v[4];
        for (int i = 0; i < 4; i++) {
            const float *lo = (const float *)(const void *)(rows + 256 * i + 16 * c);
            v[i] = _mm256_set_m128(_mm_load_ps(lo + 256), _mm_load_ps(lo));
        }
        __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
        __m256 d = _mm256_unpacklo_ps(v[2], v[3]), e = _mm256_unpackhi_ps(v[2], v[3]);
        v[0] = _mm256_shuffle_ps(a, d, 0x44);
        v[1] = _mm256_shuffle_ps(a, d, 0xee);
        v[2] = _mm256_shuffle_ps(b, e, 0x44);
        v[3] = _mm256_shuffle_ps(b, e, 0xee);
        for (int i = 0; i < 4; i++) {
            __m256i q = _mm256_xor_si256(_mm256_castps_si256(v[i]), flip);
            _mm256_store_si256((__m256i *)(void *)(out + 64 * i), q);
        }
    }
}

/* n <= STEP blocks of the panel. Rows past the end are zeros. */
static void panel_step(const kvf_mm_part *part, const panel *p, int64_t row, int64_t block, int64_t n)
{
    const kvf_weight *w = part->w;
    _Alignas(64) uint8_t rows[8 * 256];
    /* Q8_0 comes as w + 128; here it is wanted signed. */
    __m256i flip = _mm256_set1_epi8(w->type == KVF_DTYPE_Q8_0 ? (char)0x80 : 0);
    for (int64_t half = 0; half < 2; half++) {
        for (int64_t i = 0; i < 8; i++) {
            int64_t r = row + 8 * half + i;
            q8_row_out o = { rows + 256 * i, p->pair + block * BLOCK_PAIRS + 8 * half + i, PANEL_ROWS,
                             BLOCK_PAIRS };
            if (r < part->row1) {
                q8_unpack(w->type, (const uint8_t *)w->data + (size_t)r * w->row_bytes, block, n, &o);
                continue;
            }
            memset(o.code, 0, 256);
            for (int64_t b = 0; b < n; b++) q8_put_pair(&o, b, 0, 0);
        }
        for (int64_t b = 0; b < n; b++)
            interleave(rows + 32 * b, flip, p->code + (block + b) * BLOCK_CODES + 32 * half);
    }
}

/* ---- Product -------------------------------------------------------------------------- */

/* Up to TOK tokens: their packed rows. */
typedef struct tokens {
    const int8_t *q[TOK];
    const float *d[TOK];
    const int32_t *sum[TOK];
} tokens;

#define INLINE static inline __attribute__((always_inline))

INLINE __m256i four(const int8_t *q)
{
    int v;
    memcpy(&v, q, sizeof v);
    return _mm256_set1_epi32(v);
}

INLINE __m256i pairs_of(__m256i w, __m256i x, bool is_signed)
{
    return is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                     : _mm256_maddubs_epi16(w, x);
}

/* s[2t], s[2t + 1] += products of quads q0..q1 of a block for 16 rows and token t. */
INLINE void dots(const uint8_t *code, const int8_t *const *x, int q0, int q1, int n_tok, bool is_signed,
                 __m256i *s)
{
    __m256i h[2 * TOK];
    for (int q = q0; q < q1; q++) {
        __m256i w0 = _mm256_load_si256((const __m256i *)(const void *)(code + 64 * q));
        __m256i w1 = _mm256_load_si256((const __m256i *)(const void *)(code + 64 * q + 32));
        for (int t = 0; t < n_tok; t++) {
            __m256i v = four(x[t] + 4 * q), a = pairs_of(w0, v, is_signed), b = pairs_of(w1, v, is_signed);
            h[2 * t] = q == q0 ? a : _mm256_add_epi16(h[2 * t], a);
            h[2 * t + 1] = q == q0 ? b : _mm256_add_epi16(h[2 * t + 1], b);
        }
    }
    for (int t = 0; t < 2 * n_tok; t++)
        s[t] = _mm256_add_epi32(s[t], _mm256_madd_epi16(h[t], _mm256_set1_epi16(1)));
}

INLINE void kernel(const panel *p, const tokens *k, int64_t n_block, form m, int off, int n_tok, __m256 *f)
{
    const uint8_t *code = p->code;
    const float *pair = p->pair;
    const int8_t *x[TOK];
    for (int t = 0; t < n_tok; t++) x[t] = k->q[t];
    for (int t = 0; t < 2 * n_tok; t++) f[t] = _mm256_setzero_ps();
    int n_half = m.kind == Q8_HALF ? 2 : 1, span = 8 / n_half;
    for (int64_t b = 0; b < n_block; b++, code += BLOCK_CODES, pair += BLOCK_PAIRS) {
        for (int half = 0; half < n_half; half++) {
            __m256i s[2 * TOK];
            for (int t = 0; t < 2 * n_tok; t++)
                s[t] = off ? _mm256_set1_epi32(-off * k->sum[t / 2][b]) : _mm256_setzero_si256();
            for (int q = half * span; q < (half + 1) * span; q += m.quads)
                dots(code, x, q, q + m.quads, n_tok, m.is_signed, s);
            for (int t = 0; t < 2 * n_tok; t++) {
                const float *scale = pair + half * PANEL_ROWS + (t & 1) * 8;
                __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(s[t]), _mm256_load_ps(scale));
                if (m.kind == Q8_MIN) {
                    __m256 sum = _mm256_set1_ps((float)k->sum[t / 2][b]);
                    v = _mm256_fnmadd_ps(_mm256_load_ps(scale + PANEL_ROWS), sum, v);
                }
                f[t] = _mm256_fmadd_ps(v, _mm256_set1_ps(k->d[t / 2][b]), f[t]);
            }
        }
        for (int t = 0; t < n_tok; t++) x[t] += 32;
    }
}

static void to_y(const kvf_mm_part *p, int64_t row, int64_t tok, int n_tok, const __m256 *f)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int j = 0; j < 2; j++) {
        int64_t r = row + 8 * j, n = at_most(p->row1 - r, 8);
        if (n <= 0) return;
        __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
        __m256 bias = p->bias ? _mm256_maskload_ps(p->bias + r, m) : _mm256_setzero_ps();
        for (int t = 0; t < n_tok; t++) {
            float *y = p->y + (tok + t) * p->y_stride + r;
            __m256 v = _mm256_add_ps(f[2 * t + j], bias);
            if (p->accumulate) v = _mm256_add_ps(v, _mm256_maskload_ps(y, m));
            _mm256_maskstore_ps(y, m, v);
        }
    }
}

/* One kernel per form: the constants unroll it. */
INLINE void product(kvf_dtype type, const panel *w, const tokens *k, int64_t n_block, int n_tok, __m256 *f)
{
    switch (type) {
    case KVF_DTYPE_Q4_0: kernel(w, k, n_block, (form){ Q8_SYM, 8, false }, 8, n_tok, f); break;
    case KVF_DTYPE_Q5_0: kernel(w, k, n_block, (form){ Q8_SYM, 4, false }, 16, n_tok, f); break;
    case KVF_DTYPE_Q8_0: kernel(w, k, n_block, (form){ Q8_SYM, 1, true }, 0, n_tok, f); break;
    case KVF_DTYPE_Q6_K: kernel(w, k, n_block, (form){ Q8_HALF, 4, true }, 0, n_tok, f); break;
    case KVF_DTYPE_Q4_1:
    case KVF_DTYPE_Q4_K: kernel(w, k, n_block, (form){ Q8_MIN, 8, false }, 0, n_tok, f); break;
    default: kernel(w, k, n_block, (form){ Q8_MIN, 4, false }, 0, n_tok, f); break; /* Q5_1, Q5_K */
    }
}

static void product_2(const kvf_mm_part *p, const panel *w, const tokens *k, int64_t row, int64_t tok)
{
    __m256 f[2 * TOK];
    product(p->w->type, w, k, p->w->n_in / 32, 2, f);
    to_y(p, row, tok, 2, f);
}

static void product_1(const kvf_mm_part *p, const panel *w, const tokens *k, int64_t row, int64_t tok)
{
    __m256 f[2 * TOK];
    product(p->w->type, w, k, p->w->n_in / 32, 1, f);
    to_y(p, row, tok, 1, f);
}

/* ---- Run ------------------------------------------------------------------------------ */

static int64_t panels_at_once(int64_t n_in)
{
    int64_t n = PANELS_BYTES / (int64_t)panel_bytes(n_in / 32);
    return n < 1 ? 1 : at_most(n, PANELS_MAX);
}

static size_t scratch_bytes(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type, (void)n_tok;
    return (size_t)panels_at_once(n_in) * panel_bytes(n_in / 32);
}

static void run(const kvf_mm_part *p)
{
    int64_t n_in = p->w->n_in, n_block = n_in / 32, n_panel = panels_at_once(n_in);
    size_t bytes = panel_bytes(n_block);
    uint8_t *mem = p->scratch;
    for (int64_t row = p->row0; row < p->row1; row += n_panel * PANEL_ROWS) {
        int64_t n = at_most(n_panel, (p->row1 - row + PANEL_ROWS - 1) / PANEL_ROWS);
        for (int64_t i = 0; i < n; i++) {
            panel w = panel_at(mem + (size_t)i * bytes, n_block);
            for (int64_t b = 0; b < n_block; b += STEP)
                panel_step(p, &w, row + i * PANEL_ROWS, b, at_most(STEP, n_block - b));
        }
        for (int64_t tok = 0; tok < p->n_tok; tok += TOK) {
            int step = p->n_tok - tok >= TOK ? TOK : 1;
            tokens k;
            for (int t = 0; t < step; t++) {
                kvf_q8_row x = kvf_q8_row_at(p->x, tok + t, n_in);
                k.q[t] = x.q;
                k.d[t] = x.d;
                k.sum[t] = x.sum;
            }
            for (int64_t i = 0; i < n; i++) {
                panel w = panel_at(mem + (size_t)i * bytes, n_block);
                if (step == TOK)
                    product_2(p, &w, &k, row + i * PANEL_ROWS, tok);
                else
                    product_1(p, &w, &k, row + i * PANEL_ROWS, tok);
            }
        }
    }
}

const kvf_mm_kernel kvf_mm_avx2_q8 = { .name = "avx2_int8",
                                       .x_form = KVF_X_Q8,
                                       .row_align = PANEL_ROWS,
                                       .x_bytes = kvf_q8_x_bytes,
                                       .pack_align = 1,
                                       .pack = kvf_q8_pack_avx2,
                                       .scratch_bytes = scratch_bytes,
                                       .run = run };
