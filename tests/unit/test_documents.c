/* test_documents.c - document readers: what comes out, and that hostile bytes come to nothing.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "doc.h"
#include "utf8.h"

static const char *read_ok(document *d, const char *name, const void *bytes, size_t n)
{
    kvf_error err = { 0 };
    kvf_status rc = doc_from_bytes(d, name, bytes, n, 0, &err);
    cr_assert_eq(rc, KVF_OK, "%s: %s", name, err.msg);
    return d->text.v;
}

/* The error's code; its message must be there. */
static kvf_status read_bad(const char *name, const void *bytes, size_t n)
{
    document d;
    kvf_error err = { 0 };
    kvf_status rc = doc_from_bytes(&d, name, bytes, n, 0, &err);
    cr_assert_lt(rc, 0, "%s was read", name);
    cr_assert_eq(rc, err.code);
    cr_assert_gt(strlen(err.msg), 20, "no sentence: '%s'", err.msg);
    cr_assert_null(d.text.v);
    return rc;
}

static void expect(const char *name, const char *bytes, const char *text)
{
    document d;
    const char *got = read_ok(&d, name, bytes, strlen(bytes));
    cr_assert_str_eq(got, text, "%s: got '%s'", bytes, got);
    doc_close(&d);
}

Test(doc_text, plain_text_keeps_its_lines_and_loses_its_last_line_end)
{
    expect("a.txt", "one\ntwo\n\n", "one\ntwo");
    expect("a.txt", "one\r\ntwo\rthree", "one\ntwo\nthree");
    expect("a.txt",
           "\xef\xbb\xbf"
           "bom",
           "bom");
    expect("a.txt",
           "page\f\x1b"
           "two",
           "page\ntwo");
    expect("a.txt", "b\bbo\bol\bld", "bold");
    expect("-", "x", "x");
    document d;
    read_ok(&d, "dir/notes.md", "# T\n", 4);
    cr_assert_str_eq(d.kind, "markdown");
    cr_assert_str_eq(d.title, "notes.md");
    cr_assert(d.lines);
    doc_close(&d);
}

Test(doc_text, other_encodings_become_utf8_and_the_note_says_so)
{
    document d;
    cr_assert_str_eq(read_ok(&d, "a.txt", "caf\xe9 \x80", 6), "caf\xc3\xa9 \xe2\x82\xac");
    cr_assert(strstr(d.note, "1252"));
    doc_close(&d);
    cr_assert_str_eq(read_ok(&d, "a.txt", "\xff\xfeh\0i\0\x3d\xd8\0\xde", 10), "hi\xf0\x9f\x98\x80");
    cr_assert(strstr(d.note, "UTF-16"));
    doc_close(&d);
    cr_assert_str_eq(read_ok(&d, "a.txt", "\xfe\xff\0h\0i", 6), "hi");
    doc_close(&d);
    /* One wrong byte among many right ones is replaced, not taken as a reason to convert. */
    cr_assert_str_eq(read_ok(&d, "a.txt", "\xc3\xa9\xc3\xa9\xff", 5), "\xc3\xa9\xc3\xa9\xef\xbf\xbd");
    cr_assert(strstr(d.note, "U+FFFD"));
    doc_close(&d);
}

Test(doc_text, empty_and_binary_input_is_refused)
{
    cr_assert_eq(read_bad("a.txt", "", 0), KVF_ERR_FORMAT);
    cr_assert_eq(read_bad("a.txt", " \n\t\r\n", 5), KVF_ERR_FORMAT);
    cr_assert_eq(read_bad("a.txt", "ab\0cd", 5), KVF_ERR_FORMAT);
    cr_assert_eq(read_bad("a.html", "<script>x</script>", 18), KVF_ERR_FORMAT);
    cr_assert_eq(read_bad("a.docx", "PK\003\004....", 8), KVF_ERR_UNSUPPORTED);
    cr_assert_eq(read_bad("m.gguf", "GGUF\3\0\0\0", 8), KVF_ERR_UNSUPPORTED);
    cr_assert_eq(read_bad("a.txt", "\xff\xfe\0\0a\0\0\0", 8), KVF_ERR_UNSUPPORTED);
}

