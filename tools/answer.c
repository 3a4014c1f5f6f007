/* answer.c - see answer.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "answer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "interrupt.h"
#include "json.h"
#include "report.h"
#include "utf8.h"

/* What stands between the tokens and the reader's eyes. */
typedef struct output {
    const answer_request *r;
    buffer *text; /* all of the answer so far, clean */
    utf8_stream utf8;
    size_t n_written; /* bytes of text on stdout */
    size_t search;    /* where the next search for the stop text begins */
    bool stopped;     /* the stop text was found and cut off */
    bool strip;       /* stdout is a terminal: control characters do not pass */
} output;

/* Bytes at the end of text that may be the beginning of the stop text, or white space that trim
 * would take away if nothing follows. */
static size_t held_back(const output *o)
{
    size_t n = o->text->n, held = 0;
    if (o->r->stop) {
        size_t m = strlen(o->r->stop);
        for (size_t k = 1; k < m && k <= n; k++)
            if (memcmp(o->text->v + n - k, o->r->stop, k) == 0) held = k;
    }
    if (o->r->trim) {
        size_t white = 0;
        while (white < n && strchr(" \n\t", o->text->v[n - 1 - white])) white++;
        if (white > held) held = white;
    }
    return held;
}

static void write_ready(output *o, size_t end)
{
    if (!o->r->stream || end <= o->n_written) return;
    const char *p = o->text->v + o->n_written;
    size_t n = end - o->n_written;
    o->n_written = end;
    if (o->strip) {
        buffer clean = { 0 };
        utf8_add_clean(&clean, p, n, UTF8_NO_CONTROLS);
        if (clean.n) fwrite(clean.v, 1, clean.n, stdout);
        buffer_free(&clean);
    } else {
        fwrite(p, 1, n, stdout);
    }
    fflush(stdout);
}

static void push(output *o, const char *bytes, size_t n)
{
    buffer *t = o->text;
    utf8_stream_push(&o->utf8, t, bytes, n);
    if (o->r->trim && !o->n_written) {
        size_t white = t->n ? strspn(t->v, " \n\t\r") : 0;
        if (white) {
            memmove(t->v, t->v + white, t->n - white + 1);
            t->n -= white;
        }
    }
    if (!t->n) return;
    if (o->r->stop) {
        char *hit = strstr(t->v + o->search, o->r->stop);
        if (hit) {
            buffer_cut(t, (size_t)(hit - t->v));
            o->stopped = true;
        } else {
            size_t m = strlen(o->r->stop);
            o->search = t->n >= m ? t->n - m + 1 : 0;
        }
    }
    write_ready(o, t->n - held_back(o));
}

static void finish_output(output *o)
{
    utf8_stream_end(&o->utf8, o->text);
    if (o->r->trim) buffer_trim_end(o->text);
    write_ready(o, o->text->n);
    if (o->r->stream && o->text->n && o->text->v[o->text->n - 1] != '\n') fputc('\n', stdout);
    fflush(stdout);
}

/* Tokens until something ends the answer. t_first: when the first came, or 0. */
static kvf_status generate(answer *a, engine *e, output *o, double *t_first, kvf_error *err)
{
    int64_t room = e->n_ctx - o->r->prompt->n;
    a->finish = "length";
    while (a->n_generated < o->r->max_tokens) {
        if (a->n_generated >= room) {
            a->finish = "context";
            return KVF_OK;
        }
        kvf_token token = KVF_TOKEN_NONE;
        kvf_status rc = kvf_session_next(e->session, &token, err);
        if (rc < 0) return rc;
        a->n_steps++;
        if (*t_first <= 0) {
            *t_first = clock_s();
            progress_clear(&e->bar);
        }
        if (rc == KVF_DONE && !o->r->ignore_eos) {
            a->finish = "stop";
            return KVF_OK;
        }
        if (rc == KVF_DONE) { /* it was not put on the timeline */
            rc = kvf_session_append(e->session, &token, 1, err);
            if (rc < 0) return rc;
        }
        a->n_generated++;
        const char *bytes = NULL;
        size_t n = 0;
        rc = kvf_token_bytes(e->model, token, &bytes, &n);
        if (rc == KVF_OK) push(o, bytes, n);
        if (o->stopped) {
            a->finish = "stop";
            return KVF_OK;
        }
        if (ferror(stdout)) { /* the reader went away */
            a->finish = "output";
            return KVF_OK;
        }
    }
    return KVF_OK;
}

