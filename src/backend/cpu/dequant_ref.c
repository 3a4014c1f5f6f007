/* dequant_ref.c - the byte layout of every weight type, and the value of every element.
 *
 * All integers are little-endian, f16 stands for IEEE binary16, qs for packed quants. "nib" is
 * the usual order of 32 four-bit values in 16 bytes: element i is the low half of byte i for
 * i < 16, the high half of byte i - 16 after. Rules of the GGUF format:
 *
 *     type   elements bytes  layout                                              value
 *     Q4_0   32       18     f16 d, nib qs[16]                                   d (q - 8)
 *     Q4_1   32       20     f16 d, f16 min, nib qs[16]                          d q + min
 *     Q5_0   32       22     f16 d, u32 qh, nib qs[16]; bit i of qh is bit 4     d (q - 16)
 *     Q5_1   32       24     f16 d, f16 min, u32 qh, nib qs[16]                  d q + min
 *     Q8_0   32       34     f16 d, i8 qs[32]                                    d q
 *     Q4_K   256      144    f16 d, f16 dmin, u6 scales[12], qs[128]             d sc q - dmin mn
 *     Q5_K   256      176    f16 d, f16 dmin, u6 scales[12], qh[32], qs[128]     d sc q - dmin mn
 *     Q6_K   256      210    ql[128], qh[64], i8 sc[16], f16 d                   d sc (q - 32)
 *
 * Values are exact products rounded once, (d sc) q for Q6_K; the SIMD versions agree bit for bit.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/mm_q8.h"

#include <string.h>

static float f16_at(const uint8_t *p) { return kvf_f32_from_f16((kvf_f16)(p[0] | p[1] << 8)); }

static uint32_t u32_at(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* 32 values of 4 bits, or 5 with the bits of qh, less an offset. */
static void nibbles(const uint8_t *qs, uint32_t qh, int offset, int16_t *u)
{
    for (int i = 0; i < 16; i++) {
        int lo = (qs[i] & 15) | (int)(qh >> i & 1u) << 4;
        int hi = (qs[i] >> 4) | (int)(qh >> (i + 16) & 1u) << 4;
        u[i] = (int16_t)(lo - offset);
        u[i + 16] = (int16_t)(hi - offset);
    }
}

/* Eight 6-bit scales and eight 6-bit minima in 12 bytes: the first four of each are the low six
 * bits of bytes 0-3 and 4-7; the others have their low four bits in bytes 8-11 (scale low half,
 * minimum high half) and their high two in the top of bytes 0-3 and 4-7. */
static void k_scales(const uint8_t *p, float d, float dmin, kvf_wblock *b)
{
    for (int j = 0; j < 8; j++) {
        int sc, mn;
        if (j < 4) {
            sc = p[j] & 63;
            mn = p[j + 4] & 63;
        } else {
            sc = (p[j + 4] & 15) | (p[j - 4] >> 6) << 4;
            mn = (p[j + 4] >> 4) | (p[j] >> 6) << 4;
        }
        b->s[j] = d * (float)sc;
        b->m[j] = dmin * (float)mn;
    }
}

/* Q4_K and Q5_K: group 2g is the low halves of qs[32 g ..], group 2g + 1 the high halves; bit j
 * of qh[i] is bit 4 of element i of group j. */
static void k_quants(const uint8_t *qs, const uint8_t *qh, int16_t *u)
{
    for (int j = 0; j < 8; j++) {
        for (int i = 0; i < 32; i++) {
            int q = j & 1 ? qs[32 * (j / 2) + i] >> 4 : qs[32 * (j / 2) + i] & 15;
            if (qh) q |= (qh[i] >> j & 1) << 4;
            u[32 * j + i] = (int16_t)q;
        }
    }
}

/* Q6_K: two halves of 128, each four runs of 32. Runs 0 and 1 have their low four bits in the
 * low halves of ql[0..31] and ql[32..63], runs 2 and 3 in the high halves; bits 2r, 2r + 1 of
 * qh[i] are the high bits of element i of run r. A scale covers 16 elements, in order. */
static void q6_quants(const uint8_t *block, kvf_wblock *b)
{
    for (int half = 0; half < 2; half++) {
        const uint8_t *ql = block + 64 * half, *qh = block + 128 + 32 * half;
        for (int run = 0; run < 4; run++) {
            for (int i = 0; i < 32; i++) {
                int low = ql[32 * (run & 1) + i];
                low = run < 2 ? low & 15 : low >> 4;
                b->u[128 * half + 32 * run + i] = (int16_t)((low | (qh[i] >> 2 * run & 3) << 4) - 32);
            }
        }
    }
    float d = f16_at(block + 208);
    for (int j = 0; j < 16; j++) {
        int sc = block[192 + j];
        b->s[j] = d * (float)(sc < 128 ? sc : sc - 256);
    }
}

bool kvf_wblock_unpack(kvf_dtype type, const void *block, kvf_wblock *out)
{
    const uint8_t *p = block;
    out->n = type >= KVF_DTYPE_Q4_K ? 256 : 32;
    out->group = type == KVF_DTYPE_Q6_K ? 16 : 32;
    memset(out->m, 0, sizeof out->m);
    if (out->n == 32) out->s[0] = f16_at(p);
    switch (type) {
    case KVF_DTYPE_Q4_0: nibbles(p + 2, 0, 8, out->u); return true;
    case KVF_DTYPE_Q4_1:
        out->m[0] = -f16_at(p + 2);
        nibbles(p + 4, 0, 0, out->u);
        return true;
    case KVF_DTYPE_Q5_0: nibbles(p + 6, u32_at(p + 2), 16, out->u); return true;
    case KVF_DTYPE_Q5_1:
        out->m[0] = -f16_at(p + 2);
        nibbles(p + 8, u32_at(p + 4), 0, out->u);
        return true;
    case KVF_DTYPE_Q8_0:
        for (int i = 0; i < 32; i++) out->u[i] = (int16_t)(p[2 + i] < 128 ? p[2 + i] : p[2 + i] - 256);
        return true;
    case KVF_DTYPE_Q4_K:
        k_scales(p + 4, f16_at(p), f16_at(p + 2), out);
        k_quants(p + 16, NULL, out->u);
        return true;
    case KVF_DTYPE_Q5_K:
        k_scales(p + 4, f16_at(p), f16_at(p + 2), out);
        k_quants(p + 48, p + 16, out->u);
        return true;
    case KVF_DTYPE_Q6_K: q6_quants(p, out); return true;
    default: return false;
    }
}

void kvf_dequant_ref(kvf_dtype type, const void *src, float *dst, int64_t n)
{
    if (type == KVF_DTYPE_F32) {
        memcpy(dst, src, (size_t)n * sizeof *dst);
        return;
    }
    const uint8_t *p = src;
    if (type == KVF_DTYPE_F16) {
        for (int64_t i = 0; i < n; i++) dst[i] = f16_at(p + 2 * i);
        return;
    }
    if (type == KVF_DTYPE_BF16) {
        for (int64_t i = 0; i < n; i++) dst[i] = kvf_f32_from_bf16((kvf_bf16)(p[2 * i] | p[2 * i + 1] << 8));
        return;
    }
    size_t bytes = kvf_dtype_row_bytes(type, kvf_dtype_get(type)->block);
    kvf_wblock b;
    for (int64_t i = 0; i < n; i += b.n, p += bytes) {
        if (!kvf_wblock_unpack(type, p, &b)) return;
        for (int j = 0; j < b.n; j++) dst[i + j] = b.s[j / b.group] * (float)b.u[j] - b.m[j / b.group];
    }
}
