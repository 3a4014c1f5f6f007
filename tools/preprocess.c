/* preprocess.c - see preprocess.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "preprocess.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"

#define BITS 22 /* 8 of the sample, one for overshoot, one for the sign: 32 in all */

bool preprocess_named(preprocess_spec *out, const char *name, int size)
{
    if (strcmp(name, "siglip") == 0) {
        *out = (preprocess_spec){ size ? size : 384,
                                  PREPROCESS_BICUBIC,
                                  PREPROCESS_STRETCH,
                                  { 0.5f, 0.5f, 0.5f },
                                  { 0.5f, 0.5f, 0.5f } };
        return true;
    }
    if (strcmp(name, "clip") == 0) {
        *out = (preprocess_spec){ size ? size : 336,
                                  PREPROCESS_BICUBIC,
                                  PREPROCESS_CROP,
                                  { 0.48145466f, 0.4578275f, 0.40821073f },
                                  { 0.26862954f, 0.26130258f, 0.27577711f } };
        return true;
    }
    return false;
}

/* Cubic convolution with a = -0.5 (Keys 1981), and the triangle. */
static double cubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

static double triangle(double x) { return fabs(x) < 1 ? 1 - fabs(x) : 0; }

static void taps_free(preprocess_taps *t)
{
    free(t->first);
    free(t->n);
    free(t->weight);
    *t = (preprocess_taps){ 0 };
}

/* The weights of one output sample sum to 1 before they are rounded. */
static void fill_taps(preprocess_taps *t, int i, double scale, preprocess_filter filter)
{
    double (*f)(double) = filter == PREPROCESS_BICUBIC ? cubic : triangle;
    double wide = scale > 1 ? scale : 1, support = (filter == PREPROCESS_BICUBIC ? 2 : 1) * wide;
    double centre = (i + 0.5) * scale, sum = 0;
    int first = (int)(centre - support + 0.5), end = (int)(centre + support + 0.5);
    if (centre - support + 0.5 < 0) first = 0;
    if (end > t->from) end = t->from;
    t->first[i] = first;
    t->n[i] = end - first;
    for (int k = 0; k < t->n[i]; k++) sum += f((k + first - centre + 0.5) / wide);
    for (int k = 0; k < t->n[i]; k++) {
        double w = f((k + first - centre + 0.5) / wide) / sum * (1 << BITS);
        t->weight[(size_t)i * (size_t)t->width + (size_t)k] = (int32_t)(w < 0 ? w - 0.5 : w + 0.5);
    }
}

static bool taps_make(preprocess_taps *t, int from, int to, preprocess_filter filter)
{
    if (t->from == from && t->to == to) return true;
    taps_free(t);
    double scale = (double)from / to, wide = scale > 1 ? scale : 1;
    t->width = (int)ceil((filter == PREPROCESS_BICUBIC ? 2 : 1) * wide) * 2 + 1;
    t->first = malloc((size_t)to * sizeof *t->first);
    t->n = malloc((size_t)to * sizeof *t->n);
    t->weight = malloc((size_t)to * (size_t)t->width * sizeof *t->weight);
    if (!t->first || !t->n || !t->weight) {
        taps_free(t);
        return false;
    }
    t->from = from;
    t->to = to;
    for (int i = 0; i < to; i++) fill_taps(t, i, scale, filter);
    return true;
}

static uint8_t to_byte(int32_t sum)
{
    int32_t v = (sum + (1 << (BITS - 1))) >> BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* Output samples [begin, begin + n) of rows of RGB. */
static void resize_row(const preprocess_taps *t, int begin, int n, const uint8_t *in, uint8_t *out)
{
    for (int i = begin; i < begin + n; i++, out += 3) {
        const int32_t *w = t->weight + (size_t)i * (size_t)t->width;
        const uint8_t *p = in + (size_t)t->first[i] * 3;
        int32_t sum[3] = { 0 };
        for (int k = 0; k < t->n[i]; k++, p += 3)
            for (int c = 0; c < 3; c++) sum[c] += w[k] * p[c];
        for (int c = 0; c < 3; c++) out[c] = to_byte(sum[c]);
    }
}

/* Output row i of `width` bytes from rows of as many. */
static void resize_column(const preprocess_taps *t, int i, size_t width, const uint8_t *rows, uint8_t *out)
{
    const int32_t *w = t->weight + (size_t)i * (size_t)t->width;
    for (size_t x = 0; x < width; x++) {
        const uint8_t *p = rows + (size_t)t->first[i] * width + x;
        int32_t sum = 0;
        for (int k = 0; k < t->n[i]; k++, p += width) sum += w[k] * *p;
        out[x] = to_byte(sum);
    }
}

kvf_status preprocess_resize(preprocessor *p, const preprocess_spec *spec, const preprocess_picture *in,
                             uint8_t *out, kvf_error *err)
{
    int size = spec->size, w = in->width, h = in->height;
    if (size < 1 || size > 4096 || w < 1 || h < 1 || w > 65536 || h > 65536)
        return report_fail(err, KVF_ERR_ARG, "A picture of %d x %d cannot be resized to %d x %d.", w, h, size,
                           size);
    int to_w = size, to_h = size;
    if (spec->fit == PREPROCESS_CROP && w > h) to_w = (int)((int64_t)size * w / h);
    if (spec->fit == PREPROCESS_CROP && h > w) to_h = (int)((int64_t)size * h / w);
    int left = (to_w - size) / 2, top = (to_h - size) / 2;
    size_t width = (size_t)size * 3, need = width * (size_t)h;
    if (need > p->rows_cap) {
        free(p->rows);
        p->rows = malloc(need);
        p->rows_cap = p->rows ? need : 0;
    }
    if (!p->rows || !taps_make(&p->across, w, to_w, spec->filter) ||
        !taps_make(&p->down, h, to_h, spec->filter))
        return report_fail(err, KVF_ERR_NOMEM, "Not enough memory to resize a picture of %d x %d.", w, h);
    for (int y = 0; y < h; y++) {
        const uint8_t *row = in->rgb + y * in->stride;
        if (to_w == w)
            memcpy(p->rows + (size_t)y * width, row + (size_t)left * 3, width);
        else
            resize_row(&p->across, left, size, row, p->rows + (size_t)y * width);
    }
    for (int y = 0; y < size; y++) {
        if (to_h == h)
            memcpy(out + (size_t)y * width, p->rows + (size_t)(y + top) * width, width);
        else
            resize_column(&p->down, y + top, width, p->rows, out + (size_t)y * width);
    }
    return KVF_OK;
}

void preprocess_normalise(const preprocess_spec *spec, const uint8_t *rgb, float *out)
{
    size_t n = (size_t)spec->size * (size_t)spec->size;
    for (size_t c = 0; c < 3; c++)
        for (size_t i = 0; i < n; i++)
            out[c * n + i] = ((float)rgb[i * 3 + c] / 255.0f - spec->mean[c]) / spec->std[c];
}

void preprocess_free(preprocessor *p)
{
    taps_free(&p->across);
    taps_free(&p->down);
    free(p->rows);
    *p = (preprocessor){ 0 };
}
