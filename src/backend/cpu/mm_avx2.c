/* mm_avx2.c - prefill product with AVX2: int8 activations, weights as bytes.
 *
 * Weights are unpacked in tiles of 32 rows and up to 512 k, four k of 8 rows to a register, a stack of tiles
 * at a time, which stays in L2. Groups of tokens pass it, each group a tile at a time: both are in L1 then.
 * So neither tokens nor tiles are read from farther away than the product takes, and sums of a longer row go
 * on in y. One token at a time: its 16-bit, 32-bit and float sums of 32 rows, and no more, fit 16 registers.
 *
 * vpmaddubsw multiplies an unsigned byte, the activation raised by 128, by a signed one, the weight, which so
 * may come from memory, adds two products in 16 bits and saturates; how many of them may be added before
 * widening depends on the type:
 *
 *     4-bit codes, -8..7        8 * 255 * 2 * 8 = 32640    a whole block
 *     5-bit codes, -16..15     16 * 255 * 2 * 4 = 32640    half a block
 *     Q6_K,        -32..31     32 * 255 * 2 * 2 = 32640    half of what has one scale
 *     Q8_0, |w|     0..128    128 * 127 * 2 * 1 = 32512    one
 *
 * What the raising adds comes off as 128 times the sum of the weights. Codes of types with a minimum are made
 * signed too, and what that takes away comes back as 8 or 16 times the sum of the activations. All this is in
 * integers. Q8_0 is not raised but multiplied as |w| with the activation under w's sign; widened to 16 bits
 * for vpmaddwd it takes as long.
 *
 *     tile       [n_block][8 quads][4][8 rows][4 k] bytes, [n_block][2][32 rows] f32 pairs
 *                (mm_unpack_q8.h), [n_block][2][32 rows] i32: -128 times the weights of a block or half
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/mm_q8.h"
#include "backend/cpu/mm_unpack_q8.h"
#include "base/unroll.h"

enum {
    VECS = 4, /* of 8 rows */
    TILE_ROWS = 8 * VECS,
    TILE_BLOCKS = 16,            /* 512 k: 24 KiB */
    STACK = 4,                   /* tiles: 96 KiB, of an L2 of 256 or more */
    GROUP = 8,                   /* tokens: 5 KiB */
    QUAD = 4 * TILE_ROWS,        /* bytes */
    BLOCK_CODES = 8 * QUAD,      /* bytes of a block of the tile */
    BLOCK_PAIRS = 2 * TILE_ROWS, /* floats */
    STEP = 8                     /* blocks unpacked at a time: 256 weights of a row */
};

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Unpacking ------------------------------------------------------------------------ */

typedef struct tile {
    _Alignas(64) uint8_t code[TILE_BLOCKS * BLOCK_CODES];
    float pair[TILE_BLOCKS * BLOCK_PAIRS];
    int32_t less[TILE_BLOCKS * BLOCK_PAIRS];
} tile;

static void put(void *at, __m256i v) { _mm256_store_si256(at, v); }

/* One block of 8 rows of codes, 256 bytes apart, less `off`: quad q to out + QUAD * q. */
static void interleave(const uint8_t *rows, int off, uint8_t *out)
{
    for (int c = 0; c < 2; c++, out += 4 * QUAD) { /* lanes: rows 0..3 and 4..7, four quads each */
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
            __m256i q = _mm256_sub_epi8(_mm256_castps_si256(v[i]), _mm256_set1_epi8((char)off));
            put(out + QUAD * i, q);
        }
    }
}

/* -128 times the codes of four quads of 8 rows. */
static __m256i less_of(const uint8_t *code)
{
    const __m256i bytes = _mm256_set1_epi8(1);
    __m256i sum = _mm256_setzero_si256();
    for (int q = 0; q < 4; q++) {
        __m256i w = _mm256_load_si256((const __m256i *)(const void *)(code + QUAD * q));
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(bytes, w));
    }
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(-128));
}

