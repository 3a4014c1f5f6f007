/* fuzz_vision.c - any bytes as an mmproj file: opened, described, one frame encoded, through the public
 * interface.
 *
 * The seeds are complete towers of a few KB, so that damage reaches shapes, weights and the layers.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE /* memfd_create */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <kvfold/vision.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile float sink;

/* Frames of at most this many pixels a side, and at most this much memory: shapes a file of a few KB can
 * claim must be handled, not waited for. */
enum { SIDE_MAX = 64, WORK_MAX = 16 << 20 };

static void encode(kvf_vision *v, const kvf_vision_info *i)
{
    kvf_error err;
    size_t n = 3 * (size_t)i->image_size * (size_t)i->image_size;
    float *pixels = malloc(n * sizeof *pixels);
    uint8_t rgb[3 * 5 * 7];
    for (size_t j = 0; j < sizeof rgb; j++) rgb[j] = (uint8_t)(j * 37);
    kvf_vision_frame frame = { rgb, 5, 7, 0 };
    if (!pixels || kvf_vision_prepare(v, &frame, 1, KVF_VISION_RESIZE_PAD, pixels, &err) != KVF_OK) abort();
    int32_t side;
    int64_t tokens = kvf_vision_tokens(v, KVF_VISION_POOL_BILINEAR, &side);
    float *embd = malloc((size_t)tokens * (size_t)i->n_out * sizeof *embd), *scores = malloc((size_t)tokens * sizeof *scores);
    if (!embd || !scores) abort();
    kvf_vision_batch b;
    kvf_vision_batch_init(&b);
    b.pixels = pixels;
    b.n = 1;
    b.pool = KVF_VISION_POOL_BILINEAR;
    b.embd = embd;
    b.scores = scores;
    if (kvf_vision_encode(v, &b, &err) == KVF_OK) {
        for (int64_t j = 0; j < tokens * i->n_out; j++) sink = embd[j];
        for (int64_t j = 0; j < tokens; j++) {
            if (!(scores[j] >= 0 && scores[j] <= 1.001f)) abort();
        }
    }
    const float *newline = kvf_vision_newline(v);
    for (int32_t j = 0; newline && j < i->n_out; j++) sink = newline[j];
    for (int32_t j = 0; j < 2 * i->n_pinpoint; j++) sink = (float)i->pinpoints[j];
    free(pixels), free(embd), free(scores);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static kvf_ctx *ctx;
    kvf_error err;
    if (!ctx) {
        kvf_ctx_params p;
        kvf_ctx_params_init(&p);
        p.n_threads = 1;
        if (kvf_ctx_open(&ctx, &p, &err) != KVF_OK) abort();
    }
    int fd = memfd_create("mmproj", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    kvf_vision *v;
    kvf_vision_info info = { .size = sizeof info };
    if (kvf_vision_open(&v, ctx, path, NULL, &err) == KVF_OK) {
        if (kvf_vision_get_info(v, &info, NULL) != KVF_OK || info.n_patch != info.grid * info.grid) abort();
        if (info.image_size <= SIDE_MAX && info.work_bytes <= WORK_MAX) encode(v, &info);
        kvf_vision_close(v);
    } else if (!memchr(err.msg, 0, sizeof err.msg)) {
        abort();
    }
    close(fd);
    return 0;
}
