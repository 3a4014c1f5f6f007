/* mm_pick.c - which kernel multiplies which weights, a pure function of level, type and tokens.
 *
 *     exact mode (f32)               *_f32 of the level
 *     F32, F16, BF16 weights         *_f32; F16 and BF16 with many tokens at level amx: amx_bf16
 *     up to KVF_MV_MAX_TOK tokens    mv_*: bound by reading the weights
 *     more                           amx_bf16 at level amx, else *_q8
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/mm.h"

static bool is_float(kvf_dtype type)
{
    return type == KVF_DTYPE_F32 || type == KVF_DTYPE_F16 || type == KVF_DTYPE_BF16;
}

#if defined(__x86_64__)
static const kvf_mm_kernel *pick_f32(kvf_cpu_level level, bool few)
{
    if (level >= KVF_CPU_LEVEL_AVX512) return few ? &kvf_mv_avx512_f32 : &kvf_mm_avx512_f32;
    return few ? &kvf_mv_avx2_f32 : &kvf_mm_avx2_f32;
}

static const kvf_mm_kernel *pick_simd(kvf_cpu_level level, kvf_dtype type, int64_t n_tok, bool f32)
{
    bool few = n_tok <= KVF_MV_MAX_TOK;
    if (f32 || type == KVF_DTYPE_F32) return pick_f32(level, few);
    if (!few && level >= KVF_CPU_LEVEL_AMX) return &kvf_mm_amx_bf16;
    if (is_float(type)) return pick_f32(level, few);
    if (level >= KVF_CPU_LEVEL_AVX512) return few ? &kvf_mv_avx512_q8 : &kvf_mm_avx512_q8;
    return few ? &kvf_mv_avx2_q8 : &kvf_mm_avx2_q8;
}
#endif

static const kvf_mm_kernel *pick(const kvf_cpu_ops *ops, kvf_dtype type, int64_t n_tok, bool f32)
{
#if defined(__x86_64__)
    if (ops->level >= KVF_CPU_LEVEL_AVX2) return pick_simd(ops->level, type, n_tok, f32);
#endif
    (void)ops, (void)n_tok;
    return f32 || is_float(type) ? &kvf_mm_ref_f32 : &kvf_mm_ref_q8;
}

void kvf_cpu_mm_init(kvf_cpu_ops *ops)
{
    ops->mm_pick = pick;
    ops->dequant = kvf_dequant_ref;
#if defined(__x86_64__)
    if (ops->level >= KVF_CPU_LEVEL_AVX2) ops->dequant = kvf_dequant_avx2;
    if (ops->level >= KVF_CPU_LEVEL_AVX512) ops->dequant = kvf_dequant_avx512;
#endif
}
