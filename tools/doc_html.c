/* doc_html.c - the readable text of HTML pages, through libxml2's HTML parser.
 *
 * Parser events are turned into text as they come (SAX), so no tree is built and nesting costs
 * nothing. Headings get Markdown's marks, list items theirs, table cells a bar: a language model
 * then sees the structure. Scripts, styles and drawings are left out.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "doc.h"
#include "report.h"
#include "utf8.h"

#ifdef KVFOLD_HAVE_LIBXML2

#include <libxml/HTMLparser.h>
#include <libxml/parserInternals.h>

typedef enum tag_kind {
    TAG_INLINE, /* no break */
    TAG_BLOCK,  /* a paragraph: blank line around */
    TAG_LINE,   /* a line of its own */
    TAG_CELL,   /* of a table */
    TAG_ITEM,
    TAG_HEADING,
    TAG_PRE,
    TAG_ORDERED, /* ol */
    TAG_LIST,    /* ul */
    TAG_TITLE,
    TAG_SKIP /* with all inside */
} tag_kind;

/* Lists nest this deep with right numbers and indents; deeper ones share the last level. */
#define MAX_LIST 16

typedef struct page_text {
    buffer *out;
    buffer title;
    int skip; /* open elements being skipped; starts at the one that began it */
    int pre;  /* open pre elements */
    int in_title;
    int n_list;            /* open lists */
    int item_no[MAX_LIST]; /* next number of an ordered list; 0: bullets */
    int newlines;          /* line feeds wanted before the next text: 0, 1 or 2 */
    bool space;            /* a space is wanted before the next text on this line */
    bool pre_begins;       /* the line feed that follows <pre> is not part of it */
    bool marked;           /* a list mark was just written: its text goes on the same line */
} page_text;

static tag_kind kind_of(const char *name)
{
    static const struct {
        const char *name;
        tag_kind kind;
    } tags[] = {
        { "p", TAG_BLOCK },          { "div", TAG_LINE },      { "section", TAG_BLOCK },
        { "article", TAG_BLOCK },    { "header", TAG_BLOCK },  { "footer", TAG_BLOCK },
        { "main", TAG_BLOCK },       { "aside", TAG_BLOCK },   { "nav", TAG_BLOCK },
        { "blockquote", TAG_BLOCK }, { "address", TAG_BLOCK }, { "figure", TAG_BLOCK },
        { "figcaption", TAG_LINE },  { "form", TAG_BLOCK },    { "fieldset", TAG_BLOCK },
        { "table", TAG_BLOCK },      { "caption", TAG_LINE },  { "tr", TAG_LINE },
        { "td", TAG_CELL },          { "th", TAG_CELL },       { "dl", TAG_BLOCK },
        { "dt", TAG_LINE },          { "dd", TAG_LINE },       { "ul", TAG_LIST },
        { "menu", TAG_LIST },        { "ol", TAG_ORDERED },    { "li", TAG_ITEM },
        { "h1", TAG_HEADING },       { "h2", TAG_HEADING },    { "h3", TAG_HEADING },
        { "h4", TAG_HEADING },       { "h5", TAG_HEADING },    { "h6", TAG_HEADING },
        { "pre", TAG_PRE },          { "listing", TAG_PRE },   { "br", TAG_LINE },
        { "hr", TAG_BLOCK },         { "title", TAG_TITLE },   { "script", TAG_SKIP },
        { "style", TAG_SKIP },       { "noscript", TAG_SKIP }, { "template", TAG_SKIP },
        { "svg", TAG_SKIP },         { "math", TAG_INLINE },   { "iframe", TAG_SKIP },
        { "object", TAG_SKIP },      { "canvas", TAG_SKIP },   { "audio", TAG_SKIP },
        { "video", TAG_SKIP },       { "select", TAG_SKIP },   { "textarea", TAG_SKIP },
    };
    for (size_t i = 0; i < sizeof tags / sizeof *tags; i++)
        if (strcasecmp(name, tags[i].name) == 0) return tags[i].kind;
    return TAG_INLINE;
}

static void want_break(page_text *t, int newlines)
{
    if (t->marked) return;
    if (t->newlines < newlines) t->newlines = newlines;
    t->space = false;
}

/* Write the break or space that is due. */
static void settle(page_text *t)
{
    if (t->out->n && t->newlines)
        buffer_add(t->out, "\n\n", (size_t)t->newlines);
    else if (t->out->n && t->space)
        buffer_add_char(t->out, ' ');
    t->newlines = 0;
    t->space = false;
    t->marked = false;
}

static bool at_line_start(const page_text *t)
{
    return !t->out->n || t->newlines || t->marked || t->out->v[t->out->n - 1] == '\n';
}

