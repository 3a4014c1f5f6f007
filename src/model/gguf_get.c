/* gguf_get.c - values of GGUF metadata: typed, walked and as text. See gguf.h.
 *
 * Everything here reads what gguf.c has checked to lie inside the file.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/gguf.h"

#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct {
    const char *name;
    uint8_t bytes; /* 0: not of fixed size */
} kinds[] = {
    [KVF_GGUF_U8] = { "u8", 1 },   [KVF_GGUF_I8] = { "i8", 1 },     [KVF_GGUF_U16] = { "u16", 2 },
    [KVF_GGUF_I16] = { "i16", 2 }, [KVF_GGUF_U32] = { "u32", 4 },   [KVF_GGUF_I32] = { "i32", 4 },
    [KVF_GGUF_F32] = { "f32", 4 }, [KVF_GGUF_BOOL] = { "bool", 1 }, [KVF_GGUF_STR] = { "str", 0 },
    [KVF_GGUF_ARR] = { "arr", 0 }, [KVF_GGUF_U64] = { "u64", 8 },   [KVF_GGUF_I64] = { "i64", 8 },
    [KVF_GGUF_F64] = { "f64", 8 },
};

/* ---- Typed access --------------------------------------------------------------------- */

static kvf_status fail_missing(const char *key, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' is missing; convert the model again", key);
}

static kvf_status fail_type(const kvf_gguf_kv *kv, const char *key, const char *want, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' is of type %s, not %s; convert the model again", key,
                    kinds[kv->type].name, want);
}

/* An integer of any type; *big when it is over INT64_MAX. False: not an integer. */
static bool read_int(kvf_gguf_type type, const uint8_t *p, int64_t *out, bool *big)
{
    *big = false;
    switch (type) {
    case KVF_GGUF_U8: *out = *p; return true;
    case KVF_GGUF_I8: { int8_t v; memcpy(&v, p, sizeof v); *out = v; return true; }
    case KVF_GGUF_U16: { uint16_t v; memcpy(&v, p, sizeof v); *out = v; return true; }
    case KVF_GGUF_I16: { int16_t v; memcpy(&v, p, sizeof v); *out = v; return true; }
    case KVF_GGUF_U32: { uint32_t v; memcpy(&v, p, sizeof v); *out = v; return true; }
    case KVF_GGUF_I32: { int32_t v; memcpy(&v, p, sizeof v); *out = v; return true; }
    case KVF_GGUF_I64: memcpy(out, p, sizeof *out); return true;
    case KVF_GGUF_U64: {
        uint64_t v;
        memcpy(&v, p, sizeof v);
        *big = v > INT64_MAX;
        *out = *big ? INT64_MAX : (int64_t)v;
        return true;
    }
    default: return false;
    }
}

kvf_status kvf_gguf_get_int(const kvf_gguf *g, const char *key, int64_t min, int64_t max, int64_t *out, kvf_error *err)
{
    const kvf_gguf_kv *kv = kvf_gguf_find(g, key);
    if (!kv) return fail_missing(key, err);
    int64_t v;
    bool big;
    if (!read_int(kv->type, kv->data, &v, &big)) return fail_type(kv, key, "an integer", err);
    if (big || v < min || v > max) {
        return kvf_fail(err, KVF_ERR_FORMAT,
                        "metadata key '%s' is %s%" PRId64 ", outside %" PRId64 " to %" PRId64
                        "; convert the model again", key, big ? "over " : "", v, min, max);
    }
    *out = v;
    return KVF_OK;
}

kvf_status kvf_gguf_get_int_or(const kvf_gguf *g, const char *key, int64_t min, int64_t max, int64_t def, int64_t *out, kvf_error *err)
{
    if (kvf_gguf_find(g, key)) return kvf_gguf_get_int(g, key, min, max, out, err);
    *out = def;
    return KVF_OK;
}

static double read_float(kvf_gguf_type type, const uint8_t *p)
{
    double d;
    float f;
    if (type == KVF_GGUF_F64) {
        memcpy(&d, p, sizeof d);
        return d;
    }
    memcpy(&f, p, sizeof f);
    return (double)f;
}

kvf_status kvf_gguf_get_float_or(const kvf_gguf *g, const char *key, float def, float *out, kvf_error *err)
{
    const kvf_gguf_kv *kv = kvf_gguf_find(g, key);
    if (!kv) {
        *out = def;
        return KVF_OK;
    }
    if (kv->type != KVF_GGUF_F32 && kv->type != KVF_GGUF_F64) return fail_type(kv, key, "a float", err);
    double v = read_float(kv->type, kv->data);
    /* Compared as double: converting a value beyond FLT_MAX is undefined. Also refuses NaN. */
    if (!(fabs(v) <= (double)FLT_MAX)) {
        return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' is not a finite number; convert the model again", key);
    }
    *out = (float)v;
    return KVF_OK;
}

kvf_status kvf_gguf_get_bool_or(const kvf_gguf *g, const char *key, bool def, bool *out, kvf_error *err)
{
    const kvf_gguf_kv *kv = kvf_gguf_find(g, key);
    if (kv && kv->type != KVF_GGUF_BOOL) return fail_type(kv, key, "a bool", err);
    *out = kv ? *kv->data != 0 : def;
    return KVF_OK;
}

kvf_status kvf_gguf_get_str_or_null(const kvf_gguf *g, const char *key, kvf_str *out, kvf_error *err)
{
    const kvf_gguf_kv *kv = kvf_gguf_find(g, key);
    out->p = NULL;
    out->n = 0;
    if (!kv) return KVF_OK;
    if (kv->type != KVF_GGUF_STR) return fail_type(kv, key, "a string", err);
    size_t at = 0;
    kvf_gguf_next_str(kv, &at, out);
    return KVF_OK;
}

