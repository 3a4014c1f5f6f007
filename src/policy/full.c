/* full.c - attention over everything; nothing is dropped. The yardstick of all others: a policy
 * that happens to keep everything must give the same bits.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "policy/policy.h"

const kvf_policy_ops kvf_policy_full = {
    .abi = KVF_POLICY_ABI, .name = "full", .source = "", .help = "full attention, nothing is dropped",
};
