/* attn_decode_tmpl.h - attention of few queries, once for every vector width; included after
 * attn_tmpl.h. attn_ref.c defines the op.
 *
 * Bound by reading K and V: each row is read once for all query rows (tokens x heads of the
 * group). Keys are widened a few at a time; scores have query rows along the lanes, as in
 * prefill. When the rows fill at most half a vector, a lane pair works on one row, even and odd
 * dims apart (per = 2), so that 7 heads keep 14 of 16 lanes busy. Values are widened in
 * registers and summed along head_dim.
 *
 * Memory must not wait for arithmetic: keys fetch the block's values, values the next block's keys,
 * one line every few multiplications, in the order of memory, into L2. Measured on Sapphire Rapids
 * with 7 heads of 64, as a share of a plain read: 55 % in bursts (they fill the line buffers), 67 %
 * evenly into L1, 73 % into L2 (T1), 75 % and more in memory order.
 *
 * SPDX-License-Identifier: Apache-2.0 */

#define PV_ROWS 8 /* query rows whose sums of values fit the registers, two vectors each */

/* Scratch of one part. */
typedef struct decode {
    const kvf_attn_part *p;
    int64_t n_row;
    int per;       /* keys of one score vector: 1, or 2 when a row has two lanes */
    int n_lanes;   /* lane vectors */
    int64_t width; /* head_dim rounded up to vectors */
    float *k;      /* [width / VF_LANES][KEYS][VF_LANES] */
    float *s;      /* [n_lanes][KVF_BLOCK][VF_LANES], of which KVF_BLOCK / per vectors are used */
    float *q;      /* [n_lanes][width][VF_LANES], of which width / per vectors are used */
    float *o;      /* [n_row up to whole PV_ROWS][width] */
    lanes *w;      /* [n_lanes] */
    float *top;    /* with runs: [blocks of the list][n_lanes][VF_LANES], m when the block's p were made */
} decode;

/* Lane of a row within a score vector: with pairs, 4 lanes are rows a b of key 0, a b of key 1. */
KVF_INLINE int score_lane(int per, int row) { return per == 2 ? row / 2 * 4 + row % 2 : row; }

/* Scores of KEYS keys k [width / VF_LANES][KEYS][VF_LANES] with one lane vector of queries. Keys
 * lie in strips so that all of a step's addresses are one pointer and a constant. Each step
 * fetches a bit of `ahead`, in all as many bytes as the keys have. */
KVF_INLINE void keys_dot(int per, const float *k, int64_t width, const float *q, float *s, const char *ahead)
{
    vf sum[KEYS];
    KVF_UNROLL
    for (int j = 0; j < KEYS; j++) sum[j] = vf_zero();
    for (int64_t c = 0; c < width; c += VF_LANES, k += (KEYS - 1) * VF_LANES) {
        for (int i = 0; i < VF_LANES; i += per, k += per, q += VF_LANES, ahead += 2 * KEYS * per) {
            vf x = vf_load(q);
            _mm_prefetch(ahead, _MM_HINT_T1);
            KVF_UNROLL
            for (int j = 0; j < KEYS; j++) {
                const float *y = k + j * VF_LANES;
                sum[j] = vf_fma(per == 2 ? vf_set1_pair(y) : vf_set1(*y), x, sum[j]);
            }
        }
    }
    KVF_UNROLL
    for (int j = 0; j < KEYS; j += per)
        vf_store(s + j / per * VF_LANES, per == 2 ? vf_pair_sums(sum[j], sum[j + 1]) : sum[j]);
}

/* Widen KEYS keys into such strips; dims past head_dim become 0. */
static void keys_widen(float *out, const kvf_f16 *k, int64_t d)
{
    for (int64_t i = 0; i < d; i += VF_LANES, out += KEYS * VF_LANES) {
        if (d - i >= VF_LANES) {
            KVF_UNROLL
            for (int j = 0; j < KEYS; j++) vf_store(out + j * VF_LANES, vf_load_f16(k + j * d + i));
        } else {
            for (int j = 0; j < KEYS; j++) vf_store(out + j * VF_LANES, vf_load_f16_n(k + j * d + i, d - i));
        }
    }
}

/* Values of one block, keys k0..k1, and what is read after them. */
typedef struct values {
    const kvf_f16 *v, *next; /* [KVF_BLOCK][head_dim] both */
    int k0, k1;
} values;

/* o [n_row][nv vectors from col] = alpha o + sum over the keys of p v; row0 a multiple of PV_ROWS.
 * tail: floats of the last vector, 0 when whole. All passes over col together fetch the next
 * block's keys, in the order of memory. */
