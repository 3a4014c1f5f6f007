/* chain.c - several policies as one: "infllm:topk=8+lazyllm:preset=fast", "holitom+lazyllm".
 *
 * One member at most is a memory; of those that cut the layers into stages each has its own boundaries, and is
 * asked at those. Members that decide the same, or exclude each other (policy.h), are refused. A '+' joins only where
 * the name of a policy follows it, since it may also stand in the value of an option.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "policy/policy.h"

#include <stdio.h>
#include <string.h>

enum { MAX_MEMBER = 4 };

typedef struct chain {
    kvf_policy_ops ops;
    int32_t n;
    kvf_policy *member[MAX_MEMBER]; /* owned */
    kvf_policy *memory;             /* of them, or NULL */

    int32_t n_stages;               /* members with stages */
    kvf_policy *stages[MAX_MEMBER];
    kvf_stages plan;                /* of all of them: every boundary is one member's */
    uint8_t owner[KVF_STAGES_MAX];  /* by the stage that ends: place in stages */
    uint8_t own_stage[KVF_STAGES_MAX]; /* and what the member calls it */
} chain;

static chain *of(const kvf_policy *p) { return p->state; }

static void chain_memory(const kvf_policy *p, kvf_memory *m) { of(p)->memory->ops->memory(of(p)->memory, m); }

static kvf_status chain_retrieve(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *err)
{
    return of(p)->memory->ops->retrieve(of(p)->memory, r, use, err);
}

static void chain_forget(kvf_policy *p, int64_t n)
{
    for (int32_t i = 0; i < of(p)->n; i++)
        if (of(p)->member[i]->ops->forget) of(p)->member[i]->ops->forget(of(p)->member[i], n);
}

static void chain_identity(const kvf_policy *p, char *out, size_t cap)
{
    of(p)->memory->ops->identity(of(p)->memory, out, cap);
}

static void chain_stages(const kvf_policy *p, kvf_stages *s) { *s = of(p)->plan; }

static kvf_status chain_keep(kvf_policy *p, const kvf_keep *k, uint8_t *keep, kvf_error *err)
{
    chain *c = of(p);
    kvf_policy *member = c->stages[c->owner[k->stage]];
    kvf_keep own = *k;
    own.stage = c->own_stage[k->stage];
    return member->ops->keep(member, &own, keep, err);
}

static void chain_print(const kvf_policy *p, char *out, size_t cap)
{
    size_t at = 0;
    for (int32_t i = 0; i < of(p)->n && at + 1 < cap; i++) {
        if (i > 0) out[at++] = '+';
        kvf_policy_print(of(p)->member[i], out + at, cap - at);
        at += strlen(out + at);
    }
}

static void chain_fini(kvf_policy *p)
{
    for (int32_t i = 0; i < of(p)->n; i++) kvf_policy_close(of(p)->member[i]);
}

/* Does the member decide something that a chain can carry out, and nobody before it the same? */
static kvf_status join(chain *c, kvf_policy *p, kvf_error *err)
{
    const kvf_policy_ops *o = p->ops;
    if (!o->memory && !o->stages)
        return kvf_fail(err, KVF_ERR_ARG,
                        "policy %s cannot be part of a chain: it is neither a memory (infllm) nor prunes tokens between layers "
                        "(lazyllm); use it alone",
                        o->name);
    kvf_policy *other = o->memory ? c->memory : NULL;
    for (int32_t i = 0; i < c->n_stages; i++)
        if (c->stages[i]->ops == o) other = c->stages[i];
    if (other)
        return kvf_fail(err, KVF_ERR_ARG, "policies %s and %s of the chain decide the same; leave one of them out",
                        other->ops->name, o->name);
    if (o->memory) c->memory = p;
    if (o->stages) c->stages[c->n_stages++] = p;
    return KVF_OK;
}

/* One boundary of member `own` into the plan, in the order of layers. */
static kvf_status add_boundary(chain *c, int32_t own, const kvf_stages *s, int32_t stage, kvf_error *err)
{
    kvf_stages *all = &c->plan;
    int32_t layer = s->first[stage + 1], at = all->n;
    if (at == KVF_STAGES_MAX) return kvf_fail(err, KVF_ERR_ARG, "the chain cuts the layers into more than %d stages", KVF_STAGES_MAX);
    while (at > 1 && all->first[at - 1] > layer) at--;
    if (at > 1 && all->first[at - 1] == layer)
        return kvf_fail(err, KVF_ERR_ARG, "policies %s and %s of the chain both end a stage before layer %d; move one of them",
                        c->stages[c->owner[at - 2]]->ops->name, c->stages[own]->ops->name, layer);
    for (int32_t i = all->n; i > at; i--) {
        all->first[i] = all->first[i - 1];
        all->score[i - 1] = all->score[i - 2];
        all->fold[i - 1] = all->fold[i - 2];
        c->owner[i - 1] = c->owner[i - 2];
        c->own_stage[i - 1] = c->own_stage[i - 2];
    }
    all->first[at] = layer;
    all->score[at - 1] = s->score[stage];
    all->fold[at - 1] = s->fold[stage];
    c->owner[at - 1] = (uint8_t)own;
    c->own_stage[at - 1] = (uint8_t)stage;
    all->n++;
    return KVF_OK;
}

