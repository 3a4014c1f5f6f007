/* test_arrays.c - .npy and safetensors files: what is written is read back, and hostile bytes come to
 * nothing.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "npy.h"
#include "safetensors.h"

/* A file of this test's own; removed by the caller. */
static const char *temporary(void)
{
    static char path[64];
    snprintf(path, sizeof path, "/tmp/kvfold-arrays-%d", (int)getpid());
    return path;
}

static void put(const char *path, const void *bytes, size_t n)
{
    FILE *f = fopen(path, "wb");
    cr_assert(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
}

/* ---- .npy ------------------------------------------------------------------------------- */

/* A version-1 file: this header, padded, and n_data bytes of 1, 2, 3, ... */
static size_t npy_image(char *out, const char *header, size_t n_data)
{
    size_t n = strlen(header), total = (10 + n + 1 + 63) / 64 * 64;
    memcpy(out, "\x93NUMPY\x01\x00", 8);
    out[8] = (char)((total - 10) & 255);
    out[9] = (char)((total - 10) >> 8);
    memset(out + 10, ' ', total - 10);
    memcpy(out + 10, header, n);
    out[total - 1] = '\n';
    for (size_t i = 0; i < n_data; i++) out[total + i] = (char)(i + 1);
    return total + n_data;
}

static kvf_status parse(const char *header, size_t n_data, array_info *a)
{
    char image[4096];
    kvf_error err = { 0 };
    size_t n = npy_image(image, header, n_data);
    kvf_status rc = npy_parse(a, "x.npy", image, n, (int64_t)n, &err);
    cr_assert_eq(rc, rc == KVF_OK ? KVF_OK : err.code);
    if (rc != KVF_OK) cr_assert_gt(strlen(err.msg), 20, "no sentence for %s", header);
    return rc;
}

Test(npy, every_element_type_is_read_as_numbers)
{
    static const struct {
        const char *descr;
        const unsigned char bytes[8];
        float value;
    } cases[] = {
        { "|b1", { 1 }, 1 },
        { "|u1", { 200 }, 200 },
        { "|i1", { 0xff }, -1 },
        { "<u2", { 1, 2 }, 513 },
        { ">u2", { 2, 1 }, 513 },
        { "<i2", { 0xfe, 0xff }, -2 },
        { "<u4", { 0, 0, 1, 0 }, 65536 },
        { "<i4", { 0xfd, 0xff, 0xff, 0xff }, -3 },
        { "<u8", { 7 }, 7 },
        { "<i8", { 0xfc, 255, 255, 255, 255, 255, 255, 255 }, -4 },
        { "<f2", { 0, 0x3e }, 1.5f },
        { "<f4", { 0, 0, 0x20, 0xc0 }, -2.5f },
        { ">f4", { 0xc0, 0x20, 0, 0 }, -2.5f },
        { "<f8", { 0, 0, 0, 0, 0, 0, 0x0c, 0x40 }, 3.5f },
        { "f4", { 0, 0, 0x20, 0xc0 }, -2.5f },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char header[128], image[512];
        snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (1,), }",
                 cases[i].descr);
        size_t n = npy_image(image, header, 8);
        memcpy(image + n - 8, cases[i].bytes, 8);
        put(temporary(), image, n);
        array_file f;
        array_info a;
        kvf_error err = { 0 };
        cr_assert_eq(npy_open(&f, &a, temporary(), &err), KVF_OK, "%s: %s", cases[i].descr, err.msg);
        float v = 0;
        cr_assert_eq(array_read_f32(&f, &a, 0, 1, &v, &err), KVF_OK);
        cr_assert_float_eq((double)v, (double)cases[i].value, 0, "%s: %g", cases[i].descr, (double)v);
        array_file_close(&f);
    }
    unlink(temporary());
}

