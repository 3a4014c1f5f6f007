/* kv_sparse.c - a sequence with a memory that holds some tokens of a text only: the later stages of a chain of
 * InfLLM (Xiao et al. 2024, arXiv:2402.04617) and LazyLLM (Fu et al. 2024, arXiv:2407.14057).
 *
 * Every rule is in positions of the text: near is a distance below the window, unit u is the positions
 * init + u * unit.., in every layer, whoever of them is there. Places are the order in which tokens came;
 * what a chunk reads is the order it was arranged with. Raw keys and rotated copies are kept of all tokens,
 * since any of them may be in the window of one that comes back. Far keys are copied together, in the text's
 * order, for each call: the kernels then see lists without holes (docs/lazyllm.md).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "kv/kv_int.h"

/* ---- Which tokens are held --------------------------------------------------------------------- */

kvf_status kvf_sparse_open(kvf_kv *kv, kvf_error *err)
{
    kvf_far *f = kv->far;
    const kvf_mem *mem = kvf_kv_mem(kv);
    void *block;
    if (f->m.index[0]) return kvf_fail(err, KVF_ERR_INTERNAL, "a sparse sequence with an index");
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_sparse), err));
    f->sparse = block;
    KVF_TRY(kvf_mem_get(mem, &block, (size_t)kv->dims.n_layer, sizeof(uint8_t *), err));
    f->sparse->digest = block;
    KVF_TRY(kvf_mem_get(mem, &block, (size_t)kv->dims.n_layer, sizeof(uint8_t *), err));
    f->sparse->made = block;
    return KVF_OK;
}

void kvf_sparse_close(kvf_kv *kv)
{
    kvf_sparse *sp = kv->far->sparse;
    const kvf_mem *mem = kvf_kv_mem(kv);
    if (!sp) return;
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        if (sp->digest) kvf_free(mem, sp->digest[l]);
        if (sp->made) kvf_free(mem, sp->made[l]);
    }
    kvf_gathered_release(kv, &sp->window);
    kvf_gathered_release(kv, &sp->near);
    kvf_gathered_release(kv, &sp->units);
    kvf_gathered_release(kv, &sp->block);
    void *own[] = { sp->digest, sp->made, sp->pos, sp->place, sp->where, sp->first, sp->far, sp->vote, sp->score, sp->seen };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) kvf_free(mem, own[i]);
    kvf_free(mem, sp);
    kv->far->sparse = NULL;
}

/* Scores by place for n of them (reps). */
static kvf_status grow_scores(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_sparse *sp = kv->far->sparse;
    if (!kv->far->reps || n <= sp->cap_score) return KVF_OK;
    int64_t cap = n + n / 2 + KVF_BLOCK, n_layer = kv->dims.n_layer, rows = n_layer * kv->dims.n_head;
    void *score, *seen;
    KVF_TRY(kvf_mem_get(kvf_kv_mem(kv), &score, (size_t)(cap * rows), sizeof(float), err));
    kvf_status rc = kvf_mem_get(kvf_kv_mem(kv), &seen, (size_t)(cap * n_layer), sizeof(float), err);
    if (rc < 0) {
        kvf_free(kvf_kv_mem(kv), score);
        return rc;
    }
    size_t row = (size_t)sp->cap_score * sizeof(float);
    for (int64_t r = 0; sp->score && r < rows; r++) memcpy((float *)score + r * cap, sp->score + r * sp->cap_score, row);
    for (int64_t l = 0; sp->seen && l < n_layer; l++) memcpy((float *)seen + l * cap, sp->seen + l * sp->cap_score, row);
    kvf_free(kvf_kv_mem(kv), sp->score);
    kvf_free(kvf_kv_mem(kv), sp->seen);
    sp->score = score;
    sp->seen = seen;
    sp->cap_score = cap;
    return KVF_OK;
}

static kvf_status grow_i32(kvf_kv *kv, int32_t **array, int64_t cap, int64_t n, kvf_error *err)
{
    void *grown = *array;
    kvf_status rc = kvf_reserve(kvf_kv_mem(kv), &grown, &cap, n, sizeof **array, err);
    *array = grown;
    return rc;
}

