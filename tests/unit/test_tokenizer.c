/* test_tokenizer.c - byte-pair and SentencePiece vocabularies made by hand: merging against a naive
 * transcription of the rule, special tokens, damaged files.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

#include "unit/vocab_image.h"

static kvf_error err;
static vocab v; /* of the test; each test is a process */

static uint64_t state = 88172645463325252u;
static uint32_t rnd(uint32_t n)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % n;
}

static tokenizer_rig open_ok(void)
{
    tokenizer_rig r = rig_open(&v, &kvf_mem_default, &err);
    cr_assert_eq(r.rc, KVF_OK, "%s", err.msg);
    return r;
}

static kvf_token_list encode(const kvf_tokenizer *t, const char *text, size_t n, bool special)
{
    kvf_token_list l = { .mem = &kvf_mem_default };
    char *copy = malloc(n ? n : 1); /* of exactly n bytes: ASan sees a read past the end */
    memcpy(copy, text, n);
    cr_assert_eq(kvf_tokenizer_encode(t, copy, n, special, &l, &err), KVF_OK, "%s", err.msg);
    cr_assert_leq(l.n, (int64_t)n + 16);
    free(copy);
    return l;
}

/* Space-separated names of the tokens, "hel lo". */
static const char *names(const kvf_tokenizer *t, const char *text, bool special)
{
    static char out[4096];
    kvf_token_list l = encode(t, text, strlen(text), special);
    size_t at = 0;
    for (int64_t i = 0; i < l.n; i++) {
        size_t n;
        const char *p = kvf_tokenizer_name(t, l.v[i], &n);
        at += (size_t)snprintf(out + at, sizeof out - at, "%s%.*s", i ? " " : "", (int)n, p);
    }
    out[at] = 0;
    kvf_free(l.mem, l.v);
    return out;
}

static bool gives_back(const kvf_tokenizer *t, const char *text, size_t n)
{
    kvf_token_list l = encode(t, text, n, false);
    size_t at = 0;
    bool same = true;
    for (int64_t i = 0; i < l.n && same; i++) {
        const char *p;
        size_t m;
        kvf_tokenizer_bytes(t, l.v[i], &p, &m);
        same = at + m <= n && memcmp(p, text + at, m) == 0;
        at += m;
    }
    kvf_free(l.mem, l.v);
    return same && at == n;
}

/* ---- Byte pairs ----------------------------------------------------------------------------- */

static void bpe(const char *pre)
{
    v.model = "gpt2";
    v.pre = pre;
    v.no_scores = true;
    vocab_bytes(&v);
}

/* Token and merge at once: join("a", "b"). */
static void join(const char *l, const char *r)
{
    char s[192];
    snprintf(s, sizeof s, "%s%s", l, r);
    vocab_add(&v, s, NORMAL, 0);
    snprintf(s, sizeof s, "%s %s", l, r);
    vocab_merge(&v, s);
}

Test(tokenizer_bpe, every_byte_string_is_given_back)
{
    bpe("qwen2");
    join("a", "b");
    join("\xc3\xa4", "\xc2\xb8"); /* E4 B8, the start of a Chinese character */
    tokenizer_rig r = open_ok();
    char text[300];
    for (int round = 0; round < 3000; round++) {
        size_t n = rnd(sizeof text);
        uint32_t kind = rnd(3);
        for (size_t i = 0; i < n; i++)
            text[i] = kind == 0   ? (char)rnd(256)
                      : kind == 1 ? "ab \n\xe4\xb8\xad\xc3\xff'1"[rnd(11)]
                                  : (char)(0x80 + rnd(128));
        cr_assert(gives_back(r.t, text, n));
    }
    rig_close(&r);
}

/* The rule as it is written: join the pair that comes first in the list, leftmost first, again and
 * again. part[] are names. */
static size_t naive_bpe(char part[][96], size_t n)
{
    for (;;) {
        size_t best = 0, rank = v.n_merge;
        for (size_t i = 0; i + 1 < n; i++) {
            char line[96];
            line[0] = 0;
            vocab_append(line, part[i]);
            vocab_append(line, " ");
            vocab_append(line, part[i + 1]);
            for (size_t k = 0; k < rank; k++) {
                if (strcmp(v.merge[k], line) != 0) continue;
                rank = k;
                best = i;
            }
        }
        if (rank == v.n_merge) return n;
        vocab_append(part[best], part[best + 1]);
        memmove(part[best + 1], part[best + 2], (n - best - 2) * sizeof *part);
        n--;
    }
}

