/* cmd_perplexity.c - kvfold perplexity: how well a model predicts a text.
 *
 * The text is tokenised with the model's BOS rule and control tokens read. The first token is
 * given, every other one is scored. A text longer than the context is cut into windows of that
 * many tokens that do not overlap; each begins with BOS if the model's rule says so, and its first
 * token of text is scored only if there is a BOS before it. With --given there is one window: that text is
 * read like a prompt, so a policy that drops tokens after a prompt has dropped them, and then every token of
 * FILE is scored.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "commands.h"
#include "interrupt.h"
#include "json.h"
#include "prompt.h"
#include "report.h"

typedef struct perplexity_options {
    char *given;
    bool json, positions;
} perplexity_options;

static const arg_row perplexity_rows[] = {
    { "--json", 'j', NULL, ARG_FLAG, offsetof(perplexity_options, json), NULL, 0, 0, NULL,
      "print a JSON object" },
    { "--positions", 0, NULL, ARG_FLAG, offsetof(perplexity_options, positions), NULL, 0, 0, NULL,
      "also a line per position: position, token, log-probability of the next token, the five most likely "
      "next "
      "tokens as id:log-probability" },
    { "--given", 0, "FILE", ARG_TEXT, offsetof(perplexity_options, given), NULL, 0, 0, NULL,
      "read this text first, as a prompt; score only what follows it" },
    { 0 },
};

static const arg_command perplexity_command = {
    .name = "perplexity",
    .synopsis = "[-m MODEL] [--json] [-c N] [--given FILE] FILE | -",
    .summary = "measure how well a model predicts a text",
    .details =
        "Prints the mean negative log-likelihood per token (natural logarithm) and its exponential. A text\n"
        "longer than the context is scored in windows of -c tokens, each for itself. With --given nothing is "
        "cut:\n"
        "both texts must fit, and --policy has dropped from the first what it drops after a prompt.",
    .examples = "  kvfold perplexity book.txt\n"
                "  kvfold perplexity -m model.gguf -c 2048 --json book.txt\n"
                "  kvfold perplexity --positions --precision f32 prose.txt\n"
                "  kvfold perplexity --policy snapkv --given chapters.txt next-page.txt",
    .operand = "One file at a time.",
    .max_operands = 1,
};

typedef struct run {
    perplexity_options o;
    engine_options eo;
    engine e;
    token_list given, text;
    kvf_score *scores; /* [n_ctx], or [text] after a given one */
    double nll;        /* sum */
    int64_t n_scored;
} run;

/* Natural-log probabilities of the five most likely entries of a logits row. */
static void top_of(const float *logits, int32_t n, kvf_score *out)
{
    double max = logits[0], sum = 0;
    for (int32_t i = 0; i < n; i++)
        if ((double)logits[i] > max) max = logits[i];
    for (int32_t i = 0; i < n; i++) sum += exp((double)logits[i] - max);
    memset(out, 0, sizeof *out);
    for (int k = 0; k < 5; k++) {
        int32_t best = -1;
        for (int32_t i = 0; i < n; i++) {
            bool taken = false;
            for (int j = 0; j < k; j++) taken = taken || out->top[j] == i;
            if (!taken && (best < 0 || logits[i] > logits[best])) best = i;
        }
        if (best < 0) return;
        out->top[k] = best;
        out->top_logprob[k] = (float)((double)logits[best] - max - log(sum));
    }
}

static void print_position(int64_t pos, kvf_token token, const kvf_score *next, bool last)
{
    printf("%" PRId64 " %" PRId32 " %.5f", pos, token, last ? 0.0 : (double)next->logprob);
    for (int k = 0; k < 5; k++) printf(" %" PRId32 ":%.5f", next->top[k], (double)next->top_logprob[k]);
    putchar('\n');
}

/* Score one window; first: position of its first token in the text. Its first token is scored only if
 * something was given before it. */