/* The pilcrow links that documentation generators put beside headings. */
static bool is_decoration(const xmlChar **atts)
{
    for (; atts && atts[0]; atts += 2) {
        const char *key = (const char *)atts[0], *value = (const char *)atts[1];
        if (strcasecmp(key, "hidden") == 0) return true;
        if (value && strcasecmp(key, "class") == 0 && strstr(value, "headerlink")) return true;
    }
    return false;
}

static void open_item(page_text *t)
{
    t->marked = false; /* of an empty item */
    want_break(t, 1);
    settle(t);
    int level = t->n_list < MAX_LIST ? t->n_list : MAX_LIST;
    for (int i = 1; i < level; i++) buffer_add_text(t->out, "  ");
    int *no = level ? &t->item_no[level - 1] : NULL;
    if (no && *no)
        buffer_printf(t->out, "%d. ", (*no)++);
    else
        buffer_add_text(t->out, "- ");
    t->marked = true;
}

static void open_list(page_text *t, bool ordered)
{
    want_break(t, t->n_list ? 1 : 2);
    if (t->n_list < MAX_LIST) t->item_no[t->n_list] = ordered ? 1 : 0;
    if (t->n_list < INT_MAX) t->n_list++;
}

static void on_start(void *user, const xmlChar *xname, const xmlChar **atts)
{
    page_text *t = user;
    const char *name = (const char *)xname;
    tag_kind kind = kind_of(name);
    if (t->skip) {
        t->skip++;
        return;
    }
    if (kind == TAG_SKIP || is_decoration(atts)) {
        t->skip = 1;
        return;
    }
    switch (kind) {
    case TAG_BLOCK: want_break(t, 2); break;
    case TAG_LINE:
        /* Two <br> in a row make a paragraph. */
        want_break(t, strcasecmp(name, "br") == 0 && t->newlines ? 2 : 1);
        break;
    case TAG_CELL:
        if (!at_line_start(t)) {
            t->space = false;
            buffer_add_text(t->out, " | ");
        }
        break;
    case TAG_ITEM: open_item(t); break;
    case TAG_HEADING:
        want_break(t, 2);
        settle(t);
        for (int i = 0; i < name[1] - '0'; i++) buffer_add_char(t->out, '#');
        t->space = true;
        break;
    case TAG_PRE:
        want_break(t, 2);
        t->pre++;
        t->pre_begins = true;
        break;
    case TAG_ORDERED: open_list(t, true); break;
    case TAG_LIST: open_list(t, false); break;
    case TAG_TITLE: t->in_title++; break;
    case TAG_INLINE:
    case TAG_SKIP: break;
    }
}

static void on_end(void *user, const xmlChar *xname)
{
    page_text *t = user;
    if (t->skip) {
        t->skip--;
        return;
    }
    const char *name = (const char *)xname;
    switch (kind_of(name)) {
    case TAG_BLOCK:
    case TAG_HEADING: want_break(t, 2); break;
    case TAG_LINE:
        if (strcasecmp(name, "br") != 0) want_break(t, 1);
        break;
    case TAG_ITEM:
        t->marked = false;
        want_break(t, 1);
        break;
    case TAG_PRE:
        if (t->pre) t->pre--;
        buffer_trim_end(t->out);
        want_break(t, 2);
        break;
    case TAG_ORDERED:
    case TAG_LIST:
        if (t->n_list) t->n_list--;
        want_break(t, t->n_list ? 1 : 2);
        break;
    case TAG_TITLE:
        if (t->in_title) t->in_title--;
        break;
    case TAG_CELL:
    case TAG_INLINE:
    case TAG_SKIP: break;
    }
}

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f'; }

/* White space of any length is one space; inside pre it is kept. */
static void on_text(void *user, const xmlChar *chars, int n)
{
    page_text *t = user;
    const char *p = (const char *)chars, *end = p + n;
    if (t->skip) return;
    if (t->in_title) {
        if (t->title.n < 512) buffer_add(&t->title, p, (size_t)n);
        return;
    }
    if (t->pre) {
        if (t->pre_begins && p < end && *p == '\n') p++;
        t->pre_begins = false;
        if (p == end) return;
        settle(t);
        for (; p < end; p++)
            if (*p != '\r') buffer_add_char(t->out, *p);
        return;
    }
    while (p < end) {
        const char *word = p;
        while (p < end && !is_space(*p)) p++;
        if (p > word) {
            settle(t);
            buffer_add(t->out, word, (size_t)(p - word));
        }
        if (p < end && !at_line_start(t)) t->space = true;
        while (p < end && is_space(*p)) p++;
    }
}

/* Contents of scripts and styles come by this way. */
static void on_cdata(void *user, const xmlChar *chars, int n)
{
    (void)user;
    (void)chars;
    (void)n;
}

