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
    if (o->type == KVF_OPTION_F64) {
        memcpy((char *)state + o->offset, &v, sizeof v);
    } else {
        int64_t i = (int64_t)v;
        memcpy((char *)state + o->offset, &i, sizeof i);
    }
}

/* The rest of the field is zeroed, so that states with the same options are the same bytes. */
static void set_text(const kvf_option *o, void *state, const char *text, size_t n)
{
    char *field = (char *)state + o->offset;
    if (n > KVF_OPTION_TEXT_BYTES - 1) n = KVF_OPTION_TEXT_BYTES - 1;
    memcpy(field, text, n);
    memset(field + n, 0, KVF_OPTION_TEXT_BYTES - n);
}

void kvf_options_default(const kvf_option *table, void *state)
{
    for (const kvf_option *o = table; o && o->name; o++) {
        if (o->type == KVF_OPTION_TEXT)
            set_text(o, state, o->words, strlen(o->words));
        else
            set_value(o, state, o->def);
    }
}

/* The word at `place` of "a|b|c"; *n is its length. NULL past the end. */
static const char *word_at(const char *words, int64_t place, size_t *n)
{
    for (; place > 0; place--) {
        words = strchr(words, '|');
        if (!words) return NULL;
        words++;
    }
    *n = strcspn(words, "|");
    return place == 0 ? words : NULL;
}

/* [+-]digits[.digits]; at most 15 digits before the point, so that the double is exact. One division
 * at the end: up to 15 digits in all, the result is the double nearest to the text. */
static bool parse_number(const char *s, size_t n, double *out, bool *is_int)
{
    size_t i = 0;
    bool neg = false;
    if (i < n && (s[i] == '-' || s[i] == '+')) neg = s[i++] == '-';
    size_t start = i;
    double v = 0, unit = 1;
    while (i < n && s[i] >= '0' && s[i] <= '9') v = v * 10 + (s[i++] - '0');
    size_t n_digit = i - start;
    *is_int = true;
    if (i < n && s[i] == '.') {
        *is_int = false;
        for (i++; i < n && s[i] >= '0' && s[i] <= '9'; i++, n_digit++, unit *= 10) v = v * 10 + (s[i] - '0');
    }
    if (i != n || n_digit == 0 || n_digit > 30 || v / unit > 9e15) return false;
    *out = neg ? -v / unit : v / unit;
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

static kvf_status parse_choice(const kvf_option *o, void *state, const char *value, size_t n,
                               const char *who, kvf_error *err)
{
    size_t n_word = 0;
    const char *word;
    for (int64_t i = 0; (word = word_at(o->words, i, &n_word)) != NULL; i++) {
        if (n_word != n || memcmp(word, value, n) != 0) continue;
        set_value(o, state, (double)i);
        return KVF_OK;
    }
    char list[128];
    size_t at = 0;
    for (const char *w = o->words; *w && at + 3 < sizeof list; w++) {
        list[at++] = *w == '|' ? ',' : *w;
        if (*w == '|') list[at++] = ' ';
    }
    list[at] = 0;
    return kvf_fail(err, KVF_ERR_ARG, "%s: %s must be one of %s, not '%.*s'", who, o->name, list,
                    n > 32 ? 32 : (int)n, value);
}

static bool is_text(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        bool letter = (s[i] >= 'a' && s[i] <= 'z') || (s[i] >= 'A' && s[i] <= 'Z') || (s[i] >= '0' && s[i] <= '9');
        if (!letter && (s[i] == 0 || !strchr("._+-/", s[i]))) return false;
    }
    return n > 0 && n < KVF_OPTION_TEXT_BYTES;
}