KVF_INLINE void values_sum(const decode *f, int per, int n_row, int nv, int64_t row0, int64_t col,
                           const values *in, int64_t tail)
{
    int64_t d = f->p->a->head_dim, vec = row0 / VF_LANES, lane = row0 % VF_LANES, width = f->width;
    const float *s = f->s + vec * KVF_BLOCK * VF_LANES + lane, *alpha = f->w[vec].alpha + lane;
    const kvf_f16 *v = in->v + in->k0 * d + col, *next = in->next + col * KVF_BLOCK;
    float *o = f->o + row0 * width + col;
    vf sum[PV_ROWS][2];
    KVF_UNROLL
    for (int r = 0; r < n_row; r++) {
        vf x = vf_set1(alpha[score_lane(per, r)]);
        KVF_UNROLL
        for (int j = 0; j < nv; j++) sum[r][j] = vf_mul(vf_load(o + r * width + j * VF_LANES), x);
    }
    for (int k = in->k0; k < in->k1; k++, v += d, next += nv * VF_LANES) {
        const float *weight = per == 2 ? s + (k >> 1) * VF_LANES + (k & 1) * 2 : s + k * VF_LANES;
        vf x[2];
        _mm_prefetch((const char *)next, _MM_HINT_T1);
        KVF_UNROLL
        for (int j = 0; j < nv; j++)
            x[j] =
                tail && j == nv - 1 ? vf_load_f16_n(v + j * VF_LANES, tail) : vf_load_f16(v + j * VF_LANES);
        KVF_UNROLL
        for (int r = 0; r < n_row; r++) {
            vf y = vf_set1(weight[score_lane(per, r)]);
            KVF_UNROLL
            for (int j = 0; j < nv; j++) sum[r][j] = vf_fma(y, x[j], sum[r][j]);
        }
    }
    KVF_UNROLL
    for (int r = 0; r < n_row; r++) {
        KVF_UNROLL
        for (int j = 0; j < nv; j++) vf_store(o + r * width + j * VF_LANES, sum[r][j]);
    }
}

/* All of head_dim for n_row rows: two vectors at a time where registers allow. */
KVF_INLINE void values_row(const decode *f, int per, int n_row, int64_t row0, const values *in)
{
    int64_t d = f->p->a->head_dim, col = 0;
    enum { STEP = 2 * VF_LANES };
    if (n_row <= PV_PAIR_ROWS)
        for (; col + STEP <= d; col += STEP) values_sum(f, per, n_row, 2, row0, col, in, 0);
    for (; col + VF_LANES <= d; col += VF_LANES) values_sum(f, per, n_row, 1, row0, col, in, 0);
    if (col < d) values_sum(f, per, n_row, 1, row0, col, in, d - col);
}

/* Row counts that come up (1, 2, 4, 6, 7, 8 heads of a group) get their own code, others the next
 * larger: o and the lanes have room, and nobody reads what lands there. */
KVF_INLINE void values_rows(const decode *f, int per, int64_t row0, const values *in)
{
    int64_t n = f->n_row - row0;
    if (n >= 8)
        values_row(f, per, 8, row0, in);
    else if (n == 7)
        values_row(f, per, 7, row0, in);
    else if (n >= 5)
        values_row(f, per, 6, row0, in);
    else if (n >= 3)
        values_row(f, per, 4, row0, in);
    else if (n == 2)
        values_row(f, per, 2, row0, in);
    else
        values_row(f, per, 1, row0, in);
}

/* S of the block for keys k0..k1, whole groups of KEYS. Values of the same places are fetched
 * meanwhile, half a block ahead of their use. */
KVF_INLINE void block_scores(const decode *f, int per, const kvf_f16 *k, const kvf_f16 *v, int k0, int k1)
{
    int64_t d = f->p->a->head_dim;
    for (int64_t j = k0 / KEYS * KEYS; j < k1; j += KEYS) {
        keys_widen(f->k, k + j * d, d);
        for (int64_t x = 0; x < f->n_lanes; x++)
            keys_dot(per, f->k, f->width, f->q + x * f->width * VF_LANES,
                     f->s + (x * KVF_BLOCK + j / per) * VF_LANES, (const char *)(v + j * d));
    }
}

/* What the lanes see of the block at `base`; with pairs a row has its lane and the second next. */
static void decode_mask(const decode *f, int64_t base)
{
    for (int64_t row = 0; row < f->n_lanes * (VF_LANES / f->per); row++) {
        lanes *w = f->w + row / VF_LANES;
        int lane = score_lane(f->per, (int)(row % VF_LANES));
        lanes_see(w, f->p, base, lane, row, f->n_row);
        if (f->per == 2) lanes_see(w, f->p, base, lane + 2, row, f->n_row);
    }
}

