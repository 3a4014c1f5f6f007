/* test_gguf.c - every promise and every refusal of model/gguf.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* mkstemp, truncate */
#include <criterion/criterion.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "model/gguf.h"
#include "unit/gguf_image.h"

enum { U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 };
#define Q4_K 12u
#define DIM(...) (const uint64_t[]){ __VA_ARGS__ }

/* An allocator that counts, so that hostile sizes can be shown not to reach it. */
typedef struct meter {
    size_t largest, live, fail_at, calls;
} meter;

static void *meter_alloc(void *user, size_t bytes)
{
    meter *m = user;
    if (++m->calls == m->fail_at) return NULL;
    if (bytes > m->largest) m->largest = bytes;
    m->live++;
    return malloc(bytes);
}

static void meter_release(void *user, void *p)
{
    ((meter *)user)->live--;
    free(p);
}

static meter count;
static const kvf_mem mem = { meter_alloc, meter_release, &count };
static kvf_error err;

/* Opened from a block of exactly n bytes, so that ASan sees a read past the end. */
typedef struct opened {
    kvf_gguf *g;
    uint8_t *copy;
    kvf_status rc;
} opened;

static opened open_bytes(const uint8_t *p, size_t n)
{
    opened o = { NULL, malloc(n ? n : 1), KVF_OK };
    if (n) memcpy(o.copy, p, n);
    memset(&err, 0, sizeof err);
    o.rc = kvf_gguf_open_memory(&o.g, n ? o.copy : NULL, n, &mem, &err);
    cr_assert_eq(o.rc == KVF_OK, o.g != NULL);
    cr_assert(o.rc == KVF_OK || (err.code == o.rc && strlen(err.msg) > 20));
    return o;
}

static void close_bytes(opened *o)
{
    kvf_gguf_close(o->g);
    free(o->copy);
    cr_assert_eq(count.live, 0, "%zu blocks leaked", count.live);
}

/* Opens, closes and frees the image; the message must hold `word`. */
static void refuse(image *g, kvf_status want, const char *word)
{
    opened o = open_bytes(g->p, g->n);
    cr_expect_eq(o.rc, want, "%s: %d %s", word, o.rc, err.msg);
    cr_expect(o.rc != KVF_OK && strstr(err.msg, word), "'%s' is not in: %s", word, err.msg);
    close_bytes(&o);
    img_free(g);
}

static void accept(image *g)
{
    opened o = open_bytes(g->p, g->n);
    cr_expect_eq(o.rc, KVF_OK, "%s", err.msg);
    close_bytes(&o);
    img_free(g);
}

/* Two tensors, every kind of value. */
static image sample(void)
{
    image g = img_new(2, 16);
    static const char *const words[] = { "", "a", "\xe2\x96\x81the", "line\nfeed" };
    img_kv_str(&g, "general.architecture", "llama");
    img_key(&g, "u8", U8); img_u8(&g, 200);
    img_key(&g, "i8", I8); img_u8(&g, 0x80);
    img_key(&g, "u16", U16); img_bytes(&g, &(uint16_t){ 65535 }, 2);
    img_key(&g, "i16", I16); img_bytes(&g, &(int16_t){ -32768 }, 2);
    img_kv_u32(&g, "u32", 4294967295u);
    img_key(&g, "i32", I32); img_bytes(&g, &(int32_t){ -7 }, 4);
    img_kv_f32(&g, "f32", 0.5f);
    img_kv_bool(&g, "yes", 1);
    img_kv_bool(&g, "no", 0);
    img_key(&g, "u64", U64); img_u64(&g, UINT64_MAX);
    img_key(&g, "i64", I64); img_u64(&g, (uint64_t)INT64_MIN);
    img_key(&g, "f64", F64); img_bytes(&g, &(double){ -2.25 }, 8);
    img_kv_strs(&g, "words", words, 4);
    img_kv_arr(&g, "scores", F32, 3); img_f32(&g, 1); img_f32(&g, -2); img_f32(&g, 3);
    img_kv_arr(&g, "none", I32, 0);
    img_tensor(&g, "w.f32", 2, DIM(3, 2), 0, 0);
    img_tensor(&g, "w.q4k", 4, DIM(256, 2, 1, 1), Q4_K, 32);
    img_data(&g, 32, 32 + 288);
    return g;
}

/* ---- What a good file gives ----------------------------------------------------------- */

