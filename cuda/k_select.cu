/* k_select.cu - choosing on the device: the k largest, a keep-set, rows by number, the next token.
 *
 * The k largest are found by their bits: floats map to integers of the same order, and eight bits at a time
 * a histogram says in which range the k-th largest lies. One block of threads does it all, and what it keeps
 * it writes in ascending order: each thread owns a run of elements, and a scan over the runs says where its
 * results go. So ties go to the lower index and the result is the same in every run.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/kernels.h"

enum { THREADS = 1024, BINS = 256 };

/* Larger floats have larger keys; NaN the smallest. */
KVF_DEV uint32_t key_of(float x)
{
    uint32_t u = kvf_bits(x);
    if (!(x == x)) return 0;
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* Sum over the block of a value of each thread, of those before it in `before`. part: 32 ints. */
KVF_DEV int block_scan(int v, int *before, int *part)
{
    int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5), sum = v;
    for (int m = 1; m < 32; m <<= 1) {
        int other = kvf_shfl(sum, lane - m < 0 ? 0 : lane - m);
        if (lane >= m) sum += other;
    }
    kvf_sync(); /* what stood in part is read */
    if (lane == 31) part[warp] = sum;
    kvf_sync();
    int all = 0, ahead = 0;
    for (int i = 0; i < THREADS / 32; i++) {
        if (i < warp) ahead += part[i];
        all += part[i];
    }
    *before = ahead + sum - v;
    return all;
}

struct run {
    int64_t i0, i1;
};

/* The run of elements that a thread owns. */
KVF_DEV run own_run(int64_t n)
{
    int64_t per = (n + THREADS - 1) / THREADS;
    run r = { per * threadIdx.x, per * (threadIdx.x + 1) };
    if (r.i1 > n) r.i1 = n;
    if (r.i0 > n) r.i0 = n;
    return r;
}

/* The k-th largest key, 1 <= k <= n, and how many keys are larger. bins: 256 ints. */
KVF_DEV uint32_t kth_key(const float *x, int32_t n, int32_t k, int *bins, int *larger)
{
    uint32_t prefix = 0, mask = 0;
    int above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        kvf_sync();
        for (int i = static_cast<int>(threadIdx.x); i < BINS; i += THREADS) bins[i] = 0;
        kvf_sync();
        for (int64_t i = threadIdx.x; i < n; i += THREADS) {
            uint32_t key = key_of(x[i]);
            if ((key & mask) == prefix) kvf_atomic_add(&bins[key >> shift & 255u], 1);
        }
        kvf_sync();
        int b = BINS - 1;
        while (b > 0 && above + bins[b] < k) above += bins[b--];
        prefix |= static_cast<uint32_t>(b) << shift;
        mask |= 255u << shift;
    }
    *larger = above;
    return prefix;
}

KVF_KERNEL(THREADS) topk_kernel(const float *x, int32_t n, int32_t k, int32_t *ids, int32_t *n_out)
{
    KVF_SHARED(int, bins, BINS);
    KVF_SHARED(int, part, 32);
    if (k > n) k = n;
    if (k < 1) {
        if (threadIdx.x == 0) *n_out = 0;
        return;
    }
    int larger, more = 0, equal = 0, ties_before, before;
    uint32_t cut = kth_key(x, n, k, bins, &larger);
    run r = own_run(n);
    for (int64_t i = r.i0; i < r.i1; i++) {
        more += key_of(x[i]) > cut;
        equal += key_of(x[i]) == cut;
    }
    block_scan(equal, &ties_before, part);
    int room = k - larger - ties_before, own_ties = equal < room ? equal : room > 0 ? room : 0;
    block_scan(more + own_ties, &before, part);
    for (int64_t i = r.i0; i < r.i1; i++) {
        uint32_t key = key_of(x[i]);
        if (key > cut || (key == cut && own_ties-- > 0)) ids[before++] = static_cast<int32_t>(i);
    }
    if (threadIdx.x == 0) *n_out = k;
}

void kvf_cuda_topk(const float *x, int32_t n, int32_t k, int32_t *ids, int32_t *n_out, cudaStream_t s)
{
    KVF_LAUNCH(topk_kernel, dim3(1), dim3(THREADS), 0, s, x, n, k, ids, n_out);
}

