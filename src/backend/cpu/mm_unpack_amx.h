/* mm_unpack_amx.h - weight blocks to bf16, 32 weights to a cache line, in the order tiles want.
 *
 * A line holds the 32 weights of one row in the order 0 2 4 .. 30 1 3 .. 31: products do not care
 * as long as activations have it too, and it falls out of byte pairs without a shuffle. Low-bit
 * types need no arithmetic per weight: the 16 or 32 values that a block can take are rounded to
 * bf16 once and the codes look them up, 32 at a time (vpermw reads 5 bits of each index).
 *
 * Every value is the dequantised f32 rounded to nearest even: scale times integer is exact or
 * rounded once, as in dequant_ref.c. Byte layouts are spelled out there.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BACKEND_CPU_MM_UNPACK_AMX_H
#define KVF_BACKEND_CPU_MM_UNPACK_AMX_H

#include <immintrin.h>
#include <string.h>

#include "base/dtype.h"

#define KVF_AMX_TILE 1024 /* bytes of a tile: 16 rows of 64 */

/* Word w of the result is v0 for w < 8, v1 for w < 16 and so on. */
static inline __m512i amx_words4(short v0, short v1, short v2, short v3)
{
    __m256i lo = _mm256_set_m128i(_mm_set1_epi16(v1), _mm_set1_epi16(v0));
    __m256i hi = _mm256_set_m128i(_mm_set1_epi16(v3), _mm_set1_epi16(v2));
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}

static inline __m512 amx_iota(float first)
{
    __m512 i = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_ps(i, _mm512_set1_ps(first));
}

/* Where the words 0..31 come from to be in even-odd order. */
static inline __m512i amx_even_odd(void)
{
    __m512i i =
        _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 1, 3,
                                              5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    return i;
}

static inline __m512i amx_bf16(__m512 lo, __m512 hi) { return (__m512i)_mm512_cvtne2ps_pbh(hi, lo); }

static inline __m512 amx_f16(const uint8_t *p)
{
    short h;
    memcpy(&h, p, sizeof h);
    return _mm512_cvtph_ps(_mm256_set1_epi16(h));
}

static inline __m512i amx_bytes16(const uint8_t *p)
{
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline __m512i amx_bytes32(const uint8_t *p)
{
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

/* Low four bits from nib, fifth from high; above that anything. */
static inline __m512i amx_code5(__m512i nib, __m512i high)
{
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), nib, high, 0xCA);
}

/* Fifth bits of Q5_0 and Q5_1: bit k of qh belongs to weight k; returns it as bit 4 of its word. */
static inline __m512i amx_bits32(const uint8_t *qh)
{
    int bits;
    memcpy(&bits, qh, sizeof bits);
    /* Upper byte of each word: the byte of qh with the bit (even-odd: words 0..15 are k = 0 2 .. 30). */
    const __m128i even_lo = _mm_setr_epi8(-1, 0, -1, 0, -1, 0, -1, 0, -1, 1, -1, 1, -1, 1, -1, 1);
    const __m128i even_hi = _mm_setr_epi8(-1, 2, -1, 2, -1, 2, -1, 2, -1, 3, -1, 3, -1, 3, -1, 3);
    const __m256i pick = _mm256_set_m128i(even_hi, even_lo);
    const __m512i even = _mm512_broadcast_i32x4(_mm_setr_epi16(4, 6, 8, 10, 4, 6, 8, 10));
    const __m512i shift = _mm512_add_epi16(even, amx_words4(0, 0, 1, 1));
    __m512i b = _mm512_shuffle_epi8(_mm512_set1_epi32(bits), _mm512_broadcast_i64x4(pick));
    return _mm512_srlv_epi16(b, shift);
}

/* Each unpack_*: n blocks of 32 (K types: n superblocks of 256) of one row; line i goes to
 * dst + i * KVF_AMX_TILE. */

static inline void amx_unpack_q4_0(const uint8_t *src, int64_t n, uint8_t *dst)
{
    const __m512i shift = amx_words4(0, 4, 8, 12);
    for (int64_t i = 0; i < n; i++, src += 18, dst += KVF_AMX_TILE) {
        __m512 v = _mm512_mul_ps(amx_iota(-8), amx_f16(src));
        __m512i code = _mm512_srlv_epi16(amx_bytes16(src + 2), shift);
        _mm512_store_si512(dst, _mm512_permutexvar_epi16(code, amx_bf16(v, v)));
    }
}