/* How likely the expected answer is after the prompt: its tokens are read as if they had been written. */
static kvf_status score_expected(answer *a, engine *e, const answer_request *r, double *t_first, kvf_error *err)
{
    token_list expected = { 0 };
    kvf_score *scores = NULL;
    *t_first = clock_s(); /* the prompt is read: the first token's probability is there */
    kvf_status rc = prompt_answer(&expected, e, r->plain, r->expect, err);
    if (rc == KVF_OK && !expected.n) rc = report_fail(err, KVF_ERR_ARG, "The answer of --expect is empty.");
    if (rc == KVF_OK) scores = malloc((size_t)expected.n * sizeof *scores);
    if (rc == KVF_OK && !scores) rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the scores.");
    if (rc == KVF_OK) rc = kvf_session_score(e->session, expected.v, expected.n, scores, err);
    if (rc == KVF_OK) {
        a->finish = "expected";
        a->n_expected = expected.n;
        a->logprob_first = (double)scores[0].logprob;
        for (int64_t i = 0; i < expected.n; i++) {
            a->logprob += (double)scores[i].logprob;
            a->n_first_choice += scores[i].top[0] == expected.v[i];
        }
        if (isnan(a->logprob))
            rc = report_fail(err, KVF_ERR_FORMAT, "The model computes no numbers: its file is damaged. Fetch it again.");
    }
    free(scores);
    token_list_free(&expected);
    return rc;
}

/* What the prompt cost, before generation adds to the counters. */
static void count_prompt(answer *a, const engine *e)
{
    kvf_stats s = { .size = sizeof s };
    if (kvf_session_stats(e->session, &s, NULL) != KVF_OK) return;
    a->n_prompt = s.n_prompt_tokens;
    a->n_reused = s.n_reused_tokens;
    a->n_computed = s.n_computed_tokens;
    a->read_share = s.n_layer_tokens_full > 0 ? (double)s.n_layer_tokens / (double)s.n_layer_tokens_full : 1;
}

static void measure(answer *a, engine *e, const answer_request *r, double t_sync, double t_first)
{
    double now = clock_s();
    a->stats.size = sizeof a->stats;
    if (kvf_session_stats(e->session, &a->stats, NULL) != KVF_OK) return;
    a->total_ms = (now - r->start_s) * 1e3;
    if (t_first <= 0) return;
    a->ttft_ms = (t_first - r->start_s) * 1e3;
    /* By the clock on the wall, as the user sees it: reading ends with the first token, writing is
     * the time between the first and the last. */
    if (t_first > t_sync) a->prefill_tps = (double)a->n_computed / (t_first - t_sync);
    if (a->n_steps > 1 && now > t_first) a->decode_tps = (double)(a->n_steps - 1) / (now - t_first);
}

/* Tokens of the prompt that the session holds already. */
static int64_t common_prefix(const engine *e, const token_list *prompt)
{
    const kvf_token *held = NULL;
    int64_t n = kvf_session_tokens(e->session, &held), i = 0;
    while (i < n && i < prompt->n && held[i] == prompt->v[i]) i++;
    return i;
}

kvf_status answer_run(answer *a, engine *e, const answer_request *r, kvf_error *err)
{
    memset(a, 0, sizeof *a);
    a->finish = "cancelled";
    output o = { .r = r, .text = &a->text };
    o.strip = r->stream && report_is_terminal(stdout);
    kvf_status rc = prompt_check(e, r->prompt->n, err);
    if (rc != KVF_OK) return rc;

    kvf_session_stats_reset(e->session);
    progress_start(&e->bar, "Reading", e->quiet);
    progress_update(&e->bar, 0, r->prompt->n - common_prefix(e, r->prompt));
    double t_sync = clock_s(), t_first = 0;
    interrupt_attach(e->session);
    rc = kvf_session_sync(e->session, r->prompt->v, r->prompt->n, err);
    count_prompt(a, e);
    if (rc == KVF_OK) rc = r->expect ? score_expected(a, e, r, &t_first, err) : generate(a, e, &o, &t_first, err);
    progress_clear(&e->bar);
    finish_output(&o);
    if (rc == KVF_ERR_CANCELLED) a->finish = "cancelled";
    measure(a, e, r, t_sync, t_first);
    if (rc == KVF_OK) rc = buffer_status(&a->text, "the answer", err);
    return rc;
}

/* Of the far blocks that attention read, the share that was in the pool when it asked. */
static double hit_rate(const kvf_stats *s)
{
    return s->n_block_reads > 0 ? 1.0 - ((double)s->n_block_misses + (double)s->n_blocks_shared) / (double)s->n_block_reads : 1.0;
}

void answer_print_expected(const answer *a)
{
    printf("log-probability %.4f of %lld tokens, %.4f of the first; %lld of %lld are the model's first choice\n", a->logprob,
           (long long)a->n_expected, a->logprob_first, (long long)a->n_first_choice, (long long)a->n_expected);
}

