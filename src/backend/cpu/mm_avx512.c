/* mm_avx512.c - prefill product with AVX-512 VNNI: int8 activations, weights as bytes.
 *
 * A panel of 32 weight rows is unpacked once, four k of 16 rows to a register, and multiplied
 * with all tokens, six at a time: 12 integer sums of a block of 32 and 12 fp32 sums stay in
 * registers over CHUNK blocks. Loops, outermost first: GROUP_ROWS rows, a chunk of k, 32 rows, six
 * tokens; so the panel stays in L1, the chunk of x and the group's y in L2. vpdpbusd wants one
 * unsigned operand:
 *
 *     SYM, MIN   weight codes are unsigned. For SYM the sum starts at -off * sum(x).
 *     HALF       weights are signed and activations get + 128; the sum starts at -128 * sum(w).
 *
 * Sums start at the integer whose bits are the float 1.5 * 2^23: a sum I, |I| < 2^22, ends up as
 * the bits of the float 1.5 * 2^23 + I, and s * I = fma(that, s, -1.5 * 2^23 * s) needs no conversion.
 * It is exact: s has at most 19 bits (f16 times a scale of 8 bits), so 3 s has 21.
 *
 *     panel      [CHUNK][8 quads][2][16 rows][4 k] bytes, then [CHUNK][2][32 rows] f32 pairs
 *                (mm_unpack_q8.h), for HALF then [CHUNK][2][32 rows] int32 starts
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/mm_q8.h"
#include "backend/cpu/mm_unpack_q8.h"

enum {
    PANEL_ROWS = 32,
    GROUP_ROWS = 128,
    CHUNK = 64,                    /* blocks: the panels of a group take 320 KiB of the L2 */
    STEP = 8,                      /* blocks unpacked at a time: 256 weights of a row */
    BLOCK_CODES = 32 * PANEL_ROWS, /* bytes of a block of the panel */
    BLOCK_PAIRS = 2 * PANEL_ROWS,  /* floats */
    TOK = 6,                       /* tokens of the largest kernel */
    START = 0x4b400000             /* the bits of START_F */
};

static const float START_F = 12582912.0f; /* 1.5 * 2^23 */

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Unpacking ------------------------------------------------------------------------ */

typedef struct panel {
    _Alignas(64) uint8_t code[CHUNK * BLOCK_CODES];
    float pair[CHUNK * BLOCK_PAIRS];
    int32_t start[CHUNK * BLOCK_PAIRS]; /* HALF only */
} panel;

/* 16 rows of codes, 256 bytes apart, of which 16 dwords each: column q to out + 128 q. */
static void interleave(const uint8_t *rows, uint8_t *out)
{
    for (int c = 0; c < 4; c++, out += 512) {
        __m512 v[4];
        for (int i = 0; i < 4; i++) {
            const uint8_t *p = rows + 256 * i + 16 * c;
            v[i] = _mm512_castps128_ps512(_mm_load_ps((const float *)(const void *)p));
            v[i] = _mm512_insertf32x4(v[i], _mm_load_ps((const float *)(const void *)(p + 1024)), 1);
            v[i] = _mm512_insertf32x4(v[i], _mm_load_ps((const float *)(const void *)(p + 2048)), 2);
            v[i] = _mm512_insertf32x4(v[i], _mm_load_ps((const float *)(const void *)(p + 3072)), 3);
        }
        __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
        __m512 d = _mm512_unpacklo_ps(v[2], v[3]), e = _mm512_unpackhi_ps(v[2], v[3]);
        _mm512_store_ps(out, _mm512_shuffle_ps(a, d, 0x44));
        _mm512_store_ps(out + 128, _mm512_shuffle_ps(a, d, 0xee));
        _mm512_store_ps(out + 256, _mm512_shuffle_ps(b, e, 0x44));
        _mm512_store_ps(out + 384, _mm512_shuffle_ps(b, e, 0xee));
    }
}

/* START - 128 times the sum of 16 signed weights, per row, for both halves of n blocks. */
static void starts_fill(panel *p, int64_t block, int64_t n)
{
    const __m512i unit = _mm512_set1_epi8(1);
    for (int64_t b = block; b < block + n; b++)
        for (int h = 0; h < 4; h++) { /* half block, half panel */
            const uint8_t *code = p->code + b * BLOCK_CODES + (h >> 1) * 512 + (h & 1) * 64;
            __m512i sum = _mm512_setzero_si512();
            for (int q = 0; q < 4; q++)
                sum = _mm512_dpbusd_epi32(sum, unit, _mm512_load_si512(code + 128 * q));
            _mm512_store_si512(p->start + b * BLOCK_PAIRS + h * 16,
                               _mm512_sub_epi32(_mm512_set1_epi32(START), _mm512_slli_epi32(sum, 7)));
        }
}

