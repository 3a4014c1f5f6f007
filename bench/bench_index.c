/* bench_index.c - which tokens' keys have the largest q . k? Our vote op over digests of 2 bits against
 * FAISS, one thread, on the keys of one layer.
 *
 *     bench_index [--tokens N] [--keys FILE] [--save FILE] [--csv]
 *
 * Without --keys the keys are made: two KV heads of 64 channels, 14 query heads, N tokens (128K), runs of
 * text that share a direction, channels of unequal spread, some with an offset of up to 150, as Qwen2's
 * biased key projection gives them. --keys reads a layer's real ones, --save writes what was used: five
 * int32 (head_dim, query heads, KV heads, tokens, queries), keys [token][KV head][dim] f32, queries
 * [query][head][dim] f32 as they meet raw keys, rotated.
 *
 * Time of a lookup: best of several, methods in turn. For the vote: the op itself, GATE, votes of all
 * blocks for one set. For FAISS: search of each KV head's index with its query heads' rows at once, the
 * best tokens of a head taken to blocks. recall: share, over queries and heads, of the 16 blocks with the
 * largest exact q . k among the method's 16 (a block is worth its best token). shared: the same of the one
 * set per query by summed softmax votes. bytes: of the index per key of one KV head.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"

#ifdef KVF_BENCH_FAISS
#include <omp.h>

#include "memory/faiss_c.h"
#endif

enum { TOP = 16, ROUNDS = 5, N_QUERY = 30 };

typedef struct data {
    int32_t dim, n_head, n_head_kv, n_tok, n_q;
    float *k, *q;
    float *exact; /* [n_q][n_head][n_block] */
    int64_t n_block;
} data;

static void *get(size_t n, size_t size)
{
    void *p = kvf_alloc(&kvf_mem_default, n, size);
    if (p) return p;
    fprintf(stderr, "bench_index: out of memory (%zu x %zu bytes)\n", n, size);
    exit(1);
}

static void must(kvf_status st, const kvf_error *err)
{
    if (st >= 0) return;
    fprintf(stderr, "bench_index: %s\n", err->msg);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- Keys and queries ------------------------------------------------------------------------ */

static float uniform(uint64_t *s)
{
    *s = *s * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*s >> 32) * 0x1p-31f;
}

static float normal(uint64_t *s) { return 1.2247f * (uniform(s) + uniform(s)) ; } /* variance 1, near enough */

static size_t n_key(const data *a) { return (size_t)a->n_tok * (size_t)a->n_head_kv * (size_t)a->dim; }
static size_t n_query(const data *a) { return (size_t)a->n_q * (size_t)a->n_head * (size_t)a->dim; }

static void make(data *a, int32_t n_tok)
{
    *a = (data){ .dim = 64, .n_head = 14, .n_head_kv = 2, .n_tok = n_tok, .n_q = N_QUERY };
    a->k = get(n_key(a), sizeof *a->k);
    a->q = get(n_query(a), sizeof *a->q);
    uint64_t s = 42;
    for (int32_t h = 0; h < a->n_head_kv; h++) {
        float offset[64], spread[64], topic[64] = { 0 };
        for (int c = 0; c < 64; c++) {
            offset[c] = c % 21 == 7 ? 150 * uniform(&s) : 3 * uniform(&s);
            spread[c] = 0.3f + 2 * fabsf(uniform(&s));
        }
        for (int32_t t = 0; t < n_tok; t++)
            for (int c = 0; c < 64; c++) {
                if (t % 96 == 0) topic[c] = normal(&s); /* a subject ends anywhere, not at a block's end */
                a->k[((size_t)t * 2 + (size_t)h) * 64 + (size_t)c] = offset[c] + spread[c] * (0.7f * topic[c] + normal(&s));
            }
    }
    /* Queries that look for something: half of a random key's deviation, the rest noise. */
    for (int64_t i = 0; i < (int64_t)a->n_q * a->n_head; i++) {
        const float *k = a->k + ((size_t)((uint64_t)i * 7919 % (uint64_t)n_tok) * 2 + (size_t)(i % 14 / 7)) * 64;
        for (int c = 0; c < 64; c++) a->q[i * 64 + c] = normal(&s) + (c % 21 == 7 ? 0 : 0.3f * k[c]);
    }
}

