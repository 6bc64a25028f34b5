#!/usr/bin/env bash
# Compiles requirements.lock from pyproject.toml with uv, which honours the overrides there and pip's own settings here.
# requirements-label-studio.lock is the `pip freeze` of an environment with nothing but that label-studio.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output="${1:-requirements.lock}"
python="$(scripts/setup.sh ours)"
tools="$(dirname "$(dirname "$(dirname "$python")")")/lock-tools"
if [ ! -x "$tools/bin/uv" ]; then
  "$python" -m venv "$tools" >&2
  "$tools/bin/python" -m pip install --quiet uv >&2
fi

# uv does not read pip's configuration
pip_setting() { "$python" -m pip config get "global.$1" 2>/dev/null || "$python" -m pip config get ":env:.$1" 2>/dev/null || true; }
default_index="$(pip_setting index-url)"
extra_index="$(pip_setting extra-index-url)"
find_links="$(pip_setting find-links)"
certificates="$(pip_setting cert)"
export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$default_index}" UV_INDEX="${UV_INDEX:-$extra_index}"
export UV_FIND_LINKS="${UV_FIND_LINKS:-$find_links}" SSL_CERT_FILE="${SSL_CERT_FILE:-$certificates}"
for name in UV_DEFAULT_INDEX UV_INDEX UV_FIND_LINKS SSL_CERT_FILE; do
  [ -n "${!name}" ] || unset "$name"
done

"$tools/bin/uv" pip compile pyproject.toml --extra dev --extra postgres --universal --python-version 3.11 \
  --index-strategy unsafe-best-match --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
  --quiet --output-file "$output"
echo "$output: $(grep -c == "$output") packages" >&2
