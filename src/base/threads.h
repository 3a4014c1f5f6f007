/* threads.h - the one thread pool: workers that take ranges of an index space.
 *
 * kvf_threads_run(pool, n, fn, arg) calls fn(arg, i, worker) once for every 0 <= i < n and returns
 * when all are done. Indices are handed out one by one from an atomic counter, so tasks of uneven
 * size balance; make them large enough (10 us and up). The caller works too, as worker 0.
 * Workers spin a little after a task, since the next op of a layer follows in microseconds, then
 * sleep on a condition variable. One run at a time: concurrent callers take turns on a lock.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_THREADS_H
#define KVF_BASE_THREADS_H

#include "base/mem.h"

typedef struct kvf_threads kvf_threads;
typedef void (*kvf_task_fn)(void *arg, int64_t i, int32_t worker);

/* n_threads >= 1, the caller's included. Errors: NOMEM. */
kvf_status kvf_threads_open(kvf_threads **out, int32_t n_threads, const kvf_mem *mem, kvf_error *err);
void kvf_threads_close(kvf_threads *t);
int32_t kvf_threads_count(const kvf_threads *t);
void kvf_threads_run(kvf_threads *t, int64_t n, kvf_task_fn fn, void *arg);

#endif
