/* rig.h - two backends side by side: the CPU's reference and the CUDA kernels, emulated or on a device.
 *
 * Each op runs on both with the same arguments but for the memory they point to. Slots of the two lie in
 * different order, and every place that holds no key is NaN on both sides. Emulated tests run with several
 * orders of fibers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_TESTS_CUDA_RIG_H
#define KVF_TESTS_CUDA_RIG_H

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend_load.h"
#include "backend/cpu/cpu_backend.h"
#include "base/half.h"

#ifdef KVF_TEST_CUDA_EMU
void emu_set_seed(uint64_t seed);
const char *emu_take_fault(void);
void emu_fail_malloc(int64_t n);
void emu_set_memory(uint64_t bytes);
uint64_t emu_launches(void);
uint64_t emu_graph_launches(void);
const kvf_backend_module *kvf_cuda_emu_module(void);
#endif

typedef struct rig {
    kvf_threads *threads;
    kvf_backend *cpu, *dev;
    const kvf_backend_module *module;
} rig;

static kvf_error err;

#define OK(expr) cr_assert((expr) >= 0, "%s: %s", #expr, err.msg)

/* The order of emulated threads: 0 in turn, else a random one. KVFOLD_EMU_ORDER is added to it, so that a whole suite can
 * be run in another order. */
static inline void seed_order(uint64_t order)
{
    (void)order;
#ifdef KVF_TEST_CUDA_EMU
    const char *base = getenv("KVFOLD_EMU_ORDER");
    emu_set_seed(order + (base ? strtoull(base, NULL, 10) : 0));
#endif
}

static inline uint64_t next_random(uint64_t *s)
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return *s >> 33;
}

/* In -1 .. 1. */
static inline float real(uint64_t *s) { return (float)next_random(s) / 1073741824.0f - 1.0f; }

static inline void *room(size_t bytes)
{
    void *p = kvf_alloc_raw(&kvf_mem_default, bytes ? bytes : 1, 1);
    cr_assert_not_null(p);
    return p;
}

static inline void drop(void *p) { kvf_free(&kvf_mem_default, p); }

static inline float *floats(size_t n, float size, uint64_t *seed)
{
    float *x = room(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = real(seed) * size;
    return x;
}

/* The device's module: under emulation linked, else loaded; NULL with the reason where there is none. */
static inline const kvf_backend_module *rig_module(void)
{
#ifdef KVF_TEST_CUDA_EMU
    seed_order(0);
    return kvf_cuda_emu_module();
#else
    const kvf_backend_module *m = NULL;
    char text[256];
    if (kvf_backend_load(&m, "cuda", KVF_TEST_MODULE_DIR, &err) < 0) return NULL;
    if (m->probe(text, sizeof text) > 0) return m;
    kvf_fail(&err, KVF_ERR_UNSUPPORTED, "%s", text);
    return NULL;
#endif
}

static inline void rig_open(rig *r, bool f32)
{
    r->module = rig_module();
    if (!r->module) {
        cr_assert(!getenv("KVFOLD_REQUIRE_CUDA"), "%s", err.msg);
        cr_skip_test("%s", err.msg);
    }
    OK(kvf_threads_open(&r->threads, 1, &kvf_mem_default, &err));
    kvf_cpu_backend_params cp = { .level = KVF_CPU_LEVEL_REF, .f32 = f32, .threads = r->threads, .mem = &kvf_mem_default };
    OK(kvf_cpu_backend_open(&r->cpu, &cp, &err));
    kvf_device_params dp = { .memory_bytes = 64u << 20, .f32 = f32, .mem = &kvf_mem_default };
    OK(r->module->open(&r->dev, &dp, &err));
}

static inline void rig_close(rig *r)
{
    r->cpu->ops->close(r->cpu);
    r->dev->ops->close(r->dev);
    kvf_threads_close(r->threads);
}

static inline void *dev_room(rig *r, size_t bytes)
{
    void *p;
    OK(r->dev->ops->alloc(r->dev, &p, bytes, &err));
    return p;
}

static inline void *dev_put(rig *r, const void *host, size_t bytes)
{
    void *p = dev_room(r, bytes);
    OK(r->dev->ops->upload(r->dev, p, host, bytes, &err));
    return p;
}

/* NaN everywhere, for results. */
static inline float *dev_poison(rig *r, size_t n)
{
    void *nan = room(n * sizeof(float));
    memset(nan, 0xff, n * sizeof(float));
    float *p = dev_put(r, nan, n * sizeof(float));
    drop(nan);
    return p;
}

static inline void *dev_get(rig *r, const void *dev, size_t bytes)
{
    void *p = room(bytes);
    OK(r->dev->ops->download(r->dev, p, dev, bytes, &err));
    return p;
}

static inline void dev_drop(rig *r, void *p) { r->dev->ops->release(r->dev, p); }

/* Largest distance; NaN counts as infinite, -inf must meet -inf. */
static inline double distance(const float *got, const float *want, size_t n)
{
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        if (got[i] == want[i]) continue;
        double d = fabs((double)got[i] - (double)want[i]);
        if (!(d <= worst)) worst = isfinite(d) ? d : (double)INFINITY;
    }
    return worst;
}

