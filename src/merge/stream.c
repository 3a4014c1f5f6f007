/* stream.c - frames one by one, plans as soon as they are final.
 *
 * Frames lie one after another in a buffer that grows up to twice `hold`; what is handed out leaves at the
 * front, and the rest moves there once per `hold` frames. Waiting frames (committed, not yet taken) come
 * first, then the open ones, which the segmenter numbers from 0. Methods of a fixed number of frames
 * (pooling, sampling) use the same buffer and commit by counting.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "merge/holitom.h"
#include "merge/segment.h"
#include "merge/similarity.h"

struct kvf_merge_stream {
    kvf_merge_env env;
    const kvf_merge *m;
    kvf_merge_stream_params p;
    int64_t frame_bytes;
    bool online;
    int64_t chunk; /* frames per plan of a method without segments */
    char *frame;   /* [cap][n_tok][dim] */
    float *sim;    /* [cap][n_tok] of a frame and the one before; of the first frame of all unused */
    float *score;  /* [cap][n_tok] */
    double *norm;  /* [2][n_tok] of the last frame and the one that comes */
    int64_t frame_cap, sim_cap, score_cap;
    int64_t head, n_waiting, n_open; /* frames: of the first in the buffer, committed, open */
    int64_t n_out_now;               /* frames handed out with the last plan: they leave with the next call */
    int64_t *piece;                  /* [piece_cap] lengths of committed pieces, oldest first */
    int64_t n_piece, piece_cap;
    int32_t *trace; /* [2 (hold + 1)] */
    kvf_segmenter seg;
    int64_t n_seen, n_given; /* frames and tokens of plans made: the budget counts on */
    int64_t n_forced;
    int with_scores; /* -1: no frame yet */
    bool finished;
};

void kvf_merge_stream_params_init(kvf_merge_stream_params *p)
{
    memset(p, 0, sizeof *p);
    p->size = sizeof *p;
    p->hold = 64;
}

/* ---- Opening --------------------------------------------------------------------------------- */

/* Frames that the whole chain plans at a time; 0: it needs the video. */
static int64_t chunk_of(const kvf_merge *m, int64_t hold)
{
    int64_t all = 1;
    for (int64_t i = 0; i < m->n_stage; i++) {
        int64_t n = m->ops[i]->chunk ? m->ops[i]->chunk(m->state[i]) : 0;
        if (n < 1 || n > hold / all) return n < 1 ? 0 : -1;
        all *= n;
    }
    return all;
}

static kvf_status open_parts(kvf_merge_stream *s, kvf_error *err)
{
    const kvf_merge *m = s->m;
    s->online = m->n_stage == 1 && m->ops[0]->online;
    s->chunk = s->online ? 0 : chunk_of(m, s->p.hold);
    if (s->chunk == -1)
        return kvf_fail(err, KVF_ERR_ARG,
                        "%s takes more frames at a time than hold (%" PRId64 "); raise hold", m->spec,
                        s->p.hold);
    if (!s->online && s->chunk == 0)
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "%s decides over the whole video and cannot stream; use kvf_merge_plan_make",
                        m->spec);
    KVF_TRY(KVF_GET(&s->env, &s->norm, 2 * s->p.n_tok, err));
    KVF_TRY(KVF_GET(&s->env, &s->trace, 2 * (s->p.hold + 1), err));
    if (!s->online) return KVF_OK;
    const kvf_holitom *h = m->state[0];
    return kvf_segmenter_init(&s->seg, s->env.mem, s->p.n_tok, h->window, h->tau, err);
}

static kvf_status check_params(const kvf_merge_stream_params *p, int64_t *grid_w, kvf_error *err)
{
    static const uint64_t nothing = 0;
    kvf_tensor x;
    KVF_TRY(kvf_merge_check_size(p->size, sizeof *p, "kvf_merge_stream_params", err));
    if (p->hold < 2 || p->hold > 65536)
        return kvf_fail(err, KVF_ERR_ARG, "hold is %" PRId64 "; use 2 to 65536 frames", p->hold);
    kvf_merge_view v = {
        .data = &nothing, .type = p->type, .n_frame = 2 * p->hold, .n_tok = p->n_tok, .dim = p->dim
    };
    KVF_TRY(kvf_tensor_init(&x, &v, "the stream", err));
    return kvf_merge_grid(grid_w, p->grid_w, p->n_tok, err);
}

