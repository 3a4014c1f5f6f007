/* cite.c - see cite.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cite.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "report.h"
#include "utf8.h"

/* ---- Places ----------------------------------------------------------------------------- */

static int64_t count_lines(const char *text, size_t n)
{
    int64_t lines = 0;
    const char *end = text + n;
    for (const char *p = text; p < end && (p = memchr(p, '\n', (size_t)(end - p))) != NULL; p++) lines++;
    return lines;
}

static size_t clamp(size_t v, size_t lo, size_t hi) { return v < lo ? lo : v > hi ? hi : v; }

static void find_page(cite_place *out, const char *body, size_t end, size_t peak)
{
    const note_source *s = out->source;
    int64_t lo = 0, hi = s->n_pages; /* the last page that begins at or before the peak */
    while (hi - lo > 1) {
        int64_t mid = lo + (hi - lo) / 2;
        if (s->first + s->page_start[mid] <= peak)
            lo = mid;
        else
            hi = mid;
    }
    out->page = lo + 1;
    out->from = clamp(s->first + s->page_start[lo], s->first, end);
    out->to = lo + 1 < s->n_pages ? clamp(s->first + s->page_start[lo + 1], out->from, end) : end;
    /* The line "[page 57]" says again what the citation says. */
    if (out->to - out->from > 6 && memcmp(body + out->from, "[page ", 6) == 0) {
        const char *line = memchr(body + out->from, '\n', out->to - out->from);
        if (line) out->from = (size_t)(line + 1 - body);
    }
}

void cite_find(cite_place *out, const note *about, const char *body, size_t n, size_t from, size_t peak, size_t to)
{
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < about->n_sources; i++) {
        const note_source *s = &about->sources[i];
        if (s->first > peak || s->first >= n) break;
        out->source = s;
    }
    if (!out->source) {
        out->to = n;
        return;
    }
    const note_source *s = out->source;
    size_t end = s->n < n - s->first ? s->first + s->n : n;
    out->from = s->first;
    out->to = end;
    if (s->n_pages) {
        find_page(out, body, end, peak);
    } else if (s->lines) {
        size_t a = clamp(from, s->first, end), b = clamp(to, a, end);
        out->first_line = 1 + count_lines(body + s->first, a - s->first);
        /* A line feed at the very end belongs to the line that it ends. */
        out->last_line = out->first_line + count_lines(body + a, b > a ? b - a - 1 : 0);
    }
}

/* ---- Excerpts ---------------------------------------------------------------------------- */

static bool is_blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/* True if a sentence ends before text[i]: after ".", "!", "?" or ":" and a blank, or at an empty line. */
static bool is_break(const char *text, size_t i)
{
    if (i < 2 || !is_blank(text[i - 1])) return false;
    if (text[i - 1] == '\n' && text[i - 2] == '\n') return true;
    size_t k = i - 1;
    while (k && is_blank(text[k - 1])) k--;
    if (!k || is_blank(text[i])) return false;
    while (k && (text[k - 1] == '"' || text[k - 1] == ')' || text[k - 1] == '\'')) k--;
    return k && strchr(".!?", text[k - 1]) != NULL;
}

static size_t sentence_begin(const char *text, size_t at)
{
    while (at > 0 && !is_break(text, at)) at--;
    return at;
}

static size_t sentence_end(const char *text, size_t n, size_t at)
{
    for (at++; at < n && !is_break(text, at); at++) {}
    return at < n ? at : n;
}

/* The next place at or after `at`, before `stop`, where a word begins. */
static size_t word_begin(const char *text, size_t at, size_t stop)
{
    size_t i = at;
    while (i > 0 && i < stop && !is_blank(text[i - 1])) i++;
    if (i < stop) return i;
    while (at < stop && ((unsigned char)text[at] & 0xc0) == 0x80) at++; /* one endless word */
    return at;
}

static size_t word_end(const char *text, size_t at, size_t stop, size_t n)
{
    size_t i = at;
    while (i > stop && i < n && !is_blank(text[i])) i--;
    if (i > stop) return i;
    while (at > stop && at < n && ((unsigned char)text[at] & 0xc0) == 0x80) at--;
    return at;
}

