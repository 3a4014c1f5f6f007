"""readers.py - one store, many processes that ask it at the same time.

Each reader is a process of its own with its own session; model and store are mapped, so the pages are there once. What
is measured: the first token of each, tokens a second of all, resident and proportional memory, and whether each
says what a reader alone says. The rule that matters most: readers start together and each round has all counts in
turn.

SPDX-License-Identifier: Apache-2.0
"""
import re
import shutil
import statistics
import subprocess
import tempfile
import threading
import time

import engines as eng
import program
import tasks

N_WRITE = 33


class Reader(threading.Thread):
    """One process; first_s: from its start to its first byte of output."""

    def __init__(self, command):
        super().__init__(daemon=True)
        self.begin, self.first_s, self.end, self.text = time.perf_counter(), None, None, b""
        self.rss = 0
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def run(self):
        first = self.child.stdout.read(1)
        self.first_s = time.perf_counter() - self.begin
        self.text = first + self.child.stdout.read()
        self.child.wait()
        self.end = time.perf_counter()

    def memory(self):
        """Resident and proportional bytes now; 0 of a process that is gone."""
        try:
            with open("/proc/%d/smaps_rollup" % self.child.pid, encoding="ascii") as file:
                kib = dict(re.findall(r"^(Rss|Pss):\s+(\d+) kB", file.read(), re.M))
        except OSError:
            return 0, 0
        return int(kib.get("Rss", 0)) * 1024, int(kib.get("Pss", 0)) * 1024


def together(commands):
    """Readers that ran at the same time, and the largest sum of their proportional memory. Memory is looked at five times a
    second: the kernel walks a process's pages for it."""
    readers, most = [Reader(c) for c in commands], 0
    for r in readers:
        r.start()
    while any(r.is_alive() for r in readers):
        now = [r.memory() for r in readers]
        if all(pss for _, pss in now):  # a process that is left alone owns all pages again: moments with all count
            most = max(most, sum(pss for _, pss in now))
            for r, (rss, _) in zip(readers, now):
                r.rss = max(r.rss, rss)
        readers[0].join(0.2 if most else 0.02)
        time.sleep(0.02)
    failed = [r for r in readers if r.child.returncode]
    if failed:
        raise program.Failure("%d of %d readers failed with exit %d" % (len(failed), len(readers), failed[0].child.returncode))
    return readers, most


class Readers:
    """One store of one text with a pass key, asked by 1, 2, 4, ... processes."""

    def __init__(self, bench, n_tokens, data):
        kind, generator = tasks.contexts.generator(data)
        context = tasks.contexts.generated(generator, kind, "passkey", n_tokens, 0, "1", bench.kvfold.count, [0.5])[0]
        self.bench, self.n_tokens, self.question = bench, n_tokens, context.questions[0]
        self.spec, self.alone = eng.policy("infllm", n_tokens), None
        self.store = tempfile.mkdtemp(prefix="report-", dir=bench.engines.scratch)
        bench.kvfold.ingest(self.store, "text", context.text, self.spec)

    def close(self):
        shutil.rmtree(self.store, ignore_errors=True)

    def command(self, n_readers):
        k = self.bench.kvfold
        one = k.command("ask", "--store", self.store, "-d", "text", "-n", N_WRITE, "--ignore-eos", "--citations",
                                     0, *k.session(self.spec), "-q", self.question.text)
        at = one.index("-t") + 1
        return one[:at] + [str(max(1, k.threads // n_readers))] + one[at + 1:]

    def measure(self, n_readers):
        """The fields of a row."""
        if self.alone is None:
            self.alone = together([self.command(1)])[0][0].text  # also fills the page cache
        readers, pss = together([self.command(n_readers)] * n_readers)
        seconds = max(r.end for r in readers) - min(r.begin for r in readers)
        right = [float(any(a in r.text.decode(errors="replace") for a in self.question.answers)) for r in readers]
        out = {"n_readers": n_readers, "first_s": statistics.median(r.first_s for r in readers),
               "slowest_s": max(r.first_s for r in readers), "all_tps": n_readers * N_WRITE / seconds,
               "same": sum(r.text == self.alone for r in readers) / n_readers, "correct": sum(right) / n_readers,
               "each_threads": max(1, self.bench.kvfold.threads // n_readers)}
        if pss:  # None where all had ended before the first look
            out.update(rss_bytes=max(r.rss for r in readers), pss_bytes=pss // n_readers, all_pss_bytes=pss)
        return out


def run(bench, plan, data):
    """Rows of kind "readers": a row a count and round."""
    for n_tokens in plan.reader_tokens:
        todo = [(round_, n) for round_ in range(plan.rounds) for n in plan.readers
                if bench.missing("readers", "infllm", "readers-%d-%d" % (n_tokens, n), n_tokens, round_)]
        if not todo or bench.late(bench.reserved_s):
            continue
        readers = Readers(bench, n_tokens, data)
        try:
            for round_, n in todo:
                ident = "readers-%d-%d" % (n_tokens, n)
                if bench.late(bench.reserved_s):
                    return
                try:
                    got = readers.measure(n)
                except program.Failure as failure:
                    got = dict(bench.stumble("infllm", ident, failure), n_readers=n)
                bench.keep("readers", "infllm", ident, got, n_tokens=n_tokens, round=round_)
        finally:
            readers.close()
        program.say("%s %s readers of %d tokens" % (time.strftime("%H:%M:%S"), bench.model[:18], n_tokens))
