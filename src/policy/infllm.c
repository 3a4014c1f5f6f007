/* infllm.c - a memory of all that was read, of which each layer reads a few units.
 *
 * Xiao et al., InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context
 * Memory, arXiv:2402.04617, sec. 3: first tokens, a sliding window and the topk units of the rest that
 * match the queries best; far units are read at one distance. This file: options and what they ask of
 * the KV manager; infllm_lookup.c chooses.
 * Differs from the paper (docs/methods/README.md, "infllm"): select=paper is the published rule, with the
 * fixed window mask; the default scores every token of a unit on a low-bit copy of its key, because on
 * small models the published representatives miss what a later question asks for.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "policy/infllm_int.h"

#include <string.h>

enum { UNITS_MAX = 1 << 20 }; /* the options' bound */
enum { UNIT_TOKENS = 2048 }; /* read in units unless said: the paper's 16 of 128 */

static const kvf_option infllm_options[] = {
    KVF_OPT_I64(infllm, init, 128, 0, 1 << 20, "first tokens always read; a multiple of block"),
    KVF_OPT_I64(infllm, window, 0, 0, 1 << 24,
                "most recent tokens always read, 128 or more and at least chunk; 0: 2048, with select=paper 4096"),
    KVF_OPT_I64(infllm, block, 0, 0, 128, "tokens of a unit: 16, 32, 64 or 128; 0: 32, with select=paper 128"),
    KVF_OPT_I64(infllm, topk, -1, -1, UNITS_MAX, "units read beside first tokens and window; -1: 2048 tokens' worth"),
    KVF_OPT_I64(infllm, ask, 0, 0, UNITS_MAX, "as topk, for questions and answers; 0: topk"),
    KVF_OPT_I64(infllm, repr, 4, 1, 128, "select=paper: representative tokens of a unit"),
    KVF_OPT_I64(infllm, chunk, 512, 16, 2048, "tokens read at once, a power of two"),
    KVF_OPT_CHOICE(infllm, select, SELECT_BITS, "bits|mean|sub|bounds|paper",
                   "score of a unit: best token on low-bit keys, its mean key, best mean of sub tokens, best "
                   "bounds of sub tokens, published representatives"),
    KVF_OPT_I64(infllm, bits, 2, 1, 4, "select=bits: bits of a key's element, 1, 2 or 4"),
    KVF_OPT_I64(infllm, sub, 8, 4, 128, "select=sub, bounds: tokens of one vector, a power of two"),
    KVF_OPT_CHOICE(infllm, vote, VOTE_AUTO, "auto|gate|soft|lin",
                   "a head's vote: share beside what it reads anyway, share among units, score; auto: gate, "
                   "with select=paper lin"),
    KVF_OPT_CHOICE(infllm, agg, AGG_AUTO, "auto|max|mean",
                   "over the queries of a chunk; auto: max, with select=paper mean"),
    KVF_OPT_F64(infllm, decay, -1, -1, 1,
                "share of a vote that counts on per token of an answer; -1: 0.9, with select=paper 0"),
    KVF_OPT_I64(infllm, hold, 0, 0, 256,
                "tokens of an answer for which a layer keeps its units; 0: 24, with select=paper 1"),
    KVF_OPT_CHOICE(infllm, sets, SETS_SHARED, "shared|kv", "one set of units per layer, or per KV head"),
    KVF_OPT_I64(infllm, exact, 128, 0, 2048,
                "longest chunk of a question that chooses as an answer does; a longer one as reading does"),
    KVF_OPT_CHOICE(infllm, reading, READING_AUTO, "auto|mean|none|fine",
                   "how the chunks of a document choose: by mean keys, not at all, as an answer; auto: "
                   "mean, with select=paper fine"),
    KVF_OPT_I64(infllm, pool, 0, 0, 2048,
                "queries averaged to one when reading; 0: 64, with select=paper chunk"),
    KVF_OPT_F64(infllm, floor, 0, 0, 1000000, "least vote of a unit that is read; 0: none"),
    KVF_OPT_I64(infllm, neighbours, 0, 0, 1, "1: also the units before and after a hit, within topk or ask"),
    KVF_OPT_CHOICE(infllm, reps, REPS_GROUP, "group|head",
                   "select=paper: representatives per KV head, or per query head"),
    KVF_OPT_TEXT(infllm, index, "flat", "flat, or a FAISS factory string with + for the comma"),
    KVF_OPT_F64(infllm, recall, 0.95, 0, 1, "least share of the best units that an index must find"),
    { 0 },
};