kvf_status kvf_merge_stream_open(kvf_merge_stream **out, const kvf_merge *m, const kvf_merge_stream_params *p,
                                 kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!m || !p) return kvf_fail(err, KVF_ERR_ARG, "the method or the parameters are NULL");
    int64_t grid_w;
    KVF_TRY(check_params(p, &grid_w, err));
    kvf_merge_stream *s;
    KVF_TRY(KVF_GET(&m->env, &s, 1, err));
    s->env = m->env;
    s->m = m;
    s->p = *p;
    s->p.grid_w = grid_w;
    s->frame_bytes = p->n_tok * p->dim * (int64_t)kvf_merge_type_bytes(p->type);
    s->with_scores = -1;
    kvf_status rc = open_parts(s, err);
    if (rc < 0) {
        kvf_merge_stream_close(s);
        return rc;
    }
    *out = s;
    return KVF_OK;
}

void kvf_merge_stream_close(kvf_merge_stream *s)
{
    if (!s) return;
    const kvf_mem *mem = s->env.mem;
    kvf_segmenter_fini(&s->seg);
    kvf_free(mem, s->frame);
    kvf_free(mem, s->sim);
    kvf_free(mem, s->score);
    kvf_free(mem, s->norm);
    kvf_free(mem, s->piece);
    kvf_free(mem, s->trace);
    kvf_free(mem, s);
}

/* ---- The buffer ------------------------------------------------------------------------------ */

/* Let go of what the last call of _next handed out. */
static void release_taken(kvf_merge_stream *s)
{
    s->head += s->n_out_now;
    s->n_waiting -= s->n_out_now;
    s->n_out_now = 0;
}

/* Room for one frame at the end: move everything to the front, or grow. */
static kvf_status make_room(kvf_merge_stream *s, kvf_error *err)
{
    const kvf_mem *mem = s->env.mem;
    int64_t n = s->n_waiting + s->n_open, n_tok = s->p.n_tok, most = 2 * s->p.hold;
    if (n >= most)
        return kvf_fail(err, KVF_ERR_STATE,
                        "%" PRId64 " frames wait; take their plans with kvf_merge_stream_next first",
                        s->n_waiting);
    if (s->head > 0 && s->head + n >= (s->frame_cap < most ? s->frame_cap : most)) {
        memmove(s->frame, s->frame + s->head * s->frame_bytes, (size_t)(n * s->frame_bytes));
        memmove(s->sim, s->sim + s->head * n_tok, (size_t)(n * n_tok) * sizeof *s->sim);
        if (s->with_scores == 1)
            memmove(s->score, s->score + s->head * n_tok, (size_t)(n * n_tok) * sizeof *s->score);
        s->head = 0;
    }
    int64_t want = s->head + n + 1, cap = s->frame_cap;
    if (want > cap) { /* frames grow by half, never past twice hold: kvf_reserve rounds small counts up */
        int64_t grown = cap + cap / 2 > want ? cap + cap / 2 : want < 4 ? 4 : want;
        void *fresh;
        if (grown > most) grown = most;
        KVF_TRY(kvf_mem_get(mem, &fresh, (size_t)grown, (size_t)s->frame_bytes, err));
        if (s->frame) memcpy(fresh, s->frame, (size_t)((s->head + n) * s->frame_bytes));
        kvf_free(mem, s->frame);
        s->frame = fresh;
        s->frame_cap = grown;
    }
    KVF_TRY(kvf_reserve(mem, (void **)&s->sim, &s->sim_cap, want * n_tok, sizeof *s->sim, err));
    if (s->with_scores == 1)
        KVF_TRY(kvf_reserve(mem, (void **)&s->score, &s->score_cap, want * n_tok, sizeof *s->score, err));
    return kvf_reserve(mem, (void **)&s->piece, &s->piece_cap, most + 1, sizeof *s->piece, err);
}

static void commit(kvf_merge_stream *s, int64_t len)
{
    s->piece[s->n_piece++] = len;
    s->n_waiting += len;
    s->n_open -= len;
}

/* Commit the segments of open frames 0..last. */
static void commit_upto(kvf_merge_stream *s, int64_t last)
{
    int64_t n = kvf_segmenter_trace(&s->seg, last, s->trace);
    for (int64_t i = 0; i < n; i++) commit(s, s->trace[2 * i + 1] - s->trace[2 * i] + 1);
}

