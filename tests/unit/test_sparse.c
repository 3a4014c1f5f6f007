/* test_sparse.c - attention of a sequence that holds some tokens of a text (kv_sparse.c) against a naive
 * transcription: near by distance in the text, units by position, in whatever order the tokens came.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/half.h"
#include "kv/kv.h"

enum { LAYERS = 2, DIM = 32, TEXT = 900, HEADS = 4, HEADS_KV = 2, CHUNK = 64, WQ = HEADS * DIM, WK = HEADS_KV * DIM };

static kvf_error err;
static double inv_freq[DIM / 2];

static float noise(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*state >> 32) * 0x1p-31f;
}

/* A policy that names units by a rule that the reference knows, and looks at votes on the way. */
static uint64_t n_asked, n_voted;

static bool chosen(int32_t layer, int64_t n_past, int32_t set, int64_t unit)
{
    uint64_t s = (uint64_t)(layer * 977 + n_past * 131 + set * 31 + unit) * 0x9e3779b97f4a7c15u;
    return (s >> 40) % 3 == 0;
}

static kvf_status choose(kvf_policy *p, const kvf_retrieve *r, uint8_t *use, kvf_error *e)
{
    (void)p;
    static float votes[HEADS_KV * TEXT];
    kvf_vote_rule rule = { .kind = KVF_VOTE_GATE, .max_queries = true, .pool = 1 };
    n_asked++;
    for (int fine = 0; fine < 2; fine++) {
        KVF_TRY(r->vote(r->lookup, fine != 0, &rule, votes, e));
        for (int64_t u = 0; u < r->n_unit; u++) {
            cr_assert(votes[u] == -INFINITY || (votes[u] >= 0 && votes[u] <= 1.001f * HEADS), "%g", (double)votes[u]);
            n_voted += votes[u] > 0;
        }
    }
    for (int32_t s = 0; s < r->n_set; s++)
        for (int64_t u = 0; u < r->n_unit; u++) use[s * r->n_unit + u] = chosen(r->layer, r->n_past, s, r->unit0 + u);
    return KVF_OK;
}

static const kvf_policy_ops chooser = { .abi = KVF_POLICY_ABI, .name = "chooser", .retrieve = choose };

typedef struct rig {
    kvf_threads *threads;
    kvf_backend *backend;
    kvf_pool *pool;
    kvf_kv *kv;
    kvf_policy policy;
    kvf_memory m;
    float *q, *k, *v, *o; /* [LAYERS][TEXT][..], o of one layer's chunk */
    float *turned;        /* as k */
    bool in[TEXT];        /* the sequence holds it */
    int32_t place[TEXT];
    int32_t list[TEXT], places[TEXT], at[TEXT], n_list;
} rig;

static void rotate(const float *x, double pos, double *out)
{
    for (int i = 0; i < DIM / 2; i++) {
        double c = cos(pos * inv_freq[i]), s = sin(pos * inv_freq[i]);
        out[i] = x[i] * c - x[i + DIM / 2] * s;
        out[i + DIM / 2] = x[i] * s + x[i + DIM / 2] * c;
    }
}

