/* args.h - command line options as tables.
 *
 * One row says everything about an option: flag, short form, argument, type, default, range,
 * help. The parser, --help and the error messages read the same rows. A command's options are
 * groups of rows, each with the struct its rows fill.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_ARGS_H
#define KVFOLD_TOOLS_ARGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <kvfold/kvfold.h>

typedef enum arg_type {
    ARG_FLAG,   /* bool */
    ARG_INT,    /* int64_t */
    ARG_SIZE,   /* int64_t, bytes: "800M", "1.5G"; units of 1024 */
    ARG_REAL,   /* double */
    ARG_TEXT,   /* const char *, NULL if not given and without default */
    ARG_CHOICE, /* const char *, one of the words in `choices` */
    ARG_TEXTS,  /* arg_texts: may be given again and again */
    ARG_INTS    /* arg_ints: "512,4096", may also be given again */
} arg_type;

typedef struct arg_texts {
    const char **v; /* [n] pointers into argv; owned array */
    size_t n;
} arg_texts;

typedef struct arg_ints {
    int64_t *v; /* [n]; owned */
    size_t n;
} arg_ints;

typedef struct arg_row {
    const char *name;  /* "--max-tokens"; NULL ends the table */
    char short_name;   /* 'n', or 0 */
    const char *value; /* name of the argument in help; NULL for flags */
    arg_type type;
    size_t offset;       /* of the field in the group's struct */
    const char *def;     /* default as text, or NULL; shown in help */
    double min, max;     /* of numbers */
    const char *choices; /* "auto|f32" */
    const char *help;
} arg_row;

typedef struct arg_group {
    const char *title; /* "Sampling options"; NULL ends the list of groups */
    const arg_row *rows;
    void *state;
} arg_group;

typedef struct arg_command {
    const char *name;     /* "ask" */
    const char *synopsis; /* after "kvfold ask " */
    const char *summary;  /* one line */
    const char *details;  /* paragraphs, or NULL */
    const char *examples; /* lines, or NULL */
    const char *operand;  /* what the arguments without a dash are, for messages */
    size_t max_operands;
} arg_command;

typedef enum arg_result { ARG_GO, ARG_HELP, ARG_BAD } arg_result;

/* Set defaults, then read argv[1..argc). Operands are collected in *operands (owned by the
 * caller). "--" ends options, "-" is an operand, "--name=value" and "-n8" are understood. ARG_HELP:
 * help was printed to stdout; ARG_BAD: a message was printed to stderr, exit with 2. */
arg_result args_parse(const arg_command *command, const arg_group *groups, int argc, char **argv,
                      arg_texts *operands);

/* Only the checks: errors go into err instead of stderr; help is ARG_HELP and prints nothing. */
arg_result args_read(const arg_command *command, const arg_group *groups, int argc, char **argv,
                     arg_texts *operands, kvf_error *err);

/* Print the help page. */
void args_help(const arg_command *command, const arg_group *groups, FILE *out);

/* Free the lists of all rows. */
void args_free(const arg_group *groups, arg_texts *operands);

/* The word of the n closest to `word`, or NULL if none is close: for "did you mean". */
const char *args_closest(const char *word, const char *const *words, size_t n);

/* Whole-string numbers; false if anything else is in the text. */
bool args_int(const char *text, int64_t *out);
bool args_real(const char *text, double *out);

/* Bytes: a number, then nothing, K, M, G or T (of 1024), then "B" or "iB" if you like. */
bool args_size(const char *text, int64_t *out);

#endif
