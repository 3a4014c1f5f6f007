/* fastvid.c - segments by frame similarity, then attention and density in each; a yardstick.
 *
 * In the manner of Shen et al. 2025, FastVID, arXiv:2503.11187: frames are cut at the `segments` - 1 smallest
 * and at all similarities below tau of neighbouring frame means. Of a segment's budget a part 1 - density
 * goes to the tokens with the largest scores of each frame; the rest to density peaks of every stride-th
 * frame, into which all other tokens of the segment are folded, centre by beta. Not the published code:
 * counts are exact, ties go by index, frame means stand for its global features.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "merge/dpc.h"
#include "merge/method.h"
#include "merge/select.h"
#include "merge/similarity.h"
#include "merge/tile.h"

typedef struct fastvid {
    double ratio, tau, density, beta;
    int64_t segments, stride, knn;
} fastvid;

static const kvf_option options[] = {
    KVF_OPT_F64(fastvid, ratio, 0.1, 1e-6, 1, "share of the tokens that is kept"),
    KVF_OPT_I64(fastvid, segments, 8, 1, 65536, "least number of segments"),
    KVF_OPT_F64(fastvid, tau, 0.9, -1, 1, "frames whose means are less similar than this are cut apart"),
    KVF_OPT_F64(fastvid, density, 0.4, 0, 1,
                "share of the budget for density peaks; the rest goes by scores"),
    KVF_OPT_I64(fastvid, stride, 4, 1, 65536, "every stride-th frame of a segment has peaks"),
    KVF_OPT_I64(fastvid, knn, 4, 1, KVF_DPC_MAX_K, "neighbours that make a token's density"),
    KVF_OPT_F64(fastvid, beta, 0.6, 0, 1, "weight of a peak against the mean of its members"),
    { 0 },
};

typedef struct work {
    float *mean;     /* [n_frame][dim] of frames */
    uint64_t *key;   /* [n_frame + n_tok] */
    uint8_t *cut;    /* [n_frame] 1: a segment starts here */
    uint8_t *picked; /* [n_frame][n_tok] by score */
    int64_t *share;  /* [n_frame] */
    int64_t *room;   /* 2 x [n_frame] */
    float *scores;
    int32_t *place;  /* [n_tok] */
    int32_t *center; /* [peak_cap] token of each peak of the segment, ascending */
    float *peak;     /* [peak_cap][dim] */
    int64_t n_peak, center_cap, peak_cap;
    int32_t *member;      /* [n_frame * n_tok] peak, by token of the segment; -1 */
    int32_t *head, *next; /* lists of members: [peak], [n_frame * n_tok] */
    int64_t head_cap;
    float *x, *dist; /* [n_tok][dim], [n_tok][n_tok] */
    float *row;      /* [4][dim] */
    double *score;   /* [n_tok] */
    int32_t *near;   /* 2 x [n_tok] */
} work;

/* ---- Segments -------------------------------------------------------------------------------- */

static kvf_status frame_means(const kvf_merge_job *job, float *mean, kvf_error *err)
{
    const kvf_tensor *x = job->x;
    float w = 1.0f / (float)x->n_tok;
    for (int64_t i = 0; i < x->n_frame * x->n_tok; i++) {
        const void *row = kvf_tensor_token(x, i);
        double sum[2];
        job->env->rows.pair[x->type](row, row, x->dim, sum);
        if (!isfinite(sum[1])) KVF_TRY(kvf_tensor_finite(x, i, "features", err));
        job->env->rows.add[x->type](mean + i / x->n_tok * x->dim, &row, &w, 1, x->dim);
    }
    return KVF_OK;
}

static void cut_frames(const kvf_merge_job *job, work *w)
{
    const fastvid *o = job->state;
    const kvf_tensor *x = job->x;
    int64_t n = x->n_frame - 1;
    double before = 0, out[2];
    for (int64_t t = 0; t <= n; t++) {
        const float *cur = w->mean + t * x->dim;
        job->env->rows.pair[KVF_MERGE_F32](t > 0 ? cur - x->dim : cur, cur, x->dim, out);
        double norm = sqrt(out[1]);
        float sim = kvf_cosine(out[0], before, norm);
        if (!isfinite(sim)) sim = 0;
        if (t > 0) w->key[t - 1] = kvf_order_key(-(double)sim);
        w->cut[t] = t == 0 || sim < (float)o->tau;
        before = norm;
    }
    kvf_pick_top(w->key, n, o->segments - 1 < n ? o->segments - 1 : n, w->picked);
    for (int64_t t = 1; t <= n; t++) w->cut[t] |= w->picked[t - 1];
}

