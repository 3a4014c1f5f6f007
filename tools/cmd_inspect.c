/* cmd_inspect.c - kvfold inspect: what is in a model file, and what this machine has.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "commands.h"
#include "engine.h"
#include "inspect_store.h"
#include "json.h"
#include "models.h"
#include "report.h"
#include "utf8.h"

typedef struct inspect_options {
    bool json, devices, policies, models, verify;
} inspect_options;

#define FLAG(field, name, letter, help)                                                                      \
    {                                                                                                        \
        name, letter, NULL, ARG_FLAG, offsetof(inspect_options, field), NULL, 0, 0, NULL, help               \
    }

static const arg_row inspect_rows[] = {
    FLAG(json, "--json", 'j', "print a JSON object"),
    FLAG(devices, "--devices", 0, "show the processor, its instruction sets and the threads used, and what cuda finds"),
    FLAG(policies, "--policies", 0, "list the compression policies"),
    FLAG(models, "--models", 0, "list the known models"),
    FLAG(verify, "--verify", 0, "of a store: read and check all of it; exit code 2 if it is damaged"),
    { 0 },
};

static const arg_command inspect_command = {
    .name = "inspect",
    .synopsis = "[MODEL | DIR] [-v] [--json]",
    .summary = "show what is in a model file or a store, or what this machine has",
    .details = "MODEL is a path or the name of a known model, as for -m; DIR the folder of a store. With -v all\n"
               "metadata and tensors are listed.",
    .examples = "  kvfold inspect model.gguf\n"
                "  kvfold inspect -v qwen2.5-coder-0.5b\n"
                "  kvfold inspect books --verify\n"
                "  kvfold inspect --devices --json",
    .operand = "One model or store at a time.",
    .max_operands = 1,
};

/* Contexts that the memory estimate is given for, as far as the model goes. */
static const int64_t contexts[] = { 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576 };
enum { N_CONTEXTS = sizeof contexts / sizeof *contexts };

/* Text from a file, safe for a terminal. */
static void print_text(const char *text)
{
    buffer clean = { 0 };
    utf8_add_clean(&clean, text, strlen(text), UTF8_NO_CONTROLS);
    for (size_t i = 0; i < clean.n; i++)
        if (clean.v[i] == '\n' || clean.v[i] == '\t') clean.v[i] = ' ';
    fputs(buffer_text(&clean), stdout);
    buffer_free(&clean);
}

static void print_field(const char *name, const char *text)
{
    printf("%-16s", name);
    print_text(text && *text ? text : "-");
    putchar('\n');
}

static void print_memory(const kvf_model_info *m)
{
    char kv[32], total[32], n[32];
    printf("\nMemory: %s of keys and values per token, besides the file itself\n",
           report_bytes(kv, (double)m->kv_bytes_per_token));
    printf("  %12s  %12s  %12s\n", "context", "keys+values", "with file");
    for (int i = 0; i < N_CONTEXTS; i++) {
        bool last = i + 1 == N_CONTEXTS || contexts[i] >= m->n_ctx_train;
        int64_t c = contexts[i] < m->n_ctx_train ? contexts[i] : m->n_ctx_train;
        double bytes = (double)c * (double)m->kv_bytes_per_token;
        printf("  %12s  %12s  %12s\n", report_count(n, c), report_bytes(kv, bytes),
               report_bytes(total, bytes + (double)m->file_bytes));
        if (last) break;
    }
}

static void print_model(const engine *e, bool verbose)
{
    const kvf_model_info *m = &e->info;
    char n[32], b[32];
    print_field("name", m->name);
    print_field("architecture", m->arch);
    printf("%-16s%s\n", "parameters", report_count(n, m->n_params));
    printf("%-16s%s (%s bytes)\n", "file", report_bytes(b, (double)m->file_bytes),
           report_count(n, m->file_bytes));
    print_field("quantization", m->quantization);
    printf("%-16s%s tokens\n", "context", report_count(n, m->n_ctx_train));
    printf("%-16s%d layers, width %d, feed-forward %d\n", "size", m->n_layer, m->n_embd, m->n_ff);
    printf("%-16s%d query heads, %d key/value heads, dimension %d\n", "attention", m->n_head, m->n_head_kv,
           m->head_dim);
    if (m->window) printf("%-16s%d tokens in the layers that slide\n", "window", m->window);
    print_field("tokenizer", m->tokenizer);
    printf("%-16s%s\n", "vocabulary", report_count(n, m->n_vocab));
    print_field("chat template", m->chat_template && *m->chat_template ? m->chat_template
                                                                       : "none recognised: plain text frame");
    printf("%-16s%016" PRIx64 "%016" PRIx64 "\n", "fingerprint", m->fingerprint[0], m->fingerprint[1]);
    print_memory(m);

    kvf_model_entry entry;
    int64_t i = 0;
    if (verbose) puts("\nMetadata:");
    for (; verbose && kvf_model_meta(e->model, i, &entry) == KVF_OK; i++) {
        printf("  ");
        print_text(entry.name);
        printf(" (%s) = ", entry.type);
        print_text(entry.value);
        putchar('\n');
    }
    if (verbose) puts("\nTensors:");
    for (i = 0; kvf_model_tensor(e->model, i, &entry) == KVF_OK; i++) {
        if (!verbose) continue;
        buffer name = { 0 };
        utf8_add_clean(&name, entry.name, strlen(entry.name), UTF8_NO_CONTROLS);
        printf("  %-32s %-6s %-20s %12zu bytes\n", buffer_text(&name), entry.type, entry.value, entry.bytes);
        buffer_free(&name);
    }
    if (!verbose) printf("\n%" PRId64 " tensors; -v lists them and the metadata\n", i);
}

