/* plan.c - see plan.h; and the functions of merge.h that read a plan.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#define _POSIX_C_SOURCE 200809L
#include "merge/plan.h"

#include <string.h>
#include <time.h>

double kvf_merge_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

kvf_status kvf_plan_new(kvf_merge_plan **out, const kvf_merge_env *env, int64_t n_frame, int64_t n_tok,
                        int64_t grid_w, kvf_error *err)
{
    kvf_merge_plan *p;
    *out = NULL;
    KVF_TRY(KVF_GET(env, &p, 1, err));
    p->env = *env;
    p->n_frame = n_frame;
    p->n_tok = n_tok;
    p->grid_w = grid_w;
    p->scores = "none";
    kvf_status rc = kvf_reserve(env->mem, (void **)&p->row, &p->row_cap, 1, sizeof *p->row, err);
    if (rc < 0) {
        kvf_merge_plan_free(p);
        return rc;
    }
    *out = p;
    return KVF_OK;
}

void kvf_merge_plan_free(kvf_merge_plan *p)
{
    if (!p) return;
    const kvf_mem *mem = p->env.mem;
    kvf_free(mem, p->row);
    kvf_free(mem, p->source);
    kvf_free(mem, p->weight);
    kvf_free(mem, p->meta);
    kvf_free(mem, p->segment);
    kvf_free(mem, p->spec);
    kvf_free(mem, p);
}

#define GROW(p, array, cap, n, err)                                                                          \
    kvf_reserve((p)->env.mem, (void **)&(p)->array, &(p)->cap, n, sizeof *(p)->array, err)

kvf_status kvf_plan_token(kvf_merge_plan *p, kvf_merge_meta meta, kvf_error *err)
{
    if (p->n_out >= INT32_MAX - 1)
        return kvf_fail(err, KVF_ERR_LIMIT, "more than 2^31 output tokens; lower the ratio");
    KVF_TRY(GROW(p, meta, meta_cap, p->n_out + 1, err));
    KVF_TRY(GROW(p, row, row_cap, p->n_out + 2, err));
    p->meta[p->n_out++] = meta;
    p->row[p->n_out] = p->n_source;
    return KVF_OK;
}

kvf_status kvf_plan_source(kvf_merge_plan *p, int64_t source, double weight, kvf_error *err)
{
    KVF_TRY(GROW(p, source, source_cap, p->n_source + 1, err));
    KVF_TRY(GROW(p, weight, weight_cap, p->n_source + 1, err));
    p->source[p->n_source] = (int32_t)source;
    p->weight[p->n_source++] = (float)weight;
    p->row[p->n_out] = p->n_source;
    return KVF_OK;
}

kvf_status kvf_plan_copy(kvf_merge_plan *p, int64_t segment, int64_t frame, int64_t tok, kvf_error *err)
{
    kvf_merge_meta meta = { (int32_t)segment, KVF_MERGE_COPIED, (int32_t)frame, (int32_t)tok };
    KVF_TRY(kvf_plan_token(p, meta, err));
    return kvf_plan_source(p, frame * p->n_tok + tok, 1, err);
}

kvf_status kvf_plan_segment(kvf_merge_plan *p, kvf_merge_segment segment, kvf_error *err)
{
    KVF_TRY(GROW(p, segment, segment_cap, p->n_segment + 1, err));
    p->segment[p->n_segment++] = segment;
    return KVF_OK;
}

kvf_status kvf_plan_finish(kvf_merge_plan *p, kvf_error *err)
{
    uint8_t *used;
    int64_t n = p->n_frame * p->n_tok;
    KVF_TRY(KVF_GET(&p->env, &used, n, err));
    for (int64_t k = 0; k < p->n_source; k++) {
        p->n_used += !used[p->source[k]];
        used[p->source[k]] = 1;
    }
    for (int64_t i = 0; i < p->n_out; i++) p->n_kind[p->meta[i].kind]++;
    kvf_free(p->env.mem, used);
    return KVF_OK;
}

/* ---- Chains ---------------------------------------------------------------------------------- */

/* Weights of one output token over the inputs, gathered in [n] doubles that are zero before and after. */
static kvf_status chain_token(kvf_merge_plan *p, const kvf_merge_plan *a, const kvf_merge_plan *b, int64_t i,
                              double *sum, kvf_error *err)
{
    int64_t lo = INT64_MAX, hi = -1;
    for (int64_t k = b->row[i]; k < b->row[i + 1]; k++)
        for (int64_t j = a->row[b->source[k]]; j < a->row[b->source[k] + 1]; j++) {
            int64_t at = a->source[j];
            sum[at] += (double)b->weight[k] * (double)a->weight[j];
            lo = at < lo ? at : lo;
            hi = at > hi ? at : hi;
        }
    kvf_status rc = KVF_OK;
    for (int64_t at = lo; at <= hi; at++) {
        if (sum[at] == 0) continue;
        if (rc >= 0) rc = kvf_plan_source(p, at, sum[at], err);
        sum[at] = 0;
    }
    return rc;
}

