/* video_stream.c - see video_stream.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "video_stream.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "report.h"

/* A growing array. */
typedef struct grow {
    int32_t *v;
    int64_t n, cap; /* numbers */
} grow;

struct video_stream {
    video_stream_options o;
    kvf_merge_stream *stream; /* opened with the first frame, which tells the shape */
    kvf_merge_plan_info info; /* of all plans so far */
    FILE *spool;              /* tokens in their type, one after another; nobody else can open it */
    float *wide;              /* a frame in f32 for the layers */
    void *embd;               /* of one plan */
    void *newline;            /* in the frames' type; owned */
    size_t embd_bytes;
    int64_t dim;
    kvf_merge_type type;                            /* of the frames that are merged */
    grow meta, segment, position, planes, owner;    /* planes: t, y, x of token after token */
    int32_t next;                                   /* compact positions: of the next token */
};

static kvf_status no_memory(kvf_error *err)
{
    return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the list of tokens that are kept.");
}

/* Room for n more numbers; NULL: no memory. */
static int32_t *more(grow *g, int64_t n)
{
    if (n > INT64_MAX / 16 - g->n) return NULL;
    if (!g->v || g->n + n > g->cap) { /* n may be 0: a plan can keep nothing */
        int64_t cap = (g->n + n) + (g->n + n) / 2 + 16;
        int32_t *v = realloc(g->v, (size_t)cap * sizeof *v);
        if (!v) return NULL;
        g->v = v;
        g->cap = cap;
    }
    g->n += n;
    return g->v + g->n - n;
}

static kvf_status open_spool(video_stream *s, kvf_error *err)
{
    if (!s->o.out) return KVF_OK;
    size_t n = strlen(s->o.out) + sizeof ".XXXXXX";
    char *path = malloc(n);
    if (!path) return no_memory(err);
    snprintf(path, n, "%s.XXXXXX", s->o.out);
    int fd = mkstemp(path);
    int why = errno;
    if (fd >= 0) unlink(path); /* it goes with the program, however that ends */
    free(path);
    s->spool = fd >= 0 ? fdopen(fd, "w+b") : NULL;
    if (!s->spool && fd >= 0) close(fd);
    return s->spool ? KVF_OK
                    : report_fail(err, KVF_ERR_IO, "Cannot write beside '%s': %s.", s->o.out, strerror(why));
}

kvf_status video_stream_open(video_stream **out, const video_stream_options *o, kvf_error *err)
{
    *out = NULL;
    if (o->layers->layers && o->layers->info.backward)
        return report_fail(err, KVF_ERR_UNSUPPORTED,
                           "storm: these layers scan in both directions and need the whole video; leave out --stream.");
    video_stream *s = calloc(1, sizeof *s);
    if (!s) return no_memory(err);
    s->o = *o;
    s->info.size = sizeof s->info;
    kvf_status rc = open_spool(s, err);
    if (rc != KVF_OK) {
        video_stream_close(s);
        return rc;
    }
    *out = s;
    return KVF_OK;
}

void video_stream_close(video_stream *s)
{
    if (!s) return;
    kvf_merge_stream_close(s->stream);
    if (s->spool) fclose(s->spool);
    free(s->wide);
    free(s->embd);
    free(s->newline);
    free(s->meta.v);
    free(s->segment.v);
    free(s->position.v);
    free(s->planes.v);
    free(s->owner.v);
    free(s);
}

/* ---- The first frame ---------------------------------------------------------------------- */

static kvf_status begin(video_stream *s, video_tokens *t, kvf_error *err)
{
    kvf_merge_stream_params p;
    kvf_status rc = storm_check(s->o.layers, t, err);
    if (rc != KVF_OK) return rc;
    bool layers = s->o.layers->layers != NULL;
    s->type = layers ? KVF_MERGE_F32 : t->type;
    s->dim = t->dim;
    if (layers) {
        s->wide = malloc((size_t)(t->n_tok * t->dim) * sizeof *s->wide);
        if (!s->wide) return no_memory(err);
    }
    s->info.n_tok = t->n_tok;
    s->info.spec = kvf_merge_spec(s->o.merge);
    s->info.scores = "none";
    kvf_merge_stream_params_init(&p);
    p.type = s->type;
    p.n_tok = t->n_tok;
    p.dim = t->dim;
    p.grid_w = t->grid_w;
    p.hold = s->o.hold;
    return kvf_merge_stream_open(&s->stream, s->o.merge, &p, err);
}

