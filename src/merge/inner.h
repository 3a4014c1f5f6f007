/* inner.h - kvf_merge_inner_run and kvf_merge_pool_run with what they need of a ctx.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_INNER_H
#define KVF_MERGE_INNER_H

#include "merge/tensor.h"

kvf_status kvf_merge_inner_env(const kvf_merge_env *env, kvf_merge_inner *a, kvf_error *err);
kvf_status kvf_merge_pool_env(const kvf_merge_env *env, kvf_merge_pool *a, kvf_error *err);

#endif
