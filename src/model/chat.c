/* chat.c - chat frames as tables of text around messages. See chat.h.
 *
 * The rule that matters: a message can never end its own turn. The frame's text is parsed for
 * control tokens, a message is not; otherwise the conversation is tokenised as one text, so that
 * benign messages get the tokens the model's own template would give.
 *
 * Sources: the chat templates in the tokenizer_config.json files of Qwen2.5, Llama 3, Gemma 3 and
 * Mistral 7B Instruct v0.1-v0.3. No default system message is ever added. Mistral wrote its marks
 * in three ways; the vocabulary tells which: marks that are plain text stand between blanks (v1),
 * marks that are control tokens touch the message (tekken), in SentencePiece vocabularies with one
 * blank after the opening mark (v3), which add_space_prefix may already supply.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "model/chat.h"

#include <string.h>

enum { SYSTEM, USER, ASSISTANT, N_ROLE };
static const char *const role_names[N_ROLE] = { "system", "user", "assistant" };

typedef struct frame {
    const char *open[N_ROLE]; /* of SYSTEM NULL: its text goes in front of the next user message */
    const char *close[N_ROLE];
    const char *between;  /* messages */
    const char *generate; /* opens the answer */
    bool bos;             /* in front, also if the model's rule does not say so */
    bool trim;            /* white space around messages is dropped */
} frame;

struct kvf_chat_template {
    const char *name;
    const char *marker; /* in the Jinja text; NULL: never recognised */
    bool one_token;     /* the marker is a token of every vocabulary that was trained with it */
    frame frame;
};

static const kvf_chat_template templates[] = {
    { .name = "chatml",
      .marker = "<|im_start|>",
      .one_token = true,
      .frame = { .open = { "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n" },
                 .close = { "<|im_end|>\n", "<|im_end|>\n", "<|im_end|>\n" },
                 .generate = "<|im_start|>assistant\n" } },
    { .name = "llama3",
      .marker = "<|start_header_id|>",
      .one_token = true,
      .frame = { .open = { "<|start_header_id|>system<|end_header_id|>\n\n",
                           "<|start_header_id|>user<|end_header_id|>\n\n",
                           "<|start_header_id|>assistant<|end_header_id|>\n\n" },
                 .close = { "<|eot_id|>", "<|eot_id|>", "<|eot_id|>" },
                 .generate = "<|start_header_id|>assistant<|end_header_id|>\n\n",
                 .bos = true,
                 .trim = true } },
    { .name = "gemma",
      .marker = "<start_of_turn>",
      .one_token = true,
      .frame = { .open = { NULL, "<start_of_turn>user\n", "<start_of_turn>model\n" },
                 .close = { NULL, "<end_of_turn>\n", "<end_of_turn>\n" },
                 .generate = "<start_of_turn>model\n",
                 .bos = true,
                 .trim = true } },
    { .name = "mistral",
      .marker = "[INST]",
      .frame = { .open = { NULL, "[INST] ", " " }, .close = { NULL, " [/INST]", "</s>" }, .bos = true } },
    /* For base models: the texts with an empty line between them. */
    { .name = "none", .frame = { .open = { "", "", "" }, .close = { "", "", "" }, .between = "\n\n" } },
};
enum { n_templates = sizeof templates / sizeof *templates };

/* Mistral's marks as control tokens. */
static const frame mistral_v3 = { .open = { NULL, "[INST] ", " " },
                                  .close = { NULL, "[/INST]", "</s>" },
                                  .bos = true };
static const frame mistral_tekken = { .open = { NULL, "[INST]", "" },
                                      .close = { NULL, "[/INST]", "</s>" },
                                      .bos = true };

const kvf_chat_template *kvf_chat_find(const char *name)
{
    for (int i = 0; name && i < n_templates; i++)
        if (strcmp(templates[i].name, name) == 0) return &templates[i];
    return NULL;
}

const char *kvf_chat_name(const kvf_chat_template *c) { return c->name; }
const char *kvf_chat_name_at(int32_t i) { return i >= 0 && i < n_templates ? templates[i].name : NULL; }

static bool contains(const kvf_str *s, const char *what)
{
    size_t m = strlen(what);
    for (size_t i = 0; i + m <= s->n; i++)
        if (s->p[i] == what[0] && memcmp(s->p + i, what, m) == 0) return true;
    return false;
}

const kvf_chat_template *kvf_chat_recognise(const kvf_str *jinja, const kvf_tokenizer *t)
{
    if (!jinja || !jinja->p) return NULL;
    /* Llama-2 shares Mistral's marks but has a system turn of its own, which is not in the table. */
    if (contains(jinja, "<<SYS>>")) return NULL;
    for (int i = 0; i < n_templates; i++) {
        const kvf_chat_template *c = &templates[i];
        if (!c->marker || !contains(jinja, c->marker)) continue;
        if (c->one_token && t && kvf_tokenizer_find(t, c->marker, strlen(c->marker)) < 0) continue;
        return c;
    }
    return NULL;
}

/* ---- Encode ------------------------------------------------------------------------------ */

