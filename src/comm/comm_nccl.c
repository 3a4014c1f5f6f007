/* comm_nccl.c - ranks over NCCL, one device each; buffers are device memory and calls go to the backend's
 * stream, so that they can be part of a recorded step.
 *
 * NCCL is opened at run time through prototypes of our own (its C interface is stable since 2.0): nothing
 * links it, and every machine compiles this. Its communicator's name, 128 bytes, goes from rank 0 to the others
 * over another communicator.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <dlfcn.h>
#include <string.h>

#include "comm/comm.h"

typedef struct nccl_id {
    char bytes[128];
} nccl_id;

enum { NCCL_INT8 = 0 }; /* ncclInt8: bytes */

/* nccl.h's functions; results are ncclResult_t, 0 for success. */
typedef struct nccl_table {
    int (*get_unique_id)(nccl_id *id);
    int (*comm_init_rank)(void **comm, int n, nccl_id id, int rank);
    int (*comm_destroy)(void *comm);
    int (*all_gather)(const void *send, void *recv, size_t n, int type, void *comm, void *stream);
    int (*broadcast)(const void *send, void *recv, size_t n, int type, int root, void *comm, void *stream);
    int (*send)(const void *data, size_t n, int type, int peer, void *comm, void *stream);
    int (*recv)(void *data, size_t n, int type, int peer, void *comm, void *stream);
    int (*group_start)(void);
    int (*group_end)(void);
    const char *(*error_string)(int rc);
} nccl_table;

typedef struct nccl_comm {
    kvf_comm base;
    nccl_table t;
    kvf_backend *backend;
    void *stream, *comm;
    void *flags; /* backend memory, a byte a rank: what a barrier gathers */
} nccl_comm;

static nccl_comm *self(kvf_comm *c) { return (nccl_comm *)c; }

static kvf_status told(const nccl_comm *c, int rc, const char *what, kvf_error *err)
{
    if (rc == 0) return KVF_OK;
    return kvf_fail(err, KVF_ERR_INTERNAL, "NCCL: %s: %s; end all ranks and begin anew", what, c->t.error_string(rc));
}

static kvf_status nccl_allgather(kvf_comm *comm, const void *mine, void *all, size_t bytes, kvf_error *err)
{
    nccl_comm *c = self(comm);
    if (bytes == 0) return KVF_OK;
    return told(c, c->t.all_gather(mine, all, bytes, NCCL_INT8, c->comm, c->stream), "gathering", err);
}

static kvf_status nccl_bcast(kvf_comm *comm, void *data, size_t bytes, int32_t root, kvf_error *err)
{
    nccl_comm *c = self(comm);
    if (bytes == 0) return KVF_OK;
    return told(c, c->t.broadcast(data, data, bytes, NCCL_INT8, root, c->comm, c->stream), "sending to all", err);
}

/* One group, so that neither waits for the other. */
static kvf_status nccl_sendrecv(kvf_comm *comm, const kvf_comm_exchange *x, kvf_error *err)
{
    nccl_comm *c = self(comm);
    KVF_TRY(told(c, c->t.group_start(), "an exchange", err));
    int rc = 0;
    if (x->to >= 0 && x->send_bytes > 0) rc = c->t.send(x->send, x->send_bytes, NCCL_INT8, x->to, c->comm, c->stream);
    if (rc == 0 && x->from >= 0 && x->recv_bytes > 0)
        rc = c->t.recv(x->recv, x->recv_bytes, NCCL_INT8, x->from, c->comm, c->stream);
    int end = c->t.group_end();
    return told(c, rc ? rc : end, "an exchange", err);
}

static kvf_status nccl_barrier(kvf_comm *comm, kvf_error *err)
{
    nccl_comm *c = self(comm);
    KVF_TRY(nccl_allgather(comm, (char *)c->flags + comm->rank, c->flags, 1, err));
    return c->backend->ops->sync(c->backend, err);
}

static void nccl_close(kvf_comm *comm)
{
    if (!comm) return;
    nccl_comm *c = self(comm);
    if (c->comm) c->t.comm_destroy(c->comm);
    if (c->flags) c->backend->ops->release(c->backend, c->flags);
    kvf_free(comm->mem, comm);
}

static const kvf_comm_ops nccl_ops = { KVF_COMM_ABI, "nccl", nccl_close, nccl_allgather, nccl_bcast, nccl_sendrecv, nccl_barrier };

/* Never unloaded: its threads and the driver's stay. */
static kvf_status load(nccl_table *t, const char *library, kvf_error *err)
{
    void *at = dlopen(library, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!at) {
        const char *why = dlerror();
        return kvf_fail(err, KVF_ERR_UNSUPPORTED, "NCCL cannot be loaded (%s); install it (libnccl2), or use another communicator",
                        why ? why : "no reason given");
    }
    const struct {
        const char *name;
        void *to;
    } want[] = { { "ncclGetUniqueId", &t->get_unique_id }, { "ncclCommInitRank", &t->comm_init_rank },
                 { "ncclCommDestroy", &t->comm_destroy },  { "ncclAllGather", &t->all_gather },
                 { "ncclBroadcast", &t->broadcast },       { "ncclSend", &t->send },
                 { "ncclRecv", &t->recv },                 { "ncclGroupStart", &t->group_start },
                 { "ncclGroupEnd", &t->group_end },        { "ncclGetErrorString", &t->error_string } };
    const char *missing = NULL;
    for (size_t i = 0; i < sizeof want / sizeof *want && !missing; i++) {
        void *found = dlsym(at, want[i].name);
        if (!found) missing = want[i].name;
        memcpy(want[i].to, &found, sizeof found);
    }
    dlclose(at);
    if (!missing) return KVF_OK;
    return kvf_fail(err, KVF_ERR_UNSUPPORTED, "NCCL has no %s; install NCCL 2.7 or later", missing);
}

static kvf_status start(nccl_comm *c, kvf_comm *over, kvf_error *err)
{
    /* Rank 0's answer goes with the name: all ranks fail together or none does. */
    struct {
        nccl_id id;
        int32_t rc;
    } told_id;
    memset(&told_id, 0, sizeof told_id);
    if (over->rank == 0) told_id.rc = c->t.get_unique_id(&told_id.id);
    KVF_TRY(over->ops->bcast(over, &told_id, sizeof told_id, 0, err));
    KVF_TRY(told(c, told_id.rc, "naming the communicator", err));
    KVF_TRY(c->backend->ops->alloc(c->backend, &c->flags, (size_t)c->base.size, err));
    KVF_TRY(c->backend->ops->sync(c->backend, err));
    return told(c, c->t.comm_init_rank(&c->comm, c->base.size, told_id.id, c->base.rank), "opening the communicator", err);
}

kvf_status kvf_comm_nccl_open(kvf_comm **out, const kvf_comm_nccl_params *p, kvf_error *err)
{
    void *block;
    *out = NULL;
    if (p->over->device) return kvf_fail(err, KVF_ERR_ARG, "the ranks of NCCL must find each other through host memory");
    KVF_TRY(kvf_mem_get(p->over->mem, &block, 1, sizeof(nccl_comm), err));
    nccl_comm *c = block;
    c->base = (kvf_comm){ .ops = &nccl_ops, .mem = p->over->mem, .rank = p->over->rank, .size = p->over->size, .device = true };
    c->backend = p->backend;
    c->stream = p->stream;
    kvf_status rc = load(&c->t, p->library ? p->library : "libnccl.so.2", err);
    if (rc >= 0) rc = start(c, p->over, err);
    if (rc < 0)
        nccl_close(&c->base);
    else
        *out = &c->base;
    return rc;
}
