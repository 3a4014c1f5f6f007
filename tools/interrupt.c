/* interrupt.c - see interrupt.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "interrupt.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <unistd.h>

#include "report.h"

static atomic_int seen;
static _Atomic(kvf_session *) running;

/* What a signal shall remove: files after the folder that they are in. */
enum { MAX_REMOVE = 8 };
static char remove_path[MAX_REMOVE][4096];
static atomic_int n_remove;

static void on_signal(int sig)
{
    (void)sig;
    int saved = errno;
    kvf_session *s = atomic_load(&running);
    if (!s || atomic_fetch_add(&seen, 1) > 0) {
        static const char text[] = "\nkvfold: interrupted\n";
        ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);
        (void)n;
        for (int i = atomic_load(&n_remove); i > 0; i--)
            if (unlink(remove_path[i - 1]) != 0) rmdir(remove_path[i - 1]);
        _exit(EXIT_INTERRUPTED);
    }
    kvf_session_cancel(s);
    errno = saved;
}

void interrupt_install(void)
{
    struct sigaction action = { .sa_handler = on_signal };
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

void interrupt_remove(const char *path)
{
    int n = atomic_load(&n_remove);
    if (path && n == MAX_REMOVE) return;
    if (path) snprintf(remove_path[n], sizeof remove_path[n], "%s", path);
    atomic_store(&n_remove, path ? n + 1 : 0);
}

void interrupt_attach(kvf_session *session) { atomic_store(&running, session); }
bool interrupt_seen(void) { return atomic_load(&seen) > 0; }
void interrupt_clear(void) { atomic_store(&seen, 0); }
