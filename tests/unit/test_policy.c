/* test_policy.c - specs, options and registry of the policies.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "policy/policy.h"
#include "base/top.h"

static const kvf_dims dims = { 2, 4, 2, 16 };

static kvf_status try_spec(const char *spec, kvf_error *err)
{
    kvf_policy *p;
    kvf_status rc = kvf_policy_open(&p, spec, dims, &kvf_mem_default, err);
    cr_assert(rc == KVF_OK || p == NULL);
    kvf_policy_close(p);
    return rc;
}

Test(policy, unknown_name_lists_those_there_are)
{
    kvf_error err;
    cr_assert_eq(try_spec("pyramid", &err), KVF_ERR_NOT_FOUND);
    cr_assert(strstr(err.msg, "full") && strstr(err.msg, "window") && strstr(err.msg, "infllm"));
    cr_assert_eq(try_spec("", &err), KVF_ERR_NOT_FOUND);
    cr_assert_eq(try_spec("windo", &err), KVF_ERR_NOT_FOUND);
    cr_assert_eq(try_spec("window2", &err), KVF_ERR_NOT_FOUND);
}

Test(policy, bad_options_name_the_option_and_the_range)
{
    static const char *const bad[] = { "window:sink=-1", "window:window=0", "window:window=99999999999999999999",
                                       "window:window=1.5", "window:window=", "window:window", "window:sink=1,",
                                       "window:foo=1", "full:keep=1", "window:window=1e3", "window:window=0x10" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_error err = { 0 };
        cr_assert_eq(try_spec(bad[i], &err), KVF_ERR_ARG, "%s", bad[i]);
        cr_assert_gt(strlen(err.msg), 10);
    }
    kvf_error err;
    cr_assert_eq(try_spec("window:foo=1", &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "sink, window"), "%s", err.msg);
}

Test(policy, print_spells_out_every_option)
{
    kvf_policy *p;
    char text[64];
    cr_assert_eq(kvf_policy_open(&p, "window:window=512", dims, &kvf_mem_default, NULL), KVF_OK);
    kvf_policy_print(p, text, sizeof text);
    cr_assert_str_eq(text, "window:sink=128,window=512");
    kvf_policy_print(p, text, 9);
    cr_assert_str_eq(text, "window:s");
    kvf_policy_close(p);
    cr_assert_eq(try_spec(text, NULL), KVF_ERR_ARG);
}

Test(policy, what_is_printed_opens_the_same_policy)
{
    const kvf_policy_ops *ops;
    for (int64_t i = 0; (ops = kvf_policy_at(i)) != NULL; i++) {
        kvf_error err = { 0 };
        kvf_policy *p;
        char text[256], again[256];
        cr_assert_eq(kvf_policy_open(&p, ops->name, dims, &kvf_mem_default, NULL), KVF_OK);
        kvf_policy_print(p, text, sizeof text);
        kvf_policy_close(p);
        cr_assert_eq(kvf_policy_open(&p, text, dims, &kvf_mem_default, &err), KVF_OK, "%s", err.msg);
        kvf_policy_print(p, again, sizeof again);
        cr_assert_str_eq(text, again);
        kvf_policy_close(p);
    }
}

Test(policy, a_preset_is_printed_as_what_it_stands_for)
{
    kvf_policy *p;
    char text[256];
    kvf_dims deep = { 24, 4, 2, 16 };
    cr_assert_eq(kvf_policy_open(&p, "lazyllm:preset=balanced", deep, &kvf_mem_default, NULL), KVF_OK);
    kvf_policy_print(p, text, sizeof text);
    kvf_policy_close(p);
    cr_assert(strstr(text, "preset=balanced,stages=8/12,keep=0.6/0.5,") != NULL, "%s", text);
}

Test(policy, every_registered_policy_opens_with_its_defaults)
{
    int64_t n = 0;
    for (const kvf_policy_ops *ops; (ops = kvf_policy_at(n)) != NULL; n++) {
        cr_assert_eq(ops->abi, KVF_POLICY_ABI);
        cr_assert_eq(try_spec(ops->name, NULL), KVF_OK, "%s", ops->name);
        cr_assert_gt(strlen(ops->help), 0);
        cr_assert(!ops->memory || (ops->retrieve && ops->identity), "%s: a memory needs both", ops->name);
    }
    cr_assert_geq(n, 3);
}

Test(policy, a_chain_is_its_members_and_a_plus_in_a_value_is_none)
{
    kvf_policy *p;
    char text[512];
    kvf_dims deep = { 8, 4, 2, 16 };
    kvf_stages s;
    cr_assert_eq(kvf_policy_open(&p, "lazyllm:stages=2/5,keep=0.5/0.4,park=/tmp/a+b,rows=8+holitom:layer=3+infllm:topk=3", deep,
                                 &kvf_mem_default, NULL), KVF_OK);
    cr_assert(p->ops->memory && p->ops->retrieve && p->ops->stages && p->ops->keep);
    kvf_policy_print(p, text, sizeof text);
    cr_assert_eq(strncmp(text, "lazyllm:", 8), 0, "%s", text);
    cr_assert(strstr(text, "park=/tmp/a+b+holitom:layer=3,drop=0.5+infllm:init=128") != NULL, "%s", text);
    kvf_policy_print(p, text, 20);
    cr_assert_lt(strlen(text), 20);
    p->ops->stages(p, &s); /* boundaries of both, in the order of layers */
    cr_assert_eq(s.n, 4);
    cr_assert(s.first[1] == 2 && s.first[2] == 3 && s.first[3] == 5);
    cr_assert(s.score[0].n_row == 8 && s.score[1].n_row == 1 && s.score[2].n_row == 8);
    cr_assert(!s.fold[0] && s.fold[1] && !s.fold[2]);
    cr_assert_str_eq(s.park, "/tmp/a+b");
    kvf_policy_close(p);
    cr_assert_eq(try_spec("infllm:select=mean,index=IVF16+Flat", NULL), KVF_OK);
    cr_assert_eq(try_spec("lazyllm+", NULL), KVF_ERR_NOT_FOUND);
    cr_assert_eq(try_spec("+lazyllm", NULL), KVF_ERR_NOT_FOUND);
}

