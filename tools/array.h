/* array.h - a numeric array in a file: its element type, its shape, where its bytes are.
 *
 * What npy.c and safetensors.c have in common once they have understood a header: reading a run of
 * elements as float or int32, with every size checked against the file's. Files may be far larger than
 * memory (an hour of video is 10 GB), so elements are read in pieces on demand, never mapped: a file that
 * shrinks while it is read is an error, not a signal.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_ARRAY_H
#define KVFOLD_TOOLS_ARRAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kvfold/kvfold.h>

#define ARRAY_MAX_DIM 8

typedef enum array_type {
    ARRAY_BOOL,
    ARRAY_U8,
    ARRAY_I8,
    ARRAY_U16,
    ARRAY_I16,
    ARRAY_U32,
    ARRAY_I32,
    ARRAY_U64,
    ARRAY_I64,
    ARRAY_F16,
    ARRAY_BF16,
    ARRAY_F32,
    ARRAY_F64,
    ARRAY_N_TYPES
} array_type;

typedef struct array_info {
    array_type type;
    bool swapped; /* elements are big-endian */
    int n_dim;    /* 0..ARRAY_MAX_DIM; 0: one number */
    int64_t shape[ARRAY_MAX_DIM];
    int64_t n;  /* elements, the product of the shape; n * array_type_bytes() fits in int64_t */
    int64_t at; /* byte of the file where the elements begin */
} array_info;

/* An open file; read-only, one thread at a time. */
typedef struct array_file {
    int fd;        /* -1: closed */
    int64_t bytes; /* when it was opened */
    char *path;    /* owned */
} array_file;

/* Bytes of one element. */
size_t array_type_bytes(array_type t);

/* "f32"; static. */
const char *array_type_name(array_type t);

/* Set n from shape. False if a dimension is negative or the bytes do not fit in int64_t. */
bool array_set_count(array_info *a);

/* "[32, 196, 64] f32" into out. */
const char *array_describe(char out[128], const array_info *a);

/* Open a regular file. Errors: IO, ARG (a directory, a pipe), NOMEM. */
kvf_status array_file_open(array_file *f, const char *path, kvf_error *err);
void array_file_close(array_file *f);

/* Read n bytes at `at`. Errors: IO; FORMAT (the file ends before). */
kvf_status array_file_read(const array_file *f, int64_t at, void *out, size_t n, kvf_error *err);

/* Elements [first, first + n) as float, rounded to nearest where float cannot hold them; NaN and Inf stay.
 * Errors: ARG (not in the array), IO, FORMAT. */
kvf_status array_read_f32(const array_file *f, const array_info *a, int64_t first, int64_t n, float *out,
                          kvf_error *err);

/* The same as int32. Errors: as above; FORMAT also if a value is no int32. */
kvf_status array_read_i32(const array_file *f, const array_info *a, int64_t first, int64_t n, int32_t *out,
                          kvf_error *err);

/* The n elements' bytes as they are in the file, swapped to this machine's order. */
kvf_status array_read_raw(const array_file *f, const array_info *a, int64_t first, int64_t n, void *out,
                          kvf_error *err);

/* One number between the types of 16 bits and float; to 16 bits rounded to nearest, ties to even, what is too
 * large becomes infinite. */
float array_f16(uint16_t h);
float array_bf16(uint16_t h);
uint16_t array_to_f16(float v);
uint16_t array_to_bf16(float v);

#endif
