/* unroll.h - KVF_UNROLL before a loop of constant length: tiles of sums live in registers only when their
 * small loops are unrolled, which -O2 alone does not do.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_UNROLL_H
#define KVF_BASE_UNROLL_H

#if defined(__clang__)
#define KVF_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVF_UNROLL _Pragma("GCC unroll 16")
#endif

#endif
