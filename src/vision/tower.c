/* tower.c - opens and closes a vision model; see tower.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "vision/encode_int.h"

#include <string.h>
#include <time.h>

#include "base/hash.h"

/* Patches computed at once. Fewer and each weight matrix is unpacked more often; more and activations no
 * longer fit the caches: measured in docs/vision.md. */
enum { BATCH_PATCHES = 512 };

double kvf_vision_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* Tells two models apart without reading all weights; as a language model's (model/load.c). */
static void fingerprint(kvf_vision *v)
{
    kvf_hash h = { 0 };
    for (int64_t i = 0; i < kvf_gguf_n_kv(v->gguf); i++) {
        const kvf_gguf_kv *kv = kvf_gguf_kv_at(v->gguf, i);
        h = kvf_hash_bytes(kv->key.p, kv->key.n, h);
        h = kvf_hash_bytes(kv->data, kv->bytes, h);
    }
    for (int64_t i = 0; i < kvf_gguf_n_tensor(v->gguf); i++) {
        const kvf_gguf_tensor *t = kvf_gguf_tensor_at(v->gguf, i);
        int64_t shape[5] = { t->type, t->dim[0], t->dim[1], t->dim[2], t->dim[3] };
        size_t n = t->bytes < 64 ? t->bytes : 64;
        h = kvf_hash_bytes(t->name.p, t->name.n, h);
        h = kvf_hash_bytes(shape, sizeof shape, h);
        h = kvf_hash_bytes(t->data, n, h);
        h = kvf_hash_bytes((const char *)t->data + (t->bytes - n) / 2, n, h);
        h = kvf_hash_bytes((const char *)t->data + (t->bytes - n), n, h);
        v->n_params += t->dim[0] * t->dim[1] * t->dim[2] * t->dim[3];
    }
    v->fingerprint[0] = h.lo;
    v->fingerprint[1] = h.hi;
}

/* Weights and vectors go to the backend; a device serves one caller at a time. */
static kvf_status load_weights(kvf_vision *v, kvf_error *err)
{
    KVF_TRY(kvf_vision_tensors_load(v, err));
    return v->on_device ? kvf_vision_to_device(v, err) : KVF_OK;
}

static kvf_status load(kvf_vision *v, const char *path, const kvf_vision_params *params, kvf_error *err)
{
    const kvf_backend_ops *ops = v->env.backend->ops;
    v->on_device = !ops->host_memory;
    if (v->on_device && !ops->layernorm)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "device %s has no kernels for vision towers; open another context with device cpu for it",
                        ops->name);
    KVF_TRY(kvf_gguf_open(&v->gguf, path, v->env.mem, err));
    KVF_TRY(kvf_vision_hparams_read(v, params, err));
    if (v->on_device) kvf_turn_take(&v->env.backend->run);
    kvf_status rc = load_weights(v, err);
    if (v->on_device) kvf_turn_give(&v->env.backend->run);
    KVF_TRY(rc);
    fingerprint(v);
    v->hp.batch = params->batch > 0 ? params->batch : (BATCH_PATCHES + v->hp.n_pos - 1) / v->hp.n_pos;
    return KVF_OK;
}

kvf_status kvf_vision_load(kvf_vision **out, const kvf_vision_env *env, const char *path, const kvf_vision_params *params,
                           kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(env->mem, &block, 1, sizeof(kvf_vision), err));
    kvf_vision *v = block;
    v->env = *env;
    v->ops = kvf_vit_ops_pick(env->level);
    atomic_init(&v->cancel, 0);
    pthread_mutex_init(&v->lock, NULL);
    kvf_status rc = load(v, path, params, err);
    if (rc < 0) {
        kvf_error_prefix(err, "%s: ", path);
        kvf_vision_unload(v);
        return rc;
    }
    *out = v;
    return KVF_OK;
}

static void weight_fini(kvf_vision *v, kvf_weight *w)
{
    if (w->data && v->env.backend->ops->weight_fini) v->env.backend->ops->weight_fini(v->env.backend, w);
}

void kvf_vision_unload(kvf_vision *v)
{
    if (!v) return;
    kvf_backend *b = v->env.backend;
    if (v->on_device) kvf_turn_take(&b->run);
    if (v->dev_vectors) b->ops->release(b, v->dev_vectors);
    for (int32_t i = 0; v->layers && i < v->hp.n_layer; i++) {
        kvf_vision_layer *y = &v->layers[i];
        kvf_weight *w[] = { &y->q, &y->k, &y->v, &y->o, &y->up, &y->down };
        for (size_t j = 0; j < sizeof w / sizeof *w; j++) weight_fini(v, w[j]);
    }
    weight_fini(v, &v->patch);
    weight_fini(v, &v->mm0);
    weight_fini(v, &v->mm2);
    if (v->on_device) kvf_turn_give(&b->run);
    kvf_free(v->env.mem, v->layers);
    kvf_free(v->env.mem, v->vectors);
    kvf_free(v->env.mem, v->pinpoints);
    kvf_gguf_close(v->gguf);
    pthread_mutex_destroy(&v->lock);
    kvf_free(v->env.mem, v);
}
