/* mamba_named.c - STORM's layers from named weights, as a file holds them: names, shapes and values are checked,
 * then everything is copied.
 *
 * Names are those of Mamba's modules, with Vision Mamba's suffix _b for the backward direction:
 * [prefix]layers.I.norm.weight, layers.I.mixer.in_proj.weight, ...A_log, ...A_b_log. STORM
 * (arXiv:2503.04130) publishes neither names nor weights.
 *
 * Rule: a tensor that is not understood is refused: leaving one out would compute something else in silence.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "merge/mamba.h"

enum { N_ROLE = 18, MAX_LAYER = 1024 };

/* Sides of a shape: dimensions of the stack, 2E, R + 2S. */
enum { SIDE_NONE, SIDE_D, SIDE_E, SIDE_S, SIDE_R, SIDE_K, SIDE_2E, SIDE_X, N_SIDE };

typedef struct role {
    const char *name;
    size_t at; /* of the pointer in kvf_mamba_layer */
    uint8_t side[2];
    bool optional, backward;
} role;

#define OF(field) offsetof(kvf_mamba_layer, field)
static const role roles[N_ROLE] = {
    { "norm.weight", OF(norm_w), { SIDE_D, SIDE_NONE }, true, false },
    { "norm.bias", OF(norm_b), { SIDE_D, SIDE_NONE }, true, false },
    { "mixer.in_proj.weight", OF(in_proj), { SIDE_2E, SIDE_D }, false, false },
    { "mixer.out_proj.weight", OF(out_proj), { SIDE_D, SIDE_E }, false, false },
    { "mixer.conv1d.weight", OF(forward.conv_w), { SIDE_E, SIDE_K }, false, false },
    { "mixer.conv1d.bias", OF(forward.conv_b), { SIDE_E, SIDE_NONE }, true, false },
    { "mixer.x_proj.weight", OF(forward.x_proj), { SIDE_X, SIDE_E }, false, false },
    { "mixer.dt_proj.weight", OF(forward.dt_w), { SIDE_E, SIDE_R }, false, false },
    { "mixer.dt_proj.bias", OF(forward.dt_b), { SIDE_E, SIDE_NONE }, false, false },
    { "mixer.A_log", OF(forward.a_log), { SIDE_E, SIDE_S }, false, false },
    { "mixer.D", OF(forward.d), { SIDE_E, SIDE_NONE }, false, false },
    { "mixer.conv1d_b.weight", OF(backward.conv_w), { SIDE_E, SIDE_K }, false, true },
    { "mixer.conv1d_b.bias", OF(backward.conv_b), { SIDE_E, SIDE_NONE }, true, true },
    { "mixer.x_proj_b.weight", OF(backward.x_proj), { SIDE_X, SIDE_E }, false, true },
    { "mixer.dt_proj_b.weight", OF(backward.dt_w), { SIDE_E, SIDE_R }, false, true },
    { "mixer.dt_proj_b.bias", OF(backward.dt_b), { SIDE_E, SIDE_NONE }, false, true },
    { "mixer.A_b_log", OF(backward.a_log), { SIDE_E, SIDE_S }, false, true },
    { "mixer.D_b", OF(backward.d), { SIDE_E, SIDE_NONE }, false, true },
};

typedef struct stack {
    const kvf_mamba_tensor *t;
    int64_t n, n_layer;
    size_t prefix;   /* bytes in front of "layers." */
    int32_t *found;  /* [n_layer][N_ROLE] tensor, -1: absent */
    int64_t side[N_SIDE];
    bool backward;
} stack;

static kvf_status fail_name(const char *name, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_FORMAT,
                    "tensor '%.64s' is no weight of a Mamba layer; a file holds [prefix]layers.I.norm.weight, "
                    "layers.I.mixer.in_proj.weight and so on (docs/video.md), and nothing else",
                    name);
}

/* "layers.I.ROLE" behind the prefix. False: something else. */
static bool parse_name(const char *name, int64_t *layer, int *r)
{
    int64_t i = 0;
    if (strncmp(name, "layers.", 7) != 0) return false;
    const char *p = name + 7, *digits = p;
    for (; *p >= '0' && *p <= '9' && i < MAX_LAYER; p++) i = 10 * i + (*p - '0');
    if (p == digits || *p != '.' || i >= MAX_LAYER || (*digits == '0' && p - digits > 1)) return false;
    for (*r = 0; *r < N_ROLE; ++*r)
        if (strcmp(p + 1, roles[*r].name) == 0) break;
    *layer = i;
    return *r < N_ROLE;
}

/* The prefix is what stands before "layers." in the first name. */
static kvf_status set_prefix(stack *s, kvf_error *err)
{
    for (int64_t i = 0; i < s->n; i++)
        if (!s->t[i].name || !s->t[i].data || s->t[i].n_dim < 1 || s->t[i].n_dim > 4)
            return kvf_fail(err, KVF_ERR_ARG, "tensor %" PRId64 " lacks a name, data or dimensions", i);
    const char *first = s->t[0].name, *at = strstr(first, "layers.");
    if (!at) return fail_name(first, err);
    s->prefix = (size_t)(at - first);
    return KVF_OK;
}