kvf_status kvf_gguf_get_str(const kvf_gguf *g, const char *key, kvf_str *out, kvf_error *err)
{
    KVF_TRY(kvf_gguf_get_str_or_null(g, key, out, err));
    return out->p ? KVF_OK : fail_missing(key, err);
}

/* ---- Strings -------------------------------------------------------------------------- */

/* A lone string is walked as an array of one. */
bool kvf_gguf_next_str(const kvf_gguf_kv *kv, size_t *at, kvf_str *out)
{
    uint64_t n;
    if (kv->elem != KVF_GGUF_STR || *at > kv->bytes || kv->bytes - *at < sizeof n) return false;
    memcpy(&n, kv->data + *at, sizeof n);
    if (n > kv->bytes - *at - sizeof n) return false;
    out->p = (const char *)kv->data + *at + sizeof n;
    out->n = (size_t)n;
    *at += sizeof n + (size_t)n;
    return true;
}

/* ---- Text ----------------------------------------------------------------------------- */

/* Text that grows up to cap - 1 bytes; the rest is dropped. */
typedef struct text {
    char *p;
    size_t n, cap;
} text;

static bool is_full(const text *t) { return t->n + 1 >= t->cap; }

/* Add all n bytes or, to keep characters whole, none and be full. */
static void add(text *t, const char *p, size_t n)
{
    if (n > t->cap - 1 - t->n) {
        t->cap = t->n + 1;
        return;
    }
    memcpy(t->p + t->n, p, n);
    t->n += n;
}

static void add_ascii(text *t, const char *s)
{
    for (; *s; s++) add(t, s, 1);
}

/* Length of the UTF-8 character at p, 0 if it is none that a terminal may be given: control
 * characters (a model's author must not write to the user's terminal), surrogates, overlong. */
static size_t printable_bytes(const uint8_t *p, size_t n)
{
    if (p[0] < 0x80) return p[0] >= 0x20 && p[0] != 0x7f;
    size_t len = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc2 || p[0] > 0xf4 || len > n) return 0;
    uint32_t c = p[0] & (0xffu >> (len + 1));
    for (size_t i = 1; i < len; i++) {
        if ((p[i] & 0xc0u) != 0x80u) return 0;
        c = c << 6 | (p[i] & 0x3fu);
    }
    if (c < 0xa0 || (len == 3 && c < 0x800) || (len == 4 && c < 0x10000)) return 0;
    return c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff) ? 0 : len;
}

static void add_string(text *t, kvf_str s)
{
    for (size_t i = 0; i < s.n && !is_full(t);) {
        const uint8_t *p = (const uint8_t *)s.p + i;
        size_t len = printable_bytes(p, s.n - i);
        if (len) add(t, s.p + i, len);
        else if (*p == '\n' || *p == '\t' || *p == '\r') add(t, " ", 1);
        else add(t, "?", 1);
        i += len ? len : 1;
    }
}

static void add_float(text *t, double v)
{
    char buf[48];
    snprintf(buf, sizeof buf, "%.7g", v);
    /* The decimal point is the host's locale's, and may be more than one byte. */
    char *w = buf;
    for (const char *r = buf; *r; r++) {
        if ((uint8_t)*r < 0x80 && *r != ',') *w++ = *r;
        else if (w == buf || w[-1] != '.') *w++ = '.';
    }
    *w = 0;
    add_ascii(t, buf);
}

static void add_number(text *t, kvf_gguf_type type, const uint8_t *p)
{
    char buf[32];
    int64_t v;
    bool big;
    if (type == KVF_GGUF_BOOL) {
        add_ascii(t, *p ? "true" : "false");
    } else if (type == KVF_GGUF_U64) {
        uint64_t u;
        memcpy(&u, p, sizeof u);
        snprintf(buf, sizeof buf, "%" PRIu64, u);
        add_ascii(t, buf);
    } else if (read_int(type, p, &v, &big)) {
        snprintf(buf, sizeof buf, "%" PRId64, v);
        add_ascii(t, buf);
    } else {
        add_float(t, read_float(type, p));
    }
}

static void add_value(text *t, const kvf_gguf_kv *kv)
{
    bool quoted = kv->type == KVF_GGUF_ARR;
    size_t at = 0;
    if (quoted) add_ascii(t, "[");
    for (int64_t i = 0; i < kv->count && !is_full(t); i++) {
        if (i > 0) add_ascii(t, ", ");
        if (kv->elem == KVF_GGUF_STR) {
            kvf_str s;
            if (!kvf_gguf_next_str(kv, &at, &s)) break;
            if (quoted) add_ascii(t, "\"");
            add_string(t, s);
            if (quoted) add_ascii(t, "\"");
        } else {
            add_number(t, kv->elem, kv->data + at);
            at += kinds[kv->elem].bytes;
        }
    }
    if (quoted) add_ascii(t, "]");
}

void kvf_gguf_describe(const kvf_gguf_kv *kv, char *type, size_t type_cap, char *value, size_t value_cap)
{
    if (type_cap > 0) {
        text t = { type, 0, type_cap };
        char buf[64];
        snprintf(buf, sizeof buf, "arr[%s, %" PRId64 "]", kinds[kv->elem].name, kv->count);
        add_ascii(&t, kv->type == KVF_GGUF_ARR ? buf : kinds[kv->type].name);
        type[t.n] = 0;
    }
    if (value_cap > 0) {
        text t = { value, 0, value_cap };
        add_value(&t, kv);
        value[t.n] = 0;
    }
}
