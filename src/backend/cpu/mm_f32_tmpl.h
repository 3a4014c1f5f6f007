/* mm_f32_tmpl.h - the f32 products, once for AVX2 and AVX-512: exact mode and float weights.
 *
 * A panel of weight rows, KBLOCK columns at a time, is unpacked to f32 in scratch; every token
 * meets it in tiles of TILE_ROW x TILE_TOK dot products along k. Prefill takes a panel that stays
 * in L2 over all tokens; decode takes one tile of rows, which stays in L1.
 *
 * The including file defines vec (VN floats), vec_zero, vec_load, vec_load_n (first n < VN
 * floats, rest 0), vec_fma, vec_sum, TILE_TOK and unpack (its kvf_dequant).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/mm_q8.h"

#define TILE_ROW 4
#define KBLOCK 1024   /* a multiple of every block size; 4 KB of x per token stay in L1 */
#define PANEL_ROWS 32 /* 128 KB of unpacked weights: half of the smallest L2 */

/* Columns k0 .. k0 + n of a few rows, as f32, and what to do with the sums. */
typedef struct panel {
    const kvf_mm_part *p;
    int64_t row, step, n_row; /* rows row, row + step, ...: n_row of them */
    int64_t k0, n;
    const float *w; /* row r at w + r * stride */
    int64_t stride;
} panel;

static void put(const panel *a, int64_t t, int64_t r, float v)
{
    const kvf_mm_part *p = a->p;
    int64_t row = a->row + r * a->step;
    float *y = &p->y[t * p->y_stride + row];
    if (a->k0 == 0 && p->bias) v += p->bias[row];
    *y = a->k0 > 0 || p->accumulate ? *y + v : v;
}

/* Tokens t .. t + n_tok with four rows of the panel; rows past its end repeat the last. */
KVF_TILE void tile(const panel *a, int64_t r0, int64_t t0, int n_tok)
{
    const float *w[TILE_ROW], *x[TILE_TOK];
    vec sum[TILE_ROW][TILE_TOK];
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROW; r++) {
        w[r] = a->w + (r0 + r < a->n_row ? r0 + r : a->n_row - 1) * a->stride;
#pragma GCC unroll 6
        for (int t = 0; t < n_tok; t++) sum[r][t] = vec_zero();
    }
    for (int t = 0; t < n_tok; t++) x[t] = (const float *)a->p->x + (t0 + t) * a->p->w->n_in + a->k0;
    int64_t k = 0;
    for (; k + VN <= a->n; k += VN) {
        vec wv[TILE_ROW];
#pragma GCC unroll 4
        for (int r = 0; r < TILE_ROW; r++) wv[r] = vec_load(w[r] + k);
#pragma GCC unroll 6
        for (int t = 0; t < n_tok; t++) {
            vec xv = vec_load(x[t] + k);
#pragma GCC unroll 4
            for (int r = 0; r < TILE_ROW; r++) sum[r][t] = vec_fma(wv[r], xv, sum[r][t]);
        }
    }
    int rest = (int)(a->n - k);
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROW; r++) {
#pragma GCC unroll 6
        for (int t = 0; t < n_tok; t++) {
            if (rest) sum[r][t] = vec_fma(vec_load_n(w[r] + k, rest), vec_load_n(x[t] + k, rest), sum[r][t]);
            if (r0 + r < a->n_row) put(a, t0 + t, r0 + r, vec_sum(sum[r][t]));
        }
    }
}

static void multiply(const panel *a)
{
    int64_t n_tok = a->p->n_tok, t = 0;
    for (; t + TILE_TOK <= n_tok; t += TILE_TOK)
        for (int64_t r = 0; r < a->n_row; r += TILE_ROW) tile(a, r, t, TILE_TOK);
    for (; t + 2 <= n_tok; t += 2)
        for (int64_t r = 0; r < a->n_row; r += TILE_ROW) tile(a, r, t, 2);
    for (; t < n_tok; t++)
        for (int64_t r = 0; r < a->n_row; r += TILE_ROW) tile(a, r, t, 1);
}

/* All columns of a->n_row rows. Decode waits for memory, so it asks for the next columns before it
 * unpacks these. */
static void run_panel(panel *a, bool prefetch)
{
    const kvf_weight *w = a->p->w;
    size_t step = (size_t)a->step * w->row_bytes;
    for (a->k0 = 0; a->k0 < w->n_in; a->k0 += KBLOCK) {
        a->n = w->n_in - a->k0 < KBLOCK ? w->n_in - a->k0 : KBLOCK;
        const char *src =
            (const char *)w->data + (size_t)a->row * w->row_bytes + kvf_dtype_row_bytes(w->type, a->k0);
        size_t bytes = kvf_dtype_row_bytes(w->type, a->n);
        float *to = a->p->scratch;
        bool in_place = w->type == KVF_DTYPE_F32;
        for (int64_t r = 0; r < a->n_row; r++) {
            const char *row = src + (size_t)r * step;
            if (prefetch)
                for (size_t i = 0; i < bytes; i += 64) _mm_prefetch(row + bytes + i, _MM_HINT_T1);
            if (!in_place) unpack(w->type, row, to + r * KBLOCK, a->n);
        }
        a->w = in_place ? (const float *)(const void *)src : to;
        a->stride = in_place ? (int64_t)(step / sizeof(float)) : KBLOCK;
        multiply(a);
    }
}

static void run_prefill(const kvf_mm_part *p)
{
    for (int64_t row = p->row0; row < p->row1; row += PANEL_ROWS) {
        panel a = { .p = p, .row = row, .step = 1 };
        a.n_row = p->row1 - row < PANEL_ROWS ? p->row1 - row : PANEL_ROWS;
        run_panel(&a, false);
    }
}

/* One row of each quarter of the part at a time: four streams keep more reads in flight. */
static void run_decode(const kvf_mm_part *p)
{
    int64_t step = (p->row1 - p->row0 + TILE_ROW - 1) / TILE_ROW;
    for (int64_t row = p->row0; row < p->row0 + step; row++) {
        panel a = { .p = p, .row = row, .step = step, .n_row = TILE_ROW };
        while (row + (a.n_row - 1) * step >= p->row1) a.n_row--;
        run_panel(&a, true);
    }
}

static size_t prefill_scratch(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type, (void)n_tok, (void)n_in;
    return PANEL_ROWS * KBLOCK * sizeof(float);
}

static size_t decode_scratch(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type, (void)n_tok, (void)n_in;
    return TILE_ROW * KBLOCK * sizeof(float);
}
