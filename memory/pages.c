/* pages.c - see pages.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "memory/pages.h"

#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the store is for little-endian processors"
#endif

#define PAGE_HEAD 16
#define NODE_HEAD 8
#define NO_PAGE (~(uint64_t)0)
#define KEY_MAX 511
#define DEPTH_MAX 30 /* LMDB's cursors hold 32 */

enum { P_BRANCH = 1, P_LEAF = 2, P_OVERFLOW = 4, P_META = 8 };
enum { N_BIG = 1, N_TREE = 2 };

/* A tree's description, as it lies in the file. */
typedef struct tree {
    uint32_t pad;
    uint16_t flags, depth;
    uint64_t n_branch, n_leaf, n_overflow, n_entry, root;
} tree;

typedef struct head {
    uint32_t magic, version;
    uint64_t address, map_bytes;
    tree dbs[2]; /* free pages; named trees */
    uint64_t last_page, txn;
} head;

typedef enum tree_kind { TREE_FREE, TREE_MAIN, TREE_NAMED } tree_kind;

typedef struct walk {
    const uint8_t *file;
    size_t page;
    uint64_t n_file, n_page; /* whole pages in the file; pages the commit knows */
    uint64_t txn;
    uint8_t *seen; /* a bit per page */
    const kvf_pages_io *io;
    int n_touched; /* pages of the tree since the last rest */
    const char *const *names;
    kvf_error *err;
} walk;

/* Of the tree at hand. */
typedef struct progress {
    tree_kind kind;
    uint64_t n_branch, n_leaf, n_overflow, n_entry;
    const uint8_t *key; /* what follows must be after it, or the same if it divides pages */
    size_t n_key;
    bool divides;
} progress;

static kvf_status walk_tree(walk *w, const tree *t, tree_kind kind);

