/* holitom.c - a video's tokens merged once more inside the model, at one layer.
 *
 * HoliTom (Shao et al. 2025, arXiv:2505.21334), sec. 3.3, as its release does it: of the tokens given as embeddings those stay that the
 * prompt's last token attends to most in the layer before, mean over heads; each other one is folded into the
 * kept one with the most similar hidden state (src/merge/inner.c). Text is not touched.
 * What was folded is gone: the prompt that brought the video decides once, for all questions that follow on it.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "base/top.h"
#include "policy/policy.h"

typedef struct holitom {
    double layer, drop;

    int32_t bound;
    float *score;   /* [cap] of the candidates */
    uint8_t *stay;  /* [cap] */
    int64_t cap, cap_stay;
} holitom;

static kvf_status holitom_init(kvf_policy *p, kvf_error *err)
{
    holitom *z = p->state;
    int32_t n_layer = p->dims.n_layer;
    double at = z->layer < 1 ? z->layer * n_layer : z->layer;
    z->bound = (int32_t)floor(at + 0.5);
    if (z->bound >= 1 && z->bound < n_layer) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "holitom: layer=%g is layer %d, and the model has %d: use 1 to %d, or a share of them below 1",
                    z->layer, z->bound, n_layer, n_layer - 1);
}

static void holitom_fini(kvf_policy *p)
{
    kvf_free(p->mem, ((holitom *)p->state)->score);
    kvf_free(p->mem, ((holitom *)p->state)->stay);
}

static void holitom_stages(const kvf_policy *p, kvf_stages *s)
{
    const holitom *z = p->state;
    *s = (kvf_stages){ .n = 2, .first = { 0, z->bound }, .score = { { .n_row = 1, .n_layer = 1 } }, .fold = { true }, .park = "" };
}

static kvf_status holitom_keep(kvf_policy *p, const kvf_keep *k, uint8_t *keep, kvf_error *err)
{
    holitom *z = p->state;
    int64_t n = 0;
    void *score = z->score, *stay = z->stay;
    kvf_status rc = kvf_reserve(p->mem, &score, &z->cap, k->n, sizeof *z->score, err);
    z->score = score;
    if (rc >= 0) rc = kvf_reserve(p->mem, &stay, &z->cap_stay, k->n, 1, err);
    z->stay = stay;
    KVF_TRY(rc);
    memset(keep, 1, (size_t)k->n);
    for (int64_t i = 0; i < k->n; i++)
        if (k->embedded && k->embedded[i] && k->pos[i] >= k->n_before) z->score[n++] = k->score[i];
    if (n == 0) return KVF_OK;
    int64_t most = (int64_t)nearbyint((1 - z->drop) * (double)n);
    memset(z->stay, 0, (size_t)n);
    kvf_top(z->score, n, most > 1 ? most : 1, z->stay);
    n = 0;
    for (int64_t i = 0; i < k->n; i++)
        if (k->embedded[i] && k->pos[i] >= k->n_before) keep[i] = z->stay[n++];
    return KVF_OK;
}

static const kvf_option holitom_options[] = {
    KVF_OPT_F64(holitom, layer, 0.64, 0, 1 << 20, "layer before which tokens are merged, or a share of the layers below 1"),
    KVF_OPT_F64(holitom, drop, 0.5, 0, 0.999, "share of the video's tokens that is merged into the others"),
    { 0 },
};

const kvf_policy_ops kvf_policy_holitom = {
    .abi = KVF_POLICY_ABI, .name = "holitom", .source = "Shao et al. 2025, arXiv:2505.21334",
    .help = "merges a video's tokens once more between two layers (HoliTom)",
    .options = holitom_options, .state_size = sizeof(holitom), .init = holitom_init, .fini = holitom_fini,
    .stages = holitom_stages, .keep = holitom_keep,
};
