/* dtype.c - see dtype.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/dtype.h"

static const kvf_dtype_info types[KVF_DTYPE_LIMIT] = {
    [KVF_DTYPE_F32] = { "F32", 1, 4 },      [KVF_DTYPE_F16] = { "F16", 1, 2 },
    [KVF_DTYPE_BF16] = { "BF16", 1, 2 },    [KVF_DTYPE_Q4_0] = { "Q4_0", 32, 18 },
    [KVF_DTYPE_Q4_1] = { "Q4_1", 32, 20 },  [KVF_DTYPE_Q5_0] = { "Q5_0", 32, 22 },
    [KVF_DTYPE_Q5_1] = { "Q5_1", 32, 24 },  [KVF_DTYPE_Q8_0] = { "Q8_0", 32, 34 },
    [KVF_DTYPE_Q4_K] = { "Q4_K", 256, 144 }, [KVF_DTYPE_Q5_K] = { "Q5_K", 256, 176 },
    [KVF_DTYPE_Q6_K] = { "Q6_K", 256, 210 },
};

const kvf_dtype_info *kvf_dtype_get(uint32_t type)
{
    return type < KVF_DTYPE_LIMIT && types[type].name ? &types[type] : NULL;
}
