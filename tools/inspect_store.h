/* inspect_store.h - kvfold inspect DIR: what is in a store.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_INSPECT_STORE_H
#define KVFOLD_TOOLS_INSPECT_STORE_H

#include <stdbool.h>

/* Print the store in `path`; verify: read and check all of it. Returns the exit code, EXIT_USAGE if it is
 * damaged. */
int inspect_store(const char *path, bool verify, bool json, bool quiet);

#endif
