#!/usr/bin/env python3
"""speed_long.py - what long documents cost: reading, the first token after a restart, memory, disk.

    speed_long.py [--parts read,first,lookup,facts] [--read 16K,64K,256K] [--first 16K,128K,1M]
                  [--rounds 3] [--policy infllm] [--model NAME] [--memory SIZE]

read     tokens/s while a document is read into a new store, every length once a round, in turn, so that a
         noisy minute hits all; peak memory; the store's bytes against the raw keys and values
first    seconds from the start of a new process to the first byte of its answer, for a question about a
         stored document; the first of --asks + 1 runs is left out: it fills the page cache
lookup   share of a decode step that goes into choosing blocks: the difference between answers of 1 and of
         65 tokens, by the program's own counters
facts    the stored text hides eight facts (longcontext's task of that name), asked one after another: how
         many are answered, and the answers in OUT.jsonl

Documents are beginnings of one text: the data folder's books (--data or $KVFOLD_DATA), else manuals of
this machine or made-up text. Rows go to OUT.csv, one per figure, a table to OUT.md beside it. Stores are
made in --scratch and removed; 1M tokens of the 0.5B model take 13 GB.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "longcontext"))
import contexts  # noqa: E402
import program  # noqa: E402
import report  # noqa: E402
from program import say  # noqa: E402

QUESTION = "What happens at the beginning?"
FIELDS = ["date", "machine", "commit", "threads", "load_before", "model", "policy", "what", "tokens", "value", "unit",
          "command"]
# Whole-project goals, for the column beside the figure.
GOALS = {("first", 16384): "<= 1.0", ("first", 131072): "<= 1.5", ("first", 1048576): "<= 2.0",
         ("lookup share", 131072): "<= 5"}
ANY_LENGTH = {"store less index / raw KV": "<= 1.05", "index / raw KV": "<= 0.1",
              "peak memory less model file, reading": "<= budget + 200 MB",
              "peak memory less model file, asking": "<= budget + 200 MB"}


class Speed:
    def __init__(self, args, kvfold):
        self.args, self.kvfold, self.rows = args, kvfold, []
        _, texts = contexts.find_books(args.data)
        self.book = "\n\n".join(text for _, text in sorted(texts))
        self.cuts = {}

    def text(self, n_tokens):
        """A beginning of the book with n tokens, to 0.1 percent; the book again where it is too short."""
        if n_tokens not in self.cuts:
            n_chars = int(n_tokens * 4.4)
            for _ in range(6):
                text = (self.book * (n_chars // len(self.book) + 1))[:n_chars]
                n = self.kvfold.count(text)
                if 0.999 * n_tokens <= n <= n_tokens:
                    break
                n_chars = int(n_chars * n_tokens * 0.9995 / n)
            self.cuts[n_tokens] = text
        return self.cuts[n_tokens]

    def note(self, what, tokens, value, unit):
        self.rows.append(dict(
            date=time.strftime("%Y-%m-%dT%H:%M:%S"), machine=program.cpu_name(), commit=program.commit(),
            threads=self.kvfold.threads, load_before=self.args.load, policy=self.args.policy,
            model=os.path.basename(self.kvfold.model).replace(".gguf", ""), what=what, tokens=tokens,
            value=("%.5g" if isinstance(value, float) else "%d") % value, unit=unit,
            command=program.command_line(sys.argv)))
        with open(self.args.out + ".csv", "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=FIELDS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(self.rows[-1])
        say("  %-34s %8s %12s %s" % (what, report.size(tokens), self.rows[-1]["value"], unit))

    def folder(self):
        return tempfile.mkdtemp(prefix="speed-long-", dir=self.args.scratch)

    # ---- Reading ----

    def ingest(self, store, n_tokens, what="read", text=None):
        """One document read into a store; notes speed and memory."""
        said, run = self.kvfold.ingest(store, "book", text or self.text(n_tokens), self.args.policy, watch=True)
        document = said["documents"][0]
        if document["n_computed_tokens"] < 0.98 * n_tokens:
            raise program.Failure("the document was not read as a whole: %s" % document)
        self.note(what, n_tokens, float(document["tokens_per_s"]), "tokens/s")
        self.note_memory("reading", n_tokens, run)
        return said

    def note_memory(self, what, n_tokens, run):
        model = self.kvfold.info["file_bytes"]
        self.note("peak memory, " + what, n_tokens, run.max_rss, "bytes")
        self.note("peak memory less model file, " + what, n_tokens, run.max_rss - model, "bytes")
        self.note("anonymous memory, " + what, n_tokens, run.memory.anon, "bytes")

    def note_store(self, store, n_tokens, said):
        raw = said["n_tokens"] * self.kvfold.info["kv_bytes_per_token"]
        disk = sum(os.stat(os.path.join(store, f)).st_blocks * 512 for f in os.listdir(store))
        self.note("store on disk", n_tokens, disk, "bytes")
        self.note("raw KV", n_tokens, raw, "bytes")
        self.note("index", n_tokens, said["index_bytes"], "bytes")
        self.note("index / raw KV", n_tokens, said["index_bytes"] / raw, "")
        self.note("store less index / raw KV", n_tokens, (disk - said["index_bytes"]) / raw, "")

    def read(self):
        for round_ in range(self.args.rounds):
            for n in self.args.read:
                store = self.folder()
                try:
                    said = self.ingest(store, n)
                    if round_ == 0:
                        self.note_store(store, n, said)
                finally:
                    shutil.rmtree(store, ignore_errors=True)

    # ---- A stored document ----

    def ask_command(self, store, *options):
        return self.kvfold.command("ask", "--store", store, "-d", "book", *self.kvfold.session(self.args.policy),
                                   *options, QUESTION)

    def first(self, store, n_tokens):
        # Printed as it is written, so the first byte is the first token.
        command = self.ask_command(store, "-n", 8)
        for i in range(self.args.asks + 1):
            run = program.Run(command, watch=True)
            if i:
                self.note("first", n_tokens, run.first_s, "s")
        self.note_memory("asking", n_tokens, run)

    def lookup(self, store, n_tokens):
        """Differences of two processes, of which the question is the larger part: as many as --asks, in turn."""
        for i in range(self.args.asks + 1):
            stats = [program.Run(self.ask_command(store, "-n", n, "--ignore-eos", "--json")).rows()[0]["stats"]
                     for n in (1, 65)]
            lacking = [k for k in ("lookup_ms", "decode_ms", "n_lookups") if k not in stats[0]]
            if lacking:
                say("SKIP lookup: ask --json says nothing about " + ", ".join(lacking))
                return
            if i:  # the first fills the page cache
                self.note_lookup(n_tokens, {k: stats[1][k] - stats[0][k] for k in stats[0]
                                            if isinstance(stats[0][k], (int, float))})

    def note_lookup(self, n_tokens, spent):
        self.note("lookup share", n_tokens, 100.0 * spent["lookup_ms"] / spent["decode_ms"], "%")
        self.note("decode step", n_tokens, spent["decode_ms"] / 64, "ms")
        for name in ("n_lookups", "n_block_reads", "n_block_misses"):
            if name in spent:
                self.note(name + " per step", n_tokens, spent[name] / 64, "")

    def facts(self, n_tokens):
        kind, g = contexts.generator(self.args.data)
        return contexts.generated(g, kind, "facts", n_tokens, 0, "1", self.kvfold.count)[0]

    def ask_facts(self, store, context):
        """Each question by a process of its own, as a user would; the answers go to OUT.jsonl."""
        right = 0
        for q in context.questions:
            said = self.kvfold.ask_stored(store, "book", [q.text], self.args.policy, q.max_tokens)[0]
            score = q.score(said["answer"])
            right += score
            cited = [i + 1 for i, c in enumerate(said.get("citations") or []) if q.answers[0] in c.get("excerpt", "")]
            row = {"id": q.ident, "tokens": context.length, "depth": round(q.depth, 3), "answers": q.answers,
                   "prediction": said["answer"], "score": score, "cited": cited[0] if cited else 0,
                   "ttft_ms": round(said["stats"]["ttft_ms"], 1)}
            with open(self.args.out + ".jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self.note("facts answered", context.length, 100.0 * right / len(context.questions), "%")

    def stored(self):
        for n in self.args.first:
            store = self.folder()
            context = self.facts(n) if "facts" in self.args.parts else None
            try:
                said = self.ingest(store, n, "read, to be asked", context.text if context else None)
                self.note_store(store, n, said)
                if context:
                    self.ask_facts(store, context)
                if "first" in self.args.parts:
                    self.first(store, n)
                if "lookup" in self.args.parts:
                    self.lookup(store, n)
            finally:
                shutil.rmtree(store, ignore_errors=True)


def table(rows):
    groups = {}
    for r in rows:
        groups.setdefault((r["what"], int(r["tokens"]), r["unit"]), []).append(float(r["value"]))
    lines = [[what, report.size(n), show(statistics.median(v), unit), show(min(v), unit), show(max(v), unit), len(v),
              GOALS.get((what, n), ANY_LENGTH.get(what, ""))] for (what, n, unit), v in sorted(groups.items())]
    text = ["# What long documents cost", "", "%s, %s threads, %s, --policy %s, commit %s." % (
        rows[0]["machine"], rows[0]["threads"], rows[0]["model"], rows[0]["policy"], rows[0]["commit"]), "",
            "    " + rows[0]["command"], ""]
    text += report.markdown(["what", "tokens", "median", "least", "most", "n", "goal"], lines)
    reads = {n: statistics.median(v) for (what, n, _), v in groups.items() if what == "read"}
    if len(reads) > 1:
        base = min(reads)
        text.append("Reading against reading at %s: %s. Goal at 256K: >= 0.9." % (report.size(base), ", ".join(
            "%s %.2f" % (report.size(n), reads[n] / reads[base]) for n in sorted(reads)[1:])))
    return "\n".join(text) + "\n"


def show(value, unit):
    return "%.1f MB" % (value / 1e6) if unit == "bytes" else ("%.4g %s" % (value, unit)).strip()


def sizes(text):
    unit = {"K": 1 << 10, "M": 1 << 20}
    return [int(float(w.rstrip("KM")) * unit.get(w[-1], 1)) for w in text.upper().split(",") if w]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nSPDX")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda t: t.split(","), default=["read", "first", "lookup"])
    parser.add_argument("--read", type=sizes, default=sizes("16K,64K,256K"), help="tokens (16K,64K,256K)")
    parser.add_argument("--first", type=sizes, default=sizes("16K,128K"), help="of stored documents (16K,128K)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--asks", type=int, default=5)
    parser.add_argument("--policy", default="infllm")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="name or path (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", help="as kvfold's --memory")
    parser.add_argument("--data", default=os.environ.get("KVFOLD_DATA"), help="the data folder ($KVFOLD_DATA)")
    parser.add_argument("--kvfold", help="the program (build/tools/kvfold)")
    parser.add_argument("--scratch", help="folder for temporary stores ($TMPDIR)")
    parser.add_argument("--out", default=os.path.join(program.ROOT, "bench", "results", "longcontext", "speed-%s-%s" % (
        program.today(), program.cpu_slug())), help="without .csv and .md")
    args = parser.parse_args()
    args.load = "%.1f" % os.getloadavg()[0]
    if float(args.load) > 0.3:
        say("the machine is not idle (load %s): figures will be low and uneven" % args.load)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    kvfold = program.Kvfold(program.find_program(args.kvfold), program.find_model(args.model), args.threads,
                            args.memory)
    speed = Speed(args, kvfold)
    if "read" in args.parts:
        speed.read()
    if {"first", "lookup", "facts"} & set(args.parts):
        speed.stored()
    text = table(speed.rows)
    with open(args.out + ".md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except program.Failure as failure:
        sys.exit("speed_long.py: %s" % failure)
    except KeyboardInterrupt:
        sys.exit(130)
