/* turn.h - a lock that is handed on in the order it was asked for.
 *
 * A plain mutex lets its last holder take it again before a sleeper wakes: a session that decodes
 * in a loop would keep one that reads a document from ever getting a chunk in.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVF_BASE_TURN_H
#define KVF_BASE_TURN_H

#include <pthread.h>
#include <stdint.h>

typedef struct kvf_turn {
    pthread_mutex_t lock;
    pthread_cond_t next;
    uint64_t n_asked, n_served; /* the holder's number is n_served */
} kvf_turn;

void kvf_turn_init(kvf_turn *t);
void kvf_turn_fini(kvf_turn *t);
void kvf_turn_take(kvf_turn *t);
void kvf_turn_give(kvf_turn *t);

#endif
