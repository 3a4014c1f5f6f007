/* lazyllm.c - tokens that the answer does not need are not computed in the deeper layers.
 *
 * Fu et al., LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference, arXiv:2407.14057,
 * sec. 3: at a few layers the attention of the last token, mean over heads, says which tokens go on;
 * every step begins with all tokens again, and what was passed over can come back.
 * Differs from the paper, where it is silent or where more is measured to be better (docs/lazyllm.md):
 * what is kept is a count, ceil(keep * tokens), ties to the earlier token; sinks and newest tokens may be
 * protected; the scores may come from several of the newest tokens (the question) instead of the last one
 * alone, from several layers, from the head that looks at a token most instead of the mean over heads, and
 * may be pooled over neighbours as in SnapKV (Li et al. 2024, arXiv:2404.14469, sec. 4); a choice may serve
 * several decode steps. With rows=1,layers=1,heads=mean,pool=1,sink=0,recent=1,hold=1 it is the paper's.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "policy/policy.h"
#include "base/top.h"

enum { MAX_BOUND = KVF_STAGES_MAX - 1 };

typedef enum preset { PRESET_FAST, PRESET_BALANCED, PRESET_EXACT } preset;
typedef enum heads { HEADS_MEAN, HEADS_MAX } heads;
typedef enum by { BY_ATTENTION, BY_RANDOM } by;

typedef struct lazyllm {
    int64_t preset, by;
    char stages[KVF_OPTION_TEXT_BYTES], keep[KVF_OPTION_TEXT_BYTES], park[KVF_OPTION_TEXT_BYTES];
    int64_t sink, recent, rows, layers, heads, pool, hold;

    int32_t n_bound, bound[MAX_BOUND]; /* first layers of stages 1.. */
    double ratio[MAX_BOUND];           /* kept at the end of stage 0.. */
    float *score;                      /* [cap_score] pooled */
    int64_t cap_score;
} lazyllm;

/* Shares of the layers, and of the tokens kept there (bench/results/lazyllm). */
static const struct {
    int32_t n;
    double bound[2], ratio[2];
} presets[] = {
    [PRESET_FAST] = { 1, { 0.25 }, { 0.30 } },
    [PRESET_BALANCED] = { 2, { 0.33, 0.50 }, { 0.60, 0.50 } },
    [PRESET_EXACT] = { 1, { 0.50 }, { 1.0 } },
};

/* "0.3/0.5": numbers with at most six digits after the point, as the option parser lets them through.
 * Returns how many, or -1. */
static int32_t read_list(const char *text, double *out)
{
    int32_t n = 0;
    while (*text) {
        double x = 0, unit = 1;
        bool digits = false, point = false;
        for (; (*text >= '0' && *text <= '9') || (*text == '.' && !point); text++) {
            if (*text == '.') {
                point = true;
                continue;
            }
            digits = true;
            x = x * 10 + (*text - '0');
            if (point) unit *= 10;
            if (x > 1e9) return -1;
        }
        if (!digits || n == MAX_BOUND || (*text && *text != '/')) return -1;
        out[n++] = x / unit;
        if (*text == '/' && *++text == '\0') return -1;
    }
    return n;
}

static kvf_status fail_list(const char *name, const char *text, const char *want, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_ARG, "lazyllm: %s=%s: write %s, 1 to %d numbers with '/' between them", name, text, want,
                    MAX_BOUND);
}

/* Boundaries from layers, or from shares of the layers below 1. */
static kvf_status set_bounds(lazyllm *z, const double *at, int32_t n_layer, kvf_error *err)
{
    for (int32_t i = 0; i < z->n_bound; i++) {
        double layer = at[i] < 1 ? at[i] * n_layer : at[i];
        z->bound[i] = (int32_t)floor(layer + 0.5);
        if (layer >= n_layer || z->bound[i] >= n_layer || z->bound[i] < 1 || (i > 0 && z->bound[i] <= z->bound[i - 1]))
            return kvf_fail(err, KVF_ERR_ARG,
                            "lazyllm: stage %d would begin at layer %d; the model has %d layers, and the numbers must rise",
                            i + 1, z->bound[i], n_layer);
    }
    return KVF_OK;
}

