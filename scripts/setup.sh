#!/usr/bin/env bash
# Set up .venv: the package with its extras, and the system libraries that FFCV is built against.
# `scripts/setup.sh FOLDER CONSTRAINTS` makes another environment of other versions beside it: `make test-python`.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
constraints=${2:-constraints.txt}

say() { printf 'setup: %s\n' "$1"; }
# The lock's file names the environment at work; what fails ends it in order, what is interrupted does not.
fail() { : > .setup.lock; printf 'setup: %s\n' "$1" >&2; exit 2; }
trap 'exit 130' INT TERM HUP  # not as a failure of the command that a signal ended

# Two at once in one checkout would install over each other: the second one waits, and finds the work done. The lock is
# given back when this script and all that it started have ended, in any way.
made() {
    [ -e "$venv/.ready" ] && [ -z "$(find pyproject.toml setup.py "$constraints" scripts/setup.sh pipeline/images/_jpeg.c \
        trainer/students/fused/_depthwise.[ch] -newer "$venv/.ready")" ]
}
exec 9>> .setup.lock
if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "another one is at work in this checkout; waiting for it"
    flock 9
    if made; then exit 0; fi
fi
if [ -s .setup.lock ]; then
    interrupted=$(cat .setup.lock)
    say "the last one was interrupted; starting again with a new $interrupted"
    rm -rf "$interrupted"
fi
echo "$venv" > .setup.lock

# The first Python of 3.11 to 3.13; PYTHON=... chooses another.
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if supported "$candidate"; then python=$(command -v "$candidate"); break; fi
done
[ -n "$python" ] || fail "expected Python 3.11 to 3.13, found none; install one, or call make with PYTHON=/path/to/python"

# What is missing, as names of Debian packages.
missing=()
have() { pkg-config --exists "$1" 2>/dev/null; }
command -v pkg-config >/dev/null || missing+=(pkg-config)
command -v c++ >/dev/null || missing+=(g++)
have libturbojpeg || missing+=(libturbojpeg0-dev)
have opencv4 || missing+=(libopencv-dev)
have libjpeg || missing+=(libjpeg-dev)
have zlib || missing+=(zlib1g-dev)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
    missing+=("python$version-dev")

if [ ${#missing[@]} -gt 0 ]; then
    apt="apt-get install -y --no-install-recommends ${missing[*]}"
    sudo=
    if [ "$(id -u)" -ne 0 ]; then sudo=sudo; fi
    if command -v apt-get >/dev/null && { [ -z "$sudo" ] || command -v sudo >/dev/null; }; then
        say "installing ${missing[*]}, about a minute"
        $sudo apt-get update -q
        DEBIAN_FRONTEND=noninteractive $sudo $apt
    else
        fail "expected the system libraries ${missing[*]}, found them missing and no right to install them; run one of
  sudo apt-get install ${missing[*]}
  sudo dnf install pkgconf-pkg-config gcc-c++ turbojpeg-devel libjpeg-turbo-devel zlib-devel opencv-devel python3-devel
  brew install pkg-config jpeg-turbo opencv
  conda install -c conda-forge pkg-config compilers libjpeg-turbo opencv
and then the same make command again"
    fi
fi

if ! { [ -x "$venv/bin/python" ] && supported "$venv/bin/python"; }; then
    say "making $venv for Python $version"
    "$python" -m venv --clear "$venv"
fi
say "installing the packages into $venv: two to ten minutes and 6 GB at first, seconds when they are there"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
    --editable '.[demo,dev,docs,onnx]' ||
    fail "expected pip to install the packages, found that it could not (its message is above); run again when that is mended"
"$venv/bin/python" -c 'import torchvision; torchvision.ops.nms' ||
    fail "expected torch and torchvision to be a matching pair, found that torchvision does not import; remove $venv and run
again"
touch "$venv/.ready"
: > .setup.lock
