/* cpu.c - see cpu.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "base/cpu.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t xgetbv0(void)
{
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return ((uint64_t)hi << 32) | lo;
}

/* Linux gives the 8 KiB of tile data only to a process that asks (arch/x86/kernel/fpu). */
static int amx_granted(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
#ifdef SYS_arch_prctl
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

unsigned kvf_cpu_detect(void)
{
    unsigned a, b, c, d, flags = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    int osxsave = (c >> 27) & 1, avx = (c >> 28) & 1, fma = (c >> 12) & 1, f16c = (c >> 29) & 1;
    if (!osxsave || !avx) return 0;
    uint64_t xcr0 = xgetbv0();
    if ((xcr0 & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (((b >> 5) & 1) && ((b >> 8) & 1) && fma && f16c) flags |= KVF_CPU_AVX2;
    int zmm = (xcr0 & 0xe0) == 0xe0;
    unsigned need = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* F DQ CD BW VL */
    if (zmm && (flags & KVF_CPU_AVX2) && (b & need) == need) {
        flags |= KVF_CPU_AVX512;
        if ((c >> 11) & 1) flags |= KVF_CPU_AVX512_VNNI;
        if ((c >> 1) & 1) flags |= KVF_CPU_AVX512_VBMI;
        int amx = ((d >> 22) & 1) && ((d >> 24) & 1) && ((d >> 25) & 1);
        unsigned a1, b1, c1, d1;
        if (a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && ((a1 >> 5) & 1))
            flags |= KVF_CPU_AVX512_BF16;
        if (amx && (xcr0 & 0x60000) == 0x60000 && (flags & KVF_CPU_AVX512_BF16) &&
            (flags & KVF_CPU_AVX512_VNNI) && amx_granted())
            flags |= KVF_CPU_AMX;
    }
    return flags;
}
#else
unsigned kvf_cpu_detect(void) { return 0; }
#endif

static const char *const level_names[] = { "ref", "avx2", "avx512", "amx" };

const char *kvf_cpu_level_name(kvf_cpu_level level) { return level_names[level]; }

static kvf_cpu_level best_level(unsigned flags)
{
    if (flags & KVF_CPU_AMX) return KVF_CPU_LEVEL_AMX;
    if ((flags & KVF_CPU_AVX512) && (flags & KVF_CPU_AVX512_VNNI)) return KVF_CPU_LEVEL_AVX512;
    if (flags & KVF_CPU_AVX2) return KVF_CPU_LEVEL_AVX2;
    return KVF_CPU_LEVEL_REF;
}

kvf_status kvf_cpu_level_parse(kvf_cpu_level *out, const char *name, unsigned flags, kvf_error *err)
{
    kvf_cpu_level best = best_level(flags);
    *out = best;
    if (!name || !*name || strcmp(name, "auto") == 0) return KVF_OK;
    for (int i = 0; i < 4; i++) {
        if (strcmp(name, level_names[i]) != 0) continue;
        if (i > (int)best)
            return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                            "this processor has no %s; the best it runs is %s", name, level_names[best]);
        *out = (kvf_cpu_level)i;
        return KVF_OK;
    }
    return kvf_fail(err, KVF_ERR_ARG, "unknown instruction set '%s'; use auto, ref, avx2, avx512 or amx", name);
}

/* A container may own two cores of ninety-six: more threads than its quota only wait. */
static int32_t cgroup_quota(void)
{
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (!f) return 0;
    char quota[32];
    long period = 0;
    int got = fscanf(f, "%31s %ld", quota, &period);
    fclose(f);
    long q = 0;
    if (got != 2 || period <= 0 || sscanf(quota, "%ld", &q) != 1 || q <= 0) return 0;
    long n = (q + period - 1) / period;
    return n > 1024 ? 1024 : (int32_t)n;
}

int32_t kvf_cpu_count(void)
{
    int32_t n = 0;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
    if (n < 1) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        n = online > 1024 ? 1024 : online < 1 ? 1 : (int32_t)online;
    }
    int32_t quota = cgroup_quota();
    return quota > 0 && quota < n ? quota : n;
}
