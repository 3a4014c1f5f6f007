/* registry.c - the methods there are, opening one by its spec, and making a plan with it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "merge/method.h"

extern const kvf_merge_ops kvf_merge_holitom, kvf_merge_fastvid, kvf_merge_visionzip, kvf_merge_evs,
    kvf_merge_uniform, kvf_merge_pool_time, kvf_merge_pool_space, kvf_merge_sample_time;

static const kvf_merge_ops *const registry[] = { &kvf_merge_holitom,    &kvf_merge_fastvid,
                                                 &kvf_merge_visionzip,  &kvf_merge_evs,
                                                 &kvf_merge_uniform,    &kvf_merge_pool_time,
                                                 &kvf_merge_pool_space, &kvf_merge_sample_time };

enum { N_METHOD = sizeof registry / sizeof *registry, SPEC_BYTES = 1024 };

/* ---- Listing --------------------------------------------------------------------------------- */

kvf_status kvf_merge_method(int64_t i, kvf_merge_method_info *info)
{
    if (!info || info->size != sizeof *info) return KVF_ERR_ARG;
    if (i < 0 || i >= N_METHOD) return KVF_ERR_NOT_FOUND;
    const kvf_merge_ops *ops = registry[i];
    *info = (kvf_merge_method_info){ .size = sizeof *info,
                                     .name = ops->name,
                                     .source = ops->source,
                                     .help = ops->help,
                                     .streams = ops->online || ops->chunk };
    return KVF_OK;
}

kvf_status kvf_merge_option(int64_t i, int64_t j, kvf_merge_option_info *info)
{
    if (!info || info->size != sizeof *info) return KVF_ERR_ARG;
    if (i < 0 || i >= N_METHOD || j < 0) return KVF_ERR_NOT_FOUND;
    const kvf_option *o = registry[i]->options;
    for (; o->name && j > 0; j--) o++;
    if (!o->name) return KVF_ERR_NOT_FOUND;
    *info = (kvf_merge_option_info){ .size = sizeof *info,
                                     .name = o->name,
                                     .help = o->help,
                                     .words = o->words,
                                     .def = o->def,
                                     .min = o->min,
                                     .max = o->max,
                                     .is_integer = o->type == KVF_OPTION_I64 };
    return KVF_OK;
}

/* ---- Opening --------------------------------------------------------------------------------- */

static kvf_status fail_unknown(const char *name, size_t n, kvf_error *err)
{
    char list[200] = "";
    size_t at = 0;
    for (int i = 0; i < N_METHOD; i++) {
        int w = snprintf(list + at, sizeof list - at, "%s%s", i ? ", " : "", registry[i]->name);
        if (w < 0 || (size_t)w >= sizeof list - at) break;
        at += (size_t)w;
    }
    return kvf_fail(err, KVF_ERR_NOT_FOUND, "no merging method is called '%.*s'; there are: %s",
                    n > 64 ? 64 : (int)n, name, list);
}

static kvf_status add_stage(kvf_merge *m, const char *text, size_t n, kvf_error *err)
{
    const char *colon = memchr(text, ':', n);
    size_t n_name = colon ? (size_t)(colon - text) : n;
    const kvf_merge_ops *ops = NULL;
    for (int i = 0; i < N_METHOD; i++)
        if (strlen(registry[i]->name) == n_name && memcmp(registry[i]->name, text, n_name) == 0)
            ops = registry[i];
    if (!ops) return fail_unknown(text, n_name, err);
    if (m->n_stage == KVF_MERGE_MAX_STAGE)
        return kvf_fail(err, KVF_ERR_ARG, "a chain has at most %d methods", (int)KVF_MERGE_MAX_STAGE);
    if (m->n_stage > 0 && !m->ops[m->n_stage - 1]->shapes_only)
        return kvf_fail(err, KVF_ERR_ARG,
                        "%s cannot stand in front of %s; only pool_time, pool_space and sample_time can",
                        m->ops[m->n_stage - 1]->name, ops->name);
    void **state = &m->state[m->n_stage];
    KVF_TRY(kvf_mem_get(m->env.mem, state, 1, ops->state_size, err));
    m->ops[m->n_stage++] = ops;
    kvf_options_default(ops->options, *state);
    size_t skip = n_name + (colon != NULL);
    KVF_TRY(kvf_options_parse(ops->options, *state, text + skip, n - skip, ops->name, err));
    return ops->check ? ops->check(*state, err) : KVF_OK;
}

