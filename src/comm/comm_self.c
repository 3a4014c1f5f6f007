/* comm_self.c - n logical ranks in one process: each call is a meeting in which ranks show where their
 * data lies, and copy from each other.
 *
 * A meeting has two gates. Between the first, at which all data is shown, and the second, after which it may
 * change, every rank copies for itself. Nobody waits at a gate for a rank that has left.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <string.h>

#include "comm/comm.h"

typedef enum call_kind { CALL_ALLGATHER, CALL_BCAST, CALL_EXCHANGE, CALL_BARRIER } call_kind;

/* What a rank shows at a meeting. */
typedef struct shown {
    call_kind kind;
    const void *data;
    size_t bytes;
    int32_t peer; /* root of a bcast, receiver of an exchange */
} shown;

typedef struct group {
    const kvf_mem *mem;
    pthread_mutex_t lock;
    pthread_cond_t opened;
    int32_t size, n_here, n_left;
    uint64_t gate;   /* gates opened so far */
    shown *rank;     /* [size] */
} group;

typedef struct self_comm {
    kvf_comm base;
    group *g;
} self_comm;

static kvf_status pass_gate(self_comm *c, kvf_error *err)
{
    group *g = c->g;
    pthread_mutex_lock(&g->lock);
    uint64_t gate = g->gate;
    if (g->n_left == 0 && ++g->n_here == g->size) {
        g->n_here = 0;
        g->gate++;
        pthread_cond_broadcast(&g->opened);
    }
    while (g->gate == gate && g->n_left == 0) pthread_cond_wait(&g->opened, &g->lock);
    bool passed = g->gate != gate;
    pthread_mutex_unlock(&g->lock);
    if (passed) return KVF_OK;
    return kvf_fail(err, KVF_ERR_STATE, "rank %d waits for a rank that has left; close all ranks and begin anew", c->base.rank);
}

static kvf_status differ(const self_comm *c, const char *what, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_STATE, "ranks disagree on %s, says rank %d; all must make the same calls in the same order", what,
                    c->base.rank);
}

/* Same call, and same size, in all ranks? */
static kvf_status check_shown(const self_comm *c, const shown *mine, kvf_error *err)
{
    for (int32_t r = 0; r < c->g->size; r++) {
        const shown *s = &c->g->rank[r];
        if (s->kind != mine->kind) return differ(c, "the call", err);
        if (mine->kind == CALL_EXCHANGE) continue;
        if (s->bytes != mine->bytes) return differ(c, "the size", err);
        if (mine->kind == CALL_BCAST && s->peer != mine->peer) return differ(c, "the root", err);
    }
    return KVF_OK;
}

/* Show, check that all show the same. Every meeting that begins well must be ended with leave(). */
static kvf_status meet(self_comm *c, const shown *mine, kvf_error *err)
{
    c->g->rank[c->base.rank] = *mine;
    return pass_gate(c, err);
}

/* Nothing is compared after the second gate, so an error keeps until all have passed it. */
static kvf_status leave(self_comm *c, kvf_status rc, kvf_error *err)
{
    kvf_status gate = pass_gate(c, rc < 0 ? NULL : err);
    return rc < 0 ? rc : gate;
}

static self_comm *self(kvf_comm *c) { return (self_comm *)c; }

static kvf_status self_allgather(kvf_comm *comm, const void *mine, void *all, size_t bytes, kvf_error *err)
{
    self_comm *c = self(comm);
    shown s = { .kind = CALL_ALLGATHER, .data = mine, .bytes = bytes };
    KVF_TRY(meet(c, &s, err));
    kvf_status rc = check_shown(c, &s, err);
    for (int32_t r = 0; rc >= 0 && bytes > 0 && r < comm->size; r++) {
        char *to = (char *)all + (size_t)r * bytes;
        if (to != c->g->rank[r].data) memcpy(to, c->g->rank[r].data, bytes);
    }
    return leave(c, rc, err);
}

static kvf_status check_rank(const kvf_comm *c, int32_t rank, bool none_too, kvf_error *err)
{
    if ((rank >= 0 && rank < c->size) || (none_too && rank == -1)) return KVF_OK;
    return kvf_fail(err, KVF_ERR_ARG, "there is no rank %d among %d", rank, c->size);
}