static void take_title(document *d, page_text *t)
{
    buffer clean = { 0 };
    char *w = t->title.v;
    for (size_t i = 0; i < t->title.n; i++)
        if (is_space(t->title.v[i])) t->title.v[i] = ' ';
    for (size_t i = 0; i < t->title.n; i++)
        if (t->title.v[i] != ' ' || (w > t->title.v && w[-1] != ' ')) *w++ = t->title.v[i];
    if (t->title.v) buffer_cut(&t->title, (size_t)(w - t->title.v));
    buffer_trim_end(&t->title);
    utf8_add_clean(&clean, buffer_text(&t->title), t->title.n < 120 ? t->title.n : 120, UTF8_NO_CONTROLS);
    if (clean.n) snprintf(d->title, sizeof d->title, "%.*s", 120, clean.v);
    buffer_free(&clean);
}

/* Bytes libxml2 shall see and their encoding; NULL: as the page declares. UTF-16 is converted. */
static const char *choose_encoding(doc_bytes *in, buffer *converted)
{
    if (in->n >= 2 && (memcmp(in->v, "\xff\xfe", 2) == 0 || memcmp(in->v, "\xfe\xff", 2) == 0)) {
        utf8_add_utf16(converted, in->v + 2, in->n - 2, in->v[0] == (char)0xfe);
        in->v = buffer_text(converted);
        in->n = converted->n;
        return "UTF-8";
    }
    if (in->n >= 3 && memcmp(in->v, "\xef\xbb\xbf", 3) == 0) {
        in->v += 3;
        in->n -= 3;
        return "UTF-8";
    }
    /* Valid UTF-8 hardly ever is something else, whatever the page says; without a declaration
     * libxml2 would take it for Latin-1. */
    size_t n_multi, n_bad;
    utf8_survey(in->v, in->n, &n_multi, &n_bad);
    return n_bad ? NULL : "UTF-8";
}

static bool parse(page_text *t, const doc_bytes *in, const char *encoding)
{
    htmlParserCtxtPtr ctxt = htmlCreateMemoryParserCtxt(in->v, (int)in->n);
    if (!ctxt) return false;
    int options = HTML_PARSE_RECOVER | HTML_PARSE_NOERROR | HTML_PARSE_NOWARNING | HTML_PARSE_NONET |
                  HTML_PARSE_NOIMPLIED;
    if (encoding) options |= HTML_PARSE_IGNORE_ENC;
    htmlCtxtUseOptions(ctxt, options);
    if (encoding) xmlSwitchToEncoding(ctxt, xmlFindCharEncodingHandler(encoding));
    xmlSAXHandler sax;
    memset(&sax, 0, sizeof sax);
    sax.startElement = on_start;
    sax.endElement = on_end;
    sax.characters = on_text;
    sax.ignorableWhitespace = on_text;
    sax.cdataBlock = on_cdata;
    *ctxt->sax = sax;
    ctxt->userData = t;
    htmlParseDocument(ctxt);
    /* Without a tree builder there is no document to free, but be sure. */
    if (ctxt->myDoc) xmlFreeDoc(ctxt->myDoc);
    ctxt->myDoc = NULL;
    htmlFreeParserCtxt(ctxt);
    return true;
}

kvf_status doc_read_html(document *d, const doc_bytes *bytes, kvf_error *err)
{
    doc_bytes in = *bytes;
    buffer converted = { .max = d->text.max };
    const char *encoding = choose_encoding(&in, &converted);
    kvf_status rc = buffer_status(&converted, in.name, err);
    if (rc == KVF_OK && in.n > INT_MAX / 2)
        rc =
            report_fail(err, KVF_ERR_LIMIT, "'%s' is larger than an HTML page can be here (1 GiB).", in.name);
    buffer raw = { .max = d->text.max };
    page_text t = { .out = &raw };
    if (rc == KVF_OK && in.n && !parse(&t, &in, encoding))
        rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory to read '%s'.", in.name);
    if (rc == KVF_OK) rc = buffer_status(&raw, in.name, err);
    if (rc == KVF_OK) {
        size_t n_bad = utf8_add_clean(&d->text, buffer_text(&raw), raw.n, UTF8_NO_CONTROLS);
        if (n_bad)
            snprintf(d->note, sizeof d->note, "%zu bytes that are not UTF-8 were replaced by U+FFFD", n_bad);
        take_title(d, &t);
    }
    buffer_free(&t.title);
    buffer_free(&raw);
    buffer_free(&converted);
    return rc;
}

#else

kvf_status doc_read_html(document *d, const doc_bytes *in, kvf_error *err)
{
    (void)d;
    return report_fail(err, KVF_ERR_UNSUPPORTED,
                       "'%s' is an HTML page, which this build cannot read: install libxml2-dev and build "
                       "again, or convert it with w3m -dump.",
                       in->name);
}

#endif
