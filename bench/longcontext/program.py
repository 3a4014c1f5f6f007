"""program.py - the program kvfold as the benchmarks run it.

Every call is a process of its own, as a user's is; what it takes is measured from outside: seconds on
the wall, and memory by /proc while it runs.

SPDX-License-Identifier: Apache-2.0
"""
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.abspath(os.path.join(HERE, "..", ".."))
MODELS = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "kvfold", "models")


class Failure(Exception):
    """The program ended with an error; the text is its last line."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def find_program(given):
    for path in [given] if given else [os.path.join(ROOT, "build", "tools", "kvfold"),
                                       os.path.join(ROOT, "build-release", "tools", "kvfold")]:
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return os.path.abspath(path)
    sys.exit("there is no program kvfold in build/; build it, or name it with --kvfold")


def find_model(name):
    for path in (name, os.path.join(MODELS, name), os.path.join(MODELS, name + "-instruct-q4_k_m.gguf")):
        if os.path.isfile(path):
            return path
    fetch = [sys.executable, os.path.join(ROOT, "scripts", "fetch_model.py"), name, "--yes"]
    return subprocess.run(fetch, check=True, stdout=subprocess.PIPE).stdout.decode().strip()


class Memory(threading.Thread):
    """Peaks of a running process: what it holds itself (anonymous), and with mapped files."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.path, self.ended = "/proc/%d/status" % pid, threading.Event()
        self.anon = self.file = self.peak = 0

    def sample(self):
        try:
            with open(self.path, encoding="utf-8") as file:
                found = dict(re.findall(r"^(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB", file.read(), re.M))
        except OSError:
            return
        kib = {k: int(v) * 1024 for k, v in found.items()}
        self.anon = max(self.anon, kib.get("RssAnon", 0) + kib.get("RssShmem", 0))
        self.file = max(self.file, kib.get("RssFile", 0))
        self.peak = max(self.peak, kib.get("VmHWM", 0))

    def run(self):
        while not self.ended.wait(0.02):
            self.sample()


class Run:
    """What one process printed and took. first_s: start of the process to its first byte of output."""

    def __init__(self, command, stdin=None, watch=False):
        with tempfile.TemporaryFile() as errors:
            begin = time.perf_counter()
            child = subprocess.Popen(command, stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                                     stdout=subprocess.PIPE, stderr=errors)
            self.memory = Memory(child.pid)
            if watch:
                self.memory.start()
            if stdin is not None:
                threading.Thread(target=self._feed, args=(child.stdin, stdin), daemon=True).start()
            first = child.stdout.read(1)
            self.first_s = time.perf_counter() - begin
            text = first + child.stdout.read()
            # wait4 says what this child took; getrusage would say what the largest of all took.
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            self.seconds = time.perf_counter() - begin
            self.memory.ended.set()
            if watch:
                self.memory.join()
            self.max_rss = usage.ru_maxrss * 1024
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().split("\n")
        self.text = text.decode(errors="replace")
        if child.returncode:
            raise Failure("%s: exit %d: %s" % (command[1], child.returncode, without_paths(said[-1])[:400]))

    @staticmethod
    def _feed(pipe, data):
        try:
            pipe.write(data)
            pipe.close()
        except BrokenPipeError:
            pass

    def rows(self):
        return [json.loads(line) for line in self.text.splitlines() if line.strip()]


class Kvfold:
    """One program and one model. spec: as for --policy."""

    def __init__(self, program, model, threads, memory=None):
        self.program, self.model, self.threads, self.memory = program, model, threads, memory
        self.info = json.loads(Run([program, "inspect", model, "--json"]).text)

    def command(self, verb, *options):
        common = ["-m", self.model, "-t", str(self.threads), "--quiet"]
        return [self.program, verb] + common + [str(o) for o in options]

    def session(self, spec):
        return ["--policy", spec] + (["--memory", self.memory] if self.memory else [])

    def count(self, text):
        run = Run([self.program, "tokenize", "-m", self.model, "-t", str(self.threads), "--count", "-"], text.encode())
        return int(run.text)

    def ask(self, text, questions, spec, max_tokens, expected=()):
        """Answers, in order, or how likely the expected ones are; the text is read once by this process."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            options = ["-d", file.name, "-n", max_tokens, "--json"] + self.session(spec)
            return Run(self.command("ask", *options, *self.ask_options(questions, expected))).rows()

    def go_on(self, text, spec, max_tokens, expected=()):
        """The text itself continued, without a frame."""
        options = ["--raw", "-n", max_tokens, "--json"] + self.session(spec) + self.ask_options([], expected)
        return Run(self.command("ask", *options), text.encode()).rows()

    def ingest(self, store, name, text, spec, watch=False):
        """(what it printed, the run). The store is made if it is not there; spec/int8 makes it with that codec."""
        spec, _, codec = spec.partition("/")
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            run = Run(self.command("ingest", "--store", store, "-d", file.name, "--name", name, "--json",
                                   *self.session(spec), *(["--codec", codec] if codec else [])), watch=watch)
        return run.rows()[0], run

    def ask_stored(self, store, name, questions, spec, max_tokens, expected=()):
        options = ["--store", store, "-d", name, "-n", max_tokens, "--json"] + self.session(spec)
        return Run(self.command("ask", *options, *self.ask_options(questions, expected))).rows()

    @staticmethod
    def ask_options(questions, expected=()):
        return [part for q in questions for part in ("-q", q)] + [part for e in expected for part in ("--expect", e)]


# ---- Surroundings -------------------------------------------------------------------------

# What a hypervisor calls "AMD EPYC" and no more may be any of these; figures of one are none of another.
AMD_CORES = {23: [("Zen", 0x00, 0x2f), ("Zen", 0x50, 0x5f), ("Zen 2", 0x30, 0x4f), ("Zen 2", 0x60, 0x7f), ("Zen 2", 0x90, 0xaf)],
             25: [("Zen 3", 0x00, 0x0f), ("Zen 3", 0x20, 0x5f), ("Zen 4", 0x10, 0x1f), ("Zen 4", 0x60, 0xaf)],
             26: [("Zen 5", 0x00, 0x2f), ("Zen 5", 0x40, 0x4f), ("Zen 5", 0x60, 0x7f)]}


def amd_core(family, model):
    known = (core for core, first, last in AMD_CORES.get(family, []) if first <= model <= last)
    return next(known, "family %d model %d" % (family, model))


def cpu_name(path="/proc/cpuinfo"):
    """The processor's name; of AMD's without a number of a product with its core ("AMD EPYC Zen 3")."""
    with open(path, encoding="utf-8") as file:
        told = dict(re.findall(r"^([a-z][a-z _]*?)\s*:[ \t]*(.*)$", file.read().split("\n\n")[0], re.MULTILINE))
    name = told.get("model name", "").strip() or "unknown"
    if told.get("vendor_id") == "AuthenticAMD" and not re.search(r"\d", name):
        name += " " + amd_core(int(told.get("cpu family", 0)), int(told.get("model", 0)))
    return name


def cpu_slug(name=None):
    """A processor's name, this machine's if none is given, as results are named by it."""
    plain = re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*", "", (name or cpu_name()).lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def today():
    return datetime.date.today().isoformat()


def commit():
    try:
        git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return "unknown"
    return git.stdout.decode().strip() or "unknown"


def without_paths(text):
    """Of absolute paths the last part: what is kept in the repository names no folder of this machine."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\",]+/)*(?=[^\s/'\"]|['\"])", "", text)


def command_line(argv):
    return " ".join([os.path.basename(argv[0])] + [without_paths(a) for a in argv[1:]])