Test(gguf, opens_a_file_with_every_kind_of_value)
{
    image im = sample();
    opened o = open_bytes(im.p, im.n);
    cr_assert_eq(o.rc, KVF_OK, "%s", err.msg);
    cr_expect_eq(kvf_gguf_n_kv(o.g), 16);
    cr_expect_eq(kvf_gguf_n_tensor(o.g), 2);
    cr_expect_eq(kvf_gguf_file_bytes(o.g), im.n);
    cr_expect_null(kvf_gguf_kv_at(o.g, -1));
    cr_expect_null(kvf_gguf_kv_at(o.g, 16));
    cr_expect_null(kvf_gguf_tensor_at(o.g, 2));
    cr_expect_null(kvf_gguf_find(o.g, ""));
    cr_expect_null(kvf_gguf_find(o.g, "general.architectur"));
    cr_expect_null(kvf_gguf_find_tensor(o.g, "u32"));
    for (int64_t i = 0; i < 16; i++) {
        char key[64] = { 0 };
        const kvf_gguf_kv *kv = kvf_gguf_kv_at(o.g, i);
        memcpy(key, kv->key.p, kv->key.n);
        cr_expect_eq(kvf_gguf_find(o.g, key), kv);
    }
    const kvf_gguf_tensor *t = kvf_gguf_find_tensor(o.g, "w.q4k");
    cr_assert_not_null(t);
    cr_expect(t->type == KVF_DTYPE_Q4_K && t->n_dim == 4 && t->bytes == 288);
    cr_expect(t->dim[0] == 256 && t->dim[1] == 2 && t->dim[2] == 1 && t->dim[3] == 1);
    cr_expect_eq((const uint8_t *)t->data, o.copy + im.n - 288);
    t = kvf_gguf_find_tensor(o.g, "w.f32");
    cr_expect(t->type == KVF_DTYPE_F32 && t->n_dim == 2 && t->bytes == 24 && t->dim[2] == 1 && t->dim[3] == 1);
    cr_expect_eq((const uint8_t *)t->data, o.copy + im.n - 320);
    const kvf_gguf_kv *kv = kvf_gguf_find(o.g, "scores");
    float score[3];
    cr_assert_eq(kv->bytes, sizeof score);
    memcpy(score, kv->data, sizeof score);
    cr_expect(kv->type == KVF_GGUF_ARR && kv->elem == KVF_GGUF_F32 && kv->count == 3 && score[1] == -2.0f);
    close_bytes(&o);
    img_free(&im);
}

Test(gguf, integers_come_from_any_integer_type_within_a_range)
{
    image im = sample();
    opened o = open_bytes(im.p, im.n);
    static const struct { const char *key; int64_t v; } want[] = {
        { "u8", 200 }, { "i8", -128 }, { "u16", 65535 }, { "i16", -32768 }, { "u32", 4294967295 }, { "i32", -7 },
        { "i64", INT64_MIN },
    };
    int64_t v = 0;
    for (size_t i = 0; i < sizeof want / sizeof want[0]; i++) {
        cr_expect_eq(kvf_gguf_get_int(o.g, want[i].key, INT64_MIN, INT64_MAX, &v, &err), KVF_OK);
        cr_expect_eq(v, want[i].v, "%s", want[i].key);
        cr_expect_eq(kvf_gguf_get_int_or(o.g, want[i].key, want[i].v, want[i].v, 1, &v, &err), KVF_OK);
        if (want[i].v == INT64_MIN) continue;
        cr_expect_eq(kvf_gguf_get_int(o.g, want[i].key, INT64_MIN, want[i].v - 1, &v, &err), KVF_ERR_FORMAT);
        cr_expect(strstr(err.msg, want[i].key));
        cr_expect_eq(kvf_gguf_get_int(o.g, want[i].key, want[i].v + 1, INT64_MAX, &v, &err), KVF_ERR_FORMAT);
    }
    /* 2^64 - 1 fits no range of int64_t. */
    cr_expect_eq(kvf_gguf_get_int(o.g, "u64", INT64_MIN, INT64_MAX, &v, &err), KVF_ERR_FORMAT);
    cr_expect_eq(kvf_gguf_get_int(o.g, "i8", 0, 10, &v, &err), KVF_ERR_FORMAT);
    cr_expect(strstr(err.msg, "'i8'") && strstr(err.msg, "-128") && strstr(err.msg, "0 to 10"), "%s", err.msg);
    cr_expect_eq(kvf_gguf_get_int(o.g, "absent", 0, 10, &v, &err), KVF_ERR_FORMAT);
    cr_expect(strstr(err.msg, "'absent'"));
    cr_expect_eq(kvf_gguf_get_int_or(o.g, "absent", 0, 10, 99, &v, &err), KVF_OK);
    cr_expect_eq(v, 99);
    static const char *const not_ints[] = { "f32", "f64", "yes", "general.architecture", "scores", "none" };
    for (size_t i = 0; i < sizeof not_ints / sizeof not_ints[0]; i++) {
        cr_expect_eq(kvf_gguf_get_int(o.g, not_ints[i], 0, 10, &v, &err), KVF_ERR_FORMAT);
        cr_expect_eq(kvf_gguf_get_int_or(o.g, not_ints[i], 0, 10, 3, &v, &err), KVF_ERR_FORMAT);
        cr_expect(strstr(err.msg, not_ints[i]));
    }
    cr_expect_eq(kvf_gguf_get_int(o.g, "absent", 0, 10, &v, NULL), KVF_ERR_FORMAT);
    close_bytes(&o);
    img_free(&im);
}

