/* interrupt.c - see interrupt.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "interrupt.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "report.h"

static atomic_int seen;
static _Atomic(kvf_session *) running;

static void on_signal(int sig)
{
    (void)sig;
    int saved = errno;
    kvf_session *s = atomic_load(&running);
    if (!s || atomic_fetch_add(&seen, 1) > 0) {
        static const char text[] = "\nkvfold: interrupted\n";
        ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);
        (void)n;
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

void interrupt_attach(kvf_session *session) { atomic_store(&running, session); }
bool interrupt_seen(void) { return atomic_load(&seen) > 0; }
void interrupt_clear(void) { atomic_store(&seen, 0); }