Test(npy, headers_of_any_order_spacing_and_version_are_read)
{
    array_info a;
    cr_assert_eq(parse("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", 24, &a), KVF_OK);
    cr_assert(a.n_dim == 2 && a.shape[0] == 2 && a.shape[1] == 3 && a.n == 6 && a.at == 128);
    cr_assert_eq(parse("{\"shape\":(2,3),'descr':'<f4','fortran_order':False}", 24, &a), KVF_OK);
    cr_assert_eq(parse("{'descr': '<f4', 'fortran_order': False, 'shape': (), }", 4, &a), KVF_OK);
    cr_assert(a.n_dim == 0 && a.n == 1);
    cr_assert_eq(
        parse("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 9223372036854775000), }", 0, &a),
        KVF_OK);
    cr_assert_eq(a.n, 0);
    cr_assert_eq(parse("{'descr': '<f4', 'fortran_order': True, 'shape': (5,), }", 20, &a), KVF_OK);
    cr_assert_eq(parse("{'descr': '<i8', 'fortran_order': False, 'shape': (3L, 2L), }", 48, &a), KVF_OK);
    char image[512];
    size_t n = npy_image(image, "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", 0);
    memmove(image + 12, image + 10, n - 10); /* version 2 has a length of 4 bytes */
    image[6] = 2;
    image[10] = image[11] = 0;
    kvf_error err = { 0 };
    cr_assert_eq(npy_parse(&a, "x", image, n + 2, (int64_t)n + 6, &err), KVF_OK, "%s", err.msg);
}

Test(npy, damaged_and_unsupported_headers_are_errors)
{
    static const char *const damaged[] = {
        "",
        "{",
        "{}",
        "[]",
        "{'descr': '<f4'}",
        "{'descr': '<f4', 'fortran_order': Maybe, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 1}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1.5,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1 2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}",
        "{'descr': '<f4', 'descr': '<f8', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} {",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (7,)}", /* 28 bytes, 24 are there */
    };
    static const char *const unsupported[] = {
        "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3)}",
        "{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<U8', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,1)}",
    };
    array_info a;
    for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++)
        cr_expect_eq(parse(damaged[i], 24, &a), KVF_ERR_FORMAT, "%s", damaged[i]);
    for (size_t i = 0; i < sizeof unsupported / sizeof *unsupported; i++)
        cr_expect_eq(parse(unsupported[i], 24, &a), KVF_ERR_UNSUPPORTED, "%s", unsupported[i]);
}

