/* option.h - option tables: one row feeds the parser, the range check, --help and the docs.
 *
 * A policy spec is "name:key=value,key=value". The fields named by the rows live in the policy's
 * zeroed state struct.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_OPTION_H
#define KVF_BASE_OPTION_H

#include <stddef.h>

#include "base/error.h"

typedef enum kvf_option_type {
    KVF_OPTION_I64,
    KVF_OPTION_F64,
    KVF_OPTION_CHOICE, /* an int64_t: place of the word in `words` */
    KVF_OPTION_TEXT    /* char[KVF_OPTION_TEXT_BYTES]; letters, digits and ._+-/ only */
} kvf_option_type;

#define KVF_OPTION_TEXT_BYTES 48

typedef struct kvf_option {
    const char *name; /* NULL ends the table */
    kvf_option_type type;
    size_t offset; /* of the field in the state struct */
    double def, min, max; /* integers here are well under 2^53; of a CHOICE def is the place */
    const char *help;
    const char *words; /* CHOICE: "mean|bits|paper"; TEXT: the default */
} kvf_option;

#define KVF_OPT_I64(T, field, def, min, max, help) \
    { #field, KVF_OPTION_I64, offsetof(T, field), (double)(def), (double)(min), (double)(max), help, NULL }
#define KVF_OPT_F64(T, field, def, min, max, help) \
    { #field, KVF_OPTION_F64, offsetof(T, field), (def), (min), (max), help, NULL }
#define KVF_OPT_CHOICE(T, field, def, words, help) \
    { #field, KVF_OPTION_CHOICE, offsetof(T, field), (double)(def), 0, 0, help, words }
#define KVF_OPT_TEXT(T, field, def, help) { #field, KVF_OPTION_TEXT, offsetof(T, field), 0, 0, 0, help, def }

/* Set every field to its default. */
void kvf_options_default(const kvf_option *table, void *state);

/* Read "key=value,key=value" (n bytes, may be 0) into state. Errors: ARG, naming the key, what was
 * wrong and the range; an unknown key lists those there are. `who` is the spec's name. */
kvf_status kvf_options_parse(const kvf_option *table, void *state, const char *text, size_t n,
                             const char *who, kvf_error *err);

/* Write "key=value,..." of all options into out (cut at cap - 1 bytes, always terminated). */
void kvf_options_print(const kvf_option *table, const void *state, char *out, size_t cap);

#endif
