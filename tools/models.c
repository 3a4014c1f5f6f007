/* models.c - see models.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include "models.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "args.h"
#include "report.h"

#define PATH_CAP 4096

static const known_model known[] = {
    { "qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
      "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 491400064, "Apache-2.0",
      "Qwen2.5-Coder 0.5B Instruct, 32K context; the default" },
    { "qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
      "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", 1117320768, "Apache-2.0",
      "Qwen2.5-Coder 1.5B Instruct, 32K context; better answers" },
    { "gemma-3-270m", "gemma-3-270m-q4_k_m.gguf",
      "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", 253113024, "Gemma terms of use",
      "Gemma 3 270M, a base model without chat training; for tests" },
};
enum { N_KNOWN = sizeof known / sizeof *known };

const known_model *models_at(size_t i) { return i < N_KNOWN ? &known[i] : NULL; }

const known_model *models_find(const char *name)
{
    if (strcmp(name, "default") == 0) name = MODELS_DEFAULT;
    for (size_t i = 0; i < N_KNOWN; i++)
        if (strcmp(known[i].name, name) == 0 || strcmp(known[i].file, name) == 0) return &known[i];
    size_t n = strlen(name); /* or the file's name without ".gguf" */
    for (size_t i = 0; i < N_KNOWN; i++)
        if (strlen(known[i].file) == n + 5 && strncmp(known[i].file, name, n) == 0) return &known[i];
    return NULL;
}

/* i-th folder that models are looked for in; false past the end, "" if the i-th is not set. */
static bool folder_at(char *out, size_t cap, int i)
{
    static const struct {
        const char *variable, *below;
    } places[] = { { "KVFOLD_MODELS", "" },
                   { "XDG_CACHE_HOME", "/kvfold/models" },
                   { "HOME", "/.cache/kvfold/models" } };
    out[0] = '\0';
    if (i >= (int)(sizeof places / sizeof *places)) return false;
    const char *value = getenv(places[i].variable);
    if (value && *value) snprintf(out, cap, "%s%s", value, places[i].below);
    return true;
}

static bool is_file(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && !S_ISDIR(st.st_mode);
}

/* Look for file in all folders. out is the first place that has it, or "". */
static bool look_up(char *out, size_t cap, const char *file)
{
    char folder[PATH_CAP];
    for (int i = 0; folder_at(folder, sizeof folder, i); i++) {
        if (!folder[0]) continue;
        int n = snprintf(out, cap, "%s/%s", folder, file);
        if (n > 0 && (size_t)n < cap && is_file(out)) return true;
    }
    out[0] = '\0';
    return false;
}

/* The fetch script: beside the program, in the source tree it was built in, or installed. */
static bool find_script(char *out, size_t cap)
{
    char exe[PATH_CAP], plain[PATH_CAP];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    if (n <= 0) return false;
    exe[n] = '\0';
    char *slash = strrchr(exe, '/');
    if (slash) *slash = '\0';
    static const char *const places[] = { "/fetch_model.py", "/../scripts/fetch_model.py",
                                          "/../../scripts/fetch_model.py",
                                          "/../share/kvfold/fetch_model.py" };
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int len = snprintf(out, cap, "%s%s", exe, places[i]);
        if (len <= 0 || (size_t)len >= cap || !is_file(out)) continue;
        if (realpath(out, plain)) snprintf(out, cap, "%s", plain);
        return true;
    }
#ifdef KVFOLD_FETCH_SCRIPT
    snprintf(out, cap, "%s", KVFOLD_FETCH_SCRIPT);
    if (is_file(out)) return true;
#endif
    return false;
}

/* Ask the person at the terminal; false when there is none. */
static bool ask_consent(const known_model *m, const char *dir)
{
    if (!report_is_terminal(stdin) || !report_is_terminal(stderr)) return false;
    char size[32], answer[16] = "";
    fprintf(stderr, "The model %s (%s, licence: %s) is not on this machine.\nFetch it to %s? [y/N] ", m->name,
            report_bytes(size, (double)m->bytes), m->licence, dir);
    fflush(stderr);
    if (!fgets(answer, sizeof answer, stdin)) return false;
    return answer[0] == 'y' || answer[0] == 'Y';
}

