/* k_digest.cu - digests and representatives of a block's raw keys (base/digest.h).
 *
 * A digest must be the same bytes wherever it was made, so this is src/backend/cpu/digest_ref.c with a
 * thread for each channel: sums in double, in the order of the tokens, and no product fused with a sum.
 * The root and the quotients are correctly rounded on the device too (IEEE 754, CUDA C programming guide).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/kernels.h"

struct channel {
    double mean, dev;
    float min, max;
};

struct keys_of { /* one KV head of one slot, the last key repeated */
    const f16 *k;
    int d, n_tok;
};

KVF_DEV float key_at(const keys_of &s, int t, int c)
{
    return kvf_f32(s.k[static_cast<size_t>(t < s.n_tok ? t : s.n_tok - 1) * s.d + c]);
}

KVF_DEV channel look(const keys_of &s, int c, int t0, int t1)
{
    channel r = { 0, 0, INFINITY, -INFINITY };
    for (int t = t0; t < t1; t++) {
        float x = key_at(s, t, c);
        r.mean = kvf_add_rn(r.mean, static_cast<double>(x));
        if (x < r.min) r.min = x;
        if (x > r.max) r.max = x;
    }
    r.mean /= t1 - t0;
    for (int t = t0; t < t1; t++) {
        double x = kvf_add_rn(static_cast<double>(key_at(s, t, c)), -r.mean);
        r.dev = kvf_add_rn(r.dev, kvf_mul_rn(x, x));
    }
    r.dev = sqrt(r.dev / (t1 - t0));
    return r;
}

KVF_DEV float f16_round(double x)
{
    float f = static_cast<float>(x);
    if (f > 65504.0f) f = 65504.0f;
    if (f < -65504.0f) f = -65504.0f;
    return kvf_f32(kvf_f16_of(f));
}

KVF_DEV void put_f16(uint8_t *p, float x)
{
    f16 h = kvf_f16_of(x);
    memcpy(p, &h, 2);
}

/* Levels around the mean, `spread` deviations apart: digest_ref.c says where the numbers are from. */
KVF_DEV double spread_of(int bits) { return bits == 1 ? 1.596 : bits == 2 ? 0.996 : 0.335; }

/* Lowest level and step of a channel of a group of tokens. */
KVF_DEV void bits_levels(const kvf_digest &g, const keys_of &s, int t0, int c, uint8_t *out)
{
    int d = g.head_dim, top = (1 << g.bits) - 1;
    channel r = look(s, c, t0, t0 + KVF_DIGEST_GROUP);
    float step = f16_round(kvf_mul_rn(r.dev, spread_of(g.bits)));
    put_f16(out + 2 * c, f16_round(kvf_add_rn(r.mean, -kvf_mul_rn(static_cast<double>(step), static_cast<double>(top)) / 2)));
    put_f16(out + 2 * (d + c), step);
}

KVF_DEV double f16_value(const uint8_t *p)
{
    f16 h;
    memcpy(&h, p, 2);
    return static_cast<double>(kvf_f32(h));
}

/* Codes. A byte holds those of 8 / bits quads of channels: the thread of the first writes it whole. */
KVF_DEV void bits_codes(const kvf_digest &g, const keys_of &s, int t0, int c, uint8_t *out)
{
    int d = g.head_dim, per = 8 / g.bits, rows = d / 4 / per, top = (1 << g.bits) - 1, quad = c / 4;
    if (quad % per) return;
    for (int t = 0; t < KVF_DIGEST_GROUP; t++) {
        uint32_t byte = 0;
        for (int i = 0; i < per; i++) {
            int ch = (quad + i) * 4 + c % 4;
            double lo = f16_value(out + 2 * ch), step = f16_value(out + 2 * (d + ch));
            double x = step > 0 ? kvf_add_rn(static_cast<double>(key_at(s, t0 + t, ch)), -lo) / step : 0;
            int n = x > 0 ? static_cast<int>(x < top ? kvf_add_rn(x, 0.5) : top) : 0;
            byte |= static_cast<uint32_t>(n) << (i * g.bits);
        }
        out[4 * d + (t / 16 * rows + quad / per) * 64 + t % 16 * 4 + c % 4] = static_cast<uint8_t>(byte);
    }
}

