/* kv_int.h - a sequence from inside: shared by kv.c (tables), kv_resident.c (which blocks are in the
 * pool), kv_digest.c (digests), kv_lookup.c (which units are read), kv_far.c (attention with a memory),
 * kv_order.c (attention in an order), kv_share.c (blocks that the host attends to), kv_evict.c (a budget of
 * tokens), kv_sparse.c and kv_sparse_digest.c (a memory of some tokens of a text).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_KV_KV_INT_H
#define KVF_KV_KV_INT_H

#include "base/half.h"
#include "kv/kv.h"

#define NO_SLOT (-1)

/* A slot list as the attention op wants it, and which blocks its entries are. */
typedef struct kvf_kv_list {
    int32_t *slots;
    uint8_t *valid;  /* [cap][2] */
    int64_t *blocks;
    int64_t n, cap;
    bool holes;      /* some entry is not a whole block */
} kvf_kv_list;

/* Slots for keys put in order, one layer's at a time. */
typedef struct kvf_kv_gathered {
    int32_t *slots;
    int64_t n, cap;
} kvf_kv_gathered;

/* What a sparse sequence knows beside that: which tokens of the text it holds. */
typedef struct kvf_sparse {
    int64_t n;            /* places below with a token */
    int32_t *pos;         /* [cap_pos] position in the text, by place */
    int32_t *place;       /* [cap_place] and back; NO_SLOT: not held */
    int64_t cap_pos, cap_place;
    uint8_t **digest;     /* [n_layer] [cap_digest] coarse, then fine digest of a block of the text */
    uint8_t **made;       /* [n_layer] [cap_digest] is the digest that of the tokens held? */
    int64_t cap_digest;
    kvf_kv_gathered window, near, units, block; /* block: one slot, a block of the text with its holes filled */
    int32_t *where, *first, *far; /* [cap_row] per query: its place among the window's keys, the first of them,
                                     its place among the near far keys */
    int64_t cap_row;
    float *vote;          /* [cap_vote] of the units of blocks that are there */
    int64_t cap_vote;
    float *score;         /* [n_layer][n_head][cap_score] by place: as kvf_far.score (reps) */
    float *seen;          /* [n_layer][cap_score] queries whose window the token was in */
    int64_t cap_score;
} kvf_sparse;
typedef struct kvf_stream kvf_stream;
typedef struct kvf_share kvf_share;

/* Everything a memory needs beside the tables of a plain sequence. */
typedef struct kvf_far {
    kvf_memory m;
    int32_t layer0;        /* the policy's number of the sequence's layer 0 */
    kvf_sparse *sparse;    /* NULL: places are positions */
    kvf_kv_rope rope[2];
    kvf_index_open_fn index_open;
    int32_t *layer_window; /* [n_layer] */
    int32_t *turned;       /* [n_layer][cap_block] rotated copies; NO_SLOT outside the window */

    /* Digests of blocks 0..n_digest of every layer. */
    size_t coarse_bytes, fine_bytes; /* of a block */
    bool reps;                       /* coarse and fine are representatives, written when units are sealed */
    int64_t n_digest;
    int64_t cap_digest;              /* blocks coarse has room for, cap_digest / 16 groups of fine */
    uint8_t **coarse;                /* [n_layer] [cap_digest][coarse_bytes] */
    int64_t *coarse_gap;             /* [n_layer] leading blocks whose coarse digests are only in the tier */
    uint8_t **fine;                  /* [n_layer][cap_group] [16][fine_bytes], NULL: in the tier */
    int64_t n_row_tier;              /* leading blocks whose fine digests are read from the tier */
    const uint8_t **tier_row;        /* [n_layer][cap_group] the tier's digests, NULL: not asked for yet */
    int64_t cap_group;
    const void **rows;               /* [cap_digest] argument of a vote */
    int64_t n_sealed;                /* units whose representatives are made (reps) */
    float *score;                    /* [2][n_layer][n_head][cap_score] column scores from token score0 on (reps),
                                        then what the reserved chunk adds to them */
    bool fresh;                      /* that is not all zero */
    int64_t score0, cap_score;
    kvf_index **index;               /* [n_layer] or NULL */
    int64_t checked;                 /* units at which the index's recall was last measured */
    int64_t n_found, n_sought;       /* of that measurement */

    kvf_tier *tier;
    int64_t n_tier;  /* leading tokens that the tier holds just as they are here */
    uint64_t epoch;  /* of tier_row */
    kvf_stream *stream; /* kv_stream.c; NULL until the first block comes */
    kvf_share *share;   /* kv_share.c; NULL: all blocks come to the device */
    void *landing;   /* host, a slot's bytes: between the tier and a device; NULL until the first */

    /* Blocks in the pool that could be fetched again, least recently used first. */
    int32_t *older, *newer; /* [cap_lru] by slot */
    int64_t *owner;         /* [cap_lru] layer * 2^40 + block, -1: not in the list */
    int64_t *tick;          /* [cap_lru] of last use */
    uint8_t *early;         /* [cap_lru] sent for and not read yet */
    int64_t cap_lru;
    int32_t oldest, newest;
    int64_t now;

    float *cos_sin[2];      /* backend memory [cap_angle][n_rot] of the chunk reserved */
    int64_t cap_angle;
    float *o2, *lse, *lse2; /* backend memory for cap_row queries */
    int64_t cap_row;
    kvf_kv_list list;
    uint8_t *use;           /* [n_set][cap_use] units */
    int64_t cap_use;
    float *vote;            /* scratch for index checks */
    int64_t cap_vote;
} kvf_far;

