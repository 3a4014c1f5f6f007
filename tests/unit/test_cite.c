/* test_cite.c - from bytes of a stored document to pages, lines and excerpts; notes in JSON.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#include "cite.h"
#include "utf8.h"

static const char body[] = "Document 1: a.pdf\n\n"
                           "[page 1]\nFirst page. It is short.\n\n"
                           "[page 3]\nThird page.\n\n"
                           "Document 2: b.txt\n\n"
                           "one\ntwo\nthree\nfour";

/* A PDF of 4 pages, the second and the last without text, and a text of 4 lines. */
static void make(note *n)
{
    document docs[2] = { { .title = "A", .kind = "pdf", .n_pages = 4 }, { .title = "B", .kind = "text", .lines = true } };
    static const char *const paths[] = { "/x/a.pdf", "-" };
    size_t first[2] = { (size_t)(strstr(body, "[page 1]") - body), (size_t)(strstr(body, "one\n") - body) };
    size_t third = (size_t)(strstr(body, "[page 3]") - body) - first[0];
    docs[0].text.n = (size_t)(strstr(body, "\n\nDocument 2") - body) - first[0];
    docs[1].text.n = strlen(body) - first[1];
    size_t starts[4] = { 0, third, third, docs[0].text.n };
    docs[0].page_start = starts;
    const char *v[2] = { paths[0], paths[1] };
    arg_texts list = { v, 2 };
    kvf_error err = { 0 };
    cr_assert_eq(note_make(n, docs, &list, first, &err), KVF_OK, "%s", err.msg);
    n->system = strdup("Be brief.");
    n->first_token = 7;
    n->first_byte = 11;
    n->digest = 0xfedcba9876543210u;
}

static cite_place find(const note *n, const char *from, const char *to)
{
    cite_place p;
    size_t a = (size_t)(strstr(body, from) - body), b = (size_t)(strstr(body, to) - body) + strlen(to);
    cite_find(&p, n, body, strlen(body), a, a, b);
    return p;
}

Test(cite, a_passage_is_on_the_page_of_its_peak)
{
    note n;
    make(&n);
    cite_place p = find(&n, "It is short", "Third");
    cr_assert_eq(p.source, &n.sources[0]);
    cr_assert_eq(p.page, 1);
    cr_assert_eq(p.first_line, 0);
    cr_assert_eq(strncmp(body + p.from, "First page", 10), 0, "the mark of the page is left out");
    p = find(&n, "Third", "page.");
    cr_assert_eq(p.page, 3, "page %lld", (long long)p.page);
    cr_assert_eq(p.to, n.sources[0].first + n.sources[0].n);
    note_free(&n);
}

Test(cite, a_passage_of_a_text_is_on_the_lines_it_touches)
{
    note n;
    make(&n);
    cite_place p = find(&n, "two\n", "three\n");
    cr_assert_eq(p.source, &n.sources[1]);
    cr_assert_eq(p.page, 0);
    cr_assert_eq(p.first_line, 2);
    cr_assert_eq(p.last_line, 3);
    p = find(&n, "four", "four");
    cr_assert_eq(p.first_line, 4);
    cr_assert_eq(p.last_line, 4);
    p = find(&n, "one", "four");
    cr_assert_eq(p.first_line, 1);
    cr_assert_eq(p.last_line, 4);
    note_free(&n);
}

Test(cite, every_byte_has_a_place_inside_the_body)
{
    note n;
    make(&n);
    for (size_t a = 0; a <= strlen(body); a++)
        for (size_t b = a; b <= strlen(body); b++) {
            cite_place p;
            cite_find(&p, &n, body, strlen(body), a, a, b);
            cr_assert_leq(p.from, p.to);
            cr_assert_leq(p.to, strlen(body));
            cr_assert_leq(p.first_line, p.last_line);
        }
    /* A note that promises more text than there is. */
    n.sources[0].n = n.sources[1].n = (size_t)1 << 40;
    n.sources[0].page_start[3] = (size_t)1 << 39;
    for (size_t a = 0; a < strlen(body); a++) {
        cite_place p;
        cite_find(&p, &n, body, strlen(body), a, a, a + 1);
        cr_assert_leq(p.from, p.to);
        cr_assert_leq(p.to, strlen(body));
    }
    note_free(&n);
}

static void expect(const char *text, const char *peak, size_t width, const char *want)
{
    buffer b = { 0 };
    cite_excerpt(&b, text, strlen(text), (size_t)(strstr(text, peak) - text), width);
    cr_assert_str_eq(buffer_text(&b), want, "got '%s'", buffer_text(&b));
    buffer_free(&b);
}

