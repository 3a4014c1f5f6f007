/* hparams.c - a tower's shape from the metadata of its file. Every value is checked: the file is hostile.
 *
 * Which layer is read: the key clip.vision.feature_layer if there is one, else the last in the file. LLaVA
 * reads the last but one of CLIP (arXiv:2310.03744, section 3.2), and llama.cpp's converter therefore leaves
 * the last out; llama.cpp itself then drops one more (its issue 25817), which nobody trained. Whoever wants
 * that gives kvf_vision_params.feature_layer, which overrules both.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "vision/tower.h"

/* Beyond any model there is; they keep products of sizes inside int64 and int32. */
enum { MAX_SIDE = 16384, MAX_GRID = 256, MAX_WIDTH = 16384, MAX_FF = 131072, MAX_LAYERS = 512, MAX_HEAD_DIM = 256,
       MAX_PINPOINTS = 256 };

static bool is(kvf_str s, const char *text) { return s.n == strlen(text) && memcmp(s.p, text, s.n) == 0; }

static int shown(kvf_str s) { return s.n > 64 ? 64 : (int)s.n; }

/* An mmproj file with a ViT and an MLP, or an error that says what it is instead. */
static kvf_status check_kind(const kvf_gguf *g, kvf_error *err)
{
    kvf_str arch, projector;
    KVF_TRY(kvf_gguf_get_str(g, "general.architecture", &arch, err));
    if (!is(arch, "clip"))
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "this is a '%.*s' model, not a vision tower; give the mmproj file that belongs to it", shown(arch), arch.p);
    bool vision, llava;
    KVF_TRY(kvf_gguf_get_bool_or(g, "clip.has_vision_encoder", false, &vision, err));
    KVF_TRY(kvf_gguf_get_bool_or(g, "clip.has_llava_projector", true, &llava, err));
    if (!vision)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "the mmproj file has no vision encoder (clip.has_vision_encoder); audio and text towers are not run");
    KVF_TRY(kvf_gguf_get_str_or_null(g, "clip.projector_type", &projector, err));
    if (!projector.p) KVF_TRY(kvf_gguf_get_str_or_null(g, "clip.vision.projector_type", &projector, err));
    /* The first LLaVA-1.5 files name no type. */
    if (projector.p ? !is(projector, "mlp") : !llava)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "projector type '%.*s' is not supported; LLaVA-type 'mlp' is",
                        projector.p ? shown(projector) : 4, projector.p ? projector.p : "none");
    return KVF_OK;
}

static kvf_status read_shape(kvf_vision_hparams *hp, const kvf_gguf *g, kvf_error *err)
{
    int64_t v[7];
    KVF_TRY(kvf_gguf_get_int(g, "clip.vision.image_size", 1, MAX_SIDE, &v[0], err));
    KVF_TRY(kvf_gguf_get_int(g, "clip.vision.patch_size", 1, v[0], &v[1], err));
    KVF_TRY(kvf_gguf_get_int(g, "clip.vision.embedding_length", 8, MAX_WIDTH, &v[2], err));
    KVF_TRY(kvf_gguf_get_int(g, "clip.vision.attention.head_count", 1, v[2], &v[3], err));
    KVF_TRY(kvf_gguf_get_int(g, "clip.vision.block_count", 1, MAX_LAYERS, &v[4], err));
    KVF_TRY(kvf_gguf_get_int_or(g, "clip.vision.feed_forward_length", 0, MAX_FF, 0, &v[5], err));
    KVF_TRY(kvf_gguf_get_float_or(g, "clip.vision.attention.layer_norm_epsilon", 1e-5f, &hp->eps, err));
    hp->image_size = (int32_t)v[0];
    hp->patch_size = (int32_t)v[1];
    hp->grid = hp->image_size / hp->patch_size; /* what is left over at the edge is not read */
    hp->n_patch = hp->grid * hp->grid;
    hp->width = (int32_t)v[2];
    hp->n_head = (int32_t)v[3];
    hp->head_dim = hp->width / hp->n_head;
    hp->n_layer = (int32_t)v[4];
    hp->n_ff = (int32_t)v[5];
    if (hp->grid > MAX_GRID)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "%d x %d patches a frame are too many; at most %d x %d", hp->grid, hp->grid, MAX_GRID, MAX_GRID);
    if (hp->width % hp->n_head != 0 || hp->head_dim % 8 != 0 || hp->head_dim > MAX_HEAD_DIM)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "%d heads of a width of %d are not supported: a head's width must be a multiple of 8, at most %d", hp->n_head,
                        hp->width, MAX_HEAD_DIM);
    if (!(hp->eps >= 0 && hp->eps < 1))
        return kvf_fail(err, KVF_ERR_FORMAT, "metadata key 'clip.vision.attention.layer_norm_epsilon' is outside 0 to 1; convert the model again");
    return KVF_OK;
}

static kvf_status read_act(kvf_vision_hparams *hp, const kvf_gguf *g, int32_t asked, kvf_error *err)
{
    static const kvf_vit_act of[] = { [KVF_VISION_ACT_GELU_TANH] = KVF_VIT_GELU_TANH,
                                      [KVF_VISION_ACT_GELU_QUICK] = KVF_VIT_GELU_QUICK,
                                      [KVF_VISION_ACT_GELU_ERF] = KVF_VIT_GELU_ERF,
                                      [KVF_VISION_ACT_SILU] = KVF_VIT_SILU };
    bool gelu, silu;
    KVF_TRY(kvf_gguf_get_bool_or(g, "clip.use_gelu", false, &gelu, err));
    KVF_TRY(kvf_gguf_get_bool_or(g, "clip.use_silu", false, &silu, err));
    if (gelu && silu)
        return kvf_fail(err, KVF_ERR_FORMAT, "metadata keys 'clip.use_gelu' and 'clip.use_silu' are both true; convert the model again");
    hp->act = gelu ? KVF_VIT_GELU_TANH : silu ? KVF_VIT_SILU : KVF_VIT_GELU_QUICK;
    if (asked != KVF_VISION_ACT_FILE) hp->act = of[asked];
    return KVF_OK;
}

