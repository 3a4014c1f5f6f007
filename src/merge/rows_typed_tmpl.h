/* rows_typed_tmpl.h - the ops of one element type. Included once per type by rows_avx2.c and rows_avx512.c
 * with TYPE (the C type), NAME(x) (a suffix) and LOAD, LOAD_N, STORE, STORE_N (a vector of floats from and to
 * TYPE; _N: the first n) defined; undefines them.
 *
 * SPDX-License-Identifier: Apache-2.0 */

static inline vf NAME(some)(const TYPE *p, int64_t n) { return n >= VF_LANES ? LOAD(p) : LOAD_N(p, n); }

/* Four sums of each kind hide the latency of an fma. The row `cur` comes from memory, `prev` from cache. Rows of a
 * frame lie one after another, so what is PREFETCH_BYTES ahead is soon wanted too; measured 4 to 8 KiB, into the
 * second level: f16 5.2 -> 3.5 ms, f32 6.0 -> 5.2 ms for 32 x 196 x 3584. */
static void NAME(pair)(const void *prev, const void *cur, int64_t n, double out[2])
{
    const TYPE *a = prev, *b = cur;
    vf d0 = vf_zero(), d1 = d0, d2 = d0, d3 = d0, s0 = d0, s1 = d0, s2 = d0, s3 = d0;
    int64_t i = 0;
    for (; i + 4 * VF_LANES <= n; i += 4 * VF_LANES) {
        for (size_t line = 0; line < 4 * VF_LANES * sizeof(TYPE); line += 64)
            __builtin_prefetch((const char *)(b + i) + PREFETCH_BYTES + line, 0, 2);
        vf x0 = LOAD(b + i), x1 = LOAD(b + i + VF_LANES);
        vf x2 = LOAD(b + i + 2 * VF_LANES), x3 = LOAD(b + i + 3 * VF_LANES);
        d0 = vf_fma(x0, LOAD(a + i), d0);
        d1 = vf_fma(x1, LOAD(a + i + VF_LANES), d1);
        d2 = vf_fma(x2, LOAD(a + i + 2 * VF_LANES), d2);
        d3 = vf_fma(x3, LOAD(a + i + 3 * VF_LANES), d3);
        s0 = vf_fma(x0, x0, s0);
        s1 = vf_fma(x1, x1, s1);
        s2 = vf_fma(x2, x2, s2);
        s3 = vf_fma(x3, x3, s3);
    }
    for (; i < n; i += VF_LANES) {
        vf x = NAME(some)(b + i, n - i);
        d0 = vf_fma(x, NAME(some)(a + i, n - i), d0);
        s0 = vf_fma(x, x, s0);
    }
    out[0] = (double)vf_sum(vf_add(vf_add(d0, d1), vf_add(d2, d3)));
    out[1] = (double)vf_sum(vf_add(vf_add(s0, s1), vf_add(s2, s3)));
}

static void NAME(widen)(float *dst, const void *src, int64_t n)
{
    const TYPE *p = src;
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store(dst + i, LOAD(p + i));
    if (i < n) vf_store_n(dst + i, LOAD_N(p + i, n - i), n - i);
}

static void NAME(narrow)(void *dst, const float *src, int64_t n)
{
    TYPE *p = dst;
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) STORE(p + i, vf_load(src + i));
    if (i < n) STORE_N(p + i, vf_load_n(src + i, n - i), n - i);
}

/* Four sources a pass: the sums are read and written once for four rows that come from memory. */
static void NAME(add4)(float *acc, const void *const *src, const float *w, int64_t n)
{
    const TYPE *a = src[0], *b = src[1], *c = src[2], *d = src[3];
    vf wa = vf_set1(w[0]), wb = vf_set1(w[1]), wc = vf_set1(w[2]), wd = vf_set1(w[3]);
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) {
        vf s = vf_fma(wb, LOAD(b + i), vf_fma(wa, LOAD(a + i), vf_load(acc + i)));
        vf_store(acc + i, vf_fma(wd, LOAD(d + i), vf_fma(wc, LOAD(c + i), s)));
    }
    if (i < n) {
        int64_t m = n - i;
        vf s = vf_fma(wb, LOAD_N(b + i, m), vf_fma(wa, LOAD_N(a + i, m), vf_load_n(acc + i, m)));
        vf_store_n(acc + i, vf_fma(wd, LOAD_N(d + i, m), vf_fma(wc, LOAD_N(c + i, m), s)), m);
    }
}

static void NAME(add)(float *acc, const void *const *src, const float *w, int64_t n_src, int64_t n)
{
    for (; n_src >= 4; n_src -= 4, src += 4, w += 4) NAME(add4)(acc, src, w, n);
    for (; n_src > 0; n_src--, src++, w++) {
        const TYPE *a = src[0];
        vf wa = vf_set1(w[0]);
        int64_t i = 0;
        for (; i + VF_LANES <= n; i += VF_LANES) vf_store(acc + i, vf_fma(wa, LOAD(a + i), vf_load(acc + i)));
        if (i < n) vf_store_n(acc + i, vf_fma(wa, LOAD_N(a + i, n - i), vf_load_n(acc + i, n - i)), n - i);
    }
}

#undef TYPE
#undef NAME
#undef LOAD
#undef LOAD_N
#undef STORE
#undef STORE_N
