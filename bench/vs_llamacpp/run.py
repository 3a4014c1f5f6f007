#!/usr/bin/env python3
"""run.py - kvfold against llama.cpp: same file, same threads, the two engines in turn.

    run.py [--models NAME,...] [--cases pp512,tg0,...] [--pairs 3] [--threads N] [--quick]

Cases: ppN      tokens/s of prefill of N tokens, in batches of 512
       tgD      tokens/s of decoding 32 tokens at depth D
       ptD      both at once, for the long cases: prefill of D tokens, then 32 tokens; two rows
       first    seconds from process start to the first token after a 30-token prompt
       memory   peak bytes of a process that reads 4096 tokens and writes 8
       readNk   tokens/s of reading a text of N * 1024 tokens: kvfold ingest into a new store, llama.cpp
                dense; read32k is 15 minutes and more a pair on 2 cores, so name the best --settings
         onceNk prompt tokens / seconds to the first token of an answer, one question about a text of N * 1024
                tokens: kvfold ask as it comes (lazyllm), llama.cpp dense

A pair is one run of kvfold and one of llama.cpp, each in a process of its own, one after the
other, so that a noisy minute hits both. llama.cpp runs with and without flash attention and with
and without repacked weights; a setting clearly slower on the first pair is dropped, and the
fastest of each pair counts. The ratio is that of the medians over all pairs (three at least);
--quick takes one pair and prints no ratio as a result.

Everything goes to bench/results/vs_llamacpp/DATE-CPU.csv, one row per case, and beside it a table
in Markdown. llama.cpp comes from llama-cpp-python 0.3.36: in the interpreter that --python names,
or built by pip into build/venv-llamacpp (minutes, once).

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import atexit
import csv
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "longcontext"))
import contexts  # noqa: E402
import program  # noqa: E402
from program import say  # noqa: E402

ROOT = os.path.abspath(os.path.join(HERE, "..", ".."))
RUNNER = os.path.join(HERE, "llama_runner.py")
PEER = "llama-cpp-python==0.3.36"
MIN_PAIRS = 3
GEN = 32
READ_POLICY = "infllm"
CASES = ["pp512", "tg0", "first", "memory", "pp4096", "tg4096", "pp16384", "tg16384"]
MODELS = {
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
}
# Whole-project goals: the least ratio kvfold / llama.cpp (of times and bytes: the greatest).
GOALS = {"pp512": 2.5, "pp4096": 2.5, "pp16384": 2.5, "tg0": 1.1, "tg4096": 1.2, "tg16384": 1.3,
         "first": 1.0, "memory": 1.1, "read32k": 8.0, "once8k": 6.0}
SMALL_IS_GOOD = ("first", "memory")
# A setting of llama.cpp slower than the best by this much on the first pair is not run again.
DROP = 1.05


class Crash(Exception):
    pass


def run(command, what):
    """Standard output, seconds, and peak bytes of one child process."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        text, errors = out.read().decode(), err.read().decode(errors="replace")
    if child.returncode:
        how = "signal %d" % -child.returncode if child.returncode < 0 else "status %d" % child.returncode
        raise Crash("%s ended with %s: %s" % (what, how, errors.strip()[-400:]))
    return text, seconds, usage.ru_maxrss * 1024


# ---- The two engines --------------------------------------------------------------------

