/* lazy.c - see lazy.h. One step:
 *
 *     S = all tokens
 *     for each stage: compute, chunk by chunk, the tokens of S that have not done it, over the keys of S;
 *                     score S by the attention of the newest tokens; the policy says which of S stay in S
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/lazy.h"

#include <string.h>

#include "model/fold.h"
#include "model/timeline.h"

/* A stage's sequence beside the KV itself. */
typedef struct stage {
    int32_t layer0, layer1;
    int32_t mass_layer, n_mass_layer; /* the first of those that score, and how many: the last ones of global attention */
    kvf_kv *kv;           /* of stage 0: the session's */
    int32_t *place;       /* [cap] of a token that has done the stage; stage 0: its number */
    int32_t *text;        /* [cap] token at a place */
    bool sorted;          /* places are in the text's order */
} stage;

struct kvf_lazy {
    const kvf_mem *mem;
    kvf_stages plan;
    stage stages[KVF_STAGES_MAX];
    kvf_park *park;
    int64_t n;            /* tokens of the text that have entries below */
    int64_t since;        /* decode steps since the last choice */

    int64_t cap;          /* tokens the arrays hold */
    uint8_t *done;        /* stages done */
    uint8_t *level;       /* stages of the last choice that the token is in */
    uint8_t *level_was;   /* and of the one before a step that chooses, should it fail */
    int32_t *row;         /* waiting row, -1: none */
    uint8_t *gone;        /* stages after which it was folded into others, 0: it was not */
    uint8_t *embedded;    /* [n_list] of a step: given as an embedding */
    float *score;         /* by token: sum over the scoring queries and heads */

    /* Of a step. */
    int32_t *list, n_list;  /* S, rising */
    int32_t *todo, n_todo;  /* those of S that have not done the stage, rising */
    float *list_score;      /* [n_list] */
    uint8_t *keep;          /* [n_list] */
    int32_t *order, *order_text; /* places and tokens that a chunk reads */
    float *mass;            /* [cap] one per key of a chunk's order */
    int32_t *at, *first, *pos;   /* [n_batch] of a chunk's tokens */
    float **rows;
    kvf_token *tokens;

    float *look;          /* [cap] by token: attention of the newest queries in the last stage */
    float *look_run;      /* [cap / KVF_TRACK_TOKENS + 1] */
    int64_t cap_look_run, n_look; /* n_look: steps noted */

    int64_t n_layer_token, n_revived;
};

/* ---- Opening --------------------------------------------------------------------------------------- */

/* Layers of the stages, and which of them score: the last few of global attention. */
static kvf_status plan_stages(kvf_lazy *z, const kvf_session *s, kvf_error *err)
{
    const kvf_hparams *hp = &s->m->hp;
    for (int32_t g = 0; g < z->plan.n; g++) {
        stage *t = &z->stages[g];
        t->layer0 = z->plan.first[g];
        t->layer1 = g + 1 < z->plan.n ? z->plan.first[g + 1] : hp->n_layer;
        t->sorted = true;
        for (int32_t l = t->layer1 - 1; l >= t->layer0 && t->n_mass_layer < z->plan.score[g].n_layer; l--) {
            if (kvf_layer_is_sliding(hp, l)) continue;
            t->mass_layer = l;
            t->n_mass_layer++;
        }
        if (t->n_mass_layer == 0 && g + 1 < z->plan.n)
            return kvf_fail(err, KVF_ERR_ARG,
                            "layers %d to %d all have sliding windows, so nothing there sees the whole text; this model has "
                            "global attention in every %d. layer: let a stage end after one",
                            t->layer0, t->layer1 - 1, hp->window_period);
    }
    return KVF_OK;
}

