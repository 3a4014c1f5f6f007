/* faiss_index.c - kv/index.h over FAISS's C API (faiss_c.h).
 *
 * The rule that matters: what FAISS leaves open is settled here. Equal scores are ordered by number,
 * also at the cut; an index that is not trained yet answers exactly; FAISS runs on the calling thread.
 *
 * Threads: FAISS splits its loops with OpenMP. omp_set_num_threads is not a switch of the process: the
 * setting (nthreads-var, OpenMP 5.0 section 2.5.1) belongs to the calling thread's data environment.
 * It is set to one around a call and put back, so the host's own OpenMP code and its other threads
 * never see it. BLAS, which FAISS uses for training and for searches of 20 queries and more, has a
 * setting of the process only; it is left alone, and searches here are of one query.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "memory/faiss_index.h"

#include <ctype.h>
#include <math.h>
#include <omp.h>
#include <string.h>

#include "memory/faiss_c.h"

#define KIND_MAX 100
#define NUMBER_MAX 65536
#define PER_CENTROID 39 /* below it FAISS's k-means warns on stderr, and means it */
#define TRAIN_MIN 1024
#define EF_SEARCH 128.0

typedef struct faiss_index {
    kvf_index base;
    const kvf_mem *mem;
    FaissIndex *ix;
    bool trained, broken;
    int64_t n_train; /* vectors to wait for */
    size_t vector_bytes;
    float *raw; /* [base.n][dim], until trained */
    int64_t raw_cap;
    float *score;       /* [score_cap] */
    faiss_idx_t *label; /* [label_cap] */
    int64_t score_cap, label_cap;
} faiss_index;

static faiss_index *own(kvf_index *ix) { return (faiss_index *)ix; }

/* ---- Calls and their errors ----------------------------------------------------------------- */

static int one_thread(void)
{
    int was = omp_get_max_threads();
    omp_set_num_threads(1);
    return was;
}

/* FAISS's sentence without "Error in <function> at <file>.cpp:<line>: ". */
static const char *cause(void)
{
    const char *text = faiss_get_last_error(), *at = text ? strstr(text, ".cpp:") : NULL;
    if (at && (at = strstr(at, ": ")) != NULL) text = at + 2;
    return text && *text ? text : "no reason given";
}

static kvf_status failed(kvf_status code, const char *what, kvf_error *err)
{
    const char *why = cause();
    if (strstr(why, "bad_alloc") || strstr(why, "length_error"))
        return kvf_fail(err, KVF_ERR_NOMEM, "FAISS, %s: out of memory; use a smaller kind of index", what);
    return kvf_fail(err, code, "FAISS, %s: %s", what, why);
}

static kvf_status check_finite(const float *x, int64_t n, int32_t dim, const char *what, kvf_error *err)
{
    for (int64_t i = 0; i < n * dim; i++)
        if (!isfinite(x[i]))
            return kvf_fail(err, KVF_ERR_ARG, "%s %lld holds NaN or infinity at channel %lld; no index can rank it",
                            what, (long long)(i / dim), (long long)(i % dim));
    return KVF_OK;
}

/* ---- What a kind asks for -------------------------------------------------------------------- */

/* The number at text, or -1; numbers have been checked by kind_copy. */
static int64_t number_at(const char *text)
{
    if (!isdigit((unsigned char)*text)) return -1;
    int64_t n = 0;
    for (; isdigit((unsigned char)*text); text++) n = n * 10 + (*text - '0');
    return n;
}

/* Vectors that training wants: of every part that clusters, the centroids of one k-means. */
static int64_t train_size(const char *kind)
{
    int64_t most = 0;
    for (const char *p = kind; *p; p++) {
        int64_t centroids = 0;
        if (!strncmp(p, "IVF", 3)) {
            centroids = number_at(p + 3);
        } else if (!strncmp(p, "IMI2x", 5)) {
            int64_t bits = number_at(p + 5);
            centroids = bits >= 0 && bits < 16 ? (int64_t)1 << bits : NUMBER_MAX;
        } else if (p[0] == 'Q' && p > kind && strchr("PR", p[-1]) && number_at(p + 1) >= 0) {
            const char *x = p + 1;
            while (isdigit((unsigned char)*x)) x++;
            int64_t bits = *x == 'x' ? number_at(x + 1) : 8;
            centroids = bits >= 0 && bits < 16 ? (int64_t)1 << bits : NUMBER_MAX;
        } else if (!strncmp(p, "LSQ", 3) || !strncmp(p, "OPQ", 3)) {
            centroids = 256;
        }
        if (centroids > most) most = centroids;
    }
    return most * PER_CENTROID > TRAIN_MIN ? most * PER_CENTROID : TRAIN_MIN;
}

