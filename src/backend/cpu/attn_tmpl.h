/* attn_tmpl.h - prefill attention, once for every vector width: attn_avx2.c, attn_avx512.c and
 * attn_avx512_bf16.c include their simd_*.h, set TILE_M, then include this file. attn_ref.c defines the op.
 *
 * Flash attention, transposed: all query rows of the part (tokens x heads of the group) lie along
 * the lanes. For every block of keys
 *     S^T [key][row]  = K Q^T        K as it lies in the slot, broadcast element by element
 *     P^T             = 2^(S^T - m)  attn_lanes.h: no reduction across lanes
 *     O^T [dim][row] += V^T P^T      V packed in strips of 8 dims, broadcast likewise
 * so keys and values are only widened to f32, once per part, never transposed. A chunk of rows
 * (TILE_N vectors) keeps its Q^T and P^T in L1; both products are the same register tile of
 * TILE_M x TILE_N vectors, in whole tiles of keys. Blocks that no row of a chunk sees are skipped, masks
 * are applied only where rows differ or a tile has keys that are none.
 *
 * After the online softmax of Milakov and Gimelshein 2018 and FlashAttention (Dao et al. 2022).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/attn_lanes.h"

#define TILE_N 3                  /* lane vectors of a chunk */
#define CHUNK (TILE_N * VF_LANES) /* rows of a whole chunk */
#define STRIP 8                   /* dims of a strip of packed values, keys of a strip of S */

/* How P V is computed: attn_avx512_bf16.c has its own. A float of the packed V, and of P^T, stands for V_PER
 * keys. */
#ifndef V_PER
#define V_PER 1

/* STRIP dims of V_PER keys, whose values begin at x and end at y. */
static inline void v_pack(float *out, const kvf_f16 *x, const kvf_f16 *y)
{
    (void)y;
    vf_widen8(out, x);
}

static inline vf v_step(vf v, vf p, vf sum) { return vf_fma(v, p, sum); }

KVF_INLINE void v_softmax(lanes *w, float *s, int64_t stride, int k0, int k1, bool masked, vf top)
{
    softmax_body(w, s, stride, k0, k1, 1, masked, top);
}
#endif

/* Floats of a strip of values, and a line: strips 4 KB apart would meet in the same sets of L1 when they are
 * packed (head_dim 256 in f32 then takes 1.6 times as long). */
#define STRIP_SIZE (KVF_BLOCK / V_PER * STRIP + 16)

/* Scratch of one part. Chunk c of rows: q and o at c * CHUNK * head_dim, [head_dim][width of the
 * chunk]; its lane vectors at w + c * TILE_N. */
typedef struct prefill {
    const kvf_attn_part *p;
    int64_t n_row;
    float *k; /* [KVF_BLOCK][head_dim] */
    float *v; /* [head_dim / STRIP][STRIP_SIZE], of which [KVF_BLOCK / V_PER][STRIP] */
    float *s; /* [KVF_BLOCK][CHUNK] */
    float *q, *o;
    lanes *w;
} prefill;

/* c [TILE_M][nv * VF_LANES] = alpha c + sum_k a(i, k) b[k][..], a(i, k) = a[i * a_row + k * a_col], of V and
 * P; else without alpha c, of K and Q, raising top. Everything stays in registers: TILE_M * nv sums. */
KVF_INLINE void tile(int nv, bool pv, const float *a, int64_t a_row, int64_t a_col, const float *b, float *c,
                     int64_t n_k, lanes *w)
{
    vf sum[TILE_M][TILE_N];
    int64_t width = nv * VF_LANES;
    KVF_UNROLL
    for (int i = 0; i < TILE_M; i++) {
        KVF_UNROLL
        for (int j = 0; j < nv; j++)
            sum[i][j] = pv ? vf_mul(vf_load(c + i * width + j * VF_LANES), vf_load(w[j].alpha)) : vf_zero();
    }
    for (int64_t k = 0; k < n_k; k++) {
        vf x[TILE_N];
        KVF_UNROLL
        for (int j = 0; j < nv; j++) x[j] = vf_load(b + k * width + j * VF_LANES);
        KVF_UNROLL
        for (int i = 0; i < TILE_M; i++) {
            vf y = vf_set1(a[i * a_row + k * a_col]);
            KVF_UNROLL
            for (int j = 0; j < nv; j++)
                sum[i][j] = pv ? v_step(y, x[j], sum[i][j]) : vf_fma(y, x[j], sum[i][j]);
        }
    }
    KVF_UNROLL
    for (int j = 0; j < nv && !pv; j++) {
        vf top = vf_load(w[j].top);
        KVF_UNROLL
        for (int i = 0; i < TILE_M; i++) top = vf_max(top, sum[i][j]);
        vf_store(w[j].top, top);
    }
    KVF_UNROLL
    for (int i = 0; i < TILE_M; i++) {
        KVF_UNROLL
        for (int j = 0; j < nv; j++) vf_store(c + i * width + j * VF_LANES, sum[i][j]);
    }
}

