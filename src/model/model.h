/* model.h - a model in memory: shape, tokenizer, and where each weight lies.
 *
 * All four architectures are one pre-norm transformer with options; what differs is data in
 * kvf_hparams and absent tensors, not code paths per architecture:
 *     llama   interleaved RoPE, optional rope_freqs factors
 *     qwen2   bias on q, k, v
 *     qwen3   RMS norm of every q and k head before RoPE
 *     gemma3  as qwen3, norms also after attention and FFN, scaled embeddings, GELU, five of six
 *             layers with a sliding window and a RoPE base of their own
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MODEL_MODEL_H
#define KVF_MODEL_MODEL_H

#include "backend/backend.h"
#include "model/chat.h"
#include "model/display.h"
#include "model/gguf.h"
#include "model/tokenizer.h"
#include "policy/policy.h"

typedef enum kvf_arch { KVF_ARCH_LLAMA, KVF_ARCH_QWEN2, KVF_ARCH_QWEN3, KVF_ARCH_GEMMA3 } kvf_arch;

typedef struct kvf_hparams {
    kvf_arch arch;
    const char *arch_name;
    int64_t n_ctx_train;
    int32_t n_vocab, n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim;
    float norm_eps;
    float embed_scale;   /* multiplies token embeddings */
    float attn_scale;    /* multiplies q . k */
    float attn_softcap, final_softcap; /* 0: none */
    kvf_act act;
    kvf_rope_kind rope_kind;
    int32_t n_rot;
    float rope_mscale;
    int32_t window;        /* of sliding-window layers; 0: no such layers */
    int32_t window_period; /* layer l is global if (l + 1) % window_period == 0 */
} kvf_hparams;

/* Vectors are f32 in backend memory; NULL where the architecture has none. */
typedef struct kvf_layer {
    const float *attn_norm, *q_norm, *k_norm, *post_attn_norm, *ffn_norm, *post_ffn_norm;
    const float *q_bias, *k_bias, *v_bias, *o_bias;
    kvf_weight q, k, v, o, gate, up, down;
} kvf_layer;

struct kvf_model {
    const kvf_mem *mem;
    kvf_backend *backend;
    kvf_gguf *gguf;
    kvf_tokenizer *tokenizer;
    const kvf_chat_template *chat; /* recognised, or NULL */
    kvf_hparams hp;
    double *inv_freq[2]; /* [n_rot / 2]: of global layers, of sliding-window layers */
    kvf_weight embed, output;
    const float *output_norm;
    kvf_layer *layers;   /* [n_layer] */
    float *vectors;      /* backend memory behind all vectors */
    uint64_t fingerprint[2];
    int64_t n_params;
    kvf_dtype main_type; /* most bytes among the matrices */
    char name[128];
    kvf_display *display; /* text of metadata and tensors */
};

/* Sliding-window layers have their own RoPE table and see hp->window keys. */
static inline bool kvf_layer_is_sliding(const kvf_hparams *hp, int32_t layer)
{
    return hp->window > 0 && (layer + 1) % hp->window_period != 0;
}

static inline kvf_dims kvf_model_dims(const kvf_model *m)
{
    return (kvf_dims){ m->hp.n_layer, m->hp.n_head, m->hp.n_head_kv, m->hp.head_dim };
}

/* Bytes of KV cache a token takes, all layers. */
static inline size_t kvf_model_kv_bytes(const kvf_model *m)
{
    return (size_t)m->hp.n_layer * 2 * (size_t)m->hp.n_head_kv * (size_t)m->hp.head_dim * 2;
}

/* Shape and RoPE tables from the metadata, checked. inv_freq[i] is allocated. */
kvf_status kvf_hparams_read(kvf_hparams *hp, double *inv_freq[2], const kvf_gguf *g, int32_t n_vocab,
                            const kvf_mem *mem, kvf_error *err);

/* path is opened and checked; weights stay in the file. */
kvf_status kvf_model_load(kvf_model **out, kvf_backend *backend, const char *path, kvf_error *err);
void kvf_model_unload(kvf_model *m);

#endif