/* Each member keeps at its own boundaries, by the number it knows them by. */
Test(policy, a_chain_asks_the_member_whose_boundary_it_is)
{
    enum { N = 10 };
    kvf_policy *p;
    kvf_dims deep = { 8, 4, 2, 16 };
    cr_assert_eq(kvf_policy_open(&p, "lazyllm:stages=2/5,keep=0.5/0.2,rows=1,recent=1,sink=0,pool=1+holitom:layer=3,drop=0.25", deep,
                                 &kvf_mem_default, NULL), KVF_OK);
    int32_t pos[N];
    float score[N];
    uint8_t keep[N], embedded[N];
    for (int i = 0; i < N; i++) {
        pos[i] = i;
        score[i] = (float)i;
        embedded[i] = i >= 1 && i < 9; /* 8 of them, 2 of which go */
    }
    static const int kept[] = { 5, 8, 2 };
    for (int32_t g = 0; g < 3; g++) {
        kvf_keep k = { .stage = g, .n = N, .pos = pos, .score = score, .embedded = embedded, .n_text = N, .n_row = 1 };
        memset(keep, 7, sizeof keep);
        cr_assert_eq(p->ops->keep(p, &k, keep, NULL), KVF_OK);
        int n = 0;
        for (int i = 0; i < N; i++) n += keep[i];
        cr_assert_eq(n, kept[g], "stage %d keeps %d", (int)g, n);
        if (g == 1) cr_assert(keep[0] && !keep[1] && !keep[2] && keep[3] && keep[9]);
    }
    kvf_keep k = { .stage = 1, .n = N, .pos = pos, .score = score, .embedded = embedded, .n_text = N, .n_before = 9, .n_row = 1 };
    cr_assert_eq(p->ops->keep(p, &k, keep, NULL), KVF_OK); /* an earlier video is not asked about again */
    for (int i = 0; i < N; i++) cr_assert(keep[i]);
    kvf_policy_close(p);
}

/* Against the definition, for every size around the block edges. */
Test(policy, window_uses_sinks_and_what_the_first_query_sees)
{
    kvf_policy *p;
    cr_assert_eq(kvf_policy_open(&p, "window:sink=130,window=300", dims, &kvf_mem_default, NULL), KVF_OK);
    for (int64_t past = 0; past < 1500; past += 61) {
        for (int64_t n = 1; n < 600; n += 97) {
            uint8_t use[32];
            memset(use, 7, sizeof use);
            kvf_select s = { 0, past, n, (past + n + 127) / 128 };
            cr_assert_eq(p->ops->select(p, &s, use, NULL), KVF_OK);
            for (int64_t b = 0; b < s.n_block; b++) {
                bool want = false;
                for (int64_t t = b * 128; t < (b + 1) * 128; t++)
                    if (t < 130 || t > past - 300) want = true;
                cr_assert_eq(use[b], want, "past %lld n %lld block %lld", (long long)past, (long long)n, (long long)b);
            }
        }
    }
    kvf_policy_close(p);
}

/* The k best by sorting: score falling, then place rising; NaN last. */
static const float *sort_score;

static int by_score(const void *a, const void *b)
{
    int i = *(const int *)a, j = *(const int *)b;
    float x = sort_score[i], y = sort_score[j];
    bool nx = x != x, ny = y != y;
    if (nx != ny) return nx - ny;
    if (!nx && x != y) return x > y ? -1 : 1;
    return i - j;
}