KVF_KERNEL(THREADS) keep_kernel(const float *x, int32_t n, float cut, int32_t sink, int32_t recent, int32_t *ids, int32_t *n_out)
{
    KVF_SHARED(int, part, 32);
    run r = own_run(n);
    int own = 0, before;
    for (int64_t i = r.i0; i < r.i1; i++) own += x[i] > cut || i < sink || i >= n - recent;
    int all = block_scan(own, &before, part);
    for (int64_t i = r.i0; i < r.i1; i++)
        if (x[i] > cut || i < sink || i >= n - recent) ids[before++] = static_cast<int32_t>(i);
    if (threadIdx.x == 0) *n_out = all;
}

void kvf_cuda_keep(const float *x, int32_t n, float cut, int32_t sink, int32_t recent, int32_t *ids, int32_t *n_out, cudaStream_t s)
{
    KVF_LAUNCH(keep_kernel, dim3(1), dim3(THREADS), 0, s, x, n, cut, sink, recent, ids, n_out);
}

KVF_KERNEL(256) gather_kernel(const uint32_t *src, const int32_t *ids, uint32_t *out, int64_t n, int64_t words)
{
    for (int64_t i = kvf_first(); i < n * words; i += kvf_stride()) out[i] = src[ids[i / words] * words + i % words];
}

KVF_KERNEL(256) gather16_kernel(const uint32_t *src, const int32_t *ids, uint32_t *out, int64_t n, int64_t quads)
{
    for (int64_t i = kvf_first(); i < n * quads; i += kvf_stride())
        kvf_store16(out + 4 * i, kvf_load16(src + 4 * (ids[i / quads] * quads + i % quads)));
}

void kvf_cuda_gather(const void *src, const int32_t *ids, void *out, int64_t n, int64_t row_bytes, cudaStream_t s)
{
    const uint32_t *from = static_cast<const uint32_t *>(src);
    uint32_t *to = static_cast<uint32_t *>(out);
    int64_t words = row_bytes / 4, quads = row_bytes / 16;
    if (row_bytes % 16 == 0)
        KVF_LAUNCH(gather16_kernel, dim3(kvf_blocks(n * quads, 256, 65536)), dim3(256), 0, s, from, ids, to, n, quads);
    else
        KVF_LAUNCH(gather_kernel, dim3(kvf_blocks(n * words, 256, 65536)), dim3(256), 0, s, from, ids, to, n, words);
}

/* ---- The next token ------------------------------------------------------------------------------------ */

KVF_DEV float block_join(float v, bool max, float *part)
{
    v = max ? kvf_warp_max(v) : kvf_warp_sum(v);
    kvf_sync();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    kvf_sync();
    v = part[threadIdx.x & 31];
    return max ? kvf_warp_max(v) : kvf_warp_sum(v);
}

/* A block takes a row. Ties go to the lower index, as in the CPU's sampler. */
KVF_KERNEL(THREADS) argmax_kernel(const float *x, int32_t width, int32_t *out)
{
    KVF_SHARED(float, best_of, 32);
    KVF_SHARED(int, at_of, 32);
    const float *row = x + static_cast<int64_t>(blockIdx.x) * width;
    float best = -INFINITY;
    int at = width;
    for (int i = static_cast<int>(threadIdx.x); i < width; i += THREADS)
        if (row[i] > best || (at == width && row[i] == best)) {
            best = row[i];
            at = i;
        }
    for (int step = 0; step < 2; step++) {
        for (int m = 16; m; m >>= 1) {
            float b = kvf_shfl_xor(best, m);
            int a = kvf_shfl_xor(at, m);
            if (b > best || (b == best && a < at)) {
                best = b;
                at = a;
            }
        }
        if (step == 1) break;
        if ((threadIdx.x & 31) == 0) {
            best_of[threadIdx.x >> 5] = best;
            at_of[threadIdx.x >> 5] = at;
        }
        kvf_sync();
        best = best_of[threadIdx.x & 31];
        at = at_of[threadIdx.x & 31];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = at < width ? at : 0;
}

void kvf_cuda_argmax(const float *x, int64_t n_row, int32_t width, int32_t *out, cudaStream_t s)
{
    KVF_LAUNCH(argmax_kernel, dim3(static_cast<unsigned>(n_row)), dim3(THREADS), 0, s, x, width, out);
}

/* exp of the logits that are >= low, over their maximum, summed. */
KVF_DEV float mass_above(const float *x, int32_t n, float low, float max, float inv_t, float *part)
{
    float sum = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += THREADS)
        if (x[i] >= low) sum += expf((x[i] - max) * inv_t);
    return block_join(sum, false, part);
}

