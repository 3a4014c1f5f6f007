/* tok_merge.c - greedy merging of adjacent symbols, the heart of both tokenisers.
 *
 * The order is part of the result: always the pair of smallest prio, the leftmost of equals.
 * Pieces are words most of the time, so short ones are scanned (no links, no heap, one cache line
 * after the other) and long ones use a heap with lazy deletion, so that a megabyte of one letter
 * stays O(n log n).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/tok_int.h"

#include <string.h>

/* Up to here the quadratic scan is the faster of the two (measured on English and on one letter
 * repeated: equal at about 50 symbols). */
#define SCAN_MAX 48

kvf_status kvf_tok_room(kvf_tok_scratch *s, size_t n, kvf_error *err)
{
    if (n + 1 <= sizeof s->sym_small / sizeof *s->sym_small) {
        s->sym = s->sym_small;
        return KVF_OK;
    }
    void *buf = s->sym_buf;
    KVF_TRY(kvf_reserve(s->mem, &buf, &s->sym_cap, (int64_t)n + 1, sizeof *s->sym, err));
    s->sym = s->sym_buf = buf;
    return KVF_OK;
}

static void set_pair(const kvf_tokenizer *t, const char *piece, kvf_tok_sym *left, const kvf_tok_sym *right,
                     uint32_t end)
{
    if (t->spm)
        kvf_tok_spm_pair(t, piece, left, right, end);
    else
        kvf_tok_bpe_pair(t, piece, left, right, end);
}

static size_t merge_scan(const kvf_tokenizer *t, kvf_tok_sym *sym, const char *piece, size_t n)
{
    for (;;) {
        size_t best = 0;
        uint32_t prio = KVF_TOK_NO_PRIO;
        for (size_t i = 0; i + 1 < n; i++) {
            if (sym[i].prio >= prio) continue;
            prio = sym[i].prio;
            best = i;
        }
        if (prio == KVF_TOK_NO_PRIO) return n;
        sym[best].id = sym[best].join;
        /* The closing symbol moves too: it holds the end of the last one. */
        memmove(&sym[best + 1], &sym[best + 2], (n - best - 1) * sizeof *sym);
        n--;
        sym[best].prio = KVF_TOK_NO_PRIO;
        if (best + 1 < n) set_pair(t, piece, &sym[best], &sym[best + 1], sym[best + 2].at);
        if (best > 0) set_pair(t, piece, &sym[best - 1], &sym[best], sym[best + 1].at);
    }
}

static void heap_push(uint64_t *heap, size_t *n, uint64_t v)
{
    size_t i = (*n)++;
    for (; i > 0 && heap[(i - 1) / 2] > v; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = v;
}

static uint64_t heap_pop(uint64_t *heap, size_t *n)
{
    uint64_t top = heap[0], v = heap[--*n];
    size_t i = 0;
    for (size_t c = 1; c < *n; c = 2 * i + 1) {
        if (c + 1 < *n && heap[c + 1] < heap[c]) c++;
        if (heap[c] >= v) break;
        heap[i] = heap[c];
        i = c;
    }
    heap[i] = v;
    return top;
}

/* Heap entries are prio << 32 | symbol. One is stale when its symbol is gone or has another prio
 * by now; if the prio is the same, so is what merging would do. */
static void renew(const kvf_tokenizer *t, kvf_tok_scratch *s, const char *piece, int32_t left, size_t *n_heap)
{
    kvf_tok_sym *l = &s->sym[left];
    l->prio = KVF_TOK_NO_PRIO;
    if (s->sym[l->next].next < 0) return; /* next is the closing symbol */
    const kvf_tok_sym *r = &s->sym[l->next];
    set_pair(t, piece, l, r, s->sym[r->next].at);
    if (l->prio != KVF_TOK_NO_PRIO) heap_push(s->heap, n_heap, (uint64_t)l->prio << 32 | (uint32_t)left);
}

static kvf_status merge_heap(const kvf_tokenizer *t, kvf_tok_scratch *s, const char *piece, size_t *n,
                             kvf_error *err)
{
    /* n - 1 pairs at first; a merge takes one entry out and puts at most two in. */
    void *buf = s->heap;
    KVF_TRY(kvf_reserve(s->mem, &buf, &s->heap_cap, 2 * (int64_t)*n, sizeof *s->heap, err));
    s->heap = buf;
    kvf_tok_sym *sym = s->sym;
    size_t n_heap = 0;
    for (size_t i = 0; i <= *n; i++) {
        sym[i].prev = (int32_t)i - 1;
        sym[i].next = i < *n ? (int32_t)i + 1 : -1;
    }
    for (size_t i = 0; i + 1 < *n; i++)
        if (sym[i].prio != KVF_TOK_NO_PRIO) heap_push(s->heap, &n_heap, (uint64_t)sym[i].prio << 32 | i);
    while (n_heap > 0) {
        uint64_t top = heap_pop(s->heap, &n_heap);
        int32_t i = (int32_t)(uint32_t)top;
        if (sym[i].prio != (uint32_t)(top >> 32)) continue;
        int32_t dead = sym[i].next;
        sym[i].id = sym[i].join;
        sym[i].next = sym[dead].next;
        sym[sym[dead].next].prev = i;
        sym[dead].prio = KVF_TOK_NO_PRIO; /* its entries are stale from here on */
        renew(t, s, piece, i, &n_heap);
        if (sym[i].prev >= 0) renew(t, s, piece, sym[i].prev, &n_heap);
    }
    /* Back to an array; the closing symbol comes along but is not counted. left <= i, so nothing
     * that is still to be read is lost. */
    size_t left = 0;
    for (int32_t i = 0, next; i >= 0; i = next) {
        next = sym[i].next;
        sym[left++] = sym[i];
    }
    *n = left - 1;
    return KVF_OK;
}

kvf_status kvf_tok_merge(const kvf_tokenizer *t, kvf_tok_scratch *s, const char *piece, size_t *n,
                         kvf_error *err)
{
    for (size_t i = 0; i + 1 < *n; i++) set_pair(t, piece, &s->sym[i], &s->sym[i + 1], s->sym[i + 2].at);
    if (*n <= SCAN_MAX) {
        *n = merge_scan(t, s->sym, piece, *n);
        return KVF_OK;
    }
    return merge_heap(t, s, piece, n, err);
}
