/* mamba_gguf.c - STORM's layers from a GGUF file: its tensors in f32, by name.
 *
 * Rule: the file is hostile; gguf.c has checked lengths and offsets, merge/mamba_named.c checks the rest.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "vision/mamba_gguf.h"

#include <string.h>

#include "base/half.h"
#include "model/gguf.h"

/* GGUF names are not terminated; longer ones than this are no layer's. */
enum { NAME_BYTES = 128 };

static kvf_status widen(float *out, const kvf_gguf_tensor *t, int64_t n, kvf_error *err)
{
    const char *p = t->data;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        if (t->type == KVF_DTYPE_F32) {
            memcpy(&out[i], p + 4 * i, 4);
            continue;
        }
        memcpy(&half, p + 2 * i, 2);
        if (t->type == KVF_DTYPE_F16)
            out[i] = kvf_f32_from_f16(half);
        else if (t->type == KVF_DTYPE_BF16)
            out[i] = kvf_f32_from_bf16(half);
        else
            return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                            "tensor '%.*s' is quantised; Mamba layers are read in f32, f16 or bf16",
                            t->name.n > 64 ? 64 : (int)t->name.n, t->name.p);
    }
    return KVF_OK;
}

static kvf_status take(const kvf_mem *mem, kvf_mamba_file *all, const kvf_gguf_tensor *g, kvf_error *err)
{
    int64_t n = 1, i = all->n++;
    char *name = all->name + i * NAME_BYTES;
    if (g->name.n >= NAME_BYTES || memchr(g->name.p, 0, g->name.n))
        return kvf_fail(err, KVF_ERR_FORMAT, "a tensor's name has %zu bytes; it is no weight of a Mamba layer",
                        g->name.n);
    memcpy(name, g->name.p, g->name.n);
    name[g->name.n] = 0;
    kvf_mamba_tensor *t = &all->t[i];
    *t = (kvf_mamba_tensor){ .name = name, .n_dim = g->n_dim };
    for (int k = 0; k < g->n_dim; k++) {
        t->shape[k] = g->dim[g->n_dim - 1 - k];
        n *= g->dim[k];
    }
    float *data;
    KVF_TRY(kvf_mem_get(mem, (void **)(void *)&data, (size_t)n, sizeof *data, err));
    t->data = data;
    return widen(data, g, n, err);
}

static kvf_status read_all(const kvf_mem *mem, const kvf_gguf *g, kvf_mamba_file *all, kvf_error *err)
{
    int64_t n = kvf_gguf_n_tensor(g);
    if (n < 1 || n > 18 * 1024)
        return kvf_fail(err, KVF_ERR_FORMAT, "the file has %lld tensors; Mamba layers have 9 to 18 each",
                        (long long)n);
    KVF_TRY(kvf_mem_get(mem, (void **)(void *)&all->t, (size_t)n, sizeof *all->t, err));
    KVF_TRY(kvf_mem_get(mem, (void **)(void *)&all->name, (size_t)n, NAME_BYTES, err));
    for (int64_t i = 0; i < n; i++) KVF_TRY(take(mem, all, kvf_gguf_tensor_at(g, i), err));
    return KVF_OK;
}

kvf_status kvf_mamba_file_read(kvf_mamba_file *f, const kvf_mem *mem, const char *path, kvf_error *err)
{
    kvf_gguf *g;
    *f = (kvf_mamba_file){ 0 };
    KVF_TRY(kvf_gguf_open(&g, path, mem, err));
    kvf_status rc = read_all(mem, g, f, err);
    kvf_gguf_close(g);
    return rc;
}

void kvf_mamba_file_free(kvf_mamba_file *f, const kvf_mem *mem)
{
    for (int64_t i = 0; i < f->n; i++) kvf_free(mem, (void *)(uintptr_t)f->t[i].data);
    kvf_free(mem, f->t);
    kvf_free(mem, f->name);
}