/* Every option spelled out; the parser reads it back to the same. */
static kvf_status print_spec(kvf_merge *m, kvf_error *err)
{
    KVF_TRY(KVF_GET(&m->env, &m->spec, SPEC_BYTES, err));
    size_t at = 0;
    for (int64_t i = 0; i < m->n_stage && at < SPEC_BYTES; i++) {
        int w = snprintf(m->spec + at, SPEC_BYTES - at, "%s%s:", i ? "+" : "", m->ops[i]->name);
        at += w > 0 ? (size_t)w : 0;
        if (at < SPEC_BYTES)
            kvf_options_print(m->ops[i]->options, m->state[i], m->spec + at, SPEC_BYTES - at);
        at = strlen(m->spec);
    }
    return KVF_OK;
}

/* A '+' that starts a number belongs to an option; methods begin with a letter. */
static size_t stage_length(const char *spec)
{
    size_t n = 0;
    while (spec[n] && !(spec[n] == '+' && spec[n + 1] >= 'a' && spec[n + 1] <= 'z')) n++;
    return n;
}

static kvf_status open_stages(kvf_merge *m, const char *spec, kvf_error *err)
{
    for (;;) {
        size_t n = stage_length(spec);
        KVF_TRY(add_stage(m, spec, n, err));
        if (!spec[n]) return print_spec(m, err);
        spec += n + 1;
    }
}

kvf_status kvf_merge_open_env(kvf_merge **out, const kvf_merge_env *env, const char *spec, kvf_error *err)
{
    kvf_merge *m;
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!spec)
        return kvf_fail(err, KVF_ERR_ARG, "spec is NULL; give a method, for example \"holitom:ratio=0.1\"");
    KVF_TRY(KVF_GET(env, &m, 1, err));
    m->env = *env;
    kvf_status rc = open_stages(m, spec, err);
    if (rc < 0) {
        kvf_merge_close(m);
        return rc;
    }
    *out = m;
    return KVF_OK;
}

void kvf_merge_close(kvf_merge *m)
{
    if (!m) return;
    const kvf_mem *mem = m->env.mem;
    for (int64_t i = 0; i < KVF_MERGE_MAX_STAGE; i++) kvf_free(mem, m->state[i]);
    kvf_free(mem, m->spec);
    kvf_free(mem, m);
}

const char *kvf_merge_spec(const kvf_merge *m) { return m->spec; }

/* ---- Planning -------------------------------------------------------------------------------- */

void kvf_merge_input_init(kvf_merge_input *in)
{
    memset(in, 0, sizeof *in);
    in->size = sizeof *in;
}

kvf_status kvf_merge_grid(int64_t *out, int64_t grid_w, int64_t n_tok, kvf_error *err)
{
    int64_t root = (int64_t)(sqrt((double)n_tok) + 0.5);
    *out = grid_w > 0 ? grid_w : root * root == n_tok ? root : n_tok;
    if (grid_w >= 0 && n_tok % *out == 0) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG,
                    "grid_w is %" PRId64 "; it must divide the %" PRId64 " tokens of a frame, or be 0",
                    grid_w, n_tok);
}

/* The inputs of stage i + 1: what the plan makes of features, scores and keys. */
typedef struct stage_data {
    float *features, *scores, *keys; /* owned */
    kvf_tensor x, k;
} stage_data;

static kvf_status applied(kvf_tensor *out, float **room, const kvf_merge_plan *p, const kvf_tensor *x,
                          kvf_error *err)
{
    size_t n;
    int64_t frames =
        p->meta[p->n_out - 1].segment + 1; /* methods of shapes make one segment per output frame */
    if (!kvf_mul_size((size_t)p->n_out, (size_t)x->dim, &n)) n = SIZE_MAX;
    KVF_TRY(kvf_mem_get(p->env.mem, (void **)room, n, sizeof **room, err));
    KVF_TRY(kvf_plan_apply_f32(p, x, *room, err));
    *out = kvf_tensor_of(*room, KVF_MERGE_F32, frames, p->n_out / frames, x->dim);
    return KVF_OK;
}

static kvf_status next_stage(const kvf_merge_job *job, stage_data *to, kvf_merge_job *next, kvf_error *err)
{
    const kvf_merge_plan *p = job->plan;
    KVF_TRY(applied(&to->x, &to->features, p, job->x, err));
    next->x = &to->x;
    if (job->keys) {
        KVF_TRY(applied(&to->k, &to->keys, p, job->keys, err));
        next->keys = &to->k;
    }
    if (job->scores) {
        kvf_tensor s = kvf_tensor_of(job->scores, KVF_MERGE_F32, p->n_frame, p->n_tok, 1), ignored;
        KVF_TRY(applied(&ignored, &to->scores, p, &s, err));
        next->scores = to->scores;
    }
    next->grid_w = p->grid_w; /* pool_space set it to the new one */
    return KVF_OK;
}

