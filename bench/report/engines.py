"""engines.py - the alternatives: what a person could use to have a question about a long text answered.

Every engine answers a case (quality) and is timed on a text with two questions (cost), by processes of its own.
The rule that matters most: all that drop tokens read the same budget, so that a score says how well they choose
and not how much they read. Texts below FAR tokens get a budget of about 1,000 tokens, longer ones that of
infllm's defaults.

    aware      the question is known while the text is read, so a second question reads again or reads what the
               first one left (lazyllm, snapkv, retrieval)
    agnostic   the text is read once for all questions (full, window, keydiff, infllm, llama.cpp)

SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "longcontext"))
import minilm  # noqa: E402
import program  # noqa: E402
import rag  # noqa: E402

FAR = 8192
NEAR_BUDGET, FAR_BUDGET = 960, 4224
SYSTEM = "You are a helpful assistant. Answer from the given text only."
NEAR_INFLLM = "init=64,window=512,block=32,topk=12,chunk=256"
NEAR_PAPER = "init=64,window=512,block=64,topk=6,chunk=256,select=paper"

# name: (kind, policy for texts below FAR, policy from there on); %d is the budget
POLICIES = {
    "full": ("agnostic", "full", "full"),
    "window": ("agnostic", "window:sink=64,window=896", "window:sink=128,window=4096"),
    "keydiff": ("agnostic", "keydiff:budget=960", "keydiff:budget=4224"),
    "infllm": ("agnostic", "infllm:" + NEAR_INFLLM, "infllm"),
    "infllm-paper": ("agnostic", "infllm:" + NEAR_PAPER, "infllm:select=paper,window=2048"),
    "snapkv": ("aware", "snapkv:budget=960", "snapkv:budget=4224"),
    "lazyllm": ("aware", "lazyllm", "lazyllm"),
    "lazyllm-fast": ("aware", "lazyllm:preset=fast", "lazyllm:preset=fast"),
    "infllm+lazyllm": ("aware", "infllm:%s+lazyllm" % NEAR_INFLLM, "infllm+lazyllm"),
}
STORED = ("infllm", "infllm-paper")  # read once into a store, asked from there
# name: (ranker, policy that reads the prompt, budgets a prompt holds)
RETRIEVAL = {"rag-bm25": ("bm25", "full", 1), "rag-minilm": ("minilm", "full", 1),
             "rag-bm25+lazyllm": ("bm25", "lazyllm", 2)}
WORDS = {
    "full": "kvfold, everything is read (`--policy full`)",
    "window": "first and most recent tokens only (arXiv:2309.17453)",
    "keydiff": "drops keys that are like the others (arXiv:2504.15364)",
    "infllm": "kvfold's memory: first tokens, a window, and the blocks that match best",
    "infllm-paper": "the same with the published selection (arXiv:2402.04617)",
    "snapkv": "after reading keeps what the question looks at (arXiv:2404.14469)",
    "lazyllm": "prunes tokens between layers, preset balanced (arXiv:2407.14057)",
    "lazyllm-fast": "the same, preset fast",
    "infllm+lazyllm": "both at once, for one question",
    "rag-bm25": "512-token passages by BM25, the best ones fill the budget, read in full",
    "rag-minilm": "the same, ranked by embeddings of all-MiniLM-L6-v2, computed with NumPy",
    "rag-bm25+lazyllm": "twice the budget of passages, read with lazyllm",
    "llama.cpp": "everything is read, by llama.cpp; prompt cache for the second question",
    "llama.cpp+slot": "the same, its state saved to a file and restored",
}
NAMES = list(WORDS)


def kind(name):
    if name in POLICIES:
        return POLICIES[name][0]
    return "agnostic" if name.startswith("llama.cpp") else "aware"


def budget(n_tokens):
    return NEAR_BUDGET if n_tokens < FAR else FAR_BUDGET


def policy(name, n_tokens):
    if name in RETRIEVAL:
        return RETRIEVAL[name][1]
    return POLICIES[name][1 if n_tokens < FAR else 2]


def kept(name, n_tokens, n_prompt):
    """Tokens whose keys and values the writing of the answer can read, at most."""
    if name in ("full", "lazyllm", "lazyllm-fast", "llama.cpp", "llama.cpp+slot"):
        return n_prompt
    return min(n_prompt, budget(n_tokens) * (RETRIEVAL[name][2] if name in RETRIEVAL else 1))


class Joules:
    """Energy of the processor's packages by RAPL, where the machine tells it."""
    FOLDER = "/sys/class/powercap"

    def __init__(self):
        found = sorted(os.listdir(self.FOLDER)) if os.path.isdir(self.FOLDER) else []
        paths = [os.path.join(self.FOLDER, f, "energy_uj") for f in found if f.count(":") == 1]
        self.paths = [p for p in paths if os.access(p, os.R_OK)]

    def read(self):
        try:
            return sum(int(open(p, encoding="ascii").read()) for p in self.paths) / 1e6 if self.paths else None
        except OSError:
            return None