/* ---- Plans -------------------------------------------------------------------------------- */

static kvf_status add_positions(video_stream *s, const kvf_merge_plan *plan, const kvf_merge_plan_info *info,
                                kvf_error *err)
{
    int32_t *planes = malloc((size_t)info->n_out * 3 * sizeof *planes), *one = more(&s->position, info->n_out);
    int32_t *three = more(&s->planes, 3 * info->n_out);
    kvf_status rc = planes && one && three ? KVF_OK : no_memory(err);
    kvf_merge_positions q;
    kvf_merge_positions_init(&q);
    q.mode = s->o.keep ? KVF_MERGE_KEEP : KVF_MERGE_COMPACT;
    q.base = s->o.keep ? 0 : s->next;
    q.first_frame = info->first_frame;
    q.out = one;
    if (rc == KVF_OK) rc = kvf_merge_plan_positions(plan, &q, err);
    q.planes = 3;
    q.out = planes;
    if (rc == KVF_OK) rc = kvf_merge_plan_positions(plan, &q, err);
    for (int64_t i = 0; i < info->n_out && rc == KVF_OK; i++)
        for (int k = 0; k < 3; k++) three[3 * i + k] = planes[k * info->n_out + i];
    s->next += (int32_t)info->n_out;
    free(planes);
    return rc;
}

static kvf_status add_lists(video_stream *s, const kvf_merge_plan *plan, const kvf_merge_plan_info *info,
                            kvf_error *err)
{
    int32_t first = (int32_t)info->first_frame, before = (int32_t)s->info.n_segment;
    int32_t *meta = more(&s->meta, 4 * info->n_out), *segment = more(&s->segment, 6 * info->n_segment);
    if (!meta || !segment) return no_memory(err);
    for (int64_t i = 0; i < info->n_out; i++) {
        const kvf_merge_meta *m = &info->meta[i];
        memcpy(meta + 4 * i, (int32_t[4]){ m->segment + before, m->kind, m->frame + first, m->position },
               4 * sizeof *meta);
    }
    for (int64_t i = 0; i < info->n_segment; i++) {
        kvf_merge_segment g = info->segment[i];
        g.first += first;
        g.last += first;
        memcpy(segment + 6 * i, &g, sizeof g);
    }
    if (!s->o.owners) return KVF_OK;
    int64_t n = info->n_frame * info->n_tok;
    int32_t *owner = more(&s->owner, n);
    if (!owner) return no_memory(err);
    kvf_status rc = kvf_merge_plan_owners(plan, owner, err);
    for (int64_t i = 0; i < n && rc == KVF_OK; i++)
        if (owner[i] >= 0) owner[i] += (int32_t)s->info.n_out;
    return rc;
}

static void add_counts(kvf_merge_plan_info *all, const kvf_merge_plan_info *p)
{
    all->grid_w = p->grid_w;
    all->n_frame += p->n_frame;
    all->n_out += p->n_out;
    all->n_segment += p->n_segment;
    all->n_merged += p->n_merged;
    all->n_copied += p->n_copied;
    all->n_newline += p->n_newline;
    all->n_used += p->n_used;
    all->n_asked += p->n_asked;
    all->total_reduced += p->total_reduced;
    all->cpu = p->cpu;
    all->plan_ms += p->plan_ms;
    all->n_forced = p->n_forced;
    if (strcmp(p->scores, "none") != 0) all->scores = p->scores; /* strings are static */
}

