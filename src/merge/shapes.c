/* shapes.c - methods that look at shapes alone: STORM's temporal pooling, spatial pooling and temporal
 * sampling, and uniform sampling as a yardstick.
 *
 * Jiang et al. 2025, STORM, arXiv:2503.04130, sec. 3.3: the mean of every k consecutive frames; the mean of p
 * x p neighbours on a frame's grid; every s-th frame. Where a side does not divide, the last group is
 * smaller: nothing is dropped without being asked for. Each output frame is a segment of its own.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "merge/method.h"

/* Output frames: groups of `step` input frames. */
static kvf_status add_segment(kvf_merge_job *job, int64_t first, int64_t step, int64_t n_kept, bool merged,
                              kvf_error *err)
{
    int64_t end = first + step < job->x->n_frame ? first + step : job->x->n_frame;
    int32_t n_in = (int32_t)((end - first) * job->x->n_tok);
    kvf_merge_segment s = { (int32_t)first,    (int32_t)(end - 1),
                            merged ? n_in : 0, merged ? (int32_t)n_kept : 0,
                            merged ? 0 : n_in, merged ? 0 : (int32_t)n_kept };
    return kvf_plan_segment(job->plan, s, err);
}

/* ---- pool_time ------------------------------------------------------------------------------- */

typedef struct pool_time {
    int64_t k;
} pool_time;

static const kvf_option pool_time_options[] = {
    KVF_OPT_I64(pool_time, k, 4, 1, 65536, "frames that are averaged"),
    { 0 },
};

static kvf_status plan_pool_time(kvf_merge_job *job, kvf_error *err)
{
    const pool_time *o = job->state;
    int64_t n_frame = job->x->n_frame, n_tok = job->x->n_tok;
    for (int64_t t = 0, s = 0; t < n_frame; t += o->k, s++) {
        int64_t len = n_frame - t < o->k ? n_frame - t : o->k;
        for (int64_t n = 0; n < n_tok; n++) {
            kvf_merge_meta meta = { (int32_t)s, len > 1 ? KVF_MERGE_MERGED : KVF_MERGE_COPIED, (int32_t)t,
                                    (int32_t)n };
            KVF_TRY(kvf_plan_token(job->plan, meta, err));
            for (int64_t u = t; u < t + len; u++)
                KVF_TRY(kvf_plan_source(job->plan, u * n_tok + n, 1 / (double)len, err));
        }
        KVF_TRY(add_segment(job, t, o->k, n_tok, true, err));
    }
    job->plan->n_asked = job->plan->n_out;
    return KVF_OK;
}

static int64_t chunk_pool_time(const void *state) { return ((const pool_time *)state)->k; }

const kvf_merge_ops kvf_merge_pool_time = {
    .name = "pool_time",
    .source = "Jiang et al. 2025, STORM, arXiv:2503.04130",
    .help = "the mean of every k frames",
    .options = pool_time_options,
    .state_size = sizeof(pool_time),
    .shapes_only = true,
    .plan = plan_pool_time,
    .chunk = chunk_pool_time,
};

/* ---- pool_space ------------------------------------------------------------------------------ */

typedef struct pool_space {
    int64_t p;
} pool_space;

static const kvf_option pool_space_options[] = {
    KVF_OPT_I64(pool_space, p, 2, 1, 1024, "side of the squares that are averaged, tokens"),
    { 0 },
};

static kvf_status pool_square(kvf_merge_job *job, int64_t t, int64_t y, int64_t x, int64_t p, kvf_error *err)
{
    int64_t n_tok = job->x->n_tok, w = job->grid_w, h = n_tok / w;
    int64_t y_end = y + p < h ? y + p : h, x_end = x + p < w ? x + p : w, n = (y_end - y) * (x_end - x);
    kvf_merge_meta meta = { (int32_t)t, n > 1 ? KVF_MERGE_MERGED : KVF_MERGE_COPIED, (int32_t)t,
                            (int32_t)(y * w + x) };
    KVF_TRY(kvf_plan_token(job->plan, meta, err));
    for (int64_t v = y; v < y_end; v++)
        for (int64_t u = x; u < x_end; u++)
            KVF_TRY(kvf_plan_source(job->plan, t * n_tok + v * w + u, 1 / (double)n, err));
    return KVF_OK;
}

