/* error.c - see error.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/error.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* Names from files end up in messages, and messages on terminals: control bytes and anything that is
 * not whole UTF-8 become '?'. */
static void make_printable(char *text)
{
    for (unsigned char *p = (unsigned char *)text; *p;) {
        int more = *p < 0x80 ? 0 : (*p & 0xe0) == 0xc0 ? 1 : (*p & 0xf0) == 0xe0 ? 2 : (*p & 0xf8) == 0xf0 ? 3 : -1;
        bool ok = more >= 0 && *p >= 0x20 && *p != 0x7f;
        for (int i = 1; ok && i <= more; i++) ok = (p[i] & 0xc0) == 0x80;
        if (ok && more == 1) ok = *p > 0xc1 && !(*p == 0xc2 && p[1] < 0xa0); /* overlong, C1 controls */
        if (!ok) *p = '?';
        p += ok ? more + 1 : 1;
    }
}

kvf_status kvf_fail(kvf_error *err, kvf_status code, const char *format, ...)
{
    if (!err) return code;
    err->code = code;
    va_list ap;
    va_start(ap, format);
    vsnprintf(err->msg, sizeof err->msg, format, ap);
    va_end(ap);
    make_printable(err->msg);
    return code;
}

void kvf_error_prefix(kvf_error *err, const char *format, ...)
{
    if (!err) return;
    char head[sizeof err->msg], tail[sizeof err->msg];
    va_list ap;
    va_start(ap, format);
    /* The cause comes last and must be seen: a long path is cut, not the cause. */
    vsnprintf(head, sizeof head / 2, format, ap);
    va_end(ap);
    make_printable(head);
    memcpy(tail, err->msg, sizeof tail);
    size_t n = strlen(head), room = sizeof err->msg - 1 - n, m = strlen(tail);
    if (m > room) m = room;
    memcpy(err->msg, head, n);
    memcpy(err->msg + n, tail, m);
    err->msg[n + m] = 0;
}

const char *kvf_status_name(kvf_status status)
{
    switch (status) {
    case KVF_OK: return "KVF_OK";
    case KVF_DONE: return "KVF_DONE";
    case KVF_ERR_ARG: return "KVF_ERR_ARG";
    case KVF_ERR_NOMEM: return "KVF_ERR_NOMEM";
    case KVF_ERR_IO: return "KVF_ERR_IO";
    case KVF_ERR_FORMAT: return "KVF_ERR_FORMAT";
    case KVF_ERR_UNSUPPORTED: return "KVF_ERR_UNSUPPORTED";
    case KVF_ERR_NOT_FOUND: return "KVF_ERR_NOT_FOUND";
    case KVF_ERR_LIMIT: return "KVF_ERR_LIMIT";
    case KVF_ERR_CANCELLED: return "KVF_ERR_CANCELLED";
    case KVF_ERR_STATE: return "KVF_ERR_STATE";
    case KVF_ERR_INTERNAL: return "KVF_ERR_INTERNAL";
    case KVF_ERR_BUSY: return "KVF_ERR_BUSY";
    case KVF_ERR_MISMATCH: return "KVF_ERR_MISMATCH";
    case KVF_ERR_SPACE: return "KVF_ERR_SPACE";
    }
    return "unknown status";
}
