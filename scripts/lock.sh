#!/usr/bin/env bash
# Makes the lock files again from pyproject.toml. Needs uv; nothing else in the project does.
#   ./scripts/lock.sh             keeps the versions that still fit
#   ./scripts/lock.sh --upgrade   takes the newest that are a week old
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A release that was taken over is mostly found out within days. For a fix that cannot wait:
#   UV_EXCLUDE_NEWER="0 days" ./scripts/lock.sh --upgrade-package NAME
export UV_EXCLUDE_NEWER=${UV_EXCLUDE_NEWER:-7 days}
compile() {
  local lock=$1
  shift
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
    --no-header --no-annotate --output-file "$lock" "$@" pyproject.toml >/dev/null
}
compile requirements-gates.lock --extra dev --extra gates "$@"
compile requirements-dev.lock --extra dev --constraint requirements-gates.lock "$@"
compile requirements.lock --constraint requirements-gates.lock "$@"
# The build tools alone, without the project's own dependencies.
printf 'hatchling\n' | uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-header --no-annotate --constraint requirements-gates.lock \
  --output-file requirements-build.lock - >/dev/null
