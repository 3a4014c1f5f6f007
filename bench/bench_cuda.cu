/* bench_cuda.cu - the CUDA kernels on a device: time, bytes or operations, and their share of what the same
 * run measured as the most (copy, bf16 product).
 *
 *     bench_cuda [--json FILE] [--quick]
 *
 * Inputs are random (zeros run up to 13 % faster), buffers rotate past the L2, times are medians of single
 * launches between events after a warm-up. Shapes are those of an 8B model: width 4096, 32 query and 8 KV
 * heads of 128 channels, feed-forward 14336. One line a row, and JSON for scripts/gpu_check.sh.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "cuda/cuda_int.h"

extern "C" const kvf_backend_module *kvf_backend_module_2(void);

namespace {

struct row {
    std::string name;
    double us, bytes, flop;
};

struct bench {
    kvf_backend *b = nullptr;
    kvf_cuda_backend *c = nullptr;
    kvf_error err = {};
    std::vector<row> rows;
    int repeat = 50;
    double copy = 0, gemm = 0; /* bytes/s, FLOP/s of this run */
};

void must(kvf_status rc, const bench &t)
{
    if (rc >= 0) return;
    fprintf(stderr, "bench_cuda: %s\n", t.err.msg);
    exit(1);
}

void *room(bench *t, size_t bytes)
{
    void *p;
    must(t->b->ops->alloc(t->b, &p, bytes, &t->err), *t);
    return p;
}

/* Random f32 in -1..1, or any bytes. */
void *noise(bench *t, size_t bytes, bool floats)
{
    static uint64_t s = 88172645463325252u;
    std::vector<uint32_t> host((bytes + 3) / 4);
    for (uint32_t &w : host) {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        w = static_cast<uint32_t>(s);
        if (!floats) continue;
        float x = static_cast<float>(static_cast<int32_t>(w)) * 0x1p-31f;
        memcpy(&w, &x, 4);
    }
    void *p = room(t, bytes);
    must(t->b->ops->upload(t->b, p, host.data(), bytes, &t->err), *t);
    return p;
}

/* Median microseconds of one call; the i-th call gets i. */
double time_of(bench *t, const std::function<void(int)> &call)
{
    cudaEvent_t a, b;
    cudaEventCreate(&a);
    cudaEventCreate(&b);
    std::vector<float> ms;
    for (int i = 0; i < 5 + t->repeat; i++) {
        cudaEventRecord(a, t->c->stream);
        call(i);
        cudaEventRecord(b, t->c->stream);
        cudaEventSynchronize(b);
        float x = 0;
        cudaEventElapsedTime(&x, a, b);
        if (i >= 5) ms.push_back(x);
    }
    cudaEventDestroy(a);
    cudaEventDestroy(b);
    std::sort(ms.begin(), ms.end());
    return 1e3 * static_cast<double>(ms[ms.size() / 2]);
}

void report(bench *t, const std::string &name, double us, double bytes, double flop)
{
    t->rows.push_back({ name, us, bytes, flop });
    printf("%-44s %10.2f us", name.c_str(), us);
    if (bytes > 0) printf("  %7.1f GB/s (%5.1f %% of copy)", bytes / us / 1e3, t->copy > 0 ? 100 * bytes / us * 1e6 / t->copy : 0.0);
    if (flop > 0) printf("  %7.1f TFLOP/s (%5.1f %% of product)", flop / us / 1e6, t->gemm > 0 ? 100 * flop / us * 1e6 / t->gemm : 0.0);
    printf("\n");
    fflush(stdout);
}

/* ---- Ceilings ------------------------------------------------------------------------------------------ */

__global__ void nothing() {}