static inline void amx_unpack_q4_1(const uint8_t *src, int64_t n, uint8_t *dst)
{
    const __m512i shift = amx_words4(0, 4, 8, 12);
    for (int64_t i = 0; i < n; i++, src += 20, dst += KVF_AMX_TILE) {
        __m512 v = _mm512_fmadd_ps(amx_iota(0), amx_f16(src), amx_f16(src + 2));
        __m512i code = _mm512_srlv_epi16(amx_bytes16(src + 4), shift);
        _mm512_store_si512(dst, _mm512_permutexvar_epi16(code, amx_bf16(v, v)));
    }
}

static inline void amx_unpack_q5_0(const uint8_t *src, int64_t n, uint8_t *dst)
{
    const __m512i shift = amx_words4(0, 4, 8, 12);
    for (int64_t i = 0; i < n; i++, src += 22, dst += KVF_AMX_TILE) {
        __m512 d = amx_f16(src);
        __m512i values = amx_bf16(_mm512_mul_ps(amx_iota(-16), d), _mm512_mul_ps(amx_iota(0), d));
        __m512i nib = _mm512_srlv_epi16(amx_bytes16(src + 6), shift);
        __m512i code = amx_code5(nib, amx_bits32(src + 2));
        _mm512_store_si512(dst, _mm512_permutexvar_epi16(code, values));
    }
}

static inline void amx_unpack_q5_1(const uint8_t *src, int64_t n, uint8_t *dst)
{
    const __m512i shift = amx_words4(0, 4, 8, 12);
    for (int64_t i = 0; i < n; i++, src += 24, dst += KVF_AMX_TILE) {
        __m512 d = amx_f16(src), m = amx_f16(src + 2);
        __m512i values = amx_bf16(_mm512_fmadd_ps(amx_iota(0), d, m), _mm512_fmadd_ps(amx_iota(16), d, m));
        __m512i nib = _mm512_srlv_epi16(amx_bytes16(src + 8), shift);
        __m512i code = amx_code5(nib, amx_bits32(src + 4));
        _mm512_store_si512(dst, _mm512_permutexvar_epi16(code, values));
    }
}

static inline void amx_unpack_q8_0(const uint8_t *src, int64_t n, uint8_t *dst)
{
    const __m512 unit = _mm512_set1_ps(0x1p-24f); /* codes are converted from the top byte of an int32 */
    for (int64_t i = 0; i < n; i++, src += 34, dst += KVF_AMX_TILE) {
        __m512 d = _mm512_mul_ps(amx_f16(src), unit);
        __m512i pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(src + 2)));
        __m512i even = _mm512_slli_epi32(pair, 24);
        __m512i odd = _mm512_slli_epi32(_mm512_srli_epi32(pair, 8), 24);
        __m512 lo = _mm512_mul_ps(_mm512_cvtepi32_ps(even), d),
               hi = _mm512_mul_ps(_mm512_cvtepi32_ps(odd), d);
        _mm512_store_si512(dst, amx_bf16(lo, hi));
    }
}

/* Scales of Q4_K and Q5_K: d * scale[8] then dmin * min[8], as f32. */
static inline void amx_k_scales(const uint8_t *src, float out[16])
{
    uint32_t s[3], u[4];
    memcpy(s, src + 4, sizeof s);
    u[0] = s[0] & 0x3f3f3f3fu;                                        /* scales 0..3 */
    u[1] = (s[2] & 0x0f0f0f0fu) | ((s[0] >> 2) & 0x30303030u);        /* scales 4..7 */
    u[2] = s[1] & 0x3f3f3f3fu;                                        /* mins 0..3 */
    u[3] = ((s[2] >> 4) & 0x0f0f0f0fu) | ((s[1] >> 2) & 0x30303030u); /* mins 4..7 */
    __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)u)));
    __m512 d = _mm512_mask_blend_ps(0xff00, amx_f16(src), amx_f16(src + 2));
    _mm512_store_ps(out, _mm512_mul_ps(v, d));
}

