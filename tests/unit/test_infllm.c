/* test_infllm.c - policy infllm against its rules written out naively: full sorts, explicit loops, the
 * votes of fake lookups.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "policy/policy.h"

enum { N_LAYER = 3, N_KV = 2, MAX_UNIT = 400 };
static const kvf_dims dims = { N_LAYER, 4, N_KV, 32 };

static uint64_t rng = 0x9e3779b97f4a7c15u;
static uint64_t next_random(void)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng;
}

static kvf_policy *open_spec(const char *spec)
{
    kvf_policy *p = NULL;
    kvf_error err = { 0 };
    cr_assert_eq(kvf_policy_open(&p, spec, dims, &kvf_mem_default, &err), KVF_OK, "%s: %s", spec, err.msg);
    return p;
}

/* ---- the fake lookup ---- */

typedef struct fake {
    float vote[N_KV][MAX_UNIT]; /* what vote() answers */
    int64_t near[MAX_UNIT], n_near;
    int64_t n_unit;
    int n_vote, n_nearest; /* calls */
    bool fine;
    kvf_vote_rule rule;
    bool fail;
} fake;

static kvf_status fake_vote(void *lookup, bool fine, const kvf_vote_rule *rule, float *vote, kvf_error *err)
{
    fake *f = lookup;
    f->n_vote++;
    f->fine = fine;
    f->rule = *rule;
    if (f->fail) return kvf_fail(err, KVF_ERR_IO, "the vote failed");
    for (int64_t set = 0; set < (rule->per_kv_head ? N_KV : 1); set++)
        memcpy(vote + set * f->n_unit, f->vote[set], (size_t)f->n_unit * sizeof(float));
    return KVF_OK;
}

static kvf_status fake_nearest(void *lookup, int64_t k, int64_t *units, int64_t *n, kvf_error *err)
{
    fake *f = lookup;
    (void)err;
    f->n_nearest++;
    *n = f->n_near < k ? f->n_near : k;
    memcpy(units, f->near, (size_t)*n * sizeof *units);
    return KVF_OK;
}

typedef struct ask {
    int32_t layer;
    int64_t n_past, n_tok, unit0, n_unit;
    bool reading;
    int32_t n_set;
} ask;

static kvf_status retrieve(kvf_policy *p, fake *f, ask a, uint8_t *use)
{
    kvf_retrieve r = { .layer = a.layer, .n_set = a.n_set ? a.n_set : 1, .n_past = a.n_past, .n_tok = a.n_tok,
                       .reading = a.reading, .unit0 = a.unit0, .n_unit = a.n_unit, .lookup = f, .vote = fake_vote,
                       .nearest = fake_nearest };
    f->n_unit = a.n_unit;
    memset(use, 7, (size_t)(r.n_set * a.n_unit)); /* unset on entry */
    return p->ops->retrieve(p, &r, use, NULL);
}

static void random_votes(fake *f, int64_t n_unit, bool ties)
{
    for (int set = 0; set < N_KV; set++)
        for (int64_t u = 0; u < n_unit; u++)
            f->vote[set][u] = ties ? (float)(next_random() % 5) : (float)(next_random() % 1000000) * 1e-6f;
}

/* ---- the rules, naively ---- */

typedef struct ranked {
    float vote;
    int64_t unit;
} ranked;

static int by_vote(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->vote != y->vote) return x->vote > y->vote ? -1 : 1;
    return x->unit < y->unit ? -1 : 1;
}

static void naive_choose(const float *vote, int64_t n, int64_t topk, double floor, bool neighbours, uint8_t *use)
{
    ranked all[MAX_UNIT];
    for (int64_t u = 0; u < n; u++) all[u] = (ranked){ vote[u], u };
    qsort(all, (size_t)n, sizeof *all, by_vote);
    memset(use, 0, (size_t)n);
    int64_t left = topk;
    for (int64_t i = 0; i < n && i < topk; i++) {
        if (floor > 0 && (double)all[i].vote < floor) break;
        int64_t around[3] = { all[i].unit, all[i].unit - 1, all[i].unit + 1 };
        for (int j = 0; j < (neighbours ? 3 : 1); j++) {
            int64_t u = around[j];
            if (left > 0 && u >= 0 && u < n && !use[u]) use[u] = 1, left--;
        }
    }
}

