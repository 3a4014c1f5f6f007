/* turn.c - see turn.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "base/turn.h"

void kvf_turn_init(kvf_turn *t)
{
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->next, NULL);
    t->n_asked = t->n_served = 0;
}

void kvf_turn_fini(kvf_turn *t)
{
    pthread_cond_destroy(&t->next);
    pthread_mutex_destroy(&t->lock);
}

void kvf_turn_take(kvf_turn *t)
{
    pthread_mutex_lock(&t->lock);
    uint64_t mine = t->n_asked++;
    while (t->n_served != mine) pthread_cond_wait(&t->next, &t->lock);
    pthread_mutex_unlock(&t->lock);
}

void kvf_turn_give(kvf_turn *t)
{
    pthread_mutex_lock(&t->lock);
    t->n_served++;
    pthread_cond_broadcast(&t->next);
    pthread_mutex_unlock(&t->lock);
}
