/* test_digest.c - the ops `digest` and `reps` against naive loops: short blocks, huge and constant
 * channels, ties. Their votes and their equality on every processor are in test_votes.c.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"

enum { N_HEAD = 14, N_HEAD_KV = 2, D = 64, GROUP = N_HEAD / N_HEAD_KV, KEYS = N_HEAD_KV * KVF_BLOCK * D };

static kvf_f16 slot[2 * KEYS]; /* keys, values */
static void *const slab[1] = { slot };
static const kvf_kv_view view = { .slab = slab, .slot_bytes = sizeof slot };
static uint64_t rng = 9;
static kvf_error err;

static float noise(void) /* -1..1 */
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(rng >> 32) * 0x1p-31f;
}

static float key(int32_t h, int32_t t, int32_t c) { return kvf_f32_from_f16(slot[(h * KVF_BLOCK + t) * D + c]); }

/* Channel 3 has the offset of a Qwen2 key bias, 5 never changes. Places past n_tok hold NaN. */
static void fill(int32_t n_tok)
{
    for (int32_t i = 0; i < KEYS; i++) {
        int32_t c = i % D, t = i / D % KVF_BLOCK;
        float x = c == 5 ? 0.25f : c == 3 ? 150.0f + noise() : 2.0f * noise();
        slot[i] = t < n_tok ? kvf_f16_from_f32(x) : 0x7e00;
    }
}

static kvf_threads *threads;

static kvf_backend *open_cpu(void)
{
    kvf_backend *b;
    static kvf_log log;
    cr_assert_eq(kvf_threads_open(&threads, 2, &kvf_mem_default, &err), KVF_OK);
    kvf_cpu_backend_params p = { .level = KVF_CPU_LEVEL_REF, .threads = threads, .mem = &kvf_mem_default, .log = &log };
    cr_assert_eq(kvf_cpu_backend_open(&b, &p, &err), KVF_OK);
    return b;
}

static void close_cpu(kvf_backend *b)
{
    b->ops->close(b);
    kvf_threads_close(threads);
}

static kvf_digest shape(kvf_digest g)
{
    g.n_head = N_HEAD, g.n_head_kv = N_HEAD_KV, g.head_dim = D;
    cr_assert(kvf_digest_valid(&g));
    return g;
}

static void make(kvf_backend *b, const kvf_digest *g, int32_t n_tok, void *out)
{
    kvf_digest_args a = { .kv = &view, .n_tok = n_tok, .digest = g, .out = out };
    cr_assert_eq(b->ops->digest(b, &a, 1, &err), KVF_OK);
}

static float half_at(const uint8_t *p, int32_t i)
{
    kvf_f16 x;
    memcpy(&x, p + 2 * i, 2);
    return kvf_f32_from_f16(x);
}

static void *get(size_t n)
{
    void *p = kvf_alloc(&kvf_mem_default, n, 1);
    cr_assert_not_null(p);
    return p;
}

Test(digest, a_short_block_is_one_whose_last_key_repeats)
{
    static const kvf_digest kinds[] = { { .kind = KVF_DIGEST_BITS, .bits = 1 }, { .kind = KVF_DIGEST_BITS, .bits = 2 }, { .kind = KVF_DIGEST_BITS, .bits = 4 },
                                        { .kind = KVF_DIGEST_MEAN, .sub = 16 }, { .kind = KVF_DIGEST_BOUNDS, .sub = 32 } };
    static const int32_t tokens[] = { 1, 2, 63, 64, 65, 127 };
    kvf_backend *b = open_cpu();
    for (int k = 0; k < 5; k++)
        for (int i = 0; i < 6; i++) {
            kvf_digest g = shape(kinds[k]);
            size_t bytes = kvf_digest_bytes(&g);
            uint8_t *part = get(bytes), *full = get(bytes);
            fill(tokens[i]);
            make(b, &g, tokens[i], part); /* reads no NaN */
            for (int32_t h = 0; h < N_HEAD_KV; h++)
                for (int32_t t = tokens[i]; t < KVF_BLOCK; t++)
                    memcpy(slot + (h * KVF_BLOCK + t) * D, slot + (h * KVF_BLOCK + tokens[i] - 1) * D, D * sizeof *slot);
            make(b, &g, KVF_BLOCK, full);
            cr_assert_arr_eq(part, full, bytes);
            kvf_free(&kvf_mem_default, part);
            kvf_free(&kvf_mem_default, full);
        }
    close_cpu(b);
}

