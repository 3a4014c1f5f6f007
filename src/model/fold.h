/* fold.h - hidden states of video tokens that go no further, folded into those that do.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_FOLD_H
#define KVF_MODEL_FOLD_H

#include "backend/backend.h"

/* rows: n hidden states [width], host, in the text's order; keep[i]: row i goes on, one of them at least. Each
 * row that does not is folded into the most similar of those that do (kvfold/merge.h, kvf_merge_inner), which are
 * changed. On failure nothing is. Takes 2 n rows of memory meanwhile. Errors: NOMEM, ARG (a state is not finite). */
kvf_status kvf_fold(kvf_backend *backend, float *const *rows, const uint8_t *keep, int64_t n, int64_t width, kvf_error *err);

#endif