static void softmax_lanes(lanes *w, float *s, int i0, int i1, int per, bool masked, float cap)
{
    const int64_t n = VF_LANES;
    if (per == 2)
        softmax_body(w, s, n, i0, i1, 2, masked, softmax_top(w, s, n, i0, i1, 2, masked, cap));
    else if (masked || cap > 0.0f)
        softmax_body(w, s, n, i0, i1, 1, masked, softmax_top(w, s, n, i0, i1, 1, masked, cap));
    else
        softmax_body(w, s, n, i0, i1, 1, false, softmax_top(w, s, n, i0, i1, 1, false, 0.0f));
}

/* p of the block, keys k0..k1, summed over runs: still by the m of now. */
static void block_runs(const decode *f, int per, int64_t b, int k0, int k1)
{
    for (int64_t x = 0; x < f->n_lanes; x++) {
        const float *s = f->s + x * KVF_BLOCK * VF_LANES;
        int64_t row0 = x * VF_LANES / per, n = f->n_row - row0 < VF_LANES / per ? f->n_row - row0 : VF_LANES / per;
        vf_store(f->top + (b * f->n_lanes + x) * VF_LANES, vf_load(f->w[x].m));
        for (int r = k0 / KVF_ATTN_RUN; r * KVF_ATTN_RUN < k1; r++) {
            int first = r * KVF_ATTN_RUN, end = first + KVF_ATTN_RUN;
            float sum[VF_LANES];
            if (first < k0) first = k0;
            if (end > k1) end = k1;
            vf total = vf_zero();
            for (int i = first / per; i < (end + per - 1) / per; i++) total = vf_add(total, vf_load(s + i * VF_LANES));
            vf_store(sum, total);
            for (int64_t i = 0; i < n; i++) {
                int lane = score_lane(per, (int)i);
                float *to = kvf_attn_runs(f->p->a, f->p->head_kv, row0 + i) + b * KVF_BLOCK_RUNS + r;
                *to = per == 2 ? sum[lane] + sum[lane + 2] : sum[lane];
            }
        }
    }
}

/* Those sums of blocks first..end, each by the m of its time, become shares by the lse of the part. */
static void runs_finish(const decode *f, int64_t first, int64_t end)
{
    int64_t rows = VF_LANES / f->per; /* of a lane vector */
    for (int64_t x = 0; x < f->n_lanes; x++) {
        vf l = vf_load(f->w[x].l), m = vf_load(f->w[x].m);
        if (f->per == 2) l = vf_add(l, vf_swap_pairs(l));
        vf inverse = vf_select(vf_lt(vf_zero(), l), vf_div(vf_set1(1.0f), l), vf_zero());
        for (int64_t b = first; b < end; b++) {
            float share[VF_LANES];
            vf_store(share, vf_mul(vf_exp2_neg(vf_sub(vf_load(f->top + (b * f->n_lanes + x) * VF_LANES), m)), inverse));
            for (int64_t row = x * rows; row < (x + 1) * rows && row < f->n_row; row++) {
                float *runs = kvf_attn_runs(f->p->a, f->p->head_kv, row) + b * KVF_BLOCK_RUNS;
                for (int r = 0; r < KVF_BLOCK_RUNS; r++) runs[r] *= share[score_lane(f->per, (int)(row % rows))];
            }
        }
    }
}

KVF_INLINE void decode_block(const decode *f, int per, int64_t b, int64_t end)
{
    const kvf_attn_args *a = f->p->a;
    int64_t base = b << KVF_BLOCK_SHIFT;
    const kvf_f16 *k = kvf_attn_k(a, f->p->head_kv, b), *v = kvf_attn_v(a, f->p->head_kv, b);
    int k0, k1;
    bool masked = block_keys(f->p, base, f->p->tok0, f->p->tok1 - 1, &k0, &k1);
    if (k0 >= k1) return;
    if (per == 2 && ((k0 | k1) & 1)) masked = true; /* a vector holds a key that nobody sees */
    if (masked) decode_mask(f, base);
    block_scores(f, per, k, v, k0, k1);
    for (int64_t x = 0; x < f->n_lanes; x++)
        softmax_lanes(f->w + x, f->s + x * KVF_BLOCK * VF_LANES, k0 / per, (k1 + per - 1) / per, per, masked,
                      a->softcap);
    if (a->runs) block_runs(f, per, b, k0, k1);
    values in = {
        .v = v, .next = base + KVF_BLOCK < end ? kvf_attn_k(a, f->p->head_kv, b + 1) : v, .k0 = k0, .k1 = k1
    };
    for (int64_t row = 0; row < f->n_row; row += PV_ROWS, in.next = v) values_rows(f, per, row, &in);
}

