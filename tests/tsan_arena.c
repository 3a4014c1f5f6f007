/* tsan_arena.c - lets Criterion start under ThreadSanitizer; linked into those builds alone.
 *
 * Criterion's process sandbox maps an arena it shares with its children at a random address:
 * 0x200000000000 + 2^24 * the low 22 bits of rand_r(). ThreadSanitizer keeps nearly all of that
 * range for its shadow and refuses; programs may map 0x550000000000 to 0x568000000000. This
 * rand_r, found before the C library's, returns numbers that lead there. Nothing else of the tests
 * uses rand_r.
 *
 * SPDX-License-Identifier: Apache-2.0 */
int rand_r(unsigned *seed);

__attribute__((visibility("default"))) int rand_r(unsigned *seed)
{
    *seed = *seed * 1103515245u + 12345u;
    return (int)(0x350000u + (*seed >> 8) % 0x18000u);
}
