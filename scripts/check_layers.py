#!/usr/bin/env python3
"""check_layers.py - hold the tree to its own rules: who includes whom, and what no file holds.

    check_layers.py [ROOT]

Prints every violation as FILE:LINE: text and exits 1 if there is one. The rules:

  layers    an include is written from its root (`#include "kv/cache.h"`) and names a file of the
            same or a lower layer, as docs/ARCHITECTURE.md draws them; programs, examples and
            plugins see include/kvfold only; an instruction-set header only a file that carries
            the set in its name
  bans      in src/: functions that end the process, print, read the environment or the locale,
            or cannot know the size of what they write; memory from elsewhere than base/mem.h
  text      ASCII, no tab (but in Makefiles), no blank at a line's end, a newline at the file's
            end, an SPDX line in the head, a README.md in every folder

SPDX-License-Identifier: Apache-2.0
"""
import os
import re
import subprocess
import sys

# folder prefix -> (layer, include prefixes it may name beyond its own folder)
LIBC_ONLY = ["kvfold/"]
LAYERS = [
    ("include/kvfold/", 0, ["kvfold/"]),
    ("src/base/", 1, LIBC_ONLY),
    ("src/backend/cpu/", 2, LIBC_ONLY + ["base/", "backend/backend.h", "backend/cpu/"]),
    ("src/backend/", 2, LIBC_ONLY + ["base/"]),
    ("src/merge/", 2, LIBC_ONLY + ["base/", "backend/cpu/simd_"]),
    ("src/policy/", 3, LIBC_ONLY + ["base/"]),
    ("src/kv/", 3, LIBC_ONLY + ["base/", "backend/backend.h", "policy/policy.h"]),
    ("src/model/", 4, LIBC_ONLY + ["base/", "backend/backend.h", "kv/", "merge/inner.h", "policy/", "memory/store.h", "memory/faiss_index.h"]),
    ("src/comm/", 3, LIBC_ONLY + ["base/", "backend/backend.h"]),
    ("src/vision/", 4, LIBC_ONLY + ["base/", "backend/backend.h", "backend/cpu/simd_", "model/gguf.h"]),
    ("src/api/", 5, LIBC_ONLY + ["base/", "backend/", "kv/", "merge/", "policy/", "model/", "vision/", "memory/store.h"]),
    ("cuda/", 2, LIBC_ONLY + ["base/", "backend/backend.h", "backend/backend_load.h"]),
    ("memory/", 3, LIBC_ONLY + ["base/", "backend/backend.h", "kv/tier.h", "kv/index.h", "memory/"]),
    ("tools/", 6, LIBC_ONLY),
    ("examples/", 6, LIBC_ONLY),
    ("plugins/", 6, LIBC_ONLY),
    ("bench/", 6, LIBC_ONLY + ["base/", "backend/", "cuda/", "merge/", "memory/faiss_c.h"]),
    ("tests/", 7, ["kvfold/", "base/", "backend/", "cuda/", "kv/", "policy/", "merge/", "model/", "vision/", "api/", "comm/", "memory/", "tests/", "tools/"]),
]

BANNED = {
    "sprintf": "use snprintf", "vsprintf": "use vsnprintf", "strcpy": "use memcpy with a length",
    "strcat": "use memcpy with a length", "strncpy": "use memcpy with a length", "gets": "use fgets",
    "atoi": "parse with a range check", "atol": "parse with a range check",
    "atof": "parse with a range check", "strtod": "follows the locale; see base/option.c",
    "strtof": "follows the locale; see base/option.c", "setlocale": "belongs to the host program",
    "malloc": "use base/mem.h", "calloc": "use base/mem.h", "realloc": "use base/mem.h",
    "free": "use base/mem.h", "aligned_alloc": "use base/mem.h", "posix_memalign": "use base/mem.h",
    "strdup": "use base/mem.h", "alloca": "use base/mem.h", "getenv": "read in tools/ only",
    "exit": "return a status", "_exit": "return a status", "abort": "return a status",
    "assert": "return a status", "printf": "use base/log.h", "fprintf": "use base/log.h",
    "vprintf": "use base/log.h", "puts": "use base/log.h", "putchar": "use base/log.h",
    "perror": "use kvf_fail", "rand": "use a seeded generator", "srand": "use a seeded generator",
}
# The one place where each lives.
ALLOWED = {"src/base/mem.c": {"malloc", "free"}}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
CALL = re.compile(r"(?<![\w.>])([A-Za-z_]\w*)\s*\(")
SIMD_HEADERS = {"immintrin.h", "xmmintrin.h", "emmintrin.h", "x86intrin.h", "arm_neon.h"}
# A header of the CPU backend takes the set of the file that includes it.
SIMD_NAME = re.compile(r"_(avx2|avx512|amx|neon)\.c$|^src/backend/cpu/.*\.h$")
CODE = (".c", ".h", ".cpp", ".hpp", ".cu", ".cuh")
TEXT = CODE + (".py", ".sh", ".txt", ".cmake", ".md", ".in", ".json", ".1", ".csv")
HEADED = CODE + (".py", ".sh", ".cmake")