static kvf_status chain_all(kvf_merge_plan *p, const kvf_merge_plan *a, const kvf_merge_plan *b, double *sum,
                            kvf_error *err)
{
    for (int64_t i = 0; i < b->n_out; i++) {
        kvf_merge_meta meta = b->meta[i];
        const kvf_merge_meta *center =
            &a->meta[(int64_t)meta.frame * b->n_tok + (meta.position < 0 ? 0 : meta.position)];
        meta.frame = center->frame;
        if (meta.position >= 0) meta.position = center->position;
        if (meta.kind == KVF_MERGE_COPIED) meta.kind = center->kind;
        KVF_TRY(kvf_plan_token(p, meta, err));
        KVF_TRY(chain_token(p, a, b, i, sum, err));
    }
    /* Segments end before the frame in which the next one's first input frame starts. */
    for (int64_t s = 0; s < b->n_segment; s++) {
        kvf_merge_segment g = b->segment[s];
        g.first = a->meta[(int64_t)g.first * b->n_tok].frame;
        g.last = s + 1 < b->n_segment ? a->meta[(int64_t)b->segment[s + 1].first * b->n_tok].frame - 1
                                      : (int32_t)(a->n_frame - 1);
        KVF_TRY(kvf_plan_segment(p, g, err));
    }
    return kvf_plan_finish(p, err);
}

kvf_status kvf_plan_chain(kvf_merge_plan **out, const kvf_merge_plan *first, const kvf_merge_plan *second,
                          kvf_error *err)
{
    double *sum = NULL;
    KVF_TRY(kvf_plan_new(out, &first->env, first->n_frame, first->n_tok, first->grid_w, err));
    kvf_merge_plan *p = *out;
    kvf_status rc = KVF_GET(&p->env, &sum, first->n_frame * first->n_tok, err);
    if (rc >= 0) rc = chain_all(p, first, second, sum, err);
    kvf_free(first->env.mem, sum);
    p->n_asked = second->n_asked;
    p->total_reduced = second->total_reduced;
    p->retain_eff = second->retain_eff;
    p->scores = second->scores;
    p->similarity_ms = second->similarity_ms;
    if (rc >= 0) return KVF_OK;
    kvf_merge_plan_free(p);
    *out = NULL;
    return rc;
}

/* ---- Reading a plan -------------------------------------------------------------------------- */

kvf_status kvf_merge_plan_get_info(const kvf_merge_plan *p, kvf_merge_plan_info *info, kvf_error *err)
{
    if (!p || !info) return kvf_fail(err, KVF_ERR_ARG, "the plan or info is NULL");
    KVF_TRY(kvf_merge_check_size(info->size, sizeof *info, "kvf_merge_plan_info", err));
    kvf_merge_plan_info all = { .size = info->size,
                                .n_frame = p->n_frame,
                                .n_tok = p->n_tok,
                                .grid_w = p->grid_w,
                                .first_frame = p->first_frame,
                                .n_out = p->n_out,
                                .row = p->row,
                                .source = p->source,
                                .weight = p->weight,
                                .meta = p->meta,
                                .segment = p->segment,
                                .n_segment = p->n_segment,
                                .n_merged = p->n_kind[KVF_MERGE_MERGED],
                                .n_copied = p->n_kind[KVF_MERGE_COPIED],
                                .n_newline = p->n_kind[KVF_MERGE_NEWLINE],
                                .n_used = p->n_used,
                                .n_asked = p->n_asked,
                                .total_reduced = p->total_reduced,
                                .retain_eff = p->retain_eff,
                                .spec = p->spec ? p->spec : "",
                                .scores = p->scores,
                                .cpu = p->env.rows.name,
                                .similarity_ms = p->similarity_ms,
                                .plan_ms = p->plan_ms,
                                .n_forced = p->n_forced };
    memcpy(info, &all, info->size);
    return KVF_OK;
}

kvf_status kvf_merge_plan_owners(const kvf_merge_plan *p, int32_t *owner, kvf_error *err)
{
    if (!p || !owner) return kvf_fail(err, KVF_ERR_ARG, "the plan or owner is NULL");
    int64_t n = p->n_frame * p->n_tok;
    float *most;
    KVF_TRY(KVF_GET(&p->env, &most, n, err));
    for (int64_t i = 0; i < n; i++) owner[i] = -1;
    for (int64_t i = 0; i < p->n_out; i++)
        for (int64_t k = p->row[i]; k < p->row[i + 1]; k++) {
            int32_t at = p->source[k];
            if (owner[at] >= 0 && p->weight[k] <= most[at]) continue;
            owner[at] = (int32_t)i;
            most[at] = p->weight[k];
        }
    kvf_free(p->env.mem, most);
    return KVF_OK;
}
