/* cpu_backend.c - the CPU's op table: every op cut into parts for the thread pool.
 *
 * Small ops (one token's norm, RoPE, GLU) run on the calling thread: waking a worker costs more
 * than they do. Scratch grows to the largest request and is kept: packed activations are shared,
 * kernel scratch is per worker.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/cpu_backend_int.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "backend/cpu/mm.h"

/* Elements under which an element-wise op is not worth a wake-up (about 5 us of work). */
enum { SERIAL_ELEMENTS = 32768 };

typedef kvf_cpu_backend cpu_backend;

static cpu_backend *self(kvf_backend *b) { return kvf_cpu_self(b); }

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

kvf_status kvf_cpu_grow_scratch(cpu_backend *c, uint8_t **buf, int64_t *cap, size_t bytes, kvf_error *err)
{
    if ((int64_t)bytes <= *cap) return KVF_OK;
    kvf_free(c->base.mem, *buf);
    *buf = NULL;
    *cap = 0;
    *buf = kvf_alloc_raw(c->base.mem, bytes, 1);
    if (!*buf)
        return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: %zu bytes of scratch refused; use a smaller batch", bytes);
    *cap = (int64_t)bytes;
    return KVF_OK;
}

kvf_status kvf_cpu_grow_work(cpu_backend *c, size_t bytes, kvf_error *err)
{
    bytes = round_up(bytes + 1, 4096); /* no two workers on one page */
    if ((int64_t)bytes <= c->work_bytes) return KVF_OK;
    size_t all;
    if (!kvf_mul_size(bytes, (size_t)c->n_threads, &all)) all = SIZE_MAX;
    c->work_bytes = 0;
    KVF_TRY(kvf_cpu_grow_scratch(c, &c->work, &c->work_cap, all, err));
    c->work_bytes = (int64_t)bytes;
    return KVF_OK;
}

void kvf_cpu_run_parts(cpu_backend *c, int64_t n, int64_t elements, kvf_task_fn fn, void *arg)
{
    if (elements < SERIAL_ELEMENTS) {
        for (int64_t i = 0; i < n; i++) fn(arg, i, 0);
    } else {
        kvf_threads_run(c->threads, n, fn, arg);
    }
}

/* ---- Memory --------------------------------------------------------------------------- */

static kvf_status op_alloc(kvf_backend *b, void **out, size_t bytes, kvf_error *err)
{
    *out = kvf_alloc_raw(b->mem, bytes, 1);
    if (*out) return KVF_OK;
    return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: %zu bytes refused; lower the context or the batch", bytes);
}

static void op_release(kvf_backend *b, void *ptr) { kvf_free(b->mem, ptr); }

static kvf_status op_copy(kvf_backend *b, void *dst, const void *src, size_t bytes, kvf_error *err)
{
    (void)b;
    (void)err;
    if (bytes) memcpy(dst, src, bytes);
    return KVF_OK;
}

static kvf_status op_sync(kvf_backend *b, kvf_error *err)
{
    (void)b;
    (void)err;
    return KVF_OK;
}

static kvf_status op_weight_init(kvf_backend *b, kvf_weight *w, kvf_dtype type, int64_t n_out, int64_t n_in,
                                 const void *data, kvf_error *err)
{
    (void)b;
    const kvf_dtype_info *info = kvf_dtype_get((uint32_t)type);
    if (!info) return kvf_fail(err, KVF_ERR_UNSUPPORTED, "the CPU backend has no tensor type %d", (int)type);
    *w = (kvf_weight){ .type = type, .n_out = n_out, .n_in = n_in,
                       .row_bytes = kvf_dtype_row_bytes((uint32_t)type, n_in), .data = data };
    return KVF_OK;
}

/* ---- Element-wise ---------------------------------------------------------------------- */

typedef struct rows_task {
    cpu_backend *c;
    const void *args;
    int64_t n_row, per_part;
} rows_task;

