/* outfile.c - see outfile.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "outfile.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "report.h"

static const char suffix[] = ".partial";

kvf_status outfile_open(outfile *o, const char *path, kvf_error *err)
{
    *o = (outfile){ 0 };
    size_t n = strlen(path);
    o->path = malloc(n + 1);
    o->partial = malloc(n + sizeof suffix);
    if (!o->path || !o->partial) {
        outfile_drop(o);
        return report_fail(err, KVF_ERR_NOMEM, "Not enough memory to write '%s'.", path);
    }
    memcpy(o->path, path, n + 1);
    memcpy(o->partial, path, n);
    memcpy(o->partial + n, suffix, sizeof suffix);
    o->f = fopen(o->partial, "wb");
    if (!o->f) {
        int why = errno;
        outfile_drop(o);
        return report_fail(err, KVF_ERR_IO, "Cannot write '%s': %s.", path, strerror(why));
    }
    return KVF_OK;
}

void outfile_write(outfile *o, const void *bytes, size_t n)
{
    if (o->why || !n || fwrite(bytes, 1, n, o->f) == n) return;
    o->why = errno ? errno : EIO;
}

kvf_status outfile_commit(outfile *o, kvf_error *err)
{
    if (fclose(o->f) != 0 && !o->why) o->why = errno ? errno : EIO;
    o->f = NULL;
    if (!o->why && rename(o->partial, o->path) != 0) o->why = errno;
    kvf_status rc = KVF_OK;
    if (o->why == ENOSPC)
        rc = report_fail(err, KVF_ERR_SPACE, "'%s' is not written: the disk is full.", o->path);
    else if (o->why)
        rc = report_fail(err, KVF_ERR_IO, "Cannot write '%s': %s.", o->path, strerror(o->why));
    if (rc == KVF_OK) { /* nothing is left under the partial name */
        free(o->partial);
        o->partial = NULL;
    }
    outfile_drop(o);
    return rc;
}

void outfile_drop(outfile *o)
{
    if (o->f) fclose(o->f);
    /* Only a file that this struct opened is removed: f is set, or commit has just closed it. */
    if (o->partial && (o->f || o->why)) unlink(o->partial);
    free(o->path);
    free(o->partial);
    *o = (outfile){ 0 };
}
