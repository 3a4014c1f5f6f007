/* test_sampler.c - the sampler against its definition: shares drawn, cuts, penalty, ties, NaN.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#include "model/sampler.h"

enum { V = 50 };

static kvf_sampler *open_with(kvf_sampling p)
{
    kvf_sampler *s;
    cr_assert_eq(kvf_sampling_check(&p, NULL), KVF_OK);
    cr_assert_eq(kvf_sampler_open(&s, &p, V, &kvf_mem_default, NULL), KVF_OK);
    return s;
}

static kvf_sampling plain(float temperature)
{
    return (kvf_sampling){ .temperature = temperature, .top_k = 0, .top_p = 1, .min_p = 0, .repeat_penalty = 1 };
}

static void ramp(float logits[V])
{
    for (int i = 0; i < V; i++) logits[i] = -0.2f * (float)((i * 7) % V);
}

/* Draw often; every token's share must be within five standard deviations of want[i]. */
static void check_shares(kvf_sampling p, const double want[V])
{
    enum { N = 40000 };
    float logits[V];
    int count[V] = { 0 };
    ramp(logits);
    kvf_sampler *s = open_with(p);
    for (int i = 0; i < N; i++) count[kvf_sampler_pick(s, logits, NULL, 0)]++;
    for (int i = 0; i < V; i++) {
        double sd = sqrt(want[i] * (1 - want[i]) * N) + 1;
        cr_assert(fabs(count[i] - want[i] * N) < 5 * sd, "token %d: %d drawn, %g expected", i, count[i], want[i] * N);
    }
    kvf_sampler_close(s);
}

static void normalise(double p[V])
{
    double sum = 0;
    for (int i = 0; i < V; i++) sum += p[i];
    for (int i = 0; i < V; i++) p[i] /= sum;
}

Test(sampler, temperature_draws_the_softmax)
{
    float logits[V];
    double want[V];
    ramp(logits);
    for (int i = 0; i < V; i++) want[i] = exp(logits[i] / 0.7);
    normalise(want);
    check_shares(plain(0.7f), want);
}

Test(sampler, top_k_keeps_exactly_k)
{
    float logits[V];
    double want[V] = { 0 };
    ramp(logits);
    for (int i = 0; i < V; i++)
        if (logits[i] > -0.2f * 5 + 0.01f) want[i] = exp(logits[i]);
    normalise(want);
    kvf_sampling p = plain(1);
    p.top_k = 5;
    check_shares(p, want);
}

Test(sampler, top_p_keeps_the_smallest_set_that_reaches_it)
{
    float logits[V];
    double all[V], want[V] = { 0 }, sum = 0;
    ramp(logits);
    for (int i = 0; i < V; i++) all[i] = exp(logits[i]);
    normalise(all);
    for (int rank = 0; rank < V && sum < 0.6; rank++)
        for (int i = 0; i < V; i++)
            if ((i * 7) % V == rank) sum += want[i] = all[i];
    normalise(want);
    kvf_sampling p = plain(1);
    p.top_p = 0.6f;
    check_shares(p, want);
}

Test(sampler, min_p_is_relative_to_the_best)
{
    float logits[V];
    double want[V] = { 0 };
    ramp(logits);
    for (int i = 0; i < V; i++)
        if (exp(logits[i]) >= 0.3) want[i] = exp(logits[i]);
    normalise(want);
    kvf_sampling p = plain(1);
    p.min_p = 0.3f;
    check_shares(p, want);
}

Test(sampler, greedy_takes_the_best_and_the_first_of_equals)
{
    float logits[V] = { 0 };
    kvf_sampler *s = open_with(plain(0));
    cr_assert_eq(kvf_sampler_pick(s, logits, NULL, 0), 0);
    logits[30] = logits[17] = 1;
    cr_assert_eq(kvf_sampler_pick(s, logits, NULL, 0), 17);
    kvf_sampler_close(s);
}

Test(sampler, penalty_divides_positive_and_multiplies_negative_once)
{
    float logits[V];
    for (int i = 0; i < V; i++) logits[i] = -10;
    logits[3] = 2;
    logits[4] = 1.5f;
    logits[5] = 1.1f;
    kvf_sampling p = plain(0);
    p.repeat_penalty = 1.5f;
    p.repeat_last_n = 2;
    kvf_sampler *s = open_with(p);
    kvf_token seen[] = { 4, 3, 3 };
    cr_assert_eq(kvf_sampler_pick(s, logits, seen, 3), 4); /* 3 fell to 1.33, 4 is out of sight */
    p.repeat_last_n = -1;
    kvf_sampler_set(s, &p);
    cr_assert_eq(kvf_sampler_pick(s, logits, seen, 3), 3); /* 4 fell to 1.0 */
    for (int i = 0; i < V; i++) logits[i] = -10;
    logits[7] = -1;
    logits[8] = -1.2f;
    kvf_token seven[] = { 7 };
    cr_assert_eq(kvf_sampler_pick(s, logits, seven, 1), 8); /* -1.5 */
    kvf_sampler_close(s);
}

Test(sampler, same_seed_same_tokens_and_another_seed_others)
{
    float logits[V];
    ramp(logits);
    kvf_sampling p = plain(1);
    p.seed = 42;
    kvf_sampler *a = open_with(p), *b = open_with(p);
    p.seed = 43;
    kvf_sampler *c = open_with(p);
    int differ = 0;
    for (int i = 0; i < 200; i++) {
        kvf_token x = kvf_sampler_pick(a, logits, NULL, 0);
        cr_assert_eq(x, kvf_sampler_pick(b, logits, NULL, 0));
        differ += x != kvf_sampler_pick(c, logits, NULL, 0);
    }
    cr_assert_gt(differ, 50);
    kvf_sampler_close(a);
    kvf_sampler_close(b);
    kvf_sampler_close(c);
}

Test(sampler, nan_and_minus_infinity_are_never_drawn)
{
    float logits[V];
    kvf_sampler *s = open_with(plain(1)), *g = open_with(plain(0));
    for (int i = 0; i < V; i++) logits[i] = i % 2 ? NAN : -INFINITY;
    logits[12] = -3;
    logits[14] = -4;
    for (int i = 0; i < 100; i++) {
        kvf_token t = kvf_sampler_pick(s, logits, NULL, 0);
        cr_assert(t == 12 || t == 14);
    }
    cr_assert_eq(kvf_sampler_pick(g, logits, NULL, 0), 12);
    for (int i = 0; i < V; i++) logits[i] = NAN;
    kvf_token t = kvf_sampler_pick(s, logits, NULL, 0);
    cr_assert(t >= 0 && t < V);
    kvf_sampler_close(s);
    kvf_sampler_close(g);
}

Test(sampler, bad_parameters_are_named)
{
    kvf_error err;
    kvf_sampling p = plain(-1);
    cr_assert_eq(kvf_sampling_check(&p, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "temperature"));
    p = plain(NAN);
    cr_assert_eq(kvf_sampling_check(&p, &err), KVF_ERR_ARG);
    p = plain(1);
    p.top_p = 1.5f;
    cr_assert_eq(kvf_sampling_check(&p, &err), KVF_ERR_ARG);
    p = plain(1);
    p.repeat_penalty = 0;
    cr_assert_eq(kvf_sampling_check(&p, &err), KVF_ERR_ARG);
    p = plain(1);
    p.top_k = -3;
    cr_assert_eq(kvf_sampling_check(&p, &err), KVF_ERR_ARG);
    p = plain(1);
    p.repeat_last_n = -2;
    cr_assert_eq(kvf_sampling_check(&p, &err), KVF_ERR_ARG);
}
