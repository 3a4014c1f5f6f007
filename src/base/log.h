/* log.h - the ctx's log sink. NULL sinks are silent; the library itself prints nothing.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_LOG_H
#define KVF_BASE_LOG_H

#include "base/error.h"

typedef struct kvf_log {
    void (*sink)(void *user, kvf_log_level level, const char *text);
    void *user;
} kvf_log;

void kvf_log_write(const kvf_log *log, kvf_log_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
