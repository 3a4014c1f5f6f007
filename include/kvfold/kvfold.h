/* kvfold.h - the application interface of libkvfold, and its manual.
 *
 * kvfold answers questions from very long inputs with a local language model. It reads a GGUF
 * file, keeps keys and values (KV) in 128-token blocks, lets a compression policy decide which
 * of them later steps read, and generates text. Five objects, whose lifetimes nest:
 *
 *     kvf_ctx      threads, allocator, log, CPU features. Share it between threads.
 *     kvf_model    weights and tokenizer, read-only.      Share it between threads.
 *     kvf_store    documents read before, on disk.         Share it between threads.
 *     kvf_session  one timeline: tokens, KV, sampler.      One thread at a time.
 *     kvf_error    a code and one sentence.                The caller's, usually on the stack.
 *
 * Rules that hold for every function:
 *   - The handle a function creates comes first, `kvf_error *err` last. err may be NULL; it is
 *     written on failure only. After a failure *out is NULL and nothing needs closing.
 *   - The library never exits, aborts, prints, reads the environment or changes a locale.
 *   - Close functions take NULL. A ctx must outlive its models and stores, a model and a store the
 *     sessions that use them.
 *   - Counts, offsets and positions are int64_t, sizes in bytes size_t, tokens int32_t.
 *   - Parameter structs start with `size`, set by their _init function: always call it, then
 *     change fields. New fields take the place of `reserved`, so sizes stay and a program built
 *     with an older header keeps working; reserved room is zero and stays zero.
 *   - Files, tokens and texts are untrusted: whatever they hold, the answer is a status.
 *
 * A first program is examples/01_first_tokens.c. What is not in this file is not in the API.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_KVFOLD_H
#define KVFOLD_KVFOLD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define KVF_API __declspec(dllexport)
#elif defined(__GNUC__)
#define KVF_API __attribute__((visibility("default")))
#else
#define KVF_API
#endif

/* ---- Version -------------------------------------------------------------------------- */

#define KVF_VERSION_MAJOR 0
#define KVF_VERSION_MINOR 1
#define KVF_VERSION_PATCH 0
#define KVF_VERSION_NUMBER (KVF_VERSION_MAJOR * 10000 + KVF_VERSION_MINOR * 100 + KVF_VERSION_PATCH)

/* Version of the library that runs, as KVF_VERSION_NUMBER. Compare the two to find a header
 * that belongs to another library. */
KVF_API int kvf_version(void);

/* The same as text, "0.1.0". Static; never NULL. */
KVF_API const char *kvf_version_string(void);

/* ---- Status and errors ---------------------------------------------------------------- */

/* Values are pinned: they never change their meaning. Negative is a failure. */
typedef enum kvf_status {
    KVF_OK = 0,
    KVF_DONE = 1,             /* generation reached the end of the text; not a failure */
    KVF_ERR_ARG = -1,         /* an argument or option is invalid; the message names it */
    KVF_ERR_NOMEM = -2,       /* the allocator returned NULL */
    KVF_ERR_IO = -3,          /* the system refused to open, read or map a file */
    KVF_ERR_FORMAT = -4,      /* a file is damaged, truncated or not what it claims to be */
    KVF_ERR_UNSUPPORTED = -5, /* well-formed, but of a kind this build cannot run */
    KVF_ERR_NOT_FOUND = -6,   /* no policy, template or key of that name */
    KVF_ERR_LIMIT = -7,       /* more tokens than the context, more bytes than the budget */
    KVF_ERR_CANCELLED = -8,   /* kvf_session_cancel() or the progress callback said stop */
    KVF_ERR_STATE = -9,       /* the call is not allowed now, e.g. logits of an empty session */
    KVF_ERR_INTERNAL = -10,   /* a bug in kvfold; please report the message */
    KVF_ERR_BUSY = -11,       /* somebody else is writing to the store */
    KVF_ERR_MISMATCH = -12,   /* a store made with another model or policy */
    KVF_ERR_SPACE = -13       /* the disk is full */
} kvf_status;

/* What went wrong, and what to do about it. Owned by the caller, no initialisation needed. */
typedef struct kvf_error {
    kvf_status code;
    char msg[508]; /* NUL-terminated UTF-8, one sentence or two */
} kvf_error;

/* Name of a status, "KVF_ERR_ARG". Static; never NULL, also for an unknown value. */
KVF_API const char *kvf_status_name(kvf_status status);

