/* segment.c - see segment.h. Gains are whole numbers, kept as such.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/segment.h"

#include <string.h>

kvf_status kvf_segmenter_init(kvf_segmenter *s, const kvf_mem *mem, int64_t n_tok, int64_t window, double tau,
                              kvf_error *err)
{
    *s = (kvf_segmenter){ .mem = mem, .n_tok = n_tok, .window = window, .tau = (float)tau };
    return kvf_mem_get(mem, (void **)&s->run, (size_t)n_tok, sizeof *s->run, err);
}

void kvf_segmenter_fini(kvf_segmenter *s)
{
    if (!s->mem) return;
    kvf_free(s->mem, s->run);
    kvf_free(s->mem, s->n_run);
    kvf_free(s->mem, s->best);
    kvf_free(s->mem, s->start);
    kvf_free(s->mem, s->mark);
    *s = (kvf_segmenter){ 0 };
}

void kvf_segmenter_reset(kvf_segmenter *s)
{
    s->n_frame = 0;
    if (s->n_run) memset(s->n_run, 0, (size_t)s->cap * sizeof *s->n_run);
}

/* The four arrays grow together; a failure leaves some larger than cap says, which does no harm. */
static kvf_status reserve(kvf_segmenter *s, int64_t n, kvf_error *err)
{
    if (n <= s->cap) return KVF_OK;
    if (n > INT32_MAX) return kvf_fail(err, KVF_ERR_LIMIT, "more than 2^31 frames; split the video");
    int64_t a = s->cap, b = s->cap, c = s->cap, d = s->cap;
    KVF_TRY(kvf_reserve(s->mem, (void **)&s->n_run, &a, n, sizeof *s->n_run, err));
    KVF_TRY(kvf_reserve(s->mem, (void **)&s->best, &b, n, sizeof *s->best, err));
    KVF_TRY(kvf_reserve(s->mem, (void **)&s->start, &c, n, sizeof *s->start, err));
    KVF_TRY(kvf_reserve(s->mem, (void **)&s->mark, &d, n, sizeof *s->mark, err));
    s->cap = a;
    return KVF_OK;
}

static void update_runs(kvf_segmenter *s, int64_t i, const float *sim)
{
    s->n_run[i] = 0;
    if (i == 0) {
        memset(s->run, 0, (size_t)s->n_tok * sizeof *s->run);
        s->n_run[0] = s->n_tok;
        return;
    }
    for (int64_t n = 0; n < s->n_tok; n++) {
        if (sim[n] > s->tau) continue;
        s->n_run[s->run[n]]--;
        s->n_run[i]++;
        s->run[n] = (int32_t)i;
    }
}

kvf_status kvf_segmenter_add(kvf_segmenter *s, const float *sim, kvf_error *err)
{
    int64_t i = s->n_frame;
    KVF_TRY(reserve(s, i + 1, err));
    update_runs(s, i, sim);
    int64_t best = i > 0 ? s->best[i - 1] : 0, start = i;
    /* Tokens static on f..i, f = i - 1 down: those whose run starts at f or before. None: no gain further
     * down. */
    int64_t n_static = s->n_tok - s->n_run[i];
    for (int64_t f = i - 1; f >= 0 && i - f < s->window && n_static > 0; f--) {
        int64_t gain = (f > 0 ? s->best[f - 1] : 0) + n_static * (i - f);
        if (gain > best) best = gain, start = f;
        n_static -= s->n_run[f];
    }
    s->best[i] = best;
    s->start[i] = (int32_t)start;
    s->n_frame = i + 1;
    return KVF_OK;
}

int64_t kvf_segmenter_trace(const kvf_segmenter *s, int64_t last, int32_t *out)
{
    int64_t n = 0;
    for (int64_t i = last; i >= 0; i = s->start[i] - 1) n++;
    for (int64_t i = last, k = n - 1; i >= 0; i = s->start[i] - 1, k--) {
        out[2 * k] = s->start[i];
        out[2 * k + 1] = (int32_t)i;
    }
    return n;
}

/* A later segment starts at f <= i only while some token is static on f..i and the window allows one frame
 * more; or it starts at i + 1. So the partitions that can go on end at lo..i, and what is settled is the last
 * segment end that all of their chains share. */
int64_t kvf_segmenter_settled(kvf_segmenter *s)
{
    int64_t i = s->n_frame - 1, first = i;
    if (i < 1) return -1;
    int64_t n_static = s->n_tok; /* on first..i */
    while (first > 0 && n_static - s->n_run[first] > 0 && i + 1 - (first - 1) < s->window)
        n_static -= s->n_run[first--];
    if (s->window < 2) first = i + 1;
    int64_t lo = first - 1, n_mark = 0;
    if (lo < 0) return -1;
    memset(s->mark, 0, (size_t)(i + 1));
    for (int64_t j = lo; j <= i; j++, n_mark++) s->mark[j] = 1;
    for (int64_t j = i; n_mark > 1; j--) {
        if (!s->mark[j]) continue;
        int64_t up = (int64_t)s->start[j] - 1;
        if (up < 0) return -1;
        if (s->mark[up])
            n_mark--;
        else
            s->mark[up] = 1;
        s->mark[j] = 0;
    }
    int64_t end = i;
    while (!s->mark[end]) end--;
    return end < i ? end : (int64_t)s->start[end] - 1;
}

void kvf_segmenter_commit(kvf_segmenter *s, int64_t last)
{
    int64_t shift = last + 1, n = s->n_frame - shift, before = s->best[last];
    for (int64_t j = 0; j < n; j++) {
        s->best[j] = s->best[j + shift] - before;
        s->start[j] = (int32_t)(s->start[j + shift] - shift);
    }
    memset(s->n_run, 0, (size_t)s->cap * sizeof *s->n_run);
    for (int64_t k = 0; k < s->n_tok; k++) {
        s->run[k] = s->run[k] > shift ? (int32_t)(s->run[k] - shift) : 0;
        s->n_run[s->run[k]]++;
    }
    s->n_frame = n;
}
