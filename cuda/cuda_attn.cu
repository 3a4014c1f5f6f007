/* cuda_attn.cu - attention and what moves keys: lists of slots to the device, and how work is cut.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda_int.h"

/* ---- Lists on the device ------------------------------------------------------------------------------ */

/* Addresses of the slots of entries e0 .. e0 + n to `to`. */
static void put_slots(const kvf_kv_view *kv, const int32_t *slots, int64_t e0, int64_t n, char *to)
{
    for (int64_t i = 0; i < n; i++) {
        void *at = kvf_kv_slot(kv, slots[e0 + i]);
        memcpy(to + static_cast<size_t>(i) * sizeof at, &at, sizeof at);
    }
}

static size_t round_up(size_t n) { return (n + 15) / 16 * 16; }

static kvf_status check_heads(int32_t head_dim, kvf_error *err)
{
    if (head_dim >= 8 && head_dim <= KVF_CUDA_HEAD_MAX && head_dim % 8 == 0) return KVF_OK;
    return kvf_fail(err, KVF_ERR_UNSUPPORTED, "heads of %d channels; the CUDA backend takes multiples of 8 up to %d; use the CPU",
                    head_dim, KVF_CUDA_HEAD_MAX);
}

/* Slots, holes, places and first keys of a call in one part of the ring. */
static kvf_status send_list(kvf_cuda_backend *c, const kvf_attn_args *a, kvf_cuda_attn *k, kvf_error *err)
{
    size_t n = static_cast<size_t>((a->n_key + KVF_BLOCK - 1) / KVF_BLOCK), slots = round_up(n * sizeof(void *));
    size_t each = round_up(static_cast<size_t>(a->n_tok) * sizeof(int32_t)), valid = a->valid ? round_up(2 * n) : 0;
    size_t place = a->place ? each : 0, first = a->first ? each : 0, at = slots + valid;
    if (at + place + first == 0) return KVF_OK;
    kvf_cuda_part p;
    KVF_TRY(kvf_cuda_ring_take(c, at + place + first, &p, err));
    put_slots(a->kv, a->slots, 0, static_cast<int64_t>(n), p.host);
    if (valid) memcpy(p.host + slots, a->valid, 2 * n);
    if (place) memcpy(p.host + at, a->place, static_cast<size_t>(a->n_tok) * sizeof(int32_t));
    if (first) memcpy(p.host + at + place, a->first, static_cast<size_t>(a->n_tok) * sizeof(int32_t));
    KVF_TRY(kvf_cuda_ring_send(c, &p, err));
    k->slot = reinterpret_cast<const f16 *const *>(p.dev);
    k->valid = valid ? reinterpret_cast<const uint8_t *>(p.dev + slots) : nullptr;
    k->place = place ? reinterpret_cast<const int32_t *>(p.dev + at) : nullptr;
    k->first = first ? reinterpret_cast<const int32_t *>(p.dev + at + place) : nullptr;
    return KVF_OK;
}

/* ---- How a call is cut ---------------------------------------------------------------------------------- */

static int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* Few rows: two blocks for each multiprocessor (that is what fits beside each other), each at least two
 * KV blocks long. Many rows: runs only where the tiles alone leave multiprocessors idle, each at least eight
 * KV blocks long, since a run reads its queries anew and writes fp32 results that have to be merged. */
kvf_cuda_plan kvf_cuda_attn_plan(const kvf_attn_args *a, int32_t n_kv, int32_t n_sm)
{
    kvf_cuda_plan p = { false, 1, 0, 0 };
    int64_t rows = a->n_tok * (a->n_head / a->n_head_kv), first = 0;
    p.decode = rows <= KVF_CUDA_DECODE_ROWS;
    int64_t q0 = a->place ? a->place[0] : a->q_first, q1 = a->place ? a->place[a->n_tok - 1] : a->q_first + a->n_tok - 1;
    if (a->window > 0) first = q0 - a->window + 1;
    if (a->first && a->first[0] > first) first = a->first[0];
    if (first > a->n_key) first = a->n_key;
    if (first > 0) p.key0 = static_cast<int32_t>(first / KVF_BLOCK * KVF_BLOCK);
    int64_t end = q1 + 1 < a->n_key ? q1 + 1 : a->n_key;
    int64_t blocks = end > p.key0 ? up(end - p.key0, KVF_BLOCK) : 0;
    int64_t parts = p.decode ? n_kv : n_kv * up(rows, a->head_dim > 128 ? 64 : 128);
    int64_t want = p.decode ? up(2 * static_cast<int64_t>(n_sm), parts) : n_sm / parts, most = blocks / (p.decode ? 2 : 8);
    int64_t n = want < most ? want : most;
    if (n < 1) n = 1;
    int64_t per = blocks > 0 ? up(blocks, n) : 1;
    p.split_keys = static_cast<int32_t>(per * KVF_BLOCK);
    if (blocks > 0) p.n_split = static_cast<int32_t>(up(blocks, per));
    return p;
}