static kvf_status plan_pool_space(kvf_merge_job *job, kvf_error *err)
{
    const pool_space *o = job->state;
    int64_t w = job->grid_w, h = job->x->n_tok / w, n_out = ((w + o->p - 1) / o->p) * ((h + o->p - 1) / o->p);
    for (int64_t t = 0; t < job->x->n_frame; t++) {
        for (int64_t y = 0; y < h; y += o->p)
            for (int64_t x = 0; x < w; x += o->p) KVF_TRY(pool_square(job, t, y, x, o->p, err));
        KVF_TRY(add_segment(job, t, 1, n_out, true, err));
    }
    job->plan->n_asked = job->plan->n_out;
    job->plan->grid_w = (w + o->p - 1) / o->p; /* of the output: a next stage needs it */
    return KVF_OK;
}

static int64_t chunk_one(const void *state)
{
    (void)state;
    return 1;
}

const kvf_merge_ops kvf_merge_pool_space = {
    .name = "pool_space",
    .source = "Jiang et al. 2025, STORM, arXiv:2503.04130",
    .help = "the mean of every p x p neighbours of a frame",
    .options = pool_space_options,
    .state_size = sizeof(pool_space),
    .shapes_only = true,
    .plan = plan_pool_space,
    .chunk = chunk_one,
};

/* ---- sample_time ----------------------------------------------------------------------------- */

typedef struct sample_time {
    int64_t s;
} sample_time;

static const kvf_option sample_time_options[] = {
    KVF_OPT_I64(sample_time, s, 2, 1, 65536, "keep frames 0, s, 2 s, ..."),
    { 0 },
};

static kvf_status plan_sample_time(kvf_merge_job *job, kvf_error *err)
{
    const sample_time *o = job->state;
    for (int64_t t = 0, s = 0; t < job->x->n_frame; t += o->s, s++) {
        for (int64_t n = 0; n < job->x->n_tok; n++) KVF_TRY(kvf_plan_copy(job->plan, s, t, n, err));
        KVF_TRY(add_segment(job, t, o->s, job->x->n_tok, false, err));
    }
    job->plan->n_asked = job->plan->n_out;
    return KVF_OK;
}

static int64_t chunk_sample_time(const void *state) { return ((const sample_time *)state)->s; }

const kvf_merge_ops kvf_merge_sample_time = {
    .name = "sample_time",
    .source = "Jiang et al. 2025, STORM, arXiv:2503.04130",
    .help = "every s-th frame",
    .options = sample_time_options,
    .state_size = sizeof(sample_time),
    .shapes_only = true,
    .plan = plan_sample_time,
    .chunk = chunk_sample_time,
};

/* ---- uniform --------------------------------------------------------------------------------- */

typedef struct uniform {
    double ratio;
} uniform;

static const kvf_option uniform_options[] = {
    KVF_OPT_F64(uniform, ratio, 0.1, 1e-6, 1, "share of the tokens that is kept"),
    { 0 },
};

static kvf_status plan_uniform(kvf_merge_job *job, kvf_error *err)
{
    const uniform *o = job->state;
    int64_t n_tok = job->x->n_tok, n = job->x->n_frame * n_tok, n_out = kvf_merge_count(o->ratio, n);
    for (int64_t i = 0; i < n_out; i++) {
        int64_t at = (2 * i + 1) * n / (2 * n_out); /* the middle of the i-th of n_out equal parts */
        KVF_TRY(kvf_plan_copy(job->plan, 0, at / n_tok, at % n_tok, err));
    }
    kvf_merge_segment s = { 0, (int32_t)(job->x->n_frame - 1), 0, 0, (int32_t)n, (int32_t)n_out };
    job->plan->n_asked = n_out;
    return kvf_plan_segment(job->plan, s, err);
}

const kvf_merge_ops kvf_merge_uniform = {
    .name = "uniform",
    .source = "",
    .help = "tokens at equal distances, whatever they hold",
    .options = uniform_options,
    .state_size = sizeof(uniform),
    .plan = plan_uniform,
};
