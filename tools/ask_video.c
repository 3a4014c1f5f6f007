/* ask_video.c - see ask_video.h.
 *
 * As LLaVA-OneVision reads a video (HoliTom's release, too): all frames' tokens one after another with plain
 * consecutive positions, a newline embedding behind the last, then the question.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "ask_video.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "report.h"
#include "video_output.h"

/* Rows for the session. */
typedef struct rows {
    float *v; /* [n][dim]; owned */
    int64_t n, dim;
} rows;

/* Every token, and the newline. */
static kvf_status take_all(rows *out, const video_tokens *t, kvf_error *err)
{
    int64_t n = t->n_frame * t->n_tok;
    out->dim = t->dim;
    out->n = n + (t->newline != NULL);
    if (t->type != KVF_MERGE_F32)
        return report_fail(err, KVF_ERR_INTERNAL, "The tower's tokens are not f32.");
    out->v = malloc((size_t)(out->n * t->dim) * sizeof *out->v);
    if (!out->v) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the video's tokens.");
    memcpy(out->v, t->data, (size_t)(n * t->dim) * sizeof *out->v);
    if (t->newline) memcpy(out->v + n * t->dim, t->newline, (size_t)t->dim * sizeof *out->v);
    return KVF_OK;
}

static kvf_status take_merged(rows *out, const video_tokens *t, const kvf_merge *m, kvf_error *err)
{
    kvf_merge_plan *plan = NULL;
    video_result r;
    memset(&r, 0, sizeof r);
    kvf_merge_input in;
    kvf_merge_input_init(&in);
    in.features = video_tokens_view(t);
    in.scores = t->scores;
    in.grid_w = t->grid_w;
    kvf_status rc = kvf_merge_plan_make(&plan, m, &in, err);
    if (rc == KVF_OK) rc = video_result_make(&r, plan, t, KVF_MERGE_F32, false, err);
    if (rc == KVF_OK) {
        out->v = r.embd;
        out->n = r.info.n_out;
        out->dim = r.dim;
        r.embd = NULL;
    }
    video_result_free(&r);
    kvf_merge_plan_free(plan);
    return rc;
}

static kvf_status read_rows(rows *out, const engine *e, const ask_video_options *o, kvf_error *err)
{
    bool all = strcmp(o->merge, "none") == 0;
    kvf_merge *m = NULL;
    video_tokens t;
    memset(&t, 0, sizeof t);
    video_source_options s = { .clip = o->clip, .mmproj = o->mmproj, .pool = "auto", .frames = o->frames,
                               .width = e->info.n_embd, .quiet = o->quiet };
    kvf_status rc = all ? KVF_OK : kvf_merge_open(&m, e->ctx, o->merge, err); /* before a minute goes into encoding */
    if (rc == KVF_OK) rc = video_source_read(&t, e->ctx, &s, err);
    if (rc == KVF_OK) video_tokens_note(&t, 0);
    if (rc == KVF_OK) rc = all ? take_all(out, &t, err) : take_merged(out, &t, m, err);
    if (rc == KVF_OK && !o->quiet) {
        char in[32], n[32];
        report_note("%s: %" PRId64 " frames, %s tokens, %s of them read (%s)", o->clip, t.n_frame,
                    report_count(in, t.n_frame * t.n_tok), report_count(n, out->n), o->merge);
    }
    video_tokens_free(&t);
    kvf_merge_close(m);
    return rc;
}

/* head, then a place for each row. */
static kvf_status make_prefix(token_list *prefix, const prompt_parts *p, int64_t n, kvf_error *err)
{
    prefix->n = p->head.n + n;
    prefix->v = malloc((size_t)prefix->n * sizeof *prefix->v);
    if (!prefix->v) return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the prompt.");
    if (p->head.n) memcpy(prefix->v, p->head.v, (size_t)p->head.n * sizeof *prefix->v);
    for (int64_t i = p->head.n; i < prefix->n; i++) prefix->v[i] = KVF_TOKEN_EMBEDDING;
    return KVF_OK;
}

kvf_status ask_video_open(token_list *prefix, prompt_parts *parts, engine *e, const engine_options *eo,
                          const sampling_options *so, const ask_video_options *o, kvf_error *err)
{
    rows r = { 0 };
    const char *system = o->system ? o->system : "You are a helpful assistant.";
    kvf_status rc = read_rows(&r, e, o, err);
    if (rc == KVF_OK) rc = prompt_parts_open(parts, e, o->tmpl, system, err);
    if (rc == KVF_OK) rc = make_prefix(prefix, parts, r.n, err);
    if (rc == KVF_OK) rc = engine_open_session(e, eo, so, err);
    if (rc == KVF_OK) rc = kvf_session_set_embeddings(e->session, r.v, r.n, r.dim, err);
    free(r.v);
    return rc;
}