def without_comments_and_strings(text):
    """The same lines, comments and literals blanked, so that a ban finds code alone."""
    def blank(match):
        return re.sub(r"[^\n]", " ", match.group(0))
    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', blank, text, flags=re.S)


def files_of(root):
    """Files git tracks or would track, so that build folders and caches do not count."""
    try:
        listed = subprocess.run(["git", "-C", root, "ls-files", "-co", "--exclude-standard"],
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        names = listed.stdout.decode().splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [d for d in folders if not d.startswith((".", "build"))]
            names += [os.path.relpath(os.path.join(folder, f), root) for f in files]
    return sorted(n for n in set(names) if os.path.isfile(os.path.join(root, n)))


def layer_of(name):
    for prefix, layer, may in LAYERS:
        if name.startswith(prefix):
            return prefix, layer, may
    return None, None, None


def check_includes(root, name, lines, report):
    prefix, _, may = layer_of(name)
    if prefix is None:
        return
    own = prefix[len("src/"):] if prefix.startswith("src/") else prefix
    for number, line in enumerate(lines, 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        quoted, target = match.group(1) == '"', match.group(2)
        if target in SIMD_HEADERS and not SIMD_NAME.search(name) and prefix not in ("tests/", "bench/"):
            report(name, number, "<%s> outside a file named after its instruction set" % target)
        if not quoted:
            if target.startswith("kvfold/") or prefix != "include/kvfold/":
                continue
            if target not in ("stddef.h", "stdint.h"):
                report(name, number, "the public header includes <%s>" % target)
            continue
        if prefix in ("tools/", "tests/", "bench/", "examples/", "plugins/", "memory/", "cuda/") and \
                os.path.isfile(os.path.join(root, prefix, target)):
            continue  # its own folder, written from that folder
        if prefix == "tests/" and os.path.isfile(os.path.join(root, "tools", target)):
            continue  # the program's parts, as the program includes them
        if prefix == "tests/" and target.endswith((".c", ".cpp")):
            report(name, number, "a test includes a source file; link it instead")
        if "/" not in target or target.startswith("."):
            report(name, number, 'include "%s" is not written from the root' % target)
        elif not target.startswith(tuple(may + [own])):
            report(name, number, 'includes "%s"; this layer may include %s' % (target, " ".join(may + [own])))
        elif prefix == "src/policy/" and target.startswith("policy/") and \
                target not in ("policy/policy.h", "policy/registry.h") and not same_stem(name, target):
            report(name, number, "a policy includes another policy's header")


def same_stem(name, target):
    return os.path.basename(name).split(".")[0].startswith(os.path.basename(target).split(".")[0].replace("_int", ""))


def check_bans(name, text, report):
    if not name.startswith("src/") or not name.endswith(CODE):
        return
    allowed = ALLOWED.get(name, set())
    for number, line in enumerate(without_comments_and_strings(text).split("\n"), 1):
        for call in CALL.findall(line):
            if call in BANNED and call not in allowed:
                report(name, number, "%s() is not used in the library: %s" % (call, BANNED[call]))


def check_text(name, data, report):
    if not name.endswith(TEXT) and os.path.basename(name) not in ("run", ".clang-format", ".gitignore"):
        return
    if name.startswith("tests/data/") and not name.endswith((".py", ".md")):
        return  # fixtures hold whatever they must
    text = data.decode("utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.isascii():
            report(name, number, "not ASCII")
        if "\t" in line:
            report(name, number, "a tab")
        if line != line.rstrip():
            report(name, number, "a blank at the end of the line")
    if text and not text.endswith("\n"):
        report(name, text.count("\n") + 1, "no newline at the end of the file")
    if name.endswith(HEADED) and "SPDX-License-Identifier: Apache-2.0" not in "\n".join(text.split("\n")[:60]):
        report(name, 1, "no SPDX-License-Identifier line in the head")


def check_folders(names, report):
    folders = set()
    for name in names:
        parts = name.split("/")[:-1]
        folders.update("/".join(parts[:i]) for i in range(1, len(parts) + 1))
    for folder in sorted(folders):
        if folder.startswith((".", "bench/results", "tests/data/")) or folder in ("include", "src"):
            continue
        if folder + "/README.md" not in names:
            report(folder + "/", 0, "the folder has no README.md")


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, ".."))
    found = []

    def report(name, number, text):
        found.append((name, number, text))

    names = files_of(root)
    for name in names:
        with open(os.path.join(root, name), "rb") as file:
            data = file.read()
        check_text(name, data, report)
        if name.endswith(CODE):
            text = data.decode("utf-8", errors="replace")
            check_includes(root, name, text.split("\n"), report)
            check_bans(name, text, report)
    check_folders(set(names), report)
    for name, number, text in found:
        print("%s:%d: %s" % (name, number, text))
    print("check_layers: %d files, %d violations" % (len(names), len(found)))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
