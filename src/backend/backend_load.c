/* backend_load.c - see backend_load.h.
 *
 * The driver is asked for first: without it the module could load, map half a gigabyte of its libraries
 * for nothing, and then say the same.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* dladdr: POSIX since 2024 */
#include "backend/backend_load.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#define DRIVER "libcuda.so.1"

static bool has_driver(void)
{
    void *driver = dlopen(DRIVER, RTLD_LAZY | RTLD_LOCAL);
    if (!driver) return false;
    dlclose(driver);
    return true;
}

static bool plain_name(const char *name)
{
    size_t n = strlen(name);
    if (n < 1 || n > 32) return false;
    for (size_t i = 0; i < n; i++)
        if (!((name[i] >= 'a' && name[i] <= 'z') || name[i] == '_')) return false;
    return true;
}

/* folder/file; folder without its last '/', or up to it. */
static void *open_in(const char *folder, size_t n, const char *file)
{
    char path[4096];
    int w = snprintf(path, sizeof path, "%.*s/%s", (int)n, folder, file);
    if (n > sizeof path || w < 0 || (size_t)w >= sizeof path) return NULL;
    return dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
}

/* NODELETE: a driver's threads do not survive an unloading. */
static void *open_module(const char *folder, const char *file)
{
    Dl_info here;
    if (folder) return open_in(folder, strlen(folder), file);
    if (dladdr(__extension__(const void *) kvf_backend_load, &here) && here.dli_fname) {
        const char *slash = strrchr(here.dli_fname, '/');
        void *module = slash ? open_in(here.dli_fname, (size_t)(slash - here.dli_fname), file) : NULL;
        if (module) return module;
    }
    return dlopen(file, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
}

kvf_status kvf_backend_load(const kvf_backend_module **out, const char *name, const char *folder, kvf_error *err)
{
    char file[64];
    *out = NULL;
    if (!plain_name(name)) return kvf_fail(err, KVF_ERR_ARG, "there is no device '%s'; devices are cpu and cuda", name);
    if (!has_driver())
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "device '%s': there is no " DRIVER ", which comes with the driver; install it, or use the CPU", name);
    snprintf(file, sizeof file, "libkvfold_%s.so", name);
    void *module = open_module(folder, file);
    if (!module) {
        const char *why = dlerror();
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "device '%s': %s cannot be loaded (%s); install it beside libkvfold", name,
                        file, why ? why : "no reason given");
    }
    void *found = dlsym(module, KVF_BACKEND_MODULE_ENTRY);
    kvf_backend_module_fn entry = NULL;
    if (found) memcpy(&entry, &found, sizeof entry); /* C has no cast from an object to a function */
    dlclose(module);
    const kvf_backend_module *m = entry ? entry() : NULL;
    if (!m || m->backend_abi != KVF_BACKEND_ABI)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "device '%s': the %s found belongs to another release of kvfold; install the two together", name, file);
    *out = m;
    return KVF_OK;
}

int32_t kvf_backend_probe(const char *name, const char *folder, char *out, size_t cap)
{
    const kvf_backend_module *m;
    kvf_error err = { 0 };
    if (kvf_backend_load(&m, name, folder, &err) >= 0) return m->probe(out, cap);
    snprintf(out, cap, "%s", err.msg);
    return 0;
}