/* A segment and its budget. */
typedef struct part {
    int64_t segment, first, last, total;
} part;

/* ---- One segment ----------------------------------------------------------------------------- */

static bool is_anchor(const fastvid *o, int64_t first, int64_t t) { return (t - first) % o->stride == 0; }

/* How many of `total` go to peaks: density's share, but no more than the anchors have room for beside the
 * tokens that stay by score. */
static int64_t peaks_of(const fastvid *o, int64_t total, int64_t len, int64_t n_tok)
{
    int64_t n_anchor = (len + o->stride - 1) / o->stride, n = (int64_t)nearbyint(o->density * (double)total);
    while (n > 0 && n > n_anchor * (n_tok - (total - n + len - 1) / len)) n--;
    return n;
}

static void pick_scores(const kvf_merge_job *job, work *w, int64_t first, int64_t last, int64_t n_keep)
{
    const float *scores = job->scores ? job->scores : w->scores;
    int64_t n_tok = job->x->n_tok, len = last - first + 1;
    for (int64_t t = first; t <= last; t++) w->share[t] = n_tok;
    kvf_share_out(w->share + first, len, n_keep, w->share + first, (uint64_t *)w->room,
                  (uint8_t *)(w->room + len));
    for (int64_t t = first; t <= last; t++) {
        for (int64_t n = 0; n < n_tok; n++) w->key[n] = kvf_order_key((double)scores[t * n_tok + n]);
        kvf_pick_top(w->key, n_tok, w->share[t], w->picked + t * n_tok);
    }
}

/* Density peaks of frame t among the tokens that do not stay by score. */
static kvf_status find_peaks(const kvf_merge_job *job, work *w, int64_t t, int64_t n_peak, kvf_error *err)
{
    const fastvid *o = job->state;
    const kvf_tensor *x = job->x;
    int64_t n = 0;
    if (n_peak == 0) return KVF_OK;
    for (int64_t i = 0; i < x->n_tok; i++) {
        if (w->picked[t * x->n_tok + i]) continue;
        job->env->rows.widen[x->type](w->x + n * x->dim, kvf_tensor_row(x, t, i), x->dim);
        w->place[n++] = (int32_t)i;
    }
    kvf_dpc a = { .x = w->x,
                  .n = n,
                  .dim = x->dim,
                  .n_center = n_peak,
                  .k = o->knn,
                  .exact = true,
                  .center = w->near,
                  .member = w->near + x->n_tok,
                  .dist = w->dist,
                  .score = w->score };
    KVF_TRY(kvf_dpc_run(job->env, &a, err));
    const kvf_mem *mem = job->env->mem;
    KVF_TRY(
        kvf_reserve(mem, (void **)&w->center, &w->center_cap, w->n_peak + n_peak, sizeof *w->center, err));
    KVF_TRY(kvf_reserve(mem, (void **)&w->peak, &w->peak_cap, (w->n_peak + n_peak) * x->dim, sizeof *w->peak,
                        err));
    for (int64_t c = 0; c < n_peak; c++, w->n_peak++) {
        w->center[w->n_peak] = (int32_t)(t * x->n_tok + w->place[w->near[c]]);
        memcpy(w->peak + w->n_peak * x->dim, w->x + w->near[c] * x->dim, (size_t)x->dim * sizeof *w->peak);
    }
    return KVF_OK;
}