static void load(data *a, const char *path)
{
    int32_t head[5];
    FILE *f = fopen(path, "rb");
    if (!f || fread(head, sizeof head, 1, f) != 1 || head[0] < 8 || head[0] > 1024 || head[1] < 1 || head[2] < 1 ||
        head[1] > 1024 || head[1] % head[2] || head[3] < KVF_BLOCK || head[3] > 1 << 24 || head[4] < 1 || head[4] > 4096) {
        fprintf(stderr, "bench_index: %s is not a file of keys\n", path);
        exit(1);
    }
    *a = (data){ .dim = head[0], .n_head = head[1], .n_head_kv = head[2], .n_tok = head[3], .n_q = head[4] };
    a->k = get(n_key(a), sizeof *a->k);
    a->q = get(n_query(a), sizeof *a->q);
    if (fread(a->k, sizeof *a->k, n_key(a), f) != n_key(a) || fread(a->q, sizeof *a->q, n_query(a), f) != n_query(a)) {
        fprintf(stderr, "bench_index: %s is cut short\n", path);
        exit(1);
    }
    fclose(f);
    a->n_tok -= a->n_tok % KVF_BLOCK;
}

static void save(const data *a, const char *path)
{
    int32_t head[5] = { a->dim, a->n_head, a->n_head_kv, a->n_tok, a->n_q };
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(head, sizeof head, 1, f) != 1 || fwrite(a->k, sizeof *a->k, n_key(a), f) != n_key(a) ||
        fwrite(a->q, sizeof *a->q, n_query(a), f) != n_query(a) || fclose(f)) {
        fprintf(stderr, "bench_index: cannot write %s\n", path);
        exit(1);
    }
}

static float *score_room(const data *a) { return get((size_t)(a->n_q * a->n_head) * (size_t)a->n_block, sizeof(float)); }

static const float *key_of(const data *a, int64_t t, int32_t h_kv) { return a->k + (t * a->n_head_kv + h_kv) * a->dim; }

static void score_exact(data *a)
{
    a->exact = score_room(a);
    for (int64_t r = 0; r < (int64_t)a->n_q * a->n_head; r++) {
        const float *q = a->q + r * a->dim;
        int32_t h_kv = (int32_t)(r % a->n_head) / (a->n_head / a->n_head_kv);
        for (int64_t b = 0; b < a->n_block; b++) {
            float best = -INFINITY;
            for (int64_t t = b * KVF_BLOCK; t < (b + 1) * KVF_BLOCK; t++) {
                const float *k = key_of(a, t, h_kv);
                double s = 0;
                for (int32_t c = 0; c < a->dim; c++) s += (double)q[c] * (double)k[c];
                if ((float)s > best) best = (float)s;
            }
            a->exact[r * a->n_block + b] = best;
        }
    }
}

/* ---- Recall ------------------------------------------------------------------------------------- */

static void top_blocks(const float *s, int64_t n, int64_t *out)
{
    for (int i = 0; i < TOP; i++) out[i] = -1;
    for (int64_t b = 0; b < n; b++) {
        if (s[b] == -INFINITY) continue;
        int at = TOP;
        while (at > 0 && (out[at - 1] < 0 || s[b] > s[out[at - 1]])) at--;
        if (at == TOP) continue;
        memmove(out + at + 1, out + at, (size_t)(TOP - 1 - at) * sizeof *out);
        out[at] = b;
    }
}

static double overlap(const float *a, const float *b, int64_t n)
{
    int64_t x[TOP], y[TOP];
    int hit = 0, all = 0;
    top_blocks(a, n, x);
    top_blocks(b, n, y);
    for (int i = 0; i < TOP; i++) {
        all += x[i] >= 0;
        for (int j = 0; j < TOP; j++) hit += x[i] >= 0 && x[i] == y[j];
    }
    return all ? (double)hit / all : 1;
}

/* Sum over heads of the softmax over blocks. */
static void votes(const data *a, const float *s, float *vote)
{
    double scale = 1 / sqrt((double)a->dim);
    for (int64_t b = 0; b < a->n_block; b++) vote[b] = 0;
    for (int32_t h = 0; h < a->n_head; h++, s += a->n_block) {
        double most = -INFINITY, sum = 0;
        for (int64_t b = 0; b < a->n_block; b++) most = s[b] > most ? (double)s[b] : most;
        for (int64_t b = 0; b < a->n_block; b++) sum += exp(scale * ((double)s[b] - most));
        for (int64_t b = 0; b < a->n_block; b++) vote[b] += (float)(exp(scale * ((double)s[b] - most)) / sum);
    }
}