static inline void amx_unpack_q4_k(const uint8_t *src, int64_t n, uint8_t *dst)
{
    const __m512i low = amx_words4(0, 0, 8, 8), high = amx_words4(4, 4, 12, 12);
    _Alignas(64) float scale[16];
    for (int64_t i = 0; i < n; i++, src += 144) {
        amx_k_scales(src, scale);
        for (int j = 0; j < 8; j += 2, dst += 2 * KVF_AMX_TILE) {
            __m512i q = amx_bytes32(src + 16 + 16 * j);
            __m512 v = _mm512_fmsub_ps(amx_iota(0), _mm512_set1_ps(scale[j]), _mm512_set1_ps(scale[j + 8]));
            __m512 w =
                _mm512_fmsub_ps(amx_iota(0), _mm512_set1_ps(scale[j + 1]), _mm512_set1_ps(scale[j + 9]));
            __m512i a = _mm512_permutexvar_epi16(_mm512_srlv_epi16(q, low), amx_bf16(v, v));
            __m512i b = _mm512_permutexvar_epi16(_mm512_srlv_epi16(q, high), amx_bf16(w, w));
            _mm512_store_si512(dst, a);
            _mm512_store_si512(dst + KVF_AMX_TILE, b);
        }
    }
}

static inline void amx_unpack_q5_k(const uint8_t *src, int64_t n, uint8_t *dst)
{
    const __m512i low = amx_words4(0, 0, 8, 8), high = amx_words4(4, 4, 12, 12);
    const __m512i up = amx_words4(4, 4, 0, 0), down = amx_words4(0, 0, 4, 4);
    _Alignas(64) float scale[16];
    for (int64_t i = 0; i < n; i++, src += 176) {
        amx_k_scales(src, scale);
        /* Bit j of a byte of qh is the fifth bit of group j: bring bit 0 to place 4, then step. */
        __m512i h = _mm512_srlv_epi16(_mm512_sllv_epi16(amx_bytes32(src + 16), up), down);
        for (int j = 0; j < 8; j++, dst += KVF_AMX_TILE) {
            __m512i nib = _mm512_srlv_epi16(amx_bytes32(src + 48 + 16 * (j & ~1)), (j & 1) ? high : low);
            __m512 s = _mm512_set1_ps(scale[j]), m = _mm512_set1_ps(scale[j + 8]);
            __m512i values =
                amx_bf16(_mm512_fmsub_ps(amx_iota(0), s, m), _mm512_fmsub_ps(amx_iota(16), s, m));
            _mm512_store_si512(dst, _mm512_permutexvar_epi16(amx_code5(nib, h), values));
            h = _mm512_srli_epi16(h, 1);
        }
    }
}

/* Two groups of 32 weights of a Q6_K row from their codes 0..63, one per byte. */
static inline void amx_q6_lines(__m512i code, __m512i scale, __m512 d, uint8_t *dst)
{
    const __m512i mid = _mm512_set1_epi16(32);
    __m512i even = _mm512_sub_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0xff)), mid);
    __m512i odd = _mm512_sub_epi16(_mm512_srli_epi16(code, 8), mid);
    even = _mm512_mullo_epi16(even, scale); /* |code - 32| * |scale| <= 32 * 128 */
    odd = _mm512_mullo_epi16(odd, scale);
    for (int g = 0; g < 2; g++) {
        __m256i e = g ? _mm512_extracti64x4_epi64(even, 1) : _mm512_castsi512_si256(even);
        __m256i o = g ? _mm512_extracti64x4_epi64(odd, 1) : _mm512_castsi512_si256(odd);
        __m512 lo = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(e)), d);
        __m512 hi = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(o)), d);
        _mm512_store_si512(dst + g * KVF_AMX_TILE, amx_bf16(lo, hi));
    }
}

static inline void amx_unpack_q6_k(const uint8_t *src, int64_t n, uint8_t *dst)
{
    const __m512i nib = _mm512_set1_epi8(15), top = _mm512_set1_epi8(0x30);
    const __m512i up01 = amx_words4(4, 4, 2, 2), down23 = amx_words4(0, 0, 2, 2);
    /* Scale s serves 16 weights: 8 even and 8 odd ones, so 8 words of each half line. */
    const __m512i spread = amx_words4(0, 1, 2, 3);
    for (int64_t i = 0; i < n; i++, src += 210) {
        __m512 d = amx_f16(src + 208);
        __m512i scale = _mm512_cvtepi8_epi16(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)(src + 192))));
        for (int half = 0; half < 2; half++, dst += 4 * KVF_AMX_TILE) {
            __m512i ql = _mm512_loadu_si512(src + 64 * half), qh = amx_bytes32(src + 128 + 32 * half);
            __m512i h01 = _mm512_and_si512(_mm512_sllv_epi16(qh, up01), top);
            __m512i h23 = _mm512_and_si512(_mm512_srlv_epi16(qh, down23), top);
            __m512i c01 = _mm512_or_si512(_mm512_and_si512(ql, nib), h01);
            __m512i c23 = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(ql, 4), nib), h23);
            short at = (short)(8 * half);
            __m512i s01 = _mm512_permutexvar_epi16(_mm512_add_epi16(spread, _mm512_set1_epi16(at)), scale);
            __m512i s23 =
                _mm512_permutexvar_epi16(_mm512_add_epi16(spread, _mm512_set1_epi16((short)(at + 4))), scale);
            amx_q6_lines(c01, s01, d, dst);
            amx_q6_lines(c23, s23, d, dst + 2 * KVF_AMX_TILE);
        }
    }
}

