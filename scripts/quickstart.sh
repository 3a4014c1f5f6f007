#!/bin/sh
# quickstart.sh - from a fresh clone to the first answer.
#
#   quickstart.sh
#
# Installs missing packages (Debian), fetches the default model (491 MB, once, into
# ~/.cache/kvfold), builds in build/, and asks a question about two specifications out of Debian's
# package debian-policy: some 15 pages, 7,500 tokens. A second run finds all of that done and only
# asks.
#
# SPDX-License-Identifier: Apache-2.0
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvfold
docs=/usr/share/doc/debian-policy

say() {
    printf '\n== %s\n' "$*" >&2
}

# Container images of Debian leave /usr/share/doc out when they install a package. The documents
# are then taken out of the package file itself. Prints the folder that has them.
find_documents() {
    if [ -r $docs/debconf_specification.txt.gz ]; then
        echo $docs
        return
    fi
    unpacked=$cache/debian-policy
    if [ ! -r "$unpacked$docs/debconf_specification.txt.gz" ]; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        # apt's own sandbox user could not write to a directory of ours.
        (cd "$scratch" && apt-get -q -o APT::Sandbox::User=root download debian-policy >&2)
        mkdir -p "$unpacked"
        dpkg-deb -x "$scratch"/debian-policy_*.deb "$unpacked"
    fi
    echo "$unpacked$docs"
}

say "1/4 Packages"
scripts/install_packages.sh --fetch --docs

say "2/4 The model"
model=$(scripts/fetch_model.py default --yes)
echo "$model" >&2

say "3/4 Build"
generator=""
if [ ! -e build/CMakeCache.txt ] && command -v ninja >/dev/null 2>&1; then
    generator="-G Ninja"
fi
# shellcheck disable=SC2086
cmake -S . -B build $generator -DCMAKE_BUILD_TYPE=Release -DKVF_TESTS=OFF -DKVF_BENCH=OFF >/dev/null
cmake --build build --parallel
built=$(date +%s)
kvfold=build/tools/kvfold

folder=$(find_documents)
question="How long should the short description of a debconf template be at most?"
say "4/4 Two specifications, one question: $question"
"$kvfold" ask -m "$model" -d "$folder/debconf_specification.txt.gz" -d "$folder/autopkgtest.txt.gz" \
    "$question"
say "$(($(date +%s) - built)) seconds from the end of the build to the end of the answer"
cat >&2 <<END

Your own document:   $kvfold ask -m $model -d FILE "question"
A whole standard:    $kvfold ask -m $model -d $folder/fhs/fhs-3.0.txt.gz "What is stored in /var/spool?"
All commands:        $kvfold --help
END