static kvf_status open_parts(kvf_lazy *z, kvf_session *s, kvf_error *err)
{
    void *block;
    s->policy->ops->stages(s->policy, &z->plan);
    KVF_TRY(plan_stages(z, s, err));
    z->stages[0].kv = s->kv;
    for (int32_t g = 1; g < z->plan.n; g++) {
        stage *t = &z->stages[g];
        KVF_TRY(kvf_timeline_open_kv(s, &t->kv, t->layer0, t->layer1, true, err));
    }
    KVF_TRY(kvf_park_open(&z->park, z->mem, s->m->hp.n_embd, z->plan.park, err));
    size_t n = (size_t)s->n_batch;
    KVF_TRY(kvf_mem_get(z->mem, &block, n, sizeof(int32_t), err));
    z->at = block;
    KVF_TRY(kvf_mem_get(z->mem, &block, n, sizeof(int32_t), err));
    z->first = block;
    KVF_TRY(kvf_mem_get(z->mem, &block, n, sizeof(int32_t), err));
    z->pos = block;
    KVF_TRY(kvf_mem_get(z->mem, &block, n, sizeof(kvf_token), err));
    z->tokens = block;
    KVF_TRY(kvf_mem_get(z->mem, &block, n, sizeof(float *), err));
    z->rows = block;
    return KVF_OK;
}

kvf_status kvf_lazy_open(kvf_lazy **out, kvf_session *s, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(s->mem, &block, 1, sizeof(kvf_lazy), err));
    kvf_lazy *z = block;
    z->mem = s->mem;
    kvf_status rc = open_parts(z, s, err);
    if (rc < 0) {
        kvf_lazy_close(z);
        return rc;
    }
    *out = z;
    return KVF_OK;
}

void kvf_lazy_close(kvf_lazy *z)
{
    if (!z) return;
    for (int32_t g = 0; g < z->plan.n; g++) {
        if (g > 0) kvf_kv_close(z->stages[g].kv);
        kvf_free(z->mem, z->stages[g].place);
        kvf_free(z->mem, z->stages[g].text);
    }
    kvf_park_close(z->park);
    void *all[] = { z->done, z->level, z->level_was, z->gone, z->embedded, z->row,   z->score, z->list, z->todo, z->list_score, z->keep, z->order,
                    z->order_text, z->mass, z->look, z->look_run, z->at, z->first, z->pos, z->tokens, z->rows };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) kvf_free(z->mem, all[i]);
    kvf_free(z->mem, z);
}

static kvf_status grow(kvf_lazy *z, void *array, int64_t n, size_t size, kvf_error *err)
{
    void *old, *grown;
    memcpy(&old, array, sizeof old);
    int64_t cap = z->cap;
    grown = old;
    KVF_TRY(kvf_reserve(z->mem, &grown, &cap, n, size, err));
    memcpy(array, &grown, sizeof grown);
    return KVF_OK;
}

/* Arrays for n tokens. A failure leaves some of them longer than cap says, which harms nothing. */
static kvf_status reserve(kvf_lazy *z, int64_t n, kvf_error *err)
{
    if (n <= z->cap) return KVF_OK;
    if (n < z->cap + z->cap / 2) n = z->cap + z->cap / 2;
    if (n < 256) n = 256;
    KVF_TRY(grow(z, &z->done, n, 1, err));
    KVF_TRY(grow(z, &z->level, n, 1, err));
    KVF_TRY(grow(z, &z->level_was, n, 1, err));
    KVF_TRY(grow(z, &z->keep, n, 1, err));
    KVF_TRY(grow(z, &z->gone, n, 1, err));
    KVF_TRY(grow(z, &z->embedded, n, 1, err));
    KVF_TRY(grow(z, &z->row, n, sizeof(int32_t), err));
    KVF_TRY(grow(z, &z->score, n, sizeof(float), err));
    KVF_TRY(grow(z, &z->list, n, sizeof(int32_t), err));
    KVF_TRY(grow(z, &z->todo, n, sizeof(int32_t), err));
    KVF_TRY(grow(z, &z->list_score, n, sizeof(float), err));
    KVF_TRY(grow(z, &z->order, n, sizeof(int32_t), err));
    KVF_TRY(grow(z, &z->order_text, n, sizeof(int32_t), err));
    KVF_TRY(grow(z, &z->mass, n, sizeof(float), err));
    KVF_TRY(grow(z, &z->look, n, sizeof(float), err));
    for (int32_t g = 0; g < z->plan.n; g++) {
        KVF_TRY(grow(z, &z->stages[g].place, n, sizeof(int32_t), err));
        KVF_TRY(grow(z, &z->stages[g].text, n, sizeof(int32_t), err));
    }
    z->cap = n;
    return KVF_OK;
}

