/* gguf.c - see gguf.h.
 *
 * Nothing in the file is believed: each length is compared with the bytes that are left before it
 * is used, and memory grows with what was read, never with what a count claims. Multi-byte fields
 * are read with memcpy (they may lie anywhere), so the host must be little-endian.
 * Source of the layout: the GGUF specification, version 3.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/gguf.h"

#include <inttypes.h>
#include <string.h>

/* More keys or tensors than this are a damaged count: the largest models have some ten thousand. */
#define MAX_ENTRIES 1048576u
/* The specification wants a multiple of 8; kernels rely on it for the elements of F32 tensors. */
#define MIN_ALIGNMENT 8
#define MAX_ALIGNMENT (INT64_C(1) << 30)

/* Open addressing over entry numbers + 1; 0 is a free slot. At most half full. */
typedef struct hash_table {
    uint32_t *slot; /* [mask + 1] */
    size_t mask;
} hash_table;

struct kvf_gguf {
    kvf_mem mem;
    kvf_file_map map; /* empty when the bytes are the caller's */
    const uint8_t *data;
    size_t bytes;
    kvf_gguf_kv *kv; /* [n_kv] */
    int64_t n_kv, kv_cap;
    kvf_gguf_tensor *tensor; /* [n_tensor] */
    int64_t n_tensor, tensor_cap;
    hash_table kv_table, tensor_table;
};

/* Where a tensor says its data are, counted from the start of the data section. */
typedef struct span {
    uint64_t offset, bytes;
    int64_t tensor;
} span;

typedef struct reader {
    const uint8_t *data;
    size_t bytes, at; /* at <= bytes */
} reader;

/* ---- Reading -------------------------------------------------------------------------- */

static bool take(reader *r, uint64_t n, const uint8_t **p)
{
    if (n > r->bytes - r->at) return false;
    *p = r->data + r->at;
    r->at += (size_t)n;
    return true;
}

static bool take_u32(reader *r, uint32_t *out)
{
    const uint8_t *p;
    if (!take(r, sizeof *out, &p)) return false;
    memcpy(out, p, sizeof *out);
    return true;
}

static bool take_u64(reader *r, uint64_t *out)
{
    const uint8_t *p;
    if (!take(r, sizeof *out, &p)) return false;
    memcpy(out, p, sizeof *out);
    return true;
}

static bool take_str(reader *r, kvf_str *out)
{
    uint64_t n;
    const uint8_t *p;
    if (!take_u64(r, &n) || !take(r, n, &p)) return false;
    out->p = (const char *)p;
    out->n = (size_t)n;
    return true;
}

/* A name from the file made fit for a message: short, printable ASCII. */
typedef struct label { char text[72]; } label;

static label show(kvf_str s)
{
    label out;
    size_t n = s.n < sizeof out.text - 4 ? s.n : sizeof out.text - 4;
    for (size_t i = 0; i < n; i++) out.text[i] = s.p[i] >= 0x20 && s.p[i] < 0x7f ? s.p[i] : '?';
    memcpy(out.text + n, "...", 4);
    if (n == s.n) out.text[n] = 0;
    return out;
}

static kvf_status fail_cut(const reader *r, const char *what, int64_t i, uint64_t n, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_FORMAT,
                    "the GGUF file is damaged or cut short: %s %" PRId64 " of %" PRIu64
                    " does not fit into its %zu bytes; fetch the file again", what, i + 1, n, r->bytes);
}

/* ---- Hash table ----------------------------------------------------------------------- */

static size_t hash_bytes(const char *p, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)p[i]) * 0x100000001b3u;
    return (size_t)(h ^ (h >> 32));
}

static bool str_is(kvf_str s, const char *p, size_t n)
{
    return s.n == n && (n == 0 || memcmp(s.p, p, n) == 0);
}

static kvf_str kv_name(const kvf_gguf *g, uint32_t i) { return g->kv[i].key; }
static kvf_str tensor_name(const kvf_gguf *g, uint32_t i) { return g->tensor[i].name; }
typedef kvf_str (*name_fn)(const kvf_gguf *g, uint32_t i);

/* The slot that holds the name, or the free one where it belongs. */
static uint32_t *probe(const hash_table *t, const kvf_gguf *g, name_fn name, const char *p, size_t n)
{
    size_t at = hash_bytes(p, n) & t->mask;
    while (t->slot[at] && !str_is(name(g, t->slot[at] - 1), p, n)) at = (at + 1) & t->mask;
    return &t->slot[at];
}