static kvf_status run_stage(const kvf_merge *m, int64_t i, kvf_merge_job *job, kvf_error *err)
{
    KVF_TRY(kvf_plan_new(&job->plan, &m->env, job->x->n_frame, job->x->n_tok, job->grid_w, err));
    job->state = m->state[i];
    KVF_TRY(m->ops[i]->plan(job, err));
    return kvf_plan_finish(job->plan, err);
}

/* Stage after stage; the plans are multiplied as they come. */
static kvf_status run_stages(const kvf_merge *m, kvf_merge_job job, kvf_merge_plan **out, kvf_error *err)
{
    stage_data data[KVF_MERGE_MAX_STAGE] = { { 0 } };
    int64_t grid_w = job.grid_w;
    kvf_status rc = KVF_OK;
    *out = NULL;
    for (int64_t i = 0; i < m->n_stage && rc >= 0; i++) {
        job.plan = NULL;
        rc = run_stage(m, i, &job, err);
        if (rc >= 0 && i + 1 < m->n_stage) {
            kvf_merge_job next = job;
            rc = next_stage(&job, &data[i], &next, err);
            next.plan = job.plan;
            job = next;
        }
        kvf_merge_plan *both = job.plan;
        if (rc >= 0 && *out) {
            rc = kvf_plan_chain(&both, *out, job.plan, err);
            kvf_merge_plan_free(job.plan);
        } else if (rc < 0) {
            kvf_merge_plan_free(job.plan);
        }
        if (*out) kvf_merge_plan_free(*out);
        *out = rc >= 0 ? both : NULL;
    }
    for (int64_t i = 0; i < KVF_MERGE_MAX_STAGE; i++) {
        kvf_free(m->env.mem, data[i].features);
        kvf_free(m->env.mem, data[i].scores);
        kvf_free(m->env.mem, data[i].keys);
    }
    if (*out) (*out)->grid_w = grid_w;
    return rc;
}

static kvf_status name_plan(kvf_merge_plan *p, const char *spec, kvf_error *err)
{
    size_t n = strlen(spec) + 1;
    KVF_TRY(kvf_mem_get(p->env.mem, (void **)&p->spec, n, 1, err));
    memcpy(p->spec, spec, n);
    return KVF_OK;
}

static kvf_status check_input(const kvf_merge_input *in, kvf_tensor *x, kvf_tensor *keys, kvf_merge_job *job,
                              kvf_error *err)
{
    KVF_TRY(kvf_merge_check_size(in->size, sizeof *in, "kvf_merge_input", err));
    KVF_TRY(kvf_tensor_init(x, &in->features, "features", err));
    KVF_TRY(kvf_merge_grid(&job->grid_w, in->grid_w, x->n_tok, err));
    if (in->scores) KVF_TRY(kvf_scores_finite(in->scores, x->n_frame * x->n_tok, x->n_tok, err));
    if (in->n_noise < 0 || (in->n_noise > 0 && !in->noise))
        return kvf_fail(err, KVF_ERR_ARG, "n_noise is %" PRId64 " and noise is %s", in->n_noise,
                        in->noise ? "given" : "NULL");
    job->x = x;
    job->scores = in->scores;
    job->noise = in->noise;
    job->n_noise = in->n_noise;
    if (!in->keys.data) return KVF_OK;
    KVF_TRY(kvf_tensor_init(keys, &in->keys, "keys", err));
    if (keys->n_frame != x->n_frame || keys->n_tok != x->n_tok)
        return kvf_fail(err, KVF_ERR_ARG,
                        "keys have %" PRId64 " frames of %" PRId64 " tokens, features %" PRId64
                        " of %" PRId64,
                        keys->n_frame, keys->n_tok, x->n_frame, x->n_tok);
    job->keys = keys;
    return KVF_OK;
}

kvf_status kvf_merge_plan_make(kvf_merge_plan **out, const kvf_merge *m, const kvf_merge_input *in,
                               kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!m || !in) return kvf_fail(err, KVF_ERR_ARG, "the method or its input is NULL");
    double start = kvf_merge_now_ms();
    kvf_tensor x, keys;
    kvf_merge_job job = { .env = &m->env };
    KVF_TRY(check_input(in, &x, &keys, &job, err));
    KVF_TRY(run_stages(m, job, out, err));
    kvf_status rc = name_plan(*out, m->spec, err);
    (*out)->plan_ms = kvf_merge_now_ms() - start;
    if (rc >= 0) return KVF_OK;
    kvf_merge_plan_free(*out);
    *out = NULL;
    return rc;
}
