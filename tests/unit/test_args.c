/* test_args.c - the option tables of the program.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <string.h>

#include "args.h"

typedef struct state {
    bool json, quiet;
    int64_t n;
    double x;
    const char *text, *choice;
    arg_texts files;
    arg_ints sizes;
} state;

static const arg_row rows[] = {
    { "--json", 'j', NULL, ARG_FLAG, offsetof(state, json), NULL, 0, 0, NULL, "flag" },
    { "--quiet", 'q', NULL, ARG_FLAG, offsetof(state, quiet), NULL, 0, 0, NULL, "flag" },
    { "--number", 'n', "N", ARG_INT, offsetof(state, n), "7", -1, 100, NULL, "whole number" },
    { "--share", 's', "X", ARG_REAL, offsetof(state, x), "0.5", 0, 1, NULL, "real number" },
    { "--text", 't', "TEXT", ARG_TEXT, offsetof(state, text), NULL, 0, 0, NULL, "text" },
    { "--kind", 0, "KIND", ARG_CHOICE, offsetof(state, choice), "auto", 0, 0, "auto|f32", "a choice" },
    { "--file", 'f', "FILE", ARG_TEXTS, offsetof(state, files), NULL, 0, 0, NULL, "files" },
    { "--sizes", 'p', "N,...", ARG_INTS, offsetof(state, sizes), "512", 0, 4096, NULL, "sizes" },
    { 0 },
};

static const arg_command command = {
    .name = "try", .synopsis = "[options]", .summary = "a test", .max_operands = 2
};

static void done(state *s, arg_texts *operands)
{
    arg_group groups[] = { { "Options", rows, s }, { NULL, NULL, NULL } };
    args_free(groups, operands);
}

/* Reads up to 8 words; done() frees the lists. */
static arg_result run(state *s, arg_texts *operands, kvf_error *err, const char *const *words)
{
    static char copies[10][64];
    char *argv[10] = { copies[0] };
    int argc = 1;
    for (; words[argc - 1]; argc++) {
        argv[argc] = copies[argc];
        snprintf(copies[argc], sizeof copies[argc], "%s", words[argc - 1]);
    }
    memset(s, 0, sizeof *s);
    memset(operands, 0, sizeof *operands);
    memset(err, 0, sizeof *err);
    arg_group groups[] = { { "Options", rows, s }, { NULL, NULL, NULL } };
    return args_read(&command, groups, argc, argv, operands, err);
}

#define WORDS(...)                                                                                           \
    (const char *const[]) { __VA_ARGS__, NULL }

Test(args, defaults_come_from_the_rows)
{
    state s;
    arg_texts ops;
    kvf_error err;
    cr_assert_eq(run(&s, &ops, &err, (const char *const[]){ NULL }), ARG_GO);
    cr_assert_eq(s.n, 7);
    cr_assert_float_eq(s.x, 0.5, 0);
    cr_assert_str_eq(s.choice, "auto");
    cr_assert_null(s.text);
    cr_assert_eq(ops.n, 0);
}

Test(args, all_ways_to_write_a_value_mean_the_same)
{
    state s;
    arg_texts ops;
    kvf_error err;
    const char *const *const forms[] = { WORDS("--number", "42"), WORDS("--number=42"), WORDS("-n", "42"),
                                         WORDS("-n42"), WORDS("-jn42") };
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        cr_assert_eq(run(&s, &ops, &err, forms[i]), ARG_GO, "%zu: %s", i, err.msg);
        cr_assert_eq(s.n, 42);
        done(&s, &ops);
    }
    cr_assert_eq(run(&s, &ops, &err, WORDS("-n", "-1", "-jq")), ARG_GO);
    cr_assert_eq(s.n, -1);
    cr_assert(s.json && s.quiet);
}

Test(args, lists_collect)
{
    state s;
    arg_texts ops;
    kvf_error err;
    cr_assert_eq(run(&s, &ops, &err, WORDS("-f", "a", "-p", "1,2", "-p3", "--file=-", "x")), ARG_GO, "%s",
                 err.msg);
    cr_assert_eq(s.files.n, 2);
    cr_assert_str_eq(s.files.v[1], "-");
    cr_assert_eq(s.sizes.n, 3);
    cr_assert_eq(s.sizes.v[2], 3);
    cr_assert_eq(ops.n, 1);
    done(&s, &ops);
}

