/* log.c - see log.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

void kvf_log_write(const kvf_log *log, kvf_log_level level, const char *format, ...)
{
    if (!log || !log->sink) return;
    char line[512];
    va_list ap;
    va_start(ap, format);
    vsnprintf(line, sizeof line, format, ap);
    va_end(ap);
    log->sink(log->user, level, line);
}
