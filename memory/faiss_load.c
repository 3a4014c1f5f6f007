/* faiss_load.c - kvf_faiss_open of a build with FAISS: loads the module libkvfold_faiss on first use.
 *
 * FAISS brings BLAS, LAPACK, OpenMP and a thread of OpenBLAS. Linked into libkvfold that made
 * `kvfold --version` need 12.8 ms of processor time instead of 7.6 and 4.6 MB more, for an index that
 * few ask for (docs/methods/index.md). The module exports one function, whose name changes when
 * kv/index.h does, so that a module of another release is refused and not misread.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* dladdr: POSIX since 2024 */
#include "memory/faiss_index.h"

#include <dlfcn.h>
#include <string.h>

#define MODULE "libkvfold_faiss.so"

/* Beside the object that holds this function, which is the library, or a program that links the
 * archive; then where the loader looks. A bare program name (found by PATH) has no folder to try.
 * NODELETE: threads of BLAS and OpenMP do not survive an unloading. */
static void *open_module(void)
{
    Dl_info here;
    char path[4096];
    int how = RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE;
    if (dladdr(__extension__(const void *) kvf_faiss_open, &here) && here.dli_fname) {
        const char *slash = strrchr(here.dli_fname, '/');
        size_t n = slash ? (size_t)(slash - here.dli_fname) + 1 : 0;
        if (n > 0 && n + sizeof MODULE <= sizeof path) {
            memcpy(path, here.dli_fname, n);
            memcpy(path + n, MODULE, sizeof MODULE);
            void *module = dlopen(path, how);
            if (module) return module;
        }
    }
    return dlopen(MODULE, how);
}

kvf_status kvf_faiss_open(kvf_index **out, const char *kind, int32_t dim, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    void *module = open_module();
    if (!module) {
        const char *why = dlerror();
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "index '%s' needs FAISS, and " MODULE " cannot be loaded (%s); install it beside libkvfold, "
                        "with FAISS's BLAS and OpenMP, or use the built-in digests",
                        kind, why ? why : "no reason given");
    }
    void *found = dlsym(module, KVF_FAISS_MODULE_OPEN);
    kvf_index_open_fn open = NULL;
    if (found) memcpy(&open, &found, sizeof open); /* C has no cast from an object to a function */
    dlclose(module);
    if (open) return open(out, kind, dim, mem, err);
    return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                    "index '%s': the " MODULE " found belongs to another release of kvfold; install the two together",
                    kind);
}