static rig *open_rig(int32_t unit, int64_t init, int64_t window, int32_t n_set, kvf_cpu_level level)
{
    rig *r = calloc(1, sizeof *r);
    uint64_t seed = 7;
    for (int i = 0; i < DIM / 2; i++) inv_freq[i] = pow(1000.0, -2.0 * i / DIM);
    cr_assert_eq(kvf_threads_open(&r->threads, 2, &kvf_mem_default, &err), KVF_OK);
    kvf_cpu_backend_params p = { .level = level, .flags = kvf_cpu_detect(), .f32 = true, .threads = r->threads, .mem = &kvf_mem_default };
    cr_assert_eq(kvf_cpu_backend_open(&r->backend, &p, &err), KVF_OK);
    kvf_pool_params pp = { .backend = r->backend, .n_head_kv = HEADS_KV, .head_dim = DIM, .max_slots = 4096 };
    cr_assert_eq(kvf_pool_open(&r->pool, &pp, &err), KVF_OK);
    kvf_dims dims = { LAYERS, HEADS, HEADS_KV, DIM };
    r->m = (kvf_memory){ .init = init, .window = window, .unit = unit, .n_chunk = CHUNK, .n_set = n_set };
    r->m.fine = (kvf_digest){ .kind = KVF_DIGEST_BITS, .bits = 2, .n_head = HEADS, .n_head_kv = HEADS_KV, .head_dim = DIM };
    r->m.coarse = (kvf_digest){ .kind = KVF_DIGEST_MEAN, .sub = unit, .n_head = HEADS, .n_head_kv = HEADS_KV, .head_dim = DIM };
    kvf_kv_memory_params mp = { .memory = r->m, .layer0 = 5, .sparse = true };
    for (int i = 0; i < 2; i++) mp.rope[i] = (kvf_kv_rope){ inv_freq, DIM, KVF_ROPE_NEOX, 1 };
    cr_assert_eq(kvf_kv_open_memory(&r->kv, r->pool, dims, &mp, &err), KVF_OK, "%s", err.msg);
    r->policy = (kvf_policy){ &chooser, dims, NULL, &kvf_mem_default };
    r->q = malloc(LAYERS * TEXT * WQ * sizeof(float));
    r->k = malloc(LAYERS * TEXT * WK * sizeof(float));
    r->v = malloc(LAYERS * TEXT * WK * sizeof(float));
    r->o = malloc(TEXT * WQ * sizeof(float));
    for (int i = 0; i < LAYERS * TEXT * WQ; i++) r->q[i] = 2 * noise(&seed);
    for (int i = 0; i < LAYERS * TEXT * WK; i++) {
        r->k[i] = kvf_f32_from_f16(kvf_f16_from_f32(2 * noise(&seed)));
        r->v[i] = kvf_f32_from_f16(kvf_f16_from_f32(noise(&seed)));
    }
    r->turned = malloc(LAYERS * TEXT * WK * sizeof(float));
    for (int i = 0; i < LAYERS * TEXT * HEADS_KV; i++) {
        double out[DIM];
        rotate(r->k + i * DIM, i / HEADS_KV % TEXT, out);
        for (int c = 0; c < DIM; c++) r->turned[i * DIM + c] = kvf_f32_from_f16(kvf_f16_from_f32((float)out[c]));
    }
    return r;
}

static void close_rig(rig *r)
{
    kvf_kv_close(r->kv);
    cr_assert_eq(kvf_pool_used(r->pool), 0);
    kvf_pool_close(r->pool);
    r->backend->ops->close(r->backend);
    kvf_threads_close(r->threads);
    free(r->q);
    free(r->k);
    free(r->v);
    free(r->o);
    free(r->turned);
    free(r);
}

static void rotate_row(float *to, const float *from, int n_head, int64_t pos)
{
    for (int h = 0; h < n_head; h++) {
        double out[DIM];
        rotate(from + h * DIM, (double)pos, out);
        for (int i = 0; i < DIM; i++) to[h * DIM + i] = (float)out[i];
    }
}