/* Tokens of the segment that are neither kept by score nor peaks join the nearest peak. */
static void join(const kvf_merge_job *job, work *w, int64_t first, int64_t last)
{
    const kvf_tensor *x = job->x;
    for (int64_t i = (last + 1) * x->n_tok - 1, c = w->n_peak - 1; i >= first * x->n_tok; i--) {
        w->member[i] = -1;
        if (c >= 0 && w->center[c] == i)
            w->member[i] = (int32_t)c--;
        else if (!w->picked[i])
            w->member[i] = -2; /* to be decided */
    }
    for (int64_t i = first * x->n_tok; i < (last + 1) * x->n_tok;) {
        int64_t n = 0, of[4];
        float best[4] = { INFINITY, INFINITY, INFINITY, INFINITY };
        for (; i < (last + 1) * x->n_tok && n < 4; i++) {
            if (w->member[i] != -2) continue;
            job->env->rows.widen[x->type](w->row + n * x->dim, kvf_tensor_token(x, i), x->dim);
            w->member[i] = 0;
            of[n++] = i;
        }
        for (int64_t j = 0; j < w->n_peak && n > 0; j += 4) {
            float out[4][4];
            kvf_row_set a = { w->row, n, x->dim },
                        b = { w->peak + j * x->dim, w->n_peak - j < 4 ? w->n_peak - j : 4, x->dim };
            kvf_tile(job->env->rows.dist2, a, b, x->dim, out[0], 4);
            for (int64_t r = 0; r < n; r++)
                for (int64_t c = 0; c < b.n; c++)
                    if (out[r][c] < best[r]) best[r] = out[r][c], w->member[of[r]] = (int32_t)(j + c);
        }
    }
}

static kvf_status emit_peaks(const kvf_merge_job *job, work *w, int64_t segment, int64_t first, int64_t last,
                             kvf_error *err)
{
    const fastvid *o = job->state;
    int64_t n_tok = job->x->n_tok;
    KVF_TRY(kvf_reserve(job->env->mem, (void **)&w->head, &w->head_cap, w->n_peak, sizeof *w->head, err));
    for (int64_t c = 0; c < w->n_peak; c++) w->head[c] = -1;
    for (int64_t i = (last + 1) * n_tok - 1; i >= first * n_tok; i--) {
        if (w->member[i] < 0) continue;
        w->next[i] = w->head[w->member[i]];
        w->head[w->member[i]] = (int32_t)i;
    }
    for (int64_t c = 0; c < w->n_peak; c++) {
        int64_t n = -1, frame = w->center[c] / n_tok;
        for (int64_t i = w->head[c]; i >= 0; i = w->next[i]) n++;
        kvf_merge_meta meta = { (int32_t)segment, n > 0 ? KVF_MERGE_MERGED : KVF_MERGE_COPIED, (int32_t)frame,
                                w->center[c] % (int32_t)n_tok };
        KVF_TRY(kvf_plan_token(job->plan, meta, err));
        for (int64_t i = w->head[c]; i >= 0; i = w->next[i])
            KVF_TRY(kvf_plan_source(job->plan, i,
                                    n == 0              ? 1
                                    : i == w->center[c] ? o->beta
                                                        : (1 - o->beta) / (double)n,
                                    err));
    }
    return KVF_OK;
}

static kvf_status plan_segment(const kvf_merge_job *job, work *w, const part *p, kvf_error *err)
{
    const fastvid *o = job->state;
    int64_t segment = p->segment, first = p->first, last = p->last, total = p->total;
    int64_t n_tok = job->x->n_tok, len = last - first + 1, n_peak = peaks_of(o, total, len, n_tok),
            n_anchor = 0;
    pick_scores(job, w, first, last, total - n_peak);
    for (int64_t t = first; t <= last; t++)
        if (is_anchor(o, first, t))
            w->share[n_anchor++] = n_tok - w->share[t]; /* n_anchor <= t: not read again */
    w->n_peak = 0;
    if (n_peak > 0) {
        kvf_share_out(w->share, n_anchor, n_peak, w->share, (uint64_t *)w->room,
                      (uint8_t *)(w->room + n_anchor));
        for (int64_t a = 0; a < n_anchor; a++)
            KVF_TRY(find_peaks(job, w, first + a * o->stride, w->share[a], err));
        join(job, w, first, last);
        KVF_TRY(emit_peaks(job, w, segment, first, last, err));
    }
    for (int64_t i = first * n_tok; i < (last + 1) * n_tok; i++)
        if (w->picked[i]) KVF_TRY(kvf_plan_copy(job->plan, segment, i / n_tok, i % n_tok, err));
    kvf_merge_segment s = { (int32_t)first,
                            (int32_t)last,
                            (int32_t)(len * n_tok - total + n_peak),
                            (int32_t)n_peak,
                            (int32_t)(total - n_peak),
                            (int32_t)(total - n_peak) };
    return kvf_plan_segment(job->plan, s, err);
}

