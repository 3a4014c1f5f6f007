/* comm_mpi.c - run by mpirun: each process is a rank; all must compute what one rank computes alone, and the
 * collectives must bring what was sent. Exit status 0, or 1 with a sentence; 77: no module of MPI.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "backend/cpu/cpu_backend.h"
#include "tests/comm/seq_case.h"

enum { CASES = 24 };

static kvf_status differs(const char *what, int i, kvf_error *err) { return kvf_fail(err, KVF_ERR_INTERNAL, "case %d: %s", i, what); }

/* Rings, roots and orders. */
static kvf_status try_collectives(kvf_comm *c, kvf_error *err)
{
    int32_t mine[3] = { c->rank, c->rank * 7, -1 }, all[3 * 64], got = -5;
    if (c->size > 64) return KVF_OK;
    KVF_TRY(c->ops->allgather(c, mine, all, sizeof mine, err));
    for (int32_t r = 0; r < c->size; r++)
        if (all[3 * r] != r || all[3 * r + 1] != 7 * r || all[3 * r + 2] != -1) return differs("gathered", r, err);
    all[3 * c->rank + 2] = c->rank; /* in place */
    KVF_TRY(c->ops->allgather(c, all + 3 * c->rank, all, sizeof mine, err));
    for (int32_t r = 0; r < c->size; r++)
        if (all[3 * r + 2] != r) return differs("gathered in place", r, err);
    for (int32_t root = 0; root < c->size; root++) {
        int32_t x = c->rank == root ? 100 + root : 0;
        KVF_TRY(c->ops->bcast(c, &x, sizeof x, root, err));
        if (x != 100 + root) return differs("sent to all", root, err);
    }
    kvf_comm_exchange ring = { mine, sizeof *mine, (c->rank + 1) % c->size, &got, sizeof got, (c->rank + c->size - 1) % c->size };
    KVF_TRY(c->ops->sendrecv(c, &ring, err));
    if (got != ring.from) return differs("the ring", got, err);
    kvf_comm_exchange line = ring; /* with two ends */
    if (c->rank == c->size - 1) line.to = -1;
    if (c->rank == 0) line.from = -1, got = -1;
    KVF_TRY(c->ops->sendrecv(c, &line, err));
    if (got != line.from) return differs("the line", got, err);
    return c->ops->barrier(c, err);
}

static kvf_status try_case(kvf_comm *world, kvf_backend *be, int i, kvf_error *err)
{
    seq_case c = seq_case_of(i);
    seq_result one, many;
    kvf_comm *alone;
    KVF_TRY(kvf_comm_self_open(&alone, 1, &kvf_mem_default, err));
    KVF_TRY(seq_result_open(&one, &c, err));
    KVF_TRY(seq_result_open(&many, &c, err));
    kvf_status rc = seq_run(alone, be, &c, &one, err);
    if (rc >= 0) rc = seq_run(world, be, &c, &many, err);
    if (rc >= 0 && !(seq_distance(&c, &one, &many) < 5e-6)) rc = differs("not what one rank computes", i, err);
    seq_result_close(&one);
    seq_result_close(&many);
    alone->ops->close(alone);
    return rc;
}

int main(void)
{
    kvf_error err = { 0 };
    kvf_comm *world;
    kvf_threads *threads;
    kvf_backend *be;
    kvf_status rc = kvf_comm_mpi_open(&world, KVF_TEST_MODULE_DIR, &kvf_mem_default, &err);
    if (rc < 0) {
        printf("%s\n", err.msg);
        return rc == KVF_ERR_UNSUPPORTED ? 77 : 1;
    }
    kvf_cpu_backend_params p = { .level = KVF_CPU_LEVEL_REF, .f32 = true, .mem = &kvf_mem_default };
    rc = kvf_threads_open(&threads, 1, &kvf_mem_default, &err);
    p.threads = threads;
    if (rc >= 0) rc = kvf_cpu_backend_open(&be, &p, &err);
    if (rc >= 0) rc = try_collectives(world, &err);
    for (int i = 0; rc >= 0 && i < CASES; i++) rc = try_case(world, be, i, &err);
    if (rc >= 0)
        printf("rank %d of %d: %d cases\n", world->rank, world->size, (int)CASES);
    else
        printf("rank %d of %d: %s\n", world->rank, world->size, err.msg);
    if (rc < 0) return 1; /* mpirun ends the others */
    be->ops->close(be);
    kvf_threads_close(threads);
    world->ops->close(world);
    return 0;
}
