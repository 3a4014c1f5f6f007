/* error.c - see error.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

kvf_status kvf_fail(kvf_error *err, kvf_status code, const char *format, ...)
{
    if (!err) return code;
    err->code = code;
    va_list ap;
    va_start(ap, format);
    vsnprintf(err->msg, sizeof err->msg, format, ap);
    va_end(ap);
    return code;
}

void kvf_error_prefix(kvf_error *err, const char *format, ...)
{
    if (!err) return;
    char head[sizeof err->msg], tail[sizeof err->msg];
    va_list ap;
    va_start(ap, format);
    vsnprintf(head, sizeof head, format, ap);
    va_end(ap);
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
    }
    return "unknown status";
}
