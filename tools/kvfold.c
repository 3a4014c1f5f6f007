/* kvfold.c - the program: one binary, one subcommand per job.
 *
 * It uses include/kvfold/kvfold.h and nothing else of the library. Results go to standard output,
 * everything said about them to standard error. Exit codes are in report.h.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "args.h"
#include "commands.h"
#include "interrupt.h"
#include "report.h"

typedef struct subcommand {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *summary;
} subcommand;

static const subcommand subcommands[] = {
    { "ask", cmd_ask, "answer questions about documents" },
    { "ingest", cmd_ingest, "read documents into a store, to be asked about at once" },
    { "chat", cmd_chat, "talk with a model, about documents if you like" },
    { "tokenize", cmd_tokenize, "show the tokens of a text" },
    { "perplexity", cmd_perplexity, "measure how well a model predicts a text" },
    { "inspect", cmd_inspect, "show what is in a model file or a store, or what this machine has" },
    { "rm", cmd_rm, "remove documents from a store" },
    { "compact", cmd_compact, "give the space of removed documents back to the disk" },
    { "video", cmd_video, "turn a video into the few tokens that matter" },
    { "bench", cmd_bench, "measure the speed of reading and writing" },
};
enum { N_SUBCOMMANDS = sizeof subcommands / sizeof *subcommands };

static void print_help(FILE *out)
{
    fputs("kvfold - answers from long documents, with a language model on your own machine\n\n"
          "Usage: kvfold COMMAND [options]\n\nCommands:\n",
          out);
    for (size_t i = 0; i < N_SUBCOMMANDS; i++)
        fprintf(out, "  %-12s %s\n", subcommands[i].name, subcommands[i].summary);
    fputs("\nOptions:\n"
          "  -h, --help     show this page; kvfold COMMAND --help shows the options of a command\n"
          "  -V, --version  show the version\n"
          "\nExamples:\n"
          "  kvfold ask -d contract.pdf \"When can the tenant give notice?\"\n"
          "  kvfold ingest --store books -d policy.pdf.gz\n"
          "  kvfold ask --store books \"Who may upload a package?\"\n"
          "  kvfold chat -d manual.html\n"
          "  kvfold bench -p 512 -n 128\n"
          "\nExit codes: 0 done, 1 failed, 2 unusable options or input, 130 interrupted.\n",
          out);
}

static int print_version(void)
{
    printf("kvfold %d.%d.%d", KVF_VERSION_MAJOR, KVF_VERSION_MINOR, KVF_VERSION_PATCH);
    if (kvf_version() != KVF_VERSION_NUMBER) printf(" (library %s)", kvf_version_string());
    putchar('\n');
    return report_flush(EXIT_OK);
}

static const subcommand *find(const char *name)
{
    for (size_t i = 0; i < N_SUBCOMMANDS; i++)
        if (strcmp(subcommands[i].name, name) == 0) return &subcommands[i];
    return NULL;
}

static int unknown(const char *word)
{
    const char *names[N_SUBCOMMANDS];
    for (size_t i = 0; i < N_SUBCOMMANDS; i++) names[i] = subcommands[i].name;
    const char *close = args_closest(word, names, N_SUBCOMMANDS);
    const char *kind = word[0] == '-' ? "option" : "command";
    if (close)
        report_error("Unknown %s '%.60s'; did you mean %s?", kind, word, close);
    else
        report_error("Unknown %s '%.60s'; see kvfold --help.", kind, word);
    return EXIT_USAGE;
}

static int run(int argc, char **argv)
{
    if (argc < 2) {
        print_help(stderr);
        return EXIT_USAGE;
    }
    const char *word = argv[1];
    if (strcmp(word, "--version") == 0 || strcmp(word, "-V") == 0) return print_version();
    bool help = strcmp(word, "help") == 0;
    if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0 || (help && argc == 2)) {
        print_help(stdout);
        return EXIT_OK;
    }
    const subcommand *c = find(help ? argv[2] : word);
    if (!c) return unknown(help ? argv[2] : word);
    if (help) {
        char option[] = "--help";
        char *args[] = { argv[2], option, NULL };
        return c->run(2, args);
    }
    return c->run(argc - 1, argv + 1);
}

int main(int argc, char **argv)
{
    interrupt_install();
    return report_flush(run(argc, argv));
}