/* n <= STEP blocks of the weights from `block` on, as blocks `at` .. of the panel. Rows past the
 * end are zeros. */
static void panel_step(const kvf_mm_part *part, panel *p, int64_t row, int64_t block, int64_t at, int64_t n)
{
    const kvf_weight *w = part->w;
    _Alignas(64) uint8_t rows[16 * 256];
    for (int64_t half = 0; half < 2; half++) {
        for (int64_t i = 0; i < 16; i++) {
            int64_t r = row + 16 * half + i;
            q8_row_out o = { rows + 256 * i, p->pair + at * BLOCK_PAIRS + 16 * half + i, PANEL_ROWS,
                             BLOCK_PAIRS };
            if (r < part->row1) {
                q8_unpack(w->type, (const uint8_t *)w->data + (size_t)r * w->row_bytes, block, n, &o);
                continue;
            }
            memset(o.code, 0, 256);
            for (int64_t b = 0; b < n; b++) q8_put_pair(&o, b, 0, 0);
        }
        /* Two blocks at a time; after an odd last one the panel takes a block of rubbish: CHUNK is even. */
        for (int64_t b = 0; b < n; b += 2)
            interleave(rows + 32 * b, p->code + (at + b) * BLOCK_CODES + 64 * half);
    }
    if (q8_kind_of(w->type) == Q8_HALF) starts_fill(p, at, n);
}

static void panel_unpack(const kvf_mm_part *part, panel *p, int64_t row, int64_t block, int64_t n)
{
    for (int64_t b = 0; b < n; b += STEP) panel_step(part, p, row, block + b, b, at_most(STEP, n - b));
}

/* ---- Product -------------------------------------------------------------------------- */

/* Up to TOK tokens over the blocks of a chunk. */
typedef struct tokens {
    _Alignas(64) float d[TOK][CHUNK];
    int32_t start[TOK][CHUNK];        /* START, for SYM - off * sum */
    float sum[TOK][CHUNK];            /* MIN */
    uint8_t shifted[TOK][32 * CHUNK]; /* HALF: q + 128 */
    const int8_t *q;                  /* rows q_gap bytes apart */
    size_t q_gap;
    int64_t n_block;
} tokens;

#define INLINE static inline __attribute__((always_inline))

INLINE __m512i four(const int8_t *q)
{
    int v;
    memcpy(&v, q, sizeof v);
    return _mm512_set1_epi32(v);
}

/* One quad of 32 rows with n_tok tokens. Three tokens per base register: x, x + gap, x + 2 gap. */
INLINE void quad(const uint8_t *code, const int8_t *x, size_t gap, int n_tok, bool x_unsigned, __m512i *s)
{
    const int8_t *x3 = n_tok > 3 ? x + 3 * gap : x;
    __m512i w0 = _mm512_load_si512(code), w1 = _mm512_load_si512(code + 64);
    for (int t = 0; t < n_tok; t++) {
        __m512i v = four(t < 3 ? x + (size_t)t * gap : x3 + (size_t)(t - 3) * gap);
        s[2 * t] = x_unsigned ? _mm512_dpbusd_epi32(s[2 * t], v, w0) : _mm512_dpbusd_epi32(s[2 * t], w0, v);
        s[2 * t + 1] =
            x_unsigned ? _mm512_dpbusd_epi32(s[2 * t + 1], v, w1) : _mm512_dpbusd_epi32(s[2 * t + 1], w1, v);
    }
}

/* 16 k: called, not looped, so that the sums stay in registers whatever the compiler's limits. */
INLINE void quads_4(const uint8_t *code, const int8_t *x, size_t gap, int n_tok, bool x_unsigned, __m512i *s)
{
    quad(code, x, gap, n_tok, x_unsigned, s);
    quad(code + 128, x + 4, gap, n_tok, x_unsigned, s);
    quad(code + 256, x + 8, gap, n_tok, x_unsigned, s);
    quad(code + 384, x + 12, gap, n_tok, x_unsigned, s);
}

