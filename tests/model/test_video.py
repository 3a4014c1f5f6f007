#!/usr/bin/env python3
"""test_video.py - kvfold video as its users and their scripts meet it.

  test_video.py PROGRAM DATA [unittest arguments]

DATA is tests/data: clips of video/, a random tower of vision_tower/. Runs the built program: its sources of
tokens, the files it writes, the page, and what it says to input that cannot be used. Python's standard
library only; a build without FFmpeg is tested for what it says then.

SPDX-License-Identifier: Apache-2.0"""
import html.parser
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

PROGRAM, DATA = "", ""
TIMEOUT = 120
CODES = {"<f4": "f", "<f2": "e", "<f8": "d", "<i4": "i", "|u1": "B", "<i8": "q"}


def run(*args, env=None):
    full = dict(os.environ, NO_COLOR="1")
    full.update(env or {})
    return subprocess.run([PROGRAM, *args], capture_output=True, timeout=TIMEOUT, env=full)


def npy(path):
    """Shape and flat values of a .npy file of version 1."""
    with open(path, "rb") as f:
        data = f.read()
    n, = struct.unpack_from("<H", data, 8)
    head = data[10:10 + n].decode()
    descr = re.search(r"'descr': '([^']+)'", head).group(1)
    shape = tuple(int(v) for v in re.findall(r"\d+", re.search(r"'shape': \(([^)]*)\)", head).group(1)))
    count = math.prod(shape)
    return shape, struct.unpack_from("<%d%s" % (count, CODES[descr]), data, 10 + n)


def npy_bytes(shape, values, descr="<f4"):
    head = "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }" % (descr, "".join("%d, " % d for d in shape))
    head += " " * (-(11 + len(head)) % 64) + "\n"
    body = struct.pack("<%d%s" % (len(values), CODES[descr]), *values)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + body