static kvf_status read_three(float out[3], const kvf_gguf *g, const char *key, kvf_error *err)
{
    const kvf_gguf_kv *kv = kvf_gguf_find(g, key);
    if (!kv || kv->type != KVF_GGUF_ARR || kv->elem != KVF_GGUF_F32 || kv->count != 3)
        return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' must be three floats; convert the model again", key);
    memcpy(out, kv->data, 3 * sizeof *out);
    for (int i = 0; i < 3; i++) {
        if (!isfinite(out[i]) || fabsf(out[i]) > 1e6f)
            return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' holds a value that is not finite or far too large; convert the model again", key);
    }
    return KVF_OK;
}

static kvf_status read_pixels(kvf_vision_hparams *hp, const kvf_gguf *g, kvf_error *err)
{
    KVF_TRY(read_three(hp->mean, g, "clip.vision.image_mean", err));
    KVF_TRY(read_three(hp->std, g, "clip.vision.image_std", err));
    for (int i = 0; i < 3; i++) {
        if (hp->std[i] < 1e-6f)
            return kvf_fail(err, KVF_ERR_FORMAT, "metadata key 'clip.vision.image_std' must hold positive values; convert the model again");
    }
    return KVF_OK;
}

/* Element i of an array of integers of 32 bits. */
static bool int_at(const kvf_gguf_kv *kv, int64_t i, int64_t *out)
{
    if (kv->type != KVF_GGUF_ARR || (kv->elem != KVF_GGUF_I32 && kv->elem != KVF_GGUF_U32)) return false;
    int32_t v;
    memcpy(&v, kv->data + i * 4, sizeof v);
    *out = kv->elem == KVF_GGUF_U32 ? (int64_t)(uint32_t)v : v;
    return true;
}

static kvf_status read_feature_layer(kvf_vision_hparams *hp, const kvf_gguf *g, int32_t asked, kvf_error *err)
{
    const char *key = "clip.vision.feature_layer";
    const kvf_gguf_kv *kv = kvf_gguf_find(g, key);
    int64_t layer = hp->n_layer;
    if (kv && kv->count != 1)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "%lld feature layers side by side ('%s') are not supported, one is", (long long)kv->count, key);
    if (kv && kv->type != KVF_GGUF_ARR) KVF_TRY(kvf_gguf_get_int(g, key, 1, hp->n_layer, &layer, err));
    else if (kv && !int_at(kv, 0, &layer)) return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' must hold an integer; convert the model again", key);
    if (layer < 1 || layer > hp->n_layer)
        return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' is %lld; the file has layers 1 to %d", key, (long long)layer, hp->n_layer);
    if (asked > hp->n_layer)
        return kvf_fail(err, KVF_ERR_ARG, "feature_layer is %d; the model has layers 1 to %d", asked, hp->n_layer);
    hp->feature_layer = asked > 0 ? asked : (int32_t)layer;
    return KVF_OK;
}

static kvf_status read_pinpoints(kvf_vision *v, kvf_error *err)
{
    const char *key = "clip.vision.image_grid_pinpoints";
    const kvf_gguf_kv *kv = kvf_gguf_find(v->gguf, key);
    int64_t x;
    if (!kv || kv->count == 0) return KVF_OK;
    if (!int_at(kv, 0, &x) || kv->count % 2 != 0 || kv->count > 2 * MAX_PINPOINTS)
        return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' must hold pairs of integers, at most %d of them; convert the model again", key, MAX_PINPOINTS);
    void *block;
    KVF_TRY(kvf_mem_get(v->env.mem, &block, (size_t)kv->count, sizeof *v->pinpoints, err));
    v->pinpoints = block;
    for (int64_t i = 0; i < kv->count; i++) {
        if (!int_at(kv, i, &x) || x < 1 || x > 65536)
            return kvf_fail(err, KVF_ERR_FORMAT, "metadata key '%s' holds a side outside 1 to 65536; convert the model again", key);
        v->pinpoints[i] = (int32_t)x;
    }
    v->n_pinpoint = (int32_t)(kv->count / 2);
    return KVF_OK;
}

kvf_status kvf_vision_hparams_read(kvf_vision *v, const kvf_vision_params *params, kvf_error *err)
{
    const kvf_gguf *g = v->gguf;
    kvf_vision_hparams *hp = &v->hp;
    kvf_str name;
    KVF_TRY(check_kind(g, err));
    KVF_TRY(read_shape(hp, g, err));
    KVF_TRY(read_act(hp, g, params->activation, err));
    KVF_TRY(read_pixels(hp, g, err));
    KVF_TRY(read_feature_layer(hp, g, params->feature_layer, err));
    KVF_TRY(read_pinpoints(v, err));
    hp->projector_act = params->projector_gelu == KVF_VISION_GELU_TANH ? KVF_VIT_GELU_TANH : KVF_VIT_GELU_ERF;
    KVF_TRY(kvf_gguf_get_str_or_null(g, "general.name", &name, err));
    if (name.p) snprintf(v->name, sizeof v->name, "%.*s", name.n > 127 ? 127 : (int)name.n, name.p);
    return KVF_OK;
}