static void recall(const data *a, const float *s, double *per_head, double *per_set)
{
    float *x = get(2 * (size_t)a->n_block, sizeof *x), *y = x + a->n_block;
    *per_head = *per_set = 0;
    for (int64_t i = 0; i < a->n_q; i++) {
        for (int64_t h = 0; h < a->n_head; h++) {
            int64_t at = (i * a->n_head + h) * a->n_block;
            *per_head += overlap(a->exact + at, s + at, a->n_block) / (double)(a->n_q * a->n_head);
        }
        votes(a, a->exact + i * a->n_head * a->n_block, x);
        votes(a, s + i * a->n_head * a->n_block, y);
        *per_set += overlap(x, y, a->n_block) / (double)a->n_q;
    }
    kvf_free(&kvf_mem_default, x);
}

/* ---- Methods ------------------------------------------------------------------------------------- */

typedef struct method {
    char name[48];
    double build_s, bytes, best[2], recall, shared; /* best: seconds of 1 and of all queries */
    void (*lookup)(struct method *m, const data *a, int64_t n_q);
    /* vote */
    kvf_backend *be;
    kvf_digest digest;
    uint8_t *digests;
    const void **rows;
    float *lse, *vote;
    /* FAISS */
    void *index[16];
    int64_t top_tok;
    float *score, *block, *gather;
    int64_t *label;
} method;

static void vote_lookup(method *m, const data *a, int64_t n_q)
{
    kvf_error err;
    kvf_vote_args v = { .q = a->q, .lse = m->lse, .n_q = n_q, .scale = 1 / sqrtf((float)a->dim), .digest = &m->digest,
                        .rows = m->rows, .unit = KVF_BLOCK, .n_unit = a->n_block,
                        .rule = { KVF_VOTE_GATE, true, false, 1 }, .vote = m->vote };
    must(m->be->ops->vote(m->be, &v, &err), &err);
}

/* Scores of each query and head: the op with one head and the rule that leaves scores as they are. */
static void vote_scores(method *m, const data *a, float *s)
{
    kvf_error err;
    kvf_digest one = m->digest;
    one.n_head = one.n_head_kv = 1;
    size_t head = kvf_digest_head_bytes(&one);
    const void **rows = get((size_t)a->n_block, sizeof *rows);
    for (int64_t r = 0; r < (int64_t)a->n_q * a->n_head; r++) {
        size_t h_kv = (size_t)(r % a->n_head / (a->n_head / a->n_head_kv));
        for (int64_t b = 0; b < a->n_block; b++) rows[b] = (const uint8_t *)m->rows[b] + h_kv * head;
        kvf_vote_args v = { .q = a->q + r * a->dim, .lse = m->lse, .n_q = 1, .scale = 1, .digest = &one, .rows = rows,
                            .unit = KVF_BLOCK, .n_unit = a->n_block, .rule = { KVF_VOTE_LIN, true, false, 1 },
                            .vote = s + r * a->n_block };
        must(m->be->ops->vote(m->be, &v, &err), &err);
    }
    kvf_free(&kvf_mem_default, rows);
}

static void vote_open(method *m, const data *a, kvf_backend *be, const char *name, kvf_digest g)
{
    kvf_error err;
    g.n_head = a->n_head, g.n_head_kv = a->n_head_kv, g.head_dim = a->dim;
    *m = (method){ .be = be, .digest = g, .lookup = vote_lookup };
    snprintf(m->name, sizeof m->name, "%s", name);
    size_t block = kvf_digest_bytes(&g), plane = (size_t)KVF_BLOCK * (size_t)a->dim;
    m->digests = get((size_t)a->n_block, block);
    m->rows = get((size_t)a->n_block, sizeof *m->rows);
    m->lse = get((size_t)(a->n_q * a->n_head), sizeof *m->lse);
    m->vote = get((size_t)a->n_block, sizeof *m->vote);
    kvf_f16 *slot = get(2 * (size_t)a->n_head_kv * plane, sizeof *slot);
    void *slab[1] = { slot };
    kvf_kv_view view = { slab, 0, 2 * (size_t)a->n_head_kv * plane * sizeof *slot };
    for (int64_t b = 0; b < a->n_block; b++) {
        for (int32_t h = 0; h < a->n_head_kv; h++)
            for (int64_t t = 0; t < KVF_BLOCK; t++)
                for (int32_t c = 0; c < a->dim; c++)
                    slot[(h * KVF_BLOCK + t) * a->dim + c] = kvf_f16_from_f32(key_of(a, b * KVF_BLOCK + t, h)[c]);
        m->rows[b] = m->digests + (size_t)b * block;
        kvf_digest_args d = { &view, 0, KVF_BLOCK, &m->digest, m->digests + (size_t)b * block };
        double t0 = now();
        must(be->ops->digest(be, &d, 1, &err), &err);
        m->build_s += now() - t0;
    }
    m->bytes = (double)block / KVF_BLOCK / a->n_head_kv;
    kvf_free(&kvf_mem_default, slot);
    float *s = score_room(a);
    vote_scores(m, a, s);
    recall(a, s, &m->recall, &m->shared);
    kvf_free(&kvf_mem_default, s);
}

