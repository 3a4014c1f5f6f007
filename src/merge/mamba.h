/* mamba.h - kvf_mamba_open with what it needs of a ctx.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_MAMBA_H
#define KVF_MERGE_MAMBA_H

#include "merge/tensor.h"

kvf_status kvf_mamba_open_env(kvf_mamba **out, const kvf_merge_env *env, const kvf_mamba_params *p, kvf_error *err);

#endif