class Kvfold:
    def __init__(self, program, threads):
        self.program, self.threads = program, threads

    def command(self, model, n_prompt, n_gen, depth):
        return [self.program, "bench", "-m", model, "-p", str(n_prompt), "-n", str(n_gen),
                "-d", str(depth), "-t", str(self.threads), "-r", "1", "--json"]

    def rate(self, model, n_prompt, n_gen, depth):
        text, _, _ = run(self.command(model, n_prompt, n_gen, depth), "kvfold bench")
        rows = json.loads(text)
        rows = [r for r in rows if bool(r["n_gen"]) == bool(n_gen) and bool(r["n_prompt"]) == bool(n_prompt)]
        return rows[0]["avg_ts"]

    def first(self, model):
        """Wall time of the whole process that reads a prompt of about 30 tokens and writes one."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as document:
            document.write("The shop opens at nine.\n")
            document.flush()
            command = [self.program, "ask", "-m", model, "-d", document.name, "-t", str(self.threads),
                       "--max-tokens", "1", "--json", "When?"]
            text, seconds, _ = run(command, "kvfold ask")
        return seconds, json.loads(text)["stats"]["n_prompt_tokens"]

    def read_long(self, model, n_tokens, shared):
        """Tokens/s of reading a text into a new store, by the program's own clock: without loading."""
        if "text" not in shared:
            shared["text"] = long_text(self.program, model, n_tokens)
        with tempfile.TemporaryDirectory() as folder:
            command = [self.program, "ingest", "-m", model, "-t", str(self.threads), "--quiet", "--json",
                       "--policy", READ_POLICY, "--store", os.path.join(folder, "store"), "-d", shared["text"]]
            document = json.loads(run(command, "kvfold ingest")[0])["documents"][0]
        shared["n_prompt"] = document["n_computed_tokens"]
        return document["tokens_per_s"]

    def once(self, model, n_tokens, shared):
        """Prompt tokens a second until the first token of the answer, by the program's own clock."""
        if "text" not in shared:
            shared["text"] = long_text(self.program, model, n_tokens)
        command = [self.program, "ask", "-m", model, "-d", shared["text"], "-t", str(self.threads),
                   "--max-tokens", "1", "--json", "What is this text about?"]
        stats = json.loads(run(command, "kvfold ask")[0])["stats"]
        shared["n_prompt"] = stats["n_prompt_tokens"]
        return stats["n_prompt_tokens"] / stats["ttft_ms"] * 1e3

    def memory(self, model):
        # One run that reads 4096 tokens and then writes: the depth is the prompt.
        return run(self.command(model, 0, 8, 4096), "kvfold bench")[2]


class Llama:
    def __init__(self, python, threads):
        self.python, self.threads = python, threads
        self.settings = [(fa, repack) for repack in (1, 0) for fa in (1, 0)]
        self.notes = []
        self.baseline = run([python, RUNNER, "-m", "none", "--nothing"], "llama_runner.py")[2]

    def call(self, model, setting, *options):
        command = [self.python, RUNNER, "-m", model, "-t", str(self.threads), "--fa", str(setting[0]),
                   "--repack", str(setting[1])] + [str(o) for o in options]
        return run(command, "llama.cpp fa=%d repack=%d" % setting)

    def each(self, settings, measure):
        """measure(setting) for every setting; one that crashes is dropped for good, and noted."""
        results = {}
        for setting in list(settings):
            try:
                results[setting] = measure(setting)
            except Crash as crash:
                note = "left out: " + str(crash).split("\n")[0][:160].rstrip(": ")
                say("  " + note)
                self.notes.append(note)
                self.settings.remove(setting)
        if not results:
            raise Crash("llama.cpp ran with no setting")
        return results


# ---- Cases ------------------------------------------------------------------------------