/* Enter all n names; a name that is there already is an error. */
static kvf_status index_names(kvf_gguf *g, hash_table *t, name_fn name, int64_t n, const char *what,
                              kvf_error *err)
{
    size_t cap = 4;
    while (cap < (size_t)n * 2) cap *= 2;
    void *slot;
    KVF_TRY(kvf_mem_get(&g->mem, &slot, cap, sizeof *t->slot, err));
    t->slot = slot;
    t->mask = cap - 1;
    for (uint32_t i = 0; i < (uint32_t)n; i++) {
        kvf_str s = name(g, i);
        uint32_t *at = probe(t, g, name, s.p, s.n);
        if (*at) {
            return kvf_fail(err, KVF_ERR_FORMAT,
                            "the GGUF file is damaged: %s '%s' is there twice; fetch the file again",
                            what, show(s).text);
        }
        *at = i + 1;
    }
    return KVF_OK;
}

/* ---- Metadata ------------------------------------------------------------------------- */

/* Bytes of a value; 0: not of fixed size. */
static const uint8_t value_bytes[] = {
    [KVF_GGUF_U8] = 1,  [KVF_GGUF_I8] = 1,   [KVF_GGUF_U16] = 2, [KVF_GGUF_I16] = 2, [KVF_GGUF_U32] = 4,
    [KVF_GGUF_I32] = 4, [KVF_GGUF_F32] = 4,  [KVF_GGUF_BOOL] = 1, [KVF_GGUF_STR] = 0, [KVF_GGUF_ARR] = 0,
    [KVF_GGUF_U64] = 8, [KVF_GGUF_I64] = 8,  [KVF_GGUF_F64] = 8,
};
#define N_KINDS (sizeof value_bytes / sizeof value_bytes[0])

/* Skip n values of one type, none an array. False if they do not fit into the file. */
static bool take_values(reader *r, uint32_t type, uint64_t n)
{
    const uint8_t *p;
    uint64_t bytes;
    if (value_bytes[type]) {
        return !__builtin_mul_overflow(n, (uint64_t)value_bytes[type], &bytes) && take(r, bytes, &p);
    }
    if (n > (r->bytes - r->at) / sizeof(uint64_t)) return false;
    kvf_str s;
    for (uint64_t i = 0; i < n; i++) {
        if (!take_str(r, &s)) return false;
    }
    return true;
}

static kvf_status fail_kind(kvf_str key, uint32_t type, const char *of, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_FORMAT,
                    "the GGUF file is damaged: metadata key '%s' has %s %" PRIu32
                    ", which GGUF does not have; fetch the file again", show(key).text, of, type);
}

static kvf_status read_kv(reader *r, kvf_gguf_kv *kv, int64_t i, uint64_t n_kv, kvf_error *err)
{
    uint32_t type, elem;
    uint64_t count = 1;
    if (!take_str(r, &kv->key) || !take_u32(r, &type)) return fail_cut(r, "metadata key", i, n_kv, err);
    if (type >= N_KINDS) return fail_kind(kv->key, type, "type", err);
    elem = type;
    if (type == KVF_GGUF_ARR) {
        if (!take_u32(r, &elem) || !take_u64(r, &count)) return fail_cut(r, "metadata key", i, n_kv, err);
        if (elem >= N_KINDS) return fail_kind(kv->key, elem, "element type", err);
        if (elem == KVF_GGUF_ARR) {
            return kvf_fail(err, KVF_ERR_FORMAT,
                            "metadata key '%s' is an array of arrays, which no known architecture uses; "
                            "convert the model again without it", show(kv->key).text);
        }
    }
    size_t start = r->at;
    if (!take_values(r, elem, count)) {
        return kvf_fail(err, KVF_ERR_FORMAT,
                        "the GGUF file is damaged or cut short: the value of metadata key '%s' does not fit "
                        "into its %zu bytes; fetch the file again", show(kv->key).text, r->bytes);
    }
    kv->type = (kvf_gguf_type)type;
    kv->elem = (kvf_gguf_type)elem;
    kv->count = (int64_t)count; /* at least one byte each: at most the file's size */
    kv->data = r->data + start;
    kv->bytes = r->at - start;
    return KVF_OK;
}