/* ---- Slots on both sides -------------------------------------------------------------------------- */

enum { RIG_SHIFT = 1, RIG_BLOCKS = 24 };

typedef struct rig_kv {
    int32_t n_block, n_head_kv, head_dim;
    size_t slot_bytes;
    void *cpu_slab[RIG_BLOCKS], *dev_slab[RIG_BLOCKS];
    kvf_kv_view cpu, dev;
    int32_t cpu_slots[RIG_BLOCKS], dev_slots[RIG_BLOCKS]; /* of the list's blocks */
    uint8_t valid[2 * RIG_BLOCKS];
} rig_kv;

static inline void shuffle(int32_t *v, int32_t n, uint64_t *seed)
{
    for (int32_t i = 0; i < n; i++) v[i] = i;
    for (int32_t i = 0; i < n; i++) {
        int32_t j = (int32_t)(next_random(seed) % (uint64_t)n), t = v[i];
        v[i] = v[j];
        v[j] = t;
    }
}

/* Slots for n_block blocks, all NaN; two a slab. */
static inline void kv_open(rig *r, rig_kv *kv, int32_t n_block, int32_t n_head_kv, int32_t head_dim, uint64_t *seed)
{
    memset(kv, 0, sizeof *kv);
    cr_assert_leq(n_block, RIG_BLOCKS);
    kv->n_block = n_block;
    kv->n_head_kv = n_head_kv;
    kv->head_dim = head_dim;
    kv->slot_bytes = (size_t)(4 * n_head_kv * KVF_BLOCK * head_dim);
    kv->cpu = (kvf_kv_view){ kv->cpu_slab, RIG_SHIFT, kv->slot_bytes };
    kv->dev = (kvf_kv_view){ kv->dev_slab, RIG_SHIFT, kv->slot_bytes };
    for (int32_t i = 0; i < (n_block + 1) / 2; i++) {
        kv->cpu_slab[i] = room(2 * kv->slot_bytes);
        memset(kv->cpu_slab[i], 0xff, 2 * kv->slot_bytes);
        kv->dev_slab[i] = dev_put(r, kv->cpu_slab[i], 2 * kv->slot_bytes);
    }
    shuffle(kv->cpu_slots, n_block, seed);
    shuffle(kv->dev_slots, n_block, seed);
    for (int32_t i = 0; i < n_block; i++) kv->valid[2 * i + 1] = KVF_BLOCK;
}

static inline void kv_close(rig *r, rig_kv *kv)
{
    for (int32_t i = 0; i < (kv->n_block + 1) / 2; i++) {
        drop(kv->cpu_slab[i]);
        dev_drop(r, kv->dev_slab[i]);
    }
}

/* Entries whole, empty, or a run of eighths. */
static inline void kv_holes(rig_kv *kv, uint64_t *seed)
{
    for (int32_t i = 0; i < kv->n_block; i++) {
        uint64_t x = next_random(seed) % 17, y = next_random(seed) % 17, kind = next_random(seed) % 6;
        kv->valid[2 * i] = (uint8_t)(8 * (x < y ? x : y));
        kv->valid[2 * i + 1] = (uint8_t)(8 * (x < y ? y : x));
        if (kind == 0) kv->valid[2 * i] = 0, kv->valid[2 * i + 1] = KVF_BLOCK;
        if (kind == 1) kv->valid[2 * i + 1] = kv->valid[2 * i];
    }
}

/* Random keys and values in the places that are valid and before n_key. */
static inline void kv_fill(rig *r, rig_kv *kv, int64_t n_key, uint64_t *seed)
{
    for (int32_t b = 0; b < kv->n_block; b++) {
        kvf_f16 *slot = kvf_kv_slot(&kv->cpu, kv->cpu_slots[b]);
        for (int32_t h = 0; h < 2 * kv->n_head_kv; h++)
            for (int32_t p = kv->valid[2 * b]; p < kv->valid[2 * b + 1] && b * KVF_BLOCK + p < n_key; p++)
                for (int32_t c = 0; c < kv->head_dim; c++)
                    slot[(h * KVF_BLOCK + p) * kv->head_dim + c] = kvf_f16_from_f32(real(seed));
        OK(r->dev->ops->upload(r->dev, kvf_kv_slot(&kv->dev, kv->dev_slots[b]), slot, kv->slot_bytes, &err));
    }
}

/* Whether block b is the same bits on both sides. */
static inline bool kv_same(rig *r, const rig_kv *kv, int32_t b)
{
    void *dev = dev_get(r, kvf_kv_slot(&kv->dev, kv->dev_slots[b]), kv->slot_bytes);
    bool same = memcmp(dev, kvf_kv_slot(&kv->cpu, kv->cpu_slots[b]), kv->slot_bytes) == 0;
    drop(dev);
    return same;
}

#endif