KVF_DEV float value_of_key(uint32_t key) { return kvf_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/* As model/sampler.c, with cuts as a least logit: top_k, of what that leaves the fewest tokens whose shares
 * reach top_p, of those the ones with min_p of the best share. Ties with the last one kept stay. The cut of
 * top_p is found by halving the interval of keys: 32 sums over the row. */
KVF_KERNEL(THREADS) sample_kernel(const float *x, int32_t n, kvf_cuda_sample p, int32_t *out)
{
    KVF_SHARED(int, bins, BINS);
    KVF_SHARED(float, part, 32);
    KVF_SHARED(int, first, 2); /* the token; the last one looked at */
    float max = -INFINITY, inv_t = 1.0f / p.temperature;
    int larger;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += THREADS) max = fmaxf(max, x[i]);
    max = block_join(max, true, part);
    float low = p.top_k > 0 && p.top_k < n ? value_of_key(kth_key(x, n, p.top_k, bins, &larger)) : -INFINITY;
    if (p.top_p < 1.0f) {
        float want = p.top_p * mass_above(x, n, low, max, inv_t, part);
        uint32_t a = key_of(low), b = key_of(max); /* enough lies at or above a */
        while (a < b) {
            uint32_t mid = a + (b - a) / 2 + 1;
            if (mass_above(x, n, value_of_key(mid), max, inv_t, part) >= want)
                a = mid;
            else
                b = mid - 1;
        }
        low = value_of_key(a);
    }
    if (p.min_p > 0.0f) low = fmaxf(low, max + logf(p.min_p) * p.temperature);
    if (low > max) low = max;
    /* Threads own runs in order; the one whose run holds the drawn point finds the token. */
    run r = own_run(n);
    float own = 0.0f;
    for (int64_t i = r.i0; i < r.i1; i++)
        if (x[i] >= low) own += expf((x[i] - max) * inv_t);
    float sum = own;
    int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5);
    for (int m = 1; m < 32; m <<= 1) {
        float other = kvf_shfl(sum, lane - m < 0 ? 0 : lane - m);
        if (lane >= m) sum += other;
    }
    kvf_sync();
    if (lane == 31) part[warp] = sum;
    if (threadIdx.x == 0) {
        first[0] = n;
        first[1] = 0;
    }
    kvf_sync();
    float before = sum - own, all = 0.0f;
    for (int i = 0; i < THREADS / 32; i++) {
        if (i < warp) before += part[i];
        all += part[i];
    }
    float at = before, point = p.u * all;
    int mine = n, last = -1;
    for (int64_t i = r.i0; i < r.i1 && before <= point; i++) {
        if (!(x[i] >= low)) continue;
        last = static_cast<int>(i);
        at += expf((x[i] - max) * inv_t);
        if (at > point) {
            mine = last;
            break;
        }
    }
    /* Rounding may leave the point past every run: then the last token that stands. */
    if (mine < n) kvf_atomic_min(&first[0], mine);
    if (last >= 0) kvf_atomic_max(&first[1], last);
    kvf_sync();
    if (threadIdx.x == 0) *out = first[0] < n ? first[0] : first[1];
}

void kvf_cuda_sample_row(const float *logits, int32_t width, const kvf_cuda_sample *p, int32_t *out, cudaStream_t s)
{
    kvf_cuda_sample q = *p;
    KVF_LAUNCH(sample_kernel, dim3(1), dim3(THREADS), 0, s, logits, width, q, out);
}
