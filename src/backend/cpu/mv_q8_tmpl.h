/* mv_q8_tmpl.h - how a decode kernel goes through its part; included by mv_avx2.c and mv_avx512.c.
 *
 * The including file gives act, place, prepare(), rows() and MAX_TOK (tokens of one pass, 2 or 4), and
 * gets run().
 *
 * SPDX-License-Identifier: Apache-2.0 */
/* The part in four quarters, one row of each at a time: four streams far apart keep more reads in
 * flight than neighbouring rows do, and what lies ahead in each is always the next to be read. Only
 * the first pass over the tokens reads the four rows from memory. */
KVF_INLINE void quarters(kvf_dtype type, const kvf_mm_part *p)
{
    act x[KVF_MV_MAX_TOK];
    place at = { .step = (p->row1 - p->row0 + 3) / 4 };
    for (int64_t t0 = 0; t0 < p->n_tok; t0 += KVF_MV_MAX_TOK) {
        int n = p->n_tok - t0 < KVF_MV_MAX_TOK ? (int)(p->n_tok - t0) : KVF_MV_MAX_TOK;
        for (int i = 0; i < n; i++) x[i] = prepare(type, p, t0 + i);
        for (int64_t r = p->row0; r < p->row0 + at.step; r++) {
            int i = 0;
            for (int pass; i + 2 <= n; i += pass) {
                pass = n - i >= MAX_TOK ? MAX_TOK : 2;
                at.t = t0 + i;
                for (int half = 0; half < 2; half++) {
                    at.row = r + 2 * half * at.step;
                    if (pass == MAX_TOK)
                        rows(type, 2, MAX_TOK, p, x + i, &at);
                    else
                        rows(type, 2, 2, p, x + i, &at);
                }
            }
            at.row = r;
            at.t = t0 + i;
            if (i < n) rows(type, 4, 1, p, x + i, &at);
        }
    }
}

static void run_q4_0(const kvf_mm_part *p) { quarters(KVF_DTYPE_Q4_0, p); }
static void run_q4_1(const kvf_mm_part *p) { quarters(KVF_DTYPE_Q4_1, p); }
static void run_q5_0(const kvf_mm_part *p) { quarters(KVF_DTYPE_Q5_0, p); }
static void run_q5_1(const kvf_mm_part *p) { quarters(KVF_DTYPE_Q5_1, p); }
static void run_q8_0(const kvf_mm_part *p) { quarters(KVF_DTYPE_Q8_0, p); }
static void run_q4_k(const kvf_mm_part *p) { quarters(KVF_DTYPE_Q4_K, p); }
static void run_q5_k(const kvf_mm_part *p) { quarters(KVF_DTYPE_Q5_K, p); }
static void run_q6_k(const kvf_mm_part *p) { quarters(KVF_DTYPE_Q6_K, p); }

/* One function per type: the compiler then sees every layout as constants. */
static void run(const kvf_mm_part *p)
{
    switch (p->w->type) {
    case KVF_DTYPE_Q4_0: run_q4_0(p); break;
    case KVF_DTYPE_Q4_1: run_q4_1(p); break;
    case KVF_DTYPE_Q5_0: run_q5_0(p); break;
    case KVF_DTYPE_Q5_1: run_q5_1(p); break;
    case KVF_DTYPE_Q8_0: run_q8_0(p); break;
    case KVF_DTYPE_Q4_K: run_q4_k(p); break;
    case KVF_DTYPE_Q5_K: run_q5_k(p); break;
    case KVF_DTYPE_Q6_K: run_q6_k(p); break;
    default: break; /* mm_pick sends float types to the f32 kernels */
    }
}