/* ---- Forgetting -------------------------------------------------------------------------------------- */

/* Tokens n and later leave a stage after the first. */
static kvf_status cut_stage(kvf_lazy *z, stage *t, int64_t n, kvf_error *err)
{
    int64_t len = kvf_kv_len(t->kv);
    int32_t left = 0;
    for (int64_t i = 0; i < len; i++)
        if (t->text[i] < n) z->order[left++] = (int32_t)i;
    KVF_TRY(kvf_kv_compact(t->kv, z->order, left, err));
    t->sorted = true;
    for (int32_t i = 0; i < left; i++) {
        t->text[i] = t->text[z->order[i]];
        t->place[t->text[i]] = i;
        if (i > 0 && t->text[i] < t->text[i - 1]) t->sorted = false;
    }
    return KVF_OK;
}

void kvf_lazy_cut(kvf_session *s, int64_t n)
{
    kvf_lazy *z = s->lazy;
    for (int32_t g = 1; g < z->plan.n; g++) {
        if (cut_stage(z, &z->stages[g], n, NULL) >= 0) continue;
        n = 0; /* the device failed: nothing is certain, so nothing is kept */
        for (g = 1; g < z->plan.n; g++) kvf_kv_truncate(z->stages[g].kv, 0);
    }
    for (int64_t i = n; i < z->n; i++) {
        if (z->row[i] >= 0) kvf_park_give(z->park, z->row[i]);
        z->row[i] = -1;
        z->done[i] = z->level[i] = z->gone[i] = 0;
    }
    kvf_kv_truncate(s->kv, n);
    if (z->n > n) z->n = n;
}

/* ---- A chunk ------------------------------------------------------------------------------------------- */

/* Which keys the chunk todo[from..from + n) reads, in the text's order: those of S that have done the stage,
 * and the chunk's own. */
typedef struct reading {
    kvf_kv_order order;
    int64_t n;     /* keys */
    bool as_stored, whole; /* the places are in order and all read; and no token of the text is missing */
} reading;

static reading read_what(kvf_lazy *z, int32_t g, int32_t from, int32_t n)
{
    const stage *t = &z->stages[g];
    int64_t len = kvf_kv_len(t->kv);
    reading r = { .whole = true };
    int32_t mine = 0;
    for (int32_t i = 0; i < z->n_list; i++) {
        int32_t token = z->list[i];
        if (mine < n && token == z->todo[from + mine]) {
            z->order[r.n] = (int32_t)(len + mine);
            z->at[mine++] = (int32_t)r.n;
        } else if (z->done[token] > g) {
            z->order[r.n] = t->place[token];
        } else {
            break; /* a later chunk's, and so is all that follows */
        }
        if (token != r.n) r.whole = false;
        z->order_text[r.n++] = token;
    }
    r.as_stored = t->sorted && r.n == len + n && (len == 0 || t->text[len - 1] < z->todo[from]);
    return r;
}

/* First key of each of the chunk's tokens in a sliding window, by positions. */
static void find_windows(kvf_lazy *z, int64_t window, int32_t n)
{
    int32_t lo = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t token = z->order_text[z->at[i]];
        while (z->order_text[lo] <= token - window) lo++;
        z->first[i] = lo;
    }
}

/* Bytes that may still be taken under the session's budget. */
static size_t room(const kvf_session *s)
{
    if (s->kv_bytes == 0) return SIZE_MAX;
    size_t used = (size_t)kvf_pool_used(s->pool) * kvf_pool_slot_bytes(s->pool) + kvf_park_bytes(s->lazy->park);
    return used < s->kv_bytes ? s->kv_bytes - used : 0;
}