Test(tokenizer_bpe, merges_as_the_naive_rule_on_short_and_long_pieces)
{
    static char part[200][96];
    for (int set = 0; set < 12; set++) {
        memset(&v, 0, sizeof v);
        bpe("gpt-2");
        size_t letters[64] = { 'a', 'b', 'c' }, n_letters = 3;
        while (n_letters < 40) {
            size_t l = letters[rnd((uint32_t)n_letters)], m = letters[rnd((uint32_t)n_letters)];
            if (strlen(v.name[l]) + strlen(v.name[m]) > 12) continue;
            letters[n_letters++] = v.n;
            join(v.name[l], v.name[m]); /* may make a token that exists: the first one counts */
        }
        tokenizer_rig r = open_ok();
        for (int round = 0; round < 60; round++) {
            char text[200];
            size_t n = 1 + rnd(round % 3 ? 40 : 199), letter_set = 1 + rnd(3);
            for (size_t i = 0; i < n; i++) {
                text[i] = (char)('a' + rnd((uint32_t)letter_set));
                part[i][0] = text[i];
                part[i][1] = 0;
            }
            size_t want = naive_bpe(part, n);
            kvf_token_list l = encode(r.t, text, n, false);
            cr_assert_eq((size_t)l.n, want, "%.*s", (int)n, text);
            for (size_t i = 0; i < want; i++)
                cr_assert_eq(l.v[i], kvf_tokenizer_find(r.t, part[i], strlen(part[i])), "%.*s", (int)n, text);
            kvf_free(l.mem, l.v);
        }
        rig_close(&r);
    }
}

Test(tokenizer_bpe, a_megabyte_of_one_letter_is_one_piece)
{
    bpe("qwen2");
    join("x", "x");
    join("xx", "xx");
    join("xxxx", "xxxx");
    tokenizer_rig r = open_ok();
    size_t n = 1000003;
    char *text = malloc(n);
    memset(text, 'x', n);
    kvf_token_list l = encode(r.t, text, n, false);
    cr_assert_eq(l.n, 125000 + 2); /* 8 bytes each, then xx and x */
    kvf_free(l.mem, l.v);
    free(text);
    rig_close(&r);
}

