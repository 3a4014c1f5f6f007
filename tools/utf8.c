/* utf8.c - see utf8.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "utf8.h"

#include <string.h>

int utf8_decode(const char *p, size_t n, uint32_t *cp)
{
    const unsigned char *s = (const unsigned char *)p;
    uint32_t c = s[0];
    size_t len;
    unsigned low = 0x80, high = 0xbf; /* of the second byte */
    if (c < 0x80) {
        if (cp) *cp = c;
        return 1;
    }
    if (c >= 0xc2 && c <= 0xdf) {
        len = 2;
        c &= 0x1f;
    } else if ((c & 0xf0) == 0xe0) {
        len = 3;
        if (c == 0xe0) low = 0xa0;  /* shorter forms exist below */
        if (c == 0xed) high = 0x9f; /* surrogates above */
        c &= 0x0f;
    } else if (c >= 0xf0 && c <= 0xf4) {
        len = 4;
        if (c == 0xf0) low = 0x90;
        if (c == 0xf4) high = 0x8f;
        c &= 0x07;
    } else {
        return 0;
    }
    for (size_t i = 1; i < len; i++) {
        if (i == n) return -1;
        if (s[i] < low || s[i] > high) return 0;
        low = 0x80;
        high = 0xbf;
        c = c << 6 | (s[i] & 0x3fu);
    }
    if (cp) *cp = c;
    return (int)len;
}

void utf8_add(buffer *out, uint32_t cp)
{
    if (cp > 0x10ffff || (cp >= 0xd800 && cp <= 0xdfff)) cp = 0xfffd;
    char b[4];
    size_t n = 0;
    if (cp < 0x80) {
        b[n++] = (char)cp;
    } else if (cp < 0x800) {
        b[n++] = (char)(0xc0 | cp >> 6);
    } else if (cp < 0x10000) {
        b[n++] = (char)(0xe0 | cp >> 12);
    } else {
        b[n++] = (char)(0xf0 | cp >> 18);
        b[n++] = (char)(0x80 | (cp >> 12 & 0x3f));
    }
    if (cp >= 0x800) b[n++] = (char)(0x80 | (cp >> 6 & 0x3f));
    if (cp >= 0x80) b[n++] = (char)(0x80 | (cp & 0x3f));
    buffer_add(out, b, n);
}

static bool is_control(uint32_t cp)
{
    if (cp < 0x20) return cp != '\n' && cp != '\t';
    return (cp >= 0x7f && cp <= 0x9f) || (cp >= 0x202a && cp <= 0x202e) || (cp >= 0x2066 && cp <= 0x2069);
}

size_t utf8_add_clean(buffer *out, const char *p, size_t n, int flags)
{
    size_t n_bad = 0, start = 0, i = 0; /* [start, i) is good and not yet copied */
    while (i < n) {
        uint32_t cp = 0;
        int len = utf8_decode(p + i, n - i, &cp);
        if (len > 0 && !((flags & UTF8_NO_CONTROLS) && is_control(cp))) {
            i += (size_t)len;
            continue;
        }
        buffer_add(out, p + start, i - start);
        if (len <= 0) {
            utf8_add(out, 0xfffd);
            n_bad++;
            len = 1;
        }
        i += (size_t)len;
        start = i;
    }
    buffer_add(out, p + start, i - start);
    return n_bad;
}

void utf8_add_latin1(buffer *out, const char *p, size_t n)
{
    /* 0x80..0x9f of Windows-1252; 0 where it has no character. In Latin-1 proper these are
     * control codes that no document uses. */
    static const uint16_t high[32] = { 0x20ac, 0,      0x201a, 0x0192, 0x201e, 0x2026, 0x2020, 0x2021,
                                       0x02c6, 0x2030, 0x0160, 0x2039, 0x0152, 0,      0x017d, 0,
                                       0,      0x2018, 0x2019, 0x201c, 0x201d, 0x2022, 0x2013, 0x2014,
                                       0x02dc, 0x2122, 0x0161, 0x203a, 0x0153, 0,      0x017e, 0x0178 };
    for (size_t i = 0; i < n; i++) {
        uint32_t c = (unsigned char)p[i];
        if (c >= 0x80 && c < 0xa0) c = high[c - 0x80] ? high[c - 0x80] : 0xfffd;
        utf8_add(out, c);
    }
}

void utf8_add_utf16(buffer *out, const char *p, size_t n, bool big_endian)
{
    const unsigned char *s = (const unsigned char *)p;
    uint32_t high = 0; /* first half of a pair */
    for (size_t i = 0; i + 1 < n; i += 2) {
        uint32_t u = big_endian ? (uint32_t)s[i] << 8 | s[i + 1] : (uint32_t)s[i + 1] << 8 | s[i];
        if (high && u >= 0xdc00 && u <= 0xdfff) {
            utf8_add(out, 0x10000 + ((high - 0xd800) << 10) + (u - 0xdc00));
            high = 0;
            continue;
        }
        if (high) utf8_add(out, 0xfffd);
        high = u >= 0xd800 && u <= 0xdbff ? u : 0;
        if (!high) utf8_add(out, u);
    }
    if (high || n % 2) utf8_add(out, 0xfffd);
}

void utf8_survey(const char *p, size_t n, size_t *n_multi, size_t *n_bad)
{
    *n_multi = *n_bad = 0;
    for (size_t i = 0; i < n;) {
        int len = utf8_decode(p + i, n - i, NULL);
        if (len <= 0) ++*n_bad;
        if (len > 1) ++*n_multi;
        i += len > 0 ? (size_t)len : 1;
    }
}

void utf8_stream_push(utf8_stream *s, buffer *out, const char *p, size_t n)
{
    while (s->n_held && s->n_held < sizeof s->held && n) {
        s->held[s->n_held++] = *p++;
        n--;
        int len = utf8_decode(s->held, s->n_held, NULL);
        if (len < 0) continue;
        /* Wrong: all but the new byte are no character; the new one may start one. */
        size_t done = len ? s->n_held : s->n_held - 1;
        utf8_add_clean(out, s->held, done, s->flags);
        if (!len) {
            p--;
            n++;
        }
        s->n_held = 0;
    }
    /* Look for a character cut off at the end: at most 3 bytes back. */
    size_t keep = 0;
    for (size_t back = 1; back <= 3 && back <= n; back++)
        if (utf8_decode(p + n - back, back, NULL) < 0) keep = back;
    utf8_add_clean(out, p, n - keep, s->flags);
    if (keep) {
        memcpy(s->held, p + n - keep, keep);
        s->n_held = keep;
    }
}

void utf8_stream_end(utf8_stream *s, buffer *out)
{
    if (s->n_held) utf8_add(out, 0xfffd);
    s->n_held = 0;
}