static bool is_pow2(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

/* ---- what options mean together ---- */

static kvf_status check_sizes(const infllm *s, kvf_error *err)
{
    if (!is_pow2(s->block) || s->block < 16)
        return kvf_fail(err, KVF_ERR_ARG, "infllm: block=%d is no unit of the cache; use 16, 32, 64 or 128",
                        (int)s->block);
    if (!is_pow2(s->chunk))
        return kvf_fail(err, KVF_ERR_ARG,
                        "infllm: chunk=%d does not divide a stored group; use a power of two, 16 to 2048",
                        (int)s->chunk);
    if (s->window < 128)
        return kvf_fail(err, KVF_ERR_ARG, "infllm: window=%d is shorter than a block of the cache; use 128 or more",
                        (int)s->window);
    if (s->window < s->chunk)
        return kvf_fail(err, KVF_ERR_ARG,
                        "infllm: window=%d is shorter than a chunk of %d; raise window or lower chunk",
                        (int)s->window, (int)s->chunk);
    if (s->init % s->block)
        return kvf_fail(
            err, KVF_ERR_ARG,
            "infllm: init=%d is no multiple of block=%d, so units would start inside one; use init=%d",
            (int)s->init, (int)s->block, (int)((s->init / s->block + 1) * s->block));
    if (!is_pow2(s->bits))
        return kvf_fail(err, KVF_ERR_ARG, "infllm: bits=%d do not pack into bytes; use 1, 2 or 4",
                        (int)s->bits);
    if (!is_pow2(s->sub))
        return kvf_fail(err, KVF_ERR_ARG,
                        "infllm: sub=%d does not divide a unit; use a power of two, 4 to block", (int)s->sub);
    if ((s->select == SELECT_SUB || s->select == SELECT_BOUNDS) && s->sub > s->block)
        return kvf_fail(err, KVF_ERR_ARG,
                        "infllm: sub=%d is longer than a unit of block=%d; lower sub or raise block",
                        (int)s->sub, (int)s->block);
    if (s->select == SELECT_PAPER && s->repr > s->block)
        return kvf_fail(err, KVF_ERR_ARG,
                        "infllm: repr=%d representatives do not fit a unit of block=%d; lower repr",
                        (int)s->repr, (int)s->block);
    return KVF_OK;
}

static void settle(infllm *s)
{
    bool paper = s->select == SELECT_PAPER;
    if (s->vote == VOTE_AUTO) s->vote = paper ? VOTE_LIN : VOTE_GATE;
    if (s->agg == AGG_AUTO) s->agg = paper ? AGG_MEAN : AGG_MAX;
    if (s->reading == READING_AUTO) s->reading = paper ? READING_FINE : READING_MEAN;
    if (s->decay < 0) s->decay = paper ? 0 : 0.9;
    if (s->hold == 0) s->hold = paper ? 1 : 24;
    if (s->pool == 0) s->pool = paper ? s->chunk : 64;
    /* A shorter window and finer units than the paper's: of fewer tokens, more that a layer looks at (docs/memory.md,
     * "Where it falls short"). */
    if (s->window == 0) s->window = paper ? 4096 : 2048;
    if (s->block == 0) s->block = paper ? 128 : 32;
    if (s->topk < 0) s->topk = UNIT_TOKENS / s->block;
    if (s->ask == 0) s->ask = s->topk;
}

static kvf_status check_paper(const infllm *s, kvf_error *err)
{
    static const char *const rule =
        "infllm: select=paper is the published rule, %s; leave %s out or choose another select";
    if (s->select != SELECT_PAPER) {
        if (s->reps == REPS_HEAD)
            return kvf_fail(err, KVF_ERR_ARG,
                            "infllm: reps=head means the representatives that only select=paper has; "
                            "add select=paper or leave reps out");
        return KVF_OK;
    }
    if (s->vote != VOTE_LIN) return kvf_fail(err, KVF_ERR_ARG, rule, "which sums scores (vote=lin)", "vote");
    if (s->agg != AGG_MEAN)
        return kvf_fail(err, KVF_ERR_ARG, rule, "which takes the mean query (agg=mean)", "agg");
    if (s->pool != s->chunk)
        return kvf_fail(err, KVF_ERR_ARG, rule, "which averages all queries of a chunk", "pool");
    if (s->reading == READING_MEAN)
        return kvf_fail(err, KVF_ERR_ARG, rule,
                        "which reads by the same representatives (reading=fine, or none)", "reading");
    return KVF_OK;
}

static kvf_status check_index(const infllm *s, kvf_error *err)
{
    bool paper = s->select == SELECT_PAPER;
    if (!infllm_has_index(s)) return KVF_OK;
    if (s->sets == SETS_KV)
        return kvf_fail(err, KVF_ERR_ARG,
                        "infllm: index=%s answers for all heads of a layer; use sets=shared or index=flat",
                        s->index);
    if (s->reading == READING_NONE || (!paper && s->reading != READING_MEAN))
        return kvf_fail(err, KVF_ERR_ARG,
                        "infllm: index=%s holds the vectors that reading looks at, and there are none; "
                        "use reading=mean, select=paper or index=flat",
                        s->index);
    if (s->floor > 0)
        return kvf_fail(err, KVF_ERR_ARG,
                        "infllm: index=%s names units without votes, so none can be below floor; "
                        "use floor=0 or index=flat",
                        s->index);
    if (paper && s->decay > 0)
        return kvf_fail(
            err, KVF_ERR_ARG,
            "infllm: index=%s names units without votes, so none can decay; use decay=0 or index=flat",
            s->index);
    return KVF_OK;
}

/* ---- layouts ---- */

static kvf_digest digest_of(const kvf_policy *p, kvf_digest_kind kind, int64_t sub)
{
    const infllm *s = p->state;
    kvf_digest g = { .kind = kind,
                     .sub = (int32_t)sub,
                     .n_head = p->dims.n_head,
                     .n_head_kv = p->dims.n_head_kv,
                     .head_dim = p->dims.head_dim };
    if (kind == KVF_DIGEST_BITS) g.bits = (int32_t)s->bits;
    if (kind == KVF_DIGEST_REPS) g.reps_per_q_head = s->reps == REPS_HEAD;
    return g;
}

static void infllm_memory(const kvf_policy *p, kvf_memory *m)
{
    const infllm *s = p->state;
    static const kvf_digest_kind kinds[] = { KVF_DIGEST_BITS, KVF_DIGEST_MEAN, KVF_DIGEST_MEAN,
                                             KVF_DIGEST_BOUNDS, KVF_DIGEST_REPS };
    bool by_sub = s->select == SELECT_SUB || s->select == SELECT_BOUNDS;
    *m = (kvf_memory){ .init = s->init,
                       .window = s->window,
                       .unit = (int32_t)s->block,
                       .n_chunk = (int32_t)s->chunk,
                       .n_unit = s->ask > s->topk ? s->ask : s->topk,
                       .n_set = s->sets == SETS_KV ? p->dims.n_head_kv : 1 };
    m->fine = digest_of(p, kinds[s->select], by_sub ? s->sub : s->block);
    m->coarse = digest_of(p, s->reading == READING_MEAN ? KVF_DIGEST_MEAN : KVF_DIGEST_NONE, s->block);
    if (s->select == SELECT_PAPER) { /* one layout for both, kept once by the KV manager */
        m->n_repr = (int32_t)s->repr;
        m->coarse = m->fine;
    }
    if (infllm_has_index(s)) memcpy(m->index, s->index, sizeof m->index);
    m->recall = s->recall;
}

static kvf_status check_digests(const kvf_policy *p, kvf_error *err)
{
    kvf_memory m;
    infllm_memory(p, &m);
    if (kvf_digest_valid(&m.coarse) && kvf_digest_valid(&m.fine)) return KVF_OK;
    return kvf_fail(
        err, KVF_ERR_ARG, "infllm: heads of %d elements do not fit the layout of select%s; use %s",
        (int)p->dims.head_dim, m.fine.kind == KVF_DIGEST_BITS ? "=bits" : "",
        m.fine.kind == KVF_DIGEST_BITS ? "bits=4 or select=sub" : "another policy for this model");
}

/* ---- the policy ---- */

static kvf_status infllm_init(kvf_policy *p, kvf_error *err)
{
    infllm *s = p->state;
    settle(s);
    KVF_TRY(check_sizes(s, err));
    KVF_TRY(check_paper(s, err));
    KVF_TRY(check_index(s, err));
    KVF_TRY(check_digests(p, err));
    s->n_layer = p->dims.n_layer;
    s->n_set = s->sets == SETS_KV ? p->dims.n_head_kv : 1;
    void *layers;
    KVF_TRY(kvf_mem_get(p->mem, &layers, (size_t)s->n_layer, sizeof *s->layers, err));
    s->layers = layers;
    return KVF_OK;
}

static void infllm_fini(kvf_policy *p)
{
    infllm *s = p->state;
    for (int32_t i = 0; i < s->n_layer; i++) {
        kvf_free(p->mem, s->layers[i].vote);
        kvf_free(p->mem, s->layers[i].pick);
    }
    kvf_free(p->mem, s->layers);
    kvf_free(p->mem, s->fresh);
    kvf_free(p->mem, s->hits);
    kvf_free(p->mem, s->near);
}

static void add_row(kvf_option *rows, int *n, const char *name)
{
    for (const kvf_option *o = infllm_options; o->name; o++)
        if (strcmp(o->name, name) == 0) rows[(*n)++] = *o;
}

/* A spec itself, of the options that decide keys, values and digests while a document is read: an
 * answer's options are left out, so a stored document may be asked with others. */
static void infllm_identity(const kvf_policy *p, char *out, size_t cap)
{
    static const char *const by_select[][2] = {
        { "bits" }, { NULL }, { "sub" }, { "sub" }, { "repr", "reps" }
    };
    static const char *const always[] = { "init", "window", "block", "chunk", "select", "reading" };
    const infllm *s = p->state;
    infllm_lookup how = kvf_infllm_lookup_for(s, s->chunk, true);
    kvf_option rows[sizeof infllm_options / sizeof *infllm_options] = { 0 };
    int n = 0;
    for (size_t i = 0; i < sizeof always / sizeof *always; i++) add_row(rows, &n, always[i]);
    for (int i = 0; i < 2 && by_select[s->select][i]; i++) add_row(rows, &n, by_select[s->select][i]);
    if (s->reading != READING_NONE) add_row(rows, &n, "topk");
    if (how.any) {
        add_row(rows, &n, "neighbours");
        if (how.nearest) {
            add_row(rows, &n, "index");
        } else {
            add_row(rows, &n, "sets");
            add_row(rows, &n, "floor");
        }
        if (!how.nearest && s->select != SELECT_PAPER) {
            add_row(rows, &n, "vote");
            add_row(rows, &n, "agg");
            add_row(rows, &n, "pool");
        }
    }
    static const char name[] = "infllm:";
    size_t head = sizeof name - 1 < cap ? sizeof name - 1 : cap ? cap - 1 : 0;
    memcpy(out, name, head);
    kvf_options_print(rows, s, out + head, cap - head);
}

const kvf_policy_ops kvf_policy_infllm = {
    .abi = KVF_POLICY_ABI,
    .name = "infllm",
    .source = "Xiao et al. 2024, arXiv:2402.04617",
    .help = "first tokens, a window, and the units of a memory that match best (InfLLM)",
    .options = infllm_options,
    .state_size = sizeof(infllm),
    .init = infllm_init,
    .fini = infllm_fini,
    .memory = infllm_memory,
    .retrieve = kvf_infllm_retrieve,
    .forget = kvf_infllm_forget,
    .identity = infllm_identity,
};
