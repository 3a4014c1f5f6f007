/* doc_gzip.c - gzip-compressed documents, as Debian ships them in /usr/share/doc.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <limits.h>
#include <string.h>
#include <zlib.h>

#include "doc.h"
#include "report.h"

/* windowBits 15, plus 16: gzip header and CRC are checked. */
#define GZIP_WINDOW (15 + 16)

kvf_status doc_gunzip(buffer *out, const doc_bytes *in, kvf_error *err)
{
    z_stream z;
    memset(&z, 0, sizeof z);
    if (inflateInit2(&z, GZIP_WINDOW) != Z_OK)
        return report_fail(err, KVF_ERR_NOMEM, "Not enough memory to unpack '%s'.", in->name);
    unsigned char piece[32768];
    size_t used = 0; /* input handed over */
    int rc = Z_OK;
    /* Ends at the last member, at the first error, or when out is full. */
    while (!out->full && !out->failed) {
        if (!z.avail_in) {
            size_t n = in->n - used < UINT_MAX / 2 ? in->n - used : UINT_MAX / 2;
            z.next_in = (z_const Bytef *)(in->v + used);
            z.avail_in = (uInt)n;
            used += n;
        }
        z.next_out = piece;
        z.avail_out = sizeof piece;
        rc = inflate(&z, Z_NO_FLUSH);
        buffer_add(out, piece, sizeof piece - z.avail_out);
        if (rc == Z_STREAM_END) {
            /* More members may follow, each starting with the magic; other bytes are padding. */
            size_t rest = z.avail_in + (in->n - used);
            if (rest < 18 || (z.avail_in && z.next_in[0] != 0x1f)) break;
            if (inflateReset(&z) != Z_OK) break;
        } else if (rc != Z_OK) {
            break;
        }
    }
    inflateEnd(&z);
    kvf_status status = buffer_status(out, in->name, err);
    if (status != KVF_OK) return status;
    if (rc == Z_BUF_ERROR)
        return report_fail(err, KVF_ERR_FORMAT, "'%s' is cut off: its gzip data has no end; copy it again.",
                           in->name);
    if (rc != Z_STREAM_END)
        return report_fail(err, KVF_ERR_FORMAT, "'%s' is damaged: its gzip data cannot be unpacked.",
                           in->name);
    return KVF_OK;
}
