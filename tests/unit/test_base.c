/* test_base.c - src/base: half floats, memory, options, threads, errors, processor levels.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cpu.h"
#include "base/half.h"
#include "base/mem.h"
#include "base/option.h"
#include "base/threads.h"

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* ---- half.h ---- */

/* The value of an f16 by its definition in IEEE 754, without any shortcut. */
static double value_of_f16(unsigned h)
{
    int exp = (int)(h >> 10 & 31), man = (int)(h & 1023);
    double v = exp == 0 ? ldexp(man, -24) : ldexp(1024 + man, exp - 25);
    return h & 0x8000 ? -v : v;
}

Test(half, every_f16_has_its_value_and_comes_back)
{
    for (unsigned h = 0; h < 65536; h++) {
        float f = kvf_f32_from_f16((kvf_f16)h);
        if ((h & 0x7c00) == 0x7c00) {
            cr_assert(h & 0x3ff ? isnan(f) : isinf(f), "%04x", h);
            if (h & 0x3ff) {
                cr_assert((kvf_f16_from_f32(f) & 0x7e00) == 0x7e00, "NaN %04x stays a quiet NaN", h);
                continue;
            }
        } else {
            cr_assert((double)f == value_of_f16(h), "%04x", h);
        }
        cr_assert(!!signbit(f) == (int)(h >> 15), "%04x", h);
        cr_assert_eq(kvf_f16_from_f32(f), h);
    }
}

/* Between two neighbours the nearer one wins, and the even one in the middle. */
Test(half, f16_rounds_to_nearest_even_between_all_neighbours)
{
    for (unsigned h = 0; h < 0x7bff; h++) {
        double lo = value_of_f16(h), hi = value_of_f16(h + 1), mid = (lo + hi) / 2;
        unsigned even = h & 1 ? h + 1 : h;
        cr_assert_eq(kvf_f16_from_f32((float)mid), even, "%04x", h);
        cr_assert_eq(kvf_f16_from_f32(nextafterf((float)mid, -INFINITY)), h, "%04x", h);
        cr_assert_eq(kvf_f16_from_f32(nextafterf((float)mid, INFINITY)), h + 1, "%04x", h);
        cr_assert_eq(kvf_f16_from_f32((float)-mid), even | 0x8000, "%04x", h);
    }
    cr_assert_eq(kvf_f16_from_f32(65519.99f), 0x7bff);
    cr_assert_eq(kvf_f16_from_f32(65520.0f), 0x7c00);
    cr_assert_eq(kvf_f16_from_f32(1e30f), 0x7c00);
    cr_assert_eq(kvf_f16_from_f32(-INFINITY), 0xfc00);
    cr_assert_eq(kvf_f16_from_f32(1e-30f), 0);
    cr_assert_eq(kvf_f16_from_f32(-1e-30f), 0x8000);
}

#ifdef __FLT16_MAX__
__extension__ typedef _Float16 native_f16;
#endif

Test(half, f16_agrees_with_the_compiler_on_random_floats)
{
#ifdef __FLT16_MAX__
    uint64_t rng = 1;
    for (int i = 0; i < 1000000; i++) {
        float f = kvf_f32_from_bits((uint32_t)next_random(&rng));
        if (isnan(f)) continue;
        native_f16 want = (native_f16)f;
        kvf_f16 bits;
        memcpy(&bits, &want, sizeof bits);
        cr_assert_eq(kvf_f16_from_f32(f), bits, "%a", (double)f);
    }
#else
    cr_skip("this compiler has no _Float16");
#endif
}

Test(half, bf16_rounds_to_nearest_even_and_keeps_nan)
{
    for (uint32_t b = 0; b < 65536; b++) {
        float f = kvf_f32_from_bf16((kvf_bf16)b);
        if (isnan(f)) {
            cr_assert(isnan(kvf_f32_from_bf16(kvf_bf16_from_f32(f))));
            continue;
        }
        cr_assert_eq(kvf_bf16_from_f32(f), b);
        if (isinf(f)) continue;
        uint32_t even = b & 1 ? b + 1 : b;
        cr_assert_eq(kvf_bf16_from_f32(kvf_f32_from_bits(b << 16 | 0x8000)), even);
        cr_assert_eq(kvf_bf16_from_f32(kvf_f32_from_bits(b << 16 | 0x7fff)), b);
        cr_assert_eq(kvf_bf16_from_f32(kvf_f32_from_bits(b << 16 | 0x8001)), b + 1);
    }
    cr_assert(isnan(kvf_f32_from_bf16(kvf_bf16_from_f32(kvf_f32_from_bits(0x7f800001)))));
}