void ceilings(bench *t)
{
    size_t bytes = static_cast<size_t>(1) << 30;
    void *a = room(t, bytes), *b = room(t, bytes);
    double us = time_of(t, [&](int) { cudaMemcpyAsync(a, b, bytes, cudaMemcpyDeviceToDevice, t->c->stream); });
    t->copy = 2.0 * static_cast<double>(bytes) / us * 1e6;
    report(t, "copy 1 GiB, read and write", us, 2.0 * static_cast<double>(bytes), 0);
    void *pinned = nullptr;
    cudaHostAlloc(&pinned, 256u << 20, cudaHostAllocDefault);
    us = time_of(t, [&](int) { cudaMemcpyAsync(a, pinned, 256u << 20, cudaMemcpyHostToDevice, t->c->stream); });
    report(t, "pinned host to device, 256 MiB", us, 256.0 * 1048576, 0);
    us = time_of(t, [&](int) { cudaMemcpyAsync(a, pinned, 512u << 10, cudaMemcpyHostToDevice, t->c->stream); });
    report(t, "pinned host to device, one KV block", us, 512.0 * 1024, 0);
    cudaFreeHost(pinned);
    us = time_of(t, [&](int) { for (int i = 0; i < 100; i++) nothing<<<1, 32, 0, t->c->stream>>>(); });
    report(t, "100 empty launches", us, 0, 0);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaStreamBeginCapture(t->c->stream, cudaStreamCaptureModeThreadLocal);
    for (int i = 0; i < 100; i++) nothing<<<1, 32, 0, t->c->stream>>>();
    cudaStreamEndCapture(t->c->stream, &graph);
    cudaGraphInstantiate(&exec, graph, 0);
    us = time_of(t, [&](int) { cudaGraphLaunch(exec, t->c->stream); });
    report(t, "graph of 100 empty launches", us, 0, 0);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    t->b->ops->release(t->b, a);
    t->b->ops->release(t->b, b);
}

void products(bench *t)
{
    const int64_t n = 8192;
    bf16 *x = static_cast<bf16 *>(room(t, n * n * 2)), *w = static_cast<bf16 *>(room(t, n * n * 2));
    float *f = static_cast<float *>(noise(t, n * n * 4, true)), *y = static_cast<float *>(room(t, n * n * 4));
    kvf_cuda_to_bf16(f, x, n * n, t->c->stream);
    kvf_cuda_to_bf16(f, w, n * n, t->c->stream);
    kvf_cuda_lt *lt = kvf_cuda_lt_open(t->c);
    double flop = 2.0 * 8192 * 8192 * 8192, us = 0;
    if (lt) {
        us = time_of(t, [&](int) { kvf_cuda_lt_gemm(lt, x, w, y, n, n, n, false, t->c->stream); });
        t->gemm = flop / us * 1e6;
        report(t, "cuBLASLt bf16 8192^3", us, 0, flop);
        flop = 2.0 * 512 * 14336 * 4096;
        us = time_of(t, [&](int) { kvf_cuda_lt_gemm(lt, x, w, y, 512, 14336, 4096, false, t->c->stream); });
        report(t, "cuBLASLt bf16 512 x 14336 x 4096", us, 0, flop);
    }
    flop = 2.0 * 512 * 14336 * 4096;
    us = time_of(t, [&](int) { kvf_cuda_gemm_bf16(x, w, y, 512, 14336, 4096, false, t->c->stream); });
    report(t, "own bf16 512 x 14336 x 4096", us, 0, flop);
    kvf_cuda_lt_close(t->c, lt);
    for (void *p : { static_cast<void *>(x), static_cast<void *>(w), static_cast<void *>(f), static_cast<void *>(y) }) t->b->ops->release(t->b, p);
}

/* ---- Weights --------------------------------------------------------------------------------------------- */

struct named_type {
    kvf_dtype type;
    const char *name;
};

