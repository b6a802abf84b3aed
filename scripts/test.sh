#!/usr/bin/env bash
# Checks everything: style, of shell scripts too, then the tests. Arguments go to pytest:
#   scripts/test.sh tests/prune -x
# The first call makes the virtual environment .venv; PYTHON=python3 uses another Python as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
ensure_environment requirements-dev.txt

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" shellcheck -x scripts/*.sh tests/*.sh # lies beside the Python it is installed for
exec "$PYTHON" -m pytest --numprocesses auto --dist worksteal "$@" # the tests compute with one thread each
