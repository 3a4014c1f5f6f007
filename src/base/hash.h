/* hash.h - 128-bit content hashes (XXH3-128): fingerprints, not secrets.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_HASH_H
#define KVF_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct kvf_hash {
    uint64_t lo, hi;
} kvf_hash;

/* Hash of n bytes, chained onto seed ({0} to start): hash(b, hash(a)) depends on a and b in order. */
kvf_hash kvf_hash_bytes(const void *data, size_t n, kvf_hash seed);

#endif