Test(gguf, floats_bools_and_strings_are_typed)
{
    image im = sample();
    opened o = open_bytes(im.p, im.n);
    float f = 0;
    bool b = false;
    kvf_str s;
    cr_expect(kvf_gguf_get_float_or(o.g, "f32", 1, &f, &err) == KVF_OK && f == 0.5f);
    cr_expect(kvf_gguf_get_float_or(o.g, "f64", 1, &f, &err) == KVF_OK && f == -2.25f);
    cr_expect(kvf_gguf_get_float_or(o.g, "absent", 7, &f, &err) == KVF_OK && f == 7);
    cr_expect_eq(kvf_gguf_get_float_or(o.g, "u32", 7, &f, &err), KVF_ERR_FORMAT);
    cr_expect(kvf_gguf_get_bool_or(o.g, "yes", false, &b, &err) == KVF_OK && b);
    cr_expect(kvf_gguf_get_bool_or(o.g, "no", true, &b, &err) == KVF_OK && !b);
    cr_expect(kvf_gguf_get_bool_or(o.g, "absent", true, &b, &err) == KVF_OK && b);
    cr_expect_eq(kvf_gguf_get_bool_or(o.g, "u8", true, &b, &err), KVF_ERR_FORMAT);
    cr_expect(kvf_gguf_get_str(o.g, "general.architecture", &s, &err) == KVF_OK && s.n == 5);
    cr_expect(memcmp(s.p, "llama", 5) == 0);
    cr_expect_eq(kvf_gguf_get_str(o.g, "absent", &s, &err), KVF_ERR_FORMAT);
    cr_expect(strstr(err.msg, "'absent'"));
    cr_expect_eq(kvf_gguf_get_str(o.g, "words", &s, &err), KVF_ERR_FORMAT);
    cr_expect(kvf_gguf_get_str_or_null(o.g, "absent", &s, &err) == KVF_OK && s.p == NULL && s.n == 0);
    cr_expect_eq(kvf_gguf_get_str_or_null(o.g, "yes", &s, &err), KVF_ERR_FORMAT);
    close_bytes(&o);
    img_free(&im);
}

Test(gguf, a_float_that_is_not_finite_is_refused)
{
    static const double bad[] = { INFINITY, -INFINITY, NAN, 1e300, -3.5e38 };
    for (size_t i = 0; i < 5; i++) {
        image im = img_new(0, 2);
        float f = (float)(i < 3 ? bad[i] : INFINITY);
        img_kv_f32(&im, "f", f);
        img_key(&im, "d", F64);
        img_bytes(&im, &bad[i], 8);
        opened o = open_bytes(im.p, im.n);
        cr_expect_eq(kvf_gguf_get_float_or(o.g, "f", 1, &f, &err), KVF_ERR_FORMAT);
        cr_expect_eq(kvf_gguf_get_float_or(o.g, "d", 1, &f, &err), KVF_ERR_FORMAT);
        cr_expect(strstr(err.msg, "'d'"));
        close_bytes(&o);
        img_free(&im);
    }
}

Test(gguf, walking_strings_gives_each_once)
{
    image im = sample();
    opened o = open_bytes(im.p, im.n);
    static const char *const words[] = { "", "a", "\xe2\x96\x81the", "line\nfeed" };
    const kvf_gguf_kv *kv = kvf_gguf_find(o.g, "words");
    size_t at = 0, n = 0;
    kvf_str s;
    while (kvf_gguf_next_str(kv, &at, &s)) {
        cr_assert_lt(n, 4);
        cr_expect(s.n == strlen(words[n]) && memcmp(s.p, words[n], s.n) == 0);
        n++;
    }
    cr_expect_eq(n, 4);
    cr_expect_eq(kv->count, 4);
    cr_expect_not(kvf_gguf_next_str(kv, &at, &s));
    at = SIZE_MAX;
    cr_expect_not(kvf_gguf_next_str(kv, &at, &s));
    at = 0;
    cr_expect_not(kvf_gguf_next_str(kvf_gguf_find(o.g, "scores"), &at, &s));
    close_bytes(&o);
    img_free(&im);
}