/* ---- Context -------------------------------------------------------------------------- */

typedef struct kvf_ctx kvf_ctx;

typedef enum kvf_log_level {
    KVF_LOG_DEBUG = 0,
    KVF_LOG_INFO = 1,
    KVF_LOG_WARN = 2
} kvf_log_level;

/* How matrix products are computed. AUTO takes the fastest path of the processor whose error
 * stays within the bounds of docs/engine.md; F32 dequantises weights and multiplies in single
 * precision, slower, the yardstick of the others. */
typedef enum kvf_precision { KVF_PRECISION_AUTO = 0, KVF_PRECISION_F32 = 1 } kvf_precision;

typedef struct kvf_ctx_params {
    size_t size;       /* sizeof *this; set by kvf_ctx_params_init */
    int32_t n_threads; /* worker threads, the caller's included, 1..1024; 0: one per usable core */
    const char *cpu;   /* highest instruction set to use: "ref", "avx2", "avx512" (with VNNI),
                          "amx"; NULL or "auto": the best there is. A name this processor cannot
                          run is KVF_ERR_UNSUPPORTED. Copied. */
    kvf_precision precision;
    /* Allocator; NULL: malloc and free. alloc returns memory aligned for any type or NULL; both
     * are called from any thread that is inside the library. */
    void *(*alloc)(void *user, size_t bytes);
    void (*release)(void *user, void *ptr);
    /* Log sink; NULL: silence. text is one line without newline. Called from any thread. */
    void (*log)(void *user, kvf_log_level level, const char *text);
    void *user; /* handed to the three callbacks */
    const char *device; /* NULL or "cpu"; "cuda": libkvfold_cuda.so beside this library, or KVF_ERR_UNSUPPORTED with the
                           reason; "auto": cuda if there is one, else cpu, and the log says which. Copied. Stores and
                           vision towers need "cpu" so far. */
    uint64_t reserved[7];
} kvf_ctx_params;

/* Set every field to its default. */
KVF_API void kvf_ctx_params_init(kvf_ctx_params *p);

/* One line at out (cut to cap): the devices of a kind ("cuda"), or why there are none. Returns their number. */
KVF_API int32_t kvf_devices(const char *kind, char *out, size_t cap);

/* Start a context: detect the processor, start n_threads - 1 threads. params may be NULL.
 * Errors: ARG (n_threads, cpu name), UNSUPPORTED (cpu), NOMEM. */
KVF_API kvf_status kvf_ctx_open(kvf_ctx **out, const kvf_ctx_params *params, kvf_error *err);

/* Join the threads and free the context. All its models must be closed. */
KVF_API void kvf_ctx_close(kvf_ctx *ctx);

/* Threads in use, the caller's included. */
KVF_API int32_t kvf_ctx_threads(const kvf_ctx *ctx);

/* Instruction set in use: "ref", "avx2", "avx512" or "amx". Valid while ctx is open. */
KVF_API const char *kvf_ctx_cpu(const kvf_ctx *ctx);

/* ---- Model ---------------------------------------------------------------------------- */

typedef struct kvf_model kvf_model;
typedef int32_t kvf_token; /* 0 <= token < n_vocab */
#define KVF_TOKEN_NONE ((kvf_token)-1)

typedef struct kvf_model_info {
    size_t size;            /* set by the caller to sizeof *this before the call */
    const char *arch;       /* "llama", "qwen2", "qwen3" or "gemma3" */
    const char *name;       /* general.name, or "" */
    const char *quantization; /* type that holds most bytes of the matrices, "Q4_K" */
    const char *tokenizer;  /* "bpe/qwen2", "spm", ... */
    const char *chat_template; /* recognised template, "chatml", "llama3", "gemma", "mistral", or "" */
    int64_t n_params;
    int64_t file_bytes;
    int64_t n_ctx_train;    /* tokens the model was trained for */
    int32_t n_vocab, n_layer, n_embd, n_ff;
    int32_t n_head, n_head_kv, head_dim;
    int32_t window;         /* keys a sliding-window layer sees; 0: no such layers */
    size_t kv_bytes_per_token; /* of KV cache, all layers, f16 */
    kvf_token bos, eos;     /* KVF_TOKEN_NONE if the model has none */
    int32_t add_bos;        /* 1: texts start with bos by the model's own rule */
    uint64_t fingerprint[2]; /* of metadata, tensor directory and samples of the weights: tells
                                models apart, does not prove that every byte is the same */
    uint64_t reserved[8];
} kvf_model_info;

