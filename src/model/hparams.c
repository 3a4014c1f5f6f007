/* hparams.c - a model's shape and RoPE tables from the metadata of its file.
 *
 * Keys are "<arch>.<name>". Every number has a range, chosen so that products of two of them fit
 * int64_t by far and no table is larger than the file could justify.
 *
 * RoPE scaling becomes one table of inverse frequencies:
 *     none    f_j = base^(-2j / n_rot)
 *     linear  f_j / factor
 *     yarn    per dimension between f_j / factor and f_j; Peng et al., arXiv:2309.00071, sec. 3.2-3.4
 *     llama3  f_j / rope_freqs[j]: the file holds the factors as a tensor
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/model.h"

typedef struct reader {
    const kvf_gguf *g;
    const char *arch;
    kvf_error *err;
    kvf_status rc; /* first failure; later reads are no-ops */
} reader;

static void make_key(const reader *r, const char *name, char key[96]) { snprintf(key, 96, "%s.%s", r->arch, name); }

static int64_t read_int(reader *r, const char *name, int64_t min, int64_t max)
{
    char key[96];
    int64_t v = min;
    make_key(r, name, key);
    if (r->rc >= 0) r->rc = kvf_gguf_get_int(r->g, key, min, max, &v, r->err);
    return v;
}

static int64_t read_int_or(reader *r, const char *name, int64_t min, int64_t max, int64_t def)
{
    char key[96];
    int64_t v = def;
    make_key(r, name, key);
    if (r->rc >= 0) r->rc = kvf_gguf_get_int_or(r->g, key, min, max, def, &v, r->err);
    return v;
}

static float read_float_or(reader *r, const char *name, float min, float max, float def)
{
    char key[96];
    float v = def;
    make_key(r, name, key);
    if (r->rc < 0) return def;
    r->rc = kvf_gguf_get_float_or(r->g, key, def, &v, r->err);
    if (r->rc >= 0 && !(v >= min && v <= max))
        r->rc = kvf_fail(r->err, KVF_ERR_FORMAT, "key '%s' is %g; expected %g to %g", key, (double)v, (double)min,
                         (double)max);
    return v;
}

static const struct {
    const char *name;
    kvf_arch arch;
} archs[] = { { "llama", KVF_ARCH_LLAMA }, { "qwen2", KVF_ARCH_QWEN2 }, { "qwen3", KVF_ARCH_QWEN3 },
              { "gemma3", KVF_ARCH_GEMMA3 } };

static kvf_status read_arch(kvf_hparams *hp, const kvf_gguf *g, kvf_error *err)
{
    kvf_str name;
    KVF_TRY(kvf_gguf_get_str(g, "general.architecture", &name, err));
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        if (strlen(archs[i].name) != name.n || memcmp(archs[i].name, name.p, name.n) != 0) continue;
        hp->arch = archs[i].arch;
        hp->arch_name = archs[i].name;
        return KVF_OK;
    }
    return kvf_fail(err, KVF_ERR_UNSUPPORTED, "general.architecture is '%.*s'; this build runs llama, qwen2, qwen3 and gemma3",
                    name.n > 64 ? 64 : (int)name.n, name.p);
}

/* Dimensions where one full turn takes `turns` trained contexts: YaRN's ramp bounds. */
static double yarn_dim(double turns, int32_t n_rot, double base, double n_ctx_orig)
{
    return n_rot * log(n_ctx_orig / (turns * 2 * 3.14159265358979323846)) / (2 * log(base));
}

typedef struct rope_scaling {
    enum { ROPE_NONE, ROPE_LINEAR, ROPE_YARN } kind;
    double factor, n_ctx_orig, beta_fast, beta_slow, attn_factor;
} rope_scaling;

static void apply_yarn(double *f, int32_t n_rot, double base, const rope_scaling *s)
{
    double low = floor(yarn_dim(s->beta_fast, n_rot, base, s->n_ctx_orig));
    double high = ceil(yarn_dim(s->beta_slow, n_rot, base, s->n_ctx_orig));
    if (low < 0) low = 0;
    if (high > n_rot - 1) high = n_rot - 1;
    double span = high - low < 0.001 ? 0.001 : high - low;
    for (int32_t j = 0; j < n_rot / 2; j++) {
        double ramp = (j - low) / span;
        double keep = 1 - (ramp < 0 ? 0 : ramp > 1 ? 1 : ramp); /* 1: fast dimension, as trained */
        f[j] = f[j] / s->factor * (1 - keep) + f[j] * keep;
    }
}

