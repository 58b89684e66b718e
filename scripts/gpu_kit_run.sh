#!/usr/bin/env bash
# The check on a GPU machine, from the kit that this lies in; arguments are those of benchmarks/gpu_check.py.
# PYTHON=... names another Python than python3. Nothing is written but site/ in this folder and the report, by default
# gpu-report.json where it is called. No network is used.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")"
kit=$PWD

fail() { printf 'run.sh: %s\n' "$1" >&2; exit 2; }

python=${PYTHON:-python3}
wanted=$(cat python-version)
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "expected Python $wanted, found no $python that runs; call PYTHON=/path/to/python$wanted ./run.sh"
[ "$found" = "$wanted" ] ||
    fail "expected Python $wanted, found $found as $python; call PYTHON=/path/to/python$wanted ./run.sh, or make a kit with --python python$found"
"$python" -m pip --version >/dev/null 2>&1 || fail "expected pip in $python, found none; install it"

# What that Python lacks lies in site/. A stamp says which wheels, so that a second run installs nothing.
wheels=$("$python" scripts/gpu_kit.py --missing .)
stamp=$(sha256sum $wheels)
if [ "$(cat site/.wheels 2>/dev/null || true)" != "$stamp" ]; then
    printf 'run.sh: installing %s wheels into site/\n' "$(wc -w <<< "$wheels")"
    rm -rf site.partial
    "$python" -m pip --isolated --disable-pip-version-check install --quiet --no-index --no-deps \
        --target site.partial $wheels
    printf '%s\n' "$stamp" > site.partial/.wheels
    rm -rf site
    mv site.partial site
fi
cd "$from"
PYTHONPATH="$kit/site${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$kit/benchmarks/gpu_check.py" --device cuda "$@"
