/* resize.c - a frame of bytes to the square of normalised floats a tower reads.
 *
 * The models' processors resize with Pillow, and so do we, bit for bit: separable bicubic convolution
 * (a = -1/2) whose support widens with the shrinking factor (antialiasing), coefficients rounded to 22
 * fractional bits, rows first, then columns, the picture between them rounded to bytes. Then
 * (value / 255 - mean) / std in f32, of which there are only 256 a channel: a table.
 *
 * Source: Keys 1981, "Cubic convolution interpolation for digital image processing", eq. 15; the fixed
 * point is that of Pillow's Resample.c, held to it by tests/unit/test_vision_resize.c.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "vision/tower.h"

enum { BITS = 22 }; /* of a coefficient after the point: 32 less 8 of a byte less 2 of sums over 1 */

/* One axis: output i is sum_j k[i * most + j] * in[first[i] + j], j < n[i]. */
typedef struct axis {
    int32_t size, most;
    int32_t *first, *n; /* [size] */
    int32_t *k;         /* [size][most] */
} axis;

static double keys(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

static void axis_free(const kvf_mem *mem, axis *x)
{
    kvf_free(mem, x->first);
    kvf_free(mem, x->n);
    kvf_free(mem, x->k);
}

static kvf_status axis_alloc(const kvf_mem *mem, axis *x, kvf_error *err)
{
    void *first, *n, *k;
    KVF_TRY(kvf_mem_get(mem, &first, (size_t)x->size, sizeof *x->first, err));
    x->first = first;
    KVF_TRY(kvf_mem_get(mem, &n, (size_t)x->size, sizeof *x->n, err));
    x->n = n;
    size_t count = (size_t)x->size * (size_t)x->most;
    KVF_TRY(kvf_mem_get(mem, &k, count, sizeof *x->k, err));
    x->k = k;
    return KVF_OK;
}

/* `from` pixels become `size`. w is room for most doubles. */
static void axis_fill(axis *x, int32_t from, double *w)
{
    double scale = (double)from / x->size, wide = scale < 1 ? 1 : scale, reach = 2 * wide;
    for (int32_t i = 0; i < x->size; i++) {
        double centre = (i + 0.5) * scale, sum = 0;
        int32_t lo = (int32_t)(centre - reach + 0.5), hi = (int32_t)(centre + reach + 0.5);
        if (lo < 0) lo = 0;
        if (hi > from) hi = from;
        for (int32_t j = lo; j < hi; j++) sum += w[j - lo] = keys((j - centre + 0.5) * (1 / wide));
        for (int32_t j = 0; j < hi - lo; j++) {
            double k = sum != 0 ? w[j] / sum : w[j];
            x->k[(int64_t)i * x->most + j] = (int32_t)(k * (1 << BITS) + (k < 0 ? -0.5 : 0.5));
        }
        x->first[i] = lo;
        x->n[i] = hi - lo;
    }
}

static kvf_status axis_make(const kvf_mem *mem, axis *x, int32_t from, int32_t to, kvf_error *err)
{
    double scale = (double)from / to;
    *x = (axis){ .size = to, .most = (int32_t)ceil(2 * (scale < 1 ? 1 : scale)) * 2 + 1 };
    KVF_TRY(axis_alloc(mem, x, err));
    void *w;
    KVF_TRY(kvf_mem_get(mem, &w, (size_t)x->most, sizeof(double), err));
    axis_fill(x, from, w);
    kvf_free(mem, w);
    return KVF_OK;
}

static uint8_t clip(int32_t sum)
{
    int32_t v = sum >> BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* A picture of RGB bytes inside a larger one, or by itself. */
typedef struct picture {
    const uint8_t *rgb;
    int32_t width, height;
    int64_t stride;
} picture;

/* What a frame becomes: a canvas of w x h is resized to rw x rh, of which S x S at (left, top) stay. */
typedef struct plan {
    int32_t rw, rh, left, top;
    picture from;
    uint8_t *canvas; /* owned, for PAD */
    axis x, y;
    uint8_t *mid;    /* [from.height][rw][3] */
} plan;

typedef struct frame_task {
    const kvf_vision *v;
    plan p;
    float *table;  /* [3][256] */
    float *pixels; /* [3][S][S] */
} frame_task;

enum { ROWS_EACH = 16 };

static void across_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const plan *p = &((const frame_task *)arg)->p;
    int64_t end = (part + 1) * ROWS_EACH < p->from.height ? (part + 1) * ROWS_EACH : p->from.height;
    for (int64_t row = part * ROWS_EACH; row < end; row++) {
        const uint8_t *in = p->from.rgb + row * p->from.stride;
        uint8_t *out = p->mid + row * p->rw * 3;
        for (int32_t i = 0; i < p->rw; i++, out += 3) {
            const uint8_t *at = in + (int64_t)p->x.first[i] * 3;
            const int32_t *k = p->x.k + (int64_t)i * p->x.most;
            int32_t r = 1 << (BITS - 1), g = r, b = r;
            for (int32_t j = 0; j < p->x.n[i]; j++, at += 3) {
                r += k[j] * at[0];
                g += k[j] * at[1];
                b += k[j] * at[2];
            }
            out[0] = clip(r);
            out[1] = clip(g);
            out[2] = clip(b);
        }
    }
}

/* Rows of the result: columns of the picture between, then the table. */
static void down_part(void *arg, int64_t part, int32_t worker)
{
    (void)worker;
    const frame_task *t = arg;
    const plan *p = &t->p;
    int64_t s = t->v->hp.image_size, end = (part + 1) * ROWS_EACH < s ? (part + 1) * ROWS_EACH : s, width = (int64_t)p->rw * 3;
    for (int64_t row = part * ROWS_EACH; row < end; row++) {
        int64_t i = row + p->top;
        const int32_t *k = p->y.k + i * p->y.most;
        const uint8_t *at = p->mid + p->y.first[i] * width + (int64_t)p->left * 3;
        for (int64_t c = 0; c < 3 * s; c++) {
            int32_t sum = 1 << (BITS - 1);
            for (int32_t j = 0; j < p->y.n[i]; j++) sum += k[j] * at[j * width + c];
            t->pixels[(c % 3 * s + row) * s + c / 3] = t->table[c % 3 * 256 + clip(sum)];
        }
    }
}

/* The frame in the middle of a square of the mean colour, as bytes: LLaVA's expand2square. */
static kvf_status pad(const kvf_vision *v, plan *p, kvf_error *err)
{
    int32_t w = p->from.width, h = p->from.height, side = w > h ? w : h;
    uint8_t colour[3];
    for (int c = 0; c < 3; c++) {
        float value = v->hp.mean[c] * 255;
        colour[c] = (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    }
    if (w == h) return KVF_OK;
    p->canvas = kvf_alloc_raw(v->env.mem, (size_t)side, (size_t)side * 3);
    if (!p->canvas) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: a square of %d x %d pixels refused; scale the frames down", side, side);
    for (int64_t i = 0; i < (int64_t)side * side * 3; i++) p->canvas[i] = colour[i % 3];
    for (int64_t row = 0; row < h; row++)
        memcpy(p->canvas + ((row + (side - h) / 2) * side + (side - w) / 2) * 3, p->from.rgb + row * p->from.stride, (size_t)w * 3);
    p->from = (picture){ p->canvas, side, side, (int64_t)side * 3 };
    return KVF_OK;
}

/* The shorter side to s, the longer in proportion (cut to an integer), then the middle. */
static void crop(plan *p, int32_t s)
{
    int32_t w = p->from.width, h = p->from.height;
    p->rw = w <= h ? s : (int32_t)((int64_t)s * w / h);
    p->rh = w <= h ? (int32_t)((int64_t)s * h / w) : s;
    p->left = (p->rw - s) / 2;
    p->top = (p->rh - s) / 2;
}

static kvf_status one_frame(kvf_vision *v, const kvf_vision_frame *f, int32_t mode, frame_task *t, kvf_error *err)
{
    plan *p = &t->p;
    int32_t s = v->hp.image_size;
    *p = (plan){ .rw = s, .rh = s, .from = { f->rgb, f->width, f->height, f->stride ? f->stride : 3 * (int64_t)f->width } };
    if (mode == KVF_VISION_RESIZE_PAD) KVF_TRY(pad(v, p, err));
    if (mode == KVF_VISION_RESIZE_CROP) crop(p, s);
    KVF_TRY(axis_make(v->env.mem, &p->x, p->from.width, p->rw, err));
    KVF_TRY(axis_make(v->env.mem, &p->y, p->from.height, p->rh, err));
    p->mid = kvf_alloc_raw(v->env.mem, (size_t)p->from.height * 3, (size_t)p->rw);
    if (!p->mid) return kvf_fail(err, KVF_ERR_NOMEM, "out of memory: room to resize %d x %d pixels refused; scale the frames down", p->from.width, p->from.height);
    kvf_threads_run(v->env.threads, (p->from.height + ROWS_EACH - 1) / ROWS_EACH, across_part, t);
    kvf_threads_run(v->env.threads, (s + ROWS_EACH - 1) / ROWS_EACH, down_part, t);
    return KVF_OK;
}

kvf_status kvf_vision_resize_frames(kvf_vision *v, const kvf_vision_frame *frames, int64_t n, int32_t mode, float *pixels,
                                    kvf_error *err)
{
    float table[3 * 256];
    double start = kvf_vision_now_ms();
    int64_t each = 3 * (int64_t)v->hp.image_size * v->hp.image_size;
    for (int i = 0; i < 3 * 256; i++)
        table[i] = ((float)((i % 256) * (1.0 / 255)) - v->hp.mean[i / 256]) / v->hp.std[i / 256];
    if (mode == KVF_VISION_RESIZE_MODEL) mode = v->hp.has_class ? KVF_VISION_RESIZE_CROP : KVF_VISION_RESIZE_STRETCH;
    kvf_status rc = KVF_OK;
    for (int64_t i = 0; i < n && rc >= 0; i++) {
        frame_task t = { .v = v, .table = table, .pixels = pixels + i * each };
        rc = one_frame(v, &frames[i], mode, &t, err);
        axis_free(v->env.mem, &t.p.x);
        axis_free(v->env.mem, &t.p.y);
        kvf_free(v->env.mem, t.p.canvas);
        kvf_free(v->env.mem, t.p.mid);
        if (rc < 0) kvf_error_prefix(err, "frame %lld: ", (long long)i);
    }
    pthread_mutex_lock(&v->lock);
    v->stats.prepare_ms += kvf_vision_now_ms() - start;
    pthread_mutex_unlock(&v->lock);
    return rc;
}