/* What query `pos` of a head reads, by the definition; ref: the position whose window the units are older than. */
static double check_query(const rig *r, int32_t layer, int64_t pos, int64_t ref, int64_t n_past, int32_t h, const float *o, double *mass)
{
    int64_t w = r->m.window, units_end = r->m.init;
    if (ref >= r->m.init + w + r->m.unit) units_end += (ref - r->m.init - w) / r->m.unit * r->m.unit;
    const float *q = r->q + ((int64_t)layer * TEXT + pos) * WQ + h * DIM;
    int32_t g = h / (HEADS / HEADS_KV);
    double s[TEXT], max = -INFINITY, sum = 0, far[DIM], at[DIM], acc[DIM] = { 0 };
    rotate(q, (double)(w - 1), far);
    rotate(q, (double)pos, at);
    for (int32_t i = 0; i < r->n_list && r->list[i] <= pos; i++) {
        int64_t p = r->list[i];
        int64_t key = ((int64_t)layer * TEXT + p) * WK + g * DIM;
        double dot = 0;
        bool near = pos - p < w;
        s[i] = -INFINITY;
        if (!near && p >= r->m.init && p < units_end && !chosen(5 + layer, n_past, r->m.n_set > 1 ? g : 0, p / r->m.unit)) continue;
        for (int c = 0; c < DIM; c++) dot += near ? at[c] * (double)r->turned[key + c] : far[c] * (double)r->k[key + c];
        s[i] = dot * 0.2;
        max = fmax(max, s[i]);
    }
    for (int32_t i = 0; i < r->n_list && r->list[i] <= pos; i++) sum += exp(s[i] - max);
    for (int32_t i = 0; i < r->n_list && r->list[i] <= pos; i++) {
        double p = exp(s[i] - max) / sum;
        if (mass) mass[i] += p;
        for (int c = 0; c < DIM; c++) acc[c] += p * (double)r->v[((int64_t)layer * TEXT + r->list[i]) * WK + g * DIM + c];
    }
    double worst = 0;
    for (int c = 0; c < DIM; c++) worst = fmax(worst, fabs(acc[c] - (double)o[h * DIM + c]));
    return worst;
}

/* Compute the n tokens of the text (rising) over the list, which has them, and compare every query. */
static double run_chunk(rig *r, const int32_t *text, int32_t n, bool back)
{
    static float q[CHUNK * WQ], qf[CHUNK * WQ], mass[TEXT];
    int64_t len = kvf_kv_len(r->kv);
    int32_t mine = 0;
    bool as_stored = true;
    for (int32_t i = 0; i < r->n_list; i++) {
        bool fresh = mine < n && r->list[i] == text[mine];
        if (fresh) r->place[r->list[i]] = (int32_t)len + mine;
        if (fresh) r->at[mine++] = i;
        r->places[i] = r->place[r->list[i]];
        as_stored = as_stored && r->places[i] == i;
    }
    cr_assert_eq(mine, n);
    kvf_kv_order o = { .places = as_stored ? NULL : r->places, .n = r->n_list, .at = r->at, .n_at = n, .pos = r->list, .back = back };
    kvf_kv_arrange(r->kv, &o);
    cr_assert_eq(kvf_kv_reserve(r->kv, n, &err), KVF_OK, "%s", err.msg);
    double worst = 0;
    for (int32_t l = 0; l < LAYERS; l++) {
        float k[CHUNK * WK], v[CHUNK * WK];
        double want[TEXT] = { 0 };
        for (int32_t i = 0; i < n; i++) {
            int64_t row = (int64_t)l * TEXT + text[i];
            memcpy(k + i * WK, r->k + row * WK, sizeof(float) * WK);
            memcpy(v + i * WK, r->v + row * WK, sizeof(float) * WK);
            rotate_row(q + i * WQ, r->q + row * WQ, HEADS, text[i]);
            rotate_row(qf + i * WQ, r->q + row * WQ, HEADS, r->m.window - 1);
        }
        cr_assert_eq(kvf_kv_put(r->kv, l, k, v, n, &err), KVF_OK);
        memset(mass, 0, sizeof mass);
        int64_t n_mass = back ? 0 : n < 5 ? n : 5;
        kvf_kv_attend_args a = { .layer = l, .policy = &r->policy, .q = q, .q_far = qf, .o = r->o, .n_tok = n, .n_q = n, .scale = 0.2f,
                                 .mass = n_mass ? mass : NULL, .n_mass = n_mass };
        cr_assert_eq(kvf_kv_attend(r->kv, &a, &err), KVF_OK, "%s", err.msg);
        for (int32_t i = 0, first = 0; i < n; i++) {
            if (back && r->at[i] - r->at[first] >= CHUNK) first = i; /* another run */
            int64_t ref = back ? text[first] : text[0], past = back ? ref : text[n - 1] + 1 - n;
            for (int32_t h = 0; h < HEADS; h++)
                worst = fmax(worst, check_query(r, l, text[i], ref, past, h, r->o + (int64_t)i * WQ, i >= n - n_mass ? want : NULL));
        }
        for (int32_t i = 0; n_mass && r->m.n_set == 1 && i < r->n_list; i++) worst = fmax(worst, fabs((double)mass[i] - want[i]) / 10);
    }
    cr_assert_eq(kvf_kv_commit(r->kv, n, &err), KVF_OK);
    kvf_kv_arrange(r->kv, NULL);
    for (int32_t i = 0; i < n; i++) r->in[text[i]] = true;
    return worst;
}