static kvf_status grow_digests(kvf_kv *kv, int64_t n, kvf_error *err)
{
    kvf_far *f = kv->far;
    kvf_sparse *sp = f->sparse;
    if (n <= sp->cap_digest) return KVF_OK;
    int64_t want = n + n / 2 + 16;
    const kvf_mem *mem = kvf_kv_mem(kv);
    for (int32_t l = 0; l < kv->dims.n_layer; l++) {
        int64_t cap = sp->cap_digest;
        void *buf = sp->digest[l];
        kvf_status rc = KVF_OK;
        if (f->coarse_bytes + f->fine_bytes > 0) rc = kvf_reserve(mem, &buf, &cap, want, f->coarse_bytes + f->fine_bytes, err);
        sp->digest[l] = buf;
        cap = sp->cap_digest;
        buf = sp->made[l];
        if (rc >= 0) rc = kvf_reserve(mem, &buf, &cap, want, 1, err);
        sp->made[l] = buf;
        if (rc < 0) return rc;
    }
    int64_t cap = f->cap_digest;
    void *rows = f->rows;
    kvf_status rc = kvf_reserve(mem, &rows, &cap, want, sizeof(void *), err);
    f->rows = rows;
    if (rc >= 0) f->cap_digest = sp->cap_digest = want;
    return rc;
}

/* Positions of the chunk go behind those held, so that its angles can be made; commit makes them count. */
kvf_status kvf_sparse_prepare(kvf_kv *kv, int64_t n_tok, kvf_error *err)
{
    kvf_sparse *sp = kv->far->sparse;
    const kvf_kv_order *o = kv->order;
    if (!o || !o->pos || !o->at || o->n_at != n_tok)
        return kvf_fail(err, KVF_ERR_INTERNAL, "a chunk of %lld tokens of a sparse sequence is not arranged", (long long)n_tok);
    int64_t n = kv->n_key + n_tok, n_text = (int64_t)o->pos[o->n - 1] + 1;
    if (n > sp->cap_pos) {
        int64_t want = n + n / 2;
        KVF_TRY(grow_i32(kv, &sp->pos, sp->cap_pos, want, err));
        sp->cap_pos = want;
    }
    if (n_text > sp->cap_place) {
        int64_t want = n_text + n_text / 2;
        KVF_TRY(grow_i32(kv, &sp->place, sp->cap_place, want, err));
        for (int64_t i = sp->cap_place; i < want; i++) sp->place[i] = NO_SLOT;
        sp->cap_place = want;
    }
    if (n_tok > sp->cap_row) {
        int64_t was = sp->cap_row;
        KVF_TRY(grow_i32(kv, &sp->where, was, n_tok, err));
        KVF_TRY(grow_i32(kv, &sp->first, was, n_tok, err));
        KVF_TRY(grow_i32(kv, &sp->far, was, n_tok, err));
        sp->cap_row = n_tok;
    }
    KVF_TRY(grow_digests(kv, kvf_blocks_for(n_text), err));
    KVF_TRY(grow_scores(kv, n, err));
    for (int64_t i = 0; i < n_tok; i++) sp->pos[kv->n_key + i] = o->pos[o->at[i]];
    return KVF_OK;
}

/* The digests of the block around a position are no longer those of the tokens held. */
static void touch(kvf_kv *kv, int32_t pos)
{
    for (int32_t l = 0; l < kv->dims.n_layer; l++) kv->far->sparse->made[l][pos >> KVF_BLOCK_SHIFT] = 0;
}

void kvf_sparse_commit(kvf_kv *kv, int64_t n_tok)
{
    kvf_sparse *sp = kv->far->sparse;
    for (int64_t i = sp->n; i < sp->n + n_tok; i++) {
        sp->place[sp->pos[i]] = (int32_t)i;
        touch(kv, sp->pos[i]);
    }
    sp->n += n_tok;
}

/* Scores of a place are those of `from`, or of nobody. */
static void move_score(kvf_kv *kv, int64_t to, int64_t from)
{
    kvf_sparse *sp = kv->far->sparse;
    for (int64_t r = 0; sp->score && r < kv->dims.n_layer * kv->dims.n_head; r++)
        sp->score[r * sp->cap_score + to] = from < 0 ? 0 : sp->score[r * sp->cap_score + from];
    for (int64_t l = 0; sp->seen && l < kv->dims.n_layer; l++)
        sp->seen[l * sp->cap_score + to] = from < 0 ? 0 : sp->seen[l * sp->cap_score + from];
}

