/* args.c - see args.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "args.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"

static const char help_name[] = "--help";

bool args_int(const char *text, int64_t *out)
{
    if (!isdigit((unsigned char)*text) && *text != '-' && *text != '+') return false;
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (end == text || *end || errno) return false;
    *out = v;
    return true;
}

bool args_real(const char *text, double *out)
{
    if (!*text || isspace((unsigned char)*text)) return false;
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !isfinite(v)) return false;
    *out = v;
    return true;
}

bool args_size(const char *text, int64_t *out)
{
    static const char units[] = "KMGT";
    char number[32];
    size_t n = strspn(text, "0123456789.");
    if (!n || n >= sizeof number) return false;
    memcpy(number, text, n);
    number[n] = '\0';
    double v;
    if (!args_real(number, &v)) return false;
    const char *p = text + n, *unit = *p ? strchr(units, toupper((unsigned char)*p)) : NULL;
    if (unit) {
        for (const char *u = units; u <= unit; u++) v *= 1024;
        p++;
        if (*p == 'i') p++;
    }
    if (*p == 'B' || *p == 'b') p++;
    if (*p || v > 4e18) return false;
    *out = (int64_t)v;
    return true;
}

/* Edit distance with neighbours swapped counted as one; words longer than 31 are "far". */
static size_t distance(const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    if (n > 31 || m > 31) return 99;
    size_t d[3][32]; /* rows i - 2, i - 1, i, taken modulo 3 */
    for (size_t j = 0; j <= m; j++) d[0][j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t *row = d[i % 3], *up = d[(i - 1) % 3], *up2 = d[(i + 1) % 3];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t best = up[j - 1] + (a[i - 1] != b[j - 1]);
            if (up[j] + 1 < best) best = up[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && up2[j - 2] + 1 < best)
                best = up2[j - 2] + 1;
            row[j] = best;
        }
    }
    return d[n % 3][m];
}

const char *args_closest(const char *word, const char *const *words, size_t n)
{
    const char *best = NULL;
    size_t best_d = 99;
    for (size_t i = 0; i < n; i++) {
        size_t len = strlen(word), d = distance(word, words[i]);
        /* The beginning of a word is as good as one typing error. */
        if (len >= 2 && strncmp(word, words[i], len) == 0 && d > 1) d = 1;
        size_t allowed = len < 4 ? 1 : len < 8 ? 2 : 3;
        if (d <= allowed && d < best_d) {
            best_d = d;
            best = words[i];
        }
    }
    return best;
}

/* ---- Finding rows ---------------------------------------------------------------------- */

static const arg_row *find_long(const arg_group *groups, const char *name, size_t n, void **state)
{
    for (; groups->title; groups++)
        for (const arg_row *row = groups->rows; row->name; row++)
            if (strlen(row->name) == n && memcmp(row->name, name, n) == 0) {
                *state = groups->state;
                return row;
            }
    return NULL;
}

static const arg_row *find_short(const arg_group *groups, char c, void **state)
{
    for (; groups->title; groups++)
        for (const arg_row *row = groups->rows; row->name; row++)
            if (row->short_name == c) {
                *state = groups->state;
                return row;
            }
    return NULL;
}

static arg_result unknown_option(const arg_command *cmd, const arg_group *groups, const char *arg, size_t n,
                                 kvf_error *err)
{
    const char *names[128];
    size_t n_names = 0;
    names[n_names++] = help_name;
    for (const arg_group *g = groups; g->title; g++)
        for (const arg_row *row = g->rows; row->name && n_names < 128; row++) names[n_names++] = row->name;
    char word[64];
    snprintf(word, sizeof word, "%.*s", n < 60 ? (int)n : 60, arg);
    const char *close = args_closest(word, names, n_names);
    if (close)
        report_fail(err, KVF_ERR_ARG, "Unknown option '%s'; did you mean %s?", word, close);
    else
        report_fail(err, KVF_ERR_ARG, "Unknown option '%s'; see kvfold %s --help.", word, cmd->name);
    return ARG_BAD;
}

/* ---- Values ---------------------------------------------------------------------------- */

static bool add_text(arg_texts *list, const char *text)
{
    const char **v = realloc(list->v, (list->n + 1) * sizeof *v);
    if (!v) return false;
    list->v = v;
    v[list->n++] = text;
    return true;
}

static arg_result bad_number(const arg_row *row, const char *text, kvf_error *err)
{
    if (row->type == ARG_SIZE) {
        report_fail(err, KVF_ERR_ARG, "%s wants a size like 800M or 1.5G, not '%.60s'.", row->name, text);
        return ARG_BAD;
    }
    const char *kind = row->type == ARG_REAL ? "a number" : "a whole number";
    report_fail(err, KVF_ERR_ARG, "%s wants %s from %.15g to %.15g, not '%.60s'.", row->name, kind, row->min,
                row->max, text);
    return ARG_BAD;
}

static arg_result no_memory(kvf_error *err)
{
    report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the command line.");
    return ARG_BAD;
}