Test(policy, top_marks_the_k_best_with_ties_to_the_first)
{
    enum { N = 400 };
    uint32_t seed = 5;
    for (int round = 0; round < 300; round++) {
        float x[N];
        uint8_t keep[N] = { 0 };
        int order[N], n = 1 + (int)(seed >> 8) % N, n_open = 0, k;
        for (int i = 0; i < n; i++) {
            seed = seed * 1664525u + 1013904223u;
            uint32_t r = seed >> 9;
            x[i] = round % 3 == 0 ? (float)(r % 5) - 2 : round % 3 == 1 ? (float)r * 1e-7f - 0.4f : ldexpf((float)r, (int)(r % 200) - 120);
            if (r % 41 == 0) x[i] = NAN;
            if (r % 43 == 0) x[i] = r & 64 ? -0.0f : 0.0f;
            if (r % 47 == 0) x[i] = r & 64 ? INFINITY : -INFINITY;
            keep[i] = r % 7 == 0;
            if (!keep[i]) order[n_open++] = i;
        }
        uint8_t want[N];
        memcpy(want, keep, sizeof want);
        k = (int)(seed >> 10) % (n + 3) - 1;
        sort_score = x;
        qsort(order, (size_t)n_open, sizeof *order, by_score);
        for (int i = 0; i < k && i < n_open; i++) want[order[i]] = 1;
        kvf_top(x, n, k, keep);
        cr_assert_arr_eq(keep, want, (size_t)n, "round %d, %d of %d", round, k, n);
    }
}

/* ---- lazyllm ------------------------------------------------------------------------------------ */

static kvf_policy *open_lazy(const char *spec)
{
    static const kvf_dims deep = { 24, 14, 2, 64 };
    kvf_policy *p;
    kvf_error err;
    cr_assert_eq(kvf_policy_open(&p, spec, deep, &kvf_mem_default, &err), KVF_OK, "%s", err.msg);
    return p;
}

Test(policy, lazyllm_keeps_the_count_it_was_asked_for)
{
    kvf_policy *p = open_lazy("lazyllm:stages=8,keep=0.3,sink=2,recent=3,rows=1,pool=1");
    enum { N = 101 };
    int32_t pos[N];
    float score[N];
    uint8_t keep[N];
    for (int i = 0; i < N; i++) {
        pos[i] = 2 * i;
        score[i] = (float)(i * 37 % N);
    }
    kvf_keep k = { .n = N, .pos = pos, .score = score, .n_text = 2 * N - 1, .n_row = 1 };
    cr_assert_eq(p->ops->keep(p, &k, keep, NULL), KVF_OK);
    int n = 0;
    for (int i = 0; i < N; i++) n += keep[i];
    cr_assert_eq(n, 31); /* ceil(0.3 * 101) */
    cr_assert(keep[0] && !keep[1], "the sinks are places of the text, not of the list");
    cr_assert(keep[N - 1] && keep[N - 2]);
    for (int i = 0; i < N; i++) cr_assert(keep[i] || score[i] < 73, "token %d scores %g", i, (double)score[i]);
    kvf_policy_close(p);
}

Test(policy, lazyllm_pools_over_neighbours)
{
    kvf_policy *p = open_lazy("lazyllm:stages=8,keep=0.05,sink=0,recent=1,rows=1,pool=5");
    enum { N = 100 };
    int32_t pos[N];
    float score[N] = { 0 };
    uint8_t keep[N];
    for (int i = 0; i < N; i++) pos[i] = i;
    score[50] = 1;
    kvf_keep k = { .n = N, .pos = pos, .score = score, .n_text = N, .n_row = 1 };
    cr_assert_eq(p->ops->keep(p, &k, keep, NULL), KVF_OK);
    for (int i = 48; i < 52; i++) cr_assert(keep[i], "a neighbour of the best token, %d, is dropped", i);
    kvf_policy_close(p);
}

Test(policy, lazyllm_presets_fit_models_of_any_depth)
{
    static const char *const specs[] = { "lazyllm:preset=fast", "lazyllm", "lazyllm:preset=exact" };
    for (int32_t n_layer = 2; n_layer < 130; n_layer++) {
        for (int i = 0; i < 3; i++) {
            kvf_dims d = { n_layer, 4, 2, 16 };
            kvf_policy *p;
            kvf_error err;
            kvf_stages s;
            cr_assert_eq(kvf_policy_open(&p, specs[i], d, &kvf_mem_default, &err), KVF_OK, "%d layers: %s", n_layer, err.msg);
            p->ops->stages(p, &s);
            cr_assert_geq(s.n, 2);
            cr_assert_eq(s.first[0], 0);
            for (int32_t g = 1; g < s.n; g++) cr_assert(s.first[g] > s.first[g - 1] && s.first[g] < n_layer);
            kvf_policy_close(p);
        }
    }
}