static kvf_status self_bcast(kvf_comm *comm, void *data, size_t bytes, int32_t root, kvf_error *err)
{
    self_comm *c = self(comm);
    KVF_TRY(check_rank(comm, root, false, err));
    shown s = { .kind = CALL_BCAST, .data = data, .bytes = bytes, .peer = root };
    KVF_TRY(meet(c, &s, err));
    kvf_status rc = check_shown(c, &s, err);
    if (rc >= 0 && comm->rank != root && bytes > 0) memcpy(data, c->g->rank[root].data, bytes);
    return leave(c, rc, err);
}

static kvf_status self_sendrecv(kvf_comm *comm, const kvf_comm_exchange *x, kvf_error *err)
{
    self_comm *c = self(comm);
    KVF_TRY(check_rank(comm, x->to, true, err));
    KVF_TRY(check_rank(comm, x->from, true, err));
    shown s = { .kind = CALL_EXCHANGE, .data = x->send, .bytes = x->send_bytes, .peer = x->to };
    KVF_TRY(meet(c, &s, err));
    kvf_status rc = check_shown(c, &s, err);
    if (rc >= 0 && x->from >= 0) {
        const shown *f = &c->g->rank[x->from];
        if (f->peer != comm->rank || f->bytes != x->recv_bytes)
            rc = differ(c, "who sends to whom, or how much", err);
        else if (f->bytes > 0)
            memcpy(x->recv, f->data, f->bytes);
    }
    return leave(c, rc, err);
}

static kvf_status self_barrier(kvf_comm *comm, kvf_error *err)
{
    self_comm *c = self(comm);
    shown s = { .kind = CALL_BARRIER };
    KVF_TRY(meet(c, &s, err));
    return leave(c, check_shown(c, &s, err), err);
}

static void release_group(group *g)
{
    const kvf_mem *mem = g->mem;
    pthread_cond_destroy(&g->opened);
    pthread_mutex_destroy(&g->lock);
    kvf_free(mem, g->rank);
    kvf_free(mem, g);
}

static void self_close(kvf_comm *comm)
{
    if (!comm) return;
    group *g = self(comm)->g;
    pthread_mutex_lock(&g->lock);
    bool last = ++g->n_left == g->size;
    pthread_cond_broadcast(&g->opened);
    pthread_mutex_unlock(&g->lock);
    kvf_free(comm->mem, comm);
    if (last) release_group(g);
}

static const kvf_comm_ops self_ops = { KVF_COMM_ABI, "self", self_close, self_allgather, self_bcast, self_sendrecv, self_barrier };

static kvf_status open_group(group **out, int32_t n, const kvf_mem *mem, kvf_error *err)
{
    void *block, *rank;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(group), err));
    kvf_status rc = kvf_mem_get(mem, &rank, (size_t)n, sizeof(shown), err);
    if (rc < 0) {
        kvf_free(mem, block);
        return rc;
    }
    group *g = block;
    g->mem = mem;
    g->size = n;
    g->rank = rank;
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->opened, NULL);
    *out = g;
    return KVF_OK;
}

kvf_status kvf_comm_self_open(kvf_comm **out, int32_t n, const kvf_mem *mem, kvf_error *err)
{
    if (n < 1 || n > 4096) return kvf_fail(err, KVF_ERR_ARG, "%d ranks; use 1 to 4096", n);
    for (int32_t r = 0; r < n; r++) out[r] = NULL;
    group *g;
    KVF_TRY(open_group(&g, n, mem, err));
    kvf_status rc = KVF_OK;
    for (int32_t r = 0; rc >= 0 && r < n; r++) {
        void *block;
        rc = kvf_mem_get(mem, &block, 1, sizeof(self_comm), err);
        if (rc < 0) break;
        self_comm *c = block;
        c->base = (kvf_comm){ .ops = &self_ops, .mem = mem, .rank = r, .size = n };
        c->g = g;
        out[r] = &c->base;
    }
    if (rc >= 0) return rc;
    for (int32_t r = 0; r < n; r++) {
        kvf_free(mem, out[r]);
        out[r] = NULL;
    }
    release_group(g);
    return rc;
}
