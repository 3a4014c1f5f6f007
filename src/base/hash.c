/* hash.c - see hash.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/hash.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

kvf_hash kvf_hash_bytes(const void *data, size_t n, kvf_hash seed)
{
    XXH128_hash_t h = XXH3_128bits_withSeed(data, n, seed.lo ^ (seed.hi * 0x9e3779b97f4a7c15u));
    return (kvf_hash){ h.low64, h.high64 };
}
