/* cuda_far.cu - digests, representatives and votes: what policies ask about far blocks.
 *
 * Their results and the rows of digests are host memory, so these ops wait for the device and end a
 * recorded step.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda_int.h"

/* Scores of a batch of queries take at most this much; the rest of a chunk comes in later batches. */
static const size_t VOTE_SCRATCH = (size_t)256 << 20;

static size_t round_up(size_t n) { return (n + 255) / 256 * 256; }

static bool same_shape(const kvf_digest *a, const kvf_digest *b)
{
    return a->kind == b->kind && a->bits == b->bits && a->sub == b->sub && a->n_head == b->n_head &&
           a->n_head_kv == b->n_head_kv && a->head_dim == b->head_dim;
}

/* n items of one shape. */
static kvf_status digest_run(kvf_cuda_backend *c, const kvf_digest_args *a, int64_t n, kvf_error *err)
{
    const kvf_digest *g = a[0].digest;
    size_t bytes = kvf_digest_bytes(g), each = sizeof(kvf_cuda_digest_item);
    kvf_cuda_part p;
    void *dev, *host;
    KVF_TRY(kvf_cuda_ring_take(c, static_cast<size_t>(n) * each, &p, err));
    for (int64_t i = 0; i < n; i++) {
        kvf_cuda_digest_item item = { static_cast<const f16 *>(kvf_kv_slot(a[i].kv, a[i].slot)), a[i].n_tok };
        memcpy(p.host + static_cast<size_t>(i) * each, &item, each);
    }
    KVF_TRY(kvf_cuda_ring_send(c, &p, err));
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_FAR, static_cast<size_t>(n) * bytes, &dev, err));
    kvf_cuda_digest(g, reinterpret_cast<const kvf_cuda_digest_item *>(p.dev), n, static_cast<uint8_t *>(dev), c->stream);
    KVF_TRY(kvf_cuda_check(c, "digests", err));
    KVF_TRY(kvf_mem_get(c->base.mem, &host, static_cast<size_t>(n), bytes, err));
    kvf_status rc = kvf_cuda_download(c, host, dev, static_cast<size_t>(n) * bytes, err);
    for (int64_t i = 0; rc >= 0 && i < n; i++) memcpy(a[i].out, static_cast<char *>(host) + static_cast<size_t>(i) * bytes, bytes);
    kvf_free(c->base.mem, host);
    return rc;
}

kvf_status kvf_cuda_op_digest(kvf_backend *b, const kvf_digest_args *a, int64_t n, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    for (int64_t i = 0; i < n; i++)
        if (!kvf_digest_valid(a[i].digest) || a[i].digest->kind == KVF_DIGEST_REPS || a[i].digest->kind == KVF_DIGEST_NONE ||
            a[i].n_tok < 1 || a[i].n_tok > KVF_BLOCK)
            return kvf_fail(err, KVF_ERR_INTERNAL, "a digest of kind %d from %d tokens", static_cast<int>(a[i].digest->kind), a[i].n_tok);
    for (int64_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && end - i < 32768 && same_shape(a[i].digest, a[end].digest);) end++;
        KVF_TRY(digest_run(c, a + i, end - i, err));
    }
    return KVF_OK;
}

kvf_status kvf_cuda_op_reps(kvf_backend *b, const kvf_reps_args *a, kvf_error *err)
{
    kvf_cuda_backend *c = kvf_cuda_self(b);
    const kvf_digest *g = a->digest;
    if (!kvf_digest_valid(g) || g->kind != KVF_DIGEST_REPS || a->r < 1)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "representatives: %d of a digest of kind %d", a->r, static_cast<int>(g->kind));
    size_t score = round_up(static_cast<size_t>(g->n_head) * KVF_BLOCK * sizeof(float)), bytes = kvf_digest_bytes(g);
    void *dev;
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_FAR, score + bytes, &dev, err));
    uint8_t *out = static_cast<uint8_t *>(dev) + score;
    KVF_TRY(kvf_cuda_upload(c, dev, a->score, static_cast<size_t>(g->n_head) * KVF_BLOCK * sizeof(float), err));
    kvf_cuda_reps(g, static_cast<const f16 *>(kvf_kv_slot(a->kv, a->slot)), static_cast<const float *>(dev), a->r, out, c->stream);
    KVF_TRY(kvf_cuda_check(c, "representatives", err));
    return kvf_cuda_download(c, a->out, out, bytes, err);
}

/* ---- Votes ------------------------------------------------------------------------------------------- */

