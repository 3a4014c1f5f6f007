/* test_mamba_named.c - STORM's layers from named weights and from GGUF files: the same bits as from pointers, and
 * every kind of damage named.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#include "base/half.h"
#include "tests/merge_rig.h"
#include "tests/unit/gguf_image.h"

/* name in the fixture, name in a file */
static const struct {
    const char *fixture, *file;
} weights[] = {
    { "ln_w", "norm.weight" },          { "ln_b", "norm.bias" },
    { "in_proj", "mixer.in_proj.weight" }, { "out_proj", "mixer.out_proj.weight" },
    { "conv_w", "mixer.conv1d.weight" }, { "conv_b", "mixer.conv1d.bias" },
    { "x_proj", "mixer.x_proj.weight" }, { "dt_w", "mixer.dt_proj.weight" },
    { "dt_b", "mixer.dt_proj.bias" },    { "A_log", "mixer.A_log" },
    { "D", "mixer.D" },                  { "b_conv_w", "mixer.conv1d_b.weight" },
    { "b_conv_b", "mixer.conv1d_b.bias" }, { "b_x_proj", "mixer.x_proj_b.weight" },
    { "b_dt_w", "mixer.dt_proj_b.weight" }, { "b_dt_b", "mixer.dt_proj_b.bias" },
    { "b_A_log", "mixer.A_b_log" },      { "b_D", "mixer.D_b" },
};
enum { N_WEIGHT = sizeof weights / sizeof *weights, N_FORWARD = 11, N_MOST = 2 * N_WEIGHT };

typedef struct list {
    kvf_mamba_tensor t[N_MOST];
    char name[N_MOST][80];
    int64_t n;
} list;

/* Two layers of the fixtures; values are read-only. */
static void make_list(list *l, bool both)
{
    l->n = 0;
    for (int layer = 0; layer < 2; layer++)
        for (int i = 0; i < (both ? N_WEIGHT : N_FORWARD); i++) {
            char folder[40];
            snprintf(folder, sizeof folder, "mamba/block/layer%d", layer);
            npy a = npy_must(folder, weights[i].fixture);
            kvf_mamba_tensor *t = &l->t[l->n];
            snprintf(l->name[l->n], sizeof *l->name, "model.layers.%d.%s", layer, weights[i].file);
            *t = (kvf_mamba_tensor){ .name = l->name[l->n], .data = f32(&a), .n_dim = 1, .shape = { a.shape[0] } };
            for (int k = 1; k < 3 && a.n / t->shape[0] > 1; k++) {
                t->n_dim = 2;
                t->shape[1] = a.n / a.shape[0];
            }
            l->n++;
        }
}

static kvf_mamba_branch branch(const list *l, int64_t at)
{
    const float *p[7];
    for (int i = 0; i < 7; i++) p[i] = l->t[at + i].data;
    return (kvf_mamba_branch){ p[0], p[1], p[2], p[3], p[4], p[5], p[6] };
}

/* From pointers, the layers as tests/parity/test_merge_mamba.c holds them to the recurrence. */
static kvf_mamba *open_pointers(kvf_ctx *ctx, const list *l, bool both)
{
    kvf_mamba_layer layer[2];
    for (int i = 0; i < 2; i++) {
        int64_t at = i * l->n / 2;
        layer[i] = (kvf_mamba_layer){ .norm_w = l->t[at].data,
                                      .norm_b = l->t[at + 1].data,
                                      .in_proj = l->t[at + 2].data,
                                      .out_proj = l->t[at + 3].data,
                                      .forward = branch(l, at + 4) };
        if (both) layer[i].backward = branch(l, at + N_FORWARD);
    }
    kvf_mamba_params p;
    kvf_mamba_params_init(&p);
    p.layers = layer;
    p.n_layer = 2;
    p.d_model = 24;
    p.d_inner = 48;
    p.d_state = 16;
    p.dt_rank = 2;
    kvf_mamba *m;
    kvf_error err;
    cr_assert_eq(kvf_mamba_open(&m, ctx, &p, &err), KVF_OK, "%s", err.msg);
    return m;
}

static float *run_all(kvf_mamba *m)
{
    npy x = npy_must("mamba/block", "x");
    float *v = malloc((size_t)x.n * 4);
    kvf_error err;
    memcpy(v, x.data, (size_t)x.n * 4);
    cr_assert_eq(kvf_mamba_run(m, v, x.shape[0], &err), KVF_OK, "%s", err.msg);
    kvf_mamba_close(m);
    return v;
}

static void expect_same(float *a, float *b, const char *what)
{
    npy x = npy_must("mamba/block", "x");
    cr_assert_eq(memcmp(a, b, (size_t)x.n * 4), 0, "%s: not the same bits", what);
    free(a);
    free(b);
}