/* One entry of the metadata or of the tensor directory, for display. Strings are the model's. */
typedef struct kvf_model_entry {
    const char *name;
    const char *type;  /* "u32", "str", "arr[str]"; of a tensor "Q4_K" */
    const char *value; /* text, long values cut; of a tensor its shape, "[896, 4864]" */
    size_t bytes;      /* of a tensor; 0 for metadata */
    uint64_t reserved[4];
} kvf_model_entry;

/* Open a GGUF v3 file. It is mapped, not copied, and must not change while open. Every length,
 * offset, dimension and type is checked before use.
 * Errors: IO, FORMAT (names the key or tensor), UNSUPPORTED (architecture, tensor type,
 * tokenizer, RoPE scaling: named), NOMEM. Blocking; milliseconds, the weights are not read. */
KVF_API kvf_status kvf_model_open(kvf_model **out, kvf_ctx *ctx, const char *path, kvf_error *err);
KVF_API void kvf_model_close(kvf_model *m);

/* Fill *info; strings live as long as the model. Errors: ARG (size). */
KVF_API kvf_status kvf_model_get_info(const kvf_model *m, kvf_model_info *info, kvf_error *err);

/* Entry i of the metadata / of the tensors, 0 <= i < count. NOT_FOUND past the end. */
KVF_API kvf_status kvf_model_meta(const kvf_model *m, int64_t i, kvf_model_entry *out);
KVF_API kvf_status kvf_model_tensor(const kvf_model *m, int64_t i, kvf_model_entry *out);

/* ---- Text ------------------------------------------------------------------------------ */

typedef enum kvf_tokenize_flags {
    KVF_TOKENIZE_SPECIAL = 1, /* "<|im_end|>" in the text becomes the control token. Never set it
                                 for text from outside: a document could close its own turn. */
    KVF_TOKENIZE_BOS = 2      /* put bos in front if the model's rule says so (add_bos) */
} kvf_tokenize_flags;

/* Where tokens go. The caller owns v. n is always set to the count the text needs; if that is more
 * than cap, nothing is written and the status is KVF_ERR_LIMIT. */
typedef struct kvf_token_buf {
    kvf_token *v; /* [cap]; may be NULL if cap is 0 */
    int64_t cap;
    int64_t n;    /* out */
} kvf_token_buf;

/* Turn UTF-8 text into tokens. Invalid bytes are kept where the vocabulary has byte tokens. Never
 * more than n_bytes + 16 tokens. O(n_bytes log n_bytes). Thread-safe. Errors: ARG, NOMEM, LIMIT. */
KVF_API kvf_status kvf_tokenize(const kvf_model *m, const char *text, size_t n_bytes, int flags,
                                kvf_token_buf *out, kvf_error *err);

/* The bytes a token stands for; may be part of a UTF-8 sequence, empty for control tokens.
 * *bytes lives as long as the model and is not NUL-terminated. Errors: ARG (token). */
KVF_API kvf_status kvf_token_bytes(const kvf_model *m, kvf_token token, const char **bytes, size_t *n);

/* The name of a token in the vocabulary, also of control tokens; valid while m is open.
 * NULL if out of range. For display. */
KVF_API const char *kvf_token_name(const kvf_model *m, kvf_token token, size_t *n);

/* 1 if the token ends an answer (eos, end of turn), else 0. */
KVF_API int kvf_token_is_end(const kvf_model *m, kvf_token token);

typedef struct kvf_chat_message {
    const char *role; /* "system", "user" or "assistant" */
    const char *content; /* UTF-8; never parsed for control tokens */
    size_t n_bytes;   /* of content; (size_t)-1: NUL-terminated */
} kvf_chat_message; /* comes in arrays and never changes; other contents will have a type of their own */

typedef struct kvf_chat {
    const char *tmpl;    /* "chatml", "llama3", "gemma", "mistral", "none" (contents one after another);
                            NULL: the template recognised in the file */
    const kvf_chat_message *messages; /* [n_messages] */
    int64_t n_messages;
    int generate;        /* not 0: open the assistant's turn at the end */
    uint64_t reserved[4];
} kvf_chat;