/* ---- mem.h ---- */

typedef struct tally {
    int64_t live, calls, fail_at; /* the fail_at-th call fails; 0: none */
} tally;

static void *tally_alloc(void *user, size_t bytes)
{
    tally *t = user;
    if (++t->calls == t->fail_at) return NULL;
    t->live++;
    char *p = malloc(bytes + 1);
    return p ? memset(p, 0xa5, bytes) : NULL;
}

static void tally_release(void *user, void *ptr)
{
    ((tally *)user)->live--;
    free(ptr);
}

Test(mem, blocks_are_aligned_zeroed_and_returned)
{
    tally t = { 0 };
    kvf_mem mem = { tally_alloc, tally_release, &t };
    for (size_t n = 0; n < 3000; n = n * 2 + 1) {
        unsigned char *p = kvf_alloc(&mem, n, 3);
        cr_assert_not_null(p);
        cr_assert_eq((uintptr_t)p % KVF_MEM_ALIGN, 0);
        for (size_t i = 0; i < n * 3; i++) cr_assert_eq(p[i], 0);
        memset(p, 1, n * 3);
        kvf_free(&mem, p);
    }
    kvf_free(&mem, NULL);
    cr_assert_eq(t.live, 0);
}

Test(mem, products_that_overflow_are_refused_before_the_allocator_sees_them)
{
    tally t = { 0 };
    kvf_mem mem = { tally_alloc, tally_release, &t };
    const size_t hostile[][2] = { { SIZE_MAX, 2 },         { SIZE_MAX / 2 + 1, 2 }, { SIZE_MAX, SIZE_MAX },
                                  { SIZE_MAX - 64, 1 },    { SIZE_MAX, 1 },         { 1, SIZE_MAX - 127 },
                                  { (size_t)1 << 33, (size_t)1 << 33 } };
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        kvf_error err = { 0 };
        void *p = &t;
        cr_assert_null(kvf_alloc(&mem, hostile[i][0], hostile[i][1]));
        cr_assert_null(kvf_alloc_raw(&mem, hostile[i][0], hostile[i][1]));
        cr_assert_eq(kvf_mem_get(&mem, &p, hostile[i][0], hostile[i][1], &err), KVF_ERR_NOMEM);
        cr_assert_null(p);
        cr_assert_eq(err.code, KVF_ERR_NOMEM);
        cr_assert(strlen(err.msg) > 10);
    }
    cr_assert_eq(t.calls, 0);
}

Test(mem, reserve_keeps_content_and_zeroes_the_new)
{
    tally t = { 0 };
    kvf_mem mem = { tally_alloc, tally_release, &t };
    int32_t *a = NULL;
    int64_t cap = 0;
    void *buf = NULL;
    for (int64_t n = 1; n < 5000; n += 7) {
        int64_t before = cap;
        cr_assert_eq(kvf_reserve(&mem, &buf, &cap, n, sizeof *a, NULL), KVF_OK);
        a = buf;
        cr_assert_geq(cap, n);
        for (int64_t i = 0; i < before; i++) cr_assert_eq(a[i], (int32_t)i);
        for (int64_t i = before; i < cap; i++) {
            cr_assert_eq(a[i], 0);
            a[i] = (int32_t)i;
        }
    }
    cr_assert_lt(t.calls, 40, "growth is geometric, not by one");
    t.fail_at = t.calls + 1;
    int64_t was = cap;
    kvf_error err = { 0 };
    cr_assert_eq(kvf_reserve(&mem, &buf, &cap, cap + 1, sizeof *a, &err), KVF_ERR_NOMEM);
    cr_assert_eq(cap, was);
    cr_assert_eq(buf, a);
    cr_assert_eq(a[was - 1], (int32_t)(was - 1));
    cr_assert_eq(kvf_reserve(&mem, &buf, &cap, INT64_MAX, 4096, &err), KVF_ERR_NOMEM);
    cr_assert_eq(buf, a);
    kvf_free(&mem, buf);
    cr_assert_eq(t.live, 0);
}

/* ---- option.h ---- */

typedef struct demo {
    int64_t topk;
    double keep;
} demo;

