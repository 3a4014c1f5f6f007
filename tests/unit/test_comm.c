/* test_comm.c - n logical ranks say what they should to each other, and attend to a sequence of which each has
 * some blocks as one rank does that has all: on the CPU, and on the device's kernels, emulated.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>

#include "tests/comm/seq_case.h"
#include "tests/cuda/rig.h"

enum { MOST = 8 };

typedef struct worker worker;
struct worker {
    kvf_comm *comm;
    kvf_backend *be;
    const seq_case *c;
    seq_result result;
    kvf_status (*job)(worker *w);
    kvf_status rc;
    kvf_error err;
    int32_t quits_at;
};

static void *work(void *arg)
{
    worker *w = arg;
    w->rc = w->job(w);
    if (w->comm && w->rc < 0) { /* as a caller does: the others must not wait */
        w->comm->ops->close(w->comm);
        w->comm = NULL;
    }
    return NULL;
}

static void run_ranks(worker *w, int32_t n, const worker *like)
{
    kvf_comm *comm[MOST];
    pthread_t thread[MOST];
    OK(kvf_comm_self_open(comm, n, &kvf_mem_default, &err));
    for (int32_t r = 0; r < n; r++) {
        w[r] = *like;
        w[r].comm = comm[r];
        if (like->c) OK(seq_result_open(&w[r].result, like->c, &err));
    }
    for (int32_t r = 0; r < n; r++) cr_assert_eq(pthread_create(&thread[r], NULL, work, &w[r]), 0);
    for (int32_t r = 0; r < n; r++) pthread_join(thread[r], NULL);
    for (int32_t r = 0; r < n; r++)
        if (w[r].comm) w[r].comm->ops->close(w[r].comm);
}

static void drop_results(worker *w, int32_t n)
{
    for (int32_t r = 0; r < n; r++) seq_result_close(&w[r].result);
}

/* ---- Collectives ------------------------------------------------------------------------------ */

static kvf_status say_much(worker *w)
{
    kvf_comm *c = w->comm;
    for (int round = 0; round < 200; round++) {
        int32_t mine = c->rank * 1000 + round, all[MOST], got = -1, x = mine;
        KVF_TRY(c->ops->allgather(c, &mine, all, sizeof mine, &w->err));
        for (int32_t r = 0; r < c->size; r++)
            if (all[r] != r * 1000 + round) return kvf_fail(&w->err, KVF_ERR_INTERNAL, "gathered %d", all[r]);
        KVF_TRY(c->ops->bcast(c, &x, sizeof x, round % c->size, &w->err));
        if (x != round % c->size * 1000 + round) return kvf_fail(&w->err, KVF_ERR_INTERNAL, "sent %d", x);
        int32_t step = round % c->size;
        kvf_comm_exchange ring = { &mine, sizeof mine, (c->rank + step) % c->size, &got, sizeof got, (c->rank + c->size - step) % c->size };
        KVF_TRY(c->ops->sendrecv(c, &ring, &w->err));
        if (got != ring.from * 1000 + round) return kvf_fail(&w->err, KVF_ERR_INTERNAL, "exchanged %d", got);
        if (round % 3 == 0) KVF_TRY(c->ops->barrier(c, &w->err));
    }
    return KVF_OK;
}

Test(comm, ranks_get_what_the_others_sent)
{
    worker w[MOST];
    for (int32_t n = 1; n <= MOST; n++) {
        run_ranks(w, n, &(worker){ .job = say_much });
        for (int32_t r = 0; r < n; r++) cr_assert_geq(w[r].rc, 0, "%d of %d: %s", r, n, w[r].err.msg);
    }
}

static kvf_status leave_early(worker *w)
{
    if (w->comm->rank == 1) return kvf_fail(&w->err, KVF_ERR_NOMEM, "out of memory");
    for (;;) KVF_TRY(w->comm->ops->barrier(w->comm, &w->err));
}

Test(comm, a_rank_that_leaves_does_not_let_the_others_wait)
{
    worker w[MOST];
    for (int32_t n = 2; n <= MOST; n++) {
        run_ranks(w, n, &(worker){ .job = leave_early });
        for (int32_t r = 0; r < n; r++) cr_assert_eq(w[r].rc, r == 1 ? KVF_ERR_NOMEM : KVF_ERR_STATE);
    }
}

static kvf_status say_different_things(worker *w)
{
    kvf_comm *c = w->comm;
    char room[64 * MOST] = { 0 };
    if (c->rank == 0) return c->ops->barrier(c, &w->err);
    return c->ops->allgather(c, room + 64, room, c->rank == 1 ? 8 : 4, &w->err);
}

static kvf_status send_past_each_other(worker *w)
{
    int32_t x = 0, y = 0;
    kvf_comm_exchange e = { &x, sizeof x, 0, &y, sizeof y, (w->comm->rank + 1) % w->comm->size };
    return w->comm->ops->sendrecv(w->comm, &e, &w->err);
}

