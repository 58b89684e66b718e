#!/usr/bin/env bash
# Set up .venv: the package with its extras, and the system libraries that FFCV is built against.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$1" >&2; exit 2; }

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
    echo "setup: installing ${missing[*]}"
    apt="apt-get install -y --no-install-recommends ${missing[*]}"
    sudo=
    if [ "$(id -u)" -ne 0 ]; then sudo=sudo; fi
    if command -v apt-get >/dev/null && { [ -z "$sudo" ] || command -v sudo >/dev/null; }; then
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

[ -x .venv/bin/python ] && supported .venv/bin/python || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,onnx]'
.venv/bin/python -c 'import torchvision; torchvision.ops.nms' ||
    fail "expected torch and torchvision to be a matching pair, found that torchvision does not import; remove .venv and run again"
touch .venv/.ready