static kvf_status score_window(run *r, const kvf_token *tokens, int64_t n, int64_t first, kvf_error *err)
{
    engine *e = &r->e;
    interrupt_attach(e->session);
    kvf_status rc = kvf_session_score(e->session, tokens, n, r->scores, err);
    if (rc != KVF_OK) return rc;
    int64_t begin = r->given.n ? 0 : 1;
    for (int64_t i = begin; i < n; i++) r->nll -= (double)r->scores[i].logprob;
    r->n_scored += n - begin;
    if (!r->o.positions) return KVF_OK;
    for (int64_t i = 0; i + 1 < n; i++) print_position(first + i, tokens[i], &r->scores[i + 1], false);
    float *logits = NULL;
    rc = kvf_session_logits(e->session, &logits, err);
    if (rc != KVF_OK) return rc;
    kvf_score last;
    top_of(logits, e->info.n_vocab, &last);
    print_position(first + n - 1, tokens[n - 1], &last, true);
    return KVF_OK;
}

/* Windows of n_ctx tokens; the first includes the text's own BOS. */
static kvf_status score_all(run *r, kvf_error *err)
{
    engine *e = &r->e;
    int64_t n = r->text.n, width = e->n_ctx < n ? e->n_ctx : n;
    bool bos = n && e->info.add_bos && r->text.v[0] == e->info.bos;
    r->scores = calloc((size_t)width, sizeof *r->scores);
    kvf_token *window = malloc((size_t)width * sizeof *window);
    kvf_status rc = KVF_OK;
    if (!r->scores || !window)
        rc = report_fail(err, KVF_ERR_NOMEM, "Not enough memory for %lld scores.", (long long)width);
    progress_start(&e->bar, "Scoring", e->quiet || (r->o.positions && report_is_terminal(stdout)));
    for (int64_t at = 0; at < n && rc == KVF_OK;) {
        int64_t head = at && bos, take = n - at < width - head ? n - at : width - head;
        if (take + head < 2) break; /* one token alone predicts nothing */
        if (head) window[0] = e->info.bos;
        memcpy(window + head, r->text.v + at, (size_t)take * sizeof *window);
        /* A new session instead of a rewind: nothing of the last window can be left over. */
        if (at) {
            engine_close_session(e);
            rc = engine_open_session(e, &r->eo, NULL, err);
        }
        if (rc == KVF_OK) rc = score_window(r, window, take + head, at - head, err);
        at += take;
    }
    progress_clear(&e->bar);
    free(window);
    return rc;
}

/* The given text as a prompt, then all of the other. */
static kvf_status score_after(run *r, kvf_error *err)
{
    engine *e = &r->e;
    if (r->given.n + r->text.n > e->n_ctx)
        return report_fail(
            err, KVF_ERR_LIMIT,
            "The two texts have %lld tokens, the context holds %lld; shorten --given or give -c.",
            (long long)(r->given.n + r->text.n), (long long)e->n_ctx);
    r->scores = calloc((size_t)r->text.n, sizeof *r->scores);
    if (!r->scores)
        return report_fail(err, KVF_ERR_NOMEM, "Not enough memory for %lld scores.", (long long)r->text.n);
    progress_start(&e->bar, "Scoring", e->quiet || (r->o.positions && report_is_terminal(stdout)));
    interrupt_attach(e->session);
    kvf_status rc = kvf_session_sync(e->session, r->given.v, r->given.n, err);
    if (rc == KVF_OK) rc = score_window(r, r->text.v, r->text.n, r->given.n, err);
    progress_clear(&e->bar);
    return rc;
}