Test(mamba_named, weights_by_name_give_the_bits_of_weights_by_pointer)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    for (int both = 0; both < 2; both++) {
        list l;
        kvf_mamba *m;
        kvf_error err;
        make_list(&l, both != 0);
        kvf_mamba_tensor back[N_MOST]; /* the order in a file says nothing */
        for (int64_t i = 0; i < l.n; i++) back[i] = l.t[l.n - 1 - i];
        cr_assert_eq(kvf_mamba_open_tensors(&m, ctx, back, l.n, 0, &err), KVF_OK, "%s", err.msg);
        kvf_mamba_info info = { .size = sizeof info };
        cr_assert_eq(kvf_mamba_get_info(m, &info, &err), KVF_OK);
        cr_assert(info.n_layer == 2 && info.d_model == 24 && info.d_inner == 48 && info.d_state == 16 &&
                  info.dt_rank == 2 && info.d_conv == 4 && info.backward == both);
        expect_same(run_all(m), run_all(open_pointers(ctx, &l, both != 0)), both ? "both ways" : "one way");
    }
    kvf_ctx_close(ctx);
}

Test(mamba_named, a_convolution_may_have_a_side_of_1_and_norms_may_be_absent)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    list l;
    kvf_mamba *m;
    kvf_error err;
    make_list(&l, false);
    l.t[4].n_dim = 3;
    l.t[4].shape[2] = l.t[4].shape[1];
    l.t[4].shape[1] = 1;
    cr_assert_eq(kvf_mamba_open_tensors(&m, ctx, l.t + 2, l.n - 2, 1e-6f, &err), KVF_OK, "%s", err.msg);
    kvf_mamba_close(m);
    kvf_ctx_close(ctx);
}

/* ---- Damage ------------------------------------------------------------------------------------ */

static void refuse(kvf_ctx *ctx, const list *l, kvf_status want, const char *says)
{
    kvf_mamba *m = NULL;
    kvf_error err;
    kvf_status rc = kvf_mamba_open_tensors(&m, ctx, l->t, l->n, 0, &err);
    cr_assert_eq(rc, want, "%s: %d", says, (int)rc);
    cr_assert_null(m);
    cr_assert(strstr(err.msg, says), "'%s' says nothing of '%s'", err.msg, says);
}

Test(mamba_named, what_is_wrong_is_named)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    list l;
    make_list(&l, true);
    l.n--;
    refuse(ctx, &l, KVF_ERR_FORMAT, "model.layers.1.mixer.D_b' is missing");
    make_list(&l, true);
    snprintf(l.name[3], sizeof *l.name, "model.layers.0.mixer.in_proj.bias");
    refuse(ctx, &l, KVF_ERR_FORMAT, "in_proj.bias");
    make_list(&l, true);
    snprintf(l.name[3], sizeof *l.name, "model.layers.0.mixer.in_proj.weight");
    refuse(ctx, &l, KVF_ERR_FORMAT, "twice");
    make_list(&l, true);
    snprintf(l.name[5], sizeof *l.name, "layers.0.mixer.conv1d.bias");
    refuse(ctx, &l, KVF_ERR_FORMAT, "'layers.0.mixer.conv1d.bias'");
    make_list(&l, true);
    for (int64_t i = N_WEIGHT; i < l.n; i++) l.name[i][13] = '2';
    refuse(ctx, &l, KVF_ERR_FORMAT, "one is missing");
    static const char *const odd[] = { "layers..norm.weight", "layers.01.norm.weight", "layers.99999999999999999999.norm.weight",
                                       "layers.", "layers.-1.norm.weight", "x", "" };
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        make_list(&l, false);
        l.t[0].name = odd[i];
        refuse(ctx, &l, KVF_ERR_FORMAT, "Mamba layer");
    }
    kvf_ctx_close(ctx);
}

Test(mamba_named, every_shape_is_checked_against_the_others)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    list l;
    make_list(&l, true);
    for (int64_t i = 0; i < l.n; i++)
        for (int k = 0; k < 4; k++) {
            static const int64_t side[] = { 0, -1, INT64_MAX, 7 };
            list bad = l;
            for (int64_t j = 0; j < l.n; j++) bad.t[j].name = bad.name[j];
            bad.t[i].shape[k % 2 && bad.t[i].n_dim > 1] = side[k];
            kvf_mamba *m;
            kvf_error err;
            cr_assert_eq(kvf_mamba_open_tensors(&m, ctx, bad.t, bad.n, 0, &err), KVF_ERR_FORMAT, "%s %d",
                         bad.t[i].name, k);
            cr_assert_null(m);
        }
    make_list(&l, false);
    l.t[0].n_dim = 5;
    refuse(ctx, &l, KVF_ERR_ARG, "dimensions");
    kvf_ctx_close(ctx);
}

