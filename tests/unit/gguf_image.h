/* gguf_image.h - GGUF files built in memory, valid or damaged on purpose.
 *
 *     image g = img_new(1, 2);                          // counts as the header shall claim them
 *     img_kv_str(&g, "general.architecture", "llama");
 *     img_kv_u32(&g, "llama.block_count", 1);
 *     img_tensor(&g, "w", 2, (uint64_t[]){ 32, 4 }, 0, 0);
 *     img_data(&g, 32, 512);                            // pad to 32, then 512 bytes
 *     ... g.p, g.n ...
 *     img_free(&g);
 *
 * Nothing is checked: what is written is what the caller says.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TEST_GGUF_IMAGE_H
#define KVF_TEST_GGUF_IMAGE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct image {
    uint8_t *p; /* malloc */
    size_t n, cap;
} image;

static inline void img_bytes(image *g, const void *p, size_t n)
{
    if (g->n + n > g->cap) {
        g->cap = (g->n + n) * 2;
        g->p = realloc(g->p, g->cap);
        if (!g->p) abort();
    }
    if (n) memcpy(g->p + g->n, p, n);
    g->n += n;
}

static inline void img_u8(image *g, uint8_t v) { img_bytes(g, &v, sizeof v); }
static inline void img_u32(image *g, uint32_t v) { img_bytes(g, &v, sizeof v); }
static inline void img_u64(image *g, uint64_t v) { img_bytes(g, &v, sizeof v); }
static inline void img_f32(image *g, float v) { img_bytes(g, &v, sizeof v); }

static inline void img_str(image *g, const char *s)
{
    img_u64(g, strlen(s));
    img_bytes(g, s, strlen(s));
}

static inline image img_new(uint64_t n_tensor, uint64_t n_kv)
{
    image g = { NULL, 0, 0 };
    img_bytes(&g, "GGUF", 4);
    img_u32(&g, 3);
    img_u64(&g, n_tensor);
    img_u64(&g, n_kv);
    return g;
}

static inline void img_free(image *g)
{
    free(g->p);
    *g = (image){ NULL, 0, 0 };
}

/* Key and type; the caller writes the value. */
static inline void img_key(image *g, const char *key, uint32_t type)
{
    img_str(g, key);
    img_u32(g, type);
}

static inline void img_kv_u32(image *g, const char *key, uint32_t v)
{
    img_key(g, key, 4);
    img_u32(g, v);
}

static inline void img_kv_f32(image *g, const char *key, float v)
{
    img_key(g, key, 6);
    img_f32(g, v);
}

static inline void img_kv_bool(image *g, const char *key, int v)
{
    img_key(g, key, 7);
    img_u8(g, (uint8_t)v);
}

static inline void img_kv_str(image *g, const char *key, const char *v)
{
    img_key(g, key, 8);
    img_str(g, v);
}

/* Array head; the caller writes count elements. */
static inline void img_kv_arr(image *g, const char *key, uint32_t elem, uint64_t count)
{
    img_key(g, key, 9);
    img_u32(g, elem);
    img_u64(g, count);
}

static inline void img_kv_strs(image *g, const char *key, const char *const *v, size_t n)
{
    img_kv_arr(g, key, 8, n);
    for (size_t i = 0; i < n; i++) img_str(g, v[i]);
}

static inline void img_tensor(image *g, const char *name, uint32_t n_dim, const uint64_t *dim, uint32_t type,
                              uint64_t offset)
{
    img_str(g, name);
    img_u32(g, n_dim);
    for (uint32_t i = 0; i < n_dim; i++) img_u64(g, dim[i]);
    img_u32(g, type);
    img_u64(g, offset);
}

/* Zeros up to the alignment, then n bytes that count up. */
static inline void img_data(image *g, size_t alignment, size_t n)
{
    while (g->n % alignment) img_u8(g, 0);
    for (size_t i = 0; i < n; i++) img_u8(g, (uint8_t)i);
}

#endif