/* P of one lane vector. */
static void softmax_rows(lanes *w, float *s, int64_t stride, int k0, int k1, bool masked, float cap)
{
    if (masked || cap > 0.0f)
        v_softmax(w, s, stride, k0, k1, masked, softmax_top(w, s, stride, k0, k1, 1, masked, cap));
    else
        v_softmax(w, s, stride, k0, k1, false, vf_load(w->top));
}

/* One block of keys for one chunk of nv lane vectors; keys k0..k1, whole tiles, are seen by some row. */
KVF_INLINE void chunk_block(const prefill *f, int nv, int64_t chunk, int k0, int k1, bool masked)
{
    const kvf_attn_args *a = f->p->a;
    int64_t d = a->head_dim, width = nv * VF_LANES;
    const float *q = f->q + chunk * CHUNK * d;
    float *o = f->o + chunk * CHUNK * d;
    lanes *w = f->w + chunk * TILE_N;

    for (int j = 0; j < nv; j++) vf_store(w[j].top, vf_load(w[j].m));
    for (int64_t k = k0; k < k1; k += TILE_M) tile(nv, false, f->k + k * d, d, 1, q, f->s + k * width, d, w);
    for (int j = 0; j < nv; j++) softmax_rows(w + j, f->s + j * VF_LANES, width, k0, k1, masked, a->softcap);
    int64_t p0 = k0 / V_PER, n_p = (k1 - k0) / V_PER;
    for (int64_t i = 0; i < d; i += TILE_M) {
        const float *v = f->v + i / STRIP * STRIP_SIZE + i % STRIP;
        tile(nv, true, v + p0 * STRIP, 1, STRIP, f->s + p0 * width, o + i * width, n_p, w);
    }
}

static int64_t chunk_rows(const prefill *f, int64_t chunk)
{
    int64_t n = f->n_row - chunk * CHUNK;
    return n < CHUNK ? n : CHUNK;
}

static int chunk_vectors(const prefill *f, int64_t chunk)
{
    return (int)((chunk_rows(f, chunk) + VF_LANES - 1) / VF_LANES);
}

static void chunk_step(const prefill *f, int64_t chunk, int64_t base)
{
    int32_t group = kvf_attn_group(f->p->a);
    int64_t row0 = chunk * CHUNK, last = row0 + chunk_rows(f, chunk) - 1;
    int k0, k1, nv = chunk_vectors(f, chunk);
    bool masked = block_keys(f->p, base, f->p->tok0 + row0 / group, f->p->tok0 + last / group, &k0, &k1);
    if (k0 >= k1) return;
    if (k0 % TILE_M || k1 % TILE_M) masked = true; /* a tile has keys that no row sees */
    if (masked) {
        lanes *w = f->w + chunk * TILE_N;
        for (int i = 0; i < nv * VF_LANES; i++)
            lanes_see(w + i / VF_LANES, f->p, base, i % VF_LANES, row0 + i, f->n_row);
    }
    k0 = k0 / TILE_M * TILE_M;
    k1 = (k1 + TILE_M - 1) / TILE_M * TILE_M;
    if (nv == 3)
        chunk_block(f, 3, chunk, k0, k1, masked);
    else if (nv == 2)
        chunk_block(f, 2, chunk, k0, k1, masked);
    else
        chunk_block(f, 1, chunk, k0, k1, masked);
}

/* Convert keys k0..k1 of a block, in whole tiles. Places that hold no key may hold anything: no row reads
 * what comes of their scores, and their values are 0, which the 0 of P leaves 0. */
static void load_block(const prefill *f, int64_t b, int64_t k0, int64_t k1)
{
    static const kvf_f16 none[STRIP];
    int64_t d = f->p->a->head_dim, from = k0 / TILE_M * TILE_M, to = (k1 + TILE_M - 1) / TILE_M * TILE_M;
    const kvf_f16 *k = kvf_attn_k(f->p->a, f->p->head_kv, b), *v = kvf_attn_v(f->p->a, f->p->head_kv, b);
    for (int64_t i = from * d; i < to * d; i += VF_LANES) vf_store(f->k + i, vf_load_f16(k + i));
    for (int64_t j = from; j < to; j += V_PER) {
        int64_t last = j + V_PER - 1;
        bool x = j >= k0 && j < k1, y = last >= k0 && last < k1;
        float *out = f->v + j / V_PER * STRIP;
        for (int64_t i = 0; i < d; i += STRIP)
            v_pack(out + i / STRIP * STRIP_SIZE, x ? v + j * d + i : none, y ? v + last * d + i : none);
    }
}

