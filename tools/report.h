/* report.h - how the program tells the user that something went wrong, or went well.
 *
 * Everything goes to standard error as "kvfold: sentence". Text that comes from files (names,
 * metadata) is stripped of terminal control characters on its way.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_REPORT_H
#define KVFOLD_TOOLS_REPORT_H

#include <stdbool.h>
#include <stdio.h>

#include <kvfold/kvfold.h>

/* Exit codes of the program. */
enum {
    EXIT_OK = 0,
    EXIT_FAILED = 1,       /* the machine failed: memory, a write, a bug */
    EXIT_USAGE = 2,        /* the user's input cannot be used: options, files, stores */
    EXIT_INTERRUPTED = 130 /* Ctrl-C or SIGTERM */
};

/* Fill *err (may be NULL) and return code, as the library does. */
kvf_status report_fail(kvf_error *err, kvf_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Print one line. */
void report_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
void report_note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Exit code of a status. */
int report_exit_code(kvf_status status);

/* Print the error and return its exit code. */
int report_status(const kvf_error *err);

/* Flush standard output; EXIT_FAILED, with a message, if what was written did not arrive. */
int report_flush(int code);

/* True if the stream is a terminal; colour also needs NO_COLOR unset and TERM not "dumb". */
bool report_is_terminal(FILE *stream);
bool report_colour(FILE *stream);

/* "12,345" into out; returns out. */
const char *report_count(char out[32], int64_t n);

/* "1.5 GB", "491 MB" into out; returns out. Decimal units. */
const char *report_bytes(char out[32], double bytes);

#endif
