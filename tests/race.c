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
static uint8_t weight[HEADS * DIM * HEADS * DIM / 32 * 34], digest[8192];

/* One byte, with nothing that orders it against the op. */
static void *touch(void *arg)
{
    if (arg) *(volatile uint8_t *)arg = 0;
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

static void run_vote(kvf_backend *b)
{
    kvf_digest g = { .kind = KVF_DIGEST_BITS, .bits = 2, .n_head = HEADS, .n_head_kv = HEADS, .head_dim = DIM };
    if (kvf_digest_bytes(&g) > sizeof digest) exit(2);
    float vote[1];
    const void *rows[1] = { digest };
    kvf_vote_args a = { .q = x, .n_q = 1, .scale = 1, .digest = &g, .rows = rows, .n_unit = 1, .unit = KVF_BLOCK,
                        .rule = { .kind = KVF_VOTE_LIN, .pool = 1, .max_queries = true }, .vote = vote };
    check(b->ops->vote(b, &a, NULL));
}

static void run_prefill(kvf_backend *b) { run_attn(b, N_TOK); }
static void run_decode(kvf_backend *b) { run_attn(b, 1); }

static void run_all(kvf_backend *b)
{
    run_prefill(b);
    run_decode(b);
    run_product(b);
    run_vote(b);
}

static const struct race {
    const char *name;
    void (*run)(kvf_backend *b);
    void *touched;
} races[] = {
    { "keys", run_prefill, slots[0] + 9 * DIM },
    { "values", run_prefill, slots[1] + HEADS * KVF_BLOCK * DIM + 3 * DIM },
    { "decode", run_decode, slots[1] + HEADS * KVF_BLOCK * DIM + 3 * DIM },
    { "activations", run_product, x + 1000 },
    { "product", run_product, y + 1000 },
    { "digest", run_vote, digest },
    { "none", run_all, NULL },
};

int main(int argc, char **argv)
{
    const struct race *r = NULL;
    for (size_t i = 0; argc == 2 && i < sizeof races / sizeof *races; i++)
        if (!strcmp(argv[1], races[i].name)) r = &races[i];
    if (!r) {
        fprintf(stderr, "race: one of the names at the top of race.c\n");
        return 2;
    }
    kvf_threads *threads;
    kvf_backend *b;
    check(kvf_threads_open(&threads, 2, &kvf_mem_default, NULL));
    unsigned flags = kvf_cpu_detect();
    kvf_cpu_level level;
    check(kvf_cpu_level_parse(&level, "auto", flags, NULL));
    kvf_cpu_backend_params p = { .level = level, .flags = flags, .threads = threads, .mem = &kvf_mem_default };
    check(kvf_cpu_backend_open(&b, &p, NULL));
    pthread_t t;
    if (pthread_create(&t, NULL, touch, r->touched) != 0) return 2;
    r->run(b);
    pthread_join(t, NULL);
    b->ops->close(b);
    kvf_threads_close(threads);
    return 0;
}