/* Frame messages as the model was trained to read them, and tokenise. The frame's own control
 * tokens are real, the contents are plain text, so a hostile document cannot leave its turn.
 * Errors: ARG (role), NOT_FOUND (template), NOMEM, LIMIT. Thread-safe. */
KVF_API kvf_status kvf_chat_tokenize(const kvf_model *m, const kvf_chat *chat, kvf_token_buf *out, kvf_error *err);

/* ---- Store ------------------------------------------------------------------------------ */

/* A folder of documents that were read once: tokens, keys, values and what finds them again. Any number
 * of processes may read it while one writes. A document is there whole groups of 2048 tokens at a time;
 * one that is not finished is carried on by ingesting it again. Format: docs/store.md. */
typedef struct kvf_store kvf_store;

typedef enum kvf_store_mode {
    KVF_STORE_READ = 0,  /* must exist */
    KVF_STORE_WRITE = 1, /* must exist */
    KVF_STORE_CREATE = 2 /* for writing; made if it is not there */
} kvf_store_mode;

typedef enum kvf_codec {
    KVF_CODEC_F16 = 0, /* as computed: an answer from the store is the same bits */
    KVF_CODEC_INT8 = 1 /* half the bytes, rounded: docs/store.md has the measured error */
} kvf_codec;

typedef struct kvf_store_params {
    size_t size;      /* set by kvf_store_params_init */
    int32_t mode;     /* kvf_store_mode (default READ) */
    int32_t codec;    /* kvf_codec of a store that is made; an existing one keeps its own */
    size_t map_bytes; /* address space to begin with; 0: chosen. It grows by itself while writing. */
    uint64_t reserved[8];
} kvf_store_params;

KVF_API void kvf_store_params_init(kvf_store_params *p);

/* Open the store in folder `path`. Errors: NOT_FOUND (no store there), IO, FORMAT (damaged, or not a
 * store), UNSUPPORTED (made by a newer version), BUSY (another handle or process writes to it), SPACE. */
KVF_API kvf_status kvf_store_open(kvf_store **out, kvf_ctx *ctx, const char *path, const kvf_store_params *params,
                                  kvf_error *err);
KVF_API void kvf_store_close(kvf_store *st);

typedef struct kvf_store_info {
    size_t size;              /* set by the caller */
    int32_t version, codec;
    uint64_t fingerprint[2];  /* of the model it was made with; 0 while empty */
    const char *model;        /* its name; "" while empty. Strings live as long as the store. */
    const char *policy;       /* the policy's spec: open sessions with it */
    int64_t n_documents, n_unfinished; /* all; of those, not read to the end */
    int64_t n_tokens;         /* of all documents, shared ones counted once */
    int64_t n_blocks;         /* 128-token blocks, all layers */
    size_t kv_bytes;          /* of keys and values as stored */
    size_t index_bytes;       /* of digests */
    size_t file_bytes;        /* on disk */
    size_t free_bytes;        /* of those, free pages inside the file: kvf_store_compact returns them */
    int32_t n_layer, n_head_kv, head_dim;
    uint64_t reserved[8];
} kvf_store_info;

KVF_API kvf_status kvf_store_get_info(kvf_store *st, kvf_store_info *info, kvf_error *err);

typedef struct kvf_document {
    size_t size;         /* set by the caller */
    const char *name;    /* strings and note belong to *doc: kvf_document_free */
    int64_t n_tokens;    /* stored; of an unfinished document those read so far */
    int64_t created;     /* seconds since 1970 */
    int32_t complete;    /* 1: read to its end */
    const void *note;    /* what kvf_ingest.note was */
    size_t note_bytes;
    size_t kv_bytes;     /* of groups that no other document shares */
    uint64_t reserved[4];
} kvf_document;

/* The i-th document in the order of names (NOT_FOUND past the end), or the one of that name. */
KVF_API kvf_status kvf_store_document(kvf_store *st, int64_t i, kvf_document *doc, kvf_error *err);
KVF_API kvf_status kvf_store_find(kvf_store *st, const char *name, kvf_document *doc, kvf_error *err);
KVF_API void kvf_document_free(kvf_store *st, kvf_document *doc);

/* Remove a document and the groups that no other one shares. Its space is used again; compact gives it
 * back. Errors: NOT_FOUND, STATE (not open for writing), BUSY (a session of this handle reads it). */
KVF_API kvf_status kvf_store_remove(kvf_store *st, const char *name, kvf_error *err);