/* A preset as the lists that it stands for, so that the printed policy says what is run whatever the preset
 * becomes; read back, they give the same. */
static void print_preset(lazyllm *z)
{
    size_t at = 0, k = 0;
    for (int32_t i = 0; i < z->n_bound; i++) {
        int w = snprintf(z->stages + at, sizeof z->stages - at, "%s%d", i ? "/" : "", z->bound[i]);
        int v = snprintf(z->keep + k, sizeof z->keep - k, "%s%g", i ? "/" : "", z->ratio[i]);
        if (w < 0 || v < 0 || (size_t)w >= sizeof z->stages - at || (size_t)v >= sizeof z->keep - k) return;
        at += (size_t)w;
        k += (size_t)v;
    }
}

static kvf_status lazyllm_init(kvf_policy *p, kvf_error *err)
{
    lazyllm *z = p->state;
    double at[MAX_BOUND];
    int32_t n_layer = p->dims.n_layer;
    if (n_layer < 2) return kvf_fail(err, KVF_ERR_ARG, "lazyllm needs a model of 2 layers or more; use policy full");
    if (!z->stages[0] != !z->keep[0])
        return kvf_fail(err, KVF_ERR_ARG, "lazyllm: stages and keep go together; give both, or a preset alone");
    if (z->pool % 2 == 0) return kvf_fail(err, KVF_ERR_ARG, "lazyllm: pool is %lld; use an odd number", (long long)z->pool);
    if (!z->stages[0]) {
        z->n_bound = presets[z->preset].n;
        memcpy(at, presets[z->preset].bound, sizeof presets[0].bound);
        memcpy(z->ratio, presets[z->preset].ratio, sizeof presets[0].ratio);
        if (z->n_bound > n_layer - 1) z->n_bound = n_layer - 1;
        for (int32_t i = 0; i < z->n_bound; i++) { /* a model of few layers: one a stage at least */
            if (at[i] * n_layer < i + 1) at[i] = (i + 1.0) / n_layer;
            if (i > 0 && floor(at[i] * n_layer + 0.5) <= floor(at[i - 1] * n_layer + 0.5)) at[i] = at[i - 1] + 1.0 / n_layer;
        }
        KVF_TRY(set_bounds(z, at, n_layer, err));
        print_preset(z);
        return KVF_OK;
    }
    int32_t n = read_list(z->stages, at), n_keep = read_list(z->keep, z->ratio);
    if (n < 1) return fail_list("stages", z->stages, "layers, or shares of them below 1", err);
    if (n_keep < 1) return fail_list("keep", z->keep, "shares of the tokens", err);
    if (n != n_keep)
        return kvf_fail(err, KVF_ERR_ARG, "lazyllm: %d stages and %d shares to keep; give one share for each", n, n_keep);
    for (int32_t i = 0; i < n; i++)
        if (!(z->ratio[i] > 0 && z->ratio[i] <= 1))
            return kvf_fail(err, KVF_ERR_ARG, "lazyllm: keep=%s: shares are above 0 and at most 1", z->keep);
    z->n_bound = n;
    return set_bounds(z, at, n_layer, err);
}

static void lazyllm_fini(kvf_policy *p) { kvf_free(p->mem, ((lazyllm *)p->state)->score); }

static void lazyllm_stages(const kvf_policy *p, kvf_stages *s)
{
    const lazyllm *z = p->state;
    *s = (kvf_stages){ .n = z->n_bound + 1, .hold = z->hold, .park = z->park };
    for (int32_t i = 0; i < z->n_bound; i++)
        s->score[i] = (kvf_scoring){ (int32_t)z->rows, (int32_t)z->layers, z->heads == HEADS_MAX };
    memcpy(s->first + 1, z->bound, (size_t)z->n_bound * sizeof *z->bound);
}