class Engines:
    """All of them on one model. python: an interpreter that has llama_cpp, or None."""

    def __init__(self, kvfold, python, scratch=None):
        self.kvfold, self.python, self.scratch = kvfold, python, scratch
        self.trained, self.joules = kvfold.info["n_ctx_train"], Joules()
        self.indexes, self.printed = {}, {}

    def settings(self, name, n_tokens):
        """What the program says that this policy is, every option spelt out: rows of other settings do not count. '' for
        llama.cpp, whose settings do not change."""
        if name.startswith("llama.cpp"):
            return ""
        spec = policy(name, n_tokens)
        if spec not in self.printed:
            run = program.Run(self.kvfold.command("perplexity", "--json", "--policy", spec, "-"), b"One, two, three.")
            self.printed[spec] = json.loads(run.text)["policy"]
        how = "%s, %d tokens: " % (RETRIEVAL[name][0], budget(n_tokens) * RETRIEVAL[name][2]) if name in RETRIEVAL else ""
        return how + self.printed[spec]

    def lacking(self):
        """name -> the sentence that says why it cannot run here."""
        out = {}
        if minilm.why_not():
            out["rag-minilm"] = minilm.why_not()
        why = None
        if not self.python:
            why = "no interpreter has llama-cpp-python (pip install llama-cpp-python, or --python)"
        elif self.kvfold.info["chat_template"] != "chatml":
            why = "this model's chat frame is not ChatML, in which its questions would be put"
        if why:
            out["llama.cpp"] = out["llama.cpp+slot"] = why
        return out

    def fits(self, name, n_tokens):
        """Full attention and what reads a whole text stop at the trained length."""
        return name.startswith(("infllm", "rag-")) or n_tokens + 96 <= self.trained

    # ---- One question, one text ----

    def index(self, name, text):
        """(index, seconds of making it); kept for the questions that follow on the same text."""
        key = (RETRIEVAL[name][0], text)
        if key not in self.indexes:
            if len(self.indexes) > 4:
                self.indexes.clear()
            begin = time.perf_counter()
            made = rag.Index(self.kvfold, text, RETRIEVAL[name][0])
            self.indexes[key] = (made, time.perf_counter() - begin)
        return self.indexes[key]

    def answer(self, name, case):
        """Fields of a row for one case."""
        n, question = case.n_tokens, case.question
        if name == "llama.cpp":
            said = self.llama(case.context.text, [question.text], question.max_tokens, n)
            got = said["answers"][0]
            return {"prediction": got["answer"], "first_s": round(got["first_s"], 4),
                    "total_s": round(got["first_s"] + got["write_s"], 4), "n_prompt": said["n_text"] + got["n_question"],
                    "n_computed": said["n_text"] + got["n_question"], "n_kept": said["n_text"] + got["n_question"]}
        prepared, text = 0.0, case.context.text
        if name in RETRIEVAL:
            index, made_s = self.index(name, text)
            begin = time.perf_counter()
            text = index.prompt(question.text, budget(n) * RETRIEVAL[name][2])
            prepared = made_s + time.perf_counter() - begin
        if case.context.raw:
            got = self.kvfold.go_on(text, policy(name, n), question.max_tokens)[0]
        else:
            got = self.kvfold.ask(text, [question.text], policy(name, n), question.max_tokens)[0]
        s = got["stats"]
        return {"prediction": got["answer"], "first_s": round(prepared + s["ttft_ms"] / 1e3, 4),
                "total_s": round(prepared + s["total_ms"] / 1e3, 4), "n_prompt": s["n_prompt_tokens"],
                "n_computed": round(s["n_computed_tokens"] * s.get("read_share", 1)),
                "n_kept": kept(name, n, s["n_prompt_tokens"])}

    def likelihood(self, name, context, going_on, n_tokens):
        """Of the tokens of going_on after context, which is read as a prompt: what a policy drops then is gone."""
        if name == "llama.cpp":
            said = self.llama(context, [], 0, n_tokens, going_on=going_on)
            return {"nll": said["nll"], "n_scored": said["n_scored"]}
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="") as file:
            file.write(context)
            file.flush()
            options = ["--json", "--given", file.name] + self.kvfold.session(policy(name, n_tokens))
            said = json.loads(program.Run(self.kvfold.command("perplexity", *options, "-"), going_on.encode()).text)
        return {"nll": said["mean_nll"], "n_scored": said["n_scored"]}

    # ---- What two questions about one text cost ----

    def cost(self, name, text, n_tokens, questions, n_write):
        before = self.joules.read()
        if name in RETRIEVAL:
            out = self.cost_retrieval(name, text, n_tokens, questions, n_write)
        elif name in STORED:
            out = self.cost_stored(name, text, n_tokens, questions, n_write)
        else:
            out = self.cost_policy(name, text, n_tokens, questions, n_write)
        after = self.joules.read()
        if before is not None and after is not None and after >= before:
            out["joules"] = round(after - before, 3)
        return out

    @staticmethod
    def started_s(run, stats):
        """From the start of the process to the first token: what came out first is the whole first answer."""
        return run.first_s - (stats["total_ms"] - stats["ttft_ms"]) / 1e3

    def ask(self, text, questions, spec, n_write):
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            options = ["-d", file.name, "-n", n_write, "--ignore-eos", "--citations", 0, "--json"]
            options += self.kvfold.session(spec) + self.kvfold.ask_options(questions)
            run = program.Run(self.kvfold.command("ask", *options), watch=True)
        return [r["stats"] for r in run.rows()], run

    @staticmethod
    def from_stats(stats, run):
        s = stats[0]
        return {"first_s": s["ttft_ms"] / 1e3, "read_tps": s["n_prompt_tokens"] * 1e3 / s["ttft_ms"],
                "write_tps": s["decode_tps"], "peak_bytes": run.max_rss, "kv_bytes": s["kv_bytes"], "disk_bytes": 0,
                "n_computed": round(s["n_computed_tokens"] * s.get("read_share", 1)), "n_prompt": s["n_prompt_tokens"]}

    def cost_policy(self, name, text, n_tokens, questions, n_write):
        stats, run = self.ask(text, questions, policy(name, n_tokens), n_write)
        out = self.from_stats(stats, run)
        out.update(second_s=stats[1]["ttft_ms"] / 1e3, restart_s=self.started_s(run, stats[0]),
                   n_kept=kept(name, n_tokens, out["n_prompt"]))
        return out

    def cost_retrieval(self, name, text, n_tokens, questions, n_write):
        self.indexes.clear()
        index, made_s = self.index(name, text)
        selected, stats, runs = [], [], []
        for question in questions[:2]:
            begin = time.perf_counter()
            prompt = index.prompt(question, budget(n_tokens) * RETRIEVAL[name][2])
            selected.append(time.perf_counter() - begin)
            got, run = self.ask(prompt, [question], policy(name, n_tokens), n_write)
            stats.append(got[0])
            runs.append(run)
        opened_s, n_bytes = self.reopened(index)
        out = self.from_stats(stats, runs[0])
        out["first_s"] = made_s + selected[0] + stats[0]["ttft_ms"] / 1e3
        out.update(read_tps=n_tokens / out["first_s"], second_s=selected[1] + stats[1]["ttft_ms"] / 1e3,
                   restart_s=opened_s + selected[0] + self.started_s(runs[0], stats[0]), prepare_s=made_s,
                   disk_bytes=n_bytes,
                   n_kept=kept(name, n_tokens, stats[0]["n_prompt_tokens"]))
        return out

    def reopened(self, index):
        """(seconds to read it back, bytes) of an index that was kept in a file."""
        with tempfile.TemporaryFile(dir=self.scratch) as file:
            pickle.dump(index, file)
            file.flush()
            n_bytes = file.tell()
            begin = time.perf_counter()
            file.seek(0)
            pickle.load(file)
            return time.perf_counter() - begin, n_bytes

    def cost_stored(self, name, text, n_tokens, questions, n_write):
        spec, store = policy(name, n_tokens), tempfile.mkdtemp(prefix="report-", dir=self.scratch)
        try:
            said, reading = self.kvfold.ingest(store, "text", text, spec, watch=True)
            document = said["documents"][0]
            disk = sum(os.stat(os.path.join(store, f)).st_blocks * 512 for f in os.listdir(store))
            options = ["--store", store, "-d", "text", "-n", n_write, "--ignore-eos", "--citations", 0, "--json"]
            options += self.kvfold.session(spec) + self.kvfold.ask_options(questions)
            run = program.Run(self.kvfold.command("ask", *options), watch=True)
        finally:
            shutil.rmtree(store, ignore_errors=True)
        stats = [r["stats"] for r in run.rows()]
        out = self.from_stats(stats, run)
        n_prompt = document["n_computed_tokens"] + out["n_computed"]
        out.update(first_s=document["seconds"] + stats[0]["ttft_ms"] / 1e3, read_tps=document["tokens_per_s"],
                   second_s=stats[1]["ttft_ms"] / 1e3, restart_s=self.started_s(run, stats[0]), disk_bytes=disk,
                   peak_bytes=max(run.max_rss, reading.max_rss), n_computed=n_prompt, n_prompt=n_prompt,
                   n_kept=kept(name, n_tokens, n_prompt))
        return out

    # ---- llama.cpp ----

    def llama(self, text, questions, n_write, n_tokens, slot=None, restore=False, ignore_eos=False,
              going_on=None):
        order = {"model": self.kvfold.model, "threads": self.kvfold.threads, "system": SYSTEM, "text": text,
                 "questions": questions, "max_tokens": n_write, "slot": slot, "restore": restore,
                 "ignore_eos": ignore_eos, "going_on": going_on,
                 "n_ctx": (n_tokens + 2 * n_write + (len(going_on.encode()) if going_on else 0) + 511) // 256 * 256}
        # Its threads wait for each other spinning, which on a machine with other work costs tens of times the
        # computing: they sleep instead.
        env = dict(os.environ, OMP_WAIT_POLICY="passive")
        run = subprocess.run([self.python, os.path.join(HERE, "peer.py")], input=json.dumps(order).encode(), env=env,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        if run.returncode:
            last = run.stderr.decode(errors="replace").strip().split("\n")[-1]
            raise program.Failure("llama.cpp: exit %d: %s" % (run.returncode, program.without_paths(last)[:300]))
        return json.loads(run.stdout)

    def cost_llama(self, text, n_tokens, questions, n_write):
        """Rows of llama.cpp and of llama.cpp+slot: one reading serves both."""
        with tempfile.TemporaryDirectory(prefix="report-", dir=self.scratch) as folder:
            slot = os.path.join(folder, "slot")
            said = self.llama(text, questions, n_write, n_tokens, slot, ignore_eos=True)
            again = self.llama("", questions, n_write, n_tokens, slot, restore=True, ignore_eos=True)
        first, second = said["answers"][:2]
        n = said["n_text"] + first["n_question"]
        dense = {"first_s": first["first_s"], "second_s": second["first_s"],
                 "restart_s": said["load_s"] + first["first_s"], "read_tps": n / first["first_s"],
                 "write_tps": (n_write - 1) / first["write_s"], "peak_bytes": said["peak_bytes"], "disk_bytes": 0,
                 "n_computed": n, "n_prompt": n, "n_kept": n}
        slot_row = dict(dense, first_s=first["first_s"] + said["save_s"], second_s=said["slot_answer"]["first_s"],
                        restart_s=again["load_s"] + again["answers"][0]["first_s"], disk_bytes=said["slot_bytes"])
        return {"llama.cpp": dense, "llama.cpp+slot": slot_row}