#ifdef KVF_BENCH_FAISS
static void faiss_must(int rc)
{
    if (!rc) return;
    fprintf(stderr, "bench_index: FAISS: %s\n", faiss_get_last_error());
    exit(1);
}

/* Rows of one KV head lie apart in q: gathered, then one search of n_q * group rows. */
static void faiss_lookup(method *m, const data *a, int64_t n_q)
{
    int32_t group = a->n_head / a->n_head_kv;
    size_t row = (size_t)a->dim * sizeof(float);
    for (int64_t i = 0; i < n_q * a->n_head * a->n_block; i++) m->block[i] = -INFINITY;
    for (int32_t h = 0; h < a->n_head_kv; h++) {
        for (int64_t i = 0; i < n_q; i++)
            memcpy(m->gather + i * group * a->dim, a->q + (i * a->n_head + h * group) * a->dim, row * (size_t)group);
        faiss_must(faiss_Index_search(m->index[h], n_q * group, m->gather, m->top_tok, m->score, m->label));
        for (int64_t r = 0; r < n_q * group; r++) {
            float *block = m->block + (r / group * a->n_head + h * group + r % group) * a->n_block;
            for (int64_t j = r * m->top_tok; j < (r + 1) * m->top_tok; j++) {
                int64_t b = m->label[j] / KVF_BLOCK;
                if (m->label[j] >= 0 && m->score[j] > block[b]) block[b] = m->score[j];
            }
        }
    }
}

static void search_open(method *m, const data *a, const char *kind, int64_t top_tok)
{
    enum { TRAIN = 4096 }; /* 256 a centroid: more is not looked at */
    *m = (method){ .lookup = faiss_lookup, .top_tok = top_tok };
    snprintf(m->name, sizeof m->name, "FAISS %s, %d tokens", kind, (int)top_tok);
    size_t rows = (size_t)(a->n_q * a->n_head / a->n_head_kv);
    m->gather = get(rows, (size_t)a->dim * sizeof(float));
    m->score = get(rows * (size_t)top_tok, sizeof(float));
    m->label = get(rows * (size_t)top_tok, sizeof(int64_t));
    m->block = score_room(a);
    float *x = get((size_t)a->n_tok, (size_t)a->dim * sizeof(float)), *some = get(TRAIN, (size_t)a->dim * sizeof(float));
    for (int32_t h = 0; h < a->n_head_kv; h++) {
        FaissIndex *ix;
        size_t code, row = (size_t)a->dim * sizeof(float);
        for (int64_t t = 0; t < a->n_tok; t++) memcpy(x + t * a->dim, key_of(a, t, h), row);
        for (int64_t t = 0; t < TRAIN; t++) memcpy(some + t * a->dim, key_of(a, t * a->n_tok / TRAIN, h), row);
        double t0 = now();
        faiss_must(faiss_index_factory(&ix, a->dim, kind, METRIC_INNER_PRODUCT));
        if (!faiss_Index_is_trained(ix)) faiss_must(faiss_Index_train(ix, TRAIN, some));
        faiss_must(faiss_Index_add(ix, a->n_tok, x));
        m->build_s += now() - t0;
        /* The fast-scan kinds do not say: four bits for two channels. */
        m->bytes = faiss_Index_sa_code_size(ix, &code) ? (strstr(kind, "x4fs") ? a->dim / 4 : (double)row) : (double)code;
        m->index[h] = ix;
    }
    kvf_free(&kvf_mem_default, x);
    kvf_free(&kvf_mem_default, some);
    faiss_lookup(m, a, a->n_q);
    recall(a, m->block, &m->recall, &m->shared);
}
#endif

static void close_method(method *m, const data *a)
{
    void *all[] = { m->digests, m->rows, m->lse, m->vote, m->score, m->block, m->gather, m->label };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) kvf_free(&kvf_mem_default, all[i]);
#ifdef KVF_BENCH_FAISS
    for (int32_t h = 0; h < a->n_head_kv; h++)
        if (m->index[h]) faiss_Index_free(m->index[h]);
#else
    (void)a;
#endif
}

