# shellcheck shell=bash
# Sourced: finds a Python that is new enough and calls it PYTHON.
# Bash alone would go on after a child that outlives the signal.
trap 'exit 130' INT
trap 'exit 143' TERM
PYTHON=
for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    PYTHON=$candidate
    break
  fi
done
if [ -z "$PYTHON" ]; then
  echo "Python 3.11 or newer is needed, and none of python3, python3.11 … python3.14, python on PATH is." >&2
  exit 1
fi