Test(tokenizer_bpe, pre_decides_where_numbers_and_words_are_cut)
{
    static const struct {
        const char *pre, *kind, *want;
    } cases[] = {
        { "qwen2", "bpe/qwen2", "1 2 3 4 \xc4\xa0 1 2 a's" },
        { "deepseek-r1-qwen", "bpe/qwen2", "1 2 3 4 \xc4\xa0 1 2 a's" },
        { "llama-bpe", "bpe/llama-bpe", "123 4 \xc4\xa0 12 a's" },
        { "llama3", "bpe/llama-bpe", "123 4 \xc4\xa0 12 a's" },
        { "smaug-bpe", "bpe/smaug-bpe", "12 3 4 \xc4\xa0 12 a's" }, /* no merge makes 123 */
        { "gpt-2", "bpe/gpt-2",
          "12 3 4 \xc4\xa0"
          "12 a's" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        memset(&v, 0, sizeof v);
        bpe(cases[i].pre);
        join("1", "2");
        join("\xc4\xa0", "12");
        vocab_add(&v, "123", NORMAL, 0);
        vocab_merge(&v, "3 4"); /* 34 is no token: never applies */
        tokenizer_rig r = open_ok();
        cr_assert_str_eq(kvf_tokenizer_kind(r.t), cases[i].kind);
        char want[64], got[64];
        snprintf(want, sizeof want, "%.*s", (int)strlen(cases[i].want) - 4, cases[i].want);
        snprintf(got, sizeof got, "%s", names(r.t, "1234 12", false));
        cr_assert_str_eq(got, want, "%s: %s", cases[i].pre, got);
        cr_assert_str_eq(names(r.t, "a's", false), "a ' s");
        rig_close(&r);
    }
}

Test(tokenizer_bpe, contractions_stay_together_in_either_case)
{
    bpe("qwen2");
    join("'", "s");
    join("'", "R");
    join("'R", "E");
    tokenizer_rig r = open_ok();
    cr_assert_str_eq(names(r.t, "a's", false), "a 's");
    cr_assert_str_eq(names(r.t, "a'RE", false), "a 'RE");
    rig_close(&r);
}

Test(tokenizer_bpe, unknown_kinds_are_named_with_those_that_are_known)
{
    bpe("klingon");
    tokenizer_rig r = rig_open(&v, &kvf_mem_default, &err);
    cr_assert_eq(r.rc, KVF_ERR_UNSUPPORTED);
    cr_assert(strstr(err.msg, "klingon") && strstr(err.msg, "qwen2") && strstr(err.msg, "llama-bpe"), "%s",
              err.msg);
    rig_close(&r);
    v.model = "bert";
    r = rig_open(&v, &kvf_mem_default, &err);
    cr_assert_eq(r.rc, KVF_ERR_UNSUPPORTED);
    cr_assert(strstr(err.msg, "bert") && strstr(err.msg, "gpt2"), "%s", err.msg);
    rig_close(&r);
}

Test(tokenizer_bpe, merges_that_make_no_sense_are_skipped)
{
    static const char *const junk[] = {
        "", " ", "a", "a ", " a", "a  b", "q zz", "zz q", "\xff \xff", "a b c"
    };
    bpe("qwen2");
    for (size_t i = 0; i < sizeof junk / sizeof *junk; i++) vocab_merge(&v, junk[i]);
    char long_line[96];
    memset(long_line, 'a', 95);
    long_line[95] = 0;
    long_line[40] = ' ';
    vocab_merge(&v, long_line);
    join("a", "b");
    vocab_merge(&v, "a b"); /* a second time: the first rank counts */
    tokenizer_rig r = open_ok();
    cr_assert_str_eq(names(r.t, "aab", false), "a ab");
    rig_close(&r);
}

/* ---- Special tokens --------------------------------------------------------------------------- */

Test(tokenizer_special, control_tokens_are_parsed_only_on_request)
{
    bpe("qwen2");
    vocab_add(&v, "<|im_end|>", CONTROL, 0);
    vocab_add(&v, "<tool>", USER_DEFINED, 0);
    tokenizer_rig r = open_ok();
    cr_assert_str_eq(names(r.t, "a<|im_end|>b", true), "a <|im_end|> b");
    cr_assert_str_eq(names(r.t, "a<|im_end|>", false), "a < | i m _ e n d | >");
    cr_assert_str_eq(names(r.t, "a<tool>b", false), "a <tool> b");
    cr_assert_str_eq(names(r.t, "<tool<tool>", false), "< t o o l <tool>");
    const char *p;
    size_t n;
    kvf_tokenizer_bytes(r.t, 256, &p, &n);
    cr_assert_eq(n, 0);
    kvf_tokenizer_bytes(r.t, 257, &p, &n);
    cr_assert(n == 6 && memcmp(p, "<tool>", 6) == 0);
    rig_close(&r);
}

Test(tokenizer_special, merging_never_spells_a_control_token)
{
    bpe("gpt-2");
    vocab_add(&v, "ab", CONTROL, 0);
    vocab_merge(&v, "a b");
    tokenizer_rig r = open_ok();
    cr_assert_str_eq(names(r.t, "ab", false), "a b");
    rig_close(&r);

    memset(&v, 0, sizeof v);
    bpe("llama-bpe"); /* takes whole pieces */
    vocab_add(&v, "ab", CONTROL, 0);
    r = open_ok();
    cr_assert_str_eq(names(r.t, "ab", false), "a b");
    cr_assert_str_eq(names(r.t, "ab", true), "ab");
    rig_close(&r);
}

Test(tokenizer_special, turn_marks_are_control_tokens_whatever_their_type)
{
    bpe("qwen2");
    int end = vocab_add(&v, "<|im_end|>", USER_DEFINED, 0);
    vocab_add(&v, "<|im_start|>", USER_DEFINED, 0);
    int tag = vocab_add(&v, "</s>", USER_DEFINED, 0);
    tokenizer_rig r = open_ok();
    cr_assert_str_eq(names(r.t, "<|im_end|>", false), "< | i m _ e n d | >");
    cr_assert_str_eq(names(r.t, "<|im_start|>", false), "< | i m _ s t a r t | >");
    cr_assert_str_eq(names(r.t, "</s>", false), "</s>"); /* an HTML tag */
    cr_assert(kvf_tokenizer_is_end(r.t, end));
    cr_assert_not(kvf_tokenizer_is_end(r.t, tag));
    rig_close(&r);
}

Test(tokenizer_special, the_longest_of_the_leftmost_wins)
{
    bpe("qwen2");
    char run[40] = "";
    for (int i = 1; i < 32; i++) { /* as Gemma has newlines */
        strcat(run, "\n");
        vocab_add(&v, run, USER_DEFINED, 0);
    }
    vocab_add(&v, "abc", USER_DEFINED, 0);
    vocab_add(&v, "ab", USER_DEFINED, 0);
    vocab_add(&v, "ab", USER_DEFINED, 0); /* a duplicate: the first one is found */
    vocab_add(&v, "abcdef", CONTROL, 0);
    tokenizer_rig r = open_ok();
    char text[101];
    memset(text, '\n', 100);
    text[100] = 0;
    kvf_token_list l = encode(r.t, text, 100, false);
    cr_assert(l.n == 4 && l.v[0] == 286 && l.v[2] == 286 && l.v[3] == 256 + 6);
    kvf_free(l.mem, l.v);
    cr_assert_str_eq(names(r.t, "abcabx", false), "abc ab x");
    cr_assert_str_eq(names(r.t, "abcdefabcde", true), "abcdef abc d e");
    cr_assert_str_eq(names(r.t, "abcdef", false), "abc d e f");
    l = encode(r.t, "ab", 2, false);
    cr_assert(l.n == 1 && l.v[0] == 288 && kvf_tokenizer_find(r.t, "ab", 2) == 288);
    kvf_free(l.mem, l.v);
    rig_close(&r);
}

Test(tokenizer_special, parts_are_one_text_but_specials_stay_in_their_part)
{
    bpe("qwen2");
    join("a", "b");
    vocab_add(&v, "<|im_end|>", CONTROL, 0);
    tokenizer_rig r = open_ok();
    kvf_text_part parts[] = { { "a", 1, true },
                              { "b<|im_end|>", 11, false },
                              { NULL, 0, true },
                              { "<|im_end|><|im", 14, true },
                              { "_end|>", 6, true } };
    kvf_token_list l = { .mem = &kvf_mem_default };
    cr_assert_eq(kvf_tokenizer_encode_parts(r.t, parts, 5, &l, &err), KVF_OK);
    int n_control = 0;
    for (int64_t i = 0; i < l.n; i++) n_control += l.v[i] == 257;
    cr_assert_eq(n_control, 1); /* the second of the three that the text seems to hold */
    cr_assert_eq(l.v[0], 256);  /* ab, across parts */
    cr_assert_eq(l.n, 1 + 10 + 1 + 10);
    kvf_free(l.mem, l.v);
    rig_close(&r);
}

/* ---- SentencePiece ---------------------------------------------------------------------------- */

#define SP "\xe2\x96\x81"

static void spm(int space_prefix)
{
    v.model = "llama";
    v.no_merges = true;
    v.space_prefix = space_prefix;
    vocab_add(&v, "<unk>", UNKNOWN, 0);
    vocab_add(&v, "<s>", CONTROL, 0);
    vocab_add(&v, "</s>", CONTROL, 0);
    vocab_bytes(&v);
}

Test(tokenizer_spm, characters_without_token_become_bytes_and_come_back)
{
    spm(1);
    vocab_add(&v, SP, NORMAL, -1);
    vocab_add(&v, "a", NORMAL, -2);
    vocab_add(&v, SP "a", NORMAL, -3);
    vocab_add(&v, "\xc3\xa9", NORMAL, -4);
    tokenizer_rig r = open_ok();
    cr_assert_str_eq(names(r.t, "a\xc3\xa9 a b", false), "a \xc3\xa9 " SP "a " SP " <0x62>");
    cr_assert_str_eq(names(r.t, "\xc3\xc3\xa9\xff", false), "<0xC3> \xc3\xa9 <0xFF>");
    cr_assert_str_eq(names(r.t, "\xe4\xb8\xad", false), "<0xE4> <0xB8> <0xAD>");
    cr_assert_str_eq(names(r.t, "a" SP "a", false), "a " SP "a"); /* the sign means a space */
    char text[200];
    for (int round = 0; round < 2000; round++) {
        size_t n = rnd(sizeof text);
        for (size_t i = 0; i < n; i++) text[i] = round % 2 ? (char)rnd(256) : "aa  \xc3\xa9\xffz"[rnd(8)];
        bool sign = false;
        for (size_t i = 0; i + 3 <= n; i++) sign |= memcmp(text + i, SP, 3) == 0;
        cr_assert(sign || gives_back(r.t, text, n));
    }
    rig_close(&r);
}

Test(tokenizer_spm, a_space_goes_in_front_where_the_file_wants_it)
{
    for (int prefix = 0; prefix < 3; prefix++) { /* no key means true, as in llama-2 files */
        memset(&v, 0, sizeof v);
        spm(prefix);
        vocab_add(&v, SP, NORMAL, -1);
        vocab_add(&v, "a", NORMAL, -2);
        vocab_add(&v, SP "a", NORMAL, -3);
        tokenizer_rig r = open_ok();
        bool on = prefix != 1;
        cr_assert_eq(kvf_tokenizer_space_prefix(r.t), on);
        cr_assert_str_eq(names(r.t, "a", false), on ? SP "a" : "a");
        cr_assert_str_eq(names(r.t, "", false), "");
        cr_assert_str_eq(names(r.t, "<s>a</s>a", true), on ? "<s> " SP "a </s> " SP "a" : "<s> a </s> a");
        rig_close(&r);
    }
}

Test(tokenizer_spm, the_bound_on_tokens_holds_with_one_byte_tokens)
{
    spm(2);
    vocab_add(&v, "x", USER_DEFINED, 0);
    tokenizer_rig r = open_ok();
    char text[1000];
    for (size_t i = 0; i < sizeof text; i++) text[i] = i % 2 ? 'a' : 'x';
    kvf_token_list l = encode(r.t, text, sizeof text, false); /* checks the bound */
    cr_assert_eq(l.n, 1000);
    kvf_free(l.mem, l.v);
    rig_close(&r);
}

static int naive_find(const char *s)
{
    for (size_t i = 0; i < v.n; i++)
        if (v.type[i] == NORMAL && strcmp(v.name[i], s) == 0) return (int)i;
    return -1;
}

static size_t naive_spm(char part[][96], size_t n)
{
    for (;;) {
        size_t best = n;
        float score = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            char s[96] = "";
            vocab_append(s, part[i]);
            vocab_append(s, part[i + 1]);
            int id = naive_find(s);
            if (id < 0 || (best < n && v.score[id] <= score)) continue;
            score = v.score[id];
            best = i;
        }
        if (best == n) return n;
        vocab_append(part[best], part[best + 1]);
        memmove(part[best + 1], part[best + 2], (n - best - 2) * sizeof *part);
        n--;
    }
}

