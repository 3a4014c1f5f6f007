/* cmd_video.c - kvfold video: a clip becomes the few tokens that a planner keeps of it.
 *
 * The way: frames (video_decode.c) -> tokens (video_encode.c, or a file) -> plan and merged tokens
 * (kvfold/merge.h) -> files (video_output.c) and a page to look at (video_report.c).
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "commands.h"
#include "engine.h"
#include "json.h"
#include "report.h"
#include "storm.h"
#include "video_output.h"
#include "video_report.h"
#include "video_stream.h"

typedef struct video_options {
    const char *mmproj, *from, *features, *scores, *newline, *pool;
    const char *merge, *positions, *type, *out, *report, *device, *cpu;
    int64_t frames, grid, threads, hold;
    double fps, start, end;
    bool json, quality, quiet, list, stream;
} video_options;

#define ROW(field, name, letter, value, type, min, max, help)                                                \
    {                                                                                                        \
        name, letter, value, type, offsetof(video_options, field), NULL, min, max, NULL, help                \
    }
#define CHOICE(field, name, value, def, choices, help)                                                       \
    {                                                                                                        \
        name, 0, value, ARG_CHOICE, offsetof(video_options, field), def, 0, 0, choices, help                 \
    }

static const arg_row video_rows[] = {
    ROW(out, "--output", 'o', "OUT", ARG_TEXT, 0, 0,
        "write OUT.safetensors, OUT.tokens.npy and OUT.meta.npy"),
    ROW(report, "--report", 'r', "FILE", ARG_TEXT, 0, 0, "write an HTML page that shows what was kept"),
    ROW(json, "--json", 'j', NULL, ARG_FLAG, 0, 0, "print a JSON object"),
    ROW(quality, "--quality", 0, NULL, ARG_FLAG, 0, 0,
        "measure how far the tokens are from what is left of them"),
    ROW(list, "--list-planners", 0, NULL, ARG_FLAG, 0, 0, "show the planners and their options"),
    ROW(quiet, "--quiet", 0, NULL, ARG_FLAG, 0, 0, "no progress bar, no notes, no summary"),
    { 0 },
};

static const arg_row frame_rows[] = {
    ROW(frames, "--frames", 0, "N", ARG_INT, 1, FRAME_CHOICE_MAX,
        "frames spread evenly over the clip (default: 32)"),
    ROW(fps, "--fps", 0, "F", ARG_REAL, 1e-6, 1000, "instead: frames per second of the clip"),
    ROW(start, "--start", 0, "S", ARG_REAL, 0, 1e9, "begin at this second"),
    ROW(end, "--end", 0, "S", ARG_REAL, 0, 1e9, "end before this second"),
    { 0 },
};

static const arg_row token_rows[] = {
    ROW(mmproj, "--mmproj", 0, "FILE", ARG_TEXT, 0, 0,
        "GGUF file of a vision tower and its projector; scores are its attention"),
    CHOICE(pool, "--pool", "KIND", "auto", "auto|none|bilinear|average|max",
           "2 x 2 pooling behind the tower: auto, none, bilinear, average, max. auto: bilinear for a "
           "LLaVA-OneVision tower, "
           "none for others"),
    ROW(features, "--features", 0, "FILE", ARG_TEXT, 0, 0,
        "tokens from elsewhere, [T, N, D] as .npy or .safetensors; a clip is then only looked at for "
        "--report"),
    CHOICE(
        from, "--features-from", "KIND", NULL, "dctctx",
        "dctctx: training-free features, to measure redundancy without a model; no model understands them"),
    ROW(scores, "--scores", 0, "FILE", ARG_TEXT, 0, 0,
        "how much a token matters, [T, N] (default: the tower's attention, or a substitute)"),
    ROW(newline, "--newline", 0, "FILE", ARG_TEXT, 0, 0,
        "newline embedding, [D], for plans that have newlines (default: the tower's)"),
    ROW(grid, "--grid", 0, "W", ARG_INT, 1, 65536, "tokens in a row of a frame (default: square)"),
    { 0 },
};

static const arg_row plan_rows[] = {
    { "--merge", 0, "SPEC", ARG_TEXT, offsetof(video_options, merge), "holitom:tau=0.8,ratio=0.1", 0, 0, NULL,
      "planner and its options; --list-planners lists them" },
    ROW(stream, "--stream", 0, NULL, ARG_FLAG, 0, 0,
        "plan while frames come in, in bounded memory: for long videos; budgets are per segment"),
    { "--hold", 0, "N", ARG_INT, offsetof(video_options, hold), "64", 2, 65536, NULL,
      "with --stream: most frames that wait for their segment to end" },
    CHOICE(
        positions, "--positions", "KIND", "compact", "compact|keep",
        "compact: 0, 1, 2, ... as if the video had so few tokens; keep: where each stood in the whole video"),
    CHOICE(type, "--type", "TYPE", "f32", "f32|f16|bf16",
           "elements of the embeddings that are written: f32, f16, bf16"),
    ROW(threads, "--threads", 't', "N", ARG_INT, 0, 1024, "threads; 0: one per usable core (default)"),
    CHOICE(device, "--device", "NAME", "cpu", "cpu|cuda|auto",
           "what the tower runs on: cpu; cuda; auto: cuda if there is one (kvfold inspect --devices)"),
    CHOICE(cpu, "--cpu", "LEVEL", NULL, "auto|ref|avx2|avx512|amx",
           "highest instruction set to use: auto, ref, avx2, avx512, amx (default: $KVFOLD_CPU, or auto)"),
    { 0 },
};

static const arg_command video_command = {
    .name = "video",
    .synopsis = "[CLIP] [--mmproj FILE | --features FILE | --features-from dctctx] [options]",
    .summary = "turn a video into the few tokens that matter",
    .details = "Frames of CLIP become tokens through a vision tower (--mmproj); or tokens are read from a "
               "file, or made\n"
               "without a model to measure how much a video repeats itself. A planner drops and merges what "
               "is said\n"
               "already; the rest is written for a language model to read.",
    .examples = "  kvfold video clip.mp4 --features-from dctctx --report clip.html\n"
                "  kvfold video clip.mp4 --mmproj mmproj.gguf --merge holitom:ratio=0.15 -o clip\n"
                "  kvfold video --features f.npy --scores a.npy --merge holitom:mode=official -o out --json\n"
                "  kvfold video --list-planners",
    .operand = "One clip at a time.",
    .max_operands = 1,
};

typedef struct run {
    video_options o;
    const char *clip; /* or NULL */
    kvf_ctx *ctx;
    kvf_merge *merge;
    storm storm;
    video_stream *stream; /* with --stream */
    video_tokens tokens;
    kvf_merge_plan *plan;
    video_result result;
    kvf_merge_quality quality;
    double seconds;
} run;