static kvf_status prepare(kvf_cuda_backend *c, const kvf_attn_args *a, kvf_cuda_attn *k, kvf_error *err)
{
    KVF_TRY(check_heads(a->head_dim, err));
    if (a->n_key > INT32_MAX - 4 * KVF_BLOCK || a->n_tok * (a->n_head / a->n_head_kv) > INT32_MAX / 2)
        return kvf_fail(err, KVF_ERR_LIMIT, "attention of %lld queries to %lld keys; a list ends at 2^31 keys",
                        static_cast<long long>(a->n_tok), static_cast<long long>(a->n_key));
    *k = kvf_cuda_attn();
    k->q = a->q;
    k->o = a->o;
    k->lse = a->lse;
    k->n_tok = static_cast<int32_t>(a->n_tok);
    k->n_head = a->n_head;
    k->n_head_kv = a->n_head_kv;
    k->head_dim = a->head_dim;
    k->head_kv0 = a->head_kv1 > 0 ? a->head_kv0 : 0;
    k->n_kv = a->head_kv1 > 0 ? a->head_kv1 - a->head_kv0 : a->n_head_kv;
    k->scale = a->scale;
    k->softcap = a->softcap;
    k->n_key = static_cast<int32_t>(a->n_key);
    k->q_first = a->q_first;
    k->window = a->window;
    k->n_split = 1;
    return send_list(c, a, k, err);
}

kvf_status kvf_cuda_op_attn(kvf_backend *b, const kvf_attn_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    kvf_cuda_attn k;
    if (a->n_tok <= 0) return KVF_OK;
    KVF_TRY(prepare(c, a, &k, err));
    kvf_cuda_plan plan = kvf_cuda_attn_plan(a, k.n_kv, c->n_sm);
    k.n_split = plan.n_split;
    k.split_keys = plan.split_keys;
    k.key0 = plan.key0;
    if (plan.n_split > 1) {
        size_t rows = static_cast<size_t>(plan.n_split) * static_cast<size_t>(a->n_tok * a->n_head);
        void *part;
        KVF_TRY(kvf_cuda_need(c, KVF_CUDA_PART, rows * (static_cast<size_t>(a->head_dim) + 1) * sizeof(float), &part, err));
        k.part_o = static_cast<float *>(part);
        k.part_lse = k.part_o + rows * static_cast<size_t>(a->head_dim);
    }
    if (plan.decode) {
        kvf_cuda_attn_decode(&k, c->stream);
        c->ran_attn_decode = "mma_splitkv";
    } else {
        kvf_cuda_attn_prefill(&k, c->stream);
        c->ran_attn = "mma_prefill";
    }
    if (plan.n_split > 1) kvf_cuda_attn_join(&k, c->stream);
    return kvf_cuda_check(c, "attention", err);
}

/* ---- Where attention went ---------------------------------------------------------------------------------- */

kvf_status kvf_cuda_op_attn_mass(kvf_backend *b, const kvf_attn_mass_args *m, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    const kvf_attn_args *a = m->attn;
    kvf_cuda_attn k;
    if (a->n_tok < 1 || a->n_key < 1) return KVF_OK;
    KVF_TRY(prepare(c, a, &k, err));
    int32_t group = a->n_head / a->n_head_kv, h0 = k.head_kv0 * group, heads = k.n_kv * group;
    int64_t width = up(a->n_key, KVF_BLOCK) * KVF_BLOCK, rows = m->sum_heads ? 1 : heads;
    size_t all = static_cast<size_t>(a->n_head) * static_cast<size_t>(width), want = static_cast<size_t>(rows * width);
    void *part, *host;
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_PART, (all + static_cast<size_t>(width)) * sizeof(float), &part, err));
    float *mass = static_cast<float *>(part), *from = mass + h0 * width;
    kvf_cuda_attn_mass(&k, mass, c->stream);
    if (m->sum_heads) {
        from = mass + all;
        kvf_cuda_sum_heads(mass, from, h0, h0 + heads, width, c->stream);
    }
    KVF_TRY(kvf_cuda_check(c, "sums of attention", err));
    KVF_TRY(kvf_mem_get(b->mem, &host, want, sizeof(float), err));
    kvf_status rc = kvf_cuda_download(c, host, from, want * sizeof(float), err);
    float *to = m->mass + (m->sum_heads ? 0 : h0 * width);
    for (size_t i = 0; rc >= 0 && i < want; i++) to[i] += static_cast<const float *>(host)[i];
    kvf_free(b->mem, host);
    return rc;
}

/* ---- Keys and values into, between and within slots ------------------------------------------------------- */

kvf_status kvf_cuda_op_kv_put(kvf_backend *b, const kvf_kv_put_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    if (a->n_tok <= 0) return KVF_OK;
    int64_t e0 = a->first >> KVF_BLOCK_SHIFT, n = ((a->first + a->n_tok - 1) >> KVF_BLOCK_SHIFT) + 1 - e0;
    kvf_cuda_part p;
    KVF_TRY(kvf_cuda_ring_take(c, static_cast<size_t>(n) * sizeof(void *), &p, err));
    put_slots(a->kv, a->slots, e0, n, p.host);
    KVF_TRY(kvf_cuda_ring_send(c, &p, err));
    kvf_cuda_put k = { a->k, a->v, reinterpret_cast<f16 *const *>(p.dev), a->n_tok, static_cast<int32_t>(a->first & (KVF_BLOCK - 1)),
                       a->n_head_kv, a->head_dim };
    kvf_cuda_kv_put(&k, c->stream);
    return kvf_cuda_check(c, "storing keys", err);
}

