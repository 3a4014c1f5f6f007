/* dct_features.c - see dct_features.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "dct_features.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"

#define LUMA 5   /* coefficients u + v < 5: 15 */
#define CHROMA 3 /* u + v < 3: 6 */
#define INPUTS (3 * DCT_COEFFICIENTS)
#define HIDDEN 64
#define STEEPNESS 2.5 /* of the hidden layer: it saturates, as activations in a real tower do */
#define FRAME_SHARE 0.7f
#define SEED 20250521u

#define PI 3.14159265358979323846

/* DCT-II, scaled so that the first coefficient is the mean. */
static void fill_basis(float basis[LUMA][DCT_PATCH])
{
    for (int u = 0; u < LUMA; u++)
        for (int x = 0; x < DCT_PATCH; x++)
            basis[u][x] = (float)(cos(PI * (x + 0.5) * u / DCT_PATCH) * (u ? sqrt(2.0) : 1.0) / DCT_PATCH);
}

/* The lowest coefficients of one plane of a patch; returns how many. */
static int transform(const float basis[LUMA][DCT_PATCH], const float *plane, int order, float *out)
{
    float rows[LUMA][DCT_PATCH]; /* transformed across: [u][y] */
    for (int u = 0; u < order; u++)
        for (int y = 0; y < DCT_PATCH; y++) {
            float sum = 0;
            for (int x = 0; x < DCT_PATCH; x++) sum += basis[u][x] * plane[y * DCT_PATCH + x];
            rows[u][y] = sum;
        }
    int n = 0;
    for (int u = 0; u < order; u++)
        for (int v = 0; u + v < order; v++) {
            float sum = 0;
            for (int y = 0; y < DCT_PATCH; y++) sum += basis[v][y] * rows[u][y];
            out[n++] = sum;
        }
    return n;
}

/* Y, Cb, Cr (ITU-R BT.601, full range) of one patch. */
static void split_colours(const uint8_t *rgb, int row, int column, float planes[3][DCT_PATCH * DCT_PATCH])
{
    for (int y = 0; y < DCT_PATCH; y++)
        for (int x = 0; x < DCT_PATCH; x++) {
            const uint8_t *p =
                rgb + ((size_t)(row * DCT_PATCH + y) * DCT_SIZE + (size_t)(column * DCT_PATCH + x)) * 3;
            float r = p[0], g = p[1], b = p[2], luma = 0.299f * r + 0.587f * g + 0.114f * b;
            int i = y * DCT_PATCH + x;
            planes[0][i] = luma;
            planes[1][i] = 0.564f * (b - luma);
            planes[2][i] = 0.713f * (r - luma);
        }
}

/* The coefficients of a frame's patches: out [DCT_PATCHES][DCT_COEFFICIENTS]. */
static void describe(const uint8_t *rgb, float *out)
{
    float basis[LUMA][DCT_PATCH], planes[3][DCT_PATCH * DCT_PATCH];
    fill_basis(basis);
    for (int row = 0; row < DCT_GRID; row++)
        for (int column = 0; column < DCT_GRID; column++) {
            split_colours(rgb, row, column, planes);
            out += transform((const float(*)[DCT_PATCH])basis, planes[0], LUMA, out);
            out += transform((const float(*)[DCT_PATCH])basis, planes[1], CHROMA, out);
            out += transform((const float(*)[DCT_PATCH])basis, planes[2], CHROMA, out);
        }
}

kvf_status dct_features_add(dct_features *d, const uint8_t *rgb, kvf_error *err)
{
    const size_t per_frame = (size_t)DCT_PATCHES * DCT_COEFFICIENTS;
    if (d->n == d->cap) {
        int64_t cap = d->cap ? d->cap * 2 : 32;
        float *v = realloc(d->coefficients, (size_t)cap * per_frame * sizeof *v);
        if (!v)
            return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for %lld frames; ask for fewer.",
                               (long long)cap);
        d->coefficients = v;
        d->cap = cap;
    }
    describe(rgb, d->coefficients + (size_t)d->n * per_frame);
    d->n++;
    return KVF_OK;
}

/* ---- A fixed random perceptron ------------------------------------------------------------ */

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Close to normal: a sum of twelve uniform numbers, which needs no library function. */
static void fill_weights(float *w, size_t n, double scale, uint64_t *state)
{
    for (size_t i = 0; i < n; i++) {
        double sum = -6;
        for (int k = 0; k < 12; k++) sum += (double)(next_random(state) >> 11) * 0x1p-53;
        w[i] = (float)(sum * scale);
    }
}

typedef struct perceptron {
    float in[HIDDEN][INPUTS], bias[HIDDEN], out[DCT_DIM][HIDDEN];
} perceptron;

static void run(const perceptron *p, const float *x, float *y)
{
    float hidden[HIDDEN];
    for (int i = 0; i < HIDDEN; i++) {
        float sum = p->bias[i];
        for (int k = 0; k < INPUTS; k++) sum += p->in[i][k] * x[k];
        hidden[i] = tanhf(sum);
    }
    for (int i = 0; i < DCT_DIM; i++) {
        float sum = 0;
        for (int k = 0; k < HIDDEN; k++) sum += p->out[i][k] * hidden[k];
        y[i] = sum;
    }
}

/* ---- Scaling and context ------------------------------------------------------------------- */

/* Sums of a number over the clip, then its mean and 1 / deviation. */
typedef struct scale {
    double sum, square, mean, gain;
} scale;

static void scale_add(scale *s, double v)
{
    s->sum += v;
    s->square += v * v;
}

/* gain 0: a number that never changes says nothing. */
static void scale_finish(scale *s, double n)
{
    s->mean = s->sum / n;
    double variance = s->square / n - s->mean * s->mean;
    s->gain = variance > 1e-9 * (1 + s->mean * s->mean) ? 1 / sqrt(variance) : 0;
}

