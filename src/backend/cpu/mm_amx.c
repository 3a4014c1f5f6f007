/* mm_amx.c - prefill product on AMX tiles: bf16 times bf16, sums in fp32.
 *
 * Weights are the left operand, so an unpacked row is a tile row as it is; activations are the
 * right one and are packed into tiles once per matrix product. A tile product gives 16 outputs x
 * 16 tokens, a block of four of them 32 x 32, which is turned round on its way into y.
 *
 *     packed x   [n_tok / 16][n_in / 32] tiles; row j of a tile: words 2j, 2j + 1 of the line order
 *                (mm_unpack_amx.h) for 16 tokens. Rows and columns past the end are zeros.
 *     panel      [2][LINES] tiles of 32 weight rows
 *
 * Loops, outermost first: GROUP_ROWS rows, GROUP_TOK tokens, a chunk of columns, 32 rows,
 * 32 tokens. The chunk of x and the sums between chunks stay in L2, the panel in L1 if it fits.
 *
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS.
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/mm.h"
#include "backend/cpu/mm_unpack_amx.h"

enum {
    CHUNK = 512,      /* columns: less moves the sums too often, more loses L1 */
    CHUNK_ONE = 1024, /* up to this many columns: one chunk, and no sums to move at all */
    GROUP_ROWS = 256,
    GROUP_TOK = 512, /* sums 512 KiB, x 512 KiB */
    PANEL_ROWS = 32,
    LINES = CHUNK_ONE / 32,            /* tiles of the longest chunk */
    HALF_PANEL = LINES * KVF_AMX_TILE, /* bytes of 16 rows of the panel */
    BLOCK_BYTES = 4 * KVF_AMX_TILE,    /* sums of 32 rows x 32 tokens */
    TOK_PAIRS = GROUP_TOK / 32
};

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Activations ---------------------------------------------------------------------- */

static int64_t x_lines(int64_t n_in) { return (n_in + 31) / 32; }

static size_t x_bytes(int64_t n_tok, int64_t n_in)
{
    return (size_t)((n_tok + 15) / 16) * (size_t)x_lines(n_in) * KVF_AMX_TILE;
}

/* 4 x 4 within each 128-bit lane: v[i] element j becomes v[j] element i. */
static void transpose_lanes(__m512 v[4])
{
    __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
    __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
    v[0] = _mm512_shuffle_ps(a, c, 0x44);
    v[1] = _mm512_shuffle_ps(a, c, 0xee);
    v[2] = _mm512_shuffle_ps(b, d, 0x44);
    v[3] = _mm512_shuffle_ps(b, d, 0xee);
}

/* Column c of rows i, i + 4, i + 8, i + 12 of 16 x 16 floats, four wide each, as one register. */
static __m512 gather_lanes(const float *m, int i, int c)
{
    const float *p = m + 16 * i + 4 * c;
    __m512 v = _mm512_castps128_ps512(_mm_load_ps(p));
    v = _mm512_insertf32x4(v, _mm_load_ps(p + 64), 1);
    v = _mm512_insertf32x4(v, _mm_load_ps(p + 128), 2);
    return _mm512_insertf32x4(v, _mm_load_ps(p + 192), 3);
}

/* Row 4c + j of the transpose of 16 x 16 floats into out[j]. */
static void transpose_quarter(const float *m, int c, __m512 out[4])
{
    for (int i = 0; i < 4; i++) out[i] = gather_lanes(m, i, c);
    transpose_lanes(out);
}

/* 32 values of 16 tokens to one tile: each token's line, then pairs of words transposed. */
static void pack_tile(const float *x, int64_t n_in, int64_t n_tok, uint32_t mask, uint8_t *tile)
{
    _Alignas(64) float line[16 * 16]; /* pairs of bf16, moved as floats */
    for (int64_t t = 0; t < 16; t++) {
        uint32_t m = t < n_tok ? mask : 0;
        const float *src = t < n_tok ? x + t * n_in : x;
        __m512 lo = _mm512_maskz_loadu_ps((__mmask16)m, src);
        __m512 hi = _mm512_maskz_loadu_ps((__mmask16)(m >> 16), src + 16);
        _mm512_store_si512(line + 16 * t, _mm512_permutexvar_epi16(amx_even_odd(), amx_bf16(lo, hi)));
    }
    for (int c = 0; c < 4; c++) {
        __m512 v[4];
        transpose_quarter(line, c, v);
        for (int j = 0; j < 4; j++) _mm512_store_ps(tile + 64 * (4 * c + j), v[j]);
    }
}

static void pack(const float *x, int64_t n_tok, int64_t n_in, int64_t t0, int64_t t1, void *out)
{
    (void)n_tok;
    for (int64_t t = t0; t < t1; t += 16) {
        uint8_t *tile = (uint8_t *)out + (size_t)(t / 16 * x_lines(n_in)) * KVF_AMX_TILE;
        for (int64_t k = 0; k < n_in; k += 32, tile += KVF_AMX_TILE) {
            uint32_t mask = n_in - k >= 32 ? 0xffffffffu : (1u << (n_in - k)) - 1u;
            pack_tile(x + t * n_in + k, n_in, t1 - t, mask, tile);
        }
    }
}