/* Where one query looked, call of attention by call, until the last is merged. */
typedef struct kvf_look_call {
    int64_t run, block, n_entry; /* its first of kvf_look.runs and block; entries of its list */
    int32_t head0, head1;        /* query heads it computed */
} kvf_look_call;

typedef struct kvf_look {
    bool on;
    kvf_look_call *call;
    float *runs;    /* of each call [n_head][n_entry][KVF_BLOCK / KVF_ATTN_RUN] */
    int64_t *block; /* of each call [n_entry] */
    float *lse;     /* host, [n_call + 1][n_head]: the last are those of all calls together */
    int64_t n_call, cap_call, n_run, cap_run, n_block, cap_block, cap_lse;
} kvf_look;

struct kvf_kv {
    kvf_pool *pool;
    kvf_backend *backend;
    kvf_dims dims;
    int64_t n_key;    /* committed tokens that are held */
    int64_t n_block;  /* slots per layer, committed and reserved */
    int64_t cap_block;
    int32_t *slots;   /* [n_layer][cap_block]; with a memory raw keys, NO_SLOT: only in the tier */
    uint8_t *use;     /* [cap_block] the policy's answer */
    int32_t *chosen;  /* [cap_block] slots of the blocks it chose */
    int64_t *chosen_block; /* [cap_block] and which they are */
    kvf_far *far;     /* NULL: a plain sequence */
    const kvf_kv_order *order; /* borrowed, NULL: everything as it stands */
    kvf_kv_gathered gathered;
    int64_t n_gone, gone_at; /* tokens of the text evicted, and its length then */
    int32_t *stay;           /* [n_layer][n_head_kv][budget] places to keep, of layers with stay_done */
    uint8_t *stay_done;      /* [n_layer] */
    kvf_f16 *stay_slot;      /* host, one head's keys of a block */
    float *head_mass;        /* [n_head][keys] */
    int64_t cap_stay, cap_head_mass;
    kvf_kv_counters count;

    bool track;
    float *mass;      /* [cap_mass] per run of KVF_TRACK_TOKENS tokens, from last queries */
    float *prior;     /* [cap_prior] the same from the first query of the first chunk noted */
    float *noted;     /* [cap_noted] what kvf_kv_tracked hands out */
    int64_t n_mass, cap_mass, cap_prior, cap_noted;
    int64_t n_last;   /* last queries noted, whole chunks */
    float *mass_row;  /* scratch, one per key of a list */
    int64_t cap_mass_row;
    float *peak;      /* [n_head][keys] mass by heads, of a chunk and layer */
    int64_t cap_peak;
    float *mass_lse;  /* backend memory [cap_mass_lse][n_head] (a plain sequence) */
    int64_t cap_mass_lse;
    kvf_look look;
};