static kvf_status check_budget(const kvf_session *s, const stage *t, int64_t n, kvf_error *err)
{
    int64_t len = kvf_kv_len(t->kv), blocks = (len + n + KVF_BLOCK - 1) / KVF_BLOCK - (len + KVF_BLOCK - 1) / KVF_BLOCK;
    if (kvf_kv_memory(t->kv)) blocks *= 2; /* rotated copies */
    size_t bytes = (size_t)(blocks * (t->layer1 - t->layer0)) * kvf_pool_slot_bytes(s->pool);
    if (bytes <= room(s)) return KVF_OK;
    return kvf_fail(err, KVF_ERR_LIMIT,
                    "keys, values and waiting hidden states of %lld tokens do not fit %zu bytes; raise the budget, or let "
                    "hidden states wait in a folder (lazyllm:park=DIR)",
                    (long long)(len + n), s->kv_bytes);
}

/* Of that, what hidden states may take: the rest is for keys and values that the step has still to write. With
 * a folder, all that it may write; else the first stage's, since later ones keep less. */
static size_t room_to_park(const kvf_session *s)
{
    const kvf_lazy *z = s->lazy;
    size_t left = room(s);
    if (left == SIZE_MAX) return left;
    int64_t blocks = (s->n_token - kvf_kv_len(s->kv) + KVF_BLOCK - 1) / KVF_BLOCK + 1;
    int32_t n_layer = z->plan.park[0] ? s->m->hp.n_layer : z->stages[0].layer1;
    size_t kv = (size_t)(blocks * n_layer) * kvf_pool_slot_bytes(s->pool);
    return left > kv ? left - kv : 0;
}

/* Rows for the chunk's hidden states: new ones in stage 0. */
static kvf_status find_rows(kvf_session *s, int32_t g, int32_t from, int32_t n, kvf_error *err)
{
    kvf_lazy *z = s->lazy;
    for (int32_t i = 0; i < n; i++) {
        int32_t *row = &z->row[z->todo[from + i]];
        if (g == 0 && *row < 0) KVF_TRY(kvf_park_take(z->park, room_to_park(s), row, err));
        z->rows[i] = kvf_park_row(z->park, *row);
    }
    return KVF_OK;
}

/* What the chunk computed is part of the text now. */
static void settle_chunk(kvf_lazy *z, int32_t g, int32_t from, int32_t n)
{
    stage *t = &z->stages[g];
    int32_t len = (int32_t)(kvf_kv_len(t->kv) - n);
    if (len > 0 && t->text[len - 1] > z->todo[from]) t->sorted = false;
    for (int32_t i = 0; i < n; i++) {
        int32_t token = z->todo[from + i];
        t->place[token] = len + i;
        t->text[len + i] = token;
        z->done[token] = (uint8_t)(g + 1);
        if (g + 1 < z->plan.n) continue;
        kvf_park_give(z->park, z->row[token]);
        z->row[token] = -1;
    }
    z->n_layer_token += (int64_t)n * (t->layer1 - t->layer0);
}

/* Compute todo[from..from + n) in stage g. n_row: newest tokens whose attention scores; 0: none do. */
static kvf_status run_chunk(kvf_session *s, int32_t g, int32_t from, int32_t n, int64_t n_row, kvf_error *err)
{
    kvf_lazy *z = s->lazy;
    stage *t = &z->stages[g];
    bool last = from + n == z->n_todo;
    bool sparse = g > 0 && kvf_kv_memory(t->kv);
    kvf_part p = { .kv = t->kv, .policy = s->policy, .layer0 = t->layer0, .layer1 = t->layer1, .tokens = g == 0 ? z->tokens : NULL,
                   .pos = z->pos, .row = z->rows, .n_tok = n, .n_out = last };
    for (int32_t i = 0; i < n; i++) {
        z->pos[i] = z->todo[from + i];
        z->tokens[i] = s->tokens[z->pos[i]];
        p.n_mass += z->pos[i] >= s->n_token - n_row;
    }
    if (g == 0) p.embd = kvf_timeline_rows(s, z->pos, 0, n);
    KVF_TRY(check_budget(s, t, n, err));
    KVF_TRY(find_rows(s, g, from, n, err));
    bool look = last && s->passages && g + 1 == z->plan.n; /* nothing scores in the last stage */
    if (look) p.n_mass = 1;
    reading r = read_what(z, g, from, n);
    r.order = (kvf_kv_order){ .places = r.as_stored ? NULL : z->order, .n = r.n, .at = r.as_stored && !sparse ? NULL : z->at,
                              .n_at = n, .pos = sparse ? z->order_text : NULL, .back = z->todo[from] < z->n };
    if (!r.whole && s->m->hp.window > 0 && !sparse) {
        find_windows(z, s->m->hp.window, n);
        r.order.first = z->first;
    }
    if (p.n_mass > 0) {
        memset(z->mass, 0, (size_t)r.n * sizeof *z->mass);
        p.mass = z->mass;
        p.mass_peak = !look && z->plan.score[g].peak;
        p.mass_unread = !look;
        p.mass_layer = look ? t->layer0 : t->mass_layer;
    }
    kvf_kv_arrange(t->kv, r.as_stored && r.whole && !sparse ? NULL : &r.order);
    kvf_turn_take(&s->m->backend->run);
    kvf_status rc = kvf_forward_part(s->forward, &p, err);
    if (rc >= 0) settle_chunk(z, g, from, n);
    if (rc >= 0 && last && t->layer1 == s->m->hp.n_layer) rc = kvf_forward_logits(s->forward, 0, 1, s->logits, err);
    kvf_turn_give(&s->m->backend->run);
    kvf_kv_arrange(t->kv, NULL);
    float *to = look ? z->look : z->score;
    for (int64_t i = 0; rc >= 0 && p.n_mass > 0 && i < r.n; i++) to[z->order_text[i]] += z->mass[i];
    z->n_look += look && rc >= 0;
    return rc;
}