/* Eight matrices of 14336 x 4096 in turn: more than any L2. */
void gemv(bench *t, named_type k)
{
    enum { TURNS = 8 };
    const int64_t n_out = 14336, n_in = 4096;
    kvf_cuda_weight w[TURNS];
    size_t row = kvf_cuda_row_bytes(k.type, n_in);
    double bytes = static_cast<double>(row) * n_out;
    for (kvf_cuda_weight &m : w) m = { k.type, n_out, n_in, row, static_cast<uint8_t *>(noise(t, row * n_out, false)) };
    float *x = static_cast<float *>(noise(t, 8 * n_in * 4, true)), *y = static_cast<float *>(room(t, 8 * n_out * 4));
    void *q8 = room(t, kvf_cuda_q8_bytes(8, n_in));
    for (int n_tok : { 1, 4, 8 }) {
        kvf_cuda_gemv g = {};
        g.x = x;
        g.q8 = q8;
        g.n_tok = n_tok;
        g.y = y;
        kvf_cuda_q8(x, q8, n_tok, n_in, t->c->stream);
        double us = time_of(t, [&](int i) {
            g.w = w[i % TURNS];
            kvf_cuda_gemv_run(&g, t->c->stream);
        });
        report(t, std::string("gemv ") + k.name + " 14336 x 4096, tokens " + std::to_string(n_tok), us, bytes, 0);
    }
    bf16 *out = static_cast<bf16 *>(room(t, n_out * n_in * 2));
    double us = time_of(t, [&](int i) { kvf_cuda_rows_bf16(&w[i % TURNS], 0, n_out, out, t->c->stream); });
    report(t, std::string("to bf16 ") + k.name + " 14336 x 4096", us, bytes + 2.0 * n_out * n_in, 0);
    for (kvf_cuda_weight &m : w) t->b->ops->release(t->b, const_cast<uint8_t *>(m.data));
    for (void *p : { static_cast<void *>(x), static_cast<void *>(y), q8, static_cast<void *>(out) }) t->b->ops->release(t->b, p);
}

/* ---- Attention --------------------------------------------------------------------------------------------- */

/* Through the op, so that lists travel as they do in a model. */
void attention(bench *t, int64_t n_tok, int64_t n_key, int32_t n_head, int32_t n_head_kv, int32_t d, bool causal)
{
    size_t slot = static_cast<size_t>(4) * n_head_kv * KVF_BLOCK * d;
    int64_t n = (n_key + KVF_BLOCK - 1) / KVF_BLOCK, turns = n_tok > 8 ? 1 : std::max<int64_t>(1, (256 << 20) / static_cast<int64_t>(n * slot));
    size_t halves = static_cast<size_t>(turns * n) * slot / 2;
    char *slab = static_cast<char *>(room(t, halves * 2));
    for (size_t at = 0; at < halves; at += 64u << 20) { /* f16 of either sign, 1/8 to 2 */
        size_t m = std::min<size_t>(halves - at, 64u << 20);
        std::vector<uint16_t> host(m);
        for (size_t i = 0; i < m; i++) host[i] = static_cast<uint16_t>(0x3000u | (i * 2654435761u >> 20 & 0x8fffu));
        must(t->b->ops->upload(t->b, slab + at * 2, host.data(), m * 2, &t->err), *t);
    }
    void *slabs[1] = { slab };
    kvf_kv_view view = { slabs, 24, slot };
    std::vector<int32_t> slots(static_cast<size_t>(turns * n));
    for (size_t i = 0; i < slots.size(); i++) slots[i] = static_cast<int32_t>(i * 7919 % slots.size());
    size_t rows = static_cast<size_t>(n_tok * n_head);
    float *q = static_cast<float *>(noise(t, rows * d * 4, true)), *o = static_cast<float *>(room(t, rows * d * 4)), *lse = static_cast<float *>(room(t, rows * 4));
    kvf_attn_args a = {};
    a.q = q;
    a.o = o;
    a.lse = lse;
    a.n_tok = n_tok;
    a.n_head = n_head;
    a.n_head_kv = n_head_kv;
    a.head_dim = d;
    a.scale = 0.08838834764f;
    a.kv = &view;
    a.n_key = n_key;
    a.q_first = causal ? n_key - n_tok : n_key;
    double us = time_of(t, [&](int i) {
        a.slots = slots.data() + i % turns * n;
        must(t->b->ops->attn(t->b, &a, &t->err), *t);
    });
    double pairs = causal ? static_cast<double>(n_tok) * (static_cast<double>(n_key) - (static_cast<double>(n_tok) - 1) / 2) : static_cast<double>(n_tok) * static_cast<double>(n_key);
    std::string name = std::string(n_tok > 8 ? "prefill " : "decode ") + std::to_string(n_tok) + " x " + std::to_string(n_key) + (causal ? " causal, " : ", ") +
                       std::to_string(n_head) + "/" + std::to_string(n_head_kv) + " heads of " + std::to_string(d);
    report(t, name, us, n_tok > 8 ? 0 : 4.0 * n_head_kv * d * static_cast<double>(n_key), n_tok > 8 ? 4.0 * pairs * n_head * d : 0);
    for (void *p : { static_cast<void *>(slab), static_cast<void *>(q), static_cast<void *>(o), static_cast<void *>(lse) }) t->b->ops->release(t->b, p);
}

