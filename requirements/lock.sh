#!/usr/bin/env bash
# Regenerates cpu.txt, cuda.txt and torch-cuda.txt: one set of versions for Python 3.11 and 3.12 each,
# resolved from metadata alone, so nothing is downloaded or built. Needs uv on the PATH or in UV.
# Versions already locked are kept while they fit; UPGRADE=1 takes the newest.
set -euo pipefail
cd "$(dirname "$0")"
uv=${UV:-uv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() { # Python version, further arguments
    "$uv" pip compile --quiet --no-header --no-annotate \
        --python-platform x86_64-manylinux_2_28 --python-version "$@"
}

resolve() { # machine, Python version, further arguments
    local machine=$1 python=$2
    shift 2
    compile "$python" --overrides overrides.txt \
        "$@" "$machine.in" --output-file "$work/$machine-$python.txt"
}

lock() { # machine, further arguments
    local machine=$1
    shift
    if [[ -z ${UPGRADE:-} && -f $machine.txt ]]; then
        cp "$machine.txt" "$work/$machine-3.11.txt"
    fi
    resolve "$machine" 3.11 "$@"
    resolve "$machine" 3.12 --constraints "$work/$machine-3.11.txt" "$@"
    if ! diff "$work/$machine-3.11.txt" "$work/$machine-3.12.txt"; then
        echo "$machine.in: the lines above differ between Python 3.11 and 3.12;" \
            "bound them in $machine.in so that one lock serves both" >&2
        exit 1
    fi
    {
        cat "$machine.head"
        echo
        grep --no-filename -v '^ *#' "$work/$machine-3.11.txt" data-only.txt | LC_ALL=C sort
    } >"$work/$machine.txt"
    cp "$work/$machine.txt" "$machine.txt"
}

lock cpu --excludes excludes-common.txt --excludes excludes-cpu.txt
cp --no-clobber cpu.txt cuda.txt
lock cuda

# What torch asks for by its CUDA build, and cpu.txt does not have.
grep '^torch==' cpu.txt >"$work/torch.in"
compile 3.11 --constraints cuda.txt "$work/torch.in" --output-file "$work/torch.txt"
{
    cat torch-cuda.head
    echo
    grep --no-filename --invert-match --line-regexp --fixed-strings --file cpu.txt "$work/torch.txt"
} >"$work/torch-cuda.txt"
cp "$work/torch-cuda.txt" torch-cuda.txt
