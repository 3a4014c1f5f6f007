/* cuda_lt.cu - cuBLASLt for products of many tokens, opened at its first use.
 *
 * The library maps half a gigabyte, so it is loaded with the first prefill and by hand: a machine without
 * it (a driver alone is enough for this module) multiplies with k_gemm.cu instead. Row-major y = x w^T is,
 * column-major, y' [n_out][n_tok] = w^T' x', which is what is asked for below.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/cuda_int.h"

#ifdef __CUDACC__
#include <cublasLt.h>
#include <dlfcn.h>

#include <new>

enum { WORKSPACE = 32 << 20, PLANS = 64 };

/* How a shape is run, as the library's heuristic chose it. */
struct lt_plan {
    int64_t n_tok, n_out, n_in;
    cublasLtMatrixLayout_t x, w, y;
    cublasLtMatmulAlgo_t algo;
};

struct kvf_cuda_lt {
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtDestroy) destroy;
    decltype(&cublasLtMatmulDescCreate) desc_create;
    decltype(&cublasLtMatmulDescDestroy) desc_destroy;
    decltype(&cublasLtMatmulDescSetAttribute) desc_set;
    decltype(&cublasLtMatrixLayoutCreate) layout_create;
    decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
    decltype(&cublasLtMatmulPreferenceCreate) pref_create;
    decltype(&cublasLtMatmulPreferenceDestroy) pref_destroy;
    decltype(&cublasLtMatmulPreferenceSetAttribute) pref_set;
    decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
    decltype(&cublasLtMatmul) matmul;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    void *workspace;
    lt_plan plan[PLANS]; /* a ring: the oldest goes when it is full */
    int n_plan, next;
};

template <class F> static bool find(void *lib, const char *name, F *out)
{
    void *p = dlsym(lib, name);
    if (p) memcpy(out, &p, sizeof p);
    return p != nullptr;
}

static bool find_all(kvf_cuda_lt *t, void *lib)
{
    return find(lib, "cublasLtCreate", &t->create) && find(lib, "cublasLtDestroy", &t->destroy) &&
           find(lib, "cublasLtMatmulDescCreate", &t->desc_create) && find(lib, "cublasLtMatmulDescDestroy", &t->desc_destroy) &&
           find(lib, "cublasLtMatmulDescSetAttribute", &t->desc_set) &&
           find(lib, "cublasLtMatrixLayoutCreate", &t->layout_create) &&
           find(lib, "cublasLtMatrixLayoutDestroy", &t->layout_destroy) &&
           find(lib, "cublasLtMatmulPreferenceCreate", &t->pref_create) &&
           find(lib, "cublasLtMatmulPreferenceDestroy", &t->pref_destroy) &&
           find(lib, "cublasLtMatmulPreferenceSetAttribute", &t->pref_set) &&
           find(lib, "cublasLtMatmulAlgoGetHeuristic", &t->heuristic) && find(lib, "cublasLtMatmul", &t->matmul);
}

static bool begin(kvf_cuda_backend *c, kvf_cuda_lt *t)
{
    cublasOperation_t trans = CUBLAS_OP_T;
    if (t->create(&t->handle) != CUBLAS_STATUS_SUCCESS) return false;
    if (t->desc_create(&t->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) != CUBLAS_STATUS_SUCCESS) return false;
    if (t->desc_set(t->desc, CUBLASLT_MATMUL_DESC_TRANSA, &trans, sizeof trans) != CUBLAS_STATUS_SUCCESS) return false;
    return kvf_cuda_take(c, &t->workspace, WORKSPACE, nullptr) >= 0;
}

/* The library of the same major version as the headers; NODELETE, since it keeps threads. */
static void *open_library()
{
    const char *names[] = { CUDART_VERSION >= 13000 ? "libcublasLt.so.13" : "libcublasLt.so.12", "libcublasLt.so" };
    for (const char *name : names)
        if (void *lib = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE)) return lib;
    return nullptr;
}

