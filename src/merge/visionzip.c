/* visionzip.c - the tokens the vision tower attends to, and the rest folded into a few of their kind.
 *
 * Yang et al. 2024, VisionZip, arXiv:2412.04467, as HoliTom's authors run it on towers without a class token:
 * of a frame's budget 54/64 goes to the tokens with the largest scores, the rest to targets at equal steps
 * among what is left; every other token joins the target whose key is most similar, and the target becomes
 * target + mean of those (context=add), or the mean of all of them (context=mean).
 *
 * mode=official gives each frame floor(ratio N) tokens; exact divides floor(ratio T N) by largest remainder.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "merge/method.h"
#include "merge/select.h"
#include "merge/tile.h"

typedef struct visionzip {
    double ratio, dominant;
    int64_t mode, context, newline;
} visionzip;

static const kvf_option options[] = {
    KVF_OPT_F64(visionzip, ratio, 0.1, 1e-6, 1, "share of the tokens that is kept"),
    KVF_OPT_F64(visionzip, dominant, 0.84375, 0, 1, "share of those that goes to the largest scores"),
    KVF_OPT_CHOICE(visionzip, mode, 0, "exact|official",
                   "the count asked for in all, or the same floor for every frame"),
    KVF_OPT_CHOICE(visionzip, context, 0, "add|mean",
                   "a target plus the mean of its members, or the mean of all"),
    KVF_OPT_CHOICE(visionzip, newline, 0, "none|end", "newline embeddings: none, or one at the end"),
    { 0 },
};

/* Scratch for one frame. */
typedef struct work {
    float *unit;     /* [n_tok][dim of keys] of length 1 */
    uint64_t *key;   /* [n_tok] */
    uint8_t *picked; /* [n_tok] */
    int32_t *rest;   /* [n_tok] positions that are left */
    int32_t *target; /* [n_tok] places in rest */
    int32_t *member; /* [n_tok] target of a place in rest; -1: it is one */
    int64_t *share;  /* [n_frame] */
    float *scores;   /* [n_frame][n_tok] where there are none */
} work;

static void unit_row(const kvf_merge_job *job, const kvf_tensor *k, int64_t t, int64_t n, float *out)
{
    double sum[2];
    job->env->rows.widen[k->type](out, kvf_tensor_row(k, t, n), k->dim);
    job->env->rows.pair[KVF_MERGE_F32](out, out, k->dim, sum);
    float scale = sum[1] > 0 && isfinite(sum[1]) ? (float)(1 / sqrt(sum[1])) : 0.0f;
    for (int64_t d = 0; d < k->dim; d++) out[d] *= scale;
}

/* Four at a time, tokens of rest find the target they are most similar to, the first of equals. Targets are
 * every `step`-th of rest, so that their rows are evenly spaced too. */
static void join(const kvf_merge_job *job, work *w, int64_t t, int64_t n_rest, int64_t n_target)
{
    const kvf_tensor *k = job->keys ? job->keys : job->x;
    int64_t step = n_target > 1 ? w->target[1] : 1;
    for (int64_t i = 0; i < n_rest; i++) unit_row(job, k, t, w->rest[i], w->unit + i * k->dim);
    for (int64_t i = 0; i < n_rest; i += 4) {
        kvf_row_set a = { w->unit + i * k->dim, n_rest - i < 4 ? n_rest - i : 4, k->dim };
        float best[4] = { -INFINITY, -INFINITY, -INFINITY, -INFINITY };
        for (int64_t j = 0; j < n_target; j += 4) {
            float out[4][4];
            kvf_row_set b = { w->unit + j * step * k->dim, n_target - j < 4 ? n_target - j : 4,
                              step * k->dim };
            kvf_tile(job->env->rows.dot, a, b, k->dim, out[0], 4);
            for (int64_t r = 0; r < a.n; r++)
                for (int64_t c = 0; c < b.n; c++)
                    if (out[r][c] > best[r]) best[r] = out[r][c], w->member[i + r] = (int32_t)(j + c);
        }
    }
    for (int64_t j = 0; j < n_target; j++) w->member[w->target[j]] = -1;
}

static kvf_status emit_target(const kvf_merge_job *job, const work *w, int64_t t, int64_t j, int64_t n_rest,
                              kvf_error *err)
{
    const visionzip *o = job->state;
    int64_t n_member = 0, base = t * job->x->n_tok, center = w->target[j];
    for (int64_t i = 0; i < n_rest; i++) n_member += w->member[i] == j;
    if (n_member == 0) return kvf_plan_copy(job->plan, t, t, w->rest[center], err);
    kvf_merge_meta meta = { (int32_t)t, KVF_MERGE_MERGED, (int32_t)t, w->rest[center] };
    KVF_TRY(kvf_plan_token(job->plan, meta, err));
    double all = 1 / (double)(n_member + 1);
    double of_center = o->context == 0 ? 1 : all, of_member = o->context == 0 ? 1 / (double)n_member : all;
    for (int64_t i = 0; i < n_rest; i++) {
        if (i != center && w->member[i] != j) continue;
        KVF_TRY(kvf_plan_source(job->plan, base + w->rest[i], i == center ? of_center : of_member, err));
    }
    return KVF_OK;
}

