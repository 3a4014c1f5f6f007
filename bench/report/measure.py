"""measure.py - runs what the plan names, engines in turn, and keeps every row as soon as it is there.

A row is a JSON object in rows.jsonl: kind "answer" (one engine, one question) or "cost" (one engine, one length,
one round), "likelihood" or "readers". What is there with the settings of today's program is not run again, so a stopped
run goes on, and a changed preset is measured anew. The rule that matters most: engines take
turns on each question and in each round, in an order that moves on by one, so that a noisy minute hits all.

SPDX-License-Identifier: Apache-2.0
"""
import datetime
import json
import os
import sys
import time

import engines as eng
import others
import program
import tasks
from program import say

QUESTIONS = ["What happens at the beginning?", "Who is spoken of at the end, and what do they do?"]
N_WRITE = 17
LIKELY = list(eng.POLICIES) + ["llama.cpp"]  # retrieval has no question to search by


class Rows:
    def __init__(self, path):
        self.path, self.all = path, []
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                self.all = [json.loads(line) for line in file if line.strip()]
        left, _ = others.without_stale(others.name_of(path), self.all, others.engine_of)
        self.done = {self.key(r): r.get("spec") for r in left}

    @staticmethod
    def key(r):
        return (r["kind"], r["model"], r["engine"], r["id"], r.get("round"), r.get("part"))

    def add(self, row):
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=True) + "\n")
        self.all.append(row)
        self.done[self.key(row)] = row.get("spec")

    def has(self, key, spec):
        """Is it there, with these settings? Rows that name no settings count."""
        return key in self.done and self.done[key] in (None, spec)


class Bench:
    """One model's part of the plan."""

    def __init__(self, engines, rows, plan, commit):
        self.engines, self.rows, self.plan, self.turn = engines, rows, plan, 0
        self.kvfold = engines.kvfold
        self.model = os.path.basename(self.kvfold.model).replace(".gguf", "")
        self.head = {"model": self.model, "commit": commit, "threads": self.kvfold.threads}
        self.lacking = engines.lacking()
        self.names = [n for n in plan.engines if n not in self.lacking]
        self.deadline = time.time() + plan.minutes * 60 if plan.minutes else None
        self.length_s = {}  # seconds of the last round at a length
        self.reserved_s = 0.0  # of the time that is left: for the rounds of costs that are still to come

    def late(self, reserved_s=0.0):
        return self.deadline is not None and time.time() > self.deadline - reserved_s

    def in_turn(self, names):
        self.turn += 1
        at = self.turn % max(1, len(names))
        return names[at:] + names[:at]

    def keep(self, kind, name, ident, fields, **more):
        row = dict(self.head, kind=kind, engine=name, id=ident,
                   date=datetime.datetime.now().isoformat(timespec="seconds"), load=round(os.getloadavg()[0], 1))
        row.update(more)
        row["spec"] = self.engines.settings(name, row["n_tokens"])
        row.update({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()})
        self.rows.add(row)

    def missing(self, kind, name, ident, n_tokens, round_=None, part=None):
        return not self.rows.has((kind, self.model, name, ident, round_, part), self.engines.settings(name, n_tokens))

    def stumble(self, name, ident, failure):
        """A failure is a result, too: the row says what was said, and has no score."""
        say("  %s on %s: %s" % (name, ident, failure))
        return {"error": program.without_paths(str(failure))[:200]}

    # ---- Quality ----

    def runs_here(self, name, case):
        if name == "llama.cpp+slot" or not self.engines.fits(name, case.n_tokens):
            return False
        if case.context.raw:  # the text itself goes on: there is no question to search by
            return name not in eng.RETRIEVAL and not name.startswith("llama.cpp")
        return name != "llama.cpp" or case.n_tokens <= self.plan.llama_answers_to

    def answers(self, part, cases):
        for i, case in enumerate(cases):
            if self.late(self.reserved_s):
                say("out of time after %d of %d cases" % (i, len(cases)))
                return
            names = [n for n in self.names if self.runs_here(n, case) and
                     self.missing("answer", n, case.question.ident, case.n_tokens, None, part)]
            for name in self.in_turn(names):
                try:
                    got = self.engines.answer(name, case)
                    got["score"] = round(case.question.score(got["prediction"]), 4)
                    got["prediction"] = got["prediction"][:300]
                except program.Failure as failure:
                    got = self.stumble(name, case.question.ident, failure)
                depth = case.question.depth
                self.keep("answer", name, case.question.ident, got, part=part, task=case.task, group=tasks.kind_of(case.task),
                          n_tokens=case.n_tokens, length=case.length, depth=None if depth is None else round(depth, 3))
            if names:
                say("%s %s %d/%d %s, %d tokens" % (time.strftime("%H:%M:%S"), self.model[:18], i + 1, len(cases),
                                                    case.question.ident, case.n_tokens))

    # ---- Likelihood ----

    def likelihoods(self, samples):
        """Mean negative log-likelihood of what a text goes on with, in nats a token; lower is better."""
        for ident, context, going_on, n_tokens in samples:
            n = n_tokens + self.kvfold.count(going_on)
            names = [e for e in LIKELY if e in self.names and n <= self.engines.trained and
                     (e != "llama.cpp" or n_tokens <= self.plan.llama_to) and self.missing("likelihood", e, ident, n_tokens)]
            for name in self.in_turn(names):
                if self.late(self.reserved_s):
                    return
                got = self.attempt(lambda: {name: self.engines.likelihood(name, context, going_on, n_tokens)}, name,
                                   ident, [name])
                self.keep("likelihood", name, ident, got[name], n_tokens=n_tokens)
            if names:
                say("%s %s likelihood of %s after %d tokens" % (time.strftime("%H:%M:%S"), self.model[:18], ident, n_tokens))

    # ---- Cost ----

    def cost_case(self, name, text, n_tokens, round_):
        ident = "cost-%d" % n_tokens
        if name.startswith("llama.cpp"):
            if n_tokens > self.plan.llama_to or not self.missing("cost", "llama.cpp", ident, n_tokens, round_):
                return
            found = self.attempt(lambda: self.engines.cost_llama(text, n_tokens, QUESTIONS, N_WRITE), name, ident,
                                 ["llama.cpp", "llama.cpp+slot"])
        else:
            if not self.missing("cost", name, ident, n_tokens, round_):
                return
            found = self.attempt(lambda: {name: self.engines.cost(name, text, n_tokens, QUESTIONS, N_WRITE)}, name,
                                 ident, [name])
        for engine, fields in found.items():
            self.keep("cost", engine, ident, fields, n_tokens=n_tokens, round=round_)

    def attempt(self, measure, name, ident, names):
        try:
            return measure()
        except program.Failure as failure:
            return {n: self.stumble(name, ident, failure) for n in names}

    def costs(self, text_of, rounds):
        for round_ in rounds:
            for n_tokens in self.plan.cost_lengths:
                begin = time.time()
                names = [n for n in self.names if n != "llama.cpp+slot" and self.engines.fits(n, n_tokens)]
                for name in self.in_turn(names):
                    if self.late():
                        say("out of time in round %d of the costs" % (round_ + 1))
                        return
                    self.cost_case(name, text_of(n_tokens), n_tokens, round_)
                self.length_s[n_tokens] = time.time() - begin
                say("%s %s cost round %d, %d tokens" % (time.strftime("%H:%M:%S"), self.model[:18], round_ + 1, n_tokens))


