/* safetensors.h - tensors by name, as Hugging Face stores them.
 *
 * Layout: length of the header (8 bytes, little-endian), the header - a JSON object, name to
 * {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__" from text to text - then the data,
 * which the tensors fill without holes or overlap.
 *
 * Rule: every number of the header is checked against the file before it is used. The JSON is parsed by
 * cJSON, which limits its depth; the header's length is limited here.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_SAFETENSORS_H
#define KVFOLD_TOOLS_SAFETENSORS_H

#include "array.h"
#include "outfile.h"

/* Most bytes of a header; a model of 10,000 tensors has 1 MB. */
#define SAFETENSORS_MAX_HEADER ((size_t)32 << 20)

typedef struct tensor_entry {
    char *name; /* owned */
    array_info info;
} tensor_entry;

typedef struct tensor_text {
    char *key, *value; /* owned */
} tensor_text;

typedef struct safetensors {
    tensor_entry *tensors; /* [n_tensors], in the order of their data; owned */
    size_t n_tensors;
    tensor_text *texts; /* [n_texts] of __metadata__; owned */
    size_t n_texts;
} safetensors;

/* Read the header of a file of file_bytes bytes, of which bytes[0..n) are the first: all of the header.
 * Errors: FORMAT (not safetensors, damaged, cut off, overlapping tensors); UNSUPPORTED (an element type
 * that is not read, more than ARRAY_MAX_DIM dimensions); NOMEM. On failure *out is empty. */
kvf_status safetensors_parse(safetensors *out, const char *name, const void *bytes, size_t n,
                             int64_t file_bytes, kvf_error *err);

/* Open a file and read its header. Errors: those, IO, ARG. */
kvf_status safetensors_open(array_file *f, safetensors *out, const char *path, kvf_error *err);

/* The tensor of that name, or NULL. */
const array_info *safetensors_find(const safetensors *s, const char *name);

void safetensors_free(safetensors *s);

/* ---- Writing: the same struct filled by the caller (names and texts are only read), every info with type,
 * n_dim and shape. safetensors_begin writes the header; then the data of the tensors in order through
 * outfile_write, then outfile_commit. */
kvf_status safetensors_begin(outfile *o, const char *path, const safetensors *s, kvf_error *err);

#endif
