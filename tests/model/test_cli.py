#!/usr/bin/env python3
"""test_cli.py - the program kvfold as its users and their scripts meet it.

  test_cli.py PROGRAM TINY_MODELS [unittest arguments]

Runs the built program on the tiny random models: every subcommand, its JSON, its exit codes, bad
models, bad documents, Ctrl-C, a closed pipe. What the models say is noise; that it is said in the
right form is the test. Python's standard library only.

SPDX-License-Identifier: Apache-2.0"""
import gzip
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM, TINY = "", ""
# It has no chat template: frames are plain unless --template says otherwise.
CHAT = "qwen2.gguf"
# Of one command: far above what a sanitizer on a busy machine takes (60 s), to end what hangs.
TIMEOUT = 400


def model(name=CHAT):
    return os.path.join(TINY, name)


def model_bytes():
    with open(model(), "rb") as f:
        return f.read()


def run(*args, stdin=b"", env=None, timeout=TIMEOUT):
    full = dict(os.environ, NO_COLOR="1")
    full.update(env or {})
    return subprocess.run([PROGRAM, *args], input=stdin, capture_output=True, timeout=timeout, env=full)


class Cli(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="kvfold-cli-")
        self.doc = self.write("doc.txt", b"The cat sat on the mat. " * 8)

    def tearDown(self):
        shutil.rmtree(self.dir)

    def write(self, name, data):
        path = os.path.join(self.dir, name)
        with open(path, "wb") as f:
            f.write(data)
        return path

    def ok(self, *args, **more):
        r = run(*args, **more)
        self.assertEqual(r.returncode, 0, r.stderr.decode(errors="replace"))
        self.assertNotIn(b"\x1b", r.stdout + r.stderr, "escape sequences without a terminal")
        self.assertNotIn(b"\r", r.stderr, "a progress bar without a terminal")
        r.stdout.decode("utf-8")
        return r

    def bad(self, *args, code=2, says="", **more):
        """Fails with this code, one sentence on stderr and nothing on stdout."""
        r = run(*args, **more)
        text = r.stderr.decode("utf-8")
        self.assertEqual(r.returncode, code, "%s: %s" % (args, text))
        self.assertEqual(r.stdout, b"")
        self.assertIn("kvfold:", text)
        self.assertEqual(text.strip().count("\n"), 0, text)
        self.assertIn(says, text)
        return text


class Common(Cli):
    def test_help_is_there_for_all(self):
        self.assertIn(b"Commands:", self.ok("--help").stdout)
        self.assertRegex(self.ok("--version").stdout, rb"^kvfold \d+\.\d+\.\d+\n$")
        for name in ("ask", "ingest", "chat", "tokenize", "perplexity", "inspect", "rm", "compact", "video", "bench"):
            page = self.ok(name, "--help").stdout
            self.assertIn(b"Examples:", page)
            self.assertIn(b"--json", page)
            self.assertEqual(page, self.ok("help", name).stdout)
            letters = re.findall(rb"^  -(\w),", page, re.M)
            self.assertEqual(len(letters), len(set(letters)), "a letter means two options")
            self.assertLessEqual(max(len(line) for line in page.split(b"\n")), 110)

    def test_usage_errors_name_the_cure(self):
        self.assertEqual(run().returncode, 2)
        self.bad("aks", says="did you mean ask?")
        self.bad("--vesion")
        self.bad("ask", "--documnet", "x", says="did you mean --document?")
        self.bad("ask", "-n", "0", says="from 1")
        self.bad("ask", "--temp", "nan", says="--temp")
        self.bad("ask", "-m", model(), "-d", self.doc, says="no question")
        self.bad("ask", "-m", model(), "-d", self.doc, "b.txt", "question", says="quotes")
        self.bad("ask", "-m", model(), "-d", "-", "-", says="once")
        self.bad("ask", "-m", model(), "--cpu", "z80", "-d", self.doc, "q", says="auto|ref")
        self.bad("ask", "-m", model(), "--policy", "nonsense", "-d", self.doc, "q", says="full")
        self.bad("bench", "-m", model(), "-p", "0", "-n", "0", says="nothing to measure")

    def test_models_are_found_by_path_or_name(self):
        env = {"KVFOLD_MODELS": TINY, "XDG_CACHE_HOME": self.dir, "HOME": self.dir}
        self.ok("tokenize", "-m", CHAT, "--json", stdin=b"x", env=env)
        env["KVFOLD_MODELS"] = self.dir
        self.bad("tokenize", "-m", "qwen2.5-coder-0.5b", says="fetch_model.py", env=env)
        self.bad("tokenize", says="fetch_model.py", env=env)
        self.bad("tokenize", "-m", "qwen2.5-coder-5b", says="did you mean", env=env)
        self.bad("tokenize", "-m", "./no.gguf", says="No such file", env=env)
        self.bad("tokenize", "-m", self.dir, says="directory", env=env)
        self.write("gemma-3-270m-q4_k_m.gguf", b"GGUF")
        self.bad("tokenize", "-m", "gemma-3-270m", says="not fetched whole", env=env)

    def test_the_environment_masks_the_processor(self):
        env = {"KVFOLD_CPU": "ref"}
        r = json.loads(self.ok("perplexity", "-m", model(), "--json", self.doc, env=env).stdout)
        self.assertEqual(r["cpu"], "ref")
        self.bad("perplexity", "-m", model(), self.doc, env={"KVFOLD_CPU": "z80"}, says="z80")