static kvf_status read_metadata(kvf_gguf *g, reader *r, uint64_t n_kv, kvf_error *err)
{
    for (uint64_t i = 0; i < n_kv; i++) {
        void *buf = g->kv;
        KVF_TRY(kvf_reserve(&g->mem, &buf, &g->kv_cap, g->n_kv + 1, sizeof *g->kv, err));
        g->kv = buf;
        KVF_TRY(read_kv(r, &g->kv[i], (int64_t)i, n_kv, err));
        g->n_kv++;
    }
    return index_names(g, &g->kv_table, kv_name, g->n_kv, "metadata key", err);
}

static kvf_status read_alignment(const kvf_gguf *g, size_t *out, kvf_error *err)
{
    int64_t a;
    KVF_TRY(kvf_gguf_get_int_or(g, "general.alignment", MIN_ALIGNMENT, MAX_ALIGNMENT, 32, &a, err));
    if (a & (a - 1)) {
        return kvf_fail(err, KVF_ERR_FORMAT,
                        "general.alignment is %" PRId64 ", not a power of two; convert the model again", a);
    }
    *out = (size_t)a;
    return KVF_OK;
}

/* ---- Tensors -------------------------------------------------------------------------- */

static kvf_status fail_tensor(kvf_str name, const char *why, kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_FORMAT, "the GGUF file is damaged: tensor '%s' %s; fetch the file again",
                    show(name).text, why);
}

/* Check type and shape, and set t->bytes. Dimensions are the file's, unchecked. */
static kvf_status check_shape(kvf_gguf_tensor *t, uint32_t type, const uint64_t dim[4], kvf_error *err)
{
    const kvf_dtype_info *info = kvf_dtype_get(type);
    if (!info) {
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "tensor '%s' has type number %" PRIu32 ", which kvfold cannot read; use a model in F32, "
                        "F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K", show(t->name).text, type);
    }
    t->type = (kvf_dtype)type;
    uint64_t total = 1;
    for (int d = 0; d < 4; d++) {
        t->dim[d] = d < t->n_dim ? (int64_t)dim[d] : 1;
        if (t->dim[d] < 1) return fail_tensor(t->name, "has a dimension of zero or beyond 2^63", err);
        if (__builtin_mul_overflow(total, (uint64_t)t->dim[d], &total) || total > INT64_MAX) {
            return fail_tensor(t->name, "has more than 2^63 elements", err);
        }
    }
    if (t->dim[0] % info->block != 0) {
        return kvf_fail(err, KVF_ERR_FORMAT,
                        "the GGUF file is damaged: tensor '%s' has rows of %" PRId64 " elements, not a multiple of "
                        "the %" PRId32 " in a block of %s; fetch the file again",
                        show(t->name).text, t->dim[0], info->block, info->name);
    }
    if (!kvf_mul_size((size_t)total / (size_t)info->block, (size_t)info->bytes, &t->bytes)) {
        return fail_tensor(t->name, "has more than 2^64 bytes", err);
    }
    return KVF_OK;
}

static kvf_status read_tensor(reader *r, kvf_gguf_tensor *t, span *where, uint64_t n_tensor, kvf_error *err)
{
    uint32_t n_dim, type;
    uint64_t dim[4] = { 1, 1, 1, 1 };
    int64_t i = where->tensor;
    if (!take_str(r, &t->name) || !take_u32(r, &n_dim)) return fail_cut(r, "tensor", i, n_tensor, err);
    if (n_dim < 1 || n_dim > 4) {
        return kvf_fail(err, KVF_ERR_FORMAT,
                        "the GGUF file is damaged: tensor '%s' has %" PRIu32 " dimensions, not 1 to 4; fetch the "
                        "file again", show(t->name).text, n_dim);
    }
    t->n_dim = (int32_t)n_dim;
    for (uint32_t d = 0; d < n_dim; d++) {
        if (!take_u64(r, &dim[d])) return fail_cut(r, "tensor", i, n_tensor, err);
    }
    if (!take_u32(r, &type) || !take_u64(r, &where->offset)) return fail_cut(r, "tensor", i, n_tensor, err);
    KVF_TRY(check_shape(t, type, dim, err));
    where->bytes = t->bytes;
    return KVF_OK;
}

