/* file_map.c - see file_map.h. A regular file that another process truncates while it is mapped
 * raises SIGBUS in any program that maps it; kvfold.h asks that the file does not change.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "base/file_map.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static kvf_status fail_errno(kvf_error *err, const char *what, const char *path)
{
    char text[128];
    const char *reason = strerror_r(errno, text, sizeof text);
    return kvf_fail(err, KVF_ERR_IO, "cannot %s '%s': %s", what, path, reason);
}

kvf_status kvf_file_map_open(kvf_file_map *out, const char *path, kvf_error *err)
{
    out->data = NULL;
    out->bytes = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail_errno(err, "open", path);
    struct stat st;
    kvf_status rc = KVF_OK;
    if (fstat(fd, &st) != 0) {
        rc = fail_errno(err, "examine", path);
    } else if (!S_ISREG(st.st_mode)) {
        rc = kvf_fail(err, KVF_ERR_IO, "cannot map '%s': it is not a regular file", path);
    } else if (st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) {
            rc = fail_errno(err, "map", path);
        } else {
            out->data = p;
            out->bytes = (size_t)st.st_size;
        }
    }
    close(fd);
    return rc;
}

void kvf_file_map_close(kvf_file_map *m)
{
    if (m->data) munmap((void *)(uintptr_t)m->data, m->bytes);
    m->data = NULL;
    m->bytes = 0;
}