Test(tokenizer_spm, merges_as_the_naive_rule_with_ties_and_spaces_inside_tokens)
{
    static char part[200][96];
    static const char *const letters[] = { SP, "a", "b", "\xc3\xa9" };
    for (int set = 0; set < 12; set++) {
        memset(&v, 0, sizeof v);
        spm(1);
        for (int i = 0; i < 4; i++) vocab_add(&v, letters[i], NORMAL, -10);
        while (v.n < 300) {
            const char *l = v.name[259 + rnd((uint32_t)v.n - 259)],
                       *m = v.name[259 + rnd((uint32_t)v.n - 259)];
            char s[200];
            snprintf(s, sizeof s, "%s%s", l, m);
            /* Half of the sets have spaces in front only, so that runs are cut. */
            if (strlen(s) > 14 || naive_find(s) >= 0 || (set % 2 && strstr(s + 1, SP))) continue;
            float score = (float)rnd(12) - 6;
            vocab_add(&v, s, NORMAL, score == 0 && rnd(2) ? -0.0f : score);
        }
        tokenizer_rig r = open_ok();
        for (int round = 0; round < 60; round++) {
            char text[400] = "";
            size_t n = 1 + rnd(round % 3 ? 40 : 180), letter_set = 1 + rnd(4);
            for (size_t i = 0; i < n; i++) {
                const char *c = letters[rnd((uint32_t)letter_set)];
                strcpy(part[i], c);
                strcat(text, strcmp(c, SP) == 0 ? " " : c);
            }
            size_t want = naive_spm(part, n);
            kvf_token_list l = encode(r.t, text, strlen(text), false);
            cr_assert_eq((size_t)l.n, want, "'%s'", text);
            for (size_t i = 0; i < want; i++)
                cr_assert_eq(l.v[i], naive_find(part[i]), "'%s' at %zu", text, i);
            kvf_free(l.mem, l.v);
        }
        rig_close(&r);
    }
}