/* f += pair * d * sums of block b. */
INLINE void add_scaled(const tokens *k, int64_t b, const float *pair, q8_kind kind, int n_tok,
                       const __m512i *s, __m512 *f)
{
    __m512 scale[2] = { _mm512_load_ps(pair), _mm512_load_ps(pair + 16) }, back[2];
    for (int j = 0; j < 2; j++) back[j] = _mm512_mul_ps(scale[j], _mm512_set1_ps(START_F));
    for (int t = 0; t < 2 * n_tok; t++) {
        __m512 v = _mm512_fmsub_ps(_mm512_castsi512_ps(s[t]), scale[t & 1], back[t & 1]);
        if (kind == Q8_MIN) {
            __m512 min = _mm512_load_ps(pair + PANEL_ROWS + (t & 1) * 16);
            v = _mm512_fnmadd_ps(min, _mm512_set1_ps(k->sum[t / 2][b]), v);
        }
        f[t] = _mm512_fmadd_ps(v, _mm512_set1_ps(k->d[t / 2][b]), f[t]);
    }
}

/* f[2t], f[2t + 1]: 32 rows and token t, over the blocks of the chunk. */
INLINE void kernel(const panel *p, const tokens *k, q8_kind kind, int n_tok, __m512 *f)
{
    const uint8_t *code = p->code;
    const float *pair = p->pair;
    const int8_t *x = k->q;
    size_t gap = k->q_gap;
    for (int t = 0; t < 2 * n_tok; t++) f[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < k->n_block; b++, code += BLOCK_CODES, pair += BLOCK_PAIRS, x += 32) {
        __m512i s[2 * TOK];
        if (kind == Q8_HALF) {
            const int32_t *start = p->start + b * BLOCK_PAIRS;
            for (int t = 0; t < 2 * n_tok; t++) s[t] = _mm512_load_si512(start + (t & 1) * 16);
            quads_4(code, x, gap, n_tok, true, s);
            add_scaled(k, b, pair, kind, n_tok, s, f);
            for (int t = 0; t < 2 * n_tok; t++) s[t] = _mm512_load_si512(start + PANEL_ROWS + (t & 1) * 16);
            quads_4(code + 512, x + 16, gap, n_tok, true, s);
            add_scaled(k, b, pair + PANEL_ROWS, kind, n_tok, s, f);
            continue;
        }
        for (int t = 0; t < 2 * n_tok; t++)
            s[t] = _mm512_set1_epi32(kind == Q8_SYM ? k->start[t / 2][b] : START);
        quads_4(code, x, gap, n_tok, false, s);
        quads_4(code + 512, x + 16, gap, n_tok, false, s);
        add_scaled(k, b, pair, kind, n_tok, s, f);
    }
}

/* Where a product goes, and whether y holds the sums of earlier chunks. */
typedef struct place {
    const kvf_mm_part *p;
    int64_t row, tok;
    bool first;
} place;

INLINE void to_y(const place *at, int n_tok, const __m512 *f)
{
    const kvf_mm_part *p = at->p;
    for (int j = 0; j < 2; j++) {
        int64_t r = at->row + 16 * j, n = p->row1 - r;
        if (n <= 0) return;
        __mmask16 m = (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1u);
        __m512 bias = p->bias && at->first ? _mm512_maskz_loadu_ps(m, p->bias + r) : _mm512_setzero_ps();
        for (int t = 0; t < n_tok; t++) {
            float *y = p->y + (at->tok + t) * p->y_stride + r;
            __m512 v = _mm512_add_ps(f[2 * t + j], bias);
            if (p->accumulate || !at->first) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(m, y));
            _mm512_mask_storeu_ps(y, m, v);
        }
    }
}

INLINE void product(const place *at, const panel *w, const tokens *k, int n_tok)
{
    __m512 f[2 * TOK];
    q8_kind kind = q8_kind_of(at->p->w->type);
    for (int t = 0; t < n_tok; t++) { /* y is in no cache on the first chunk, and stores wait for it */
        const float *y = at->p->y + (at->tok + t) * at->p->y_stride + at->row;
        __builtin_prefetch(y, 1, 3);
        __builtin_prefetch(y + 16, 1, 3);
    }
    if (kind == Q8_SYM)
        kernel(w, k, Q8_SYM, n_tok, f);
    else if (kind == Q8_MIN)
        kernel(w, k, Q8_MIN, n_tok, f);
    else
        kernel(w, k, Q8_HALF, n_tok, f);
    to_y(at, n_tok, f);
}

static void product_6(const place *at, const panel *w, const tokens *k) { product(at, w, k, 6); }
static void product_2(const place *at, const panel *w, const tokens *k) { product(at, w, k, 2); }
static void product_1(const place *at, const panel *w, const tokens *k) { product(at, w, k, 1); }

