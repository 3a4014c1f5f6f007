/* mamba.h - kvf_mamba_open and kvf_mamba_open_tensors with what they need of a ctx.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_MAMBA_H
#define KVF_MERGE_MAMBA_H

#include "merge/tensor.h"

kvf_status kvf_mamba_open_env(kvf_mamba **out, const kvf_merge_env *env, const kvf_mamba_params *p, kvf_error *err);
kvf_status kvf_mamba_open_named(kvf_mamba **out, const kvf_merge_env *env, const kvf_mamba_tensor *t, int64_t n,
                                float norm_eps, kvf_error *err);

/* Weights that go with the handle: memory of its env. */
void kvf_mamba_own(kvf_mamba *m, float *weights);

#endif
