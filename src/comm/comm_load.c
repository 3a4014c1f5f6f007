/* comm_load.c - opens the module of MPI, see comm.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "comm/comm.h"

#define MODULE "libkvfold_mpi.so"

kvf_status kvf_comm_mpi_open(kvf_comm **out, const char *folder, const kvf_mem *mem, kvf_error *err)
{
    char path[4096];
    *out = NULL;
    int n = folder ? snprintf(path, sizeof path, "%s/" MODULE, folder) : snprintf(path, sizeof path, MODULE);
    if (n < 0 || (size_t)n >= sizeof path) return kvf_fail(err, KVF_ERR_ARG, "the folder of " MODULE " has too long a name");
    /* MPI's own plugins look for its symbols among the global ones. NODELETE: its threads stay. */
    void *module = dlopen(path, RTLD_NOW | RTLD_GLOBAL | RTLD_NODELETE);
    if (!module) {
        const char *why = dlerror();
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, MODULE " cannot be loaded (%s); build kvfold where there is MPI (libopenmpi-dev)",
                        why ? why : "no reason given");
    }
    void *found = dlsym(module, KVF_COMM_MODULE_ENTRY);
    kvf_comm_module_fn entry = NULL;
    if (found) memcpy(&entry, &found, sizeof entry); /* C has no cast from an object to a function */
    dlclose(module);
    const kvf_comm_module *m = entry ? entry() : NULL;
    if (!m || m->abi != KVF_COMM_ABI)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "the " MODULE " found belongs to another release of kvfold; install the two together");
    return m->open(out, mem, err);
}
