/* holitom_context.c - dynamic tokens merged instead of dropped.
 *
 * The published method has a share of a frame's dynamic budget that goes to density peaks of what the scores
 * leave, into which the rest of the frame is folded; its release fails with any share above 0, and its
 * settings leave it 0 [HoliTom, sec. 3.2]. Here context=X asks for it: nothing of a frame is lost then, and
 * no score is needed with 1.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "merge/dpc.h"
#include "merge/holitom.h"

kvf_status kvf_context_init(kvf_context *c, const kvf_holitom_run *r, kvf_error *err)
{
    const kvf_merge_env *env = r->job->env;
    int64_t n = r->job->x->n_tok;
    *c = (kvf_context){ .mem = env->mem };
    if (r->opt->context <= 0) return KVF_OK;
    KVF_TRY(KVF_GET(env, &c->place, 6 * n, err));
    c->center = c->place + n;
    c->member = c->center + n;
    c->head = c->member + n;
    c->next = c->head + n;
    c->cluster = c->next + n;
    KVF_TRY(KVF_GET(env, &c->score, n, err));
    KVF_TRY(KVF_GET(env, &c->x, n * r->job->x->dim, err));
    return KVF_GET(env, &c->dist, n * n, err);
}

void kvf_context_fini(kvf_context *c)
{
    if (!c->mem) return;
    kvf_free(c->mem, c->place);
    kvf_free(c->mem, c->score);
    kvf_free(c->mem, c->x);
    kvf_free(c->mem, c->dist);
}

int64_t kvf_context_share(const kvf_holitom *o, int64_t keep)
{
    return (int64_t)nearbyint(o->context * (double)keep);
}

/* Row i of the clustered tokens, scaled as the static ones are. */
static void set_row(const kvf_holitom_run *r, kvf_context *c, int64_t t, int64_t i)
{
    const kvf_tensor *x = r->job->x;
    const kvf_rows *rows = &r->job->env->rows;
    float *row = c->x + i * x->dim;
    rows->widen[x->type](row, kvf_tensor_row(x, t, c->place[i]), x->dim);
    if (r->opt->distance == KVF_HOLITOM_COSINE) kvf_holitom_scale(rows, row, x->dim);
}

kvf_status kvf_context_find(kvf_holitom_run *r, const kvf_holitom_part *p, kvf_context *c, int64_t t,
                            uint8_t *picked, kvf_error *err)
{
    const kvf_merge_job *job = r->job;
    int64_t n = 0, n_center = kvf_context_share(r->opt, r->keep[t]);
    if (n_center == 0) return KVF_OK;
    for (int64_t i = 0; i < job->x->n_tok; i++)
        if (!p->is_static[i] && !picked[i]) c->place[n++] = (int32_t)i;
    for (int64_t i = 0; i < n; i++) set_row(r, c, t, i);
    kvf_dpc a = { .x = c->x,
                  .n = n,
                  .dim = job->x->dim,
                  .n_center = n_center,
                  .k = r->opt->knn,
                  .exact = true,
                  .center = c->center,
                  .member = c->member,
                  .dist = c->dist,
                  .score = c->score };
    KVF_TRY(kvf_dpc_run(job->env, &a, err));
    for (int64_t k = 0; k < n_center; k++) c->head[k] = -1;
    for (int64_t i = n - 1; i >= 0; i--) {
        c->next[i] = c->head[c->member[i]];
        c->head[c->member[i]] = (int32_t)i;
    }
    for (int64_t k = 0; k < n_center; k++) {
        int32_t at = c->place[c->center[k]];
        picked[at] = KVF_PICK_CENTER;
        c->cluster[at] = (int32_t)k;
    }
    return KVF_OK;
}

kvf_status kvf_context_emit(kvf_holitom_run *r, const kvf_context *c, int64_t part, int64_t t, int64_t tok,
                            kvf_error *err)
{
    kvf_merge_plan *plan = r->job->plan;
    int64_t k = c->cluster[tok], n = -1;
    for (int64_t i = c->head[k]; i >= 0; i = c->next[i]) n++;
    if (n == 0) return kvf_plan_copy(plan, part, t, tok, err);
    double beta = r->opt->merge == KVF_HOLITOM_MEAN ? 1 / (double)(n + 1) : r->opt->beta;
    kvf_merge_meta meta = { (int32_t)part, KVF_MERGE_MERGED, (int32_t)t, (int32_t)tok };
    KVF_TRY(kvf_plan_token(plan, meta, err));
    for (int64_t i = c->head[k]; i >= 0; i = c->next[i])
        KVF_TRY(kvf_plan_source(plan, t * plan->n_tok + c->place[i],
                                c->place[i] == tok ? beta : (1 - beta) / (double)n, err));
    return KVF_OK;
}