static kvf_status check_vote(const kvf_vote_args *a, kvf_error *err)
{
    const kvf_digest *g = a->digest;
    bool ok = kvf_digest_valid(g) && g->kind != KVF_DIGEST_NONE && a->n_q >= 1 && a->n_unit >= 1 && a->rule.pool >= 1 &&
              a->unit >= 16 && a->unit <= KVF_BLOCK && (a->unit & (a->unit - 1)) == 0 &&
              (g->kind == KVF_DIGEST_BITS || g->sub <= a->unit) && a->n_unit <= INT32_MAX / 2;
    if (!ok)
        return kvf_fail(err, KVF_ERR_INTERNAL, "a vote of %lld queries for %lld units of %d tokens", static_cast<long long>(a->n_q),
                        static_cast<long long>(a->n_unit), a->unit);
    if (g->head_dim > KVF_CUDA_HEAD_MAX)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "heads of %d channels; the CUDA backend takes up to %d; use the CPU", g->head_dim,
                        KVF_CUDA_HEAD_MAX);
    return KVF_OK;
}

/* Digests of the blocks of the units, one after another on the device, and a table of where they are. */
static kvf_status send_rows(kvf_cuda_backend *c, const kvf_vote_args *a, int64_t block0, int64_t n, const uint8_t *const **out, kvf_error *err)
{
    size_t bytes = kvf_digest_bytes(a->digest), each = round_up(static_cast<size_t>(n) * sizeof(void *));
    void *dev;
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_FAR, each + static_cast<size_t>(n) * bytes, &dev, err));
    uint8_t *rows = static_cast<uint8_t *>(dev) + each;
    KVF_TRY(kvf_cuda_upload_pieces(c, rows, a->rows + block0, n, bytes, err));
    kvf_cuda_part p;
    KVF_TRY(kvf_cuda_ring_take(c, static_cast<size_t>(n) * sizeof(void *), &p, err));
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *at = rows + static_cast<size_t>(i) * bytes;
        memcpy(p.host + static_cast<size_t>(i) * sizeof at, &at, sizeof at);
    }
    KVF_TRY(kvf_cuda_ring_send(c, &p, err));
    *out = reinterpret_cast<const uint8_t *const *>(p.dev);
    return KVF_OK;
}

kvf_status kvf_cuda_op_vote(kvf_backend *b, const kvf_vote_args *a, kvf_error *err)
{
    KVF_TRY(check_vote(a, err));
    kvf_cuda_backend *c = kvf_cuda_self(b);
    const kvf_digest *g = a->digest;
    int64_t per = KVF_BLOCK / a->unit, block0 = a->unit0 / per, n_block = (a->unit0 + a->n_unit - 1) / per + 1 - block0;
    int64_t n_q = (a->n_q + a->rule.pool - 1) / a->rule.pool;
    size_t heads = static_cast<size_t>(g->n_head), units = static_cast<size_t>(a->n_unit);
    size_t query = heads * (static_cast<size_t>(g->head_dim) + 1 + units) * sizeof(float);
    int64_t batch = static_cast<int64_t>(VOTE_SCRATCH / query);
    batch = batch < 1 ? 1 : batch > n_q ? n_q : batch;
    size_t n = static_cast<size_t>(batch), lse_at = round_up(n * heads * static_cast<size_t>(g->head_dim) * sizeof(float));
    size_t s_at = lse_at + round_up(n * heads * sizeof(float)), best_at = s_at + round_up(n * heads * units * sizeof(float));
    size_t vote_at = best_at + round_up(heads * units * sizeof(float));
    int32_t sets = a->rule.per_kv_head ? g->n_head_kv : 1;
    kvf_cuda_vote v = {};
    void *dev;
    KVF_TRY(send_rows(c, a, block0, n_block, &v.rows, err));
    KVF_TRY(kvf_cuda_need(c, KVF_CUDA_PART, vote_at + static_cast<size_t>(sets) * units * sizeof(float), &dev, err));
    char *at = static_cast<char *>(dev);
    float *q = reinterpret_cast<float *>(at), *lse = reinterpret_cast<float *>(at + lse_at), *vote = reinterpret_cast<float *>(at + vote_at);
    v.g = *g;
    v.unit = a->unit;
    v.n_unit = static_cast<int32_t>(a->n_unit);
    v.skip = static_cast<int32_t>(a->unit0 - block0 * per);
    v.q = q;
    v.lse = lse;
    v.rule = a->rule;
    v.s = reinterpret_cast<float *>(at + s_at);
    v.best = reinterpret_cast<float *>(at + best_at);
    for (int64_t i = 0; i < n_q; i += batch) {
        v.n_q = static_cast<int32_t>(n_q - i < batch ? n_q - i : batch);
        v.first = i == 0;
        kvf_cuda_vote_pool(a, i, v.n_q, q, lse, c->stream);
        kvf_cuda_vote_batch(&v, c->stream);
    }
    kvf_cuda_vote_sum(&v, a->rule.max_queries ? 1.0f : 1.0f / static_cast<float>(n_q), vote, c->stream);
    c->ran_score = "simt_f32";
    KVF_TRY(kvf_cuda_check(c, "votes", err));
    return kvf_cuda_download(c, a->vote, vote, static_cast<size_t>(sets) * units * sizeof(float), err);
}