Test(doc_text, a_limit_is_an_error_not_a_cut)
{
    document d;
    kvf_error err = { 0 };
    cr_assert_eq(doc_from_bytes(&d, "a.txt", "0123456789", 10, 9, &err), KVF_ERR_LIMIT);
    cr_assert_eq(doc_from_bytes(&d, "a.txt", "0123456789", 10, 10, &err), KVF_OK);
    doc_close(&d);
}

Test(doc_open, directories_and_missing_files_are_refused)
{
    document d;
    kvf_error err = { 0 };
    cr_assert_eq(doc_open(&d, KVF_TEST_DATA, &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "directory"));
    cr_assert_eq(doc_open(&d, KVF_TEST_DATA "/no such file", &err), KVF_ERR_IO);
}

/* ---- gzip ------------------------------------------------------------------------------- */

static size_t pack(unsigned char *out, size_t cap, const void *bytes, size_t n)
{
    z_stream z;
    memset(&z, 0, sizeof z);
    cr_assert_eq(deflateInit2(&z, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    z.next_in = (z_const Bytef *)bytes;
    z.avail_in = (uInt)n;
    z.next_out = out;
    z.avail_out = (uInt)cap;
    cr_assert_eq(deflate(&z, Z_FINISH), Z_STREAM_END);
    deflateEnd(&z);
    return cap - z.avail_out;
}

Test(doc_gzip, members_are_joined_and_the_inner_format_is_found)
{
    unsigned char gz[512];
    size_t n = pack(gz, sizeof gz, "<p>one", 6);
    n += pack(gz + n, sizeof gz - n, "<p>two", 6);
    document d;
    cr_assert_str_eq(read_ok(&d, "a.html.gz", gz, n), "one\n\ntwo");
    cr_assert_str_eq(d.kind, "html");
    doc_close(&d);
    cr_assert_str_eq(read_ok(&d, "a.txt.gz", gz, n), "<p>one<p>two");
    doc_close(&d);
}

Test(doc_gzip, every_cut_and_every_flipped_byte_is_an_error_or_a_text)
{
    unsigned char gz[512], bad[512];
    size_t n = pack(gz, sizeof gz, "some text, some text, some more text", 36);
    for (size_t k = 2; k < n; k++) cr_assert_eq(read_bad("a.gz", gz, k), KVF_ERR_FORMAT);
    for (size_t k = 2; k < n; k++) {
        memcpy(bad, gz, n);
        bad[k] ^= 0x55;
        document d;
        if (doc_from_bytes(&d, "a.gz", bad, n, 0, NULL) == KVF_OK) doc_close(&d);
    }
}

Test(doc_gzip, a_bomb_stops_at_the_limit)
{
    size_t n = (size_t)8 << 20;
    char *zeros = calloc(n, 1);
    unsigned char *gz = malloc(1 << 16);
    cr_assert(zeros && gz);
    memset(zeros, 'a', n);
    size_t packed = pack(gz, 1 << 16, zeros, n);
    document d;
    kvf_error err = { 0 };
    cr_assert_eq(doc_from_bytes(&d, "a.gz", gz, packed, 1 << 20, &err), KVF_ERR_LIMIT);
    free(zeros);
    free(gz);
}

/* ---- HTML ------------------------------------------------------------------------------- */

#ifdef KVFOLD_HAVE_LIBXML2
Test(doc_html, structure_becomes_lines)
{
    expect("a.html", "<h1>T</h1><p>a <b>b</b>\n  c</p><p>d", "# T\n\na b c\n\nd");
    expect("a.html", "<ul><li>a<li><p>b</p></ul><p>c", "- a\n- b\n\nc");
    expect("a.html", "<ol><li>a<ul><li>x</ul><li>b</ol>", "1. a\n  - x\n2. b");
    expect("a.html", "<table><tr><th>a<th>b<tr><td>1<td>2</table>", "a | b\n1 | 2");
    expect("a.html", "a<br>b<br><br>c", "a\nb\n\nc");
    expect("a.html", "x<pre>\n a\n  b\n</pre>y", "x\n\n a\n  b\n\ny");
    expect("a.html", "a&amp;b &eacute; &#x20ac; &lt;tag>", "a&b \xc3\xa9 \xe2\x82\xac <tag>");
    expect("a.html", "<p>a<script>var x = '<p>no';</script><style>p{}</style>b", "ab");
    expect("a.html", "<h2>A<a class=\"headerlink\" href=#>\xc2\xb6</a></h2>b", "## A\n\nb");
    expect("a.html", "<p>a<p hidden>no<p>b", "a\n\nb");
}

Test(doc_html, pages_are_known_by_their_first_tag_and_named_by_their_title)
{
    static const char page[] = " <!DOCTYPE html><html><head><title> A\n b </title><style>x</style></head>"
                               "<body><p>text</body></html>";
    document d;
    cr_assert_str_eq(read_ok(&d, "-", page, strlen(page)), "text");
    cr_assert_str_eq(d.kind, "html");
    cr_assert_str_eq(d.title, "A b");
    doc_close(&d);
    expect("a.txt", "if a <b and c> d", "if a <b and c> d");
}

Test(doc_html, encodings_are_declared_or_found)
{
    expect("a.html", "<p>caf\xc3\xa9", "caf\xc3\xa9");
    expect("a.html", "<meta charset=iso-8859-1><p>caf\xe9", "caf\xc3\xa9");
    expect("a.html", "<p>caf\xe9", "caf\xc3\xa9");
    document d;
    cr_assert_str_eq(read_ok(&d, "a.html", "\xff\xfe<\0p\0>\0h\0i\0", 12), "hi");
    doc_close(&d);
}

Test(doc_html, deep_nesting_and_broken_tags_are_survived)
{
    size_t n = 200000;
    char *deep = malloc(n * 5 + 8);
    cr_assert(deep);
    for (size_t i = 0; i < n; i++) memcpy(deep + i * 5, i % 2 ? "<div>" : "<ul >", 5);
    memcpy(deep + n * 5, "bottom", 7);
    document d;
    kvf_error err = { 0 };
    if (doc_from_bytes(&d, "a.html", deep, n * 5 + 6, 0, &err) == KVF_OK) {
        cr_assert(strstr(d.text.v, "bottom"));
        doc_close(&d);
    }
    free(deep);
    expect("a.html", "</p></div><<p>a</ul></ol></li>b<", "<\n\nab<");
}
#endif

/* ---- PDF -------------------------------------------------------------------------------- */

#ifdef KVFOLD_HAVE_POPPLER
Test(doc_pdf, pages_with_text_are_marked)
{
    document d;
    kvf_error err = { 0 };
    cr_assert_eq(doc_open(&d, KVF_TEST_DATA "/docs/two-pages.pdf", &err), KVF_OK, "%s", err.msg);
    cr_assert_str_eq(d.text.v, "[page 1]\nThe first page says hello.\n\n[page 3]\nThe third page ends it.");
    cr_assert_str_eq(d.title, "A small PDF");
    cr_assert_str_eq(d.kind, "pdf");
    cr_assert_eq(d.n_pages, 3);
    size_t third = (size_t)(strstr(d.text.v, "[page 3]") - d.text.v);
    cr_assert_eq(d.page_start[0], 0);
    cr_assert_eq(d.page_start[1], third, "a page without text begins with the next");
    cr_assert_eq(d.page_start[2], third);
    cr_assert_not(d.lines);
    cr_assert(strstr(d.note, "1 of 3"));
    doc_close(&d);
}

Test(doc_pdf, cut_files_are_an_error_or_a_text)
{
    buffer b = { 0 };
    kvf_error err = { 0 };
    cr_assert_eq(buffer_read_file(&b, KVF_TEST_DATA "/docs/two-pages.pdf", &err), KVF_OK);
    for (size_t n = 5; n < b.n; n += 61) {
        document d;
        if (doc_from_bytes(&d, "a.pdf", b.v, n, 0, &err) == KVF_OK)
            doc_close(&d);
        else
            cr_assert_gt(strlen(err.msg), 20);
    }
    cr_assert_eq(read_bad("a.pdf", "%PDF-1.4\nnothing", 16), KVF_ERR_FORMAT);
    buffer_free(&b);
}
#endif

/* ---- UTF-8 ------------------------------------------------------------------------------ */

Test(utf8, only_shortest_forms_without_surrogates_are_characters)
{
    cr_assert_eq(utf8_decode("a", 1, NULL), 1);
    cr_assert_eq(utf8_decode("\xc3\xa9", 2, NULL), 2);
    cr_assert_eq(utf8_decode("\xf4\x8f\xbf\xbf", 4, NULL), 4);
    cr_assert_eq(utf8_decode("\xc0\x80", 2, NULL), 0);
    cr_assert_eq(utf8_decode("\xe0\x80\x80", 3, NULL), 0);
    cr_assert_eq(utf8_decode("\xed\xa0\x80", 3, NULL), 0);
    cr_assert_eq(utf8_decode("\xf4\x90\x80\x80", 4, NULL), 0);
    cr_assert_eq(utf8_decode("\xf0\x9f", 2, NULL), -1);
    cr_assert_eq(utf8_decode("\xf0\x80", 2, NULL), 0);
}

/* However a text is cut into tokens, the stream gives what the whole text gives. */
Test(utf8, a_stream_gives_the_same_text_wherever_it_is_cut)
{
    static const char *const pool[] = { "a",    "\n",       "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80",
                                        "\xff", "\xe2\x82", "\xf0\x9f", "\x80",         "\xed\xa0\x80" };
    srand(7);
    for (int round = 0; round < 2000; round++) {
        buffer text = { 0 }, whole = { 0 }, pieces = { 0 };
        for (int i = 0; i < 12; i++) buffer_add_text(&text, pool[rand() % 10]);
        utf8_add_clean(&whole, text.v, text.n, UTF8_KEEP);
        utf8_stream s = { 0 };
        for (size_t at = 0; at < text.n;) {
            size_t n = 1 + (size_t)rand() % 3;
            if (n > text.n - at) n = text.n - at;
            utf8_stream_push(&s, &pieces, text.v + at, n);
            at += n;
        }
        utf8_stream_end(&s, &pieces);
        size_t n_multi, n_bad;
        utf8_survey(pieces.v, pieces.n, &n_multi, &n_bad);
        cr_assert_eq(n_bad, 0);
        /* A character cut off at the very end is one U+FFFD in a stream, one per byte otherwise. */
        size_t n = whole.n < pieces.n ? whole.n : pieces.n;
        cr_assert_arr_eq(whole.v, pieces.v, n > 9 ? n - 9 : 0);
        if (text.n && (unsigned char)text.v[text.n - 1] < 0x80) cr_assert_str_eq(whole.v, pieces.v);
        buffer_free(&text);
        buffer_free(&whole);
        buffer_free(&pieces);
    }
}

Test(utf8, control_characters_do_not_reach_a_terminal)
{
    buffer b = { 0 };
    static const char text[] = "a\x1b[2Jb\x07\xc2\x9b"
                               "c\xe2\x80\xae"
                               "d\n\te";
    utf8_add_clean(&b, text, strlen(text), UTF8_NO_CONTROLS);
    cr_assert_str_eq(b.v, "a[2Jbcd\n\te");
    buffer_free(&b);
}

Test(documents, random_bytes_never_break_a_reader)
{
    static const char *const names[] = { "a.txt", "a.html", "a.md", "a.gz" };
    static const char alphabet[] = "<>/&;#xpreliulol h1\"'=!-\n\x80\xc3\xe2\xff\0\x1f\x8b";
    srand(11);
    for (int round = 0; round < 4000; round++) {
        char bytes[256];
        size_t n = (size_t)rand() % sizeof bytes;
        for (size_t i = 0; i < n; i++) bytes[i] = alphabet[(size_t)rand() % (sizeof alphabet - 1)];
        document d;
        if (doc_from_bytes(&d, names[rand() % 4], bytes, n, 1 << 16, NULL) != KVF_OK) continue;
        size_t n_multi, n_bad;
        utf8_survey(d.text.v, d.text.n, &n_multi, &n_bad);
        cr_assert_eq(n_bad, 0);
        cr_assert_gt(d.text.n, 0);
        doc_close(&d);
    }
}