/* ---- A step ---------------------------------------------------------------------------------------------- */

/* One stage's share of the progress that a step reports. */
static kvf_status tell_progress(kvf_session *s, int32_t g, int32_t done, kvf_error *err)
{
    const stage *t = &s->lazy->stages[g];
    int64_t fresh = s->n_token - s->lazy->n, n_layer = s->m->hp.n_layer;
    double share = t->layer0 + (double)done / s->lazy->n_todo * (t->layer1 - t->layer0);
    return kvf_timeline_report(s, (int64_t)((double)fresh * share / (double)n_layer), fresh, err);
}

/* todo: those of the list that have not done stage g; all of them have done those before. */
static void find_todo(kvf_lazy *z, int32_t g)
{
    z->n_todo = 0;
    for (int32_t i = 0; i < z->n_list; i++)
        if (z->done[z->list[i]] == g) z->todo[z->n_todo++] = z->list[i];
}

/* Tokens of the chunk that begins with todo[from]. What scores, scores in one chunk, since the highest head is
 * one of a chunk; but a memory's chunks are those of its lookups, so there it may be two. With a memory, those that come back are not mixed with the
 * step's own, whose lookups an answer goes on from. */
static int32_t next_chunk(const kvf_session *s, int32_t from, int64_t n_row)
{
    const kvf_lazy *z = s->lazy;
    int64_t left = z->n_todo - from, whole = kvf_timeline_chunk(s, left);
    if (!kvf_kv_memory(s->kv)) return (int32_t)(whole < left && left - whole < n_row ? left - n_row : whole);
    if (z->todo[from] >= z->n) return (int32_t)whole;
    int32_t n = 1;
    while (n < s->n_batch && from + n < z->n_todo && z->todo[from + n] < z->n) n++;
    return n;
}

static kvf_status run_stage(kvf_session *s, int32_t g, int64_t n_row, bool tell, kvf_error *err)
{
    kvf_lazy *z = s->lazy;
    find_todo(z, g);
    for (int32_t i = 0; i < z->n_todo && z->todo[i] < z->n; i++) z->n_revived++;
    if (n_row > 0) memset(z->score, 0, (size_t)s->n_token * sizeof *z->score);
    for (int32_t from = 0; from < z->n_todo;) {
        int32_t n = next_chunk(s, from, n_row);
        KVF_TRY(kvf_timeline_check_cancel(s, err));
        KVF_TRY(run_chunk(s, g, from, n, n_row, err));
        from += n;
        if (tell) KVF_TRY(tell_progress(s, g, from, err));
    }
    return KVF_OK;
}