Test(infllm, best_units_are_those_of_a_full_sort)
{
    static const int topks[] = { 1, 2, 3, 7, 16, 100, 399 };
    static const double floors[] = { 0, 0.3, 0.9, 2 };
    for (size_t t = 0; t < sizeof topks / sizeof *topks; t++) {
        for (int mode = 0; mode < 16; mode++) {
            char spec[128];
            double floor = floors[mode & 3];
            bool neighbours = mode & 4, ties = mode & 8;
            snprintf(spec, sizeof spec, "infllm:topk=%d,ask=%d,floor=%.1f,neighbours=%d,decay=0,hold=1,sets=kv", topks[t], topks[t], floor,
                     neighbours);
            kvf_policy *p = open_spec(spec);
            for (int i = 0; i < 40; i++) {
                fake f = { 0 };
                uint8_t use[N_KV * MAX_UNIT], want[MAX_UNIT];
                int64_t n = topks[t] + 1 + (int64_t)(next_random() % (uint64_t)(MAX_UNIT - topks[t]));
                random_votes(&f, n, ties);
                cr_assert_eq(retrieve(p, &f, (ask){ i % N_LAYER, 9000 + i, i % 3 ? 1 : 99, 1, n, false, N_KV }, use), KVF_OK);
                cr_assert_eq(f.n_vote, 1);
                cr_assert(f.fine && f.rule.per_kv_head);
                for (int set = 0; set < N_KV; set++) {
                    naive_choose(f.vote[set], n, topks[t], floor, neighbours, want);
                    cr_assert_arr_eq(use + set * n, want, (size_t)n, "%s set %d of %lld units", spec, set, (long long)n);
                }
            }
            kvf_policy_close(p);
        }
    }
}

Test(infllm, equal_votes_go_to_the_lower_unit_and_no_number_loses)
{
    kvf_policy *p = open_spec("infllm:topk=3,ask=3,decay=0");
    fake f = { 0 };
    uint8_t use[MAX_UNIT];
    cr_assert_eq(retrieve(p, &f, (ask){ 0, 9000, 50, 1, 100, false, 1 }, use), KVF_OK);
    for (int u = 0; u < 200; u++) cr_assert_eq(use[u], u < 3);
    for (int u = 0; u < 200; u++) f.vote[0][u] = NAN;
    f.vote[0][99] = -INFINITY;
    f.vote[0][98] = -5;
    cr_assert_eq(retrieve(p, &f, (ask){ 0, 9000, 50, 1, 100, false, 1 }, use), KVF_OK);
    for (int u = 0; u < 200; u++) cr_assert_eq(use[u], u < 2 || u == 98, "unit %d", u);
    kvf_policy_close(p);
}

Test(infllm, as_many_units_as_topk_are_read_without_a_vote)
{
    kvf_policy *p = open_spec("infllm:topk=16,ask=9,floor=5"), *none = open_spec("infllm:topk=0");
    uint8_t use[MAX_UNIT];
    for (int64_t n = 1; n <= 40; n++) {
        for (int kind = 0; kind < 3; kind++) {
            fake f = { 0 };
            ask a = { 1, 9000, kind == 0 ? 1 : kind == 1 ? 100 : 512, 1, n, kind == 2, 1 };
            cr_assert_eq(retrieve(p, &f, a, use), KVF_OK);
            int64_t most = kind == 2 ? 16 : 9; /* a document's chunk, else a question or an answer */
            cr_assert_eq(f.n_vote, n > most);
            for (int64_t u = 0; u < n; u++) cr_assert_eq(use[u], n <= most);
            f.n_vote = 0;
            cr_assert_eq(retrieve(none, &f, a, use), KVF_OK);
            cr_assert_eq(f.n_vote, 0);
            for (int64_t u = 0; u < n; u++) cr_assert_eq(use[u], 0);
            p->ops->forget(p, 0);
        }
    }
    kvf_policy_close(p);
    kvf_policy_close(none);
}

static int64_t n_read(const char *spec, int64_t n_tok, bool reading)
{
    kvf_policy *p = open_spec(spec);
    fake f = { 0 };
    uint8_t use[MAX_UNIT];
    int64_t n = 0;
    random_votes(&f, MAX_UNIT, false);
    cr_assert_eq(retrieve(p, &f, (ask){ 1, 9000, n_tok, 1, MAX_UNIT, reading, 1 }, use), KVF_OK);
    for (int u = 0; u < MAX_UNIT; u++) n += use[u] != 0;
    kvf_memory m;
    p->ops->memory(p, &m);
    cr_assert_geq(m.n_unit, n, "%s", spec);
    kvf_policy_close(p);
    return n;
}

