/* buffer.c - see buffer.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "buffer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "report.h"

/* Make room for n more bytes and a NUL; false if there is none. */
static bool reserve(buffer *b, size_t n)
{
    if (b->failed || n > SIZE_MAX / 4 || b->n > SIZE_MAX / 4) {
        b->failed = true;
        return false;
    }
    size_t need = b->n + n + 1;
    if (need <= b->cap) return true;
    size_t cap = b->cap ? b->cap : 256;
    while (cap < need) cap += cap / 2;
    char *v = realloc(b->v, cap);
    if (!v) {
        b->failed = true;
        return false;
    }
    b->v = v;
    b->cap = cap;
    return true;
}

void buffer_add(buffer *b, const void *bytes, size_t n)
{
    if (b->max && n > b->max - b->n) {
        b->full = true;
        n = b->max - b->n;
    }
    if (!n || !reserve(b, n)) return;
    memcpy(b->v + b->n, bytes, n);
    b->n += n;
    b->v[b->n] = '\0';
}

void buffer_add_text(buffer *b, const char *text) { buffer_add(b, text, strlen(text)); }

void buffer_add_char(buffer *b, char c) { buffer_add(b, &c, 1); }

void buffer_printf(buffer *b, const char *format, ...)
{
    char line[1024];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n > 0) buffer_add(b, line, (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
}

void buffer_cut(buffer *b, size_t n)
{
    if (n >= b->n) return;
    b->n = n;
    b->v[n] = '\0';
}

void buffer_trim_end(buffer *b)
{
    size_t n = b->n;
    while (n && (b->v[n - 1] == ' ' || b->v[n - 1] == '\n' || b->v[n - 1] == '\t' || b->v[n - 1] == '\r'))
        n--;
    buffer_cut(b, n);
}

const char *buffer_text(const buffer *b) { return b->v ? b->v : ""; }

kvf_status buffer_status(const buffer *b, const char *what, kvf_error *err)
{
    if (b->failed) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for %s.", what);
    if (b->full)
        return report_fail(err, KVF_ERR_LIMIT, "%s is longer than %zu MiB, the most that is read; split it.",
                           what, b->max >> 20);
    return KVF_OK;
}

kvf_status buffer_read(buffer *b, int fd, const char *name, kvf_error *err)
{
    /* One byte past the limit is asked for, so that a file of exactly max bytes is not "full". */
    for (;;) {
        if (b->max && b->n == b->max) {
            char more;
            ssize_t n = read(fd, &more, 1);
            if (n > 0) b->full = true;
            return buffer_status(b, name, err);
        }
        size_t room = b->n < 65536 ? 65536 : b->n / 2;
        if (b->max && room > b->max - b->n) room = b->max - b->n;
        if (!reserve(b, room)) return buffer_status(b, name, err);
        ssize_t n = read(fd, b->v + b->n, room);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return report_fail(err, KVF_ERR_IO, "Cannot read %s: %s.", name, strerror(errno));
        b->n += (size_t)n;
        b->v[b->n] = '\0';
        if (n == 0) return KVF_OK;
    }
}

kvf_status buffer_read_file(buffer *b, const char *path, kvf_error *err)
{
    if (strcmp(path, "-") == 0) return buffer_read(b, STDIN_FILENO, "standard input", err);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return report_fail(err, KVF_ERR_IO, "Cannot open '%s': %s.", path, strerror(errno));
    struct stat st;
    kvf_status rc = KVF_OK;
    if (fstat(fd, &st) != 0)
        rc = report_fail(err, KVF_ERR_IO, "Cannot look at '%s': %s.", path, strerror(errno));
    else if (S_ISDIR(st.st_mode))
        rc = report_fail(err, KVF_ERR_ARG, "'%s' is a directory; name the files in it.", path);
    else
        rc = buffer_read(b, fd, path, err);
    close(fd);
    return rc;
}

void buffer_free(buffer *b)
{
    size_t max = b->max;
    free(b->v);
    *b = (buffer){ .max = max };
}