/* Mean over the neighbours among the tokens there are, in the text's order. */
static void pool(const float *in, int64_t n, int64_t width, float *out)
{
    int64_t half = width / 2;
    double sum = 0;
    for (int64_t j = 0; j < half && j < n; j++) sum += in[j];
    for (int64_t i = 0; i < n; i++) {
        if (i + half < n) sum += in[i + half];
        if (i - half - 1 >= 0) sum -= in[i - half - 1];
        int64_t from = i - half > 0 ? i - half : 0, to = i + half < n ? i + half : n - 1;
        out[i] = (float)(sum / (double)(to - from + 1));
    }
}

/* Random dropping, the yardstick of the paper's Table 1: the same tokens for the same text. */
static float chance(int64_t pos, int32_t stage)
{
    uint64_t x = ((uint64_t)pos << 8) + (uint64_t)stage + 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (float)((x ^ (x >> 31)) >> 40);
}

static kvf_status lazyllm_keep(kvf_policy *p, const kvf_keep *k, uint8_t *keep, kvf_error *err)
{
    lazyllm *z = p->state;
    int64_t forced = 0, recent = z->recent > k->n_row ? z->recent : k->n_row;
    for (int64_t i = 0; i < k->n; i++) {
        keep[i] = i == k->n - 1 || k->pos[i] < z->sink || k->pos[i] >= k->n_text - recent;
        forced += keep[i];
    }
    const float *score = k->score;
    if (z->by == BY_RANDOM || z->pool > 1) {
        void *block = z->score;
        KVF_TRY(kvf_reserve(p->mem, &block, &z->cap_score, k->n, sizeof(float), err));
        score = z->score = block;
        if (z->by == BY_RANDOM)
            for (int64_t i = 0; i < k->n; i++) z->score[i] = chance(k->pos[i], k->stage);
        else
            pool(k->score, k->n, z->pool, z->score);
    }
    kvf_top(score, k->n, (int64_t)ceil(z->ratio[k->stage] * (double)k->n) - forced, keep);
    return KVF_OK;
}

static const kvf_option lazyllm_options[] = {
    KVF_OPT_CHOICE(lazyllm, preset, PRESET_BALANCED, "fast|balanced|exact", "stages and keep, unless they are given"),
    KVF_OPT_TEXT(lazyllm, stages, "", "layers at which tokens are pruned, or shares of the layers: 8/16, 0.3/0.6"),
    KVF_OPT_TEXT(lazyllm, keep, "", "share of its tokens that each boundary keeps: 0.3/0.5"),
    KVF_OPT_I64(lazyllm, sink, 4, 0, 1 << 20, "leading tokens always kept"),
    KVF_OPT_I64(lazyllm, recent, 16, 1, 1 << 20, "newest tokens always kept, the scoring ones at least"),
    KVF_OPT_I64(lazyllm, rows, 32, 1, 512, "newest tokens of a prompt, a batch at most, whose attention scores; paper: 1"),
    KVF_OPT_I64(lazyllm, layers, 4, 1, 1 << 16, "last layers of a stage whose attention scores; paper: 1"),
    KVF_OPT_CHOICE(lazyllm, heads, HEADS_MAX, "mean|max", "what the heads of a layer together say of a token; paper: mean"),
    KVF_OPT_I64(lazyllm, pool, 31, 1, 255, "neighbours over which scores are averaged, odd; paper: 1"),
    KVF_OPT_I64(lazyllm, hold, 0, 0, 1 << 20, "decode steps that a choice serves, 0: all of the answer; paper: 1"),
    KVF_OPT_CHOICE(lazyllm, by, BY_ATTENTION, "attention|random", "what scores tokens; random is for comparison"),
    KVF_OPT_TEXT(lazyllm, park, "", "folder for waiting hidden states beyond the memory budget"),
    { 0 },
};

const kvf_policy_ops kvf_policy_lazyllm = {
    .abi = KVF_POLICY_ABI, .name = "lazyllm", .source = "Fu et al. 2024, arXiv:2407.14057",
    .help = "prunes tokens between layers while the question is known (LazyLLM)",
    .options = lazyllm_options, .state_size = sizeof(lazyllm), .init = lazyllm_init, .fini = lazyllm_fini,
    .stages = lazyllm_stages, .keep = lazyllm_keep,
};