static inline int64_t kvf_blocks_for(int64_t n_tok) { return (n_tok + KVF_BLOCK - 1) >> KVF_BLOCK_SHIFT; }
static inline int32_t *kvf_layer_slots(const kvf_kv *kv, int32_t layer) { return kv->slots + layer * kv->cap_block; }
static inline int32_t *kvf_layer_turned(const kvf_kv *kv, int32_t layer)
{
    return kv->far->turned + layer * kv->cap_block;
}
static inline const kvf_mem *kvf_kv_mem(const kvf_kv *kv) { return kv->backend->mem; }

/* First token that a query at position `pos` sees in the layer's window. */
static inline int64_t kvf_window_first(const kvf_far *f, int32_t layer, int64_t pos)
{
    int64_t w = f->layer_window[layer] > 0 ? f->layer_window[layer] : f->m.window;
    return pos - w + 1 > 0 ? pos - w + 1 : 0;
}

/* End of the units, tokens, when the sequence holds n tokens: what follows is the rest and the window. */
static inline int64_t kvf_units_end(const kvf_memory *m, int64_t n)
{
    if (n < m->init + m->window + m->unit) return m->init;
    return m->init + (n - m->init - m->window) / m->unit * m->unit;
}

/* ---- kv_resident.c ---- */
kvf_status kvf_far_open(kvf_kv *kv, const kvf_kv_memory_params *p, kvf_error *err);
void kvf_far_close(kvf_kv *kv);
kvf_status kvf_far_fork(kvf_kv *to, const kvf_kv *from, kvf_error *err);
/* Take a slot, evicting one if the pool is full. */
kvf_status kvf_far_take(kvf_kv *kv, int32_t *slot, kvf_error *err);
/* Can n slots be had, by eviction too? */
kvf_status kvf_far_can_take(const kvf_kv *kv, int64_t n, kvf_error *err);
/* The raw block is in the pool, most recently used. *missed if it had to be fetched; may be NULL. */
kvf_status kvf_far_fetch(kvf_kv *kv, int32_t layer, int64_t block, bool *missed, kvf_error *err);
/* Raw tail block and rotated copies of the window for a query at n_key; then angles for n_tok tokens. */
kvf_status kvf_far_prepare(kvf_kv *kv, int64_t n_tok, kvf_error *err);
void kvf_far_drop_window(kvf_kv *kv);              /* copies that no later query sees */
void kvf_far_drop_block(kvf_kv *kv, int64_t block); /* both tables, all layers */
void kvf_far_release_clean(kvf_kv *kv, int64_t from, int64_t to); /* blocks the tier holds now */
void kvf_far_lru_remove(kvf_kv *kv, int32_t slot);

/* Blocks that will be asked for: those in the pool stay, the others come, as far as there is room. */
kvf_status kvf_far_send_for(kvf_kv *kv, int32_t layer, const int64_t *blocks, int64_t n, kvf_error *err);

/* ---- kv_stream.c ---- */
bool kvf_stream_serves(const kvf_kv *kv); /* the backend copies beside its ops */
void kvf_stream_close(kvf_kv *kv);
void kvf_stream_forget(kvf_kv *kv);       /* the tier is another one */
/* Begin copying a block of the tier to a slot. */
kvf_status kvf_stream_bring(kvf_kv *kv, int32_t layer, int64_t block, void *slot, kvf_error *err);
kvf_status kvf_stream_settle(kvf_kv *kv, kvf_error *err); /* ops from now on find what was brought */
/* The blocks a layer reads in this step; forget those of the step before. */
kvf_status kvf_stream_note(kvf_kv *kv, int32_t layer, const int64_t *blocks, int64_t n, kvf_error *err);
void kvf_stream_unnote(kvf_kv *kv, int32_t layer);
/* Send for what the layer after this one read in the step before. */
kvf_status kvf_stream_ahead(kvf_kv *kv, int32_t layer, kvf_error *err);

