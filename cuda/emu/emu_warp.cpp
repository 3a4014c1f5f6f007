/* emu_warp.cpp - what the lanes of a warp do together: shuffles, ballot, ldmatrix, mma.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/emu/emu.h"

#include <vector>

#include "base/half.h"

namespace {

std::vector<float> make_f16_values()
{
    std::vector<float> v(65536);
    for (uint32_t i = 0; i < 65536; i++) v[i] = kvf_f32_from_f16(static_cast<kvf_f16>(i));
    return v;
}
const std::vector<float> f16_values = make_f16_values();

void do_xor(emu_warp *w, int mask)
{
    for (int i = 0; i < 32; i++) w->out[i][0] = w->in[i ^ mask][0];
}

void do_shuffle(emu_warp *w, int)
{
    for (int i = 0; i < 32; i++) w->out[i][0] = w->in[w->in[i][1] & 31][0];
}

void do_ballot(emu_warp *w, int)
{
    uint32_t all = 0;
    for (int i = 0; i < 32; i++) all |= (w->in[i][0] ? 1u : 0u) << i;
    for (int i = 0; i < 32; i++) w->out[i][0] = all;
}

uint16_t half_at(const void *row, int i)
{
    uint16_t x;
    memcpy(&x, static_cast<const char *>(row) + 2 * i, 2);
    return x;
}

/* Matrix m has its rows at the addresses of lanes 8m .. 8m + 7. */
void do_ldmatrix(emu_warp *w, int trans)
{
    for (int l = 0; l < 32; l++) {
        int row = l / 4, col = l % 4 * 2;
        for (int m = 0; m < 4; m++) {
            const void *const *at = w->at + 8 * m;
            uint32_t lo = trans ? half_at(at[col], row) : half_at(at[row], col);
            uint32_t hi = trans ? half_at(at[col + 1], row) : half_at(at[row], col + 1);
            w->out[l][m] = lo | hi << 16;
        }
    }
}

float value(uint32_t u, int bf)
{
    return bf ? kvf_float(u << 16) : emu_f16_value[u & 0xffff];
}

/* D [16][8] = A [16][16] B [16][8] + C, fp32 sums in the order of k. */
void do_mma(emu_warp *w, int bf)
{
    float a[16][16], b[8][16];
    for (int l = 0; l < 32; l++) {
        const uint32_t *in = w->in[l];
        int row = l / 4, col = l % 4 * 2;
        for (int i = 0; i < 4; i++) {
            float *to = &a[row + (i & 1) * 8][col + (i >> 1) * 8];
            to[0] = value(in[i] & 0xffff, bf);
            to[1] = value(in[i] >> 16, bf);
        }
        for (int i = 0; i < 2; i++) {
            b[row][col + i * 8] = value(in[4 + i] & 0xffff, bf);
            b[row][col + i * 8 + 1] = value(in[4 + i] >> 16, bf);
        }
    }
    for (int l = 0; l < 32; l++) {
        int row = l / 4, col = l % 4 * 2;
        for (int i = 0; i < 4; i++) {
            const float *x = a[row + (i >> 1) * 8], *y = b[col + (i & 1)];
            float sum = kvf_float(w->in[l][6 + i]);
            for (int k = 0; k < 16; k++) sum += x[k] * y[k];
            w->out[l][i] = kvf_bits(sum);
        }
    }
}

void mma(float *c, const uint32_t *a, const uint32_t *b, int bf)
{
    emu_warp *w = emu_my_warp();
    int l = emu_here.lane;
    memcpy(w->in[l], a, 16);
    memcpy(w->in[l] + 4, b, 8);
    memcpy(w->in[l] + 6, c, 16);
    emu_meet(do_mma, bf);
    memcpy(c, w->out[l], 16);
}

void ldmatrix(uint32_t *r, const void *row, int trans)
{
    emu_warp *w = emu_my_warp();
    int l = emu_here.lane;
    w->at[l] = row;
    emu_meet(do_ldmatrix, trans);
    memcpy(r, w->out[l], 16);
}

void do_nothing(emu_warp *, int) {}

} // namespace

const float *emu_f16_value = f16_values.data();

uint16_t emu_f16_bits(float x) { return kvf_f16_from_f32(x); }

void kvf_sync_warp() { emu_meet(do_nothing, 0); }

/* A result stays in `out` until the warp meets again, which needs the lane that has yet to read it. */
uint32_t emu_shuffle_xor(uint32_t v, int mask)
{
    int l = emu_here.lane;
    emu_my_warp()->in[l][0] = v;
    emu_meet(do_xor, mask);
    return emu_my_warp()->out[l][0];
}

uint32_t emu_shuffle(uint32_t v, int lane)
{
    int l = emu_here.lane;
    emu_my_warp()->in[l][0] = v;
    emu_my_warp()->in[l][1] = static_cast<uint32_t>(lane);
    emu_meet(do_shuffle, 0);
    return emu_my_warp()->out[l][0];
}

uint32_t kvf_ballot(bool v)
{
    int l = emu_here.lane;
    emu_my_warp()->in[l][0] = v;
    emu_meet(do_ballot, 0);
    return emu_my_warp()->out[l][0];
}

void kvf_mma(float *c, const uint32_t *a, const uint32_t *b, f16) { mma(c, a, b, 0); }
void kvf_mma(float *c, const uint32_t *a, const uint32_t *b, bf16) { mma(c, a, b, 1); }
void kvf_ldmatrix4(uint32_t *r, const void *row) { ldmatrix(r, row, 0); }
void kvf_ldmatrix4_trans(uint32_t *r, const void *row) { ldmatrix(r, row, 1); }