static kvf_status parse_value(const kvf_option *o, void *state, const char *value, size_t n, const char *who,
                              kvf_error *err)
{
    int shown = n > 64 ? 64 : (int)n;
    if (o->type == KVF_OPTION_CHOICE) return parse_choice(o, state, value, n, who, err);
    if (o->type == KVF_OPTION_TEXT) {
        if (!is_text(value, n))
            return kvf_fail(err, KVF_ERR_ARG, "%s: %s must be 1 to %d letters, digits or ._+-/, not '%.*s'", who,
                            o->name, KVF_OPTION_TEXT_BYTES - 1, shown, value);
        set_text(o, state, value, n);
        return KVF_OK;
    }
    double v = 0;
    bool is_int = false, ok = parse_number(value, n, &v, &is_int);
    if (!ok || (o->type == KVF_OPTION_I64 && !is_int) || v < o->min || v > o->max)
        return kvf_fail(err, KVF_ERR_ARG, "%s: %s must be %s from %.10g to %.10g, not '%.*s'", who, o->name,
                        o->type == KVF_OPTION_I64 ? "a whole number" : "a number", o->min, o->max, shown, value);
    set_value(o, state, v);
    return KVF_OK;
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
    return parse_value(o, state, eq ? eq + 1 : text + n, eq ? n - n_key - 1 : 0, who, err);
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

/* Up to 15 significant digits, trailing zeros dropped, with a point whatever the locale: what was read
 * is printed as it was read. */
static void print_number(double v, char out[40])
{
    double a = v < 0 ? -v : v;
    if (!(a < 1e15)) { /* no option reaches it */
        snprintf(out, 40, "%s%.0f", v < 0 ? "-" : "", a);
        return;
    }
    int64_t whole = (int64_t)a, scale = 1;
    int n_frac = 15;
    for (int64_t w = whole; w > 0; w /= 10) n_frac--;
    for (int i = 0; i < n_frac; i++) scale *= 10;
    int64_t frac = (int64_t)((a - (double)whole) * (double)scale + 0.5);
    if (frac >= scale) whole++, frac = 0;
    for (; n_frac > 0 && frac % 10 == 0; n_frac--) frac /= 10;
    const char *sign = v < 0 && (whole || frac) ? "-" : "";
    if (n_frac == 0)
        snprintf(out, 40, "%s%" PRId64, sign, whole);
    else
        snprintf(out, 40, "%s%" PRId64 ".%0*" PRId64, sign, whole, n_frac, frac);
}

/* The value of one option as text: digits, a word, or the text itself. */
static void print_value(const kvf_option *o, const void *state, char out[KVF_OPTION_TEXT_BYTES])
{
    const char *field = (const char *)state + o->offset;
    int64_t i;
    double d;
    switch (o->type) {
    case KVF_OPTION_I64:
        memcpy(&i, field, sizeof i);
        snprintf(out, KVF_OPTION_TEXT_BYTES, "%" PRId64, i);
        return;
    case KVF_OPTION_F64:
        memcpy(&d, field, sizeof d);
        print_number(d, out);
        return;
    case KVF_OPTION_CHOICE: {
        memcpy(&i, field, sizeof i);
        size_t n = 0;
        const char *word = i < 0 ? NULL : word_at(o->words, i, &n);
        snprintf(out, KVF_OPTION_TEXT_BYTES, "%.*s", word ? (int)n : 1, word ? word : "?");
        return;
    }
    case KVF_OPTION_TEXT: snprintf(out, KVF_OPTION_TEXT_BYTES, "%.*s", KVF_OPTION_TEXT_BYTES - 1, field); return;
    }
    out[0] = 0;
}

void kvf_options_print(const kvf_option *table, const void *state, char *out, size_t cap)
{
    size_t at = 0;
    if (cap == 0) return;
    out[0] = 0;
    for (const kvf_option *o = table; o && o->name; o++) {
        char value[KVF_OPTION_TEXT_BYTES];
        print_value(o, state, value);
        if (o->type == KVF_OPTION_TEXT && !value[0]) continue; /* what cannot be written needs not be read */
        int w = snprintf(out + at, cap - at, "%s%s=%s", at ? "," : "", o->name, value);
        if (w < 0 || (size_t)w >= cap - at) return;
        at += (size_t)w;
    }
}
