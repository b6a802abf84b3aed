# shellcheck shell=bash
# Sourced by demo.sh and test.sh, in the repository's folder. Makes the virtual environment .venv once, and sets PYTHON.
# A PYTHON that is set already is used as it is, and nothing is installed.

# ensure_environment FILE: PYTHON becomes a Python that has what the requirements file lists
ensure_environment() {
  if [[ -n ${PYTHON:-} ]]; then
    return
  fi
  local requirements=$1 stamp=.venv/$1.installed wanted
  wanted=$(cat requirements*.txt | cksum) # all of the files: they include one another
  PYTHON=$PWD/.venv/bin/python
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$PYTHON" -c '' 2>/dev/null; then
    return
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: python3 is $(python3 --version 2>&1), Python 3.10 or newer is needed" >&2
    exit 2
  }
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then # none yet, or one that was left half-made
    echo "making a virtual environment in .venv" >&2
    python3 -m venv --clear .venv
  fi
  echo "installing $requirements into .venv" >&2
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
  echo "$wanted" >"$stamp"
}