def lengths_in_time(length_s, rounds_left, seconds):
    """The lengths, shortest first, whose remaining rounds fit into the seconds: three rounds of few lengths give ratios,
    one of many gives none. The shortest always stays."""
    kept, spent = [], 0.0
    for n_tokens in sorted(length_s):
        spent += length_s[n_tokens] * rounds_left
        if kept and spent > seconds:
            break
        kept.append(n_tokens)
    return kept


class Texts:
    """Beginnings of one long text with a given number of tokens, to a percent."""

    def __init__(self, kvfold, data):
        _, found = tasks.contexts.find_books(data)
        self.kvfold, self.book, self.cuts = kvfold, "\n\n".join(t for _, t in sorted(found)), {}

    def __call__(self, n_tokens):
        if n_tokens not in self.cuts:
            n_chars = int(n_tokens * 4.2)
            for _ in range(6):
                text = (self.book * (n_chars // len(self.book) + 1))[:n_chars]
                n = self.kvfold.count(text)
                if 0.99 * n_tokens <= n <= n_tokens:
                    break
                n_chars = int(n_chars * n_tokens * 0.997 / max(1, n))
            self.cuts[n_tokens] = text
        return self.cuts[n_tokens]


def machine():
    """What the figures were measured on."""
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = int(file.readline().split()[1]) / (1 << 20)
    flags = ""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("flags"):
                flags = line
                break
    has = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16") if f in flags.split()]
    return {"cpu": program.cpu_name(), "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory, 1),
            "features": " ".join(has), "system": " ".join((os.uname().sysname, os.uname().release.split("-")[0])),
            "python": sys.version.split()[0], "energy": bool(eng.Joules().paths)}