/* What takes back that x is 128 too large: of 8 rows and a block, or each half of it. */
static void put_less(q8_kind kind, const uint8_t *code, int32_t *less)
{
    __m256i first = less_of(code), second = less_of(code + 4 * QUAD);
    put(less, kind == Q8_HALF ? first : _mm256_add_epi32(first, second));
    if (kind == Q8_HALF) put(less + TILE_ROWS, second);
}

/* What is taken off the codes of mm_unpack_q8.h, so that they are signed; Q6_K's are. */
static int middle(kvf_dtype type)
{
    switch (type) {
    case KVF_DTYPE_Q4_1:
    case KVF_DTYPE_Q4_K: return 8;
    case KVF_DTYPE_Q5_1:
    case KVF_DTYPE_Q5_K: return 16;
    default: return q8_offset(type);
    }
}

/* n <= STEP blocks from `block` on, to place `at` of the tile. Rows past the end have scale zero. */
static void tile_step(const kvf_mm_part *part, tile *w, int64_t row, int64_t block, int64_t at, int64_t n)
{
    const kvf_weight *from = part->w;
    _Alignas(64) uint8_t rows[8 * 256];
    q8_kind kind = q8_kind_of(from->type);
    int off = middle(from->type);
    for (int64_t v = 0; v < VECS; v++) {
        for (int64_t i = 0; i < 8; i++) {
            int64_t r = row + 8 * v + i;
            q8_row_out o = { rows + 256 * i, w->pair + at * BLOCK_PAIRS + 8 * v + i, TILE_ROWS, BLOCK_PAIRS };
            if (r < part->row1) {
                q8_unpack(from->type, (const uint8_t *)from->data + (size_t)r * from->row_bytes, block, n,
                          &o);
                continue;
            }
            memset(o.code, 0, 256);
            for (int64_t b = 0; b < n; b++) q8_put_pair(&o, b, 0, 0);
        }
        for (int64_t b = 0; b < n; b++) {
            uint8_t *code = w->code + (at + b) * BLOCK_CODES + 32 * v;
            interleave(rows + 32 * b, off, code);
            put_less(kind, code, w->less + (at + b) * BLOCK_PAIRS + 8 * v);
        }
    }
}

/* ---- Tokens --------------------------------------------------------------------------- */

/* A group of tokens, of the k of a tile: quants raised by 128 (not for Q8_0), scales, sums of quants, and
 * these times what the weights were lowered by. */
typedef struct tokens {
    _Alignas(64) uint8_t q[GROUP][TILE_BLOCKS * 32];
    float d[GROUP][TILE_BLOCKS], sum[GROUP][TILE_BLOCKS];
    int32_t lowered[GROUP][TILE_BLOCKS];
} tokens;

/* A token's three arrays are padded to 64 bytes, so whole vectors may be read. */
static void token_at(tokens *k, int i, const kvf_q8_row *x, kvf_dtype type, int64_t n)
{
    __m256i raise = _mm256_set1_epi8(type == KVF_DTYPE_Q8_0 ? 0 : (char)0x80);
    for (int64_t b = 0; b < n; b++)
        put(k->q[i] + 32 * b, _mm256_xor_si256(q8_load32((const uint8_t *)x->q + 32 * b), raise));
    for (int64_t b = 0; b < n; b += 8) {
        _mm256_store_ps(k->d[i] + b, _mm256_loadu_ps(x->d + b));
        __m256i sum = q8_load32((const uint8_t *)(x->sum + b));
        _mm256_store_ps(k->sum[i] + b, _mm256_cvtepi32_ps(sum));
        put(k->lowered[i] + b, _mm256_mullo_epi32(sum, _mm256_set1_epi32(middle(type))));
    }
}

static void tokens_at(tokens *k, const kvf_mm_part *p, int64_t tok, int64_t n_tok, int64_t block, int64_t n)
{
    for (int i = 0; i < n_tok; i++) {
        kvf_q8_row x = kvf_q8_row_at(p->x, tok + i, p->w->n_in);
        x.q += 32 * block, x.d += block, x.sum += block;
        token_at(k, i, &x, p->w->type, n);
    }
}

/* ---- Product -------------------------------------------------------------------------- */

