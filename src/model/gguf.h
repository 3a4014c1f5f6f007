/* gguf.h - reader of GGUF v3 model files. The file is hostile until checked.
 *
 * After kvf_gguf_open succeeds: every key and string lies inside the file; every array has the
 * length it claims; every tensor has a known type, 1..4 dimensions >= 1 whose product does not
 * overflow, rows of whole blocks, and bytes inside the file at an aligned offset, no name twice.
 * Values are read in place; strings are not NUL-terminated.
 *
 * File layout (little-endian): magic "GGUF", u32 version = 3, u64 n_tensor, u64 n_kv; n_kv times
 * { string key, u32 type, value }; n_tensor times { string name, u32 n_dim, u64 dim[n_dim] (fastest
 * first), u32 type, u64 offset }; padding to `general.alignment` (default 32); tensor data.
 * string = u64 length, bytes. array = u32 element type, u64 count, elements.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_GGUF_H
#define KVF_MODEL_GGUF_H

#include <stdbool.h>

#include "base/dtype.h"
#include "base/file_map.h"
#include "base/mem.h"

typedef enum kvf_gguf_type {
    KVF_GGUF_U8 = 0, KVF_GGUF_I8 = 1, KVF_GGUF_U16 = 2, KVF_GGUF_I16 = 3, KVF_GGUF_U32 = 4,
    KVF_GGUF_I32 = 5, KVF_GGUF_F32 = 6, KVF_GGUF_BOOL = 7, KVF_GGUF_STR = 8, KVF_GGUF_ARR = 9,
    KVF_GGUF_U64 = 10, KVF_GGUF_I64 = 11, KVF_GGUF_F64 = 12
} kvf_gguf_type;

typedef struct kvf_str {
    const char *p; /* not NUL-terminated */
    size_t n;
} kvf_str;

typedef struct kvf_gguf_kv {
    kvf_str key;
    kvf_gguf_type type;
    kvf_gguf_type elem;  /* of an array; arrays of arrays are refused */
    int64_t count;       /* of an array; 1 otherwise */
    const uint8_t *data; /* first byte of the value, possibly unaligned; of a string its length field,
                            of an array its first element */
    size_t bytes;        /* of the value; of an array all elements */
} kvf_gguf_kv;

typedef struct kvf_gguf_tensor {
    kvf_str name;
    kvf_dtype type;
    int32_t n_dim;
    int64_t dim[4]; /* fastest first; unused are 1. A matrix [n_out][n_in] has dim = {n_in, n_out} */
    const void *data;
    size_t bytes;
} kvf_gguf_tensor;

typedef struct kvf_gguf kvf_gguf;

/* Map and check. Errors: IO, FORMAT, UNSUPPORTED (version, byte order, tensor type), NOMEM. */
kvf_status kvf_gguf_open(kvf_gguf **out, const char *path, const kvf_mem *mem, kvf_error *err);
/* The same over bytes in memory (tests, fuzzer); data must outlive *out. */
kvf_status kvf_gguf_open_memory(kvf_gguf **out, const void *data, size_t bytes, const kvf_mem *mem, kvf_error *err);
void kvf_gguf_close(kvf_gguf *g);

size_t kvf_gguf_file_bytes(const kvf_gguf *g);
int64_t kvf_gguf_n_kv(const kvf_gguf *g);
int64_t kvf_gguf_n_tensor(const kvf_gguf *g);
const kvf_gguf_kv *kvf_gguf_kv_at(const kvf_gguf *g, int64_t i);
const kvf_gguf_tensor *kvf_gguf_tensor_at(const kvf_gguf *g, int64_t i);

/* NULL if there is none. O(1) expected. */
const kvf_gguf_kv *kvf_gguf_find(const kvf_gguf *g, const char *key);
const kvf_gguf_tensor *kvf_gguf_find_tensor(const kvf_gguf *g, const char *name);

/* Typed access. The value must exist and be of a fitting type (any integer type for ints, F32 or
 * F64 for floats); else FORMAT naming the key. *_or return def when the key is absent, and still
 * fail when it has the wrong type. Range: min <= value <= max, else FORMAT naming key and range. */
kvf_status kvf_gguf_get_int(const kvf_gguf *g, const char *key, int64_t min, int64_t max, int64_t *out, kvf_error *err);
kvf_status kvf_gguf_get_int_or(const kvf_gguf *g, const char *key, int64_t min, int64_t max, int64_t def, int64_t *out, kvf_error *err);
kvf_status kvf_gguf_get_float_or(const kvf_gguf *g, const char *key, float def, float *out, kvf_error *err); /* finite */
kvf_status kvf_gguf_get_bool_or(const kvf_gguf *g, const char *key, bool def, bool *out, kvf_error *err);
kvf_status kvf_gguf_get_str(const kvf_gguf *g, const char *key, kvf_str *out, kvf_error *err);
/* p = NULL when the key is absent. */
kvf_status kvf_gguf_get_str_or_null(const kvf_gguf *g, const char *key, kvf_str *out, kvf_error *err);

/* Walk an array of strings: *at starts at 0 and is advanced; false past the end. */
bool kvf_gguf_next_str(const kvf_gguf_kv *kv, size_t *at, kvf_str *out);

/* Display text for `inspect`: "u32", "arr[str, 151936]"; a value cut to cap - 1 bytes. */
void kvf_gguf_describe(const kvf_gguf_kv *kv, char *type, size_t type_cap, char *value, size_t value_cap);

#endif