/* ---- The video ------------------------------------------------------------------------------- */

static kvf_status plan_video(kvf_merge_job *job, work *w, kvf_error *err)
{
    const fastvid *o = job->state;
    int64_t n_frame = job->x->n_frame, n_tok = job->x->n_tok, n_seg = 0, *size;
    KVF_TRY(frame_means(job, w->mean, err));
    cut_frames(job, w);
    kvf_merge_stand_in by_mean = { .x = job->x, .last = n_frame - 1, .out = w->scores };
    if (!job->scores) KVF_TRY(kvf_merge_substitute(job->env, &by_mean, err));
    job->plan->scores = job->scores ? "given" : "distance to the frame's mean";
    job->plan->n_asked = kvf_merge_count(o->ratio, n_frame * n_tok);
    KVF_TRY(KVF_GET(job->env, &size, n_frame, err));
    for (int64_t t = 0; t < n_frame; t++) {
        n_seg += w->cut[t];
        size[n_seg - 1] += n_tok;
    }
    kvf_share_out(size, n_seg, job->plan->n_asked, size, (uint64_t *)w->room, (uint8_t *)(w->room + n_seg));
    kvf_status rc = KVF_OK;
    for (int64_t first = 0, s = 0; first < n_frame && rc >= 0; s++) {
        int64_t last = first;
        while (last + 1 < n_frame && !w->cut[last + 1]) last++;
        rc = plan_segment(job, w, &(part){ s, first, last, size[s] }, err);
        first = last + 1;
    }
    kvf_free(job->env->mem, size);
    return rc;
}

static kvf_status work_init(work *w, const kvf_merge_job *job, kvf_error *err)
{
    const kvf_merge_env *env = job->env;
    int64_t n_tok = job->x->n_tok, n_frame = job->x->n_frame, dim = job->x->dim;
    KVF_TRY(KVF_GET(env, &w->mean, n_frame * dim, err));
    KVF_TRY(KVF_GET(env, &w->key, n_frame + n_tok, err));
    KVF_TRY(KVF_GET(env, &w->cut, n_frame, err));
    KVF_TRY(KVF_GET(env, &w->picked, n_frame * n_tok, err));
    KVF_TRY(KVF_GET(env, &w->share, n_frame, err));
    KVF_TRY(KVF_GET(env, &w->room, 2 * n_frame, err));
    KVF_TRY(KVF_GET(env, &w->place, n_tok, err));
    KVF_TRY(KVF_GET(env, &w->member, n_frame * n_tok, err));
    KVF_TRY(KVF_GET(env, &w->next, n_frame * n_tok, err));
    KVF_TRY(KVF_GET(env, &w->x, n_tok * dim, err));
    KVF_TRY(KVF_GET(env, &w->row, 4 * dim, err));
    KVF_TRY(KVF_GET(env, &w->dist, n_tok * n_tok, err));
    KVF_TRY(KVF_GET(env, &w->score, n_tok, err));
    KVF_TRY(KVF_GET(env, &w->near, 2 * n_tok, err));
    return job->scores ? KVF_OK : KVF_GET(env, &w->scores, n_frame * n_tok, err);
}

static kvf_status plan(kvf_merge_job *job, kvf_error *err)
{
    work w = { 0 };
    kvf_status rc = work_init(&w, job, err);
    if (rc >= 0) rc = plan_video(job, &w, err);
    void *all[] = { w.mean, w.key,    w.cut,  w.picked, w.share, w.room, w.scores, w.place, w.center,
                    w.peak, w.member, w.next, w.head,   w.x,     w.row,  w.dist,   w.score, w.near };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kvf_free(job->env->mem, all[i]);
    return rc;
}

const kvf_merge_ops kvf_merge_fastvid = {
    .name = "fastvid",
    .source = "after Shen et al. 2025, FastVID, arXiv:2503.11187",
    .help = "segments by frame similarity; the largest scores and density peaks of each",
    .options = options,
    .state_size = sizeof(fastvid),
    .plan = plan,
};