static kvf_status write_tokens(video_stream *s, const kvf_merge_plan *plan, const kvf_merge_plan_info *info,
                               const kvf_merge_view *view, video_tokens *t, kvf_error *err)
{
    if (!s->spool) return KVF_OK;
    size_t bytes = (size_t)info->n_out * (size_t)s->dim * kvf_merge_type_bytes(s->o.type);
    if (bytes > s->embd_bytes) {
        free(s->embd);
        s->embd = malloc(bytes);
        s->embd_bytes = s->embd ? bytes : 0;
        if (!s->embd) return no_memory(err);
    }
    kvf_status rc = KVF_OK;
    if (info->n_newline && !s->newline) rc = video_newline(&s->newline, t, s->type, err);
    kvf_merge_apply a;
    kvf_merge_apply_init(&a);
    a.src = *view;
    a.newline = s->newline;
    a.dst = s->embd;
    a.dst_type = s->o.type;
    if (rc == KVF_OK) rc = kvf_merge_plan_apply(plan, &a, err);
    if (rc != KVF_OK || fwrite(s->embd, 1, bytes, s->spool) == bytes) return rc;
    return report_fail(err, errno == ENOSPC ? KVF_ERR_SPACE : KVF_ERR_IO, "Cannot write beside '%s': %s.", s->o.out,
                       strerror(errno));
}

/* Take what has become final. */
static kvf_status drain(video_stream *s, video_tokens *t, kvf_error *err)
{
    for (;;) {
        kvf_merge_plan *plan;
        kvf_merge_view view;
        kvf_merge_plan_info info = { .size = sizeof info };
        kvf_status rc = kvf_merge_stream_next(s->stream, &plan, &view, err);
        if (rc == KVF_DONE) return KVF_OK;
        if (rc == KVF_OK) rc = kvf_merge_plan_get_info(plan, &info, err);
        if (rc == KVF_OK && info.n_out > 0) rc = write_tokens(s, plan, &info, &view, t, err);
        if (rc == KVF_OK && info.n_out > 0) rc = add_positions(s, plan, &info, err);
        if (rc == KVF_OK) rc = add_lists(s, plan, &info, err);
        if (rc == KVF_OK) add_counts(&s->info, &info);
        kvf_merge_plan_free(plan);
        if (rc != KVF_OK) return rc;
    }
}

kvf_status video_stream_push(void *user, video_tokens *t, const void *frame, const float *scores, kvf_error *err)
{
    video_stream *s = user;
    kvf_status rc = s->stream ? KVF_OK : begin(s, t, err);
    if (rc == KVF_OK && s->wide) {
        video_tokens_widen(s->wide, frame, t->type, t->n_tok * t->dim);
        rc = kvf_mamba_run(s->o.layers->layers, s->wide, t->n_tok, err);
        frame = s->wide;
    }
    if (rc == KVF_OK) rc = kvf_merge_stream_push(s->stream, frame, scores, err);
    return rc == KVF_OK ? drain(s, t, err) : rc;
}

kvf_status video_stream_finish(video_stream *s, video_tokens *t, video_result *r, kvf_error *err)
{
    if (!s->stream) return report_fail(err, KVF_ERR_FORMAT, "There is no frame.");
    kvf_status rc = kvf_merge_stream_finish(s->stream, err);
    if (rc == KVF_OK) rc = drain(s, t, err);
    if (rc != KVF_OK) return rc;
    int64_t n = s->info.n_out;
    kvf_merge_plan_info *p = &s->info;
    p->meta = (const kvf_merge_meta *)s->meta.v;
    p->segment = (const kvf_merge_segment *)s->segment.v;
    int64_t n_left = p->n_frame * p->n_tok - p->total_reduced;
    p->retain_eff = (double)(n - p->n_newline) / (double)(n_left > 0 ? n_left : 1);
    *r = (video_result){ .info = *p, .type = s->o.type, .dim = s->dim, .keep = s->o.keep, .spool = s->spool };
    r->position = malloc((size_t)n * sizeof *r->position + 1);
    r->mrope = malloc((size_t)n * 3 * sizeof *r->mrope + 1);
    if (!r->position || !r->mrope) return no_memory(err);
    if (n) memcpy(r->position, s->position.v, (size_t)n * sizeof *r->position);
    for (int64_t i = 0; i < n; i++)
        for (int k = 0; k < 3; k++) r->mrope[k * n + i] = s->planes.v[3 * i + k];
    return KVF_OK;
}

const int32_t *video_stream_owners(const video_stream *s) { return s->owner.v; }