static const kvf_option demo_options[] = {
    KVF_OPT_I64(demo, topk, 16, 1, 1000000000000, "blocks read"),
    KVF_OPT_F64(demo, keep, 0.5, -1.5, 1.0, "share kept"),
    { 0 },
};

typedef struct words {
    int64_t before, mode, only;
    char kind[KVF_OPTION_TEXT_BYTES];
    int64_t after;
} words;

static const kvf_option word_options[] = {
    KVF_OPT_CHOICE(words, mode, 1, "mean|max|m", "how scores are joined"),
    KVF_OPT_CHOICE(words, only, 0, "one", "a choice of one"),
    KVF_OPT_TEXT(words, kind, "flat", "the index"),
    { 0 },
};

static kvf_status parse_words(words *w, const char *text, kvf_error *err)
{
    kvf_options_default(word_options, w);
    return kvf_options_parse(word_options, w, text, strlen(text), "demo", err);
}

static kvf_status parse(demo *d, const char *text, kvf_error *err)
{
    kvf_options_default(demo_options, d);
    return kvf_options_parse(demo_options, d, text, strlen(text), "demo", err);
}

Test(option, defaults_values_and_both_ends_of_ranges)
{
    demo d;
    cr_assert_eq(parse(&d, "", NULL), KVF_OK);
    cr_assert(d.topk == 16 && d.keep == 0.5);
    cr_assert_eq(parse(&d, "topk=32,keep=0.25", NULL), KVF_OK);
    cr_assert(d.topk == 32 && d.keep == 0.25);
    cr_assert_eq(parse(&d, "keep=-1.5,topk=1000000000000", NULL), KVF_OK);
    cr_assert(d.topk == 1000000000000 && d.keep == -1.5);
    cr_assert_eq(parse(&d, "topk=1,keep=+1.0", NULL), KVF_OK);
    cr_assert(d.topk == 1 && d.keep == 1.0);
    cr_assert_eq(parse(&d, "topk=5,topk=6", NULL), KVF_OK);
    cr_assert_eq(d.topk, 6, "the last one counts");
}

Test(option, hostile_text_is_an_error_that_names_the_key)
{
    static const char *const bad[] = {
        "topk",          "topk=",         "topk=0",     "topk=1000000000001", "topk=1.0",   "topk=1e3",
        "topk=0x10",     "topk= 1",       "topk=1 ",    "topk=--1",           "topk=+-1",   "topk=99999999999999999999",
        "keep=1.0001",   "keep=nan",      "keep=inf",   "keep=0,5",           "keep=.",     "keep=-",
        "keep=1.2.3",    "=",             "=1",         ",",                  "topk=1,",    ",topk=1",
        "topk=1,,keep=1", "TOPK=1",       "top=1",      "topkk=1",            "topk==1",    "keep=1e-1",
        "keep=0.00000000000000000000000000000001"
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        demo d;
        kvf_error err = { 0 };
        cr_assert_eq(parse(&d, bad[i], &err), KVF_ERR_ARG, "'%s'", bad[i]);
        cr_assert(strstr(err.msg, "demo") != NULL, "'%s': %s", bad[i], err.msg);
        cr_assert_eq(parse(&d, bad[i], NULL), KVF_ERR_ARG);
    }
    demo d;
    kvf_error err = { 0 };
    parse(&d, "speed=1", &err);
    cr_assert(strstr(err.msg, "speed") && strstr(err.msg, "topk") && strstr(err.msg, "keep"), "%s", err.msg);
}

Test(option, random_bytes_never_leave_the_range)
{
    uint64_t rng = 7;
    static const char alphabet[] = "topkee=,.+-0123456789 \n\xff";
    for (int i = 0; i < 200000; i++) {
        char text[24];
        size_t n = next_random(&rng) % sizeof text;
        for (size_t j = 0; j < n; j++) text[j] = alphabet[next_random(&rng) % (sizeof alphabet - 1)];
        demo d;
        kvf_options_default(demo_options, &d);
        kvf_options_parse(demo_options, &d, text, n, "demo", NULL);
        cr_assert(d.topk >= 1 && d.topk <= 1000000000000 && d.keep >= -1.5 && d.keep <= 1.0);
    }
}