static kvf_status read_scaling(rope_scaling *s, reader *r, int64_t n_ctx_train)
{
    memset(s, 0, sizeof *s);
    s->factor = 1;
    char key[96];
    kvf_str type = { 0 };
    make_key(r, "rope.scaling.type", key);
    KVF_TRY(kvf_gguf_get_str_or_null(r->g, key, &type, r->err));
    float old_linear = read_float_or(r, "rope.scale_linear", 1e-6f, 1e6f, 1);
    s->factor = read_float_or(r, "rope.scaling.factor", 0, 1e6f, old_linear);
    if (s->factor == 0) s->factor = 1; /* 0 stands for "none" in some files */
    s->n_ctx_orig = (double)read_int_or(r, "rope.scaling.original_context_length", 1, (int64_t)1 << 40, n_ctx_train);
    s->beta_fast = read_float_or(r, "rope.scaling.yarn_beta_fast", 1e-3f, 1e6f, 32);
    s->beta_slow = read_float_or(r, "rope.scaling.yarn_beta_slow", 1e-3f, 1e6f, 1);
    s->attn_factor = read_float_or(r, "rope.scaling.attn_factor", 1e-3f, 1e3f, 1);
    KVF_TRY(r->rc);
    if (!type.p) {
        s->kind = s->factor != 1 ? ROPE_LINEAR : ROPE_NONE;
    } else if (type.n == 4 && memcmp(type.p, "none", 4) == 0) {
        s->kind = ROPE_NONE;
        s->factor = 1;
    } else if (type.n == 6 && memcmp(type.p, "linear", 6) == 0) {
        s->kind = ROPE_LINEAR;
    } else if (type.n == 4 && memcmp(type.p, "yarn", 4) == 0) {
        s->kind = ROPE_YARN;
    } else {
        return kvf_fail(r->err, KVF_ERR_UNSUPPORTED, "%s is '%.*s'; this build knows none, linear and yarn", key,
                        type.n > 64 ? 64 : (int)type.n, type.p);
    }
    return KVF_OK;
}

/* Llama 3.1 files carry one divisor per pair. */
static kvf_status apply_factors(double *f, int32_t n_half, const kvf_gguf *g, kvf_error *err)
{
    const kvf_gguf_tensor *t = kvf_gguf_find_tensor(g, "rope_freqs.weight");
    if (!t) return KVF_OK;
    if (t->type != KVF_DTYPE_F32 || t->n_dim != 1 || t->dim[0] != n_half)
        return kvf_fail(err, KVF_ERR_FORMAT, "tensor 'rope_freqs.weight' must be F32 [%d]", n_half);
    for (int32_t j = 0; j < n_half; j++) {
        float v;
        memcpy(&v, (const char *)t->data + (size_t)j * sizeof v, sizeof v);
        if (!(v > 0 && v < 1e6f))
            return kvf_fail(err, KVF_ERR_FORMAT, "tensor 'rope_freqs.weight' holds %g; expected a positive factor", (double)v);
        f[j] /= v;
    }
    return KVF_OK;
}

static kvf_status make_rope(kvf_hparams *hp, double *inv_freq[2], reader *r, const kvf_mem *mem)
{
    rope_scaling s;
    KVF_TRY(read_scaling(&s, r, hp->n_ctx_train));
    double base[2];
    base[0] = read_float_or(r, "rope.freq_base", 1, 1e12f, 10000);
    base[1] = read_float_or(r, "rope.freq_base_swa", 1, 1e12f, 10000); /* gemma3: 10000, not in its files */
    KVF_TRY(r->rc);
    for (int i = 0; i < 2; i++) {
        void *block;
        KVF_TRY(kvf_mem_get(mem, &block, (size_t)hp->n_rot / 2, sizeof(double), r->err));
        double *f = inv_freq[i] = block;
        for (int32_t j = 0; j < hp->n_rot / 2; j++) f[j] = pow(base[i], -2.0 * j / hp->n_rot);
    }
    /* Scaling is for the global layers; sliding-window layers never see far positions. */
    for (int32_t j = 0; s.kind == ROPE_LINEAR && j < hp->n_rot / 2; j++) inv_freq[0][j] /= s.factor;
    hp->rope_mscale = (float)s.attn_factor;
    if (s.kind == ROPE_YARN) {
        apply_yarn(inv_freq[0], hp->n_rot, base[0], &s);
        if (s.factor > 1) hp->rope_mscale *= (float)(0.1 * log(s.factor) + 1); /* sec. 3.4, eq. 22 */
    }
    return apply_factors(inv_freq[0], hp->n_rot / 2, r->g, r->err);
}