Test(args, sizes_have_units)
{
    static const struct {
        const char *text;
        int64_t bytes;
    } good[] = { { "0", 0 }, { "123", 123 }, { "1K", 1024 }, { "2kb", 2048 }, { "1.5M", 1572864 },
                 { "3GiB", (int64_t)3 << 30 }, { "1T", (int64_t)1 << 40 }, { "7B", 7 } };
    static const char *const bad[] = { "", "M", "1.2.3", "1X", "1MM", "-1", "1 G", "99999999999T", "1e3", "0x10" };
    int64_t v = 0;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        cr_assert(args_size(good[i].text, &v), "%s", good[i].text);
        cr_assert_eq(v, good[i].bytes, "%s: %lld", good[i].text, (long long)v);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) cr_assert_not(args_size(bad[i], &v), "%s", bad[i]);
}

Test(args, two_dashes_end_options_and_one_is_an_operand)
{
    state s;
    arg_texts ops;
    kvf_error err;
    cr_assert_eq(run(&s, &ops, &err, WORDS("-", "--", "--json")), ARG_GO);
    cr_assert_eq(ops.n, 2);
    cr_assert_str_eq(ops.v[0], "-");
    cr_assert_str_eq(ops.v[1], "--json");
    cr_assert(!s.json);
    done(&s, &ops);
    cr_assert_eq(run(&s, &ops, &err, WORDS("--help")), ARG_HELP);
    cr_assert_eq(run(&s, &ops, &err, WORDS("-h")), ARG_HELP);
}

Test(args, what_is_wrong_is_named)
{
    static const struct {
        const char *words[4];
        const char *part;
    } bad[] = {
        { { "--jsn" }, "did you mean --json?" },
        { { "--num", "3" }, "did you mean --number?" },
        { { "--zebra" }, "Unknown option '--zebra'" },
        { { "-z" }, "Unknown option '-z'" },
        { { "-n" }, "--number needs a value" },
        { { "-t", "--json" }, "--text needs a value" },
        { { "-n", "1x" }, "from -1 to 100" },
        { { "-n", "" }, "--number" },
        { { "-n", "101" }, "from -1 to 100" },
        { { "-n", "99999999999999999999" }, "--number" },
        { { "-s", "nan" }, "from 0 to 1" },
        { { "-s", "1.01" }, "from 0 to 1" },
        { { "-s", " 1" }, "--share" },
        { { "--kind", "f16" }, "auto|f32" },
        { { "--kind", "" }, "auto|f32" },
        { { "--kind=aut" }, "auto|f32" },
        { { "-p", "1,,2" }, "--sizes" },
        { { "-p", "1,5000" }, "from 0 to 4096" },
        { { "--json=1" }, "takes no value" },
        { { "a", "b", "c" }, "Unexpected argument 'c'" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *words[5] = { bad[i].words[0], bad[i].words[1], bad[i].words[2], bad[i].words[3], NULL };
        state s;
        arg_texts ops;
        kvf_error err;
        cr_assert_eq(run(&s, &ops, &err, words), ARG_BAD, "%s", words[0]);
        cr_assert(strstr(err.msg, bad[i].part), "%s: %s", words[0], err.msg);
        done(&s, &ops);
    }
}

Test(args, the_closest_word_is_close)
{
    static const char *const words[] = { "ask", "chat", "tokenize", "perplexity", "inspect", "bench" };
    cr_assert_str_eq(args_closest("aks", words, 6), "ask");
    cr_assert_str_eq(args_closest("tokenise", words, 6), "tokenize");
    cr_assert_str_eq(args_closest("perp", words, 6), "perplexity");
    cr_assert_null(args_closest("serve", words, 6));
    cr_assert_null(args_closest("", words, 6));
}

Test(args, help_shows_every_row)
{
    state s = { 0 };
    arg_group groups[] = { { "Options", rows, &s }, { NULL, NULL, NULL } };
    char page[4096] = "";
    FILE *f = fmemopen(page, sizeof page - 1, "w");
    cr_assert(f);
    args_help(&command, groups, f);
    fclose(f);
    for (const arg_row *row = rows; row->name; row++) cr_assert(strstr(page, row->name), "%s", row->name);
    cr_assert(strstr(page, "(default: 0.5)"));
    cr_assert(strstr(page, "-h, --help"));
}