/* ---- Planners ------------------------------------------------------------------------------ */

static void print_option(const kvf_merge_option_info *o)
{
    if (o->words) { /* the default is the def-th word */
        const char *word = o->words;
        for (int i = 0; i < (int)o->def; i++) word += strcspn(word, "|") + 1;
        printf("  %-10s %s (%s; default %.*s)\n", o->name, o->help, o->words, (int)strcspn(word, "|"), word);
    } else {
        printf("  %-10s %s (%g to %g; default %g)\n", o->name, o->help, o->min, o->max, o->def);
    }
}

static const char storm_help[] = "STORM's temporal layers from your weights, in front of another planner";
static const char storm_source[] = "Jiang et al. 2025, STORM, arXiv:2503.04130";

static void list_text(void)
{
    kvf_merge_method_info m = { .size = sizeof m };
    for (int64_t i = 0; kvf_merge_method(i, &m) == KVF_OK; i++) {
        printf("%s%s: %s\n", i ? "\n" : "", m.name, m.help);
        if (*m.source) printf("  %s\n", m.source);
        kvf_merge_option_info o = { .size = sizeof o };
        for (int64_t j = 0; kvf_merge_option(i, j, &o) == KVF_OK; j++) print_option(&o);
    }
    printf("\nstorm: %s\n  %s\n  %-10s %s\n  %-10s %s\n", storm_help, storm_source, "weights",
           "file of Mamba layers, .safetensors or .gguf", "eps", "of the norms (default 1e-5)");
}