static const float *sim_of_open(const kvf_merge_stream *s, int64_t i)
{
    return s->sim + (s->head + s->n_waiting + i) * s->p.n_tok;
}

/* As many frames are open as may be: take the first segment of the best partition so far, and number the rest
 * anew. */
static kvf_status force(kvf_merge_stream *s, kvf_error *err)
{
    int64_t n = s->n_open;
    kvf_segmenter_trace(&s->seg, n - 1, s->trace);
    commit(s, s->trace[1] + 1);
    s->n_forced++;
    kvf_segmenter_reset(&s->seg);
    for (int64_t i = 0; i < s->n_open; i++)
        KVF_TRY(kvf_segmenter_add(&s->seg, sim_of_open(s, i), err)); /* no memory: it has been larger */
    return KVF_OK;
}

/* ---- Frames in ------------------------------------------------------------------------------- */

static kvf_status check_frame(kvf_merge_stream *s, const void *frame, const float *scores, kvf_error *err)
{
    if (!frame) return kvf_fail(err, KVF_ERR_ARG, "frame is NULL");
    if ((uintptr_t)frame % kvf_merge_type_bytes(s->p.type))
        return kvf_fail(err, KVF_ERR_ARG, "frame is not aligned to its elements");
    if (s->finished) return kvf_fail(err, KVF_ERR_STATE, "the stream is finished; open another one");
    if (s->with_scores >= 0 && s->with_scores != (scores != NULL))
        return kvf_fail(err, KVF_ERR_ARG, "the frames before came %s scores; keep to that",
                        s->with_scores ? "with" : "without");
    return scores ? kvf_scores_finite(scores, s->p.n_tok, s->p.n_tok, err) : KVF_OK;
}

/* The new frame's similarity to the one before. The last frame is always in the buffer: it is open. */
static kvf_status measure(kvf_merge_stream *s, int64_t at, kvf_error *err)
{
    int64_t n_tok = s->p.n_tok;
    bool first = s->n_open == 0;
    kvf_tensor x = kvf_tensor_of(s->frame + (first ? at : at - 1) * s->frame_bytes, s->p.type, first ? 1 : 2,
                                 n_tok, s->p.dim);
    KVF_TRY(
        kvf_similarity_frame(&s->env, &x, s->sim + at * n_tok, s->norm + n_tok, first ? NULL : s->norm, err));
    return KVF_OK;
}

/* The frame is in the buffer at `at`, not counted yet. */
static kvf_status add_online(kvf_merge_stream *s, int64_t at, kvf_error *err)
{
    int64_t n_tok = s->p.n_tok;
    KVF_TRY(measure(s, at, err));
    if (s->n_open == s->p.hold) KVF_TRY(force(s, err));
    KVF_TRY(kvf_segmenter_add(&s->seg, s->sim + at * n_tok, err));
    memcpy(s->norm, s->norm + n_tok, (size_t)n_tok * sizeof *s->norm);
    s->n_open++;
    int64_t end = kvf_segmenter_settled(&s->seg);
    if (end < 0) return KVF_OK;
    commit_upto(s, end);
    kvf_segmenter_commit(&s->seg, end);
    return KVF_OK;
}

kvf_status kvf_merge_stream_push(kvf_merge_stream *s, const void *frame, const float *scores, kvf_error *err)
{
    if (!s) return kvf_fail(err, KVF_ERR_ARG, "the stream is NULL");
    KVF_TRY(check_frame(s, frame, scores, err));
    release_taken(s);
    int before = s->with_scores;
    s->with_scores = scores != NULL;
    kvf_status rc = make_room(s, err);
    if (rc < 0) {
        s->with_scores = before;
        return rc;
    }
    int64_t at = s->head + s->n_waiting + s->n_open, n_tok = s->p.n_tok;
    memcpy(s->frame + at * s->frame_bytes, frame, (size_t)s->frame_bytes);
    if (scores) memcpy(s->score + at * n_tok, scores, (size_t)n_tok * sizeof *scores);
    if (s->online) {
        rc = add_online(s, at, err);
        if (rc < 0) s->with_scores = before;
        return rc;
    }
    s->n_open++;
    if (s->n_open > s->chunk) commit(s, s->chunk);
    return KVF_OK;
}