typedef struct builder {
    const kvf_mem *mem;
    kvf_text_part *part;
    int64_t n, cap;
    kvf_error *err;
} builder;

static kvf_status add(builder *b, const char *p, size_t n, bool special)
{
    if (!p || n == 0) return KVF_OK;
    void *v = b->part;
    KVF_TRY(kvf_reserve(b->mem, &v, &b->cap, b->n + 1, sizeof *b->part, b->err));
    b->part = v;
    b->part[b->n++] = (kvf_text_part){ p, n, special };
    return KVF_OK;
}

static kvf_status add_frame(builder *b, const char *text)
{
    return add(b, text, text ? strlen(text) : 0, true);
}

static bool is_blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

static kvf_status add_content(builder *b, const frame *f, const kvf_chat_message *m)
{
    const char *p = m->content;
    size_t n = !p ? 0 : m->n_bytes == (size_t)-1 ? strlen(p) : m->n_bytes;
    while (f->trim && n > 0 && is_blank(p[n - 1])) n--;
    for (; f->trim && n > 0 && is_blank(*p); p++) n--;
    return add(b, p, n, false);
}

static int role_of(const kvf_chat_message *m)
{
    for (int r = 0; m->role && r < N_ROLE; r++)
        if (strcmp(m->role, role_names[r]) == 0) return r;
    return -1;
}

/* System messages among msgs[from..to), each with an empty line after it; the last one without if
 * nothing follows. */
static kvf_status add_system(builder *b, const frame *f, const kvf_chat_message *msgs, int64_t from,
                             int64_t to, bool more)
{
    bool first = true;
    for (int64_t i = from; i < to; i++) {
        if (role_of(&msgs[i]) != SYSTEM) continue;
        if (!first) KVF_TRY(add_frame(b, "\n\n"));
        KVF_TRY(add_content(b, f, &msgs[i]));
        first = false;
    }
    return !first && more ? add_frame(b, "\n\n") : KVF_OK;
}

static bool has_system(const kvf_chat_message *msgs, int64_t from, int64_t to)
{
    for (int64_t i = from; i < to; i++)
        if (role_of(&msgs[i]) == SYSTEM) return true;
    return false;
}

static kvf_status build(builder *b, const frame *f, const kvf_chat_message *msgs, int64_t n_msgs,
                        bool generate)
{
    int64_t waiting = 0; /* system messages from here on have no place yet */
    bool first = true;
    for (int64_t i = 0; i < n_msgs; i++) {
        int role = role_of(&msgs[i]);
        if (role == SYSTEM && !f->open[SYSTEM]) continue;
        if (!first) KVF_TRY(add_frame(b, f->between));
        first = false;
        KVF_TRY(add_frame(b, f->open[role]));
        if (role == USER) {
            if (!f->open[SYSTEM]) KVF_TRY(add_system(b, f, msgs, waiting, i, true));
            waiting = i + 1;
        }
        KVF_TRY(add_content(b, f, &msgs[i]));
        KVF_TRY(add_frame(b, f->close[role]));
    }
    if (!f->open[SYSTEM] && has_system(msgs, waiting, n_msgs)) { /* no user message took them in */
        KVF_TRY(add_frame(b, f->open[USER]));
        KVF_TRY(add_system(b, f, msgs, waiting, n_msgs, false));
        KVF_TRY(add_frame(b, f->close[USER]));
    }
    return generate ? add_frame(b, f->generate) : KVF_OK;
}

static const frame *frame_of(const kvf_chat_template *c, const kvf_tokenizer *t)
{
    if (strcmp(c->name, "mistral") != 0 || kvf_tokenizer_find(t, "[INST]", 6) < 0) return &c->frame;
    bool blank = strcmp(kvf_tokenizer_kind(t), "spm") == 0 && !kvf_tokenizer_space_prefix(t);
    return blank ? &mistral_v3 : &mistral_tekken;
}

kvf_status kvf_chat_encode(const kvf_chat_template *c, const kvf_tokenizer *t, const kvf_chat_message *msgs,
                           int64_t n_msgs, bool generate, kvf_token_list *list, kvf_error *err)
{
    for (int64_t i = 0; i < n_msgs; i++)
        if (role_of(&msgs[i]) < 0)
            return kvf_fail(err, KVF_ERR_ARG,
                            "message %lld has the role '%.32s'; it must be system, user or assistant",
                            (long long)i, msgs[i].role ? msgs[i].role : "(null)");
    const frame *f = frame_of(c, t);
    builder b = { .mem = list->mem, .err = err };
    kvf_status rc = KVF_OK;
    kvf_token bos = kvf_tokenizer_bos(t);
    if (bos >= 0 && (f->bos || kvf_tokenizer_add_bos(t))) rc = kvf_token_list_push(list, bos, err);
    if (rc == KVF_OK) rc = build(&b, f, msgs, n_msgs, generate);
    if (rc == KVF_OK) rc = kvf_tokenizer_encode_parts(t, b.part, b.n, list, err);
    kvf_free(b.mem, b.part);
    return rc;
}