/* Lay out the scratch; returns its size. With p = NULL only the size is meant. */
static size_t decode_layout(decode *f, const kvf_attn_args *a, int64_t n_tok, void *scratch)
{
    size_t d = (size_t)a->head_dim, n_row = (size_t)(n_tok * kvf_attn_group(a));
    f->n_row = (int64_t)n_row;
    f->per = 2 * n_row <= VF_LANES ? 2 : 1;
    f->n_lanes = f->per == 2 ? 1 : (int)((n_row + VF_LANES - 1) / VF_LANES);
    f->width = (int64_t)round_up(d, VF_LANES);
    size_t n_lanes = (size_t)f->n_lanes,
           blocks = a->runs ? round_up((size_t)a->n_key, KVF_BLOCK) / KVF_BLOCK : 0,
           at[6] = { KEYS * (size_t)f->width, n_lanes * KVF_BLOCK * VF_LANES,
                     n_lanes * VF_LANES * (size_t)f->width, round_up(n_row, PV_ROWS) * (size_t)f->width,
                     blocks * n_lanes * VF_LANES, n_lanes * sizeof(lanes) / sizeof(float) };
    float *base = scratch;
    size_t n = 0;
    float **part[5] = { &f->k, &f->s, &f->q, &f->o, &f->top };
    for (int i = 0; i < 5; n += at[i], i++)
        if (base) *part[i] = base + n;
    if (base) f->w = (lanes *)(void *)(base + n);
    return (n + at[5]) * sizeof(float);
}

/* Scaled queries: vector i of a lane vector holds dim i (per 1) or dims 2i, 2i + 1 (per 2). */
static void decode_queries(const decode *f)
{
    int64_t d = f->p->a->head_dim, per = f->per;
    int32_t group = kvf_attn_group(f->p->a);
    float factor = q_factor(f->p->a);
    memset(f->q, 0, (size_t)(f->n_lanes * VF_LANES * f->width) * sizeof *f->q);
    memset(f->o, 0, round_up((size_t)f->n_row, PV_ROWS) * (size_t)f->width * sizeof *f->o);
    for (int64_t row = 0; row < f->n_row; row++) {
        const float *q = kvf_attn_q(f->p, f->p->tok0 + row / group, (int32_t)(row % group));
        float *dst = f->q + row / VF_LANES * VF_LANES * f->width + row % VF_LANES * per;
        for (int64_t i = 0; i < d; i += per, dst += VF_LANES)
            for (int64_t j = 0; j < per; j++) dst[j] = q[i + j] * factor;
    }
    for (int i = 0; i < f->n_lanes; i++) lanes_reset(f->w + i);
}

static void attn_decode(const kvf_attn_part *p)
{
    decode f = { .p = p };
    if (p->tok0 >= p->tok1) return;
    decode_layout(&f, p->a, p->tok1 - p->tok0, p->scratch);
    decode_queries(&f);
    int64_t first = kvf_attn_visible(p, p->tok0).first, end = kvf_attn_visible(p, p->tok1 - 1).end;
    int64_t block0 = first >> KVF_BLOCK_SHIFT, block1 = (end + KVF_BLOCK - 1) >> KVF_BLOCK_SHIFT;
    /* Blocks that are all hole are passed over, and their sums are 0. */
    for (int64_t i = block0 * f.n_lanes; p->a->runs && i < block1 * f.n_lanes; i++)
        vf_store(f.top + i * VF_LANES, vf_set1(-FLT_MAX));
    for (int64_t b = first >> KVF_BLOCK_SHIFT; b << KVF_BLOCK_SHIFT < end; b++) {
        if (f.per == 2)
            decode_block(&f, 2, b, end);
        else
            decode_block(&f, 1, b, end);
    }
    if (p->a->runs) runs_finish(&f, block0, block1);
    int32_t group = kvf_attn_group(p->a);
    for (int64_t row = 0; row < f.n_row; row++) {
        int64_t tok = p->tok0 + row / group;
        int32_t g = (int32_t)(row % group);
        const lanes *w = f.w + row / VF_LANES;
        int lane = score_lane(f.per, (int)(row % VF_LANES));
        float l = f.per == 2 ? w->l[lane] + w->l[lane + 2] : w->l[lane];
        row_finish(kvf_attn_o(p, tok, g), f.o + row * f.width, 1, p->a->head_dim, l);
        float *lse = kvf_attn_lse(p, tok, g);
        if (lse) *lse = row_lse(w->m[lane], l);
    }
}

static size_t decode_scratch(const kvf_attn_args *a, int64_t n_tok)
{
    decode f = { 0 };
    return decode_layout(&f, a, n_tok, NULL);
}

static void attn_init(kvf_cpu_ops *ops, const char *name)
{
    ops->attn_name = name;
    ops->attn_decode_name = name;
    ops->attn_decode_max = 8;
    ops->attn_tile = prefill_tile;
    ops->attn_scratch_bytes = prefill_scratch;
    ops->attn = attn_prefill;
    ops->attn_decode_scratch_bytes = decode_scratch;
    ops->attn_decode = attn_decode;
}