/* Rows are cut into four parts a thread, so that a slow core does not hold the others up. */
static rows_task rows_split(cpu_backend *c, const void *args, int64_t n_row, int64_t *n_part)
{
    int64_t per = (n_row + 4 * c->n_threads - 1) / (4 * c->n_threads);
    if (per < 1) per = 1;
    *n_part = (n_row + per - 1) / per;
    return (rows_task){ c, args, n_row, per };
}

static int64_t rows_begin(const rows_task *t, int64_t part) { return part * t->per_part; }

static int64_t rows_end(const rows_task *t, int64_t part)
{
    int64_t end = (part + 1) * t->per_part;
    return end < t->n_row ? end : t->n_row;
}

static void embed_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    const kvf_embed_args *a = t->args;
    int64_t width = a->table->n_in;
    for (int64_t i = rows_begin(t, part); i < rows_end(t, part); i++) {
        const char *row = (const char *)a->table->data + (size_t)a->tokens[i] * a->table->row_bytes;
        float *out = a->out + i * width;
        kvf_race_write(out, (size_t)width * sizeof *out);
        t->c->ops.dequant(a->table->type, row, out, width);
        if (a->scale != 1.0f) t->c->ops.scale(out, a->scale, width);
    }
}

static kvf_status op_embed(kvf_backend *b, const kvf_embed_args *a, kvf_error *err)
{
    (void)err;
    int64_t n_part;
    rows_task t = rows_split(self(b), a, a->n_tok, &n_part);
    kvf_cpu_run_parts(t.c, n_part, a->n_tok * a->table->n_in, embed_part, &t);
    return KVF_OK;
}

static void rmsnorm_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    const kvf_rmsnorm_args *a = t->args;
    for (int64_t i = rows_begin(t, part); i < rows_end(t, part); i++)
        t->c->ops.rmsnorm(a->x + i * a->x_stride, a->weight, a->out + i * a->out_stride, a->width, a->eps);
}

static kvf_status op_rmsnorm(kvf_backend *b, const kvf_rmsnorm_args *a, kvf_error *err)
{
    (void)err;
    int64_t n_part;
    rows_task t = rows_split(self(b), a, a->n_row, &n_part);
    kvf_cpu_run_parts(t.c, n_part, a->n_row * a->width, rmsnorm_part, &t);
    return KVF_OK;
}

static void rope_table_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    const kvf_rope_table_args *a = t->args;
    int32_t half = a->n_rot / 2;
    for (int64_t i = rows_begin(t, part); i < rows_end(t, part); i++) {
        float *row = a->cos_sin + i * a->n_rot;
        for (int32_t j = 0; j < half; j++) {
            /* In double: at position 10^6 a float angle is off by 0.03 radians. */
            double angle = (double)a->pos[i] * a->inv_freq[j];
            row[j] = (float)cos(angle) * a->mscale;
            row[half + j] = (float)sin(angle) * a->mscale;
        }
    }
}

static kvf_status op_rope_table(kvf_backend *b, const kvf_rope_table_args *a, kvf_error *err)
{
    (void)err;
    int64_t n_part;
    rows_task t = rows_split(self(b), a, a->n_tok, &n_part);
    kvf_cpu_run_parts(t.c, n_part, a->n_tok * a->n_rot * 32, rope_table_part, &t);
    return KVF_OK;
}

static void rope_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    const kvf_rope_args *a = t->args;
    for (int64_t i = rows_begin(t, part); i < rows_end(t, part); i++)
        t->c->ops.rope(a->x + i * a->n_head * a->head_dim, a->n_head, a->head_dim, a->n_rot,
                       a->cos_sin + i * a->n_rot, a->kind);
}

static kvf_status op_rope(kvf_backend *b, const kvf_rope_args *a, kvf_error *err)
{
    (void)err;
    int64_t n_part;
    rows_task t = rows_split(self(b), a, a->n_tok, &n_part);
    kvf_cpu_run_parts(t.c, n_part, a->n_tok * a->n_head * a->head_dim, rope_part, &t);
    return KVF_OK;
}