def safetensors_bytes(tensors, descr="F32", code="f"):
    head, body = {}, b""
    for name, (shape, values) in tensors.items():
        data = struct.pack("<%d%s" % (len(values), code), *values)
        head[name] = {"dtype": descr, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


def safetensors(path):
    with open(path, "rb") as f:
        data = f.read()
    n, = struct.unpack_from("<Q", data)
    head = json.loads(data[8:8 + n])
    meta = head.pop("__metadata__", {})
    end = 8 + n
    for name, t in head.items():
        first, last = (8 + n + v for v in t["data_offsets"])
        t["bytes"] = data[first:last]
        end = max(end, last)
    assert end == len(data)
    return head, meta


def scene(n_frame, n_tok, dim, seed=1):
    """Features that stand still but for one token a frame, with a cut in the middle."""
    r = random.Random(seed)
    still = [[[r.gauss(0, 1) for _ in range(dim)] for _ in range(n_tok)] for _ in range(2)]
    values = []
    for t in range(n_frame):
        for i in range(n_tok):
            moving = i == t % n_tok
            values += [r.gauss(0, 1) if moving else v + r.gauss(0, 0.02) for v in still[2 * t // n_frame][i]]
    return values


class Video(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="kvfold-video-")
        self.clip = os.path.join(DATA, "video", "numbers.mp4")
        self.tower = os.path.join(DATA, "vision_tower", "onevision.gguf")
        self.shape = (8, 16, 12)
        self.features = self.write("f.npy", npy_bytes(self.shape, scene(*self.shape)))

    def tearDown(self):
        shutil.rmtree(self.dir)

    def path(self, name):
        return os.path.join(self.dir, name)

    def write(self, name, data):
        with open(self.path(name), "wb") as f:
            f.write(data)
        return self.path(name)

    def ok(self, *args, **more):
        r = run("video", *args, **more)
        self.assertEqual(r.returncode, 0, r.stderr.decode(errors="replace"))
        self.assertNotIn(b"\x1b", r.stdout + r.stderr)
        return r

    def json(self, *args, **more):
        return json.loads(self.ok(*args, "--json", **more).stdout)

    def bad(self, *args, code=2, says=""):
        r = run("video", *args)
        text = r.stderr.decode("utf-8")
        self.assertEqual(r.returncode, code, "%s: %s" % (args, text))
        self.assertEqual(r.stdout, b"")
        self.assertEqual(text.strip().count("\n"), 0, text)
        self.assertIn("kvfold:", text)
        self.assertIn(says, text)


class Features(Video):
    def test_what_is_written_agrees_with_itself(self):
        out = self.path("out")
        r = self.json("--features", self.features, "--merge", "holitom:ratio=0.25", "-o", out)
        m = r["plan"]["n_out"]
        self.assertEqual(m, 32)  # mode=exact is exact
        shape, tokens = npy(out + ".tokens.npy")
        self.assertEqual(shape, (m, 12))
        shape, meta = npy(out + ".meta.npy")
        self.assertEqual(shape, (m, 4))
        tensors, facts = safetensors(out + ".safetensors")
        self.assertEqual(tensors["embeddings"]["shape"], [m, 12])
        self.assertEqual(tensors["embeddings"]["bytes"], struct.pack("<%df" % len(tokens), *tokens))
        self.assertEqual(tensors["meta"]["bytes"], struct.pack("<%di" % len(meta), *meta))
        self.assertEqual(tensors["position"]["shape"], [m])
        self.assertEqual(tensors["mrope"]["shape"], [3, m])
        self.assertEqual(tensors["segments"]["shape"], [r["plan"]["n_segments"], 6])
        self.assertNotIn("time", tensors)
        self.assertEqual(facts["tokens_out"], str(m))
        self.assertEqual(facts["spec"], r["plan"]["spec"])
        # Copied tokens are those of the input, and segments do not cross the cut.
        _, source = npy(self.features)
        for i in range(m):
            segment, kind, frame, pos = meta[4 * i:4 * i + 4]
            if kind == 1:
                at = (frame * 16 + pos) * 12
                self.assertEqual(tokens[12 * i:12 * i + 12], source[at:at + 12])
            s = r["plan"]["segments"][segment]
            self.assertTrue(s["first"] <= frame <= s["last"])
        self.assertTrue(all((s["first"] < 4) == (s["last"] < 4) for s in r["plan"]["segments"]))

    def test_everything_kept_is_everything(self):
        out = self.path("out")
        self.ok("--features", self.features, "--merge", "uniform:ratio=1", "--positions", "keep", "-o", out)
        self.assertEqual(npy(out + ".tokens.npy")[1], npy(self.features)[1])
        tensors, _ = safetensors(out + ".safetensors")
        n = 8 * 16
        self.assertEqual(tensors["position"]["bytes"], struct.pack("<%di" % n, *range(n)))
        planes = [i // 16 for i in range(n)] + [i % 16 // 4 for i in range(n)] + [i % 4 for i in range(n)]
        self.assertEqual(tensors["mrope"]["bytes"], struct.pack("<%di" % (3 * n), *planes))

    def test_positions_are_counted_anew_unless_kept(self):
        out = self.path("out")
        r = self.json("--features", self.features, "-o", out)
        m = r["plan"]["n_out"]
        self.assertEqual(safetensors(out + ".safetensors")[0]["position"]["bytes"], struct.pack("<%di" % m, *range(m)))
        self.ok("--features", self.features, "-o", out, "--positions", "keep")
        tensors, _ = safetensors(out + ".safetensors")
        _, meta = npy(out + ".meta.npy")
        want = [meta[4 * i + 2] * 16 + meta[4 * i + 3] for i in range(m)]
        self.assertEqual(tensors["position"]["bytes"], struct.pack("<%di" % m, *want))

    def test_all_planners_run_and_are_listed(self):
        listed = json.loads(self.ok("--list-planners", "--json").stdout)["planners"]
        names = {p["name"] for p in listed}
        self.assertLessEqual({"holitom", "evs", "visionzip", "uniform"}, names)
        text = self.ok("--list-planners").stdout.decode()
        for p in listed:
            self.assertIn(p["name"] + ":", text)
            if p["name"] == "storm":
                continue  # needs weights: see Storm
            exact = any(o["name"] == "ratio" for o in p["options"])
            r = self.json("--features", self.features, "--merge", p["name"] + (":ratio=0.2" if exact else ""), "--quality")
            if exact:
                self.assertEqual(r["plan"]["n_out"], int(0.2 * 8 * 16), p["name"])
            self.assertTrue(0 <= r["quality"]["nearest_mean"] <= 2)

    def test_scores_choose(self):
        values = [0.0] * 128
        for t in range(8):
            values[t * 16 + 5] = 1.0
        scores = self.write("s.npy", npy_bytes((8, 16), values, "<f8"))
        out = self.path("out")
        r = self.json("--features", self.features, "--scores", scores, "--merge", "holitom:ratio=0.0625,tau=1", "-o", out)
        self.assertEqual(r["plan"]["scores"], "given")
        _, meta = npy(out + ".meta.npy")
        self.assertEqual([meta[4 * i + 3] for i in range(8)], [5] * 8)
        self.assertNotIn("no scores", self.ok("--features", self.features, "--scores", scores).stderr.decode())
        self.assertIn("no scores", self.ok("--features", self.features).stderr.decode())

    def test_safetensors_and_half_precision_are_read_and_written(self):
        values = [round(v * 64) / 64 for v in scene(*self.shape)]  # exact in all types
        values = [max(-3.0, min(3.0, v)) for v in values]
        single = self.write("a.npy", npy_bytes(self.shape, values))
        half = self.write("h.npy", npy_bytes(self.shape, values, "<f2"))
        packed = self.write("p.safetensors", safetensors_bytes({"other": ((2,), [0, 0]), "x": (self.shape, values)}))
        out = self.path("out")
        first = None
        for path in (single, half, packed):
            self.ok("--features", path, "--merge", "uniform:ratio=0.1", "-o", out)
            got = npy(out + ".tokens.npy")
            first = first or got
            self.assertEqual(got, first, path)
        for kind, dtype, size in (("f16", "F16", 2), ("bf16", "BF16", 2), ("f32", "F32", 4)):
            self.ok("--features", single, "--merge", "uniform:ratio=0.1", "-o", out, "--type", kind)
            t = safetensors(out + ".safetensors")[0]["embeddings"]
            self.assertEqual((t["dtype"], len(t["bytes"])), (dtype, 12 * 12 * size))
            self.assertEqual(npy(out + ".tokens.npy")[0], (12, 12))
        two = self.write("two.safetensors", safetensors_bytes({"a": ((1, 1, 1), [0]), "b": ((1, 1, 1), [0])}))
        self.bad("--features", two, says="features")

    def test_newlines_need_an_embedding(self):
        line = self.write("n.npy", npy_bytes((12,), [7.0] * 12))
        out = self.path("out")
        self.bad("--features", self.features, "--merge", "holitom:newline=end", says="--newline")
        for path in (self.features, self.write("h.npy", npy_bytes(self.shape, scene(*self.shape), "<f2"))):
            self.ok("--features", path, "--merge", "holitom:newline=end", "--newline", line, "-o", out)
            self.assertEqual(npy(out + ".tokens.npy")[1][-12:], (7.0,) * 12)
        self.assertEqual(npy(out + ".meta.npy")[1][-1], -1)
        self.bad("--features", self.features, "--newline", self.features, says="newline")

    def test_input_that_cannot_be_used_is_named(self):
        f = self.features
        bad = list(scene(*self.shape))
        bad[100] = math.nan
        self.bad("--features", self.write("nan.npy", npy_bytes(self.shape, bad)), says="NaN")
        bad[100] = math.inf
        self.bad("--features", self.write("inf.npy", npy_bytes(self.shape, bad)), says="infinit")
        self.bad("--features", self.write("flat.npy", npy_bytes((8, 16), [0.0] * 128)), says="[8, 16]")
        self.bad("--features", self.write("none.npy", npy_bytes((0, 16, 4), [])), says="[0, 16, 4]")
        with open(f, "rb") as whole:
            self.bad("--features", self.write("cut.npy", whole.read()[:-1]), says="cut off")
        self.bad("--features", self.write("text.npy", b"not an array"), says="numpy.save")
        self.bad("--features", self.path("missing.npy"), says="No such file")
        self.bad("--features", f, "--scores", f, says="[8, 16]")
        self.bad("--features", f, "--scores", self.write("sn.npy", npy_bytes((8, 16), [math.nan] * 128)), says="NaN")
        self.bad("--features", f, "--grid", "5", says="divide")
        self.bad("--features", f, "--frames", "3", says="clip")
        self.bad("--features", f, "--features-from", "dctctx", says="exclude")
        self.bad("--features", f, "--merge", "nonsense", says="holitom")
        for ratio in ("0", "-1", "1.5", "nan"):
            self.bad("--features", f, "--merge", "holitom:ratio=" + ratio, says="ratio")
        self.bad("--features", f, "-o", "/nonexistent/x", says="/nonexistent/x")
        self.bad("--features", f, "--report", "/nonexistent/x.html", says="/nonexistent/x.html")
        self.bad(says="clip")
        self.bad(self.clip, says="--mmproj")

    def test_failures_leave_no_files(self):
        self.bad("--features", self.features, "--merge", "holitom:newline=end", "-o", self.path("out"))
        self.assertEqual(sorted(os.listdir(self.dir)), ["f.npy"])
        os.mkdir(self.path("out.meta.npy"))
        self.bad("--features", self.features, "-o", self.path("out"))
        self.assertFalse([n for n in os.listdir(self.dir) if n.endswith(".partial")])


def has_video():
    r = run("video", os.path.join(DATA, "video", "numbers.mp4"), "--features-from", "dctctx")
    return b"decodes no video" not in r.stderr


class Clips(Video):
    def setUp(self):
        super().setUp()
        if not has_video():
            self.bad(self.clip, "--features-from", "dctctx", says="--features")
            self.skipTest("this build decodes no video")

    def test_a_cut_is_found_and_a_still_scene_merged(self):
        out = self.path("out")
        r = self.json(self.clip, "--features-from", "dctctx", "--frames", "120", "--quality", "-o", out)
        self.assertEqual(r["features"]["n_tokens"], 196)
        self.assertEqual(r["clip"]["codec"], "h264")
        self.assertEqual(r["plan"]["n_out"], 2352)
        self.assertIn(60, [s["first"] for s in r["plan"]["segments"]], "no segment begins at the cut")
        self.assertGreater(r["plan"]["total_reduced"], 120 * 196 / 4)
        self.assertLess(r["quality"]["nearest_mean"], 0.2)
        tensors, facts = safetensors(out + ".safetensors")
        times = struct.unpack("<120f", tensors["time"]["bytes"])
        self.assertEqual(times[0], 0)
        self.assertAlmostEqual(times[-1], 5.95, places=2)
        self.assertEqual(facts["clip"], self.clip)

    def test_frames_are_chosen_by_number_rate_and_range(self):
        def times(*args):
            return [round(t, 2) for t in self.json(self.clip, "--features-from", "dctctx", *args)["clip"]["times"]]
        self.assertEqual(times("--frames", "2"), [0, 5.95])
        self.assertEqual(times("--fps", "1", "--start", "2"), [2, 3, 4, 5])
        self.assertEqual(times("--start", "1", "--end", "1.1"), [1, 1.05])
        r = self.ok(self.clip, "--features-from", "dctctx", "--frames", "500")
        self.assertIn(b"no more than 120", r.stderr)
        self.bad(self.clip, "--features-from", "dctctx", "--start", "7", says="5.95")
        self.bad(self.clip, "--features-from", "dctctx", "--start", "3", "--end", "2", says="--end")
        self.bad(self.clip, "--features-from", "dctctx", "--fps", "1", "--frames", "2", says="--fps")

    def test_the_same_clip_gives_the_same_tokens_in_every_container_and_at_every_thread_count(self):
        got = []
        for name, threads in (("numbers.mp4", "1"), ("numbers.mkv", "1"), ("numbers.mp4", "2")):
            out = self.path("out")
            self.ok(os.path.join(DATA, "video", name), "--features-from", "dctctx", "--frames", "9", "-t", threads, "-o", out)
            got.append(npy(out + ".tokens.npy"))
        self.assertEqual(got[0], got[1])
        self.assertEqual(got[0], got[2])

    def test_a_tower_gives_tokens_scores_and_newline(self):
        out = self.path("out")
        r = self.json(self.clip, "--mmproj", self.tower, "--frames", "6", "--merge", "holitom:newline=end,ratio=0.3", "-o", out)
        self.assertEqual(r["plan"]["scores"], "given")
        self.assertEqual(r["features"]["n_tokens"], 16)  # 7 x 7 patches, pooled
        self.assertEqual(npy(out + ".tokens.npy")[0], (r["plan"]["n_out"], 64))
        self.assertEqual(r["plan"]["n_newline"], 1)
        full = self.json(self.clip, "--mmproj", self.tower, "--frames", "2", "--pool", "none", "--merge", "uniform:ratio=1")
        self.assertEqual(full["plan"]["n_out"], 2 * 49)
        self.assertEqual(full["features"]["grid_width"], 7)
        self.bad(self.clip, "--mmproj", os.path.join(DATA, "tiny", "qwen2.gguf"), says="not a vision tower")
        self.bad(self.clip, "--mmproj", self.features, says="f.npy")

    def test_features_of_a_clip_must_have_its_frames(self):
        self.ok(self.clip, "--features", self.features, "--report", self.path("r.html"))
        self.bad(self.clip, "--features", self.features, "--frames", "5", says="8 frames")

    def test_what_is_no_clip_is_refused(self):
        d = ("--features-from", "dctctx")
        self.bad(os.path.join(DATA, "video", "sound.mka"), *d, says="sound only")
        self.bad(self.write("empty.mp4", b""), *d, says="empty")
        self.bad(self.write("noise.mp4", random.Random(1).randbytes(5000)), *d, says="no video")
        self.bad(self.write("text.mp4", b"words " * 200), *d, says="no video")
        self.bad(self.write("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n"), *d, says="list")
        self.bad(self.path("missing.mp4"), *d, says="No such file")
        self.bad(self.dir, *d, says="regular file")
        self.bad("-", *d, says="standard input")
        os.mkfifo(self.path("pipe.mp4"))
        self.bad(self.path("pipe.mp4"), *d, says="regular file")

    def test_a_damaged_clip_is_read_as_far_as_it_goes_and_that_is_said(self):
        with open(self.clip, "rb") as f:
            data = f.read()
        cut = self.write("cut.mp4", data[:len(data) * 2 // 3])
        r = self.json(cut, "--features-from", "dctctx", "--frames", "10")
        self.assertTrue(r["clip"]["damaged"])
        self.assertIn(b"cut off or damaged", self.ok(cut, "--features-from", "dctctx").stderr)
        self.bad(self.write("head.mp4", data[:400]), "--features-from", "dctctx", says="cut off")
        # A picture size that would need 12 GB: in the sample description, behind the four letters of the codec.
        at = data.index(b"avc1", data.index(b"stsd")) + 4 + 24
        huge = data[:at] + struct.pack(">HH", 65000, 65000) + data[at + 4:]
        r = run("video", self.write("huge.mp4", huge), "--features-from", "dctctx")
        self.assertIn(r.returncode, (0, 2))  # FFmpeg may believe the stream rather than the container


class Streams(Video):
    """Planning while frames come in gives what planning the whole by segments gives."""

    def same(self, spec, *args, more=()):
        whole, stream = self.path("whole"), self.path("stream")
        a = self.json(*args, "--merge", spec, "-o", whole, *more)
        b = self.json(*args, "--merge", spec, "-o", stream, "--stream", *more)
        self.assertEqual(b["plan"]["n_forced"], 0)
        for key in ("spec", "n_in", "n_out", "n_asked", "n_merged", "n_copied", "n_used", "segments", "total_reduced"):
            self.assertEqual(a["plan"][key], b["plan"][key], key)
        for end in (".tokens.npy", ".meta.npy"):
            with open(whole + end, "rb") as f, open(stream + end, "rb") as g:
                self.assertEqual(f.read(), g.read(), end)
        (ha, _), (hb, _) = safetensors(whole + ".safetensors"), safetensors(stream + ".safetensors")
        self.assertEqual(ha, hb)
        self.assertEqual([n for n in os.listdir(self.dir) if n.startswith("stream.") and n.count(".") == 1],
                         ["stream.safetensors"])
        return b

    def test_features_give_the_same_bytes(self):
        scores = self.write("a.npy", npy_bytes(self.shape[:2], [random.Random(3).random() for _ in range(8 * 16)]))
        newline = self.write("n.npy", npy_bytes((12,), [0.5] * 12))
        for spec in ("holitom:budget=segment,ratio=0.3", "holitom:mode=official,budget=segment,ratio=0.3",
                     "holitom:budget=segment,ratio=0.01", "holitom:budget=segment,ratio=0.3,order=grid,newline=row"):
            for keep in ("keep", "compact"):
                for kind in ("f32", "f16", "bf16"):
                    self.same(spec, "--features", self.features, "--scores", scores, "--newline", newline,
                              more=("--positions", keep, "--type", kind))

    def test_clips_give_the_same_bytes(self):
        for source in (("--features-from", "dctctx"), ("--mmproj", self.tower)):
            r = self.same("holitom:budget=segment,ratio=0.2", self.clip, *source)
            self.assertTrue(r["plan"]["streamed"])
            self.assertEqual(len(r["clip"]["times"]), r["features"]["n_frames"])

    def test_a_short_hold_ends_segments_and_says_so(self):
        still = self.write("still.npy", npy_bytes((20, 4, 3), [1.0, 2.0, 3.0] * 80))
        r = run("video", "--features", still, "--merge", "holitom:ratio=0.2", "--stream", "--hold", "4", "-o", self.path("h"), "--json")
        self.assertEqual(r.returncode, 0, r.stderr)
        self.assertIn(b"--hold 4", r.stderr)
        plan = json.loads(r.stdout)["plan"]
        self.assertGreater(plan["n_forced"], 0)
        self.assertEqual(plan["n_out"], 16)
        self.assertEqual(sum(s["last"] - s["first"] + 1 for s in plan["segments"]), 20)

    def test_a_page_is_written(self):
        self.ok(self.clip, "--features-from", "dctctx", "--stream", "--report", self.path("r.html"))
        with open(self.path("r.html"), encoding="utf-8") as f:
            self.assertIn("data:image/jpeg", f.read())

    def test_what_does_not_stream_is_named(self):
        f = ("--features", self.features, "--stream")
        self.bad(*f, "--merge", "visionzip:ratio=0.2", says="cannot stream")
        self.bad(*f, "--quality", says="--quality")
        self.bad(*f, "-o", self.path("no/where"), says="no/where")
        nan = self.write("nan.npy", npy_bytes((3, 4, 2), [0.5] * 23 + [math.nan]))
        self.bad("--features", nan, "--stream", "-o", self.path("x"), says="NaN")
        self.assertEqual([n for n in os.listdir(self.dir) if n.startswith("x")], [])


class Storm(Video):
    """STORM's layers from a file: the fixtures' weights give the fixtures' output."""

    NAMES = {"ln_w": "norm.weight", "ln_b": "norm.bias", "in_proj": "mixer.in_proj.weight", "out_proj": "mixer.out_proj.weight",
             "conv_w": "mixer.conv1d.weight", "conv_b": "mixer.conv1d.bias", "x_proj": "mixer.x_proj.weight",
             "dt_w": "mixer.dt_proj.weight", "dt_b": "mixer.dt_proj.bias", "A_log": "mixer.A_log", "D": "mixer.D"}
    BACK = {"b_conv_w": "mixer.conv1d_b.weight", "b_conv_b": "mixer.conv1d_b.bias", "b_x_proj": "mixer.x_proj_b.weight",
            "b_dt_w": "mixer.dt_proj_b.weight", "b_dt_b": "mixer.dt_proj_b.bias", "b_A_log": "mixer.A_b_log", "b_D": "mixer.D_b"}

    def setUp(self):
        super().setUp()
        self.block = os.path.join(DATA, "vision", "mamba", "block")
        shape, values = npy(os.path.join(self.block, "x.npy"))
        self.assertEqual(shape[0] % 4, 0)
        self.x = self.write("x.npy", npy_bytes((shape[0] // 4, 4, shape[1]), values))

    def tensors(self, both):
        names = dict(self.NAMES, **(self.BACK if both else {}))
        return {"m.layers.%d.%s" % (i, to): npy(os.path.join(self.block, "layer%d" % i, name + ".npy"))
                for i in range(2) for name, to in names.items()}

    def gguf(self, tensors):
        head, body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0), b""
        for name, (shape, values) in tensors.items():
            head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
            head += struct.pack("<%dQ" % len(shape), *reversed(shape)) + struct.pack("<IQ", 0, len(body))
            body += struct.pack("<%df" % len(values), *values)
            body += bytes(-len(body) % 32)
        return head + bytes(-len(head) % 32) + body

    def tokens(self, weights, *more):
        r = self.json("--features", self.x, "--merge", "storm:weights=%s+uniform:ratio=1" % weights, "-o", self.path("o"), *more)
        self.assertIn("2 Mamba layers, 24 wide", r["plan"]["storm"])
        return npy(self.path("o.tokens.npy"))[1]

    def near(self, got, name):
        want = npy(os.path.join(self.block, name + ".npy"))[1]
        scale = max(1, max(map(abs, want)))
        self.assertEqual(len(got), len(want))
        self.assertLess(max(abs(a - b) for a, b in zip(got, want)), 2e-5 * scale)

    def test_both_file_formats_give_the_fixtures_output(self):
        for both, want in ((False, "storm_uni_out"), (True, "storm_bidir_out")):
            t = self.tensors(both)
            a = self.tokens(self.write("w.safetensors", safetensors_bytes(t)))
            self.near(a, want)
            self.assertEqual(self.tokens(self.write("w.gguf", self.gguf(t))), a)

    def test_layers_of_one_direction_stream_and_the_others_say_why_not(self):
        w = self.write("w.safetensors", safetensors_bytes(self.tensors(False)))
        spec, outs = "storm:weights=%s+pool_time:k=4" % w, []
        for more in ((), ("--stream",)):
            self.ok("--features", self.x, "--merge", spec, "-o", self.path("o"), *more)
            outs.append(npy(self.path("o.tokens.npy"))[1])
        self.assertEqual(*outs)
        w = self.write("w.safetensors", safetensors_bytes(self.tensors(True)))
        r = run("video", "--features", self.x, "--merge", "storm:weights=" + w, "--stream")
        self.assertNotEqual(r.returncode, 0)
        self.assertIn(b"both directions", r.stderr)

    def test_without_a_planner_it_pools_time_by_four(self):
        w = self.write("w.safetensors", safetensors_bytes(self.tensors(True)))
        r = self.json("--features", self.x, "--merge", "storm:weights=" + w)
        self.assertEqual(r["plan"]["spec"], "pool_time:k=4")

    def test_what_is_wrong_with_weights_is_named(self):
        good = self.tensors(False)

        def refuse(tensors, says, **more):
            w = self.write("w.safetensors", safetensors_bytes(tensors, **more))
            r = run("video", "--features", self.x, "--merge", "storm:weights=" + w)
            self.assertNotEqual(r.returncode, 0)
            self.assertIn(says, r.stderr.decode())

        one = "m.layers.1.mixer.D"
        refuse({k: v for k, v in good.items() if k != one}, one + "' is missing")
        refuse(dict(good, **{"m.layers.0.mixer.in_proj.bias": ((2,), (0.0, 0.0))}), "in_proj.bias")
        refuse(dict(good, **{one: ((47,), (0.0,) * 47)}), one)
        refuse(dict(good, **{one: ((48,), (math.nan,) + (0.0,) * 47)}), "NaN")
        refuse({k: (s, [int(x) for x in v]) for k, (s, v) in good.items()}, "i32", descr="I32", code="i")
        refuse({"x": ((1,), (0.0,))}, "Mamba layer")
        w = self.write("w.safetensors", safetensors_bytes(good))
        self.bad("--features", self.features, "--merge", "storm:weights=" + w, says="24 wide")
        self.bad("--features", self.x, "--merge", "storm", says="weights=FILE")
        self.bad("--features", self.x, "--merge", "storm:weights=%s,eps=2" % w, says="eps")
        self.bad("--features", self.x, "--merge", "storm:weights=%s,k=4" % w, says="k=4")
        for odd in ("/nowhere.safetensors", self.write("e.gguf", b"GGUF"), self.write("e.safetensors", b"x")):
            r = run("video", "--features", self.x, "--merge", "storm:weights=" + odd)
            self.assertNotEqual(r.returncode, 0)
            self.assertIn(b"kvfold", r.stderr)


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = {}, [], ""

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text += data


class Report(Video):
    def page(self, *args):
        path = self.path("page.html")
        self.ok(*args, "--report", path)
        with open(path, encoding="ascii") as f:
            text = f.read()
        p = Page()
        p.feed(text)
        self.assertNotIn("http", text)
        self.assertTrue(all(v.startswith("data:image/jpeg;base64,") for v in p.links))
        return p, text

    def test_it_shows_every_frame_and_stands_alone(self):
        p, text = self.page("--features", self.features, "--merge", "holitom:ratio=0.25", "--quality")
        self.assertEqual(p.tags["figure"], 8)
        self.assertEqual(text.count("<section"), 2)
        self.assertIn("128", p.text)
        self.assertIn("f.npy", p.text)

    def test_it_has_the_pictures_of_the_clip(self):
        if not has_video():
            self.skipTest("this build decodes no video")
        p, _ = self.page(self.clip, "--features-from", "dctctx", "--frames", "12")
        self.assertEqual(p.tags["img"], 12)
        self.assertIn("numbers.mp4", p.text)

    def test_names_are_escaped(self):
        name = self.path("<script>&.npy")
        shutil.copy(self.features, name)
        p, text = self.page("--features", name)
        self.assertNotIn("<script", text)
        self.assertIn("<script>&.npy", p.text)


class AskAboutAVideo(unittest.TestCase):
    """kvfold ask --video, as far as random models go: lesson 8's way through llama.cpp gives the same logits."""

    def ask(self, *args):
        return run("ask", "-m", os.path.join(DATA, "tiny", "qwen2.gguf"), *args, "What is it?")

    def refused(self, word, *args):
        r = self.ask(*args)
        self.assertEqual(r.returncode, 2, r.stderr)
        self.assertIn(word, r.stderr.decode())

    def test_a_tower_of_another_width_is_named(self):
        if not has_video():
            self.skipTest("this build decodes no video")
        self.refused("belongs to another model", "--video", os.path.join(DATA, "video", "numbers.mp4"),
                     "--mmproj", os.path.join(DATA, "vision_tower", "onevision.gguf"), "--frames", "4")

    def test_a_tower_of_another_width_is_named_before_frames_are_encoded(self):
        if not has_video():
            self.skipTest("this build decodes no video")
        r = self.ask("--video", os.path.join(DATA, "video", "numbers.mp4"), "--mmproj",
                     os.path.join(DATA, "vision_tower", "onevision.gguf"), "--frames", "4")
        self.assertEqual(r.returncode, 2)
        self.assertNotIn(b"Encoding", r.stderr)
        self.assertIn(b"gives tokens of", r.stderr)

    def test_what_does_not_go_together_is_refused(self):
        self.refused("--mmproj", "--video", "clip.mp4")
        self.refused("--video", "--mmproj", "tower.gguf")
        self.refused("--merge", "--merge", "holitom:ratio=0.5")
        self.refused("-d", "--video", "clip.mp4", "--mmproj", "tower.gguf", "-d", "text.txt")
        self.refused("store", "--video", "clip.mp4", "--mmproj", "tower.gguf", "--policy", "infllm")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    PROGRAM, DATA = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    unittest.main(argv=sys.argv[:1] + sys.argv[3:])