Test(comm, calls_that_do_not_match_are_refused)
{
    worker w[MOST];
    run_ranks(w, 3, &(worker){ .job = say_different_things });
    for (int32_t r = 0; r < 3; r++) cr_assert_eq(w[r].rc, KVF_ERR_STATE, "%d", r);
    run_ranks(w, 3, &(worker){ .job = send_past_each_other });
    for (int32_t r = 1; r < 3; r++) cr_assert_eq(w[r].rc, KVF_ERR_STATE, "%d", r);
    kvf_comm *one;
    cr_assert_eq(kvf_comm_self_open(&one, 0, &kvf_mem_default, &err), KVF_ERR_ARG);
    OK(kvf_comm_self_open(&one, 1, &kvf_mem_default, &err));
    int x = 0;
    cr_assert_eq(one->ops->bcast(one, &x, sizeof x, 1, &err), KVF_ERR_ARG);
    one->ops->close(one);
}

/* ---- Attention -------------------------------------------------------------------------------- */

static kvf_status attend(worker *w) { return seq_run(w->comm, w->be, w->c, &w->result, &w->err); }

/* What the attention op itself gives for all keys in one list: for cases in which all blocks are read. */
static void check_alone(kvf_backend *cpu, const seq_case *c, const seq_result *got)
{
    int64_t n = (c->n_key + KVF_BLOCK - 1) / KVF_BLOCK;
    seq_result want = { 0 };
    OK(seq_result_open(&want, c, &err));
    if (n == 0)
        for (size_t i = 0; i < seq_rows(c); i++) want.lse[i] = -INFINITY;
    kvf_comm *one;
    OK(kvf_comm_self_open(&one, 1, &kvf_mem_default, &err));
    seq_room r;
    memset(&r, 0, sizeof r);
    OK(seq_fill(cpu, one, c, &r, &err));
    kvf_attn_args t = { .q = r.q, .o = want.o, .lse = want.lse, .n_tok = c->n_tok, .n_head = c->n_head, .n_head_kv = c->n_head_kv,
                        .head_dim = c->head_dim, .scale = 0.25f, .softcap = c->softcap, .kv = &r.view, .slots = r.slots,
                        .n_key = c->n_key, .q_first = c->q_first };
    OK(cpu->ops->attn(cpu, &t, &err));
    cr_assert_lt(seq_distance(c, &want, got), 5e-6);
    seq_release(cpu, &r);
    one->ops->close(one);
    seq_result_close(&want);
}

/* rounded: of cases with many rows, in which the device's attention rounds queries and weights to f16. */
static void compare_sizes(kvf_backend *be, kvf_backend *plain, int from, int to, double rounded)
{
    static const int32_t sizes[] = { 2, 3, 4, 8 };
    for (int i = from; i < to; i++) {
        seq_case c = seq_case_of(i);
        worker one[1], many[MOST];
        double tolerance = c.n_tok > 1 ? rounded : 5e-6;
        run_ranks(one, 1, &(worker){ .job = attend, .be = be, .c = &c });
        cr_assert_geq(one->rc, 0, "case %d: %s", i, one->err.msg);
        bool all = c.n_first + c.n_last + c.n_top >= (c.n_key + KVF_BLOCK - 1) / KVF_BLOCK;
        if (all && plain) check_alone(plain, &c, &one->result);
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            int64_t read = 0;
            run_ranks(many, sizes[k], &(worker){ .job = attend, .be = be, .c = &c });
            for (int32_t r = 0; r < sizes[k]; r++) {
                cr_assert_geq(many[r].rc, 0, "case %d, rank %d of %d: %s", i, r, sizes[k], many[r].err.msg);
                double off = seq_distance(&c, &one->result, &many[r].result);
                cr_assert_lt(off, tolerance, "case %d, rank %d of %d: off by %g", i, r, sizes[k], off);
                cr_assert(seq_same(&c, &many[0].result, &many[r].result), "case %d: ranks differ", i);
                read += many[r].result.report.n_read;
            }
            cr_assert_eq(read, one->result.report.n_read, "case %d: %d ranks read %lld blocks, one %lld", i, sizes[k], (long long)read,
                         (long long)one->result.report.n_read);
            drop_results(many, sizes[k]);
        }
        drop_results(one, 1);
    }
}

Test(comm, many_ranks_attend_as_one)
{
    kvf_threads *threads;
    kvf_backend *cpu;
    OK(kvf_threads_open(&threads, 1, &kvf_mem_default, &err));
    kvf_cpu_backend_params p = { .level = KVF_CPU_LEVEL_REF, .f32 = true, .threads = threads, .mem = &kvf_mem_default };
    OK(kvf_cpu_backend_open(&cpu, &p, &err));
    compare_sizes(cpu, cpu, 0, 36, 5e-6);
    cpu->ops->close(cpu);
    kvf_threads_close(threads);
}