static void kv_put_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    const kvf_kv_put_args *a = t->args;
    int64_t d = a->head_dim, plane = (int64_t)KVF_BLOCK * d, v_at = a->n_head_kv * plane;
    for (int64_t i = rows_begin(t, part); i < rows_end(t, part); i++) {
        int64_t place = a->first + i;
        kvf_f16 *slot = kvf_kv_slot(a->kv, a->slots[place >> KVF_BLOCK_SHIFT]);
        kvf_f16 *row = slot + (place & (KVF_BLOCK - 1)) * d;
        for (int32_t h = 0; h < a->n_head_kv; h++) {
            int64_t from = (i * a->n_head_kv + h) * d;
            t->c->ops.f32_to_f16(a->k + from, row + h * plane, d);
            t->c->ops.f32_to_f16(a->v + from, row + v_at + h * plane, d);
        }
    }
}

static kvf_status op_kv_put(kvf_backend *b, const kvf_kv_put_args *a, kvf_error *err)
{
    (void)err;
    int64_t n_part;
    rows_task t = rows_split(self(b), a, a->n_tok, &n_part);
    kvf_cpu_run_parts(t.c, n_part, 2 * a->n_tok * a->n_head_kv * a->head_dim, kv_put_part, &t);
    return KVF_OK;
}

/* Flat arrays are cut into runs of this many elements, whole cache lines. */
enum { FLAT_RUN = 16384 };

typedef struct add_args {
    float *x;
    const float *y;
    int64_t n;
} add_args;

static void add_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const rows_task *t = arg;
    const add_args *a = t->args;
    int64_t at = part * FLAT_RUN, n = a->n - at < FLAT_RUN ? a->n - at : FLAT_RUN;
    t->c->ops.add(a->x + at, a->y + at, n);
}

static kvf_status op_add(kvf_backend *b, float *x, const float *y, int64_t n, kvf_error *err)
{
    (void)err;
    add_args a = { x, y, n };
    rows_task t = { self(b), &a, 0, 0 };
    kvf_cpu_run_parts(t.c, (n + FLAT_RUN - 1) / FLAT_RUN, n, add_part, &t);
    return KVF_OK;
}

/* ---- Matrix product --------------------------------------------------------------------- */

typedef struct matmul_task {
    cpu_backend *c;
    const kvf_matmul_args *a;
    const kvf_mm_kernel *kernel[KVF_MATMUL_MAX];
    const void *x[KVF_MATMUL_MAX];         /* packed, per weight */
    int64_t first_part[KVF_MATMUL_MAX + 1]; /* parts of weight j: first_part[j] .. first_part[j + 1] */
    int64_t rows[KVF_MATMUL_MAX];          /* per part */
} matmul_task;

/* Run it; ThreadSanitizer hears of its ranges, since the kernel is not watched. Weights are never written. */
static void run_product(const kvf_mm_kernel *kernel, const kvf_mm_part *p)
{
    kvf_race_read(p->x, kernel->x_bytes(p->n_tok, p->w->n_in));
    for (int64_t t = 0; t < p->n_tok; t++)
        kvf_race_write(p->y + t * p->y_stride + p->row0, (size_t)(p->row1 - p->row0) * sizeof *p->y);
    kernel->run(p);
}

static void matmul_part(void *arg, int64_t part, int32_t worker)
{
    const matmul_task *t = arg;
    int32_t j = 0;
    while (part >= t->first_part[j + 1]) j++;
    const kvf_weight *w = t->a->w[j];
    int64_t row0 = (part - t->first_part[j]) * t->rows[j], row1 = row0 + t->rows[j];
    kvf_mm_part p = { .w = w, .x = t->x[j], .n_tok = t->a->n_tok, .row0 = row0,
                      .row1 = row1 < w->n_out ? row1 : w->n_out, .bias = t->a->bias[j], .y = t->a->y[j],
                      .y_stride = w->n_out, .accumulate = t->a->accumulate, .scratch = kvf_cpu_work_of(t->c, worker) };
    run_product(t->kernel[j], &p);
}

typedef struct pack_task {
    const kvf_mm_kernel *kernel;
    const kvf_matmul_args *a;
    void *out;
    int64_t rows;
} pack_task;

