/* cmd_perplexity.c - kvfold perplexity: how well a model predicts a text.
 *
 * The text is tokenised with the model's BOS rule and control tokens read. The first token is
 * given, every other one is scored. A text longer than the context is cut into windows of that
 * many tokens that do not overlap; each begins with BOS if the model's rule says so, and its first
 * token of text is scored only if there is a BOS before it.
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
    bool json, positions;
} perplexity_options;

static const arg_row perplexity_rows[] = {
    { "--json", 'j', NULL, ARG_FLAG, offsetof(perplexity_options, json), NULL, 0, 0, NULL,
      "print a JSON object" },
    { "--positions", 0, NULL, ARG_FLAG, offsetof(perplexity_options, positions), NULL, 0, 0, NULL,
      "also a line per position: position, token, log-probability of the next token, the five most likely "
      "next "
      "tokens as id:log-probability" },
    { 0 },
};

static const arg_command perplexity_command = {
    .name = "perplexity",
    .synopsis = "[-m MODEL] [--json] [-c N] FILE | -",
    .summary = "measure how well a model predicts a text",
    .details =
        "Prints the mean negative log-likelihood per token (natural logarithm) and its exponential. A text\n"
        "longer than the context is scored in windows of -c tokens, each for itself.",
    .examples = "  kvfold perplexity book.txt\n"
                "  kvfold perplexity -m model.gguf -c 2048 --json book.txt\n"
                "  kvfold perplexity --positions --precision f32 prose.txt",
    .operand = "One file at a time.",
    .max_operands = 1,
};

typedef struct run {
    perplexity_options o;
    engine_options eo;
    engine e;
    token_list text;
    kvf_score *scores; /* [n_ctx] */
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

/* Score one window; first: position of its first token in the text. */
static kvf_status score_window(run *r, const kvf_token *tokens, int64_t n, int64_t first, kvf_error *err)
{
    engine *e = &r->e;
    interrupt_attach(e->session);
    kvf_status rc = kvf_session_score(e->session, tokens, n, r->scores, err);
    if (rc != KVF_OK) return rc;
    for (int64_t i = 1; i < n; i++) r->nll -= (double)r->scores[i].logprob;
    r->n_scored += n - 1;
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
    json_int(o, "n_tokens", r->text.n);
    json_int(o, "n_scored", r->n_scored);
    json_real(o, "mean_nll", mean);
    json_real(o, "perplexity", exp(mean));
    json_int(o, "n_ctx", r->e.n_ctx);
    json_text(o, "cpu", stats.cpu, (size_t)-1);
    json_text(o, "kernels", stats.kernels, (size_t)-1);
    return json_print(o) ? KVF_OK : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

static kvf_status perplexity_run(run *r, const char *path, kvf_error *err)
{
    buffer text = { .max = DOC_LIMIT };
    kvf_status rc = buffer_read_file(&text, path, err);
    if (rc == KVF_OK) rc = engine_open(&r->e, &r->eo, err);
    if (rc == KVF_OK)
        rc = prompt_tokenize(&r->text, r->e.model, buffer_text(&text), text.n,
                             KVF_TOKENIZE_BOS | KVF_TOKENIZE_SPECIAL, err);
    buffer_free(&text);
    if (rc == KVF_OK && r->text.n < 2)
        rc = report_fail(err, KVF_ERR_ARG, "The text has %lld tokens; at least 2 are needed to predict one.",
                         (long long)r->text.n);
    if (rc == KVF_OK && r->eo.ctx == 1) rc = report_fail(err, KVF_ERR_ARG, "--ctx must be at least 2 here.");
    if (rc == KVF_OK) rc = engine_open_session(&r->e, &r->eo, NULL, err);
    if (rc == KVF_OK) rc = score_all(r, err);
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
    } else {
        kvf_status rc = perplexity_run(&r, operands.n ? operands.v[0] : "-", &err);
        code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    }
    engine_close(&r.e);
    token_list_free(&r.text);
    free(r.scores);
    args_free(groups, &operands);
    return code;
}