static arg_result set_ints(const arg_row *row, arg_ints *list, const char *text, kvf_error *err)
{
    for (const char *p = text;; p++) {
        size_t n = strcspn(p, ",");
        char item[32];
        int64_t v;
        snprintf(item, sizeof item, "%.*s", n < 31 ? (int)n : 31, p);
        if (n > 30 || !args_int(item, &v) || (double)v < row->min || (double)v > row->max)
            return bad_number(row, item, err);
        int64_t *grown = realloc(list->v, (list->n + 1) * sizeof *grown);
        if (!grown) return no_memory(err);
        list->v = grown;
        grown[list->n++] = v;
        p += n;
        if (!*p) return ARG_GO;
    }
}

static arg_result set_choice(const arg_row *row, const char **field, const char *text, kvf_error *err)
{
    size_t n = strlen(text);
    for (const char *p = row->choices; n; p++) {
        size_t len = strcspn(p, "|");
        if (len == n && memcmp(p, text, n) == 0) {
            *field = text;
            return ARG_GO;
        }
        p += len;
        if (!*p) break;
    }
    report_fail(err, KVF_ERR_ARG, "%s is one of %s, not '%.60s'.", row->name, row->choices, text);
    return ARG_BAD;
}

static arg_result set_value(const arg_row *row, void *state, const char *text, kvf_error *err)
{
    void *field = (char *)state + row->offset;
    switch (row->type) {
    case ARG_FLAG: *(bool *)field = true; return ARG_GO;
    case ARG_TEXT: *(const char **)field = text; return ARG_GO;
    case ARG_TEXTS: return add_text(field, text) ? ARG_GO : no_memory(err);
    case ARG_INTS: return set_ints(row, field, text, err);
    case ARG_CHOICE: return set_choice(row, field, text, err);
    case ARG_INT: {
        int64_t v;
        if (!args_int(text, &v) || (double)v < row->min || (double)v > row->max)
            return bad_number(row, text, err);
        *(int64_t *)field = v;
        return ARG_GO;
    }
    case ARG_SIZE: {
        int64_t v;
        if (!args_size(text, &v) || (double)v < row->min || (double)v > row->max)
            return bad_number(row, text, err);
        *(int64_t *)field = v;
        return ARG_GO;
    }
    case ARG_REAL: {
        double v;
        if (!args_real(text, &v) || v < row->min || v > row->max) return bad_number(row, text, err);
        *(double *)field = v;
        return ARG_GO;
    }
    }
    return ARG_GO;
}

/* Lists keep an empty default: the command fills in what the row shows. */
static arg_result set_defaults(const arg_group *groups, kvf_error *err)
{
    for (; groups->title; groups++)
        for (const arg_row *row = groups->rows; row->name; row++) {
            if (!row->def || row->type == ARG_FLAG || row->type == ARG_INTS || row->type == ARG_TEXTS)
                continue;
            if (set_value(row, groups->state, row->def, err) != ARG_GO) return ARG_BAD;
        }
    return ARG_GO;
}

/* ---- Reading --------------------------------------------------------------------------- */

/* The value of row: `attached` if not NULL, else the next argument. */
static arg_result take_value(const arg_row *row, void *state, const char *attached, int *i, int argc,
                             char **argv, kvf_error *err)
{
    if (row->type == ARG_FLAG) return set_value(row, state, NULL, err);
    const char *text = attached;
    if (!text) {
        const char *next = *i + 1 < argc ? argv[*i + 1] : NULL;
        /* "-m --json": the value was forgotten. Numbers may be negative, "-" is stdin. */
        bool number = row->type == ARG_INT || row->type == ARG_REAL || row->type == ARG_INTS;
        if (!next || (!number && next[0] == '-' && next[1])) {
            report_fail(err, KVF_ERR_ARG, "%s needs a value: %s %s.", row->name, row->name, row->value);
            return ARG_BAD;
        }
        text = next;
        ++*i;
    }
    return set_value(row, state, text, err);
}

static arg_result read_long(const arg_command *cmd, const arg_group *groups, int *i, int argc, char **argv,
                            kvf_error *err)
{
    const char *arg = argv[*i], *eq = strchr(arg, '=');
    size_t n = eq ? (size_t)(eq - arg) : strlen(arg);
    if (strcmp(arg, help_name) == 0) return ARG_HELP;
    void *state = NULL;
    const arg_row *row = find_long(groups, arg, n, &state);
    if (!row) return unknown_option(cmd, groups, arg, n, err);
    if (eq && row->type == ARG_FLAG) {
        report_fail(err, KVF_ERR_ARG, "%s takes no value.", row->name);
        return ARG_BAD;
    }
    return take_value(row, state, eq ? eq + 1 : NULL, i, argc, argv, err);
}

