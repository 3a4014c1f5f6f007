/* vit_attn.c - the tower's attention over the thread pool; see vit_ops.h.
 *
 * A part is one head of one frame, and where there are fewer of them than threads a run of its queries:
 * packing a head's keys is 2 % of a whole head's work, so heads are not cut without need. Each part's
 * column sums go to a row of their own and are added up in the order of the parts.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "vision/vit_ops.h"

typedef struct attn_task {
    const kvf_vit_ops *ops;
    const kvf_vit_attn_args *a;
    int64_t n_cut, rows; /* parts of a head; queries of each */
    uint8_t *scratch;
    size_t each;         /* bytes of scratch per worker */
    float *sums;         /* [n_frame][n_head][n_cut][n_pos] or NULL */
} attn_task;

const kvf_vit_ops *kvf_vit_ops_pick(kvf_cpu_level level)
{
#if defined(__x86_64__)
    if (level >= KVF_CPU_LEVEL_AVX512) return &kvf_vit_ops_avx512;
    if (level >= KVF_CPU_LEVEL_AVX2) return &kvf_vit_ops_avx2;
#endif
    (void)level;
    return &kvf_vit_ops_ref;
}

static void attn_part(void *arg, int64_t part, int32_t worker)
{
    const attn_task *t = arg;
    int64_t head = part / t->n_cut, row0 = part % t->n_cut * t->rows, row1 = row0 + t->rows;
    kvf_vit_attn_part p = { .a = t->a, .frame = head / t->a->n_head, .head = (int32_t)(head % t->a->n_head),
                            .row0 = row0, .row1 = row1 < t->a->n_pos ? row1 : t->a->n_pos,
                            .mass = t->sums ? t->sums + part * t->a->n_pos : NULL,
                            .scratch = t->scratch + (size_t)worker * t->each };
    t->ops->attn(&p);
}

static void add_up(const attn_task *t)
{
    int64_t n = t->a->n_pos, per_frame = t->a->n_head * t->n_cut;
    for (int64_t f = 0; f < t->a->n_frame; f++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t p = 0; p < per_frame; p++) sum += (double)t->sums[(f * per_frame + p) * n + j];
            t->a->mass[f * n + j] = (float)sum;
        }
    }
}

/* The cut depends on the shape alone, so that sums do not depend on the thread count; 64 parts keep 16 to 32
 * threads busy with a single frame. */
static void cut(attn_task *t)
{
    int64_t heads = t->a->n_frame * t->a->n_head, unit = t->ops->attn_rows;
    int64_t want = heads >= 64 ? 1 : (64 + heads - 1) / heads, most = (t->a->n_pos + 4 * unit - 1) / (4 * unit);
    t->n_cut = want < most ? want : most;
    t->rows = ((t->a->n_pos + t->n_cut - 1) / t->n_cut + unit - 1) / unit * unit;
    t->n_cut = (t->a->n_pos + t->rows - 1) / t->rows;
}

kvf_status kvf_vit_attn(const kvf_vit_ops *ops, kvf_threads *threads, const kvf_mem *mem, const kvf_vit_attn_args *a,
                        kvf_error *err)
{
    attn_task t = { .ops = ops, .a = a };
    cut(&t);
    int64_t n_part = a->n_frame * a->n_head * t.n_cut;
    t.each = (ops->attn_scratch(a) + 4095u) & ~(size_t)4095u; /* no two workers on one page */
    t.scratch = kvf_alloc_raw(mem, (size_t)kvf_threads_count(threads), t.each);
    if (a->mass) t.sums = kvf_alloc_raw(mem, (size_t)n_part, (size_t)a->n_pos * sizeof(float));
    kvf_status rc = KVF_OK;
    if (!t.scratch || (a->mass && !t.sums))
        rc = kvf_fail(err, KVF_ERR_NOMEM, "out of memory: scratch for attention over %lld patches refused; encode fewer frames at once",
                      (long long)a->n_pos);
    if (rc >= 0) kvf_threads_run(threads, n_part, attn_part, &t);
    if (rc >= 0 && a->mass) add_up(&t);
    kvf_free(mem, t.scratch);
    kvf_free(mem, t.sums);
    return rc;
}