Test(tokenizer_spm, user_defined_runs_of_blanks_come_before_merging)
{
    spm(1);
    vocab_add(&v, SP, NORMAL, -1);
    vocab_add(&v, "  ", USER_DEFINED, 0);
    vocab_add(&v, "a", NORMAL, -2);
    vocab_add(&v, SP "a", NORMAL, -3);
    tokenizer_rig r = open_ok();
    cr_assert_str_eq(names(r.t, "a   a", false), "a    " SP "a"); /* "a", two blanks, " a" */
    cr_assert(gives_back(r.t, "a   a  ", 7));
    rig_close(&r);
}

Test(tokenizer_spm, nothing_is_lost_silently_without_byte_tokens_but_for_unknown)
{
    v.model = "llama";
    v.no_merges = true;
    v.space_prefix = 1;
    vocab_add(&v, "<unk>", UNKNOWN, 0);
    vocab_add(&v, "a", NORMAL, 0);
    v.id[0].key = "unknown_token_id";
    tokenizer_rig r = open_ok();
    cr_assert_str_eq(names(r.t, "aba", false), "a <unk> a");
    rig_close(&r);
}

/* ---- Names, ids, rules -------------------------------------------------------------------------- */

Test(tokenizer_ids, find_and_name_are_inverse_and_out_of_range_is_none)
{
    bpe("qwen2");
    join("\xc4\xa0", "a");
    vocab_add(&v, "<|im_end|>", CONTROL, 0);
    vocab_add(&v, "", NORMAL, 0);
    vocab_add(&v, "\xe4\xb8\xad", NORMAL, 0); /* not of the byte alphabet */
    tokenizer_rig r = open_ok();
    for (int32_t i = 0; i < kvf_tokenizer_n_vocab(r.t); i++) {
        size_t n;
        const char *p = kvf_tokenizer_name(r.t, i, &n);
        cr_assert_eq(kvf_tokenizer_find(r.t, p, n), n ? i : KVF_TOKEN_NONE);
    }
    const char *p;
    size_t n = 1;
    cr_assert_null(kvf_tokenizer_name(r.t, -1, &n));
    cr_assert_null(kvf_tokenizer_name(r.t, INT32_MAX, &n));
    kvf_tokenizer_bytes(r.t, -1, &p, &n);
    cr_assert_eq(n, 0);
    kvf_tokenizer_bytes(r.t, 256, &p, &n);
    cr_assert(n == 2 && memcmp(p, " a", 2) == 0);
    char long_name[2000];
    memset(long_name, 'a', sizeof long_name);
    cr_assert_eq(kvf_tokenizer_find(r.t, long_name, sizeof long_name), KVF_TOKEN_NONE);
    cr_assert_eq(kvf_tokenizer_find(r.t, " a", 2), KVF_TOKEN_NONE); /* names, not texts */
    kvf_token_list l = encode(r.t, "\xe4\xb8\xad", 3, false);
    cr_assert_eq(l.n, 3); /* nor is such a name what text is made of */
    kvf_free(l.mem, l.v);
    rig_close(&r);
}