def long_text(program, model, n_tokens):
    """Path of a text with at most n tokens, hardly fewer; it goes when this process ends."""
    _, texts = contexts.find_books(os.environ.get("KVFOLD_DATA"))
    book = "\n\n".join(text for _, text in sorted(texts))
    folder = tempfile.mkdtemp(prefix="vs-llamacpp-")
    atexit.register(shutil.rmtree, folder, True)
    path, n_chars = os.path.join(folder, "text.txt"), n_tokens * 4
    for _ in range(6):
        with open(path, "w", encoding="utf-8") as file:
            file.write((book * (n_chars // len(book) + 1))[:n_chars])
        n = int(run([program, "tokenize", "-m", model, "--count", path], "kvfold tokenize")[0])
        if 0.998 * n_tokens <= n + 32 <= n_tokens:
            break
        n_chars = int(n_chars * (n_tokens - 32) * 0.9995 / n)
    return path


def measure_kvfold(kvfold, case, model, shared):
    if case == "first":
        seconds, shared["n_prompt"] = kvfold.first(model)
        return seconds
    if case == "memory":
        return kvfold.memory(model)
    if case.startswith("read"):
        return kvfold.read_long(model, int(case[4:-1]) * 1024, shared)
    if case.startswith("once"):
        return kvfold.once(model, int(case[4:-1]) * 1024, shared)
    n = int(case[2:])
    return kvfold.rate(model, n, 0, 0) if case.startswith("pp") else kvfold.rate(model, 0, GEN, n)


def measure_llama(llama, case, model, settings, shared):
    def one(setting):
        if case == "first":
            # Without the start of Python and its imports: the runner times from loading on.
            text, _, _ = llama.call(model, setting, "--first-token", shared["n_prompt"])
            return json.loads(text)[0]["seconds"]
        if case == "memory":
            # Without what Python and the bindings take before a model is loaded.
            return llama.call(model, setting, "-n", 8, "-d", 4096)[2] - llama.baseline
        if case.startswith(("read", "once")):
            return json.loads(llama.call(model, setting, "-p", shared["n_prompt"])[0])[0]["avg_ts"]
        n = int(case[2:])
        if case.startswith("pp"):
            return json.loads(llama.call(model, setting, "-p", n)[0])[0]["avg_ts"]
        return json.loads(llama.call(model, setting, "-n", GEN, "-d", n)[0])[-1]["avg_ts"]
    return llama.each(settings, one)


def keep_good(results, small_is_good):
    best = min(results.values()) if small_is_good else max(results.values())
    return [s for s, v in results.items() if (v / best if small_is_good else best / v) <= DROP]


def summary(case, ours, theirs, setting):
    best = min if case in SMALL_IS_GOOD else max
    return {"case": case, "kvfold_best": best(ours), "kvfold_median": statistics.median(ours),
            "llama_best": best(theirs), "llama_median": statistics.median(theirs),
            "llama_fa": setting[0], "llama_repack": setting[1], "pairs": len(ours),
            "kvfold_all": " ".join("%.4g" % v for v in ours), "llama_all": " ".join("%.4g" % v for v in theirs)}


def run_both(kvfold, llama, depth, model, n_pairs):
    """Rows ppD and tgD from one process each: llama.cpp reads a long prompt once, not twice."""
    setting, ours, theirs = llama.settings[0], ([], []), ([], [])
    for pair in range(n_pairs):
        ours[0].append(kvfold.rate(model, depth, 0, 0))
        ours[1].append(kvfold.rate(model, 0, GEN, depth))
        rows = json.loads(llama.call(model, setting, "-n", GEN, "-d", depth)[0])
        for values, r in zip(theirs, rows):
            values.append(r["avg_ts"])
        say("  pair %d: read %.1f and %.1f, write %.1f and %.1f t/s" % (
            pair + 1, ours[0][-1], theirs[0][-1], ours[1][-1], theirs[1][-1]))
    return [summary("%s%d" % (what, depth), o, t, setting) for what, o, t in zip(("pp", "tg"), ours, theirs)]


def run_case(kvfold, llama, case, model, n_pairs):
    small = case in SMALL_IS_GOOD
    settings, ours, theirs, chosen, shared = list(llama.settings), [], [], None, {}
    for pair in range(n_pairs):
        ours.append(measure_kvfold(kvfold, case, model, shared))
        results = measure_llama(llama, case, model, settings, shared)
        chosen = (min if small else max)(results, key=results.get)
        theirs.append(results[chosen])
        settings = keep_good(results, small)
        say("  %s pair %d: kvfold %s, llama.cpp %s (fa=%d repack=%d)" % (
            (case, pair + 1, show(case, ours[-1]), show(case, theirs[-1])) + chosen))
    return [summary(case, ours, theirs, chosen)]


def show(case, value):
    if case == "first":
        return "%.0f ms" % (value * 1e3)
    if case == "memory":
        return "%.0f MB" % (value / 1e6)
    return "%.1f t/s" % value


# ---- Surroundings -----------------------------------------------------------------------

def find_python(given):
    """An interpreter with llama-cpp-python; built by pip on this machine when none is given."""
    if given:
        return given
    venv = os.path.join(ROOT, "build", "venv-llamacpp")
    python = os.path.join(venv, "bin", "python")
    if not os.path.exists(python):
        say("building %s in %s; this takes some minutes" % (PEER, venv))
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True)
    return python


def find_kvfold(given):
    for path in [given] if given else [os.path.join(ROOT, "build", "tools", "kvfold"),
                                       os.path.join(ROOT, "build", "kvfold")]:
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    sys.exit("run.py: there is no program kvfold in build/; build it, or name it with --kvfold")


def find_model(name):
    if os.path.exists(name):
        return name
    fetch = [sys.executable, os.path.join(ROOT, "scripts", "fetch_model.py"), name, "--yes"]
    return subprocess.run(fetch, check=True, stdout=subprocess.PIPE).stdout.decode().strip()


def write_results(rows, folder, quick):
    os.makedirs(folder, exist_ok=True)
    stem = "%s-%s%s" % (datetime.date.today().isoformat(), program.cpu_slug(), "-quick" if quick else "")
    path = os.path.join(folder, stem + ".csv")
    new = not os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    # The table shows the last row of every case of the day, so that cases may be run one by one.
    with open(path, newline="") as file:
        last = {(r["model"], r["case"]): r for r in csv.DictReader(file)}
    return path, list(last.values())


def table(rows, notes, quick):
    lines = ["# kvfold against llama.cpp", "",
             "%s, %s threads, commit %s, llama.cpp of %s." % (
                 rows[0]["machine"], rows[0]["threads"], rows[0]["commit"], PEER), "",
             "| model | case | kvfold | llama.cpp | ratio | goal |", "|---|---|---|---|---|---|"]
    for r in rows:
        small = r["case"] in SMALL_IS_GOOD
        goal = GOALS.get(r["case"])
        goal = "" if goal is None else "%s %.1f" % ("<=" if small else ">=", goal)
        lines.append("| %s | %s | %s | %s | %s | %s |" % (
            r["model"], r["case"], show(r["case"], float(r["kvfold_median"])),
            show(r["case"], float(r["llama_median"])),
            "(too few pairs)" if quick else "%.2f" % float(r["ratio"]), goal))
    lines += ["", "Medians over pairs run in turn (%s); the CSV file beside has every value." % rows[0]["pairs"],
              "Ratios are kvfold / llama.cpp."]
    lines += ["", "Notes:", ""] + ["- " + n for n in notes] if notes else []
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nSPDX")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names or paths (%(default)s)")
    parser.add_argument("--cases", default=",".join(CASES), help="(%(default)s)")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="one pair, no ratio: a look, not a result")
    parser.add_argument("--settings", help="of llama.cpp, FA:REPACK,... (default: all four on the first pair); "
                        "for the long cases, when a short one has shown which is fastest")
    parser.add_argument("--python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--kvfold", help="the program (build/tools/kvfold)")
    parser.add_argument("--out", default=os.path.join(ROOT, "bench", "results", "vs_llamacpp"))
    args = parser.parse_args()
    if args.pairs < MIN_PAIRS and not args.quick:
        parser.error("a ratio needs %d pairs at least; for a look at one pair use --quick" % MIN_PAIRS)
    n_pairs = 1 if args.quick else args.pairs
    for case in args.cases.split(","):
        if not re.fullmatch(r"p[pt][1-9]\d*|tg\d+|(read|once)[1-9]\d*k|first|memory", case):
            parser.error("unknown case '%s'" % case)

    busy = os.getloadavg()[0]
    if busy > 0.3:
        say("the machine is not idle (load %.1f): figures will be low and uneven" % busy)
    kvfold = Kvfold(find_kvfold(args.kvfold), args.threads)
    llama = Llama(find_python(args.python), args.threads)
    if args.settings:
        llama.settings = [tuple(int(x) for x in s.split(":")) for s in args.settings.split(",")]
    rows = []
    for name in args.models.split(","):
        model = find_model(name)
        for case in args.cases.split(","):
            say("%s %s" % (name, case))
            head = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "machine": program.cpu_name(),
                    "commit": program.commit(), "threads": args.threads, "load_before": "%.1f" % os.getloadavg()[0],
                    "model": os.path.basename(model).replace(".gguf", "")}
            found = (run_both(kvfold, llama, int(case[2:]), model, n_pairs) if case.startswith("pt") else
                     run_case(kvfold, llama, case, model, n_pairs))
            for result in found:
                row = dict(head, **result)
                row["ratio"] = "" if args.quick else row["kvfold_median"] / row["llama_median"]
                row["command"] = shlex_join(sys.argv)
                rows.append(row)
            # After every case: a long run that is stopped keeps what it has measured.
            path, shown = write_results(rows[-len(found):], args.out, args.quick)
    rows = shown
    text = table(rows, llama.notes, args.quick)
    with open(path[:-4] + ".md", "w") as file:
        file.write(text)
    print(text)
    say("written to %s" % os.path.relpath(path))


def shlex_join(argv):
    # Paths of the machine are left out: the row is kept in the repository.
    return " ".join([os.path.basename(argv[0])] + [re.sub(r"=?/\S+/", lambda m: m.group(0)[:1].replace("/", ""), a)
                                                   for a in argv[1:]])


if __name__ == "__main__":
    if not shutil.which("git"):
        say("git is not here: the commit will be unknown")
    try:
        main()
    except Crash as crash:
        sys.exit("run.py: %s" % crash)
    except KeyboardInterrupt:
        sys.exit(130)