/* Rewrite the file without free pages. Needs as much disk again while it runs; a crash leaves the old
 * file. Other processes must have closed the store; sessions of this handle too. Errors: STATE, BUSY, SPACE, IO. */
KVF_API kvf_status kvf_store_compact(kvf_store *st, kvf_error *err);

typedef struct kvf_verify {
    size_t size;          /* set by the caller */
    int (*progress)(void *user, int64_t done, int64_t total); /* groups; not 0 cancels; may be NULL */
    void *user;
    int64_t n_checked;    /* out: values read */
    int64_t n_bad;        /* out */
    char first_bad[200];  /* out: what and where */
    uint64_t reserved[4];
} kvf_verify;

/* Read everything and check it: checksums, lengths, chains, references. KVF_OK with n_bad > 0 is a
 * damaged store; a failure means that checking was not possible. */
KVF_API kvf_status kvf_store_verify(kvf_store *st, kvf_verify *v, kvf_error *err);

/* ---- Session --------------------------------------------------------------------------- */

typedef struct kvf_session kvf_session;

typedef struct kvf_sampling {
    float temperature;    /* 0: greedy, the most likely token; else > 0 (default 0) */
    int32_t top_k;        /* keep the k most likely; 0: all (default 40) */
    float top_p;          /* keep the smallest set with this probability, 0..1 (default 0.95) */
    float min_p;          /* drop tokens under min_p * p(best), 0..1 (default 0.05) */
    float repeat_penalty; /* > 0; 1: none (default 1) */
    int32_t repeat_last_n; /* tokens looked back at; 0: none, -1: all (default 64) */
    uint64_t seed;        /* the same seed, calls, thread count and kind of processor give the
                             same text (default 0) */
    uint64_t reserved[4];
} kvf_sampling;

typedef struct kvf_session_params {
    size_t size;
    int64_t n_ctx;   /* most tokens the timeline may hold; 0: the model's n_ctx_train, or no limit with a
                        policy that reads far blocks at a fixed distance (infllm) */
    int64_t n_batch; /* tokens per prefill chunk, 1..65536; 0: the backend's choice */
    size_t kv_bytes; /* most bytes of KV in memory; 0: as much as n_ctx needs; with infllm 1 GiB, or what
                        its window and units of all layers take if that is more. Taken block by
                        block. Blocks that are in a store make room for others. */
    const char *policy; /* "full": nothing is dropped (default). kvf_policy_name lists the others,
                           docs/methods/ describes them. Copied. */
    kvf_sampling sampling;
    /* Called after every prefill chunk with tokens done and to do of this call. A return other
     * than 0 cancels. May be NULL. Must not call into the session. */
    int (*progress)(void *user, int64_t done, int64_t total);
    void *user;
    int32_t passages; /* 1: note where attention goes while an answer is written (kvf_session_passages) */
    int32_t host_share; /* 0 to 100: percent of the far blocks of a step that a device's memory lacks and the CPU attends
                           to where they lie, instead of copying them; 0: all are copied (default). Answers then differ
                           by roundings. No device has measured yet where it pays. Without effect on the CPU, without
                           a store, and while passages are noted */
    uint64_t reserved[7];
} kvf_session_params;

typedef struct kvf_stats {
    size_t size;               /* set by the caller to sizeof *this */
    int64_t n_prompt_tokens;   /* tokens handed to sync, append and score since open or stats_reset */
    int64_t n_reused_tokens;   /* of those, found in the cache already */
    int64_t n_computed_tokens; /* tokens those calls ran through the layers; may include one that
                                  next() had sampled before */
    int64_t n_generated_tokens; /* returned by kvf_session_next */
    double prefill_ms, decode_ms; /* time inside those computations */
    int64_t kv_blocks;         /* block slots in use, all layers */
    size_t kv_bytes;           /* bytes of those slots */
    size_t work_bytes;         /* scratch of the session */
    char backend[16];          /* "cpu" */
    char cpu[16];              /* "avx512" */
    char kernels[256];         /* what really ran on this ctx: "mm=amx_bf16 attn=avx512 ..." */
    char policy[512];          /* spec with every option spelled out */
    int64_t n_lookups;         /* times a layer chose blocks by their digests */
    double lookup_ms;
    int64_t n_block_reads;     /* far blocks that attention read */
    int64_t n_block_misses;    /* of those, fetched from the store first */
    size_t index_bytes;        /* digests in memory */
    int64_t n_layer_tokens;    /* tokens times layers computed, and what they would be without pruning: */
    int64_t n_layer_tokens_full;
    int64_t n_revived_tokens;  /* of the tokens computed in a stage, those that an earlier step had passed over */
    int64_t n_waiting_tokens;  /* tokens of the timeline that are not through all layers */
    size_t waiting_bytes;      /* their hidden states: in memory and in files */
    int64_t n_blocks_ahead;    /* copied to a device before attention asked for them; */
    int64_t n_blocks_early;    /* of those, that attention read: as many misses fewer */
    int64_t n_blocks_host;     /* copied from host memory that held them already, not from the store */
    uint64_t moved_bytes;      /* of blocks copied into the pool, from the store or from host memory */
    uint64_t n_blocks_shared;  /* of n_block_reads, read by the CPU beside a device (host_share) */
    uint64_t reserved[1];
} kvf_stats;