Test(tokenizer_ids, every_kind_of_end_ends)
{
    bpe("qwen2");
    static const char *const ends[] = { "<|im_end|>",    "<|eot_id|>", "<|eom_id|>", "<|endoftext|>",
                                        "<end_of_turn>", "</s>",       "<|end|>" };
    for (size_t i = 0; i < 7; i++) vocab_add(&v, ends[i], CONTROL, 0);
    static const char *const keys[] = { "eos_token_id", "eot_token_id", "eom_token_id", "bos_token_id" };
    for (uint32_t i = 0; i < 4; i++) {
        v.id[i].key = keys[i];
        v.id[i].value = 10 + i;
    }
    tokenizer_rig r = open_ok();
    for (int32_t i = 0; i < kvf_tokenizer_n_vocab(r.t); i++)
        cr_assert_eq(kvf_tokenizer_is_end(r.t, i), i >= 256 || (i >= 10 && i < 13), "%d", i);
    cr_assert_not(kvf_tokenizer_is_end(r.t, KVF_TOKEN_NONE));
    cr_assert(kvf_tokenizer_eos(r.t) == 10 && kvf_tokenizer_bos(r.t) == 13);
    rig_close(&r);
}

/* The rule of each kind, asked of files with and without a token to put in front. */
static bool adds_bos(int key, const char *pre, bool has_bos)
{
    memset(&v, 0, sizeof v);
    v.add_bos = key;
    if (pre) bpe(pre);
    else spm(1);
    if (has_bos) {
        v.id[0].key = "bos_token_id";
        v.id[0].value = 5;
    }
    tokenizer_rig r = open_ok();
    bool adds = kvf_tokenizer_add_bos(r.t);
    cr_assert_eq(kvf_tokenizer_bos(r.t), has_bos ? 5 : KVF_TOKEN_NONE);
    cr_assert_eq(kvf_tokenizer_eos(r.t), KVF_TOKEN_NONE);
    rig_close(&r);
    return adds;
}

