/* attn_avx512_bf16.c - prefill attention of attn_tmpl.h for AVX-512 with BF16: P V in bf16, the rest in f32.
 *
 * Precision rule: keys may carry components of 100 and more, so q.k stays in f32 (the three bf16 products of
 * attn_amx.c take longer where bf16 is only twice as fast). P and V are one bf16 each; the row sum that
 * divides o is taken over the rounded p, so rounding does not scale o, and lse over the exact p.
 *
 * A float of the packed V and of P^T holds two keys as bf16: the even one below, the odd one above.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/simd_avx512.h"

#define TILE_M 8 /* as in attn_avx512.c */

#include "backend/cpu/attn_lanes.h"

#define V_PER 2

/* The dims of two keys, in pairs. */
static inline void v_pack(float *out, const kvf_f16 *x, const kvf_f16 *y)
{
    const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    __m128i low = _mm_loadu_si128((const __m128i *)(const void *)x),
            high = _mm_loadu_si128((const __m128i *)(const void *)y);
    __m256bh v = _mm512_cvtneps_pbh(_mm512_cvtph_ps(_mm256_set_m128i(high, low)));
    _mm256_storeu_si256((__m256i *)(void *)out, _mm256_permutexvar_epi16(order, (__m256i)v));
}

static inline vf v_step(vf v, vf p, vf sum) { return _mm512_dpbf16_ps(sum, (__m512bh)v, (__m512bh)p); }

/* 2^x for x <= 0 to 3e-6 (a minimax fit with 2^0 = 1), far below what bf16 keeps: x = n + f, 0 <= f < 1;
 * scalef takes n from x itself. Below -126 it stays there: smaller numbers are subnormal, and sums of them slow
 * on some processors. With vf_exp2_neg the whole takes 6 % longer at 64 dims, 3 % at 128. */
static inline vf exp2_short(vf x)
{
    x = vf_max(x, vf_set1(-126.0f));
    vf f = vf_sub(x, _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    vf y = vf_fma(vf_set1(0.0134266843f), f, vf_set1(0.0522424742f));
    y = vf_fma(y, f, vf_set1(0.241280205f));
    y = vf_fma(y, f, vf_set1(0.693044845f));
    return _mm512_scalef_ps(vf_fma(y, f, vf_set1(1.0f)), x);
}

/* softmax_body of attn_lanes.h for pairs of keys: P of a pair takes the place of key k / 2. */
KVF_INLINE void v_softmax(lanes *w, float *s, int64_t stride, int k0, int k1, bool masked, vf top)
{
    const __m512i half = _mm512_set1_epi32(0x8000), ones = _mm512_set1_epi16(0x3f80);
    vi lo = vi_load(w->lo), hi = vi_load(w->hi);
    vf alpha = vf_exp2_neg(vf_sub(vf_load(w->m), top)), even = vf_zero(), odd = vf_zero(), used = vf_zero();
    for (int k = k0; k < k1; k += 2) {
        vf x = exp2_short(vf_sub(vf_load(s + k * stride), top));
        vf y = exp2_short(vf_sub(vf_load(s + (k + 1) * stride), top));
        if (masked) x = vf_select(vi_within(vi_set1(k), lo, hi), x, vf_zero());
        if (masked) y = vf_select(vi_within(vi_set1(k + 1), lo, hi), y, vf_zero());
        even = vf_add(even, x);
        odd = vf_add(odd, y);
        __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), half), 16);
        __m512i pair =
            _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_add_epi32(_mm512_castps_si512(y), half));
        vf_store(s + k / 2 * stride, _mm512_castsi512_ps(pair));
        used = _mm512_dpbf16_ps(used, (__m512bh)pair, (__m512bh)ones);
    }
    vf_store(w->m, top);
    vf_store(w->alpha, alpha);
    vf_store(w->l, vf_fma(vf_load(w->l), alpha, vf_add(even, odd)));
    vf_store(w->l_used, vf_fma(vf_load(w->l_used), alpha, used));
}

#include "backend/cpu/attn_tmpl.h"

void kvf_cpu_attn_init_avx512_bf16(kvf_cpu_ops *ops)
{
    ops->attn_name = "avx512_bf16";
    ops->attn_tile = prefill_tile;
    ops->attn_scratch_bytes = prefill_scratch;
    ops->attn = attn_prefill;
}