static void json_entries(const engine *e, cJSON *o)
{
    kvf_model_entry entry;
    cJSON *meta = json_array(o, "metadata");
    for (int64_t i = 0; kvf_model_meta(e->model, i, &entry) == KVF_OK; i++) {
        cJSON *m = json_object(meta, NULL);
        json_text(m, "key", entry.name, (size_t)-1);
        json_text(m, "type", entry.type, (size_t)-1);
        json_text(m, "value", entry.value, (size_t)-1);
    }
    cJSON *tensors = json_array(o, "tensors");
    for (int64_t i = 0; kvf_model_tensor(e->model, i, &entry) == KVF_OK; i++) {
        cJSON *t = json_object(tensors, NULL);
        json_text(t, "name", entry.name, (size_t)-1);
        json_text(t, "type", entry.type, (size_t)-1);
        json_text(t, "shape", entry.value, (size_t)-1);
        json_int(t, "bytes", (int64_t)entry.bytes);
    }
}

static bool json_model(const engine *e)
{
    const kvf_model_info *m = &e->info;
    cJSON *o = cJSON_CreateObject();
    json_text(o, "name", m->name, (size_t)-1);
    json_text(o, "arch", m->arch, (size_t)-1);
    json_text(o, "quantization", m->quantization, (size_t)-1);
    json_text(o, "tokenizer", m->tokenizer, (size_t)-1);
    json_text(o, "chat_template", m->chat_template ? m->chat_template : "", (size_t)-1);
    json_int(o, "n_params", m->n_params);
    json_int(o, "file_bytes", m->file_bytes);
    json_int(o, "n_ctx_train", m->n_ctx_train);
    json_int(o, "n_vocab", m->n_vocab);
    json_int(o, "n_layer", m->n_layer);
    json_int(o, "n_embd", m->n_embd);
    json_int(o, "n_ff", m->n_ff);
    json_int(o, "n_head", m->n_head);
    json_int(o, "n_head_kv", m->n_head_kv);
    json_int(o, "head_dim", m->head_dim);
    json_int(o, "window", m->window);
    json_int(o, "bos", m->bos);
    json_int(o, "eos", m->eos);
    json_bool(o, "add_bos", m->add_bos != 0);
    json_int(o, "kv_bytes_per_token", (int64_t)m->kv_bytes_per_token);
    char hex[40];
    snprintf(hex, sizeof hex, "%016" PRIx64 "%016" PRIx64, m->fingerprint[0], m->fingerprint[1]);
    json_text(o, "fingerprint", hex, (size_t)-1);
    json_entries(e, o);
    return json_print(o);
}

/* ---- The machine ------------------------------------------------------------------------- */

/* A line of /proc/cpuinfo, "model name" or "flags"; "" where there is none. */
static void cpuinfo(const char *key, buffer *out)
{
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[8192];
    size_t n = strlen(key);
    while (f && !out->n && fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':');
        if (!colon || strncmp(line, key, n) != 0) continue;
        if (line[n] != ' ' && line[n] != '\t' && line[n] != ':') continue;
        line[strcspn(line, "\n")] = '\0';
        buffer_add_text(out, colon[1] == ' ' ? colon + 2 : colon + 1);
    }
    if (f) fclose(f);
}

/* The processor's features that matter here, of the many that Linux lists. */
static void features(const char *flags, buffer *out)
{
    static const char *const wanted[] = { "avx2",     "fma",         "f16c",        "avx512f",
                                          "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni",
                                          "amx_tile", "amx_bf16",    "amx_int8" };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        size_t n = strlen(wanted[i]);
        for (const char *p = flags; (p = strstr(p, wanted[i])) != NULL; p += n) {
            if ((p > flags && p[-1] != ' ') || (p[n] && p[n] != ' ')) continue;
            if (out->n) buffer_add_char(out, ' ');
            buffer_add_text(out, wanted[i]);
            break;
        }
    }
}

