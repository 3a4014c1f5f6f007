/* progress.h - one line on standard error that says how far reading has got.
 *
 * Shown only when standard error is a terminal, and only for work that takes a moment.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_PROGRESS_H
#define KVFOLD_TOOLS_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct progress {
    const char *label; /* "Reading" */
    bool on;           /* standard error is a terminal, and nobody asked for quiet */
    bool drawn;        /* a line is on the screen */
    double start_s, last_s;
    bool timed;          /* the next three are set */
    int64_t first;       /* what was done at the first call: not this run's work */
    double first_s;      /* when that was */
    int64_t bytes;       /* on disk so far; shown if > 0 */
    const char *unit;    /* "tokens" */
} progress;

/* Begin; quiet: never draw. */
void progress_start(progress *p, const char *label, bool quiet);

/* `done` of `total` tokens. Cheap: draws at most ten times a second. */
void progress_update(progress *p, int64_t done, int64_t total);

/* True if progress_update would draw now: time to find out `bytes`. */
bool progress_due(const progress *p, int64_t done, int64_t total);

/* Take the line off the screen. */
void progress_clear(progress *p);

/* Write the line that progress_update would draw into out, at most `width` columns. */
void progress_format(char *out, int cap, const progress *p, int64_t done, int64_t total, int width);

/* Seconds on a clock that only goes forward. */
double clock_s(void);

#endif
