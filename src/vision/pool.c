/* pool.c - a grid of tokens to a quarter of them.
 *
 * BILINEAR is LLaVA-OneVision's: an interpolation to ceil(grid / 2), corners not aligned, without
 * antialiasing, so that of 27 tokens a side every output mixes the two nearest in each direction. AVERAGE
 * and MAX are windows of 2 x 2; an odd last row and column are dropped.
 *
 * Source: Li et al. 2024, arXiv:2408.03326, section 3.3 (OneVision); Zhang et al. 2024, arXiv:2410.02713,
 * section 4.1 (LLaVA-Video).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "vision/tower.h"

int32_t kvf_vision_pool_side(int32_t pool, int32_t grid)
{
    switch (pool) {
    case KVF_VISION_POOL_NONE: return grid;
    case KVF_VISION_POOL_BILINEAR: return (grid + 1) / 2;
    case KVF_VISION_POOL_AVERAGE:
    case KVF_VISION_POOL_MAX: return grid / 2;
    default: return 0;
    }
}

/* Where output i of `side` reads an axis of `grid`: places a and b, weight of b. */
typedef struct tap {
    int64_t a, b;
    float w;
} tap;

static tap tap_of(int32_t i, int32_t grid, int32_t side)
{
    float at = ((float)i + 0.5f) * ((float)grid / (float)side) - 0.5f;
    if (at < 0) at = 0;
    tap t = { .a = (int64_t)at };
    if (t.a > grid - 1) t.a = grid - 1;
    t.b = t.a < grid - 1 ? t.a + 1 : t.a;
    t.w = at - (float)t.a;
    return t;
}

/* The four tokens an output is made of, row by row. */
static void mix(const float *const in[4], int64_t width, float wy, float wx, float *out)
{
    float w0 = (1 - wy) * (1 - wx), w1 = (1 - wy) * wx, w2 = wy * (1 - wx), w3 = wy * wx;
    for (int64_t c = 0; c < width; c++) out[c] = w0 * in[0][c] + w1 * in[1][c] + w2 * in[2][c] + w3 * in[3][c];
}

static void largest(const float *const in[4], int64_t width, float *out)
{
    for (int64_t c = 0; c < width; c++) {
        float a = in[0][c] > in[1][c] ? in[0][c] : in[1][c], b = in[2][c] > in[3][c] ? in[2][c] : in[3][c];
        out[c] = a > b ? a : b;
    }
}

void kvf_vision_pool_grid(int32_t pool, const float *in, int32_t grid, int64_t width, float *out)
{
    int32_t side = kvf_vision_pool_side(pool, grid);
    for (int32_t y = 0; y < side; y++) {
        for (int32_t x = 0; x < side; x++, out += width) {
            tap ty = { 2 * y, 2 * y + 1, 0.5f }, tx = { 2 * x, 2 * x + 1, 0.5f };
            if (pool == KVF_VISION_POOL_BILINEAR) {
                ty = tap_of(y, grid, side);
                tx = tap_of(x, grid, side);
            }
            const float *const from[4] = { in + (ty.a * grid + tx.a) * width, in + (ty.a * grid + tx.b) * width,
                                           in + (ty.b * grid + tx.a) * width, in + (ty.b * grid + tx.b) * width };
            if (pool == KVF_VISION_POOL_MAX) largest(from, width, out);
            else mix(from, width, ty.w, tx.w, out);
        }
    }
}