/* What the files leave unsaid because the architecture implies it. */
static void apply_arch(kvf_hparams *hp, reader *r)
{
    hp->act = KVF_ACT_SILU;
    hp->rope_kind = hp->arch == KVF_ARCH_LLAMA ? KVF_ROPE_INTERLEAVED : KVF_ROPE_NEOX;
    hp->embed_scale = 1;
    hp->attn_scale = 1 / sqrtf((float)hp->head_dim);
    if (hp->arch != KVF_ARCH_GEMMA3) return;
    hp->act = KVF_ACT_GELU_TANH;
    hp->embed_scale = sqrtf((float)hp->n_embd);
    hp->window = (int32_t)read_int_or(r, "attention.sliding_window", 0, 1 << 30, 0);
    hp->window_period = (int32_t)read_int_or(r, "attention.sliding_window_pattern", 1, 1024, 6);
    hp->attn_softcap = read_float_or(r, "attn_logit_softcapping", 0, 1e6f, 0);
    hp->final_softcap = read_float_or(r, "final_logit_softcapping", 0, 1e6f, 0);
    /* The 27B model divides by the embedding's share of a head instead of the head's width. */
    if (hp->n_layer == 62) hp->attn_scale = 1 / sqrtf((float)hp->n_embd / (float)hp->n_head);
}

kvf_status kvf_hparams_read(kvf_hparams *hp, double *inv_freq[2], const kvf_gguf *g, int32_t n_vocab,
                            const kvf_mem *mem, kvf_error *err)
{
    memset(hp, 0, sizeof *hp);
    KVF_TRY(read_arch(hp, g, err));
    reader r = { g, hp->arch_name, err, KVF_OK };
    hp->n_vocab = n_vocab;
    hp->n_layer = (int32_t)read_int(&r, "block_count", 1, 1024);
    hp->n_ctx_train = read_int(&r, "context_length", 1, (int64_t)1 << 31);
    hp->n_embd = (int32_t)read_int(&r, "embedding_length", 1, 1 << 20);
    hp->n_ff = (int32_t)read_int(&r, "feed_forward_length", 1, 1 << 22);
    hp->n_head = (int32_t)read_int(&r, "attention.head_count", 1, 4096);
    hp->n_head_kv = (int32_t)read_int_or(&r, "attention.head_count_kv", 1, 4096, hp->n_head);
    hp->head_dim = (int32_t)read_int_or(&r, "attention.key_length", 8, 256, hp->n_embd / (hp->n_head ? hp->n_head : 1));
    int64_t v_dim = read_int_or(&r, "attention.value_length", 8, 256, hp->head_dim);
    hp->n_rot = (int32_t)read_int_or(&r, "rope.dimension_count", 2, 256, hp->head_dim);
    hp->norm_eps = read_float_or(&r, "attention.layer_norm_rms_epsilon", 0, 1, 1e-6f);
    int64_t n_expert = read_int_or(&r, "expert_count", 0, 1 << 20, 0);
    apply_arch(hp, &r);
    KVF_TRY(r.rc);
    if (n_expert > 0)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "%s.expert_count is %lld: mixtures of experts are not supported",
                        hp->arch_name, (long long)n_expert);
    if (hp->n_head % hp->n_head_kv != 0)
        return kvf_fail(err, KVF_ERR_FORMAT, "%d attention heads cannot share %d KV heads evenly", hp->n_head, hp->n_head_kv);
    if (hp->head_dim < 8 || hp->head_dim > 256 || hp->head_dim % 8 != 0 || v_dim != hp->head_dim)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "heads of %d key and %lld value elements; this build needs equal widths, a multiple of 8 up to 256",
                        hp->head_dim, (long long)v_dim);
    if (hp->n_rot > hp->head_dim || hp->n_rot % 2 != 0)
        return kvf_fail(err, KVF_ERR_FORMAT, "%s.rope.dimension_count is %d; expected an even number up to %d",
                        hp->arch_name, hp->n_rot, hp->head_dim);
    return make_rope(hp, inv_freq, &r, mem);
}