Test(tokenizer_ids, add_bos_follows_the_file_and_else_the_kind)
{
    for (int key = 0; key < 3; key++) {
        cr_assert_eq(adds_bos(key, "qwen2", true), key == 2);
        cr_assert_eq(adds_bos(key, "llama-bpe", true), key != 1);
        cr_assert_eq(adds_bos(key, NULL, true), key != 1);
        cr_assert_not(adds_bos(key, "qwen2", false)); /* no such token, whatever the rule says */
        cr_assert_not(adds_bos(key, "llama-bpe", false));
        cr_assert_not(adds_bos(key, NULL, false));
    }
}

/* ---- Damaged files ------------------------------------------------------------------------------ */

static void refused(const char *word)
{
    memset(&err, 0, sizeof err);
    tokenizer_rig r = rig_open(&v, &kvf_mem_default, &err);
    cr_assert_eq(r.rc, KVF_ERR_FORMAT, "%s: %d %s", word, r.rc, err.msg);
    cr_assert_null(r.t);
    cr_assert(strstr(err.msg, word), "%s not in: %s", word, err.msg);
    rig_close(&r);
}

Test(tokenizer_hostile, arrays_that_do_not_fit_are_refused_by_name)
{
    for (int d = -1; d <= 1; d += 2) {
        memset(&v, 0, sizeof v);
        bpe("qwen2");
        v.n_type_extra = d;
        refused("tokenizer.ggml.token_type");
        memset(&v, 0, sizeof v);
        spm(1);
        v.n_score_extra = d;
        refused("tokenizer.ggml.scores");
    }
    memset(&v, 0, sizeof v);
    spm(1);
    v.no_scores = true;
    refused("tokenizer.ggml.scores");
    memset(&v, 0, sizeof v);
    bpe("qwen2");
    v.no_merges = true;
    refused("tokenizer.ggml.merges");
    v.no_merges = false;
    v.type[3] = 7;
    refused("tokenizer.ggml.token_type");
    v.n = 0;
    refused("tokenizer.ggml.tokens");
}

Test(tokenizer_hostile, ids_beyond_the_vocabulary_are_refused_by_name)
{
    static const char *const keys[] = { "bos_token_id", "eos_token_id", "unknown_token_id", "eot_token_id",
                                        "eom_token_id" };
    bpe("qwen2");
    for (int i = 0; i < 5; i++) {
        v.id[0].key = keys[i];
        v.id[0].value = 256;
        refused(keys[i]);
        v.id[0].value = UINT32_MAX;
        refused(keys[i]);
    }
}

