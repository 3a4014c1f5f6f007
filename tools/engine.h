/* engine.h - what every command that runs a model shares: options, context, model, session.
 *
 * The commands see one struct; opening goes ctx, model, session, closing the other way round.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_ENGINE_H
#define KVFOLD_TOOLS_ENGINE_H

#include <stdbool.h>

#include <kvfold/kvfold.h>

#include "args.h"
#include "progress.h"

typedef struct engine_options {
    const char *model, *device, *cpu, *precision, *policy;
    int64_t threads, batch, ctx, memory, host_share;
    bool yes, quiet, verbose;
    bool passages; /* note where attention goes; set by commands that cite */
} engine_options;

typedef struct sampling_options {
    double temp, top_p, min_p, repeat_penalty;
    int64_t top_k, repeat_last_n, seed, max_tokens;
    bool ignore_eos;
} sampling_options;

extern const arg_row engine_model_rows[];    /* -m -t --cpu --precision --yes --quiet --verbose */
extern const arg_row engine_session_rows[];  /* -c -b --policy --memory --host-share */
extern const arg_row engine_sampling_rows[]; /* of sampling_options */

typedef struct engine {
    kvf_ctx *ctx;
    kvf_model *model;
    kvf_session *session;
    kvf_model_info info;
    int64_t n_ctx; /* tokens the session may hold; INT64_MAX: no limit */
    const char *folder; /* of the store that is being written, for the bar; NULL: none */
    progress bar;
    bool quiet;
} engine;

/* Start the context and open the model. The default of --cpu is the environment's KVFOLD_CPU. */
kvf_status engine_open(engine *e, const engine_options *o, kvf_error *err);

/* How one question on one text is read when it fits the context. */
#define PRUNE_POLICY "lazyllm"

/* True if sessions with this policy look up what they read: any length fits. */
bool engine_has_memory(const char *policy);

/* True if what they read can be kept in a store: it does not hang on the question. */
bool engine_can_store(const char *policy);

/* Open the session with o->policy, NULL: full attention; sampling NULL: greedy. A signal stops it from now on. */
kvf_status engine_open_session(engine *e, const engine_options *o, const sampling_options *sampling,
                               kvf_error *err);

/* Close the session, or everything. */
void engine_close_session(engine *e);
void engine_close(engine *e);

/* Print the names of the policies. */
void engine_list_policies(void);

/* Most memory the process has had, in bytes; 0 if the system does not say. */
int64_t engine_peak_rss(void);

#endif