static kvf_status place(stack *s, kvf_error *err)
{
    for (int64_t i = 0; i < s->n; i++) {
        const char *name = s->t[i].name;
        int64_t layer;
        int r;
        if (strncmp(name, s->t[0].name, s->prefix) != 0 || !parse_name(name + s->prefix, &layer, &r))
            return fail_name(name, err);
        if (layer >= s->n_layer)
            return kvf_fail(err, KVF_ERR_FORMAT,
                            "'%.64s' is of layer %" PRId64 ", and the file has %" PRId64 " layers; one is missing",
                            name, layer, s->n_layer);
        int32_t *at = &s->found[layer * N_ROLE + r];
        if (*at >= 0) return kvf_fail(err, KVF_ERR_FORMAT, "tensor '%.64s' is there twice", name);
        *at = (int32_t)i;
        s->backward = s->backward || roles[r].backward;
    }
    return KVF_OK;
}

/* As many as there are forward A_log. */
static int64_t count_layers(const stack *s)
{
    int64_t n = 0, layer;
    for (int64_t i = 0; i < s->n; i++) {
        int r;
        if (strlen(s->t[i].name) > s->prefix && parse_name(s->t[i].name + s->prefix, &layer, &r))
            n += strcmp(roles[r].name, "mixer.A_log") == 0;
    }
    return n;
}

static const kvf_mamba_tensor *tensor_of(const stack *s, int64_t layer, int r)
{
    int32_t i = s->found[layer * N_ROLE + r];
    return i < 0 ? NULL : &s->t[i];
}

/* The sides of a tensor without its sides of 1 in the middle: a convolution is [E][1][K] or [E][K]. */
static void sides_of(const kvf_mamba_tensor *t, int64_t out[2])
{
    out[0] = t->shape[0];
    out[1] = t->n_dim > 1 ? t->shape[t->n_dim - 1] : 0;
    for (int i = 1; i + 1 < t->n_dim; i++)
        if (t->shape[i] != 1) out[0] = -1;
}

static kvf_status check_there(const stack *s, kvf_error *err)
{
    for (int64_t i = 0; i < s->n_layer; i++)
        for (int r = 0; r < N_ROLE; r++) {
            if (roles[r].optional || (roles[r].backward && !s->backward) || tensor_of(s, i, r)) continue;
            return kvf_fail(err, KVF_ERR_FORMAT, "tensor '%.*slayers.%" PRId64 ".%s' is missing",
                            s->prefix > 64 ? 64 : (int)s->prefix, s->t[0].name, i, roles[r].name);
        }
    return KVF_OK;
}

/* What layer 0 says of the dimensions; 0: a shape is wrong, which check_shapes says. */
static void set_sides(stack *s)
{
    for (int r = 0; r < N_ROLE; r++) {
        const kvf_mamba_tensor *t = tensor_of(s, 0, r);
        if (!t || roles[r].backward) continue;
        int64_t have[2];
        sides_of(t, have);
        for (int k = 0; k < 2; k++) {
            int side = roles[r].side[k];
            if (side == SIDE_S || side == SIDE_R || side == SIDE_K) s->side[side] = have[k];
        }
        if (strcmp(roles[r].name, "mixer.A_log") == 0) s->side[SIDE_E] = have[0];
        if (strcmp(roles[r].name, "mixer.in_proj.weight") == 0) s->side[SIDE_D] = have[1];
    }
    for (int i = 1; i < SIDE_2E; i++)
        if (s->side[i] < 0 || s->side[i] > INT32_MAX / 4) s->side[i] = 0;
    s->side[SIDE_2E] = 2 * s->side[SIDE_E];
    s->side[SIDE_X] = s->side[SIDE_R] + 2 * s->side[SIDE_S];
}

static kvf_status check_shapes(const stack *s, int64_t layer, int r, kvf_error *err)
{
    const kvf_mamba_tensor *t = tensor_of(s, layer, r);
    int64_t have[2], want[2] = { s->side[roles[r].side[0]], s->side[roles[r].side[1]] };
    if (!t) return KVF_OK;
    sides_of(t, have);
    if (have[0] == want[0] && have[1] == want[1] && want[0] > 0) return KVF_OK;
    char text[96] = "";
    for (int i = 0, n = 0; i < t->n_dim && n >= 0 && n < 80; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, "%s%" PRId64, i ? ", " : "", t->shape[i]);
    if (!want[1])
        return kvf_fail(err, KVF_ERR_FORMAT, "tensor '%.64s' is [%s]; the other weights want [%" PRId64 "]", t->name,
                        text, want[0]);
    return kvf_fail(err, KVF_ERR_FORMAT,
                    "tensor '%.64s' is [%s]; the other weights want [%" PRId64 ", %" PRId64 "]", t->name, text,
                    want[0], want[1]);
}

