/* codec.h - a block's keys and values as the store keeps them.
 *
 * F16 is the slot itself. INT8 keeps one byte a number: keys share a scale per channel over the block,
 * because raw keys have channels far larger than others (KIVI, Liu et al. 2024, arXiv:2402.02750, sec. 3),
 * values one per token. The scale is the largest magnitude / 127, f32.
 *
 *   INT8, per KV head:  f32 scale[head_dim], i8 key[128][head_dim]
 *   then per KV head:   f32 scale[128],      i8 value[128][head_dim]
 *
 * Tokens that a block does not have are zero, so that the same tokens are the same bytes.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MEMORY_CODEC_H
#define KVF_MEMORY_CODEC_H

#include <stddef.h>
#include <stdint.h>

typedef struct kvf_block_codec {
    uint32_t codec; /* kvf_codec */
    int32_t n_head_kv, head_dim;
} kvf_block_codec;

/* Bytes of a block as stored. */
size_t kvf_codec_bytes(const kvf_block_codec *c);

/* A slot of n_tok tokens into out, and back; slots are aligned for f16, out and in need not be. What is not a number becomes 0,
 * infinities the largest f16. */
void kvf_codec_encode(const kvf_block_codec *c, const void *slot, int32_t n_tok, void *out);
void kvf_codec_decode(const kvf_block_codec *c, const void *in, void *slot);

#endif