Test(digest, each_code_names_the_nearest_level_and_a_constant_channel_is_exact)
{
    kvf_backend *b = open_cpu();
    fill(KVF_BLOCK);
    for (int32_t bits = 1; bits <= 4; bits *= 2) {
        kvf_digest g = shape((kvf_digest){ .kind = KVF_DIGEST_BITS, .bits = bits });
        uint8_t *out = get(kvf_digest_bytes(&g));
        make(b, &g, KVF_BLOCK, out);
        for (int32_t i = 0; i < N_HEAD_KV * KVF_BLOCK * D; i++) {
            int32_t c = i % D, t = i / D % KVF_BLOCK, h = i / D / KVF_BLOCK, bit;
            size_t byte, half = kvf_digest_head_bytes(&g) / 2;
            const uint8_t *at = out + (size_t)h * kvf_digest_head_bytes(&g) + (size_t)(t / KVF_DIGEST_GROUP) * half;
            kvf_digest_code_at(&g, t % KVF_DIGEST_GROUP, c, &byte, &bit);
            int32_t code = at[4 * D + byte] >> bit & ((1 << bits) - 1);
            float lo = half_at(at, c), step = half_at(at, D + c), x = key(h, t, c), off = fabsf(lo + (float)code * step - x);
            for (int32_t n = 0; n < 1 << bits; n++) cr_assert_leq(off, fabsf(lo + (float)n * step - x) + 1e-5f);
            if (c == 5) cr_assert_eq(lo + (float)code * step, 0.25f);
        }
        kvf_free(&kvf_mem_default, out);
    }
    close_cpu(b);
}

Test(digest, means_and_bounds_are_those_of_their_tokens)
{
    kvf_backend *b = open_cpu();
    fill(KVF_BLOCK);
    for (int32_t sub = 4; sub <= KVF_BLOCK; sub *= 2) {
        kvf_digest mean = shape((kvf_digest){ .kind = KVF_DIGEST_MEAN, .sub = sub }), bounds = shape((kvf_digest){ .kind = KVF_DIGEST_BOUNDS, .sub = sub });
        uint8_t *m = get(kvf_digest_bytes(&mean)), *o = get(kvf_digest_bytes(&bounds));
        make(b, &mean, KVF_BLOCK, m);
        make(b, &bounds, KVF_BLOCK, o);
        int32_t n = KVF_BLOCK / sub;
        for (int32_t i = 0; i < N_HEAD_KV * n * D; i++) {
            int32_t c = i % D, v = i / D % n, h = i / D / n;
            double sum = 0;
            float low = INFINITY, high = -INFINITY;
            for (int32_t t = v * sub; t < (v + 1) * sub; t++) {
                sum += (double)key(h, t, c);
                low = fminf(low, key(h, t, c)), high = fmaxf(high, key(h, t, c));
            }
            cr_assert_eq(half_at(m, i), kvf_f32_from_f16(kvf_f16_from_f32((float)(sum / sub))));
            cr_assert_eq(half_at(o, (2 * h * n + v) * D + c), low);
            cr_assert_eq(half_at(o, (2 * h * n + n + v) * D + c), high);
        }
        kvf_free(&kvf_mem_default, m);
        kvf_free(&kvf_mem_default, o);
    }
    close_cpu(b);
}

/* Mean over the r best tokens of a unit: a token is among them if fewer than r beat it, or equal it earlier. */
static double naive_rep(const double *s, int32_t sub, int32_t r, int32_t h, int32_t t0, int32_t c)
{
    double sum = 0;
    for (int32_t t = 0; t < sub; t++) {
        int32_t before = 0;
        for (int32_t o = 0; o < sub; o++) before += s[o] > s[t] || (s[o] == s[t] && o < t);
        if (before < r) sum += (double)key(h, t0 + t, c);
    }
    return sum / (r < sub ? r : sub);
}

Test(digest, representatives_are_the_mean_of_the_highest_scores_earlier_first)
{
    static float score[N_HEAD * KVF_BLOCK];
    kvf_backend *b = open_cpu();
    fill(KVF_BLOCK);
    for (int32_t i = 0; i < N_HEAD * KVF_BLOCK; i++) score[i] = floorf(noise() * 4.0f); /* many ties */
    for (int each = 0; each < 2; each++)
        for (int32_t sub = 16; sub <= KVF_BLOCK; sub *= 2)
            for (int32_t r = 1; r <= 64; r *= 4) { /* more than a unit has, too */
                kvf_digest g = shape((kvf_digest){ .kind = KVF_DIGEST_REPS, .sub = sub, .reps_per_q_head = each });
                float *out = get(kvf_digest_bytes(&g)), *at = out;
                kvf_reps_args a = { .kv = &view, .r = r, .digest = &g, .score = score, .out = out };
                cr_assert_eq(b->ops->reps(b, &a, &err), KVF_OK);
                for (int32_t h = 0; h < N_HEAD_KV; h++)
                    for (int32_t u = 0; u < KVF_BLOCK / sub; u++)
                        for (int32_t v = 0; v < (each ? GROUP : 1); v++) {
                            double s[KVF_BLOCK] = { 0 };
                            for (int32_t t = 0; t < sub; t++)
                                for (int32_t q = each ? v : 0; q < (each ? v + 1 : GROUP); q++) s[t] += (double)score[(h * GROUP + q) * KVF_BLOCK + u * sub + t];
                            for (int32_t c = 0; c < D; c++, at++)
                                cr_assert_float_eq(*at, (float)naive_rep(s, sub, r, h, u * sub, c), 1e-4f);
                        }
                kvf_free(&kvf_mem_default, out);
            }
    close_cpu(b);
}