/* kind with ',' for '+'. A number is FAISS's to allocate by, so it is bounded here. */
static kvf_status kind_copy(char out[KIND_MAX + 1], const char *kind, kvf_error *err)
{
    size_t n = strlen(kind);
    if (n < 1 || n > KIND_MAX)
        return kvf_fail(err, KVF_ERR_ARG, "an index kind has 1..%d characters, this one %zu; try \"Flat\"", KIND_MAX,
                        n);
    for (size_t i = 0; i <= n; i++) out[i] = kind[i] == '+' ? ',' : kind[i];
    int64_t run = 0;
    for (const char *p = out; *p; p++) {
        run = isdigit((unsigned char)*p) ? run * 10 + (*p - '0') : 0;
        if (run > NUMBER_MAX)
            return kvf_fail(err, KVF_ERR_ARG, "index kind '%s': a number above %d", kind, NUMBER_MAX);
    }
    return KVF_OK;
}

/* An estimate; what FAISS cannot say of itself is counted as full vectors. */
static size_t vector_bytes(const FaissIndex *ix, const char *kind, int32_t dim)
{
    size_t code = 0;
    if (faiss_Index_sa_code_size(ix, &code) || code == 0) {
        const char *pq = strstr(kind, "PQ");
        bool fast_scan = pq && strstr(pq, "x4fs") && number_at(pq + 2) > 0;
        code = fast_scan ? ((size_t)number_at(pq + 2) + 1) / 2 : (size_t)dim * sizeof(float);
    }
    if (strstr(kind, "IVF")) code += sizeof(int64_t);
    const char *hnsw = strstr(kind, "HNSW");
    if (hnsw && hnsw == kind) { /* 2 M links at the bottom, M / (M - 1) of the rest, offset and level */
        int64_t m = number_at(hnsw + 4);
        code += (size_t)(2 * (m > 0 ? m : 32) + 2) * 4 + 12;
    }
    return code;
}

static kvf_status set_effort(FaissIndex *ix, const char *kind, kvf_error *err)
{
    const char *ivf = strstr(kind, "IVF");
    bool hnsw = !strncmp(kind, "HNSW", 4);
    if (!ivf && !hnsw) return KVF_OK;
    int64_t lists = ivf ? number_at(ivf + 3) : 0;
    double probes = lists / 4 > 8 ? (double)(lists / 4) : 8.0;
    FaissParameterSpace *space = NULL;
    if (faiss_ParameterSpace_new(&space)) return failed(KVF_ERR_INTERNAL, "its parameters", err);
    int rc = faiss_ParameterSpace_set_index_parameter(space, ix, ivf ? "nprobe" : "efSearch",
                                                      ivf ? probes : EF_SEARCH);
    kvf_status st = rc ? failed(KVF_ERR_ARG, "the effort of a search", err) : KVF_OK;
    faiss_ParameterSpace_free(space);
    return st;
}

/* ---- Adding ------------------------------------------------------------------------------------- */

static kvf_status add_trained(faiss_index *f, const float *x, int64_t n, kvf_error *err)
{
    int was = one_thread();
    int rc = faiss_Index_add(f->ix, n, x);
    omp_set_num_threads(was);
    if (!rc) return KVF_OK;
    f->broken = true;
    return failed(KVF_ERR_INTERNAL, "adding vectors", err);
}

static kvf_status train(faiss_index *f, kvf_error *err)
{
    int was = one_thread();
    int rc = faiss_Index_train(f->ix, f->base.n, f->raw);
    omp_set_num_threads(was);
    if (rc) {
        f->broken = true;
        return failed(KVF_ERR_INTERNAL, "training", err);
    }
    KVF_TRY(add_trained(f, f->raw, f->base.n, err));
    f->trained = true;
    kvf_free(f->mem, f->raw);
    f->raw = NULL;
    f->raw_cap = 0;
    return KVF_OK;
}