Test(option, what_is_printed_parses_back)
{
    demo d = { 77, 0.125 }, back;
    char text[64], tiny[9];
    kvf_options_print(demo_options, &d, text, sizeof text);
    cr_assert_str_eq(text, "topk=77,keep=0.125");
    cr_assert_eq(parse(&back, text, NULL), KVF_OK);
    cr_assert(back.topk == d.topk && back.keep == d.keep);
    kvf_options_print(demo_options, &d, tiny, sizeof tiny);
    cr_assert_str_eq(tiny, "topk=77,");
}

Test(option, numbers_print_as_they_were_written)
{
    static const char *const same[] = { "0", "0.5", "-1.5", "0.1", "0.95", "1", "0.001", "-0.001", "0.0011", "0.123456789",
                                        "0.3333333333", "0.99999", "-1.00001" };
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        demo d;
        char in[64], out[64];
        snprintf(in, sizeof in, "topk=16,keep=%s", same[i]);
        cr_assert_eq(parse(&d, in, NULL), KVF_OK);
        kvf_options_print(demo_options, &d, out, sizeof out);
        cr_assert_str_eq(in, out);
        cr_assert_eq(d.keep, strtod(same[i], NULL), "the nearest double of %s", same[i]);
    }
    uint64_t rng = 11;
    for (int i = 0; i < 100000; i++) { /* any value comes back to 15 digits */
        demo d = { 1, (double)(int64_t)(next_random(&rng) >> 11) / 9007199254740992.0 }, back;
        char out[64];
        kvf_options_print(demo_options, &d, out, sizeof out);
        cr_assert_eq(parse(&back, out, NULL), KVF_OK, "%s", out);
        cr_assert(fabs(back.keep - d.keep) <= 1e-15, "%s", out);
    }
}

Test(option, words_and_texts_have_defaults_values_and_prints)
{
    words w;
    memset(&w, 0x55, sizeof w);
    int64_t guard = w.before;
    char text[96];
    cr_assert_eq(parse_words(&w, "", NULL), KVF_OK);
    cr_assert(w.mode == 1 && w.only == 0);
    cr_assert_str_eq(w.kind, "flat");
    kvf_options_print(word_options, &w, text, sizeof text);
    cr_assert_str_eq(text, "mode=max,only=one,kind=flat");
    cr_assert_eq(parse_words(&w, "mode=m,kind=PQ32x4fs+R_a-b/1.0,only=one", NULL), KVF_OK);
    cr_assert(w.mode == 2);
    kvf_options_print(word_options, &w, text, sizeof text);
    cr_assert_str_eq(text, "mode=m,only=one,kind=PQ32x4fs+R_a-b/1.0");
    cr_assert_eq(parse_words(&w, text, NULL), KVF_OK);
    cr_assert_eq(parse_words(&w, "mode=mean", NULL), KVF_OK);
    cr_assert_eq(w.mode, 0);
    for (int i = 0; i < KVF_OPTION_TEXT_BYTES; i++) cr_assert(i < 4 || w.kind[i] == 0, "the rest is zero");
    cr_assert(w.before == guard && w.after == guard, "neighbours of the fields are untouched");
    char longest[64] = "kind=";
    for (int n = 1; n <= KVF_OPTION_TEXT_BYTES; n++) {
        longest[4 + n] = 'x';
        longest[5 + n] = 0;
        cr_assert_eq(parse_words(&w, longest, NULL), n < KVF_OPTION_TEXT_BYTES ? KVF_OK : KVF_ERR_ARG, "%d letters", n);
        cr_assert_eq(w.after, guard);
    }
}

Test(option, a_wrong_word_or_letter_is_an_error_that_lists_the_right_ones)
{
    static const char *const bad[] = { "mode=",     "mode",      "mode=Max",   "mode=ma",   "mode=maxx",     "mode=1",
                                       "mode=|",    "mode=max|m", "mode=mean|", "only=two",  "only=",         "kind=",
                                       "kind",      "kind=a b",  "kind=a=b",   "kind=a:b",  "kind=\xc3\xa4", "kind=a\n",
                                       "kind=a,b",  "mode= max", "kind=a%sb",  "kind=a;b" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        words w;
        kvf_error err = { 0 };
        cr_assert_eq(parse_words(&w, bad[i], &err), KVF_ERR_ARG, "'%s'", bad[i]);
        cr_assert(strstr(err.msg, "demo") != NULL, "'%s': %s", bad[i], err.msg);
    }
    words w;
    kvf_error err = { 0 };
    parse_words(&w, "mode=Mean", &err);
    cr_assert(strstr(err.msg, "mean, max, m,") && strstr(err.msg, "'Mean'"), "%s", err.msg);
    parse_words(&w, "kind=a b", &err);
    cr_assert(strstr(err.msg, "kind") && strstr(err.msg, "47") && strstr(err.msg, "'a b'"), "%s", err.msg);
    static const char nul[] = "kind=a\0b";
    cr_assert_eq(kvf_options_parse(word_options, &w, nul, sizeof nul - 1, "demo", NULL), KVF_ERR_ARG);
}

