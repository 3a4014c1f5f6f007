/* holitom_drift.c - an optional bound on how far a static token may wander.
 *
 * The published segmentation compares neighbouring frames only: a token that turns a little every frame is
 * static for ever, and the average of the first and the last says nothing. With drift=X a token must also
 * stay above cosine X to its place in the segment's first frame. A segment that the segmentation found is cut
 * where this pays: from its first frame on, the piece that takes away most tokens per frame, then again from
 * the frame after it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "merge/holitom.h"
#include "merge/similarity.h"

typedef struct walk {
    const kvf_rows *ref; /* for squares past the range of f32 */
    uint8_t *now;        /* [n_tok] static so far */
    uint8_t *best;       /* [n_tok] static on the best piece */
} walk;

static bool stays(const kvf_holitom_run *r, const walk *w, int64_t first, int64_t t, int64_t n)
{
    const kvf_tensor *x = r->job->x;
    const void *a = kvf_tensor_row(x, first, n), *b = kvf_tensor_row(x, t, n);
    double ab[2], aa[2];
    r->job->env->rows.pair[x->type](a, b, x->dim, ab);
    r->job->env->rows.pair[x->type](a, a, x->dim, aa);
    if (!isfinite(ab[0]) || !isfinite(ab[1]) || !isfinite(aa[1])) {
        w->ref->pair[x->type](a, b, x->dim, ab);
        w->ref->pair[x->type](a, a, x->dim, aa);
    }
    return kvf_cosine(ab[0], sqrt(aa[1]), sqrt(ab[1])) > (float)r->opt->drift;
}

/* The best piece that starts at `first`: its last frame; w->best is filled. A frame alone takes away nothing.
 */
static int64_t best_piece(const kvf_holitom_run *r, walk *w, int64_t first, int64_t last)
{
    int64_t n_tok = r->job->x->n_tok, end = first, n_static = n_tok;
    double best = 0;
    for (int64_t n = 0; n < n_tok; n++) w->now[n] = 1, w->best[n] = 0;
    for (int64_t t = first + 1; t <= last; t++) {
        /* Nothing longer can be better once even the full length with these tokens is not. */
        double bound = (double)(n_static * (last - first)) / (double)(last - first + 1);
        if (bound < best || n_static == 0) break;
        for (int64_t n = 0; n < n_tok; n++) {
            if (!w->now[n]) continue;
            w->now[n] = r->sim[(t - 1) * n_tok + n] > (float)r->opt->tau && stays(r, w, first, t, n);
            n_static -= !w->now[n];
        }
        double gain = (double)(n_static * (t - first)) / (double)(t - first + 1);
        if (n_static == 0 || gain < best) continue;
        best = gain;
        end = t;
        for (int64_t n = 0; n < n_tok; n++) w->best[n] = w->now[n];
    }
    return end;
}

kvf_status kvf_holitom_split(kvf_holitom_run *r, int64_t first, int64_t last, kvf_error *err)
{
    int64_t n_tok = r->job->x->n_tok;
    kvf_rows ref;
    kvf_rows_init_ref(&ref);
    walk w = { .ref = &ref };
    KVF_TRY(KVF_GET(r->job->env, &w.now, 2 * n_tok, err));
    w.best = w.now + n_tok;
    kvf_status rc = KVF_OK;
    while (first <= last && rc >= 0) {
        int64_t end = best_piece(r, &w, first, last);
        rc = kvf_holitom_add_part(r, first, end, w.best, err);
        first = end + 1;
    }
    kvf_free(r->job->env->mem, w.now);
    return rc;
}
