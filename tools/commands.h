/* commands.h - the subcommands: one function and one file, cmd_<name>.c, each.
 *
 * argv[0] is the subcommand's name. The result is the exit code.
 *
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef KVFOLD_TOOLS_COMMANDS_H
#define KVFOLD_TOOLS_COMMANDS_H

int cmd_ask(int argc, char **argv);
int cmd_ingest(int argc, char **argv);
int cmd_chat(int argc, char **argv);
int cmd_tokenize(int argc, char **argv);
int cmd_perplexity(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_rm(int argc, char **argv);
int cmd_compact(int argc, char **argv);
int cmd_video(int argc, char **argv);
int cmd_bench(int argc, char **argv);

#endif