static void pack_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const pack_task *t = arg;
    int64_t t0 = part * t->rows, t1 = t0 + t->rows;
    int64_t n_in = t->a->w[0]->n_in;
    if (t1 > t->a->n_tok) t1 = t->a->n_tok;
    /* In every form tokens follow each other, in groups of pack_align. */
    kvf_race_read(t->a->x + t0 * n_in, (size_t)((t1 - t0) * n_in) * sizeof *t->a->x);
    kvf_race_write((uint8_t *)t->out + t->kernel->x_bytes(t0, n_in),
                   t->kernel->x_bytes(t1, n_in) - t->kernel->x_bytes(t0, n_in));
    t->kernel->pack(t->a->x, t->a->n_tok, n_in, t0, t1, t->out);
}

/* Pack x for kernel j, unless an earlier weight of this call has the same form. */
static kvf_status pack_x(matmul_task *t, int32_t j, kvf_error *err)
{
    cpu_backend *c = t->c;
    const kvf_mm_kernel *kernel = t->kernel[j];
    for (int32_t i = 0; i < j; i++) {
        if (t->kernel[i]->x_form != kernel->x_form) continue;
        t->x[j] = t->x[i];
        return KVF_OK;
    }
    int64_t n_tok = t->a->n_tok, n_in = t->a->w[0]->n_in;
    KVF_TRY(kvf_cpu_grow_scratch(c, &c->packed[j], &c->packed_cap[j], kernel->x_bytes(n_tok, n_in), err));
    t->x[j] = c->packed[j];
    pack_task p = { kernel, t->a, c->packed[j], 0 };
    int64_t rows = (n_tok + 2 * c->n_threads - 1) / (2 * c->n_threads);
    p.rows = (rows + kernel->pack_align - 1) / kernel->pack_align * kernel->pack_align;
    kvf_cpu_run_parts(c, (n_tok + p.rows - 1) / p.rows, n_tok * n_in, pack_part, &p);
    return KVF_OK;
}

/* Rows per part: up to eight parts a thread, so that uneven cores balance, but the same number for
 * each. Decode: at least 64 KiB of weights, so that streaming is not cut short. Prefill: at least
 * 256 rows, since each part reads all packed activations once. */
static int64_t rows_per_part(const cpu_backend *c, const kvf_weight *w, int64_t n_tok, int64_t align)
{
    int64_t least = n_tok <= KVF_MV_MAX_TOK ? (int64_t)(65536 / w->row_bytes) + 1 : 256;
    int64_t rounds = w->n_out / (least * c->n_threads);
    rounds = rounds < 1 ? 1 : rounds > 8 ? 8 : rounds;
    int64_t parts = rounds * c->n_threads, rows = (w->n_out + parts - 1) / parts;
    return (rows + align - 1) / align * align;
}

/* The kernel for a weight, noted for kernels(). */
static const kvf_mm_kernel *pick_kernel(cpu_backend *c, const kvf_weight *w, int64_t n_tok)
{
    const kvf_mm_kernel *kernel = c->ops.mm_pick(&c->ops, w->type, n_tok, c->f32);
    if (n_tok > KVF_MV_MAX_TOK) c->ran_mm = kernel->name;
    else c->ran_mv = kernel->name;
    return kernel;
}

static kvf_status op_matmul(kvf_backend *b, const kvf_matmul_args *a, kvf_error *err)
{
    cpu_backend *c = self(b);
    if (a->n_tok <= 0) return KVF_OK;
    matmul_task t = { .c = c, .a = a };
    int64_t work = 0;
    for (int32_t j = 0; j < a->n_w; j++) {
        const kvf_weight *w = a->w[j];
        const kvf_mm_kernel *kernel = t.kernel[j] = pick_kernel(c, w, a->n_tok);
        KVF_TRY(kvf_cpu_grow_work(c, kernel->scratch_bytes(w->type, a->n_tok, w->n_in), err));
        KVF_TRY(pack_x(&t, j, err));
        t.rows[j] = rows_per_part(c, w, a->n_tok, kernel->row_align);
        t.first_part[j + 1] = t.first_part[j] + (w->n_out + t.rows[j] - 1) / t.rows[j];
        work += w->n_out * w->n_in * a->n_tok;
    }
    for (int32_t j = a->n_w; j < KVF_MATMUL_MAX; j++) t.first_part[j + 1] = t.first_part[a->n_w];
    kvf_cpu_run_parts(c, t.first_part[a->n_w], work, matmul_part, &t);
    return KVF_OK;
}

