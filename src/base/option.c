/* option.c - see option.h. Numbers are parsed without strtod, whose decimal point follows the
 * locale of the host program.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/option.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static void set_value(const kvf_option *o, void *state, double v)
{
    if (o->type == KVF_OPTION_I64) {
        int64_t i = (int64_t)v;
        memcpy((char *)state + o->offset, &i, sizeof i);
    } else {
        memcpy((char *)state + o->offset, &v, sizeof v);
    }
}

void kvf_options_default(const kvf_option *table, void *state)
{
    for (const kvf_option *o = table; o && o->name; o++) set_value(o, state, o->def);
}

/* [+-]digits[.digits]; at most 15 digits before the point, so that the double is exact. */
static bool parse_number(const char *s, size_t n, double *out, bool *is_int)
{
    size_t i = 0;
    bool neg = false;
    if (i < n && (s[i] == '-' || s[i] == '+')) neg = s[i++] == '-';
    size_t start = i;
    double v = 0;
    while (i < n && s[i] >= '0' && s[i] <= '9') v = v * 10 + (s[i++] - '0');
    size_t n_digit = i - start;
    *is_int = true;
    if (i < n && s[i] == '.') {
        *is_int = false;
        double unit = 0.1;
        for (i++; i < n && s[i] >= '0' && s[i] <= '9'; i++, n_digit++, unit /= 10) v += unit * (s[i] - '0');
    }
    if (i != n || n_digit == 0 || n_digit > 30 || v > 9e15) return false;
    *out = neg ? -v : v;
    return true;
}

static kvf_status fail_unknown(const kvf_option *table, const char *key, size_t n, const char *who,
                               kvf_error *err)
{
    char list[256] = "";
    size_t at = 0;
    for (const kvf_option *o = table; o && o->name; o++) {
        int w = snprintf(list + at, sizeof list - at, "%s%s", at ? ", " : "", o->name);
        if (w < 0 || (size_t)w >= sizeof list - at) break;
        at += (size_t)w;
    }
    return kvf_fail(err, KVF_ERR_ARG, "%s has no option '%.*s'; %s%s", who, n > 64 ? 64 : (int)n, key,
                    at ? "it has " : "it has none", list);
}

static kvf_status parse_one(const kvf_option *table, void *state, const char *text, size_t n,
                            const char *who, kvf_error *err)
{
    const char *eq = memchr(text, '=', n);
    size_t n_key = eq ? (size_t)(eq - text) : n;
    const kvf_option *o = table;
    for (; o && o->name; o++)
        if (strlen(o->name) == n_key && memcmp(o->name, text, n_key) == 0) break;
    if (!o || !o->name) return fail_unknown(table, text, n_key, who, err);
    double v = 0;
    bool is_int = false;
    size_t n_value = eq ? n - n_key - 1 : 0;
    bool ok = eq && parse_number(eq + 1, n_value, &v, &is_int);
    if (!ok || (o->type == KVF_OPTION_I64 && !is_int) || v < o->min || v > o->max)
        return kvf_fail(err, KVF_ERR_ARG, "%s: %s must be %s from %.10g to %.10g, not '%.*s'", who, o->name,
                        o->type == KVF_OPTION_I64 ? "a whole number" : "a number", o->min, o->max,
                        n_value > 64 ? 64 : (int)n_value, eq ? eq + 1 : "");
    set_value(o, state, v);
    return KVF_OK;
}

kvf_status kvf_options_parse(const kvf_option *table, void *state, const char *text, size_t n,
                             const char *who, kvf_error *err)
{
    while (n > 0) {
        const char *comma = memchr(text, ',', n);
        size_t len = comma ? (size_t)(comma - text) : n;
        KVF_TRY(parse_one(table, state, text, len, who, err));
        if (!comma) return KVF_OK;
        text += len + 1;
        n -= len + 1;
        if (n == 0) return kvf_fail(err, KVF_ERR_ARG, "%s: nothing follows the last comma", who);
    }
    return KVF_OK;
}

void kvf_options_print(const kvf_option *table, const void *state, char *out, size_t cap)
{
    size_t at = 0;
    out[0] = 0;
    for (const kvf_option *o = table; o && o->name; o++) {
        const char *field = (const char *)state + o->offset, *comma = at ? "," : "";
        int w;
        if (o->type == KVF_OPTION_I64) {
            int64_t i;
            memcpy(&i, field, sizeof i);
            w = snprintf(out + at, cap - at, "%s%s=%" PRId64, comma, o->name, i);
        } else {
            double d;
            memcpy(&d, field, sizeof d);
            w = snprintf(out + at, cap - at, "%s%s=%g", comma, o->name, d);
        }
        if (w < 0 || (size_t)w >= cap - at) return;
        at += (size_t)w;
    }
}
