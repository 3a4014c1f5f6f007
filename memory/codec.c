/* codec.c - see codec.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "memory/codec.h"

#include <math.h>
#include <string.h>

#include "backend/backend.h"
#include "base/half.h"

#define F16_MAX 65504.0f
#define RUN ((size_t)64)

static size_t head_elems(const kvf_block_codec *c) { return (size_t)KVF_BLOCK * (size_t)c->head_dim; }

size_t kvf_codec_bytes(const kvf_block_codec *c)
{
    size_t heads = (size_t)c->n_head_kv;
    if (c->codec == KVF_CODEC_F16) return heads * head_elems(c) * 4;
    return heads * (2 * head_elems(c) + 4 * (size_t)c->head_dim + 4 * KVF_BLOCK);
}

/* Without branches, so that the compiler makes vectors of it; x is finite and within f16's range. */
static inline uint16_t half_of(float x)
{
    uint32_t u = kvf_f32_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
    uint32_t tiny = kvf_f32_bits(kvf_f32_from_bits(a) + 0.5f) - 0x3f000000u;
    return (uint16_t)(sign | (a < 0x38800000u ? tiny : normal));
}

static float finite(uint16_t h)
{
    float f = kvf_f32_from_f16(h);
    if (f != f) return 0;
    return f > F16_MAX ? F16_MAX : f < -F16_MAX ? -F16_MAX : f;
}

static int8_t code_of(float x, float inverse)
{
    float q = x * inverse;
    return (int8_t)(q < 0 ? q - 0.5f : q + 0.5f);
}

static void encode_keys(const kvf_block_codec *c, const uint8_t *in, int32_t n_tok, uint8_t *out)
{
    size_t d = (size_t)c->head_dim;
    int8_t *codes = (int8_t *)out + 4 * d;
    memset(codes, 0, head_elems(c));
    for (size_t e = 0; e < d; e++) {
        float top = 0;
        for (int32_t t = 0; t < n_tok; t++) {
            uint16_t h;
            memcpy(&h, in + ((size_t)t * d + e) * 2, 2);
            float a = fabsf(finite(h));
            top = a > top ? a : top;
        }
        float scale = top / 127, inverse = top > 0 ? 127 / top : 0;
        memcpy(out + 4 * e, &scale, 4);
        for (int32_t t = 0; t < n_tok; t++) {
            uint16_t h;
            memcpy(&h, in + ((size_t)t * d + e) * 2, 2);
            codes[(size_t)t * d + e] = code_of(finite(h), inverse);
        }
    }
}

static void encode_values(const kvf_block_codec *c, const uint8_t *in, int32_t n_tok, uint8_t *out)
{
    size_t d = (size_t)c->head_dim;
    int8_t *codes = (int8_t *)out + 4 * KVF_BLOCK;
    memset(out, 0, 4 * KVF_BLOCK + head_elems(c));
    for (int32_t t = 0; t < n_tok; t++) {
        const uint8_t *row = in + (size_t)t * d * 2;
        float top = 0;
        uint16_t h;
        for (size_t e = 0; e < d; e++) {
            memcpy(&h, row + 2 * e, 2);
            float a = fabsf(finite(h));
            top = a > top ? a : top;
        }
        float scale = top / 127, inverse = top > 0 ? 127 / top : 0;
        memcpy(out + 4 * (size_t)t, &scale, 4);
        for (size_t e = 0; e < d; e++) {
            memcpy(&h, row + 2 * e, 2);
            codes[(size_t)t * d + e] = code_of(finite(h), inverse);
        }
    }
}

void kvf_codec_encode(const kvf_block_codec *c, const void *slot, int32_t n_tok, void *out)
{
    size_t heads = (size_t)c->n_head_kv, half = head_elems(c) * 2, row = (size_t)c->head_dim * 2;
    const uint8_t *in = slot;
    uint8_t *to = out;
    for (size_t i = 0; i < 2 * heads; i++, in += half) {
        if (c->codec == KVF_CODEC_F16) {
            memcpy(to, in, (size_t)n_tok * row);
            memset(to + (size_t)n_tok * row, 0, half - (size_t)n_tok * row);
            to += half;
        } else if (i < heads) {
            encode_keys(c, in, n_tok, to);
            to += 4 * (size_t)c->head_dim + head_elems(c);
        } else {
            encode_values(c, in, n_tok, to);
            to += 4 * KVF_BLOCK + head_elems(c);
        }
    }
}

/* A damaged scale cannot come here (checksum); a wild one in a made-up file stays within f16. */
static float scale_at(const uint8_t *p, size_t i)
{
    float s;
    memcpy(&s, p + 4 * i, 4);
    return s >= 0 && s <= F16_MAX / 127 ? s : s > 0 ? F16_MAX / 128 : 0;
}

static void decode_row(uint16_t *restrict out, const int8_t *restrict codes, const float *restrict scale, size_t n)
{
    for (size_t e = 0; e < n; e++) out[e] = half_of((float)codes[e] * scale[e]);
}

/* In runs of channels, so that their scales stay at hand. */
static void decode_keys(const kvf_block_codec *c, const uint8_t *p, uint16_t *out)
{
    size_t d = (size_t)c->head_dim;
    const int8_t *codes = (const int8_t *)p + 4 * d;
    for (size_t first = 0; first < d; first += RUN) {
        float s[RUN];
        size_t n = d - first < RUN ? d - first : RUN;
        for (size_t e = 0; e < n; e++) s[e] = scale_at(p, first + e);
        for (size_t t = 0; t < KVF_BLOCK; t++) decode_row(out + t * d + first, codes + t * d + first, s, n);
    }
}

void kvf_codec_decode(const kvf_block_codec *c, const void *in, void *slot)
{
    size_t heads = (size_t)c->n_head_kv, d = (size_t)c->head_dim;
    if (c->codec == KVF_CODEC_F16) {
        memcpy(slot, in, kvf_codec_bytes(c));
        return;
    }
    const uint8_t *p = in;
    uint16_t *out = slot;
    for (size_t i = 0; i < heads; i++, p += 4 * d + head_elems(c), out += head_elems(c)) decode_keys(c, p, out);
    for (size_t i = 0; i < heads; i++, p += 4 * KVF_BLOCK + head_elems(c), out += head_elems(c)) {
        const int8_t *codes = (const int8_t *)p + 4 * KVF_BLOCK;
        for (size_t t = 0; t < KVF_BLOCK; t++) {
            float s[RUN], one = scale_at(p, t);
            for (size_t e = 0; e < RUN; e++) s[e] = one;
            for (size_t first = 0; first < d; first += RUN)
                decode_row(out + t * d + first, codes + t * d + first, s, d - first < RUN ? d - first : RUN);
        }
    }
}