static kvf_status not_broken(const faiss_index *f, kvf_error *err)
{
    if (!f->broken) return KVF_OK;
    return kvf_fail(err, KVF_ERR_STATE, "the index failed while vectors were added; reset it and add them again");
}

static kvf_status index_add(kvf_index *base, const float *x, int64_t n, kvf_error *err)
{
    faiss_index *f = own(base);
    KVF_TRY(not_broken(f, err));
    if (n < 0 || n > INT64_MAX / base->dim / (int64_t)sizeof(float) - base->n)
        return kvf_fail(err, KVF_ERR_ARG, "%lld vectors cannot be added", (long long)n);
    if (n == 0) return KVF_OK;
    KVF_TRY(check_finite(x, n, base->dim, "vector", err));
    if (f->trained) {
        KVF_TRY(add_trained(f, x, n, err));
        base->n += n;
        return KVF_OK;
    }
    void *raw = f->raw;
    kvf_status st = kvf_reserve(f->mem, &raw, &f->raw_cap, base->n + n, (size_t)base->dim * sizeof(float), err);
    f->raw = raw;
    KVF_TRY(st);
    memcpy(f->raw + base->n * base->dim, x, (size_t)n * (size_t)base->dim * sizeof(float));
    base->n += n;
    return base->n >= f->n_train ? train(f, err) : KVF_OK;
}

/* Training is kept: the next document's vectors come from the same layer of the same model. */
static kvf_status index_reset(kvf_index *base, kvf_error *err)
{
    faiss_index *f = own(base);
    if (faiss_Index_reset(f->ix)) return failed(KVF_ERR_INTERNAL, "reset", err);
    f->trained = faiss_Index_is_trained(f->ix) != 0;
    f->broken = false;
    base->n = 0;
    return KVF_OK;
}

/* ---- Searching ------------------------------------------------------------------------------------- */

static kvf_status scratch(faiss_index *f, int64_t k, kvf_error *err)
{
    void *score = f->score, *label = f->label;
    kvf_status st = kvf_reserve(f->mem, &score, &f->score_cap, k, sizeof(float), err);
    f->score = score;
    KVF_TRY(st);
    st = kvf_reserve(f->mem, &label, &f->label_cap, k, sizeof(faiss_idx_t), err);
    f->label = label;
    return st;
}

/* Best first, ties by number; FAISS's answer is nearly so, hence insertion. */
static void sort_found(float *score, faiss_idx_t *label, int64_t n)
{
    for (int64_t i = 1; i < n; i++) {
        float s = score[i];
        faiss_idx_t id = label[i];
        int64_t at = i;
        for (; at > 0 && (s > score[at - 1] || (!(s < score[at - 1]) && id < label[at - 1])); at--) {
            score[at] = score[at - 1];
            label[at] = label[at - 1];
        }
        score[at] = s;
        label[at] = id;
    }
}

/* FAISS for the best `want`, holes (label -1: fewer found) taken out. */
static kvf_status ask(faiss_index *f, const float *q, int64_t want, int64_t *found, kvf_error *err)
{
    KVF_TRY(scratch(f, want, err));
    int was = one_thread();
    int rc = faiss_Index_search(f->ix, 1, q, want, f->score, f->label);
    omp_set_num_threads(was);
    if (rc) return failed(KVF_ERR_INTERNAL, "searching", err);
    *found = 0;
    for (int64_t i = 0; i < want; i++) {
        if (f->label[i] < 0 || f->label[i] >= f->base.n) continue;
        f->score[*found] = f->score[i];
        f->label[(*found)++] = f->label[i];
    }
    return KVF_OK;
}