static int print_devices(const inspect_options *o, const engine_options *eo)
{
    static const char *const levels[] = { "ref", "avx2", "avx512", "amx" };
    kvf_error err = { 0 };
    kvf_ctx_params p;
    kvf_ctx_params_init(&p);
    p.n_threads = (int32_t)eo->threads;
    kvf_ctx *ctx = NULL;
    if (kvf_ctx_open(&ctx, &p, &err) != KVF_OK) return report_status(&err);
    char best[32];
    snprintf(best, sizeof best, "%s", kvf_ctx_cpu(ctx));
    int32_t threads = kvf_ctx_threads(ctx);
    kvf_ctx_close(ctx);

    buffer model = { 0 }, flags = { 0 }, feature = { 0 }, usable = { 0 };
    cpuinfo("model name", &model);
    cpuinfo("flags", &flags);
    features(buffer_text(&flags), &feature);
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++) {
        p.cpu = levels[i];
        p.n_threads = 1;
        if (kvf_ctx_open(&ctx, &p, NULL) != KVF_OK) continue;
        buffer_printf(&usable, "%s%s", usable.n ? " " : "", levels[i]);
        kvf_ctx_close(ctx);
    }
    int code = EXIT_OK;
    char cuda[512] = "";
    int32_t n_cuda = kvf_devices("cuda", cuda, sizeof cuda);
    if (o->json) {
        cJSON *root = cJSON_CreateObject();
        cJSON *list = json_array(root, "devices"), *d = json_object(list, NULL);
        json_text(d, "backend", "cpu", (size_t)-1);
        json_text(d, "name", buffer_text(&model), model.n);
        json_text(d, "cpu", best, (size_t)-1);
        json_text(d, "levels", buffer_text(&usable), usable.n);
        json_text(d, "features", buffer_text(&feature), feature.n);
        json_int(d, "threads", threads);
        d = json_object(list, NULL);
        json_text(d, "backend", "cuda", (size_t)-1);
        json_int(d, "n", n_cuda);
        json_text(d, "name", cuda, (size_t)-1);
        if (!json_print(root)) code = EXIT_FAILED;
    } else {
        print_field("backend", "cpu");
        print_field("processor", buffer_text(&model));
        print_field("used", best);
        print_field("levels", buffer_text(&usable));
        print_field("features", buffer_text(&feature));
        printf("%-16s%d\n", "threads", threads);
        print_field("cuda", cuda);
    }
    buffer_free(&model);
    buffer_free(&flags);
    buffer_free(&feature);
    buffer_free(&usable);
    return code;
}

static int print_known_models(void)
{
    const known_model *m;
    char b[32];
    for (size_t i = 0; (m = models_at(i)) != NULL; i++)
        printf("%-20s %8s  %-18s  %s\n", m->name, report_bytes(b, (double)m->bytes), m->licence, m->what);
    return EXIT_OK;
}

static int inspect_model(const inspect_options *o, engine_options *eo, const arg_texts *operands)
{
    engine e;
    kvf_error err = { 0 };
    if (operands->n) eo->model = operands->v[0];
    kvf_status rc = engine_open(&e, eo, &err);
    if (rc != KVF_OK) return report_status(&err);
    int code = EXIT_OK;
    if (o->json)
        code = json_model(&e) ? EXIT_OK : EXIT_FAILED;
    else
        print_model(&e, eo->verbose);
    engine_close(&e);
    return code;
}

static bool is_folder(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

int cmd_inspect(int argc, char **argv)
{
    inspect_options o = { 0 };
    engine_options eo = { 0 };
    arg_group groups[] = { { "Options", inspect_rows, &o },
                           { "Model", engine_model_rows, &eo },
                           { NULL, NULL, NULL } };
    arg_texts operands = { 0 };
    arg_result parsed = args_parse(&inspect_command, groups, argc, argv, &operands);
    if (parsed != ARG_GO) return parsed == ARG_HELP ? EXIT_OK : EXIT_USAGE;
    int code;
    if (o.devices) {
        code = print_devices(&o, &eo);
    } else if (o.models) {
        code = print_known_models();
    } else if (o.policies) {
        engine_list_policies();
        code = EXIT_OK;
    } else if (operands.n && is_folder(operands.v[0])) {
        code = inspect_store(operands.v[0], o.verify, o.json, eo.quiet);
    } else if (o.verify) {
        report_error("--verify checks a store: give its folder.");
        code = EXIT_USAGE;
    } else {
        code = inspect_model(&o, &eo, &operands);
    }
    args_free(groups, &operands);
    return code;
}
