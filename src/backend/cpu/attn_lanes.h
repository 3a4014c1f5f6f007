/* attn_lanes.h - online softmax with one query row per vector lane; include simd_*.h first.
 *
 * Rows of scores lie along the lanes and keys follow each other in memory, so maxima, sums and
 * rescaling factors are whole vectors and nothing is ever reduced across lanes. Scores are in
 * base 2: log2(e) is folded into the scaling of q, and exp becomes 2^x.
 *
 * Shared by prefill (attn_tmpl.h) and decode (attn_decode_tmpl.h).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_ATTN_LANES_H
#define KVF_BACKEND_CPU_ATTN_LANES_H

#include <float.h>
#include <math.h>

#include "backend/cpu/attn_int.h"
#include "backend/cpu/simd_math.h"

/* One lane vector of query rows. A row that has seen no key has m = -FLT_MAX (finite, so that
 * no difference is NaN) and l = 0. */
typedef struct lanes {
    float m[VF_LANES];      /* largest score so far */
    float l[VF_LANES];      /* sum of 2^(s - m) so far */
    float l_used[VF_LANES]; /* the same of p as P V has it, perhaps rounded: it divides o */
    float top[VF_LANES];    /* prefill: the largest of m and of a block's scores, where all are seen */
    float alpha[VF_LANES];  /* what the last softmax asks sums of p v to be multiplied by */
    int32_t lo[VF_LANES], hi[VF_LANES]; /* keys of the block that the row sees: lo <= key < hi */
} lanes;

static void lanes_reset(lanes *w)
{
    vf_store(w->m, vf_set1(-FLT_MAX));
    vf_store(w->l, vf_zero());
    vf_store(w->l_used, vf_zero());
}

/* Key of each lane, from the vector's first: 0, or with pairs 0 0 1 1 and so on. */
KVF_INLINE vi lane_keys(int per)
{
    static const int32_t second[16] = { 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1 };
    return per == 2 ? vi_load(second) : vi_set1(0);
}

/* What q is multiplied by. With a soft cap the dot product is then the argument of tanh. */
static float q_factor(const kvf_attn_args *a)
{
    return a->softcap > 0.0f ? a->scale / a->softcap : a->scale * 1.44269504f;
}

/* The largest of m and the scores s[i * stride ..], i0 <= i < i1, per row; the scores are left capped, and
 * -FLT_MAX where a lane does not see them.
 * per: keys of one vector; vector i holds keys i * per + (lane / 2) % per.
 * masked: some lane does not see all of these keys. */
KVF_INLINE vf softmax_top(const lanes *w, float *s, int64_t stride, int i0, int i1, int per, bool masked,
                          float cap)
{
    vi lo = vi_load(w->lo), hi = vi_load(w->hi), key0 = lane_keys(per);
    vf top = vf_load(w->m), top2 = top;
    if (masked || cap > 0.0f) {
        vf unit = vf_set1(cap * 1.44269504f), never = vf_set1(-FLT_MAX);
        for (int i = i0; i < i1; i++) {
            vf x = vf_load(s + i * stride);
            if (cap > 0.0f) x = vf_mul(vf_tanh(x), unit);
            if (masked) x = vf_select(vi_within(vi_add(vi_set1(i * per), key0), lo, hi), x, never);
            vf_store(s + i * stride, x);
            top = vf_max(top, x);
        }
    } else {
        int i = i0;
        for (; i + 2 <= i1; i += 2) {
            top = vf_max(top, vf_load(s + i * stride));
            top2 = vf_max(top2, vf_load(s + (i + 1) * stride));
        }
        if (i < i1) top = vf_max(top, vf_load(s + i * stride));
        top = vf_max(top, top2);
    }
    return per == 2 ? vf_max(top, vf_swap_pairs(top)) : top;
}

/* Scores to p = 2^(s - top), adding them to l; p is exactly 0 where a lane does not see the key. */
KVF_INLINE void softmax_body(lanes *w, float *s, int64_t stride, int i0, int i1, int per, bool masked, vf top)
{
    vi lo = vi_load(w->lo), hi = vi_load(w->hi), key0 = lane_keys(per);
    vf alpha = vf_exp2_neg(vf_sub(vf_load(w->m), top)), sum = vf_zero();
    for (int i = i0; i < i1; i++) {
        vf x = vf_exp2_neg(vf_sub(vf_load(s + i * stride), top));
        if (masked) x = vf_select(vi_within(vi_add(vi_set1(i * per), key0), lo, hi), x, vf_zero());
        vf_store(s + i * stride, x);
        sum = vf_add(sum, x);
    }
    vf l = vf_fma(vf_load(w->l), alpha, sum);
    vf_store(w->m, top);
    vf_store(w->alpha, alpha);
    vf_store(w->l, l);
    vf_store(w->l_used, l);
}

/* Result of a row from its unnormalised output x[i * stride] and the sum of its p. */
static void row_finish(float *o, const float *x, int64_t stride, int32_t n, float l)
{
    float r = l > 0.0f ? 1.0f / l : 0.0f;
    for (int32_t i = 0; i < n; i++) o[i] = x[i * stride] * r;
}

static float row_lse(float m, float l)
{
    return l > 0.0f ? (float)(0.693147180559945309 * ((double)m + log2((double)l))) : -INFINITY;
}

/* Set what each lane sees of the block that starts at key `base`; lane i is row row0 + i * step.
 * Rows are tokens times the group; lanes past n_row see all and go nowhere. */
static void lanes_see(lanes *w, const kvf_attn_part *p, int64_t base, int lane, int64_t row, int64_t n_row)
{
    int32_t group = kvf_attn_group(p->a);
    w->lo[lane] = 0;
    w->hi[lane] = KVF_BLOCK;
    if (row >= n_row) return;
    kvf_key_range r = kvf_attn_visible(p, p->tok0 + row / group);
    kvf_key_range held = kvf_attn_valid(p->a, base >> KVF_BLOCK_SHIFT);
    if (r.first - base > held.first) held.first = r.first - base < KVF_BLOCK ? r.first - base : KVF_BLOCK;
    if (r.end - base < held.end) held.end = r.end > base ? r.end - base : 0;
    w->lo[lane] = (int32_t)held.first;
    w->hi[lane] = (int32_t)held.end;
}

/* The keys of the block at `base` that some row of tok_a..tok_b sees: *k0 <= key < *k1. Both ends
 * of what a query sees rise with its place, so the outer queries decide; holes are the same for all.
 * Nothing outside is used as a number. Returns whether some row sees fewer; *k0 >= *k1: none sees any. */
static bool block_keys(const kvf_attn_part *p, int64_t base, int64_t tok_a, int64_t tok_b, int *k0, int *k1)
{
    kvf_key_range a = kvf_attn_visible(p, tok_a), b = kvf_attn_visible(p, tok_b);
    int64_t lo = a.first - base, hi = b.end - base;
    *k0 = lo < 0 ? 0 : lo > KVF_BLOCK ? KVF_BLOCK : (int)lo;
    *k1 = hi < *k0 ? *k0 : hi > KVF_BLOCK ? KVF_BLOCK : (int)hi;
    kvf_key_range held = kvf_attn_valid(p->a, base >> KVF_BLOCK_SHIFT);
    if (held.first > *k0) *k0 = (int)held.first;
    if (held.end < *k1) *k1 = (int)held.end;
    return b.first > base + *k0 || a.end < base + *k1;
}

static inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

#endif
