/* test_merge_segment.c - the segmentation against every partition there is, what is settled against all that
 * may come, and the choice of the k largest.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/merge_rig.h"

#include "merge/segment.h"
#include "merge/select.h"

/* g(s, e) by its definition. */
static int64_t gain_of(const float *sim, int64_t n, float tau, int64_t s, int64_t e)
{
    int64_t count = 0;
    for (int64_t k = 0; k < n; k++) {
        bool still = true;
        for (int64_t t = s; t < e; t++) still &= sim[t * n + k] > tau;
        count += still;
    }
    return count * (e - s);
}

/* The best of all 2^(t-1) partitions into segments of at most `window` frames. */
static int64_t brute(const float *sim, int64_t t, int64_t n, int64_t window, float tau)
{
    int64_t best = -1;
    for (uint32_t cuts = 0; cuts < 1u << (t - 1); cuts++) {
        int64_t gain = 0, first = 0, longest = 0;
        for (int64_t i = 0; i < t; i++) {
            if (i + 1 < t && !(cuts >> i & 1)) continue;
            gain += gain_of(sim, n, tau, first, i);
            longest = i - first + 1 > longest ? i - first + 1 : longest;
            first = i + 1;
        }
        if (longest <= window && gain > best) best = gain;
    }
    return best;
}

static void feed(kvf_segmenter *s, const float *sim, int64_t t, int64_t n, int64_t window, double tau)
{
    cr_assert_eq(kvf_segmenter_init(s, &kvf_mem_default, n, window, tau, NULL), KVF_OK);
    for (int64_t i = 0; i < t; i++)
        cr_assert_eq(kvf_segmenter_add(s, i ? sim + (i - 1) * n : NULL, NULL), KVF_OK);
}

static void some_sims(rng *r, float *sim, int64_t n, int64_t kind)
{
    for (int64_t i = 0; i < n; i++)
        sim[i] = kind == 0 ? rnd_sign(r) : (float)(rnd(r) % 10) / 10.0f; /* ties at tau */
}

Test(merge_segment, gain_is_that_of_the_best_partition)
{
    rng r = { 11 };
    float sim[9 * 6];
    for (int round = 0; round < 400; round++) {
        int64_t t = 1 + rnd(&r) % 10, n = 1 + rnd(&r) % 6, window = 1 + rnd(&r) % 11;
        some_sims(&r, sim, (t - 1) * n, round % 2);
        float tau = round % 2 ? 0.3f : -0.2f;
        kvf_segmenter s;
        int32_t out[20];
        feed(&s, sim, t, n, window, (double)tau);
        int64_t count = kvf_segmenter_trace(&s, t - 1, out), gain = 0, next = 0;
        for (int64_t i = 0; i < count; i++) {
            cr_assert_eq(out[2 * i], next);
            cr_assert_leq(out[2 * i + 1] - out[2 * i] + 1, window);
            gain += gain_of(sim, n, tau, out[2 * i], out[2 * i + 1]);
            next = out[2 * i + 1] + 1;
        }
        cr_assert_eq(next, t);
        cr_assert_eq(gain, s.best[t - 1]);
        cr_assert_eq(gain, brute(sim, t, n, window, tau), "round %d", round);
        kvf_segmenter_fini(&s);
    }
}

/* What is settled never changes, whatever comes, and committing it changes nothing of the rest. */
Test(merge_segment, what_is_settled_stays)
{
    rng r = { 12 };
    enum { T = 60, N = 5 };
    float sim[T * N];
    int64_t n_early = 0;
    for (int round = 0; round < 300; round++) {
        int64_t window = 1 + rnd(&r) % 20;
        for (int64_t i = 0; i < T * N; i++)
            sim[i] = rnd(&r) % 100 < (uint32_t)(50 + round % 45) ? 1.0f : 0.0f;
        kvf_segmenter all, s;
        int32_t want[2 * T], got[2 * T], part[2 * T];
        feed(&all, sim, T, N, window, 0.5);
        int64_t n_want = kvf_segmenter_trace(&all, T - 1, want), n_got = 0, base = 0;
        feed(&s, sim, 0, N, window, 0.5);
        for (int64_t t = 0; t < T; t++) {
            cr_assert_eq(kvf_segmenter_add(&s, t ? sim + (t - 1) * N : NULL, NULL), KVF_OK);
            int64_t end = kvf_segmenter_settled(&s);
            if (t == T - 1) end = s.n_frame - 1;
            if (end < 0) continue;
            cr_assert(end < s.n_frame);
            int64_t n = kvf_segmenter_trace(&s, end, part);
            for (int64_t i = 0; i < n; i++, n_got++) {
                got[2 * n_got] = (int32_t)(part[2 * i] + base);
                got[2 * n_got + 1] = (int32_t)(part[2 * i + 1] + base);
            }
            if (t == T - 1) break;
            n_early += n;
            base += end + 1;
            kvf_segmenter_commit(&s, end);
        }
        cr_assert_eq(n_got, n_want, "round %d", round);
        cr_assert_arr_eq(got, want, (size_t)n_want * 8, "round %d", round);
        kvf_segmenter_fini(&all);
        kvf_segmenter_fini(&s);
    }
    cr_assert_gt(n_early, 1000); /* most segments need not wait for the end */
}

Test(merge_segment, the_k_largest_are_picked_first_of_equals_first)
{
    rng r = { 13 };
    for (int round = 0; round < 500; round++) {
        int64_t n = 1 + rnd(&r) % 40, k = rnd(&r) % (uint32_t)(n + 1);
        uint64_t key[40];
        double v[40];
        uint8_t picked[40];
        for (int64_t i = 0; i < n; i++) {
            v[i] = round % 3 == 0 ? (double)(rnd(&r) % 4) - 2
                                  : (double)rnd_sign(&r) * pow(10, (double)(rnd(&r) % 600) - 300);
            if (round % 7 == 0 && v[i] == 0) v[i] = -0.0;
            key[i] = kvf_order_key(v[i]);
        }
        kvf_pick_top(key, n, k, picked);
        int64_t count = 0;
        for (int64_t i = 0; i < n; i++) {
            int64_t before = 0; /* that go first */
            for (int64_t j = 0; j < n; j++) before += v[j] > v[i] || (v[j] == v[i] && j < i);
            cr_assert_eq(picked[i], before < k);
            count += picked[i];
        }
        cr_assert_eq(count, k);
    }
}

Test(merge_segment, shares_add_up_and_are_nearly_even)
{
    rng r = { 14 };
    for (int round = 0; round < 500; round++) {
        int64_t n = 1 + rnd(&r) % 20, size[20], out[20], sum = 0, given = 0;
        uint64_t room[20];
        uint8_t picked[20];
        for (int64_t i = 0; i < n; i++) sum += size[i] = rnd(&r) % 50;
        int64_t total = rnd(&r) % (uint32_t)(sum + 1);
        kvf_share_out(size, n, total, out, room, picked);
        for (int64_t i = 0; i < n; i++) {
            cr_assert(out[i] >= 0 && out[i] <= size[i]);
            cr_assert(sum == 0 || fabs((double)out[i] - (double)size[i] * (double)total / (double)sum) < 1);
            given += out[i];
        }
        cr_assert_eq(given, total);
    }
}
