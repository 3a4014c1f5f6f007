/* faiss_none.c - kvf_faiss_open of a build without FAISS.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "memory/faiss_index.h"

kvf_status kvf_faiss_open(kvf_index **out, const char *kind, int32_t dim, const kvf_mem *mem, kvf_error *err)
{
    (void)dim;
    (void)mem;
    *out = NULL;
    return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                    "index '%s' needs FAISS, which this build lacks: install libfaiss-dev and configure with "
                    "-DKVF_FAISS=ON, or use the built-in digests",
                    kind);
}
