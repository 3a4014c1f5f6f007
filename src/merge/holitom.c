/* holitom.c - holistic token merging before the language model.
 *
 * Shao et al. 2025, HoliTom, arXiv:2505.21334, sec. 3: frames are cut into segments so that as many tokens as
 * possible stay the same within one; each of those is averaged over its segment and clustered with its kind,
 * of the rest each frame keeps the tokens that the vision tower attends to most. mode=official is the
 * published code, number for number; mode=exact differs where docs/merge.md says: exactly floor(ratio T N)
 * tokens, no random ties, scores optional, drift bounded on request.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/holitom.h"

#include <string.h>

#include "merge/dpc.h"
#include "merge/segment.h"
#include "merge/similarity.h"

static const kvf_option options[] = {
    KVF_OPT_F64(kvf_holitom, ratio, 0.1, 1e-6, 1, "share of the tokens that is kept"),
    KVF_OPT_F64(kvf_holitom, tau, 0.8, -1, 1,
                "a token is static while its cosine to the frame before is above this"),
    KVF_OPT_CHOICE(kvf_holitom, mode, 0, "exact|official", "the count asked for, or the published code's"),
    KVF_OPT_I64(kvf_holitom, knn, 7, 1, KVF_DPC_MAX_K, "neighbours that make a token's density"),
    KVF_OPT_F64(kvf_holitom, beta, 0.6, 0, 1, "weight of a cluster's centre against the mean of its members"),
    KVF_OPT_CHOICE(kvf_holitom, merge, 0, "beta|mean", "clusters by beta, or all of a cluster alike"),
    KVF_OPT_I64(kvf_holitom, window, 1024, 1, 65536, "longest segment, frames"),
    KVF_OPT_F64(kvf_holitom, drift, -1, -1, 1,
                "a static token's cosine to its segment's first frame is above this too; -1: off"),
    KVF_OPT_F64(kvf_holitom, context, 0, 0, 1,
                "share of a frame's dynamic tokens that are density peaks, the rest folded in"),
    KVF_OPT_CHOICE(kvf_holitom, distance, 0, "euclid|cosine",
                   "between static tokens, when they are clustered"),
    KVF_OPT_CHOICE(kvf_holitom, order, 0, "segment|grid",
                   "static tokens before their segment, or in its first frame"),
    KVF_OPT_CHOICE(kvf_holitom, newline, 0, "none|end|row",
                   "newline embeddings: none, one at the end, one per row of the grid"),
    KVF_OPT_CHOICE(kvf_holitom, budget, 0, "video|segment",
                   "shared out over the video, or segment by segment as in a stream"),
    KVF_OPT_CHOICE(kvf_holitom, noscore, 0, "frame|segment",
                   "without scores: distance to the mean of the frame, or of the segment"),
    { 0 },
};

static kvf_status check(const void *state, kvf_error *err)
{
    const kvf_holitom *h = state;
    if (h->newline == KVF_HOLITOM_ROW && h->order != KVF_HOLITOM_BY_GRID)
        return kvf_fail(err, KVF_ERR_ARG, "holitom: newline=row ends rows of the grid; it needs order=grid");
    if (h->context > 0 && h->mode == KVF_HOLITOM_OFFICIAL)
        return kvf_fail(err, KVF_ERR_ARG,
                        "holitom: the published code has no context above 0 that runs; use mode=exact");
    return KVF_OK;
}

kvf_status kvf_holitom_init(kvf_holitom_run *r, const kvf_merge_job *job, const float *sim, kvf_error *err)
{
    *r = (kvf_holitom_run){ .job = job, .opt = job->state, .sim = sim };
    return KVF_GET(job->env, &r->keep, job->x->n_frame, err);
}

void kvf_holitom_fini(kvf_holitom_run *r)
{
    if (!r->job) return;
    const kvf_mem *mem = r->job->env->mem;
    kvf_free(mem, r->part);
    kvf_free(mem, r->mask);
    kvf_free(mem, r->keep);
    kvf_free(mem, r->own);
    kvf_free(mem, r->scores);
}

kvf_status kvf_holitom_add_part(kvf_holitom_run *r, int64_t first, int64_t last, const uint8_t *is_static,
                                kvf_error *err)
{
    const kvf_mem *mem = r->job->env->mem;
    int64_t n_tok = r->job->x->n_tok, n_static = 0;
    KVF_TRY(kvf_reserve(mem, (void **)&r->part, &r->part_cap, r->n_part + 1, sizeof *r->part, err));
    KVF_TRY(kvf_reserve(mem, (void **)&r->mask, &r->mask_cap, (r->n_part + 1) * n_tok, 1, err));
    memcpy(r->mask + r->n_part * n_tok, is_static, (size_t)n_tok);
    for (int64_t n = 0; n < n_tok; n++) n_static += is_static[n];
    r->part[r->n_part++] = (kvf_holitom_part){ .first = first, .last = last, .n_static = n_static };
    for (int64_t i = 0; i < r->n_part; i++)
        r->part[i].is_static = r->mask + i * n_tok; /* the block may have moved */
    r->reduced += n_static * (last - first);
    return KVF_OK;
}

