/* test_header.c - kvfold.h compiles alone, first, as strict C11, and means what the library means.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <kvfold/kvfold.h>
#include <kvfold/merge.h>
#include <kvfold/vision.h>

#include <criterion/criterion.h>

#include <stdio.h>

_Static_assert(sizeof(kvf_error) == 512, "a kvf_error is half a kilobyte");
_Static_assert(KVF_OK == 0 && KVF_DONE == 1 && KVF_ERR_ARG == -1 && KVF_ERR_NOMEM == -2 &&
                   KVF_ERR_IO == -3 && KVF_ERR_FORMAT == -4 && KVF_ERR_UNSUPPORTED == -5 &&
                   KVF_ERR_NOT_FOUND == -6 && KVF_ERR_LIMIT == -7 && KVF_ERR_CANCELLED == -8 &&
                   KVF_ERR_STATE == -9 && KVF_ERR_INTERNAL == -10,
               "status values are pinned");

Test(header, version_of_header_is_version_of_library)
{
    cr_assert_eq(kvf_version(), KVF_VERSION_NUMBER);
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", KVF_VERSION_MAJOR, KVF_VERSION_MINOR, KVF_VERSION_PATCH);
    cr_assert_str_eq(kvf_version_string(), text);
}

Test(header, close_functions_take_null)
{
    kvf_session_close(NULL);
    kvf_model_close(NULL);
    kvf_ctx_close(NULL);
}

Test(header, every_status_has_its_name)
{
    cr_assert_str_eq(kvf_status_name(KVF_OK), "KVF_OK");
    cr_assert_str_eq(kvf_status_name(KVF_ERR_INTERNAL), "KVF_ERR_INTERNAL");
    cr_assert_not_null(kvf_status_name((kvf_status)-999));
    cr_assert_not_null(kvf_status_name((kvf_status)999));
}