static kvf_status plan_frame(kvf_merge_job *job, work *w, int64_t t, const float *scores, kvf_error *err)
{
    const visionzip *o = job->state;
    int64_t n_tok = job->x->n_tok, keep = w->share[t], n_rest = 0;
    int64_t n_top = (int64_t)((double)keep * o->dominant), n_target = keep - n_top;
    for (int64_t n = 0; n < n_tok; n++) w->key[n] = kvf_order_key((double)scores[t * n_tok + n]);
    kvf_pick_top(w->key, n_tok, n_top, w->picked);
    for (int64_t n = 0; n < n_tok; n++) {
        if (w->picked[n])
            KVF_TRY(kvf_plan_copy(job->plan, t, t, n, err));
        else
            w->rest[n_rest++] = (int32_t)n;
    }
    if (n_target > 0) {
        int64_t step = n_rest / n_target > 1 ? n_rest / n_target : 1;
        for (int64_t j = 0; j < n_target; j++) w->target[j] = (int32_t)(j * step);
        join(job, w, t, n_rest, n_target);
        for (int64_t j = 0; j < n_target; j++) KVF_TRY(emit_target(job, w, t, j, n_rest, err));
    }
    kvf_merge_segment s = {
        (int32_t)t, (int32_t)t, (int32_t)n_rest, (int32_t)n_target, (int32_t)(n_tok - n_rest), (int32_t)n_top
    };
    return kvf_plan_segment(job->plan, s, err);
}

static kvf_status plan_frames(kvf_merge_job *job, work *w, kvf_error *err)
{
    const visionzip *o = job->state;
    int64_t n_frame = job->x->n_frame, n_tok = job->x->n_tok,
            total = kvf_merge_count(o->ratio, n_frame * n_tok);
    for (int64_t t = 0; t < n_frame; t++)
        w->share[t] = o->mode == 1 ? kvf_merge_count(o->ratio, n_tok) : n_tok;
    if (o->mode == 0)
        kvf_share_out(w->share, n_frame, total, w->share, (uint64_t *)(w->share + n_frame),
                      (uint8_t *)(w->share + 2 * n_frame));
    kvf_merge_stand_in by_mean = { .x = job->x, .last = n_frame - 1, .out = w->scores };
    if (!job->scores) KVF_TRY(kvf_merge_substitute(job->env, &by_mean, err));
    job->plan->scores = job->scores ? "given" : "distance to the frame's mean";
    for (int64_t i = 0; i < n_frame * n_tok; i++) { /* what is not compared must be finite all the same */
        double sum[2];
        const void *row = kvf_tensor_token(job->x, i);
        job->env->rows.pair[job->x->type](row, row, job->x->dim, sum);
        if (!isfinite(sum[1])) KVF_TRY(kvf_tensor_finite(job->x, i, "features", err));
    }
    for (int64_t i = 0; i < n_frame * n_tok && job->keys; i++)
        KVF_TRY(kvf_tensor_finite(job->keys, i, "keys", err));
    for (int64_t t = 0; t < n_frame; t++)
        KVF_TRY(plan_frame(job, w, t, job->scores ? job->scores : w->scores, err));
    job->plan->n_asked = total;
    kvf_merge_meta end = { (int32_t)(n_frame - 1), KVF_MERGE_NEWLINE, (int32_t)(n_frame - 1), -1 };
    return o->newline ? kvf_plan_token(job->plan, end, err) : KVF_OK;
}

static kvf_status plan(kvf_merge_job *job, kvf_error *err)
{
    const kvf_merge_env *env = job->env;
    int64_t n = job->x->n_tok, n_frame = job->x->n_frame, dim = job->keys ? job->keys->dim : job->x->dim;
    work w = { 0 };
    kvf_status rc = KVF_GET(env, &w.unit, n * dim, err);
    if (rc >= 0) rc = KVF_GET(env, &w.key, n, err);
    if (rc >= 0) rc = KVF_GET(env, &w.picked, n, err);
    if (rc >= 0) rc = KVF_GET(env, &w.rest, 3 * n, err);
    if (rc >= 0) rc = KVF_GET(env, &w.share, 2 * n_frame + (n_frame + 7) / 8, err);
    if (rc >= 0 && !job->scores) rc = KVF_GET(env, &w.scores, n_frame * n, err);
    if (rc >= 0) {
        w.target = w.rest + n;
        w.member = w.target + n;
        rc = plan_frames(job, &w, err);
    }
    kvf_free(env->mem, w.unit);
    kvf_free(env->mem, w.key);
    kvf_free(env->mem, w.picked);
    kvf_free(env->mem, w.rest);
    kvf_free(env->mem, w.share);
    kvf_free(env->mem, w.scores);
    return rc;
}

static int64_t chunk(const void *state)
{
    return ((const visionzip *)state)->mode == 1 ? 1 : 0; /* exact shares out over the video */
}

const kvf_merge_ops kvf_merge_visionzip = {
    .name = "visionzip",
    .source = "Yang et al. 2024, VisionZip, arXiv:2412.04467",
    .help = "per frame: the largest scores, and the rest folded into a few targets by their keys",
    .options = options,
    .state_size = sizeof(visionzip),
    .plan = plan,
    .chunk = chunk,
};