/* The frame that holds a block of the tier, brought there if need be; it keeps the block until let_go. NULL: all frames
 * are held. */
kvf_status kvf_stream_hold(kvf_kv *kv, int32_t layer, int64_t block, void **frame, kvf_error *err);
void kvf_stream_let_go(kvf_kv *kv);

/* ---- kv_share.c ---- */
void kvf_share_close(kvf_kv *kv);
int32_t kvf_share_percent(const kvf_kv *kv);
/* Does the host take a part of this call? Then, in this order: begin; for each list of units split, take_queries if any
 * stay, the device's attention, attend; hand_over, and where *any a merge of o2 and lse2. */
bool kvf_share_serves(const kvf_kv *kv, const kvf_kv_attend_args *a);
void kvf_share_begin(kvf_kv *kv);
kvf_status kvf_share_split(kvf_kv *kv, int32_t layer, kvf_error *err); /* far->list loses the entries that stay */
bool kvf_share_left(const kvf_kv *kv);
kvf_status kvf_share_take_queries(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err);
kvf_status kvf_share_attend(kvf_kv *kv, const kvf_kv_attend_args *a, int32_t set, kvf_error *err);
kvf_status kvf_share_hand_over(kvf_kv *kv, const kvf_kv_attend_args *a, bool *any, kvf_error *err);

/* ---- kv_digest.c ---- */
kvf_status kvf_far_digest(kvf_kv *kv, kvf_error *err); /* of blocks that became whole */
void kvf_far_digest_cut(kvf_kv *kv, int64_t n_tok);
void kvf_far_digest_forget(kvf_kv *kv); /* the tier is another one, or has moved: pointers into it are void */
bool kvf_far_digests_in_tier(const kvf_kv *kv); /* some are there alone */
void kvf_far_digest_close(kvf_kv *kv);
kvf_status kvf_far_digest_fork(kvf_kv *to, const kvf_kv *from, kvf_error *err);
kvf_status kvf_far_digest_loaded(kvf_kv *kv, kvf_error *err); /* all of them are in the tier */
kvf_status kvf_far_digest_export(kvf_kv *kv, int64_t first, int64_t end, void *out, kvf_error *err);
void kvf_far_digest_release(kvf_kv *kv);               /* fine ones that the tier holds by now */
size_t kvf_far_digest_memory(const kvf_kv *kv);
/* Add column sums mass [n_head][n_entry * KVF_BLOCK] of blocks first_block.. to the scores. */
kvf_status kvf_far_score(kvf_kv *kv, int32_t layer, const float *mass, int64_t first_block, int64_t n_entry,
                         kvf_error *err);
void kvf_far_score_drop(kvf_kv *kv); /* what a chunk added that is not committed */
kvf_status kvf_far_seal(kvf_kv *kv, kvf_error *err);
/* All coarse digests of a layer are in far->coarse; the fine one of a block, valid while the tier is held. */
kvf_status kvf_digest_coarse(kvf_kv *kv, int32_t layer, kvf_error *err);
kvf_status kvf_digest_fine(kvf_kv *kv, int32_t layer, int64_t block, const void **out, kvf_error *err);

/* ---- kv_lookup.c ---- */
/* Which units does the policy want? far->use [n_set][n_unit] is set. */
typedef struct kvf_lookup {
    kvf_kv *kv;
    const kvf_kv_attend_args *a;
    const float *lse; /* of window, init and rest */
    int64_t unit0, n_unit;
    int64_t n_past;   /* tokens of the text before the chunk */
} kvf_lookup;
kvf_status kvf_far_lookup(kvf_lookup *l, kvf_error *err);

/* ---- kv_order.c ---- */
kvf_status kvf_order_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err);
/* The keys at n places of list src into slots for them; slots that a shorter list leaves over are given back. */
kvf_status kvf_kv_gather_into(kvf_kv *kv, kvf_kv_gathered *to, const int32_t *src, const int32_t *places, int64_t n,
                              kvf_error *err);