/* Float types: n weights; the last line is filled up with zeros. */
static inline void amx_unpack_f32(const uint8_t *src, int64_t n, uint8_t *dst)
{
    for (int64_t k = 0; k < n; k += 32, src += 128, dst += KVF_AMX_TILE) {
        uint32_t m = n - k >= 32 ? 0xffffffffu : (1u << (n - k)) - 1u;
        __m512 lo = _mm512_maskz_loadu_ps((__mmask16)m, src),
               hi = _mm512_maskz_loadu_ps((__mmask16)(m >> 16), src + 64);
        _mm512_store_si512(dst, _mm512_permutexvar_epi16(amx_even_odd(), amx_bf16(lo, hi)));
    }
}

static inline void amx_unpack_f16(const uint8_t *src, int64_t n, uint8_t *dst)
{
    for (int64_t k = 0; k < n; k += 32, src += 64, dst += KVF_AMX_TILE) {
        uint32_t m = n - k >= 32 ? 0xffffffffu : (1u << (n - k)) - 1u;
        __m512i h = _mm512_maskz_loadu_epi16(m, src);
        __m512 lo = _mm512_cvtph_ps(_mm512_castsi512_si256(h)),
               hi = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
        _mm512_store_si512(dst, _mm512_permutexvar_epi16(amx_even_odd(), amx_bf16(lo, hi)));
    }
}

static inline void amx_unpack_bf16(const uint8_t *src, int64_t n, uint8_t *dst)
{
    for (int64_t k = 0; k < n; k += 32, src += 64, dst += KVF_AMX_TILE) {
        uint32_t m = n - k >= 32 ? 0xffffffffu : (1u << (n - k)) - 1u;
        _mm512_store_si512(dst, _mm512_permutexvar_epi16(amx_even_odd(), _mm512_maskz_loadu_epi16(m, src)));
    }
}

/* Weights k0..k1 of a row; k0 a multiple of 256, k1 of the type's block. */
static inline void amx_unpack(kvf_dtype type, const uint8_t *row, int64_t k0, int64_t k1, uint8_t *dst)
{
    int64_t n = k1 - k0, b = k0 / 32, s = k0 / 256;
    switch (type) {
    case KVF_DTYPE_Q4_0: amx_unpack_q4_0(row + b * 18, n / 32, dst); break;
    case KVF_DTYPE_Q4_1: amx_unpack_q4_1(row + b * 20, n / 32, dst); break;
    case KVF_DTYPE_Q5_0: amx_unpack_q5_0(row + b * 22, n / 32, dst); break;
    case KVF_DTYPE_Q5_1: amx_unpack_q5_1(row + b * 24, n / 32, dst); break;
    case KVF_DTYPE_Q8_0: amx_unpack_q8_0(row + b * 34, n / 32, dst); break;
    case KVF_DTYPE_Q4_K: amx_unpack_q4_k(row + s * 144, n / 256, dst); break;
    case KVF_DTYPE_Q5_K: amx_unpack_q5_k(row + s * 176, n / 256, dst); break;
    case KVF_DTYPE_Q6_K: amx_unpack_q6_k(row + s * 210, n / 256, dst); break;
    case KVF_DTYPE_F16: amx_unpack_f16(row + k0 * 2, n, dst); break;
    case KVF_DTYPE_BF16: amx_unpack_bf16(row + k0 * 2, n, dst); break;
    case KVF_DTYPE_F32: amx_unpack_f32(row + k0 * 4, n, dst); break;
    case KVF_DTYPE_LIMIT: break;
    }
}

#endif