KVF_API void kvf_session_params_init(kvf_session_params *p);

/* Open an empty timeline. params may be NULL. Memory grows with the tokens held.
 * Errors: ARG (a field out of range), NOT_FOUND (policy; lists those there are), NOMEM, IO (a folder that the
 * policy names). */
KVF_API kvf_status kvf_session_open(kvf_session **out, kvf_model *m, const kvf_session_params *params,
                                    kvf_error *err);
KVF_API void kvf_session_close(kvf_session *s);

/* Make the timeline equal tokens[0..n). The longest prefix already there is kept and not
 * computed again; what differs is dropped; the rest is computed in chunks. Afterwards
 * kvf_session_next continues after tokens[n-1]. n >= 1. Blocking.
 * Errors: ARG (token out of range), LIMIT (n > n_ctx, or kv_bytes), NOMEM, CANCELLED. After ARG
 * and LIMIT the timeline is unchanged; after NOMEM or CANCELLED it is unchanged or a prefix of
 * tokens, and the same call again carries on from there. With lazyllm, and with a store, kv_bytes can
 * show itself too small half way: then LIMIT leaves what NOMEM leaves. tokens may be the session's own. */
KVF_API kvf_status kvf_session_sync(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err);

/* Add tokens at the end of the timeline. As kvf_session_sync otherwise, but after NOMEM or
 * CANCELLED the first tokens may be there already: compare kvf_session_tokens with the count before
 * and hand over the rest. */
KVF_API kvf_status kvf_session_append(kvf_session *s, const kvf_token *tokens, int64_t n, kvf_error *err);

/* A place of the timeline that no token of the vocabulary stands at, but an embedding. */
#define KVF_TOKEN_EMBEDDING ((kvf_token)-2)

/* Embeddings for the places KVF_TOKEN_EMBEDDING of what sync and append are handed from now on: the k-th such
 * place of the timeline, counted from its beginning, is row k. rows: [n][width] f32, finite, as the model's
 * first layer reads them (for visual tokens: what the projector gives, merged or not; a text model's own token
 * embeddings are scaled by sqrt(width) in gemma, and these are not). They are copied; n = 0 drops them. The
 * timeline is emptied. Such places count, are reused and cut like tokens; kvf_session_score and
 * kvf_session_ingest refuse them. Errors: ARG (width is not the model's, a number is not finite), NOMEM. */
KVF_API kvf_status kvf_session_set_embeddings(kvf_session *s, const float *rows, int64_t n, int64_t width,
                                              kvf_error *err);

/* Sample the next token, put it at the end of the timeline and return it in *out. KVF_DONE when
 * it ends the answer (*out is that token; it is not put on the timeline).
 * Errors: STATE (empty timeline), LIMIT (context full), NOMEM, CANCELLED. */
KVF_API kvf_status kvf_session_next(kvf_session *s, kvf_token *out, kvf_error *err);

/* Scores for the token after the timeline: *logits is [n_vocab] f32, the session's, valid until
 * the next call that changes the timeline; it may be changed in place to steer the next token, and
 * keeps the changes until there is one.
 * Errors: STATE (empty timeline), NOMEM, CANCELLED. */
KVF_API kvf_status kvf_session_logits(kvf_session *s, float **logits, kvf_error *err);

typedef struct kvf_score {
    float logprob;         /* natural log of the probability of tokens[i] given all before it */
    kvf_token top[5];      /* most likely tokens at that place, best first */
    float top_logprob[5];
} kvf_score; /* comes in arrays and never changes */