/* ---- Text for display ----------------------------------------------------------------- */

static void expect_text(const kvf_gguf *g, const char *key, const char *type, const char *value)
{
    char t[32], v[64];
    kvf_gguf_describe(kvf_gguf_find(g, key), t, sizeof t, v, sizeof v);
    cr_expect_str_eq(t, type, "%s: %s", key, t);
    cr_expect_str_eq(v, value, "%s: %s", key, v);
}

Test(gguf, describe_writes_types_and_values)
{
    setlocale(LC_ALL, "de_DE.UTF-8"); /* where there is one: no comma in numbers */
    image im = sample();
    opened o = open_bytes(im.p, im.n);
    expect_text(o.g, "u8", "u8", "200");
    expect_text(o.g, "i64", "i64", "-9223372036854775808");
    expect_text(o.g, "u64", "u64", "18446744073709551615");
    expect_text(o.g, "f32", "f32", "0.5");
    expect_text(o.g, "f64", "f64", "-2.25");
    expect_text(o.g, "yes", "bool", "true");
    expect_text(o.g, "general.architecture", "str", "llama");
    expect_text(o.g, "scores", "arr[f32, 3]", "[1, -2, 3]");
    expect_text(o.g, "none", "arr[i32, 0]", "[]");
    expect_text(o.g, "words", "arr[str, 4]", "[\"\", \"a\", \"\xe2\x96\x81the\", \"line feed\"]");
    close_bytes(&o);
    img_free(&im);
}

Test(gguf, describe_never_splits_a_character_nor_passes_the_buffer)
{
    image im = img_new(0, 1);
    img_kv_str(&im, "s", "ab\xe2\x96\x81" "cd\xf0\x9f\x98\x80z");
    opened o = open_bytes(im.p, im.n);
    for (size_t cap = 0; cap < 16; cap++) {
        char *t = malloc(cap + 1), *v = malloc(cap + 1);
        memset(v, 'X', cap + 1);
        kvf_gguf_describe(kvf_gguf_kv_at(o.g, 0), t, cap, v, cap);
        cr_expect_eq(v[cap], 'X');
        if (cap > 0) {
            size_t n = strlen(v);
            cr_expect_lt(n, cap);
            cr_expect(memcmp(v, "ab\xe2\x96\x81" "cd\xf0\x9f\x98\x80z", n) == 0);
            cr_expect(n <= 2 || (n != 3 && n != 4 && n != 8 && n != 9 && n != 10), "cut at %zu", n);
        }
        free(t);
        free(v);
    }
    close_bytes(&o);
    img_free(&im);
}

Test(gguf, describe_hands_no_control_bytes_to_a_terminal)
{
    /* Escape, delete, a C1 control, a surrogate, overlong and lone bytes. */
    static const char nasty[] =
        "\x1b[2J|\x7f|\xc2\x9b|\xed\xa0\x80|\xc0\xaf|\xff|\xe2\x82|\xf4\x90\x80\x80|\xe0\x80\xaf";
    image im = img_new(0, 1);
    img_kv_str(&im, "s", nasty);
    opened o = open_bytes(im.p, im.n);
    expect_text(o.g, "s", "str", "?[2J|?|??|???|??|?|??|????|???");
    close_bytes(&o);
    img_free(&im);
}

/* ---- Refusals: header ----------------------------------------------------------------- */

Test(gguf, an_empty_or_foreign_file_is_refused)
{
    opened o = open_bytes(NULL, 0);
    cr_expect(o.rc == KVF_ERR_FORMAT && strstr(err.msg, "empty"));
    close_bytes(&o);
    static const char *const foreign[] = { "G", "GGU", "ggml", "%PDF-1.7 and more than twenty-four bytes",
                                            "PK\3\4zipzipzip" };
    for (size_t i = 0; i < 5; i++) {
        o = open_bytes((const uint8_t *)foreign[i], strlen(foreign[i]));
        cr_expect(o.rc == KVF_ERR_FORMAT && strstr(err.msg, "not a GGUF file"), "%s", err.msg);
        close_bytes(&o);
    }
}

Test(gguf, byte_order_and_version_are_named)
{
    image g = sample();
    memcpy(g.p, "FUGG", 4);
    refuse(&g, KVF_ERR_UNSUPPORTED, "big-endian");
    g = sample();
    memcpy(g.p + 4, "\0\0\0\3", 4);
    refuse(&g, KVF_ERR_UNSUPPORTED, "big-endian");
    static const uint32_t versions[] = { 0, 1, 2, 4, 99, 0x7fffffff };
    for (size_t i = 0; i < 6; i++) {
        char word[32];
        snprintf(word, sizeof word, "version %u", versions[i]);
        g = sample();
        memcpy(g.p + 4, &versions[i], 4);
        refuse(&g, KVF_ERR_UNSUPPORTED, word);
    }
}