Test(infllm, a_question_may_read_more_units_than_a_document_s_chunk)
{
    static const struct {
        const char *spec;
        int64_t topk, ask;
    } cases[] = { { "infllm:block=128", 16, 16 }, { "infllm:topk=3", 3, 3 }, { "infllm:topk=3,ask=5", 3, 5 }, { "infllm:block=64,ask=2", 32, 2 },
                  { "infllm:topk=0", 0, 0 }, { "infllm:topk=0,ask=4", 0, 4 }, { "infllm:select=paper,topk=7", 7, 7 },
                  { "infllm:select=paper,ask=9", 16, 9 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cr_expect_eq(n_read(cases[i].spec, 512, true), cases[i].topk, "%s", cases[i].spec);
        cr_expect_eq(n_read(cases[i].spec, 30, true), cases[i].topk, "%s: a document's tail", cases[i].spec);
        cr_expect_eq(n_read(cases[i].spec, 129, false), cases[i].topk, "%s: longer than exact", cases[i].spec);
        cr_expect_eq(n_read(cases[i].spec, 128, false), cases[i].ask, "%s: a question", cases[i].spec);
        cr_expect_eq(n_read(cases[i].spec, 1, false), cases[i].ask, "%s: an answer", cases[i].spec);
    }
}

/* Decode from position 9000: the running maximum over all looked-up steps, decay times less per token, and
 * the steps at which a layer looks at all. A fresh unit joins every 7 steps. */
static void check_decode(const char *spec, int64_t topk, int64_t hold, double decay, int n_set)
{
    kvf_policy *p = open_spec(spec);
    static float seen[N_LAYER][N_KV][MAX_UNIT]; /* the running maximum, by absolute unit */
    static uint8_t set_of[N_LAYER][N_KV][MAX_UNIT];
    bool chosen[N_LAYER] = { 0 };
    int64_t last[N_LAYER] = { 0 };
    memset(seen, 0, sizeof seen);
    memset(set_of, 0, sizeof set_of);
    for (int64_t pos = 9000; pos < 9100; pos++) {
        int64_t unit0 = 2, n = 30 + (pos - 9000) / 7;
        for (int32_t layer = 0; layer < N_LAYER; layer++) {
            fake f = { 0 };
            uint8_t use[N_KV * MAX_UNIT];
            random_votes(&f, n, false);
            if (pos % 3) /* sharp votes, now and then */
                for (int64_t u = 0; u < n; u++) f.vote[0][u] *= 0.1f, f.vote[1][u] *= 0.2f;
            cr_assert_eq(retrieve(p, &f, (ask){ layer, pos, 1, unit0, n, false, n_set }, use), KVF_OK);
            bool due = !chosen[layer] || (pos + layer * 5) % hold == 0;
            cr_assert_eq(f.n_vote, due, "%s: position %lld layer %d", spec, (long long)pos, layer);
            for (int set = 0; due && set < n_set; set++) {
                double share = 1;
                for (int64_t i = last[layer]; i < pos; i++) share *= decay;
                for (int64_t u = 0; u < n; u++) {
                    float was = chosen[layer] ? (float)(share * (double)seen[layer][set][unit0 + u]) : 0;
                    seen[layer][set][unit0 + u] = was > f.vote[set][u] ? was : f.vote[set][u];
                }
                naive_choose(seen[layer][set] + unit0, n, topk, 0, false, set_of[layer][set] + unit0);
            }
            if (due) chosen[layer] = true, last[layer] = pos;
            for (int set = 0; set < n_set; set++)
                cr_assert_arr_eq(use + set * n, set_of[layer][set] + unit0, (size_t)n, "%s: position %lld layer %d set %d",
                                 spec, (long long)pos, layer, set);
        }
    }
    kvf_policy_close(p);
}

Test(infllm, an_answer_holds_its_units_and_earlier_votes_fade)
{
    check_decode("infllm:topk=4", 4, 24, 0.9, 1);
    check_decode("infllm:ask=4,hold=1", 4, 1, 0.9, 1);
    check_decode("infllm:topk=9,ask=4,hold=1,decay=0", 4, 1, 0, 1);
    check_decode("infllm:topk=2,ask=5,hold=3,decay=0.5,sets=kv", 5, 3, 0.5, N_KV);
    check_decode("infllm:ask=5,hold=256,decay=1", 5, 256, 1, 1);
    check_decode("infllm:topk=4,select=paper", 4, 1, 0, 1);
    check_decode("infllm:topk=4,select=paper,hold=16,decay=0.99", 4, 16, 0.99, 1);
}

Test(infllm, scores_below_zero_are_not_carried_on)
{
    kvf_policy *p = open_spec("infllm:ask=1,hold=1,vote=lin,decay=0.5");
    fake f = { 0 };
    uint8_t use[8];
    for (int u = 0; u < 8; u++) f.vote[0][u] = -100;
    f.vote[0][5] = -90;
    cr_assert_eq(retrieve(p, &f, (ask){ 0, 9000, 1, 0, 8, false, 1 }, use), KVF_OK);
    cr_assert_eq(use[5], 1);
    f.vote[0][5] = -100; /* -45 if it were carried */
    f.vote[0][6] = -60;
    cr_assert_eq(retrieve(p, &f, (ask){ 0, 9001, 1, 0, 8, false, 1 }, use), KVF_OK);
    cr_assert_eq(use[6], 1);
    kvf_policy_close(p);
}

Test(infllm, a_question_seeds_the_answer_and_reading_or_forgetting_ends_it)
{
    static const struct {
        int64_t n_tok;
        bool reading, stays;
    } before[] = { { 40, false, true }, { 128, false, true }, { 129, false, false }, { 40, true, false }, { 1, true, false } };
    for (size_t i = 0; i < sizeof before / sizeof *before; i++) {
        for (int forget = 0; forget < 2; forget++) {
            kvf_policy *p = open_spec("infllm:topk=2,hold=8");
            fake f = { 0 };
            uint8_t use[30], again[30];
            int64_t next = 9001; /* no turn of layer 0: 9001 % 8 != 0 */
            f.vote[0][20] = 2, f.vote[0][21] = 1;
            cr_assert_eq(retrieve(p, &f, (ask){ 0, next - before[i].n_tok, before[i].n_tok, 1, 30, before[i].reading, 1 }, use),
                         KVF_OK);
            cr_assert(use[20] && use[21]);
            cr_assert_eq(f.fine, before[i].stays);
            if (forget) p->ops->forget(p, next);
            memset(f.vote, 0, sizeof f.vote);
            f.vote[0][3] = 0.5f;
            f.n_vote = 0;
            cr_assert_eq(retrieve(p, &f, (ask){ 0, next, 1, 1, 30, false, 1 }, again), KVF_OK);
            bool stays = before[i].stays && !forget;
            cr_assert_eq(f.n_vote, !stays, "case %zu forget %d", i, forget);
            cr_assert_eq(again[20], stays);
            cr_assert_eq(again[3], !stays);
            for (int64_t pos = next + 1; pos <= 9008; pos++) /* 9008: the layer's turn, 2 * 0.9^8 still wins */
                cr_assert_eq(retrieve(p, &f, (ask){ 0, pos, 1, 1, 30, false, 1 }, again), KVF_OK);
            cr_assert_eq(again[20], stays);
            cr_assert_eq(again[3], 1, "0.5 beats 1 * 0.9^8");
            kvf_policy_close(p);
        }
    }
}

Test(infllm, held_units_keep_their_absolute_numbers)
{
    kvf_policy *p = open_spec("infllm:ask=2,hold=256");
    fake f = { 0 };
    uint8_t use[40];
    f.vote[0][2] = 2, f.vote[0][9] = 1;
    cr_assert_eq(retrieve(p, &f, (ask){ 1, 9000, 1, 10, 20, false, 1 }, use), KVF_OK);
    cr_assert_eq(retrieve(p, &f, (ask){ 1, 9001, 1, 8, 24, false, 1 }, use), KVF_OK);
    for (int u = 0; u < 24; u++) cr_assert_eq(use[u], u == 4 || u == 11);
    cr_assert_eq(retrieve(p, &f, (ask){ 1, 9002, 1, 13, 20, false, 1 }, use), KVF_OK); /* unit 12 is gone */
    for (int u = 0; u < 20; u++) cr_assert_eq(use[u], u == 6);
    cr_assert_eq(f.n_vote, 1);
    kvf_policy_close(p);
}

/* ---- which digest, which rule ---- */

typedef struct how {
    const char *spec;
    int64_t n_tok;
    bool reading;
    int n_vote, n_nearest;
    bool fine;
    kvf_vote_kind kind;
    bool max_queries;
    int32_t pool;
} how;

Test(infllm, reading_asking_and_answering_use_their_rule)
{
    static const how cases[] = {
        { "infllm", 512, true, 1, 0, false, KVF_VOTE_GATE, true, 64 },
        { "infllm", 30, true, 1, 0, false, KVF_VOTE_GATE, true, 64 }, /* a document's tail is read like the rest */
        { "infllm", 1, true, 1, 0, false, KVF_VOTE_GATE, true, 64 },
        { "infllm", 129, false, 1, 0, false, KVF_VOTE_GATE, true, 64 },
        { "infllm", 128, false, 1, 0, true, KVF_VOTE_GATE, true, 1 },
        { "infllm", 1, false, 1, 0, true, KVF_VOTE_GATE, true, 1 },
        { "infllm:exact=0", 2, false, 1, 0, false, KVF_VOTE_GATE, true, 64 },
        { "infllm:exact=0", 1, false, 1, 0, true, KVF_VOTE_GATE, true, 1 },
        { "infllm:reading=none", 512, true, 0, 0, false, KVF_VOTE_GATE, true, 0 },
        { "infllm:reading=none", 100, false, 1, 0, true, KVF_VOTE_GATE, true, 1 },
        { "infllm:reading=fine,pool=32,vote=soft,agg=mean", 512, true, 1, 0, true, KVF_VOTE_SOFT, false, 32 },
        { "infllm:vote=lin", 1, false, 1, 0, true, KVF_VOTE_LIN, true, 1 },
        { "infllm:select=paper", 512, true, 1, 0, false, KVF_VOTE_LIN, false, 512 },
        { "infllm:select=paper", 1, false, 1, 0, true, KVF_VOTE_LIN, false, 512 },
        { "infllm:select=paper,reading=none", 512, true, 0, 0, false, KVF_VOTE_LIN, false, 0 },
        { "infllm:index=SQfp16", 512, true, 0, 1, false, KVF_VOTE_GATE, true, 0 },
        { "infllm:index=SQfp16", 1, false, 1, 0, true, KVF_VOTE_GATE, true, 1 },
        { "infllm:select=paper,index=IVF4+Flat", 512, true, 0, 1, false, KVF_VOTE_LIN, false, 0 },
        { "infllm:select=paper,index=IVF4+Flat", 1, false, 0, 1, false, KVF_VOTE_LIN, false, 0 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const how *c = &cases[i];
        kvf_policy *p = open_spec(c->spec);
        fake f = { .near = { 7, 3, 20 }, .n_near = 3 };
        uint8_t use[200];
        random_votes(&f, 200, false);
        cr_assert_eq(retrieve(p, &f, (ask){ 2, 9000, c->n_tok, 1, 200, c->reading, 1 }, use), KVF_OK);
        cr_assert(f.n_vote == c->n_vote && f.n_nearest == c->n_nearest, "%s, %lld tokens", c->spec, (long long)c->n_tok);
        if (f.n_nearest)
            for (int u = 0; u < 200; u++) cr_assert_eq(use[u], u == 3 || u == 7 || u == 20);
        if (!f.n_vote && !f.n_nearest)
            for (int u = 0; u < 200; u++) cr_assert_eq(use[u], 0);
        if (f.n_vote)
            cr_assert(f.fine == c->fine && f.rule.kind == c->kind && f.rule.max_queries == c->max_queries &&
                          f.rule.pool == c->pool && !f.rule.per_kv_head, "%s, %lld tokens", c->spec, (long long)c->n_tok);
        kvf_policy_close(p);
    }
}

Test(infllm, what_an_index_invents_is_not_followed)
{
    kvf_policy *p = open_spec("infllm:index=SQfp16,topk=4,neighbours=1");
    fake f = { .near = { -1, 40, 0, 39 }, .n_near = 4 };
    uint8_t use[40];
    cr_assert_eq(retrieve(p, &f, (ask){ 0, 9000, 512, 1, 40, true, 1 }, use), KVF_OK);
    for (int u = 0; u < 40; u++) cr_assert_eq(use[u], u == 0 || u == 39 || u == 1 || u == 38);
    kvf_policy_close(p);
}

/* ---- layouts ---- */

/* Unless said, 2,048 tokens are read in units, of whatever size, and twice as many for a question; the published rule
 * keeps its published sizes. */
Test(infllm, sizes_that_are_not_said)
{
    static const struct {
        const char *spec;
        int64_t window, unit, n_unit;
    } cases[] = { { "infllm", 2048, 32, 64 },
                  { "infllm:block=128", 2048, 128, 16 },
                  { "infllm:block=16", 2048, 16, 128 },
                  { "infllm:topk=5", 2048, 32, 5 },
                  { "infllm:window=4096,ask=128", 4096, 32, 128 },
                  { "infllm:select=paper", 4096, 128, 16 },
                  { "infllm:select=paper,block=64", 4096, 64, 32 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvf_policy *p = open_spec(cases[i].spec);
        kvf_memory m;
        p->ops->memory(p, &m);
        cr_expect(m.window == cases[i].window && m.unit == cases[i].unit && m.n_unit == cases[i].n_unit, "%s", cases[i].spec);
        kvf_policy_close(p);
    }
}

Test(infllm, memory_says_what_is_kept)
{
    static const struct {
        const char *spec;
        kvf_digest_kind coarse, fine;
        int32_t coarse_sub, fine_sub, bits, n_set, n_repr;
        bool per_head;
        const char *index;
    } cases[] = {
        { "infllm", KVF_DIGEST_MEAN, KVF_DIGEST_BITS, 32, 0, 2, 1, 0, false, "" },
        { "infllm:bits=4,block=32,sets=kv", KVF_DIGEST_MEAN, KVF_DIGEST_BITS, 32, 0, 4, N_KV, 0, false, "" },
        { "infllm:select=mean,block=64", KVF_DIGEST_MEAN, KVF_DIGEST_MEAN, 64, 64, 0, 1, 0, false, "" },
        { "infllm:select=sub,sub=16,reading=none", KVF_DIGEST_NONE, KVF_DIGEST_MEAN, 0, 16, 0, 1, 0, false, "" },
        { "infllm:select=bounds,reading=fine", KVF_DIGEST_NONE, KVF_DIGEST_BOUNDS, 0, 8, 0, 1, 0, false, "" },
        { "infllm:select=paper,repr=8", KVF_DIGEST_REPS, KVF_DIGEST_REPS, 128, 128, 0, 1, 8, false, "" },
        { "infllm:select=paper,reps=head,reading=none", KVF_DIGEST_REPS, KVF_DIGEST_REPS, 128, 128, 0, 1, 4, true, "" },
        { "infllm:index=PQ16x4fs+RFlat", KVF_DIGEST_MEAN, KVF_DIGEST_BITS, 32, 0, 2, 1, 0, false, "PQ16x4fs+RFlat" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvf_policy *p = open_spec(cases[i].spec);
        kvf_memory m;
        memset(&m, 7, sizeof m);
        p->ops->memory(p, &m);
        cr_assert(m.coarse.kind == cases[i].coarse && m.fine.kind == cases[i].fine, "%s", cases[i].spec);
        if (cases[i].coarse_sub) cr_assert_eq(m.coarse.sub, cases[i].coarse_sub);
        if (cases[i].fine_sub) cr_assert_eq(m.fine.sub, cases[i].fine_sub);
        cr_assert_eq(m.fine.bits, cases[i].bits);
        cr_assert_eq(m.n_set, cases[i].n_set);
        cr_assert_eq(m.n_repr, cases[i].n_repr);
        cr_assert_eq(m.fine.reps_per_q_head, cases[i].per_head);
        cr_assert_str_eq(m.index, cases[i].index);
        cr_assert(kvf_digest_valid(&m.coarse) && kvf_digest_valid(&m.fine));
        cr_assert(m.fine.n_head == 4 && m.fine.n_head_kv == N_KV && m.fine.head_dim == 32);
        kvf_policy_close(p);
    }
    kvf_policy *p = open_spec("infllm:init=256,window=1024,block=64,chunk=1024,recall=0.5");
    kvf_memory m;
    p->ops->memory(p, &m);
    cr_assert(m.init == 256 && m.window == 1024 && m.unit == 64 && m.n_chunk == 1024 && m.recall == 0.5);
    kvf_policy_close(p);
}

Test(infllm, options_that_do_not_go_together_say_why_and_what_to_do)
{
    static const struct {
        const char *spec, *cause, *cure;
    } bad[] = {
        { "infllm:block=48", "block=48", "use 16, 32, 64 or 128" },
        { "infllm:chunk=500", "chunk=500", "power of two" },
        { "infllm:block=8", "block=8", "use 16, 32, 64 or 128" },
        { "infllm:window=256", "window=256", "raise window or lower chunk" },
        { "infllm:window=64,chunk=64", "window=64", "use 128 or more" },
        { "infllm:init=100", "init=100", "use init=128" },
        { "infllm:bits=3", "bits=3", "use 1, 2 or 4" },
        { "infllm:sub=12", "sub=12", "power of two" },
        { "infllm:select=sub,block=16,sub=32", "sub=32", "lower sub or raise block" },
        { "infllm:select=bounds,block=16,sub=32", "sub=32", "lower sub or raise block" },
        { "infllm:select=paper,block=16,repr=17", "repr=17", "lower repr" },
        { "infllm:reps=head", "reps=head", "add select=paper" },
        { "infllm:select=paper,vote=gate", "vote=lin", "leave vote out" },
        { "infllm:select=paper,agg=max", "agg=mean", "leave agg out" },
        { "infllm:select=paper,pool=64", "averages all queries", "leave pool out" },
        { "infllm:select=paper,reading=mean", "same representatives", "leave reading out" },
        { "infllm:index=SQfp16,sets=kv", "index=SQfp16", "use sets=shared or index=flat" },
        { "infllm:index=SQfp16,reading=none", "index=SQfp16", "use reading=mean" },
        { "infllm:index=SQfp16,reading=fine", "index=SQfp16", "use reading=mean" },
        { "infllm:index=SQfp16,select=paper,reading=none", "index=SQfp16", "select=paper" },
        { "infllm:index=SQfp16,floor=0.1", "below floor", "use floor=0" },
        { "infllm:index=SQfp16,select=paper,decay=0.5", "can decay", "use decay=0" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_policy *p;
        kvf_error err = { 0 };
        cr_assert_eq(kvf_policy_open(&p, bad[i].spec, dims, &kvf_mem_default, &err), KVF_ERR_ARG, "%s", bad[i].spec);
        cr_assert(!p && strstr(err.msg, bad[i].cause) && strstr(err.msg, bad[i].cure), "%s: %s", bad[i].spec, err.msg);
        cr_assert_lt(strlen(err.msg), sizeof err.msg - 1, "cut: %s", err.msg);
    }
    kvf_policy *p;
    kvf_error err = { 0 };
    cr_assert_eq(kvf_policy_open(&p, "infllm:bits=1", (kvf_dims){ 2, 4, 2, 80 }, &kvf_mem_default, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "80 elements") && strstr(err.msg, "select=sub"), "%s", err.msg);
    cr_assert_eq(kvf_policy_open(&p, "infllm:select=mean", (kvf_dims){ 2, 4, 2, 12 }, &kvf_mem_default, &err), KVF_ERR_ARG);
    cr_assert_eq(kvf_policy_open(&p, "infllm:bits=4", (kvf_dims){ 2, 4, 2, 80 }, &kvf_mem_default, NULL), KVF_OK);
    kvf_policy_close(p);
}

Test(infllm, defaults_follow_the_rule_chosen_and_print_what_runs)
{
    static const char *const want[][3] = {
        { "infllm", "vote=gate,agg=max,decay=0.9,hold=24", "reading=mean,pool=64" },
        { "infllm:select=paper", "vote=lin,agg=mean,decay=0,hold=1", "reading=fine,pool=512" },
        { "infllm:select=paper,hold=4,decay=0.5", "vote=lin,agg=mean,decay=0.5,hold=4", "reading=fine,pool=512" },
    };
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        char text[256], again[256];
        kvf_policy *p = open_spec(want[i][0]);
        kvf_policy_print(p, text, sizeof text);
        cr_assert(strstr(text, want[i][1]) && strstr(text, want[i][2]), "%s", text);
        cr_assert_lt(strlen(text), 255, "not cut");
        kvf_policy_close(p);
        p = open_spec(text); /* what is printed opens, and is the same */
        kvf_policy_print(p, again, sizeof again);
        cr_assert_str_eq(text, again);
        kvf_policy_close(p);
    }
}

static void identity_of(const char *spec, char out[256])
{
    kvf_policy *p = open_spec(spec);
    p->ops->identity(p, out, 256);
    kvf_policy_close(p);
}

/* Each group: specs of one identity; groups differ from each other. */
Test(infllm, identity_differs_exactly_when_what_is_read_does)
{
    static const char *const groups[][6] = {
        { "infllm", "infllm:hold=1,decay=0.5,exact=0", "infllm:exact=2048", "infllm:sub=16,repr=8,recall=0.1,ask=7", "infllm:vote=gate,agg=max" },
        { "infllm:init=256" }, { "infllm:window=8192" }, { "infllm:block=64" }, { "infllm:topk=32" }, { "infllm:chunk=256" },
        { "infllm:bits=4" }, { "infllm:vote=soft" }, { "infllm:agg=mean" }, { "infllm:pool=32" }, { "infllm:floor=0.001" },
        { "infllm:floor=0.0011" }, { "infllm:neighbours=1" }, { "infllm:sets=kv" },
        { "infllm:index=SQfp16", "infllm:index=SQfp16,recall=0.5", "infllm:index=SQfp16,vote=soft,agg=mean,pool=9" },
        { "infllm:index=HNSW32" }, { "infllm:reading=fine" }, { "infllm:reading=fine,vote=soft" },
        { "infllm:reading=none", "infllm:reading=none,topk=99,sets=kv,floor=1,neighbours=1", "infllm:reading=none,vote=soft,pool=9" },
        { "infllm:reading=none,bits=1" }, { "infllm:select=mean", "infllm:select=mean,bits=4,sub=4" },
        { "infllm:select=sub", "infllm:select=sub,bits=1" }, { "infllm:select=sub,sub=16" }, { "infllm:select=bounds" },
        { "infllm:select=paper", "infllm:select=paper,hold=8,decay=0.9", "infllm:select=paper,exact=1,bits=1" },
        { "infllm:select=paper,repr=8" }, { "infllm:select=paper,reps=head" }, { "infllm:select=paper,topk=8" },
        { "infllm:select=paper,reading=none", "infllm:select=paper,reading=none,topk=8" },
        { "infllm:topk=0", "infllm:topk=0,vote=soft" },
    };
    enum { N = sizeof groups / sizeof *groups };
    static char id[N][256];
    for (size_t g = 0; g < N; g++) {
        identity_of(groups[g][0], id[g]);
        cr_assert_lt(strlen(id[g]), 255);
        char other[256];
        for (int i = 1; i < 6 && groups[g][i]; i++) {
            identity_of(groups[g][i], other);
            cr_assert_str_eq(id[g], other, "%s and %s", groups[g][0], groups[g][i]);
        }
        identity_of(id[g], other); /* an identity is a spec, and its own identity */
        cr_assert_str_eq(id[g], other);
        for (size_t h = 0; h < g; h++) cr_assert_str_neq(id[g], id[h], "%s and %s", groups[g][0], groups[h][0]);
    }
    kvf_policy *p = open_spec("infllm");
    for (size_t cap = 1; cap < 40; cap++) { /* cut, and always ended */
        char out[41];
        memset(out, 'x', sizeof out);
        p->ops->identity(p, out, cap);
        cr_assert(memchr(out, 0, cap) != NULL && out[cap] == 'x');
        cr_assert_eq(memcmp(out, id[0], strlen(out)), 0);
    }
    kvf_policy_close(p);
}

/* ---- faults ---- */

typedef struct budget {
    int64_t left; /* allocations that still succeed */
    int64_t live;
} budget;

static void *budget_alloc(void *user, size_t bytes)
{
    budget *b = user;
    if (b->left-- <= 0) return NULL;
    void *p = malloc(bytes);
    b->live += p != NULL;
    return p;
}

static void budget_release(void *user, void *ptr)
{
    ((budget *)user)->live -= ptr != NULL;
    free(ptr);
}

Test(infllm, refused_memory_and_failed_votes_leave_a_usable_policy)
{
    bool done = false;
    for (int64_t k = 0; !done; k++) {
        budget b = { k, 0 };
        kvf_mem mem = { budget_alloc, budget_release, &b };
        kvf_policy *p;
        done = true;
        kvf_status rc = kvf_policy_open(&p, "infllm:ask=3,hold=2,sets=kv", dims, &mem, NULL);
        if (rc < 0) {
            cr_assert(rc == KVF_ERR_NOMEM && !p && b.live == 0);
            done = false;
            continue;
        }
        for (int64_t step = 0; step < 40; step++) {
            fake f = { 0 };
            uint8_t use[N_KV * MAX_UNIT], want[MAX_UNIT];
            int64_t n = 20 + step * 9;
            random_votes(&f, n, false);
            ask a = { (int32_t)(step % N_LAYER), 9000 + step, step % 4 ? 1 : 20, 1, n, false, N_KV };
            f.fail = step % 10 == 4;
            rc = retrieve(p, &f, a, use);
            if (rc == KVF_ERR_NOMEM) {
                done = false;
                b.left = INT64_MAX;
                rc = retrieve(p, &f, a, use);
            }
            cr_assert(rc == KVF_OK || (f.fail && rc == KVF_ERR_IO));
            p->ops->forget(p, 0);
            f.fail = false;
            rc = retrieve(p, &f, a, use);
            if (rc == KVF_ERR_NOMEM) {
                done = false;
                b.left = INT64_MAX;
                rc = retrieve(p, &f, a, use);
            }
            cr_assert_eq(rc, KVF_OK);
            for (int set = 0; set < N_KV; set++) {
                naive_choose(f.vote[set], n, 3, 0, false, want);
                cr_assert_arr_eq(use + set * n, want, (size_t)n);
            }
        }
        kvf_policy_close(p);
        cr_assert_eq(b.live, 0, "allocation %lld", (long long)k);
    }
}