#if defined(KVF_TEST_CUDA_EMU) || defined(KVF_TEST_CUDA)
/* Emulated, what stands for NCCL; on a device NCCL itself, if it is there. */
#ifndef KVF_FAKE_NCCL
#define KVF_FAKE_NCCL NULL
#endif

Test(comm, many_ranks_on_a_device_attend_as_one)
{
    rig r;
    rig_open(&r, true);
    for (int order = 0; order < 2; order++) {
        seed_order((uint64_t)order);
        compare_sizes(r.dev, NULL, 3 + order, 7 + order, 2e-3);
        compare_sizes(r.dev, NULL, 13 + 3 * order, 15 + 3 * order, 2e-3);
    }
    rig_close(&r);
}

/* One rank: buffers of the device, calls on its stream. */
Test(comm, nccl_carries_the_device_s_memory)
{
    rig r;
    kvf_comm *self, *nccl;
    rig_open(&r, true);
    OK(kvf_comm_self_open(&self, 1, &kvf_mem_default, &err));
    kvf_comm_nccl_params p = { self, r.dev, r.module->stream(r.dev), KVF_FAKE_NCCL };
    kvf_status rc = kvf_comm_nccl_open(&nccl, &p, &err);
    if (rc == KVF_ERR_UNSUPPORTED && !p.library) cr_skip_test("%s", err.msg);
    OK(rc);
    OK(nccl->ops->barrier(nccl, &err));
    int32_t *x = dev_put(&r, (int32_t[2]){ 5, 6 }, 8), *back;
    kvf_comm_exchange e = { x, sizeof *x, 0, x + 1, sizeof *x, 0 };
    OK(nccl->ops->sendrecv(nccl, &e, &err));
    OK(nccl->ops->bcast(nccl, x, 8, 0, &err));
    back = dev_get(&r, x, 8);
    cr_assert(back[0] == 5 && back[1] == 5);
    cr_assert_eq(nccl->ops->bcast(nccl, x, 8, 1, &err), KVF_ERR_INTERNAL, "NCCL's refusals come back");
    dev_drop(&r, x);
    drop(back);
    for (int i = 4; i < 16; i += 3) {
        seq_case c = seq_case_of(i);
        seq_result host, device;
        OK(seq_result_open(&host, &c, &err));
        OK(seq_result_open(&device, &c, &err));
        OK(seq_run(self, r.dev, &c, &host, &err));
        OK(seq_run(nccl, r.dev, &c, &device, &err));
        cr_assert(seq_same(&c, &host, &device), "case %d", i);
        seq_result_close(&host);
        seq_result_close(&device);
    }
    nccl->ops->close(nccl);
    p.library = "libkvfold_no_such_nccl.so";
    cr_assert_eq(kvf_comm_nccl_open(&nccl, &p, &err), KVF_ERR_UNSUPPORTED);
    p.library = "libm.so.6";
    cr_assert_eq(kvf_comm_nccl_open(&nccl, &p, &err), KVF_ERR_UNSUPPORTED, "a library without its functions");
    self->ops->close(self);
    rig_close(&r);
}
#endif

Test(comm, digests_are_asked_for_only_where_a_choice_is_made)
{
    kvf_threads *threads;
    kvf_backend *cpu;
    kvf_comm *one;
    kvf_seq *s;
    float q[8] = { 0 }, o[8], lse[1];
    OK(kvf_threads_open(&threads, 1, &kvf_mem_default, &err));
    kvf_cpu_backend_params p = { .level = KVF_CPU_LEVEL_REF, .threads = threads, .mem = &kvf_mem_default };
    OK(kvf_cpu_backend_open(&cpu, &p, &err));
    OK(kvf_comm_self_open(&one, 1, &kvf_mem_default, &err));
    OK(kvf_seq_open(&s, one, cpu, &err));
    kvf_seq_args a = { .q = q, .o = o, .lse = lse, .n_tok = 1, .n_head = 1, .n_head_kv = 1, .head_dim = 8, .n_key = 300, .n_top = 2 };
    kvf_turn_take(&cpu->run);
    cr_assert_eq(kvf_seq_attend(s, &a, NULL, &err), KVF_ERR_ARG);
    a.n_key = -1;
    cr_assert_eq(kvf_seq_attend(s, &a, NULL, &err), KVF_ERR_ARG);
    a.n_key = 0;
    OK(kvf_seq_attend(s, &a, NULL, &err));
    cr_assert(o[0] == 0 && isinf(lse[0]));
    kvf_turn_give(&cpu->run);
    kvf_seq_close(s);
    one->ops->close(one);
    cpu->ops->close(cpu);
    kvf_threads_close(threads);
}
