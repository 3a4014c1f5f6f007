/* half.h - f16 and bf16 as bits, converted in software: exact, round to nearest even, on every
 * processor. SIMD kernels use the processor's own conversions, which agree bit for bit (NaN
 * payloads excepted).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_HALF_H
#define KVF_BASE_HALF_H

#include <stdint.h>
#include <string.h>

typedef uint16_t kvf_f16;  /* IEEE binary16 */
typedef uint16_t kvf_bf16; /* upper half of binary32 */

static inline float kvf_f32_from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint32_t kvf_f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float kvf_f32_from_bf16(kvf_bf16 b)
{
    return kvf_f32_from_bits((uint32_t)b << 16);
}

static inline kvf_bf16 kvf_bf16_from_f32(float f)
{
    uint32_t u = kvf_f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (kvf_bf16)((u >> 16) | 0x40u); /* quiet NaN */
    return (kvf_bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float kvf_f32_from_f16(kvf_f16 h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 0x1fu, man = h & 0x3ffu;
    if (exp == 0x1fu) return kvf_f32_from_bits(sign | 0x7f800000u | (man << 13));
    if (exp != 0) return kvf_f32_from_bits(sign | ((exp + 112u) << 23) | (man << 13));
    float tiny = (float)man * 0x1p-24f; /* subnormal: exact in f32 */
    return sign ? -tiny : tiny;
}

static inline kvf_f16 kvf_f16_from_f32(float f)
{
    uint32_t u = kvf_f32_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (kvf_f16)(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
    if (a >= 0x477ff000u) return (kvf_f16)(sign | 0x7c00u); /* rounds to infinity */
    if (a < 0x38800000u) {
        /* Subnormal: adding 0.5 puts the unit of the last place where f16 has it. */
        float r = kvf_f32_from_bits(a) + 0.5f;
        return (kvf_f16)(sign | (kvf_f32_bits(r) - 0x3f000000u));
    }
    a += 0xfffu + ((a >> 13) & 1u);
    return (kvf_f16)(sign | ((a - 0x38000000u) >> 13));
}

#endif
