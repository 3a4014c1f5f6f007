/* fuzz_arrays.c - the headers of .npy and safetensors files, from any bytes.
 *
 * The first byte chooses the reader. What is accepted must keep its promises: every element lies inside the
 * file.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "npy.h"
#include "safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The parsed array lies inside the file and its count is the product of its shape. */
static void check(const array_info *a, int64_t file_bytes)
{
    int64_t n = 1;
    if (a->n_dim < 0 || a->n_dim > ARRAY_MAX_DIM || a->type >= ARRAY_N_TYPES) abort();
    for (int i = 0; i < a->n_dim; i++) {
        if (a->shape[i] < 0) abort();
        if (a->n) n *= a->shape[i];
    }
    if (a->n && n != a->n) abort();
    if (a->at < 0 || a->at > file_bytes || a->n * (int64_t)array_type_bytes(a->type) > file_bytes - a->at)
        abort();
    char text[128];
    if (!memchr(array_describe(text, a), 0, sizeof text)) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1) return 0;
    kvf_error err = { 0 };
    kvf_status rc;
    int64_t bytes = (int64_t)size - 1;
    if (data[0] % 2 == 0) {
        array_info a;
        rc = npy_parse(&a, "x.npy", data + 1, size - 1, bytes, &err);
        if (rc == KVF_OK) check(&a, bytes);
    } else {
        safetensors s;
        rc = safetensors_parse(&s, "x.safetensors", data + 1, size - 1, bytes, &err);
        for (size_t i = 0; i < s.n_tensors; i++) check(&s.tensors[i].info, bytes);
        if (rc != KVF_OK && (s.tensors || s.texts)) abort();
        if (rc == KVF_OK && s.n_tensors && !safetensors_find(&s, s.tensors[0].name)) abort();
        safetensors_free(&s);
    }
    if (rc != KVF_OK && (rc != err.code || !err.msg[0])) abort();
    return 0;
}
