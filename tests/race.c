/* race.c - a data race with what a CPU kernel reads or writes must be reported although the kernel itself is not
 * watched (base/race.h). ThreadSanitizer's build alone; CMake expects its report, and none from `none`.
 *
 *   race keys | values | decode | activations | product | digest | none
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/cpu_backend.h"
#include "base/digest.h"
#include "base/half.h"

enum { N_TOK = 64, DIM = 64, HEADS = 2, KEYS = 2 * KVF_BLOCK, SLOT = 2 * HEADS * KVF_BLOCK * DIM };

static kvf_f16 slots[2][SLOT];
static float x[N_TOK * HEADS * DIM], y[N_TOK * HEADS * DIM], lse[N_TOK * HEADS];
static uint8_t weight[HEADS * DIM * HEADS * DIM / 32 * 34];
static volatile uint8_t *touched;

/* One byte, with nothing that orders it against the op. */
static void *touch(void *arg)
{
    (void)arg;
    if (touched) *touched = 0;
    return NULL;
}

static void check(kvf_status rc)
{
    if (rc == KVF_OK) return;
    fprintf(stderr, "race: an op failed with %d\n", (int)rc);
    exit(2);
}

static void run_attn(kvf_backend *b, int64_t n_tok)
{
    void *slab[2] = { slots[0], slots[1] };
    int32_t list[2] = { 0, 1 };
    kvf_kv_view view = { .slab = slab, .shift = 0, .slot_bytes = sizeof slots[0] };
    kvf_attn_args a = { .q = x, .o = y, .lse = lse, .n_tok = n_tok, .n_head = HEADS, .n_head_kv = HEADS, .head_dim = DIM,
                        .scale = 0.125f, .kv = &view, .slots = list, .n_key = KEYS, .q_first = KEYS - n_tok };
    check(b->ops->attn(b, &a, NULL));
}

static void run_product(kvf_backend *b)
{
    kvf_weight w;
    check(b->ops->weight_init(b, &w, KVF_DTYPE_Q8_0, HEADS * DIM, HEADS * DIM, weight, NULL));
    kvf_matmul_args a = { .x = x, .n_tok = N_TOK, .n_w = 1, .w = { &w }, .y = { y } };
    check(b->ops->matmul(b, &a, NULL));
}

static void run_vote(kvf_backend *b, bool race)
{
    kvf_digest g = { .kind = KVF_DIGEST_BITS, .bits = 2, .n_head = HEADS, .n_head_kv = HEADS, .head_dim = DIM };
    uint8_t *digest = calloc(1, kvf_digest_bytes(&g));
    float vote[1];
    const void *rows[1] = { digest };
    kvf_vote_args a = { .q = x, .n_q = 1, .scale = 1, .digest = &g, .rows = rows, .n_unit = 1, .unit = KVF_BLOCK,
                        .rule = { .kind = KVF_VOTE_LIN, .pool = 1, .max_queries = true }, .vote = vote };
    if (race) touched = digest;
    pthread_t t;
    pthread_create(&t, NULL, touch, NULL);
    check(b->ops->vote(b, &a, NULL));
    pthread_join(t, NULL);
    free(digest);
}

int main(int argc, char **argv)
{
    const char *what = argc == 2 ? argv[1] : "";
    kvf_threads *threads;
    kvf_backend *b;
    check(kvf_threads_open(&threads, 2, &kvf_mem_default, NULL));
    unsigned flags = kvf_cpu_detect();
    kvf_cpu_level level;
    check(kvf_cpu_level_parse(&level, "auto", flags, NULL));
    kvf_cpu_backend_params p = { .level = level, .flags = flags, .threads = threads, .mem = &kvf_mem_default };
    check(kvf_cpu_backend_open(&b, &p, NULL));
    bool keys = !strcmp(what, "keys"), values = !strcmp(what, "values"), decode = !strcmp(what, "decode");
    if (!strcmp(what, "digest")) {
        run_vote(b, true);
    } else if (!strcmp(what, "none")) {
        run_attn(b, N_TOK);
        run_attn(b, 1);
        run_product(b);
        run_vote(b, false);
    } else {
        const kvf_f16 *v = slots[1] + HEADS * KVF_BLOCK * DIM;
        if (keys) touched = (volatile uint8_t *)(slots[0] + DIM * 9);
        if (values || decode) touched = (volatile uint8_t *)(v + DIM * 3);
        if (!strcmp(what, "activations")) touched = (volatile uint8_t *)(x + 1000);
        if (!strcmp(what, "product")) touched = (volatile uint8_t *)(y + 1000);
        pthread_t t;
        pthread_create(&t, NULL, touch, NULL);
        if (keys || values || decode)
            run_attn(b, decode ? 1 : N_TOK);
        else
            run_product(b);
        pthread_join(t, NULL);
    }
    b->ops->close(b);
    kvf_threads_close(threads);
    return 0;
}