Test(gguf, counts_the_file_cannot_hold_fail_before_memory_is_taken)
{
    static const uint64_t counts[] = { 100, 1u << 20, 1u << 31, UINT64_C(1) << 32, UINT64_C(1) << 62, UINT64_C(1) << 63,
                                       UINT64_MAX };
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        for (size_t field = 8; field <= 16; field += 8) {
            image g = sample();
            memcpy(g.p + field, &counts[i], 8);
            count = (meter){ 0 };
            refuse(&g, KVF_ERR_FORMAT, "");
            cr_expect_lt(count.largest, 64 * 1024, "%zu bytes for a file of 800", count.largest);
        }
    }
    /* The claim is just plausible, the content is not there. */
    image g = img_new(0, 1000000);
    for (size_t i = 0; i < 13 * 1000000 / 8; i++) img_u64(&g, UINT64_MAX);
    count = (meter){ 0 };
    refuse(&g, KVF_ERR_FORMAT, "metadata key 1 of 1000000");
    cr_expect_lt(count.largest, 64 * 1024);
}

/* ---- Refusals: metadata --------------------------------------------------------------- */

Test(gguf, lengths_beyond_the_file_are_refused)
{
    static const uint64_t lengths[] = { 1000, INT64_MAX, UINT64_C(1) << 63, UINT64_MAX - 7, UINT64_MAX };
    for (size_t i = 0; i < 5; i++) {
        image g = img_new(0, 1);
        img_u64(&g, lengths[i]); /* of the key */
        img_data(&g, 1, 64);
        refuse(&g, KVF_ERR_FORMAT, "metadata key 1 of 1");
        g = img_new(0, 1);
        img_key(&g, "the.key", STR);
        img_u64(&g, lengths[i]);
        img_data(&g, 1, 64);
        refuse(&g, KVF_ERR_FORMAT, "'the.key'");
        for (uint32_t elem = U8; elem <= F64; elem++) {
            if (elem == ARR) continue;
            g = img_new(0, 1);
            img_kv_arr(&g, "the.key", elem, lengths[i]);
            img_data(&g, 1, 64);
            refuse(&g, KVF_ERR_FORMAT, "'the.key'");
        }
    }
}

Test(gguf, an_overflowing_string_inside_an_array_is_refused)
{
    image g = img_new(0, 1);
    img_kv_arr(&g, "the.key", STR, 3);
    img_str(&g, "fine");
    img_u64(&g, UINT64_MAX - 3);
    img_data(&g, 1, 64);
    refuse(&g, KVF_ERR_FORMAT, "'the.key'");
}

Test(gguf, unknown_value_types_and_nested_arrays_are_refused)
{
    static const uint32_t types[] = { 13, 14, 255, 0x80000000u, UINT32_MAX };
    for (size_t i = 0; i < 5; i++) {
        char word[32];
        snprintf(word, sizeof word, "type %u", types[i]);
        image g = img_new(0, 1);
        img_key(&g, "the.key", types[i]);
        img_data(&g, 1, 64);
        refuse(&g, KVF_ERR_FORMAT, word);
        g = img_new(0, 1);
        img_kv_arr(&g, "the.key", types[i], 1);
        img_data(&g, 1, 64);
        refuse(&g, KVF_ERR_FORMAT, word);
    }
    image g = img_new(0, 1);
    img_kv_arr(&g, "the.key", ARR, 1);
    img_u32(&g, U8);
    img_u64(&g, 1);
    img_u8(&g, 1);
    refuse(&g, KVF_ERR_FORMAT, "array of arrays");
}

Test(gguf, duplicate_names_are_refused)
{
    image g = img_new(0, 3);
    img_kv_u32(&g, "same", 1);
    img_kv_u32(&g, "other", 1);
    img_kv_f32(&g, "same", 1);
    refuse(&g, KVF_ERR_FORMAT, "'same' is there twice");
    g = img_new(2, 0);
    img_tensor(&g, "same", 1, DIM(8), 0, 0);
    img_tensor(&g, "same", 1, DIM(8), 0, 32);
    img_data(&g, 32, 64);
    refuse(&g, KVF_ERR_FORMAT, "'same' is there twice");
    /* A prefix is another name. */
    g = img_new(0, 3);
    img_kv_u32(&g, "", 1);
    img_kv_u32(&g, "a", 1);
    img_kv_u32(&g, "aa", 1);
    accept(&g);
}

