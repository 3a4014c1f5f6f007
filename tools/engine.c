/* engine.c - see engine.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "interrupt.h"
#include "models.h"
#include "report.h"
#include "store.h"

#define ROW(T, field, name, letter, value, type, def, min, max, help)                                        \
    {                                                                                                        \
        name, letter, value, type, offsetof(T, field), def, min, max, NULL, help                             \
    }
#define CHOICE(T, field, name, letter, value, def, choices, help)                                            \
    {                                                                                                        \
        name, letter, value, ARG_CHOICE, offsetof(T, field), def, 0, 0, choices, help                        \
    }

const arg_row engine_model_rows[] = {
    ROW(engine_options, model, "--model", 'm', "MODEL", ARG_TEXT, MODELS_DEFAULT, 0, 0,
        "path of a GGUF file, or the name of a known model; the known ones are fetched when you agree"),
    ROW(engine_options, threads, "--threads", 't', "N", ARG_INT, NULL, 0, 1024,
        "threads; 0: one per usable core (default)"),
    CHOICE(engine_options, device, "--device", 0, "NAME", "cpu", "cpu|cuda|auto",
           "cpu; cuda; auto: cuda if there is one (kvfold inspect --devices)"),
    CHOICE(engine_options, cpu, "--cpu", 0, "LEVEL", NULL, "auto|ref|avx2|avx512|amx",
           "highest instruction set to use: auto, ref, avx2, avx512, amx (default: $KVFOLD_CPU, or auto)"),
    CHOICE(engine_options, precision, "--precision", 0, "KIND", "auto", "auto|f32",
           "auto: the fastest arithmetic within the documented error; f32: single precision, slow"),
    ROW(engine_options, yes, "--yes", 'y', NULL, ARG_FLAG, NULL, 0, 0,
        "fetch a missing known model without asking"),
    ROW(engine_options, quiet, "--quiet", 0, NULL, ARG_FLAG, NULL, 0, 0,
        "no progress bar, no notes, no summary"),
    ROW(engine_options, verbose, "--verbose", 'v', NULL, ARG_FLAG, NULL, 0, 0, "say more on standard error"),
    { 0 },
};

const arg_row engine_session_rows[] = {
    ROW(engine_options, ctx, "--ctx", 'c', "N", ARG_INT, NULL, 0, 1 << 30,
        "most tokens held at once; 0: what the model was trained for (default)"),
    ROW(engine_options, batch, "--batch", 'b', "N", ARG_INT, NULL, 0, 65536,
        "tokens computed together while reading; 0: the best for this processor (default)"),
    ROW(engine_options, policy, "--policy", 0, "SPEC", ARG_TEXT, NULL, 0, 0,
        "what attention reads (default: full, everything; with a store infllm, the recent tokens and the "
        "passages that matter). kvfold inspect --policies lists them; infllm+lazyllm joins two"),
    ROW(engine_options, memory, "--memory", 0, "SIZE", ARG_SIZE, NULL, 0, 4e18,
        "most memory for keys and values, as 800M or 2G; 0: as much as --ctx needs; with a store 1G, or "
        "what one token reads if that is more (default)"),
    ROW(engine_options, host_share, "--host-share", 0, "N", ARG_INT, "0", 0, 100,
        "with --device cuda and a store: percent of the blocks missing on the device that the CPU reads in "
        "place; not while citing"),
    { 0 },
};

const arg_row engine_sampling_rows[] = {
    ROW(sampling_options, max_tokens, "--max-tokens", 'n', "N", ARG_INT, "256", 1, 1 << 30,
        "longest answer, in tokens"),
    ROW(sampling_options, ignore_eos, "--ignore-eos", 0, NULL, ARG_FLAG, NULL, 0, 0,
        "go on after the end of the answer, up to --max-tokens"),
    ROW(sampling_options, temp, "--temp", 0, "X", ARG_REAL, "0", 0, 100,
        "0: always the most likely token; higher: more varied"),
    ROW(sampling_options, top_k, "--top-k", 0, "N", ARG_INT, "40", 0, 1 << 30,
        "choose among the N most likely; 0: all"),
    ROW(sampling_options, top_p, "--top-p", 0, "X", ARG_REAL, "0.95", 0, 1,
        "choose among the smallest set with this probability"),
    ROW(sampling_options, min_p, "--min-p", 0, "X", ARG_REAL, "0.05", 0, 1,
        "drop tokens this much less likely than the best"),
    ROW(sampling_options, repeat_penalty, "--repeat-penalty", 0, "X", ARG_REAL, "1", 0.01, 100,
        "above 1: avoid recent tokens"),
    ROW(sampling_options, repeat_last_n, "--repeat-last-n", 0, "N", ARG_INT, "64", -1, 1 << 30,
        "how many tokens are recent; -1: all"),
    ROW(sampling_options, seed, "--seed", 0, "N", ARG_INT, "0", 0, 9007199254740992.0,
        "same seed, same text"),
    { 0 },
};

static void on_log(void *user, kvf_log_level level, const char *text)
{
    const engine *e = user;
    if (level == KVF_LOG_DEBUG || e->quiet) return;
    report_note("%s", text);
}

kvf_status engine_open(engine *e, const engine_options *o, kvf_error *err)
{
    memset(e, 0, sizeof *e);
    e->quiet = o->quiet;
    char path[4096];
    kvf_status rc = models_path(path, sizeof path, o->model, o->yes, err);
    if (rc != KVF_OK) return rc;

    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = (int32_t)o->threads;
    p.device = o->device;
    p.cpu = o->cpu ? o->cpu : getenv("KVFOLD_CPU");
    if (p.cpu && !*p.cpu) p.cpu = NULL;
    p.precision = strcmp(o->precision, "f32") == 0 ? KVF_PRECISION_F32 : KVF_PRECISION_AUTO;
    if (o->verbose) p.log = on_log;
    p.user = e;
    rc = kvf_ctx_open(&e->ctx, &p, err);
    if (rc == KVF_OK) rc = kvf_model_open(&e->model, e->ctx, path, err);
    e->info.size = sizeof e->info;
    if (rc == KVF_OK) rc = kvf_model_get_info(e->model, &e->info, err);
    if (rc != KVF_OK) engine_close(e);
    return rc;
}

static int on_progress(void *user, int64_t done, int64_t total)
{
    engine *e = user;
    if (e->folder && progress_due(&e->bar, done, total)) e->bar.bytes = store_disk_bytes(e->folder);
    progress_update(&e->bar, done, total);
    return interrupt_seen();
}

/* Is the policy among those that the spec joins by '+'? */
static bool spec_names(const char *spec, const char *name)
{
    size_t n = strlen(name);
    for (const char *at = spec; at; at = strchr(at, '+')) {
        at += *at == '+';
        if (strncmp(at, name, n) == 0 && strchr(":+", at[n])) return true;
    }
    return false;
}