static kvf_status index_search(kvf_index *base, const float *q, int64_t k, int64_t *ids, int64_t *n, kvf_error *err)
{
    faiss_index *f = own(base);
    *n = 0;
    KVF_TRY(not_broken(f, err));
    if (k < 0) return kvf_fail(err, KVF_ERR_ARG, "the best %lld vectors asked; k is 0 or more", (long long)k);
    KVF_TRY(check_finite(q, 1, base->dim, "query", err));
    if (k > base->n) k = base->n;
    if (k == 0) return KVF_OK;
    if (!f->trained) {
        KVF_TRY(scratch(f, k, err));
        *n = kvf_exact_search(f->raw, base->n, base->dim, q, k, ids, f->score);
        return KVF_OK;
    }
    /* One more than asked shows whether equals were cut apart; then ask for more until the cut lies
     * between two scores, up to eight times k: a tie that wide (a coarse quantiser) is no ranking. */
    int64_t most = k > base->n / 8 ? base->n : 8 * k, want = k < most ? k + 1 : k, found = 0;
    if (most < 64) most = base->n < 64 ? base->n : 64;
    for (;;) {
        KVF_TRY(ask(f, q, want, &found, err));
        bool tied = found == want && found > k && !(f->score[k - 1] > f->score[found - 1]);
        if (!tied || want >= most) break;
        want = want > most / 2 ? most : 2 * want;
    }
    sort_found(f->score, f->label, found);
    *n = found < k ? found : k;
    for (int64_t i = 0; i < *n; i++) ids[i] = f->label[i];
    return KVF_OK;
}

/* ---- Opening and closing ----------------------------------------------------------------------------- */

static size_t index_bytes(const kvf_index *base)
{
    const faiss_index *f = (const faiss_index *)base;
    size_t own_bytes = sizeof *f + (size_t)f->raw_cap * (size_t)base->dim * sizeof(float) +
                       (size_t)f->score_cap * sizeof *f->score + (size_t)f->label_cap * sizeof *f->label;
    return own_bytes + (f->trained ? (size_t)base->n * f->vector_bytes : 0);
}

static void index_close(kvf_index *base)
{
    if (!base) return;
    faiss_index *f = own(base);
    const kvf_mem *mem = f->mem;
    if (f->ix) faiss_Index_free(f->ix);
    kvf_free(mem, f->raw);
    kvf_free(mem, f->score);
    kvf_free(mem, f->label);
    kvf_free(mem, f);
}

static const kvf_index_ops faiss_ops = {
    .add = index_add, .reset = index_reset, .search = index_search, .bytes = index_bytes, .close = index_close,
};

static kvf_status make(faiss_index *f, const char *kind, const char *given, int32_t dim, kvf_error *err)
{
    if (faiss_index_factory(&f->ix, dim, kind, METRIC_INNER_PRODUCT)) {
        f->ix = NULL;
        kvf_status st = failed(KVF_ERR_ARG, "making the index", err);
        if (st == KVF_ERR_ARG)
            kvf_error_prefix(err, "index kind '%s' for %d channels cannot be had (known: Flat, SQfp16, SQ8, HNSW32, "
                             "IVF64+Flat, PQ32x4fs and what else FAISS's index factory takes): ", given, dim);
        return st;
    }
    if (faiss_Index_metric_type(f->ix) != METRIC_INNER_PRODUCT)
        return kvf_fail(err, KVF_ERR_ARG, "index kind '%s' does not rank by inner product; try \"Flat\"", given);
    KVF_TRY(set_effort(f->ix, kind, err));
    f->trained = faiss_Index_is_trained(f->ix) != 0;
    f->n_train = train_size(kind);
    f->vector_bytes = vector_bytes(f->ix, kind, dim);
    return KVF_OK;
}

kvf_status kvf_faiss_module_open_1(kvf_index **out, const char *kind, int32_t dim, const kvf_mem *mem, kvf_error *err)
{
    char own_kind[KIND_MAX + 1];
    *out = NULL;
    if (dim < 1 || dim > NUMBER_MAX)
        return kvf_fail(err, KVF_ERR_ARG, "vectors of %d channels; an index takes 1..%d", dim, NUMBER_MAX);
    KVF_TRY(kind_copy(own_kind, kind, err));
    void *mem_index = NULL;
    KVF_TRY(kvf_mem_get(mem, &mem_index, 1, sizeof(faiss_index), err));
    faiss_index *f = mem_index;
    f->base.ops = &faiss_ops;
    f->base.dim = dim;
    f->mem = mem;
    kvf_status st = make(f, own_kind, kind, dim, err);
    if (st < 0) {
        index_close(&f->base);
        return st;
    }
    *out = &f->base;
    return KVF_OK;
}