/* Heap sort by offset: no memory and no bad case, whatever order the file has. */
static void sift_down(span *v, int64_t at, int64_t n)
{
    for (int64_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && v[child + 1].offset > v[child].offset) child++;
        if (v[child].offset <= v[at].offset) return;
        span tmp = v[at];
        v[at] = v[child];
        v[child] = tmp;
    }
}

static void sort_spans(span *v, int64_t n)
{
    for (int64_t i = n / 2 - 1; i >= 0; i--) sift_down(v, i, n);
    for (int64_t i = n - 1; i > 0; i--) {
        span tmp = v[0];
        v[0] = v[i];
        v[i] = tmp;
        sift_down(v, 0, i);
    }
}

/* Give each tensor its bytes: aligned, inside the file, shared with no other. */
static kvf_status place_tensors(kvf_gguf *g, span *where, size_t start, size_t alignment, kvf_error *err)
{
    sort_spans(where, g->n_tensor);
    uint64_t end = 0, room = g->bytes - start;
    for (int64_t i = 0; i < g->n_tensor; i++) {
        span s = where[i];
        kvf_gguf_tensor *t = &g->tensor[s.tensor];
        if (s.offset % alignment) return fail_tensor(t->name, "has data at an unaligned offset", err);
        if (s.offset > room || s.bytes > room - s.offset) {
            return kvf_fail(err, KVF_ERR_FORMAT,
                            "the GGUF file is damaged or cut short: the data of tensor '%s' end after the %zu bytes "
                            "of the file; fetch the file again", show(t->name).text, g->bytes);
        }
        if (s.offset < end) return fail_tensor(t->name, "shares data with another tensor", err);
        end = s.offset + s.bytes;
        t->data = g->data + start + s.offset;
    }
    return KVF_OK;
}

static kvf_status read_directory(kvf_gguf *g, reader *r, uint64_t n_tensor, span **where, kvf_error *err)
{
    size_t alignment = 0;
    int64_t cap = 0;
    KVF_TRY(read_alignment(g, &alignment, err));
    for (uint64_t i = 0; i < n_tensor; i++) {
        void *buf = g->tensor, *buf2 = *where;
        kvf_status rc = kvf_reserve(&g->mem, &buf, &g->tensor_cap, g->n_tensor + 1, sizeof *g->tensor, err);
        g->tensor = buf;
        KVF_TRY(rc);
        rc = kvf_reserve(&g->mem, &buf2, &cap, g->n_tensor + 1, sizeof **where, err);
        *where = buf2;
        KVF_TRY(rc);
        (*where)[i].tensor = (int64_t)i;
        KVF_TRY(read_tensor(r, &g->tensor[i], &(*where)[i], n_tensor, err));
        g->n_tensor++;
    }
    KVF_TRY(index_names(g, &g->tensor_table, tensor_name, g->n_tensor, "tensor", err));
    /* A file without tensors may end before the padding does. */
    size_t rest = r->at % alignment, pad = rest ? alignment - rest : 0;
    size_t start = pad > r->bytes - r->at ? r->bytes : r->at + pad;
    return place_tensors(g, *where, start, alignment, err);
}

/* ---- Opening -------------------------------------------------------------------------- */

static kvf_status fail_big_endian(kvf_error *err)
{
    return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                    "this is a big-endian GGUF file; kvfold reads little-endian ones, the usual kind");
}