/* ---- threads.h ---- */

typedef struct job {
    _Atomic int32_t *seen; /* [n] times an index was given out */
    int32_t n_threads;
    _Atomic int32_t bad_worker;
    volatile double sink;
} job;

static void count_index(void *arg, int64_t i, int32_t worker)
{
    job *j = arg;
    if (worker < 0 || worker >= j->n_threads) atomic_store(&j->bad_worker, 1);
    atomic_fetch_add(&j->seen[i], 1);
}

static void count_uneven(void *arg, int64_t i, int32_t worker)
{
    double x = 1;
    for (int64_t k = 0; k < (i % 17) * (i % 17) * 20; k++) x = x * 1.0000001 + 1e-9;
    if (x < 0) ((job *)arg)->sink = x;
    count_index(arg, i, worker);
}

static void run_and_check(kvf_threads *pool, int64_t n, kvf_task_fn fn)
{
    job j = { calloc((size_t)n + 1, sizeof(*j.seen)), kvf_threads_count(pool), 0, 0 };
    kvf_threads_run(pool, n, fn, &j);
    for (int64_t i = 0; i < n; i++) cr_assert_eq(atomic_load(&j.seen[i]), 1, "index %d of %d", (int)i, (int)n);
    cr_assert_eq(atomic_load(&j.bad_worker), 0);
    free(j.seen);
}

Test(threads, every_index_once_for_all_thread_counts_and_sizes)
{
    static const int64_t sizes[] = { 0, 1, 2, 3, 7, 8, 9, 64, 1000 };
    for (int32_t n_threads = 1; n_threads <= 8; n_threads++) {
        kvf_threads *pool;
        cr_assert_eq(kvf_threads_open(&pool, n_threads, &kvf_mem_default, NULL), KVF_OK);
        cr_assert_eq(kvf_threads_count(pool), n_threads);
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            run_and_check(pool, sizes[i], count_index);
            run_and_check(pool, sizes[i], count_uneven);
        }
        kvf_threads_close(pool);
    }
    kvf_threads_close(NULL);
}

/* Writes of one run must be visible to the next without any lock of the caller's. */
static void add_one(void *arg, int64_t i, int32_t worker)
{
    (void)worker;
    ((int64_t *)arg)[i]++;
}

Test(threads, many_short_runs_see_each_others_writes)
{
    kvf_threads *pool;
    cr_assert_eq(kvf_threads_open(&pool, 3, &kvf_mem_default, NULL), KVF_OK);
    int64_t cells[13] = { 0 };
    for (int run = 0; run < 3000; run++) kvf_threads_run(pool, 13, add_one, cells);
    for (int i = 0; i < 13; i++) cr_assert_eq(cells[i], 3000);
    kvf_threads_close(pool);
}

static void *caller_main(void *arg)
{
    int64_t cells[5] = { 0 };
    for (int run = 0; run < 200; run++) kvf_threads_run(arg, 5, add_one, cells);
    for (int i = 0; i < 5; i++)
        if (cells[i] != 200) return arg;
    return NULL;
}

Test(threads, several_callers_take_turns)
{
    kvf_threads *pool;
    cr_assert_eq(kvf_threads_open(&pool, 2, &kvf_mem_default, NULL), KVF_OK);
    pthread_t callers[4];
    for (int i = 0; i < 4; i++) cr_assert_eq(pthread_create(&callers[i], NULL, caller_main, pool), 0);
    for (int i = 0; i < 4; i++) {
        void *bad;
        pthread_join(callers[i], &bad);
        cr_assert_null(bad, "a caller saw an index run more or less than once");
    }
    kvf_threads_close(pool);
}