class Ask(Cli):
    def ask(self, *args, **more):
        return self.ok("ask", "-m", model(), "-n", "8", *args, **more)

    def test_json_has_what_scripts_need(self):
        r = json.loads(self.ask("-d", self.doc, "--json", "Who sat?").stdout)
        self.assertIsInstance(r["answer"], str)
        self.assertGreater(len(r["citations"]), 0)
        s = r["stats"]
        for key in ("n_prompt_tokens", "n_computed_tokens", "ttft_ms", "prefill_tps", "decode_tps",
                    "peak_rss_bytes"):
            self.assertIsInstance(s[key], (int, float), key)
        self.assertEqual(s["backend"], "cpu")
        self.assertEqual(s["policy"], "full")
        self.assertEqual(s["n_computed_tokens"], s["n_prompt_tokens"])
        self.assertGreater(s["n_prompt_tokens"], 50)
        self.assertGreater(s["peak_rss_bytes"], 1 << 20)
        self.assertEqual(r["documents"][0]["kind"], "text")

    def test_the_answer_is_on_stdout_and_the_summary_on_stderr(self):
        r = self.ask("-d", self.doc, "Who?")
        self.assertTrue(r.stdout.endswith(b"\n"))
        self.assertIn(b"first token after", r.stderr)
        self.assertEqual(self.ask("-q", "Who?", "-d", self.doc, "--quiet").stderr, b"")
        self.assertEqual(self.ask("-d", self.doc, "Who?", "--no-stream").stdout, r.stdout)

    def test_greedy_and_seeded_answers_repeat(self):
        sampled = ["--temp", "1", "--seed", "7", "--top-k", "0", "--top-p", "1", "--min-p", "0",
                   "-d", self.doc, "Who?"]
        for args in (["-d", self.doc, "Who?"], sampled):
            self.assertEqual(self.ask(*args).stdout, self.ask(*args).stdout)
        other = [a if a != "7" else "8" for a in sampled]
        self.assertNotEqual(self.ask(*sampled).stdout, self.ask(*other).stdout)

    def test_a_second_question_reuses_the_document(self):
        lines = self.ask("-d", self.doc, "-q", "Who?", "-q", "Where?", "--json").stdout.splitlines()
        first, second = (json.loads(line) for line in lines)
        self.assertEqual(second["question"], "Where?")
        self.assertGreater(second["stats"]["n_reused_tokens"], second["stats"]["n_prompt_tokens"] // 2)
        alone = json.loads(self.ask("-d", self.doc, "Where?", "--json").stdout)
        self.assertEqual(alone["answer"], second["answer"], "reuse changes the answer")
        self.assertEqual(first["stats"]["n_reused_tokens"], 0)

    def test_questions_come_from_a_file_or_a_pipe(self):
        path = self.write("q.txt", b"Who?\r\n\n  \nWhere?\n")
        args = ["-d", self.doc, "--json", "--questions"]
        self.assertEqual(len(self.ask(*args, path).stdout.splitlines()), 2)
        self.assertEqual(len(self.ask(*args, "-", stdin=b"A?\nB?\nC?").stdout.splitlines()), 3)
        args = ["-d", self.doc, "--json", "-"]
        self.assertEqual(len(self.ask(*args, stdin=b"Who?\n").stdout.splitlines()), 1)

    def test_all_kinds_of_documents_are_read(self):
        html = self.write("a.html", b"<html><title>T</title><p>One <b>two</b></html>")
        packed = self.write("b.md.gz", gzip.compress(b"# Title\n\ntext\n"))
        pdf = os.path.join(os.path.dirname(TINY), "docs", "two-pages.pdf")
        args = ["-d", html, "-d", packed, "-d", pdf, "-d", "-", "--json", "What?"]
        r = json.loads(self.ask(*args, stdin=b"in").stdout)
        self.assertEqual([d["kind"] for d in r["documents"]], ["html", "markdown", "pdf", "text"])
        self.assertEqual(r["documents"][2]["pages"], 3)

    def test_frames_can_be_chosen(self):
        sizes = {}
        for frame in ("plain", "none"):
            r = json.loads(self.ask("-d", self.doc, "--template", frame, "--json", "Who?").stdout)
            sizes[frame] = r["stats"]["n_prompt_tokens"]
        self.assertNotEqual(sizes["plain"], sizes["none"])
        self.bad("ask", "-m", model(), "--template", "jinja", "-d", self.doc, "q", says="chatml")

    def test_a_raw_prompt_is_taken_as_it_is(self):
        raw = json.loads(self.ask("--raw", "--json", stdin=b"one two three").stdout)
        ids = json.loads(self.ok("tokenize", "-m", model(), "--json", "--special", "--bos",
                                 stdin=b"one two three").stdout)
        self.assertEqual(raw["stats"]["n_prompt_tokens"], len(ids))
        same = json.loads(self.ask("--raw", "--json", "one two three").stdout)
        self.assertEqual(same["answer"], raw["answer"])
        self.bad("ask", "-m", model(), "--raw", "-d", self.doc, "q", says="--raw")

    def test_an_expected_answer_is_scored_instead(self):
        given, more = "one two three", " four five"
        r = json.loads(self.ask("--raw", "--json", given, "--expect", more).stdout)
        path = self.write("given.txt", given.encode())
        p = json.loads(self.ok("perplexity", "-m", model(), "--json", "--given", path, stdin=more.encode()).stdout)
        x = r["expected"]
        self.assertEqual((r["finish"], r["answer"], x["n_tokens"]), ("expected", "", p["n_tokens"]))
        self.assertAlmostEqual(x["logprob"], -p["mean_nll"] * p["n_scored"], places=3)
        self.assertLess(x["logprob"], x["logprob_first"])
        asked = ["-d", self.doc, "--json", "-q", "Who?", "-q", "Where?", "--expect", "a cat", "--expect", "on a mat"]
        both = [json.loads(line)["expected"] for line in self.ask(*asked).stdout.splitlines()]
        alone = json.loads(self.ask("-d", self.doc, "--json", "Where?", "--expect", "on a mat").stdout)["expected"]
        self.assertAlmostEqual(both[1]["logprob"], alone["logprob"], places=4, msg="the first answer was left there")
        self.assertNotAlmostEqual(both[0]["logprob"], both[1]["logprob"], places=2)
        plain = [json.loads(self.ask("-d", self.doc, "--json", "--template", "plain", "Where?", "--expect", e).stdout)["expected"]
                 for e in ("on a mat", " on a mat")]
        self.assertEqual(plain[0], plain[1], "after 'Answer:' comes a blank")
        shown = self.ask("-d", self.doc, "Where?", "--expect", "on a mat")
        self.assertIn(b"log-probability %.4f of %d tokens" % (alone["logprob"], alone["n_tokens"]), shown.stdout)
        for options, says in ((["-q", "A?", "-q", "B?", "--expect", "x"], "Questions: 2; answers of --expect: 1"),
                              (["A?", "--expect", ""], "empty"), (["--expect", "x"], "--expect: 1")):
            self.bad("ask", "-m", model(), "-d", self.doc, *options, says=says)

    def test_bad_documents_are_refused(self):
        ask = ["ask", "-m", model(), "question", "-d"]
        self.bad(*ask, self.write("empty.txt", b""), says="empty")
        self.bad(*ask, self.write("blank.txt", b" \n\n"), says="empty")
        self.bad(*ask, self.write("bin.txt", bytes(range(256)) * 40), says="binary")
        self.bad(*ask, os.path.join(self.dir, "none.txt"), says="No such file")
        self.bad(*ask, self.dir, says="directory")
        self.bad(*ask, model(), says="model")
        self.bad(*ask, self.write("a.zip", b"PK\3\4" + b"\0" * 50), says="ZIP")
        self.bad(*ask, self.write("cut.gz", gzip.compress(b"text" * 1000)[:20]), says="cut off")
        self.bad(*ask, self.write("a.pdf", b"%PDF-1.7\nrubbish"), says="damaged")
        self.bad(*ask, "-", stdin=b"", says="empty")

    def test_latin1_is_converted_and_said(self):
        r = self.ask("-d", self.write("l.txt", "caf\u00e9 ".encode("latin-1") * 9), "Who?")
        self.assertIn(b"1252", r.stderr)

    def test_a_text_longer_than_the_context_is_refused_with_its_length(self):
        full = ["ask", "-m", model(), "--policy", "full"]
        text = self.bad(*full, "-c", "64", "-d", self.doc, "Who?", says="--ctx")
        self.assertRegex(text, r"have \d+ tokens")
        big = self.write("big.txt", b"0123456789abcde\n" * (100 * 65536))
        start = time.monotonic()
        text = self.bad(*full, "-d", big, "Who?", says="too long")
        self.assertRegex(text, r"about [\d,]+ tokens")
        self.assertLess(time.monotonic() - start, 60)

    def test_a_full_context_ends_the_answer(self):
        n = json.loads(self.ask("-d", self.doc, "Who?", "--json").stdout)["stats"]["n_prompt_tokens"]
        r = self.ok("ask", "-m", model(), "-c", str(n + 9), "-n", "500", "-d", self.doc, "Who?", "--json")
        r = json.loads(r.stdout)
        self.assertIn(r["finish"], ("context", "stop"))
        self.assertLessEqual(r["stats"]["n_generated_tokens"], 9)


class Store(Cli):
    """Ingest once, ask many. The tiny model reads 50,000 tokens a second and more."""

    def setUp(self):
        super().setUp()
        self.store = os.path.join(self.dir, "store")
        rng = random.Random(7)
        words = "the cat sat on a mat while one dog ran over far hills under some moon".split()
        lines = [" ".join(rng.choice(words) for _ in range(12)) + "." for _ in range(300)]
        self.long = self.write("long.txt", "\n".join(lines).encode())

    def ingest(self, *args, **more):
        return json.loads(self.ok("ingest", "-m", model(), "--store", self.store, "--json", *args, **more).stdout)

    def ask(self, *args, **more):
        r = self.ok("ask", "-m", model(), "--store", self.store, "-n", "8", "--json", *args, **more)
        return [json.loads(line) for line in r.stdout.splitlines()]

    def inspect(self, *args, **more):
        return json.loads(self.ok("inspect", self.store, "--json", *args, **more).stdout)

    def test_a_document_is_read_once_and_asked_many_times(self):
        first = self.ingest("-d", self.long)
        d = first["documents"][0]
        self.assertEqual((d["name"], d["status"]), ("long.txt", "read"))
        self.assertEqual(d["n_computed_tokens"], d["n_tokens"])
        self.assertGreater(d["n_tokens"], 2048)
        again = self.ingest("-d", self.long)["documents"][0]
        self.assertEqual((again["status"], again["n_computed_tokens"]), ("already there", 0))
        self.assertEqual(again["n_tokens"], d["n_tokens"])
        a, b = self.ask("-q", "Who sat?", "-q", "Where?")
        for r in (a, b):
            self.assertGreaterEqual(r["stats"]["n_reused_tokens"], d["n_tokens"], "the document was read again")
            s = r["stats"]
            rate = 1 - (s["n_block_misses"] + s["n_blocks_shared"]) / s["n_block_reads"] if s["n_block_reads"] else 1
            self.assertAlmostEqual(s["block_hit_rate"], rate, places=6)
            self.assertEqual(s["block_moved_bytes"] > 0, s["n_block_reads"] > 0)
        self.assertEqual(self.ask("Where?")[0]["answer"], b["answer"], "an earlier question changes the answer")
        x, y = (self.ask("Where?", "--expect", e)[0]["expected"] for e in ("on a mat", "on a mat, of old wool"))
        self.assertEqual(x["logprob_first"], y["logprob_first"])
        self.assertLess(y["logprob"], x["logprob"])

    def test_answers_cite_lines_of_the_file(self):
        self.ingest("-d", self.long)
        r = self.ask("Who sat?")[0]
        with open(self.long) as f:
            lines = f.read().split("\n")
        self.assertEqual(len(r["citations"]), 3)
        shares = [c["share"] for c in r["citations"]]
        self.assertEqual(shares, sorted(shares, reverse=True))
        for c in r["citations"]:
            self.assertEqual(c["document"], "long.txt")
            self.assertTrue(0 < c["share"] <= 1)
            self.assertTrue(0 < c["n_tokens"] <= 128)
            self.assertTrue(1 <= c["first_line"] <= c["last_line"] <= len(lines))
            near = " ".join(lines[max(c["first_line"] - 8, 0):c["last_line"] + 8])
            self.assertIn(c["excerpt"].replace("...", ""), near)
        self.assertEqual(len(self.ask("--citations", "1", "Who?")[0]["citations"]), 1)
        self.assertEqual(self.ask("--citations", "0", "Who?")[0]["citations"], [])
        text = self.ok("ask", "-m", model(), "--store", self.store, "-n", "8", "Who?").stdout.decode()
        self.assertRegex(text, r'\[1\] long\.txt, lines? \d+(-\d+)?: ".+" \(\d+ %\)\n')

    def test_answers_cite_pages_of_a_pdf(self):
        pdf = os.path.join(os.path.dirname(TINY), "docs", "two-pages.pdf")
        self.ingest("-d", pdf)
        for r in (self.ask("What?")[0],
                  json.loads(self.ok("ask", "-m", model(), "-d", pdf, "-n", "8", "--json", "What?").stdout)):
            self.assertGreater(len(r["citations"]), 0)
            for c in r["citations"]:
                self.assertIn(c["page"], (1, 3))
                self.assertIn(c["excerpt"], ("The first page says hello.", "The third page ends it."))

    def test_several_documents_are_told_apart(self):
        other = self.write("other.txt", b"A dog slept. " * 50)
        r = self.ingest("-d", self.long, "-d", other)
        self.assertEqual([d["name"] for d in r["documents"]], ["long.txt", "other.txt"])
        ask = ["ask", "-m", model(), "--store", self.store, "-n", "4", "Who?"]
        text = self.bad(*ask, says="long.txt")
        self.assertIn("other.txt", text)
        self.bad(*ask, "-d", "othr.txt", says="did you mean 'other.txt'")
        self.bad(*ask, "-d", "zebra", says="long.txt")
        self.bad(*ask, "-d", "long.txt", "-d", "other.txt", says="--together")
        self.assertEqual(self.ask("-d", "other.txt", "Who?")[0]["citations"][0]["document"], "other.txt")
        # The same name for another file; the same file stays the same document.
        os.mkdir(os.path.join(self.dir, "b"))
        third = self.write("b/other.txt", b"A bird sang. " * 50)
        self.assertEqual(self.ingest("-d", third)["documents"][0]["name"], "other.txt (2)")
        self.assertEqual(self.ingest("-d", third)["documents"][0]["status"], "already there")
        both = self.ingest("-d", other, "-d", third, "--together", "--name", "both")["documents"]
        self.assertEqual([d["name"] for d in both], ["both"])
        self.assertEqual(self.inspect()["n_documents"], 4)
        self.assertEqual(len(self.ask("-d", "both", "Who?")[0]["documents"]), 2)

    def test_a_file_that_changed_needs_another_name(self):
        self.ingest("-d", self.doc)
        self.write("doc.txt", b"Something else. " * 9)
        text = self.bad("ingest", "-m", model(), "--store", self.store, "-d", self.doc, says="doc.txt")
        self.assertRegex(text, "name|remove")
        self.assertEqual(self.ingest("-d", self.doc, "--name", "new")["documents"][0]["status"], "read")

    def test_every_frame_can_be_stored(self):
        for frame in ("plain", "none", "chatml", "gemma", "mistral", "llama3"):
            for name in (CHAT, "llama.gguf", "gemma3.gguf"):
                args = ["-m", model(name), "--template", frame]
                r = self.ok("ask", *args, "-d", self.doc, "-n", "8", "--json", "Who?")
                dense = json.loads(r.stdout)
                store = os.path.join(self.dir, frame + name)
                self.ok("ingest", *args, "--store", store, "-d", self.doc)
                stored = json.loads(self.ok("ask", "-m", model(name), "--store", store, "-n", "8", "--json",
                                            "Who?").stdout)
                self.assertEqual(stored["stats"]["n_prompt_tokens"], dense["stats"]["n_prompt_tokens"])
                for c in stored["citations"] + dense["citations"]:
                    self.assertIn(c["excerpt"].replace("...", ""), "The cat sat on the mat. " * 8)
                    self.assertEqual((c["first_line"], c["last_line"]), (1, 1))

    def test_what_cannot_be_is_refused(self):
        self.bad("ingest", "-m", model(), "-d", self.doc, says="--store")
        self.bad("ingest", "-m", model(), "--store", self.store, says="-d")
        self.bad("ingest", "-m", model(), "--store", self.store, "-d", self.doc, "--policy", "full", says="infllm")
        self.bad("ingest", "-m", model(), "--store", self.store, "-d", self.doc, "--policy", "infllm:topkk=1",
                 says="topk")
        self.bad("ingest", "-m", model(), "--store", self.store, "-d", self.doc, "--memory", "much", says="800M")
        self.bad("ask", "-m", model(), "--store", os.path.join(self.dir, "none"), "Who?")
        self.bad("ask", "-m", model(), "--store", self.store, "--host-share", "101", "Who?", says="--host-share")
        for store in ([], ["--store", self.store]):
            text = [] if store else ["-d", self.doc]
            r = run("ask", "-m", model(), *store, *text, "--host-share", "50", "-n", "1", "Who?")
            self.assertIn("--host-share changes nothing", r.stderr.decode("utf-8"))
            self.assertNotIn("--host-share", run("ask", "-m", model(), *store, *text, "-n", "1", "Who?").stderr.decode("utf-8"))
        self.bad("inspect", self.dir)
        self.bad("rm", "--store", os.path.join(self.dir, "none"), "x")
        self.bad("rm", "--store", self.store, says="Name")
        self.bad("compact", says="--store")
        self.ingest("-d", self.doc)
        ask = ["ask", "--store", self.store, "Who?"]
        self.bad(*ask, "-m", model("llama.gguf"), says="qwen2")
        self.bad("ingest", "-m", model("llama.gguf"), "--store", self.store, "-d", self.long, says="qwen2")
        self.bad(*ask, "-m", model(), "--system", "x", says="--system")
        self.bad(*ask, "-m", model(), "--policy", "full")
        self.assertEqual(self.inspect("--verify")["verify"]["n_bad"], 0)

    def test_documents_are_listed_checked_removed_and_their_space_given_back(self):
        self.ingest("-d", self.long, "-d", self.doc)
        r = self.inspect("--verify")
        self.assertEqual([d["name"] for d in r["documents"]], ["doc.txt", "long.txt"])
        self.assertTrue(all(d["complete"] for d in r["documents"]))
        self.assertEqual(r["verify"]["n_bad"], 0)
        self.assertGreater(r["verify"]["n_checked"], 0)
        self.assertEqual(r["n_tokens"], sum(d["n_tokens"] for d in r["documents"]))
        page = self.ok("inspect", self.store, "--verify").stdout
        for part in (b"long.txt", b"infllm", b"fingerprint", b"verified"):
            self.assertIn(part, page)
        self.bad("rm", "--store", self.store, "long.txt", "lonk.txt", says="did you mean")
        self.assertEqual(self.inspect()["n_documents"], 2, "half of a bad command was done")
        r = json.loads(self.ok("rm", "--store", self.store, "long.txt", "--json").stdout)
        self.assertEqual((r["removed"], r["n_documents"]), (["long.txt"], 1))
        r = json.loads(self.ok("compact", "--store", self.store, "--json").stdout)
        self.assertLess(r["bytes_after"], r["bytes_before"] / 2)
        self.assertEqual(self.inspect("--verify")["verify"]["n_bad"], 0)
        self.ask("Who?")
        self.assertIn(b"now", self.ok("compact", "--store", self.store).stdout)

    def test_damage_is_found(self):
        self.ingest("-d", self.long)
        files = [os.path.join(self.store, f) for f in os.listdir(self.store)]
        path = max(files, key=os.path.getsize)
        with open(path, "r+b") as f:
            f.seek(os.path.getsize(path) // 2)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 0x55]))
        r = run("inspect", self.store, "--verify")
        self.assertEqual(r.returncode, 2, r.stdout)
        self.assertIn(b"damaged", r.stderr)

    def test_ctrl_c_keeps_what_is_read_and_the_same_command_goes_on(self):
        with open(self.long, "rb") as f:
            text = f.read()
        big = self.write("big.txt", b"\n".join(b"Part %d. " % i + text for i in range(4)))
        command = ["ingest", "-m", model(), "--store", self.store, "-d", big, "-t", "1", "--cpu", "ref"]
        p = subprocess.Popen([PROGRAM, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        end = time.monotonic() + 60
        kept = 0
        while time.monotonic() < end and p.poll() is None and not kept:
            r = run("inspect", self.store, "--json")
            docs = json.loads(r.stdout)["documents"] if r.returncode == 0 else []
            kept = docs[0]["n_tokens"] if docs else 0
            time.sleep(0.02)
        p.send_signal(signal.SIGINT)
        err = p.communicate(timeout=TIMEOUT)[1].decode()
        self.assertEqual(p.returncode, 130, err)
        self.assertRegex(err, r"'big\.txt': [\d,]+ of [\d,]+ tokens are kept; the same command goes on")
        before = self.inspect("--verify")
        self.assertEqual((before["n_unfinished"], before["verify"]["n_bad"]), (1, 0))
        self.assertGreater(before["documents"][0]["n_tokens"], 0)
        self.bad("ask", "-m", model(), "--store", self.store, "Who?", says="not read to its end")
        d = self.ingest("-d", big)["documents"][0]
        self.assertEqual(d["status"], "continued")
        self.assertLess(d["n_computed_tokens"], d["n_tokens"])
        self.assertEqual(self.inspect()["n_unfinished"], 0)
        self.ask("Who?")

    def test_what_does_not_fit_goes_through_a_temporary_store(self):
        tmp = os.path.join(self.dir, "tmp")
        os.mkdir(tmp)
        env = {"TMPDIR": tmp}
        args = ["ask", "-m", model(), "-d", self.long, "-c", "1000", "-n", "8", "--json", "Who sat?"]
        r = self.ok(*args, env=env)
        self.assertIn(b"temporary store", r.stderr)
        self.assertEqual(len(r.stderr.strip().splitlines()), 1)
        self.assertEqual(os.listdir(tmp), [])
        r = json.loads(r.stdout)
        self.assertIn("infllm", r["stats"]["policy"])
        self.assertGreater(len(r["citations"]), 0)
        self.ingest("-d", self.long)
        self.assertEqual(self.ask("Who sat?")[0]["answer"], r["answer"])
        self.bad("ask", "-m", model(), "-d", self.long, "-c", "1000", "-n", "8", "q", env={"TMPDIR": "/proc/none"},
                 says="TMPDIR")
        for n_signals in (1, 2):
            p = subprocess.Popen([PROGRAM, *args, "-n", "1000000", "--ignore-eos", "--temp", "2", "--no-stream"],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, **env))
            p.stderr.readline()
            time.sleep(0.3)
            for _ in range(n_signals):
                p.send_signal(signal.SIGINT)
            p.communicate(timeout=TIMEOUT)
            self.assertEqual(p.returncode, 130)
            self.assertEqual(os.listdir(tmp), [], "%d signals" % n_signals)


class BadModels(Cli):
    def refuse(self, data, says=""):
        path = self.write("bad.gguf", data)
        for args in (["inspect", path], ["ask", "-m", path, "-d", self.doc, "q"]):
            self.bad(*args, says=says)

    def test_damaged_files_are_refused(self):
        good = model_bytes()
        self.refuse(b"")
        self.refuse(b"GGUF")
        for n in (8, 23, 24, 100, 1000, len(good) // 2, len(good) - 1):
            self.refuse(good[:n])
        self.refuse(b"not a model at all" * 100)
        self.refuse(b"FUGG" + good[4:])
        self.refuse(good[:4] + struct.pack(">I", 3) + good[8:])
        self.refuse(good[:4] + struct.pack("<I", 99) + good[8:])
        for at in (8, 16):  # counts of tensors and of metadata
            for value in (1 << 63, (1 << 64) - 1, 1 << 40):
                self.refuse(good[:at] + struct.pack("<Q", value) + good[at + 8:])

    def test_sizes_of_2_to_the_63_in_dimensions_are_refused(self):
        good = bytearray(model_bytes())
        at = good.index(b"token_embd.weight") + len(b"token_embd.weight")
        n_dims, = struct.unpack_from("<I", good, at)
        for k in range(n_dims):
            bad = bytearray(good)
            struct.pack_into("<Q", bad, at + 4 + 8 * k, 1 << 63)
            self.refuse(bytes(bad), says="token_embd.weight")
        bad = bytearray(good)
        struct.pack_into("<Q", bad, at + 4 + 8 * n_dims + 4, 1 << 63)  # the tensor's offset
        self.refuse(bytes(bad))

    def test_another_architecture_is_named(self):
        good = model_bytes()
        at = good.index(b"general.architecture") + len(b"general.architecture") + 4 + 8
        self.refuse(good[:at] + b"bert!" + good[at + 5:], says="bert!")


class Chat(Cli):
    def test_a_piped_conversation_is_answered_line_by_line(self):
        r = self.ok("chat", "-m", model(), "-n", "6", "--json",
                    stdin=b"hello\n\nagain\n/stats\n/exit\nnot read\n")
        first, second = (json.loads(line) for line in r.stdout.splitlines())
        self.assertGreater(second["stats"]["n_prompt_tokens"], first["stats"]["n_prompt_tokens"])
        self.assertGreater(second["stats"]["n_reused_tokens"], 0)
        self.assertIn(b"wrote", r.stderr)

    def test_reset_forgets_and_the_documents_stay(self):
        r = self.ok("chat", "-m", model(), "-d", self.doc, "-n", "6", "--json",
                    stdin=b"who\n/reset\nwho\n/hlep\n")
        first, second = (json.loads(line) for line in r.stdout.splitlines())
        self.assertEqual(first["answer"], second["answer"])
        self.assertEqual(first["stats"]["n_prompt_tokens"], second["stats"]["n_prompt_tokens"])
        self.assertIn(b"did you mean /help", r.stderr)

    def test_a_full_context_is_said(self):
        r = run("chat", "-m", model(), "-n", "40", "-c", "96", "--quiet", stdin=b"tell me more\n" * 30)
        self.assertEqual(r.returncode, 2)
        self.assertIn(b"too long", r.stderr)


class Tokenize(Cli):
    def test_json_is_an_array_and_lines_are_id_and_text(self):
        ids = json.loads(self.ok("tokenize", "-m", model(), "--json", "-", stdin=b"hi\nyou").stdout)
        lines = self.ok("tokenize", "-m", model(), stdin=b"hi\nyou").stdout.decode().splitlines()
        self.assertEqual([int(line.split("\t")[0]) for line in lines], ids)
        self.assertEqual("".join(line.split("\t")[1] for line in lines).replace("\\n", "\n"), "hi\nyou")
        self.assertEqual(int(self.ok("tokenize", "-m", model(), "--count", stdin=b"hi\nyou").stdout), len(ids))
        self.assertEqual(json.loads(self.ok("tokenize", "-m", model(), "--json", stdin=b"").stdout), [])

    def test_any_bytes_are_tokenised(self):
        for name in sorted(os.listdir(TINY)):
            if name.endswith(".gguf"):
                json.loads(self.ok("tokenize", "-m", model(name), "--json", stdin=bytes(range(256)) * 3).stdout)
                self.ok("tokenize", "-m", model(name), stdin=bytes(range(256)))

    def test_control_tokens_are_text_unless_asked(self):
        text = b"<|im_end|>"
        plain = json.loads(self.ok("tokenize", "-m", model(), "--json", stdin=text).stdout)
        special = json.loads(self.ok("tokenize", "-m", model(), "--json", "--special", stdin=text).stdout)
        self.assertGreater(len(plain), len(special))


class Perplexity(Cli):
    def test_the_json_and_the_positions_agree(self):
        r = json.loads(self.ok("perplexity", "-m", model(), "--json", self.doc).stdout)
        self.assertGreater(r["mean_nll"], 0)
        lines = self.ok("perplexity", "-m", model(), "--positions", self.doc).stdout.decode().splitlines()
        self.assertEqual(len(lines) - 1, r["n_tokens"])
        self.assertEqual([line.split()[0] for line in lines[:-1]], [str(i) for i in range(r["n_tokens"])])
        nll = -sum(float(line.split()[2]) for line in lines[:-2]) / (len(lines) - 2)
        self.assertAlmostEqual(nll, r["mean_nll"], places=4)
        self.assertIn("mean_nll", lines[-1])

    def test_a_long_text_is_scored_in_windows(self):
        whole = json.loads(self.ok("perplexity", "-m", model(), "--json", self.doc).stdout)
        parts = json.loads(self.ok("perplexity", "-m", model(), "--json", "-c", "32", self.doc).stdout)
        self.assertEqual(parts["n_tokens"], whole["n_tokens"])
        self.assertLess(parts["n_scored"], whole["n_scored"])
        self.bad("perplexity", "-m", model(), stdin=b"", says="at least 2")

    def test_after_a_given_text_every_token_is_scored_as_in_the_whole(self):
        text = " ".join("The cat number %d sat on mat %d." % (i, i * 7 % 31) for i in range(40)).encode()
        with tempfile.TemporaryDirectory() as folder:
            given = os.path.join(folder, "given.txt")

            def after(cut, *options):
                with open(given, "wb") as file:
                    file.write(text[:cut])
                return self.ok("perplexity", "-m", model(), *options, "--given", given, stdin=text[cut:])
            whole = self.ok("perplexity", "-m", model(), "--positions", stdin=text).stdout.decode().splitlines()[:-1]
            # A cut at which both halves have the whole's tokens.
            for cut in [i for i in range(len(text) * 9 // 10, len(text)) if text[i:i + 1] == b" "]:
                r = json.loads(after(cut, "--json").stdout)
                if r["n_given"] + r["n_tokens"] == len(whole):
                    break
            self.assertEqual(r["n_given"] + r["n_tokens"], len(whole))
            self.assertEqual(r["n_scored"], r["n_tokens"])
            want = -sum(float(line.split()[2]) for line in whole[r["n_given"] - 1:-1]) / r["n_scored"]
            self.assertAlmostEqual(r["mean_nll"], want, delta=2e-3)
            lines = after(cut, "--positions").stdout.decode().splitlines()[:-1]
            self.assertEqual([line.split()[:2] for line in lines], [line.split()[:2] for line in whole[r["n_given"]:]])
            less = json.loads(after(cut, "--json", "--policy", "window:sink=4,window=64").stdout)
            self.assertNotAlmostEqual(less["mean_nll"], r["mean_nll"], delta=2e-3)
            self.assertIn("window:", less["policy"])
            self.bad("perplexity", "-m", model(), "-c", "16", "--given", given, self.doc, says="--given")
            open(given, "wb").close()
            self.bad("perplexity", "-m", model(), "--given", given, self.doc, says="empty")
            self.bad("perplexity", "-m", model(), "--given", "-", "-", stdin=text, says="standard input")
            self.bad("perplexity", "-m", model(), "--given", "-", stdin=text, says="standard input")


class Inspect(Cli):
    def test_models_and_machine_are_described(self):
        r = json.loads(self.ok("inspect", model(), "--json").stdout)
        self.assertEqual(r["arch"], "qwen2")
        self.assertGreater(len(r["tensors"]), 10)
        self.assertGreater(len(r["metadata"]), 10)
        page = self.ok("inspect", "-v", model()).stdout
        self.assertIn(b"token_embd.weight", page)
        self.assertIn(b"keys and values", page)
        d = json.loads(self.ok("inspect", "--devices", "--json").stdout)["devices"][0]
        self.assertIn("ref", d["levels"].split())
        self.assertGreaterEqual(d["threads"], 1)
        self.assertIn(b"full", self.ok("inspect", "--policies").stdout)
        self.assertIn(b"qwen2.5-coder-0.5b", self.ok("inspect", "--models").stdout)


class Bench(Cli):
    def test_json_is_one_object_per_test(self):
        r = json.loads(self.ok("bench", "-m", model(), "-p", "16,8", "-n", "4", "-d", "0,32", "-t", "1", "-r", "2",
                               "--json").stdout)
        self.assertEqual([x["test"] for x in r], ["pp16", "pp8", "tg4", "pp16 @ d32", "pp8 @ d32", "tg4 @ d32"])
        for x in r:
            self.assertEqual((x["threads"], x["n_depth"]), (1, 32 if "@" in x["test"] else 0))
            self.assertGreater(x["avg_ts"], 0)
            self.assertGreaterEqual(x["stddev_ts"], 0)
        self.assertIn(b"tg4", self.ok("bench", "-m", model(), "-p", "0", "-n", "4", "-r", "1").stdout)


class Signals(Cli):
    """Endless answers are made by a model that never ends and a large --max-tokens."""

    def start(self, *args, **more):
        command = [PROGRAM, "ask", "-m", model(), "--raw", "-n", "1000000", "-c", "1000000",
                   "--temp", "2", "--ignore-eos"]
        return subprocess.Popen([*command, *args, "go"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)

    def test_ctrl_c_stops_cleanly(self):
        for sig in (signal.SIGINT, signal.SIGTERM):
            p = self.start()
            p.stdout.read(1)
            p.send_signal(sig)
            out, err = p.communicate(timeout=TIMEOUT)
            self.assertEqual(p.returncode, 130, err)
            self.assertIn(b"interrupted", err)

    def test_a_closed_pipe_ends_it_quietly(self):
        p = self.start()
        p.stdout.read(1)
        p.stdout.close()
        err = p.stderr.read()
        p.stderr.close()
        p.wait(timeout=TIMEOUT)
        self.assertNotEqual(p.returncode, 0)
        self.assertNotIn(b"error", err.lower())

    def test_a_full_disk_is_said(self):
        with open("/dev/full", "wb") as full:
            r = subprocess.run([PROGRAM, "--help"], stdout=full, stderr=subprocess.PIPE, timeout=TIMEOUT)
        self.assertEqual(r.returncode, 1)
        self.assertIn(b"No space left", r.stderr)

    def test_a_terminal_gets_a_bar_and_no_control_characters(self):
        """Standard output and error are a terminal here."""
        master, slave = pty.openpty()
        command = [PROGRAM, "ask", "-m", model(), "-d", self.doc, "-n", "40", "--temp", "2", "Who?"]
        p = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave,
                             env=dict(os.environ, TERM="xterm"))
        os.close(slave)
        seen = b""
        while select.select([master], [], [], TIMEOUT)[0]:
            try:
                seen += os.read(master, 65536)
            except OSError:
                break
        p.wait(timeout=TIMEOUT)
        os.close(master)
        self.assertEqual(p.returncode, 0, seen)
        self.assertIn(b"Reading [", seen)
        for code in seen.replace(b"\x1b[K", b"").replace(b"\x1b[1;31m", b"").replace(b"\x1b[0m", b""):
            self.assertTrue(code >= 0x20 or code in b"\r\n\t", "control character %d" % code)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: test_cli.py PROGRAM TINY_MODELS")
    PROGRAM, TINY = os.path.abspath(sys.argv.pop(1)), os.path.abspath(sys.argv.pop(1))
    unittest.main()
