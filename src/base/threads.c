/* threads.c - see threads.h.
 *
 * A run is published by raising `round` after its fields are set. A worker that sees a new round
 * takes indices until they run out and then raises `finished`; the caller waits until all workers
 * have, so fields of the next run are never written under a worker still reading the last.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

/* About 20 us of pause instructions: longer than the serial code between two ops of a layer,
 * far shorter than a scheduling quantum. With more threads than cores spinning hurts, but the
 * default never makes more. */
enum { SPIN = 2000 };

typedef struct worker {
    kvf_threads *pool;
    int32_t index;
    pthread_t thread;
} worker;

struct kvf_threads {
    const kvf_mem *mem;
    int32_t n;
    int32_t n_started; /* workers that exist, n - 1 after a successful open */
    worker *workers;   /* [n - 1] */

    pthread_mutex_t turn;  /* held by the caller of kvf_threads_run */
    pthread_mutex_t sleep; /* with wake: workers that gave up spinning */
    pthread_cond_t wake;

    kvf_task_fn fn;
    void *arg;
    int64_t n_task;
    _Alignas(64) _Atomic int64_t next;
    _Alignas(64) _Atomic uint64_t round;
    _Alignas(64) _Atomic int32_t finished;
    _Atomic int32_t n_sleeping;
    _Atomic int stop;
};

static inline void pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void take_tasks(kvf_threads *t, int32_t index)
{
    kvf_task_fn fn = t->fn;
    void *arg = t->arg;
    int64_t n = t->n_task;
    for (;;) {
        int64_t i = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
        if (i >= n) return;
        fn(arg, i, index);
    }
}

static void wait_for_round(kvf_threads *t, uint64_t seen)
{
    for (int i = 0; i < SPIN; i++) {
        if (atomic_load_explicit(&t->round, memory_order_acquire) != seen) return;
        pause_cpu();
    }
    pthread_mutex_lock(&t->sleep);
    atomic_fetch_add(&t->n_sleeping, 1);
    while (atomic_load(&t->round) == seen) pthread_cond_wait(&t->wake, &t->sleep);
    atomic_fetch_sub(&t->n_sleeping, 1);
    pthread_mutex_unlock(&t->sleep);
}

static void *worker_main(void *arg)
{
    worker *w = arg;
    kvf_threads *t = w->pool;
    uint64_t seen = 0;
    for (;;) {
        wait_for_round(t, seen);
        seen++;
        if (atomic_load(&t->stop)) return NULL;
        take_tasks(t, w->index);
        atomic_fetch_add_explicit(&t->finished, 1, memory_order_release);
    }
}

static void publish_round(kvf_threads *t)
{
    atomic_fetch_add(&t->round, 1);
    if (atomic_load(&t->n_sleeping) > 0) {
        pthread_mutex_lock(&t->sleep);
        pthread_cond_broadcast(&t->wake);
        pthread_mutex_unlock(&t->sleep);
    }
}

void kvf_threads_run(kvf_threads *t, int64_t n, kvf_task_fn fn, void *arg)
{
    if (n <= 0) return;
    if (t->n_started == 0 || n == 1) {
        for (int64_t i = 0; i < n; i++) fn(arg, i, 0);
        return;
    }
    pthread_mutex_lock(&t->turn);
    t->fn = fn;
    t->arg = arg;
    t->n_task = n;
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    atomic_store_explicit(&t->finished, 0, memory_order_relaxed);
    publish_round(t);
    take_tasks(t, 0);
    for (int i = 0; atomic_load_explicit(&t->finished, memory_order_acquire) < t->n_started; i++) {
        /* A worker may have lost its core: after a while let the system run it. */
        if (i < SPIN) pause_cpu();
        else sched_yield();
    }
    pthread_mutex_unlock(&t->turn);
}

kvf_status kvf_threads_open(kvf_threads **out, int32_t n_threads, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_threads), err));
    kvf_threads *t = block;
    t->mem = mem;
    t->n = n_threads;
    kvf_status rc = kvf_mem_get(mem, &block, (size_t)n_threads, sizeof(worker), err);
    if (rc < 0) {
        kvf_free(mem, t);
        return rc;
    }
    t->workers = block;
    pthread_mutex_init(&t->turn, NULL);
    pthread_mutex_init(&t->sleep, NULL);
    pthread_cond_init(&t->wake, NULL);
    for (int32_t i = 0; i < n_threads - 1; i++) {
        worker *w = &t->workers[i];
        w->pool = t;
        w->index = i + 1;
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) {
            kvf_threads_close(t);
            return kvf_fail(err, KVF_ERR_NOMEM, "the system refused thread %d of %d; use fewer threads",
                            i + 1, n_threads - 1);
        }
        t->n_started++;
    }
    *out = t;
    return KVF_OK;
}

void kvf_threads_close(kvf_threads *t)
{
    if (!t) return;
    atomic_store(&t->stop, 1);
    publish_round(t);
    for (int32_t i = 0; i < t->n_started; i++) pthread_join(t->workers[i].thread, NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->sleep);
    pthread_mutex_destroy(&t->turn);
    kvf_free(t->mem, t->workers);
    kvf_free(t->mem, t);
}

int32_t kvf_threads_count(const kvf_threads *t) { return t->n; }
