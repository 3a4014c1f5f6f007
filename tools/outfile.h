/* outfile.h - a file that appears whole or not at all.
 *
 * It is written under another name beside its place and renamed at the end. A failed write is remembered
 * and told once, by outfile_commit; until then, and after a signal, nothing is under the real name.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_OUTFILE_H
#define KVFOLD_TOOLS_OUTFILE_H

#include <stddef.h>
#include <stdio.h>

#include <kvfold/kvfold.h>

typedef struct outfile {
    FILE *f;
    char *path, *partial; /* owned */
    int why;              /* errno of the first failed write; 0: none */
} outfile;

/* Open for writing. Errors: IO (names the cause), NOMEM. On failure nothing needs closing. */
kvf_status outfile_open(outfile *o, const char *path, kvf_error *err);

void outfile_write(outfile *o, const void *bytes, size_t n);

/* Put the file in its place and close; on failure it is removed. Errors: IO, SPACE. */
kvf_status outfile_commit(outfile *o, kvf_error *err);

/* Remove what was written and close; harmless after outfile_commit and on a zeroed struct. */
void outfile_drop(outfile *o);

#endif
