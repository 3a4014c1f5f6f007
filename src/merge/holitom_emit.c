/* holitom_emit.c - which tokens of a segment stay, and the output tokens they make.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "merge/dpc.h"
#include "merge/holitom.h"
#include "merge/select.h"

/* Scratch for one segment of the largest size. */
typedef struct work {
    int32_t *pos;         /* [n_tok] static positions, ascending */
    int32_t *center;      /* [n_tok] places in pos */
    int32_t *member;      /* [n_tok] */
    int32_t *cluster;     /* [n_tok] by position: place in center of a centre; -1 */
    uint64_t *key;        /* [n_tok] */
    uint8_t *picked;      /* [n_tok] */
    int32_t *place;       /* [n_tok] position of key[i] */
    int32_t *head, *next; /* [n_tok] members of each cluster as lists of places in pos, ascending; -1 ends */
    double *score;        /* [n_tok] */
    kvf_context context;
    float *mean, *dist; /* [mean_cap], [dist_cap] numbers */
    int64_t mean_cap, dist_cap;
} work;

static kvf_status work_init(work *w, const kvf_merge_env *env, int64_t n, kvf_error *err)
{
    KVF_TRY(KVF_GET(env, &w->pos, 7 * n, err));
    w->center = w->pos + n;
    w->member = w->center + n;
    w->cluster = w->member + n;
    w->place = w->cluster + n;
    w->head = w->place + n;
    w->next = w->head + n;
    KVF_TRY(KVF_GET(env, &w->key, n, err));
    KVF_TRY(KVF_GET(env, &w->score, n, err));
    return KVF_GET(env, &w->picked, n, err);
}

static void work_fini(work *w, const kvf_mem *mem)
{
    kvf_free(mem, w->pos);
    kvf_free(mem, w->key);
    kvf_free(mem, w->score);
    kvf_free(mem, w->picked);
    kvf_free(mem, w->mean);
    kvf_free(mem, w->dist);
    kvf_context_fini(&w->context);
}

/* ---- Static tokens ----------------------------------------------------------------------------- */

void kvf_holitom_scale(const kvf_rows *rows, float *row, int64_t dim)
{
    double out[2];
    rows->pair[KVF_MERGE_F32](row, row, dim, out);
    float scale = out[1] > 0 && isfinite(out[1]) ? (float)sqrt((double)dim / out[1]) : 0.0f;
    for (int64_t d = 0; d < dim; d++) row[d] *= scale;
}

typedef struct mean_task {
    const kvf_holitom_run *r;
    const kvf_holitom_part *p;
    const work *w;
} mean_task;

enum { GATHER = 64 };

static void one_mean(void *arg, int64_t i, int32_t worker)
{
    const mean_task *m = arg;
    const kvf_tensor *x = m->r->job->x;
    const kvf_rows *rows = &m->r->job->env->rows;
    (void)worker;
    int64_t len = m->p->last - m->p->first + 1;
    float *mean = m->w->mean + i * x->dim, weight[GATHER];
    for (int64_t k = 0; k < GATHER; k++) weight[k] = 1.0f / (float)len;
    memset(mean, 0, (size_t)x->dim * sizeof *mean);
    for (int64_t t = m->p->first; t <= m->p->last; t += GATHER) {
        const void *src[GATHER];
        int64_t n = m->p->last - t + 1 < GATHER ? m->p->last - t + 1 : GATHER;
        for (int64_t j = 0; j < n; j++) src[j] = kvf_tensor_row(x, t + j, m->w->pos[i]);
        rows->add[x->type](mean, src, weight, n, x->dim);
    }
    if (m->r->opt->distance == KVF_HOLITOM_COSINE) kvf_holitom_scale(rows, mean, x->dim);
}

static kvf_status cluster(kvf_holitom_run *r, const kvf_holitom_part *p, work *w, kvf_error *err)
{
    const kvf_merge_job *job = r->job;
    const kvf_mem *mem = job->env->mem;
    int64_t n = p->n_static, dim = job->x->dim;
    const float *noise = NULL;
    if (job->noise) {
        if (r->noise_at + n > job->n_noise)
            return kvf_fail(err, KVF_ERR_ARG,
                            "noise holds %lld numbers, segment %lld needs more; give one per static token of "
                            "each segment that clusters",
                            (long long)job->n_noise, (long long)(p - r->part));
        noise = job->noise + r->noise_at;
    }
    r->noise_at += n;
    if (p->keep == n) { /* every one is a centre: nothing to compare */
        for (int64_t i = 0; i < n; i++) w->center[i] = w->member[i] = (int32_t)i;
        return KVF_OK;
    }
    KVF_TRY(kvf_reserve(mem, (void **)&w->mean, &w->mean_cap, n * dim, sizeof *w->mean, err));
    KVF_TRY(kvf_reserve(mem, (void **)&w->dist, &w->dist_cap, n * n, sizeof *w->dist, err));
    mean_task m = { r, p, w };
    kvf_merge_run(job->env, n, one_mean, &m);
    kvf_dpc a = { .x = w->mean,
                  .n = n,
                  .dim = dim,
                  .n_center = p->keep,
                  .k = r->opt->knn,
                  .exact = r->opt->mode == KVF_HOLITOM_EXACT,
                  .noise = noise,
                  .center = w->center,
                  .member = w->member,
                  .dist = w->dist,
                  .score = w->score };
    return kvf_dpc_run(job->env, &a, err);
}

