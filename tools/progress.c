/* progress.c - see progress.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "progress.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "report.h"

/* Fewer tokens than this are read before a line could be. */
#define MIN_TOKENS 64

double clock_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int columns(void)
{
    struct winsize w;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col >= 20) return w.ws_col;
    return 80;
}

void progress_start(progress *p, const char *label, bool quiet)
{
    *p = (progress){ .label = label, .unit = "tokens", .on = !quiet && report_is_terminal(stderr), .start_s = clock_s() };
}

void progress_format(char *out, int cap, const progress *p, int64_t done, int64_t total, int width)
{
    char a[32], b[32], disk[32], text[200];
    double elapsed = p->last_s - (p->timed ? p->first_s : p->start_s);
    double rate = elapsed > 0 ? (double)(done - p->first) / elapsed : 0;
    int n = snprintf(text, sizeof text, " %3d%%  %s/%s %s", total > 0 ? (int)(done * 100 / total) : 0,
                     report_count(a, done), report_count(b, total), p->unit ? p->unit : "tokens");
    if (p->bytes > 0 && n > 0)
        n += snprintf(text + n, sizeof text - (size_t)n, "  %s", report_bytes(disk, (double)p->bytes));
    if (done > p->first && n > 0 && n < (int)sizeof text) {
        double wait = rate > 0 ? (double)(total - done) / rate + 0.5 : 0;
        int left = wait < 359999 ? (int)wait : 359999; /* 99 hours, 59 minutes */
        if (left >= 3600)
            snprintf(text + n, sizeof text - (size_t)n, "  %.0f/s  ETA %d:%02d:%02d", rate, left / 3600,
                     left / 60 % 60, left % 60);
        else
            snprintf(text + n, sizeof text - (size_t)n, "  %.0f/s  ETA %d:%02d", rate, left / 60, left % 60);
    }
    int bar = width - 1 - (int)strlen(p->label) - 3 - (int)strlen(text);
    if (bar > 40) bar = 40;
    if (bar < 5) {
        snprintf(out, (size_t)cap, "%.*s", width - 1, text + 1);
        return;
    }
    int full = total > 0 ? (int)((double)bar * (double)done / (double)total) : 0;
    snprintf(out, (size_t)cap, "%s [%.*s%*s]%s", p->label, full, "########################################",
             bar - full, "", text);
}

bool progress_due(const progress *p, int64_t done, int64_t total)
{
    return p->on && total >= MIN_TOKENS && (!p->drawn || clock_s() - p->last_s >= 0.1 || done >= total);
}

void progress_update(progress *p, int64_t done, int64_t total)
{
    if (!p->timed) {
        p->timed = true;
        p->first = done;
        p->first_s = clock_s();
    }
    if (!progress_due(p, done, total)) return;
    p->last_s = clock_s();
    char line[256];
    int width = columns();
    progress_format(line, sizeof line, p, done, total, width < 200 ? width : 200);
    fprintf(stderr, "\r%s\033[K", line);
    fflush(stderr);
    p->drawn = true;
}

void progress_clear(progress *p)
{
    if (!p->drawn) return;
    fputs("\r\033[K", stderr);
    fflush(stderr);
    p->drawn = false;
}