/* ---- Tiles ---------------------------------------------------------------------------- */

/* The intrinsics of gcc 12 do not tell the compiler which memory they read. */
static void memory_is_written(void) { __asm__ volatile("" ::: "memory"); }

/* All eight tiles: 16 rows of 64 bytes. */
static void tiles_open(void)
{
    _Alignas(64) uint8_t config[64] = { 1 };
    for (int i = 0; i < 8; i++) {
        config[16 + 2 * i] = 64;
        config[48 + i] = 16;
    }
    memory_is_written();
    _tile_loadconfig(config);
}

static void sums_zero(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static void sums_load(const uint8_t *c)
{
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + KVF_AMX_TILE, 64);
    _tile_loadd(2, c + 2 * KVF_AMX_TILE, 64);
    _tile_loadd(3, c + 3 * KVF_AMX_TILE, 64);
}

static void sums_store(uint8_t *c)
{
    _tile_stored(0, c, 64);
    _tile_stored(1, c + KVF_AMX_TILE, 64);
    _tile_stored(2, c + 2 * KVF_AMX_TILE, 64);
    _tile_stored(3, c + 3 * KVF_AMX_TILE, 64);
}

/* Sums 0..3 += 32 weight rows x 32 tokens over n tiles. */
static void product_2x2(const uint8_t *a, const uint8_t *x0, const uint8_t *x1, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        size_t at = (size_t)i * KVF_AMX_TILE;
        _tile_loadd(4, a + at, 64);
        _tile_loadd(6, x0 + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, x1 + at, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + HALF_PANEL + at, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* Sums 0 and 2: the same with 16 tokens. */
static void product_2x1(const uint8_t *a, const uint8_t *x0, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        size_t at = (size_t)i * KVF_AMX_TILE;
        _tile_loadd(4, a + at, 64);
        _tile_loadd(6, x0 + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + HALF_PANEL + at, 64);
        _tile_dpbf16ps(2, 5, 6);
    }
}

/* ---- Output --------------------------------------------------------------------------- */

/* One tile of sums, 16 rows from `row` on x at most 16 tokens from `tok` on, into y. */
static void tile_to_y(const kvf_mm_part *p, const float *sum, int64_t row, int64_t tok)
{
    int64_t n_row = p->row1 - row, n_tok = at_most(p->n_tok - tok, 16);
    if (n_row <= 0) return;
    __mmask16 m = (__mmask16)(n_row >= 16 ? 0xffffu : (1u << n_row) - 1u);
    __m512 bias = p->bias ? _mm512_maskz_loadu_ps(m, p->bias + row) : _mm512_setzero_ps();
    float *y = p->y + tok * p->y_stride + row;
    for (int c = 0; 4 * c < n_tok; c++) {
        __m512 v[4];
        transpose_quarter(sum, c, v);
        for (int j = 0; j < 4 && 4 * c + j < n_tok; j++, y += p->y_stride) {
            __m512 r = _mm512_add_ps(v[j], bias);
            if (p->accumulate) r = _mm512_add_ps(r, _mm512_maskz_loadu_ps(m, y));
            _mm512_mask_storeu_ps(y, m, r);
        }
    }
}

static void block_to_y(const kvf_mm_part *p, const float *sum, int64_t row, int64_t tok)
{
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            if (tok + 16 * j >= p->n_tok) continue;
            tile_to_y(p, sum + (2 * i + j) * 256, row + 16 * i, tok + 16 * j);
        }
}

/* Ask for the lines of y that a block will be written to: they are in no cache, and stores wait
 * for them one after the other. */
static void y_prefetch(const kvf_mm_part *p, int64_t row, int64_t tok)
{
    int64_t n_tok = at_most(p->n_tok - tok, 32);
    const float *y = p->y + tok * p->y_stride + row;
    for (int64_t t = 0; t < n_tok; t++, y += p->y_stride) {
        __builtin_prefetch(y, 1, 3);
        __builtin_prefetch(y + 16, 1, 3);
    }
}

/* ---- Product -------------------------------------------------------------------------- */

typedef struct group {
    const kvf_mm_part *p;
    int64_t row0, row1, tok0, tok1;
    uint8_t *panel[2]; /* [2][LINES] tiles: the one in use and the next */
    uint8_t *sums;     /* [row panels][TOK_PAIRS] blocks, between chunks */
} group;

/* 32 rows of a chunk: what a panel holds. */
typedef struct step {
    int64_t row, k0, k1;
} step;

static int64_t chunk(int64_t n_in) { return n_in <= CHUNK_ONE ? CHUNK_ONE : CHUNK; }

static int64_t n_panel(const group *g) { return (g->row1 - g->row0 + PANEL_ROWS - 1) / PANEL_ROWS; }

static step step_at(const group *g, int64_t i)
{
    int64_t size = chunk(g->p->w->n_in), k0 = i / n_panel(g) * size;
    return (step){ g->row0 + i % n_panel(g) * PANEL_ROWS, k0, at_most(k0 + size, g->p->w->n_in) };
}