kvf_status kvf_gathered_reserve(kvf_kv *kv, kvf_kv_gathered *to, int64_t n, kvf_error *err);
void kvf_gathered_release(kvf_kv *kv, kvf_kv_gathered *g);
void kvf_order_release(kvf_kv *kv);
/* The attention call of a plain sequence without its keys. */
kvf_attn_args kvf_plain_call(const kvf_kv *kv, const kvf_kv_attend_args *a);

/* ---- kv_evict.c ---- */
/* After the attention t of a layer: show it to a policy that evicts. */
kvf_status kvf_evict_ask(kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_attn_args *t, kvf_error *err);
void kvf_evict_release(kvf_kv *kv);
void kvf_kv_drop_places(kvf_kv *kv, int64_t n); /* all but the first n places of a plain sequence */

/* ---- kv_far.c ---- */
kvf_status kvf_far_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err);
/* Add the last query's attention over a list to the noted one (kv->track). */
typedef struct kvf_kv_note {
    const kvf_attn_args *attn; /* of all queries; lse is final */
    const int64_t *blocks;     /* of the list's entries; NULL: first_block + entry */
    int64_t first_block, n_entry;
} kvf_kv_note;
kvf_status kvf_kv_note_mass(kvf_kv *kv, const kvf_kv_note *n, kvf_error *err);
/* The same of a layer's one query by its calls of attention (look.on says whether): begin, look_attn for every call,
 * with the blocks of its list (NULL: first_block on), end with the lse of them all, backend memory. */
void kvf_look_begin(kvf_kv *kv, int64_t n_q, bool track);
kvf_status kvf_look_attn(kvf_kv *kv, kvf_attn_args *t, const int64_t *blocks, int64_t first_block, kvf_error *err);
kvf_status kvf_look_end(kvf_kv *kv, const float *lse, kvf_error *err);
void kvf_look_release(kvf_kv *kv);
kvf_status kvf_mass_lse(kvf_kv *kv, int64_t n_q, float **lse, kvf_error *err);
kvf_status kvf_list_reserve(kvf_kv *kv, int64_t n, kvf_error *err);
kvf_status kvf_far_rows(kvf_kv *kv, int64_t n, kvf_error *err); /* o2, lse, lse2 for n queries */
kvf_status kvf_mass_row(kvf_kv *kv, int64_t n, kvf_error *err); /* mass_row for n keys, zero */
/* Attention of the queries of t, to mass_row: summed over the heads, or by heads if a wants the peak. */
kvf_status kvf_mass_of(kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_attn_args *t, kvf_error *err);
/* Of that, keys j0..j1 to a->mass, where the list's key 0 is key `base`. */
void kvf_mass_add(const kvf_kv *kv, const kvf_kv_attend_args *a, const kvf_attn_args *t, int64_t j0, int64_t j1, int64_t base);
/* kvf_kv_attend with mass_peak: sums for each head, of which the highest counts. */
kvf_status kvf_peak_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err);
kvf_status kvf_any_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err);

/* ---- kv_sparse.c ---- */
kvf_status kvf_sparse_open(kvf_kv *kv, kvf_error *err);
void kvf_sparse_close(kvf_kv *kv);
kvf_status kvf_sparse_prepare(kvf_kv *kv, int64_t n_tok, kvf_error *err); /* room for the arranged chunk */
void kvf_sparse_commit(kvf_kv *kv, int64_t n_tok);
void kvf_sparse_cut(kvf_kv *kv, int64_t n);                              /* places n and later are forgotten */
void kvf_sparse_compact(kvf_kv *kv, const int32_t *places, int64_t n);
kvf_status kvf_sparse_attend(kvf_kv *kv, const kvf_kv_attend_args *a, kvf_error *err);
/* Keys of an order before position p. */
int64_t kvf_order_before(const kvf_kv_order *o, int64_t p);

/* ---- kv_sparse_digest.c ---- */
kvf_status kvf_sparse_vote(kvf_lookup *l, bool fine, const kvf_vote_rule *rule, float *votes, kvf_error *err);
size_t kvf_sparse_digest_memory(const kvf_kv *kv);

#endif