Test(gguf, messages_stay_printable_whatever_the_names)
{
    char name[4000];
    memset(name, '\x1b', sizeof name - 1);
    name[sizeof name - 1] = 0;
    image g = img_new(0, 1);
    img_key(&g, name, 77);
    opened o = open_bytes(g.p, g.n);
    cr_expect_eq(o.rc, KVF_ERR_FORMAT);
    for (const char *p = err.msg; *p; p++) cr_assert(*p >= 0x20 && *p < 0x7f);
    cr_expect(strstr(err.msg, "fetch the file again"), "%s", err.msg);
    close_bytes(&o);
    img_free(&g);
}

Test(gguf, alignment_is_a_power_of_two_of_eight_or_more)
{
    for (uint64_t a = 0; a <= 4096; a++) {
        bool good = a >= 8 && (a & (a - 1)) == 0;
        if (!good && a > 70 && a % 97) continue;
        image g = img_new(1, 1);
        img_kv_u32(&g, "general.alignment", (uint32_t)a);
        img_tensor(&g, "w", 1, DIM(8), 0, 0);
        img_data(&g, good ? a : 32, 32);
        if (good) accept(&g);
        else refuse(&g, KVF_ERR_FORMAT, "general.alignment");
    }
    image g = img_new(0, 1);
    img_kv_str(&g, "general.alignment", "32");
    refuse(&g, KVF_ERR_FORMAT, "general.alignment");
    g = img_new(0, 1);
    img_kv_u32(&g, "general.alignment", 0x80000000u);
    refuse(&g, KVF_ERR_FORMAT, "general.alignment");
}

/* ---- Refusals: tensors ---------------------------------------------------------------- */

static image one_tensor(uint32_t n_dim, const uint64_t *dim, uint32_t type, uint64_t offset, size_t data)
{
    image g = img_new(1, 0);
    img_tensor(&g, "the.tensor", n_dim, dim, type, offset);
    img_data(&g, 32, data);
    return g;
}

Test(gguf, tensor_types_are_those_of_the_table)
{
    for (uint32_t type = 0; type < 64; type++) {
        const kvf_dtype_info *t = kvf_dtype_get(type);
        image g = one_tensor(1, DIM(256), type, 0, 1024);
        if (t) {
            accept(&g);
            continue;
        }
        char word[48];
        snprintf(word, sizeof word, "'the.tensor' has type number %u", type);
        refuse(&g, KVF_ERR_UNSUPPORTED, word);
    }
    image g = one_tensor(1, DIM(256), UINT32_MAX, 0, 1024);
    refuse(&g, KVF_ERR_UNSUPPORTED, "4294967295");
}

Test(gguf, dimensions_are_1_to_4_and_positive)
{
    static const uint64_t ones[] = { 8, 1, 1, 1, 1, 1 };
    for (uint32_t n = 0; n <= 6; n++) {
        image g = one_tensor(n, ones, 0, 0, 1024);
        if (n >= 1 && n <= 4) accept(&g);
        else refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
    }
    image g = img_new(1, 0);
    img_str(&g, "the.tensor");
    img_u32(&g, UINT32_MAX);
    img_data(&g, 32, 1024);
    refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
    for (uint32_t at = 0; at < 4; at++) {
        uint64_t dim[4] = { 8, 1, 1, 1 };
        static const uint64_t bad[] = { 0, UINT64_C(1) << 63, UINT64_MAX, INT64_MAX, UINT64_C(1) << 60 };
        for (size_t i = 0; i < 5; i++) {
            dim[at] = bad[i];
            g = one_tensor(4, dim, 0, 0, 1024);
            refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
        }
    }
    /* Products that wrap around to something small. */
    g = one_tensor(2, DIM(UINT64_C(1) << 32, UINT64_C(1) << 32), 0, 0, 1024);
    refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
    g = one_tensor(4, DIM(1 << 16, 1 << 16, 1 << 16, 1 << 16), 0, 0, 1024);
    refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
    g = one_tensor(2, DIM(UINT64_C(1) << 31, UINT64_C(1) << 31), 0, 0, 1024); /* 2^64 bytes */
    refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
}

Test(gguf, rows_are_whole_blocks)
{
    image g = one_tensor(2, DIM(255, 256), Q4_K, 0, 65536);
    refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
    g = one_tensor(2, DIM(128, 2), Q4_K, 0, 65536); /* the product is a block, the row is not */
    refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
    g = one_tensor(2, DIM(16, 2), 8, 0, 65536);
    refuse(&g, KVF_ERR_FORMAT, "Q8_0");
    g = one_tensor(2, DIM(896, 3), 8, 0, 28 * 34 * 3);
    accept(&g);
}

