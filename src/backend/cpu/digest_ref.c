/* digest_ref.c - digests and representatives of a block's raw keys (base/digest.h): the definition, and
 * the only code there is for them. What a store keeps must not depend on the processor that made it, so
 * there is one version, in double where a sum is involved, and no product is fused with a sum.
 *
 * BITS: 2^n levels around the mean, `step` standard deviations apart. The step is the one with the least
 * squared error for a normal distribution (Max 1960, Quantizing for minimum distortion): 1.596, 0.996
 * and 0.335 deviations for 2, 4 and 16 levels. Against levels from minimum to maximum the ranking by
 * q . k is better as soon as a group holds outliers: they clip instead of widening all steps.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_ops.h"
#include "backend/cpu/digest_ref.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

typedef struct channel {
    double mean, dev;
    float min, max;
} channel;

/* Tokens t0..t1 of one channel; the last key stands for tokens past n_tok. */
static channel look(const kvf_f16 *k, int32_t d, int32_t c, int32_t t0, int32_t t1, int32_t n_tok)
{
    channel s = { 0, 0, INFINITY, -INFINITY };
    for (int32_t t = t0; t < t1; t++) {
        float x = kvf_f32_from_f16(k[(t < n_tok ? t : n_tok - 1) * d + c]);
        s.mean += (double)x;
        if (x < s.min) s.min = x;
        if (x > s.max) s.max = x;
    }
    s.mean /= t1 - t0;
    for (int32_t t = t0; t < t1; t++) {
        double x = (double)kvf_f32_from_f16(k[(t < n_tok ? t : n_tok - 1) * d + c]) - s.mean;
        double square = x * x;
        s.dev += square;
    }
    s.dev = sqrt(s.dev / (t1 - t0));
    return s;
}

static float f16_round(double x)
{
    float f = (float)x;
    if (f > 65504.0f) f = 65504.0f;
    if (f < -65504.0f) f = -65504.0f;
    return kvf_f32_from_f16(kvf_f16_from_f32(f));
}

static void digest_bits(const kvf_digest *g, const kvf_f16 *k, int32_t n_tok, uint8_t *out)
{
    static const double spread[5] = { 0, 1.596, 0.996, 0, 0.335 };
    int32_t d = g->head_dim, top = (1 << g->bits) - 1;
    size_t codes = (size_t)KVF_DIGEST_GROUP * (size_t)d * (size_t)g->bits / 8;
    for (int32_t t0 = 0; t0 < KVF_DIGEST_BLOCK; t0 += KVF_DIGEST_GROUP, out += 4 * (size_t)d + codes) {
        uint8_t *code = out + 4 * (size_t)d;
        memset(code, 0, codes);
        for (int32_t c = 0; c < d; c++) {
            channel s = look(k, d, c, t0, t0 + KVF_DIGEST_GROUP, n_tok);
            float step = f16_round(s.dev * spread[g->bits]);
            double below = (double)step * top / 2;
            float lo = f16_round(s.mean - below);
            kvf_f16 two[2] = { kvf_f16_from_f32(lo), kvf_f16_from_f32(step) };
            memcpy(out + 2 * c, &two[0], 2);
            memcpy(out + 2 * (d + c), &two[1], 2);
            for (int32_t t = 0; t < KVF_DIGEST_GROUP; t++) {
                int32_t from = t0 + t < n_tok ? t0 + t : n_tok - 1;
                double x = step > 0 ? ((double)kvf_f32_from_f16(k[from * d + c]) - (double)lo) / (double)step : 0;
                int32_t n = x > 0 ? (int32_t)(x < top ? x + 0.5 : top) : 0, bit;
                size_t at;
                kvf_digest_code_at(g, t, c, &at, &bit);
                code[at] |= (uint8_t)(n << bit);
            }
        }
    }
}

static void digest_vectors(const kvf_digest *g, const kvf_f16 *k, int32_t n_tok, kvf_f16 *out)
{
    int32_t d = g->head_dim, n = KVF_DIGEST_BLOCK / g->sub;
    for (int32_t i = 0; i < n; i++) {
        for (int32_t c = 0; c < d; c++) {
            channel s = look(k, d, c, i * g->sub, (i + 1) * g->sub, n_tok);
            if (g->kind == KVF_DIGEST_MEAN) {
                out[i * d + c] = kvf_f16_from_f32((float)s.mean);
            } else {
                out[i * d + c] = kvf_f16_from_f32(s.min);
                out[(n + i) * d + c] = kvf_f16_from_f32(s.max);
            }
        }
    }
}

void kvf_digest_head(const kvf_digest *g, const kvf_f16 *k, int32_t n_tok, void *out)
{
    if (g->kind == KVF_DIGEST_BITS)
        digest_bits(g, k, n_tok, out);
    else
        digest_vectors(g, k, n_tok, out);
}

/* Mean of the r tokens of k [sub][d] with the highest score; ties go to the earlier. */
static void mean_of_best(const kvf_f16 *k, const double *score, const kvf_digest *g, int32_t r, float *out)
{
    bool taken[KVF_DIGEST_BLOCK] = { false };
    int32_t d = g->head_dim, n = r < g->sub ? r : g->sub;
    double sum[256];
    for (int32_t c = 0; c < d; c++) sum[c % 256] = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t best = -1;
        for (int32_t t = 0; t < g->sub; t++)
            if (!taken[t] && (best < 0 || score[t] > score[best])) best = t;
        taken[best] = true;
        for (int32_t c = 0; c < d; c++) sum[c] += (double)kvf_f32_from_f16(k[best * d + c]);
    }
    for (int32_t c = 0; c < d; c++) out[c] = (float)(sum[c] / n);
}

void kvf_reps_head(const kvf_digest *g, const kvf_f16 *k, const float *score, int32_t r, float *out)
{
    int32_t group = g->n_head / g->n_head_kv, n_vec = g->reps_per_q_head ? group : 1, d = g->head_dim;
    for (int32_t u = 0; u < KVF_DIGEST_BLOCK / g->sub; u++) {
        for (int32_t v = 0; v < n_vec; v++, out += d) {
            double s[KVF_DIGEST_BLOCK];
            for (int32_t t = 0; t < g->sub; t++) {
                s[t] = 0;
                for (int32_t h = n_vec > 1 ? v : 0; h < (n_vec > 1 ? v + 1 : group); h++)
                    s[t] += (double)score[h * KVF_DIGEST_BLOCK + u * g->sub + t];
            }
            mean_of_best(k + u * g->sub * d, s, g, r, out);
        }
    }
}
