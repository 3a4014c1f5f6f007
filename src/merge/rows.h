/* rows.h - kernels over rows of numbers: what the planners spend their time in.
 *
 * One table, filled for the instruction set of the ctx; rows_ref.c defines each op in double precision, the
 * others sum in f32 lanes. Functions with a type are arrays indexed by kvf_merge_type. Rows need no alignment
 * beyond that of their type, and n is >= 1; nothing past n elements is touched.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_MERGE_ROWS_H
#define KVF_MERGE_ROWS_H

#include "base/cpu.h"
#include "kvfold/merge.h"

enum { KVF_MERGE_N_TYPE = 3 };

/* A block of channels of a selective scan, see mamba.c. Arrays of one token are contiguous over channels. */
typedef struct kvf_scan_args {
    int64_t n_tok, n_channel; /* of this block */
    int64_t stride;           /* elements from token to token of u, dt and y */
    const float *u, *dt;      /* [n_tok][stride] */
    const float *bc;          /* B of token t at bc + t * bc_stride, C n_state after it */
    int64_t bc_stride, n_state;
    const float *a;           /* [n_state][a_stride], negative */
    int64_t a_stride;
    const float *d;           /* [n_channel] */
    float *h;                 /* [n_state][a_stride] state, carried on */
    float *y;                 /* [n_tok][stride]: += sum over s of C h + d u */
} kvf_scan_args;

typedef struct kvf_rows {
    const char *name; /* "ref", "avx2", "avx512" */
    /* out[0] = sum prev cur, out[1] = sum cur cur. Not finite if a value is not, or a square too large. */
    void (*pair[KVF_MERGE_N_TYPE])(const void *prev, const void *cur, int64_t n, double out[2]);
    void (*widen[KVF_MERGE_N_TYPE])(float *dst, const void *src, int64_t n);
    void (*narrow[KVF_MERGE_N_TYPE])(void *dst, const float *src, int64_t n); /* to nearest, ties to even */
    /* acc += w[0] src[0] + ... + w[n_src - 1] src[n_src - 1], in this order; 1 <= n_src */
    void (*add[KVF_MERGE_N_TYPE])(float *acc, const void *const *src, const float *w, int64_t n_src, int64_t n);
    /* out[4 i + j] of four rows a[i] with four rows b[j]: sum a b; sum (a - b)^2. See tile.h. */
    void (*dot)(const float *const a[4], const float *const b[4], int64_t n, float out[16]);
    void (*dist2)(const float *const a[4], const float *const b[4], int64_t n, float out[16]);
    void (*silu)(float *x, int64_t n); /* x / (1 + e^-x), in place */
    /* h = exp(dt a) h + dt b u; y += sum c h + d u. States vanish below e^-87 of themselves a step. */
    void (*scan)(const kvf_scan_args *s);
} kvf_rows;

/* Fill the table for a level that the processor has. */
void kvf_rows_init(kvf_rows *r, kvf_cpu_level level);

void kvf_rows_init_ref(kvf_rows *r);
void kvf_rows_init_avx2(kvf_rows *r);
void kvf_rows_init_avx512(kvf_rows *r);

#endif
