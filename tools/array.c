/* array.c - see array.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "array.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "report.h"

/* Elements that are converted at a time: 32 KiB of doubles. */
#define PIECE 4096

static const struct {
    const char *name;
    size_t bytes;
} types[ARRAY_N_TYPES] = {
    [ARRAY_BOOL] = { "bool", 1 }, [ARRAY_U8] = { "u8", 1 },     [ARRAY_I8] = { "i8", 1 },
    [ARRAY_U16] = { "u16", 2 },   [ARRAY_I16] = { "i16", 2 },   [ARRAY_U32] = { "u32", 4 },
    [ARRAY_I32] = { "i32", 4 },   [ARRAY_U64] = { "u64", 8 },   [ARRAY_I64] = { "i64", 8 },
    [ARRAY_F16] = { "f16", 2 },   [ARRAY_BF16] = { "bf16", 2 }, [ARRAY_F32] = { "f32", 4 },
    [ARRAY_F64] = { "f64", 8 },
};

size_t array_type_bytes(array_type t) { return types[t].bytes; }
const char *array_type_name(array_type t) { return types[t].name; }

bool array_set_count(array_info *a)
{
    /* A dimension of 0 makes the array empty however large the others are, so they are checked alone. */
    int64_t n = 1, limit = INT64_MAX / (int64_t)array_type_bytes(a->type);
    bool empty = false;
    for (int i = 0; i < a->n_dim; i++) {
        if (a->shape[i] < 0) return false;
        empty = empty || a->shape[i] == 0;
    }
    for (int i = 0; i < a->n_dim && !empty; i++) {
        if (a->shape[i] > limit / n) return false;
        n *= a->shape[i];
    }
    a->n = empty ? 0 : n;
    return true;
}

const char *array_describe(char out[128], const array_info *a)
{
    size_t n = 0;
    for (int i = 0; i < a->n_dim && n < 96; i++) {
        int w = snprintf(out + n, 128 - n, "%s%" PRId64, i ? ", " : "[", a->shape[i]);
        if (w > 0) n += (size_t)w;
    }
    if (n < 128) snprintf(out + n, 128 - n, "%s %s", a->n_dim ? "]" : "[]", array_type_name(a->type));
    return out;
}

/* ---- Files ----------------------------------------------------------------------------- */

