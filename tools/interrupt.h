/* interrupt.h - Ctrl-C and SIGTERM.
 *
 * The first signal asks the session that runs to stop after its chunk; the command then cleans up
 * and exits with 130. When no session runs, the program ends at once. The second signal always
 * does. SIGPIPE keeps its default: "kvfold ... | head" ends quietly.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_INTERRUPT_H
#define KVFOLD_TOOLS_INTERRUPT_H

#include <stdbool.h>

#include <kvfold/kvfold.h>

void interrupt_install(void);

/* The session that a signal shall stop; NULL: none, a signal ends the program. */
void interrupt_attach(kvf_session *session);

/* A signal has come since the last interrupt_clear(). */
bool interrupt_seen(void);

/* A file or folder to remove when a signal ends the program at once; at most 8, in this order last to
 * first. NULL: forget all. */
void interrupt_remove(const char *path);

/* Forget it: an interactive command goes on with the next question. */
void interrupt_clear(void);

#endif