static void list_members(work *w, int64_t n_static, int64_t n_cluster)
{
    for (int64_t c = 0; c < n_cluster; c++) w->head[c] = -1;
    for (int64_t i = n_static - 1; i >= 0; i--) {
        w->next[i] = w->head[w->member[i]];
        w->head[w->member[i]] = (int32_t)i;
    }
}

/* Output token of cluster c: frame after frame, position after position, so that sources ascend. */
static kvf_status emit_cluster(kvf_holitom_run *r, int64_t part, const work *w, int64_t c, kvf_error *err)
{
    const kvf_holitom_part *p = &r->part[part];
    kvf_merge_plan *plan = r->job->plan;
    int64_t n_tok = r->job->x->n_tok, len = p->last - p->first + 1, n_member = -1;
    for (int64_t i = w->head[c]; i >= 0; i = w->next[i]) n_member++;
    kvf_merge_meta meta = { (int32_t)part, KVF_MERGE_MERGED, (int32_t)p->first, w->pos[w->center[c]] };
    KVF_TRY(kvf_plan_token(plan, meta, err));
    double beta = n_member == 0                       ? 1
                  : r->opt->merge == KVF_HOLITOM_MEAN ? 1 / (double)(n_member + 1)
                                                      : r->opt->beta;
    double of_center = beta, of_member = n_member > 0 ? (1 - beta) / (double)n_member : 0;
    for (int64_t t = p->first; t <= p->last; t++)
        for (int64_t i = w->head[c]; i >= 0; i = w->next[i]) {
            int64_t at = t * n_tok + w->pos[i], n = len;
            if (r->own) {
                if (r->own[at]) continue;
                for (int64_t u = p->first; u <= p->last; u++) n -= r->own[u * n_tok + w->pos[i]];
            }
            KVF_TRY(kvf_plan_source(plan, at, (i == w->center[c] ? of_center : of_member) / (double)n, err));
        }
    return KVF_OK;
}

/* ---- Dynamic tokens ---------------------------------------------------------------------------- */

static kvf_status scores_of(kvf_holitom_run *r, const kvf_holitom_part *p, kvf_error *err)
{
    const kvf_merge_job *job = r->job;
    if (job->scores || p->n_static == job->x->n_tok || r->opt->context >= 1) return KVF_OK;
    if (!r->scores) KVF_TRY(KVF_GET(job->env, &r->scores, job->x->n_frame * job->x->n_tok, err));
    bool whole = r->opt->noscore == KVF_HOLITOM_SEGMENT_MEAN;
    job->plan->scores = whole ? "distance to the segment's mean" : "distance to the frame's mean";
    kvf_merge_stand_in s = { job->x, p->first,     p->last,
                             whole,  p->is_static, r->scores + p->first * job->x->n_tok };
    return kvf_merge_substitute(job->env, &s, err);
}

/* picked[n] = 1 for the dynamic tokens of frame t that stay, and the static ones that stay by themselves. */
static void pick_dynamic(const kvf_holitom_run *r, const kvf_holitom_part *p, const work *w, int64_t t,
                         uint8_t *out)
{
    int64_t n_tok = r->job->x->n_tok, n = 0;
    const float *score = (r->job->scores ? r->job->scores : r->scores);
    memset(out, 0, (size_t)n_tok);
    for (int64_t i = 0; i < n_tok; i++) {
        if (p->is_static[i]) continue;
        w->key[n] = score ? kvf_order_key((double)score[t * n_tok + i]) : 0;
        w->place[n++] = (int32_t)i;
    }
    uint8_t *top = w->picked;
    kvf_pick_top(w->key, n, r->keep[t] - kvf_context_share(r->opt, r->keep[t]), top);
    for (int64_t i = 0; i < n; i++) out[w->place[i]] = top[i];
    for (int64_t i = 0; i < n_tok && r->own; i++) out[i] |= r->own[t * n_tok + i];
}