static kvf_status print_result(const run *r, kvf_error *err)
{
    double mean = r->nll / (double)r->n_scored;
    if (!r->o.json) {
        if (r->o.positions)
            printf("# mean_nll %.6f over %" PRId64 "\n", mean, r->n_scored);
        else
            printf("tokens      %" PRId64 "\nscored      %" PRId64 "\nmean_nll    %.6f\nperplexity  %.4f\n",
                   r->text.n, r->n_scored, mean, exp(mean));
        return KVF_OK;
    }
    kvf_stats stats = { .size = sizeof stats };
    kvf_session_stats(r->e.session, &stats, NULL);
    cJSON *o = cJSON_CreateObject();
    json_int(o, "n_given", r->given.n);
    json_int(o, "n_tokens", r->text.n);
    json_int(o, "n_scored", r->n_scored);
    json_real(o, "mean_nll", mean);
    json_real(o, "perplexity", exp(mean));
    json_int(o, "n_ctx", r->e.n_ctx);
    json_text(o, "cpu", stats.cpu, (size_t)-1);
    json_text(o, "kernels", stats.kernels, (size_t)-1);
    json_text(o, "policy", stats.policy, (size_t)-1);
    return json_print(o) ? KVF_OK : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

static kvf_status tokens_of(run *r, const char *path, int flags, token_list *out, kvf_error *err)
{
    buffer text = { .max = DOC_LIMIT };
    kvf_status rc = buffer_read_file(&text, path, err);
    if (rc == KVF_OK)
        rc = prompt_tokenize(out, r->e.model, buffer_text(&text), text.n, flags | KVF_TOKENIZE_SPECIAL, err);
    buffer_free(&text);
    return rc;
}

static kvf_status read_texts(run *r, const char *path, kvf_error *err)
{
    kvf_status rc = KVF_OK;
    if (r->o.given) rc = tokens_of(r, r->o.given, KVF_TOKENIZE_BOS, &r->given, err);
    if (rc == KVF_OK && r->o.given && !r->given.n)
        rc = report_fail(err, KVF_ERR_ARG, "The text of --given is empty; leave the option out.");
    if (rc == KVF_OK) rc = tokens_of(r, path, r->o.given ? 0 : KVF_TOKENIZE_BOS, &r->text, err);
    if (rc == KVF_OK && r->o.given && !r->text.n)
        rc = report_fail(err, KVF_ERR_ARG, "The text after --given is empty; there is nothing to score.");
    return rc;
}

static kvf_status perplexity_run(run *r, const char *path, kvf_error *err)
{
    kvf_status rc = engine_open(&r->e, &r->eo, err);
    if (rc == KVF_OK) rc = read_texts(r, path, err);
    if (rc == KVF_OK && !r->given.n && r->text.n < 2)
        rc = report_fail(err, KVF_ERR_ARG, "The text has %lld tokens; at least 2 are needed to predict one.",
                         (long long)r->text.n);
    if (rc == KVF_OK && r->eo.ctx == 1) rc = report_fail(err, KVF_ERR_ARG, "--ctx must be at least 2 here.");
    if (rc == KVF_OK) rc = engine_open_session(&r->e, &r->eo, NULL, err);
    if (rc == KVF_OK) rc = r->given.n ? score_after(r, err) : score_all(r, err);
    if (rc == KVF_OK) rc = print_result(r, err);
    return rc;
}

int cmd_perplexity(int argc, char **argv)
{
    run r;
    memset(&r, 0, sizeof r);
    arg_group groups[] = { { "Options", perplexity_rows, &r.o },
                           { "Model", engine_model_rows, &r.eo },
                           { "Memory", engine_session_rows, &r.eo },
                           { NULL, NULL, NULL } };
    arg_texts operands = { 0 };
    arg_result parsed = args_parse(&perplexity_command, groups, argc, argv, &operands);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;
    kvf_error err = { 0 };
    int code;
    if (!operands.n && report_is_terminal(stdin)) {
        report_error("There is no text; name a file, or - for standard input.");
        code = EXIT_USAGE;
    } else if (r.o.given && strcmp(r.o.given, "-") == 0 && strcmp(operands.n ? operands.v[0] : "-", "-") == 0) {
        report_error("Only one of the two texts can come from standard input; name a file for the other.");
        code = EXIT_USAGE;
    } else {
        kvf_status rc = perplexity_run(&r, operands.n ? operands.v[0] : "-", &err);
        code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    }
    engine_close(&r.e);
    token_list_free(&r.given);
    token_list_free(&r.text);
    free(r.scores);
    args_free(groups, &operands);
    return code;
}