/* Rows i0..i1 of a panel; those past the end are zeros. */
static void rows_unpack(const group *g, step s, int64_t i0, int64_t i1, uint8_t *panel)
{
    const kvf_weight *w = g->p->w;
    for (int64_t i = i0; i < i1; i++) {
        uint8_t *line = panel + i / 16 * HALF_PANEL + i % 16 * 64;
        if (s.row + i < g->row1) {
            amx_unpack(w->type, (const uint8_t *)w->data + (size_t)(s.row + i) * w->row_bytes, s.k0, s.k1,
                       line);
        } else {
            for (int64_t l = 0; l < LINES; l++)
                _mm512_store_si512(line + l * KVF_AMX_TILE, _mm512_setzero_si512());
        }
    }
}

/* The panel with all tokens of the group. Tile products queue up and run by themselves for
 * hundreds of cycles, so after those of a block are issued, and before its sums are waited for,
 * the core unpacks a few rows of the next panel and writes the block before this one to y. */
static void panel_product(const group *g, step s, const uint8_t *panel, const step *next, uint8_t *next_panel)
{
    const kvf_mm_part *p = g->p;
    int64_t lines = x_lines(p->w->n_in), n = (s.k1 - s.k0 + 31) / 32, rows_done = 0;
    int64_t n_block = (g->tok1 - g->tok0 + 31) / 32, rows_each = (PANEL_ROWS + n_block - 1) / n_block;
    bool first = s.k0 == 0, last = s.k1 == p->w->n_in;
    _Alignas(64) uint8_t done[2][BLOCK_BYTES];
    uint8_t *sums = g->sums + (s.row - g->row0) / PANEL_ROWS * TOK_PAIRS * BLOCK_BYTES;
    memory_is_written();
    for (int64_t i = 0; i < n_block; i++, sums += BLOCK_BYTES) {
        int64_t tok = g->tok0 + 32 * i;
        const uint8_t *x0 = (const uint8_t *)p->x + (size_t)(tok / 16 * lines + s.k0 / 32) * KVF_AMX_TILE;
        if (first)
            sums_zero();
        else
            sums_load(sums);
        if (last) y_prefetch(p, s.row, tok);
        if (g->tok1 - tok > 16)
            product_2x2(panel, x0, x0 + lines * KVF_AMX_TILE, n);
        else
            product_2x1(panel, x0, n);
        int64_t rows_end = at_most(rows_done + rows_each, PANEL_ROWS);
        if (next) rows_unpack(g, *next, rows_done, rows_end, next_panel);
        rows_done = rows_end;
        if (last && i > 0) block_to_y(p, (const float *)(const void *)done[(i - 1) & 1], s.row, tok - 32);
        sums_store(last ? done[i & 1] : sums);
    }
    if (last)
        block_to_y(p, (const float *)(const void *)done[(n_block - 1) & 1], s.row,
                   g->tok0 + 32 * (n_block - 1));
}

static void run_group(const group *g)
{
    int64_t size = chunk(g->p->w->n_in), n = (g->p->w->n_in + size - 1) / size * n_panel(g);
    rows_unpack(g, step_at(g, 0), 0, PANEL_ROWS, g->panel[0]);
    for (int64_t i = 0; i < n; i++) {
        step next = step_at(g, i + 1);
        panel_product(g, step_at(g, i), g->panel[i & 1], i + 1 < n ? &next : NULL, g->panel[(i + 1) & 1]);
    }
}

static size_t scratch_bytes(kvf_dtype type, int64_t n_tok, int64_t n_in)
{
    (void)type, (void)n_tok;
    size_t sums = n_in > CHUNK_ONE ? (size_t)(GROUP_ROWS / PANEL_ROWS * TOK_PAIRS) * BLOCK_BYTES : 0;
    return 4 * (size_t)HALF_PANEL + sums;
}

static void run(const kvf_mm_part *p)
{
    uint8_t *mem = p->scratch;
    group g = { .p = p, .panel = { mem, mem + 2 * HALF_PANEL }, .sums = mem + 4 * HALF_PANEL };
    tiles_open();
    for (g.row0 = p->row0; g.row0 < p->row1; g.row0 += GROUP_ROWS) {
        g.row1 = at_most(g.row0 + GROUP_ROWS, p->row1);
        for (g.tok0 = 0; g.tok0 < p->n_tok; g.tok0 += GROUP_TOK) {
            g.tok1 = at_most(g.tok0 + GROUP_TOK, p->n_tok);
            run_group(&g);
        }
    }
    _tile_release();
}

const kvf_mm_kernel kvf_mm_amx_bf16 = { .name = "amx_bf16",
                                        .x_form = KVF_X_BF16_TILES,
                                        .row_align = PANEL_ROWS,
                                        .x_bytes = x_bytes,
                                        .pack_align = 16,
                                        .pack = pack,
                                        .scratch_bytes = scratch_bytes,
                                        .run = run };