Test(tokenizer_hostile, odd_names_and_scores_are_survived)
{
    spm(1);
    for (uint32_t i = 0; i < 7; i++) vocab_add(&v, "", i, NAN);
    for (uint32_t i = 0; i < 7; i++) vocab_add(&v, "a", i, NAN);
    vocab_add(&v, "b", NORMAL, INFINITY);
    vocab_add(&v, "ab", NORMAL, -INFINITY);
    vocab_add(&v, "ba", NORMAL, NAN);
    vocab_add(&v, "\xff\xfe", NORMAL, 1);
    vocab_add(&v, "<0xZZ>", BYTE, 1);
    vocab_add(&v, SP SP SP, USER_DEFINED, 1);
    tokenizer_rig r = open_ok();
    char text[64];
    for (int round = 0; round < 500; round++) {
        size_t n = rnd(sizeof text);
        for (size_t i = 0; i < n; i++) text[i] = "ab \xff\xfe\xe2\x96\x81<"[rnd(9)];
        for (int s = 0; s < 2; s++) {
            kvf_token_list l = encode(r.t, text, n, s);
            kvf_free(l.mem, l.v);
        }
    }
    rig_close(&r);
}

typedef struct failing {
    size_t left, live;
} failing;

static void *failing_alloc(void *user, size_t n)
{
    failing *f = user;
    if (f->left == 0) return NULL;
    f->left--;
    f->live++;
    return malloc(n);
}

static void failing_release(void *user, void *p)
{
    ((failing *)user)->live--;
    free(p);
}

static kvf_status open_and_encode(const kvf_mem *mem)
{
    char text[2000];
    for (size_t i = 0; i < sizeof text; i++) text[i] = i < 1000 ? 'a' : "ab 1\n\xff"[i % 6];
    tokenizer_rig r = rig_open(&v, mem, &err);
    kvf_token_list l = { .mem = mem };
    kvf_text_part parts[2] = { { text, 1000, true }, { text + 1000, 1000, false } };
    kvf_status rc = r.rc;
    if (rc == KVF_OK) rc = kvf_tokenizer_encode_parts(r.t, parts, 2, &l, &err);
    kvf_free(mem, l.v);
    rig_close(&r);
    return rc;
}

Test(tokenizer_hostile, running_out_of_memory_anywhere_is_reported_and_leaks_nothing)
{
    failing f;
    const kvf_mem mem = { failing_alloc, failing_release, &f };
    for (int kind = 0; kind < 2; kind++) {
        memset(&v, 0, sizeof v);
        if (kind)
            spm(2);
        else
            bpe("default");
        if (!kind) join("a", "a");
        vocab_add(&v, "aa", NORMAL, 0);
        kvf_status rc = KVF_ERR_NOMEM;
        size_t k = 0;
        for (; rc != KVF_OK && k < 500; k++) {
            f = (failing){ k, 0 };
            memset(&err, 0, sizeof err);
            rc = open_and_encode(&mem);
            cr_assert(rc == KVF_OK || (rc == KVF_ERR_NOMEM && err.code == rc), "allocation %zu: %d %s", k, rc,
                      err.msg);
            cr_assert_eq(f.live, 0, "allocation %zu", k);
        }
        cr_assert(rc == KVF_OK && k > 10);
    }
}

/* ---- Threads -------------------------------------------------------------------------------------- */

typedef struct job {
    const kvf_tokenizer *t;
    uint64_t sum;
} job;

static void *work(void *arg)
{
    job *j = arg;
    char text[4000];
    for (size_t i = 0; i < sizeof text; i++) text[i] = "ab ab\n1'"[(i * 7 + i / 9) % 8];
    for (int round = 0; round < 50; round++) {
        kvf_token_list l = { .mem = &kvf_mem_default };
        if (kvf_tokenizer_encode(j->t, text, sizeof text, true, &l, NULL) != KVF_OK) return NULL;
        for (int64_t i = 0; i < l.n; i++) j->sum = j->sum * 31 + (uint64_t)l.v[i];
        kvf_free(l.mem, l.v);
    }
    return NULL;
}

Test(tokenizer_threads, one_tokenizer_serves_several_threads)
{
    bpe("qwen2");
    join("a", "b");
    join("\xc4\xa0", "ab");
    tokenizer_rig r = open_ok();
    pthread_t th[4];
    job j[4];
    for (int i = 0; i < 4; i++) {
        j[i] = (job){ r.t, 0 };
        cr_assert_eq(pthread_create(&th[i], NULL, work, &j[i]), 0);
    }
    for (int i = 0; i < 4; i++) pthread_join(th[i], NULL);
    for (int i = 1; i < 4; i++) cr_assert_eq(j[i].sum, j[0].sum);
    cr_assert_neq(j[0].sum, 0);
    rig_close(&r);
}