/* One layer of decoding, 32 times: op by op, and as a graph. */
void decode_step(bench *t, bool graph)
{
    const int64_t d = 4096, ff = 14336, kv = 1024;
    const kvf_dtype q4 = KVF_DTYPE_Q4_K, q6 = KVF_DTYPE_Q6_K;
    struct { kvf_dtype type; int64_t n_out, n_in; } shape[7] = { { q4, d, d }, { q4, kv, d }, { q6, kv, d }, { q4, d, d }, { q4, ff, d }, { q4, ff, d }, { q6, d, ff } };
    enum { LAYERS = 32 };
    std::vector<kvf_cuda_weight_box> boxes(7 * LAYERS);
    std::vector<kvf_weight> w(7 * LAYERS);
    double bytes = 0;
    std::vector<void *> owned;
    for (size_t i = 0; i < w.size(); i++) {
        const auto &s = shape[i % 7];
        size_t row = kvf_cuda_row_bytes(s.type, s.n_in);
        void *p = room(t, row * static_cast<size_t>(s.n_out));
        cudaMemsetAsync(p, static_cast<int>(0x11 + i % 64), row * static_cast<size_t>(s.n_out), t->c->stream);
        owned.push_back(p);
        boxes[i] = { { s.type, s.n_out, s.n_in, row, static_cast<uint8_t *>(p) }, nullptr };
        w[i].type = s.type;
        w[i].n_out = s.n_out;
        w[i].n_in = s.n_in;
        w[i].data = &boxes[i];
        bytes += static_cast<double>(row) * static_cast<double>(s.n_out);
    }
    float *x = static_cast<float *>(noise(t, d * 4, true)), *h = static_cast<float *>(room(t, d * 4)), *y = static_cast<float *>(room(t, ff * 4)), *norm = static_cast<float *>(noise(t, d * 4, true));
    auto run = [&](int) {
        if (graph) must(kvf_cuda_step_begin(t->b, &t->err), *t);
        for (int l = 0; l < LAYERS; l++) {
            const kvf_weight *m = &w[static_cast<size_t>(7 * l)];
            kvf_rmsnorm_args n = { x, norm, h, 1, d, d, d, 1e-5f };
            kvf_matmul_args qkv = {}, out = {}, down = {};
            qkv.x = h;
            qkv.n_tok = out.n_tok = down.n_tok = 1;
            qkv.n_w = 3;
            out.n_w = down.n_w = 1;
            for (int j = 0; j < 3; j++) {
                qkv.w[j] = m + j;
                qkv.y[j] = y + 4096 * j;
            }
            out.x = y;
            out.w[0] = m + 3;
            out.y[0] = h;
            kvf_matmul_glu_args g = { h, 1, m + 4, m + 5, y, KVF_ACT_SILU };
            down.x = y;
            down.w[0] = m + 6;
            down.y[0] = h;
            must(t->b->ops->rmsnorm(t->b, &n, &t->err), *t);
            must(t->b->ops->matmul(t->b, &qkv, &t->err), *t);
            must(t->b->ops->matmul(t->b, &out, &t->err), *t);
            must(t->b->ops->rmsnorm(t->b, &n, &t->err), *t);
            must(t->b->ops->matmul_glu(t->b, &g, &t->err), *t);
            must(t->b->ops->matmul(t->b, &down, &t->err), *t);
        }
        if (graph) must(kvf_cuda_step_end(t->b, &t->err), *t);
    };
    double us = time_of(t, run);
    report(t, std::string("products of a token, 8B Q4_K_M, ") + (graph ? "as a graph" : "op by op"), us, bytes, 0);
    for (void *p : owned) t->b->ops->release(t->b, p);
    for (void *p : { static_cast<void *>(x), static_cast<void *>(h), static_cast<void *>(y), static_cast<void *>(norm) }) t->b->ops->release(t->b, p);
}

