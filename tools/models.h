/* models.h - models known by name, and where they are on this machine.
 *
 * A name becomes a path: $KVFOLD_MODELS, $XDG_CACHE_HOME/kvfold/models, ~/.cache/kvfold/models.
 * A model that is not there is fetched only with consent: --yes, or a "yes" at the terminal. The
 * program itself opens no connection; scripts/fetch_model.py does, and checks the SHA-256.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_MODELS_H
#define KVFOLD_TOOLS_MODELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kvfold/kvfold.h>

typedef struct known_model {
    const char *name, *file, *sha256;
    int64_t bytes; /* of the file */
    const char *licence, *what;
} known_model;

#define MODELS_DEFAULT "qwen2.5-coder-0.5b"

/* i-th known model; NULL past the end. */
const known_model *models_at(size_t i);

/* By name, or by "default"; NULL if unknown. */
const known_model *models_find(const char *name);

/* Write the path of `name` (a path or a known model) to out. Fetches a known model that is absent
 * if `yes`, or if a person at the terminal agrees. Errors: NOT_FOUND (no such file or name; says
 * what to do), IO (fetching failed), CANCELLED. */
kvf_status models_path(char *out, size_t cap, const char *name, bool yes, kvf_error *err);

#endif