/* Append tokens like kvf_session_append, and say how likely each was: scores is [n], the
 * caller's; scores[0] is all zero when the timeline was empty. A policy that prunes reads them one
 * by one, and so does one with a memory where the timeline was not empty: they are scored as if
 * they had been written. On an empty timeline infllm reads in chunks, as ingestion does, and a
 * chunk's choice of blocks sees the whole chunk. */
KVF_API kvf_status kvf_session_score(kvf_session *s, const kvf_token *tokens, int64_t n,
                                     kvf_score *scores, kvf_error *err);

/* Change the sampler. Restarts its random sequence from sampling->seed. Errors: ARG. */
KVF_API kvf_status kvf_session_set_sampling(kvf_session *s, const kvf_sampling *sampling, kvf_error *err);

/* The timeline's tokens, valid until the next call that changes it. Returns their count. */
KVF_API int64_t kvf_session_tokens(const kvf_session *s, const kvf_token **tokens);

/* Ask a call that runs on s to stop; it returns CANCELLED after the chunk at hand. A request that
 * comes while none runs, or during the last chunk, stops the next one. Any thread;
 * async-signal-safe. */
KVF_API void kvf_session_cancel(kvf_session *s);

/* Fill *stats. Errors: ARG (size). kvf_session_stats_reset zeroes the counters. */
KVF_API kvf_status kvf_session_stats(const kvf_session *s, kvf_stats *stats, kvf_error *err);
KVF_API void kvf_session_stats_reset(kvf_session *s);

/* *n: tokens whose keys and values layer 0 <= layer < n_layer holds. Fewer than the timeline has where a policy
 * prunes, merges or evicts; others may still wait before the layer (lazyllm). Errors: ARG. */
KVF_API kvf_status kvf_session_layer_tokens(const kvf_session *s, int32_t layer, int64_t *n, kvf_error *err);

/* ---- Documents in a store ---------------------------------------------------------------- */

typedef struct kvf_ingest {
    size_t size;             /* set by the caller */
    const char *name;        /* under which it is found again: 1..400 bytes UTF-8 */
    const kvf_token *tokens; /* [n] the document as later prompts will begin: frame included, no question */
    int64_t n;
    const void *note;        /* anything the caller wants back with the document; may be NULL */
    size_t note_bytes;       /* <= 64 MiB */
    uint64_t reserved[4];
} kvf_ingest;

/* Read a document into the store and make it the timeline. What the store has of it already (an earlier
 * ingestion, interrupted or not, or another document that begins alike) is not computed again. Progress
 * comes through the session's callback. The session's policy must have a memory (infllm).
 * Errors: ARG, STATE (store not writable; policy without memory; name taken by another text), MISMATCH
 * (store of another model or policy), SPACE, IO, NOMEM, LIMIT, CANCELLED (what is committed stays; the
 * same call goes on from there). The store must be open until the session is closed. */
KVF_API kvf_status kvf_session_ingest(kvf_session *s, kvf_store *st, const kvf_ingest *in, kvf_error *err);

/* Make a stored document the timeline, without computing anything: hand the question to
 * kvf_session_append. Errors: NOT_FOUND, STATE (not read to its end; policy without memory), MISMATCH, IO,
 * FORMAT, NOMEM, LIMIT (kv_bytes cannot hold the window). */
KVF_API kvf_status kvf_session_load(kvf_session *s, kvf_store *st, const char *name, kvf_error *err);

typedef struct kvf_passage {
    int64_t first, n;  /* tokens of the timeline: at most 128, within one block */
    int64_t peak;      /* token around which most of it went */
    float share;       /* of the attention that tokens first..end got, 0..1 */
    uint32_t reserved;
} kvf_passage; /* comes in arrays and never changes */

/* Where the answer was read from: passages of tokens first..end by the attention they got from the tokens
 * that kvf_session_next computed since the last sync, append or load, most first. out is [cap]; *n is set
 * to how many were written. Needs kvf_session_params.passages. Errors: ARG, STATE. */
KVF_API kvf_status kvf_session_passages(kvf_session *s, int64_t first, int64_t end, kvf_passage *out, int64_t cap,
                                        int64_t *n, kvf_error *err);

/* Policies compiled in: name and one line of help of the i-th; NULL past the end. */
KVF_API const char *kvf_policy_name(int64_t i, const char **help);

#ifdef __cplusplus
}
#endif
#endif