void kvf_sparse_cut(kvf_kv *kv, int64_t n)
{
    kvf_sparse *sp = kv->far->sparse;
    for (int64_t i = n; i < sp->n; i++) {
        sp->place[sp->pos[i]] = NO_SLOT;
        touch(kv, sp->pos[i]);
        if (i < sp->cap_score) move_score(kv, i, -1);
    }
    if (n < sp->n) sp->n = n;
    if (n > 0) return;
    kvf_gathered_release(kv, &sp->window);
    kvf_gathered_release(kv, &sp->near);
    kvf_gathered_release(kv, &sp->units);
    kvf_gathered_release(kv, &sp->block);
}

void kvf_sparse_compact(kvf_kv *kv, const int32_t *places, int64_t n)
{
    kvf_sparse *sp = kv->far->sparse;
    int64_t left = 0;
    for (int64_t i = 0; i < sp->n; i++) {
        if (left < n && places[left] == i) {
            sp->pos[left] = sp->pos[i];
            sp->place[sp->pos[left]] = (int32_t)left;
            if (left != i) move_score(kv, left, i);
            left++;
            continue;
        }
        sp->place[sp->pos[i]] = NO_SLOT;
        touch(kv, sp->pos[i]);
    }
    for (int64_t i = left; i < sp->n; i++) move_score(kv, i, -1);
    sp->n = left;
}