kvf_status array_file_open(array_file *f, const char *path, kvf_error *err)
{
    *f = (array_file){ .fd = -1 };
    /* A pipe without a writer must not make the program wait before it can be refused. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return report_fail(err, KVF_ERR_IO, "Cannot open '%s': %s.", path, strerror(errno));
    struct stat st;
    kvf_status rc = KVF_OK;
    if (fstat(fd, &st) != 0)
        rc = report_fail(err, KVF_ERR_IO, "Cannot look at '%s': %s.", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        rc = report_fail(err, KVF_ERR_ARG, "'%s' is no regular file; arrays are read from files only.", path);
    size_t n = strlen(path) + 1;
    char *copy = rc == KVF_OK ? malloc(n) : NULL;
    if (rc == KVF_OK && !copy) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory to open '%s'.", path);
    if (rc != KVF_OK) {
        close(fd);
        return rc;
    }
    memcpy(copy, path, n);
    *f = (array_file){ .fd = fd, .bytes = (int64_t)st.st_size, .path = copy };
    return KVF_OK;
}

void array_file_close(array_file *f)
{
    if (f->path && f->fd >= 0) close(f->fd);
    free(f->path);
    *f = (array_file){ .fd = -1 };
}

kvf_status array_file_read(const array_file *f, int64_t at, void *out, size_t n, kvf_error *err)
{
    char *to = out;
    while (n) {
        ssize_t got = pread(f->fd, to, n < ((size_t)1 << 30) ? n : (size_t)1 << 30, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return report_fail(err, KVF_ERR_IO, "Cannot read '%s': %s.", f->path, strerror(errno));
        if (got == 0)
            return report_fail(err, KVF_ERR_FORMAT,
                               "'%s' ends at byte %lld, before its data does; copy it again.", f->path,
                               (long long)at);
        to += got;
        at += got;
        n -= (size_t)got;
    }
    return KVF_OK;
}

/* ---- Elements -------------------------------------------------------------------------- */

float array_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else { /* fraction * 2^-24, exact in float */
        float v = (float)fraction * 0x1p-24f;
        return sign ? -v : v;
    }
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

float array_bf16(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

uint16_t array_to_f16(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);  /* NaN */
    if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more */
    if (bits < 0x38800000u) {
        /* Below 2^-14 steps are 2^-24: adding 0.5 makes float round to them. */
        float magic;
        memcpy(&magic, &bits, sizeof magic);
        magic += 0.5f;
        memcpy(&bits, &magic, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1u) - (112u << 23);
    return (uint16_t)(sign | bits >> 13);
}

uint16_t array_to_bf16(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static void swap_bytes(unsigned char *v, int64_t n, size_t width)
{
    for (int64_t i = 0; i < n; i++, v += width)
        for (size_t k = 0; k < width / 2; k++) {
            unsigned char t = v[k];
            v[k] = v[width - 1 - k];
            v[width - 1 - k] = t;
        }
}

static kvf_status check_range(const array_file *f, const array_info *a, int64_t first, int64_t n,
                              kvf_error *err)
{
    if (first >= 0 && n >= 0 && first <= a->n && n <= a->n - first) return KVF_OK;
    return report_fail(err, KVF_ERR_ARG, "'%s' holds %lld elements; %lld from %lld on were asked for.",
                       f->path, (long long)a->n, (long long)n, (long long)first);
}

kvf_status array_read_raw(const array_file *f, const array_info *a, int64_t first, int64_t n, void *out,
                          kvf_error *err)
{
    kvf_status rc = check_range(f, a, first, n, err);
    if (rc != KVF_OK) return rc;
    size_t width = array_type_bytes(a->type);
    rc = array_file_read(f, a->at + first * (int64_t)width, out, (size_t)n * width, err);
    if (rc == KVF_OK && a->swapped) swap_bytes(out, n, width);
    return rc;
}

/* One element as double: every type but the 64-bit integers is exact. */
static double element(const unsigned char *p, array_type t)
{
    union {
        uint16_t u16;
        int16_t i16;
        uint32_t u32;
        int32_t i32;
        uint64_t u64;
        int64_t i64;
        float f32;
        double f64;
    } v;
    memcpy(&v, p, array_type_bytes(t));
    switch (t) {
    case ARRAY_BOOL: return *p != 0;
    case ARRAY_U8: return *p;
    case ARRAY_I8: return (signed char)*p;
    case ARRAY_U16: return v.u16;
    case ARRAY_I16: return v.i16;
    case ARRAY_U32: return v.u32;
    case ARRAY_I32: return v.i32;
    case ARRAY_U64: return (double)v.u64;
    case ARRAY_I64: return (double)v.i64;
    case ARRAY_F16: return (double)array_f16(v.u16);
    case ARRAY_BF16: return (double)array_bf16(v.u16);
    case ARRAY_F32: return (double)v.f32;
    case ARRAY_F64:
    case ARRAY_N_TYPES: break;
    }
    return v.f64;
}

kvf_status array_read_f32(const array_file *f, const array_info *a, int64_t first, int64_t n, float *out,
                          kvf_error *err)
{
    if (a->type == ARRAY_F32) return array_read_raw(f, a, first, n, out, err);
    unsigned char piece[PIECE * sizeof(double)];
    size_t width = array_type_bytes(a->type);
    kvf_status rc = check_range(f, a, first, n, err);
    for (int64_t i = 0; i < n && rc == KVF_OK; i += PIECE) {
        int64_t take = n - i < PIECE ? n - i : PIECE;
        rc = array_read_raw(f, a, first + i, take, piece, err);
        for (int64_t k = 0; k < take && rc == KVF_OK; k++)
            out[i + k] = (float)element(piece + (size_t)k * width, a->type);
    }
    return rc;
}

kvf_status array_read_i32(const array_file *f, const array_info *a, int64_t first, int64_t n, int32_t *out,
                          kvf_error *err)
{
    unsigned char piece[PIECE * sizeof(double)];
    size_t width = array_type_bytes(a->type);
    kvf_status rc = check_range(f, a, first, n, err);
    for (int64_t i = 0; i < n && rc == KVF_OK; i += PIECE) {
        int64_t take = n - i < PIECE ? n - i : PIECE;
        rc = array_read_raw(f, a, first + i, take, piece, err);
        for (int64_t k = 0; k < take && rc == KVF_OK; k++) {
            double v = element(piece + (size_t)k * width, a->type);
            if (!(v >= INT32_MIN && v <= INT32_MAX) || v != (double)(int32_t)v)
                return report_fail(err, KVF_ERR_FORMAT,
                                   "Element %lld of '%s' is %g, which is no 32-bit integer.",
                                   (long long)(first + i + k), f->path, v);
            out[i + k] = (int32_t)v;
        }
    }
    return rc;
}