/* Tokens that were folded into others at the end of stage g are not asked about again. */
static void leave_out_gone(kvf_lazy *z, int32_t g)
{
    int32_t left = 0;
    for (int32_t i = 0; i < z->n_list; i++)
        if (z->gone[z->list[i]] != g + 1) z->list[left++] = z->list[i];
    z->n_list = left;
}

/* The step's own embeddings that were not kept go into those that were. */
static kvf_status fold_embedded(kvf_session *s, int32_t g, kvf_error *err)
{
    kvf_lazy *z = s->lazy;
    int64_t n = 0, n_keep = 0;
    void *rows, *keep;
    for (int32_t i = 0; i < z->n_list; i++) n += z->embedded[i] && z->list[i] >= z->n;
    if (n == 0) return KVF_OK;
    KVF_TRY(kvf_mem_get(z->mem, &rows, (size_t)n, sizeof(float *), err));
    kvf_status rc = kvf_mem_get(z->mem, &keep, (size_t)n, 1, err);
    if (rc < 0) {
        kvf_free(z->mem, rows);
        return rc;
    }
    n = 0;
    for (int32_t i = 0; i < z->n_list; i++) {
        if (!z->embedded[i] || z->list[i] < z->n) continue;
        ((float **)rows)[n] = kvf_park_row(z->park, z->row[z->list[i]]);
        ((uint8_t *)keep)[n++] = z->keep[i];
        n_keep += z->keep[i] != 0;
    }
    if (n_keep == 0)
        rc = kvf_fail(err, KVF_ERR_INTERNAL, "policy %s keeps no embedding to fold the others into", s->policy->ops->name);
    else if (n_keep < n)
        rc = kvf_fold(s->m->backend, rows, keep, n, s->m->hp.n_embd, err);
    kvf_free(z->mem, rows);
    kvf_free(z->mem, keep);
    for (int32_t i = 0; rc >= 0 && i < z->n_list; i++) {
        int32_t token = z->list[i];
        if (!z->embedded[i] || token < z->n || z->keep[i]) continue;
        z->gone[token] = (uint8_t)(g + 1);
        kvf_park_give(z->park, z->row[token]);
        z->row[token] = -1;
    }
    return rc;
}

/* The policy's choice among the list, at the end of stage g; the list is then what it kept. */
static kvf_status choose(kvf_session *s, int32_t g, int64_t n_row, kvf_error *err)
{
    kvf_lazy *z = s->lazy;
    float heads = z->plan.score[g].peak ? 1.0f : (float)s->m->hp.n_head;
    float scale = 1.0f / (heads * (float)z->stages[g].n_mass_layer * (float)n_row);
    leave_out_gone(z, g);
    for (int32_t i = 0; i < z->n_list; i++) {
        z->list_score[i] = z->score[z->list[i]] * scale;
        z->embedded[i] = s->tokens[z->list[i]] == KVF_TOKEN_EMBEDDING;
    }
    kvf_keep k = { .stage = g, .n = z->n_list, .pos = z->list, .score = z->list_score, .embedded = z->embedded,
                   .n_text = s->n_token, .n_before = z->n, .n_row = n_row };
    KVF_TRY(s->policy->ops->keep(s->policy, &k, z->keep, err));
    z->keep[z->n_list - 1] = 1;
    if (z->plan.fold[g]) KVF_TRY(fold_embedded(s, g, err));
    int32_t left = 0;
    for (int32_t i = 0; i < z->n_list; i++) {
        if (!z->keep[i]) continue;
        z->level[z->list[i]] = (uint8_t)(g + 2);
        z->list[left++] = z->list[i];
    }
    z->n_list = left;
    return KVF_OK;
}

/* The list of stage g + 1 by the last choice. */
static void follow(kvf_lazy *z, int32_t g)
{
    int32_t left = 0;
    for (int32_t i = 0; i < z->n_list; i++)
        if (z->level[z->list[i]] > g + 1) z->list[left++] = z->list[i];
    z->n_list = left;
}