void cite_excerpt(buffer *out, const char *text, size_t n, size_t peak, size_t width)
{
    while (n && is_blank(text[n - 1])) n--;
    if (!n) return;
    if (peak >= n) peak = n - 1;
    size_t a = sentence_begin(text, peak), b = sentence_end(text, n, peak);
    bool cut_a = false, cut_b = false;
    if (b - a > width) { /* too long a sentence: the part around the peak */
        size_t half = width / 2;
        size_t from = peak - a > half ? peak - half : a;
        if (b - from < width) from = b - width;
        size_t to = from + width < b ? from + width : b;
        cut_a = from > a;
        cut_b = to < b;
        if (cut_a) a = word_begin(text, from, peak);
        if (cut_b) b = word_end(text, to, peak + 1 < to ? peak + 1 : to, n);
    } else {
        for (bool grown = true; grown;) {
            grown = false;
            size_t next = b < n ? sentence_end(text, n, b) : b;
            if (next > b && next - a <= width) {
                b = next;
                grown = true;
            }
            size_t before = a ? sentence_begin(text, a - 1) : a;
            if (before < a && b - before <= width) {
                a = before;
                grown = true;
            }
        }
    }
    buffer clean = { 0 };
    utf8_add_clean(&clean, text + a, b - a, UTF8_NO_CONTROLS);
    if (cut_a) buffer_add_text(out, "...");
    bool gap = false;
    size_t begin = out->n;
    for (size_t i = 0; i < clean.n; i++) {
        if (is_blank(clean.v[i])) {
            gap = true;
            continue;
        }
        if (gap && out->n > begin) buffer_add_char(out, ' ');
        gap = false;
        buffer_add_char(out, clean.v[i]);
    }
    if (cut_b) buffer_add_text(out, "...");
    buffer_free(&clean);
}

/* ---- Citations --------------------------------------------------------------------------- */

kvf_status cite_text_open(cite_text *out, const engine *e, const note *about, const token_list *prefix,
                          kvf_error *err)
{
    memset(out, 0, sizeof *out);
    out->first_token = about->first_token < prefix->n ? about->first_token : prefix->n;
    out->n_tokens = prefix->n - out->first_token;
    out->start = malloc(((size_t)out->n_tokens + 1) * sizeof *out->start);
    if (!out->start) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the citations.");
    size_t lead = 0, skip = about->first_byte; /* a blank of the tokenizer's own stands in front of the body */
    for (int64_t i = 0; i < out->first_token; i++) {
        const char *bytes = NULL;
        size_t n = 0;
        if (kvf_token_bytes(e->model, prefix->v[i], &bytes, &n) == KVF_OK) lead += n;
    }
    skip = skip > lead ? skip - lead : 0;
    for (int64_t i = 0; i < out->n_tokens; i++) {
        const char *bytes = NULL;
        size_t n = 0;
        out->start[i] = out->body.n;
        if (kvf_token_bytes(e->model, prefix->v[out->first_token + i], &bytes, &n) != KVF_OK) continue;
        size_t drop = skip < n ? skip : n;
        skip -= drop;
        buffer_add(&out->body, bytes + drop, n - drop);
    }
    out->start[out->n_tokens] = out->body.n;
    return buffer_status(&out->body, "the citations", err);
}

void cite_text_close(cite_text *t)
{
    buffer_free(&t->body);
    free(t->start);
    memset(t, 0, sizeof *t);
}

/* What gather has of a passage before it is known which ones stay. */
typedef struct found {
    cite_place place;
    int64_t first, end, peak; /* tokens, from the text's first */
    float share, best;        /* together; of the passage with the peak */
} found;

enum { MAX_FOUND = 64 };

static bool touches(const found *a, const found *b)
{
    return a->place.page && a->place.page == b->place.page && a->place.source == b->place.source &&
           a->first <= b->end && b->first <= a->end;
}

/* Add to a place that it touches, or at the end; then see whether that joined two. */
static size_t merge(found *f, size_t n, found add)
{
    for (size_t i = 0; i < n; i++) {
        if (!touches(&f[i], &add)) continue;
        if (f[i].best > add.best) {
            add.place = f[i].place;
            add.peak = f[i].peak;
            add.best = f[i].best;
        }
        add.share += f[i].share;
        if (f[i].first < add.first) add.first = f[i].first;
        if (f[i].end > add.end) add.end = f[i].end;
        f[i--] = f[--n];
    }
    f[n] = add;
    return n + 1;
}