bool engine_has_memory(const char *policy) { return policy && spec_names(policy, STORE_POLICY); }

bool engine_can_store(const char *policy)
{
    return engine_has_memory(policy) && !spec_names(policy, PRUNE_POLICY) && !spec_names(policy, "holitom");
}

kvf_status engine_open_session(engine *e, const engine_options *o, const sampling_options *sampling,
                               kvf_error *err)
{
    kvf_session_params p;
    kvf_session_params_init(&p);
    p.n_ctx = o->ctx;
    p.n_batch = o->batch;
    p.kv_bytes = (size_t)o->memory;
    if (o->policy) p.policy = o->policy;
    p.passages = o->passages;
    p.host_share = (int32_t)o->host_share;
    p.progress = on_progress;
    p.user = e;
    if (sampling) {
        p.sampling.temperature = (float)sampling->temp;
        p.sampling.top_k = (int32_t)sampling->top_k;
        p.sampling.top_p = (float)sampling->top_p;
        p.sampling.min_p = (float)sampling->min_p;
        p.sampling.repeat_penalty = (float)sampling->repeat_penalty;
        p.sampling.repeat_last_n = (int32_t)sampling->repeat_last_n;
        p.sampling.seed = (uint64_t)sampling->seed;
    }
    bool any_length = engine_has_memory(o->policy);
    e->n_ctx = o->ctx ? o->ctx : any_length ? INT64_MAX : e->info.n_ctx_train;
    if (!any_length && e->n_ctx > e->info.n_ctx_train && e->info.n_ctx_train > 0 && !o->quiet)
        report_note(
            "--ctx %lld is more than the %lld tokens this model was trained for; answers get worse past "
            "them.",
            (long long)e->n_ctx, (long long)e->info.n_ctx_train);
    if (o->host_share > 0 && !o->quiet && (!any_length || (o->device && strcmp(o->device, "cpu") == 0)))
        report_note("--host-share changes nothing %s.",
                    any_length ? "without --device cuda" : "without a store or a policy with a memory (infllm)");
    kvf_status rc = kvf_session_open(&e->session, e->model, &p, err);
    if (rc == KVF_OK) interrupt_attach(e->session);
    return rc;
}

void engine_close_session(engine *e)
{
    interrupt_attach(NULL);
    kvf_session_close(e->session);
    e->session = NULL;
}

void engine_close(engine *e)
{
    progress_clear(&e->bar);
    engine_close_session(e);
    kvf_model_close(e->model);
    kvf_ctx_close(e->ctx);
    e->model = NULL;
    e->ctx = NULL;
}

void engine_list_policies(void)
{
    const char *help = "", *name;
    for (int64_t i = 0; (name = kvf_policy_name(i, &help)) != NULL; i++) printf("%-12s %s\n", name, help);
}

int64_t engine_peak_rss(void)
{
    /* VmHWM, not ru_maxrss: the latter keeps the figure of whatever ran before exec. */
    FILE *f = fopen("/proc/self/status", "r");
    long long kib = 0;
    char line[256];
    while (f && fgets(line, sizeof line, f)) {
        int64_t v;
        char digits[32];
        if (sscanf(line, "VmHWM: %31[0-9]", digits) == 1 && args_int(digits, &v)) kib = v;
    }
    if (f) fclose(f);
    struct rusage u;
    if (!kib && getrusage(RUSAGE_SELF, &u) == 0) kib = u.ru_maxrss;
    return kib * 1024;
}
