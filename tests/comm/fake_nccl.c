/* fake_nccl.c - a libnccl.so.2 of one rank whose device memory is host memory: what comm_nccl.c calls, with
 * NCCL's signatures, so that its calls are tested where there is no device.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stddef.h>
#include <string.h>

typedef struct fake_id {
    char bytes[128];
} fake_id;

static char communicator;
static const void *sent;
static void *wanted;
static size_t n_sent, n_wanted;
static int depth;

#define EXPORT __attribute__((visibility("default")))
#define INVALID 4 /* ncclInvalidArgument */

EXPORT int ncclGetUniqueId(fake_id *id);
EXPORT int ncclCommInitRank(void **comm, int n, fake_id id, int rank);
EXPORT int ncclCommDestroy(void *comm);
EXPORT int ncclAllGather(const void *send, void *recv, size_t n, int type, void *comm, void *stream);
EXPORT int ncclBroadcast(const void *send, void *recv, size_t n, int type, int root, void *comm, void *stream);
EXPORT int ncclSend(const void *data, size_t n, int type, int peer, void *comm, void *stream);
EXPORT int ncclRecv(void *data, size_t n, int type, int peer, void *comm, void *stream);
EXPORT int ncclGroupStart(void);
EXPORT int ncclGroupEnd(void);
EXPORT const char *ncclGetErrorString(int rc);

static int bad(int type, const void *comm) { return type != 0 || comm != &communicator; }

int ncclGetUniqueId(fake_id *id)
{
    memset(id, 'k', sizeof *id);
    return 0;
}

int ncclCommInitRank(void **comm, int n, fake_id id, int rank)
{
    for (size_t i = 0; i < sizeof id.bytes; i++)
        if (id.bytes[i] != 'k') return INVALID;
    if (n != 1 || rank != 0) return INVALID;
    *comm = &communicator;
    return 0;
}

int ncclCommDestroy(void *comm) { return comm == &communicator ? 0 : INVALID; }

int ncclAllGather(const void *send, void *recv, size_t n, int type, void *comm, void *stream)
{
    if (bad(type, comm) || !stream) return INVALID;
    memmove(recv, send, n);
    return 0;
}

int ncclBroadcast(const void *send, void *recv, size_t n, int type, int root, void *comm, void *stream)
{
    return root == 0 ? ncclAllGather(send, recv, n, type, comm, stream) : INVALID;
}

int ncclSend(const void *data, size_t n, int type, int peer, void *comm, void *stream)
{
    if (bad(type, comm) || !stream || peer != 0 || depth != 1) return INVALID;
    sent = data;
    n_sent = n;
    return 0;
}

int ncclRecv(void *data, size_t n, int type, int peer, void *comm, void *stream)
{
    if (bad(type, comm) || !stream || peer != 0 || depth != 1) return INVALID;
    wanted = data;
    n_wanted = n;
    return 0;
}

int ncclGroupStart(void)
{
    depth++;
    return 0;
}

int ncclGroupEnd(void)
{
    depth--;
    if (n_sent != n_wanted) return INVALID;
    if (n_sent) memmove(wanted, sent, n_sent);
    n_sent = n_wanted = 0;
    return 0;
}

const char *ncclGetErrorString(int rc) { return rc == INVALID ? "invalid argument" : "no error"; }