static int by_share(const void *a, const void *b)
{
    const found *x = a, *y = b;
    if (x->share != y->share) return x->share < y->share ? 1 : -1;
    return x->first < y->first ? -1 : x->first > y->first;
}

size_t cite_gather(citation *out, size_t cap, engine *e, const note *about, const cite_text *text)
{
    kvf_passage passages[MAX_FOUND];
    found f[MAX_FOUND];
    int64_t n_passages = 0, t0 = text->first_token;
    size_t n = 0;
    int64_t want = (int64_t)cap * 4 < MAX_FOUND ? (int64_t)cap * 4 : MAX_FOUND;
    if (!cap || !text->n_tokens ||
        kvf_session_passages(e->session, t0, t0 + text->n_tokens, passages, want, &n_passages, NULL) != KVF_OK)
        return 0;
    for (int64_t i = 0; i < n_passages; i++) {
        const kvf_passage *p = &passages[i];
        found add = { .first = p->first - t0, .end = p->first + p->n - t0, .peak = p->peak - t0,
                      .share = p->share, .best = p->share };
        if (add.first < 0 || add.end > text->n_tokens || add.peak < add.first || add.peak >= add.end ||
            !(p->share > 0))
            continue;
        cite_find(&add.place, about, buffer_text(&text->body), text->body.n, text->start[add.first],
                  text->start[add.peak], text->start[add.end]);
        if (add.place.source) n = merge(f, n, add);
    }
    qsort(f, n, sizeof *f, by_share);
    if (n > cap) n = cap;
    for (size_t i = 0; i < n; i++) {
        const cite_place *p = &f[i].place;
        size_t peak = clamp(text->start[f[i].peak], p->from, p->to);
        out[i] = (citation){ .place = *p, .first_token = f[i].first + t0, .n_tokens = f[i].end - f[i].first,
                             .share = f[i].share };
        cite_excerpt(&out[i].excerpt, buffer_text(&text->body) + p->from, p->to - p->from, peak - p->from,
                     CITE_EXCERPT);
    }
    return n;
}

/* The file's name as the user knows it; a title may be anything. */
static const char *file_name(const note_source *s)
{
    if (strcmp(s->path, "-") == 0) return s->title;
    const char *slash = strrchr(s->path, '/');
    return slash && slash[1] ? slash + 1 : s->path;
}

void cite_print(const citation *c, size_t n)
{
    buffer line = { 0 };
    for (size_t i = 0; i < n; i++) {
        const cite_place *p = &c[i].place;
        buffer_printf(&line, "%s[%zu] %.200s", i ? "" : "\n", i + 1, file_name(p->source));
        if (p->page)
            buffer_printf(&line, ", page %lld", (long long)p->page);
        else if (p->first_line && p->first_line == p->last_line)
            buffer_printf(&line, ", line %lld", (long long)p->first_line);
        else if (p->first_line)
            buffer_printf(&line, ", lines %lld-%lld", (long long)p->first_line, (long long)p->last_line);
        buffer_printf(&line, ": \"%s\" (%.0f %%)\n", buffer_text(&c[i].excerpt), (double)c[i].share * 100.0);
    }
    buffer clean = { 0 };
    utf8_add_clean(&clean, buffer_text(&line), line.n, UTF8_NO_CONTROLS);
    fputs(buffer_text(&clean), stdout);
    buffer_free(&clean);
    buffer_free(&line);
}

void cite_json(cJSON *list, const citation *c, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const cite_place *p = &c[i].place;
        cJSON *o = json_object(list, NULL);
        json_text(o, "document", file_name(p->source), (size_t)-1);
        json_text(o, "title", p->source->title, (size_t)-1);
        if (p->page) json_int(o, "page", p->page);
        if (p->first_line) json_int(o, "first_line", p->first_line);
        if (p->first_line) json_int(o, "last_line", p->last_line);
        json_int(o, "first_token", c[i].first_token);
        json_int(o, "n_tokens", c[i].n_tokens);
        json_real(o, "share", (double)c[i].share);
        json_text(o, "excerpt", buffer_text(&c[i].excerpt), c[i].excerpt.n);
    }
}

void cite_free(citation *c, size_t n)
{
    for (size_t i = 0; i < n; i++) buffer_free(&c[i].excerpt);
}
