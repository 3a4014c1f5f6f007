/* bench_mm_onednn.c - what oneDNN reaches on the same shapes: a ceiling to compare bench_mm with.
 *
 * y [n_tok][n_out] = x [n_tok][n_in] w [n_in][n_out], weights in the layout oneDNN likes best and
 * converted beforehand (which a model that keeps its weights quantised cannot afford); int8 has
 * no block scales. So a kernel of ours that comes near has nothing left to gain. One thread: run
 * with OMP_NUM_THREADS=1. Best of many runs.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <dnnl.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void check(dnnl_status_t s, const char *what)
{
    if (s == dnnl_success) return;
    fprintf(stderr, "bench_mm_onednn: %s failed with %d\n", what, (int)s);
    exit(1);
}

typedef struct types {
    const char *name;
    dnnl_data_type_t x, w, y;
} types;

static void measure(dnnl_engine_t engine, dnnl_stream_t stream, const types *t, const dnnl_dim_t *shape)
{
    dnnl_dim_t n_out = shape[0], n_in = shape[1], n_tok = shape[2];
    dnnl_dims_t xd = { n_tok, n_in }, wd = { n_in, n_out }, yd = { n_tok, n_out };
    dnnl_memory_desc_t x, w, y;
    check(dnnl_memory_desc_init_by_tag(&x, 2, xd, t->x, dnnl_ab), "x");
    check(dnnl_memory_desc_init_by_tag(&w, 2, wd, t->w, dnnl_format_tag_any), "w");
    check(dnnl_memory_desc_init_by_tag(&y, 2, yd, t->y, dnnl_ab), "y");
    dnnl_matmul_desc_t desc;
    dnnl_primitive_desc_t pd;
    dnnl_primitive_t prim;
    check(dnnl_matmul_desc_init(&desc, &x, &w, NULL, &y), "matmul desc");
    check(dnnl_primitive_desc_create(&pd, &desc, NULL, engine, NULL), "primitive desc");
    check(dnnl_primitive_create(&prim, pd), "primitive");
    dnnl_memory_t mx, mw, my;
    const dnnl_memory_desc_t *best_w = dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
    check(dnnl_memory_create(&mx, &x, engine, DNNL_MEMORY_ALLOCATE), "memory");
    check(dnnl_memory_create(&mw, best_w, engine, DNNL_MEMORY_ALLOCATE), "memory");
    check(dnnl_memory_create(&my, &y, engine, DNNL_MEMORY_ALLOCATE), "memory");
    dnnl_exec_arg_t args[] = { { DNNL_ARG_SRC, mx }, { DNNL_ARG_WEIGHTS, mw }, { DNNL_ARG_DST, my } };
    double best = 1e9, end = now() + 0.5;
    for (int rep = 0; rep < 3 || now() < end; rep++) {
        double start = now();
        check(dnnl_primitive_execute(prim, stream, 3, args), "execute");
        check(dnnl_stream_wait(stream), "wait");
        if (now() - start < best) best = now() - start;
    }
    double ops = 2.0 * (double)n_out * (double)n_in * (double)n_tok;
    printf("onednn,%s,%lld,%lld,%lld,%.1f\n", t->name, (long long)n_out, (long long)n_in, (long long)n_tok,
           ops / best * 1e-9);
    dnnl_memory_destroy(mx);
    dnnl_memory_destroy(mw);
    dnnl_memory_destroy(my);
    dnnl_primitive_destroy(prim);
    dnnl_primitive_desc_destroy(pd);
}

int main(void)
{
    static const dnnl_dim_t shapes[][3] = {
        { 896, 896, 512 }, { 4864, 896, 512 }, { 896, 4864, 512 }, { 8960, 1536, 512 }
    };
    static const types kinds[] = { { "bf16", dnnl_bf16, dnnl_bf16, dnnl_f32 },
                                   { "u8s8", dnnl_u8, dnnl_s8, dnnl_s32 } };
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    check(dnnl_engine_create(&engine, dnnl_cpu, 0), "engine");
    check(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags), "stream");
    printf("kernel,type,n_out,n_in,n_tok,gops\n");
    for (int k = 0; k < 2; k++)
        for (int s = 0; s < 4; s++) measure(engine, stream, &kinds[k], shapes[s]);
    dnnl_stream_destroy(stream);
    dnnl_engine_destroy(engine);
    return 0;
}