Test(npy, every_truncation_of_a_file_is_an_error)
{
    char image[512];
    size_t n = npy_image(image, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", 24);
    array_info a;
    for (size_t cut = 0; cut < n; cut++) {
        char *exact = malloc(cut + 1); /* a read past the end is found by the sanitizer */
        memcpy(exact, image, cut);
        cr_expect_eq(npy_parse(&a, "x", exact, cut, (int64_t)cut, NULL), KVF_ERR_FORMAT, "%zu bytes", cut);
        free(exact);
    }
}

Test(npy, what_is_written_is_read_back)
{
    float v[24];
    for (int i = 0; i < 24; i++) v[i] = (float)i / 7 - 1;
    for (int n_dim = 0; n_dim <= 3; n_dim++) {
        array_info w = { .type = ARRAY_F32,
                         .n_dim = n_dim,
                         .shape = { n_dim == 1 ? 24 : 2, n_dim == 2 ? 12 : 3, 4 } };
        array_info a;
        array_file f;
        float back[24] = { 0 };
        cr_assert_eq(npy_write(temporary(), &w, v, NULL), KVF_OK);
        cr_assert_eq(npy_open(&f, &a, temporary(), NULL), KVF_OK);
        cr_assert(a.n_dim == n_dim && a.type == ARRAY_F32 && a.n == (n_dim ? 24 : 1) && a.at % 64 == 0);
        cr_assert_eq(array_read_f32(&f, &a, 0, a.n, back, NULL), KVF_OK);
        cr_assert_arr_eq(back, v, (size_t)a.n * sizeof *v);
        cr_assert_eq(array_read_f32(&f, &a, a.n - 1, 1, back, NULL), KVF_OK);
        cr_assert_float_eq((double)back[0], (double)v[a.n - 1], 0);
        cr_assert_eq(array_read_f32(&f, &a, a.n - 1, 2, back, NULL), KVF_ERR_ARG);
        cr_assert_eq(array_read_f32(&f, &a, -1, 1, back, NULL), KVF_ERR_ARG);
        array_file_close(&f);
    }
    unlink(temporary());
}

Test(npy, integers_are_checked_against_their_range)
{
    double v[4] = { 1, -2147483648.0, 2147483648.0, 0.5 };
    array_info w = { .type = ARRAY_F64, .n_dim = 1, .shape = { 4 } }, a;
    array_file f;
    int32_t out[4];
    cr_assert_eq(npy_write(temporary(), &w, v, NULL), KVF_OK);
    cr_assert_eq(npy_open(&f, &a, temporary(), NULL), KVF_OK);
    cr_assert_eq(array_read_i32(&f, &a, 0, 2, out, NULL), KVF_OK);
    cr_assert(out[0] == 1 && out[1] == INT32_MIN);
    cr_assert_eq(array_read_i32(&f, &a, 2, 1, out, NULL), KVF_ERR_FORMAT);
    cr_assert_eq(array_read_i32(&f, &a, 3, 1, out, NULL), KVF_ERR_FORMAT);
    array_file_close(&f);
    unlink(temporary());
}

Test(npy, files_that_cannot_be_read_or_written_are_errors)
{
    array_file f;
    array_info a, w = { .type = ARRAY_F32, .n_dim = 1, .shape = { 1 } };
    float v = 1;
    cr_expect_eq(npy_open(&f, &a, "/nonexistent/x.npy", NULL), KVF_ERR_IO);
    cr_expect_eq(npy_open(&f, &a, "/tmp", NULL), KVF_ERR_ARG);
    cr_expect_eq(npy_open(&f, &a, "/dev/null", NULL), KVF_ERR_ARG);
    cr_expect_eq(npy_write("/nonexistent/x.npy", &w, &v, NULL), KVF_ERR_IO);
    cr_expect_eq(npy_write("/tmp", &w, &v, NULL), KVF_ERR_IO);
    cr_expect_neq(access("/tmp.partial", F_OK), 0);
    w.type = ARRAY_BF16;
    cr_expect_eq(npy_write(temporary(), &w, &v, NULL), KVF_ERR_UNSUPPORTED);
    if (access("/dev/full", W_OK) == 0) {
        /* A full disk shows when the file is closed, and nothing is left behind. */
        outfile o;
        cr_assert_eq(outfile_open(&o, temporary(), NULL), KVF_OK);
        cr_assert_not_null(freopen("/dev/full", "wb", o.f));
        outfile_write(&o, &v, sizeof v);
        cr_expect_eq(outfile_commit(&o, NULL), KVF_ERR_SPACE);
        cr_expect_neq(access(temporary(), F_OK), 0);
    }
}

Test(array, half_precision_goes_there_and_back_for_every_value)
{
    for (uint32_t h = 0; h < 65536; h++) {
        float v = array_f16((uint16_t)h), b = array_bf16((uint16_t)h);
        if (isnan(v))
            cr_assert(isnan(array_f16(array_to_f16(v))));
        else
            cr_assert_eq(array_to_f16(v), h, "%x", h);
        if (isnan(b))
            cr_assert(isnan(array_bf16(array_to_bf16(b))));
        else
            cr_assert_eq(array_to_bf16(b), h, "%x", h);
    }
    /* Ties go to the even neighbour, what is too large to infinity. */
    cr_assert_eq(array_to_f16(1 + 0x1p-11f), 0x3c00);
    cr_assert_eq(array_to_f16(1 + 3 * 0x1p-11f), 0x3c02);
    cr_assert_eq(array_to_f16(65519), 0x7bff);
    cr_assert_eq(array_to_f16(65520), 0x7c00);
    cr_assert_eq(array_to_f16(0x1p-25f), 0);
    cr_assert_eq(array_to_f16(0x1.8p-24f), 2);
    cr_assert_eq(array_to_f16(-0x1.8p-25f), 0x8001);
    cr_assert_eq(array_to_bf16(1 + 0x1p-8f), 0x3f80);
    cr_assert_eq(array_to_bf16(1 + 3 * 0x1p-8f), 0x3f82);
}

/* ---- safetensors -------------------------------------------------------------------------- */

static kvf_status parse_tensors(safetensors *s, const char *json, size_t n_data)
{
    size_t n = strlen(json);
    char *image = malloc(8 + n + n_data + 1);
    kvf_error err = { 0 };
    for (int i = 0; i < 8; i++) image[i] = (char)((uint64_t)n >> (8 * i));
    memcpy(image + 8, json, n);
    memset(image + 8 + n, 1, n_data);
    kvf_status rc =
        safetensors_parse(s, "x.safetensors", image, 8 + n + n_data, (int64_t)(8 + n + n_data), &err);
    if (rc != KVF_OK) {
        cr_assert_eq(rc, err.code);
        cr_assert_gt(strlen(err.msg), 20, "no sentence for %s", json);
        cr_assert(!s->tensors && !s->texts && !s->n_tensors);
    }
    free(image);
    return rc;
}

Test(safetensors, tensors_and_texts_are_found)
{
    safetensors s;
    cr_assert_eq(parse_tensors(
                     &s,
                     "{\"b\":{\"dtype\":\"F16\",\"shape\":[2,2],\"data_offsets\":[4,12]},\"__metadata__\":{"
                     "\"k\":\"v\"},"
                     "\"a\":{\"dtype\":\"I32\",\"shape\":[],\"data_offsets\":[0,4]},\"e\":{\"dtype\":\"F32\","
                     "\"shape\":[0,3],\"data_offsets\":[12,12]}}  \n",
                     12),
                 KVF_OK);
    cr_assert_eq(s.n_tensors, 3);
    cr_assert_str_eq(s.tensors[0].name, "a");
    const array_info *b = safetensors_find(&s, "b");
    cr_assert(b && b->type == ARRAY_F16 && b->n_dim == 2 && b->n == 4);
    cr_assert_eq(b->at - safetensors_find(&s, "a")->at, 4);
    cr_assert_null(safetensors_find(&s, "c"));
    cr_assert(s.n_texts == 1 && strcmp(s.texts[0].value, "v") == 0);
    safetensors_free(&s);
    cr_assert_eq(parse_tensors(&s, "{}", 0), KVF_OK);
    safetensors_free(&s);
}

Test(safetensors, damaged_headers_are_errors)
{
#define T(shape, offsets) "{\"a\":{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"
    static const char *const bad[] = {
        "",
        "x",
        "[]",
        "{",
        "{}x",
        "{\"a\":1}",
        "{\"a\":{}}",
        T("[1]", "[0,8]"),
        T("[2]", "[0,4]"),
        T("[1]", "[4,8]"),
        T("[1]", "[4,0]"),
        T("[1]", "[0,4,4]"),
        T("[1]", "[0]"),
        T("[1.5]", "[0,6]"),
        T("[-1]", "[0,4]"),
        T("[\"1\"]", "[0,4]"),
        T("[1]", "[0,4e300]"),
        T("[1]", "[-4,0]"),
        T("[4294967296,4294967296]", "[0,4]"),
        T("[9007199254740992,2]", "[0,4]"),
        T("[3]", "[0,12]"), /* 8 bytes are there */
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":["
        "1],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"F32\",\"shape\":["
        "1],\"data_offsets\":[4,8]}}",
        "{\"__metadata__\":1}",
        "{\"__metadata__\":{\"k\":1}}",
        "{\"__metadata__\":{},\"__metadata__\":{}}",
        "{}", /* 8 bytes that belong to nothing */
    };
    safetensors s;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        cr_expect_eq(parse_tensors(&s, bad[i], 8), KVF_ERR_FORMAT, "%s", bad[i]);
    cr_expect_eq(parse_tensors(&s, "{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[8],\"data_offsets\":[0,8]}}", 8),
                 KVF_ERR_UNSUPPORTED);
    cr_expect_eq(parse_tensors(&s, T("[1,1,1,1,1,1,1,1,2]", "[0,8]"), 8), KVF_ERR_UNSUPPORTED);
    static const unsigned char huge[16] = { 255, 255, 255, 255, 255, 255, 255, 127, '{', '}' };
    cr_expect_eq(safetensors_parse(&s, "x", huge, sizeof huge, sizeof huge, NULL), KVF_ERR_FORMAT);
    cr_expect_eq(safetensors_parse(&s, "x", huge, 7, 7, NULL), KVF_ERR_FORMAT);
    /* A thousand brackets do not overflow the stack. */
    char deep[40000];
    memset(deep, '[', sizeof deep - 1);
    deep[sizeof deep - 1] = '\0';
    cr_expect_eq(parse_tensors(&s, deep, 8), KVF_ERR_FORMAT);
}

Test(safetensors, what_is_written_is_read_back)
{
    static char name_a[] = "one", name_b[] = "two \"quoted\"\n", key[] = "k", value[] = "a\tb\\";
    tensor_entry entries[] = { { name_a, { .type = ARRAY_F32, .n_dim = 2, .shape = { 2, 1 } } },
                               { name_b, { .type = ARRAY_U8, .n_dim = 1, .shape = { 3 } } } };
    tensor_text texts[] = { { key, value } };
    safetensors w = { entries, 2, texts, 1 }, r;
    float v[2] = { 1.5f, -2 }, back[2] = { 0 };
    outfile o;
    cr_assert_eq(safetensors_begin(&o, temporary(), &w, NULL), KVF_OK);
    outfile_write(&o, v, sizeof v);
    outfile_write(&o, "abc", 3);
    cr_assert_neq(access(temporary(), F_OK), 0, "the file is there before it is whole");
    cr_assert_eq(outfile_commit(&o, NULL), KVF_OK);
    array_file f;
    kvf_error err = { 0 };
    cr_assert_eq(safetensors_open(&f, &r, temporary(), &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(r.n_tensors, 2);
    const array_info *a = safetensors_find(&r, name_a), *b = safetensors_find(&r, name_b);
    cr_assert(a && b && a->at % 8 == 0);
    cr_assert_eq(array_read_f32(&f, a, 0, 2, back, NULL), KVF_OK);
    cr_assert_arr_eq(back, v, sizeof v);
    cr_assert_eq(array_read_f32(&f, b, 2, 1, back, NULL), KVF_OK);
    cr_assert_float_eq((double)back[0], 'c', 0);
    cr_assert_str_eq(r.texts[0].value, value);
    safetensors_free(&r);
    array_file_close(&f);
    unlink(temporary());
}

Test(safetensors, a_header_cut_anywhere_is_an_error)
{
    static const char json[] = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}";
    unsigned char image[8 + sizeof json - 1 + 8] = { sizeof json - 1 };
    memcpy(image + 8, json, sizeof json - 1);
    safetensors s;
    for (size_t cut = 0; cut < sizeof image; cut++) {
        put(temporary(), image, cut);
        array_file f;
        cr_expect_eq(safetensors_open(&f, &s, temporary(), NULL), KVF_ERR_FORMAT, "%zu bytes", cut);
    }
    unlink(temporary());
}