/* Mean of the 3 x 3 patches around each: frame and out [DCT_PATCHES][DCT_COEFFICIENTS]. */
static void look_around(const float *frame, float *out)
{
    for (int row = 0; row < DCT_GRID; row++)
        for (int column = 0; column < DCT_GRID; column++, out += DCT_COEFFICIENTS) {
            int n = 0;
            memset(out, 0, DCT_COEFFICIENTS * sizeof *out);
            for (int r = row - 1; r <= row + 1; r++)
                for (int c = column - 1; c <= column + 1; c++) {
                    if (r < 0 || c < 0 || r >= DCT_GRID || c >= DCT_GRID) continue;
                    const float *p = frame + (size_t)(r * DCT_GRID + c) * DCT_COEFFICIENTS;
                    for (int k = 0; k < DCT_COEFFICIENTS; k++) out[k] += p[k];
                    n++;
                }
            for (int k = 0; k < DCT_COEFFICIENTS; k++) out[k] /= (float)n;
        }
}

static void average(const float *frame, float mean[DCT_COEFFICIENTS])
{
    memset(mean, 0, DCT_COEFFICIENTS * sizeof *mean);
    for (int i = 0; i < DCT_PATCHES; i++)
        for (int k = 0; k < DCT_COEFFICIENTS; k++) mean[k] += frame[i * DCT_COEFFICIENTS + k] / DCT_PATCHES;
}

typedef struct dct_maker {
    perceptron net;
    scale own[DCT_COEFFICIENTS], around[DCT_COEFFICIENTS], whole[DCT_COEFFICIENTS];
    float neighbours[DCT_PATCHES * DCT_COEFFICIENTS], mean[DCT_COEFFICIENTS]; /* of the frame at hand */
    float frame[DCT_PATCHES * DCT_COEFFICIENTS];                              /* of a clip that is read twice */
} maker;

static void measure(maker *m, const float *frame)
{
    look_around(frame, m->neighbours);
    average(frame, m->mean);
    for (int i = 0; i < DCT_PATCHES * DCT_COEFFICIENTS; i++) {
        scale_add(&m->own[i % DCT_COEFFICIENTS], (double)frame[i]);
        scale_add(&m->around[i % DCT_COEFFICIENTS], (double)m->neighbours[i]);
    }
    for (int k = 0; k < DCT_COEFFICIENTS; k++) scale_add(&m->whole[k], (double)m->mean[k]);
}

static void finish(maker *m, int64_t n)
{
    for (int k = 0; k < DCT_COEFFICIENTS; k++) {
        scale_finish(&m->own[k], (double)n * DCT_PATCHES);
        scale_finish(&m->around[k], (double)n * DCT_PATCHES);
        scale_finish(&m->whole[k], (double)n);
    }
}

static float scaled(const scale *s, float v) { return (float)(((double)v - s->mean) * s->gain); }

static void make_frame(maker *m, const float *frame, float *out)
{
    float x[INPUTS];
    look_around(frame, m->neighbours);
    average(frame, m->mean);
    for (int i = 0; i < DCT_PATCHES; i++, out += DCT_DIM) {
        for (int k = 0; k < DCT_COEFFICIENTS; k++) {
            x[k] = scaled(&m->own[k], frame[i * DCT_COEFFICIENTS + k]);
            x[DCT_COEFFICIENTS + k] = scaled(&m->around[k], m->neighbours[i * DCT_COEFFICIENTS + k]);
            x[2 * DCT_COEFFICIENTS + k] = FRAME_SHARE * scaled(&m->whole[k], m->mean[k]);
        }
        run(&m->net, x, out);
    }
}

static maker *new_maker(kvf_error *err)
{
    maker *m = calloc(1, sizeof *m);
    if (!m) {
        report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the features of a frame.");
        return NULL;
    }
    uint64_t state = SEED;
    fill_weights(m->net.in[0], sizeof m->net.in / sizeof(float), STEEPNESS / sqrt(INPUTS), &state);
    fill_weights(m->net.bias, HIDDEN, 0.1, &state);
    fill_weights(m->net.out[0], sizeof m->net.out / sizeof(float), 1 / sqrt(HIDDEN), &state);
    return m;
}

kvf_status dct_features_make(const dct_features *d, float *out, kvf_error *err)
{
    const size_t per_frame = (size_t)DCT_PATCHES * DCT_COEFFICIENTS;
    maker *m = new_maker(err);
    if (!m) return KVF_ERR_NOMEM;
    for (int64_t t = 0; t < d->n; t++) measure(m, d->coefficients + (size_t)t * per_frame);
    finish(m, d->n);
    for (int64_t t = 0; t < d->n; t++)
        make_frame(m, d->coefficients + (size_t)t * per_frame, out + (size_t)t * DCT_PATCHES * DCT_DIM);
    free(m);
    return KVF_OK;
}

kvf_status dct_features_measure(dct_features *d, const uint8_t *rgb, kvf_error *err)
{
    if (!d->maker) d->maker = new_maker(err);
    if (!d->maker) return KVF_ERR_NOMEM;
    describe(rgb, d->maker->frame);
    measure(d->maker, d->maker->frame);
    d->n++;
    return KVF_OK;
}

void dct_features_ready(dct_features *d) { finish(d->maker, d->n); }

void dct_features_frame(dct_features *d, const uint8_t *rgb, float *out)
{
    describe(rgb, d->maker->frame);
    make_frame(d->maker, d->maker->frame, out);
}

void dct_features_free(dct_features *d)
{
    free(d->coefficients);
    free(d->maker);
    *d = (dct_features){ 0 };
}