/* Run the script and wait. Its output goes to stderr: stdout belongs to the answer. */
static kvf_status run_script(const char *script, const known_model *m, const char *dir, kvf_error *err)
{
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0) return report_fail(err, KVF_ERR_IO, "Cannot start %s: %s.", script, strerror(errno));
    if (pid == 0) {
        dup2(STDERR_FILENO, STDOUT_FILENO);
        execlp("python3", "python3", script, m->name, "--dir", dir, "--yes", (char *)NULL);
        _exit(127);
    }
    int status = 0;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) return report_fail(err, KVF_ERR_IO, "Lost %s: %s.", script, strerror(errno));
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return KVF_OK;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        return report_fail(err, KVF_ERR_IO,
                           "python3 is needed to fetch models; install it (package python3).");
    return report_fail(err, KVF_ERR_IO, "Fetching %s failed; run it again to resume: %s %s --dir %s", m->name,
                       script, m->name, dir);
}

/* Where a fetched model goes: the first folder that is set. */
static kvf_status fetch(char *out, size_t cap, const known_model *m, bool yes, kvf_error *err)
{
    char dir[PATH_CAP], script[PATH_CAP], size[32];
    for (int i = 0; folder_at(dir, sizeof dir, i) && !dir[0]; i++) continue;
    if (!dir[0])
        return report_fail(err, KVF_ERR_NOT_FOUND,
                           "The model %s is not here and HOME is not set: set "
                           "KVFOLD_MODELS to the folder of your models.",
                           m->name);
    bool have = find_script(script, sizeof script);
    if (!have || (!yes && !ask_consent(m, dir)))
        return report_fail(
            err, KVF_ERR_NOT_FOUND,
            "The model %s (%s) is not in %s. Fetch it with: %s %s  (or add --yes), or give the path "
            "of a GGUF file with -m.",
            m->name, report_bytes(size, (double)m->bytes), dir, have ? script : "scripts/fetch_model.py",
            m->name);
    kvf_status rc = run_script(script, m, dir, err);
    if (rc != KVF_OK) return rc;
    if (look_up(out, cap, m->file)) return KVF_OK;
    return report_fail(err, KVF_ERR_IO, "Fetching %s ended without the file %s/%s.", m->name, dir, m->file);
}

/* A half-copied file of a known model is found by its size: the SHA-256 of 500 MB takes a second
 * that nobody wants to wait for at every start, and the fetch script has checked it. */
static kvf_status check_size(const char *path, const known_model *m, kvf_error *err)
{
    struct stat st;
    if (stat(path, &st) != 0 || st.st_size == m->bytes) return KVF_OK;
    return report_fail(err, KVF_ERR_FORMAT,
                       "'%s' has %lld bytes instead of %lld: it was not fetched whole. Delete it and run "
                       "scripts/fetch_model.py %s.",
                       path, (long long)st.st_size, (long long)m->bytes, m->name);
}

kvf_status models_path(char *out, size_t cap, const char *name, bool yes, kvf_error *err)
{
    const known_model *m = models_find(name);
    bool path_like = strchr(name, '/') != NULL;
    if (path_like || (!m && is_file(name))) {
        int n = snprintf(out, cap, "%s", name);
        if (n < 0 || (size_t)n >= cap)
            return report_fail(err, KVF_ERR_ARG, "The path of the model is too long.");
        struct stat st;
        if (stat(out, &st) != 0)
            return report_fail(err, KVF_ERR_IO, "Cannot open the model '%s': %s.", out, strerror(errno));
        if (S_ISDIR(st.st_mode))
            return report_fail(err, KVF_ERR_ARG, "'%s' is a directory; name the .gguf file in it.", out);
        return KVF_OK;
    }
    if (m) {
        if (look_up(out, cap, m->file)) return check_size(out, m, err);
        return fetch(out, cap, m, yes, err);
    }
    if (look_up(out, cap, name)) return KVF_OK;
    const char *names[N_KNOWN];
    for (size_t i = 0; i < N_KNOWN; i++) names[i] = known[i].name;
    const char *close = args_closest(name, names, N_KNOWN);
    return report_fail(
        err, KVF_ERR_NOT_FOUND,
        "There is no file '%s' and no model of that name%s%s%s Known: %s, %s, %s; or give the path "
        "of a GGUF file.",
        name, close ? "; did you mean " : ".", close ? close : "", close ? "?" : "", known[0].name,
        known[1].name, known[2].name);
}