static kvf_status read_header(reader *r, uint64_t *n_tensor, uint64_t *n_kv, kvf_error *err)
{
    const uint8_t *magic;
    uint32_t version;
    if (r->bytes == 0) return kvf_fail(err, KVF_ERR_FORMAT, "the file is empty, not a GGUF file; fetch it again");
    if (!take(r, 4, &magic) || (memcmp(magic, "GGUF", 4) != 0 && memcmp(magic, "FUGG", 4) != 0)) {
        return kvf_fail(err, KVF_ERR_FORMAT, "this is not a GGUF file: it does not start with 'GGUF'");
    }
    if (magic[0] == 'F') return fail_big_endian(err);
    if (!take_u32(r, &version)) return fail_cut(r, "header field", 1, 4, err);
    if (version && (version & 0xffffu) == 0) return fail_big_endian(err);
    if (version != 3) {
        return kvf_fail(err, KVF_ERR_UNSUPPORTED,
                        "this is GGUF version %" PRIu32 "; kvfold reads version 3: convert the model again", version);
    }
    if (!take_u64(r, n_tensor)) return fail_cut(r, "header field", 2, 4, err);
    if (!take_u64(r, n_kv)) return fail_cut(r, "header field", 3, 4, err);
    /* Smallest entries: key length, type, one byte; name length, n_dim, one dim, type, offset. */
    size_t rest = r->bytes - r->at;
    if (*n_kv > MAX_ENTRIES || *n_kv > rest / 13 || *n_tensor > MAX_ENTRIES || *n_tensor > rest / 32) {
        return kvf_fail(err, KVF_ERR_FORMAT,
                        "the GGUF file is damaged or cut short: %" PRIu64 " metadata keys and %" PRIu64
                        " tensors do not fit into its %zu bytes; fetch the file again", *n_kv, *n_tensor, r->bytes);
    }
    return KVF_OK;
}

static kvf_status read_all(kvf_gguf *g, kvf_error *err)
{
    reader r = { g->data, g->bytes, 0 };
    uint64_t n_tensor = 0, n_kv = 0;
    KVF_TRY(read_header(&r, &n_tensor, &n_kv, err));
    KVF_TRY(read_metadata(g, &r, n_kv, err));
    span *where = NULL;
    kvf_status rc = read_directory(g, &r, n_tensor, &where, err);
    kvf_free(&g->mem, where);
    return rc;
}

kvf_status kvf_gguf_open_memory(kvf_gguf **out, const void *data, size_t bytes, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    void *block;
    KVF_TRY(kvf_mem_get(mem, &block, 1, sizeof(kvf_gguf), err));
    kvf_gguf *g = block;
    g->mem = *mem;
    g->data = data;
    g->bytes = bytes;
    kvf_status rc = read_all(g, err);
    if (rc < 0) {
        kvf_gguf_close(g);
        return rc;
    }
    *out = g;
    return KVF_OK;
}

kvf_status kvf_gguf_open(kvf_gguf **out, const char *path, const kvf_mem *mem, kvf_error *err)
{
    *out = NULL;
    kvf_file_map map;
    KVF_TRY(kvf_file_map_open(&map, path, err));
    kvf_status rc = kvf_gguf_open_memory(out, map.data, map.bytes, mem, err);
    if (rc < 0) {
        kvf_file_map_close(&map);
        kvf_error_prefix(err, "cannot use '%.200s': ", path);
        return rc;
    }
    (*out)->map = map;
    return KVF_OK;
}

void kvf_gguf_close(kvf_gguf *g)
{
    if (!g) return;
    kvf_mem mem = g->mem;
    kvf_file_map_close(&g->map);
    kvf_free(&mem, g->kv);
    kvf_free(&mem, g->tensor);
    kvf_free(&mem, g->kv_table.slot);
    kvf_free(&mem, g->tensor_table.slot);
    kvf_free(&mem, g);
}

/* ---- Access --------------------------------------------------------------------------- */

size_t kvf_gguf_file_bytes(const kvf_gguf *g) { return g->bytes; }
int64_t kvf_gguf_n_kv(const kvf_gguf *g) { return g->n_kv; }
int64_t kvf_gguf_n_tensor(const kvf_gguf *g) { return g->n_tensor; }

const kvf_gguf_kv *kvf_gguf_kv_at(const kvf_gguf *g, int64_t i)
{
    return i >= 0 && i < g->n_kv ? &g->kv[i] : NULL;
}

const kvf_gguf_tensor *kvf_gguf_tensor_at(const kvf_gguf *g, int64_t i)
{
    return i >= 0 && i < g->n_tensor ? &g->tensor[i] : NULL;
}

const kvf_gguf_kv *kvf_gguf_find(const kvf_gguf *g, const char *key)
{
    uint32_t i = *probe(&g->kv_table, g, kv_name, key, strlen(key));
    return i ? &g->kv[i - 1] : NULL;
}

const kvf_gguf_tensor *kvf_gguf_find_tensor(const kvf_gguf *g, const char *name)
{
    uint32_t i = *probe(&g->tensor_table, g, tensor_name, name, strlen(name));
    return i ? &g->tensor[i - 1] : NULL;
}
