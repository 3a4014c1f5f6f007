/* test_cuda_load.c - the module of the CUDA backend: found or not, with or without a driver, every way ends
 * in a status and one line that says why.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend_load.h"

static kvf_error err;

static bool one_line(const char *text) { return text[0] && !strchr(text, '\n'); }

static bool has_driver(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (driver) dlclose(driver);
    return driver != NULL;
}

Test(cuda_load, the_probe_says_in_one_line_what_there_is)
{
    char text[300];
    int32_t n = kvf_backend_probe("cuda", KVF_TEST_MODULE_DIR, text, sizeof text);
    cr_assert(one_line(text));
    if (!has_driver()) {
        cr_assert_eq(n, 0);
        cr_assert(strstr(text, "libcuda.so.1"), "%s", text);
    }
    cr_assert(n > 0 || !getenv("KVFOLD_REQUIRE_CUDA"), "%s", text);
}

Test(cuda_load, a_short_buffer_is_filled_and_ended)
{
    char text[8];
    memset(text, 'x', sizeof text);
    kvf_backend_probe("cuda", KVF_TEST_MODULE_DIR, text, sizeof text);
    cr_assert_lt(strlen(text), sizeof text);
}

Test(cuda_load, names_that_are_no_device_are_refused)
{
    const char *const names[] = { "", "Cuda", "../cuda", "cuda.so", "a_name_of_more_than_thirty_two_letters" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const kvf_backend_module *m = (const kvf_backend_module *)(const void *)&err;
        cr_assert_eq(kvf_backend_load(&m, names[i], NULL, &err), KVF_ERR_ARG);
        cr_assert_null(m);
    }
}

Test(cuda_load, a_module_that_is_not_there_is_unsupported)
{
    const kvf_backend_module *m;
    cr_assert_eq(kvf_backend_load(&m, "cuda", "/nonexistent", &err), KVF_ERR_UNSUPPORTED);
    cr_assert(one_line(err.msg));
    cr_assert_eq(kvf_backend_load(&m, "nosuch", NULL, &err), KVF_ERR_UNSUPPORTED);
    cr_assert(one_line(err.msg));
}

#ifdef KVF_HAVE_CUDA
/* As on a machine whose driver is too old: the module is there and the device is not. */
Test(cuda_load, the_module_alone_answers_without_a_device)
{
    void *module = dlopen(KVF_TEST_MODULE_DIR "/libkvfold_cuda.so", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    cr_assert_not_null(module, "%s", dlerror());
    void *found = dlsym(module, KVF_BACKEND_MODULE_ENTRY);
    cr_assert_not_null(found);
    kvf_backend_module_fn entry;
    memcpy(&entry, &found, sizeof entry);
    const kvf_backend_module *m = entry();
    cr_assert_eq(m->backend_abi, KVF_BACKEND_ABI);
    char text[300];
    int32_t n = m->probe(text, sizeof text);
    cr_assert(one_line(text));
    if (n > 0) return;
    cr_assert(strstr(text, "no CUDA device"), "%s", text);
    kvf_backend *b = (kvf_backend *)(void *)&err;
    kvf_device_params p = { .mem = &kvf_mem_default };
    cr_assert_eq(m->open(&b, &p, &err), KVF_ERR_UNSUPPORTED);
    cr_assert_null(b);
    cr_assert(one_line(err.msg));
}
#endif