void answer_summary(const answer *a)
{
    char n[32], reused[32], mem[32];
    buffer line = { 0 };
    buffer_printf(&line, "read %s tokens", report_count(n, a->n_computed));
    if (a->n_reused) buffer_printf(&line, " (and %s from the cache)", report_count(reused, a->n_reused));
    if (a->read_share < 1) buffer_printf(&line, ", %.0f %% of them in the average layer,", 100 * a->read_share);
    if (a->prefill_tps > 0) buffer_printf(&line, " at %.0f/s", a->prefill_tps);
    if (a->ttft_ms > 0) buffer_printf(&line, ", first token after %.2f s", a->ttft_ms / 1e3);
    if (a->n_expected)
        buffer_printf(&line, ", scored %lld", (long long)a->n_expected);
    else
        buffer_printf(&line, ", wrote %lld", (long long)a->n_generated);
    if (a->decode_tps > 0) buffer_printf(&line, " at %.1f/s", a->decode_tps);
    if (a->stats.n_block_misses > 0)
        buffer_printf(&line, ", %.1f %% of %s blocks read were in the pool, %s came", 100 * hit_rate(&a->stats),
                      report_count(n, a->stats.n_block_reads), report_bytes(mem, (double)a->stats.moved_bytes));
    buffer_printf(&line, ", peak memory %s", report_bytes(mem, (double)engine_peak_rss()));
    report_note("%s", buffer_text(&line));
    if (strcmp(a->finish, "length") == 0) report_note("the answer was cut at --max-tokens");
    if (strcmp(a->finish, "context") == 0) report_note("the answer was cut: the context is full");
    buffer_free(&line);
}

cJSON *answer_json(const answer *a, const engine *e)
{
    cJSON *o = cJSON_CreateObject();
    json_text(o, "answer", buffer_text(&a->text), a->text.n);
    json_array(o, "citations");
    json_text(o, "finish", a->finish, (size_t)-1);
    if (a->n_expected) {
        cJSON *x = json_object(o, "expected");
        json_real(x, "logprob", a->logprob);
        json_real(x, "logprob_first", a->logprob_first);
        json_int(x, "n_tokens", a->n_expected);
        json_int(x, "n_first_choice", a->n_first_choice);
    }
    cJSON *s = json_object(o, "stats");
    json_int(s, "n_prompt_tokens", a->n_prompt);
    json_int(s, "n_computed_tokens", a->n_computed);
    json_int(s, "n_reused_tokens", a->n_reused);
    json_int(s, "n_generated_tokens", a->n_generated);
    json_real(s, "ttft_ms", a->ttft_ms);
    json_real(s, "prefill_ms", a->stats.prefill_ms);
    json_real(s, "decode_ms", a->stats.decode_ms);
    json_int(s, "n_lookups", a->stats.n_lookups);
    json_real(s, "lookup_ms", a->stats.lookup_ms);
    json_int(s, "n_block_reads", a->stats.n_block_reads);
    json_int(s, "n_block_misses", a->stats.n_block_misses);
    json_real(s, "block_hit_rate", hit_rate(&a->stats));
    json_int(s, "n_blocks_ahead", a->stats.n_blocks_ahead);
    json_int(s, "n_blocks_early", a->stats.n_blocks_early);
    json_int(s, "n_blocks_host", a->stats.n_blocks_host);
    json_int(s, "n_blocks_shared", (int64_t)a->stats.n_blocks_shared);
    json_int(s, "block_moved_bytes", (int64_t)a->stats.moved_bytes);
    json_int(s, "index_bytes", (int64_t)a->stats.index_bytes);
    json_real(s, "read_share", a->read_share);
    json_int(s, "n_revived_tokens", a->stats.n_revived_tokens);
    json_int(s, "n_waiting_tokens", a->stats.n_waiting_tokens);
    json_real(s, "total_ms", a->total_ms);
    json_real(s, "prefill_tps", a->prefill_tps);
    json_real(s, "decode_tps", a->decode_tps);
    json_int(s, "peak_rss_bytes", engine_peak_rss());
    json_int(s, "kv_bytes", (int64_t)a->stats.kv_bytes);
    json_text(s, "backend", a->stats.backend, (size_t)-1);
    json_text(s, "cpu", a->stats.cpu, (size_t)-1);
    json_text(s, "kernels", a->stats.kernels, (size_t)-1);
    json_text(s, "policy", a->stats.policy, (size_t)-1);
    json_int(s, "threads", kvf_ctx_threads(e->ctx));
    return o;
}

void answer_free(answer *a) { buffer_free(&a->text); }
