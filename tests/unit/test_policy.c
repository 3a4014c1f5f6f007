/* test_policy.c - specs, options and registry of the policies.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <string.h>

#include "policy/policy.h"

static const kvf_dims dims = { 2, 4, 2, 16 };

static kvf_status try_spec(const char *spec, kvf_error *err)
{
    kvf_policy *p;
    kvf_status rc = kvf_policy_open(&p, spec, dims, &kvf_mem_default, err);
    cr_assert(rc == KVF_OK || p == NULL);
    kvf_policy_close(p);
    return rc;
}

Test(policy, unknown_name_lists_those_there_are)
{
    kvf_error err;
    cr_assert_eq(try_spec("snapkv", &err), KVF_ERR_NOT_FOUND);
    cr_assert(strstr(err.msg, "full") && strstr(err.msg, "window") && strstr(err.msg, "infllm"));
    cr_assert_eq(try_spec("", &err), KVF_ERR_NOT_FOUND);
    cr_assert_eq(try_spec("windo", &err), KVF_ERR_NOT_FOUND);
    cr_assert_eq(try_spec("window2", &err), KVF_ERR_NOT_FOUND);
}

Test(policy, bad_options_name_the_option_and_the_range)
{
    static const char *const bad[] = { "window:sink=-1", "window:window=0", "window:window=99999999999999999999",
                                       "window:window=1.5", "window:window=", "window:window", "window:sink=1,",
                                       "window:foo=1", "full:keep=1", "window:window=1e3", "window:window=0x10" };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        kvf_error err = { 0 };
        cr_assert_eq(try_spec(bad[i], &err), KVF_ERR_ARG, "%s", bad[i]);
        cr_assert_gt(strlen(err.msg), 10);
    }
    kvf_error err;
    cr_assert_eq(try_spec("window:foo=1", &err), KVF_ERR_ARG);
    cr_assert(strstr(err.msg, "sink, window"), "%s", err.msg);
}

Test(policy, print_spells_out_every_option)
{
    kvf_policy *p;
    char text[64];
    cr_assert_eq(kvf_policy_open(&p, "window:window=512", dims, &kvf_mem_default, NULL), KVF_OK);
    kvf_policy_print(p, text, sizeof text);
    cr_assert_str_eq(text, "window:sink=128,window=512");
    kvf_policy_print(p, text, 9);
    cr_assert_str_eq(text, "window:s");
    kvf_policy_close(p);
    cr_assert_eq(try_spec(text, NULL), KVF_ERR_ARG);
}

Test(policy, every_registered_policy_opens_with_its_defaults)
{
    int64_t n = 0;
    for (const kvf_policy_ops *ops; (ops = kvf_policy_at(n)) != NULL; n++) {
        cr_assert_eq(ops->abi, KVF_POLICY_ABI);
        cr_assert_eq(try_spec(ops->name, NULL), KVF_OK, "%s", ops->name);
        cr_assert_gt(strlen(ops->help), 0);
        cr_assert(!ops->memory || (ops->retrieve && ops->identity), "%s: a memory needs both", ops->name);
    }
    cr_assert_geq(n, 3);
}

/* Against the definition, for every size around the block edges. */
Test(policy, window_uses_sinks_and_what_the_first_query_sees)
{
    kvf_policy *p;
    cr_assert_eq(kvf_policy_open(&p, "window:sink=130,window=300", dims, &kvf_mem_default, NULL), KVF_OK);
    for (int64_t past = 0; past < 1500; past += 61) {
        for (int64_t n = 1; n < 600; n += 97) {
            uint8_t use[32];
            memset(use, 7, sizeof use);
            kvf_select s = { 0, past, n, (past + n + 127) / 128 };
            cr_assert_eq(p->ops->select(p, &s, use, NULL), KVF_OK);
            for (int64_t b = 0; b < s.n_block; b++) {
                bool want = false;
                for (int64_t t = b * 128; t < (b + 1) * 128; t++)
                    if (t < 130 || t > past - 300) want = true;
                cr_assert_eq(use[b], want, "past %lld n %lld block %lld", (long long)past, (long long)n, (long long)b);
            }
        }
    }
    kvf_policy_close(p);
}