Test(cite, an_excerpt_is_the_sentence_with_its_neighbours_while_they_fit)
{
    static const char text[] = "One is here. Two\nis   longer, e.g. this.  Three ends it! Four?";
    expect(text, "longer", 20, "Two is longer,...");
    expect(text, "longer", 33, "Two is longer, e.g. this.");
    expect(text, "One", 13, "One is here.");
    expect(text, "One", 200, "One is here. Two is longer, e.g. this. Three ends it! Four?");
    expect("para one\n\npara two\n\npara three", "two", 10, "para two");
    expect("a\x1b[2J b.", "a", 50, "a[2J b.");
    expect("  ", " ", 50, "");
}

Test(cite, an_excerpt_of_a_long_sentence_is_cut_between_words)
{
    static const char text[] = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu";
    expect(text, "zeta", 24, "...epsilon zeta eta...");
    expect(text, "alpha", 12, "alpha beta...");
    expect(text, "mu", 12, "...lambda mu");
}

Test(cite, an_excerpt_of_anything_is_valid_and_short)
{
    static const char *const pool[] = { "a", ". ", "\n\n", " ", "\xc3\xa9", "\xf0\x9f\x98\x80", "\xff", "word", "?", ")" };
    srand(3);
    for (int round = 0; round < 20000; round++) {
        buffer text = { 0 }, out = { 0 };
        for (int i = rand() % 40; i > 0; i--) buffer_add_text(&text, pool[rand() % 10]);
        size_t peak = text.n ? (size_t)rand() % text.n : 0, width = (size_t)(8 + rand() % 40);
        cite_excerpt(&out, buffer_text(&text), text.n, peak, width);
        size_t n_multi, n_bad;
        utf8_survey(buffer_text(&out), out.n, &n_multi, &n_bad);
        cr_assert_eq(n_bad, 0);
        cr_assert_leq(out.n, width * 3 + 6); /* a wrong byte becomes three */
        cr_assert_null(out.n ? memchr(out.v, '\n', out.n) : NULL);
        buffer_free(&text);
        buffer_free(&out);
    }
}

/* ---- Notes ------------------------------------------------------------------------------- */

Test(note, what_is_written_is_read_back)
{
    note n, back;
    make(&n);
    n.tmpl = strdup("chatml");
    char *text = NULL;
    kvf_error err = { 0 };
    cr_assert_eq(note_print(&n, &text, &err), KVF_OK);
    cr_assert_eq(note_parse(&back, text, strlen(text), &err), KVF_OK, "%s", err.msg);
    cr_assert_eq(back.n_sources, 2);
    cr_assert_eq(back.first_token, 7);
    cr_assert_eq(back.first_byte, 11);
    cr_assert_eq(back.digest, 0xfedcba9876543210u);
    cr_assert_str_eq(back.tmpl, "chatml");
    cr_assert_str_eq(back.system, "Be brief.");
    for (size_t i = 0; i < 2; i++) {
        cr_assert_str_eq(back.sources[i].title, n.sources[i].title);
        cr_assert_str_eq(back.sources[i].path, n.sources[i].path);
        cr_assert_eq(back.sources[i].first, n.sources[i].first);
        cr_assert_eq(back.sources[i].n, n.sources[i].n);
        cr_assert_eq(back.sources[i].lines, n.sources[i].lines);
        cr_assert_eq(back.sources[i].n_pages, n.sources[i].n_pages);
    }
    cr_assert_arr_eq(back.sources[0].page_start, n.sources[0].page_start, 4 * sizeof(size_t));
    note_free(&n);
    note_free(&back);
    free(text);
}

Test(note, damaged_and_newer_notes_are_refused)
{
    note n, back;
    make(&n);
    char *text = NULL;
    kvf_error err = { 0 };
    cr_assert_eq(note_print(&n, &text, &err), KVF_OK);
    size_t len = strlen(text);
    for (size_t k = 0; k < len; k++) cr_assert_eq(note_parse(&back, text, k, &err), KVF_ERR_FORMAT);
    srand(5);
    for (int round = 0; round < 20000; round++) {
        char bad[2048];
        cr_assert_lt(len, sizeof bad);
        memcpy(bad, text, len);
        for (int k = 0; k < 3; k++) bad[(size_t)rand() % len] = "0-9,\"{}[]:e\\n"[rand() % 13];
        if (note_parse(&back, bad, len, NULL) != KVF_OK) continue;
        cite_place p;
        cite_find(&p, &back, body, strlen(body), 30, 40, 50);
        cr_assert_leq(p.from, p.to);
        cr_assert_leq(p.to, strlen(body));
        note_free(&back);
    }
    static const char newer[] = "{\"format\":2}";
    cr_assert_eq(note_parse(&back, newer, strlen(newer), &err), KVF_ERR_UNSUPPORTED);
    cr_assert_eq(note_parse(&back, NULL, 0, &err), KVF_ERR_FORMAT);
    note_free(&n);
    free(text);
}
