/* display.c - text of a model's metadata and tensor directory, for people.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/display.h"

#include <stdio.h>
#include <string.h>

kvf_status kvf_display_open(kvf_display **out, const kvf_gguf *g, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_display), err));
    kvf_display *d = block;
    d->mem = mem;
    d->n_meta = kvf_gguf_n_kv(g);
    d->n_tensor = kvf_gguf_n_tensor(g);
    kvf_status rc = kvf_mem_get(mem, &block, (size_t)(d->n_meta + d->n_tensor), sizeof(kvf_display_row), err);
    if (rc < 0) {
        kvf_free(mem, d);
        return rc;
    }
    d->rows = block;
    for (int64_t i = 0; i < d->n_meta; i++) {
        const kvf_gguf_kv *kv = kvf_gguf_kv_at(g, i);
        kvf_display_row *r = &d->rows[i];
        snprintf(r->name, sizeof r->name, "%.*s", (int)(kv->key.n < sizeof r->name ? kv->key.n : sizeof r->name - 1), kv->key.p);
        kvf_gguf_describe(kv, r->type, sizeof r->type, r->value, sizeof r->value);
    }
    for (int64_t i = 0; i < d->n_tensor; i++) {
        const kvf_gguf_tensor *t = kvf_gguf_tensor_at(g, i);
        kvf_display_row *r = &d->rows[d->n_meta + i];
        snprintf(r->name, sizeof r->name, "%.*s", (int)(t->name.n < sizeof r->name ? t->name.n : sizeof r->name - 1), t->name.p);
        snprintf(r->type, sizeof r->type, "%s", kvf_dtype_get((uint32_t)t->type)->name);
        r->bytes = t->bytes;
        size_t at = 0;
        for (int32_t k = 0; k < t->n_dim && at < sizeof r->value - 24; k++)
            at += (size_t)snprintf(r->value + at, sizeof r->value - at, "%s%lld", k ? ", " : "[", (long long)t->dim[k]);
        snprintf(r->value + at, sizeof r->value - at, "]");
    }
    *out = d;
    return KVF_OK;
}

void kvf_display_close(kvf_display *d)
{
    if (!d) return;
    kvf_free(d->mem, d->rows);
    kvf_free(d->mem, d);
}