/* ---- Run ------------------------------------------------------------------------------ */

/* One call: the packed rows of its tokens lie q_gap bytes apart, as do their parts. */
typedef struct job {
    const kvf_mm_part *p;
    panel *w;
    kvf_q8_row x; /* of token 0 */
    size_t q_gap;
    q8_kind kind;
    __m512i off; /* -offset of the type */
} job;

/* Blocks block .. block + CHUNK of n_tok tokens. Arrays of d and sum are padded to 16 elements in x. */
static void tokens_take(const job *j, int64_t tok, int n_tok, int64_t block, tokens *k)
{
    size_t at = (size_t)tok * j->q_gap;
    const int8_t *q = j->x.q + at + 32 * block;
    const float *d = j->x.d + at / 4 + block;
    const int32_t *sums = j->x.sum + at / 4 + block;
    k->q = q;
    k->q_gap = j->q_gap;
    for (int t = 0; t < n_tok; t++, q += j->q_gap, d += j->q_gap / 4, sums += j->q_gap / 4) {
        for (int64_t b = 0; b < k->n_block; b += 16) {
            __m512i sum = _mm512_load_si512(sums + b), shift = _mm512_mullo_epi32(sum, j->off);
            _mm512_store_ps(k->d[t] + b, _mm512_load_ps(d + b));
            _mm512_store_si512(k->start[t] + b, _mm512_add_epi32(shift, _mm512_set1_epi32(START)));
            _mm512_store_ps(k->sum[t] + b, _mm512_cvtepi32_ps(sum));
        }
        if (j->kind != Q8_HALF) continue;
        for (int64_t i = 0; i < 32 * k->n_block; i += 64)
            _mm512_store_si512(k->shifted[t] + i,
                               _mm512_xor_si512(_mm512_load_si512(q + i), _mm512_set1_epi8((char)0x80)));
    }
    if (j->kind != Q8_HALF) return;
    k->q = (const int8_t *)k->shifted[0];
    k->q_gap = sizeof k->shifted[0];
}

/* Unpacked panels of rows row .. with all tokens: six tokens at a time meet every panel. */
static void run_panels(const job *j, int64_t row, int64_t end, int64_t block, int64_t n_block)
{
    tokens k;
    k.n_block = n_block;
    for (int64_t tok = 0; tok < j->p->n_tok;) {
        int64_t left = j->p->n_tok - tok;
        int step = left >= 6 ? 6 : left >= 2 ? 2 : 1;
        tokens_take(j, tok, step, block, &k);
        const panel *w = j->w;
        for (int64_t r = row; r < end; r += PANEL_ROWS, w++) {
            place at = { j->p, r, tok, block == 0 };
            if (step == 6)
                product_6(&at, w, &k);
            else if (step == 2)
                product_2(&at, w, &k);
            else
                product_1(&at, w, &k);
        }
        tok += step;
    }
}

static size_t scratch_bytes(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type, (void)n_tok, (void)n_in;
    return GROUP_ROWS / PANEL_ROWS * sizeof(panel);
}

static void run(const kvf_mm_part *p)
{
    int64_t n_block = p->w->n_in / 32;
    kvf_dtype type = p->w->type;
    job j = { p,
              p->scratch,
              kvf_q8_row_at(p->x, 0, p->w->n_in),
              kvf_q8_row_bytes(p->w->n_in),
              q8_kind_of(type),
              _mm512_set1_epi32(-q8_offset(type)) };
    for (int64_t group = p->row0; group < p->row1; group += GROUP_ROWS) {
        int64_t end = at_most(group + GROUP_ROWS, p->row1);
        for (int64_t b = 0; b < n_block; b += CHUNK) {
            int64_t n = at_most(CHUNK, n_block - b);
            panel *w = j.w;
            for (int64_t row = group; row < end; row += PANEL_ROWS) panel_unpack(p, w++, row, b, n);
            run_panels(&j, group, end, b, n);
        }
    }
}

const kvf_mm_kernel kvf_mm_avx512_q8 = { .name = "avx512_vnni",
                                         .x_form = KVF_X_Q8,
                                         .row_align = PANEL_ROWS,
                                         .x_bytes = kvf_q8_x_bytes,
                                         .pack_align = 1,
                                         .pack = kvf_q8_pack_avx512,
                                         .scratch_bytes = scratch_bytes,
                                         .run = run };