Test(threads, open_fails_cleanly_at_every_allocation)
{
    for (int64_t k = 1; k < 10; k++) {
        tally t = { .fail_at = k };
        kvf_mem mem = { tally_alloc, tally_release, &t };
        kvf_threads *pool = (kvf_threads *)&t;
        kvf_error err = { 0 };
        kvf_status rc = kvf_threads_open(&pool, 3, &mem, &err);
        if (rc == KVF_OK) kvf_threads_close(pool);
        else cr_assert(rc == KVF_ERR_NOMEM && pool == NULL && err.code == KVF_ERR_NOMEM);
        cr_assert_eq(t.live, 0);
    }
}

/* ---- error.h ---- */

Test(error, long_messages_are_cut_and_null_is_allowed)
{
    char text[2000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    kvf_error err;
    memset(&err, 0xff, sizeof err);
    cr_assert_eq(kvf_fail(&err, KVF_ERR_IO, "%s", text), KVF_ERR_IO);
    cr_assert_eq(err.code, KVF_ERR_IO);
    cr_assert_eq(strlen(err.msg), sizeof err.msg - 1);
    kvf_error_prefix(&err, "in '%s': ", text);
    cr_assert_eq(strlen(err.msg), sizeof err.msg - 1);
    cr_assert_eq(kvf_fail(NULL, KVF_ERR_ARG, "%d", 1), KVF_ERR_ARG);
    kvf_error_prefix(NULL, "x");
}

Test(error, prefix_comes_first_and_the_rest_stays)
{
    kvf_error err;
    kvf_fail(&err, KVF_ERR_FORMAT, "tensor '%s' is cut", "a");
    kvf_error_prefix(&err, "%s: ", "m.gguf");
    cr_assert_str_eq(err.msg, "m.gguf: tensor 'a' is cut");
    cr_assert_eq(err.code, KVF_ERR_FORMAT);
}

/* ---- cpu.h ---- */

Test(cpu, level_is_the_best_the_flags_allow_and_names_mask_it)
{
    const unsigned avx512 = KVF_CPU_AVX2 | KVF_CPU_AVX512 | KVF_CPU_AVX512_VNNI;
    const struct { unsigned flags; kvf_cpu_level best; } cases[] = {
        { 0, KVF_CPU_LEVEL_REF },
        { KVF_CPU_AVX2, KVF_CPU_LEVEL_AVX2 },
        { KVF_CPU_AVX2 | KVF_CPU_AVX512, KVF_CPU_LEVEL_AVX2 }, /* without VNNI */
        { avx512, KVF_CPU_LEVEL_AVX512 },
        { avx512 | KVF_CPU_AVX512_BF16 | KVF_CPU_AMX, KVF_CPU_LEVEL_AMX },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        kvf_cpu_level level;
        cr_assert_eq(kvf_cpu_level_parse(&level, NULL, cases[i].flags, NULL), KVF_OK);
        cr_assert_eq(level, cases[i].best);
        cr_assert_eq(kvf_cpu_level_parse(&level, "auto", cases[i].flags, NULL), KVF_OK);
        cr_assert_eq(level, cases[i].best);
        for (int want = 0; want <= KVF_CPU_LEVEL_AMX; want++) {
            kvf_error err = { 0 };
            kvf_status rc = kvf_cpu_level_parse(&level, kvf_cpu_level_name((kvf_cpu_level)want), cases[i].flags, &err);
            cr_assert_eq(rc, want <= (int)cases[i].best ? KVF_OK : KVF_ERR_UNSUPPORTED);
            if (rc == KVF_OK) cr_assert_eq((int)level, want);
        }
    }
}

Test(cpu, unknown_names_are_refused_with_the_list)
{
    static const char *const bad[] = { "AVX2", "avx", "avx2 ", "sse", "avx5120", "amx,ref" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_cpu_level level;
        kvf_error err = { 0 };
        cr_assert_eq(kvf_cpu_level_parse(&level, bad[i], ~0u, &err), KVF_ERR_ARG, "%s", bad[i]);
        cr_assert(strstr(err.msg, "avx512") != NULL);
    }
}

Test(cpu, detection_is_stable_and_counts_at_least_one_core)
{
    unsigned flags = kvf_cpu_detect();
    cr_assert_eq(flags, kvf_cpu_detect());
    cr_assert_geq(kvf_cpu_count(), 1);
    if (flags & KVF_CPU_AMX) cr_assert(flags & KVF_CPU_AVX512_BF16);
    if (flags & KVF_CPU_AVX512) cr_assert(flags & KVF_CPU_AVX2);
}
