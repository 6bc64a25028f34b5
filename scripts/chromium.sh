#!/usr/bin/env bash
# Tries to have a Chromium for the browser tests. Never fails: without one they are skipped, and say why.
set -uo pipefail

if command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 ||
  command -v google-chrome >/dev/null 2>&1; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || [ ! -f /etc/debian_version ]; then
  echo "no chromium on PATH: the browser tests will be skipped (Debian: apt-get install chromium)" >&2
  exit 0
fi
log="$(mktemp)"
echo "installing chromium for the browser tests, log: $log" >&2
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "chromium could not be installed: the browser tests will be skipped" >&2
fi
exit 0