/* Copies everything; *out points to all of it, the layers into it. */
static kvf_status copy(const stack *s, const kvf_mem *mem, kvf_mamba_layer *layer, float **out, kvf_error *err)
{
    size_t total = 0, at = 0;
    for (int64_t i = 0; i < s->n_layer * N_ROLE; i++) {
        int r = (int)(i % N_ROLE);
        if (s->found[i] < 0) continue;
        int64_t b = s->side[roles[r].side[1]];
        total += (size_t)s->side[roles[r].side[0]] * (size_t)(b ? b : 1);
    }
    KVF_TRY(kvf_mem_get(mem, (void **)(void *)out, total, sizeof **out, err));
    for (int64_t i = 0; i < s->n_layer * N_ROLE; i++) {
        int r = (int)(i % N_ROLE);
        if (s->found[i] < 0) continue;
        const kvf_mamba_tensor *t = &s->t[s->found[i]];
        int64_t b = s->side[roles[r].side[1]], n = s->side[roles[r].side[0]] * (b ? b : 1);
        float *to = *out + at;
        for (int64_t k = 0; k < n; k++) {
            if (!isfinite(t->data[k]))
                return kvf_fail(err, KVF_ERR_FORMAT, "tensor '%.64s': element %" PRId64 " is %s; weights are finite",
                                t->name, k, isnan(t->data[k]) ? "NaN" : "infinite");
            to[k] = t->data[k];
        }
        memcpy((char *)&layer[i / N_ROLE] + roles[r].at, &to, sizeof to);
        at += (size_t)n;
    }
    return KVF_OK;
}

static kvf_status check_all(stack *s, kvf_error *err)
{
    for (int64_t i = 0; i < s->n_layer * N_ROLE; i++) s->found[i] = -1;
    KVF_TRY(place(s, err));
    KVF_TRY(check_there(s, err));
    set_sides(s);
    for (int64_t i = 0; i < s->n_layer; i++)
        for (int r = 0; r < N_ROLE; r++) KVF_TRY(check_shapes(s, i, r, err));
    for (int64_t i = 0; i < s->n_layer; i++)
        if (tensor_of(s, i, 1) && !tensor_of(s, i, 0))
            return kvf_fail(err, KVF_ERR_FORMAT, "layer %" PRId64 " has a norm.bias and no norm.weight", i);
    return KVF_OK;
}

static kvf_status open_checked(kvf_mamba **out, const kvf_merge_env *env, const stack *s, float norm_eps,
                               kvf_error *err)
{
    kvf_mamba_layer *layer;
    float *weights = NULL;
    KVF_TRY(KVF_GET(env, &layer, s->n_layer, err));
    kvf_status rc = copy(s, env->mem, layer, &weights, err);
    kvf_mamba_params p;
    kvf_mamba_params_init(&p);
    p.layers = layer;
    p.n_layer = s->n_layer;
    p.d_model = (int32_t)s->side[SIDE_D];
    p.d_inner = (int32_t)s->side[SIDE_E];
    p.d_state = (int32_t)s->side[SIDE_S];
    p.dt_rank = (int32_t)s->side[SIDE_R];
    p.d_conv = (int32_t)s->side[SIDE_K];
    if (norm_eps > 0) p.norm_eps = norm_eps;
    if (rc >= 0) rc = kvf_mamba_open_env(out, env, &p, err);
    if (rc >= 0)
        kvf_mamba_own(*out, weights);
    else
        kvf_free(env->mem, weights);
    kvf_free(env->mem, layer);
    return rc;
}

kvf_status kvf_mamba_open_named(kvf_mamba **out, const kvf_merge_env *env, const kvf_mamba_tensor *t, int64_t n,
                                float norm_eps, kvf_error *err)
{
    if (!out) return kvf_fail(err, KVF_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!t || n < 1 || n > (int64_t)MAX_LAYER * N_ROLE)
        return kvf_fail(err, KVF_ERR_ARG, "%" PRId64 " tensors; layers have 9 to 18 each", n);
    if (!(norm_eps >= 0 && norm_eps < 1))
        return kvf_fail(err, KVF_ERR_ARG, "norm_eps is %g; it must be 0 (1e-5) or more and below 1", (double)norm_eps);
    stack s = { .t = t, .n = n };
    KVF_TRY(set_prefix(&s, err));
    s.n_layer = count_layers(&s);
    if (s.n_layer == 0 || s.n_layer > MAX_LAYER)
        return kvf_fail(err, KVF_ERR_FORMAT, "there is no tensor layers.0.mixer.A_log; these are no Mamba layers");
    KVF_TRY(KVF_GET(env, &s.found, s.n_layer * N_ROLE, err));
    kvf_status rc = check_all(&s, err);
    if (rc >= 0) rc = open_checked(out, env, &s, norm_eps, err);
    kvf_free(env->mem, s.found);
    return rc;
}