bool write_json(const bench &t, const char *path)
{
    FILE *f = fopen(path, "w");
    if (!f) return false;
    fprintf(f, "{\"device\":\"%s\",\"copy_bytes_s\":%.6g,\"product_flop_s\":%.6g,\"rows\":[\n", t.c->name, t.copy, t.gemm);
    for (size_t i = 0; i < t.rows.size(); i++)
        fprintf(f, "{\"name\":\"%s\",\"us\":%.4f,\"bytes\":%.6g,\"flop\":%.6g}%s\n", t.rows[i].name.c_str(), t.rows[i].us, t.rows[i].bytes, t.rows[i].flop,
                i + 1 < t.rows.size() ? "," : "");
    fprintf(f, "]}\n");
    return fclose(f) == 0;
}

} // namespace

int main(int argc, char **argv)
{
    bench t;
    const char *json = nullptr;
    bool quick = false;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--quick")) quick = true;
        else if (!strcmp(argv[i], "--json") && i + 1 < argc) json = argv[++i];
        else return fprintf(stderr, "usage: bench_cuda [--json FILE] [--quick]\n"), 2;
    }
    char text[256];
    const kvf_backend_module *m = kvf_backend_module_2();
    if (m->probe(text, sizeof text) < 1) return fprintf(stderr, "bench_cuda: %s\n", text), 77;
    printf("%s\n", text);
    kvf_device_params p = {};
    p.mem = &kvf_mem_default;
    must(m->open(&t.b, &p, &t.err), t);
    t.c = kvf_cuda_self(t.b);
    if (quick) t.repeat = 10;
    ceilings(&t);
    products(&t);
    for (named_type k : { named_type{ KVF_DTYPE_Q4_K, "Q4_K" }, named_type{ KVF_DTYPE_Q6_K, "Q6_K" }, named_type{ KVF_DTYPE_Q8_0, "Q8_0" }, named_type{ KVF_DTYPE_Q5_K, "Q5_K" } }) gemv(&t, k);
    for (int64_t n : { 6272, 32768, 131072 }) attention(&t, 1, n, 32, 8, 128, true);
    attention(&t, 1, 32768, 14, 2, 64, true);
    attention(&t, 512, 6272, 32, 8, 128, true);
    attention(&t, 512, 6272, 32, 8, 128, false);
    attention(&t, 2048, 2048, 32, 8, 128, true);
    if (!quick) attention(&t, 4096, 32768, 32, 8, 128, true);
    attention(&t, 512, 6272, 14, 2, 64, true);
    attention(&t, 512, 6272, 8, 4, 256, true);
    decode_step(&t, false);
    decode_step(&t, true);
    if (json && !write_json(t, json)) return fprintf(stderr, "bench_cuda: cannot write '%s'\n", json), 1;
    t.b->ops->close(t.b);
    return 0;
}