/* Stages of all members together. Decode steps choose again when any member wants it. */
static kvf_status plan_stages(chain *c, kvf_error *err)
{
    c->plan = (kvf_stages){ .n = 1, .park = "" };
    for (int32_t m = 0; m < c->n_stages; m++) {
        kvf_stages s;
        c->stages[m]->ops->stages(c->stages[m], &s);
        for (int32_t g = 0; g + 1 < s.n; g++) KVF_TRY(add_boundary(c, m, &s, g, err));
        if (s.hold > 0 && (c->plan.hold == 0 || s.hold < c->plan.hold)) c->plan.hold = s.hold;
        if (s.park[0]) c->plan.park = s.park;
    }
    return KVF_OK;
}

static kvf_status check_together(const chain *c, kvf_error *err)
{
    kvf_memory m;
    if (!c->memory) return KVF_OK;
    c->memory->ops->memory(c->memory, &m);
    if (!m.index[0]) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG,
                    "an index holds the units of a text that every layer reads in full, and %s leaves tokens out; use index=flat, or "
                    "%s alone",
                    c->stages[0]->ops->name, c->memory->ops->name);
}

/* Where the spec's first policy ends. */
static size_t first_end(const char *spec)
{
    for (const char *p = strchr(spec, '+'); p; p = strchr(p + 1, '+')) {
        size_t n = strcspn(p + 1, ":+");
        for (int64_t i = 0; kvf_policy_at(i); i++)
            if (strlen(kvf_policy_at(i)->name) == n && memcmp(kvf_policy_at(i)->name, p + 1, n) == 0) return (size_t)(p - spec);
    }
    return strlen(spec);
}

bool kvf_policy_is_chain(const char *spec) { return spec[first_end(spec)] == '+'; }

static kvf_status open_members(chain *c, const char *spec, kvf_dims dims, const kvf_mem *mem, kvf_error *err)
{
    for (const char *at = spec;; at++) {
        size_t n = first_end(at);
        void *text;
        if (c->n == MAX_MEMBER) return kvf_fail(err, KVF_ERR_ARG, "a chain has %d policies at most", MAX_MEMBER);
        KVF_TRY(kvf_mem_get(mem, &text, n + 1, 1, err));
        memcpy(text, at, n);
        kvf_status rc = kvf_policy_open(&c->member[c->n], text, dims, mem, err);
        kvf_free(mem, text);
        KVF_TRY(rc);
        c->n++;
        KVF_TRY(join(c, c->member[c->n - 1], err));
        at += n;
        if (!*at) break;
    }
    KVF_TRY(plan_stages(c, err));
    return check_together(c, err);
}

kvf_status kvf_policy_open_chain(kvf_policy **out, const char *spec, kvf_dims dims, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    void *block;
    size_t head = (sizeof(kvf_policy) + KVF_MEM_ALIGN - 1) / KVF_MEM_ALIGN * KVF_MEM_ALIGN;
    KVF_TRY(kvf_mem_get(mem, &block, 1, head + sizeof(chain), err));
    kvf_policy *p = block;
    chain *c = (chain *)(void *)((char *)block + head);
    *p = (kvf_policy){ &c->ops, dims, c, mem };
    kvf_status rc = open_members(c, spec, dims, mem, err);
    if (rc < 0) {
        chain_fini(p);
        kvf_free(mem, p);
        return rc;
    }
    c->ops = (kvf_policy_ops){ .abi = KVF_POLICY_ABI, .name = "chain", .source = "", .help = "", .fini = chain_fini,
                               .forget = chain_forget, .stages = chain_stages, .keep = chain_keep, .print = chain_print };
    if (c->memory) {
        c->ops.memory = chain_memory;
        c->ops.retrieve = chain_retrieve;
        c->ops.identity = chain_identity;
    }
    *out = p;
    return KVF_OK;
}