kvf_cuda_lt *kvf_cuda_lt_open(kvf_cuda_backend *c)
{
    void *lib = open_library();
    if (!lib) return nullptr;
    kvf_cuda_lt *t = new (std::nothrow) kvf_cuda_lt();
    if (t && find_all(t, lib) && begin(c, t)) return t;
    if (t) kvf_cuda_lt_close(c, t);
    return nullptr;
}

static void drop_plan(kvf_cuda_lt *t, lt_plan *p)
{
    if (p->x) t->layout_destroy(p->x);
    if (p->w) t->layout_destroy(p->w);
    if (p->y) t->layout_destroy(p->y);
    *p = lt_plan();
}

void kvf_cuda_lt_close(kvf_cuda_backend *c, kvf_cuda_lt *t)
{
    if (!t) return;
    for (int i = 0; i < t->n_plan; i++) drop_plan(t, &t->plan[i]);
    if (t->desc) t->desc_destroy(t->desc);
    if (t->handle) t->destroy(t->handle);
    kvf_cuda_give(c, t->workspace);
    delete t;
}

static bool choose(kvf_cuda_lt *t, lt_plan *p)
{
    uint64_t k = static_cast<uint64_t>(p->n_in), n = static_cast<uint64_t>(p->n_out), m = static_cast<uint64_t>(p->n_tok);
    size_t room = WORKSPACE;
    cublasLtMatmulHeuristicResult_t best;
    cublasLtMatmulPreference_t pref;
    int found = 0;
    if (t->layout_create(&p->w, CUDA_R_16BF, k, n, p->n_in) != CUBLAS_STATUS_SUCCESS ||
        t->layout_create(&p->x, CUDA_R_16BF, k, m, p->n_in) != CUBLAS_STATUS_SUCCESS ||
        t->layout_create(&p->y, CUDA_R_32F, n, m, p->n_out) != CUBLAS_STATUS_SUCCESS ||
        t->pref_create(&pref) != CUBLAS_STATUS_SUCCESS)
        return false;
    bool ok = t->pref_set(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room) == CUBLAS_STATUS_SUCCESS &&
              t->heuristic(t->handle, t->desc, p->w, p->x, p->y, p->y, pref, 1, &best, &found) == CUBLAS_STATUS_SUCCESS && found > 0;
    t->pref_destroy(pref);
    if (ok) p->algo = best.algo;
    return ok;
}

static lt_plan *plan_for(kvf_cuda_lt *t, int64_t n_tok, int64_t n_out, int64_t n_in)
{
    for (int i = 0; i < t->n_plan; i++)
        if (t->plan[i].n_tok == n_tok && t->plan[i].n_out == n_out && t->plan[i].n_in == n_in) return &t->plan[i];
    lt_plan *p = &t->plan[t->next];
    drop_plan(t, p);
    p->n_tok = n_tok;
    p->n_out = n_out;
    p->n_in = n_in;
    if (t->n_plan <= t->next) t->n_plan = t->next + 1;
    if (!choose(t, p)) {
        drop_plan(t, p);
        return nullptr;
    }
    t->next = (t->next + 1) % PLANS;
    return p;
}

bool kvf_cuda_lt_gemm(kvf_cuda_lt *t, const bf16 *x, const bf16 *w, float *y, int64_t n_tok, int64_t n_out, int64_t n_in,
                      bool add, cudaStream_t s)
{
    float one = 1.0f, beta = add ? 1.0f : 0.0f;
    lt_plan *p = plan_for(t, n_tok, n_out, n_in);
    return p && t->matmul(t->handle, t->desc, &one, w, p->w, x, p->x, &beta, y, p->y, y, p->y, &p->algo, t->workspace, WORKSPACE,
                          s) == CUBLAS_STATUS_SUCCESS;
}

#else /* under emulation there is none */

kvf_cuda_lt *kvf_cuda_lt_open(kvf_cuda_backend *) { return nullptr; }
void kvf_cuda_lt_close(kvf_cuda_backend *, kvf_cuda_lt *) {}
bool kvf_cuda_lt_gemm(kvf_cuda_lt *, const bf16 *, const bf16 *, float *, int64_t, int64_t, int64_t, bool, cudaStream_t)
{
    return false;
}

#endif
