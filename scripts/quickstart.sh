#!/bin/sh
# quickstart.sh - from a fresh clone to the first answer.
#
#   quickstart.sh
#
# Installs missing packages (Debian), fetches the default model (491 MB, once, into
# ~/.cache/kvfold), builds in build/, reads the Debian Policy Manual (193 pages, four times what the
# model was trained to hold) into a store, once, and asks it three questions. The store takes 1.6 GB in
# ~/.cache/kvfold/policy-store. Ctrl-C while it reads keeps what is read; a second run goes on from
# there, or, when all is read, only asks.
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
    if [ -r $docs/policy.pdf.gz ]; then
        echo $docs
        return
    fi
    unpacked=$cache/debian-policy
    if [ ! -r "$unpacked$docs/policy.pdf.gz" ]; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        # apt's own sandbox user could not write to a directory of ours.
        (cd "$scratch" && apt-get -q -o APT::Sandbox::User=root download debian-policy >&2)
        mkdir -p "$unpacked"
        dpkg-deb -x "$scratch"/debian-policy_*.deb "$unpacked"
    fi
    echo "$unpacked$docs"
}

say "1/5 Packages"
scripts/install_packages.sh --fetch --docs

say "2/5 The model"
model=$(scripts/fetch_model.py default --yes)
echo "$model" >&2

say "3/5 Build"
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
store=$cache/policy-store
say "4/5 The Debian Policy Manual, read once into $store"
"$kvfold" ingest -m "$model" --store "$store" -d "$folder/policy.pdf.gz"
read_at=$(date +%s)

say "5/5 Three questions"
"$kvfold" ask -m "$model" --store "$store" -d policy.pdf.gz \
    -q "What are the three archive areas?" \
    -q "What should be in the extended description of a package?" \
    -q "Which file must contain the copyright information of a package?"
say "$((read_at - built)) seconds for reading, $(($(date +%s) - read_at)) for three questions"
cat >&2 <<END

Your own document:   $kvfold ingest --store books -d FILE && $kvfold ask --store books "question"
Just one question:   $kvfold ask -d FILE "question"
What is in a store:  $kvfold inspect $store
All commands:        $kvfold --help
END
