/* sampler.c - see sampler.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/sampler.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct candidate {
    float logit, p;
    kvf_token id;
} candidate;

struct kvf_sampler {
    const kvf_mem *mem;
    kvf_sampling params;
    uint64_t random[4]; /* xoshiro256** state */
    int32_t n_vocab;
    candidate *c; /* [n_vocab] */
    float *logits; /* [n_vocab] after the penalty */
};

void kvf_sampling_default(kvf_sampling *s)
{
    *s = (kvf_sampling){ .temperature = 0, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1,
                         .repeat_last_n = 64, .seed = 0 };
}

kvf_status kvf_sampling_check(const kvf_sampling *s, kvf_error *err)
{
    if (!(s->temperature >= 0 && s->temperature <= 100))
        return kvf_fail(err, KVF_ERR_ARG, "temperature is %g; use 0 (greedy) to 100", (double)s->temperature);
    if (s->top_k < 0) return kvf_fail(err, KVF_ERR_ARG, "top_k is %d; use 0 (all) or more", s->top_k);
    if (!(s->top_p >= 0 && s->top_p <= 1)) return kvf_fail(err, KVF_ERR_ARG, "top_p is %g; use 0 to 1", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1)) return kvf_fail(err, KVF_ERR_ARG, "min_p is %g; use 0 to 1", (double)s->min_p);
    if (!(s->repeat_penalty > 0 && s->repeat_penalty <= 100))
        return kvf_fail(err, KVF_ERR_ARG, "repeat_penalty is %g; use more than 0, up to 100; 1 is none",
                        (double)s->repeat_penalty);
    if (s->repeat_last_n < -1) return kvf_fail(err, KVF_ERR_ARG, "repeat_last_n is %d; use -1 (all), 0 (none) or more", s->repeat_last_n);
    return KVF_OK;
}

/* splitmix64 spreads any seed, 0 included, over the state [Blackman and Vigna, xoshiro256**]. */
static void seed_random(kvf_sampler *s, uint64_t seed)
{
    for (int i = 0; i < 4; i++) {
        uint64_t z = (seed += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        s->random[i] = z ^ (z >> 31);
    }
}

static uint64_t rotl(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

/* Uniform in [0, 1). */
static double next_uniform(kvf_sampler *s)
{
    uint64_t *r = s->random, result = rotl(r[1] * 5, 7) * 9, t = r[1] << 17;
    r[2] ^= r[0];
    r[3] ^= r[1];
    r[1] ^= r[2];
    r[0] ^= r[3];
    r[2] ^= t;
    r[3] = rotl(r[3], 45);
    return (double)(result >> 11) * 0x1p-53;
}

void kvf_sampler_set(kvf_sampler *s, const kvf_sampling *params)
{
    s->params = *params;
    seed_random(s, params->seed);
}

kvf_status kvf_sampler_open(kvf_sampler **out, const kvf_sampling *params, int32_t n_vocab, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_sampler), err));
    kvf_sampler *s = block;
    s->mem = mem;
    s->n_vocab = n_vocab;
    kvf_sampler_set(s, params);
    kvf_status rc = kvf_mem_get(mem, &block, (size_t)n_vocab, sizeof(candidate), err);
    s->c = block;
    if (rc >= 0) {
        rc = kvf_mem_get(mem, &block, (size_t)n_vocab, sizeof(float), err);
        s->logits = block;
    }
    if (rc < 0) {
        kvf_sampler_close(s);
        return rc;
    }
    *out = s;
    return KVF_OK;
}

void kvf_sampler_close(kvf_sampler *s)
{
    if (!s) return;
    kvf_free(s->mem, s->c);
    kvf_free(s->mem, s->logits);
    kvf_free(s->mem, s);
}

/* A token seen before becomes less likely: a positive logit is divided, a negative multiplied
 * [Keskar et al., arXiv:1909.05858, sec. 4.1], once however often it was seen. */
static void penalise(kvf_sampler *s, const float *logits, const kvf_token *history, int64_t n)
{
    int64_t look = s->params.repeat_last_n < 0 || s->params.repeat_last_n > n ? n : s->params.repeat_last_n;
    memcpy(s->logits, logits, (size_t)s->n_vocab * sizeof(float));
    for (int64_t i = n - look; i < n; i++) {
        if (history[i] < 0) continue; /* an embedding stands there */
        float from = logits[history[i]];
        s->logits[history[i]] = from > 0 ? from / s->params.repeat_penalty : from * s->params.repeat_penalty;
    }
}

static kvf_token best(const float *logits, int32_t n)
{
    int32_t at = 0;
    float top = -INFINITY;
    for (int32_t i = 0; i < n; i++)
        if (logits[i] > top) top = logits[at = i];
    return at;
}

static bool before(const candidate *a, const candidate *b)
{
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static int by_rank(const void *a, const void *b)
{
    return before(a, b) ? -1 : before(b, a) ? 1 : 0;
}

/* The k best of logits into s->c, sorted. A heap whose root is the worst kept: most of the
 * vocabulary is turned away by one comparison. */
static int32_t take_top(kvf_sampler *s, const float *logits, int32_t k)
{
    candidate *c = s->c;
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_vocab; i++) {
        candidate x = { logits[i], 0, i };
        if (!(x.logit > -INFINITY)) continue; /* NaN too */
        if (n < k) {
            int32_t at = n++;
            for (; at > 0 && before(&c[(at - 1) / 2], &x); at = (at - 1) / 2) c[at] = c[(at - 1) / 2];
            c[at] = x;
            continue;
        }
        if (!before(&x, &c[0])) continue;
        int32_t at = 0;
        for (;;) {
            int32_t kid = 2 * at + 1;
            if (kid >= n) break;
            if (kid + 1 < n && before(&c[kid], &c[kid + 1])) kid++;
            if (!before(&x, &c[kid])) break;
            c[at] = c[kid];
            at = kid;
        }
        c[at] = x;
    }
    qsort(c, (size_t)n, sizeof *c, by_rank);
    return n;
}

static double softmax(candidate *c, int32_t n, float temperature)
{
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += c[i].p = expf((c[i].logit - c[0].logit) / temperature);
    return sum;
}

/* How many of the sorted candidates top_p and min_p leave, at least one. */
static int32_t cut(const kvf_sampling *p, candidate *c, int32_t n)
{
    double sum = softmax(c, n, 1), seen = 0;
    int32_t kept = 0;
    while (kept < n && (kept == 0 || seen < p->top_p * sum) && (kept == 0 || c[kept].p >= p->min_p * c[0].p))
        seen += c[kept++].p;
    return kept;
}

kvf_token kvf_sampler_pick(kvf_sampler *s, const float *logits, const kvf_token *history, int64_t n_history)
{
    const kvf_sampling *p = &s->params;
    if (p->repeat_penalty != 1 && p->repeat_last_n != 0) {
        penalise(s, logits, history, n_history);
        logits = s->logits;
    }
    if (p->temperature == 0) return best(logits, s->n_vocab);
    int32_t k = p->top_k > 0 && p->top_k < s->n_vocab ? p->top_k : s->n_vocab;
    int32_t n = take_top(s, logits, k);
    if (n == 0) return best(logits, s->n_vocab);
    n = cut(p, s->c, n);
    double at = next_uniform(s) * softmax(s->c, n, p->temperature);
    for (int32_t i = 0; i < n; i++)
        if ((at -= s->c[i].p) < 0) return s->c[i].id;
    return s->c[n - 1].id;
}