/* Q^T, scaled; rows that fill up the last vector are 0. */
static void load_queries(const prefill *f, int64_t n_chunk)
{
    int64_t d = f->p->a->head_dim;
    int32_t group = kvf_attn_group(f->p->a);
    float factor = q_factor(f->p->a);
    for (int64_t c = 0; c < n_chunk; c++) {
        int64_t width = chunk_vectors(f, c) * VF_LANES;
        float *dst = f->q + c * CHUNK * d;
        memset(dst, 0, (size_t)(width * d) * sizeof *dst);
        memset(f->o + c * CHUNK * d, 0, (size_t)(width * d) * sizeof *dst);
        for (int64_t i = 0; i < chunk_rows(f, c); i++) {
            int64_t row = c * CHUNK + i;
            const float *q = kvf_attn_q(f->p, f->p->tok0 + row / group, (int32_t)(row % group));
            for (int64_t k = 0; k < d; k++) dst[k * width + i] = q[k] * factor;
        }
        for (int j = 0; j < TILE_N; j++) lanes_reset(f->w + c * TILE_N + j);
    }
}

static void store_rows(const prefill *f, int64_t n_chunk)
{
    int32_t group = kvf_attn_group(f->p->a), d = f->p->a->head_dim;
    for (int64_t c = 0; c < n_chunk; c++) {
        int64_t width = chunk_vectors(f, c) * VF_LANES;
        for (int64_t i = 0; i < chunk_rows(f, c); i++) {
            int64_t row = c * CHUNK + i, tok = f->p->tok0 + row / group;
            int32_t g = (int32_t)(row % group);
            const lanes *w = f->w + c * TILE_N + i / VF_LANES;
            row_finish(kvf_attn_o(f->p, tok, g), f->o + c * CHUNK * d + i, width, d, w->l_used[i % VF_LANES]);
            float *lse = kvf_attn_lse(f->p, tok, g);
            if (lse) *lse = row_lse(w->m[i % VF_LANES], w->l[i % VF_LANES]);
        }
    }
}

static void attn_prefill(const kvf_attn_part *p)
{
    int64_t d = p->a->head_dim, n_row = (p->tok1 - p->tok0) * kvf_attn_group(p->a);
    int64_t n_chunk = (n_row + CHUNK - 1) / CHUNK;
    prefill f = { .p = p, .n_row = n_row };
    f.k = p->scratch;
    f.v = f.k + KVF_BLOCK * d;
    f.s = f.v + d / STRIP * STRIP_SIZE;
    f.q = f.s + KVF_BLOCK * CHUNK;
    f.o = f.q + n_chunk * CHUNK * d;
    f.w = (lanes *)(void *)(f.o + n_chunk * CHUNK * d);
    if (n_row == 0) return;
    load_queries(&f, n_chunk);

    int64_t first = kvf_attn_visible(p, p->tok0).first, end = kvf_attn_visible(p, p->tok1 - 1).end;
    for (int64_t b = first >> KVF_BLOCK_SHIFT; b << KVF_BLOCK_SHIFT < end; b++) {
        int k0, k1;
        block_keys(p, b << KVF_BLOCK_SHIFT, p->tok0, p->tok1 - 1, &k0, &k1);
        if (k0 >= k1) continue; /* a hole */
        load_block(&f, b, k0, k1);
        for (int64_t c = 0; c < n_chunk; c++) chunk_step(&f, c, b << KVF_BLOCK_SHIFT);
    }
    store_rows(&f, n_chunk);
}

static size_t prefill_scratch(const kvf_attn_args *a, int64_t n_tok)
{
    size_t d = (size_t)a->head_dim, n_row = round_up((size_t)(n_tok * kvf_attn_group(a)), CHUNK);
    return (KVF_BLOCK * d + d / STRIP * STRIP_SIZE + KVF_BLOCK * CHUNK + 2 * n_row * d) * sizeof(float) +
           n_row / VF_LANES * sizeof(lanes);
}

/* Rows fill whole chunks. 4 chunks share one widening of a block (2 % of the work) and keep the
 * scratch in half a megabyte at head_dim 128; fewer when there would not be 16 parts to share. */
static int64_t prefill_tile(const kvf_attn_args *a)
{
    int64_t group = kvf_attn_group(a), step = CHUNK, n = group;
    while (n % 2 == 0 && step % 2 == 0) n /= 2, step /= 2;
    while (n % 3 == 0 && step % 3 == 0) n /= 3, step /= 3;
    int64_t tok = 4 * CHUNK / group / step * step;
    if (tok < step) tok = step;
    while (tok > step && (a->n_tok + tok - 1) / tok * a->n_head_kv < 16) tok -= step;
    return tok;
}