/* ---- The order of the output --------------------------------------------------------------------- */

static kvf_status newline(kvf_holitom_run *r, int64_t part, int64_t frame, kvf_error *err)
{
    kvf_merge_meta meta = { (int32_t)part, KVF_MERGE_NEWLINE, (int32_t)frame, -1 };
    return kvf_plan_token(r->job->plan, meta, err);
}

/* The tokens of frame t in the order of their positions; with order=grid the first frame has the static ones
 * too. */
static kvf_status emit_frame(kvf_holitom_run *r, int64_t part, const work *w, int64_t t,
                             const uint8_t *picked, kvf_error *err)
{
    int64_t n_tok = r->job->x->n_tok, grid_w = r->job->grid_w, n_row = 0;
    bool rows = r->opt->newline == KVF_HOLITOM_ROW;
    bool with_static = r->opt->order == KVF_HOLITOM_BY_GRID && t == r->part[part].first;
    for (int64_t n = 0; n < n_tok; n++) {
        bool center = with_static && w->cluster[n] >= 0;
        if (center) KVF_TRY(emit_cluster(r, part, w, w->cluster[n], err));
        if (picked[n] == KVF_PICK_COPY) KVF_TRY(kvf_plan_copy(r->job->plan, part, t, n, err));
        if (picked[n] == KVF_PICK_CENTER) KVF_TRY(kvf_context_emit(r, &w->context, part, t, n, err));
        n_row += center || picked[n];
        if ((n + 1) % grid_w) continue;
        if (rows && n_row > 0) KVF_TRY(newline(r, part, t, err));
        n_row = 0;
    }
    return KVF_OK;
}

static kvf_status emit_part(kvf_holitom_run *r, int64_t part, work *w, uint8_t *picked, kvf_error *err)
{
    kvf_holitom_part *p = &r->part[part];
    kvf_merge_plan *plan = r->job->plan;
    int64_t n_tok = r->job->x->n_tok, n = 0, n_before = plan->n_out, n_newline = 0;
    bool grid = r->opt->order == KVF_HOLITOM_BY_GRID;
    for (int64_t i = 0; i < n_tok; i++) {
        w->cluster[i] = -1;
        if (p->is_static[i]) w->pos[n++] = (int32_t)i;
    }
    if (p->keep > 0) KVF_TRY(cluster(r, p, w, err));
    if (p->keep > 0) list_members(w, n, p->keep);
    for (int64_t c = 0; c < p->keep; c++) {
        w->cluster[w->pos[w->center[c]]] = (int32_t)c;
        if (!grid) KVF_TRY(emit_cluster(r, part, w, c, err));
    }
    KVF_TRY(scores_of(r, p, err));
    for (int64_t t = p->first; t <= p->last; t++) {
        pick_dynamic(r, p, w, t, picked);
        KVF_TRY(kvf_context_find(r, p, &w->context, t, picked, err));
        KVF_TRY(emit_frame(r, part, w, t, picked, err));
    }
    for (int64_t i = n_before; i < plan->n_out; i++) n_newline += plan->meta[i].kind == KVF_MERGE_NEWLINE;
    kvf_merge_segment s = { (int32_t)p->first,
                            (int32_t)p->last,
                            (int32_t)p->n_static,
                            (int32_t)p->keep,
                            (int32_t)((n_tok - p->n_static) * (p->last - p->first + 1)),
                            (int32_t)(plan->n_out - n_before - n_newline - p->keep) };
    return kvf_plan_segment(plan, s, err);
}

kvf_status kvf_holitom_emit(kvf_holitom_run *r, int64_t from, kvf_error *err)
{
    const kvf_merge_env *env = r->job->env;
    int64_t n_tok = r->job->x->n_tok;
    work w = { 0 };
    uint8_t *picked = NULL;
    if (r->job->scores) r->job->plan->scores = "given";
    kvf_status rc = work_init(&w, env, n_tok, err);
    if (rc >= 0) rc = kvf_context_init(&w.context, r, err);
    if (rc >= 0) rc = KVF_GET(env, &picked, n_tok, err);
    for (int64_t i = from; i < r->n_part && rc >= 0; i++) rc = emit_part(r, i, &w, picked, err);
    kvf_free(env->mem, picked);
    work_fini(&w, env->mem);
    return rc;
}

kvf_status kvf_holitom_close(kvf_holitom_run *r, kvf_error *err)
{
    if (r->opt->newline != KVF_HOLITOM_END) return KVF_OK;
    return newline(r, r->n_part - 1, r->job->x->n_frame - 1, err);
}