Test(mamba_named, nan_and_infinity_are_found_with_their_place)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    for (int i = 0; i < 2; i++) {
        list l;
        make_list(&l, true);
        float bad[48];
        memcpy(bad, l.t[10].data, sizeof bad);
        bad[17] = i ? NAN : INFINITY;
        l.t[10].data = bad;
        refuse(ctx, &l, KVF_ERR_FORMAT, i ? "layers.0.mixer.D': element 17 is NaN" : "element 17 is infinite");
    }
    kvf_ctx_close(ctx);
}

/* ---- GGUF ------------------------------------------------------------------------------------- */

/* A file of l's tensors; half: 0 f32, 1 f16, 30 bf16 as GGUF counts types. Values are rounded in l, too. */
static void write_gguf(char path[64], list *l, uint32_t type, float *rounded)
{
    image g = img_new((uint64_t)l->n, 0);
    uint64_t at = 0;
    for (int64_t i = 0; i < l->n; i++) {
        uint64_t dim[2] = { (uint64_t)l->t[i].shape[l->t[i].n_dim - 1], (uint64_t)l->t[i].shape[0] };
        img_tensor(&g, l->t[i].name, (uint32_t)l->t[i].n_dim, dim, type, at);
        uint64_t n = dim[0] * (l->t[i].n_dim > 1 ? dim[1] : 1), bytes = n * (type ? 2 : 4);
        at += (bytes + 31) / 32 * 32;
    }
    for (int64_t i = 0; i < l->n; i++) {
        while (g.n % 32) img_u8(&g, 0);
        int64_t n = l->t[i].shape[0] * (l->t[i].n_dim > 1 ? l->t[i].shape[1] : 1);
        for (int64_t k = 0; k < n; k++) {
            float v = l->t[i].data[k];
            uint16_t half = type == 1 ? kvf_f16_from_f32(v) : kvf_bf16_from_f32(v);
            rounded[k] = !type ? v : type == 1 ? kvf_f32_from_f16(half) : kvf_f32_from_bf16(half);
            if (type)
                img_bytes(&g, &half, 2);
            else
                img_f32(&g, v);
        }
        l->t[i].data = rounded;
        rounded += n;
    }
    while (g.n % 32) img_u8(&g, 0);
    snprintf(path, 64, "/tmp/kvf-mamba-XXXXXX");
    int fd = mkstemp(path);
    cr_assert(fd >= 0 && write(fd, g.p, g.n) == (ssize_t)g.n && close(fd) == 0);
    img_free(&g);
}

Test(mamba_named, a_gguf_file_gives_the_bits_of_its_weights)
{
    static const uint32_t types[] = { 0, 1, 30 };
    kvf_ctx *ctx = ctx_of(NULL, 1);
    for (int i = 0; i < 3; i++) {
        list l;
        char path[64];
        kvf_mamba *m;
        kvf_error err;
        float *rounded = malloc(1 << 18);
        make_list(&l, true);
        write_gguf(path, &l, types[i], rounded);
        cr_assert_eq(kvf_mamba_open_gguf(&m, ctx, path, 0, &err), KVF_OK, "%s", err.msg);
        expect_same(run_all(m), run_all(open_pointers(ctx, &l, true)), "GGUF");
        free(rounded);
        unlink(path);
    }
    kvf_ctx_close(ctx);
}

Test(mamba_named, a_gguf_file_of_something_else_is_refused)
{
    kvf_ctx *ctx = ctx_of(NULL, 1);
    kvf_mamba *m;
    kvf_error err;
    list l;
    char path[64];
    float *rounded = malloc(1 << 18);
    cr_assert_eq(kvf_mamba_open_gguf(&m, ctx, "/nowhere/w.gguf", 0, &err), KVF_ERR_IO);
    cr_assert_eq(kvf_mamba_open_gguf(&m, ctx, KVF_TEST_DATA "/vision_tower/onevision.gguf", 0, &err), KVF_ERR_FORMAT);
    cr_assert(strstr(err.msg, "Mamba layer"), "%s", err.msg);
    make_list(&l, false);
    write_gguf(path, &l, 0, rounded);
    cr_assert_eq(truncate(path, 4000), 0);
    cr_assert_eq(kvf_mamba_open_gguf(&m, ctx, path, 0, &err), KVF_ERR_FORMAT, "%s", err.msg);
    cr_assert_null(m);
    unlink(path);
    free(rounded);
    kvf_ctx_close(ctx);
}