kvf_status kvf_merge_stream_finish(kvf_merge_stream *s, kvf_error *err)
{
    if (!s) return kvf_fail(err, KVF_ERR_ARG, "the stream is NULL");
    if (s->finished) return KVF_OK;
    s->finished = true;
    release_taken(s);
    if (s->n_open == 0) return KVF_OK;
    if (s->online)
        commit_upto(s, s->n_open - 1);
    else
        commit(s, s->n_open);
    return KVF_OK;
}

/* ---- Plans out ------------------------------------------------------------------------------- */

static kvf_status plan_piece(kvf_merge_stream *s, const kvf_tensor *x, const float *sim, bool last,
                             kvf_merge_plan *p, kvf_error *err)
{
    kvf_merge_job job = { .env = &s->env,
                          .x = x,
                          .grid_w = s->p.grid_w,
                          .state = s->m->state[0],
                          .plan = p,
                          .scores = s->with_scores == 1 ? s->score + s->head * s->p.n_tok : NULL };
    kvf_holitom_run r = { 0 };
    kvf_status rc = kvf_holitom_init(&r, &job, sim, err);
    r.n_seen = s->n_seen;
    r.n_given = s->n_given;
    if (rc >= 0) rc = kvf_holitom_take(&r, 0, x->n_frame - 1, err);
    if (rc >= 0) rc = kvf_holitom_share(&r, 0, last, err);
    if (rc >= 0) rc = kvf_holitom_emit(&r, 0, err);
    if (rc >= 0 && last) rc = kvf_holitom_close(&r, err);
    p->n_asked = r.n_given - s->n_given;
    p->total_reduced = r.reduced;
    p->retain_eff = r.retain;
    kvf_holitom_fini(&r);
    return rc >= 0 ? kvf_plan_finish(p, err) : rc;
}

static kvf_status make_plan(kvf_merge_stream *s, kvf_merge_view *view, kvf_merge_plan **out, kvf_error *err)
{
    double start = kvf_merge_now_ms();
    kvf_tensor x = kvf_tensor_of(view->data, view->type, view->n_frame, view->n_tok, view->dim);
    if (!s->online) {
        kvf_merge_input in;
        kvf_merge_input_init(&in);
        in.features = *view;
        in.grid_w = s->p.grid_w;
        in.scores = s->with_scores == 1 ? s->score + s->head * s->p.n_tok : NULL;
        return kvf_merge_plan_make(out, s->m, &in, err);
    }
    KVF_TRY(kvf_plan_new(out, &s->env, x.n_frame, x.n_tok, s->p.grid_w, err));
    bool last = s->finished && s->n_piece == 1;
    size_t n = strlen(s->m->spec) + 1;
    kvf_status rc = plan_piece(s, &x, s->sim + (s->head + 1) * s->p.n_tok, last, *out, err);
    if (rc >= 0) rc = kvf_mem_get(s->env.mem, (void **)&(*out)->spec, n, 1, err);
    if (rc < 0) {
        kvf_merge_plan_free(*out);
        *out = NULL;
        return rc;
    }
    memcpy((*out)->spec, s->m->spec, n);
    (*out)->plan_ms = kvf_merge_now_ms() - start;
    return KVF_OK;
}

kvf_status kvf_merge_stream_next(kvf_merge_stream *s, kvf_merge_plan **out, kvf_merge_view *view,
                                 kvf_error *err)
{
    if (!s || !out || !view) return kvf_fail(err, KVF_ERR_ARG, "the stream, out or view is NULL");
    *out = NULL;
    release_taken(s);
    if (s->n_piece == 0) return KVF_DONE;
    int64_t len = s->piece[0];
    *view = (kvf_merge_view){ .data = s->frame + s->head * s->frame_bytes,
                              .type = s->p.type,
                              .n_frame = len,
                              .n_tok = s->p.n_tok,
                              .dim = s->p.dim };
    KVF_TRY(make_plan(s, view, out, err));
    (*out)->first_frame = s->n_seen;
    (*out)->n_forced = s->n_forced;
    s->n_seen += len;
    s->n_given += (*out)->n_asked;
    s->n_out_now = len;
    s->n_piece--;
    memmove(s->piece, s->piece + 1, (size_t)s->n_piece * sizeof *s->piece);
    return KVF_OK;
}