/* "-v", "-vq", "-t8", "-t 8". */
static arg_result read_short(const arg_command *cmd, const arg_group *groups, int *i, int argc, char **argv,
                             kvf_error *err)
{
    const char *arg = argv[*i];
    for (const char *p = arg + 1; *p; p++) {
        void *state = NULL;
        const arg_row *row = find_short(groups, *p, &state);
        if (!row && *p == 'h') return ARG_HELP;
        if (!row) return unknown_option(cmd, groups, arg, strlen(arg), err);
        if (row->type != ARG_FLAG) return take_value(row, state, p[1] ? p + 1 : NULL, i, argc, argv, err);
        arg_result rc = set_value(row, state, NULL, err);
        if (rc != ARG_GO) return rc;
    }
    return ARG_GO;
}

arg_result args_read(const arg_command *command, const arg_group *groups, int argc, char **argv,
                     arg_texts *operands, kvf_error *err)
{
    bool options = true;
    arg_result rc = set_defaults(groups, err);
    for (int i = 1; i < argc && rc == ARG_GO; i++) {
        const char *arg = argv[i];
        if (options && strcmp(arg, "--") == 0) {
            options = false;
        } else if (options && arg[0] == '-' && arg[1] == '-') {
            rc = read_long(command, groups, &i, argc, argv, err);
        } else if (options && arg[0] == '-' && arg[1]) {
            rc = read_short(command, groups, &i, argc, argv, err);
        } else if (operands->n == command->max_operands) {
            report_fail(err, KVF_ERR_ARG, "Unexpected argument '%.80s'; see kvfold %s --help.%s%s", arg,
                        command->name, command->operand ? " " : "", command->operand ? command->operand : "");
            rc = ARG_BAD;
        } else if (!add_text(operands, arg)) {
            rc = no_memory(err);
        }
    }
    return rc;
}

arg_result args_parse(const arg_command *command, const arg_group *groups, int argc, char **argv,
                      arg_texts *operands)
{
    kvf_error err = { 0 };
    arg_result rc = args_read(command, groups, argc, argv, operands, &err);
    if (rc == ARG_HELP) args_help(command, groups, stdout);
    if (rc == ARG_BAD) report_error("%s", err.msg);
    if (rc != ARG_GO) args_free(groups, operands);
    return rc;
}

/* ---- Help ------------------------------------------------------------------------------ */

#define HELP_COLUMN 28
#define HELP_WIDTH 96

/* Print words up to HELP_WIDTH, further lines starting at `column`. */
static void print_wrapped(FILE *out, const char *text, int column, int at)
{
    while (*text) {
        int n = (int)strcspn(text, " ");
        if (at > column && at + 1 + n > HELP_WIDTH) {
            fprintf(out, "\n%*s", column, "");
            at = column;
        } else if (at > column) {
            fputc(' ', out);
            at++;
        }
        fprintf(out, "%.*s", n, text);
        at += n;
        text += n;
        text += strspn(text, " ");
    }
    fputc('\n', out);
}

static void help_row(const arg_row *row, FILE *out)
{
    char left[96], text[512];
    snprintf(left, sizeof left, "  %c%c%s %s%s%s", row->short_name ? '-' : ' ',
             row->short_name ? row->short_name : ' ', row->short_name ? "," : " ", row->name,
             row->value ? " " : "", row->value ? row->value : "");
    snprintf(text, sizeof text, "%s%s%s%s", row->help, row->def ? " (default: " : "",
             row->def ? row->def : "", row->def ? ")" : "");
    int n = (int)strlen(left);
    fputs(left, out);
    if (n + 2 > HELP_COLUMN)
        fprintf(out, "\n%*s", HELP_COLUMN, "");
    else
        fprintf(out, "%*s", HELP_COLUMN - n, "");
    print_wrapped(out, text, HELP_COLUMN, HELP_COLUMN);
}

void args_help(const arg_command *command, const arg_group *groups, FILE *out)
{
    fprintf(out, "kvfold %s - %s\n\nUsage: kvfold %s %s\n", command->name, command->summary, command->name,
            command->synopsis);
    if (command->details) fprintf(out, "\n%s\n", command->details);
    for (const arg_group *g = groups; g->title; g++) {
        fprintf(out, "\n%s:\n", g->title);
        for (const arg_row *row = g->rows; row->name; row++) help_row(row, out);
        if (g == groups) fprintf(out, "  -h, --help%*sshow this page\n", HELP_COLUMN - 12, "");
    }
    if (command->examples) fprintf(out, "\nExamples:\n%s\n", command->examples);
}

void args_free(const arg_group *groups, arg_texts *operands)
{
    for (; groups->title; groups++)
        for (const arg_row *row = groups->rows; row->name; row++) {
            void *field = (char *)groups->state + row->offset;
            if (row->type == ARG_TEXTS) {
                free(((arg_texts *)field)->v);
                *(arg_texts *)field = (arg_texts){ 0 };
            } else if (row->type == ARG_INTS) {
                free(((arg_ints *)field)->v);
                *(arg_ints *)field = (arg_ints){ 0 };
            }
        }
    free(operands->v);
    *operands = (arg_texts){ 0 };
}