/* Rows of both products that a worker holds at once: with 512 tokens two times 256 KiB, in L2. */
enum { GLU_ROWS = 128 };

typedef struct glu_task {
    cpu_backend *c;
    const kvf_matmul_glu_args *a;
    const kvf_mm_kernel *kernel[2]; /* of gate and up */
    const void *x[2];               /* packed, for each */
    int64_t rows;                   /* per part, a multiple of GLU_ROWS in prefill */
    size_t at[2], scratch_at;       /* offsets in the worker's memory: two products, kernel scratch */
} glu_task;

static void glu_part(void *arg, int64_t part, int32_t worker)
{
    const glu_task *t = arg;
    const kvf_matmul_glu_args *a = t->a;
    const kvf_weight *w[2] = { a->gate, a->up };
    uint8_t *mem = kvf_cpu_work_of(t->c, worker);
    int64_t end = (part + 1) * t->rows < a->gate->n_out ? (part + 1) * t->rows : a->gate->n_out;
    for (int64_t row = part * t->rows; row < end; row += GLU_ROWS) {
        int64_t n = end - row < GLU_ROWS ? end - row : GLU_ROWS;
        float *y[2];
        for (int i = 0; i < 2; i++) {
            y[i] = (float *)(void *)(mem + t->at[i]);
            kvf_mm_part p = { .w = w[i], .x = t->x[i], .n_tok = a->n_tok, .row0 = row, .row1 = row + n,
                              .y = y[i] - row, .y_stride = GLU_ROWS, .scratch = mem + t->scratch_at };
            run_product(t->kernel[i], &p);
        }
        for (int64_t k = 0; k < a->n_tok; k++) {
            t->c->ops.glu(y[0] + k * GLU_ROWS, y[1] + k * GLU_ROWS, n, a->act);
            memcpy(a->y + k * a->gate->n_out + row, y[0] + k * GLU_ROWS, (size_t)n * sizeof(float));
        }
    }
}

static kvf_status op_matmul_glu(kvf_backend *b, const kvf_matmul_glu_args *a, kvf_error *err)
{
    cpu_backend *c = self(b);
    if (a->n_tok <= 0) return KVF_OK;
    kvf_matmul_args both = { .x = a->x, .n_tok = a->n_tok, .n_w = 2, .w = { a->gate, a->up } };
    matmul_task m = { .c = c, .a = &both };
    glu_task t = { .c = c, .a = a };
    size_t product = round_up((size_t)a->n_tok * GLU_ROWS * sizeof(float), 64), scratch = 0;
    for (int32_t j = 0; j < 2; j++) {
        m.kernel[j] = t.kernel[j] = pick_kernel(c, both.w[j], a->n_tok);
        KVF_TRY(pack_x(&m, j, err));
        t.x[j] = m.x[j];
        t.at[j] = (size_t)j * product;
        size_t bytes = t.kernel[j]->scratch_bytes(both.w[j]->type, a->n_tok, a->gate->n_in);
        if (bytes > scratch) scratch = bytes;
    }
    t.scratch_at = 2 * product;
    KVF_TRY(kvf_cpu_grow_work(c, 2 * product + scratch, err));
    t.rows = rows_per_part(c, a->gate, a->n_tok, GLU_ROWS);
    kvf_cpu_run_parts(c, (a->gate->n_out + t.rows - 1) / t.rows, 2 * a->gate->n_out * a->gate->n_in * a->n_tok, glu_part, &t);
    return KVF_OK;
}

/* ---- Merge ------------------------------------------------------------------------------ */