Test(gguf, data_lie_inside_the_file)
{
    image g = one_tensor(1, DIM(8), 0, 0, 32);
    accept(&g);
    g = one_tensor(1, DIM(8), 0, 0, 31);
    refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
    g = one_tensor(1, DIM(8), 0, 32, 64);
    accept(&g);
    static const uint64_t offsets[] = { 64, 1024, INT64_MAX - 31, UINT64_C(1) << 63, UINT64_MAX - 31, UINT64_MAX - 63 };
    for (size_t i = 0; i < 6; i++) {
        g = one_tensor(1, DIM(8), 0, offsets[i], 64);
        refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
    }
    for (uint64_t off = 1; off < 32; off++) {
        g = one_tensor(1, DIM(8), 0, off, 128);
        refuse(&g, KVF_ERR_FORMAT, "unaligned");
    }
    g = img_new(1, 0); /* ends before the padding */
    img_tensor(&g, "the.tensor", 1, DIM(8), 0, 0);
    refuse(&g, KVF_ERR_FORMAT, "'the.tensor'");
}

Test(gguf, tensors_share_no_bytes)
{
    /* In any order in the directory; gaps are allowed. */
    static const uint64_t good[][3] = { { 0, 32, 64 }, { 64, 32, 0 }, { 96, 0, 192 }, { 32, 192, 0 } };
    static const uint64_t bad[][3] = { { 0, 0, 64 }, { 64, 0, 64 }, { 0, 32, 32 }, { 32, 32, 32 } };
    for (size_t i = 0; i < 4; i++) {
        for (int ok = 0; ok < 2; ok++) {
            image g = img_new(3, 0);
            for (size_t t = 0; t < 3; t++) {
                char name[8] = { 't', (char)('0' + t), 0 };
                img_tensor(&g, name, 1, DIM(8), 0, ok ? good[i][t] : bad[i][t]);
            }
            img_data(&g, 32, 256);
            if (ok) accept(&g);
            else refuse(&g, KVF_ERR_FORMAT, "shares data");
        }
    }
    image g = img_new(2, 0); /* partly */
    img_tensor(&g, "a", 1, DIM(9), 0, 0);
    img_tensor(&g, "b", 1, DIM(8), 0, 32);
    img_data(&g, 32, 256);
    refuse(&g, KVF_ERR_FORMAT, "'b' shares data");
}

Test(gguf, many_shuffled_tensors_are_all_found)
{
    enum { N = 3000 };
    image g = img_new(N, 0);
    for (uint64_t i = 0; i < N; i++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%d.w", (int)i);
        img_tensor(&g, name, 1, DIM(8), 0, (i * 1999 % N) * 32);
    }
    img_data(&g, 32, N * 32);
    opened o = open_bytes(g.p, g.n);
    cr_assert_eq(o.rc, KVF_OK, "%s", err.msg);
    const uint8_t *start = o.copy + g.n - (size_t)N * 32;
    for (uint64_t i = 0; i < N; i++) {
        char name[32];
        snprintf(name, sizeof name, "blk.%d.w", (int)i);
        const kvf_gguf_tensor *t = kvf_gguf_find_tensor(o.g, name);
        cr_assert_not_null(t);
        cr_assert_eq(t, kvf_gguf_tensor_at(o.g, (int64_t)i));
        cr_assert_eq((const uint8_t *)t->data, start + (i * 1999 % N) * 32);
    }
    cr_expect_null(kvf_gguf_find_tensor(o.g, "blk.3000.w"));
    close_bytes(&o);
    img_free(&g);
}

/* ---- Damage, everywhere --------------------------------------------------------------- */

/* Touch all that an open file promises, so that ASan would see a lie. */
static uint64_t walk(const kvf_gguf *g)
{
    uint64_t sum = 0;
    for (int64_t i = 0; i < kvf_gguf_n_kv(g); i++) {
        const kvf_gguf_kv *kv = kvf_gguf_kv_at(g, i);
        char type[40], value[80];
        size_t at = 0;
        kvf_str s;
        kvf_gguf_describe(kv, type, sizeof type, value, sizeof value);
        while (kvf_gguf_next_str(kv, &at, &s)) sum += s.n ? (uint8_t)s.p[s.n - 1] : 0;
        for (size_t b = 0; b < kv->bytes; b++) sum += kv->data[b];
    }
    for (int64_t i = 0; i < kvf_gguf_n_tensor(g); i++) {
        const kvf_gguf_tensor *t = kvf_gguf_tensor_at(g, i);
        for (size_t b = 0; b < t->bytes; b++) sum += ((const uint8_t *)t->data)[b];
    }
    return sum;
}