#define INLINE static inline __attribute__((always_inline))

/* What differs between types in the product. */
typedef struct form {
    q8_kind kind;
    int quads;    /* added in 16 bits */
    bool by_sign; /* Q8_0 */
} form;

INLINE __m256i four(const uint8_t *q)
{
    int v;
    memcpy(&v, q, sizeof v);
    return _mm256_set1_epi32(v);
}

/* A sum is complete here. Compilers otherwise put additions off, more than there are registers. */
#define DONE(v) __asm__ volatile("" : "+x"(v))

/* h = products of quads q0..q1 of a block, of all rows, in pairs. */
INLINE void dots(const uint8_t *code, const uint8_t *x, int q0, int q1, bool by_sign, __m256i *h)
{
    KVF_UNROLL
    for (int q = q0; q < q1; q++) {
        __m256i v = four(x + 4 * q);
        const __m256i *w = (const __m256i *)(const void *)(code + QUAD * q);
        KVF_UNROLL
        for (int r = 0; r < VECS; r++) {
            __m256i two = by_sign ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[r]), _mm256_sign_epi8(v, w[r]))
                                  : _mm256_maddubs_epi16(v, w[r]);
            h[r] = q == q0 ? two : _mm256_add_epi16(h[r], two);
            DONE(h[r]);
        }
    }
}

/* s = products of quads q0..q1 in 32 bits. */
INLINE void sums(const uint8_t *code, const uint8_t *x, int q0, int q1, form m, __m256i *s)
{
    KVF_UNROLL
    for (int q = q0; q < q1; q += m.quads) {
        __m256i h[VECS];
        dots(code, x, q, q + m.quads, m.by_sign, h);
        KVF_UNROLL
        for (int r = 0; r < VECS; r++) {
            __m256i four_k = _mm256_madd_epi16(h[r], _mm256_set1_epi16(1));
            s[r] = q == q0 ? four_k : _mm256_add_epi32(s[r], four_k);
            DONE(s[r]);
        }
    }
}

/* f = the tile's rows times token t of the group. */
INLINE void kernel(const tile *w, const tokens *k, int t, int64_t n_block, form m, __m256 *f)
{
    const uint8_t *code = w->code;
    const float *pair = w->pair;
    const int32_t *less = w->less;
    const uint8_t *x = k->q[t];
    KVF_UNROLL
    for (int r = 0; r < VECS; r++) f[r] = _mm256_setzero_ps();
    int n_half = m.kind == Q8_HALF ? 2 : 1, span = 8 / n_half;
    for (int64_t b = 0; b < n_block; b++, code += BLOCK_CODES, x += 32) {
        KVF_UNROLL
        for (int half = 0; half < n_half; half++) {
            __m256i s[VECS];
            sums(code, x, half * span, (half + 1) * span, m, s);
            __m256 d = _mm256_set1_ps(k->d[t][b]);
            KVF_UNROLL
            for (int r = 0; r < VECS; r++) {
                int at = half * TILE_ROWS + 8 * r;
                const __m256i *raised = (const __m256i *)(const void *)(less + at);
                if (!m.by_sign) s[r] = _mm256_add_epi32(s[r], *raised);
                if (m.kind == Q8_MIN) s[r] = _mm256_add_epi32(s[r], _mm256_set1_epi32(k->lowered[t][b]));
                __m256 v = _mm256_mul_ps(_mm256_cvtepi32_ps(s[r]), _mm256_load_ps(pair + at));
                if (m.kind == Q8_MIN)
                    v = _mm256_fnmadd_ps(_mm256_load_ps(pair + at + TILE_ROWS), _mm256_set1_ps(k->sum[t][b]),
                                         v);
                f[r] = _mm256_fmadd_ps(v, d, f[r]);
            }
        }
        pair += BLOCK_PAIRS;
        less += BLOCK_PAIRS;
    }
}