static kvf_status op_lse_merge(kvf_backend *b, const kvf_lse_merge_args *a, kvf_error *err)
{
    (void)err;
    for (int64_t r = 0; r < a->n_row; r++)
        self(b)->ops.lse_merge(a->o + r * a->head_dim, a->lse + r, a->o2 + r * a->head_dim, a->lse2 + r, a->head_dim);
    return KVF_OK;
}

/* ---- The table -------------------------------------------------------------------------- */

/* Larger chunks unpack each weight less often, but packed activations and products no longer fit
 * the L2 of a core: of 192 to 1024 tokens, 512 reads 4096 tokens fastest (1500 tokens/s, 1024: 1370,
 * 256: 1345; 0.5B model, two cores with AMX and 2 MiB of L2). */
static int64_t op_batch_hint(kvf_backend *b)
{
    (void)b;
    return 512;
}

static void op_kernels(kvf_backend *b, char *out, size_t cap)
{
    cpu_backend *c = self(b);
    const char *const what[] = { "mm", "mv", "attn", "attn_decode", "score" };
    const char *const ran[] = { c->ran_mm, c->ran_mv, c->ran_attn, c->ran_attn_decode, c->ran_score };
    size_t at = 0;
    out[0] = 0;
    for (size_t i = 0; i < sizeof ran / sizeof *ran; i++) {
        if (!ran[i]) continue;
        int n = snprintf(out + at, cap - at, "%s%s=%s", at ? " " : "", what[i], ran[i]);
        if (n < 0 || (size_t)n >= cap - at) return;
        at += (size_t)n;
    }
}

static void op_describe(kvf_backend *b, char *out, size_t cap)
{
    snprintf(out, cap, "%s", kvf_cpu_level_name(self(b)->ops.level));
}

static void op_close(kvf_backend *b)
{
    cpu_backend *c = self(b);
    for (int i = 0; i < KVF_MATMUL_MAX; i++) kvf_free(b->mem, c->packed[i]);
    kvf_free(b->mem, c->work);
    kvf_free(b->mem, c->partial);
    kvf_turn_fini(&b->run);
    kvf_free(b->mem, c);
}

static const kvf_backend_ops cpu_table = {
    .host_memory = true, .attn_runs = true,
    .abi = KVF_BACKEND_ABI, .name = "cpu", .close = op_close,
    .alloc = op_alloc, .release = op_release, .upload = op_copy, .download = op_copy, .copy = op_copy, .sync = op_sync,
    .weight_init = op_weight_init,
    .embed = op_embed, .rmsnorm = op_rmsnorm, .matmul = op_matmul, .matmul_glu = op_matmul_glu, .rope_table = op_rope_table, .rope = op_rope,
    .kv_put = op_kv_put, .kv_turn = kvf_cpu_op_kv_turn, .kv_gather = kvf_cpu_op_kv_gather,
    .attn = kvf_cpu_op_attn, .attn_mass = kvf_cpu_op_attn_mass,
    .digest = kvf_cpu_op_digest, .reps = kvf_cpu_op_reps, .vote = kvf_cpu_op_vote, .lse_merge = op_lse_merge, .add = op_add,
    .batch_hint = op_batch_hint, .kernels = op_kernels, .describe = op_describe,
};

kvf_status kvf_cpu_backend_open(kvf_backend **out, const kvf_cpu_backend_params *p, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(p->mem, &block, 1, sizeof(cpu_backend), err));
    cpu_backend *c = block;
    c->base.ops = &cpu_table;
    c->base.mem = p->mem;
    c->base.log = p->log;
    kvf_turn_init(&c->base.run);
    /* With BF16, attention rounds probabilities and values: not in exact mode (AMX: api/ctx.c). */
    kvf_cpu_ops_init(&c->ops, p->level, p->f32 ? p->flags & ~(unsigned)KVF_CPU_AVX512_BF16 : p->flags);
    c->f32 = p->f32;
    c->threads = p->threads;
    c->n_threads = kvf_threads_count(p->threads);
    *out = &c->base;
    return KVF_OK;
}