/* The list: what is held and wanted, and the n tokens of text; keys behind the last of them are left out. */
static void make_list(rig *r, const int32_t *text, int32_t n, uint64_t *seed, int share)
{
    r->n_list = 0;
    for (int32_t p = 0, mine = 0; p <= text[n - 1]; p++) {
        bool fresh = mine < n && text[mine] == p, want = noise(seed) * 50 + 50 < (float)share;
        mine += fresh;
        if (fresh || (r->in[p] && want)) r->list[r->n_list++] = p;
    }
}

static double tell_story(rig *r, uint64_t seed, int share)
{
    double worst = 0;
    int32_t text[CHUNK], n = 0;
    for (int32_t p = 0; p < TEXT - 100; p++) { /* a prompt of which a share comes, in gapless chunks of it */
        if (noise(&seed) * 50 + 50 < (float)share) text[n++] = p;
        if (n < CHUNK && p + 1 < TEXT - 100) continue;
        if (n == 0) break;
        make_list(r, text, n, &seed, 101);
        worst = fmax(worst, run_chunk(r, text, n, false));
        n = 0;
    }
    for (int32_t end = TEXT - 100; end < TEXT; end += 1 + end % 7) { /* an answer, before each step some come back */
        for (int32_t p = 0, j = 0; p < TEXT - 100 && n < CHUNK; p++, j++)
            if (!r->in[p] && (noise(&seed) > 0.8f || (j > 300 && j < 330))) text[n++] = p;
        if (n > 0) {
            make_list(r, text, n, &seed, 80);
            worst = fmax(worst, run_chunk(r, text, n, true));
        }
        n = 0;
        for (int32_t k = 0; k < 1 + end % 7 && end + k < TEXT; k++) text[n++] = end + k;
        make_list(r, text, n, &seed, 70);
        worst = fmax(worst, run_chunk(r, text, n, false));
        n = 0;
    }
    return worst;
}

Test(sparse, attention_is_the_definition_in_whatever_order_tokens_came)
{
    static const kvf_cpu_level levels[] = { KVF_CPU_LEVEL_REF, KVF_CPU_LEVEL_AVX2, KVF_CPU_LEVEL_AVX512 };
    static const struct {
        int32_t unit;
        int64_t init, window;
        int32_t n_set;
        int share;
    } shapes[] = { { 32, 32, 128, 1, 60 }, { 128, 128, 128, 1, 40 }, { 16, 0, 192, HEADS_KV, 50 }, { 64, 64, 256, 1, 10 }, { 16, 16, 128, 1, 101 } };
    for (size_t c = 0; c < sizeof levels / sizeof *levels; c++) {
        kvf_cpu_level best;
        cr_assert_eq(kvf_cpu_level_parse(&best, NULL, kvf_cpu_detect(), &err), KVF_OK);
        if (levels[c] > best) continue;
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            rig *r = open_rig(shapes[i].unit, shapes[i].init, shapes[i].window, shapes[i].n_set, levels[c]);
            n_asked = n_voted = 0;
            double worst = tell_story(r, 11 + i, shapes[i].share);
            cr_assert_lt(worst, 6e-4, "level %d, shape %zu: %g", (int)levels[c], i, worst);
            cr_assert_gt(n_asked, 20);
            cr_assert_gt(n_voted, 20);
            close_rig(r);
        }
    }
}