/* A block of threads for each KV head (x), item (y) and group of tokens (z): 64 of BITS, `sub` of the others. */
KVF_KERNEL(256) digest_kernel(kvf_digest g, const kvf_cuda_digest_item *items, uint8_t *out, size_t head_bytes)
{
    int h = static_cast<int>(blockIdx.x), d = g.head_dim, z = static_cast<int>(blockIdx.z);
    kvf_cuda_digest_item item = items[blockIdx.y];
    keys_of s = { item.slot + static_cast<size_t>(h) * KVF_BLOCK * d, d, item.n_tok };
    uint8_t *to = out + (static_cast<size_t>(blockIdx.y) * g.n_head_kv + h) * head_bytes;
    if (g.kind == KVF_DIGEST_BITS) {
        size_t group = 4 * static_cast<size_t>(d) + static_cast<size_t>(KVF_DIGEST_GROUP) * d * g.bits / 8;
        uint8_t *at = to + z * group;
        int t0 = z * KVF_DIGEST_GROUP, me = static_cast<int>(threadIdx.x), all = static_cast<int>(blockDim.x);
        for (int c = me; c < d; c += all) bits_levels(g, s, t0, c, at);
        kvf_sync(); /* levels of all channels */
        for (int c = me; c < d; c += all) bits_codes(g, s, t0, c, at);
        return;
    }
    int n = KVF_DIGEST_BLOCK / g.sub;
    for (int c = static_cast<int>(threadIdx.x); c < d; c += static_cast<int>(blockDim.x)) {
        channel r = look(s, c, z * g.sub, (z + 1) * g.sub);
        if (g.kind == KVF_DIGEST_MEAN) {
            put_f16(to + 2 * (z * d + c), static_cast<float>(r.mean));
        } else {
            put_f16(to + 2 * (z * d + c), r.min);
            put_f16(to + 2 * ((n + z) * d + c), r.max);
        }
    }
}

void kvf_cuda_digest(const kvf_digest *shape, const kvf_cuda_digest_item *items, int64_t n, uint8_t *out, cudaStream_t s)
{
    kvf_digest g = *shape;
    size_t head_bytes = kvf_digest_head_bytes(shape);
    unsigned z = static_cast<unsigned>(g.kind == KVF_DIGEST_BITS ? KVF_DIGEST_BLOCK / KVF_DIGEST_GROUP : KVF_DIGEST_BLOCK / g.sub);
    unsigned threads = (static_cast<unsigned>(g.head_dim < 256 ? g.head_dim : 256) + 31) / 32 * 32;
    dim3 grid(static_cast<unsigned>(g.n_head_kv), static_cast<unsigned>(n), z);
    KVF_LAUNCH(digest_kernel, grid, dim3(threads), 0, s, g, items, out, head_bytes);
}

/* ---- Representatives --------------------------------------------------------------------------------------- */

/* A block for each vector (x), unit (y) and KV head (z). Thread t ranks token t, then each takes channels. */
KVF_KERNEL(128) reps_kernel(kvf_digest g, const f16 *slot, const float *score, int32_t r, uint8_t *out, size_t head_bytes)
{
    KVF_SHARED(double, s, KVF_DIGEST_BLOCK);
    KVF_SHARED(int, order, KVF_DIGEST_BLOCK);
    int group = g.n_head / g.n_head_kv, n_vec = g.reps_per_q_head ? group : 1, d = g.head_dim;
    int v = static_cast<int>(blockIdx.x), u = static_cast<int>(blockIdx.y), h = static_cast<int>(blockIdx.z), t = static_cast<int>(threadIdx.x);
    const float *sc = score + static_cast<size_t>(h) * group * KVF_BLOCK + u * g.sub;
    if (t < g.sub) {
        double sum = 0;
        for (int i = n_vec > 1 ? v : 0; i < (n_vec > 1 ? v + 1 : group); i++) sum = kvf_add_rn(sum, static_cast<double>(sc[i * KVF_BLOCK + t]));
        s[t] = sum;
        order[t] = t;
    }
    kvf_sync();
    if (t < g.sub) {
        int rank = 0;
        for (int i = 0; i < g.sub; i++) rank += s[i] > s[t] || (s[i] == s[t] && i < t);
        order[rank] = t; /* a rank each, unless scores are NaN */
    }
    kvf_sync();
    const f16 *k = slot + (static_cast<size_t>(h) * KVF_BLOCK + static_cast<size_t>(u) * g.sub) * d;
    float *to = reinterpret_cast<float *>(out + static_cast<size_t>(h) * head_bytes) + (static_cast<size_t>(u) * n_vec + v) * d;
    int n = r < g.sub ? r : g.sub;
    for (int c = t; c < d; c += 128) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum = kvf_add_rn(sum, static_cast<double>(kvf_f32(k[static_cast<size_t>(order[i]) * d + c])));
        to[c] = static_cast<float>(sum / n);
    }
}

void kvf_cuda_reps(const kvf_digest *shape, const f16 *slot, const float *score, int32_t r, uint8_t *out, cudaStream_t s)
{
    kvf_digest g = *shape;
    size_t head_bytes = kvf_digest_head_bytes(shape);
    unsigned n_vec = static_cast<unsigned>(g.reps_per_q_head ? g.n_head / g.n_head_kv : 1);
    dim3 grid(n_vec, static_cast<unsigned>(KVF_DIGEST_BLOCK / g.sub), static_cast<unsigned>(g.n_head_kv));
    KVF_LAUNCH(reps_kernel, grid, dim3(128), 0, s, g, slot, score, r, out, head_bytes);
}
