/* error.h - how a function inside the library fails.
 *
 * A failing function returns a negative kvf_status and, if the caller gave a kvf_error, fills it
 * with a sentence naming the cause and the cure:
 *
 *     if (n > max) return kvf_fail(err, KVF_ERR_LIMIT, "%lld tokens, at most %lld", ...);
 *     KVF_TRY(kvf_thing_open(&t, err));          // returns the status if it is negative
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_ERROR_H
#define KVF_BASE_ERROR_H

#include "kvfold/kvfold.h"

/* Fill *err (may be NULL) and return code. Never allocates; long messages are cut. */
kvf_status kvf_fail(kvf_error *err, kvf_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Put text in front of the message of an error already filled: "while reading 'x': ...". */
void kvf_error_prefix(kvf_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define KVF_TRY(expr)                                 \
    do {                                              \
        kvf_status kvf_try_status_ = (expr);          \
        if (kvf_try_status_ < 0) return kvf_try_status_; \
    } while (0)

#endif
