/* comm.h - what ranks that work on one sequence say to each other: one small table.
 *
 * Every call is collective: all ranks of a communicator make the same calls in the same order, with the
 * same sizes; each is used by one thread at a time. A call blocks until this rank's buffers may be used
 * again. Buffers are host memory, or, with comm->device, memory of the backend the communicator was opened
 * with (then a call is ordered with the backend's ops and does not wait for them).
 *
 * After an error the ranks no longer agree on where they are: close the communicator.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_COMM_COMM_H
#define KVF_COMM_COMM_H

#include "backend/backend.h"

#define KVF_COMM_ABI 1u

typedef struct kvf_comm kvf_comm;

/* To one rank and from one, at the same time; a rank of -1: nothing that way. Who sends to r is whom r
 * receives from, with the same size. */
typedef struct kvf_comm_exchange {
    const void *send;
    size_t send_bytes;
    int32_t to;
    void *recv;
    size_t recv_bytes;
    int32_t from;
} kvf_comm_exchange;

typedef struct kvf_comm_ops {
    uint32_t abi; /* KVF_COMM_ABI */
    const char *name;
    void (*close)(kvf_comm *c);
    /* all [size][bytes]: `mine` of every rank in the order of ranks; mine may lie at its place in all. */
    kvf_status (*allgather)(kvf_comm *c, const void *mine, void *all, size_t bytes, kvf_error *err);
    kvf_status (*bcast)(kvf_comm *c, void *data, size_t bytes, int32_t root, kvf_error *err);
    kvf_status (*sendrecv)(kvf_comm *c, const kvf_comm_exchange *x, kvf_error *err);
    kvf_status (*barrier)(kvf_comm *c, kvf_error *err);
} kvf_comm_ops;

struct kvf_comm {
    const kvf_comm_ops *ops;
    const kvf_mem *mem;
    int32_t rank, size;
    bool device; /* buffers are the backend's memory */
};

/* n logical ranks in one process, out[n]; each is then used by a thread of its own, or with n = 1 by any. A rank
 * that closes lets the others' later calls fail with STATE instead of waiting for ever. 1 <= n <= 4096.
 * Errors: ARG, NOMEM. */
kvf_status kvf_comm_self_open(kvf_comm **out, int32_t n, const kvf_mem *mem, kvf_error *err);

/* The processes of MPI_COMM_WORLD, through the module libkvfold_mpi.so from `folder`, or with NULL from where
 * the loader looks. Starts MPI if nobody has, and then ends it at close; a process can do that once.
 * Errors: UNSUPPORTED (no module), IO (MPI's own). */
kvf_status kvf_comm_mpi_open(kvf_comm **out, const char *folder, const kvf_mem *mem, kvf_error *err);

typedef struct kvf_comm_nccl_params {
    kvf_comm *over;       /* borrowed for the call: how the ranks find each other; host memory, one device each */
    kvf_backend *backend; /* borrowed; its device is current in the calling thread, as its open leaves it */
    void *stream;         /* the backend's (backend_load.h: stream) */
    const char *library;  /* NULL: libnccl.so.2 */
} kvf_comm_nccl_params;

/* The same ranks over NCCL, which is loaded now. NCCL takes one rank a device.
 * Errors: UNSUPPORTED (no NCCL, or one without what is needed), INTERNAL (NCCL's own), NOMEM. */
kvf_status kvf_comm_nccl_open(kvf_comm **out, const kvf_comm_nccl_params *p, kvf_error *err);

/* What the module of MPI exports. */
#define KVF_COMM_MODULE_ENTRY "kvf_comm_module_1"
typedef struct kvf_comm_module {
    uint32_t abi; /* KVF_COMM_ABI */
    kvf_status (*open)(kvf_comm **out, const kvf_mem *mem, kvf_error *err);
} kvf_comm_module;
typedef const kvf_comm_module *(*kvf_comm_module_fn)(void);

#endif
