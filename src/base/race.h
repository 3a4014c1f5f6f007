/* race.h - tells ThreadSanitizer what a kernel reads and writes, in place of the kernel's own code.
 *
 * A kernel touches each element up to a thousand times, and watched one by one that takes hours of CI. Its
 * caller names the ranges once, before it runs: a race with anything outside is found as before
 * (tests/race.c). A kernel that leaves its part is not: that is for ASan and tests/parity. Nothing in builds
 * without ThreadSanitizer.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_RACE_H
#define KVF_BASE_RACE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KVF_TSAN 1
#endif
#elif defined(__SANITIZE_THREAD__)
#define KVF_TSAN 1
#endif

#ifdef KVF_TSAN
/* Of the sanitizer's runtime, which has no header for them. */
void __tsan_read_range(void *p, unsigned long bytes);
void __tsan_write_range(void *p, unsigned long bytes);

static inline void kvf_race_read(const void *p, size_t bytes) { __tsan_read_range((void *)(uintptr_t)p, bytes); }
static inline void kvf_race_write(void *p, size_t bytes) { __tsan_write_range(p, bytes); }
#else
/* Arguments are not evaluated. */
#define kvf_race_read(p, bytes) ((void)sizeof(p), (void)sizeof(bytes))
#define kvf_race_write(p, bytes) ((void)sizeof(p), (void)sizeof(bytes))
#endif

#endif