static kvf_status list_json(kvf_error *err)
{
    cJSON *root = cJSON_CreateObject();
    cJSON *list = json_array(root, "planners");
    kvf_merge_method_info m = { .size = sizeof m };
    for (int64_t i = 0; kvf_merge_method(i, &m) == KVF_OK; i++) {
        cJSON *method = json_object(list, NULL);
        json_text(method, "name", m.name, (size_t)-1);
        json_text(method, "help", m.help, (size_t)-1);
        json_text(method, "source", m.source, (size_t)-1);
        cJSON *options = json_array(method, "options");
        kvf_merge_option_info o = { .size = sizeof o };
        for (int64_t j = 0; kvf_merge_option(i, j, &o) == KVF_OK; j++) {
            cJSON *option = json_object(options, NULL);
            json_text(option, "name", o.name, (size_t)-1);
            json_text(option, "help", o.help, (size_t)-1);
            if (o.words) json_text(option, "words", o.words, (size_t)-1);
            json_real(option, "default", o.def);
            json_real(option, "min", o.min);
            json_real(option, "max", o.max);
        }
    }
    cJSON *front = json_object(list, NULL);
    json_text(front, "name", "storm", (size_t)-1);
    json_text(front, "help", storm_help, (size_t)-1);
    json_text(front, "source", storm_source, (size_t)-1);
    json_array(front, "options");
    return json_print(root) ? KVF_OK
                            : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

/* ---- The way ------------------------------------------------------------------------------- */

static kvf_status open_ctx(run *r, kvf_error *err)
{
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = (int32_t)r->o.threads;
    p.device = r->o.device;
    p.cpu = r->o.cpu ? r->o.cpu : getenv("KVFOLD_CPU");
    if (p.cpu && !*p.cpu) p.cpu = NULL;
    kvf_status rc = kvf_ctx_open(&r->ctx, &p, err);
    /* The planner is checked before a minute goes into encoding. */
    if (rc == KVF_OK) rc = storm_open(&r->storm, r->ctx, r->o.merge, err);
    return rc == KVF_OK ? kvf_merge_open(&r->merge, r->ctx, r->storm.rest, err) : rc;
}

static kvf_merge_type type_of(const video_options *o)
{
    return strcmp(o->type, "f16") == 0 ? KVF_MERGE_F16 : strcmp(o->type, "bf16") == 0 ? KVF_MERGE_BF16 : KVF_MERGE_F32;
}

static kvf_status open_stream(run *r, kvf_error *err)
{
    const video_options *o = &r->o;
    if (!o->stream) return KVF_OK;
    if (o->quality)
        return report_fail(err, KVF_ERR_ARG,
                           "--quality compares with the whole video, which --stream does not hold; leave one out.");
    video_stream_options s = { .merge = r->merge,
                               .layers = &r->storm,
                               .out = o->out,
                               .type = type_of(o),
                               .keep = strcmp(o->positions, "keep") == 0,
                               .owners = o->report != NULL,
                               .hold = o->hold };
    return video_stream_open(&r->stream, &s, err);
}

static kvf_status read_tokens(run *r, kvf_error *err)
{
    const video_options *o = &r->o;
    video_source_options s = { .clip = r->clip,
                               .mmproj = o->mmproj,
                               .from = o->from,
                               .features = o->features,
                               .scores = o->scores,
                               .newline = o->newline,
                               .pool = o->pool,
                               .frames = o->frames,
                               .fps = o->fps,
                               .start = o->start,
                               .end = o->end,
                               .grid = o->grid,
                               .thumbnails = o->report != NULL,
                               .quiet = o->quiet,
                               .sink = o->stream ? video_stream_push : NULL,
                               .user = r->stream };
    return video_source_read(&r->tokens, r->ctx, &s, err);
}

static kvf_status make_plan(run *r, kvf_error *err)
{
    kvf_merge_input in;
    kvf_merge_input_init(&in);
    in.features = video_tokens_view(&r->tokens);
    in.scores = r->tokens.scores;
    in.grid_w = r->tokens.grid_w;
    kvf_status rc = kvf_merge_plan_make(&r->plan, r->merge, &in, err);
    if (rc == KVF_OK)
        rc = video_result_make(&r->result, r->plan, &r->tokens, type_of(&r->o),
                               strcmp(r->o.positions, "keep") == 0, err);
    r->quality.size = sizeof r->quality;
    if (rc == KVF_OK && r->o.quality) rc = kvf_merge_plan_quality(r->plan, &in.features, &r->quality, err);
    return rc;
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static kvf_status write_report(run *r, kvf_error *err)
{
    int64_t n = r->tokens.n_frame * r->tokens.n_tok;
    int32_t *owner = r->stream ? NULL : malloc((size_t)n * sizeof *owner);
    kvf_status rc = r->stream ? KVF_OK
                    : owner   ? kvf_merge_plan_owners(r->plan, owner, err)
                              : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the page.");
    video_page page = { .title = base_name(r->clip ? r->clip : r->o.features),
                        .tokens = &r->tokens,
                        .plan = &r->result.info,
                        .owner = r->stream ? video_stream_owners(r->stream) : owner,
                        .quality = r->o.quality ? &r->quality : NULL };
    if (rc == KVF_OK) rc = video_report_write(r->o.report, &page, err);
    free(owner);
    return rc;
}

/* ---- What is said about it ------------------------------------------------------------------ */

static void say_notes(const run *r)
{
    const video_tokens *t = &r->tokens;
    const kvf_merge_plan_info *p = &r->result.info;
    video_tokens_note(t, r->o.frames);
    if (r->stream && p->n_forced)
        report_note("%" PRId64 " segments were ended because --hold %" PRId64 " frames waited; raise it for longer ones",
                    p->n_forced, r->o.hold);
    if (strcmp(p->scores, "given") != 0 && strcmp(p->scores, "none") != 0)
        report_note("there are no scores; instead: %s", p->scores);
}

static void say_summary(const run *r)
{
    const kvf_merge_plan_info *p = &r->result.info;
    char in[32], out[32];
    int64_t n = p->n_frame * p->n_tok;
    printf("%" PRId64 " frame%s, %s tokens -> %s (%.1f %%), %" PRId64 " segment%s", p->n_frame,
           p->n_frame == 1 ? "" : "s", report_count(in, n), report_count(out, p->n_out),
           100 * (double)p->n_out / (double)n, p->n_segment, p->n_segment == 1 ? "" : "s");
    printf("; decoded in %.2f s, encoded in %.2f s, planned in %.1f ms\n", r->tokens.decode_s,
           r->tokens.encode_s, p->plan_ms);
    if (r->o.quality)
        printf("distance to the nearest token kept: %.4f (1 - cosine, mean; 95 %% are below %.4f), squared "
               "error %.4f\n",
               r->quality.nearest_mean, r->quality.nearest_p95, r->quality.squared_error);
}

static void json_clip(const run *r, cJSON *root)
{
    const video_tokens *t = &r->tokens;
    if (!t->is_clip) return;
    cJSON *o = json_object(root, "clip");
    json_text(o, "path", r->clip, (size_t)-1);
    json_text(o, "container", t->clip.container, (size_t)-1);
    json_text(o, "codec", t->clip.codec, (size_t)-1);
    json_int(o, "width", t->clip.width);
    json_int(o, "height", t->clip.height);
    json_int(o, "rotation", t->clip.rotation);
    json_int(o, "n_frames", t->clip.n_frames);
    json_real(o, "seconds", t->clip.seconds);
    json_real(o, "fps", t->clip.fps);
    json_bool(o, "damaged", t->clip.damaged);
    json_int(o, "n_missing", t->outcome.n_missing);
    json_int(o, "n_damaged", t->outcome.n_damaged);
    cJSON *times = json_array(o, "times");
    for (int64_t i = 0; i < t->n_frame; i++) json_real(times, NULL, t->time[i]);
}

static void json_plan(const run *r, cJSON *root)
{
    const kvf_merge_plan_info *p = &r->result.info;
    cJSON *o = json_object(root, "plan");
    json_text(o, "spec", p->spec, (size_t)-1);
    if (r->tokens.storm[0]) json_text(o, "storm", r->tokens.storm, (size_t)-1);
    json_text(o, "scores", p->scores, (size_t)-1);
    json_bool(o, "streamed", r->stream != NULL);
    if (r->stream) json_int(o, "n_forced", p->n_forced);
    json_int(o, "n_in", p->n_frame * p->n_tok);
    json_int(o, "n_out", p->n_out);
    json_int(o, "n_asked", p->n_asked);
    json_int(o, "n_merged", p->n_merged);
    json_int(o, "n_copied", p->n_copied);
    json_int(o, "n_newline", p->n_newline);
    json_int(o, "n_used", p->n_used);
    json_int(o, "n_segments", p->n_segment);
    json_int(o, "total_reduced", p->total_reduced);
    json_real(o, "retain_eff", p->retain_eff);
    json_text(o, "cpu", p->cpu, (size_t)-1);
    json_real(o, "similarity_ms", p->similarity_ms);
    json_real(o, "plan_ms", p->plan_ms);
    cJSON *segments = json_array(o, "segments");
    for (int64_t i = 0; i < p->n_segment; i++) {
        cJSON *s = json_object(segments, NULL);
        json_int(s, "first", p->segment[i].first);
        json_int(s, "last", p->segment[i].last);
        json_int(s, "static_in", p->segment[i].static_in);
        json_int(s, "static_kept", p->segment[i].static_kept);
        json_int(s, "dynamic_in", p->segment[i].dynamic_in);
        json_int(s, "dynamic_kept", p->segment[i].dynamic_kept);
    }
}

static kvf_status say_json(const run *r, kvf_error *err)
{
    const video_tokens *t = &r->tokens;
    cJSON *root = cJSON_CreateObject();
    json_clip(r, root);
    cJSON *f = json_object(root, "features");
    json_text(f, "from", t->from, (size_t)-1);
    json_int(f, "n_frames", t->n_frame);
    json_int(f, "n_tokens", t->n_tok);
    json_int(f, "dim", t->dim);
    json_int(f, "grid_width", r->result.info.grid_w);
    json_plan(r, root);
    if (r->o.quality) {
        cJSON *q = json_object(root, "quality");
        json_real(q, "nearest_mean", r->quality.nearest_mean);
        json_real(q, "nearest_p95", r->quality.nearest_p95);
        json_real(q, "owner_mean", r->quality.owner_mean);
        json_real(q, "owner_share", r->quality.owner_share);
        json_real(q, "squared_error", r->quality.squared_error);
    }
    json_text(root, "positions", r->o.positions, (size_t)-1);
    if (r->o.out) json_text(root, "output", r->o.out, (size_t)-1);
    if (r->o.report) json_text(root, "report", r->o.report, (size_t)-1);
    json_real(root, "decode_s", t->decode_s);
    json_real(root, "encode_s", t->encode_s);
    json_real(root, "seconds", r->seconds);
    json_int(root, "peak_rss_bytes", engine_peak_rss());
    return json_print(root) ? KVF_OK
                            : report_fail(err, KVF_ERR_NOMEM, "Not enough memory for the JSON output.");
}

static kvf_status video_run(run *r, kvf_error *err)
{
    double begin = clock_s();
    if (r->o.list) {
        if (r->o.json) return list_json(err);
        list_text();
        return KVF_OK;
    }
    kvf_status rc = open_ctx(r, err);
    if (rc == KVF_OK) rc = open_stream(r, err);
    if (rc == KVF_OK) rc = read_tokens(r, err);
    if (rc == KVF_OK && !r->stream) rc = storm_run(&r->storm, &r->tokens, err);
    if (rc == KVF_OK && !r->stream) rc = make_plan(r, err);
    if (rc == KVF_OK && r->stream) rc = video_stream_finish(r->stream, &r->tokens, &r->result, err);
    if (rc == KVF_OK && r->o.out) rc = video_result_write(&r->result, &r->tokens, r->o.out, r->clip, err);
    if (rc == KVF_OK && r->o.report) rc = write_report(r, err);
    if (rc != KVF_OK) return rc;
    r->seconds = clock_s() - begin;
    if (!r->o.quiet) say_notes(r);
    if (!r->o.quiet && !r->o.json) say_summary(r);
    return r->o.json ? say_json(r, err) : KVF_OK;
}

int cmd_video(int argc, char **argv)
{
    run r;
    memset(&r, 0, sizeof r);
    arg_group groups[] = { { "Options", video_rows, &r.o },
                           { "Frames", frame_rows, &r.o },
                           { "Tokens", token_rows, &r.o },
                           { "Plan", plan_rows, &r.o },
                           { NULL, NULL, NULL } };
    arg_texts operands = { 0 };
    arg_result parsed = args_parse(&video_command, groups, argc, argv, &operands);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;
    if (operands.n) r.clip = operands.v[0];
    kvf_error err = { 0 };
    kvf_status rc = video_run(&r, &err);
    int code = rc == KVF_OK ? EXIT_OK : report_status(&err);
    video_result_free(&r.result);
    video_stream_close(r.stream);
    kvf_merge_plan_free(r.plan);
    video_tokens_free(&r.tokens);
    kvf_merge_close(r.merge);
    storm_close(&r.storm);
    kvf_ctx_close(r.ctx);
    args_free(groups, &operands);
    return code;
}
