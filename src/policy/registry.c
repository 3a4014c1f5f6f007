/* registry.c - the policies there are, and opening one by its spec.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "policy/policy.h"

extern const kvf_policy_ops kvf_policy_full, kvf_policy_window, kvf_policy_infllm, kvf_policy_lazyllm, kvf_policy_snapkv,
    kvf_policy_keydiff, kvf_policy_holitom;

static const kvf_policy_ops *const registry[] = { &kvf_policy_full, &kvf_policy_window, &kvf_policy_infllm,
                                                 &kvf_policy_lazyllm, &kvf_policy_snapkv, &kvf_policy_keydiff, &kvf_policy_holitom };

enum { N_POLICY = sizeof registry / sizeof *registry };

const kvf_policy_ops *kvf_policy_at(int64_t i)
{
    return i >= 0 && i < N_POLICY ? registry[i] : NULL;
}

static kvf_status fail_unknown(const char *name, size_t n, kvf_error *err)
{
    char list[200] = "";
    size_t at = 0;
    for (int i = 0; i < N_POLICY; i++) {
        int w = snprintf(list + at, sizeof list - at, "%s%s", i ? ", " : "", registry[i]->name);
        if (w < 0 || (size_t)w >= sizeof list - at) break;
        at += (size_t)w;
    }
    return kvf_fail(err, KVF_ERR_NOT_FOUND, "no policy is called '%.*s'; there are: %s", n > 64 ? 64 : (int)n, name, list);
}

kvf_status kvf_policy_open(kvf_policy **out, const char *spec, kvf_dims dims, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    if (kvf_policy_is_chain(spec)) return kvf_policy_open_chain(out, spec, dims, mem, err);
    size_t n_name = strcspn(spec, ":");
    const kvf_policy_ops *ops = NULL;
    for (int i = 0; i < N_POLICY; i++)
        if (strlen(registry[i]->name) == n_name && memcmp(registry[i]->name, spec, n_name) == 0) ops = registry[i];
    if (!ops) return fail_unknown(spec, n_name, err);
    void *block;
    size_t head = (sizeof(kvf_policy) + KVF_MEM_ALIGN - 1) / KVF_MEM_ALIGN * KVF_MEM_ALIGN;
    KVF_TRY(kvf_mem_get(mem, &block, 1, head + ops->state_size, err));
    kvf_policy *p = block;
    *p = (kvf_policy){ ops, dims, (char *)block + head, mem };
    kvf_options_default(ops->options, p->state);
    const char *text = spec + n_name + (spec[n_name] == ':');
    kvf_status rc = kvf_options_parse(ops->options, p->state, text, strlen(text), ops->name, err);
    if (rc >= 0 && ops->init) rc = ops->init(p, err);
    if (rc < 0) {
        kvf_free(mem, p);
        return rc;
    }
    *out = p;
    return KVF_OK;
}

void kvf_policy_close(kvf_policy *p)
{
    if (!p) return;
    if (p->ops->fini) p->ops->fini(p);
    kvf_free(p->mem, p);
}

void kvf_policy_print(const kvf_policy *p, char *out, size_t cap)
{
    if (p->ops->print) {
        p->ops->print(p, out, cap);
        return;
    }
    int w = snprintf(out, cap, "%s%s", p->ops->name, p->ops->options && p->ops->options->name ? ":" : "");
    if (w > 0 && (size_t)w < cap) kvf_options_print(p->ops->options, p->state, out + w, cap - (size_t)w);
}
