/* report.c - see report.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "report.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "utf8.h"

kvf_status report_fail(kvf_error *err, kvf_status code, const char *format, ...)
{
    if (!err) return code;
    err->code = code;
    va_list args;
    va_start(args, format);
    vsnprintf(err->msg, sizeof err->msg, format, args);
    va_end(args);
    return code;
}

static void print_line(const char *mark, const char *format, va_list args)
{
    char line[2048];
    vsnprintf(line, sizeof line, format, args);
    buffer clean = { 0 };
    utf8_add_clean(&clean, line, strlen(line), UTF8_NO_CONTROLS);
    bool colour = report_colour(stderr) && *mark;
    fprintf(stderr, "%s%skvfold:%s %s\n", colour ? "\033[" : "", colour ? mark : "", colour ? "\033[0m" : "",
            buffer_text(&clean));
    buffer_free(&clean);
}

void report_error(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_line("1;31m", format, args);
    va_end(args);
}

void report_note(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_line("", format, args);
    va_end(args);
}

int report_exit_code(kvf_status status)
{
    switch (status) {
    case KVF_OK:
    case KVF_DONE: return EXIT_OK;
    case KVF_ERR_ARG:
    case KVF_ERR_IO:
    case KVF_ERR_FORMAT:
    case KVF_ERR_UNSUPPORTED:
    case KVF_ERR_NOT_FOUND:
    case KVF_ERR_LIMIT:
    case KVF_ERR_STATE: /* of a store: a name that is taken, a document not read to its end */
    case KVF_ERR_MISMATCH: return EXIT_USAGE;
    case KVF_ERR_CANCELLED: return EXIT_INTERRUPTED;
    default: return EXIT_FAILED;
    }
}

int report_status(const kvf_error *err)
{
    if (err->code == KVF_ERR_CANCELLED)
        report_note("interrupted");
    else
        report_error("%s", err->msg[0] ? err->msg : "Failed without a description; please report it.");
    return report_exit_code(err->code);
}

int report_flush(int code)
{
    errno = 0;
    if (fflush(stdout) == 0 && !ferror(stdout)) return code;
    /* A reader that went away ("| head") is not worth a message. */
    if (errno != EPIPE) report_error("Cannot write the output: %s.", errno ? strerror(errno) : "write error");
    return code == EXIT_OK ? EXIT_FAILED : code;
}

bool report_is_terminal(FILE *stream) { return isatty(fileno(stream)) == 1; }

bool report_colour(FILE *stream)
{
    const char *no = getenv("NO_COLOR"), *term = getenv("TERM");
    return !(no && *no) && !(term && strcmp(term, "dumb") == 0) && report_is_terminal(stream);
}

const char *report_count(char out[32], int64_t n)
{
    char digits[24];
    int len = snprintf(digits, sizeof digits, "%" PRId64, n);
    int k = 0;
    for (int i = 0; i < len && k < 30; i++) {
        if (i && (len - i) % 3 == 0 && digits[i - 1] != '-') out[k++] = ',';
        out[k++] = digits[i];
    }
    out[k] = '\0';
    return out;
}

const char *report_bytes(char out[32], double bytes)
{
    static const char *const unit[] = { "B", "KB", "MB", "GB", "TB" };
    int u = 0;
    while (bytes >= 999.5 && u < 4) {
        bytes /= 1000.0;
        u++;
    }
    snprintf(out, 32, u && bytes < 9.95 ? "%.1f %s" : "%.0f %s", bytes, unit[u]);
    return out;
}