static kvf_status run_step(kvf_session *s, bool tell, kvf_error *err)
{
    kvf_lazy *z = s->lazy;
    int64_t fresh = s->n_token - z->n;
    bool decode = fresh == 1 && z->n > 0, again = !decode || (z->plan.hold > 0 && z->since + 1 >= z->plan.hold);
    KVF_TRY(reserve(z, s->n_token, err));
    memcpy(z->level_was, z->level, (size_t)z->n);
    z->n_list = 0;
    for (int64_t i = 0; i < s->n_token; i++) {
        if (i >= z->n) {
            z->row[i] = -1;
            z->done[i] = z->gone[i] = 0;
            z->look[i] = 0;
        }
        if (again)
            z->level[i] = 1;
        else if (i >= z->n)
            z->level[i] = (uint8_t)z->plan.n;
        z->list[z->n_list++] = (int32_t)i;
    }
    if (tell) { /* a prompt: what an earlier answer looked at does not count */
        memset(z->look, 0, (size_t)s->n_token * sizeof *z->look);
        z->n_look = 0;
    }
    for (int32_t g = 0; g < z->plan.n; g++) {
        bool scored = again && g + 1 < z->plan.n;
        int64_t n_row = fresh < z->plan.score[g].n_row ? fresh : z->plan.score[g].n_row;
        if (n_row > s->n_batch) n_row = s->n_batch;
        KVF_TRY(run_stage(s, g, scored ? n_row : 0, tell, err));
        if (scored)
            KVF_TRY(choose(s, g, n_row, err));
        else
            follow(z, g);
    }
    z->since = again ? 0 : z->since + 1;
    return KVF_OK;
}

kvf_status kvf_lazy_step(kvf_session *s, bool tell, kvf_error *err)
{
    kvf_lazy *z = s->lazy;
    int64_t before = z->n;
    kvf_status rc = run_step(s, tell, err);
    if (rc < 0) {
        if (z->cap >= s->n_token) {
            memcpy(z->level, z->level_was, (size_t)before);
            z->n = s->n_token; /* so that the rows of new tokens are given back */
        }
        for (int64_t i = before; i < z->n; i++) /* what is thrown away does not count, as in n_run */
            if (z->done[i] > 0) z->n_layer_token -= z->stages[z->done[i] - 1].layer1;
        kvf_lazy_cut(s, before);
        if (s->policy->ops->forget) s->policy->ops->forget(s->policy, before);
        return rc;
    }
    s->n_run += s->n_token - before;
    z->n = s->n_token;
    s->has_logits = true;
    return KVF_OK;
}

kvf_status kvf_lazy_tracked(kvf_lazy *z, const float **mass, int64_t *n, kvf_error *err)
{
    *mass = NULL;
    *n = z->n_look > 0 ? (z->n + KVF_TRACK_TOKENS - 1) / KVF_TRACK_TOKENS : 0;
    if (*n == 0) return KVF_OK;
    void *runs = z->look_run;
    KVF_TRY(kvf_reserve(z->mem, &runs, &z->cap_look_run, *n, sizeof(float), err));
    z->look_run = runs;
    memset(z->look_run, 0, (size_t)*n * sizeof *z->look_run);
    for (int64_t i = 0; i < z->n; i++) z->look_run[i / KVF_TRACK_TOKENS] += z->look[i];
    *mass = z->look_run;
    return KVF_OK;
}

void kvf_lazy_get_counters(const kvf_lazy *z, kvf_lazy_counters *out)
{
    *out = (kvf_lazy_counters){ .n_layer_token = z->n_layer_token, .n_revived = z->n_revived,
                                .n_waiting = kvf_park_rows(z->park), .park_bytes = kvf_park_bytes(z->park),
                                .park_file_bytes = kvf_park_file_bytes(z->park) };
    for (int64_t i = 0; i < z->n; i++) out->n_done += z->done[i] == z->plan.n;
}

void kvf_lazy_reset_counters(kvf_lazy *z) { z->n_layer_token = z->n_revived = 0; }

int32_t kvf_lazy_frontier(const kvf_lazy *z, int64_t i) { return z->done[i]; }

int64_t kvf_lazy_held(const kvf_lazy *z, int32_t layer)
{
    int32_t g = 0;
    while (g + 1 < z->plan.n && layer >= z->stages[g].layer1) g++;
    return kvf_kv_held(z->stages[g].kv);
}