kvf_status kvf_cuda_op_kv_turn(kvf_backend *b, const kvf_kv_turn_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    if (a->n_tok <= 0) return KVF_OK;
    int64_t e0 = a->first >> KVF_BLOCK_SHIFT, n = ((a->first + a->n_tok - 1) >> KVF_BLOCK_SHIFT) + 1 - e0;
    size_t bytes = round_up(static_cast<size_t>(n) * sizeof(void *));
    kvf_cuda_part p;
    KVF_TRY(kvf_cuda_ring_take(c, 2 * bytes, &p, err));
    put_slots(a->kv, a->src, e0, n, p.host);
    put_slots(a->kv, a->dst, e0, n, p.host + bytes);
    KVF_TRY(kvf_cuda_ring_send(c, &p, err));
    kvf_cuda_turn k = { reinterpret_cast<const f16 *const *>(p.dev), reinterpret_cast<f16 *const *>(p.dev + bytes), a->cos_sin, a->n_tok,
                        static_cast<int32_t>(a->first & (KVF_BLOCK - 1)), a->n_head_kv, a->head_dim, a->n_rot, a->kind };
    kvf_cuda_kv_turn(&k, c->stream);
    return kvf_cuda_check(c, "turning keys", err);
}

/* Tokens that go through the rows at a time. The lists may be the same slots: since from rises and lies at
 * or after its target, what a batch writes is before all that later batches read. */
static const int64_t GATHER_BATCH = 4096;

static kvf_status gather_batch(kvf_cuda_backend *c, const kvf_kv_gather_args *a, int64_t i0, int64_t n, f16 *rows, kvf_error *err)
{
    int64_t d0 = (a->first + i0) >> KVF_BLOCK_SHIFT, dst_n = ((a->first + i0 + n - 1) >> KVF_BLOCK_SHIFT) + 1 - d0;
    int64_t n_list = a->from_stride ? a->n_head_kv : 1;
    int32_t low = a->from[i0], high = low;
    for (int64_t i = 0; i < n_list * n; i++) {
        int32_t from = a->from[i / n * a->from_stride + i0 + i % n];
        if (from < low) low = from;
        if (from > high) high = from;
    }
    int64_t s0 = low >> KVF_BLOCK_SHIFT, src_n = (high >> KVF_BLOCK_SHIFT) + 1 - s0;
    size_t src_bytes = round_up(static_cast<size_t>(src_n) * sizeof(void *)), dst_bytes = round_up(static_cast<size_t>(dst_n) * sizeof(void *));
    kvf_cuda_part p;
    KVF_TRY(kvf_cuda_ring_take(c, src_bytes + dst_bytes + static_cast<size_t>(n_list * n) * sizeof(int32_t), &p, err));
    put_slots(a->kv, a->src, s0, src_n, p.host);
    put_slots(a->kv, a->dst, d0, dst_n, p.host + src_bytes);
    for (int64_t i = 0; i < n_list * n; i++) {
        int32_t from = a->from[i / n * a->from_stride + i0 + i % n] - static_cast<int32_t>(s0 * KVF_BLOCK);
        memcpy(p.host + src_bytes + dst_bytes + static_cast<size_t>(i) * sizeof from, &from, sizeof from);
    }
    KVF_TRY(kvf_cuda_ring_send(c, &p, err));
    kvf_cuda_places k = { reinterpret_cast<f16 *const *>(p.dev), reinterpret_cast<const int32_t *>(p.dev + src_bytes + dst_bytes),
                          a->from_stride ? n : 0, rows, n, 0,
                          a->n_head_kv, a->head_dim };
    kvf_cuda_kv_pick(&k, c->stream);
    k.slot = reinterpret_cast<f16 *const *>(p.dev + src_bytes);
    k.from = nullptr;
    k.first = static_cast<int32_t>((a->first + i0) & (KVF_BLOCK - 1));
    kvf_cuda_kv_place(&k, c->stream);
    return KVF_OK;
}

kvf_status kvf_cuda_op_kv_gather(kvf_backend *b, const kvf_kv_gather_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    if (a->n <= 0) return KVF_OK;
    KVF_TRY(check_heads(a->head_dim, err));
    int64_t batch = a->n < GATHER_BATCH ? a->n : GATHER_BATCH;
    void *rows;
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_PART, static_cast<size_t>(batch * 2 * a->n_head_kv * a->head_dim) * sizeof(f16), &rows, err));
    for (int64_t i = 0; i < a->n; i += batch)
        KVF_TRY(gather_batch(c, a, i, a->n - i < batch ? a->n - i : batch, static_cast<f16 *>(rows), err));
    return kvf_cuda_check(c, "moving keys", err);
}