Test(gguf, every_truncation_is_refused)
{
    image im = sample();
    for (size_t n = 0; n <= im.n; n++) {
        opened o = open_bytes(im.p, n);
        cr_assert_eq(o.rc == KVF_OK, n == im.n, "%zu of %zu bytes: %s", n, im.n, err.msg);
        if (n < im.n) cr_assert_eq(o.rc, KVF_ERR_FORMAT);
        close_bytes(&o);
    }
    img_free(&im);
}

Test(gguf, every_changed_byte_is_survived)
{
    image im = sample();
    static const uint8_t change[] = { 0x01, 0x04, 0x08, 0x80, 0xff, 0x7f };
    uint64_t sum = 0;
    for (size_t i = 0; i < im.n; i++) {
        for (size_t k = 0; k < sizeof change; k++) {
            im.p[i] ^= change[k];
            count = (meter){ 0 };
            opened o = open_bytes(im.p, im.n);
            if (o.g) sum += walk(o.g);
            cr_assert_lt(count.largest, 64 * 1024);
            close_bytes(&o);
            im.p[i] ^= change[k];
        }
    }
    cr_expect_gt(sum, 0);
    img_free(&im);
}

Test(gguf, random_damage_is_survived)
{
    uint64_t state = 12345, sum = 0;
    for (int round = 0; round < 20000; round++) {
        image im = sample();
        for (int k = 0; k < 1 + round % 6; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            size_t at = (size_t)(state >> 33) % (im.n - 320);
            im.p[at] = (uint8_t)(state >> 24);
        }
        opened o = open_bytes(im.p, im.n);
        if (o.g) sum += walk(o.g);
        close_bytes(&o);
        img_free(&im);
    }
    cr_expect_gt(sum, 0);
}

Test(gguf, every_failing_allocation_is_reported_and_leaks_nothing)
{
    image im = sample();
    size_t k = 1;
    for (;; k++) {
        count = (meter){ .fail_at = k };
        opened o = open_bytes(im.p, im.n);
        kvf_status rc = o.rc;
        close_bytes(&o);
        if (rc == KVF_OK) break;
        cr_assert_eq(rc, KVF_ERR_NOMEM);
    }
    cr_expect_gt(k, 5);
    img_free(&im);
}

/* ---- Files ---------------------------------------------------------------------------- */

Test(gguf, files_are_mapped_and_errors_name_them)
{
    char path[] = "/tmp/kvf_test_gguf_XXXXXX";
    int fd = mkstemp(path);
    cr_assert_geq(fd, 0);
    kvf_gguf *g;
    cr_expect_eq(kvf_gguf_open(&g, path, &mem, &err), KVF_ERR_FORMAT);
    cr_expect(strstr(err.msg, path) && strstr(err.msg, "empty"), "%s", err.msg);
    image im = sample();
    cr_assert_eq(write(fd, im.p, im.n), (ssize_t)im.n);
    close(fd);
    cr_assert_eq(kvf_gguf_open(&g, path, &mem, &err), KVF_OK, "%s", err.msg);
    cr_expect_eq(kvf_gguf_file_bytes(g), im.n);
    cr_expect_gt(walk(g), 0);
    kvf_gguf_close(g);
    cr_expect_eq(truncate(path, (off_t)im.n - 1), 0);
    cr_expect_eq(kvf_gguf_open(&g, path, &mem, &err), KVF_ERR_FORMAT);
    cr_expect(strstr(err.msg, path) && strstr(err.msg, "'w.q4k'"), "%s", err.msg);
    cr_expect_null(g);
    unlink(path);
    cr_expect_eq(kvf_gguf_open(&g, path, &mem, &err), KVF_ERR_IO);
    cr_expect(strstr(err.msg, path));
    cr_expect_eq(kvf_gguf_open(&g, "/", &mem, &err), KVF_ERR_IO);
    cr_expect_null(g);
    kvf_gguf_close(NULL);
    cr_expect_eq(count.live, 0);
    img_free(&im);
}

Test(gguf, a_vocabulary_of_real_size_opens_fast)
{
    enum { N = 151936 };
    image im = img_new(0, 1);
    img_kv_arr(&im, "tokenizer.ggml.tokens", STR, N);
    for (int i = 0; i < N; i++) {
        char token[24];
        snprintf(token, sizeof token, "token%d", i);
        img_str(&im, token);
    }
    opened o = open_bytes(im.p, im.n);
    cr_assert_eq(o.rc, KVF_OK, "%s", err.msg);
    const kvf_gguf_kv *kv = kvf_gguf_find(o.g, "tokenizer.ggml.tokens");
    size_t at = 0;
    int64_t n = 0;
    kvf_str s;
    while (kvf_gguf_next_str(kv, &at, &s)) n++;
    cr_expect_eq(n, N);
    cr_expect_lt(count.largest, 64 * 1024); /* the strings are not copied */
    close_bytes(&o);
    img_free(&im);
}