/* Sums of a tile and a token to y; `first` is the row's first tile, which brings the bias. */
static void to_y_whole(const kvf_mm_part *p, int64_t row, float *y, bool first, const __m256 *f)
{
    for (int j = 0; j < VECS; j++) {
        __m256 v = first && p->bias ? _mm256_add_ps(f[j], _mm256_loadu_ps(p->bias + row + 8 * j)) : f[j];
        if (p->accumulate || !first) v = _mm256_add_ps(v, _mm256_loadu_ps(y + 8 * j));
        _mm256_storeu_ps(y + 8 * j, v);
    }
}

static void to_y(const kvf_mm_part *p, int64_t row, int64_t tok, bool first, const __m256 *f)
{
    float *y = p->y + tok * p->y_stride + row;
    if (row + TILE_ROWS <= p->row1) {
        to_y_whole(p, row, y, first, f);
        return;
    }
    const float *v = (const float *)(const void *)f;
    for (int64_t i = 0; i < p->row1 - row; i++) {
        float sum = first && p->bias ? v[i] + p->bias[row + i] : v[i];
        y[i] = p->accumulate || !first ? y[i] + sum : sum;
    }
}

/* One kernel per form: the constants unroll it. */
INLINE void product(kvf_dtype type, const tile *w, const tokens *k, int t, int64_t n_block, __m256 *f)
{
    switch (type) {
    case KVF_DTYPE_Q4_0: kernel(w, k, t, n_block, (form){ Q8_SYM, 8, false }, f); break;
    case KVF_DTYPE_Q5_0: kernel(w, k, t, n_block, (form){ Q8_SYM, 4, false }, f); break;
    case KVF_DTYPE_Q8_0: kernel(w, k, t, n_block, (form){ Q8_SYM, 1, true }, f); break;
    case KVF_DTYPE_Q6_K: kernel(w, k, t, n_block, (form){ Q8_HALF, 2, false }, f); break;
    case KVF_DTYPE_Q4_1:
    case KVF_DTYPE_Q4_K: kernel(w, k, t, n_block, (form){ Q8_MIN, 8, false }, f); break;
    default: kernel(w, k, t, n_block, (form){ Q8_MIN, 4, false }, f); break; /* Q5_1, Q5_K */
    }
}

/* ---- Run ------------------------------------------------------------------------------ */

typedef struct scratch {
    tile tiles[STACK];
    tokens k;
} scratch;

static size_t scratch_bytes(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type, (void)n_tok, (void)n_in;
    return sizeof(scratch);
}

static void run(const kvf_mm_part *p)
{
    int64_t n_block = p->w->n_in / 32;
    scratch *m = p->scratch;
    for (int64_t row = p->row0; row < p->row1; row += STACK * TILE_ROWS) {
        int64_t n_tile = at_most(STACK, (p->row1 - row + TILE_ROWS - 1) / TILE_ROWS);
        for (int64_t block = 0; block < n_block; block += TILE_BLOCKS) {
            int64_t n = at_most(TILE_BLOCKS, n_block - block);
            for (int64_t i = 0; i < n_tile; i++)
                for (int64_t b = 0; b < n; b += STEP)
                    tile_step(p, &m->tiles[i], row + i * TILE_ROWS, block + b, b, at_most(STEP, n - b));
            for (int64_t tok = 0; tok < p->n_tok; tok += GROUP) {
                int64_t n_tok = at_most(GROUP, p->n_tok - tok);
                tokens_at(&m->k, p, tok, n_tok, block, n);
                for (int64_t i = 0; i < n_tile; i++) {
                    for (int t = 0; t < n_tok; t++) {
                        __m256 f[VECS];
                        product(p->w->type, &m->tiles[i], &m->k, t, n, f);
                        to_y(p, row + i * TILE_ROWS, tok + t, block == 0, f);
                    }
                }
            }
        }
    }
}

const kvf_mm_kernel kvf_mm_avx2_q8 = { .name = "avx2_int8",
                                       .x_form = KVF_X_Q8,
                                       .row_align = TILE_ROWS,
                                       .x_bytes = kvf_q8_x_bytes,
                                       .pack_align = 1,
                                       .pack = kvf_q8_pack_avx2,
                                       .scratch_bytes = scratch_bytes,
                                       .run = run };