static void time_all(method *m, int n, const data *a)
{
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < n; i++)
            for (int w = 0; w < 2; w++) {
                double t0 = now();
                m[i].lookup(&m[i], a, w ? a->n_q : 1);
                double took = now() - t0;
                if (round == 0 || took < m[i].best[w]) m[i].best[w] = took;
            }
}

static void print(const method *m, int n, const data *a, bool csv)
{
    if (csv)
        printf("method,tokens,bytes_per_key,one_query_ms,%d_queries_ms,recall16_head,recall16_set,build_s\n", a->n_q);
    else
        printf("%d tokens, %d query heads, %d KV heads of %d channels, 1 thread\n\n"
               "| method | bytes a key | 1 query, ms | %d queries, ms | recall, a head | recall, one set | build, s |\n"
               "|---|---|---|---|---|---|---|\n", a->n_tok, a->n_head, a->n_head_kv, a->dim, a->n_q);
    for (int i = 0; i < n; i++) {
        const method *x = &m[i];
        double one = 1e3 * x->best[0], all = 1e3 * x->best[1];
        if (csv)
            printf("\"%s\",%d,%.1f,%.3f,%.2f,%.3f,%.3f,%.2f\n", x->name, a->n_tok, x->bytes, one, all, x->recall,
                   x->shared, x->build_s);
        else
            printf("| %s | %.1f | %.3f | %.2f | %.3f | %.3f | %.2f |\n", x->name, x->bytes, one, all, x->recall, x->shared,
                   x->build_s);
    }
}

static int run(data *a, bool csv)
{
    kvf_error err;
    kvf_threads *threads;
    kvf_backend *be;
    must(kvf_threads_open(&threads, 1, &kvf_mem_default, &err), &err);
    kvf_cpu_backend_params p = { .threads = threads, .mem = &kvf_mem_default };
    p.flags = kvf_cpu_detect();
    must(kvf_cpu_level_parse(&p.level, NULL, p.flags, &err), &err);
    must(kvf_cpu_backend_open(&be, &p, &err), &err);
    method m[16];
    int n = 0;
    vote_open(&m[n++], a, be, "vote, 2 bits", (kvf_digest){ .kind = KVF_DIGEST_BITS, .bits = 2, .sub = 16 });
    vote_open(&m[n++], a, be, "vote, 4 bits", (kvf_digest){ .kind = KVF_DIGEST_BITS, .bits = 4, .sub = 16 });
    vote_open(&m[n++], a, be, "vote, 1 bit", (kvf_digest){ .kind = KVF_DIGEST_BITS, .bits = 1, .sub = 16 });
    vote_open(&m[n++], a, be, "vote, means of 16", (kvf_digest){ .kind = KVF_DIGEST_MEAN, .sub = 16 });
#ifdef KVF_BENCH_FAISS
    char pq[24];
    omp_set_num_threads(1);
    snprintf(pq, sizeof pq, "PQ%dx4fs", a->dim / 2);
    search_open(&m[n++], a, pq, 256);
    search_open(&m[n++], a, pq, 1024);
    search_open(&m[n++], a, "Flat", 1024);
#endif
    time_all(m, n, a);
    print(m, n, a, csv);
    for (int i = 0; i < n; i++) close_method(&m[i], a);
    be->ops->close(be);
    kvf_threads_close(threads);
    return 0;
}

int main(int argc, char **argv)
{
    const char *keys = NULL, *to = NULL;
    bool csv = false;
    long n_tok = 131072;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--csv")) csv = true;
        else if (!strcmp(argv[i], "--keys") && i + 1 < argc) keys = argv[++i];
        else if (!strcmp(argv[i], "--save") && i + 1 < argc) to = argv[++i];
        else if (!strcmp(argv[i], "--tokens") && i + 1 < argc) n_tok = strtol(argv[++i], NULL, 10);
        else n_tok = 0;
    }
    if (n_tok < 4096 || n_tok > 1 << 24) {
        fprintf(stderr, "usage: bench_index [--tokens 4096..] [--keys FILE] [--save FILE] [--csv]\n");
        return 2;
    }
    data a;
    if (keys) load(&a, keys);
    else make(&a, (int32_t)(n_tok - n_tok % KVF_BLOCK));
    a.n_block = a.n_tok / KVF_BLOCK;
    if (to) save(&a, to);
    score_exact(&a);
    run(&a, csv);
    kvf_free(&kvf_mem_default, a.k);
    kvf_free(&kvf_mem_default, a.q);
    kvf_free(&kvf_mem_default, a.exact);
    return 0;
}
