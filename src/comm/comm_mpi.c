/* comm_mpi.c - the processes of MPI_COMM_WORLD; a module of its own (libkvfold_mpi), so that the library
 * links no MPI.
 *
 * Errors come back as statuses, on a communicator of our own: the world's handler, which ends the process,
 * stays as it is for others.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <limits.h>
#include <mpi.h>

#include "comm/comm.h"

typedef struct mpi_comm {
    kvf_comm base;
    MPI_Comm world;
    bool started; /* MPI is ours to end */
} mpi_comm;

static mpi_comm *self(kvf_comm *c) { return (mpi_comm *)c; }

static kvf_status told(int rc, const char *what, kvf_error *err)
{
    char text[MPI_MAX_ERROR_STRING + 1];
    int n = 0;
    if (rc == MPI_SUCCESS) return KVF_OK;
    if (MPI_Error_string(rc, text, &n) != MPI_SUCCESS) n = 0;
    text[n] = 0;
    return kvf_fail(err, KVF_ERR_IO, "MPI: %s: %s; end all ranks and begin anew", what, text);
}

/* MPI counts in int. */
static kvf_status count_of(size_t bytes, int *out, kvf_error *err)
{
    if (bytes > INT_MAX) return kvf_fail(err, KVF_ERR_LIMIT, "MPI: a message of %zu bytes; the most is %d", bytes, INT_MAX);
    *out = (int)bytes;
    return KVF_OK;
}

static kvf_status mpi_allgather(kvf_comm *c, const void *mine, void *all, size_t bytes, kvf_error *err)
{
    int n = 0;
    KVF_TRY(count_of(bytes, &n, err));
    const char *place = (const char *)all + (size_t)c->rank * bytes;
    return told(MPI_Allgather(mine == place ? MPI_IN_PLACE : mine, n, MPI_BYTE, all, n, MPI_BYTE, self(c)->world), "gathering", err);
}

static kvf_status mpi_bcast(kvf_comm *c, void *data, size_t bytes, int32_t root, kvf_error *err)
{
    int n = 0;
    KVF_TRY(count_of(bytes, &n, err));
    return told(MPI_Bcast(data, n, MPI_BYTE, root, self(c)->world), "sending to all", err);
}

static kvf_status mpi_sendrecv(kvf_comm *c, const kvf_comm_exchange *x, kvf_error *err)
{
    int out = 0, in = 0;
    KVF_TRY(count_of(x->send_bytes, &out, err));
    KVF_TRY(count_of(x->recv_bytes, &in, err));
    int to = x->to < 0 ? MPI_PROC_NULL : x->to, from = x->from < 0 ? MPI_PROC_NULL : x->from;
    return told(MPI_Sendrecv(x->send, out, MPI_BYTE, to, 0, x->recv, in, MPI_BYTE, from, 0, self(c)->world, MPI_STATUS_IGNORE),
                "an exchange", err);
}

static kvf_status mpi_barrier(kvf_comm *c, kvf_error *err) { return told(MPI_Barrier(self(c)->world), "waiting for all", err); }

static void mpi_close(kvf_comm *comm)
{
    if (!comm) return;
    mpi_comm *c = self(comm);
    if (c->world != MPI_COMM_NULL) MPI_Comm_free(&c->world);
    if (c->started) MPI_Finalize();
    kvf_free(comm->mem, comm);
}

static const kvf_comm_ops mpi_ops = { KVF_COMM_ABI, "mpi", mpi_close, mpi_allgather, mpi_bcast, mpi_sendrecv, mpi_barrier };

static kvf_status start(mpi_comm *c, kvf_error *err)
{
    int is = 0, was = 0, level = 0, rank = 0, size = 0;
    KVF_TRY(told(MPI_Finalized(&was), "asking for its state", err));
    if (was) return kvf_fail(err, KVF_ERR_STATE, "MPI has ended in this process and cannot begin again");
    KVF_TRY(told(MPI_Initialized(&is), "asking for its state", err));
    if (!is) {
        KVF_TRY(told(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level), "starting", err));
        c->started = true;
    }
    KVF_TRY(told(MPI_Comm_dup(MPI_COMM_WORLD, &c->world), "a communicator", err));
    KVF_TRY(told(MPI_Comm_set_errhandler(c->world, MPI_ERRORS_RETURN), "a communicator", err));
    KVF_TRY(told(MPI_Comm_rank(c->world, &rank), "the rank", err));
    KVF_TRY(told(MPI_Comm_size(c->world, &size), "the number of ranks", err));
    c->base.rank = rank;
    c->base.size = size;
    return KVF_OK;
}

static kvf_status mpi_open(kvf_comm **out, const kvf_mem *mem, kvf_error *err)
{
    void *block;
    *out = NULL;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(mpi_comm), err));
    mpi_comm *c = block;
    c->base.ops = &mpi_ops;
    c->base.mem = mem;
    c->world = MPI_COMM_NULL;
    kvf_status rc = start(c, err);
    if (rc < 0)
        mpi_close(&c->base);
    else
        *out = &c->base;
    return rc;
}

KVF_API const kvf_comm_module *kvf_comm_module_1(void);

const kvf_comm_module *kvf_comm_module_1(void)
{
    static const kvf_comm_module module = { KVF_COMM_ABI, mpi_open };
    return &module;
}
