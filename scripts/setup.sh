#!/usr/bin/env bash
# Prints the path of the interpreter that has our packages (`ours`) or Label Studio's (`label-studio`), and nothing
# else, on stdout; makes its virtual environment first if it is not there. What happens meanwhile goes to stderr.
set -euo pipefail

usable() {
  command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.12 python3.13; do
  if usable "$candidate"; then
    exec "$candidate" "$(dirname "${BASH_SOURCE[0]}")/make_venv.py" "$@"
  fi
done
echo "No Python 3.11 or newer is on PATH. Install one, or name it: PYTHON=/path/to/python3.11 make ..." >&2
exit 1