int64_t kvf_order_before(const kvf_kv_order *o, int64_t p)
{
    int64_t lo = 0, hi = o->n;
    while (lo < hi) {
        int64_t mid = lo + (hi - lo) / 2;
        if (o->pos[mid] < p)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* ---- A run of queries ---------------------------------------------------------------------------- */

/* Queries that stand close enough to look up units together; numbers are indices into the order. */
typedef struct run {
    kvf_kv *kv;
    kvf_kv_attend_args a;     /* of the run's queries alone */
    const kvf_kv_order *o;
    int64_t row;              /* its first query among the call's */
    const int32_t *at;        /* [a.n_q] */
    int64_t win0, end;        /* keys of the windows */
    int64_t base;             /* key 0 of the window's list */
    int64_t far_end;          /* keys before it are older than the last query's window */
    int64_t n_init, rest;     /* near far keys: 0..n_init and rest..far_end */
    int64_t units_end;        /* position */
    kvf_attn_args window;     /* the call, for what comes after */
} run;

static int64_t query_pos(const run *r, int64_t i) { return r->o->pos[r->at[i]]; }

/* Where keys begin and end; ref: position that the units must be older than the window of. */
static void plan_run(run *r, int64_t ref)
{
    kvf_far *f = r->kv->far;
    kvf_sparse *sp = f->sparse;
    int64_t w = r->a.window > 0 ? r->a.window : f->m.window, n = r->a.n_q;
    for (int64_t i = 0; i < n; i++) {
        sp->where[i] = r->at[i];
        sp->first[i] = (int32_t)kvf_order_before(r->o, query_pos(r, i) - w + 1);
    }
    r->win0 = sp->first[0];
    r->end = r->at[n - 1] + 1;
    r->far_end = sp->first[n - 1];
    r->units_end = kvf_units_end(&f->m, ref);
    bool units = r->units_end > f->m.init;
    r->n_init = units ? kvf_order_before(r->o, f->m.init) : 0;
    r->rest = units ? kvf_order_before(r->o, r->units_end) : 0;
    for (int64_t i = 0; i < n; i++) sp->far[i] = (int32_t)(r->n_init + sp->first[i] - r->rest) - 1;
}

static kvf_attn_args begin_call(const run *r)
{
    const kvf_kv *kv = r->kv;
    return (kvf_attn_args){ .n_head = kv->dims.n_head, .n_head_kv = kv->dims.n_head_kv, .head_dim = kv->dims.head_dim,
                            .scale = r->a.scale, .softcap = r->a.softcap, .kv = kvf_pool_view(kv->pool), .n_tok = r->a.n_q };
}

/* Where the windows begin and end is counted from the list's first key. */
static kvf_status attend_window(run *r, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    kvf_sparse *sp = kv->far->sparse;
    kvf_attn_args *t = &r->window;
    *t = begin_call(r);
    t->q = r->a.q;
    t->o = r->a.o;
    t->lse = kv->far->lse + r->row * t->n_head;
    if (r->o->places) {
        const int32_t *turned = kvf_layer_turned(kv, r->a.layer);
        r->base = r->win0;
        KVF_TRY(kvf_kv_gather_into(kv, &sp->window, turned, r->o->places + r->win0, r->end - r->win0, err));
        t->slots = sp->window.slots;
    } else {
        r->base = r->win0 >> KVF_BLOCK_SHIFT << KVF_BLOCK_SHIFT;
        t->slots = kvf_layer_turned(kv, r->a.layer) + (r->win0 >> KVF_BLOCK_SHIFT);
    }
    t->n_key = r->end - r->base;
    for (int64_t i = 0; i < r->a.n_q; i++) {
        sp->where[i] -= (int32_t)r->base;
        sp->first[i] -= (int32_t)r->base;
    }
    if (r->o->pos[r->end - 1] - r->o->pos[r->win0] == r->end - 1 - r->win0 && r->at[r->a.n_q - 1] - r->at[0] == r->a.n_q - 1) {
        t->q_first = sp->where[0]; /* nobody is missing: the window counts places */
        t->window = r->a.window > 0 ? r->a.window : kv->far->m.window;
    } else {
        t->place = sp->where;
        t->first = sp->first;
    }
    return kv->backend->ops->attn(kv->backend, t, err);
}

/* Keys from..from + n of the order behind those that the list `to` has, raw. */
static kvf_status append(run *r, kvf_kv_gathered *to, int64_t have, int64_t from, int64_t n, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    int32_t seq[KVF_BLOCK];
    for (int64_t done = 0; done < n;) {
        int64_t some = n - done;
        const int32_t *places = r->o->places ? r->o->places + from + done : seq;
        if (!r->o->places) {
            if (some > KVF_BLOCK) some = KVF_BLOCK;
            for (int64_t i = 0; i < some; i++) seq[i] = (int32_t)(from + done + i);
        }
        kvf_kv_gather_args g = { .kv = kvf_pool_view(kv->pool), .src = kvf_layer_slots(kv, r->a.layer), .dst = to->slots,
                                 .from = places, .first = have + done, .n = some, .n_head_kv = kv->dims.n_head_kv,
                                 .head_dim = kv->dims.head_dim };
        KVF_TRY(kv->backend->ops->kv_gather(kv->backend, &g, err));
        done += some;
    }
    return KVF_OK;
}

/* Queries skip.. of the run read a list of raw keys, into o2. */
static kvf_attn_args far_call(const run *r, const int32_t *slots, int64_t n_key, int64_t skip)
{
    kvf_attn_args t = begin_call(r);
    t.q = r->a.q_far + skip * t.n_head * t.head_dim;
    t.o = r->kv->far->o2;
    t.lse = r->kv->far->lse2;
    t.n_tok = r->a.n_q - skip;
    t.slots = slots;
    t.n_key = n_key;
    t.q_first = n_key;
    return t;
}

static kvf_status merge(const run *r, int64_t skip, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    int64_t row = skip * kv->dims.n_head;
    kvf_lse_merge_args m = { .o = r->a.o + row * kv->dims.head_dim, .lse = r->window.lse + row, .o2 = kv->far->o2,
                             .lse2 = kv->far->lse2, .n_row = (r->a.n_q - skip) * kv->dims.n_head, .head_dim = kv->dims.head_dim };
    return kv->backend->ops->lse_merge(kv->backend, &m, err);
}

/* Init and rest. */
static kvf_status attend_near(run *r, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    kvf_sparse *sp = kv->far->sparse;
    int64_t n = r->n_init + r->far_end - r->rest, skip = 0;
    while (skip < r->a.n_q && sp->far[skip] < 0) skip++;
    if (n <= 0 || skip == r->a.n_q) return KVF_OK;
    KVF_TRY(kvf_gathered_reserve(kv, &sp->near, n, err));
    KVF_TRY(append(r, &sp->near, 0, 0, r->n_init, err));
    KVF_TRY(append(r, &sp->near, r->n_init, r->rest, r->far_end - r->rest, err));
    kvf_attn_args t = far_call(r, sp->near.slots, n, skip);
    t.place = sp->far + skip;
    KVF_TRY(kv->backend->ops->attn(kv->backend, &t, err));
    return merge(r, skip, err);
}

/* The keys of the units that one set names. */
static kvf_status gather_units(run *r, const kvf_lookup *l, const uint8_t *set, int64_t *n_key, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    const kvf_memory *m = &kv->far->m;
    kvf_kv_gathered *to = &kv->far->sparse->units;
    *n_key = 0;
    for (int pass = 0; pass < 2; pass++) { /* count, then copy: a list is reserved whole */
        int64_t n = 0;
        for (int64_t u = 0; u < l->n_unit; u++) {
            if (!set[u]) continue;
            int64_t from = kvf_order_before(r->o, (l->unit0 + u) * m->unit), end = kvf_order_before(r->o, (l->unit0 + u + 1) * m->unit);
            if (pass == 1) KVF_TRY(append(r, to, n, from, end - from, err));
            n += end - from;
        }
        if (pass == 0) KVF_TRY(kvf_gathered_reserve(kv, to, n, err));
        *n_key = n;
    }
    kv->count.n_far_read += kvf_blocks_for(*n_key);
    return KVF_OK;
}

static kvf_status attend_units(run *r, const kvf_lookup *l, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    const kvf_far *f = kv->far;
    bool any = false;
    for (int32_t s = 0; s < f->m.n_set; s++) {
        int64_t n;
        KVF_TRY(gather_units(r, l, f->use + s * l->n_unit, &n, err));
        if (n == 0 && f->m.n_set == 1) return KVF_OK;
        any = any || n > 0;
        kvf_attn_args t = far_call(r, f->sparse->units.slots, n, 0);
        if (f->m.n_set > 1) {
            t.head_kv0 = s;
            t.head_kv1 = s + 1;
        }
        KVF_TRY(kv->backend->ops->attn(kv->backend, &t, err));
    }
    return any ? merge(r, 0, err) : KVF_OK;
}

/* ---- Where attention went ---------------------------------------------------------------------------- */

/* Attention of query i of the run over a list of which it sees the first `place` + 1 keys, in mass_row. *seen: the
 * call that was made. */
static kvf_status mass_of(const run *r, const kvf_attn_args *list, int64_t i, int64_t place, kvf_attn_args *seen, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    kvf_attn_args t = *list;
    t.q += i * t.n_head * t.head_dim;
    t.lse = r->window.lse + i * t.n_head;
    t.n_tok = 1;
    t.place = t.first = NULL;
    t.window = 0;
    t.n_key = place + 1;
    t.q_first = place;
    *seen = t;
    return kvf_mass_of(kv, &r->a, &t, err);
}

/* Is key j of the order, older than the window, among those that were read? */
static bool was_read(const run *r, const kvf_lookup *l, int64_t j)
{
    const kvf_far *f = r->kv->far;
    if (j < r->n_init || j >= r->rest) return true;
    int64_t u = r->o->pos[j] / f->m.unit - l->unit0;
    for (int32_t s = 0; s < f->m.n_set && u >= 0 && u < l->n_unit; s++)
        if (f->use[s * l->n_unit + u]) return true;
    return false;
}

/* Mass of the newest queries: their windows, and the keys before them at the far distance. */
static kvf_status add_mass(run *r, const kvf_lookup *l, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    kvf_sparse *sp = kv->far->sparse;
    kvf_attn_args all = far_call(r, kvf_layer_slots(kv, r->a.layer), r->far_end, 0);
    if (r->o->places && r->far_end > 0) {
        KVF_TRY(kvf_kv_gather_into(kv, &sp->units, all.slots, r->o->places, r->far_end, err));
        all.slots = sp->units.slots;
    }
    for (int64_t i = r->a.n_q > r->a.n_mass ? r->a.n_q - r->a.n_mass : 0; i < r->a.n_q; i++) {
        int64_t first = sp->first[i], far = r->base + first;
        kvf_attn_args seen;
        KVF_TRY(mass_of(r, &r->window, i, sp->where[i], &seen, err));
        kvf_mass_add(kv, &r->a, &seen, first, sp->where[i] + 1, r->base);
        if (far == 0) continue;
        KVF_TRY(mass_of(r, &all, i, far - 1, &seen, err));
        if (r->a.mass_unread) kvf_mass_add(kv, &r->a, &seen, 0, far, 0);
        for (int64_t j = 0; !r->a.mass_unread && j < far; j++)
            if (was_read(r, l, j)) kvf_mass_add(kv, &r->a, &seen, j, j + 1, 0);
    }
    return KVF_OK;
}

/* Column sums of the windows of n queries from query i on, to the scores of representatives. */
static kvf_status add_columns(run *r, int64_t i, int64_t n, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    kvf_sparse *sp = kv->far->sparse;
    kvf_attn_args t = r->window;
    int32_t n_head = kv->dims.n_head, l = r->a.layer;
    t.q += i * n_head * t.head_dim;
    t.lse += i * n_head;
    t.n_tok = n;
    if (t.place) { /* one query, the keys before its window are left out below */
        t.n_key = sp->where[i] + 1;
        t.q_first = sp->where[i];
        t.place = t.first = NULL;
    }
    int64_t stride = kvf_blocks_for(t.n_key) * KVF_BLOCK;
    KVF_TRY(kvf_mass_row(kv, stride * n_head, err));
    kvf_attn_mass_args m = { .attn = &t, .mass = kv->mass_row };
    KVF_TRY(kv->backend->ops->attn_mass(kv->backend, &m, err));
    for (int64_t j = sp->first[i]; j <= sp->where[i + n - 1]; j++) {
        int64_t place = r->o->places ? r->o->places[r->base + j] : r->base + j, seen = 0;
        for (int64_t k = i; k < i + n; k++) seen += j >= sp->first[k] && j <= sp->where[k];
        sp->seen[l * sp->cap_score + place] += (float)seen;
        for (int32_t h = 0; h < n_head; h++)
            sp->score[(l * n_head + h) * sp->cap_score + place] += kv->mass_row[h * stride + j];
    }
    return KVF_OK;
}

static kvf_status add_scores(run *r, kvf_error *err)
{
    int64_t n = r->window.place ? 1 : r->a.n_q;
    for (int64_t i = 0; i < r->a.n_q; i += n) KVF_TRY(add_columns(r, i, n, err));
    return KVF_OK;
}

/* ---- Attention ------------------------------------------------------------------------------------------ */

static kvf_status attend_run(run *r, int64_t ref, int64_t n_past, kvf_error *err)
{
    kvf_kv *kv = r->kv;
    kvf_far *f = kv->far;
    plan_run(r, ref);
    KVF_TRY(attend_window(r, err));
    kvf_lookup l = { .kv = kv, .a = &r->a, .lse = r->window.lse, .unit0 = f->m.init / f->m.unit, .n_past = n_past };
    if (r->a.window == 0) {
        KVF_TRY(attend_near(r, err));
        l.n_unit = (r->units_end - f->m.init) / f->m.unit;
        if (l.n_unit > 0) {
            KVF_TRY(kvf_far_lookup(&l, err));
            KVF_TRY(attend_units(r, &l, err));
        }
        if (f->reps) KVF_TRY(add_scores(r, err));
    }
    return r->a.mass ? add_mass(r, &l, err) : KVF_OK;
}

/* Tokens that come back stand anywhere in the text: those within a chunk's length are a run. */
static kvf_status attend_runs(run *r, int64_t first_at, kvf_error *err)
{
    const kvf_kv_attend_args *a = &r->a;
    const kvf_kv_attend_args whole = *a;
    const int32_t *at = r->o->at + first_at;
    int64_t width = (int64_t)r->kv->dims.n_head * r->kv->dims.head_dim;
    for (int64_t from = 0; from < whole.n_q;) {
        int64_t n = 1;
        while (from + n < whole.n_q && at[from + n] - at[from] < r->kv->far->m.n_chunk) n++;
        r->a = whole;
        r->a.q += from * width;
        r->a.q_far += from * width;
        r->a.o += from * width;
        r->a.n_q = r->a.n_tok = n;
        r->a.reading = true; /* no question in it, and no answer's choice goes on from it */
        r->a.mass = NULL;
        r->row = from;
        r->at = at + from;
        KVF_TRY(attend_run(r, query_pos(r, 0), query_pos(r, 0), err));
        from += n;
    }
    return KVF_OK;
}

kvf_status kvf_sparse_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err)
{
    const kvf_kv_order *o = kv->order;
    kv->far->now++;
    kv->count.n_block_seen += kvf_blocks_for(kv->n_key + a->n_tok);
    kv->count.n_block_read += kvf_blocks_for(o->n);
    KVF_TRY(kvf_far_rows(kv, a->n_q, err));
    run r = { .kv = kv, .a = *a, .o = o, .at = o->at + (o->n_at - a->n_q) };
    if (o->back) return attend_runs(&r, o->n_at - a->n_q, err);
    return attend_run(&r, o->pos[o->at[0]], o->pos[o->at[o->n_at - 1]] + 1 - a->n_tok, err);
}