static uint64_t u64_at(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

static uint32_t u32_at(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}

static uint32_t u16_at(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }

static kvf_status damaged(kvf_error *err, const char *what, uint64_t page)
{
    return kvf_fail(err, KVF_ERR_FORMAT, "the store is damaged or cut short (%s, page %llu); restore it from a copy, or make a new one",
                    what, (unsigned long long)page);
}

static void read_head(head *h, const uint8_t *page) { memcpy(h, page + PAGE_HEAD, sizeof *h); }

static bool head_ok(const uint8_t *page, const head *h, size_t bytes)
{
    return u16_at(page + 10) == P_META && h->magic == 0xBEEFC0DEu && h->version == 1 && h->dbs[0].pad == bytes &&
           (h->dbs[0].flags & 0xbfff) == 8 && h->dbs[1].flags == 0 && h->dbs[1].pad == 0;
}

kvf_status kvf_pages_head(const uint8_t *file, size_t bytes, uint64_t *txn, size_t *page, kvf_error *err)
{
    head a, b;
    _Static_assert(sizeof(head) + PAGE_HEAD == KVF_PAGES_HEAD, "no padding");
    if (bytes < KVF_PAGES_HEAD) return kvf_fail(err, KVF_ERR_FORMAT, "the store's data.mdb has %zu bytes and is not an LMDB file; name another folder", bytes);
    read_head(&a, file);
    if (a.magic != 0xBEEFC0DEu) return kvf_fail(err, KVF_ERR_FORMAT, "the store's data.mdb is not an LMDB file; name another folder");
    if (a.version != 1) return kvf_fail(err, KVF_ERR_FORMAT, "the store's data.mdb is LMDB format %u, and kvfold needs 1; make a new store", a.version);
    size_t size = a.dbs[0].pad;
    if (size < 4096 || size > 32768 || (size & (size - 1)) || !head_ok(file, &a, size)) return damaged(err, "its first page", 0);
    if (bytes < size + KVF_PAGES_HEAD) return damaged(err, "its second page is missing", 1);
    read_head(&b, file + size);
    if (!head_ok(file + size, &b, size)) return damaged(err, "its second page", 1);
    uint64_t newest = a.txn < b.txn ? b.txn : a.txn;
    if ((newest & 1) != (a.txn < b.txn)) return damaged(err, "the number of the last commit", 0);
    *txn = newest;
    *page = size;
    return KVF_OK;
}

/* ---- Pages used once ------------------------------------------------------------------------ */

static bool take(walk *w, uint64_t first, uint64_t n)
{
    if (first < 2 || n < 1 || first >= w->n_page || n > w->n_page - first) return false;
    for (uint64_t i = first; i < first + n; i++) {
        uint8_t bit = (uint8_t)(1u << (i & 7));
        if (w->seen[i >> 3] & bit) return false;
        w->seen[i >> 3] |= bit;
    }
    return true;
}

/* A page of a tree: it must be in the file and be called what it is. */
static const uint8_t *take_page(walk *w, uint64_t number, uint32_t *flags)
{
    if (number >= w->n_file) return NULL;
    const uint8_t *p = w->file + number * w->page;
    *flags = u16_at(p + 10);
    return u64_at(p) == number && take(w, number, 1) ? p : NULL;
}

/* The first page of a large value, of which only the head is read. *n: its pages. */
static bool take_large(walk *w, uint64_t number, uint64_t *n)
{
    uint8_t own[PAGE_HEAD];
    if (number >= w->n_file) return false;
    const uint8_t *p = w->file + number * w->page;
    if (w->io) {
        if (!w->io->read(w->io->ctx, number * w->page, own, sizeof own)) return false;
        p = own;
    }
    *n = u32_at(p + 12);
    return u16_at(p + 10) == P_OVERFLOW && u64_at(p) == number && *n <= w->n_file - number && take(w, number, *n);
}

/* ---- Keys in order --------------------------------------------------------------------------- */

static int compare(const progress *s, const uint8_t *a, size_t na, const uint8_t *b, size_t nb)
{
    if (s->kind == TREE_FREE) {
        uint64_t x = u64_at(a), y = u64_at(b);
        return (x > y) - (x < y);
    }
    int c = memcmp(a, b, na < nb ? na : nb);
    return c ? c : (na > nb) - (na < nb);
}

static bool next_key(progress *s, const uint8_t *key, size_t n, bool divides)
{
    if (s->key) {
        int c = compare(s, key, n, s->key, s->n_key);
        if (c < 0 || (c == 0 && (divides || !s->divides))) return false;
    }
    s->key = key;
    s->n_key = n;
    s->divides = divides;
    return true;
}

/* ---- Values ----------------------------------------------------------------------------------- */

/* Numbers of free pages: their count, then they, falling. Free pages may lie behind the file's end. */
static bool free_list(walk *w, const uint8_t *key, const uint8_t *p, size_t bytes)
{
    if (bytes < 8 || bytes % 8 || u64_at(key) == 0 || u64_at(key) > w->txn) return false;
    uint64_t n = u64_at(p), last = NO_PAGE;
    if (n > bytes / 8 - 1) return false;
    for (uint64_t i = 1; i <= n; i++) {
        uint64_t page = u64_at(p + 8 * i);
        if (page >= last || !take(w, page, 1)) return false;
        last = page;
    }
    return true;
}

static bool known_name(const walk *w, const uint8_t *key, size_t n)
{
    for (const char *const *name = w->names; *name; name++) {
        if (strlen(*name) == n && memcmp(*name, key, n) == 0) return true;
    }
    return false;
}

static kvf_status named_tree(walk *w, const uint8_t *node, size_t n_key, size_t bytes)
{
    tree t;
    if (!known_name(w, node + NODE_HEAD, n_key))
        return kvf_fail(w->err, KVF_ERR_FORMAT, "this is an LMDB file, but not a store of kvfold; name another folder");
    if (bytes != sizeof t) return damaged(w->err, "a table's description", 0);
    memcpy(&t, node + NODE_HEAD + n_key, sizeof t);
    return walk_tree(w, &t, TREE_NAMED);
}

/* *bytes: of the node, key and value in place. */
static kvf_status leaf_node(walk *w, progress *s, const uint8_t *node, size_t room, size_t *bytes)
{
    uint32_t flags = u16_at(node + 4);
    size_t n_key = u16_at(node + 6), n = (size_t)u16_at(node) | (size_t)u16_at(node + 2) << 16;
    bool big = flags == N_BIG;
    *bytes = NODE_HEAD + n_key + (big ? 8 : n);
    if (n_key < 1 || n_key > KEY_MAX || *bytes > room || *bytes > (((w->page - PAGE_HEAD) / 2) & ~(size_t)1) - 2 + NODE_HEAD)
        return damaged(w->err, "an entry", 0);
    const uint8_t *key = node + NODE_HEAD, *value = key + n_key;
    bool tree_here = s->kind == TREE_MAIN;
    if ((s->kind == TREE_FREE && n_key != 8) || (flags != (tree_here ? N_TREE : 0u) && (tree_here || !big)) ||
        !next_key(s, key, n_key, false))
        return damaged(w->err, "an entry or its place", 0);
    s->n_entry++;
    if (tree_here) return named_tree(w, node, n_key, n);
    if (big) {
        uint64_t number = u64_at(value), need = (PAGE_HEAD - 1 + (uint64_t)n) / w->page + 1;
        uint64_t n_page;
        if (!take_large(w, number, &n_page) || n_page < need) return damaged(w->err, "a large value", number);
        s->n_overflow += n_page;
        value = w->file + number * w->page + PAGE_HEAD;
    }
    if (s->kind == TREE_FREE && !free_list(w, key, value, n)) return damaged(w->err, "the list of free pages", 0);
    return KVF_OK;
}

static kvf_status walk_page(walk *w, progress *s, uint64_t number, int level);

static kvf_status branch_node(walk *w, progress *s, const uint8_t *node, size_t room, bool first, int level)
{
    size_t n_key = u16_at(node + 6);
    uint64_t child = (uint64_t)u16_at(node) | (uint64_t)u16_at(node + 2) << 16 | (uint64_t)u16_at(node + 4) << 32;
    if (NODE_HEAD + n_key > room || n_key > KEY_MAX) return damaged(w->err, "an entry", child);
    /* The first child takes all that is smaller; its key says nothing. */
    if (!first && (n_key < 1 || (s->kind == TREE_FREE && n_key != 8) || !next_key(s, node + NODE_HEAD, n_key, true)))
        return damaged(w->err, "the order of keys", child);
    return walk_page(w, s, child, level - 1);
}

/* Recursion is as deep as the tree, whose depth was checked. */
static kvf_status walk_page(walk *w, progress *s, uint64_t number, int level)
{
    enum { REST_AFTER = 32 };
    uint32_t flags;
    if (w->io && ++w->n_touched % REST_AFTER == 0) w->io->rest(w->io->ctx);
    const uint8_t *p = take_page(w, number, &flags);
    if (!p || flags != (level > 1 ? P_BRANCH : P_LEAF)) return damaged(w->err, "a page is not what it should be", number);
    size_t lower = u16_at(p + 12), upper = u16_at(p + 14);
    if (lower < PAGE_HEAD || lower > upper || upper > w->page || lower % 2 || upper % 2) return damaged(w->err, "bounds of a page", number);
    size_t n = (lower - PAGE_HEAD) / 2, used = 0;
    if (n < (level > 1 ? 2u : 1u)) return damaged(w->err, "a page is empty", number);
    if (level > 1) s->n_branch++;
    else s->n_leaf++;
    for (size_t i = 0; i < n; i++) {
        size_t at = u16_at(p + PAGE_HEAD + 2 * i), bytes;
        if (at < upper || at % 2 || at + NODE_HEAD > w->page) return damaged(w->err, "place of an entry", number);
        if (level > 1) {
            bytes = NODE_HEAD + u16_at(p + at + 6);
            KVF_TRY(branch_node(w, s, p + at, w->page - at, i == 0, level));
        } else {
            KVF_TRY(leaf_node(w, s, p + at, w->page - at, &bytes));
        }
        used += (bytes + 1) & ~(size_t)1;
    }
    /* Entries fill the page from its end without gaps: together with the bounds of each, LMDB can move
     * them about. */
    if (used != w->page - upper) return damaged(w->err, "entries of a page overlap", number);
    return KVF_OK;
}

static kvf_status walk_tree(walk *w, const tree *t, tree_kind kind)
{
    progress s = { .kind = kind };
    if (kind == TREE_NAMED && (t->pad || t->flags)) return damaged(w->err, "a table's description", 0);
    if (t->root != NO_PAGE) {
        if (t->depth < 1 || t->depth > DEPTH_MAX) return damaged(w->err, "depth of a table", t->root);
        KVF_TRY(walk_page(w, &s, t->root, t->depth));
    } else if (t->depth) {
        return damaged(w->err, "depth of an empty table", 0);
    }
    if (s.n_branch != t->n_branch || s.n_leaf != t->n_leaf || s.n_overflow != t->n_overflow || s.n_entry != t->n_entry)
        return damaged(w->err, "counts of a table", t->root);
    return KVF_OK;
}

kvf_status kvf_pages_check(const uint8_t *file, size_t bytes, const kvf_pages_io *io, uint64_t txn,
                           const char *const *names, const kvf_mem *mem, bool *current, kvf_error *err)
{
    uint64_t newest;
    walk w = { .file = file, .io = io, .names = names, .err = err };
    *current = true;
    KVF_TRY(kvf_pages_head(file, bytes, &newest, &w.page, err));
    head h;
    read_head(&h, file + (txn & 1) * w.page);
    if (h.txn != txn) {
        *current = false;
        return KVF_OK;
    }
    w.txn = txn;
    w.n_file = bytes / w.page;
    /* A page taken and given back within a commit is never written, so there may be more than the file
     * has; not many. */
    if (h.last_page < 1 || h.last_page > 2 * w.n_file + 65536) return damaged(err, "number of pages", h.last_page);
    w.n_page = h.last_page + 1;
    void *seen;
    KVF_TRY(kvf_mem_get(mem, &seen, (size_t)(w.n_page / 8 + 1), 1, err));
    w.seen = seen;
    kvf_status rc = walk_tree(&w, &h.dbs[0], TREE_FREE);
    if (rc >= 0) rc = walk_tree(&w, &h.dbs[1], TREE_MAIN);
    kvf_free(mem, seen);
    return rc;
}