kvf_status kvf_holitom_take(kvf_holitom_run *r, int64_t first, int64_t last, kvf_error *err)
{
    if (r->opt->drift > -1 && last > first) return kvf_holitom_split(r, first, last, err);
    int64_t n_tok = r->job->x->n_tok;
    uint8_t *is_static;
    KVF_TRY(KVF_GET(r->job->env, &is_static, n_tok, err));
    memset(is_static, last > first, (size_t)n_tok);
    for (int64_t t = first; t < last; t++)
        for (int64_t n = 0; n < n_tok; n++) is_static[n] &= r->sim[t * n_tok + n] > (float)r->opt->tau;
    kvf_status rc = kvf_holitom_add_part(r, first, last, is_static, err);
    kvf_free(r->job->env->mem, is_static);
    return rc;
}

/* All parts at once, or one after another as a stream would. */
static kvf_status emit_video(kvf_holitom_run *r, const int32_t *segment, int64_t n_segment, kvf_error *err)
{
    bool whole = r->opt->budget == KVF_HOLITOM_VIDEO;
    for (int64_t i = 0; i < n_segment; i++) {
        int64_t from = r->n_part;
        KVF_TRY(kvf_holitom_take(r, segment[2 * i], segment[2 * i + 1], err));
        if (whole && i + 1 < n_segment) continue;
        KVF_TRY(kvf_holitom_share(r, whole ? 0 : from, i + 1 == n_segment, err));
        KVF_TRY(kvf_holitom_emit(r, whole ? 0 : from, err));
    }
    KVF_TRY(kvf_holitom_close(r, err));
    kvf_merge_plan *p = r->job->plan;
    int64_t n = r->job->x->n_frame * r->job->x->n_tok;
    p->total_reduced = r->reduced;
    p->n_asked = kvf_merge_count(r->opt->ratio, n);
    int64_t n_kept = 0;
    for (int64_t i = 0; i < p->n_segment; i++)
        n_kept += p->segment[i].static_kept + p->segment[i].dynamic_kept;
    p->retain_eff = whole ? r->retain : (double)n_kept / (double)(n - r->reduced);
    return KVF_OK;
}

static kvf_status segments_of(const kvf_merge_job *job, const float *sim, int32_t *out, int64_t *n,
                              kvf_error *err)
{
    const kvf_holitom *h = job->state;
    kvf_segmenter s;
    kvf_status rc = kvf_segmenter_init(&s, job->env->mem, job->x->n_tok, h->window, h->tau, err);
    for (int64_t t = 0; t < job->x->n_frame && rc >= 0; t++)
        rc = kvf_segmenter_add(&s, t > 0 ? sim + (t - 1) * job->x->n_tok : NULL, err);
    if (rc >= 0) *n = kvf_segmenter_trace(&s, job->x->n_frame - 1, out);
    kvf_segmenter_fini(&s);
    return rc;
}

static kvf_status plan(kvf_merge_job *job, kvf_error *err)
{
    const kvf_tensor *x = job->x;
    float *sim = NULL;
    double *norm = NULL;
    int32_t *segment = NULL;
    int64_t n_segment = 0;
    kvf_holitom_run r = { 0 };
    double start = kvf_merge_now_ms();
    kvf_status rc = KVF_GET(job->env, &sim, (x->n_frame - 1) * x->n_tok, err);
    if (rc >= 0) rc = KVF_GET(job->env, &norm, x->n_frame * x->n_tok, err);
    if (rc >= 0) rc = KVF_GET(job->env, &segment, 2 * x->n_frame, err);
    if (rc >= 0) rc = kvf_similarity(job->env, x, sim, norm, err);
    job->plan->similarity_ms = kvf_merge_now_ms() - start;
    if (rc >= 0) rc = segments_of(job, sim, segment, &n_segment, err);
    if (rc >= 0) rc = kvf_holitom_init(&r, job, sim, err);
    if (rc >= 0) rc = emit_video(&r, segment, n_segment, err);
    kvf_holitom_fini(&r);
    kvf_free(job->env->mem, segment);
    kvf_free(job->env->mem, norm);
    kvf_free(job->env->mem, sim);
    return rc;
}

const kvf_merge_ops kvf_merge_holitom = {
    .name = "holitom",
    .source = "Shao et al. 2025, HoliTom, arXiv:2505.21334",
    .help = "averages what stays the same over a segment, keeps what the vision tower attends to of the rest",
    .options = options,
    .state_size = sizeof(kvf_holitom),
    .online = true,
    .check = check,
    .plan = plan,
};
